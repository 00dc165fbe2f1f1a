"""model.py against independent oracles: transformers' GLM-ASR encoder, a plain Qwen2 run token by token, its own generate().

    OMP_NUM_THREADS=1 python -m pytest tests/test_model.py -q
"""

import copy
import dataclasses
import hashlib
import inspect
import json
import math
import os
import re
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM
from transformers.models.glmasr.configuration_glmasr import GlmAsrConfig, GlmAsrEncoderConfig
from transformers.models.glmasr.modeling_glmasr import GlmAsrEncoder, GlmAsrMultiModalProjector

import data
import distill
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
    """The student's LM as transformers alone would build it: eager attention, rope_theta where
    Qwen2 has it. Oracle."""
    c = asr.net.config
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "rms_norm_eps",
            "max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    config = Qwen2Config(**{k: c[k] for k in keys}, rope_parameters={"rope_type": "default", "rope_theta": c["rope_theta"]}, attn_implementation="eager")
    lm = Qwen2ForCausalLM(config).eval()
    lm.load_state_dict(asr.net.lm.state_dict())
    return lm


@torch.no_grad()
def next_logits(lm, prompt, written):
    """(V,) logits of the token after prompt (P, D) and `written` ids: one row, no padding, no
    cache. Oracle."""
    tail = lm.get_input_embeddings()(torch.tensor(written, dtype=torch.long))
    return lm(inputs_embeds=torch.cat([prompt, tail])[None], use_cache=False).logits[0, -1]


# ---------------------------------------------------------------------------- encoder

def glmasr_twin(encoder, heads, lm_width):
    """transformers' encoder and projector with the weights of ours, q and k rows reordered from
    interleaved to split-half RoPE."""
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

def hidden_of(asr, batch, ids, mask):
    """response_hidden behind the prompts of `batch` -> (N, D)."""
    prompt = model.encode_audio(asr, batch)
    return model.response_hidden(asr.body, prompt.embeds, prompt.mask, ids, mask)


@torch.no_grad()
def test_prompt_layout(student):
    batch = mel_batch()
    prompt = model.encode_audio(student, batch)
    assert prompt.mask.shape == prompt.embeds.shape[:2]
    for i in range(len(LENGTHS)):
        expected = prompt_embeds(student, batch, i)
        n_padding = prompt.mask.shape[1] - len(expected)
        assert prompt.mask[i].tolist() == [False] * n_padding + [True] * len(expected)
        close(prompt.embeds[i, prompt.mask[i]], expected)
        close(prompt.audio[i, :prompt.n_audio[i]], expected[2:2 + prompt.n_audio[i]])


@torch.no_grad()
def test_teacher_forcing_is_the_lm_token_by_token(student):
    batch = mel_batch()
    lm = plain_qwen2(student)
    ids, mask = some_responses(student, len(LENGTHS))
    z = student.logits(hidden_of(student, batch, ids, mask))
    expected = []
    for i, n in enumerate(mask.sum(1).tolist()):
        prompt = prompt_embeds(student, batch, i)
        for t in range(n):
            expected.append(next_logits(lm, prompt, ids[i, :t].tolist()))  # row t predicts ids[i, t]
    assert z.shape == (int(mask.sum()), len(student.blocked))
    close(z, torch.stack(expected))


def test_causal_mask_entry_by_entry():
    """Padding sees itself: a softmax over no key is NaN on some backends, and NaN times a weight of
    0 is NaN."""
    valid = torch.tensor([[False, False, True, True, True], [True, True, False, True, False]])
    mask = model.causal_mask(valid)
    assert mask.shape == (2, 1, 5, 5)
    for b, row in enumerate(valid.tolist()):
        for query in range(5):
            for key in range(5):
                assert mask[b, 0, query, key] == (key == query or (key < query and row[key]))


@torch.no_grad()
def test_response_row_does_not_depend_on_its_neighbours(student):
    batch = mel_batch()
    ids, mask = some_responses(student, len(LENGTHS))
    lengths = mask.sum(1).tolist()
    together = hidden_of(student, batch, ids, mask).split(lengths)
    for i, n in enumerate(lengths):
        close(together[i], hidden_of(student, alone(batch, i), ids[i:i + 1, :n], mask[i:i + 1, :n]))


