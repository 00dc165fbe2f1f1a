"""overlap.py: each statistic against Python sets and float loops, a batch, the command, --check.

    pytest tests/test_overlap.py
"""

import inspect
import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import model
import overlap
from conftest import twins
from test_evaluate import run_on_two

INF = math.inf


# --------------------------------------------------- oracle: floats, loops and sets, no tensors

def probabilities(scores):
    top = max(scores.values())
    weights = {v: math.exp(z - top) for v, z in scores.items()}
    return {v: w / sum(weights.values()) for v, w in weights.items()}


def kl(p, q):
    return sum(p[v] * math.log(p[v] / q[v]) for v in p)


def best(scores, k):
    finite = [v for v in scores if scores[v] > -INF]
    return set(sorted(finite, key=lambda v: -scores[v])[:k])


def brute_force(s, t, k, written):
    """One state, {token: logit} on each side: section 4.3 sentence by sentence."""
    valid = {v for v in s if s[v] > -INF} & {v for v in t if t[v] > -INF}
    # "merging teacher and student top-k candidate sets and filtering invalid token mappings"
    retained = {v for v in best(s, k) | best(t, k) if v in valid}
    shared = {v for v in best(s, k) if v in best(t, k) and v in valid}
    p_s, p_t = (probabilities({v: z[v] for v in valid}) for z in (s, t))
    u_s, u_t = (probabilities({v: z[v] for v in retained}) if retained else {} for z in (s, t))
    return {
        "vuss": len(retained), "overlap": len(shared) / min(k, len(s)),
        "mass_s": sum(p_s[v] for v in shared), "mass_t": sum(p_t[v] for v in shared),
        "union_kl_reverse": kl(u_s, u_t), "union_kl_forward": kl(u_t, u_s),
        "top1": float(best(s, 1) == best(t, 1) and best(s, 1) <= valid),
        "entropy_s": -sum(p * math.log(p) for p in p_s.values()),
        "entropy_t": -sum(p * math.log(p) for p in p_t.values()),
        "kl_reverse": kl(p_s, p_t), "kl_forward": kl(p_t, p_s),
        "rank": 1 + sum(t[v] > t[written] for v in valid), "logp_t": math.log(p_t[written])}


def random_logits(n, v, out_s=(), out_t=()):
    """z_s, z_t (n, v) float64, correlated; -inf in the columns out_s and out_t."""
    generator = torch.Generator().manual_seed(v)
    z_s, other = 3 * torch.randn(2, n, v, generator=generator, dtype=torch.float64)
    z_t = 0.6 * z_s + 0.8 * other
    z_s[:, list(out_s)] = -INF
    z_t[:, list(out_t)] = -INF
    return z_s, z_t


def everywhere(z):
    return torch.ones(len(z), dtype=torch.bool)


@pytest.mark.parametrize("v", [6, 40, 90])
@pytest.mark.parametrize("out_s, out_t", [((), ()), ((0, 1, 5), (0, 1, 5)), ((0, 3), (1, 3, 4))])
def test_every_statistic_at_every_k_equals_sets_and_copies_out_alone(v, out_s, out_t):
    z_s, z_t = random_logits(12, v, out_s, out_t)
    alone = {"torch": torch}
    exec(inspect.getsource(overlap.overlap_stats), alone)
    stats = alone["overlap_stats"](
        z_s, z_t, everywhere(z_s), 5, torch.full((12,), 2), overlap.KS)
    assert set(stats) == set(overlap.COLUMNS)
    for n in range(12):
        s, t = dict(enumerate(z_s[n].tolist())), dict(enumerate(z_t[n].tolist()))
        for k, at in [(5, ""), *((k, f"@{k}") for k in overlap.KS)]:
            for name, value in brute_force(s, t, k, 2).items():
                if name in overlap.OF_K or not at:
                    found = stats[name + at][n].item()
                    assert found == pytest.approx(value, rel=1e-9, abs=1e-12), (name, k)


def test_rank_counts_strictly_larger_logits():
    z_t = torch.tensor([[2., 2., 7., 2., 1.]] * 5)
    stats = overlap.overlap_stats(torch.zeros(5, 5), z_t, everywhere(z_t), 1, torch.arange(5))
    assert stats["rank"].tolist() == [2, 2, 1, 2, 5]


