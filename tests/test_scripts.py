"""What holds for the scripts as files and commands: flags, the README's commands, the demo's stages.

    pytest tests/test_scripts.py
"""

import argparse
import ast
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
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

@pytest.mark.parametrize("function", ["average_gradients", "learning_rate", "make_optimizer"])
def test_what_both_training_scripts_show_is_the_same_to_the_byte(function):
    assert inspect.getsource(getattr(sft, function)) == inspect.getsource(getattr(distill, function))


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
    allowed = {"data": set(), "model": {"data"}}
    assert ours <= allowed.get(name, {"data", "model"})


# ---------------------------------------------------------------------------- flags

class Parsing(Exception):
    """Raised where a script would parse its flags."""


def flags(name):
    """All flags of a script, those of its subcommands included, without dashes."""
    found = []

    def keep(parser, *_):
        found.append(parser)
        raise Parsing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", keep)
        with pytest.raises(Parsing):
            SCRIPTS[name].parse_args([])
    for action in found[0]._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += action.choices.values()
    strings = {string for parser in found for string in parser._option_string_actions}
    return {string.removeprefix("--") for string in strings if string.startswith("--")} - {"help"}


def arguments_read(name):
    """X of every `args.X` in a file."""
    read = set()
    for node in ast.walk(ast.parse(SOURCE[name])):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args":
            read.add(node.attr)
    return read


@every_script
def test_every_flag_is_read(name):
    assert len(flags(name)) >= 2
    assert flags(name) <= arguments_read(name) | arguments_read("model")


