"""Support overlap: where student and teacher agree, on the states the student visits.

Section 4.3 and Table 2 of the paper (arXiv 2605.28139). A state is what both models have read
before a token of the student's own rollout, EOS included: (x, y_<t). At state t each model names
the k most probable tokens of those it may write (special tokens are out beforehand). Tokens without
a counterpart in the other vocabulary are dropped afterwards. What is left are the sets S_t of the
student and T_t of the teacher.

    python overlap.py --student runs/x/sft --teacher runs/x/teacher --data test.jsonl --out runs/x/o
    python overlap.py --student runs/x/sft runs/x/td --teacher ...          # the paper's Table 2
    torchrun --nproc_per_node 8 overlap.py --student ...                    # the same
    python overlap.py --check --student runs/x/sft --teacher runs/x/teacher --data dev.jsonl
                                # before a week of training: do the two fit; anything to learn?

Rollouts are sampled at temperature 1, as in training, from uniforms keyed on (seed, utterance).

--out receives overlap.png and overlap.json: the flags, "students" (a list), and "difference":
{later student: how far it is below the first one, first minus later, paired by utterance}. Each
statistic is {"mean", "low", "high"}: the mean over states, and a 95 % interval that resamples
utterances. Of a student:

  vuss          |S_t ∪ T_t|, the Valid Union Support Size, up to 2k: smaller is closer. It is
                2k - |S_t ∩ T_t| when nothing is dropped
  overlap       |S_t ∩ T_t| / k: the same on a scale of 0 to 1, larger is closer
  top1          do both models put the same token first? (overlap at k = 1)
  logp_t        log p_T of the written token, nats
  kl_reverse    KL(p_S || p_T), which OPD minimises, nats, over all ids that both models may write
  kl_forward    KL(p_T || p_S), likewise
  by_token      a list: all above at the token of that index, as far as 20 clips have one
  student, clips, states, states_not_scored    the last: at or after a token without a counterpart

Differs from the paper and the public code (numbers go on from sft.py):
  [dev 11] VUSS is a mean over the states of all ranks, and stop tokens stay in the student's set;
           the public code takes them out, and reports one rank's means of training batches, of
           which Table 2 has the smallest and the largest.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.utils.rnn import pad_sequence

import data
import model
from data import at_least


def parse_args(argv=None):
    """Flags -> namespace. A flag that is not read is refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=data.HelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    # what to measure; checkpoints are directories or Hub ids
    add("--student", nargs="+", required=True, help="checkpoints, each writes its own rollouts")
    add("--teacher", required=True, help="checkpoint that scores them")
    add("--data", nargs="+", required=True, help="manifests")
    add("--language", help="of lines that name none (Qwen3-ASR is told it)")
    # what to do
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--out", help="folder for overlap.json and overlap.png")
    add("--check", action="store_true", help="try one student and the teacher on up to 200 clips")
    add = parser.add_argument
    # rollouts
    add("--temperature", type=at_least(0.0), default=1.0, help="of rollouts; 0 = greedy")
    add("--max_new_tokens", type=at_least(1), default=64, help="longest rollout, tokens")
    add("--seed", type=at_least(0), default=0, help="of the rollouts and of the batches")
    # statistics
    add("--top_k", type=at_least(1), default=32, help="size of each model's set")
    # cost
    add("--batch", type=at_least(1), default=32, help="utterances per forward")
    add("--chunk", type=at_least(1), default=256, help="tokens whose logits exist at a time")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="where to run")
    args = parser.parse_args(argv)
    if args.check and args.top_k != parser.get_default("top_k"):
        parser.error("--check does not read --top_k")
    if args.check and len(args.student) > 1:
        parser.error("--check takes one --student")
    return args


