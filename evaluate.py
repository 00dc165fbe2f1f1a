"""Manifest in, transcripts and corpus error rates out.

  rate = (substitutions + deletions + insertions) / reference units, summed over the corpus

Units are those of the text that data.normalize makes of both sides. A line's language decides how
its text is normalised and what the rate is called, CER or WER; a line without one is counted all
the same. An empty reference counts its insertions. 95 % intervals resample speakers where every
line names one (if there are fewer than twenty, they are too narrow), else utterances.

    python evaluate.py --model runs/x/opd --data test.jsonl --out runs/x/eval
    torchrun --nproc_per_node 8 evaluate.py --model runs/x/opd --data a.jsonl b.jsonl --out runs/x/e
    python evaluate.py --model TEACHER --data pool.jsonl --out runs/x/t --as_manifest td.jsonl  # TD
    python evaluate.py --model runs/x/opd --audio a.wav b.flac              # only transcripts
    python evaluate.py --compare runs/base/hyps.jsonl runs/opd/hyps.jsonl   # each with the first
    python evaluate.py --rescore runs/x/eval/hyps.jsonl --out runs/x/again  # same numbers; no model

TD is teacher data: transcripts that become references for sft.py. Decoding is greedy; for
--as_manifest it may be sampled, from numbers keyed on (seed, utterance). Every process appends to
a part file in --out, batch by batch: a run that was stopped goes on with --resume, on any number of
processes, to the same hyps.jsonl. Nodes share --out.

hyps.jsonl: a manifest in the order of --data, with these keys added to each line
  set                   its manifest: the file's name without .jsonl
  hyp                   the transcript as it is: empty and truncated ones are never mended
  stopped, n_tokens     false if it was cut at --max_new_tokens; its length, end token included
  audio_sec             seconds of audio heard
  substitutions, deletions, insertions, errors, units    where the line has a text
  failed                only where the clip could not be decoded (--keep_going): the reason

summary.json
  results: an entry per set and language ("" where lines have none); of several, also one over all
  of them (set all, language and metric pooled)
    system, set, language, metric    the name of --out's folder; metric is WER or CER
    rate, low, high                  percent, with its interval; null where there is none
    resampled                        what the interval rests on, such as "40 speakers"
    sentence_error                   percent of utterances with an error
    substitutions, deletions, insertions, errors, units, utterances, set_audio_sec    sums
  clips, without_text, empty, truncated, failed    how many lines, with a text or without
  normaliser, versions, commit, command, device, model, language, temperature, seed, max_new_tokens,
  files (when weights and manifests, or --rescore's, were written)    what made the numbers

errors.html: the 50 clips with the most errors, to read and to hear.

--rescore and --compare count the errors anew of any JSON Lines with id, text and hyp. With --out,
--compare writes compare.png and compare.json, such entries of every system:
  difference, difference_low, difference_high    how far its rate is below the first system's (that
                        one's minus its own, points, paired): 0 of the first, above 0 of better ones
"""

import argparse
import heapq
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
from pathlib import Path
from urllib.parse import quote

import jiwer
import numpy as np
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

import data
import model
from data import at_least

READS = {  # the flag that names a mode: the others that it reads
    "data": "model out as_manifest temperature seed language keep_going resume batch "
            "max_new_tokens device",
    "audio": "model language keep_going max_new_tokens device",
    "rescore": "out",
    "compare": "out",
}


