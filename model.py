"""What a checkpoint *is*: the student (encoder, adapter, LM), its prompt, generation, scoring, saving
and loading. At the end: what training runs share, from processes to resuming.

    waveform -> log-mel (128, 100 Hz) -> two convolutions (50 Hz) -> pre-LN encoder blocks with
    partial RoPE -> LayerNorm -> 4 neighbouring frames side by side (12.5 Hz) -> MLP adapter
    -> embeddings in the prompt of a Qwen2 causal LM

    prompt     <|user|><|begin_of_audio|><|audio|> x A<|end_of_audio|>Please transcribe this audio.
               <|assistant|>
    response   transcript<|im_end|>

The other family, Qwen3-ASR, is transformers' own; it is a teacher here, never trained:

    prompt     <|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|audio_start|><|audio_pad|> x A
               <|audio_end|><|im_end|>\n<|im_start|>assistant\nlanguage English<asr_text>
    response   transcript<|im_end|>

Shapes: B utterances, T mel frames, A audio tokens, P prompt columns, R response columns, N response
tokens packed over the batch, D width of the LM, V its vocabulary. Prompts are padded on the left,
responses on the right, so that in every row

    column      0 ... P-1      P      P+1   ...   P+R-1
    input_ids   prompt         y_0    y_1   ...   y_{R-1} (= EOS)
    hidden[c] predicts column c+1: rows P-1 ... P+R-2 predict y_0 ... y_{R-1}

Weights have the names of the published ARK-ASR checkpoints and are read from safetensors only; no
code of a checkpoint is ever run.

Differs from the published model (numbers go on from distill.py):
  [dev 6] Padding is masked after each convolution, in attention and in the merge, so that a row's
          output does not depend on its neighbours. On a clip alone the two are the same function.
"""

import json
import math
import os
import re
import shutil
import signal
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path

import huggingface_hub
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (
    DynamicCache, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer,
    Qwen3ASRConfig, Qwen3ASRForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM,
    WhisperFeatureExtractor)
from transformers.models.qwen3_asr.processing_qwen3_asr import LANGUAGE_CODE_TO_NAME

import data

INSTRUCTION = "Please transcribe this audio."
EOS, PAD, AUDIO = "<|im_end|>", "<|endoftext|>", "<|audio|>"
SPECIAL = [PAD, EOS, AUDIO, "<|user|>", "<|begin_of_audio|>", "<|end_of_audio|>", "<|assistant|>"]


# ---------------------------------------------------------------------------- audio encoder and adapter

def rope_angles(n_positions, head_dim, device, theta=10_000.0):
    """Return the cosines and sines of RoPE's angles (Su et al. 2021), each (T, head_dim / 4) in fp32.

    Half of each head is rotated, rd = head_dim / 2: pair i at position t by t theta^(-2i / rd).
    """
    rotary_dim = head_dim // 2
    dims = torch.arange(0, rotary_dim, 2, device=device, dtype=torch.float32)
    frequencies = theta ** (-dims / rotary_dim)                    # (rd / 2,)
    positions = torch.arange(n_positions, device=device, dtype=torch.float32)
    angles = positions[:, None] * frequencies                      # (T, rd / 2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotate adjacent pairs (2i, 2i+1) of the first half of each head: (B, heads, T, head_dim) -> same.

    The published layout is interleaved; transformers' glmasr pairs i with i + rd/2 instead and permutes
    the weights' rows.
    """
    rotary_dim = 2 * cos.shape[-1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    even = x[..., 0:rotary_dim:2]                                  # (B, heads, T, rd / 2)
    odd = x[..., 1:rotary_dim:2]
    rest = x[..., rotary_dim:]                                     # (B, heads, T, head_dim - rd)
    pairs = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return torch.cat([pairs.flatten(-2), rest], dim=-1)


class SelfAttention(nn.Module):
    """Multi-head self-attention with RoPE on queries and keys."""

    def __init__(self, d_model, heads):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)  # a bias on keys cancels in the softmax
        self.v_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def split_heads(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)   # (B, heads, T, head_dim)

    def forward(self, x, rope, mask):
        """x (B, T, d_model), rope (cos, sin), mask (B, 1, 1, T) True on valid keys -> (B, T, d_model)."""
        q = rotate(self.split_heads(self.q_proj(x)), *rope)
        k = rotate(self.split_heads(self.k_proj(x)), *rope)
        v = self.split_heads(self.v_proj(x))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, T, head_dim)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """Pre-LN Transformer block."""

    def __init__(self, d_model, heads, ffn):
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(d_model)
        self.self_attn = SelfAttention(d_model, heads)
        self.final_layer_norm = nn.LayerNorm(d_model)
        self.fc1 = nn.Linear(d_model, ffn)
        self.fc2 = nn.Linear(ffn, d_model)

    def forward(self, x, rope, mask):
        x = x + self.self_attn(self.self_attn_layer_norm(x), rope, mask)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class WhisperEncoder(nn.Module):
    """Whisper's encoder with RoPE in place of its position table, without its last LayerNorm."""

    def __init__(self, n_mels, d_model, layers, heads, ffn):
        super().__init__()
        self.head_dim = d_model // heads
        self.conv1 = nn.Conv1d(n_mels, d_model, 3, padding=1)
        self.conv2 = nn.Conv1d(d_model, d_model, 3, stride=2, padding=1)
        self.layers = nn.ModuleList(EncoderLayer(d_model, heads, ffn) for _ in range(layers))

    def forward(self, mel, n_frames):
        """mel (B, n_mels, T), n_frames (B,) -> x (B, T', d_model), valid (B, T') False on padding.

        T' = (T + 1) // 2: mel frames come at 100 Hz, x at 50 Hz.
        """
        valid = torch.arange(mel.shape[-1], device=mel.device) < n_frames[:, None]
        x = F.gelu(self.conv1(mel)) * valid[:, None]               # (B, d_model, T) [dev 6]
        x = F.gelu(self.conv2(x)).transpose(1, 2)                  # (B, T', d_model)
        valid = torch.arange(x.shape[1], device=x.device) < (n_frames[:, None] + 1) // 2
        rope = rope_angles(x.shape[1], self.head_dim, x.device)
        for layer in self.layers:
            x = layer(x, rope, valid[:, None, None])               # no key is padding [dev 6]
        return x, valid


class AudioEncoder(nn.Module):
    """Encoder and adapter: log-mel features in, embeddings for the prompt of the LM out.

    This class and those above copy out alone: they need torch, nn and F.
    """

    def __init__(self, n_mels, d_model, layers, heads, ffn, lm_width, merge=4, act=nn.GELU):
        super().__init__()
        self.merge = merge
        self.whisper = WhisperEncoder(n_mels, d_model, layers, heads, ffn)
        self.layer_norm = nn.LayerNorm(d_model)  # takes the place of Whisper's last LayerNorm
        self.adapting = nn.Sequential(
            nn.Linear(merge * d_model, 2 * lm_width),
            act(),
            nn.Linear(2 * lm_width, lm_width),
        )

    def n_tokens(self, n_frames):
        """Audio tokens of clips: 100 frames/s -> 50 -> 12.5 tokens/s, rounded down, at least one."""
        return ((n_frames + 1) // 2 // self.merge).clamp(min=1)

    def forward(self, mel, n_frames):
        """mel (B, n_mels, T), n_frames (B,) -> audio embeddings (B, A, D), n_tokens (B,).

        n_tokens: how many embeddings of a row are not padding.
        """
        x, valid = self.whisper(mel, n_frames)
        x = self.layer_norm(x) * valid[..., None]                  # (B, T', d_model) [dev 6]
        n_tokens = self.n_tokens(n_frames)
        # Below 0, F.pad cuts off what does not fill a token; above 0 only if all clips are under 70 ms.
        n_missing = int(n_tokens.max()) * self.merge - x.shape[1]
        x = F.pad(x, (0, 0, 0, n_missing))                         # (B, A * merge, d_model)
        x = x.unflatten(1, (-1, self.merge)).flatten(2)            # (B, A, merge * d_model)
        return self.adapting(x), n_tokens


# ---------------------------------------------------------------------------- student

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "selu": nn.SELU}
LANGUAGE_MODELS = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}

# Keys of a student's config.json that are not handed on to the LM's config as they are.
NOT_OF_THE_LM = """
architectures auto_map model_type lm_type dtype torch_dtype rope_theta rope_scaling attn_implementation
whisper_config max_whisper_length use_rope spec_aug
adapter_type mlp_adapter_act merge_factor audio_token_id
""".split()


class Student(nn.Module):
    """Audio encoder and causal LM, built from a published-style config.json (a dict).

    One key more than the published ones: lm_type "qwen3", for an LM with norms on queries and keys.
    Raises ValueError for a config that asks for another kind of encoder or LM.
    """

    def __init__(self, config: dict):
        super().__init__()
        self.config = {"tie_word_embeddings": True} | config
        self.lm = build_language_model(self.config)
        self.audio_encoder = build_audio_encoder(self.config)


