"""sft.py and distill.py as they are run: updates, processes, resume, stops, what is read and what is written.

    pytest tests/test_training.py

Runs are of a few steps on clips of a second. Most are made in this process; torchrun and SIGTERM need real ones (some 10 s each).
"""

import gc
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import data
import distill
import evaluate
import model
import overlap
import sft

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(autouse=True)
def default_sigterm():
    """The scripts install a handler for SIGTERM; pytest keeps its own."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def words(common, changes):
    """{"batch": 4, "resume": True, "ctc": None} -> --batch 4 --resume; None leaves a flag out."""
    line = []
    for flag, value in (common | changes).items():
        if value is True:
            line += [f"--{flag}"]
        elif value is not None:
            line += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return line


COMMON = {"device": "cpu", "workers": 0, "log_every": 1, "eval_every": 1000, "save_every": 1000, "steps": 2, "batch": 8, "micro_batch": 8,
          "warmup": 2, "eval_batch": 4}


def sft_words(corpus, checkpoints, out, **changes):
    return words(COMMON | {"data": [corpus / "train.jsonl"], "student": checkpoints / "student", "out": out, "lr": 1e-3}, changes)


def distil_words(corpus, checkpoints, out, **changes):
    return words(COMMON | {"data": corpus / "train.jsonl", "student": checkpoints / "student", "teacher": checkpoints / "teacher", "out": out,
                           "lr": 1e-3, "max_new_tokens": 8}, changes)


def run_sft(*args, **changes):
    sft.main(sft.parse_args(sft_words(*args, **changes)))


def run_distil(*args, **changes):
    distill.distil(distill.parse_args(distil_words(*args, **changes)))


RUNS = {"sft": (run_sft, {"ctc": 0.3, "spec_augment": True}), "distill": (run_distil, {})}
both = pytest.mark.parametrize("script", ["sft", "distill"])


def metrics(out, key="loss"):
    """Rows of metrics.jsonl that have `key`."""
    return [row for row in map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines()) if key in row]


def weights(out):
    return (Path(out) / "model.safetensors").read_bytes()


def states(out):
    return sorted(p.name for p in (Path(out) / "state").iterdir())


def subset(corpus, path, n, **changes):
    """The first n lines of train.jsonl as a manifest elsewhere; changes: keys to set, None to drop."""
    rows = [json.loads(line) for line in (corpus / "train.jsonl").read_text(encoding="utf-8").splitlines()[:n]]
    rows = [{k: v for k, v in (row | changes | {"audio": str(corpus / row["audio"])}).items() if v is not None} for row in rows]
    data.write_jsonl(path, rows)
    return path


def brief(corpus, path, n):
    """The same with transcripts so short that CTC finds room for most of them in a third of a second, of unequal length all the same."""
    rows = [json.loads(line) for line in subset(corpus, path, n).read_text(encoding="utf-8").splitlines()]
    texts = ["it", "put", "the", "hide it"]
    data.write_jsonl(path, [row | {"text": texts[i % 4], "language": "en"} for i, row in enumerate(rows)])
    return path


def torchrun(script, arguments):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / script, *arguments],
                          env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


# ---------------------------------------------------------------------------- (a) the update, whatever it is cut into

@both
def test_the_arithmetic_of_a_gpu_runs(corpus, checkpoints, tmp_path, monkeypatch, script):
    # bf16 autocast on the CPU: no GPU here, but mixed dtypes clash in the same places (RoPE's fp32 keys in the cache, the CTC head).
    run, own = RUNS[script]
    run(corpus, checkpoints, tmp_path / "fp32", steps=1, **own)
    monkeypatch.setattr(model.ASR, "autocast", lambda asr: torch.autocast("cpu", torch.bfloat16))
    run(corpus, checkpoints, tmp_path / "bf16", steps=1, dev=corpus / "dev.jsonl", **own)
    one, two = metrics(tmp_path / "fp32")[0], metrics(tmp_path / "bf16")[0]
    assert one["loss"] != two["loss"] and math.isfinite(two["grad_norm"])
    if script == "sft":  # distill's rollouts may part at the first token that bf16 draws differently
        assert two["loss"] == pytest.approx(one["loss"], rel=0.05)


@both
def test_micro_batches_do_not_change_the_update(corpus, checkpoints, tmp_path, script):
    run, own = RUNS[script]
    pool = brief(corpus, tmp_path / "brief.jsonl", 24)
    for size in (8, 3):
        run(corpus, checkpoints, tmp_path / str(size), data=pool, micro_batch=size, lr=1e-4, **own)
    whole, cut = metrics(tmp_path / "8"), metrics(tmp_path / "3")
    assert [row["tokens"] for row in whole] == [row["tokens"] for row in cut] and len(whole) == 2
    for key in ("loss", "grad_norm"):
        assert whole[0][key] == pytest.approx(cut[0][key], rel=1e-5)
    assert [row["lr"] for row in whole] == pytest.approx([0.5e-4, 1e-4])  # two steps of warm-up
    a, b = (load_file(tmp_path / size / "model.safetensors") for size in ("8", "3"))
    before = load_file(checkpoints / "student" / "model.safetensors")
    for name in a:
        assert (a[name] - before[name]).abs().max() > 1e-6, f"{name} did not move"
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5, msg=name)


def test_first_loss_of_sft_is_a_mean_over_all_response_tokens(corpus, checkpoints, student, tmp_path):
    """Every clip alone, without padding: sum of -log p over text and EOS, divided by the number of both."""
    run_sft(corpus, checkpoints, tmp_path / "run", steps=1, batch=24, micro_batch=5)
    total, count = 0.0, 0
    for u in data.read_manifest(corpus / "train.jsonl"):
        response = student.tokenizer.encode(u.text) + [student.eos_id]
        ids = torch.tensor([response])
        with torch.no_grad():
            hidden = model.response_hidden(student, model.encode(student, data.load_batch([u])), ids, torch.ones_like(ids, dtype=torch.bool))
            logp = student.head(hidden).masked_fill(student.blocked, -math.inf).log_softmax(-1)
        total, count = total - sum(logp[i, token].item() for i, token in enumerate(response)), count + len(response)
    row, = metrics(tmp_path / "run")
    assert row["tokens"] == count and row["loss"] == pytest.approx(total / count, rel=1e-5)


def test_first_loss_of_distill_is_the_mean_divergence_on_own_words(corpus, checkpoints, student, teacher, tmp_path):
    """One clip at a time, one prefix at a time, transformers' forward without cache or padding: loss, agreement, entropy, tokens."""
    def logits(asr, mel, n_frames, written):
        audio, _ = asr.net.audio_encoder(mel, n_frames)
        embed = lambda ids: asr.body.embed_tokens(torch.tensor([ids], dtype=torch.long))
        columns = torch.cat([embed(asr.prefix_ids), audio, embed(asr.suffix_ids + written)], dim=1)
        return asr.net.lm(inputs_embeds=columns).logits[0, -1].double().masked_fill(asr.blocked, -math.inf)

    run_distil(corpus, checkpoints, tmp_path / "run", steps=1, batch=7, micro_batch=3, data=subset(corpus, tmp_path / "pool.jsonl", 7), seed=4)
    divergences, entropies, agree, stopped = [], [], 0, 0
    with torch.no_grad():
        for u in data.read_manifest(tmp_path / "pool.jsonl"):
            clip, written = data.load_batch([u]), []
            for uniform in data.keyed_uniforms(4, 0, [u.id], 8)[0]:
                z_s, z_t = (logits(asr, clip.mel, clip.n_frames, written) for asr in (student, teacher))
                p_s, p_t = z_s.softmax(-1), z_t.softmax(-1)
                divergences.append(sum(s * math.log(s / t) for s, t in zip(p_s.tolist(), p_t.tolist()) if s > 0))
                entropies.append(-sum(s * math.log(s) for s in p_s.tolist() if s > 0))
                agree += int(z_s.argmax() == z_t.argmax())
                written.append(int((p_s.cumsum(-1) > uniform).nonzero()[0]))
                if written[-1] == student.eos_id:
                    stopped += 1
                    break
    row, = metrics(tmp_path / "run")
    n = len(divergences)
    assert 0 < stopped < 7, "the row that predicts EOS is among those that count: some rollouts must have one"
    assert row["tokens"] == n and row["tokens_per_clip"] == pytest.approx(n / 7) and row["truncated"] == pytest.approx(1 - stopped / 7)
    assert row["loss"] == pytest.approx(sum(divergences) / n, rel=1e-4) and row["entropy"] == pytest.approx(sum(entropies) / n, rel=1e-4)
    assert row["top1_agreement"] == pytest.approx(agree / n) and row["no_twin"] == 0