def test_only_the_masked_in_states_count():
    z_s, z_t = random_logits(6, 12)
    mask, y = torch.tensor([[True, False, True], [False, False, True]]), torch.arange(6)
    stats = overlap.overlap_stats(z_s.view(2, 3, 12), z_t.view(2, 3, 12), mask, 3, y.view(2, 3))
    kept = [0, 2, 5]
    alone = overlap.overlap_stats(z_s[kept], z_t[kept], everywhere(z_s[kept]), 3, y[kept])
    assert "rank" in stats and all(torch.equal(stats[name], alone[name]) for name in stats)


# ---------------------------------------------------------------------------------------- a batch

def measured(student, teacher, to_teacher, batch, texts=None, **changes):
    args = {"seed": 0, "max_new_tokens": 9, "temperature": 1.0, "chunk": 7, "top_k": 5} | changes
    args = SimpleNamespace(**args)
    return overlap.measure_batch(student, teacher, to_teacher, batch, texts, args)


def column(name):
    return overlap.COLUMNS.index(name)


def logits_of(asr, utterance, ids):
    """Logits before each of the ids, of a clip alone."""
    prompt = model.encode_audio(asr, data.load_batch([utterance], (asr.n_mels,)))
    ids = torch.tensor([ids])
    every = torch.ones_like(ids, dtype=torch.bool)
    hidden = model.response_hidden(asr.body, prompt.embeds, prompt.mask, ids, every)
    return model.logits(hidden, asr.head.weight).detach()


def test_a_foreign_teachers_sets_are_of_its_own_vocabulary(student, foreign_teacher, batch):
    """In chunks over a padded batch = brute force, state by state, on each clip alone. A token that
    only one side has takes its place in that side's top k, and is dropped."""
    pairs = twins(student, foreign_teacher)
    back = {j: i for i, j in pairs.items()}
    to_teacher = model.vocabulary_map(student, foreign_teacher)
    clips = measured(student, foreign_teacher, to_teacher, batch, max_new_tokens=4)
    whole = dropped = 0
    for u, (values, not_scored) in zip(batch.utterances, clips, strict=True):
        prompt = model.encode_audio(student, data.load_batch([u]))
        uniforms = data.keyed_uniforms(0, 0, [u.id], 4)
        ids, mask = model.roll_out(student, prompt, 4, 1.0, uniforms)
        ids = ids[mask].tolist()
        n = next((t for t, i in enumerate(ids) if i not in pairs), len(ids))
        assert (len(values), not_scored) == (n, len(ids) - n)
        whole += n == len(ids)
        if n == 0:
            continue
        of_student = logits_of(student, u, ids[:n]).tolist()
        of_teacher = logits_of(foreign_teacher, u, [pairs[i] for i in ids[:n]]).tolist()
        for row, z_s, z_t, y in zip(values.tolist(), of_student, of_teacher, ids):
            s = {i: z for i, z in enumerate(z_s) if not student.blocked[i]}
            t = {back.get(j, f"theirs {j}"): z for j, z in enumerate(z_t)
                 if not foreign_teacher.blocked[j]}
            s, t = ({v: z.get(v, -INF) for v in s.keys() | t.keys()} for z in (s, t))
            for k, at in [(5, ""), *((k, f"@{k}") for k in overlap.KS)]:
                expected = brute_force(s, t, k, y)
                dropped += expected["vuss"] < 2 * k - k * expected["overlap"]
                found = {name: row[column(name + at * (name in overlap.OF_K))] for name in expected}
                assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert 1 < whole < len(batch) and dropped > 10, "clips with and without a hole, dropped tokens"


def test_reference_states_are_those_of_the_transcript(student, teacher, batch):
    texts = [u.text for u in batch.utterances]
    to_teacher = model.vocabulary_map(student, teacher)  # one vocabulary: each id is itself
    clips = measured(student, teacher, to_teacher, batch, texts)
    for u, text, (values, not_scored) in zip(batch.utterances, texts, clips):
        ids = student.encode_text(text)
        z_t = logits_of(teacher, u, ids).masked_fill(teacher.blocked, -INF)
        ranks = [1 + int((z > z[i]).sum()) for z, i in zip(z_t, ids)]
        assert values[:, column("rank")].tolist() == ranks and not_scored == 0


def test_what_is_not_finite_is_an_error_that_names_the_clips(student, teacher, batch, monkeypatch):
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden, weight: logits(hidden, weight) * (
        math.nan if weight is teacher.head.weight else 1.0))
    with pytest.raises(FloatingPointError, match=batch.utterances[3].id):
        measured(student, teacher, model.vocabulary_map(student, teacher), batch)


# ------------------------------------------------------------------------------- means, intervals

