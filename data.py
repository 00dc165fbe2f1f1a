"""What speech and text *are* in this project: manifests, audio, log-mel, batches, and the metric.

In reading order:
  1. manifest   JSON Lines, one utterance a line                   read_manifest, write_jsonl
  2. audio      file or segment -> 16 kHz mono float32             load_audio
  3. features   Whisper's log-mel, 100 frames a second             log_mel
  4. batches    a pure function of (seed, step): resume is free    load_batch, Plan, Steps, loader
  5. metric     normalised text, edit counts, bootstrap interval   normalize, edit_counts, bootstrap
  6. corpora    manifests for corpora that lie on disk             python data.py NAME ROOT OUT
  7. demo       a bilingual corpus spoken by espeak-ng             python data.py demo --out DIR
                                                                   --seed N --pool N

NAME is librispeech, aishell1, wenetspeech or folder (any folder of audio; the transcript of x.wav
is x.txt, where there is one; `python data.py folder ROOT OUT --language CODE`). ROOT is where the
corpus was unpacked, OUT the folder for the manifests. Audio stays in place.

A line of a manifest (paths are relative to the manifest's folder):
  {"id": "en-17", "audio": "wav/en-17.wav", "text": "put two cups on the shelf", "language": "en"}
Optional: "start" and "duration" in seconds (a segment of a longer file); "speaker". Other keys are
ignored. NeMo's spelling (audio_filepath, offset, lang) and open-audio-opd's (begin_time, end_time;
-1: whole file) are read too.
"""

import argparse
import atexit
import ctypes
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import threading
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import ijson
import jiwer
import numpy as np
import soundfile
import torch
import torchaudio
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.audio_utils import mel_filter_bank

SAMPLE_RATE = 16_000  # Hz, mono: what every model here expects
HOP = 160             # samples between mel frames: 100 frames a second
N_FFT = 400           # samples in an analysis window: 25 ms
MIN_SEC = 0.1         # a clip is at least this long
MAX_SEC = 30.0        # and at most this in training, as for the published student
MAX_EVAL_SEC = 40.0   # or this in evaluation: LibriSpeech's test sets have clips of 35 s
REFRESH_SEC = 0.5 if sys.stderr.isatty() else 20  # of a progress bar: a log file wants few lines


# ------------------------------------------------------------------------------------ 1. manifest

@dataclass(frozen=True)
class Utterance:
    """One line of a manifest. `text` and `language` are None where the line has none."""
    id: str
    audio: str                         # absolute path
    text: str | None = None
    language: str | None = None        # code, lower case: "en", "zh"
    start_sec: float = 0.0
    duration_sec: float | None = None  # None: to the end of the file
    speaker: str | None = None
    line: str = ""                     # "manifest.jsonl:12", for error messages


NUMBER = (int, float)
MANIFEST_KEYS = {  # the keys that are read, and the types of their values
    "id": str, "audio": str, "text": str, "language": str, "speaker": str,
    "start": NUMBER, "duration": NUMBER,
    "audio_filepath": str, "offset": NUMBER, "lang": str,  # as NeMo spells them
    "begin_time": NUMBER, "end_time": NUMBER}              # open-audio-opd's; negative: the file's


def read_manifest(path) -> list[Utterance]:
    """Read a JSON Lines manifest in file order. No audio is opened.

    Raises ValueError, naming file, line and value, for a line that can't be used, for an id that
    stands twice, and for a manifest without an utterance.
    """
    path = Path(path)
    utterances = []
    first_line = {}  # id -> number of its line
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        utterance = _parse_line(line, path.parent, where)
        if utterance.id in first_line:
            earlier = first_line[utterance.id]
            raise ValueError(f"{where}: id {utterance.id!r} already stands on line {earlier}")
        first_line[utterance.id] = number
        utterances.append(utterance)
    if not utterances:
        raise ValueError(f"{path}: the manifest has no utterance")
    return utterances


def _parse_line(line, folder, where) -> Utterance:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}): {line[:80]!r}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, found {line[:80]!r}")
    _check_types(row, where)
    audio = row.get("audio") or row.get("audio_filepath")
    if not audio:
        raise ValueError(f"{where}: no 'audio'; keys found: {sorted(row)}")
    start, duration = _segment(row, where)
    segment = f"@{start!r}" if start else ""  # two segments of one file need two ids
    language = row.get("language") or row.get("lang")
    return Utterance(
        id=row.get("id") or Path(audio).stem + segment,
        audio=os.path.normpath(folder.absolute() / audio),
        text=row.get("text"),
        language=language.lower() if language else None,
        start_sec=float(start),
        duration_sec=None if duration is None else float(duration),
        speaker=row.get("speaker"),
        line=where)


def _check_types(row, where) -> None:
    for key, types in MANIFEST_KEYS.items():
        value = row.get(key)
        if value is None:  # null is as good as no value
            continue
        is_nan = value != value
        if not isinstance(value, types) or isinstance(value, bool) or is_nan:
            raise ValueError(f"{where}: {key!r} has the wrong type or value: {value!r}")


def _segment(row, where):
    """Start in seconds, and duration in seconds or None: to the end of the file."""
    start = row.get("start") or row.get("offset") or 0.0
    duration = row.get("duration")
    begin, end = row.get("begin_time"), row.get("end_time")
    if begin is not None and begin >= 0:
        start = begin
    if end is not None and end >= 0:
        duration = end - start
    start_is_valid = 0 <= start < math.inf
    duration_is_valid = duration is None or 0 < duration < math.inf
    if not (start_is_valid and duration_is_valid):
        raise ValueError(f"{where}: segment start {start} s, duration {duration} s")
    return start, duration


def write_jsonl(path, rows) -> None:
    """Write dicts as JSON Lines, by way of a temporary file: a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def read_json(path) -> dict:
    """A file that holds one JSON object. Raises ValueError naming the file and what is in it instead."""
    raw = Path(path).read_bytes()
    try:
        value = json.loads(raw)
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, found {describe(raw)} ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {describe(raw)}")
    return value


def describe(raw) -> str:
    """What a file that can't be read seems to be, by its first bytes."""
    if raw.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, which `git lfs pull` replaces by the file"
    if not raw:
        return "an empty file"
    return repr(raw[:60])


def check_outputs(*files) -> None:
    """Raise OSError naming the file or folder if files that long work will end in can't be written.

    Makes nothing: what is tried is the folder that they, or their folder, would be made in.
    """
    for file in map(Path, files):
        if file.is_dir():
            raise IsADirectoryError(f"{file}: a file is to be written here, and there is a folder")
        folder = next(parent for parent in file.absolute().parents if os.path.lexists(parent))
        tempfile.TemporaryFile(dir=folder).close()


# --------------------------------------------------------------------------------------- 2. audio

class AudioError(ValueError):
    """A clip that can't be used. `reason` is a short constant that rejections are counted by."""
    def __init__(self, utterance, reason, detail):
        u = utterance
        super().__init__(f"{u.line}: {u.id}: {u.audio}: {reason}: {detail}")
        self.reason = reason