def build_language_model(config):
    """Return the causal LM of a student's config.json, with random weights."""
    lm_type = config.get("lm_type", "qwen2")
    check_choice("lm_type", lm_type, LANGUAGE_MODELS)
    if config.get("rope_scaling"):
        raise ValueError(f"rope_scaling {config['rope_scaling']} in config.json: not written out here")
    lm_config = {}
    for key, value in config.items():
        # Private keys stay out: transformers would fetch and run the code that _attn_implementation names.
        if key not in NOT_OF_THE_LM and not key.startswith("_"):
            lm_config[key] = value
    rope = {"rope_type": "default", "rope_theta": config.get("rope_theta", 1e6)}
    lm_config["rope_parameters"] = rope | (config.get("rope_parameters") or {})
    config_class, lm_class = LANGUAGE_MODELS[lm_type]
    lm = lm_class(config_class(**lm_config, attn_implementation="sdpa"))
    if set(lm.config.layer_types) != {"full_attention"}:
        raise ValueError("the LM of config.json has sliding-window layers: not written out here")
    return lm


def build_audio_encoder(config) -> AudioEncoder:
    """Return the encoder and adapter of a student's config.json, with random weights."""
    if config.get("adapter_type", "mlp") != "mlp" or not config.get("use_rope", True):
        raise ValueError("only the published encoder is written out here: "
                         "use_rope=true, adapter_type='mlp'")
    act = config.get("mlp_adapter_act", "gelu")
    check_choice("mlp_adapter_act", act, ACTIVATIONS)
    audio = config["whisper_config"]
    return AudioEncoder(
        n_mels=audio["num_mel_bins"],
        d_model=audio["d_model"],
        layers=audio["encoder_layers"],
        heads=audio["encoder_attention_heads"],
        ffn=audio["encoder_ffn_dim"],
        lm_width=config["hidden_size"],
        merge=config.get("merge_factor", 4),
        act=ACTIVATIONS[act],
    )


def check_choice(key, value, choices) -> None:
    """Raise ValueError if the value of a key of config.json is not one that is written out here."""
    if value not in choices:
        raise ValueError(f"{key} {value!r}: expected one of {', '.join(choices)}")


def empty_student(config) -> Student:
    """Return a student on the meta device: no memory and no random numbers for weights yet to be read."""
    with torch.device("meta"):
        net = Student(config)
    # The LM's RoPE angles stand in no checkpoint, so they are computed now.
    net.lm.model.rotary_emb = type(net.lm.model.rotary_emb)(config=net.lm.config)
    return net


def student_config(lm_config, whisper_config, ids, n_rows) -> dict:
    """Return config.json in the published layout.

    lm_config: the LM's keys, by transformers' names. whisper_config: the encoder's five sizes.
    ids: {token: id} of SPECIAL. n_rows: rows of the embedding table, V.
    """
    return lm_config | {
        "architectures": ["ArkasrForConditionalGeneration"],
        "model_type": "arkasr",
        "vocab_size": n_rows,
        "whisper_config": whisper_config | {"max_source_positions": 1500},
        "max_whisper_length": 1500,
        "use_rope": True,
        "spec_aug": False,
        "adapter_type": "mlp",
        "mlp_adapter_act": "gelu",
        "merge_factor": 4,
        "audio_token_id": ids[AUDIO],
        "bos_token_id": ids[PAD],
        "eos_token_id": ids[EOS],
        "pad_token_id": ids[PAD],
    }


# ---------------------------------------------------------------------------- a model with its tokenizer

@dataclass
class ASR:
    """A recogniser: what is needed to run a model without knowing its family. This one is a student."""
    net: nn.Module
    tokenizer: PreTrainedTokenizerFast
    prefix_ids: list[int]     # prompt before the audio
    suffix_ids: list[int]     # prompt after the audio
    eos_id: int
    pad_id: int
    audio_id: int             # placeholder in the prompt, one for each audio embedding
    stop: torch.Tensor        # (V,) True for ids that end a transcript; see stop_and_blocked
    blocked: torch.Tensor     # (V,) True for ids that no transcript may contain
    other_files: dict[str, bytes] = field(default_factory=dict)  # name -> content; see read_other_files

    @property
    def device(self):
        return self.blocked.device

    @property
    def n_mels(self):
        return self.net.config["whisper_config"]["num_mel_bins"]

    @property
    def body(self):
        """The LM without its head: embeddings (B, columns, D) -> hidden states (B, columns, D)."""
        return self.net.lm.model

    @property
    def head(self):
        """The linear layer from hidden rows (N, D) to logits (N, V)."""
        return self.net.lm.lm_head

    def encode(self, batch: data.Batch):
        """Return audio embeddings (B, A, D), and how many of each row are not padding (B,)."""
        mel = batch.mel.to(self.device, self.head.weight.dtype)
        return self.net.audio_encoder(mel, batch.n_frames.to(self.device))

    def suffixes(self, batch: data.Batch, audio, n_audio) -> list[list[int]]:
        """Return the ids that follow the audio in each row's prompt, here the same for all."""
        return [self.suffix_ids] * len(batch.utterances)

    def prompt_ids(self, n_audio, suffix) -> list[int]:
        """Return the ids of one row's prompt, with a placeholder for each audio embedding."""
        return self.prefix_ids + [self.audio_id] * n_audio + suffix

    def logits(self, hidden):
        """Return the logits (N, V) of hidden rows (N, D), in fp32."""
        return logits(hidden, self.head.weight)

    @cached_property
    def plain_tokenizer(self) -> Tokenizer:
        """The tokenizer without its added tokens: whatever a text looks like, it stays text."""
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        return Tokenizer.from_str(json.dumps(state | {"added_tokens": [], "post_processor": None}))

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a response, EOS included. No text can inject a special token."""
        return self.plain_tokenizer.encode(text, add_special_tokens=False).ids + [self.eos_id]

    def decode(self, ids, mask) -> list[str]:
        """Return the transcripts of ids and mask (B, R), without the tokens that ended them."""
        is_text = (mask & ~self.stop[ids]).cpu()
        return [self.tokenizer.decode(row[kept].tolist()) for row, kept in zip(ids.cpu(), is_text)]


def special_ids(tokenizer, tokens, n_rows) -> dict[str, int]:
    """Return {token: id} of the prompt's special tokens.

    Raises ValueError naming the one that the tokenizer lacks or that lies beyond the n_rows embeddings.
    """
    vocabulary = tokenizer.get_vocab()
    ids = {token: vocabulary.get(token) for token in tokens}
    for token, i in ids.items():
        if i is None or i >= n_rows:
            raise ValueError(f"the tokenizer has no usable {token!r} (id {i}, {n_rows} embeddings)")
    return ids


def stop_and_blocked(tokenizer, stop_ids, n_rows, device):
    """Return two (n_rows,) bool masks: ids that end a transcript, and ids that no transcript may contain.

    Blocked are the special tokens, added tokens spelled <...>, and the padded tail of the vocabulary, but
    not those that stop.
    """
    stop = torch.zeros(n_rows, dtype=torch.bool)
    for i in stop_ids:
        # Qwen3-ASR's original config names none; transformers' defaults lie past a small vocabulary.
        if i < n_rows:
            stop[i] = True
    blocked = torch.zeros(n_rows, dtype=torch.bool)
    blocked[len(tokenizer):] = True
    markup = [i for token, i in tokenizer.get_added_vocab().items() if re.fullmatch(r"<.*>", token)]
    for i in markup + tokenizer.all_special_ids:
        if i < n_rows:
            blocked[i] = True
    return stop.to(device), (blocked & ~stop).to(device)


def id_set(value) -> set[int]:
    """Return a token id of a config, which may be None, a number or a list, as a set."""
    if value is None:
        return set()
    if isinstance(value, int):
        return {value}
    return set(value)


def assemble(net: Student, tokenizer, device, other_files=None) -> ASR:
    """Join network and tokenizer.

    The network is in eval mode, in training too: a rollout and its scoring must be the same function, and
    no published config drops out. Raises ValueError naming the token that has another id in config.json.
    """
    other_files = other_files or {}
    n_rows = net.config["vocab_size"]
    ids = special_ids(tokenizer, SPECIAL, n_rows)
    generation_config = json.loads(other_files.get("generation_config.json", "{}"))
    stop_ids = id_set(net.config.get("eos_token_id")) | id_set(generation_config.get("eos_token_id"))
    for key, token in (("audio_token_id", AUDIO), ("eos_token_id", EOS), ("pad_token_id", PAD)):
        accepted = stop_ids if token == EOS else id_set(net.config.get(key))
        if ids[token] not in accepted:
            raise ValueError(f"config.json says {key} = {net.config.get(key)}, "
                             f"but the tokenizer has {token!r} at {ids[token]}")
    stop, blocked = stop_and_blocked(tokenizer, stop_ids, n_rows, device)
    instruction = tokenizer.encode(INSTRUCTION, add_special_tokens=False)
    return ASR(
        net=net.eval().to(device),
        tokenizer=tokenizer,
        prefix_ids=[ids["<|user|>"], ids["<|begin_of_audio|>"]],
        suffix_ids=[ids["<|end_of_audio|>"], *instruction, ids["<|assistant|>"]],
        eos_id=ids[EOS],
        pad_id=ids[PAD],
        audio_id=ids[AUDIO],
        stop=stop,
        blocked=blocked,
        other_files=other_files,
    )


# How Qwen's tokenizers cut a text into words before byte pairs are merged.
QWEN_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def train_tokenizer(texts, vocab_size) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with Qwen's pre-tokenisation on texts. It can write any UTF-8."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = list(texts)
    # The instruction stands in every prompt: seen often enough, it becomes a few tokens.
    texts += [INSTRUCTION] * (len(texts) // 10 + 1)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def random_student(tokenizer, d_model, encoder_layers, lm_layers, heads, device="cpu") -> ASR:
    """Return a student of any size, its weights drawn from torch's global generator.

    Encoder and LM have one width and one number of heads. Raises ValueError if these do not fit.
    """
    if d_model % (4 * heads):
        raise ValueError(f"d_model {d_model} must be a multiple of 4 x heads = {4 * heads}: "
                         "RoPE turns pairs in half of each head")
    lm_config = {
        "hidden_size": d_model,
        "intermediate_size": 2 * d_model,
        "num_hidden_layers": lm_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "initializer_range": d_model ** -0.5 / 2,
    }
    whisper_config = {
        "d_model": d_model,
        "encoder_layers": encoder_layers,
        "encoder_attention_heads": heads,
        "encoder_ffn_dim": 2 * d_model,
        "num_mel_bins": 128,
    }
    n_rows = round_up(len(tokenizer) + 1, 64)  # a padded tail, as published vocabularies have
    ids = special_ids(tokenizer, SPECIAL, n_rows)
    net = Student(student_config(lm_config, whisper_config, ids, n_rows))
    # Log-mel has a standard deviation of 0.3. Brought to about 1 here, training leaves its first plateau
    # in fewer updates.
    net.audio_encoder.whisper.conv1.weight.data.mul_(4.0)
    return assemble(net, tokenizer, device)


def round_up(n, multiple) -> int:
    """Return the smallest multiple that is not less than n."""
    return math.ceil(n / multiple) * multiple


# ---------------------------------------------------------------------------- prompt, scoring, generation

@dataclass
class Prompt:
    """A batch of prompts with the audio in place, ready for the LM's body."""
    embeds: torch.Tensor      # (B, P, D)
    mask: torch.Tensor        # (B, P) False on the left padding
    audio: torch.Tensor       # (B, A, D) the adapter's output, for the CTC loss
    n_audio: torch.Tensor     # (B,) audio tokens of each row