def test_gradient_of_a_batch_is_the_sum_of_its_rows(student):
    net = copy.deepcopy(student.net)
    asr = dataclasses.replace(student, net=net)
    batch = mel_batch()
    ids, mask = some_responses(asr, len(LENGTHS))

    def gradient(batch, ids, mask):
        net.zero_grad()
        z = asr.logits(hidden_of(asr, batch, ids, mask))
        torch.nn.functional.cross_entropy(z, ids[mask], reduction="sum").backward()
        return {k: p.grad.clone() for k, p in net.named_parameters()}

    whole = gradient(batch, ids, mask)
    rows = []
    for i, n in enumerate(mask.sum(1).tolist()):
        rows.append(gradient(alone(batch, i), ids[i:i + 1, :n], mask[i:i + 1, :n]))
    for k, g in whole.items():  # NaN of a masked row would show here too
        expected = sum(row[k] for row in rows)
        torch.testing.assert_close(g, expected, rtol=1e-3, atol=1e-4 * g.abs().max().item(), msg=k)
        assert g.abs().max() > 0, k  # every weight takes part


# ---------------------------------------------------------------------------- logits

@pytest.fixture
def mm_of_a_gpu(monkeypatch):
    """torch.mm with out_dtype, which only CUDA has: bf16 inputs, sums in fp32."""
    mm = torch.mm

    def emulated(a, b, out_dtype=None):
        if out_dtype is None:
            return mm(a, b)
        assert a.dtype == b.dtype == torch.bfloat16
        return mm(a.to(out_dtype), b.to(out_dtype))

    monkeypatch.setattr(torch, "mm", emulated)


def test_logits_on_a_cpu_are_the_linear_layer_in_fp32(student):
    hidden = torch.randn(5, 32)
    z = model.logits(hidden, student.head.weight)
    assert z.dtype == torch.float32
    assert torch.equal(z, student.head(hidden))
    assert model.logits(hidden.bfloat16(), student.head.weight.bfloat16()).dtype == torch.float32


def gradient_of_reverse_kl(z_s, z_t):
    """p_S (log p_S - log p_T - D), in fp64 whatever the logits are."""
    logp_s = z_s.double().log_softmax(-1)
    logp_t = z_t.double().log_softmax(-1)
    p_s = logp_s.exp()
    d = (p_s * (logp_s - logp_t)).sum(-1, keepdim=True)
    return p_s * (logp_s - logp_t - d)


@pytest.mark.parametrize("scale", [1.0, 8.0], ids=["uncertain", "confident"])
def test_logits_on_a_gpu_are_not_rounded_to_bf16(mm_of_a_gpu, scale):
    """Error of the gradient of reverse KL against fp64, on V = 151,936: from bf16 logits many times
    that from fp32 sums."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.3 * torch.randn(151_936, 16, generator=generator)
    hidden_s = scale * torch.randn(4, 16, generator=generator)
    # A teacher that is not far away, as in distillation.
    hidden_t = hidden_s + 0.1 * scale * torch.randn(4, 16, generator=generator)

    def relative_error(logits):
        error = gradient_of_reverse_kl(logits(hidden_s), logits(hidden_t)) - exact
        return (error.norm() / exact.norm()).item()

    def in_fp64(hidden):
        return hidden.bfloat16().double() @ weight.bfloat16().double().T

    exact = gradient_of_reverse_kl(in_fp64(hidden_s), in_fp64(hidden_t))
    ours = relative_error(lambda hidden: model.Logits.apply(hidden, weight))
    rounded = relative_error(lambda hidden: in_fp64(hidden).bfloat16().float())
    assert rounded > 0.003
    assert ours < rounded / 100


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_the_backward_of_gpu_logits_is_that_of_the_linear_layer(mm_of_a_gpu, frozen):
    """Values that bf16 holds exactly, so that nothing is rounded on either side; hidden rows are
    bf16, weights fp32, as on a GPU."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 8, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(11, 8, generator=generator).bfloat16().float().requires_grad_(not frozen)
    grad_z = torch.randn(5, 11, generator=generator)
    z = model.Logits.apply(hidden, weight)
    assert z.dtype == torch.float32
    z.backward(grad_z)

    exact_hidden = hidden.detach().double().requires_grad_()
    exact_weight = weight.detach().double().requires_grad_()
    exact = torch.nn.functional.linear(exact_hidden, exact_weight)
    exact.backward(grad_z.double())
    torch.testing.assert_close(z.double(), exact, rtol=1e-6, atol=1e-6)
    assert hidden.grad.dtype == torch.bfloat16
    torch.testing.assert_close(hidden.grad.double(), exact_hidden.grad, rtol=2 ** -8, atol=1e-6)
    if frozen:
        assert weight.grad is None
    else:
        assert weight.grad.dtype == torch.float32
        torch.testing.assert_close(weight.grad.double(), exact_weight.grad, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------- drawing

def chi_square_is_plausible(counts, expected):
    """Pearson's test far out in the tail: its approximation wants expected counts above 5, so rare
    ids are put together."""
    common = expected > 5
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None].clamp(min=1e-9)])
    chi2 = ((counts - expected) ** 2 / expected)[:-1].sum()
    freedom = int(common.sum())
    assert freedom > 10
    return chi2 < freedom + 3.3 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_draw_has_the_softmax_frequencies(temperature):
    z = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 1.5
    z[[0, 7, 8, 39]] = -math.inf
    u = torch.from_numpy(np.random.default_rng(0).random(20_000, dtype=np.float32))
    p = torch.from_numpy(np.exp(z.double().numpy() / temperature))
    expected = 20_000 * p / p.sum()
    counts = torch.bincount(model.draw(z.expand(len(u), -1), temperature, u), minlength=40)
    assert chi_square_is_plausible(counts, expected)
    assert counts[expected == 0].sum() == 0


