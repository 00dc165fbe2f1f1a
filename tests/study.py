"""The study behind .assets/results.md: the command of every row, its tables and its figure.

    python tests/study.py --out runs/study --seeds 0 1 2 3 4 --jobs 2   # runs what is not done yet
    python tests/study.py --out .assets --rows .assets/study.csv.gz     # tables and figure of rows

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
FROZEN = [f"frozen_{draw}" for draw in range(14)]  # as many draws per clip as 600 steps have epochs
SAME = """teacher base more more_1100 td_same td at_references frozen_states sampled eq_1 forward opd
    td_opd""".split()


def stages(seed) -> dict[str, str]:
    """{name: command without --out}, in order. Paths lie below the seed's folder."""
    train = "--data data/train.jsonl --dev data/dev.jsonl"
    english = "--data data/english.jsonl"  # no dev set: the last weights count
    sft = f"sft.py --resume --seed {seed} --device cpu --eval_every 250"
    more = f"{sft} --student base --lr 1e-3 --warmup 20"
    opd = ("distill.py --student base --teacher teacher --resume --device cpu --eval_every 100 "
           f"--seed {seed}")
    hear = "evaluate.py --resume --device cpu --model"
    eq_1 = "--divergence forward --support union --top_k 32 --temperature 0"
    draws = " ".join(f"{name}/td.jsonl" for name in FROZEN)
    found = {
        "data": f"data.py demo --seed {seed}",
        "teacher": f"{sft} --init random --data data/teacher.jsonl --dev data/dev.jsonl "
                   "--d_model 112 --encoder_layers 3 --steps 2200 --lr 2e-3",
        "base": f"{sft} --init random --tokenizer teacher {train}",
        "td_train": f"{hear} teacher --data data/train.jsonl --as_manifest td_train/td.jsonl",
        "td_pool": f"{hear} teacher --data data/pool.jsonl --as_manifest td_pool/td.jsonl"}
    for draw, name in enumerate(FROZEN):
        found[name] = (f"{hear} base --data data/train.jsonl --as_manifest {name}/td.jsonl "
                       f"--temperature 1 --seed {draw}")
    return found | {  # 600 more updates on the clips of base, unless the name says another number
        "more": f"{more} {train} --steps 600",
        "more_1100": f"{more} {train} --steps 1100",
        "td_same": f"{more} --data td_train/td.jsonl --dev data/dev.jsonl --steps 600",
        "td": f"{more} --data td_pool/td.jsonl --dev data/dev.jsonl --steps 200",
        "at_references": f"{opd} {train} --states reference",
        "frozen_states": f"{opd} --data {draws} --dev data/dev.jsonl --states reference",
        "sampled": f"{opd} {train} --support sampled",
        "eq_1": f"{opd} {train} {eq_1}",
        "forward": f"{opd} {train} --divergence forward",
        "opd": f"{opd} {train}",
        "td_opd": f"{opd} {train}".replace("--student base", "--student td"),
        "more_en_60": f"{more} {english} --steps 60",  # retention: English clips alone
        "more_en_200": f"{more} {english} --steps 200",
        "more_en": f"{more} {english} --steps 600",
        "td_en": f"{more} --data td_train/english.jsonl --steps 600",
        "opd_en_200": f"{opd} {english} --steps 200",
        "opd_en": f"{opd} {english}",
        "refs_en": f"{opd} {english} --states reference",
        "forward_en": f"{opd} {english} --divergence forward"}


def run_seed(root, seed) -> list[list]:
    """Every stage of a seed that is not done -> rows."""
    folder = root / f"seed{seed}"
    rows = []
    for name, command in stages(seed).items():
        execute(folder, name, command)
        for manifest in (folder / name / "train.jsonl", folder / name / "td.jsonl"):
            if manifest.exists():  # the retention rows' part of it
                lines = manifest.read_text(encoding="utf-8").splitlines(keepends=True)
                english = [line for line in lines if json.loads(line)["language"] == "en"]
                manifest.with_name("english.jsonl").write_text("".join(english), encoding="utf-8")
        if not command.startswith(("sft.py", "distill.py")):
            continue
        execute(folder, f"{name}/test", f"evaluate.py --model {name} --data data/test.jsonl --device cpu")
        for line in (folder / name / "test" / "hyps.jsonl").open(encoding="utf-8"):
            r = json.loads(line)
            errors = r["substitutions"] + r["deletions"] + r["insertions"]
            rows.append([seed, name, r["id"], r["language"], errors, r["units"]])
        print(f"seed {seed}: {name} is done", flush=True)
    return rows


