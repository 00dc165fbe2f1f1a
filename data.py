"""What speech and text *are* in this project: manifests, audio, log-mel, batches, and the metric.

In reading order:
  1. manifest   JSON Lines, one utterance a line, and its index    read_manifest, write_jsonl
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
Optional: "start" and "duration" or "end" in seconds (a segment of a longer file); "speaker". NeMo's
spelling (audio_filepath, offset, lang) and open-audio-opd's (begin_time, end_time; -1: whole file)
are read too. Other keys are ignored, but for those that look like one that is missing ("sentence"
without "text"): they are an error. An id that is missing is the audio's path without its suffix.
"""

import argparse
import atexit
import ctypes
import difflib
import fcntl
import hashlib
import json
import math
import mmap
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import threading
import unicodedata
import uuid
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import ijson
import jiwer
import numpy as np
import soundfile
import soxr
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
    "start": NUMBER, "duration": NUMBER, "end": NUMBER,
    "audio_filepath": str, "offset": NUMBER, "lang": str,  # as NeMo spells them
    "begin_time": NUMBER, "end_time": NUMBER}              # open-audio-opd's; negative: the file's
ALSO_CALLED = {  # what is read under a key, and other programs' names for it, which are refused
    "audio": "wav path file file_name filename audio_path audio_file wav_path",
    "text": "txt sentence transcript transcription normalized_text reference label",
    "language": "locale lang_id language_id",
    "start": "start_time start_sec begin begin_sec offset_sec",
    "duration": "end_sec dur length duration_sec duration_ms start_ms end_ms",
    "id": "key uttid utt_id utterance_id", "speaker": "spk spk_id speaker_id"}
MEANINGS = {"audio_filepath": "audio", "offset": "start", "lang": "language",
            "begin_time": "start", "end": "duration", "end_time": "duration"}


def read_manifest(path) -> "Manifest":
    """Open a JSON Lines manifest: its utterances in file order. No audio is opened.

    Raises ValueError, naming file, line and value, for a line that can't be used, for an id that
    stands twice, and for a manifest without an utterance.
    """
    return Manifest([path])


def read_manifests(paths) -> "Manifest":
    """Open several manifests as one sequence; see `read_manifest`."""
    return Manifest(paths)


class Manifest(Sequence):
    """A read-only sequence of the utterances of one or more manifests.

    A line is parsed when its clip is asked for. What is needed of all lines at once lies in an
    index (INDEX_COLUMNS), mapped into memory: all processes of a machine share it, loader workers
    too, and nothing grows by a Python object a line. At 100,000 h that is 1 GB instead of 36 GB.
    """
    def __init__(self, paths):
        self.paths = [Path(path) for path in paths]
        self.files = [path.open("rb") for path in self.paths]  # pread: forks may share them
        self.indices = [_open_index(path, file) for path, file in zip(self.paths, self.files)]
        self.ends = np.cumsum([len(index["offset"]) for index in self.indices])

    def __reduce__(self):  # what is sent to a spawned process; it opens the files again
        return Manifest, (self.paths,)

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        i = range(len(self))[i]  # counts negative ones from the end; IndexError
        part = int(np.searchsorted(self.ends, i, side="right"))
        index = self.indices[part]
        line = i - int(self.ends[part]) + len(index["offset"])
        return _read_utterance(self.paths[part], self.files[part], index, line)

    def column(self, name) -> np.ndarray:
        """One of INDEX_COLUMNS for all utterances, (n,)."""
        columns = [index[name] for index in self.indices]
        return columns[0] if len(columns) == 1 else np.concatenate(columns)

    def first_without(self, name) -> Utterance | None:
        """The first utterance for which a column is 0."""
        places = np.flatnonzero(self.column(name) == 0)
        return self[places[0]] if len(places) else None

    def first_repeated(self) -> Utterance | None:
        """The first utterance whose id stands earlier too, in another of the manifests."""
        pair = _first_repeated(self.column("id_hash"), lambda i: self[i].id)
        return self[pair[1]] if pair else None

    def durations(self) -> np.ndarray:
        """Seconds, (n,) float32; see `measure`. Headers are read once: what they say is kept."""
        for part, index in enumerate(self.indices):
            if np.isnan(index["duration"]).any():
                self.indices[part] = _open_index(self.paths[part], self.files[part], measured=True)
        durations = self.column("duration")
        unreadable = np.isnan(durations)
        return np.where(unreadable, np.float32(0), durations) if unreadable.any() else durations


# What an index holds of each utterance, and its type for `array` and for numpy.
INDEX_COLUMNS = {
    "offset": "q",     # of its line in the manifest, bytes
    "id_hash": "Q",    # 64 bits of its id
    "number": "I",     # of its line, from 1; blank lines count
    "duration": "f",   # seconds; NaN where the line has none and the header was not read yet
    "labelled": "b",   # it has a transcript, perhaps "", and a language
    "scorable": "b"}   # it has a language that `metric` knows, or no reference
