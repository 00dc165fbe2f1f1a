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
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import huggingface_hub
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, Qwen3ASRConfig,
                          Qwen3ASRForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM, StaticCache)
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

    def hear(self, batch: data.Batch):
        """-> audio embeddings (B, A, D), how many are a row's own (B,)."""
        return self.net.audio_encoder(batch.mel.to(self.device, self.head.weight.dtype), batch.n_frames.to(self.device))

    def suffixes(self, batch: data.Batch, audio, n_audio) -> list[list[int]]:
        """What follows the audio in each row's prompt."""
        return [self.suffix_ids] * len(batch.utterances)

    def prompt_ids(self, n_audio, suffix) -> list[int]:
        """One row's prompt, a placeholder for each of its n_audio audio embeddings."""
        return [*self.prefix_ids, *[self.audio_id] * n_audio, *suffix]

    def autocast(self):
        """bf16 arithmetic on a GPU over fp32 weights (untested on hardware here); nothing on a CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

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
            prompt = place(self, [self.prompt_ids(n, self.suffix_ids) for n in n_audio[unknown].tolist()], audio[unknown], n_audio[unknown])
            ids, mask = generate(listener, prompt, max_new_tokens=12)
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


def save_training(out, step, asr, optimizer, modules=None, info=None) -> None:
    """Write OUT/state/step-N: a full checkpoint plus what a resumed run needs (optimiser, further modules, info); then drop older ones.

    There is no RNG and no data position to save: every draw and every batch is a function of (seed, step).
    """
    folder = Path(out) / "state"
    tensors = {f"optimizer.{i}.{k}": v.cpu() for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}
    tensors |= {f"{name}.{k}": v.cpu() for name, module in (modules or {}).items() for k, v in module.state_dict().items()}
    target = folder / f"step-{step:07d}"
    if not target.exists():
        save(asr, target, {"training.safetensors": tensors, "training.json": {"step": step, **(info or {})}})
    for old in folder.glob("step-*"):
        if old != target:
            shutil.rmtree(old)


def load_training(out, asr, optimizer, modules=None) -> dict | None:
    """Restore the newest OUT/state/step-N in place and return its info; None if there is none. Half-written ones end in .tmp."""
    saved = sorted(p for p in (Path(out) / "state").glob("step-*") if p.suffix != ".tmp")
    if not saved:
        return None
    asr.net.load_state_dict(load(saved[-1]).net.state_dict())
    tensors = load_file(saved[-1] / "training.safetensors")
    state = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, i, name = key.split(".")
            state.setdefault(int(i), {})[name] = value.to(asr.device) if name != "step" else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for name, module in (modules or {}).items():
        module.load_state_dict({k.removeprefix(name + "."): v for k, v in tensors.items() if k.startswith(name + ".")})
    return json.loads((saved[-1] / "training.json").read_text())


# ---------------------------------------------------------------------------- prompt, scoring, generation

@dataclass
class Prompt:
    """A batch of prompts with the audio in place, ready for the LM's body."""
    embeds: torch.Tensor      # (B, P, D)
    mask: torch.Tensor        # (B, P) False on the left padding
    audio: torch.Tensor       # (B, A, D) adapter output, for the CTC loss
    n_audio: torch.Tensor     # (B,) audio tokens of each row


def encode(asr: ASR, batch: data.Batch) -> Prompt:
    """Run the audio encoder once and place its output in the prompt. Differentiable."""
    with asr.autocast():
        audio, n_audio = asr.hear(batch)
    suffixes = asr.suffixes(batch, audio, n_audio)
    return place(asr, [asr.prompt_ids(n, suffix) for n, suffix in zip(n_audio.tolist(), suffixes)], audio, n_audio)


def place(asr: ASR, rows, audio, n_audio) -> Prompt:
    """Prompt ids (lists, one a row) and audio embeddings (B, A, D) -> left-padded prompts with the audio in place."""
    width = max(map(len, rows))
    ids = torch.tensor([[asr.pad_id] * (width - len(row)) + row for row in rows], device=asr.device)               # (B, P)
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows], device=asr.device)     # (B, P)
    own = torch.arange(audio.shape[1], device=asr.device) < n_audio[:, None]                                        # (B, A)
    embeds = asr.body.embed_tokens(ids)                                                                             # (B, P, D)
    # Both sides run row by row, so the i-th placeholder of a row receives the i-th audio embedding of that row.
    embeds = embeds.masked_scatter((ids == asr.audio_id)[..., None], audio[own].to(embeds.dtype))
    return Prompt(embeds, mask, audio, n_audio)


