"""data.py against independent oracles: manifests, decoding, log-mel, batch plan, metric, demo corpus.

    OMP_NUM_THREADS=1 python -m pytest tests/test_data.py -q
"""

import dataclasses
import functools
import hashlib
import json
import math
import pickle
import random
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import WhisperFeatureExtractor

import data
from conftest import ROOT, sound

RATE = 16_000


def write_lines(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n" for line in lines), encoding="utf-8")
    return path


def clip(path, audio, rate=RATE, start=0.0, duration=None, **kw):
    """Write `audio` to `path` and return the utterance of manifest line m.jsonl:7 that names it."""
    soundfile.write(path, audio, rate, **kw)
    return data.Utterance("clip", str(path), start_sec=start, duration_sec=duration, line="m.jsonl:7")


# ---------------------------------------------------------------------------- manifest

def test_manifest_fields(tmp_path):
    path = write_lines(tmp_path / "m.jsonl", {"id": "a", "audio": "wav/a.wav", "text": "hi", "language": "EN", "speaker": "s", "extra": [1]}, "  ",
                       {"id": "b", "audio": "/abs/../abs/b.wav", "start": 2, "duration": 1.5}, {"audio": "c.wav"}, {"audio": "c.wav", "start": 3})
    a, b, c, d = data.read_manifest(path)
    assert a == data.Utterance("a", str(tmp_path / "wav/a.wav"), "hi", "en", 0.0, None, "s", f"{path}:1")
    assert b == data.Utterance("b", "/abs/b.wav", start_sec=2.0, duration_sec=1.5, line=f"{path}:3")  # the blank line counts as a line
    assert (c.id, d.id) == ("c", "c@3")  # two segments of one file need two ids


def test_one_file_name_in_two_folders_is_two_ids(tmp_path):
    path = write_lines(tmp_path / "m.jsonl", {"audio_filepath": "x/1.wav"}, {"audio_filepath": "y/1.wav"}, {"audio_filepath": "/z/1.wav"})
    assert [u.id for u in data.read_manifest(path)] == ["x/1", "y/1", "/z/1"]


def test_two_points_lead_from_where_a_link_leads(tmp_path):
    (tmp_path / "disk/lists").mkdir(parents=True)
    (tmp_path / "lists").symlink_to("disk/lists")
    path = write_lines(tmp_path / "lists/m.jsonl", {"audio": "../a.wav"}, {"audio": "./b/c.wav"})
    assert [u.audio for u in data.read_manifest(path)] == [str(tmp_path / "disk/a.wav"), str(tmp_path / "lists/b/c.wav")]


def test_manifest_paths_do_not_depend_on_the_working_directory(tmp_path, monkeypatch):
    write_lines(tmp_path / "m.jsonl", {"audio": "a.wav"})
    monkeypatch.chdir(tmp_path)
    assert data.read_manifest("m.jsonl")[0].audio == str(tmp_path / "a.wav")


@pytest.mark.parametrize("row, start, duration", [
    ({"audio_filepath": "a.wav", "offset": 1.5, "duration": 2.0, "lang": "zh"}, 1.5, 2.0),   # NeMo
    ({"audio": "a.wav", "begin_time": 1.5, "end_time": 3.5}, 1.5, 2.0),                      # open-audio-opd
    ({"audio": "a.wav", "begin_time": -1, "end_time": -1}, 0.0, None),                       # -1: whole file
    ({"audio": "a.wav", "begin_time": 1.5, "end_time": -1}, 1.5, None),
    ({"audio": "a.wav", "begin_time": -1, "end_time": 3.5}, 0.0, 3.5),
    ({"audio": "a.wav", "begin_time": 0, "end_time": 3.5}, 0.0, 3.5),                        # 0 is a time, not "absent"
    ({"audio": "a.wav", "start": 1.5, "end": 3.5}, 1.5, 2.0),
    ({"audio": "a.wav", "end": 3.5}, 0.0, 3.5),
    ({"audio": "a.wav", "start": 1.5, "end": 3.5, "duration": 2.0}, 1.5, 2.0),
    ({"audio": "a.wav", "text": "hi", "sentence": "Hi!", "label": 3, "split": "x", "path": None}, 0.0, None),  # other keys may stand beside
    ({"audio": "a.wav", "start": None, "duration": None, "text": None}, 0.0, None),
])
def test_manifest_spellings(tmp_path, row, start, duration):
    u, = data.read_manifest(write_lines(tmp_path / "m.jsonl", row))
    assert (u.audio, u.start_sec, u.duration_sec, u.language) == (str(tmp_path / "a.wav"), start, duration, row.get("lang"))


@pytest.mark.parametrize("line, names", [
    ('{"audio": "a.wav"', "{\"audio\": \"a.wav\""),
    ('["a.wav"]', "a.wav"),
    ('{"id": "x"}', "id"),
    ('{"audio": ""}', "audio"),
    ('{"audio": 3}', "3"),
    ('{"audio": "a.wav", "id": 17}', "17"),
    ('{"audio": "a.wav", "text": ["hi"]}', "hi"),
    ('{"audio": "a.wav", "language": 1}', "1"),
    ('{"audio": "a.wav", "duration": "2.5"}', "2.5"),
    ('{"audio": "a.wav", "duration": true}', "True"),
    ('{"audio": "a.wav", "duration": NaN}', "nan"),
    ('{"audio": "a.wav", "duration": 0}', "0"),
    ('{"audio": "a.wav", "duration": -2.25}', "-2.25"),
    ('{"audio": "a.wav", "duration": Infinity}', "inf"),
    ('{"audio": "a.wav", "start": -1.25}', "-1.25"),
    ('{"audio": "a.wav", "start": Infinity}', "inf"),
    ('{"audio": "a.wav", "offset": NaN}', "nan"),
    ('{"audio": "a.wav", "begin_time": 4, "end_time": 3}', "-1"),
    ('{"audio": "a.wav", "begin_time": NaN}', "nan"),
    ('{"audio": "a.wav", "end_time": NaN}', "nan"),
    ('{"audio": "b.wav", "id": "first"}', "first"),
    ('{"audio": "a.wav", "start": 1, "end": 1}', "duration 0"),
    ('{"audio": "a.wav", "start": 1, "end": 3, "duration": 1}', "end 3"),
    ('{"audio": "a.wav", "sentence": "hi"}', "'sentence'"),
    ('{"audio": "a.wav", "transcription": "hi"}', "'text'"),
    ('{"audio": "a.wav", "Text": "hi"}', "'Text'"),
    ('{"wav": "a.wav"}', "'audio'"),
    ('{"audio": "a.wav", "langauge": "en"}', "'language'"),
    ('{"audio": "a.wav", "start_time": 1, "end_time": 2}', "'start_time'"),
    ('{"audio": "a.wav", "duration_ms": 2000}', "'duration_ms'"),
    ('{"audio": "a.wav", "text": "good \\ud83d"}', "'text'"),
    ('{"audio": "a.wav", "id": "\\udc00"}', "'id'"),
])
def test_manifest_errors_name_line_and_value(tmp_path, line, names):
    path = write_lines(tmp_path / "m.jsonl", {"id": "first", "audio": "z.wav"}, "", line)
    with pytest.raises(ValueError) as error:
        data.read_manifest(path)
    assert f"{path}:3" in str(error.value) and names in str(error.value)


@pytest.mark.parametrize("encoding", ["gbk", "utf-16", "latin-1"])
def test_manifest_in_another_encoding(tmp_path, encoding):
    text = "naïve" if encoding == "latin-1" else "打开红色台灯"
    line = json.dumps({"audio": "a.wav", "text": text}, ensure_ascii=False)
    (tmp_path / "m.jsonl").write_bytes(line.encode(encoding))
    with pytest.raises(ValueError, match="m.jsonl:1: expected UTF-8"):
        data.read_manifest(tmp_path / "m.jsonl")


def test_manifest_without_an_utterance(tmp_path):
    with pytest.raises(ValueError, match="empty.jsonl"):
        data.read_manifest(write_lines(tmp_path / "empty.jsonl", ""))


def test_what_write_jsonl_writes_can_be_read(tmp_path):
    # A byte-level vocabulary can write any character, U+0085 and U+2028 too: str.splitlines cuts there, JSON does not escape them.
    text = "你好 \u2028 a\x85b \U0001f600 \"quoted\"\n\t"
    data.write_jsonl(tmp_path / "new" / "m.jsonl", [{"id": "a", "audio": "a.wav", "text": text}, {"id": "b", "audio": "b.wav"}])
    assert [u.text for u in data.read_manifest(tmp_path / "new" / "m.jsonl")] == [text, None]


def test_write_jsonl_leaves_the_old_file_when_it_fails(tmp_path):
    data.write_jsonl(tmp_path / "m.jsonl", [{"id": "old"}])
    with pytest.raises(TypeError):
        data.write_jsonl(tmp_path / "m.jsonl", [{"id": "new"}, {"id": object()}])
    assert (tmp_path / "m.jsonl").read_text() == '{"id": "old"}\n'


# ---------------------------------------------------------------------------- audio

@pytest.mark.parametrize("extension, options, tolerance", [
    ("wav", {}, 1e-4), ("wav", {"subtype": "FLOAT"}, 0), ("flac", {"subtype": "PCM_24"}, 1e-6), ("ogg", {}, 0.15), ("mp3", {}, 0.15)])
def test_decode_formats_and_segments(tmp_path, extension, options, tolerance):
    x = sound(np.random.default_rng(1), 1.0)
    u = clip(tmp_path / f"a.{extension}", x, **options)
    whole = data.load_audio(u)
    assert whole.dtype == np.float32 and whole.shape == x.shape
    assert np.abs(whole - x).max() <= tolerance  # ogg and mp3 are lossy
    part = data.load_audio(dataclasses.replace(u, start_sec=0.25, duration_sec=0.4))
    # Not 0: a segment and a whole mp3 are read by two decoders, and one rounds by where it started.
    np.testing.assert_allclose(part, whole[4000:10400], rtol=0, atol=3e-6)
    tail = data.load_audio(dataclasses.replace(u, start_sec=0.75))  # no duration: to the end of the file
    np.testing.assert_allclose(tail, whole[12000:], rtol=0, atol=3e-6)


def test_channels_are_averaged(tmp_path):
    rng = np.random.default_rng(2)
    left, right = sound(rng, 0.5), sound(rng, 0.5)
    mono = data.load_audio(clip(tmp_path / "a.wav", np.stack([left, right], 1), subtype="FLOAT"))
    np.testing.assert_allclose(mono, (left + right) / 2, atol=1e-7)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100])
