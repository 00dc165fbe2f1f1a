"""On-policy distillation (OPD) for speech recognition: the student writes, a stronger frozen teacher scores every token of it.

For every batch of audio x:
  (1) rollout   y ~ p_S(. | x)                      the student writes a transcript, sampled          no gradient
  (2) teacher   z_T[t] = logits of T at (x, y_<t)   the teacher reads the same ids on the same audio  no gradient
  (3) student   z_S[t] = logits of S at (x, y_<t)   teacher forcing on its own words                  differentiable
  (4) loss      L = 1/N sum_t D_t,  D_t = KL(p_S(.|t) || p_T(.|t)) = sum_v p_S(v) (log p_S(v) - log p_T(v))
                                                    exact: v runs over every id that both vocabularies have
  (5) update    one AdamW step
The transcripts of --data are never read: all that is learnt comes from the teacher.

  symbol     variable     shape        meaning
  y          ids, mask    (B, R)       rollout with its EOS, right-padded; True on emitted tokens
  z_S, z_T   z_s, z_t     (N, V)       logits that predict each emitted token, both in the student's vocabulary
  p, log p   p_, logp_                 probabilities; log-probabilities in nats
  N          n_tokens     ()           emitted tokens that the teacher can score, EOS included: all ranks, all micro-batches

Differs from the paper (arXiv 2605.28139):
  [dev 1] Reverse KL over the full vocabulary. Eq. 1 is forward KL, KL(p_T || p_S), on the union of both top-k sets:
          --divergence forward --support union --top_k 32 --temperature 0
          (Positions with fewer than two tokens in the union, which Eq. 1 leaves out, count here with D_t = 0.)
  [dev 2] Rollouts are sampled at temperature 1, the distribution that the loss is an expectation over; the paper decodes greedily.
  [dev 3] The teacher is given the student's token ids, mapped through equal token strings, not text that is tokenised again.
  [dev 4] One mean over the step's N tokens; the public code takes a mean per rank, then a mean over ranks.
  [dev 5] An empty rollout (EOS at once) is scored like any other, where the paper falls back to the reference text.
Like GKD (arXiv 2306.13649), the gradient treats the visited prefixes as given: there is no REINFORCE term.

    torchrun distill.py                                                                             # the whole demo, from nothing
    python distill.py --student runs/x/sft --teacher runs/x/teacher --data pool.jsonl --dev dev.jsonl --out runs/x/opd
    torchrun --nproc_per_node 8 distill.py --student ... (the same)                                 # eight processes, same update

--out then holds the best checkpoint on dev (without --dev: the last), --out/state/step-N the last one with all that --resume needs,
and metrics.jsonl and metrics.png. Keys of metrics.jsonl, means and sums since the record before (*: of the logged step alone):
  step, loss (nats per token), grad_norm* (before clipping), lr*, tokens (N, summed), tokens_per_clip, audio_per_sec
  truncated, empty, repeats   share of rollouts cut at --max_new_tokens; of EOS alone; with three tokens in a row that come twice
  not_scored, rejected        tokens behind an id that the teacher lacks; clips left out since this process started
  top1_agreement*, overlap*, mass_student*, mass_teacher*, entropy*, entropy_teacher*     see model.agreement
  dev_error, dev_length       greedy errors on --dev, %; units written over units in the references
"""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

import data
import model


# ---------------------------------------------------------------------------- the objective: pure tensors, copies out alone

def reverse_kl(z_s, z_t):
    """KL(p_S || p_T) of each row: logits (N, V) twice -> (N,) nats. -inf marks ids that are ruled out, at the same places in both.

      D_t = sum_v p_S(v) (log p_S(v) - log p_T(v))                                           [dev 1]
    """
    logp_s = z_s.log_softmax(-1)                                                # (N, V)
    logp_t = z_t.log_softmax(-1)                                                # (N, V)
    log_ratio = (logp_s - logp_t).masked_fill(torch.isneginf(logp_s), 0.0)      # 0 log 0 = 0
    return (logp_s.exp() * log_ratio).sum(-1)                                   # (N,)


