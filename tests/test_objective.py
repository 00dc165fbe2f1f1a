"""The losses and one step of each script, against slow loops written from the formulas.

    pytest tests/test_objective.py
"""

import dataclasses
import itertools
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import distill
import model
import sft
from conftest import twins

INF = math.inf


# ---------------------------------------------------------------------------- oracles
# Floats, loops and sets; no tensor operation.

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
    finite = [v for v, z in scores.items() if z > -INF]
    return set(sorted(finite, key=lambda v: -scores[v])[:k])


def divergence_of_row(row_s, row_t, divergence, support, top_k, tau):
    """D_t of one position: two lists of logits -> nats."""
    s = dict(enumerate(row_s))
    t = dict(enumerate(row_t))
    tokens = set(s)
    if support == "union":
        tokens = top(s, top_k) | top(t, top_k)
    p_s = probabilities({v: s[v] for v in sorted(tokens)}, tau)
    p_t = probabilities({v: t[v] for v in sorted(tokens)}, tau)
    if divergence == "reverse":
        return tau ** 2 * kl(p_s, p_t)
    return tau ** 2 * kl(p_t, p_s)


def paper_eq_1(rows_s, rows_t, k, tau):
    """Section 3.3, sentence by sentence: mean over T of tau^2 KL(softmax(z_T / tau) || softmax(z_S
    / tau)) on U_t."""
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
    z_s = 3 * torch.randn(n, v, generator=generator, dtype=torch.float64)
    z_t = 3 * torch.randn(n, v, generator=generator, dtype=torch.float64)
    z_s[:, list(blocked)] = -INF
    z_t[:, list(blocked)] = -INF
    return z_s, z_t


def value_and_gradient(function, z_s, *rest):
    """function(z_s, *rest) (N,) and the gradient of its sum with respect to z_s (N, V)."""
    leaf = z_s.clone().requires_grad_()
    d = function(leaf, *rest)
    d.sum().backward()
    return d.detach(), leaf.grad


# ---------------------------------------------------------------------------- the divergences against the loops

KLS = {"reverse": distill.reverse_kl, "forward": distill.forward_kl}
both_kls = pytest.mark.parametrize("name", KLS)
some_blocked = pytest.mark.parametrize("blocked", [(), (0, 4, 10)], ids=["all ids", "three ids ruled out"])
GRID = list(itertools.product(KLS, [("full", 1), ("union", 1), ("union", 3)], [1.0, 2.0], [(), (0, 4, 10)]))
whole_grid = pytest.mark.parametrize("divergence, support_of_k, tau, blocked", GRID)


@both_kls
@some_blocked
def test_each_kl_equals_its_formula(name, blocked):
    z_s, z_t = random_logits(blocked=blocked)
    slow = []
    for s, t in zip(z_s.tolist(), z_t.tolist()):
        slow.append(divergence_of_row(s, t, name, "full", None, 1.0))
    ours = KLS[name](z_s, z_t)
    torch.testing.assert_close(ours, torch.tensor(slow, dtype=torch.float64), rtol=1e-12, atol=1e-13)


@whole_grid
def test_token_divergence_equals_the_formula(divergence, support_of_k, tau, blocked):
    z_s, z_t = random_logits(blocked=blocked)
    slow = []
    for s, t in zip(z_s.tolist(), z_t.tolist()):
        slow.append(divergence_of_row(s, t, divergence, *support_of_k, tau))
    ours = distill.token_divergence(z_s, z_t, None, divergence, *support_of_k, tau)
    torch.testing.assert_close(ours, torch.tensor(slow, dtype=torch.float64), rtol=1e-12, atol=1e-13)


@whole_grid
def test_the_gradient_equals_finite_differences_of_the_loops(divergence, support_of_k, tau, blocked):
    z_s, z_t = random_logits(n=3, seed=1, blocked=blocked)
    _, gradient = value_and_gradient(distill.token_divergence, z_s, z_t, None, divergence, *support_of_k, tau)
    free = torch.isfinite(z_s)  # only finite logits can be nudged
    assert torch.isfinite(gradient).all()
    assert (gradient[~free] == 0).all()
    eps = 1e-5
    for n, v in free.nonzero().tolist():
        up = z_s[n].tolist()
        down = z_s[n].tolist()
        up[v] += eps
        down[v] -= eps
        higher = divergence_of_row(up, z_t[n].tolist(), divergence, *support_of_k, tau)
        lower = divergence_of_row(down, z_t[n].tolist(), divergence, *support_of_k, tau)
        assert gradient[n, v].item() == pytest.approx((higher - lower) / (2 * eps), abs=1e-7)


