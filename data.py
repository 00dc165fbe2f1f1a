"""What speech and text *are* in this project: manifests, audio, log-mel, batches, and the metric.

In reading order:
  1. manifest   JSON Lines, one utterance a line                    read_manifest, write_jsonl
  2. audio      file or segment -> 16 kHz mono float32              load_audio
  3. features   Whisper's log-mel, 100 frames a second              log_mel
  4. batches    a pure function of (seed, step): resume is free     Plan, Steps, loader
  5. metric     normalised text, edit counts, bootstrap interval    normalize, edit_counts, bootstrap
  6. corpora    manifests for corpora that lie on disk              python data.py NAME ROOT OUT
  7. demo       a bilingual corpus spoken by espeak-ng              python data.py demo --out DIR --seed N

NAME is librispeech, aishell1, wenetspeech or folder (any folder of audio; the transcript of x.wav is x.txt, where there is one;
`python data.py folder ROOT OUT --language CODE`). ROOT is where it was unpacked, OUT the folder for the manifests; audio stays in place.

A manifest line (paths are relative to the manifest's own folder):
  {"id": "en-17", "audio": "wav/en-17.wav", "text": "put two cups on the shelf", "language": "en"}
  optional: "start" and "duration" in seconds (a segment of a longer file); "speaker"; any other key is kept out of the way.
  NeMo's spelling (audio_filepath, offset) and open-audio-opd's (begin_time, end_time; -1: whole file) are read too.
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
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import jiwer
import numpy as np
import soundfile
import torch
import torchaudio
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

SAMPLE_RATE = 16_000  # Hz, mono: what every model here expects
HOP = 160             # samples between mel frames: 100 frames a second
N_FFT = 400           # samples in an analysis window: 25 ms
MIN_SEC, MAX_SEC = 0.1, 30.0  # accepted clips; 30 s is what the published student was trained on
MAX_EVAL_SEC = 40.0           # and 40 s what it is evaluated on: LibriSpeech's test sets have clips of 35 s


# ---------------------------------------------------------------------------- 1. manifest

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


def read_manifest(path) -> list[Utterance]:
    """Read a JSON Lines manifest, in file order. Raises ValueError naming file, line and value; audio is opened later."""
    path, utterances, seen = Path(path), [], {}
    for number, raw in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not raw.strip():
            continue
        utterance = _parse_line(raw, f"{path}:{number}", path.parent)
        if utterance.id in seen:
            raise ValueError(f"{path}:{number}: id {utterance.id!r} already stands on line {seen[utterance.id]}")
        seen[utterance.id] = number
        utterances.append(utterance)
    if not utterances:
        raise ValueError(f"{path}: the manifest has no utterance")
    return utterances


def _parse_line(raw, where, folder) -> Utterance:
    try:
        row = json.loads(raw)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}): {raw[:80]!r}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, found {raw[:80]!r}")

    def get(types, *names):
        for name in names:
            value = row.get(name)
            if value is not None:
                if not isinstance(value, types) or isinstance(value, bool) or value != value:  # value != value: NaN
                    raise ValueError(f"{where}: {name!r} has the wrong type or value: {value!r}")
                return value
        return None

    audio = get(str, "audio", "audio_filepath")
    if not audio:
        raise ValueError(f"{where}: no 'audio'; keys found: {sorted(row)}")
    start = get((int, float), "start", "offset")
    duration = get((int, float), "duration")
    begin, end = get((int, float), "begin_time"), get((int, float), "end_time")
    if begin is not None and begin >= 0:
        start = begin
    if end is not None and end >= 0:
        duration = end - (start or 0.0)
    start = start or 0.0
    if start < 0 or not math.isfinite(start) or (duration is not None and not 0 < duration < math.inf):
        raise ValueError(f"{where}: segment start {start} s, duration {duration} s")
    language = get(str, "language", "lang")
    name = Path(audio).stem + (f"@{start!r}" if start else "")
    return Utterance(
        id=get(str, "id") or name,
        audio=os.path.normpath(folder.absolute() / audio), text=get(str, "text"),
        language=language.lower() if language else None, start_sec=float(start),
        duration_sec=None if duration is None else float(duration), speaker=get(str, "speaker"), line=where)


def write_jsonl(path, rows) -> None:
    """Write dicts as JSON Lines: into a temporary file first, so that a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(temporary, path)


# ---------------------------------------------------------------------------- 2. audio

class AudioError(ValueError):
    """A clip that can't be used. `reason` is a short constant that rejections are counted by."""
    def __init__(self, reason, message):
        super().__init__(message)
        self.reason = reason


UNREADABLE = (OSError, soundfile.SoundFileError, TypeError)  # TypeError: soundfile's answer to headerless formats


@lru_cache(maxsize=8)  # the windowed-sinc kernel is costlier than the resampling of a short clip
def _resampler(rate):
    return torchaudio.transforms.Resample(rate, SAMPLE_RATE)