def encode_audio(asr: ASR, batch: data.Batch) -> Prompt:
    """Run the audio encoder once and place its output in the prompt. Differentiable."""
    with autocast(asr.device):
        audio, n_audio = asr.encode(batch)
    suffixes = asr.suffixes(batch, audio, n_audio)
    rows = [asr.prompt_ids(n, suffix) for n, suffix in zip(n_audio.tolist(), suffixes)]
    return insert_audio(asr, rows, audio, n_audio)


def insert_audio(asr: ASR, rows, audio, n_audio) -> Prompt:
    """Lists of prompt ids and audio embeddings (B, A, D) -> left-padded prompts with the audio in place."""
    ids, mask = data.pad_rows(rows, asr.pad_id, asr.device, side="left")        # (B, P)
    valid = torch.arange(audio.shape[1], device=asr.device) < n_audio[:, None]  # (B, A)
    embeds = asr.body.embed_tokens(ids)                                         # (B, P, D)
    # Both sides run row by row, so the i-th placeholder of a row receives its i-th audio embedding.
    is_audio = (ids == asr.audio_id)[..., None]                                 # (B, P, 1)
    embeds = embeds.masked_scatter(is_audio, audio[valid].to(embeds.dtype))
    return Prompt(embeds, mask, audio, n_audio)


def join_prompts(prompts):
    """Prompts of several batches -> embeds (sum of B, P, D), mask (sum of B, P), padded on the left."""
    width = max(prompt.mask.shape[1] for prompt in prompts)
    embeds = [F.pad(p.embeds, (0, 0, width - p.mask.shape[1], 0)) for p in prompts]
    masks = [F.pad(p.mask, (width - p.mask.shape[1], 0)) for p in prompts]
    return torch.cat(embeds), torch.cat(masks)


def autocast(device):
    """bf16 arithmetic over fp32 weights on a GPU (untested on hardware here); nothing on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def trainable(asr: ASR, freeze=None) -> list[nn.Parameter]:
    """The parameters to train. freeze "encoder": adapter and LM alone, not the Whisper encoder."""
    if freeze == "encoder":
        asr.net.audio_encoder.whisper.requires_grad_(False)
    return [p for p in asr.net.parameters() if p.requires_grad]


def recompute(asr: ASR) -> None:
    """Keep only the inputs of encoder blocks and LM layers: backward runs each of them again
    (Chen et al. 2016, arXiv 1604.06174), about a third more arithmetic.

    transformers' own switch looks at net.training, which is False here, and would do nothing.
    """
    def keep_inputs(forward, *args, **kwargs):
        if not torch.is_grad_enabled():  # rollouts keep nothing anyway
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    for layer in [*asr.net.audio_encoder.whisper.layers, *asr.body.layers]:
        layer.forward = partial(keep_inputs, layer.forward)


def causal_mask(valid):
    """(B, K) valid columns -> (B, 1, K, K): a column sees the valid ones up to itself.

    Padding sees itself, so that no softmax runs over nothing (NaN).
    """
    n = valid.shape[1]
    lower = torch.ones(n, n, dtype=torch.bool, device=valid.device).tril()
    itself = torch.eye(n, dtype=torch.bool, device=valid.device)
    return ((valid[:, None] & lower) | itself)[:, None]


def positions_of(valid):
    """(B, K) valid columns -> (B, K) position of each column in its row, padding not counted."""
    return (valid.cumsum(1) - 1).clamp(min=0)


def check_attention(body) -> None:
    """Raise ValueError unless the LM takes a mask of bools: eager attention would add it as 0 and 1."""
    if body.config._attn_implementation != "sdpa":
        raise ValueError(f"attention {body.config._attn_implementation!r}: expected 'sdpa'")


class Logits(torch.autograd.Function):
    """z = h W^T on a GPU: bf16 inputs, sums in fp32 that are not rounded to bf16 (not run here)."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden, weight)
        return torch.mm(hidden.bfloat16(), weight.bfloat16().T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad_z):
        hidden, weight = ctx.saved_tensors
        grad_hidden = (grad_z @ weight.float()).to(hidden.dtype)                # dh = dz W
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_z.T @ hidden.float()).to(weight.dtype)          # dW = dz^T h
        return grad_hidden, grad_weight


def logits(hidden, weight):
    """The LM head: hidden (N, D), weight (V, D) -> logits (N, V) in fp32.

    Every head site calls it, so that rollout, student and teacher round alike. Logits that were
    rounded to bf16 in between would move the gradient of a KL by 4 to 29 %.
    """
    if hidden.is_cuda:
        return Logits.apply(hidden, weight)
    return F.linear(hidden, weight).float()


def response_hidden(body, embeds, prompt_mask, ids, mask) -> torch.Tensor:
    """Teacher forcing -> (N, D): the hidden rows that predict the response tokens, packed row by row.

    body: an LM without its head. embeds (B, P, D), prompt_mask (B, P): prompts, padded on the left.
    ids, mask (B, R): responses, padded on the right. The caller applies the head to these N rows
    alone: no logits are made for prompt or padding.
    """
    check_attention(body)
    # The last column predicts nothing that is scored, so it is not fed; see the drawing at the top.
    n_prompt = prompt_mask.shape[1]
    columns = torch.cat([embeds, body.embed_tokens(ids[:, :-1])], dim=1)        # (B, P+R-1, D)
    valid = torch.cat([prompt_mask, mask[:, :-1]], dim=1)                       # (B, P+R-1)
    with autocast(embeds.device):
        output = body(inputs_embeds=columns, position_ids=positions_of(valid), use_cache=False,
                      attention_mask={"full_attention": causal_mask(valid)})
    return output.last_hidden_state[:, n_prompt - 1:][mask]                     # (N, D)


def draw(z, temperature, uniform):
    """One id a row from softmax(z / temperature) by inverse CDF -> (B,). temperature 0 is argmax.

    z (B, V): logits; uniform (B,) in [0, 1): one a row, from the caller, so that a draw does not
    depend on the rest of the batch.
    """
    if temperature == 0:
        return z.argmax(-1)
    cdf = (z / temperature).softmax(-1).cumsum(-1)                              # (B, V)
    # u is scaled by the CDF's last value, which fp32 leaves at 1 +- 2e-5, and kept below it, so that
    # the id found has p > 0. (On a GPU cumsum is a parallel scan and need not rise to the last bit:
    # there an id of p = 0 has a chance of about 1e-7.)
    last = cdf[:, -1]
    below = torch.nextafter(last, torch.zeros_like(last))
    point = torch.minimum(uniform * last, below)                                # (B,)
    return torch.searchsorted(cdf, point[:, None], right=True)[:, 0]