@some_blocked
def test_the_gradient_has_its_closed_form(blocked):
    """dD/dz_S = p_S (log p_S - log p_T - D) for reverse, p_S - p_T for forward; 0 for ids that are
    ruled out."""
    z_s, z_t = random_logits(seed=4, blocked=blocked)
    p_s = z_s.softmax(-1)
    p_t = z_t.softmax(-1)
    d, gradient = value_and_gradient(distill.reverse_kl, z_s, z_t)
    expected = (p_s * (p_s.log() - p_t.log() - d[:, None])).masked_fill(p_s == 0, 0.0)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    _, gradient = value_and_gradient(distill.forward_kl, z_s, z_t)
    torch.testing.assert_close(gradient, p_s - p_t, rtol=1e-9, atol=1e-12)


@both_kls
@pytest.mark.parametrize("support", ["full", "union"])
def test_equal_logits_cost_nothing_and_pull_nowhere(name, support):
    z, _ = random_logits(blocked=(2,))
    shifted = z + 7.0  # logits are defined up to a constant
    d, gradient = value_and_gradient(distill.token_divergence, z, shifted, None, name, support, 3, 2.0)
    assert d.abs().max() < 1e-14
    assert gradient.abs().max() < 1e-14


@both_kls
def test_probabilities_that_underflow_are_zero_and_not_nan(name):
    """In fp32 exp(-110) is 0; the log-probabilities are finite all the same."""
    z_s = torch.tensor([[0.0, -110.0, -300.0, 1.0]])
    z_t = torch.tensor([[1.0, -300.0, -110.0, 0.0]])
    d, gradient = value_and_gradient(KLS[name], z_s, z_t)
    exact = KLS[name](z_s.double(), z_t.double())
    assert torch.isfinite(gradient).all()
    assert d.item() == pytest.approx(exact.item(), rel=1e-5)


def test_the_directions_by_hand():
    """p_S = (1/2, 1/2), p_T = (3/4, 1/4): KL(S||T) = ln(4/3) / 2 = 0.1438, KL(T||S) = 3/4 ln(3/2) -
    1/4 ln 2 = 0.1308."""
    z_s = torch.tensor([[0.5, 0.5]]).double().log()
    z_t = torch.tensor([[0.75, 0.25]]).double().log()
    assert distill.reverse_kl(z_s, z_t).item() == pytest.approx(0.14384103622589)
    assert distill.forward_kl(z_s, z_t).item() == pytest.approx(0.13081203594113697)
    default = distill.token_divergence(z_s, z_t, None)
    assert default.item() == pytest.approx(0.14384103622589), "reverse is the default"


@pytest.mark.parametrize("wrong", [
    {"divergence": "jeffreys"}, {"support": "tail"}, {"support": "sampled", "tau": 2.0},
    {"support": "sampled", "divergence": "forward"}])
def test_divergences_that_are_not_there_are_refused(wrong):
    z_s, z_t = random_logits()
    with pytest.raises(ValueError):
        distill.token_divergence(z_s, z_t, torch.zeros(5, dtype=torch.long), **wrong)


# ---------------------------------------------------------------------------- the union support

@pytest.mark.parametrize("k", [1, 4, 30, 99])
def test_the_union_is_that_of_both_top_k_sets(k):
    z_s, z_t = random_logits(n=8, v=30, seed=6)
    support = distill.union_support(z_s, z_t, k)
    for n, (s, t) in enumerate(zip(z_s.tolist(), z_t.tolist())):
        expected = top(dict(enumerate(s)), k) | top(dict(enumerate(t)), k)
        assert set(support[n].nonzero()[:, 0].tolist()) == expected


@both_kls
@pytest.mark.parametrize("k", [11, 12, 500])
def test_k_of_the_whole_vocabulary_is_the_full_divergence(name, k):
    z_s, z_t = random_logits(blocked=(3,))
    union = distill.token_divergence(z_s, z_t, None, name, "union", k)
    torch.testing.assert_close(union, distill.token_divergence(z_s, z_t, None, name))


