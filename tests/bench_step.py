"""What one OPD step costs, phase by phase, at a chosen size; random weights, real speech lengths. Prints a table and one JSON line.

    python tests/bench_step.py --size demo      # the demo's student and teacher
    python tests/bench_step.py --size mid       # 30 M student, 100 M teacher
    python tests/bench_step.py --size 0.6b      # the published student (1.14 B parameters with its encoder), Qwen3-ASR-1.7B as teacher
    python tests/bench_step.py --size 0.6b --device cuda           # not run here: no GPU
    python tests/bench_step.py --figure cost.png --lines FILE      # draw the JSON lines that earlier calls left in FILE

floor: what no OPD step can do without: teacher forward, student forward (audio encoder included), loss and backward on the same ids.
step / floor says what rollout and update add to it. At 0.6b on a CPU the update is plain SGD: AdamW's two fp32 states (9.1 GB) do
not fit into 24 GiB beside student (4.6 GB), gradients (4.6 GB) and bf16 teacher (4 GB).
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
SIZES = {  # clips, shortest and longest in seconds, cap on rollouts, steps timed
    "demo": (16, 1.0, 1.8, 8, 30),
    "mid": (16, 4.0, 8.0, 24, 3),
    "0.6b": (4, 5.0, 10.0, 40, 1),
}


# ---------------------------------------------------------------------------- models and clips at random

def ark_student(tokenizer, device, hidden, layers, heads, kv_heads, ffn, vocab, audio_width, audio_layers, audio_heads):
    """A student from a config.json with the published keys."""
    ids = tokenizer.get_vocab()
    config = {
        "model_type": "arkasr", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "max_position_embeddings": 32768, "audio_token_id": ids[model.AUDIO], "eos_token_id": ids[model.EOS],
        "pad_token_id": ids[model.PAD],
        "whisper_config": {"d_model": audio_width, "encoder_layers": audio_layers, "encoder_attention_heads": audio_heads,
                           "encoder_ffn_dim": 4 * audio_width, "num_mel_bins": 128, "max_source_positions": 1500},
    }
    return model.assemble(model.Student(config), tokenizer, device)


def qwen3_asr_teacher(tokenizer, device):
    """Qwen3-ASR-1.7B in bf16."""
    config = Qwen3ASRConfig(
        audio_config={"d_model": 1024, "encoder_layers": 24, "encoder_attention_heads": 16, "encoder_ffn_dim": 4096,
                      "output_dim": 2048},
        text_config={"model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144,
                     "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
                     "tie_word_embeddings": True, "max_position_embeddings": 65536,
                     "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})
    torch.set_default_dtype(torch.bfloat16)  # so that it never stands in memory in fp32
    net = Qwen3ASRForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    return model.assemble_qwen3_asr(net, tokenizer, device)


def make_pair(size, device):
    """-> student, teacher, at random weights."""
    torch.manual_seed(0)
    if size == "0.6b":
        bpe = conftest.read_qwen_bpe()
        ours = conftest.qwen_tokenizer_with(bpe, conftest.ARK_ADDED)
        theirs = conftest.qwen_tokenizer_with(bpe, conftest.TEACHER_ADDED)
        return ark_student(ours, device, 896, 24, 14, 2, 4864, 151_936, 1280, 32, 20), qwen3_asr_teacher(theirs, device)
    tokenizer = model.train_tokenizer(conftest.TEXTS["en"] * 4 + conftest.TEXTS["zh"] * 4, 640)
    if size == "demo":
        return (model.random_student(tokenizer, 80, 2, 2, 4, device), model.random_student(tokenizer, 112, 3, 2, 4, device))
    return (ark_student(tokenizer, device, 384, 8, 6, 2, 1536, 16_000, 384, 6, 6),
            ark_student(tokenizer, device, 640, 12, 10, 2, 2560, 16_000, 640, 10, 10))


def make_batch(clips, shortest_sec, longest_sec):
    """A batch of synthetic speech-like sounds of evenly spread lengths."""
    rng = np.random.default_rng(0)
    mels = [data.log_mel(conftest.sound(rng, seconds)) for seconds in np.linspace(shortest_sec, longest_sec, clips)]
    n_frames = torch.tensor([mel.shape[1] for mel in mels])
    padded = torch.zeros(clips, 128, int(n_frames.max()))                           # (B, n_mels, T)
    for row, mel in zip(padded, mels):
        row[:, :mel.shape[1]] = mel
    utterances = [data.Utterance(f"u{i}", f"u{i}.wav", language="en") for i in range(clips)]
    return data.Batch(utterances, padded, n_frames, [])


# ---------------------------------------------------------------------------- a step with a clock

class Clock:
    """Seconds between one `tick` and the next; on a GPU the queued work is waited for."""
    def __init__(self, device):
        self.device = device
        self.seconds = {}
        self.last = self.now()

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def tick(self, phase):
        now = self.now()
        self.seconds[phase] = now - self.last
        self.last = now


def one_step(student, teacher, to_teacher, batch, args, step, optimizer):
    """One OPD step as distill.py makes it -> {phase: seconds}, response tokens."""
    clock = Clock(student.device)
    prompt = model.encode_audio(student, batch)
    clock.tick("audio encoder")

    uniforms = data.keyed_uniforms(args.seed, step, [u.id for u in batch.utterances], args.max_new_tokens)
    ids, mask = model.roll_out(student, prompt, args.max_new_tokens, args.temperature, uniforms)
    scored = model.readable_prefix(ids, mask, to_teacher)
    clock.tick("rollout")

    with torch.no_grad():
        prompt_t = model.encode_audio(teacher, batch)
        ids_t = to_teacher[ids].clamp(min=0)
        hidden_t = model.response_hidden(teacher.body, prompt_t.embeds, prompt_t.mask, ids_t, scored)
    clock.tick("teacher")

    hidden_s = model.response_hidden(student.body, prompt.embeds, prompt.mask, ids, scored)
    clock.tick("student forward")

    _, grad_rows = distill.loss_in_chunks(hidden_s, hidden_t, ids[scored], student.logits,
                                          teacher.logits, to_teacher, distill.token_divergence, args.chunk)
    clock.tick("loss")

    hidden_s.backward(grad_rows)
    clock.tick("backward")

    distill.average_gradients(list(student.net.parameters()), len(hidden_s))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    clock.tick("update")
    return clock.seconds, len(hidden_s)


def peak_gib(device):
    """Peak memory: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def measure(args):
    """-> a record for the JSON line."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    clips, shortest, longest, max_new_tokens, steps = SIZES[args.size]
    steps = args.steps or steps
    student, teacher = make_pair(args.size, device)
    teacher.net.requires_grad_(False)
    to_teacher = model.vocabulary_map(student, teacher)
    batch = make_batch(clips, shortest, longest)
    flags = distill.parse_args(["--max_new_tokens", str(max_new_tokens), "--lr", "1e-6"])
    optimizer = distill.make_optimizer(list(student.net.parameters()), flags)
    warm_up = 1
    if args.size == "0.6b" and device.type == "cpu":
        optimizer = torch.optim.SGD(student.net.parameters(), lr=1e-6)
        warm_up = 0
    runs = []
    for step in range(warm_up + steps):
        runs.append(one_step(student, teacher, to_teacher, batch, flags, step, optimizer))
    timed = runs[warm_up:]
    seconds = {phase: statistics.median(run[phase] for run, _ in timed) for phase in PHASES}
    whole = sum(seconds.values())
    floor = whole - seconds["rollout"] - seconds["update"]
    return {"size": args.size, "device": args.device, "threads": args.threads, "student_parameters": model.n_parameters(student),
            "teacher_parameters": model.n_parameters(teacher), "clips": clips, "audio_sec": round(batch.audio_sec, 1),
            "tokens": timed[-1][1], "seconds": {phase: round(s, 4) for phase, s in seconds.items()},
            "step_over_floor": round(whole / floor, 3), "peak_gib": round(peak_gib(device), 2)}


def draw(lines, path):
    """One bar a size: the share of each phase."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axis = pyplot.subplots(figsize=(9, 0.7 + 0.6 * len(lines)), layout="constrained")
    colours = dict(zip(PHASES, ["#4c78a8", "#f58518", "#72b7b2", "#9ecae9", "#54a24b", "#88d27a", "#bab0ac"]))
    labels = []
    for y, line in enumerate(lines):
        whole = sum(line["seconds"].values())
        labels.append(f"{line['size']}: {whole:.3g} s")
        left = 0.0
        for phase in PHASES:
            share = 100 * line["seconds"][phase] / whole
            axis.barh(y, share, left=left, color=colours[phase], label=phase if y == 0 else None)
            if share > 4:
                axis.text(left + share / 2, y, f"{share:.0f}", ha="center", va="center", fontsize=9)
            left += share
    axis.set_yticks(range(len(lines)), labels)
    axis.invert_yaxis()
    axis.set(xlabel="share of an OPD step, %", xlim=(0, 100))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(ncols=len(PHASES), frameon=False, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="demo")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, help="steps timed, after one that is not; the 0.6b size times its only one on a CPU")
    parser.add_argument("--figure", help="draw instead of measuring")
    parser.add_argument("--lines", help="file with the JSON lines to draw")
    args = parser.parse_args()
    if args.figure:
        lines = [json.loads(line) for line in open(args.lines) if line.startswith("{")]
        return draw(lines, args.figure)
    result = measure(args)
    whole = sum(result["seconds"].values())
    for phase, seconds in result["seconds"].items():
        print(f"{phase:16} {seconds:9.3f} s  {seconds / whole:5.1%}")
    print(f"{'step':16} {whole:9.3f} s; step / floor {result['step_over_floor']}; peak memory {result['peak_gib']} GiB")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