@pytest.mark.parametrize("u", [0.0, 1e-9, 1 - 2 ** -24, 1.0])  # 1.0: what a uniform below 1 in float64 may round to
def test_draw_at_the_ends_of_the_interval(u):
    z = torch.randn(3000, 1000, generator=torch.Generator().manual_seed(1)) * 4
    z[:, :3] = -math.inf
    z[:, -60:] = -math.inf  # the padded tail of a vocabulary
    ids = model.draw(z, 1.0, torch.full((3000,), u))
    assert ((ids >= 3) & (ids < 940)).all()
    if u == 0:  # the first id that has a probability in fp32
        assert torch.equal(ids, (z.softmax(-1) > 0).int().argmax(-1))


def test_draw_inverts_the_distribution_function():
    z = torch.tensor([[0.0, math.log(2.0), -math.inf, 0.0]]).expand(6, -1)  # p = 1/4, 1/2, 0, 1/4
    u = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 0.9999])
    assert model.draw(z, 1.0, u).tolist() == [0, 0, 1, 1, 3, 3]


def test_draw_at_temperature_zero_is_arg_max():
    z = torch.randn(50, 30, generator=torch.Generator().manual_seed(2))
    assert torch.equal(model.draw(z, 0, None), z.argmax(-1))
    assert torch.equal(model.draw(z, 0.0, None), z.argmax(-1))


# ---------------------------------------------------------------------------- generation

@torch.no_grad()
def written_alone(asr, lm, batch, i, limit, temperature=0.0, uniforms=None):
    """Row i of a batch: every token from the whole prefix again, no cache, no other row. Oracle."""
    prompt = prompt_embeds(asr, batch, i)
    written = []
    while len(written) < limit and not (written and asr.stop[written[-1]]):
        z = next_logits(lm, prompt, written).double().masked_fill(asr.blocked, -math.inf)
        if temperature == 0:
            written.append(int(z.argmax()))
        else:
            cdf = (z / temperature).softmax(-1).cumsum(-1)
            written.append(int((cdf <= uniforms[i, len(written)]).sum()))  # column t draws token t
    return written


def rows_of(ids, mask):
    """(B, R) -> a list of emitted ids a row."""
    return [row[emitted].tolist() for row, emitted in zip(ids, mask)]


def roll_out(asr, batch, limit, temperature=0.0, uniforms=None):
    with torch.no_grad():
        return model.roll_out(asr, model.encode_audio(asr, batch), limit, temperature, uniforms)