def test_a_token_in_both_top_k_sets_is_counted_once():
    """Top-2 sets {0, 1} and {1, 2} share token 1. By hand on {0, 1, 2}: S = (10, 6, 3) / 19, T =
    (1, 10, 6) / 17."""
    p_s = torch.tensor([[0.50, 0.30, 0.15, 0.05]]).double()
    p_t = torch.tensor([[0.05, 0.50, 0.30, 0.15]]).double()
    once = sum(s / 19 * math.log((s / 19) / (t / 17)) for s, t in ((10, 1), (6, 10), (3, 6)))
    twice = sum(s / 25 * math.log((s / 25) / (t / 27)) for s, t in ((10, 1), (6, 10), (6, 10), (3, 6)))
    assert abs(once - twice) > 0.05
    ours = distill.token_divergence(p_s.log(), p_t.log(), None, "reverse", "union", 2)
    assert ours.item() == pytest.approx(once)


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("k", [2, 4])
def test_forward_on_the_union_is_equation_1_of_the_paper(k, tau):
    z_s, z_t = random_logits(n=7, v=23, seed=3, blocked=(0, 22))
    ours = distill.token_divergence(z_s, z_t, None, "forward", "union", k, tau).mean()
    assert ours.item() == pytest.approx(paper_eq_1(z_s.tolist(), z_t.tolist(), k, tau), rel=1e-12)


def test_ids_outside_the_union_get_no_gradient():
    z_s, z_t = random_logits(n=6, v=30, seed=5)
    _, gradient = value_and_gradient(distill.token_divergence, z_s, z_t, None, "forward", "union", 4)
    for n, (s, t) in enumerate(zip(z_s.tolist(), z_t.tolist())):
        union = top(dict(enumerate(s)), 4) | top(dict(enumerate(t)), 4)
        assert set(gradient[n].nonzero()[:, 0].tolist()) == union


def test_k_1_with_equal_arg_max_is_zero():
    z_s, z_t = random_logits()
    z_s[:, 6] = 50.0
    z_t[:, 6] = 50.0
    assert (distill.token_divergence(z_s, z_t, None, "forward", "union", 1) == 0).all()


# ---------------------------------------------------------------------------- the sampled estimator

def test_sampled_kl_is_reverse_kl_in_the_mean():
    """Summed over every y with its probability, value and gradient are those of the full reverse
    KL: exactly, not by sampling."""
    z_s, z_t = random_logits(n=1, seed=9, blocked=(2,))
    p_s = z_s.softmax(-1)[0]

    def mean_over_y(z_s, z_t):
        return sum(p_s[y] * distill.sampled_kl(z_s, z_t, torch.tensor([y])) for y in range(11))

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
        p_s = probabilities(dict(enumerate(s)))
        p_t = probabilities(dict(enumerate(t)))
        minus_a.append(math.log(p_s[i]) - math.log(p_t[i]))
    minus_a = torch.tensor(minus_a, dtype=torch.float64)
    for function in (distill.sampled_kl, partial(distill.token_divergence, support="sampled")):
        d, gradient = value_and_gradient(function, z_s, z_t, y)
        torch.testing.assert_close(d, minus_a)
        expected = minus_a[:, None] * (F.one_hot(y, 11) - z_s.softmax(-1))
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_a_sampled_id_of_probability_zero_says_nothing():
    z_s, z_t = random_logits(n=2, seed=11, blocked=(2,))
    d, gradient = value_and_gradient(distill.sampled_kl, z_s, z_t, torch.tensor([2, 5]))
    assert d[0] == 0
    assert (gradient[0] == 0).all()
    assert d[1] != 0
    assert torch.isfinite(gradient).all()
    z_t[:, 2] = 1.0  # ... whatever the teacher thinks of it
    d, gradient = value_and_gradient(distill.sampled_kl, z_s, z_t, torch.tensor([2, 2]))
    assert (d == 0).all()
    assert (gradient == 0).all()


# ---------------------------------------------------------------------------- heads and loss in chunks

OBJECTIVES = {"reverse full": "", "forward union": "--divergence forward --support union --top_k 4 --tau 2",
              "sampled": "--support sampled"}


def options(line="", **changes):
    """Flags of distill.py as a namespace, with a short cap on rollouts."""
    args = distill.parse_args(["--max_new_tokens", "9", "--seed", "3", *line.split()])
    for flag, value in changes.items():
        setattr(args, flag, value)
    return args


