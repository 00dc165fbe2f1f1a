"""Manifest in, transcripts and corpus error rates out.

  rate = (substitutions + deletions + insertions) / reference units, summed over the corpus. Units, by each line's language, of the text
  that data.normalize makes of both sides: characters (CER: zh, yue, ja, ko, th), words (WER), or one a CJK character and one a run of
  anything else (MER: zh-en, en-zh, ...). An empty reference counts its insertions. The 95 % interval resamples speakers where every
  line names one, else utterances.

    python evaluate.py --model runs/x/opd --data test.jsonl --out runs/x/eval
    torchrun --nproc_per_node 8 evaluate.py --model runs/x/opd --data aishell1.jsonl wenet_net.jsonl --out runs/x/eval
    python evaluate.py --model TEACHER --data pool.jsonl --out runs/x/td --as_manifest td.jsonl      # the teacher-data (TD) stage
    python evaluate.py --model runs/x/opd --audio a.wav b.flac                                       # transcripts of files, nothing else
    python evaluate.py --compare runs/base/hyps.jsonl runs/opd/hyps.jsonl                            # paired; no model
    python evaluate.py --rescore runs/x/eval/hyps.jsonl --out runs/x/again                           # the same numbers; no model

Decoding is greedy, and what comes out is scored as it is: empty, truncated and looping transcripts are counted and shown, never mended.
--out receives hyps.jsonl (a manifest with "hyp" and the counts added, in manifest order), summary.json (what it takes to repeat the
run) and errors.html (worst clips to read and hear, confusions, error rate by length; one file that loads nothing).
"""

import argparse
import base64
import hashlib
import html
import io
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from datetime import timedelta
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

import data
import model

FEW_SPEAKERS = 20  # below it, an interval over speakers is too narrow more often than it says
WORST = 30         # clips with a player in errors.html


# ---------------------------------------------------------------------------- transcripts

def check(sets) -> None:
    """Raise ValueError, before any work, for what could not be scored or written afterwards: {set: utterances}."""
    everything = [u for utterances in sets.values() for u in utterances]
    for u in everything:
        if u.text is not None and not u.language:
            raise ValueError(f"{u.line}: {u.id}: no 'language', which decides between words and characters")
    twice = [i for i, n in Counter(u.id for u in everything).items() if n > 1]
    if twice:
        raise ValueError(f"hyps.jsonl is one manifest: {len(twice)} ids stand in more than one set, such as {twice[0]!r}")


def gather(own, world) -> dict:
    """Every rank's {id: result} in one."""
    parts = [own] * world
    if world > 1:
        dist.all_gather_object(parts, own)
    return {i: result for part in parts for i, result in part.items()}


def transcribe(asr, utterances, args, rank, world, progress) -> dict[str, dict]:
    """{id: {"hyp", "stopped", "n_tokens"}} of all ranks. With --keep_going a clip that can't be decoded has "failed": its reason."""
    failed = {}
    for u in utterances[rank::world] if args.keep_going else []:  # decoded once more than needed; all ranks have to know
        try:
            data.load_audio(u, data.MAX_EVAL_SEC)
        except data.AudioError as error:
            print(f"counted as all deleted: {error}", file=sys.stderr)
            failed[u.id] = {"hyp": "", "stopped": True, "n_tokens": 0, "failed": error.reason}
    failed = gather(failed, world)
    usable = [u for u in utterances if u.id not in failed]
    return failed | gather(model.transcribe(asr, usable, rank, world, args.batch, args.max_new_tokens, progress), world)


