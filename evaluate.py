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

Transcripts are appended to OUT/part-RANK.jsonl, batch by batch, and leave it for hyps.jsonl when all
are there. A run that was stopped goes on with --resume, on any number of processes, and ends in the
same hyps.jsonl; of each process the batch at work is lost. Nodes share --out.

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
                                   excluded, mean of the processes, with the time before a resume;
                                   real-time factor (RTF) = set_seconds / set_audio_sec
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
import bisect
import hashlib
import io
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections import Counter, defaultdict
from html import escape
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import NamedTuple

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

def read_sets(paths) -> dict[str, data.Manifest]:
    """Manifests -> {set: utterances}. Raises ValueError, before any work, for what could not be
    scored or written afterwards."""
    stems = [Path(path).stem for path in paths]
    sets = {}
    for path, stem in zip(paths, stems):
        name = stem if stems.count(stem) == 1 else path
        sets[name] = data.read_manifest(path)
        u = sets[name].first_without("scorable")
        if u:
            check_language(u.language, f"{u.line}: {u.id}")
    u = data.read_manifests(paths).first_repeated()
    if u:
        raise ValueError(f"{u.line}: id {u.id!r} stands in another set too, "
                         "and hyps.jsonl is one manifest")
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


def transcribe_all(args, rank, world, device):
    """Write a transcript of every clip of --data into OUT/part-RANK.jsonl.

    -> {set: utterances}, provenance (None off rank 0). A batch holds the same clips whoever decodes
    it and whenever, so that a resumed run and any number of ranks write the same transcripts.
    """
    sets = read_sets(args.data)
    facts, done = None, [None]
    if rank == 0:
        facts = provenance(args, device, world)
        done[0] = prepare_parts(args, sum(map(len, sets.values())), facts)
    if world > 1:
        dist.broadcast_object_list(done)  # from rank 0: nobody looks while others already write
    clips = data.read_manifests(args.data)
    missing = np.flatnonzero(~done[0])[rank::world]
    failed = gather(find_undecodable((clips[i] for i in missing), args.keep_going), world)
    asr = model.load(args.model, device)
    first = 0
    with (Path(args.out) / f"part-{rank}.jsonl").open("a", encoding="utf-8") as file:
        for name, utterances in sets.items():
            done_here = done[0][first:first + len(utterances)]
            transcribe_set(asr, name, utterances, done_here, failed, first, file, args, rank, world)
            first += len(utterances)
    if world > 1:
        dist.barrier()
    return sets, facts


def prepare_parts(args, n_clips, facts) -> np.ndarray:
    """Make OUT ready for part files -> (n_clips,) bool: which clips have a transcript there.

    Raises FileExistsError if any has and --resume is not given, ValueError if they were made with
    another model, other data or other batches.
    """
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    made_with = {key: facts[key] for key in ("model", "weights", "data")}
    made_with |= {"batch": args.batch, "max_new_tokens": args.max_new_tokens}
    made_with = json.dumps(made_with, indent=2)
    note = out / "part.json"
    if not any([cut_half_line(path) for path in out.glob("part-*.jsonl")]):
        note.write_text(made_with, encoding="utf-8")
        return np.zeros(n_clips, dtype=bool)
    if not args.resume:
        raise FileExistsError(f"{out} holds transcripts of a run that was stopped: continue it with "
                              "--resume, or choose another --out")
    if note.read_text(encoding="utf-8") != made_with:
        raise ValueError(f"{out}: its transcripts were made with another --model, --data, --batch or "
                         f"--max_new_tokens, see {note}; choose another --out")
    _, _, offsets = find_transcripts(out, n_clips)
    return offsets >= 0


def cut_half_line(path) -> int:
    """Cut off what a killed process left of a last line -> bytes that remain."""
    with path.open("r+b") as file:
        whole = sum(len(line) for line in file if line.endswith(b"\n"))
        file.truncate(whole)
    return whole


