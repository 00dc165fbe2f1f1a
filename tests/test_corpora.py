"""data.py NAME ROOT OUT on miniature trees with the published corpora's file names and formats.

    OMP_NUM_THREADS=1 python -m pytest tests/test_corpora.py -q
"""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import soundfile

import data
from conftest import ROOT, sound

RATE = 16_000


def audio(path, seconds=0.5, seed=0, **kw):
    """Write a sound, folders included; -> its samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    x = sound(np.random.default_rng(seed), seconds)
    soundfile.write(path, x, RATE, **kw)
    return x


def text(path, content, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode(encoding))


def run(*words):
    data.main(data.parse_args([str(word) for word in words]))


def fails(*words) -> str:
    """The message that the command ends with."""
    with pytest.raises(SystemExit) as stopped:
        run(*words)
    assert isinstance(stopped.value.code, str) and stopped.value.code.startswith(f"data.py {words[0]}: ")
    return stopped.value.code


def written(out) -> list[str]:
    return sorted(p.name for p in out.iterdir() if p.suffix != ".index") if out.exists() else []


def read(path) -> list[data.Utterance]:
    """The manifest's utterances; every clip can be decoded and is as long as its line says."""
    utterances = data.read_manifest(path)
    for u in utterances:
        assert len(data.load_audio(u)) == pytest.approx(u.duration_sec * RATE, abs=1)
    assert not any(os.path.isabs(json.loads(line)["audio"]) for line in path.read_text(encoding="utf-8").splitlines())
    return utterances


# ---------------------------------------------------------------------------- LibriSpeech

@pytest.fixture
def libri(tmp_path):
    root = tmp_path / "corpora" / "LibriSpeech"
    for subset, speaker, chapter, n in (("dev-clean", "84", "121123", 2), ("dev-clean", "84", "121550", 1), ("dev-clean", "174", "50561", 1),
                                        ("train-clean-100", "103", "1240", 1)):
        folder = root / subset / speaker / chapter
        names = [f"{speaker}-{chapter}-{i:04d}" for i in range(n)]
        for i, name in enumerate(names):
            audio(folder / f"{name}.flac", 0.3 + 0.1 * i)
        text(folder / f"{speaker}-{chapter}.trans.txt", "".join(f"{name} MISTER QUILTER'S {name[-1]}\n" for name in names))
    text(root / "SPEAKERS.TXT", ";ID  |SEX| SUBSET\n")  # files beside the subsets are none
    return root


@pytest.mark.parametrize("parent", [False, True])
def test_librispeech(libri, tmp_path, capsys, parent):
    out = tmp_path / "deep" / "out"
    run("librispeech", libri.parent if parent else libri, out)
    assert written(out) == ["dev-clean.jsonl", "train-clean-100.jsonl"]
    dev = read(out / "dev-clean.jsonl")
    assert [(u.id, u.text, u.language, u.speaker) for u in dev] == [
        ("174-50561-0000", "MISTER QUILTER'S 0", "en", "174"), ("84-121123-0000", "MISTER QUILTER'S 0", "en", "84"),
        ("84-121123-0001", "MISTER QUILTER'S 1", "en", "84"), ("84-121550-0000", "MISTER QUILTER'S 0", "en", "84")]
    assert [u.duration_sec for u in dev] == [0.3, 0.3, 0.4, 0.3] and {u.start_sec for u in dev} == {0.0}
    assert dev[2].audio == str(libri / "dev-clean/84/121123/84-121123-0001.flac")
    shown = capsys.readouterr().out.splitlines()
    assert shown == [f"{out}/dev-clean.jsonl: 4 utterances, 0.00 h, 2 speakers", f"{out}/train-clean-100.jsonl: 1 utterances, 0.00 h, 1 speakers"]


