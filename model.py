"""What a checkpoint *is*: the student (encoder, adapter, LM), its prompt, generation, scoring, saving and loading.

    waveform -> log-mel (128, 100 Hz) -> two convolutions (50 Hz) -> pre-LN encoder blocks with partial RoPE -> LayerNorm
             -> 4 neighbouring frames side by side (12.5 Hz) -> MLP adapter -> embeddings in the prompt of a Qwen2 causal LM

    prompt     <|user|><|begin_of_audio|><|audio|> x A<|end_of_audio|>Please transcribe this audio.<|assistant|>
    response   transcript<|im_end|>

The other family, Qwen3-ASR, is transformers' own; it is a teacher here, never trained:

    prompt     <|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|audio_start|><|audio_pad|> x A<|audio_end|><|im_end|>\n
               <|im_start|>assistant\nlanguage English<asr_text>
    response   transcript<|im_end|>

Shapes: B utterances, T mel frames, A audio tokens, P prompt columns, R response columns, N response tokens packed over the batch,
D width of the LM, V its vocabulary. Prompts are padded on the left, responses on the right, so that in every row

    column      0 ... P-1      P      P+1   ...   P+R-1
    input_ids   prompt         y_0    y_1   ...   y_{R-1} (= EOS)
    hidden[c] predicts column c+1: rows P-1 ... P+R-2 predict y_0 ... y_{R-1}

Weights have the names of the published ARK-ASR checkpoints and are read from safetensors only; no code of a checkpoint is ever run.

Differs from the published model (numbers go on from distill.py):
  [dev 6] Padding is masked after each convolution, in attention and in the merge, so that a row's output does not depend on its
          neighbours. On a clip alone the two are the same function.
"""

import json
import math
import os
import re
import shutil
import signal
import sys
from collections import Counter
from datetime import timedelta
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import huggingface_hub
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, Qwen3ASRConfig,
                          Qwen3ASRForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM, DynamicCache)
from tqdm import tqdm
from transformers.models.qwen3_asr.processing_qwen3_asr import LANGUAGE_CODE_TO_NAME

import data

INSTRUCTION = "Please transcribe this audio."
EOS, PAD, AUDIO = "<|im_end|>", "<|endoftext|>", "<|audio|>"
SPECIAL = [PAD, EOS, AUDIO, "<|user|>", "<|begin_of_audio|>", "<|end_of_audio|>", "<|assistant|>"]


# ---------------------------------------------------------------------------- audio encoder and adapter

def rope_angles(n_positions, head_dim, device, theta=10_000.0):
    """cos, sin, each (T, head_dim / 4), fp32. Half of each head is rotated: pair i of position t by the angle t theta^(-2i / rd)."""
    rotary_dim = head_dim // 2
    inverse = theta ** (-torch.arange(0, rotary_dim, 2, device=device, dtype=torch.float32) / rotary_dim)
    angles = torch.arange(n_positions, device=device, dtype=torch.float32)[:, None] * inverse  # (T, rd / 2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotate adjacent pairs (2i, 2i+1) of the first half of each head, pass the rest: (B, heads, T, head_dim) -> same.

    The published layout is interleaved; transformers' glmasr pairs i with i + rd/2 instead and permutes the weights' rows.
    """
    n = 2 * cos.shape[-1]
    even, odd, rest = x[..., 0:n:2], x[..., 1:n:2], x[..., n:]  # (B, heads, T, n / 2) twice, (B, heads, T, head_dim - n)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return torch.cat([turned, rest], dim=-1)


class SelfAttention(nn.Module):
    def __init__(self, d_model, heads):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)  # as in Whisper: a bias on keys cancels in the softmax
        self.v_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x, rope, mask):
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)             # (B, heads, T, head_dim)
        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        x = F.scaled_dot_product_attention(rotate(q, *rope), rotate(k, *rope), v, attn_mask=mask)
        return self.out_proj(x.transpose(1, 2).flatten(2))                               # (B, T, d_model)


class EncoderLayer(nn.Module):
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
    """Whisper's encoder with RoPE in place of its position table: (B, n_mels, T) -> (B, (T + 1) // 2, d_model)."""
    def __init__(self, n_mels, d_model, layers, heads, ffn):
        super().__init__()
        self.conv1 = nn.Conv1d(n_mels, d_model, 3, padding=1)
        self.conv2 = nn.Conv1d(d_model, d_model, 3, stride=2, padding=1)
        self.layers = nn.ModuleList(EncoderLayer(d_model, heads, ffn) for _ in range(layers))

    def forward(self, mel, n_frames):
        """-> x (B, T', d_model), valid (B, T') True on a row's own frames."""
        own = torch.arange(mel.shape[-1], device=mel.device) < n_frames[:, None]         # (B, T)
        x = F.gelu(self.conv1(mel)) * own[:, None]                                       # (B, d_model, T) [dev 6]
        x = F.gelu(self.conv2(x)).transpose(1, 2)                                        # (B, T', d_model)
        own = torch.arange(x.shape[1], device=mel.device) < (n_frames[:, None] + 1) // 2  # (B, T')
        rope = rope_angles(x.shape[1], x.shape[-1] // self.layers[0].self_attn.heads, x.device)
        for layer in self.layers:
            x = layer(x, rope, own[:, None, None])                                       # keys of padding are masked [dev 6]
        return x, own


class AudioEncoder(nn.Module):
    """Encoder + adapter: log-mel (B, n_mels, T) -> audio embeddings (B, A, D) and how many are a row's own (B,)."""
    def __init__(self, n_mels, d_model, layers, heads, ffn, lm_width, merge=4, act=nn.GELU):
        super().__init__()
        self.merge = merge
        self.whisper = WhisperEncoder(n_mels, d_model, layers, heads, ffn)
        self.layer_norm = nn.LayerNorm(d_model)  # takes the place of the encoder's own last LayerNorm
        self.adapting = nn.Sequential(nn.Linear(d_model * merge, 2 * lm_width), act(), nn.Linear(2 * lm_width, lm_width))

    def n_tokens(self, n_frames):
        """Audio tokens of a clip: 100 frames/s -> 50 -> 12.5 tokens/s; what is left over is dropped; at least one."""
        return ((n_frames + 1) // 2 // self.merge).clamp(min=1)

    def forward(self, mel, n_frames):
        x, own = self.whisper(mel, n_frames)
        x = self.layer_norm(x) * own[..., None]                                          # (B, T', d_model) [dev 6]
        n_tokens = self.n_tokens(n_frames)                                               # (B,)
        missing = int(n_tokens.max()) * self.merge - x.shape[1]                          # > 0 only for clips under 70 ms
        x = F.pad(x, (0, 0, 0, missing))                                                 # (B, A merge, d_model); negative: cut
        return self.adapting(x.unflatten(1, (-1, self.merge)).flatten(2)), n_tokens      # (B, A, D)


ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "selu": nn.SELU}
LANGUAGE_MODELS = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


class Student(nn.Module):
    """Audio encoder and causal LM, built from a published-style config.json (a dict). `head` is tied to the embeddings.

    One key more than the published ones: lm_type "qwen3" for an LM with norms on queries and keys (absent: qwen2).
    """
    def __init__(self, config: dict):
        super().__init__()
        self.config = config = {"tie_word_embeddings": True} | config
        audio, act, lm_type = config["whisper_config"], config.get("mlp_adapter_act", "gelu"), config.get("lm_type", "qwen2")
        if config.get("adapter_type", "mlp") != "mlp" or not config.get("use_rope", True):
            raise ValueError("only the published encoder is written out here: use_rope=true, adapter_type='mlp'")
        for key, value, known in (("mlp_adapter_act", act, ACTIVATIONS), ("lm_type", lm_type, LANGUAGE_MODELS)):
            if value not in known:
                raise ValueError(f"{key} {value!r}: expected one of {', '.join(known)}")
        ours = {"whisper_config", "merge_factor", "use_rope", "adapter_type", "mlp_adapter_act", "audio_token_id", "spec_aug",
                "max_whisper_length", "architectures", "auto_map", "model_type", "rope_theta", "dtype", "torch_dtype", "lm_type"}
        # Private keys stay out: _attn_implementation could name code on the Hub, which transformers would fetch and run.
        lm_config = {k: v for k, v in config.items() if k not in ours and k != "attn_implementation" and not k.startswith("_")}
        if lm_config.pop("rope_scaling", None):
            raise ValueError(f"rope_scaling {config['rope_scaling']} in config.json: not written out here")
        lm_config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.get("rope_theta", 1e6)} | (lm_config.get("rope_parameters") or {})
        make_config, make_lm = LANGUAGE_MODELS[lm_type]
        self.lm = make_lm(make_config(**lm_config, attn_implementation="sdpa"))
        if set(self.lm.config.layer_types) != {"full_attention"}:
            raise ValueError("the LM of config.json has sliding-window layers: not written out here")
        self.audio_encoder = AudioEncoder(audio["num_mel_bins"], audio["d_model"], audio["encoder_layers"],
                                          audio["encoder_attention_heads"], audio["encoder_ffn_dim"],
                                          config["hidden_size"], config.get("merge_factor", 4), ACTIVATIONS[act])


