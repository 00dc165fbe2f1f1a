"""overlap.py: each statistic against Python sets and float loops, a batch, the command, --check."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import model
import overlap
from conftest import copied_out, twins
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
    u_s, u_t = (probabilities({v: z[v] for v in retained}) for z in (s, t))
    return {
        "vuss": len(retained), "overlap": len(shared) / min(k, len(s)),
        "mass_s": sum(p_s[v] for v in shared), "mass_t": sum(p_t[v] for v in shared),
        "union_kl": kl(u_t, u_s), "top1": float(best(s, 1) == best(t, 1) and best(s, 1) <= valid),
        "logp_t": math.log(p_t[written]),
        "entropy_s": -sum(p * math.log(p) for p in p_s.values()),
        "entropy_t": -sum(p * math.log(p) for p in p_t.values()),
        "kl_reverse": kl(p_s, p_t), "kl_forward": kl(p_t, p_s)}


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
    args = SimpleNamespace(**args)
    return overlap.measure_batch(student, teacher, to_teacher, batch, None, args)


def means_of(clips):
    """{statistic: its mean over the states of clips}."""
    values = np.concatenate([values for values, _ in clips])
    return dict(zip(overlap.STATISTICS, values.mean(0), strict=True))


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
    clips = measured(student, foreign_teacher, batch, max_new_tokens=4, seed=6)
    whole = dropped = 0
    for u, (values, not_scored) in zip(batch.utterances, clips, strict=True):
        prompt = model.encode_audio(student, data.load_batch([u]))
        ids, mask = model.roll_out(student, prompt, 4, 1.0, data.keyed_uniforms(6, 0, [u.id], 4))
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
            expected = brute_force(s, t, 4, y)
            dropped += expected["vuss"] < 8 - 4 * expected["overlap"]
            found = dict(zip(overlap.STATISTICS, row, strict=True))
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert 1 < whole < len(batch) and dropped > 2, "clips with and without a hole, dropped tokens"


def test_what_is_not_finite_is_an_error_that_names_the_clips(student, teacher, batch, monkeypatch):
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden, weight: logits(hidden, weight) * (
        math.nan if weight is teacher.head.weight else 1.0))
    with pytest.raises(FloatingPointError, match=batch.utterances[3].id):
        measured(student, teacher, batch)


def clip_of(*rows, rest=0):
    """A clip with a value per state; that of statistic i is i higher."""
    values = np.array(rows, dtype=np.float32).reshape(-1, 1) + np.arange(len(overlap.STATISTICS))
    return values, rest


def test_means_by_hand():
    """24 states: means over states, not over clips; bins hold the states in them."""
    clips = [clip_of(1, 4), clip_of(*[7] * 20, 2, 3), clip_of(rest=2), clip_of(rest=3)]
    s, _ = overlap.summarize("A", clips, [[0, 2], [1], [3]])
    assert (s["student"], s["clips"], s["states"], s["states_not_scored"]) == ("A", 4, 24, 5)
    means = [s[name]["mean"] for name in overlap.STATISTICS]
    assert means == pytest.approx([150 / 24 + i for i in range(len(means))])
    over = [s["vuss"][f"batch_{name}"] for name in ("min", "mean", "max")]
    assert over == pytest.approx([2.5, (2.5 + 145 / 22) / 2, 145 / 22])
    assert list(s["by_token"]) == [str(t) for t in range(20)] + ["20 and later"]
    bins = [s["by_token"][t] for t in ("0", "1", "2", "19", "20 and later")]
    assert [(b["vuss"]["mean"], b["states"], b["clips"]) for b in bins] == [
        (4, 2, 2), (5.5, 2, 2), (7, 1, 1), (7, 1, 1), (2.5, 2, 1)]
    assert math.isnan(s["by_token"]["2"]["top1"]["low"]), "a third of the draws have no such state"
    s, _ = overlap.summarize("A", clips, [[2], [3]])
    assert s["vuss"]["batch_min"] == s["vuss"]["batch_max"] == 150 / 24, "no batch has a state"


def test_intervals_are_the_bootstraps_and_students_are_paired():
    """Clips differ by far more than the two students do on any of them."""
    rng = np.random.default_rng(0)
    n = rng.normal(np.arange(40)[:, None, None] % 5 + [0.0, 1.0], 0.1, size=(40, 3, 2))
    clips = [[clip_of(*states) for states in n[:, :, i]] for i in range(2)]
    (_, drawn_a), (b, drawn_b) = (overlap.summarize("x", of, [range(40)]) for of in clips)
    draws = data.bootstrap(n.sum(1), np.full((40, 2), 3))
    np.testing.assert_allclose(np.stack([drawn_a[:, 0], drawn_b[:, 0]], 1), draws, rtol=1e-5)
    last = data.bootstrap(n[:, 2, 1], np.ones(40))
    for entry, expected in ((b["vuss"], draws[:, 1]), (b["by_token"]["2"]["vuss"], last)):
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
    """Means over batches of the training plan, but the last, smaller one, against measure_batch."""
    result = run(folder, "one", "--seed", 3)
    assert [result[key] for key in ("teacher", "top_k", "states", "batches", "difference")] == [
        str(folder / "teacher"), 4, "rollout", 2, {}]
    s, = result["students"]
    utterances, plan = data.read_manifest(folder / "set.jsonl"), data.Plan(11, 4, 3)
    clips, vuss = [], []
    for step in range(3):
        batch = data.load_batch([utterances[i] for i in plan[step]])
        part = measured(student, teacher, batch, seed=3)
        clips += part
        vuss.append(means_of(part)["vuss"])
    assert [s["vuss"]["batch_min"], s["vuss"]["batch_max"]] == pytest.approx(sorted(vuss[:2]))
    for name, mean in means_of(clips).items():
        assert s[name]["mean"] == pytest.approx(mean, rel=1e-5)
    assert s["by_token"]["0"]["states"] == s["clips"] == 11
    assert s["shared_ids"] == int((model.vocabulary_map(student, teacher) >= 0).sum())
    assert (folder / "one" / "overlap.png").stat().st_size > 5000
    assert f"{s['vuss']['mean']:.3f} [{s['vuss']['low']:.3f}" in capsys.readouterr().out


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
    assert second["vuss"]["high"] == pytest.approx(4 - alone[0]["vuss"]["low"])  # its own: 4
    e, last, first = third["kl_reverse"], alone[2]["kl_reverse"], alone[0]["kl_reverse"]
    assert e["mean"] == pytest.approx(last["mean"] - first["mean"])
    assert e["low"] < e["mean"] < e["high"] and abs(alone[1]["kl_reverse"]["mean"]) < 1e-5


def test_reference_states_want_text(folder, corpus, teacher):
    with pytest.raises(ValueError, match="text.*set.jsonl:5"):
        run(folder, "reference", "--states", "reference")
    result = run(folder, "reference", "--states", "reference", "--data", corpus / "dev.jsonl")
    dev = data.read_manifest(corpus / "dev.jsonl")
    assert result["students"][0]["logp_t"]["mean"] == pytest.approx(
        torch.cat([logp_of(teacher, u, u.text) for u in dev]).mean().item(), abs=1e-4)


def test_a_rollout_that_nothing_can_be_scored_of_is_an_error(folder, monkeypatch):
    monkeypatch.setattr(model, "vocabulary_map", lambda student, teacher: -torch.ones(384).long())
    with pytest.raises(ValueError, match="no state of .*student could be scored"):
        run(folder, "none")
    with pytest.raises(SystemExit, match="no token of the rollouts has a counterpart"):
        overlap.main(flags(folder, "--check"))


@pytest.mark.parametrize("line, message", [
    ("", "--out is needed"), ("--out o --clips 5", "--clips is not read without --check"),
    ("--check --out o", "--out is not read by --check"), ("--check --student a b", "--student"),
    ("--out o --student a a", "--student"), ("--check --top_k 9", "--top_k is not read")])
def test_flags_that_do_not_go_together(line, message, capsys):
    with pytest.raises(SystemExit):
        overlap.parse_args(["--student", "s", "--teacher", "t", "--data", "d", *line.split()])
    assert message in capsys.readouterr().err


def test_check_stops_a_teacher_that_does_not_know_the_audio(
        folder, student, teacher, monkeypatch, capsys):
    """The clip without a text is left out, and one of each two with the same. The teacher's
    transcripts are made right, the student's end after five characters."""
    measure_batch, verdict, told, judged = overlap.measure_batch, overlap.verdict, [], []

    def seen(student, teacher, to_teacher, batch, texts, args):
        told.extend(zip(batch.utterances, texts or [None] * len(batch)))
        return measure_batch(student, teacher, to_teacher, batch, texts, args)

    def transcribe(asr, batch, max_new_tokens):
        end = None if torch.equal(asr.head.weight, teacher.head.weight) else 5
        return [{"hyp": u.text[:end]} for u in batch.utterances]

    monkeypatch.setattr(model, "transcribe", transcribe)
    monkeypatch.setattr(overlap, "measure_batch", seen)
    monkeypatch.setattr(overlap, "verdict", lambda *words: judged.extend(words) or verdict(*words))
    again = shutil.copy(folder / "set.jsonl", folder / "again.jsonl")
    with pytest.raises(SystemExit, match="do not fit.*references"):
        overlap.main(flags(folder, "--check", "--data", folder / "set.jsonl", again))
    clips = [u for u, text in told if text is None]
    assert len({u.text for u in clips} - {None}) == len(clips) == 10
    others = [(u, text) for u, text in told if text not in (None, u.text)]
    assert sorted(text for _, text in others) == sorted(u.text for u in clips)
    counts = [data.edit_counts(u.text, u.text[:5], u.language) for u in clips]
    assert judged[1] == [(c.errors, 0, c.units) for c in counts]
    means = means_of(measured(student, teacher, data.load_batch(clips)))
    reference = torch.cat([logp_of(teacher, u, u.text) for u in clips]).mean().item()
    other = torch.cat([logp_of(teacher, u, text) for u, text in others]).mean().item()
    table, n_may = capsys.readouterr().out, int((~student.blocked).sum())
    for said in (
            "clips                 10, each with another text; 0 can't be used", f"{n_may} of {n_may} that",
            "ends 'ease transcribe this audio.<|assistant|>'",
            f"at {100 * means['top1']:.1f} % of them", f"{means['kl_reverse']:.3f} nats per token",
            f"{reference:.3f} nats of references, {other:.3f} of other clips'",
            f"{clips[0].id}\n  reference           {clips[0].text}\n"
            f"  student             {clips[0].text[:5]}\n  teacher             {clips[0].text}\n"):
        assert said in table


