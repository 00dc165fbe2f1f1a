"""The scripts as files and commands: flags, the README's commands, the demo.

    pytest tests/test_scripts.py
"""

import argparse
import ast
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
import overlap
import sft
from conftest import ROOT

SCRIPTS = {"sft": sft, "distill": distill, "evaluate": evaluate, "overlap": overlap, "data": data}
SOURCE = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in (*SCRIPTS, "model")}
every_script = pytest.mark.parametrize("name", SCRIPTS)


# ------------------------------------------------------------------------------------------- files

@pytest.mark.parametrize("name", SOURCE)
def test_no_file_imports_a_script(name):
    """Every stage can be copied out with data.py and model.py; data.py stands alone."""
    imported = set()
    for node in ast.walk(ast.parse(SOURCE[name])):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    allowed = {"data": set(), "model": {"data"}}.get(name, {"data", "model"})
    assert imported & {path.stem for path in ROOT.glob("*.py")} <= allowed


# ------------------------------------------------------------------------------------------- flags

class Parsing(Exception):
    """Raised where a script would parse its flags."""


def flags(name):
    """All flags of a script, those of its subcommands included, without dashes: {flag: action}."""
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
    actions = {}
    for parser in found:
        for string, action in parser._option_string_actions.items():
            if string.startswith("--") and string != "--help":
                actions[string[2:]] = action
    return actions


@every_script
def test_every_flag_is_read_and_helped(name, capsys):
    """A flag is dead if no line says args.flag."""
    read = set(re.findall(r"\bargs\.(\w+)", SOURCE[name] + SOURCE["model"]))
    found = flags(name)
    assert len(found) >= 2
    assert found.keys() <= read
    assert all(action.help for action in found.values())
    with pytest.raises(SystemExit) as stopped:
        SCRIPTS[name].parse_args(["--help"])
    assert stopped.value.code == 0 and "--" in capsys.readouterr().out


ENOUGH = {  # flags that let a command be parsed
    "sft": "--student s --data d --out o", "distill": "--student s --teacher t --data d --out o",
    "evaluate": "--model s --data d --out o --as_manifest m",
    "overlap": "--student s --teacher t --data d --out o", "data": "demo"}
ZERO_IS_FINE = {"lr", "temperature", "ctc", "seed", "warmup", "workers"}


@every_script
def test_values_out_of_range_are_refused(name, capsys):
    numbers = [flag for flag, action in flags(name).items() if callable(action.type)]
    assert numbers
    for flag in numbers:
        def parse(value):
            return SCRIPTS[name].parse_args([*ENOUGH[name].split(), f"--{flag}={value}"])

        if flag in ZERO_IS_FINE:
            assert getattr(parse("0"), flag) == 0
        for value in ["-1", "nan"] + ["0"] * (flag not in ZERO_IS_FINE):
            with pytest.raises(SystemExit):
                parse(value)
            assert f"--{flag}" in capsys.readouterr().err


@pytest.mark.parametrize("name, line", [
    ("sft", "--data d --out o"),
    ("sft", "--data d --out o --student s --init random"),
    ("sft", "--data d --out o --student s --init_encoder e --init_lm l"),
    ("sft", "--data d --out o --init_encoder e"),
    ("sft", "--data d --out o --student s --d_model 96"),
    ("sft", "--data d --out o --student s --tokenizer t"),
    ("sft", "--data d --out o --init random --tokenizer t --vocab_size 99"),
    ("distill", "--student s --teacher t --data d"),
    ("distill", "--data d --out o"),
    ("distill", "--dev d"),
    ("distill", "--language en"),
    ("distill", "--resume"),
    ("distill", "--top_k 3"),
    ("distill", "--states reference --temperature 0.5"),
    ("distill", "--support sampled --divergence forward"),
    ("distill", "--support sampled --temperature 0"),
    ("distill", "--support sampled --states reference"),
    ("distill", "--divergence jeffreys"),
    ("distill", "--step 3"),  # no abbreviations: a later flag would change what they mean
])
def test_flags_that_do_not_go_together_are_refused(name, line, capsys):
    with pytest.raises(SystemExit) as stopped:
        SCRIPTS[name].parse_args(line.split())
    assert stopped.value.code == 2
    capsys.readouterr()


def test_defaults_that_depend_on_other_flags():
    assert sft.parse_args("--data d --out o --init random".split()).ctc == 1.0
    assert sft.parse_args("--data d --out o --init random --ctc 0".split()).ctc == 0.0
    assert sft.parse_args("--data d --out o --student s".split()).ctc == 0.0
    assert distill.parse_args([]).student is None  # the demo
    assert distill.parse_args("--support sampled".split()).support == "sampled"


# -------------------------------------------------------------------- commands that are shown

RECORD = r"""
record() { printf '%s\x1f' "$@"; printf '\x1e'; }
python() { record python "$@"; }
torchrun() { record torchrun "$@"; }
cd() { :; }
pip() { :; }
command_not_found_handle() { :; }
PATH=
"""


