"""Supervised fine-tuning: audio and a transcript in, cross entropy on the transcript's tokens.

Two stages of the paper are this script:
  Ark-Base  --data train.jsonl                   transcripts written by people
  TD        --data td.jsonl --student runs/sft   transcripts written by the teacher
                                                 (evaluate.py --as_manifest td.jsonl)

For every step, over all its utterances x with response y_0 ... y_{R-1} = EOS:
  L = -1/N sum_x sum_t log p_S(y_t | x, y_<t)
N: response tokens of the step, over all ranks and micro-batches. Prompt, audio and padding are
never targets. p_S is over the ids that a transcript may contain, as in generation.

Differs from the paper (numbers go on from data.py):
  [dev 10] From random weights, an auxiliary CTC loss (--ctc) on the adapter's output makes the
           encoder listen before the LM has learnt to ignore it. The paper has none: it starts, as
           real runs do, from a trained encoder.

    python sft.py --init random --data train.jsonl --dev dev.jsonl --out runs/base
    torchrun --nproc_per_node 8 sft.py --student runs/base --data td.jsonl --dev dev.jsonl \\
        --out runs/td
    torchrun --nproc_per_node 8 sft.py --init_encoder WHISPER --init_lm QWEN --data train.jsonl ...

--out then holds the best checkpoint on dev (without --dev: the last), --out/state/step-N the last
one with all that --resume needs, and metrics.jsonl and metrics.png. Keys of metrics.jsonl:
  step, loss (nats per token), grad_norm and lr of that step, audio_per_sec (seconds per second)
  tokens (N), clips, audio_sec, rejected (clips left out)    sums since the record before
  ctc, ctc_skipped        with --ctc: its loss, nats, divided by tokens as well; clips with more
                          text than audio tokens, which add nothing to it (a sum)
  dev_error               greedy errors on --dev, %; of several manifests, the mean of each one's,
                          dev_error/NAME
"""

import argparse
import math
import re
import time
from collections import Counter

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import AddedToken
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2Config, Qwen2ForCausalLM

import data
import model
from data import at_least