def test_resampling_keeps_pitch_phase_and_length(tmp_path, rate):
    tone = lambda seconds: (0.5 * np.sin(2 * np.pi * 440 * seconds + 0.3)).astype(np.float32)  # the same sound at any rate
    u = clip(tmp_path / "a.wav", tone(np.arange(round(1.01 * rate)) / rate), rate, subtype="FLOAT")
    for start, duration in ((0.0, None), (0.3, 0.5)):
        audio = data.load_audio(dataclasses.replace(u, start_sec=start, duration_sec=duration))
        assert len(audio) == pytest.approx((duration or 1.01) * RATE, abs=1)
        middle = slice(400, -400)  # the filter rings at both ends
        np.testing.assert_allclose(audio[middle], tone(start + np.arange(len(audio)) / RATE)[middle], atol=2e-3)


def reject_cases():
    rng = np.random.default_rng(3)
    half, noise = sound(rng, 0.5), (0.1 * rng.standard_normal(RATE)).astype(np.float32)
    holed, loud = half.copy(), noise.copy()
    holed[100] = np.nan
    loud[::33] = 1.0  # 3 %
    infinite = np.where(np.arange(8000) == 5, np.inf, half).astype(np.float32)
    return [
        ("past_end", dict(audio=half, start=0.6)), ("past_end", dict(audio=half, duration=0.52)),
        ("past_end", dict(audio=half, start=0.3, duration=0.3)), ("past_end", dict(audio=half, start=0.5)),
        ("too_short", dict(audio=half[:1590])), ("too_short", dict(audio=half, duration=0.09)),
        ("too_long", dict(audio=np.tile(noise, 31))), ("not_finite", dict(audio=holed, subtype="FLOAT")),
        ("not_finite", dict(audio=infinite, subtype="FLOAT")), ("silent", dict(audio=0 * half)),
        ("silent", dict(audio=half * 1e-4, subtype="FLOAT")), ("clipped", dict(audio=loud)),
        ("clipped", dict(audio=half * 3000, subtype="FLOAT")),  # int16 written as float without a division
    ]


