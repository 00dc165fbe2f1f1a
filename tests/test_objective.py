"""The losses, against slow fp64 loops written from the formulas.

    pytest tests/test_objective.py
"""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import distill
import model
import sft

INF = math.inf


# ---------------------------------------------------------------------------- oracles: floats, loops and sets, no tensor operation

def probabilities(scores, tau=1.0):
    """softmax(scores / tau) of a {token: score}; a score of -inf has probability 0."""
    top = max(scores.values())
    weights = {v: math.exp((z - top) / tau) if z > -INF else 0.0 for v, z in scores.items()}
    return {v: w / sum(weights.values()) for v, w in weights.items()}


def kl(p, q):
    """KL(p || q) over p's tokens, 0 log 0 = 0."""
    return sum(p[v] * (math.log(p[v]) - math.log(q[v])) for v in p if p[v] > 0)


def top(scores, k):
    """The k tokens with the highest finite score, as a set."""
    return set(sorted((v for v, z in scores.items() if z > -INF), key=lambda v: -scores[v])[:k])


def divergence_of_row(row_s, row_t, divergence, top_k, tau):
    s, t = dict(enumerate(row_s)), dict(enumerate(row_t))
    if top_k is not None:
        union = top(s, top_k) | top(t, top_k)
        s, t = {v: s[v] for v in union}, {v: t[v] for v in union}
    p_s, p_t = probabilities(s, tau), probabilities(t, tau)
    return tau ** 2 * (kl(p_s, p_t) if divergence == "reverse" else kl(p_t, p_s))


def paper_eq_1(rows_s, rows_t, k, tau):
    """Section 3.3, sentence by sentence: mean over T of tau^2 KL(softmax(z_T / tau) || softmax(z_S / tau)) on U_t."""
    losses = []
    for z_s, z_t in zip(rows_s, rows_t):
        teachers = top(dict(enumerate(z_t)), k)      # "the teacher contributes its top-k tokens"
        students = top(dict(enumerate(z_s)), k)      # "the student contributes its rollout top-k candidates at the same position"
        union = teachers | students                  # "the final support is the union of these token ids"
        if len(union) < 2:                           # "T contains [...] positions with at least two valid tokens"
            continue
        p_t = probabilities({v: z_t[v] for v in union}, tau)
        p_s = probabilities({v: z_s[v] for v in union}, tau)
        losses.append(tau ** 2 * sum(p_t[v] * math.log(p_t[v] / p_s[v]) for v in union))
    return sum(losses) / len(losses)


def random_logits(n=5, v=11, seed=0, blocked=()):
    """z_s, z_t (n, v) float64, -inf in the columns `blocked`."""
    generator = torch.Generator().manual_seed(seed)
    z_s, z_t = (3 * torch.randn(n, v, generator=generator, dtype=torch.float64) for _ in range(2))
    z_s[:, list(blocked)] = z_t[:, list(blocked)] = -INF
    return z_s, z_t


# ---------------------------------------------------------------------------- token_divergence

GRID = list(itertools.product(["reverse", "forward"], [None, 1, 3], [1.0, 2.0], [(), (0, 4, 10)]))