# ---------------------------------------------------------------------------- a model with its tokenizer

@dataclass
class ASR:
    """A recogniser: what every script needs to run a model without knowing its family. This one is a student."""
    net: nn.Module
    tokenizer: PreTrainedTokenizerFast
    prefix_ids: list[int]     # prompt before the audio
    suffix_ids: list[int]     # prompt after the audio
    eos_id: int
    pad_id: int
    audio_id: int
    stop: torch.Tensor        # (V,) True for ids that end a transcript: EOS, and what else the checkpoint ends at
    blocked: torch.Tensor     # (V,) True for ids that no transcript may contain: special tokens, padded tail of the vocabulary
    companions: dict[str, str] = field(default_factory=dict)  # further text files of the checkpoint, for its publisher's own code

    @property
    def device(self):
        return self.blocked.device

    @property
    def n_mels(self):
        return self.net.config["whisper_config"]["num_mel_bins"]

    @property
    def body(self):           # inputs_embeds -> last hidden state (B, columns, D)
        return self.net.lm.model

    @property
    def head(self):           # hidden (N, D) -> logits (N, V)
        return self.net.lm.lm_head

    def logits(self, hidden):
        """Hidden rows (N, D) -> logits (N, V), fp32."""
        return logits(hidden, self.head.weight)

    def hear(self, batch: data.Batch):
        """-> audio embeddings (B, A, D), how many are a row's own (B,)."""
        return self.net.audio_encoder(batch.mel.to(self.device, self.head.weight.dtype), batch.n_frames.to(self.device))

    def suffixes(self, batch: data.Batch, audio, n_audio) -> list[list[int]]:
        """What follows the audio in each row's prompt."""
        return [self.suffix_ids] * len(batch.utterances)

    def prompt_ids(self, n_audio, suffix) -> list[int]:
        """One row's prompt, a placeholder for each of its n_audio audio embeddings."""
        return [*self.prefix_ids, *[self.audio_id] * n_audio, *suffix]

    @cached_property
    def plain(self) -> Tokenizer:
        """The tokenizer without its added tokens: whatever a text looks like, it stays text."""
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        return Tokenizer.from_str(json.dumps(state | {"added_tokens": [], "post_processor": None}))

    def encode_text(self, text: str) -> list[int]:
        """Transcript -> ids of the response, EOS included. No text can inject a special token."""
        return self.plain.encode(text, add_special_tokens=False).ids + [self.eos_id]

    def decode(self, ids, mask) -> list[str]:
        """Response ids and mask (B, R) -> transcripts, without what ended them."""
        keep = mask & ~self.stop[ids]
        return [self.tokenizer.decode([i for i, k in zip(row, own) if k]) for row, own in zip(ids.tolist(), keep.tolist())]


