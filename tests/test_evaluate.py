"""evaluate.py: transcripts and their resume, rates by hand, comparison, teacher data, errors."""

import json
import multiprocessing
import os
import re
import socket
from importlib.metadata import version
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

import data
import evaluate
import model
from conftest import rollout, sound, write_wav


def run(*words):
    return evaluate.main(evaluate.parse_args([str(word) for word in words]))


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def read_outputs(out):
    """summary.json, rows of hyps.jsonl."""
    return data.read_json(out / "summary.json"), read_jsonl(out / "hyps.jsonl")


@pytest.fixture
def spoken(corpus, tmp_path, monkeypatch, checkpoints):
    """evaluate(lines, *flags) of [(id, language, reference, transcript), ...] -> summary, rows.
    The model is made to say the transcripts; "..." at the end: cut. extra(i): further keys of line
    i of the manifest."""
    def evaluate_lines(lines, *flags, extra=lambda i: {}):
        hyps = {name: hyp for name, *_, hyp in lines}
        data.write_jsonl(tmp_path / "lines.jsonl", [
            {"id": name, "audio": str(corpus / f"dev-{i % 6}.wav"), "language": language,
             "text": ref} | extra(i) for i, (name, language, ref, _) in enumerate(lines)])
        monkeypatch.setattr(model, "transcribe", lambda asr, batch, *_: [
            {"hyp": hyps[u.id], "stopped": not hyps[u.id].endswith("..."), "n_tokens": 1}
            for u in batch.utterances])
        run("--model", checkpoints / "student", "--data", tmp_path / "lines.jsonl",
            "--out", tmp_path / "out", "--device", "cpu", *flags)
        return read_outputs(tmp_path / "out")

    return evaluate_lines


def test_rates_by_hand(spoken, capsys):
    """English: 1 substituted, 1 deleted, 2 inserted (one on an empty reference) of 3 + 2 words.
    Mandarin: 1 inserted of 4 characters. No language: 1 substituted, 1 deleted of 4 characters and
    a word. All together 7 of 14."""
    summary, _ = spoken([
        ("a", "en", "red lamps, please", "red lamp"), ("b", "en", "it’s", "it is so"),
        ("c", "en", "", "hum"), ("d", "zh", "打开红灯", "打开了红灯。"),
        ("e", None, "明天有个 meeting", "明天有 Meetings"), ("f", "en", None, "who knows"),
        ("g", "en", "", "")])
    keys = ("system", "set", "language", "metric", "rate", "substitutions", "deletions",
            "insertions", "errors", "units", "utterances", "sentence_error")
    assert [[e[key] for key in keys] for e in summary["results"]] == [
        ["out", "lines", "en", "WER", 80, 1, 1, 2, 4, 5, 4, 75],
        ["out", "lines", "zh", "CER", 25, 0, 0, 1, 1, 4, 1, 100],
        ["out", "lines", "", "WER", 40, 1, 1, 0, 2, 5, 1, 100],
        ["out", "all", "pooled", "pooled", 50, 2, 2, 3, 7, 14, 6, pytest.approx(500 / 6)]]
    assert (summary["clips"], summary["without_text"]) == (7, 1)
    shown = capsys.readouterr().out
    assert "lines zh: CER, %" in shown and "25.00 [nan, nan]; 0 + 0 + 1\n1 clips" in shown
    assert "1 lines without a text" in shown


@pytest.mark.parametrize("speaker, resampled", [
    (lambda i: "s", "40 utterances"), (lambda i: i and f"s{i}", "40 utterances"),
    (lambda i: f"s{i % 2}", "2 speakers")])
def test_what_is_resampled_is_said(spoken, capsys, speaker, resampled):
    lines = [(f"u{i}", "en", "the lamp", "the lamp" if i % 3 else "a lamp") for i in range(40)]
    summary, _ = spoken(lines, extra=lambda i: {"speaker": speaker(i) or None})
    labels = [speaker(i) for i in range(40)] if "speakers" in resampled else None
    draws = data.bootstrap([int(i % 3 == 0) for i in range(40)], [2] * 40, labels)
    entry, = summary["results"]
    assert [entry[key] for key in ("low", "high", "resampled")] == [
        *data.interval(100 * draws), resampled]
    assert resampled in capsys.readouterr().out


