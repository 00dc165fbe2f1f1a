"""What speech and text *are* in this project: manifests, audio, log-mel, batches, and the metric.

In reading order:
  1. manifest   JSON Lines, one utterance per line                 read_manifest, write_jsonl
  2. audio      file or segment -> 16 kHz mono float32             load_audio
  3. features   Whisper's log-mel, 100 frames per second           log_mel
  4. batches    a pure function of (seed, step): resume is free    load_batch, Plan, Steps, loader
  5. metric     normalised text, edit counts, bootstrap interval   normalize, edit_counts, bootstrap
  6. corpora    manifests for corpora on your disk                 python data.py NAME ROOT OUT
  7. demo       a bilingual corpus spoken by espeak-ng             python data.py demo --out DIR
NAME is librispeech, aishell1, wenetspeech or folder; ROOT holds the corpus, OUT the manifests.

A line of a manifest (paths are relative to the manifest's folder):
  {"id": "en-17", "audio": "wav/en-17.wav", "text": "put two cups on the shelf", "language": "en"}
Optional: "start" and "duration" or "end" in seconds (a segment of a longer file), "speaker", and
"channel", from 0 (else the average of all). Read too: NeMo's audio_filepath, offset, lang, and
open-audio-opd's begin_time, end_time. Other keys are ignored, and so are nulls and times of -1. An
id that is missing is the audio's path without its suffix, then "@" and the start of a segment.

Differs from the paper (numbers go on from model.py):
  [dev 8] A clip under half a second is heard with silence after it, by student and teacher alike.
  [dev 9] A run of Latin letters or digits in Chinese text is one unit of the error rate; the
          paper's scorer counts each character.
"""

import argparse
import ctypes
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import reprlib
import sys
import threading
import unicodedata
import warnings
import wave
from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import av
import ijson
import jiwer
import numpy as np
import torch
import torchaudio
from tqdm import tqdm

SAMPLE_RATE = 16_000  # Hz, mono: what every model here expects
HOP = 160             # samples between mel frames: 100 frames per second
MIN_SEC = 0.1         # a clip is at least this long
SHORT_SEC = 0.5       # a shorter one is padded with silence to this length
MAX_SEC = 30.0        # the longest clip in training, as for the published student
MAX_EVAL_SEC = 40.0   # the longest in evaluation: LibriSpeech's test sets have clips of 35 s


# ------------------------------------------------------------------------------------ 1. manifest

@dataclass(frozen=True)
class Utterance:
    """One line of a manifest. `text` and `language` are None where the line has none."""
    id: str
    audio: str                         # absolute path
    text: str | None = None            # single spaces between words, none at the ends
    language: str | None = None        # as written, in lower case: "en", "zh-tw"
    start_sec: float = 0.0
    duration_sec: float | None = None  # None: to the end of the file
    speaker: str | None = None
    channel: int | None = None         # None: the average of all
    line: str = ""                     # "manifest.jsonl:12", for error messages


def read_manifest(paths, need=(), language=None) -> "Manifest":
    """The utterances of one or more JSON Lines manifests, in the order of the lines.

    need: what every line must have, of "text" (it may be "") and "language". language: of lines
    that name none. Raises ValueError, naming file, line and value, for a line that can't be used
    and an id that is twice in a file; and for a file without an utterance.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    return Manifest([str(path) for path in paths], need, language)


class Manifest(Sequence):
    """A read-only sequence of utterances, 28 bytes each: a line is parsed when it is asked for.

    As objects, the 100,000 h that the paper trains on would take 36 GB in every process.
    """
    def __init__(self, paths, need, language):
        self.paths = paths
        # A ".." in a manifest behind a link leads from where the link leads.
        self.folders = [os.path.realpath(os.path.dirname(path)) for path in paths]
        self.language = language.lower() if language else None
        self.languages = {}  # language or None: the first utterance with it
        places = array("q")  # of each utterance: which path, number of its line, offset in bytes
        durations = array("f")  # seconds, NaN where the line has none
        for k, path in enumerate(paths):
            numbers = {}  # id: number of its line
            offset = 0
            lines = progress(None, path, "line", rows=open(path, "rb"))
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    u = parse_line(line, self.folders[k], f"{path}:{number}", self.language, need)
                    if numbers.setdefault(u.id, number) != number:
                        raise ValueError(f"{u.line}: line {numbers[u.id]} has the id {u.id!r} too")
                    self.languages.setdefault(u.language, u)
                    places.extend((k, number, offset))
                    durations.append(math.nan if u.duration_sec is None else u.duration_sec)
                offset += len(line)
            if not numbers:
                raise ValueError(f"{path}: the manifest has no utterance")
        self.places = np.array(places).reshape(-1, 3)
        self.durations = np.array(durations)

    def __len__(self):
        return len(self.places)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        k, number, offset = self.places[i].tolist()
        with open(self.paths[k], "rb") as file:
            file.seek(offset)
            line = file.readline()
        return parse_line(line, self.folders[k], f"{self.paths[k]}:{number}", self.language)


TYPES = {**dict.fromkeys("id audio text language speaker".split(), [str]), "channel": [int],
         **dict.fromkeys("start_sec duration_sec end_sec".split(), [int, float])}
OTHER_NAMES = {"start": "start_sec", "duration": "duration_sec", "end": "end_sec",
               "audio_filepath": "audio", "offset": "start_sec", "lang": "language",  # NeMo's
               "begin_time": "start_sec", "end_time": "end_sec"}             # open-audio-opd's


def parse_line(line, folder, where, language=None, need=()) -> Utterance:
    """A manifest's line, bytes, with paths relative to `folder` -> its utterance."""
    row = json_object(line, where)
    fields = {}
    for key, value in row.items():
        name = OTHER_NAMES.get(key, key)
        if name not in TYPES or value is None or (name.endswith("_sec") and value == -1):
            continue
        if type(value) not in TYPES[name] or not can_be_used(value):
            raise ValueError(f"{where}: {key!r} has the wrong type or value: {reprlib.repr(value)}")
        fields[name] = value
    fields["language"] = fields.get("language", "").strip().lower() or language
    for name in ("audio", *need):
        if fields.get(name) is None:
            raise ValueError(f"{where}: no {name!r}; the keys are {str(sorted(row))[:300]}")
    start = fields.get("start_sec", 0)
    end = fields.pop("end_sec", start + fields.get("duration_sec", math.inf))
    duration = fields.get("duration_sec", end - start)
    if duration <= 0 or abs(start + duration - end) > 0.02:  # nan without an end
        raise ValueError(f"{where}: no segment: start {start}, duration {duration}, end {end}")
    segment = f"@{start!r}" if start else ""
    fields["id"] = fields.get("id") or os.path.splitext(fields["audio"])[0] + segment
    fields["audio"] = os.path.abspath(os.path.join(folder, fields["audio"]))
    fields["duration_sec"] = duration if duration < math.inf else None
    if "text" in fields:
        fields["text"] = " ".join(fields["text"].split())
    return Utterance(**fields, line=where)