INDEX_VERSION = 2      # one more whenever another manifest is valid, or is read otherwise


def _open_index(path, file, measured=False) -> dict[str, np.ndarray]:
    """The index of a manifest: a kept one if the manifest is still the same, else a new one.

    It is kept beside the manifest, or under ~/.cache where that can't be written, or in memory.
    measured: also read the lengths that it lacks from the headers of the audio.
    """
    stamp = _stamp(file)
    with _locked(file):  # one process makes it, those beside it wait and then find it
        index = None
        for place in _index_places(path):
            index = index or _load_index(place, stamp)
        if index is None:
            index = _keep_index(path, stamp, _index_lines(path, file))
        if measured:
            durations = _measure_lines(path, file, index)
            if not np.array_equal(durations, index["duration"], equal_nan=True):
                index = _keep_index(path, stamp, index | {"duration": durations})
    return index


def _stamp(file) -> bytes:
    """Changes when the manifest does: size, time, first and last bytes."""
    status = os.fstat(file.fileno())
    facts = (INDEX_VERSION, INDEX_COLUMNS, status.st_size, status.st_mtime_ns)
    first = os.pread(file.fileno(), 4096, 0)
    last = os.pread(file.fileno(), 4096, max(0, status.st_size - 4096))
    return hashlib.blake2b(repr(facts).encode() + first + last, digest_size=32).digest()


@contextmanager
def _locked(file):
    # A file system without locks (or one a machine) costs only time: every process makes the same.
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)


def _index_places(path) -> list[Path]:
    path = Path(os.path.abspath(path))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.blake2b(str(path).encode(), digest_size=16).hexdigest()
    return [path.with_name(path.name + ".index"), cache / "opd-asr" / f"{name}.index"]


def _load_index(place, stamp):
    """Columns mapped into memory; None if there are none, or those of another manifest."""
    columns = {}
    try:
        with place.open("rb") as file:
            if file.read(len(stamp)) != stamp:
                return None
            position = len(stamp)
            bytes_a_line = sum(np.dtype(kind).itemsize for kind in INDEX_COLUMNS.values())
            n = (os.fstat(file.fileno()).st_size - position) // bytes_a_line
            for name, kind in INDEX_COLUMNS.items():
                column = np.memmap(file, kind, "r", position, (n,))
                columns[name] = np.asarray(column)
                position += column.nbytes
    except OSError:
        return None
    return columns


def _keep_index(path, stamp, columns):
    """Write an index where it can be written, by way of a temporary file -> its columns."""
    for place in _index_places(path):
        temporary = place.with_name(f"{place.name}.{uuid.uuid4().hex}")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(stamp)
                for name in INDEX_COLUMNS:
                    file.write(columns[name])
            os.replace(temporary, place)
        except OSError:  # a read-only folder, a full disk
            with suppress(OSError):
                temporary.unlink()
            continue
        return _load_index(place, stamp) or columns
    return columns


def _index_lines(path, file) -> dict[str, np.ndarray]:
    """Check and index every line of a manifest."""
    columns = {name: array(kind) for name, kind in INDEX_COLUMNS.items()}
    folder = os.path.dirname(os.path.abspath(path))
    name = str(path)
    offset = 0
    file.seek(0)
    with tqdm(desc=f"index of {path.name}", total=os.fstat(file.fileno()).st_size, unit="B",
              unit_scale=True, delay=3, mininterval=REFRESH_SEC) as progress:
        for number, line in enumerate(file, start=1):
            u = _parse_line(line, folder, f"{name}:{number}")
            if u:
                columns["offset"].append(offset)
                columns["id_hash"].append(hash_id(u.id))
                columns["number"].append(number)
                columns["duration"].append(math.nan if u.duration_sec is None else u.duration_sec)
                columns["labelled"].append(u.text is not None and u.language is not None)
                columns["scorable"].append(u.text is None or _has_metric(u.language))
            offset += len(line)
            if number % 1000 == 0:
                progress.update(offset - progress.n)
    index = {name: np.frombuffer(column, INDEX_COLUMNS[name]) for name, column in columns.items()}
    if not len(index["offset"]):
        raise ValueError(f"{path}: the manifest has no utterance")
    pair = _first_repeated(index["id_hash"], lambda i: _read_utterance(path, file, index, i).id)
    if pair:
        u = _read_utterance(path, file, index, pair[1])
        raise ValueError(f"{u.line}: id {u.id!r} already stands on line {index['number'][pair[0]]}")
    return index


@lru_cache
def _has_metric(language) -> bool:
    try:
        return bool(metric(language))
    except ValueError:
        return False