@torch.no_grad()
def generate(body, weight, embeds, prompt_mask, *, stop, blocked, pad_id, max_new_tokens,
             temperature=0.0, uniforms=None):
    """Write one response a row, greedy (temperature 0) or sampled -> ids (B, R), mask (B, R).

    body, weight: an LM and its head's weight (V, D). embeds (B, P, D), prompt_mask (B, P): prompts,
    padded on the left. stop, blocked (V,): ids that end a response, ids that none may contain.
    uniforms (B, max_new_tokens) in [0, 1): see data.keyed_uniforms. mask is True on emitted tokens,
    the stop id included; a row without one was cut at max_new_tokens.

    Finished rows are frozen; when a quarter of the rows are done the others go on alone. There is no
    collective, and the host asks the device how many rows are left at every token on a CPU, at every
    eighth on a GPU.
    """
    check_attention(body)
    device = embeds.device
    ask_every = 1 if device.type == "cpu" else 8
    if temperature > 0:
        uniforms = torch.as_tensor(uniforms, device=device)
    if device.type == "cuda":
        weight = weight.bfloat16()  # once: `logits` would do it at every token
    ids = torch.full((len(embeds), max_new_tokens), pad_id, device=device)      # (B, R)
    mask = torch.zeros_like(ids, dtype=torch.bool)                              # (B, R)
    rows = torch.arange(len(embeds), device=device)                             # (b,) still written
    unfinished = torch.ones_like(rows, dtype=torch.bool)                        # (b,)
    cache = DynamicCache(config=body.config)
    valid = prompt_mask                                                         # (b, P+t) columns
    attend = causal_mask(prompt_mask)                                           # (b, 1, queries, P+t)
    positions = positions_of(prompt_mask)                                       # (b, queries)
    # Autocast keeps its bf16 casts of weights to the end of this context, so that they are made once a
    # rollout. A bf16 copy of the LM would need as much memory, and round otherwise than scoring does.
    with autocast(device):
        for t in range(max_new_tokens):
            output = body(inputs_embeds=embeds, position_ids=positions, past_key_values=cache,
                          attention_mask={"full_attention": attend}, use_cache=True)
            z = logits(output.last_hidden_state[:, -1], weight)                 # (b, V)
            z = z.masked_fill(blocked, -math.inf)
            uniform = None if temperature == 0 else uniforms[rows, t]           # (b,)
            token = draw(z, temperature, uniform)                               # (b,)
            token = torch.where(unfinished, token, pad_id)
            ids[rows, t] = token
            mask[rows, t] = unfinished
            valid = torch.cat([valid, unfinished[:, None]], dim=1)              # (b, P+t+1)
            positions = positions[:, -1:] + 1                                   # (b, 1)
            unfinished = unfinished & ~stop[token]
            if t % ask_every == ask_every - 1:
                n_left = int(unfinished.sum())
                if n_left == 0:
                    break
                if 4 * n_left <= 3 * len(rows):  # measured: faster than at half, as fast as at each
                    left = unfinished.nonzero()[:, 0]
                    cache.batch_select_indices(left)
                    rows = rows[left]
                    token = token[left]
                    valid = valid[left]
                    positions = positions[left]
                    unfinished = unfinished[left]
            embeds = body.embed_tokens(token[:, None])                          # (b, 1, D)
            attend = valid[:, None, None]                                       # (b, 1, 1, P+t+1)
    n_columns = int(mask.any(0).sum())
    return ids[:, :n_columns], mask[:, :n_columns]


def roll_out(asr: ASR, prompt: Prompt, max_new_tokens, temperature=0.0, uniforms=None):
    """`generate` with a recogniser's parts -> ids (B, R), mask (B, R)."""
    return generate(asr.body, asr.head.weight, prompt.embeds, prompt.mask,
                    stop=asr.stop, blocked=asr.blocked, pad_id=asr.pad_id,
                    max_new_tokens=max_new_tokens, temperature=temperature, uniforms=uniforms)


@torch.no_grad()
def transcribe(asr: ASR, utterances, rank=0, world=1, micro_batch=16, max_new_tokens=128,
               progress=None) -> dict[str, dict]:
    """Greedy transcripts of this rank's share -> {id: {"hyp", "stopped", "n_tokens"}}.

    Clips of similar length go together, whatever the order of `utterances`. progress(n) is called
    when n more clips are done. A clip that can't be decoded raises data.AudioError.
    """
    durations = data.measure(utterances)
    order = sorted(range(len(utterances)), key=durations.__getitem__)
    results = {}
    for start in range(rank * micro_batch, len(order), world * micro_batch):
        clips = [utterances[i] for i in order[start:start + micro_batch]]
        batch = data.load_batch(clips, asr.n_mels, keep_going=False, max_sec=data.MAX_EVAL_SEC,
                                for_training=False)
        ids, mask = roll_out(asr, encode_audio(asr, batch), max_new_tokens)     # (B, R)
        stopped = (asr.stop[ids] & mask).any(1).tolist()
        n_tokens = mask.sum(1).tolist()
        for i, hyp in enumerate(asr.decode(ids, mask)):
            results[clips[i].id] = {"hyp": hyp.strip(), "stopped": stopped[i], "n_tokens": n_tokens[i]}
        if progress:
            progress(len(clips))
    return results


# ---------------------------------------------------------------------------- two vocabularies

def vocabulary_map(student: ASR, teacher: ASR) -> torch.Tensor:
    """(V,) long: the teacher's id of each student id with an equal token string; -1 where it has none.

    EOS maps to EOS whatever it is called. Ids blocked on either side are -1: no transcript has them.
    """
    teacher_ids = teacher.tokenizer.get_vocab()
    usable_s = (~student.blocked).tolist()
    usable_t = (~teacher.blocked).tolist()
    to_teacher = torch.full((len(usable_s),), -1, dtype=torch.long)
    for token, i in student.tokenizer.get_vocab().items():
        j = teacher_ids.get(token, len(usable_t))
        if i < len(usable_s) and j < len(usable_t) and usable_s[i] and usable_t[j]:
            to_teacher[i] = j
    to_teacher[student.eos_id] = teacher.eos_id
    return to_teacher.to(student.device)


def map_logits(z_t, to_teacher):
    """Teacher logits (N, V_t) -> (N, V): column i is that of student id i, -inf where it has none."""
    z_t = z_t.index_select(-1, to_teacher.clamp(min=0))
    return z_t.masked_fill_(to_teacher < 0, -math.inf)


def readable_prefix(ids, mask, to_teacher):
    """Rollouts ids, mask (B, R) -> the mask up to the first id that the teacher's vocabulary lacks.

    The teacher can't read that token, so neither it nor what follows in the row can be scored.
    """
    return mask & (to_teacher[ids] >= 0).cumprod(1).bool()


# ---------------------------------------------------------------------------- save and load

def save(asr: ASR, path, extra: dict[str, dict] | None = None) -> None:
    """Write a checkpoint directory in the published layout.

    It is written to a temporary folder first. A new directory then appears whole, by one rename. In an
    existing one the files are swapped in one by one, weights last: of one run only they ever change.
    extra: further files, {"name.json" or "name.safetensors": dict}.
    """
    path = Path(path).absolute()
    # Either folder is on the same file system as path.
    temporary = path / ".tmp" if path.exists() else path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_files(asr, temporary, extra or {})
    if not path.exists():
        os.rename(temporary, path)
        return
    weights_last = sorted(temporary.iterdir(), key=lambda file: file.name == "model.safetensors")
    for file in weights_last:
        os.replace(file, path / file.name)
    temporary.rmdir()


def write_files(asr: ASR, folder, extra) -> None:
    """Write the files of a checkpoint into a folder. A tied head is not stored."""
    for name, content in (derived_files(asr) | asr.other_files).items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps(asr.net.config, indent=2))
    asr.tokenizer.save_pretrained(folder)
    for name, content in extra.items():
        if name.endswith(".json"):
            (folder / name).write_text(json.dumps(content, indent=2))
        else:
            save_file(content, folder / name, metadata={"format": "pt"})
    tensors = {}
    for name, tensor in asr.net.state_dict().items():
        tensors[name.removeprefix("lm.")] = tensor.detach().cpu().contiguous()
    if asr.net.config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for file in folder.glob("*.safetensors"):  # made readable to their owner alone
        shutil.copymode(folder / "config.json", file)


