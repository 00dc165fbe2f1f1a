"""data.py: manifests, batches, plans, the loader's processes, keyed uniforms, the demo corpus.

Audio has tests of its own (test_audio.py), and so have the metric (test_normalize.py) and the
importers (test_corpora.py).

    OMP_NUM_THREADS=1 python -m pytest tests/test_data.py -q
"""

import hashlib
import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from conftest import sound, write_wav
from test_audio import RATE

ROOT = Path(data.__file__).parent


def write_lines(path, *lines):
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)
             for line in lines]
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return path


# ---------------------------------------------------------------------------- manifest

def test_the_fields_of_a_line(tmp_path):
    path = write_lines(
        tmp_path / "m.jsonl",
        {"id": "a", "audio": "wav/a.wav", "text": " hi\u00a0 there\r\n", "language": "EN ",
         "speaker": "s", "channel": 1, "extra": [1]}, "  ",
        {"id": "b", "audio": "/abs/../abs/b.wav", "start": 2, "duration": 1.5},
        {"audio": "x/c.wav"}, {"audio": "x/c.wav", "start": 3}, {"audio": "y/c.wav", "text": ""})
    a, b, c, d, e = data.read_manifest(path)
    assert a == data.Utterance(
        "a", str(tmp_path / "wav/a.wav"), "hi there", "en", 0.0, None, "s", 1, f"{path}:1")
    assert b == data.Utterance("b", "/abs/b.wav", start_sec=2.0, duration_sec=1.5, line=f"{path}:3")
    assert (c.id, d.id, e.id) == ("x/c", "x/c@3", "y/c")
    assert (c.text, e.text) == (None, "")


@pytest.mark.parametrize("row, start, duration", [
    ({"audio_filepath": "a.wav", "offset": 1.5, "duration": 2.0, "lang": "zh"}, 1.5, 2.0),  # NeMo
    ({"audio": "a.wav", "begin_time": 1.5, "end_time": 3.5}, 1.5, 2.0),     # open-audio-opd
    ({"audio": "a.wav", "begin_time": -1, "end_time": -1}, 0.0, None),      # -1: whole file
    ({"audio": "a.wav", "begin_time": 0, "end_time": 3.5}, 0.0, 3.5),
    ({"audio": "a.wav", "start": 1.5, "end": 3.5, "duration": 2.0}, 1.5, 2.0),
    ({"audio": "a.wav", "sentence": "Hi!", "label": 3, "path": None}, 0.0, None),
    ({"audio": "a.wav", "start": None, "duration": None, "text": None}, 0.0, None)])
def test_other_spellings_of_a_line(tmp_path, row, start, duration):
    u, = data.read_manifest(write_lines(tmp_path / "m.jsonl", row))
    assert (u.audio, u.start_sec, u.duration_sec) == (str(tmp_path / "a.wav"), start, duration)
    assert u.language == row.get("lang")


@pytest.mark.parametrize("line, names", [
    ('{"audio": "a.wav"', "{\"audio\": \"a.wav\""), ('["a.wav"]', "a.wav"), ("[]", "[]"),
    ('{"id": "x"}', "no 'audio'; the keys are ['id']"), ('{"audio": 3}', "3"),
    ('{"audio": "a.wav", "id": 17}', "17"), ('{"audio": "a.wav", "text": ["hi"]}', "hi"),
    ('{"audio": "a.wav", "duration": "2.5"}', "2.5"), ('{"audio": "a.wav", "end": true}', "True"),
    ('{"audio": "a.wav", "duration": NaN}', "nan"), ('{"audio": "a.wav", "duration": 0}', "0"),
    ('{"audio": "a.wav", "duration": -2.25}', "-2.25"),
    ('{"audio": "a.wav", "end": Infinity}', "inf"), ('{"audio": "a.wav", "offset": -2}', "-2"),
    ('{"audio": "a.wav", "begin_time": 4, "end_time": 3}', "end 3"),
    ('{"audio": "a.wav", "start": 1, "end": 1}', "end 1"),
    ('{"audio": "a.wav", "start": 1, "end": 3, "duration": 1.97}', "duration 1.97"),
    ('{"audio": "a.wav", "channel": -2}', "-2"), ('{"audio": "a.wav", "channel": 0.5}', "0.5"),
    ('{"audio": "a.wav", "text": "good \\ud83d"}', "'text'"),
    ('{"audio": {"path": "a.wav", "array": [' + "0.125, " * 999 + '1]}}', "'audio'"),
    ('{"audio": "a.wav", "id": "first"}', "line 1 has the id 'first'")])
