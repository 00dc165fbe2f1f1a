"""Supervised fine-tuning: audio and a transcript in, cross entropy on the transcript's tokens. Two stages of the paper are this script:

  Ark-Base   --data train.jsonl                     transcripts written by people
  TD         --data td.jsonl --student runs/x/sft   transcripts written by the teacher (evaluate.py --as_manifest td.jsonl)

For every step, over all its utterances x with response y_0 ... y_{n-1} = EOS:
  L = -1/N sum_x sum_t log p_S(y_t | x, y_<t)       N: response tokens of the step, over all ranks and micro-batches
Prompt, audio and padding are never targets. From random weights, an auxiliary CTC loss on the adapter's output (--ctc) makes the
encoder listen before the LM has learnt to ignore it; it stands in for the pretrained encoder that real runs start from.

    python sft.py --init random --ctc 1 --data train.jsonl --dev dev.jsonl --out runs/base                # one process
    torchrun --nproc_per_node 8 sft.py --student runs/base --data td.jsonl --dev dev.jsonl --out runs/td  # eight, same update
    torchrun --nproc_per_node 8 sft.py --init_encoder GLM_ASR --init_lm QWEN --data train.jsonl ...       # a student from parts

--out then holds the best checkpoint on dev (without --dev: the last), --out/state/step-N the last one with all that --resume needs,
and metrics.jsonl and metrics.png.
"""

import argparse
import bisect
import itertools
import json
import math
import os
import signal
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchaudio
from tokenizers import AddedToken
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

import data
import model


# ---------------------------------------------------------------------------- the same in sft.py and distill.py (a test compares)

def setup(args):
    """Join the processes torchrun started, if any -> rank, world, device, and a list that SIGTERM makes non-empty."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    kind = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    torch.manual_seed(args.seed)  # for random initial weights; every later draw is keyed on (seed, step, utterance)
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    return rank, world, device, stop


def all_sum(values, device) -> list[float]:
    """Sum numbers over all ranks: all of a log line in one collective, and at each step the token count and the stop flag."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def average_gradients(parameters, n_tokens):
    """Gradient of the sum over this rank's tokens -> gradient of the mean over all N tokens of the step, the same on every rank.

    This takes DistributedDataParallel's place: that averages over ranks, so that a token's weight depends on where it landed, and
    wants every rank to run the same number of backwards.
    """
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)  # a rank without a token has nothing to add, and still takes part
    gradients = [p.grad for p in parameters]
    while dist.is_initialized() and gradients:  # flat buckets of 128 MiB: a collective a tensor was measured 10 times slower
        sizes = list(itertools.accumulate(g.numel() for g in gradients))
        n = max(1, bisect.bisect_right(sizes, 2 ** 25))
        bucket, gradients = gradients[:n], gradients[n:]
        flat = torch.cat([g.flatten() for g in bucket])
        dist.all_reduce(flat)
        for g, part in zip(bucket, flat.split([g.numel() for g in bucket])):
            g.copy_(part.view_as(g))
    torch._foreach_div_([p.grad for p in parameters], max(1.0, n_tokens))