# What soundfile raises for files that it can't read; TypeError is its answer to headerless formats.
UNREADABLE = (OSError, soundfile.SoundFileError, TypeError)


def load_audio(utterance: Utterance, max_sec=MAX_SEC, for_training=True) -> np.ndarray:
    """Decode one clip: wav, flac, mp3, ogg; any rate and channels -> (n_samples,) float32, 16 kHz.

    Only the segment is decoded, never the whole file. Raises AudioError, with the line of the
    manifest in its message, for what must not be learned from: unreadable, past_end, too_short,
    too_long, not_finite, silent, clipped. The last two only for_training: evaluation hears what a user
    would. Nothing is ever cut to fit.
    """
    try:
        audio, rate = _decode(utterance, max_sec)
    except UNREADABLE as error:
        raise AudioError(utterance, "unreadable", error) from None
    if not np.isfinite(audio).all():
        raise AudioError(utterance, "not_finite", "NaN or infinite samples")
    if for_training:
        _check_fit_to_learn(utterance, audio)
    if rate != SAMPLE_RATE:
        audio = _resampler(rate)(torch.from_numpy(audio)).numpy()
    return audio


def _check_fit_to_learn(utterance, audio) -> None:
    """Raise AudioError for samples (n,) that could be decoded, but would teach the wrong thing."""
    peak = np.abs(audio).max()
    says_so = utterance.text == ""  # then silence is what is to be learnt
    if peak < 1e-4 and not says_so:  # -80 dBFS: digital silence, a dead microphone
        raise AudioError(utterance, "silent", f"peak {peak:.1e} of 1.0")
    clipped = (np.abs(audio) > 0.999).mean()
    if clipped > 0.02:  # a few clipped peaks are normal; a flattened recording is not
        raise AudioError(utterance, "clipped", f"{clipped:.0%} of the samples at full scale")


