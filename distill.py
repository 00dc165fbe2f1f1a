"""On-policy distillation (OPD) for speech recognition: the student writes, a stronger frozen teacher
scores every token of it.

For every batch of audio x:
  (1) rollout  y ~ p_S(. | x)                     the student writes a transcript   no gradient
  (2) teacher  z_T[t] = logits of T at (x, y_<t)  the teacher reads the same ids    no gradient
  (3) student  z_S[t] = logits of S at (x, y_<t)  teacher forcing on its own words  differentiable
  (4) loss     L = 1/N sum_t D_t,   D_t = KL(p_S(.|t) || p_T(.|t))
                                        = sum_v p_S(v) (log p_S(v) - log p_T(v))
               exact: v runs over every id that both vocabularies have, p_S and p_T are
               renormalised on these (with one vocabulary that changes nothing)
  (5) update   one AdamW step
The transcripts of --data are not read: all that is learnt comes from the teacher. (Only the controls
--states reference and first_error read them.)

  symbol     variable   shape    meaning
  y          ids, mask  (B, R)   rollout with its EOS, right-padded; True on emitted tokens
  z_S, z_T   z_s, z_t   (n, V)   logits that predict each token, both in the student's vocabulary;
                                 n: tokens of a micro-batch
  p, log p   p_, logp_           probabilities; log-probabilities in nats
  N          n_tokens   ()       emitted tokens that the teacher can score, EOS included: of the
                                 whole step, all ranks and micro-batches

Differs from the paper (arXiv 2605.28139):
  [dev 1] Reverse KL over the full vocabulary. Eq. 1 is forward KL, KL(p_T || p_S), on the union of
          both top-k sets: --divergence forward --support union --top_k 32 --temperature 0
          (Positions with fewer than two tokens in the union, which Eq. 1 leaves out, have D_t = 0.)
  [dev 2] Rollouts are sampled at temperature 1, the distribution that the loss is an expectation
          over; the paper decodes greedily.
  [dev 3] The teacher is given the student's token ids, mapped through equal token strings, not text
          that is tokenised again.
  [dev 4] One mean over the step's N tokens; the public code takes a mean per rank, then over ranks.
  [dev 5] An empty rollout (EOS at once) is scored like any other, where the paper falls back to the
          reference text.
Like GKD (arXiv 2306.13649), the gradient treats the visited prefixes as given: there is no
REINFORCE term.

    torchrun distill.py                                          # the whole demo, from nothing
    python distill.py --student runs/x/sft --teacher TEACHER \\
        --data pool.jsonl --dev dev.jsonl --out runs/x/opd
    torchrun --nproc_per_node 8 distill.py --student ...         # eight processes, same update

--out then holds the best checkpoint on dev (without --dev: the last), --out/state/step-N the last
one with all that --resume needs, and metrics.jsonl and metrics.png. Keys of metrics.jsonl, means and
sums since the record before (*: of the logged step alone):
  step, loss (nats per token), grad_norm* (before clipping), lr*, tokens (N, summed), audio_per_sec
  tokens_per_clip             scored tokens of a rollout
  truncated, empty, repeats   share of rollouts cut at --max_new_tokens, that are EOS alone, in which
                              three tokens in a row come twice
  not_scored, rejected        tokens from the first id on that the teacher lacks; clips left out since
                              this process started
  top1_agreement*, overlap*, mass_student*, mass_teacher*, entropy*, entropy_teacher*
                              see model.agreement
  dev_error, dev_length       greedy errors on --dev, %; units written over units in the references
"""

import argparse
import json
import math
import os
import shlex
import shutil
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
from data import at_least_one, not_negative, positive, whole_number


# ---------------------------------------------------------------------------- the objective
# Pure functions of tensors. -inf marks ids that are ruled out; it stands at the same places in z_s
# and z_t. Pass logits or log-probabilities, which differ by a constant a row; never some of each.

