"""Manifest in, transcripts and corpus error rates out.

  rate = (substitutions + deletions + insertions) / reference units, summed over the corpus

Units are those of the text that data.normalize makes of both sides: a character of Chinese and of
other scripts without spaces, or a run of anything else. A line's language decides how its text is
normalised and what the rate is called, CER or WER; a line without one is counted all the same. An
empty reference counts its insertions. 95 % intervals resample speakers where every line names one,
else utterances.

  python evaluate.py --model runs/x/opd --data test.jsonl --out runs/x/eval
  torchrun --nproc_per_node 8 evaluate.py --model runs/x/opd --data a.jsonl b.jsonl --out runs/x/e
  python evaluate.py --model TEACHER --data pool.jsonl --out runs/x/td --as_manifest td.jsonl  # TD
  python evaluate.py --model runs/x/opd --audio a.wav b.flac               # only transcripts
  python evaluate.py --compare runs/base/hyps.jsonl runs/opd/hyps.jsonl    # with the first one
  python evaluate.py --rescore runs/x/eval/hyps.jsonl --out runs/x/again   # same numbers; no model

TD is teacher data: transcripts that become references for sft.py. Decoding is greedy; for
--as_manifest it may be sampled, from numbers keyed on (seed, utterance). A transcript
is scored as it is: empty and truncated ones are counted, never mended.

Every process appends its lines to OUT/part-RANK.jsonl, batch by batch; in the end they become
hyps.jsonl (rank 0 then holds all of them, 1.6 kB each). A run that was stopped goes on with
--resume, on any number of processes; each loses only its batch in progress. Nodes share --out.

hyps.jsonl: a manifest in the order of --data, with these keys added to each line
  set                   its manifest: the file's name without .jsonl
  hyp                   the transcript
  stopped, n_tokens     false if it was cut at --max_new_tokens; its length, end token included
  audio_sec, seconds    decoded audio and time taken (over all processes), each its batch's mean
  substitutions, deletions, insertions, errors, units    where the line has a text
  failed                only where the clip could not be decoded (--keep_going): the reason

summary.json
  results: one entry per set and language ("" where lines have none)
    set, language, metric             metric is WER or CER
    rate, low, high                   percent, with its interval; null where there is none
    resampled, blocks                 what the interval resamples, and how many of them
    substitutions, deletions, insertions, errors, units, utterances
    sentence_error                    percent of utterances with an error
    empty, truncated, failed          how many utterances
    set_audio_sec, set_seconds        sums over its utterances; loading the model is left out
  pooled: the same of all as one corpus
  clips, without_text, empty, truncated, failed    over all lines, with a text or without
  normaliser, versions, commit, command, model, weights, data, decoding, device, processes
                        what made the numbers; weights and data: bytes and time of each file
  rescored              what --rescore read, in place of model to processes

compare.json (--compare with --out, beside compare.png): one entry per set, language and system; of
several sets or languages also all pooled (set all, language and metric pooled)
  system, set, language, metric, rate, low, high, resampled, blocks, utterances, units
  difference, difference_low, difference_high    how far it is below the first system, points
  p_improvement         share of resampled corpora in which it has fewer errors, ties counting half

errors.html: the clips with the most errors, to read and to hear. One page that loads nothing.
"""

import argparse
import base64
import io
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
import wave
from collections import Counter, defaultdict
from html import escape
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

import data
import model
from data import at_least

MODES = {  # the flag that names a mode: those that it needs, those that it reads too
    "data": ({"model", "out"}, {"as_manifest", "temperature", "seed", "language", "keep_going",
                                "resume", "batch", "max_new_tokens", "device"}),
    "audio": ({"model"}, {"language", "keep_going", "max_new_tokens", "device"}),
    "rescore": ({"out"}, set()),
    "compare": (set(), {"out"}),
}