def test_errors_name_line_and_value(tmp_path, line, names):
    path = write_lines(tmp_path / "m.jsonl", {"id": "first", "audio": "z.wav"}, "", line)
    with pytest.raises(ValueError) as error:
        data.read_manifest(path)
    assert f"{path}:3: " in str(error.value) and names in str(error.value)
    assert len(str(error.value)) < 500


def test_what_is_needed_and_missing_is_said(tmp_path):
    full = {"audio": "a.wav", "text": "", "language": "en"}
    path = write_lines(tmp_path / "m.jsonl", full, "",
                       {"audio": "b.wav", "answer": "hi", "lang": "en"})
    assert len(data.read_manifest(path, need=["language"])) == 2
    with pytest.raises(ValueError, match=f"{path}:3: no 'text'; the keys are .*'answer'"):
        data.read_manifest(path, need=("text", "language"))
    write_lines(path, full, {"audio": "b.wav", "text": "hi", "language": " "})
    with pytest.raises(ValueError, match=f"{path}:2: no 'language'"):
        data.read_manifest(path, need=("text", "language"))


def test_a_language_is_given_to_lines_that_name_none(tmp_path):
    path = write_lines(tmp_path / "m.jsonl", {"audio": "a.wav"}, {"audio": "b.wav", "lang": "en"},
                       {"audio": "c.wav"})
    manifest = data.read_manifest(path, need=("language",), language="ZH-tw")
    assert [u.language for u in manifest] == ["zh-tw", "en", "zh-tw"]
    assert {code: u.id for code, u in manifest.languages.items()} == {"zh-tw": "a", "en": "b"}


def test_a_byte_order_mark_and_blank_lines_hold_nothing(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"audio": "a.wav"}\r\n\r\n\n{"audio": "b.wav"}')
    assert [(u.id, u.line[-2:]) for u in data.read_manifest(path)] == [("a", ":1"), ("b", ":4")]
    empty = write_lines(tmp_path / "empty.jsonl", "")
    with pytest.raises(ValueError, match="empty.jsonl: the manifest has no utterance"):
        data.read_manifest([path, empty])


def test_two_points_lead_from_where_a_link_leads(tmp_path, monkeypatch):
    (tmp_path / "disk/lists").mkdir(parents=True)
    write_lines(tmp_path / "disk/lists/m.jsonl", {"audio": "../a.wav"}, {"audio": "b.wav"})
    (tmp_path / "lists").symlink_to("disk/lists")
    monkeypatch.chdir(tmp_path / "lists")
    for path in (tmp_path / "lists/m.jsonl", "m.jsonl"):
        paths = [u.audio for u in data.read_manifest(path)]
        assert paths == [str(tmp_path / "disk/a.wav"), str(tmp_path / "disk/lists/b.wav")]


def test_a_manifest_is_a_sequence_that_travels_to_other_processes(tmp_path):
    rows = [{"id": str(i), "audio": f"{i}.wav"} for i in range(10)]
    paths = [write_lines(tmp_path / "a.jsonl", *rows[:4]),
             write_lines(tmp_path / "b.jsonl", *rows[4:])]
    assert len(data.read_manifest([*paths, paths[0]])) == 14  # an id is twice, in two files
    manifest = data.read_manifest(paths)
    assert [u.id for u in manifest] == list("0123456789")  # __len__, __getitem__ and its IndexError
    assert [manifest[i].id for i in (-1, np.int64(3))] == ["9", "3"]
    assert [u.id for u in manifest[3:6]] == ["3", "4", "5"]
    assert list(pickle.loads(pickle.dumps(manifest))) == list(manifest)


# ---------------------------------------------------------------------------- other files

