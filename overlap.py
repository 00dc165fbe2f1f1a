"""Support overlap: where student and teacher agree, on the states the student visits.

Section 4.3 and Table 2 of the paper (arXiv 2605.28139). A state is a token of the student's own
rollout, EOS included: the prefix before it is what both models have read. At state t each model
names the k most probable tokens of those it may write (special tokens are out beforehand). Tokens
without a counterpart in the other vocabulary are dropped afterwards. What is left are the sets S_t
of the student and T_t of the teacher; u is their union, n their intersection below.

    python overlap.py --student runs/x/sft --teacher runs/x/teacher --data test.jsonl --out runs/x/o
    python overlap.py --student runs/x/sft --compare runs/x/td --teacher ...   # the paper's Table 2
    torchrun --nproc_per_node 8 overlap.py --student ...                       # the same
    python overlap.py --check --student runs/x/sft --teacher runs/x/teacher --data pool.jsonl
                                                                # do the two fit together at all?

Rollouts are sampled at temperature 1, as in training, from uniforms keyed on (seed, utterance): two
students are given the same random numbers. Batches are those of distill.py's first epoch, whatever
the number of processes.

--out receives overlap.json and overlap.png. A statistic is {"mean", "low", "high"}: the mean over
states, and a 95 % interval that resamples utterances (null where too few have such a state). Over all states there are also "batch_mean",
"batch_min" and "batch_max", over the means of full batches, as in Table 2.

  vuss             |S_t u T_t|, the Valid Union Support Size, up to 2k: smaller is closer.
                   It is 2k - |S_t n T_t| when nothing is dropped
  overlap          |S_t n T_t| / k: the same on a scale of 0 to 1, larger is closer
  mass_s, mass_t   p_S(S_t n T_t), p_T(S_t n T_t): each model's probability of the shared tokens
  union_kl_reverse, union_kl_forward
                   KL with both sides renormalised on S_t u T_t. Forward is the paper's Eq. 1
The others do not depend on k. p_S and p_T are over all ids that both vocabularies have; entropies
and divergences are in nats:
  top1             do both models put the same token first? (overlap at k = 1)
  rank             of the written token under the teacher: 1 + ids with a strictly larger logit.
                   A mean of ranks hangs on its largest ones
  logp_t           log p_T of the written token
  entropy_s, entropy_t
  kl_reverse, kl_forward
                   KL(p_S || p_T), which OPD minimises, and KL(p_T || p_S)

  by_k             the statistics that depend on k, for k = 1, 8, 16 and 32
  by_token         by the token's index in the rollout: "0", "1" ... "20 and later". overlap.png
                   shows single indices, as far as 20 clips or more have one
  by_error         "inside": the token belongs to a substituted or inserted word (character), or
                   reference words are missing right before the word it begins (or before EOS)
  by_distance      by tokens from the rollout's first "inside" state, negative before it
  vuss_histogram   size of the union: number of states
  states, clips    how many; every bin of by_token, by_error and by_distance has its own
  states_not_scored, clips_not_aligned, clips_with_error
                   states at or behind a token without counterpart; clips without text or language,
                   which are not in by_error; clips with an "inside" state, as in by_distance
  student, teacher, data, k, states_of, seed, temperature, batch, batches, shared_ids
                   what was measured; batches: full ones; shared_ids: that both vocabularies have
  compare, difference
                   with --compare: the second student's keys; second minus first, paired by clip

Differs from the public code: that reports the number of one rank, and also takes stop tokens out of
the student's set.
"""

import argparse
import json
import math
import resource
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jiwer
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

import data
import model
from data import at_least_one, not_negative, whole_number

KS = (1, 8, 16, 32)  # reported whatever --top_k is
OF_K = ("vuss", "overlap", "mass_s", "mass_t", "union_kl_reverse", "union_kl_forward")
STATISTICS = OF_K + ("top1", "rank", "logp_t", "entropy_s", "entropy_t", "kl_reverse", "kl_forward")
COLUMNS = STATISTICS + tuple(f"{name}@{k}" for k in KS for name in OF_K)

