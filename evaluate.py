"""Manifest in, transcripts and corpus error rates out.

  rate = (substitutions + deletions + insertions) / reference units, summed over the corpus

Each line's language decides what a unit is in the text that data.normalize makes of both sides:
a character (CER: zh, yue, ja, ko, th), a word (WER), or either a CJK character or a run of anything
else (MER: zh-en, en-zh, ...). An empty reference counts its insertions. The 95 % interval resamples
speakers where every line names one, else utterances.

  python evaluate.py --model runs/x/opd --data test.jsonl --out runs/x/eval
  torchrun --nproc_per_node 8 evaluate.py --model runs/x/opd --data a.jsonl b.jsonl --out runs/x/e
  python evaluate.py --model TEACHER --data pool.jsonl --out runs/x/td --as_manifest td.jsonl  # TD
  python evaluate.py --model runs/x/opd --audio a.wav b.flac               # only transcripts
  python evaluate.py --compare runs/base/hyps.jsonl runs/opd/hyps.jsonl ...  # with the first one
  python evaluate.py --rescore runs/x/eval/hyps.jsonl --out runs/x/again   # same numbers; no model

TD is teacher data: transcripts that become references for sft.py. Decoding is greedy. A transcript
is scored as it is: empty, truncated and looping ones are counted and shown, never mended. --out
receives hyps.jsonl, summary.json and errors.html (the worst clips to read and hear, confusions,
error rate by length; one page that loads nothing).

hyps.jsonl: a manifest in the order of --data, with these keys added to each line
  set                  its manifest: the file's name without .jsonl
  hyp                  the transcript
  stopped, n_tokens    false if it was cut at --max_new_tokens; its length, end token included
  looping              true if its end repeats itself, see is_looping
  substitutions, deletions, insertions, units    where the line has a text
  failed               only where the clip could not be decoded (--keep_going): the reason
A silent or clipped clip is transcribed like any other, and named on stderr.

summary.json
  results              one entry a set and language:
    set, language, metric          metric is WER, CER or MER
    rate, low, high                percent, with its 95 % interval: null of a single block, and where
                                   a tenth of the resampled corpora has no reference unit
    resampled, blocks              what the interval resamples, speakers or utterances; how many
    substitutions, deletions, insertions, units, utterances
    sentence_error                 percent of the utterances that have an error
    no_speech, insertions_per_minute    utterances whose reference is empty; units written on them per
                                   minute of their audio (null without any, or if it isn't to be had)
    empty, truncated, looping, failed              how many utterances
    set_audio_sec, set_seconds     audio decoded and time taken for the whole set, model load
                                   excluded; real-time factor (RTF) = set_seconds / set_audio_sec
  macro_average        mean of the entries' rates: every set and language weighs the same
  pooled               rate, low, high, resampled, blocks, errors, units: all sets and languages
                       as one corpus, words and characters alike
  clips, empty, truncated, looping, failed         over all sets, lines without a text included
  normaliser, versions, commit, command            what made the numbers
  model, weights, data, decoding, device, processes    weights and data: SHA-256 of each file
  rescored             in place of the line above: what --rescore read, with its SHA-256

compare.json (--compare with --out, beside compare.png): one entry a set, language and system; of
several sets or languages also all pooled (set all, language and metric pooled)
  system, set, language, metric, rate, low, high, resampled, blocks, utterances, units
  difference, difference_low, difference_high    what it lies below the first system, points
  p_improvement        share of resampled corpora in which it has fewer errors, ties counting half
"""

import argparse
import base64
import hashlib
import io
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections import Counter, defaultdict
from html import escape
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from string import Template

import numpy as np
import soundfile
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

import data
import model
from data import at_least_one, not_negative

FEW_SPEAKERS = 20  # below it, an interval over speakers is too narrow more often than it says
WORST = 30         # clips with a player in errors.html


# ---------------------------------------------------------------------------- transcripts

def read_sets(paths) -> dict[str, list[data.Utterance]]:
    """Manifests -> {set: utterances}. Raises ValueError, before any work, for what could not be
    scored or written afterwards."""
    stems = [Path(path).stem for path in paths]
    sets = {}
    for path, stem in zip(paths, stems):
        name = stem if stems.count(stem) == 1 else path
        sets[name] = data.read_manifest(path)
    seen = set()
    for utterances in sets.values():
        for u in utterances:
            if u.text is not None:
                check_language(u.language, f"{u.line}: {u.id}")
            if u.id in seen:
                raise ValueError(f"{u.line}: id {u.id!r} stands in another set too, "
                                 "and hyps.jsonl is one manifest")
            seen.add(u.id)
    return sets