def load_audio(utterance: Utterance, max_sec=MAX_SEC) -> np.ndarray:
    """Decode one clip: wav, flac, mp3, ogg; any rate, any number of channels -> (n_samples,) float32, 16 kHz, mono.

    Only the segment is decoded, never the whole file. Raises AudioError, with the manifest line in the message, for what must not
    be learned from: unreadable, past_end, too_short, too_long, not_finite, silent, clipped. Nothing is ever cut to fit.
    """
    def reject(reason, detail):
        return AudioError(reason, f"{utterance.line}: {utterance.id}: {utterance.audio}: {reason}: {detail}")

    try:
        with soundfile.SoundFile(utterance.audio) as file:
            # libsndfile reads a cut wav to its end without complaint; its log alone tells. 2^32 - 1 is what a pipe leaves behind.
            cut = re.search(r"^data\s*: (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
            if cut and int(cut[1]) < 2 ** 31:
                raise reject("unreadable", f"the header promises {cut[1]} bytes of samples, the file holds {cut[2]}")
            rate = file.samplerate
            first = round(utterance.start_sec * rate)
            whole = utterance.duration_sec is None
            count = file.frames - first if whole else round(utterance.duration_sec * rate)
            # A manifest may give a whole file's length rounded to 10 ms; more than that missing is an error.
            if first >= file.frames or first + count > file.frames + 0.01 * rate:
                raise reject("past_end", f"segment ends at {(first + count) / rate:.2f} s, file at {file.frames / rate:.2f} s")
            if not MIN_SEC <= count / rate <= max_sec:
                reason = "too_short" if count / rate < MIN_SEC else "too_long"
                raise reject(reason, f"{count / rate:.2f} s is outside {MIN_SEC} to {max_sec} s")
            file.seek(first)
            audio = file.read(count, dtype="float32", always_2d=True).mean(1)  # (n,) mono
    except UNREADABLE as error:
        raise reject("unreadable", error) from None
    if len(audio) < count - 0.01 * rate:  # the header promised more than the file holds
        raise reject("unreadable", f"{len(audio)} of {count} samples could be decoded")
    if not np.isfinite(audio).all():
        raise reject("not_finite", "NaN or infinite samples")
    peak = np.abs(audio).max()
    if peak < 1e-4:  # -80 dBFS: digital silence, a dead microphone
        raise reject("silent", f"peak {peak:.1e} of 1.0")
    if (np.abs(audio) > 0.999).mean() > 0.02:  # a few clipped peaks are normal; a flattened recording is not
        raise reject("clipped", f"{(np.abs(audio) > 0.999).mean():.0%} of the samples at full scale")
    if rate != SAMPLE_RATE:
        audio = _resampler(rate)(torch.from_numpy(audio)).numpy()
    return audio


# ---------------------------------------------------------------------------- 3. features

@lru_cache(maxsize=2)
def _mel_transform(n_mels):
    transform = torchaudio.transforms.MelSpectrogram(
        SAMPLE_RATE, n_fft=N_FFT, hop_length=HOP, f_min=0, f_max=8000, n_mels=n_mels, power=2, norm="slaney", mel_scale="slaney")
    # Whisper's filters are computed in fp64 and then rounded; torchaudio's default fp32 differs by 2e-5 after the logarithm.
    torch.set_default_dtype(torch.float64)
    try:
        filters = torchaudio.functional.melscale_fbanks(N_FFT // 2 + 1, 0.0, 8000.0, n_mels, SAMPLE_RATE, "slaney", "slaney")
    finally:
        torch.set_default_dtype(torch.float32)
    transform.mel_scale.fb = filters.float()
    return transform


def log_mel(audio: np.ndarray, n_mels: int = 128) -> torch.Tensor:
    """Whisper's features: (n_samples,) at 16 kHz -> (n_mels, n_samples // 160) float32, 100 frames a second.

    Equal to transformers' WhisperFeatureExtractor on a clip alone. Always one clip at a time: Whisper's clamp is relative to the
    loudest bin, and reflection at the end needs the clip's own samples, so features of a padded batch are not those of its clips.
    """
    power = _mel_transform(n_mels)(torch.from_numpy(audio))[:, :-1]  # (n_mels, T); Whisper drops the last, half-empty frame
    logs = power.clamp(min=1e-10).log10()
    logs = torch.maximum(logs, logs.max() - 8.0)  # 80 dB below the loudest bin is the floor
    return (logs + 4.0) / 4.0                     # roughly -1 to 1


# ---------------------------------------------------------------------------- 4. batches

@dataclass
class Batch:
    """Utterances that go through a model together: a micro-batch."""
    utterances: list[Utterance]
    mel: torch.Tensor                  # (B, n_mels, T) zeros after a row's own frames
    n_frames: torch.Tensor             # (B,) mel frames of each row
    rejected: list[tuple[str, str]]    # (reason, message) of clips that were left out
    padded: dict[int, torch.Tensor] = field(default_factory=dict)  # row -> mel of the clip with zeros up to half a second: how Qwen3-ASR hears shorter ones

    @property
    def audio_sec(self) -> float:
        return self.n_frames.sum().item() * HOP / SAMPLE_RATE


class Plan:
    """Which utterances make up optimiser step `s`: a pure function of (seed, s), so there is no position to save.

    An epoch is a seeded shuffle cut into batches; inside a batch the order is by length, so that the micro-batches cut from it need
    little padding. Batches stay random: sorted ones (all of one length, hence of one kind of sentence) were measured to keep a
    model trained from scratch on its first plateau for more than twice as long. Every utterance comes once an epoch; the last
    batch may be smaller. The ranks share out each global batch, so any number of processes makes the same update.
    """
    def __init__(self, durations, global_batch, seed):
        self.durations, self.global_batch, self.seed = list(durations), global_batch, seed
        self.steps_per_epoch = math.ceil(len(self.durations) / global_batch)
        self.cached = None, []  # (epoch, its batches)

    def epoch(self, epoch) -> list[list[int]]:
        """Batches of indices of one epoch."""
        if self.cached[0] != epoch:
            self.cached = epoch, self._shuffle(epoch)
        return self.cached[1]

    def _shuffle(self, epoch):
        rng, order = random.Random(f"{self.seed}/{epoch}"), list(range(len(self.durations)))
        rng.shuffle(order)
        batches = [order[b:b + self.global_batch] for b in range(0, len(order), self.global_batch)]
        return [sorted(batch, key=self.durations.__getitem__) for batch in batches]

    def __getitem__(self, step) -> list[int]:
        return self.epoch(step // self.steps_per_epoch)[step % self.steps_per_epoch]


def load_batch(utterances, n_mels=128, augment=None, keep_going=True, max_sec=MAX_SEC) -> Batch:
    """Decode clips, make features, pad. A clip that can't be used is left out and reported in `rejected`, or raised.

    augment: optional function (mel (n_mels, T), utterance) -> mel.
    """
    kept, mels, rejected, padded = [], [], [], {}
    for utterance in utterances:
        try:
            audio = load_audio(utterance, max_sec)
            mel = log_mel(audio, n_mels)  # (n_mels, T)
        except AudioError as error:
            if not keep_going:
                raise
            rejected.append((error.reason, str(error)))
            continue
        if len(audio) < SAMPLE_RATE // 2:
            padded[len(kept)] = log_mel(np.pad(audio, (0, SAMPLE_RATE // 2 - len(audio))), n_mels)
        mels.append(augment(mel, utterance) if augment else mel)
        kept.append(utterance)
    n_frames = torch.tensor([mel.shape[1] for mel in mels], dtype=torch.long)
    batch = torch.zeros(len(mels), n_mels, int(n_frames.max()) if mels else 0)  # (B, n_mels, T)
    for row, mel in zip(batch, mels):
        row[:, :mel.shape[1]] = mel
    return Batch(kept, batch, n_frames, rejected, padded)


def pad_rows(rows, pad_id, device=None, side="right"):
    """Lists of ids -> ids (B, R), padded on one side, and mask (B, R), True on the ids of the lists."""
    tensors = [torch.tensor(row, device=device) for row in rows]
    masks = [torch.ones_like(row, dtype=torch.bool) for row in tensors]
    ids = pad_sequence(tensors, batch_first=True, padding_value=pad_id, padding_side=side)
    return ids, pad_sequence(masks, batch_first=True, padding_side=side)


class Steps(torch.utils.data.Dataset):
    """Item s = this rank's micro-batches of optimiser step s, made by a loader worker.

    Micro-batches are cut after sharing out, lengths still sorted. A rank may get fewer rows than another, or none.
    """
    def __init__(self, utterances, plan, micro_batch, rank=0, world=1, n_mels=128, augment=None):
        self.utterances, self.plan, self.micro_batch, self.rank, self.world = utterances, plan, micro_batch, rank, world
        self.n_mels, self.augment = n_mels, augment

    def __len__(self):
        return 1 << 62  # steps go on as long as they are asked for

    def __getitem__(self, step) -> list[Batch]:
        mine = [self.utterances[i] for i in self.plan[step][self.rank::self.world]]
        augment = (lambda mel, utterance: self.augment(mel, utterance, step)) if self.augment else None
        return [load_batch(mine[i:i + self.micro_batch], self.n_mels, augment) for i in range(0, len(mine), self.micro_batch)]


def _outlive_sigterm(_worker):
    # torchrun and schedulers signal every process of a group: the trainer saves and stops, and needs its loader until then.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _kill_workers():
    # Python ends its child processes by SIGTERM, which these ignore, and would wait for them for ever.
    for process in multiprocessing.active_children():
        process.kill()


def loader(dataset, items, workers):
    """Yield dataset[i] for i in `items`, in that order, made ahead of time by `workers` processes (0: in this one)."""
    atexit.register(_kill_workers)
    return torch.utils.data.DataLoader(
        dataset, batch_size=None, sampler=items, num_workers=workers, prefetch_factor=4 if workers else None,
        worker_init_fn=_outlive_sigterm)


def check_labelled(utterances) -> None:
    """Raise ValueError, naming the manifest line, unless every utterance has a transcript and a language."""
    for u in utterances:
        if not u.text or not u.language:
            raise ValueError(f"{u.line}: {u.id}: 'text' and 'language' are needed here, found {u.text!r}, {u.language!r}")


def measure(utterances) -> list[float]:
    """Durations in seconds, for bucketing: from the manifest, else from the file's header; 0.0 if that can't be read."""
    durations = []
    for utterance in utterances:
        duration = utterance.duration_sec
        if duration is None:
            try:
                info = soundfile.info(utterance.audio)
                duration = info.frames / info.samplerate - utterance.start_sec
            except UNREADABLE:
                duration = 0.0  # load_audio rejects it, with its reason, when it is its turn
        durations.append(duration)
    return durations


def keyed_uniforms(seed, step, ids, count) -> np.ndarray:
    """Uniforms in [0, 1), (len(ids), count) float32, that depend on nothing but (seed, step, utterance id, column).

    A rollout drawn with them is the same alone or in any batch, on any number of ranks, and after a resume (but for a draw that
    falls within floating-point rounding of the border between two tokens).
    """
    rows = [np.random.default_rng([seed, step, *hashlib.blake2b(i.encode(), digest_size=8).digest()]) for i in ids]
    return np.stack([r.random(count, dtype=np.float32) for r in rows]) if rows else np.zeros((0, count), np.float32)


# ---------------------------------------------------------------------------- 5. metric

NORMALISER = "opd-asr-1"  # name and version of what normalize does: another rule, another table or another reading is another number
HANZI_LANGUAGES = set("zh cmn zho chi cn yue wuu nan hak chinese mandarin cantonese".split())        # digits are read out
CHARACTER_LANGUAGES = HANZI_LANGUAGES | set("ja jpn jp japanese ko kor korean th tha thai lo lao km khmer my burmese".split())
ENGLISH = {"en", "eng", "english"}
APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u201b\u02bc\u00b4`", "'"))  # before NFKC, which takes some of them apart
ZERO_LED = {ord("0") + i: 0xE000 + i for i in range(10)}                              # digits -> private letters
ONE_CHARACTER = "\u0e00-\u0e7f\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"  # Thai, CJK and kana, hangul
HANZI = "零一二三四五六七八九"
TRADITIONAL = str.maketrans("萬億兩點負", "万亿两点负")  # what read_out writes; no other character is simplified


def _parts(language: str | None) -> list[str]:
    if not language:
        raise ValueError("no language given: it decides between character and word error rate")
    return re.findall("[^\\W\\d_]+", language.lower())


def counts_characters(language: str | None) -> bool:
    """True where the error rate counts characters (CER), False where it counts words (WER) or both (MER)."""
    return metric(language) == "CER"


def metric(language: str | None) -> str:
    """"CER", "WER", or "MER" where the code names a language of characters *and* English: zh-en, en-zh, yue-en, ..."""
    parts = _parts(language)
    mixed = CHARACTER_LANGUAGES & set(parts) and ENGLISH & set(parts)
    return "MER" if mixed else "CER" if parts[0] in CHARACTER_LANGUAGES else "WER"


def normalize(text: str, language: str) -> str:
    """The text that is scored: units separated by single spaces. This function *is* the metric.

    All: apostrophes straightened -> NFKC (full width to half width) -> lower case.
    English (WER): Whisper's English normaliser, see `english`.
    Others: every character that is not a letter, digit or mark becomes a space, but an apostrophe inside a word and a point between
    digits stay; in Mandarin and Cantonese, digits are read out before, see `read_out`. Units are words (WER), characters (CER), or
    one a character of CJK, kana, hangul, Thai and one a run of anything else (MER).
    Text with a letter or a digit in it never becomes empty.

    >>> normalize("Don\u2019t  STOP\u2014it\u2019s 3.5%!", "en")
    'do not stop it is 3.5%'
    >>> normalize("\u8bf7\uff0c\u6253\u5f00 A\u706f\u3002", "zh")
    '\u8bf7 \u6253 \u5f00 a \u706f'
    """
    # What can't be seen is no unit and parts no word: soft hyphen, zero width, variation selectors. NFKC would glue 3½ to 31/2.
    text = re.sub(r"(?<=\d)(?=[\u00bc-\u00be\u2150-\u215e])", " ", re.sub("[\u00ad\u200b\u2060\ufeff\u20e3\ufe00-\ufe0f]", "", text))
    kind, text = metric(language), unicodedata.normalize("NFKC", text.translate(APOSTROPHES)).lower()
    if kind == "WER" and _parts(language)[0] in ENGLISH:
        return english(text) or words(text)
    text = words(read_out(text) if HANZI_LANGUAGES & set(_parts(language)) else text)
    return text if kind == "WER" else " ".join("".join(text.split())) if kind == "CER" else " ".join(runs(text))


def runs(text: str) -> list[str]:
    """Words, and every character of a script that counts characters: "put 杯子 here" -> put, 杯, 子, here."""
    return re.findall(rf"[{ONE_CHARACTER}]|[^\s{ONE_CHARACTER}]+", text)


def words(text: str) -> str:
    """Letters, digits and marks; an apostrophe inside a word; a point between digits. All else parts words, joined by single spaces."""
    kept = []
    for i, c in enumerate(text):
        before, after = text[i - 1:i], text[i + 1:i + 2]
        inside_word = c == "'" and before.isalnum() and after.isalnum()
        decimal = c == "." and before.isdigit() and after.isdigit()
        kept.append(c if unicodedata.category(c)[0] in "LNM" or inside_word or decimal else " ")
    return " ".join("".join(kept).split())


@lru_cache(maxsize=1)
def _whisper():
    """transformers' EnglishTextNormalizer with Whisper's 1,739 spellings (.assets/english.json, MIT) and its "3.1" -> "3.one" undone."""
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer  # here: only English needs it
    normalizer = EnglishTextNormalizer(json.loads((Path(__file__).parent / ".assets" / "english.json").read_text()))
    numbers = normalizer.standardize_numbers
    normalizer.standardize_numbers = lambda s: re.sub(r"(?<=[\d.$£€¢])one(?=s?\b)|\bone(?=\.\d)", "1", numbers(s))
    return normalizer


def english(text: str) -> str:
    """Whisper's English normaliser: contractions and titles written out, numbers in digits, American spelling, no accents, no uh or um.

    Repaired before it: what stands in brackets is kept; O'Brien is one word, not "0 brien"; quotation marks are not contractions;
    1,2,3 is not 123; "5 %" is 5%; zeros at the front stay (0171, 007). Wants NFKC, lower case and straight apostrophes.
    """
    text = re.sub(r"[()\[\]<>{}]", " ", text)
    text = re.sub(r"\bo'(?=[a-z]{2})|\bo (?=clock\b)", "o", text)                       # o'brien, o'clock, o clock
    text = re.sub(r"(?<=\w)\s+(?='(?:s|re|d|ll|ve|m|t)(?![\w'-]))", "", text)          # it 's
    text = re.sub(r"(?<!\w)'|'(?!\w)", " ", text)
    text = re.sub(r"(?<=\d),(?!\d{3}(?!\d))", " ", text)
    text = re.sub(r"(?<=\d)\s+(?=%)|(?<=[$£€¢])\s+(?=\d)", "", text)
    text = re.sub(r"(?<![\d.,])0\d+(?!\d|\.\d)", lambda match: match[0].translate(ZERO_LED), text)
    text = _whisper()(text).translate({private: digit for digit, private in ZERO_LED.items()})
    return " ".join(word for word in text.split() if any(map(str.isalnum, word)))


NUMERALS = re.compile(  # two things (两); a year, a telephone number, 1.2.3; any other number
    r"(?P<two>(?<!第)(?<!百分之)2(?=[个個只隻条條张張位件台辆輛本天种種份家块塊杯瓶倍岁歲名周週秒米元"   # counted: 两, not 二
    r"场場项項公头頭层層部把座组組轮輪届屆]|次(?!元)|人(?![转轉])|点(?![\d零一二三四五六七八九])|年(?![级級])|小[时時]|分[钟鐘]))"
    r"|(?P<digits>(?:1[1-9]|20)\d\d(?=(?:[-–—~至到](?:1[1-9]|20)\d\d)?年)"
    r"|\d\d(?=[后後])"  # 80后, those born in the eighties
    r"|0\d{2,3}-\d{7,8}(?!\d)|\d{3,4}-\d{3,4}-\d{4}(?!\d)|\d+(?:\.\d+){2,})"
    r"|(?P<minus>(?<![\w%])-|(?<=[温为是约到至])-)?(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?P<point>\.\d+)?(?P<percent>%)?")


def read_out(text: str) -> str:
    """Digits -> spoken hanzi, so that 2023年 and 二零二三年 are one. Text without a digit keeps its meaning and its length.

    Read digit by digit: years (1100 to 2099 before 年), telephone numbers, a zero at the front, seven digits or more without commas.
    All else is a number: 三百零五, 三点一四, 百分之八十, 负五; 2 is 两 before a measure word. Where two ways are common, both sides get
    the first: 零 (〇, ○ after a digit), 一 (幺 beside digits), 二 (两 before 百千万亿), 万 (萬). Nothing else is simplified: opencc would do
    it, and is one more package whose version moves the number.
    """
    spell = lambda digits: "".join("点" if c == "." else HANZI[int(c)] for c in digits if c != "-")

    def reading(m):
        if m["two"] or m["digits"]:
            return "两" if m["two"] else spell(m["digits"])
        whole = m["whole"].replace(",", "")
        one_by_one = len(whole) > 12 or whole == m["whole"] and (len(whole) > 6 or len(whole) > 1 and int(whole[0]) == 0)
        return (("负" if m["minus"] else "") + ("百分之" if m["percent"] else "") + (spell(whole) if one_by_one else cardinal(whole))
                + spell(m["point"] or ""))

    text = NUMERALS.sub(reading, text.translate(TRADITIONAL)).replace("〇", "零")
    text = re.sub(rf"(?<=[{HANZI}○])○", "零", text)
    text = re.sub(rf"(?<=[{HANZI}幺])幺|幺(?=[{HANZI}幺])", "一", text)
    text = re.sub("百分之一百(?![零一二三四五六七八九])", "百分之百", text)
    return re.sub("两(?=[百千万亿])", "二", text)


def cardinal(digits: str) -> str:
    """At most 12 digits, no zero at the front, as Mandarin says the number: 10203 -> 一万零二百零三, 15 -> 十五."""
    said, zero = "", False
    for place, d in zip(range(len(digits) - 1, -1, -1), map(int, digits)):
        if d:
            said += "零" * (zero and said != "") + HANZI[d] + ("", "十", "百", "千")[place % 4]
        zero = not d
        if place % 4 == 0:  # 10^8, 10^4, 1
            section = int(digits[:len(digits) - place][-4:])
            said += ("", "万", "亿")[place // 4] if section else ""
            zero = not section
    return said.removeprefix("一") if said.startswith("一十") else said or "零"


class Counts(NamedTuple):
    """Edit operations that turn the reference into the hypothesis, and the reference's units (words, characters, or both)."""
    substitutions: int
    deletions: int
    insertions: int
    units: int

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions


def edit_counts(ref: str, hyp: str, language: str) -> Counts:
    """Levenshtein counts (jiwer) over normalised units. An empty reference counts its insertions."""
    out = jiwer.process_words(normalize(ref, language), normalize(hyp, language))
    return Counts(out.substitutions, out.deletions, out.insertions, out.hits + out.substitutions + out.deletions)


def align(ref: str, hyp: str, language: str) -> list[tuple[str, str, str]]:
    """What edit_counts counts, one by one: ("equal" | "sub" | "del" | "ins", unit of ref, unit of hyp), "" where there is none."""
    out, pairs = jiwer.process_words(normalize(ref, language), normalize(hyp, language)), []
    for chunk in out.alignments[0]:
        refs, hyps = out.references[0][chunk.ref_start_idx:chunk.ref_end_idx], out.hypotheses[0][chunk.hyp_start_idx:chunk.hyp_end_idx]
        kind = "equal" if chunk.type == "equal" else chunk.type[:3]
        pairs += [(kind, r, h) for r, h in zip(refs or [""] * len(hyps), hyps or [""] * len(refs))]
    return pairs


def error_rate(counts) -> float:
    """Corpus rate in percent: sum of errors / sum of reference units, never a mean of rates."""
    units = sum(c.units for c in counts)
    return 100.0 * sum(c.errors for c in counts) / units if units else math.nan


def bootstrap_rates(numerators, denominators, n=10_000, seed=0, blocks=None) -> np.ndarray:
    """sum(numerators) / sum(denominators) of n corpora drawn with replacement, (n,): utterances (Bisani & Ney, ICASSP 2004), or,
    with one label an utterance in `blocks`, whole blocks: all utterances of a speaker share a microphone and a voice."""
    num, den = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if blocks is not None:
        own = np.unique(np.asarray(blocks), return_inverse=True)[1]
        num, den = np.bincount(own, num), np.bincount(own, den)
    if not den.sum() > 0:
        return np.full(n, math.nan)
    n = n if len(num) <= 100_000 else 1_000  # of a million utterances, 10,000 draws would take ten minutes
    rng, rates = np.random.default_rng(seed), []
    for _ in range(n // 100):  # in groups: all draws of a large corpus at once would not fit in memory
        draws = rng.multinomial(len(num), np.full(len(num), 1 / len(num)), size=100)  # (100, utterances) times each is drawn
        rates.append((draws @ num) / np.maximum(draws @ den, 1e-12))
    return np.concatenate(rates)


def bootstrap(numerators, denominators, n=10_000, seed=0, blocks=None) -> tuple[float, float]:
    """95 % interval of sum(numerators) / sum(denominators), see `bootstrap_rates`.

    Paired comparisons pass per-utterance differences of errors as numerators. Rates are fractions, not percent.
    """
    low, high = np.percentile(bootstrap_rates(numerators, denominators, n, seed, blocks), [2.5, 97.5])
    return float(low), float(high)


# ---------------------------------------------------------------------------- 6. corpora

# Each corpus is a generator of (name of a manifest, row). The row's audio is an absolute path; a row without "duration" is a whole file,
# whose header is read later; a row with "left_out": REASON goes into no manifest and is counted.

AUDIO_SUFFIXES = {".wav", ".flac", ".mp3", ".ogg", ".opus"}
WENETSPEECH = {"L": "train", "M": "train_m", "S": "train_s", "DEV": "dev", "TEST_NET": "test_net", "TEST_MEETING": "test_meeting"}


def _read_text(path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"no such file; expected {path}")
    try:
        return path.read_text(encoding="utf-8-sig")  # -sig: without the mark that some editors put at the start
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8: {error}") from None


def _read_transcripts(path, glue) -> dict[str, str]:
    """Lines of an id and words -> {id: words joined by `glue`}."""
    texts = {}
    for number, words in enumerate(map(str.split, _read_text(path).split("\n")), 1):
        if words and words[0] in texts:
            raise ValueError(f"{path}:{number}: expected one line an utterance, {words[0]!r} already has one")
        if words:
            texts[words[0]] = glue.join(words[1:])
    return texts


def _whole_file(audio, text, **more) -> dict:
    row = {"id": audio.stem, "audio": str(audio), "text": text} | more
    reason = "no audio file" if not audio.is_file() else "no transcript" if not text else None
    return row | {"left_out": reason} if reason else row


def librispeech(root):
    """ROOT or ROOT/LibriSpeech holds SUBSET/SPEAKER/CHAPTER/: SPEAKER-CHAPTER.trans.txt, SPEAKER-CHAPTER-NNNN.flac. A manifest a SUBSET found.

    Text is in capitals, as published. Raises FileNotFoundError if there is no chapter, or a chapter has no .trans.txt.
    """
    home = root / "LibriSpeech" if (root / "LibriSpeech").is_dir() else root
    chapters = sorted(p for kind in ("train", "dev", "test") for p in home.glob(f"{kind}-*/*/*") if p.is_dir())
    if not chapters:
        raise FileNotFoundError(f"{root}: no LibriSpeech; expected folders like {home}/dev-clean/84/121123 (SUBSET/SPEAKER/CHAPTER)")
    for chapter in chapters:
        subset, speaker = chapter.parts[-3:-1]
        texts = _read_transcripts(chapter / f"{speaker}-{chapter.name}.trans.txt", " ")
        for name in sorted(texts.keys() | {p.stem for p in chapter.glob("*.flac")}):
            yield subset, _whole_file(chapter / f"{name}.flac", texts.get(name), language="en", speaker=speaker)


def aishell1(root):
    """ROOT or ROOT/data_aishell holds transcript/aishell_transcript_v0.8.txt, wav/{train,dev,test}/SPEAKER/*.wav. A manifest a split found.

    Words are joined. Some published wavs have no transcript: left out. Raises FileNotFoundError without transcripts or wavs.
    """
    home = root / "data_aishell"
    if not home.is_dir() and (root.name == "data_aishell" or (root / "transcript").is_dir()):
        home = root
    texts = _read_transcripts(home / "transcript" / "aishell_transcript_v0.8.txt", "")
    wavs = [wav for split in ("train", "dev", "test") for wav in sorted((home / "wav" / split).glob("*/*.wav"))]
    if not wavs:
        raise FileNotFoundError(f"{home}: no audio; expected {home}/wav/{{train,dev,test}}/SPEAKER/*.wav (unpack wav/*.tar.gz there)")
    for wav in wavs:
        yield wav.parts[-3], _whole_file(wav, texts.get(wav.stem), language="zh", speaker=wav.parts[-2])
    for name in sorted(texts.keys() - {wav.stem for wav in wavs}):
        yield "transcript", {"audio": name, "left_out": "no audio file"}


def _wenetspeech_audios(path, chunk=1 << 22):
    """Yield the objects of "audios" one by one: the published file has 6 GB and would take tens as a whole."""
    decoder, space = json.JSONDecoder(), re.compile(r"[\s,]*")
    with open(path, encoding="utf-8") as file:
        text = file.read(chunk)
        found = re.search(r'"audios"\s*:\s*\[', text)
        if not found:
            raise ValueError(f'{path}: expected {{"audios": [...]}}, found {text[:80]!r}')
        at = found.end()
        while True:
            at = space.match(text, at).end()
            if text[at:at + 1] == "]":
                return
            try:
                audio, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:  # the object goes on in the next chunk, or is broken
                more = file.read(chunk)
                if not more or error.pos < len(text) - chunk:
                    raise ValueError(f"{path}: cut off or not JSON ({error.msg}): {text[error.pos:error.pos + 80]!r}") from None
                text, at = text[at:] + more, 0
            else:
                yield audio


def wenetspeech(root):
    """ROOT holds WenetSpeech.json and the .opus files at the paths it names. Manifests of segments: train (L), train_m and train_s (M, S;
    parts of L), dev, test_net, test_meeting. L whole needs about 10 GB of memory here, and as much to read.

    Raises FileNotFoundError without the json, ValueError where it is cut off or an audio lacks a field.
    """
    path = root / "WenetSpeech.json"
    if not path.is_file():
        raise FileNotFoundError(f"no such file; expected {path}")
    for audio in _wenetspeech_audios(path):
        try:
            file = str(root / audio["path"])
            exists = os.path.isfile(file)
            for segment in audio["segments"]:
                start, seconds = segment["begin_time"], round(segment["end_time"] - segment["begin_time"], 4)
                row = {"id": segment["sid"], "audio": file, "text": segment["text"], "language": "zh", "start": start, "duration": seconds}
                names = [WENETSPEECH[s] for s in segment["subsets"] if s in WENETSPEECH]
                reason = ("no audio file" if not exists else "no transcript" if not row["text"].strip() else
                          "bad times" if start < 0 or not seconds > 0 else None if names else "in none of " + " ".join(WENETSPEECH))
                for name in names or ["other"]:
                    yield name, row | {"left_out": reason} if reason else row
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: expected path, segments: [sid, begin_time, end_time, text, subsets]; "
                             f"{error!r} in {str(audio)[:200]}") from None


def folder(root, language=None):
    """All audio under ROOT, one manifest named like it: text from the .txt of the same name, if there is one. Raises FileNotFoundError
    without audio. An id is the path below ROOT with - for /. Links to folders are not followed.
    """
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES and p.is_file())
    if not files:
        raise FileNotFoundError(f"{root}: no audio; expected files *{', *'.join(sorted(AUDIO_SUFFIXES))} in it or below")
    for path in files:
        text = _read_text(path.with_suffix(".txt")).strip() if path.with_suffix(".txt").exists() else None
        row = {"id": "-".join(path.relative_to(root).with_suffix("").parts), "audio": str(path), "text": text, "language": language}
        yield root.name, {k: v for k, v in row.items() if v}


CORPORA = {"librispeech": librispeech, "aishell1": aishell1, "wenetspeech": wenetspeech, "folder": folder}


def write_corpus(rows, out) -> None:
    """Write (manifest's name, row) pairs as OUT/NAME.jsonl and print what is in each, and what was left out and why.

    Files whose header can't be read are left out. Raises ValueError, before anything is written, where two rows of a manifest share an
    id, or if nothing is left.
    """
    out, manifests, left_out = Path(os.path.abspath(out)), defaultdict(dict), defaultdict(dict)
    for name, row in tqdm(rows, desc="corpus", unit="clip", mininterval=0.5 if sys.stderr.isatty() else 20):
        if "duration" not in row and "left_out" not in row:
            try:
                info = soundfile.info(row["audio"])
                row["duration"] = round(info.frames / info.samplerate, 4)
                if not row["duration"]:
                    row["left_out"] = "empty"
            except UNREADABLE:
                row["left_out"] = "unreadable"
        if "left_out" in row:
            left_out[name].setdefault(row["left_out"], [0, row["audio"]])[0] += 1  # [how many, the first]
        elif manifests[name].setdefault(row["id"], row) is not row:
            raise ValueError(f"{name}: expected one id each: {manifests[name][row['id']]['audio']} and {row['audio']} are both {row['id']!r}")
    reasons = {name: "; ".join(f"{n} {reason} (first: {first})" for reason, (n, first) in left_out[name].items()) for name in list(left_out)}
    if not any(manifests.values()):
        raise ValueError(f"no utterance is left. Left out: {reasons}")
    for name in sorted(manifests.keys() | reasons.keys()):
        kept = manifests[name].values()
        if kept:
            write_jsonl(out / f"{name}.jsonl", (row | {"audio": os.path.relpath(row["audio"], out)} for row in kept))
        speakers, untold = len({row.get("speaker") for row in kept} - {None}), sum("text" not in row for row in kept)
        print(f"{out / name}.jsonl: {len(kept)} utterances, {sum(row['duration'] for row in kept) / 3600:.2f} h, {speakers or 'unknown'} speakers"
              + f", {untold} without text" * (untold > 0) + "; not written" * (not kept)
              + (f"; left out: {reasons[name]}" if name in reasons else ""))


# ---------------------------------------------------------------------------- 7. demo corpus

# Variants that an independent recogniser understood. victor, f2, f3 and f5 are left out: they read uninitialised memory, so the
# same text would not give the same bytes twice.
VARIANTS = """edward ian Hugo caleb klatt6 m3 miguel robert Diogo Henrique Michael Mike benjamin david iven2 m1 m2 m8 max Storm adam
iven4 m6 steph Denis belinda f4 klatt2 m7 michel rob travis zac Annie Nguyen anika gustave m5 quincy grandma""".split()

# Small closed vocabularies, many combinations: enough to need the audio, few enough for a model of half a million parameters.
GRAMMAR = {
    "en": dict(
        voices=["en-us"],
        patterns=["{verb} the {colour} {thing}", "{number} {thing}s {where}", "{name} has {number} {thing}s", "the {colour} {thing} is {where}",
                  "{verb} {number} {thing}s {when}"],
        verb="bring find paint hide clean open".split(), colour="red green yellow black white purple".split(),
        thing="lamp table window basket pencil camera".split(),
        number="two three five six seven nine".split(), name="anna peter oscar laura".split(),
        where="upstairs outside downtown nearby".split(), when="today tomorrow tonight".split()),
    "zh": dict(
        voices=["cmn"],
        patterns=["{verb}{colour}{thing}", "{where}有{number}个{thing}", "{name}有{number}个{thing}", "{colour}{thing}在{where}",
                  "{when}{verb}{number}个{thing}"],
        verb="拿来 找到 打开 修理 洗净 藏好".split(), colour="红色 绿色 黄色 黑色 白色 紫色".split(),
        thing="台灯 桌子 窗户 篮子 铅笔 书包".split(), number="两 三 五 七 八 九".split(),
        name="小明 李华 王芳 张伟".split(), where="桥下 厨房 河边 车站".split(), when="今天 明天 今晚".split()),
}


class Espeak:
    """espeak-ng through ctypes. One global engine a process; bytes repeat only for the same calls in the same order."""
    def __init__(self):
        import espeakng_loader
        self.lib, self.pieces = ctypes.CDLL(espeakng_loader.get_library_path()), []
        self.rate = self.lib.espeak_Initialize(2, 0, espeakng_loader.get_data_path().encode(), 0x8000)  # 2: synchronous
        callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.callback = callback(self._receive)  # kept alive: the library holds a bare pointer to it
        self.lib.espeak_SetSynthCallback(self.callback)
        self.lib.espeak_Synth.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint,
                                          ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p]

    def _receive(self, samples, n, _events):
        if samples and n > 0:
            self.pieces.append(np.ctypeslib.as_array(samples, (n,)).copy())
        return 0

    def say(self, text, voice, words_per_minute, pitch) -> np.ndarray:
        """-> (n_samples,) float32 in [-1, 1] at self.rate Hz."""
        self.pieces.clear()
        if self.lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice!r}")
        self.lib.espeak_SetParameter(1, words_per_minute, 0)
        self.lib.espeak_SetParameter(3, pitch, 0)
        raw = text.encode() + b"\0"
        if self.lib.espeak_Synth(raw, len(raw), 0, 1, 0, 1, None, None) != 0 or not self.pieces:
            raise RuntimeError(f"espeak-ng could not say {text!r}")
        self.lib.espeak_Synchronize()
        return np.concatenate(self.pieces).astype(np.float32) / 32768.0


def compose(language, rng) -> str:
    """One random sentence of the demo's grammar."""
    grammar = GRAMMAR[language]
    return rng.choice(grammar["patterns"]).format(**{k: rng.choice(v) for k, v in grammar.items() if k not in ("voices", "patterns")})


def record(speech, rng, resample) -> np.ndarray:
    """Clean speech at espeak's rate -> a 16 kHz clip with noise and a level drawn from rng."""
    audio = resample(torch.from_numpy(speech)).numpy()
    noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(len(audio)).astype(np.float32)
    noise = np.convolve(noise, np.ones(rng.choice([1, 2, 4, 8])), "same")  # white, or with a moving average's low pass
    audio = audio + noise * np.sqrt((audio ** 2).mean() / (noise ** 2).mean()) * 10 ** (-rng.uniform(25, 40) / 20)
    return audio * 10 ** (rng.uniform(-16, -6) / 20) / np.abs(audio).max()


def speak_language(language, out, seed, sizes, n_voices) -> dict[str, list[dict]]:
    """Synthesise one language of the demo in this (fresh) process -> {split: manifest rows}."""
    torch.set_num_threads(1)  # clips are short: a second thread would only wait
    espeak, rng = Espeak(), random.Random(f"demo/{seed}/{language}")
    resample = torchaudio.transforms.Resample(espeak.rate, SAMPLE_RATE)
    variants = random.Random("demo/0").sample(VARIANTS, len(VARIANTS))  # who speaks where is part of the corpus: the same for every seed
    n_train, n_pool, n_test = n_voices
    unseen = variants[n_pool:n_pool + n_test]
    voices = {"test": unseen, "dev": unseen, "pool": variants[:n_pool], "train": variants[:n_train]}
    rows, said = {split: [] for split in voices}, {}  # said: sentence -> split; dev and test keep theirs to themselves
    progress = tqdm(total=sum(sizes.values()) // 2, desc=f"demo corpus, {language}", unit="clip", position=language == "zh",
                    mininterval=0.5 if sys.stderr.isatty() else 20)
    for split in voices:
        while len(rows[split]) < sizes[split] // 2:
            text = compose(language, rng)
            if said.setdefault(text, split) != split and {said[text], split} & {"dev", "test"}:
                continue
            voice = f"{rng.choice(GRAMMAR[language]['voices'])}+{rng.choice(voices[split])}"
            audio = record(espeak.say(text, voice, rng.randint(180, 225) + 40 * (language == "zh"), rng.randint(35, 65)), rng, resample)
            name = f"{split}-{language}-{len(rows[split]):05d}"
            soundfile.write(out / "wav" / f"{name}.wav", audio, SAMPLE_RATE, subtype="PCM_16")
            rows[split].append({"id": name, "audio": f"wav/{name}.wav", "text": text, "language": language,
                                "duration": round(len(audio) / SAMPLE_RATE, 4), "speaker": voice})
            progress.update()
    progress.close()
    return rows


def make_demo(out, seed=0, sizes=(1000, 3500, 100, 500), n_voices=(6, 13, 6)) -> None:
    """Write OUT/{train,pool,dev,test}.jsonl and OUT/wav: English and Mandarin in turn, same bytes for the same arguments.

    train: few voices, labelled. pool: more voices (train's among them), for distillation. dev, test: voices and sentences found
    in neither, the same voices for every seed. Speed 180 to 225 words a minute (Mandarin 40 more), level -16 to -6 dBFS peak,
    white to dull noise at 25 to 40 dB below the speech.
    Each language has a fresh process of its own: espeak-ng repeats its bytes only for the same calls in the same order.
    """
    out, sizes = Path(out), dict(zip(("train", "pool", "dev", "test"), sizes))
    (out / "wav").mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as processes:
        english, mandarin = processes.starmap(speak_language, [(language, out, seed, sizes, n_voices) for language in GRAMMAR], chunksize=1)
    for split in sizes:
        write_jsonl(out / f"{split}.jsonl", [row for pair in zip(english[split], mandarin[split]) for row in pair])


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help shows the docstring as it stands and every flag's default."""


def main(args) -> None:
    """Make the demo corpus, or manifests for one that lies on disk. What is wrong with the latter ends in one line, exit code 1."""
    if args.corpus != "demo":
        root = Path(os.path.abspath(args.root))
        rows = folder(root, args.language) if args.corpus == "folder" else CORPORA[args.corpus](root)
        try:
            return write_corpus(rows, args.out)
        except (OSError, ValueError) as error:
            raise SystemExit(f"data.py {args.corpus}: {error}") from None
    make_demo(args.out, args.seed)
    for split in ("train", "pool", "dev", "test"):
        utterances = read_manifest(Path(args.out) / f"{split}.jsonl")
        seconds, languages = sum(measure(utterances)), Counter(u.language for u in utterances)
        print(f"{split:6} {len(utterances):5} clips  {seconds / 60:5.1f} min  "
              f"{len({u.speaker for u in utterances}):3} voices  {dict(languages)}")


def parse_args(argv=None):
    """Flags -> namespace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    corpora = parser.add_subparsers(dest="corpus", required=True, metavar="NAME", help=f"demo, {', '.join(CORPORA)}; NAME --help says more")
    demo = corpora.add_parser("demo", allow_abbrev=False, help="speech synthesised by espeak-ng")
    demo.add_argument("--out", default="runs/data", help="folder to write manifests and audio to (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="decides sentences, who says which, and noise (default: %(default)s)")
    for name, corpus in CORPORA.items():
        importer = corpora.add_parser(name, allow_abbrev=False, description=corpus.__doc__)
        importer.add_argument("root", metavar="ROOT", help="where the corpus lies")
        importer.add_argument("out", metavar="OUT", help="folder to write manifests to")
        if name == "folder":
            importer.add_argument("--language", help="code for every line: en, zh, ... (default: none)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