def forward_kl(z_s, z_t):
    """KL(p_T || p_S) of each row, arguments as above -> (N,) nats.

      D_t = sum_v p_T(v) (log p_T(v) - log p_S(v))                                           (Eq. 1, on a union support)
    """
    logp_s = z_s.log_softmax(-1)                                                # (N, V)
    logp_t = z_t.log_softmax(-1)                                                # (N, V)
    log_ratio = (logp_t - logp_s).masked_fill(torch.isneginf(logp_t), 0.0)      # 0 log 0 = 0
    return (logp_t.exp() * log_ratio).sum(-1)                                   # (N,)


def sampled_kl(z_s, z_t, y):
    """Reverse KL estimated from the emitted tokens alone, as policy gradients do: logits (N, V), ids y (N,) ~ p_S -> (N,) nats.

      value      -A_t,   A_t = log p_T(y_t) - log p_S(y_t)      its mean over y ~ p_S is KL(p_S || p_T)
      gradient   -A_t d log p_S(y_t),  A_t taken as a number

    Unbiased (for the sum over positions; N itself depends on the draws) only where y was drawn from this very p_S: temperature 1.
    reverse_kl sums over all v what this leaves to one draw; it is here to compare with, and for teachers that give no more than the
    log-probability of a token.
    """
    logp_s = z_s.log_softmax(-1).gather(-1, y[:, None])[:, 0]                   # (N,)
    logp_t = z_t.log_softmax(-1).gather(-1, y[:, None])[:, 0]                   # (N,)
    impossible = torch.isneginf(logp_s)  # rounding on a GPU may draw an id of probability 0: it says nothing
    logp_s = logp_s.masked_fill(impossible, 0.0)
    logp_t = logp_t.masked_fill(impossible, 0.0)
    advantage = (logp_t - logp_s).detach()                                      # (N,)
    return -advantage * (1 + logp_s - logp_s.detach())                          # (N,) the bracket is 1, its gradient d log p_S


def union_support(z_s, z_t, k):
    """U_t = topk(z_S[t], k) u topk(z_T[t], k) of section 3.3: logits (N, V) twice -> (N, V) bool, True on the support."""
    k = min(k, z_s.shape[-1])
    support = torch.zeros_like(z_s, dtype=torch.bool)
    support.scatter_(-1, z_s.topk(k).indices, True)
    support.scatter_(-1, z_t.topk(k).indices, True)
    return support


def token_divergence(z_s, z_t, y, divergence="reverse", support="full", top_k=32, tau=1.0):
    """D_t of each row: logits z_s, z_t (N, V) of one vocabulary, emitted ids y (N,) -> (N,) nats.

      reverse   D_t = tau^2 KL(p_S || p_T),   p_S = softmax(z_S / tau), p_T = softmax(z_T / tau)
      forward   D_t = tau^2 KL(p_T || p_S)
      support   full: all ids; union: U_t, both sides renormalised on it (Eq. 1); sampled: y alone, reverse only

    tau^2: gradients of logits divided by tau shrink by 1 / tau twice over (Hinton et al. 2015, section 2). Ids outside the support get
    no gradient: what the student wastes there is never pulled back, and with k = 1 and equal argmax the loss is 0.
    Pass logits or log-probabilities, which differ by a constant a row; never some of each.
    """
    if support == "sampled":
        return sampled_kl(z_s, z_t, y)
    if support == "union":
        outside = ~union_support(z_s.detach(), z_t, top_k)  # which tokens are compared is a choice: nothing to differentiate
        z_s = z_s.masked_fill(outside, -math.inf)
        z_t = z_t.masked_fill(outside, -math.inf)
    kl = {"reverse": reverse_kl, "forward": forward_kl}[divergence]
    return tau ** 2 * kl(z_s / tau, z_t / tau)


