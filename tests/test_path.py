"""The README's section "Your own teacher and audio", command by command, on tiny parts.

    OMP_NUM_THREADS=1 python -m pytest tests/test_path.py -n 0
"""

import json
import shlex

import numpy as np
import pytest

import evaluate
import model
from conftest import ROOT, TEXTS, sound, write_wav
from test_checkpoints import parts, qwen  # noqa: F401 (fixtures)
from test_scripts import SCRIPTS, shown_commands

SHORT = {  # what a test changes: later flags win
    "sft": "--steps 2 --batch 4 --micro_batch 2 --warmup 1 --eval_every 2 --save_every 2 "
           "--max_new_tokens 6 --workers 0 --device cpu",
    "evaluate": "--max_new_tokens 60 --device cpu",  # a random teacher ends some rows by then
    "overlap": "--max_new_tokens 6 --device cpu",
    "data": ""}
SHORT["distill"] = SHORT["sft"]


@pytest.fixture
def home(tmp_path, parts, qwen, monkeypatch):  # noqa: F811
    """A folder with recordings, and with tiny checkpoints under the names that the README uses."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 6), ("dev", 3), ("test", 3), ("other", 4)):
        folder = tmp_path / "recordings" / split
        folder.mkdir(parents=True)
        for i in range(n):
            write_wav(folder / f"{i}.wav", sound(rng, rng.uniform(0.4, 0.9)))
            if split != "other":
                (folder / f"{i}.txt").write_text(TEXTS["en"][i])
    for name, folder in (("openai/whisper-small", parts.folder / "whisper"),
                         ("Qwen/Qwen2.5-0.5B", parts.folder / "lm"),
                         ("Qwen/Qwen3-ASR-1.7B-hf", qwen / "hf")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_runs_as_the_readme_spells_it(home, capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## Your own teacher and audio")[1].split("\n## ")[0]
    ran = []
    for script, arguments in shown_commands(section):
        short = [] if "--compare" in arguments else shlex.split(SHORT[script])
        try:
            SCRIPTS[script].main(SCRIPTS[script].parse_args(arguments + short))
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
    assert said.count("below the first") == 3  # the four systems of --compare


def test_a_teacher_is_told_a_language_or_says_which_line_lacks_it(home):
    bare = home / "bare.jsonl"
    bare.write_text(json.dumps({"audio": "recordings/train/0.wav", "text": "put"}) + "\n")
    words = f"--model Qwen/Qwen3-ASR-1.7B-hf --data {bare} --out e {SHORT['evaluate']}".split()
    with pytest.raises(ValueError, match=r"bare.jsonl:1: language None.*--language"):
        evaluate.main(evaluate.parse_args(words))
    evaluate.main(evaluate.parse_args([*words, "--language", "en"]))
    assert "hyp" in json.loads((home / "e" / "hyps.jsonl").read_text())
