"""model.py against transformers' own modules: encoder, prompt, scoring, generation, maps.

    pytest tests/test_model.py
"""

import copy
import math
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.glmasr.configuration_glmasr import GlmAsrConfig, GlmAsrEncoderConfig
from transformers.models.glmasr.modeling_glmasr import GlmAsrEncoder, GlmAsrMultiModalProjector

import data
import model
from conftest import TEXTS, copied_out, rollout, twins

LENGTHS = [120, 10, 57, 5, 96, 33, 7, 64]  # mel frames; 5 and 7 are shorter than an audio token's 8


def close(a, b, atol=1e-5):
    """Equal to `atol`, or to that part of the largest value where values exceed 1."""
    torch.testing.assert_close(a, b, rtol=0, atol=atol * max(1.0, b.abs().max().item()))


def mel_batch(lengths=LENGTHS, seed=0):
    """Random features of the given lengths, padded with zeros, as data.load_batch pads."""
    mel = np.zeros((len(lengths), 128, max(lengths)), dtype=np.float32)
    for row, n in zip(mel, lengths):
        row[:, :n] = 0.4 * np.random.default_rng(seed + n).standard_normal((128, n))
    clips = [data.Utterance(f"u{i}", "") for i in range(len(lengths))]
    return data.Batch(clips, {128: mel}, np.array(lengths), [])


def changed(asr, **fields):
    """A copy of a recogniser with other values of some fields."""
    other = copy.copy(asr)
    vars(other).update(fields)
    return other


def encoded(asr, batch):
    """Audio embeddings (B, A, width), n_audio (B,) of a batch."""
    return asr.net.audio_encoder(torch.from_numpy(batch.mel[128]), torch.from_numpy(batch.n_frames))


def some_responses(asr, n_rows, seed=0, longest=9):
    """Random ids of unequal length that end in EOS, padded on the right -> ids, mask (B, R)."""
    rng = np.random.default_rng(seed)
    allowed = (~asr.blocked).nonzero()[:, 0].numpy()
    lengths = [longest, 1, *rng.integers(2, longest, n_rows - 2)]
    rows = [[*rng.choice(allowed, n - 1).tolist(), asr.eos_id] for n in lengths]
    return data.pad_rows(rows, asr.pad_id)


def logits_of(asr, batch, ids, mask):
    """(n, V) logits that predict the responses to `batch`."""
    prompt = model.encode_audio(asr, batch)
    hidden = model.response_hidden(asr.body, prompt.embeds, prompt.mask, ids, mask)
    return model.logits(hidden, asr.head.weight)


def rows_of(ids, mask):
    """(B, R) -> a list of emitted ids per row."""
    return [row[emitted].tolist() for row, emitted in zip(ids, mask)]


def roll_out(asr, batch, limit, temperature=0.0, uniforms=None):
    with torch.no_grad():
        return rollout(asr, model.encode_audio(asr, batch), limit, temperature, uniforms)


def ids_where(mask):
    return mask.nonzero()[:, 0].tolist()


@torch.no_grad()
def prompt_embeds(asr, batch, i):
    """(P, width) prompt of row i, put together by hand from the published string. Oracle."""
    audio, n = encoded(asr, batch.rows(i, i + 1))
    assert audio.shape[1] == n.item()
    before, after = ["<|user|>", "<|begin_of_audio|>"], ["<|end_of_audio|>"]
    ids = asr.tokenizer.convert_tokens_to_ids
    instruction = asr.tokenizer.encode("Please transcribe this audio.")
    tail = ids(after) + instruction + ids(["<|assistant|>"])
    embed = asr.net.get_input_embeddings()
    return torch.cat([embed(torch.tensor(ids(before))), audio[0], embed(torch.tensor(tail))])


