"""overlap.py: each statistic against Python sets and float loops, a batch, the command, --check."""

import itertools
import json
import math
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import model
import overlap
from conftest import copied_out, rollout, twins
from test_evaluate import run_on_two

INF = math.inf


def probabilities(scores):  # the oracle: floats, loops and sets, no tensors
    weights = {v: math.exp(z) for v, z in scores.items()}
    return {v: w / sum(weights.values()) for v, w in weights.items()}


def kl(p, q):
    return sum(p[v] * math.log(p[v] / q[v]) for v in p)


def best(scores, k):
    return {v for v in sorted(scores, key=lambda v: -scores[v])[:k] if scores[v] > -INF}


def brute_force(s, t, k, written):
    """One state, {token: logit} on each side: section 4.3 sentence by sentence."""
    valid = {v for v in s if s[v] > -INF} & {v for v in t if t[v] > -INF}
    retained = (best(s, k) | best(t, k)) & valid
    shared = best(s, k) & best(t, k) & valid
    p_s, p_t = (probabilities({v: z[v] for v in valid}) for z in (s, t))
    return {
        "vuss": len(retained), "overlap": len(shared) / min(k, len(s)),
        "top1": float(best(s, 1) == best(t, 1) and best(s, 1) <= valid),
        "logp_t": math.log(p_t[written]), "kl_reverse": kl(p_s, p_t), "kl_forward": kl(p_t, p_s)}


@pytest.mark.parametrize("k", [1, 5, 32])
@pytest.mark.parametrize("v", [6, 40, 90])
@pytest.mark.parametrize("out_s, out_t", [((), ()), ((0, 1, 5), (0, 1, 5)), ((0, 3), (1, 3, 4))])
def test_every_statistic_equals_sets_and_copies_out_alone(k, v, out_s, out_t):
    """At every state that is masked in. Correlated logits, -inf in the columns out_s and out_t."""
    z_s, other = 3 * torch.randn(2, 3, 4, v, generator=torch.Generator().manual_seed(v)).double()
    z_t = 0.6 * z_s + 0.8 * other
    z_s[..., list(out_s)] = -INF
    z_t[..., list(out_t)] = -INF
    mask = torch.rand(3, 4, generator=torch.Generator().manual_seed(v)) < 0.7
    overlap_stats = copied_out(overlap.overlap_stats).overlap_stats
    stats = overlap_stats(z_s, z_t, mask, k, torch.full((3, 4), 2))
    for n, (row_s, row_t) in enumerate(zip(z_s[mask].tolist(), z_t[mask].tolist(), strict=True)):
        expected = brute_force(dict(enumerate(row_s)), dict(enumerate(row_t)), k, 2)
        found = {name: values[n].item() for name, values in stats.items()}
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert stats.keys() - overlap_stats(z_s, z_t, mask, k).keys() == {"logp_t"}


def measured(student, teacher, batch, **changes):
    args = {"seed": 0, "max_new_tokens": 8, "temperature": 1.0, "chunk": 7, "top_k": 4} | changes
    to_teacher = model.vocabulary_map(student, teacher)
    tables = overlap.measure_batch(
        student, teacher, to_teacher, batch, SimpleNamespace(**args), "rollout")
    return [tables[u.line] for u in batch.utterances]


def means_of(tables):
    """{statistic: its mean over states}."""
    return dict(zip(overlap.STATISTICS, torch.cat(tables).mean(0).tolist(), strict=True))


def logits_of(asr, utterance, ids):
    """Logits before each of the ids, of a clip alone."""
    prompt = model.encode_audio(asr, data.load_batch([utterance], (asr.n_mels,)))
    ids = torch.tensor([ids])
    hidden = model.response_hidden(asr.body, prompt.embeds, prompt.mask, ids, ids >= 0)
    return model.logits(hidden, asr.head.weight).detach()