def reverse_kl(z_s, z_t):
    """KL(p_S || p_T) of each row: logits (n, V) twice -> (n,) nats.

      D_t = sum_v p_S(v) (log p_S(v) - log p_T(v))                                       [dev 1]
    """
    logp_s = z_s.log_softmax(-1)                                            # (n, V)
    logp_t = z_t.log_softmax(-1)                                            # (n, V)
    log_ratio = (logp_s - logp_t).masked_fill(torch.isneginf(logp_s), 0.0)  # 0 log 0 = 0
    return (logp_s.exp() * log_ratio).sum(-1)                               # (n,)


def forward_kl(z_s, z_t):
    """KL(p_T || p_S) of each row: logits (n, V) twice -> (n,) nats.

      D_t = sum_v p_T(v) (log p_T(v) - log p_S(v))                    (Eq. 1, on a union support)
    """
    logp_s = z_s.log_softmax(-1)                                            # (n, V)
    logp_t = z_t.log_softmax(-1)                                            # (n, V)
    log_ratio = (logp_t - logp_s).masked_fill(torch.isneginf(logp_t), 0.0)  # 0 log 0 = 0
    return (logp_t.exp() * log_ratio).sum(-1)                               # (n,)


def union_support(z_s, z_t, k):
    """U_t = topk(z_S[t], k) u topk(z_T[t], k), section 3.3: logits (n, V) twice -> (n, V) bool."""
    k = min(k, z_s.shape[-1])
    support = torch.zeros_like(z_s, dtype=torch.bool)
    support.scatter_(-1, z_s.topk(k).indices, True)
    support.scatter_(-1, z_t.topk(k).indices, True)
    return support


def sampled_kl(z_s, z_t, y):
    """Reverse KL from the emitted ids alone, as policy gradients have it: logits (n, V) twice,
    y (n,) ~ p_S -> (n,) nats.

      value     -A_t,   A_t = log p_T(y_t) - log p_S(y_t)      its mean over y ~ p_S is reverse KL
      gradient  -A_t d log p_S(y_t),   A_t taken as a number

    Unbiased (for the sum over positions; N itself depends on the draws) only where y was drawn from
    this very p_S: at temperature 1, with one vocabulary. reverse_kl sums over all v what this leaves
    to one draw; it is here to compare with, and for teachers that give one log-probability a token.
    """
    logp_s = z_s.log_softmax(-1).gather(-1, y[:, None])[:, 0]               # (n,)
    logp_t = z_t.log_softmax(-1).gather(-1, y[:, None])[:, 0]               # (n,)
    impossible = torch.isneginf(logp_s)  # rounding may draw an id of p = 0 on a GPU: it says nothing
    logp_s = logp_s.masked_fill(impossible, 0.0)
    logp_t = logp_t.masked_fill(impossible, 0.0)
    advantage = (logp_t - logp_s).detach()                                  # (n,)
    # The bracket is 1, so this has the value above; its gradient is d log p_S(y_t).
    return -advantage * (1 + logp_s - logp_s.detach())                      # (n,)


def token_divergence(z_s, z_t, y, divergence="reverse", support="full", top_k=32, tau=1.0):
    """D_t of each row: logits z_s, z_t (n, V) of one vocabulary, emitted ids y (n,) -> (n,) nats.

      reverse  D_t = tau^2 KL(p_S || p_T),   p_S = softmax(z_S / tau),   p_T = softmax(z_T / tau)
      forward  D_t = tau^2 KL(p_T || p_S)
      support  full: all ids; union: U_t, on which both sides are renormalised (Eq. 1); sampled: y

    tau^2: the gradient of logits divided by tau shrinks by 1 / tau twice over (Hinton et al. 2015,
    section 2). Ids outside the support get no gradient: mass that the student wastes there is never
    pulled back, and with k = 1 and equal argmax the loss is 0. Raises ValueError for other names.
    """
    if divergence not in ("reverse", "forward") or support not in ("full", "union", "sampled"):
        raise ValueError(f"no such divergence or support: {divergence!r}, {support!r}")
    if support == "sampled":
        if (divergence, tau) != ("reverse", 1.0):
            raise ValueError("support 'sampled' estimates reverse KL at tau = 1")
        return sampled_kl(z_s, z_t, y)
    if support == "union":  # which ids are compared is a choice: there is nothing to differentiate
        outside = ~union_support(z_s.detach(), z_t, top_k)                  # (n, V)
        z_s = z_s.masked_fill(outside, -math.inf)
        z_t = z_t.masked_fill(outside, -math.inf)
    kl = reverse_kl if divergence == "reverse" else forward_kl
    return tau ** 2 * kl(z_s / tau, z_t / tau)


