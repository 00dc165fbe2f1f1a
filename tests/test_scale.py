"""Manifests, plans and transcriptions of the paper's size: the index, what is in memory, kill and resume.

    OMP_NUM_THREADS=1 python -m pytest tests/test_scale.py -q
"""

import contextlib
import dataclasses
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import data
import evaluate
import model
from conftest import ROOT

INDEX = "m.jsonl.index"


@pytest.fixture
def count_indexings(monkeypatch):
    """A list that grows by one path whenever a manifest is read line by line."""
    made, index_lines = [], data._index_lines
    monkeypatch.setattr(data, "_index_lines", lambda path, file: made.append(path) or index_lines(path, file))
    return made


def write(path, rows):
    data.write_jsonl(path, rows)
    return path


def some_rows(n, **more):
    return [{"id": f"u{i}", "audio": f"{i}.wav", "text": "hi", "language": "en", "duration": 1 + i / 8} | more for i in range(n)]


# ---------------------------------------------------------------------------- the index

def test_index_is_made_once_and_again_when_the_manifest_changes(tmp_path, count_indexings):
    path = write(tmp_path / "m.jsonl", some_rows(3))
    assert len(data.read_manifest(path)) == len(data.read_manifest(path)) == 3
    assert len(count_indexings) == 1 and (tmp_path / INDEX).exists()
    before = path.stat()
    write(path, some_rows(4))  # another size
    assert [u.id for u in data.read_manifest(path)] == ["u0", "u1", "u2", "u3"]
    write(path, [*some_rows(3), {"id": "v3", "audio": "3.wav", "text": "hi", "language": "en", "duration": 1.375}])  # another time, the same size
    assert data.read_manifest(path)[3].id == "v3" and len(count_indexings) == 3
    now = path.stat()
    write(path, [{"id": "w0", "audio": "0.wav", "text": "hi", "language": "en", "duration": 1.0}, *some_rows(4)[1:]])
    os.utime(path, ns=(now.st_atime_ns, now.st_mtime_ns))  # other bytes alone: size and time are the old ones
    assert path.stat().st_size == now.st_size and path.stat().st_mtime_ns == now.st_mtime_ns != before.st_mtime_ns
    assert data.read_manifest(path)[0].id == "w0" and len(count_indexings) == 4
    data.read_manifest(path)
    assert len(count_indexings) == 4


@pytest.mark.parametrize("content", [b"", b"half of an index"])
def test_a_broken_index_is_made_again(tmp_path, content):
    path = write(tmp_path / "m.jsonl", some_rows(3))
    (tmp_path / INDEX).write_bytes(content)
    assert [u.id for u in data.read_manifest(path)] == ["u0", "u1", "u2"]


def test_index_of_a_folder_that_can_not_be_written(tmp_path, monkeypatch, count_indexings):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write(tmp_path / "m.jsonl", some_rows(3))
    (tmp_path / INDEX / "in the way").mkdir(parents=True)
    for _ in range(2):
        assert [u.id for u in data.read_manifest(path)] == ["u0", "u1", "u2"]
    assert len(count_indexings) == 1 and len(list((tmp_path / "cache" / "opd-asr").iterdir())) == 1
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("no folder either")
    assert [u.id for u in data.read_manifest(path)] == ["u0", "u1", "u2"]  # from memory
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "m.jsonl", INDEX]  # no half index anywhere