def logp_of(asr, utterance, text):
    """Log-probabilities of a text's tokens, (n,) float64."""
    ids = asr.encode_text(text)
    z = logits_of(asr, utterance, ids).masked_fill(asr.blocked, -INF)
    return z.double().log_softmax(-1)[torch.arange(len(ids)), ids]


def test_a_foreign_teachers_sets_are_of_its_own_vocabulary(student, foreign_teacher, batch):
    """In chunks over a padded batch = brute force, state by state, on each clip alone. A token that
    only one side has takes its place in that side's top k, and is dropped."""
    pairs = twins(student, foreign_teacher)
    back = {j: i for i, j in pairs.items()}
    tables = measured(student, foreign_teacher, batch, max_new_tokens=4, seed=58)
    whole = dropped = moved = 0
    for u, table in zip(batch.utterances, tables, strict=True):
        prompt = model.encode_audio(student, data.load_batch([u]))
        ids, mask = rollout(student, prompt, 4, 1.0, data.keyed_uniforms(58, 0, [u.id], 4))
        ids = ids[mask].tolist()
        n = next((t for t, i in enumerate(ids) if i not in pairs), len(ids))
        assert len(table) == len(ids) and table[n:].isnan().all()
        whole += n == len(ids)
        moved += any(pairs[i] != i for i in ids[:n - 1])
        if n == 0:
            continue
        of_student = logits_of(student, u, ids[:n]).tolist()
        of_teacher = logits_of(foreign_teacher, u, [pairs[i] for i in ids[:n]]).tolist()
        for row, z_s, z_t, y in zip(table.tolist(), of_student, of_teacher, ids):
            s = {i: z for i, z in enumerate(z_s) if not student.blocked[i]}
            t = {back.get(j, f"theirs {j}"): z for j, z in enumerate(z_t)
                 if not foreign_teacher.blocked[j]}
            s, t = ({v: z.get(v, -INF) for v in s.keys() | t.keys()} for z in (s, t))
            expected = brute_force(s, t, 4, y)
            dropped += expected["vuss"] < 8 - 4 * expected["overlap"]
            found = dict(zip(overlap.STATISTICS, row, strict=True))
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert 1 < whole < len(batch) and dropped > 2, "clips with and without a hole, dropped tokens"
    assert moved, "the teacher read another id for the same token"


def test_what_is_not_finite_is_an_error_that_names_the_clips(student, teacher, batch, monkeypatch):
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden, weight: logits(hidden, weight) * (
        math.nan if weight is teacher.head.weight else 1.0))
    with pytest.raises(FloatingPointError, match=batch.utterances[3].id):
        measured(student, teacher, batch)


def table_of(*values, rest=0):
    """A clip with a value per state, then `rest` without; that of statistic i is i higher."""
    states = torch.tensor([*values, *[math.nan] * rest], dtype=torch.float32)
    return states[:, None] + torch.arange(len(overlap.STATISTICS))


def test_means_by_hand():
    """Means over states, not over clips; of those at one index, as far as 20 clips have one."""
    s, _ = overlap.summarize([table_of(1, 4), table_of(rest=2), table_of(5, rest=3),
                              *[table_of(7, 2, 9)] * 19])
    assert (s["clips"], s["states"], s["states_not_scored"]) == (22, 60, 5)
    means = [s[name]["mean"] for name in overlap.STATISTICS]
    assert means == pytest.approx([(5 + 5 + 19 * 18) / 60 + i for i in range(len(means))])
    assert [(e["vuss"]["mean"], e["states"]) for e in s["by_token"]] == [
        (pytest.approx((1 + 5 + 19 * 7) / 21), 21), (pytest.approx((4 + 19 * 2) / 20), 20)]