def loss_in_chunks(hidden_s, hidden_t, y, head_s, head_t, to_teacher, divergence, chunk):
    """Heads, loss and its gradient for n rows, `chunk` at a time -> sum_t D_t (), its gradient (n, D).

    So nothing of size (n, V) ever exists. hidden_s (n, D), hidden_t (n, D'), y (n,): emitted ids;
    head_s, head_t: hidden rows -> logits, each in its own vocabulary; to_teacher (V,): the teacher's
    id of each student id, -1: none; divergence: (z_s, z_t, y) -> D_t. A chunk's rows are cut from the
    graph: its backward ends in the head's weight, where it adds to the gradient, and in the rows. The
    caller carries the rows' gradient into the body, and divides by N.
    """
    total = torch.zeros((), device=hidden_s.device)
    grad_rows = torch.zeros_like(hidden_s)                                  # (n, D)
    ruled_out = to_teacher < 0                                              # (V,)
    for i in range(0, len(hidden_s), chunk):
        rows = hidden_s[i:i + chunk].detach().requires_grad_()              # (C, D)
        z_s = head_s(rows).masked_fill(ruled_out, -math.inf)                # (C, V)
        with torch.no_grad():
            z_t = head_t(hidden_t[i:i + chunk])                             # (C, V')
            z_t = z_t[:, to_teacher.clamp(min=0)]                           # (C, V)
            z_t = z_t.masked_fill(ruled_out, -math.inf)
        d = divergence(z_s, z_t, y[i:i + chunk])                            # (C,)
        d.sum().backward()
        grad_rows[i:i + chunk] = rows.grad
        total += d.detach().sum()
    return total, grad_rows


# ---------------------------------------------------------------------------- one step

def backward_of_share(student, teacher, to_teacher, batches, step, args):
    """(1) to (4) for this rank's micro-batches: adds the gradient of sum_t D_t to the student's.

    -> sums for the log; hidden_s (N, D) and hidden_t (N, D') of all of them, for model.agreement.
    """
    # (1) rollout  y ~ p_S(. | x)                                                          [dev 2]
    #     An empty transcript (EOS at once) is a rollout like any other.                   [dev 5]
    prompts = encode_share(student, batches, args)
    if args.states == "reference":  # a control: the transcripts' states, off-policy
        rollouts = [references(student, batch) for batch in batches]
    else:
        rollouts = roll_out(student, prompts, batches, step, args)

    sums = Counter()
    states = []
    for batch, prompt_s, (ids, mask) in zip(batches, prompts, rollouts):    # ids, mask (B, R)
        # What can be scored: the mask, up to the first id that the teacher's vocabulary lacks. A row's
        # scored columns are a prefix and attention is causal, so what lies behind changes nothing.
        scored = model.readable_prefix(ids, mask, to_teacher)               # (B, R)
        n_not_scored = (mask & ~scored).sum()
        if args.states == "first_error":  # a control: nothing behind the student's first error
            scored = scored & up_to_first_difference(ids, references(student, batch)[0])

        # (2) teacher  z_T[t] = logits of T at (x, y_<t)
        #     The same ids, in its own numbering, on the same audio. Its head follows in (4). [dev 3]
        with torch.no_grad():
            prompt_t = model.encode_audio(teacher, batch)
            ids_t = to_teacher[ids].clamp(min=0)                            # (B, R)
            hidden_t = model.response_hidden(                               # (n, D')
                teacher.body, prompt_t.embeds, prompt_t.mask, ids_t, scored)

        # (3) student  z_S[t] = logits of S at (x, y_<t), now with gradients
        if not prompt_s.embeds.requires_grad:
            prompt_s = model.encode_audio(student, batch)
        hidden_s = model.response_hidden(                                   # (n, D)
            student.body, prompt_s.embeds, prompt_s.mask, ids, scored)

        # (4) loss     sum_t D_t,   D_t = KL(p_S(.|t) || p_T(.|t)),   p = softmax(z)
        divergence = partial(token_divergence, divergence=args.divergence, support=args.support,
                             top_k=args.top_k, tau=args.tau)
        loss, grad_rows = loss_in_chunks(hidden_s, hidden_t, ids[scored], student.logits,
                                         teacher.logits, to_teacher, divergence, args.chunk)
        if len(hidden_s):
            hidden_s.backward(grad_rows)

        sums["loss"] += loss
        sums["tokens"] += len(hidden_s)
        sums["not_scored"] += n_not_scored
        sums["audio_sec"] += batch.audio_sec
        for name, n in model.rollout_health(ids, mask, student.stop).items():
            sums[name] += n
        states.append((hidden_s.detach(), hidden_t))
    return sums, [torch.cat(parts) for parts in zip(*states)]


