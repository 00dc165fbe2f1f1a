"""What memory costs in time: steps of distill.py plain, with --freeze encoder, with --recompute.

    python tests/bench_step.py                   # the demo's student and teacher
    python tests/bench_step.py --size mid        # students and teachers of 24 and 80 M parameters
    python tests/bench_step.py --device cuda     # not run here: no GPU

Random weights, sounds of speech's lengths, the script's own loop. Each way is a run of its own; the
first steps warm up. Prints the median step in seconds and the largest memory, then one JSON line.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import numpy as np
import torch

import conftest
import data
import distill
import model

# (width, encoder layers, LM layers) of student and teacher; shortest and longest clip, seconds
SIZES = {"demo": ((80, 2, 2), (112, 3, 2), 1.0, 1.8), "mid": ((384, 6, 8), (640, 10, 12), 4.0, 8.0)}
WAYS = {"plain": [], "freeze": ["--freeze", "encoder"], "recompute": ["--recompute"]}


def prepare(folder, size):
    """student/, teacher/ and pool.jsonl of 16 clips."""
    *models, shortest, longest = SIZES[size]
    torch.manual_seed(0)
    tokenizer = model.train_tokenizer(conftest.TEXTS["en"] * 4 + conftest.TEXTS["zh"] * 4, 640)
    for name, (width, encoder_layers, lm_layers) in zip(("student", "teacher"), models):
        asr = model.random_student(tokenizer, width, encoder_layers, lm_layers, 4)
        model.save(asr, folder / name)
    rng, rows = np.random.default_rng(0), []
    for i, seconds in enumerate(np.linspace(shortest, longest, 16)):
        conftest.write_wav(folder / f"{i}.wav", conftest.sound(rng, seconds))
        rows.append({"audio": f"{i}.wav"})
    data.write_jsonl(folder / "pool.jsonl", rows)


def run(folder, way, steps, device):
    """In a process of its own -> FOLDER/<way>.json: seconds of each step, GiB at the peak."""
    torch.set_num_threads(1)
    ends = []

    def note(*_):
        ends.append(time.perf_counter())

    model.Run.end_step = note
    model.Run.close = lambda self: None
    model.save = lambda asr, path: None
    words = [f"--student={folder}/student", f"--teacher={folder}/teacher", f"--out={folder}/{way}",
             f"--data={folder}/pool.jsonl", f"--steps={steps}", "--batch=16", "--micro_batch=8",
             "--max_new_tokens=24", "--lr=1e-6", f"--device={device}", "--log_every=1000000"]
    distill.main(distill.parse_args(words + WAYS[way]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2 ** 30
    (folder / f"{way}.json").write_text(json.dumps([np.diff(ends).tolist(), peak]))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="demo")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    result = {"size": args.size, "device": args.device}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), args.size)
        for way in WAYS:
            task = (Path(folder), way, args.steps, args.device)
            process = multiprocessing.get_context("spawn").Process(target=run, args=task)
            process.start()
            process.join()
            seconds, peak = json.loads((Path(folder) / f"{way}.json").read_text())
            result[way] = {"step_sec": statistics.median(seconds[len(seconds) // 4:]),
                           "peak_gib": peak}
    for way in WAYS:
        print(f"{way:10}{result[way]['step_sec']:8.3f} s {result[way]['peak_gib']:6.2f} GiB")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
