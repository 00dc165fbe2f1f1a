"""What only a GPU can show; skipped without one. Please report what it prints.

    pytest -rs tests/test_gpu.py
"""

import os
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import conftest
import data
import distill
import model
import sft
import test_training as runs
from test_training import both, metrics

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

_, _, GPU = model.find_place("cuda")  # with the settings of the scripts
MODULES = {"sft": sft, "distill": distill}
ARGUMENTS = {"sft": runs.sft_words, "distill": runs.distil_words}


@pytest.fixture(scope="module")
def pair(tokenizer, tmp_path_factory):
    """Folder with student/ and teacher/ of ordinary scale: bf16 moves the enlarged ones of other tests
    to other tokens."""
    folder = tmp_path_factory.mktemp("pair")
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        asr = model.random_student(tokenizer, d_model=64, encoder_layers=2, lm_layers=2, heads=4)
        asr.net.lm.model.embed_tokens.weight.data.mul_(2.0)  # distributions with something to tell
        model.save(asr, folder / name)
    return folder


def run(script, corpus, pair, out, **changes):
    module = MODULES[script]
    module.main(module.parse_args(ARGUMENTS[script](corpus, pair, out, **changes)))


# ---------------------------------------------------------------------------- pieces

def test_logits_are_sums_in_fp32_of_bf16_inputs():
    """Against fp64 on the same bf16 inputs, value and gradients."""
    torch.manual_seed(0)
    hidden = torch.randn(64, 896, device=GPU).bfloat16().float().requires_grad_()
    weight = (torch.randn(8192, 896, device=GPU) / 30).bfloat16().float().requires_grad_()
    grad_z = torch.randn(64, 8192, device=GPU)
    z = model.logits(hidden, weight)
    assert z.dtype == torch.float32
    z.backward(grad_z)
    exact = hidden.detach().double() @ weight.detach().double().T
    assert (z.detach() - exact).abs().max() < 1e-4 * exact.abs().max()
    for found, expected in ((hidden.grad, grad_z.double() @ weight.detach().double()),
                            (weight.grad, grad_z.double().T @ hidden.detach().double())):
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_greedy_tokens_are_those_of_transformers_generate(checkpoints, batch, monkeypatch):
    """Our loop on the GPU in fp32, so that no tie is decided by rounding."""
    monkeypatch.setattr(model, "autocast", lambda device: nullcontext())
    asr = model.load(checkpoints / "student", GPU)
    monkeypatch.setattr(model, "logits", lambda hidden, _: asr.head(hidden))
    prompt = model.encode_audio(asr, batch)
    ids, mask = model.roll_out(asr, prompt, max_new_tokens=20)
    blocked = asr.blocked.nonzero()[:, 0].tolist()
    stop = asr.stop.nonzero()[:, 0].tolist()
    expected = asr.net.lm.generate(
        inputs_embeds=prompt.embeds, attention_mask=prompt.mask.long(), max_new_tokens=20, do_sample=False,
        suppress_tokens=blocked, eos_token_id=stop, pad_token_id=asr.pad_id)
    for row, valid, other in zip(ids, mask, expected):
        n = int(valid.sum())
        assert row[:n].tolist() == other[:n].tolist()


def test_bf16_rollouts_are_mostly_those_of_fp32(pair, batch):
    """Up to the first token at which rounding decides."""
    rollouts = {}
    for device in ("cpu", GPU):
        asr = model.load(pair / "student", device)
        rollouts[str(device)], _ = model.roll_out(asr, model.encode_audio(asr, batch), max_new_tokens=12)
    a, b = (ids.cpu() for ids in rollouts.values())
    n = min(a.shape[1], b.shape[1])
    same = (a[:, :n] == b[:, :n]).cumprod(1).float().mean().item()
    print(f"greedy tokens before the first difference: {same:.0%}")
    assert same > 0.5


def peak(function):
    """Bytes that a call needs beside what is there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_memory_of_the_loss_is_flat_in_rows():
    """V = 151,936: 16 times the rows need the rows' own gradient more, and no logits."""
    n_vocabulary, width = 151_936, 256
    weight = torch.randn(n_vocabulary, width, device=GPU, requires_grad=True)
    to_teacher = torch.arange(n_vocabulary, device=GPU)
    needed = {}
    for n in (128, 128, 2048):  # the first of them makes the workspaces
        weight.grad = torch.zeros_like(weight)
        hidden = torch.randn(n, width, device=GPU, requires_grad=True)
        y = torch.zeros(n, dtype=torch.long, device=GPU)
        head_s = partial(model.logits, weight=weight)
        head_t = partial(model.logits, weight=weight.detach())
        needed[n] = peak(lambda: distill.loss_in_chunks(
            hidden, hidden.detach(), y, head_s, head_t, to_teacher, distill.token_divergence, 128))
    print(f"memory of the loss, MB: {needed[128] / 1e6:.0f} for 128 rows, {needed[2048] / 1e6:.0f} for 2048")
    assert needed[2048] - needed[128] < 4 * 2048 * width * 4


