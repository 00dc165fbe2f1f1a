"""overlap.py: every statistic against Python sets and float loops, where states lie, the command as it is run, and --check.

    pytest tests/test_overlap.py
"""

import copy
import inspect
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import model
import overlap
import sft
from conftest import twins
from test_checkpoints import native, native_logits, qwen  # two fixtures and their oracle

ROOT, INF = Path(__file__).resolve().parent.parent, math.inf


# ---------------------------------------------------------------------------- oracle: floats, loops and sets, no tensor operation

def probabilities(scores):
    top = max(scores.values())
    weights = {v: math.exp(z - top) for v, z in scores.items()}
    return {v: w / sum(weights.values()) for v, w in weights.items()}


def kl(p, q):
    return sum(p[v] * math.log(p[v] / q[v]) for v in p)


def entropy(p):
    return -sum(x * math.log(x) for x in p.values())


def best(scores, k):
    return set(sorted((v for v in scores if scores[v] > -INF), key=lambda v: -scores[v])[:k])


def brute_force(s, t, k, written=None):
    """One state, {token: logit} on each side: section 4.3 sentence by sentence."""
    valid = {v for v in s if s[v] > -INF} & {v for v in t if t[v] > -INF}
    merged = best(s, k) | best(t, k)                 # "merging teacher and student top-k candidate sets"
    retained = {v for v in merged if v in valid}     # "and filtering invalid token mappings"
    shared = {v for v in best(s, k) if v in best(t, k) and v in valid}
    p_s, p_t = ({v: p for v, p in probabilities({v: z[v] for v in valid}).items()} for z in (s, t))
    u_s, u_t = ((probabilities({v: z[v] for v in retained}) if retained else {}) for z in (s, t))
    k = min(k, len(s))
    out = {"vuss": len(retained), "overlap": len(shared) / k, "mass_s": sum(p_s[v] for v in shared), "mass_t": sum(p_t[v] for v in shared),
           "union_kl_reverse": kl(u_s, u_t), "union_kl_forward": kl(u_t, u_s), "top1": float(best(s, 1) == best(t, 1) and best(s, 1) <= valid),
           "entropy_s": entropy(p_s), "entropy_t": entropy(p_t), "kl_reverse": kl(p_s, p_t), "kl_forward": kl(p_t, p_s)}
    if written is not None:
        out["rank"] = 1 + sum(t[v] > t[written] for v in valid)
        out["logp_t"] = math.log(p_t[written])
    return out


def random_logits(n, v, seed=0, out_s=(), out_t=()):
    """z_s, z_t (n, v) float64, correlated; -inf in the columns out_s and out_t."""
    generator = torch.Generator().manual_seed(seed)
    z_s, other = (3 * torch.randn(n, v, generator=generator, dtype=torch.float64) for _ in range(2))
    z_t = 0.6 * z_s + 0.8 * other
    z_s[:, list(out_s)], z_t[:, list(out_t)] = -INF, -INF
    return z_s, z_t


def everywhere(z):
    return torch.ones(len(z), dtype=torch.bool)


def prompt_of(asr, batch):
    """The two tensors that scoring takes, by position."""
    prompt = model.encode_audio(asr, batch)
    return prompt.embeds, prompt.mask


def logits_of(asr, batch, ids):
    """Logits before each of the ids of a clip alone."""
    ids = torch.tensor([ids])
    hidden = model.response_hidden(asr.body, *prompt_of(asr, batch), ids, torch.ones_like(ids, dtype=torch.bool))
    return model.logits(hidden, asr.head.weight)


def test_the_statistics_copy_out_alone():
    namespace = {"torch": torch}
    exec(inspect.getsource(overlap.overlap_stats), namespace)
    z_s, z_t = random_logits(5, 20)
    ours, copied = (f(z_s, z_t, everywhere(z_s), 4, torch.arange(5), (1, 8)) for f in (overlap.overlap_stats, namespace["overlap_stats"]))
    assert all(torch.equal(ours[name], copied[name]) for name in ours) and len(ours) == 13 + 12