@pytest.mark.parametrize("divergence, top_k, tau, blocked", GRID)
def test_divergence_equals_the_formula(divergence, top_k, tau, blocked):
    z_s, z_t = random_logits(blocked=blocked)
    ours = distill.token_divergence(z_s, z_t, divergence, top_k, tau)
    slow = [divergence_of_row(s, t, divergence, top_k, tau) for s, t in zip(z_s.tolist(), z_t.tolist())]
    assert ours.shape == (5,)
    torch.testing.assert_close(ours, torch.tensor(slow, dtype=torch.float64), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("divergence, top_k, tau, blocked", GRID)
def test_gradient_equals_finite_differences(divergence, top_k, tau, blocked):
    z_s, z_t = random_logits(n=3, seed=1, blocked=blocked)
    free = torch.isfinite(z_s)

    def loss_of(finite):  # only finite logits can be nudged
        return distill.token_divergence(z_s.masked_scatter(free, finite), z_t, divergence, top_k, tau)

    assert torch.autograd.gradcheck(loss_of, z_s[free].clone().requires_grad_(), eps=1e-6, atol=1e-7)
    # ... and the same differences taken on the oracle, so that value and gradient belong to the same formula
    leaf, eps = z_s.clone().requires_grad_(), 1e-5
    distill.token_divergence(leaf, z_t, divergence, top_k, tau).sum().backward()
    assert torch.isfinite(leaf.grad).all() and (leaf.grad[~free] == 0).all()
    for n, v in free.nonzero().tolist():
        up, down = z_s[n].tolist(), z_s[n].tolist()
        up[v], down[v] = up[v] + eps, down[v] - eps
        slope = (divergence_of_row(up, z_t[n].tolist(), divergence, top_k, tau)
                 - divergence_of_row(down, z_t[n].tolist(), divergence, top_k, tau)) / (2 * eps)
        assert leaf.grad[n, v].item() == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("divergence", ["reverse", "forward"])
@pytest.mark.parametrize("top_k", [None, 3])
def test_equal_logits_cost_nothing_and_pull_nowhere(divergence, top_k):
    z, _ = random_logits(blocked=(2,))
    leaf = z.clone().requires_grad_()
    loss = distill.token_divergence(leaf, z + 7.0, divergence, top_k, tau=2.0)  # logits are defined up to a constant
    loss.sum().backward()
    assert loss.abs().max() < 1e-14 and leaf.grad.abs().max() < 1e-14


@pytest.mark.parametrize("divergence", ["reverse", "forward"])
@pytest.mark.parametrize("k", [11, 12, 500])
def test_k_of_the_whole_vocabulary_is_the_full_divergence(divergence, k):
    z_s, z_t = random_logits(blocked=(3,))
    torch.testing.assert_close(distill.token_divergence(z_s, z_t, divergence, k), distill.token_divergence(z_s, z_t, divergence))


def test_direction_by_hand():
    """p_S = (1/2, 1/2), p_T = (3/4, 1/4): KL(S||T) = ln(4/3) / 2 = 0.1438, KL(T||S) = 3/4 ln(3/2) - 1/4 ln 2 = 0.1308."""
    z_s, z_t = torch.tensor([[0.5, 0.5]]).double().log(), torch.tensor([[0.75, 0.25]]).double().log()
    assert distill.token_divergence(z_s, z_t).item() == pytest.approx(0.14384103622589)  # reverse is the default
    assert distill.token_divergence(z_s, z_t, "reverse").item() == pytest.approx(0.14384103622589)
    assert distill.token_divergence(z_s, z_t, "forward").item() == pytest.approx(0.13081203594113697)
    with pytest.raises(ValueError, match="jsd"):
        distill.token_divergence(z_s, z_t, "jsd")


def test_a_token_in_both_top_k_sets_is_counted_once():
    """Top-2 sets {0, 1} and {1, 2} share token 1. By hand on {0, 1, 2}: S = (10, 6, 3) / 19, T = (1, 10, 6) / 17."""
    p_s, p_t = torch.tensor([[0.50, 0.30, 0.15, 0.05]]).double(), torch.tensor([[0.05, 0.50, 0.30, 0.15]]).double()
    once = sum(s / 19 * math.log((s / 19) / (t / 17)) for s, t in ((10, 1), (6, 10), (3, 6)))
    twice = sum(s / 25 * math.log((s / 25) / (t / 27)) for s, t in ((10, 1), (6, 10), (6, 10), (3, 6)))
    ours = distill.token_divergence(p_s.log(), p_t.log(), "reverse", top_k=2).item()
    assert ours == pytest.approx(once) and abs(once - twice) > 0.05


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("k", [2, 4])
def test_forward_on_the_union_is_equation_1_of_the_paper(k, tau):
    z_s, z_t = random_logits(n=7, v=23, seed=3, blocked=(0, 22))
    ours = distill.token_divergence(z_s, z_t, "forward", k, tau).mean().item()
    assert ours == pytest.approx(paper_eq_1(z_s.tolist(), z_t.tolist(), k, tau), rel=1e-12)


def test_closed_form_gradient():
    """dD/dz_S = p_S (log p_S - log p_T - D) for reverse, p_S - p_T for forward."""
    z_s, z_t = random_logits(seed=4)
    p_s, p_t = z_s.softmax(-1), z_t.softmax(-1)
    leaf = z_s.clone().requires_grad_()
    d = distill.token_divergence(leaf, z_t)
    d.sum().backward()
    torch.testing.assert_close(leaf.grad, p_s * (p_s.log() - p_t.log() - d.detach()[:, None]), rtol=1e-9, atol=1e-12)
    leaf = z_s.clone().requires_grad_()
    distill.token_divergence(leaf, z_t, "forward").sum().backward()
    torch.testing.assert_close(leaf.grad, p_s - p_t, rtol=1e-9, atol=1e-12)


def test_tokens_outside_the_union_get_no_gradient():
    z_s, z_t = random_logits(n=6, v=30, seed=5)
    leaf = z_s.clone().requires_grad_()
    distill.token_divergence(leaf, z_t, "forward", top_k=4).sum().backward()
    union = distill.top_k_union(z_s, z_t, 4)
    assert (leaf.grad[~union] == 0).all() and (leaf.grad[union] != 0).all()


def test_k_1_with_equal_arg_max_is_zero():
    z_s, z_t = random_logits()
    z_s[:, 6] = z_t[:, 6] = 50.0
    assert (distill.token_divergence(z_s, z_t, "forward", top_k=1) == 0).all()


@pytest.mark.parametrize("k", [1, 4, 30, 99])
def test_top_k_union_is_the_union_of_sets(k):
    z_s, z_t = random_logits(n=8, v=30, seed=6)
    union = distill.top_k_union(z_s, z_t, k)
    for row, s, t in zip(union, z_s.tolist(), z_t.tolist()):
        assert set(row.nonzero()[:, 0].tolist()) == top(dict(enumerate(s)), k) | top(dict(enumerate(t)), k)


# ---------------------------------------------------------------------------- heads in chunks

def options(**changes):
    return SimpleNamespace(**{"divergence": "reverse", "support": "full", "top_k": 4, "tau": 1.0, "chunk": 256, **changes})


@pytest.fixture(scope="module")
def batch(corpus):
    """Six clips of unequal length, in audio and in text."""
    utterances = data.read_manifest(corpus / "train.jsonl")
    return data.load_batch([utterances[i] for i in (0, 1, 5, 6, 8, 11)])


@pytest.fixture(scope="module")
def foreign_teacher():
    """A teacher of another width with another tokenizer: its vocabulary shares most tokens with the student's, not all."""
    texts = ["grandfather repaired the bicycle underground", "在火车站等候出租汽车", "thunder and lightning outside the cupboard"] * 6
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return model.random_student(model.train_tokenizer(texts, 330), d_model=48, encoder_layers=1, lm_layers=1, heads=2)


def rollouts(student, batch, n_tokens=9):
    uniforms = data.keyed_uniforms(3, 0, [u.id for u in batch.utterances], n_tokens)
    return model.generate(student, model.encode(student, batch), n_tokens, 1.0, uniforms)


def gradients(asr):
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in asr.net.named_parameters()}
    asr.net.zero_grad(set_to_none=True)
    return found


