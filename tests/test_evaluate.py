"""evaluate.py: transcripts and their resume, rates by hand, comparison, teacher data, the page.

    pytest tests/test_evaluate.py
"""

import base64
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import socket
import sys
import wave
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import data
import evaluate
import model
from conftest import sound, write_wav


def run(*words):
    return evaluate.main(evaluate.parse_args([str(word) for word in words]))


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def read_outputs(out):
    """summary.json, rows of hyps.jsonl."""
    return json.loads((out / "summary.json").read_text()), read_jsonl(out / "hyps.jsonl")


@pytest.fixture
def spoken(corpus, tmp_path, monkeypatch, checkpoints):
    """evaluate(lines, *flags) of [(id, language, reference, transcript), ...] -> summary, rows.

    The model is made to say the transcripts; "..." at the end: cut. extra(i): further keys of line
    i of the manifest. A language or reference None: no such key.
    """
    def evaluate_lines(lines, *flags, extra=lambda i: {}):
        hyps = {name: hyp for name, _, _, hyp in lines}
        rows = []
        for i, (name, language, ref, _) in enumerate(lines):
            row = {"id": name, "audio": str(corpus / f"dev-{i % 6}.wav"), "language": language,
                   "text": ref} | extra(i)
            rows.append({key: value for key, value in row.items() if value is not None})
        data.write_jsonl(tmp_path / "lines.jsonl", rows)
        monkeypatch.setattr(model, "transcribe", lambda asr, batch, _: [
            {"hyp": hyps[u.id], "stopped": not hyps[u.id].endswith("..."), "n_tokens": 1}
            for u in batch.utterances])
        run("--model", checkpoints / "student", "--data", tmp_path / "lines.jsonl",
            "--out", tmp_path / "out", "--device", "cpu", *flags)
        return read_outputs(tmp_path / "out")

    return evaluate_lines


# ------------------------------------------------------------------------------------------ rates

def test_rates_by_hand(spoken, capsys):
    """English: 1 substituted, 1 deleted, 2 inserted (one on an empty reference) of 3 + 2 words.
    Mandarin: 1 inserted of 4 characters. No language: 1 substituted, 1 deleted of 4 characters and
    a word. All together 7 of 14."""
    summary, rows = spoken([
        ("a", "en", "red lamps, please", "red lamp"), ("b", "en", "it’s", "it is so"),
        ("c", "en", "", "hum"), ("d", "zh", "打开红灯", "打开了红灯。"),
        ("e", None, "明天有个 meeting", "明天有 Meetings"), ("f", "en", None, "who knows"),
        ("g", "en", "", "")])
    keys = ("language", "metric", "substitutions", "deletions", "insertions", "units", "utterances",
            "sentence_error", "no_speech")
    assert [[e[key] for key in keys] for e in summary["results"]] == [
        ["en", "WER", 1, 1, 2, 5, 4, 75, 2], ["zh", "CER", 0, 0, 1, 4, 1, 100, 0],
        ["", "WER", 1, 1, 0, 5, 1, 100, 0]]
    assert [e["rate"] for e in summary["results"]] == pytest.approx([80, 25, 40])
    assert summary["macro_average"] == pytest.approx((80 + 25 + 40) / 3)
    pooled = summary["pooled"]
    assert (pooled["rate"], pooled["errors"], pooled["units"]) == (50, 7, 14)
    low, high = data.interval(100 * data.bootstrap([2, 1, 1, 1, 2, 0], [3, 2, 0, 4, 5, 0]))
    assert (pooled["low"], pooled["high"]) == (low, high)
    assert (summary["clips"], summary["without_text"]) == (7, 1)
    assert [row.get("insertions") for row in rows] == [0, 1, 1, 1, 0, None, 0]
    shown = capsys.readouterr().out
    assert "lines zh: CER 25.00 % - over 1 utterances" in shown
    assert "1 lines without a text" in shown


@pytest.mark.parametrize("speaker, resampled, blocks, warned", [
    (lambda i: None, "utterances", 40, False), (lambda i: f"s{i % 19}", "speakers", 19, True),
    (lambda i: f"s{i % 20}", "speakers", 20, False), (lambda i: "s", "utterances", 40, False),
    (lambda i: f"s{i % 2}", "speakers", 2, True),
    (lambda i: f"s{i}" if i else None, "utterances", 40, False)])