def check_language(language, where) -> None:
    """Raise ValueError, naming the line, unless a transcript in this language can be scored."""
    try:
        data.metric(language)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def gather(results, world) -> dict:
    """Every rank's {id: result} in one."""
    parts = [results] * world
    if world > 1:
        dist.all_gather_object(parts, results)
    merged = {}
    for part in parts:
        merged |= part
    return merged


def find_undecodable(utterances, keep_going) -> dict[str, dict]:
    """{id: result} of the clips that can't be decoded: no transcript, the reason in "failed". Without
    keep_going the first one's data.AudioError is raised."""
    results = {}
    for u in utterances:
        try:
            data.check_decodable([u])
        except data.AudioError as error:
            if not keep_going:
                raise
            print(f"counted as all deleted: {error}", file=sys.stderr)
            results[u.id] = {"hyp": "", "stopped": True, "n_tokens": 0, "failed": error.reason}
    return results


def transcribe_set(asr, name, utterances, args, rank, world) -> dict[str, dict]:
    """{id: {"hyp", "stopped", "n_tokens"}} of all ranks."""
    bar = model.progress(len(utterances), name, "clip", rank)

    def advance(n):  # the other ranks do about as much
        bar.update(min(n * world, bar.total - bar.n))

    results = model.transcribe(asr, utterances, rank, world, args.batch, args.max_new_tokens, advance)
    bar.close()
    return gather(results, world)