def parse_args(argv=None):
    """Flags -> namespace. A flag that the mode does not read is refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=data.HelpFormatter,
                                     allow_abbrev=False)
    # what to do
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--data", nargs="+", help="manifests to transcribe")
    add("--audio", nargs="+", help="audio files to transcribe and print")
    add("--rescore", help="hyps.jsonl to score again")
    add("--compare", nargs="+", help="hyps.jsonl of several systems, same clips")
    add = parser.add_argument
    add("--model", help="checkpoint directory or Hub id, student or teacher")
    add("--out", help="folder for what is written")
    # transcripts to train on
    add("--as_manifest", help="also write transcripts as references, to this file")
    add("--temperature", type=at_least(0.0), default=0.0, help="sample them; 0 is greedy")
    add("--seed", type=at_least(0), default=0, help="of the samples")
    # decoding
    add("--language", help="of --audio, and of lines that name none (Qwen3-ASR is told it)")
    add("--keep_going", action="store_true", help="count broken clips as deleted")
    add("--resume", action="store_true", help="go on where a run into --out stopped")
    add("--batch", type=at_least(1), default=32, help="utterances per forward")
    add("--max_new_tokens", type=at_least(1), default=64, help="longest transcript, tokens")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="where to run")
    args = parser.parse_args(argv)
    given = {flag for flag, value in vars(args).items() if value != parser.get_default(flag)}
    mode = next(flag for flag in READS if flag in given)
    reads = READS[mode].split()
    for flag in sorted(given - {mode, *reads}):
        parser.error(f"--{mode} does not read --{flag}")
    for flag in ("model", "out"):
        if flag in reads and flag not in given and mode != "compare":
            parser.error(f"--{mode} needs --{flag}")
    if (args.temperature or args.seed) and not args.as_manifest:
        parser.error("--temperature and --seed go with --as_manifest: rates are of greedy decoding")
    if args.as_manifest and os.path.realpath(args.as_manifest) in map(os.path.realpath, args.data):
        parser.error(f"--as_manifest {args.as_manifest} would write over --data")
    return args


@record  # torchrun then shows what stopped a process, at the end
def main(args):
    """Does what the flags ask for, see the top of this file. Returns the entries of --compare."""
    if args.compare:
        entries = score(read_systems(args.compare))
        if args.out:
            data.write_json(Path(args.out) / "compare.json", entries)
            draw_rates(entries, Path(args.out) / "compare.png")
        return entries
    if args.audio:
        return print_transcripts(args)
    if args.rescore:
        rows = list(read_hyps(args.rescore).values())
        made_with = {"files": {args.rescore: os.path.getmtime(args.rescore)},
                     "normaliser": data.METRIC}
    else:
        rows, made_with = transcribe_data(args)
        if not rows:
            return  # any rank but 0
    out = Path(args.out).absolute()
    if args.as_manifest:
        write_teacher_manifest(rows, args.as_manifest)
    for row in rows:
        if "audio" in row:
            row["audio"] = os.path.relpath(row["audio"], os.path.realpath(out))
    data.write_jsonl(out / "hyps.jsonl", rows)
    data.write_json(out / "summary.json", summarize(out.name, rows) | provenance() | made_with)
    (out / "errors.html").write_text(errors_page(rows), encoding="utf-8")
    if args.data:  # all is in hyps.jsonl
        for path in (*out.glob("part-*.jsonl"), out / "part.json"):
            path.unlink()


# ------------------------------------------------------------------------------------- transcribe

def transcribe_data(args) -> tuple[list[dict], dict]:
    """A transcript of every clip of --data -> rows of hyps.jsonl, what made them; none off rank 0.

    Raises FileExistsError where --out holds part of another run, or of this one without --resume.
    """
    rank, world, device = model.setup(args)
    out = Path(args.out)
    utterances = data.read_manifest(args.data, language=args.language)
    weights = sorted(model.find_checkpoint(args.model).glob("*.safetensors"))
    flags = ("model", "language", "temperature", "seed", "max_new_tokens")
    made_with = {flag: getattr(args, flag) for flag in flags}
    files = map(str, (*args.data, *weights))  # one that was written again has another time
    made_with["files"] = {path: os.path.getmtime(path) for path in files}
    made_with["normaliser"] = data.METRIC
    note = out / "part.json"
    if rank == 0 and note.exists() and not (args.resume and data.read_json(note) == made_with):
        raise FileExistsError(f"{note} is of a run that was stopped: continue that with --resume, "
                              "its model, data and flags, or choose another --out")
    asr = model.load(args.model, device)
    model.check_languages(asr, utterances)
    if rank == 0:
        data.write_json(note, made_with)
    if world > 1:
        dist.barrier()  # rank 0 has looked before anybody writes
    transcribe_share(asr, utterances, args, rank, world)
    model.finish()  # waits for the others
    if rank > 0:
        return [], {}
    rows = read_parts(out)
    if len(rows) < len(utterances):
        raise ValueError(f"{out} holds {len(rows)} transcripts of {len(utterances)} clips: do all "
                         "nodes share it?")
    made_with["device"] = str(device)
    return [rows[i] for i in range(len(rows))], made_with


def transcribe_share(asr, utterances, args, rank, world) -> None:
    """Writes [place in --data, row] of this rank's clips to a part file, batch after batch.

    Clips of similar length go together. A batch of which a row is missing is decoded as a whole:
    it is the same after a resume, and on any number of processes.
    """
    out = Path(args.out)
    names = [Path(path).stem for path in args.data]
    if len(set(names)) < len(names):
        names = args.data
    sets = dict(zip(args.data, names))
    done = set(read_parts(out))
    order = np.argsort(utterances.durations, kind="stable").tolist()  # nan, unknown, comes last
    batches = [order[start:start + args.batch] for start in range(0, len(order), args.batch)]
    share = [batch for batch in batches[rank::world] if not done >= set(batch)]
    with (out / f"part-{rank}-{time.time_ns()}.jsonl").open("w", encoding="utf-8") as file:
        for batch in data.progress(len(share), "transcripts", "batch", rank, rows=share):
            clips = [utterances[i] for i in batch]
            found = transcribe_clips(asr, clips, args)
            for i, u in zip(batch, clips):
                manifest, _, _ = u.line.rpartition(":")
                row = {"id": u.id, "set": sets[manifest], "audio": u.audio, "text": u.text,
                       "language": u.language, "start": u.start_sec or None,
                       "duration": u.duration_sec, "speaker": u.speaker, "channel": u.channel}
                row = {key: value for key, value in row.items() if value is not None}
                row = count_errors(row | found[u.line])
                file.write(json.dumps([i, row], ensure_ascii=False) + "\n")
            file.flush()  # what is killed after this loses nothing


def read_parts(out) -> dict[int, dict]:
    """{place in --data: row} of OUT's part files, without half a line of a killed process."""
    rows = {}
    for path in out.glob("part-*.jsonl"):
        whole, _, _ = path.read_bytes().rpartition(b"\n")
        rows |= dict(map(json.loads, whole.splitlines()))
    return rows