def test_what_is_resampled_is_said(spoken, capsys, speaker, resampled, blocks, warned):
    lines = [(f"u{i}", "en", "the lamp", "the lamp" if i % 3 else "a lamp") for i in range(40)]
    summary, rows = spoken(lines, extra=lambda i: {"speaker": speaker(i)})
    labels = [speaker(i) for i in range(40)] if resampled == "speakers" else None
    draws = data.bootstrap([row["substitutions"] for row in rows], [2] * 40, labels)
    entry, = summary["results"]
    assert (entry["low"], entry["high"]) == data.interval(100 * draws)
    assert (entry["resampled"], entry["blocks"]) == (resampled, blocks)
    shown = capsys.readouterr().out
    assert f"{blocks} {resampled}" in shown and ("too few" in shown) is warned


def test_a_rate_and_an_interval_are_null_where_there_is_none(tmp_path):
    rows = [{"id": "a", "text": "red lamp", "hyp": "red lamps", "language": "fr"},
            {"id": "b", "text": "", "hyp": "you", "language": "es"}]
    data.write_jsonl(tmp_path / "h.jsonl", rows)
    run("--rescore", tmp_path / "h.jsonl", "--out", tmp_path)
    summary, _ = read_outputs(tmp_path)
    french, spanish = summary["results"]
    assert (french["rate"], french["low"], french["high"]) == (50, None, None)
    assert (spanish["rate"], spanish["insertions"], spanish["units"]) == (None, 1, 0)
    assert summary["macro_average"] == 50 and summary["pooled"]["rate"] == 100
    data.write_jsonl(tmp_path / "h.jsonl", rows[1:])
    run("--rescore", tmp_path / "h.jsonl", "--out", tmp_path)
    assert read_outputs(tmp_path)[0]["pooled"] is None


def test_a_manifest_without_any_text_is_transcribed_and_said_loudly(spoken, capsys):
    summary, rows = spoken([("a", "en", None, "one"), ("b", "en", None, "two")])
    assert summary["results"] == [] and summary["without_text"] == summary["clips"] == 2
    assert [row["hyp"] for row in rows] == ["one", "two"]
    assert 'lines.jsonl: NO LINE HAS A "text"' in capsys.readouterr().err
    spoken([("a", "en", None, "one"), ("b", "en", "", "")])
    assert "NO LINE" not in capsys.readouterr().err


# ------------------------------------------------------------------------------------- a real run

def words(checkpoints, manifests, out, *more):
    return ["--model", checkpoints / "student", "--data", *manifests, "--out", out, "--device",
            "cpu", "--max_new_tokens", 8, "--batch", 3, "--keep_going", *more]


@pytest.fixture(scope="module")
def manifests(corpus, tmp_path_factory):
    """Two sets with ids in common: 12 clips, one of which can't be decoded; 5 without a text."""
    folder = tmp_path_factory.mktemp("sets")
    rows = read_jsonl(corpus / "train.jsonl")[:12]
    for i, row in enumerate(rows):
        row |= {"id": f"u{i}", "audio": str(corpus / row["audio"])}
    rows[5]["audio"] = "gone.wav"
    data.write_jsonl(folder / "a.jsonl", rows)
    data.write_jsonl(folder / "b.jsonl", [
        {"id": f"u{i}", "audio": str(corpus / f"dev-{i}.wav"), "language": "en"} for i in range(5)])
    return [folder / "a.jsonl", folder / "b.jsonl"]


@pytest.fixture(scope="module")
def whole(checkpoints, manifests, tmp_path_factory):
    """The folder of a run that was not stopped."""
    out = tmp_path_factory.mktemp("whole")
    run(*words(checkpoints, manifests, out))
    return out


def assert_same(out, whole):
    """Equal hyps.jsonl, but for the time taken and where audio is relative to; no parts left."""
    ours, theirs = read_jsonl(out / "hyps.jsonl"), read_jsonl(whole / "hyps.jsonl")
    for row in ours + theirs:
        assert row.pop("seconds") > 0
        row["audio"] = Path(row["audio"]).name
    assert ours == theirs and not list(out.glob("part*"))