LAST_TOKEN = 20  # this index and all later ones share a bin
BREAKDOWNS = {
    "by_token": [str(t) for t in range(LAST_TOKEN)] + [f"{LAST_TOKEN} and later"],
    "by_error": ["outside", "inside"],
    "by_distance": ["-4 and less", "-3", "-2", "-1", "0", "1", "2", "3", "4 to 7", "8 and more"],
}
ALL = ("", "")  # the cell of all states; the other cells are the bins of the breakdowns
CELLS = [ALL] + [(section, label) for section in BREAKDOWNS for label in BREAKDOWNS[section]]
MIN_CLIPS = 20  # the picture ends where fewer have a token


# --------------------------------------------------- the statistics: pure tensors, copies out alone

def overlap_stats(z_s, z_t, mask, k, written=None, more_k=()) -> dict[str, torch.Tensor]:
    """Statistics of every state, as the top of this file defines them -> {name: (N,) float64}.

    z_s, z_t (..., V): logits over the same columns, -inf where a model may not write. A column that
        is -inf on either side is in neither set, but takes its place among the top k of the side
        where it is finite.
    mask (...): True on the N states that count.
    written (...): the emitted ids, each finite on both sides; without them no "rank" and "logp_t".
    more_k: further values of k, whose statistics are called "vuss@8" and so on.
    """
    def renormalise(z, support):
        """p and log p on the support, both 0 outside it: so 0 log 0 counts as 0."""
        logp = z.masked_fill(~support, -torch.inf).log_softmax(-1).masked_fill(~support, 0.0)
        return logp.exp() * support, logp

    z_s, z_t = z_s[mask], z_t[mask]                                     # (N, V)
    valid = ~torch.isneginf(z_s) & ~torch.isneginf(z_t)                 # (N, V)
    p_s, logp_s = renormalise(z_s, valid)                               # (N, V)
    p_t, logp_t = renormalise(z_t, valid)                               # (N, V)
    stats = {
        "entropy_s": -(p_s * logp_s).sum(-1),
        "entropy_t": -(p_t * logp_t).sum(-1),
        "kl_reverse": (p_s * (logp_s - logp_t)).sum(-1),
        "kl_forward": (p_t * (logp_t - logp_s)).sum(-1),
    }
    if written is not None:
        y = written[mask][:, None]                                      # (N, 1)
        stats["rank"] = 1 + (valid & (z_t > z_t.gather(-1, y))).sum(-1)
        stats["logp_t"] = logp_t.gather(-1, y)[:, 0]

    # One topk serves every k: smaller sets are prefixes of the largest. K x K comparisons a row
    # find every intersection; membership masks would be V wide, 150 times that at V = 151,936.
    V = z_s.shape[-1]
    largest = min(max(k, *more_k, 1), V)
    ids_s = z_s.topk(largest).indices                                   # (N, K) best first
    ids_t = z_t.topk(largest).indices                                   # (N, K)
    valid_s = valid.gather(-1, ids_s)                                   # (N, K)
    valid_t = valid.gather(-1, ids_t)                                   # (N, K)
    same = (ids_s[:, :, None] == ids_t[:, None]) & valid_s[:, :, None]  # (N, K, K)
    stats["top1"] = same[:, 0, 0]

    for name, j in [("", k)] + [(f"@{j}", j) for j in more_k]:
        j = min(j, V)
        top_s, top_t = ids_s[:, :j], ids_t[:, :j]                       # (N, j)
        s_in_t = same[:, :j, :j].any(2)                                 # (N, j)
        t_in_s = same[:, :j, :j].any(1)                                 # (N, j)
        both = torch.cat([top_s, top_t], dim=1)                         # (N, 2j)
        union = torch.cat([valid_s[:, :j], valid_t[:, :j] & ~t_in_s], dim=1)  # each token once
        u_s, logu_s = renormalise(z_s.gather(-1, both), union)          # (N, 2j)
        u_t, logu_t = renormalise(z_t.gather(-1, both), union)          # (N, 2j)
        stats["vuss" + name] = union.sum(-1)
        stats["overlap" + name] = s_in_t.sum(-1).double() / j
        stats["mass_s" + name] = (p_s.gather(-1, top_s) * s_in_t).sum(-1)
        stats["mass_t" + name] = (p_t.gather(-1, top_s) * s_in_t).sum(-1)
        stats["union_kl_reverse" + name] = (u_s * (logu_s - logu_t)).sum(-1)
        stats["union_kl_forward" + name] = (u_t * (logu_t - logu_s)).sum(-1)
    return {name: value.double() for name, value in stats.items()}