@torch.no_grad()
def test_greedy_is_transformers_generate(student, teacher):
    batch = mel_batch(LENGTHS * 2, seed=5)
    batch.mel[len(LENGTHS):] *= 1.5
    limit = 24
    stopped = []
    for asr in (student, teacher):
        lm = plain_qwen2(asr)
        suppressed = asr.blocked.nonzero()[:, 0].tolist()
        for i, written in enumerate(rows_of(*roll_out(asr, batch, limit))):
            expected = lm.generate(
                inputs_embeds=prompt_embeds(asr, batch, i)[None], do_sample=False, max_new_tokens=limit,
                eos_token_id=asr.eos_id, pad_token_id=asr.pad_id, suppress_tokens=suppressed)
            assert written == expected[0].tolist()
            stopped.append(written[-1] == asr.eos_id)
    assert any(stopped)
    assert not all(stopped)  # both ways to end were seen


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampling_is_the_inverse_cdf_of_the_lm_token_by_token(student, temperature):
    batch = mel_batch([40, 12, 90])
    uniforms = data.keyed_uniforms(0, 1, [u.id for u in batch.utterances], 12)
    lm = plain_qwen2(student)
    expected = [written_alone(student, lm, batch, i, 12, temperature, uniforms) for i in range(3)]
    assert rows_of(*roll_out(student, batch, 12, temperature, uniforms)) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generated_row_does_not_depend_on_its_neighbours(student, temperature):
    batch = mel_batch(LENGTHS, seed=9)

    def write(batch):
        uniforms = data.keyed_uniforms(3, 4, [u.id for u in batch.utterances], 30)
        return rows_of(*roll_out(student, batch, 30, temperature, uniforms))

    together = write(batch)
    for i in range(len(LENGTHS)):
        assert write(alone(batch, i)) == [together[i]]
    reverse = data.Batch(batch.utterances[::-1], batch.mel.flip(0), batch.n_frames.flip(0), [])
    assert write(reverse) == together[::-1]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@torch.no_grad()
def test_samples_have_the_frequencies_of_the_softmax(student, temperature):
    """4,000 rollouts of one clip: the first token against the softmax, the second against that
    behind the most frequent first."""
    n = 4000
    batch = mel_batch([40])
    lm = plain_qwen2(student)
    prompt = model.encode_audio(student, batch)
    many = dataclasses.replace(prompt, embeds=prompt.embeds.expand(n, -1, -1), mask=prompt.mask.expand(n, -1))
    uniforms = data.keyed_uniforms(7, 0, [f"u{i}" for i in range(n)], 2)
    ids, mask = model.roll_out(student, many, 2, temperature, uniforms)
    assert mask[:, 0].all()
    first = ids[:, 0].mode().values.item()
    assert first != student.eos_id
    for written, drawn in (([], ids[:, 0]), ([first], ids[ids[:, 0] == first, 1])):
        z = next_logits(lm, prompt_embeds(student, batch, 0), written).double()
        z = z.masked_fill(student.blocked, -math.inf)
        expected = len(drawn) * (z / temperature).softmax(-1)
        assert chi_square_is_plausible(torch.bincount(drawn, minlength=len(z)).double(), expected)


@pytest.mark.parametrize("u", [0.0, 1 - 2 ** -24, 1.0])
def test_no_rollout_has_a_blocked_id(student, u):
    """At both ends of the unit interval, where a neighbour of probability 0 is nearest: the first
    and the last ids are shut here."""
    shut = student.blocked.clone()
    shut[:40] = True
    shut[-140:] = True
    shut[student.eos_id] = False
    asr = dataclasses.replace(student, blocked=shut)
    ids, mask = roll_out(asr, mel_batch(), 6, 3.0, np.full((len(LENGTHS), 6), u, np.float32))
    assert mask.any()
    assert not shut[ids[mask]].any()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("case", ["all but one stop at once", "all stop at once", "one by one"])
