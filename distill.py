"""On-policy distillation (OPD) for speech recognition: the student writes, a stronger frozen teacher marks every token of it.

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
  N          n_tokens     ()           emitted tokens that the teacher can score, EOS included: all ranks, all micro-batches of the step

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
"""

import argparse
import bisect
import itertools
import json
import math
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

import data
import model


# ---------------------------------------------------------------------------- the objective: pure tensors, copies out alone

def support_of(z_s, z_t, support, k):
    """Which tokens are compared at each position: logits (N, V) twice -> (N, V) bool, True on the support; None: all of them.

      union     U_t = topk(z_S[t], k) u topk(z_T[t], k), a set: a token in both counts once         (section 3.3)
      teacher   topk(z_T[t], k)
      student   topk(z_S[t], k)
    """
    if support not in ("full", "union", "teacher", "student"):
        raise ValueError(f"support {support!r}: expected 'full', 'union', 'teacher' or 'student'")
    if support == "full":
        return None
    k, chosen = min(k, z_s.shape[-1]), torch.zeros_like(z_s, dtype=torch.bool)
    if support in ("union", "student"):
        chosen.scatter_(-1, z_s.topk(k).indices, True)
    if support in ("union", "teacher"):
        chosen.scatter_(-1, z_t.topk(k).indices, True)
    return chosen


def token_divergence(z_s, z_t, divergence="reverse", support="full", top_k=32, tau=1.0, beta=0.5):
    """D_t for every row: logits z_s, z_t (N, V) of one vocabulary -> (N,) nats.

      reverse   D_t = tau^2 KL(p_S || p_T) = tau^2 sum_v p_S(v) (log p_S(v) - log p_T(v))
      forward   D_t = tau^2 KL(p_T || p_S)                                                 (Eq. 1, with support "union")
      jsd       D_t = tau^2 (beta KL(p_T || m) + (1 - beta) KL(p_S || m)),  m = beta p_T + (1 - beta) p_S     (GKD, Eq. 1)
                near beta = 0 it is beta times forward, near 1 it is 1 - beta times reverse
      p_S = softmax(z_S / tau),  p_T = softmax(z_T / tau)

    -inf marks tokens that are out of the question; it must stand at the same places on both sides. They get no gradient: an id that
    the teacher's vocabulary lacks is never pulled down. On a support other than "full" both sides are renormalised on it, and the same
    holds for every token outside: mass that the student wastes there is never pulled back, and with k = 1 and equal argmax the loss is 0.
    tau^2: with large tau, gradients of logits divided by tau shrink by 1 / tau twice over (Hinton et al. 2015, section 2).
    A row may hold logits or log-probabilities, which differ by a constant, but not some of either.
    """
    chosen = support_of(z_s.detach(), z_t, support, top_k)  # which tokens are compared is a choice, not something to differentiate
    if chosen is not None:
        z_s, z_t = z_s.masked_fill(~chosen, -math.inf), z_t.masked_fill(~chosen, -math.inf)
    if divergence not in ("reverse", "forward", "jsd") or divergence == "jsd" and not 0 < beta < 1:
        raise ValueError(f"divergence {divergence!r} with beta {beta}: expected 'reverse', 'forward', or 'jsd' with 0 < beta < 1")
    return Divergence.apply(z_s, z_t, divergence, tau, beta)


class Divergence(torch.autograd.Function):
    """Value and gradient of token_divergence on the whole row, in closed form: autograd would keep a dozen tensors of size (N, V).

      dD/dz_S = tau p_S (r - sum_v p_S(v) r(v)),  r = tau^-2 dD/dp_S up to a constant of the row, which cancels:
      reverse   r = log p_S - log p_T
      forward   r = -p_T / p_S, so that the gradient is tau (p_S - p_T)
      jsd       r = (1 - beta) (log p_S - log m)
    """
    @staticmethod
    def forward(ctx, z_s, z_t, divergence, tau, beta):
        """Logits (N, V) twice -> D (N,); the gradient is made here too, while what it needs is at hand."""
        # In place where it can be: two buffers beside the logits for reverse, three for the others.
        logp_s, logp_t = ((z if tau == 1 else z / tau).log_softmax(-1) for z in (z_s, z_t))                     # (N, V)
        never = torch.isneginf(logp_s) | torch.isneginf(logp_t)                 # p log p is 0 there, not nan
        dot = lambda p, r: (p[:, None] @ r[:, :, None])[:, 0, 0]                # (N,)
        if divergence == "reverse":
            r = logp_t.neg_().add_(logp_s).masked_fill_(never, 0.0)             # log p_S - log p_T
            p_s = logp_s.exp_()
            d = dot(p_s, r)                                                     # (N,)
            gradient = r.sub_(d[:, None]).mul_(p_s)                             # (N, V) / tau
        elif divergence == "forward":
            p_s = logp_s.exp()
            r = logp_s.neg_().add_(logp_t).masked_fill_(never, 0.0)             # log p_T - log p_S
            p_t = logp_t.exp_()
            d, gradient = dot(p_t, r), p_s.sub_(p_t)
        else:
            p_s, p_t = logp_s.exp(), logp_t.exp()
            logp_m = torch.logaddexp(logp_t + math.log(beta), logp_s + math.log(1 - beta))                      # (N, V) m itself may underflow
            d = beta * dot(p_t, logp_t.sub_(logp_m).masked_fill_(never, 0.0))
            r = logp_s.sub_(logp_m).masked_fill_(never, 0.0).mul_(1 - beta)
            own = dot(p_s, r)                                                   # (N,)
            d, gradient = d + own, r.sub_(own[:, None]).mul_(p_s)
        ctx.save_for_backward(gradient)
        ctx.tau = tau
        return tau ** 2 * d

    @staticmethod
    def backward(ctx, grad_d):
        return (ctx.tau * grad_d)[:, None] * ctx.saved_tensors[0], None, None, None, None