def test_what_is_not_there_is_null(spoken):
    """One clip has no interval, an empty reference no rate, a manifest without a text neither."""
    summary, _ = spoken([("a", "fr", "red lamp", "red lamps"), ("b", "es", "", "you")])
    french, spanish, pooled = summary["results"]
    assert (french["rate"], french["low"], french["high"]) == (50, None, None)
    assert (spanish["rate"], spanish["insertions"], spanish["units"]) == (None, 1, 0)
    assert pooled["rate"] == 100
    summary, _ = spoken([("a", "en", None, "one"), ("b", "en", None, "two")])
    assert summary["results"] == [] and summary["without_text"] == 2


def words(checkpoints, manifests, out):
    return ["--model", checkpoints / "student", "--data", *manifests, "--out", out, "--device",
            "cpu", "--max_new_tokens", 8, "--batch", 3, "--keep_going"]


@pytest.fixture(scope="module")
def manifests(corpus, tmp_path_factory):
    """Two sets with ids in common: 12 clips, one of which can't be decoded; 5 without a text."""
    folder = tmp_path_factory.mktemp("sets")
    rows = [row | {"id": f"u{i}", "audio": str(corpus / row["audio"])}
            for i, row in enumerate(read_jsonl(corpus / "train.jsonl")[:12])]
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
    """Equal hyps.jsonl, but for where audio is relative to; no parts left."""
    ours, theirs = read_jsonl(out / "hyps.jsonl"), read_jsonl(whole / "hyps.jsonl")
    for row in ours + theirs:
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
            result, = model.transcribe(asr, data.load_batch([u], (asr.n_mels,)), 8)
            assert {key: row[key] for key in result} == result
            assert row["audio_sec"] == data.load_batch([u]).audio_sec
    english = sum(row["audio_sec"] for row in rows[:12:2])
    assert summary["results"][0]["set_audio_sec"] == pytest.approx(english)
    assert not any(os.path.isabs(row["audio"]) for row in rows)


def test_a_broken_clip_counts_as_deleted_or_stops_the_run(
        checkpoints, manifests, whole, tmp_path, capsys):
    summary, rows = read_outputs(whole)
    assert rows[5].items() >= {"failed": "unreadable", "hyp": "", "stopped": True}.items()
    assert rows[5]["deletions"] == rows[5]["units"] > 0
    assert summary["failed"] == 1
    flags = [flag for flag in words(checkpoints, manifests, tmp_path) if flag != "--keep_going"]
    with pytest.raises(data.AudioError, match="a.jsonl:6: u5"):
        run(*flags)
    run(*flags, "--keep_going", "--resume")
    assert "a.jsonl:6: u5" in capsys.readouterr().err
    assert_same(tmp_path, whole)