def test_rows_that_leave_the_batch_change_nothing(student, monkeypatch, temperature, case):
    """More ids are made to end a transcript, so that rows stop where the case wants them to; then
    each row against itself alone."""
    limit = 16
    batch = mel_batch(LENGTHS, seed=9)
    rows = range(len(LENGTHS))
    lm = plain_qwen2(student)
    uniforms = data.keyed_uniforms(5, 0, [u.id for u in batch.utterances], limit)
    endless = dataclasses.replace(student, stop=torch.zeros_like(student.stop))
    free = [written_alone(endless, lm, batch, i, limit, temperature, uniforms) for i in rows]
    firsts = [row[0] for row in free]
    if case == "one by one":
        stops = {student.eos_id, *(free[i][t] for i, t in ((1, 1), (4, 2), (6, 3), (0, 5), (3, 7), (5, 9)))}
    elif case == "all stop at once":
        stops = set(firsts)
    else:
        lasting = next(i for i in rows if not set(free[i]) & {firsts[j] for j in rows if j != i})
        stops = {firsts[j] for j in rows if j != lasting}
    stop = torch.zeros_like(student.stop)
    stop[list(stops)] = True
    asr = dataclasses.replace(student, stop=stop, blocked=student.blocked & ~stop)

    kept = []  # rows that go on, whenever others leave
    select = model.DynamicCache.batch_select_indices

    def keep_count(cache, left):
        kept.append(len(left))
        select(cache, left)

    monkeypatch.setattr(model.DynamicCache, "batch_select_indices", keep_count)
    ids, mask = roll_out(asr, batch, limit, temperature, uniforms)
    expected = [written_alone(asr, lm, batch, i, limit, temperature, uniforms) for i in rows]
    assert rows_of(ids, mask) == expected
    assert (ids[~mask] == asr.pad_id).all()
    lengths = sorted(map(len, expected))
    if case == "all stop at once":
        assert lengths == [1] * 8
        assert ids.shape == (8, 1)
    elif case == "all but one stop at once":
        assert lengths == [1] * 7 + [limit]
        assert kept == [1]
    else:
        assert len(set(lengths)) >= 4
        assert len(kept) >= 2, "rows should leave the batch more than once"


def test_what_the_mask_of_a_rollout_covers(student, monkeypatch):
    limit = 40
    batch = mel_batch([20 + 3 * i for i in range(24)])
    uniforms = data.keyed_uniforms(0, 0, [u.id for u in batch.utterances], limit)
    ids, mask = roll_out(student, batch, limit, 1.0, uniforms)
    n = mask.sum(1)
    assert (n > 0).all()
    assert torch.equal(mask, torch.arange(ids.shape[1]) < n[:, None])  # from column 0, without holes
    ends = (ids == student.eos_id) & mask
    stopped = ends.any(1)
    assert stopped.any()
    assert not stopped.all()
    assert (ends.sum(1) <= 1).all()
    assert (ids[stopped, n[stopped] - 1] == student.eos_id).all()  # EOS is the last that counts
    assert (n[~stopped] == limit).all()
    assert (ids[~mask] == student.pad_id).all()
    assert not student.blocked[ids[mask]].any()

    # Only rows that stop: no column is left over after the longest, nor is one computed.
    utterances = [u for u, s in zip(batch.utterances, stopped) if s]
    few = data.Batch(utterances, batch.mel[stopped], batch.n_frames[stopped], [])
    calls = []
    draw = model.draw

    def count(*args):
        calls.append(1)
        return draw(*args)

    monkeypatch.setattr(model, "draw", count)
    short, _ = roll_out(student, few, limit, 1.0, uniforms[stopped.numpy()])
    assert short.shape[1] == n[stopped].max() == len(calls) < limit
    assert torch.equal(short, ids[stopped, :short.shape[1]])


def test_rollout_scores_as_it_was_drawn(student):
    """The distribution that a rollout was drawn from is the one that response_hidden scores it
    under: greedy tokens are arg max there."""
    batch = mel_batch(LENGTHS, seed=9)
    ids, mask = roll_out(student, batch, 20)
    z = student.logits(hidden_of(student, batch, ids, mask)).masked_fill(student.blocked, -math.inf)
    assert torch.equal(z.argmax(-1), ids[mask])


