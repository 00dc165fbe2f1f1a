"""model.py against independent oracles: transformers' GLM-ASR encoder, a plain Qwen2 run token by token, its own generate().

    OMP_NUM_THREADS=1 python -m pytest tests/test_model.py -q
"""

import copy
import dataclasses
import inspect
import json
import math
import os
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.glmasr.configuration_glmasr import GlmAsrConfig, GlmAsrEncoderConfig
from transformers.models.glmasr.modeling_glmasr import GlmAsrEncoder, GlmAsrMultiModalProjector

import data
import model
from conftest import TEXTS, tiny

PROMPT = ["<|user|>", "<|begin_of_audio|>"], ["<|end_of_audio|>", "Please transcribe this audio.", "<|assistant|>"]
LENGTHS = [120, 10, 57, 5, 96, 33, 7, 64]  # mel frames; 5 and 7 (50 and 70 ms) are shorter than one audio token's 8


def close(a, b, atol=1e-5):
    """Equal to `atol`, or to that part of the largest value where values exceed 1."""
    torch.testing.assert_close(a, b, rtol=0, atol=atol * max(1.0, b.abs().max().item()))


def mel_batch(lengths=LENGTHS, seed=0):
    """Random features of the given lengths, padded with zeros, as data.load_batch pads."""
    mel = torch.zeros(len(lengths), 128, max(lengths))
    for row, n in zip(mel, lengths):
        row[:, :n] = torch.randn(128, n, generator=torch.Generator().manual_seed(seed + n)) * 0.4
    return data.Batch([data.Utterance(f"u{i}", "") for i in range(len(lengths))], mel, torch.tensor(lengths), [])


def alone(batch, i):
    """Row i as a batch of its own, without padding."""
    n = batch.n_frames[i].item()
    return data.Batch(batch.utterances[i:i + 1], batch.mel[i:i + 1, :, :n], batch.n_frames[i:i + 1], [])


def some_responses(asr, n_rows, seed=0, longest=9):
    """Random ids of unequal length that end in EOS, padded on the right -> ids, mask (B, R)."""
    rng, allowed = np.random.default_rng(seed), (~asr.blocked).nonzero()[:, 0].numpy()
    rows = [[*rng.choice(allowed, n - 1).tolist(), asr.eos_id] for n in [longest, 1, *rng.integers(2, longest, n_rows - 2)]]
    ids = torch.tensor([row + [asr.pad_id] * (longest - len(row)) for row in rows])
    return ids, torch.arange(longest) < torch.tensor(list(map(len, rows)))[:, None]


@torch.no_grad()
def prompt_embeds(asr, batch, i):
    """(P, D) prompt of row i, put together by hand from the token strings. Oracle."""
    token = lambda names: [j for n in names for j in ([asr.tokenizer.get_vocab()[n]] if n.startswith("<|") else asr.tokenizer.encode(n))]
    embed = lambda ids: asr.net.lm.get_input_embeddings()(torch.tensor(ids))
    one = alone(batch, i)
    audio, n = asr.net.audio_encoder(one.mel, one.n_frames)
    assert audio.shape[1] == n.item()
    return torch.cat([embed(token(PROMPT[0])), audio[0], embed(token(PROMPT[1]))])


def plain_qwen2(asr):
    """The student's LM as transformers alone would build it: eager attention, rope_theta where Qwen2 has it. Oracle."""
    c = asr.net.config
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "rms_norm_eps",
            "max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    config = Qwen2Config(**{k: c[k] for k in keys}, rope_parameters={"rope_type": "default", "rope_theta": c["rope_theta"]}, attn_implementation="eager")
    lm = Qwen2ForCausalLM(config).eval()
    lm.load_state_dict(asr.net.lm.state_dict())
    return lm


@torch.no_grad()
def next_logits(lm, prompt, written):
    """(V,) logits of the token after prompt (P, D) and `written` ids: one row, no padding, no cache. Oracle."""
    tail = lm.get_input_embeddings()(torch.tensor(written, dtype=torch.long))
    return lm(inputs_embeds=torch.cat([prompt, tail])[None], use_cache=False).logits[0, -1]


# ---------------------------------------------------------------------------- encoder