def test_intervals_are_the_bootstraps_and_students_are_paired():
    """Clips differ by far more than the two students do on any of them."""
    rng = np.random.default_rng(0)
    n = rng.normal(np.arange(40)[:, None, None] % 5 + [0.0, 1.0], 0.1, size=(40, 3, 2))
    tables = [[table_of(*states) for states in n[:, :, i]] for i in range(2)]
    (_, drawn_a), (b, drawn_b) = (overlap.summarize(of) for of in tables)
    draws = data.bootstrap(n.sum(1), np.full((40, 2), 3))
    np.testing.assert_allclose(np.stack([drawn_a[1:, 0], drawn_b[1:, 0]], 1), draws, rtol=1e-5)
    last = data.bootstrap(n[:, 2, 1], np.ones(40))
    for entry, expected in ((b["vuss"], draws[:, 1]), (b["by_token"][2]["vuss"], last)):
        assert (entry["low"], entry["high"]) == pytest.approx(data.interval(expected))
    assert (drawn_b - drawn_a).std() < 0.2 * drawn_a.std()


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


def flags(folder, *more):
    line = ["--student", folder / "student", "--teacher", folder / "teacher", "--data",
            folder / "set.jsonl", "--batch", 4, "--max_new_tokens", 8, "--device", "cpu", *more]
    return overlap.parse_args(list(map(str, line)))


def run(folder, out, *more):
    overlap.main(flags(folder, "--out", folder / out, "--top_k", 4, *more))
    return json.loads((folder / out / "overlap.json").read_text())


def test_what_is_written(folder, student, teacher, capsys):
    """Means over the states of three batches are those of one."""
    result = run(folder, "one", "--seed", 3)
    assert [result[key] for key in ("teacher", "top_k", "difference")] == [
        str(folder / "teacher"), 4, {}]
    s, = result["students"]
    batch = data.load_batch(data.read_manifest(folder / "set.jsonl"))
    for name, mean in means_of(measured(student, teacher, batch, seed=3)).items():
        assert s[name]["mean"] == pytest.approx(mean, rel=1e-5)
    assert s["clips"] == 11
    assert (folder / "one" / "overlap.png").stat().st_size > 5000
    assert "vuss {mean:16.3f} [{low:.3f}, {high:.3f}]\n".format(**s["vuss"]) in (
        capsys.readouterr().out)


def test_students_side_by_side_on_two_processes_are_what_each_is_alone_on_one(folder):
    """Three batches, a foreign teacher, which as a student agrees with itself everywhere."""
    names = [folder / "student", folder / "foreign", folder / "teacher"]
    theirs = ["--teacher", folder / "foreign"]
    run_on_two(overlap.main, flags(folder, "--out", folder / "all", "--top_k", 4, *theirs,
                                   "--student", *names))
    together = json.loads((folder / "all" / "overlap.json").read_text())
    alone = [run(folder, "alone", *theirs, "--student", name)["students"][0] for name in names]
    assert together["students"] == alone and alone[0]["states_not_scored"] > 0
    assert list(together["difference"]) == list(map(str, names[1:]))
    second, third = together["difference"].values()
    assert second["vuss"]["high"] == pytest.approx(alone[0]["vuss"]["high"] - 4)  # its own: 4
    e, last, first = third["kl_reverse"], alone[2]["kl_reverse"], alone[0]["kl_reverse"]
    assert e["mean"] == pytest.approx(first["mean"] - last["mean"]), "points below the first"
    assert e["low"] < e["mean"] < e["high"] and abs(alone[1]["kl_reverse"]["mean"]) < 1e-5


@pytest.mark.parametrize("line, message", [
    ("", "--out --check is required"), ("--check --out o", "not allowed with"),
    ("--check --student a b", "takes one"), ("--check --top_k 9", "does not read --top_k")])
def test_flags_that_do_not_go_together(line, message, capsys):
    with pytest.raises(SystemExit):
        overlap.parse_args(["--student", "s", "--teacher", "t", "--data", "d", *line.split()])
    assert message in capsys.readouterr().err