def backward_in_chunks(hidden_s, hidden_t, y, head_s, head_t, to_teacher, divergence, chunk):
    """Heads, loss and gradient of N rows, `chunk` rows at a time, so that nothing of size (N, V) ever exists -> sum_t D_t, ().

    hidden_s (N, D) with its graph, hidden_t (N, D_t), y (N,) emitted ids; head_s, head_t: hidden rows -> logits, each in its own
    vocabulary; to_teacher (V,): the teacher's id of each student id, -1: none; divergence: (z_s, z_t, y) -> D_t (C,).
    The rows are cut from the graph: a chunk's backward ends in the head's weight and in the rows, and one last backward carries the
    rows' gradient into the body. The gradient is that of the sum; dividing by N is average_gradients' part.
    """
    total = torch.zeros((), device=hidden_s.device)
    grads = []
    no_counterpart = to_teacher < 0                                             # (V,) ruled out on both sides
    for i in range(0, len(hidden_s), chunk):
        rows = hidden_s[i:i + chunk].detach().requires_grad_()                  # (C, D)
        z_s = head_s(rows).masked_fill(no_counterpart, -math.inf)               # (C, V)
        with torch.no_grad():
            z_t = head_t(hidden_t[i:i + chunk])                                 # (C, V_t)
            z_t = z_t[:, to_teacher.clamp(min=0)].masked_fill(no_counterpart, -math.inf)    # (C, V)
        d = divergence(z_s, z_t, y[i:i + chunk])                                # (C,)
        d.sum().backward()
        grads.append(rows.grad)
        total += d.detach().sum()
    if grads:
        hidden_s.backward(torch.cat(grads))                                     # (N, D)
    return total


# ---------------------------------------------------------------------------- one step

def backward_of_batch(student, teacher, to_teacher, batch, step, args):
    """(1) to (4) for one micro-batch: adds the gradient of sum_t D_t to the student's.

    -> sums for the log, and hidden_s (N, D), hidden_t (N, D_t) for `model.agreement`.
    """
    # (1) rollout   y ~ p_S(. | x)
    #     The audio encoder runs once, with its graph; the rollout reads its output without.                    [dev 2]
    #     An empty transcript (EOS at once) is a rollout like any other.                                        [dev 5]
    prompt_s = model.encode_audio(student, batch)
    ids, mask = visit(student, prompt_s, batch, step, args)                     # (B, R)
    scored = model.readable_prefix(ids, mask, to_teacher)                       # (B, R) the mask up to an id the teacher lacks
    if args.states == "first_error":
        scored = scored & up_to_first_difference(ids, references(student, batch)[0])

    # (2) teacher   z_T[t] = logits of T at (x, y_<t)
    #     The same ids, in the teacher's numbering, on the same audio; here its hidden rows, in (4) its head.   [dev 3]
    with torch.no_grad():
        prompt_t = model.encode_audio(teacher, batch)
        ids_t = to_teacher[ids].clamp(min=0)                                    # (B, R)
        hidden_t = model.response_hidden(teacher.body, prompt_t.embeds, prompt_t.mask, ids_t, scored)       # (N, D_t)

    # (3) student   z_S[t] = logits of S at (x, y_<t), now with gradients
    hidden_s = model.response_hidden(student.body, prompt_s.embeds, prompt_s.mask, ids, scored)             # (N, D)

    # (4) loss      sum_t D_t,  D_t = KL(p_S(.|t) || p_T(.|t)),  p = softmax(z)
    divergence = partial(token_divergence, divergence=args.divergence, support=args.support, top_k=args.top_k, tau=args.tau)
    loss = backward_in_chunks(hidden_s, hidden_t, ids[scored], student.logits, teacher.logits, to_teacher, divergence, args.chunk)

    sums = {"loss": loss, "tokens": len(hidden_s), "not_scored": (mask & ~scored).sum(), "audio_sec": batch.audio_sec}
    return sums | model.rollout_health(ids, mask, student.stop), hidden_s.detach(), hidden_t


def visit(student, prompt, batch, step, args):
    """Whose states are learnt at -> ids (B, R), mask (B, R).

    --states rollout (the method): what the student itself writes. Two controls, which read transcripts:
      reference      the transcripts instead (off-policy)
      first_error    rollouts, scored up to and including the first id that differs from the transcript's
    """
    if args.states == "reference":
        return references(student, batch)
    uniforms = data.keyed_uniforms(args.seed, step, [u.id for u in batch.utterances], args.max_new_tokens)
    return model.roll_out(student, prompt, args.max_new_tokens, args.temperature, uniforms)


def references(student, batch):
    """Transcripts as responses -> ids (B, R), mask (B, R)."""
    rows = [student.encode_text(u.text) for u in batch.utterances]
    return data.pad_rows(rows, student.pad_id, student.device)


def up_to_first_difference(ids, reference):
    """(B, R), (B, R') -> (B, R) bool: True up to and including the first column in which a row differs from its reference."""
    n = min(ids.shape[1], reference.shape[1])
    differs = torch.ones_like(ids)                                              # columns that only one of them has
    differs[:, :n] = (ids[:, :n] != reference[:, :n]).long()
    before = differs.cumsum(1) - differs                                        # differences strictly before a column
    return before == 0


