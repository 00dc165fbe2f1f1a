"""sft.py and distill.py as they run: updates, processes, resume, stops, what is read and written.

    pytest tests/test_training.py

Runs are of a few steps on clips of a second, in this process where they can be. Others are forked
from one that has imported everything.
"""

import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
import distill
import model
import sft
from conftest import ROOT, TEXTS, tiny, twins, write_wav
from test_checkpoints import qwen  # a fixture
from test_model import logits_of, roll_out

MODULES = {"sft": sft, "distill": distill}
both = pytest.mark.parametrize("script", MODULES)
FLAGS = {"device": "cpu", "workers": 0, "log_every": 1, "eval_every": 1000, "save_every": 1000,
         "steps": 2, "batch": 8, "micro_batch": 8, "warmup": 2, "eval_batch": 4, "lr": 1e-3}
TORCHRUN = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node 2".split()]
OWN = {"sft": {"ctc": 0.3}, "distill": {"max_new_tokens": 8}}


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Runs install a handler for SIGTERM and draw a picture that takes as long as they do."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(model, "draw_metrics", lambda metrics, path: None)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def words(corpus, checkpoints, tmp_path):
    """The command line of a run. True: a flag without a value; None: none; a list: several."""
    def line_of(script, name="run", **changes):
        flags = FLAGS | OWN[script] | {"data": corpus / "train.jsonl", "out": tmp_path / name}
        flags["student"] = checkpoints / "student"
        if script == "distill":
            flags["teacher"] = checkpoints / "teacher"
        line = []
        for flag, value in (flags | changes).items():
            if value is not None:
                values = value if isinstance(value, list) else [value]
                line += [f"--{flag}", *(str(v) for v in values if v is not True)]
        return line
    return line_of


@pytest.fixture
def run(words, tmp_path):
    """A run in this process -> its folder."""
    def run_here(script, name="run", **changes):
        module = MODULES[script]
        module.main(module.parse_args(words(script, name, **changes)))
        return tmp_path / name
    return run_here


@pytest.fixture
def subset(corpus, tmp_path):
    """The first n lines of train.jsonl elsewhere; changes: keys to set, None to drop."""
    def write(n, texts=None, name="pool", **changes):
        path = tmp_path / f"{name}.jsonl"
        rows = [json.loads(line) for line in (corpus / "train.jsonl").open()][:n]
        for i, row in enumerate(rows):
            row |= {"audio": str(corpus / row["audio"])} | changes
            if texts:
                row["text"] = texts[i % len(texts)]
        data.write_jsonl(path, [{k: v for k, v in row.items() if v is not None} for row in rows])
        return path
    return write


def metrics(out, key="loss"):
    """Records of metrics.jsonl that have `key`, without the speed, which no two runs share."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    for row in rows:
        row.pop("audio_per_sec", None)
    return [row for row in rows if key in row]


def steps_of(out, key="loss"):
    return [row["step"] for row in metrics(out, key)]


def weights(out):
    return load_file(out / "model.safetensors")


def states(out):
    return sorted(p.name for p in (out / "state").iterdir())


def same_run(one, other):
    """Equal to the bit: weights, moments and records."""
    assert states(one) == states(other)
    for file in ("model.safetensors", f"state/{states(one)[0]}/training.safetensors"):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file
    assert metrics(one, "step") == metrics(other, "step")


BRIEF = ["it", "put", "the", "", "hide it"]  # of unequal length; CTC finds room for most


def first_step(run, script, name="run", **changes):
    """-> the record of one step, {name: gradient of the whole step}.

    AdamW's first mean is a tenth of what was clipped."""
    out = run(script, name, steps=1, **changes)
    record, = metrics(out)
    moments = load_file(out / "state" / "step-0000001" / "training.safetensors")
    scale = 10 * max(1.0, record["grad_norm"])
    return record, {name.removesuffix(".exp_avg"): scale * moment
                    for name, moment in moments.items() if name.endswith(".exp_avg")}


def same_gradients(found, expected, rtol=1e-4):
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        atol = rtol * float(expected[name].abs().max()) + 1e-8
        torch.testing.assert_close(gradient, expected[name], rtol=rtol, atol=atol, msg=name)


def gradients(net):
    return {name: p.grad.clone() for name, p in net.named_parameters()}


