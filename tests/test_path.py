"""The README's section "Your own teacher and audio", command by command, on tiny parts.

    OMP_NUM_THREADS=1 python -m pytest tests/test_path.py -n 0
"""

import importlib
import json
import shlex
import subprocess


import numpy as np
import pytest
import torch
from transformers import (
    Qwen2Config, Qwen2ForCausalLM, WhisperConfig, WhisperForConditionalGeneration)

import model
from conftest import ROOT, TEXTS, sound, write_wav
from test_checkpoints import qwen  # noqa: F401 (a fixture)

SHORT = {  # what a test changes: later flags win
    "sft": "--steps 2 --batch 4 --micro_batch 2 --warmup 1 --eval_every 2 --save_every 2 "
           "--max_new_tokens 6 --workers 0 --device cpu",
    "evaluate": "--max_new_tokens 60 --device cpu",  # a random teacher ends some rows by then
    "overlap": "--max_new_tokens 6 --device cpu",
    "data": ""}
SHORT["distill"] = SHORT["sft"]


def section_commands():
    """[script, *arguments] of the section's first code block; bash expands loops and names."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.split("## Your own teacher and audio")[1].split("```")[1]
    echo = "python() { printf '%q ' \"$@\"; echo; }\n"
    lines = subprocess.run(["bash", "-c", echo + block], capture_output=True, text=True, check=True)
    return [shlex.split(line) for line in lines.stdout.splitlines()]


@pytest.fixture
def home(tmp_path, tokenizer, qwen, monkeypatch):  # noqa: F811
    """A folder with recordings, and with tiny checkpoints under the names that the README uses."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 6), ("dev", 3), ("test", 3), ("other", 4)):
        folder = tmp_path / "recordings" / split
        folder.mkdir(parents=True)
        for i in range(n):
            write_wav(folder / f"{i}.wav", sound(rng, rng.uniform(0.4, 0.9)))
            if split != "other":
                (folder / f"{i}.txt").write_text(TEXTS["en"][i])
    torch.manual_seed(0)
    whisper = WhisperConfig(
        num_mel_bins=80, d_model=16, encoder_layers=1, encoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=24, vocab_size=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    WhisperForConditionalGeneration(whisper).save_pretrained(tmp_path / "openai" / "whisper-small")
    lm = Qwen2Config(vocab_size=384, hidden_size=24, intermediate_size=32, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)
    Qwen2ForCausalLM(lm).save_pretrained(tmp_path / "Qwen" / "Qwen2.5-0.5B")
    tokenizer.save_pretrained(tmp_path / "Qwen" / "Qwen2.5-0.5B")
    (tmp_path / "Qwen" / "Qwen3-ASR-1.7B-hf").symlink_to(qwen / "hf")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_runs_as_the_readme_spells_it(home, capsys):
    ran = []
    for name, *arguments in section_commands():
        script = name.removesuffix(".py")
        module = importlib.import_module(script)
        short = [] if "--compare" in arguments else shlex.split(SHORT[script])
        try:
            module.main(module.parse_args(arguments + short))
        except SystemExit as error:  # a random teacher does not know the audio, and --check says so
            assert "--check" in arguments and "do not fit" in str(error.code), (arguments, error)
        ran.append(script)
    assert ran == ["data"] * 4 + "evaluate sft overlap evaluate sft distill".split() + [
        "evaluate"] * 4
    student = model.load("runs/my/opd")
    assert student.n_mels == 80  # beside a teacher of 128
    records = [json.loads(line) for line in open("runs/my/opd/metrics.jsonl")]
    assert records[0]["tokens"] > 0 and "dev_error" in records[1]
    said = capsys.readouterr().out
    assert "language English<asr_text>" in said and "reference" in said  # --check says what it read
    assert said.count("P(better)") == 1


def test_a_lora_adapter_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="merge_and_unload"):
        model.load_teacher(tmp_path, "cpu")


def test_a_teacher_is_told_a_language_or_says_which_line_lacks_it(home):
    write = home / "bare.jsonl"
    write.write_text(json.dumps({"audio": "recordings/train/0.wav", "text": "put"}) + "\n")
    module = importlib.import_module("evaluate")
    words = f"--model Qwen/Qwen3-ASR-1.7B-hf --data {write} --out e {SHORT['evaluate']}".split()
    with pytest.raises(ValueError, match=r"bare.jsonl:1: language None.*--language"):
        module.main(module.parse_args(words))
    module.main(module.parse_args([*words, "--language", "en"]))
    assert "hyp" in json.loads((home / "e" / "hyps.jsonl").read_text())