def run_on_two(main, args) -> None:
    """main(args) in two processes that find each other as under torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])

    def process(rank):
        os.environ.update(RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        main(args)

    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=process, args=(rank,)) for rank in "01"]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        rank.kill()
    assert [rank.exitcode for rank in ranks] == [0, 0]


@pytest.mark.parametrize("batches, processes", [(0, 1), (1, 1), (4, 2)])
def test_resume_after_any_batch(
        checkpoints, manifests, whole, tmp_path, monkeypatch, capfd, batches, processes):
    """The last batch is cut off in the middle of a line: it is decoded again as a whole."""
    transcribe, seen, parts = model.transcribe, [], []

    def watched(asr, batch, *rest):
        if len(seen) == batches and not parts:
            parts.extend(tmp_path.glob("part-0-*.jsonl"))
            n_lines = parts[0].read_bytes().count(b"\n")
            assert n_lines == 3 * batches, "on the disk before the next batch begins"
            raise KeyboardInterrupt
        seen.append([u.line for u in batch.utterances])
        return transcribe(asr, batch, *rest)

    monkeypatch.setattr(model, "transcribe", watched)
    flags = words(checkpoints, manifests, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(*flags)
    parts[0].write_bytes(parts[0].read_bytes()[:-20])
    with pytest.raises(FileExistsError, match="part.json.* with --resume"):
        run(*flags)
    flags.append("--resume")
    for other in (("--max_new_tokens", 9), ("--language", "en"), ("--temperature", 1),
                  ("--seed", 1), ("--data", manifests[0]), ("--model", checkpoints / "teacher")):
        with pytest.raises(FileExistsError, match="its model, data and flags"):
            run(*flags, *other, "--as_manifest", tmp_path / "td.jsonl")
    if processes == 1:
        run(*flags)
        again = seen.pop(batches) if batches else []
        assert again == (seen[batches - 1] if batches else [])
        assert sum(map(len, seen)) == 16, "each clip but the one that is gone, once"
    else:
        run_on_two(evaluate.main, evaluate.parse_args(list(map(str, flags))))
    assert_same(tmp_path, whole)
    assert capfd.readouterr().out.count("17 clips") == 1, "one process writes and prints"


def test_ranks_share_the_clips(checkpoints, manifests, tmp_path):
    asr, utterances = model.load(checkpoints / "student"), data.read_manifest(manifests)
    places = []
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        flags = map(str, words(checkpoints, manifests, tmp_path / str(rank)))
        evaluate.transcribe_share(asr, utterances, evaluate.parse_args(list(flags)), rank, 2)
        places += evaluate.read_parts(tmp_path / str(rank))
    assert sorted(places) == list(range(17))


def test_clips_of_similar_length_go_together(spoken, monkeypatch):
    """A clip of unknown length comes last."""
    batches, load_batch = [], data.load_batch
    monkeypatch.setattr(data, "load_batch", lambda clips, *rest, **more: (
        batches.append([u.id for u in clips]) or load_batch(clips, *rest, **more)))
    durations = (0.3, 0.1, None, 0.25, 0.15)
    spoken([(str(sec), "en", None, "x") for sec in durations], "--batch", 2,
           extra=lambda i: {"duration": durations[i]})
    assert batches == [["0.1", "0.15"], ["0.25", "0.3"], ["None"]]


def test_summary_says_how_to_do_it_again(checkpoints, manifests, whole):
    summary, _ = read_outputs(whole)
    weights = checkpoints / "student" / "model.safetensors"
    assert summary["files"].keys() == {str(weights), *map(str, manifests)}
    assert summary["files"][str(weights)] == weights.stat().st_mtime
    assert summary["max_new_tokens"] == 8 and summary["normaliser"] == data.METRIC
    assert summary["model"] == str(checkpoints / "student") and summary["device"] == "cpu"
    assert summary["versions"]["torch"] == version("torch") and summary["command"]
    assert summary["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", summary["commit"])


def test_files_are_printed(corpus, checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(model, "transcribe", lambda asr, batch, *_: [
        {"hyp": f"{Path(u.audio).stem}, {u.language}", "stopped": u.audio.endswith("dev-0.wav")}
        for u in batch.utterances])
    write_wav(tmp_path / "long.wav", sound(np.random.default_rng(0), 40.2))
    a, b, long = corpus / "dev-0.wav", corpus / "dev-1.wav", tmp_path / "long.wav"
    flags = ["--model", checkpoints / "student", "--device", "cpu", "--language", "zh", "--audio"]
    run(*flags, b, a)
    said = f"{a}: dev-0, zh\n"
    assert capsys.readouterr().out == f"{b}: dev-1, zh [cut at --max_new_tokens]\n{said}"
    with pytest.raises(data.AudioError, match="long.wav: too_long"):
        run(*flags, long)
    run(*flags, long, a, "--keep_going")
    assert capsys.readouterr().out == said


def test_teacher_data_is_what_fits(spoken, tmp_path, corpus, capsys):
    lines = [("whole", "en", "the lamp", "The lamp."), ("part", "en", "the red lamp", "bed lamp"),
             ("unknown", None, None, "who knows"), ("empty", "zh", "灯", ""),
             ("cut", "en", "on and on", "on and..."), ("from nothing", "en", "", "words")]
    manifest = tmp_path / "elsewhere" / "td.jsonl"
    segment = {"start": 0.05, "duration": 0.2, "speaker": "s", "channel": 0}
    summary, rows = spoken(lines, "--as_manifest", manifest,
                           extra=lambda i: segment if i == 1 else {})
    assert [row["hyp"] for row in rows] == [hyp for *_, hyp in lines], "nothing is mended"
    assert [summary[key] for key in ("empty", "truncated", "failed")] == [1, 1, 0]
    written = data.read_manifest(manifest)
    assert [(u.id, u.text, u.language) for u in written] == [
        ("lines/whole", "The lamp.", "en"), ("lines/part", "bed lamp", "en"),
        ("lines/unknown", "who knows", None), ("lines/from nothing", "words", "en")]
    assert read_jsonl(manifest)[1].items() >= segment.items()
    assert os.path.samefile(written[1].audio, corpus / "dev-1.wav")
    said = "td.jsonl: 4 transcripts kept; left out: {'empty': 1, 'truncated': 1}\n"
    assert said in capsys.readouterr().out


def test_sampled_transcripts_are_those_of_a_rollout_with_keyed_numbers(
        checkpoints, corpus, tmp_path):
    asr = model.load(checkpoints / "student")
    batch = data.load_batch(data.read_manifest(corpus / "dev.jsonl"), (asr.n_mels,))
    prompt, hyps = model.encode_audio(asr, batch), []
    for seed in (5, 6):
        flags = ["--as_manifest", tmp_path / "td.jsonl", "--temperature", 0.7, "--seed", seed]
        run(*words(checkpoints, [corpus / "dev.jsonl"], tmp_path / str(seed)), *flags)
        uniforms = data.keyed_uniforms(seed, 0, [u.id for u in batch.utterances], 8)
        ids, mask = rollout(asr, prompt, 8, 0.7, uniforms)
        said = {u.id: text.strip() for u, text in zip(batch.utterances, asr.decode(ids, mask))}
        _, rows = read_outputs(tmp_path / str(seed))
        assert {row["id"]: row["hyp"] for row in rows} == said
        hyps.append(said)
    assert sum(hyps[0][name] != hyps[1][name] for name in said) >= 4


def test_two_sets_with_a_name_and_an_id_in_common(spoken, tmp_path, corpus):
    """Sets are called by their paths then, and the teacher's manifest holds every id once."""
    paths = [tmp_path / "lines.jsonl", tmp_path / "b" / "lines.jsonl"]
    data.write_jsonl(paths[1], [{"id": name, "audio": str(corpus / "dev-0.wav")} for name in "12"])
    _, rows = spoken([("1", None, None, "x"), ("2", "zh", None, "x")], "--data", *paths,
                     "--as_manifest", tmp_path / "td.jsonl", "--language", "en")
    assert [(row["set"], row["id"], row["language"]) for row in rows] == [
        (str(paths[0]), "1", "en"), (str(paths[0]), "2", "zh"), (str(paths[1]), "1", "en"),
        (str(paths[1]), "2", "en")]
    ids = [u.id for u in data.read_manifest(tmp_path / "td.jsonl")]
    assert ids == [f"{path}/{name}" for path in paths for name in "12"]