@pytest.mark.parametrize("v", [6, 40, 90])
@pytest.mark.parametrize("out_s, out_t", [((), ()), ((0, 1, 5), (0, 1, 5)), ((0, 3), (1, 3, 4))], ids=["all valid", "the same out", "different ones out"])
def test_every_statistic_at_every_k_equals_sets(v, out_s, out_t):
    z_s, z_t = random_logits(12, v, seed=v, out_s=out_s, out_t=out_t)
    written = torch.full((12,), 2)
    stats = overlap.overlap_stats(z_s, z_t, everywhere(z_s), 5, written, overlap.KS)
    assert set(stats) == set(overlap.COLUMNS)
    for n in range(12):
        s, t = dict(enumerate(z_s[n].tolist())), dict(enumerate(z_t[n].tolist()))
        for k, at in [(5, ""), *((k, f"@{k}") for k in overlap.KS)]:
            for name, value in brute_force(s, t, k, 2).items():
                if name in overlap.OF_K or not at:
                    assert stats[name + at][n].item() == pytest.approx(value, rel=1e-9, abs=1e-12), (name, k)
    assert torch.equal(stats["top1"], stats["overlap@1"])
    if not out_s:  # nothing is dropped
        for k in overlap.KS:
            torch.testing.assert_close(stats[f"vuss@{k}"], (2 - stats[f"overlap@{k}"]) * min(k, v))


def test_constructed_states():
    """k = 2 on five tokens: equal sets in another order, one token shared, nothing shared."""
    p_s = torch.tensor([[.4, .3, .15, .1, .05]] * 3).double()
    p_t = torch.tensor([[.2, .6, .1, .06, .04], [.1, .5, .3, .06, .04], [.1, .06, .04, .5, .3]]).double()
    stats = overlap.overlap_stats(p_s.log(), p_t.log(), everywhere(p_s), 2, torch.tensor([0, 0, 2]), (1,))
    assert stats["vuss"].tolist() == [2, 3, 4] and stats["overlap"].tolist() == [1.0, 0.5, 0.0]
    assert stats["mass_s"].tolist() == pytest.approx([0.7, 0.3, 0.0]) and stats["mass_t"].tolist() == pytest.approx([0.8, 0.5, 0.0])
    assert stats["rank"].tolist() == [2, 3, 5] and stats["top1"].tolist() == [0, 0, 0] and stats["vuss@1"].tolist() == [2, 2, 2]
    assert stats["union_kl_forward"][0].item() == pytest.approx(.25 * math.log(.25 / (4 / 7)) + .75 * math.log(.75 / (3 / 7)))


def test_what_is_invalid_is_dropped_after_merging_and_makes_no_room():
    """k = 2. The student's best has no counterpart, nor has one of the teacher's two: only one token of each is left, the same one."""
    z_s = torch.tensor([[9., 5., 4., 3., -INF]])
    z_t = torch.tensor([[-INF, 5., 4., 3., 9.]])
    stats = overlap.overlap_stats(z_s, z_t, everywhere(z_s), 2, torch.tensor([1]), (1,))
    assert (stats["vuss"].item(), stats["overlap"].item(), stats["top1"].item(), stats["rank"].item()) == (1, 0.5, 0, 1)
    assert stats["vuss@1"].item() == 0 and stats["union_kl_reverse@1"].item() == stats["kl_reverse"].item() == 0
    assert stats["mass_s"].item() == pytest.approx(math.exp(5) / (math.exp(5) + math.exp(4) + math.exp(3)), rel=1e-6)


def test_rank_counts_strictly_larger_logits():
    z_t = torch.tensor([[2., 2., 7., 2., 1.]])
    ranks = [overlap.overlap_stats(torch.zeros(1, 5), z_t, everywhere(z_t), 1, torch.tensor([i]))["rank"].item() for i in range(5)]
    assert ranks == [2, 2, 1, 2, 5]


def test_only_the_masked_in_states_count():
    z_s, z_t = random_logits(6, 12, seed=8)
    mask, written = torch.tensor([[True, False, True], [False, False, True]]), torch.arange(6)
    stats = overlap.overlap_stats(z_s.view(2, 3, 12), z_t.view(2, 3, 12), mask, 3, written.view(2, 3))
    alone = overlap.overlap_stats(z_s[[0, 2, 5]], z_t[[0, 2, 5]], torch.ones(3, dtype=torch.bool), 3, written[[0, 2, 5]])
    assert "rank" in stats and all(torch.equal(stats[name], alone[name]) for name in stats)


# ---------------------------------------------------------------------------- where a state lies

def pieces_asr(pieces):
    """A model whose token i is the bytes pieces[i - 1]; token 0 is EOS."""
    decode = lambda ids: b"".join(pieces[i - 1] for i in ids).decode("utf-8", errors="replace")
    return SimpleNamespace(stop=torch.arange(len(pieces) + 1) == 0, tokenizer=SimpleNamespace(decode=decode))