def shown_commands(text):
    """(script, [arguments]) of every command in the code blocks of a page, variables and loops
    expanded by bash."""
    commands = []
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if not re.search(r"^\s*(pip|python|torchrun|\$run)\s", block, re.MULTILINE):
            continue  # a drawing or a file, no commands
        block = re.sub(r"(?<=\s)\.\.\.(?=\s|$)", "", block)
        shell = subprocess.run([shutil.which("bash"), "-c", RECORD + block], capture_output=True,
                               text=True)
        assert "syntax error" not in shell.stderr, shell.stderr
        for call in shell.stdout.split("\x1e")[:-1]:
            call = call.split("\x1f")[:-1]
            scripts = [i for i, word in enumerate(call) if word.endswith(".py")]
            if scripts:
                commands.append((call[scripts[0]].removesuffix(".py"), call[scripts[0] + 1:]))
    return commands


def test_commands_of_the_readme_are_parsed_by_their_scripts():
    """Those of the page of the paper's experiment, too."""
    pages = (ROOT / "README.md", ROOT / ".assets" / "reproduce.md")
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    shown = set()
    for name, arguments in shown_commands(text):
        if name not in SCRIPTS:
            assert (ROOT / f"{name}.py").exists(), f"the README runs {name}.py"
            continue
        try:
            args = SCRIPTS[name].parse_args(arguments)
        except SystemExit:
            pytest.fail(f"README.md: {name}.py {shlex.join(arguments)}")
        shown.add((name, bool(getattr(args, "student", None))))
    assert {name for name, _ in shown} == SCRIPTS.keys()
    assert ("distill", True) in shown and ("distill", False) in shown


@pytest.mark.parametrize("file", SOURCE)
def test_flags_of_commands_that_docstrings_show_exist(file):
    for line in SOURCE[file].replace("\\\\\n", " ").splitlines():
        if not re.match(r"\s*\$?\s*(?:\w+=\S+ )*(python|torchrun) .*\.py", line):
            continue
        for name, arguments in re.findall(r"(\w+)\.py([^#;]*)", line):
            if name in SCRIPTS:
                assert set(re.findall(r"--(\w+)", arguments)) <= flags(name).keys(), line


# ---------------------------------------------------------------------------------------- the demo

SYSTEMS = ["base", "more", "opd", "td", "td_opd", "teacher"]
STAGES = ["data", "teacher", "base", "opd", "more", "transcripts", "td", "td_opd",
          *(f"eval/{name}" for name in SYSTEMS), "overlap", "compare"]


class Recorder:
    """Takes subprocess.run's place: keeps the commands, fails where it is told to."""
    def __init__(self):
        self.calls = []  # (words, environment)
        self.fail = None

    def __call__(self, words, env=None):
        self.calls.append((words, env))
        if self.fail == "power":
            raise KeyboardInterrupt
        out = words[words.index("--out") + 1]
        return SimpleNamespace(returncode=3 if Path(out).name == self.fail else 0)

    def stages(self, root):
        outs = [words[words.index("--out") + 1] for words, _ in self.calls]
        self.calls.clear()
        return [str(Path(out).relative_to(root)) for out in outs]


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(distill.subprocess, "run", recorder)
    monkeypatch.setattr(distill, "write_result", lambda root, seconds: None)
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    return recorder


def demo(root, *more):
    distill.main(distill.parse_args(["--out", str(root), *more]))


def test_the_demo_runs_every_stage_once_and_goes_on_where_it_was_stopped(
        recorder, tmp_path, monkeypatch):
    root = tmp_path / "my demo"
    monkeypatch.setattr(distill.time, "time", iter(range(99)).__next__)
    for how, error in (("base", SystemExit), ("power", KeyboardInterrupt)):
        recorder.fail = how
        with pytest.raises(error):
            demo(root)
        assert recorder.stages(root) == (STAGES[:3] if how == "base" else STAGES[2:3])
    recorder.fail = None
    demo(root)
    assert recorder.stages(root) == STAGES[2:]
    assert data.read_json(root / "stages.json")["data"][1] == 1  # seconds
    demo(root)
    assert recorder.calls == []
    with pytest.raises(SystemExit, match="another command"):  # what other flags made stays
        demo(root, "--lr", "0.1")
    assert recorder.calls == []