def twins(student, teacher):
    """{student id: teacher id} from the token strings, by hand: ordinary tokens of equal spelling, and EOS."""
    theirs, pairs = teacher.tokenizer.get_vocab(), {student.eos_id: teacher.eos_id}
    for token, i in student.tokenizer.get_vocab().items():
        if token not in model.SPECIAL and token in theirs:
            pairs[i] = theirs[token]
    return pairs


@pytest.mark.parametrize("changes", [{}, {"divergence": "forward", "support": "union", "tau": 2.0}], ids=["reverse full", "forward union"])
@pytest.mark.parametrize("foreign", [False, True], ids=["same tokenizer", "foreign tokenizer"])
def test_chunked_backward_equals_one_shot_autograd(student, teacher, foreign_teacher, batch, foreign, changes):
    teacher = foreign_teacher if foreign else teacher
    pairs, to_teacher = twins(student, teacher), model.vocabulary_map(student, teacher)
    ids, mask = rollouts(student, batch)
    scored = mask & torch.tensor([[i in pairs for i in row] for row in ids.tolist()])
    assert 0 < int(scored.sum()) and bool((mask & ~scored).any()) == foreign, "the case needs emitted ids without a twin"
    theirs = torch.tensor([[pairs.get(i, 0) for i in row] for row in ids.tolist()])
    with torch.no_grad():
        hidden_t = model.response_hidden(teacher, model.encode(teacher, batch), theirs, scored)

    def hidden_s():  # with its graph, down to the audio encoder
        return model.response_hidden(student, model.encode(student, batch), ids, mask)[scored[mask]]

    # One shot: all rows at once, the columns of both vocabularies put side by side one by one.
    shared = sorted(pairs)
    z_s = student.head(hidden_s())[:, shared]
    z_t = torch.stack([teacher.head(hidden_t)[:, pairs[i]] for i in shared], dim=1).detach()
    top_k = 4 if changes.get("support") == "union" else None
    naive = distill.token_divergence(z_s, z_t, changes.get("divergence", "reverse"), top_k, changes.get("tau", 1.0)).sum()
    naive.backward()
    expected = gradients(student)
    assert expected["lm.model.embed_tokens.weight"].abs().max() > 0 and expected["audio_encoder.whisper.conv1.weight"].abs().max() > 0
    for chunk in (1, 3, 1000):
        sums = distill.distil_backward(student, hidden_s(), teacher, hidden_t, to_teacher, options(chunk=chunk, **changes))
        assert float(sums["loss"]) == pytest.approx(naive.item(), rel=1e-5)
        assert int(sums["top1"]) == int((z_s.argmax(-1) == z_t.argmax(-1)).sum())
        logp = z_s.detach().log_softmax(-1)
        assert float(sums["entropy"]) == pytest.approx(-(logp.exp() * logp).sum().item(), rel=1e-4)
        for name, gradient in gradients(student).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * float(expected[name].abs().max()) + 1e-8, msg=lambda text: f"{name}: {text}")
    assert all(p.grad is None for p in teacher.net.parameters()), "the teacher is frozen"


