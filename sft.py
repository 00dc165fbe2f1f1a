"""Supervised fine-tuning: audio and a transcript in, cross entropy on the transcript's tokens.

Two stages of the paper are this script:
  Ark-Base  --data train.jsonl                   transcripts written by people
  TD        --data td.jsonl --student runs/sft   transcripts written by the teacher
                                                 (evaluate.py --as_manifest td.jsonl)

For every step, over all its utterances x with response y_0 ... y_{n-1} = EOS:
  L = -1/N sum_x sum_t log p_S(y_t | x, y_<t)
N: response tokens of the step, over all ranks and micro-batches. Prompt, audio and padding are never
targets. From random weights, an auxiliary CTC loss on the adapter's output (--ctc) makes the encoder
listen before the LM has learnt to ignore it; real runs start from a trained encoder instead.

    python sft.py --init random --data train.jsonl --dev dev.jsonl --out runs/base
    torchrun --nproc_per_node 8 sft.py --student runs/base --data td.jsonl --dev dev.jsonl --out runs/td
    torchrun --nproc_per_node 8 sft.py --init_encoder GLM_ASR --init_lm QWEN --data train.jsonl ...

--out then holds the best checkpoint on dev (without --dev: the last), --out/state/step-N the last
one with all that --resume needs, and metrics.jsonl and metrics.png. Keys of metrics.jsonl, means and
sums since the record before (*: of the logged step alone):
  step, loss (nats per response token), grad_norm* (before clipping), lr*, tokens (N, summed)
  ctc, ctc_skipped       CTC loss, nats per response token; clips with more tokens than audio frames,
                         left out of it
  rejected               clips left out since this process started
  audio_per_sec          seconds of audio trained on per second
  dev_error, dev_length  greedy errors on --dev, %; units written over units in the references
"""

import argparse
import math
import time
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import AddedToken
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torchaudio.functional import mask_along_axis

import data
import model
from data import at_least_one, not_negative, positive, whole_number


# ---------------------------------------------------------------------------- the objective

def cross_entropy_sum(z, targets):
    """Sum over response tokens of -log p_S(y_t): logits (N, V), targets (N,) -> nats."""
    return F.cross_entropy(z, targets, reduction="sum")


def ctc_sum(ctc_head, audio, n_audio, responses, eos_id):
    """CTC (Graves et al. 2006) on the adapter's output, EOS left out; the blank is the class V.

    audio (B, A, D), of which n_audio (B,) are each row's; responses: lists of ids -> sum of -log p
    (nats) over the clips whose tokens fit their frames; how many don't fit and are left out.
    """
    labels = []
    fits = torch.zeros(len(responses), dtype=torch.bool)
    for i, response in enumerate(responses):
        row = torch.tensor([token for token in response if token != eos_id], dtype=torch.long)
        n_needed = len(row) + int((row[1:] == row[:-1]).sum())  # a repeat needs a blank between
        fits[i] = n_needed <= int(n_audio[i])  # 0 where nothing is said: blanks alone
        if fits[i]:
            labels.append(row)
    n_skipped = len(responses) - len(labels)
    if not labels:
        return audio.sum() * 0.0, n_skipped
    logp = ctc_head(audio[fits.to(audio.device)].float()).log_softmax(-1)       # (B', A, V + 1)
    lengths = torch.tensor([len(row) for row in labels])
    loss = F.ctc_loss(logp.transpose(0, 1), torch.cat(labels).to(audio.device), n_audio.cpu()[fits],
                      lengths, blank=ctc_head.out_features - 1, reduction="sum")
    return loss, n_skipped


# ---------------------------------------------------------------------------- one step

def backward_of_batch(student, ctc_head, batch, args):
    """Gradient of the loss over one micro-batch's response tokens, summed -> sums for the log."""
    responses = [student.encode_text(u.text) for u in batch.utterances]
    ids, mask = data.pad_rows(responses, student.pad_id, student.device)        # (B, R)
    prompt = model.encode_audio(student, batch)
    hidden = model.response_hidden(student.body, prompt.embeds, prompt.mask, ids, mask)     # (N, D)
    z = student.logits(hidden)                                                  # (N, V)
    z = z.masked_fill(student.blocked, -math.inf)  # what no transcript may contain has p = 0
    loss = cross_entropy_sum(z, ids[mask])
    sums = {"loss": loss.detach(), "tokens": len(hidden), "audio_sec": batch.audio_sec}
    if ctc_head is not None:
        ctc, skipped = ctc_sum(ctc_head, prompt.audio, prompt.n_audio, responses, student.eos_id)
        loss = loss + args.ctc * ctc
        sums |= {"ctc": ctc.detach(), "ctc_skipped": skipped}
    loss.backward()
    return sums