def glmasr_twin(encoder, heads, lm_width):
    """transformers' encoder and projector with the weights of ours, q and k rows reordered from interleaved to split-half RoPE."""
    w, d = encoder.whisper, encoder.layer_norm.normalized_shape[0]
    audio = GlmAsrEncoderConfig(hidden_size=d, intermediate_size=w.layers[0].fc1.out_features, num_hidden_layers=len(w.layers), num_attention_heads=heads,
                                num_mel_bins=w.conv1.in_channels, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
                                attn_implementation="eager")
    text = dict(model_type="llama", hidden_size=lm_width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    stacked = GlmAsrEncoderConfig(hidden_size=d, intermediate_size=4 * d)  # theirs takes four frames side by side for the FFN's width
    twin, projector = GlmAsrEncoder(audio).eval(), GlmAsrMultiModalProjector(GlmAsrConfig(audio_config=stacked, text_config=text)).eval()
    head_dim = d // heads
    order = [*range(0, head_dim // 2, 2), *range(1, head_dim // 2, 2), *range(head_dim // 2, head_dim)]
    rows = torch.tensor([h * head_dim + j for h in range(heads) for j in order])
    names = {"self_attn.out_proj": "self_attn.o_proj", "self_attn_layer_norm": "input_layernorm", "final_layer_norm": "post_attention_layernorm",
             "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    state = {}
    for key, value in w.state_dict().items():
        if "q_proj" in key or "k_proj" in key:
            value = value[rows]
        for ours, theirs in names.items():
            key = key.replace(ours + ".", theirs + ".")
        state[key] = value
    twin.load_state_dict(state | {"norm." + k: v for k, v in encoder.layer_norm.state_dict().items()})
    projector.load_state_dict({f"linear_{n + 1}.{k}": v for n in (0, 1) for k, v in encoder.adapting[2 * n].state_dict().items()})
    return twin, projector


@pytest.mark.parametrize("n_frames", [3, 8, 9, 16, 101, 110, 3000])
@pytest.mark.parametrize("size", ["student", "wider"])
@torch.no_grad()
def test_encoder_is_glmasrs(student, size, n_frames):
    heads, lm_width, encoder = 2, 32, student.net.audio_encoder
    if size == "wider":
        torch.manual_seed(3)
        heads, lm_width = 3, 20
        encoder = model.AudioEncoder(128, 72, 3, heads, 200, lm_width)
        for p in encoder.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    twin, projector = glmasr_twin(encoder, heads, lm_width)
    mel, n_tokens = mel_batch([n_frames]).mel, max((n_frames + 1) // 2 // 4, 1)
    states = twin(mel).last_hidden_state  # (1, T', d)
    # Four states make a token. transformers takes multiples of four only; the published code drops what is left over, or fills up the first.
    states = torch.nn.functional.pad(states, (0, 0, 0, max(0, 4 - states.shape[1])))[:, :4 * n_tokens]
    expected = projector(states.reshape(n_tokens, -1))
    audio, n = encoder(mel, torch.tensor([n_frames]))
    assert audio.shape == (1, n_tokens, lm_width) and n.item() == n_tokens
    assert expected.std() > 0.1
    close(audio[0], expected)


@pytest.mark.parametrize("lengths", [LENGTHS, [120, 5], [1, 6], [11, 12, 13, 14, 15, 16, 17], [97, 98, 99, 100, 101, 102, 103, 104]])
@torch.no_grad()
def test_encoder_row_does_not_depend_on_its_neighbours(student, lengths):
    batch = mel_batch(lengths)
    audio, n = student.net.audio_encoder(batch.mel, batch.n_frames)
    assert audio.shape[1] == n.max()
    for i in range(len(lengths)):
        one = alone(batch, i)
        expected, n_alone = student.net.audio_encoder(one.mel, one.n_frames)
        assert n[i] == n_alone.item() == expected.shape[1]
        close(audio[i, :n[i]], expected[0])


def test_encoder_reads_every_own_frame_and_no_other(student):
    batch = mel_batch([120, 64])
    mel = batch.mel.requires_grad_()
    audio, n = student.net.audio_encoder(mel, batch.n_frames)
    audio[1, :n[1]].square().sum().backward()
    seen = mel.grad.abs().sum(1) > 0  # (B, T)
    assert not seen[0].any() and seen[1, :64].all()
    # Column 64 lies under conv1's last window. It is zero in every batch, as it is for the clip alone; nothing further is read.
    assert not seen[1, 65:].any()


def test_audio_token_formula(student):
    samples = torch.arange(160, 40 * 16_000 + 1, 80)
    expected = [max((s // 160 + 1) // 2 // 4, 1) for s in samples.tolist()]
    assert student.net.audio_encoder.n_tokens(samples // 160).tolist() == expected
    assert [expected[i] for i in (198, 1998, 5998)] == [12, 125, 375]  # 1, 10 and 30 s, from the published code's description


@torch.no_grad()
def test_audio_token_count_is_what_comes_out(student):
    for n_frames in range(1, 60):
        audio, n = student.net.audio_encoder(*(lambda b: (b.mel, b.n_frames))(mel_batch([n_frames])))
        assert audio.shape[1] == n.item() == max((n_frames + 1) // 2 // 4, 1)


@torch.no_grad()
def test_encoder_copies_out_alone(student):
    """Its sources run where there is nothing but torch, and make the same function."""
    namespace = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional}
    for part in (model.rope_angles, model.rotate, model.SelfAttention, model.EncoderLayer, model.WhisperEncoder, model.AudioEncoder):
        exec(inspect.getsource(part), namespace)
    sizes = student.net.config["whisper_config"]
    copied = namespace["AudioEncoder"](128, sizes["d_model"], sizes["encoder_layers"], sizes["encoder_attention_heads"],
                                       sizes["encoder_ffn_dim"], student.net.config["hidden_size"])
    copied.load_state_dict(student.net.audio_encoder.state_dict())
    batch = mel_batch()
    expected, n_expected = student.net.audio_encoder(batch.mel, batch.n_frames)
    audio, n_audio = copied(batch.mel, batch.n_frames)
    assert torch.equal(audio, expected) and torch.equal(n_audio, n_expected)


# ---------------------------------------------------------------------------- prompt and teacher forcing

@torch.no_grad()
def test_prompt_layout(student):
    batch = mel_batch()
    prompt = model.encode(student, batch)
    assert prompt.mask.shape == prompt.embeds.shape[:2]
    for i in range(len(LENGTHS)):
        expected = prompt_embeds(student, batch, i)
        assert prompt.mask[i].tolist() == [False] * (prompt.mask.shape[1] - len(expected)) + [True] * len(expected)  # padded on the left
        close(prompt.embeds[i, prompt.mask[i]], expected)
        close(prompt.audio[i, :prompt.n_audio[i]], expected[2:2 + prompt.n_audio[i]])


@torch.no_grad()
def test_teacher_forcing_is_the_lm_token_by_token(student):
    batch, lm = mel_batch(), plain_qwen2(student)
    ids, mask = some_responses(student, len(LENGTHS))
    z = student.head(model.response_hidden(student, model.encode(student, batch), ids, mask))
    expected, n = [], mask.sum(1).tolist()
    for i in range(len(LENGTHS)):
        prompt = prompt_embeds(student, batch, i)
        expected += [next_logits(lm, prompt, ids[i, :t].tolist()) for t in range(n[i])]  # row t predicts ids[i, t]
    assert z.shape == (sum(n), len(student.blocked))
    close(z, torch.stack(expected))


def test_causal_mask_entry_by_entry():
    key_mask = torch.tensor([[False, False, True, True, True], [True, True, False, True, False]])
    for n_queries in (3, 5):
        # Padding sees itself: a row of the softmax without any key is NaN on some backends, and NaN times a weight of 0 is NaN.
        expected = [[[k == q or (k < q and row[k]) for k in range(5)] for q in range(n_queries)] for row in key_mask.tolist()]
        assert model._causal_mask(key_mask, n_queries).tolist() == [[e] for e in expected]


@torch.no_grad()
def test_response_row_does_not_depend_on_its_neighbours(student):
    batch = mel_batch()
    ids, mask = some_responses(student, len(LENGTHS))
    hidden = model.response_hidden(student, model.encode(student, batch), ids, mask).split(mask.sum(1).tolist())
    for i, n in enumerate(mask.sum(1).tolist()):
        close(hidden[i], model.response_hidden(student, model.encode(student, alone(batch, i)), ids[i:i + 1, :n], mask[i:i + 1, :n]))


def test_gradient_of_a_batch_is_the_sum_of_its_rows(student):
    net = copy.deepcopy(student.net)
    asr, batch = dataclasses.replace(student, net=net), mel_batch()
    ids, mask = some_responses(asr, len(LENGTHS))

    def gradient(batch, ids, mask):
        net.zero_grad()
        hidden = model.response_hidden(asr, model.encode(asr, batch), ids, mask)
        torch.nn.functional.cross_entropy(asr.head(hidden), ids[mask], reduction="sum").backward()
        return {k: p.grad.clone() for k, p in net.named_parameters()}

    whole = gradient(batch, ids, mask)
    rows = [gradient(alone(batch, i), ids[i:i + 1, :n], mask[i:i + 1, :n]) for i, n in enumerate(mask.sum(1).tolist())]
    for k, g in whole.items():  # NaN of a masked row would show here too
        torch.testing.assert_close(g, sum(row[k] for row in rows), rtol=1e-3, atol=1e-4 * g.abs().max().item(), msg=k)
        assert g.abs().max() > 0, k  # every weight takes part


# ---------------------------------------------------------------------------- drawing

def test_draw_has_the_softmax_frequencies():
    z = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 1.5
    z[[0, 7, 8, 39]] = -math.inf
    u = torch.from_numpy(np.random.default_rng(0).random(20_000, dtype=np.float32))
    for temperature in (1.0, 0.6, 1.7):
        p = torch.from_numpy(np.exp(z.double().numpy() / temperature))
        expected = 20_000 * p / p.sum()
        counts = torch.bincount(model.draw(z.expand(len(u), -1), temperature, u), minlength=40)
        kept = expected > 5  # the chi-square approximation wants expected counts above 5
        chi2, dof = ((counts - expected)[kept] ** 2 / expected[kept]).sum(), int(kept.sum()) - 1
        assert chi2 < dof + 3.3 * math.sqrt(2 * dof) and dof > 20
        assert counts[expected == 0].sum() == 0


@pytest.mark.parametrize("u", [0.0, 1e-9, 1 - 2 ** -24, 1.0])  # 1.0: what a uniform below 1 in float64 may round to
def test_draw_at_the_ends_of_the_interval(u):
    z = torch.randn(3000, 1000, generator=torch.Generator().manual_seed(1)) * 4
    z[:, :3], z[:, -60:] = -math.inf, -math.inf  # first ids, and the padded tail
    ids = model.draw(z, 1.0, torch.full((3000,), u))
    assert (ids < 1000).all() and (z.gather(1, ids[:, None]) > -math.inf).all()
    assert (ids >= 3).all() and (ids < 940).all()
    if u == 0:  # the first id that has a probability in fp32
        assert torch.equal(ids, (z.softmax(-1) > 0).int().argmax(-1))


def test_draw_inverts_the_distribution_function():
    z = torch.tensor([[0.0, math.log(2.0), -math.inf, 0.0]]).expand(6, -1)  # p = 1/4, 1/2, 0, 1/4
    assert model.draw(z, 1.0, torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 0.9999])).tolist() == [0, 0, 1, 1, 3, 3]


def test_draw_at_temperature_zero_is_arg_max():
    z = torch.randn(50, 30, generator=torch.Generator().manual_seed(2))
    assert torch.equal(model.draw(z, 0, None), z.argmax(-1)) and torch.equal(model.draw(z, 0.0, None), z.argmax(-1))


# ---------------------------------------------------------------------------- generation

@torch.no_grad()
def test_greedy_is_transformers_generate(student, teacher):
    batch, limit, stopped = mel_batch(LENGTHS * 2, seed=5), 24, []
    batch.mel[len(LENGTHS):] *= 1.5
    for asr in (student, teacher):
        lm = plain_qwen2(asr)
        ids, mask = model.generate(asr, model.encode(asr, batch), limit)
        for i in range(len(mask)):
            expected = lm.generate(inputs_embeds=prompt_embeds(asr, batch, i)[None], do_sample=False, max_new_tokens=limit, eos_token_id=asr.eos_id,
                                   pad_token_id=asr.pad_id, suppress_tokens=asr.blocked.nonzero()[:, 0].tolist())[0].tolist()
            assert ids[i, mask[i]].tolist() == expected
            stopped.append(expected[-1] == asr.eos_id)
    assert any(stopped) and not all(stopped)  # both ways to end were seen


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampling_is_the_inverse_cdf_of_the_lm_token_by_token(student, temperature):
    batch, lm, limit = mel_batch([40, 12, 90]), plain_qwen2(student), 12
    uniforms = data.keyed_uniforms(0, 1, [u.id for u in batch.utterances], limit)
    ids, mask = model.generate(student, model.encode(student, batch), limit, temperature, uniforms)
    for i in range(3):
        prompt, written = prompt_embeds(student, batch, i), []
        while len(written) < limit and student.eos_id not in written:
            z = next_logits(lm, prompt, written).double().masked_fill(student.blocked, -math.inf)
            cdf = (z / temperature).softmax(-1).cumsum(-1)
            written.append(int((cdf <= uniforms[i, len(written)]).sum()))  # column t draws token t
        assert ids[i, mask[i]].tolist() == written


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generated_row_does_not_depend_on_its_neighbours(student, temperature):
    batch, limit = mel_batch(LENGTHS, seed=9), 30
    uniforms = lambda b: data.keyed_uniforms(3, 4, [u.id for u in b.utterances], limit)
    ids, mask = model.generate(student, model.encode(student, batch), limit, temperature, uniforms(batch))
    for i in range(len(LENGTHS)):
        one = alone(batch, i)
        expected, own = model.generate(student, model.encode(student, one), limit, temperature, uniforms(one))
        assert own.all() and ids[i, mask[i]].tolist() == expected[0].tolist()
    reverse = data.Batch(batch.utterances[::-1], batch.mel.flip(0), batch.n_frames.flip(0), [])
    flipped, _ = model.generate(student, model.encode(student, reverse), limit, temperature, uniforms(reverse))
    assert torch.equal(flipped.flip(0), ids)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@torch.no_grad()
def test_samples_have_the_frequencies_of_the_softmax(student, temperature):
    """4,000 rollouts of one clip: the first token against the softmax, the second against that behind the most frequent first."""
    batch, lm, n = mel_batch([40]), plain_qwen2(student), 4000
    prompt = model.encode(student, batch)
    many = model.Prompt(prompt.embeds.expand(n, -1, -1), prompt.mask.expand(n, -1), prompt.audio, prompt.n_audio)
    ids, mask = model.generate(student, many, 2, temperature, data.keyed_uniforms(7, 0, [f"u{i}" for i in range(n)], 2))
    first = ids[:, 0].mode().values.item()
    assert first != student.eos_id and mask[:, 0].all()
    for written, drawn in (([], ids[:, 0]), ([first], ids[ids[:, 0] == first, 1])):
        z = next_logits(lm, prompt_embeds(student, batch, 0), written).double().masked_fill(student.blocked, -math.inf)
        expected = len(drawn) * (z / temperature).softmax(-1)
        counts, kept = torch.bincount(drawn, minlength=len(z)).double(), expected > 5  # the approximation wants 5 and more
        counts, expected = (torch.cat([x[kept], x[~kept].sum()[None]]) for x in (counts, expected))
        chi2, dof = ((counts - expected) ** 2 / expected).sum(), int(kept.sum())
        assert dof > 10 and chi2 < dof + 3.3 * math.sqrt(2 * dof)


@pytest.mark.parametrize("u", [0.0, 1 - 2 ** -24, 1.0])
def test_no_rollout_has_a_blocked_id(student, u):
    """At both ends of the unit interval, where a neighbour of probability 0 is nearest: the first and the last ids are shut here."""
    shut = student.blocked.clone()
    shut[:40], shut[-140:] = True, True
    shut[student.eos_id] = False
    asr, batch = dataclasses.replace(student, blocked=shut), mel_batch()
    ids, mask = model.generate(asr, model.encode(asr, batch), 6, 3.0, np.full((len(LENGTHS), 6), u, np.float32))
    assert mask.any() and not shut[ids[mask]].any()


@torch.no_grad()
def written_alone(asr, lm, batch, i, limit, temperature, uniforms):
    """Row i of a batch: every token from the whole prefix again, no cache, no other row. Oracle."""
    prompt, written = prompt_embeds(asr, batch, i), []
    while len(written) < limit and not (written and asr.stop[written[-1]]):
        z = next_logits(lm, prompt, written).double().masked_fill(asr.blocked, -math.inf)
        cdf = (z / (temperature or 1.0)).softmax(-1).cumsum(-1)
        written.append(int(z.argmax()) if temperature == 0 else int((cdf <= uniforms[i, len(written)]).sum()))
    return written


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("case", ["all but one stop at once", "all stop at once", "one by one"])
def test_rows_that_leave_the_batch_change_nothing(student, monkeypatch, temperature, case):
    """More ids are made to end a transcript, so that rows stop where the case wants them to; then token by token against each row alone."""
    batch, limit, lm = mel_batch(LENGTHS, seed=9), 16, plain_qwen2(student)
    uniforms = data.keyed_uniforms(5, 0, [u.id for u in batch.utterances], limit)
    endless = dataclasses.replace(student, stop=torch.zeros_like(student.stop))
    free = [written_alone(endless, lm, batch, i, limit, temperature, uniforms) for i in range(len(LENGTHS))]
    firsts, everyone = [row[0] for row in free], range(len(LENGTHS))
    if case == "one by one":
        stops = {student.eos_id, *(free[i][t] for i, t in ((1, 1), (4, 2), (6, 3), (0, 5), (3, 7), (5, 9)))}
    elif case == "all stop at once":
        stops = {*firsts}
    else:
        stops = next({*firsts} - {*free[i]} for i in everyone
                     if all(firsts[j] not in free[i] for j in everyone if j != i))
    stop = torch.zeros_like(student.stop)
    stop[list(stops)] = True
    asr, kept, keep = dataclasses.replace(student, stop=stop, blocked=student.blocked & ~stop), [], model.Cache.keep
    monkeypatch.setattr(model.Cache, "keep", lambda cache, rows: kept.append(len(rows)) or keep(cache, rows))
    ids, mask = model.generate(asr, model.encode(asr, batch), limit, temperature, uniforms)
    expected = [written_alone(asr, lm, batch, i, limit, temperature, uniforms) for i in everyone]
    assert [row[own].tolist() for row, own in zip(ids, mask)] == expected and (ids[~mask] == asr.pad_id).all()
    lengths = sorted(map(len, expected))
    if case == "all stop at once":
        assert lengths == [1] * 8 and ids.shape == (8, 1)
    elif case == "all but one stop at once":
        assert lengths == [1] * 7 + [limit] and kept == [1]
    else:
        assert len(set(lengths)) >= 4 and len(kept) >= 2, "rows should leave the batch more than once"


def test_what_the_mask_of_a_rollout_covers(student, monkeypatch):
    batch, limit = mel_batch([20 + 3 * i for i in range(24)]), 40
    uniforms = data.keyed_uniforms(0, 0, [u.id for u in batch.utterances], limit)
    ids, mask = model.generate(student, model.encode(student, batch), limit, 1.0, uniforms)
    n = mask.sum(1)
    assert torch.equal(mask, torch.arange(ids.shape[1]) < n[:, None]) and (n > 0).all()  # from column 0, without holes
    ends = (ids == student.eos_id) & mask
    stopped = ends.any(1)
    assert stopped.any() and not stopped.all()
    assert (ends.sum(1) <= 1).all() and (ids[stopped, n[stopped] - 1] == student.eos_id).all()  # EOS is the last that counts
    assert (n[~stopped] == limit).all()
    assert (ids[~mask] == student.pad_id).all()
    assert not student.blocked[ids[mask]].any()
    # Only rows that stop: no column is left over after the longest.
    few = data.Batch([u for u, s in zip(batch.utterances, stopped) if s], batch.mel[stopped], batch.n_frames[stopped], [])
    calls, draw = [], model.draw
    monkeypatch.setattr(model, "draw", lambda *args: calls.append(1) or draw(*args))
    short, _ = model.generate(student, model.encode(student, few), limit, 1.0, uniforms[stopped.numpy()])
    assert short.shape[1] == n[stopped].max() and torch.equal(short, ids[stopped, :short.shape[1]])
    assert len(calls) == n[stopped].max() < limit  # nor is one computed


def test_rollout_scores_as_it_was_drawn(student):
    # The distribution that a rollout was drawn from is the one that response_hidden scores it under: greedy tokens are arg max there.
    batch = mel_batch(LENGTHS, seed=9)
    prompt = model.encode(student, batch)
    ids, mask = model.generate(student, prompt, 20)
    z = student.head(model.response_hidden(student, prompt, ids, mask)).masked_fill(student.blocked, -math.inf)
    assert torch.equal(z.argmax(-1), ids[mask])


def test_transcribe(student, corpus, tmp_path):
    utterances = data.read_manifest(corpus / "train.jsonl")
    whole = model.transcribe(student, utterances, micro_batch=24, max_new_tokens=12)
    assert set(whole) == {u.id for u in utterances}
    shares = [model.transcribe(student, utterances[::-1], rank, 3, 4, 12) for rank in range(3)]
    assert sum(map(len, shares)) == 24 and {k: v for share in shares for k, v in share.items()} == whole
    for u in utterances[:4]:
        ids, mask = model.generate(student, model.encode(student, data.load_batch([u])), 12)
        assert whole[u.id] == {"hyp": student.decode(ids, mask)[0].strip(), "stopped": student.eos_id in ids.tolist()[0], "n_tokens": ids.shape[1]}
    done = []
    model.transcribe(student, utterances[:5], micro_batch=2, max_new_tokens=1, progress=done.append)
    assert done == [2, 2, 1]
    with pytest.raises(data.AudioError, match="gone.wav"):  # an error rate over fewer clips than asked for would lie
        model.transcribe(student, [*utterances[:2], data.Utterance("x", str(tmp_path / "gone.wav"))])


# ---------------------------------------------------------------------------- tokenizer

HARD_TEXTS = ["put two cups on the shelf", "打开红色台灯", "mixed 中文 and English, 3.5%!", "emoji \U0001f600 \U0001f469\u200d\U0001f680", " leading and  double ",
              "line\nbreak\ttab", "don't 'quote' “curly”", "Cafe\u0301 é ﬁ Ａ", "a . b , c ' s", "\u2028 \x85 \x00", ""]


@pytest.mark.parametrize("source", ["fresh", "loaded"])
def test_text_survives_the_tokenizer(student, checkpoints, source):
    asr = student if source == "fresh" else model.load(checkpoints / "student")
    for text in HARD_TEXTS:
        ids = asr.encode_text(text)
        assert ids[-1] == asr.eos_id and asr.eos_id not in ids[:-1] and ids == student.encode_text(text)
        assert asr.decode(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool)) == [text]


def test_text_that_looks_like_a_special_token_stays_text(student):
    for token in model.SPECIAL:
        text = f"say {token} twice {token}{token}"
        ids = student.encode_text(text)
        assert not student.blocked[ids].any() and student.eos_id not in ids[:-1]
        assert student.decode(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool)) == [text]


def test_decode_reads_only_what_the_mask_covers(student):
    ids = torch.tensor([student.encode_text("find peter") + [60, 61], [student.pad_id] * (len(student.encode_text("find peter")) + 2)])
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[0, :-2] = True
    assert student.decode(ids, mask) == ["find peter", ""]


def test_trained_tokenizer(tokenizer):
    again = model.train_tokenizer(TEXTS["en"] * 4 + TEXTS["zh"] * 4, 320)
    assert again.get_vocab() == tokenizer.get_vocab() and len(tokenizer) == 320
    assert len(tokenizer.encode(model.INSTRUCTION)) <= 8  # it stands in every prompt
    assert [tokenizer.convert_ids_to_tokens(tokenizer.get_vocab()[t]) for t in model.SPECIAL] == model.SPECIAL
    assert model.train_tokenizer((t for t in TEXTS["en"]), 300).get_vocab()  # an iterator is read once only


def test_blocked_ids(student):
    vocabulary = student.tokenizer.get_vocab()
    assert len(student.blocked) > len(vocabulary)  # the vocabulary has a padded tail
    expected = {vocabulary[t] for t in model.SPECIAL if t != model.EOS} | set(range(len(vocabulary), len(student.blocked)))
    assert set(student.blocked.nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize("token", model.SPECIAL)
def test_assemble_names_a_token_that_is_missing(student, token):
    vocabulary = student.tokenizer.get_vocab()
    class Without:
        def get_vocab(self):
            return {k: v for k, v in vocabulary.items() if k != token}
    with pytest.raises(ValueError, match=re.escape(token)):
        model.assemble(student.net, Without(), "cpu")


@pytest.mark.parametrize("key, token", [("audio_token_id", model.AUDIO), ("eos_token_id", model.EOS), ("pad_token_id", model.PAD)])
def test_assemble_names_a_token_that_config_puts_elsewhere(student, key, token):
    net = model.Student(student.net.config | {key: 5})
    with pytest.raises(ValueError, match=f"{key} = 5.*{re.escape(token)}"):
        model.assemble(net, student.tokenizer, "cpu")


def test_assemble_refuses_a_token_beyond_the_embeddings(student):
    with pytest.raises(ValueError, match=re.escape(model.SPECIAL[-1])):
        model.assemble(model.Student(student.net.config | {"vocab_size": len(student.tokenizer) - 1}), student.tokenizer, "cpu")


def test_heads_must_divide_the_width(tokenizer):
    with pytest.raises(ValueError, match="36"):
        model.random_student(tokenizer, 36, 1, 1, 2)


@pytest.mark.parametrize("change", [{"mlp_adapter_act": "tanh"}, {"adapter_type": "conv"}, {"use_rope": False}, {"lm_type": "llama"}])
def test_an_encoder_of_another_kind_is_refused(student, change):
    with pytest.raises(ValueError, match="published encoder|expected one of"):
        model.Student(student.net.config | change)


@pytest.mark.parametrize("change, theta", [({}, 1e6), ({"rope_theta": 5e4}, 5e4), ({"rope_parameters": {"rope_type": "default", "rope_theta": 7e3}}, 7e3)])
def test_rope_theta_of_either_spelling_reaches_the_lm(student, change, theta):
    net = model.Student(student.net.config | change)
    close(net.lm.model.rotary_emb.inv_freq, theta ** (-torch.arange(0, 16, 2) / 16))


# ---------------------------------------------------------------------------- save and load

PUBLISHED = re.compile(r"""
    model\.embed_tokens\.weight | model\.norm\.weight
  | model\.layers\.\d+\.(input|post_attention)_layernorm\.weight
  | model\.layers\.\d+\.self_attn\.([qkv]_proj\.(weight|bias)|o_proj\.weight)
  | model\.layers\.\d+\.mlp\.(gate|up|down)_proj\.weight
  | audio_encoder\.whisper\.conv[12]\.(weight|bias)
  | audio_encoder\.whisper\.layers\.\d+\.self_attn\.((q|v|out)_proj\.(weight|bias)|k_proj\.weight)
  | audio_encoder\.whisper\.layers\.\d+\.(self_attn_layer_norm|final_layer_norm|fc1|fc2)\.(weight|bias)
  | audio_encoder\.layer_norm\.(weight|bias) | audio_encoder\.adapting\.[02]\.(weight|bias)
""", re.VERBOSE)


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def rewrite(path, change):
    """Apply `change` to the tensors of the checkpoint at `path`."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def checkpoint(checkpoints, tmp_path):
    """A copy of the student's checkpoint that a test may damage."""
    return shutil.copytree(checkpoints / "student", tmp_path / "checkpoint")


def test_load_returns_what_save_wrote(student, teacher, checkpoints):
    for name, asr in (("student", student), ("teacher", teacher)):
        loaded = model.load(checkpoints / name)
        assert same_weights(loaded.net, asr.net) and loaded.net.config == asr.net.config
        assert loaded.tokenizer.get_vocab() == asr.tokenizer.get_vocab() and torch.equal(loaded.blocked, asr.blocked)
        for field in ("prefix_ids", "suffix_ids", "eos_id", "pad_id", "audio_id"):
            assert getattr(loaded, field) == getattr(asr, field)
        assert loaded.head.weight.data_ptr() == loaded.body.embed_tokens.weight.data_ptr()  # still tied: one gradient, not two
        prompts = [model.encode(a, mel_batch()) for a in (asr, loaded)]
        assert all(torch.equal(*pair) for pair in zip(model.generate(asr, prompts[0], 8), model.generate(loaded, prompts[1], 8)))
    assert not same_weights(student.net, teacher.net)


def test_weight_names_are_the_published_ones(checkpoints, student):
    tensors = load_file(checkpoints / "student" / "model.safetensors")
    assert not [k for k in tensors if not PUBLISHED.fullmatch(k)]
    assert "lm_head.weight" not in tensors  # tied
    assert len(tensors) == len(student.net.state_dict()) - 1
    config = json.loads((checkpoints / "student" / "config.json").read_text())
    assert config["model_type"] == "arkasr" and config["architectures"] == ["ArkasrForConditionalGeneration"]
    assert not list(checkpoints.glob("*.tmp"))


def test_untied_head_is_stored(student, tmp_path):
    net = model.Student(student.net.config | {"tie_word_embeddings": False})
    asr = model.assemble(net, student.tokenizer, "cpu")
    model.save(asr, tmp_path / "m")
    assert "lm_head.weight" in load_file(tmp_path / "m" / "model.safetensors")
    loaded = model.load(tmp_path / "m")
    assert same_weights(loaded.net, net) and loaded.head.weight.data_ptr() != loaded.body.embed_tokens.weight.data_ptr()


def test_a_stored_copy_of_a_tied_head_is_accepted(student, checkpoint):
    rewrite(checkpoint, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))  # some published files hold one
    assert same_weights(model.load(checkpoint).net, student.net)


def test_unused_weights_of_published_checkpoints_are_skipped(student, checkpoint):
    # Whisper's position table and last LayerNorm are in the published files; with use_rope and the adapter's own norm nothing reads them.
    rewrite(checkpoint, lambda t: t.update({"audio_encoder.whisper.embed_positions.weight": torch.zeros(1500, 32),
                                            "audio_encoder.whisper.layer_norm.weight": torch.ones(32), "audio_encoder.whisper.layer_norm.bias": torch.zeros(32)}))
    assert same_weights(model.load(checkpoint).net, student.net)


def test_every_wrong_weight_is_listed(checkpoint):
    def damage(t):
        del t["model.norm.weight"], t["audio_encoder.adapting.2.bias"]
        t["audio_encoder.extra.weight"] = torch.zeros(2)
        t["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)
        t["audio_encoder.whisper.conv1.bias"] = torch.zeros(33)
    rewrite(checkpoint, damage)
    with pytest.raises(ValueError) as error:
        model.load(checkpoint)
    for part in ("missing lm.model.norm.weight", "missing audio_encoder.adapting.2.bias", "unexpected audio_encoder.extra.weight",
                 "unexpected lm.model.layers.9.mlp.up_proj.weight", "audio_encoder.whisper.conv1.bias is (33,), expected (32,)", str(checkpoint)):
        assert part in str(error.value)
    assert str(error.value).count("\n") == 5


def test_a_missing_embedding_is_an_error_although_the_head_is_tied(checkpoint):
    rewrite(checkpoint, lambda t: t.pop("model.embed_tokens.weight"))
    with pytest.raises(ValueError, match="missing lm.model.embed_tokens.weight"):
        model.load(checkpoint)


def test_load_names_what_is_no_checkpoint(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        model.load(tmp_path / "nowhere")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"model_type": "whisper"}))
    with pytest.raises(ValueError, match="whisper"):
        model.load(checkpoint)


def test_load_in_half_precision(checkpoints):
    loaded = model.load(checkpoints / "student", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.net.parameters()} == {torch.bfloat16}
    ids, mask = model.generate(loaded, model.encode(loaded, mel_batch()), 3)
    assert mask.any() and not loaded.blocked[ids[mask]].any()


@pytest.mark.parametrize("failing_call", [0, 1])
def test_a_failing_write_leaves_the_old_checkpoint(teacher, student, checkpoint, monkeypatch, failing_call):
    calls = []
    def full_disk(*args, **kw):
        calls.append(args)
        if len(calls) > failing_call:
            raise OSError("no space left on device")
        return save_file(*args, **kw)
    monkeypatch.setattr(model, "save_file", full_disk)
    extra = {"training.safetensors": {"a": torch.ones(2)}}
    for path in (checkpoint, checkpoint.with_name("new")):
        calls.clear()
        with pytest.raises(OSError, match="no space"):
            model.save(teacher, path, extra)
    assert not checkpoint.with_name("new").exists()  # never half a directory under its final name
    assert same_weights(model.load(checkpoint).net, student.net)
    monkeypatch.undo()
    for path in (checkpoint, checkpoint.with_name("new")):  # what the failure left behind is in nobody's way
        model.save(teacher, path, extra)
        assert same_weights(model.load(path).net, teacher.net)
        assert not path.with_name(path.name + ".tmp").exists() and torch.equal(load_file(path / "training.safetensors")["a"], torch.ones(2))


def test_an_interrupted_swap_leaves_a_whole_checkpoint(teacher, student, checkpoint, monkeypatch):
    n_files = len(list(checkpoint.iterdir()))
    for stop_at in range(n_files):
        calls = []
        def replace(a, b, original=os.rename):
            calls.append(b)
            if len(calls) > stop_at:
                raise KeyboardInterrupt
            original(a, b)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", replace)
            model.save(teacher, checkpoint)
        assert same_weights(model.load(checkpoint).net, student.net)  # weights come last


def train(asr, head, optimizer, seed):
    """One update from random gradients."""
    torch.manual_seed(seed)
    for p in [*asr.net.parameters(), *head.parameters()]:
        p.grad = torch.randn_like(p)
    optimizer.step()


def trainable(tokenizer, seed):
    asr, head = tiny(tokenizer, seed), torch.nn.Linear(4, 3)
    parameters = [*asr.net.parameters(), *head.parameters()]
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1}, {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]
    return asr, head, torch.optim.AdamW(groups, lr=1e-2)


def test_training_goes_on_bit_for_bit(tokenizer, tmp_path):
    asr, head, optimizer = trainable(tokenizer, 5)
    for step in range(3):
        train(asr, head, optimizer, step)
        model.save_training(tmp_path, step + 1, asr, optimizer, {"ctc_head": head}, {"best": 12.5})
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["step-0000003"]  # older ones are gone
    (tmp_path / "state" / "step-0000009.tmp").mkdir()                             # killed while it was written

    again, head2, optimizer2 = trainable(tokenizer, 6)
    assert not same_weights(asr.net, again.net)
    assert model.load_training(tmp_path, again, optimizer2, {"ctc_head": head2}) == {"step": 3, "best": 12.5}
    assert same_weights(asr.net, again.net) and same_weights(head, head2)
    states = [o.state_dict()["state"] for o in (optimizer, optimizer2)]
    assert states[0].keys() == states[1].keys() and len(states[0]) == sum(1 for _ in asr.net.parameters()) + 2
    for i in states[0]:
        assert states[0][i].keys() == states[1][i].keys()
        assert all(torch.equal(states[0][i][k], states[1][i][k]) and states[0][i][k].dtype == states[1][i][k].dtype for k in states[0][i])
    for a, h, o in ((asr, head, optimizer), (again, head2, optimizer2)):
        train(a, h, o, 77)
    assert same_weights(asr.net, again.net) and same_weights(head, head2)

    model.save_training(tmp_path, 4, again, optimizer2)
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["step-0000004"]


def test_the_newest_whole_state_is_read(tokenizer, tmp_path):
    asr, head, optimizer = trainable(tokenizer, 5)
    assert model.load_training(tmp_path, asr, optimizer) is None
    train(asr, head, optimizer, 0)
    model.save_training(tmp_path, 10, asr, optimizer)
    (tmp_path / "state" / "step-0000002").mkdir()      # a run killed while it removed this older one
    (tmp_path / "state" / "step-0000011.tmp").mkdir()
    assert model.load_training(tmp_path, asr, optimizer) == {"step": 10}


def test_a_failing_save_keeps_the_old_state(tokenizer, tmp_path, monkeypatch):
    asr, head, optimizer = trainable(tokenizer, 5)
    train(asr, head, optimizer, 0)
    model.save_training(tmp_path, 1, asr, optimizer)
    before = copy.deepcopy(asr.net)
    train(asr, head, optimizer, 1)
    def full_disk(*args, **kw):
        raise OSError("no space left on device")
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(model, "save_file", full_disk)
        model.save_training(tmp_path, 2, asr, optimizer)
    assert model.load_training(tmp_path, asr, optimizer) == {"step": 1} and same_weights(asr.net, before)


def test_a_state_is_a_checkpoint(tokenizer, tmp_path):
    asr, head, optimizer = trainable(tokenizer, 5)
    train(asr, head, optimizer, 0)
    model.save_training(tmp_path, 1, asr, optimizer, {"ctc_head": head})
    assert same_weights(model.load(tmp_path / "state" / "step-0000001").net, asr.net)  # every script accepts what another wrote


# ---------------------------------------------------------------------------- two vocabularies

def test_vocabulary_map_of_one_tokenizer_is_the_identity(student, teacher):
    expected = torch.where(student.blocked, -1, torch.arange(len(student.blocked)))
    assert torch.equal(model.vocabulary_map(student, teacher), expected)


def test_vocabulary_map_of_two_tokenizers(student):
    other_tokenizer = model.train_tokenizer(["the shelf the lamp and another song"] * 9 + TEXTS["zh"], 400)
    torch.manual_seed(0)
    other = model.random_student(other_tokenizer, 16, 1, 1, 1)
    for a, b in ((student, other), (other, student)):
        to_b = model.vocabulary_map(a, b)
        assert to_b.shape == a.blocked.shape and to_b[a.eos_id] == b.eos_id
        ours, theirs = a.tokenizer.get_vocab(), b.tokenizer.get_vocab()
        for token, i in ours.items():
            expected = theirs[token] if token in theirs and (token not in model.SPECIAL or token == model.EOS) else -1
            assert to_b[i] == expected, token
        assert (to_b[len(ours):] == -1).all()
        kept = to_b >= 0
        assert not a.blocked[kept].any() and not b.blocked[to_b[kept]].any()
        assert 256 < kept.sum() < (~a.blocked).sum()  # all bytes have a twin, some longer tokens have none
        assert len(set(to_b[kept].tolist())) == kept.sum()


def test_vocabulary_map_sends_eos_to_eos_whatever_it_is_called(student, teacher):
    renamed = dataclasses.replace(teacher, eos_id=teacher.pad_id)
    assert model.vocabulary_map(student, renamed)[student.eos_id] == teacher.pad_id


def test_vocabulary_map_leaves_out_what_either_side_blocks(student, teacher):
    a, b = student.tokenizer.get_vocab()["a"], student.tokenizer.get_vocab()["b"]
    block = lambda asr, i: dataclasses.replace(asr, blocked=asr.blocked | (torch.arange(len(asr.blocked)) == i))
    to_teacher = model.vocabulary_map(block(student, a), block(teacher, b))
    assert to_teacher[a] == to_teacher[b] == -1 and (to_teacher >= 0).sum() == (~student.blocked).sum() - 2


def test_map_logits_is_a_lookup():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(5, 12, generator=generator)
    to_teacher = torch.tensor([3, -1, 0, 11, 3, -1, 7, 1, -1])
    expected = [[row[j].item() if j >= 0 else -math.inf for j in to_teacher.tolist()] for row in z]
    assert model.map_logits(z, to_teacher).tolist() == expected