def sampled_divergence(z_s, z_t, y, baseline=False):
    """Reverse KL from the emitted tokens alone, as policy gradients have it: logits (N, V), y (N,) ~ p_S -> (N,) nats.

      value      log p_S(y_t) - log p_T(y_t)                    its mean over y ~ p_S is KL(p_S || p_T)
      gradient   -A_t d log p_S(y_t),   A_t = log p_T(y_t) - log p_S(y_t), taken as a number
      baseline   A_t = ... + KL(p_S(.|t) || p_T(.|t)): same mean, since sum_v p_S(v) d log p_S(v) = 0; less variance
                                                            while the two models are well apart

    Unbiased (for the sum over positions; N itself depends on the draws) only where y was drawn from this very p_S: temperature 1, no
    other support. The full divergence sums over all v what this leaves to one draw; it is here to compare with, and for teachers that
    give nothing but the log-probability of a token.
    """
    logp_s, logp_t = z_s.log_softmax(-1), z_t.log_softmax(-1)                   # (N, V)
    of_y = lambda logp: logp.gather(-1, y[:, None])[:, 0]                       # (N,)
    value = (of_y(logp_s) - of_y(logp_t)).detach()                              # (N,)
    advantage = -value
    if baseline:
        advantage = advantage + token_divergence(z_s.detach(), z_t)             # (N,)
    surrogate = -advantage * of_y(logp_s)                                       # (N,) its gradient is the one above
    return value + surrogate - surrogate.detach()


@torch.no_grad()
def agreement(z_s, z_t, k) -> dict[str, torch.Tensor]:
    """How student and teacher stand to each other at these states: logits (C, V) twice -> {name: sum over rows}.

    overlap.py has more, and takes its sets before ids without a twin are removed, as the paper does; here they are gone already.
    """
    k = min(k, z_s.shape[-1])
    top_s, top_t = z_s.topk(k), z_t.topk(k)
    pairs = (top_s.indices[:, :, None] == top_t.indices[:, None]) & torch.isfinite(top_s.values)[:, :, None]    # (C, k, k)
    mass = lambda z, top, shared: ((top.values - z.logsumexp(-1, keepdim=True)).exp() * shared).sum()
    entropy = lambda z: torch.distributions.Categorical(logits=z, validate_args=False).entropy().sum()
    return {"top1": (top_s.indices[:, 0] == top_t.indices[:, 0]).sum(), "overlap": pairs.sum() / k,
            "mass_s": mass(z_s, top_s, pairs.any(2)), "mass_t": mass(z_t, top_t, pairs.any(1)),
            "entropy": entropy(z_s), "entropy_t": entropy(z_t)}


def repeats(ids, mask, n=3):
    """(B, R) rollouts -> (B,) bool: does some n-gram of emitted tokens come twice? The first sign of a loop."""
    if ids.shape[1] <= n:
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    grams, own = ids.unfold(1, n, 1), mask.unfold(1, n, 1).all(-1)                                              # (B, R - n + 1, n), (B, R - n + 1)
    same = (grams[:, :, None] == grams[:, None]).all(-1) & own[:, :, None] & own[:, None]                       # (B, R - n + 1, R - n + 1)
    return same.triu(1).flatten(1).any(1)


