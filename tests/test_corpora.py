"""data.py NAME ROOT OUT on miniature trees with the published corpora's file names and formats.

    OMP_NUM_THREADS=1 python -m pytest tests/test_corpora.py -q
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

import data
from conftest import sound
from test_audio import RATE, encode


def audio(path, seconds=0.5, seed=0):
    return encode(path, sound(np.random.default_rng(seed), seconds))


def text(path, content, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode(encoding))


def run(*words):
    data.main(data.parse_args([str(word) for word in words]))


def fails(*words) -> str:
    """The message that the command ends with; no manifest is left."""
    with pytest.raises(SystemExit) as stopped:
        run(*words)
    assert stopped.value.code.startswith(f"data.py {words[0]}: ")
    assert not list(Path(words[2]).glob("*.jsonl"))
    return stopped.value.code


def read(path) -> list[data.Utterance]:
    """The manifest's utterances; every clip can be decoded and is as long as its line says."""
    utterances = list(data.read_manifest(path))
    for u in utterances:
        assert len(data.load_audio(u)) == pytest.approx(u.duration_sec * RATE, abs=1)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert not any(os.path.isabs(json.loads(line)["audio"]) for line in lines)
    return utterances


# ---------------------------------------------------------------------------- LibriSpeech

def test_librispeech(tmp_path, capsys):
    root = tmp_path / "corpora" / "LibriSpeech"
    for chapter, n in (("dev-clean/84/121123", 3), ("dev-clean/174/50561", 2),
                       ("train-clean-100/103/1240", 1)):
        names = [f"{'-'.join(chapter.split('/')[1:])}-{i:04d}" for i in range(n)]
        for i, name in enumerate(names):
            audio(root / chapter / f"{name}.flac", 0.3 + 0.1 * i)
        text(root / chapter / f"{names[0][:-5]}.trans.txt",
             "".join(f"{name} MISTER QUILTER'S\n" for name in names))
    text(root / "SPEAKERS.TXT", ";ID  |SEX| SUBSET\n")
    dev = root / "dev-clean"
    audio(dev / "84/121123/84-121123-0009.flac")            # not in the transcript
    (dev / "84/121123/84-121123-0002.flac").unlink()        # in the transcript alone
    (dev / "174/50561/174-50561-0001.flac").write_bytes(b"half a download" * 99)
    text(root / "train-clean-100/103/1240/103-1240.trans.txt", "103-1240-0000\n")  # no words

    out = tmp_path / "deep" / "out"
    run("librispeech", root.parent, out)
    assert os.listdir(out) == ["dev-clean.jsonl"]
    rows = read(out / "dev-clean.jsonl")
    assert [(u.id, u.text, u.language, u.speaker, u.duration_sec) for u in rows] == [
        ("174-50561-0000", "MISTER QUILTER'S", "en", "174", 0.3),
        ("84-121123-0000", "MISTER QUILTER'S", "en", "84", 0.3),
        ("84-121123-0001", "MISTER QUILTER'S", "en", "84", 0.4)]
    assert rows[2].audio == f"{dev}/84/121123/84-121123-0001.flac"
    first = f"1 left out, no transcript; the first is {root}"
    assert set(capsys.readouterr().out.splitlines()) == {
        f"{out}/dev-clean.jsonl: 3 utterances, 0.00 hours; 2 left out",
        "transcripts: 1 left out, no audio file; the first is 84-121123-0002",
        f"dev-clean: 1 left out, unreadable; the first is {dev}/174/50561/174-50561-0001.flac",
        f"dev-clean: {first}/dev-clean/84/121123/84-121123-0009.flac",
        f"train-clean-100: {first}/train-clean-100/103/1240/103-1240-0000.flac"}


# ---------------------------------------------------------------------------- AISHELL-1