def test_librispeech_leaves_out_by_reason(libri, tmp_path, capsys):
    folder = libri / "dev-clean/84/121123"
    audio(folder / "84-121123-0009.flac")                            # not in the transcript
    (folder / "84-121123-0001.flac").unlink()                        # in the transcript alone
    (libri / "dev-clean/174/50561/174-50561-0000.flac").write_bytes(b"half a download" * 99)
    text(libri / "dev-clean/84/121550/84-121550.trans.txt", "84-121550-0000\n")  # an id without words
    run("librispeech", libri, tmp_path / "out")
    assert [u.id for u in read(tmp_path / "out/dev-clean.jsonl")] == ["84-121123-0000"]
    shown = capsys.readouterr().out.splitlines()[0]
    assert shown.startswith(f"{tmp_path}/out/dev-clean.jsonl: 1 utterances, 0.00 h, 1 speakers; left out: ")
    assert f"1 unreadable (first: {libri}/dev-clean/174/50561/174-50561-0000.flac)" in shown
    assert f"1 no audio file (first: {folder}/84-121123-0001.flac)" in shown
    assert f"2 no transcript (first: {folder}/84-121123-0009.flac)" in shown


def test_librispeech_errors(libri, tmp_path):
    out = tmp_path / "out"
    message = fails("librispeech", tmp_path / "nowhere", out)
    assert f"{tmp_path}/nowhere: " in message and f"expected folders like {tmp_path}/nowhere/dev-clean/84/121123" in message
    assert "expected" in fails("librispeech", libri / "dev-clean", out)  # one level too deep
    transcript = libri / "dev-clean/84/121123/84-121123.trans.txt"
    before = transcript.read_bytes()
    transcript.write_bytes(before + b"84-121123-0000 AGAIN\n")
    assert f"{transcript}:3: " in (message := fails("librispeech", libri, out)) and "'84-121123-0000'" in message
    transcript.write_bytes(before + b"84-121123-0002 \xff\n")
    assert f"{transcript}: expected UTF-8" in fails("librispeech", libri, out)
    transcript.unlink()
    assert f"expected {transcript}" in fails("librispeech", libri, out)
    assert not out.exists()


# ---------------------------------------------------------------------------- AISHELL-1

@pytest.fixture
def aishell(tmp_path):
    root = tmp_path / "corpora" / "data_aishell"
    wavs = {"train": ("S0002", "BAC009S0002W0122"), "dev": ("S0724", "BAC009S0724W0121"), "test": ("S0764", "BAC009S0764W0121")}
    for split, (speaker, name) in wavs.items():
        audio(root / "wav" / split / speaker / f"{name}.wav")
    audio(root / "wav/train/S0002/BAC009S0002W0123.wav")
    text(root / "transcript/aishell_transcript_v0.8.txt", "BAC009S0002W0122 而 对 楼市 成交 抑制 作用 最 大 的 限 购\n"
         "BAC009S0002W0123 也 成为 地方 政府 的 眼中 钉 \nBAC009S0724W0121 广州市 房地产\nBAC009S0764W0121 甚至 出现 T 恤\n")
    return root


@pytest.mark.parametrize("parent", [False, True])
def test_aishell1(aishell, tmp_path, capsys, parent):
    run("aishell1", aishell.parent if parent else aishell, tmp_path / "out")
    assert written(tmp_path / "out") == ["dev.jsonl", "test.jsonl", "train.jsonl"]
    rows = {split: [(u.id, u.text, u.language, u.speaker, u.duration_sec) for u in read(tmp_path / f"out/{split}.jsonl")] for split in ("train", "dev", "test")}
    assert rows == {
        "train": [("BAC009S0002W0122", "而对楼市成交抑制作用最大的限购", "zh", "S0002", 0.5), ("BAC009S0002W0123", "也成为地方政府的眼中钉", "zh", "S0002", 0.5)],
        "dev": [("BAC009S0724W0121", "广州市房地产", "zh", "S0724", 0.5)], "test": [("BAC009S0764W0121", "甚至出现T恤", "zh", "S0764", 0.5)]}
    assert "left out" not in capsys.readouterr().out


