"""Support overlap: where student and teacher agree, on the states the student visits (section 4.3 and Table 2 of the paper).

A state is a token of the student's own rollout, EOS included: the prefix before it is what both models have read. At state t each
model names the k most probable tokens of those it may write; special tokens are out beforehand. What has no twin in the other
vocabulary is dropped afterwards, which leaves the sets S_t and T_t:
  vuss       |valid(S_t u T_t)|  Valid Union Support Size, up to 2k; smaller means closer; 2k - |S_t n T_t| when nothing is dropped
  overlap    |S_t n T_t| / k     the same on a scale of 0 to 1, larger means closer
  mass_s     p_S(S_t n T_t), mass_t = p_T(S_t n T_t): how much of each model's belief lies on the shared tokens
  union_kl_reverse, union_kl_forward   KL with both sides renormalised on S_t u T_t: forward is the paper's Eq. 1
and, whatever k is, with p_S and p_T over all ids that both vocabularies have, as in distill.py:
  top1       do both put the same token first? (overlap at k = 1)
  rank       of the written token under the teacher: 1 + ids with a strictly larger logit. A mean of ranks hangs on its largest ones
  entropy_s, entropy_t           of p_S and p_T, nats
  kl_reverse, kl_forward         KL(p_S || p_T), what OPD minimises, and KL(p_T || p_S), nats

    python overlap.py --student runs/x/sft --teacher runs/x/teacher --data test.jsonl --out runs/x/overlap
    python overlap.py --student runs/x/sft --compare runs/x/td --teacher runs/x/teacher --data test.jsonl --out runs/x/table2
    torchrun --nproc_per_node 8 overlap.py --student ... (the same)

Rollouts are sampled at temperature 1, as in training, from uniforms keyed on (seed, utterance): two students draw with the same
luck. Batches are those of distill.py's first epoch, whatever the number of processes. Means are over states; low and high, a 95 %
interval, resample utterances; batch_mean, batch_min and batch_max are over the means of full batches, as in Table 2.
--out receives overlap.json (its keys: README) and overlap.png.

Differs from the public code, whose number is that of one rank: it also takes stop tokens out of the student's set.
"""

import argparse
import functools
import itertools
import json
import math
import os
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path

import jiwer
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
import model

KS = (1, 8, 16, 32)  # reported whatever --top_k is
OF_K = ("vuss", "overlap", "mass_s", "mass_t", "union_kl_reverse", "union_kl_forward")
STATISTICS = OF_K + ("top1", "rank", "entropy_s", "entropy_t", "kl_reverse", "kl_forward")
COLUMNS = STATISTICS + tuple(f"{name}@{k}" for k in KS for name in OF_K)

DISTANCES = (-math.inf, -3, -2, -1, 0, 1, 2, 3, 4, 8, math.inf)  # edges of the bins of by_distance
BREAKDOWNS = {  # section of overlap.json: its bins
    "by_position": [f"{i / 10:.1f}-{(i + 1) / 10:.1f}" for i in range(10)],
    "by_error": ["outside", "inside"],
    "by_distance": ["-4 and less", "-3", "-2", "-1", "0", "1", "2", "3", "4 to 7", "8 and more"]}
CELLS = [("", "")] + [(section, label) for section, labels in BREAKDOWNS.items() for label in labels]  # ("", ""): all states


# ---------------------------------------------------------------------------- the statistics: pure tensors, copies out alone

def kl_and_entropy(z_s, z_t, valid):
    """Logits (N, M) twice, renormalised on valid (N, M) -> p_S, p_T (N, M), KL(p_S || p_T), KL(p_T || p_S), entropies (N,), nats."""
    logp_s, logp_t = (z.masked_fill(~valid, -math.inf).log_softmax(-1).masked_fill(~valid, 0.0) for z in (z_s, z_t))  # 0 log 0 = 0
    p_s, p_t = logp_s.exp() * valid, logp_t.exp() * valid
    log_ratio = logp_s - logp_t
    return p_s, p_t, (p_s * log_ratio).sum(-1), -(p_t * log_ratio).sum(-1), -(p_s * logp_s).sum(-1), -(p_t * logp_t).sum(-1)