def _decode(utterance, max_sec) -> tuple[np.ndarray, int]:
    """The utterance's samples, (n,) float32, channels averaged, and their rate in Hz."""
    with soundfile.SoundFile(utterance.audio) as file:
        # libsndfile reads a truncated wav to its end without complaint; only its log tells.
        # 2^32 - 1 is what a program leaves in the header when it writes to a pipe.
        log = re.search(r"^data\s*: (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
        if log and int(log[1]) < 2 ** 31:
            detail = f"the header promises {log[1]} bytes of samples, the file holds {log[2]}"
            raise AudioError(utterance, "unreadable", detail)

        rate = file.samplerate
        first = round(utterance.start_sec * rate)
        if utterance.duration_sec is None:
            count = file.frames - first
        else:
            count = round(utterance.duration_sec * rate)
        # A manifest may give a file's length rounded to 10 ms; more than that missing is an error.
        tolerance = 0.01 * rate
        if first >= file.frames or first + count > file.frames + tolerance:
            end, file_end = (first + count) / rate, file.frames / rate
            detail = f"segment ends at {end:.2f} s, file at {file_end:.2f} s"
            raise AudioError(utterance, "past_end", detail)
        seconds = count / rate
        if not MIN_SEC <= seconds <= max_sec:
            reason = "too_short" if seconds < MIN_SEC else "too_long"
            detail = f"{seconds:.2f} s is outside {MIN_SEC} to {max_sec} s"
            raise AudioError(utterance, reason, detail)

        file.seek(first)
        audio = file.read(count, dtype="float32", always_2d=True)  # (n, channels)
    if len(audio) < count - tolerance:  # the header promised more than the file holds
        detail = f"{len(audio)} of {count} samples could be decoded"
        raise AudioError(utterance, "unreadable", detail)
    return audio.mean(1), rate


@lru_cache(maxsize=8)  # the windowed-sinc kernel is costlier than the resampling of a short clip
def _resampler(rate):
    return torchaudio.transforms.Resample(rate, SAMPLE_RATE)


def _file_seconds(path) -> float:
    """Length of an audio file by its header. Raises one of UNREADABLE."""
    info = soundfile.info(path)
    return info.frames / info.samplerate


# ------------------------------------------------------------------------------------ 3. features

def log_mel(audio: np.ndarray, n_mels: int = 128) -> torch.Tensor:
    """Whisper's features: (n_samples,) at 16 kHz -> (n_mels, n_samples // 160) float32.

    Equal to transformers' WhisperFeatureExtractor on a clip alone. Always one clip at a time:
    Whisper's floor is relative to the loudest bin, and reflection at the end needs the clip's
    samples, so features of a padded batch are not those of its clips.
    """
    spectrum = torch.stft(  # (n_bins, T + 1) complex
        torch.from_numpy(audio), N_FFT, HOP, window=torch.hann_window(N_FFT), return_complex=True)
    power = spectrum.abs() ** 2
    mel = (power.T @ _mel_filters(n_mels)).T  # (n_mels, T + 1)
    mel = mel[:, :-1]                         # Whisper drops the last, half-empty frame
    logs = mel.clamp(min=1e-10).log10()
    logs = torch.maximum(logs, logs.max() - 8.0)  # the floor: 80 dB below the loudest bin
    return (logs + 4.0) / 4.0                     # roughly -1 to 1


@lru_cache(maxsize=2)
def _mel_filters(n_mels):
    # In fp64 and then rounded, as Whisper's are; fp32 would differ by 2e-5 after the logarithm.
    filters = mel_filter_bank(
        N_FFT // 2 + 1, n_mels, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(filters).float()  # (n_bins, n_mels)


# ------------------------------------------------------------------------------------- 4. batches

@dataclass
class Batch:
    """Utterances that go through a model together: a micro-batch."""
    utterances: list[Utterance]
    mel: torch.Tensor                # (B, n_mels, T), zeros after a row's last frame
    n_frames: torch.Tensor           # (B,) mel frames of each row
    rejected: list[tuple[str, str]]  # (reason, message) of clips that were left out
    # Clips under half a second: row -> mel of the clip with silence up to half a second, which is
    # how Qwen3-ASR hears them.
    padded: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def audio_sec(self) -> float:
        return self.n_frames.sum().item() * HOP / SAMPLE_RATE


def load_batch(utterances, n_mels=128, augment=None, keep_going=True, max_sec=MAX_SEC,
               for_training=True) -> Batch:
    """Decode clips, make features, pad.

    augment: optional function (mel (n_mels, T), utterance) -> mel.
    keep_going: a clip that can't be used is reported in `rejected`; else its AudioError is raised.
    """
    kept, mels = [], []
    rejected, padded = [], {}
    for utterance in utterances:
        try:
            audio = load_audio(utterance, max_sec, for_training)
        except AudioError as error:
            if not keep_going:
                raise
            rejected.append((error.reason, str(error)))
            continue
        mel = log_mel(audio, n_mels)  # (n_mels, T)
        if augment:
            mel = augment(mel, utterance)
        missing = SAMPLE_RATE // 2 - len(audio)  # samples to half a second
        if missing > 0:
            padded[len(kept)] = log_mel(np.pad(audio, (0, missing)), n_mels)
        kept.append(utterance)
        mels.append(mel)

    n_frames = torch.tensor([mel.shape[1] for mel in mels], dtype=torch.long)
    frames = torch.zeros(0, 0, n_mels)  # if every clip was rejected
    if mels:
        frames = pad_sequence([mel.T for mel in mels], batch_first=True)  # (B, T, n_mels)
    return Batch(kept, frames.mT.contiguous(), n_frames, rejected, padded)


def pad_rows(rows, pad_id, device=None, side="right") -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of ids -> ids (B, R), padded with pad_id on one side; mask (B, R), True at real ids."""
    rows = [torch.as_tensor(row, dtype=torch.long, device=device) for row in rows]
    ones = [torch.ones_like(row, dtype=torch.bool) for row in rows]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side=side)
    mask = pad_sequence(ones, batch_first=True, padding_value=False, padding_side=side)
    return ids, mask


class Plan:
    """Which utterances make up optimiser step `s`: a pure function of (seed, s).

    So a resume needs no position. An epoch is a seeded shuffle cut into batches; every utterance
    comes once an epoch, and the last batch may be smaller. Inside a batch the order is by length,
    so that the micro-batches cut from it need little padding. Batches stay random: sorted ones (all
    of one length, hence of one kind of sentence) were measured to keep a model trained from scratch
    on its first plateau for more than twice as long. The ranks share out each global batch, so any
    number of processes makes the same update.
    """
    def __init__(self, durations, global_batch, seed):
        self.durations = list(durations)
        self.global_batch = global_batch
        self.seed = seed
        self.steps_per_epoch = math.ceil(len(self.durations) / global_batch)
        self._number = None   # of the epoch that is kept: the next step asks for the same one
        self._batches = None

    def __getitem__(self, step) -> list[int]:
        """Indices of the utterances of one step."""
        return self.epoch(step // self.steps_per_epoch)[step % self.steps_per_epoch]

    def epoch(self, number) -> list[list[int]]:
        """Batches of indices of one epoch."""
        if number == self._number:
            return self._batches
        order = list(range(len(self.durations)))
        random.Random(f"{self.seed}/{number}").shuffle(order)
        batches = []
        for first in range(0, len(order), self.global_batch):
            batch = order[first:first + self.global_batch]
            batches.append(sorted(batch, key=self.durations.__getitem__))
        self._number, self._batches = number, batches
        return batches


@dataclass
class Steps(torch.utils.data.Dataset):
    """Item s = this rank's micro-batches of optimiser step s, made by a worker of the loader.

    Micro-batches are cut after sharing out, lengths still sorted. A rank may get fewer rows than
    another, or none. augment: optional function (mel (n_mels, T), utterance, step) -> mel.
    """
    utterances: list[Utterance]
    plan: Plan
    micro_batch: int
    rank: int = 0
    world: int = 1
    n_mels: int = 128
    augment: Callable | None = None

    def __getitem__(self, step) -> list[Batch]:
        augment = partial(self.augment, step=step) if self.augment else None
        mine = self.plan[step][self.rank::self.world]
        batches = []
        for first in range(0, len(mine), self.micro_batch):
            rows = [self.utterances[i] for i in mine[first:first + self.micro_batch]]
            batches.append(load_batch(rows, self.n_mels, augment))
        return batches


def loader(dataset, items, workers):
    """Yield dataset[i] for i in `items`, in that order, made ahead of time by `workers` processes.

    0 workers: made in this process, when asked for. However this process ends, its workers do too.
    """
    atexit.register(_kill_workers)
    return torch.utils.data.DataLoader(
        dataset, batch_size=None, sampler=items, num_workers=workers,
        prefetch_factor=4 if workers else None, worker_init_fn=_start_worker)


def _start_worker(_number):
    # torchrun, schedulers and Ctrl-C signal every process of a group. What that means is the trainer's
    # decision: at SIGTERM it saves first, and needs its loader until then.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # By default every tensor on its way to the trainer is an open file: with small micro-batches,
    # more than the 1,024 that many systems allow.
    torch.multiprocessing.set_sharing_strategy("file_system")
    threading.Thread(target=_end_with_trainer, daemon=True).start()


def _end_with_trainer():
    multiprocessing.parent_process().join()  # killed ones too, which run no _kill_workers
    os._exit(1)


def _kill_workers():
    # Python ends its children by SIGTERM, which these ignore, and would wait for them for ever.
    # DataLoader would take each one's end for a failure, and raise from here.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        process.kill()


def check_decodable(utterances) -> None:
    """Raise AudioError for a clip that could not be evaluated; say which are silent or clipped.

    To be called before long work that such a clip would end: decoding costs a tenth of the features.
    """
    for utterance in utterances:
        try:
            load_audio(utterance, MAX_EVAL_SEC)
        except AudioError as error:
            load_audio(utterance, MAX_EVAL_SEC, for_training=False)
            print(f"evaluated all the same: {error}", file=sys.stderr)


def check_labelled(utterances) -> None:
    """Raise ValueError, naming the line, unless every utterance has a transcript and a language.

    The transcript may be "": nothing is said there.
    """
    for u in utterances:
        if u.text is None or not u.language:
            raise ValueError(f"{u.line}: {u.id}: 'text' and 'language' are needed here, "
                             f"found {u.text!r}, {u.language!r}")


def measure(utterances) -> list[float]:
    """Durations in seconds, by the manifest or else by the file's header; 0.0 if unreadable."""
    durations = []
    for utterance in utterances:
        duration = utterance.duration_sec
        if duration is None:
            try:
                duration = _file_seconds(utterance.audio) - utterance.start_sec
            except UNREADABLE:
                duration = 0.0  # load_audio rejects it, with its reason, when it is its turn
        durations.append(duration)
    return durations


def keyed_uniforms(seed, step, ids, count) -> np.ndarray:
    """Uniforms in [0, 1), (len(ids), count) float32, a function of (seed, step, id, column) alone.

    A rollout drawn with them is the same alone or in any batch, on any number of ranks, and after a
    resume (but for a draw that falls within rounding of the border between two tokens).
    """
    uniforms = np.zeros((len(ids), count), dtype=np.float32)
    for row, name in zip(uniforms, ids):
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        rng = np.random.default_rng([seed, step, *digest])
        row[:] = rng.random(count, dtype=np.float32)
    return uniforms


# -------------------------------------------------------------------------------------- 5. metric

# Name and version of what normalize does: another rule, table or reading is another number.
NORMALISER = "opd-asr-1"
# In these languages digits are read out, and the unit is the character.
HANZI_LANGUAGES = set("zh cmn zho chi cn yue wuu nan hak chinese mandarin cantonese".split())
CHARACTER_LANGUAGES = HANZI_LANGUAGES | set(
    "ja jpn jp japanese ko kor korean th tha thai lo lao km khmer my burmese".split())
ENGLISH = {"en", "eng", "english"}
# Thai, CJK and kana, hangul: the inside of a regular expression's [...].
ONE_CHARACTER = "\u0e00-\u0e7f\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u201b\u02bc\u00b4`", "'"))
FRACTION = "[\u00bc-\u00be\u2150-\u215e]"
INVISIBLE = "[\u00ad\u200b\u2060\ufeff\u20e3\ufe00-\ufe0f]"  # soft hyphen, zero width, variation