def gradients(net):
    """{name: gradient} of a module; zeros where there is none. The module is left without any."""
    found = {}
    for name, p in net.named_parameters():
        found[name] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
    net.zero_grad(set_to_none=True)
    return found


def same_gradients(found, expected):
    for name, gradient in found.items():
        atol = 1e-5 * float(expected[name].abs().max()) + 1e-8
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=atol, msg=name)


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_chunks_equal_one_shot_autograd(chunk):
    """A body, two heads of unequal vocabularies; ids 1 and 4 of the student's 6 have no
    counterpart, id 0 is the teacher's 7, id 2 its 0."""
    generator = torch.Generator().manual_seed(0)
    to_teacher = torch.tensor([7, -1, 0, 3, -1, 8])
    shared = [0, 2, 3, 5]
    torch.manual_seed(0)
    net = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 6, bias=False)}).double()
    head_t = nn.Linear(5, 9, bias=False).double()
    x = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    hidden_t = torch.randn(7, 5, generator=generator, dtype=torch.float64)

    z_s = net["head"](net["body"](x))[:, shared]
    z_t = head_t(hidden_t)[:, to_teacher[shared]].detach()
    one_shot = distill.reverse_kl(z_s, z_t).sum()
    one_shot.backward()
    expected = gradients(net)

    y = torch.zeros(7, dtype=torch.long)
    hidden_s = net["body"](x)
    total, grad_rows = distill.loss_in_chunks(
        hidden_s, hidden_t, y, net["head"], head_t, to_teacher, distill.token_divergence, chunk)
    hidden_s.backward(grad_rows)
    assert total.item() == pytest.approx(one_shot.item(), rel=1e-6)
    found = gradients(net)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12)
    assert (found["head.weight"][[1, 4]] == 0).all(), "ids without a counterpart get no gradient"
    assert head_t.weight.grad is None, "the teacher gets no gradient"


def test_no_scored_token_is_no_gradient_and_no_error(student, teacher, batch):
    """No token of a micro-batch may have a counterpart: then there is nothing to learn from it, and
    nothing to stop for."""
    nothing_shared = torch.full((len(student.blocked),), -1)
    args = options()
    sums, (hidden_s, hidden_t) = distill.backward_of_share(student, teacher, nothing_shared, [batch], 0, args)
    assert (sums["loss"], sums["tokens"]) == (0.0, 0)
    assert sums["not_scored"] > 0
    assert len(hidden_s) == len(hidden_t) == 0
    assert all((gradient == 0).all() for gradient in gradients(student.net).values())


# ---------------------------------------------------------------------------- one step of distill.py

def first_rollouts(student, batch, args):
    """What step 0 writes -> ids, mask (B, R)."""
    uniforms = data.keyed_uniforms(args.seed, 0, [u.id for u in batch.utterances], args.max_new_tokens)
    prompt = model.encode_audio(student, batch)
    return model.roll_out(student, prompt, args.max_new_tokens, args.temperature, uniforms)


