"""What a checkpoint *is*: the student (encoder, adapter, LM), the teacher, prompts, generation,
scoring, saving and loading. The last section holds what training runs share.

    waveform -> log-mel (128, 100 Hz) -> two convolutions (50 Hz) -> pre-LN encoder blocks with
    partial RoPE -> LayerNorm -> 4 neighbouring frames side by side (12.5 Hz) -> MLP adapter
    -> embeddings in the prompt of a Qwen2 causal LM

    prompt     <|user|><|begin_of_audio|><|audio|> x A<|end_of_audio|>Please transcribe this audio.
               <|assistant|>
    response   transcript<|im_end|>

The other family, Qwen3-ASR, is transformers' own class. It is a teacher here, never trained:

    prompt     <|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|audio_start|><|audio_pad|> x A
               <|audio_end|><|im_end|>\n<|im_start|>assistant\nlanguage English<asr_text>
    response   transcript<|im_end|>

Shapes: B utterances, T mel frames (100 Hz), T' encoder frames (50 Hz), A audio tokens (12.5 Hz), P
prompt columns, R response columns, n response tokens packed over the batch, V vocabulary; `width`
is that of the LM. Prompts are padded on the left, responses on the right, so that in every row

    column      0 ... P-1      P      P+1   ...   P+R-1
    input_ids   prompt         y_0    y_1   ...   y_{R-1} (= EOS)
    hidden[c] predicts column c+1: columns P-1 ... P+R-2 predict y_0 ... y_{R-1}

The forwards of a step of distill.py are `encode_audio`, `generate` and `response_hidden`; of sft.py
the first and the last.

Weights have the names of the published ARK-ASR checkpoints and are read from safetensors only. No
code of a checkpoint is ever run.

Differs from the published model (numbers go on from distill.py):
  [dev 6] Padding is masked after each convolution, in attention and in the merge, so that a row's
          output does not depend on its neighbours. On a clip alone the two are the same function.
  [dev 7] The student's weights are fp32, with bf16 arithmetic on a GPU. The public trainer steps
          AdamW on bf16 weights, which a small learning rate hardly moves.
"""

import json
import math
import os
import re
import shutil
import signal
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path

import huggingface_hub
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import (
    DynamicCache, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer,
    Qwen3ASRConfig, Qwen3ASRForConditionalGeneration)
from transformers.models.qwen3_asr.modeling_qwen3_asr import _get_feat_extract_output_lengths
from transformers.models.qwen3_asr.processing_qwen3_asr import LANGUAGE_CODE_TO_NAME

import data

EOS, PAD, AUDIO = "<|im_end|>", "<|endoftext|>", "<|audio|>"
SPECIAL = [PAD, EOS, AUDIO, "<|user|>", "<|begin_of_audio|>", "<|end_of_audio|>", "<|assistant|>"]
INSTRUCTION = "Please transcribe this audio."

transformers.utils.logging.disable_progress_bar()  # a bar per checkpoint read says nothing


# ---------------------------------------------------------------------- audio encoder and adapter

def rope_angles(n_positions, head_dim, device, theta=10_000.0):
    """Cosines and sines of RoPE's angles (Su et al. 2021): each (T', head_dim / 4), fp32.

    T' positions, at 50 Hz. Half of each head is rotated, rd = head_dim / 2: pair i at position t
    by t theta^(-2i / rd).
    """
    rotary_dim = head_dim // 2
    dims = torch.arange(0, rotary_dim, 2, device=device, dtype=torch.float32)
    frequencies = theta ** (-dims / rotary_dim)                    # (rd / 2,)
    positions = torch.arange(n_positions, device=device, dtype=torch.float32)
    angles = positions[:, None] * frequencies                      # (T', rd / 2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Adjacent pairs (2i, 2i+1) of the first half of each head, rotated: (B, heads, T', head_dim).

    The published layout is interleaved. transformers' glmasr pairs i with i + rd/2 instead, and
    permutes the rows of the weights.
    """
    rotary_dim = 2 * cos.shape[-1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    even = x[..., 0:rotary_dim:2]                                  # (B, heads, T', rd / 2)
    odd = x[..., 1:rotary_dim:2]                                   # (B, heads, T', rd / 2)
    rest = x[..., rotary_dim:]                                     # (B, heads, T', head_dim - rd)
    pairs = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return torch.cat([pairs.flatten(-2), rest], dim=-1)


class SelfAttention(nn.Module):
    """Multi-head self-attention with RoPE on queries and keys."""

    def __init__(self, d_model, heads):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)  # a bias cancels in the softmax
        self.v_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def split_heads(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)   # (B, heads, T', head_dim)

    def forward(self, x, rope, mask):
        """x (B, T', d_model), rope (cos, sin), mask (B, 1, 1, T') True on valid keys -> like x."""
        q = rotate(self.split_heads(self.q_proj(x)), *rope)        # (B, heads, T', head_dim)
        k = rotate(self.split_heads(self.k_proj(x)), *rope)        # like q
        v = self.split_heads(self.v_proj(x))                       # like q
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, T', head_dim)
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
        """As SelfAttention's."""
        x = x + self.self_attn(self.self_attn_layer_norm(x), rope, mask)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


def valid_frames(n_frames, width):
    """n_frames (B,) mel frames per clip -> (B, width) True on the clip's own frames at 50 Hz."""
    columns = torch.arange(width, device=n_frames.device)
    return columns < (n_frames[:, None] + 1) // 2


class WhisperEncoder(nn.Module):
    """Whisper's encoder with RoPE in place of its position table, without its last LayerNorm."""

    def __init__(self, n_mels, d_model, layers, heads, ffn):
        super().__init__()
        self.head_dim = d_model // heads
        self.conv1 = nn.Conv1d(n_mels, d_model, 3, padding=1)
        self.conv2 = nn.Conv1d(d_model, d_model, 3, stride=2, padding=1)
        self.layers = nn.ModuleList(EncoderLayer(d_model, heads, ffn) for _ in range(layers))

    def forward(self, mel, n_frames):
        """mel (B, n_mels, T) at 100 Hz, n_frames (B,) -> (B, (T + 1) // 2, d_model) at 50 Hz."""
        is_sound = torch.arange(mel.shape[-1], device=mel.device) < n_frames[:, None]
        x = F.gelu(self.conv1(mel)) * is_sound[:, None]            # (B, d_model, T) [dev 6]
        x = F.gelu(self.conv2(x)).transpose(1, 2)                  # (B, T', d_model)
        valid = valid_frames(n_frames, x.shape[1])                 # (B, T')
        rope = rope_angles(x.shape[1], self.head_dim, x.device)
        for layer in self.layers:
            x = layer(x, rope, valid[:, None, None])               # no key is padding [dev 6]
        return x


