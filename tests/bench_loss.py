"""From hidden states to gradients: our chunked loss against three other ways, in one process. Prints a table and one JSON line.

    python tests/bench_loss.py            # V = 151,936, widths 896 (student) and 2048 (teacher); needs about 14 GiB, takes minutes

  ours        distill.distil_backward: heads and loss a chunk of rows at a time, backward inside the loop
  naive       all rows at once through both heads; log_softmax, exp, product, sum, autograd
  checkpoint  the same chunks under torch.utils.checkpoint: logits are made again in the backward pass
  published   what the public code does, from its description: both heads at every padded column, prompt and cap included; k = 32
              ids a position copied to Python lists; the union built element by element. Its divergence is forward on the union,
              so ours is timed with those flags there. fp32 on both sides.

Extra memory is the peak of resident memory during the call over what stood before it, weights and hidden states included in the
latter. Each variant runs once unmeasured on a few rows, then --repeats times; the fastest counts, for every variant alike.
"""

import argparse
import ctypes
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import distill


def resident():
    """Resident memory now and at its peak since `forget_peak`, in MiB."""
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmRSS"].split()[0]) / 1024, int(status["VmHWM"].split()[0]) / 1024


def measure(call, head_s, repeats):
    """-> seconds (fastest), extra MiB (largest)."""
    seconds, extra = math.inf, 0.0
    for _ in range(repeats):
        head_s.weight.grad = torch.zeros_like(head_s.weight)  # the gradient's buffer is not part of the loss
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        open("/proc/self/clear_refs", "w").write("5")  # Linux: forget the peak
        before, began = resident()[0], time.perf_counter()
        call()
        seconds = min(seconds, time.perf_counter() - began)
        extra = max(extra, resident()[1] - before)
    return seconds, extra


def reverse_kl(z_s, z_t):
    """sum_t KL(p_S || p_T), as one writes it first."""
    logp_s, logp_t = z_s.log_softmax(-1), z_t.log_softmax(-1)
    return (logp_s.exp() * (logp_s - logp_t)).sum()


def naive(head_s, h_s, head_t, h_t):
    with torch.no_grad():
        z_t = head_t(h_t)
    reverse_kl(head_s(h_s), z_t).backward()


def recompute(head_s, h_s, head_t, h_t, chunk):
    def of_rows(rows_s, rows_t):
        with torch.no_grad():
            z_t = head_t(rows_t)
        return reverse_kl(head_s(rows_s), z_t)
    sum(checkpoint(of_rows, h_s[i:i + chunk], h_t[i:i + chunk], use_reentrant=False) for i in range(0, len(h_s), chunk)).backward()