def hash_id(name) -> int:
    """64 bits of an id, the same in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest())


def _first_repeated(hashes, get_id) -> tuple[int, int] | None:
    """Places of the first id that stands twice: the earlier and the later one.

    Ids are compared where hashes are equal: among 36 million, two may be by chance.
    """
    ordered = np.sort(hashes)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(repeated):
        return None
    first = {}
    for i in np.flatnonzero(np.isin(hashes, repeated)).tolist():
        earlier = first.setdefault(get_id(i), i)
        if earlier != i:
            return earlier, i
    return None


def _measure_lines(path, file, index) -> np.ndarray:
    """The column of durations, with those that were missing; still NaN where a file is unreadable."""
    durations = index["duration"].copy()
    missing = np.flatnonzero(np.isnan(durations))
    for i in tqdm(missing, desc=f"lengths of {path.name}", unit="clip", delay=3,
                  mininterval=REFRESH_SEC):
        durations[i] = _seconds(_read_utterance(path, file, index, i), unreadable=math.nan)
    return durations


def _read_utterance(path, file, index, i) -> Utterance:
    offsets = index["offset"]
    start = int(offsets[i])
    end = int(offsets[i + 1]) if i + 1 < len(offsets) else os.fstat(file.fileno()).st_size
    line = os.pread(file.fileno(), end - start, start).split(b"\n")[0]  # blank lines may follow
    return _parse_line(line, os.path.dirname(os.path.abspath(path)), f"{path}:{index['number'][i]}")


def _parse_line(line, folder, where) -> Utterance | None:
    """A line of a manifest, bytes; None if it is blank."""
    try:
        line = line.decode()
        if not line or line.isspace():
            return None
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: expected UTF-8: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}): {line[:80]!r}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, found {line[:80]!r}")
    _check_types(row, where)
    _check_keys(row, where)
    audio = row.get("audio") or row.get("audio_filepath")
    if not audio:
        raise ValueError(f"{where}: no 'audio'; keys found: {sorted(row)}")
    start, duration = _segment(row, where)
    segment = f"@{start!r}" if start else ""  # two segments of one file need two ids
    language = row.get("language") or row.get("lang")
    return Utterance(
        id=row.get("id") or os.path.splitext(audio)[0] + segment,
        audio=audio_path(folder, audio),
        text=row.get("text"),
        language=language.lower() if language else None,
        start_sec=float(start),
        duration_sec=None if duration is None else float(duration),
        speaker=row.get("speaker"),
        line=where)


def audio_path(folder, audio) -> str:
    """Absolute path of a manifest's audio."""
    path = os.path.join(os.getcwd(), folder, audio)
    if "/../" not in path:
        return os.path.normpath(path)
    return os.path.join(_real_folder(os.path.dirname(path)), os.path.basename(path))


@lru_cache(maxsize=1000)
def _real_folder(path):
    # "link/../x" lies beside what the link points to, not beside the link: only the disk can tell.
    return os.path.realpath(path)


def _check_types(row, where) -> None:
    for key, value in row.items():
        types = MANIFEST_KEYS.get(key)
        if types is None or value is None:  # null is as good as no value
            continue
        is_nan = value != value
        if not isinstance(value, types) or isinstance(value, bool) or is_nan:
            raise ValueError(f"{where}: {key!r} has the wrong type or value: {value!r}")
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            raise ValueError(f"{where}: half a character (a lone surrogate) in {key!r}: {value!r}")


def _check_keys(row, where) -> None:
    """Raise ValueError for a key that isn't read but looks like one that is missing."""
    found = {MEANINGS.get(key, key) for key in row if row[key] is not None}
    for key in row.keys() - MANIFEST_KEYS.keys():
        meant = None if row[key] is None else _look_alike(key)
        if meant and MEANINGS.get(meant, meant) not in found:
            raise ValueError(f"{where}: {key!r} is not read; if it is the {meant!r}, call it so")


@lru_cache(maxsize=1000)
def _look_alike(key) -> str | None:
    """The key of a manifest that another spelling or name stands for: Text, langauge, sentence."""
    key = key.lower()
    for meant, names in ALSO_CALLED.items():
        if key in names.split():
            return meant
    return next(iter(difflib.get_close_matches(key, MANIFEST_KEYS, n=1, cutoff=0.85)), None)


def _segment(row, where):
    """Start in seconds, and duration in seconds or None: to the end of the file."""
    start = row.get("start") or row.get("offset") or 0.0
    duration = row.get("duration")
    begin, end = row.get("begin_time"), row.get("end_time")
    if begin is not None and begin >= 0:
        start = begin
    if row.get("end") is not None:
        end = row["end"]
    if end is not None and end >= 0:
        if duration is not None and abs(start + duration - end) > 0.02:
            raise ValueError(f"{where}: start {start} s, duration {duration} s, but end {end} s")
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
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:  # it names its own file: not what the user knows
            raise OSError(error.errno, error.strerror, str(file)) from None