def metric(language: str | None) -> str:
    """"WER", "CER", or "MER" for characters *and* English: zh-en, en-zh, yue-en, ..."""
    parts = _parts(language)
    if CHARACTER_LANGUAGES & set(parts) and ENGLISH & set(parts):
        return "MER"
    if parts[0] in CHARACTER_LANGUAGES:
        return "CER"
    return "WER"


def _parts(language):
    """"zh-CN" -> ["zh", "cn"]. Raises ValueError."""
    if not language:
        raise ValueError("no 'language', which decides between character and word error rate")
    parts = re.findall(r"[^\W\d_]+", language.lower())
    if not parts:
        raise ValueError(f"language {language!r}: expected a code, such as en or zh-CN")
    return parts


def normalize(text: str, language: str) -> str:
    """The text that is scored: units separated by single spaces. This function *is* the metric.

    All: apostrophes straightened -> NFKC (full width to half width) -> lower case.
    English (WER): Whisper's English normaliser, see `english`.
    Others: letters, digits and marks are kept, see `words`; in Mandarin and Cantonese, digits are
    read out before, see `read_out`. Units are words (WER), characters (CER), or both (MER): one a
    character of CJK, kana, hangul, Thai and one a run of anything else.
    Text with a letter or a digit in it never becomes empty.

    >>> normalize("Don’t  STOP—it’s 3.5%!", "en")
    'do not stop it is 3.5%'
    >>> normalize("请，打开 A灯。", "zh")
    '请 打 开 a 灯'
    """
    parts = _parts(language)
    unit = metric(language)
    text = re.sub(INVISIBLE, "", text)  # what can't be seen is no unit and parts no word
    text = re.sub(rf"(?<=\d)(?={FRACTION})", " ", text)  # or NFKC would make 31/2 of 3½
    text = text.translate(APOSTROPHES)  # before NFKC, which takes some of them apart
    text = unicodedata.normalize("NFKC", text).lower()
    if unit == "WER" and parts[0] in ENGLISH:
        return english(text) or words(text)

    if HANZI_LANGUAGES & set(parts):
        text = read_out(text)
    text = words(text)
    if unit == "CER":
        return " ".join(text.replace(" ", ""))
    if unit == "MER":
        return " ".join(runs(text))
    return text


def words(text: str) -> str:
    """Letters, digits and marks, an apostrophe inside a word, a point between digits.

    All other characters part words, which are joined by single spaces.
    """
    kept = []
    for i, c in enumerate(text):
        before, after = text[i - 1:i], text[i + 1:i + 2]
        letter_digit_or_mark = unicodedata.category(c)[0] in "LNM"
        inside_word = c == "'" and before.isalnum() and after.isalnum()
        decimal_point = c == "." and before.isdigit() and after.isdigit()
        kept.append(c if letter_digit_or_mark or inside_word or decimal_point else " ")
    return " ".join("".join(kept).split())


def runs(text: str) -> list[str]:
    """Words, and each character of a script that is counted in characters.

    "put 杯子 here" -> put, 杯, 子, here.
    """
    return re.findall(rf"[{ONE_CHARACTER}]|[^\s{ONE_CHARACTER}]+", text)


def english(text: str) -> str:
    """Whisper's English normaliser, for text in NFKC, lower case, with straight apostrophes.

    Contractions and titles are written out, numbers in digits, spelling is American, accents and
    uh, um go. Repaired before it: what stands in brackets is kept; O'Brien is one word, not
    "0 brien"; quotation marks are not contractions; 1,2,3 is not 123; "5 %" is 5%; zeros at the
    front stay (0171, 007).
    """
    text = re.sub(r"[()\[\]<>{}]", " ", text)
    text = re.sub(r"\bo'(?=[a-z]{2})|\bo (?=clock\b)", "o", text)              # o'brien, o'clock
    text = re.sub(r"(?<=\w)\s+(?='(?:s|re|d|ll|ve|m|t)(?![\w'-]))", "", text)  # it 's
    text = re.sub(r"(?<!\w)'|'(?!\w)", " ", text)
    text = re.sub(r"(?<=\d),(?!\d{3}(?!\d))", " ", text)
    text = re.sub(r"(?<=\d)\s+(?=%)|(?<=[$£€¢])\s+(?=\d)", "", text)
    # A number that begins with 0 passes through Whisper's as characters of private use.
    text = re.sub(r"(?<![\d.,])0\d+(?!\d|\.\d)", lambda number: number[0].translate(HIDE), text)
    text = _whisper_normalizer()(text).translate(UNHIDE)
    return " ".join(word for word in text.split() if any(map(str.isalnum, word)))


HIDE = {ord("0") + i: 0xE000 + i for i in range(10)}
UNHIDE = {private: digit for digit, private in HIDE.items()}


@lru_cache(maxsize=1)
def _whisper_normalizer():
    """transformers' EnglishTextNormalizer with Whisper's 1,739 spellings (MIT).

    Its numbers turn "3.1" into "3.one" and "$1" into "$one"; here that is undone.
    """
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer  # takes seconds
    spellings = json.loads((Path(__file__).parent / ".assets" / "english.json").read_text())
    normalizer = EnglishTextNormalizer(spellings)
    standardize = normalizer.standardize_numbers

    def standardize_and_repair(text):
        return re.sub(r"(?<=[\d.$£€¢])one(?=s?\b)|\bone(?=\.\d)", "1", standardize(text))

    normalizer.standardize_numbers = standardize_and_repair
    return normalizer


HANZI = "零一二三四五六七八九"
TRADITIONAL = str.maketrans("萬億兩點負", "万亿两点负")  # what read_out writes; nothing else is simplified
NUMERALS = re.compile(  # two things (两); a year, a telephone number, 1.2.3; any other number
    r"(?P<two>(?<!第)(?<!百分之)2(?="  # counted: 两, not 二
    r"[个個只隻条條张張位件台辆輛本天种種份家块塊杯瓶倍岁歲名周週秒米元"
    r"场場项項公頭头層层部把座组組轮輪届屆]|次(?!元)|人(?![转轉])"
    r"|点(?![\d零一二三四五六七八九])|年(?![级級])|小[时時]|分[钟鐘]))"
    r"|(?P<digits>(?:1[1-9]|20)\d\d(?=(?:[-–—~至到](?:1[1-9]|20)\d\d)?年)"
    r"|\d\d(?=[后後])"  # 80后, those born in the eighties
    r"|0\d{2,3}-\d{7,8}(?!\d)|\d{3,4}-\d{3,4}-\d{4}(?!\d)|\d+(?:\.\d+){2,})"
    r"|(?P<minus>(?<![\w%])-|(?<=[温为是约到至])-)?"
    r"(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?P<point>\.\d+)?(?P<percent>%)?")