def test_blocked_ids_get_no_gradient_from_the_loss(student, foreign_teacher):
    to_teacher, generator = model.vocabulary_map(student, foreign_teacher), torch.Generator().manual_seed(0)
    rows = torch.randn(6, 32, generator=generator).requires_grad_()
    distill.distil_backward(student, rows, foreign_teacher, torch.randn(6, 48, generator=generator), to_teacher, options(chunk=4))
    of_head = gradients(student)["lm.model.embed_tokens.weight"]  # the head's weight: `rows` did not come from the body
    pairs = twins(student, foreign_teacher)
    blocked = [i for i in range(len(of_head)) if i not in pairs]
    assert len(blocked) > 20 and (of_head[blocked] == 0).all() and (of_head[sorted(pairs)].abs().sum(1) > 0).all()


def test_no_scored_token_is_no_gradient_and_no_error(student, foreign_teacher):
    """Every id of a micro-batch may lack a twin; then there is nothing to learn from it, and nothing to stop for."""
    to_teacher = model.vocabulary_map(student, foreign_teacher)
    hidden_s = (student.body.embed_tokens.weight * 1.0)[:0]  # (0, D), with a graph
    sums = distill.distil_backward(student, hidden_s, foreign_teacher, torch.zeros(0, 48), to_teacher, options())
    assert float(sums["loss"]) == 0.0 and all((g == 0).all() for g in gradients(student).values())


def test_a_student_is_its_own_perfect_teacher(student, batch):
    ids, mask = rollouts(student, batch)
    with torch.no_grad():
        hidden_t = model.response_hidden(student, model.encode(student, batch), ids, mask)
    hidden_s = model.response_hidden(student, model.encode(student, batch), ids, mask)
    sums = distill.distil_backward(student, hidden_s, student, hidden_t, model.vocabulary_map(student, student), options())
    assert abs(float(sums["loss"])) / int(mask.sum()) < 1e-6 and int(sums["top1"]) == int(mask.sum())
    assert max(g.abs().max() for g in gradients(student).values()) < 1e-3


# ---------------------------------------------------------------------------- SFT: what is trained on

def loss_of(asr, batch, texts=None):
    """sft.py's cross entropy of a batch, in nats, with its graph."""
    responses = [asr.encode_text(u.text) for u in batch.utterances] if texts is None else texts
    ids, mask = sft.pad_responses(responses, asr.pad_id, "cpu")
    return sft.cross_entropy_sum(asr, model.response_hidden(asr, model.encode(asr, batch), ids, mask), ids[mask])


def test_cross_entropy_is_minus_log_softmax_without_the_blocked_ids(student):
    generator = torch.Generator().manual_seed(0)
    hidden, targets = torch.randn(7, 32, generator=generator), torch.tensor([3, 9, 40, 100, 7, 3, student.eos_id])
    z = hidden.double() @ student.head.weight.double().T
    open_ids = [i for i, shut in enumerate(student.blocked.tolist()) if not shut]
    expected = sum(torch.logsumexp(z[n, open_ids], 0) - z[n, t] for n, t in enumerate(targets.tolist()))
    assert sft.cross_entropy_sum(student, hidden, targets).item() == pytest.approx(expected.item(), rel=1e-6)
    assert len(open_ids) < len(student.blocked)