def test_tokens_without_a_twin_are_left_out_and_counted(corpus, checkpoints, student, tmp_path):
    texts = ["grandfather repaired the bicycle underground", "在火车站等候出租汽车"] * 6
    torch.manual_seed(7)
    foreign = model.random_student(model.train_tokenizer(texts, 330), 32, 1, 1, 2)
    model.save(foreign, tmp_path / "foreign")
    run_distil(corpus, checkpoints, tmp_path / "run", steps=1, batch=24, micro_batch=7, teacher=tmp_path / "foreign")
    known, emitted, unknown, total, count = set(foreign.tokenizer.get_vocab()), 0, 0, 0.0, 0
    ours, theirs = student.tokenizer.get_vocab(), foreign.tokenizer.get_vocab()
    pairs = {i: theirs[token] for token, i in ours.items() if token in theirs and (token == model.EOS or token not in model.SPECIAL)}
    shared = sorted(pairs)
    for u in data.read_manifest(corpus / "train.jsonl"):
        prompt = model.encode(student, data.load_batch([u]))
        ids, mask = model.generate(student, prompt, 8, 1.0, data.keyed_uniforms(0, 0, [u.id], 8))
        tokens = student.tokenizer.convert_ids_to_tokens(ids[mask].tolist())
        emitted, unknown = emitted + len(tokens), unknown + sum(token not in known for token in tokens)
        # The teacher alone with the clip and with its own ids of the tokens before the first that it lacks.
        own = ids[:, :next((n for n, token in enumerate(tokens) if token not in known), len(tokens))]
        if own.numel():
            mask, mapped = torch.ones_like(own, dtype=torch.bool), torch.tensor([[pairs[i] for i in own[0].tolist()]])
            with torch.no_grad():
                z_s = student.head(model.response_hidden(student, prompt, own, mask))[:, shared]
                z_t = foreign.head(model.response_hidden(foreign, model.encode(foreign, data.load_batch([u])), mapped, mask))
                p_s, p_t = (z.double().log_softmax(-1) for z in (z_s, z_t[:, [pairs[i] for i in shared]]))
            total, count = total + (p_s.exp() * (p_s - p_t)).sum().item(), count + own.numel()
    row, = metrics(tmp_path / "run")
    assert row["tokens"] + row["no_twin"] == emitted and row["no_twin"] >= unknown > 0
    assert row["tokens"] == count and row["loss"] == pytest.approx(total / count, rel=1e-4)
    assert any(i != j for i, j in pairs.items())  # equal ids would hide a map that is not used