def can_be_used(value) -> bool:
    if isinstance(value, str):
        return not re.search("[\ud800-\udfff]", value)  # half a character, which no file can hold
    return 0 <= value < 1e9  # not nan


def write_jsonl(path, rows) -> None:
    """Writes dicts as JSON Lines, through a temporary file: a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def write_json(path, value) -> None:
    """A value as indented JSON, which has no NaN: a rate of no units becomes null."""
    value = json.loads(json.dumps(value), parse_constant=lambda nan: None)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path) -> dict:
    """The object that a file holds. Raises ValueError naming the file and what it holds instead."""
    return json_object(Path(path).read_bytes(), path)


def json_object(raw, where) -> dict:
    try:
        return {**json.loads(raw.decode("utf-8-sig"))}  # -sig: Windows may put a mark in front
    except (ValueError, TypeError) as error:  # a git-lfs pointer, say; TypeError: a list
        raise ValueError(f"{where}: expected a JSON object, found {raw[:60]!r}: {error}") from None


def progress(total, name, unit, rank=0, initial=0, rows=None) -> tqdm:
    """A progress bar on rank 0, for what takes over a second. A log file gets a line every 20 s."""
    return tqdm(rows, name, total, unit=unit, initial=initial, disable=rank > 0, delay=1,
                mininterval=0.5 if sys.stderr.isatty() else 20.0, dynamic_ncols=True)


# --------------------------------------------------------------------------------------- 2. audio

class AudioError(ValueError):
    """A clip that can't be used. `reason` is a short constant that rejections are counted by."""
    def __init__(self, utterance, reason, detail):
        super().__init__(f"{utterance.line}: {utterance.id}: {utterance.audio}: {reason}: {detail}")
        self.reason = reason


# What decoding raises; IndexError: the file has no audio.
UNREADABLE = (av.FFmpegError, OSError, ValueError, IndexError)


def load_audio(utterance, for_training=True) -> np.ndarray:
    """One clip: what FFmpeg reads (wav, flac, mp3, opus, m4a, ...) -> (n,) float32 at 16 kHz.

    Nothing is cut to fit. Raises AudioError, naming the line: unreadable (a cut-off file too, but
    for Ogg and webm, which look whole), past_end, too_short, too_long, no_channel, not_finite; and
    silent, unless the text is "". for_training=False: up to MAX_EVAL_SEC, and silence only warns.
    """
    u = utterance
    max_sec = MAX_SEC if for_training else MAX_EVAL_SEC
    wanted_sec = min(u.duration_sec or math.inf, max_sec + 1.0)
    try:
        channels = decode(u.audio, u.start_sec, wanted_sec)  # (C, n)
    except UNREADABLE as error:
        raise AudioError(u, "unreadable", " ".join(str(error).split())) from None
    seconds = round(channels.shape[1] / SAMPLE_RATE, 2)  # resampling may add or drop a sample
    # A manifest may give a file's length rounded to 10 ms; more than that missing is an error.
    if seconds == 0 or u.duration_sec is not None and seconds < wanted_sec - 0.0101:
        raise AudioError(u, "past_end", f"the file has {seconds} s from {u.start_sec} s on")
    if not MIN_SEC <= seconds <= max_sec:
        reason = "too_short" if seconds < MIN_SEC else "too_long"
        raise AudioError(u, reason, f"{u.duration_sec or seconds} s, not {MIN_SEC} to {max_sec} s")
    if u.channel is not None and u.channel >= len(channels):
        raise AudioError(u, "no_channel", f"channel {u.channel} of {len(channels)}, from 0")
    audio = channels.mean(0) if u.channel is None else channels[u.channel]
    if not np.isfinite(audio).all():
        raise AudioError(u, "not_finite", "NaN or infinite samples")
    if np.abs(audio - audio.mean()).max() < 1e-4 and u.text != "":  # -80 dBFS
        error = AudioError(u, "silent", "no sample is above 0.0001 of full scale, an offset aside")
        if for_training:
            raise error
        warnings.warn(str(error))  # shown once per clip
    return audio