def test_a_clip_alone_equals_the_language_model_run_by_hand(student, batch):
    """No padding, no packing: transformers' own forward over prompt and response; logits[c] predict column c + 1."""
    for u in batch.utterances:
        alone, response = data.load_batch([u]), student.encode_text(u.text)
        audio, n_audio = student.net.audio_encoder(alone.mel, alone.n_frames)
        embed = lambda ids: student.body.embed_tokens(torch.tensor([ids]))
        columns = torch.cat([embed(student.prefix_ids), audio, embed(student.suffix_ids), embed(response)], dim=1)
        n_prompt = columns.shape[1] - len(response)
        assert n_prompt == len(student.prefix_ids) + int(n_audio) + len(student.suffix_ids)
        z = student.net.lm(inputs_embeds=columns).logits[0].masked_fill(student.blocked, -INF)
        expected = sum(-z[n_prompt - 1 + i].log_softmax(-1)[token] for i, token in enumerate(response))
        assert loss_of(student, alone).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_batch_is_the_sum_of_its_clips(student, batch):
    """Neither the prompts' left padding nor the responses' right padding is trained on or read: loss and every gradient agree."""
    assert len({len(student.encode_text(u.text)) for u in batch.utterances}) > 2 and len(set(batch.n_frames.tolist())) > 2
    loss = loss_of(student, batch)
    loss.backward()
    together, alone = gradients(student), []
    for u in batch.utterances:
        alone.append(loss_of(student, data.load_batch([u])))
        alone[-1].backward()
    assert loss.item() == pytest.approx(sum(part.item() for part in alone), rel=1e-5)
    for name, gradient in gradients(student).items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()), msg=name)


def test_the_end_of_the_transcript_is_a_target(student, batch):
    responses = [student.encode_text(u.text) for u in batch.utterances]
    assert all(row[-1] == student.eos_id and row.count(student.eos_id) == 1 and len(row) > 1 for row in responses)
    ids, mask = sft.pad_responses(responses, student.pad_id, "cpu")
    logp = student.head(model.response_hidden(student, model.encode(student, batch), ids, mask)).masked_fill(student.blocked, -INF).log_softmax(-1)
    ends = ids[mask] == student.eos_id
    assert int(ends.sum()) == len(responses)
    without = loss_of(student, batch, [row[:-1] for row in responses])
    of_ends = -logp[ends][:, student.eos_id].sum()
    assert of_ends > 1.0 and loss_of(student, batch).item() == pytest.approx((without + of_ends).item(), rel=1e-5)


def test_pad_responses():
    ids, mask = sft.pad_responses([[5, 6, 7], [8], [9, 9]], 0, "cpu")
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0], [9, 9, 0]]
    assert mask.tolist() == [[True, True, True], [True, False, False], [True, True, False]]


# ---------------------------------------------------------------------------- CTC

def ctc_by_enumeration(logp, labels, blank):
    """-log of the summed probability of all paths that collapse to `labels`: logp is a list of frames of log-probabilities."""
    total = 0.0
    for path in itertools.product(range(len(logp[0])), repeat=len(logp)):
        merged = [c for c, _ in itertools.groupby(path)]
        if [c for c in merged if c != blank] == labels:
            total += math.exp(sum(frame[c] for frame, c in zip(logp, path)))
    return -math.log(total)


def test_ctc_equals_enumerated_alignments():
    """Four clips of 1 to 5 frames over 3 tokens + EOS; one doesn't fit (a repeat needs a blank between), one is empty."""
    torch.manual_seed(0)
    eos, head, audio = 3, nn.Linear(6, 5), torch.randn(5, 5, 6)  # classes: tokens 0, 1, 2, EOS 3, blank 4
    n_audio, responses = torch.tensor([5, 3, 4, 2, 5]), [[0, 1, eos], [2, 2, eos], [1, eos], [0, 0, eos], [eos]]
    prompt = model.Prompt(None, None, audio.requires_grad_(), n_audio)
    loss, skipped = sft.ctc_sum(head, prompt, responses, eos)
    logp = head(audio).double().log_softmax(-1)
    expected = [ctc_by_enumeration(logp[b, :n_audio[b]].tolist(), responses[b][:-1], 4) for b in range(3)]
    assert skipped == 2 and loss.item() == pytest.approx(sum(expected), rel=1e-5)
    loss.backward()
    grad = audio.grad.abs().sum(-1)  # (B, A)
    assert (grad[0] > 0).all() and (grad[1, :3] > 0).all() and (grad[1, 3:] == 0).all() and (grad[2, 4:] == 0).all() and (grad[3:] == 0).all()