def test_rollouts_are_drawn_anew_at_every_step_and_by_temperature(corpus, checkpoints, tmp_path):
    """With a learning rate of 0 and all clips in every step, nothing but the rollouts can change."""
    pool = subset(corpus, tmp_path / "pool.jsonl", 6)
    for name, temperature, seed in (("greedy", 0.0, 0), ("sampled", 1.0, 0), ("again", 1.0, 0), ("other", 1.0, 1)):
        run_distil(corpus, checkpoints, tmp_path / name, data=pool, batch=6, lr=0.0, temperature=temperature, seed=seed)
    first = {name: [row["loss"] for row in metrics(tmp_path / name)] for name in ("greedy", "sampled", "again", "other")}
    assert first["greedy"][0] == pytest.approx(first["greedy"][1], rel=1e-5)
    assert abs(first["sampled"][0] - first["sampled"][1]) > 1e-3 and first["again"] == first["sampled"]
    assert len({round(losses[0], 3) for losses in (first["greedy"], first["sampled"], first["other"])}) == 3


def test_the_ctc_loss_adds_its_weight_to_the_gradient(corpus, checkpoints, tmp_path, monkeypatch):
    """g(w) = g_ce + w g_ctc, so that g(0.6) - g(0) = 2 (g(0.3) - g(0)); the LM hears of CTC only through the audio."""
    average, found = sft.average_gradients, {}

    def keep(parameters, n_tokens):
        average(parameters, n_tokens)
        found[weight] = [p.grad.clone() for p in parameters]

    monkeypatch.setattr(sft, "average_gradients", keep)
    pool = brief(corpus, tmp_path / "brief.jsonl", 8)
    for weight in (0.0, 0.3, 0.6):
        run_sft(corpus, checkpoints, tmp_path / str(weight), data=pool, steps=1, ctc=weight)
    assert metrics(tmp_path / "0.3")[0]["ctc"] > 0
    of_ctc = [(b - a, c - a) for a, b, c in zip(found[0.0], found[0.3], found[0.6])]
    assert len(of_ctc) == len(found[0.0]) and max(once.abs().max() for once, _ in of_ctc) > 1e-3
    for once, twice in of_ctc:
        torch.testing.assert_close(twice, 2 * once, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------- (b) real processes

@both
def test_two_processes_make_the_same_update(corpus, checkpoints, tmp_path, script):
    """Seven clips in batches of 3, 3 and 1: ranks with two rows and one, and a rank with none. Dev is shared out, too."""
    seven = (brief if script == "sft" else subset)(corpus, tmp_path / "seven.jsonl", 7)
    own = {"data": seven, "dev": corpus / "dev.jsonl", "steps": 3, "batch": 3, "micro_batch": 1, "eval_batch": 2, "max_new_tokens": 6,
           "lr": 1e-6}
    if script == "sft":
        own |= {"ctc": 0.3, "spec_augment": True}
    arguments = sft_words if script == "sft" else distil_words
    torchrun(f"{script}.py", arguments(corpus, checkpoints, tmp_path / "two", **own))
    RUNS[script][0](corpus, checkpoints, tmp_path / "one", **own)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [row["step"] for row in one] == [row["step"] for row in two] == [1, 2, 3]
    of_distill = ("top1_agreement", "overlap", "mass_student", "mass_teacher", "entropy", "entropy_teacher", "truncated", "empty", "repeats")
    for key in ("tokens", "loss", "grad_norm", *(("ctc",) if script == "sft" else of_distill)):
        assert two[0][key] == pytest.approx(one[0][key], rel=1e-5), key
        for a, b in zip(one, two):  # updates are tiny here, so that rounding stays rounding
            assert b[key] == pytest.approx(a[key], rel=1e-4), key
    assert metrics(tmp_path / "two", "dev_error")[0]["step"] == 3 and states(tmp_path / "two") == ["step-0000003"]


# ---- the first step, however it is shared out: gradients entry by entry

OPD = {"temperature": 1.0, "max_new_tokens": 8}
OBJECTIVES = {"sft": ("sft", {"ctc": 0.3}), "reverse full": ("distill", OPD),
              "forward union": ("distill", OPD | {"divergence": "forward", "support": "union", "top_k": 4, "tau": 2.0}),
              "sampled": ("distill", OPD | {"support": "sampled", "baseline": True})}
EIGHT = [(1, 8), (1, 4), (1, 2), (2, 4), (2, 2), (4, 2)]  # processes, utterances a micro-batch: 8 = 1 x 8 = 2 x 4 = 4 x 2

COMPARED = [(objective, case) for objective in OBJECTIVES for case in ("eight", "fewer clips than ranks", "a rank without a twin")
            if case == "eight" or objective != "sampled" and (objective, case) != ("sft", "a rank without a twin")]


def first_steps(rank, world, jobs, folder):
    """Process `rank` of `world` makes the first step of each job in float64 and leaves what it saw in FOLDER/<job>-<rank>.pt.

    fp32 would blur 1e-6: its own rounding is 6e-8 a term, and another batch shape sums its terms in another order.
    """
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    torch.Tensor.float = torch.Tensor.double  # .float() says "at least fp32" in all of this code
    load, draw_map, generate, uniforms = model.load, model.vocabulary_map, model.generate, data.keyed_uniforms
    join, backward = torch.distributed.init_process_group, distill.distil_backward
    averages = {module: module.average_gradients for module in (sft, distill)}

    def load_double(*args, **kwargs):
        asr = load(args[0])
        asr.net.double()
        torch.set_default_dtype(torch.float64)  # for what is new: the CTC head
        return asr

    def keep_gradients(module, parameters, n_tokens):
        averages[module](parameters, n_tokens)
        seen["gradients"] = [p.grad.clone() for p in parameters]

    def count_rows(student, hidden_s, *rest):
        seen["rows"] += len(hidden_s)
        return backward(student, hidden_s, *rest)

    def keep_ids(seed, step, ids, count):
        seen["asked"] = ids
        return uniforms(seed, step, ids, count)

    def keep_rollouts(*args):
        ids, mask = generate(*args)
        seen["rollouts"] |= {name: row[own].tolist() for name, row, own in zip(seen["asked"], ids, mask)}
        return ids, mask

    model.load, model.generate, data.keyed_uniforms, distill.distil_backward = load_double, keep_rollouts, keep_ids, count_rows
    model.save = model.save_training = lambda *args, **kwargs: None
    for module in averages:
        module.average_gradients = lambda *args, module=module: keep_gradients(module, *args)
    for name, script, line, holes in jobs:
        def map_with_holes(*pair):
            to_teacher = draw_map(*pair)
            to_teacher[holes] = -1
            return to_teacher

        model.vocabulary_map = map_with_holes
        torch.distributed.init_process_group = lambda backend: join(backend, f"file://{folder / name}-store", rank=rank, world_size=world)
        seen = {"rows": 0, "rollouts": {}}
        module = {"sft": sft, "distill": distill}[script]
        (sft.main if script == "sft" else distill.distil)(module.parse_args(line))
        torch.save(seen, folder / f"{name}-{rank}.pt")


@pytest.fixture(scope="module")
def splits(corpus, checkpoints, student, tmp_path_factory):
    """All first steps that the next tests compare: {(objective, case): {(world, micro_batch): [loss, what each rank saw]}}."""
    folder = tmp_path_factory.mktemp("splits")
    pool = subset(corpus, folder / "eight.jsonl", 8)
    utterances = data.read_manifest(pool)
    # A seed whose first batch of four gives the second of two ranks no token to score, if the first ids of its rollouts lack a twin.
    for seed in range(100):
        batch = [utterances[i] for i in data.Plan(data.measure(utterances), 4, seed)[0]]
        firsts = [model.generate(student, model.encode(student, data.load_batch([u])), 1, 1.0, data.keyed_uniforms(seed, 0, [u.id], 8))[0].item()
                  for u in batch]
        if not {*firsts[0::2]} & {*firsts[1::2]} and student.eos_id not in firsts:
            break
    else:
        raise AssertionError("no such seed")
    cases = {"eight": ({"batch": 8, "seed": 4}, EIGHT, []), "fewer clips than ranks": ({"batch": 3}, [(1, 3), (4, 1)], [])}
    no_twin = {"a rank without a twin": ({"batch": 4, "seed": seed}, [(1, 4), (2, 2)], firsts[1::2])}
    found, jobs = {}, {1: [], 2: [], 4: []}
    for objective, (script, own) in OBJECTIVES.items():
        for case, (changes, shapes, holes) in (cases | no_twin).items():
            if (objective, case) not in COMPARED:
                continue
            for world, micro in shapes:
                name = f"{objective}-{case}-{world}-{micro}".replace(" ", "_")
                line = (sft_words if script == "sft" else distil_words)(corpus, checkpoints, folder / name, **own, **changes, steps=1,
                                                                        micro_batch=micro, data=[pool] if script == "sft" else pool)
                jobs[world].append((name, script, list(map(str, line)), holes))
                found.setdefault((objective, case), {})[world, micro] = name
    # A server that has only imported this file forks the processes: no seconds of imports for each, nothing inherited from pytest's.
    multiprocessing.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT / 'tests'}{os.pathsep}{ROOT}")  # the server does not take over sys.path before Python 3.13
        for world in jobs:
            torch.multiprocessing.start_processes(first_steps, (world, jobs[world], folder), nprocs=world, start_method="forkserver")
    read = lambda name, world: [metrics(folder / name)[0], *(torch.load(folder / f"{name}-{rank}.pt") for rank in range(world))]
    return {key: {shape: read(name, shape[0]) for shape, name in names.items()} for key, names in found.items()}