def clip_of(*rows, rest=0):
    """A clip whose statistics have one value a state."""
    values = np.array(rows, dtype=np.float32).reshape(-1, 1)
    return values.repeat(len(overlap.COLUMNS), 1), rest


def test_means_by_hand():
    """Three clips, 24 states: means over states, not over clips; bins hold the states in them."""
    clips = [clip_of(1, 4), clip_of(*[7] * 20, 2, 3), clip_of(rest=2)]
    (s,), difference = overlap.summarize([("A", clips, 9)], [[0, 2], [1]])
    assert (s["student"], s["clips"], s["states"], s["states_not_scored"], s["shared_ids"]) == (
        "A", 3, 24, 2, 9)
    assert difference == {} and s["vuss_histogram"] == {1: 1, 2: 1, 3: 1, 4: 1, 7: 20}
    for entry in (s["vuss"], s["kl_forward"], s["by_k"]["8"]["mass_s"], s["by_k"]["32"]["vuss"]):
        assert entry["mean"] == pytest.approx(150 / 24)
        over = [entry[f"batch_{name}"] for name in ("min", "mean", "max")]
        assert over == pytest.approx([2.5, (2.5 + 145 / 22) / 2, 145 / 22])
    assert list(s["by_token"]) == [str(t) for t in range(20)] + ["20 and later"]
    bins = [s["by_token"][t] for t in ("0", "1", "2", "19", "20 and later")]
    assert [(b["rank"]["mean"], b["states"], b["clips"]) for b in bins] == [(4, 2, 2), (5.5, 2, 2), (7, 1, 1), (7, 1, 1), (2.5, 2, 1)]
    assert set(s["by_token"]["3"]) == {*overlap.STATISTICS, "states", "clips"}
    assert math.isnan(s["by_token"]["2"]["rank"]["low"]), "a third of the draws have no such state"


def test_intervals_are_the_bootstraps_and_differences_are_paired():
    rng = np.random.default_rng(0)
    students = {}
    for name, shift in (("A", 0.0), ("B", 1.0), ("C", 5.0)):
        students[name] = [clip_of(*rng.normal(i % 5 + shift, 0.1, size=3)) for i in range(40)]
    measured = [(name, clips, 9) for name, clips in students.items()]
    (a, b, c), difference = overlap.summarize(measured, [range(40)])
    sums = np.array([[values[:, 0].sum() for values, _ in clips] for clips in students.values()]).T
    draws = data.bootstrap(sums, np.full((40, 3), 3))
    for i, s in enumerate((a, b, c)):
        assert (s["rank"]["low"], s["rank"]["high"]) == pytest.approx(data.interval(draws[:, i]))
    assert list(difference) == ["B", "C"]
    gain = difference["C"]["by_k"]["8"]["vuss"]
    assert (gain["low"], gain["high"]) == pytest.approx(data.interval(draws[:, 2] - draws[:, 0]))
    assert gain["mean"] == pytest.approx(c["vuss"]["mean"] - a["vuss"]["mean"])
    assert gain["high"] - gain["low"] < 0.2 * (a["vuss"]["high"] - a["vuss"]["low"])
    assert set(gain) == {"mean", "low", "high"} and "states" not in difference["C"]["by_token"]["0"]


# ------------------------------------------------------------------------------------ the command

@pytest.fixture(scope="module")
def folder(tmp_path_factory, checkpoints, corpus):
    """The checkpoints, and 11 clips, one without a text."""
    path = tmp_path_factory.mktemp("overlap")
    for name in ("student", "teacher", "foreign"):
        (path / name).symlink_to(checkpoints / name)
    rows = [json.loads(line) for line in (corpus / "train.jsonl").read_text().splitlines()[:11]]
    del rows[4]["text"]
    data.write_jsonl(path / "set.jsonl", [r | {"audio": str(corpus / r["audio"])} for r in rows])
    return path


def flags(folder, out, *more):
    line = ["--student", folder / "student", "--teacher", folder / "teacher", "--data",
            folder / "set.jsonl", "--out", folder / out, "--batch", 4, "--max_new_tokens", 8,
            "--top_k", 4, "--device", "cpu", *more]
    return overlap.parse_args(list(map(str, line)))


def run(folder, out, *more):
    overlap.main(flags(folder, out, *more))
    return json.loads((folder / out / "overlap.json").read_text())