def test_aishell1_leaves_out_by_reason(aishell, tmp_path, capsys):
    wavs = aishell / "wav/train/S0002"
    for n in (124, 125):
        audio(wavs / f"BAC009S0002W0{n}.wav")                        # the published transcript lacks some of the wavs
    soundfile.write(wavs / "BAC009S0002W0123.wav", np.zeros(0), RATE)
    (aishell / "wav/dev/S0724/BAC009S0724W0121.wav").write_bytes(b"RIFF")
    (aishell / "wav/test/S0764/BAC009S0764W0121.wav").unlink()
    (tmp_path / "out").mkdir()
    run("aishell1", aishell, tmp_path / "out")
    assert [u.id for u in read(tmp_path / "out/train.jsonl")] == ["BAC009S0002W0122"] and written(tmp_path / "out") == ["train.jsonl"]
    dev, train, transcript = capsys.readouterr().out.splitlines()
    assert "dev.jsonl: 0 utterances" in dev and "; not written; left out: 1 unreadable (first: " in dev
    assert f"2 no transcript (first: {wavs}/BAC009S0002W0124.wav)" in train and f"1 empty (first: {wavs}/BAC009S0002W0123.wav)" in train
    assert "1 no audio file (first: BAC009S0764W0121)" in transcript


def test_aishell1_errors(aishell, tmp_path):
    out, transcript = tmp_path / "out", aishell / "transcript/aishell_transcript_v0.8.txt"
    (tmp_path / "empty").mkdir()
    assert f"expected {tmp_path}/empty/data_aishell/transcript/aishell_transcript_v0.8.txt" in fails("aishell1", tmp_path / "empty", out)
    (aishell / "wav").rename(aishell / "waw")
    assert f"expected {aishell}/wav/{{train,dev,test}}/SPEAKER/*.wav" in fails("aishell1", aishell, out)
    (aishell / "waw").rename(aishell / "wav")
    content = transcript.read_text(encoding="utf-8")
    text(transcript, content, "gb18030")
    assert f"{transcript}: expected UTF-8" in fails("aishell1", aishell, out)
    text(transcript, content.replace("BAC", "BAD"))  # no id fits
    message = fails("aishell1", aishell, out)
    assert "no utterance is left" in message and "2 no transcript" in message and str(aishell / "wav/train/S0002/BAC009S0002W0122.wav") in message
    transcript.unlink()
    transcript.parent.rmdir()
    for root in (aishell, aishell.parent):
        assert f"expected {transcript}" in fails("aishell1", root, out)
    assert not out.exists()


# ---------------------------------------------------------------------------- WenetSpeech

def segment(name, begin, end, *subsets, words="怎么样这些日子住得还习惯吧"):
    return {"sid": name, "confidence": 1.0, "begin_time": begin, "end_time": end, "subsets": list(subsets), "text": words}


