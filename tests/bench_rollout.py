"""Rollout: model.generate against transformers' generate on the same weights. Prints one JSON line.

    python tests/bench_rollout.py
    python tests/bench_rollout.py --device cuda    # not run here: no GPU

An LM of 4 layers and width 256 behind left-padded prompts of 64 columns, at most 64 new tokens.
  equal     nothing stops a row: every row writes 64 tokens
  ragged    one id in 24, drawn at random, stops a row: lengths as uneven as those of real rollouts

On a CPU both sides emit the same tokens when greedy (asserted). Speed is emitted tokens per second,
the median of --repeats runs (four times as many where lengths are drawn) after one that is not
measured, the sides in turn. transformers samples with do_sample=True, top_k=0, top_p=1.0.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

import model

N_PROMPT, N_NEW, PAD = 64, 64, 0


def ours(lm, embeds, mask, stop, sampled):
    """model.generate -> ids (B, R), mask (B, R)."""
    blocked = torch.arange(len(stop), device=stop.device) == PAD
    asr = SimpleNamespace(body=lm.model, head=lm.lm_head, stop=stop, blocked=blocked, pad_id=PAD)
    uniforms = torch.rand(len(embeds), N_NEW)
    return model.generate(asr, embeds, mask, N_NEW, float(sampled), uniforms)


@torch.no_grad()
def theirs(lm, embeds, mask, stop, sampled):
    """transformers' generate -> ids (B, R), mask (B, R)."""
    sampling = {"top_k": 0, "top_p": 1.0} if sampled else {}
    config = GenerationConfig(
        max_new_tokens=N_NEW, do_sample=sampled, pad_token_id=PAD, suppress_tokens=[PAD],
        eos_token_id=stop.nonzero()[:, 0].tolist() or None, **sampling)
    with model.autocast(embeds.device):
        ids = lm.generate(inputs_embeds=embeds, attention_mask=mask.long(),
                          generation_config=config)
    ended_before = stop[ids].cumsum(1) - stop[ids].long()
    return ids, ended_before == 0


def compare(lm, stop, batch, sampled, repeats):
    """-> {side: emitted tokens per second}."""
    device = stop.device
    lengths = torch.linspace(N_PROMPT // 2, N_PROMPT, batch).long()
    mask = (torch.arange(N_PROMPT) >= N_PROMPT - lengths[:, None]).to(device)       # (B, P)
    embeds = lm.model.embed_tokens(torch.randint(1, len(stop), mask.shape, device=device)).detach()
    sides = {side.__name__: partial(side, lm, embeds, mask, stop, sampled)
             for side in (ours, theirs)}
    (ids, emitted), (their_ids, their_emitted) = (call() for call in sides.values())  # warms up
    if not sampled and device.type == "cpu":
        assert torch.equal(emitted, their_emitted), "greedy lengths differ"
        assert torch.equal(ids[emitted], their_ids[emitted]), "greedy tokens differ"
    speeds = {name: [] for name in sides}
    for _ in range(repeats):
        for name, call in sides.items():
            began = time.perf_counter()
            n = call()[1].sum().item()  # .item() waits for a GPU
            speeds[name].append(n / (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in speeds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[500, 151_936])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    results = []
    print(f"{'vocabulary':>10}{'batch':>6}  {'':18}{'ours':>8}{'theirs':>8}{'ratio':>7}  tokens/s")
    for vocabulary in args.vocabulary:
        torch.manual_seed(0)
        lm = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=vocabulary, hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True,
            initializer_range=0.08)).eval().to(device)
        for lengths, share in (("equal", 0), ("ragged", 1 / 24)):
            stop = torch.rand(vocabulary, device=device) < share
            stop[PAD] = False
            for batch in args.batch:
                for kind in ("greedy", "sampled"):
                    drawn = lengths == "ragged" and kind == "sampled"
                    repeats = args.repeats * (4 if drawn else 1)
                    speeds = compare(lm, stop, batch, kind == "sampled", repeats)
                    ratio = speeds["ours"] / speeds["theirs"]
                    name = f"{lengths} {kind}"
                    results.append({"vocabulary": vocabulary, "batch": batch, "kind": name,
                                    "ratio": round(ratio, 3), **speeds})
                    print(f"{vocabulary:10}{batch:6}  {name:18}{speeds['ours']:8.0f}"
                          f"{speeds['theirs']:8.0f}{ratio:7.2f}", flush=True)
    print(json.dumps({"device": args.device, "tokens_per_second": results}))


if __name__ == "__main__":
    main()