def test_hyps_is_a_manifest_in_the_order_of_the_data(checkpoints, manifests, whole):
    """Its transcripts are model.transcribe's on each clip alone."""
    asr = model.load(checkpoints / "student")
    summary, rows = read_outputs(whole)
    assert [(row["set"], row["id"]) for row in rows] == (
        [("a", f"u{i}") for i in range(12)] + [("b", f"u{i}") for i in range(5)])
    for u, row in zip(data.read_manifest(manifests), rows, strict=True):
        assert (row.get("text"), row["language"], row.get("duration")) == (
            u.text, u.language, u.duration_sec)
        if "failed" not in row:
            assert os.path.samefile(u.audio, whole / row["audio"])
            assert not os.path.isabs(row["audio"])
            result, = model.transcribe(asr, data.load_batch([u], (asr.n_mels,)), 8)
            assert {key: row[key] for key in result} == result
    batch = data.load_batch(data.read_manifest(manifests), (asr.n_mels,))
    assert sum(row["audio_sec"] for row in rows) == pytest.approx(batch.audio_sec)
    english = [row for row in rows[:12] if row["language"] == "en"]
    for key in ("audio_sec", "seconds"):
        assert summary["results"][0][f"set_{key}"] == pytest.approx(sum(r[key] for r in english))


def test_a_broken_clip_counts_as_deleted_or_stops_the_run(
        checkpoints, manifests, whole, tmp_path, capsys):
    summary, rows = read_outputs(whole)
    gone = rows[5]
    assert (gone["failed"], gone["hyp"], gone["stopped"]) == ("unreadable", "", True)
    assert gone["deletions"] == gone["units"] > 0
    assert sum("failed" in row for row in rows) == summary["failed"] == 1 and not summary["empty"]
    assert "no audio: unreadable" in (whole / "errors.html").read_text()
    assert evaluate.unfit_to_teach(gone, None) == "failed to decode"
    flags = [flag for flag in words(checkpoints, manifests, tmp_path) if flag != "--keep_going"]
    with pytest.raises(data.AudioError, match="a.jsonl:6: u5"):
        run(*flags)
    run(*flags, "--keep_going", "--resume")
    assert "a.jsonl:6: u5" in capsys.readouterr().err
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("batches", [0, 1, 4])
def test_resume_after_any_batch(checkpoints, manifests, whole, tmp_path, monkeypatch, batches):
    transcribe, calls, seen = model.transcribe, [], []

    def watched(asr, batch, *rest):
        if len(calls) == batches:
            lines = (tmp_path / "part-0.jsonl").read_bytes().splitlines()
            assert len(lines) >= len(seen) + bool(seen), "on the disk before the next batch begins"
            calls.append("stopped")
            raise KeyboardInterrupt
        calls.append(1)
        seen.extend(batch.utterances)
        return transcribe(asr, batch, *rest)

    monkeypatch.setattr(model, "transcribe", watched)
    with pytest.raises(KeyboardInterrupt):
        run(*words(checkpoints, manifests, tmp_path))
    kept = (tmp_path / "part-0.jsonl").read_bytes()
    (tmp_path / "part-0.jsonl").write_bytes(kept + b'{"set": "a", "id": "u1", "hyp": "half a')
    (tmp_path / "part-7.jsonl").write_bytes(kept[:40])  # of another process, without a whole line
    if batches:
        with pytest.raises(FileExistsError, match="--resume"):
            run(*words(checkpoints, manifests, tmp_path))
    run(*words(checkpoints, manifests, tmp_path, "--resume"))
    assert_same(tmp_path, whole)
    assert len(seen) == 16, "each clip but the one that is gone, once"