@pytest.fixture
def wenet(tmp_path):
    """(root, samples of the train audio). The train audio is 8 s: its segments are a small part of it."""
    root = tmp_path / "WenetSpeech"
    paths = {"Y0000000000_--5llN02F84": "audio/train/youtube/B00000/Y0000000000_--5llN02F84.opus",
             "TEST_NET_Y0000000000_-KTKHdZ2fb8": "audio/test_net/youtube/B00000/TEST_NET_Y0000000000_-KTKHdZ2fb8.opus",
             "DEV_T0000000000": "audio/dev/third_party/B00000/DEV_T0000000000.opus"}
    kw = dict(format="OGG", subtype="OPUS")
    x = audio(root / paths["Y0000000000_--5llN02F84"], 8.0, **kw)
    for aid in list(paths)[1:]:
        audio(root / paths[aid], 2.0, **kw)
    segments = {"Y0000000000_--5llN02F84": [segment("Y_S00000", 0.08, 1.4, "L"), segment("Y_S00002", 5.0, 6.28, "L", "M", "S", words="挺好的"),
                                            segment("Y_S00003", 7.0, 7.9, "M", "L")],
                "TEST_NET_Y0000000000_-KTKHdZ2fb8": [segment("TEST_NET_S00000", 0.5, 1.5, "TEST_NET")],
                "DEV_T0000000000": [segment("DEV_S00000", 0, 1.97, "DEV")], "TEST_MEETING_T0": [segment("TEST_MEETING_S00000", 0, 1, "TEST_MEETING")]}
    paths["TEST_MEETING_T0"] = "audio/test_meeting/third_party/B00000/TEST_MEETING_T0.opus"  # not unpacked
    meta = {"dataset": "WenetSpeech", "language": "ZH", "version": "v1.0", "audios": [
        {"aid": aid, "duration": 8.0, "md5": "48af998ec7dab6964386c3522386fa4b", "path": path, "source": "youtube", "tags": ["drama"],
         "url": "https://www.youtube.com/watch?v=--5llN02F84", "segments": segments[aid]} for aid, path in paths.items()]}
    text(root / "WenetSpeech.json", json.dumps(meta, ensure_ascii=False, indent=4))
    return root, x


def test_wenetspeech(wenet, tmp_path, capsys):
    root, x = wenet
    run("wenetspeech", root, tmp_path / "out")
    assert written(tmp_path / "out") == ["dev.jsonl", "test_net.jsonl", "train.jsonl", "train_m.jsonl", "train_s.jsonl"]
    rows = {p.stem: [(u.id, u.start_sec, u.duration_sec) for u in read(p)] for p in (tmp_path / "out").iterdir()}
    assert rows == {"train": [("Y_S00000", 0.08, 1.32), ("Y_S00002", 5.0, 1.28), ("Y_S00003", 7.0, 0.9)],
                    "train_m": [("Y_S00002", 5.0, 1.28), ("Y_S00003", 7.0, 0.9)], "train_s": [("Y_S00002", 5.0, 1.28)],
                    "test_net": [("TEST_NET_S00000", 0.5, 1.0)], "dev": [("DEV_S00000", 0.0, 1.97)]}
    u = data.read_manifest(tmp_path / "out/train_s.jsonl")[0]
    assert (u.text, u.language, u.speaker) == ("挺好的", "zh", None) and u.audio.endswith("B00000/Y0000000000_--5llN02F84.opus")
    shown = capsys.readouterr().out
    assert "train.jsonl: 3 utterances, 0.00 h, unknown speakers\n" in shown
    missing = root / "audio/test_meeting/third_party/B00000/TEST_MEETING_T0.opus"
    assert f"test_meeting.jsonl: 0 utterances, 0.00 h, unknown speakers; not written; left out: 1 no audio file (first: {missing})" in shown


def test_a_segment_of_an_opus_file_is_that_part_of_it_and_nothing_else_is_decoded(wenet, tmp_path, monkeypatch):
    root, x = wenet
    run("wenetspeech", root, tmp_path / "out")
    decoded, plain = [], soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, frames=-1, *a, **kw: decoded.append(frames) or plain(self, frames, *a, **kw))
    for u in data.read_manifest(tmp_path / "out/train.jsonl"):
        first = round(u.start_sec * RATE)
        clip, original = data.load_audio(u), x[first:first + round(u.duration_sec * RATE)]
        assert decoded.pop() == len(clip) == len(original) and not decoded
        assert np.corrcoef(clip, original)[0, 1] > 0.9  # opus is lossy; a shift of 10 samples gives less
        assert max(np.corrcoef(clip[40:-40], original[40 + k:len(original) - 40 + k])[0, 1] for k in (-40, -20, 20, 40)) < 0.9