def test_transcribe(student, corpus, tmp_path):
    utterances = data.read_manifest(corpus / "train.jsonl")
    whole = model.transcribe(student, utterances, micro_batch=24, max_new_tokens=12)
    assert set(whole) == {u.id for u in utterances}
    shares = {}
    for rank in range(3):
        share = model.transcribe(student, utterances[::-1], rank, 3, 4, 12)
        assert not shares.keys() & share.keys()
        shares |= share
    assert shares == whole
    for u in utterances[:4]:
        ids, mask = roll_out(student, data.load_batch([u]), 12)
        hyp = student.decode(ids, mask)[0].strip()
        assert whole[u.id] == {"hyp": hyp, "stopped": student.eos_id in ids.tolist()[0], "n_tokens": ids.shape[1]}
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
        for ours, theirs in zip(roll_out(asr, mel_batch(), 8), roll_out(loaded, mel_batch(), 8)):
            assert torch.equal(ours, theirs)
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
    ids, mask = roll_out(loaded, mel_batch(), 3)
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
        assert to_b.shape == a.blocked.shape
        ours = a.tokenizer.get_vocab()
        theirs = b.tokenizer.get_vocab()
        for token, i in ours.items():
            may_be_written = token not in model.SPECIAL or token == model.EOS
            assert to_b[i] == (theirs.get(token, -1) if may_be_written else -1), token
        assert (to_b[len(ours):] == -1).all()
        kept = to_b >= 0
        assert not a.blocked[kept].any()
        assert not b.blocked[to_b[kept]].any()
        assert 256 < kept.sum() < (~a.blocked).sum()  # all bytes have a counterpart, some longer tokens have none
        assert len(set(to_b[kept].tolist())) == kept.sum()


def test_vocabulary_map_sends_eos_to_eos_whatever_it_is_called(student, teacher):
    renamed = dataclasses.replace(teacher, eos_id=teacher.pad_id)
    assert model.vocabulary_map(student, renamed)[student.eos_id] == teacher.pad_id


def test_vocabulary_map_leaves_out_what_either_side_blocks(student, teacher):
    def block(asr, i):
        return dataclasses.replace(asr, blocked=asr.blocked | (torch.arange(len(asr.blocked)) == i))

    a = student.tokenizer.get_vocab()["a"]
    b = student.tokenizer.get_vocab()["b"]
    to_teacher = model.vocabulary_map(block(student, a), block(teacher, b))
    assert to_teacher[a] == to_teacher[b] == -1
    assert (to_teacher >= 0).sum() == (~student.blocked).sum() - 2


def test_map_logits_is_a_lookup():
    z = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    to_teacher = torch.tensor([3, -1, 0, 11, 3, -1, 7, 1, -1])
    expected = [[row[j].item() if j >= 0 else -math.inf for j in to_teacher.tolist()] for row in z]
    assert model.map_logits(z, to_teacher).tolist() == expected