def run_on_two(main, args) -> None:
    """main(args) in two processes that find each other as under torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def process(rank):
        os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
        main(args)

    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=process, args=(rank,)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        rank.kill()
    assert [rank.exitcode for rank in ranks] == [0, 0]


def stop_after(batches, monkeypatch):
    """The model fails behind that many batches."""
    transcribe, calls = model.transcribe, []
    monkeypatch.setattr(model, "transcribe", lambda *a: calls.append(1) or (
        transcribe(*a) if len(calls) <= batches else 1 / 0))


def test_a_run_of_one_process_goes_on_with_two(
        checkpoints, manifests, whole, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        stop_after(2, patch)
        run(*words(checkpoints, manifests, tmp_path))
    line = words(checkpoints, manifests, tmp_path, "--resume")
    run_on_two(evaluate.main, evaluate.parse_args(list(map(str, line))))
    assert_same(tmp_path, whole)
    assert read_outputs(tmp_path)[0]["processes"] == 2
    assert capfd.readouterr().out.count("17 clips") == 1, "one process writes and prints"


def test_resume_refuses_what_was_made_otherwise(checkpoints, manifests, tmp_path, monkeypatch):
    flags = words(checkpoints, manifests[1:], tmp_path / "out")
    stop_after(1, monkeypatch)
    with pytest.raises(ZeroDivisionError):
        run(*flags)
    for changed, other in (("decoding", ["--max_new_tokens", 9]), ("decoding", ["--language", "en"]),
                           ("data", ["--data", manifests[0]]),
                           ("model, weights", ["--model", checkpoints / "teacher"])):
        with pytest.raises(ValueError, match=f"part-0.jsonl was made with another {changed}"):
            run(*flags, "--resume", *other)
    os.utime(manifests[1])  # written again
    with pytest.raises(ValueError, match="another data"):
        run(*flags, "--resume")


def test_clips_of_similar_length_go_together_and_share_their_time(spoken, monkeypatch):
    """A clip of unknown length comes last. By this clock a batch takes six seconds."""
    clock = itertools.count(0, 6)
    monkeypatch.setattr(evaluate, "time", SimpleNamespace(time=lambda: next(clock)))
    batches, load_batch = [], data.load_batch
    monkeypatch.setattr(data, "load_batch", lambda clips, *rest, **more: (
        batches.append([u.id for u in clips]), load_batch(clips, *rest, **more))[1])
    durations = (0.3, 0.1, None, 0.25, 0.15)
    _, rows = spoken([(str(sec), "en", None, "x") for sec in durations], "--batch", 2,
                     extra=lambda i: {"duration": durations[i]})
    assert [row["seconds"] for row in rows] == [3, 3, 6, 3, 3]
    assert batches == [["0.1", "0.15"], ["0.25", "0.3"], ["None"]]


def test_summary_says_how_to_do_it_again(checkpoints, manifests, whole):
    summary, _ = read_outputs(whole)
    weights = (checkpoints / "student" / "model.safetensors").stat()
    modified = str(np.datetime64(weights.st_mtime_ns, "ns"))
    assert summary["model"] == str(checkpoints / "student")
    assert summary["weights"] == {
        "model.safetensors": {"bytes": weights.st_size, "modified": modified}}
    assert list(summary["data"]) == [str(path) for path in manifests]
    assert summary["decoding"] == {
        "search": "greedy", "max_new_tokens": 8, "language": None, "batch": 3, "keep_going": True}
    assert (summary["device"], summary["processes"]) == ("cpu", 1)
    assert summary["normaliser"] == data.METRIC and summary["command"]
    packages = "torch torchaudio transformers numpy jiwer wetext kaldifst av".split()
    assert summary["versions"] == {"python": sys.version.split()[0]} | {
        name: version(name) for name in packages}
    assert summary["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", summary["commit"])


def test_files_are_printed(corpus, checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(model, "transcribe", lambda asr, batch, _: [
        {"hyp": Path(u.audio).stem, "stopped": u.audio.endswith("dev-0.wav")}
        for u in batch.utterances])
    write_wav(tmp_path / "long.wav", sound(np.random.default_rng(0), 40.2))
    a, b, long = corpus / "dev-0.wav", corpus / "dev-1.wav", tmp_path / "long.wav"
    flags = ["--model", checkpoints / "student", "--device", "cpu", "--audio"]
    run(*flags, b, a)
    assert capsys.readouterr().out == f"{b}: dev-1 [cut at --max_new_tokens]\n{a}: dev-0\n"
    run(*flags, a)
    assert capsys.readouterr().out == "dev-0\n"
    with pytest.raises(SystemExit, match="long.wav: too_long"):
        run(*flags, long)
    run(*flags, long, a, "--keep_going")
    shown = capsys.readouterr()
    assert shown.out == f"{a}: dev-0\n" and "long.wav: too_long" in shown.err


# ----------------------------------------------------------------------------------- teacher data

def test_teacher_data_is_what_fits(spoken, tmp_path, corpus, capsys):
    """--max_wer is in percent of the reference's units."""
    lines = [("exact", "en", "the red lamp is on", "The red lamp is on."),
             ("near", "en", "the red lamp is on", "the red lamp was on"),
             ("far", "en", "the red lamp is on", "a bed lamp is on"),
             ("unknown", None, None, "who knows"), ("empty", "zh", "灯", ""),
             ("cut", "en", "on and on", "on and..."), ("from nothing", "en", "", "words")]
    manifest = tmp_path / "elsewhere" / "td.jsonl"
    segment = {"start": 0.05, "duration": 0.2, "speaker": "s", "channel": 0}
    summary, rows = spoken(lines, "--as_manifest", manifest, "--max_wer", "20",
                           extra=lambda i: segment if i == 1 else {})
    assert [row["hyp"] for row in rows] == [hyp for *_, hyp in lines], "nothing is mended"
    assert [summary[key] for key in ("empty", "truncated", "failed")] == [1, 1, 0]
    exact, near, unknown = data.read_manifest(manifest)
    assert (exact.id, exact.text, exact.language) == ("exact", "The red lamp is on.", "en")
    assert (near.id, near.start_sec, near.duration_sec, near.speaker, near.channel) == (
        "near", 0.05, 0.2, "s", 0)
    assert os.path.samefile(near.audio, corpus / "dev-1.wav")
    assert (unknown.id, unknown.text, unknown.language) == ("unknown", "who knows", None)
    shown = capsys.readouterr().out.split("td.jsonl: ")[1]
    assert shown.startswith("3 transcripts kept; ")
    for part in ("2 left out: above --max_wer 20", "1 left out: empty", "1 kept without a language",
                 "1 left out: cut at --max_new_tokens", "1 kept without a reference"):
        assert part in shown
    spoken(lines, "--as_manifest", manifest)
    assert len(data.read_manifest(manifest)) == 5 and "max_wer" not in capsys.readouterr().out