def test_what_is_written(folder, student, teacher, capsys):
    """Means over the batches of the training plan, against measure_batch on each; the last, smaller
    one is not among them."""
    result = run(folder, "one")
    assert {key: result[key] for key in result if key != "students"} == {
        "teacher": str(folder / "teacher"), "data": [str(folder / "set.jsonl")], "k": 4,
        "states_of": "rollout", "seed": 0, "temperature": 1.0, "batch": 4, "batches": 2}
    s, = result["students"]
    utterances, plan = data.read_manifest(folder / "set.jsonl"), data.Plan(11, 4, 0)
    to_teacher, means, total = model.vocabulary_map(student, teacher), [], 0.0
    for step in range(3):
        batch = data.load_batch([utterances[i] for i in plan[step]])
        clips = measured(student, teacher, to_teacher, batch, max_new_tokens=8, top_k=4)
        values = np.concatenate([values for values, _ in clips])[:, column("vuss")]
        means.append(values.mean())
        total += values.sum()
    assert (s["vuss"]["batch_min"], s["vuss"]["batch_max"]) == pytest.approx(
        (min(means[:2]), max(means[:2])))
    assert s["vuss"]["mean"] == pytest.approx(total / s["states"])
    assert s["by_token"]["0"]["states"] == s["clips"] == 11
    assert s["shared_ids"] == int((to_teacher >= 0).sum())
    assert (folder / "one" / "overlap.png").stat().st_size > 5000
    assert f"{s['vuss']['mean']:.3f} [{s['vuss']['low']:.3f}" in capsys.readouterr().out


def test_students_side_by_side_on_two_processes_are_what_each_is_alone_on_one(folder):
    """Three batches, a foreign teacher, which as a student agrees with itself everywhere."""
    theirs = ["--teacher", folder / "foreign"]
    both = ["--student", folder / "student", folder / "foreign"]
    run_on_two(overlap.main, flags(folder, "two", *theirs, *both))
    two = json.loads((folder / "two" / "overlap.json").read_text())
    first = run(folder, "first", *theirs)
    second = run(folder, "second", *theirs, "--student", folder / "foreign")
    assert two["students"] == first["students"] + second["students"]
    assert first["students"][0]["states_not_scored"] > 0 and "difference" not in first
    difference = two["difference"][str(folder / "foreign")]
    vuss = first["students"][0]["vuss"]
    assert difference["vuss"]["mean"] == pytest.approx(4 - vuss["mean"])
    assert difference["vuss"]["high"] == pytest.approx(4 - vuss["low"])  # its own is always 4
    assert abs(second["students"][0]["kl_reverse"]["mean"]) < 1e-5


def test_reference_states_want_text(folder, corpus):
    with pytest.raises(ValueError, match="text.*set.jsonl:5"):
        run(folder, "reference", "--states", "reference")
    result = run(folder, "reference", "--states", "reference", "--data", corpus / "dev.jsonl")
    assert result["states_of"] == "reference" and result["students"][0]["clips"] == 6


def test_a_rollout_that_nothing_can_be_scored_of_is_an_error(folder, monkeypatch):
    monkeypatch.setattr(model, "vocabulary_map", lambda student, teacher: -torch.ones(384).long())
    with pytest.raises(ValueError, match="no state of .*student could be scored"):
        run(folder, "none")


@pytest.mark.parametrize("line, message", [
    ("", "--out is needed"), ("--out o --clips 5", "--clips is not read without --check"),
    ("--check --out o", "--out is not read by --check"), ("--check --student a b", "--student"),
    ("--check --states reference", "--states is not read"), ("--out o --student a a", "--student"),
    ("--out o --top_k 0", "--top_k")])
def test_flags_that_do_not_go_together(line, message, capsys):
    with pytest.raises(SystemExit):
        overlap.parse_args(["--student", "s", "--teacher", "t", "--data", "d", *line.split()])
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- --check

def check(folder, *more):
    """Run --check -> what it stopped with, or None."""
    line = ["--check", "--student", folder / "student", "--teacher", folder / "teacher", "--data",
            folder / "set.jsonl", "--device", "cpu", "--batch", 4, "--max_new_tokens", 10, *more]
    try:
        overlap.main(overlap.parse_args(list(map(str, line))))
    except SystemExit as error:
        return str(error)


def value_of(table, row):
    """The number in a row of the printed table."""
    return float(re.search(rf"^{re.escape(row)}\s+(-?[\d.e+-]+)", table, re.MULTILINE)[1])


def mean_logp(asr, clips):
    """Mean log-probability per token of texts at clips, each alone. clips: (utterance, text)."""
    total, n = 0.0, 0
    for u, text in clips:
        ids = asr.encode_text(text)
        z = logits_of(asr, u, ids).masked_fill(asr.blocked, -INF)
        total += z.double().log_softmax(-1)[torch.arange(len(ids)), ids].sum().item()
        n += len(ids)
    return total / n