@pytest.mark.parametrize("reason, case", reject_cases(), ids=[f"{i}-{reason}" for i, (reason, _) in enumerate(reject_cases())])
def test_rejections(tmp_path, reason, case):
    with pytest.raises(data.AudioError) as error:
        data.load_audio(clip(tmp_path / "a.wav", **case))
    assert error.value.reason == reason
    assert all(part in str(error.value) for part in ("m.jsonl:7", "clip", str(tmp_path / "a.wav"), reason))


def test_what_is_just_good_enough(tmp_path):
    rng = np.random.default_rng(4)
    half, noise = sound(rng, 0.5), (0.1 * rng.standard_normal(RATE)).astype(np.float32)
    peaky = noise.copy()
    peaky[::100] = 1.0  # 1 %
    for n, case in enumerate((dict(audio=half[:1600]), dict(audio=np.tile(noise, 30)), dict(audio=half * 4e-4, subtype="FLOAT"), dict(audio=peaky),
                              dict(audio=half, duration=0.509))):  # a whole file's length rounded up to 10 ms
        assert len(data.load_audio(clip(tmp_path / f"{n}.wav", **case))) == len(case["audio"])


@pytest.mark.parametrize("name, content", [("missing.wav", None), ("empty.wav", b""), ("text.wav", b"not audio at all" * 99), ("headerless.raw", b"\0\1" * 9000)])
def test_unreadable(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    u = data.Utterance("clip", str(tmp_path / name), line="m.jsonl:7")
    with pytest.raises(data.AudioError, match="m.jsonl:7.*unreadable") as error:
        data.load_audio(u)
    assert error.value.reason == "unreadable"
    assert data.measure([u]) == [0.0]  # sorted first and rejected at its turn


@pytest.mark.parametrize("duration", [None, 1.0])
@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3"])
def test_truncated_file(tmp_path, extension, duration):
    # Half the sound under the whole transcript: the model would learn to invent the rest.
    u = clip(tmp_path / f"a.{extension}", sound(np.random.default_rng(5), 1.0), duration=duration)
    whole = Path(u.audio).read_bytes()
    Path(u.audio).write_bytes(whole[:len(whole) // 2])
    with pytest.raises(data.AudioError, match="m.jsonl:7"):
        data.load_audio(u)


def test_wav_written_to_a_pipe_is_not_truncated(tmp_path):
    # ffmpeg and sox can't seek back in a pipe, so they leave the largest size in the header: those files are whole.
    u = clip(tmp_path / "a.wav", sound(np.random.default_rng(5), 1.0))
    content = bytearray(Path(u.audio).read_bytes())
    content[4:8] = content[40:44] = b"\xff\xff\xff\xff"
    Path(u.audio).write_bytes(content)
    assert len(data.load_audio(u)) == RATE


def put_size(path, size):
    """Write a size of its samples into a wav's header."""
    content = bytearray(path.read_bytes())
    content[40:44] = size.to_bytes(4, "little")
    path.write_bytes(content)


def resample_is_as_good_as(decibel, rate, tmp_path):
    tones = np.random.default_rng(0).uniform(100, 0.4 * min(rate, RATE), (30, 1))
    wave = lambda r: np.sin(2 * np.pi * tones * np.arange(r) / r).mean(0)  # one second at any rate
    audio = data.load_audio(clip(tmp_path / "a.wav", wave(rate), rate, subtype="FLOAT"))
    middle = slice(1000, RATE - 1000)
    error = audio[middle] - wave(RATE)[middle]
    return 10 * np.log10((audio[middle] ** 2).mean() / (error ** 2).mean()) > decibel


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_001, 22_050, 24_000, 32_000, 44_101, 48_000])
def test_resampling_is_exact_at_any_rate(tmp_path, rate):
    assert resample_is_as_good_as(70, rate, tmp_path)


@pytest.mark.parametrize("size", [0x7FFFF000, 0x7FFFFFFF, 0x80000000 - 36, 2 ** 32 - 1, 0])
def test_wav_without_a_size(tmp_path, size):
    u = clip(tmp_path / "a.wav", sound(np.random.default_rng(5), 1.0))
    whole = data.load_audio(u)
    put_size(tmp_path / "a.wav", size)
    np.testing.assert_array_equal(data.load_audio(u), whole)
    assert data.measure([u]) == [1.0]
    tail = data.load_audio(dataclasses.replace(u, start_sec=0.5))
    np.testing.assert_array_equal(tail, whole[8000:])


def test_wav_whose_size_was_never_brought_up_to_date(tmp_path):
    u = clip(tmp_path / "a.wav", sound(np.random.default_rng(5), 1.0))
    put_size(tmp_path / "a.wav", 4096)
    with pytest.raises(data.AudioError, match="unreadable: .*byte 4140.*27904 more"):
        data.load_audio(u)
    assert data.measure([u]) == [0.0]


COMPRESSED = [("mp3", {}), ("ogg", {}), ("opus", dict(format="OGG", subtype="OPUS"))]


@pytest.mark.parametrize("extension, options", COMPRESSED)
def test_joined_files_are_read_to_the_end(tmp_path, extension, options):
    joined = b""
    for i in range(3):
        u = clip(tmp_path / f"{i}.{extension}", sound(np.random.default_rng(i), 0.8), **options)
        joined += Path(u.audio).read_bytes()
    u = dataclasses.replace(u, audio=str(tmp_path / f"joined.{extension}"))
    Path(u.audio).write_bytes(joined)
    n = len(data.load_audio(u))
    assert 2.35 * RATE < n < (2.75 if extension == "mp3" else 2.45) * RATE  # mp3: silence between them
    assert data.measure([u])[0] == pytest.approx(n / RATE, abs=1e-3)
    last = dataclasses.replace(u, start_sec=1.7, duration_sec=0.6)  # behind what the first header says
    assert len(data.load_audio(last)) == 0.6 * RATE
    with pytest.raises(data.AudioError, match="too_long"):
        data.load_audio(u, 1.0)
    with pytest.raises(data.AudioError, match="past_end"):
        data.load_audio(dataclasses.replace(u, start_sec=3.5))


def test_joined_flacs_are_refused(tmp_path):
    u = clip(tmp_path / "a.flac", sound(np.random.default_rng(5), 0.8))
    one = Path(u.audio).read_bytes()
    Path(u.audio).write_bytes(one + one)
    with pytest.raises(data.AudioError, match=f"unreadable: a second flac begins at byte {len(one)}"):
        data.load_audio(u)
    assert data.measure([u]) == [0.0]


def test_mp3_whose_length_is_a_guess(tmp_path):
    # Without its first frame, which holds the number of frames, libsndfile takes the first one's bit rate for all.
    noise = np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
    busy_then_quiet = np.concatenate([0.2 * noise, 0.001 * np.tile(noise, 3)])
    for name, wave in (("down", busy_then_quiet), ("up", busy_then_quiet[::-1])):
        u = clip(tmp_path / f"{name}.mp3", wave, bitrate_mode="VARIABLE")
        content = Path(u.audio).read_bytes()
        second = content.index(content[:2], 100)
        assert re.search(b"Xing|Info", content[:second])
        Path(u.audio).write_bytes(content[second:])
        assert soundfile.info(u.audio).frames < 3 * RATE
        assert len(data.load_audio(u)) == pytest.approx(4 * RATE, rel=0.03)


@pytest.mark.parametrize("behind", [b"TAG".ljust(128, b"\0"), bytes(3000), b"junk \xff\xfb " * 30])
def test_mp3_with_something_behind_it(tmp_path, behind):
    u = clip(tmp_path / "a.mp3", sound(np.random.default_rng(5), 1.0))
    Path(u.audio).write_bytes(Path(u.audio).read_bytes() + behind)
    assert len(data.load_audio(u)) == pytest.approx(RATE, rel=0.05)


def test_flac_of_unknown_length(tmp_path):
    x = sound(np.random.default_rng(5), 1.0)
    u = clip(tmp_path / "a.flac", x)
    content = bytearray(Path(u.audio).read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    Path(u.audio).write_bytes(content)
    np.testing.assert_allclose(data.load_audio(u), x, atol=1e-4)
    np.testing.assert_allclose(data.load_audio(dataclasses.replace(u, start_sec=0.3, duration_sec=0.4)), x[4800:11200], atol=1e-4)
    assert data.measure([u]) == [1.0]


def test_gsm_can_not_be_sought_in(tmp_path):
    x = sound(np.random.default_rng(5), 1.0, 8000)
    u = clip(tmp_path / "call.wav", x, 8000, subtype="GSM610")
    whole = data.load_audio(u)
    assert len(whole) == pytest.approx(RATE, rel=0.05)  # whole blocks of 40 ms
    part = data.load_audio(dataclasses.replace(u, start_sec=0.25, duration_sec=0.5))
    np.testing.assert_allclose(part[500:-500], whole[4500:11500], atol=1e-2)


@pytest.mark.parametrize("extension, options", [("aiff", {}), ("au", {}), ("w64", {}), ("rf64", dict(format="RF64")), ("flac", {}), *COMPRESSED])
def test_truncated_long_file(tmp_path, extension, options):
    u = clip(tmp_path / f"a.{extension}", np.tile(sound(np.random.default_rng(5), 2.0), 10), **options)
    assert len(data.load_audio(u)) == 20 * RATE
    whole = Path(u.audio).read_bytes()
    Path(u.audio).write_bytes(whole[:len(whole) // 2])
    with pytest.raises(data.AudioError, match="m.jsonl:7.*unreadable"):
        data.load_audio(u)


def test_evaluation_hears_all_that_can_be_decoded(tmp_path):
    half = sound(np.random.default_rng(5), 0.5)
    other = sound(np.random.default_rng(6), 0.5)
    for name, audio, reason in (
            ("zeros", 0 * half, "silent"), ("offset", 0 * half + 0.3, "silent"), ("full offset", 0 * half - 1, "silent"),
            ("offset and faint noise", 0.1 + 5e-5 * half, "silent"), ("overdriven", np.clip(9 * half, -1, 1), "clipped"),
            ("opposite", np.stack([half, -half], 1), "cancelled"), ("nearly opposite", np.stack([half, 0.02 * other - 0.97 * half], 1), "cancelled"),
            ("offsets differ", np.stack([half + 0.2, -0.1 - half], 1), "cancelled")):
        u = clip(tmp_path / f"{name}.wav", audio, subtype="FLOAT")
        with pytest.raises(data.AudioError, match=reason):
            data.load_audio(u)
        with pytest.warns(UserWarning, match=f"m.jsonl:7.*{reason}"):
            assert len(data.load_audio(u, for_training=False)) == len(half)
        with pytest.warns(UserWarning):
            assert data.load_batch([u], for_training=False).n_frames.tolist() == [50]
    for audio in (np.stack([half, 0 * half], 1), np.stack([half, other], 1), np.stack([half, -0.7 * half], 1), half + 0.2):
        data.load_audio(clip(tmp_path / "good.wav", audio, subtype="FLOAT"))


def test_silence_may_be_learned_where_nothing_is_said(tmp_path):
    u = clip(tmp_path / "a.wav", np.zeros(RATE))
    assert len(data.load_audio(dataclasses.replace(u, text=""))) == RATE
    with pytest.raises(data.AudioError, match="silent"):
        data.load_audio(dataclasses.replace(u, text="hello"))


# ---------------------------------------------------------------------------- features

def feature_clips():
    rng = np.random.default_rng(6)
    sweep, noise = sound(rng, 3.21), (0.1 * rng.standard_normal(30 * RATE)).astype(np.float32)
    quiet_then_loud = np.concatenate([1e-3 * noise[:RATE], sweep])
    return {"sweep": sweep, "30 s": noise, "0.05 s": sweep[:800], "0.1 s": sweep[:1600], "odd length": sweep[:16_159], "near silence": noise[:RATE] * 1e-5,
            "1e-4 of full scale": noise[:RATE] * 1e-3, "zeros": np.zeros(RATE, np.float32), "floor at 80 dB": quiet_then_loud}


@pytest.mark.parametrize("name", feature_clips())
def test_log_mel_is_whispers(name):
    audio = feature_clips()[name]
    extractor = WhisperFeatureExtractor(feature_size=128)
    expected = extractor(audio, sampling_rate=RATE, padding=False, truncation=False, return_tensors="np").input_features[0]
    mel = data.log_mel(audio)
    assert mel.dtype == torch.float32 and mel.shape == (128, len(audio) // 160) == expected.shape
    difference = np.abs(mel.numpy() - expected)
    # transformers' own numpy and torch paths differ by 2e-5 in single bins near the floor.
    assert difference.max() < 1e-5


def test_log_mel_of_80_bins():
    audio = sound(np.random.default_rng(7), 0.7)
    expected = WhisperFeatureExtractor(feature_size=80)(audio, sampling_rate=RATE, padding=False, truncation=False, return_tensors="np").input_features[0]
    np.testing.assert_allclose(data.log_mel(audio, 80).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("n_mels", [80, 128])
def test_mel_filters_are_whispers_to_the_last_bit(n_mels):
    expected = WhisperFeatureExtractor(feature_size=n_mels).mel_filters
    assert torch.equal(data._mel_filters(n_mels), torch.from_numpy(expected).float())


# ---------------------------------------------------------------------------- batches

def some_durations(n=1000, seed=0):
    return np.random.default_rng(seed).uniform(0.3, 20.0, n).tolist()


@pytest.mark.parametrize("n, size", [(1000, 16), (24, 5), (3, 8), (7, 7), (65, 2)])
def test_plan_visits_every_utterance_once_an_epoch(n, size):
    plan = data.Plan(some_durations(n), size, seed=3)
    assert plan.steps_per_epoch == -(-n // size)
    for epoch in range(3):
        batches = [plan[epoch * plan.steps_per_epoch + s] for s in range(plan.steps_per_epoch)]
        assert sorted(i for batch in batches for i in batch) == list(range(n))
        assert sorted(map(len, batches))[1:] == [size] * (len(batches) - 1)  # at most one batch is smaller


def test_plan_is_a_function_of_seed_and_step():
    durations = some_durations(200)
    plan, other_seed = data.Plan(durations, 8, 3), data.Plan(durations, 8, 4)
    forward = [list(plan[s]) for s in range(75)]
    backward = {s: list(data.Plan(durations, 8, 3)[s]) for s in (74, 30, 51, 0, 74, 26)}  # any order, a fresh object each
    assert all(forward[s] == batch for s, batch in backward.items())
    assert forward[:25] != forward[25:50] and [sorted(b) for b in forward[:25]] != [sorted(b) for b in forward[25:50]]
    assert forward[:25] != [other_seed[s] for s in range(25)]
    # str hashes differ between processes: a plan that leant on them would not survive a resume.
    code = "import data, json; print(json.dumps(data.Plan(json.loads(input()), 8, 3)[26]))"
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(durations), cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == forward[26]


def test_plan_sorts_inside_batches_and_keeps_batches_random():
    durations = np.array(some_durations(4000))
    plan = data.Plan(durations, 16, seed=0)
    rows = np.array([durations[plan[s]] for s in range(plan.steps_per_epoch)])  # (steps, 16)
    assert (np.diff(rows, axis=1) >= 0).all()  # a micro-batch, cut from it, then holds neighbours in length
    # Means of 16 random rows vary by sigma / 4; those of length-sorted batches by sigma. Sorted batches hurt training from scratch.
    assert rows.mean(1).std() == pytest.approx(durations.std() / 4, rel=0.2)
    assert abs(np.corrcoef(rows.mean(1)[:-1], rows.mean(1)[1:])[0, 1]) < 0.2


def test_plan_mixes_batches_between_epochs():
    plan = data.Plan(some_durations(4000), 16, seed=0)
    epochs = [[frozenset(plan[e * plan.steps_per_epoch + s]) for s in range(plan.steps_per_epoch)] for e in range(2)]
    assert not set(epochs[0]) & set(epochs[1])  # not the same batches in another order


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_out_each_step(corpus, world):
    utterances = data.read_manifest(corpus / "train.jsonl")
    plan = data.Plan(data.measure(utterances), 10, seed=1)
    for step in (0, 2, 4):  # 2: the smaller last batch is among the first three
        batches = [data.Steps(utterances, plan, 3, rank, world)[step] for rank in range(world)]
        ids = sorted(u.id for rank in batches for batch in rank for u in batch.utterances)
        assert ids == sorted(utterances[i].id for i in plan[step])
        assert all(len(batch.utterances) <= 3 for rank in batches for batch in rank)
        sizes = [sum(len(b.utterances) for b in rank) for rank in batches]
        assert max(sizes) - min(sizes) <= 1
        lengths = [[n for batch in rank for n in batch.n_frames.tolist()] for rank in batches]
        assert all(row == sorted(row) for row in lengths)  # micro-batches hold neighbours in length


def test_a_rank_may_be_without_rows(corpus):
    utterances = data.read_manifest(corpus / "train.jsonl")[:3]
    plan = data.Plan(data.measure(utterances), 3, seed=1)
    assert [len(data.Steps(utterances, plan, 8, rank, 4)[0]) for rank in range(4)] == [1, 1, 1, 0]


def add_step(mel, utterance, step):
    return mel + 10.0 * step + (utterance.id == "train-3")


def test_loader_worker_makes_the_same_steps(corpus):
    utterances = data.read_manifest(corpus / "train.jsonl")
    steps = data.Steps(utterances, data.Plan(data.measure(utterances), 6, seed=1), 4, augment=add_step)
    wanted = range(3, 6)  # as after a resume
    here, there = list(data.loader(steps, wanted, 0)), list(data.loader(steps, wanted, 1))
    assert len(here) == len(there) == 3
    for step, one, two in zip(wanted, here, there):
        assert [b.utterances for b in one] == [b.utterances for b in two] == [b.utterances for b in steps[step]]
        assert all(torch.equal(a.mel, b.mel) and torch.equal(a.n_frames, b.n_frames) for a, b in zip(one, two))
    # Where Python starts workers afresh instead of forking them, all of it is pickled.
    assert [b.utterances for b in pickle.loads(pickle.dumps(steps))[3]] == [b.utterances for b in here[0]]
    pickle.dumps(data.loader(steps, wanted, 1).worker_init_fn)


def test_augment_gets_the_step_and_padding_stays_zero(corpus):
    utterances = data.read_manifest(corpus / "train.jsonl")
    plan = data.Plan(data.measure(utterances), 24, seed=1)
    plain, augmented = data.Steps(utterances, plan, 24)[5][0], data.Steps(utterances, plan, 24, augment=add_step)[5][0]
    plain_at_6 = {u.id: row for u, row in zip(*(lambda b: (b.utterances, b.mel))(data.Steps(utterances, plan, 24, augment=add_step)[6][0]))}
    for u, a, b, n in zip(plain.utterances, plain.mel, augmented.mel, plain.n_frames):
        torch.testing.assert_close(b[:, :n], a[:, :n] + 50.0 + (u.id == "train-3"))
        torch.testing.assert_close(plain_at_6[u.id][:, :n], b[:, :n] + 10.0)
        assert (b[:, n:] == 0).all()


def test_load_batch_pads_with_zeros_and_reports_rejections(corpus, tmp_path):
    good = data.read_manifest(corpus / "train.jsonl")[:4]
    silent, missing = clip(tmp_path / "s.wav", np.zeros(RATE)), data.Utterance("gone", str(tmp_path / "gone.wav"), line="m.jsonl:9")
    batch = data.load_batch([good[0], silent, good[1], missing, good[2], good[3]])
    assert batch.utterances == good
    assert [reason for reason, _ in batch.rejected] == ["silent", "unreadable"]
    assert "m.jsonl:7" in batch.rejected[0][1] and "m.jsonl:9" in batch.rejected[1][1]
    assert batch.mel.shape == (4, 128, batch.n_frames.max()) and len(set(batch.n_frames.tolist())) > 1
    for u, row, n in zip(good, batch.mel, batch.n_frames):  # each row: its clip's features as if alone, then zeros
        alone = data.log_mel(data.load_audio(u))
        assert n == alone.shape[1] and torch.equal(row[:, :n], alone) and (row[:, n:] == 0).all()
    assert batch.audio_sec == pytest.approx(sum(len(data.load_audio(u)) // 160 for u in good) / 100)
    with pytest.raises(data.AudioError, match="m.jsonl:7"):
        data.load_batch([good[0], silent], keep_going=False)
    empty = data.load_batch([silent])  # a step must survive it
    assert empty.utterances == [] and empty.mel.shape[0] == 0 and len(empty.rejected) == 1


def test_pad_rows_pads_on_the_right():
    ids, mask = data.pad_rows([[5, 6, 7], [], [8]], pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 9], [8, 9, 9]] and ids.dtype == torch.long
    assert mask.tolist() == [[True] * 3, [False] * 3, [True, False, False]] and mask.dtype == torch.bool
    assert data.pad_rows([[9, 1], [9]], pad_id=9)[1].tolist() == [[True, True], [True, False]]  # an id may be pad_id


@pytest.mark.parametrize("missing", ["text", "language"])
def test_check_labelled_names_the_line(corpus, missing):
    utterances = data.read_manifest(corpus / "train.jsonl")
    data.check_labelled(utterances)
    for value in (None, ""):
        changed = [*utterances[:3], dataclasses.replace(utterances[3], **{missing: value}), *utterances[4:]]
        if (missing, value) == ("text", ""):  # nothing is said there
            data.check_labelled(changed)
            continue
        with pytest.raises(ValueError, match=f"{re.escape(utterances[3].line)}.*train-3"):
            data.check_labelled(changed)


def test_measure(corpus, tmp_path):
    utterances = data.read_manifest(corpus / "train.jsonl")
    assert any(u.duration_sec is None for u in utterances) and any(u.duration_sec for u in utterances)
    assert data.measure(utterances) == pytest.approx([len(data.load_audio(u)) / RATE for u in utterances], abs=1e-3)
    u = clip(tmp_path / "a.wav", np.zeros((4000, 2)), 8000, start=0.1)
    assert data.measure([u, dataclasses.replace(u, duration_sec=0.2)]) == pytest.approx([0.4, 0.2])


# ---------------------------------------------------------------------------- keyed uniforms

def test_uniforms_depend_on_their_key_alone():
    ids = [f"u{i}" for i in range(50)]
    table = data.keyed_uniforms(1, 2, ids, 40)
    assert table.shape == (50, 40) and table.dtype == np.float32
    np.testing.assert_array_equal(data.keyed_uniforms(1, 2, ids[::-7], 40), table[::-7])     # not on the batch
    np.testing.assert_array_equal(data.keyed_uniforms(1, 2, ids, 12), table[:, :12])         # not on how many are asked for
    others = [data.keyed_uniforms(2, 2, ids, 40), data.keyed_uniforms(1, 3, ids, 40), data.keyed_uniforms(2, 1, ids, 40),
              np.roll(table, 1, axis=0), np.roll(table, 1, axis=1)]
    assert all((other == table).mean() < 0.01 for other in others)
    assert data.keyed_uniforms(1, 2, [], 40).shape == (0, 40)


def test_uniforms_are_the_same_in_another_process_and_version():
    # These numbers are what a resume relies on; a change of the recipe would change every rollout.
    key = [7, 11, *hashlib.blake2b("en-17".encode(), digest_size=8).digest()]
    np.testing.assert_array_equal(data.keyed_uniforms(7, 11, ["en-17"], 5)[0], np.random.default_rng(key).random(5, dtype=np.float32))


def test_uniforms_are_uniform():
    ids = [f"utterance-{i}" for i in range(400)]
    for u in (data.keyed_uniforms(0, 0, ids, 50).ravel(), data.keyed_uniforms(0, 0, ids * 10, 1).ravel()[:400],
              np.concatenate([data.keyed_uniforms(0, step, ["a"], 1)[0] for step in range(2000)])):  # along rows, ids and steps
        assert u.min() >= 0 and u.max() < 1
        n, u = len(u), np.sort(u)
        gap = max(np.abs(u - np.arange(n) / n).max(), np.abs(u - np.arange(1, n + 1) / n).max())
        assert gap < 1.63 / math.sqrt(n)  # Kolmogorov-Smirnov, 1 % level


# ---------------------------------------------------------------------------- metric

# English and the digits of Mandarin have rules of their own: tests/test_normalize.py. Here, what all other text goes through.
@pytest.mark.parametrize("text, language, expected", [
    ("", "de", ""), ("   \n\t ", "de", ""), ("?!…", "de", ""),
    ("Hello,  WORLD!", "de", "hello world"),
    ("Don’t STOP", "de", "don't stop"), ("don‘t stop", "de", "don't stop"),
    ("‘quoted’ word", "de", "quoted word"),                    # an apostrophe outside a word is punctuation
    ("rock 'n' roll", "de", "rock n roll"),
    ("the boys' room", "de", "the boys room"),
    ("“curly” ”quotes“", "de", "curly quotes"),
    ("it’s—really—3.5%!", "de", "it's really 3.5"),
    ("well-known", "de", "well known"),
    ("3.5%", "de", "3.5"), ("$1,000.50", "de", "1 000.50"),
    ("end. 5. begin .5", "de", "end 5 begin 5"),               # a point counts only between digits
    ("U.S.A.", "de", "u s a"),
    ("ＡＢＣ　１２３", "de", "abc 123"),                        # full width
    ("ﬁne", "de", "fine"),                                     # ligature
    ("Café", "de", "café"), ("Cafe\u0301", "de", "café"),      # composed and decomposed are one
    ("snake_case", "de", "snake case"),
    ("a\u00a0b", "de", "a b"),
    ("हिन्दी", "de", "हिन्दी"),                                       # combining vowel signs are marks, not punctuation
    ("Straße 7", "de", "straße 7"),
    ("请，打开 A灯。", "zh", "请 打 开 a 灯"),
    ("“你好”；‘世界’！", "zh", "你 好 世 界"),
    ("三 个\n瓶子", "zh", "三 个 瓶 子"),
    ("ＡＢ　１２", "ja", "a b 1 2"),
    ("3.5%", "ja", "3 . 5"),
    ("《书》、（笔）…", "zh-CN", "书 笔"),
    ("東京タワー", "ja", "東 京 タ ワ ー"),
    ("", "zh", ""), ("。", "zh", ""),
])
def test_normalize(text, language, expected):
    result = data.normalize(text, language)
    assert result == unicodedata.normalize("NFC", expected)
    assert data.normalize(result, language) == result or "." in result  # scoring what was written as normalised changes nothing


@pytest.mark.parametrize("language", [None, ""])
def test_no_language_is_an_error(language):
    with pytest.raises(ValueError, match="language"):
        data.edit_counts("a", "b", language)


def optimal_counts(ref, hyp):
    """All (substitutions, deletions, insertions) of cheapest alignments, by trying every one. The oracle."""
    @functools.cache
    def best(i, j):
        if i == len(ref) or j == len(hyp):
            return {(0, len(ref) - i, len(hyp) - j)}
        found = {(s + (ref[i] != hyp[j]), d, n) for s, d, n in best(i + 1, j + 1)}
        found |= {(s, d + 1, n) for s, d, n in best(i + 1, j)} | {(s, d, n + 1) for s, d, n in best(i, j + 1)}
        return {c for c in found if sum(c) == min(map(sum, found))}
    return best(0, 0)


@pytest.mark.parametrize("language, alphabet, glue", [("en", "lamp cup red blue".split(), " "), ("zh", list("灯桌子窗"), "")])
def test_edit_counts_are_optimal(language, alphabet, glue):
    rng = random.Random(8)
    for _ in range(300):
        ref, hyp = (rng.choices(alphabet, k=rng.randint(0, 8)) for _ in range(2))
        counts = data.edit_counts(glue.join(ref), glue.join(hyp), language)
        assert tuple(counts[:3]) in optimal_counts(tuple(ref), tuple(hyp))
        assert counts.units == len(ref) and counts.errors == sum(counts[:3])


def test_align_spells_out_what_edit_counts_counts():
    assert data.align("a b c d", "a x c", "en") == [("equal", "a", "a"), ("sub", "b", "x"), ("equal", "c", "c"), ("del", "d", "")]
    assert data.align("灯", "灯桌", "zh") == [("equal", "灯", "灯"), ("ins", "", "桌")]
    assert data.align("", "", "en") == []


def test_edit_counts_normalise_both_sides():
    assert data.edit_counts("Don’t stop.", "don't STOP", "en") == (0, 0, 0, 3)
    assert data.edit_counts("打开 A 灯。", "打开ａ灯", "zh") == (0, 0, 0, 4)
    assert data.edit_counts("a b c", "a c", "en") == (0, 1, 0, 3)   # a word of the reference is missing: deletion
    assert data.edit_counts("a c", "a b c", "en") == (0, 0, 1, 2)
    assert data.edit_counts("", "a b", "en") == (0, 0, 2, 0) and data.edit_counts("。", "灯灯灯", "zh") == (0, 0, 3, 0)
    assert data.edit_counts("", "", "en") == (0, 0, 0, 0)


def test_bootstrap_of_constant_data_has_no_width():
    assert data.bootstrap([1] * 50, [4] * 50) == pytest.approx((0.25, 0.25))
    assert data.bootstrap([1, 2, 3] * 9, [4, 8, 12] * 9) == pytest.approx((0.25, 0.25))  # a rate of sums, not a mean of rates
    assert all(map(math.isnan, data.bootstrap([1, 2], [0, 0])))


def test_bootstrap_is_reproducible_and_has_the_normal_width():
    rng = np.random.default_rng(9)
    units, errors = rng.integers(5, 20, 400), rng.poisson(1.0, 400)
    low, high = data.bootstrap(errors, units)
    assert (low, high) == data.bootstrap(errors, units) != data.bootstrap(errors, units, seed=1)
    rate = errors.sum() / units.sum()
    se = np.sqrt(((errors - rate * units) ** 2).sum()) / units.sum()  # delta method
    assert (low, high) == pytest.approx((rate - 1.96 * se, rate + 1.96 * se), abs=0.15 * se)


def test_bootstrap_covers():
    rng, inside = np.random.default_rng(10), 0
    for _ in range(200):
        units = rng.integers(5, 20, 150)
        low, high = data.bootstrap(rng.binomial(units, 0.2), units, n=400)
        inside += low <= 0.2 <= high
    assert 0.88 < inside / 200 < 0.99  # 95 % within Monte-Carlo error


def test_bootstrap_of_a_difference_can_be_negative():
    low, high = data.bootstrap([-1, 0, 1, -1, 0, 0] * 20, [10] * 120)
    assert low < -1 / 60 < high


# ---------------------------------------------------------------------------- demo corpus

SMALL = {"test": 6, "dev": 4, "train": 6, "teacher": 8, "pool": 4}


def make_demo(folder, sizes):
    code = "import data, json, sys; data.make_demo(sys.argv[1], 0, json.loads(sys.argv[2]))"
    subprocess.run([sys.executable, "-c", code, folder, json.dumps(sizes)], cwd=ROOT, check=True, capture_output=True)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    make_demo(folder, SMALL)
    return folder


def test_demo_has_the_same_bytes_twice_and_a_larger_pool_changes_the_pool_alone(demo, tmp_path):
    make_demo(tmp_path, SMALL | {"pool": 10})
    small, large = contents(demo), contents(tmp_path)
    assert len(small) == sum(SMALL.values()) + 5
    changed = {name for name in small if small[name] != large[name]}
    assert changed == {"pool.jsonl"} and small["pool.jsonl"] == b"".join(large["pool.jsonl"].splitlines(True)[:4])
    assert {name.split("/")[1].split("-")[0] for name in large.keys() - small.keys()} == {"pool"}


def test_demo_splits(demo):
    splits = {name: data.read_manifest(demo / f"{name}.jsonl") for name in SMALL}
    assert {name: len(rows) for name, rows in splits.items()} == SMALL
    cast = data.cast()
    for name, rows in splits.items():
        assert [u.language for u in rows] == ["en", "zh"] * (len(rows) // 2)
        for u in rows:
            assert u.speaker.split("+")[1] in cast[name]
            seconds = soundfile.info(u.audio).duration
            assert seconds == pytest.approx(u.duration_sec, abs=1e-3) and len(data.load_audio(u))  # nothing is rejected
            assert data.normalize(u.text, u.language)


def test_voices_of_test_and_dev_are_heard_nowhere_else():
    cast = {split: set(voices) for split, voices in data.cast().items()}
    assert {split: len(voices) for split, voices in cast.items()} == {"test": 6, "dev": 6, "train": 6, "teacher": 25, "pool": 13}
    assert cast["test"] == cast["dev"] and not cast["test"] & (cast["train"] | cast["teacher"] | cast["pool"])
    assert cast["train"] < cast["pool"] < cast["teacher"]


def test_demo_sentences_stay_apart_when_they_run_short(tmp_path, monkeypatch):
    # With 40 sentences in all, most draws collide: only the check on what was said keeps the splits apart.
    class Mute:
        rate = RATE
        def say(self, *_, **__):
            return sound(np.random.default_rng(0), 0.3)
    monkeypatch.setattr(data, "Espeak", Mute)
    monkeypatch.setattr(data, "compose", lambda language, rng: f"{language} {rng.randrange(40)}")
    (tmp_path / "wav").mkdir()
    sizes = {"test": 16, "dev": 16, "train": 20, "teacher": 200, "pool": 200}
    rows = data.speak_language("en", tmp_path, 0, sizes)
    assert {split: len(rows[split]) for split in rows} == {split: size // 2 for split, size in sizes.items()}
    text = {split: {row["text"] for row in rows[split]} for split in rows}
    assert not text["test"] & (text["dev"] | text["train"] | text["teacher"] | text["pool"])
    assert not text["dev"] & (text["train"] | text["teacher"] | text["pool"])
    assert not text["teacher"] & text["train"]
    assert text["pool"] & text["train"] and text["pool"] & text["teacher"]  # the pool is new audio, not new sentences