def test_aishell1(tmp_path):
    root = tmp_path / "corpora" / "data_aishell"
    for path in ("train/S0002/BAC009S0002W0122", "dev/S0724/BAC009S0724W0121"):
        audio(root / "wav" / f"{path}.wav")
    text(root / "transcript/aishell_transcript_v0.8.txt",
         "BAC009S0002W0122 而 对 楼市 成交\n\nBAC009S0724W0121 甚至 出现 T 恤\n")
    run("aishell1", root.parent, tmp_path / "out")
    rows = {p.stem: [(u.id, u.text, u.language, u.speaker, u.duration_sec) for u in read(p)]
            for p in (tmp_path / "out").iterdir()}
    assert rows == {"train": [("BAC009S0002W0122", "而对楼市成交", "zh", "S0002", 0.5)],
                    "dev": [("BAC009S0724W0121", "甚至出现T恤", "zh", "S0724", 0.5)]}


# ---------------------------------------------------------------------------- WenetSpeech

def segment(name, begin, end, *subsets, words="怎么样这些日子住得还习惯吧"):
    return {"sid": name, "confidence": 1.0, "begin_time": begin, "end_time": end,
            "subsets": list(subsets), "text": words}


@pytest.fixture
def wenet(tmp_path):
    root = tmp_path / "WenetSpeech"
    segments = {
        "audio/train/youtube/B00000/Y0.opus": [
            segment("Y_S00000", 0.08, 1.4, "L"),
            segment("Y_S00002", 5.0, 6.28, "L", "M", "S", words="挺好的"),
            segment("Y_S00003", 7.0, 7.9, "M", "L"), segment("e1", 3, 3, "L"),
            segment("e2", -1, 2, "L"), segment("e3", 3, 4, "L", words=" "),
            segment("e4", 3, 4, "W")],
        "audio/dev/third_party/B00000/DEV_T0.opus": [segment("DEV_S00000", 0, 1.97, "DEV")],
        "audio/test_meeting/B00000/T0.opus": [segment("T_S00000", 0, 1, "TEST_MEETING")]}
    audio(root / "audio/train/youtube/B00000/Y0.opus", 8.0)
    audio(root / "audio/dev/third_party/B00000/DEV_T0.opus", 2.0)
    meta = {"dataset": "WenetSpeech", "language": "ZH", "audios": [
        {"aid": "Y0", "path": path, "segments": rows} for path, rows in segments.items()]}
    text(root / "WenetSpeech.json", json.dumps(meta, ensure_ascii=False, indent=4))
    return root


def test_wenetspeech(wenet, tmp_path, capsys):
    run("wenetspeech", wenet, tmp_path / "out")
    rows = {p.stem: [(u.id, u.start_sec, u.duration_sec) for u in read(p)]
            for p in (tmp_path / "out").iterdir()}
    first, second, third = ("Y_S00000", 0.08, 1.32), ("Y_S00002", 5.0, 1.28), ("Y_S00003", 7.0, 0.9)
    assert rows == {"train": [first, second, third], "train_m": [second, third],
                    "train_s": [second], "dev": [("DEV_S00000", 0.0, 1.97)]}
    u = data.read_manifest(tmp_path / "out/train_s.jsonl")[0]
    assert (u.text, u.language, u.speaker) == ("挺好的", "zh", None)
    assert u.audio == str(wenet / "audio/train/youtube/B00000/Y0.opus")
    shown = capsys.readouterr().out
    for remark in ("train: 2 left out, bad times;", "train: 1 left out, no transcript;",
                   "test_meeting: 1 left out, no audio file;"):
        assert remark in shown