def test_two_sets_with_a_name_and_an_id_in_common(spoken, tmp_path, corpus):
    """Sets are called by their paths then, and the teacher's manifest holds every id once."""
    paths = [tmp_path / "lines.jsonl", tmp_path / "b" / "lines.jsonl"]
    data.write_jsonl(paths[1], [{"id": name, "audio": str(corpus / "dev-0.wav")} for name in "12"])
    _, rows = spoken([(name, None, None, "x") for name in "01"] + [("2", "zh", None, "x")], "--data",
                     *paths, "--as_manifest", tmp_path / "td.jsonl", "--language", "en")
    assert [row["language"] for row in rows] == ["en", "en", "zh", "en", "en"]
    assert [row["set"] for row in rows] == [str(paths[0])] * 3 + [str(paths[1])] * 2
    ids = [u.id for u in data.read_manifest(tmp_path / "td.jsonl")]
    assert ids == ["0", "1", "2", f"{paths[1]}/1", f"{paths[1]}/2"]


# -------------------------------------------------------------------------------- without a model

def test_rescoring_gives_the_same_numbers(whole, tmp_path):
    """Counts that a file holds are not believed. A file of an older version is read."""
    first, rows = read_outputs(whole)
    stale = [row | {"audio": str(whole / row["audio"]), "deletions": 99, "looping": True}
             for row in rows]
    data.write_jsonl(tmp_path / "stale.jsonl", stale)
    data.write_jsonl(tmp_path / "again" / "part-0.jsonl", [{}])  # of a run that was stopped
    run("--rescore", tmp_path / "stale.jsonl", "--out", tmp_path / "again")
    again, rows_again = read_outputs(tmp_path / "again")
    for key in ("results", "macro_average", "pooled", "clips", "without_text", "failed"):
        assert again[key] == first[key]
    assert list(again["rescored"]) == [str(tmp_path / "stale.jsonl")] and "model" not in again
    assert os.path.samefile(tmp_path / "again" / rows_again[0]["audio"], whole / rows[0]["audio"])
    assert (tmp_path / "again" / "part-0.jsonl").exists()


@pytest.mark.parametrize("line, message", [
    (b'{"id": "u0", "hyp": "x"}', "id 'u0' stands twice"),
    (b'{"hyp": "n"}', "expected a string as 'id', found None"),
    (b'{"id": "b"}', "expected a string as 'hyp'"),
    (b'{"id": "b", "hyp": 3}', "expected a string as 'hyp', found 3"),
    (b'{"id": "b", "hyp": "", "text": ["x"]}', "expected a string as 'text'"),
    (b"[1]", "expected a JSON object"), (b'{"id": "b", "hyp": "\xff"}', "expected a JSON object")])