@record  # torchrun then shows what stopped a process, at the end
def main(args) -> None:
    """Measures one student after the other; writes, prints and draws what was found."""
    rank, world, device = model.setup(args)
    if args.check and rank > 0:
        return model.finish()  # one process is enough
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    utterances = data.read_manifest(args.data, language=args.language)
    teacher = model.load_teacher(args.teacher, device)
    model.check_languages(teacher, utterances)

    students = []
    draws = []
    for name in args.student:
        student = model.load(name, device)
        to_teacher = model.vocabulary_map(student, teacher)
        if args.check:
            return check(student, teacher, to_teacher, utterances, args)
        tables = measure(
            student, teacher, to_teacher, utterances, args, "rollout", rank, world)
        summary, drawn = summarize(tables)
        students.append({"student": name} | summary)
        draws.append(drawn)
    model.finish()
    if rank > 0:
        return
    difference = {}
    for later, drawn in zip(args.student[1:], draws[1:]):  # the same utterances are drawn: paired
        difference[later] = as_entries(draws[0] - drawn)
    for summary in students:
        print("\n{student}: mean [95 %] of {states} states of {clips} clips; {states_not_scored} "
              "more can't be scored".format(**summary))
        print_entries(summary)
    for later, entries in difference.items():
        print(f"\n{later} below {args.student[0]}:")
        print_entries(entries)
    result = vars(args) | {"students": students, "difference": difference}
    data.write_json(Path(args.out) / "overlap.json", result)
    draw_overlap(students, args.top_k, Path(args.out) / "overlap.png")


# ------------------------------------------------- the statistics: pure tensors, copies out alone

def overlap_stats(z_s, z_t, mask, k, written=None) -> dict[str, torch.Tensor]:
    """Statistics of every state, as the top of this file defines them -> {name: (n,) float64}.

    z_s, z_t (..., V): logits over the same columns, -inf where a model may not write. A column that
        is -inf on either side is in neither set, but takes its place among the top k of the side
        where it is finite.
    mask (...): True on the n states that count.
    written (...): the emitted ids, each finite on both sides; without them no "logp_t".
    """
    z_s = z_s[mask]                                                         # (n, V)
    z_t = z_t[mask]                                                         # (n, V)
    valid = ~torch.isneginf(z_s) & ~torch.isneginf(z_t)                     # (n, V)
    logp_s = z_s.masked_fill(~valid, -torch.inf).log_softmax(-1)            # (n, V)
    logp_t = z_t.masked_fill(~valid, -torch.inf).log_softmax(-1)            # (n, V)
    log_ratio = (logp_s - logp_t).masked_fill(~valid, 0.0)                  # 0 log 0 = 0
    k = min(k, z_s.shape[-1])
    top_s = z_s.topk(k).indices                                             # (n, k) best first
    top_t = z_t.topk(k).indices                                             # (n, k)
    valid_s = valid.gather(-1, top_s)                                       # (n, k) S_t
    valid_t = valid.gather(-1, top_t)                                       # (n, k) T_t
    # k x k comparisons per row; membership masks would be V wide, 150 times that at V = 151,936.
    same = (top_s[:, :, None] == top_t[:, None]) & valid_s[:, :, None]      # (n, k, k)
    shared = same.sum((1, 2))                                               # (n,)
    stats = {
        "vuss": valid_s.sum(-1) + valid_t.sum(-1) - shared,
        "overlap": shared.double() / k,
        "top1": same[:, 0, 0],
        "kl_reverse": (logp_s.exp() * log_ratio).sum(-1),
        "kl_forward": -(logp_t.exp() * log_ratio).sum(-1),
    }
    if written is not None:
        stats["logp_t"] = logp_t.gather(-1, written[mask][:, None])[:, 0]
    return {name: value.double() for name, value in stats.items()}


STATISTICS = ("vuss", "overlap", "top1", "logp_t", "kl_reverse", "kl_forward")


# ---------------------------------------------------------------------------------------- measure

def measure(student, teacher, to_teacher, utterances, args, states, rank=0, world=1):
    """A table (R, M) of every clip, in the order of `utterances`: M STATISTICS at its R states.

    states: "rollout" or "reference". A row is nan where the state can't be scored. Raises
    data.AudioError if a clip can't be read.
    """
    tables = {}  # by the line in the manifest
    plan = data.Plan(len(utterances), args.batch, args.seed)
    steps = range(rank, plan.steps_per_epoch, world)
    for step in data.progress(len(steps), "overlap", "batch", rank, rows=steps):
        clips = [utterances[i] for i in plan[step]]
        batch = data.load_batch(clips, (student.n_mels, teacher.n_mels), for_training=False,
                                keep_going=False)
        tables |= measure_batch(student, teacher, to_teacher, batch, args, states)
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, tables)
        for part in parts:
            tables |= part
    return [tables[u.line] for u in utterances]