def published(head_s, h_s, head_t, h_t, n_prompt, lengths, k=32):
    """hidden (B, P + cap, D): logits everywhere, rows cut out afterwards, lists, a loop over union elements."""
    z_s = head_s(h_s)[:, n_prompt - 1:-1].float()                                   # (B, cap, V)
    with torch.no_grad():
        z_t = head_t(h_t).float()                                                   # (B, P + cap, V)
        rollout_ids = [[z_s[b, t].topk(k).indices.tolist() for t in range(n)] for b, n in enumerate(lengths)]
    unions, scores = [], []
    for b, n in enumerate(lengths):
        rows = z_t[b, n_prompt - 1:n_prompt - 1 + n].clone()
        logp_rows = rows.log_softmax(-1)
        values, ids = rows.topk(k)
        for t in range(n):
            teacher = dict(zip(ids[t].tolist(), values[t].tolist()))
            known = set(rollout_ids[b][t])
            unions.append(rollout_ids[b][t] + [i for i in teacher if i not in known])
            scores.append([teacher[i] if i in teacher else logp_rows[t, i].item() for i in unions[-1]])
    support = torch.zeros(len(unions), 2 * k, dtype=torch.long)
    target = torch.full((len(unions), 2 * k), -math.inf)
    for row, (ids, values) in enumerate(zip(unions, scores)):                       # two scalar writes an element
        for j, (i, value) in enumerate(zip(ids, values)):
            support[row, j], target[row, j] = i, value
    own = torch.cat([z_s[b, :n] for b, n in enumerate(lengths)])                    # (N, V) a copy
    logp_s = own.gather(1, support).masked_fill(torch.isneginf(target), -math.inf).log_softmax(-1)
    p_t, used = target.softmax(-1), torch.isfinite(target)
    ((p_t * (p_t.log() - logp_s)).masked_fill(~used, 0.0).nan_to_num().sum(-1)).mean().backward()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 512, 2560])
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--chunk", type=int, default=distill.parse_args([]).chunk)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    own = parser.parse_args()
    torch.set_num_threads(own.threads)
    torch.manual_seed(0)
    d_s, d_t, v = 896, 2048, own.vocabulary
    head_s, head_t = (nn.Linear(d, v, bias=False) for d in (d_s, d_t))
    for head in (head_s, head_t):
        nn.init.normal_(head.weight, std=0.05)
    head_t.requires_grad_(False)
    wrap = lambda head: SimpleNamespace(head=head, autocast=lambda: torch.autocast("cpu", enabled=False))
    options = lambda **changes: SimpleNamespace(**{"divergence": "reverse", "support": "full", "top_k": 32, "tau": 1.0, "beta": 0.5,
                                                   "baseline": False, "chunk": own.chunk} | changes)
    same = torch.arange(v)

    def ours(h_s, h_t, **changes):
        distill.distil_backward(wrap(head_s), h_s, wrap(head_t), h_t, None, same, options(**changes), watch=False)

    result = {"vocabulary": v, "chunk": own.chunk, "threads": own.threads, "rows": {}}
    print(f"{'rows':>6} {'':12}{'seconds':>10}{'extra MiB':>12}")
    for n in own.rows:
        h_s, h_t = torch.randn(n, d_s), torch.randn(n, d_t)
        leaf = lambda: h_s.clone().requires_grad_() * 1.0
        variants = {"ours": lambda: ours(leaf(), h_t), "naive": lambda: naive(head_s, leaf(), head_t, h_t),
                    "checkpoint": lambda: recompute(head_s, leaf(), head_t, h_t, own.chunk)}
        row = result["rows"][n] = {}
        for name, call in variants.items():
            row[name] = dict(zip(("seconds", "extra_mib"), measure(call, head_s, own.repeats)))
            print(f"{n:6} {name:12}{row[name]['seconds']:10.2f}{row[name]['extra_mib']:12.0f}", flush=True)
        row["time_over_naive"] = row["ours"]["seconds"] / row["naive"]["seconds"]
        row["naive_memory_over_ours"] = row["naive"]["extra_mib"] / row["ours"]["extra_mib"]

    # 8 clips of 10 s: 136 prompt columns (125 audio tokens), 40 response tokens, a cap of 256
    clips, n_prompt, cap, response = 8, 136, 256, 40
    h_s, h_t = torch.randn(clips, n_prompt + cap, d_s), torch.randn(clips, n_prompt + cap, d_t)
    own_columns = slice(n_prompt - 1, n_prompt - 1 + response)
    leaf = lambda: h_s.clone().requires_grad_() * 1.0
    row = result["batch of 8 clips"] = {}
    variants = {"ours": lambda: ours(leaf()[:, own_columns].flatten(0, 1), h_t[:, own_columns].flatten(0, 1), divergence="forward", support="union"),
                "published": lambda: published(head_s, leaf(), head_t, h_t, n_prompt, [response] * clips)}
    for name, call in variants.items():
        row[name] = dict(zip(("seconds", "extra_mib"), measure(call, head_s, own.repeats)))
        print(f"{clips:3} x 40 {name:11}{row[name]['seconds']:10.2f}{row[name]['extra_mib']:12.0f}", flush=True)
    row["published_time_over_ours"] = row["published"]["seconds"] / row["ours"]["seconds"]
    row["published_memory_over_ours"] = row["published"]["extra_mib"] / row["ours"]["extra_mib"]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