def parse_args(argv=None):
    """Flags -> namespace. A flag that the mode does not read is refused."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=data.HelpFormatter)
    add = parser.add_argument
    # what to do
    add("--model", help="checkpoint directory or Hub id, student or teacher")
    add("--data", nargs="+", help="manifests to transcribe")
    add("--audio", nargs="+", help="audio files to transcribe and print")
    add("--rescore", help="hyps.jsonl to score again")
    add("--compare", nargs="+", help="hyps.jsonl of several systems, same clips")
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
    add("--max_new_tokens", type=at_least(1), default=128, help="longest transcript, tokens")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="where to run")
    args = parser.parse_args(argv)
    given = {flag for flag, value in vars(args).items() if value != parser.get_default(flag)}
    modes = given & MODES.keys()
    if len(modes) != 1:
        parser.error("one of these is needed: --data, --audio, --rescore, --compare")
    mode = modes.pop()
    needed, read = MODES[mode]
    for flag in sorted(needed - given):
        parser.error(f"--{mode} needs --{flag}")
    for flag in sorted(given - needed - read - {mode}):
        parser.error(f"--{mode} does not read --{flag}")
    if args.compare and len(set(args.compare)) < max(2, len(args.compare)):
        parser.error("--compare wants two or more different files")
    if (args.temperature or args.seed) and not args.as_manifest:
        parser.error("--temperature and --seed go with --as_manifest: rates are of greedy decoding")
    return args


@record  # torchrun then shows what stopped a process, at the end
def main(args):
    """Does what the flags ask for, see the top of this file. Returns the entries of --compare."""
    if args.compare:
        return compare(args.compare, args.out)
    if args.audio:
        return print_transcripts(args)
    out = Path(args.out)
    outputs = [out / name for name in ("hyps.jsonl", "summary.json", "errors.html")]
    if args.as_manifest:
        outputs.append(args.as_manifest)
        if os.path.realpath(args.as_manifest) in map(os.path.realpath, args.data):
            raise ValueError(f"--as_manifest {args.as_manifest} would write over --data")
    data.check_writable(*outputs)
    if args.rescore:
        rows = read_hyps(args.rescore)
        facts = {"rescored": {args.rescore: stamp(args.rescore)}}
    else:
        rows, facts = transcribe_sets(args)
        if rows is None:
            return  # any rank but 0
    summary = summarize(rows) | provenance() | facts
    write_manifest(out / "hyps.jsonl", rows)
    data.write_json(out / "summary.json", summary)
    (out / "errors.html").write_text(errors_page(rows), encoding="utf-8")
    print_summary(summary)
    if args.as_manifest:
        write_teacher_manifest(rows, args.as_manifest)
    for path in out.glob("part-*.jsonl") if args.data else []:
        path.unlink()  # all is in hyps.jsonl


# ------------------------------------------------------------------------------------- transcribe

def transcribe_sets(args):
    """A transcript of every clip of --data -> rows of hyps.jsonl, provenance; None off rank 0.

    Raises FileExistsError where a run into OUT was stopped and --resume is not given.
    """
    rank, world, device = model.setup(args)
    out = Path(args.out)
    stems = [Path(path).stem for path in args.data]
    sets = {}
    for path, stem in zip(args.data, stems):
        utterances = data.read_manifest(path, language=args.language)
        sets[stem if stems.count(stem) == 1 else path] = utterances
        if rank == 0 and all(u.text is None for u in utterances):
            print(f'{path}: NO LINE HAS A "text": it is transcribed, not scored', file=sys.stderr)
    folder = model.find_checkpoint(args.model)
    made_with = {
        "model": args.model,
        "weights": {file.name: stamp(file) for file in sorted(folder.glob("*.safetensors"))},
        "data": {path: stamp(path) for path in args.data},
        "decoding": {"temperature": args.temperature, "seed": args.seed,
                     "max_new_tokens": args.max_new_tokens,
                     "language": args.language},
        "normaliser": data.METRIC,
    }
    out.mkdir(parents=True, exist_ok=True)
    done = set(read_parts(out, made_with) if rank == 0 else [])
    if done and not args.resume:
        raise FileExistsError(f"{out} holds transcripts of a run that was stopped: continue it "
                              "with --resume, or choose another --out")
    if world > 1:  # rank 0 looks into OUT before anybody writes
        shared = [made_with, done]
        dist.broadcast_object_list(shared)
        made_with, done = shared

    asr = model.load(args.model, device)
    for utterances in sets.values():
        model.check_languages(asr, utterances)
    with (out / f"part-{rank}.jsonl").open("a", encoding="utf-8") as file:
        if file.tell() == 0:
            file.write(json.dumps(made_with) + "\n")
        for name, utterances in sets.items():
            transcribe_set(asr, name, utterances, done, file, args, rank, world)
    model.finish()  # waits for the others
    if rank > 0:
        return None, None
    results = read_parts(out, made_with)
    rows = []
    for name, utterances in sets.items():
        for u in utterances:
            if (name, u.id) not in results:
                raise ValueError(f"{u.line}: no transcript of {u.id!r}; do all nodes share --out?")
            rows.append(results[name, u.id])
    made_with["decoding"] |= {"batch": args.batch, "keep_going": args.keep_going}
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return rows, made_with | {"device": place, "processes": world}


def transcribe_set(asr, name, utterances, done, file, args, rank, world) -> None:
    """Appends this rank's share of a set to its part file, batch after batch.

    done: (set, id) of the clips that have a transcript. Clips of similar length go together.
    Batches are cut before those clips are left out: a resumed run, and any number of processes,
    decodes the same batches.
    """
    order = np.argsort(utterances.durations, kind="stable")  # nan, unknown, comes last
    batches = []
    for start in range(0, len(order), args.batch):
        missing = [i for i in order[start:start + args.batch]
                   if not done or (name, utterances[i].id) not in done]
        if missing:
            batches.append(missing)
    bar = data.progress(len(order), name, "clip", rank, len(order) - sum(map(len, batches)))
    for indices in batches[rank::world]:
        began = time.time()
        clips = [utterances[i] for i in indices]
        results, audio_sec = transcribe_clips(asr, clips, args)
        share = {"audio_sec": audio_sec / len(clips),
                 "seconds": (time.time() - began) / world / len(clips)}
        for u in clips:
            row = {"id": u.id, "set": name, "audio": u.audio, "text": u.text,
                   "language": u.language, "start": u.start_sec or None,
                   "duration": u.duration_sec, "speaker": u.speaker, "channel": u.channel}
            row = {key: value for key, value in row.items() if value is not None}
            row = count_errors(row | results[u.id] | share)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()  # what is killed after this loses nothing
        bar.update(min(len(clips) * world, bar.total - bar.n))  # the others do about as much
    bar.close()


def transcribe_clips(asr, clips, args) -> tuple[dict[str, dict], float]:
    """A forward's transcripts -> {id: {"hyp", "stopped", "n_tokens"}}, seconds of audio.

    A clip that can't be decoded has an empty transcript and the reason in "failed", or raises
    data.AudioError without --keep_going.
    """
    batch = data.load_batch(clips, (asr.n_mels,), args.keep_going, data.MAX_EVAL_SEC,
                            for_training=False)
    results = model.transcribe(asr, batch, args.max_new_tokens, args.temperature, args.seed)
    results = {u.id: result for u, result in zip(batch.utterances, results)}
    for clip, reason, message in batch.rejected:
        print(f"not decoded: {message}", file=sys.stderr)
        results[clip] = {"hyp": "", "stopped": True, "n_tokens": 0, "failed": reason}
    return results, batch.audio_sec


def read_parts(out, made_with) -> dict[tuple[str, str], dict]:
    """{(set, id): row} of OUT's part files. Half a line of a killed process is cut off.

    A file begins with what makes its transcripts. Raises ValueError if that is not `made_with`.
    """
    rows = {}
    for path in sorted(out.glob("part-*.jsonl")):
        with path.open("r+b") as file:
            lines = [line for line in file if line.endswith(b"\n")]
            file.truncate(sum(map(len, lines)))
        if not lines:
            continue
        first, *found = map(json.loads, lines)
        changed = [key for key in made_with if first.get(key) != made_with[key]]
        if changed:
            raise ValueError(f"{path} was made with another {', '.join(changed)}, see its first "
                             "line: choose another --out")
        rows |= {(row["set"], row["id"]): row for row in found}
    return rows


def print_transcripts(args) -> None:
    """What is said in each file of --audio. Exits with one line if a file can't be decoded."""
    _, _, device = model.setup(args)
    asr = model.load(args.model, device)
    for path in args.audio:
        u = data.Utterance(path, os.path.abspath(path), language=args.language, line="--audio")
        try:
            result = transcribe_clips(asr, [u], args)[0][path]
        except data.AudioError as error:
            raise SystemExit(str(error)) from None
        name = f"{path}: " if len(args.audio) > 1 else ""
        cut = "" if result["stopped"] else " [cut at --max_new_tokens]"
        if "failed" not in result:
            print(name + result["hyp"] + cut)
    model.finish()