@pytest.mark.parametrize("objective, case", COMPARED)
def test_the_first_step_does_not_depend_on_how_it_is_shared_out(splits, objective, case):
    """The same utterances over micro-batches and over 1, 2 and 4 processes: loss and every entry of every gradient to 1e-6."""
    (_, (log, one)), *others = splits[objective, case].items()
    largest = max(g.abs().max().item() for g in one["gradients"])
    assert len(one["gradients"]) > 40 and largest > 1e-3 and log["tokens"] > 0 and (case != "eight" or log.get("ctc", 1) > 0)
    for shape, (row, *ranks) in others:
        assert row["tokens"] == log["tokens"], shape
        for key in ("loss", "ctc") if objective == "sft" else ("loss", "entropy", "top1_agreement", "tokens_per_clip", "no_twin", "truncated"):
            assert row[key] == pytest.approx(log[key], rel=1e-6, abs=1e-9), (shape, key)
        for rank in ranks:
            for a, b in zip(one["gradients"], rank["gradients"], strict=True):
                assert (a - b).abs().max() <= 1e-6 * max(a.abs().max().item(), 1e-6 * largest), shape
    if objective != "sft":
        shares = {shape: [rank["rows"] for rank in ranks] for shape, (_, *ranks) in splits[objective, case].items()}
        assert all(sum(share) == log["tokens"] for share in shares.values())
        if case == "eight":  # ranks with unequal numbers of tokens: a mean per rank would be another one
            assert len(set(shares[2, 4])) == 2 and len(set(shares[4, 2])) > 2
        else:  # a rank without a clip; and one with clips, none of whose tokens counts
            assert 0 in shares[{"fewer clips than ranks": (4, 1), "a rank without a twin": (2, 2)}[case]]
            assert (log["no_twin"] > 0) == (case == "a rank without a twin")


