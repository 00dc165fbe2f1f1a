"""sft.py and distill.py as they are run: updates, processes, resume, stops, what is read and what is written.

    pytest tests/test_training.py

Runs are of a few steps on clips of a second. Most are made in this process; torchrun and signals
need real ones (some 10 s each).
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
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import data
import distill
import model
import sft
from conftest import twins

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
ENVIRONMENT["PYTHONPATH"] = f"{ROOT / 'tests'}{os.pathsep}{ROOT}"


@pytest.fixture(autouse=True)
def default_sigterm():
    """The scripts install a handler for SIGTERM; pytest keeps its own."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def words(flags):
    """{"batch": 4, "resume": True, "ctc": None} -> --batch 4 --resume; None leaves a flag out."""
    line = []
    for flag, value in flags.items():
        if value is True:
            line += [f"--{flag}"]
        elif value is not None:
            line += [f"--{flag}", str(value)]
    return line


COMMON = {"device": "cpu", "workers": 0, "log_every": 1, "eval_every": 1000, "save_every": 1000, "steps": 2,
          "batch": 8, "micro_batch": 8, "warmup": 2, "eval_batch": 4, "lr": 1e-3}


def sft_words(corpus, checkpoints, out, **changes):
    own = {"data": corpus / "train.jsonl", "student": checkpoints / "student", "out": out}
    return words(COMMON | own | changes)


def distil_words(corpus, checkpoints, out, **changes):
    own = {"data": corpus / "train.jsonl", "student": checkpoints / "student",
           "teacher": checkpoints / "teacher", "out": out, "max_new_tokens": 8}
    return words(COMMON | own | changes)


def run_sft(*args, **changes):
    sft.main(sft.parse_args(sft_words(*args, **changes)))


def run_distil(*args, **changes):
    distill.main(distill.parse_args(distil_words(*args, **changes)))


MODULES = {"sft": sft, "distill": distill}
RUNS = {"sft": (run_sft, {"ctc": 0.3, "spec_augment": True}), "distill": (run_distil, {})}
both = pytest.mark.parametrize("script", ["sft", "distill"])


def metrics(out, key="loss"):
    """Rows of metrics.jsonl that have `key`."""
    rows = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if key in row]


def steps_of(out, key="loss"):
    return [row["step"] for row in metrics(out, key)]


def weights(out):
    return (Path(out) / "model.safetensors").read_bytes()


def states(out):
    return sorted(p.name for p in (Path(out) / "state").iterdir())


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def subset(corpus, path, n, **changes):
    """The first n lines of train.jsonl as a manifest elsewhere; changes: keys to set, None to drop."""
    rows = []
    for row in read_rows(corpus / "train.jsonl")[:n]:
        row |= changes | {"audio": str(corpus / row["audio"])}
        rows.append({key: value for key, value in row.items() if value is not None})
    data.write_jsonl(path, rows)
    return path


def brief(corpus, path, n):
    """The same with transcripts so short that CTC finds room for most of them in a third of a
    second, of unequal length all the same."""
    rows = read_rows(subset(corpus, path, n, language="en"))
    texts = ["it", "put", "the", "hide it"]
    for i, row in enumerate(rows):
        row["text"] = texts[i % 4]
    data.write_jsonl(path, rows)
    return path


# ---------------------------------------------------------------------------- (a) the update, whatever it is cut into

@both
def test_the_arithmetic_of_a_gpu_runs(corpus, checkpoints, tmp_path, monkeypatch, script):
    """bf16 autocast on the CPU: no GPU here, but mixed dtypes clash in the same places (RoPE's fp32
    keys in the cache, the CTC head)."""
    run, own = RUNS[script]
    run(corpus, checkpoints, tmp_path / "fp32", steps=1, **own)
    monkeypatch.setattr(model, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    run(corpus, checkpoints, tmp_path / "bf16", steps=1, dev=corpus / "dev.jsonl", **own)
    one = metrics(tmp_path / "fp32")[0]
    two = metrics(tmp_path / "bf16")[0]
    assert one["loss"] != two["loss"]
    assert math.isfinite(two["grad_norm"])
    if script == "sft":  # distill's rollouts may part at the first token that bf16 draws differently
        assert two["loss"] == pytest.approx(one["loss"], rel=0.05)


@both
def test_micro_batches_do_not_change_the_update(corpus, checkpoints, tmp_path, script):
    run, own = RUNS[script]
    pool = brief(corpus, tmp_path / "brief.jsonl", 24)
    for size in (8, 3):
        run(corpus, checkpoints, tmp_path / str(size), data=pool, micro_batch=size, lr=1e-4, **own)
    whole = metrics(tmp_path / "8")
    cut = metrics(tmp_path / "3")
    assert len(whole) == 2
    assert [row["tokens"] for row in whole] == [row["tokens"] for row in cut]
    for key in ("loss", "grad_norm"):
        assert whole[0][key] == pytest.approx(cut[0][key], rel=1e-5)
    assert [row["lr"] for row in whole] == pytest.approx([0.5e-4, 1e-4])  # two steps of warm-up
    a = load_file(tmp_path / "8" / "model.safetensors")
    b = load_file(tmp_path / "3" / "model.safetensors")
    before = load_file(checkpoints / "student" / "model.safetensors")
    for name in a:
        assert (a[name] - before[name]).abs().max() > 1e-6, f"{name} did not move"
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5, msg=name)


def lm_logits(asr, clip, written):
    """(V,) logits behind `written` ids: one clip, transformers' forward without cache or padding.
    Oracle."""
    audio, _ = asr.net.audio_encoder(clip.mel, clip.n_frames)
    before = asr.body.embed_tokens(torch.tensor([asr.prefix_ids]))
    after = asr.body.embed_tokens(torch.tensor([asr.suffix_ids + written]))
    z = asr.net.lm(inputs_embeds=torch.cat([before, audio, after], dim=1)).logits[0, -1]
    return z.double().masked_fill(asr.blocked, -math.inf)


