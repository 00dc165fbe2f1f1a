"""Audio files and features: what FFmpeg makes of them against the samples that were written.

    OMP_NUM_THREADS=1 python -m pytest tests/test_audio.py -q
"""

import dataclasses

import av
import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

import data
from conftest import sound, write_wav

RATE = 16_000
CODECS = {"wav": "pcm_s16le", "flac": "flac", "mp3": "libmp3lame", "opus": "libopus",
          "m4a": "aac", "webm": "libopus", "aiff": "pcm_s16be"}


def encode(path, audio, codec=None, rate=RATE):
    """(n,) or (n, 2) -> a file of the format that its suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    layout = "mono" if audio.ndim == 1 else "stereo"
    with av.open(str(path), "w") as container:
        codec = codec or CODECS[path.suffix[1:].lower()]
        stream = container.add_stream(codec, rate, layout=layout)
        planes = np.ascontiguousarray(np.atleast_2d(audio.T), dtype=np.float32)
        frame = av.AudioFrame.from_ndarray(planes, "fltp", layout)
        frame.sample_rate = rate
        frame.pts = 0
        container.mux(stream.encode(frame) + stream.encode(None))
    return path


def clip(path, audio=None, start=0.0, duration=None, rate=RATE, codec=None, **fields):
    """The utterance of manifest line m.jsonl:7 that names `path`; writes `audio` there."""
    if audio is not None:
        encode(path, audio, codec, rate)
    return data.Utterance("clip", str(path), start_sec=start, duration_sec=duration,
                          line="m.jsonl:7", **fields)


def reason(u, **options):
    """Why a clip is refused; its message names line, id and file."""
    with pytest.raises(data.AudioError) as error:
        data.load_audio(u, **options)
    assert str(error.value).startswith(f"m.jsonl:7: clip: {u.audio}: {error.value.reason}: ")
    return error.value.reason


# ---------------------------------------------------------------------------- decoding

@pytest.mark.parametrize("extension, codec, tolerance", [
    ("wav", "pcm_s16le", 1e-4), ("wav", "pcm_f32le", 0), ("wav", "pcm_s24le", 1e-6),
    ("wav", "pcm_mulaw", 0.02), ("flac", None, 1e-4), ("aiff", None, 1e-4),
    ("mp3", None, None), ("opus", None, None), ("m4a", None, None), ("webm", None, None)])
def test_a_file_is_read_as_it_was_written(tmp_path, extension, codec, tolerance):
    x = sound(np.random.default_rng(1), 1.0)
    audio = data.load_audio(clip(tmp_path / f"a.{extension}", x, codec=codec))
    assert audio.dtype == np.float32
    assert len(x) <= len(audio) <= len(x) + (1024 if extension == "m4a" else 0)  # whole aac frames
    if tolerance is None:  # lossy; shifted by a single sample it would be 0.9
        assert np.corrcoef(audio[:len(x)], x)[0, 1] > 0.96
    else:
        assert np.abs(audio - x).max() <= tolerance


@pytest.mark.parametrize("extension", ["wav", "flac", "mp3", "opus", "m4a", "webm"])
def test_a_segment_is_that_part_of_the_whole_file(tmp_path, extension):
    # Longer than a few seconds: in a shorter file nothing is sought.
    u = clip(tmp_path / f"a.{extension}", sound(np.random.default_rng(2), 8.0))
    whole = data.load_audio(u)
    for start, duration in ((0.25, 0.5), (3.3, 0.4), (6.05, 1.9), (7.0, None)):
        part = data.load_audio(dataclasses.replace(u, start_sec=start, duration_sec=duration))
        first = round(start * RATE)
        expected = whole[first:][:round((duration or 8.0) * RATE)]
        assert len(part) == len(expected)
        # opus is decoded at 48 kHz: a segment is cut there and resampled, which rings at its ends.
        edge = 400 if extension in ("opus", "webm") else 0
        middle = slice(edge, len(part) - edge)
        np.testing.assert_allclose(part[middle], expected[middle], rtol=0, atol=1e-5)


def test_a_segment_of_a_long_file_does_not_decode_the_rest(tmp_path, monkeypatch):
    u = clip(tmp_path / "a.mp3", sound(np.random.default_rng(2), 20.0), start=10.0, duration=1.0)
    seen = []
    plain = data.decoded_frames
    monkeypatch.setattr(data, "decoded_frames", lambda path, start: (
        seen.append(begin) or (begin, frame) for begin, frame in plain(path, start)))
    data.load_audio(u)
    assert 8.8 < seen[0] < 9.1 and 10.9 < seen[-1] < 11.1  # a run-up of one second


@pytest.mark.parametrize("rate", [8_000, 16_001, 44_100, 48_000])
def test_resampling_keeps_pitch_phase_and_length(tmp_path, rate):
    def tone(seconds):  # the same sound at any rate
        return 0.5 * np.sin(2 * np.pi * 440 * seconds + 0.3)
    u = clip(tmp_path / "a.wav", tone(np.arange(round(1.01 * rate)) / rate), rate=rate,
             codec="pcm_f32le")
    for start, duration in ((0.0, None), (0.3, 0.5)):
        audio = data.load_audio(dataclasses.replace(u, start_sec=start, duration_sec=duration))
        assert len(audio) == pytest.approx((duration or 1.01) * RATE, abs=1)
        middle = slice(400, -400)  # the filter rings at both ends
        expected = tone(round(start * rate) / rate + np.arange(len(audio)) / RATE)
        np.testing.assert_allclose(audio[middle], expected[middle], atol=2e-4)


def test_channels_are_averaged_or_one_is_selected(tmp_path):
    rng = np.random.default_rng(3)
    stereo = np.stack([sound(rng, 0.5), sound(rng, 0.5)], 1)
    u = clip(tmp_path / "a.wav", stereo, codec="pcm_f32le")
    np.testing.assert_allclose(data.load_audio(u), stereo.mean(1), atol=1e-7)
    for channel in (0, 1):
        audio = data.load_audio(dataclasses.replace(u, channel=channel))
        np.testing.assert_array_equal(audio, stereo[:, channel])
    assert reason(dataclasses.replace(u, channel=2)) == "no_channel"


# ---------------------------------------------------------------------------- what is refused

def refused():
    half = sound(np.random.default_rng(4), 0.5)
    holed = half.copy()
    holed[100] = np.nan
    return {
        "past_end": [dict(start=0.6), dict(duration=0.52), dict(start=0.3, duration=0.3),
                     dict(start=0.5), dict(start=7.0), dict(duration=31.0)],
        "too_short": [dict(audio=half[:1500]), dict(duration=0.09), dict(start=0.42)],
        "too_long": [dict(audio=np.tile(half, 61)), dict(audio=np.tile(half, 63), duration=30.1)],
        "not_finite": [dict(audio=holed), dict(audio=np.where(half > 0.3, np.inf, half))],
        "silent": [dict(audio=0 * half), dict(audio=half * 1e-4), dict(audio=0.2 + half * 1e-4),
                   dict(audio=np.stack([half, -half], 1))]}  # opposite phase: their average


@pytest.mark.parametrize("why", refused())
def test_what_is_refused_says_why(tmp_path, why):
    for i, case in enumerate(refused()[why]):
        case = {"audio": sound(np.random.default_rng(4), 0.5)} | case
        assert reason(clip(tmp_path / f"{i}.wav", codec="pcm_f32le", **case)) == why


def test_what_is_just_good_enough(tmp_path):
    half = sound(np.random.default_rng(4), 0.5)
    for i, case in enumerate((dict(audio=half[:1600]), dict(audio=np.tile(half, 60)),
                              dict(audio=half * 4e-4),
                              dict(audio=half, duration=0.509))):  # a length rounded up to 10 ms
        u = clip(tmp_path / f"{i}.wav", codec="pcm_f32le", **case)
        assert len(data.load_audio(u)) == len(case["audio"])


def test_silence_is_heard_in_evaluation_and_where_nothing_is_said(tmp_path):
    u = clip(tmp_path / "a.wav", np.zeros(RATE), text="hello")
    assert reason(u) == "silent"
    assert len(data.load_audio(dataclasses.replace(u, text=""))) == RATE
    with pytest.warns(UserWarning, match="m.jsonl:7.*silent"):
        assert len(data.load_audio(u, for_training=False)) == RATE


@pytest.mark.parametrize("seconds, said", [(40.0, None), (40.5, "too_long")])
def test_evaluation_hears_up_to_40_seconds(tmp_path, seconds, said):
    u = clip(tmp_path / "a.wav", sound(np.random.default_rng(4), seconds))
    assert reason(u) == "too_long"
    if said:
        assert reason(u, for_training=False) == said
    else:
        assert len(data.load_audio(u, for_training=False)) == 40 * RATE


@pytest.mark.parametrize("name, content", [
    ("missing.wav", None), ("empty.wav", b""), ("text.wav", b"not audio at all" * 99),
    ("headerless.raw", b"\0\1" * 9000), ("stub.wav", b"RIFF")])
def test_what_is_no_audio_is_unreadable(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert reason(clip(tmp_path / name)) == "unreadable"


@pytest.mark.parametrize("extension, codec", [
    ("wav", None), ("wav", "pcm_s24le"), ("wav", "pcm_f32le"), ("flac", None), ("mp3", None),
    ("m4a", None), ("aiff", None)])
def test_a_file_that_is_cut_off_is_unreadable(tmp_path, extension, codec):
    # Half the sound under the whole transcript: a model would learn to invent the rest.
    path = tmp_path / f"a.{extension}"
    u = clip(path, np.tile(sound(np.random.default_rng(5), 1.0), 5), codec=codec)
    raw = path.read_bytes()
    path.write_bytes(raw[:len(raw) * 6 // 10])
    assert reason(u) == "unreadable"
    assert reason(dataclasses.replace(u, duration_sec=5.0)) in ("unreadable", "past_end")


@pytest.mark.parametrize("extension", ["wav", "flac", "mp3", "opus", "webm"])
def test_files_joined_are_read_whole_or_refused(tmp_path, extension):
    path = tmp_path / f"a.{extension}"
    u = clip(path, sound(np.random.default_rng(5), 3.0))
    path.write_bytes(path.read_bytes() * 2)
    try:
        assert len(data.load_audio(u)) == pytest.approx(6 * RATE, rel=0.05)
    except data.AudioError as error:
        assert error.reason == "unreadable"


def test_a_hole_in_a_file_is_unreadable(tmp_path):
    x = sound(np.random.default_rng(5), 8.0)
    u = clip(tmp_path / "a.flac", x)
    raw = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(raw[:len(raw) // 3] + raw[len(raw) // 2:])
    assert reason(u) == "unreadable"
    u = clip(tmp_path / "a.opus", x)
    pages = (tmp_path / "a.opus").read_bytes().split(b"OggS")  # of a second each
    (tmp_path / "a.opus").write_bytes(b"OggS".join(pages[:5] + pages[6:]))
    assert reason(u) == "unreadable"


def rewritten(path, change):
    """Writes 3 s as a wav and changes its bytes -> what was written, the clip."""
    x = sound(np.random.default_rng(5), 3.0)
    write_wav(path, x)
    path.write_bytes(change(path.read_bytes()))
    return x, clip(path)


@pytest.mark.parametrize("size", [0x7FFFF000, 0x7FFFFFFF, 0x80000000 - 36, 2 ** 32 - 1, 0])
def test_a_wav_that_was_written_to_a_pipe_is_whole(tmp_path, size):
    x, u = rewritten(tmp_path / "a.wav",
                     lambda raw: raw[:40] + size.to_bytes(4, "little") + raw[44:])
    np.testing.assert_allclose(data.load_audio(u), x, atol=1e-4)
    tail = data.load_audio(dataclasses.replace(u, start_sec=1.5))
    np.testing.assert_allclose(tail, x[24_000:], atol=1e-4)


def test_a_wav_whose_header_was_never_brought_up_to_date_is_unreadable(tmp_path):
    _, u = rewritten(tmp_path / "a.wav",
                     lambda raw: raw[:40] + (4096).to_bytes(4, "little") + raw[44:])
    with pytest.raises(data.AudioError, match="4096 bytes of samples by the header, 96000 found"):
        data.load_audio(u)


def test_a_wav_may_hold_other_chunks(tmp_path):
    note = b"LIST" + (5).to_bytes(4, "little") + b"data!\0"  # odd: one byte of padding
    large = b"id3 " + (8000).to_bytes(4, "little") + bytes(8000)
    x, u = rewritten(tmp_path / "a.wav", lambda raw: raw[:36] + note + raw[36:] + large)
    np.testing.assert_allclose(data.load_audio(u), x, atol=1e-4)
    _, u = rewritten(tmp_path / "a.wav", lambda raw: raw[:36] + note + raw[36:-10])
    assert reason(u) == "unreadable"


def test_what_follows_an_mp3_is_not_heard(tmp_path):
    whole = data.load_audio(clip(tmp_path / "a.mp3", sound(np.random.default_rng(5), 2.0)))
    for behind in (b"TAG".ljust(128, b"\0"), b"junk \xff\xfb " * 30):
        (tmp_path / "b.mp3").write_bytes((tmp_path / "a.mp3").read_bytes() + behind)
        audio = data.load_audio(clip(tmp_path / "b.mp3"))
        np.testing.assert_array_equal(audio[:len(whole)], whole)
        assert len(audio) - len(whole) < 0.05 * RATE


def test_a_flac_of_unknown_length_is_read_to_its_end(tmp_path):
    u = clip(tmp_path / "a.flac", sound(np.random.default_rng(5), 3.0))
    whole = data.load_audio(u)
    raw = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(raw[:21] + bytes([raw[21] & 0xF0, 0, 0, 0, 0]) + raw[26:])
    np.testing.assert_array_equal(data.load_audio(u), whole)
    part = data.load_audio(dataclasses.replace(u, start_sec=1.3, duration_sec=0.4))
    np.testing.assert_array_equal(part, whole[20_800:27_200])


# ---------------------------------------------------------------------------- log-mel

def feature_clips():
    rng = np.random.default_rng(6)
    sweep, noise = sound(rng, 3.21), 0.1 * rng.standard_normal(5 * RATE).astype(np.float32)
    return {"noise": noise, "0.1 s": sweep[:1600], "odd length": sweep[:16_159],
            "near silence": noise[:RATE] * 1e-5, "zeros": np.zeros(RATE, np.float32),
            "floor at 80 dB": np.concatenate([1e-3 * noise[:RATE], sweep])}


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("name", feature_clips())
def test_log_mel_is_whispers(name, n_mels):
    audio = feature_clips()[name]
    extractor = WhisperFeatureExtractor(feature_size=n_mels)
    expected = extractor(audio, sampling_rate=RATE, padding=False, truncation=False,
                         return_tensors="np").input_features[0]
    mel = data.log_mel(audio, n_mels)
    assert mel.dtype == torch.float32
    assert mel.shape == (n_mels, len(audio) // data.HOP) == expected.shape
    np.testing.assert_allclose(mel.numpy(), expected, rtol=0, atol=3e-5)