@pytest.mark.parametrize("line, message", [
    (b'{"id": "u0", "hyp": "y", "text": "x"}', "id 'u0' occurs twice"),
    (b'{"id": "b", "text": "x"}', "expected a string as 'hyp'"),
    (b'{"id": "b", "hyp": "", "text": ["x"]}', "expected a string as 'text'"),
    (b"[1]", "expected a JSON object"), (b'{"id": "b", "hyp": "\xff"}', "expected a JSON object")])
def test_a_line_that_can_not_be_scored_is_named(tmp_path, line, message):
    (tmp_path / "h.jsonl").write_bytes(b'{"id": "u0", "hyp": "x", "text": "x"}\n\n' + line)
    with pytest.raises(ValueError, match=f"h.jsonl:3: {message}"):
        run("--compare", tmp_path / "h.jsonl")
    (tmp_path / "h.jsonl").write_bytes(b'{"id": "u0", "hyp": "x"}\n')
    with pytest.raises(ValueError, match="0 clips are not in both with one reference, such as None"):
        run("--compare", tmp_path / "h.jsonl")


def test_rescoring_and_comparing_count_errors_anew(whole, tmp_path):
    """Counts that a file holds are not believed, keys that nothing reads do no harm."""
    summary, rows = read_outputs(whole)
    stale = tmp_path / whole.name / "stale.jsonl"
    data.write_jsonl(stale, [row | {"text": row.get("text"), "deletions": 99, "more": 1,
                                    "speaker": None} for row in rows])
    run("--compare", stale, "--out", tmp_path)
    compared = json.loads((tmp_path / "compare.json").read_text())
    for entry in compared:
        assert [entry.pop(key) for key in ("difference", "difference_low", "difference_high")] == [
            0, 0, 0]
    assert compared == summary["results"]
    out = tmp_path / "again" / whole.name
    data.write_jsonl(out / "part-0-1.jsonl", [{}])  # of a run that was stopped
    run("--rescore", stale, "--out", out)
    again, rows_again = read_outputs(out)
    for key in ("results", "clips", "without_text", "failed", "normaliser"):
        assert again[key] == summary[key]
    assert list(again["files"]) == [str(stale)] and "model" not in again
    assert (out / rows_again[0]["audio"]).resolve() == (stale.parent / rows[0]["audio"]).resolve()
    assert (out / "part-0-1.jsonl").exists()


