"""The study behind .assets/results.md: the command of every row, and its tables and figure.

    python tests/study.py --out runs/study --seeds 0 1 2 3 4 --jobs 2   # run what is not done yet
    python tests/study.py --out .assets --rows .assets/study.csv.gz     # tables, figure of these rows

The first ends in OUT/rows.csv.gz, which the second reads too: a line per seed, system and test clip
with its errors and units. Runs have one process of one thread; an interrupted one resumes.
"""

import argparse
import csv
import gzip
import json
import os
import shlex
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parent.parent
ROWS = "teacher base more more_1100 td td_short at_references frozen_states sampled eq_1 forward opd td_opd"
DRAWS = 14  # transcripts per clip that the frozen student samples: as many as 600 steps have epochs
FROZEN = [f"frozen_{draw}" for draw in range(DRAWS)]


def stages(seed) -> dict[str, str]:
    """{name: command without --out}, in order. Paths lie below the seed's folder."""
    train = "--data data/train.jsonl --dev data/dev.jsonl"
    english = "--data data/english.jsonl"  # no dev set: the last weights count
    sft = f"sft.py --resume --seed {seed} --device cpu"
    opd = f"distill.py --teacher teacher --resume --seed {seed} --device cpu"
    more = "--student base --lr 1e-3 --warmup 20 --steps"
    hear = "evaluate.py --resume --device cpu"
    draws = " ".join(f"{name}/td.jsonl" for name in FROZEN)
    eq_1 = "--divergence forward --support union --top_k 32 --temperature 0"
    frozen = {name: f"{hear} --model base --data data/train.jsonl --as_manifest {name}/td.jsonl "
                    f"--temperature 1 --seed {draw}" for draw, name in enumerate(FROZEN)}
    return {
        "data": f"data.py demo --seed {seed}",
        "teacher": f"{sft} --init random --data data/teacher.jsonl --dev data/dev.jsonl "
                   "--d_model 112 --encoder_layers 3 --steps 2200 --lr 2e-3",
        "base": f"{sft} --init random --tokenizer teacher {train}",
        "td_train": f"{hear} --model teacher --data data/train.jsonl --as_manifest td_train/td.jsonl",
        "td_pool": f"{hear} --model teacher --data data/pool.jsonl --as_manifest td_pool/td.jsonl",
        **frozen,
        # 600 more updates on the clips of base, unless the name says another number
        "more": f"{sft} {train} {more} 600",
        "more_1100": f"{sft} {train} {more} 1100",
        "td": f"{sft} --data td_train/td.jsonl --dev data/dev.jsonl {more} 600",
        "td_short": f"{sft} --data td_pool/td.jsonl --dev data/dev.jsonl {more} 200",
        "at_references": f"{opd} {train} --student base --states reference",
        "frozen_states": f"{opd} --data {draws} --dev data/dev.jsonl --student base --states reference",
        "sampled": f"{opd} {train} --student base --support sampled",
        "eq_1": f"{opd} {train} --student base {eq_1}",
        "forward": f"{opd} {train} --student base --divergence forward",
        "opd": f"{opd} {train} --student base",
        "td_opd": f"{opd} {train} --student td_short",
        # retention: the 350 English clips of train alone
        "more_en_60": f"{sft} {english} {more} 60",
        "more_en_200": f"{sft} {english} {more} 200",
        "more_en": f"{sft} {english} {more} 600",
        "td_en": f"{sft} --data td_train/english.jsonl {more} 600",
        "opd_en_200": f"{opd} {english} --student base --steps 200",
        "opd_en": f"{opd} {english} --student base",
        "refs_en": f"{opd} {english} --student base --states reference",
        "forward_en": f"{opd} {english} --student base --divergence forward",
    }


def run_seed(root, seed) -> list[list]:
    """Every stage of a seed that is not done -> rows."""
    folder = root / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, command in stages(seed).items():
        execute(folder, name, f"{command} --out {name}")
        for manifest in (folder / name).glob("t*.jsonl"):  # train.jsonl, td.jsonl
            lines = manifest.read_text(encoding="utf-8").splitlines(keepends=True)
            english = [line for line in lines if json.loads(line)["language"] == "en"]
            if manifest.stem in ("train", "td"):
                manifest.with_name("english.jsonl").write_text("".join(english), encoding="utf-8")
        if command.startswith(("sft.py", "distill.py")):
            test = f"evaluate.py --model {name} --data data/test.jsonl --device cpu --resume"
            execute(folder, f"{name}/test", f"{test} --out {name}/test")
            for line in (folder / name / "test" / "hyps.jsonl").open(encoding="utf-8"):
                r = json.loads(line)
                errors = r["substitutions"] + r["deletions"] + r["insertions"]
                rows.append([seed, name, r["id"], r["language"], errors, r["units"]])
        print(f"seed {seed}: {name} is done", flush=True)
    return rows


