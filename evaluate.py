"""Manifest in, transcripts and corpus error rates out.

  rate = (substitutions + deletions + insertions) / reference units, summed over the corpus; units are characters (CER) or words
  (WER) by each line's language, of the text that data.normalize makes of both sides. The 95 % interval resamples utterances.

    python evaluate.py --model runs/x/opd --data test.jsonl --out runs/x/eval
    torchrun --nproc_per_node 8 evaluate.py --model runs/x/opd --data aishell1.jsonl wenet_net.jsonl --out runs/x/eval
    python evaluate.py --model TEACHER --data pool.jsonl --out runs/x/td --as_manifest td.jsonl      # the teacher-data (TD) stage

Decoding is greedy. --out receives hyps.jsonl (a manifest with "hyp" and the counts added, in manifest order) and summary.json.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import model


def check(sets) -> None:
    """Raise ValueError, before any work, for what could not be scored or written afterwards: {path: utterances}."""
    everything = [u for utterances in sets.values() for u in utterances]
    for u in everything:
        if u.text is not None and not u.language:
            raise ValueError(f"{u.line}: {u.id}: no 'language', which decides between words and characters")
    twice = [i for i, n in Counter(u.id for u in everything).items() if n > 1]
    if twice:
        raise ValueError(f"hyps.jsonl is one manifest: {len(twice)} ids stand in more than one set, such as {twice[0]!r}")


def score(utterances, results) -> list[dict]:
    """One row a clip: the manifest's fields, "hyp", and edit counts where there is a reference. Missing ids raise."""
    rows = []
    for u in utterances:
        row = {"id": u.id, "audio": u.audio, "text": u.text, "language": u.language, "duration": u.duration_sec, "start": u.start_sec,
               "speaker": u.speaker, **results[u.id]}
        if u.text is not None:
            row |= data.edit_counts(u.text, row["hyp"], u.language)._asdict()
        rows.append({k: v for k, v in row.items() if v is not None and not (k == "start" and v == 0)})
    return rows


def summarize(name, rows, audio_sec, seconds) -> list[dict]:
    """Corpus rates of one manifest, one entry a language. audio_sec and seconds are the whole manifest's."""
    groups, entries = defaultdict(list), []
    for row in rows:
        if "units" in row:
            groups[row["language"]].append(row)
    for language, group in sorted(groups.items()):
        counts = [data.Counts(*(row[field] for field in data.Counts._fields)) for row in group]
        low, high = data.bootstrap([c.errors for c in counts], [c.units for c in counts])
        entries.append({
            "set": name, "language": language, "metric": "CER" if data.counts_characters(language) else "WER",
            "rate": data.error_rate(counts), "low": 100 * low, "high": 100 * high,
            **{field: sum(getattr(c, field) for c in counts) for field in data.Counts._fields}, "utterances": len(group),
            "sentence_error": 100 * sum(c.errors > 0 for c in counts) / len(group), "empty": sum(not row["hyp"] for row in group),
            "truncated": sum(not row["stopped"] for row in group), "set_audio_sec": audio_sec, "set_seconds": seconds})
    return entries


def teacher_manifest(rows, path) -> None:
    """Transcripts as references: what SFT needs for the TD stage. Empty and truncated ones are left out and counted."""
    empty, cut = [r for r in rows if not r["hyp"]], [r for r in rows if r["hyp"] and not r["stopped"]]
    kept = [{"id": r["id"], "audio": os.path.relpath(r["audio"], Path(path).absolute().parent), "text": r["hyp"]}
            | {k: r[k] for k in ("language", "duration", "start", "speaker") if k in r} for r in rows if r["hyp"] and r["stopped"]]
    data.write_jsonl(path, kept)
    print(f"{path}: {len(kept)} transcripts kept; left out: {len(empty)} empty, {len(cut)} cut at --max_new_tokens")


def main(args) -> None:
    """Transcribe every set, score, print, write."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    kind = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    if world > 1:
        dist.init_process_group("gloo")  # finished transcripts travel as Python objects; no tensor does
    sets = {path: data.read_manifest(path) for path in args.data}
    check(sets)
    asr = model.load(args.model, device)
    all_rows, entries = [], []
    for path, utterances in sets.items():
        began, bar = time.time(), tqdm(total=len(utterances), desc=Path(path).stem, unit="clip", disable=rank > 0,
                                       mininterval=0.5 if sys.stderr.isatty() else 20)
        advance = lambda n: bar.update(min(n * world, bar.total - bar.n))
        parts = [model.transcribe(asr, utterances, rank, world, args.batch, args.max_new_tokens, advance)]
        if world > 1:
            own, parts = parts[0], [None] * world
            dist.all_gather_object(parts, own)
        bar.close()
        rows = score(utterances, {i: result for part in parts for i, result in part.items()})
        if rank == 0:
            entries += summarize(Path(path).stem, rows, sum(data.measure(utterances)), time.time() - began)
            all_rows += rows
    if rank == 0:
        out = Path(args.out)
        data.write_jsonl(out / "hyps.jsonl", [row | {"audio": os.path.relpath(row["audio"], out.absolute())} for row in all_rows])
        (out / "summary.json").write_text(json.dumps({
            "model": str(args.model), "data": args.data, "results": entries, "max_new_tokens": args.max_new_tokens,
            "normaliser": "data.normalize", "torch": torch.__version__}, indent=2))
        for e in entries:
            print(f"{e['set']:12} {e['language']:3} {e['utterances']:6} clips {e['units']:7} units  {e['metric']} {e['rate']:6.2f} % "
                  f"[{e['low']:.2f}, {e['high']:.2f}]  {e['substitutions']} sub {e['deletions']} del {e['insertions']} ins  "
                  f"sentences wrong {e['sentence_error']:.1f} %  empty {e['empty']}  cut {e['truncated']}  "
                  f"set at {e['set_audio_sec'] / e['set_seconds']:.0f} x real time")
        if args.as_manifest:
            teacher_manifest(all_rows, args.as_manifest)
    if world > 1:
        dist.barrier()  # without it, gloo on a CPU may abort in the line below
        dist.destroy_process_group()


def parse_args(argv=None):
    """Flags -> namespace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = lambda flag, default, text, **kw: parser.add_argument(flag, default=default, help=f"{text} (default: {default})",
                                                                **(kw if "action" in kw else {"type": type(default)} | kw))
    add("--model", None, "checkpoint directory, student or teacher", type=str, required=True)
    add("--data", None, "manifests to transcribe", type=str, nargs="+", required=True)
    add("--out", None, "folder for hyps.jsonl and summary.json", type=str, required=True)
    add("--as_manifest", None, "also write the transcripts as a manifest to train on", type=str)
    add("--batch", 32, "utterances a forward")
    add("--max_new_tokens", 128, "longest transcript, tokens")
    add("--device", "auto", "auto, cpu or cuda")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