def _causal_mask(key_mask, n_queries):
    """(B, K) keys -> (B, 1, n_queries, K): query q is column q; it sees real columns up to itself, padding only itself (no NaN)."""
    k = key_mask.shape[1]
    tril = torch.ones(n_queries, k, dtype=torch.bool, device=key_mask.device).tril()
    own = torch.eye(n_queries, k, dtype=torch.bool, device=key_mask.device)
    return ((key_mask[:, None] & tril) | own)[:, None]


def _positions(mask):
    """(B, columns) -> position of each column in its row, padding not counted."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def response_hidden(asr: ASR, prompt: Prompt, ids, mask) -> torch.Tensor:
    """Teacher forcing: hidden rows that predict the response tokens, packed -> (N, D), in row-major order of mask (B, R).

    The caller applies `asr.head` to these rows only: no logits are made for the prompt or for padding.
    """
    # The last column predicts nothing that is scored, so it is not fed; see the drawing at the top.
    embeds = torch.cat([prompt.embeds, asr.body.embed_tokens(ids[:, :-1])], dim=1)                                  # (B, P+R-1, D)
    keys = torch.cat([prompt.mask, mask[:, :-1]], dim=1)                                                            # (B, P+R-1)
    with asr.autocast():
        hidden = asr.body(inputs_embeds=embeds, attention_mask={"full_attention": _causal_mask(keys, keys.shape[1])},
                          position_ids=_positions(keys), use_cache=False).last_hidden_state                        # (B, P+R-1, D)
    return hidden[:, prompt.mask.shape[1] - 1:][mask]                                                               # (N, D)


def draw(z, temperature, uniform):
    """One id per row from softmax(z / temperature) by inverse CDF: z (B, V) logits, uniform (B,) in [0, 1) -> (B,).

    temperature 0 is argmax. One uniform a row comes from the caller, so the draw does not depend on the rest of the batch.
    """
    if temperature == 0:
        return z.argmax(-1)
    cdf = (z / temperature).softmax(-1).cumsum(-1)                                                                  # (B, V)
    # u is scaled by the CDF's last value, which fp32 leaves at 1 +- 2e-5, and kept below it: the id found has p > 0. (On a GPU
    # cumsum is a parallel scan and need not rise to the last bit: there an id of p = 0 has a chance of the order of 1e-7.)
    point = torch.minimum(uniform * cdf[:, -1], torch.nextafter(cdf[:, -1], torch.zeros_like(cdf[:, -1])))
    return torch.searchsorted(cdf, point[:, None], right=True)[:, 0]


class Cache(StaticCache):
    """A static cache, allocated once, that hands out only the columns written so far and can drop rows."""
    used = 0                  # columns written, the current ones included

    def update(self, keys, values, *args, **kwargs):
        # Under autocast RoPE returns keys in fp32, and transformers gives both buffers their dtype.
        keys, values = super().update(keys.to(values.dtype), values, *args, **kwargs)
        return keys[:, :, :self.used], values[:, :, :self.used]

    def keep(self, rows):
        """Go on with these rows alone."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]