class AudioEncoder(nn.Module):
    """Encoder and adapter: log-mel features in, embeddings for the prompt of the LM out.

    This class and those above copy out alone: they need torch, nn and F.
    """

    def __init__(self, n_mels, d_model, layers, heads, ffn, lm_width, merge=4):
        super().__init__()
        self.merge = merge
        self.whisper = WhisperEncoder(n_mels, d_model, layers, heads, ffn)
        self.layer_norm = nn.LayerNorm(d_model)  # takes the place of Whisper's last LayerNorm
        self.adapting = nn.Sequential(
            nn.Linear(merge * d_model, 2 * lm_width),
            nn.GELU(),
            nn.Linear(2 * lm_width, lm_width),
        )

    def n_tokens(self, n_frames):
        """Audio tokens of clips: 100 frames/s -> 50 -> 12.5 tokens/s, rounded down; at least 1."""
        return ((n_frames + 1) // 2 // self.merge).clamp(min=1)

    def adapt(self, x, n_frames):
        """x (B, T', d_model) from `whisper`, n_frames (B,) -> (B, A, lm_width), n_tokens (B,).

        T' may be longer than these clips need.
        """
        valid = valid_frames(n_frames, x.shape[1])                 # (B, T')
        x = self.layer_norm(x) * valid[..., None]                  # (B, T', d_model) [dev 6]
        n_tokens = self.n_tokens(n_frames)
        # Below 0, F.pad cuts off what does not fill a token; above 0 only if all are under 70 ms.
        n_missing = int(n_tokens.max()) * self.merge - x.shape[1]
        x = F.pad(x, (0, 0, 0, n_missing))                         # (B, A * merge, d_model)
        x = x.unflatten(1, (-1, self.merge)).flatten(2)            # (B, A, merge * d_model)
        return self.adapting(x), n_tokens

    def forward(self, mel, n_frames):
        """mel (B, n_mels, T), n_frames (B,) -> embeddings (B, A, lm_width), n_tokens (B,).

        n_tokens: how many embeddings of a row are not padding.
        """
        return self.adapt(self.whisper(mel, n_frames), n_frames)


# ------------------------------------------------------------------------------------ the student

class ArkasrConfig(Qwen2Config):
    """A published config.json: Qwen2's keys and those of the encoder, see `student_config`."""
    model_type = "arkasr"


class ArkasrForConditionalGeneration(Qwen2ForCausalLM):
    """Audio encoder and causal LM, under the published names of weights."""
    config_class = ArkasrConfig
    # RoPE takes the place of Whisper's table of positions, and the LayerNorm before the adapter
    # that of Whisper's last one. The published files hold all three.
    _keys_to_ignore_on_load_unexpected = [
        r"^audio_encoder\.whisper\.embed_positions\.", r"^audio_encoder\.whisper\.layer_norm\."]

    def __init__(self, config):
        super().__init__(config)  # ends in post_init, which draws the LM's weights
        audio = config.whisper_config
        self.audio_encoder = AudioEncoder(
            n_mels=audio["num_mel_bins"],
            d_model=audio["d_model"],
            layers=audio["encoder_layers"],
            heads=audio["encoder_attention_heads"],
            ffn=audio["encoder_ffn_dim"],
            lm_width=config.hidden_size,
            merge=config.merge_factor,
        )


# The only values implemented here, of options that a config.json may set.
IMPLEMENTED = {"use_rope": True, "adapter_type": "mlp", "mlp_adapter_act": "gelu",
               "use_sliding_window": False, "rope_scaling": None}


def student_config(keys: dict) -> ArkasrConfig:
    """Keys of a student's config.json -> transformers' config.

    Raises ValueError naming the key that asks for another kind of encoder or LM.
    """
    keys = {"tie_word_embeddings": True, "merge_factor": 4} | IMPLEMENTED | keys
    for key, expected in IMPLEMENTED.items():
        if keys[key] != expected:
            raise ValueError(f"{key} {keys[key]!r}: only {expected!r} is implemented")
    rope = {"rope_type": "default", "rope_theta": keys.get("rope_theta", 1e6)}
    rope |= keys.get("rope_parameters") or {}
    if rope["rope_type"] != "default":
        raise ValueError(f"rope_parameters {rope}: only 'default' is implemented")
    if "whisper_config" not in keys:
        raise ValueError("no whisper_config, the sizes of the audio encoder")
    left_out = """model_type transformers_version torch_dtype dtype rope_scaling
        attn_implementation""".split()
    # Private keys stay out: transformers would fetch and run what _attn_implementation names.
    kept = {k: v for k, v in keys.items() if k not in left_out and not k.startswith("_")}
    kept |= {"rope_parameters": rope, "architectures": ["ArkasrForConditionalGeneration"]}
    config = ArkasrConfig(**kept, attn_implementation="sdpa")
    config.rope_theta = rope["rope_theta"]  # as transformers 4 spells it: both are written
    return config


def new_student_config(lm_keys: dict, whisper_keys: dict, tokenizer, n_rows) -> ArkasrConfig:
    """The config of a student that is made here, in the published layout.

    lm_keys: the LM's, by transformers' names. whisper_keys: the encoder's five sizes. n_rows: rows
    of the embedding table, V.
    """
    ids = tokenizer.get_vocab()
    return student_config(lm_keys | {
        "vocab_size": n_rows,
        "whisper_config": whisper_keys | {"max_source_positions": 1500},
        "max_whisper_length": 1500,
        "spec_aug": False,
        "audio_token_id": ids.get(AUDIO),
        "bos_token_id": ids.get(PAD),
        "eos_token_id": ids.get(EOS),
        "pad_token_id": ids.get(PAD),
    })


def train_tokenizer(texts, vocab_size) -> Qwen2Tokenizer:
    """A byte-level BPE as Qwen's, trained on texts. It can write any UTF-8."""
    texts = list(texts)
    # The instruction stands in every prompt: seen often enough, it becomes a few tokens.
    texts += [INSTRUCTION] * (len(texts) // 10 + 1)
    return Qwen2Tokenizer(eos_token=EOS, pad_token=PAD).train_new_from_iterator(
        texts, vocab_size, new_special_tokens=SPECIAL, show_progress=False)


def random_student(tokenizer, d_model, encoder_layers, lm_layers, heads, device="cpu") -> "ASR":
    """A student of any size, its weights drawn from torch's global generator.

    Encoder and LM have one width and one number of heads. Raises ValueError if these do not fit.
    """
    if d_model % (4 * heads):
        raise ValueError(f"d_model {d_model} must be a multiple of 4 x heads = {4 * heads}: "
                         "RoPE turns pairs in half of each head")
    lm_keys = {
        "hidden_size": d_model,
        "intermediate_size": 2 * d_model,
        "num_hidden_layers": lm_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 2048,
        "initializer_range": d_model ** -0.5 / 2,
    }
    whisper_keys = {
        "d_model": d_model,
        "encoder_layers": encoder_layers,
        "encoder_attention_heads": heads,
        "encoder_ffn_dim": 2 * d_model,
        "num_mel_bins": 128,
    }
    n_rows = 64 * (len(tokenizer) // 64 + 1)  # a padded tail, as published vocabularies have
    config = new_student_config(lm_keys, whisper_keys, tokenizer, n_rows)
    net = ArkasrForConditionalGeneration(config)
    # Log-mel has a standard deviation of 0.3. Brought to about 1 here, training leaves its first
    # plateau in fewer updates.
    net.audio_encoder.whisper.conv1.weight.data.mul_(4.0)
    return ASR(net, tokenizer, device)


# ----------------------------------------------------------------------- what both families share

class ASR:
    """A recogniser: what it takes to run a model without knowing its family. Here, a student."""

    # What comes before and after the audio.
    PROMPT = ("<|user|><|begin_of_audio|>", f"<|end_of_audio|>{INSTRUCTION}<|assistant|>")
    PAD_TOKEN = PAD
    AUDIO_TOKEN = AUDIO  # placeholder in the prompt, one per audio embedding
    TOKENS = SPECIAL     # of the prompt

    def __init__(self, net, tokenizer, device="cpu", files=None):
        """Joins a network and its tokenizer. files: see small_files.

        The network is in eval mode, in training too: a rollout and its scoring must be the same
        function, and no published config drops out. Raises ValueError naming the token that the
        tokenizer lacks, that has no embedding, or another id in config.json.
        """
        self.net = net.eval().to(device)
        self.body = net.get_decoder()  # the LM: embeddings -> hidden, both (B, columns, width)
        self.head = net.lm_head        # hidden rows (n, width) -> logits (n, V), see `logits`
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self.files = files or {}
        generation_config = json.loads(self.files.get("generation_config.json", b"{}"))
        stop_ids = set()
        for value in (net.config.eos_token_id, generation_config.get("eos_token_id")):
            stop_ids |= set(value) if isinstance(value, (list, tuple)) else {value} - {None}
        n_rows = net.config.get_text_config().vocab_size
        ids = tokenizer.get_vocab()
        for token in self.TOKENS:
            if ids.get(token, n_rows) >= n_rows:
                raise ValueError(f"the tokenizer has no {token!r} among the {n_rows} embeddings")
        self.eos_id = ids[EOS]
        self.pad_id = ids[self.PAD_TOKEN]
        self.audio_id = ids[self.AUDIO_TOKEN]
        if self.audio_id != net.config.audio_token_id:
            raise ValueError(f"the tokenizer is another model's: {self.AUDIO_TOKEN} is id "
                             f"{self.audio_id}, config.json: {net.config.audio_token_id}")
        before_audio, after_audio = self.PROMPT
        self.prefix_ids = tokenizer.encode(before_audio, add_special_tokens=False)
        self.suffix_ids = tokenizer.encode(after_audio, add_special_tokens=False)
        # (V,) each: True for ids that end a transcript, and for ids that none may contain.
        self.stop, self.blocked = stop_and_blocked(
            tokenizer, stop_ids | {self.eos_id}, n_rows, device)

    @property
    def n_mels(self):
        return self.net.config.whisper_config["num_mel_bins"]

    def embed_audio(self, batch: data.Batch) -> list[torch.Tensor]:
        """Of each clip its audio embeddings (A, width)."""
        encoder = self.net.audio_encoder
        n_frames = torch.as_tensor(batch.n_frames, device=self.device)
        if self in batch.heard:
            x = pad_sequence(batch.heard[self], batch_first=True)  # (B, T', d_model)
        else:
            x = encoder.whisper(self.mel_of(batch), n_frames)      # (B, T', d_model)
        audio, n_tokens = encoder.adapt(x, n_frames)
        return [row[:n] for row, n in zip(audio, n_tokens.tolist())]

    def mel_of(self, batch: data.Batch):
        """The batch's features (B, n_mels, T) with this model's number of bins."""
        mel = torch.from_numpy(batch.mel[self.n_mels])
        return mel.to(self.device, self.head.weight.dtype)

    def suffix_of(self, utterance: data.Utterance) -> list[int]:
        """The ids that follow the audio in the prompt: here the same for every clip."""
        return self.suffix_ids

    @cached_property
    def plain_tokenizer(self) -> Tokenizer:
        """The tokenizer without its added tokens: whatever a text looks like, it stays text."""
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        return Tokenizer.from_str(json.dumps(state | {"added_tokens": [], "post_processor": None}))

    def encode_text(self, text: str) -> list[int]:
        """The ids of a response, EOS included. No text can inject a special token."""
        return self.plain_tokenizer.encode(text, add_special_tokens=False).ids + [self.eos_id]

    def decode(self, ids, mask) -> list[str]:
        """The transcripts of ids and mask (B, R), without the tokens that ended them."""
        is_text = (mask & ~self.stop[ids]).cpu()
        return [self.tokenizer.decode(row[kept].tolist()) for row, kept in zip(ids.cpu(), is_text)]


def stop_and_blocked(tokenizer, stop_ids, n_rows, device):
    """Two (n_rows,) bool masks: ids that end a transcript, and ids that no transcript may contain.

    Blocked are the special tokens, added tokens spelled <...>, and the padded tail of the
    vocabulary, but not those that stop.
    """
    stop = torch.zeros(n_rows, dtype=torch.bool)
    blocked = torch.zeros(n_rows, dtype=torch.bool)
    blocked[len(tokenizer):] = True
    markup = [i for token, i in tokenizer.get_added_vocab().items() if re.fullmatch(r"<.*>", token)]
    # Ids past the table are ignored: transformers' defaults are too large for a small model.
    stop[[i for i in stop_ids if i < n_rows]] = True
    blocked[[i for i in markup + tokenizer.all_special_ids if i < n_rows]] = True
    return stop.to(device), (blocked & ~stop).to(device)


# -------------------------------------------------------------------------------------- Qwen3-ASR

# A language as a manifest may spell it, in lower case -> its name in the prompt.
LANGUAGE_NAMES = LANGUAGE_CODE_TO_NAME | {
    "cmn": "Chinese", "zho": "Chinese", "chi": "Chinese", "cn": "Chinese", "mandarin": "Chinese",
    "zh-yue": "Cantonese", "zh-hk": "Cantonese", "zh-mo": "Cantonese", "zh_hk": "Cantonese",
    "eng": "English", "jpn": "Japanese", "jp": "Japanese", "kor": "Korean", "tha": "Thai",
    "tl": "Filipino",
}
LANGUAGE_NAMES |= {name.lower(): name for name in LANGUAGE_CODE_TO_NAME.values()}


def language_name(utterance: data.Utterance) -> str:
    """Qwen3-ASR's name for the language of a manifest's line: en, en-US, eng, English -> English.

    Raises ValueError naming line and value where there is none, or one that it does not know.
    """
    spelled = (utterance.language or "").lower()
    name = LANGUAGE_NAMES.get(spelled) or LANGUAGE_NAMES.get(re.split("[-_]", spelled)[0])
    if name is None:
        known = ", ".join(map(" ".join, LANGUAGE_CODE_TO_NAME.items()))
        raise ValueError(f"{utterance.line}: language {utterance.language!r}: Qwen3-ASR has to be "
                         f"told one that it knows, in the manifest or by --language: {known}")
    return name


def check_languages(asr: ASR, manifest: data.Manifest) -> None:
    """Raises ValueError, before any work, if a Qwen3-ASR can't be told some line's language."""
    for utterance in manifest.languages.values():
        asr.suffix_of(utterance)


class Qwen3ASR(ASR):
    """A Qwen3-ASR checkpoint in transformers' classes. Its prompt names the audio's language."""

    PROMPT = ("<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|audio_start|>",
              "<|audio_end|><|im_end|>\n<|im_start|>assistant\n")
    PAD_TOKEN = EOS
    AUDIO_TOKEN = "<|audio_pad|>"
    TOKENS = ["<|im_start|>", EOS, "<|audio_start|>", AUDIO_TOKEN, "<|audio_end|>", "<asr_text>"]

    @property
    def n_mels(self):
        return self.net.config.audio_config.num_mel_bins

    def embed_audio(self, batch: data.Batch) -> list[torch.Tensor]:
        """As a student's. The audio tower takes whole seconds, with zeros after a clip's end."""
        chunk = 2 * self.net.config.audio_config.n_window          # 100 frames
        mel = self.mel_of(batch)                                   # (B, n_mels, T)
        mel = F.pad(mel, (0, -mel.shape[2] % chunk))               # T: whole seconds
        n_frames = torch.from_numpy(batch.n_frames)                # (B,)
        valid = torch.arange(mel.shape[2]) < n_frames[:, None]     # (B, T)
        packed = self.net.get_audio_features(mel, valid.long().to(self.device)).pooler_output
        n_audio = _get_feat_extract_output_lengths(n_frames, chunk // 2)
        return list(packed.split(n_audio.tolist()))

    def suffix_of(self, utterance: data.Utterance) -> list[int]:
        """The ids that follow the audio: they end in "language X<asr_text>"."""
        language = self.plain_tokenizer.encode(f"language {language_name(utterance)}").ids
        return self.suffix_ids + language + [self.tokenizer.convert_tokens_to_ids("<asr_text>")]


# The original repositories' names of weights, as regular expressions -> transformers' names.
QWEN3_ASR_KEYS = {
    r"^thinker\.model\.": "model.language_model.",
    r"^thinker\.lm_head\.": "lm_head.",
    r"^thinker\.audio_tower\.proj1\.": "model.multi_modal_projector.linear_1.",
    r"^thinker\.audio_tower\.proj2\.": "model.multi_modal_projector.linear_2.",
    r"^thinker\.audio_tower\.": "model.audio_tower.",
}


def qwen3_asr_config(config: dict) -> Qwen3ASRConfig:
    """A config.json in either layout -> transformers' config. The original has a thinker_config.

    Raises ValueError for one in neither: transformers would take its defaults, the 1.7B size.
    """
    if "audio_config" in config and "text_config" in config:
        left_out = ("model_type", "architectures", "transformers_version")
        return Qwen3ASRConfig(**{k: v for k, v in config.items() if k not in left_out})
    if "thinker_config" not in config:
        raise ValueError("a Qwen3-ASR has audio_config and text_config, or thinker_config; "
                         f"this one has {', '.join(config)}")
    thinker = config["thinker_config"]
    text = thinker["text_config"]
    rope = text.get("rope_parameters") or text
    # Its M-RoPE gives all three axes the same position, so it is the default RoPE.
    text = text | {"model_type": "qwen3", "rope_scaling": None,
                   "rope_parameters": {"rope_type": "default", "rope_theta": rope["rope_theta"]}}
    return Qwen3ASRConfig(
        audio_config=thinker["audio_config"] | {"model_type": "qwen3_asr_encoder"},
        text_config=text,
        audio_token_id=thinker["audio_token_id"],
        tie_word_embeddings=text.get("tie_word_embeddings", True),
    )


# ---------------------------------------------------------------- prompts, generation and scoring

@dataclass
class Prompt:
    """A batch of prompts with the audio in place, ready for the LM's body."""
    embeds: torch.Tensor             # (B, P, width)
    mask: torch.Tensor               # (B, P) False on the left padding
    audio: list[torch.Tensor]        # of each clip (A, width), the adapter's output


def encode_audio(asr: ASR, batch: data.Batch, micro_batch=None) -> Prompt:
    """Audio encoder and adapter, then prompts with the audio in place. Differentiable.

    micro_batch: clips that go through the encoder together: its memory. All by default.
    """
    audio = []
    size = micro_batch or len(batch)
    for i in range(0, len(batch), size):
        with autocast(asr.device):
            audio += asr.embed_audio(batch.rows(i, i + size))
    rows = []
    for utterance, of_clip in zip(batch.utterances, audio):
        rows.append(asr.prefix_ids + [asr.audio_id] * len(of_clip) + asr.suffix_of(utterance))
    ids, mask = data.pad_rows(rows, asr.pad_id, asr.device, side="left")        # (B, P)
    embeds = asr.body.embed_tokens(ids)                                         # (B, P, width)
    # Both sides run row by row, so the i-th placeholder of a row receives its i-th audio embedding.
    is_audio = (ids == asr.audio_id)[..., None]                                 # (B, P, 1)
    embeds = embeds.masked_scatter(is_audio, torch.cat(audio).to(embeds.dtype))
    return Prompt(embeds, mask, audio)


@torch.no_grad()
def hear(asr: ASR, batch: data.Batch, micro_batch) -> None:
    """Keeps the output of a student's frozen Whisper encoder in the batch: it runs once, not twice.

    encode_audio finds it there, for the batch and its rows.
    """
    rows = []
    for i in range(0, len(batch), micro_batch):
        part = batch.rows(i, i + micro_batch)
        n_frames = torch.as_tensor(part.n_frames, device=asr.device)
        with autocast(asr.device):
            rows += asr.net.audio_encoder.whisper(asr.mel_of(part), n_frames)
    batch.heard[asr] = rows  # of each clip (T', d_model)


def autocast(device):
    """bf16 arithmetic over fp32 weights on a GPU [dev 7] (not run on one); nothing on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def causal_mask(valid):
    """(B, K) valid columns -> (B, 1, K, K): a column sees the valid ones up to itself.

    Padding sees itself, so that no softmax runs over nothing (NaN).
    """
    k = valid.shape[1]
    lower = torch.ones(k, k, dtype=torch.bool, device=valid.device).tril()      # (K, K)
    itself = torch.eye(k, dtype=torch.bool, device=valid.device)                # (K, K)
    return ((valid[:, None] & lower) | itself)[:, None]


def positions_of(valid):
    """(B, K) valid columns -> (B, K) position of each column in its row, padding not counted.

    RoPE is relative, so this changes rounding alone, which then does not depend on the batch.
    """
    return (valid.cumsum(1) - 1).clamp(min=0)


def check_attention(body) -> None:
    """Raises ValueError unless every layer of the LM attends by a mask of bools.

    Eager attention would add it as 0 and 1, and layers with a sliding window want another one.
    """
    kinds = {body.config._attn_implementation, *(getattr(body.config, "layer_types", None) or [])}
    if not {"sdpa"} <= kinds <= {"sdpa", "full_attention"}:
        raise ValueError(f"attention {kinds}: expected 'sdpa', and 'full_attention' in all layers")


def logits(hidden, weight):
    """The LM head: hidden (n, width), weight (V, width) -> logits (n, V) in fp32.

    All logits come from here, so that rollout, student and teacher round alike. Autocast is off: it
    would round logits to bf16, which distorts the gradient of a KL. Before a loop, cast a bf16
    weight once: `.float()` of the 1.7B teacher's is 1.2 GB.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.float(), weight.float())


def response_hidden(body, embeds, prompt_mask, ids, mask) -> torch.Tensor:
    """Teacher forcing: the hidden rows that predict the n response tokens, packed -> (n, width).

    body: an LM without its head. embeds (B, P, width), prompt_mask (B, P): prompts, padded on the
    left. ids, mask (B, R): responses, padded on the right; masks are bool. The caller applies the
    head to these n rows alone: no logits are made for prompt or padding. Copies out with torch and
    check_attention, autocast, causal_mask and positions_of.
    """
    check_attention(body)
    # The last column predicts nothing that is scored, so it is not fed; see the drawing at the top.
    n_prompt = prompt_mask.shape[1]
    columns = torch.cat([embeds, body.embed_tokens(ids[:, :-1])], dim=1)        # (B, P+R-1, width)
    valid = torch.cat([prompt_mask, mask[:, :-1]], dim=1)                       # (B, P+R-1)
    with autocast(embeds.device):
        output = body(inputs_embeds=columns, position_ids=positions_of(valid), use_cache=False,
                      attention_mask=causal_mask(valid))
    return output.last_hidden_state[:, n_prompt - 1:][mask]                     # (n, width)


def draw_token(z, temperature, uniform):
    """One id per row from softmax(z / temperature) by inverse CDF -> (B,). temperature 0 is argmax.

    z (B, V): logits; uniform (B,) in [0, 1): one per row, from the caller, so that a draw does not
    depend on the rest of the batch.
    """
    if temperature == 0:
        return z.argmax(-1)
    cdf = (z / temperature).softmax(-1).cumsum(-1)                              # (B, V)
    # u is scaled by the CDF's last value, which fp32 leaves at 1 +- 2e-5, and kept below it, so
    # that the id found has p > 0. (On a GPU cumsum is a parallel scan and need not rise to the last
    # bit: there an id of p = 0 has a chance of about 1e-7.)
    last = cdf[:, -1]
    below = torch.nextafter(last, torch.zeros_like(last))
    point = torch.minimum(uniform * last, below)                                # (B,)
    token = torch.searchsorted(cdf, point[:, None], right=True)[:, 0]
    return token.clamp(max=z.shape[-1] - 1)  # NaN logits: the loss or the rate will say so


@torch.no_grad()
def generate(asr, embeds, prompt_mask, max_new_tokens, temperature=0.0, uniforms=None):
    """One response per row, greedy (temperature 0) or sampled -> ids (B, R), mask (B, R).

    asr: anything with .body, an LM, and .head, its last layer; .stop and .blocked (V,), ids that
    end a response and ids that none may contain; .pad_id. embeds (B, P, width), prompt_mask (B, P):
    prompts, padded on the left; masks are bool. uniforms (B, max_new_tokens) in [0, 1):
    data.keyed_uniforms' here, torch.rand's elsewhere. The returned mask is True on emitted tokens,
    the stop id included; a row without one was cut.

    Copies out with math, torch, F, check_attention, autocast, causal_mask, positions_of, logits,
    draw_token and transformers' DynamicCache. When a quarter of the rows are done the others go on
    alone. There is no collective, and the host asks the device how many rows are left at every
    token on a CPU, at every eighth on a GPU.
    """
    body = asr.body
    check_attention(body)
    if temperature > 0 and (uniforms is None or uniforms.shape != (len(embeds), max_new_tokens)):
        raise ValueError("sampling wants uniforms: (rows, max_new_tokens) in [0, 1)")
    device = embeds.device
    ask_every = 1 if device.type == "cpu" else 8
    if temperature > 0:
        uniforms = torch.as_tensor(uniforms, device=device)
    weight = asr.head.weight.float()  # once: `logits` would do it at every token
    ids = torch.full((len(embeds), max_new_tokens), asr.pad_id, device=device)      # (B, R)
    mask = torch.zeros_like(ids, dtype=torch.bool)                              # (B, R)
    rows = torch.arange(len(embeds), device=device)                             # (b,) still written
    unfinished = torch.ones_like(rows, dtype=torch.bool)                        # (b,)
    cache = DynamicCache(config=body.config)
    valid = prompt_mask                                                         # (b, P+t) columns
    attend = causal_mask(prompt_mask)                                           # (b, 1, P, P)
    positions = positions_of(prompt_mask)                                       # (b, P)
    # Autocast keeps its bf16 casts of weights to the end of this context: they are made once per
    # rollout. A bf16 copy of the LM would need as much memory, and round unlike scoring.
    with autocast(device):
        for t in range(max_new_tokens):
            output = body(inputs_embeds=embeds, position_ids=positions, past_key_values=cache,
                          attention_mask=attend, use_cache=True)
            z = logits(output.last_hidden_state[:, -1], weight)                 # (b, V)
            z = z.masked_fill(asr.blocked, -math.inf)
            uniform = None if temperature == 0 else uniforms[rows, t]           # (b,)
            token = draw_token(z, temperature, uniform)                         # (b,)
            token = torch.where(unfinished, token, asr.pad_id)
            ids[rows, t] = token
            mask[rows, t] = unfinished
            valid = torch.cat([valid, unfinished[:, None]], dim=1)              # (b, P+t+1)
            positions = positions[:, -1:] + 1                                   # (b, 1)
            unfinished = unfinished & ~asr.stop[token]
            if t % ask_every == ask_every - 1:
                n_left = int(unfinished.sum())
                if n_left == 0:
                    break
                if 4 * n_left <= 3 * len(rows):  # measured: faster than at a half of the rows
                    left = unfinished.nonzero()[:, 0]
                    cache.batch_select_indices(left)
                    rows, token, valid = rows[left], token[left], valid[left]
                    positions, unfinished = positions[left], unfinished[left]
            embeds = body.embed_tokens(token[:, None])                          # (b, 1, width)
            attend = valid[:, None, None]                                       # (b, 1, 1, P+t+1)
    n_columns = int(mask.any(0).sum())
    return ids[:, :n_columns], mask[:, :n_columns]


@torch.no_grad()
def transcribe(asr: ASR, batch: data.Batch, max_new_tokens, temperature=0.0, seed=0) -> list[dict]:
    """Transcripts, in the order of batch.utterances: [{"hyp", "stopped", "n_tokens"}].

    stopped: the transcript ended by itself, not at max_new_tokens. n_tokens: its end included.
    """
    if not batch.utterances:
        return []
    names = [u.id for u in batch.utterances]
    uniforms = data.keyed_uniforms(seed, 0, names, max_new_tokens) if temperature else None
    prompt = encode_audio(asr, batch)
    ids, mask = generate(asr, prompt.embeds, prompt.mask, max_new_tokens, temperature, uniforms)
    stopped = (asr.stop[ids] & mask).any(1).tolist()
    found = zip(asr.decode(ids, mask), stopped, mask.sum(1).tolist())
    return [{"hyp": text.strip(), "stopped": ended, "n_tokens": n} for text, ended, n in found]


# ------------------------------------------------------------------------------- two vocabularies

def vocabulary_map(student: ASR, teacher: ASR) -> torch.Tensor:
    """The teacher's id of each student id with an equal token string, -1 where it has none: (V,).

    Ids that end the student's transcripts map to ids that end the teacher's: to the same token, or
    else to its EOS. Ids blocked on either side are -1: no transcript has them. Raises ValueError if
    under a tenth of the ids that the student may write have a counterpart.
    """
    teacher_ids = teacher.tokenizer.get_vocab()
    usable_s = (~student.blocked).tolist()
    usable_t = (~teacher.blocked).tolist()
    to_teacher = torch.full((len(usable_s),), -1, dtype=torch.long)
    for token, i in student.tokenizer.get_vocab().items():
        j = teacher_ids.get(token, len(usable_t))
        if i < len(usable_s) and j < len(usable_t) and usable_s[i] and usable_t[j]:
            to_teacher[i] = j
    # A student's id that ends a transcript and does not end the teacher's means the teacher's EOS.
    ends_both = (to_teacher >= 0) & teacher.stop.cpu()[to_teacher.clamp(min=0)]
    to_teacher[student.stop.cpu() & ~ends_both] = teacher.eos_id
    shared = int((to_teacher >= 0).sum())
    if shared < 0.1 * sum(usable_s):
        raise ValueError(f"the teacher has {shared} of the student's {sum(usable_s)} tokens: their "
                         "tokenizers must be of one kind, such as Qwen's")
    return to_teacher.to(student.device)


def map_logits(z_t, to_teacher):
    """The teacher's logits (n, V_t) in the student's ids -> (n, V), -inf where it has none.

    Where k student ids mean one teacher id (two ids that end a transcript), each gets z_T - log k:
    together they have the probability that the teacher gives the one.
    """
    known = to_teacher >= 0                                                     # (V,)
    column = to_teacher.clamp(min=0)                                            # (V,)
    sharers = torch.zeros(z_t.shape[-1], device=z_t.device)                     # (V_t,)
    sharers = sharers.index_add(0, column, known.float())
    z_t = z_t.index_select(-1, column) - sharers[column].log()                  # (n, V)
    return z_t.masked_fill(~known, -math.inf)


# ---------------------------------------------------------------------------------- load and save

FAMILIES = {  # model_type: recogniser, network, keys of a config.json -> its config
    "arkasr": (ASR, ArkasrForConditionalGeneration, student_config),
    "qwen3_asr": (Qwen3ASR, Qwen3ASRForConditionalGeneration, qwen3_asr_config),
}


def load(name, device="cpu", frozen=False) -> ASR:
    """A checkpoint, by directory or Hub id: a student, or a Qwen3-ASR in either of its layouts.

    Weights are fp32, whatever the file holds [dev 7]; on a GPU, those of a Qwen3-ASR, and with
    `frozen` a student's, are bf16. Raises FileNotFoundError, and ValueError that names every
    weight, token or key that does not fit.
    """
    path = find_checkpoint(name)
    keys = data.read_json(path / "config.json")
    if keys.get("model_type") not in FAMILIES:
        raise ValueError(f"{path}/config.json: model_type {keys.get('model_type')!r} is not known; "
                         f"expected one of {', '.join(FAMILIES)}")
    family, net_class, make_config = FAMILIES[keys["model_type"]]
    is_trained = family is ASR and not frozen
    dtype = torch.bfloat16
    if is_trained or torch.device(device).type == "cpu":
        dtype = torch.float32
    key_mapping = QWEN3_ASR_KEYS if "thinker_config" in keys else None
    try:
        net = load_net(net_class, path, make_config(keys), dtype, key_mapping)
        return family(net, load_tokenizer(path), device, small_files(path))
    except Exception as error:  # transformers' do not always say where
        raise ValueError(f"{path}: no checkpoint that can be used (half a download, git-lfs "
                         f"pointers, files of another model?): {error}") from error


def load_student(name, device) -> ASR:
    """A checkpoint to train. Raises ValueError if it is not a student."""
    asr = load(name, device)
    if isinstance(asr, Qwen3ASR):
        raise ValueError(f"{name} is a Qwen3-ASR checkpoint: it can teach and be evaluated, "
                         "but only students (model_type 'arkasr') are trained")
    return asr


def load_teacher(name, device) -> ASR:
    """A checkpoint of either family that is not trained."""
    asr = load(name, device, frozen=True)
    asr.net.requires_grad_(False)
    return asr


def find_checkpoint(name) -> Path:
    """The local folder of a checkpoint: a directory, or a Hub id "owner/name", then downloaded.

    Code files (*.py) come along and are never run. Raises FileNotFoundError, and ValueError for a
    LoRA adapter.
    """
    path = Path(name)
    # "runs/x" where a folder runs exists is a misspelt path, not a Hub id.
    is_local = path.is_dir() or path.parent.is_dir()
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) and not is_local:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.py"]
        try:
            path = Path(huggingface_hub.snapshot_download(str(name), allow_patterns=patterns))
        except Exception as error:  # offline, unknown, gated: one line is enough
            raise FileNotFoundError(f"{name}: no such directory, and the Hub does not give it "
                                    f"({type(error).__name__}: {error})") from error
    if (path / "adapter_config.json").exists():
        raise ValueError(f"{name} is a LoRA adapter: join it with its base model (peft's "
                         "merge_and_unload), save that with the base's tokenizer, and give its "
                         "folder here")
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"{name}: no checkpoint directory: there is no config.json")
    return path


def load_net(net_class, path, config, dtype, key_mapping=None):
    """transformers' `from_pretrained`, on the CPU, where nothing may be missing or left over.

    It would fill what it does not find with random numbers. Raises ValueError that lists all that
    is missing, unexpected or of another shape.
    """
    net, report = net_class.from_pretrained(
        path, config=config, dtype=dtype, key_mapping=key_mapping, attn_implementation="sdpa",
        use_safetensors=True, output_loading_info=True,
        ignore_mismatched_sizes=True)  # not ignored, but reported with the rest below
    wrong = []
    for kind in ("missing", "unexpected", "mismatched"):
        wrong += [f"{kind} {key}" for key in sorted(map(str, report[f"{kind}_keys"]))]
    if wrong:
        raise ValueError(f"{path}: the weights do not fit config.json: {'; '.join(wrong)}")
    head, table = net.get_output_embeddings().weight, net.get_input_embeddings().weight
    if config.get_text_config().tie_word_embeddings and head is not table:
        raise ValueError(f"{path}/config.json ties lm_head.weight to the embeddings, "
                         "but the stored one is another matrix")
    return net


def load_tokenizer(name) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint: tokenizer.json, or Qwen's vocab.json and merges.txt.

    Raises ValueError if there is neither: transformers would make an empty one.
    """
    path = find_checkpoint(name)
    if (path / "tokenizer.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(path)
    if (path / "vocab.json").exists():
        return Qwen2Tokenizer.from_pretrained(path)
    raise ValueError(f"{path}: no tokenizer.json, and no vocab.json with merges.txt; copy those of "
                     "the model that this one was made from")


SMALL_FILES = """
generation_config.json preprocessor_config.json processor_config.json chat_template.jinja
special_tokens_map.json added_tokens.json vocab.json merges.txt
""".split()


def small_files(path) -> dict[str, bytes]:
    """The publisher's code, and the files that it wants beside the weights: {name: content}.

    `save` carries them along. They are bytes to us and never run; of generation_config.json,
    ASR reads the ids that end a transcript.
    """
    files = sorted(path.iterdir())
    return {file.name: file.read_bytes() for file in files
            if file.name in SMALL_FILES or file.suffix == ".py"}


def save(asr: ASR, path) -> None:
    """A checkpoint directory in the published layout. A tied head is not stored.

    All is written to a temporary folder inside it first. Then the files take their places one by
    one, weights last: a new directory is no checkpoint until it is whole, and in an existing one,
    within a run, only the weights change.
    """
    path = Path(path)
    temporary = path / ".tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights = {name: tensor.cpu() for name, tensor in asr.net.state_dict().items()}
    if asr.net.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    asr.net.save_pretrained(temporary, state_dict=weights)
    asr.tokenizer.save_pretrained(temporary)
    stop_ids = asr.stop.nonzero()[:, 0].tolist()
    generation_config = {"eos_token_id": stop_ids, "pad_token_id": asr.pad_id}
    data.write_json(temporary / "generation_config.json", generation_config)
    for name, content in asr.files.items():
        (temporary / name).write_bytes(content)
    for file in temporary.glob("*.safetensors"):  # made readable to their owner alone
        shutil.copymode(temporary / "config.json", file)
    for file in sorted(temporary.iterdir(), key=lambda file: file.suffix == ".safetensors"):
        os.replace(file, path / file.name)
    temporary.rmdir()


# -------------------------------------------------------------- a run: processes, update and save

def setup(args):
    """Joins the processes that torchrun started, if any -> rank, world, device."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available()):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        # cuDNN would plan attention anew for every shape, that is, for every decoded token.
        torch.backends.cuda.enable_cudnn_sdp(False)
        # Partial sums stay in fp32: rounded to bf16, a sum over the vocabulary loses small terms.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if world > 1:  # hours: the others wait while rank 0 saves, and NCCL's own limit is ten minutes
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=timedelta(hours=12))
    return rank, world, device


def finish() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.barrier()  # without it, gloo on a CPU may abort in the line below
        dist.destroy_process_group()


def all_sum(values: dict, device) -> dict[str, float]:
    """Numbers summed over all ranks, in one collective. Every rank has the same keys."""
    numbers = [torch.as_tensor(v, dtype=torch.float64, device=device) for v in values.values()]
    total = torch.stack(numbers)
    if dist.is_initialized():
        dist.all_reduce(total)
    return dict(zip(values, total.tolist()))


def trainable(asr: ASR, freeze=None, recompute=False) -> dict[str, nn.Parameter]:
    """The parameters to train, by name. freeze "encoder": adapter and LM alone.

    recompute: only the inputs of encoder blocks and LM layers are kept, backward runs each of them
    again (Chen et al. 2016, arXiv 1604.06174): about a third more arithmetic. transformers' own
    switch looks at net.training, which is False here, and would do nothing.
    """
    def keep_inputs(forward, *args, **kwargs):
        if not torch.is_grad_enabled():  # rollouts keep nothing anyway
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    if freeze == "encoder":
        asr.net.audio_encoder.whisper.requires_grad_(False)
    if recompute:
        for layer in [*asr.net.audio_encoder.whisper.layers, *asr.body.layers]:
            layer.forward = partial(keep_inputs, layer.forward)
    return {name: p for name, p in asr.net.named_parameters() if p.requires_grad}


def learning_rate(step, args) -> float:
    """Linear warm-up over --warmup steps, then a cosine down to zero at --steps."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * 0.5 * (1 + math.cos(math.pi * progress))


def sum_gradients(parameters) -> None:
    """The gradient of every rank's share -> that of the whole step, on every rank.

    Each loss was divided by the N of the whole step, so a sum is all that is left to do. This takes
    DistributedDataParallel's place: that averages over ranks, so that a token's weight depends on
    where it landed, and it needs the same number of backwards on every rank.
    """
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)  # a rank without a token adds nothing, and takes part
    if dist.is_initialized():
        gradients = [p.grad for p in parameters]
        for i in range(0, len(gradients), 64):  # flat: a collective per tensor takes longer
            bucket = gradients[i:i + 64]
            flat = nn.utils.parameters_to_vector(bucket)
            dist.all_reduce(flat)
            nn.utils.vector_to_parameters(flat, bucket)


def find_save(args) -> Path | None:
    """OUT/state/step-N to go on from; None if there is none, or no --resume.

    Raises FileExistsError if --out holds a checkpoint, or an earlier run without --resume.
    """
    out = Path(args.out)
    is_run = (out / "metrics.jsonl").exists() or (out / "state").exists()
    if is_run and not args.resume:
        raise FileExistsError(f"{out} holds an earlier run: continue it with --resume, "
                              "or choose another --out")
    if (out / "config.json").exists() and not is_run:
        raise FileExistsError(f"{out} holds a checkpoint, which would be written over: "
                              "choose another --out")
    found = max(out.glob("state/step-*"), default=None)
    if dist.is_initialized():
        dist.barrier()  # a collective: all have looked before rank 0 writes
    return found


@dataclass
class Run:
    """What a training run keeps between its steps: sums for the log, the best dev error, its save.

    Its numbers are the same on every rank; rank 0 writes. OUT/state/step-N is a checkpoint with
    training.safetensors (AdamW's moments by the parameter's name) and training.json beside it.
    There is no position in the data and no state of a random generator to keep: every draw and
    every batch is a function of (seed, step).
    """
    args: object                       # the flags
    asr: ASR                           # the student
    trained: dict[str, nn.Parameter]   # see `trainable`
    optimizer: torch.optim.Optimizer
    resumed: Path | None               # the save that it goes on from, see `find_save`
    rank: int
    world: int

    def __post_init__(self):
        self.out = Path(self.args.out)
        self.dev = {}                          # name: manifest of --dev
        for path in self.args.dev or []:
            name = Path(path).stem if Path(path).stem not in self.dev else str(path)
            self.dev[name] = data.read_manifest(path, ("text",), self.args.language)
            for u in self.dev[name][self.rank::self.world]:  # a bad clip would end the run later
                data.load_audio(u, for_training=False)
        self.metrics = self.out / "metrics.jsonl"
        kept = self.restore() if self.resumed else {}
        self.start = kept.get("step", 0)       # updates made before this process began
        self.best = kept.get("best")           # lowest dev error, %; None while unknown
        self.tokens = kept.get("tokens", 0)    # trained on so far
        self.sums = Counter(kept.get("sums"))  # since the last record
        self.rejected = Counter()              # reason: clips of this rank
        self.stopping = False                  # some rank has a signal
        self.signals = []
        signal.signal(signal.SIGTERM, lambda *_: self.signals.append("SIGTERM"))
        if self.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            with self.metrics.open("ab") as file:  # what was logged after that save comes again
                file.truncate(min(file.tell(), kept.get("metrics_bytes", 0)))
            for name, before in kept.get("flags", {}).items():
                now = vars(self.args).get(name)
                if now != before and name != "resume":
                    print(f"resumed with another --{name} than before: {before} -> {now}")
        self.bar = data.progress(self.args.steps, self.out.name, "step", self.rank, self.start)
        if kept.get("evaluation_due"):
            self.evaluate(self.start)

    def end_step(self, step, batch: data.Batch, totals: dict, grad_norm, lr, seconds) -> bool:
        """After `step` updates: log, save and evaluation, where they are due -> True to stop here.

        totals: what the step counted over all ranks; of "loss" and "ctc", sums over its tokens.
        The evaluation is a collective, the ranks share the clips of --dev. It comes after the save,
        which thus is there at once when a scheduler sends SIGTERM; a resumed run makes up for it.
        """
        for reason, message in batch.rejected:
            if reason not in self.rejected:
                self.bar.write(f"left out: {message}")
            self.rejected[reason] += 1
        self.stopping = totals.pop("signals") > 0
        self.tokens += totals["tokens"]
        self.sums.update(totals | {"seconds": seconds})
        self.bar.update()

        def is_due(every):
            return step == self.args.steps or step % every == 0

        if is_due(self.args.log_every):
            record = {"step": step}
            for name in ("loss", "ctc"):
                if name in self.sums:
                    record[name] = self.sums.pop(name) / max(1, self.sums["tokens"])
            record |= {"grad_norm": grad_norm, "lr": lr}
            record["audio_per_sec"] = self.sums["audio_sec"] / self.sums.pop("seconds")
            self.log(record | self.sums)
            self.sums.clear()
        evaluation_due = bool(self.dev) and is_due(self.args.eval_every)
        if self.rank == 0 and (self.stopping or is_due(self.args.save_every)):
            self.save_run(step, evaluation_due)
        if evaluation_due and not self.stopping:
            self.evaluate(step)
        return self.stopping

    def log(self, record: dict) -> None:
        """Appends a record to metrics.jsonl and prints it, on rank 0."""
        if self.rank == 0:
            with self.metrics.open("a") as file:
                file.write(json.dumps(record) + "\n")
            self.bar.write("  ".join(f"{key} {value:.6g}" for key, value in record.items()))

    def evaluate(self, step) -> None:
        """Errors on the dev sets; --out keeps the weights with the best mean."""
        errors = {}
        for name, manifest in self.dev.items():
            errors[f"dev_error/{name}"] = dev_error(
                self.asr, manifest, self.args, self.rank, self.world)
        mean = sum(errors.values()) / len(errors)
        self.log({"step": step, "dev_error": mean} | (errors if len(errors) > 1 else {}))
        if self.tokens and (self.best is None or mean < self.best):
            self.best = mean
            if self.rank == 0:
                save(self.asr, self.out)

    def save_run(self, step, evaluation_due) -> None:
        """Writes OUT/state/step-N; older ones then go."""
        tensors = {}
        stored = self.asr.net.state_dict()
        for name, p in self.trained.items():
            for key, value in self.optimizer.state[p].items():  # step, exp_avg, exp_avg_sq
                tensors[f"{name}.{key}"] = value.detach().cpu()
            if name not in stored:  # trained beside the student, thrown away at the end
                tensors[f"{name}.value"] = p.detach().cpu()
        part = self.out / "state" / "part"
        shutil.rmtree(part, ignore_errors=True)
        save(self.asr, part)
        save_file(tensors, part / "training.safetensors")
        data.write_json(part / "training.json", {
            "step": step, "best": self.best, "tokens": self.tokens, "sums": self.sums,
            "metrics_bytes": self.metrics.stat().st_size, "flags": vars(self.args),
            "evaluation_due": evaluation_due})
        target = self.out / "state" / f"step-{step:07d}"
        shutil.rmtree(target, ignore_errors=True)
        os.rename(part, target)
        for old in target.parent.glob("step-*"):
            if old != target:
                shutil.rmtree(old)

    @torch.no_grad()
    def restore(self) -> dict:
        """AdamW's moments, and what is trained beside the student -> what training.json holds."""
        tensors = load_file(self.resumed / "training.safetensors")
        names = {name.removesuffix(".exp_avg") for name in tensors if name.endswith(".exp_avg")}
        if names and names != self.trained.keys():
            raise ValueError(f"{self.resumed}: moments of {len(names)} weights, but "
                             f"{len(self.trained)} are trained: another --freeze or --ctc?")
        for name, p in self.trained.items():
            if f"{name}.value" in tensors:
                p.copy_(tensors[f"{name}.value"])
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"{name}.{key}" in tensors:
                    self.optimizer.state[p][key] = tensors[f"{name}.{key}"].to(p.device)
        return data.read_json(self.resumed / "training.json")

    def close(self) -> None:
        """The last weights where there is no dev set, metrics.png, and what was left out and why.

        Raises ValueError if no clip could be used. Exits 143 after SIGTERM, as a shell reports it:
        a scheduler can tell it from success.
        """
        self.bar.close()
        for reason, n in self.rejected.items():
            print(f"rank {self.rank}: {n} clips left out: {reason}")
        if not self.tokens:
            finish()
            raise ValueError(f"{self.args.data}: nothing could be trained on, see above")
        if self.rank == 0:
            if not self.dev:
                save(self.asr, self.out)
            draw_metrics(self.metrics, self.out / "metrics.png")
        finish()
        if self.stopping:
            raise SystemExit(143)


def dev_error(asr, manifest, args, rank=0, world=1) -> float:
    """Greedy errors, % of the references' units, languages pooled. The ranks share the clips."""
    sums = {"errors": 0, "units": 0}
    for first in range(rank * args.eval_batch, len(manifest), world * args.eval_batch):
        clips = manifest[first:first + args.eval_batch]
        batch = data.load_batch(clips, (asr.n_mels,), for_training=False, keep_going=False)
        for u, result in zip(batch.utterances, transcribe(asr, batch, args.max_new_tokens)):
            counts = data.edit_counts(u.text, result["hyp"], u.language)
            sums["errors"] += counts.errors
            sums["units"] += counts.units
    sums = all_sum(sums, asr.device)
    return 100 * sums["errors"] / max(1, sums["units"])


def draw_metrics(metrics, path) -> None:
    """metrics.jsonl -> a picture: a panel over steps for each of these columns that it has."""
    from matplotlib.figure import Figure
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    logged = set().union(*records)
    names = [name for name in "loss ctc dev_error truncated empty".split() if name in logged]
    figure = Figure(figsize=(3.6 * len(names), 3), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        known = [record for record in records if name in record]
        axis.plot([r["step"] for r in known], [r[name] for r in known], ".-")
        axis.set(title=name, xlabel="step", ylim=(0, None))
    figure.savefig(path, dpi=110)