# ---------------------------------------------------------------------------- the same in sft.py and distill.py (a test compares)

def average_gradients(parameters, n_tokens):
    """Gradient of the sum over this rank's tokens -> gradient of the mean over all N tokens of the step, the same on every rank.

    This takes DistributedDataParallel's place: that averages over ranks, so that a token's weight depends on where it landed, and
    wants every rank to run the same number of backwards.
    """
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)  # a rank without a token has nothing to add, and still takes part
    gradients = [p.grad for p in parameters]
    if dist.is_initialized():
        for i in range(0, len(gradients), 64):  # in flat buckets: a collective a tensor was measured 6 times slower
            bucket = gradients[i:i + 64]
            flat = nn.utils.parameters_to_vector(bucket)
            dist.all_reduce(flat)
            nn.utils.vector_to_parameters(flat, bucket)
    torch._foreach_div_(gradients, max(1.0, n_tokens))


def learning_rate(step, args) -> float:
    """Linear warm-up over --warmup steps, then a cosine down to zero at --steps."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(parameters, args):
    """AdamW on fp32 master weights; weight decay on matrices only, not on norms and biases."""
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))


# ---------------------------------------------------------------------------- the loop

SUMS = ("loss", "tokens", "not_scored", "audio_sec", "seconds", "clips", "truncated", "empty", "repeats", "rejected")


def distil(args):
    """The algorithm at the top of this file."""
    rank, world, device, stop = model.setup(args)
    pool = [u for path in args.data for u in data.read_manifest(path)]
    dev = data.read_manifest(args.dev) if args.dev else []
    data.check_labelled(dev if args.states == "rollout" else dev + pool)
    student, teacher = model.load_pair(args.student, args.teacher, device)
    to_teacher = model.vocabulary_map(student, teacher)                         # (V,) student id -> teacher id, -1: none
    parameters = list(student.net.parameters())
    optimizer = make_optimizer(parameters, args)
    start, best = model.start_run(args, student, optimizer, {}, rank)
    log = model.Log(args, rank, start)
    plan = data.Plan(data.measure(pool), args.batch, args.seed)
    share = data.Steps(pool, plan, args.micro_batch, rank, world, student.n_mels)
    batches = iter(data.loader(share, range(start, args.steps), args.workers))
    if rank == 0:
        n_shared = int((to_teacher >= 0).sum())
        print(f"student {model.n_parameters(student):,} parameters, teacher {model.n_parameters(teacher):,}; "
              f"{n_shared} of {len(student.tokenizer)} student ids stand in the teacher's vocabulary too; {len(pool)} clips, "
              f"{plan.steps_per_epoch} steps an epoch, {args.batch} clips a step over {world} process(es) on {device}")

    sums = Counter()
    trained = 0
    stopping = False
    for step in range(start, args.steps + 1):
        # ---- the weights after `step` updates
        if dev and step > 0 and (step % args.eval_every == 0 or step == args.steps):
            error = model.dev_error(student, dev, args, rank, world)
            log.write({"step": step} | error)
            best = model.keep_best(student, args.out, error["dev_error"], best, rank)
        if step == args.steps:
            break

        # ---- (1) to (4): the gradient of the sum over this rank's tokens
        began = time.time()
        n_tokens = 0
        hidden = None
        for batch in next(batches):
            log.reject(batch.rejected)
            sums["rejected"] += len(batch.rejected)
            if batch.utterances:
                added, *hidden = backward_of_batch(student, teacher, to_teacher, batch, step, args)
                sums.update(added)
                n_tokens += added["tokens"]

        at_teacher = {}
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            at_teacher = model.agreement(hidden, student, teacher, to_teacher, args.top_k, args.chunk)

        # ---- (5) update: every token of the step weighs 1 / N, whatever rank and micro-batch it landed in       [dev 4]
        totals = model.all_sum({"tokens": n_tokens, "stop": len(stop)}, device)
        average_gradients(parameters, totals["tokens"])
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.clip).item()
        if not math.isfinite(grad_norm):
            raise FloatingPointError(f"step {step}: gradient norm {grad_norm}; clips {[pool[i].id for i in plan[step]]}")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        if totals["tokens"]:  # without a token there is no gradient, and AdamW would still decay the weights
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        trained += totals["tokens"]
        stopping = totals["stop"] > 0
        sums["seconds"] += time.time() - began
        log.bar.update()

        # ---- bookkeeping
        done = stopping or step + 1 == args.steps
        if done or (step + 1) % args.log_every == 0:
            t = model.all_sum({k: sums[k] for k in SUMS}, device)
            n_clips = max(1, t["clips"])
            line = {"step": step + 1, "loss": t["loss"] / max(1, t["tokens"]), "grad_norm": grad_norm, "lr": group["lr"],
                    "tokens": int(t["tokens"]), "tokens_per_clip": t["tokens"] / n_clips}
            line |= {k: t[k] / n_clips for k in ("truncated", "empty", "repeats")}
            line |= {k: int(t[k]) for k in ("not_scored", "rejected")}
            line["audio_per_sec"] = t["audio_sec"] * world / t["seconds"]
            log.write(line | at_teacher)
            sums = Counter()
        if rank == 0 and (done or (step + 1) % args.save_every == 0):
            model.save_training(args.out, step + 1, student, optimizer, info={"best": best, "flags": model.kept_flags(args)})
        if stopping:
            break

    if rank == 0 and not dev:
        model.save(student, args.out)
    log.close()
    model.finish()
    if start < args.steps and not trained:
        raise ValueError(f"none of the clips could be trained on; first: {log.first_message()}")
    if stopping and step + 1 < args.steps:
        raise SystemExit(143)  # as a shell reports SIGTERM: a scheduler can tell it from success


# ---------------------------------------------------------------------------- the demo: every stage as a command, then a table

TEACHER = "--d_model 112 --encoder_layers 3 --steps 1800 --lr 2e-3"
TD = "--steps 200 --lr 1e-3 --warmup 20"
ROWS = ("teacher", "base", "more", "opd", "td", "td_opd")


def demo(args):
    """The paper's experiment in miniature: run what is not done yet under --out (default runs/demo), then print its two tables."""
    if int(os.environ.get("RANK", 0)) > 0:
        return  # rank 0 starts every stage, with as many processes as this one was started with
    # Started alone: a process a GPU, or two on CPU cores. Two processes of one thread bear a busy machine better than two threads.
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes == 1:
        processes = min(2, os.cpu_count())
        if args.device != "cpu" and torch.cuda.is_available():
            processes = torch.cuda.device_count()
    root = args.out or "runs/demo"
    data_of = f"{root}/data"
    run = f"torchrun --standalone --nproc_per_node {processes}"
    common = f"--device {args.device} --seed {args.seed}"
    sft = f"{run} sft.py --dev {data_of}/dev.jsonl --resume {common}"
    opd = f"{run} distill.py --teacher {root}/teacher --data {data_of}/train.jsonl --dev {data_of}/dev.jsonl --resume {common}"
    for flag, default in vars(parse_args([])).items():  # any other flag given here is for the stages that distil
        value = getattr(args, flag)
        if value != default and flag not in ("out", "seed", "device"):
            opd += f" --{flag} {value}"
    stages = {
        "data": f"python data.py demo --out {data_of} --seed {args.seed}",
        # The teacher has a corpus of its own: more voices, other sentences, none of the student's audio.
        "teacher": f"{sft} --init random --data {data_of}/teacher.jsonl --out {root}/teacher {TEACHER}",
        "base": f"{sft} --init random --data {data_of}/train.jsonl --tokenizer {root}/teacher --out {root}/base",
        # OPD on the very clips that base was trained on, as in section 4.1; beside it as many more updates on their transcripts.
        "opd": f"{opd} --student {root}/base --out {root}/opd",
        "more": f"{sft} --student {root}/base --data {data_of}/train.jsonl --out {root}/more --steps {args.steps} --lr 1e-3 --warmup 20",
        # TD: a short stage on the teacher's transcripts of a little other audio, then OPD as before.
        "transcripts": f"{run} evaluate.py --model {root}/teacher --data {data_of}/pool.jsonl --out {root}/transcripts "
                       f"--as_manifest {root}/transcripts/td.jsonl --device {args.device}",
        "td": f"{sft} --student {root}/base --data {root}/transcripts/td.jsonl --out {root}/td {TD}",
        "td_opd": f"{opd} --student {root}/td --out {root}/td_opd",
    }
    for name in ROWS:
        stages[f"eval/{name}"] = (f"{run} evaluate.py --model {root}/{name} --data {data_of}/test.jsonl --out {root}/eval/{name} "
                                  f"--device {args.device}")
    stages["overlap"] = (f"{run} overlap.py --student {root}/base --compare {root}/td --teacher {root}/teacher "
                         f"--data {data_of}/test.jsonl --out {root}/overlap {common}")
    seconds = {name: run_stage(Path(root, name), command) for name, command in stages.items()}
    show_result(Path(root), seconds)