def looping(hyp) -> bool:
    """True if the end repeats itself: its last max(4 n, 8) units or more have period n, for some n.

    Units are those of MER whatever the language, so "no no no no no no no no" and "哈哈哈哈哈哈哈哈" loop, and seven of each don't.
    """
    units = data.runs(data.words(hyp.lower()))
    for n in range(1, len(units) // 4 + 1):
        length = n
        while length < len(units) and units[-1 - length] == units[-1 - length + n]:
            length += 1
        if length >= max(4 * n, 8):
            return True
    return False


def transcribe_files(args, device) -> None:
    """Print what is said in each file."""
    utterances = [data.Utterance(name, os.path.abspath(name), language=args.language, line="--audio") for name in dict.fromkeys(args.audio)]
    try:
        for u in utterances:
            data.load_audio(u, data.MAX_EVAL_SEC)  # before the model is: it may take minutes
    except data.AudioError as error:
        raise SystemExit(str(error)) from None
    for name, result in sorted(model.transcribe(model.load(args.model, device), utterances, 0, 1, args.batch, args.max_new_tokens).items(),
                               key=lambda item: args.audio.index(item[0])):
        print((f"{name}: " if len(utterances) > 1 else "") + result["hyp"] + " [cut at --max_new_tokens]" * (not result["stopped"]))


# ---------------------------------------------------------------------------- scores

def count(row) -> dict:
    """The row with what is counted in its transcript; edit counts only where there is a reference."""
    edits = data.edit_counts(row["text"], row["hyp"], row["language"])._asdict() if "text" in row else {}
    return row | {"looping": looping(row["hyp"])} | edits


def score(utterances, results, name="test") -> list[dict]:
    """One row a clip: the manifest's fields, "hyp" and its counts. Missing ids raise."""
    missing = [u.id for u in utterances if u.id not in results]
    if missing:
        raise ValueError(f"{name}: {len(missing)} of {len(utterances)} clips have no transcript, such as {missing[0]!r}")
    rows = []
    for u in utterances:
        row = {"id": u.id, "set": name, "audio": u.audio, "text": u.text, "language": u.language, "duration": u.duration_sec,
               "start": u.start_sec, "speaker": u.speaker, **results[u.id]}
        rows.append(count({k: v for k, v in row.items() if v is not None and not (k == "start" and v == 0)}))
    return rows


def read_hyps(path) -> list[dict]:
    """Rows of a hyps.jsonl, counted again. Any JSON Lines with "id", "hyp", and for a score "text" and "language", will do."""
    rows, seen, path = [], set(), Path(path)
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            row = {"set": path.stem, "stopped": True} | {k: v for k, v in json.loads(line).items() if v is not None}
            lacking = {"id", "hyp", *(["language"] if "text" in row else [])} - set(row)
            if lacking or row["id"] in seen:
                raise ValueError(f"{path}:{number}: " + (f"no {sorted(lacking)[0]!r}" if lacking else f"id {row['id']!r} stands twice"))
            seen.add(row["id"])
            row["id"] = str(row["id"])
            if "audio" in row:
                row["audio"] = os.path.normpath(path.parent.absolute() / row["audio"])
            rows.append(count(row))
    if not rows:
        raise ValueError(f"{path}: no transcript in it")
    return rows


def errors(row) -> int:
    return row["substitutions"] + row["deletions"] + row["insertions"]


def speakers(rows) -> list[str] | None:
    """What to resample: a label a row; None, for the rows themselves, unless every one names its speaker and there are two or more."""
    names = [row.get("speaker") for row in rows]
    return names if all(names) and len(set(names)) > 1 else None


def by_language(rows) -> dict[str, list[dict]]:
    """Rows that have a reference."""
    groups = defaultdict(list)
    for row in rows:
        if "units" in row:
            groups[row["language"]].append(row)
    return dict(sorted(groups.items()))


def summarize(name, rows, audio_sec=None, seconds=None) -> list[dict]:
    """Corpus rates of one set, one entry a language. audio_sec and seconds are the whole set's."""
    entries = []
    for language, group in by_language(rows).items():
        counts, blocks = [data.Counts(*(row[field] for field in data.Counts._fields)) for row in group], speakers(group)
        low, high = data.bootstrap([c.errors for c in counts], [c.units for c in counts], blocks=blocks)
        entries.append({
            "set": name, "language": language, "metric": data.metric(language),
            "rate": data.error_rate(counts), "low": 100 * low, "high": 100 * high,
            "resampled": "speakers" if blocks else "utterances", "blocks": len(set(blocks or range(len(group)))),
            **{field: sum(getattr(c, field) for c in counts) for field in data.Counts._fields}, "utterances": len(group),
            "sentence_error": 100 * sum(c.errors > 0 for c in counts) / len(group), **troubles(group),
            "set_audio_sec": audio_sec, "set_seconds": seconds})
    return entries


def troubles(rows) -> dict:
    """Transcripts that look wrong without a reference. A clip that could not be decoded is failed, not empty."""
    return {"empty": sum(not row["hyp"] and "failed" not in row for row in rows), "truncated": sum(not row["stopped"] for row in rows),
            "looping": sum(row["looping"] for row in rows), "failed": sum("failed" in row for row in rows)}


def macro_average(entries) -> float | None:
    """Mean of the entries' rates: every set and language weighs the same, however long."""
    rates = [e["rate"] for e in entries if e["units"]]
    return sum(rates) / len(rates) if rates else None


def print_table(entries, rows) -> None:
    """One line a set (and language), then the macro average, what looks wrong, and what the numbers rest on."""
    if entries:
        width = max(12, *(len(e["set"]) + len(e["language"]) + 1 for e in entries))
        print(f"{'':{width}} {'utts':>6} {'units':>8} {'sub':>6} {'del':>6} {'ins':>6}  {'rate, %':25} sent.err     RTF")
    for e in entries:
        rtf = f"{e['set_seconds'] / e['set_audio_sec']:.4f}" if e["set_audio_sec"] else "-"
        print(f"{e['set'] + ' ' + e['language']:{width}} {e['utterances']:6} {e['units']:8} {e['substitutions']:6} {e['deletions']:6} "
              f"{e['insertions']:6}  {e['metric']} {e['rate']:6.2f} {'[%.2f, %.2f]' % (e['low'], e['high']):14} {e['sentence_error']:6.1f} %  {rtf:>6}")
    if macro_average(entries) is not None:
        few = any(e["resampled"] == "speakers" and e["blocks"] < FEW_SPEAKERS for e in entries)
        print(f"macro average {macro_average(entries):.2f} %; normaliser {data.NORMALISER}; 95 % intervals resample "
              + ", ".join(dict.fromkeys(f"{e['blocks']} {e['resampled']}" for e in entries)) + f" (unreliable below {FEW_SPEAKERS} speakers)" * few)
    n = troubles(rows)
    print(f"{len(rows)} clips: {n['empty']} empty, {n['truncated']} truncated, {n['looping']} looping, "
          f"{n['failed']} failed to decode{' and counted as all deleted' * (n['failed'] > 0)}")


def compare(path_a, path_b) -> list[dict]:
    """Paired differences of two hyps.jsonl of the same clips, one entry a set and language, and all pooled. Prints and returns them."""
    a, b = ({row["id"]: row for row in read_hyps(path) if "text" in row} for path in (path_a, path_b))
    other = sorted(set(a) ^ set(b)) or [i for i in a if (a[i]["text"], a[i]["language"]) != (b[i]["text"], b[i]["language"])]
    if other or not a:
        raise ValueError(f"{path_a} and {path_b}: {len(other)} clips are not in both with one reference, such as {other[:1]}")
    groups, entries = defaultdict(list), []
    for i, row in a.items():
        groups[f"{row['set']} {row['language']}"].append(i)
    if len(groups) > 1:
        groups["all, pooled"] = list(a)
    print(f"A {path_a}\nB {path_b}\n{'':16} {'utts':>6} {'units':>8} {'A, %':>7} {'B, %':>7}   A - B, points [95 % interval]   P(B better)")
    for name, ids in groups.items():
        units, blocks = sum(a[i]["units"] for i in ids), speakers([a[i] for i in ids])
        draws = 100 * data.bootstrap_rates([errors(a[i]) - errors(b[i]) for i in ids], [a[i]["units"] for i in ids], blocks=blocks)
        rate = lambda rows: 100 * sum(errors(rows[i]) for i in ids) / units if units else float("nan")
        low, high = np.percentile(draws, [2.5, 97.5]).tolist()
        e = {"set": name, "utterances": len(ids), "units": units, "a": rate(a), "b": rate(b), "difference": rate(a) - rate(b),
             "low": low, "high": high, "p_improvement": float((draws > 0).mean() + 0.5 * (draws == 0).mean()),
             "resampled": "speakers" if blocks else "utterances", "blocks": len(set(blocks or ids))}
        entries.append(e)
        print(f"{name:16} {len(ids):6} {units:8} {e['a']:7.2f} {e['b']:7.2f}   {'%+.2f [%+.2f, %+.2f]' % (e['difference'], low, high):30}   "
              f"{e['p_improvement']:.4f}   over {e['blocks']} {e['resampled']}" + ": too few" * bool(blocks and e["blocks"] < FEW_SPEAKERS))
    return entries


# ---------------------------------------------------------------------------- what is written

def teacher_manifest(rows, path, max_wer) -> None:
    """Transcripts as references: what SFT needs for the TD stage. What is left out is counted by reason."""
    kept, dropped = [], Counter()
    for r in rows:
        off = 100 * errors(r) / max(r["units"], 1) if "units" in r else 0.0
        reason = ("failed to decode" if "failed" in r else "empty" if not r["hyp"] else "cut at --max_new_tokens" if not r["stopped"]
                  else "looping" if r["looping"] else f"above --max_wer {max_wer:g}" if max_wer is not None and off > max_wer else None)
        if reason:
            dropped[reason] += 1
        else:
            kept.append({"id": r["id"], "audio": os.path.relpath(r["audio"], Path(path).absolute().parent), "text": r["hyp"]}
                        | {k: r[k] for k in ("language", "duration", "start", "speaker") if k in r})
    data.write_jsonl(path, kept)
    unchecked = sum("units" not in r for r in rows) if max_wer is not None else 0
    no_language = sum("language" not in r for r in kept)
    print(f"{path}: {len(kept)} transcripts kept; left out: {', '.join(f'{n} {why}' for why, n in dropped.most_common()) or 'none'}"
          + f"; {no_language} have no language, which sft.py will ask for" * (no_language > 0)
          + f"; {unchecked} had no reference to hold against --max_wer" * (unchecked > 0))


DECISIVE = "config.json generation_config.json tokenizer.json tokenizer_config.json vocab.json merges.txt".split()  # beside the weights


def provenance(args, device, world) -> dict:
    """What it takes to make the numbers again."""
    sha256 = lambda path: hashlib.file_digest(open(path, "rb"), "sha256").hexdigest()
    try:
        commit = subprocess.run(["git", "-C", Path(__file__).resolve().parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
                                capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # a machine without git
        commit = ""
    facts = {"normaliser": data.NORMALISER, "versions": {"python": platform.python_version()} | {
                 name: version(name) for name in ("torch", "torchaudio", "transformers", "jiwer", "numpy")},
             "commit": commit or None, "command": shlex.join(sys.argv)}
    if args.rescore:
        return facts | {"rescored": {args.rescore: sha256(args.rescore)}}
    return facts | {
        "model": args.model, "weights": {
            f.name: sha256(f) for f in sorted(model.find(args.model).iterdir()) if f.suffix == ".safetensors" or f.name in DECISIVE},
        "data": {path: sha256(path) for path in args.data},
        "decoding": {"search": "greedy", "max_new_tokens": args.max_new_tokens, "batch": args.batch, "keep_going": args.keep_going},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type, "processes": world}


def write(out, entries, rows, facts) -> None:
    """hyps.jsonl, summary.json, errors.html."""
    data.write_jsonl(out / "hyps.jsonl", [row | ({"audio": os.path.relpath(row["audio"], out.absolute())} if "audio" in row else {})
                                          for row in rows])
    entries = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in e.items()} for e in entries]  # NaN is no JSON
    summary = {"results": entries, "macro_average": macro_average(entries), "clips": len(rows), **troubles(rows), **facts}
    (out / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False), encoding="utf-8")
    (out / "errors.html").write_text(errors_page(entries, rows, facts), encoding="utf-8")