def decode(path, start_sec, seconds):
    """`seconds` of a file from start_sec on, or less at its end: -> (C, n) float32 at 16 kHz."""
    samples = av.AudioFifo()  # at the file's own rate and format: cut first, resampled once
    run_up = None             # samples before start_sec
    for begin_sec, frame in decoded_frames(path, start_sec):
        rate = frame.sample_rate
        if run_up is None:
            run_up = round((start_sec - begin_sec) * rate)
        frame.pts = None      # else AudioFifo would compare it with its own count
        samples.write(frame)
        if samples.samples >= run_up + seconds * rate:
            break
    if run_up > 0:
        samples.read(run_up, partial=True)
    clip = samples.read(round(seconds * rate), partial=True)
    if clip is None:
        return np.zeros((1, 0), dtype=np.float32)
    resampler = av.AudioResampler(format="fltp", rate=SAMPLE_RATE)
    parts = resampler.resample(clip) + resampler.resample(None)  # None: what the filter still holds
    return np.concatenate([part.to_ndarray() for part in parts], axis=1)


def decoded_frames(path, start_sec=0.0):
    """Yields (second that it begins at, FFmpeg's frame) from a second before start_sec to the end.

    Raises one of UNREADABLE; also at a hole, and at an end that comes before the header's.
    """
    # Without the option a wav takes 5 ms to open instead of one.
    with av.open(path, options={"max_probe_packets": "1"}) as container:
        if container.format.name == "wav":
            check_wav(path)
        stream = container.streams.audio[0]
        tick_sec = stream.time_base
        promised_sec = float((stream.duration or 0) * tick_sec)  # 0: unknown, as in webm
        first_sec = None  # an mp3 does not begin at 0
        if 1.0 < start_sec < promised_sec:
            first_sec = float((stream.start_time or 0) * tick_sec)
            early_sec = first_sec + start_sec - 1.0  # lossy codecs need a run-up
            container.seek(round(early_sec / tick_sec), stream=stream)
        end_sec = None    # of the frame before
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.InvalidDataError:
                if container.format.name != "mp3":
                    raise
                continue  # padding or a tag behind the last frame
            for frame in frames:
                at_sec = frame.time
                if at_sec is None or end_sec is not None and abs(at_sec - end_sec) > 0.1:
                    raise ValueError(f"joined files, or a hole: {at_sec} s comes after {end_sec} s")
                if first_sec is None:
                    first_sec = at_sec
                end_sec = at_sec + frame.samples / frame.sample_rate
                yield at_sec - first_sec, frame
        if end_sec is None or end_sec - first_sec < promised_sec - 0.05:
            raise ValueError(f"cut off: {promised_sec:.2f} s by its header, it ends at {end_sec} s")


def check_wav(path) -> None:
    """Raises ValueError for a wav that is shorter, or far longer, than its header says."""
    with open(path, "rb") as file:
        file.seek(12)
        while file.read(4) not in (b"data", b""):  # chunks: name, size, content of an even length
            size = int.from_bytes(file.read(4), "little")
            file.seek(size + size % 2, os.SEEK_CUR)
        size = int.from_bytes(file.read(4), "little")
        found = os.path.getsize(path) - file.tell()
    # What writes to a pipe leaves 0 as the size, or the largest number. Other chunks may follow.
    if 0 < size < 0x7FFF0000 and not size <= found <= size + 2 ** 16:
        raise ValueError(f"{size} bytes of samples by the header, {found} found")


# ------------------------------------------------------------------------------------ 3. features

def log_mel(audio, n_mels=128) -> torch.Tensor:
    """Whisper's features of one clip: (n,) at 16 kHz -> (n_mels, T = n // 160) float32."""
    power = mel_transform(n_mels)(torch.from_numpy(audio))  # (n_mels, T + 1)
    logs = power[:, :-1].clamp(min=1e-10).log10()           # Whisper drops the half-empty frame
    logs = torch.maximum(logs, logs.max() - 8.0)            # 80 dB below the loudest bin
    return (logs + 4.0) / 4.0


@lru_cache
def mel_transform(n_mels):
    return torchaudio.transforms.MelSpectrogram(
        SAMPLE_RATE, n_fft=400, hop_length=HOP, f_max=SAMPLE_RATE / 2, n_mels=n_mels,
        norm="slaney", mel_scale="slaney")


# ------------------------------------------------------------------------------------- 4. batches

@dataclass
class Batch:
    """Clips that go through a model together, shortest first.

    A worker sends arrays of numpy through a pipe. It would send tensors through shared memory, and
    where that is full (Docker gives 64 MB) a run hangs.
    """
    utterances: list[Utterance]
    mel: dict[int, np.ndarray]            # n_mels: (B, n_mels, T) float32, zeros behind a row's end
    n_frames: np.ndarray                  # (B,) int64, mel frames of each row
    rejected: list                        # (reason, message) of clips that were left out
    heard: dict = field(default_factory=dict)  # see model.hear

    def __len__(self):
        return len(self.utterances)

    @property
    def audio_sec(self) -> float:
        return self.n_frames.sum().item() * HOP / SAMPLE_RATE

    def rows(self, i, j) -> "Batch":
        """Rows i:j, without the columns that only longer rows need."""
        n_frames = self.n_frames[i:j]
        longest = n_frames.max(initial=0)
        mel = {n_mels: frames[i:j, :, :longest] for n_mels, frames in self.mel.items()}
        heard = {asr: rows[i:j] for asr, rows in self.heard.items()}
        return Batch(self.utterances[i:j], mel, n_frames, [], heard)


