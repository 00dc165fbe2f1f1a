"""What makes a run fit: frozen encoder, recomputed activations, shared moments, cuts of a step's share.

    pytest tests/test_memory.py

Each of them saves memory and leaves the update as it is, but for the frozen encoder's weights.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import conftest
import data
import distill
import model
import sft
import test_training as runs
from test_training import RUNS, both, brief, metrics, run_distil

ENCODER = "audio_encoder.whisper."


def same_run(one, other):
    """Two runs on the same clips: what was logged at the first step, and the weights at the end."""
    for key in ("tokens", "loss", "grad_norm"):
        assert metrics(other)[0][key] == pytest.approx(metrics(one)[0][key], rel=1e-5), key
    a = load_file(one / "model.safetensors")
    b = load_file(other / "model.safetensors")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5, msg=name)


# ---------------------------------------------------------------------------- --freeze encoder

@both
def test_a_frozen_encoder_stays_and_all_else_moves(corpus, checkpoints, tmp_path, script):
    run, own = RUNS[script]
    pool = brief(corpus, tmp_path / "brief.jsonl", 24)
    run(corpus, checkpoints, tmp_path / "run", **own | {"data": pool, "micro_batch": 3, "freeze": "encoder"})
    before = load_file(checkpoints / "student" / "model.safetensors")
    after = load_file(tmp_path / "run" / "model.safetensors")
    for name in before:
        assert torch.equal(before[name], after[name]) == name.startswith(ENCODER), name
    state = load_file(tmp_path / "run" / "state" / "step-0000002" / "training.safetensors")
    moments = {tuple(v.shape) for k, v in state.items() if k.endswith("exp_avg")}
    assert tuple(before[ENCODER + "conv1.weight"].shape) not in moments


def test_a_frozen_encoder_runs_once_a_clip(corpus, checkpoints, tmp_path, monkeypatch):
    """Rollout and training share its output, however many micro-batches there are."""
    clips = []
    encode = model.encode_audio

    def keep_clips(asr, batch):
        if asr.net.audio_encoder.layer_norm.weight.requires_grad:  # the student's
            clips.extend(u.id for u in batch.utterances)
        return encode(asr, batch)

    monkeypatch.setattr(model, "encode_audio", keep_clips)
    for name, micro_batch, freeze in (("cut", 3, "encoder"), ("whole", 8, "encoder"), ("not", 3, None)):
        clips.clear()
        run_distil(corpus, checkpoints, tmp_path / name, steps=1, lr=1e-4,
                   micro_batch=micro_batch, freeze=freeze)
        assert len(clips) == {"cut": 8, "whole": 8, "not": 16}[name]
    same_run(tmp_path / "cut", tmp_path / "whole")
    # The frozen part leaves the other gradients as they were: so the loss is that of the run without.
    assert metrics(tmp_path / "cut")[0]["loss"] == pytest.approx(metrics(tmp_path / "not")[0]["loss"], rel=1e-5)


def test_moments_of_other_parameters_are_refused(corpus, checkpoints, tmp_path):
    run_distil(corpus, checkpoints, tmp_path / "run", steps=1)
    with pytest.raises(ValueError, match="state/step-0000001.*--freeze"):
        run_distil(corpus, checkpoints, tmp_path / "run", steps=2, resume=True, freeze="encoder")


# ---------------------------------------------------------------------------- --recompute

def gradients_and_bytes(asr, batch):
    """-> gradients of a loss at the transcripts, bytes that autograd kept for them."""
    kept = 0

    def count(tensor):
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    asr.net.zero_grad(set_to_none=True)
    args = sft.parse_args(["--student", "x", "--data", "x", "--out", "x"])
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        sft.backward_of_batch(asr, None, batch, args)
    return {name: p.grad for name, p in asr.net.named_parameters()}, kept


def test_recomputed_activations_give_the_same_gradients_from_less_memory(tokenizer, batch):
    """Bit for bit. (Inputs of the layers are kept by other means and not counted.)"""
    asr = conftest.tiny(tokenizer, 1)
    plain, all_bytes = gradients_and_bytes(asr, batch)
    model.recompute(asr)
    again, some_bytes = gradients_and_bytes(asr, batch)
    for name in plain:
        assert torch.equal(plain[name], again[name]), name
    assert some_bytes < 0.6 * all_bytes


def test_encoder_and_language_model_are_both_recomputed(tokenizer, batch, monkeypatch):
    """Every layer runs twice where there is a gradient, and once where there is none."""
    asr = conftest.tiny(tokenizer, 1)
    layers = [*asr.net.audio_encoder.whisper.layers, *asr.body.layers]
    runs_of = dict.fromkeys(range(len(layers)), 0)

    def counted(i, forward):
        def call(*args, **kwargs):
            runs_of[i] += 1
            return forward(*args, **kwargs)
        return call

    for i, layer in enumerate(layers):
        layer.forward = counted(i, layer.forward)
    model.recompute(asr)
    gradients_and_bytes(asr, batch)
    assert set(runs_of.values()) == {2}
    with torch.no_grad():
        model.encode_audio(asr, batch)
    assert list(runs_of.values()) == [3, 3, 2, 2]


@both
def test_a_run_that_recomputes_is_the_same_run(corpus, checkpoints, tmp_path, script):
    run, own = RUNS[script]
    own = own | {"data": brief(corpus, tmp_path / "brief.jsonl", 24), "micro_batch": 3}
    run(corpus, checkpoints, tmp_path / "plain", **own)
    run(corpus, checkpoints, tmp_path / "again", recompute=True, **own)
    assert runs.weights(tmp_path / "plain") == runs.weights(tmp_path / "again")


# ---------------------------------------------------------------------------- cuts of a share

@pytest.mark.parametrize("limit", [0.5, 2.0, 4.0, 100.0])
def test_micro_batches_hold_their_seconds(corpus, limit):
    """Each is as long as it may be: with the next clip it would be over the limit."""
    utterances = data.read_manifest(corpus / "train.jsonl")
    plan = data.Plan(data.measure(utterances), 24, seed=0)
    steps = data.Steps(utterances, plan, 1, micro_batch_sec=limit)
    cut = steps.cut(plan[0])
    assert sum(cut, []) == plan[0]
    for batch, after in zip(cut, [*cut[1:], None]):
        longest = max(plan.durations[i] for i in batch)
        assert len(batch) * longest <= limit or len(batch) == 1
        assert after is None or (len(batch) + 1) * plan.durations[after[0]] > limit
    assert len(cut) == 1 if limit == 100.0 else len(cut) > 2


def test_a_clip_longer_than_a_micro_batch_is_alone(corpus):
    plan = data.Plan([1.0, 2.0, 9.0, 9.5], 4, seed=0)
    steps = data.Steps([None] * 4, plan, 16, micro_batch_sec=4.0)
    assert steps.cut([0, 1, 2, 3]) == [[0, 1], [2], [3]]
    assert steps.cut([]) == []


@both
def test_the_update_does_not_depend_on_the_seconds_of_a_micro_batch(corpus, checkpoints, tmp_path, script):
    run, own = RUNS[script]
    own = own | {"data": brief(corpus, tmp_path / "brief.jsonl", 24), "lr": 1e-4}
    run(corpus, checkpoints, tmp_path / "whole", **own)
    run(corpus, checkpoints, tmp_path / "cut", micro_batch_sec=2.0, **own)
    same_run(tmp_path / "whole", tmp_path / "cut")


def test_rollouts_do_not_depend_on_the_batch_they_are_written_in(student, corpus):
    utterances = data.read_manifest(corpus / "train.jsonl")
    batches = [data.load_batch(utterances[i:i + 3]) for i in (0, 3, 6)]
    written = {}
    for size in (None, 1, 4, 9, 50):
        flags = [] if size is None else ["--rollout_batch", str(size)]
        args = distill.parse_args(["--max_new_tokens", "8", *flags])
        rollouts = distill.roll_out(student, batches, 0, args)
        written[size] = [row[valid].tolist() for _, ids, mask in rollouts for row, valid in zip(ids, mask)]
        for _, ids, mask in rollouts:
            assert mask.any(0).all() and (ids[~mask] == student.pad_id).all()
    assert all(rows == written[None] for rows in written.values())
    assert len({len(row) for row in written[None]}) > 1


# ---------------------------------------------------------------------------- --shard_optimizer

def train_in_double(rank, world, line, folder):
    """A run of sft.py in float64, where another order of sums is seen as 1e-12 and not as 1e-6.

    Leaves FOLDER/RANK.json, the numbers of elements whose moments this rank has, and a copy
    FOLDER/cut of what was in its --out after two steps.
    """
    runs.take_place(rank, world)
    runs.meet_in(folder / "store", rank, world)
    torch.Tensor.float = torch.Tensor.double
    load = model.load
    save = model.save_training
    make_optimizer = sft.make_optimizer
    out = folder / "out"

    def load_double(name, *_):
        asr = load(name)
        asr.net.double()
        torch.set_default_dtype(torch.float64)
        return asr

    def save_and_copy(*args):
        save(*args)
        if args[1] == 2 and rank == 0:
            shutil.copytree(out, folder / "cut")

    def keep_optimizer(parameters, args):
        optimizers.append(make_optimizer(parameters, args))
        return optimizers[0]

    optimizers = []
    model.load = load_double
    model.save_training = save_and_copy
    sft.make_optimizer = keep_optimizer
    sft.main(sft.parse_args([*line, "--out", str(out)]))
    n = [state["exp_avg"].numel() for state in optimizers[0].state_dict()["state"].values()]
    (folder / f"{rank}.json").write_text(json.dumps(n))


@pytest.fixture(scope="module")
def shared(corpus, checkpoints, tmp_path_factory):
    """Runs of four steps: {name: folder}."""
    root = tmp_path_factory.mktemp("shared")
    pool = brief(corpus, root / "brief.jsonl", 16)
    flags = {"data": pool, "batch": 8, "micro_batch": 4, "steps": 4, "save_every": 2, "ctc": 0.3}
    line = runs.sft_words(corpus, checkpoints, root, **flags)
    line = line[:line.index("--out")] + line[line.index("--out") + 2:]
    folders = {}

    def start(name, world, *more, resume_from=None):
        folders[name] = root / name
        folders[name].mkdir()
        if resume_from:  # every rank looks for it, so it lies there before they start
            shutil.copytree(resume_from, folders[name] / "out")
            more = (*more, "--resume")
        runs.start_processes(train_in_double, [*line, *more], folders[name], world=world)

    for world in (1, 2, 4):
        start(f"shared {world}", world, "--shard_optimizer")
    start("plain 2", 2)
    for world in (1, 2, 4):
        start(f"2 to {world}", world, "--shard_optimizer", resume_from=root / "shared 2" / "cut")
    start("plain from shared", 2, resume_from=root / "shared 2" / "cut")
    return folders


def tensors(folder):
    state = folder / "out" / "state" / "step-0000004"
    return load_file(state / "model.safetensors") | load_file(state / "training.safetensors")


def test_a_shared_optimizer_makes_the_same_update_to_the_last_bit(shared):
    a = tensors(shared["shared 2"])
    b = tensors(shared["plain 2"])
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("name", ["shared 1", "shared 4", "2 to 1", "2 to 4"])
def test_the_update_does_not_depend_on_how_many_share_the_optimizer(shared, name):
    """From the start, and where a run is resumed with another number of processes."""
    a = tensors(shared["shared 2"])
    b = tensors(shared[name])
    assert a.keys() == b.keys()
    for key in a:
        assert (a[key] - b[key]).abs().max() <= 1e-6 * max(1.0, a[key].abs().max().item()), key


@pytest.mark.parametrize("name", ["2 to 2", "plain from shared"])
def test_a_shared_optimizer_resumes_to_the_same_bits(shared, name):
    a = tensors(shared["shared 2"])
    b = tensors(shared[name])
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("world", [1, 2, 4])
def test_each_moment_lies_on_one_rank(shared, world):
    folder = shared[f"shared {world}"]
    shares = [sum(json.loads((folder / f"{rank}.json").read_text())) for rank in range(world)]
    names = [name for name in tensors(folder) if name.endswith("exp_avg")]
    assert sum(shares) == sum(tensors(folder)[name].numel() for name in names)
    assert max(shares) < 1.3 * sum(shares) / world
    if world == 2:
        whole = [sum(json.loads((shared["plain 2"] / f"{rank}.json").read_text())) for rank in range(2)]
        assert whole == [sum(shares)] * 2


# ---------------------------------------------------------------------------- settings of a GPU

def test_a_gpu_plans_no_attention_and_keeps_sums_in_fp32(monkeypatch):
    matmul = torch.backends.cuda.matmul
    before = torch.backends.cuda.cudnn_sdp_enabled(), matmul.allow_bf16_reduced_precision_reduction
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    try:
        assert model.find_place("cuda")[2] == torch.device("cuda", 0)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert not matmul.allow_bf16_reduced_precision_reduction
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before[0])
        matmul.allow_bf16_reduced_precision_reduction = before[1]