def is_looping(hyp) -> bool:
    """True if the end repeats itself: its last max(4 n, 8) units or more have period n, for some n.

    Units are those of MER whatever the language, so "no no no no no no no no" loops and
    "哈哈哈哈哈哈哈哈" does, and seven of each don't.
    """
    units = data.runs(data.words(hyp.lower()))
    for n in range(1, len(units) // 4 + 1):
        length = n
        while length < len(units) and units[-1 - length] == units[-1 - length + n]:
            length += 1
        if length >= max(4 * n, 8):
            return True
    return False


def print_transcripts(args, device) -> None:
    """What is said in each file of --audio. Exits with one line if a file can't be decoded."""
    utterances = []
    for name in dict.fromkeys(args.audio):
        path = os.path.abspath(name)
        utterances.append(data.Utterance(name, path, language=args.language, line="--audio"))
    try:
        data.check_decodable(utterances)
    except data.AudioError as error:
        raise SystemExit(str(error)) from None
    asr = model.load(args.model, device)
    results = model.transcribe(asr, utterances, 0, 1, args.batch, args.max_new_tokens)
    for u in utterances:
        text = results[u.id]["hyp"]
        if not results[u.id]["stopped"]:
            text += " [cut at --max_new_tokens]"
        if len(utterances) > 1:
            text = f"{u.id}: {text}"
        print(text)


# ---------------------------------------------------------------------------- scores

def without_none(row) -> dict:
    return {key: value for key, value in row.items() if value is not None}


def add_counts(row) -> dict:
    """The row with "looping" and, where it has a "text", the edit counts of its "hyp"."""
    row = row | {"looping": is_looping(row["hyp"])}
    if "text" in row:
        row |= data.edit_counts(row["text"], row["hyp"], row["language"])._asdict()
    return row


def score(utterances, results, name="test") -> list[dict]:
    """One row of hyps.jsonl a clip. Raises ValueError if a clip has no result."""
    rows = []
    for u in utterances:
        if u.id not in results:
            raise ValueError(f"{name}: no transcript of {u.id!r} ({u.line})")
        row = {"id": u.id, "set": name, "audio": u.audio, "text": u.text, "language": u.language,
               "duration": u.duration_sec, "start": u.start_sec or None, "speaker": u.speaker}
        rows.append(add_counts(without_none(row | results[u.id])))
    return rows


def read_hyps(path) -> list[dict]:
    """Rows of a hyps.jsonl, counted again. Raises ValueError naming the line.

    Any JSON Lines with "id" and "hyp" will do; "text" and "language" make a score.
    """
    path = Path(path)
    rows, seen = [], set()
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = {"set": path.stem, "stopped": True} | without_none(json.loads(line))
        except (ValueError, AttributeError):
            raise ValueError(f"{where}: expected a JSON object, found {data.describe(line)}") from None
        check_hyp(row, where)
        row["id"] = str(row["id"])
        if row["id"] in seen:
            raise ValueError(f"{where}: id {row['id']!r} stands twice")
        seen.add(row["id"])
        if "audio" in row:
            row["audio"] = os.path.normpath(path.parent.absolute() / row["audio"])
        rows.append(add_counts(row))
    if not rows:
        raise ValueError(f"{path}: no transcript in it")
    return rows


HYPS_KEYS = {"hyp": str, "stopped": bool, "text": str, "language": str, "audio": str, "set": str,
             "speaker": str, "start": data.NUMBER, "duration": data.NUMBER}


def check_hyp(row, where) -> None:
    """Raise ValueError, naming line and key, unless a row of hyps.jsonl can be scored and written."""
    for key in ("id", "hyp"):
        if key not in row:
            raise ValueError(f"{where}: no {key!r}")
    for key, types in HYPS_KEYS.items():
        if key in row and not isinstance(row[key], types):
            raise ValueError(f"{where}: {key!r} has the wrong type: {row[key]!r}")
    if "text" in row:
        check_language(row.get("language"), where)


def group_scored(rows, key) -> dict[str, list[dict]]:
    """{value of the key: its rows}, of the rows that have a reference."""
    groups = defaultdict(list)
    for row in rows:
        if "units" in row:
            groups[row[key]].append(row)
    return groups


def counts_of(row) -> data.Counts:
    return data.Counts(row["substitutions"], row["deletions"], row["insertions"], row["units"])


def errors_and_units(rows):
    """Errors (n,) and reference units (n,) of n rows, int64."""
    counts = np.array([counts_of(row) for row in rows])  # (n, 4)
    return counts[:, :3].sum(1), counts[:, 3]


def percent(errors, units) -> float:
    """Corpus rate: sum of errors / sum of units, never a mean of rates. NaN without a unit."""
    return 100.0 * float(errors.sum()) / float(units.sum()) if units.any() else math.nan


def blocks_of(rows) -> tuple[str, list]:
    """What an interval resamples, and a label a row: its speaker, if every row names one and there
    are two or more, else its number."""
    speakers = [row.get("speaker") for row in rows]
    if all(speakers) and len(set(speakers)) > 1:
        return "speakers", speakers
    return "utterances", list(range(len(rows)))


def corpus_rate(rows) -> dict:
    """Error rate in percent, its 95 % interval (nan: see data.interval), and what that rests on."""
    errors, units = errors_and_units(rows)
    resampled, labels = blocks_of(rows)
    low, high = data.bootstrap(errors, units, blocks=labels)
    return {"rate": percent(errors, units), "low": 100 * low, "high": 100 * high,
            "resampled": resampled, "blocks": len(set(labels))}


def summarize(name, rows, audio_sec=None, seconds=None) -> list[dict]:
    """Entries of summary.json for one set. audio_sec and seconds are the whole set's."""
    entries = []
    for language, group in sorted(group_scored(rows, "language").items()):
        entry = {"set": name, "language": language, "metric": data.metric(language)}
        entry |= corpus_rate(group)
        for field in data.Counts._fields:
            entry[field] = sum(row[field] for row in group)
        wrong = sum(counts_of(row).errors > 0 for row in group)
        entry["utterances"] = len(group)
        entry["sentence_error"] = 100 * wrong / len(group)
        entry |= insertions_on_silence(group)
        entry |= count_troubles(group)
        entry |= {"set_audio_sec": audio_sec, "set_seconds": seconds}
        entries.append(entry)
    return entries


def count_troubles(rows) -> dict:
    """How many transcripts look wrong even without a reference. A clip that could not be decoded is
    failed, not empty."""
    counts = {"empty": 0, "truncated": 0, "looping": 0, "failed": 0}
    for row in rows:
        counts["empty"] += not row["hyp"] and "failed" not in row
        counts["truncated"] += not row["stopped"]
        counts["looping"] += row["looping"]
        counts["failed"] += "failed" in row
    return counts


def summarize_all(rows, timing) -> dict:
    """summary.json but for its provenance. timing: {set: (seconds of audio, seconds it took)}."""
    entries, scored = [], []
    for name, group in group_scored(rows, "set").items():
        audio_sec, seconds = timing.get(name, (None, None))
        entries += summarize(name, group, audio_sec, seconds)
        scored += group
    summary = {"results": entries, "macro_average": None, "pooled": None, "clips": len(rows)}
    rates = [e["rate"] for e in entries if e["units"]]
    if rates:
        errors, units = errors_and_units(scored)
        totals = {"errors": int(errors.sum()), "units": int(units.sum())}
        summary["macro_average"] = sum(rates) / len(rates)
        summary["pooled"] = corpus_rate(scored) | totals
    return summary | count_troubles(rows)


def insertions_on_silence(rows) -> dict:
    """What is written where nothing is said: clips whose reference has no unit, and insertions per
    minute of them, nan if there is no such audio. Clips that failed to decode don't count."""
    silent = [row for row in rows if not row["units"] and "failed" not in row]
    minutes = sum(data.measure([to_utterance(row) for row in silent])) / 60
    insertions = sum(row["insertions"] for row in silent)
    return {"no_speech": len(silent),
            "insertions_per_minute": insertions / minutes if minutes else math.nan}


def interval(entry, low="low", high="high", form=".2f") -> str:
    """[low, high], or - where there is no interval."""
    if math.isnan(entry[low]):
        return "-"
    return f"[{entry[low]:{form}}, {entry[high]:{form}}]"


def few_speakers(entry) -> bool:
    return entry["resampled"] == "speakers" and entry["blocks"] < FEW_SPEAKERS


def print_table(summary) -> None:
    """One line a set and language, all pooled, what looks wrong, what the numbers rest on."""
    entries, pooled = summary["results"], summary["pooled"]
    width = 12
    resampled = []
    caveat = ""
    for e in entries:
        width = max(width, len(f"{e['set']} {e['language']}"))
        resampled.append(f"{e['blocks']} {e['resampled']}")
        if few_speakers(e):
            caveat = f" (unreliable below {FEW_SPEAKERS} speakers)"
    if entries:
        print(f"{'':{width}} {'utts':>6} {'units':>8} {'sub':>6} {'del':>6} {'ins':>6}  "
              f"{'rate, %':25} sent.err     RTF")
    for e in entries:
        name = f"{e['set']} {e['language']}"
        edits = f"{e['substitutions']:6} {e['deletions']:6} {e['insertions']:6}"
        rtf = f"{e['set_seconds'] / e['set_audio_sec']:.4f}" if e["set_audio_sec"] else "-"
        print(f"{name:{width}} {e['utterances']:6} {e['units']:8} {edits}  {e['metric']} "
              f"{e['rate']:6.2f} {interval(e):14} {e['sentence_error']:6.1f} %  {rtf:>6}")
    if pooled:
        print(f"all pooled {pooled['rate']:.2f} % {interval(pooled)}, "
              f"{pooled['errors']} errors in {pooled['units']} units")
        print(f"macro average {summary['macro_average']:.2f} %; normaliser {data.NORMALISER}; "
              f"95 % intervals resample {', '.join(dict.fromkeys(resampled))}{caveat}")
    for e in entries:
        if e["no_speech"]:
            print(f"{e['set']} {e['language']}: {e['no_speech']} clips without speech, "
                  f"{e['insertions_per_minute']:.1f} insertions per minute of them")
    counted = " and counted as all deleted" if summary["failed"] else ""
    print(f"{summary['clips']} clips: {summary['empty']} empty, {summary['truncated']} truncated, "
          f"{summary['looping']} looping, {summary['failed']} failed to decode{counted}")


# ---------------------------------------------------------------------------- several systems

def compare_rows(reference, rows) -> dict:
    """Rates of one system, and what it gains on the reference system: a paired bootstrap over the
    same clips in the same order."""
    errors_a, units = errors_and_units(reference)
    errors_b, _ = errors_and_units(rows)
    _, labels = blocks_of(reference)
    gains = 100 * data.bootstrap_rates(errors_a - errors_b, units, blocks=labels)  # (n_draws,) points
    low, high = data.interval(gains)
    p_improvement = float((gains > 0).mean() + 0.5 * (gains == 0).mean())  # a tie is for neither
    if math.isnan(low):
        p_improvement = math.nan
    return corpus_rate(rows) | {
        "difference": percent(errors_a - errors_b, units), "difference_low": low,
        "difference_high": high, "p_improvement": p_improvement, "utterances": len(rows),
        "units": int(units.sum())}


def read_systems(paths) -> dict[str, list[dict]]:
    """{system: its rows that have a reference}, clip by clip in the order of the first system's.

    A system is called by the folder of its hyps.jsonl, where that tells all of them apart, else by
    the path. Raises ValueError unless all hold the same clips with the same references.
    """
    names = [Path(path).absolute().parent.name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    systems = {}
    for name, path in zip(names, paths):
        rows = {row["id"]: row for row in read_hyps(path) if "text" in row}
        systems[name] = rows
    first = systems[names[0]]
    for name, rows in systems.items():
        odd = [i for i in first.keys() ^ rows.keys()]
        for i in first.keys() & rows.keys():
            if (first[i]["text"], first[i]["language"]) != (rows[i]["text"], rows[i]["language"]):
                odd.append(i)
        if odd or not first:
            raise ValueError(f"{paths[0]} and {name}: {len(odd)} clips are not in both with one "
                             f"reference, such as {sorted(odd)[:1]}")
    return {name: [rows[i] for i in first] for name, rows in systems.items()}


def compare(paths, out=None) -> list[dict]:
    """Print and return the entries of compare.json; write it and compare.png into `out`, if given."""
    systems = read_systems(paths)
    reference = next(iter(systems))
    groups = defaultdict(list)  # set and language: places of its rows
    for i, row in enumerate(systems[reference]):
        groups[row["set"], row["language"]].append(i)
    if len(groups) > 1:
        groups["all", "pooled"] = list(range(len(systems[reference])))
    width = max(map(len, systems))
    entries = []
    for (name, language), places in groups.items():
        metric = language if language == "pooled" else data.metric(language)
        print(f"\n{name} {language}: {metric}, % [95 % interval]; below {reference}, points; P(better)")
        chosen = [systems[reference][i] for i in places]
        for system, rows in systems.items():
            e = {"system": system, "set": name, "language": language, "metric": metric}
            e |= compare_rows(chosen, [rows[i] for i in places])
            entries.append(e)
            rate = f"{e['rate']:.2f} {interval(e)}"
            gain = f"{e['difference']:+.2f} {interval(e, 'difference_low', 'difference_high', '+.2f')}"
            if system == reference:
                print(f"{system:{width}}  {rate}")
            else:
                print(f"{system:{width}}  {rate:22} {gain:24} {e['p_improvement']:.4f}")
        caveat = ": too few to rely on the intervals" if few_speakers(e) else ""
        print(f"{e['utterances']} clips, {e['units']} units, {e['blocks']} {e['resampled']}{caveat}")
    if out:
        write_json(Path(out) / "compare.json", entries)
        draw_rates(entries, Path(out) / "compare.png")
    return entries


def draw_rates(entries, path) -> None:
    """Every system's error rate as a dot with its interval, a panel a set and language."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    panels = list(dict.fromkeys((e["set"], e["language"]) for e in entries))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3.2 * len(panels) + 1, 2.6), sharey=True,
                                   layout="constrained", squeeze=False)
    for axis, (name, language) in zip(axes[0], panels):
        chosen = [e for e in entries if (e["set"], e["language"]) == (name, language)]
        for y, e in enumerate(chosen):
            axis.plot([e["low"], e["high"]], [y, y], color="tab:gray")
            axis.plot(e["rate"], y, "o", color="tab:blue")
        axis.set(title=f"{name} {language}", xlabel=f"{e['metric']}, %", xlim=(0, None))
        axis.set_yticks(range(len(chosen)), [e["system"] for e in chosen])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].invert_yaxis()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# ---------------------------------------------------------------------------- what is written

def unfit_to_teach(row, max_wer) -> str | None:
    """Why a transcript should not become a reference; None if it may."""
    if "failed" in row:
        return "failed to decode"
    if not row["hyp"]:
        return "empty"
    if not row["stopped"]:
        return "cut at --max_new_tokens"
    if row["looping"]:
        return "looping"
    if max_wer is None or "units" not in row:
        return None
    if 100 * counts_of(row).errors / max(row["units"], 1) > max_wer:
        return f"above --max_wer {max_wer:g}"
    return None


def write_teacher_manifest(rows, path, max_wer) -> None:
    """Transcripts as references, for the TD stage. What is left out is counted by reason."""
    kept, left_out = [], Counter()
    for row in rows:
        reason = unfit_to_teach(row, max_wer)
        if reason:
            left_out[reason] += 1
            continue
        audio = os.path.relpath(row["audio"], Path(path).absolute().parent)
        line = {"id": row["id"], "audio": audio, "text": row["hyp"]}
        for key in ("language", "duration", "start", "speaker"):
            if key in row:
                line[key] = row[key]
        kept.append(line)
    data.write_jsonl(path, kept)
    reasons = [f"{n} {reason}" for reason, n in left_out.most_common()]
    said = f"{path}: {len(kept)} transcripts kept; left out: {', '.join(reasons) or 'none'}"
    no_language = sum("language" not in line for line in kept)
    if no_language:
        said += f"; {no_language} have no language, which sft.py will ask for"
    unchecked = sum("units" not in row for row in rows)
    if max_wer is not None and unchecked:
        said += f"; {unchecked} had no reference to hold against --max_wer"
    print(said)


def sha256(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_commit() -> str | None:
    """Commit of this file's repository, -dirty if it has changed since; None outside of one."""
    command = ["git", "-C", Path(__file__).resolve().parent,
               "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:  # a machine without git
        return None


DECISIVE = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
            "vocab.json", "merges.txt"]  # beside the weights


def provenance(args, device, world) -> dict:
    """What it takes to make the numbers again."""
    libraries = ("torch", "torchaudio", "transformers", "jiwer", "numpy")
    versions = {"python": platform.python_version()} | {name: version(name) for name in libraries}
    facts = {"normaliser": data.NORMALISER, "versions": versions, "commit": git_commit(),
             "command": shlex.join(sys.argv)}
    if args.rescore:
        return facts | {"rescored": {args.rescore: sha256(args.rescore)}}
    weights = {}
    for file in sorted(model.find_checkpoint(args.model).iterdir()):
        if file.suffix == ".safetensors" or file.name in DECISIVE:
            weights[file.name] = sha256(file)
    decoding = {"search": "greedy", "max_new_tokens": args.max_new_tokens, "batch": args.batch,
                "keep_going": args.keep_going}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return facts | {"model": args.model, "weights": weights,
                    "data": {path: sha256(path) for path in args.data},
                    "decoding": decoding, "device": name, "processes": world}


def write_json(path, value) -> None:
    """The value as JSON, which has no NaN: the rate of no units becomes null."""
    value = json.loads(json.dumps(value), parse_constant=lambda nan: None)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")


def write_results(out, summary, rows) -> None:
    """hyps.jsonl, summary.json, errors.html."""
    lines = []
    for row in rows:
        if "audio" in row:
            row = row | {"audio": os.path.relpath(row["audio"], out.absolute())}
        lines.append(row)
    data.write_jsonl(out / "hyps.jsonl", lines)
    write_json(out / "summary.json", summary)
    (out / "errors.html").write_text(errors_page(summary, rows), encoding="utf-8")


# ---------------------------------------------------------------------------- errors.html

def to_utterance(row) -> data.Utterance:
    return data.Utterance(row["id"], row.get("audio", ""), start_sec=row.get("start", 0.0),
                          duration_sec=row.get("duration"))


def player(row) -> str:
    """The clip itself inside the page: 16 kHz, 16 bit, only the segment."""
    try:
        audio = data.load_audio(to_utterance(row), data.MAX_EVAL_SEC, for_training=False)
    except data.AudioError as error:
        return f'<span class="soft">no audio: {error.reason}</span>'
    wav = io.BytesIO()
    soundfile.write(wav, audio, data.SAMPLE_RATE, format="WAV", subtype="PCM_16")
    source = "data:audio/wav;base64," + base64.b64encode(wav.getvalue()).decode()
    return f'<audio controls preload="metadata" src="{source}"></audio>'


def length_chart(rows) -> str:
    """Error rate by clip length as bars: the rate above, seconds and the number of clips below."""
    errors, units = errors_and_units(rows)
    seconds = np.array(data.measure([to_utterance(row) for row in rows]))
    step = next(s for s in (0.25, 0.5, 1, 2, 5, 10, 1e9) if seconds.max() / s <= 12)  # a dozen bars
    bins = (seconds / step).astype(int)
    first, last = bins.min(), bins.max()
    rates = {i: percent(errors[bins == i], units[bins == i]) for i in np.unique(bins)}
    highest = np.nanmax([*rates.values(), 1e-9])
    bars = ""
    for i, rate in rates.items():  # 62 wide with the gap, 120 high at most, standing on y = 150
        x = 62 * (i - first) + 31
        height = 120 * np.nan_to_num(rate) / highest
        bars += f'<rect x="{x - 22}" y="{150 - height:.1f}" width="44" height="{height:.1f}" rx="3"/>'
        if not math.isnan(rate):
            bars += f'<text x="{x}" y="{144 - height:.1f}">{rate:.1f}</text>'
        bars += f'<text x="{x}" y="168">{i * step:g}–{(i + 1) * step:g}</text>'
        bars += f'<text class="n" x="{x}" y="184">{(bins == i).sum()}</text>'
    width = 62 * (last - first + 1)
    axis = f'<line x1="0" x2="{width}" y1="150" y2="150"/>'
    return f'<svg viewBox="0 0 {width} 190" width="{width}">{axis}{bars}</svg>'


def confusions(alignments) -> str:
    """The most frequent substitutions, deletions and insertions, a list each."""
    found = defaultdict(Counter)
    for kind, ref, hyp in chain.from_iterable(alignments):
        what = f"{ref} → {hyp}" if kind == "sub" else ref or hyp
        found[kind][what] += 1
    lists = ""
    for kind, title in (("sub", "Substituted"), ("del", "Deleted"), ("ins", "Inserted")):
        if found[kind]:
            lists += f"<div><h3>{title}</h3><table>"
            for what, n in found[kind].most_common(8):
                lists += f"<tr><td>{escape(what)}</td><td>{n}</td></tr>"
            lists += "</table></div>"
    return lists


def clip_card(row, pairs) -> str:
    """One clip to hear and to read: the units of its reference above those of its transcript."""
    notes = [row["set"]]
    if row.get("speaker"):
        notes.append(row["speaker"])
    if not row["stopped"]:
        notes.append("truncated")
    if row["looping"]:
        notes.append("looping")
    if "failed" in row:
        notes.append("failed to decode")
    errors = counts_of(row).errors
    head = (f'<b>{escape(row["id"])}</b><span>{errors} errors, {row["units"]} units</span>'
            f'<span class="soft">{escape(", ".join(notes))}</span>{player(row)}')
    words = ""
    for kind, ref, hyp in pairs:
        words += f'<span class="pair {kind}">'
        words += f'<span class="r">{escape(ref)}</span><span class="h">{escape(hyp)}</span></span>'
    return f'<div class="clip"><div class="head">{head}</div>{words}</div>'


def language_section(rows, n_worst) -> str:
    """Lengths, confusions and the worst clips of one language."""
    language = rows[0]["language"]
    aligned = [data.align(row["text"], row["hyp"], language) for row in rows]
    errors, units = errors_and_units(rows)
    order = sorted(range(len(rows)), key=lambda i: (-errors[i], units[i], rows[i]["id"]))
    cards = [clip_card(rows[i], aligned[i]) for i in order[:n_worst] if errors[i]]
    return (f'<h2>{escape(language)}</h2><div class="columns"><div>'
            f'<h3>{data.metric(language)}, %, by seconds; number of clips</h3>'
            f'{length_chart(rows)}</div>'
            f'{confusions(aligned)}</div><h3>The {len(cards)} clips with the most errors: '
            f'reference above, transcript below</h3>{"".join(cards)}')


def table_row(e) -> str:
    """One entry of summary.json."""
    rate = f"{e['metric']} <b>{e['rate']:.2f}</b> {interval(e)}"
    cells = [escape(f"{e['set']} {e['language']}"), e["utterances"], e["units"], e["substitutions"],
             e["deletions"], e["insertions"], rate, f"{e['sentence_error']:.1f}"]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def errors_page(summary, rows) -> str:
    """One page that loads and runs nothing. Worst clips are shared out over the languages."""
    groups = group_scored(rows, "language")
    n_worst = max(5, WORST // max(1, len(groups)))
    sections = [language_section(group, n_worst) for _, group in sorted(groups.items())]
    table = map(table_row, summary["results"])
    source = summary["model"] if "model" in summary else next(iter(summary["rescored"]))
    template = Path(__file__).resolve().parent / ".assets" / "errors.html"
    return Template(template.read_text(encoding="utf-8")).substitute(
        source=escape(source), normaliser=escape(summary["normaliser"]), table="".join(table),
        clips=len(rows), **count_troubles(rows), sections="".join(sections))


# ---------------------------------------------------------------------------- main

def transcribe_all(args, rank, world, device):
    """-> rows of hyps.jsonl, {set: (seconds of audio, seconds it took)}. Both empty off rank 0."""
    sets = read_sets(args.data)
    clips = list(chain.from_iterable(sets.values()))
    failed = gather(find_undecodable(clips[rank::world], args.keep_going), world)
    asr = model.load(args.model, device)
    rows, timing = [], {}
    for name, utterances in sets.items():
        decodable = [u for u in utterances if u.id not in failed]
        began = time.time()
        results = transcribe_set(asr, name, decodable, args, rank, world)
        timing[name] = sum(data.measure(decodable)), time.time() - began
        if rank == 0:
            rows += score(utterances, failed | results, name)
    return rows, timing


@record  # torchrun then shows what stopped a process, at the end
def main(args):
    """Do what the flags ask for, see the top of this file. Returns the entries of --compare."""
    outputs = []
    if args.out:
        names = "compare.json compare.png" if args.compare else "hyps.jsonl summary.json errors.html"
        outputs += [Path(args.out) / name for name in names.split()]
    if args.as_manifest:
        outputs.append(args.as_manifest)
    data.check_outputs(*outputs)
    if args.compare:
        return compare(args.compare, args.out)
    rank, world, device = model.setup_scoring(args)
    if args.audio:
        if rank == 0:
            print_transcripts(args, device)
        return model.finish()
    if args.rescore:
        rows, timing = read_hyps(args.rescore), {}
    else:
        rows, timing = transcribe_all(args, rank, world, device)
    if rank == 0:
        summary = summarize_all(rows, timing)
        print_table(summary)
        write_results(Path(args.out), summary | provenance(args, device, world), rows)
        if args.as_manifest:
            write_teacher_manifest(rows, args.as_manifest, args.max_wer)
    model.finish()


def parse_args(argv=None):
    """Flags -> namespace."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=data.HelpFormatter)
    # what to do
    parser.add_argument("--model", help="checkpoint directory or Hub id, student or teacher")
    parser.add_argument("--data", nargs="+", help="manifests to transcribe")
    parser.add_argument("--audio", nargs="+", help="audio files to transcribe and print")
    parser.add_argument("--rescore", help="hyps.jsonl to score again")
    parser.add_argument("--compare", nargs="+", help="hyps.jsonl of several systems, same clips")
    parser.add_argument("--out", help="folder for what is written")
    # transcripts to train on
    parser.add_argument("--as_manifest", help="also write transcripts as references, to this file")
    parser.add_argument("--max_wer", type=not_negative, help="percent from their text at most")
    # decoding
    parser.add_argument("--language", help="of --audio, for a teacher that wants to be told")
    parser.add_argument("--keep_going", action="store_true", help="count broken clips as deleted")
    parser.add_argument("--batch", type=at_least_one, default=32, help="utterances a forward")
    parser.add_argument("--max_new_tokens", type=at_least_one, default=128,
                        help="longest transcript, tokens")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="where to run")
    args = parser.parse_args(argv)
    flags = ("model", "data", "audio", "rescore", "compare", "out")
    given = {flag for flag in flags if getattr(args, flag)}
    modes = ({"model", "data", "out"}, {"model", "audio"}, {"rescore", "out"},
             {"compare"}, {"compare", "out"})
    if given not in modes:
        parser.error("one of these is needed: --model --data --out, --model --audio, "
                     "--rescore --out, --compare, --compare --out")
    if args.compare and len(set(args.compare)) < max(2, len(args.compare)):
        parser.error("--compare wants two or more different files")
    if args.max_wer is not None and not args.as_manifest:
        parser.error("--max_wer filters --as_manifest")
    return args


if __name__ == "__main__":
    main(parse_args())