@torch.no_grad()
def test_first_loss_of_sft_is_a_mean_over_all_response_tokens(corpus, checkpoints, student, tmp_path):
    """Every clip alone: sum of -log p over text and EOS, divided by the number of both."""
    part = subset(corpus, tmp_path / "part.jsonl", 10)
    with torch.enable_grad():
        run_sft(corpus, checkpoints, tmp_path / "run", steps=1, batch=10, micro_batch=4, data=part)
    total = 0.0
    count = 0
    for u in data.read_manifest(part):
        clip = data.load_batch([u])
        response = student.tokenizer.encode(u.text) + [student.eos_id]
        for t, token in enumerate(response):
            total -= lm_logits(student, clip, response[:t]).log_softmax(-1)[token].item()
        count += len(response)
    row, = metrics(tmp_path / "run")
    assert row["tokens"] == count
    assert row["loss"] == pytest.approx(total / count, rel=1e-5)


@torch.no_grad()
def test_first_loss_of_distill_is_the_mean_divergence_on_own_words(corpus, checkpoints, student, teacher, tmp_path):
    """One clip at a time, one prefix at a time: loss, agreement, entropy, tokens."""
    pool = subset(corpus, tmp_path / "pool.jsonl", 7)
    with torch.enable_grad():
        run_distil(corpus, checkpoints, tmp_path / "run", steps=1, batch=7, micro_batch=7, data=pool, seed=4)
    divergences = []
    entropies = []
    agree = 0
    stopped = 0
    for u in data.read_manifest(pool):
        clip = data.load_batch([u])
        written = []
        for uniform in data.keyed_uniforms(4, 0, [u.id], 8)[0]:
            z_s = lm_logits(student, clip, written)
            z_t = lm_logits(teacher, clip, written)
            p_s = z_s.softmax(-1)
            pairs = zip(p_s.tolist(), z_t.softmax(-1).tolist())
            divergences.append(sum(s * math.log(s / t) for s, t in pairs if s > 0))
            entropies.append(-sum(s * math.log(s) for s in p_s.tolist() if s > 0))
            agree += int(z_s.argmax() == z_t.argmax())
            written.append(int((p_s.cumsum(-1) > uniform).nonzero()[0]))
            if written[-1] == student.eos_id:
                stopped += 1
                break
    row, = metrics(tmp_path / "run")
    n = len(divergences)
    assert 0 < stopped < 7, "the row that predicts EOS is among those that count: some rollouts must have one"
    assert row["tokens"] == n
    assert row["tokens_per_clip"] == pytest.approx(n / 7)
    assert row["truncated"] == pytest.approx(1 - stopped / 7)
    assert row["loss"] == pytest.approx(sum(divergences) / n, rel=1e-4)
    assert row["entropy"] == pytest.approx(sum(entropies) / n, rel=1e-4)
    assert row["top1_agreement"] == pytest.approx(agree / n)
    assert row["not_scored"] == 0


@torch.no_grad()
def test_tokens_without_a_counterpart_are_left_out_and_counted(corpus, checkpoints, student, foreign_teacher, tmp_path):
    """A teacher with another vocabulary, asked for one prefix at a time with its own ids of the
    student's tokens."""
    pool = subset(corpus, tmp_path / "pool.jsonl", 12)
    model.save(foreign_teacher, tmp_path / "foreign")
    with torch.enable_grad():
        run_distil(corpus, checkpoints, tmp_path / "run", steps=1, batch=12, micro_batch=5, data=pool,
                   teacher=tmp_path / "foreign")
    pairs = twins(student, foreign_teacher)
    assert any(i != j for i, j in pairs.items())  # equal ids would hide a map that is not used
    ours = list(pairs)
    theirs = list(pairs.values())
    emitted = 0
    unknown = 0
    total = 0.0
    count = 0
    for u in data.read_manifest(pool):
        clip = data.load_batch([u])
        prompt = model.encode_audio(student, clip)
        ids, mask = model.roll_out(student, prompt, 8, 1.0, data.keyed_uniforms(0, 0, [u.id], 8))
        written = ids[mask].tolist()
        emitted += len(written)
        for t, token in enumerate(written):
            if token not in pairs:
                unknown += 1
                break
            logp_s = lm_logits(student, clip, written[:t])[ours].log_softmax(-1)
            logp_t = lm_logits(foreign_teacher, clip, [pairs[i] for i in written[:t]])[theirs].log_softmax(-1)
            total += (logp_s.exp() * (logp_s - logp_t)).sum().item()
            count += 1
    row, = metrics(tmp_path / "run")
    assert unknown > 0
    assert row["tokens"] == count
    assert row["not_scored"] == emitted - count
    assert row["loss"] == pytest.approx(total / count, rel=1e-4)


def test_rollouts_are_drawn_anew_at_every_step_and_by_temperature(corpus, checkpoints, tmp_path):
    """With a learning rate of 1e-30 and all clips in every step, nothing but the rollouts can change."""
    pool = subset(corpus, tmp_path / "pool.jsonl", 6)
    first = {}
    for name, temperature, seed in (("greedy", 0.0, 0), ("sampled", 1.0, 0), ("again", 1.0, 0), ("other", 1.0, 1)):
        out = tmp_path / name
        run_distil(corpus, checkpoints, out, data=pool, batch=6, lr=1e-30, temperature=temperature, seed=seed)
        first[name] = [row["loss"] for row in metrics(out)]
    assert first["greedy"][0] == pytest.approx(first["greedy"][1], rel=1e-5)
    assert abs(first["sampled"][0] - first["sampled"][1]) > 1e-3
    assert first["again"] == first["sampled"]
    assert len({round(first[name][0], 3) for name in ("greedy", "sampled", "other")}) == 3