# ---------------------------------------------------------------------------- where a state lies

def common_length(a, b) -> int:
    """Length of the longest common prefix of two sequences."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def unit_errors(reference, hypothesis) -> tuple[set[int], set[int]]:
    """Which units of a normalised hypothesis are substituted or inserted; before which are units of
    the reference missing? Two sets of indices. Alignment is jiwer's, as in the error rate."""
    wrong, after_gap = set(), set()
    for op in jiwer.process_words(reference, hypothesis).alignments[0]:
        if op.type == "delete":
            after_gap.add(op.hyp_start_idx)
        elif op.type != "equal":
            wrong.update(range(op.hyp_start_idx, op.hyp_end_idx))
    return wrong, after_gap


def error_states(asr, ids, text, language) -> list[bool]:
    """For each emitted id, EOS included: does it belong to a recognition error?

    Units are words or characters, as data.normalize splits them. A state is inside an error if its
    token touches a substituted or inserted unit, or if reference units are missing right before it:
    then it is the first token of the unit that follows them, or EOS if none follows.

    A token covers the characters of the decoded text that it finishes, and the one that it leaves
    half written. Covering characters a to b, it touches the units of the normalised text[:b] from
    the first one in which text[:a] differs. So punctuation and spaces touch no unit, and every byte
    of a Mandarin character touches that character.
    """
    spoken = [i for i in ids if not asr.stop[i]]
    whole = asr.tokenizer.decode(spoken)
    hypothesis = data.normalize(whole, language)
    wrong, after_gap = unit_errors(data.normalize(text, language), hypothesis)
    if not wrong and not after_gap:
        return [False] * len(ids)

    inside, begun, start = [], set(), 0  # begun: units that earlier tokens touch
    for n in range(1, len(spoken) + 1):
        prefix = asr.tokenizer.decode(spoken[:n])
        end = common_length(prefix, whole)
        half_written = len(prefix) > end  # it shows as U+FFFD
        before = data.normalize(whole[:start], language).split()
        after = data.normalize(whole[:end + half_written], language).split()
        touched = set(range(common_length(before, after), len(after)))
        is_wrong = not wrong.isdisjoint(touched)
        follows_gap = not after_gap.isdisjoint(touched - begun)
        inside.append(is_wrong or follows_gap)
        begun |= touched
        start = end
    if len(ids) > len(spoken):  # EOS
        inside.append(len(hypothesis.split()) in after_gap)
    return inside


def distance_label(n) -> str:
    """The bin of by_distance for a state n tokens behind the first error."""
    if n <= -4:
        return "-4 and less"
    if n <= 3:
        return str(n)
    if n <= 7:
        return "4 to 7"
    return "8 and more"


def cells_of_states(inside, n) -> np.ndarray:
    """Which cells do the n states of a rollout belong to? (n, len(CELLS)) bool.

    inside: what error_states says, or None where there is no transcript to align with.
    """
    member = np.zeros((n, len(CELLS)), dtype=bool)
    for t in range(n):
        cells = [ALL, ("by_token", BREAKDOWNS["by_token"][min(t, LAST_TOKEN)])]
        if inside is not None:
            cells.append(("by_error", "inside" if inside[t] else "outside"))
        if inside is not None and any(inside):
            cells.append(("by_distance", distance_label(t - inside.index(True))))
        for cell in cells:
            member[t, CELLS.index(cell)] = True
    return member