def overlap_stats(z_s, z_t, mask, k, written=None, also=()) -> dict[str, torch.Tensor]:
    """Statistics of every state: logits z_s, z_t (..., V) over the same columns, mask (...) -> {name: (N,) float64}.

    mask picks the N states that count. -inf marks what a model may not write; a column that is -inf on either side is valid in
    neither set, but takes its place among the top k of the side where it is finite. written (...): ids whose rank is asked for.
    also: further ks, whose statistics are called vuss@8 and so on. One topk serves them all: smaller sets are its prefixes.
    """
    z_s, z_t = z_s[mask], z_t[mask]                                                     # (N, V)
    valid = ~torch.isneginf(z_s) & ~torch.isneginf(z_t)
    p_s, p_t, reverse, forward, entropy_s, entropy_t = kl_and_entropy(z_s, z_t, valid)
    largest = min(max(k, *also, 1), z_s.shape[-1])
    ids_s, ids_t = z_s.topk(largest).indices, z_t.topk(largest).indices                 # (N, K), best first
    ok_s, ok_t = valid.gather(-1, ids_s), valid.gather(-1, ids_t)                       # (N, K)
    # K x K comparisons a row find every intersection; membership masks would be V wide, 150 times that at V = 151,936, for each k.
    same = (ids_s[:, :, None] == ids_t[:, None]) & ok_s[:, :, None]                     # (N, K, K)
    stats = {}
    for at, j in [("", k), *((f"@{j}", j) for j in also)]:
        j = min(j, z_s.shape[-1])
        both, again = same[:, :j, :j].any(2), same[:, :j, :j].any(1)                    # (N, j): members of S in T, members of T in S
        ids = torch.cat([ids_s[:, :j], ids_t[:, :j]], dim=1)                            # (N, 2j)
        union = torch.cat([ok_s[:, :j], ok_t[:, :j] & ~again], dim=1)                   # (N, 2j), each token once
        _, _, union_reverse, union_forward, _, _ = kl_and_entropy(z_s.gather(-1, ids), z_t.gather(-1, ids), union)
        stats |= {f"vuss{at}": union.sum(-1), f"overlap{at}": both.sum(-1).double() / j,
                  f"mass_s{at}": (p_s.gather(-1, ids_s[:, :j]) * both).sum(-1), f"mass_t{at}": (p_t.gather(-1, ids_s[:, :j]) * both).sum(-1),
                  f"union_kl_reverse{at}": union_reverse, f"union_kl_forward{at}": union_forward}
    stats |= {"top1": same[:, 0, 0], "entropy_s": entropy_s, "entropy_t": entropy_t, "kl_reverse": reverse, "kl_forward": forward}
    if written is not None:
        stats["rank"] = 1 + (valid & (z_t > z_t.gather(-1, written[mask][:, None]))).sum(-1)
    return {name: value.double() for name, value in stats.items()}


# ---------------------------------------------------------------------------- where a state lies

def error_states(asr, ids, text, language) -> list[bool]:
    """For each emitted id, EOS included: does it belong to a recognition error? Units (words or characters) are data.normalize's.

    Characters: a token covers the characters of the decoded text that it finishes, and the one that it leaves half written.
    Units: covering characters a to b, it touches the units of the normalised text[:b] from the first one that text[:a] has otherwise.
    Punctuation and spaces thus touch none, each byte of a Mandarin character touches that character.
    A state is inside an error if its token touches a substituted or inserted unit, or if reference units are missing here: it writes
    the first token of the unit that follows them, or EOS if none follows. Alignment is jiwer's, as in the error rate.
    """
    spoken = [i for i, stop in zip(ids, asr.stop[ids].tolist()) if not stop]
    whole = asr.tokenizer.decode(spoken)
    units = lambda n_characters: data.normalize(whole[:n_characters], language).split()
    wrong, missing = set(), set()  # units of the hypothesis that are errors; units in front of which there is a deletion
    for op in jiwer.process_words(data.normalize(text, language), data.normalize(whole, language)).alignments[0]:
        if op.type == "delete":
            missing.add(op.hyp_start_idx)
        elif op.type != "equal":
            wrong.update(range(op.hyp_start_idx, op.hyp_end_idx))
    if not wrong | missing:
        return [False] * len(ids)
    inside, begun, start = [], set(), 0
    for n in range(1, len(spoken) + 1):
        prefix = asr.tokenizer.decode(spoken[:n])                       # a half written character shows as U+FFFD
        finished = len(os.path.commonprefix([prefix, whole]))
        before, after = units(start), units(finished + (len(prefix) > finished))
        touched = set(range(len(os.path.commonprefix([before, after])), len(after)))
        inside.append(bool(touched & wrong or (touched - begun) & missing))
        begun, start = begun | touched, finished
    return inside + [len(units(None)) in missing] * (len(ids) - len(spoken))


