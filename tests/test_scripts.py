"""What holds for the scripts as files and commands: shared code, flags, evaluate.py's outputs, the demo's stages and its report.

    pytest tests/test_scripts.py
"""

import ast
import json
import os
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import data
import distill
import evaluate
import model
import overlap
import sft

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"sft": sft, "distill": distill, "evaluate": evaluate, "overlap": overlap, "data": data}
SOURCE = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in (*SCRIPTS, "model")}
every_script = pytest.mark.parametrize("name", SCRIPTS)


# ---------------------------------------------------------------------------- files

def test_sft_and_distill_share_their_block_to_the_byte():
    def block(source):
        start = source.index("# ---------------------------------------------------------------------------- the same in sft.py and distill.py")
        return source[start:source.index("\n# ------", start)]

    assert block(SOURCE["sft"]) == block(SOURCE["distill"])
    assert block(SOURCE["sft"]).count("\ndef ") >= 6 and "class Log" in block(SOURCE["sft"])


@pytest.mark.parametrize("name", SOURCE)
def test_no_file_imports_a_script(name):
    """Every stage can be copied out with data.py and model.py; data.py stands alone."""
    imported = set()
    for node in ast.walk(ast.parse(SOURCE[name])):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    ours = imported & {path.stem for path in ROOT.glob("*.py")}
    assert ours <= {"data": set(), "model": {"data"}}.get(name, {"data", "model"})


def flags(name):
    """All flags in a script's source."""
    return set(re.findall(r'add(?:_argument)?\("--(\w+)"', SOURCE[name]))


@every_script
def test_every_flag_is_read(name):
    assert len(flags(name)) >= 2
    assert not {flag for flag in flags(name) if not re.search(rf"\bargs\.{flag}\b", SOURCE[name])}


@every_script
def test_every_read_argument_is_a_flag(name):
    read = set(re.findall(r"\bargs\.(\w+)", SOURCE[name]))
    assert read <= flags(name) | {"corpus", "root"}