def test_the_ctc_loss_adds_its_weight_to_the_gradient(corpus, checkpoints, tmp_path, monkeypatch):
    """g(w) = g_ce + w g_ctc, so that g(0.6) - g(0) = 2 (g(0.3) - g(0)); the LM hears of CTC only
    through the audio."""
    average = sft.average_gradients
    found = {}

    def keep(parameters, n_tokens):
        average(parameters, n_tokens)
        found[weight] = [p.grad.clone() for p in parameters]

    monkeypatch.setattr(sft, "average_gradients", keep)
    pool = brief(corpus, tmp_path / "brief.jsonl", 8)
    for weight in (0.0, 0.3, 0.6):
        run_sft(corpus, checkpoints, tmp_path / str(weight), data=pool, steps=1, ctc=weight)
    assert metrics(tmp_path / "0.3")[0]["ctc"] > 0
    largest = 0.0
    for none, once, twice in zip(found[0.0], found[0.3], found[0.6]):  # the CTC head's come last, and not in the first
        torch.testing.assert_close(twice - none, 2 * (once - none), rtol=1e-3, atol=1e-5)
        largest = max(largest, (once - none).abs().max().item())
    assert largest > 1e-3


# ---------------------------------------------------------------------------- (b) real processes

def start_processes(function, *args, world):
    """function(rank, world, *args) in `world` processes.

    A server that has only imported this file forks them: no seconds of imports for each, nothing
    inherited from pytest's. """
    multiprocessing.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        # The server does not take over sys.path before Python 3.13.
        patch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
        torch.multiprocessing.start_processes(
            function, (world, *args), nprocs=world, start_method="forkserver")