F, T = False, True
cases = {  # reference, language, tokens of the rollout, did it end with EOS, states inside an error (the last one EOS's)
    "substitutions and a deletion": ("put two cups on the shelf", "en", ["put", " t", "oo", " cu", "ps", " the", " sh", "elf", "s"], True,
                                     [F, T, T, F, F, T, T, T, T, F]),
    "insertion": ("put two cups", "en", ["put", " re", "d", " two", " cups"], True, [F, T, T, F, F, F]),
    "deletion: only where the next word begins": ("put two red cups", "en", ["put", " two", " cu", "ps"], True, [F, F, T, F, F]),
    "deletion at the end": ("find peter", "en", ["find"], True, [F, T]),
    "deletion at the end of a cut rollout": ("find peter", "en", ["fi", "nd"], False, [F, F]),
    "nothing written": ("clean it", "en", [], True, [T]),
    "nothing to be written": ("...", "en", ["a"], True, [T, F]),
    "no error": ("Don't!", "en", ["don", "'t"], True, [F, F, F]),
    "punctuation and spaces are no units": ("put six on", "en", ["Put", ",", " ", "two", " ", "on", "."], True, [F, F, F, T, F, F, F, F]),
    "the normaliser writes 's out": ("the shelf", "en", ["the", " shelf", "'", "s"], True, [F, F, F, T, F]),
    "a token of two words": ("a b c", "en", ["a b", " d"], True, [F, T, F]),
    "bytes of characters": ("打开台灯", "zh", [b"\xe6", b"\x89", b"\x93", "关".encode()[:2], "关".encode()[2:], "台"], True, [F, F, F, T, T, F, T]),
    "a token across two characters": ("打开", "zh", ["打".encode()[:2], "打".encode()[2:] + "关".encode()[:1], "关".encode()[1:]], True, [F, T, T, F]),
    "deleted before a split character": ("小明有", "zh", ["小", *(bytes([b]) for b in "有".encode())], True, [F, T, F, F, F]),
    "a token of two characters": ("今天打开", "zh", ["今天", "打", "灯"], True, [F, F, T, F]),
    "two characters, a deletion between": ("今年天打", "zh", ["今天", "打"], True, [T, F, F]),
    "bytes that are no text": ("打开", "zh", ["打", b"\xe6", "开"], True, [F, F, F, F]),
}


@pytest.mark.parametrize("name", cases)
def test_error_states_by_hand(name):
    text, language, pieces, ended, expected = cases[name]
    asr = pieces_asr([p if isinstance(p, bytes) else p.encode() for p in pieces])
    assert overlap.error_states(asr, [*range(1, len(pieces) + 1), *([0] if ended else [])], text, language) == expected


def test_error_states_with_a_real_tokenizer(student):
    """Byte-level tokens of the corpus: every token of a wrong unit and no other, counted from the units' own encodings."""
    ids = student.encode_text("put nine cups")
    words = [student.plain_tokenizer.encode(w, add_special_tokens=False).ids for w in ("put", " nine", " cups")]
    assert ids == [*words[0], *words[1], *words[2], student.eos_id] and len(words[1]) > 1
    of_nine = [student.tokenizer.decode([i]) != " " for i in words[1]]  # a space of its own is no part of the word
    assert sum(of_nine) > 1
    expected = [False] * len(words[0]) + of_nine + [False] * (len(words[2]) + 1)
    assert overlap.error_states(student, ids, "put two cups", "en") == expected
    ids = student.encode_text("厨房鱼")  # the last character is in no merge: three bytes
    inside = overlap.error_states(student, ids, "厨房有", "zh")
    assert inside[-4:] == [True, True, True, False] and not any(inside[:-4])


def labels_of_states(inside, n, section):
    """The label of each state in one breakdown, None where it has none."""
    cells = overlap.cells_of_states(inside, n)
    assert cells.shape == (n, len(overlap.CELLS)) and cells[:, 0].all()
    labels = [[label for (s, label), member in zip(overlap.CELLS, row) if member and s == section] for row in cells]
    assert all(len(found) <= 1 for found in labels)
    return [found[0] if found else None for found in labels]


def test_bins_of_states():
    assert labels_of_states(None, 4, "by_token") == ["0", "1", "2", "3"] and labels_of_states(None, 4, "by_error") == [None] * 4
    assert labels_of_states(None, 23, "by_token")[19:] == ["19"] + ["20 and later"] * 3
    assert labels_of_states([False], 1, "by_error") == ["outside"]  # EOS at once, rightly
    assert labels_of_states([False], 1, "by_distance") == [None]
    inside = [i in (5, 7) for i in range(20)]
    assert labels_of_states(inside, 20, "by_error") == ["inside" if i in (5, 7) else "outside" for i in range(20)]
    assert labels_of_states(inside, 20, "by_distance") == (
        ["-4 and less"] * 2 + ["-3", "-2", "-1", "0", "1", "2", "3"] + ["4 to 7"] * 4 + ["8 and more"] * 7)


