"""Supervised fine-tuning: audio and a transcript in, cross entropy on the transcript's tokens. Two stages of the paper are this script:

  Ark-Base   --data train.jsonl                     transcripts written by people
  TD         --data td.jsonl --student runs/x/sft   transcripts written by the teacher (evaluate.py --as_manifest td.jsonl)

For every step, over all its utterances x with response y_0 ... y_{n-1} = EOS:
  L = -1/N sum_x sum_t log p_S(y_t | x, y_<t)       N: response tokens of the step, over all ranks and micro-batches
Prompt, audio and padding are never targets. From random weights, an auxiliary CTC loss on the adapter's output (--ctc) makes the
encoder listen before the LM has learnt to ignore it; it stands in for the pretrained encoder that real runs start from.

    python sft.py --init random --data train.jsonl --dev dev.jsonl --out runs/base                # one process
    torchrun --nproc_per_node 8 sft.py --student runs/base --data td.jsonl --dev dev.jsonl --out runs/td  # eight, same update
    torchrun --nproc_per_node 8 sft.py --init_encoder GLM_ASR --init_lm QWEN --data train.jsonl ...       # a student from parts

--out then holds the best checkpoint on dev (without --dev: the last), --out/state/step-N the last one with all that --resume needs,
and metrics.jsonl and metrics.png. Keys of metrics.jsonl, means and sums since the record before (*: of the logged step alone):
  step, loss (nats per response token), grad_norm* (before clipping), lr*, tokens (N, summed), audio_per_sec
  ctc, ctc_skipped         the CTC loss, nats per response token; clips with more tokens than audio frames, left out of it
  rejected                 clips left out since this process started
  dev_error, dev_length    greedy errors on --dev, %; units written over units in the references
"""

import argparse
import math
import time
from collections import Counter
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torchaudio.functional import mask_along_axis

import data
import model


# ---------------------------------------------------------------------------- the objective

def cross_entropy_sum(z, targets):
    """Sum over response tokens of -log p_S(y_t): logits (N, V), targets (N,) -> nats."""
    return F.cross_entropy(z, targets, reduction="sum")


def ctc_sum(ctc_head, audio, n_audio, responses, eos_id):
    """CTC (Graves et al. 2006) on the adapter's output, EOS left out; the blank is the class after the vocabulary.

    audio (B, A, D), n_audio (B,) embeddings of each row, responses: lists of ids -> sum of -log p (nats) over clips whose tokens fit
    their frames, and how many clips don't fit and are left out.
    """
    labels = []
    fits = torch.zeros(len(responses), dtype=torch.bool)
    for i, response in enumerate(responses):
        row = torch.tensor([token for token in response if token != eos_id], dtype=torch.long)
        n_needed = len(row) + int((row[1:] == row[:-1]).sum())  # a repeat needs a blank between
        fits[i] = 0 < n_needed <= int(n_audio[i])
        if fits[i]:
            labels.append(row)
    n_skipped = len(responses) - len(labels)
    if not labels:
        return audio.sum() * 0.0, n_skipped
    logp = ctc_head(audio[fits.to(audio.device)].float()).log_softmax(-1)       # (B', A, V + 1)
    lengths = torch.tensor([len(row) for row in labels])
    loss = F.ctc_loss(logp.transpose(0, 1), torch.cat(labels).to(audio.device), n_audio.cpu()[fits], lengths,
                      blank=ctc_head.out_features - 1, reduction="sum")
    return loss, n_skipped


# ---------------------------------------------------------------------------- one step

def backward_of_batch(student, ctc_head, batch, args):
    """Gradient of the loss over one micro-batch's response tokens, summed -> sums for the log."""
    responses = [student.encode_text(u.text) for u in batch.utterances]
    ids, mask = data.pad_rows(responses, student.pad_id, student.device)        # (B, R)
    prompt = model.encode_audio(student, batch)
    hidden = model.response_hidden(student.body, prompt.embeds, prompt.mask, ids, mask)     # (N, D)
    z = student.logits(hidden).masked_fill(student.blocked, -math.inf)          # (N, V) blocked ids have probability 0
    loss = cross_entropy_sum(z, ids[mask])
    sums = {"loss": loss.detach(), "tokens": len(hidden), "audio_sec": batch.audio_sec}
    if ctc_head is not None:
        ctc, skipped = ctc_sum(ctc_head, prompt.audio, prompt.n_audio, responses, student.eos_id)
        loss = loss + args.ctc * ctc
        sums |= {"ctc": ctc.detach(), "ctc_skipped": skipped}
    loss.backward()
    return sums