# ------------------------------------------------------------------- the update, against slow loops

def lm_logits(asr, clip, written):
    """(V,) logits behind `written` ids: one clip, transformers' forward without cache or padding,
    ids that no transcript may contain ruled out. Oracle."""
    audio, = asr.embed_audio(clip)
    before = asr.body.embed_tokens(torch.tensor([asr.prefix_ids]))
    suffix = asr.suffix_of(clip.utterances[0])
    after = asr.body.embed_tokens(torch.tensor([suffix + written]))
    z = asr.net(inputs_embeds=torch.cat([before, audio[None], after], dim=1)).logits[0, -1]
    return z.masked_fill(asr.blocked, -math.inf)


def test_a_step_of_sft_is_cross_entropy_on_every_response_token(run, subset, student):
    """Every clip alone, every prefix alone: loss and gradient of the mean of -log p over texts and
    their EOS. Where nothing is said, EOS comes at once."""
    pool = subset(5, BRIEF)
    record, found = first_step(run, "sft", data=pool, batch=5, micro_batch=2, ctc=0)
    terms = []
    for u in data.read_manifest(pool):
        response = student.tokenizer.encode(u.text) + [student.eos_id]
        for t, token in enumerate(response):
            z = lm_logits(student, data.load_batch([u]), response[:t])
            terms.append(-z.log_softmax(-1)[token])
    loss = sum(terms) / len(terms)
    loss.backward()
    assert record["tokens"] == len(terms) == sum(len(student.encode_text(t)) for t in BRIEF)
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
    same_gradients(found, gradients(student.net), 1e-3)