def derived_files(asr: ASR) -> dict[str, bytes]:
    """Return the files that a published folder has for other programs -> {name: content}.

    They repeat tokenizer.json, in the parts that Qwen2Tokenizer is made of, the ids that end a transcript,
    and what the features are.
    """
    tokenizer = asr.tokenizer
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    files = {
        "added_tokens.json": tokenizer.get_added_vocab(),
        "special_tokens_map.json": tokenizer.special_tokens_map | {"additional_special_tokens": special},
        "generation_config.json": {
            "bos_token_id": asr.pad_id,
            "eos_token_id": asr.stop.nonzero()[:, 0].tolist(),
            "pad_token_id": asr.pad_id,
        },
        "preprocessor_config.json": WhisperFeatureExtractor(feature_size=asr.n_mels).to_dict(),
    }
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    files["vocab.json"] = bpe["vocab"]
    files = {name: json.dumps(value, indent=2, ensure_ascii=False) for name, value in files.items()}
    merges = [f"{left} {right}" for left, right in bpe["merges"]]
    files["merges.txt"] = "\n".join(["#version: 0.2", *merges, ""])
    return {name: text.encode() for name, text in files.items()}


def load(name, device="cpu", dtype=None) -> ASR:
    """Read a checkpoint, by directory or Hub id: a student, or a Qwen3-ASR in either of its layouts.

    Without a dtype, a student is fp32, whatever the file holds; a Qwen3-ASR, never trained, is bf16 on a
    GPU. Raises FileNotFoundError, and ValueError that names every weight, token or key that does not fit.
    """
    path = find_checkpoint(name)
    config = data.read_json(path / "config.json")
    model_type = config.get("model_type")
    if model_type == "arkasr":
        return load_arkasr(path, config, device, dtype or torch.float32)
    if model_type == "qwen3_asr":
        return load_qwen3_asr(path, config, device, dtype or inference_dtype(device))
    raise ValueError(f"{path}/config.json: model_type {model_type!r} is not known; "
                     "expected 'arkasr' or 'qwen3_asr'")


def inference_dtype(device):
    """The dtype of a checkpoint that is not trained: bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def load_student(name, device) -> ASR:
    """Read a checkpoint to train. Raises ValueError if it is not a student."""
    asr = load(name, device)
    if not isinstance(asr.net, Student):
        raise ValueError(f"{name} is a Qwen3-ASR checkpoint: it can teach and be evaluated, "
                         "but only students (model_type 'arkasr') are trained")
    return asr


def load_teacher(name, device) -> ASR:
    """Read a frozen checkpoint of either family: in bf16 on a GPU, in fp32 on a CPU."""
    asr = load(name, device, inference_dtype(device))
    asr.net.requires_grad_(False)
    return asr


def find_checkpoint(name) -> Path:
    """Return the local folder of a checkpoint: a directory, or a Hub id "owner/name", then downloaded.

    Code files (*.py) come along and are never run. Raises FileNotFoundError.
    """
    path = Path(name)
    # "runs/x" beside a folder runs is a slip of the pen, not somebody's repository.
    is_local = path.is_dir() or path.parent.is_dir()
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) and not is_local:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.py"]
        try:
            return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=patterns))
        except Exception as error:  # offline, unknown, gated: one line is enough
            raise FileNotFoundError(f"{name}: no such directory, and not to be had from the Hub "
                                    f"({type(error).__name__}: {error})") from error
    if not path.exists():
        raise FileNotFoundError(f"{name}: no such directory")
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"{name}: no config.json there, so it is not a checkpoint directory")
    return path


TOKENIZER_FILES = """
tokenizer.json tokenizer_config.json vocab.json added_tokens.json special_tokens_map.json generation_config.json
""".split()


def load_tokenizer(name) -> PreTrainedTokenizerFast:
    """Read the tokenizer of a checkpoint: tokenizer.json, or Qwen's vocab.json and merges.txt.

    Raises ValueError naming the folder or file that is no such thing.
    """
    path = find_checkpoint(name)
    for file in sorted(path.iterdir()):
        if file.name in TOKENIZER_FILES:
            data.read_json(file)  # raises, naming the file; the libraries don't name it
    tokenizer_class = Qwen2Tokenizer
    if (path / "tokenizer.json").exists():
        tokenizer_class = PreTrainedTokenizerFast
    try:
        return tokenizer_class.from_pretrained(path)
    except Exception as error:  # whatever it is, it does not say which files it is about
        raise ValueError(f"{path}: no tokenizer can be made of tokenizer.json, "
                         f"or vocab.json and merges.txt: {error}") from error


OTHER_FILES = """
generation_config.json preprocessor_config.json processor_config.json chat_template.jinja
special_tokens_map.json added_tokens.json vocab.json merges.txt
""".split()


def read_other_files(path) -> dict[str, bytes]:
    """Read the publisher's code, and the files that it wants beside the weights -> {name: content}.

    `save` carries them along. They are bytes to us and never run; of generation_config.json, `assemble`
    reads the ids that end a transcript.
    """
    files = {}
    for file in sorted(path.iterdir()):
        if file.name in OTHER_FILES or file.suffix == ".py":
            files[file.name] = file.read_bytes()
    return files


def weight_files(path) -> list[Path]:
    """Return the files of a directory's weights: model.safetensors, or the shards that its index lists.

    Raises FileNotFoundError naming the files that are missing.
    """
    names = ["model.safetensors"]
    index = path / "model.safetensors.index.json"
    if not (path / "model.safetensors").exists() and index.exists():
        names = sorted(set(data.read_json(index).get("weight_map", {}).values()))
        if not names:
            raise ValueError(f"{index}: expected the key 'weight_map', with the file of each weight")
    missing = [name for name in names if not (path / name).exists()]
    if missing:
        raise FileNotFoundError(f"{path}: {', '.join(missing)} not found; "
                                "weights are read from safetensors only")
    return [path / name for name in names]


def open_weights(file):
    """Open a safetensors file. Raises ValueError naming it unless it is one, and whole."""
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        with open(file, "rb") as raw:
            start = data.describe(raw.read(60))
        raise ValueError(f"{file}: expected weights in safetensors, found {file.stat().st_size} bytes "
                         f"that are not, or not whole ({error}); they start with {start}") from None


def read_weights(path) -> dict[str, torch.Tensor]:
    """Read all tensors of a directory, by name. Raises as weight_files and open_weights do."""
    tensors = {}
    for file in weight_files(path):
        with open_weights(file) as weights:
            for name in weights.keys():
                tensors[name] = weights.get_tensor(name)
    return tensors


# Weights of published checkpoints that nothing reads: RoPE takes the place of Whisper's table of positions,
# and the LayerNorm before the adapter that of Whisper's last one.
UNUSED_WEIGHTS = ("audio_encoder.whisper.embed_positions.", "audio_encoder.whisper.layer_norm.")


def load_arkasr(path, config, device, dtype) -> ASR:
    """Read a student's directory."""
    net = empty_student(config)
    tensors = {}
    for name, tensor in read_weights(path).items():
        if name.startswith(UNUSED_WEIGHTS) or name.endswith(".num_batches_tracked"):
            continue
        ours = name if name.startswith("audio_encoder.") else "lm." + name
        tensors[ours] = tensor.to(dtype)
    if net.config["tie_word_embeddings"]:
        tie_head(tensors, path)
    load_weights(net, tensors, path)
    return assemble(net, load_tokenizer(path), device, read_other_files(path))


def tie_head(tensors, path) -> None:
    """Make the LM's head the embedding table itself, in a dict of weights by our names.

    Raises ValueError if the stored head is another matrix: one of the two would be lost.
    """
    table = tensors.get("lm.model.embed_tokens.weight")
    if table is None:
        return  # load_weights lists it as missing
    if not torch.equal(tensors.get("lm.lm_head.weight", table), table):
        raise ValueError(f"{path}/config.json ties lm_head.weight to the embeddings, "
                         "but the stored one is another matrix")
    tensors["lm.lm_head.weight"] = table


def load_weights(net: Student, tensors, where) -> None:
    """Put tensors, by our names, into a student built on the meta device.

    Raises ValueError that lists all that are missing, unexpected or misshapen. where: what they are from.
    """
    expected = net.state_dict()
    wrong = [f"missing {name}" for name in expected if name not in tensors]
    wrong += [f"unexpected {name}" for name in tensors if name not in expected]
    for name, tensor in tensors.items():
        if name in expected and tensor.shape != expected[name].shape:
            wrong.append(f"{name} is {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}")
    if wrong:
        raise ValueError(f"{where}: the weights do not fit config.json:\n  " + "\n  ".join(wrong))
    net.load_state_dict(tensors, assign=True)
    net.lm.tie_weights()


def check_same_features(student: ASR, teacher: ASR) -> None:
    """Raise ValueError unless both read the same log-mel."""
    if student.n_mels != teacher.n_mels:
        raise ValueError("student and teacher read the same features, but take "
                         f"{student.n_mels} and {teacher.n_mels} mel bins")


# ---------------------------------------------------------------------------- Qwen3-ASR