# ---------------------------------------------------------------------------- errors.html

STYLE = """
:root { color-scheme: light dark; --page: #fbfaf8; --card: #fff; --ink: #1d1d1f; --soft: #6e6e73; --line: #e3e1dc; --bar: #5b7fa6;
  --sub: #b35900; --sub-back: #ffedd5; --del: #b3261e; --del-back: #fde2e0; --ins: #1f5fae; --ins-back: #deebfb }
@media (prefers-color-scheme: dark) { :root { --page: #161618; --card: #202023; --ink: #ececee; --soft: #9c9ca3; --line: #37373c;
  --bar: #7ea3cc; --sub: #ffb266; --sub-back: #4a3013; --del: #ff9a92; --del-back: #4d1f1c; --ins: #8fc1ff; --ins-back: #1b3554 } }
body { margin: 2.5rem auto; max-width: 64rem; padding: 0 1.25rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, "Noto Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif }
h1 { font-size: 1.7rem; margin: 0 } h2 { font-size: 1.3rem; margin: 3rem 0 0 } h3 { font-size: 1rem; margin: 1.5rem 0 .5rem }
.soft { color: var(--soft); font-size: .875rem } .columns { display: flex; flex-wrap: wrap; gap: 0 3rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9375rem } th { font-weight: 500; color: var(--soft) }
td { border-top: 1px solid var(--line) } th, td { text-align: right; padding: .2rem .75rem .2rem 0 } td:first-child { text-align: left }
.clip { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1rem; margin: .8rem 0 }
.head { display: flex; flex-wrap: wrap; align-items: center; gap: .25rem 1rem } .head audio { height: 2rem; margin-left: auto }
.pair { display: inline-flex; flex-direction: column; text-align: center; vertical-align: top; margin: .35rem .15rem 0 0 }
.pair span { padding: 0 .3rem; border-radius: .25rem; min-height: 1.5em; min-width: .6em } .equal .h { color: var(--soft) }
.sub span { background: var(--sub-back); color: var(--sub) } .ins .h { background: var(--ins-back); color: var(--ins); text-decoration: underline }
.del .r { background: var(--del-back); color: var(--del); text-decoration: line-through }
svg { max-width: 100%; height: auto } svg text { fill: var(--ink); font-size: 12px; text-anchor: middle }
svg .n { fill: var(--soft) } svg rect { fill: var(--bar) } svg line { stroke: var(--line) }
"""