@pytest.mark.parametrize("indent", [None, 4])
def test_wenetspeech_audios_are_as_json_loads_them(wenet, indent):
    path = wenet[0] / "WenetSpeech.json"
    meta = json.loads(path.read_text(encoding="utf-8"))
    meta["audios"] += [{"aid": "brackets ] } , and \" \\ in a string", "n": [[], {}, 1, 1.0, 0.1, -2e-3, None, True]}]
    text(path, json.dumps(meta, ensure_ascii=indent is None, indent=indent))
    read = list(data._wenetspeech_audios(path))
    assert read == meta["audios"] and repr(read) == repr(meta["audios"])  # repr: 1 stays 1, 1.0 stays 1.0


def test_wenetspeech_is_read_in_pieces(tmp_path):
    # The json has 6 GB: the first audios come out before the end, here a broken one, is read.
    path = tmp_path / "WenetSpeech.json"
    text(path, '{"audios": [' + '{"aid": "b"}, ' * 99_999 + '{"aid": oops}]}')
    audios = data._wenetspeech_audios(path)
    assert next(audios) == {"aid": "b"}
    with pytest.raises(ValueError, match="WenetSpeech.json: cut off or not JSON.*oops"):
        list(audios)


def test_wenetspeech_leaves_out_by_reason(wenet, tmp_path, capsys):
    root, _ = wenet
    meta = json.loads((root / "WenetSpeech.json").read_text(encoding="utf-8"))
    meta["audios"][0]["segments"] += [segment("e1", 3, 3, "L"), segment("e2", 3, 2, "L", "M"), segment("e3", -1, 2, "L"), segment("e4", 3, 4, "L", words=" "),
                                      segment("e5", 3, 4), segment("e6", 3, 4, "W")]
    text(root / "WenetSpeech.json", json.dumps(meta))
    run("wenetspeech", root, tmp_path / "out")
    assert len(read(tmp_path / "out/train.jsonl")) == 3 and len(read(tmp_path / "out/train_m.jsonl")) == 2
    shown = {re.search(r"(\w+)\.jsonl", line)[1]: line for line in capsys.readouterr().out.splitlines()}
    assert "3 bad times (first: " in shown["train"] and "1 no transcript (first: " in shown["train"] and "1 bad times (first: " in shown["train_m"]
    assert "2 in none of L M S DEV TEST_NET TEST_MEETING (first: " in shown["other"] and "left out" not in shown["dev"]