def distil_backward(student, hidden_s, teacher, hidden_t, y, to_teacher, args, watch=True) -> Counter:
    """Heads, loss and gradient for N rows, a chunk at a time, so that nothing of size (N, V) ever exists.

    hidden_s (N, D) with its graph, hidden_t (N, D_t), y (N,) the emitted ids. Rows and logits are cut from the graph: a chunk's gradient
    with respect to its logits goes through the head here, into the head's weight and the rows, and one last backward carries the rows'
    gradient into the body. The gradient is that of sum_t D_t; dividing by N is average_gradients' part. -> sums over rows, for the
    log; those of `agreement` only if `watch`.
    """
    weight, blocked = student.head.weight, to_teacher < 0                       # (V, D); (V,) no twin, special, or past the tokenizer
    rows, sums, all_d = hidden_s.detach(), Counter(), []
    grad_rows = torch.zeros_like(rows)                                          # (N, D)
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    for i in range(0, len(rows), args.chunk):
        x = rows[i:i + args.chunk]                                              # (C, D)
        with torch.no_grad(), student.autocast():
            z_s = student.head(x).float().masked_fill_(blocked, -math.inf)                                      # (C, V)
        with torch.no_grad(), teacher.autocast():
            z_t = model.map_logits(teacher.head(hidden_t[i:i + args.chunk]).float(), to_teacher)                # (C, V)
        z_s.requires_grad_()
        if args.support == "sampled":
            d = sampled_divergence(z_s, z_t, y[i:i + args.chunk], args.baseline)                                # (C,)
        else:
            d = token_divergence(z_s, z_t, args.divergence, args.support, args.top_k, args.tau, args.beta)      # (C,) [dev 1]
        d.sum().backward()
        with torch.no_grad(), student.autocast():                               # z_S = x W^T, so dx = dz W, dW = dz^T x
            grad_rows[i:i + args.chunk] = z_s.grad @ weight
            if x.is_cuda:  # autocast multiplies in bf16, but not in place (untested)
                weight.grad += z_s.grad.T @ x
            else:          # no second tensor of the weight's size
                weight.grad.addmm_(z_s.grad.T, x)
        all_d.append(d.detach())
        if watch:
            sums.update(agreement(z_s, z_t, args.top_k))
    if len(rows):
        hidden_s.backward(grad_rows)
        d = torch.cat(all_d)                                                    # (N,)
        sums.update({"loss": d.sum(), "worst": d.topk(math.ceil(len(d) / 10)).values.sum()})
    if watch:
        sums["watched"] = len(rows)
    return sums


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


# ---------------------------------------------------------------------------- training

def load_pair(args, device):
    """-> student and teacher, which must read the same features."""
    student, teacher = model.load_student(args.student, device), model.load_teacher(args.teacher, device)
    if student.n_mels != teacher.n_mels:
        raise ValueError(f"student and teacher read the same features, but take {student.n_mels} and {teacher.n_mels} mel bins")
    return student, teacher