def test_check_stops_a_teacher_that_does_not_know_the_audio(
        folder, student, teacher, monkeypatch, capsys):
    """On 10 of 11 clips: one has no text. What is printed is what it says it is."""
    seen, measure = [], overlap.measure
    monkeypatch.setattr(overlap, "measure", lambda *words: (
        seen.append(words[3:]) or measure(*words)))
    with pytest.raises(SystemExit, match="do not fit.*the teacher does not know this audio"):
        overlap.main(flags(folder, "--check"))
    (clips, _, at), (same, _, at_same), (others, _, at_others) = seen
    assert (at, at_same, at_others) == ("rollout", "reference", "reference") and same == clips
    assert len({u.text for u in clips}) == len(clips) == 10
    assert all(u == replace(v, text=u.text) and u.text != v.text for u, v in zip(others, clips))
    assert {u.text for u in others} == {u.text for u in clips}
    batch = data.load_batch(clips)
    means = means_of(measured(student, teacher, batch))
    logp = [torch.cat([logp_of(teacher, u, u.text) for u in lines]).mean().item()
            for lines in (clips, others)]
    shown = data.load_batch(clips[8:]).utterances[-1]
    hyps, rates = [], []
    for asr in (student, teacher):
        said = [result["hyp"] for result in model.transcribe(asr, batch, 8)]
        counts = [data.edit_counts(u.text, hyp, u.language)
                  for u, hyp in zip(batch.utterances, said)]
        rates.append(100 * sum(c.errors for c in counts) / sum(c.units for c in counts))
        hyps.append(said[batch.utterances.index(shown)])
    table = capsys.readouterr().out
    for said in (
            f"clips                 10, each with another text; one of them: {shown.id}\n",
            "...ease transcribe this audio.<|assistant|>\n",
            f"  reference           {shown.text}\n  student             {hyps[0]}\n"
            f"  teacher             {hyps[1]}\n",
            f"{100 * means['top1']:.1f} % equal first", f"{means['kl_reverse']:.3f} nats per token",
            f"{logp[0]:.3f} nats of references, {logp[1]:.3f} of other clips'",
            f"student {rates[0]:.1f} %, teacher {rates[1]:.1f} %"):
        assert said in table


@pytest.mark.parametrize("margin, teachers, said", [
    (0.99, (0, 0), None), (1.01, (1, 5), "may be nothing to learn: the teacher makes -"),
    (1.01, (0, 0), "is something to learn: the teacher makes 75.0 to 75.0 points fewer errors.")])
def test_check_wants_one_nat_per_token_and_a_better_teacher(
        folder, monkeypatch, capsys, margin, teachers, said):
    errors = (3, teachers[0], 3, teachers[1])  # of the student and the teacher, on two clips
    counts = itertools.cycle([data.Counts(n, 0, 0, 4) for n in errors])
    monkeypatch.setattr(data, "edit_counts", lambda *_: next(counts))
    means = iter((0.0, margin, 0.0))  # at rollouts, references, other clips' references
    monkeypatch.setattr(overlap, "measure", lambda *_: [
        torch.full((3, len(overlap.STATISTICS)), next(means))])
    if margin < 1:
        with pytest.raises(SystemExit, match="do not fit"):
            overlap.main(flags(folder, "--check"))
        return
    overlap.main(flags(folder, "--check"))
    assert f"The two fit. There {said}" in capsys.readouterr().out


def test_check_wants_two_transcripts_and_ends_on_two_processes(folder, corpus, tmp_path):
    def verdict(args):  # rank 0's; the other has none
        try:
            overlap.main(args)
        except SystemExit as error:
            assert "do not fit" in error.code and os.environ["RANK"] == "0"

    run_on_two(verdict, flags(folder, "--check"))
    rows = [{"id": f"u{i}", "audio": str(corpus / f"dev-{i}.wav"), "text": "one"} for i in range(3)]
    data.write_jsonl(tmp_path / "m.jsonl", rows)
    with pytest.raises(ValueError, match="two different transcripts, in .*m.jsonl"):
        overlap.main(flags(folder, "--check", "--data", tmp_path / "m.jsonl"))
