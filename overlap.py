"""Support overlap: where student and teacher agree, on the states the student visits (section 4.3 and Table 2 of the paper).

At each state t of the student's own rollouts, with S_t and T_t the k most probable tokens of student and teacher, after special
tokens and tokens without a twin in the other vocabulary are removed:
  VUSS       |S_t u T_t|        Valid Union Support Size, k to 2k; smaller means closer; 2k - |S_t n T_t| when nothing is missing
  overlap@k  |S_t n T_t| / k    the same on a scale of 0 to 1, larger means closer
  top1       do both put the same token first?
  mass_s     p_S(S_t n T_t), mass_t = p_T(S_t n T_t): how much of each model's belief lies on the shared tokens
  kl         KL(p_S || p_T), nats: what OPD minimises

    python overlap.py --student runs/x/sft --teacher runs/x/teacher --data test.jsonl --out runs/x/overlap
    torchrun --nproc_per_node 8 overlap.py --student ... (the same)

The paper merges both top-k sets and then drops what is invalid; here invalid tokens make room for valid ones before. The two agree
wherever no invalid token is among the most probable. The public code also removes stop tokens from the student's set.

Rollouts are sampled at temperature 1, as in training, from uniforms keyed on (seed, utterance). --out receives overlap.json.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import model

STATISTICS = ("vuss", "overlap", "top1", "mass_s", "mass_t", "kl")


def overlap_stats(z_s, z_t, mask, k) -> dict[str, torch.Tensor]:
    """Statistics of every state: logits z_s, z_t (..., V) of one vocabulary, -inf on invalid tokens; mask (...) -> {name: (N,)}.

    mask picks the N states that count. A token that is -inf on either side is valid in neither set (top-k may still return it
    when fewer than k are finite).
    """
    z_s, z_t = z_s[mask], z_t[mask]                                                     # (N, V)
    valid = torch.isfinite(z_s) & torch.isfinite(z_t)
    k = min(k, z_s.shape[-1])
    member = lambda z: torch.zeros_like(valid).scatter_(-1, z.masked_fill(~valid, -math.inf).topk(k).indices, True) & valid
    in_s, in_t = member(z_s), member(z_t)                                               # (N, V) bool
    logp_s, logp_t = z_s.log_softmax(-1), z_t.log_softmax(-1)
    both = in_s & in_t
    return {"vuss": (in_s | in_t).sum(-1).double(), "overlap": both.sum(-1).double() / k,
            "top1": (z_s.argmax(-1) == z_t.argmax(-1)).double(),
            "mass_s": (logp_s.exp() * both).sum(-1).double(), "mass_t": (logp_t.exp() * both).sum(-1).double(),
            "kl": (logp_s.exp() * (logp_s - logp_t).masked_fill(~valid, 0.0)).sum(-1).double()}


@torch.no_grad()
def measure_batch(student, teacher, to_teacher, batch, args) -> dict[str, list[float]]:
    """Roll out one batch -> {utterance id: [number of states, sum of each statistic]}."""
    prompt = model.encode(student, batch)
    uniforms = data.keyed_uniforms(args.seed, 0, [u.id for u in batch.utterances], args.max_new_tokens)
    ids, mask = model.generate(student, prompt, args.max_new_tokens, args.temperature, uniforms)                    # (B, R)
    scored = mask & (to_teacher[ids] >= 0).cumprod(1).bool()
    hidden_s = model.response_hidden(student, prompt, ids, mask)[scored[mask]]                                      # (N, D)
    hidden_t = model.response_hidden(teacher, model.encode(teacher, batch), to_teacher[ids].clamp(min=0), scored)   # (N, D_t)
    row = scored.nonzero()[:, 0]                                                                                    # (N,) clip of each state
    sums = torch.zeros(len(ids), 1 + len(STATISTICS), dtype=torch.double, device=ids.device)
    for i in range(0, len(row), args.chunk):
        with student.autocast():
            z_s = student.head(hidden_s[i:i + args.chunk]).float().masked_fill(to_teacher < 0, -math.inf)           # (C, V)
            z_t = model.map_logits(teacher.head(hidden_t[i:i + args.chunk]).float(), to_teacher)                    # (C, V)
        stats = overlap_stats(z_s, z_t, torch.ones(len(z_s), dtype=torch.bool, device=z_s.device), args.top_k)
        values = torch.stack([torch.ones_like(stats["kl"]), *(stats[name] for name in STATISTICS)], dim=1)          # (C, 7)
        sums.index_add_(0, row[i:i + args.chunk], values)
    return dict(zip([u.id for u in batch.utterances], sums.tolist()))


def main(args) -> None:
    """Roll out, score and reduce: see the top of this file."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    kind = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    if world > 1:
        dist.init_process_group("gloo")  # sums travel as Python objects; no tensor does
    utterances = data.read_manifest(args.data)
    student, teacher = model.load(args.student, device), model.load(args.teacher, device)
    to_teacher = model.vocabulary_map(student, teacher)
    durations = data.measure(utterances)
    order = [utterances[i] for i in sorted(range(len(utterances)), key=durations.__getitem__)]
    sums, bar = {}, tqdm(total=len(order), desc="overlap", unit="clip", disable=rank > 0, mininterval=0.5 if sys.stderr.isatty() else 20)
    for start in range(rank * args.batch, len(order), world * args.batch):
        batch = data.load_batch(order[start:start + args.batch], student.n_mels, keep_going=False)
        sums |= measure_batch(student, teacher, to_teacher, batch, args)
        bar.update(min(len(batch.utterances) * world, bar.total - bar.n))
    bar.close()
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, sums)
        sums = {i: row for part in parts for i, row in part.items()}
    if rank == 0:
        rows = [sums[u.id] for u in utterances]  # manifest order: the interval does not depend on how clips were shared out
        states = [row[0] for row in rows]
        if not sum(states):
            raise ValueError(f"{args.data}: no state could be scored: none of the rollouts' tokens has a twin in the teacher's vocabulary")
        result = {"student": str(args.student), "teacher": str(args.teacher), "data": args.data, "k": args.top_k, "seed": args.seed,
                  "temperature": args.temperature, "clips": len(rows), "states": int(sum(states)), "shared_ids": int((to_teacher >= 0).sum())}
        print(f"{len(rows)} clips, {result['states']} states, k = {args.top_k}, {result['shared_ids']} shared ids")
        for j, name in enumerate(STATISTICS, 1):
            low, high = data.bootstrap([row[j] for row in rows], states)
            result[name] = {"mean": sum(row[j] for row in rows) / sum(states), "low": low, "high": high}
            print(f"{name:8} {result[name]['mean']:8.4f}  [{low:.4f}, {high:.4f}]")
        Path(args.out).mkdir(parents=True, exist_ok=True)
        (Path(args.out) / "overlap.json").write_text(json.dumps(result, indent=2))
    if world > 1:
        dist.barrier()  # without it, gloo on a CPU may abort in the line below
        dist.destroy_process_group()


def parse_args(argv=None):
    """Flags -> namespace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = lambda flag, default, text, **kw: parser.add_argument(flag, default=default, help=f"{text} (default: {default})",
                                                                **(kw if "action" in kw else {"type": type(default)} | kw))
    add("--student", None, "checkpoint directory; writes the rollouts", type=str, required=True)
    add("--teacher", None, "checkpoint directory; scores them", type=str, required=True)
    add("--data", None, "manifest", type=str, required=True)
    add("--out", None, "folder for overlap.json", type=str, required=True)
    add("--top_k", 32, "k, the size of each model's set")
    add("--temperature", 1.0, "of the rollouts; 0 = greedy")
    add("--seed", 0, "of the rollouts")
    add("--batch", 32, "utterances a forward")
    add("--chunk", 256, "states whose logits exist at a time")
    add("--max_new_tokens", 64, "longest rollout, tokens")
    add("--device", "auto", "auto, cpu or cuda")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