def test_wenetspeech_errors(wenet, tmp_path):
    path, out = wenet / "WenetSpeech.json", tmp_path / "out"
    whole = path.read_text(encoding="utf-8")
    for broken, named in ((whole[:len(whole) // 2], str(path)), ("not json", str(path)),
                          ('{"audio": []}', "no utterance is left"),
                          ('{"audios": [{"aid": "Y17"}]}', "'path'"), ('{"audios": ["Y"]}', "form"),
                          (whole.replace('"sid": "Y_S00003"', '"sid": "Y_S00000"'), "'Y_S00000'")):
        text(path, broken)
        assert named in fails("wenetspeech", wenet, out)
    path.unlink()
    assert str(path) in fails("wenetspeech", wenet, out)


# ---------------------------------------------------------------------------- a folder

@pytest.fixture
def calls(tmp_path):
    root = tmp_path / "my calls"
    for i, name in enumerate(("a.wav", "b/c.flac", "b/d.mp3", "b/d.e/f.m4a", "g.OPUS")):
        audio(root / name, 0.5, i)
    text(root / "a.txt", "\ufeff  put two cups\n on the shelf \r\n")
    text(root / "b/c.txt", "把杯子放在桌上\n")
    text(root / "b/d.txt", " \n")         # nothing in it: no text
    text(root / "b/notes.md", "no audio")
    text(root / "h.txt", "a transcript without audio")
    (root / "b/folder.wav").mkdir()
    (root / "gone.wav").symlink_to("/nowhere/gone.wav")
    text(root / "z.wav", "not audio")
    audio(root / ".git/annex/objects/MD5E-s1.wav")
    (root / "linked.wav").symlink_to(".git/annex/objects/MD5E-s1.wav")
    text(root / ".hidden.wav", "")
    return root


def test_a_folder(calls, tmp_path, capsys):
    audio(calls / "b/long.wav", 30.5)
    run("folder", calls, tmp_path / "out", "--language", "yue")
    rows = [(u.id, u.text, u.language) for u in data.read_manifest(tmp_path / "out/my calls.jsonl")]
    assert rows == [
        ("a", "put two cups on the shelf", "yue"), ("b-c", "把杯子放在桌上", "yue"),
        ("b-d.e-f", None, "yue"), ("b-d", None, "yue"), ("b-long", None, "yue"),
        ("g", None, "yue"), ("linked", None, "yue")]
    left_out = "my calls: 1 left out,"
    assert set(capsys.readouterr().out.splitlines()) == {
        f"{left_out} *.md is not read; the first is {calls}/b/notes.md",
        f"{left_out} *.txt is not read; the first is {calls}/h.txt",
        f"{left_out} no audio file; the first is {calls}/gone.wav",
        f"{left_out} unreadable; the first is {calls}/z.wav",
        f"my calls: 5 without text; the first is {calls}/b/d.e/f.m4a",
        f"my calls: 1 over 30.0 s, not trained on; the first is {calls}/b/long.wav",
        f"{tmp_path}/out/my calls.jsonl: 7 utterances, 0.01 hours; 4 left out"}


def test_a_folder_from_inside_it_and_behind_a_link(calls, tmp_path, monkeypatch):
    monkeypatch.chdir(calls)
    (tmp_path / "disk/deep/lists").mkdir(parents=True)
    (calls / "lists").symlink_to(tmp_path / "disk/deep/lists")
    run("folder", ".", "lists")
    rows = read(calls / "lists/my calls.jsonl")
    assert len(rows) == 6 and {u.language for u in rows} == {None}
    assert len(read(tmp_path / "disk/deep/lists/my calls.jsonl")) == 6


def test_folder_errors(calls, tmp_path):
    out = tmp_path / "out"
    message = fails("folder", tmp_path / "nowhere", out)
    assert f"{tmp_path}/nowhere" in message and "Audio files anywhere below ROOT" in message
    text(calls / "b/c.txt", "\u628a", "utf-16")
    assert f"{calls}/b/c.txt: expected UTF-8" in fails("folder", calls, out)
    (calls / "b/c.txt").unlink()
    audio(calls / "b/c.wav")
    message = fails("folder", calls, out)
    assert f"{calls}/b/c.flac and {calls}/b/c.wav have one id, 'b-c'" in message


# ---------------------------------------------------------------------------- command line

@pytest.mark.parametrize("words, shows", [
    ([], "NAME"), (["librispeach", "a", "b"], "'librispeech', 'aishell1', 'wenetspeech', 'folder'"),
    (["aishell1", "a"], "OUT"), (["librispeech", "a", "b", "--language", "en"], "--language"),
    (["demo", "a", "b"], "a b")])
def test_what_the_command_line_refuses(capsys, words, shows):
    with pytest.raises(SystemExit) as stopped:
        data.parse_args(words)
    assert stopped.value.code == 2 and shows in capsys.readouterr().err
