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

@pytest.fixture
def libri(tmp_path):
    root = tmp_path / "corpora" / "LibriSpeech"
    for chapter, n in (("dev-clean/84/121123", 2), ("dev-clean/174/50561", 1),
                       ("train-clean-100/103/1240", 1)):
        folder = root / chapter
        names = ["-".join([*folder.parts[-2:], f"{i:04d}"]) for i in range(n)]
        for i, name in enumerate(names):
            audio(folder / f"{name}.flac", 0.3 + 0.1 * i)
        text(folder / ("-".join(folder.parts[-2:]) + ".trans.txt"),
             "".join(f"{name} MISTER QUILTER'S {name[-1]}\n" for name in names))
    text(root / "SPEAKERS.TXT", ";ID  |SEX| SUBSET\n")
    return root


@pytest.mark.parametrize("parent", [False, True])
def test_librispeech(libri, tmp_path, capsys, parent):
    out = tmp_path / "deep" / "out"
    run("librispeech", libri.parent if parent else libri, out)
    assert sorted(p.name for p in out.iterdir()) == ["dev-clean.jsonl", "train-clean-100.jsonl"]
    dev = read(out / "dev-clean.jsonl")
    assert [(u.id, u.text, u.language, u.speaker, u.duration_sec) for u in dev] == [
        ("174-50561-0000", "MISTER QUILTER'S 0", "en", "174", 0.3),
        ("84-121123-0000", "MISTER QUILTER'S 0", "en", "84", 0.3),
        ("84-121123-0001", "MISTER QUILTER'S 1", "en", "84", 0.4)]
    assert dev[2].audio == str(libri / "dev-clean/84/121123/84-121123-0001.flac")
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 2 and shown[0].startswith(f"{out}/dev-clean.jsonl: 3 utterances, ")
    assert "left out" not in shown[0] + shown[1]


def test_librispeech_leaves_out_by_reason(libri, tmp_path, capsys):
    folder = libri / "dev-clean/84/121123"
    audio(folder / "84-121123-0009.flac")              # not in the transcript
    (folder / "84-121123-0001.flac").unlink()          # in the transcript alone
    (libri / "dev-clean/174/50561/174-50561-0000.flac").write_bytes(b"half a download" * 99)
    transcript = libri / "train-clean-100/103/1240/103-1240.trans.txt"
    text(transcript, "103-1240-0000\n")                # an id without words
    run("librispeech", libri, tmp_path / "out")
    assert [u.id for u in read(tmp_path / "out/dev-clean.jsonl")] == ["84-121123-0000"]
    dev, train, rest = capsys.readouterr().out.splitlines()
    assert ": 1 utterances, " in dev and "dev-clean.jsonl" in dev
    assert f"1 left out: unreadable (first: {libri}/dev-clean/174/50561/174-50561-0000.flac)" in dev
    assert f"1 left out: no transcript (first: {folder}/84-121123-0009.flac)" in dev
    assert ": 0 utterances, 1 left out: no transcript" in train
    assert "1 left out: no audio file (first: 84-121123-0001)" in rest
    assert os.listdir(tmp_path / "out") == ["dev-clean.jsonl"]


def test_librispeech_errors(libri, tmp_path):
    out = tmp_path / "out"
    message = fails("librispeech", tmp_path / "nowhere", out)
    assert "no utterance is left" in message and "SUBSET/SPEAKER/CHAPTER" in message
    transcript = libri / "dev-clean/84/121123/84-121123.trans.txt"
    before = transcript.read_bytes()
    transcript.write_bytes(before + b"84-121123-0002 \xff\n")
    assert f"{transcript}: expected UTF-8" in fails("librispeech", libri, out)


# ---------------------------------------------------------------------------- AISHELL-1

@pytest.fixture
def aishell(tmp_path):
    root = tmp_path / "corpora" / "data_aishell"
    for path in ("train/S0002/BAC009S0002W0122", "train/S0002/BAC009S0002W0123",
                 "dev/S0724/BAC009S0724W0121", "test/S0764/BAC009S0764W0121"):
        audio(root / "wav" / f"{path}.wav")
    text(root / "transcript/aishell_transcript_v0.8.txt",
         "BAC009S0002W0122 而 对 楼市 成交\nBAC009S0724W0121 广州市 房地产\nBAC009S0764W0121 甚至 出现 T 恤\n"
         "BAC009S0764W0199 没有 声音\n")
    return root