# ---------------------------------------------------------------------------- measure

class Clip(NamedTuple):
    """A clip's n scored states: a prefix of its rollout."""
    values: np.ndarray     # (n, len(COLUMNS)) float32
    cells: np.ndarray      # (n, len(CELLS)) bool
    n_not_scored: int


def can_align(utterance, states) -> bool:
    """Is there a rollout, and a transcript that tells where it is wrong?"""
    return states == "rollout" and utterance.text is not None and bool(utterance.language)


@torch.no_grad()
def score_states(student, prompt_s, teacher, prompt_t, to_teacher, ids, scored, args) -> np.ndarray:
    """Statistics of the N states under scored (B, R), whose tokens are ids (B, R): (N, columns).

    Columns of the logits are the student's ids, then those that only the teacher may write, which
    take their places among its top k.
    """
    # 0 stands in for a missing counterpart; it is not scored, so the teacher never reads it.
    ids_t = to_teacher[ids].clamp(min=0)                                                # (B, R)
    hidden_s = model.response_hidden(
        student.body, prompt_s.embeds, prompt_s.mask, ids, scored)                      # (N, D)
    hidden_t = model.response_hidden(
        teacher.body, prompt_t.embeds, prompt_t.mask, ids_t, scored)                    # (N, D')
    teacher_only = ~teacher.blocked                                                     # (V_t,)
    teacher_only[to_teacher[to_teacher >= 0]] = False
    y = ids[scored]                                                                     # (N,)

    values = [np.zeros((0, len(COLUMNS)), np.float32)]
    for i in range(0, len(y), args.chunk):
        rows = slice(i, i + args.chunk)
        z_s = model.logits(hidden_s[rows], student.head.weight)                         # (C, V_s)
        z_t = model.logits(hidden_t[rows], teacher.head.weight)                         # (C, V_t)
        z_s = z_s.masked_fill(student.blocked, -math.inf)
        z_only = z_t[:, teacher_only]
        z_s = torch.cat([z_s, torch.full_like(z_only, -math.inf)], dim=1)               # (C, V)
        z_t = torch.cat([model.map_logits(z_t, to_teacher), z_only], dim=1)             # (C, V)
        every = torch.ones(len(z_s), dtype=torch.bool, device=z_s.device)
        stats = overlap_stats(z_s, z_t, every, args.top_k, y[rows], KS)
        table = torch.stack([stats[name] for name in COLUMNS], dim=1)               # (C, columns)
        values.append(table.float().cpu().numpy())
    return np.concatenate(values)