# ------------------------------------------------------------------------------------------ score

def read_hyps(path) -> list[dict]:
    """The rows of a hyps.jsonl, counted anew, with absolute audio paths.

    Any JSON Lines with "id" and "hyp" will do. Raises ValueError naming the line.
    """
    path, rows = Path(path), {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            found = dict(json.loads(line.decode("utf-8-sig")))
        except (TypeError, ValueError):
            raise ValueError(f"{where}: expected a JSON object, found {line[:60]!r}") from None
        row = {"set": "test", "stopped": True}
        row |= {key: value for key, value in found.items() if value is not None}
        for key in ("id", "hyp", "text", "language", "set", "speaker", "audio"):
            if not isinstance(row.get(key, ""), str) or key in ("id", "hyp") and key not in row:
                raise ValueError(f"{where}: expected a string as {key!r}, found {row.get(key)!r}")
        if (row["set"], row["id"]) in rows:
            raise ValueError(f"{where}: id {row['id']!r} occurs twice")
        if "audio" in row:
            row["audio"] = data.audio_path(os.path.realpath(path.parent), row["audio"])
        rows[row["set"], row["id"]] = count_errors(row)
    if not rows:
        raise ValueError(f"{path}: no transcript in it")
    return list(rows.values())


def count_errors(row) -> dict:
    """The row with the edit counts of its "hyp", if it has a "text"."""
    if "text" not in row:
        return row
    counts = data.edit_counts(row["text"], row["hyp"], row.get("language"))
    return row | counts._asdict() | {"errors": counts.errors}


def count_troubles(rows) -> dict[str, int]:
    """How many rows look wrong even without a reference. A failed one is not empty."""
    failed = sum("failed" in row for row in rows)
    return {"empty": sum(not row["hyp"] for row in rows) - failed,
            "truncated": sum(not row["stopped"] for row in rows), "failed": failed}


def rate_of(errors, rows) -> tuple[float, np.ndarray, dict]:
    """100 sum(errors) / sum(units), never a mean of rates; its resampled values (draws,); of what.

    errors: one number a row. nan without a unit. Utterances of a speaker share a voice and a
    microphone: speakers are drawn if every row names one and there are two or more.
    """
    errors, units = np.array(errors), np.array([row["units"] for row in rows])
    speakers = [row.get("speaker") for row in rows]
    resampled, blocks = "utterances", list(range(len(rows)))
    if all(speakers) and len(set(speakers)) > 1:
        resampled, blocks = "speakers", speakers
    rate = 100 * float(errors.sum()) / float(units.sum()) if units.any() else math.nan
    draws = 100 * data.bootstrap(errors, units, blocks)
    return rate, draws, {"resampled": resampled, "blocks": len(set(blocks))}


def corpus_rate(rows) -> dict:
    """Error rate in percent, its 95 % interval, and what that rests on."""
    rate, draws, basis = rate_of([row["errors"] for row in rows], rows)
    low, high = data.interval(draws)
    return {"rate": rate, "low": low, "high": high, **basis,
            "units": sum(row["units"] for row in rows), "utterances": len(rows)}


def group_scored(rows) -> dict[tuple[str, str, str], list[dict]]:
    """{(set, language, metric): its rows that have a text}; of several, also all of them pooled."""
    groups = defaultdict(list)
    scored = [row for row in rows if "text" in row]
    for row in scored:
        language = row.get("language", "")
        groups[row["set"], language, data.rate_name(language)].append(row)
    if len(groups) > 1:
        groups["all", "pooled", "pooled"] = scored
    return groups


def summarize(rows) -> dict:
    """summary.json but for its provenance."""
    entries = []
    for (name, language, metric), group in group_scored(rows).items():
        entry = {"set": name, "language": language, "metric": metric} | corpus_rate(group)
        for key in ("substitutions", "deletions", "insertions", "errors"):
            entry[key] = sum(row[key] for row in group)
        entry["sentence_error"] = 100 * sum(row["errors"] > 0 for row in group) / len(group)
        entry["set_audio_sec"] = sum(row.get("audio_sec", 0) for row in group)
        entry["set_seconds"] = sum(row.get("seconds", 0) for row in group)
        entries.append(entry | count_troubles(group))
    pooled = entries[-1] if entries and entries[-1]["units"] else None
    entries = [e for e in entries if e["metric"] != "pooled"]
    return {"results": entries, "pooled": pooled, "clips": len(rows),
            "without_text": sum("text" not in row for row in rows), **count_troubles(rows)}


def bracket(entry, low="low", high="high", form=".2f") -> str:
    """[low, high], or - where there is no interval."""
    return "-" if math.isnan(entry[low]) else f"[{entry[low]:{form}}, {entry[high]:{form}}]"


def basis_of(entry) -> str:
    """What an interval rests on. Over few speakers it misses the true rate too often."""
    few = entry["resampled"] == "speakers" and entry["blocks"] < 20
    return f"{entry['blocks']} {entry['resampled']}" + few * " (too few to rely on the interval)"


def print_summary(summary) -> None:
    """A line per set and language, one for all pooled, and what looks wrong."""
    for e in summary["results"]:
        speed = e["set_seconds"] / e["set_audio_sec"] if e["set_audio_sec"] else math.nan
        print(f"{e['set']} {e['language']}: {e['metric']} {e['rate']:.2f} % {bracket(e)} over "
              f"{basis_of(e)}; {e['substitutions']} substituted, {e['deletions']} deleted, "
              f"{e['insertions']} inserted of {e['units']}; {e['sentence_error']:.1f} % of "
              f"{e['utterances']} sentences; real-time factor {speed:.4f}")
    if summary["pooled"]:
        print(f"all pooled: {summary['pooled']['rate']:.2f} % {bracket(summary['pooled'])}; "
              f"normaliser {summary['normaliser']}")
    print(f"{summary['clips']} clips: {summary['empty']} empty, {summary['truncated']} truncated, "
          f"{summary['failed']} failed to decode and counted as deleted, "
          f"{summary['without_text']} lines without a text")


# ---------------------------------------------------------------------------------------- compare

def compare(paths, out=None) -> list[dict]:
    """Prints and returns the entries of compare.json; with `out`, writes it and compare.png."""
    if out:
        data.check_writable(Path(out) / "compare.json", Path(out) / "compare.png")
    systems = {name: group_scored(rows) for name, rows in read_systems(paths).items()}
    first = next(iter(systems))
    width = max(map(len, systems))
    entries = []
    for key, reference in systems[first].items():
        name, language, metric = key
        print(f"\n{name} {language}: {metric}, % [95 % interval]; below {first}, points; P(better)")
        for system, groups in systems.items():
            e = {"system": system, "set": name, "language": language, "metric": metric}
            e |= compare_rows(reference, groups[key])
            entries.append(e)
            gain = bracket(e, "difference_low", "difference_high", "+.2f")
            print(f"{system:{width}}  {e['rate']:.2f} {bracket(e):18} "
                  f"{e['difference']:+.2f} {gain:18} {e['p_improvement']:.4f}")
        print(f"{e['utterances']} clips, {e['units']} units; intervals over {basis_of(e)}")
    if out:
        data.write_json(Path(out) / "compare.json", entries)
        draw_rates(entries, Path(out) / "compare.png")
    return entries


def read_systems(paths) -> dict[str, list[dict]]:
    """{system: its rows that have a text}, clip by clip in the first system's order.

    A system is called by the folder of its hyps.jsonl, where that tells all of them apart, else by
    the path. Raises ValueError unless all hold the same clips with the same references.
    """
    names = [Path(path).absolute().parent.name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    systems = {name: {} for name in names}
    for name, path in zip(names, paths):
        for row in read_hyps(path):
            if "text" in row:
                text = " ".join(row["text"].split())  # as data.read_manifest has it
                systems[name][row["id"], row["set"], text, row.get("language")] = row
    first = systems[names[0]]
    for name, rows in systems.items():
        odd = sorted({clip for clip, *_ in first.keys() ^ rows.keys()})
        if odd or not first:
            raise ValueError(f"{paths[0]} and {name}: {len(odd)} clips are not in both with one "
                             f"reference, such as {odd[:1]}")
    return {name: [rows[clip] for clip in first] for name, rows in systems.items()}


def compare_rows(reference, rows) -> dict:
    """Rate of one system, and what it gains on the reference system: a paired bootstrap.

    Both hold the same clips in the same order.
    """
    gained = [a["errors"] - b["errors"] for a, b in zip(reference, rows, strict=True)]
    difference, gains, _ = rate_of(gained, reference)
    low, high = data.interval(gains)
    known = gains[~np.isnan(gains)]
    better = ((known > 0) + 0.5 * (known == 0)).sum() / max(1, len(known))  # a tie: for neither
    return corpus_rate(rows) | {
        "difference": difference, "difference_low": low, "difference_high": high,
        "p_improvement": math.nan if math.isnan(low) else float(better)}


def draw_rates(entries, path) -> None:
    """Every system's error rate as a dot with its interval, one panel per set and language."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    panels = list(dict.fromkeys((e["set"], e["language"]) for e in entries))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3.2 * len(panels) + 1, 2.6),
                                   sharey=True, layout="constrained", squeeze=False)
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


# -------------------------------------------------------------------------------- what is written

def write_manifest(path, rows) -> None:
    """Rows as JSON Lines, their audio relative to the file's folder."""
    folder = os.path.realpath(Path(path).parent)
    moved = []
    for row in rows:
        if "audio" in row:
            row = row | {"audio": os.path.relpath(row["audio"], folder)}
        moved.append(row)
    data.write_jsonl(path, moved)


def write_teacher_manifest(rows, path) -> None:
    """Transcripts as references, for the TD stage. What is left out is counted by reason."""
    kept, notes = [], Counter()
    repeated = len({row["id"] for row in rows}) < len(rows)  # two sets may share one
    for row in rows:
        reason = unfit_to_teach(row)
        if reason:
            notes[f"left out: {reason}"] += 1
            continue
        line = {key: row[key] for key in ("id", "audio", "language", "start", "duration", "speaker",
                                          "channel") if key in row}
        if repeated:
            line["id"] = f"{row['set']}/{row['id']}"
        kept.append(line | {"text": row["hyp"]})
        notes["kept without a language"] += "language" not in row
    write_manifest(path, kept)
    said = [f"; {n} {what}" for what, n in notes.most_common() if n]
    print(f"{path}: {len(kept)} transcripts kept", *said, sep="")


def unfit_to_teach(row) -> str | None:
    """Why a transcript should not become a reference; None if it may."""
    if "failed" in row:
        return "failed to decode"
    if not row["hyp"]:
        return "empty"
    if not row["stopped"]:
        return "cut at --max_new_tokens"
    return None


def stamp(path) -> dict:
    """Size and time of a file: a file that was written again has another."""
    found = os.stat(path)
    return {"bytes": found.st_size, "modified": str(np.datetime64(found.st_mtime_ns, "ns"))}


def provenance() -> dict:
    """What scored the transcripts: metric, versions, commit (-dirty if changed since), command."""
    packages = ("torch", "torchaudio", "transformers", "numpy", "jiwer", "wetext", "kaldifst", "av")
    describe = ["git", "-C", Path(__file__).resolve().parent,
                "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = None
    if shutil.which("git"):
        commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None
    return {"normaliser": data.METRIC, "commit": commit, "command": shlex.join(sys.argv),
            "versions": {"python": platform.python_version()}
                        | {name: version(name) for name in packages}}


PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; media-src data:">
<title>Recognition errors</title><style>
:root { color-scheme: light dark }
body { margin: 2rem auto; max-width: 64rem; font: 16px/1.5 system-ui, sans-serif }
.pair { display: inline-flex; flex-direction: column; text-align: center; margin-right: .4rem }
.pair span { padding: 0 .2rem; min-height: 1.5em; min-width: .6em }
.equal { opacity: .6 }
.substitute { background: #f806 }
.delete { background: #f446; text-decoration: line-through }
.insert { background: #48f6; text-decoration: underline }
</style></head><body><h1>Clips with the most errors</h1><p>Reference above, transcript below.</p>
"""


def errors_page(rows) -> str:
    """One page that loads and runs nothing: the worst clips, unit by unit, with a player each."""
    wrong = [row for row in rows if row.get("errors")]
    wrong.sort(key=lambda row: -row["errors"])
    page = [PAGE]
    for row in wrong[:30]:
        said = f"{row['set']} {row.get('language', '')} {row.get('speaker', '')}"
        page.append(f"<h3>{escape(row['id'])}</h3><p>{escape(said)} {row['errors']} errors, "
                    f"{row['units']} units {player(row)}</p>")
        for kind, ref, hyp in data.align(row["text"], row["hyp"], row.get("language")):
            page.append(f'<span class="pair {kind}"><span>{escape(ref)}</span>'
                        f"<span>{escape(hyp)}</span></span>")
    return "".join(page) + "</body></html>"


def player(row) -> str:
    """The clip itself inside the page: 16 kHz, 16 bit, only the segment."""
    if "audio" not in row:
        return ""
    u = data.Utterance(row["id"], row["audio"], start_sec=row.get("start", 0.0),
                       duration_sec=row.get("duration"), channel=row.get("channel"))
    try:
        audio = data.load_audio(u, data.MAX_EVAL_SEC, for_training=False)
    except data.AudioError as error:
        return f"(no audio: {error.reason})"
    file = io.BytesIO()
    with wave.open(file, "wb") as wav:
        wav.setparams((1, 2, data.SAMPLE_RATE, 0, "NONE", ""))
        wav.writeframes((audio.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
    source = "data:audio/wav;base64," + base64.b64encode(file.getvalue()).decode()
    return f'<audio controls preload="metadata" src="{source}"></audio>'


if __name__ == "__main__":
    main(parse_args())