@torch.no_grad()
def generate(asr: ASR, prompt: Prompt, max_new_tokens, temperature=0.0, uniforms=None):
    """Write transcripts: greedy (temperature 0) or sampled with `uniforms` (B, max_new_tokens), see data.keyed_uniforms.

    -> ids (B, R), mask (B, R): True on emitted tokens, EOS included. A row without EOS was cut at max_new_tokens.
    Finished rows are frozen, and once a quarter of the rows are done the others go on alone. There is no collective, and the host looks
    at the device only to ask how many rows are left: at every token on a CPU, at every eighth on a GPU.
    """
    (n_rows, n_prompt), device = prompt.mask.shape, asr.device
    cache = Cache(config=asr.body.config, max_cache_len=n_prompt + max_new_tokens)
    ids = torch.full((n_rows, max_new_tokens), asr.pad_id, device=device)                                           # (B, R)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    uniforms = None if temperature == 0 else torch.as_tensor(uniforms, device=device)
    look_every = 1 if device.type == "cpu" else 8
    rows, live = torch.arange(n_rows, device=device), torch.ones(n_rows, dtype=torch.bool, device=device)           # (b,) rows at work
    keys, n_own = F.pad(prompt.mask, (0, max_new_tokens)), prompt.mask.sum(1, keepdim=True)                         # (b, P+R), (b, 1)
    embeds, attend, positions = prompt.embeds, _causal_mask(prompt.mask, n_prompt), _positions(prompt.mask)
    with asr.autocast():  # around the whole loop: weights are cast to bf16 once, not at every token
        for t in range(max_new_tokens):
            cache.used = n_prompt + t
            hidden = asr.body(inputs_embeds=embeds, attention_mask={"full_attention": attend}, position_ids=positions,
                              past_key_values=cache, use_cache=True).last_hidden_state[:, -1]                      # (b, D)
            z = asr.head(hidden).float().masked_fill(asr.blocked, -math.inf)                                        # (b, V)
            token = draw(z, temperature, None if uniforms is None else uniforms[rows, t])                           # (b,)
            token = torch.where(live, token, asr.pad_id)
            ids[rows, t], mask[rows, t] = token, live
            keys[:, n_prompt + t] = live
            live = live & ~asr.stop[token]
            if t % look_every == look_every - 1:
                n_live = int(live.sum())
                if n_live == 0:
                    break
                if 4 * n_live <= 3 * len(rows):  # a quarter done: measured faster than at half, as fast as at every row
                    left = live.nonzero()[:, 0]
                    cache.keep(left)
                    rows, live, keys, n_own, token = rows[left], live[left], keys[left], n_own[left], token[left]
            embeds, attend, positions = asr.body.embed_tokens(token[:, None]), keys[:, None, None, :n_prompt + t + 1], n_own + t
    used = int(mask.any(0).sum())
    return ids[:, :used], mask[:, :used]


@torch.no_grad()
def transcribe(asr: ASR, utterances, rank=0, world=1, micro_batch=16, max_new_tokens=128, progress=None) -> dict[str, dict]:
    """Greedy transcripts of this rank's share -> {id: {"hyp", "stopped", "n_tokens"}}. A clip that can't be decoded raises.

    Rows of similar length go together, whatever the order of `utterances`; results are keyed by id. progress(n): n clips done.
    """
    durations = data.measure(utterances)
    order = [utterances[i] for i in sorted(range(len(utterances)), key=durations.__getitem__)]
    results = {}
    for start in range(rank * micro_batch, len(order), world * micro_batch):
        batch = data.load_batch(order[start:start + micro_batch], asr.n_mels, keep_going=False, max_sec=data.MAX_EVAL_SEC)
        ids, mask = generate(asr, encode(asr, batch), max_new_tokens)
        stopped = (asr.stop[ids] & mask).any(1).tolist()
        for utterance, hyp, stop, n in zip(batch.utterances, asr.decode(ids, mask), stopped, mask.sum(1).tolist()):
            results[utterance.id] = {"hyp": hyp.strip(), "stopped": stop, "n_tokens": n}
        if progress:
            progress(len(batch.utterances))
    return results


# ---------------------------------------------------------------------------- two vocabularies

def vocabulary_map(student: ASR, teacher: ASR) -> torch.Tensor:
    """(V_student,) long: the teacher's id of each student id with an equal token string; -1 where there is none.

    EOS maps to EOS whatever it is called. Ids blocked on either side are -1: no transcript contains them.
    """
    theirs, to_teacher = teacher.tokenizer.get_vocab(), torch.full((len(student.blocked),), -1, dtype=torch.long)
    blocked_s, blocked_t = student.blocked.tolist(), teacher.blocked.tolist()
    for token, i in student.tokenizer.get_vocab().items():
        j = theirs.get(token)
        if i < len(blocked_s) and not blocked_s[i] and j is not None and j < len(blocked_t) and not blocked_t[j]:
            to_teacher[i] = j
    to_teacher[student.eos_id] = teacher.eos_id
    return to_teacher.to(student.device)


def map_logits(z_t, to_teacher):
    """(N, V_teacher) teacher logits -> (N, V_student): column i is the teacher's logit of student id i, -inf where it has no twin."""
    return z_t.index_select(-1, to_teacher.clamp(min=0)).masked_fill_(to_teacher < 0, -math.inf)