def test_what_is_written_can_be_read(tmp_path):
    # A byte-level vocabulary can write any character: str.splitlines cuts at U+2028, JSON has it.
    text = "你好 a\u2028b \U0001f600 \"quoted\""
    path = tmp_path / "new" / "m.jsonl"
    data.write_jsonl(path, [{"id": "a", "audio": "a.wav", "text": text}])
    assert data.read_json(path)["text"] == text and len(data.read_manifest(path)) == 1
    with pytest.raises(TypeError):
        data.write_jsonl(path, [{"id": object()}])
    assert data.read_json(path)["id"] == "a"  # the old file is still there
    data.write_json(path, {"rate": math.nan, "text": "你"})
    assert data.read_json(path) == {"rate": None, "text": "你"}


@pytest.mark.parametrize("raw, found", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs"), (b"", "b''"),
    (b"[1]", r"\[1\]"), ('{"text": "打开"}'.encode("gbk"), "'utf-8' codec can't decode")])
def test_json_of_another_kind_is_named(tmp_path, raw, found):
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(ValueError, match=f"config.json: expected a JSON object, found .*{found}"):
        data.read_json(tmp_path / "config.json")


# ---------------------------------------------------------------------------- batches

@pytest.fixture
def clips(corpus):
    return data.read_manifest(corpus / "train.jsonl")  # 24, of 0.3 to 1.2 s, not sorted


def test_a_row_is_its_clips_features_and_zeros(clips, tmp_path):
    write_wav(tmp_path / "s.wav", np.zeros(RATE))
    silent = data.Utterance("s", str(tmp_path / "s.wav"), line="m.jsonl:7")
    gone = data.Utterance("gone", str(tmp_path / "gone.wav"), line="m.jsonl:9")
    batch = data.load_batch([*clips[14:19], silent, clips[19], gone], n_mels=(80, 128))
    audios = sorted([data.load_audio(u) for u in clips[14:20]], key=len)
    assert sorted(batch.mel) == [80, 128]
    for k, (u, audio, n) in enumerate(zip(batch.utterances, audios, batch.n_frames, strict=True)):
        np.testing.assert_array_equal(audio, data.load_audio(u))
        audio = np.concatenate([audio, np.zeros(max(0, 8000 - len(audio)), np.float32)])
        assert n == len(audio) // 160
        for n_mels, mel in batch.mel.items():
            assert mel.shape == (6, n_mels, batch.n_frames.max()) and mel.dtype == np.float32
            np.testing.assert_array_equal(mel[k, :, :n], data.log_mel(audio, n_mels).numpy())
            assert (mel[k, :, n:] == 0).all()
    assert batch.n_frames.dtype == np.int64 and batch.n_frames.min() == 50  # half a second, padded
    assert batch.audio_sec == pytest.approx(batch.n_frames.sum() / 100)
    assert [reason for reason, _ in batch.rejected] == ["silent", "unreadable"]
    assert "m.jsonl:9" in batch.rejected[1][1]
    with pytest.raises(data.AudioError, match="m.jsonl:7"):
        data.load_batch([clips[0], silent], keep_going=False)
    with pytest.warns(UserWarning, match="silent"):
        assert len(data.load_batch([silent], for_training=False)) == 1


def test_a_batch_without_a_clip_is_a_batch():
    batch = data.load_batch([data.Utterance("x", "/nowhere.wav")], n_mels=(80, 128))
    assert len(batch) == 0 and batch.audio_sec == 0.0
    assert {n: mel.shape for n, mel in batch.mel.items()} == {80: (0, 80, 0), 128: (0, 128, 0)}


def test_parts_of_a_batch_are_cropped_to_their_own_longest_row(clips):
    batch = data.load_batch(clips)
    parts = [batch.rows(i, i + 10) for i in range(0, len(batch), 10)]
    assert [len(part) for part in parts] == [10, 10, 4]
    for k, part in enumerate(parts):
        rows = slice(10 * k, 10 * k + 10)
        assert part.utterances == batch.utterances[rows]
        np.testing.assert_array_equal(part.n_frames, batch.n_frames[rows])
        np.testing.assert_array_equal(part.mel[128], batch.mel[128][rows, :, :part.n_frames.max()])