def rows_by_hand(student, teacher, pairs, batch, ids, mask):
    """Each row of ids up to the first that `pairs` {student id: teacher id} lacks, scored by both
    models in the shared vocabulary.

    -> z_s (N, shared) with its graph, z_t (N, shared), y (N,) as columns of the shared vocabulary.
    """
    read = torch.zeros_like(mask)
    ids_t = torch.zeros_like(ids)
    for b, row in enumerate(ids.tolist()):
        for r, token in enumerate(row):
            if not mask[b, r] or token not in pairs:
                break
            read[b, r] = True
            ids_t[b, r] = pairs[token]
    shared = sorted(pairs)
    prompt_s = model.encode_audio(student, batch)
    hidden_s = model.response_hidden(student.body, prompt_s.embeds, prompt_s.mask, ids, read)
    z_s = hidden_s @ student.head.weight.T
    with torch.no_grad():
        prompt_t = model.encode_audio(teacher, batch)
        hidden_t = model.response_hidden(teacher.body, prompt_t.embeds, prompt_t.mask, ids_t, read)
        z_t = hidden_t @ teacher.head.weight.T
    y = torch.tensor([shared.index(token) for token in ids[read].tolist()])
    return z_s[:, shared], z_t[:, [pairs[i] for i in shared]], y


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("micro_batch", [6, 4], ids=["one micro-batch", "two micro-batches"])
@pytest.mark.parametrize("foreign", [False, True], ids=["same tokenizer", "foreign tokenizer"])
def test_one_step_equals_one_shot_autograd(student, teacher, foreign_teacher, batch, foreign, micro_batch, objective):
    """Rollout, teacher, student, chunked loss: all as the script runs them, against all rows at
    once over the shared ids."""
    teacher = foreign_teacher if foreign else teacher
    pairs = twins(student, teacher)
    to_teacher = model.vocabulary_map(student, teacher)
    args = options(OBJECTIVES[objective], chunk=3)
    ids, mask = first_rollouts(student, batch, args)
    unknown = sum(token not in pairs for token in ids[mask].tolist())
    assert (unknown > 0) == foreign, "the case needs emitted ids without a counterpart"

    z_s, z_t, y = rows_by_hand(student, teacher, pairs, batch, ids, mask)
    d = distill.token_divergence(z_s, z_t, y, args.divergence, args.support, args.top_k, args.tau)
    one_shot = d.sum()
    one_shot.backward()
    expected = gradients(student.net)
    assert expected["lm.model.embed_tokens.weight"].abs().max() > 0
    assert expected["audio_encoder.whisper.conv1.weight"].abs().max() > 0

    share = []
    for i in range(0, 6, micro_batch):
        share.append(data.load_batch(batch.utterances[i:i + micro_batch]))
    sums, (hidden_s, hidden_t) = distill.backward_of_share(student, teacher, to_teacher, share, 0, args)
    assert sums["tokens"] == len(y) > 10
    assert len(hidden_s) == len(hidden_t)
    assert (len(hidden_s) == len(y)) == (len(share) == 1), "the last micro-batch's"
    assert sums["not_scored"] == mask.sum() - len(y)
    assert sums["loss"].item() == pytest.approx(one_shot.item(), rel=1e-5)
    same_gradients(gradients(student.net), expected)
    assert all(p.grad is None for p in teacher.net.parameters()), "the teacher is frozen"


@pytest.mark.parametrize("case", ["the student's id 0", "the teacher's id 0"])
def test_id_0_is_a_token_like_any_other(student, teacher, batch, case):
    """clamp(min=0) takes care of -1, and must leave 0 alone: in what the teacher reads, and in the
    columns it is scored at."""
    args = options("--temperature 20", chunk=5)  # next to uniform
    pairs = twins(student, teacher)
    allowed = torch.zeros_like(student.blocked)
    allowed[[0, 1, 2, 3, student.eos_id]] = True
    writer = dataclasses.replace(student, blocked=~allowed)
    ids, mask = first_rollouts(writer, batch, args)
    written = ids[mask].tolist()
    if case == "the teacher's id 0":
        often = max(set(written) - {0, student.eos_id}, key=written.count)
        pairs[often], pairs[0] = pairs[0], pairs[often]
        assert pairs[often] == 0
    else:
        assert written.count(0) > 2
        assert pairs[0] == 0
    to_teacher = torch.full((len(student.blocked),), -1)
    for i, j in pairs.items():
        to_teacher[i] = j

    z_s, z_t, y = rows_by_hand(student, teacher, pairs, batch, ids, mask)
    one_shot = distill.token_divergence(z_s, z_t, y).sum()
    one_shot.backward()
    expected = gradients(student.net)
    sums, _ = distill.backward_of_share(writer, teacher, to_teacher, [batch], 0, args)
    assert sums["tokens"] == len(written)
    assert sums["loss"].item() == pytest.approx(one_shot.item(), rel=1e-5)
    same_gradients(gradients(student.net), expected)


@pytest.mark.parametrize("foreign", [False, True], ids=["same tokenizer", "foreign tokenizer"])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_the_papers_flags_are_equation_1(student, teacher, foreign_teacher, batch, foreign, tau):
    """--divergence forward --support union --top_k 32 --temperature 0: value and gradient, from the
    command line down to the rows."""
    args = options(f"--divergence forward --support union --top_k 32 --temperature 0 --tau {tau} --chunk 5")
    teacher = foreign_teacher if foreign else teacher
    ids, mask = first_rollouts(student, batch, args)
    z_s, z_t, _ = rows_by_hand(student, teacher, twins(student, teacher), batch, ids, mask)
    rows_s = z_s.double().tolist()
    rows_t = z_t.double().tolist()
    gradient = torch.zeros_like(z_s)  # d/dz_S of Eq. 1 is tau (p_S - p_T) on U_t
    for n, (s, t) in enumerate(zip(rows_s, rows_t)):
        union = top(dict(enumerate(s)), 32) | top(dict(enumerate(t)), 32)
        p_s = probabilities({v: s[v] for v in union}, tau)
        p_t = probabilities({v: t[v] for v in union}, tau)
        for v in union:
            gradient[n, v] = tau * (p_s[v] - p_t[v])
    z_s.backward(gradient)
    expected = gradients(student.net)

    to_teacher = model.vocabulary_map(student, teacher)
    sums, _ = distill.backward_of_share(student, teacher, to_teacher, [batch], 0, args)
    loss = sums["loss"].item() / sums["tokens"]
    assert loss == pytest.approx(paper_eq_1(rows_s, rows_t, 32, tau), rel=1e-5)
    same_gradients(gradients(student.net), expected)