@pytest.mark.parametrize("case", ["eight", "fewer clips than ranks", "a rank without a twin"])
def test_rollouts_do_not_depend_on_how_they_are_shared_out(splits, case):
    together = {shape: {name: row for rank in ranks for name, row in rank["rollouts"].items()}
                for shape, (_, *ranks) in splits["reverse full", case].items()}
    first, *others = together.values()
    assert len(first) == {"eight": 8, "fewer clips than ranks": 3, "a rank without a twin": 4}[case]
    assert all(other == first for other in others) and (case != "eight" or len({len(row) for row in first.values()}) > 2)


def test_rollouts_do_not_depend_on_a_resume(corpus, checkpoints, tmp_path, monkeypatch):
    """Drawn after a resume, in other micro-batches: by utterance and step what the straight run draws. (lr 0: other sums, same weights.)"""
    seen, asked, generate, uniforms = {}, [], model.generate, data.keyed_uniforms

    def keep_ids(seed, step, ids, count):
        asked[:] = [(step, i) for i in ids]
        return uniforms(seed, step, ids, count)

    def keep_rollouts(*args):
        ids, mask = generate(*args)
        seen.update({key: row[own].tolist() for key, row, own in zip(asked, ids, mask, strict=True)})
        return ids, mask

    monkeypatch.setattr(data, "keyed_uniforms", keep_ids)
    monkeypatch.setattr(model, "generate", keep_rollouts)
    own = {"steps": 3, "batch": 6, "lr": 0.0, "save_every": 1}
    run_distil(corpus, checkpoints, tmp_path / "straight", micro_batch=6, **own)
    straight = dict(seen)
    seen.clear()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after_state(patch, 1)
        run_distil(corpus, checkpoints, tmp_path / "cut", micro_batch=6, **own)
    seen.clear()
    run_distil(corpus, checkpoints, tmp_path / "cut", micro_batch=4, resume=True, **own)
    assert len(straight) == 18 and seen == {key: row for key, row in straight.items() if key[0] > 0}
    assert len({tuple(row) for row in straight.values()}) > 12


def test_two_processes_transcribe_the_same(corpus, checkpoints, tmp_path):
    arguments = lambda out: words({"model": checkpoints / "student", "data": [corpus / "dev.jsonl", subset(corpus, tmp_path / "t.jsonl", 5)],
                                   "out": out, "batch": 2, "max_new_tokens": 8, "device": "cpu"}, {})
    torchrun("evaluate.py", arguments(tmp_path / "two"))
    evaluate.main(evaluate.parse_args(arguments(tmp_path / "one")))
    hyps = (tmp_path / "one" / "hyps.jsonl").read_text()
    assert len(hyps.splitlines()) == 11 and (tmp_path / "two" / "hyps.jsonl").read_text() == hyps
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")]
    untimed = [[{k: v for k, v in entry.items() if not k.endswith("seconds")} for entry in summary["results"]] for summary in summaries]
    assert untimed[0] == untimed[1] and len(untimed[0]) == 4


def test_two_processes_measure_the_same_overlap(corpus, checkpoints, tmp_path):
    arguments = lambda out: words({"student": checkpoints / "student", "teacher": checkpoints / "teacher", "data": corpus / "dev.jsonl",
                                   "out": out, "batch": 2, "max_new_tokens": 8, "top_k": 4, "device": "cpu"}, {})
    torchrun("overlap.py", arguments(tmp_path / "two"))
    overlap.main(overlap.parse_args(arguments(tmp_path / "one")))
    one, two = ((tmp_path / name / "overlap.json").read_text() for name in ("one", "two"))
    result = json.loads(one)
    assert one == two and result["clips"] == 6 and result["k"] == 4
    assert all(result[name]["low"] <= result[name]["mean"] <= result[name]["high"] for name in overlap.STATISTICS)


# ---------------------------------------------------------------------------- (c) resume

class Killed(BaseException):
    """As abrupt as SIGKILL, for a run in this process."""


def kill_after_state(monkeypatch, step):
    """The run dies right after OUT/state/step-`step` was written."""
    save = model.save_training

    def save_and_die(out, at, *args, **kwargs):
        save(out, at, *args, **kwargs)
        if at == step:
            raise Killed

    monkeypatch.setattr(model, "save_training", save_and_die)