def parse_args(argv=None):
    """Flags -> namespace. Defaults are the demo's recipe for base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=data.HelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    # where the student comes from
    add("--student", help="checkpoint to start from, a directory or a Hub id")
    add("--init_encoder", help="or: encoder of a Whisper, GLM-ASR or ARK-ASR checkpoint")
    add("--init_lm", help="Qwen2 or Qwen2.5 causal LM to put behind it, and a new adapter")
    add("--init", choices=["random"], help="or: random weights of the size below")
    add("--tokenizer", help="checkpoint whose tokenizer to take (else one is trained on --data)")
    add("--vocab_size", type=at_least(263), default=640, help="size of that trained tokenizer")
    add("--d_model", type=at_least(1), default=80, help="width of encoder and LM")
    add("--encoder_layers", type=at_least(1), default=2, help="encoder blocks")
    add("--lm_layers", type=at_least(1), default=2, help="LM blocks")
    add("--heads", type=at_least(1), default=4, help="attention heads of both")
    # what it learns from
    add("--data", nargs="+", required=True, help="manifests to train on")
    add("--dev", nargs="+", help="manifests to measure error rates on while training")
    add("--language", help="of lines of --data and --dev that name none: how dev is normalised")
    add("--out", required=True, help="folder to write to")
    add("--resume", action="store_true", help="continue from the newest save in --out, if any")
    add("--seed", type=at_least(0), default=0, help="decides weights and data order")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="where to run")
    # optimisation
    add("--steps", type=at_least(1), default=1200, help="optimiser updates")
    add("--batch", type=at_least(1), default=16, help="utterances per step, over all processes")
    add("--micro_batch", type=at_least(1), default=16, help="clips per backward: same update")
    add("--lr", type=at_least(0.0), default=3e-3, help="peak learning rate")
    add("--warmup", type=at_least(0), default=100, help="updates of linear warm-up")
    add("--freeze", choices=["encoder"], help="train adapter and LM alone")
    add("--recompute", action="store_true", help="less memory, more time: activations made twice")
    add("--ctc", type=at_least(0.0), help="weight of the CTC loss (1 with --init random, else 0)")
    # bookkeeping
    add("--log_every", type=at_least(1), default=25, help="steps between log lines")
    add("--eval_every", type=at_least(1), default=1200, help="steps between dev error rates")
    add("--save_every", type=at_least(1), default=250, help="steps between saves, for --resume")
    add("--eval_batch", type=at_least(1), default=32, help="utterances decoded together on dev")
    add("--max_new_tokens", type=at_least(1), default=64, help="longest transcript on dev, tokens")
    add("--workers", type=at_least(0), default=1, help="loader processes per rank")
    args = parser.parse_args(argv)
    if bool(args.init_encoder) != bool(args.init_lm):
        parser.error("--init_encoder and --init_lm go together")
    if sum(map(bool, (args.student, args.init_encoder, args.init))) != 1:
        parser.error("give one of --student, --init_encoder with --init_lm, and --init random")
    sizes = ["tokenizer", "vocab_size", "d_model", "encoder_layers", "lm_layers", "heads"]
    given = [f"--{name}" for name in sizes if getattr(args, name) != parser.get_default(name)]
    if given and not args.init:
        parser.error(f"{', '.join(given)}: only --init random reads it")
    if args.tokenizer and "--vocab_size" in given:
        parser.error("--vocab_size is that of a trained tokenizer, and --tokenizer gives one")
    if args.ctc is None:
        args.ctc = 1.0 if args.init else 0.0
    return args


# ---------------------------------------------------------------------------------- the objective

def ctc_sum(z, n_audio, responses, eos_id):
    """CTC (Graves et al. 2006) of logits at the audio tokens, EOS left out of the responses.

    z (A, B, V + 1), of which each clip has its n_audio rows; the blank is class V. responses: each
    clip's ids -> sum of -log p () nats over the clips whose text fits their audio tokens; how many
    do not.
    """
    labels = [[token for token in response if token != eos_id] for response in responses]
    targets = torch.tensor(sum(labels, []), dtype=torch.long, device=z.device)
    loss = F.ctc_loss(                                                          # ()
        z.log_softmax(-1), targets, n_audio, [len(row) for row in labels],
        blank=z.shape[-1] - 1, reduction="sum", zero_infinity=True)
    skipped = 0
    for row, n in zip(labels, n_audio):
        repeats = sum(a == b for a, b in zip(row, row[1:]))  # a blank must part them
        skipped += len(row) + repeats > n
    return loss, skipped


# --------------------------------------------------------------------------------------- the loop

@record  # torchrun then shows what stopped a process, at the end
def main(args):
    """The algorithm at the top of this file."""
    rank, world, device = model.setup(args)
    torch.manual_seed(args.seed)
    resumed = model.find_save(args)
    train = data.read_manifest(args.data, ("text",), args.language)
    if resumed:
        student = model.load_student(resumed, device)
    else:
        student = make_student(args, train, device)
    trained = model.trainable(student, args.freeze, args.recompute)
    if args.ctc:  # its last layer is trained beside the student, and thrown away at the end
        ctc_head = nn.Linear(student.head.in_features, student.head.out_features + 1).to(device)
        trained |= {f"ctc_head.{name}": p for name, p in ctc_head.named_parameters()}
    parameters = list(trained.values())
    # fused: no copies of gradients in a step's peak of memory
    optimizer = torch.optim.AdamW(
        parameters, args.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=device.type == "cuda")
    run = model.Run(args, student, trained, optimizer, resumed, rank, world)
    plan = data.Plan(len(train), args.batch, args.seed)
    steps = data.Steps(train, plan, rank, world, (student.n_mels,))
    batches = iter(data.loader(steps, range(run.start, args.steps), args.workers))
    if rank == 0:
        size = sum(p.numel() for p in student.net.parameters())
        print(f"{size:,} parameters; {len(train)} clips, {plan.steps_per_epoch} steps per epoch",
              flush=True)

    for step in range(run.start, args.steps):
        began = time.time()
        batch = next(batches)

        # ---- the targets   y_0 ... y_{R-1} = EOS of every clip, and their number in the whole step
        responses = [student.encode_text(u.text) for u in batch.utterances]
        totals = model.all_sum({  # a collective
            "tokens": sum(map(len, responses)), "clips": len(batch),
            "rejected": len(batch.rejected), "audio_sec": batch.audio_sec,
            "signals": len(run.signals)}, device)  # one on any rank stops all after this step
        N = max(1, totals["tokens"])

        losses = Counter(loss=0.0)  # sums over the step's tokens, and clips
        if args.ctc:
            losses.update(ctc=0.0, ctc_skipped=0)
        for i in range(0, len(batch), args.micro_batch):
            part = batch.rows(i, i + args.micro_batch)
            written = responses[i:i + args.micro_batch]
            ids, mask = data.pad_rows(written, student.pad_id, device)          # (b, R)
            y = ids[mask]                                                       # (n,)

            # ---- student     z_S[t] = logits of S at (x, y_<t)
            prompt = model.encode_audio(student, part)
            hidden = model.response_hidden(                                     # (n, width)
                student.body, prompt.embeds, prompt.mask, ids, mask)
            z = model.logits(hidden, student.head.weight)                       # (n, V)
            z = z.masked_fill(student.blocked, -math.inf)  # no transcript contains these: p = 0

            # ---- loss        -1/N sum_t log p_S(y_t | x, y_<t), and --ctc times CTC's     [dev 10]
            loss = F.cross_entropy(z, y, reduction="sum")                       # ()
            losses["loss"] += loss.detach()
            if args.ctc:
                z_audio = ctc_head(pad_sequence(prompt.audio).float())          # (A, b, V + 1)
                n_audio = [len(of_clip) for of_clip in prompt.audio]
                ctc, skipped = ctc_sum(z_audio, n_audio, written, student.eos_id)
                loss = loss + args.ctc * ctc
                losses["ctc"] += ctc.detach()
                losses["ctc_skipped"] += skipped
            (loss / N).backward()

        # ---- update      one AdamW step on the gradient of the whole step, clipped to norm 1
        model.sum_gradients(parameters)  # over the ranks: a collective
        grad_norm = nn.utils.clip_grad_norm_(parameters, 1.0).item()
        if not math.isfinite(grad_norm):
            names = [train[i].id for i in plan[step]]
            raise FloatingPointError(f"step {step}: gradient norm {grad_norm}; clips {names}")
        lr = model.learning_rate(step, args)
        optimizer.param_groups[0]["lr"] = lr
        if totals["tokens"]:  # without a token there is no gradient, only AdamW's momentum
            optimizer.step()
        optimizer.zero_grad()

        totals |= model.all_sum(losses, device)
        # Log, save and evaluation where they are due; the ranks share --dev's clips: a collective.
        if run.end_step(step + 1, batch, totals, grad_norm, lr, time.time() - began):
            break
    run.close()


# --------------------------------------------------------------------- where a student comes from

def make_student(args, train, device) -> model.ASR:
    """--student, or --init_encoder with --init_lm, or --init random."""
    if args.student:
        return model.load_student(args.student, device)
    if args.init_encoder:
        return student_from_parts(args.init_encoder, args.init_lm, device)
    if args.tokenizer:
        tokenizer = model.load_tokenizer(args.tokenizer)
    else:
        tokenizer = model.train_tokenizer((u.text for u in train), args.vocab_size)
    return model.random_student(tokenizer, args.d_model, args.encoder_layers, args.lm_layers,
                                args.heads, device)


def student_from_parts(encoder, lm, device="cpu") -> model.ASR:
    """One checkpoint's audio encoder and a Qwen2 or Qwen2.5 causal LM, joined to a new student.

    The adapter is drawn from torch's global generator. Tokens of the prompt that the LM lacks are
    added. Raises FileNotFoundError, and ValueError naming the checkpoint and what does not fit.
    """
    path = model.find_checkpoint(lm)
    config = data.read_json(path / "config.json")
    if config.get("model_type") != "qwen2":
        raise ValueError(f"{path}/config.json: model_type {config.get('model_type')!r}; "
                         "expected 'qwen2', the LM of the published student")
    net = model.load_net(Qwen2ForCausalLM, path, Qwen2Config.from_pretrained(path), torch.float32)
    tokenizer = model.load_tokenizer(path)
    n_text = min(len(tokenizer), net.config.vocab_size)  # rows that mean a token
    for token in model.SPECIAL:
        if token not in tokenizer.get_vocab():
            tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)])
    n_rows = max(net.config.vocab_size, 64 * math.ceil(len(tokenizer) / 64))
    net.resize_token_embeddings(n_rows, mean_resizing=False)
    with torch.no_grad():  # rows that mean no token yet: the mean of the others, with their spread
        table = net.get_input_embeddings().weight                               # (V, width)
        noise = torch.randn_like(table[n_text:])
        table[n_text:] = table[:n_text].mean(0) + table[:n_text].std(0) * noise

    whisper_keys, weights = read_encoder(encoder)
    lm_keys = net.config.to_dict()
    student = model.ArkasrForConditionalGeneration(
        model.new_student_config(lm_keys, whisper_keys, tokenizer, n_rows))
    missing, unexpected = student.load_state_dict(net.state_dict() | weights, strict=False)
    wrong = unexpected
    wrong += [name for name in missing if not name.startswith("audio_encoder.adapting.")]
    if wrong:
        raise ValueError(f"{encoder}: missing or unexpected weights of its encoder: {wrong[:5]}")
    return model.ASR(student, tokenizer, device)


# Names of an encoder's weights as regular expressions -> ours, replaced in this order.
ENCODER_NAMES = {
    r"^model\.": "",
    r"^encoder\.layer_norm\.": "audio_encoder.layer_norm.",  # Whisper's
    r"^encoder\.": "audio_encoder.whisper.",
    r"^audio_tower\.norm\.": "audio_encoder.layer_norm.",    # transformers' GLM-ASR's
    r"^audio_tower\.": "audio_encoder.whisper.",
    r"\.o_proj\.": ".out_proj.",
    r"\.input_layernorm\.": ".self_attn_layer_norm.",
    r"\.post_attention_layernorm\.": ".final_layer_norm.",
    r"\.mlp\.fc": ".fc",
}
# The sizes' names in Whisper and here -> in transformers' GLM-ASR.
ENCODER_SIZES = {"d_model": "hidden_size", "encoder_layers": "num_hidden_layers",
                 "encoder_attention_heads": "num_attention_heads",
                 "encoder_ffn_dim": "intermediate_size", "num_mel_bins": "num_mel_bins"}


def read_encoder(name) -> tuple[dict, dict[str, torch.Tensor]]:
    """The encoder of a Whisper, GLM-ASR or ARK-ASR checkpoint: its sizes, {our name: tensor}.

    Of GLM-ASR, transformers' layout is read and the original one, which is ARK-ASR's. Whisper adds
    a table of positions where this encoder rotates queries and keys: its weights fit, the positions
    have to be learnt anew. Its last LayerNorm becomes the one before the adapter. Raises ValueError
    for another encoder.
    """
    path = model.find_checkpoint(name)
    config = data.read_json(path / "config.json")
    found = config.get("audio_config") or config.get("whisper_config") or config
    sizes = {ours: found.get(ours, found.get(glmasr)) for ours, glmasr in ENCODER_SIZES.items()}
    is_glmasr = config.get("model_type") == "glmasr"
    rope = {"rope_theta": 1e4, "partial_rotary_factor": 0.5} | (found.get("rope_parameters") or {})
    if is_glmasr and (rope["rope_theta"], rope["partial_rotary_factor"]) != (1e4, 0.5):
        raise ValueError(f"{path}/config.json: rope_parameters {rope}; "
                         "expected theta 10000 on half of each head")
    weights = {}
    for file in sorted(path.glob("*.safetensors")):
        for key, tensor in load_file(file).items():
            for theirs, ours in ENCODER_NAMES.items():
                key = re.sub(theirs, ours, key)
            # RoPE takes the place of a table of positions; ARK-ASR's file has a norm too many.
            if re.match(r"audio_encoder\.(layer_norm|whisper\.(conv|layers\.))", key):
                if is_glmasr and re.search("[qk]_proj", key):
                    tensor = interleave_rope(tensor, sizes["encoder_attention_heads"])
                weights[key] = tensor
    if "audio_encoder.whisper.conv1.weight" not in weights:
        raise ValueError(f"{path}: no Whisper-shaped encoder among its weights")
    return sizes, weights


def interleave_rope(weight, heads):
    """transformers' order of rows of q and k undone: (heads * head_dim, ...) -> same.

    Of each head's rows, the first half goes from [0, 2, .., 1, 3, ..] to [0, 1, 2, 3, ..].
    """
    rows = weight.unflatten(0, (heads, -1))                        # (heads, head_dim, ...)
    n_pairs = rows.shape[1] // 4
    even = rows[:, :n_pairs]
    odd = rows[:, n_pairs:2 * n_pairs]
    pairs = torch.stack([even, odd], dim=2).flatten(1, 2)          # (heads, head_dim / 2, ...)
    return torch.cat([pairs, rows[:, 2 * n_pairs:]], dim=1).flatten(0, 1)


if __name__ == "__main__":
    main(parse_args())