def distil(args):
    """The algorithm at the top of this file, one pass down the page a step."""
    rank, world, device, stop = setup(args)
    pool = [u for path in args.data for u in data.read_manifest(path)]
    dev = data.read_manifest(args.dev) if args.dev else []
    data.check_labelled(dev)
    student, teacher = load_pair(args, device)
    to_teacher = model.vocabulary_map(student, teacher)                         # (V,) student id -> teacher id, -1: none
    parameters = list(student.net.parameters())
    optimizer = optimizer_for(parameters, args)
    resumed = model.load_training(args.out, student, optimizer) if args.resume else None
    start, best = (resumed["step"], resumed["best"]) if resumed else (0, math.inf)
    if rank == 0 and not args.resume and any((Path(args.out) / name).exists() for name in ("metrics.jsonl", "state")):
        raise FileExistsError(f"{args.out} holds an earlier run: continue it with --resume, or choose another --out")
    flags = {k: v for k, v in vars(args).items() if k not in ("out", "resume", "device", "workers")}
    changed = {k: (resumed["flags"].get(k), v) for k, v in flags.items() if resumed and resumed["flags"].get(k) != v}
    if rank == 0 and changed:
        print("resumed with other flags than before: " + ", ".join(f"--{k} {old} -> {new}" for k, (old, new) in changed.items()))
    Path(args.out).mkdir(parents=True, exist_ok=True)
    plan = data.Plan(data.measure(pool), args.batch, args.seed)
    steps = data.Steps(pool, plan, args.micro_batch, rank, world, student.n_mels)
    if rank == 0:
        print(f"student {sum(map(torch.numel, parameters)):,} parameters, teacher {sum(map(torch.numel, teacher.net.parameters())):,}; "
              f"{int((to_teacher >= 0).sum())} of {len(student.tokenizer)} student ids have a twin; {len(pool)} clips, "
              f"{plan.steps_per_epoch} steps an epoch, {args.batch} clips a step over {world} process(es) on {device}")
    log, sums, rejected, first, began, stopping, trained = Log(args, rank, start), Counter(), Counter(), {}, time.time(), 0, 0

    for step, batches in zip(range(start, args.steps), data.loader(steps, range(start, args.steps), args.workers)):
        n_tokens = 0
        for batch in batches:
            rejected.update(reason for reason, _ in batch.rejected)
            first = dict(batch.rejected[::-1]) | first
            if not batch.utterances:
                continue
            # ---- (1) rollout: the audio encoder runs once, with its graph; the LM reads its output without             [dev 2]
            #      An empty transcript (EOS at once) is a rollout like any other.                                           [dev 5]
            prompt = model.encode(student, batch)
            uniforms = data.keyed_uniforms(args.seed, step, [u.id for u in batch.utterances], args.max_new_tokens)
            ids, mask = model.generate(student, prompt, args.max_new_tokens, args.temperature, uniforms)        # (B, R)
            # ---- (2) teacher: the same ids through the vocabulary map. A token it lacks it can't read: from there on nothing
            #      in the row is scored                                                                                  [dev 3]
            scored = mask & (to_teacher[ids] >= 0).cumprod(1).bool()                                            # (B, R)
            with torch.no_grad():
                hidden_t = model.response_hidden(teacher, model.encode(teacher, batch), to_teacher[ids].clamp(min=0), scored)
            # ---- (3) student: the states it visited, now with gradients
            hidden_s = model.response_hidden(student, prompt, ids, mask)[scored[mask]]                          # (N, D)
            # ---- (4) loss
            watch = (step + 1) % args.log_every == 0 or step + 1 == args.steps
            sums.update(distil_backward(student, hidden_s, teacher, hidden_t, ids[scored], to_teacher, args, watch))
            n_tokens += len(hidden_s)
            sums.update({"audio_sec": batch.audio_sec, "clips": len(ids), "no_twin": (mask & ~scored).sum(),
                         "truncated": (~(student.stop[ids] & mask).any(1)).sum(), "empty": student.stop[ids[:, 0]].sum(),
                         "repeats": repeats(ids, mask).sum()})
        sums["tokens"] += n_tokens

        # ---- (5) update: every token of the step weighs 1 / N, whatever rank and micro-batch it landed in              [dev 4]
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
            keys = ("loss", "tokens", "worst", "clips", "truncated", "empty", "repeats", "no_twin", "audio_sec", "watched", "top1", "overlap",
                    "mass_s", "mass_t", "entropy", "entropy_t")
            *values, dropped = all_sum([float(sums[k]) for k in keys] + [rejected.total()], device)
            t = dict(zip(keys, values))
            n, n_clips = max(1, t["tokens"]), max(1, t["clips"])  # 0 only if every clip was rejected
            line = {"step": step + 1, "loss": t["loss"] / n, "grad_norm": grad_norm, "lr": group["lr"], "tokens": int(t["tokens"]),
                    "tokens_per_clip": t["tokens"] / n_clips, "truncated": t["truncated"] / n_clips, "empty": t["empty"] / n_clips,
                    "repeats": t["repeats"] / n_clips,
                    "no_twin": int(t["no_twin"]), "rejected": int(dropped), "audio_per_sec": t["audio_sec"] / (time.time() - began)}
            if t["loss"] and args.support != "sampled":  # its values have both signs: no share of a sum
                line["worst_tenth"] = t["worst"] / t["loss"]
            if t["watched"]:  # of this step alone; a run that is told to stop may stop between two such steps
                line |= {name: t[key] / t["watched"] for name, key in (
                    ("top1_agreement", "top1"), ("overlap", "overlap"), ("mass_student", "mass_s"), ("mass_teacher", "mass_t"),
                    ("entropy", "entropy"), ("entropy_teacher", "entropy_t"))}
            log.write(line)
            sums, began = Counter(), time.time()
        if dev and ((step + 1) % args.eval_every == 0 or step + 1 == args.steps):
            paused = time.time()
            error = dev_error(student, dev, args, rank, world)
            log.write({"step": step + 1} | error)
            best = save_best(student, args.out, error["dev_error"], best) if rank == 0 else min(error["dev_error"], best)
            began += time.time() - paused
        if rank == 0 and ((step + 1) % args.save_every == 0 or done):
            model.save_training(args.out, step + 1, student, optimizer, info={"best": best, "flags": flags})
        if stopping:
            break

    if rank == 0 and not dev:
        model.save(student, args.out)
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


# ---------------------------------------------------------------------------- --check

