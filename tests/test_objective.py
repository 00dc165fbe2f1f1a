"""The losses against slow loops written from the formulas, and what the two training loops share.

    pytest tests/test_objective.py
"""

import itertools
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import distill
import model
import sft
from conftest import copied_out

INF = math.inf


# ---------------------------------------------------------------------------------------- oracles
# Floats, loops and sets; no tensor operation.

def probabilities(scores):
    """softmax of a {token: score}; a score of -inf has probability 0."""
    highest = max(scores.values())
    weights = {v: math.exp(z - highest) if z > -INF else 0.0 for v, z in scores.items()}
    return {v: w / sum(weights.values()) for v, w in weights.items()}


def kl(p, q):
    """KL(p || q) over p's tokens, 0 log 0 = 0."""
    return sum(p[v] * (math.log(p[v]) - math.log(q[v])) for v in p if p[v] > 0)


def top(scores, k):
    """The k tokens with the highest finite score, as a set."""
    finite = [v for v, z in scores.items() if z > -INF]
    return set(sorted(finite, key=lambda v: -scores[v])[:k])


def divergence_of_row(row_s, row_t, divergence, support, top_k):
    """D_t of one position: two lists of logits -> nats."""
    s, t = dict(enumerate(row_s)), dict(enumerate(row_t))
    tokens = set(s)
    if support == "union":
        tokens = top(s, top_k) | top(t, top_k)
    p_s = probabilities({v: s[v] for v in sorted(tokens)})
    p_t = probabilities({v: t[v] for v in sorted(tokens)})
    return kl(p_s, p_t) if divergence == "reverse" else kl(p_t, p_s)


def paper_eq_1(rows_s, rows_t, k):
    """Section 3.3, sentence by sentence, at the public code's temperature of 1."""
    losses = []
    for z_s, z_t in zip(rows_s, rows_t):
        teachers = top(dict(enumerate(z_t)), k)  # "the teacher contributes its top-k tokens"
        students = top(dict(enumerate(z_s)), k)  # "the student contributes its [...] candidates"
        union = teachers | students              # "the union of these token ids"
        if len(union) < 2:                       # "positions with at least two valid tokens"
            continue
        p_t = probabilities({v: z_t[v] for v in union})
        p_s = probabilities({v: z_s[v] for v in union})
        losses.append(sum(p_t[v] * math.log(p_t[v] / p_s[v]) for v in union))
    return sum(losses) / len(losses)


def random_logits(n=5, v=11, seed=0, blocked=()):
    """z_s, z_t (n, v) float64, -inf in the columns `blocked`."""
    generator = torch.Generator().manual_seed(seed)
    z_s = 3 * torch.randn(n, v, generator=generator, dtype=torch.float64)
    z_t = 3 * torch.randn(n, v, generator=generator, dtype=torch.float64)
    z_s[:, list(blocked)] = -INF
    z_t[:, list(blocked)] = -INF
    return z_s, z_t


def value_and_gradient(function, z_s, *rest):
    """function(z_s, *rest) (n,) and the gradient of its sum with respect to z_s (n, V)."""
    leaf = z_s.clone().requires_grad_()
    d = function(leaf, *rest)
    d.sum().backward()
    return d.detach(), leaf.grad


# ---------------------------------------------------------------- the divergences against the loops

KLS = {"reverse": distill.reverse_kl, "forward": distill.forward_kl}
SUPPORTS = [("full", 1), ("union", 1), ("union", 3), ("union", 99)]
GRID = list(itertools.product(KLS, SUPPORTS, [(), (0, 4, 10)]))


@pytest.mark.parametrize("divergence, support_of_k, blocked", GRID)
def test_value_and_gradient_equal_the_loops(divergence, support_of_k, blocked):
    """The value by the formula, the gradient by finite differences of the formula."""
    z_s, z_t = random_logits(n=4, seed=1, blocked=blocked)
    settings = (divergence, *support_of_k)
    ours, gradient = value_and_gradient(distill.token_divergence, z_s, z_t, None, *settings)
    rows_t = z_t.tolist()
    slow = [divergence_of_row(s, t, *settings) for s, t in zip(z_s.tolist(), rows_t)]
    assert ours.tolist() == pytest.approx(slow, rel=1e-12, abs=1e-13)
    if support_of_k == ("full", 1):
        assert torch.equal(KLS[divergence](z_s, z_t), ours)
    free = torch.isfinite(z_s)  # only finite logits can be nudged
    assert torch.isfinite(gradient).all()
    assert (gradient[~free] == 0).all()
    eps = 1e-5
    for n, v in free.nonzero().tolist():
        up, down = z_s[n].tolist(), z_s[n].tolist()
        up[v] += eps
        down[v] -= eps
        higher = divergence_of_row(up, rows_t[n], *settings)
        lower = divergence_of_row(down, rows_t[n], *settings)
        assert gradient[n, v].item() == pytest.approx((higher - lower) / (2 * eps), abs=1e-7)