@torch.no_grad()
def measure_batch(student, teacher, to_teacher, batch, args, states):
    """{line: table} of a batch, see `measure`.

    Raises FloatingPointError, naming the clips, where a statistic is not finite.
    """
    names = [u.id for u in batch.utterances]
    prompt_s = model.encode_audio(student, batch)
    prompt_t = model.encode_audio(teacher, batch)
    if states == "reference":
        rows = [student.encode_text(u.text) for u in batch.utterances]
        ids, mask = data.pad_rows(rows, student.pad_id, student.device)                 # (B, R)
    else:
        uniforms = data.keyed_uniforms(args.seed, 0, names, args.max_new_tokens)
        ids, mask = model.generate(                                                     # (B, R)
            student, prompt_s.embeds, prompt_s.mask, args.max_new_tokens, args.temperature,
            uniforms)
    # Up to the first id that the teacher lacks: it can read neither that nor what follows.
    scored = mask & (to_teacher[ids] >= 0).cumprod(1).bool()                            # (B, R)
    # 0 stands in for a missing counterpart; it is not scored, so the teacher never reads it.
    ids_t = to_teacher[ids].clamp(min=0)                                                # (B, R)
    hidden_s = model.response_hidden(
        student.body, prompt_s.embeds, prompt_s.mask, ids, scored)                  # (n, width)
    hidden_t = model.response_hidden(
        teacher.body, prompt_t.embeds, prompt_t.mask, ids_t, scored)                # (n, width_t)

    # Columns of the logits: the student's ids, then those that only the teacher may write, which
    # take their places among its top k. Stop tokens are not blocked.                   [dev 11]
    teacher_only = ~teacher.blocked                                                     # (V_t,)
    teacher_only[to_teacher[to_teacher >= 0]] = False                               # E are left
    weight_s = student.head.weight.float()                                          # (V, width)
    weight_t = teacher.head.weight.float()                                          # (V_t, width_t)
    y = ids[scored]                                                                     # (n,)
    values = torch.zeros(len(y), len(STATISTICS), device=y.device)                      # (n, M)
    for i in range(0, len(y), args.chunk):
        rows = slice(i, i + args.chunk)
        z_s = model.logits(hidden_s[rows], weight_s)                                    # (C, V)
        z_s = z_s.masked_fill(student.blocked, -math.inf)                               # (C, V)
        z_t = model.logits(hidden_t[rows], weight_t)                                    # (C, V_t)
        z_only = z_t[:, teacher_only]                                                   # (C, E)
        z_s = torch.cat([z_s, torch.full_like(z_only, -math.inf)], dim=1)           # (C, V + E)
        z_t = torch.cat([model.map_logits(z_t, to_teacher), z_only], dim=1)         # (C, V + E)
        every = torch.ones_like(y[rows], dtype=torch.bool)                              # (C,)
        stats = overlap_stats(z_s, z_t, every, args.top_k, y[rows])
        values[rows] = torch.stack([stats[name] for name in STATISTICS], dim=1)         # (C, M)
    if not values.isfinite().all():
        raise FloatingPointError(f"not finite: some statistic of the batch with clips {names}")
    table = values.new_full((*ids.shape, len(STATISTICS)), math.nan)                # (B, R, M)
    table[scored] = values
    return {u.line: rows[written].cpu()
            for u, rows, written in zip(batch.utterances, table, mask)}


# ----------------------------------------------------------------------------------------- reduce

def summarize(tables) -> tuple[dict, np.ndarray]:
    """Tables of all clips, see `measure` -> a student's part of overlap.json, `average` of all."""
    padded = pad_sequence(tables, batch_first=True, padding_value=math.nan).double().numpy()
    n_states = (~np.isnan(padded[:, :, 0])).sum(0).tolist()         # of each index of a token
    drawn = average(padded)
    summary = as_entries(drawn) | {"clips": len(tables), "states": sum(n_states)}
    summary["states_not_scored"] = sum(map(len, tables)) - sum(n_states)
    summary["by_token"] = [as_entries(average(padded[:, t:t + 1])) | {"states": n}
                           for t, n in enumerate(n_states) if n >= 20]
    return summary, drawn


def average(padded) -> np.ndarray:
    """Means over states of all clips, then of clips drawn anew: (clips, R, M) -> (1 + draws, M)."""
    counts = (~np.isnan(padded)).sum(1)                             # (clips, M)
    sums = np.nansum(padded, axis=1)                                # (clips, M)
    return np.vstack([sums.sum(0) / counts.sum(0), data.bootstrap(sums, counts)])


def as_entries(drawn) -> dict[str, dict]:
    """What `average` returns -> {statistic: {"mean", "low", "high"}}."""
    low, high = data.interval(drawn[1:])                            # (M,) each
    entries = {}
    for name, *values in zip(STATISTICS, drawn[0].tolist(), low.tolist(), high.tolist()):
        entries[name] = dict(zip(("mean", "low", "high"), values))
    return entries