@torch.no_grad()
def measure_batch(student, teacher, to_teacher, batch, states, args) -> dict[str, Clip]:
    """One batch, scored on the states of its "rollout" or its "reference" -> {utterance id: Clip}.

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
        ids, mask = model.roll_out(
            student, prompt_s, args.max_new_tokens, args.temperature, uniforms)         # (B, R)
    scored = model.readable_prefix(ids, mask, to_teacher)                               # (B, R)
    values = score_states(student, prompt_s, teacher, prompt_t, to_teacher, ids, scored, args)
    if not np.isfinite(values).all():
        raise FloatingPointError(f"not finite: some statistic of the batch with clips {names}")

    measured, begin = {}, 0
    for i, utterance in enumerate(batch.utterances):
        response = ids[i][mask[i]].tolist()
        inside = None
        if can_align(utterance, states):
            inside = error_states(student, response, utterance.text, utterance.language)
        end = begin + int(scored[i].sum())
        cells = cells_of_states(inside, len(response))[:end - begin]
        measured[utterance.id] = Clip(values[begin:end], cells, len(response) - len(cells))
        begin = end
    return measured


def measure_student(name, utterances, batches, args, rank, world, device):
    """Every rank measures its batches -> {utterance id: Clip} of all ranks; number of shared ids.

    Raises data.AudioError if a clip can't be read, ValueError if no state can be scored.
    """
    student = model.load(name, device)
    teacher = model.load_teacher(args.teacher, device)
    model.check_same_features(student, teacher)
    to_teacher = model.vocabulary_map(student, teacher)
    measured = {}
    bar = model.progress(len(utterances), Path(name).name, "clip", rank)
    for indices in batches[rank::world]:
        chosen = [utterances[i] for i in indices]
        batch = data.load_batch(
            chosen, student.n_mels, keep_going=False, max_sec=data.MAX_EVAL_SEC, for_training=False)
        measured |= measure_batch(student, teacher, to_teacher, batch, args.states, args)
        bar.update(min(len(indices) * world, bar.total - bar.n))
    bar.close()
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, measured)
        for part in parts:
            measured |= part
    if not any(len(clip.values) for clip in measured.values()):
        raise ValueError(f"no state of {name} could be scored: every rollout begins with a token "
                         "that has no counterpart in the teacher's vocabulary")
    return measured, int((to_teacher >= 0).sum())


# ---------------------------------------------------------------------------- reduce

def sum_states(clips) -> tuple[np.ndarray, np.ndarray]:
    """Sums over states (utterances, cells, columns), numbers of states (utterances, cells)."""
    sums = np.zeros((len(clips), len(CELLS), len(COLUMNS)))
    counts = np.zeros((len(clips), len(CELLS)))
    for i, clip in enumerate(clips):
        sums[i] = clip.cells.T.astype(float) @ clip.values
        counts[i] = clip.cells.sum(0)
    return sums, counts


def mean_of(sums, counts) -> np.ndarray:
    """sums (..., columns) / counts (...), nan where there is nothing."""
    return sums / np.where(counts > 0, counts, np.nan)[..., None]


def bootstrap_means(sums, counts, n=10_000, seed=0) -> np.ndarray:
    """Means of n draws of utterances with replacement: (n, cells, columns), nan without a state.

    sums, counts: see sum_states. The draws are the same for every column, cell and student, so that
    differences between students are paired. All nan where there is one utterance to draw from.
    """
    if len(sums) < 2:
        return np.full((n, *sums.shape[1:]), np.nan)
    rng = np.random.default_rng(seed)
    chances = np.full(len(sums), 1 / len(sums))
    means = []
    for _ in range(n // 100):
        times = rng.multinomial(len(sums), chances, size=100).astype(float)     # (100, utterances)
        means.append(mean_of(np.tensordot(times, sums, 1), times @ counts))
    return np.concatenate(means)


def as_entries(means, resampled, batch_means=None) -> dict:
    """The statistics as overlap.json has them; cells without a state are left out.

    means (cells, columns), resampled (n, cells, columns), batch_means (batches, columns) of ALL.
    """
    def entry(cell, name):
        column = COLUMNS.index(name)
        low, high = data.interval(resampled[:, cell, column])
        result = {"mean": float(means[cell, column]), "low": low, "high": high}
        if batch_means is not None and CELLS[cell] == ALL:
            of_batches = batch_means[:, column]
            result["batch_mean"] = float(of_batches.mean())
            result["batch_min"] = float(of_batches.min())
            result["batch_max"] = float(of_batches.max())
        return result

    result = {name: entry(0, name) for name in STATISTICS}
    result["by_k"] = {}
    for k in KS:
        result["by_k"][str(k)] = {name: entry(0, f"{name}@{k}") for name in OF_K}
    for cell, (section, label) in enumerate(CELLS):
        if section and not np.isnan(means[cell]).any():
            result.setdefault(section, {})[label] = {name: entry(cell, name) for name in STATISTICS}
    return result


def summarize_student(name, measured, n_shared, utterances, batches, args):
    """One student's part of overlap.json; its means and resampled means, for the difference."""
    clips = [measured[u.id] for u in utterances]
    sums, counts = sum_states(clips)
    means = mean_of(sums.sum(0), counts.sum(0))                             # (cells, columns)
    resampled = bootstrap_means(sums, counts)                               # (n, cells, columns)
    batch_means = []
    for indices in batches:
        if counts[indices, 0].any():  # else no state of the batch could be scored
            batch_means.append(mean_of(sums[indices, 0].sum(0), counts[indices, 0].sum()))
    entries = as_entries(means, resampled, np.stack(batch_means or [means[0]]))
    for cell, (section, label) in enumerate(CELLS):
        if section and counts[:, cell].any():
            entries[section][label]["states"] = int(counts[:, cell].sum())
            entries[section][label]["clips"] = int((counts[:, cell] > 0).sum())
    by_distance = [cell for cell, (section, _) in enumerate(CELLS) if section == "by_distance"]
    vuss = np.concatenate([clip.values[:, COLUMNS.index("vuss")] for clip in clips]).astype(int)
    summary = {
        "student": str(name),
        "clips": len(clips),
        "clips_not_aligned": sum(not can_align(u, args.states) for u in utterances),
        "clips_with_error": int((counts[:, by_distance] > 0).any(1).sum()),
        "states": len(vuss),
        "states_not_scored": sum(clip.n_not_scored for clip in clips),
        "shared_ids": n_shared,
        **entries,
        "vuss_histogram": dict(sorted(Counter(vuss.tolist()).items())),
    }
    return summary, means, resampled