def find_transcripts(out, n_clips):
    """Part files; for each clip the number of its file, (n,), and its line's place there, (n,) bytes
    or -1. Ten bytes a clip."""
    paths = sorted(out.glob("part-*.jsonl"))
    parts = np.zeros(n_clips, dtype=np.int16)
    offsets = np.full(n_clips, -1, dtype=np.int64)
    for number, path in enumerate(paths):
        offset = 0
        with path.open("rb") as file:
            for line in file:
                clip = json.loads(line)["clip"]
                parts[clip] = number
                offsets[clip] = offset
                offset += len(line)
    return paths, parts, offsets


def transcribe_set(asr, name, utterances, done, failed, first, file, args, rank, world) -> None:
    """Append this rank's share of a set to its part file, batch after batch.

    done: (n,) bool, clips that have a transcript. failed: see find_undecodable. first: the number of the set's first clip in
    --data. A batch that was written in part is made again as a whole.
    """
    seconds = data.measure(utterances)
    order = seconds.argsort(kind="stable")  # clips of similar length go together
    todo = []
    for start in range(0, len(order), args.batch):
        if not done[order[start:start + args.batch]].all():
            todo.append(start)
    clips, audio_sec = int(done.sum()), float(seconds[done].sum(dtype=float))
    total_sec = float(seconds.sum(dtype=float))
    bar = model.progress(round(total_sec), name, "s", rank, round(audio_sec))
    for start in todo[rank::world]:
        batch = order[start:start + args.batch]
        began = time.time()
        chosen = [utterances[i] for i in batch]
        usable = [u for u in chosen if u.id not in failed]
        results = model.transcribe(asr, usable, 0, 1, args.batch, args.max_new_tokens) | failed
        share = (time.time() - began) / world / len(batch)
        lines = ""
        for i in batch:
            result = results.get(utterances[i].id)
            if result:
                line = {"clip": first + int(i), "seconds": share} | result
                lines += json.dumps(line, ensure_ascii=False) + "\n"
        file.write(lines)
        file.flush()  # what is killed after this loses nothing
        clips = min(clips + len(batch) * world, len(order))  # the other ranks do about as much
        audio_sec = min(audio_sec + seconds[batch].sum(dtype=float) * world, total_sec)
        bar.set_postfix_str(f"{clips} of {len(order)} clips, {audio_sec / 3600:.2f} of "
                            f"{total_sec / 3600:.2f} h", refresh=False)
        bar.update(round(audio_sec) - bar.n)
    bar.close()


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


def finished_rows(sets, out, timing):
    """Yield the rows of hyps.jsonl in the order of --data, from the part files. Fills in
    timing[set] = seconds of audio, seconds it took. Raises ValueError if a clip has no transcript."""
    paths, parts, offsets = find_transcripts(out, sum(map(len, sets.values())))
    files = [path.open("rb") for path in paths]
    clip = 0
    for name, utterances in sets.items():
        audio_sec = took = 0.0
        for u, duration in zip(utterances, data.measure(utterances).tolist()):
            if offsets[clip] < 0:
                raise ValueError(f"{name}: no transcript of {u.id!r} ({u.line})")
            file = files[parts[clip]]
            file.seek(offsets[clip])
            result = json.loads(file.readline())
            clip += 1
            del result["clip"]
            took += result.pop("seconds")
            if "failed" not in result:
                audio_sec += duration
            yield score(u, result, name)
        timing[name] = audio_sec, took


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


def score(u, result, name="test") -> dict:
    """A clip's row of hyps.jsonl."""
    row = {"id": u.id, "set": name, "audio": u.audio, "text": u.text, "language": u.language,
           "duration": u.duration_sec, "start": u.start_sec or None, "speaker": u.speaker}
    return add_counts(without_none(row | result))


def read_hyps(path):
    """Yield the rows of a hyps.jsonl, counted again. Raises ValueError naming the line.

    Any JSON Lines with "id" and "hyp" will do; "text" and "language" make a score.
    """
    seen = set()
    for where, row in read_rows(path):
        check_hyp(row, where)
        row["id"] = str(row["id"])
        if row["id"] in seen:
            raise ValueError(f"{where}: id {row['id']!r} stands twice")
        seen.add(row["id"])
        yield add_counts(row)
    if not seen:
        raise ValueError(f"{path}: no transcript in it")