@both
def test_resume_is_bit_for_bit(corpus, checkpoints, tmp_path, monkeypatch, script):
    run, own = RUNS[script]
    own = own | {"data": brief(corpus, tmp_path / "brief.jsonl", 24), "steps": 6, "save_every": 3, "batch": 5, "micro_batch": 3, "dev": corpus / "dev.jsonl", "eval_every": 2, "max_new_tokens": 6}
    run(corpus, checkpoints, tmp_path / "straight", **own)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after_state(patch, 3)
        run(corpus, checkpoints, tmp_path / "cut", **own)
    assert states(tmp_path / "cut") == ["step-0000003"]
    # Logged and then lost steps must not stay in the log twice.
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 99.0}\n{"step": 4, "dev_error": 0.0}\n')
    run(corpus, checkpoints, tmp_path / "cut", resume=True, **own)
    assert states(tmp_path / "cut") == states(tmp_path / "straight") == ["step-0000006"]
    assert script == "distill" or all(row["ctc"] > 0 for row in metrics(tmp_path / "straight"))
    for file in ("model.safetensors", "state/step-0000006/model.safetensors", "state/step-0000006/training.safetensors",
                 "state/step-0000006/training.json"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "straight" / file).read_bytes(), file
    strip = lambda rows: [{k: v for k, v in row.items() if k != "audio_per_sec"} for row in rows]
    assert [row["step"] for row in metrics(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in metrics(tmp_path / "cut", "dev_error")] == [2, 4, 6]
    assert strip(metrics(tmp_path / "cut", "step")) == strip(metrics(tmp_path / "straight", "step"))
    before = weights(tmp_path / "cut")
    run(corpus, checkpoints, tmp_path / "cut", resume=True, **own)  # nothing is left to do
    assert weights(tmp_path / "cut") == before and len(metrics(tmp_path / "cut")) == 6


@both
def test_resume_before_the_first_log_line(corpus, checkpoints, tmp_path, monkeypatch, script):
    """States may be saved more often than lines are logged: a run that dies in between has no metrics.jsonl yet."""
    run, _ = RUNS[script]
    own = {"steps": 3, "save_every": 1, "log_every": 100, "batch": 2}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after_state(patch, 1)
        run(corpus, checkpoints, tmp_path / "run", **own)
    run(corpus, checkpoints, tmp_path / "run", resume=True, **own)
    assert [row["step"] for row in metrics(tmp_path / "run")] == [3] and states(tmp_path / "run") == ["step-0000003"]


@both
def test_resume_with_nothing_saved_starts_anew(corpus, checkpoints, tmp_path, script):
    run, _ = RUNS[script]
    run(corpus, checkpoints, tmp_path / "run", resume=True, steps=1, batch=2)
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1]


# ---------------------------------------------------------------------------- (d) SIGTERM

def test_sigterm_saves_and_leaves_and_the_rest_is_as_without_it(corpus, checkpoints, tmp_path):
    own = {"steps": 60, "batch": 6, "micro_batch": 6, "workers": 1}
    process = subprocess.Popen([sys.executable, ROOT / "sft.py", *sft_words(corpus, checkpoints, tmp_path / "stopped", **own)],
                               env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        log, patience = tmp_path / "stopped" / "metrics.jsonl", time.time() + 120
        while not (log.exists() and len(log.read_text().splitlines()) >= 3):
            assert process.poll() is None and time.time() < patience, process.stdout.read()[-3000:]
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGTERM)  # as torchrun and schedulers do: the loader's workers get it too
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143, output[-3000:]
    step = metrics(tmp_path / "stopped")[-1]["step"]
    assert 3 <= step < 60 and states(tmp_path / "stopped") == [f"step-{step:07d}"]
    run_sft(corpus, checkpoints, tmp_path / "stopped", resume=True, **own)
    run_sft(corpus, checkpoints, tmp_path / "straight", **own)
    assert weights(tmp_path / "stopped") == weights(tmp_path / "straight")
    assert [row["step"] for row in metrics(tmp_path / "stopped")] == list(range(1, 61))


@both
def test_a_stop_in_this_process_has_exit_code_143(corpus, checkpoints, tmp_path, monkeypatch, script):
    run, _ = RUNS[script]
    module = {"sft": sft, "distill": distill}[script]
    average = module.average_gradients

    def stop_during_the_second_step(*args):
        average(*args)
        stop_during_the_second_step.calls += 1
        if stop_during_the_second_step.calls == 2:  # after this step's look at the flag: the third step sees it
            signal.raise_signal(signal.SIGTERM)

    stop_during_the_second_step.calls = 0
    monkeypatch.setattr(module, "average_gradients", stop_during_the_second_step)
    with pytest.raises(SystemExit) as stopped:
        run(corpus, checkpoints, tmp_path / "run", steps=9, batch=2)
    assert stopped.value.code == 143 and states(tmp_path / "run") == ["step-0000003"]
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3]


# ---------------------------------------------------------------------------- (e) earlier runs

@both
def test_an_earlier_run_is_not_overwritten(corpus, checkpoints, tmp_path, script):
    run, _ = RUNS[script]
    run(corpus, checkpoints, tmp_path / "run", steps=1, batch=2)
    before = weights(tmp_path / "run")
    with pytest.raises(FileExistsError, match="--resume"):
        run(corpus, checkpoints, tmp_path / "run", steps=1, batch=2, seed=1)
    assert weights(tmp_path / "run") == before


@both
def test_an_earlier_run_that_has_logged_nothing_is_not_mixed_in(corpus, checkpoints, tmp_path, monkeypatch, script):
    """A state of other flags left in --out would be kept in place of this run's, and be what --resume continues from."""
    run, _ = RUNS[script]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after_state(patch, 1)
        run(corpus, checkpoints, tmp_path / "run", steps=3, batch=2, save_every=1, log_every=100)
    with pytest.raises(FileExistsError, match="--resume"):
        run(corpus, checkpoints, tmp_path / "run", steps=3, batch=2, save_every=1, log_every=100, seed=1)


# ---------------------------------------------------------------------------- (f) data that can't be used

@both
def test_an_unreadable_clip_is_left_out_and_counted(corpus, checkpoints, tmp_path, script):
    run, _ = RUNS[script]
    (tmp_path / "broken.wav").write_bytes(b"not a wave file")
    bad = {"id": "bad", "audio": str(tmp_path / "broken.wav"), "text": "find peter", "language": "en", "duration": 0.7}
    good = [json.loads(line) for line in subset(corpus, tmp_path / "good.jsonl", 4).read_text().splitlines()]
    data.write_jsonl(tmp_path / "mixed.jsonl", [*good, bad])
    manifest = lambda name: [tmp_path / name] if script == "sft" else tmp_path / name
    run(corpus, checkpoints, tmp_path / "mixed", data=manifest("mixed.jsonl"), steps=1, batch=5)
    run(corpus, checkpoints, tmp_path / "good", data=manifest("good.jsonl"), steps=1, batch=4)
    mixed, = metrics(tmp_path / "mixed")
    clean, = metrics(tmp_path / "good")
    assert mixed["rejected"] == 1 and clean["rejected"] == 0
    assert mixed["tokens"] == clean["tokens"] and mixed["loss"] == pytest.approx(clean["loss"], rel=1e-5)