def test_blocked_ids_get_no_gradient(student, foreign_teacher, batch):
    pairs = twins(student, foreign_teacher)
    hidden_s = torch.randn(6, 32)
    hidden_t = torch.randn(6, 48)
    to_teacher = model.vocabulary_map(student, foreign_teacher)
    y = torch.zeros(6, dtype=torch.long)
    distill.loss_in_chunks(hidden_s, hidden_t, y, student.logits, foreign_teacher.logits, to_teacher,
                           distill.token_divergence, 4)
    # The embeddings' gradient is the head's alone: nothing was carried into the body.
    of_head = gradients(student.net)["lm.model.embed_tokens.weight"]
    blocked = [i for i in range(len(of_head)) if i not in pairs]
    assert len(blocked) > 20
    assert (of_head[blocked] == 0).all()
    assert (of_head[sorted(pairs)].abs().sum(1) > 0).all()


def test_a_student_is_its_own_perfect_teacher(student, batch):
    to_teacher = model.vocabulary_map(student, student)
    sums, _ = distill.backward_of_share(student, student, to_teacher, [batch], 0, options())
    assert abs(sums["loss"].item()) / sums["tokens"] < 1e-6
    assert max(g.abs().max() for g in gradients(student.net).values()) < 1e-3


# ---------------------------------------------------------------------------- the states that are learnt at

def test_up_to_the_first_difference_by_hand():
    ids = torch.tensor([[5, 6, 7, 2], [5, 9, 7, 2], [8, 6, 7, 2], [5, 6, 9, 9]])
    reference = torch.tensor([5, 6, 7, 2]).expand(4, -1)
    expected = [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]]
    assert distill.up_to_first_difference(ids, reference).int().tolist() == expected
    longer = torch.tensor([[5, 6, 7, 2, 0, 0], [5, 6, 7, 8, 9, 2]])
    reference = torch.tensor([[5, 6, 7, 2], [5, 6, 7, 2]])
    expected = [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]]
    assert distill.up_to_first_difference(longer, reference).int().tolist() == expected
    shorter = torch.tensor([[5, 6], [5, 7]])  # cut at --max_new_tokens
    assert distill.up_to_first_difference(shorter, reference).int().tolist() == [[1, 1], [1, 1]]


def test_reference_states_are_the_transcripts(student, batch):
    (_, ids, mask), = distill.roll_out(student, [batch], 0, options("--states reference"))
    expected = [student.tokenizer.encode(u.text) + [student.eos_id] for u in batch.utterances]
    assert [row[valid].tolist() for row, valid in zip(ids, mask)] == expected


@pytest.mark.parametrize("states", ["rollout", "first_error"])
def test_other_states_are_rollouts(student, batch, states):
    """One generate for the whole share: its micro-batches get what each would write alone."""
    args = options(f"--states {states}")
    share = [data.load_batch(batch.utterances[:4]), data.load_batch(batch.utterances[4:])]
    for clips, (_, ids, mask) in zip(share, distill.roll_out(student, share, 0, args), strict=True):
        expected_ids, expected_mask = first_rollouts(student, clips, args)
        assert torch.equal(ids, expected_ids)
        assert torch.equal(mask, expected_mask)


