"""What ends, what is refused at the start, what is evaluated, what a checkpoint folder holds.

    pytest tests/test_robust.py
"""

import argparse
import json
import math
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import GenerationConfig, Qwen2Tokenizer, WhisperFeatureExtractor

import data
import distill
import evaluate
import model
import overlap
import sft
from conftest import TEXTS, sound

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def main(script, *words):
    script.main(script.parse_args([str(word) for word in words]))


def write_rows(path, corpus, n, **changes):
    """A manifest of n lines, all of the corpus's first clips; changes: {key: value}."""
    rows = []
    for i in range(n):
        audio = str(corpus / f"dev-{i % 6}.wav")
        row = {"id": f"r{i}", "audio": audio, "text": "find peter", "language": "en"}
        rows.append(row | changes)
    data.write_jsonl(path, rows)
    return path


# ---------------------------------------------------------------------------- runs end

TRAINER = r"""
import os, sys, time
import data
class Endless:
    def __getitem__(self, i):
        if i == 12 and sys.argv[1] == "worker fails":
            raise ValueError("clip twelve")
        os.write(1, f"worker {os.getpid()}\n".encode())  # in one piece: three write at a time
        return data.Batch([], data.torch.zeros(1, 128, 5000), data.torch.zeros(1), [])  # 2.5 MB
batches = iter(data.loader(Endless(), range(1000), 3))
for i in range(6):
    next(batches)
print("ready", flush=True)
if sys.argv[1] == "trainer fails":
    raise ValueError("the trainer failed")
while True:
    next(batches)
    time.sleep(0.2)
"""


@pytest.mark.parametrize("how", ["worker fails", "trainer fails", signal.SIGINT, signal.SIGTERM,
                                 signal.SIGKILL])
def test_no_process_outlives_the_trainer(how, tmp_path):
    default = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", default + TRAINER, str(how)], cwd=ROOT, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    workers = set()
    for line in process.stdout:
        if line.startswith("ready"):
            break
        workers.add(int(line.split()[1]))
    began = time.time()
    if how in (signal.SIGINT, signal.SIGTERM):
        os.killpg(process.pid, how)  # the workers get it too
    elif how == signal.SIGKILL:
        process.kill()
    try:
        _, said = process.communicate(timeout=60)  # its pipes are the workers' too: all have ended
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert time.time() - began < 10 and len(workers) == 3
    assert not any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers)
    words = {"worker fails": "clip twelve", "trainer fails": "ValueError: the trainer failed",
             signal.SIGINT: "KeyboardInterrupt"}.get(how, "")
    assert words in said and "is killed by signal" not in said


def test_small_micro_batches_need_few_open_files(corpus):
    code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
import data
rows = list(data.read_manifest(sys.argv[1]))
steps = data.Steps(rows * 12, data.Plan([1.0] * len(rows) * 12, 144, 0), 1)
for micro_batches in data.loader(steps, range(8), 2):
    assert len(micro_batches) == 144