def check(args):
    """One step's worth of everything without an update; stops with the numbers if student and teacher do not fit together.

    A teacher given the right audio and the right ids finds a reference far likelier than another clip's. A wrong vocabulary map, a
    wrong prompt, random weights or unheard audio all bring the two together. Reads transcripts (of --dev, else --data) where it can.
    """
    rank, world, device, _ = setup(args)
    student, teacher = load_pair(args, device)
    to_teacher, same = model.vocabulary_map(student, teacher), model.vocabulary_map(student, student)
    batch = data.load_batch(data.read_manifest(args.dev or args.data[0])[:args.batch], student.n_mels)
    prompt = model.encode(student, batch)
    uniforms = data.keyed_uniforms(args.seed, 0, [u.id for u in batch.utterances], args.max_new_tokens)
    ids, mask = model.generate(student, prompt, args.max_new_tokens, args.temperature, uniforms)                # (B, R)
    scored = mask & (to_teacher[ids] >= 0).cumprod(1).bool()                                                    # (B, R)
    with torch.no_grad():
        prompt_t = model.encode(teacher, batch)
        again = model.response_hidden(student, model.encode(student, batch), ids, mask)                         # (M, D)

    @torch.no_grad()
    def logp_teacher(ids, mask):
        """Mean log p_T of the ids under the mask, nats per token."""
        ids, mask = ids.to(device), mask.to(device)
        hidden, y, total = model.response_hidden(teacher, prompt_t, to_teacher[ids].clamp(min=0), mask), ids[mask], 0.0
        for i in range(0, len(y), args.chunk):
            z_t = model.map_logits(teacher.head(hidden[i:i + args.chunk]).float(), to_teacher)                  # (C, V)
            total += z_t.log_softmax(-1).gather(-1, y[i:i + args.chunk, None]).sum().item()
        return total / max(1, len(y))

    def logp_texts(texts):
        rows = [student.encode_text(text) for text in texts]
        padded = torch.tensor([row + [student.pad_id] * (max(map(len, rows)) - len(row)) for row in rows])      # (B, R)
        own = torch.arange(padded.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        return logp_teacher(padded, own & (to_teacher[padded.to(device)] >= 0).cumprod(1).bool().cpu())

    hidden_s = model.response_hidden(student, prompt, ids, mask)                                                # (M, D)
    with torch.no_grad():
        hidden_t = model.response_hidden(teacher, prompt_t, to_teacher[ids].clamp(min=0), scored)               # (N, D_t)
    itself = distil_backward(student, hidden_s, student, again, ids[mask], same, args)
    student.net.zero_grad(set_to_none=True)
    hidden_s = model.response_hidden(student, model.encode(student, batch), ids, mask)[scored[mask]]            # (N, D)
    sums, n = distil_backward(student, hidden_s, teacher, hidden_t, ids[scored], to_teacher, args), max(1, len(hidden_s))
    grad_norm = nn.utils.clip_grad_norm_([p for p in student.net.parameters() if p.grad is not None], math.inf).item() / n
    texts = [u.text for u in batch.utterances]
    reference = shuffled = None
    if all(texts) and len(set(texts)) > 1:
        order = sorted(range(len(texts)), key=texts.__getitem__)  # half way round the sorted texts stands another text
        turned = dict(zip(order, order[len(order) // 2:] + order[:len(order) // 2]))
        reference, shuffled = logp_texts(texts), logp_texts([texts[turned[i]] for i in range(len(texts))])
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    shown = lambda value: "no transcripts to try" if value is None else f"{value:.3f} nats per token"
    table = {
        "clips": f"{len(batch.utterances)}, {batch.audio_sec:.1f} s; rejected {len(batch.rejected)}",
        "ids shared": f"{int((to_teacher >= 0).sum())} of {int((~student.blocked).sum())} that the student may write",
        "rollouts": f"{int(mask.sum())} tokens; {int((mask & ~scored).sum())} not scored for want of a twin",
        "teacher's prompt ends": " ".join(sorted({repr(teacher.tokenizer.decode(s)[-40:]) for s in teacher.suffixes(batch, None, None)})),
        "log p_T of rollouts": shown(logp_teacher(ids, scored)),
        "log p_T of references": shown(reference),
        "log p_T of other clips' references": shown(shuffled),
        "D_t, student against itself": f"{float(itself['loss']) / max(1, int(mask.sum())):.2e} nats per token",
        f"D_t, {args.divergence}, {args.support}": f"{float(sums['loss']) / n:.3f} nats per token",
        "gradient norm": f"{grad_norm:.3f}",
        "peak memory": f"{peak / 2 ** 30:.2f} GiB"}
    if rank == 0:
        for name, value in table.items():
            print(f"{name:36} {value}")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if abs(float(itself["loss"])) > (1e-6 if device.type == "cpu" else 1e-3) * max(1, int(mask.sum())):  # fp32; bf16
        raise SystemExit("student and teacher forward disagree on the student itself: its divergence from itself should be 0")
    if reference is not None and reference < shuffled + 1.0:
        raise SystemExit(f"the teacher does not know this audio: references {reference:.3f}, other clips' references {shuffled:.3f} nats per "
                         "token; expected a nat or more between them. Wrong checkpoint, wrong language, or wrong transcripts?")


# ---------------------------------------------------------------------------- the demo: every stage, from nothing to a table

def demo(args, argv):
    """Make what is missing under --out (default runs/demo), stage by stage, each as the command that a reader could type.

    A stage is done again when its command, or that of a stage it builds on, is not the one that made what lies there; an
    interrupted one is resumed.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank > 0:
        return  # rank 0 starts every stage, with as many processes as this one was started with
    # Started alone: a process a GPU, or two on CPU cores. Two processes with a thread each bear a busy machine better than two
    # threads in one, which wait for each other at every operation.
    processes = world if world > 1 else torch.cuda.device_count() or min(2, os.cpu_count())
    folder = Path(args.out or "runs/demo")
    root, seed = shlex.quote(str(folder)), f"--seed {args.seed} --device {args.device}"
    launch = f"torchrun --nproc_per_node {processes}"
    train, pool, dev, test = (f"{root}/data/{split}.jsonl" for split in ("train", "pool", "dev", "test"))
    mine = shlex.join(drop_flag(argv, "--out", "--seed", "--device"))  # any other flag given here is for the OPD stage
    scratch = f"--init random --dev {dev} --resume --ctc 1.0"
    stages = {  # name: (command, stages it builds on)
        "data": (f"python data.py demo --out {root}/data --seed {args.seed}", []),
        "teacher": (f"{launch} sft.py --data {train} {pool} {scratch} --out {root}/teacher {TEACHER} {seed}", ["data"]),
        "base": (f"{launch} sft.py --data {train} {scratch} --tokenizer {root}/teacher --out {root}/base {BASE} {seed}", ["teacher"]),
        "opd": (f"{launch} distill.py --student {root}/base --teacher {root}/teacher --data {pool} --dev {dev} --resume "
                f"--out {root}/opd {seed} {mine}".strip(), ["base", "teacher"])}
    for name in ("teacher", "base", "opd"):
        stages[f"eval/{name}"] = (f"{launch} evaluate.py --model {root}/{name} --data {test} --out {root}/eval/{name} "
                                  f"--device {args.device}", [name])
    for name in ("base", "opd"):
        stages[f"overlap/{name}"] = (f"{launch} overlap.py --student {root}/{name} --teacher {root}/teacher --data {test} "
                                     f"--out {root}/overlap/{name} {seed}", [name, "teacher"])
    seconds = {name: run_stage(folder, name, stages) for name in stages}
    report(folder, seconds)


# Sizes of the demo's two models and their training, found on two CPU cores (README, "What it shows").
TEACHER = "--d_model 112 --encoder_layers 3 --lm_layers 2 --steps 1800 --batch 16 --lr 3e-3"
BASE = "--d_model 80 --encoder_layers 2 --lm_layers 2 --steps 1200 --batch 16 --lr 3e-3"


def drop_flag(argv, *flags):
    """argv without these flags and their values, in both spellings: --out DIR, --out=DIR."""
    kept, skip = [], False
    for word in argv:
        if not skip and word.split("=")[0] not in flags:
            kept.append(word)
        skip = not skip and word in flags
    return kept


def run_stage(root, name, stages) -> float:
    """Run one stage unless its output was made by the same commands -> seconds it took (then or now)."""
    chain = lambda n: [stages[n][0], *(c for needed in stages[n][1] for c in chain(needed))]
    out, key, note = root / name, chain(name), root / name / "stage.json"
    print(f"\n$ {stages[name][0]}", flush=True)
    before = json.loads(note.read_text()) if note.exists() else {}
    if not before and out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} was not made by the demo itself (it has no stage.json): remove it, or choose another --out")
    if before.get("commands") != key:
        if before:
            print("  made before, by other commands: again", flush=True)
        shutil.rmtree(out, ignore_errors=True)
        before = {"commands": key, "seconds": 0.0, "done": False}
    if before["done"]:
        print(f"  made before, in {before['seconds']:.0f} s")
        return before["seconds"]
    out.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(before, indent=2))
    program, *words = shlex.split(stages[name][0])
    launcher = [sys.executable] if program == "python" else [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    here = Path(__file__).parent
    words = [str(here / word) if word.endswith(".py") else word for word in words]
    ours = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "OMP_NUM_THREADS")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}  # this process's own place under torchrun
    environment["OMP_NUM_THREADS"] = "1"  # what torchrun sets too, with a warning
    began = time.time()
    code = subprocess.run(launcher + words, env=environment).returncode
    before |= {"seconds": before["seconds"] + time.time() - began, "done": code == 0}
    note.write_text(json.dumps(before, indent=2))
    if code:
        raise SystemExit(f"the command above ended with exit code {code}")
    return before["seconds"]


def report(root, seconds):
    """Print the final table; write result.json and result.png."""
    result, errors = {}, {}
    for name in ("teacher", "base", "opd"):
        entries = json.loads((root / "eval" / name / "summary.json").read_text())["results"]
        result[name] = {e["metric"].lower() + suffix: value for e in entries
                        for suffix, value in (("", e["rate"]), ("_interval", [e["low"], e["high"]]))}
        rows = [json.loads(line) for line in (root / "eval" / name / "hyps.jsonl").open(encoding="utf-8")]
        errors[name] = {r["id"]: r["substitutions"] + r["deletions"] + r["insertions"] for r in rows}
        units = {r["id"]: r["units"] for r in rows}
        result[name]["pooled"] = 100 * sum(errors[name].values()) / sum(units.values())
    for name in ("base", "opd"):
        overlap = json.loads((root / "overlap" / name / "overlap.json").read_text())
        for key in ("vuss", "overlap"):
            result[name] |= {key: overlap[key]["mean"], f"{key}_interval": [overlap[key]["low"], overlap[key]["high"]]}
        result["k"] = overlap["k"]
    ids = list(units)
    low, high = data.bootstrap([errors["base"][i] - errors["opd"][i] for i in ids], [units[i] for i in ids],
                               blocks=[r["speaker"] for r in rows])  # as evaluate.py --compare has it
    result["base_minus_opd"] = {"points": result["base"]["pooled"] - result["opd"]["pooled"], "interval": [100 * low, 100 * high],
                                "relative": 1 - result["opd"]["pooled"] / result["base"]["pooled"]}
    result["seconds"] = seconds
    (root / "result.json").write_text(json.dumps(result, indent=2))

    def cell(name, key, digits):
        if key not in result[name]:
            return " " * 24
        bounds = result[name][f"{key}_interval"]
        return f"{result[name][key]:{digits}f} [{bounds[0]:{digits}f}, {bounds[1]:{digits}f}]".ljust(24)

    print(f"\n{'':9}{'WER en, %':24}{'CER zh, %':24}{'overlap@%d' % result['k']:24}VUSS")
    for name in ("teacher", "base", "opd"):
        print(f"{name:9}{cell(name, 'wer', '.2')}{cell(name, 'cer', '.2')}{cell(name, 'overlap', '.3')}{cell(name, 'vuss', '.2')}")
    change = result["base_minus_opd"]
    print(f"OPD makes {change['relative']:.0%} fewer errors than base: {change['points']:.2f} points of {result['base']['pooled']:.2f} "
          f"[{change['interval'][0]:.2f}, {change['interval'][1]:.2f}], en and zh pooled, paired 95 % interval")
    print("seconds: " + "  ".join(f"{name} {s:.0f}" for name, s in seconds.items()) + f"  all {sum(seconds.values()):.0f}")
    draw_result(root, result)
    print(f"{root}/result.json  {root}/result.png")


def draw_result(root, result):
    """Error rates with their intervals, and the dev error over OPD's steps -> result.png."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for offset, metric, label in ((-0.18, "wer", "WER, English"), (0.18, "cer", "CER, Mandarin")):
        rates = [result[name][metric] for name in ("teacher", "base", "opd")]
        bounds = [result[name][f"{metric}_interval"] for name in ("teacher", "base", "opd")]
        reach = [[r - b[0] for r, b in zip(rates, bounds)], [b[1] - r for r, b in zip(rates, bounds)]]
        left.bar([i + offset for i in range(3)], rates, 0.34, yerr=reach, capsize=3, label=label)
    left.set_xticks(range(3), ["teacher", "base student", "after OPD"])
    left.set(ylabel="test error, %", title="unseen voices and sentences (95 % intervals)")
    left.legend(frameon=False)
    records = {name: [json.loads(line) for line in (root / name / "metrics.jsonl").open()] for name in ("base", "opd")}
    start = min(r["dev_error"] for r in records["base"] if "dev_error" in r)  # the checkpoint that OPD starts from
    right.plot(*zip((0, start), *((r["step"], r["dev_error"]) for r in records["opd"] if "dev_error" in r)), "o-")
    right.set(xlabel="OPD step", ylim=(0, None), title="on-policy distillation")
    right.set_ylabel("dev error, % (languages pooled)", color="tab:blue")
    twin = right.twinx()
    twin.plot(*zip(*((r["step"], r["loss"]) for r in records["opd"] if "loss" in r)), color="tab:gray")
    twin.set(ylim=(0, None))
    twin.set_ylabel("divergence from the teacher, nats per token", color="tab:gray")
    for axis in (left, right, twin):
        axis.spines["top"].set_visible(False)
    figure.savefig(root / "result.png", dpi=110)


def parse_args(argv=None):
    """Flags -> namespace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = lambda flag, default, text, **kw: parser.add_argument(flag, default=default, help=f"{text} (default: {default})",
                                                                **(kw if "action" in kw else {"type": type(default)} | kw))
    add("--student", None, "checkpoint to start from, a directory or a Hub id; without it, the demo", type=str)
    add("--teacher", None, "checkpoint that scores, a directory or a Hub id", type=str)
    add("--data", None, "manifests of audio to distil on; transcripts are not read", type=str, nargs="+")
    add("--dev", None, "manifest to measure the error rate on while training", type=str)
    add("--out", None, "folder to write to (the demo: runs/demo)", type=str)
    add("--check", False, "try student and teacher on one batch, print what was verified, train nothing", action="store_true")
    add("--resume", False, "continue from the newest state in --out, if there is one", action="store_true")
    add("--seed", 0, "decides data order and rollouts")
    add("--device", "auto", "where to run", choices=["auto", "cpu", "cuda"])
    # rollout
    add("--temperature", 1.0, "of the student's sampling; 0 = greedy, as published")
    add("--max_new_tokens", 64, "longest rollout, tokens")
    # objective
    add("--divergence", "reverse", "reverse: KL(student || teacher); forward: KL(teacher || student); jsd: between them",
        choices=["reverse", "forward", "jsd"])
    add("--beta", 0.5, "the teacher's share in jsd's mixture")
    add("--support", "full", "tokens compared: the whole vocabulary; both top-k sets, the teacher's or the student's, renormalised; "
        "or only the sampled token (policy gradient)", choices=["full", "union", "teacher", "student", "sampled"])
    add("--top_k", 32, "k of the top-k supports, and of the logged overlap")
    add("--baseline", False, "with --support sampled: add each position's exact divergence to the advantage, whose mean is then 0",
        action="store_true")
    add("--tau", 1.0, "temperature of both distributions inside the divergence")
    add("--chunk", 128, "rows whose logits exist at a time")
    # optimisation
    add("--steps", 600, "optimiser updates")
    add("--batch", 16, "utterances a step, over all processes")
    add("--micro_batch", 16, "utterances a forward; lower it when out of memory, the update stays the same")
    add("--lr", 1e-3, "peak learning rate")
    add("--warmup", 20, "updates of linear warm-up")
    add("--weight_decay", 0.01, "AdamW's, on matrices")
    add("--clip", 1.0, "largest gradient norm")
    # bookkeeping
    add("--log_every", 25, "steps between log lines")
    add("--eval_every", 100, "steps between dev error rates")
    add("--save_every", 100, "steps between training states")
    add("--eval_batch", 32, "utterances a batch in dev decoding")
    add("--workers", 1, "loader processes a rank")
    args = parser.parse_args(argv)
    given = [args.student, args.teacher, args.data]
    if (any(given) or args.dev or args.check) and not (all(given) and (args.out or args.check)):
        parser.error("give --student, --teacher, --data and --out together (--check needs no --out); without any of the first three, the demo runs")
    if args.baseline and args.support != "sampled":
        parser.error("--baseline goes with --support sampled")
    for flag, fine in (("top_k", args.top_k >= 1), ("tau", args.tau > 0), ("beta", 0 < args.beta < 1), ("chunk", args.chunk >= 1)):
        if not fine:
            parser.error(f"--{flag} {getattr(args, flag)} is out of range")
    if args.support == "sampled" and (args.divergence, args.temperature, args.tau) != ("reverse", 1.0, 1.0):
        parser.error("--support sampled estimates reverse KL from tokens drawn at temperature 1: it goes with --divergence reverse, "
                     "--temperature 1 and --tau 1")
    return args


@record  # torchrun then shows what stopped a process, at the end
def main(argv=None):
    args = parse_args(argv)
    if args.check and args.student:
        check(args)
    elif args.student:
        distil(args)
    else:
        demo(args, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