def load_batch(utterances, n_mels=(128,), for_training=True, keep_going=True) -> Batch:
    """Decodes clips, sorts them by length, pads their features; n_mels: of all models of a run.

    for_training: see load_audio. keep_going: a clip that can't be used goes to `rejected`; else its
    AudioError is raised.
    """
    clips = []  # (utterance, audio (n,))
    rejected = []
    for utterance in utterances:
        try:
            clips.append((utterance, load_audio(utterance, for_training)))
        except AudioError as error:
            if not keep_going:
                raise
            rejected.append((error.reason, str(error)))
    clips.sort(key=lambda clip: len(clip[1]))
    # Qwen3-ASR pads a clip under half a second with silence. [dev 8] The student hears the same.
    short = round(SHORT_SEC * SAMPLE_RATE)
    audios = [np.pad(audio, (0, max(0, short - len(audio)))) for _, audio in clips]
    n_frames = np.array([len(audio) // HOP for audio in audios], dtype=np.int64)
    mel = {}
    for bins in set(n_mels):
        mel[bins] = np.zeros((len(audios), bins, n_frames.max(initial=0)), dtype=np.float32)
        for row, audio, n in zip(mel[bins], audios, n_frames):
            row[:, :n] = log_mel(audio, bins).numpy()
    return Batch([utterance for utterance, _ in clips], mel, n_frames, rejected)


def pad_rows(rows, pad_id, device=None, side="right"):
    """Lists of ids -> ids (B, R), padded with pad_id on one side; mask (B, R), True at real ids."""
    lengths = [len(row) for row in rows]
    mask = torch.arange(max(lengths, default=0)) < torch.tensor(lengths)[:, None]
    if side == "left":
        mask = mask.flip(1)
    ids = torch.full(mask.shape, pad_id)
    ids[mask] = torch.tensor([i for row in rows for i in row], dtype=torch.long)
    return ids.to(device), mask.to(device)


class Plan:
    """Which utterances make up optimiser step s: a pure function of (seed, s), so resume is free.

    An epoch is a seeded shuffle cut into batches; the last one may be smaller. With clips of one
    length in each batch, a model from scratch was measured to stay on its first plateau more than
    twice as long.
    """
    def __init__(self, n_utterances, global_batch, seed):
        self.n_utterances = n_utterances
        self.global_batch = global_batch
        self.seed = seed
        self.steps_per_epoch = math.ceil(n_utterances / global_batch)

    def __getitem__(self, step) -> list[int]:
        """Indices of the utterances of one step."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        order = shuffled(self.n_utterances, self.seed, epoch)
        return order[batch * self.global_batch:(batch + 1) * self.global_batch].tolist()


@lru_cache(maxsize=1)  # the next step asks for the same one
def shuffled(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(np.arange(n, dtype=np.uint32))


@dataclass
class Steps(torch.utils.data.Dataset):
    """Item s = this rank's share of optimiser step s, maybe none of it.

    Together the ranks have all of it: any number of processes makes the same update.
    """
    utterances: Sequence[Utterance]
    plan: Plan
    rank: int = 0
    world: int = 1
    n_mels: tuple[int, ...] = (128,)

    def __getitem__(self, step) -> Batch:
        share = self.plan[step][self.rank::self.world]
        return load_batch([self.utterances[i] for i in share], self.n_mels)


def loader(dataset, items, workers):
    """dataset[i] for i in `items`, in order, made ahead of time by processes that end with this."""
    return torch.utils.data.DataLoader(
        dataset, batch_size=None, sampler=items, num_workers=workers, worker_init_fn=start_worker,
        timeout=1800 if workers else 0)  # seconds: a file system that hangs ends the run


def start_worker(_number):
    os.setsid()  # Ctrl-C and torchrun signal a whole group; the trainer may go on and save first

    def end_with_trainer():  # DataLoader's own watch does not end one that waits for a full pipe
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=end_with_trainer, daemon=True).start()


def keyed_uniforms(seed, step, ids, count):
    """Uniforms in [0, 1) by (seed, step, id, column) alone: -> (len(ids), count) float32.

    A rollout drawn with them is the same in any batch, on any number of ranks, after a resume
    (but for a draw within rounding of the border between two tokens).
    """
    uniforms = np.zeros((len(ids), count), dtype=np.float32)
    for row, name in zip(uniforms, ids):
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()  # the same in every process
        rng = np.random.default_rng([seed, step, *digest])
        row[:] = rng.random(count, dtype=np.float32)
    return uniforms


# -------------------------------------------------------------------------------------- 5. metric

METRIC = "opd-asr-3"  # version of the metric: raise it with any change of a rule or table

# What a label may be, or have as a part: zh-TW, "simplified chinese".
CHINESE = set("zh zho chi cmn cn yue wuu nan hak gan hsn chinese mandarin cantonese 中文 汉语 普通话 "
              "国语 粤语".split())
ENGLISH = {"en", "eng", "english"}
TURKIC = set("tr tur turkish az aze azerbaijani".split())  # I is the capital of ı, İ of i
BY_CHARACTER = set("ja jpn japanese ko kor korean th tha thai lo lao km khm khmer my mya burmese"
                   .split())
# For [...]: Thai and Lao; Burmese; Khmer; CJK and kana; more Burmese; hangul; more CJK.
ONE_CHARACTER = ("\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uaa60-\uaa7f\uac00-\ud7af"
                 "\uf900-\ufaff\U00020000-\U0003ffff")
# A run of anything else is one unit, of Latin letters and digits in Chinese text, too. [dev 9]
UNIT = re.compile(rf"[{ONE_CHARACTER}]|[^\s{ONE_CHARACTER}]+")
APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u201b\u02bc\u00b4`", "'"))
# Soft hyphen, zero width, joiners, direction, variation of emoji: they separate no words.
INVISIBLE = re.compile("[\u00ad\u061c\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff]")


def normalize(text: str, language: str | None) -> str:
    """The text that is scored: units separated by single spaces. This function *is* the metric.

    Apostrophes straightened, NFKC (full width to half width), lower case, then by the language:
      English            Whisper's normaliser: contractions, numbers and spelling; uh and um go
      Chinese            `mandarin`: numbers as they are said, simplified hanzi; then `words`
      others, or None    `words`: letters, digits and marks
    The unit is decided by the script, not by the label: one character of CJK, kana, hangul, Thai,
    Lao, Khmer or Burmese is one, and a run of anything else is one: "请 打 开 a 灯", "do not stop".
    """
    parts = label_parts(language)
    text = INVISIBLE.sub("", text).translate(APOSTROPHES)  # before NFKC, which takes ´ apart
    text = unicodedata.normalize("NFKC", text)
    if parts[0] in TURKIC:
        text = text.replace("I", "ı").replace("İ", "i")
    text = text.lower()
    if CHINESE & set(parts):
        text = words(mandarin(text))
    elif parts[0] in ENGLISH:
        text = normalizer("en")(text)
    else:
        text = words(text)
    # Whisper's normaliser leaves a symbol of its numbers where it was alone, as in "...".
    return " ".join(unit for unit in UNIT.findall(text) if unit.strip(".%$¢€£"))


def rate_name(language: str | None) -> str:
    """"CER" or "WER": what an error rate is called. The units are those of `normalize` in both."""
    parts = label_parts(language)
    return "CER" if CHINESE & set(parts) or parts[0] in BY_CHARACTER else "WER"


def label_parts(language) -> list[str]:
    """"zh-CN" -> ["zh", "cn"]; None -> [""]."""
    return re.findall(r"[^\W\d_]+", (language or "").lower()) or [""]


def words(text: str) -> str:
    """Letters, digits, marks, an apostrophe inside a word, a point between digits; else spaces."""
    kept = [c if unicodedata.category(c)[0] in "LNM" or c in "'." else " " for c in text]
    return re.sub(r"(?<!\w)'|'(?!\w)|(?<!\d)\.|\.(?!\d)", " ", "".join(kept))


# What wetext reads in capitals only: currencies, A$, o2o.
CAPITALS = re.compile(r"(?<![a-z])(?:(?:cny|rmb|hkd|usd|eur|gbp|jpy)(?=\s?\d)|[a-z](?=\$\d)"
                      r"|[a-z]2[a-z](?![a-z]))")
SAID_ALIKE = str.maketrans("两幺〇", "二一零")


def mandarin(text: str) -> str:
    """Numbers, dates, times, amounts, units -> simplified hanzi as they are said, by wetext.

    For text in NFKC and lower case. What is said in two ways is folded: 两 is 二, 幺 is 一, 〇 is 零,
    百分之一百 is 百分之百.
    """
    text = text.replace("\u2044", "/")                             # NFKC writes ½ with this slash
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)            # 1,000: it stops at the comma
    text = re.sub(r"(?<=[\d%])\s*[–—−~]\s*(?=\d)", "-", text)     # it knows one of the dashes
    text = re.sub(r"%\s*-\s*(?=\d)", "%到", text)  # the 30 of 20%-30% is not negative
    text = re.sub(r"(?<=[a-z])-(?=\d)", " ", text)  # nor is the 19 of covid-19
    text = re.sub(r"约(?=\d)", "约 ", text)         # 约1/4 becomes 四分之约一
    text = CAPITALS.sub(lambda match: match[0].upper(), text)
    text = normalizer("zh")(text).lower().translate(SAID_ALIKE)
    return re.sub("百分之一百(?![零一二三四五六七八九])", "百分之百", text)


@lru_cache
def normalizer(language):
    # Imported when needed: transformers' takes seconds, wetext half a second.
    if language == "en":  # Whisper's, with its 1,739 spellings (MIT)
        from transformers.models.whisper.english_normalizer import EnglishTextNormalizer
        return EnglishTextNormalizer(read_json(Path(__file__).parent / ".assets" / "english.json"))
    from wetext import Normalizer
    return Normalizer(lang="zh", operator="tn", traditional_to_simple=True, remove_erhua=False,
                      remove_interjections=False).normalize


class Counts(NamedTuple):
    """Edit operations that turn the reference into the hypothesis, and the reference's units."""
    substitutions: int
    deletions: int
    insertions: int
    units: int

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions


def edit_counts(ref: str, hyp: str, language: str | None) -> Counts:
    """Levenshtein counts over normalised units. An empty reference counts its insertions.

    Copies out with all of this section, read_json and .assets/english.json.
    """
    out = jiwer.process_words(normalize(ref, language), normalize(hyp, language))
    units = out.hits + out.substitutions + out.deletions
    return Counts(out.substitutions, out.deletions, out.insertions, units)


def bootstrap(numerators, denominators, blocks=None, strata=None, draws=1000, seed=0):
    """Rates sum(numerators) / sum(denominators) of corpora drawn anew: (n,) -> (draws,).

    (n, K) -> (draws, K): K systems on the same draws, so a difference of columns is paired. Drawn
    are utterances (Bisani & Ney, ICASSP 2004) or whole `blocks`, each utterance's label: a speaker,
    say. strata: labels too; as many blocks as a stratum has are drawn in it, so that a rate over
    two languages keeps their mix. nan: draws without a unit, and all if no stratum has two blocks.
    """
    numerators, denominators = np.array([numerators, denominators], dtype=np.float64)
    blocks = np.arange(len(numerators)) if blocks is None else np.array(blocks)
    strata = np.zeros(len(numerators)) if strata is None else np.array(strata)
    groups = []  # of each stratum: its utterances, the place of each one's block, how many blocks
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        names, block = np.unique(blocks[members], return_inverse=True)
        groups.append((members, block, len(names)))
    rates = np.full((draws, *numerators.shape[1:]), np.nan)
    rng = np.random.default_rng(seed)
    times = np.zeros(len(numerators))  # how often each utterance is drawn
    for i in range(draws if max(n for _, _, n in groups) > 1 else 0):
        for members, block, n in groups:
            times[members] = rng.multinomial(n, np.full(n, 1 / n))[block]
        drawn = times @ denominators
        rates[i] = times @ numerators / np.where(drawn > 0, drawn, np.nan)
    return rates


def interval(rates):
    """95 % interval of `bootstrap`'s rates: (draws,) -> low, high; (draws, K) -> (K,), (K,).

    Draws that are nan are left out. (nan, nan) if they are more than a tenth: fewer than three or
    so utterances have a reference then, and what varies is whether one is drawn.
    """
    undefined = np.isnan(rates).mean(0) > 0.1
    ends = np.nanpercentile(np.where(undefined, 0.0, rates), [2.5, 97.5], axis=0)
    return tuple(np.where(undefined, np.nan, ends))


# ------------------------------------------------------------------------------------- 6. corpora

# A corpus is a generator of (name of a manifest, row): "audio" is an absolute path; "text" is ""
# where a promised transcript is missing.

AUDIO_SUFFIXES = set(".wav .flac .mp3 .ogg .oga .opus .m4a .aac .mp4 .webm .mka .mkv .wma .amr "
                     ".aiff .aif .aifc .au .snd .caf .w64 .rf64 .sph".split())
WENETSPEECH = {"L": "train", "M": "train_m", "S": "train_s",  # subset: name of its manifest
               "DEV": "dev", "TEST_NET": "test_net", "TEST_MEETING": "test_meeting"}


def librispeech(root):
    """SUBSET/SPEAKER/CHAPTER/*.flac somewhere below ROOT, SPEAKER-CHAPTER.trans.txt beside them."""
    yield from transcribed(root, "*.trans.txt", "*.flac", place=-4, glue=" ", language="en")


def aishell1(root):
    """wav/SPLIT/SPEAKER/*.wav and aishell_transcript_v0.8.txt somewhere below ROOT."""
    yield from transcribed(root, "aishell_transcript*.txt", "*.wav", place=-3, glue="",
                           language="zh")


def transcribed(root, transcripts, audios, place, glue, language):
    """Rows of audio files, whose transcripts are lines of an id and words, joined by `glue`.

    place: of the split's name in a path, before the speaker's.
    """
    texts = {}
    for path in sorted(root.rglob(transcripts)):
        for line in filter(str.strip, read_text(path).splitlines()):
            name, *words = line.split()
            texts[name] = glue.join(words)
    for path in sorted(root.rglob(audios)):
        split = path.parts[place]
        yield split, {"id": path.stem, "audio": str(path), "text": texts.pop(path.stem, ""),
                      "language": language, "speaker": path.parts[place + 1]}
    for name in texts:
        yield "transcripts", {"audio": name}  # which is no file


def wenetspeech(root):
    """WenetSpeech.json in ROOT, and the .opus files that it names.

    Manifests of segments: train (L), train_m, train_s (parts of L), dev, test_net, test_meeting.
    """
    path = root / "WenetSpeech.json"
    try:  # object by object: as a whole, its 6 GB take tens in memory
        for audio in ijson.items(path.open("rb"), "audios.item", use_float=True):
            file = str(root / audio["path"])
            for segment in audio["segments"]:
                start = segment["begin_time"]
                row = {"id": segment["sid"], "audio": file, "text": segment["text"] or "",
                       "language": "zh", "start": start,
                       "duration": round(segment["end_time"] - start, 4)}
                for subset in filter(WENETSPEECH.get, segment["subsets"]):  # W has no manifest
                    yield WENETSPEECH[subset], row
    except (ijson.JSONError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cut off, or of another form: {error!r}") from None


def folder(root, language=None):
    """Audio files anywhere below ROOT; the transcript of x.wav is x.txt, where there is one.

    An id is the path below ROOT with - for /. Hidden files and links to folders are not entered.
    """
    found = sorted(path for path in root.rglob("*") if not path.is_dir())
    files = [path for path in found if "/." not in f"/{path.relative_to(root)}"]
    audios = [path for path in files if path.suffix.lower() in AUDIO_SUFFIXES]
    transcripts = {path.with_suffix(".txt") for path in audios} & set(files)
    for path in files:
        if path in transcripts:
            continue
        row = {"id": "-".join(path.relative_to(root).with_suffix("").parts), "audio": str(path)}
        transcript = path.with_suffix(".txt")
        text = read_text(transcript).strip() if transcript in transcripts else ""
        if text:
            row["text"] = text
        if language:
            row["language"] = language
        yield root.name, row


def read_text(path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # -sig: without some editors' byte-order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8: {error}") from None


CORPORA = {function.__name__: function for function in (librispeech, aishell1, wenetspeech, folder)}


def write_corpus(rows, out) -> None:
    """Writes (manifest's name, row) pairs as OUT/NAME.jsonl; prints what is in each and what isn't.

    Rows are held until all are read: about 10 GB for WenetSpeech's 15 million. Raises ValueError,
    and writes none, where two rows have one id or no row is left.
    """
    out = Path(os.path.realpath(out))  # a path relative to a link would lead elsewhere
    out.mkdir(parents=True, exist_ok=True)
    manifests = defaultdict(dict)      # name: {id: row}
    remarks = defaultdict(list)        # (name, remark): audio of the rows that it is about
    left_out = Counter()               # name: rows
    for name, row in progress(None, "corpus", "clip", rows=rows):
        reason = why_left_out(row)
        if reason:
            left_out[name] += 1
            remarks[name, f"left out, {reason}"].append(row["audio"])
            continue
        other = manifests[name].setdefault(row["id"], row)
        if other is not row:
            raise ValueError(f"{other['audio']} and {row['audio']} have one id, {row['id']!r}")
        if "text" not in row:
            remarks[name, "without text"].append(row["audio"])
        if row["duration"] > MAX_SEC:
            remarks[name, f"over {MAX_SEC} s, not trained on"].append(row["audio"])
    for (name, remark), found in remarks.items():
        print(f"{name}: {len(found)} {remark}; the first is {found[0]}")
    if not manifests:
        raise ValueError("no utterance is left")
    for name, kept in manifests.items():
        relative = (row | {"audio": os.path.relpath(row["audio"], out)} for row in kept.values())
        write_jsonl(out / f"{name}.jsonl", relative)
        hours = sum(row["duration"] for row in kept.values()) / 3600
        print(f"{out / name}.jsonl: {len(kept)} utterances, {hours:.2f} hours; "
              f"{left_out[name]} left out")


def why_left_out(row) -> str | None:
    """None for a row that can be used. Adds the duration of a whole file, which is decoded once."""
    path = Path(row["audio"])
    if not path.is_file():  # a link to a file that was not fetched, too
        return "no audio file"
    if path.suffix.lower() not in AUDIO_SUFFIXES:
        return f"*{path.suffix} is not read"
    if "text" in row and not row["text"].strip():
        return "no transcript"
    try:
        if "duration" not in row:
            for begin_sec, frame in decoded_frames(row["audio"]):
                row["duration"] = round(begin_sec + frame.samples / frame.sample_rate, 4)
    except UNREADABLE:
        return "unreadable"
    return "bad times" if row.get("start", 0) < 0 or row["duration"] <= 0 else None


# --------------------------------------------------------------------------------- 7. demo corpus

# Clips of each split, half of them English, half Mandarin.
SIZES = {"test": 500, "dev": 100, "train": 700, "teacher": 4500, "pool": 500}
# Whose sentences a split may not repeat: dev's and test's occur nowhere else, and the teacher's
# corpus has none of train's.
AVOIDS = {"test": "", "dev": "test", "train": "test dev", "teacher": "test dev train",
          "pool": "test dev"}

# Voices that a recogniser understood. victor, f2, f3 and f5 are left out: they read uninitialised
# memory, so the same text would not give the same bytes twice.
HEARD = "gustave m3 Annie Storm zac m1 benjamin steph klatt6 belinda m6 travis ian".split()
UNSEEN = "m5 quincy Mike max edward michel".split()
FURTHER = "caleb adam iven4 Denis david m7 f4 m8 Michael m2 klatt2 grandma".split()
CAST = {"test": UNSEEN, "dev": UNSEEN, "train": HEARD[:6], "teacher": HEARD + FURTHER,
        "pool": HEARD}

# Of each language: patterns, and words for their slots. So few that half a million parameters can
# learn them, and enough combinations that the audio is needed. Then espeak-ng's names of it, and
# the slowest speech in words per minute.
GRAMMAR = {
    "en": (["{verb} the {colour} {thing}", "{number} {thing}s {where}",
            "{name} has {number} {thing}s", "the {colour} {thing} is {where}",
            "{verb} {number} {thing}s {when}"],
           {"verb": "bring find paint hide clean open",
            "colour": "red green yellow black white purple",
            "thing": "lamp table window basket pencil camera",
            "number": "two three five six seven nine", "name": "anna peter oscar laura",
            "where": "upstairs outside downtown nearby", "when": "today tomorrow tonight"},
           ["en-us"], 180),
    "zh": (["{verb}{colour}{thing}", "{where}有{number}个{thing}", "{name}有{number}个{thing}",
            "{colour}{thing}在{where}", "{when}{verb}{number}个{thing}"],
           {"verb": "拿来 找到 打开 修理 洗净 藏好", "colour": "红色 绿色 黄色 黑色 白色 紫色",
            "thing": "台灯 桌子 窗户 篮子 铅笔 书包", "number": "两 三 五 七 八 九",
            "name": "小明 李华 王芳 张伟", "where": "桥下 厨房 河边 车站", "when": "今天 明天 今晚"},
           ["cmn"], 220)}


def make_demo(out, seed=0, sizes=SIZES) -> None:
    """Writes OUT/{train,teacher,pool,dev,test}.jsonl and OUT/wav: English and Mandarin in turn.

    Few voices: train. More: pool, audio for TD. Still more: teacher, without a sentence of train.
    Voices and sentences of dev and test are in none of these.
    """
    out = Path(out)
    (out / "wav").mkdir(parents=True, exist_ok=True)
    # A fresh process each: espeak-ng repeats its bytes only for the same calls in the same order.
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as processes:
        tasks = [(language, out, seed, sizes) for language in GRAMMAR]
        english, mandarin = processes.starmap(speak_language, tasks)
    for split in sizes:
        rows = [row for pair in zip(english[split], mandarin[split]) for row in pair]
        write_jsonl(out / f"{split}.jsonl", rows)
        print(f"{out / split}.jsonl: {len(rows)} clips")


def speak_language(language, out, seed, sizes):
    """Synthesises one language of the demo in this (fresh) process -> {split: rows of manifest}."""
    torch.set_num_threads(1)  # clips are short: a second thread would only wait
    rate, say = start_espeak()
    resample = torchaudio.transforms.Resample(rate, SAMPLE_RATE)
    rng = random.Random(f"demo/{seed}/{language}")
    patterns, slots, names, slowest = GRAMMAR[language]
    rows = {}
    bar = progress(sum(sizes.values()) // 2, f"demo corpus, {language}", "clip")
    for split, size in sizes.items():
        taken = {row["text"] for other in AVOIDS[split].split() for row in rows[other]}
        rows[split] = []
        while len(rows[split]) < size // 2:
            pattern = rng.choice(patterns)
            filled = {slot: rng.choice(choices.split()) for slot, choices in slots.items()}
            text = pattern.format(**filled)
            if text in taken:
                continue
            voice = f"{rng.choice(names)}+{rng.choice(CAST[split])}"
            speed = rng.randint(slowest, slowest + 45)
            speech = say(text, voice, speed, pitch=rng.randint(35, 65))
            audio = add_noise(resample(torch.from_numpy(speech)).numpy(), rng)
            name = f"{split}-{language}-{len(rows[split]):05d}"
            with wave.open(f"{out}/wav/{name}.wav", "wb") as file:
                file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))  # one channel, two bytes
                in_32_bits = np.rint(audio * 2.0 ** 31).astype(np.int64)
                file.writeframes((in_32_bits >> 16).astype("<i2").tobytes())
            rows[split].append({"id": name, "audio": f"wav/{name}.wav", "text": text,
                                "language": language,
                                "duration": round(len(audio) / SAMPLE_RATE, 4), "speaker": voice})
            bar.update()
    bar.close()
    return rows


def add_noise(audio, rng):
    """Clean speech -> a clip with noise 25 to 40 dB below it and a peak of -16 to -6 dBFS."""
    noise_rng = np.random.default_rng(rng.getrandbits(32))
    noise = noise_rng.standard_normal(len(audio)).astype(np.float32)
    width = rng.choice([1, 2, 4, 8])  # of a moving average: white to dull
    noise = np.convolve(noise, np.ones(width), "same")
    ratio = np.sqrt((audio ** 2).mean() / (noise ** 2).mean())
    audio = audio + noise * ratio * 10 ** (-rng.uniform(25, 40) / 20)
    return audio * 10 ** (rng.uniform(-16, -6) / 20) / np.abs(audio).max()


def start_espeak():
    """espeak-ng by ctypes, one engine per process: -> rate in Hz, a function that says a text."""
    import espeakng_loader  # only the demo needs it
    lib = ctypes.CDLL(espeakng_loader.get_library_path())
    # 2: synchronous; 0: pieces of default length; 0x8000: do not exit if the data is missing.
    rate = lib.espeak_Initialize(2, 0, espeakng_loader.get_data_path().encode(), 0x8000)
    pieces = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def receive(samples, n, _events):
        if samples and n > 0:
            pieces.append(np.ctypeslib.as_array(samples, (n,)).copy())
        return 0  # go on
    lib.espeak_SetSynthCallback(receive)

    def say(text, voice, words_per_minute, pitch):
        """Speech (n,), float32 in [-1, 1]. pitch: 0 to 100."""
        pieces.clear()
        failed = lib.espeak_SetVoiceByName(voice.encode())
        lib.espeak_SetParameter(1, words_per_minute, 0)  # 1: speed
        lib.espeak_SetParameter(3, pitch, 0)             # 3: pitch
        raw = text.encode() + b"\0"
        # Position 0 in characters (1) to the end (0), text in UTF-8 (1).
        failed += lib.espeak_Synth(raw, ctypes.c_size_t(len(raw)), 0, 1, 0, 1, None, None)
        if failed or not pieces:
            raise RuntimeError(f"espeak-ng could not say {text!r} with the voice {voice!r}")
        return np.concatenate(pieces).astype(np.float32) / 32768.0
    say.receive = receive  # kept alive: the library holds a bare pointer to it
    return rate, say


# ------------------------------------------------------------------------------- the command line

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """A script's docstring, line by line, and the default of each flag. For all scripts."""


def at_least(low):
    """Type of a flag: a finite number from `low` on, whole if `low` is an int. For all scripts."""
    def number(text):  # argparse says "invalid number value" where this raises ValueError
        value = type(low)(text)
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"expected {low} or more, not {text!r}")
        return value
    return number


def parse_args(argv=None):
    """Flags -> namespace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(dest="corpus", required=True, metavar="NAME",
                                     help=f"demo, {', '.join(CORPORA)}; NAME --help says more")
    demo = commands.add_parser("demo", description=make_demo.__doc__, formatter_class=HelpFormatter)
    demo.add_argument("--out", default="runs/data", help="folder for manifests and audio")
    demo.add_argument("--seed", type=at_least(0), default=0, help="of sentences, voices and noise")
    for name, corpus in CORPORA.items():
        command = commands.add_parser(name, description=corpus.__doc__,
                                      formatter_class=HelpFormatter)
        command.add_argument("root", metavar="ROOT", help="the corpus")
        command.add_argument("out", metavar="OUT", help="folder for the manifests")
    commands.choices["folder"].add_argument("--language", help="code for every line: en, zh, ...")
    return parser.parse_args(argv)


def main(args) -> None:
    """Makes the demo corpus, or manifests for a corpus on disk."""
    if args.corpus == "demo":
        make_demo(args.out, args.seed)
        return
    corpus = CORPORA[args.corpus]
    options = {"language": args.language} if corpus is folder else {}
    try:
        write_corpus(corpus(Path(os.path.abspath(args.root)), **options), args.out)
    except (OSError, ValueError) as error:
        raise SystemExit(f"data.py {args.corpus}: {error}. What is expected in {args.root}: "
                         f"{corpus.__doc__}") from None


if __name__ == "__main__":
    main(parse_args())