def read_out(text: str) -> str:
    """Digits -> spoken hanzi, so that 2023年 and 二零二三年 are one.

    Read digit by digit: years (1100 to 2099 before 年), telephone numbers, a zero at the front,
    seven digits or more without commas. All else is a number: 三百零五, 三点一四, 百分之八十, 负五; 2 is
    两 before a measure word. Where two ways are common, both sides get the first: 零 (〇, ○ after a
    digit), 一 (幺 beside digits), 二 (两 before 百千万亿), 万 (萬). Nothing else is simplified: opencc
    would do it, and is one more package whose version moves the number. Text without a digit keeps
    its meaning and its length.
    """
    text = NUMERALS.sub(_reading, text.translate(TRADITIONAL)).replace("〇", "零")
    text = re.sub(rf"(?<=[{HANZI}○])○", "零", text)
    text = re.sub(rf"(?<=[{HANZI}幺])幺|幺(?=[{HANZI}幺])", "一", text)
    text = re.sub("百分之一百(?![零一二三四五六七八九])", "百分之百", text)
    return re.sub("两(?=[百千万亿])", "二", text)


def _reading(match) -> str:
    """How a match of NUMERALS is said."""
    if match["two"]:
        return "两"
    if match["digits"]:
        return _digit_by_digit(match["digits"])
    whole = match["whole"].replace(",", "")
    has_no_commas = whole == match["whole"]
    zero_led = len(whole) > 1 and int(whole[0]) == 0
    if len(whole) > 12 or has_no_commas and (len(whole) > 6 or zero_led):
        said = _digit_by_digit(whole)
    else:
        said = cardinal(whole)
    sign = "负" if match["minus"] else ""
    percent = "百分之" if match["percent"] else ""
    return sign + percent + said + _digit_by_digit(match["point"] or "")


def _digit_by_digit(digits) -> str:
    digits = digits.replace("-", "")
    return "".join("点" if c == "." else HANZI[int(c)] for c in digits)