# ---------------------------------------------------------------------------- show

def print_summary(title, summary) -> None:
    """Every statistic over all states, and over batches as in Table 2."""
    print(f"\n{title}: mean over states [95 % interval]")
    for name in STATISTICS:
        entry = summary[name]
        line = f"  {name:20}{entry['mean']:9.3f} [{entry['low']:.3f}, {entry['high']:.3f}]"
        if "batch_mean" in entry:
            line += f"   over batches {entry['batch_mean']:.2f}"
            line += f" ({entry['batch_min']:.2f}-{entry['batch_max']:.2f})"
        print(line)


def draw_overlap(students, k, path) -> None:
    """Overlap and KL by token with their intervals, and the histogram of VUSS, of each student."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for i, student in enumerate(students):
        color = f"C{i}"
        bins = list(student["by_token"].values())[:LAST_TOKEN]
        bins = [entries for entries in bins if entries["clips"] >= MIN_CLIPS]
        for axis, name in ((left, "overlap"), (middle, "kl_reverse")):
            mean = [entries[name]["mean"] for entries in bins]
            low = [entries[name]["low"] for entries in bins]
            high = [entries[name]["high"] for entries in bins]
            axis.plot(range(len(bins)), mean, "o-", color=color, label=student["student"])
            axis.fill_between(range(len(bins)), low, high, color=color, alpha=0.2, linewidth=0)
        histogram = student["vuss_histogram"]
        shares = np.array(list(histogram.values())) / student["states"]
        right.bar(list(histogram), shares, width=1, color=color, alpha=0.4)
        right.axvline(student["vuss"]["mean"], color=color, linestyle="--")

    left.set(title=f"overlap@{k} (bands: 95 %)", ylabel="shared part of the top k", ylim=(0, 1))
    middle.set(title="KL(student || teacher)", ylabel="nats per token", ylim=(0, None))
    right.set(title=f"VUSS, k = {k} (dashed: mean)", ylabel="share of states", xlabel="VUSS")
    for axis in (left, middle):
        axis.set_xlabel("index of the token in the rollout")
        axis.xaxis.get_major_locator().set_params(integer=True)
    left.legend(frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# ---------------------------------------------------------------------------- --check

def exchange_texts(batch) -> data.Batch:
    """The same clips with each other's texts: half way round the sorted texts stands another."""
    order = sorted(batch.utterances, key=lambda u: u.text)
    half = len(order) // 2
    other_text = {}
    for utterance, other in zip(order, order[half:] + order[:half]):
        other_text[utterance.id] = other.text
    exchanged = [replace(u, text=other_text[u.id]) for u in batch.utterances]
    return replace(batch, utterances=exchanged)