# A language as a manifest may spell it, in lower case -> its name in the prompt.
LANGUAGE_NAMES = LANGUAGE_CODE_TO_NAME | {
    "cmn": "Chinese", "zho": "Chinese", "chi": "Chinese", "cn": "Chinese", "mandarin": "Chinese",
    "eng": "English", "jpn": "Japanese", "jp": "Japanese", "kor": "Korean", "tha": "Thai",
    "tl": "Filipino",
}
LANGUAGE_NAMES |= {name.lower(): name for name in LANGUAGE_CODE_TO_NAME.values()}


@dataclass
class Qwen3ASR(ASR):
    """A Qwen3-ASR checkpoint in transformers' classes. Its prompt names the language of the audio."""
    # clip_key -> ids of "language X<asr_text>" that the model itself wrote
    heard_languages: dict[tuple, list[int]] = field(default_factory=dict)

    @property
    def n_mels(self):
        return self.net.config.audio_config.num_mel_bins

    @property
    def body(self):
        return self.net.model.language_model

    @property
    def head(self):
        return self.net.lm_head

    def encode(self, batch: data.Batch):
        """Return audio embeddings (B, A, D), and how many of each row are not padding (B,).

        The audio tower takes whole seconds of 100 frames, zeros after a clip's end. Clips below half a
        second were padded with silence before their features were computed: those are in batch.padded.
        """
        chunk = 2 * self.net.config.audio_config.n_window  # 100 frames
        n_frames = batch.n_frames.clone()
        for i, features in batch.padded.items():
            n_frames[i] = features.shape[1]
        n_columns = round_up(int(n_frames.max()), chunk)
        mel = batch.mel.new_zeros(len(n_frames), self.n_mels, n_columns)
        mel[:, :, :batch.mel.shape[2]] = batch.mel
        for i, features in batch.padded.items():
            mel[i, :, :features.shape[1]] = features
        valid = torch.arange(n_columns) < n_frames[:, None]        # (B, T)
        mel = mel.to(self.device, self.head.weight.dtype)          # (B, n_mels, T)
        packed = self.net.get_audio_features(mel, valid.long().to(self.device)).pooler_output
        n_audio = count_qwen3_asr_tokens(n_frames, chunk)
        rows = packed.split(n_audio.tolist())                      # B times (n_audio of the row, D)
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), n_audio.to(self.device)

    def suffixes(self, batch: data.Batch, audio, n_audio) -> list[list[int]]:
        """Return the ids that follow the audio in each row's prompt; audio and n_audio are from `encode`.

        They name the manifest's language, or else the one that the model itself hears in the clip, asked
        once a clip. The student's text takes no part.
        """
        self.hear_languages(batch, audio, n_audio)
        rows = []
        for utterance in batch.utterances:
            if utterance.language:
                language = self.language_ids(utterance)
            else:
                language = self.heard_languages[clip_key(utterance)]
            rows.append(self.suffix_ids + language)
        return rows

    def hear_languages(self, batch: data.Batch, audio, n_audio) -> None:
        """Add to heard_languages the clips of a batch for which the manifest gives no language.

        Raises ValueError naming the clip if the model does not name a language.
        """
        unknown = []
        for i, utterance in enumerate(batch.utterances):
            if not utterance.language and clip_key(utterance) not in self.heard_languages:
                unknown.append(i)
        if not unknown:
            return
        written = self.write_languages(audio[unknown], n_audio[unknown])
        for i, ids in zip(unknown, written):
            utterance = batch.utterances[i]
            if ids[-1] != self.asr_text_id:
                raise ValueError(f"{utterance.line}: the teacher wrote {self.tokenizer.decode(ids)!r} "
                                 f"where it should name the language of {utterance.audio}; "
                                 "give it in the manifest's field `language`")
            self.heard_languages[clip_key(utterance)] = ids

    def write_languages(self, audio, n_audio) -> list[list[int]]:
        """Return what the model greedily writes for each row without a language: ids up to <asr_text>."""
        stop = torch.zeros_like(self.stop)
        stop[self.asr_text_id] = True
        asr = replace(self, stop=stop, blocked=(self.blocked | self.stop) & ~stop)
        prompt_rows = [self.prompt_ids(n, self.suffix_ids) for n in n_audio.tolist()]
        prompt = insert_audio(asr, prompt_rows, audio, n_audio)
        ids, mask = roll_out(asr, prompt, max_new_tokens=12)  # enough for every language that it knows
        return [row[valid].tolist() for row, valid in zip(ids.cpu(), mask.cpu())]

    @property
    def asr_text_id(self):
        return self.tokenizer.convert_tokens_to_ids("<asr_text>")

    def language_ids(self, utterance: data.Utterance) -> list[int]:
        """Return the ids of "language X<asr_text>" for the manifest's code or name of the language.

        Raises ValueError naming line and value for a language that the model does not know.
        """
        spelled = utterance.language.lower()
        code = re.split("[-_]", spelled)[0]  # "en-us" -> "en"
        name = LANGUAGE_NAMES.get(spelled) or LANGUAGE_NAMES.get(code)
        if name is None:
            known = ", ".join(map(" ".join, LANGUAGE_CODE_TO_NAME.items()))
            raise ValueError(f"{utterance.line}: language {utterance.language!r} "
                             f"is not one of Qwen3-ASR's: {known}")
        return self.plain_tokenizer.encode(f"language {name}").ids + [self.asr_text_id]


def clip_key(utterance: data.Utterance) -> tuple:
    """What tells one clip's audio from another's: segments of one file are different clips."""
    return utterance.audio, utterance.start_sec, utterance.duration_sec


def count_qwen3_asr_tokens(n_frames, chunk):
    """Return the audio tokens (B,) of clips of n_frames (B,): a second of `chunk` frames gives 13."""
    rest = n_frames % chunk
    for _ in range(3):  # three convolutions of stride 2
        rest = (rest + 1) // 2
    return n_frames // chunk * 13 + rest


# The original repositories' names of weights, as regular expressions -> transformers' names.
QWEN3_ASR_KEYS = {
    r"^thinker\.model\.": "model.language_model.",
    r"^thinker\.lm_head\.": "lm_head.",
    r"^thinker\.audio_tower\.proj1\.": "model.multi_modal_projector.linear_1.",
    r"^thinker\.audio_tower\.proj2\.": "model.multi_modal_projector.linear_2.",
    r"^thinker\.audio_tower\.": "model.audio_tower.",
}


def load_qwen3_asr(path, config, device, dtype) -> Qwen3ASR:
    """Read a Qwen3-ASR directory of either layout; the original one nests everything in thinker_config.

    transformers would fill what it does not find with random numbers: here that is a ValueError.
    """
    if "thinker_config" in config:
        net_config = original_qwen3_asr_config(config["thinker_config"])
        key_mapping = QWEN3_ASR_KEYS
    else:
        net_config = native_qwen3_asr_config(config)
        key_mapping = None
    for file in weight_files(path):
        open_weights(file)  # transformers would not say which file is broken
    net, report = Qwen3ASRForConditionalGeneration.from_pretrained(
        path,
        config=net_config,
        key_mapping=key_mapping,
        dtype=dtype,
        attn_implementation="sdpa",
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # not ignored, but reported with the rest below
    )
    wrong = []
    for kind in ("missing", "unexpected", "mismatched"):
        wrong += [f"{kind} {key}" for key in sorted(map(str, report[f"{kind}_keys"]))]
    if wrong:
        raise ValueError(f"{path}: the weights do not fit config.json:\n  " + "\n  ".join(wrong))
    return assemble_qwen3_asr(net, load_tokenizer(path), device)


def native_qwen3_asr_config(config: dict) -> Qwen3ASRConfig:
    """Return transformers' config from a config.json in transformers' layout."""
    # Without these, transformers would take its defaults: the 1.7B size.
    if "audio_config" not in config or "text_config" not in config:
        raise ValueError("config.json of a Qwen3-ASR has audio_config and text_config, "
                         f"or thinker_config; this one has {', '.join(config)}")
    not_settings = ("model_type", "architectures", "transformers_version")
    return Qwen3ASRConfig(**{key: value for key, value in config.items() if key not in not_settings})


def original_qwen3_asr_config(thinker: dict) -> Qwen3ASRConfig:
    """Return transformers' config from the thinker_config of the original layout."""
    native = Qwen3ASRConfig()
    text = thinker["text_config"]
    rope = text.get("rope_parameters") or {}
    theta = text.get("rope_theta") or rope["rope_theta"]
    text_config = known_keys(text, Qwen3Config)
    text_config["model_type"] = "qwen3"
    # Its M-RoPE gives all three axes the same position, so it is the default RoPE.
    text_config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    audio_config = known_keys(thinker["audio_config"], type(native.audio_config))
    audio_config["model_type"] = "qwen3_asr_encoder"
    return Qwen3ASRConfig(
        audio_config=audio_config,
        text_config=text_config,
        audio_token_id=thinker.get("audio_token_id", native.audio_token_id),
        tie_word_embeddings=text.get("tie_word_embeddings", thinker.get("tie_word_embeddings", True)),
    )