@pytest.mark.parametrize("name", KLS)
def test_probabilities_that_underflow_are_zero_and_not_nan(name):
    """In fp32 exp(-110) is 0; the log-probabilities are finite all the same."""
    z_s = torch.tensor([[0.0, -110.0, -300.0, 1.0]])
    z_t = torch.tensor([[1.0, -300.0, -110.0, 0.0]])
    d, gradient = value_and_gradient(KLS[name], z_s, z_t)
    assert torch.isfinite(gradient).all()
    assert d.item() == pytest.approx(KLS[name](z_s.double(), z_t.double()).item(), rel=1e-5)


@pytest.mark.parametrize("k", [1, 4])
def test_forward_on_the_union_is_equation_1_of_the_paper(k):
    """Positions of one token, which the paper leaves out, count with 0 here."""
    z_s, z_t = random_logits(n=7, v=23, seed=3, blocked=(0, 22))
    z_s[0], z_t[0] = z_s[1], z_s[1] + 1.0  # k = 1: a union of one token
    ours = distill.token_divergence(z_s, z_t, None, "forward", "union", k)
    counted = [len(top(dict(enumerate(s)), k) | top(dict(enumerate(t)), k)) > 1
               for s, t in zip(z_s.tolist(), z_t.tolist())]
    assert all(counted) == (k == 4)
    expected = paper_eq_1(z_s.tolist(), z_t.tolist(), k)
    assert ours.sum().item() / sum(counted) == pytest.approx(expected, rel=1e-12)
    assert k == 4 or ours[0] == 0


# --------------------------------------------------------------------------- the sampled estimator

def test_sampled_kl_is_reverse_kl_in_the_mean():
    """Summed over every y with its probability, value and gradient are those of the full reverse
    KL: exactly, not by sampling. The id that is ruled out is never drawn."""
    z_s, z_t = random_logits(n=1, seed=9, blocked=(2,))
    p_s = z_s.softmax(-1)[0]

    def mean_over_y(z_s, z_t):
        return sum(p_s[y] * distill.sampled_kl(z_s, z_t, torch.tensor([y])) for y in range(11)
                   if y != 2)

    mean, gradient = value_and_gradient(mean_over_y, z_s, z_t)
    expected, expected_gradient = value_and_gradient(distill.reverse_kl, z_s, z_t)
    torch.testing.assert_close(mean, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)


def test_sampled_kl_of_one_token_by_the_formula():
    """Value log p_S(y) - log p_T(y) = -A; gradient -A (1[v = y] - p_S(v))."""
    z_s, z_t = random_logits(n=4, seed=10)
    y = torch.tensor([3, 0, 10, 3])
    minus_a = []
    for s, t, i in zip(z_s.tolist(), z_t.tolist(), y.tolist()):
        p_s, p_t = probabilities(dict(enumerate(s))), probabilities(dict(enumerate(t)))
        minus_a.append(math.log(p_s[i]) - math.log(p_t[i]))
    minus_a = torch.tensor(minus_a, dtype=torch.float64)
    d, gradient = value_and_gradient(
        distill.token_divergence, z_s, z_t, y, "reverse", "sampled", 32)
    torch.testing.assert_close(d, minus_a)
    expected = minus_a[:, None] * (F.one_hot(y, 11) - z_s.softmax(-1))
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


# ----------------------------------------------------------------------- heads and loss in chunks

REVERSE = {"divergence": "reverse", "support": "full", "top_k": 1}
SAMPLED = REVERSE | {"support": "sampled"}
PAPER = {"divergence": "forward", "support": "union", "top_k": 2}
# Ids 1 and 4 of the student's 7 have no counterpart; 0 and 5 both mean the teacher's 7.
TO_TEACHER = torch.tensor([7, -1, 0, 3, -1, 7, 8])
SHARED = [0, 2, 3, 5, 6]


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("settings", [REVERSE, SAMPLED, PAPER])
def test_chunks_equal_one_shot_autograd_and_copy_out_alone(chunk, settings):
    """A body and two heads of unequal vocabularies; value and gradients are divided by N."""
    alone = copied_out(
        distill.reverse_kl, distill.forward_kl, distill.sampled_kl, distill.union_support,
        distill.token_divergence, distill.loss_in_chunks)
    torch.manual_seed(0)
    net = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 7, bias=False)}).double()
    head_t = nn.Linear(5, 9, bias=False).double()
    x, hidden_t = torch.randn(7, 4).double(), torch.randn(7, 5).double()
    y = torch.tensor([0, 2, 3, 5, 6, 0, 2])

    ruled_out = torch.ones(7, dtype=torch.bool)
    ruled_out[SHARED] = False
    z_s = net["head"](net["body"](x)).masked_fill(ruled_out, -INF)
    z_t = head_t(hidden_t).detach()[:, TO_TEACHER].masked_fill(ruled_out, -INF)
    z_t[:, [0, 5]] -= math.log(2)  # two share the teacher's 7
    one_shot = distill.token_divergence(z_s, z_t, y, **settings).sum() / 13
    one_shot.backward()
    expected = {name: p.grad for name, p in net.named_parameters()}
    net.zero_grad(set_to_none=True)

    hidden_s = net["body"](x)
    total, grad_rows = alone.loss_in_chunks(
        hidden_s, hidden_t, y, net["head"], lambda h: model.map_logits(head_t(h), TO_TEACHER),
        partial(alone.token_divergence, **settings), chunk, 13)
    hidden_s.backward(grad_rows)
    assert total.item() == pytest.approx(one_shot.item(), rel=1e-6)
    for name, p in net.named_parameters():  # log k is in fp32
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-6, atol=1e-8)
    assert (net["head"].weight.grad[[1, 4]] == 0).all(), "ids without a counterpart are not pulled"
    assert (net["head"].weight.grad[SHARED].abs().sum(1) > 0).all() or settings is PAPER
    assert head_t.weight.grad is None, "the teacher gets no gradient"


