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
from conftest import twins

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


def divergence_of_row(row_s, row_t, divergence, support, top_k, tau, beta=0.5):
    s, t = dict(enumerate(row_s)), dict(enumerate(row_t))
    tokens = {"full": set(s), "student": top(s, top_k), "teacher": top(t, top_k), "union": top(s, top_k) | top(t, top_k)}[support]
    p_s, p_t = (probabilities({v: z[v] for v in sorted(tokens)}, tau) for z in (s, t))
    m = {v: beta * p_t[v] + (1 - beta) * p_s[v] for v in p_s}
    return tau ** 2 * {"reverse": kl(p_s, p_t), "forward": kl(p_t, p_s), "jsd": beta * kl(p_t, m) + (1 - beta) * kl(p_s, m)}[divergence]


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

GRID = [(divergence, support, top_k, tau, blocked)
        for divergence, (support, top_k), tau, blocked in itertools.product(
            ["reverse", "forward", "jsd"], [("full", 1), *itertools.product(["union", "teacher", "student"], [1, 3])],
            [1.0, 2.0], [(), (0, 4, 10)])]


@pytest.mark.parametrize("divergence, support, top_k, tau, blocked", GRID)
def test_divergence_equals_the_formula(divergence, support, top_k, tau, blocked):
    z_s, z_t = random_logits(blocked=blocked)
    for beta in (0.5, 0.2) if divergence == "jsd" else (0.5,):
        ours = distill.token_divergence(z_s, z_t, divergence, support, top_k, tau, beta)
        slow = [divergence_of_row(s, t, divergence, support, top_k, tau, beta) for s, t in zip(z_s.tolist(), z_t.tolist())]
        assert ours.shape == (5,)
        torch.testing.assert_close(ours, torch.tensor(slow, dtype=torch.float64), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("divergence, support, top_k, tau, blocked", GRID)
def test_gradient_equals_finite_differences(divergence, support, top_k, tau, blocked):
    z_s, z_t = random_logits(n=3, seed=1, blocked=blocked)
    free, beta = torch.isfinite(z_s), 0.3

    def loss_of(finite):  # only finite logits can be nudged
        return distill.token_divergence(z_s.masked_scatter(free, finite), z_t, divergence, support, top_k, tau, beta)

    assert torch.autograd.gradcheck(loss_of, z_s[free].clone().requires_grad_(), eps=1e-6, atol=1e-7)
    # ... and the same differences taken on the oracle, so that value and gradient belong to the same formula
    leaf, eps = z_s.clone().requires_grad_(), 1e-5
    distill.token_divergence(leaf, z_t, divergence, support, top_k, tau, beta).sum().backward()
    assert torch.isfinite(leaf.grad).all() and (leaf.grad[~free] == 0).all()
    for n, v in free.nonzero().tolist():
        up, down = z_s[n].tolist(), z_s[n].tolist()
        up[v], down[v] = up[v] + eps, down[v] - eps
        of = lambda row: divergence_of_row(row, z_t[n].tolist(), divergence, support, top_k, tau, beta)
        assert leaf.grad[n, v].item() == pytest.approx((of(up) - of(down)) / (2 * eps), abs=1e-7)


@pytest.mark.parametrize("divergence", ["reverse", "forward", "jsd"])
@pytest.mark.parametrize("support", ["full", "union", "teacher", "student"])
def test_equal_logits_cost_nothing_and_pull_nowhere(divergence, support):
    z, _ = random_logits(blocked=(2,))
    leaf = z.clone().requires_grad_()
    loss = distill.token_divergence(leaf, z + 7.0, divergence, support, 3, tau=2.0)  # logits are defined up to a constant
    loss.sum().backward()
    assert loss.abs().max() < 1e-14 and leaf.grad.abs().max() < 1e-14


@pytest.mark.parametrize("divergence", ["reverse", "forward", "jsd"])
@pytest.mark.parametrize("support", ["union", "teacher", "student"])
@pytest.mark.parametrize("k", [11, 12, 500])
def test_k_of_the_whole_vocabulary_is_the_full_divergence(divergence, support, k):
    z_s, z_t = random_logits(blocked=(3,))
    torch.testing.assert_close(distill.token_divergence(z_s, z_t, divergence, support, k), distill.token_divergence(z_s, z_t, divergence))


def test_jsd_tends_to_forward_and_reverse():
    """GKD: JSD(beta) / beta -> KL(p_T || p_S) for beta -> 0, JSD(beta) / (1 - beta) -> KL(p_S || p_T) for beta -> 1; symmetric at 1/2."""
    z_s, z_t = random_logits(seed=8)
    of = lambda beta: distill.token_divergence(z_s, z_t, "jsd", beta=beta)
    torch.testing.assert_close(of(1e-7) / 1e-7, distill.token_divergence(z_s, z_t, "forward"), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(of(1 - 1e-7) / 1e-7, distill.token_divergence(z_s, z_t, "reverse"), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(of(0.5), distill.token_divergence(z_t, z_s, "jsd"))
    assert (of(0.5) <= math.log(2)).all() and (of(0.5) > 0).all()


@pytest.mark.parametrize("divergence", ["reverse", "forward", "jsd"])
def test_probabilities_that_underflow_are_zero_and_not_nan(divergence):
    """In fp32 exp(-110) is 0, and so would be a mixture of two such; the log-probabilities are finite all the same."""
    z_s, z_t = torch.tensor([[0.0, -110.0, -300.0, 1.0]]), torch.tensor([[1.0, -300.0, -110.0, 0.0]])
    leaf = z_s.clone().requires_grad_()
    d = distill.token_divergence(leaf, z_t, divergence)
    d.sum().backward()
    exact = distill.token_divergence(z_s.double(), z_t.double(), divergence)
    assert torch.isfinite(leaf.grad).all() and d.item() == pytest.approx(exact.item(), rel=1e-5)


# ---------------------------------------------------------------------------- sampled_divergence

@pytest.mark.parametrize("baseline", [False, True])
def test_sampled_divergence_is_reverse_kl_in_the_mean(baseline):
    """Summed over every y with its probability, value and gradient are those of the full reverse KL: exactly, not by sampling."""
    z_s, z_t = random_logits(n=1, seed=9, blocked=(2,))
    p_s, leaf, mean = z_s.softmax(-1)[0], z_s.clone().requires_grad_(), 0.0
    for y in range(11):
        if y != 2:  # a blocked id is never drawn
            d = distill.sampled_divergence(leaf, z_t, torch.tensor([y]), baseline)
            mean = mean + p_s[y] * d
    mean.sum().backward()
    full = z_s.clone().requires_grad_()
    expected = distill.token_divergence(full, z_t)
    expected.sum().backward()
    torch.testing.assert_close(mean.detach(), expected.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(leaf.grad, full.grad, rtol=1e-9, atol=1e-12)


def test_sampled_divergence_of_one_token_by_the_formula():
    """Value log p_S(y) - log p_T(y); gradient (log p_S(y) - log p_T(y) - b) (1[v = y] - p_S(v)), b = 0 or the row's KL."""
    z_s, z_t = random_logits(n=4, seed=10)
    y, p_s = torch.tensor([3, 0, 10, 3]), z_s.softmax(-1)
    gap = torch.stack([z_s[n].log_softmax(-1)[y[n]] - z_t[n].log_softmax(-1)[y[n]] for n in range(4)])
    for baseline in (False, True):
        leaf = z_s.clone().requires_grad_()
        d = distill.sampled_divergence(leaf, z_t, y, baseline)
        d.sum().backward()
        weight = gap - (distill.token_divergence(z_s, z_t) if baseline else 0.0)
        torch.testing.assert_close(d.detach(), gap)
        torch.testing.assert_close(leaf.grad, weight[:, None] * (F.one_hot(y, 11) - p_s), rtol=1e-9, atol=1e-12)


def test_a_baseline_lowers_the_variance():
    """Over many states, with student and teacher well apart; in a single state it may go the other way."""
    total = {False: 0.0, True: 0.0}
    for seed in range(20):
        z_s, z_t = random_logits(n=1, seed=20 + seed)
        p_s = z_s.softmax(-1)[0]
        for baseline in total:
            rows = []
            for y in range(11):
                leaf = z_s.clone().requires_grad_()
                distill.sampled_divergence(leaf, z_t, torch.tensor([y]), baseline).sum().backward()
                rows.append(leaf.grad[0])
            mean = sum(p * g for p, g in zip(p_s, rows))
            total[baseline] += sum(p * ((g - mean) ** 2).sum() for p, g in zip(p_s, rows)).item()
    assert total[True] < 0.8 * total[False]


# ---------------------------------------------------------------------------- the same by hand

def test_direction_by_hand():
    """p_S = (1/2, 1/2), p_T = (3/4, 1/4): KL(S||T) = ln(4/3) / 2 = 0.1438, KL(T||S) = 3/4 ln(3/2) - 1/4 ln 2 = 0.1308."""
    z_s, z_t = torch.tensor([[0.5, 0.5]]).double().log(), torch.tensor([[0.75, 0.25]]).double().log()
    assert distill.token_divergence(z_s, z_t).item() == pytest.approx(0.14384103622589)  # reverse is the default
    assert distill.token_divergence(z_s, z_t, "reverse").item() == pytest.approx(0.14384103622589)
    assert distill.token_divergence(z_s, z_t, "forward").item() == pytest.approx(0.13081203594113697)
    for wrong in ({"divergence": "jeffreys"}, {"divergence": "jsd", "beta": 0.0}, {"divergence": "jsd", "beta": 1.0}, {"support": "tail"}):
        with pytest.raises(ValueError, match=str(wrong.get("beta", wrong.get("support", "jeffreys")))):
            distill.token_divergence(z_s, z_t, **wrong)


def test_a_token_in_both_top_k_sets_is_counted_once():
    """Top-2 sets {0, 1} and {1, 2} share token 1. By hand on {0, 1, 2}: S = (10, 6, 3) / 19, T = (1, 10, 6) / 17."""
    p_s, p_t = torch.tensor([[0.50, 0.30, 0.15, 0.05]]).double(), torch.tensor([[0.05, 0.50, 0.30, 0.15]]).double()
    once = sum(s / 19 * math.log((s / 19) / (t / 17)) for s, t in ((10, 1), (6, 10), (3, 6)))
    twice = sum(s / 25 * math.log((s / 25) / (t / 27)) for s, t in ((10, 1), (6, 10), (6, 10), (3, 6)))
    ours = distill.token_divergence(p_s.log(), p_t.log(), "reverse", "union", 2).item()
    assert ours == pytest.approx(once) and abs(once - twice) > 0.05


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("k", [2, 4])
def test_forward_on_the_union_is_equation_1_of_the_paper(k, tau):
    z_s, z_t = random_logits(n=7, v=23, seed=3, blocked=(0, 22))
    ours = distill.token_divergence(z_s, z_t, "forward", "union", k, tau).mean().item()
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
    distill.token_divergence(leaf, z_t, "forward", "union", 4).sum().backward()
    union = distill.support_of(z_s, z_t, "union", 4)
    assert (leaf.grad[~union] == 0).all() and (leaf.grad[union] != 0).all()


def test_k_1_with_equal_arg_max_is_zero():
    z_s, z_t = random_logits()
    z_s[:, 6] = z_t[:, 6] = 50.0
    assert (distill.token_divergence(z_s, z_t, "forward", "union", 1) == 0).all()


@pytest.mark.parametrize("k", [1, 4, 30, 99])
def test_supports_are_the_sets_they_say(k):
    z_s, z_t = random_logits(n=8, v=30, seed=6)
    found = {support: distill.support_of(z_s, z_t, support, k) for support in ("union", "teacher", "student")}
    for n, (s, t) in enumerate(zip(z_s.tolist(), z_t.tolist())):
        sets = {"teacher": top(dict(enumerate(t)), k), "student": top(dict(enumerate(s)), k)}
        for support, chosen in found.items():
            assert set(chosen[n].nonzero()[:, 0].tolist()) == sets.get(support, sets["teacher"] | sets["student"])
    assert distill.support_of(z_s, z_t, "full", k) is None


# ---------------------------------------------------------------------------- heads in chunks

def options(**changes):
    return SimpleNamespace(**{"divergence": "reverse", "support": "full", "top_k": 4, "tau": 1.0, "beta": 0.5, "baseline": False, "chunk": 256, **changes})


def rollouts(student, batch, n_tokens=9):
    uniforms = data.keyed_uniforms(3, 0, [u.id for u in batch.utterances], n_tokens)
    return model.generate(student, model.encode(student, batch), n_tokens, 1.0, uniforms)


def gradients(asr):
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in asr.net.named_parameters()}
    asr.net.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("changes", [{}, {"divergence": "forward", "support": "union", "tau": 2.0}, {"divergence": "jsd", "beta": 0.2},
                                     {"support": "sampled", "baseline": True}], ids=["reverse full", "forward union", "jsd", "sampled"])
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
    if changes.get("support") == "sampled":
        naive = distill.sampled_divergence(z_s, z_t, torch.tensor([shared.index(i) for i in ids[scored].tolist()]), True).sum()
    else:
        o = options(**changes)
        naive = distill.token_divergence(z_s, z_t, o.divergence, o.support, o.top_k, o.tau, o.beta).sum()
    naive.backward()
    expected = gradients(student)
    assert expected["lm.model.embed_tokens.weight"].abs().max() > 0 and expected["audio_encoder.whisper.conv1.weight"].abs().max() > 0
    for chunk in (1, 3, 1000):
        sums = distill.distil_backward(student, hidden_s(), teacher, hidden_t, ids[scored], to_teacher, options(chunk=chunk, **changes))
        assert float(sums["loss"]) == pytest.approx(naive.item(), rel=1e-5)
        assert int(sums["top1"]) == int((z_s.argmax(-1) == z_t.argmax(-1)).sum())
        logp = z_s.detach().log_softmax(-1)
        assert float(sums["entropy"]) == pytest.approx(-(logp.exp() * logp).sum().item(), rel=1e-4)
        for name, gradient in gradients(student).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * float(expected[name].abs().max()) + 1e-8, msg=lambda text: f"{name}: {text}")
    assert all(p.grad is None for p in teacher.net.parameters()), "the teacher is frozen"


@pytest.mark.parametrize("foreign", [False, True], ids=["same tokenizer", "foreign tokenizer"])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_the_papers_flags_are_equation_1(student, teacher, foreign_teacher, batch, foreign, tau):
    """--divergence forward --support union --top_k 32 --temperature 0, from the command line down to the rows: value and gradient."""
    args = distill.parse_args(f"--divergence forward --support union --top_k 32 --temperature 0 --tau {tau} --chunk 5".split())
    teacher = foreign_teacher if foreign else teacher
    pairs, to_teacher = twins(student, teacher), model.vocabulary_map(student, teacher)
    ids, mask = model.generate(student, model.encode(student, batch), 24, args.temperature)
    if foreign:  # greedy rollouts soon hold an id without a twin there, and nothing behind it counts: transcripts instead
        responses = [student.encode_text(u.text) for u in batch.utterances]
        ids, mask = sft.pad_responses([[i for i in row if i in pairs] for row in responses], student.pad_id, "cpu")
    scored = mask & torch.tensor([[i in pairs for i in row] for row in ids.tolist()]).cumprod(1).bool()
    y = ids[scored]
    assert student.eos_id in y.tolist() and len(y) > 40
    theirs = torch.tensor([[pairs.get(i, 0) for i in row] for row in ids.tolist()])
    with torch.no_grad():
        hidden_t = model.response_hidden(teacher, model.encode(teacher, batch), theirs, scored)
        hidden_s = model.response_hidden(student, model.encode(student, batch), ids, mask)[scored[mask]].requires_grad_()
        z_s = hidden_s.double() @ student.head.weight.double().T
        z_t = hidden_t.double() @ teacher.head.weight.double().T
    shared = sorted(pairs)
    rows_s, rows_t = z_s[:, shared].tolist(), torch.stack([z_t[:, pairs[i]] for i in shared], 1).tolist()
    sums = distill.distil_backward(student, hidden_s, teacher, hidden_t, y, to_teacher, args)
    assert float(sums["loss"]) / len(y) == pytest.approx(paper_eq_1(rows_s, rows_t, 32, tau), rel=1e-5)
    gradient = torch.zeros_like(z_s)  # d/dz_S of Eq. 1 is tau (p_S - p_T) on U_t
    for n, (s, t) in enumerate(zip(rows_s, rows_t)):
        union = top(dict(enumerate(s)), 32) | top(dict(enumerate(t)), 32)
        p_s, p_t = (probabilities({v: z[v] for v in union}, tau) for z in (s, t))
        for v in union:
            gradient[n, shared[v]] = tau * (p_s[v] - p_t[v])
    expected = gradient @ student.head.weight.double()
    torch.testing.assert_close(hidden_s.grad.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_blocked_ids_get_no_gradient_from_the_loss(student, foreign_teacher):
    to_teacher, generator = model.vocabulary_map(student, foreign_teacher), torch.Generator().manual_seed(0)
    rows = torch.randn(6, 32, generator=generator).requires_grad_()
    distill.distil_backward(student, rows, foreign_teacher, torch.randn(6, 48, generator=generator), None, to_teacher, options(chunk=4))
    of_head = gradients(student)["lm.model.embed_tokens.weight"]  # the head's weight: `rows` did not come from the body
    pairs = twins(student, foreign_teacher)
    blocked = [i for i in range(len(of_head)) if i not in pairs]
    assert len(blocked) > 20 and (of_head[blocked] == 0).all() and (of_head[sorted(pairs)].abs().sum(1) > 0).all()


def test_no_scored_token_is_no_gradient_and_no_error(student, foreign_teacher):
    """Every id of a micro-batch may lack a twin; then there is nothing to learn from it, and nothing to stop for."""
    to_teacher = model.vocabulary_map(student, foreign_teacher)
    hidden_s = (student.body.embed_tokens.weight * 1.0)[:0]  # (0, D), with a graph
    sums = distill.distil_backward(student, hidden_s, foreign_teacher, torch.zeros(0, 48), None, to_teacher, options())
    assert float(sums["loss"]) == 0.0 and all((g == 0).all() for g in gradients(student).values())


def test_a_student_is_its_own_perfect_teacher(student, batch):
    ids, mask = rollouts(student, batch)
    with torch.no_grad():
        hidden_t = model.response_hidden(student, model.encode(student, batch), ids, mask)
    hidden_s = model.response_hidden(student, model.encode(student, batch), ids, mask)
    sums = distill.distil_backward(student, hidden_s, student, hidden_t, ids[mask], model.vocabulary_map(student, student), options())
    assert abs(float(sums["loss"])) / int(mask.sum()) < 1e-6 and int(sums["top1"]) == int(mask.sum())
    assert max(g.abs().max() for g in gradients(student).values()) < 1e-3


# ---------------------------------------------------------------------------- what distill.py logs beside the loss

def brute_force(z_s, z_t, k):
    """One state, with Python sets."""
    s, t = dict(enumerate(z_s)), dict(enumerate(z_t))
    valid = {v for v in s if s[v] > -INF and t[v] > -INF}
    in_s = top({v: s[v] for v in valid}, k)
    in_t = top({v: t[v] for v in valid}, k)
    p_s, p_t, k = probabilities(s), probabilities(t), min(k, len(s))
    return {"overlap": len(in_s & in_t) / k, "top1": float(max(s, key=s.get) == max(t, key=t.get)),
            "mass_s": sum(p_s[v] for v in in_s & in_t), "mass_t": sum(p_t[v] for v in in_s & in_t)}


@pytest.mark.parametrize("k", [1, 4, 40])
def test_agreement_equals_sets(k):
    z_s, z_t = random_logits(n=9, v=20, seed=7, blocked=(0, 1, 19))
    found, expected = distill.agreement(z_s, z_t, k), [brute_force(s, t, k) for s, t in zip(z_s.tolist(), z_t.tolist())]
    for name in ("top1", "overlap", "mass_s", "mass_t"):
        assert found[name].item() == pytest.approx(sum(row[name] for row in expected), rel=1e-6), name
    entropy = lambda z: sum(-p * math.log(p) for row in z.tolist() for p in probabilities(dict(enumerate(row))).values() if p > 0)
    assert found["entropy"].item() == pytest.approx(entropy(z_s)) and found["entropy_t"].item() == pytest.approx(entropy(z_t))


def test_repeats_finds_n_grams_of_emitted_tokens():
    rows = [[1, 2, 3, 9, 1, 2, 3], [1, 2, 3, 4, 5, 6, 7], [5, 5, 5, 5, 0, 0, 0], [5, 5, 5, 0, 0, 0, 0], [1, 2, 3, 1, 2, 3, 8], [1, 2, 3, 1, 2, 3, 8]]
    lengths = [7, 7, 4, 3, 7, 5]  # what lies past a row's length is padding, and padding repeats nothing
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    assert distill.repeats(torch.tensor(rows), mask).tolist() == [True, False, True, False, True, False]
    assert distill.repeats(torch.tensor(rows)[:, :2], mask[:, :2]).tolist() == [False] * 6


def test_worst_tenth_is_the_largest_tenth_of_the_divergence(student, teacher, batch):
    ids, mask = rollouts(student, batch)
    with torch.no_grad():
        hidden_s, hidden_t = (model.response_hidden(asr, model.encode(asr, batch), ids, mask) for asr in (student, teacher))
        d = distill.token_divergence(*(asr.head(h).masked_fill(student.blocked, -INF) for asr, h in ((student, hidden_s), (teacher, hidden_t))))
    sums = distill.distil_backward(student, hidden_s.requires_grad_() * 1, teacher, hidden_t, ids[mask], model.vocabulary_map(student, teacher), options(chunk=7))
    student.net.zero_grad(set_to_none=True)
    assert float(sums["worst"]) == pytest.approx(sum(sorted(d.tolist())[-math.ceil(len(d) / 10):]), rel=1e-4)


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