def test_rows_of_ids_are_padded_on_one_side():
    ids, mask = data.pad_rows([[5, 6, 7], [], [8]], pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 9], [8, 9, 9]] and ids.dtype == torch.long
    assert mask.tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    assert [x.shape for x in data.pad_rows([], 9)] == [(0, 0), (0, 0)]
    ids, mask = data.pad_rows([[9, 1], [9]], pad_id=9, side="left")  # an id may be pad_id
    assert ids.tolist() == [[9, 1], [9, 9]] and mask.tolist() == [[True, True], [False, True]]


# ---------------------------------------------------------------------------- plan

@pytest.mark.parametrize("n, size", [(24, 5), (3, 8), (7, 7)])
def test_a_step_is_a_function_of_seed_and_number(n, size):
    plan = data.Plan(n, size, 3)
    assert plan.steps_per_epoch == -(-n // size)
    for epoch in (2, 0, 1):  # in any order
        # The numbers that old training runs saw: another recipe would change every study.
        order = np.random.default_rng([3, epoch]).permutation(np.arange(n, dtype=np.uint32))
        for i in range(plan.steps_per_epoch):
            step = epoch * plan.steps_per_epoch + i
            assert plan[step] == order[i * size:(i + 1) * size].tolist()


def test_ranks_share_out_each_step(clips):
    plan = data.Plan(24, 23, 0)
    for step in (0, 1, 2):  # step 1 has one row left: a rank without a clip takes part all the same
        for rank in range(2):
            part = data.Steps(clips, plan, rank, 2, (80,))[step]
            mine = {clips[i].id for i in plan[step][rank::2]}
            assert {u.id for u in part.utterances} == mine and len(part) == len(mine)
            assert list(part.mel) == [80]


# ---------------------------------------------------------------------------- the loader

def test_workers_make_the_same_batches_in_order(clips):
    steps = data.Steps(clips, data.Plan(len(clips), 4, 0))
    wanted = [5, 2, 0, 3]
    here = list(data.loader(steps, wanted, 0))
    there = list(data.loader(steps, wanted, 2))
    assert len(here) == len(there) == 4
    for step, one, two in zip(wanted, here, there):
        assert one.utterances == two.utterances == steps[step].utterances
        assert type(two.mel[128]) is np.ndarray  # through the pipe, not through shared memory
        np.testing.assert_array_equal(one.mel[128], two.mel[128])
    assert pickle.loads(pickle.dumps(steps))[5].utterances == here[0].utterances


ENDLESS = """
import sys, time, numpy, data
class Endless:
    def __getitem__(self, step):  # more than a pipe holds: workers wait for room in it
        if step == 7 and sys.argv[1] == "worker fails":
            raise ValueError("seven")
        return data.Batch([], {128: numpy.zeros((4, 128, 3000), numpy.float32)}, numpy.ones(1), [])
for step, batch in enumerate(data.loader(Endless(), range(10 ** 6), 2)):
    if step == 2:
        print("ready", flush=True)
    time.sleep(0.05)
"""


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGKILL", "worker fails"])
def test_no_worker_outlives_the_trainer(how):
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, how], cwd=ROOT, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    workers = children(process.pid)
    assert len(workers) == 2
    if how.startswith("SIG"):  # to the group, as a terminal sends it: only the trainer hears it
        assert {os.getpgid(pid) for pid in workers}.isdisjoint({process.pid})
        os.killpg(process.pid, getattr(signal, how))
    message = process.communicate(timeout=30)[1]
    end = time.time() + 10
    while any(map(runs, workers)) and time.time() < end:
        time.sleep(0.05)
    left = [pid for pid in workers if runs(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left and process.returncode != 0
    if how == "worker fails":
        assert "seven" in message


# ---------------------------------------------------------------------------- keyed uniforms

def test_uniforms_depend_on_their_key_alone():
    names = ["en-17", "zh-3"]
    table = data.keyed_uniforms(7, 11, names, 5)
    for row, name in zip(table, names, strict=True):  # what a resume relies on, in every process
        key = [7, 11, *hashlib.blake2b(name.encode(), digest_size=8).digest()]
        np.testing.assert_array_equal(row, np.random.default_rng(key).random(5, dtype=np.float32))
    np.testing.assert_array_equal(data.keyed_uniforms(7, 11, names[1:], 3), table[1:, :3])


# ---------------------------------------------------------------------------- demo corpus

SMALL = {"test": 4, "dev": 2, "train": 4, "teacher": 6, "pool": 2}


def test_the_demo_is_the_one_that_readme_reports(tmp_path):
    code = "import data, json, sys; data.make_demo(sys.argv[1], 0, json.loads(sys.argv[2]))"
    done = subprocess.run([sys.executable, "-c", code, tmp_path, json.dumps(SMALL)], cwd=ROOT,
                          check=True, capture_output=True, text=True)
    assert "teacher.jsonl: 6 clips" in done.stdout
    lines = b"".join((tmp_path / f"{split}.jsonl").read_bytes() for split in SMALL)
    # Its sentences, voices and lengths.
    assert hashlib.sha256(lines).hexdigest().startswith("3bbb3a5f5f73b20e")
    for split, size in SMALL.items():
        rows = data.read_manifest(tmp_path / f"{split}.jsonl", need=("text", "language"))
        assert len(rows) == size and [u.language for u in rows] == ["en", "zh"] * (size // 2)
        for u in rows:
            assert u.speaker.split("+")[1] in data.CAST[split]
            assert len(data.load_audio(u)) == pytest.approx(u.duration_sec * RATE, abs=1)


def test_voices_of_test_and_dev_are_heard_nowhere_else():
    cast = {split: set(voices) for split, voices in data.CAST.items()}
    assert [len(cast[split]) for split in data.SIZES] == [6, 6, 6, 25, 13]
    assert cast["train"] < cast["pool"] < cast["teacher"] and cast["test"] == cast["dev"]
    assert not cast["test"] & cast["teacher"]
    assert not {"victor", "f2", "f3", "f5"} & (cast["test"] | cast["teacher"])


def test_sentences_of_the_demo_stay_apart_when_they_run_short(tmp_path, monkeypatch):
    # With 40 sentences in all, most draws collide: only the check on what was said helps.
    speech = sound(np.random.default_rng(0), 0.1)
    monkeypatch.setattr(data, "start_espeak", lambda: (RATE, lambda *_, **__: speech))
    monkeypatch.setattr(data, "add_noise", lambda audio, rng: audio)
    numbers = " ".join(map(str, range(40)))
    monkeypatch.setitem(data.GRAMMAR, "en", (["{n}"], {"n": numbers}, ["en-us"], 180))
    (tmp_path / "wav").mkdir()
    sizes = {"test": 16, "dev": 16, "train": 20, "teacher": 100, "pool": 100}
    rows = data.speak_language("en", tmp_path, 0, sizes)
    assert {split: 2 * len(rows[split]) for split in rows} == sizes
    samples = np.frombuffer((tmp_path / "wav/dev-en-00000.wav").read_bytes()[44:], "<i2")
    np.testing.assert_array_equal(samples, np.floor(speech * 32768.0))
    text = {split: {row["text"] for row in rows[split]} for split in rows}
    for split, others in {"test": ["dev", "train", "teacher", "pool"],
                          "dev": ["train", "teacher", "pool"], "train": ["teacher"]}.items():
        assert all(text[split].isdisjoint(text[other]) for other in others)
    assert text["pool"] & text["train"]  # the pool is new audio, not new sentences


def test_noise_and_level_of_the_demo():
    speech = sound(np.random.default_rng(0), 1.0) * (np.arange(RATE) > RATE // 2)
    for seed in range(20):
        audio = data.add_noise(speech, random.Random(seed))
        assert -16 <= 20 * np.log10(np.abs(audio).max()) <= -6
        noise, rest = (audio ** 2).reshape(2, -1).mean(1)  # nothing is said in the first half
        assert 24 < 10 * np.log10((rest - noise) / 2 / noise) < 41