def take_place(rank, world):
    """What torchrun tells a process."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)


def meet_in(path, rank, world, join=torch.distributed.init_process_group):
    """Later process groups meet in a file instead of at a port."""
    def meet(backend, **_):
        patience = timedelta(seconds=60)  # ranks that wait for each other are an error, no hang
        join(backend, f"file://{path}", patience, world, rank)

    torch.distributed.init_process_group = meet


def train(rank, world, script, arguments, folder):
    take_place(rank, world)
    meet_in(folder / "store", rank, world)
    MODULES[script].main(MODULES[script].parse_args(arguments))


def two_forked(script, arguments, folder):
    start_processes(train, script, arguments, folder, world=2)


def torchrun(script, arguments, _):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launch, ROOT / f"{script}.py", *arguments], env=ENVIRONMENT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


LOGGED = {"sft": ("ctc",), "distill": (*model.AGREEMENT, "truncated", "empty", "repeats")}


@both
def test_two_processes_make_the_same_update(corpus, checkpoints, tmp_path, script):
    """Seven clips in batches of 3, 3 and 1: ranks with two rows and one, and a rank with none. Dev
    is shared out, too."""
    make_manifest = brief if script == "sft" else subset
    arguments = sft_words if script == "sft" else distil_words
    run, own = RUNS[script]
    seven = make_manifest(corpus, tmp_path / "seven.jsonl", 7)
    own = own | {"data": seven, "dev": corpus / "dev.jsonl", "steps": 3, "batch": 3, "micro_batch": 3,
                 "eval_batch": 2, "max_new_tokens": 6, "lr": 1e-6}
    launch = {"sft": two_forked, "distill": torchrun}[script]
    launch(script, arguments(corpus, checkpoints, tmp_path / "two", **own), tmp_path)
    run(corpus, checkpoints, tmp_path / "one", **own)
    one = metrics(tmp_path / "one")
    two = metrics(tmp_path / "two")
    assert steps_of(tmp_path / "one") == steps_of(tmp_path / "two") == [1, 2, 3]
    for key in ("tokens", "loss", "grad_norm", *LOGGED[script]):
        assert two[0][key] == pytest.approx(one[0][key], rel=1e-5), key
        for a, b in zip(one, two):  # updates are tiny here, so that rounding stays rounding
            assert b[key] == pytest.approx(a[key], rel=1e-4), key
    assert steps_of(tmp_path / "two", "dev_error") == [3]
    assert states(tmp_path / "two") == ["step-0000003"]


# ---- the first step, however it is shared out: gradients entry by entry

OBJECTIVES = {
    "sft": ("sft", {"ctc": 0.3}),
    "reverse full": ("distill", {}),
    "forward union": ("distill", {"divergence": "forward", "support": "union", "top_k": 4, "tau": 2.0}),
    "sampled": ("distill", {"support": "sampled"}),
}
SHAPES = {  # (processes, utterances a micro-batch)
    "eight": [(1, 8), (1, 4), (1, 2), (2, 4), (2, 2), (4, 2)],  # 8 = 1 x 8 = 2 x 4 = 4 x 2
    "fewer clips than ranks": [(1, 3), (4, 1)],
    "a rank without a counterpart": [(1, 4), (2, 2)],
}
COMPARED = [(objective, "eight") for objective in OBJECTIVES] + [
    ("sft", "fewer clips than ranks"),
    ("reverse full", "fewer clips than ranks"),
    ("reverse full", "a rank without a counterpart"),
    ("forward union", "a rank without a counterpart"),
]


def written(batches, rollouts):
    """What distill.roll_out returned -> {clip: ids}."""
    found = {}
    for batch, (ids, mask) in zip(batches, rollouts, strict=True):
        for u, row, emitted in zip(batch.utterances, ids, mask, strict=True):
            found[u.id] = row[emitted].tolist()
    return found


def first_steps(rank, world, jobs, folder):
    """Make the first step of each job in float64 and leave what this process saw in
    FOLDER/<job>-<rank>.pt.

    fp32 would blur 1e-6: its own rounding is 6e-8 a term, and another batch shape sums its terms in
    another order. """
    take_place(rank, world)
    torch.Tensor.float = torch.Tensor.double  # .float() says "at least fp32" in all of this code
    load = model.load
    draw_map = model.vocabulary_map
    roll_out = distill.roll_out
    in_chunks = distill.loss_in_chunks

    def load_double(name, *_):
        asr = load(name)
        asr.net.double()
        torch.set_default_dtype(torch.float64)  # for what is new: the CTC head
        return asr

    def map_with_holes(*pair):
        to_teacher = draw_map(*pair)
        to_teacher[holes] = -1
        return to_teacher

    def keep_rollouts(student, prompts, batches, step, args):
        rollouts = roll_out(student, prompts, batches, step, args)
        seen["rollouts"] |= written(batches, rollouts)
        return rollouts

    def count_rows(hidden_s, *rest):
        seen["rows"] += len(hidden_s)
        return in_chunks(hidden_s, *rest)

    def save_nothing(*args, **kwargs):
        pass

    model.load = load_double
    model.vocabulary_map = map_with_holes
    distill.roll_out = keep_rollouts
    distill.loss_in_chunks = count_rows
    model.save = model.save_training = save_nothing
    average = {name: module.average_gradients for name, module in MODULES.items()}
    for name, script, line, holes in jobs:
        def keep_gradients(parameters, n_tokens):
            average[script](parameters, n_tokens)
            seen["gradients"] = [p.grad.clone() for p in parameters]

        module = MODULES[script]
        module.average_gradients = keep_gradients
        seen = {"rows": 0, "rollouts": {}}
        meet_in(folder / f"{name}-store", rank, world)
        module.main(module.parse_args(line))
        torch.save(seen, folder / f"{name}-{rank}.pt")


def seed_without_overlap(student, utterances):
    """A seed whose first batch of four leaves the second of two ranks without a token, if the first
    ids of its rollouts lack a counterpart.

    -> seed, those ids.
    """
    durations = data.measure(utterances)
    for seed in range(100):
        firsts = []
        for i in data.Plan(durations, 4, seed)[0]:
            prompt = model.encode_audio(student, data.load_batch([utterances[i]]))
            uniforms = data.keyed_uniforms(seed, 0, [utterances[i].id], 8)
            ids, _ = model.roll_out(student, prompt, 1, 1.0, uniforms)
            firsts.append(ids[0].item())
        if student.eos_id not in firsts and not set(firsts[0::2]) & set(firsts[1::2]):
            return seed, firsts[1::2]
    raise AssertionError("no such seed")


@pytest.fixture(scope="module")
def splits(corpus, checkpoints, student, tmp_path_factory):
    """All first steps that the next tests compare: {(objective, case): {(world, micro_batch):
    (record, [what each rank saw])}}."""
    folder = tmp_path_factory.mktemp("splits")
    pool = subset(corpus, folder / "eight.jsonl", 8)
    seed, lacking = seed_without_overlap(student, data.read_manifest(pool))
    cases = {
        "eight": ({"batch": 8, "seed": 4}, []),
        "fewer clips than ranks": ({"batch": 3}, []),
        "a rank without a counterpart": ({"batch": 4, "seed": seed}, lacking),
    }
    jobs = {1: [], 2: [], 4: []}
    names = {}
    for objective, case in COMPARED:
        script, own = OBJECTIVES[objective]
        changes, holes = cases[case]
        arguments = sft_words if script == "sft" else distil_words
        for world, micro_batch in SHAPES[case]:
            name = f"{objective}-{case}-{world}-{micro_batch}".replace(" ", "_")
            line = arguments(corpus, checkpoints, folder / name, **own, **changes, steps=1,
                             micro_batch=micro_batch, data=pool)
            jobs[world].append((name, script, line, holes))
            names[objective, case, world, micro_batch] = name
    for world in jobs:
        start_processes(first_steps, jobs[world], folder, world=world)
    found = {}
    for (objective, case, world, micro_batch), name in names.items():
        ranks = [torch.load(folder / f"{name}-{rank}.pt") for rank in range(world)]
        found.setdefault((objective, case), {})[world, micro_batch] = (metrics(folder / name)[0], ranks)
    return found


@pytest.mark.parametrize("objective, case", COMPARED)
def test_the_first_step_does_not_depend_on_how_it_is_shared_out(splits, objective, case):
    """The same utterances over micro-batches and over 1, 2 and 4 processes: loss and every entry of
    every gradient to 1e-6."""
    shapes = splits[objective, case]
    log, (one,) = shapes[SHAPES[case][0]]
    largest = max(g.abs().max().item() for g in one["gradients"])
    assert len(one["gradients"]) > 40
    assert largest > 1e-3
    assert log["tokens"] > 0
    logged = ("loss", "tokens_per_clip", "not_scored", "truncated")
    if objective == "sft":
        logged = ("loss", "ctc")
    for shape, (row, ranks) in shapes.items():
        assert row["tokens"] == log["tokens"], shape
        for key in logged:
            assert row[key] == pytest.approx(log[key], rel=1e-6, abs=1e-9), (shape, key)
        for rank in ranks:
            for a, b in zip(one["gradients"], rank["gradients"], strict=True):
                assert (a - b).abs().max() <= 1e-6 * max(a.abs().max().item(), 1e-6 * largest), shape


@pytest.mark.parametrize("case", SHAPES)
def test_ranks_have_unequal_shares_in_these_cases(splits, case):
    """A mean per rank would be another one; and some ranks have no clip, or clips none of whose
    tokens counts."""
    shares = {}
    for shape, (row, ranks) in splits["reverse full", case].items():
        shares[shape] = [rank["rows"] for rank in ranks]
        assert sum(shares[shape]) == row["tokens"]
    if case == "eight":
        assert len(set(shares[2, 4])) == 2
        assert len(set(shares[4, 2])) > 2
    elif case == "fewer clips than ranks":
        assert 0 in shares[4, 1]
    else:
        assert 0 in shares[2, 2]
        assert splits["reverse full", case][1, 4][0]["not_scored"] > 0


@pytest.mark.parametrize("case", SHAPES)
def test_the_logged_agreement_does_not_depend_on_the_number_of_ranks(splits, case):
    """It is that of every rank's last micro-batch: where that is all it has, all shapes log the
    same."""
    whole = [(world, micro) for world, micro in SHAPES[case] if world * micro >= {"eight": 8}.get(case, 3)]
    first = splits["reverse full", case][whole[0]][0]
    for shape in whole:
        row, _ = splits["reverse full", case][shape]
        for key in model.AGREEMENT:
            assert row[key] == pytest.approx(first[key], rel=1e-6), (shape, key)


@pytest.mark.parametrize("case", SHAPES)
def test_rollouts_do_not_depend_on_how_they_are_shared_out(splits, case):
    n_clips = {"eight": 8, "fewer clips than ranks": 3, "a rank without a counterpart": 4}[case]
    first = None
    for _, ranks in splits["reverse full", case].values():
        together = {}
        for rank in ranks:
            together |= rank["rollouts"]
        first = first or together
        assert together == first
    assert len(first) == n_clips
    if case == "eight":
        assert len({len(row) for row in first.values()}) > 2


def resume_elsewhere(rank, world, line, folder):
    """Resume a run from a folder that only this rank sees; leave the error in FOLDER/<rank>.txt."""
    take_place(rank, world)
    meet_in(folder / "store", rank, world)
    try:
        sft.main(sft.parse_args([*line, "--out", str(folder / str(rank))]))
    except RuntimeError as error:
        (folder / f"{rank}.txt").write_text(str(error))


def test_ranks_that_find_different_steps_stop_and_name_them(corpus, checkpoints, tmp_path):
    """Two nodes with an --out each: one resumes at step 1, the other would start anew, and they
    would wait for each other."""
    run_sft(corpus, checkpoints, tmp_path / "0", steps=1, batch=2)
    line = sft_words(corpus, checkpoints, None, steps=2, batch=2, resume=True)
    start_processes(resume_elsewhere, line, tmp_path, world=2)
    for rank in (0, 1):
        assert "[1, 0]" in (tmp_path / f"{rank}.txt").read_text()


def test_rollouts_do_not_depend_on_a_resume(corpus, checkpoints, tmp_path, monkeypatch):
    """Drawn after a resume, in other micro-batches: by utterance and step what the straight run
    draws. (lr 1e-30: other sums, same weights.)"""
    seen = {}
    roll_out = distill.roll_out

    def keep_rollouts(student, prompts, batches, step, args):
        rollouts = roll_out(student, prompts, batches, step, args)
        for clip, ids in written(batches, rollouts).items():
            seen[step, clip] = ids
        return rollouts

    monkeypatch.setattr(distill, "roll_out", keep_rollouts)
    own = {"steps": 3, "batch": 6, "lr": 1e-30, "save_every": 1}
    run_distil(corpus, checkpoints, tmp_path / "straight", micro_batch=6, **own)
    straight = dict(seen)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after_state(patch, 1)
        run_distil(corpus, checkpoints, tmp_path / "cut", micro_batch=6, **own)
    seen.clear()
    run_distil(corpus, checkpoints, tmp_path / "cut", micro_batch=4, resume=True, **own)
    assert len(straight) == 18
    assert seen == {key: row for key, row in straight.items() if key[0] > 0}
    assert len({tuple(row) for row in straight.values()}) > 12


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
@pytest.mark.parametrize("killed_at", [2, 3], ids=["saved, not yet evaluated", "between evaluations"])
def test_resume_is_bit_for_bit(corpus, checkpoints, tmp_path, monkeypatch, script, killed_at):
    """Killed right after a save, where an evaluation of the same weights comes next (every second
    step) and where none does."""
    run, own = RUNS[script]
    own = own | {"data": brief(corpus, tmp_path / "brief.jsonl", 24), "steps": 5, "save_every": 1, "batch": 5,
                 "micro_batch": 3, "dev": subset(corpus, tmp_path / "dev.jsonl", 3), "eval_every": 2,
                 "max_new_tokens": 6}
    straight = tmp_path / "straight"
    cut = tmp_path / "cut"
    run(corpus, checkpoints, straight, **own)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after_state(patch, killed_at)
        run(corpus, checkpoints, cut, **own)
    assert states(cut) == [f"step-{killed_at:07d}"]
    with (cut / "metrics.jsonl").open("a") as file:  # logged, then lost: must not stay in the log twice
        file.write('{"step": 4, "loss": 99.0}\n{"step": 4, "dev_error": 0.0}\n{"step": 5, "lo')
    run(corpus, checkpoints, cut, resume=True, **own)
    assert states(cut) == states(straight) == ["step-0000005"]
    assert weights(cut) == weights(straight)
    for file in ("model.safetensors", "training.safetensors", "training.json"):
        ours = cut / "state" / "step-0000005" / file
        theirs = straight / "state" / "step-0000005" / file
        assert ours.read_bytes() == theirs.read_bytes(), file
    assert steps_of(cut) == [1, 2, 3, 4, 5]
    assert steps_of(cut, "dev_error") == [2, 4, 5]
    for ours, theirs in zip(metrics(cut, "step"), metrics(straight, "step"), strict=True):
        ours.pop("audio_per_sec", None)
        theirs.pop("audio_per_sec", None)
        assert ours == theirs
    before = weights(cut)
    run(corpus, checkpoints, cut, resume=True, **own)  # nothing is left to do
    assert weights(cut) == before
    assert steps_of(cut) == [1, 2, 3, 4, 5]


@both
def test_resume_before_the_first_log_line(corpus, checkpoints, tmp_path, monkeypatch, script):
    """States may be saved more often than lines are logged: a run that dies in between has no
    metrics.jsonl yet."""
    run, _ = RUNS[script]
    own = {"steps": 3, "save_every": 1, "log_every": 100, "batch": 2}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after_state(patch, 1)
        run(corpus, checkpoints, tmp_path / "run", **own)
    run(corpus, checkpoints, tmp_path / "run", resume=True, **own)
    assert steps_of(tmp_path / "run") == [3]
    assert states(tmp_path / "run") == ["step-0000003"]


@both
def test_resume_with_nothing_saved_starts_anew(corpus, checkpoints, tmp_path, script):
    run, _ = RUNS[script]
    run(corpus, checkpoints, tmp_path / "run", resume=True, steps=1, batch=2)
    assert steps_of(tmp_path / "run") == [1]


# ---------------------------------------------------------------------------- (d) how a run ends

def start(program, arguments):
    """A process with a group of its own, as a shell starts one; signals to the group reach the
    loader's workers too."""
    return subprocess.Popen([sys.executable, *program, *map(str, arguments)], env=ENVIRONMENT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def group_is_gone(process):
    """Has everything that the process started ended, within two seconds?"""
    for _ in range(40):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_sigterm_saves_and_leaves_and_the_rest_is_as_without_it(corpus, checkpoints, tmp_path):
    own = {"steps": 60, "batch": 6, "micro_batch": 6, "workers": 1}
    stopped = tmp_path / "stopped"
    log = stopped / "metrics.jsonl"
    patience = time.time() + 120
    process = start([ROOT / "sft.py"], sft_words(corpus, checkpoints, stopped, **own))
    try:
        while not (log.exists() and len(log.read_text().splitlines()) >= 3):
            assert process.poll() is None and time.time() < patience, process.stdout.read()[-3000:]
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGTERM)  # as torchrun and schedulers do
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143, output[-3000:]
    step = metrics(stopped)[-1]["step"]
    assert 3 <= step < 60
    assert states(stopped) == [f"step-{step:07d}"]
    run_sft(corpus, checkpoints, stopped, resume=True, **own)
    run_sft(corpus, checkpoints, tmp_path / "straight", **own)
    assert weights(stopped) == weights(tmp_path / "straight")
    assert steps_of(stopped) == list(range(1, 61))