def clip(row) -> data.Utterance:
    return data.Utterance(row["id"], row.get("audio", ""), start_sec=row.get("start", 0.0), duration_sec=row.get("duration"))


def player(row) -> str:
    """The clip itself inside the page: 16 kHz, 16 bit, only the segment."""
    wav = io.BytesIO()
    try:
        soundfile.write(wav, data.load_audio(clip(row), data.MAX_EVAL_SEC), data.SAMPLE_RATE, format="WAV", subtype="PCM_16")
    except data.AudioError as error:
        return f'<span class="soft">no audio: {error.reason}</span>'
    return f'<audio controls preload="metadata" src="data:audio/wav;base64,{base64.b64encode(wav.getvalue()).decode()}"></audio>'


def length_chart(rows) -> str:
    """Error rate by clip length as bars: the rate above, seconds and the number of clips below."""
    bins, seconds = defaultdict(list), data.measure(map(clip, rows))
    step = next(s for s in (0.25, 0.5, 1, 2, 5, 10, 1e9) if max(seconds) / s <= 12)
    for row, second in zip(rows, seconds):
        bins[int(second / step)].append(data.Counts(*(row[field] for field in data.Counts._fields)))
    rates = {i: data.error_rate(counts) for i, counts in bins.items() if sum(c.units for c in counts)}
    first, width, bars = min(bins), 62 * (max(bins) - min(bins) + 1), ""
    for i, counts in sorted(bins.items()):
        x, height = 62 * (i - first) + 31, 120 * rates.get(i, 0.0) / max([*rates.values(), 1e-9])
        bars += (f'<rect x="{x - 22}" y="{150 - height:.1f}" width="44" height="{height:.1f}" rx="3"/>'
                 + (f'<text x="{x}" y="{144 - height:.1f}">{rates[i]:.1f}</text>' if i in rates else "")
                 + f'<text x="{x}" y="168">{i * step:g}–{(i + 1) * step:g}</text><text class="n" x="{x}" y="184">{len(counts)}</text>')
    return f'<svg viewBox="0 0 {width} 190" width="{width}"><line x1="0" x2="{width}" y1="150" y2="150"/>{bars}</svg>'