def plain_qwen2(asr):
    """The student's LM as transformers alone would build it, with eager attention. Oracle."""
    c = asr.net.config
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "vocab_size", "rms_norm_eps", "max_position_embeddings",
            "tie_word_embeddings", "eos_token_id", "pad_token_id", "rope_parameters")
    config = Qwen2Config(**{k: getattr(c, k) for k in keys}, attn_implementation="eager")
    lm = Qwen2ForCausalLM(config)
    state = asr.net.state_dict()
    lm.load_state_dict({k: v for k, v in state.items() if not k.startswith("audio_encoder.")})
    return lm.eval()


@torch.no_grad()
def next_logits(lm, prompt, written):
    """(V,) logits of the token after prompt (P, width) and `written` ids: one row, no padding, no
    cache. Oracle."""
    tail = lm.get_input_embeddings()(torch.tensor(written, dtype=torch.long))
    return lm(inputs_embeds=torch.cat([prompt, tail])[None], use_cache=False).logits[0, -1]


# ----------------------------------------------------------------------------------------- encoder

def glmasr_twin(encoder, heads, lm_width):
    """transformers' encoder and projector with the weights of ours, q and k rows reordered from
    interleaved to split-half RoPE."""
    w, d = encoder.whisper, encoder.layer_norm.normalized_shape[0]
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    twin = GlmAsrEncoder(GlmAsrEncoderConfig(
        hidden_size=d, intermediate_size=w.layers[0].fc1.out_features,
        num_hidden_layers=len(w.layers), num_attention_heads=heads,
        num_mel_bins=w.conv1.in_channels, rope_parameters=rope,
        attn_implementation="eager")).eval()
    text = dict(model_type="llama", hidden_size=lm_width, intermediate_size=8, num_hidden_layers=1,
                num_attention_heads=1, vocab_size=8)
    # Theirs takes four frames side by side for the FFN's width.
    stacked = GlmAsrEncoderConfig(hidden_size=d, intermediate_size=4 * d)
    projector = GlmAsrMultiModalProjector(GlmAsrConfig(audio_config=stacked, text_config=text))
    size, half = d // heads, d // heads // 2  # of a head, and of its rotated part
    order = [*range(0, half, 2), *range(1, half, 2), *range(half, size)]
    rows = torch.tensor([h * size + j for h in range(heads) for j in order])
    names = {"self_attn.out_proj": "self_attn.o_proj", "self_attn_layer_norm": "input_layernorm",
             "final_layer_norm": "post_attention_layernorm", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    state = {"norm." + k: v for k, v in encoder.layer_norm.state_dict().items()}
    for key, value in w.state_dict().items():
        if "q_proj" in key or "k_proj" in key:
            value = value[rows]
        for ours, theirs in names.items():
            key = key.replace(ours + ".", theirs + ".")
        state[key] = value
    twin.load_state_dict(state)
    for n, linear in ((0, projector.linear_1), (2, projector.linear_2)):
        linear.load_state_dict(encoder.adapting[n].state_dict())
    return twin, projector.eval()


@pytest.mark.parametrize("n_frames", [3, 8, 9, 101, 110, 3000])
@torch.no_grad()
def test_encoder_is_glmasrs_and_copies_out_alone(n_frames):
    alone = copied_out(model.rope_angles, model.rotate, model.SelfAttention, model.EncoderLayer,
                       model.valid_frames, model.WhisperEncoder, model.AudioEncoder)
    torch.manual_seed(3)
    encoder = alone.AudioEncoder(128, 72, 3, heads=3, ffn=200, lm_width=20)
    for p in encoder.parameters():
        p.add_(torch.randn_like(p) * 0.15)
    twin, projector = glmasr_twin(encoder, heads=3, lm_width=20)
    mel = torch.from_numpy(mel_batch([n_frames]).mel[128])
    n_tokens = max((n_frames + 1) // 2 // 4, 1)
    states = twin(mel).last_hidden_state  # (1, T', d)
    # Four states make a token: what is left over is dropped, the first token is filled up.
    states = F.pad(states, (0, 0, 0, max(0, 4 - states.shape[1])))[:, :4 * n_tokens]
    expected = projector(states.reshape(n_tokens, -1))
    audio, n = encoder(mel, torch.tensor([n_frames]))
    assert (audio.shape, n.item()) == ((1, n_tokens, 20), n_tokens)
    assert expected.std() > 0.1
    close(audio[0], expected)


@pytest.mark.parametrize("lengths", [LENGTHS, [1, 6], [11, 12, 13, 14, 15, 16, 17]])
@torch.no_grad()
def test_encoder_row_does_not_depend_on_its_neighbours(student, lengths):
    batch = mel_batch(lengths)
    audio, n = encoded(student, batch)
    assert audio.shape[1] == n.max()
    for i in range(len(lengths)):
        expected, n_alone = encoded(student, batch.rows(i, i + 1))
        assert n[i] == n_alone.item() == expected.shape[1] == max((lengths[i] + 1) // 2 // 4, 1)
        close(audio[i, :n[i]], expected[0])


# ----------------------------------------------------------------------- prompt and teacher forcing

@torch.no_grad()
def test_prompt_is_the_published_string_with_audio_in_place(student):
    batch = mel_batch()
    prompt = model.encode_audio(student, batch)
    for i in range(len(LENGTHS)):
        expected = prompt_embeds(student, batch, i)
        n_padding = prompt.mask.shape[1] - len(expected)
        assert prompt.mask[i].tolist() == [False] * n_padding + [True] * len(expected)
        close(prompt.embeds[i, prompt.mask[i]], expected)
        close(prompt.audio[i], expected[2:2 + len(prompt.audio[i])])


@torch.no_grad()
def test_teacher_forcing_is_the_lm_token_by_token(student):
    batch = mel_batch()
    lm = plain_qwen2(student)
    ids, mask = some_responses(student, len(LENGTHS))
    z = logits_of(student, batch, ids, mask)
    expected = []
    for i, n in enumerate(mask.sum(1).tolist()):
        prompt = prompt_embeds(student, batch, i)
        for t in range(n):  # row t predicts ids[i, t]
            expected.append(next_logits(lm, prompt, ids[i, :t].tolist()))
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


def test_logits_and_their_gradients_are_exact_under_autocast():
    """Values of bf16, so that the sums alone could be rounded: by 3e-3 in bf16, by 2e-7 in fp32."""
    torch.manual_seed(0)
    hidden = torch.randn(5, 64).bfloat16().requires_grad_()
    weight = torch.randn(300, 64).bfloat16().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        z = model.logits(hidden, weight)
    grad_z = torch.randn(5, 300)
    z.backward(grad_z)
    exact = hidden.detach().double() @ weight.detach().double().T
    assert z.dtype == torch.float32
    assert (z - exact).abs().max() < 1e-6 * exact.abs().max()
    torch.testing.assert_close(weight.grad.double(), grad_z.double().T @ hidden.detach().double(),
                               rtol=1e-5, atol=1e-5)
    expected = (grad_z.double() @ weight.detach().double()).bfloat16()
    torch.testing.assert_close(hidden.grad, expected, rtol=0.01, atol=1e-3)


# ----------------------------------------------------------------------------------------- drawing

@pytest.mark.parametrize("u", [0.0, 1e-9, 1 - 2 ** -24, 1.0])  # 1.0: what 1 - 2^-30 rounds to
def test_draws_at_the_ends_of_the_interval_have_a_probability(u):
    z = torch.randn(3000, 1000, generator=torch.Generator().manual_seed(1)) * 4
    z[:, :3] = -math.inf
    z[:, -60:] = -math.inf  # the padded tail of a vocabulary
    ids = model.draw_token(z, 1.0, torch.full((3000,), u))
    assert ((ids >= 3) & (ids < 940)).all()
    if u == 0:  # the first id that has a probability in fp32
        assert torch.equal(ids, (z.softmax(-1) > 0).int().argmax(-1))


def test_draws_invert_the_distribution_function():
    z = torch.tensor([[0.0, math.log(2.0), -math.inf, 0.0]]).expand(6, -1)  # p = 1/4, 1/2, 0, 1/4
    u = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 0.9999])
    assert model.draw_token(z, 1.0, u).tolist() == [0, 0, 1, 1, 3, 3]
    assert model.draw_token(z, 0.0, None).tolist() == [1] * 6
    assert (model.draw_token(z * math.nan, 1.0, u) < 4).all()  # the loss will say so


# -------------------------------------------------------------------------------------- generation

@torch.no_grad()
def written_alone(asr, lm, batch, i, temperature, uniforms):
    """Row i of a batch: every token from the whole prefix again, no cache, no other row. Oracle."""
    prompt = prompt_embeds(asr, batch, i)
    written = []
    for uniform in uniforms[i]:
        z = next_logits(lm, prompt, written).double().masked_fill(asr.blocked, -math.inf)
        cdf = (z / temperature).softmax(-1).cumsum(-1)
        written.append(int((cdf <= uniform).sum()))
        if asr.stop[written[-1]]:
            break
    return written


@torch.no_grad()
def test_greedy_is_transformers_generate(student, teacher):
    batch = mel_batch(LENGTHS, seed=5)
    stopped = []
    for asr in (student, teacher):
        lm = plain_qwen2(asr)
        for i, written in enumerate(rows_of(*roll_out(asr, batch, 24))):
            expected = lm.generate(
                inputs_embeds=prompt_embeds(asr, batch, i)[None], do_sample=False,
                max_new_tokens=24, eos_token_id=asr.eos_id, pad_token_id=asr.pad_id,
                suppress_tokens=ids_where(asr.blocked))
            assert written == expected[0].tolist()
            stopped.append(written[-1] == asr.eos_id)
    assert any(stopped) and not all(stopped)  # both ways to end were seen


@pytest.mark.parametrize("case", ["all but one stop at once", "all stop at once", "one by one"])
def test_every_row_is_the_inverse_cdf_of_the_lm_token_by_token(student, monkeypatch, case):
    """Whatever its neighbours. More ids are made to end a transcript, so that rows stop and leave
    the batch where the case wants them to."""
    batch = mel_batch(LENGTHS, seed=9)
    rows = range(len(LENGTHS))
    lm = plain_qwen2(student)
    uniforms = data.keyed_uniforms(5, 0, [u.id for u in batch.utterances], 16)
    endless = changed(student, stop=torch.zeros_like(student.stop))
    free = [written_alone(endless, lm, batch, i, 0.7, uniforms) for i in rows]
    stops = {row[0] for row in free}
    if case == "one by one":
        stops = {free[i][t] for i, t in ((1, 1), (4, 2), (6, 3), (0, 5), (3, 7), (5, 9))}
    elif case == "all but one stop at once":
        for i in rows:
            stops = {free[j][0] for j in rows if j != i}
            if not stops & set(free[i]):
                break
    stop = torch.zeros_like(student.stop)
    stop[list(stops)] = True
    asr = changed(student, stop=stop, blocked=student.blocked & ~stop)

    kept = []  # rows that go on, whenever others leave
    select = DynamicCache.batch_select_indices
    monkeypatch.setattr(DynamicCache, "batch_select_indices",
                        lambda cache, left: kept.append(len(left)) or select(cache, left))
    ids, mask = roll_out(asr, batch, 16, 0.7, uniforms)
    expected = [written_alone(asr, lm, batch, i, 0.7, uniforms) for i in rows]
    assert rows_of(ids, mask) == expected
    # From column 0 without holes, padding behind, and no column that all rows leave empty.
    assert torch.equal(mask, torch.arange(max(map(len, expected))) < mask.sum(1)[:, None])
    assert (ids[~mask] == asr.pad_id).all()
    if case == "one by one":
        assert len(kept) >= 2, "rows should leave the batch more than once"
    else:
        assert kept == {"all stop at once": [], "all but one stop at once": [1]}[case]


def test_sampling_without_uniforms_is_refused(student):
    with pytest.raises(ValueError, match="uniforms"):
        roll_out(student, mel_batch(), 3, 1.0)
    with pytest.raises(ValueError, match="uniforms"):
        roll_out(student, mel_batch(), 3, 1.0, np.zeros((len(LENGTHS), 2), np.float32))


def test_transcripts_are_greedy_texts_in_the_order_of_the_batch(student, batch):
    results = model.transcribe(student, batch, 40)
    for i, result in enumerate(results):
        (ids,), (mask,) = roll_out(student, batch.rows(i, i + 1), 40)
        written = ids[mask].tolist()
        text = [token for token in written if token != student.eos_id]
        assert result == {"hyp": student.tokenizer.decode(text).strip(), "n_tokens": len(written),
                          "stopped": student.eos_id in written}
    assert {result["stopped"] for result in results} == {True, False}
    assert model.transcribe(student, batch.rows(0, 0), 12) == []


# ----------------------------------------------------------------------- what copies out; attention

@pytest.mark.parametrize("net_class", [Qwen2ForCausalLM, LlamaForCausalLM])
@torch.no_grad()
def test_rollout_and_scoring_copy_out_alone(net_class):
    """On a bare LM: what the copy writes is what transformers writes, and it scores it."""
    alone = copied_out(model.autocast, model.causal_mask, model.positions_of, model.check_attention,
                       model.logits, model.response_hidden, model.draw_token, model.generate,
                       DynamicCache=DynamicCache)
    torch.manual_seed(0)
    lm = net_class(net_class.config_class(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3)).eval()
    prompt_mask = torch.arange(6) >= 6 - torch.tensor([[6], [3], [5]])
    prompt = torch.randint(1, 50, (3, 6), generator=torch.Generator().manual_seed(0))
    embeds = lm.model.embed_tokens(prompt)
    asr = SimpleNamespace(body=lm.model, head=lm.lm_head, stop=torch.arange(50) == 7,
                          blocked=torch.zeros(50, dtype=torch.bool), pad_id=0)
    ids, mask = alone.generate(asr, embeds, prompt_mask, max_new_tokens=9)
    expected = lm.generate(inputs_embeds=embeds, attention_mask=prompt_mask.long(), do_sample=False,
                           max_new_tokens=9, eos_token_id=7, pad_token_id=0)
    assert torch.equal(ids, expected)
    hidden = alone.response_hidden(lm.model, embeds, prompt_mask, ids, mask)
    assert torch.equal(alone.logits(hidden, lm.lm_head.weight).argmax(-1), ids[mask])


# --------------------------------------------------------------------------------------- tokenizer

HARD_TEXTS = [
    "put two cups on the shelf", "打开红色台灯", "mixed 中文 and English, 3.5%!", "",
    "emoji \U0001f600 \U0001f469\u200d\U0001f680", " leading and  double ", "line\nbreak\ttab",
    "don't 'quote' “curly”", "Cafe\u0301 é ﬁ Ａ", "a . b , c ' s", "\u2028 \x85 \x00",
    *(f"say {token} twice {token}{token}" for token in model.SPECIAL)]


def test_any_text_survives_the_tokenizer_and_injects_nothing(student):
    for text in HARD_TEXTS:
        ids = student.encode_text(text)
        assert ids[-1] == student.eos_id
        assert not student.blocked[ids].any() and not student.stop[ids[:-1]].any()
        row = torch.tensor([ids + [60, 61]])  # behind the mask: not read
        assert student.decode(row, torch.arange(row.shape[1])[None] < len(ids)) == [
            unicodedata.normalize("NFC", text)]


def test_a_trained_tokenizer_repeats_and_knows_the_prompt(tokenizer):
    again = model.train_tokenizer(iter(TEXTS["en"] * 4 + TEXTS["zh"] * 4), 320)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer) == 320
    assert len(tokenizer.encode(model.INSTRUCTION)) <= 8  # it stands in every prompt
    assert not set(model.SPECIAL) - tokenizer.get_vocab().keys()