def place_states(inside, n) -> np.ndarray:
    """Bins of a clip's n states, (n, 3) in the order of BREAKDOWNS; -1: in none. inside: error_states' answer, None without text.

    Position runs from 0, the first token, to 1, EOS. Distance is in tokens to the first state inside an error, negative before it.
    """
    t = np.arange(n)
    position = np.minimum(9, 10 * t // max(1, n - 1))
    error = np.full(n, -1) if inside is None else np.array(inside, dtype=int)
    wrong = inside is not None and any(inside)
    distance = np.searchsorted(DISTANCES, t - inside.index(True), side="right") - 1 if wrong else np.full(n, -1)
    return np.stack([position, error, distance], axis=1).astype(np.int8)


# ---------------------------------------------------------------------------- measure

@torch.no_grad()
def measure_batch(student, teacher, to_teacher, batch, args) -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
    """One batch -> {utterance id: values (n, len(COLUMNS)) and bins (n, 3) of its n scored states, how many were not scored}."""
    prompt = model.encode(student, batch)
    if args.states == "reference":
        rows = [torch.tensor(student.encode_text(u.text), device=student.device) for u in batch.utterances]
        ids = pad_sequence(rows, batch_first=True, padding_value=student.pad_id)                                    # (B, R)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).bool()
    else:
        uniforms = data.keyed_uniforms(args.seed, 0, [u.id for u in batch.utterances], args.max_new_tokens)
        ids, mask = model.generate(student, prompt, args.max_new_tokens, args.temperature, uniforms)
    scored = mask & (to_teacher[ids] >= 0).cumprod(1).bool()  # from a token that the teacher can't read on, nothing is scored
    hidden_s = model.response_hidden(student, prompt, ids, mask)[scored[mask]]                                      # (N, D)
    hidden_t = model.response_hidden(teacher, model.encode(teacher, batch), to_teacher[ids].clamp(min=0), scored)   # (N, D_t)
    unknown = ~teacher.blocked                                # what only the teacher may write: columns of their own
    unknown[to_teacher[to_teacher >= 0]] = False
    chunks = []
    for i in range(0, len(hidden_s), args.chunk):
        with student.autocast():
            z_s = student.head(hidden_s[i:i + args.chunk]).float().masked_fill(student.blocked, -math.inf)          # (C, V)
            z_t = teacher.head(hidden_t[i:i + args.chunk]).float()                                                  # (C, V_t)
        theirs = z_t[:, unknown]                                                                                    # (C, V_t - shared)
        z_s, z_t = torch.cat([z_s, torch.full_like(theirs, -math.inf)], 1), torch.cat([model.map_logits(z_t, to_teacher), theirs], 1)
        everywhere = torch.ones(len(z_s), dtype=torch.bool, device=z_s.device)
        stats = overlap_stats(z_s, z_t, everywhere, args.top_k, ids[scored][i:i + args.chunk], KS)
        chunks.append(torch.stack([stats[name] for name in COLUMNS], dim=1).float())
    values = torch.cat(chunks).cpu().numpy() if chunks else np.zeros((0, len(COLUMNS)), np.float32)
    if not np.isfinite(values).all():
        raise FloatingPointError(f"not finite: some statistic of the batch with clips {[u.id for u in batch.utterances]}")
    measured, n_scored = {}, scored.sum(1).tolist()
    for u, row, own, n, rows in zip(batch.utterances, ids.tolist(), mask.sum(1).tolist(), n_scored, np.split(values, np.cumsum(n_scored)[:-1])):
        aligned = args.states == "rollout" and u.text is not None and u.language
        inside = error_states(student, row[:own], u.text, u.language) if aligned else None
        measured[u.id] = rows, place_states(inside, own)[:n], own - n
    return measured


def sum_up(measured, utterances) -> tuple[np.ndarray, np.ndarray]:
    """All ranks' clips -> sums over states (utterances, cells, columns) and how many states (utterances, cells), in manifest order."""
    sums, counts = np.zeros((len(utterances), len(CELLS), len(COLUMNS))), np.zeros((len(utterances), len(CELLS)))
    for i, u in enumerate(utterances):
        values, bins, _ = measured[u.id]
        member = [bins[:, [j]] == np.arange(len(labels)) for j, labels in enumerate(BREAKDOWNS.values())]
        member = np.concatenate([np.ones((len(values), 1)), *member], axis=1)            # (n, cells)
        sums[i], counts[i] = member.T @ values.astype(float), member.sum(0)
    return sums, counts


def resample(sums, counts, n=10_000, seed=0) -> np.ndarray:
    """sum_up's answer -> (n, cells, columns) means of n draws of utterances, nan without a state. The draws are data.bootstrap's, the same
    for every column, cell and student, so that differences between students are paired."""
    rng, ratios = np.random.default_rng(seed), []
    for _ in range(n // 100):
        draws = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=100).astype(float)  # (100, utterances)
        ratios.append(mean_of(np.tensordot(draws, sums, 1), draws @ counts))
    return np.concatenate(ratios)


def mean_of(sums, counts) -> np.ndarray:
    """sums (..., columns) / counts (...), nan where there is nothing."""
    return sums / np.where(counts > 0, counts, np.nan)[..., None]


def entries(means, ratios, spread=None) -> dict:
    """means (cells, columns), resampled ratios, means of batches (batches, columns) -> the nested part of overlap.json."""
    result = {}
    for (c, (section, label)), (j, name) in itertools.product(enumerate(CELLS), enumerate(COLUMNS)):
        statistic, _, k = name.partition("@")
        if math.isnan(means[c, j]) or (section and k):
            continue
        place = ("by_k", k) if k else (section, label)
        low, high = np.nanpercentile(ratios[:, c, j], [2.5, 97.5]).tolist()
        entry = {"mean": float(means[c, j]), "low": low, "high": high}
        if spread is not None and not section:
            entry |= {"batch_mean": float(spread[:, j].mean()), "batch_min": float(spread[:, j].min()), "batch_max": float(spread[:, j].max())}
        (result.setdefault(place[0], {}).setdefault(place[1], {}) if place[0] else result)[statistic] = entry
    return result


def report(name, measured, shared_ids, utterances, batches, args) -> tuple[dict, np.ndarray, np.ndarray]:
    """One student's part of overlap.json, with the means and resampled means that differences are made of."""
    sums, counts = sum_up(measured, utterances)
    means, ratios = mean_of(sums.sum(0), counts.sum(0)), resample(sums, counts)
    spread = mean_of(np.stack([sums[b, 0].sum(0) for b in batches]), np.stack([counts[b, 0].sum() for b in batches]))  # (batches, columns)
    spread = spread[~np.isnan(spread[:, 0])]
    result = entries(means, ratios, spread if len(spread) else means[:1])
    for (section, label), n in zip(CELLS, counts.sum(0).tolist()):
        if section and n:
            result[section][label]["states"] = int(n)
    aligned = sum(u.text is not None and bool(u.language) for u in utterances) if args.states == "rollout" else 0
    vuss = np.concatenate([values[:, COLUMNS.index("vuss")] for values, _, _ in measured.values()])
    return {"student": str(name), "clips": len(utterances), "clips_not_aligned": len(utterances) - aligned,
            "clips_with_error": sum(bool((bins[:, 2] >= 0).any()) for _, bins, _ in measured.values()),
            "states": len(vuss), "states_not_scored": sum(n for _, _, n in measured.values()), "shared_ids": shared_ids, **result,
            "vuss_histogram": dict(sorted(Counter(vuss.astype(int).tolist()).items()))}, means, ratios


def measure_all(name, teacher, utterances, batches, args, rank, world) -> tuple[dict, int]:
    """Every rank its batches -> measure_batch's answers of all ranks, and how many ids student and teacher share."""
    student, measured = model.load(name, teacher.device), {}
    if student.n_mels != teacher.n_mels:
        raise ValueError(f"student and teacher read the same features, but take {student.n_mels} and {teacher.n_mels} mel bins")
    to_teacher = model.vocabulary_map(student, teacher)
    bar = tqdm(total=len(utterances), desc=Path(name).name, unit="clip", disable=rank > 0, mininterval=0.5 if sys.stderr.isatty() else 20)
    for indices in batches[rank::world]:
        batch = data.load_batch([utterances[i] for i in indices], student.n_mels, keep_going=False, max_sec=data.MAX_EVAL_SEC)
        measured |= measure_batch(student, teacher, to_teacher, batch, args)
        bar.update(min(len(indices) * world, bar.total - bar.n))
    bar.close()
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, measured)
        measured = {i: clip for part in parts for i, clip in part.items()}
    if not any(len(values) for values, _, _ in measured.values()):
        raise ValueError(f"no state of {name} could be scored: none of the tokens has a twin in the teacher's vocabulary")
    return measured, int((to_teacher >= 0).sum())