def read_rows(path):
    """Yield (path:line, row) of a JSON Lines file; paths of audio are made absolute."""
    path = Path(path)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = {"set": path.stem, "stopped": True} | without_none(json.loads(line))
            except (ValueError, AttributeError):
                found = data.describe(line)
                raise ValueError(f"{where}: expected a JSON object, found {found}") from None
            if "audio" in row:
                row["audio"] = os.path.normpath(path.parent.absolute() / row["audio"])
            yield where, row


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
        if re.search("[\ud800-\udfff]", str(row.get(key))):  # no file can hold it
            raise ValueError(f"{where}: {key!r} has half a character (a lone surrogate): {row[key]!r}")
    if "text" in row:
        check_language(row.get("language"), where)




def counts_of(row) -> data.Counts:
    return data.Counts(row["substitutions"], row["deletions"], row["insertions"], row["units"])


TROUBLES = ("empty", "truncated", "looping", "failed")


def troubles_of(row) -> tuple[str, ...]:
    """What looks wrong even without a reference. A clip that could not be decoded is failed, not
    empty."""
    found = {"empty": not row["hyp"] and "failed" not in row, "truncated": not row["stopped"],
             "looping": row["looping"], "failed": "failed" in row}
    return tuple(trouble for trouble in TROUBLES if found[trouble])


class Scored(NamedTuple):
    """What is kept in memory of a clip that has a reference: numbers and shared words, no text."""
    set: str
    language: str
    speaker: str | None
    duration: float | None  # seconds
    counts: data.Counts
    troubles: tuple[str, ...]


def without_texts(row) -> Scored:
    """A row of hyps.jsonl that has a reference -> what is kept of it."""
    speaker = row.get("speaker")
    return Scored(sys.intern(row["set"]), sys.intern(row["language"]), speaker and sys.intern(speaker),
                  row.get("duration"), counts_of(row), troubles_of(row))


class Scores:
    """What is kept of the rows of hyps.jsonl while they pass by: counts, and the worst clips."""
    def __init__(self):
        self.clips = 0
        self.troubles = Counter()
        self.scored = []                        # Scored, in the order of the rows
        self.confusions = defaultdict(Counter)  # language and kind of error: what for what
        self.worst = defaultdict(list)          # language: up to WORST of (-errors, units, id, row)

    def watch(self, rows):
        """Yield the rows as they are."""
        for row in rows:
            self.clips += 1
            self.troubles.update(troubles_of(row))
            if "units" in row:
                scored = without_texts(row)
                if scored.duration is None:
                    scored = scored._replace(duration=float(data.measure([to_utterance(row)])[0]))
                self.scored.append(scored)
                if scored.counts.errors:
                    self.add_errors(row)
            yield row

    def add_errors(self, row) -> None:
        language, counts = row["language"], counts_of(row)
        worst = self.worst[language]
        bisect.insort(worst, (-counts.errors, counts.units, row["id"], row))
        del worst[WORST:]
        for kind, ref, hyp in data.align(row["text"], row["hyp"], language):
            if kind != "equal":
                what = f"{ref} → {hyp}" if kind == "sub" else ref or hyp
                self.confusions[language, kind][what] += 1


def group_scored(rows, key) -> dict[str, list[Scored]]:
    """{value of the key: its rows}."""
    groups = defaultdict(list)
    for row in rows:
        groups[getattr(row, key)].append(row)
    return groups


def errors_and_units(rows):
    """Errors (n,) and reference units (n,) of n rows, int64."""
    counts = np.array([row.counts for row in rows])  # (n, 4)
    return counts[:, :3].sum(1), counts[:, 3]


def percent(errors, units) -> float:
    """Corpus rate: sum of errors / sum of units, never a mean of rates. NaN without a unit."""
    return 100.0 * float(errors.sum()) / float(units.sum()) if units.any() else math.nan


