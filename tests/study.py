"""When does on-policy distillation pay? Every run behind .assets/results.md, as commands.

    python tests/study.py --out runs/study --parts same other --seeds 0 1 2 3 4 --jobs 2      # run what is not done yet
    python tests/study.py --out runs/study --table                                           # what there is so far

Runs have one process of one thread; --jobs of them run at a time. A stage that is done is not run again, an interrupted one resumes.
Parts: same (the labelled audio once more), other (other audio), teachers (of several strengths), bases (of several sizes).
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
EQ_1 = "--divergence forward --support union --top_k 32 --temperature 0"
TEACHER_STEPS = {"teacher": 2200, "teacher400": 400, "teacher700": 700, "teacher1000": 1000}
BASE_CLIPS = {"base": 700, "base400": 400, "base1000": 1000, "base1500": 1500, "base2500": 2500}


def sft(seed, init, manifest, flags="--steps 600 --lr 1e-3 --warmup 20"):
    return f"sft.py {init} --data {manifest} --dev data/dev.jsonl --resume --seed {seed} --device cpu {flags}"


def opd(seed, manifest, flags="", base="base", teacher="teacher"):
    return (f"distill.py --student {base} --teacher {teacher} --data {manifest} --dev data/dev.jsonl --resume --seed {seed} "
            f"--device cpu {flags}")


def transcripts(teacher, manifest):
    return f"evaluate.py --model {teacher} --data {manifest} --resume --as_manifest OUT/td.jsonl --device cpu"


def stages(seed, part):
    """name -> command without its --out, in an order in which each finds what it needs. Paths lie below the seed's folder."""
    train = "data/train.jsonl"
    pool = "data/pool.jsonl"
    found = {
        "data": f"data.py demo --seed {seed} --pool 3500",
        "teacher": sft(seed, "--init random", "data/teacher.jsonl", "--d_model 112 --encoder_layers 3 --steps 2200 --lr 2e-3"),
        "base": sft(seed, "--init random --tokenizer teacher", train, ""),
        "td_train": transcripts("teacher", train),
        "td_pool": transcripts("teacher", pool),
    }
    if part == "same":
        found |= {
            "opd": opd(seed, train),
            "more": sft(seed, "--student base", train),
            "td": sft(seed, "--student base", "td_train/td.jsonl"),
            "at_references": opd(seed, train, "--states reference"),
            "td_short": sft(seed, "--student base", "td_pool/td500.jsonl", "--steps 200 --lr 1e-3 --warmup 20"),
            "td_opd": opd(seed, train, base="td_short"),
            "first_error": opd(seed, train, "--states first_error"),
            "forward": opd(seed, train, "--divergence forward"),
            "eq_1": opd(seed, train, EQ_1),
            "at_transcripts": opd(seed, "td_train/td.jsonl", "--states reference"),
            "sampled": opd(seed, train, "--support sampled"),
        }
    if part == "other":
        found |= {
            "pool_td": sft(seed, "--student base", "td_pool/td.jsonl"),
            "pool_opd": opd(seed, pool),
            "pool_labels": sft(seed, "--student base", pool),
            "pool_at_references": opd(seed, pool, "--states reference"),
            "pool_forward": opd(seed, pool, "--divergence forward"),
            "pool_td_1200": sft(seed, "--student base", "td_pool/td.jsonl", "--steps 1200 --lr 1e-3 --warmup 20"),
            "pool_opd_1200": opd(seed, pool, "--steps 1200"),
        }
    if part == "teachers":
        for name, steps in TEACHER_STEPS.items():
            if name != "teacher":
                flags = f"--d_model 112 --encoder_layers 3 --steps {steps} --lr 2e-3 --tokenizer teacher"
                found[name] = sft(seed, "--init random", "data/teacher.jsonl", flags)
                found[f"td_train_{name}"] = transcripts(name, train)
                found[f"td_pool_{name}"] = transcripts(name, pool)
                found[f"td_{name}"] = sft(seed, "--student base", f"td_train_{name}/td.jsonl")
                found[f"opd_{name}"] = opd(seed, train, teacher=name)
                found[f"pool_td_{name}"] = sft(seed, "--student base", f"td_pool_{name}/td.jsonl")
                found[f"pool_opd_{name}"] = opd(seed, pool, teacher=name)
    if part == "bases":
        for name, clips in BASE_CLIPS.items():
            if name != "base":
                labelled = f"data/first{clips}.jsonl"
                found[name] = sft(seed, "--init random --tokenizer teacher", labelled, "")
                found[f"td_train_{name}"] = transcripts("teacher", labelled)
                found[f"more_{name}"] = sft(seed, f"--student {name}", labelled)
                found[f"td_{name}"] = sft(seed, f"--student {name}", f"td_train_{name}/td.jsonl")
                found[f"opd_{name}"] = opd(seed, labelled, base=name)
    return found