@pytest.mark.parametrize("name", ["teacher", "foreign", "hf"])
@torch.no_grad()
def test_the_loss_of_distill_is_the_mean_divergence_on_own_words(
        run, subset, checkpoints, student, qwen, name):
    """One clip at a time, one prefix at a time, the draw and the divergence by hand. A foreign
    teacher, or a Qwen3-ASR, is asked with its own ids up to the first that it lacks."""
    folder = (qwen if name == "hf" else checkpoints) / name
    pool = subset(12)
    with torch.enable_grad():
        out = run("distill", steps=1, batch=12, micro_batch=5, data=pool, seed=4, teacher=folder)
    teacher = model.load(folder)
    pairs = twins(student, teacher)
    assert name == "teacher" or any(i != j for i, j in pairs.items()), "or the map may go unused"
    ours, theirs = list(pairs), list(pairs.values())
    total, n, emitted, stopped, empty = 0.0, 0, 0, 0, 0
    for u in data.read_manifest(pool):
        clip, written, readable = data.load_batch([u]), [], True
        for uniform in data.keyed_uniforms(4, 0, [u.id], 8)[0]:
            z_s = lm_logits(student, clip, written)
            token = int((z_s.double().softmax(-1).cumsum(-1) > uniform).nonzero()[0])
            readable = readable and token in pairs
            if readable:
                z_t = lm_logits(teacher, clip, [pairs[i] for i in written])
                logp_s = z_s[ours].double().log_softmax(-1)
                logp_t = z_t[theirs].double().log_softmax(-1)
                total += (logp_s.exp() * (logp_s - logp_t)).sum().item()
            n += readable
            written.append(token)
            if token == student.eos_id:
                break
        emitted += len(written)
        stopped += token == student.eos_id
        empty += written == [student.eos_id]
    record, = metrics(out)
    assert 0 < stopped < 12 and (emitted > n) == (name != "teacher")
    expected = {"tokens": n, "not_scored": emitted - n, "clips": 12, "rejected": 0,
                "truncated": 12 - stopped, "empty": empty, "loss": total / n, "lr": 5e-4}
    assert {key: record[key] for key in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("settings", [
    {}, {"support": "sampled"}, {"divergence": "forward", "support": "union", "top_k": 4}])
def test_a_step_of_distill_is_one_shot_autograd(
        run, subset, checkpoints, student, foreign_teacher, settings):
    """Rollout, teacher, student and chunked loss as the script runs them, against all rows at once
    over the shared ids: value and gradient."""
    pool = subset(8)
    record, found = first_step(run, "distill", data=pool, chunk=3, micro_batch=1, seed=3,
                               teacher=checkpoints / "foreign", **settings)
    batch = data.load_batch(data.read_manifest(pool))
    uniforms = data.keyed_uniforms(3, 0, [u.id for u in batch.utterances], 8)
    ids, mask = roll_out(student, batch, 8, 1.0, uniforms)
    pairs = twins(student, foreign_teacher)
    read, ids_t = torch.zeros_like(mask), torch.zeros_like(ids)
    for b, row in enumerate(ids.tolist()):
        for r, token in enumerate(row):
            if not mask[b, r] or token not in pairs:
                break
            read[b, r], ids_t[b, r] = True, pairs[token]
    assert not read.any(1).all(), "a micro-batch should have no token to score"
    shared = sorted(pairs)
    z_s = logits_of(student, batch, ids, read)[:, shared]
    z_t = logits_of(foreign_teacher, batch, ids_t, read)[:, [pairs[i] for i in shared]].detach()
    y = torch.tensor([shared.index(token) for token in ids[read].tolist()])
    defaults = {"divergence": "reverse", "support": "full", "top_k": 32}
    loss = distill.token_divergence(z_s, z_t, y, **defaults | settings).mean()
    loss.backward()
    assert record["tokens"] == len(y)
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
    same_gradients(found, gradients(student.net))


def test_the_ctc_loss_adds_its_weight_to_the_gradient(run, subset):
    """g(w) = g_ce + w g_ctc, so that g(0.6) - g(0) = 2 (g(0.3) - g(0))."""
    pool = subset(8, BRIEF)
    found = {}
    for w in (0.0, 0.3, 0.6):
        record, found[w] = first_step(run, "sft", str(w), data=pool, ctc=w)
    assert record["ctc"] > 0 and record["ctc_skipped"] == 0
    conv = "audio_encoder.whisper.conv1.weight"
    for name, none in found[0.0].items():
        twice, once = found[0.6][name] - none, found[0.3][name] - none
        torch.testing.assert_close(twice, 2 * once, rtol=1e-3, atol=1e-5)
    assert (found[0.3][conv] - found[0.0][conv]).abs().max() > 1e-3
    # Of two equal steps the mean is that of one.
    two, = metrics(run("sft", "two", data=pool, ctc=0.6, steps=2, log_every=2, lr=1e-30))
    assert [two[key] for key in ("loss", "ctc")] == pytest.approx([record["loss"], record["ctc"]])


@both
def test_a_step_is_one_of_adamw_on_clipped_gradients(run, subset, student, tmp_path, script):
    """The learning rate of the first of two steps of warm-up, written out; every weight moves."""
    record, found = first_step(run, script, data=subset(8, BRIEF), lr=1e-2)
    norm = math.sqrt(sum(g.double().square().sum().item() for g in found.values()))
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-5) and norm > 1  # clipped
    assert record["lr"] == 5e-3
    after = weights(tmp_path / "run")
    moments = load_file(tmp_path / "run" / "state" / "step-0000001" / "training.safetensors")
    for name, before in student.net.named_parameters():
        if name in after:
            g = found[name] / norm
            expected = before - 5e-3 * g / (g.abs() + 1e-8)
            torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-5, msg=name)
            torch.testing.assert_close(moments[f"{name}.exp_avg_sq"], 0.02 * g ** 2)
            assert not torch.equal(after[name], before), name