@pytest.mark.parametrize("i", [None, 384])
def test_a_token_that_is_missing_or_beyond_the_embeddings_is_named(student, i):
    vocabulary = student.tokenizer.get_vocab()
    vocabulary.pop("<|assistant|>")
    tokenizer = copy.copy(student.tokenizer)
    tokenizer.get_vocab = lambda: vocabulary | ({"<|assistant|>": i} if i else {})
    with pytest.raises(ValueError, match=r"<\|assistant\|>.* the 384 embeddings"):
        model.ASR(student.net, tokenizer)


def test_heads_must_divide_the_width(tokenizer):
    with pytest.raises(ValueError, match="36"):
        model.random_student(tokenizer, 36, 1, 1, 2)


# -------------------------------------------------------------------------------- two vocabularies

def test_vocabulary_map_joins_equal_token_strings(student, foreign_teacher):
    for a, b in ((student, foreign_teacher), (foreign_teacher, student)):
        expected = torch.full_like(a.blocked, -1, dtype=torch.long)
        for i, j in twins(a, b).items():
            expected[i] = j
        to_b = model.vocabulary_map(a, b)
        assert torch.equal(to_b, expected)
        assert 256 < (to_b >= 0).sum() < (~a.blocked).sum()  # every byte, not every longer token


def test_every_stop_id_means_the_teachers_end_and_blocked_ids_mean_nothing(student, teacher):
    vocabulary = student.tokenizer.get_vocab()
    a, b, other = vocabulary["a"], vocabulary["b"], student.pad_id
    ours = changed(student, stop=student.stop.clone(), blocked=student.blocked.clone())
    ours.stop[other] = True
    ours.blocked[other] = False
    ours.blocked[a] = True
    theirs = changed(teacher, eos_id=teacher.pad_id, blocked=teacher.blocked.clone(),
                     stop=torch.zeros_like(teacher.stop))
    theirs.stop[teacher.pad_id] = True
    theirs.blocked[b] = True
    to_teacher = model.vocabulary_map(ours, theirs)
    assert to_teacher[student.eos_id] == to_teacher[other] == teacher.pad_id
    assert to_teacher[a] == to_teacher[b] == -1
    assert (to_teacher >= 0).sum() == (~student.blocked).sum() - 2 + 1
    ends = ours.stop.nonzero()[:, 0]  # of a teacher that has them too, each means itself
    assert torch.equal(model.vocabulary_map(ours, ours)[ends], ends)