def known_keys(section: dict, config_class) -> dict:
    """Return the part of a config's section that transformers' class knows; the original has more keys."""
    return {key: value for key, value in section.items() if key in config_class.__dataclass_fields__}


def assemble_qwen3_asr(net, tokenizer, device) -> Qwen3ASR:
    """Join network and tokenizer, as `assemble` does for a student.

    Raises ValueError naming the token that the tokenizer lacks or that has another id in config.json.
    """
    n_rows = net.config.text_config.vocab_size
    tokens = ["<|im_start|>", EOS, "<|audio_start|>", "<|audio_pad|>", "<|audio_end|>", "<asr_text>"]
    ids = special_ids(tokenizer, tokens, n_rows)
    audio_id = ids["<|audio_pad|>"]
    if net.config.audio_token_id != audio_id:
        raise ValueError(f"config.json says audio_token_id = {net.config.audio_token_id}, "
                         f"but the tokenizer has '<|audio_pad|>' at {audio_id}")
    stop_ids = {ids[EOS]} | id_set(net.config.eos_token_id)
    stop, blocked = stop_and_blocked(tokenizer, stop_ids, n_rows, device)
    prefix = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|audio_start|>"
    suffix = "<|audio_end|><|im_end|>\n<|im_start|>assistant\n"
    return Qwen3ASR(
        net=net.eval().to(device),
        tokenizer=tokenizer,
        prefix_ids=tokenizer.encode(prefix, add_special_tokens=False),
        suffix_ids=tokenizer.encode(suffix, add_special_tokens=False),
        eos_id=ids[EOS],
        pad_id=ids[EOS],
        audio_id=audio_id,
        stop=stop,
        blocked=blocked,
    )


# ---------------------------------------------------------------------------- processes

def setup(args):
    """Join the processes that torchrun started, if any -> rank, world, device, and a list that
    SIGTERM makes non-empty. Raises OSError if --out can't be written."""
    data.check_outputs(Path(args.out) / "metrics.jsonl", Path(args.out) / "model.safetensors")
    rank, world, device = find_place(args.device)
    if world > 1:
        # Hours, since the others wait while rank 0 saves; NCCL's own limit is ten minutes.
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12),
            device_id=device if device.type == "cuda" else None)
    torch.manual_seed(args.seed)  # for initial weights; later draws are keyed on (seed, step, clip)
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    return rank, world, device, stop


def setup_scoring(args):
    """As `setup`, for scripts whose ranks exchange results as Python objects -> rank, world, device."""
    rank, world, device = find_place(args.device)
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    return rank, world, device


def find_place(kind):
    """--device (auto, cpu or cuda) and torchrun's environment -> rank, world, device."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        return rank, world, torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    # cuDNN would plan attention anew for every shape, that is, for every decoded token.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Partial sums stay in fp32: rounded to bf16, a sum over the vocabulary loses small terms.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return rank, world, device


def finish() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.barrier()  # without it, gloo on a CPU may abort in the line below
        dist.destroy_process_group()


def all_sum(values: dict, device) -> dict[str, float]:
    """Sum numbers over all ranks, in one collective. Every rank has the same keys."""
    total = torch.tensor([float(v) for v in values.values()], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return dict(zip(values, total.tolist()))


def progress(total, name, unit, rank, initial=0):
    """A progress bar with rate and ETA on rank 0; in a file, a line every 20 s."""
    return tqdm(total=total, initial=initial, desc=name, unit=unit, disable=rank > 0,
                mininterval=0.5 if sys.stderr.isatty() else 20)


# ---------------------------------------------------------------------------- what a training run logs

class Log:
    """metrics.jsonl, progress bar, sums between two records, and rejected clips of a training run."""

    def __init__(self, args, rank, start):
        self.path = Path(args.out) / "metrics.jsonl"
        self.rank = rank
        self.sums = Counter()
        self.rejected = Counter()  # reason: clips left out since this process started
        self.first = {}            # reason: message of the first of them
        self.bar = progress(args.steps, Path(args.out).name, "step", rank, start)
        if rank == 0 and self.path.exists():
            # What was logged after the restored step is about to be made again; its dev error too.
            rows = [row for row in read_metrics(self.path)
                    if row["step"] < start or (row["step"] == start and "dev_error" not in row)]
            data.write_jsonl(self.path, rows)

    def say(self, text) -> None:
        """Print on rank 0."""
        if self.rank == 0:
            print(text, flush=True)

    def write(self, record) -> None:
        """Append a record and print it, on rank 0."""
        if self.rank > 0:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        shown = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items()]
        self.bar.write("  ".join(shown))

    def add(self, sums) -> None:
        """Add {name: number}."""
        self.sums.update(sums)

    def take_sums(self, names, device) -> dict[str, float]:
        """What was added since the last call, summed over ranks; `rejected`: since the start."""
        self.sums["rejected"] = self.rejected.total()
        sums = all_sum({name: self.sums[name] for name in names}, device)
        self.sums.clear()
        return sums

    def reject(self, batches) -> list[data.Batch]:
        """Count the clips that could not be used -> the batches in which some are left."""
        for batch in batches:
            for reason, message in batch.rejected:
                self.rejected[reason] += 1
                self.first.setdefault(reason, message)
        return [batch for batch in batches if batch.utterances]

    def first_message(self) -> str:
        """Why the first clip was rejected."""
        return next(iter(self.first.values()), "on another process")

    def close(self) -> None:
        """Draw metrics.png; say which clips were left out, and why."""
        self.bar.close()
        if self.rank == 0:
            draw_metrics(self.path)
        for reason, n in self.rejected.items():
            print(f"rank {self.rank}: {n} clips rejected: {reason} (first: {self.first[reason]})")


def read_metrics(path) -> list[dict]:
    """Records of a metrics.jsonl; a killed run may leave half a line at its end."""
    return [json.loads(line) for line in path.open() if line.endswith("}\n")]


PANELS = {
    "loss, nats per token": ["loss", "ctc"],
    "dev error, %": ["dev_error"],
    "agreement with the teacher": ["overlap", "top1_agreement", "mass_student", "mass_teacher"],
    "share of rollouts": ["truncated", "empty", "repeats"],
}


def draw_metrics(path) -> None:
    """metrics.jsonl -> metrics.png beside it: what PANELS lists and the run has logged, over steps."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    records = read_metrics(path)
    logged = {key for record in records for key in record}
    titles = [title for title, keys in PANELS.items() if logged & set(keys)]
    width = max(1, len(titles))
    figure, axes = pyplot.subplots(1, width, figsize=(3.6 * width, 3), layout="constrained", squeeze=False)
    for axis, title in zip(axes[0], titles):
        for key in PANELS[title]:
            points = [(r["step"], r[key]) for r in records if key in r]
            if points:
                axis.plot(*zip(*points), "o-" if len(points) < 12 else "-", markersize=3, label=key)
        axis.set(title=title, xlabel="step", ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize="small")
    figure.savefig(path.with_name("metrics.png"), dpi=110)
    pyplot.close(figure)


def n_parameters(asr) -> int:
    return sum(p.numel() for p in asr.net.parameters())


def dev_error(asr, utterances, args, rank, world) -> dict[str, float]:
    """Greedy errors on dev, languages pooled; the ranks share the clips.

    -> {"dev_error": percent, "dev_length": units written / units in the references}
    """
    results = transcribe(asr, utterances, rank, world, args.eval_batch, args.max_new_tokens)
    sums = Counter(errors=0, units=0, longer=0)
    for u in utterances:
        if u.id in results:
            counts = data.edit_counts(u.text, results[u.id]["hyp"], u.language)
            sums["errors"] += counts.errors
            sums["units"] += counts.units
            sums["longer"] += counts.insertions - counts.deletions
    sums = all_sum(sums, asr.device)
    if not sums["units"]:
        return {"dev_error": math.nan, "dev_length": math.nan}
    return {"dev_error": 100 * sums["errors"] / sums["units"],
            "dev_length": 1 + sums["longer"] / sums["units"]}


def rollout_health(ids, mask, stop) -> dict[str, torch.Tensor]:
    """Rollouts ids, mask (B, R), stop (V,) -> how many there are, were cut, are empty, repeat."""
    ended = (stop[ids] & mask).any(1)                                           # (B,)
    return {"clips": len(ids), "truncated": (~ended).sum(), "empty": stop[ids[:, 0]].sum(),
            "repeats": repeats(ids, mask).sum()}


def repeats(ids, mask, n=3):
    """Rollouts (B, R) -> (B,) bool: does some n-gram come twice? The first sign of a loop."""
    if ids.shape[1] <= n:
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    grams = ids.unfold(1, n, 1)                                                 # (B, G, n)
    emitted = mask.unfold(1, n, 1).all(-1)                                      # (B, G)
    same = (grams[:, :, None] == grams[:, None]).all(-1)                        # (B, G, G)
    same = same & emitted[:, :, None] & emitted[:, None]
    return same.triu(1).flatten(1).any(1)