def test_wenetspeech_errors(wenet, tmp_path):
    (root, _), out = wenet, tmp_path / "out"
    path = root / "WenetSpeech.json"
    assert f"expected {tmp_path}/WenetSpeech.json" in fails("wenetspeech", tmp_path, out)
    whole = path.read_text(encoding="utf-8")
    for cut in (len(whole) // 2, len(whole) - 4):  # inside an object; after the last one
        text(path, whole[:cut].rstrip("]} \n"))
        assert f"{path}: cut off" in fails("wenetspeech", root, out)
    for broken in ("[]", '{"audio": []}', '{"audios": []}'):
        text(path, broken)
        assert f'{path}: expected {{"audios": [...]}}' in fails("wenetspeech", root, out)
    for broken in ("", "not json"):
        text(path, broken)
        assert f"{path}: cut off or not JSON" in fails("wenetspeech", root, out)
    for key, broken in (("'path'", '{"aid": "Y17"}'), ("'sid'", '{"aid": "Y17", "path": "a.opus", "segments": [{"begin_time": 0, "end_time": 1}]}'),
                        ("str", '{"aid": "Y17", "path": "a.opus", "segments": [{"begin_time": "0", "end_time": "1"}]}'), ("", '"Y17"')):
        text(path, f'{{"audios": [{broken}]}}')
        message = fails("wenetspeech", root, out)
        assert f"{path}: expected path, segments" in message and key in message and "Y17" in message
    again = segment("twice", 0, 1, "DEV")
    text(path, json.dumps({"audios": [{"path": "audio/dev/third_party/B00000/DEV_T0000000000.opus", "segments": [again, again]}]}))
    assert "'twice'" in fails("wenetspeech", root, out)
    assert not out.exists()


# ---------------------------------------------------------------------------- a folder

@pytest.fixture
def calls(tmp_path):
    root = tmp_path / "my calls"
    for i, name in enumerate(("a.wav", "b/c.flac", "b/d.mp3", "b/d.e/f.ogg", "g.OPUS")):
        audio(root / name, 0.5, i, **(dict(format="OGG", subtype="OPUS") if name.endswith("OPUS") else {}))
    text(root / "a.txt", "\ufeff  put two cups\n on the shelf \r\n")
    text(root / "b/c.txt", "把杯子放在桌上\n")
    text(root / "b/d.txt", " \n")   # nothing in it: no text
    text(root / "b/notes.md", "no audio")
    (root / "b/folder.wav").mkdir()
    return root


def test_folder(calls, tmp_path, capsys):
    run("folder", calls, tmp_path / "out", "--language", "yue")
    assert written(tmp_path / "out") == ["my calls.jsonl"]
    rows = read(tmp_path / "out/my calls.jsonl")
    assert [(u.id, u.text, u.language, u.speaker) for u in rows] == [
        ("a", "put two cups\n on the shelf", "yue", None), ("b-c", "把杯子放在桌上", "yue", None), ("b-d.e-f", None, "yue", None), ("b-d", None, "yue", None),
        ("g", None, "yue", None)]
    assert capsys.readouterr().out == f"{tmp_path}/out/my calls.jsonl: 5 utterances, 0.00 h, unknown speakers, 3 without text; left out: " \
        f"1 not read: *.md (first: {calls}/b/notes.md)\n"


def test_folder_from_inside_it(calls, monkeypatch):
    monkeypatch.chdir(calls)
    run("folder", ".", "lists")
    rows = read(calls / "lists/my calls.jsonl")
    assert len(rows) == 5 and {u.language for u in rows} == {None}
    assert json.loads((calls / "lists/my calls.jsonl").read_text(encoding="utf-8").split("\n")[0])["audio"] == "../a.wav"


def test_folder_leaves_out_what_is_no_audio(calls, tmp_path, capsys):
    (calls / "b/z.wav").write_bytes(b"not audio")
    soundfile.write(calls / "y.wav", np.zeros(0), RATE)
    run("folder", calls, tmp_path / "out")
    assert len(read(tmp_path / "out/my calls.jsonl")) == 5
    shown = capsys.readouterr().out
    assert f"1 unreadable (first: {calls}/b/z.wav)" in shown and f"1 empty (first: {calls}/y.wav)" in shown


def test_folder_reads_what_it_can_and_says_what_it_leaves_out(tmp_path, capsys):
    root = tmp_path / "phone"
    for i, name in enumerate(("a.aiff", "b.au", "c.caf", "d.w64", "e.aif")):
        audio(root / name, 0.5, i, format={".aif": "AIFF"}.get(name[1:]))
    for name in ("f.m4a", "g.m4a", "h.amr", "h.txt", ".hidden"):
        text(root / name, "open it")
    run("folder", root, tmp_path / "out")
    assert [u.id for u in read(tmp_path / "out/phone.jsonl")] == list("abcde")
    shown = capsys.readouterr().out
    assert f"2 not read: *.m4a (first: {root}/f.m4a)" in shown and f"1 not read: *.amr (first: {root}/h.amr)" in shown
    assert f"1 not read: *.txt (first: {root}/h.txt)" in shown and "hidden" not in shown  # a transcript without audio
    for name in "a.aiff b.au c.caf d.w64 e.aif".split():
        (root / name).unlink()
    assert "suffixes found: ['.amr', '.m4a', '.txt']" in fails("folder", root, tmp_path / "out")


def test_lengths_in_a_manifest_are_of_the_whole_file(tmp_path):
    root = tmp_path / "joined"
    for i in range(3):
        audio(root / f"{i}.ogg", 0.5, i)
    (root / "all.ogg").write_bytes(b"".join((root / f"{i}.ogg").read_bytes() for i in range(3)))
    run("folder", root, tmp_path / "out")
    assert read(tmp_path / "out/joined.jsonl")[3].duration_sec == pytest.approx(1.5, abs=0.1)


def test_a_manifest_may_lie_behind_a_link(tmp_path):
    root = tmp_path / "clips"
    audio(root / "a.wav")
    (tmp_path / "disk/deep/lists").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/deep/lists")
    run("folder", root, tmp_path / "link")
    assert len(read(tmp_path / "link/clips.jsonl")) == len(read(tmp_path / "disk/deep/lists/clips.jsonl")) == 1


def test_folder_errors(calls, tmp_path):
    out = tmp_path / "out"
    assert f"{tmp_path}/nowhere: no audio; expected files *.aif, *.aifc" in fails("folder", tmp_path / "nowhere", out)
    assert str(calls / "a.wav") in fails("folder", calls / "a.wav", out)  # a file is no folder
    text(calls / "b/c.txt", "\u628a", "utf-16")
    assert f"{calls}/b/c.txt: expected UTF-8" in fails("folder", calls, out)
    (calls / "b/c.txt").unlink()
    for twin in ("b-c.wav", "b/c.ogg"):
        audio(calls / twin)
        message = fails("folder", calls, out)
        assert str(calls / twin) in message and str(calls / "b/c.flac") in message and "'b-c'" in message
        (calls / twin).unlink()
    for path in calls.rglob("*.*"):
        if path.is_file():
            path.write_bytes(b"nothing") if path.suffix != ".txt" else path.unlink()
    assert "no utterance is left" in (message := fails("folder", calls, out)) and f"5 unreadable (first: {calls}/a.wav)" in message
    assert not out.exists()


# ---------------------------------------------------------------------------- command line

def test_command_line(calls, tmp_path):
    done = subprocess.run([sys.executable, ROOT / "data.py", "folder", "--language", "en", calls, tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("\n") == 1 and len(read(tmp_path / "out/my calls.jsonl")) == 5
    done = subprocess.run([sys.executable, ROOT / "data.py", "folder", tmp_path / "nowhere", tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr and f"{tmp_path}/nowhere" in done.stderr


@pytest.mark.parametrize("words, shows", [
    ([], "NAME"), (["librispeach", "a", "b"], "'librispeech', 'aishell1', 'wenetspeech', 'folder'"), (["librispeech"], "ROOT, OUT"), (["aishell1", "a"], "OUT"),
    (["librispeech", "a", "b", "--language", "en"], "--language"), (["demo", "a", "b"], "a b"), (["folder", "a", "b", "--seed", "1"], "--seed")])
def test_what_the_command_line_refuses(capsys, words, shows):
    with pytest.raises(SystemExit) as stopped:
        data.parse_args(words)
    assert stopped.value.code == 2 and shows in capsys.readouterr().err


def test_flags_of_the_demo(monkeypatch, capsys):
    made = []
    monkeypatch.setattr(data, "make_demo", lambda *arguments: made.append(arguments))
    run("demo", "--out", "somewhere", "--seed", 3, "--pool", 40)
    run("demo")
    assert made == [("somewhere", 3, data.SIZES | {"pool": 40}), ("runs/data", 0, data.SIZES)]
    assert list(data.SIZES)[-1] == "pool"  # made last: what the other splits hold does not depend on its size
    for bad in (0, -2, 7):
        with pytest.raises(SystemExit):
            data.parse_args(["demo", "--pool", str(bad)])
        assert "--pool" in (message := capsys.readouterr().err) and str(bad) in message
