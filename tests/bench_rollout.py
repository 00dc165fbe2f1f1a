"""Rollout: model.generate against transformers' generate on the same weights, in one process. Prints a table and one JSON line.

    python tests/bench_rollout.py

An LM of 4 layers and width 256 behind left-padded prompts of 64 columns, at most 64 new tokens, vocabulary 500 and 151,936, batch 1, 8, 32.

  equal     nothing stops a row: every row writes 64 tokens
  ragged    one id in 24, drawn at random, stops a row: lengths as uneven as those of real rollouts

Both sides have the same stop ids and emit the same tokens when greedy (asserted); speed is emitted tokens a second over
--repeats runs (four times as many where lengths are drawn), the sides in turn. transformers samples with do_sample=True, top_k=0, top_p=1.0 (its default keeps 50 tokens). "draw": one token
for each row of a batch of 32, model.draw against softmax and torch.multinomial.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

import model

N_PROMPT, N_NEW, PAD = 64, 64, 0


def make(vocabulary, ragged):
    """-> a Qwen2 LM with random weights as model.generate wants it."""
    torch.manual_seed(0)
    lm = Qwen2ForCausalLM(Qwen2Config(vocab_size=vocabulary, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
                                      num_key_value_heads=4, tie_word_embeddings=True, initializer_range=0.08)).eval()
    stop = (torch.rand(vocabulary) < 1 / 24) & (torch.arange(vocabulary) != PAD) if ragged else torch.zeros(vocabulary, dtype=torch.bool)
    return SimpleNamespace(lm=lm, body=lm.model, head=lm.lm_head, device=torch.device("cpu"), stop=stop, pad_id=PAD,
                           blocked=torch.arange(vocabulary) == PAD, autocast=lambda: torch.autocast("cpu", enabled=False))


@torch.no_grad()
def theirs(asr, prompt, sampled):
    """transformers' generate -> ids (B, R), mask (B, R)."""
    stop = asr.stop.nonzero()[:, 0].tolist()
    config = GenerationConfig(max_new_tokens=N_NEW, do_sample=sampled, **({"top_k": 0, "top_p": 1.0} if sampled else {}), pad_token_id=PAD, eos_token_id=stop or None,
                              suppress_tokens=[PAD])
    ids = asr.lm.generate(inputs_embeds=prompt.embeds, attention_mask=prompt.mask.long(), generation_config=config)
    return ids, asr.stop[ids].cumsum(1) - asr.stop[ids].long() == 0


def compare(asr, batch, sampled, repeats):
    """-> tokens a second: ours, transformers'."""
    lengths = torch.linspace(N_PROMPT // 2, N_PROMPT, batch).long()
    mask = torch.arange(N_PROMPT) >= N_PROMPT - lengths[:, None]                                                # (B, P)
    embeds = asr.body.embed_tokens(torch.randint(1, asr.stop.shape[0], mask.shape)).detach()
    prompt, uniforms = model.Prompt(embeds, mask, None, None), torch.rand(batch, N_NEW)
    sides = {"ours": lambda: model.generate(asr, prompt, N_NEW, float(sampled), uniforms), "transformers": lambda: theirs(asr, prompt, sampled)}
    if not sampled:
        (a, m), (b, n) = sides["ours"](), sides["transformers"]()
        assert torch.equal(m, n) and torch.equal(a[m], b[n]), "greedy tokens differ"
    tokens, seconds = dict.fromkeys(sides, 0), dict.fromkeys(sides, 0.0)
    for _ in range(repeats):  # sampled lengths differ from draw to draw, and between the sides: totals even that out
        uniforms = torch.rand(batch, N_NEW)
        for name, call in sides.items():
            began = time.perf_counter()
            tokens[name] += call()[1].sum().item()
            seconds[name] += time.perf_counter() - began
    return {name: tokens[name] / seconds[name] for name in sides}


def compare_draw(vocabulary, batch, repeats):
    """-> seconds for one token a row: inverse CDF, multinomial."""
    z, u, best = 4 * torch.randn(batch, vocabulary), torch.rand(batch), {}
    for name, call in (("ours", lambda: model.draw(z, 1.0, u)), ("multinomial", lambda: torch.multinomial(z.softmax(-1), 1))):
        best[name] = float("inf")
        for _ in range(repeats):
            began = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - began)
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[500, 151_936])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    own = parser.parse_args()
    torch.set_num_threads(own.threads)
    result = {"threads": own.threads, "tokens_per_second": [], "draw": []}
    print(f"{'vocabulary':>10}{'batch':>6}  {'':18}{'ours':>10}{'transformers':>14}{'ratio':>7}")
    for vocabulary in own.vocabulary:
        for ragged in (False, True):
            asr = make(vocabulary, ragged)
            for batch in own.batch:
                for sampled in (False, True):
                    rates = compare(asr, batch, sampled, own.repeats * (4 if ragged and sampled else 1))
                    kind = f"{'ragged' if ragged else 'equal'} {'sampled' if sampled else 'greedy'}"
                    result["tokens_per_second"].append({"vocabulary": vocabulary, "batch": batch, "kind": kind, **{k: round(v, 1) for k, v in rates.items()},
                                                        "ratio": round(rates["ours"] / rates["transformers"], 3)})
                    print(f"{vocabulary:10}{batch:6}  {kind:18}{rates['ours']:10.0f}{rates['transformers']:14.0f}"
                          f"{rates['ours'] / rates['transformers']:7.2f}", flush=True)
        seconds = compare_draw(vocabulary, 32, 5)
        result["draw"].append({"vocabulary": vocabulary, **seconds, "ratio": round(seconds["multinomial"] / seconds["ours"], 2)})
        print(f"{vocabulary:10}{32:6}  {'draw, ms':18}{1e3 * seconds['ours']:10.2f}{1e3 * seconds['multinomial']:14.2f}"
              f"{seconds['multinomial'] / seconds['ours']:7.2f}", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