def encode_share(student, batches, args) -> list[model.Prompt]:
    """The student's prompt of each micro-batch, for the rollout.

    It is used again in (3) where it has its graph: if it is the only one, or if --freeze leaves the
    adapter's graph alone. The graphs of several would not fit in memory; there it is made anew.
    """
    keeps_graph = len(batches) == 1 or args.freeze == "encoder"
    with torch.set_grad_enabled(keeps_graph):
        return [model.encode_audio(student, batch) for batch in batches]


def roll_out(student, prompts, batches, step, args):
    """Sample what the student writes -> [ids (B, R), mask (B, R)] of each micro-batch.

    One generate for the whole share: on a GPU a token of 120 rows takes as long as one of 12.
    --rollout_batch cuts it where memory asks for that.
    """
    embeds, prompt_mask = model.join_prompts(prompts)                       # (share, P, D), (share, P)
    clips = [u.id for batch in batches for u in batch.utterances]
    uniforms = data.keyed_uniforms(args.seed, step, clips, args.max_new_tokens)
    ids = torch.full(uniforms.shape, student.pad_id, device=student.device)  # (share, R)
    mask = torch.zeros_like(ids, dtype=torch.bool)                          # (share, R)
    size = args.rollout_batch or len(clips)
    for first in range(0, len(clips), size):
        part = slice(first, first + size)
        written, emitted = model.generate(
            student.body, student.head.weight, embeds[part], prompt_mask[part], stop=student.stop,
            blocked=student.blocked, pad_id=student.pad_id, max_new_tokens=args.max_new_tokens,
            temperature=args.temperature, uniforms=uniforms[part])
        ids[part, :written.shape[1]] = written
        mask[part, :written.shape[1]] = emitted
    rollouts = []
    first = 0
    for batch in batches:
        rows = slice(first, first + len(batch.utterances))
        longest = int(mask[rows].sum(1).max())
        rollouts.append((ids[rows, :longest], mask[rows, :longest]))
        first = rows.stop
    return rollouts


def references(student, batch):
    """Transcripts as responses -> ids (B, R), mask (B, R)."""
    rows = [student.encode_text(u.text) for u in batch.utterances]
    return data.pad_rows(rows, student.pad_id, student.device)


def up_to_first_difference(ids, reference):
    """(B, R), (B, R') -> (B, R) bool: True up to and including each row's first difference."""
    n = min(ids.shape[1], reference.shape[1])
    differs = torch.ones_like(ids)                                          # (B, R) 1: differs
    differs[:, :n] = (ids[:, :n] != reference[:, :n]).long()
    differences_before = differs.cumsum(1) - differs                        # (B, R)
    return differences_before == 0