# ---------------------------------------------------------------------------- a batch

def measured(student, teacher, to_teacher, batch, states="rollout", **changes):
    args = SimpleNamespace(**{"seed": 0, "max_new_tokens": 9, "temperature": 1.0, "chunk": 7, "top_k": 5, **changes})
    return overlap.measure_batch(student, teacher, to_teacher, batch, states, args)


column = overlap.COLUMNS.index


def test_a_model_agrees_with_itself(student, batch):
    clips = measured(student, student, model.vocabulary_map(student, student), batch)
    assert set(clips) == {u.id for u in batch.utterances}
    for values, cells, not_scored in clips.values():
        assert len(values) == len(cells) > 0 and not_scored == 0
        for k, at in [(5, ""), *((k, f"@{k}") for k in overlap.KS)]:
            assert (values[:, column("vuss" + at)] == k).all() and (values[:, column("overlap" + at)] == 1).all()
        assert np.abs(values[:, [column("kl_reverse"), column("kl_forward")]]).max() < 1e-5
        assert values[:, column("mass_s")] == pytest.approx(values[:, column("mass_t")], abs=1e-5)


def test_a_foreign_teachers_sets_are_of_its_own_vocabulary(student, foreign_teacher, batch):
    """measure_batch in chunks over a padded batch = brute force, state by state, on each clip alone. A token that only one side has
    takes its place in that side's top k, and is dropped."""
    pairs, to_teacher = twins(student, foreign_teacher), model.vocabulary_map(student, foreign_teacher)
    back = {j: i for i, j in pairs.items()}
    clips, whole, dropped = measured(student, foreign_teacher, to_teacher, batch, max_new_tokens=4), 0, 0
    writable = lambda asr: [i for i, b in enumerate(asr.blocked.tolist()) if not b]
    for u in batch.utterances:
        alone = data.load_batch([u])
        ids, mask = model.roll_out(student, model.encode_audio(student, alone), 4, 1.0, data.keyed_uniforms(0, 0, [u.id], 4))
        ids = ids[mask].tolist()
        n = next((t for t, i in enumerate(ids) if i not in pairs), len(ids))  # up to the first token that the teacher can't read
        values, cells, not_scored = clips[u.id]
        assert (len(values), not_scored) == (n, len(ids) - n)
        inside = overlap.error_states(student, ids, u.text, u.language)
        assert cells.tolist() == overlap.cells_of_states(inside, len(ids))[:n].tolist()
        whole += n == len(ids)
        if n == 0:
            continue
        of_student = logits_of(student, alone, ids[:n]).tolist()
        of_teacher = logits_of(foreign_teacher, alone, [pairs[i] for i in ids[:n]]).tolist()
        for row, z_s, z_t, i in zip(values.tolist(), of_student, of_teacher, ids):
            s, t = {j: z_s[j] for j in writable(student)}, {back.get(j, f"theirs {j}"): z_t[j] for j in writable(foreign_teacher)}
            s, t = ({v: z.get(v, -INF) for v in s.keys() | t.keys()} for z in (s, t))
            for k, at in [(5, ""), *((k, f"@{k}") for k in overlap.KS)]:
                expected = brute_force(s, t, k, i)
                dropped += expected["vuss"] < 2 * k - k * expected["overlap"]
                found = {name: row[column(name + at * (name in overlap.OF_K))] for name in expected}
                assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert 1 < whole < len(batch.utterances) and dropped > 10, "the case needs clips with and without a hole, and dropped tokens"


def test_the_teacher_is_never_shown_a_token_nobody_wrote(student, teacher, batch):
    """Where an emitted id has no counterpart the teacher has no input. Whatever is done there, no id that stands in for it may be
    heard: here id 0 has no counterpart, so the teacher's embedding of id 0 must not matter."""
    to_teacher = model.vocabulary_map(student, teacher)
    uniforms = data.keyed_uniforms(0, 0, [u.id for u in batch.utterances], 9)
    ids, mask = model.roll_out(student, model.encode_audio(student, batch), 9, 1.0, uniforms)
    to_teacher[[0, *ids[:, 2].tolist()]] = -1  # the third token of every clip has no counterpart
    to_teacher[student.eos_id] = teacher.eos_id
    before = measured(student, teacher, to_teacher, batch)
    weight, kept = teacher.body.embed_tokens.weight.data, teacher.body.embed_tokens.weight.data[0].clone()
    try:
        weight[0] = weight[5] * 2.0
        after = measured(student, teacher, to_teacher, batch)
    finally:
        weight[0] = kept
    # The head is tied to the embeddings: id 0 itself may enter the teacher's top k, so what does not depend on that is compared.
    apart = [column(name) for name in ("kl_reverse", "kl_forward", "entropy_t", "rank", "logp_t")]
    for i in before:
        assert after[i][0][:, apart] == pytest.approx(before[i][0][:, apart], abs=1e-5), i
    assert any(n for _, _, n in before.values())