def transcribe_clips(asr, clips, args) -> dict[str, dict]:
    """A forward -> {line in the manifest: "hyp", "stopped", "n_tokens", "audio_sec"} of each clip.

    A clip that can't be decoded has an empty transcript and the reason in "failed", or raises
    data.AudioError without --keep_going.
    """
    batch = data.load_batch(clips, (asr.n_mels,), for_training=False,
                            keep_going=args.keep_going)
    results = model.transcribe(asr, batch, args.max_new_tokens, args.temperature, args.seed)
    found = {}
    for u, result, n_frames in zip(batch.utterances, results, batch.n_frames.tolist()):
        found[u.line] = result | {"audio_sec": n_frames * data.HOP / data.SAMPLE_RATE}
    lost = [u for u in clips if u.line not in found]
    for u, (reason, message) in zip(lost, batch.rejected):  # in the same order
        print(f"not decoded: {message}", file=sys.stderr)
        found[u.line] = {"hyp": "", "stopped": True, "n_tokens": 0, "audio_sec": 0.0,
                         "failed": reason}
    return found


def print_transcripts(args) -> None:
    """What is said in each file of --audio."""
    _, _, device = model.setup(args)
    asr = model.load(args.model, device)
    for path in args.audio:
        u = data.Utterance(path, os.path.abspath(path), language=args.language, line="--audio")
        result = transcribe_clips(asr, [u], args)[u.line]
        cut = "" if result["stopped"] else " [cut at --max_new_tokens]"
        if "failed" not in result:
            print(f"{path}: {result['hyp']}{cut}")
    model.finish()


# ------------------------------------------------------------------------------------------ score

def count_errors(row) -> dict:
    """The row with the edit counts of its "hyp", if it has a "text"."""
    if "text" not in row:
        return row
    counts = data.edit_counts(row["text"], row["hyp"], row.get("language"))
    return row | counts._asdict() | {"errors": counts.errors}


def group_scored(rows) -> dict[tuple, list[dict]]:
    """{(set, language, metric): its rows that have a text}; of several, also all of them pooled."""
    groups = defaultdict(list)
    scored = [row for row in rows if "text" in row]
    for row in scored:
        language = row.get("language") or ""
        groups[row["set"], language, data.rate_name(language)].append(row)
    if len(groups) > 1:
        groups["all", "pooled", "pooled"] = scored
    return groups