# ---------------------------------------------------------------------------- the same in sft.py

def average_gradients(parameters, n_tokens):
    """Gradient of the sum over this rank's tokens -> of the mean over all N tokens of the step.

    The result is the same on every rank. This takes DistributedDataParallel's place: that averages
    over ranks, so that a token's weight depends on where it landed, and wants every rank to run the
    same number of backwards.
    """
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)  # a rank without a token adds nothing, and takes part
    gradients = [p.grad for p in parameters]
    if dist.is_initialized():
        for i in range(0, len(gradients), 64):  # flat: a collective a tensor took 6 times as long
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
    """AdamW on fp32 weights; weight decay on matrices only, not on norms and biases.

    fused on a GPU: otherwise a step would hold another 4 bytes a parameter for a moment.
    """
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98),
                                  fused=parameters[0].is_cuda or None)
    if args.shard_optimizer:
        model.shard(optimizer)
    return optimizer


# ---------------------------------------------------------------------------- the loop

def distil(args):
    """The algorithm at the top of this file."""
    rank, world, device, stop = model.setup(args)
    pool = data.read_manifests(args.data)
    dev = data.read_manifest(args.dev) if args.dev else []
    data.check_labelled(dev)
    if args.states != "rollout":
        data.check_labelled(pool)
    data.check_decodable(dev[rank::world])  # the first evaluation would stop the run
    student = model.load_student(args.student, device)
    teacher = model.load_teacher(args.teacher, device)
    model.check_same_features(student, teacher)
    to_teacher = model.vocabulary_map(student, teacher)                     # (V,) -1: none
    parameters = model.trainable(student, args.freeze)
    if args.recompute:
        model.recompute(student)
    optimizer = make_optimizer(parameters, args)
    start, best = model.start_run(args, student, optimizer, {}, rank)
    plan = data.Plan(data.measure(pool), args.batch, args.seed)
    share = data.Steps(pool, plan, args.micro_batch, rank, world, student.n_mels,
                       micro_batch_sec=args.micro_batch_sec)
    batches = iter(data.loader(share, range(start, args.steps), args.workers))
    log = model.Log(args, rank, start)
    log.say(f"student {model.n_parameters(student):,} parameters, teacher "
            f"{model.n_parameters(teacher):,}; {int((to_teacher >= 0).sum())} of "
            f"{len(student.tokenizer)} student ids stand in the teacher's vocabulary too; "
            f"{len(pool)} clips, {plan.steps_per_epoch} steps an epoch, {args.batch} clips a step "
            f"over {world} process(es) on {device}")

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
        last = step + 1 == args.steps

        # ---- (1) to (4): the gradient of the sum over this rank's tokens
        began = time.time()
        n_tokens = 0
        states = None
        micro_batches = log.reject(next(batches))
        if micro_batches:
            sums, states = backward_of_share(student, teacher, to_teacher, micro_batches, step, args)
            log.add(sums)
            n_tokens = sums["tokens"]
        agreement = {}
        if last or (step + 1) % args.log_every == 0:
            agreement = model.agreement(states, student, teacher, to_teacher, args.top_k,
                                        args.chunk)

        # ---- (5) update: every token of the step weighs 1 / N, wherever it landed           [dev 4]
        totals = model.all_sum({"tokens": n_tokens, "stop": len(stop)}, device)
        average_gradients(parameters, totals["tokens"])
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.clip).item()
        if not math.isfinite(grad_norm):
            clips = [pool[i].id for i in plan[step]]
            raise FloatingPointError(f"step {step}: gradient norm {grad_norm}; clips {clips}")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        if totals["tokens"]:  # without a token there is no gradient, and AdamW would still decay
            model.update(optimizer)
        optimizer.zero_grad(set_to_none=True)
        trained += totals["tokens"]
        stopping = totals["stop"] > 0
        log.add({"seconds": time.time() - began})  # of this rank
        log.bar.update()

        # ---- bookkeeping
        if last or stopping or (step + 1) % args.log_every == 0:
            t = log.take_sums(("loss", "tokens", "not_scored", "audio_sec", "seconds", "clips",
                               "truncated", "empty", "repeats", "rejected"), device)
            n_clips = max(1, t["clips"])
            line = {"step": step + 1, "loss": t["loss"] / max(1, t["tokens"]), "grad_norm": grad_norm,
                    "lr": group["lr"], "tokens": int(t["tokens"]),
                    "tokens_per_clip": t["tokens"] / n_clips}
            for name in ("truncated", "empty", "repeats"):
                line[name] = t[name] / n_clips
            line |= {"not_scored": int(t["not_scored"]), "rejected": int(t["rejected"]),
                     "audio_per_sec": t["audio_sec"] / (t["seconds"] / world)}
            log.write(line | agreement)
        evaluates = dev and (step + 1) % args.eval_every == 0  # saved first: it might fail
        if last or stopping or evaluates or (step + 1) % args.save_every == 0:
            info = {"best": best, "flags": model.kept_flags(args)}
            model.save_training(args.out, step + 1, student, optimizer, {}, info)
        if stopping:
            break

    if rank == 0 and not dev:
        model.save(student, args.out)
    log.close()
    model.finish()
    if start < args.steps and not trained:
        raise ValueError(f"none of the clips could be trained on; first: {log.first_message()}")
    if stopping and (dev or not last):  # a last evaluation is still to come
        raise SystemExit(143)  # as a shell reports SIGTERM: a scheduler can tell it from success


