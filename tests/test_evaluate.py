"""evaluate.py: counts, intervals, comparison, what goes wrong with clips, the files it writes.

    pytest tests/test_evaluate.py
"""

import base64
import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path

import jiwer
import numpy as np
import pytest
import soundfile

import data
import evaluate
import model
from conftest import sound

ROOT = Path(__file__).resolve().parent.parent


def run(*words):
    return evaluate.main(evaluate.parse_args([str(word) for word in words]))


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def read_outputs(out):
    """summary.json, rows of hyps.jsonl."""
    return json.loads((out / "summary.json").read_text()), read_jsonl(out / "hyps.jsonl")


def scripted(monkeypatch, hyps, stopped=lambda hyp: True):
    """model.transcribe gives hyps[id] for the clips it is handed, instead of running the model.
    Clips that can't be decoded still raise."""
    def transcribe(asr, utterances, *_):
        results = {}
        for u in utterances:
            data.load_audio(u)
            if u.id in hyps:
                results[u.id] = {"hyp": hyps[u.id], "stopped": stopped(hyps[u.id]), "n_tokens": 1}
        return results

    monkeypatch.setattr(model, "transcribe", transcribe)


@pytest.fixture
def spoken(corpus, tmp_path, monkeypatch, checkpoints):
    """evaluate(lines, *flags) of [(id, language, reference, transcript), ...] -> summary, rows.
    extra(i): further keys of manifest line i. None: no such key, no such transcript."""
    def evaluate_lines(lines, *flags, out="out", extra=lambda i: {}, stopped=lambda hyp: True):
        rows, hyps = [], {}
        for i, (name, language, ref, hyp) in enumerate(lines):
            row = {"id": name, "audio": str(corpus / f"dev-{i % 6}.wav"), "language": language, "text": ref}
            rows.append(evaluate.without_none(row | extra(i)))
            if hyp is not None:
                hyps[name] = hyp
        data.write_jsonl(tmp_path / "lines.jsonl", rows)
        scripted(monkeypatch, hyps, stopped)
        run("--model", checkpoints / "student", "--data", tmp_path / "lines.jsonl",
            "--out", tmp_path / out, "--device", "cpu", *flags)
        return read_outputs(tmp_path / out)

    return evaluate_lines


# ---------------------------------------------------------------------------- counts

def test_agreement_with_jiwer_on_random_pairs():
    """10,000 pairs of words, of characters, of both: each pair's errors and the corpus rate, against
    jiwer on text that needs no normaliser."""
    rng = random.Random(0)
    words, characters = "lamp cup red blue in on".split(), list("灯桌子窗红")
    cases = [("en", words, " ", jiwer.wer), ("zh", characters, "", jiwer.cer),
             ("zh-en", words + characters, " ", jiwer.wer)]
    for language, alphabet, glue, oracle in cases:
        refs, hyps, counts = [], [], []
        for _ in range(3334):
            ref = rng.choices(alphabet, k=rng.randint(0, 9))
            hyp = [rng.choice(alphabet) if rng.random() < 0.2 else unit for unit in ref if rng.random() > 0.1]
            hyp += rng.choices(alphabet, k=rng.choice([0, 0, 0, 1, 3]))
            refs.append(glue.join(ref))
            hyps.append(glue.join(hyp))
            counts.append(data.edit_counts(refs[-1], hyps[-1], language))
            errors = round(oracle(refs[-1], hyps[-1]) * len(ref)) if ref else len(hyp)
            assert (counts[-1].errors, counts[-1].units) == (errors, len(ref))
            aligned = Counter(kind for kind, _, _ in data.align(refs[-1], hyps[-1], language))
            assert (aligned["sub"], aligned["del"], aligned["ins"]) == counts[-1][:3]
        errors = np.array([c.errors for c in counts])
        units = np.array([c.units for c in counts])
        assert evaluate.percent(errors, units) == pytest.approx(100 * oracle(refs, hyps), rel=1e-9)
        assert np.isnan(evaluate.percent(errors[:0], units[:0])), "no rate of nothing"


BY_HAND = [("a", "en", "red lamps, please", "red lamp"), ("b", "en", "it’s", "it is so"),
           ("c", "en", "", "hum"), ("d", "zh", "打开红灯", "打开了红灯。"),
           ("e", "zh-en", "明天有个 meeting", "明天有 Meetings")]