def test_check_of_a_student_as_its_own_teacher(folder, corpus, tmp_path, capsys):
    rows = [{"id": f"u{i}", "audio": str(corpus / f"dev-{i}.wav")} for i in range(6)]
    rows[2]["audio"] = "missing.wav"
    data.write_jsonl(tmp_path / "m.jsonl", rows)
    itself = ["--check", "--teacher", folder / "student", "--data", tmp_path / "m.jsonl"]
    overlap.main(flags(folder, *itself))
    table = capsys.readouterr().out
    assert "without transcripts nothing shows that they fit" in table and "log p_T" not in table
    assert "5, each with another text; 1 can't be used" in table
    assert "at 100.0 % of them" in table
    overlap.main(flags(folder, *itself, "--clips", 2, "--seed", 1))
    assert "2, each" in capsys.readouterr().out
    data.write_jsonl(tmp_path / "m.jsonl", rows[2:3])
    with pytest.raises(ValueError, match="none of 1 clips is usable: .*missing.wav"):
        overlap.main(flags(folder, *itself))


WORSE = [(5, 1, 10)] * 30  # errors of the student, of the teacher, units
MIXED = [(2, 1, 10), (1, 2, 10)] * 15


@pytest.mark.parametrize("kl, reference, other, counts, fits, said", [
    (0.5, -1.0, -9.0, WORSE, True, "Errors: student 50.0 %, teacher 10.0 %. There is something to "
     "learn: the teacher makes 40.0 to 40.0 points fewer"),
    (0.5, -1.0, -2.0, WORSE, True, "to learn"), (0.5, -1.0, -1.9, WORSE, False, "references"),
    (0.5, math.nan, -9.0, WORSE, False, "references"),
    (math.nan, -1.0, -9.0, WORSE, False, "no token of the rollouts"),
    (0.009, -1.0, -9.0, WORSE, True, "next to nothing"),
    (0.011, -1.0, -9.0, WORSE, True, "to learn"), (0.5, -1.0, -9.0, MIXED, True, "no better"),
    (0.5, math.nan, math.nan, [], True, "nothing shows")])
def test_verdicts(kl, reference, other, counts, fits, said):
    means = {"rollout": {"kl_reverse": kl}, "reference": {"logp_t": reference},
             "other": {"logp_t": other}}
    verdict = overlap.verdict(means, counts)
    assert verdict[0] is fits and said in verdict[1]