def test_compare_by_hand(tmp_path, capsys):
    """200 clips of 10 words: A has two errors in each of the first 100; B one in 40 of them and one
    in 10 others; C as many as A, elsewhere. Systems are called by their folders."""
    right = "put the red lamp upon a green shelf near here".split()
    errors = {"a": [2 * (i < 100) for i in range(200)],
              "b": [int(i < 40 or 150 <= i < 160) for i in range(200)],
              "c": [2 * (i % 2) for i in range(200)]}
    for name, numbers in errors.items():
        rows = [{"id": f"u{i}", "text": " ".join(right), "hyp": " ".join(["xxx"] * n + right[n:])}
                for i, n in enumerate(numbers)]
        rows = rows[::-1] if name == "b" else rows  # the order is no matter
        data.write_jsonl(tmp_path / name / "hyps.jsonl", rows)
    paths = [tmp_path / name / "hyps.jsonl" for name in errors]
    entries = run("--compare", *paths, "--out", tmp_path)
    first, e, even = entries
    assert [entry["system"] for entry in entries] == ["a", "b", "c"]
    assert [first["rate"], e["rate"], e["difference"]] == [10, 2.5, 7.5], "points below the first"
    assert [first[key] for key in ("set", "language", "metric")] == ["test", "", "WER"]
    half = 1.96 * (np.array(errors["a"]) - errors["b"]).std() / np.sqrt(200) * 10
    assert (e["difference_low"], e["difference_high"]) == pytest.approx(
        (7.5 - half, 7.5 + half), abs=0.15)
    assert "0 + 0; below the first: +7.50 [" in capsys.readouterr().out
    assert first["difference_low"] == first["difference_high"] == even["difference"] == 0
    assert json.loads((tmp_path / "compare.json").read_text()) == entries
    assert (tmp_path / "compare.png").stat().st_size > 5000


@pytest.mark.parametrize("change", [{"id": "new"}, {"text": "else"}, {"language": "de"}, None])
def test_compare_wants_the_same_clips(tmp_path, change):
    """Systems in one folder are called by their paths."""
    rows = [{"id": f"u{i}", "text": "red", "language": "en", "hyp": "bed"} for i in range(3)]
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    data.write_jsonl(a, rows)
    data.write_jsonl(b, rows[:2] + [rows[2] | change] if change else rows[:2])
    for pair in ((a, b), (b, a)):
        with pytest.raises(ValueError, match="{} and {}: . clips are not in both".format(*pair)):
            run("--compare", *pair)


def test_the_page_is_escaped_and_aligned_and_plays_the_segments(spoken, tmp_path, corpus):
    attack = "<script>alert(1)</script>"
    spoken([("u0", "de", "red lamp", f"red {attack}"), ("u1", "zh", "打开红灯", "打灯"),
            ("u2", "en", "fine", "fine"), ("u3<b>", "de", "red", "bed")],
           extra=lambda i: {"start": 0.125, "duration": 0.25} if i == 1 else {})
    page = (tmp_path / "out" / "errors.html").read_text(encoding="utf-8")
    assert "<script" not in page and "<b>" not in page and "u2" not in page
    titles = re.findall("<h3>(.*?)</h3>", page)
    assert titles == ["lines u0: 4 errors, 2 units", "lines u1: 2 errors, 4 units",
                      "lines u3&lt;b&gt;: 1 errors, 1 units"]
    sources = re.findall('(?:src|href)="(.*?)"', page)
    assert [source.split("#")[1] for source in sources] == ["t=0", "t=0.125,0.375", "t=0"]
    for source, i in zip(sources, (0, 1, 3), strict=True):
        path = unquote(source.split("#")[0])
        assert os.path.samefile(tmp_path / "out" / path, corpus / f"dev-{i}.wav")
    assert "REF: 打 开 红 灯\nHYP: 打 * * 灯\n" in page


@pytest.mark.parametrize("line, message", [
    ("--model m", "is required"), ("--data d --compare h --out o", "not allowed with"),
    ("--model m --data d", "--data needs --out"), ("--audio a", "--audio needs --model"),
    ("--model m --data d --out o --as_manifest ./d", "would write over"),
    ("--model m --compare h --out o", "--compare does not read --model"),
    ("--rescore h", "--rescore needs --out"),
    ("--model m --audio a --as_manifest t", "--audio does not read --as_manifest"),
    ("--model m --data d --out o --temperature 1", "go with --as_manifest"),
    ("--model m --data d --out o --seed 1", "go with --as_manifest")])
def test_flags_that_do_not_go_together(line, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(line.split())
    assert message in capsys.readouterr().err