def test_two_processes_at_once(tmp_path):
    """Both get a right index; one of them makes it."""
    path = write(tmp_path / "m.jsonl", some_rows(20_000))
    code = """if True:
        import sys, data
        made, index_lines = [], data._index_lines
        data._index_lines = lambda *a: made.append(1) or index_lines(*a)
        sys.stdin.readline()
        m = data.read_manifest(sys.argv[1])
        print(len(made), len(m), m[19_999].id, m.durations().sum())"""
    processes = [subprocess.Popen([sys.executable, "-c", code, path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    shown = [process.communicate()[0].split() for process in processes]
    assert sorted(words[0] for words in shown) == ["0", "1"]
    assert shown[0][1:] == shown[1][1:] and shown[0][1:3] == ["20000", "u19999"]


def test_a_manifest_is_a_sequence(corpus):
    train, dev = data.read_manifest(corpus / "train.jsonl"), data.read_manifest(corpus / "dev.jsonl")
    both = data.read_manifests([corpus / "train.jsonl", corpus / "dev.jsonl"])
    assert list(both) == list(train) + list(dev) and len(both) == 30
    assert both[-1] == both[29] == dev[5] and both[24] == dev[0] and both[23] == train[23] and both[22:26:2] == [train[22], dev[0]]
    assert both[np.int64(3)] == train[3]
    for i in (30, -31):
        with pytest.raises(IndexError):
            both[i]
    copy = pickle.loads(pickle.dumps(both))  # for loader workers that are not forked
    assert list(copy) == list(both) and len(pickle.dumps(both)) < 1000
    np.testing.assert_array_equal(data.measure(both), data.measure(list(both)))
    assert isinstance(data.read_manifest(corpus / "dev.jsonl")[:2], list)


def test_blank_lines_and_a_last_line_without_end(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'\n{"audio": "a.wav"}\n \n\xc2\xa0\n{"audio": "b.wav"}\r\n\n{"audio": "c.wav"}')
    assert [(u.id, u.line) for u in data.read_manifest(path)] == [("a", f"{path}:2"), ("b", f"{path}:5"), ("c", f"{path}:7")]


def test_bytes_that_are_no_text_name_the_line(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(b'{"audio": "a.wav"}\n{"audio": "\xff.wav"}\n')
    with pytest.raises(ValueError, match="m.jsonl:2: expected UTF-8"):
        data.read_manifest(tmp_path / "m.jsonl")


def test_equal_hashes_of_different_ids_are_no_duplicates(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "hash_id", lambda name: len(name))
    assert len(data.read_manifest(write(tmp_path / "m.jsonl", some_rows(10)))) == 10
    rows = some_rows(10)
    rows[7]["id"] = "u4"
    with pytest.raises(ValueError, match="n.jsonl:8: id 'u4' already stands on line 5"):
        data.read_manifest(write(tmp_path / "n.jsonl", rows))


def test_headers_are_read_once(corpus, tmp_path, monkeypatch):
    rows = [{"id": f"u{i}", "audio": str(corpus / f"dev-{i}.wav"), "start": 0.05} for i in range(4)]
    rows[1]["duration"] = 0.125
    rows.append({"id": "gone", "audio": "gone.wav"})
    path = write(tmp_path / "m.jsonl", rows)
    expected = [len(data.load_audio(dataclasses.replace(u, start_sec=0.0, duration_sec=None))) / data.SAMPLE_RATE - 0.05
                for u in data.read_manifest(path)[:4]]
    expected[1] = 0.125
    read, file_seconds = [], data._file_seconds
    monkeypatch.setattr(data, "_file_seconds", lambda path: read.append(Path(path).name) or file_seconds(path))
    for _ in range(2):
        assert data.measure(data.read_manifest(path)) == pytest.approx([*expected, 0.0], abs=1e-6)
    assert read == ["dev-0.wav", "dev-2.wav", "dev-3.wav", "gone.wav", "gone.wav"]  # what can't be read may be mended


@pytest.mark.parametrize("change", [{"text": None}, {"language": None}])
def test_labels_are_checked_without_parsing(tmp_path, monkeypatch, change):
    rows = some_rows(500)
    write(tmp_path / "good.jsonl", rows)
    rows[311] |= change
    write(tmp_path / "bad.jsonl", rows)
    manifest = data.read_manifests([tmp_path / "good.jsonl", tmp_path / "bad.jsonl"])
    parsed, parse = [], data._parse_line
    monkeypatch.setattr(data, "_parse_line", lambda *a: parsed.append(1) or parse(*a))
    data.check_labelled(data.read_manifest(tmp_path / "good.jsonl"))
    with pytest.raises(ValueError, match="bad.jsonl:312: u311: 'text' and 'language' are needed"):
        data.check_labelled(manifest)
    assert len(parsed) == 1


def test_nothing_is_kept_a_line(tmp_path):
    """100,000 lines: 25 bytes each at most, and a loader worker shares them."""
    write(tmp_path / "m.jsonl", some_rows(100_000))
    data.read_manifest(tmp_path / "m.jsonl")
    code = """if True:
        import sys, tracemalloc, data, numpy
        numpy.random.default_rng([0, 0])  # imports what it needs
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        m = data.read_manifest(sys.argv[1])
        data.check_labelled(m)
        plan = data.Plan(data.measure(m), 32, 0)
        for step in range(0, 9000, 1000): [m[i] for i in plan[step]]
        print(tracemalloc.get_traced_memory()[0] - before)"""
    shown = subprocess.run([sys.executable, "-c", code, tmp_path / "m.jsonl"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(shown.stdout) < 5 * 100_000  # the order of an epoch, 4 bytes each; what is mapped is shared
    assert (tmp_path / INDEX).stat().st_size < 27 * 100_000


# ---------------------------------------------------------------------------- intervals of many clips

def test_the_normal_approximation_agrees_with_the_draws_it_replaces(monkeypatch):
    rng = np.random.default_rng(0)
    units = rng.integers(3, 25, 31_000)
    errors = rng.binomial(units, rng.beta(1, 12, 31_000))
    approximate = data.bootstrap(errors, units)
    monkeypatch.setattr(data, "MANY_BLOCKS", 10 ** 9)
    drawn = data.bootstrap(errors, units, n=2000)
    width = drawn[1] - drawn[0]
    assert approximate == pytest.approx(drawn, abs=0.06 * width)
    assert all(np.isnan(data.bootstrap(errors, 0 * units)))


def test_an_interval_of_a_million_clips_takes_seconds():
    rng = np.random.default_rng(0)
    units = rng.integers(3, 25, 1_000_000)
    errors = rng.binomial(units, 0.1)
    began = time.process_time()
    low, high = data.bootstrap(errors, units, blocks=range(1_000_000))
    assert time.process_time() - began < 5
    assert low < errors.sum() / units.sum() < high
    gains = data.bootstrap_rates(errors - errors, units)
    assert (gains == 0).all()  # of a system with itself: a tie, not a win in half of the draws


# ---------------------------------------------------------------------------- kill and resume

def words(checkpoints, manifests, out, *more):
    return [str(word) for word in ("--model", checkpoints / "student", "--data", *manifests, "--out", out, "--device", "cpu",
                                   "--max_new_tokens", 8, "--batch", 3, "--as_manifest", out / "td.jsonl", *more)]


def run(*args):
    evaluate.main(evaluate.parse_args(words(*args)))


@pytest.fixture
def manifests(corpus, tmp_path):
    """Two sets: 24 clips, one of which can't be decoded; six clips without a text."""
    rows = [json.loads(line) | {"id": f"a{i}"} for i, line in enumerate((corpus / "train.jsonl").read_text().splitlines())]
    for row in rows:
        row["audio"] = str(corpus / row["audio"])
    rows[5]["audio"] = "gone.wav"
    untold = [{"id": f"b{i}", "audio": str(corpus / f"dev-{i}.wav"), "language": "en"} for i in range(6)]
    return [write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", untold)]


@pytest.fixture
def whole(checkpoints, manifests, tmp_path):
    """The folder of a run that was not stopped."""
    run(checkpoints, manifests, tmp_path / "whole", "--keep_going")
    return tmp_path / "whole"


def assert_same(out, whole):
    for name in ("hyps.jsonl", "td.jsonl", "errors.html"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert sorted(p.name for p in out.iterdir() if p.suffix != ".index") == ["errors.html", "hyps.jsonl", "summary.json", "td.jsonl"]
    a, b = (json.loads((folder / "summary.json").read_text()) for folder in (out, whole))
    for entry in a["results"] + b["results"]:
        assert entry.pop("set_seconds") > 0
    assert a["results"] == b["results"] and a["pooled"] == b["pooled"]


@pytest.mark.parametrize("batches", [0, 1, 5, 9])
def test_resume_after_any_batch(checkpoints, manifests, whole, tmp_path, monkeypatch, batches):
    transcribe, done, out = model.transcribe, [], tmp_path / "out"

    def stop_after(asr, utterances, *args):
        if len(done) == batches:
            raise KeyboardInterrupt
        results = transcribe(asr, utterances, *args)
        done.append(len(results))
        return results

    monkeypatch.setattr(model, "transcribe", stop_after)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoints, manifests, out, "--keep_going")
    kept = (out / "part-0.jsonl").read_bytes()
    assert kept.count(b"\n") >= sum(done) and not (out / "hyps.jsonl").exists()
    with (out / "part-0.jsonl").open("ab") as file:
        file.write(b'{"clip": 3, "seconds": 0.1, "hyp": "half a')
    with (out / "part-7.jsonl").open("wb") as file:  # of an eighth process: two lines of a batch of three, whole ones
        file.write(kept[:kept.rfind(b"\n", 0, -1) + 1])
    if batches:
        with pytest.raises(FileExistsError, match="--resume"):
            run(checkpoints, manifests, out, "--keep_going")
    resumed = []
    monkeypatch.setattr(model, "transcribe", lambda asr, utterances, *args: resumed.extend(utterances) or transcribe(asr, utterances, *args))
    run(checkpoints, manifests, out, "--keep_going", "--resume")
    assert_same(out, whole)
    assert len({u.id for u in resumed}) <= 30 - kept.count(b"\n") + 1  # the clip that is gone may be in two tries


def test_resume_refuses_what_was_made_otherwise(checkpoints, manifests, tmp_path, monkeypatch):
    out, transcribe, calls = tmp_path / "out", model.transcribe, []
    monkeypatch.setattr(model, "transcribe", lambda *a: calls.append(1) or (transcribe(*a) if len(calls) < 2 else 1 / 0))
    with pytest.raises(ZeroDivisionError):
        run(checkpoints, manifests[1:], out)
    for change in (["--batch", 2], ["--max_new_tokens", 9], ["--data", manifests[0]], ["--model", checkpoints / "teacher"]):
        with pytest.raises(ValueError, match="another --model, --data, --batch or --max_new_tokens"):
            run(checkpoints, manifests[1:], out, "--resume", *change)


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1)])
def test_killed_at_a_random_moment(checkpoints, manifests, whole, tmp_path, before, after):
    """SIGKILL to all processes of a run; resumed with another number of them: the same files, byte for byte."""
    out = tmp_path / "out"
    script = tmp_path / "slow.py"
    script.write_text(f"""if True:
        import os, sys, time
        sys.path.insert(0, {str(ROOT)!r})
        import evaluate, model
        open(f"{tmp_path}/pid-{{os.getpid()}}", "w").close()
        transcribe = model.transcribe
        model.transcribe = lambda *a: time.sleep(0.4) or transcribe(*a)
        evaluate.main(evaluate.parse_args())""")

    def start(processes, *more):
        launch = [sys.executable]
        if processes > 1:
            launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        return subprocess.Popen([*launch, script, *words(checkpoints, manifests, out, "--keep_going", "--resume", *more)], start_new_session=True,
                                env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def n_lines():
        return sum(path.read_bytes().count(b"\n") for path in out.glob("part-*.jsonl"))

    first = start(before)
    while n_lines() == 0 and first.poll() is None:
        time.sleep(0.02)
    time.sleep(random.uniform(0, 0.8))
    os.killpg(first.pid, signal.SIGKILL)
    for path in tmp_path.glob("pid-*"):  # torchrun gives each of its processes a session
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(path.name.removeprefix("pid-")), signal.SIGKILL)
    said = first.communicate()[1]
    kept = n_lines()
    assert 0 < kept < 30, said[-3000:]
    second = start(after)
    _, said = second.communicate(timeout=120)
    assert second.returncode == 0, said[-3000:]
    assert_same(out, whole)