def test_a_line_that_can_not_be_scored_is_named(tmp_path, line, message):
    (tmp_path / "h.jsonl").write_bytes(b'{"id": "u0", "hyp": "x"}\n\n' + line)
    with pytest.raises(ValueError, match=f"h.jsonl:3: {message}"):
        evaluate.read_hyps(tmp_path / "h.jsonl")
    (tmp_path / "h.jsonl").write_bytes(b"\n")
    with pytest.raises(ValueError, match="no transcript"):
        evaluate.read_hyps(tmp_path / "h.jsonl")


def test_compare_by_hand(tmp_path, capsys):
    """200 clips of 10 words: A has two errors in each of the first 100; B one in 40 of them and one
    in 10 others; C as many as A, elsewhere."""
    right = "put the red lamp upon a green shelf near here".split()
    errors = {"a": [2 * (i < 100) for i in range(200)], "c": [2 * (i % 2) for i in range(200)],
              "b": [int(i < 40 or 150 <= i < 160) for i in range(200)]}
    for name, numbers in errors.items():
        rows = [{"id": f"u{i}", "text": " ".join(right), "language": "en",
                 "hyp": " ".join(["xxx"] * n + right[n:])} for i, n in enumerate(numbers)]
        if name == "b":  # neither the order nor space around a text is a matter
            rows = [row | {"text": f" {row['text']} "} for row in rows[::-1]]
        data.write_jsonl(tmp_path / f"{name}.jsonl", rows)
    a, b, c = (tmp_path / f"{name}.jsonl" for name in "abc")

    first, e, even = run("--compare", a, b, c)
    assert [row["system"] for row in (first, e, even)] == [str(a), str(b), str(c)]
    assert set(first) == set(
        "system set language metric rate low high resampled blocks utterances units difference "
        "difference_low difference_high p_improvement".split())
    assert (first["rate"], e["rate"], e["difference"]) == pytest.approx((10, 2.5, 7.5))
    assert (e["units"], e["utterances"], e["p_improvement"]) == (2000, 200, 1.0)
    half = 1.96 * (np.array(errors["a"]) - errors["b"]).std() / np.sqrt(200) * 10
    assert (e["difference_low"], e["difference_high"]) == pytest.approx(
        (7.5 - half, 7.5 + half), abs=0.15)
    assert "+7.50" in capsys.readouterr().out
    # A draw in which both are equal speaks for neither.
    assert first["difference_low"] == first["difference_high"] == 0
    assert first["p_improvement"] == 0.5 and 0.4 < even["p_improvement"] < 0.6
    assert even["difference"] == 0 and even["difference_low"] < 0 < even["difference_high"]
    _, back = run("--compare", b, a)
    assert back["difference"] == pytest.approx(-7.5) and back["p_improvement"] == 0.0


@pytest.mark.parametrize("change", [
    lambda rows: rows[:-1], lambda rows: rows + [rows[0] | {"id": "new"}],
    lambda rows: [rows[0] | {"text": "else"}] + rows[1:],
    lambda rows: [rows[0] | {"language": "de"}] + rows[1:]])
def test_compare_wants_the_same_clips(tmp_path, change):
    rows = [{"id": f"u{i}", "text": "red", "language": "en", "hyp": "bed"} for i in range(3)]
    data.write_jsonl(tmp_path / "a.jsonl", rows)
    data.write_jsonl(tmp_path / "b.jsonl", change(rows))
    with pytest.raises(ValueError, match="1 clips are not in both with one reference"):
        run("--compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl")