def test_check_stops_a_teacher_that_does_not_know_the_audio(folder, student, teacher, capsys):
    """The clip without a text is left out, and one of each two with the same."""
    shutil.copy(folder / "set.jsonl", folder / "again.jsonl")
    stopped = check(folder, "--data", folder / "set.jsonl", folder / "again.jsonl")
    table = capsys.readouterr().out
    assert "do not fit" in stopped and "references" in stopped
    told = [u for u in data.read_manifest(folder / "set.jsonl") if u.text]
    assert value_of(table, "clips") == len(told) == 10 and "rejected 0" in table
    others = overlap.exchange_texts(told)
    assert sorted(others.values()) == sorted(u.text for u in told)
    assert all(others[u.line] != u.text for u in told)
    reference = mean_logp(teacher, [(u, u.text) for u in told])
    other = mean_logp(teacher, [(u, others[u.line]) for u in told])
    assert value_of(table, "log p_T of references") == pytest.approx(reference, abs=1e-3)
    assert value_of(table, "log p_T of other clips' references") == pytest.approx(other, abs=1e-3)
    assert abs(value_of(table, "KL(student || student)")) < 1e-6
    batch = data.load_batch(told)
    to_teacher = model.vocabulary_map(student, teacher)
    clips = measured(student, teacher, to_teacher, batch, max_new_tokens=10)
    values = np.concatenate([values for values, _ in clips])
    assert value_of(table, "KL(student || teacher)") == pytest.approx(
        values[:, column("kl_reverse")].mean(), abs=1e-3)
    assert value_of(table, "same first choice") == pytest.approx(
        100 * values[:, column("top1")].mean(), abs=0.1)
    for asr, name in ((student, "student"), (teacher, "teacher")):
        counts = [data.edit_counts(u.text, result["hyp"], u.language) for u, result in
                  zip(batch.utterances, model.transcribe(asr, batch, 10))]
        rate = 100 * sum(c.errors for c in counts) / sum(c.units for c in counts)
        assert f"{name} {rate:.2f} %" in table
    assert "'ease transcribe this audio.<|assistant|>'" in table


def test_check_of_a_student_as_its_own_teacher(folder, corpus, tmp_path, capsys):
    """Without transcripts."""
    rows = [{"id": f"u{i}", "audio": str(corpus / f"dev-{i}.wav")} for i in range(6)]
    rows[2]["audio"] = "missing.wav"
    data.write_jsonl(tmp_path / "m.jsonl", rows)
    itself = ["--teacher", folder / "student", "--data", tmp_path / "m.jsonl"]
    assert check(folder, *itself) is None
    table = capsys.readouterr().out
    assert "without transcripts nothing shows that they fit" in table and "errors" not in table
    assert abs(value_of(table, "KL(student || teacher)")) < 1e-3
    assert value_of(table, "clips") == 5 and "rejected 1" in table
    assert check(folder, *itself, "--clips", 2) is None
    assert value_of(capsys.readouterr().out, "clips") <= 2
    data.write_jsonl(tmp_path / "m.jsonl", rows[2:3])
    with pytest.raises(ValueError, match="none of 1 clips is usable: .*missing.wav"):
        check(folder, *itself)


WORSE, MIXED = np.array([[5, 1]] * 30), np.array([[2, 1], [1, 2]] * 15)  # errors of the two


@pytest.mark.parametrize("change, fits, said", [
    ({}, True, "something to learn: the teacher makes 40.0 to 40.0 points fewer"),
    ({"kl_itself": 2e-6}, False, "differ by 2.00e-06"), ({"kl_itself": math.nan}, False, "differ"),
    ({"logp_other": -2.0}, True, "something to learn"), ({"logp_other": -1.9}, False, "references"),
    ({"logp": math.nan}, False, "references"), ({"kl": math.nan}, False, "counterpart"),
    ({"kl": 0.009}, True, "next to nothing"), ({"kl": 0.011}, True, "something"),
    ({"errors": MIXED}, True, "may be no better"), ({"units": []}, True, "nothing shows")])
def test_verdicts(change, fits, said):
    case = {"kl_itself": 1e-7, "limit": 1e-6, "logp": -1.0, "logp_other": -9.0, "kl": 0.5,
            "errors": WORSE, "units": np.full(30, 10)} | change
    verdict = overlap.verdict(**case)
    assert verdict[0] is fits and said in verdict[1]