# ---------------------------------------------------------------------------- the demo

TEACHER = "--d_model 112 --encoder_layers 3 --steps 2200 --lr 2e-3"
GO_ON = "--lr 1e-3 --warmup 20"


SYSTEMS = ("base", "more", "opd", "td", "td_opd", "teacher")


def demo(args):
    """The paper's experiment in miniature: every stage that is not done yet under --out (default
    runs/demo), each as the command that a reader could type; then Table 1 and Table 2."""
    if int(os.environ.get("RANK", 0)) > 0:
        return  # rank 0 starts every stage, with as many processes as this one was started with
    root = Path(args.out or "runs/demo")
    data.check_outputs(root / "result.json", root / "result.png")
    seconds = {}
    for name, command in demo_commands(args, root).items():
        seconds[name] = run_stage(root / name, command)
    print("seconds: " + "  ".join(f"{name} {s:.0f}" for name, s in seconds.items())
          + f"  all {sum(seconds.values()):.0f}")
    write_result(root, seconds)


def demo_commands(args, root) -> dict[str, str]:
    """{stage: command}, in order; each writes to ROOT/stage."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes == 1:  # started alone: a process a GPU; on a CPU two of one thread each, which bear
        processes = min(2, os.cpu_count())  # a busy machine better than two threads do
        if args.device != "cpu" and torch.cuda.is_available():
            processes = torch.cuda.device_count()
    at = shlex.quote(str(root))
    train = f"{at}/data/train.jsonl"
    pool = f"{at}/data/pool.jsonl"
    dev = f"{at}/data/dev.jsonl"
    test = f"{at}/data/test.jsonl"
    run = f"torchrun --standalone --nproc_per_node {processes}"
    common = f"--device {args.device} --seed {args.seed}"
    sft = f"{run} sft.py --dev {dev} --resume {common}"
    opd = f"{run} distill.py --teacher {at}/teacher --data {train} --dev {dev} --resume {common}"
    for flag, default in vars(parse_args([])).items():  # other flags given are for these stages
        if getattr(args, flag) != default and flag not in ("out", "device", "seed"):
            value = getattr(args, flag)
            opd += f" --{flag}" if value is True else f" --{flag} {value}"
    commands = {
        "data": f"python data.py demo --out {at}/data --seed {args.seed}",
        # The teacher has a corpus of its own: more voices, other sentences, no clip of the student's.
        "teacher": f"{sft} --init random --data {at}/data/teacher.jsonl --out {at}/teacher {TEACHER}",
        "base": f"{sft} --init random --data {train} --tokenizer {at}/teacher --out {at}/base",
        # OPD on the very clips that base was trained on (section 4.1), and as many updates of SFT.
        "opd": f"{opd} --student {at}/base --out {at}/opd",
        "more": f"{sft} --student {at}/base --data {train} --out {at}/more --steps {args.steps} {GO_ON}",
        # TD, a short stage on the teacher's transcripts of a little other audio; then OPD as before.
        "transcripts": f"{run} evaluate.py --model {at}/teacher --data {pool} --device {args.device} "
                       f"--resume --out {at}/transcripts --as_manifest {at}/transcripts/td.jsonl",
        "td": f"{sft} --student {at}/base --data {at}/transcripts/td.jsonl --out {at}/td "
              f"--steps {max(1, args.steps // 3)} {GO_ON}",
        "td_opd": f"{opd} --student {at}/td --out {at}/td_opd",
    }
    for name in SYSTEMS:
        commands[f"eval/{name}"] = (f"{run} evaluate.py --resume --model {at}/{name} --data {test} "
                                    f"--device {args.device} --out {at}/eval/{name}")
    commands["overlap"] = (f"{run} overlap.py --student {at}/base --compare {at}/td "
                           f"--teacher {at}/teacher --data {test} --out {at}/overlap {common}")
    hyps = " ".join(f"{at}/eval/{name}/hyps.jsonl" for name in SYSTEMS)
    commands["compare"] = f"python evaluate.py --compare {hyps} --out {at}/compare"
    return commands


def run_stage(out, command) -> float:
    """Print a command and run it unless OUT/stage.json says that it is done -> seconds it took."""
    print(f"\n$ {command}", flush=True)
    note = out / "stage.json"
    stage = {"command": command, "seconds": 0.0, "done": False}
    if note.exists():
        stage = data.read_json(note)
    elif out.exists() and any(out.iterdir()):
        stage["command"] = "(not by the demo)"
    if stage["command"] != command:
        raise SystemExit(f"{out} was made by another command: {stage['command']}\n"
                         "Remove it, or choose another --out.")
    if stage["done"]:
        print(f"  done before, in {stage['seconds']:.0f} s")
        return stage["seconds"]
    out.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(stage))
    program, *words = shlex.split(command)
    launcher = ["-m", "torch.distributed.run"] if program == "torchrun" else []
    here = Path(__file__).parent
    words = [str(here / word) if word.endswith(".py") else word for word in words]
    place = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(place)}  # not this one's
    environment["OMP_NUM_THREADS"] = "1"  # what torchrun sets too, with a warning
    began = time.time()
    code = subprocess.run([sys.executable, *launcher, *words], env=environment).returncode
    stage["seconds"] += time.time() - began
    stage["done"] = code == 0
    note.write_text(json.dumps(stage))
    if code:
        raise SystemExit(f"the command above ended with exit code {code}")
    return stage["seconds"]


def write_result(root, seconds) -> None:
    """result.json: the demo's two tables in numbers, {system: {rate or statistic, its interval}}."""
    result = {"seconds": seconds}
    for row in json.loads((root / "compare" / "compare.json").read_text()):
        system = result.setdefault(row["system"], {})
        rate = row["metric"].lower()  # wer, cer, pooled
        system |= {rate: row["rate"], f"{rate}_interval": [row["low"], row["high"]]}
        if rate == "pooled":
            system |= {"below_base": row["difference"],
                       "below_base_interval": [row["difference_low"], row["difference_high"]]}
    overlap = data.read_json(root / "overlap" / "overlap.json")
    for system, report in (("base", overlap), ("td", overlap["compare"])):
        for name in ("vuss", "overlap"):
            entry = report[name]
            result[system] |= {name: entry["mean"], f"{name}_interval": [entry["low"], entry["high"]]}
    (root / "result.json").write_text(json.dumps(result, indent=2))
    shutil.copy(root / "compare" / "compare.png", root / "result.png")
    print(f"{root}/result.json  {root}/result.png")


