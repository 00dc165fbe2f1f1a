"""On-policy distillation (OPD) for speech recognition: the student writes, a stronger, frozen
teacher scores every token it wrote.

For every batch of audio x:
  (1) rollout  y ~ p_S(. | x)                     the student writes a transcript   no gradient
  (2) teacher  z_T[t] = logits of T at (x, y_<t)  the teacher reads the same ids    no gradient
  (3) student  z_S[t] = logits of S at (x, y_<t)  teacher forcing on its own words  differentiable
  (4) loss     L = 1/N sum_t D_t,   D_t = KL(p_S(.|t) || p_T(.|t)),   |t: given (x, y_<t)
                                        = sum_v p_S(v) (log p_S(v) - log p_T(v))
               exact: v runs over every id of text that both vocabularies have, and those that
               end it; p_S and p_T are renormalised on these (the rollout draws from all that p_S
               may write)
  (5) update   one AdamW step
A state is what both models have read before a token: the audio and the prefix, (x, y_<t). The
transcripts of --data are not learnt from: all that is learnt comes from the teacher. (The control
--states reference takes its states from them; and a silent clip is kept only if its text is "".)

  symbol     variable   shape    meaning
             prompt     .embeds (B, P, width), .mask (B, P): prompts with the audio in place, padded
                                 on the left; width and P are each model's own
             ids, mask  (B, R)   this rank's B rollouts, right-padded to R; True on emitted tokens
                                 (b, r: those of a micro-batch)
             scored     (B, R)   True on those that the teacher can score
  y_t        y          (n,)     the n scored tokens of a micro-batch, packed
  z_S        z_s        (n, V)   the student's logits that predict each: head_s(hidden_s)
  z_T        z_t        (n, V)   the teacher's, in the student's ids: head_t(hidden_t); both are
                                 made in (4), for a chunk of C rows at a time
  log p      logp_               log-probabilities in nats
  N          N          ()       scored tokens of the whole step: all ranks and micro-batches

Differs from the paper (arXiv 2605.28139):
  [dev 1] Reverse KL over all shared ids. Eq. 1 is forward KL, KL(p_T || p_S), on the union of
          both top-k sets: --divergence forward --support union --top_k 32 --temperature 0
          (Where the union has fewer than two tokens, Eq. 1 leaves the position out; here D_t = 0.
          Both top k are taken among the shared ids; overlap.py takes them first, then drops.)
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
        --data train.jsonl --dev dev.jsonl --out runs/x/opd
    torchrun --nproc_per_node 8 distill.py --student ...         # eight processes, same update

--out then holds the best checkpoint on dev (without --dev: the last), --out/state/step-N the last
one with all that --resume needs, and metrics.jsonl and metrics.png. Keys of metrics.jsonl:
  step, loss (nats per token), grad_norm and lr of that step, audio_per_sec (seconds per second)
  sums since the record before:
    tokens (N), clips, audio_sec, rejected (clips left out)
    truncated, empty      rollouts cut at --max_new_tokens; rollouts that are EOS alone
    not_scored            tokens at or after the first id that the teacher lacks
  dev_error               greedy errors on --dev, %; of several manifests, the mean of each one's,
                          dev_error/NAME
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
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

import data
import model
from data import at_least


def parse_args(argv=None):
    """Flags -> namespace. Defaults are the demo's recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=data.HelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add("--student", help="checkpoint to start from, a directory or a Hub id; without it, the demo")
    add("--teacher", help="checkpoint that scores, a directory or a Hub id")
    add("--data", nargs="+", help="manifests of audio; their transcripts are not learnt from")
    add("--dev", nargs="+", help="manifests to measure error rates on while training")
    add("--language", help="of lines of --data and --dev that name none (Qwen3-ASR is told it)")
    add("--out", help="folder to write to (the demo: runs/demo)")
    add("--resume", action="store_true", help="continue from the newest save in --out, if any")
    add("--seed", type=at_least(0), default=0, help="decides data order and rollouts")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="where to run")
    # rollout
    add("--states", default="rollout", choices=["rollout", "reference"],
        help="learn at the student's rollouts, or (a control) at the transcripts of --data")
    add("--temperature", type=at_least(0.0), default=1.0, help="of the rollouts; 0 is greedy")
    add("--max_new_tokens", type=at_least(1), default=64,
        help="longest rollout, and transcript on dev, in tokens")
    # objective
    add("--divergence", default="reverse", choices=["reverse", "forward"],
        help="KL(student || teacher) or KL(teacher || student)")
    add("--support", default="full", choices=["full", "union", "sampled"],
        help="ids compared: all shared; both top-k sets, renormalised; the emitted one alone")
    add("--top_k", type=at_least(1), default=32, help="k of the union support")
    add("--chunk", type=at_least(1), default=128, help="tokens whose logits exist at a time")
    # optimisation
    add("--steps", type=at_least(1), default=600, help="optimiser updates")
    add("--batch", type=at_least(1), default=16, help="utterances per step, over all processes")
    add("--micro_batch", type=at_least(1), default=16, help="clips per backward: same update")
    add("--lr", type=at_least(0.0), default=1e-3, help="peak learning rate")
    add("--warmup", type=at_least(0), default=20, help="updates of linear warm-up")
    add("--freeze", choices=["encoder"], help="train adapter and LM alone")
    add("--recompute", action="store_true", help="less memory, more time: activations made twice")
    # bookkeeping
    add("--log_every", type=at_least(1), default=25, help="steps between log lines")
    add("--eval_every", type=at_least(1), default=600, help="steps between dev error rates")
    add("--save_every", type=at_least(1), default=100, help="steps between saves, for --resume")
    add("--eval_batch", type=at_least(1), default=32, help="utterances decoded together on dev")
    add("--workers", type=at_least(0), default=1, help="loader processes per rank")
    args = parser.parse_args(argv)
    given = [args.student, args.teacher, args.data, args.out]
    if any(given[:3]) and not all(given):
        parser.error("give --student, --teacher, --data and --out together; "
                     "without any of the first three, the demo runs")
    if not args.student and (args.dev or args.language or args.resume):
        parser.error("--dev, --language and --resume go with --student; the demo sets its own")
    if args.top_k != parser.get_default("top_k") and args.support != "union":
        parser.error("--top_k is read only with --support union")
    if args.states == "reference" and args.temperature != parser.get_default("temperature"):
        parser.error("--temperature is of rollouts, and --states reference has none")
    if args.support == "sampled":
        recipe = (args.divergence, args.temperature, args.states)
        if recipe != ("reverse", 1.0, "rollout"):
            parser.error("--support sampled estimates reverse KL from tokens that the student drew "
                         "at temperature 1: it goes with --divergence reverse, --temperature 1 and "
                         "--states rollout")
    return args