def blocks_of(rows) -> tuple[str, list]:
    """What an interval resamples, and a label a row: its speaker, if every row names one and there
    are two or more, else its number."""
    speakers = [row.speaker for row in rows]
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
            entry[field] = sum(getattr(row.counts, field) for row in group)
        wrong = sum(row.counts.errors > 0 for row in group)
        entry["utterances"] = len(group)
        entry["sentence_error"] = 100 * wrong / len(group)
        entry |= insertions_on_silence(group)
        entry |= count_troubles(group)
        entry |= {"set_audio_sec": audio_sec, "set_seconds": seconds}
        entries.append(entry)
    return entries


def count_troubles(rows) -> dict:
    """How many transcripts look wrong even without a reference, by trouble."""
    counts = Counter()
    for row in rows:
        counts.update(row.troubles)
    return {trouble: counts[trouble] for trouble in TROUBLES}


def summarize_all(scores, timing) -> dict:
    """summary.json but for its provenance. timing: {set: (seconds of audio, seconds it took)}."""
    entries, scored = [], []
    for name, group in group_scored(scores.scored, "set").items():
        audio_sec, seconds = timing.get(name, (None, None))
        entries += summarize(name, group, audio_sec, seconds)
        scored += group
    summary = {"results": entries, "macro_average": None, "pooled": None, "clips": scores.clips}
    rates = [e["rate"] for e in entries if e["units"]]
    if rates:
        errors, units = errors_and_units(scored)
        totals = {"errors": int(errors.sum()), "units": int(units.sum())}
        summary["macro_average"] = sum(rates) / len(rates)
        summary["pooled"] = corpus_rate(scored) | totals
    return summary | {trouble: scores.troubles[trouble] for trouble in TROUBLES}


def insertions_on_silence(rows) -> dict:
    """What is written where nothing is said: clips whose reference has no unit, and insertions per
    minute of them, nan if there is no such audio. Clips that failed to decode don't count."""
    silent = [row for row in rows if not row.counts.units and "failed" not in row.troubles]
    minutes = sum(row.duration for row in silent) / 60
    insertions = sum(row.counts.insertions for row in silent)
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
        normal = " (normal approximation)" if e["blocks"] > data.MANY_BLOCKS else ""
        resampled.append(f"{e['blocks']} {e['resampled']}{normal}")
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