@every_script
def test_help_names_every_flag_and_opens_with_what_the_script_does(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        SCRIPTS[name].parse_args(["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    assert SCRIPTS[name].__doc__.splitlines()[0] in shown
    if name != "data":  # whose flags are those of its subcommands
        assert all(f"--{flag}" in shown for flag in flags(name))


@pytest.mark.parametrize("file", sorted(p.name for p in (*ROOT.glob("*.py"), *ROOT.glob("*.md"))))
def test_flags_of_commands_that_are_shown_exist(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    text = text.replace("\\\\\n", " ").replace("\\\n", " ")  # a backslash in a docstring is two
    for line in text.splitlines():
        if not re.match(r"\s*\$?\s*(?:\w+=\S+ )*(python|torchrun) .*\.py", line):
            continue
        for name, arguments in re.findall(r"(\w+)\.py([^#;]*)", line):
            if name in SCRIPTS:
                assert set(re.findall(r"--(\w+)", arguments)) <= flags(name), line


@pytest.mark.parametrize("name, line", [
    ("sft", "--data d --out o"),
    ("sft", "--data d --out o --student s --init random"),
    ("sft", "--data d --out o --init_encoder e"),
    ("distill", "--student s"),
    ("distill", "--student s --teacher t --data d"),
    ("distill", "--data d --out o"),
    ("distill", "--support sampled --divergence forward"),
    ("distill", "--support sampled --temperature 0"),
    ("distill", "--support sampled --tau 2"),
    ("distill", "--divergence jeffreys"),
    ("distill", "--step 3"),  # no abbreviations: a later flag would change what they mean
])
def test_flags_that_do_not_go_together_are_refused(name, line, capsys):
    with pytest.raises(SystemExit) as stopped:
        SCRIPTS[name].parse_args(line.split())
    assert stopped.value.code == 2
    capsys.readouterr()


# ---------------------------------------------------------------------------- the README's commands

RECORD = r"""
record() { printf '%s\x1f' "$@"; printf '\x1e'; }
python() { record python "$@"; }
torchrun() { record torchrun "$@"; }
cd() { :; }
command_not_found_handle() { :; }
PATH=
"""


def readme_commands():
    """(script, [arguments]) of every command in the README's code blocks, variables and loops
    expanded by bash."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = []
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if not re.search(r"^\s*(pip|python|torchrun|\$run)\s", block, re.MULTILINE):
            continue  # a drawing or a file, no commands
        shell = subprocess.run([shutil.which("bash"), "-c", RECORD + block], capture_output=True, text=True)
        assert "syntax error" not in shell.stderr, shell.stderr
        for call in shell.stdout.split("\x1e")[:-1]:
            words = call.split("\x1f")[:-1]
            scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
            if scripts:
                commands.append((words[scripts[0]].removesuffix(".py"), words[scripts[0] + 1:]))
    return commands


COMMANDS = readme_commands()
SHORT = "--device cpu --max_new_tokens 4"
SHORT_TRAINING = f"{SHORT} --steps 1 --batch 3 --micro_batch 3 --workers 0"


def why_not_run(name, args):
    """Commands of the README that are parsed here and not run."""
    if name == "data":
        return "reads a corpus that has to be downloaded, or writes the demo's; see test_corpora.py"
    if name == "distill" and not args.student:
        return "the demo; see below"
    if name == "sft" and args.init_encoder:
        return "reads checkpoints of other projects; see test_checkpoints.py"
    if name == "overlap" and args.check:
        return "stops at untrained models; see test_overlap.py"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, corpus, checkpoints):
    """A folder to run commands in, and what they may ask for."""
    folder = tmp_path_factory.mktemp("readme")
    rows = [json.loads(line) for line in (corpus / "dev.jsonl").read_text(encoding="utf-8").splitlines()[:3]]
    for row in rows:
        row["audio"] = str(corpus / row["audio"])
    return SimpleNamespace(folder=folder, rows=rows, checkpoints=checkpoints, audio=rows[0]["audio"])


def as_list(value):
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def supply(workplace, name, args):
    """Put a tiny checkpoint, manifest, clip or hyps.jsonl wherever a command expects one that no
    earlier command made."""
    given = vars(args)
    folders = [given.get(flag) for flag in ("student", "teacher", "model", "tokenizer")]
    if name == "overlap":
        folders.append(args.compare)
    for folder in filter(None, folders):
        if not Path(folder).exists():
            kind = "teacher" if folder == given.get("teacher") else "student"
            shutil.copytree(workplace.checkpoints / kind, folder)
    for manifest in as_list(given.get("data")) + as_list(given.get("dev")):
        missing = not Path(manifest).exists()
        if missing or not Path(manifest).stat().st_size:  # untrained models write nothing that is kept
            data.write_jsonl(manifest, [row | {"id": f"{manifest}: {row['id']}"} for row in workplace.rows])
    for clip in as_list(given.get("audio")):
        shutil.copy(workplace.audio, clip)
    if name == "evaluate":
        for hyps in as_list(args.compare) + as_list(args.rescore):
            if not Path(hyps).exists():
                out = str(Path(hyps).parent)
                run(workplace, "evaluate", ["--model", "STUDENT", "--data", "clips.jsonl", "--out", out])


def run(workplace, name, arguments):
    """A command as the README has it, cut to a step and a few tokens."""
    args = SCRIPTS[name].parse_args(arguments)
    if name in ("sft", "distill"):
        arguments = [*arguments, *SHORT_TRAINING.split()]
        shutil.rmtree(Path(args.out), ignore_errors=True)  # the README may train to one folder in two places
    elif getattr(args, "model", None) or name == "overlap":
        arguments = [*arguments, *SHORT.split()]
    supply(workplace, name, args)
    SCRIPTS[name].main(SCRIPTS[name].parse_args(arguments))


@pytest.mark.parametrize("name, arguments", COMMANDS, ids=[f"{i} {name}" for i, (name, _) in enumerate(COMMANDS)])
def test_commands_of_the_readme_run(workplace, monkeypatch, name, arguments):
    """In order, in one folder: what one writes, the next reads."""
    if name not in SCRIPTS:
        assert list(ROOT.glob(f"{name}.py")), f"the README runs {name}.py"
        return
    args = SCRIPTS[name].parse_args(arguments)
    if why_not_run(name, args):
        return
    monkeypatch.chdir(workplace.folder)
    run(workplace, name, arguments)
    if args.out:
        assert any(Path(args.out).iterdir())


def test_the_readme_shows_every_script():
    ran = set()
    for name, arguments in COMMANDS:
        if name in SCRIPTS and not why_not_run(name, SCRIPTS[name].parse_args(arguments)):
            ran.add(name)
    assert ran == {"sft", "distill", "evaluate", "overlap"}


# ---------------------------------------------------------------------------- evaluate.py writes manifests

def run_evaluate(checkpoints, manifest, out, *more):
    words = ["--model", checkpoints / "student", "--data", manifest, "--out", out, "--device", "cpu", "--max_new_tokens", 8, *more]
    evaluate.main(evaluate.parse_args([str(word) for word in words]))


def test_hyps_is_a_manifest(corpus, checkpoints, tmp_path):
    out = tmp_path / "deep" / "out"
    run_evaluate(checkpoints, corpus / "dev.jsonl", out, "--batch", 4)
    before = data.read_manifest(corpus / "dev.jsonl")
    after = data.read_manifest(out / "hyps.jsonl")
    for a, b in zip(before, after, strict=True):  # the same clips in the same order
        assert (a.id, a.text, a.language, a.duration_sec) == (b.id, b.text, b.language, b.duration_sec)
        assert os.path.samefile(a.audio, b.audio)
        assert len(data.load_audio(b)) > 0
    for line in (out / "hyps.jsonl").read_text(encoding="utf-8").splitlines():
        assert not os.path.isabs(json.loads(line)["audio"])


def test_transcripts_become_a_manifest_without_the_empty_and_the_cut(corpus, checkpoints, tmp_path, monkeypatch):
    """No transcript anywhere in the pool: what the teacher-data stage starts from. Parts of files
    keep their place."""
    rows = []
    for i in range(5):
        rows.append({"audio": str(corpus / f"dev-{i}.wav"), "id": f"u{i}", "language": "en", "speaker": f"s{i}"})
    rows.append({"audio": str(corpus / "dev-5.wav"), "id": "part", "language": "zh", "start": 0.05, "duration": 0.2})
    data.write_jsonl(tmp_path / "pool.jsonl", rows)
    hyps = {"u0": "one", "u1": "", "u2": "two", "u3": "on and on", "u4": "", "part": "三"}

    def scripted(asr, utterances, *_):
        return {u.id: {"hyp": hyps[u.id], "stopped": u.id != "u3", "n_tokens": 1} for u in utterances}

    monkeypatch.setattr(model, "transcribe", scripted)
    (tmp_path / "elsewhere").mkdir()
    manifest = tmp_path / "elsewhere" / "td.jsonl"
    run_evaluate(checkpoints, tmp_path / "pool.jsonl", tmp_path / "out", "--as_manifest", manifest)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["results"] == []
    kept = data.read_manifest(manifest)
    assert [(u.id, u.text, u.language, u.speaker) for u in kept] == [
        ("u0", "one", "en", "s0"), ("u2", "two", "en", "s2"), ("part", "三", "zh", None)]
    for part in (kept[2], data.read_manifest(tmp_path / "out" / "hyps.jsonl")[-1]):
        assert (part.id, part.start_sec, part.duration_sec) == ("part", 0.05, 0.2)
        assert len(data.load_audio(part)) == 3200


# ---------------------------------------------------------------------------- the demo

SYSTEMS = ["base", "more", "opd", "td", "td_opd", "teacher"]
STAGES = ["data", "teacher", "base", "opd", "more", "transcripts", "td", "td_opd", *(f"eval/{name}" for name in SYSTEMS), "overlap",
          "compare"]


class Recorder:
    """Takes subprocess.run's place: keeps the commands, fails where it is told to."""
    def __init__(self):
        self.calls = []  # (words, environment)
        self.fail = None

    def __call__(self, words, env=None):
        self.calls.append((words, env))
        out = Path(words[words.index("--out") + 1])
        (out / "made").write_text("made")
        return SimpleNamespace(returncode=3 if out.name == self.fail else 0)


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(distill.subprocess, "run", recorder)
    monkeypatch.setattr(distill, "write_result", lambda root, seconds: None)
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    return recorder


def demo(root, *flags):
    distill.main(distill.parse_args(["--out", str(root), *flags]))


def stages_of(calls, root):
    return [str(Path(words[words.index("--out") + 1]).relative_to(root)) for words, _ in calls]


def test_the_demo_runs_every_stage_once(recorder, tmp_path):
    demo(tmp_path)
    assert stages_of(recorder.calls, tmp_path) == STAGES
    demo(tmp_path)
    assert len(recorder.calls) == len(STAGES)


def test_a_folder_with_a_space_in_its_name(recorder, tmp_path):
    demo(tmp_path / "my demo")
    assert stages_of(recorder.calls, tmp_path / "my demo") == STAGES


def test_the_demos_stages_are_commands_that_the_scripts_accept(recorder, tmp_path, capsys):
    demo(tmp_path, "--seed", "5", "--device", "cpu", "--steps", "7", "--divergence", "forward")
    shown = [line[2:] for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")]
    parsed = {}
    for stage, line, (words, environment) in zip(STAGES, shown, recorder.calls, strict=True):
        assert words[0] == sys.executable
        script = next(Path(word) for word in words if word.endswith(".py"))
        assert script.is_absolute()
        assert script.exists()
        arguments = words[words.index(str(script)) + 1:]
        assert shlex.split(line)[-len(arguments):] == arguments, "what is shown is what is run"
        parsed[stage] = SCRIPTS[script.stem].parse_args(arguments)
        assert environment["OMP_NUM_THREADS"] == "1"
    for stage, args in parsed.items():
        assert getattr(args, "seed", 5) == 5
        assert stage == "compare" or getattr(args, "device", "cpu") == "cpu"
    opd, td_opd, td, more, base, teacher = (parsed[name] for name in ("opd", "td_opd", "td", "more", "base", "teacher"))
    assert (opd.steps, opd.divergence, td_opd.divergence) == (7, "forward", "forward")
    assert more.steps == 7, "as many updates on the transcripts"
    assert all(args.resume for args in (opd, td_opd, td, more, base, teacher))
    # Who starts where, and learns from what.
    assert opd.student == more.student == td.student == base.out
    assert td_opd.student == td.out
    assert opd.teacher == td_opd.teacher == base.tokenizer == parsed["transcripts"].model == teacher.out
    assert opd.data == td_opd.data == more.data == base.data
    assert td.data == [parsed["transcripts"].as_manifest]
    # test is held out, and the same for all.
    test_sets = [parsed[f"eval/{name}"].data for name in SYSTEMS] + [[parsed["overlap"].data]]
    assert all(manifests == test_sets[0] for manifests in test_sets)
    seen = {*base.data, *teacher.data, *td.data, *parsed["transcripts"].data, base.dev}
    assert not seen & set(test_sets[0])
    for name in SYSTEMS:
        assert parsed[f"eval/{name}"].model == str(tmp_path / name)
    assert parsed["compare"].compare == [f"{parsed[f'eval/{name}'].out}/hyps.jsonl" for name in SYSTEMS]


def test_what_other_flags_made_is_refused_and_left_as_it_is(recorder, tmp_path):
    demo(tmp_path)
    n = len(recorder.calls)
    with pytest.raises(SystemExit, match="another command"):
        demo(tmp_path, "--lr", "0.1")
    assert len(recorder.calls) == n
    assert (tmp_path / "opd" / "made").read_text() == "made"


def test_what_the_demo_did_not_make_is_refused_and_left_as_it_is(recorder, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "recordings.txt").write_text("precious")
    with pytest.raises(SystemExit, match="--out"):
        demo(tmp_path)
    assert recorder.calls == []
    assert (tmp_path / "data" / "recordings.txt").read_text() == "precious"


def test_an_interrupted_stage_is_run_again_where_it_was(recorder, tmp_path):
    recorder.fail = "base"
    with pytest.raises(SystemExit, match="exit code 3"):
        demo(tmp_path)
    assert stages_of(recorder.calls, tmp_path) == ["data", "teacher", "base"]
    (tmp_path / "base" / "state").mkdir()
    recorder.fail = None
    recorder.calls.clear()
    demo(tmp_path)
    assert stages_of(recorder.calls, tmp_path) == STAGES[2:]
    assert (tmp_path / "base" / "state").exists(), "--resume goes on from it"


def test_a_stage_killed_with_the_demo_is_run_again(tmp_path, recorder, monkeypatch):
    """The power fails: nobody wrote that the stage failed."""
    def die(words, env=None):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(distill.subprocess, "run", die)
        distill.run_stage(tmp_path / "x", f"python data.py demo --out {tmp_path / 'x'}")
    distill.run_stage(tmp_path / "x", f"python data.py demo --out {tmp_path / 'x'}")
    assert len(recorder.calls) == 1


def test_the_time_of_a_stage_is_that_of_all_its_runs(tmp_path, recorder, monkeypatch):
    clock = iter([0.0, 10.0, 100.0, 105.0])
    monkeypatch.setattr(distill.time, "time", lambda: next(clock))
    command = f"python data.py demo --out {tmp_path / 'x'}"
    recorder.fail = "x"
    with pytest.raises(SystemExit):
        distill.run_stage(tmp_path / "x", command)
    recorder.fail = None
    assert distill.run_stage(tmp_path / "x", command) == 15.0
    assert distill.run_stage(tmp_path / "x", command) == 15.0  # done before


def test_stages_run_with_as_many_processes_as_the_demo(recorder, tmp_path, monkeypatch):
    started = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3", "MASTER_PORT": "1234",
               "TORCHELASTIC_RUN_ID": "x"}
    for key, value in started.items():
        monkeypatch.setenv(key, value)
    demo(tmp_path)
    for stage, (words, environment) in zip(STAGES, recorder.calls, strict=True):
        if stage not in ("data", "compare"):
            assert words[1:3] == ["-m", "torch.distributed.run"]
            assert words[words.index("--nproc_per_node") + 1] == "3"
        assert not set(started) & set(environment)
        assert environment["PATH"] == os.environ["PATH"]
    recorder.calls.clear()
    monkeypatch.setenv("RANK", "1")
    demo(tmp_path / "other")
    assert recorder.calls == [], "only rank 0 starts stages"


def test_result_json_has_the_rates_of_every_system(checkpoints, tmp_path, monkeypatch):
    """Four clips, two English, two Mandarin; errors by hand: base 4, OPD 1 of 16 units, the others
    none."""
    references = {"e1": ("en", "clean it"), "e2": ("en", "put two cups on the shelf"), "z1": ("zh", "修理"), "z2": ("zh", "打开红色台灯")}
    wrong = {"base": {"e1": "clean", "e2": "put cups on the elf", "z2": "打开红色台"}, "opd": {"e2": "put two cups on shelf"}}
    for name in SYSTEMS:
        rows = []
        for i, (language, text) in references.items():
            rows.append({"id": i, "audio": f"/{i}.wav", "text": text, "language": language, "speaker": f"voice of {i}", "set": "test",
                         "hyp": wrong.get(name, {}).get(i, text), "stopped": True, "n_tokens": 3})
        data.write_jsonl(tmp_path / "eval" / name / "hyps.jsonl", rows)
    hyps = [str(tmp_path / "eval" / name / "hyps.jsonl") for name in SYSTEMS]
    evaluate.main(evaluate.parse_args(["--compare", *hyps, "--out", str(tmp_path / "compare")]))

    def statistic(mean):
        return {"mean": mean, "low": mean - 0.01, "high": mean + 0.01}

    (tmp_path / "overlap").mkdir()
    report = {"vuss": statistic(40.0), "overlap": statistic(0.75)}
    report["compare"] = {"vuss": statistic(36.0), "overlap": statistic(0.875)}
    (tmp_path / "overlap" / "overlap.json").write_text(json.dumps(report))
    distill.write_result(tmp_path, {"base": 3.0})

    result = json.loads((tmp_path / "result.json").read_text())
    assert result["seconds"] == {"base": 3.0}
    rates = {name: (result[name]["wer"], result[name]["cer"], result[name]["pooled"]) for name in SYSTEMS}
    assert rates["base"] == pytest.approx((300 / 8, 100 / 8, 400 / 16))
    assert rates["opd"] == pytest.approx((100 / 8, 0, 100 / 16))
    for name in ("more", "td", "td_opd", "teacher"):
        assert rates[name] == (0, 0, 0)
    assert result["opd"]["below_base"] == pytest.approx(300 / 16)
    low, high = result["opd"]["below_base_interval"]
    assert low <= 300 / 16 <= high
    assert (result["base"]["vuss"], result["td"]["vuss"]) == (40.0, 36.0)
    assert (result["base"]["overlap"], result["td"]["overlap"]) == (0.75, 0.875)
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