@record  # torchrun then shows what stopped a process, at the end
def main(args) -> None:
    """Roll out, score and reduce, one student after the other: see the top of this file."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    kind = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))  # values travel as Python objects; no tensor does
    utterances = data.read_manifest(args.data)
    if args.states == "reference":
        data.check_labelled(utterances)
    batches = data.Plan(data.measure(utterances), args.batch, args.seed).epoch(0)
    full = [batch for batch in batches if len(batch) == args.batch] or batches  # a last batch of two clips would set min and max
    teacher, parts = model.load_teacher(args.teacher, device), []
    for name in [args.student, *([args.compare] if args.compare else [])]:
        measured, shared_ids = measure_all(name, teacher, utterances, batches, args, rank, world)
        if rank == 0:
            parts.append(report(name, measured, shared_ids, utterances, full, args))
    if rank == 0:
        result = {"teacher": str(args.teacher), "data": args.data, "k": args.top_k, "states_of": args.states, "seed": args.seed,
                  "temperature": args.temperature, "batch": args.batch, "batches": len(full), **parts[0][0]}
        if args.compare:
            (_, means_a, ratios_a), (second, means_b, ratios_b) = parts
            result |= {"compare": second, "difference": entries(means_b - means_a, ratios_b - ratios_a)}
        Path(args.out).mkdir(parents=True, exist_ok=True)
        (Path(args.out) / "overlap.json").write_text(json.dumps(result, indent=2))
        show(result)
        draw(result, Path(args.out) / "overlap.png")
    if world > 1:
        dist.barrier()  # without it, gloo on a CPU may abort in the line below
        dist.destroy_process_group()


# ---------------------------------------------------------------------------- show

def students(result) -> dict[str, dict]:
    """{short name: its report}, one or two."""
    reports = [result, *([result["compare"]] if "compare" in result else [])]
    short = [Path(r["student"]).name for r in reports]
    return dict(zip(short if len(set(short)) == len(short) else ["student", "compare"], reports))


def show(result) -> None:
    """Print the paper's Table 2, every statistic, and what they are inside and outside recognition errors."""
    reports, k = students(result), result["k"]
    for name, r in reports.items():
        print(f"{name}: {r['student']}: {r['clips']} clips ({r['clips_not_aligned']} not aligned, {r['clips_with_error']} with an error), "
              f"{r['states']} states ({r['states_not_scored']} more not scored for want of a twin), {r['shared_ids']} shared ids")
    print(f"\nVUSS, k = {k}, over {result['batches']} batches of {result['batch']} clips (Table 2): mean (min-max)")
    for name, r in reports.items():
        print(f"{name:18}{r['vuss']['batch_mean']:.2f} ({r['vuss']['batch_min']:.2f}-{r['vuss']['batch_max']:.2f})")
    sides = reports | ({"difference, paired": result["difference"]} if "difference" in result else {})

    def row(label, *path):
        line = f"{label:34}"
        for side in sides.values():
            cell = functools.reduce(lambda d, key: d.get(key, {}), path, side)
            line += (f"{cell['mean']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]" if cell else "-").ljust(28)
        print(line)

    print(f"\n{'':34}" + "".join(name.ljust(28) for name in sides))
    for name in STATISTICS:
        row(f"{name}@{k}" if name in OF_K else name, name)
    for j in KS:
        row(f"overlap@{j}", "by_k", str(j), "overlap")
    for label in BREAKDOWNS["by_error"]:  # the other bins stand in overlap.json, those of the position in overlap.png
        for name in ("overlap", "kl_reverse"):
            row(f"{name}, {label} errors", "by_error", label, name)


