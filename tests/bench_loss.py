"""From hidden rows to gradients: the loss in chunks against three other ways, in one process. Prints a table and one JSON line.

    python tests/bench_loss.py                  # V = 151,936, widths 896 (student) and 2048 (teacher): about 14 GiB, minutes
    python tests/bench_loss.py --device cuda    # not run here: no GPU

  ours        distill.loss_in_chunks: heads and loss a chunk of rows at a time, backward inside the loop
  naive       all rows at once through both heads, the same reverse KL, one backward
  checkpoint  the same chunks under torch.utils.checkpoint: logits are made again in the backward pass
  published   what the public code does, from its description: both heads at every padded column, prompt and cap included; k = 32
              ids a position copied to Python lists; the union built element by element. Its divergence is forward on the union,
              so ours is timed with those flags there.

All use the same heads (model.logits). Extra memory is the peak during the call over what stood before it, weights and hidden rows
included in the latter: resident memory on a CPU, allocated memory on a GPU. Each way runs once unmeasured, then --repeats times; the
median counts, for all alike.
"""

import argparse
import ctypes
import json
import math
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils.checkpoint import checkpoint

import distill
import model

WIDTH_S, WIDTH_T = 896, 2048
CLIPS, N_PROMPT, CAP, RESPONSE = 8, 136, 256, 40  # 8 clips of 10 s: 125 audio tokens in the prompt, 40 tokens said, a cap of 256


# ---------------------------------------------------------------------------- measuring

def resident(key) -> float:
    """Resident memory of this process in MiB: VmRSS now, VmHWM at its peak since `forget_peak`."""
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status[key].split()[0]) / 1024