@both
def test_the_arithmetic_of_a_gpu_runs(run, corpus, monkeypatch, script):
    """bf16 autocast on the CPU: mixed dtypes clash in the same places (RoPE's fp32 keys in the
    cache)."""
    one = metrics(run(script, "fp32", steps=1))[0]
    monkeypatch.setattr(model, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    two = metrics(run(script, "bf16", steps=1, dev=corpus / "dev.jsonl"))[0]
    assert one["loss"] != two["loss"] and math.isfinite(two["grad_norm"])
    if script == "sft":  # rollouts may part at the first token that bf16 draws differently
        assert two["loss"] == pytest.approx(one["loss"], rel=0.05)


# -------------------------------------------------------------------- memory that changes no update

@both
def test_what_saves_memory_changes_no_gradient(run, monkeypatch, script):
    """A frozen encoder has none. In distill its output is kept from the rollout: it hears each clip
    once instead of twice."""
    heard, found = [], {}

    def count(self, mel, n_frames, forward=model.WhisperEncoder.forward):
        heard.append(len(mel))
        return forward(self, mel, n_frames)

    monkeypatch.setattr(model.WhisperEncoder, "forward", count)
    for name, flags, n in (("plain", {}, 2), ("recompute", {"recompute": True}, 2),
                           ("freeze", {"freeze": "encoder"}, 1)):
        heard.clear()
        _, found[name] = first_step(run, script, name, micro_batch=3, **flags)
        # The teacher hears each of 8 clips once too.
        assert sum(heard) == (8 if script == "sft" else 8 * n + 8)
    plain = found["plain"]
    same_gradients(found["recompute"], plain, 1e-5)
    same_gradients(found["freeze"], {k: g for k, g in plain.items() if "whisper" not in k}, 1e-5)


def test_recomputed_layers_run_twice_where_there_is_a_gradient(tokenizer, batch):
    asr, runs = tiny(tokenizer, 1), []
    for layer in [*asr.net.audio_encoder.whisper.layers, *asr.body.layers]:
        def counted(*args, forward=layer.forward, **kwargs):
            runs.append(1)
            return forward(*args, **kwargs)
        layer.forward = counted
    model.trainable(asr, recompute=True)
    ids, mask = data.pad_rows([asr.encode_text(u.text) for u in batch.utterances], asr.pad_id)
    with torch.no_grad():
        logits_of(asr, batch, ids, mask)
    assert len(runs) == 4
    logits_of(asr, batch, ids, mask).sum().backward()
    assert len(runs) == 4 + 8


# -------------------------------------------------------------- processes: however it is shared out

def start(function, *args, world, join=True):
    """function(rank, world, *args) in `world` processes, forked by a server that has only imported
    this file."""
    multiprocessing.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        # The server does not take over sys.path before Python 3.13.
        patch.setenv("PYTHONPATH", f"{ROOT / 'tests'}{os.pathsep}{ROOT}")
        return torch.multiprocessing.start_processes(
            function, (world, *args), nprocs=world, start_method="forkserver", join=join)


JOIN = torch.distributed.init_process_group


def take_place(rank, world, store):
    """What torchrun tells a process; process groups meet in a file instead of at a port."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    model.draw_metrics = lambda metrics, path: None

    def meet(backend, timeout):
        patience = timedelta(seconds=60)  # ranks that wait for each other are an error, no hang
        JOIN(backend, f"file://{store}", patience, world, rank)

    torch.distributed.init_process_group = meet


def record_slowly(self, record, record_at_once=model.Run.log):
    record_at_once(self, record)
    time.sleep(0.4)  # a signal finds the run before its end


def train(rank, world, script, line, store):
    take_place(rank, world, store)
    model.Run.log = record_slowly
    MODULES[script].main(MODULES[script].parse_args(line))


SHAPES = {  # clips of the step: (processes, utterances per micro-batch)
    8: [(1, 8), (1, 3), (2, 4), (2, 2), (4, 2)],
    3: [(1, 3), (4, 1)],  # a rank without a clip
    4: [(1, 4), (2, 2)],  # and one whose clips can't be read
}


def first_steps(rank, world, jobs, folder):
    """Make the first step of each job in float64, where another order of sums is seen as 1e-15 and
    not as 1e-6, and leave its gradients in FOLDER/<job>-<rank>.pt."""
    torch.Tensor.float = torch.Tensor.double  # .float() says "at least fp32" in all of this code
    load, sum_gradients = model.load, model.sum_gradients

    def load_double(name, *_, **__):
        asr = load(name)
        asr.net.double()
        torch.set_default_dtype(torch.float64)
        return asr

    def keep_gradients(parameters):
        sum_gradients(parameters)
        torch.save([p.grad for p in parameters], folder / f"{job}-{rank}.pt")

    model.load, model.sum_gradients = load_double, keep_gradients
    model.save = model.Run.save_run = lambda *_: None
    for job, script, line in jobs:
        take_place(rank, world, folder / f"{job}-store")
        MODULES[script].main(MODULES[script].parse_args(line))


@both
def test_a_step_does_not_depend_on_how_it_is_shared_out(words, subset, tmp_path, script):
    """The same clips over micro-batches and over 1, 2 and 4 processes: what is logged, and every
    entry of every gradient."""
    pools = {n: subset(n, BRIEF, str(n)) for n in SHAPES}
    rows = [json.loads(line) for line in pools[4].read_text().splitlines()]
    for i in data.Plan(4, 4, seed=0)[0][1::2]:
        rows[i]["audio"] = str(pools[4])  # no audio: all that rank 1 of 2 gets
    data.write_jsonl(pools[4], rows)
    jobs = {1: [], 2: [], 4: []}
    for n, shapes in SHAPES.items():
        for world, micro_batch in shapes:
            job = f"{n}-{world}-{micro_batch}"
            line = words(script, job, steps=1, batch=n, micro_batch=micro_batch, data=pools[n])
            jobs[world].append((job, script, line))
    for world in jobs:
        start(first_steps, jobs[world], tmp_path, world=world)
    for n in SHAPES:
        record = metrics(tmp_path / f"{n}-1-{n}")[0]
        whole = torch.load(tmp_path / f"{n}-1-{n}-0.pt")
        assert record["tokens"] > n / 2 and record["rejected"] == (2 if n == 4 else 0)
        assert max(g.abs().max() for g in whole) > 1e-3
        for path in tmp_path.glob(f"{n}-*.pt"):
            for a, b in zip(whole, torch.load(path), strict=True):
                assert (a - b).abs().max() <= 1e-9 * max(1.0, a.abs().max().item()), path.name
        for world, micro_batch in SHAPES[n]:
            row = metrics(tmp_path / f"{n}-{world}-{micro_batch}")[0]
            assert row == pytest.approx(record, rel=1e-9, abs=1e-12)


def test_torchrun_makes_the_run_of_one_process(
        run, words, subset, corpus, checkpoints, tmp_path):
    """With loader workers, dev shared out; seven clips in batches of 3, 3 and 1."""
    flags = {"data": subset(7), "dev": corpus / "dev.jsonl", "steps": 3, "batch": 3,
             "micro_batch": 2, "eval_batch": 2, "lr": 1e-6, "workers": 1, "max_new_tokens": 40,
             "student": checkpoints / "teacher", "teacher": checkpoints / "student"}
    line = words("distill", "two", **flags)
    done = subprocess.run([*TORCHRUN, ROOT / "distill.py", *line], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    two = tmp_path / "two"
    assert steps_of(two) == [1, 2, 3] and states(two) == ["step-0000003"]
    assert metrics(two, "dev_error")[0]["dev_error"] > 100, "clips differ, or no share is seen"
    for a, b in zip(metrics(run("distill", **flags), "step"), metrics(two, "step"), strict=True):
        assert b == pytest.approx(a, rel=1e-4)  # updates are tiny, so that rounding stays rounding
    assert (two / "metrics.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------------------- stop and resume

class Killed(BaseException):
    """As abrupt as SIGKILL, for a run in this process."""


def kill_after_state(monkeypatch, at):
    """The run dies right after OUT/state/step-`at` was written."""
    def save_and_die(self, step, evaluation_due, save_run=model.Run.save_run):
        save_run(self, step, evaluation_due)
        if step == at:
            raise Killed

    monkeypatch.setattr(model.Run, "save_run", save_and_die)


@both
def test_resume_is_bit_for_bit(run, subset, corpus, tmp_path, monkeypatch, script):
    """Killed between two records, after an evaluation."""
    flags = {"data": subset(24, BRIEF), "batch": 5, "steps": 5, "micro_batch": 3, "save_every": 1,
             "log_every": 2, "eval_every": 2, "max_new_tokens": 6, "dev": corpus / "dev.jsonl"}
    straight = run(script, "straight", **flags)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after_state(patch, 3)
        run(script, "cut", **flags)
    cut = tmp_path / "cut"
    assert states(cut) == ["step-0000003"]
    with pytest.raises(FileExistsError, match="--resume"):  # not overwritten, not mixed in
        run(script, "cut", **flags)
    with (cut / "metrics.jsonl").open("a") as file:  # logged, then lost: must not stay in twice
        file.write('{"step": 4, "loss": 99.0}\n{"step": 4, "dev_error": 0.0}\n{"step": 5, "lo')
    (cut / "state" / "part").mkdir()  # killed while it was written
    run(script, "cut", resume=True, **flags)
    assert (steps_of(cut), steps_of(cut, "dev_error")) == ([2, 4, 5], [2, 4, 5])
    same_run(straight, cut)
    run(script, "cut", resume=True, **flags)  # nothing is left to do
    same_run(straight, cut)
    moments = load_file(cut / "state" / "step-0000005" / "training.safetensors")
    trained = {name.removesuffix(".exp_avg") for name in moments if name.endswith(".exp_avg")}
    heads = {"ctc_head.weight", "ctc_head.bias"} if script == "sft" else set()
    assert trained == weights(cut).keys() | heads


@both
def test_a_run_told_to_stop_saves_first_and_evaluates_when_it_is_resumed(
        run, subset, corpus, tmp_path, monkeypatch, script):
    flags = {"data": subset(8), "batch": 4, "steps": 4, "eval_every": 2, "max_new_tokens": 6,
             "dev": corpus / "dev.jsonl"}
    straight = run(script, "straight", **flags)

    def end_and_signal(self, step, batch, totals, *rest, end_step=model.Run.end_step):
        return end_step(self, step, batch, totals | {"signals": step == 2}, *rest)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(model.Run, "end_step", end_and_signal)
        run(script, "cut", **flags)
    cut = tmp_path / "cut"
    assert states(cut) == ["step-0000002"] and steps_of(cut, "dev_error") == []
    (cut / "metrics.jsonl").rename(tmp_path / "kept")
    with pytest.raises(FileExistsError, match="--resume"):  # a save alone is an earlier run, too
        run(script, "cut", **flags)
    (tmp_path / "kept").rename(cut / "metrics.jsonl")
    run(script, "cut", resume=True, **flags)
    assert steps_of(cut, "dev_error") == [2, 4]
    same_run(straight, cut)


def start_and_signal(script, line, store, how, world):
    """A run in processes of its own; after two records its first process gets a signal."""
    started = start(train, script, line, store, world=world, join=False)
    log = Path(line[line.index("--out") + 1]) / "metrics.jsonl"
    patience = time.time() + 120
    try:
        while not (log.exists() and len(log.read_text().splitlines()) >= 2):
            assert time.time() < patience
            time.sleep(0.01)
        os.kill(started.processes[0].pid, how)
        for process in started.processes:
            process.join(60)
            assert process.exitcode == {signal.SIGKILL: -9, signal.SIGTERM: 143}[how]
    finally:
        for process in started.processes:
            process.kill()


@pytest.mark.parametrize("script, how", [("sft", signal.SIGKILL), ("distill", signal.SIGTERM)])
def test_a_run_stopped_by_a_signal_goes_on_as_if_nothing_was(run, words, tmp_path, script, how):
    flags = {"steps": 24, "batch": 4, "workers": 1, "log_every": 4,
             "save_every": 3 if how == signal.SIGKILL else 1000}
    start_and_signal(script, words(script, "cut", **flags), tmp_path / "store", how, 1)
    assert "step-0000024" not in states(tmp_path / "cut")
    cut = run(script, "cut", resume=True, **flags)
    same_run(run(script, "straight", **flags | {"workers": 0}), cut)


def test_a_sigterm_to_one_process_stops_both_at_one_step(words, tmp_path):
    line = words("sft", steps=300, batch=2)
    start_and_signal("sft", line, tmp_path / "store", signal.SIGTERM, 2)
    assert states(tmp_path / "run") == [f"step-{steps_of(tmp_path / 'run')[-1]:07d}"]


def test_resume_takes_tokenizer_and_config_from_the_state(run, subset, tmp_path):
    """Another word in --data would move ids under the old weights; so would another width."""
    flags = {"student": None, "init": "random", "d_model": 16, "heads": 1, "vocab_size": 290,
             "batch": 2, "ctc": 0.3}
    run("sft", data=subset(4), steps=1, **flags)
    before = model.load(tmp_path / "run" / "state" / "step-0000001")
    other = subset(4, ["zzz qqq xyzzy xyzzy", *TEXTS["zh"]])
    run("sft", data=other, steps=2, resume=True, **flags | {"d_model": 32})
    after = model.load(tmp_path / "run")
    assert after.tokenizer.get_vocab() == before.tokenizer.get_vocab()
    assert after.net.config.hidden_size == 16
    moved = weights(tmp_path / "run")["model.embed_tokens.weight"] - before.body.embed_tokens.weight
    assert 0 < moved.abs().max() < 0.01


@both
def test_resume_with_nothing_saved_starts_anew_and_other_moments_are_refused(run, script):
    out = run(script, resume=True, steps=1, batch=2)
    assert steps_of(out) == [1]
    with pytest.raises(ValueError, match="state/step-0000001.*--freeze"):
        run(script, steps=2, resume=True, freeze="encoder")
    (out / "state" / "step-0000001" / "training.json").write_text("version https")
    with pytest.raises(ValueError, match="step-0000001/training.json"):
        run(script, steps=2, resume=True)


# ----------------------------------------------------------------------------- what can't be used

@both
def test_a_step_without_a_clip_updates_nothing_and_a_run_without_one_says_why(
        run, subset, checkpoints, tmp_path, script, capsys):
    one = subset(1)
    bad = {"id": "bad", "audio": str(one), "text": "it"}  # no audio
    data.write_jsonl(tmp_path / "none.jsonl", [bad])
    one.write_text(one.read_text() + (tmp_path / "none.jsonl").read_text())
    run(script, "one", data=one, steps=2, batch=1)
    rows = metrics(tmp_path / "one", "step")
    assert sorted(row["tokens"] > 0 for row in rows) == [False, True]
    assert "1 clips left out: unreadable" in capsys.readouterr().out
    empty = rows[0] if rows[0]["tokens"] == 0 else rows[1]
    assert (empty["loss"], empty["grad_norm"], empty["rejected"]) == (0, 0, 1)
    with pytest.raises(ValueError, match="none.jsonl"):
        run(script, "none", data=tmp_path / "none.jsonl", batch=1)
    assert not (tmp_path / "none" / "config.json").exists()  # no next stage takes it for trained


@both
def test_gradients_that_are_not_finite_stop_the_run_and_name_the_clips(
        run, tmp_path, monkeypatch, script):
    spoil = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden, weight: spoil(hidden, weight) * (
        math.nan if hidden.requires_grad else 1.0))
    with pytest.raises(FloatingPointError, match=r"step 0: .*'train-2'"):
        run(script, batch=24)
    assert not (tmp_path / "run" / "state").exists()


@both
def test_labels_and_outputs_are_checked_before_the_first_step(
        run, subset, corpus, checkpoints, tmp_path, script):
    untold = subset(3, name="untold", text=None)
    write_wav(tmp_path / "long.wav", np.full(41 * 16_000, 0.1))
    long = tmp_path / "long.jsonl"
    data.write_jsonl(long, [{"id": "odd", "audio": "long.wav", "text": "a"}])
    (tmp_path / "taken").write_text("a file")
    texts = {"sft": {}, "distill": {"states": "reference"}}[script]
    for error, said, flags in (
            (ValueError, "untold.jsonl:1", {"data": untold} | texts),
            (ValueError, "untold.jsonl:1", {"dev": untold}),
            (data.AudioError, "long.jsonl:1: odd", {"dev": [corpus / "dev.jsonl", long]})):
        with pytest.raises(error, match=said):
            run(script, **flags)
    assert not (tmp_path / "run").exists()
    with pytest.raises(OSError, match="taken"):
        run(script, "taken/x")
    shutil.copytree(checkpoints / "student", tmp_path / "old")
    with pytest.raises(FileExistsError, match="holds a checkpoint"):
        run(script, "old")


def test_distill_reads_transcripts_only_where_it_is_told_to(run, subset, student):
    wrong = subset(6, ["something else"], "wrong", language="xx")
    losses = []
    for pool in (subset(6), wrong, subset(6, name="without", text=None, language=None)):
        out = run("distill", pool.stem, data=pool, batch=6)
        losses.append([row["loss"] for row in metrics(out)])
    assert losses[0] == losses[1] == losses[2]
    brief = subset(5, BRIEF, "brief")
    record, = metrics(run("distill", data=brief, batch=5, steps=1, states="reference"))
    assert record["tokens"] == sum(len(student.encode_text(text)) for text in BRIEF)
    assert record["empty"] == 1  # one text is


def test_rollouts_are_drawn_anew_at_every_step_and_by_temperature_and_seed(run, subset):
    """At a learning rate of 1e-30 and with all clips in every step, nothing else can change."""
    pool = subset(6)
    losses = {}
    for name, temperature, seed in (("greedy", 0.0, 0), ("drawn", 1.0, 0), ("other", 1.0, 1)):
        out = run("distill", name, data=pool, batch=6, lr=1e-30, temperature=temperature, seed=seed)
        losses[name] = [row["loss"] for row in metrics(out)]
    assert losses["greedy"][0] == pytest.approx(losses["greedy"][1], rel=1e-5)
    assert abs(losses["drawn"][0] - losses["drawn"][1]) > 1e-3
    assert len({round(values[0], 3) for values in losses.values()}) == 3


# ------------------------------------------------------------------------------ dev, teacher, files

def test_a_language_the_teacher_is_not_told_stops_a_run_before_its_first_step(
        run, subset, qwen, tmp_path):
    flags = {"data": subset(5, language=None), "teacher": qwen / "thinker", "steps": 1}
    with pytest.raises(ValueError, match=r"pool.jsonl:1.*--language"):
        run("distill", **flags)
    with pytest.raises(ValueError, match=r"pool.jsonl:1.*'klingon'"):
        run("distill", language="klingon", **flags)
    with pytest.raises(ValueError, match="only students"):
        run("distill", student=qwen / "hf", **flags)
    assert not (tmp_path / "run").exists()
    run("distill", language="zh", **flags)


@both
def test_out_is_the_best_on_dev_and_state_the_last(run, corpus, monkeypatch, script):
    """Of two dev sets the mean counts."""
    shutil.copy(corpus / "dev.jsonl", corpus / "other.jsonl")
    flags = {"batch": 3, "eval_every": 1, "save_every": 3,
             "dev": [corpus / "dev.jsonl", corpus / "other.jsonl"]}
    errors = iter([50.0, 70.0, 20.0, 20.0, 10.0, 40.0, 10.0, 40.0, 12.0, 30.0])
    seen = []  # weights at every evaluation

    def scripted(asr, *_):
        seen.append({name: value.clone() for name, value in asr.net.state_dict().items()})
        return next(errors)

    def is_seen(path, n):
        return all(torch.equal(value, seen[2 * n][name]) for name, value in weights(path).items())

    monkeypatch.setattr(model, "dev_error", scripted)
    out = run(script, steps=3, **flags)
    assert is_seen(out, 1) and not is_seen(out, 2)
    assert states(out) == ["step-0000003"] and is_seen(out / "state" / "step-0000003", 2)
    assert metrics(out, "dev_error")[0]["dev_error/other"] == 70.0
    # The state knows the best: 21 is better than 25, not than 20. The last evaluation is repeated.
    run(script, steps=4, resume=True, **flags)
    assert is_seen(out, 1) and is_seen(out / "state" / "step-0000004", 4)
    assert [row["dev_error"] for row in metrics(out, "dev_error")] == [60.0, 20.0, 25.0, 21.0]


def test_dev_lines_without_a_language_have_the_given_one(run, subset, monkeypatch):
    seen = []
    monkeypatch.setattr(model, "dev_error", lambda asr, dev, *_: seen.extend(dev.languages) or 1.0)
    run("sft", dev=subset(3, language=None), language="zh", steps=1)
    assert seen == ["zh"]


def test_dev_error_is_the_pooled_rate_of_greedy_transcripts(corpus, student):
    args = sft.parse_args("--data x --out x --student x --eval_batch 4 --max_new_tokens 8".split())
    dev = data.read_manifest(corpus / "dev.jsonl")
    errors, units = 0, 0
    for u in dev:
        hyp = model.transcribe(student, data.load_batch([u]), 8)[0]["hyp"]
        counts = data.edit_counts(u.text, hyp, u.language)
        errors += counts.errors
        units += len(data.normalize(u.text, u.language).split())
    assert model.dev_error(student, dev, args) == pytest.approx(100 * errors / units)
    gone = [data.Utterance("x", str(corpus / "gone.wav"), "a")]
    with pytest.raises(data.AudioError, match="gone.wav"):  # a rate over fewer clips would lie
        model.dev_error(student, gone, args)