AGREEMENT = ("top1_agreement", "overlap", "mass_student", "mass_teacher", "entropy", "entropy_teacher")


@torch.no_grad()
def agreement(hidden, student, teacher, to_teacher, k, chunk) -> dict[str, float]:
    """How student and teacher stand to each other at some states, means over those of all ranks.

    hidden: (hidden_s (N, D), hidden_t (N, D_t)), or None on a rank without a clip. Of the k most
    probable ids of either, after ids that only one vocabulary has were removed (overlap.py removes
    them later, as the paper does, and has more):
      top1_agreement              do both put the same id first?
      overlap                     share of the k ids that both sets have
      mass_student, mass_teacher  probability that each puts on those shared ids
      entropy, entropy_teacher    nats
    """
    sums = dict.fromkeys((*AGREEMENT, "states"), 0.0)
    hidden_s, hidden_t = hidden or ((), ())
    for i in range(0, len(hidden_s), chunk):
        z_s = student.logits(hidden_s[i:i + chunk]).masked_fill(to_teacher < 0, -math.inf)
        z_t = map_logits(teacher.logits(hidden_t[i:i + chunk]), to_teacher)     # (C, V)
        logp_s = z_s.log_softmax(-1)                                            # (C, V)
        logp_t = z_t.log_softmax(-1)                                            # (C, V)
        top_s = logp_s.topk(min(k, logp_s.shape[-1]))                           # (C, k)
        top_t = logp_t.topk(min(k, logp_t.shape[-1]))                           # (C, k)
        same = top_s.indices[:, :, None] == top_t.indices[:, None]              # (C, k, k)
        same = same & torch.isfinite(top_s.values)[:, :, None]
        sums["top1_agreement"] += same[:, 0, 0].sum()
        sums["overlap"] += same.sum() / same.shape[-1]
        sums["mass_student"] += (top_s.values.exp() * same.any(2)).sum()
        sums["mass_teacher"] += (top_t.values.exp() * same.any(1)).sum()
        sums["entropy"] += torch.special.entr(logp_s.exp()).sum()
        sums["entropy_teacher"] += torch.special.entr(logp_t.exp()).sum()
        sums["states"] += len(z_s)
    sums = all_sum(sums, student.device)
    if not sums["states"]:
        return {}
    return {name: sums[name] / sums["states"] for name in AGREEMENT}


# ---------------------------------------------------------------------------- optimiser shared over ranks

MOMENTS = ("exp_avg", "exp_avg_sq")


def get_rank() -> int:
    """0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def shard(optimizer) -> None:
    """ZeRO-1 (Rajbhandari et al. 2020, arXiv 1910.02054): one rank keeps a parameter's moments.

    Largest first, each goes to the rank that has least. Whole parameters and AdamW's own arithmetic:
    the update is to the last bit that of an optimiser that is not shared.
    """
    n_elements = [0] * (dist.get_world_size() if dist.is_initialized() else 1)
    owner = {}
    parameters = [p for p, _ in numbered(optimizer)]
    for p in sorted(parameters, key=torch.numel, reverse=True):
        owner[p] = n_elements.index(min(n_elements))
        n_elements[owner[p]] += p.numel()
    for group in optimizer.param_groups:
        group["owners"] = [owner[p] for p in group["params"]]


def numbered(optimizer) -> list[tuple]:
    """(parameter, owner) in the order of their numbers in its state. owner None: not shared."""
    pairs = []
    for group in optimizer.param_groups:
        owners = group.get("owners", [None] * len(group["params"]))
        pairs += zip(group["params"], owners)
    return pairs


def update(optimizer) -> None:
    """optimizer.step(); of a shared one, each rank's part, then every owner sends its weights."""
    for p, owner in numbered(optimizer):
        if owner not in (None, get_rank()):
            p.grad = None  # AdamW passes over it, and makes no moments for it
    optimizer.step()
    for p, owner in numbered(optimizer):
        if owner is not None and dist.is_initialized():
            dist.broadcast(p.data, owner)


def gather_state(optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's state by its names on disk, whole on rank 0 wherever it lies; elsewhere {}."""
    rank = get_rank()
    state = optimizer.state_dict()["state"]
    tensors = {}
    for i, (p, owner) in enumerate(numbered(optimizer)):
        if not state or rank not in (0, owner):
            continue
        for name in MOMENTS:
            if rank > 0:
                dist.send(state[i][name], 0)
                continue
            if owner in (None, 0):
                value = state[i][name]
            else:
                value = torch.empty_like(p)
                dist.recv(value, owner)
            tensors[f"optimizer.{i}.{name}"] = value.detach().cpu()
        if rank == 0:
            tensors[f"optimizer.{i}.step"] = next(iter(state.values()))["step"].clone().cpu()  # one for all
    return tensors


# ---------------------------------------------------------------------------- training state, resume

def start_run(args, asr, optimizer, modules, rank) -> tuple[int, float]:
    """Make --out; with --resume, restore its newest state -> step to go on at, best dev error so far.

    Raises FileExistsError if --out holds an earlier run and --resume is not given, RuntimeError if
    ranks see different states.
    """
    out = Path(args.out)
    if not args.resume and any((out / name).exists() for name in ("metrics.jsonl", "state")):
        raise FileExistsError(f"{out} holds an earlier run: continue it with --resume, "
                              "or choose another --out")
    if dist.is_initialized():
        dist.barrier()  # every rank has looked before one of them writes
    out.mkdir(parents=True, exist_ok=True)
    info = load_training(out, asr, optimizer, modules) if args.resume else None
    step = info["step"] if info else 0
    if dist.is_initialized():
        steps = [None] * dist.get_world_size()
        dist.all_gather_object(steps, step)
        if len(set(steps)) > 1:
            raise RuntimeError(f"ranks find different steps in {out}/state: {steps}, in order of rank. "
                               "Do all nodes share --out?")
    if info is None:
        return 0, math.inf
    for name, value in kept_flags(args).items():
        before = info["flags"].get(name)
        if rank == 0 and before != value:
            print(f"resumed with another --{name} than before: {before} -> {value}")
    return step, info["best"]


def kept_flags(args) -> dict:
    """The flags that decide a run's result, as they are kept in its state."""
    return {k: v for k, v in vars(args).items() if k not in ("out", "resume", "device", "workers")}


def keep_best(asr, out, error, best, rank) -> float:
    """Keep --out at the best checkpoint on dev -> the best error so far."""
    if rank == 0 and error < best:
        save(asr, out)
    return min(error, best)


def save_training(out, step, asr, optimizer, modules=None, info=None) -> None:
    """Write OUT/state/step-N, then drop older ones: a full checkpoint plus what a resumed run needs.

    All ranks call it, rank 0 writes. modules: {name: module} trained beside the network; info: what
    load_training gives back. There is no RNG and no data position to save: every draw and every batch
    is a function of (seed, step).
    """
    tensors = gather_state(optimizer)
    if get_rank() > 0:
        return
    folder = Path(out) / "state"
    for module_name, module in (modules or {}).items():
        for name, value in module.state_dict().items():
            tensors[f"{module_name}.{name}"] = value.cpu()
    target = folder / f"step-{step:07d}"
    if not target.exists():
        save(asr, target, {"training.safetensors": tensors, "training.json": {"step": step, **(info or {})}})
    for old in folder.glob("step-*"):
        if old != target:
            shutil.rmtree(old)


@torch.no_grad()
def load_training(out, asr, optimizer, modules=None) -> dict | None:
    """Restore the newest OUT/state/step-N in place -> its info; None if there is none.

    Half-written ones end in .tmp. Tensors are read one at a time: none lies in memory twice.
    """
    saved = sorted(p for p in (Path(out) / "state").glob("step-*") if p.suffix != ".tmp")
    if not saved:
        return None
    folder = saved[-1]
    with open_weights(folder / "model.safetensors") as file:
        stored = set(file.keys())
        for key, value in asr.net.state_dict().items():
            name = key.removeprefix("lm.")
            if name in stored:  # a tied head is not
                value.copy_(file.get_tensor(name))
    state = {}
    parameters = numbered(optimizer)
    with open_weights(folder / "training.safetensors") as file:
        stored = {int(key.split(".")[1]) for key in file.keys() if key.startswith("optimizer.")}
        if stored and stored != set(range(len(parameters))):
            raise ValueError(f"{folder}: moments of {len(stored)} parameters, but {len(parameters)} are "
                             "trained: was --freeze another one?")
        for i, (p, owner) in enumerate(parameters):
            if i not in stored or owner not in (None, get_rank()):
                continue
            state[i] = {"step": file.get_tensor(f"optimizer.{i}.step")}
            for name in MOMENTS:
                state[i][name] = file.get_tensor(f"optimizer.{i}.{name}").to(p.device)
        for module_name, module in (modules or {}).items():
            for name, value in module.state_dict().items():
                value.copy_(file.get_tensor(f"{module_name}.{name}"))
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return data.read_json(folder / "training.json")