def spec_augment(mel, utterance, step, seed, freq=20, share=0.08):
    """SpecAugment (Park et al. 2019) by torchaudio: mel (n_mels, T) -> same.

    Two bands of mel bins and two stretches of time are set to the clip's mean. Drawn from (seed, step,
    utterance id) alone, like everything random here.
    """
    u = data.keyed_uniforms(seed, step, [utterance.id], 1)[0, 0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(u * 2 ** 24))
        for _ in range(2):
            frames = max(1, int(share * mel.shape[1]))
            mel = mask_along_axis(mel[None], freq, mel.mean().item(), axis=1)[0]
            mel = mask_along_axis(mel[None], frames, mel.mean().item(), axis=2)[0]
    return mel


# ---------------------------------------------------------------------------- the same in distill.py

def average_gradients(parameters, n_tokens):
    """Gradient of the sum over this rank's tokens -> of the mean over all N tokens of the step.

    The result is the same on every rank. This takes DistributedDataParallel's place: that averages
    over ranks, so that a token's weight depends on where it landed, and wants every rank to run the
    same number of backwards.
    """
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)  # a rank without a token adds nothing, and takes part
    gradients = [p.grad for p in parameters]
    if dist.is_initialized():
        for i in range(0, len(gradients), 64):  # flat: a collective a tensor took 6 times as long
            bucket = gradients[i:i + 64]
            flat = nn.utils.parameters_to_vector(bucket)
            dist.all_reduce(flat)
            nn.utils.vector_to_parameters(flat, bucket)
    torch._foreach_div_(gradients, max(1.0, n_tokens))