def test_reference_states_are_those_of_the_transcript(student, teacher, batch):
    """One text holds id 0, which is a token like any other: nothing may stand in for it."""
    to_teacher = model.vocabulary_map(student, teacher)
    utterances = [replace(batch.utterances[0], text=student.tokenizer.decode([0]) + " put two cups"), *batch.utterances[1:]]
    assert student.encode_text(utterances[0].text)[0] == 0 and to_teacher[0] == 0
    clips = measured(student, teacher, to_teacher, replace(batch, utterances=utterances), "reference")
    for u in utterances:
        ids, alone = student.encode_text(u.text), data.load_batch([u])
        values, cells, not_scored = clips[u.id]
        assert len(values) + not_scored == len(ids) and not any(cells[:, i].any() for i, (s, _) in enumerate(overlap.CELLS) if s in ("by_error", "by_distance"))
        z_t = model.map_logits(logits_of(teacher, alone, to_teacher[torch.tensor(ids)].tolist()), to_teacher)
        assert values[:, column("rank")].tolist() == [1 + int((z > z[i]).sum()) for z, i in zip(z_t, ids)]
        logp = z_t.double().log_softmax(-1)[torch.arange(len(ids)), ids]
        assert values[:, column("logp_t")] == pytest.approx(logp.detach().numpy(), abs=1e-4)


def test_what_is_not_finite_is_an_error_that_names_the_clips(student, teacher, batch, monkeypatch):
    logits = model.logits

    def broken_teacher(hidden, weight):
        z = logits(hidden, weight)
        return z * math.nan if weight is teacher.head.weight else z

    monkeypatch.setattr(model, "logits", broken_teacher)
    with pytest.raises(FloatingPointError, match=batch.utterances[3].id):
        measured(student, teacher, model.vocabulary_map(student, teacher), batch)


# ---------------------------------------------------------------------------- sums, intervals, the command

def test_sums_by_hand():
    """Two clips, three states: means over states, not over clips; bins hold the states that lie in them."""
    n = len(overlap.COLUMNS)
    clips = [overlap.Clip(np.stack([np.full(n, 1.0), np.full(n, 4.0)]), overlap.cells_of_states([False, True], 2), 0),
             overlap.Clip(np.full((1, n), 7.0), overlap.cells_of_states(None, 1), 0),
             overlap.Clip(np.zeros((0, n)), overlap.cells_of_states(None, 0), 2)]
    sums, counts = overlap.sum_states(clips)
    assert sums[:, 0, 0].tolist() == [5, 7, 0] and counts[:, 0].tolist() == [2, 1, 0]
    means = overlap.mean_of(sums.sum(0), counts.sum(0))
    result = overlap.as_entries(means, overlap.bootstrap_means(sums, counts), np.stack([means[0], means[0] + 2]))
    assert result["vuss"]["mean"] == result["by_k"]["8"]["mass_s"]["mean"] == 4
    assert (result["kl_reverse"]["batch_mean"], result["kl_reverse"]["batch_min"], result["kl_reverse"]["batch_max"]) == (5, 4, 6)

    def mean(section):
        return {label: cell["rank"]["mean"] for label, cell in result[section].items()}

    assert mean("by_token") == {"0": 4, "1": 4}  # (1 + 7) / 2, and 4
    assert mean("by_error") == {"outside": 1, "inside": 4} and mean("by_distance") == {"-1": 1, "0": 4}


