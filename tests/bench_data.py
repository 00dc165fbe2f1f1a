"""Data at the paper's size: opening a manifest, loading clips, sending batches. Prints JSON.

    OMP_NUM_THREADS=1 python tests/bench_data.py
    OMP_NUM_THREADS=1 python tests/bench_data.py --lines 10000000    # 2.3 GB of disk, some minutes

manifest  us a line to open it and to read one again; bytes a line that stay in memory; plan_s: the
          first Plan[s] of an epoch
clip_ms   one clip of 10 s decoded and with log-mel, a process: each format; a segment of an hour
batch     MB of 24 clips of 30 s; ms to make it here; ms that a trainer waits for one from a worker
          that has it ready: what the pipe costs
"""

import argparse
import json
import pickle
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import torch

import data
from conftest import sound
from test_audio import encode

RATE = data.SAMPLE_RATE


def seconds(function, *arguments) -> float:
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def bench_manifest(folder, n) -> dict:
    path = folder / "m.jsonl"
    data.write_jsonl(path, ({
        "id": f"corpus-part-{i:09d}", "audio": f"clips/{i % 64}.flac", "language": "en",
        "text": "put two cups on the shelf anna has seven green lamps", "duration": 3.0,
        "speaker": f"speaker-{i % 2000:05d}"} for i in range(n)))
    opened = seconds(data.read_manifest, path)
    manifest = data.read_manifest(path)
    some = np.random.default_rng(0).integers(n, size=10_000).tolist()
    again = seconds(lambda: [manifest[i] for i in some])
    plan = data.Plan(n, 256, 0)
    return {"lines": n, "open_us": opened / n * 1e6, "read_us": again / len(some) * 1e6,
            "bytes": len(pickle.dumps(manifest)) / n, "plan_s": seconds(plan.__getitem__, 0)}


def bench_clips(folder, repeats=40) -> dict:
    """{format: [ms decoded, ms with log-mel]}."""
    ten = sound(np.random.default_rng(0), 10.0)
    result = {}
    for name, hours in (("wav", 0), ("flac", 0), ("mp3", 0), ("m4a", 0), ("opus", 0),
                        ("mp3", 1), ("opus", 1)):
        n = 360 if hours else 1
        path = encode(folder / f"{n}.{name}", np.tile(ten, n))
        starts = np.random.default_rng(1).integers(n, size=repeats + 1) * 10.0
        clips = [data.Utterance("x", str(path), start_sec=start, duration_sec=10.0)
                 for start in starts]
        data.log_mel(data.load_audio(clips[0]))  # the first calls are slower
        decoded = seconds(lambda: [data.load_audio(u) for u in clips[1:]])
        with_mel = seconds(lambda: [data.log_mel(data.load_audio(u)) for u in clips[1:]])
        result[name + " of an hour" * hours] = [1000 * decoded / repeats, 1000 * with_mel / repeats]
    return result


class Ready:
    """A data set whose items are all one batch: nothing is left to do but to send it."""
    def __init__(self, batch):
        self.batch = batch

    def __getitem__(self, _step):
        return self.batch


def bench_batch(folder, items=8) -> dict:
    path = encode(folder / "30.wav", sound(np.random.default_rng(0), 30.0))
    clips = [data.Utterance(str(i), str(path)) for i in range(24)]
    made = seconds(data.load_batch, clips)
    batch = data.load_batch(clips)
    batches = iter(data.loader(Ready(batch), range(items + 2), 1))
    next(batches)
    next(batches)
    sent = seconds(lambda: [next(batches) for _ in range(items)])
    return {"MB": batch.mel[128].nbytes / 1e6, "made_ms": 1000 * made,
            "sent_ms": 1000 * sent / items}


def rounded(value):
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else float(f"{value:.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=data.HelpFormatter)
    parser.add_argument("--lines", type=int, default=200_000, help="size of the manifest")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(json.dumps(rounded({
            "manifest": bench_manifest(folder, args.lines), "clip_ms": bench_clips(folder),
            "batch": bench_batch(folder)})))


if __name__ == "__main__":
    main()