def test_rates_by_hand(spoken, capsys):
    """WER: 1 sub, 1 del, 2 ins (one on an empty reference) of 3 + 2 words; CER: 1 ins of 4;
    MER: 1 sub, 1 del of 5; all together 7 of 14."""
    summary, rows = spoken(BY_HAND)
    counted = []
    for e in summary["results"]:
        counted.append((e["metric"], e["substitutions"], e["deletions"], e["insertions"], e["units"]))
    assert counted == [("WER", 1, 1, 2, 5), ("CER", 0, 0, 1, 4), ("MER", 1, 1, 0, 5)]
    assert [e["rate"] for e in summary["results"]] == pytest.approx([80, 25, 40])
    assert summary["macro_average"] == pytest.approx((80 + 25 + 40) / 3)
    pooled = summary["pooled"]
    assert (pooled["rate"], pooled["errors"], pooled["units"]) == (50, 7, 14)
    assert summary["results"][0]["sentence_error"] == 100
    assert [row["id"] for row in rows] == list("abcde")
    assert (rows[2]["insertions"], rows[2]["units"]) == (1, 0)
    shown = capsys.readouterr().out
    for number in ("80.00", "25.00", "40.00", "48.33", "50.00", data.NORMALISER):
        assert number in shown


@pytest.mark.parametrize("speaker, resampled, blocks", [
    (lambda i: f"s{i % 2}", "speakers", 2), (lambda i: f"s{i % 3}" if i else None, "utterances", 5)])
def test_the_pooled_interval_resamples_all_sets_and_languages_together(spoken, speaker, resampled, blocks):
    summary, rows = spoken(BY_HAND, extra=lambda i: {"speaker": speaker(i)})
    errors = [row["substitutions"] + row["deletions"] + row["insertions"] for row in rows]
    labels = [speaker(i) for i in range(5)] if resampled == "speakers" else None
    low, high = data.bootstrap(errors, [row["units"] for row in rows], blocks=labels)
    pooled = summary["pooled"]
    assert (pooled["low"], pooled["high"]) == (100 * low, 100 * high)
    assert (pooled["resampled"], pooled["blocks"]) == (resampled, blocks)


def test_a_rate_of_no_units_is_null_in_json(spoken, tmp_path):
    summary, _ = spoken([("a", "en", "", "hum")])
    assert summary["results"][0]["rate"] is None and summary["results"][0]["insertions"] == 1
    assert summary["pooled"] is None and summary["macro_average"] is None
    assert "<b>nan</b>" in (tmp_path / "out" / "errors.html").read_text()


@pytest.mark.parametrize("hyp, loops", [
    ("", False), ("no " * 7, False), ("no " * 8, True), ("No, no, no, no, no, no, no, no.", True),
    ("well then " + "no " * 8, True), ("no " * 8 + "well", False), ("a b " * 3, False),
    ("a b " * 4, True), ("a b c " * 3 + "a b", False), ("now x y z " + "a b c " * 3 + "a b", False),
    ("x y z " + "a b c " * 4 + "a b", True), ("one " * 8, True), ("哈" * 7, False), ("哈" * 8, True),
    ("我们" * 4, True), ("go home 哈哈 " * 4, True),
    ("put two cups on the shelf and put two cups on the shelf", False)])
def test_looping(hyp, loops):
    assert evaluate.is_looping(hyp) is loops


def test_what_looks_wrong_is_counted_and_left_as_it_is(spoken):
    hyps = ["", ("no " * 20).strip(), "fine", "cut off in the"]
    lines = [(f"u{i}", "en", "fine", hyp) for i, hyp in enumerate(hyps)]
    summary, rows = spoken(lines, stopped=lambda hyp: not hyp.endswith("the"))
    troubles = [summary[key] for key in ("clips", "empty", "truncated", "looping", "failed")]
    assert troubles == [4, 1, 1, 1, 0]
    assert [row["hyp"] for row in rows] == hyps
    assert [row["looping"] for row in rows] == [False, True, False, False]
    assert rows[1]["insertions"] + rows[1]["substitutions"] == 20


def test_a_missing_transcript_is_an_error(spoken):
    with pytest.raises(ValueError, match=r"no transcript of 'b' \(.*lines.jsonl:2\)"):
        spoken([("a", "en", "x", "x"), ("b", "en", "x", None)])