def peak_memory(device) -> int:
    """Bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check(args) -> None:
    """Measure one batch, print what was found, exit with an error if the two models don't fit.

    A teacher given the right audio and the right ids finds a reference far likelier than another
    clip's. A wrong vocabulary map, a wrong prompt, random weights or unheard audio all bring the
    two together. Without transcripts, that part is left out and the table says so.
    """
    rank, _, device = model.setup_scoring(args)
    student = model.load(args.student, device)
    teacher = model.load_teacher(args.teacher, device)
    model.check_same_features(student, teacher)
    batch = data.load_batch(data.read_manifest(args.data)[:args.batch], student.n_mels)
    if not batch.utterances:
        raise ValueError(f"none of the first {args.batch} clips is usable: {batch.rejected[0][1]}")

    def measure(teacher, batch, states):
        """Means over states, how many are scored, how many are not."""
        to_teacher = model.vocabulary_map(student, teacher)
        clips = measure_batch(student, teacher, to_teacher, batch, states, args).values()
        values = np.concatenate([clip.values for clip in clips])
        n_not_scored = sum(clip.n_not_scored for clip in clips)
        return dict(zip(COLUMNS, values.mean(0))), len(values), n_not_scored

    rollouts, n_scored, n_not_scored = measure(teacher, batch, "rollout")
    itself, _, _ = measure(student, batch, "rollout")
    kl_itself = itself["kl_reverse"]
    texts = [u.text for u in batch.utterances]
    has_texts = all(texts) and len(set(texts)) > 1
    shown = shown_other = "no transcripts to try"
    if has_texts:
        logp = measure(teacher, batch, "reference")[0]["logp_t"]
        logp_other = measure(teacher, exchange_texts(batch), "reference")[0]["logp_t"]
        shown, shown_other = f"{logp:.3f} nats a token", f"{logp_other:.3f} nats a token"

    writable = int((~student.blocked).sum())
    shared = int((model.vocabulary_map(student, teacher) >= 0).sum())
    ends = [repr(teacher.tokenizer.decode(s)[-40:]) for s in teacher.suffixes(batch, None, None)]
    table = {
        "clips": f"{len(texts)}, {batch.audio_sec:.1f} s; rejected {len(batch.rejected)}",
        "ids shared": f"{shared} of {writable} that the student may write",
        "rollouts": f"{n_scored} tokens scored, {n_not_scored} not scored",
        "teacher's prompt ends": " ".join(sorted(set(ends))),
        "log p_T of rollouts": f"{rollouts['logp_t']:.3f} nats a token",
        "log p_T of references": shown,
        "log p_T of other clips' references": shown_other,
        "KL(student || student)": f"{kl_itself:.2e} nats a token",
        "KL(student || teacher)": f"{rollouts['kl_reverse']:.3f} nats a token",
        "peak memory": f"{peak_memory(device) / 2 ** 30:.2f} GiB",
    }
    if rank == 0:
        for name, value in table.items():
            print(f"{name:36} {value}")
    model.finish()
    limit = 1e-2 if device.type == "cuda" else 1e-6  # bf16, fp32
    if not abs(kl_itself) <= limit:  # nan, too
        raise SystemExit("two forwards of the student disagree: its KL from itself is "
                         f"{kl_itself:.2e} nats a token")
    if has_texts and not logp >= logp_other + 1:
        raise SystemExit(
            f"the teacher does not know this audio: references {logp:.3f}, other clips' references "
            f"{logp_other:.3f} nats a token; expected a nat or more between them. Wrong "
            "checkpoint, wrong language, or wrong transcripts?")


# ---------------------------------------------------------------------------- main

def write_results(summaries, n_batches, args) -> None:
    """summarize_student's answers for one or two students -> overlap.json, overlap.png, a table."""
    result = {
        "teacher": args.teacher, "data": args.data, "k": args.top_k, "states_of": args.states,
        "seed": args.seed, "temperature": args.temperature, "batch": args.batch,
        "batches": n_batches,
    }
    students = [student for student, _, _ in summaries]
    for s in students:
        states = f"{s['states']} states ({s['states_not_scored']} more can't be scored)"
        print_summary(f"{s['student']}, {s['clips']} clips, {states}", s)
    result |= students[0]
    if args.compare:
        (_, means, resampled), (_, means_2, resampled_2) = summaries
        result["compare"] = students[1]
        result["difference"] = as_entries(means_2 - means, resampled_2 - resampled)
        print_summary("difference, paired", result["difference"])
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    result = json.loads(json.dumps(result), parse_constant=lambda nan: None)  # JSON has no NaN
    (out / "overlap.json").write_text(json.dumps(result, indent=2))
    draw_overlap(students, args.top_k, out / "overlap.png")