def test_readable_prefix_ends_before_the_first_unknown_id():
    to_teacher = torch.tensor([4, 0, -1, 7])
    ids = torch.tensor([[0, 1, 3, 1], [0, 2, 3, 1], [2, 0, 0, 0], [3, 3, 2, 2]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    expected = [[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    assert model.readable_prefix(ids, mask, to_teacher).int().tolist() == expected


# ---------------------------------------------------------------------------- what a distillation logs

def top_ids(row, k):
    """The k ids with the highest finite logit, as a set."""
    finite = [v for v, z in enumerate(row) if z > -math.inf]
    return set(sorted(finite, key=lambda v: -row[v])[:k])


def softmax(row):
    weights = [math.exp(z) for z in row]
    return [w / sum(weights) for w in weights]


def agreement_by_hand(row_s, row_t, k):
    """One state with Python sets: two lists of logits, -inf where an id is ruled out."""
    p_s = softmax(row_s)
    p_t = softmax(row_t)
    shared = top_ids(row_s, k) & top_ids(row_t, k)
    return {
        "top1_agreement": float(top_ids(row_s, 1) == top_ids(row_t, 1)),
        "overlap": len(shared) / min(k, len(row_s)),
        "mass_student": sum(p_s[v] for v in shared),
        "mass_teacher": sum(p_t[v] for v in shared),
        "entropy": sum(-p * math.log(p) for p in p_s if p > 0),
        "entropy_teacher": sum(-p * math.log(p) for p in p_t if p > 0),
    }


@pytest.mark.parametrize("k", [1, 4, 40])
def test_agreement_equals_sets(k):
    """Hidden rows are logits here, the heads do nothing; ids 0, 1 and 19 of 20 have no counterpart,
    the rest are shifted by one."""
    generator = torch.Generator().manual_seed(7)
    z_s = 3 * torch.randn(9, 20, generator=generator)
    z_t = z_s.roll(-1, 1) + torch.randn(9, 20, generator=generator)
    to_teacher = torch.arange(20) - 1
    to_teacher[[0, 1, 19]] = -1
    head = SimpleNamespace(logits=lambda hidden: hidden.clone(), device=torch.device("cpu"))
    found = model.agreement([z_s, z_t], head, head, to_teacher, k, chunk=4)

    rows = []
    for s, t in zip(z_s.tolist(), z_t.tolist()):
        kept = range(2, 19)
        row_s = [s[v] if v in kept else -math.inf for v in range(20)]
        row_t = [t[v - 1] if v in kept else -math.inf for v in range(20)]
        rows.append(agreement_by_hand(row_s, row_t, k))
    assert found.keys() == rows[0].keys()
    for name in found:
        assert found[name] == pytest.approx(sum(row[name] for row in rows) / 9, rel=1e-5), name


def test_agreement_of_no_state_is_nothing():
    head = SimpleNamespace(device=torch.device("cpu"))
    assert model.agreement(None, head, head, torch.arange(3), 2, 4) == {}


def test_rollout_health_by_hand():
    """Id 9 ends a rollout, 0 pads it: one ends at once, one ends, one is cut off, one is cut off
    and repeats itself."""
    ids = torch.tensor([[9, 0, 0, 0, 0, 0], [1, 2, 9, 0, 0, 0], [1, 2, 3, 4, 5, 6], [1, 2, 3, 1, 2, 3]])
    mask = torch.tensor([[1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1] * 6, [1] * 6]).bool()
    stop = torch.arange(10) == 9
    found = {name: int(n) for name, n in model.rollout_health(ids, mask, stop).items()}
    assert found == {"clips": 4, "truncated": 2, "empty": 1, "repeats": 1}


def test_repeats_finds_n_grams_of_emitted_tokens():
    cases = [
        ([1, 2, 3, 9, 1, 2, 3], 7, True),
        ([1, 2, 3, 4, 5, 6, 7], 7, False),
        ([5, 5, 5, 5, 0, 0, 0], 4, True),
        ([5, 5, 5, 0, 0, 0, 0], 3, False),   # what lies past a row's length is padding, and padding repeats nothing
        ([1, 2, 3, 1, 2, 3, 8], 7, True),
        ([1, 2, 3, 1, 2, 3, 8], 5, False),
    ]
    ids = torch.tensor([row for row, _, _ in cases])
    mask = torch.arange(7) < torch.tensor([length for _, length, _ in cases])[:, None]
    assert model.repeats(ids, mask).tolist() == [expected for _, _, expected in cases]
    assert model.repeats(ids[:, :2], mask[:, :2]).tolist() == [False] * 6


# ---------------------------------------------------------------------------- what copies out alone

def copied_out(*parts, **constants):
    """Sources of functions and classes, run where there is nothing but torch, numpy and a cache of
    transformers."""
    namespace = {"torch": torch, "F": torch.nn.functional, "math": math, "np": np, "hashlib": hashlib,
                 "DynamicCache": DynamicCache} | constants
    for part in parts:
        exec(inspect.getsource(part), namespace)
    return SimpleNamespace(**namespace)


@pytest.fixture
def tiny_qwen2():
    """An LM of transformers that has never seen this project."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Qwen2Config(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                             num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3)
        return Qwen2ForCausalLM(config).eval()


@torch.no_grad()
def test_rollout_and_scoring_copy_out_alone(tiny_qwen2):
    """On a bare LM: what the copy writes and scores is what the module does, and what transformers
    writes."""
    alone = copied_out(model.autocast, model.causal_mask, model.positions_of, model.check_attention,
                       model.Logits, model.logits, model.response_hidden, model.draw, model.generate)
    lm = tiny_qwen2
    n_prompt = torch.tensor([6, 3, 5])
    prompt_mask = torch.arange(6) >= 6 - n_prompt[:, None]
    embeds = lm.model.embed_tokens(torch.randint(1, 50, (3, 6), generator=torch.Generator().manual_seed(0)))
    nothing = torch.zeros(50, dtype=torch.bool)
    settings = {"stop": torch.arange(50) == 7, "blocked": nothing, "pad_id": 0, "max_new_tokens": 9}
    ids, mask = alone.generate(lm.model, lm.lm_head.weight, embeds, prompt_mask, **settings)
    expected = lm.generate(inputs_embeds=embeds, attention_mask=prompt_mask.long(), do_sample=False,
                           max_new_tokens=9, eos_token_id=7, pad_token_id=0)
    assert torch.equal(ids, expected)

    uniforms = torch.rand(3, 9, generator=torch.Generator().manual_seed(1))
    settings |= {"temperature": 1.0, "uniforms": uniforms}
    ids, mask = alone.generate(lm.model, lm.lm_head.weight, embeds, prompt_mask, **settings)
    same_ids, same_mask = model.generate(lm.model, lm.lm_head.weight, embeds, prompt_mask, **settings)
    assert torch.equal(ids, same_ids)
    assert torch.equal(mask, same_mask)
    hidden = alone.response_hidden(lm.model, embeds, prompt_mask, ids, mask)
    assert hidden.shape == (int(mask.sum()), 16)
    assert torch.equal(hidden, model.response_hidden(lm.model, embeds, prompt_mask, ids, mask))


def test_eager_attention_is_refused(tiny_qwen2):
    """It would add the mask's True and False to the scores as 1 and 0."""
    lm = tiny_qwen2
    lm.set_attn_implementation("eager")
    embeds = torch.randn(1, 3, 16)
    mask = torch.ones(1, 3, dtype=torch.bool)
    ids = torch.tensor([[4, 7]])
    nothing = torch.zeros(50, dtype=torch.bool)
    with pytest.raises(ValueError, match="'eager'.*sdpa"):
        model.response_hidden(lm.model, embeds, mask, ids, mask[:, :2])
    with pytest.raises(ValueError, match="'eager'.*sdpa"):
        model.generate(lm.model, lm.lm_head.weight, embeds, mask, stop=nothing, blocked=nothing,
                       pad_id=0, max_new_tokens=2)


def test_the_objective_copies_out_alone():
    """With heads that are plain functions: the loss and its gradient are the module's."""
    alone = copied_out(distill.reverse_kl, distill.forward_kl, distill.sampled_kl, distill.union_support,
                       distill.token_divergence, distill.loss_in_chunks)
    generator = torch.Generator().manual_seed(0)
    weight_s = torch.randn(12, 4, generator=generator)
    weight_t = torch.randn(9, 5, generator=generator)
    hidden_s = torch.randn(7, 4, generator=generator)
    hidden_t = torch.randn(7, 5, generator=generator)
    to_teacher = torch.tensor([3, 0, -1, 1, 8, 2, -1, 4, 5, 6, 7, -1])
    y = torch.tensor([0, 1, 3, 4, 5, 7, 8])
    paper = {"divergence": "forward", "support": "union", "top_k": 2, "tau": 2.0}
    for flags in ({}, paper, {"support": "sampled"}):
        results = []
        for module in (alone, distill):
            divergence = partial(module.token_divergence, **flags)
            results.append(module.loss_in_chunks(hidden_s, hidden_t, y, lambda h: h @ weight_s.T,
                                                 lambda h: h @ weight_t.T, to_teacher, divergence, 3))
        assert results[0][0] != 0
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


def test_keyed_uniforms_and_bootstrap_copy_out_alone():
    alone = copied_out(data.keyed_uniforms, data.bootstrap_rates, data.interval, data.bootstrap,
                       MANY_BLOCKS=data.MANY_BLOCKS)
    drawn = data.keyed_uniforms(1, 2, ["a", "b"], 3)
    assert np.array_equal(alone.keyed_uniforms(1, 2, ["a", "b"], 3), drawn)
    case = {"numerators": [1, 0, 3, 2], "denominators": [4, 3, 9, 5], "n": 200,
            "blocks": ["x", "y", "x", "z"]}
    assert alone.bootstrap(**case) == data.bootstrap(**case)