def cardinal(digits: str) -> str:
    """At most 12 digits, no zero at the front, in Mandarin: 10203 -> 一万零二百零三, 15 -> 十五."""
    said = ""
    zero = False
    for place, digit in zip(range(len(digits) - 1, -1, -1), map(int, digits)):
        if digit:
            said += "零" * (zero and said != "") + HANZI[digit] + ("", "十", "百", "千")[place % 4]
        zero = not digit
        if place % 4 == 0:  # 10^8, 10^4, 1
            section = int(digits[:len(digits) - place][-4:])
            said += ("", "万", "亿")[place // 4] if section else ""
            zero = not section
    if said.startswith("一十"):
        return said.removeprefix("一")
    return said or "零"


KINDS = {"equal": "equal", "substitute": "sub", "delete": "del", "insert": "ins"}  # jiwer's: ours


class Counts(NamedTuple):
    """Edit operations that turn the reference into the hypothesis, and the reference's units."""
    substitutions: int
    deletions: int
    insertions: int
    units: int  # words, characters, or both

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions


def edit_counts(ref: str, hyp: str, language: str) -> Counts:
    """Levenshtein counts over normalised units. An empty reference counts its insertions."""
    kinds = Counter(kind for kind, _, _ in align(ref, hyp, language))
    units = kinds["equal"] + kinds["sub"] + kinds["del"]
    return Counts(kinds["sub"], kinds["del"], kinds["ins"], units)


def align(ref: str, hyp: str, language: str) -> list[tuple[str, str, str]]:
    """A cheapest alignment (jiwer) as (kind, unit of ref, unit of hyp), unit by unit.

    kind is "equal", "sub", "del" or "ins"; the unit is "" where a side has none.
    """
    out = jiwer.process_words(normalize(ref, language), normalize(hyp, language))
    pairs = []
    for chunk in out.alignments[0]:
        refs = out.references[0][chunk.ref_start_idx:chunk.ref_end_idx]
        hyps = out.hypotheses[0][chunk.hyp_start_idx:chunk.hyp_end_idx]
        kind = KINDS[chunk.type]
        for r, h in zip_longest(refs, hyps, fillvalue=""):
            pairs.append((kind, r, h))
    return pairs


def error_rate(counts) -> float:
    """Corpus rate in percent: sum of errors / sum of reference units, never a mean of rates."""
    errors = sum(c.errors for c in counts)
    units = sum(c.units for c in counts)
    return 100.0 * errors / units if units else math.nan


def bootstrap(numerators, denominators, n=10_000, seed=0, blocks=None) -> tuple[float, float]:
    """95 % interval of sum(numerators) / sum(denominators), see `bootstrap_rates`.

    Paired comparisons pass differences of errors as numerators. Rates are fractions, not percent.
    """
    return interval(bootstrap_rates(numerators, denominators, n, seed, blocks))


def interval(rates) -> tuple[float, float]:
    """95 % interval of drawn rates (n,). Those that are nan, of draws without a unit, are left out.

    (nan, nan) if they are more than a tenth: fewer than three utterances or so have a reference then,
    and what is resampled is mainly whether there is anything to divide by.
    """
    defined = rates[~np.isnan(rates)]
    if len(defined) < 0.9 * len(rates):
        return math.nan, math.nan
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_rates(numerators, denominators, n=10_000, seed=0, blocks=None) -> np.ndarray:
    """sum(numerators) / sum(denominators) of n corpora drawn with replacement -> (n,).

    Utterances are drawn (Bisani & Ney, ICASSP 2004), or, with one label an utterance in `blocks`,
    whole blocks: all utterances of a speaker share a microphone and a voice. nan: a draw whose
    denominators are all 0, and every draw if there is only one block.
    """
    numerators = np.asarray(numerators, dtype=np.float64)
    denominators = np.asarray(denominators, dtype=np.float64)
    if blocks is not None:
        _, block = np.unique(np.asarray(blocks), return_inverse=True)  # number of each one's block
        numerators = np.bincount(block, numerators)
        denominators = np.bincount(block, denominators)
    size = len(numerators)
    if size < 2 or not denominators.sum() > 0:
        return np.full(n, np.nan)
    if size > 100_000:
        n = 1_000  # of a million utterances, 10,000 draws would take ten minutes
    rng = np.random.default_rng(seed)
    rates = []
    for _ in range(n // 100):  # in groups: all draws of a large corpus would not fit in memory
        # How often each is drawn, (100, size).
        times = rng.multinomial(size, np.full(size, 1 / size), size=100)
        drawn = times @ denominators
        rates.append((times @ numerators) / np.where(drawn > 0, drawn, np.nan))
    return np.concatenate(rates)


# ------------------------------------------------------------------------------------- 6. corpora

# Each corpus is a generator of (name of a manifest, row). The row's audio is an absolute path.
# "text" is None where the corpus promises a transcript and has none. A row without "duration" is a
# whole file, whose header is read later. A row with "left_out": REASON goes into no manifest.

AUDIO_SUFFIXES = {".wav", ".flac", ".mp3", ".ogg", ".opus"}
WENETSPEECH = {  # subset -> name of its manifest
    "L": "train", "M": "train_m", "S": "train_s",
    "DEV": "dev", "TEST_NET": "test_net", "TEST_MEETING": "test_meeting"}


def librispeech(root):
    """ROOT or ROOT/LibriSpeech holds SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NNNN.flac.

    SPEAKER-CHAPTER.trans.txt lies beside them. Makes a manifest a SUBSET found. Text is in capitals,
    as published. Raises FileNotFoundError if there is no chapter, or a chapter has no .trans.txt.
    """
    home = root / "LibriSpeech"
    if not home.is_dir():
        home = root
    chapters = []
    for kind in ("train", "dev", "test"):
        chapters += [path for path in home.glob(f"{kind}-*/*/*") if path.is_dir()]
    if not chapters:
        raise FileNotFoundError(f"{root}: no LibriSpeech; expected folders like "
                                f"{home}/dev-clean/84/121123 (SUBSET/SPEAKER/CHAPTER)")
    for chapter in sorted(chapters):
        subset, speaker = chapter.parts[-3:-1]
        texts = _read_transcripts(chapter / f"{speaker}-{chapter.name}.trans.txt", " ")
        clips = {path.stem for path in chapter.glob("*.flac")}
        for name in sorted(texts.keys() | clips):
            audio = chapter / f"{name}.flac"
            yield subset, {"id": name, "audio": str(audio), "text": texts.get(name),
                           "language": "en", "speaker": speaker}


def aishell1(root):
    """ROOT or ROOT/data_aishell holds transcript/aishell_transcript_v0.8.txt and the wavs.

    They lie in wav/{train,dev,test}/SPEAKER/. Makes a manifest a split found. Words are joined. Some
    published wavs have no transcript: left out. Raises FileNotFoundError without transcripts or wavs.
    """
    home = root / "data_aishell"
    if root.name == home.name or (root / "transcript").is_dir():
        home = root
    texts = _read_transcripts(home / "transcript" / "aishell_transcript_v0.8.txt", "")
    wavs = []
    for split in ("train", "dev", "test"):
        wavs += sorted((home / "wav" / split).glob("*/*.wav"))
    if not wavs:
        raise FileNotFoundError(f"{home}: no audio; expected {home}/wav/{{train,dev,test}}/SPEAKER/"
                                "*.wav (unpack wav/*.tar.gz there)")
    for wav in wavs:
        split, speaker = wav.parts[-3:-1]
        yield split, {"id": wav.stem, "audio": str(wav), "text": texts.get(wav.stem),
                      "language": "zh", "speaker": speaker}
    for name in sorted(texts.keys() - {wav.stem for wav in wavs}):
        yield "transcript", {"audio": name, "left_out": "no audio file"}


def wenetspeech(root):
    """ROOT holds WenetSpeech.json and the .opus files at the paths it names.

    Makes manifests of segments: train (L), train_m and train_s (M, S; parts of L), dev, test_net,
    test_meeting. L whole needs about 10 GB of memory here, and as much to read. Raises
    FileNotFoundError without the json, ValueError where it is cut off or an audio lacks a field.
    """
    path = root / "WenetSpeech.json"
    for audio in _wenetspeech_audios(path):
        try:
            file = str(root / audio["path"])
            for segment in audio["segments"]:
                start = segment["begin_time"]
                duration = round(segment["end_time"] - start, 4)
                row = {"id": segment["sid"], "audio": file, "text": segment["text"],
                       "language": "zh", "start": start, "duration": duration}
                names = [WENETSPEECH[s] for s in segment["subsets"] if s in WENETSPEECH]
                for name in names:
                    yield name, row
                if not names:
                    yield "other", row | {"left_out": "in none of " + " ".join(WENETSPEECH)}
        except (KeyError, TypeError, AttributeError) as error:
            expected = "expected path, segments: [sid, begin_time, end_time, text, subsets]"
            raise ValueError(f"{path}: {expected}; {error!r} in {str(audio)[:200]}") from None


def _wenetspeech_audios(path):
    """Yield the objects of "audios" one by one: the whole of the 6 GB would take tens in memory."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file; expected {path}")
    found = False
    with path.open("rb") as file:
        try:
            for audio in ijson.items(file, "audios.item", use_float=True):
                found = True
                yield audio
        except ijson.JSONError as error:
            detail = " ".join(str(error).split())
            raise ValueError(f"{path}: cut off or not JSON: {detail}") from None
    if not found:
        raise ValueError(f'{path}: expected {{"audios": [...]}} with at least one audio')


def folder(root, language=None):
    """All audio under ROOT, one manifest named like it; a transcript is the .txt of the same name.

    An id is the path below ROOT with - for /. Links to folders are not followed. Raises
    FileNotFoundError without audio.
    """
    files = [p for p in root.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES and p.is_file()]
    if not files:
        suffixes = ", *".join(sorted(AUDIO_SUFFIXES))
        raise FileNotFoundError(f"{root}: no audio; expected files *{suffixes} in it or below")
    for path in sorted(files):
        row = {"id": "-".join(path.relative_to(root).with_suffix("").parts), "audio": str(path)}
        transcript = path.with_suffix(".txt")
        text = _read_text(transcript).strip() if transcript.exists() else ""
        if text:
            row["text"] = text
        if language:
            row["language"] = language
        yield root.name, row


def _read_transcripts(path, glue) -> dict[str, str]:
    """Lines of an id and words -> {id: words joined by `glue`}."""
    texts = {}
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        name, *words = line.split()
        if name in texts:
            raise ValueError(f"{path}:{number}: expected one line an utterance, "
                             f"{name!r} already has one")
        texts[name] = glue.join(words)
    return texts


def _read_text(path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"no such file; expected {path}")
    try:
        return path.read_text(encoding="utf-8-sig")  # -sig: without some editors' byte-order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8: {error}") from None


CORPORA = {"librispeech": librispeech, "aishell1": aishell1, "wenetspeech": wenetspeech,
           "folder": folder}


def write_corpus(rows, out) -> None:
    """Write (manifest's name, row) pairs as OUT/NAME.jsonl; print what is in each and what is not.

    Raises ValueError, before anything is written, where two rows of a manifest share an id, or if
    nothing is left.
    """
    out = Path(os.path.abspath(out))
    manifests = defaultdict(dict)                      # name -> {id: row}
    left_out = defaultdict(lambda: defaultdict(list))  # name -> {reason: audio paths}
    for name, row in tqdm(rows, desc="corpus", unit="clip", mininterval=REFRESH_SEC):
        reason = _why_left_out(row)
        if reason:
            left_out[name][reason].append(row["audio"])
            continue
        first = manifests[name].setdefault(row["id"], row)
        if first is not row:
            raise ValueError(f"{name}: expected one id each: {first['audio']} and {row['audio']} "
                             f"are both {row['id']!r}")
    if not manifests:
        reasons = {name: _count_by_reason(files) for name, files in left_out.items()}
        raise ValueError(f"no utterance is left. Left out: {reasons}")

    for name in sorted(manifests.keys() | left_out.keys()):
        path = out / f"{name}.jsonl"
        kept = manifests[name].values()
        if kept:
            relative = (row | {"audio": os.path.relpath(row["audio"], out)} for row in kept)
            write_jsonl(path, relative)
        print(f"{path}: {_summary(kept, left_out[name])}")


def _why_left_out(row) -> str | None:
    """None for a row that can be used. Adds the duration of a whole file."""
    if "left_out" in row:
        return row["left_out"]
    if not os.path.isfile(row["audio"]):
        return "no audio file"
    text = row.get("text")
    has_text = isinstance(text, str) and text.strip() != ""
    if "text" in row and not has_text:
        return "no transcript"
    if "duration" not in row:
        try:
            row["duration"] = round(_file_seconds(row["audio"]), 4)
        except UNREADABLE:
            return "unreadable"
        return None if row["duration"] else "empty"
    if row["start"] < 0 or not row["duration"] > 0:
        return "bad times"
    return None


def _summary(kept, left_out) -> str:
    """What a manifest holds, in words."""
    hours = sum(row["duration"] for row in kept) / 3600
    speakers = {row["speaker"] for row in kept if "speaker" in row}
    said = f"{len(kept)} utterances, {hours:.2f} h, {len(speakers) or 'unknown'} speakers"
    without_text = sum("text" not in row for row in kept)
    if without_text:
        said += f", {without_text} without text"
    if not kept:
        said += "; not written"
    if left_out:
        said += f"; left out: {_count_by_reason(left_out)}"
    return said


def _count_by_reason(left_out) -> str:
    items = left_out.items()
    return "; ".join(f"{len(files)} {reason} (first: {files[0]})" for reason, files in items)


# --------------------------------------------------------------------------------- 7. demo corpus

# Clips of each split, half of them English, half Mandarin. Made in this order, so that what the
# others hold does not depend on the size of the pool.
SIZES = {"test": 500, "dev": 100, "train": 700, "teacher": 4500, "pool": 500}
# Whose sentences a split may not repeat: dev's and test's stand nowhere else, and the teacher's
# corpus has none of train's.
AVOIDS = {"test": [], "dev": ["test"], "train": ["test", "dev"],
          "teacher": ["test", "dev", "train"], "pool": ["test", "dev"]}

# Variants that an independent recogniser understood. victor, f2, f3 and f5 are left out: they read
# uninitialised memory, so the same text would not give the same bytes twice.
VARIANTS = """
    edward ian Hugo caleb klatt6 m3 miguel robert Diogo Henrique Michael Mike benjamin david iven2
    m1 m2 m8 max Storm adam iven4 m6 steph Denis belinda f4 klatt2 m7 michel rob travis zac Annie
    Nguyen anika gustave m5 quincy grandma""".split()

# Small closed vocabularies, many combinations: enough to need the audio, few enough for a model of
# half a million parameters.
GRAMMAR = {
    "en": {
        "patterns": ["{verb} the {colour} {thing}", "{number} {thing}s {where}",
                     "{name} has {number} {thing}s", "the {colour} {thing} is {where}",
                     "{verb} {number} {thing}s {when}"],
        "verb": ["bring", "find", "paint", "hide", "clean", "open"],
        "colour": ["red", "green", "yellow", "black", "white", "purple"],
        "thing": ["lamp", "table", "window", "basket", "pencil", "camera"],
        "number": ["two", "three", "five", "six", "seven", "nine"],
        "name": ["anna", "peter", "oscar", "laura"],
        "where": ["upstairs", "outside", "downtown", "nearby"],
        "when": ["today", "tomorrow", "tonight"]},
    "zh": {
        "patterns": ["{verb}{colour}{thing}", "{where}有{number}个{thing}",
                     "{name}有{number}个{thing}", "{colour}{thing}在{where}",
                     "{when}{verb}{number}个{thing}"],
        "verb": ["拿来", "找到", "打开", "修理", "洗净", "藏好"],
        "colour": ["红色", "绿色", "黄色", "黑色", "白色", "紫色"],
        "thing": ["台灯", "桌子", "窗户", "篮子", "铅笔", "书包"],
        "number": ["两", "三", "五", "七", "八", "九"],
        "name": ["小明", "李华", "王芳", "张伟"],
        "where": ["桥下", "厨房", "河边", "车站"],
        "when": ["今天", "明天", "今晚"]}}
VOICES = {"en": ["en-us"], "zh": ["cmn"]}  # espeak-ng's names of the languages
EXTRA_SPEED = {"en": 0, "zh": 40}          # words a minute


def make_demo(out, seed=0, sizes=SIZES) -> None:
    """Write OUT/{train,teacher,pool,dev,test}.jsonl and OUT/wav: English and Mandarin in turn.

    train: the student's labelled clips, of few voices. teacher: what the teacher is taught: more
    clips, more voices, no sentence of train. pool: audio for distillation, of more voices than
    train. dev, test: voices and sentences found in none of these. Who speaks where is the same for
    every seed. Same arguments, same bytes.
    """
    out = Path(out)
    (out / "wav").mkdir(parents=True, exist_ok=True)
    # Each language has a fresh process: espeak-ng repeats its bytes only for the same calls in the
    # same order.
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as processes:
        tasks = [(language, out, seed, sizes) for language in GRAMMAR]
        english, mandarin = processes.starmap(speak_language, tasks, chunksize=1)
    for split in sizes:
        rows = []
        for pair in zip(english[split], mandarin[split]):
            rows.extend(pair)
        write_jsonl(out / f"{split}.jsonl", rows)
        minutes = sum(row["duration"] for row in rows) / 60
        voices = {row["speaker"] for row in rows}
        print(f"{split:7} {len(rows):5} clips  {minutes:5.1f} min  {len(voices):3} voices")


def speak_language(language, out, seed, sizes) -> dict[str, list[dict]]:
    """Synthesise one language of the demo in this (fresh) process -> {split: rows of manifest}."""
    torch.set_num_threads(1)  # clips are short: a second thread would only wait
    espeak = Espeak()
    resample = torchaudio.transforms.Resample(espeak.rate, SAMPLE_RATE)
    rng = random.Random(f"demo/{seed}/{language}")
    speakers = cast()
    sentences = {}  # of each split
    rows = {}
    progress = tqdm(desc=f"demo corpus, {language}", unit="clip", total=sum(sizes.values()) // 2,
                    position=list(GRAMMAR).index(language), mininterval=REFRESH_SEC)
    for split, size in sizes.items():
        taken = set().union(*(sentences[other] for other in AVOIDS[split]))
        sentences[split] = set()
        rows[split] = []
        while len(rows[split]) < size // 2:
            text = compose(language, rng)
            if text in taken:
                continue
            sentences[split].add(text)
            voice = f"{rng.choice(VOICES[language])}+{rng.choice(speakers[split])}"
            speed = rng.randint(180, 225) + EXTRA_SPEED[language]
            speech = espeak.say(text, voice, speed, pitch=rng.randint(35, 65))
            audio = add_noise(resample(torch.from_numpy(speech)).numpy(), rng)
            name = f"{split}-{language}-{len(rows[split]):05d}"
            soundfile.write(out / "wav" / f"{name}.wav", audio, SAMPLE_RATE, subtype="PCM_16")
            duration = round(len(audio) / SAMPLE_RATE, 4)
            rows[split].append({"id": name, "audio": f"wav/{name}.wav", "text": text,
                                "language": language, "duration": duration, "speaker": voice})
            progress.update()
    progress.close()
    return rows


def cast() -> dict[str, list[str]]:
    """Who speaks in each split. dev's and test's voices are heard nowhere else."""
    variants = random.Random("demo/0").sample(VARIANTS, len(VARIANTS))  # the same for every seed
    pool, unseen, further = variants[:13], variants[13:19], variants[19:31]
    return {"test": unseen, "dev": unseen, "train": pool[:6],
            "teacher": pool + further, "pool": pool}


def compose(language, rng) -> str:
    """One random sentence of the demo's grammar."""
    grammar = GRAMMAR[language]
    pattern = rng.choice(grammar["patterns"])
    words = {}
    for slot, choices in grammar.items():
        if slot != "patterns":
            words[slot] = rng.choice(choices)
    return pattern.format(**words)


def add_noise(audio, rng) -> np.ndarray:
    """Clean speech -> a clip with noise 25 to 40 dB below the speech and a peak of -16 to -6 dBFS."""
    noise_rng = np.random.default_rng(rng.getrandbits(32))
    noise = noise_rng.standard_normal(len(audio)).astype(np.float32)
    width = rng.choice([1, 2, 4, 8])  # of a moving average: white to dull
    noise = np.convolve(noise, np.ones(width), "same")
    ratio = np.sqrt((audio ** 2).mean() / (noise ** 2).mean())
    audio = audio + noise * ratio * 10 ** (-rng.uniform(25, 40) / 20)
    return audio * 10 ** (rng.uniform(-16, -6) / 20) / np.abs(audio).max()


class Espeak:
    """espeak-ng through ctypes. One global engine a process."""
    def __init__(self):
        import espeakng_loader  # only the demo needs it
        self.lib = ctypes.CDLL(espeakng_loader.get_library_path())
        data_path = espeakng_loader.get_data_path().encode()
        # 2: synchronous; 0: pieces of default length; 0x8000: do not exit if the data is missing.
        self.rate = self.lib.espeak_Initialize(2, 0, data_path, 0x8000)
        self.pieces = []
        receiver = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.callback = receiver(self._receive)  # kept alive: the library holds a bare pointer to it
        self.lib.espeak_SetSynthCallback(self.callback)
        self.lib.espeak_Synth.argtypes = [
            ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint,
            ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p]

    def _receive(self, samples, n, _events):
        if samples and n > 0:
            self.pieces.append(np.ctypeslib.as_array(samples, (n,)).copy())
        return 0  # go on

    def say(self, text, voice, words_per_minute, pitch) -> np.ndarray:
        """-> (n_samples,) float32 in [-1, 1] at self.rate Hz."""
        self.pieces.clear()
        if self.lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice!r}")
        self.lib.espeak_SetParameter(1, words_per_minute, 0)  # 1: speed
        self.lib.espeak_SetParameter(3, pitch, 0)             # 3: pitch, 0 to 100
        raw = text.encode() + b"\0"
        # Position 0 in characters (1) to the end (0), text in UTF-8 (1).
        failed = self.lib.espeak_Synth(raw, len(raw), 0, 1, 0, 1, None, None)
        if failed or not self.pieces:
            raise RuntimeError(f"espeak-ng could not say {text!r}")
        self.lib.espeak_Synchronize()
        return np.concatenate(self.pieces).astype(np.float32) / 32768.0


# -------------------------------------------------------------------------------- the command line

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """A script's docstring as it stands, and the default of each flag. For all scripts."""


def whole_number(text) -> int:
    """Type of a flag: 0, 1, 2, ..."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, 0 or more, found {text!r}")
    return int(text)


def at_least_one(text) -> int:
    """Type of a flag: 1, 2, 3, ..."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number, 1 or more, found {text!r}")
    return int(text)


def not_negative(text) -> float:
    """Type of a flag: a finite number, 0 or more."""
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number, 0 or more, found {text!r}")
    return float(text)


def positive(text) -> float:
    """Type of a flag: a finite number above 0."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return float(text)


def parse_args(argv=None):
    """Flags -> namespace."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(
        dest="corpus", required=True, metavar="NAME",
        help=f"demo, {', '.join(CORPORA)}; NAME --help says more")
    for name, function in {"demo": make_demo, **CORPORA}.items():
        command = commands.add_parser(
            name, description=function.__doc__, allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        if name == "demo":
            command.add_argument("--out", default="runs/data", help="folder for manifests and audio")
            command.add_argument("--seed", type=whole_number, default=0, help="of sentences, voices and noise")
            command.add_argument("--pool", type=at_least_one, default=SIZES["pool"], help="clips in the pool")
        else:
            command.add_argument("root", metavar="ROOT", help="where the corpus lies")
            command.add_argument("out", metavar="OUT", help="folder for the manifests")
        if name == "folder":
            command.add_argument("--language", help="code for every line: en, zh, ...")
    args = parser.parse_args(argv)
    if args.corpus == "demo" and (args.pool < 2 or args.pool % 2):
        parser.error(f"argument --pool: expected an even number from 2 on, found {args.pool}")
    return args


def main(args) -> None:
    """Make the demo corpus, or manifests for a corpus that lies on disk."""
    if args.corpus == "demo":
        make_demo(args.out, args.seed, SIZES | {"pool": args.pool})
        return
    root = Path(os.path.abspath(args.root))
    if args.corpus == "folder":
        rows = folder(root, args.language)
    else:
        rows = CORPORA[args.corpus](root)
    try:
        write_corpus(rows, args.out)
    except (OSError, ValueError) as error:  # what is wrong with the corpus ends in one line
        raise SystemExit(f"data.py {args.corpus}: {error}") from None


if __name__ == "__main__":
    main(parse_args())