def test_a_vocabulary_of_another_kind_is_refused(student, teacher):
    """Spelled as SentencePiece spells it, a tenth of the tokens or more must still be the same."""
    names = sorted(teacher.tokenizer.get_vocab())
    usable = int((~student.blocked).sum())
    for share, fits in ((0.05, False), (0.15, True)):
        spelled = [name if i < share * usable else f"▁{name}" for i, name in enumerate(names)]
        tokenizer = SimpleNamespace(get_vocab=lambda: {t: i for i, t in enumerate(spelled)})
        theirs = changed(teacher, tokenizer=tokenizer, blocked=torch.zeros_like(teacher.blocked))
        if fits:
            model.vocabulary_map(student, theirs)
        else:
            with pytest.raises(ValueError, match=f"of the student's {usable} tokens"):
                model.vocabulary_map(student, theirs)


@pytest.mark.parametrize("config", [
    {"_attn_implementation": "eager"},
    {"_attn_implementation": "sdpa", "layer_types": ["full_attention", "sliding_attention"]}])
def test_attention_that_takes_no_mask_of_bools_is_refused(config):
    body = SimpleNamespace(config=SimpleNamespace(**config))
    with pytest.raises(ValueError, match="expected 'sdpa'"):
        model.response_hidden(body, None, None, None, None)
    with pytest.raises(ValueError, match="expected 'sdpa'"):
        model.generate(SimpleNamespace(body=body), None, None, 1)