@pytest.mark.parametrize("parent", [False, True])
def test_aishell1(aishell, tmp_path, capsys, parent):
    run("aishell1", aishell.parent if parent else aishell, tmp_path / "out")
    rows = {p.stem: [(u.id, u.text, u.language, u.speaker, u.duration_sec) for u in read(p)]
            for p in (tmp_path / "out").iterdir()}
    assert rows == {"train": [("BAC009S0002W0122", "而对楼市成交", "zh", "S0002", 0.5)],
                    "dev": [("BAC009S0724W0121", "广州市房地产", "zh", "S0724", 0.5)],
                    "test": [("BAC009S0764W0121", "甚至出现T恤", "zh", "S0764", 0.5)]}
    shown = capsys.readouterr().out  # the published transcript lacks some of the wavs
    missing = aishell / "wav/train/S0002/BAC009S0002W0123.wav"
    assert f"1 left out: no transcript (first: {missing})" in shown
    assert "1 left out: no audio file (first: BAC009S0764W0199)" in shown


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
    shown = {Path(line.split(": ")[0]).stem: line for line in capsys.readouterr().out.splitlines()}
    assert "2 left out: bad times" in shown["train"]
    assert "1 left out: no transcript" in shown["train"]
    assert "1 left out: in none of L M S DEV TEST_NET TEST_MEETING" in shown["other"]
    assert ": 0 utterances, 1 left out: no audio file" in shown["test_meeting"]


def test_wenetspeech_is_read_object_by_object(tmp_path):
    # The json has 6 GB: the first rows come out before the end, here a broken one, is read.
    audios = '{"path": "a.opus", "segments": [' + json.dumps(segment("s", 0, 1, "L")) + "]}, "
    text(tmp_path / "WenetSpeech.json", '{"audios": [' + audios * 9999 + "oops]}")
    rows = data.wenetspeech(tmp_path)
    assert next(rows)[1]["id"] == "s"
    with pytest.raises(ValueError, match="WenetSpeech.json: cut off, or of another form"):
        list(rows)


def test_wenetspeech_errors(wenet, tmp_path):
    path, out = wenet / "WenetSpeech.json", tmp_path / "out"
    whole = path.read_text(encoding="utf-8")
    for broken, named in ((whole[:len(whole) // 2], str(path)), ("not json", str(path)),
                          ('{"audio": []}', "no utterance is left"),
                          ('{"audios": [{"aid": "Y17"}]}', "Y17"), ('{"audios": ["Y18"]}', "Y18"),
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
    run("folder", calls, tmp_path / "out", "--language", "yue")
    rows = read(tmp_path / "out/my calls.jsonl")
    assert [(u.id, u.text, u.language, u.speaker) for u in rows] == [
        ("a", "put two cups on the shelf", "yue", None), ("b-c", "把杯子放在桌上", "yue", None),
        ("b-d.e-f", None, "yue", None), ("b-d", None, "yue", None), ("g", None, "yue", None),
        ("linked", None, "yue", None)]
    shown = capsys.readouterr().out
    assert shown.startswith(f"{tmp_path}/out/my calls.jsonl: 6 utterances, ")
    assert "4 without text" in shown
    assert f"1 left out: not read: *.md (first: {calls}/b/notes.md)" in shown
    assert f"1 left out: not read: *.txt (first: {calls}/h.txt)" in shown
    assert f"1 left out: no audio file (first: {calls}/gone.wav)" in shown
    assert f"1 left out: unreadable (first: {calls}/z.wav)" in shown
    assert shown.count("left out") == 4


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
    audio(calls / "b-c.wav")
    assert "id 'b-c' already stands on line" in fails("folder", calls, out)


# ---------------------------------------------------------------------------- command line

@pytest.mark.parametrize("words, shows", [
    ([], "NAME"), (["librispeach", "a", "b"], "'librispeech', 'aishell1', 'wenetspeech', 'folder'"),
    (["aishell1", "a"], "OUT"), (["librispeech", "a", "b", "--language", "en"], "--language"),
    (["demo", "a", "b"], "a b"), (["folder", "a", "b", "--seed", "1"], "--seed"),
    (["demo", "--pool", "0"], "2 or more"), (["demo", "--pool", "7"], "even number, not 7")])
def test_what_the_command_line_refuses(capsys, words, shows):
    with pytest.raises(SystemExit) as stopped:
        data.parse_args(words)
    assert stopped.value.code == 2 and shows in capsys.readouterr().err


def test_flags_of_the_demo(monkeypatch):
    made = []
    monkeypatch.setattr(data, "make_demo", lambda *arguments: made.append(arguments))
    run("demo", "--out", "somewhere", "--seed", 3, "--pool", 40)
    run("demo")
    assert made == [("somewhere", 3, data.SIZES | {"pool": 40}), ("runs/data", 0, data.SIZES)]
    assert list(data.SIZES)[-1] == "pool"  # made last: the other splits do not depend on its size