def draw(result, path) -> None:
    """Overlap and KL by position with their intervals, and the histogram of VUSS, for one or both students -> a picture."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    centres = {label: i / 10 + 0.05 for i, label in enumerate(BREAKDOWNS["by_position"])}
    for i, (name, r) in enumerate(students(result).items()):
        x = [centres[label] for label in r["by_position"]]
        for axis, statistic in ((left, "overlap"), (middle, "kl_reverse")):
            mean, low, high = ([entry[statistic][key] for entry in r["by_position"].values()] for key in ("mean", "low", "high"))
            axis.plot(x, mean, "o-", color=f"C{i}", label=name)
            axis.fill_between(x, low, high, color=f"C{i}", alpha=0.2, linewidth=0)
        shares = {int(size): count / r["states"] for size, count in r["vuss_histogram"].items()}
        sizes = range(min(shares), max(shares) + 1)
        edges = [size - 0.5 for size in (*sizes, sizes.stop)]
        right.stairs([shares.get(size, 0) for size in sizes], edges, color=f"C{i}")
        right.stairs([shares.get(size, 0) for size in sizes], edges, color=f"C{i}", fill=True, alpha=0.25)
        right.axvline(r["vuss"]["mean"], color=f"C{i}", linestyle="--")
    k = result["k"]
    left.set(title=f"overlap@{k} (bands: 95 %)", ylabel="shared part of both top-k sets", ylim=(0, 1))
    middle.set(title="KL(student || teacher)", ylabel="nats per token", ylim=(0, None))
    right.set(title=f"VUSS, k = {k} (dashed: mean)", xlabel="valid tokens in the union", ylabel="share of states")
    for axis in (left, middle):
        axis.set(xlabel="position in the transcript: 0 first token, 1 end", xlim=(0, 1))
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def parse_args(argv=None):
    """Flags -> namespace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = lambda flag, default, text, **kw: parser.add_argument(flag, default=default, help=f"{text} (default: {default})",
                                                                **(kw if "action" in kw else {"type": type(default)} | kw))
    add("--student", None, "checkpoint, a directory or a Hub id; writes the rollouts", type=str, required=True)
    add("--compare", None, "a second student, on the same clips with the same uniforms; differences are second minus first", type=str)
    add("--teacher", None, "checkpoint, a directory or a Hub id; scores them", type=str, required=True)
    add("--data", None, "manifest", type=str, required=True)
    add("--out", None, "folder for overlap.json and overlap.png", type=str, required=True)
    add("--states", "rollout", "whose prefixes: the student's own rollouts, or the manifest's transcripts", choices=["rollout", "reference"])
    add("--top_k", 32, "the main k, the size of each model's set")
    add("--temperature", 1.0, "of the rollouts; 0 = greedy")
    add("--seed", 0, "of the rollouts and of the batches")
    add("--batch", 32, "utterances a forward")
    add("--chunk", 256, "states whose logits exist at a time")
    add("--max_new_tokens", 64, "longest rollout, tokens")
    add("--device", "auto", "where to run", choices=["auto", "cpu", "cuda"])
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