def learning_rate(step, args) -> float:
    """Linear warm-up over --warmup steps, then a cosine down to zero at --steps."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / max(1, args.steps - args.warmup)))


def optimizer_for(parameters, args):
    """AdamW on fp32 master weights; weight decay on matrices only, not on norms and biases."""
    matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
                             lr=args.lr, betas=(0.9, 0.98))


def dev_error(asr, utterances, args, rank, world) -> dict[str, float]:
    """Greedy errors on dev, languages pooled, ranks share the clips -> {"dev_error": percent, "dev_length": units written / in reference}."""
    hyps = model.transcribe(asr, utterances, rank, world, args.eval_batch, args.max_new_tokens)
    counts = [data.edit_counts(u.text, hyps[u.id]["hyp"], u.language) for u in utterances if u.id in hyps]
    errors, units, extra = all_sum([sum(c.errors for c in counts), sum(c.units for c in counts),
                                    sum(c.insertions - c.deletions for c in counts)], asr.device)
    return {"dev_error": 100 * errors / units, "dev_length": 1 + extra / units} if units else {"dev_error": math.nan, "dev_length": math.nan}


class Log:
    """metrics.jsonl and a progress bar on rank 0; nothing on the others."""
    def __init__(self, args, rank, start):
        self.path, self.rank = Path(args.out) / "metrics.jsonl", rank
        self.bar = tqdm(total=args.steps, initial=start, desc=Path(args.out).name, unit="step", disable=rank > 0,
                        mininterval=0.5 if sys.stderr.isatty() else 20)
        if rank == 0 and start == 0:
            self.path.unlink(missing_ok=True)
        elif rank == 0 and self.path.exists():  # steps after the restored one are about to be made again
            rows = [json.loads(line) for line in self.path.open() if line.endswith("}\n")]  # a killed run may leave half a line
            data.write_jsonl(self.path, [row for row in rows if row["step"] <= start])

    def write(self, record):
        if self.rank == 0:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            self.bar.write("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items()))


def save_best(asr, out, error, best) -> float:
    """Keep --out at the best checkpoint on dev -> the best error so far."""
    if error < best:
        model.save(asr, out)
    return min(error, best)


def draw_metrics(out) -> None:
    """metrics.jsonl -> metrics.png: loss, dev error and, where they are logged, overlap and health of the rollouts over steps."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    records = [json.loads(line) for line in (Path(out) / "metrics.jsonl").open()]
    panels = [("loss, nats per token", ["loss", "ctc"]), ("dev error, %", ["dev_error"]),
              ("agreement with the teacher", ["overlap", "top1_agreement", "mass_student", "mass_teacher"]),
              ("share of rollouts", ["truncated", "empty", "repeats"])]
    panels = [(title, found) for title, keys in panels if (found := [k for k in keys if any(k in r for r in records)])]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3.6 * len(panels), 3), layout="constrained", squeeze=False)
    for axis, (title, keys) in zip(axes[0], panels):
        for key in keys:
            points = [(r["step"], r[key]) for r in records if key in r]
            axis.plot(*zip(*points), "o-" if len(points) < 12 else "-", markersize=3, label=key)
        axis.set(title=title, xlabel="step", ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
        if len(keys) > 1:
            axis.legend(frameon=False, fontsize="small")
    figure.savefig(Path(out) / "metrics.png", dpi=110)
    pyplot.close(figure)


# ---------------------------------------------------------------------------- what is SFT's own

def spec_augment(mel, utterance, step, seed, freq=20, share=0.08):
    """SpecAugment (Park et al. 2019) by torchaudio: two bands of mel bins and two stretches of time set to the clip's mean.

    mel (n_mels, T) -> same. Drawn from (seed, step, utterance id) alone, like everything random here.
    """
    u = data.keyed_uniforms(seed, step, [utterance.id], 1)[0, 0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(u * 2 ** 24))
        for _ in range(2):
            mel = torchaudio.functional.mask_along_axis(mel[None], freq, mel.mean().item(), axis=1)[0]
            mel = torchaudio.functional.mask_along_axis(mel[None], max(1, int(share * mel.shape[1])), mel.mean().item(), axis=2)[0]
    return mel


def pad_responses(rows, pad_id, device):
    """Lists of ids -> ids (B, R), mask (B, R) True on real tokens."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=device)
    mask = torch.arange(width, device=device) < torch.tensor([len(row) for row in rows], device=device)[:, None]
    return ids, mask


def cross_entropy_sum(asr, hidden, targets) -> torch.Tensor:
    """Sum over response tokens of -log p_S(target): hidden (N, D), targets (N,) -> nats. Blocked ids have probability 0."""
    z = asr.head(hidden).float().masked_fill(asr.blocked, -math.inf)  # (N, V): response rows only
    return F.cross_entropy(z, targets, reduction="sum")


def ctc_sum(ctc_head, prompt, responses, eos_id):
    """CTC (Graves et al. 2006) on the adapter's output, EOS left out; the blank is the class after the vocabulary.

    -> sum of -log p (nats) over clips whose tokens fit their frames, and how many clips don't fit and are left out.
    """
    labels = [torch.tensor([i for i in row if i != eos_id], dtype=torch.long) for row in responses]
    need = torch.tensor([len(row) + int((row[1:] == row[:-1]).sum()) for row in labels])  # a repeat needs a blank between
    fits = (need > 0) & (need <= prompt.n_audio.cpu())
    if not fits.any():
        return prompt.audio.sum() * 0.0, len(labels)
    logp = ctc_head(prompt.audio[fits.to(prompt.audio.device)].float()).log_softmax(-1).transpose(0, 1)  # (A, B, V + 1)
    kept = [row for row, ok in zip(labels, fits) if ok]
    loss = F.ctc_loss(logp, torch.cat(kept).to(logp.device), prompt.n_audio.cpu()[fits], torch.tensor([len(r) for r in kept]),
                      blank=ctc_head.out_features - 1, reduction="sum")
    return loss, int((~fits).sum())


def make_student(args, train, device):
    """--student, or --init_encoder with --init_lm, or --init random with --tokenizer or one trained on the transcripts."""
    if args.student:
        return model.load_student(args.student, device)
    if args.init_encoder:
        return student_from_parts(args.init_encoder, args.init_lm, device)
    tokenizer = model.load_tokenizer(args.tokenizer) if args.tokenizer else model.train_tokenizer((u.text for u in train), args.vocab_size)
    return model.random_student(tokenizer, args.d_model, args.encoder_layers, args.lm_layers, args.heads, device)


@record  # torchrun then shows what stopped a process, at the end
def main(args):
    """Train: see the top of this file."""
    rank, world, device, stop = setup(args)
    train = [u for path in args.data for u in data.read_manifest(path)]
    dev = data.read_manifest(args.dev) if args.dev else []
    data.check_labelled(train + dev)
    asr = make_student(args, train, device)
    modules = {}
    if args.ctc:
        modules["ctc_head"] = nn.Linear(asr.head.in_features, asr.head.out_features + 1).to(device)  # thrown away after training
    parameters = [p for m in (asr.net, *modules.values()) for p in m.parameters()]
    optimizer = optimizer_for(parameters, args)
    resumed = model.load_training(args.out, asr, optimizer, modules) if args.resume else None
    start, best = (resumed["step"], resumed["best"]) if resumed else (0, math.inf)
    if rank == 0 and not args.resume and any((Path(args.out) / name).exists() for name in ("metrics.jsonl", "state")):
        raise FileExistsError(f"{args.out} holds an earlier run: continue it with --resume, or choose another --out")
    flags = {k: v for k, v in vars(args).items() if k not in ("out", "resume", "device", "workers")}
    changed = {k: (resumed["flags"].get(k), v) for k, v in flags.items() if resumed and resumed["flags"].get(k) != v}
    if rank == 0 and changed:
        print("resumed with other flags than before: " + ", ".join(f"--{k} {old} -> {new}" for k, (old, new) in changed.items()))
    Path(args.out).mkdir(parents=True, exist_ok=True)
    plan = data.Plan(data.measure(train), args.batch, args.seed)
    augment = partial(spec_augment, seed=args.seed) if args.spec_augment else None
    steps = data.Steps(train, plan, args.micro_batch, rank, world, asr.n_mels, augment)
    if rank == 0:
        print(f"{sum(p.numel() for p in asr.net.parameters()):,} parameters, {len(train)} clips, {plan.steps_per_epoch} steps an epoch, "
              f"{args.batch} clips a step over {world} process(es) in micro-batches of {args.micro_batch}, on {device}")
    log, sums, rejected, first, began, stopping, trained = Log(args, rank, start), Counter(), Counter(), {}, time.time(), 0, 0

    for step, batches in zip(range(start, args.steps), data.loader(steps, range(start, args.steps), args.workers)):
        # ---- loss and gradient, summed over this rank's micro-batches
        n_tokens = 0
        for batch in batches:
            rejected.update(reason for reason, _ in batch.rejected)
            first = dict(batch.rejected[::-1]) | first
            if not batch.utterances:
                continue
            responses = [asr.encode_text(u.text) for u in batch.utterances]
            ids, mask = pad_responses(responses, asr.pad_id, device)
            prompt = model.encode(asr, batch)
            loss = cross_entropy_sum(asr, model.response_hidden(asr, prompt, ids, mask), ids[mask])
            sums.update({"loss": loss.detach(), "audio_sec": batch.audio_sec})
            if args.ctc:
                ctc, skipped = ctc_sum(modules["ctc_head"], prompt, responses, asr.eos_id)
                loss = loss + args.ctc * ctc
                sums.update({"ctc": ctc.detach(), "ctc_skipped": skipped})
            loss.backward()
            n_tokens += sum(map(len, responses))
        sums["tokens"] += n_tokens

        # ---- update: every response token of the step weighs 1 / N, whatever rank and micro-batch it landed in
        n_tokens, stopping = all_sum([n_tokens, len(stop)], device)
        average_gradients(parameters, n_tokens)
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.clip).item()
        if not math.isfinite(grad_norm):
            raise FloatingPointError(f"step {step}: gradient norm {grad_norm}; clips {[u.id for b in batches for u in b.utterances]}")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        if n_tokens:  # without a token there is no gradient, and AdamW would still decay the weights
            optimizer.step()
        trained += n_tokens
        optimizer.zero_grad(set_to_none=True)
        log.bar.update()

        # ---- bookkeeping: the weights of step + 1 updates
        done = step + 1 == args.steps or stopping > 0
        if (step + 1) % args.log_every == 0 or done:
            loss, ctc, tokens, audio_sec, skipped, dropped = all_sum(
                [float(sums[k]) for k in ("loss", "ctc", "tokens", "audio_sec", "ctc_skipped")] + [rejected.total()], device)
            n = max(1, tokens)  # 0 only if every clip was rejected
            log.write({"step": step + 1, "loss": loss / n, **({"ctc": ctc / n, "ctc_skipped": int(skipped)} if args.ctc else {}),
                       "grad_norm": grad_norm, "lr": group["lr"], "tokens": int(tokens), "rejected": int(dropped),
                       "audio_per_sec": audio_sec / (time.time() - began)})
            sums, began = Counter(), time.time()
        if dev and ((step + 1) % args.eval_every == 0 or step + 1 == args.steps):
            paused = time.time()
            error = dev_error(asr, dev, args, rank, world)
            log.write({"step": step + 1} | error)
            best = save_best(asr, args.out, error["dev_error"], best) if rank == 0 else min(error["dev_error"], best)
            began += time.time() - paused
        if rank == 0 and ((step + 1) % args.save_every == 0 or done):
            model.save_training(args.out, step + 1, asr, optimizer, modules, {"best": best, "flags": flags})
        if stopping:
            break

    if rank == 0 and not dev:
        model.save(asr, args.out)
    if rank == 0:
        draw_metrics(args.out)
    for reason, n in rejected.items():
        print(f"rank {rank}: {n} clips rejected: {reason} (first: {first[reason]})")
    log.bar.close()
    if world > 1:
        dist.barrier()  # without it, gloo on a CPU may abort in the line below
        dist.destroy_process_group()
    if start < args.steps and not trained:
        raise ValueError(f"none of the clips could be trained on; first: {next(iter(first.values()), 'on another process')}")
    if stopping and step + 1 < args.steps:
        raise SystemExit(143)  # as a shell reports SIGTERM: a scheduler can tell it from success


# ---------------------------------------------------------------------------- a student from parts

def student_from_parts(encoder, lm, device="cpu") -> model.ASR:
    """Join the audio encoder of one checkpoint and a Qwen2, Qwen2.5 or Qwen3 causal LM to a new student.

    The adapter is drawn from torch's global generator. Tokens of the prompt that the LM lacks are added.
    Raises FileNotFoundError, and ValueError naming the checkpoint and what in it does not fit.
    """
    path = model.find_checkpoint(lm)
    lm_config = read_lm_config(path)
    tied = lm_config["tie_word_embeddings"]
    tokenizer = model.load_tokenizer(path)
    n_text = min(len(tokenizer), lm_config["vocab_size"])  # rows that mean a token
    add_prompt_tokens(tokenizer)
    n_rows = max(lm_config["vocab_size"], model.round_up(len(tokenizer), 64))
    ids = model.special_ids(tokenizer, model.SPECIAL, n_rows)

    whisper_config, tensors = read_encoder(encoder)
    for name, tensor in model.read_weights(path).items():
        tensors["lm." + name] = tensor
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    if tied:
        model.tie_head(tensors, path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if "lm." + name not in tensors:
            raise ValueError(f"{path}: its weights lack {name}")
    extend_vocabulary(tensors, n_text, n_rows, tied)

    net = model.empty_student(model.student_config(lm_config, whisper_config, ids, n_rows))
    adapter = net.audio_encoder.adapting.to_empty(device="cpu")
    for layer in (adapter[0], adapter[2]):
        layer.reset_parameters()
    for name, tensor in adapter.state_dict().items():
        tensors["audio_encoder.adapting." + name] = tensor
    model.load_weights(net, tensors, f"{encoder} and {lm}")
    return model.assemble(net, tokenizer, device)


def read_lm_config(path) -> dict:
    """Read config.json of a causal LM -> its keys, with the key lm_type of a student's config.json.

    Raises ValueError for an LM that a student cannot have.
    """
    config = json.loads((path / "config.json").read_text())
    lm_type = config.get("model_type")
    if lm_type not in model.LANGUAGE_MODELS:
        raise ValueError(f"{path}/config.json: model_type {lm_type!r}; "
                         f"expected one of {', '.join(model.LANGUAGE_MODELS)}")
    untied = {"tie_word_embeddings": False}  # transformers' default, not ARK-ASR's
    return untied | config | {"lm_type": lm_type}


def add_prompt_tokens(tokenizer) -> None:
    """Add to a tokenizer the special tokens of the prompt that it lacks."""
    vocabulary = tokenizer.get_vocab()
    for token in model.SPECIAL:
        if token not in vocabulary:
            tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)])


def extend_vocabulary(tensors, n_text, n_rows, tied) -> None:
    """Give embeddings and head of an LM n_rows rows; the first n_text mean a token and stay.

    New embeddings start at the mean of the text's, with its spread; new rows of an untied head at the mean.
    """
    table = tensors["lm.model.embed_tokens.weight"][:n_text]       # (n_text, D)
    noise = torch.randn(n_rows - n_text, table.shape[1])
    table = torch.cat([table, table.mean(0) + table.std(0) * noise])
    tensors["lm.model.embed_tokens.weight"] = table
    if tied:
        tensors["lm.lm_head.weight"] = table
        return
    head = tensors["lm.lm_head.weight"][:n_text]
    tensors["lm.lm_head.weight"] = torch.cat([head, head.mean(0).expand(n_rows - n_text, -1)])


def read_encoder(name) -> tuple[dict, dict[str, torch.Tensor]]:
    """Read a GLM-ASR, ARK-ASR or Whisper checkpoint's encoder -> whisper_config, {our name: tensor}.

    Of GLM-ASR, transformers' layout is read and the original one, which is ARK-ASR's.
    """
    path = model.find_checkpoint(name)
    config = json.loads((path / "config.json").read_text())
    tensors = model.read_weights(path)
    if config.get("model_type") == "glmasr":
        return convert_glmasr_encoder(path, config["audio_config"], tensors)
    return convert_whisper_encoder(path, config.get("whisper_config", config), tensors)


def convert_whisper_encoder(path, config, tensors):
    """Whisper's encoder, and ARK-ASR's, which has its names -> whisper_config, {our name: tensor}.

    Whisper adds a table of positions where this encoder rotates queries and keys: its weights fit, the
    positions have to be learnt anew. Its last LayerNorm becomes the one before the adapter.
    """
    prefixes = ("audio_encoder.whisper.", "model.encoder.", "encoder.")
    prefix = next((prefix for prefix in prefixes if prefix + "conv1.weight" in tensors), None)
    if prefix is None:
        raise ValueError(f"{path}: no Whisper-shaped encoder among its weights, "
                         f"such as {sorted(tensors)[:3]}")
    weights = {}
    for name, tensor in tensors.items():
        if name.startswith("audio_encoder.layer_norm."):
            weights[name] = tensor
        elif name.startswith(prefix):
            ours = "audio_encoder.whisper." + name.removeprefix(prefix)
            if prefix != "audio_encoder.whisper.":
                ours = ours.replace("whisper.layer_norm.", "layer_norm.")
            if not ours.startswith(model.UNUSED_WEIGHTS):
                weights[ours] = tensor
    keys = ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "num_mel_bins")
    return {key: config[key] for key in keys}, weights


# Parts of names in transformers' GLM-ASR -> ours, replaced in this order.
GLMASR_NAMES = {
    "audio_tower.norm.": "audio_encoder.layer_norm.",
    "audio_tower.": "audio_encoder.whisper.",
    ".o_proj.": ".out_proj.",
    ".input_layernorm.": ".self_attn_layer_norm.",
    ".post_attention_layernorm.": ".final_layer_norm.",
    ".mlp.fc": ".fc",
}


def convert_glmasr_encoder(path, config, tensors):
    """transformers' GLM-ASR encoder -> whisper_config, {our name: tensor in our row order}."""
    rope = config.get("rope_parameters") or {}
    if (rope.get("rope_theta", 1e4), rope.get("partial_rotary_factor", 0.5)) != (1e4, 0.5):
        raise ValueError(f"{path}/config.json: rope_parameters {rope}; "
                         "expected theta 10000 on half of each head")
    heads = config["num_attention_heads"]
    weights = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("model.")  # transformers' name in memory; on disk it leaves this out
        if not name.startswith("audio_tower."):
            continue
        for theirs, ours in GLMASR_NAMES.items():
            name = name.replace(theirs, ours)
        if ".q_proj." in name or ".k_proj." in name:
            tensor = interleave_rope(tensor, heads)
        weights[name] = tensor
    whisper_config = {
        "d_model": config["hidden_size"],
        "encoder_layers": config["num_hidden_layers"],
        "encoder_attention_heads": heads,
        "encoder_ffn_dim": config["intermediate_size"],
        "num_mel_bins": config.get("num_mel_bins", 128),
    }
    return whisper_config, weights


def interleave_rope(weight, heads):
    """Undo transformers' row order of q and k, in a weight or bias: (heads * head_dim, ...) -> same.

    Of each head's rows, the first half goes from [0, 2, .., 1, 3, ..] to [0, 1, 2, 3, ..].
    """
    rows = weight.unflatten(0, (heads, -1))                        # (heads, head_dim, ...)
    n_pairs = rows.shape[1] // 4
    even = rows[:, :n_pairs]
    odd = rows[:, n_pairs:2 * n_pairs]
    pairs = torch.stack([even, odd], dim=2).flatten(1, 2)          # (heads, head_dim / 2, ...)
    return torch.cat([pairs, rows[:, 2 * n_pairs:]], dim=1).flatten(0, 1)


# ---------------------------------------------------------------------------- flags

def parse_args(argv=None):
    """Flags -> namespace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = lambda flag, default, text, **kw: parser.add_argument(flag, default=default, help=f"{text} (default: {default})",
                                                                **(kw if "action" in kw else {"type": type(default)} | kw))
    add("--data", None, "manifests to train on", type=str, nargs="+", required=True)
    add("--dev", None, "manifest to measure the error rate on while training", type=str)
    add("--out", None, "folder to write to", type=str, required=True)
    add("--resume", False, "continue from the newest state in --out, if there is one", action="store_true")
    add("--seed", 0, "decides weights, data order and augmentation")
    add("--device", "auto", "where to run", choices=["auto", "cpu", "cuda"])
    # student
    add("--student", None, "checkpoint to start from, a directory or a Hub id", type=str)
    add("--init_encoder", None, "or: encoder of a GLM-ASR, ARK-ASR or Whisper checkpoint, with --init_lm and a new adapter", type=str)
    add("--init_lm", None, "Qwen2, Qwen2.5 or Qwen3 causal LM to put behind it", type=str)
    add("--init", None, "or: random weights of the size below", type=str, choices=["random"])
    add("--tokenizer", None, "checkpoint directory to take the tokenizer from (else one is trained on --data)", type=str)
    add("--vocab_size", 640, "size of that trained tokenizer")
    add("--d_model", 144, "width of encoder and LM")
    add("--encoder_layers", 3, "encoder blocks")
    add("--lm_layers", 2, "LM blocks")
    add("--heads", 4, "attention heads of both")
    # optimisation
    add("--steps", 1000, "optimiser updates")
    add("--batch", 32, "utterances a step, over all processes")
    add("--micro_batch", 16, "utterances a forward; lower it when out of memory, the update stays the same")
    add("--lr", 1.5e-3, "peak learning rate")
    add("--warmup", 100, "updates of linear warm-up")
    add("--weight_decay", 0.01, "AdamW's, on matrices")
    add("--clip", 1.0, "largest gradient norm")
    add("--ctc", 0.0, "weight of the auxiliary CTC loss; from random weights the demo uses 1")
    add("--spec_augment", False, "mask bands and stretches of the features", action="store_true")
    # bookkeeping
    add("--log_every", 25, "steps between log lines")
    add("--eval_every", 250, "steps between dev error rates")
    add("--save_every", 250, "steps between training states")
    add("--eval_batch", 32, "utterances a batch in dev decoding")
    add("--max_new_tokens", 64, "longest transcript in dev decoding, tokens")
    add("--workers", 1, "loader processes a rank")
    args = parser.parse_args(argv)
    if bool(args.init_encoder) != bool(args.init_lm):
        parser.error("--init_encoder and --init_lm go together")
    if sum(map(bool, (args.student, args.init_encoder, args.init))) != 1:
        parser.error("give one of --student, --init_encoder with --init_lm, and --init random")
    return args


if __name__ == "__main__":
    main(parse_args())