def run_stage(out, command) -> float:
    """Print a command and run it, unless OUT/stage.json says that it is done -> seconds it took."""
    print(f"\n$ {command}", flush=True)
    note = out / "stage.json"
    out.mkdir(parents=True, exist_ok=True)
    stage = json.loads(note.read_text()) if note.exists() else {"command": command, "seconds": 0.0, "done": False}
    if stage["command"] != command:
        raise SystemExit(f"{out} was made by another command:\n$ {stage['command']}\nremove it, or choose another --out")
    if stage["done"]:
        print(f"  done before, in {stage['seconds']:.0f} s")
        return stage["seconds"]
    note.write_text(json.dumps(stage))
    program, *words = shlex.split(command)
    words = [str(Path(__file__).parent / word) if word.endswith(".py") else word for word in words]  # scripts lie beside this one
    launcher = ["-m", "torch.distributed.run"] if program == "torchrun" else []
    ours = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")  # this process's place under torchrun
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    environment["OMP_NUM_THREADS"] = "1"  # what torchrun sets too, with a warning
    began = time.time()
    code = subprocess.run([sys.executable, *launcher, *words], env=environment).returncode
    stage["seconds"] += time.time() - began
    stage["done"] = code == 0
    note.write_text(json.dumps(stage))
    if code:
        raise SystemExit(f"the command above ended with exit code {code}")
    return stage["seconds"]