@dataclass
class Qwen3ASR(ASR):
    """A Qwen3-ASR checkpoint in transformers' native classes. Its prompt names the language of the audio."""
    languages: dict = field(default_factory=dict)  # clip -> ids of "language X<asr_text>" that the model itself wrote

    @property
    def n_mels(self):
        return self.net.config.audio_config.num_mel_bins

    @property
    def body(self):
        return self.net.model.language_model

    @property
    def head(self):
        return self.net.lm_head

    def hear(self, batch):
        """The audio tower takes whole seconds of 100 frames, zeros behind a clip's own; clips below half a second are padded before."""
        chunk = 2 * self.net.config.audio_config.n_window
        n_frames = torch.tensor([batch.padded[i].shape[1] if i in batch.padded else n for i, n in enumerate(batch.n_frames.tolist())])
        mel = batch.mel.new_zeros(len(n_frames), self.n_mels, -(-int(n_frames.max()) // chunk) * chunk)         # (B, n_mels, T)
        mel[:, :, :batch.mel.shape[2]] = batch.mel
        for i, features in batch.padded.items():
            mel[i, :, :features.shape[1]] = features
        own = torch.arange(mel.shape[2]) < n_frames[:, None]                                                     # (B, T)
        packed = self.net.get_audio_features(mel.to(self.device, self.head.weight.dtype), own.long().to(self.device)).pooler_output
        r = n_frames % chunk  # a whole second gives 13 tokens, the rest goes through three convolutions of stride 2
        n_audio = n_frames // chunk * 13 + ((((r + 1) // 2) + 1) // 2 + 1) // 2
        return nn.utils.rnn.pad_sequence(packed.split(n_audio.tolist()), batch_first=True), n_audio.to(self.device)

    def suffixes(self, batch, audio, n_audio):
        """The manifest's language, else the one the model itself hears in the clip (asked once a clip). Never the student's text."""
        key = lambda u: (u.audio, u.start_sec, u.duration_sec)
        unknown = [i for i, u in enumerate(batch.utterances) if not u.language and key(u) not in self.languages]
        if unknown:
            tag = self.tokenizer.convert_tokens_to_ids("<asr_text>")
            only_tag = torch.arange(len(self.stop), device=self.device) == tag
            listener = replace(self, stop=only_tag, blocked=(self.blocked | self.stop) & ~only_tag)
            prompt = insert_audio(self, [self.prompt_ids(n, self.suffix_ids) for n in n_audio[unknown].tolist()], audio[unknown], n_audio[unknown])
            ids, mask = roll_out(listener, prompt, max_new_tokens=12)
            for i, row, own in zip(unknown, ids.tolist(), mask.tolist()):
                written = [t for t, m in zip(row, own) if m]
                if written[-1] != tag:
                    raise ValueError(f"{batch.utterances[i].line}: the teacher wrote {self.tokenizer.decode(written)!r} where it should name "
                                     f"the language of {batch.utterances[i].audio}; give it in the manifest's field `language`")
                self.languages[key(batch.utterances[i])] = written
        return [self.suffix_ids + (self.language_ids(u) if u.language else self.languages[key(u)]) for u in batch.utterances]

    def language_ids(self, utterance: data.Utterance) -> list[int]:
        """Ids of "language X<asr_text>" for the manifest's code or name. Raises ValueError for a language the model doesn't know."""
        spelled, code = utterance.language.lower(), re.split("[-_]", utterance.language.lower())[0]
        aliases = dict.fromkeys(("cmn", "zho", "chi", "cn", "mandarin"), "Chinese") | dict.fromkeys(("jpn", "jp"), "Japanese") | {
            "eng": "English", "kor": "Korean", "tha": "Thai", "tl": "Filipino"}
        names = LANGUAGE_CODE_TO_NAME | aliases | {name.lower(): name for name in LANGUAGE_CODE_TO_NAME.values()}
        name = names.get(spelled) or names.get(code)
        if name is None:
            raise ValueError(f"{utterance.line}: language {utterance.language!r} is not one of Qwen3-ASR's: "
                             f"{', '.join(f'{c} {n}' for c, n in LANGUAGE_CODE_TO_NAME.items())}")
        return self.plain.encode(f"language {name}").ids + [self.tokenizer.convert_tokens_to_ids("<asr_text>")]


def special_ids(tokenizer, tokens, n_rows) -> dict[str, int]:
    """Ids of the prompt's special tokens. Raises ValueError naming the one that the tokenizer lacks or the embeddings don't reach."""
    vocabulary = tokenizer.get_vocab()
    ids = {token: vocabulary.get(token) for token in tokens}
    for token, i in ids.items():
        if i is None or i >= n_rows:
            raise ValueError(f"the tokenizer has no usable {token!r} (id {i}, {n_rows} embeddings)")
    return ids


def stop_and_blocked(tokenizer, stop_ids, n_rows, device):
    """-> stop, blocked, each (V,) bool: ids that end a transcript; ids that can't stand in one.

    Blocked are the special tokens, every added token spelled <...> and what lies past the tokenizer, but for those that stop.
    """
    stop, blocked = torch.zeros(2, n_rows, dtype=torch.bool)
    stop[[i for i in stop_ids if i < n_rows]] = True  # Qwen3-ASR's original config has none: transformers' defaults are the real vocabulary's
    blocked[len(tokenizer):] = True
    added = [i for token, i in tokenizer.get_added_vocab().items() if re.fullmatch(r"<.*>", token)]
    blocked[[i for i in {*added, *tokenizer.all_special_ids} if i < n_rows]] = True
    return stop.to(device), (blocked & ~stop).to(device)


def as_set(ids) -> set[int]:
    """eos_token_id of a config, None, a number or a list -> set."""
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def assemble(net: Student, tokenizer, device, companions=None) -> ASR:
    """Join network and tokenizer; check that every token of the prompt is what the config says. Raises ValueError naming the token.

    The network is in eval mode, in training too: a rollout and its scoring must be the same function, and no published config drops out.
    """
    n_rows = net.config["vocab_size"]
    ids = special_ids(tokenizer, SPECIAL, n_rows)
    stop_ids = as_set(net.config.get("eos_token_id")) | as_set(json.loads((companions or {}).get("generation_config.json", "{}")).get("eos_token_id"))
    for token, key, said in ((AUDIO, "audio_token_id", as_set(net.config.get("audio_token_id"))), (EOS, "eos_token_id", stop_ids),
                             (PAD, "pad_token_id", as_set(net.config.get("pad_token_id")))):
        if ids[token] not in said:
            raise ValueError(f"config.json says {key} = {net.config.get(key)}, but the tokenizer has {token!r} at {ids[token]}")
    stop, blocked = stop_and_blocked(tokenizer, stop_ids, n_rows, device)
    instruction = tokenizer.encode(INSTRUCTION, add_special_tokens=False)
    return ASR(net.eval().to(device), tokenizer, prefix_ids=[ids["<|user|>"], ids["<|begin_of_audio|>"]],
               suffix_ids=[ids["<|end_of_audio|>"], *instruction, ids["<|assistant|>"]], eos_id=ids[EOS], pad_id=ids[PAD],
               audio_id=ids[AUDIO], stop=stop, blocked=blocked, companions=companions or {})


def train_tokenizer(texts, vocab_size) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen's pre-tokenisation, trained on `texts`: any UTF-8 can be written, nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    texts = list(texts)
    # The instruction stands in every prompt: seen often enough, it becomes a few tokens.
    tokenizer.train_from_iterator(texts + [INSTRUCTION] * (len(texts) // 10 + 1), trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False)


def random_student(tokenizer, d_model, encoder_layers, lm_layers, heads, device="cpu") -> ASR:
    """A fresh student of any size: one width for encoder and LM. Initialised from torch's global generator."""
    vocabulary = tokenizer.get_vocab()
    if d_model % (4 * heads):
        raise ValueError(f"d_model {d_model} must be a multiple of 4 x heads = {4 * heads}: RoPE turns pairs in half of each head")
    config = {
        "architectures": ["ArkasrForConditionalGeneration"], "model_type": "arkasr", "hidden_size": d_model,
        "intermediate_size": 2 * d_model, "num_hidden_layers": lm_layers, "num_attention_heads": heads, "num_key_value_heads": heads,
        "vocab_size": -(-(len(tokenizer) + 1) // 64) * 64,  # rounded up past the tokenizer, as published vocabularies are
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 2048, "tie_word_embeddings": True,
        "initializer_range": d_model ** -0.5 / 2,
        "whisper_config": {"d_model": d_model, "encoder_layers": encoder_layers, "encoder_attention_heads": heads,
                           "encoder_ffn_dim": 2 * d_model, "num_mel_bins": 128, "max_source_positions": 1500},
        "adapter_type": "mlp", "merge_factor": 4, "use_rope": True, "mlp_adapter_act": "gelu", "spec_aug": False,
        "max_whisper_length": 1500, "audio_token_id": vocabulary[AUDIO], "bos_token_id": vocabulary[PAD],
        "eos_token_id": vocabulary[EOS], "pad_token_id": vocabulary[PAD]}
    student = Student(config)
    # Log-mel has a standard deviation of 0.3; brought to about 1 here, training leaves its first plateau in fewer updates.
    student.audio_encoder.whisper.conv1.weight.data.mul_(4.0)
    return assemble(student, tokenizer, device)


# ---------------------------------------------------------------------------- save and load

def save(asr: ASR, path, extra: dict[str, dict] | None = None) -> None:
    """Write a checkpoint directory in the published layout: config.json, model.safetensors (fp32), tokenizer files, and what other
    text files the checkpoint came with (its publisher's code and settings: carried along, never run).

    Written to a temporary folder first. A new directory then appears whole, by one rename; in an existing one the files are swapped
    in one by one, weights last (of one run only the weights ever change). extra: {"name.json" or "name.safetensors": dict}.
    """
    path = Path(path).absolute()
    temporary = path / ".tmp" if path.exists() else path.with_name(path.name + ".tmp")  # on the same file system either way
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, text in asr.companions.items():
        (temporary / name).write_text(text, encoding="utf-8")
    (temporary / "config.json").write_text(json.dumps(asr.net.config, indent=2))
    asr.tokenizer.save_pretrained(temporary)
    tensors = {k.removeprefix("lm."): v.detach().cpu().contiguous() for k, v in asr.net.state_dict().items()}
    if asr.net.config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    for name, content in {**(extra or {}), "model.safetensors": tensors}.items():
        if name.endswith(".json"):
            (temporary / name).write_text(json.dumps(content, indent=2))
        else:
            save_file(content, temporary / name, metadata={"format": "pt"})
    if not path.exists():
        os.rename(temporary, path)
        return
    for file in sorted(temporary.iterdir(), key=lambda f: f.name == "model.safetensors"):
        os.replace(file, path / file.name)
    temporary.rmdir()


COMPANIONS = """generation_config.json preprocessor_config.json processor_config.json chat_template.jinja added_tokens.json
special_tokens_map.json vocab.json merges.txt""".split()


def find(name) -> Path:
    """A checkpoint directory, or the Hub id "owner/name" of one -> its local folder. Code files (*.py) come along and are never run."""
    # "runs/x" beside a folder runs is a slip of the pen, not somebody's repository.
    if Path(name).is_dir() or Path(name).parent.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        if not (Path(name) / "config.json").exists():
            raise FileNotFoundError(f"{name}: no config.json there, so it is not a checkpoint directory" if Path(name).exists()
                                    else f"{name}: no such directory")
        return Path(name)
    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "*.py"]))
    except Exception as error:  # offline, unknown, gated: one line is enough
        raise FileNotFoundError(f"{name}: no such directory, and not to be had from the Hub ({type(error).__name__}: {error})") from error


def load_tokenizer(path) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint: tokenizer.json, or Qwen's vocab.json and merges.txt."""
    path = find(path)
    return (PreTrainedTokenizerFast if (path / "tokenizer.json").exists() else Qwen2Tokenizer).from_pretrained(path)


def read_weights(path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint directory: one model.safetensors, or the shards that its index lists."""
    index = path / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if not (path / files[0]).exists() and index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    absent = [file for file in files if not (path / file).exists()]
    if absent:
        raise FileNotFoundError(f"{path}: {', '.join(absent)} not found; weights are read from safetensors only")
    return {k: v for file in files for k, v in load_file(path / file).items()}


def fill(net, tensors, where) -> None:
    """Put tensors into a network built on the meta device. A missing, unexpected or misshapen weight is an error that lists all of them."""
    expected = net.state_dict()
    wrong = [f"missing {k}" for k in expected if k not in tensors] + [f"unexpected {k}" for k in tensors if k not in expected]
    wrong += [f"{k} is {tuple(tensors[k].shape)}, expected {tuple(v.shape)}" for k, v in expected.items()
              if k in tensors and tensors[k].shape != v.shape]
    if wrong:
        raise ValueError(f"{where}: the weights do not fit config.json:\n  " + "\n  ".join(wrong))
    net.load_state_dict(tensors, assign=True)


def empty_student(config) -> Student:
    """A student on the meta device: no memory is taken, nothing is drawn that a checkpoint would overwrite."""
    with torch.device("meta"):
        net = Student(config)
    net.lm.model.rotary_emb = type(net.lm.model.rotary_emb)(config=net.lm.config)  # its angles stand in no checkpoint
    return net


def load(name, device="cpu", dtype=None) -> ASR:
    """Read a checkpoint, a directory or a Hub id: a student (ARK-ASR's layout) or a Qwen3-ASR (both of its layouts).

    dtype: students are fp32, whatever the checkpoint's dtype; a Qwen3-ASR, never trained, is bf16 on a GPU. Raises FileNotFoundError,
    and ValueError that names every weight, token or key that does not fit.
    """
    path = find(name)
    config = json.loads((path / "config.json").read_text())
    if config.get("model_type") == "qwen3_asr":
        return load_qwen3_asr(path, config, device, dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32))
    if config.get("model_type") != "arkasr":
        raise ValueError(f"{path}/config.json: model_type {config.get('model_type')!r} is not known; expected 'arkasr' or 'qwen3_asr'")
    net = empty_student(config)
    unread = ("audio_encoder.whisper.embed_positions.", "audio_encoder.whisper.layer_norm.")  # published, and used by nothing
    tensors = {k if k.startswith("audio_encoder.") else "lm." + k: v.to(dtype or torch.float32) for k, v in read_weights(path).items()
               if not k.startswith(unread) and not k.endswith(".num_batches_tracked")}
    if net.config["tie_word_embeddings"] and "lm.model.embed_tokens.weight" in tensors:
        table = tensors["lm.model.embed_tokens.weight"]
        if not torch.equal(tensors.setdefault("lm.lm_head.weight", table), table):
            raise ValueError(f"{path}: config.json ties lm_head.weight to the embeddings, but the stored one is another matrix")
        tensors["lm.lm_head.weight"] = table
    fill(net, tensors, path)
    net.lm.tie_weights()
    companions = {f.name: f.read_text(encoding="utf-8") for f in sorted(path.iterdir()) if f.name in COMPANIONS or f.suffix == ".py"}
    return assemble(net, load_tokenizer(path), device, companions)


def load_student(name, device) -> ASR:
    """A checkpoint to train. Raises ValueError if it is not a student."""
    asr = load(name, device)
    if not isinstance(asr.net, Student):
        raise ValueError(f"{name} is a Qwen3-ASR checkpoint: it can teach and be evaluated, but only students (model_type 'arkasr') are trained")
    return asr


def load_teacher(name, device) -> ASR:
    """A frozen checkpoint of either family: in bf16 on a GPU, in fp32 on a CPU."""
    asr = load(name, device, torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
    asr.net.requires_grad_(False)
    return asr


# ---------------------------------------------------------------------------- Qwen3-ASR

# The original repositories' names -> transformers' names.
QWEN3_ASR_KEYS = {
    r"^thinker\.model\.": "model.language_model.", r"^thinker\.lm_head\.": "lm_head.",
    r"^thinker\.audio_tower\.proj1\.": "model.multi_modal_projector.linear_1.",
    r"^thinker\.audio_tower\.proj2\.": "model.multi_modal_projector.linear_2.", r"^thinker\.audio_tower\.": "model.audio_tower."}


def qwen3_asr_config(config: dict) -> Qwen3ASRConfig:
    """config.json of either layout -> transformers' config. The original one nests everything in thinker_config."""
    if "thinker_config" not in config:
        if not {"audio_config", "text_config"} <= config.keys():  # transformers would take defaults: random weights of the 1.7B size
            raise ValueError(f"config.json of a Qwen3-ASR has audio_config and text_config, or thinker_config; this one has {', '.join(config)}")
        return Qwen3ASRConfig(**{k: v for k, v in config.items() if k not in ("model_type", "architectures", "transformers_version")})
    thinker = config["thinker_config"]
    known = lambda section, cls: {k: v for k, v in thinker[section].items() if k in cls.__dataclass_fields__ and k != "model_type"}
    native = Qwen3ASRConfig()
    text = known("text_config", Qwen3Config)
    theta = thinker["text_config"].get("rope_theta") or (thinker["text_config"].get("rope_parameters") or {})["rope_theta"]
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}  # its M-RoPE gives all three axes the same position
    tied = thinker["text_config"].get("tie_word_embeddings", thinker.get("tie_word_embeddings", True))
    return Qwen3ASRConfig(
        audio_config={"model_type": "qwen3_asr_encoder"} | known("audio_config", type(native.audio_config)),
        text_config={"model_type": "qwen3"} | text, audio_token_id=thinker.get("audio_token_id", native.audio_token_id),
        tie_word_embeddings=tied)


def load_qwen3_asr(path, config, device, dtype) -> Qwen3ASR:
    """Read a Qwen3-ASR directory. transformers would fill what it doesn't find with random numbers: here that is an error."""
    net, report = Qwen3ASRForConditionalGeneration.from_pretrained(
        path, config=qwen3_asr_config(config), key_mapping=QWEN3_ASR_KEYS if "thinker_config" in config else None, dtype=dtype,
        attn_implementation="sdpa", use_safetensors=True, output_loading_info=True,
        ignore_mismatched_sizes=True)  # not ignored, but reported with the rest below
    wrong = [f"{kind.removesuffix('_keys')} {key}" for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
             for key in sorted(map(str, report[kind]))]
    if wrong:
        raise ValueError(f"{path}: the weights do not fit config.json:\n  " + "\n  ".join(wrong))
    return assemble_qwen3_asr(net.eval(), load_tokenizer(path), device)


def assemble_qwen3_asr(net, tokenizer, device) -> Qwen3ASR:
    """Join network and tokenizer, as `assemble` does for a student."""
    n_rows = net.config.text_config.vocab_size
    tokens = ["<|im_start|>", EOS, "<|audio_start|>", "<|audio_pad|>", "<|audio_end|>", "<asr_text>"]
    start, eos, audio_start, audio_pad, audio_end, _ = special_ids(tokenizer, tokens, n_rows).values()
    if net.config.audio_token_id != audio_pad:
        raise ValueError(f"config.json says audio_token_id = {net.config.audio_token_id}, but the tokenizer has '<|audio_pad|>' at {audio_pad}")
    text = lambda words: tokenizer.encode(words, add_special_tokens=False)
    turn = lambda role: [start, *text(role + "\n")]
    stop, blocked = stop_and_blocked(tokenizer, {eos} | as_set(net.config.eos_token_id), n_rows, device)
    return Qwen3ASR(net.to(device), tokenizer, prefix_ids=[*turn("system"), eos, *text("\n"), *turn("user"), audio_start],
                    suffix_ids=[audio_end, eos, *text("\n"), *turn("assistant")], eos_id=eos, pad_id=eos, audio_id=audio_pad,
                    stop=stop, blocked=blocked)


# ---------------------------------------------------------------------------- a student from parts

def interleave_rope(weight, heads):
    """Undo transformers' row order of q and k: of each head's rows, first half [0, 2, .., 1, 3, ..] -> [0, 1, 2, 3, ..]; weight or bias."""
    rows = weight.unflatten(0, (heads, -1)).clone()                                       # (heads, head_dim, ...)
    n = rows.shape[1] // 2
    rows[:, 0:n:2], rows[:, 1:n:2] = rows[:, :n // 2].clone(), rows[:, n // 2:n].clone()
    return rows.flatten(0, 1)


def read_encoder(name) -> tuple[dict, dict[str, torch.Tensor]]:
    """Encoder of a GLM-ASR (transformers' or its original layout), ARK-ASR or Whisper checkpoint -> whisper_config, weights by our names.

    Whisper adds a table of positions where this encoder turns queries and keys: its weights fit, and the positions have to be learnt anew.
    """
    path = find(name)
    config, tensors = json.loads((path / "config.json").read_text()), read_weights(path)
    if config.get("model_type") == "glmasr":
        audio = config["audio_config"]
        shape = dict(d_model=audio["hidden_size"], encoder_layers=audio["num_hidden_layers"], encoder_attention_heads=audio["num_attention_heads"],
                     encoder_ffn_dim=audio["intermediate_size"], num_mel_bins=audio.get("num_mel_bins", 128))
        rope = audio.get("rope_parameters") or {}
        if (rope.get("rope_theta", 1e4), rope.get("partial_rotary_factor", 0.5)) != (1e4, 0.5):
            raise ValueError(f"{path}/config.json: rope_parameters {rope}; expected theta 10000 on half of each head")
        prefix = next((p for p in ("audio_tower.", "model.audio_tower.") if p + "conv1.weight" in tensors), "audio_tower.")  # on disk, in memory
        new_names = {
            ".o_proj.": ".out_proj.", ".input_layernorm.": ".self_attn_layer_norm.", ".post_attention_layernorm.": ".final_layer_norm.",
            ".mlp.fc": ".fc", "whisper.norm.": "layer_norm."}
    else:
        prefix = next((p for p in ("audio_encoder.whisper.", "model.encoder.", "encoder.") if p + "conv1.weight" in tensors), None)
        if prefix is None:
            raise ValueError(f"{path}: no Whisper-shaped encoder among its weights, such as {sorted(tensors)[:3]}")
        shape = config.get("whisper_config", config)
        shape = {k: shape[k] for k in ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "num_mel_bins")}
        new_names = {"whisper.layer_norm.": "layer_norm."} if prefix != "audio_encoder.whisper." else {}
    ours = {}
    for key, value in tensors.items():
        if key.startswith(prefix):
            new = "whisper." + key.removeprefix(prefix)
            for old_part, new_part in new_names.items():
                new = new.replace(old_part, new_part) if old_part[0] == "." or new.startswith(old_part) else new
            turned = config.get("model_type") == "glmasr" and re.search(r"\.[qk]_proj\.", new)
            ours[new] = interleave_rope(value, shape["encoder_attention_heads"]) if turned else value
    ours |= {k.removeprefix("audio_encoder."): v for k, v in tensors.items() if k.startswith("audio_encoder.layer_norm.")}
    return shape, {k: v for k, v in ours.items() if not k.startswith(("whisper.embed_positions.", "whisper.layer_norm."))}


def student_from_parts(encoder, lm, device="cpu") -> ASR:
    """A fresh student from a trained audio encoder and a trained Qwen2, Qwen2.5 or Qwen3 causal LM; the adapter is new (torch's generator).

    Tokens of the prompt that the LM's tokenizer lacks are added; their embeddings start at the mean of the text's, with its spread.
    """
    path = find(lm)
    lm_config = {"tie_word_embeddings": False} | json.loads((path / "config.json").read_text())  # transformers' default, not ARK-ASR's
    tokenizer = load_tokenizer(path)
    if lm_config.get("model_type") not in LANGUAGE_MODELS:
        raise ValueError(f"{path}/config.json: model_type {lm_config.get('model_type')!r}; expected one of {', '.join(LANGUAGE_MODELS)}")
    n_old = min(len(tokenizer), lm_config["vocab_size"])  # rows that mean a token
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL if token not in tokenizer.get_vocab()])
    shape, encoder_tensors = read_encoder(encoder)
    n_rows = max(lm_config["vocab_size"], -(-len(tokenizer) // 64) * 64)
    ids = special_ids(tokenizer, SPECIAL, n_rows)
    net = empty_student(lm_config | {
        "architectures": ["ArkasrForConditionalGeneration"], "model_type": "arkasr", "lm_type": lm_config["model_type"],
        "vocab_size": n_rows, "whisper_config": shape | {"max_source_positions": 1500}, "adapter_type": "mlp", "merge_factor": 4,
        "use_rope": True, "mlp_adapter_act": "gelu", "spec_aug": False, "max_whisper_length": 1500, "audio_token_id": ids[AUDIO],
        "bos_token_id": ids[PAD], "eos_token_id": ids[EOS], "pad_token_id": ids[PAD]})
    tensors = {"lm." + k: v.float() for k, v in read_weights(path).items()}
    table = tensors["lm.model.embed_tokens.weight"]                                       # (rows, D)
    fresh = table[:n_old].mean(0) + table[:n_old].std(0) * torch.randn(n_rows - n_old, table.shape[1])
    table = tensors["lm.model.embed_tokens.weight"] = torch.cat([table[:n_old], fresh])
    if net.config["tie_word_embeddings"]:
        tensors["lm.lm_head.weight"] = table
    else:
        head = tensors["lm.lm_head.weight"]
        tensors["lm.lm_head.weight"] = torch.cat([head[:n_old], head[:n_old].mean(0).expand(n_rows - n_old, -1)])
    adapter = nn.Sequential(*(nn.Linear(m.in_features, m.out_features) if isinstance(m, nn.Linear) else m for m in net.audio_encoder.adapting))
    tensors |= {"audio_encoder." + k: v.float() for k, v in encoder_tensors.items()}
    fill(net, tensors | {"audio_encoder.adapting." + k: v.detach() for k, v in adapter.state_dict().items()}, f"{encoder} and {lm}")
    net.lm.tie_weights()
    return assemble(net, tokenizer, device)


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
        audio, n_audio = asr.hear(batch)
    suffixes = asr.suffixes(batch, audio, n_audio)
    rows = [asr.prompt_ids(n, suffix) for n, suffix in zip(n_audio.tolist(), suffixes)]
    return insert_audio(asr, rows, audio, n_audio)


def insert_audio(asr: ASR, rows, audio, n_audio) -> Prompt:
    """Prompt ids (a list a row) and audio embeddings (B, A, D) -> left-padded prompts with the audio in place."""
    width = max(map(len, rows))
    ids = torch.tensor([[asr.pad_id] * (width - len(row)) + row for row in rows], device=asr.device)    # (B, P)
    n_ids = torch.tensor([len(row) for row in rows], device=asr.device)                                 # (B,)
    mask = torch.arange(width, device=asr.device) >= width - n_ids[:, None]                             # (B, P)
    valid = torch.arange(audio.shape[1], device=asr.device) < n_audio[:, None]                          # (B, A)
    embeds = asr.body.embed_tokens(ids)                                                                 # (B, P, D)
    # Both sides run row by row, so the i-th placeholder of a row receives the i-th audio embedding of that row.
    embeds = embeds.masked_scatter((ids == asr.audio_id)[..., None], audio[valid].to(embeds.dtype))
    return Prompt(embeds, mask, audio, n_audio)


def autocast(device):
    """bf16 arithmetic over fp32 weights on a GPU; nothing on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def causal_mask(key_mask):
    """(B, K) valid columns -> (B, 1, K, K): column q sees valid columns up to itself; padding sees itself (no NaN)."""
    n = key_mask.shape[1]
    lower = torch.ones(n, n, dtype=torch.bool, device=key_mask.device).tril()
    itself = torch.eye(n, dtype=torch.bool, device=key_mask.device)
    return ((key_mask[:, None] & lower) | itself)[:, None]


def positions_of(mask):
    """(B, K) valid columns -> position of each column in its row, padding not counted."""
    return (mask.cumsum(1) - 1).clamp(min=0)


class Logits(torch.autograd.Function):
    """On a GPU: bf16 inputs, sums in fp32 that are never rounded to bf16 in between (not run: no GPU here)."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden, weight)
        return torch.mm(hidden.bfloat16(), weight.bfloat16().T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad_z):
        hidden, weight = ctx.saved_tensors
        grad_hidden = (grad_z @ weight.float()).to(hidden.dtype)                # z = h W^T, so dh = dz W
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_z.T @ hidden.float()).to(weight.dtype)          # and dW = dz^T h
        return grad_hidden, grad_weight


def logits(hidden, weight):
    """The LM head: hidden (N, D), weight (V, D) -> logits (N, V), fp32. Every head site calls it, so all of them round alike.

    bf16 logits would be wrong in the third digit: that moves the gradient of a KL between two of them by 4 to 29 %.
    """
    if hidden.is_cuda:
        return Logits.apply(hidden, weight)
    return F.linear(hidden, weight).float()


def response_hidden(body, embeds, prompt_mask, ids, mask) -> torch.Tensor:
    """Teacher forcing: the hidden rows that predict the response tokens, packed -> (N, D), row-major order of mask.

    body: an LM without its head; embeds (B, P, D) and prompt_mask (B, P): prompts, padded on the left; ids and mask (B, R): responses,
    padded on the right. The caller applies the head to these N rows only: no logits are made for prompt or padding.
    """
    n_prompt = prompt_mask.shape[1]
    # The last column predicts nothing that is scored, so it is not fed; see the drawing at the top.
    columns = torch.cat([embeds, body.embed_tokens(ids[:, :-1])], dim=1)                    # (B, P+R-1, D)
    valid = torch.cat([prompt_mask, mask[:, :-1]], dim=1)                                   # (B, P+R-1)
    with autocast(embeds.device):
        hidden = body(inputs_embeds=columns, attention_mask={"full_attention": causal_mask(valid)},
                      position_ids=positions_of(valid), use_cache=False).last_hidden_state  # (B, P+R-1, D)
    return hidden[:, n_prompt - 1:][mask]                                                   # (N, D)


def draw(z, temperature, uniform):
    """One id a row from softmax(z / temperature) by inverse CDF: logits (B, V), uniform (B,) in [0, 1) -> (B,).

    temperature 0 is argmax. One uniform a row comes from the caller, so the draw does not depend on the rest of the batch.
    """
    if temperature == 0:
        return z.argmax(-1)
    cdf = (z / temperature).softmax(-1).cumsum(-1)                                          # (B, V)
    # u is scaled by the CDF's last value, which fp32 leaves at 1 +- 2e-5, and kept below it: the id found has p > 0.
    # (On a GPU cumsum is a parallel scan and need not rise to the last bit: there an id of p = 0 has a chance of about 1e-7.)
    last = cdf[:, -1]
    point = torch.minimum(uniform * last, torch.nextafter(last, torch.zeros_like(last)))    # (B,)
    return torch.searchsorted(cdf, point[:, None], right=True)[:, 0]


@torch.no_grad()
def generate(body, weight, embeds, prompt_mask, *, stop, blocked, pad_id, max_new_tokens, temperature=0.0, uniforms=None):
    """Write one response a row, greedy (temperature 0) or sampled -> ids (B, R), mask (B, R): True on emitted tokens, EOS included.

    body, weight: an LM and its head (V, D); embeds (B, P, D), prompt_mask (B, P): prompts, padded on the left; stop, blocked (V,): ids
    that end a response, ids that none may contain; uniforms (B, max_new_tokens) in [0, 1): see data.keyed_uniforms. A row without a
    stop id was cut at max_new_tokens. Finished rows are frozen, and once a quarter of the rows are done the others go on alone.
    There is no collective, and the host asks the device how many rows are left at every token on a CPU, at every eighth on a GPU.
    """
    n_rows = len(embeds)
    device = embeds.device
    ask_every = 1 if device.type == "cpu" else 8
    if temperature > 0:
        uniforms = torch.as_tensor(uniforms, device=device)
    ids = torch.full((n_rows, max_new_tokens), pad_id, device=device)           # (B, R)
    mask = torch.zeros_like(ids, dtype=torch.bool)                              # (B, R)
    rows = torch.arange(n_rows, device=device)                                  # (b,) rows that are still written
    unfinished = torch.ones(n_rows, dtype=torch.bool, device=device)            # (b,)
    cache = DynamicCache(config=body.config)
    valid = prompt_mask                                                         # (b, P+t) columns to attend to
    attend = causal_mask(prompt_mask)                                           # (b, 1, queries, P+t)
    positions = positions_of(prompt_mask)                                       # (b, queries)
    with autocast(device):  # around the whole loop: weights are cast to bf16 once, not at every token
        for t in range(max_new_tokens):
            hidden = body(inputs_embeds=embeds, attention_mask={"full_attention": attend}, position_ids=positions,
                          past_key_values=cache, use_cache=True).last_hidden_state[:, -1]       # (b, D)
            z = logits(hidden, weight).masked_fill(blocked, -math.inf)                          # (b, V)
            token = draw(z, temperature, None if uniforms is None else uniforms[rows, t])       # (b,)
            token = torch.where(unfinished, token, pad_id)
            ids[rows, t] = token
            mask[rows, t] = unfinished
            valid = torch.cat([valid, unfinished[:, None]], dim=1)                              # (b, P+t+1)
            positions = positions[:, -1:] + 1                                                   # (b, 1)
            unfinished = unfinished & ~stop[token]
            if t % ask_every == ask_every - 1:
                n_left = int(unfinished.sum())
                if n_left == 0:
                    break
                if 4 * n_left <= 3 * len(rows):  # a quarter done: measured faster than at half, as fast as at every row
                    left = unfinished.nonzero()[:, 0]
                    cache.batch_select_indices(left)
                    rows = rows[left]
                    token = token[left]
                    valid = valid[left]
                    positions = positions[left]
                    unfinished = unfinished[left]
            embeds = body.embed_tokens(token[:, None])                                          # (b, 1, D)
            attend = valid[:, None, None]                                                       # (b, 1, 1, P+t+1)
    n_columns = int(mask.any(0).sum())
    return ids[:, :n_columns], mask[:, :n_columns]


def roll_out(asr: ASR, prompt: Prompt, max_new_tokens, temperature=0.0, uniforms=None):
    """`generate` with a recogniser's parts -> ids (B, R), mask (B, R)."""
    return generate(asr.body, asr.head.weight, prompt.embeds, prompt.mask, stop=asr.stop, blocked=asr.blocked, pad_id=asr.pad_id,
                    max_new_tokens=max_new_tokens, temperature=temperature, uniforms=uniforms)


def transcribe(asr: ASR, utterances, rank=0, world=1, micro_batch=16, max_new_tokens=128, progress=None) -> dict[str, dict]:
    """Greedy transcripts of this rank's share -> {id: {"hyp", "stopped", "n_tokens"}}. A clip that can't be decoded raises.

    Rows of similar length go together, whatever the order of `utterances`; results are keyed by id. progress(n): n clips done.
    """
    durations = data.measure(utterances)
    order = sorted(range(len(utterances)), key=durations.__getitem__)
    results = {}
    for start in range(rank * micro_batch, len(order), world * micro_batch):
        chosen = [utterances[i] for i in order[start:start + micro_batch]]
        batch = data.load_batch(chosen, asr.n_mels, keep_going=False, max_sec=data.MAX_EVAL_SEC)
        with torch.no_grad():
            prompt = encode_audio(asr, batch)
        ids, mask = roll_out(asr, prompt, max_new_tokens)                       # (B, R)
        stopped = (asr.stop[ids] & mask).any(1).tolist()
        n_tokens = mask.sum(1).tolist()
        for i, hyp in enumerate(asr.decode(ids, mask)):
            results[chosen[i].id] = {"hyp": hyp.strip(), "stopped": stopped[i], "n_tokens": n_tokens[i]}
        if progress:
            progress(len(chosen))
    return results


# ---------------------------------------------------------------------------- two vocabularies

def vocabulary_map(student: ASR, teacher: ASR) -> torch.Tensor:
    """(V,) long: the teacher's id of each student id with an equal token string; -1 where there is none.

    EOS maps to EOS whatever it is called. Ids blocked on either side are -1: no transcript contains them.
    """
    teacher_ids = teacher.tokenizer.get_vocab()
    blocked_s = student.blocked.tolist()
    blocked_t = teacher.blocked.tolist()
    to_teacher = torch.full((len(blocked_s),), -1, dtype=torch.long)
    for token, i in student.tokenizer.get_vocab().items():
        j = teacher_ids.get(token)
        if j is None or i >= len(blocked_s) or j >= len(blocked_t):
            continue
        if not blocked_s[i] and not blocked_t[j]:
            to_teacher[i] = j
    to_teacher[student.eos_id] = teacher.eos_id
    return to_teacher.to(student.device)


def map_logits(z_t, to_teacher):
    """(N, V_teacher) teacher logits -> (N, V): column i is the teacher's logit of student id i, -inf where it has none."""
    return z_t.index_select(-1, to_teacher.clamp(min=0)).masked_fill_(to_teacher < 0, -math.inf)


def readable_prefix(ids, mask, to_teacher):
    """(B, R) ids and mask -> (B, R) mask, cut at the first id that the teacher's vocabulary lacks.

    The teacher can't read that token, so neither it nor anything behind it in the row can be scored.
    """
    return mask & (to_teacher[ids] >= 0).cumprod(1).bool()


# ---------------------------------------------------------------------------- what a distillation logs

def rollout_health(ids, mask, stop) -> dict[str, torch.Tensor]:
    """(B, R) rollouts, their mask, (V,) ids that end one -> how many there are, were cut off, are EOS alone, repeat themselves."""
    ended = (stop[ids] & mask).any(1)                                               # (B,)
    return {"clips": len(ids), "truncated": (~ended).sum(), "empty": stop[ids[:, 0]].sum(), "repeats": repeats(ids, mask).sum()}


def repeats(ids, mask, n=3):
    """(B, R) rollouts -> (B,) bool: does some n-gram of emitted tokens come twice? The first sign of a loop."""
    if ids.shape[1] <= n:
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    grams = ids.unfold(1, n, 1)                                                     # (B, G, n) with G = R - n + 1
    emitted = mask.unfold(1, n, 1).all(-1)                                          # (B, G)
    same = (grams[:, :, None] == grams[:, None]).all(-1)                            # (B, G, G)
    same = same & emitted[:, :, None] & emitted[:, None]
    return same.triu(1).flatten(1).any(1)


@torch.no_grad()
def agreement(hidden, student, teacher, to_teacher, k, chunk) -> dict[str, float]:
    """How student and teacher stand to each other at these states, means over the states of all ranks.

    hidden: [hidden_s (N, D), hidden_t (N, D_t)], or None on a rank that has no clip. Of the k most probable ids of either:
      top1_agreement              do both put the same id first?
      overlap                     share of ids that both sets have
      mass_student, mass_teacher  probability that each puts on those shared ids
      entropy, entropy_teacher    nats
    overlap.py has more, and takes its sets before ids without a counterpart are removed, as the paper does; here they are gone already.
    """
    names = ("top1_agreement", "overlap", "mass_student", "mass_teacher", "entropy", "entropy_teacher")
    sums = dict.fromkeys((*names, "states"), 0.0)
    hidden_s, hidden_t = hidden or ([], [])
    for i in range(0, len(hidden_s), chunk):
        z_s = student.logits(hidden_s[i:i + chunk]).masked_fill(to_teacher < 0, -math.inf)      # (C, V)
        z_t = map_logits(teacher.logits(hidden_t[i:i + chunk]), to_teacher)                     # (C, V)
        logp_s = z_s.log_softmax(-1)                                                            # (C, V)
        logp_t = z_t.log_softmax(-1)                                                            # (C, V)
        top_s = logp_s.topk(min(k, logp_s.shape[-1]))                                           # (C, k)
        top_t = logp_t.topk(min(k, logp_t.shape[-1]))                                           # (C, k)
        same = top_s.indices[:, :, None] == top_t.indices[:, None]                              # (C, k, k)
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
    return {name: sums[name] / sums["states"] for name in names}


# ---------------------------------------------------------------------------- training runs: processes, log, resume

def setup(args):
    """Join the processes that torchrun started, if any -> rank, world, device, and a list that SIGTERM makes non-empty."""
    rank, world, device = find_place(args.device)
    if world > 1:
        # Hours: the others wait while rank 0 saves. NCCL's own limit is ten minutes.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12),
                                device_id=device if device.type == "cuda" else None)
    torch.manual_seed(args.seed)  # for random initial weights; every later draw is keyed on (seed, step, utterance)
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    return rank, world, device, stop


def setup_scoring(args):
    """As `setup`, for scripts whose ranks exchange finished results as Python objects and no tensor -> rank, world, device."""
    rank, world, device = find_place(args.device)
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    return rank, world, device


def find_place(kind):
    """--device (auto, cpu, cuda) and torchrun's environment -> rank, world, device."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        return rank, world, torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return rank, world, device


def finish() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.barrier()  # without it, gloo on a CPU may abort in the line below
        dist.destroy_process_group()


def all_sum(values: dict, device) -> dict[str, float]:
    """Sum numbers (the same keys on every rank) over all ranks, in one collective."""
    total = torch.tensor([float(v) for v in values.values()], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return dict(zip(values, total.tolist()))


def progress(total, name, unit, rank, initial=0):
    """A progress bar with rate and ETA on rank 0; a line every 20 s where it is written to a file."""
    return tqdm(total=total, initial=initial, desc=name, unit=unit, disable=rank > 0,
                mininterval=0.5 if sys.stderr.isatty() else 20)


def load_pair(student, teacher, device):
    """Checkpoints to train and to score with -> student, frozen teacher. Raises ValueError unless they read the same features."""
    student = load_student(student, device)
    teacher = load_teacher(teacher, device)
    if student.n_mels != teacher.n_mels:
        raise ValueError(f"student and teacher read the same features, but take {student.n_mels} and {teacher.n_mels} mel bins")
    return student, teacher


def dev_error(asr, utterances, args, rank, world) -> dict[str, float]:
    """Greedy errors on dev, languages pooled, ranks share the clips -> {"dev_error": percent, "dev_length": units written / in reference}."""
    hyps = transcribe(asr, utterances, rank, world, args.eval_batch, args.max_new_tokens)
    sums = {"errors": 0, "units": 0, "longer": 0}
    for u in utterances:
        if u.id in hyps:
            counts = data.edit_counts(u.text, hyps[u.id]["hyp"], u.language)
            sums["errors"] += counts.errors
            sums["units"] += counts.units
            sums["longer"] += counts.insertions - counts.deletions
    sums = all_sum(sums, asr.device)
    if not sums["units"]:
        return {"dev_error": math.nan, "dev_length": math.nan}
    return {"dev_error": 100 * sums["errors"] / sums["units"], "dev_length": 1 + sums["longer"] / sums["units"]}


class Log:
    """metrics.jsonl, the progress bar and the rejected clips of a training run; files and bar on rank 0 only."""

    def __init__(self, args, rank, start):
        self.path = Path(args.out) / "metrics.jsonl"
        self.rank = rank
        self.rejected = Counter()  # reason: clips left out since this process started
        self.first = {}            # reason: message of the first of them
        self.bar = progress(args.steps, Path(args.out).name, "step", rank, start)
        if rank == 0 and self.path.exists():  # what was logged after the restored step is about to be made again
            data.write_jsonl(self.path, [row for row in read_log(self.path) if before(row, start)])

    def write(self, record) -> None:
        """Append a record and print it."""
        if self.rank > 0:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        shown = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items()]
        self.bar.write("  ".join(shown))

    def reject(self, rejected) -> None:
        """Count clips that could not be used: (reason, message) pairs."""
        for reason, message in rejected:
            self.rejected[reason] += 1
            self.first.setdefault(reason, message)

    def first_message(self) -> str:
        """Why the first clip was rejected."""
        return next(iter(self.first.values()), "on another process")

    def close(self) -> None:
        """Draw metrics.png, say what was left out."""
        self.bar.close()
        if self.rank == 0:
            draw_metrics(self.path)
        for reason, n in self.rejected.items():
            print(f"rank {self.rank}: {n} clips rejected: {reason} (first: {self.first[reason]})")


def n_parameters(asr) -> int:
    return sum(p.numel() for p in asr.net.parameters())


def read_log(path) -> list[dict]:
    """Records of a metrics.jsonl; a killed run may leave half a line at its end."""
    return [json.loads(line) for line in path.open() if line.endswith("}\n")]


def before(row, start) -> bool:
    """Was this record made before a run resumes at step `start`? Its dev error is measured again first."""
    return row["step"] < start or (row["step"] == start and "dev_error" not in row)


PANELS = [
    ("loss, nats per token", ["loss", "ctc"]),
    ("dev error, %", ["dev_error"]),
    ("agreement with the teacher", ["overlap", "top1_agreement", "mass_student", "mass_teacher"]),
    ("share of rollouts", ["truncated", "empty", "repeats"]),
]


def draw_metrics(path) -> None:
    """metrics.jsonl -> metrics.png beside it: what PANELS lists and the run has logged, over steps."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    records = read_log(path)
    curves = {}  # title: {key: [(step, value)]}
    for title, keys in PANELS:
        for key in keys:
            points = [(r["step"], r[key]) for r in records if key in r]
            if points:
                curves.setdefault(title, {})[key] = points
    figure, axes = pyplot.subplots(1, len(curves), figsize=(3.6 * len(curves), 3), layout="constrained", squeeze=False)
    for axis, (title, panel) in zip(axes[0], curves.items()):
        for key, points in panel.items():
            axis.plot(*zip(*points), "o-" if len(points) < 12 else "-", markersize=3, label=key)
        axis.set(title=title, xlabel="step", ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize="small")
    figure.savefig(path.with_name("metrics.png"), dpi=110)
    pyplot.close(figure)


def start_run(args, asr, optimizer, modules, rank) -> tuple[int, float]:
    """Make --out, restore its newest state if --resume -> step to go on at, best dev error so far.

    Raises FileExistsError if --out holds an earlier run and --resume is not given; RuntimeError if ranks see different states.
    """
    out = Path(args.out)
    if not args.resume and any((out / name).exists() for name in ("metrics.jsonl", "state")):
        raise FileExistsError(f"{out} holds an earlier run: continue it with --resume, or choose another --out")
    if dist.is_initialized():
        dist.barrier()  # all ranks have looked before rank 0 writes
    out.mkdir(parents=True, exist_ok=True)
    info = load_training(out, asr, optimizer, modules) if args.resume else None
    start = info["step"] if info else 0
    starts = [start]
    if dist.is_initialized():
        starts = [None] * dist.get_world_size()
        dist.all_gather_object(starts, start)
    if len(set(starts)) > 1:
        raise RuntimeError(f"ranks find different steps in {out}/state: {starts} in order of rank. Do all nodes share --out?")
    if info is None:
        return 0, math.inf
    flags = kept_flags(args)
    for name, value in flags.items():
        if rank == 0 and info["flags"].get(name) != value:
            print(f"resumed with another --{name} than before: {info['flags'].get(name)} -> {value}")
    return start, info["best"]


def keep_best(asr, out, error, best, rank) -> float:
    """Keep --out at the best checkpoint on dev -> the best error so far."""
    if rank == 0 and error < best:
        save(asr, out)
    return min(error, best)


def kept_flags(args) -> dict:
    """Flags that decide the result of a run, for its training state."""
    return {k: v for k, v in vars(args).items() if k not in ("out", "resume", "device", "workers")}


def save_training(out, step, asr, optimizer, modules=None, info=None) -> None:
    """Write OUT/state/step-N: a full checkpoint plus what a resumed run needs (optimiser, further modules, info); then drop older ones.

    There is no RNG and no data position to save: every draw and every batch is a function of (seed, step).
    """
    folder = Path(out) / "state"
    tensors = {}
    for i, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            tensors[f"optimizer.{i}.{name}"] = value.cpu()
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
    """Restore the newest OUT/state/step-N in place and return its info; None if there is none. Half-written ones end in .tmp.

    Tensors are read one at a time: none lies in memory twice.
    """
    saved = sorted(p for p in (Path(out) / "state").glob("step-*") if p.suffix != ".tmp")
    if not saved:
        return None
    folder = saved[-1]
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = set(file.keys())
        for key, value in asr.net.state_dict().items():
            name = key.removeprefix("lm.")
            if name in stored:  # a tied head is not
                value.copy_(file.get_tensor(name))
    state = {}
    with safe_open(folder / "training.safetensors", "pt") as file:
        for key in file.keys():
            if key.startswith("optimizer."):
                _, i, name = key.split(".")
                value = file.get_tensor(key)
                state.setdefault(int(i), {})[name] = value if name == "step" else value.to(asr.device)
        for module_name, module in (modules or {}).items():
            for name, value in module.state_dict().items():
                value.copy_(file.get_tensor(f"{module_name}.{name}"))
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return json.loads((folder / "training.json").read_text())