# --------------------------------------------------------------------------------------- 2. audio

class AudioError(ValueError):
    """A clip that can't be used. `reason` is a short constant that rejections are counted by."""
    def __init__(self, utterance, reason, detail):
        u = utterance
        super().__init__(f"{u.line}: {u.id}: {u.audio}: {reason}: {detail}")
        self.reason = reason


# What soundfile raises for files that it can't read; TypeError is its answer to headerless formats.
UNREADABLE = (OSError, soundfile.SoundFileError, TypeError)
UNKNOWN = 2 ** 62      # frames that libsndfile reports where it can't tell: that or more
NO_SIZE = 0x7FFF0000  # bytes; programs that write to a pipe put this or more into the header of a wav


def load_audio(utterance: Utterance, max_sec=MAX_SEC, for_training=True) -> np.ndarray:
    """Decode one clip: wav, flac, mp3, ogg, ...; any rate and channels -> (n,) float32, 16 kHz.

    Nothing is ever cut to fit. Raises AudioError, with the line of the manifest in its message, for
    what can't be used: unreadable, past_end, too_short, too_long, not_finite; and for what must not
    be learned from: silent (unless the text says so), cancelled, clipped. for_training=False: the
    latter only warn, since evaluation hears all that can be decoded.
    """
    try:
        channels, rate = _decode(utterance, max_sec)
    except UNREADABLE as error:
        raise AudioError(utterance, "unreadable", error) from None
    audio = channels.mean(1)
    if not np.isfinite(audio).all():
        raise AudioError(utterance, "not_finite", "NaN or infinite samples")
    defect = _find_defect(channels, audio)
    if defect == "silent" and utterance.text == "":
        defect = None
    if defect:
        error = AudioError(utterance, defect, DEFECTS[defect])
        if for_training:
            raise error
        warnings.warn(str(error))  # shown once a clip
    if rate != SAMPLE_RATE:
        audio = soxr.resample(audio, rate, SAMPLE_RATE)
    return audio


DEFECTS = {  # what must not be learned from
    "silent": "no sample is above 0.0001 of full scale, a constant offset aside",
    "cancelled": "the average of the channels has under 1 % of their power: opposite phase?",
    "clipped": "over 2 % of the samples are at full scale"}


def _find_defect(channels, audio) -> str | None:
    """channels (n, C), their average (n,) -> a key of DEFECTS."""
    channels = channels - channels.mean(0)  # a dead microphone may have a constant offset
    mean = channels.mean(1)
    if (mean ** 2).mean() < 0.01 * (channels ** 2).mean():
        return "cancelled"
    if np.abs(mean).max() < 1e-4:  # -80 dBFS
        return "silent"
    if (np.abs(audio) > 0.999).mean() > 0.02:  # a few clipped peaks are normal
        return "clipped"
    return None


def _decode(utterance, max_sec) -> tuple[np.ndarray, int]:
    """The utterance's samples, (n, C) float32, and their rate in Hz.

    By libsndfile, which jumps to a segment but believes the header; or, where the header's length
    is needed and may be wrong, by FFmpeg, which reads to the end.
    """
    with soundfile.SoundFile(utterance.audio) as file:
        damage = _find_damage(file)
        if damage:
            raise AudioError(utterance, "unreadable", damage)
        rate, frames = file.samplerate, file.frames
        end = utterance.start_sec + (utterance.duration_sec or math.inf)
        if end > frames / rate and not _is_length_right(file):
            return _decode_to_the_end(utterance, max_sec, rate, _promised_seconds(file))

        first, count = _segment_samples(utterance, rate, frames, max_sec)
        if first and file.seekable():
            file.seek(first)
        elif first:
            file.read(first)
        audio = file.read(count, dtype="float32", always_2d=True)
    if len(audio) < count - 0.01 * rate:
        detail = f"{len(audio)} of {count} samples could be decoded"
        raise AudioError(utterance, "unreadable", detail)
    return audio, rate


def _decode_to_the_end(utterance, max_sec, rate, promised_sec):
    """Like `_decode`, by FFmpeg. promised_sec: what the file surely holds, unless it is cut off."""
    needed_sec = utterance.start_sec + (utterance.duration_sec or max_sec) + 1
    chunks = []  # from the start of the segment on
    n = 0        # samples so far
    for chunk, rate in _ffmpeg_chunks(utterance.audio):
        skipped = max(0, round(utterance.start_sec * rate) - n)
        n += len(chunk)
        if skipped < len(chunk):
            chunks.append(chunk[skipped:])
        if n > needed_sec * rate:
            break
    else:
        if n < (promised_sec - 0.05) * rate:
            detail = f"the header promises {promised_sec:.2f} s, the file holds {n / rate:.2f} s"
            raise AudioError(utterance, "unreadable", detail)
    _, count = _segment_samples(utterance, rate, n, max_sec)
    return np.concatenate(chunks)[:count], rate


