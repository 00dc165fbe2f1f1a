"""Rollout: model.generate against transformers' generate on the same weights, in one process. Prints a table and one JSON line.

    python tests/bench_rollout.py
    python tests/bench_rollout.py --device cuda    # not run here: no GPU

An LM of 4 layers and width 256 behind left-padded prompts of 64 columns, at most 64 new tokens, vocabulary 500 and 151,936,
batch 1, 8, 32. The same weights on both sides, bf16 under autocast on a GPU.

  equal     nothing stops a row: every row writes 64 tokens
  ragged    one id in 24, drawn at random, stops a row: lengths as uneven as those of real rollouts

Both sides have the same stop ids and, on a CPU, emit the same tokens when greedy (asserted); speed is emitted tokens a second, the
median of --repeats runs (four times as many where lengths are drawn) after one that is not measured, the sides in turn. transformers
samples with do_sample=True, top_k=0, top_p=1.0 (its default keeps 50 tokens). "draw": one token for each row of a batch of 32,
model.draw against softmax and torch.multinomial.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

import model

N_PROMPT, N_NEW, PAD = 64, 64, 0


def make_lm(vocabulary, device):
    """A Qwen2 LM with random weights."""
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=vocabulary, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
                         num_key_value_heads=4, tie_word_embeddings=True, initializer_range=0.08)
    return Qwen2ForCausalLM(config).eval().to(device)


def stop_ids(vocabulary, ragged, device):
    """(V,) bool."""
    stop = torch.zeros(vocabulary, dtype=torch.bool, device=device)
    if ragged:
        stop = torch.rand(vocabulary, device=device) < 1 / 24
        stop[PAD] = False
    return stop


def ours(lm, embeds, mask, stop, sampled):
    """model.generate -> ids (B, R), mask (B, R)."""
    blocked = torch.arange(len(stop), device=stop.device) == PAD
    uniforms = torch.rand(len(embeds), N_NEW)
    return model.generate(lm.model, lm.lm_head.weight, embeds, mask, stop=stop, blocked=blocked, pad_id=PAD, max_new_tokens=N_NEW,
                          temperature=float(sampled), uniforms=uniforms)


@torch.no_grad()
def theirs(lm, embeds, mask, stop, sampled):
    """transformers' generate -> ids (B, R), mask (B, R)."""
    sampling = {"top_k": 0, "top_p": 1.0} if sampled else {}
    config = GenerationConfig(max_new_tokens=N_NEW, do_sample=sampled, pad_token_id=PAD, suppress_tokens=[PAD],
                              eos_token_id=stop.nonzero()[:, 0].tolist() or None, **sampling)
    with model.autocast(embeds.device):
        ids = lm.generate(inputs_embeds=embeds, attention_mask=mask.long(), generation_config=config)
    ended_before = stop[ids].cumsum(1) - stop[ids].long()
    return ids, ended_before == 0


def seconds_of(call, device):
    """-> seconds, what the call returned."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, result


def compare(lm, stop, batch, sampled, repeats):
    """-> {side: emitted tokens a second}."""
    device = stop.device
    lengths = torch.linspace(N_PROMPT // 2, N_PROMPT, batch).long()
    mask = (torch.arange(N_PROMPT) >= N_PROMPT - lengths[:, None]).to(device)       # (B, P)
    prompt = torch.randint(1, len(stop), mask.shape, device=device)                 # (B, P)
    embeds = lm.model.embed_tokens(prompt).detach()                                 # (B, P, D)
    sides = {"ours": partial(ours, lm, embeds, mask, stop, sampled), "transformers": partial(theirs, lm, embeds, mask, stop, sampled)}
    first = {name: call() for name, call in sides.items()}  # warms up
    if not sampled and device.type == "cpu":
        (ids, emitted), (their_ids, their_emitted) = first.values()
        assert torch.equal(emitted, their_emitted), "greedy lengths differ"
        assert torch.equal(ids[emitted], their_ids[emitted]), "greedy tokens differ"
    speeds = {name: [] for name in sides}
    for _ in range(repeats):
        for name, call in sides.items():
            seconds, (_, emitted) = seconds_of(call, device)
            speeds[name].append(emitted.sum().item() / seconds)
    return {name: statistics.median(values) for name, values in speeds.items()}


def compare_draw(vocabulary, batch, repeats, device):
    """-> {side: seconds for one token a row}."""
    z = 4 * torch.randn(batch, vocabulary, device=device)
    u = torch.rand(batch, device=device)
    sides = {"ours": lambda: model.draw(z, 1.0, u), "multinomial": lambda: torch.multinomial(z.softmax(-1), 1)}
    median = {}
    for name, call in sides.items():
        call()
        median[name] = statistics.median(seconds_of(call, device)[0] for _ in range(repeats))
    return median


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[500, 151_936])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    result = {"threads": args.threads, "device": args.device, "tokens_per_second": [], "draw": []}
    print(f"{'vocabulary':>10}{'batch':>6}  {'':18}{'ours':>10}{'transformers':>14}{'ratio':>7}")
    for vocabulary in args.vocabulary:
        lm = make_lm(vocabulary, device)
        for lengths in ("equal", "ragged"):
            stop = stop_ids(vocabulary, lengths == "ragged", device)
            for batch in args.batch:
                for kind in ("greedy", "sampled"):
                    drawn = lengths == "ragged" and kind == "sampled"  # lengths differ from run to run
                    speeds = compare(lm, stop, batch, kind == "sampled", args.repeats * (4 if drawn else 1))
                    ratio = speeds["ours"] / speeds["transformers"]
                    entry = {"vocabulary": vocabulary, "batch": batch, "kind": f"{lengths} {kind}", "ratio": round(ratio, 3)}
                    result["tokens_per_second"].append(entry | {name: round(speed, 1) for name, speed in speeds.items()})
                    print(f"{vocabulary:10}{batch:6}  {entry['kind']:18}{speeds['ours']:10.0f}{speeds['transformers']:14.0f}"
                          f"{ratio:7.2f}", flush=True)
        seconds = compare_draw(vocabulary, 32, 5, device)
        ratio = seconds["multinomial"] / seconds["ours"]
        result["draw"].append({"vocabulary": vocabulary, "ratio": round(ratio, 2), **seconds})
        print(f"{vocabulary:10}{32:6}  {'draw, ms':18}{1e3 * seconds['ours']:10.2f}{1e3 * seconds['multinomial']:14.2f}"
              f"{ratio:7.2f}", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