@both
def test_a_step_with_no_usable_clip_does_not_end_the_run(corpus, checkpoints, tmp_path, script):
    run, _ = RUNS[script]
    (tmp_path / "broken.wav").write_bytes(b"not a wave file")
    rows = [json.loads(line) for line in subset(corpus, tmp_path / "good.jsonl", 1).read_text().splitlines()]
    rows.append({"id": "bad", "audio": str(tmp_path / "broken.wav"), "text": "find peter", "language": "en"})
    data.write_jsonl(tmp_path / "mixed.jsonl", rows)
    run(corpus, checkpoints, tmp_path / "run", data=[tmp_path / "mixed.jsonl"] if script == "sft" else tmp_path / "mixed.jsonl",
        steps=2, batch=1)
    log = metrics(tmp_path / "run", "step")
    assert [row["step"] for row in log] == [1, 2] and sorted(row["tokens"] > 0 for row in log) == [False, True] and log[-1]["rejected"] == 1


@pytest.mark.parametrize("split", ["data", "dev"])
@pytest.mark.parametrize("gone", ["text", "language"])
def test_sft_names_the_line_that_lacks_text_or_language(corpus, checkpoints, tmp_path, split, gone):
    path = subset(corpus, tmp_path / "part.jsonl", 3)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    del rows[1][gone]
    data.write_jsonl(path, rows)
    with pytest.raises(ValueError, match=rf"part\.jsonl:2.*{gone}"):
        run_sft(corpus, checkpoints, tmp_path / "run", **{split: [path] if split == "data" else path})


def test_distill_names_the_dev_line_that_lacks_text_before_it_trains(corpus, checkpoints, tmp_path):
    path = subset(corpus, tmp_path / "part.jsonl", 3, text=None)
    with pytest.raises(ValueError, match=r"part\.jsonl:1"):
        run_distil(corpus, checkpoints, tmp_path / "run", dev=path, steps=1, batch=2)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_distill_does_not_read_transcripts(corpus, checkpoints, tmp_path):
    subset(corpus, tmp_path / "with.jsonl", 6)
    subset(corpus, tmp_path / "wrong.jsonl", 6, text="something else altogether", language="xx")
    subset(corpus, tmp_path / "without.jsonl", 6, text=None, language=None)
    for name in ("with", "wrong", "without"):
        run_distil(corpus, checkpoints, tmp_path / name, data=tmp_path / f"{name}.jsonl", batch=4, steps=3)
    assert weights(tmp_path / "with") == weights(tmp_path / "wrong") == weights(tmp_path / "without")


# ---------------------------------------------------------------------------- (g) it learns

def test_sft_learns_one_batch_by_heart(corpus, tmp_path):
    run_sft(corpus, tmp_path, tmp_path / "run", data=[subset(corpus, tmp_path / "four.jsonl", 4)], student=None, init="random", vocab_size=300,
            d_model=32, encoder_layers=1, lm_layers=1, heads=2, steps=80, batch=4, lr=1e-2, warmup=5, weight_decay=0.0)
    losses = [row["loss"] for row in metrics(tmp_path / "run")]
    assert losses[0] > 4 and losses[-1] < 0.1 * losses[0]


def test_distill_brings_the_student_closer_to_the_teacher(corpus, checkpoints, tmp_path):
    run_distil(corpus, checkpoints, tmp_path / "run", data=subset(corpus, tmp_path / "four.jsonl", 4), steps=60, batch=4, lr=1e-2, warmup=5,
               max_new_tokens=5)
    losses = [row["loss"] for row in metrics(tmp_path / "run")]
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]


# ---------------------------------------------------------------------------- precision and memory

SMALL_RATES = [(1e-6, 0.02), (1e-5, 0.15), (1e-4, 0.88)]


@pytest.mark.parametrize("lr, share", SMALL_RATES)
def test_adamw_on_bf16_weights_loses_most_small_updates(lr, share):
    """Why the masters are fp32: of bf16 weights N(0, 0.02) one step of AdamW moves 2 %, 15 %, 88 %; the rest rounds back to where it was."""
    generator = torch.Generator().manual_seed(0)
    start = 0.02 * torch.randn(500, 400, generator=generator)
    moved = {}
    for dtype in (torch.bfloat16, torch.float32):
        p = nn.Parameter(start.to(dtype))
        optimizer = distill.optimizer_for([p], distill.parse_args(["--weight_decay", "0", "--lr", str(lr)]))
        p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        before = p.detach().clone()
        optimizer.step()
        moved[dtype] = (p.detach() != before).float().mean().item()
    assert moved[torch.bfloat16] == pytest.approx(share, rel=0.15)
    assert moved[torch.float32] == 1.0