def test_first_error_scores_up_to_the_first_wrong_token(student, teacher, batch):
    """Transcripts that the student writes itself, but for one token: rows are scored up to there,
    that token included."""
    args = options("--states first_error")
    ids, mask = first_rollouts(student, batch, args)
    references = []
    counted = 0
    for b, row in enumerate(ids.tolist()):
        written = row[:int(mask[b].sum())]
        wrong = min(b, len(written) - 1)
        references.append([*written[:wrong], written[wrong] + 1, *written[wrong + 1:]])
        counted += wrong + 1
    writer = dataclasses.replace(student)
    texts = {u.text: row for u, row in zip(batch.utterances, references)}
    writer.encode_text = texts.__getitem__
    to_teacher = model.vocabulary_map(student, teacher)
    sums, _ = distill.backward_of_share(writer, teacher, to_teacher, [batch], 0, args)
    assert sums["tokens"] == counted
    assert sums["tokens"] + sums["not_scored"] == mask.sum()


# ---------------------------------------------------------------------------- SFT: what is trained on

NO_CTC = SimpleNamespace(ctc=0.0)


def test_cross_entropy_is_minus_log_softmax():
    z, _ = random_logits(n=4)
    targets = torch.tensor([3, 0, 10, 3])
    expected = 0.0
    for row, y in zip(z.tolist(), targets.tolist()):
        expected -= math.log(probabilities(dict(enumerate(row)))[y])
    assert sft.cross_entropy_sum(z, targets).item() == pytest.approx(expected, rel=1e-12)