def spec_augment(mel, utterance, step, seed, freq=20, share=0.08):
    """SpecAugment (Park et al. 2019) by torchaudio: two bands of mel bins and two stretches of time set to the clip's mean.

    mel (n_mels, T) -> same. Drawn from (seed, step, utterance id) alone, like everything random here.
    """
    u = data.keyed_uniforms(seed, step, [utterance.id], 1)[0, 0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(u * 2 ** 24))
        for _ in range(2):
            frames = max(1, int(share * mel.shape[1]))
            mel = mask_along_axis(mel[None], freq, mel.mean().item(), axis=1)[0]
            mel = mask_along_axis(mel[None], frames, mel.mean().item(), axis=2)[0]
    return mel


# ---------------------------------------------------------------------------- the same in sft.py and distill.py (a test compares)

def average_gradients(parameters, n_tokens):
    """Gradient of the sum over this rank's tokens -> gradient of the mean over all N tokens of the step, the same on every rank.

    This takes DistributedDataParallel's place: that averages over ranks, so that a token's weight depends on where it landed, and
    wants every rank to run the same number of backwards.
    """
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)  # a rank without a token has nothing to add, and still takes part
    gradients = [p.grad for p in parameters]
    if dist.is_initialized():
        for i in range(0, len(gradients), 64):  # in flat buckets: a collective a tensor was measured 6 times slower
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
    """AdamW on fp32 master weights; weight decay on matrices only, not on norms and biases."""
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))


# ---------------------------------------------------------------------------- the loop

SUMS = ("loss", "tokens", "audio_sec", "seconds", "ctc", "ctc_skipped", "rejected")


def make_student(args, train, device):
    """--student, or --init_encoder with --init_lm, or --init random with --tokenizer or one trained on the transcripts."""
    if args.student:
        return model.load_student(args.student, device)
    if args.init_encoder:
        return model.student_from_parts(args.init_encoder, args.init_lm, device)
    if args.tokenizer:
        tokenizer = model.load_tokenizer(args.tokenizer)
    else:
        tokenizer = model.train_tokenizer((u.text for u in train), args.vocab_size)
    return model.random_student(tokenizer, args.d_model, args.encoder_layers, args.lm_layers, args.heads, device)