def test_recomputed_activations_need_less_memory(pair, batch):
    asr = model.load(pair / "student", GPU)
    args = sft.parse_args(["--student", "x", "--data", "x", "--out", "x"])
    asr.net.zero_grad(set_to_none=False)
    sft.backward_of_batch(asr, None, batch, args)  # gradients and workspaces are there
    plain = peak(lambda: sft.backward_of_batch(asr, None, batch, args))
    model.recompute(asr)
    again = peak(lambda: sft.backward_of_batch(asr, None, batch, args))
    print(f"memory of a forward and backward, MB: {plain / 1e6:.1f}, recomputed {again / 1e6:.1f}")
    assert again < 0.9 * plain


# ---------------------------------------------------------------------------- one step against the CPU

def first_gradients(script, corpus, pair, out, monkeypatch, **changes):
    """-> loss of the first step, all gradients as one vector on the CPU."""
    found = []
    average = MODULES[script].average_gradients

    def keep(parameters, n_tokens):
        average(parameters, n_tokens)
        found.append(torch.cat([p.grad.flatten().float().cpu() for p in parameters]))

    with monkeypatch.context() as patch:
        patch.setattr(MODULES[script], "average_gradients", keep)
        run(script, corpus, pair, out, steps=1, **changes)
    return metrics(out)[0]["loss"], found[0]


STEPS = {
    "sft": ("sft", {"ctc": 0.3}),
    # At the transcripts: rollouts of two devices part at the first token that rounding decides.
    "reverse full": ("distill", {"states": "reference"}),
    "forward union": ("distill", {"states": "reference", "divergence": "forward", "support": "union"}),
    "frozen, recomputed": ("distill", {"states": "reference", "freeze": "encoder", "recompute": True}),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_that_of_the_cpu(corpus, pair, tmp_path, monkeypatch, name):
    """bf16 arithmetic against fp32: loss within 1 %, gradients within a few degrees."""
    script, flags = STEPS[name]
    loss_c, grad_c = first_gradients(script, corpus, pair, tmp_path / "cpu", monkeypatch, **flags)
    loss_g, grad_g = first_gradients(script, corpus, pair, tmp_path / "gpu", monkeypatch, device="cuda", **flags)
    cosine = torch.cosine_similarity(grad_c, grad_g, dim=0).item()
    print(f"{name}: loss {loss_c:.4f} on the CPU, {loss_g:.4f} on the GPU; cosine {cosine:.5f}")
    assert loss_g == pytest.approx(loss_c, rel=0.01)
    assert cosine > 0.99


# ---------------------------------------------------------------------------- runs

FLAGS = {"device": "cuda", "steps": 4, "save_every": 2, "micro_batch": 3}


@both
def test_a_run_resumes(corpus, pair, tmp_path, monkeypatch, script):
    """Atomic sums leave no two runs equal to the bit, so losses are compared."""
    run(script, corpus, pair, tmp_path / "straight", **FLAGS)
    with monkeypatch.context() as patch, pytest.raises(runs.Killed):
        runs.kill_after_state(patch, 2)
        run(script, corpus, pair, tmp_path / "cut", **FLAGS)
    run(script, corpus, pair, tmp_path / "cut", resume=True, **FLAGS)
    a = metrics(tmp_path / "straight")
    b = metrics(tmp_path / "cut")
    assert [row["step"] for row in b] == [1, 2, 3, 4]
    assert b[0]["loss"] == pytest.approx(a[0]["loss"], rel=0.01)
    assert b[3]["loss"] == pytest.approx(a[3]["loss"], rel=0.2)
    moments = load_file(tmp_path / "cut" / "state" / "step-0000004" / "training.safetensors")
    assert moments["optimizer.0.step"] == 4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("shared", [False, True])
@both
def test_two_gpus_make_the_update_of_one(corpus, pair, tmp_path, script, shared):
    flags = FLAGS | {"steps": 1, "batch": 8, "micro_batch": 8}
    run(script, corpus, pair, tmp_path / "one", **flags)
    own = {"shard_optimizer": True} if shared else {}
    arguments = ARGUMENTS[script](corpus, pair, tmp_path / "two", **flags, **own)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, Path(conftest.ROOT) / f"{script}.py", *arguments], check=True, env=environment)
    one = metrics(tmp_path / "one")[0]
    two = metrics(tmp_path / "two")[0]
    assert two["loss"] == pytest.approx(one["loss"], rel=0.05)
    assert two["tokens"] == pytest.approx(one["tokens"], rel=0.1)


def test_ten_seconds_of_audio_decode_on_the_gpu(pair):
    """evaluate.py's path: lengths that no other test has."""
    asr = model.load(pair / "student", GPU)
    rng = np.random.default_rng(0)
    mel = data.log_mel(conftest.sound(rng, 10.0))
    utterance = data.Utterance("long", "long.wav", language="en")
    batch = data.Batch([utterance], mel[None], torch.tensor([mel.shape[1]]), [])
    ids, mask = model.roll_out(asr, model.encode_audio(asr, batch), max_new_tokens=40)
    assert ids.is_cuda and mask.any() and len(asr.decode(ids, mask)) == 1