def test_intervals_are_data_bootstraps():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 9, size=(40, 2)).astype(float)
    sums = rng.random((40, 2, 3)) * counts[..., None]
    drawn = overlap.bootstrap_means(sums, counts)
    for c in range(2):
        for j in range(3):
            assert np.percentile(drawn[:, c, j], [2.5, 97.5]) == pytest.approx(data.bootstrap(sums[:, c, j], counts[:, c]), rel=1e-12)
    counts[1:, 1] = sums[1:, 1] = 0  # a bin that one clip alone is in: draws without it say nothing, and are not zeros
    low, high = np.nanpercentile(overlap.bootstrap_means(sums, counts)[:, 1, 0], [2.5, 97.5])
    assert low == high == pytest.approx(sums[0, 1, 0] / counts[0, 1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, checkpoints, corpus, foreign_teacher, tokenizer):
    """The checkpoints, a foreign teacher, and dev.jsonl with a line less of text."""
    path = tmp_path_factory.mktemp("overlap")
    model.save(foreign_teacher, path / "foreign")
    (path / "student").symlink_to(checkpoints / "student")
    (path / "teacher").symlink_to(checkpoints / "teacher")
    rows = [json.loads(line) for line in (corpus / "train.jsonl").read_text().splitlines()[:11]]
    del rows[4]["text"]
    data.write_jsonl(path / "set.jsonl", [row | {"audio": str(corpus / row["audio"])} for row in rows])
    return path


def words(folder, out, **changes):
    flags = {"student": folder / "student", "teacher": folder / "teacher", "data": folder / "set.jsonl", "out": folder / out, "batch": 4,
             "max_new_tokens": 8, "top_k": 4, "device": "cpu"} | changes
    return [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]


def run(folder, out, **changes):
    overlap.main(overlap.parse_args(words(folder, out, **changes)))
    return json.loads((folder / out / "overlap.json").read_text())


def test_what_is_written(folder):
    result, utterances = run(folder, "one"), data.read_manifest(folder / "set.jsonl")
    assert (result["k"], result["clips"], result["clips_not_aligned"], result["batches"]) == (4, 11, 1, 2)
    for name in overlap.STATISTICS:
        e = result[name]
        assert e["low"] <= e["mean"] <= e["high"] and e["batch_min"] <= e["batch_mean"] <= e["batch_max"]
    assert set(result["by_k"]) == {"1", "8", "16", "32"} and set(result["by_k"]["8"]) == set(overlap.OF_K)
    assert sum(cell["states"] for cell in result["by_token"].values()) == result["states"] == sum(result["vuss_histogram"].values())
    assert list(result["by_token"])[:2] == ["0", "1"] and result["by_token"]["0"]["clips"] == result["by_token"]["0"]["states"] == 11
    assert 0 < sum(cell["states"] for cell in result["by_error"].values()) < result["states"]
    assert result["by_distance"]["0"]["clips"] == result["clips_with_error"] > 0
    assert max(cell["clips"] for cell in result["by_error"].values()) <= 10 < max(cell["states"] for cell in result["by_error"].values())
    assert result["vuss"]["mean"] == pytest.approx(sum(int(v) * n for v, n in result["vuss_histogram"].items()) / result["states"])
    assert (folder / "one" / "overlap.png").read_bytes()[:4] == b"\x89PNG"
    # min and max over batches, from runs of one batch each: those of the training plan, without the last, smaller one
    rows, means = [json.loads(line) for line in (folder / "set.jsonl").read_text().splitlines()], []
    for indices in data.Plan(data.measure(utterances), 4, 0).epoch(0)[:2]:
        data.write_jsonl(folder / "part.jsonl", [rows[i] for i in indices])
        means.append(run(folder, "part", data=folder / "part.jsonl")["vuss"]["mean"])
    assert (result["vuss"]["batch_min"], result["vuss"]["batch_max"]) == pytest.approx((min(means), max(means)), rel=1e-6)


def test_compare_with_itself_is_no_difference(folder):
    result = run(folder, "same", compare=folder / "student")
    entries = [e for k in result["difference"]["by_k"].values() for e in k.values()] + [result["difference"][name] for name in overlap.STATISTICS]
    assert len(entries) == 24 + len(overlap.STATISTICS) and all(e == {"mean": 0.0, "low": 0.0, "high": 0.0} for e in entries)


def test_compare_is_two_runs_and_their_difference(folder):
    """The second student is the teacher itself, which agrees with itself everywhere."""
    both, first, second = run(folder, "both", compare=folder / "teacher"), run(folder, "first"), run(folder, "second", student=folder / "teacher")
    ours = {"teacher", "data", "k", "states_of", "seed", "temperature", "batch", "batches"}
    assert {k: v for k, v in both.items() if k not in ("compare", "difference")} == first
    assert both["compare"] == {k: v for k, v in second.items() if k not in ours}
    assert both["difference"]["vuss"]["mean"] == pytest.approx(4 - first["vuss"]["mean"])
    assert both["difference"]["vuss"]["high"] == pytest.approx(4 - first["vuss"]["low"])  # its own VUSS is 4 in every draw
    assert both["difference"]["overlap"]["low"] > 0 and second["kl_reverse"]["mean"] < 1e-6


def test_two_processes_give_what_one_gives(folder):
    """A foreign teacher, two students, three batches."""
    flags = {"teacher": folder / "foreign", "compare": folder / "teacher"}
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "overlap.py"),
                    *words(folder, "torchrun", **flags)], check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    one, two = run(folder, "alone", **flags), json.loads((folder / "torchrun" / "overlap.json").read_text())
    assert one == two and one["states_not_scored"] > 0