def language_section(rows, n_worst) -> str:
    """Lengths, confusions and the worst clips of one language."""
    e, found, language = html.escape, defaultdict(Counter), rows[0]["language"]
    aligned = {row["id"]: data.align(row["text"], row["hyp"], language) for row in rows}
    for kind, ref, hyp in (pair for pairs in aligned.values() for pair in pairs):
        found[kind][" → ".join(filter(None, (ref, hyp)))] += 1
    lists = "".join(f"<div><h3>{title}</h3><table>" + "".join(f"<tr><td>{e(what)}</td><td>{n}</td></tr>" for what, n in found[kind].most_common(8))
                    + "</table></div>" for kind, title in (("sub", "Substituted"), ("del", "Deleted"), ("ins", "Inserted")) if found[kind])
    cards, worst = "", sorted(filter(errors, rows), key=lambda row: (-errors(row), row["units"], row["id"]))[:n_worst]
    for row in worst:
        notes = ", ".join([row["set"], *filter(None, (row.get("speaker"), "" if row["stopped"] else "truncated", "looping" * row["looping"],
                                                      "failed to decode" * ("failed" in row)))])
        words = "".join(f'<span class="pair {kind}"><span class="r">{e(ref)}</span><span class="h">{e(hyp)}</span></span>'
                        for kind, ref, hyp in aligned[row["id"]])
        cards += (f'<div class="clip"><div class="head"><b>{e(row["id"])}</b><span>{errors(row)} errors, {row["units"]} units</span>'
                  f'<span class="soft">{e(notes)}</span>{player(row)}</div>{words}</div>')
    return (f'<h2>{e(language)}</h2><div class="columns"><div><h3>{data.metric(language)}, %, by seconds; number of clips</h3>{length_chart(rows)}'
            f"</div>{lists}</div><h3>The {len(worst)} clips with the most errors: reference above, transcript below</h3>{cards}")