def test_what_can_not_be_scored_is_refused_before_the_model_is_loaded(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "load", None)
    row = {"id": "x", "audio": str(corpus / "dev-0.wav"), "text": "red", "language": "en"}
    data.write_jsonl(tmp_path / "a.jsonl", [row])
    data.write_jsonl(tmp_path / "b.jsonl", [row | {"id": "y"}, row])
    data.write_jsonl(tmp_path / "c.jsonl", [evaluate.without_none(row | {"language": None})])
    for files, message in ((["a", "b"], "b.jsonl:2: id 'x'"), (["c"], "c.jsonl:1: x: no 'language'")):
        manifests = [tmp_path / f"{name}.jsonl" for name in files]
        with pytest.raises(ValueError, match=message):
            run("--model", "m", "--data", *manifests, "--out", tmp_path / "out", "--device", "cpu")


# ---------------------------------------------------------------------------- clips that can't be decoded

@pytest.fixture
def broken(corpus, tmp_path):
    """A manifest of five clips, the second of which does not exist."""
    rows = []
    for i in range(4):
        audio = str(corpus / f"dev-{i}.wav")
        rows.append({"id": f"u{i}", "audio": audio, "text": "the red lamp", "language": "en"})
    rows.insert(1, {"id": "gone", "audio": "gone.wav", "text": "two green cups", "language": "en"})
    data.write_jsonl(tmp_path / "broken.jsonl", rows)
    return tmp_path / "broken.jsonl"


def test_a_broken_clip_stops_the_run_or_counts_as_deleted(broken, checkpoints, tmp_path, capsys):
    words = ["--model", checkpoints / "student", "--data", broken, "--out", tmp_path / "out",
             "--device", "cpu", "--max_new_tokens", 8]
    with pytest.raises(data.AudioError, match="broken.jsonl:2: gone"):
        run(*words)
    assert not (tmp_path / "out" / "hyps.jsonl").exists()
    run(*words, "--keep_going", "--as_manifest", tmp_path / "td.jsonl")
    summary, rows = read_outputs(tmp_path / "out")
    shown = capsys.readouterr()
    assert [row["id"] for row in rows] == ["u0", "gone", "u1", "u2", "u3"]
    gone = rows.pop(1)
    assert (gone["failed"], gone["hyp"]) == ("unreadable", "")
    assert (gone["deletions"], gone["insertions"], gone["units"]) == (3, 0, 3)
    assert not any("failed" in row for row in rows)
    assert summary["failed"] == summary["results"][0]["failed"] == 1
    assert summary["decoding"]["keep_going"]
    assert "counted as all deleted" in shown.out and "broken.jsonl:2: gone" in shown.err
    assert "gone" not in {u.id for u in data.read_manifest(tmp_path / "td.jsonl")}
    assert "1 failed to decode" in shown.out.split("td.jsonl")[1]
    assert "no audio: unreadable" in (tmp_path / "out" / "errors.html").read_text()