def test_reference_states_want_text(folder, corpus):
    with pytest.raises(ValueError, match="set.jsonl:5.*text"):
        run(folder, "reference", states="reference")
    result = run(folder, "reference", states="reference", data=corpus / "dev.jsonl")
    assert result["states_of"] == "reference" and "by_error" not in result and result["clips_not_aligned"] == 6


def test_a_rollout_that_nothing_can_be_scored_of_is_an_error(folder, monkeypatch):
    monkeypatch.setattr(model, "vocabulary_map", lambda student, teacher: torch.full((len(student.blocked),), -1))
    with pytest.raises(ValueError, match="no state of .*student could be scored"):
        run(folder, "none")


@pytest.mark.parametrize("changes", [{"out": None}, {"check": True, "compare": "b"}])
def test_flags_that_do_not_go_together(changes):
    flags = {"student": "a", "teacher": "b", "data": "c", "out": "d"} | changes
    line = [word for flag, value in flags.items() if value for word in ([f"--{flag}"] if value is True else [f"--{flag}", value])]
    with pytest.raises(SystemExit):
        overlap.parse_args(line)


# ---------------------------------------------------------------------------- --check

def untouched(folder):
    """Every file of a folder with its bytes."""
    return {file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def run_check(monkeypatch, student, teacher, manifest, *more):
    """overlap.py --check -> student, and what it stopped with; no weight of either model may have changed."""
    seen = []
    load = model.load

    def remember(*args, **kw):
        asr = load(*args, **kw)
        seen.append((asr, copy.deepcopy(asr.net.state_dict())))
        return asr

    monkeypatch.setattr(model, "load", remember)
    stopped = None
    try:
        overlap.main(overlap.parse_args(["--check", "--student", str(student), "--teacher", str(teacher), "--data", str(manifest),
                                         "--device", "cpu", "--batch", "6", "--max_new_tokens", "10", *map(str, more)]))
    except SystemExit as error:
        stopped = str(error)
    assert len(seen) == 2
    for asr, before in seen:
        after = asr.net.state_dict()
        assert all(torch.equal(after[k], before[k]) for k in before)
    return seen[0][0], stopped


def value_of(table, row):
    """The number in a row of the printed table."""
    return float(re.search(rf"^{re.escape(row)}\s+(-?[\d.e+-]+)", table, re.MULTILINE)[1])


def mean_logp(asr, utterances):
    """Mean log-probability a token of the clips' texts, each clip alone, blocked ids out of the question. Oracle."""
    total, n = 0.0, 0
    for u in utterances:
        ids = asr.encode_text(u.text)
        with torch.no_grad():
            z = logits_of(asr, data.load_batch([u]), ids)
        logp = z.masked_fill(asr.blocked, -INF).double().log_softmax(-1)
        total, n = total + logp[torch.arange(len(ids)), ids].sum().item(), n + len(ids)
    return total / n


@pytest.mark.parametrize("kind", ["student layout", "qwen3_asr"])
def test_check_stops_a_teacher_that_does_not_know_the_audio(checkpoints, qwen, native, student, teacher, corpus, tmp_path, monkeypatch, capsys, kind):
    other = checkpoints / "teacher" if kind == "student layout" else qwen / "hf"
    before = untouched(checkpoints)
    _, stopped = run_check(monkeypatch, checkpoints / "student", other, corpus / "dev.jsonl", "--out", tmp_path / "out")
    table = capsys.readouterr().out
    reference, exchanged = value_of(table, "log p_T of references"), value_of(table, "log p_T of other clips' references")
    assert "does not know this audio" in stopped and f"{reference:.3f}" in stopped and f"{exchanged:.3f}" in stopped and reference < exchanged + 1
    assert value_of(table, "KL(student || student)") < 1e-6 and value_of(table, "KL(student || teacher)") > 0.01
    assert value_of(table, "peak memory") > 0.05
    utterances = data.read_manifest(corpus / "dev.jsonl")
    if kind == "student layout":  # one vocabulary: every token has a counterpart
        assert reference == pytest.approx(mean_logp(teacher, utterances), abs=1e-3)
        others = overlap.exchange_texts(data.load_batch(utterances)).utterances
        assert exchanged == pytest.approx(mean_logp(teacher, others), abs=1e-3)
        assert sorted(u.text for u in others) == sorted(u.text for u in utterances)
        assert [u.id for u in others] == [u.id for u in utterances] and all(a.text != b.text for a, b in zip(utterances, others))
    else:
        total, n = 0.0, 0
        for u in utterances:
            ids = student.encode_text(u.text)
            z, shared = native_logits(student, native, u, ids)
            total, n = total + sum(row.log_softmax(-1)[shared.index(y)].item() for row, y in zip(z, ids)), n + len(z)
        assert reference == pytest.approx(total / n, abs=1e-3) and n > 6
        assert re.search(r"teacher's prompt ends .*language Chinese<asr_text>.*language English<asr_text>", table)
    assert untouched(checkpoints) == before and not (tmp_path / "out").exists()


def test_check_of_a_student_as_its_own_teacher(checkpoints, corpus, tmp_path, monkeypatch, capsys):
    """All divergences are 0 then. Without transcripts there is nothing to stop for; what can't be read is counted."""
    rows = [{"id": r["id"], "audio": str(corpus / r["audio"])} for r in map(json.loads, (corpus / "dev.jsonl").open(encoding="utf-8"))]
    data.write_jsonl(tmp_path / "untold.jsonl", [rows[0] | {"audio": "missing.wav"}, *rows[1:]])
    student, stopped = run_check(monkeypatch, checkpoints / "student", checkpoints / "student", tmp_path / "untold.jsonl")
    table = capsys.readouterr().out
    assert stopped is None and table.count("no transcripts to try") == 2
    assert value_of(table, "KL(student || student)") < 1e-6 and abs(value_of(table, "KL(student || teacher)")) < 1e-3
    writable = int((~student.blocked).sum())
    assert f"{writable} of {writable} that the student may write" in table and ", 0 not scored" in table
    assert value_of(table, "clips") == 5 and "rejected 1" in table
    assert {p.name for p in tmp_path.iterdir()} == {"untold.jsonl", "untold.jsonl.index"}  # of the manifest


def test_check_of_clips_none_of_which_can_be_read(checkpoints, tmp_path, monkeypatch):
    data.write_jsonl(tmp_path / "gone.jsonl", [{"id": "a", "audio": "missing.wav"}])
    with pytest.raises(ValueError, match="missing.wav"):
        run_check(monkeypatch, checkpoints / "student", checkpoints / "student", tmp_path / "gone.jsonl")


def test_check_stops_where_two_forwards_of_the_student_disagree(checkpoints, corpus, monkeypatch):
    """As with dropout that was left on: the audio is heard a little differently each time."""
    encode_audio = model.encode_audio

    def noisy(asr, batch):
        prompt = encode_audio(asr, batch)
        return replace(prompt, embeds=prompt.embeds + 0.1 * torch.randn_like(prompt.embeds))

    monkeypatch.setattr(model, "encode_audio", noisy)
    _, stopped = run_check(monkeypatch, checkpoints / "student", checkpoints / "teacher", corpus / "dev.jsonl")
    assert "disagree" in stopped


@pytest.fixture(scope="module")
def taught(corpus, tmp_path_factory):
    """A teacher that knows the six clips of dev.jsonl: trained on them until it does."""
    out = tmp_path_factory.mktemp("taught") / "m"
    words = ["--init", "random", "--data", corpus / "dev.jsonl", "--out", out, "--steps", 150, "--batch", 6, "--lr", 4e-3, "--warmup", 10,
             "--d_model", 48, "--encoder_layers", 1, "--lm_layers", 1, "--heads", 2, "--vocab_size", 300, "--workers", 0, "--device", "cpu",
             "--log_every", 50, "--save_every", 1000]
    sft.main(sft.parse_args(list(map(str, words))))
    return out


def test_check_lets_a_teacher_pass_that_knows_the_audio(checkpoints, taught, corpus, monkeypatch, capsys):
    _, stopped = run_check(monkeypatch, checkpoints / "student", taught, corpus / "dev.jsonl")
    table = capsys.readouterr().out
    assert stopped is None
    assert value_of(table, "log p_T of references") > value_of(table, "log p_T of other clips' references") + 1


def test_check_finds_a_teacher_that_hears_nothing(checkpoints, taught, corpus, monkeypatch):
    """The same teacher with every clip's audio taken for the first one's: what a wrong prompt or feature does."""
    encode_audio = model.encode_audio

    def deaf(asr, batch):
        prompt = encode_audio(asr, batch)
        first = [0] * len(batch.utterances)
        return replace(prompt, **{field.name: getattr(prompt, field.name)[first] for field in fields(prompt)})

    monkeypatch.setattr(model, "encode_audio", deaf)
    _, stopped = run_check(monkeypatch, checkpoints / "student", taught, corpus / "dev.jsonl")
    assert "does not know this audio" in stopped