def errors_page(entries, rows, facts) -> str:
    """One page that loads and runs nothing. Worst clips are shared out over the languages."""
    e, groups, n = html.escape, by_language(rows), troubles(rows)
    sections = "".join(language_section(group, max(5, WORST // len(groups))) for group in groups.values())
    table = "".join(f"<tr><td>{e(r['set'])} {e(r['language'])}</td>" + "".join(f"<td>{cell}</td>" for cell in (
        r["utterances"], r["units"], r["substitutions"], r["deletions"], r["insertions"],
        f"{r['metric']} <b>{r['rate']:.2f}</b> [{r['low']:.2f}, {r['high']:.2f}]", f"{r['sentence_error']:.1f}")) + "</tr>" for r in entries)
    head = "".join(f"<th>{cell}</th>" for cell in ("", "clips", "units", "sub", "del", "ins", "rate, % [95 % interval]", "sentences wrong, %"))
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; media-src data:">
<title>Recognition errors</title><style>{STYLE}</style></head><body>
<h1>Recognition errors</h1><p class="soft">{e(facts.get("model") or [*facts["rescored"]][0])} · normaliser {e(facts["normaliser"])}</p>
<table><tr>{head}</tr>{table}</table>
<p class="soft">{len(rows)} clips: {n["empty"]} empty, {n["truncated"]} truncated, {n["looping"]} looping, {n["failed"]} failed to decode</p>
<p><span class="pair sub"><span>substituted</span></span><span class="pair del"><span class="r">deleted</span></span>
<span class="pair ins"><span class="h">inserted</span></span></p>{sections}</body></html>
"""


# ---------------------------------------------------------------------------- main

@record  # torchrun then shows what stopped a process, at the end
def main(args) -> None:
    """Transcribe every set, score, print, write."""
    if args.compare:
        return compare(*args.compare)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    kind = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    if args.audio:
        return transcribe_files(args, device) if rank == 0 else None
    all_rows, entries = [], []
    if args.rescore:
        all_rows = read_hyps(args.rescore)
        for name in dict.fromkeys(row["set"] for row in all_rows):
            entries += summarize(name, [row for row in all_rows if row["set"] == name])
    else:
        if world > 1:
            dist.init_process_group("gloo", timeout=timedelta(days=7))  # finished transcripts travel as Python objects; no tensor does
        names = [Path(path).stem for path in args.data]
        sets = {name if names.count(name) == 1 else path: data.read_manifest(path) for name, path in zip(names, args.data)}
        check(sets)
        asr = model.load(args.model, device)
        for name, utterances in sets.items():
            began, bar = time.time(), tqdm(total=len(utterances), desc=name, unit="clip", disable=rank > 0,
                                           mininterval=0.5 if sys.stderr.isatty() else 20)
            advance = lambda n: bar.update(min(n * world, bar.total - bar.n))
            results = transcribe(asr, utterances, args, rank, world, advance)
            bar.close()
            seconds = time.time() - began
            if rank == 0:
                rows = score(utterances, results, name)
                entries += summarize(name, rows, sum(data.measure([u for u in utterances if "failed" not in results[u.id]])), seconds)
                all_rows += rows
    if rank == 0:
        print_table(entries, all_rows)
        write(Path(args.out), entries, all_rows, provenance(args, device, world))
        if args.as_manifest:
            teacher_manifest(all_rows, args.as_manifest, args.max_wer)
    if world > 1 and not args.rescore:
        dist.barrier()  # without it, gloo on a CPU may abort in the line below
        dist.destroy_process_group()


def parse_args(argv=None):
    """Flags -> namespace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = lambda flag, default, text, **kw: parser.add_argument(flag, default=default, help=f"{text} (default: {default})",
                                                                **(kw if "action" in kw else {"type": type(default)} | kw))
    add("--model", None, "checkpoint directory or Hub id, student or teacher", type=str)
    add("--data", None, "manifests to transcribe", type=str, nargs="+")
    add("--audio", None, "audio files to transcribe and print, instead of --data", type=str, nargs="+")
    add("--language", None, "language of --audio, for a teacher that wants to be told", type=str)
    add("--rescore", None, "hyps.jsonl to score again, instead of --model and --data", type=str)
    add("--compare", None, "hyps.jsonl of A and of B, on the same clips: paired difference", type=str, nargs=2)
    add("--out", None, "folder for hyps.jsonl, summary.json and errors.html", type=str)
    add("--as_manifest", None, "also write the transcripts as a manifest to train on", type=str)
    add("--max_wer", None, "leave out of --as_manifest what is further than this from its reference, percent", type=float)
    add("--keep_going", False, "count a clip that can't be decoded as all deleted, instead of stopping", action="store_true")
    add("--batch", 32, "utterances a forward")
    add("--max_new_tokens", 128, "longest transcript, tokens")
    add("--device", "auto", "where to run", choices=["auto", "cpu", "cuda"])
    args = parser.parse_args(argv)
    given = {flag for flag in ("model", "data", "audio", "rescore", "compare", "out") if getattr(args, flag)}
    if given not in ({"model", "data", "out"}, {"model", "audio"}, {"rescore", "out"}, {"compare"}):
        parser.error("one of these is needed: --model --data --out, --model --audio, --rescore --out, --compare")
    if args.max_wer is not None and not args.as_manifest:
        parser.error("--max_wer filters --as_manifest")
    return args


if __name__ == "__main__":
    main(parse_args())