def test_compare_pools_resamples_speakers_and_writes_what_it_prints(tmp_path, capsys):
    """Systems are called by their folders, where these differ."""
    rows = [{"id": f"u{i}", "set": "t", "language": ("en", "zh")[i % 2], "speaker": f"s{i % 7}",
             "text": ("red lamp", "红灯")[i % 2]} for i in range(70)]
    data.write_jsonl(tmp_path / "base" / "hyps.jsonl", [row | {"hyp": ""} for row in rows])
    data.write_jsonl(tmp_path / "opd" / "hyps.jsonl", [row | {"hyp": row["text"]} for row in rows])
    paths = [tmp_path / name / "hyps.jsonl" for name in ("base", "opd")]
    entries = run("--compare", *paths, "--out", tmp_path / "new" / "out")
    assert [e["system"] for e in entries] == ["base", "opd"] * 3
    assert [(e["set"], e["language"], e["metric"]) for e in entries[::2]] == [
        ("t", "en", "WER"), ("t", "zh", "CER"), ("all", "pooled", "pooled")]
    assert {(e["resampled"], e["blocks"]) for e in entries} == {("speakers", 7)}
    assert [e["difference"] for e in entries] == [0, 100] * 3
    assert [e["utterances"] for e in entries[::2]] == [35, 35, 70]
    assert "7 speakers (too few" in capsys.readouterr().out
    assert json.loads((tmp_path / "new" / "out" / "compare.json").read_text()) == entries
    assert (tmp_path / "new" / "out" / "compare.png").stat().st_size > 5000
    for path in paths:
        data.write_jsonl(path, [rows[0] | {"hyp": "red"}])
    entries = run("--compare", *paths, "--out", tmp_path)  # of one block there is no interval
    assert "nan" not in (tmp_path / "compare.json").read_text().lower()
    assert math.isnan(entries[1]["p_improvement"]) and entries[1]["rate"] == 50


def test_the_page_is_self_contained_and_escaped_and_its_players_hold_the_clips(
        spoken, tmp_path, corpus):
    attack = "<script>alert(1)</script>"
    lines = [("u0", "de", "red lamp", f"red {attack} \"'&"), ("u1", "zh", "打开红灯", "打开灯"),
             ("u2", "en", "fine", "fine"), ("u3<b>", "en", "red lamp", "bed")]
    segment = {"start": 0.1, "duration": 0.2}
    spoken(lines, extra=lambda i: {"speaker": f"{attack} {i}"} | (segment if i == 1 else {}))
    page = (tmp_path / "out" / "errors.html").read_text(encoding="utf-8")
    assert "<script" not in page and "<b>" not in page and "default-src 'none'" in page
    assert re.findall(r"<h3>(.*?)</h3>", page) == ["u0", "u3&lt;b&gt;", "u1"], "only the wrong ones"
    links = re.findall(r'(?:src|href)="(.*?)"', page)
    assert len(links) == 3 and all(link.startswith("data:audio/wav;base64,") for link in links)
    with wave.open(io.BytesIO(base64.b64decode(links[2].split(",")[1]))) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (16_000, 1, 3200)
        samples = np.frombuffer(file.readframes(3200), "<i2").astype(int)
    with wave.open(str(corpus / "dev-1.wav")) as file:
        original = np.frombuffer(file.readframes(4800), "<i2").astype(int)
    assert np.abs(samples - original[1600:]).max() <= 1
    assert '<span class="pair delete"><span>红</span><span></span>' in page
    row = evaluate.count_errors({"id": "u", "set": "t", "hyp": "x", "text": "a b"})
    assert evaluate.errors_page([row] * 40).count("<h3>") == 30


@pytest.mark.parametrize("line, message", [
    ("--model m", "one of these"), ("--model m --data d", "--data needs --out"),
    ("--data d --out o", "--data needs --model"), ("--rescore h", "--rescore needs --out"),
    ("--model m --rescore h --out o", "--rescore does not read --model"),
    ("--compare a", "two or more"), ("--compare a a", "two or more"),
    ("--model m --data d --audio a --out o", "one of these"),
    ("--model m --audio a --as_manifest t", "--audio does not read --as_manifest"),
    ("--rescore h --out o --keep_going", "--rescore does not read --keep_going"),
    ("--model m --data d --out o --max_wer 10", "filters --as_manifest"),
    ("--model m --data d --out o --batch 0", "--batch")])
def test_flags_that_do_not_go_together(line, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate.parse_args(line.split())
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_outputs_that_can_not_be_written_are_named_before_any_work(tmp_path):
    (tmp_path / "taken").write_text("a file")
    for line in (["--data", "d", "--model", "m"], ["--rescore", "h"], ["--compare", "a", "b"]):
        with pytest.raises(OSError, match="taken/x"):
            run(*line, "--out", tmp_path / "taken" / "x")
    with pytest.raises(OSError, match=f"{tmp_path}: "):
        run("--model", "m", "--data", "d", "--out", tmp_path / "new", "--as_manifest", tmp_path)