# ---------------------------------------------------------------------------------- the objective
# Pure functions of tensors. -inf marks ids that are ruled out, in the same places in z_s and z_t.
# Each divergence normalises both sides itself: log-probabilities will do, too.

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
    return reverse_kl(z_t, z_s)


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
    this very p_S: at temperature 1, with one vocabulary. reverse_kl sums over all v what this
    leaves to one draw. sampled_kl is for comparison, and for teachers that give one log-probability
    per token.
    """
    logp_s = z_s.log_softmax(-1).gather(-1, y[:, None])[:, 0]               # (n,)
    logp_t = z_t.log_softmax(-1).gather(-1, y[:, None])[:, 0]               # (n,)
    advantage = (logp_t - logp_s).detach()                                  # (n,)
    # The bracket is 1, so this has the value above; its gradient is d log p_S(y_t).
    return -advantage * (1 + logp_s - logp_s.detach())                      # (n,)


def token_divergence(z_s, z_t, y, divergence, support, top_k):
    """D_t of each row: logits z_s, z_t (n, V) of one vocabulary, emitted ids y (n,) -> (n,) nats.

    divergence  "reverse": KL(p_S || p_T), "forward": KL(p_T || p_S)
    support     "full": all ids; "union": U_t, on which both sides are renormalised (Eq. 1, at the
                public code's temperature of 1); "sampled": y alone, for reverse KL

    Ids outside the support get no gradient: mass that the student wastes there is never pulled
    back, and with k = 1 and equal argmax the loss is 0.
    """
    if support == "sampled":
        return sampled_kl(z_s, z_t, y)
    if support == "union":  # which ids are compared is a choice: there is nothing to differentiate
        outside = ~union_support(z_s.detach(), z_t, top_k)                  # (n, V)
        z_s = z_s.masked_fill(outside, -math.inf)
        z_t = z_t.masked_fill(outside, -math.inf)
    return reverse_kl(z_s, z_t) if divergence == "reverse" else forward_kl(z_s, z_t)


def loss_in_chunks(hidden_s, hidden_t, y, head_s, head_t, token_kl, chunk, N):
    """Heads, loss and its gradient for n rows, `chunk` at a time -> 1/N sum_t D_t (), its gradient
    (n, width).

    At most `chunk` rows of logits exist at a time. hidden_s (n, width), hidden_t (n, width_t), y
    (n,): emitted ids; head_s, head_t: hidden rows -> logits, both in the student's ids, -inf where
    the teacher has none; token_kl: (z_s, z_t, y) -> D_t, such as
    `lambda z_s, z_t, y: reverse_kl(z_s, z_t)`; N: tokens of the whole step. A chunk's rows are
    detached: its backward adds to the gradient of the head's weight (with a tied head, that of the
    embeddings), and stops at the rows. The caller continues from there:

        loss, grad_rows = loss_in_chunks(hidden_s, ...)
        hidden_s.backward(grad_rows)
    """
    loss = torch.zeros((), device=hidden_s.device)
    grad_rows = torch.zeros_like(hidden_s)                                  # (n, width)
    for i in range(0, len(hidden_s), chunk):
        leaf = hidden_s[i:i + chunk].detach().requires_grad_()              # (C, width)
        with torch.no_grad():
            z_t = head_t(hidden_t[i:i + chunk])                             # (C, V)
        # What the teacher can't score leaves the loss: ids that it lacks, and special tokens other
        # than those that end a transcript.
        z_s = head_s(leaf).masked_fill(z_t.isneginf(), -math.inf)           # (C, V)
        chunk_loss = token_kl(z_s, z_t, y[i:i + chunk]).sum() / N           # ()
        chunk_loss.backward()
        grad_rows[i:i + chunk] = leaf.grad
        loss += chunk_loss.detach()
    return loss, grad_rows


# --------------------------------------------------------------------------------------- the loop

@record  # torchrun then shows what stopped a process, at the end
def main(args):
    """The algorithm at the top of this file; without --student, the demo."""
    if not args.student:
        return demo(args)
    rank, world, device = model.setup(args)
    torch.manual_seed(args.seed)
    resumed = model.find_save(args)
    need = ("text",) if args.states == "reference" else ()
    train = data.read_manifest(args.data, need, args.language)
    student = model.load_student(resumed or args.student, device)           # both in eval mode
    teacher = model.load_teacher(args.teacher, device)
    model.check_languages(teacher, train)
    to_teacher = model.vocabulary_map(student, teacher)  # (V,); -1: it lacks the id, or is special
    weight_t = teacher.head.weight.float()  # once, not in every chunk: 1.2 GB for Qwen3-ASR-1.7B
    head_s = partial(model.logits, weight=student.head.weight)

    def head_t(hidden):  # (n, width_t) -> (n, V): in the student's ids, -inf where it has none
        return model.map_logits(model.logits(hidden, weight_t), to_teacher)

    token_kl = partial(token_divergence, divergence=args.divergence, support=args.support,
                       top_k=args.top_k)
    trained = model.trainable(student, args.freeze, args.recompute)
    parameters = list(trained.values())
    # fused: no copies of gradients in a step's peak of memory
    optimizer = torch.optim.AdamW(
        parameters, args.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=device.type == "cuda")
    run = model.Run(args, student, trained, optimizer, resumed, rank, world)
    plan = data.Plan(len(train), args.batch, args.seed)
    steps = data.Steps(train, plan, rank, world, (student.n_mels, teacher.n_mels))
    batches = iter(data.loader(steps, range(run.start, args.steps), args.workers))
    if rank == 0:
        print(f"{(to_teacher >= 0).sum()} of {len(student.tokenizer)} ids are the teacher's, too; "
              f"{len(train)} clips, {plan.steps_per_epoch} steps per epoch", flush=True)

    for step in range(run.start, args.steps):
        began = time.time()
        batch = next(batches)
        if args.freeze:
            model.hear(student, batch, args.micro_batch)  # once for (1) and (3)

        # ---- (1) rollout   y ~ p_S(. | x), all clips of this rank's share at once          [dev 2]
        #      An empty transcript (EOS at once) is a rollout like any other.                [dev 5]
        if not len(batch):  # this rank has no clip; it still takes part in the collectives
            ids, mask = data.pad_rows([], student.pad_id, device)           # (0, 0)
        elif args.states == "reference":  # a control: the transcripts' states, off-policy
            responses = [student.encode_text(u.text) for u in batch.utterances]
            ids, mask = data.pad_rows(responses, student.pad_id, device)    # (B, R)
        else:
            with torch.no_grad():  # the encoder takes --micro_batch clips at a time
                prompt = model.encode_audio(student, batch, args.micro_batch)
            uniforms = data.keyed_uniforms(                                 # (B, --max_new_tokens)
                args.seed, step, [u.id for u in batch.utterances], args.max_new_tokens)
            ids, mask = model.generate(                                     # (B, R)
                student, prompt.embeds, prompt.mask, args.max_new_tokens, args.temperature,
                uniforms)
        # What can be scored: up to the first id that the teacher's vocabulary lacks. Attention is
        # causal, so what comes after a row's scored columns changes nothing.
        scored = mask & (to_teacher[ids] >= 0).cumprod(1).bool()            # (B, R)
        ended = (student.stop[ids] & mask).any(1)                           # (B,)
        totals = model.all_sum({  # a collective
            "tokens": scored.sum(), "not_scored": (mask & ~scored).sum(), "clips": len(batch),
            "truncated": (~ended).sum(), "empty": (ended & (mask.sum(1) == 1)).sum(),
            "rejected": len(batch.rejected), "audio_sec": batch.audio_sec,
            "signals": len(run.signals)}, device)  # one on any rank stops all after this step
        N = max(1, totals["tokens"])

        loss = torch.zeros((), device=device)
        for i in range(0, len(batch), args.micro_batch):
            rows = slice(i, i + args.micro_batch)
            part = batch.rows(rows.start, rows.stop)
            # No forward needs the columns behind the last scored one; one is kept if there is none.
            longest = max(1, int(scored[rows].sum(1).max()))                # r
            ids_s = ids[rows, :longest]                                     # (b, r)
            is_scored = scored[rows, :longest]                              # (b, r), n are True
            y = ids_s[is_scored]                                            # (n,)

            # ---- (2) teacher   hidden_t[t] at (x, y_<t); z_T[t] = head_t(hidden_t[t]), in (4)
            #      The same ids, in its numbering, on the same audio.                        [dev 3]
            with torch.no_grad():
                prompt_t = model.encode_audio(teacher, part)            # .embeds (b, P, width_t)
                # (b, r); where it lacks an id, any will do: that position is not scored.
                ids_t = to_teacher[ids_s].clamp(min=0)
                hidden_t = model.response_hidden(                           # (n, width_t)
                    teacher.body, prompt_t.embeds, prompt_t.mask, ids_t, is_scored)

            # ---- (3) student   hidden_s[t] at (x, y_<t), now with gradients; z_S[t] in (4)
            #      The audio is encoded again: a graph kept from (1) would hold the whole share.
            #      Columns P-1 ... P+r-2 predict y_0 ... y_{r-1}; those of scored ones are packed.
            prompt_s = model.encode_audio(student, part)                    # .embeds (b, P, width)
            hidden_s = model.response_hidden(                               # (n, width)
                student.body, prompt_s.embeds, prompt_s.mask, ids_s, is_scored)

            # ---- (4) loss      1/N sum_t D_t,   D_t = KL(p_S(.|t) || p_T(.|t)),   p = softmax(z),
            #      z_S[t] = head_s(hidden_s[t]),   z_T[t] = head_t(hidden_t[t]), in its ids.
            #      Every token of the step weighs 1 / N, wherever it landed.                 [dev 4]
            #      token_kl is reverse_kl by default. The head's gradient is taken in here.
            part_loss, grad_rows = loss_in_chunks(
                hidden_s, hidden_t, y, head_s, head_t, token_kl, args.chunk, N)
            hidden_s.backward(grad_rows)
            loss += part_loss

        # ---- (5) update    one AdamW step on the gradient of the whole step, clipped to norm 1
        model.sum_gradients(parameters)  # over the ranks: a collective
        grad_norm = nn.utils.clip_grad_norm_(parameters, 1.0).item()
        if not math.isfinite(grad_norm):
            names = [train[i].id for i in plan[step]]
            raise FloatingPointError(f"step {step}: gradient norm {grad_norm}; clips {names}")
        lr = model.learning_rate(step, args)
        optimizer.param_groups[0]["lr"] = lr
        if totals["tokens"]:  # without a token there is no gradient, only AdamW's momentum
            optimizer.step()
        optimizer.zero_grad()

        totals |= model.all_sum({"loss": loss * N}, device)  # for the log, a sum over tokens
        # Log, save and evaluation where they are due; the ranks share --dev's clips: a collective.
        if run.end_step(step + 1, batch, totals, grad_norm, lr, time.time() - began):
            break
    run.close()


# --------------------------------------------------------------------------------------- the demo

SYSTEMS = ("base", "more", "opd", "td", "td_opd", "teacher")


def demo(args):
    """The paper's experiment in miniature: `demo_commands`, each unless it is done already in --out
    (default runs/demo); then the demo's versions of the paper's Tables 1 and 2."""
    if int(os.environ.get("RANK", 0)) > 0:
        return  # rank 0 starts every stage, and its processes
    root = Path(args.out or "runs/demo")
    root.mkdir(parents=True, exist_ok=True)
    note = root / "stages.json"  # {stage: its command and seconds}, of those that are done
    done = data.read_json(note) if note.exists() else {}
    for name, command in demo_commands(args, root).items():
        print(f"\n$ {command}", flush=True)
        if name not in done:
            done[name] = [command, run_stage(command)]
            data.write_json(note, done)
        if done[name][0] != command:
            raise SystemExit(f"{root / name} was made by another command: {done[name][0]}\n"
                             "Remove the demo's folder, or choose another --out.")
    write_result(root, {name: seconds for name, (_, seconds) in done.items()})


def demo_commands(args, root) -> dict[str, str]:
    """{stage: command}, in order; each writes to ROOT/stage."""
    processes = min(2, os.cpu_count())  # a busy machine slows them less than one of two threads
    if args.device != "cpu" and torch.cuda.is_available():
        processes = torch.cuda.device_count()
    at = shlex.quote(str(root))
    train = f"{at}/data/train.jsonl"
    dev = f"{at}/data/dev.jsonl"
    test = f"{at}/data/test.jsonl"
    run = f"torchrun --standalone --nproc_per_node {processes}"
    device = f"--device {args.device}"
    sft = f"{run} sft.py --dev {dev} --resume {device} --seed {args.seed}"
    opd = f"{run} distill.py --teacher {at}/teacher --data {train} --dev {dev} --resume {device}"
    for flag, default in vars(parse_args([])).items():  # other flags given are for these stages
        value = getattr(args, flag)
        if flag == "seed" or (value != default and flag not in ("out", "device")):
            opd += f" --{flag}" if value is True else f" --{flag} {value}"
    go_on = f"{sft} --student {at}/base --lr {args.lr} --warmup {args.warmup} --batch {args.batch}"
    td = f"{at}/transcripts/td.jsonl"
    commands = {
        "data": f"python data.py demo --out {at}/data --seed {args.seed}",
        # The teacher has a corpus of its own: more voices, other sentences, no clip of train.
        "teacher": f"{sft} --init random --data {at}/data/teacher.jsonl --out {at}/teacher "
                   "--d_model 112 --encoder_layers 3 --steps 2200 --lr 2e-3",
        "base": f"{sft} --init random --data {train} --tokenizer {at}/teacher --out {at}/base",
        # OPD on the very clips that base was trained on (section 4.1), and as many updates of SFT.
        "opd": f"{opd} --student {at}/base --out {at}/opd",
        "more": f"{go_on} --data {train} --out {at}/more --steps {args.steps}",
        # TD, a short stage on the teacher's transcripts of a little other audio; then OPD.
        "transcripts": f"{run} evaluate.py --model {at}/teacher --data {at}/data/pool.jsonl "
                       f"--resume {device} --out {at}/transcripts --as_manifest {td}",
        "td": f"{go_on} --data {td} --out {at}/td --steps {max(1, args.steps // 3)}",
        "td_opd": f"{opd} --student {at}/td --out {at}/td_opd",
    }
    for name in SYSTEMS:
        commands[f"eval/{name}"] = (f"{run} evaluate.py --model {at}/{name} --data {test} --resume "
                                    f"{device} --out {at}/eval/{name}")
    commands["overlap"] = (f"{run} overlap.py --student {at}/base {at}/td --teacher {at}/teacher "
                           f"--data {test} --out {at}/overlap {device} --seed {args.seed}")
    hyps = " ".join(f"{at}/eval/{name}/hyps.jsonl" for name in SYSTEMS)
    commands["compare"] = f"python evaluate.py --compare {hyps} --out {at}/compare"
    return commands


def run_stage(command) -> float:
    """Runs a command of the demo -> seconds. Exits if it fails."""
    program, *words = shlex.split(command)
    launcher = ["-m", "torch.distributed.run"] if program == "torchrun" else []
    words = [str(Path(__file__).parent / word) if word.endswith(".py") else word for word in words]
    place = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(place)}  # not this one's
    environment["OMP_NUM_THREADS"] = "1"  # what torchrun sets too, with a warning
    began = time.time()
    code = subprocess.run([sys.executable, *launcher, *words], env=environment).returncode
    if code:
        raise SystemExit(f"the command above ended with exit code {code}")
    return time.time() - began


def write_result(root, seconds) -> None:
    """result.json: the demo's two tables, {system: {rate or statistic, its interval}}."""
    result = {"seconds": seconds}
    for row in json.loads((root / "compare" / "compare.json").read_text()):
        system = result.setdefault(row["system"], {})
        rate = row["metric"].lower()  # wer, cer, pooled
        system |= {rate: row["rate"], f"{rate}_interval": [row["low"], row["high"]]}
        if rate == "pooled":
            system |= {"below_base": row["difference"],
                       "below_base_interval": [row["difference_low"], row["difference_high"]]}
    overlap = data.read_json(root / "overlap" / "overlap.json")
    for system, report in zip(("base", "td"), overlap["students"]):
        for name in ("vuss", "overlap"):
            e = report[name]
            result[system] |= {name: e["mean"], f"{name}_interval": [e["low"], e["high"]]}
    data.write_json(root / "result.json", result)
    shutil.copy(root / "compare" / "compare.png", root / "result.png")
    print(f"{root}/result.json  {root}/result.png  {sum(seconds.values()):.0f} s")


if __name__ == "__main__":
    main(parse_args())