def execute(folder, name, command) -> None:
    """Runs a command of this repository in the seed's folder, once; what it prints goes to a log."""
    log = folder / "logs" / f"{name.replace('/', '_')}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists() and log.read_text(encoding="utf-8").endswith("DONE\n"):
        return
    script, *words = shlex.split(f"{command} --out {name}")
    with log.open("w", encoding="utf-8") as file:
        subprocess.run([sys.executable, str(ROOT / script), *words], cwd=folder, stdout=file,
                       stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
        file.write("DONE\n")


def read_rows(path, language) -> dict:
    """{system: {seed: (clips, 2) errors and units}}, clips in one order. language: "" for both."""
    found = defaultdict(lambda: defaultdict(dict))
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for r in csv.DictReader(file):
            if language in ("", r["language"]):
                found[r["system"]][int(r["seed"])][r["clip"]] = int(r["errors"]), int(r["units"])
    return {name: {seed: np.array([clips[c] for c in sorted(clips)]) for seed, clips in seeds.items()}
            for name, seeds in found.items()}


def rate(counts) -> float:
    """Errors in percent of units: (..., 2) -> %."""
    return 100 * counts[..., 0].sum() / counts[..., 1].sum()


def difference(a, b, n=2000) -> tuple[float, float, float]:
    """Rate of a minus that of b, points, paired; 95 % interval over seeds and, within each, clips."""
    pairs = []
    for seed in sorted(a.keys() & b.keys()):
        pairs.append(np.stack([a[seed][:, 0] - b[seed][:, 0], a[seed][:, 1]], axis=1))
    pairs = np.stack(pairs)                                     # (seeds, clips, 2)
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(n):
        seeds = rng.integers(len(pairs), size=(len(pairs), 1))
        clips = rng.integers(pairs.shape[1], size=pairs.shape[:2])
        draws.append(rate(pairs[seeds, clips]))
    low, high = np.percentile(draws, [2.5, 97.5])
    return rate(pairs), low, high


def print_table(path, names, reference, language) -> list:
    """A table in Markdown -> [(system, rates by seed, difference to the reference, low, high)]."""
    counts = {lang: read_rows(path, lang) for lang in ("", "en", "zh")}
    print("| system | pooled error by seed, % | mean | en | zh | "
          f"{language or 'pooled'} minus {reference}, points [95 %] |\n|---|---|---|---|---|---|")
    rows = []
    for name in [name for name in names if name in counts[""]]:
        rates = [rate(counts[""][name][seed]) for seed in sorted(counts[""][name])]
        means = [np.mean(rates)]
        means += [np.mean([rate(c) for c in counts[lang][name].values()]) for lang in ("en", "zh")]
        gap, low, high = difference(counts[language][name], counts[language][reference])
        print(f"| {name} | {' '.join(f'{r:.1f}' for r in rates)} | "
              f"{' | '.join(f'{m:.1f}' for m in means)} | {gap:+.1f} [{low:+.1f}, {high:+.1f}] |")
        rows.append((name, rates, gap, low, high))
    return rows


PAIRS = """td_opd-opd td_opd-td opd-td opd-more more-base at_references-base td_opd-teacher more_en_200-opd_en_200
    refs_en-opd_en forward_en-opd_en""".split()


def print_pairs(path) -> None:
    """Further differences that the text names, in Markdown."""
    print("| difference, points [95 %] | pooled | en | zh |\n|---|---|---|---|")
    counts = [read_rows(path, language) for language in ("", "en", "zh")]
    for pair in PAIRS:
        a, b = pair.split("-")
        cells = []
        for found in counts:
            gap, low, high = difference(found[a], found[b])
            cells.append(f"{gap:+.1f} [{low:+.1f}, {high:+.1f}]")
        print(f"| {a} minus {b} | {' | '.join(cells)} |")


def draw(rows, path) -> None:
    """A dot per seed and the mean; beside them the differences with their intervals."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4.2), sharey=True, layout="constrained")
    for y, (name, rates, gap, low, high) in enumerate(rows):
        left.plot(rates, [y] * len(rates), "o", color="tab:blue", alpha=0.5)
        left.plot(np.mean(rates), y, "|", color="black", markersize=14)
        right.plot([low, high], [y, y], color="tab:gray")
        right.plot(gap, y, "o", color="black")
    left.set(xlabel="pooled test error, % (line: mean)", xlim=(0, None))
    left.set_yticks(range(len(rows)), [row[0] for row in rows])
    left.invert_yaxis()
    right.set(xlabel="minus opd, points [95 %]")
    right.axvline(0, color="tab:gray", linewidth=0.8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", default="runs/study", help="folder of all runs, or of the figure")
    parser.add_argument("--rows", help="make tables and figure of these; nothing is run")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time")
    args = parser.parse_args()
    out = Path(args.out).absolute()
    path = args.rows or out / "rows.csv.gz"
    if not args.rows:
        with ThreadPoolExecutor(args.jobs) as jobs:
            rows = sum(jobs.map(lambda seed: run_seed(out, seed), args.seeds), [])
        with gzip.open(path, "wt", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["seed", "system", "clip", "language", "errors", "units"], *rows])
    out.mkdir(parents=True, exist_ok=True)
    draw(print_table(path, SAME, "opd", ""), out / "study.png")
    print_table(path, ["base", *(name for name in stages(0) if "_en" in name)], "opd_en_200", "zh")
    print_pairs(path)