def score(systems) -> list[dict]:
    """Prints and returns the entries of all sets and languages. systems: {name: rows}, in step."""
    groups = {name: group_scored(rows) for name, rows in systems.items()}
    first = next(iter(systems))
    entries = []
    for key, of_first in groups[first].items():
        name, language, metric = key
        print(f"\n{name} {language}: {metric}, % [95 %]; substituted + deleted + inserted")
        for system, group in groups.items():
            entry = {"system": system, "set": name, "language": language, "metric": metric}
            entry |= rates(group[key], of_first)
            entries.append(entry)
            line = ("{system:20} {rate:6.2f} [{low:.2f}, {high:.2f}]; "
                    "{substitutions} + {deletions} + {insertions}")
            if system != first:
                line += ("; below the first: {difference:+.2f} "
                         "[{difference_low:+.2f}, {difference_high:+.2f}]")
            print(line.format(**entry))
        print("{utterances} clips, {units} units; intervals over {resampled}".format(**entry))
    return entries


def rates(rows, first) -> dict:
    """The numbers of an entry, of rows with a text. first: the same clips of the first system."""
    entry = {"utterances": len(rows)}
    for key in ("substitutions", "deletions", "insertions", "errors", "units"):
        entry[key] = sum(row[key] for row in rows)
    errors = np.array([row["errors"] for row in rows])
    below = np.array([row["errors"] for row in first]) - errors
    units = [row["units"] for row in rows]
    speakers = [row.get("speaker") for row in rows]
    strata = [f"{row['set']} {row.get('language')}" for row in rows]  # several, if it is pooled
    entry["resampled"] = f"{len(set(speakers))} speakers"
    if not all(speakers) or len(set(speakers)) < 2:  # else: a speaker's clips share a voice
        speakers = None
        entry["resampled"] = f"{len(rows)} utterances"
    both = np.stack([errors, below], axis=1)                # (n, 2) on the same draws: paired
    drawn = data.bootstrap(both, np.stack([units, units], axis=1), speakers, strata)
    low, high = data.interval(100 * drawn)
    rate, difference = 100 * both.sum(0) / (entry["units"] or math.nan)
    entry |= {"rate": rate, "low": low[0], "high": high[0]}
    entry |= {"difference": difference, "difference_low": low[1], "difference_high": high[1]}
    entry["sentence_error"] = 100 * (errors > 0).mean()
    entry["set_audio_sec"] = sum(row.get("audio_sec", 0) for row in rows)
    return entry


def summarize(name, rows) -> dict:
    """Prints and returns summary.json, but for its provenance. name: the system's."""
    troubles = Counter(trouble(row) for row in rows)
    results = []
    for entry in score({name: rows}):  # of one system there is no difference
        results.append({k: v for k, v in entry.items() if not k.startswith("difference")})
    summary = {"results": results, "clips": len(rows)}
    summary["without_text"] = sum("text" not in row for row in rows)
    for reason in ("empty", "truncated", "failed"):
        summary[reason] = troubles[reason]
    print("{clips} clips: {empty} empty, {truncated} truncated, {failed} failed to decode and "
          "counted as deleted, {without_text} lines without a text".format(**summary))
    return summary


def trouble(row) -> str | None:
    """What looks wrong even without a reference: "failed", "empty", "truncated", or nothing."""
    if "failed" in row:
        return "failed"
    if not row["hyp"]:
        return "empty"
    return None if row["stopped"] else "truncated"


# ---------------------------------------------------------------------------------------- compare

