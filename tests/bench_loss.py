"""From hidden rows to gradients: the loss in chunks against all at once. Prints one JSON line.

    python tests/bench_loss.py                  # V = 151,936, widths 896 and 2048: 14 GiB, minutes
    python tests/bench_loss.py --device cuda    # not run here: no GPU

  ours     distill.loss_in_chunks: heads and loss for a chunk of rows, backward inside the loop
  naive    all rows at once through both heads, the same reverse KL, one backward

Extra memory is the peak during the call over what stood before it: resident memory on a CPU,
allocated memory on a GPU. Each way runs once unmeasured, then --repeats times; the median counts.
"""

import argparse
import ctypes
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import distill
import model

WIDTH_S, WIDTH_T = 896, 2048


def memory(device, peak) -> float:
    """MiB in use now, or at the peak since it was forgotten."""
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        return used / 2 ** 20
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmHWM" if peak else "VmRSS"].split()[0]) / 1024


def forget_peak(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")  # Linux: forget the peak


def measure(call, weight_s, repeats) -> dict[str, float]:
    """-> seconds (median), extra_mib (largest)."""
    device, seconds, extra = weight_s.device, [], 0.0
    for i in range(repeats + 1):
        weight_s.grad = torch.zeros_like(weight_s)  # the gradient's buffer is no part of the loss
        forget_peak(device)
        before, began = memory(device, peak=False), time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i > 0:  # the first warms up
            seconds.append(time.perf_counter() - began)
            extra = max(extra, memory(device, peak=True) - before)
    return {"seconds": statistics.median(seconds), "extra_mib": extra}


def ours(h_s, h_t, head_s, head_t, chunk):
    y = torch.zeros(len(h_s), dtype=torch.long, device=h_s.device)
    _, grad_rows = distill.loss_in_chunks(
        h_s, h_t, y, head_s, head_t, lambda z_s, z_t, y: distill.reverse_kl(z_s, z_t), chunk, 1)
    h_s.backward(grad_rows)


def naive(h_s, h_t, head_s, head_t, chunk):
    with torch.no_grad():
        z_t = head_t(h_t)
    distill.reverse_kl(head_s(h_s), z_t).sum().backward()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 512, 2560])
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--chunk", type=int, default=distill.parse_args([]).chunk)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # of rows, under autocast
    weight_s = (0.05 * torch.randn(args.vocabulary, WIDTH_S, device=device)).requires_grad_()
    weight_t = 0.05 * torch.randn(args.vocabulary, WIDTH_T, device=device)
    heads = [partial(model.logits, weight=weight) for weight in (weight_s, weight_t)]
    result = {}
    for n in args.rows:
        h_s = torch.randn(n, WIDTH_S, device=device, dtype=dtype).requires_grad_()
        h_t = torch.randn(n, WIDTH_T, device=device, dtype=dtype)
        for way in (ours, naive):  # h_s * 1: a graph behind the rows
            entry = measure(lambda: way(h_s * 1, h_t, *heads, args.chunk), weight_s, args.repeats)
            result.setdefault(n, {})[way.__name__] = entry
            print(f"{n:6} rows {way.__name__:10}{entry['seconds']:8.2f} s"
                  f"{entry['extra_mib']:9.0f} MiB", flush=True)
    print(json.dumps({"vocabulary": args.vocabulary, "chunk": args.chunk, "device": args.device,
                      "rows": result}))


if __name__ == "__main__":
    main()