def test_the_demos_stages_are_commands_that_the_scripts_accept(recorder, tmp_path, capsys):
    demo(tmp_path, *"--seed 5 --device cpu --steps 7 --divergence forward --recompute".split())
    output = capsys.readouterr().out.splitlines()
    shown = [line[2:] for line in output if line.startswith("$ ")]
    parsed = {}
    for stage, line, (call, environment) in zip(STAGES, shown, recorder.calls, strict=True):
        script = next(Path(word) for word in call if word.endswith(".py"))
        arguments = call[call.index(str(script)) + 1:]
        assert call[0] == sys.executable and script.is_absolute() and script.exists()
        assert shlex.split(line)[-len(arguments):] == arguments, "what is shown is what is run"
        parsed[stage] = SCRIPTS[script.stem].parse_args(arguments)
        assert environment["OMP_NUM_THREADS"] == "1" and environment["PATH"] == os.environ["PATH"]
    for stage, args in parsed.items():
        assert getattr(args, "seed", 5) == 5 or args.temperature == 0
        assert stage == "compare" or getattr(args, "device", "cpu") == "cpu"
    opd, td_opd, td, more, base, teacher = (
        parsed[name] for name in ("opd", "td_opd", "td", "more", "base", "teacher"))
    assert (opd.steps, opd.divergence, opd.recompute) == (7, "forward", True)
    assert more.steps == 7, "as many updates on the transcripts"
    assert all(args.resume for args in (opd, td_opd, td, more, base, teacher))
    # Who starts where, and learns from what.
    assert opd.student == more.student == td.student == base.out
    assert td_opd.student == td.out
    assert opd.teacher == td_opd.teacher == base.tokenizer == teacher.out
    assert parsed["transcripts"].model == teacher.out
    assert opd.data == td_opd.data == more.data == base.data
    assert td.data == [parsed["transcripts"].as_manifest]
    # test is held out, and the same for all.
    test_set, = {tuple(parsed[f"eval/{name}"].data) for name in SYSTEMS}
    seen = {*base.data, *teacher.data, *td.data, *parsed["transcripts"].data, *base.dev}
    assert tuple(parsed["overlap"].data) == test_set and not seen & set(test_set)
    assert parsed["overlap"].student == [base.out, td.out]
    assert all(parsed[f"eval/{name}"].model == str(tmp_path / name) for name in SYSTEMS)
    hyps = [f"{parsed[f'eval/{name}'].out}/hyps.jsonl" for name in SYSTEMS]
    assert parsed["compare"].compare == hyps


def test_rank_0_starts_the_stages_anew(recorder, tmp_path, monkeypatch):
    started = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_PORT": "1234",
               "TORCHELASTIC_RUN_ID": "x"}
    for key, value in started.items():
        monkeypatch.setenv(key, value)
    demo(tmp_path)
    for stage, (call, environment) in zip(STAGES, recorder.calls, strict=True):
        if stage not in ("data", "compare"):
            assert call[1:3] == ["-m", "torch.distributed.run"]
            assert call[call.index("--nproc_per_node") + 1] == str(min(2, os.cpu_count()))
        assert not started.keys() & environment.keys()
    recorder.calls.clear()
    monkeypatch.setenv("RANK", "1")
    demo(tmp_path / "other")
    assert recorder.calls == [], "only rank 0 starts stages"


def test_result_json_has_the_rates_of_every_system(tmp_path):
    """Errors by hand: base 3 of 3 words and 1 of 5 characters, OPD 1 word, the others none."""
    said = {"e": ("en", "put two cups"), "z": ("zh", "打开红色灯")}
    wrong = {"base": {"e": "", "z": "打开红色"}, "opd": {"e": "put two"}}
    for name in SYSTEMS:
        rows = []
        for i, (language, text) in said.items():
            row = {"audio": f"/{i}.wav", "text": text, "language": language,
                   "hyp": wrong.get(name, {}).get(i, text)}
            rows += [{"id": i} | row, {"id": f"{i} again"} | row]  # one clip has no interval
        data.write_jsonl(tmp_path / "eval" / name / "hyps.jsonl", rows)
    hyps = [str(tmp_path / "eval" / name / "hyps.jsonl") for name in SYSTEMS]
    evaluate.main(evaluate.parse_args(["--compare", *hyps, "--out", str(tmp_path / "compare")]))
    students = []
    for vuss, overlap in ((40.0, 0.75), (36.0, 0.875)):
        students.append({"vuss": {"mean": vuss, "low": vuss - 1, "high": vuss + 1},
                         "overlap": {"mean": overlap, "low": overlap - 0.1, "high": overlap + 0.1}})
    (tmp_path / "overlap").mkdir()
    data.write_json(tmp_path / "overlap" / "overlap.json", {"students": students})
    distill.write_result(tmp_path, {"base": 3.0})

    result = data.read_json(tmp_path / "result.json")
    assert result["seconds"] == {"base": 3.0}
    rates = {name: [result[name][key] for key in ("wer", "cer", "pooled")] for name in SYSTEMS}
    expected = {name: [0, 0, 0] for name in SYSTEMS}
    expected |= {"base": [100, 100 / 5, 400 / 8], "opd": [100 / 3, 0, 100 / 8]}
    assert rates == {name: pytest.approx(row) for name, row in expected.items()}
    assert result["opd"]["below_base"] == pytest.approx(300 / 8)
    low, high = result["opd"]["below_base_interval"]
    assert low <= 300 / 8 <= high
    for name, vuss, overlap in (("base", 40.0, 0.75), ("td", 36.0, 0.875)):
        assert (result[name]["vuss"], result[name]["overlap"]) == (vuss, overlap)
        assert result[name]["vuss_interval"] == [vuss - 1, vuss + 1]
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