def _segment_samples(utterance, rate, frames, max_sec) -> tuple[int, int]:
    """First sample of an utterance and how many, in a file of `frames` samples."""
    first = round(utterance.start_sec * rate)
    if utterance.duration_sec is None:
        count = frames - first
    else:
        count = round(utterance.duration_sec * rate)
    # A manifest may give a file's length rounded to 10 ms; more than that missing is an error.
    if first >= frames or first + count > frames + 0.01 * rate:
        end, file_end = (first + count) / rate, frames / rate
        detail = f"segment ends at {end:.2f} s, file at {file_end:.2f} s"
        raise AudioError(utterance, "past_end", detail)
    seconds = count / rate
    if not MIN_SEC <= seconds <= max_sec:
        reason = "too_short" if seconds < MIN_SEC else "too_long"
        detail = f"{seconds:.2f} s is outside {MIN_SEC} to {max_sec} s"
        raise AudioError(utterance, reason, detail)
    return first, count


def _find_damage(file) -> str | None:
    """What is wrong with a file that libsndfile reads without complaint: only its log tells."""
    log = file.extra_info
    size = re.search(r"^\s*(?:data|SSND|Data Size|Riff size|riff)\s*: (\d+) \(should be (\d+)\)",
                     log, re.MULTILINE)
    if size and int(size[1]) < NO_SIZE and int(size[1]) - int(size[2]) > 64:
        return f"the header promises {size[1]} bytes of samples, the file holds {size[2]}"
    if "Last page lacks an end-of-stream bit" in log and "Junk after the last page" in log:
        return "the file ends inside a page of Ogg: cut off"
    # A header that was never brought up to date: behind its samples come more, and no chunk.
    end = re.search(r"(?:Unknown chunk marker \(\w+\)|Have 0 marker) at position (\d+)", log)
    bytes_a_second = re.search(r"Bytes/sec\s*: (\d+)", log)
    if end and bytes_a_second and file.frames:
        rest = os.path.getsize(file.name) - int(end[1])
        if rest > 0.25 * int(bytes_a_second[1]):
            return f"the header's samples end at byte {end[1]}, but {rest} more bytes follow"
    return None


def _is_length_right(file) -> bool:
    """Whether the header's length is that of the whole file. Raises OSError for joined flacs."""
    if file.format in ("MP3", "OGG"):  # a guess; or that of the first of several files joined
        return False
    if file.format == "FLAC":
        with open(file.name, "rb") as raw:
            content = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
            second = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22").search(content, 1)
            if second:  # libsndfile stops there, FFmpeg loses samples
                raise OSError(f"a second flac begins at byte {second.start()}: join samples, not files")
    return 0 < file.frames < UNKNOWN


def _promised_seconds(file) -> float:
    """The length that a compressed file has at least, unless it is cut off; 0 if nothing says so."""
    if file.format == "MP3":  # without a Xing, Info or VBRI frame the length is a guess
        with open(file.name, "rb") as raw:
            head = raw.read(2 ** 20)
        if not re.search(rb"\xff[\xe2-\xff].{11,36}(Xing|Info|VBRI)", head, re.DOTALL):
            return 0.0
    return file.frames / file.samplerate if file.frames < UNKNOWN else 0.0


def _ffmpeg_chunks(path):
    """Yield (samples (n, C) float32, rate in Hz) up to the real end of a file. Raises OSError."""
    import av  # takes 0.1 s, and few corpora need it
    try:
        with av.open(path) as container:
            to_float = av.AudioResampler(format="fltp")
            for packet in container.demux(audio=0):
                try:
                    frames = packet.decode()
                except av.InvalidDataError:
                    if container.format.name != "mp3":
                        raise
                    continue  # padding or a tag behind the last frame
                for frame in frames:
                    for part in to_float.resample(frame):
                        yield part.to_ndarray().T, part.sample_rate
    except (av.FFmpegError, IndexError, ValueError) as error:  # ValueError: joined, of two formats
        raise OSError(f"FFmpeg: {error}") from None