def read_systems(paths) -> dict[str, list[Scored]]:
    """{system: its rows that have a reference}, clip by clip in the order of the first system's.

    A system is called by the folder of its hyps.jsonl, where that tells all of them apart, else by
    the path. Raises ValueError unless all hold the same clips with the same references.
    """
    names = [Path(path).absolute().parent.name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    systems, references = {}, {}
    for name, path in zip(names, paths):
        systems[name], references[name] = {}, {}  # by id
        for row in read_hyps(path):
            if "text" in row:
                systems[name][row["id"]] = without_texts(row)
                references[name][row["id"]] = hash((row["text"], row["language"]))
    first = systems[names[0]]
    for name, rows in systems.items():
        odd = [i for i in first.keys() ^ rows.keys()]
        for i in first.keys() & rows.keys():
            if references[names[0]][i] != references[name][i]:
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
        groups[row.set, row.language].append(i)
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


def write_teacher_manifest(hyps, path, max_wer) -> None:
    """Transcripts of a hyps.jsonl as references, for the TD stage. What is left out is counted by
    reason."""
    counts = Counter()  # of lines that are kept, have no language, have no reference
    left_out = Counter()

    def lines():
        for _, row in read_rows(hyps):
            counts["unchecked"] += "units" not in row
            reason = unfit_to_teach(row, max_wer)
            if reason:
                left_out[reason] += 1
                continue
            counts["kept"] += 1
            counts["no language"] += "language" not in row
            audio = os.path.relpath(row["audio"], Path(path).absolute().parent)
            line = {"id": row["id"], "audio": audio, "text": row["hyp"]}
            for key in ("language", "duration", "start", "speaker"):
                if key in row:
                    line[key] = row[key]
            yield line

    data.write_jsonl(path, lines())
    reasons = [f"{n} {reason}" for reason, n in left_out.most_common()]
    said = f"{path}: {counts['kept']} transcripts kept; left out: {', '.join(reasons) or 'none'}"
    if counts["no language"]:
        said += f"; {counts['no language']} have no language, which sft.py will ask for"
    if max_wer is not None and counts["unchecked"]:
        said += f"; {counts['unchecked']} had no reference to hold against --max_wer"
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


def write_hyps(path, rows) -> None:
    """Rows as hyps.jsonl, one after the other; audio relative to its folder."""
    def lines():
        for row in rows:
            if "audio" in row:
                row = row | {"audio": os.path.relpath(row["audio"], path.parent.absolute())}
            yield row

    data.write_jsonl(path, lines())


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
    seconds = np.array([row.duration for row in rows])
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


def confusion_lists(confusions, language) -> str:
    """The most frequent substitutions, deletions and insertions, a list each."""
    lists = ""
    for kind, title in (("sub", "Substituted"), ("del", "Deleted"), ("ins", "Inserted")):
        if confusions[language, kind]:
            lists += f"<div><h3>{title}</h3><table>"
            for what, n in confusions[language, kind].most_common(8):
                lists += f"<tr><td>{escape(what)}</td><td>{n}</td></tr>"
            lists += "</table></div>"
    return lists


def clip_card(row) -> str:
    """One clip to hear and to read: the units of its reference above those of its transcript."""
    pairs = data.align(row["text"], row["hyp"], row["language"])
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


def language_section(scores, language, rows, n_worst) -> str:
    """Lengths, confusions and the worst clips of one language."""
    cards = [clip_card(row) for *_, row in scores.worst[language][:n_worst]]
    return (f'<h2>{escape(language)}</h2><div class="columns"><div>'
            f'<h3>{data.metric(language)}, %, by seconds; number of clips</h3>'
            f'{length_chart(rows)}</div>'
            f'{confusion_lists(scores.confusions, language)}</div>'
            f'<h3>The {len(cards)} clips with the most errors: '
            f'reference above, transcript below</h3>{"".join(cards)}')


def table_row(e) -> str:
    """One entry of summary.json."""
    rate = f"{e['metric']} <b>{e['rate']:.2f}</b> {interval(e)}"
    cells = [escape(f"{e['set']} {e['language']}"), e["utterances"], e["units"], e["substitutions"],
             e["deletions"], e["insertions"], rate, f"{e['sentence_error']:.1f}"]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def errors_page(summary, scores) -> str:
    """One page that loads and runs nothing. Worst clips are shared out over the languages."""
    groups = group_scored(scores.scored, "language")
    n_worst = max(5, WORST // max(1, len(groups)))
    sections = ""
    for language, rows in sorted(groups.items()):
        sections += language_section(scores, language, rows, n_worst)
    table = map(table_row, summary["results"])
    source = summary["model"] if "model" in summary else next(iter(summary["rescored"]))
    troubles = {trouble: summary[trouble] for trouble in TROUBLES}
    template = Path(__file__).resolve().parent / ".assets" / "errors.html"
    return Template(template.read_text(encoding="utf-8")).substitute(
        source=escape(source), normaliser=escape(summary["normaliser"]), table="".join(table),
        clips=scores.clips, **troubles, sections=sections)


# ---------------------------------------------------------------------------- main

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
    out, timing = Path(args.out), {}
    if args.rescore:
        facts = provenance(args, device, world)
        rows = read_hyps(args.rescore)
    else:
        sets, facts = transcribe_all(args, rank, world, device)
        rows = finished_rows(sets, out, timing)
    if rank == 0:
        scores = Scores()
        write_hyps(out / "hyps.jsonl", scores.watch(rows))
        summary = summarize_all(scores, timing)
        print_table(summary)
        write_json(out / "summary.json", summary | facts)
        (out / "errors.html").write_text(errors_page(summary | facts, scores), encoding="utf-8")
        if args.as_manifest:
            write_teacher_manifest(out / "hyps.jsonl", args.as_manifest, args.max_wer)
        for path in [*out.glob("part-*.jsonl"), *out.glob("part.json")]:
            path.unlink()  # all is in hyps.jsonl
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
    parser.add_argument("--resume", action="store_true", help="go on where a run into --out stopped")
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