HALFWAY = """
import sys
from pathlib import Path
import sft

average = sft.average_gradients
moment, what = Path(sys.argv[1]), sys.argv[2]

def in_the_second_step(parameters, n_tokens):
    average(parameters, n_tokens)
    if moment.exists():
        return
    if moment.with_suffix(".first").exists():
        moment.touch()
        if what == "exception":
            raise RuntimeError("as out of memory")
    moment.with_suffix(".first").touch()

sft.average_gradients = in_the_second_step
sft.main(sft.parse_args(sys.argv[3:]))
"""


SAID = {"last step": "", "exception": "as out of memory", "interrupt": "KeyboardInterrupt"}


def test_a_run_with_loader_workers_ends_by_itself(corpus, checkpoints, tmp_path):
    """After its last step, at Ctrl-C and at an exception: within ten seconds, and no worker is left
    behind."""
    processes = {}
    patience = time.time() + 120
    for what in SAID:
        steps = 3 if what == "last step" else 100_000
        line = sft_words(corpus, checkpoints, tmp_path / what, workers=2, steps=steps, batch=4)
        processes[what] = start(["-c", HALFWAY], [tmp_path / f"{what}.moment", what, *line])
    try:
        for what, process in processes.items():
            while not (tmp_path / f"{what}.moment").exists():
                assert process.poll() is None and time.time() < patience, process.stdout.read()[-3000:]
                time.sleep(0.02)
            if what == "interrupt":
                os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            output, _ = process.communicate(timeout=10)
            assert SAID[what] in output, what
            assert (process.returncode == 0) == (what == "last step"), output[-3000:]
            assert group_is_gone(process), what
    finally:
        for process in processes.values():
            process.kill()