def test_the_minimiser_ends_as_often_as_the_teacher():
    """Two ids end the student's transcripts, one the teacher's. Found by descent."""
    to_teacher = torch.tensor([1, 2, 3, 0, 0])  # ids 3 and 4 mean the teacher's end, 0
    z_t = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.05, 0.8, 0.1, 0.05]]).double().log()
    z_s = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
    descent = torch.optim.LBFGS([z_s], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15,
                                line_search_fn="strong_wolfe")

    def closure():
        descent.zero_grad()
        loss = distill.reverse_kl(z_s, model.map_logits(z_t, to_teacher)).sum()
        loss.backward()
        return loss

    assert descent.step(closure).item() > 0
    p_s = z_s.detach().softmax(-1)
    assert p_s[:, 3:].sum(1).tolist() == pytest.approx([0.5, 0.05], abs=1e-5)
    assert p_s[0, :3].tolist() == pytest.approx([0.2, 0.2, 0.1], abs=1e-5)
    assert closure().item() == pytest.approx(0.0, abs=1e-9)


# --------------------------------------------------------------------------------------------- ctc

def ctc_by_enumeration(logp, labels, blank):
    """-log of the summed probability of all paths that collapse to `labels`: logp is a list of
    frames of log-probabilities."""
    total = 0.0
    for path in itertools.product(range(len(logp[0])), repeat=len(logp)):
        merged = [c for c, _ in itertools.groupby(path)]
        if [c for c in merged if c != blank] == labels:
            total += math.exp(sum(frame[c] for frame, c in zip(logp, path)))
    return -math.log(total)


def test_ctc_equals_enumerated_alignments():
    """3 tokens, EOS, blank; clip 3 doesn't fit (a repeat needs a blank between), clip 5 does exactly,
    in clip 4 nothing is said: blanks alone."""
    torch.manual_seed(0)
    eos = 3
    z = torch.randn(6, 5, 5, requires_grad=True)  # ids: tokens 0, 1, 2, EOS 3, blank 4
    n_audio = [5, 3, 4, 2, 5, 1]
    responses = [[0, 1, eos], [2, 2, eos], [1, eos], [0, 0, eos], [eos], [2, eos]]
    loss, skipped = sft.ctc_sum(z.transpose(0, 1), n_audio, responses, eos)
    logp = z.double().log_softmax(-1)
    expected = [ctc_by_enumeration(logp[b, :n_audio[b]].tolist(), responses[b][:-1], 4)
                for b in (0, 1, 2, 4, 5)]
    assert skipped == 1
    assert loss.item() == pytest.approx(sum(expected), rel=1e-5)
    loss.backward()
    heard = [5, 3, 4, 0, 5, 1]  # frames of each row
    for row, n in zip(z.grad.abs().sum(-1), heard):
        assert (row[:n] > 0).all()
        assert (row[n:] == 0).all()


# ------------------------------------------------------------------ what both training loops share

def test_learning_rate_warms_up_and_decays_to_zero():
    args = SimpleNamespace(lr=2.0, warmup=4, steps=20)
    rates = [model.learning_rate(step, args) for step in range(21)]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates[8] == pytest.approx(1 + math.cos(math.pi / 4))
    assert rates[12] == pytest.approx(1.0)
    assert rates[20] == pytest.approx(0.0)
    assert model.learning_rate(0, SimpleNamespace(lr=2.0, warmup=0, steps=1)) == 2.0
    assert model.learning_rate(1, SimpleNamespace(lr=2.0, warmup=1, steps=1)) == 2.0