@both
@pytest.mark.parametrize("lr", [lr for lr, _ in SMALL_RATES])
def test_a_small_learning_rate_moves_every_weight(corpus, checkpoints, tmp_path, monkeypatch, script, lr):
    """From a checkpoint stored in bf16: trained in fp32 all the same. Every weight that has a gradient moves, by about lr."""
    module, run = {"sft": sft, "distill": distill}[script], RUNS[script][0]
    shutil.copytree(checkpoints / "student", tmp_path / "half")
    file = tmp_path / "half" / "model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(file).items()}, file)
    loaded, load_student, average, gradients = [], model.load_student, module.average_gradients, []

    def keep_gradients(parameters, n_tokens):
        average(parameters, n_tokens)
        gradients.extend(p.grad.clone() for p in parameters)

    monkeypatch.setattr(model, "load_student", lambda *args: loaded.append(load_student(*args)) or loaded[0])
    monkeypatch.setattr(module, "average_gradients", keep_gradients)
    run(corpus, checkpoints, tmp_path / "run", student=tmp_path / "half", steps=1, warmup=0, lr=lr, weight_decay=0.0, batch=4)
    before, n = load_student(tmp_path / "half", "cpu").net.parameters(), 0
    for old, new, gradient in zip(before, loaded[0].net.parameters(), gradients, strict=True):
        assert new.dtype == torch.float32
        # Adam's first step is lr g / (|g| + 1e-8): all of lr where g, clipped to a norm of 1, is well above 1e-8.
        felt = gradient.abs() > 1e-4
        assert ((new - old).abs()[felt] > 0.9 * lr - 2 ** -24 * old.abs()[felt]).all()
        n += int(felt.sum())
    assert n > 0.2 * sum(g.numel() for g in gradients)


def test_memory_does_not_grow_from_step_to_step(corpus, checkpoints, tmp_path, monkeypatch):
    """What is alive in the midst of a step: after 10 and after 50, as many tensors, as many bytes, and a process that is no larger."""
    live, rate = {}, distill.learning_rate

    def census(step, args):  # called with the gradients of the step in place
        if step in (9, 49):
            gc.collect()
            tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
            storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
            statm = Path("/proc/self/statm")  # pages; the second number is what is resident
            resident = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0
            live[step] = len(tensors), sum(storages.values()), resident
        return rate(step, args)

    monkeypatch.setattr(distill, "learning_rate", census)
    run_distil(corpus, checkpoints, tmp_path / "run", data=subset(corpus, tmp_path / "four.jsonl", 4), steps=50, batch=4, micro_batch=2, log_every=7)
    (n_tensors, n_bytes, resident), (n_later, n_bytes_later, resident_later) = live[9], live[49]
    assert n_later < n_tensors + 40 and n_bytes_later <= 1.02 * n_bytes  # one tensor a step would be 40; other tests' garbage is a few
    assert resident_later - resident < 8 * 2 ** 20


# ---------------------------------------------------------------------------- (h) the teacher, (i) the best checkpoint

def test_the_teacher_is_left_as_it_was(corpus, checkpoints, tmp_path, monkeypatch):
    loaded, load = {}, model.load
    monkeypatch.setattr(model, "load", lambda path, *rest: loaded.setdefault(Path(path).name, load(path, *rest)))
    before = weights(checkpoints / "teacher")
    run_distil(corpus, checkpoints, tmp_path / "run", steps=2, batch=4)
    fresh = load(checkpoints / "teacher").net.state_dict()
    assert all(torch.equal(p, fresh[name]) for name, p in loaded["teacher"].net.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in loaded["teacher"].net.parameters())
    assert weights(checkpoints / "teacher") == before


@both
def test_out_is_the_best_on_dev_and_state_the_last(corpus, checkpoints, tmp_path, monkeypatch, script):
    run, _ = RUNS[script]
    module = {"sft": sft, "distill": distill}[script]
    own = {"batch": 3, "eval_every": 1, "save_every": 3, "dev": corpus / "dev.jsonl", "max_new_tokens": 4}
    seen, errors = [], iter([50.0, 20.0, 40.0, 30.0])

    def scripted(asr, *_):
        seen.append({k: v.clone() for k, v in asr.net.state_dict().items()})
        return {"dev_error": next(errors), "dev_length": 1.0}

    same = lambda path, n: all(torch.equal(v, seen[n][k]) for k, v in model.load(path).net.state_dict().items())
    monkeypatch.setattr(module, "dev_error", scripted)
    run(corpus, checkpoints, tmp_path / "run", steps=3, **own)
    assert same(tmp_path / "run", 1) and not same(tmp_path / "run", 2)
    assert states(tmp_path / "run") == ["step-0000003"] and same(tmp_path / "run" / "state" / "step-0000003", 2)
    assert [row["dev_error"] for row in metrics(tmp_path / "run", "dev_error")] == [50.0, 20.0, 40.0]
    run(corpus, checkpoints, tmp_path / "run", steps=4, resume=True, **own)  # 30 is better than 40, not than 20
    assert same(tmp_path / "run", 1) and same(tmp_path / "run" / "state" / "step-0000004", 3)


def test_dev_error_is_the_pooled_rate_of_greedy_transcripts(corpus, student):
    dev = data.read_manifest(corpus / "dev.jsonl")
    args = sft.parse_args(["--data", "x", "--out", "x", "--student", "x", "--eval_batch", "4", "--max_new_tokens", "8"])
    hyps = {u.id: model.transcribe(student, [u], max_new_tokens=8)[u.id]["hyp"] for u in dev}
    expected = data.error_rate([data.edit_counts(u.text, hyps[u.id], u.language) for u in dev])
    written, spoken = (sum(len(data.normalize(text, u.language).split()) for u, text in pairs) for pairs in
                       ([(u, hyps[u.id]) for u in dev], [(u, u.text) for u in dev]))
    for script in (sft, distill):
        assert script.dev_error(student, dev, args, 0, 1) == pytest.approx({"dev_error": expected, "dev_length": written / spoken})


def test_metrics_are_drawn(corpus, checkpoints, tmp_path):
    for script, (run, _) in RUNS.items():
        run(corpus, checkpoints, tmp_path / script, steps=2, batch=3, eval_every=1, dev=corpus / "dev.jsonl", max_new_tokens=4)
        assert (tmp_path / script / "metrics.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / script / "metrics.png").stat().st_size > 5000
