"""What one OPD step costs, phase by phase, at a chosen size; random weights, real speech lengths. Prints a table and one JSON line.

    python tests/bench_step.py --size demo      # the demo's student and teacher
    python tests/bench_step.py --size mid       # 30 M student, 100 M teacher
    python tests/bench_step.py --size 0.6b      # the published student (1.14 B parameters with its encoder), Qwen3-ASR-1.7B as teacher
    python tests/bench_step.py --figure cost.png --lines FILE      # draw the JSON lines that earlier calls left in FILE

floor: what no OPD step can do without: teacher forward, student forward (audio encoder included), loss and backward on the same ids.
step / floor says what rollout and update add to it. At 0.6b the update is plain SGD: AdamW's two fp32 states
(9.1 GB) do not fit into 24 GiB beside student (4.6 GB), gradients (4.6 GB) and bf16 teacher (4 GB).
"""

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from transformers import Qwen3ASRConfig, Qwen3ASRForConditionalGeneration

import conftest
import data
import distill
import model

PHASES = ("audio encoder", "rollout", "teacher", "student forward", "loss", "backward", "update")


def ark_config(hidden, layers, heads, kv_heads, ffn, vocab, audio_width, audio_layers, audio_heads, tokenizer):
    """config.json of a student with the published keys."""
    ids = tokenizer.get_vocab()
    return {"model_type": "arkasr", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "vocab_size": vocab, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768,
            "whisper_config": {"d_model": audio_width, "encoder_layers": audio_layers, "encoder_attention_heads": audio_heads,
                               "encoder_ffn_dim": 4 * audio_width, "num_mel_bins": 128, "max_source_positions": 1500},
            "audio_token_id": ids[model.AUDIO], "eos_token_id": ids[model.EOS], "pad_token_id": ids[model.PAD]}


def make(size):
    """-> student, teacher, at random weights."""
    torch.manual_seed(0)
    student_of = lambda tokenizer, *shape: model.assemble(model.Student(ark_config(*shape, tokenizer)), tokenizer, "cpu")
    if size == "0.6b":
        bpe = conftest.read_qwen_bpe()
        tokenizer = conftest.qwen_tokenizer_with(bpe, conftest.ARK_ADDED)
        student = student_of(tokenizer, 896, 24, 14, 2, 4864, 151_936, 1280, 32, 20)
        torch.set_default_dtype(torch.bfloat16)  # so that the teacher never stands in memory in fp32
        net = Qwen3ASRForConditionalGeneration(Qwen3ASRConfig(  # Qwen3-ASR-1.7B
            audio_config={"d_model": 1024, "encoder_layers": 24, "encoder_attention_heads": 16, "encoder_ffn_dim": 4096, "output_dim": 2048},
            text_config={"model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
                         "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
                         "max_position_embeddings": 65536, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}))
        torch.set_default_dtype(torch.float32)
        return student, model.assemble_qwen3_asr(net, conftest.qwen_tokenizer_with(bpe, conftest.TEACHER_ADDED), "cpu")
    tokenizer = model.train_tokenizer(conftest.TEXTS["en"] * 4 + conftest.TEXTS["zh"] * 4, 640)
    if size == "demo":
        return model.random_student(tokenizer, 80, 2, 2, 4), model.random_student(tokenizer, 112, 3, 2, 4)
    return (student_of(tokenizer, 384, 8, 6, 2, 1536, 16_000, 384, 6, 6), student_of(tokenizer, 640, 12, 10, 2, 2560, 16_000, 640, 10, 10))


def make_batch(clips, shortest_sec, longest_sec):
    """A batch of synthetic speech-like sounds of evenly spread lengths."""
    rng = np.random.default_rng(0)
    mels = [data.log_mel(conftest.sound(rng, s)) for s in np.linspace(shortest_sec, longest_sec, clips)]
    n_frames = torch.tensor([m.shape[1] for m in mels])
    mel = torch.zeros(clips, 128, int(n_frames.max()))
    for row, m in zip(mel, mels):
        row[:, :m.shape[1]] = m
    return data.Batch([data.Utterance(f"u{i}", f"u{i}.wav", language="en") for i in range(clips)], mel, n_frames, [])