# ---------------------------------------------------------------------------- flags

def parse_args(argv=None):
    """Flags -> namespace. Defaults are the demo's recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=data.HelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add("--student", help="checkpoint to start from, a directory or a Hub id; without it, the demo")
    add("--teacher", help="checkpoint that scores, a directory or a Hub id")
    add("--data", nargs="+", help="manifests of audio to distil on; transcripts are not read")
    add("--dev", help="manifest to measure the error rate on while training")
    add("--out", help="folder to write to (the demo: runs/demo)")
    add("--resume", action="store_true", help="continue from the newest state in --out, if there is one")
    add("--seed", type=whole_number, default=0, help="decides data order and rollouts")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="where to run")
    # rollout
    add("--states", default="rollout", choices=["rollout", "reference", "first_error"],
        help="learn at the student's rollouts, at the transcripts, or at rollouts up to where they differ")
    add("--temperature", type=not_negative, default=1.0,
        help="of the student's sampling; 0 = greedy, as published")
    add("--max_new_tokens", type=at_least_one, default=64, help="longest rollout, tokens")
    add("--rollout_batch", type=at_least_one, help="utterances a rollout (a process's share of the step)")
    # objective
    add("--divergence", default="reverse", choices=["reverse", "forward"],
        help="KL(student || teacher) or KL(teacher || student)")
    add("--support", default="full", choices=["full", "union", "sampled"],
        help="ids compared: all; both top-k sets, renormalised; the emitted one (policy gradient)")
    add("--top_k", type=at_least_one, default=32, help="k of the union support, and of the logged overlap")
    add("--tau", type=positive, default=1.0, help="temperature of both distributions inside the divergence")
    add("--chunk", type=at_least_one, default=128, help="rows whose logits exist at a time")
    # optimisation
    add("--steps", type=at_least_one, default=600, help="optimiser updates")
    add("--batch", type=at_least_one, default=16, help="utterances a step, over all processes")
    add("--micro_batch", type=at_least_one, default=16, help="utterances a forward: memory, not the result")
    add("--micro_batch_sec", type=positive, help="instead: seconds a forward, padding included")
    add("--lr", type=not_negative, default=1e-3, help="peak learning rate")
    add("--warmup", type=whole_number, default=20, help="updates of linear warm-up")
    add("--weight_decay", type=not_negative, default=0.01, help="AdamW's, on matrices")
    add("--clip", type=positive, default=1.0, help="largest gradient norm")
    add("--freeze", choices=["encoder"], help="train adapter and LM alone")
    add("--recompute", action="store_true", help="less memory, more time: activations are made twice")
    add("--shard_optimizer", action="store_true", help="share AdamW's moments out over the processes")
    # bookkeeping
    add("--log_every", type=at_least_one, default=25, help="steps between log lines")
    add("--eval_every", type=at_least_one, default=100, help="steps between dev error rates")
    add("--save_every", type=at_least_one, default=100, help="steps between training states")
    add("--eval_batch", type=at_least_one, default=32, help="utterances a batch in dev decoding")
    add("--workers", type=whole_number, default=1, help="loader processes a rank")
    args = parser.parse_args(argv)
    given = [args.student, args.teacher, args.data, args.out]
    if any(given[:3]) and not all(given):
        parser.error("give --student, --teacher, --data and --out together; "
                     "without any of the first three, the demo runs")
    if args.support == "sampled":
        recipe = (args.divergence, args.temperature, args.tau)
        if recipe != ("reverse", 1.0, 1.0) or args.states == "reference":
            parser.error("--support sampled estimates reverse KL from tokens that the student drew at "
                         "temperature 1: it goes with --divergence reverse, --temperature 1, --tau 1, "
                         "and not with --states reference")
    return args


@record  # torchrun then shows what stopped a process, at the end
def main(args):
    """Distil --student; without one, the demo."""
    if args.student:
        distil(args)
    else:
        demo(args)


if __name__ == "__main__":
    main(parse_args())