@every_script
def test_help(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        SCRIPTS[name].parse_args(["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and all(f"--{flag}" in shown for flag in flags(name))
    assert SCRIPTS[name].__doc__.splitlines()[0] in shown


@pytest.mark.parametrize("file", sorted(p.name for p in (*ROOT.glob("*.py"), *ROOT.glob("*.md"))))
def test_commands_that_are_shown_have_flags_that_exist(file):
    for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
        if not re.match(r"\s*\$?\s*(?:\w+=\S+ )*(python|torchrun) .*\.py", line):
            continue
        line = re.sub(r"\s#.*", "", line)
        for name, arguments in re.findall(r"(\w+)\.py(.*)", line):
            unknown = set(re.findall(r"--(\w+)", arguments)) - flags(name) if name in SCRIPTS else set()
            assert not unknown, line


def test_sft_wants_one_starting_point_and_distill_all_or_nothing(capsys):
    for words in ([], ["--student", "s", "--init", "random"]):
        with pytest.raises(SystemExit):
            sft.parse_args(["--data", "d", "--out", "o", *words])
    for words in (["--student", "s"], ["--student", "s", "--teacher", "t", "--data", "d"], ["--data", "d", "--out", "o"]):
        with pytest.raises(SystemExit):
            distill.parse_args(words)
    assert distill.parse_args([]).student is None
    capsys.readouterr()


# ---------------------------------------------------------------------------- evaluate.py

def run_evaluate(checkpoints, manifests, out, *more):
    words = ["--model", checkpoints / "student", "--data", *manifests, "--out", out, "--device", "cpu", "--max_new_tokens", 8, *more]
    evaluate.main(evaluate.parse_args([str(word) for word in words]))
    return json.loads((out / "summary.json").read_text()), [json.loads(line) for line in (out / "hyps.jsonl").read_text().splitlines()]


def scripted(monkeypatch, hyps, stopped=lambda hyp: True):
    """model.transcribe returns hyps[id] instead of running the model."""
    monkeypatch.setattr(model, "transcribe", lambda asr, utterances, *_: {
        u.id: {"hyp": hyps[u.id], "stopped": stopped(hyps[u.id]), "n_tokens": 1} for u in utterances})


def test_hyps_is_a_manifest_and_the_rates_are_its_sums(corpus, checkpoints, tmp_path):
    summary, rows = run_evaluate(checkpoints, [corpus / "dev.jsonl"], tmp_path / "deep" / "out", "--batch", 4)
    before, after = data.read_manifest(corpus / "dev.jsonl"), data.read_manifest(tmp_path / "deep" / "out" / "hyps.jsonl")
    for a, b in zip(before, after, strict=True):  # the same clips in the same order
        assert (a.id, a.text, a.language, a.duration_sec) == (b.id, b.text, b.language, b.duration_sec)
        assert os.path.samefile(a.audio, b.audio) and len(data.load_audio(b)) > 0
    assert not any(os.path.isabs(row["audio"]) for row in rows)
    assert [(e["language"], e["metric"]) for e in summary["results"]] == [("en", "WER"), ("zh", "CER")]
    for entry in summary["results"]:
        group = [row for row in rows if row["language"] == entry["language"]]
        counts = [data.edit_counts(row["text"], row["hyp"], row["language"]) for row in group]
        assert [(row["substitutions"], row["deletions"], row["insertions"], row["units"]) for row in group] == [tuple(c) for c in counts]
        assert entry["rate"] == pytest.approx(data.error_rate(counts)) and entry["utterances"] == len(group) == 3
        assert entry["low"] <= entry["rate"] <= entry["high"]
        for key in ("substitutions", "deletions", "insertions", "units"):
            assert entry[key] == sum(row[key] for row in group)


def test_rates_by_hand(corpus, checkpoints, tmp_path, monkeypatch):
    """English: 6 + 7 words with one deletion and one substitution; Mandarin: one of 4 characters wrong, one inserted."""
    lines = {"a": ("en", "put two cups on the shelf", "put two cups on shelf"), "b": ("en", "Anna has seven green lamps, you see.", "anna has eleven green lamps you see"),
             "c": ("zh", "修理桌子", "修理卓子。"), "d": ("zh", "打开红色台灯", "打开红色的台灯")}
    rows = [{"id": i, "audio": str(corpus / "dev-0.wav"), "text": text, "language": language} for i, (language, text, _) in lines.items()]
    data.write_jsonl(tmp_path / "four.jsonl", rows)
    scripted(monkeypatch, {i: hyp for i, (_, _, hyp) in lines.items()})
    english, mandarin = run_evaluate(checkpoints, [tmp_path / "four.jsonl"], tmp_path / "out")[0]["results"]
    assert (english["rate"], english["units"], english["deletions"], english["substitutions"]) == (pytest.approx(200 / 13), 13, 1, 1)
    assert (mandarin["rate"], mandarin["units"], mandarin["insertions"], mandarin["substitutions"]) == (pytest.approx(200 / 10), 10, 1, 1)
    assert english["sentence_error"] == mandarin["sentence_error"] == 100.0


def test_transcripts_become_a_manifest_without_the_empty_and_the_cut(corpus, checkpoints, tmp_path, monkeypatch, capsys):
    rows = [{"audio": str(corpus / f"dev-{i}.wav"), "id": f"u{i}", "language": "en", "speaker": f"s{i}"} for i in range(5)]
    rows.append({"audio": str(corpus / "dev-5.wav"), "id": "part", "language": "zh", "start": 0.05, "duration": 0.2})
    data.write_jsonl(tmp_path / "pool.jsonl", rows)  # no transcript anywhere: what the teacher-data stage starts from
    hyps = {"u0": "one", "u1": "", "u2": "two", "u3": "on and on", "u4": "", "part": "三"}
    scripted(monkeypatch, hyps, stopped=lambda hyp: hyp != "on and on")
    (tmp_path / "elsewhere").mkdir()
    summary, _ = run_evaluate(checkpoints, [tmp_path / "pool.jsonl"], tmp_path / "out", "--as_manifest", tmp_path / "elsewhere" / "td.jsonl")
    assert summary["results"] == []
    assert re.search(r"3 transcripts kept.*2 empty.*1 cut", capsys.readouterr().out)
    kept = data.read_manifest(tmp_path / "elsewhere" / "td.jsonl")
    assert [(u.id, u.text, u.language, u.speaker) for u in kept] == [("u0", "one", "en", "s0"), ("u2", "two", "en", "s2"), ("part", "三", "zh", None)]
    assert (kept[2].start_sec, kept[2].duration_sec) == (0.05, 0.2) and len(data.load_audio(kept[2])) == 3200
    segment = data.read_manifest(tmp_path / "out" / "hyps.jsonl")[-1]
    assert (segment.start_sec, segment.duration_sec, segment.id) == (0.05, 0.2, "part")


def test_the_same_id_in_two_sets_is_no_trap(corpus, checkpoints, tmp_path, monkeypatch):
    """Either refused with the id named, or hyps.jsonl is a manifest all the same."""
    for name in ("a", "b"):
        data.write_jsonl(tmp_path / f"{name}.jsonl", [{"id": "x", "audio": str(corpus / "dev-0.wav"), "text": name, "language": "en"}])
    scripted(monkeypatch, {"x": "a"})
    try:
        run_evaluate(checkpoints, [tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "out")
    except ValueError as error:
        assert "'x'" in str(error)
    else:
        assert len(data.read_manifest(tmp_path / "out" / "hyps.jsonl")) == 2


# ---------------------------------------------------------------------------- the demo's stages

STAGES = ["data", "teacher", "base", "opd", "eval/teacher", "eval/base", "eval/opd", "overlap/base", "overlap/opd"]


class Recorder:
    """Takes subprocess.run's place: keeps the commands, leaves a file in each stage's folder, fails where it is told to."""
    def __init__(self, root):
        self.root, self.commands, self.environments, self.fail = Path(root), {}, [], None

    def __call__(self, words, env=None):
        out = Path(words[words.index("--out") + 1])
        stage = str(out.relative_to(self.root))
        self.commands[stage] = words
        self.environments.append(env)
        (out / "made").write_text("partly" if stage == self.fail else "made")
        return SimpleNamespace(returncode=3 if stage == self.fail else 0)

    def ran(self):
        names, self.commands = list(self.commands), {}
        return names


@pytest.fixture
def recorder(tmp_path, monkeypatch):
    root, recorder = tmp_path / "demo", Recorder(tmp_path / "demo")
    monkeypatch.setattr(distill.subprocess, "run", recorder)
    monkeypatch.setattr(distill, "report", lambda root, seconds: setattr(recorder, "seconds", seconds))
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    recorder.demo = lambda *words: distill.main(["--out", str(root), *words])
    return recorder


def test_every_stage_runs_once_in_order_and_is_then_reused(recorder):
    recorder.demo()
    assert recorder.ran() == STAGES
    assert list(recorder.seconds) == STAGES
    recorder.demo()
    assert recorder.ran() == []
    assert list(recorder.seconds) == STAGES and all(s >= 0 for s in recorder.seconds.values())


def test_stages_are_commands_that_the_scripts_accept(recorder, capsys):
    recorder.demo("--seed", "5", "--device", "cpu", "--steps", "7", "--divergence=forward")
    shown = [line[2:] for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")]
    assert len(shown) == len(STAGES)
    parsed = {}
    for line, (stage, words) in zip(shown, recorder.commands.items(), strict=True):
        assert words[0] == sys.executable
        script = next(word for word in words if word.endswith(".py"))
        arguments = words[words.index(script) + 1:]
        assert Path(script).exists() and Path(script).is_absolute()
        assert shlex.split(line)[-len(arguments):] == arguments, "what is shown is what is run"
        parsed[stage] = SCRIPTS[Path(script).stem].parse_args(arguments)
    assert all(getattr(args, "seed", 5) == 5 and getattr(args, "device", "cpu") == "cpu" for args in parsed.values())
    opd, teacher, base = parsed["opd"], parsed["teacher"], parsed["base"]
    assert (opd.steps, opd.divergence) == (7, "forward") and teacher.steps != 7 and base.steps != 7
    assert opd.student == base.out and opd.teacher == teacher.out and base.tokenizer == teacher.out
    assert opd.resume and teacher.resume and base.resume
    assert set(base.data) < set(teacher.data) and opd.data[0] in teacher.data and opd.data[0] not in base.data
    assert len({*parsed["eval/base"].data, *parsed["eval/opd"].data, *parsed["eval/teacher"].data, parsed["overlap/base"].data}) == 1
    assert parsed["eval/base"].data[0] not in {*teacher.data, *base.data, *opd.data, opd.dev, base.dev, teacher.dev}, "test is held out"
    assert (parsed["overlap/opd"].student, parsed["overlap/opd"].teacher) == (opd.out, teacher.out)


def test_a_changed_opd_flag_makes_opd_again_and_nothing_else(recorder):
    recorder.demo()
    recorder.ran()
    (recorder.root / "opd" / "state").mkdir()
    recorder.demo("--steps", "7")
    assert recorder.ran() == ["opd", "eval/opd", "overlap/opd"]
    assert not (recorder.root / "opd" / "state").exists(), "a run with other flags must not be resumed"
    recorder.demo("--steps", "7")
    assert recorder.ran() == []
    recorder.demo()
    assert recorder.ran() == ["opd", "eval/opd", "overlap/opd"]


def test_a_changed_stage_makes_all_that_builds_on_it_again(recorder, monkeypatch):
    recorder.demo()
    recorder.ran()
    monkeypatch.setattr(distill, "BASE", distill.BASE + " --lr 0.1")
    recorder.demo()
    assert recorder.ran() == ["base", "opd", "eval/base", "eval/opd", "overlap/base", "overlap/opd"]
    recorder.demo("--seed", "1")
    assert recorder.ran() == STAGES


def test_an_interrupted_stage_is_continued_not_deleted(recorder):
    recorder.fail = "base"
    with pytest.raises(SystemExit, match="exit code 3"):
        recorder.demo()
    assert recorder.ran() == ["data", "teacher", "base"]
    (recorder.root / "base" / "state").mkdir()
    recorder.fail = None
    recorder.demo()
    assert recorder.ran() == STAGES[2:]
    assert (recorder.root / "base" / "state").exists() and (recorder.root / "base" / "made").read_text() == "made"
    recorder.demo()
    assert recorder.ran() == []


def test_what_the_demo_did_not_make_it_does_not_delete(recorder):
    (recorder.root / "data").mkdir(parents=True)
    (recorder.root / "data" / "recordings.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="--out"):
        recorder.demo()
    assert (recorder.root / "data" / "recordings.txt").read_text() == "precious" and recorder.ran() == []


def test_stages_run_with_as_many_processes_as_the_demo(recorder, monkeypatch):
    started = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3", "MASTER_PORT": "1234", "TORCHELASTIC_RUN_ID": "x"}
    for key, value in started.items():
        monkeypatch.setenv(key, value)
    recorder.demo()
    for stage, words in recorder.commands.items():
        if stage != "data":
            assert words[1:3] == ["-m", "torch.distributed.run"] and words[words.index("--nproc_per_node") + 1] == "3"
    for environment in recorder.environments:
        assert not set(started) & set(environment) and environment["PATH"] == os.environ["PATH"]
    recorder.ran()
    monkeypatch.setenv("RANK", "1")
    recorder.demo("--steps", "3")
    assert recorder.ran() == [], "only rank 0 starts stages"


def test_a_folder_with_a_space_in_its_name(tmp_path, recorder):
    recorder.root = tmp_path / "my demo"
    distill.main(["--out", str(recorder.root)])
    assert recorder.ran() == STAGES


@pytest.mark.parametrize("argv, kept", [
    ([], []),
    (["--steps", "7"], ["--steps", "7"]),
    (["--out", "x"], []),
    (["--out=x"], []),
    (["--steps", "7", "--out", "x", "--tau=2"], ["--steps", "7", "--tau=2"]),
    (["--out", "x", "--seed", "3", "--resume"], ["--resume"]),
    (["--out=x", "--seed", "3", "--seed=4", "--lr", "1"], ["--lr", "1"]),
    (["--outer", "x", "--data", "out"], ["--outer", "x", "--data", "out"]),
])
def test_drop_flag(argv, kept):
    assert distill.drop_flag(argv, "--out", "--seed") == kept


# ---------------------------------------------------------------------------- the demo's report

def test_report(tmp_path, capsys):
    """Four clips, two English, two Mandarin; errors by hand: teacher 0, base 4, OPD 1 of 16 units."""
    references = {"e1": ("en", "clean it"), "e2": ("en", "put two cups on the shelf"), "z1": ("zh", "修理"), "z2": ("zh", "打开红色台灯")}
    wrong = {"teacher": {}, "base": {"e1": "clean", "e2": "put cups on the elf", "z2": "打开红色台"}, "opd": {"e2": "put two cups on shelf"}}
    utterances = [data.Utterance(i, f"/{i}.wav", text, language, speaker=f"voice of {i}") for i, (language, text) in references.items()]
    for name in ("teacher", "base", "opd"):
        results = {u.id: {"hyp": wrong[name].get(u.id, u.text), "stopped": True, "n_tokens": 3} for u in utterances}
        rows = [evaluate.score(u, results[u.id]) for u in utterances]
        data.write_jsonl(tmp_path / "eval" / name / "hyps.jsonl", rows)
        (tmp_path / "eval" / name / "summary.json").write_text(json.dumps({"results": evaluate.summarize("test", [evaluate.without_texts(row) for row in rows], 4.0, 1.0)}))
    for name, vuss in (("base", 40.0), ("opd", 36.0)):
        value = lambda x: {"mean": x, "low": x - 0.01, "high": x + 0.01}
        (tmp_path / "overlap" / name).mkdir(parents=True)
        (tmp_path / "overlap" / name / "overlap.json").write_text(json.dumps({"k": 32, "vuss": value(vuss), "overlap": value(2 - vuss / 32)}))
    data.write_jsonl(tmp_path / "base" / "metrics.jsonl", [{"step": 900, "dev_error": 20.0}])
    data.write_jsonl(tmp_path / "opd" / "metrics.jsonl", [{"step": 25, "loss": 0.9}, {"step": 50, "loss": 0.5}, {"step": 50, "dev_error": 9.0}])
    seconds = {name: float(n) for n, name in enumerate(STAGES)}
    distill.report(tmp_path, seconds)

    result = json.loads((tmp_path / "result.json").read_text())
    rates = {name: (result[name]["wer"], result[name]["cer"]) for name in ("teacher", "base", "opd")}
    assert rates == {"teacher": (0, 0), "base": (pytest.approx(300 / 8), pytest.approx(100 / 8)), "opd": (pytest.approx(100 / 8), 0)}
    assert (result["base"]["vuss"], result["opd"]["vuss"]) == (40.0, 36.0)
    assert (result["base"]["overlap"], result["opd"]["overlap"]) == (0.75, 0.875) and not {"vuss", "overlap"} & set(result["teacher"])
    assert result["seconds"] == seconds and result["k"] == 32
    difference = result["base_minus_opd"]
    assert difference["points"] == pytest.approx(300 / 16) and difference["relative"] == pytest.approx(0.75)
    assert difference["interval"][0] <= difference["points"] <= difference["interval"][1]
    assert (tmp_path / "result.png").read_bytes()[:4] == b"\x89PNG"
    table = capsys.readouterr().out
    assert re.search(r"base +37\.50 .*12\.50 .*0\.750 .*40\.00", table) and re.search(r"opd +12\.50 .*0\.00 .*0\.875 .*36\.00", table)