def test_ctc_of_clips_that_do_not_fit_is_zero_and_counted():
    head, audio = nn.Linear(6, 5), torch.randn(2, 2, 6, requires_grad=True)
    loss, skipped = sft.ctc_sum(head, model.Prompt(None, None, audio, torch.tensor([2, 1])), [[0, 1, 2, 3], [1, 1, 3]], 3)
    loss.backward()  # a loss like any other: the loop does not ask
    assert loss.item() == 0.0 and skipped == 2 and (audio.grad == 0).all()


# ---------------------------------------------------------------------------- schedule, averaging, augmentation

@pytest.mark.parametrize("script", [sft, distill])
def test_learning_rate_warms_up_and_decays_to_zero(script):
    args = SimpleNamespace(lr=2.0, warmup=4, steps=20)
    rates = [script.learning_rate(step, args) for step in range(21)]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0]) and rates[12] == pytest.approx(1.0) and rates[20] == pytest.approx(0.0)
    assert all(a >= b for a, b in zip(rates[4:], rates[5:])) and min(rates[:20]) > 0
    assert script.learning_rate(0, SimpleNamespace(lr=2.0, warmup=0, steps=1)) == 2.0


@pytest.mark.parametrize("script", [sft, distill])
def test_average_gradients_divides_by_the_tokens_of_the_step(script):
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    (a * torch.tensor([2.0, 4.0, 6.0])).sum().backward()
    script.average_gradients([a, b], 4)
    assert a.grad.tolist() == [0.5, 1.0, 1.5] and b.grad.tolist() == [0.0, 0.0]  # b took no part
    script.average_gradients([a], 0)  # a step without a token divides by nothing
    assert a.grad.tolist() == [0.5, 1.0, 1.5]


@pytest.mark.parametrize("script", [sft, distill])
def test_every_gradient_is_summed_over_ranks_once(script, monkeypatch):
    """However the gradients are put together for the wire: here a sum over ranks doubles what it is given. The second is a large one."""
    sizes = [(3,), (2 ** 25 + 5,), (2, 3), (4,)]
    parameters = [nn.Parameter(torch.zeros(size, dtype=torch.bfloat16)) for size in sizes]
    for n, p in enumerate(parameters[:-1]):
        p.grad = torch.full_like(p, n + 1.0)
    monkeypatch.setattr(script.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(script.dist, "all_reduce", lambda tensor: tensor.mul_(2))
    script.average_gradients(parameters, 2)
    assert [(p.grad.min().item(), p.grad.max().item()) for p in parameters] == [(1, 1), (2, 2), (3, 3), (0, 0)]


@pytest.mark.parametrize("script", [sft, distill])
def test_weight_decay_is_for_matrices(script, student):
    parameters = list(student.net.parameters())
    matrices, vectors = script.optimizer_for(parameters, SimpleNamespace(lr=1.0, weight_decay=0.3)).param_groups
    assert matrices["weight_decay"] == 0.3 and vectors["weight_decay"] == 0.0
    assert all(p.ndim > 1 for p in matrices["params"]) and all(p.ndim <= 1 for p in vectors["params"])
    assert len(matrices["params"]) + len(vectors["params"]) == len(parameters)


def test_spec_augment_repeats_and_leaves_most_of_the_clip(batch):
    u, other = batch.utterances[0], batch.utterances[1]
    mel = torch.randn(128, 300, generator=torch.Generator().manual_seed(0))
    kept, state = mel.clone(), torch.get_rng_state()
    first = sft.spec_augment(mel, u, 4, seed=0)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    torch.rand(3)
    assert torch.equal(sft.spec_augment(mel, u, 4, seed=0), first) and torch.equal(mel, kept) and first.shape == mel.shape
    for changed in (sft.spec_augment(mel, u, 5, 0), sft.spec_augment(mel, u, 4, 1), sft.spec_augment(mel, other, 4, 0)):
        assert not torch.equal(changed, first)
    touched = [(sft.spec_augment(mel, u, step, 0) != mel) for step in range(40)]
    share = torch.stack([t.float().mean() for t in touched])
    assert 0.05 < share.mean() < 0.4 and share.max() < 0.5
    for t in touched:  # bands and stretches: a cell is touched because its row or its column is
        rows, columns = t.all(1), t.all(0)
        assert torch.equal(t, rows[:, None] | columns[None])
        assert rows.sum() <= 40 and columns.sum() <= 48