def _file_seconds(path) -> float:
    """Length of an audio file: by its header where that can be trusted. Raises one of UNREADABLE.

    mp3 and ogg are decoded: 0.5 ms a second of audio, opus 1.2 ms.
    """
    with soundfile.SoundFile(path) as file:
        damage = _find_damage(file)
        if damage:
            raise OSError(damage)
        if _is_length_right(file):
            return file.frames / file.samplerate
        rate = file.samplerate
    n = 0
    for chunk, rate in _ffmpeg_chunks(path):
        n += len(chunk)
    return n / rate


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
    """Decode clips, make features, pad. max_sec, for_training: see `load_audio`.

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
        self.durations = np.asarray(durations, dtype=np.float32)  # (n,)
        self.global_batch = global_batch
        self.seed = seed
        self.steps_per_epoch = math.ceil(len(self.durations) / global_batch)
        self._number = None  # of the epoch whose order is kept: the next step asks for the same one
        self._order = None   # (n,) uint32

    def __getitem__(self, step) -> list[int]:
        """Indices of the utterances of one step."""
        number, batch = divmod(step, self.steps_per_epoch)
        if number != self._number:
            self._number = number
            numbers = np.arange(len(self.durations), dtype=np.uint32)
            self._order = np.random.default_rng([self.seed, number]).permutation(numbers)
        rows = self._order[batch * self.global_batch:(batch + 1) * self.global_batch]
        return rows[self.durations[rows].argsort(kind="stable")].tolist()

    def epoch(self, number) -> list[list[int]]:
        """Batches of indices of one epoch."""
        first = number * self.steps_per_epoch
        return [self[step] for step in range(first, first + self.steps_per_epoch)]


@dataclass
class Steps(torch.utils.data.Dataset):
    """Item s = this rank's micro-batches of optimiser step s, made by a worker of the loader.

    Micro-batches are cut after sharing out, lengths still sorted. A rank may get fewer rows than
    another, or none. augment: optional function (mel (n_mels, T), utterance, step) -> mel.
    micro_batch_sec: a micro-batch's most seconds, padding included; where given, it decides alone.
    """
    utterances: Sequence[Utterance]
    plan: Plan
    micro_batch: int
    rank: int = 0
    world: int = 1
    n_mels: int = 128
    augment: Callable | None = None
    micro_batch_sec: float | None = None

    def __getitem__(self, step) -> list[Batch]:
        augment = partial(self.augment, step=step) if self.augment else None
        batches = []
        for indices in self.cut(self.plan[step][self.rank::self.world]):
            rows = [self.utterances[i] for i in indices]
            batches.append(load_batch(rows, self.n_mels, augment))
        return batches

    def cut(self, share) -> list[list[int]]:
        """Indices of this rank, by length -> those of each micro-batch. A clip too long is alone."""
        batches = []
        for i in share:  # a batch is padded to the length of its last clip
            n = len(batches[-1]) + 1 if batches else math.inf
            fits = n <= self.micro_batch
            if self.micro_batch_sec is not None:
                fits = n * self.plan.durations[i] <= self.micro_batch_sec
            if not fits:
                batches.append([])
            batches[-1].append(i)
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
    if isinstance(utterances, Manifest):
        first = utterances.first_without("labelled")
        utterances = [first] if first else []
    for u in utterances:
        if u.text is None or not u.language:
            raise ValueError(f"{u.line}: {u.id}: 'text' and 'language' are needed here, "
                             f"found {u.text!r}, {u.language!r}")


def measure(utterances) -> np.ndarray:
    """Durations in seconds, (n,) float32, by the manifest or else by the file's header.

    0.0 if that is unreadable: load_audio rejects it, with its reason, when it is its turn.
    """
    if isinstance(utterances, Manifest):
        return utterances.durations()
    return np.array([_seconds(u, unreadable=0.0) for u in utterances], dtype=np.float32)


def _seconds(utterance, unreadable) -> float:
    if utterance.duration_sec is not None:
        return utterance.duration_sec
    try:
        return _file_seconds(utterance.audio) - utterance.start_sec
    except UNREADABLE:
        return unreadable


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
NORMALISER = "opd-asr-2"
# In these languages numbers are read out, and the unit is the character.
HANZI_LANGUAGES = set("zh cmn zho chi cn yue wuu nan hak chinese mandarin cantonese".split())
CHARACTER_LANGUAGES = HANZI_LANGUAGES | set(
    "ja jpn jp japanese ko kor korean th tha thai lo lao km khmer my burmese".split())
ENGLISH = {"en", "eng", "english"}
DOTLESS_I = set("tr tur turkish az aze azerbaijani".split())  # I is the capital of ı, İ of i
# Thai, CJK and kana, hangul: the inside of a regular expression's [...].
ONE_CHARACTER = "\u0e00-\u0e7f\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u201b\u02bc\u00b4`", "'"))
FRACTION = "[\u00bc-\u00be\u2150-\u215e]"
# Soft hyphen, zero width, joiners, direction, variation selectors, tags of emoji.
INVISIBLE = ("[\u00ad\u034f\u061c\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u20e3\ufe00-\ufe0f"
             "\ufeff\U000e0000-\U000e0fff]")


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
    Others: letters, digits and marks are kept, see `words`; in Mandarin and Cantonese, numbers are
    read out before, see `mandarin`. Units are words (WER), characters (CER), or both (MER): one a
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
    text = unicodedata.normalize("NFKC", text)
    if parts[0] in DOTLESS_I:
        text = text.replace("I", "ı").replace("İ", "i")
    text = text.lower()
    if unit == "WER" and parts[0] in ENGLISH:
        return english(text) or words(text)

    if HANZI_LANGUAGES & set(parts):
        text = mandarin(text)
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


# What wetext would misread -> what it reads as it is said; for text in NFKC and lower case.
BEFORE_WETEXT = [(re.compile(pattern), replacement) for pattern, replacement in [
    (r"(?<=\d),(?=\d{3}(?!\d))", ""),                         # 1,000: it stops at the comma
    ("\u2044", "/"),                                           # NFKC writes ½ with this slash
    (r"(?<=[\d%])\s*[–—−]\s*(?=\d)", "-"),                    # it knows one of the dashes
    (r"(?<=[a-z])-(?=\d)", " "),                               # covid-19 is not minus 19
    (r"%\s*[-~]\s*(?=\d)", "%到"),                            # nor is the 30 of 20%-30%
    (r"(\d+(?:\.\d+)?)‰", r"千分之\1"),                        # it has no ‰
    (r"约(?=\d)", "约 "),                                      # 约1/4 becomes 四分之约一
    (r"(?<=\d)\s*×\s*(?=\d)", "乘"),                          # 7×24: 24 digit by digit
    (r"(?<![\d.])(\d)\.(\d+)\.(\d+)(?![\d.])", r"\1点\2点\3"),  # it reads one point of 1.2.3
]]
MONTH_DAY = re.compile(r"(?<![\d.])(1[0-2])\.(\d\d)(?![\d.%‰])")  # it reads 12.25 as a day
# What it reads in capitals only: currencies, o2o; and a letter behind digits, which is no unit.
CAPITALS = re.compile(r"(?<![a-z])(?:cny|rmb|hkd|usd|eur|gbp|jpy)(?=\s?\d)|(?<![a-z])[a-z](?=\$\d)"
                      r"|(?<![a-z])[a-z]2[a-z](?![a-z])|(?<=\d)[a-z](?![\w/.])")
DIGITS = str.maketrans("0123456789", "零一二三四五六七八九")
SAID_ALIKE = str.maketrans("两幺〇", "二一零")


def mandarin(text: str) -> str:
    """Numbers, dates, times, amounts, units -> hanzi as they are said; all hanzi simplified.

    By wetext, the rules of WeTextProcessing; erhua and interjections stay. For text in NFKC and
    lower case. What is said in two ways is folded: 两 is 二, 幺 is 一, 〇 and ○ are 零, 百分之一百 is
    百分之百.
    """
    text = re.sub(r"[^\D0-9]", lambda digit: str(int(digit[0])), text)  # of other scripts
    if re.search(r"\d", text):
        for pattern, replacement in BEFORE_WETEXT:
            text = pattern.sub(replacement, text)
        text = MONTH_DAY.sub(lambda number: f"{number[1]}点{number[2].translate(DIGITS)}", text)
        text = CAPITALS.sub(lambda match: match[0].upper(), text)
    clauses = re.split("([,。!?;])", text)  # its time goes into those with digits
    text = "".join(map(_say, clauses)).lower()
    text = text.translate(DIGITS).translate(SAID_ALIKE)  # it may have left digits
    text = re.sub("(?<=[零一二三四五六七八九])○|○(?=[零一二三四五六七八九])", "零", text)
    return re.sub("百分之一百(?![零一二三四五六七八九])", "百分之百", text)


@lru_cache(maxsize=10_000)
def _say(clause) -> str:
    return _wetext().normalize(clause)


@lru_cache(maxsize=1)
def _wetext():
    from wetext import Normalizer  # takes half a second
    return Normalizer(lang="zh", operator="tn", traditional_to_simple=True, remove_erhua=False,
                      remove_interjections=False)


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


# More than the public test sets have (WenetSpeech's has 24,774 clips). 10,000 draws of a million
# clips would take ten minutes.
MANY_BLOCKS = 30_000


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
    whole blocks: all utterances of a speaker share a microphone and a voice. More than MANY_BLOCKS
    are not drawn: their rates come from the normal distribution with the same mean and variance.
    nan: a draw whose denominators are all 0, and every draw if there is only one block.
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
    rng = np.random.default_rng(seed)
    if size > MANY_BLOCKS:  # the distribution that the draws tend to, by the delta method
        rate = numerators.sum() / denominators.sum()
        deviation = np.sqrt(((numerators - rate * denominators) ** 2).sum()) / denominators.sum()
        return rate + deviation * rng.standard_normal(n)
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

AUDIO_SUFFIXES = set(  # what is read
    ".wav .flac .mp3 .ogg .oga .opus .aiff .aif .aifc .au .snd .caf .w64 .rf64 .sph".split())
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
    test_meeting. Memory does not grow with the corpus, but for 16 bytes a segment. Raises
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

    An id is the path below ROOT with - for /. Links to folders are not followed. Other files, and
    transcripts without audio, are left out and counted. Raises FileNotFoundError without audio.
    """
    visible = [p for p in root.rglob("*") if p.is_file() and not p.name.startswith(".")]
    files = [p for p in visible if p.suffix.lower() in AUDIO_SUFFIXES]
    used = set(files) | {p.with_suffix(".txt") for p in files}
    others = [p for p in visible if p not in used]
    if not files:
        suffixes = ", *".join(sorted(AUDIO_SUFFIXES))
        found = sorted({p.suffix for p in others})
        raise FileNotFoundError(f"{root}: no audio; expected files *{suffixes} in it or below; "
                                f"suffixes found: {found}")
    for path in sorted(others):
        yield root.name, {"audio": str(path), "left_out": f"not read: *{path.suffix}"}
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

    Rows go to the disk as they come: WenetSpeech has 15 million. Raises ValueError, and leaves OUT
    as it was, where two rows of a manifest share an id, or if nothing is left.
    """
    out = Path(os.path.abspath(out))
    drafts = {}  # name: Draft
    try:
        for name, row in tqdm(rows, desc="corpus", unit="clip", mininterval=REFRESH_SEC):
            if name not in drafts:
                drafts[name] = Draft(out / f"{name}.jsonl")
            drafts[name].add(row)
        drafts = dict(sorted(drafts.items()))
        for draft in drafts.values():
            draft.check_ids()
        if not any(draft.offsets for draft in drafts.values()):
            reasons = {name: draft.reasons() for name, draft in drafts.items()}
            raise ValueError(f"no utterance is left. Left out: {reasons}")
        for draft in drafts.values():
            draft.publish()
    finally:
        for draft in drafts.values():
            draft.discard()


class Draft:
    """A manifest while it is written, under a temporary name, and what is said about it."""
    def __init__(self, path):
        self.path = path
        self.temporary = path.with_name(path.name + ".tmp")
        self.file = None
        self.offsets = array("q")  # of the lines, bytes
        self.hashes = array("Q")   # of their ids
        self.seconds = 0.0
        self.speakers = set()
        self.without_text = 0
        self.left_out = Counter()  # reason: rows
        self.first = {}            # reason: audio of the first of them

    def add(self, row) -> None:
        reason = _why_left_out(row)
        if reason:
            self.left_out[reason] += 1
            self.first.setdefault(reason, row["audio"])
            return
        if self.file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.temporary.open("w+b")
        self.offsets.append(self.file.tell())
        self.hashes.append(hash_id(row["id"]))
        self.seconds += row["duration"]
        self.without_text += "text" not in row
        if "speaker" in row:
            self.speakers.add(row["speaker"])
        row = row | {"audio": os.path.relpath(row["audio"], os.path.realpath(self.path.parent))}
        self.file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    def check_ids(self) -> None:
        pair = _first_repeated(np.array(self.hashes), lambda i: self._read(i)["id"])
        if pair:
            first, second = map(self._read, pair)
            raise ValueError(f"{self.path.stem}: expected one id each: {first['audio']} and "
                             f"{second['audio']} are both {first['id']!r}")

    def _read(self, i) -> dict:
        self.file.seek(self.offsets[i])
        row = json.loads(self.file.readline())
        return row | {"audio": os.path.normpath(self.path.parent / row["audio"])}

    def publish(self) -> None:
        """Put the manifest in place; print what it holds."""
        if self.file:
            self.file.close()
            os.replace(self.temporary, self.path)
        said = f"{len(self.offsets)} utterances, {self.seconds / 3600:.2f} h, "
        said += f"{len(self.speakers) or 'unknown'} speakers"
        if self.without_text:
            said += f", {self.without_text} without text"
        if not self.offsets:
            said += "; not written"
        if self.left_out:
            said += f"; left out: {self.reasons()}"
        print(f"{self.path}: {said}")

    def reasons(self) -> str:
        items = self.left_out.items()
        return "; ".join(f"{n} {reason} (first: {self.first[reason]})" for reason, n in items)

    def discard(self) -> None:
        if self.file:
            self.file.close()
            self.temporary.unlink(missing_ok=True)
        with suppress(OSError):  # not empty: something was published, or was there before
            self.path.parent.rmdir()


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