# ------------------------------------------------------------------------------------------- show

def print_entries(entries) -> None:
    for name in STATISTICS:
        print(f"{name:12}", "{mean:8.3f} [{low:.3f}, {high:.3f}]".format(**entries[name]))


def draw_overlap(students, k, path) -> None:
    """Overlap and KL by token, with intervals."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, name in zip(axes, ("overlap", "kl_reverse")):
        for student in students:
            shown = [token[name] for token in student["by_token"]]
            x = range(len(shown))
            axis.plot(x, [e["mean"] for e in shown], "o-", label=Path(student["student"]).name)
            axis.fill_between(x, [e["low"] for e in shown], [e["high"] for e in shown], alpha=0.2)
        axis.set(xlabel="index of the token in the rollout", ylim=(0, None))
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set(title=f"shared part of the top {k} (bands: 95 %)", ylim=(0, 1))
    axes[1].set(title="KL(student || teacher), nats per token")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


# ---------------------------------------------------------------------------------------- --check

def check(student, teacher, to_teacher, utterances, args) -> None:
    """Prints what up to 200 clips tell of the pair; exits with 1 if the two do not fit.

    A teacher given the right audio and the right ids finds a reference far likelier than another
    clip's. A wrong vocabulary map, a wrong prompt, random weights or unheard audio bring the two
    numbers together. Raises ValueError without two clips of different transcripts.
    """
    chosen = [utterances[i] for i in data.Plan(len(utterances), 200, args.seed)[0]]
    clips = list({u.text: u for u in chosen if u.text}.values())  # each with another text
    if len(clips) < 2:
        raise ValueError(f"--check wants two different transcripts, in {', '.join(args.data)}")
    mixed_up = [replace(u, text=clips[i - 1].text) for i, u in enumerate(clips)]
    means = []
    for heard, states in ((clips, "rollout"), (clips, "reference"), (mixed_up, "reference")):
        tables = measure(student, teacher, to_teacher, heard, args, states)
        means.append(dict(zip(STATISTICS, torch.cat(tables).nanmean(0).tolist())))
    rollout, reference, other = means
    counts = []  # of each clip: errors of both, units
    for i in range(0, len(clips), args.batch):
        batch = data.load_batch(clips[i:i + args.batch], (student.n_mels, teacher.n_mels),
                                for_training=False, keep_going=False)
        found = [model.transcribe(asr, batch, args.max_new_tokens) for asr in (student, teacher)]
        for u, *results in zip(batch.utterances, *found):
            hyps = [result["hyp"] for result in results]
            of_s, of_t = [data.edit_counts(u.text, hyp, u.language) for hyp in hyps]
            counts.append((of_s.errors, of_t.errors, of_s.units))
    errors_s, errors_t, units = np.array(counts).T                          # (clips,) each
    low, high = data.interval(100 * data.bootstrap(errors_s - errors_t, units))
    model.finish()

    print(f"clips                 {len(clips)}, each with another text; one of them: {u.id}\n"
          f"  teacher's prompt    ...{teacher.tokenizer.decode(teacher.suffix_of(u))[-40:]}\n"
          f"  reference           {u.text}\n"
          f"  student             {hyps[0]}\n"
          f"  teacher             {hyps[1]}\n"
          f"errors                student {100 * errors_s.sum() / units.sum():.1f} %, "
          f"teacher {100 * errors_t.sum() / units.sum():.1f} %\n"
          f"at rollouts           {100 * rollout['top1']:.1f} % equal first choices, KL(student || "
          f"teacher) {rollout['kl_reverse']:.3f} nats per token\n"
          f"log p_T per token     {reference['logp_t']:.3f} nats of references, "
          f"{other['logp_t']:.3f} of other clips' references")
    if not reference["logp_t"] > other["logp_t"] + 1:  # nan: not even one state could be scored
        raise SystemExit("The two do not fit, or the teacher does not know this audio: to it, "
                         "references are not even one nat per token likelier than other clips' "
                         "references. Wrong checkpoint, language or transcripts?")
    found = "is something to learn" if low > 0 else "may be nothing to learn"
    print(f"The two fit. There {found}: the teacher makes {low:.1f} to {high:.1f} points fewer "
          "errors.")


if __name__ == "__main__":
    main(parse_args())
