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


def jsonl(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def scripted(monkeypatch, hyps, stopped=lambda hyp: True):
    """model.transcribe gives hyps[id] for the clips it is handed, instead of running the model; clips that can't be decoded still raise."""
    def transcribe(asr, utterances, *_):
        for u in utterances:
            data.load_audio(u)
        return {u.id: {"hyp": hyps[u.id], "stopped": stopped(hyps[u.id]), "n_tokens": 1} for u in utterances if u.id in hyps}
    monkeypatch.setattr(model, "transcribe", transcribe)


@pytest.fixture
def spoken(corpus, tmp_path, monkeypatch, checkpoints):
    """evaluate(lines, *flags) of [(id, language, reference, transcript), ...] -> summary, rows; extra: keys of the manifest lines."""
    def evaluate_lines(lines, *flags, out="out", extra=lambda i: {}, stopped=lambda hyp: True):
        rows = [{"id": i, "audio": str(corpus / f"dev-{n % 6}.wav"), "language": language} | ({} if ref is None else {"text": ref}) | extra(n)
                for n, (i, language, ref, _) in enumerate(lines)]
        data.write_jsonl(tmp_path / "lines.jsonl", [{k: v for k, v in row.items() if v is not None} for row in rows])
        scripted(monkeypatch, {i: hyp for i, _, _, hyp in lines if hyp is not None}, stopped)
        run("--model", checkpoints / "student", "--data", tmp_path / "lines.jsonl", "--out", tmp_path / out, "--device", "cpu", *flags)
        return json.loads((tmp_path / out / "summary.json").read_text()), jsonl(tmp_path / out / "hyps.jsonl")
    return evaluate_lines


# ---------------------------------------------------------------------------- counts

def test_agreement_with_jiwer_on_random_pairs():
    """10,000 pairs of words, of characters, of both: each pair's errors and the corpus rate, against jiwer on text that needs no normaliser."""
    rng, words, characters = random.Random(0), "lamp cup red blue in on".split(), list("灯桌子窗红")
    for language, alphabet, glue in (("en", words, " "), ("zh", characters, ""), ("zh-en", words + characters, " ")):
        refs, hyps, counts = [], [], []
        for _ in range(3334):
            ref = rng.choices(alphabet, k=rng.randint(0, 9))
            hyp = [rng.choice(alphabet) if rng.random() < 0.2 else unit for unit in ref if rng.random() > 0.1]
            hyp += rng.choices(alphabet, k=rng.choice([0, 0, 0, 1, 3]))
            refs.append(glue.join(ref))
            hyps.append(glue.join(hyp))
            counts.append(data.edit_counts(refs[-1], hyps[-1], language))
            rate = (jiwer.cer if language == "zh" else jiwer.wer)(refs[-1], hyps[-1])
            assert counts[-1].errors == (round(rate * len(ref)) if ref else len(hyp)) and counts[-1].units == len(ref)
            aligned = Counter(kind for kind, _, _ in data.align(refs[-1], hyps[-1], language))
            assert (aligned["sub"], aligned["del"], aligned["ins"]) == counts[-1][:3]
        assert data.error_rate(counts) == pytest.approx(100 * (jiwer.cer if language == "zh" else jiwer.wer)(refs, hyps), rel=1e-9)


def test_rates_by_hand(spoken, capsys):
    """WER: 1 sub, 1 del, 2 ins (one on an empty reference) of 3 + 2 words; CER: 1 ins of 4; MER: 1 sub, 1 del of 6."""
    summary, rows = spoken([
        ("a", "en", "red lamps, please", "red lamp"), ("b", "en", "it’s", "it is so"), ("c", "en", "", "hum"),
        ("d", "zh", "打开红灯", "打开了红灯。"), ("e", "zh-en", "明天有个 meeting", "明天有 Meetings")])
    wer, cer, mer = summary["results"]
    assert [(e["metric"], e["substitutions"], e["deletions"], e["insertions"], e["units"]) for e in (wer, cer, mer)] == [
        ("WER", 1, 1, 2, 5), ("CER", 0, 0, 1, 4), ("MER", 1, 1, 0, 5)]
    assert [e["rate"] for e in (wer, cer, mer)] == pytest.approx([80, 25, 40])
    assert summary["macro_average"] == pytest.approx((80 + 25 + 40) / 3) and wer["sentence_error"] == 100
    assert [row["id"] for row in rows] == list("abcde") and rows[2]["insertions"] == 1 and rows[2]["units"] == 0
    shown = capsys.readouterr().out
    assert re.search(r"lines en +3 +5 +1 +1 +2 +WER +80\.00 \[.*\] +100\.0 % +\d+\.\d{4}", shown)
    assert "macro average 48.33 %" in shown and "opd-asr-1" in shown and "3 utterances" in shown


@pytest.mark.parametrize("hyp, loops", [
    ("", False), ("no " * 7, False), ("no " * 8, True), ("No, no, no, no, no, no, no, no.", True), ("well then " + "no " * 8, True), ("no " * 8 + "well", False),
    ("a b " * 3, False), ("a b " * 4, True), ("a b c " * 3 + "a b", False), ("now x y z " + "a b c " * 3 + "a b", False), ("x y z " + "a b c " * 4 + "a b", True), ("one " * 8, True),
    ("哈" * 7, False), ("哈" * 8, True), ("我们" * 4, True), ("go home 哈哈 " * 4, True),
    ("put two cups on the shelf and put two cups on the shelf", False)])
def test_looping(hyp, loops):
    assert evaluate.looping(hyp) is loops


def test_what_looks_wrong_is_counted_and_left_as_it_is(spoken, capsys):
    hyps = ["", "no " * 20, "fine", "cut off in the"]
    summary, rows = spoken([(f"u{i}", "en", "fine", hyp.strip()) for i, hyp in enumerate(hyps)], stopped=lambda hyp: not hyp.endswith("the"))
    assert [summary[key] for key in ("clips", "empty", "truncated", "looping", "failed")] == [4, 1, 1, 1, 0]
    assert [row["hyp"] for row in rows] == [hyp.strip() for hyp in hyps] and [row["looping"] for row in rows] == [False, True, False, False]
    assert rows[1]["insertions"] + rows[1]["substitutions"] == 20
    assert "4 clips: 1 empty, 1 truncated, 1 looping, 0 failed to decode\n" in capsys.readouterr().out


def test_a_missing_transcript_is_an_error(spoken):
    with pytest.raises(ValueError, match=r"1 of 2 clips have no transcript, such as 'b'"):
        spoken([("a", "en", "x", "x"), ("b", "en", "x", None)])


# ---------------------------------------------------------------------------- clips that can't be decoded

def broken(corpus, tmp_path):
    rows = [{"id": f"u{i}", "audio": str(corpus / f"dev-{i}.wav"), "text": "the red lamp", "language": "en"} for i in range(4)]
    rows.insert(1, {"id": "gone", "audio": "gone.wav", "text": "two green cups", "language": "en"})
    data.write_jsonl(tmp_path / "broken.jsonl", rows)
    return tmp_path / "broken.jsonl"


def test_a_broken_clip_stops_the_run_or_counts_as_deleted(corpus, checkpoints, tmp_path, capsys):
    words = ["--model", checkpoints / "student", "--data", broken(corpus, tmp_path), "--out", tmp_path / "out", "--device", "cpu", "--max_new_tokens", 8]
    with pytest.raises(data.AudioError, match="broken.jsonl:2: gone"):
        run(*words)
    assert not (tmp_path / "out").exists()
    run(*words, "--keep_going", "--as_manifest", tmp_path / "td.jsonl")
    rows, summary, shown = jsonl(tmp_path / "out" / "hyps.jsonl"), json.loads((tmp_path / "out" / "summary.json").read_text()), capsys.readouterr()
    assert [row["id"] for row in rows] == ["u0", "gone", "u1", "u2", "u3"]
    gone = rows[1]
    assert (gone["failed"], gone["hyp"], gone["deletions"], gone["insertions"], gone["units"]) == ("unreadable", "", 3, 0, 3)
    assert all("failed" not in row for row in rows if row is not gone)
    assert summary["failed"] == summary["results"][0]["failed"] == 1 and summary["decoding"]["keep_going"]
    assert "1 failed to decode and counted as all deleted" in shown.out and "broken.jsonl:2: gone" in shown.err
    assert "gone" not in {u.id for u in data.read_manifest(tmp_path / "td.jsonl")} and "1 failed to decode" in shown.out.split("td.jsonl")[1]
    assert "no audio: unreadable" in (tmp_path / "out" / "errors.html").read_text()


def test_two_ranks_equal_one(corpus, checkpoints, tmp_path):
    words = lambda out: ["--model", checkpoints / "student", "--data", broken(corpus, tmp_path), corpus / "train.jsonl", "--out", tmp_path / out,
                         "--device", "cpu", "--max_new_tokens", "8", "--batch", "3", "--keep_going"]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / "evaluate.py", *words("two")],
                          env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    run(*words("one"))
    for name in ("hyps.jsonl", "errors.html"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text(), name
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
    for summary in (one, two):
        for entry in summary["results"]:
            assert entry.pop("set_seconds") > 0
    assert (one.pop("processes"), two.pop("processes")) == (1, 2) and one.pop("command") != two.pop("command")
    assert one == two and len(one["results"]) == 3


# ---------------------------------------------------------------------------- intervals

def test_speakers_are_resampled_whole():
    """Against a loop that draws speakers one at a time and sums their utterances."""
    rng = np.random.default_rng(3)
    names = [f"s{i}" for i in rng.integers(0, 25, 300)]
    units = rng.integers(3, 20, 300)
    errors = rng.binomial(units, np.array([0.05 + 0.012 * int(name[1:]) for name in names]))
    low, high = data.bootstrap(errors, units, blocks=names)
    people, rates = sorted(set(names)), []
    mine = {p: (sum(e for e, n in zip(errors, names) if n == p), sum(u for u, n in zip(units, names) if n == p)) for p in people}
    for _ in range(10_000):
        drawn = [mine[people[i]] for i in rng.integers(0, len(people), len(people))]
        rates.append(sum(e for e, _ in drawn) / sum(u for _, u in drawn))
    slow = np.percentile(rates, [2.5, 97.5])
    assert (low, high) == pytest.approx(tuple(slow), abs=0.04 * (slow[1] - slow[0]))
    by_utterance = data.bootstrap(errors, units)
    assert high - low > 1.3 * (by_utterance[1] - by_utterance[0])  # voices differ: utterances are no independent draws
    assert data.bootstrap(errors, units, blocks=range(300)) == by_utterance


@pytest.mark.parametrize("speaker, expected, warned", [
    (lambda i: {}, ("utterances", 40), False), (lambda i: {"speaker": f"s{i % 4}"}, ("speakers", 4), True),
    (lambda i: {"speaker": f"s{i % 25}"}, ("speakers", 25), False), (lambda i: {"speaker": "s"}, ("utterances", 40), False),
    (lambda i: {"speaker": f"s{i}"} if i else {}, ("utterances", 40), False)])
def test_what_is_resampled_is_said(spoken, capsys, speaker, expected, warned):
    summary, rows = spoken([(f"u{i}", "en", "the lamp", ("the lamp", "a lamp")[i % 3 == 0]) for i in range(40)], extra=speaker)
    (entry,), blocks = summary["results"], [speaker(i).get("speaker") for i in range(40)] if expected[0] == "speakers" else None
    low, high = data.bootstrap([row["substitutions"] for row in rows], [row["units"] for row in rows], blocks=blocks)
    assert (entry["low"], entry["high"]) == (100 * low, 100 * high)
    shown = capsys.readouterr().out
    assert (entry["resampled"], entry["blocks"]) == expected and f"{expected[1]} {expected[0]}" in shown and ("unreliable" in shown) is warned


# ---------------------------------------------------------------------------- without a model

LINES = [(f"u{i}", ("en", "zh")[i % 2], ("the red lamp is on", "打开红色台灯")[i % 2], hyp) for i, hyp in enumerate(
    ["the red lamp is on", "打开台灯", "the bed lamp is on", "打开红色台灯", "", "红色台灯灯", "a red lamp on", "打开红色台灯"])]


def test_rescoring_gives_the_same_numbers(spoken, tmp_path, monkeypatch, capsys):
    first, rows = spoken(LINES, extra=lambda i: {"speaker": f"s{i // 2}", "duration": 0.3 if i else None})
    table = capsys.readouterr().out
    monkeypatch.setattr(model, "load", None)
    run("--rescore", tmp_path / "out" / "hyps.jsonl", "--out", tmp_path / "again")
    again = json.loads((tmp_path / "again" / "summary.json").read_text())
    untimed = lambda entries: [{k: v for k, v in e.items() if k not in ("set_seconds", "set_audio_sec")} for e in entries]
    assert untimed(again["results"]) == untimed(first["results"]) and again["macro_average"] == first["macro_average"]
    assert jsonl(tmp_path / "again" / "hyps.jsonl") == rows  # audio paths too: both folders lie side by side
    strip = lambda text: [line.rsplit("%", 1)[0] for line in text.splitlines() if line.startswith("lines ")]
    assert strip(capsys.readouterr().out) == strip(table) != []
    stale = [row | {"deletions": 99, "looping": True} for row in rows]
    data.write_jsonl(tmp_path / "stale.jsonl", stale)
    run("--rescore", tmp_path / "stale.jsonl", "--out", tmp_path / "third")
    assert [row["deletions"] for row in jsonl(tmp_path / "third" / "hyps.jsonl")] == [row["deletions"] for row in rows]


@pytest.mark.parametrize("line, message", [({"id": "u0", "hyp": "x"}, "id 'u0' stands twice"), ({"id": "n"}, "no 'hyp'"),
                                           ({"id": "n", "hyp": "", "text": "x"}, "no 'language'")])
def test_hyps_that_can_not_be_scored(tmp_path, line, message):
    data.write_jsonl(tmp_path / "h.jsonl", [{"id": "u0", "hyp": "x"}, line])
    with pytest.raises(ValueError, match=rf"h.jsonl:2: {message}"):
        run("--rescore", tmp_path / "h.jsonl", "--out", tmp_path / "out")


def test_compare(tmp_path, monkeypatch, capsys):
    """200 clips of 10 words: A has two errors in each of the first 100, B one in 40 of them and one in 10 others."""
    monkeypatch.setattr(model, "load", None)
    right = "put the red lamp upon a green shelf near here".split()
    wrong = lambda n: " ".join(["xxx"] * n + right[n:])
    rows = lambda errors: [{"id": f"u{i}", "text": " ".join(right), "language": "en", "hyp": wrong(errors(i))} for i in range(200)]
    data.write_jsonl(tmp_path / "a.jsonl", rows(lambda i: 2 * (i < 100)))
    data.write_jsonl(tmp_path / "b.jsonl", rows(lambda i: int(i < 40 or 150 <= i < 160))[::-1])  # in another order
    (e,) = run("--compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert (e["a"], e["b"], e["difference"], e["units"], e["p_improvement"]) == (pytest.approx(10), pytest.approx(2.5), pytest.approx(7.5), 2000, 1.0)
    differences = np.array([2 * (i < 100) - (i < 40 or 150 <= i < 160) for i in range(200)])
    half = 1.96 * differences.std() / np.sqrt(200) * 10
    assert (e["low"], e["high"]) == (pytest.approx(7.5 - half, abs=0.1), pytest.approx(7.5 + half, abs=0.1))
    assert re.search(r"10\.00 +2\.50 +\+7\.50 \[\+6\.\d\d, \+8\.\d\d\] +1\.0000 +over 200 utterances", capsys.readouterr().out)
    (back,) = run("--compare", tmp_path / "b.jsonl", tmp_path / "a.jsonl")
    assert back["difference"] == pytest.approx(-7.5) and back["p_improvement"] == 0.0
    (same,) = run("--compare", tmp_path / "a.jsonl", tmp_path / "a.jsonl")
    assert same["low"] == same["high"] == 0 and same["p_improvement"] == 0.5  # a draw in which both are equal speaks for neither
    data.write_jsonl(tmp_path / "c.jsonl", rows(lambda i: 2 * (i % 2)))
    (even,) = run("--compare", tmp_path / "a.jsonl", tmp_path / "c.jsonl")
    assert even["difference"] == 0 and 0.4 < even["p_improvement"] < 0.6 and even["low"] < 0 < even["high"]


@pytest.mark.parametrize("change", [lambda rows: rows[:-1], lambda rows: rows + [rows[0] | {"id": "new"}], lambda rows: [rows[0] | {"text": "else"}] + rows[1:],
                                    lambda rows: [rows[0] | {"language": "de"}] + rows[1:]])
def test_compare_wants_the_same_clips(tmp_path, change):
    rows = [{"id": f"u{i}", "text": "red", "language": "en", "hyp": "bed"} for i in range(3)]
    data.write_jsonl(tmp_path / "a.jsonl", rows)
    data.write_jsonl(tmp_path / "b.jsonl", change(rows))
    with pytest.raises(ValueError, match="1 clips are not in both with one reference"):
        run("--compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl")


def test_compare_pools_and_resamples_speakers(tmp_path, capsys):
    rows = [{"id": f"u{i}", "text": ("red lamp", "红灯")[i % 2], "language": ("en", "zh")[i % 2], "speaker": f"s{i % 7}"} for i in range(70)]
    for name, hyp in (("a", ""), ("b", None)):
        data.write_jsonl(tmp_path / f"{name}.jsonl", [row | {"hyp": hyp if hyp is not None else row["text"]} for row in rows])
    entries = run("--compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert [e["set"] for e in entries] == ["a en", "a zh", "all, pooled"] and {(e["resampled"], e["blocks"]) for e in entries} == {("speakers", 7)}
    assert [e["difference"] for e in entries] == [100] * 3 and "over 7 speakers: too few" in capsys.readouterr().out


# ---------------------------------------------------------------------------- summary.json, errors.html

def test_summary_says_how_to_do_it_again(corpus, checkpoints, tmp_path):
    run("--model", checkpoints / "student", "--data", corpus / "dev.jsonl", "--out", tmp_path, "--device", "cpu", "--max_new_tokens", 3, "--batch", 2)
    summary, digest = json.loads((tmp_path / "summary.json").read_text()), lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
    decisive = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    assert summary["weights"] == {name: digest(checkpoints / "student" / name) for name in decisive}
    assert summary["data"] == {str(corpus / "dev.jsonl"): digest(corpus / "dev.jsonl")} and summary["model"] == str(checkpoints / "student")
    assert summary["normaliser"] == data.NORMALISER and summary["device"] == "cpu" and summary["processes"] == 1
    assert summary["decoding"] == {"search": "greedy", "max_new_tokens": 3, "batch": 2, "keep_going": False}
    assert set(summary["versions"]) >= {"python", "torch", "transformers", "jiwer"} and summary["versions"]["jiwer"] == version("jiwer")
    assert summary["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", summary["commit"]) and summary["command"]


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
    """Self-contained, well-formed, escaped; the worst clip first; each player holds its clip's own samples."""
    attack = "<script>alert(1)</script>"
    lines = [("u0", "en", "red lamp", f"red {attack} \"'&"), ("u1", "zh", "打开红灯", "打开灯"), ("u2", "en", "fine", "fine"), ("u3<b>", "en", "red lamp", "bed")]
    spoken(lines, extra=lambda i: {"speaker": f"{attack}{i}"} | ({"start": 0.1, "duration": 0.2} if i == 1 else {}))
    source = (tmp_path / "out" / "errors.html").read_text(encoding="utf-8")
    page = Page(source)
    assert not page.open and "<script" not in source and "script" in page.text and "bed" in page.text
    assert {tag for tag, _ in page.tags} <= set("html head meta title style body h1 h2 h3 p table tr th td b div span audio svg line rect text".split())
    links = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href", "srcset", "style", "action") or key.startswith("on")]
    assert len(links) == 3 and all(link.startswith("data:audio/wav;base64,") for link in links) and "url(" not in source and "@import" not in source
    ids = [i for i in re.findall(r'class="head"><b>(.*?)</b>', source)]
    assert ids == ["u0", "u3&lt;b&gt;", "u1"], "worst first within a language; clips without errors are not shown"
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(links[2].split(",")[1])), dtype="int16")
    own = soundfile.read(corpus / "dev-1.wav", dtype="int16")[0]
    assert rate == 16_000 and np.abs(samples.astype(int) - own[1600:4800]).max() <= 1
    assert 'class="pair del"><span class="r">红</span><span class="h"></span>' in source and "lamp → " in page.text and "red → bed" in page.text
    assert source.count("<svg") == 2 and "CER 25" not in source and "CER <b>25.00</b>" in source


def test_length_chart():
    rows = [{"id": f"u{i}", "duration": seconds, "substitutions": wrong, "deletions": 0, "insertions": 0, "units": 10}
            for i, (seconds, wrong) in enumerate([(0.5, 1), (0.9, 3), (2.5, 0), (11.0, 10)])]
    chart = evaluate.length_chart(rows)
    bars = re.findall(r'height="([\d.]+)" rx.*?>([\d.]+)</text>.*?>([\d.]+–[\d.]+)</text>.*?>(\d+)</text>', chart)
    assert bars == [("24.0", "20.0", "0–1", "2"), ("0.0", "0.0", "2–3", "1"), ("120.0", "100.0", "11–12", "1")]


# ---------------------------------------------------------------------------- teacher data, files

def test_teacher_data_filtered_by_its_references(spoken, tmp_path, capsys):
    lines = [("exact", "en", "the red lamp is on", "The red lamp is on."), ("near", "en", "the red lamp is on", "the red lamp was on"),
             ("far", "en", "the red lamp is on", "a bed lamp on"), ("unknown", "en", None, "who knows"), ("loop", "en", None, "no " * 9 + "no"),
             ("empty", "zh", "灯", ""), ("from nothing", "en", "", "words")]
    spoken(lines, "--as_manifest", tmp_path / "td.jsonl", "--max_wer", "20")
    assert [(u.id, u.text) for u in data.read_manifest(tmp_path / "td.jsonl")] == [
        ("exact", "The red lamp is on."), ("near", "the red lamp was on"), ("unknown", "who knows")]
    shown = capsys.readouterr().out
    assert "3 transcripts kept; left out: 2 above --max_wer 20, 1 looping, 1 empty; 2 had no reference" in shown
    spoken(lines, "--as_manifest", tmp_path / "td.jsonl")
    assert len(data.read_manifest(tmp_path / "td.jsonl")) == 5 and "max_wer" not in capsys.readouterr().out


def test_files_are_printed(corpus, checkpoints, tmp_path, capsys, monkeypatch):
    shutil.copy(corpus / "dev-0.wav", tmp_path / "a.wav")
    soundfile.write(tmp_path / "b.flac", sound(np.random.default_rng(0), 0.6, 44_100), 44_100)
    expected = model.transcribe(model.load(checkpoints / "student"), [data.Utterance(n, str(tmp_path / n)) for n in ("a.wav", "b.flac")], max_new_tokens=8)
    words = ["--model", checkpoints / "student", "--device", "cpu", "--max_new_tokens", 8, "--audio"]
    run(*words, tmp_path / "b.flac", tmp_path / "a.wav")
    shown = capsys.readouterr().out.split("\n")
    for line, name in zip(shown, ("b.flac", "a.wav")):
        assert line.startswith(f"{tmp_path / name}: {expected[name]['hyp']}") and ("[cut" in line) is not expected[name]["stopped"]
    run(*words, tmp_path / "a.wav", "--language", "en")
    assert capsys.readouterr().out.startswith(expected["a.wav"]["hyp"])
    soundfile.write(tmp_path / "long.wav", sound(np.random.default_rng(0), 41.0), 16_000)
    monkeypatch.setattr(model, "load", None)
    for name, message in (("long.wav", r"too_long: 41.00 s is outside 0.1 to 40.0 s"), ("none.wav", "unreadable")):
        with pytest.raises(SystemExit, match=f"{name}.*{message}"):
            run(*words, tmp_path / name)


@pytest.mark.parametrize("words", [
    "--model m", "--model m --data d", "--data d --out o", "--model m --rescore h --out o", "--rescore h", "--compare a", "--compare a b --model m",
    "--model m --data d --audio a --out o", "--model m --data d --out o --max_wer 10", "--out o"])
def test_flags_that_do_not_go_together(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate.parse_args(words.split())
    assert stopped.value.code == 2 and "error:" in capsys.readouterr().err