@both
def test_a_stop_in_this_process_has_exit_code_143(corpus, checkpoints, tmp_path, monkeypatch, script):
    run, _ = RUNS[script]
    module = MODULES[script]
    average = module.average_gradients
    calls = []

    def stop_during_the_second_step(*args):
        average(*args)
        calls.append(1)
        if len(calls) == 2:  # after this step's look at the flag: the third step sees it
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(module, "average_gradients", stop_during_the_second_step)
    with pytest.raises(SystemExit) as stopped:
        run(corpus, checkpoints, tmp_path / "run", steps=9, batch=2)
    assert stopped.value.code == 143
    assert states(tmp_path / "run") == ["step-0000003"]
    assert steps_of(tmp_path / "run") == [1, 2, 3]


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
    """A state of other flags left in --out would be kept in place of this run's, and be what
    --resume continues from."""
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
    bad = {"id": "bad", "audio": str(tmp_path / "broken.wav"), "text": "find peter", "language": "en",
           "duration": 0.7}
    good = subset(corpus, tmp_path / "good.jsonl", 4)
    data.write_jsonl(tmp_path / "mixed.jsonl", [*read_rows(good), bad])
    run(corpus, checkpoints, tmp_path / "mixed", data=tmp_path / "mixed.jsonl", steps=1, batch=5)
    run(corpus, checkpoints, tmp_path / "good", data=good, steps=1, batch=4)
    mixed, = metrics(tmp_path / "mixed")
    clean, = metrics(tmp_path / "good")
    assert (mixed["rejected"], clean["rejected"]) == (1, 0)
    assert mixed["tokens"] == clean["tokens"]
    assert mixed["loss"] == pytest.approx(clean["loss"], rel=1e-5)