def show_result(root, seconds) -> None:
    """Print Table 1 and Table 2 in miniature; write result.json and result.png."""
    result = {}
    hyps = {}
    for name in ROWS:
        summary = json.loads((root / "eval" / name / "summary.json").read_text())
        rates = {entry["metric"].lower(): entry for entry in summary["results"]} | {"pooled": summary["pooled"]}
        result[name] = {}
        for metric, entry in rates.items():
            result[name] |= {metric: entry["rate"], f"{metric}_interval": [entry["low"], entry["high"]]}
        hyps[name] = [json.loads(line) for line in (root / "eval" / name / "hyps.jsonl").open(encoding="utf-8")]
    overlap = json.loads((root / "overlap" / "overlap.json").read_text())
    for name, report in (("base", overlap), ("td", overlap["compare"])):
        for key in ("vuss", "overlap"):
            result[name] |= {key: report[key]["mean"], f"{key}_interval": [report[key]["low"], report[key]["high"]]}
    for name in ROWS:  # paired over clips; whole voices are resampled, as evaluate.py --compare does
        fewer = [errors_of(a) - errors_of(b) for a, b in zip(hyps["base"], hyps[name])]
        low, high = data.bootstrap(fewer, [row["units"] for row in hyps["base"]], blocks=[row["speaker"] for row in hyps["base"]])
        result[name]["below_base"] = result["base"]["pooled"] - result[name]["pooled"]
        result[name]["below_base_interval"] = [100 * low, 100 * high]
    result["seconds"] = seconds
    (root / "result.json").write_text(json.dumps(result, indent=2))

    print(f"\n{'test errors, %':16}" + "".join(f"{title:24}" for title in ("WER en", "CER zh", "pooled", "below base, points")))
    for name in ROWS:
        print(f"{name:16}" + "".join(with_interval(result[name], key, 2) for key in ("wer", "cer", "pooled", "below_base")))
    print(f"\n{'k = %d' % overlap['k']:16}{'VUSS':24}overlap")
    for name in ("base", "td"):
        print(f"{name:16}" + with_interval(result[name], "vuss", 2) + with_interval(result[name], "overlap", 3))
    print("\nseconds: " + "  ".join(f"{name} {s:.0f}" for name, s in seconds.items()) + f"  all {sum(seconds.values()):.0f}")
    draw_result(result, root / "result.png")
    print(f"{root}/result.json  {root}/result.png")