def test_a_clip_alone_equals_the_language_model_run_by_hand(student, batch):
    """No padding, no packing: transformers' own forward over prompt and response; logits[c] predict
    column c + 1.

    Every token of the transcript is a target, and so is the EOS behind it; blocked ids have
    probability 0. """
    def embed(ids):
        return student.body.embed_tokens(torch.tensor([ids]))

    for u in batch.utterances:
        alone = data.load_batch([u])
        response = student.tokenizer.encode(u.text) + [student.eos_id]
        audio, n_audio = student.net.audio_encoder(alone.mel, alone.n_frames)
        before = embed(student.prefix_ids)
        after = embed(student.suffix_ids + response)
        columns = torch.cat([before, audio, after], dim=1)
        n_prompt = columns.shape[1] - len(response)
        assert n_prompt == len(student.prefix_ids) + int(n_audio) + len(student.suffix_ids)
        z = student.net.lm(inputs_embeds=columns).logits[0].masked_fill(student.blocked, -INF)
        expected = sum(-z[n_prompt - 1 + i].log_softmax(-1)[token] for i, token in enumerate(response))
        sums = sft.backward_of_batch(student, None, alone, NO_CTC)
        assert sums["tokens"] == len(response)
        assert sums["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_batch_is_the_sum_of_its_clips(student, batch):
    """Neither the prompts' left padding nor the responses' right padding is trained on or read:
    loss and every gradient agree."""
    assert len({len(student.encode_text(u.text)) for u in batch.utterances}) > 2
    assert len(set(batch.n_frames.tolist())) > 2
    loss = sft.backward_of_batch(student, None, batch, NO_CTC)["loss"].item()
    together = gradients(student.net)
    alone = 0.0
    for u in batch.utterances:
        alone += sft.backward_of_batch(student, None, data.load_batch([u]), NO_CTC)["loss"].item()
    assert loss == pytest.approx(alone, rel=1e-5)
    for name, gradient in gradients(student.net).items():
        atol = 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(together[name], gradient, rtol=1e-3, atol=atol, msg=name)


# ---------------------------------------------------------------------------- CTC

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
    """Five clips over 3 tokens + EOS; one doesn't fit (a repeat needs a blank between), in one
    nothing is said: blanks alone."""
    torch.manual_seed(0)
    eos = 3
    head = nn.Linear(6, 5)  # classes: tokens 0, 1, 2, EOS 3, blank 4
    audio = torch.randn(5, 5, 6, requires_grad=True)
    n_audio = torch.tensor([5, 3, 4, 2, 5])
    responses = [[0, 1, eos], [2, 2, eos], [1, eos], [0, 0, eos], [eos]]
    loss, skipped = sft.ctc_sum(head, audio, n_audio, responses, eos)
    logp = head(audio).double().log_softmax(-1)
    expected = [ctc_by_enumeration(logp[b, :n_audio[b]].tolist(), responses[b][:-1], 4) for b in (0, 1, 2, 4)]
    assert skipped == 1
    assert loss.item() == pytest.approx(sum(expected), rel=1e-5)
    loss.backward()
    grad = audio.grad.abs().sum(-1)  # (B, A)
    heard = [5, 3, 4, 0, 5]  # frames of each row
    for row, n in zip(grad, heard):
        assert (row[:n] > 0).all()
        assert (row[n:] == 0).all()


def test_ctc_of_clips_that_do_not_fit_is_zero_and_counted():
    audio = torch.randn(2, 2, 6, requires_grad=True)
    loss, skipped = sft.ctc_sum(nn.Linear(6, 5), audio, torch.tensor([2, 1]), [[0, 1, 2, 3], [1, 1, 3]], 3)
    loss.backward()  # a loss like any other: the loop does not ask
    assert loss.item() == 0.0
    assert skipped == 2
    assert (audio.grad == 0).all()


# ---------------------------------------------------------------------------- schedule, averaging, optimiser, augmentation

both_scripts = pytest.mark.parametrize("script", [sft, distill])


@both_scripts
def test_learning_rate_warms_up_and_decays_to_zero(script):
    args = SimpleNamespace(lr=2.0, warmup=4, steps=20)
    rates = [script.learning_rate(step, args) for step in range(21)]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates[12] == pytest.approx(1.0)
    assert rates[20] == pytest.approx(0.0)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert min(rates[:20]) > 0
    assert script.learning_rate(0, SimpleNamespace(lr=2.0, warmup=0, steps=1)) == 2.0


@both_scripts
def test_average_gradients_divides_by_the_tokens_of_the_step(script):
    a = nn.Parameter(torch.ones(3))
    b = nn.Parameter(torch.ones(2))  # takes no part
    (a * torch.tensor([2.0, 4.0, 6.0])).sum().backward()
    script.average_gradients([a, b], 4)
    assert a.grad.tolist() == [0.5, 1.0, 1.5]
    assert b.grad.tolist() == [0.0, 0.0]
    script.average_gradients([a], 0)  # a step without a token divides by nothing
    assert a.grad.tolist() == [0.5, 1.0, 1.5]


@both_scripts
def test_every_gradient_is_summed_over_ranks_once(script, monkeypatch):
    """However the gradients are put together for the wire: here a sum over ranks doubles what it is
    given."""
    sizes = [(3,), (2 ** 20 + 5,), (2, 3), *[(2,)] * 130, (4,)]
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    for n, p in enumerate(parameters[:-1]):
        p.grad = torch.full_like(p, n + 1.0)
    monkeypatch.setattr(script.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(script.dist, "all_reduce", lambda tensor: tensor.mul_(2))
    script.average_gradients(parameters, 2)
    for n, p in enumerate(parameters[:-1]):
        assert (p.grad == n + 1).all()
    assert (parameters[-1].grad == 0).all()


@both_scripts
def test_weight_decay_is_for_matrices(script, student):
    parameters = list(student.net.parameters())
    args = SimpleNamespace(lr=1.0, weight_decay=0.3, shard_optimizer=False)
    matrices, vectors = script.make_optimizer(parameters, args).param_groups
    assert matrices["weight_decay"] == 0.3
    assert vectors["weight_decay"] == 0.0
    assert all(p.ndim > 1 for p in matrices["params"])
    assert all(p.ndim <= 1 for p in vectors["params"])
    assert len(matrices["params"]) + len(vectors["params"]) == len(parameters)


def test_spec_augment_repeats_and_leaves_most_of_the_clip(batch):
    u, other = batch.utterances[:2]
    mel = torch.randn(128, 300, generator=torch.Generator().manual_seed(0))
    kept = mel.clone()
    state = torch.get_rng_state()
    first = sft.spec_augment(mel, u, 4, seed=0)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    torch.rand(3)
    assert torch.equal(sft.spec_augment(mel, u, 4, seed=0), first)
    assert torch.equal(mel, kept)
    assert first.shape == mel.shape
    for clip, step, seed in ((u, 5, 0), (u, 4, 1), (other, 4, 0)):
        assert not torch.equal(sft.spec_augment(mel, clip, step, seed), first)
    touched = torch.stack([sft.spec_augment(mel, u, step, 0) != mel for step in range(40)])
    share = touched.float().mean((1, 2))
    assert 0.05 < share.mean() < 0.4
    assert share.max() < 0.5
    for cells in touched:  # bands and stretches: a cell is touched because its row or its column is
        rows = cells.all(1)
        columns = cells.all(0)
        assert torch.equal(cells, rows[:, None] | columns[None])
        assert rows.sum() <= 40
        assert columns.sum() <= 48