def read_systems(paths) -> dict[str, list[dict]]:
    """{system: its rows that have a text}, clip by clip in the first system's order.

    A system is called by the folder of its hyps.jsonl, where that tells all of them apart, else by
    the path. Raises ValueError unless all hold the same clips with the same references.
    """
    names = [Path(path).absolute().parent.name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    systems = {}
    for name, path in zip(names, paths):
        systems[name] = {clip: row for clip, row in read_hyps(path).items() if "text" in row}
    first = systems[names[0]]
    for name, rows in systems.items():
        odd = first.keys() ^ rows.keys()
        if odd or not rows:
            raise ValueError(f"{names[0]} and {name}: {len(odd)} clips are not in both with one "
                             f"reference, such as {next(iter(odd), None)}")
    return {name: [rows[clip] for clip in first] for name, rows in systems.items()}


def read_hyps(path) -> dict[tuple, dict]:
    """{clip: its row} of a hyps.jsonl, errors counted anew. Raises ValueError naming the line."""
    rows = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        row = {"set": "test", "stopped": True}
        row |= {k: v for k, v in data.json_object(line, where).items() if v is not None}
        for key in {"id", "hyp"} | row.keys() & {"set", "text", "language", "audio"}:
            if not isinstance(row.get(key), str):
                raise ValueError(f"{where}: expected a string as {key!r}: {line[:60]!r}")
        if "audio" in row:
            row["audio"] = os.path.join(os.path.realpath(Path(path).parent), row["audio"])
        clip = (row["id"], row["set"], row.get("text"), row.get("language"))
        if clip in rows:
            raise ValueError(f"{where}: id {row['id']!r} occurs twice")
        rows[clip] = count_errors(row)
    return rows


def draw_rates(entries, path) -> None:
    """Every system's error rate as a dot with its interval, one panel per set and language."""
    from matplotlib.figure import Figure
    panels = defaultdict(list)
    for e in entries:
        panels[f"{e['set']} {e['language']}"].append(e)
    figure = Figure(figsize=(3.2 * len(panels) + 1, 2.6), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, chosen) in zip(axes, panels.items()):
        for e in chosen:
            axis.plot([e["low"], e["high"]], [e["system"]] * 2, color="tab:gray")
            axis.plot(e["rate"], e["system"], "o", color="tab:blue")
        axis.set(title=title, xlabel=f"{chosen[0]['metric']}, %", xlim=(0, None))
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)


# -------------------------------------------------------------------------------- what is written

def write_teacher_manifest(rows, path) -> None:
    """Transcripts as references, for the TD stage. What is left out is counted by reason."""
    folder = os.path.realpath(Path(path).parent)
    copied = ("language", "start", "duration", "speaker", "channel")
    kept = []
    left_out = Counter()
    for row in rows:
        if trouble(row):
            left_out[trouble(row)] += 1
            continue
        line = {key: row[key] for key in copied if key in row}
        line["id"] = f"{row['set']}/{row['id']}"  # two sets may have an id in common
        line["audio"] = os.path.relpath(row["audio"], folder)
        line["text"] = row["hyp"]
        kept.append(line)
    data.write_jsonl(path, kept)
    print(f"{path}: {len(kept)} transcripts kept; left out: {dict(left_out)}")


def provenance() -> dict:
    """What scored the transcripts: versions, commit (-dirty if changed since), command."""
    packages = ("torch", "torchaudio", "transformers", "numpy", "jiwer", "wetext", "kaldifst", "av")
    describe = "git describe --always --dirty --abbrev=40 --exclude='*'"
    commit = subprocess.run(describe, shell=True, cwd=Path(__file__).resolve().parent,
                            capture_output=True, text=True).stdout.strip()
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    return {"versions": versions, "commit": commit or None, "command": shlex.join(sys.argv)}


def errors_page(rows) -> str:
    """The 50 clips with the most errors: a player, and reference over transcript, as scored.

    The page loads nothing but the audio files, from where they lie.
    """
    wrong = [row for row in rows if row.get("errors")]
    page = ['<!doctype html><meta charset="utf-8"><title>Recognition errors</title>']
    for row in heapq.nlargest(50, wrong, key=lambda row: row["errors"]):
        ref = data.normalize(row["text"], row.get("language"))
        hyp = data.normalize(row["hyp"], row.get("language"))
        aligned = jiwer.visualize_alignment(jiwer.process_words(ref, hyp), show_measures=False,
                                            skip_correct=False, line_width=100)
        title = "{set} {id}: {errors} errors, {units} units".format(**row)
        begin = row.get("start", 0)
        end = begin + row.get("duration", math.inf)
        segment = f"#t={begin}" if end == math.inf else f"#t={begin},{end}"
        source = quote(row.get("audio", "")) + segment
        page.append(f'<h3>{escape(title)}</h3><audio controls preload="none" src="{source}">'
                    f"</audio><pre>{escape(aligned.removeprefix('=== SENTENCE 1 ==='))}</pre>")
    return "\n".join(page) + "\n"


if __name__ == "__main__":
    main(parse_args())