@record  # torchrun then shows what stopped a process, at the end
def main(args):
    """Train: see the top of this file."""
    rank, world, device, stop = model.setup(args)
    train = [u for path in args.data for u in data.read_manifest(path)]
    dev = data.read_manifest(args.dev) if args.dev else []
    data.check_labelled(train + dev)
    student = make_student(args, train, device)
    ctc_head = None
    modules = {}  # what is trained beside the student, and thrown away afterwards
    if args.ctc:
        ctc_head = nn.Linear(student.head.in_features, student.head.out_features + 1).to(device)
        modules["ctc_head"] = ctc_head
    parameters = list(student.net.parameters())
    for module in modules.values():
        parameters += module.parameters()
    optimizer = make_optimizer(parameters, args)
    start, best = model.start_run(args, student, optimizer, modules, rank)
    log = model.Log(args, rank, start)
    plan = data.Plan(data.measure(train), args.batch, args.seed)
    augment = partial(spec_augment, seed=args.seed) if args.spec_augment else None
    share = data.Steps(train, plan, args.micro_batch, rank, world, student.n_mels, augment)
    batches = iter(data.loader(share, range(start, args.steps), args.workers))
    if rank == 0:
        print(f"{model.n_parameters(student):,} parameters, {len(train)} clips, {plan.steps_per_epoch} steps an epoch, "
              f"{args.batch} clips a step over {world} process(es) in micro-batches of {args.micro_batch}, on {device}")

    sums = Counter()
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

        # ---- the gradient of the sum over this rank's tokens
        began = time.time()
        n_tokens = 0
        for batch in next(batches):
            log.reject(batch.rejected)
            sums["rejected"] += len(batch.rejected)
            if batch.utterances:
                added = backward_of_batch(student, ctc_head, batch, args)
                sums.update(added)
                n_tokens += added["tokens"]

        # ---- update: every token of the step weighs 1 / N, whatever rank and micro-batch it landed in
        totals = model.all_sum({"tokens": n_tokens, "stop": len(stop)}, device)
        average_gradients(parameters, totals["tokens"])
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.clip).item()
        if not math.isfinite(grad_norm):
            raise FloatingPointError(f"step {step}: gradient norm {grad_norm}; clips {[train[i].id for i in plan[step]]}")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        if totals["tokens"]:  # without a token there is no gradient, and AdamW would still decay the weights
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        trained += totals["tokens"]
        stopping = totals["stop"] > 0
        sums["seconds"] += time.time() - began
        log.bar.update()

        # ---- bookkeeping
        done = stopping or step + 1 == args.steps
        if done or (step + 1) % args.log_every == 0:
            t = model.all_sum({k: sums[k] for k in SUMS}, device)
            n = max(1, t["tokens"])
            line = {"step": step + 1, "loss": t["loss"] / n, "grad_norm": grad_norm, "lr": group["lr"], "tokens": int(t["tokens"])}
            if args.ctc:
                line |= {"ctc": t["ctc"] / n, "ctc_skipped": int(t["ctc_skipped"])}
            line |= {"rejected": int(t["rejected"]), "audio_per_sec": t["audio_sec"] * world / t["seconds"]}
            log.write(line)
            sums = Counter()
        if rank == 0 and (done or (step + 1) % args.save_every == 0):
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
    if stopping and step + 1 < args.steps:
        raise SystemExit(143)  # as a shell reports SIGTERM: a scheduler can tell it from success


def parse_args(argv=None):
    """Flags -> namespace. Defaults are the demo's recipe for base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=data.HelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--data", nargs="+", required=True, help="manifests to train on")
    add("--dev", help="manifest to measure the error rate on while training")
    add("--out", required=True, help="folder to write to")
    add("--resume", action="store_true", help="continue from the newest state in --out, if there is one")
    add("--seed", type=int, default=0, help="decides weights, data order and augmentation")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="where to run")
    # student
    add("--student", help="checkpoint to start from, a directory or a Hub id")
    add("--init_encoder", help="or: encoder of a GLM-ASR, ARK-ASR or Whisper checkpoint, with --init_lm and a new adapter")
    add("--init_lm", help="Qwen2, Qwen2.5 or Qwen3 causal LM to put behind it")
    add("--init", choices=["random"], help="or: random weights of the size below")
    add("--tokenizer", help="checkpoint directory to take the tokenizer from (else one is trained on --data)")
    add("--vocab_size", type=int, default=640, help="size of that trained tokenizer")
    add("--d_model", type=int, default=80, help="width of encoder and LM")
    add("--encoder_layers", type=int, default=2, help="encoder blocks")
    add("--lm_layers", type=int, default=2, help="LM blocks")
    add("--heads", type=int, default=4, help="attention heads of both")
    # optimisation
    add("--steps", type=int, default=1200, help="optimiser updates")
    add("--batch", type=int, default=16, help="utterances a step, over all processes")
    add("--micro_batch", type=int, default=16, help="utterances a forward; lower it when out of memory, the update stays the same")
    add("--lr", type=float, default=3e-3, help="peak learning rate")
    add("--warmup", type=int, default=100, help="updates of linear warm-up")
    add("--weight_decay", type=float, default=0.01, help="AdamW's, on matrices")
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    add("--ctc", type=float, help="weight of the auxiliary CTC loss (1 with --init random, else 0)")
    add("--spec_augment", action="store_true", help="mask bands and stretches of the features")
    # bookkeeping
    add("--log_every", type=int, default=25, help="steps between log lines")
    add("--eval_every", type=int, default=250, help="steps between dev error rates")
    add("--save_every", type=int, default=250, help="steps between training states")
    add("--eval_batch", type=int, default=32, help="utterances a batch in dev decoding")
    add("--max_new_tokens", type=int, default=64, help="longest transcript in dev decoding, tokens")
    add("--workers", type=int, default=1, help="loader processes a rank")
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
