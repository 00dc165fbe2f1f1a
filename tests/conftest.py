"""Fixtures of all tests: a tiny corpus of synthesised sounds, a tokenizer, tiny random models."""

import inspect
import math
import os
import sys
import wave
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
import torch

import data
import model

torch.set_num_threads(1)

TEXTS = {
    "en": ["put two cups on the shelf", "anna has seven green lamps", "the red table is upstairs",
           "clean it", "don't open nine windows today", "hide the purple basket",
           "oscar has four pencils", "carry six bottles tonight", "it's the black camera",
           "find peter"],
    "zh": ["打开红色台灯", "厨房有三个篮子", "小明有七个瓶子", "修理桌子", "白色外套在河边", "今天买下两个相机",
           "洗净窗户", "藏好银色铅笔", "张伟有五个 A 瓶子", "明天搬走九个桌子"],
}


def sound(rng, seconds, rate=16_000):
    """(n,) float32: a gliding tone with a harmonic under a slow envelope, in noise; peak 0.5."""
    t = np.arange(round(seconds * rate)) / rate
    low, high = rng.uniform(150, 900, size=2)
    phase = 2 * np.pi * (low * t + (high - low) * t ** 2 / (2 * seconds))
    envelope = 0.6 + 0.4 * np.sin(2 * np.pi * rng.uniform(2, 6) * t)
    tone = (np.sin(phase) + 0.5 * np.sin(3 * phase)) * envelope
    noisy = tone + 0.1 * rng.standard_normal(len(t))
    return (0.5 * noisy / np.abs(noisy).max()).astype(np.float32)


def write_wav(path, audio, rate=16_000):
    """Audio (n,) or (n, channels) in [-1, 1] as 16-bit PCM."""
    samples = np.rint(np.clip(audio, -1, 1) * 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setparams((1 if samples.ndim == 1 else samples.shape[1], 2, rate, 0, "NONE", ""))
        file.writeframes(samples.tobytes())


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Folder with train.jsonl (24 utterances) and dev.jsonl (6), English and Mandarin in turn, 0.3
    to 1.2 s each."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for split, size in (("train", 24), ("dev", 6)):
        rows = []
        for i in range(size):
            language = ("en", "zh")[i % 2]
            audio = sound(rng, rng.uniform(0.3, 1.2))
            write_wav(folder / f"{split}-{i}.wav", audio)
            row = {"id": f"{split}-{i}", "audio": f"{split}-{i}.wav",
                   "text": TEXTS[language][(i // 2) % 10], "language": language}
            if i % 3:  # every third line leaves its duration to the file
                row["duration"] = round(len(audio) / data.SAMPLE_RATE, 4)
            rows.append(row)
        data.write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    return model.train_tokenizer(TEXTS["en"] * 4 + TEXTS["zh"] * 4, 320)


def tiny(tokenizer, seed):
    """A random ASR of width 32. Matrices are enlarged, so that arg max is a matter of the input and
    not of rounding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        asr = model.random_student(tokenizer, d_model=32, encoder_layers=2, lm_layers=2, heads=2)
        for name, p in asr.net.named_parameters():
            if p.ndim > 1:
                p.data.mul_(5.0 if "embed_tokens" in name else 3.0)
            else:  # biases start at 0, norms at 1: with an offset, leaving one out is seen
                p.data.add_(0.1 * torch.randn_like(p))
        # A more extreme logit of EOS: some rows stop early, some never do.
        asr.body.embed_tokens.weight.data[asr.eos_id] *= 2.5
    return asr


@pytest.fixture(scope="session")
def student(tokenizer):
    return tiny(tokenizer, 1)


@pytest.fixture(scope="session")
def teacher(tokenizer):
    return tiny(tokenizer, 2)


@pytest.fixture(scope="session")
def foreign_teacher():
    """A teacher of another width with another tokenizer: its vocabulary shares most tokens with the
    student's, not all."""
    texts = ["grandfather repaired the bicycle underground", "在火车站等候出租汽车",
             "thunder and lightning outside the cupboard"]
    tokenizer = model.train_tokenizer(texts * 6, 330)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return model.random_student(tokenizer, d_model=48, encoder_layers=1, lm_layers=1, heads=2)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, student, teacher, foreign_teacher):
    """Folder with student/, teacher/ and foreign/, as model.save writes them. Copy before writing
    into it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model.save(student, folder / "student")
    model.save(teacher, folder / "teacher")
    model.save(foreign_teacher, folder / "foreign")
    return folder


@pytest.fixture(scope="session")
def batch(corpus):
    """Six clips of unequal length, in audio and in text."""
    utterances = data.read_manifest(corpus / "train.jsonl")
    return data.load_batch([utterances[i] for i in (0, 1, 5, 6, 8, 11)])


@pytest.fixture(autouse=True)
def no_gradients_left(request):
    """Models are shared by the session: what one test's backward leaves in them must not be added
    to the next one's."""
    for name in {"student", "teacher"} & set(request.fixturenames):
        request.getfixturevalue(name).net.zero_grad(set_to_none=True)


def twins(student, teacher):
    """{student id: teacher id} from the token strings, by hand: ordinary tokens of equal spelling,
    and EOS."""
    theirs = teacher.tokenizer.get_vocab()
    pairs = {student.eos_id: teacher.eos_id}
    for token, i in student.tokenizer.get_vocab().items():
        if token in theirs and token not in model.SPECIAL:
            pairs[i] = theirs[token]
    return pairs


def copied_out(*parts, **names):
    """Sources of functions and classes, run where there is nothing but torch and `names`."""
    namespace = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional, "math": math} | names
    for part in parts:
        exec(inspect.getsource(part), namespace)
    return SimpleNamespace(**namespace)


def rollout(asr, prompt, limit, temperature=0.0, uniforms=None):
    """`generate` with a recogniser's parts -> ids (B, R), mask (B, R)."""
    return model.generate(asr, prompt.embeds, prompt.mask, limit, temperature, uniforms)