def learning_rate(step, args) -> float:
    """Linear warm-up over --warmup steps, then a cosine down to zero at --steps."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(parameters, args):
    """AdamW on fp32 weights; weight decay on matrices only, not on norms and biases.

    fused on a GPU: otherwise a step would hold another 4 bytes a parameter for a moment.
    """
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98),
                                  fused=parameters[0].is_cuda or None)
    if args.shard_optimizer:
        model.shard(optimizer)
    return optimizer


# ---------------------------------------------------------------------------- the loop

def make_student(args, train, device):
    """--student, or --init_encoder with --init_lm, or --init random, with --tokenizer or one trained on
    the transcripts."""
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


@record  # torchrun then shows what stopped a process, at the end
def main(args):
    """Train: see the top of this file."""
    rank, world, device, stop = model.setup(args)
    train = data.read_manifests(args.data)
    dev = data.read_manifest(args.dev) if args.dev else []
    data.check_labelled(train)
    data.check_labelled(dev)
    data.check_decodable(dev[rank::world])  # the first evaluation would stop the run
    student = make_student(args, train, device)
    ctc_head = None
    modules = {}  # what is trained beside the student, and thrown away afterwards
    if args.ctc:
        ctc_head = nn.Linear(student.head.in_features, student.head.out_features + 1).to(device)
        modules["ctc_head"] = ctc_head
    parameters = model.trainable(student, args.freeze)
    if args.recompute:
        model.recompute(student)
    for module in modules.values():
        parameters += module.parameters()
    optimizer = make_optimizer(parameters, args)
    start, best = model.start_run(args, student, optimizer, modules, rank)
    plan = data.Plan(data.measure(train), args.batch, args.seed)
    augment = partial(spec_augment, seed=args.seed) if args.spec_augment else None
    share = data.Steps(train, plan, args.micro_batch, rank, world, student.n_mels, augment,
                       args.micro_batch_sec)
    batches = iter(data.loader(share, range(start, args.steps), args.workers))
    log = model.Log(args, rank, start)
    log.say(f"{model.n_parameters(student):,} parameters, {len(train)} clips, {plan.steps_per_epoch} "
            f"steps an epoch, {args.batch} clips a step over {world} process(es) on {device}")

    trained = 0
    stopping = False
    for step in range(start, args.steps + 1):
        # ---- the weights after `step` updates
        if dev and step > 0 and (step % args.eval_every == 0 or step == args.steps):
            error = model.dev_error(student, dev, args, rank, world)
            log.write({"step": step} | error)
            best = model.keep_best(student, args.out, error["dev_error"], best, rank)
        if step == args.steps:
            break
        last = step + 1 == args.steps

        # ---- the gradient of the sum over this rank's tokens
        began = time.time()
        n_tokens = 0
        for batch in log.reject(next(batches)):
            sums = backward_of_batch(student, ctc_head, batch, args)
            log.add(sums)
            n_tokens += sums["tokens"]

        # ---- update: every token of the step weighs 1 / N, wherever it landed
        totals = model.all_sum({"tokens": n_tokens, "stop": len(stop)}, device)
        average_gradients(parameters, totals["tokens"])
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.clip).item()
        if not math.isfinite(grad_norm):
            clips = [train[i].id for i in plan[step]]
            raise FloatingPointError(f"step {step}: gradient norm {grad_norm}; clips {clips}")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        if totals["tokens"]:  # without a token there is no gradient, and AdamW would still decay
            model.update(optimizer)
        optimizer.zero_grad(set_to_none=True)
        trained += totals["tokens"]
        stopping = totals["stop"] > 0
        log.add({"seconds": time.time() - began})
        log.bar.update()

        # ---- bookkeeping
        if last or stopping or (step + 1) % args.log_every == 0:
            t = log.take_sums(("loss", "ctc", "ctc_skipped", "tokens", "audio_sec", "seconds",
                               "rejected"), device)
            n = max(1, t["tokens"])
            line = {"step": step + 1, "loss": t["loss"] / n, "grad_norm": grad_norm,
                    "lr": group["lr"], "tokens": int(t["tokens"])}
            if args.ctc:
                line |= {"ctc": t["ctc"] / n, "ctc_skipped": int(t["ctc_skipped"])}
            line |= {"rejected": int(t["rejected"]),
                     "audio_per_sec": t["audio_sec"] * world / t["seconds"]}
            log.write(line)
        evaluates = dev and (step + 1) % args.eval_every == 0  # saved first: it might fail
        if last or stopping or evaluates or (step + 1) % args.save_every == 0:
            info = {"best": best, "flags": model.kept_flags(args)}
            model.save_training(args.out, step + 1, student, optimizer, modules, info)
        if stopping:
            break

    if rank == 0 and not dev:
        model.save(student, args.out)
    log.close()
    model.finish()
    if start < args.steps and not trained:
        raise ValueError(f"none of the clips could be trained on; first: {log.first_message()}")
    if stopping and not last:
        raise SystemExit(143)  # as a shell reports SIGTERM: a scheduler can tell it from success


# ---------------------------------------------------------------------------- a student from parts

def student_from_parts(encoder, lm, device="cpu") -> model.ASR:
    """Join the audio encoder of one checkpoint and a Qwen2, Qwen2.5 or Qwen3 causal LM to a new student.

    The adapter is drawn from torch's global generator. Tokens of the prompt that the LM lacks are added.
    Raises FileNotFoundError, and ValueError naming the checkpoint and what in it does not fit.
    """
    path = model.find_checkpoint(lm)
    lm_config = read_lm_config(path)
    tied = lm_config["tie_word_embeddings"]
    tokenizer = model.load_tokenizer(path)
    n_text = min(len(tokenizer), lm_config["vocab_size"])  # rows that mean a token
    add_prompt_tokens(tokenizer)
    n_rows = max(lm_config["vocab_size"], model.round_up(len(tokenizer), 64))
    ids = model.special_ids(tokenizer, model.SPECIAL, n_rows)

    whisper_config, tensors = read_encoder(encoder)
    for name, tensor in model.read_weights(path).items():
        tensors["lm." + name] = tensor
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    if tied:
        model.tie_head(tensors, path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if "lm." + name not in tensors:
            raise ValueError(f"{path}: its weights lack {name}; expected a causal LM with a head of its own, "
                             "or tie_word_embeddings true in config.json")
    extend_vocabulary(tensors, n_text, n_rows, tied)

    net = model.empty_student(model.student_config(lm_config, whisper_config, ids, n_rows))
    adapter = net.audio_encoder.adapting.to_empty(device="cpu")
    for layer in (adapter[0], adapter[2]):
        layer.reset_parameters()
    for name, tensor in adapter.state_dict().items():
        tensors["audio_encoder.adapting." + name] = tensor
    model.load_weights(net, tensors, f"{encoder} and {lm}")
    return model.assemble(net, tokenizer, device)


def read_lm_config(path) -> dict:
    """Read config.json of a causal LM -> its keys, with the key lm_type of a student's config.json.

    Raises ValueError for an LM that a student cannot have.
    """
    config = data.read_json(path / "config.json")
    lm_type = config.get("model_type")
    if lm_type not in model.LANGUAGE_MODELS:
        raise ValueError(f"{path}/config.json: model_type {lm_type!r}; "
                         f"expected one of {', '.join(model.LANGUAGE_MODELS)}")
    untied = {"tie_word_embeddings": False}  # transformers' default, not ARK-ASR's
    return untied | config | {"lm_type": lm_type}


def add_prompt_tokens(tokenizer) -> None:
    """Add to a tokenizer the special tokens of the prompt that it lacks."""
    vocabulary = tokenizer.get_vocab()
    for token in model.SPECIAL:
        if token not in vocabulary:
            tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)])


def extend_vocabulary(tensors, n_text, n_rows, tied) -> None:
    """Give embeddings and head of an LM n_rows rows; the first n_text mean a token and stay.

    New embeddings start at the mean of the text's, with its spread; new rows of an untied head at the mean.
    """
    table = tensors["lm.model.embed_tokens.weight"][:n_text]       # (n_text, D)
    noise = torch.randn(n_rows - n_text, table.shape[1])
    table = torch.cat([table, table.mean(0) + table.std(0) * noise])
    tensors["lm.model.embed_tokens.weight"] = table
    if tied:
        tensors["lm.lm_head.weight"] = table
        return
    head = tensors["lm.lm_head.weight"][:n_text]
    tensors["lm.lm_head.weight"] = torch.cat([head, head.mean(0).expand(n_rows - n_text, -1)])


def read_encoder(name) -> tuple[dict, dict[str, torch.Tensor]]:
    """Read a GLM-ASR, ARK-ASR or Whisper checkpoint's encoder -> whisper_config, {our name: tensor}.

    Of GLM-ASR, transformers' layout is read and the original one, which is ARK-ASR's.
    """
    path = model.find_checkpoint(name)
    config = data.read_json(path / "config.json")
    tensors = model.read_weights(path)
    if config.get("model_type") == "glmasr":
        return convert_glmasr_encoder(path, config["audio_config"], tensors)
    return convert_whisper_encoder(path, config.get("whisper_config", config), tensors)


def convert_whisper_encoder(path, config, tensors):
    """Whisper's encoder, and ARK-ASR's, which has its names -> whisper_config, {our name: tensor}.

    Whisper adds a table of positions where this encoder rotates queries and keys: its weights fit, the
    positions have to be learnt anew. Its last LayerNorm becomes the one before the adapter.
    """
    prefixes = ("audio_encoder.whisper.", "model.encoder.", "encoder.")
    prefix = next((prefix for prefix in prefixes if prefix + "conv1.weight" in tensors), None)
    if prefix is None:
        raise ValueError(f"{path}: no Whisper-shaped encoder among its weights, "
                         f"such as {sorted(tensors)[:3]}")
    weights = {}
    for name, tensor in tensors.items():
        if name.startswith("audio_encoder.layer_norm."):
            weights[name] = tensor
        elif name.startswith(prefix):
            ours = "audio_encoder.whisper." + name.removeprefix(prefix)
            if prefix != "audio_encoder.whisper.":
                ours = ours.replace("whisper.layer_norm.", "layer_norm.")
            if not ours.startswith(model.UNUSED_WEIGHTS):
                weights[ours] = tensor
    keys = ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "num_mel_bins")
    return {key: config[key] for key in keys}, weights


# Parts of names in transformers' GLM-ASR -> ours, replaced in this order.
GLMASR_NAMES = {
    "audio_tower.norm.": "audio_encoder.layer_norm.",
    "audio_tower.": "audio_encoder.whisper.",
    ".o_proj.": ".out_proj.",
    ".input_layernorm.": ".self_attn_layer_norm.",
    ".post_attention_layernorm.": ".final_layer_norm.",
    ".mlp.fc": ".fc",
}


def convert_glmasr_encoder(path, config, tensors):
    """transformers' GLM-ASR encoder -> whisper_config, {our name: tensor in our row order}."""
    rope = config.get("rope_parameters") or {}
    if (rope.get("rope_theta", 1e4), rope.get("partial_rotary_factor", 0.5)) != (1e4, 0.5):
        raise ValueError(f"{path}/config.json: rope_parameters {rope}; "
                         "expected theta 10000 on half of each head")
    heads = config["num_attention_heads"]
    weights = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("model.")  # transformers' name in memory; on disk it leaves this out
        if not name.startswith("audio_tower."):
            continue
        for theirs, ours in GLMASR_NAMES.items():
            name = name.replace(theirs, ours)
        if ".q_proj." in name or ".k_proj." in name:
            tensor = interleave_rope(tensor, heads)
        weights[name] = tensor
    whisper_config = {
        "d_model": config["hidden_size"],
        "encoder_layers": config["num_hidden_layers"],
        "encoder_attention_heads": heads,
        "encoder_ffn_dim": config["intermediate_size"],
        "num_mel_bins": config.get("num_mel_bins", 128),
    }
    return whisper_config, weights


