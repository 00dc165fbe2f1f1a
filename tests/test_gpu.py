"""What only a GPU can show; skipped without one. Please report what it prints.

    pytest -n 0 -rs tests/test_gpu.py
"""

import subprocess
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

import distill
import model
import sft
from conftest import ROOT, rollout
from test_model import ids_where
from test_training import (  # run and words are fixtures
    TORCHRUN, Killed, both, first_step, kill_after_state, metrics, run, words)

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

flags = sft.parse_args("--student x --data x --out x --device cuda".split())
GPU = model.setup(flags)[2]  # with the settings of the scripts


@pytest.fixture(scope="module")
def checkpoints(tokenizer, tmp_path_factory):
    """Folder with student/ and teacher/ of ordinary scale: bf16 moves the enlarged ones of other
    tests to other tokens."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        asr = model.random_student(tokenizer, 64, encoder_layers=2, lm_layers=2, heads=4)
        asr.body.embed_tokens.weight.data.mul_(2.0)  # distributions with something to tell
        model.save(asr, folder / name)
    return folder


def test_logits_are_sums_in_fp32():
    """Against fp64 on bf16 inputs, under autocast, value and gradients."""
    torch.manual_seed(0)
    hidden = torch.randn(64, 896, device=GPU).bfloat16().float().requires_grad_()
    weight = (torch.randn(8192, 896, device=GPU) / 30).bfloat16().float().requires_grad_()
    grad_z = torch.randn(64, 8192, device=GPU)
    with model.autocast(GPU):
        z = model.logits(hidden, weight)
    z.backward(grad_z)
    h, w, g = (tensor.detach().double() for tensor in (hidden, weight, grad_z))
    for found, exact in ((z, h @ w.T), (hidden.grad, g @ w), (weight.grad, g.T @ h)):
        assert found.dtype == torch.float32
        assert (found - exact).abs().max() < 1e-4 * exact.abs().max()


def test_greedy_tokens_are_those_of_transformers_generate(student, batch, tmp_path, monkeypatch):
    """In fp32, so that no tie is decided by rounding."""
    monkeypatch.setattr(model, "autocast", lambda device: nullcontext())
    model.save(student, tmp_path / "student")
    asr = model.load(tmp_path / "student", GPU)
    prompt = model.encode_audio(asr, batch)
    ids, mask = rollout(asr, prompt, 20)
    expected = asr.net.generate(
        inputs_embeds=prompt.embeds, attention_mask=prompt.mask.long(), max_new_tokens=20,
        do_sample=False, suppress_tokens=ids_where(asr.blocked), eos_token_id=ids_where(asr.stop),
        pad_token_id=asr.pad_id)
    for row, valid, other in zip(ids, mask, expected):
        assert row[valid].tolist() == other[:int(valid.sum())].tolist()


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
    heads = [partial(model.logits, weight=w) for w in (weight, weight.detach())]
    needed = {}
    for n in (128, 128, 2048):  # the first of them makes the workspaces
        weight.grad = torch.zeros_like(weight)
        hidden = torch.randn(n, width, device=GPU, requires_grad=True)
        y = torch.zeros(n, dtype=torch.long, device=GPU)
        needed[n] = peak(lambda: distill.loss_in_chunks(
            hidden, hidden.detach(), y, *heads,
            lambda z_s, z_t, y: distill.reverse_kl(z_s, z_t), 128, 1))
    print(f"MB of the loss: {needed[128] / 1e6:.0f}, 16 times the rows {needed[2048] / 1e6:.0f}")
    assert needed[2048] - needed[128] < 4 * 2048 * width * 4


@pytest.mark.parametrize("script, changes", [
    ("sft", {}),
    # At the transcripts: rollouts of two devices part at the first token that rounding decides.
    ("distill", {"states": "reference"}),
    ("distill", {"states": "reference", "divergence": "forward", "support": "union"}),
    ("distill", {"states": "reference", "freeze": "encoder", "recompute": True})])
def test_a_step_is_that_of_the_cpu(run, script, changes):
    """bf16 arithmetic against fp32: loss within 1 %, gradients within a few degrees."""
    losses, flat = [], []
    for device in ("cpu", "cuda"):
        record, found = first_step(run, script, device, device=device, **changes)
        losses.append(record["loss"])
        flat.append(torch.cat([g.flatten() for g in found.values()]))
    cosine = torch.cosine_similarity(*flat, dim=0).item()
    print(f"{script} {changes}: loss {losses[0]:.4f}, on the GPU {losses[1]:.4f}; cosine {cosine}")
    assert losses[1] == pytest.approx(losses[0], rel=0.01) and cosine > 0.99


@both
def test_a_run_resumes(run, monkeypatch, script):
    """Atomic sums leave no two runs equal to the bit, so losses are compared."""
    changes = {"device": "cuda", "steps": 4, "save_every": 2, "micro_batch": 3}
    straight = run(script, "straight", **changes)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after_state(patch, 2)
        run(script, "cut", **changes)
    cut = run(script, "cut", resume=True, **changes)
    a, b = metrics(straight), metrics(cut)
    assert [row["step"] for row in b] == [1, 2, 3, 4]
    assert b[3]["loss"] == pytest.approx(a[3]["loss"], rel=0.2)
    moments = load_file(cut / "state" / "step-0000004" / "training.safetensors")
    assert moments["model.norm.weight.step"] == 4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@both
def test_two_gpus_make_the_update_of_one(run, words, tmp_path, script):
    changes = {"device": "cuda", "steps": 1}
    one = metrics(run(script, "one", **changes))[0]
    line = words(script, "two", **changes)
    subprocess.run([*TORCHRUN, ROOT / f"{script}.py", *line], check=True)
    two = metrics(tmp_path / "two")[0]
    assert two["loss"] == pytest.approx(one["loss"], rel=0.05)
    assert two["tokens"] == pytest.approx(one["tokens"], rel=0.1)