def one_step(student, teacher, to_teacher, batch, args, step):
    """One OPD step as distill.distil makes it, but for the optimiser -> seconds of each phase, response tokens."""
    clock = [time.perf_counter()]
    tick = lambda: clock.append(time.perf_counter())
    prompt = model.encode(student, batch)
    tick()
    uniforms = data.keyed_uniforms(0, step, [u.id for u in batch.utterances], args.max_new_tokens)
    ids, mask = model.generate(student, prompt, args.max_new_tokens, 1.0, uniforms)
    scored = mask & (to_teacher[ids] >= 0).cumprod(1).bool()
    tick()
    with torch.no_grad():
        hidden_t = model.response_hidden(teacher, model.encode(teacher, batch), to_teacher[ids].clamp(min=0), scored)
    tick()
    hidden_s = model.response_hidden(student, prompt, ids, mask)[scored[mask]]
    tick()
    rows = hidden_s.detach().requires_grad_()  # cut here, so that the head's part and the body's can be timed apart
    distill.distil_backward(student, rows * 1, teacher, hidden_t, ids[scored], to_teacher, args, watch=False)
    tick()
    hidden_s.backward(rows.grad)
    tick()
    with torch.no_grad():
        parameters = list(student.net.parameters())
        torch._foreach_add_(parameters, [p.grad for p in parameters], alpha=-1e-6 / len(rows))
    student.net.zero_grad(set_to_none=True)
    tick()
    return dict(zip(PHASES, (b - a for a, b in zip(clock, clock[1:])))), len(rows)


def draw(lines, path):
    """One bar a size: the share of each phase."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axis = pyplot.subplots(figsize=(9, 0.7 + 0.6 * len(lines)), layout="constrained")
    colours = dict(zip(PHASES, ["#4c78a8", "#f58518", "#72b7b2", "#9ecae9", "#54a24b", "#88d27a", "#bab0ac"]))
    for y, line in enumerate(lines):
        whole, left = sum(line["seconds"].values()), 0.0
        for phase in PHASES:
            share = 100 * line["seconds"][phase] / whole
            axis.barh(y, share, left=left, color=colours[phase], label=phase if y == 0 else None)
            if share > 4:
                axis.text(left + share / 2, y, f"{share:.0f}", ha="center", va="center", fontsize=9)
            left += share
    axis.set_yticks(range(len(lines)), [f"{line['size']}: {sum(line['seconds'].values()):.3g} s" for line in lines])
    axis.invert_yaxis()
    axis.set(xlabel="share of an OPD step, %", xlim=(0, 100))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(ncols=len(PHASES), frameon=False, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["demo", "mid", "0.6b"], default="demo")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, help="steps timed, after one that is not; the 0.6b size times its only one")
    parser.add_argument("--figure", help="draw instead of measuring")
    parser.add_argument("--lines", help="file with the JSON lines to draw")
    own = parser.parse_args()
    if own.figure:
        return draw([json.loads(line) for line in open(own.lines) if line.startswith("{")], own.figure)
    torch.set_num_threads(own.threads)
    clips, shortest, longest, max_new_tokens = {"demo": (16, 1.0, 1.8, 8), "mid": (16, 4.0, 8.0, 24), "0.6b": (4, 5.0, 10.0, 40)}[own.size]
    steps = own.steps or {"demo": 30, "mid": 3, "0.6b": 1}[own.size]
    args = argparse.Namespace(chunk=distill.parse_args([]).chunk, divergence="reverse", support="full", top_k=32, tau=1.0, beta=0.5, max_new_tokens=max_new_tokens)
    student, teacher = make(own.size)
    teacher.net.requires_grad_(False)
    to_teacher, batch = model.vocabulary_map(student, teacher), make_batch(clips, shortest, longest)
    runs = [one_step(student, teacher, to_teacher, batch, args, step) for step in range(steps + (own.size != "0.6b"))]
    timed = runs[-steps:]
    seconds = {phase: statistics.median(run[phase] for run, _ in timed) for phase in PHASES}
    whole = sum(seconds.values())
    floor = whole - seconds["rollout"] - seconds["update"]
    count = lambda asr: sum(map(torch.numel, asr.net.parameters()))
    result = {"size": own.size, "student_parameters": count(student), "teacher_parameters": count(teacher), "clips": clips,
              "audio_sec": round(batch.audio_sec, 1), "tokens": timed[-1][1], "threads": own.threads,
              "seconds": {k: round(v, 4) for k, v in seconds.items()}, "step_over_floor": round(whole / floor, 3),
              "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20, 2)}
    for phase in PHASES:
        print(f"{phase:16} {seconds[phase]:9.3f} s  {seconds[phase] / whole:5.1%}")
    print(f"{'step':16} {whole:9.3f} s; floor {floor:.3f} s, ratio {whole / floor:.2f}; peak memory {result['peak_gib']} GiB")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
