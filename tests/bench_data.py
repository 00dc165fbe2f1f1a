"""Data at the paper's size: manifests, plans, decoding, a transcription that is killed. Prints one JSON line.

    python tests/bench_data.py                                  # manifests of 10,000 and 1,000,000 lines, made on the fly
    python tests/bench_data.py --lines 10000 1000000 10000000   # the last one takes 2.3 GB of disk and several minutes

manifests      a list, one entry a size, measured in a process of its own
  first_open_s, open_s           without an index; from it
  memory_mb                      what a process grows by: opened, checked, planned, 1,000 batches' lines read; index pages included
  private_mb                     the part of it that is not shared with other processes
  epoch_s, step_ms               the first Plan[s] of an epoch; any other
  batch_ms                       32 clips of 3 s: lines parsed, flac decoded, log-mel
loader         clips of 10 s a second and process, decoding alone and with log-mel: wav, flac, mp3, segments of one-hour opus
transcription  2,000 clips of 0.3 to 1 s by a tiny model: seconds of a run that nobody stops and of one that is killed ten times
               (every start included), whether both wrote the same hyps.jsonl, and clips that were kept at each kill
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import soundfile
import torch

import data
import model
from conftest import TEXTS, sound

RATE = data.SAMPLE_RATE


# ---------------------------------------------------------------------------- manifests

def write_manifest(path, n) -> None:
    """n lines of 230 bytes over 64 real clips of 3 s beside them."""
    rng = np.random.default_rng(0)
    for i in range(64):
        soundfile.write(path.parent / f"{i}.flac", sound(rng, 3.0), RATE)
    text = " ".join(TEXTS["en"][:4])
    with path.open("w", encoding="utf-8") as file:
        for i in range(n):
            file.write(json.dumps({"id": f"corpus-part-{i:09d}", "audio": f"{i % 64}.flac", "text": text, "language": "en",
                                   "duration": 3.0, "speaker": f"speaker-{i % 2000:05d}"}) + "\n")


def memory_mb():
    """Resident memory of this process, and the part of it that no other process can share."""
    fields = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, kilobytes, *_ = line.split()
        fields[name] = int(kilobytes) / 1000
    return fields["Rss:"], fields["Anonymous:"]


def measure_manifest(path) -> dict:
    """One entry of "manifests", without first_open_s; in a fresh process."""
    torch.set_num_threads(1)
    rss, private = memory_mb()
    began = time.perf_counter()
    manifest = data.read_manifest(path)
    durations = data.measure(manifest)
    data.check_labelled(manifest)
    opened = time.perf_counter()
    plan = data.Plan(durations, 32, 0)
    plan[0]
    planned = time.perf_counter()
    steps = np.random.default_rng(0).integers(plan.steps_per_epoch, size=1000)
    batches = [plan[int(step)] for step in steps]
    stepped = time.perf_counter()
    for batch in batches:
        for i in batch:
            manifest[i]
    rss_after, private_after = memory_mb()
    share = data.Steps(manifest, plan, 32)
    share[0]  # log-mel's first call is slower
    before = time.perf_counter()
    for step in range(1, 11):
        share[step]
    loaded = time.perf_counter()
    return {"lines": len(manifest), "open_s": opened - began, "memory_mb": rss_after - rss, "private_mb": private_after - private,
            "epoch_s": planned - opened, "step_ms": stepped - planned, "batch_ms": 100 * (loaded - before)}


def bench_manifest(n) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.jsonl"
        write_manifest(path, n)
        began = time.perf_counter()
        data.read_manifest(path)
        first = time.perf_counter() - began
        done = subprocess.run([sys.executable, __file__, "--measure", path], capture_output=True, text=True, check=True)
    return {"first_open_s": first} | json.loads(done.stdout)


# ---------------------------------------------------------------------------- decoding

def bench_loader(repeats=40) -> dict:
    """{format: clips of 10 s a second and process, decoded; with log-mel}."""
    torch.set_num_threads(1)
    rates = {}
    rng = np.random.default_rng(0)
    ten = sound(rng, 10.0)
    formats = {"wav": {}, "flac": {}, "mp3": {}, "opus, segments of an hour": {"format": "OGG", "subtype": "OPUS"}}
    with tempfile.TemporaryDirectory() as folder:
        for name, options in formats.items():
            extension = name.split(",")[0]
            path = f"{folder}/a.{extension}"
            n = 360 if extension == "opus" else 1
            with soundfile.SoundFile(path, "w", RATE, 1, **options) as file:
                for _ in range(n):
                    file.write(ten)
            clips = [data.Utterance("x", path, start_sec=float(10 * rng.integers(n)), duration_sec=10.0) for _ in range(repeats)]
            decoded = time_of(lambda u: data.load_audio(u), clips)
            with_mel = time_of(lambda u: data.log_mel(data.load_audio(u)), clips)
            rates[name] = {"decoded": 1 / decoded, "with_log_mel": 1 / with_mel}
    return rates


def time_of(function, clips) -> float:
    """Seconds a clip."""
    function(clips[0])
    began = time.perf_counter()
    for clip in clips:
        function(clip)
    return (time.perf_counter() - began) / len(clips)


# ---------------------------------------------------------------------------- transcription

def bench_transcription(n, kills) -> dict:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rng = np.random.default_rng(0)
        rows = []
        for i in range(n):
            audio = sound(rng, rng.uniform(0.3, 1.0))
            soundfile.write(folder / f"{i}.wav", audio, RATE)
            rows.append({"id": str(i), "audio": f"{i}.wav", "text": TEXTS["en"][i % 10], "language": "en", "duration": len(audio) / RATE})
        data.write_jsonl(folder / "m.jsonl", rows)
        torch.manual_seed(0)
        tokenizer = model.train_tokenizer(TEXTS["en"] * 4, 300)
        model.save(model.random_student(tokenizer, d_model=32, encoder_layers=2, lm_layers=2, heads=2), folder / "student")

        began = time.perf_counter()
        assert start(folder, "whole").wait() == 0
        whole = time.perf_counter() - began
        began = time.perf_counter()
        transcribed = [kill_later(folder, n * (k + 1) // (kills + 1)) for k in range(kills)]
        assert start(folder, "killed").wait() == 0
        killed = time.perf_counter() - began
        same = (folder / "whole/hyps.jsonl").read_bytes() == (folder / "killed/hyps.jsonl").read_bytes()
    return {"clips": n, "kills": kills, "whole_s": whole, "killed_s": killed, "same": same, "clips_kept_at_each_kill": transcribed}


def start(folder, out):
    return subprocess.Popen([sys.executable, ROOT / "evaluate.py", "--model", folder / "student", "--data", folder / "m.jsonl", "--out", folder / out,
                             "--batch", "8", "--max_new_tokens", "8", "--device", "cpu", "--resume"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_later(folder, n) -> int:
    """Start, kill a random moment after n clips are there -> clips that are kept."""
    process = start(folder, "killed")
    part = folder / "killed" / "part-0.jsonl"
    while process.poll() is None and (not part.exists() or part.read_bytes().count(b"\n") < n):
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    process.wait()
    return part.read_bytes().count(b"\n")


def rounded(value):
    if isinstance(value, float):
        return float(f"{value:.3g}")
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=data.HelpFormatter)
    parser.add_argument("--lines", type=int, nargs="+", default=[10_000, 1_000_000], help="sizes of manifests")
    parser.add_argument("--clips", type=int, default=2000, help="clips to transcribe")
    parser.add_argument("--kills", type=int, default=10, help="how often the transcription is killed")
    parser.add_argument("--measure", help="only this manifest, in this process")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.measure:
        print(json.dumps(measure_manifest(args.measure)))
        return
    result = {"manifests": [bench_manifest(n) for n in args.lines], "loader": bench_loader()}
    if args.clips:
        result["transcription"] = bench_transcription(args.clips, args.kills)
    print(json.dumps(rounded(result)))


if __name__ == "__main__":
    main()