@record  # torchrun then shows what stopped a process, at the end
def main(args) -> None:
    """Measure one student after the other; write, print and draw what was found."""
    if args.check:
        return check(args)
    data.check_outputs(Path(args.out) / "overlap.json", Path(args.out) / "overlap.png")
    rank, world, device = model.setup_scoring(args)
    utterances = data.read_manifest(args.data)
    if args.states == "reference":
        data.check_labelled(utterances)
    data.check_decodable(utterances[rank::world])
    batches = data.Plan(data.measure(utterances), args.batch, args.seed).epoch(0)
    # A last batch of two clips would set the smallest and the largest mean.
    full_batches = [indices for indices in batches if len(indices) == args.batch]
    if not full_batches:
        full_batches = batches
    students = [args.student]
    if args.compare:
        students.append(args.compare)

    summaries = []
    for name in students:
        measured, n_shared = measure_student(
            name, utterances, batches, args, rank, world, device)
        if rank == 0:
            summary = summarize_student(name, measured, n_shared, utterances, full_batches, args)
            summaries.append(summary)
    if rank == 0:
        write_results(summaries, len(full_batches), args)
    model.finish()


def parse_args(argv=None):
    """Flags -> namespace."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=data.HelpFormatter, allow_abbrev=False)
    # what to measure; checkpoints are directories or Hub ids
    parser.add_argument("--student", required=True, help="checkpoint that writes the rollouts")
    parser.add_argument("--compare", help="a second student, on the same clips")
    parser.add_argument("--teacher", required=True, help="checkpoint that scores them")
    parser.add_argument("--data", required=True, help="manifest")
    parser.add_argument("--out", help="folder for overlap.json and overlap.png")
    parser.add_argument("--check", action="store_true", help="try the two models on one batch")
    # states
    parser.add_argument("--states", default="rollout", choices=["rollout", "reference"],
                        help="whose prefixes: the student's rollouts, or the manifest's transcripts")
    parser.add_argument("--temperature", type=not_negative, default=1.0, help="of the rollouts; 0 = greedy")
    parser.add_argument("--max_new_tokens", type=at_least_one, default=64, help="longest rollout, tokens")
    parser.add_argument("--seed", type=whole_number, default=0, help="of the rollouts and of the batches")
    # statistics
    parser.add_argument("--top_k", type=at_least_one, default=32, help="size of each model's set")
    # cost
    parser.add_argument("--batch", type=at_least_one, default=32, help="utterances a forward")
    parser.add_argument("--chunk", type=at_least_one, default=256, help="states whose logits exist at a time")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="where to run")
    args = parser.parse_args(argv)
    if not args.check and not args.out:
        parser.error("--out is needed (only --check goes without it)")
    if args.check and args.compare:
        parser.error("--check tries one student: leave out --compare")
    return args


if __name__ == "__main__":
    main(parse_args())