def errors_of(row) -> int:
    return row["substitutions"] + row["deletions"] + row["insertions"]


def with_interval(row, key, digits) -> str:
    low, high = row[f"{key}_interval"]
    return f"{row[key]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]".ljust(24)


def draw_result(result, path) -> None:
    """Pooled errors of every system as dots with their intervals."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axis = pyplot.subplots(figsize=(6, 2.8), layout="constrained")
    for y, name in enumerate(reversed(ROWS)):
        low, high = result[name]["pooled_interval"]
        axis.plot([low, high], [y, y], color="tab:gray")
        axis.plot(result[name]["pooled"], y, "o", color="tab:red" if "opd" in name else "tab:blue")
    axis.set_yticks(range(len(ROWS)), [name.replace("_", " + ").upper() if name[0] in "to" and name != "teacher" else name
                                       for name in reversed(ROWS)])
    axis.set(xlabel="test errors, %, English words and Mandarin characters pooled (95 % intervals)", xlim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


# ---------------------------------------------------------------------------- flags

def parse_args(argv=None):
    """Flags -> namespace. Defaults are the demo's recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=data.HelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--student", help="checkpoint to start from, a directory or a Hub id; without it, the demo")
    add("--teacher", help="checkpoint that scores, a directory or a Hub id")
    add("--data", nargs="+", help="manifests of audio to distil on; transcripts are not read")
    add("--dev", help="manifest to measure the error rate on while training")
    add("--out", help="folder to write to (the demo: runs/demo)")
    add("--resume", action="store_true", help="continue from the newest state in --out, if there is one")
    add("--seed", type=int, default=0, help="decides data order and rollouts")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="where to run")
    # rollout
    add("--states", default="rollout", choices=["rollout", "reference", "first_error"],
        help="learn at the student's own rollouts, at the transcripts, or at rollouts up to their first difference from them")
    add("--temperature", type=float, default=1.0, help="of the student's sampling; 0 = greedy, as published")
    add("--max_new_tokens", type=int, default=64, help="longest rollout, tokens")
    # objective
    add("--divergence", default="reverse", choices=["reverse", "forward"], help="KL(student || teacher) or KL(teacher || student)")
    add("--support", default="full", choices=["full", "union", "sampled"],
        help="tokens compared: all; both top-k sets, renormalised; the emitted one alone (policy gradient)")
    add("--top_k", type=int, default=32, help="k of the union support, and of the logged overlap")
    add("--tau", type=float, default=1.0, help="temperature of both distributions inside the divergence")
    add("--chunk", type=int, default=128, help="rows whose logits exist at a time")
    # optimisation
    add("--steps", type=int, default=600, help="optimiser updates")
    add("--batch", type=int, default=16, help="utterances a step, over all processes")
    add("--micro_batch", type=int, default=16, help="utterances a forward; lower it when out of memory, the update stays the same")
    add("--lr", type=float, default=1e-3, help="peak learning rate")
    add("--warmup", type=int, default=20, help="updates of linear warm-up")
    add("--weight_decay", type=float, default=0.01, help="AdamW's, on matrices")
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    # bookkeeping
    add("--log_every", type=int, default=25, help="steps between log lines")
    add("--eval_every", type=int, default=100, help="steps between dev error rates")
    add("--save_every", type=int, default=100, help="steps between training states")
    add("--eval_batch", type=int, default=32, help="utterances a batch in dev decoding")
    add("--workers", type=int, default=1, help="loader processes a rank")
    args = parser.parse_args(argv)
    given = [args.student, args.teacher, args.data, args.out]
    if any(given[:3]) and not all(given):
        parser.error("give --student, --teacher, --data and --out together; without any of the first three, the demo runs")
    if args.support == "sampled" and (args.divergence, args.temperature, args.tau) != ("reverse", 1.0, 1.0):
        parser.error("--support sampled estimates reverse KL from tokens drawn at temperature 1: it goes with --divergence reverse, "
                     "--temperature 1 and --tau 1")
    return args


@record  # torchrun then shows what stopped a process, at the end
def main(args):
    if args.student:
        distil(args)
    else:
        demo(args)


if __name__ == "__main__":
    main(parse_args())