def test_two_ranks_equal_one(broken, corpus, checkpoints, tmp_path):
    words = ["--model", checkpoints / "student", "--data", broken, corpus / "train.jsonl",
             "--device", "cpu", "--max_new_tokens", "8", "--batch", "3", "--keep_going", "--out"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*launch, ROOT / "evaluate.py", *words, tmp_path / "two"],
                          env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    run(*words, tmp_path / "one")
    for name in ("hyps.jsonl", "errors.html"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text(), name
    one, _ = read_outputs(tmp_path / "one")
    two, _ = read_outputs(tmp_path / "two")
    for entry in one["results"] + two["results"]:
        assert entry.pop("set_seconds") > 0
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    assert one.pop("command") != two.pop("command")
    assert one == two and len(one["results"]) == 3
    # the pooled corpus holds both sets
    assert one["pooled"]["units"] == sum(entry["units"] for entry in one["results"])


# ---------------------------------------------------------------------------- intervals

def test_speakers_are_resampled_whole():
    """Against a loop that draws speakers one at a time and sums their utterances."""
    rng = np.random.default_rng(3)
    numbers = rng.integers(0, 25, 300)
    units = rng.integers(3, 20, 300)
    errors = rng.binomial(units, 0.05 + 0.012 * numbers)
    names = [f"s{i}" for i in numbers]
    low, high = data.bootstrap(errors, units, blocks=names)
    rates = []
    for _ in range(10_000):
        wrong = total = 0
        for i in rng.integers(0, 25, 25):
            wrong += errors[numbers == i].sum()
            total += units[numbers == i].sum()
        rates.append(wrong / total)
    slow = np.percentile(rates, [2.5, 97.5])
    assert (low, high) == pytest.approx(tuple(slow), abs=0.04 * (slow[1] - slow[0]))
    by_utterance = data.bootstrap(errors, units)
    # voices differ: utterances are no independent draws
    assert high - low > 1.3 * (by_utterance[1] - by_utterance[0])
    assert data.bootstrap(errors, units, blocks=range(300)) == by_utterance


@pytest.mark.parametrize("speaker, resampled, blocks, warned", [
    (lambda i: None, "utterances", 40, False), (lambda i: f"s{i % 4}", "speakers", 4, True),
    (lambda i: f"s{i % 25}", "speakers", 25, False), (lambda i: "s", "utterances", 40, False),
    (lambda i: f"s{i}" if i else None, "utterances", 40, False)])
def test_what_is_resampled_is_said(spoken, capsys, speaker, resampled, blocks, warned):
    lines = [(f"u{i}", "en", "the lamp", "the lamp" if i % 3 else "a lamp") for i in range(40)]
    summary, rows = spoken(lines, extra=lambda i: {"speaker": speaker(i)})
    labels = [speaker(i) for i in range(40)] if resampled == "speakers" else None
    errors = [row["substitutions"] for row in rows]
    low, high = data.bootstrap(errors, [row["units"] for row in rows], blocks=labels)
    entry, = summary["results"]
    assert (entry["low"], entry["high"]) == (100 * low, 100 * high)
    assert (entry["resampled"], entry["blocks"]) == (resampled, blocks)
    shown = capsys.readouterr().out
    assert f"{blocks} {resampled}" in shown and ("unreliable" in shown) is warned


# ---------------------------------------------------------------------------- without a model

LINES = [
    ("u0", "en", "the red lamp is on", "the red lamp is on"), ("u1", "zh", "打开红色台灯", "打开台灯"),
    ("u2", "en", "the red lamp is on", "the bed lamp is on"), ("u3", "zh", "打开红色台灯", "打开红色台灯"),
    ("u4", "en", "the red lamp is on", ""), ("u5", "zh", "打开红色台灯", "红色台灯灯"),
    ("u6", "en", "the red lamp is on", "a red lamp on"), ("u7", "zh", "打开红色台灯", "打开红色台灯")]


def test_rescoring_gives_the_same_numbers(spoken, tmp_path, monkeypatch):
    first, rows = spoken(LINES, extra=lambda i: {"speaker": f"s{i // 2}", "duration": 0.3 if i else None})
    monkeypatch.setattr(model, "load", None)
    run("--rescore", tmp_path / "out" / "hyps.jsonl", "--out", tmp_path / "again")
    again, rows_again = read_outputs(tmp_path / "again")
    for entry in first["results"] + again["results"]:
        del entry["set_seconds"], entry["set_audio_sec"]
    for key in ("results", "macro_average", "pooled", "clips", "empty"):
        assert again[key] == first[key]
    assert rows_again == rows  # audio paths too: both folders lie side by side
    data.write_jsonl(tmp_path / "stale.jsonl", [row | {"deletions": 99, "looping": True} for row in rows])
    run("--rescore", tmp_path / "stale.jsonl", "--out", tmp_path / "third")
    assert [row["deletions"] for row in read_outputs(tmp_path / "third")[1]] == [row["deletions"] for row in rows]


@pytest.mark.parametrize("line, message", [
    ('{"id": "u0", "hyp": "x"}', "id 'u0' stands twice"), ('{"id": "n"}', "no 'hyp'"),
    ('{"id": "n", "hyp": "", "text": "x"}', "no 'language'"), ("[1]", "expected a JSON object"),
    ('{"id": "n"', "expected a JSON object")])
def test_hyps_that_can_not_be_scored(tmp_path, line, message):
    (tmp_path / "h.jsonl").write_text('{"id": "u0", "hyp": "x"}\n' + line)
    with pytest.raises(ValueError, match=f"h.jsonl:2: {message}"):
        run("--rescore", tmp_path / "h.jsonl", "--out", tmp_path / "out")


def test_compare(tmp_path, monkeypatch, capsys):
    """200 clips of 10 words: A has two errors in each of the first 100, B one in 40 of them and one
    in 10 others."""
    monkeypatch.setattr(model, "load", None)
    right = "put the red lamp upon a green shelf near here".split()
    errors_a = [2 * (i < 100) for i in range(200)]
    errors_b = [int(i < 40 or 150 <= i < 160) for i in range(200)]
    errors_c = [2 * (i % 2) for i in range(200)]
    for name, errors in (("a", errors_a), ("b", errors_b), ("c", errors_c)):
        rows = []
        for i, n in enumerate(errors):
            hyp = " ".join(["xxx"] * n + right[n:])
            rows.append({"id": f"u{i}", "text": " ".join(right), "language": "en", "hyp": hyp})
        if name == "b":
            rows.reverse()  # the order of B is no matter
        data.write_jsonl(tmp_path / f"{name}.jsonl", rows)
    a, b, c = (tmp_path / f"{name}.jsonl" for name in "abc")

    first, e, even = run("--compare", a, b, c)
    assert [row["system"] for row in (first, e, even)] == [str(a), str(b), str(c)]
    assert (first["rate"], e["rate"], e["difference"]) == pytest.approx((10, 2.5, 7.5))
    assert (e["units"], e["utterances"], e["p_improvement"]) == (2000, 200, 1.0)
    half = 1.96 * (np.array(errors_a) - errors_b).std() / np.sqrt(200) * 10
    gain = pytest.approx((7.5 - half, 7.5 + half), abs=0.1)
    assert (e["difference_low"], e["difference_high"]) == gain
    shown = capsys.readouterr().out
    assert "+7.50" in shown and "200 utterances" in shown
    # A draw in which both are equal speaks for neither.
    assert first["difference_low"] == first["difference_high"] == 0 and first["p_improvement"] == 0.5
    assert even["difference"] == 0 and even["difference_low"] < 0 < even["difference_high"]
    assert 0.4 < even["p_improvement"] < 0.6
    _, back = run("--compare", b, a)
    assert back["difference"] == pytest.approx(-7.5) and back["p_improvement"] == 0.0


def test_systems_are_called_by_their_folders_where_these_differ(tmp_path):
    rows = [{"id": "u0", "text": "red", "language": "en", "hyp": "bed"}]
    for name in ("base", "opd"):
        data.write_jsonl(tmp_path / name / "hyps.jsonl", rows)
    paths = [tmp_path / name / "hyps.jsonl" for name in ("base", "opd")]
    assert [e["system"] for e in run("--compare", *paths)] == ["base", "opd"]


@pytest.mark.parametrize("change", [
    lambda rows: rows[:-1], lambda rows: rows + [rows[0] | {"id": "new"}],
    lambda rows: [rows[0] | {"text": "else"}] + rows[1:], lambda rows: [rows[0] | {"language": "de"}] + rows[1:]])
def test_compare_wants_the_same_clips(tmp_path, change):
    rows = [{"id": f"u{i}", "text": "red", "language": "en", "hyp": "bed"} for i in range(3)]
    data.write_jsonl(tmp_path / "a.jsonl", rows)
    data.write_jsonl(tmp_path / "b.jsonl", change(rows))
    with pytest.raises(ValueError, match="1 clips are not in both with one reference"):
        run("--compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl")


def test_compare_pools_resamples_speakers_and_writes_what_it_prints(tmp_path, capsys):
    a, b = [], []
    for i in range(70):
        row = {"id": f"u{i}", "language": ("en", "zh")[i % 2], "text": ("red lamp", "红灯")[i % 2],
               "speaker": f"s{i % 7}"}
        a.append(row | {"hyp": ""})
        b.append(row | {"hyp": row["text"]})
    data.write_jsonl(tmp_path / "a.jsonl", a)
    data.write_jsonl(tmp_path / "b.jsonl", b)
    entries = run("--compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--out", tmp_path / "new" / "out")
    assert [(e["set"], e["language"]) for e in entries[::2]] == [("a", "en"), ("a", "zh"), ("all", "pooled")]
    assert [e["metric"] for e in entries[::2]] == ["WER", "CER", "pooled"]
    assert {(e["resampled"], e["blocks"]) for e in entries} == {("speakers", 7)}
    assert [e["difference"] for e in entries] == [0, 100] * 3
    assert [e["utterances"] for e in entries[::2]] == [35, 35, 70]
    assert "7 speakers: too few" in capsys.readouterr().out
    assert json.loads((tmp_path / "new" / "out" / "compare.json").read_text()) == entries
    assert (tmp_path / "new" / "out" / "compare.png").stat().st_size > 5000


# ---------------------------------------------------------------------------- summary.json, errors.html

def test_summary_says_how_to_do_it_again(corpus, checkpoints, tmp_path):
    student, manifest = checkpoints / "student", corpus / "dev.jsonl"
    run("--model", student, "--data", manifest, "--out", tmp_path, "--device", "cpu",
        "--max_new_tokens", 3, "--batch", 2)
    summary, _ = read_outputs(tmp_path)

    def digest(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()

    decisive = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                "tokenizer_config.json", "vocab.json", "merges.txt")
    assert summary["weights"] == {name: digest(student / name) for name in decisive}
    assert summary["data"] == {str(manifest): digest(manifest)} and summary["model"] == str(student)
    assert summary["normaliser"] == data.NORMALISER
    assert (summary["device"], summary["processes"]) == ("cpu", 1)
    assert summary["decoding"] == {"search": "greedy", "max_new_tokens": 3, "batch": 2, "keep_going": False}
    assert set(summary["versions"]) >= {"python", "torch", "transformers", "jiwer"}
    assert summary["versions"]["jiwer"] == version("jiwer") and summary["command"]
    assert summary["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", summary["commit"])


class Page(HTMLParser):
    """Tags with their attributes, and the text outside <style>."""
    def __init__(self, source):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "rect", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += text if "style" not in self.open else ""


def test_errors_page(spoken, tmp_path, corpus):
    """Self-contained, well-formed, escaped; the worst clip first; each player holds its clip's samples."""
    attack = "<script>alert(1)</script>"
    lines = [("u0", "en", "red lamp", f"red {attack} \"'&"), ("u1", "zh", "打开红灯", "打开灯"),
             ("u2", "en", "fine", "fine"), ("u3<b>", "en", "red lamp", "bed")]
    segment = {"start": 0.1, "duration": 0.2}
    spoken(lines, extra=lambda i: {"speaker": f"{attack}$clips {i}"} | (segment if i == 1 else {}))
    source = (tmp_path / "out" / "errors.html").read_text(encoding="utf-8")
    page = Page(source)
    assert not page.open and "<script" not in source and "script" in page.text and "bed" in page.text
    assert "$clips 0" in page.text and set(re.findall(r"\$\w+", source)) == {"$clips"}  # as a speaker's name
    expected = "html head meta title style body h1 h2 h3 p table tr th td b div span audio svg line rect text"
    assert {tag for tag, _ in page.tags} <= set(expected.split())
    links = []
    for _, attributes in page.tags:
        for key, value in attributes.items():
            if key in ("src", "href", "srcset", "style", "action") or key.startswith("on"):
                links.append(value)
    assert len(links) == 3 and all(link.startswith("data:audio/wav;base64,") for link in links)
    assert "url(" not in source and "@import" not in source
    ids = re.findall(r'class="head"><b>(.*?)</b>', source)
    assert ids == ["u0", "u3&lt;b&gt;", "u1"], "worst first, by language; none without errors"
    wav = base64.b64decode(links[2].split(",")[1])
    samples, rate = soundfile.read(io.BytesIO(wav), dtype="int16")
    whole, _ = soundfile.read(corpus / "dev-1.wav", dtype="int16")
    assert rate == 16_000 and np.abs(samples.astype(int) - whole[1600:4800]).max() <= 1
    assert 'class="pair del"><span class="r">红</span><span class="h"></span>' in source
    assert "lamp → " in page.text and "red → bed" in page.text
    assert source.count("<svg") == 2 and "CER <b>25.00</b>" in source


def test_length_chart():
    rows = []
    for i, (seconds, wrong) in enumerate([(0.5, 1), (0.9, 3), (2.5, 0), (11.0, 10)]):
        rows.append(evaluate.Scored("test", "en", None, seconds, data.Counts(wrong, 0, 0, 10), ()))
    chart = evaluate.length_chart(rows)
    bar = r'height="([\d.]+)" rx.*?>([\d.]+)</text>.*?>([\d.]+–[\d.]+)</text>.*?>(\d+)</text>'
    assert re.findall(bar, chart) == [
        ("24.0", "20.0", "0–1", "2"), ("0.0", "0.0", "2–3", "1"), ("120.0", "100.0", "11–12", "1")]


# ---------------------------------------------------------------------------- teacher data, files

GOOD = {"hyp": "the lamp", "stopped": True, "looping": False, "substitutions": 1, "deletions": 0,
        "insertions": 0, "units": 5}


@pytest.mark.parametrize("change, max_wer, reason", [
    ({}, None, None), ({}, 20, None), ({}, 19, "above --max_wer 19"), ({"looping": True}, None, "looping"),
    ({"stopped": False, "looping": True}, None, "cut at --max_new_tokens"),
    ({"hyp": "", "stopped": False}, None, "empty"), ({"hyp": "", "failed": "silent"}, 0, "failed to decode"),
    ({"substitutions": 0, "insertions": 1, "units": 0}, 20, "above --max_wer 20")])
def test_why_a_transcript_is_unfit_to_teach(change, max_wer, reason):
    assert evaluate.unfit_to_teach(GOOD | change, max_wer) == reason


def test_teacher_data_filtered_by_its_references(spoken, tmp_path, capsys):
    lines = [("exact", "en", "the red lamp is on", "The red lamp is on."),
             ("near", "en", "the red lamp is on", "the red lamp was on"),
             ("far", "en", "the red lamp is on", "a bed lamp on"), ("unknown", "en", None, "who knows"),
             ("loop", "en", None, "no " * 9 + "no"), ("empty", "zh", "灯", ""),
             ("from nothing", "en", "", "words")]
    spoken(lines, "--as_manifest", tmp_path / "td.jsonl", "--max_wer", "20")
    kept = [(u.id, u.text) for u in data.read_manifest(tmp_path / "td.jsonl")]
    assert kept == [("exact", "The red lamp is on."), ("near", "the red lamp was on"), ("unknown", "who knows")]
    shown = capsys.readouterr().out.split("td.jsonl")[1]
    for part in ("3 transcripts", "2 above --max_wer 20", "1 looping", "1 empty", "2 had no reference"):
        assert part in shown
    spoken(lines, "--as_manifest", tmp_path / "td.jsonl")
    assert len(data.read_manifest(tmp_path / "td.jsonl")) == 5 and "max_wer" not in capsys.readouterr().out


def test_files_are_printed(corpus, checkpoints, tmp_path, capsys, monkeypatch):
    a, b = tmp_path / "a.wav", tmp_path / "b.flac"
    shutil.copy(corpus / "dev-0.wav", a)
    soundfile.write(b, sound(np.random.default_rng(0), 0.6, 44_100), 44_100)
    utterances = [data.Utterance(str(path), str(path)) for path in (a, b)]
    asr = model.load(checkpoints / "student")
    expected = model.transcribe(asr, utterances, max_new_tokens=8)
    words = ["--model", checkpoints / "student", "--device", "cpu", "--max_new_tokens", 8, "--audio"]
    run(*words, b, a)
    shown = capsys.readouterr().out.split("\n")
    for line, path in zip(shown, (b, a)):
        assert line.startswith(f"{path}: {expected[str(path)]['hyp']}")
        assert ("[cut" in line) is not expected[str(path)]["stopped"]
    run(*words, a, "--language", "en")
    assert capsys.readouterr().out.startswith(expected[str(a)]["hyp"])
    soundfile.write(tmp_path / "long.wav", sound(np.random.default_rng(0), 41.0), 16_000)
    monkeypatch.setattr(model, "load", None)
    for name, message in (("long.wav", "too_long: 41.00 s is outside 0.1 to 40.0 s"), ("none.wav", "unreadable")):
        with pytest.raises(SystemExit, match=f"{name}.*{message}"):
            run(*words, tmp_path / name)


@pytest.mark.parametrize("words", [
    "--model m", "--model m --data d", "--data d --out o", "--model m --rescore h --out o", "--rescore h",
    "--compare a", "--compare a a", "--compare a b --model m", "--model m --data d --audio a --out o",
    "--model m --data d --out o --max_wer 10", "--out o"])
def test_flags_that_do_not_go_together(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate.parse_args(words.split())
    assert stopped.value.code == 2 and "error:" in capsys.readouterr().err