def execute(folder, name, command) -> None:
    """Runs a command of this repository in the seed's folder, once; what it prints goes to a log."""
    log = folder / "logs" / f"{name.replace('/', '_')}.txt"
    log.parent.mkdir(exist_ok=True)
    if log.exists() and log.read_text().endswith("DONE\n"):
        return
    script, *words = shlex.split(command)
    with log.open("w") as file:
        subprocess.run([sys.executable, str(ROOT / script), *words], cwd=folder, stdout=file,
                       env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=file, check=True)
        file.write("DONE\n")


def read_rows(path, language=None) -> dict:
    """{system: {seed: (clips, 2) errors and units}}, clips in one order; of one language or both."""
    found = defaultdict(lambda: defaultdict(dict))
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for r in csv.DictReader(file):
            if language in (None, r["language"]):
                found[r["system"]][int(r["seed"])][r["clip"]] = int(r["errors"]), int(r["units"])
    return {system: {seed: np.array([clips[c] for c in sorted(clips)]) for seed, clips in seeds.items()}
            for system, seeds in found.items()}


def rate(counts) -> float:
    """Errors in percent of units: (clips, 2) -> %."""
    return 100 * counts[:, 0].sum() / counts[:, 1].sum()


def difference(a, b, n=2000) -> tuple[float, float, float]:
    """Rate of a minus that of b, points, paired; 95 % interval over seeds and, within each, clips."""
    seeds = sorted(a.keys() & b.keys())
    pairs = np.stack([np.stack([a[s][:, 0] - b[s][:, 0], a[s][:, 1]], 1) for s in seeds])  # (S, n, 2)
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(n):
        s = rng.integers(len(pairs), size=(len(pairs), 1))
        clips = rng.integers(pairs.shape[1], size=(len(pairs), pairs.shape[1]))
        draws.append(rate(pairs[s, clips].reshape(-1, 2)))
    low, high = np.percentile(draws, [2.5, 97.5])
    return rate(pairs.reshape(-1, 2)), low, high


def tables(path, out) -> None:
    """Prints both tables as Markdown; writes OUT/study.png: a dot per seed, the mean, differences."""
    pooled, english, mandarin = read_rows(path), read_rows(path, "en"), read_rows(path, "zh")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4.4), sharey=True, layout="constrained")
    print("| system | error by seed, % | mean | minus OPD, points [95 %] |\n|---|---|---|---|")
    names = [name for name in ROWS.split() if name in pooled]
    for y, name in enumerate(names):
        rates = [rate(pooled[name][seed]) for seed in sorted(pooled[name])]
        mean, low, high = difference(pooled[name], pooled["opd"])
        said = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]" if name != "opd" else ""
        shown = " ".join(f"{r:.1f}" for r in rates)
        print(f"| {name} | {shown} | {np.mean(rates):.1f} | {said} |")
        left.plot(rates, [y] * len(rates), "o", color="tab:blue", alpha=0.5)
        left.plot(np.mean(rates), y, "|", color="black", markersize=14)
        right.plot([low, high], [y, y], color="tab:gray")
        right.plot(mean, y, "o", color="black")
    left.set(xlabel="pooled test error, % (line: mean)", xlim=(0, None), yticks=range(len(names)),
             yticklabels=names)
    right.set(xlabel="minus OPD, points [95 %]")
    right.axvline(0, color="tab:gray", linewidth=0.8)
    left.invert_yaxis()
    figure.savefig(Path(out) / "study.png", dpi=110)
    print("\n| system | WER en | CER zh | CER zh minus opd_en_200's [95 %] |\n|---|---|---|---|")
    for name in ["base", *(name for name in stages(0) if "_en" in name and name in pooled)]:
        en, zh = (np.mean([rate(counts) for counts in part[name].values()]) for part in (english, mandarin))
        mean, low, high = difference(mandarin[name], mandarin["opd_en_200"])
        print(f"| {name} | {en:.1f} | {zh:.1f} | {mean:+.1f} [{low:+.1f}, {high:+.1f}] |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/study", help="folder of all runs, or of the figure")
    parser.add_argument("--rows", help="rows to make tables and figure of: nothing is run")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time")
    args = parser.parse_args()
    path = args.rows
    if not path:
        root = Path(args.out).absolute()
        with ThreadPoolExecutor(args.jobs) as jobs:
            rows = sum(jobs.map(lambda seed: run_seed(root, seed), args.seeds), [])
        path = root / "rows.csv.gz"
        with gzip.open(path, "wt", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["seed", "system", "clip", "language", "errors", "units"], *rows])
    tables(path, args.out)