def forget_peak(device) -> float:
    """Start a new measurement of the peak -> MiB in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2 ** 20
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")  # Linux: forget the peak
    return resident("VmRSS")


def peak(device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    return resident("VmHWM")


def seconds_of(call, device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1000


def measure(call, weight_s, repeats) -> dict[str, float]:
    """-> seconds (median), extra_mib (largest)."""
    seconds = []
    extra = 0.0
    for i in range(repeats + 1):
        weight_s.grad = torch.zeros_like(weight_s)  # the gradient's buffer is not part of the loss
        before = forget_peak(weight_s.device)
        duration = seconds_of(call, weight_s.device)
        if i > 0:  # the first warms up
            seconds.append(duration)
            extra = max(extra, peak(weight_s.device) - before)
    return {"seconds": statistics.median(seconds), "extra_mib": extra}


# ---------------------------------------------------------------------------- the ways

def ours(h_s, h_t, weight_s, weight_t, chunk, **flags):
    head_s = partial(model.logits, weight=weight_s)
    head_t = partial(model.logits, weight=weight_t)
    same_ids = torch.arange(len(weight_s), device=h_s.device)
    y = torch.zeros(len(h_s), dtype=torch.long, device=h_s.device)
    divergence = partial(distill.token_divergence, **flags)
    _, grad_rows = distill.loss_in_chunks(h_s, h_t, y, head_s, head_t, same_ids, divergence, chunk)
    h_s.backward(grad_rows)


def naive(h_s, h_t, weight_s, weight_t):
    with torch.no_grad():
        z_t = model.logits(h_t, weight_t)
    distill.reverse_kl(model.logits(h_s, weight_s), z_t).sum().backward()


def recompute(h_s, h_t, weight_s, weight_t, chunk):
    def of_rows(rows_s, rows_t):
        with torch.no_grad():
            z_t = model.logits(rows_t, weight_t)
        return distill.reverse_kl(model.logits(rows_s, weight_s), z_t).sum()

    total = 0.0
    for i in range(0, len(h_s), chunk):
        total = total + checkpoint(of_rows, h_s[i:i + chunk], h_t[i:i + chunk], use_reentrant=False)
    total.backward()


def published(h_s, h_t, weight_s, weight_t, lengths, k=32):
    """hidden (B, P + cap, D): logits everywhere, rows cut out afterwards, lists, a loop over union
    elements."""
    z_s = (h_s @ weight_s.to(h_s.dtype).T)[:, N_PROMPT - 1:-1].float()              # (B, cap, V)
    with torch.no_grad():
        z_t = (h_t @ weight_t.to(h_t.dtype).T).float()                              # (B, P + cap, V)
        rollout_ids = [[z_s[b, t].topk(k).indices.tolist() for t in range(n)] for b, n in enumerate(lengths)]
    unions = []
    scores = []
    for b, n in enumerate(lengths):
        rows = z_t[b, N_PROMPT - 1:N_PROMPT - 1 + n].clone()
        logp_rows = rows.log_softmax(-1)
        values, ids = rows.topk(k)
        for t in range(n):
            teacher = dict(zip(ids[t].tolist(), values[t].tolist()))
            known = set(rollout_ids[b][t])
            union = rollout_ids[b][t] + [i for i in teacher if i not in known]
            unions.append(union)
            scores.append([teacher[i] if i in teacher else logp_rows[t, i].item() for i in union])
    support = torch.zeros(len(unions), 2 * k, dtype=torch.long, device=h_s.device)
    target = torch.full((len(unions), 2 * k), -math.inf, device=h_s.device)
    for row, (ids, values) in enumerate(zip(unions, scores)):                       # two scalar writes an element
        for j, (i, value) in enumerate(zip(ids, values)):
            support[row, j] = i
            target[row, j] = value
    emitted = torch.cat([z_s[b, :n] for b, n in enumerate(lengths)])                # (N, V) a copy
    used = torch.isfinite(target)
    logp_s = emitted.gather(1, support).masked_fill(~used, -math.inf).log_softmax(-1)
    p_t = target.softmax(-1)
    terms = (p_t * (p_t.log() - logp_s)).masked_fill(~used, 0.0).nan_to_num()
    terms.sum(-1).mean().backward()


# ---------------------------------------------------------------------------- the table

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 512, 2560])
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--chunk", type=int, default=distill.parse_args([]).chunk)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # of hidden rows, as autocast leaves them
    weight_s = (0.05 * torch.randn(args.vocabulary, WIDTH_S, device=device)).requires_grad_()
    weight_t = (0.05 * torch.randn(args.vocabulary, WIDTH_T, device=device)).to(dtype)
    weights = (weight_s, weight_t)
    result = {"vocabulary": args.vocabulary, "chunk": args.chunk, "threads": args.threads, "device": args.device, "rows": {}}
    print(f"{'rows':>6} {'':12}{'seconds':>10}{'extra MiB':>12}")

    def hidden(*shape):
        """Hidden rows of student and teacher; the student's have a graph behind them."""
        h_s = torch.randn(*shape, WIDTH_S, device=device, dtype=dtype).requires_grad_()
        return h_s, torch.randn(*shape, WIDTH_T, device=device, dtype=dtype)

    def compare(title, ways):
        entry = result["rows"][title] = {}
        for name, call in ways.items():
            entry[name] = measure(call, weight_s, args.repeats)
            print(f"{title:>6} {name:12}{entry[name]['seconds']:10.2f}{entry[name]['extra_mib']:12.0f}", flush=True)
        for name in list(ways)[1:]:
            for key in ("seconds", "extra_mib"):
                entry[f"{name}_over_ours_{key}"] = entry[name][key] / max(entry["ours"][key], 1e-9)

    for n in args.rows:
        h_s, h_t = hidden(n)
        compare(str(n), {
            "ours": lambda: ours(h_s * 1, h_t, *weights, args.chunk),
            "naive": lambda: naive(h_s * 1, h_t, *weights),
            "checkpoint": lambda: recompute(h_s * 1, h_t, *weights, args.chunk),
        })

    h_s, h_t = hidden(CLIPS, N_PROMPT + CAP)
    said = slice(N_PROMPT - 1, N_PROMPT - 1 + RESPONSE)
    paper = {"divergence": "forward", "support": "union"}
    compare(f"{CLIPS}x{RESPONSE}", {
        "ours": lambda: ours((h_s * 1)[:, said].flatten(0, 1), h_t[:, said].flatten(0, 1), *weights, args.chunk, **paper),
        "published": lambda: published(h_s * 1, h_t, *weights, [RESPONSE] * CLIPS),
    })
    print(json.dumps(result))


if __name__ == "__main__":
    main()