@both
def test_a_step_with_no_usable_clip_does_not_end_the_run(corpus, checkpoints, tmp_path, script):
    run, _ = RUNS[script]
    (tmp_path / "broken.wav").write_bytes(b"not a wave file")
    rows = read_rows(subset(corpus, tmp_path / "good.jsonl", 1))
    rows.append({"id": "bad", "audio": str(tmp_path / "broken.wav"), "text": "find peter", "language": "en"})
    data.write_jsonl(tmp_path / "mixed.jsonl", rows)
    run(corpus, checkpoints, tmp_path / "run", data=tmp_path / "mixed.jsonl", steps=2, batch=1)
    log = metrics(tmp_path / "run", "step")
    assert [row["step"] for row in log] == [1, 2]
    assert sorted(row["tokens"] > 0 for row in log) == [False, True]
    assert log[-1]["rejected"] == 1


@both
def test_a_run_none_of_whose_clips_can_be_used_says_why(corpus, checkpoints, tmp_path, script):
    (tmp_path / "broken.wav").write_bytes(b"not a wave file")
    bad = {"audio": str(tmp_path / "broken.wav"), "text": "find peter", "language": "en"}
    data.write_jsonl(tmp_path / "bad.jsonl", [bad])
    run, _ = RUNS[script]
    with pytest.raises(ValueError, match="broken.wav"):
        run(corpus, checkpoints, tmp_path / "run", data=tmp_path / "bad.jsonl", steps=2, batch=1)


@pytest.mark.parametrize("split", ["data", "dev"])
@pytest.mark.parametrize("gone", ["text", "language"])
def test_sft_names_the_line_that_lacks_text_or_language(corpus, checkpoints, tmp_path, split, gone):
    path = subset(corpus, tmp_path / "part.jsonl", 3)
    rows = read_rows(path)
    del rows[1][gone]
    data.write_jsonl(path, rows)
    with pytest.raises(ValueError, match=rf"part\.jsonl:2.*{gone}"):
        run_sft(corpus, checkpoints, tmp_path / "run", **{split: path})


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
    four = subset(corpus, tmp_path / "four.jsonl", 4)
    run_sft(corpus, tmp_path, tmp_path / "run", data=four, student=None, init="random", vocab_size=300, d_model=32,
            encoder_layers=1, lm_layers=1, heads=2, steps=80, batch=4, lr=1e-2, warmup=5, weight_decay=0.0)
    losses = [row["loss"] for row in metrics(tmp_path / "run")]
    assert losses[0] > 4
    assert losses[-1] < 0.1 * losses[0]


def test_distill_brings_the_student_closer_to_the_teacher(corpus, checkpoints, tmp_path):
    four = subset(corpus, tmp_path / "four.jsonl", 4)
    run_distil(corpus, checkpoints, tmp_path / "run", data=four, steps=60, batch=4, lr=1e-2, warmup=5,
               max_new_tokens=5)
    losses = [row["loss"] for row in metrics(tmp_path / "run")]
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]


# ---------------------------------------------------------------------------- precision and memory

SMALL_RATES = [(1e-6, 0.02), (1e-5, 0.15), (1e-4, 0.88)]


@pytest.mark.parametrize("lr, share", SMALL_RATES)
def test_adamw_on_bf16_weights_loses_most_small_updates(lr, share):
    """Why the masters are fp32: of bf16 weights N(0, 0.02) one step of AdamW moves 2 %, 15 %, 88 %;
    the rest rounds back to where it was."""
    generator = torch.Generator().manual_seed(0)
    start = 0.02 * torch.randn(500, 400, generator=generator)
    moved = {}
    for dtype in (torch.bfloat16, torch.float32):
        p = nn.Parameter(start.to(dtype))
        optimizer = distill.make_optimizer([p], distill.parse_args(["--weight_decay", "0", "--lr", str(lr)]))
        p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        before = p.detach().clone()
        optimizer.step()
        moved[dtype] = (p.detach() != before).float().mean().item()
    assert moved[torch.bfloat16] == pytest.approx(share, rel=0.15)
    assert moved[torch.float32] == 1.0


@both
@pytest.mark.parametrize("lr", [lr for lr, _ in SMALL_RATES])
def test_a_small_learning_rate_moves_every_weight(corpus, checkpoints, tmp_path, monkeypatch, script, lr):
    """From a checkpoint stored in bf16: trained in fp32 all the same. Every weight that has a
    gradient moves, by about lr."""
    module = MODULES[script]
    run, _ = RUNS[script]
    shutil.copytree(checkpoints / "student", tmp_path / "half")
    file = tmp_path / "half" / "model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(file).items()}, file)
    load_student = model.load_student
    average = module.average_gradients
    loaded = []
    gradients = []

    def keep_student(*args):
        loaded.append(load_student(*args))
        return loaded[0]

    def keep_gradients(parameters, n_tokens):
        average(parameters, n_tokens)
        gradients.extend(p.grad.clone() for p in parameters)

    monkeypatch.setattr(model, "load_student", keep_student)
    monkeypatch.setattr(module, "average_gradients", keep_gradients)
    run(corpus, checkpoints, tmp_path / "run", student=tmp_path / "half", steps=1, warmup=0, lr=lr,
        weight_decay=0.0, batch=4)
    before = load_student(tmp_path / "half", "cpu").net.parameters()
    n = 0
    for old, new, gradient in zip(before, loaded[0].net.parameters(), gradients, strict=True):
        assert new.dtype == torch.float32
        # Adam's first step is lr g / (|g| + 1e-8): all of lr where g, clipped, is well above 1e-8.
        felt = gradient.abs() > 1e-4
        assert ((new - old).abs()[felt] > 0.9 * lr - 2 ** -24 * old.abs()[felt]).all()
        n += int(felt.sum())
    assert n > 0.2 * sum(g.numel() for g in gradients)