"""
    done = subprocess.run([sys.executable, "-c", code, corpus / "train.jsonl"], cwd=ROOT,
                          env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


# ---------------------------------------------------------------------------- found at the start

@pytest.mark.parametrize("seconds, usable", [(1.0, True), (41.0, False)])
def test_a_dev_clip_that_can_not_be_evaluated_stops_a_run_before_its_first_step(
        seconds, usable, corpus, checkpoints, tmp_path, capsys):
    soundfile.write(tmp_path / "odd.wav", np.zeros(round(seconds * 16_000)), 16_000)
    train = write_rows(tmp_path / "train.jsonl", corpus, 4)
    dev = write_rows(tmp_path / "dev.jsonl", corpus, 2)
    with dev.open("a") as file:
        file.write(json.dumps({"id": "odd", "audio": "odd.wav", "text": "a", "language": "en"}))
    words = ["--data", train, "--dev", dev, "--steps", 1, "--batch", 4, "--workers", 0, "--device", "cpu",
             "--max_new_tokens", 4, "--student", checkpoints / "student"]
    for script, more in ((sft, []), (distill, ["--teacher", checkpoints / "teacher"])):
        out = tmp_path / script.__name__
        if usable:  # silence is evaluated
            main(script, *words, *more, "--out", out)
            assert "evaluated all the same" in capsys.readouterr().err
            continue
        with pytest.raises(data.AudioError, match="dev.jsonl:3: odd"):
            main(script, *words, *more, "--out", out)
        assert not out.exists()


def test_an_evaluation_that_fails_loses_no_step(corpus, checkpoints, tmp_path, monkeypatch):
    words = ["--student", checkpoints / "student", "--data", corpus / "train.jsonl", "--dev",
             corpus / "dev.jsonl", "--out", tmp_path / "out", "--steps", 3, "--batch", 4, "--device", "cpu",
             "--workers", 0, "--save_every", 2, "--eval_every", 2, "--max_new_tokens", 4]

    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(model, "dev_error", fail)
        main(sft, *words)
    assert [p.name for p in (tmp_path / "out" / "state").iterdir()] == ["step-0000002"]
    main(sft, *words, "--resume")


def test_outputs_that_can_not_be_written_are_found_before_any_work(corpus, tmp_path, monkeypatch):
    for name in ("load", "load_student", "transcribe"):
        monkeypatch.setattr(model, name, None)
    taken = tmp_path / "taken"
    taken.write_text("a file")
    (tmp_path / "folder" / "summary.json").mkdir(parents=True)
    manifest = corpus / "dev.jsonl"
    hyps = tmp_path / "hyps.jsonl"
    hyps.write_text('{"id": "a", "hyp": "x"}\n')
    common = ["--data", manifest, "--device", "cpu"]
    for script, words in (
            (sft, [*common, "--student", "s", "--out", taken]),
            (distill, [*common, "--student", "s", "--teacher", "t", "--out", taken / "x"]),
            (distill, ["--out", taken / "x"]),
            (overlap, [*common, "--student", "s", "--teacher", "t", "--out", taken / "x"]),
            (evaluate, [*common, "--model", "s", "--out", taken / "x"]),
            (evaluate, [*common, "--model", "s", "--out", tmp_path / "folder"]),
            (evaluate, [*common, "--model", "s", "--out", tmp_path / "new", "--as_manifest", taken / "td.jsonl"]),
            (evaluate, [*common, "--model", "s", "--out", tmp_path / "new", "--as_manifest", tmp_path]),
            (evaluate, ["--rescore", hyps, "--out", taken / "x"])):
        with pytest.raises(OSError, match="taken|folder|a file is to be written here"):
            main(script, *words)
    assert not (tmp_path / "new").exists()


def test_what_is_to_be_written_may_lie_in_folders_that_are_still_to_be_made(tmp_path):
    data.check_outputs(tmp_path / "a" / "b" / "c.json", tmp_path / "c.json")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------- values of flags

AT_LEAST_ONE = ("vocab_size d_model encoder_layers lm_layers heads steps batch micro_batch log_every eval_every "
                "save_every eval_batch max_new_tokens top_k chunk pool").split()
REFUSED = dict.fromkeys(AT_LEAST_ONE, ["0", "-1", "1.5", "many"])
REFUSED |= dict.fromkeys(["clip", "tau"], ["0", "-1", "nan", "inf", "x"])
REFUSED |= dict.fromkeys(["lr", "temperature", "weight_decay", "ctc", "max_wer"], ["-1", "-0.1", "nan", "inf"])
REFUSED |= dict.fromkeys(["seed", "warmup", "workers"], ["-1", "0.5", ""])
SCRIPTS = {
    sft: ["--student", "s", "--data", "d", "--out", "o"],
    distill: ["--student", "s", "--teacher", "t", "--data", "d", "--out", "o"],
    evaluate: ["--model", "s", "--data", "d", "--out", "o", "--as_manifest", "m"],
    overlap: ["--student", "s", "--teacher", "t", "--data", "d", "--out", "o"],
    data: ["demo"],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_values_out_of_range_are_refused(script, capsys):
    words = SCRIPTS[script]
    defaults = vars(script.parse_args(words))
    numbers = [name for name, value in defaults.items() if type(value) in (int, float)]
    assert set(numbers) <= set(REFUSED)  # every number has a range
    for name in REFUSED.keys() & defaults.keys():
        for value in REFUSED[name]:
            with pytest.raises(SystemExit) as refused:
                script.parse_args([*words, f"--{name}={value}"])
            assert refused.value.code == 2 and f"--{name}" in capsys.readouterr().err
        smallest = {"pool": 2}.get(name, 0 if REFUSED[name][0] == "-1" else 1)
        assert getattr(script.parse_args([*words, f"--{name}={smallest}"]), name) == smallest


# ---------------------------------------------------------------------------- nothing is said

def test_a_language_with_an_empty_text_teaches_to_end_at_once(student, corpus, tmp_path):
    assert student.encode_text("") == [student.eos_id]
    silent = tmp_path / "silent.wav"
    soundfile.write(silent, np.zeros(16_000), 16_000)
    manifest = write_rows(tmp_path / "m.jsonl", corpus, 1, audio=str(silent), text="")
    utterances = data.read_manifest(manifest)
    data.check_labelled(utterances)
    batch = data.load_batch(utterances)
    assert not batch.rejected
    args = argparse.Namespace(ctc=0.0)
    sums = sft.backward_of_batch(student, None, batch, args)
    assert sums["tokens"] == 1
    prompt = model.encode_audio(student, batch)
    first = student.body(inputs_embeds=prompt.embeds).last_hidden_state[:, -1]
    logp = student.logits(first).masked_fill(student.blocked, -math.inf).log_softmax(-1)
    assert sums["loss"].item() == pytest.approx(-logp[0, student.eos_id].item(), rel=1e-4)


def test_ctc_of_an_empty_text_is_all_blanks(student):
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 12)
    audio = torch.randn(2, 5, 8, requires_grad=True)
    n_audio = torch.tensor([5, 3])
    loss, skipped = sft.ctc_sum(head, audio, n_audio, [[9], [9]], eos_id=9)
    blank = head(audio).log_softmax(-1)[..., 11]
    assert skipped == 0
    assert loss.item() == pytest.approx(-(blank[0].sum() + blank[1, :3].sum()).item(), rel=1e-5)
    loss.backward()
    assert torch.isfinite(audio.grad).all()


def test_evaluation_hears_silence_and_overdriven_clips_and_training_does_not(corpus, tmp_path, capsys):
    rng = np.random.default_rng(0)
    clips = {"silent": np.zeros(8_000), "clipped": np.clip(8 * sound(rng, 0.5), -1, 1)}
    for reason, audio in clips.items():
        soundfile.write(tmp_path / f"{reason}.wav", audio, 16_000)
        u = data.Utterance(reason, str(tmp_path / f"{reason}.wav"), "a", "en", line="m:1")
        with pytest.raises(data.AudioError, match=reason):
            data.load_audio(u)
        heard = data.load_audio(u, for_training=False)
        assert np.abs(heard - audio).max() < 1e-4
        assert data.load_batch([u], for_training=False).utterances == [u]
        data.check_decodable([u])
        assert f"m:1: {reason}" in capsys.readouterr().err


def test_what_is_written_on_silence_is_counted_by_the_minute(corpus, checkpoints, tmp_path, monkeypatch, capsys):
    soundfile.write(tmp_path / "six.wav", np.zeros(6 * 16_000), 16_000)
    rows = [{"id": f"s{i}", "audio": str(tmp_path / "six.wav"), "text": "", "language": "en"} for i in range(5)]
    rows.append(rows[0] | {"id": "w", "audio": str(corpus / "dev-0.wav"), "text": "find peter"})
    rows.append(rows[0] | {"id": "gone", "audio": "gone.wav"})
    data.write_jsonl(tmp_path / "m.jsonl", rows)
    hyps = {"s0": "thank you", "s1": "you"}
    monkeypatch.setattr(model, "transcribe", lambda asr, utterances, *_: {
        u.id: {"hyp": hyps.get(u.id, ""), "stopped": True, "n_tokens": 1} for u in utterances})
    main(evaluate, "--model", checkpoints / "student", "--data", tmp_path / "m.jsonl", "--out", tmp_path / "out",
         "--device", "cpu", "--keep_going")
    entry, = json.loads((tmp_path / "out" / "summary.json").read_text())["results"]
    assert (entry["no_speech"], entry["insertions"], entry["deletions"]) == (5, 3, 2)
    assert entry["insertions_per_minute"] == pytest.approx(3 / 0.5)  # five clips of six seconds
    assert "6.0 insertions per minute" in capsys.readouterr().out
    main(evaluate, "--rescore", tmp_path / "out" / "hyps.jsonl", "--out", tmp_path / "again")
    again, = json.loads((tmp_path / "again" / "summary.json").read_text())["results"]
    assert again["insertions_per_minute"] == entry["insertions_per_minute"]


# ---------------------------------------------------------------------------- intervals

@pytest.mark.parametrize("with_words, empty, given", [(0, 5, False), (1, 0, False), (1, 9, False), (2, 20, False),
                                                      (3, 17, True), (2, 0, True), (20, 0, True)])
def test_an_interval_is_given_where_resampling_makes_sense(with_words, empty, given, tmp_path):
    rows = [{"id": f"w{i}", "language": "en", "text": "red lamp", "hyp": "red lamps" if i % 2 else "red lamp"}
            for i in range(with_words)]
    rows += [{"id": f"e{i}", "language": "en", "text": "", "hyp": "you"} for i in range(empty)]
    data.write_jsonl(tmp_path / "h.jsonl", rows)
    main(evaluate, "--rescore", tmp_path / "h.jsonl", "--out", tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    entry, = summary["results"]
    assert (entry["rate"] is None) is (with_words == 0)
    assert (entry["low"] is not None) is (entry["high"] is not None) is given
    if given:  # no rate that these clips could not have
        assert 0 <= entry["low"] <= entry["rate"] <= entry["high"] <= 100 * len(rows)
    evaluate.compare([tmp_path / "h.jsonl", tmp_path / "out" / "hyps.jsonl"], tmp_path / "compared")
    assert "nan" not in (tmp_path / "compared" / "compare.json").read_text().lower()


# ---------------------------------------------------------------------------- files that are not what they seem

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1621234\n"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json",
                                  "vocab.json", "generation_config.json"])
@pytest.mark.parametrize("how", ["pointer", "half", "empty", "noise"])
def test_a_broken_file_of_a_checkpoint_is_named(checkpoints, tmp_path, name, how):
    folder = shutil.copytree(checkpoints / "student", tmp_path / "copy")
    raw = (folder / name).read_bytes()
    broken = {"pointer": POINTER.encode(), "half": raw[:len(raw) // 2], "empty": b"", "noise": b"\xff\xfe\x00" * 40}
    (folder / name).write_bytes(broken[how])
    found = "git-lfs pointer" if how == "pointer" else ""
    with pytest.raises(ValueError, match=f"copy/{name}: expected.*{found}"):
        model.load(folder)


@pytest.mark.parametrize("text, message", [("[]", "a JSON object"), ('{"version": "1.0"}', "no tokenizer")])
def test_json_of_another_kind_is_named(checkpoints, tmp_path, text, message):
    folder = shutil.copytree(checkpoints / "student", tmp_path / "copy")
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=f"copy.*{message}"):
        model.load(folder)


@pytest.mark.parametrize("file", ["training.safetensors", "training.json", "model.safetensors"])
def test_a_broken_state_is_named(student, tmp_path, file):
    optimizer = torch.optim.AdamW(student.net.parameters())
    model.save_training(tmp_path, 3, student, optimizer, {}, {"best": 1.0})
    (tmp_path / "state" / "step-0000003" / file).write_text(POINTER)
    with pytest.raises(ValueError, match=f"step-0000003/{file}: expected .*git-lfs"):
        model.load_training(tmp_path, student, optimizer)


@pytest.mark.parametrize("line, message", [
    (b'{"id": "b", "hyp": "\xff"}', "expected a JSON object"), (b'{"id": "b", "hyp": 3}', "'hyp' has the wrong type"),
    (b'{"id": "b", "hyp": "", "text": ["x"], "language": "en"}', "'text' has the wrong type"),
    (b'{"id": "b", "hyp": "", "text": "x", "language": "12"}', "language '12'"),
    (b'{"id": "b", "hyp": "", "stopped": "no"}', "'stopped' has the wrong type"),
    (b'{"id": "b", "hyp": "good \\ud83d"}', "'hyp' has half a character"),
    (POINTER.encode(), "git-lfs pointer"), ("{\"id\": \"b\", \"hyp\": \"打开\"}".encode("gbk"), "expected")])
def test_a_line_of_hyps_that_can_not_be_read_is_named(tmp_path, line, message):
    (tmp_path / "h.jsonl").write_bytes(b'{"id": "a", "hyp": "x"}\n' + line)
    with pytest.raises(ValueError, match=f"h.jsonl:2: .*{message}"):
        list(evaluate.read_hyps(tmp_path / "h.jsonl"))


# ---------------------------------------------------------------------------- what a folder holds

@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_weights_have_the_permissions_that_the_umask_leaves(student, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        model.save(student, tmp_path / "new", {"training.safetensors": {"x": torch.zeros(1)}})
        model.save(student, tmp_path / "new")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "new").iterdir()} == {mode}


def test_other_programs_read_the_same_ids_and_features(student, checkpoints, tmp_path):
    folder = checkpoints / "student"
    parts = tmp_path / "parts"
    parts.mkdir()
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"):
        shutil.copy(folder / name, parts)
    tokenizer = Qwen2Tokenizer.from_pretrained(parts)
    ours = student.tokenizer
    assert tokenizer.get_vocab() == ours.get_vocab()
    for text in (*TEXTS["en"], *TEXTS["zh"], "it's 3.5%!\n\n  naïve 😀", model.INSTRUCTION, "<|user|>a<|audio|><|im_end|>"):
        assert tokenizer.encode(text) == ours.encode(text)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (student.eos_id, student.pad_id)
    # read as programs without transformers do: a token an id, no gap
    vocabulary = json.loads((folder / "vocab.json").read_text()) | json.loads((folder / "added_tokens.json").read_text())
    assert sorted(vocabulary.values()) == list(range(len(ours)))

    generation = GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == student.stop.nonzero()[:, 0].tolist()
    assert generation.pad_token_id == student.pad_id

    audio = sound(np.random.default_rng(0), 1.23)
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    features = extractor(audio, sampling_rate=16_000, padding="do_not_pad", return_tensors="np").input_features[0]
    np.testing.assert_allclose(data.log_mel(audio).numpy(), features, atol=1e-5)


def test_what_came_with_a_checkpoint_is_kept(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints / "student", tmp_path / "copy")
    theirs = {"preprocessor_config.json": b'{"theirs": 1}', "merges.txt": b"#version: 0.2\nt h\n",
              "modeling.py": b"raise SystemExit  # \xff"}
    for name, content in theirs.items():
        (folder / name).write_bytes(content)
    model.save(model.load(folder), tmp_path / "again")
    for name, content in theirs.items():
        assert (tmp_path / "again" / name).read_bytes() == content