def interleave_rope(weight, heads):
    """Undo transformers' row order of q and k, in a weight or bias: (heads * head_dim, ...) -> same.

    Of each head's rows, the first half goes from [0, 2, .., 1, 3, ..] to [0, 1, 2, 3, ..].
    """
    rows = weight.unflatten(0, (heads, -1))                        # (heads, head_dim, ...)
    n_pairs = rows.shape[1] // 4
    even = rows[:, :n_pairs]
    odd = rows[:, n_pairs:2 * n_pairs]
    pairs = torch.stack([even, odd], dim=2).flatten(1, 2)          # (heads, head_dim / 2, ...)
    return torch.cat([pairs, rows[:, 2 * n_pairs:]], dim=1).flatten(0, 1)


# ---------------------------------------------------------------------------- flags

def parse_args(argv=None):
    """Flags -> namespace. Defaults are the demo's recipe for base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=data.HelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add("--data", nargs="+", required=True, help="manifests to train on")
    add("--dev", help="manifest to measure the error rate on while training")
    add("--out", required=True, help="folder to write to")
    add("--resume", action="store_true", help="continue from the newest state in --out, if there is one")
    add("--seed", type=whole_number, default=0, help="decides weights, data order and augmentation")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="where to run")
    # student
    add("--student", help="checkpoint to start from, a directory or a Hub id")
    add("--init_encoder",
        help="or: encoder of a GLM-ASR, ARK-ASR or Whisper checkpoint, with --init_lm and a new adapter")
    add("--init_lm", help="Qwen2, Qwen2.5 or Qwen3 causal LM to put behind it")
    add("--init", choices=["random"], help="or: random weights of the size below")
    add("--tokenizer", help="checkpoint whose tokenizer to take (else one is trained on --data)")
    add("--vocab_size", type=at_least_one, default=640, help="size of that trained tokenizer")
    add("--d_model", type=at_least_one, default=80, help="width of encoder and LM")
    add("--encoder_layers", type=at_least_one, default=2, help="encoder blocks")
    add("--lm_layers", type=at_least_one, default=2, help="LM blocks")
    add("--heads", type=at_least_one, default=4, help="attention heads of both")
    # optimisation
    add("--steps", type=at_least_one, default=1200, help="optimiser updates")
    add("--batch", type=at_least_one, default=16, help="utterances a step, over all processes")
    add("--micro_batch", type=at_least_one, default=16,
        help="utterances a forward; lower it when out of memory, the update stays the same")
    add("--micro_batch_sec", type=positive, help="instead: seconds a forward, padding included")
    add("--lr", type=not_negative, default=3e-3, help="peak learning rate")
    add("--warmup", type=whole_number, default=100, help="updates of linear warm-up")
    add("--weight_decay", type=not_negative, default=0.01, help="AdamW's, on matrices")
    add("--clip", type=positive, default=1.0, help="largest gradient norm")
    add("--freeze", choices=["encoder"], help="train adapter and LM alone")
    add("--recompute", action="store_true", help="less memory, more time: activations are made twice")
    add("--shard_optimizer", action="store_true", help="share AdamW's moments out over the processes")
    add("--ctc", type=not_negative, help="weight of the CTC loss (1 with --init random, else 0)")
    add("--spec_augment", action="store_true", help="mask bands and stretches of the features")
    # bookkeeping
    add("--log_every", type=at_least_one, default=25, help="steps between log lines")
    add("--eval_every", type=at_least_one, default=250, help="steps between dev error rates")
    add("--save_every", type=at_least_one, default=250, help="steps between training states")
    add("--eval_batch", type=at_least_one, default=32, help="utterances a batch in dev decoding")
    add("--max_new_tokens", type=at_least_one, default=64, help="longest transcript in dev decoding, tokens")
    add("--workers", type=whole_number, default=1, help="loader processes a rank")
    args = parser.parse_args(argv)
    if bool(args.init_encoder) != bool(args.init_lm):
        parser.error("--init_encoder and --init_lm go together")
    if sum(map(bool, (args.student, args.init_encoder, args.init))) != 1:
        parser.error("give one of --student, --init_encoder with --init_lm, and --init random")
    if args.ctc is None:
        args.ctc = 1.0 if args.init else 0.0
    return args


if __name__ == "__main__":
    main(parse_args())