def test_memory_does_not_grow_from_step_to_step(corpus, checkpoints, tmp_path, monkeypatch):
    """What is alive in the midst of a step: after 10 and after 50, as many tensors, as many bytes,
    and a process that is no larger."""
    live = {}
    rate = distill.learning_rate

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
    four = subset(corpus, tmp_path / "four.jsonl", 4)
    run_distil(corpus, checkpoints, tmp_path / "run", data=four, steps=50, batch=4, micro_batch=2, log_every=7)
    n_tensors, n_bytes, resident = live[9]
    n_later, n_bytes_later, resident_later = live[49]
    assert n_later < n_tensors + 40  # one tensor a step would be 40; other tests' garbage is a few
    assert n_bytes_later <= 1.02 * n_bytes
    assert resident_later - resident < 8 * 2 ** 20


# ---------------------------------------------------------------------------- (h) the teacher, (i) the best checkpoint

def test_the_teacher_is_left_as_it_was(corpus, checkpoints, tmp_path, monkeypatch):
    loaded = []
    load_teacher = model.load_teacher

    def keep_teacher(*args):
        loaded.append(load_teacher(*args))
        return loaded[0]

    monkeypatch.setattr(model, "load_teacher", keep_teacher)
    before = weights(checkpoints / "teacher")
    run_distil(corpus, checkpoints, tmp_path / "run", steps=2, batch=4)
    fresh = model.load(checkpoints / "teacher").net.state_dict()
    for name, p in loaded[0].net.named_parameters():
        assert torch.equal(p, fresh[name])
        assert p.grad is None
        assert not p.requires_grad
    assert weights(checkpoints / "teacher") == before


def test_student_and_teacher_must_read_the_same_features(student, teacher):
    encoder = teacher.net.config["whisper_config"] | {"num_mel_bins": 80}
    config = teacher.net.config | {"whisper_config": encoder}
    other = model.assemble(model.Student(config), teacher.tokenizer, "cpu")
    model.check_same_features(student, teacher)
    with pytest.raises(ValueError, match="128 and 80"):
        model.check_same_features(student, other)


@both
def test_out_is_the_best_on_dev_and_state_the_last(corpus, checkpoints, tmp_path, monkeypatch, script):
    run, _ = RUNS[script]
    own = {"batch": 3, "eval_every": 1, "save_every": 3, "dev": corpus / "dev.jsonl", "max_new_tokens": 4}
    seen = []  # weights at every evaluation
    errors = iter([50.0, 20.0, 40.0, 40.0, 30.0])  # restored weights are evaluated once more

    def scripted(asr, *_):
        seen.append({name: value.clone() for name, value in asr.net.state_dict().items()})
        return {"dev_error": next(errors), "dev_length": 1.0}

    def same(path, n):
        stored = model.load(path).net.state_dict()
        return all(torch.equal(value, seen[n][name]) for name, value in stored.items())

    monkeypatch.setattr(model, "dev_error", scripted)
    out = tmp_path / "run"
    run(corpus, checkpoints, out, steps=3, **own)
    assert same(out, 1)
    assert not same(out, 2)
    assert states(out) == ["step-0000003"]
    assert same(out / "state" / "step-0000003", 2)
    assert [row["dev_error"] for row in metrics(out, "dev_error")] == [50.0, 20.0, 40.0]
    run(corpus, checkpoints, out, steps=4, resume=True, **own)  # 30 is better than 40, not than 20
    assert same(out, 1)
    assert same(out / "state" / "step-0000004", 4)
    assert [row["dev_error"] for row in metrics(out, "dev_error")] == [50.0, 20.0, 40.0, 30.0]


def test_dev_error_is_the_pooled_rate_of_greedy_transcripts(corpus, student):
    dev = data.read_manifest(corpus / "dev.jsonl")
    args = sft.parse_args("--data x --out x --student x --eval_batch 4 --max_new_tokens 8".split())
    counts = []
    written = 0
    spoken = 0
    for u in dev:
        hyp = model.transcribe(student, [u], max_new_tokens=8)[u.id]["hyp"]
        counts.append(data.edit_counts(u.text, hyp, u.language))
        written += len(data.normalize(hyp, u.language).split())
        spoken += len(data.normalize(u.text, u.language).split())
    errors = sum(c.errors for c in counts)
    expected = {"dev_error": 100 * errors / sum(c.units for c in counts), "dev_length": written / spoken}
    assert model.dev_error(student, dev, args, 0, 1) == pytest.approx(expected)


@both
def test_metrics_are_drawn(corpus, checkpoints, tmp_path, script):
    run, _ = RUNS[script]
    run(corpus, checkpoints, tmp_path, steps=2, batch=3, eval_every=1, dev=corpus / "dev.jsonl",
        max_new_tokens=4)
    picture = (tmp_path / "metrics.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 5000