def run(folder, name, command) -> None:
    """Run one stage in the seed's folder unless it is done; a trained model is then scored on test."""
    out = folder / name
    if (out / "done").exists():
        return
    with_out = f"{command.replace('OUT', name)} --out {name}"
    execute(folder, out, with_out)
    if name == "data":
        write_subsets(folder)
    if name == "td_pool":
        lines = (out / "td.jsonl").open(encoding="utf-8").readlines()
        (out / "td500.jsonl").write_text("".join(lines[:500]), encoding="utf-8")
    if command.startswith(("sft.py", "distill.py")):
        execute(folder, out, f"evaluate.py --model {name} --data data/test.jsonl --resume --out {name}/test --device cpu")
    (out / "done").write_text(with_out + "\n")


def execute(folder, out, command) -> None:
    """A command of this repository, in `folder`, on one thread; what it prints goes to OUT/log.txt."""
    script, *words = shlex.split(command)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "log.txt").open("a") as log:
        subprocess.run([sys.executable, str(ROOT / script), *words], cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"},
                       stdout=log, stderr=log, check=True)


def write_subsets(folder) -> None:
    """The first n labelled clips: train's, and beyond 700 the pool's (which has more voices)."""
    lines = []
    for name in ("train", "pool"):
        lines += (folder / "data" / f"{name}.jsonl").open(encoding="utf-8").readlines()
    for clips in BASE_CLIPS.values():
        (folder / "data" / f"first{clips}.jsonl").write_text("".join(lines[:clips]), encoding="utf-8")


def run_seed(root, seed, part) -> None:
    """Every stage of a part for one seed, one after the other."""
    folder = root / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, command in stages(seed, part).items():
        run(folder, name, command)
        print(f"seed {seed} {name} {rate(folder / name)}", flush=True)


def errors_and_units(out) -> tuple[np.ndarray, np.ndarray] | None:
    """Per test clip: errors, reference units; None if the stage has not been scored."""
    path = out / "test" / "hyps.jsonl"
    if not path.exists():
        return None
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    errors = [row["substitutions"] + row["deletions"] + row["insertions"] for row in rows]
    return np.array(errors), np.array([row["units"] for row in rows])


def rate(out) -> str:
    """Pooled test error, percent."""
    counted = errors_and_units(out)
    return "" if counted is None else f"{100 * counted[0].sum() / counted[1].sum():.2f}"


def table(root) -> None:
    """Pooled test errors (%) of every stage, a column a seed; last, the paired difference to OPD on the same audio."""
    seeds = sorted(root.glob("seed*"), key=lambda folder: int(folder.name[4:]))
    names = []
    for folder in seeds:
        names += [out.parent.name for out in folder.glob("*/test") if out.parent.name not in names]
    print("| row | " + " | ".join(folder.name for folder in seeds) + " | mean | minus its OPD, points [95 %] |")
    print("|---" * (len(seeds) + 3) + "|")
    for name in sorted(names):
        rates = [rate(folder / name) for folder in seeds]
        known = [float(r) for r in rates if r]
        reference = "pool_opd_1200" if name.endswith("_1200") else "pool_opd" if name.startswith("pool") else "opd"
        print(f"| {name} | " + " | ".join(rates) + f" | {np.mean(known):.2f} | {difference(seeds, name, reference)} |")


def difference(seeds, a, b, n=4000) -> str:
    """Errors of `a` minus errors of `b`, points; 95 % interval over seeds and, within each, clips (both drawn with replacement)."""
    pairs = []
    for folder in seeds:
        counted = errors_and_units(folder / a), errors_and_units(folder / b)
        if all(c is not None for c in counted):
            pairs.append((counted[0][0] - counted[1][0], counted[0][1]))
    if not pairs or a == b:
        return ""
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(n):
        more = 0
        units = 0
        for s in rng.integers(len(pairs), size=len(pairs)):
            clips = rng.integers(len(pairs[s][0]), size=len(pairs[s][0]))
            more += pairs[s][0][clips].sum()
            units += pairs[s][1][clips].sum()
        draws.append(100 * more / units)
    low, high = np.percentile(draws, [2.5, 97.5])
    mean = 100 * sum(p[0].sum() for p in pairs) / sum(p[1].sum() for p in pairs)
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}] over {len(pairs)}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/study", help="folder of all runs")
    parser.add_argument("--parts", nargs="+", default=["same"], choices=["same", "other", "teachers", "bases"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="print the table of what there is, run nothing")
    args = parser.parse_args()
    root = Path(args.out).absolute()
    if not args.table:
        with ThreadPoolExecutor(args.jobs) as pool:
            for part in args.parts:
                for job in [pool.submit(run_seed, root, seed, part) for seed in args.seeds]:
                    job.result()
    table(root)
