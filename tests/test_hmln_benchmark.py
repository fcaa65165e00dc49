"The attribution benchmark: decoys that give nothing away, scores that cannot be won by order, retraining that depends on the data alone."
from collections import Counter

import numpy as np
import pytest
import torch

from capnb.core.attribution import Attribution, keep_top
from capnb.core.errors import CapnbError, DataError
from capnb.hmln.benchmark import N_SUBSETS, auroc, benchmark, causal, lds, ranks, removals, retrieval, shuffled, stored, subset, trainings
from capnb.hmln.gradients import captioner_scores, gradients
from capnb.hmln.leaderboard import by_look_up, hmln, member, merged_member, paired, relation_only
from capnb.hmln.planted import add_said, decoys, make_world, planted_facts
from capnb.hmln.rivals import by_chance
from capnb.hmln.sibling import caption_log_probs, log_probs, new_sibling, pack, retrain
from capnb.text.nearest import bm25, tuple_overlap


@pytest.mark.parametrize("seed", [3, 17])
@pytest.mark.parametrize("size", [1, 6, 8])
def test_only_the_whole_triple_tells(seed, size):
    facts = planted_facts(size, seed)
    for f in facts:
        A, B = (decoys(f, c, facts) for c in (True, False))
        for part in (lambda t: t[0], lambda t: t[1], lambda t: t[2], lambda t: t[:2], lambda t: t[1:], lambda t: frozenset((t[0], t[2]))):
            assert Counter(map(part, A)) == Counter(map(part, B))
        others = {frozenset((g.subject, g.object)) for g in facts if g != f}
        assert not {frozenset((t[0], t[2])) for t in A + B} & others
    assert Counter(f.where for f in facts) == dict.fromkeys(("pretrain", "finetune", "both", "neither"), size)


def test_the_world_holds_what_it_says():
    w = make_world(5, 3, 4)
    ids = list(w.finetune.captions)
    assert sorted(i for g in w.groups.values() for i in g) == sorted(ids) and len(ids) == 12*5*4
    for i, f in enumerate(w.facts):
        assert bool(w.carriers(i)) == (f.where in ("finetune", "both"))
        for c in w.carriers(i):
            s = w.finetune.scenes[c]
            assert (s.things[0].category, s.relations[0][1], s.things[1].category) == f[:3]
    fine = [any(t.subtype in c.lower() for t in w.finetune.scenes[i].things) for i, c in w.finetune.captions.items()]
    assert np.mean(fine) == 1/3
    assert not {s.seed for s in w.queries.scenes.values()} & {s.seed for side in (w.pretrain, w.finetune) for s in side.scenes.values()}
    assert set(Counter(w.wording.values()).values()) == {24}


def test_look_up_does_not_suffice():
    "Averages over worlds: words are near chance, exact statements are far from perfect, the merged ones know where but not who."
    look = dict(words=by_look_up(bm25), exact=member(), merged=merged_member(), lots=by_chance())
    got = {k: [benchmark(f, s, 2)["provenance"] for s in (21, 22)] for k, f in look.items()}
    mean = lambda k, m: np.mean([r[m] for r in got[k]])
    assert .2 < mean("words", "auroc") < .8 and mean("words", "recall") < .6
    assert mean("exact", "auroc") < .9 and mean("exact", "recall") < .6
    assert mean("merged", "auroc") > .9 and mean("merged", "recall") < .9
    assert mean("lots", "recall") < .15 < mean("words", "recall")


def test_hmln_passes_the_floors_on_a_new_world():
    h, b, e = (benchmark(f, 31, 2)["provenance"] for f in (hmln(), by_look_up(bm25), member()))
    assert h["auroc"] >= .9 and h["recall"] > max(b["recall"], e["recall"])
    gone = benchmark(hmln(), 31, 2, shuffle="captions")["provenance"]
    assert abs(gone["auroc"] - .5) < .35 and gone["recall"] < .25


def test_order_of_a_file_wins_nothing():
    rng = np.random.default_rng(0)
    for _ in range(50):
        n = rng.integers(3, 30); v, c = rng.integers(0, 4, n), rng.random(n) < .4
        if not c.any(): continue
        p = rng.permutation(n)
        np.testing.assert_allclose(retrieval(v, c), retrieval(v[p], c[p]))
        np.testing.assert_allclose(retrieval(v, c), retrieval(7*v + 3, c))
    first = sum((10 - r)/45/r for r in range(1, 10))  # P(the first of two is at rank r) = (10 - r)/45
    assert retrieval(np.zeros(10), np.arange(10) < 2) == pytest.approx((.5, first))
    assert auroc([1, 2], [1, 2]) == .5 and auroc(-np.array([1, 2]), -np.array([3, 4])) == 1


def test_lds_is_spearman_with_ties():
    rng = np.random.default_rng(1)
    score, masks, out = rng.integers(0, 3, (20, 4)), rng.random((30, 20)) < .5, rng.integers(0, 5, (30, 4))

    def slow(q):
        x, y = np.array([score[m, q].sum() for m in masks]), out[:, q]
        rank = lambda v: np.array([(v < a).sum() + ((v == a).sum() - 1)/2 for a in v])
        return np.corrcoef(rank(x), rank(y))[0, 1]
    np.testing.assert_allclose(lds(score, out, masks), [slow(q) for q in range(4)])
    np.testing.assert_allclose(lds(score, np.exp(out), masks), lds(score, out, masks))
    assert (lds(np.ones((20, 4)), out, np.ones((30, 20), bool)) == 0).all()  # no order, no score
    np.testing.assert_allclose(ranks(np.array([[3.], [1], [3], [3]]))[:, 0], [2, 0, 2, 2])


def test_lds_agrees_with_dattri():
    metric = pytest.importorskip("dattri.metric")
    rng = np.random.default_rng(2)
    score, masks, out = rng.normal(size=(20, 3)), np.stack([subset(0, j, 20) for j in range(15)]), rng.normal(size=(15, 3))
    at = torch.tensor(np.stack([np.flatnonzero(m) for m in masks]))
    theirs = metric.lds(torch.tensor(score), (torch.tensor(out), at))[0]
    np.testing.assert_allclose(lds(score, out, masks), theirs.numpy(), atol=1e-6)


def test_stored_trainings_show_causes():
    seeds = [s for s in range(8) if stored(s)]
    assert seeds, "the package holds no trainings"
    for s in seeds:
        t, w = stored(s), make_world(s)
        said = add_said(w, [tuple(x) for x in t["said"]])
        assert len(said) == len(t["said"]) and t["names"] == trainings(w) and t["values"].shape == (2 + N_SUBSETS + len(removals(w)), len(w.queries)) and N_SUBSETS >= 50
        assert np.isfinite(t["values"]).all() and t["seconds"] < 20
        ids = list(w.finetune.captions)
        mark = np.array([[c in w.carriers(w.fact_of[q]) for c in ids] for q in w.queries.captions], float)
        c = causal(w, keep_top(list(w.queries.captions), ids, mark, len(ids), "carriers"), t, s)
        assert c["drop_carriers"] > .1 > abs(c["drop_others"]) and c["drop_carriers"] > c["drop_mirrored"]
        assert c["removal"] > .02


def test_order_of_ids_does_not_matter_to_causal_scores():
    s = next(s for s in range(8) if stored(s)); t, w = stored(s), make_world(s)
    add_said(w, [tuple(x) for x in t["said"]])
    Q, T, rng = list(w.queries.captions), list(w.finetune.captions), np.random.default_rng(0)
    m = rng.normal(size=(len(Q), len(T))); p, q = rng.permutation(len(T)), rng.permutation(len(Q))
    a, b = keep_top(Q, T, m, len(T), "a"), keep_top([Q[i] for i in q], [T[i] for i in p], m[q][:, p], len(T), "a")
    assert causal(w, a, t, s) == pytest.approx(causal(w, b, t, s))


WORDS = ["a red dog on a box", "a box on a red dog", "two birds above a car", "a car above a bird", "a fish inside a cup"]


def world_of_five():
    torch.manual_seed(1)
    m = new_sibling(WORDS, 6, 3, width=16)
    return m, pack(m, torch.randn(5, 4, 6), WORDS)


def test_what_is_left_out_plays_no_part():
    m, data = world_of_five()
    assert sum(p.numel() for p in m.parameters()) < 500_000
    keep, kw = np.array([1, 0, 1, 1, 0], bool), dict(epochs=5, lr=1e-2, batch=2, seed=4)
    want = log_probs(retrain(m, data, keep, **kw), data)
    wild = {**data, "features": data["features"].clone(), "ids": data["ids"].clone(), "labels": data["labels"].clone()}
    wild["features"][~torch.tensor(keep)] = 1e6
    wild["ids"][1], wild["labels"][4] = wild["ids"][4].clone(), wild["labels"][0].clone()
    assert torch.equal(log_probs(retrain(m, wild, keep, **kw), data), want)
    assert not torch.equal(log_probs(retrain(m, data, **kw), data), want)
    with pytest.raises(CapnbError): retrain(m, data, np.zeros(5, bool))


def test_log_probs_are_a_distribution():
    "Over all captions of one word and the end the probabilities add up to less than one."
    m, data = world_of_five()
    v = data["features"][:1]
    words = [w for w in m.tokenizer.get_vocab() if w.isalpha()]
    p = log_probs(m, pack(m, v.expand(len(words), 4, 6), words)).exp()
    assert 0 < p.sum() < 1 and torch.isfinite(p).all()


def test_trak_and_tracin_of_a_sibling_by_hand():
    m, data = world_of_five()
    m = m.double(); data = {k: v.double() if v.is_floating_point() else v for k, v in data.items()}
    T = (data["labels"] >= 0).sum(1).tolist()
    fast = {k: captioner_scores([m], caption_log_probs, data, data, (T, T), k, dim=64) for k in ("trak", "tracin")}
    P = torch.cat([torch.randn(min(4096, s), 64, generator=g, dtype=torch.float64) for g in [torch.Generator().manual_seed(0)] for s in split(sum(p.numel() for p in m.parameters()))])/8

    def gradient(i, trak):
        m.zero_grad(); l = caption_log_probs(m, data, [i])[0]/T[i]
        (torch.log(l.exp()/(1 - l.exp())) if trak else l).backward()
        return torch.cat([torch.zeros(p.numel(), dtype=torch.float64) if p.grad is None else p.grad.flatten() for p in m.parameters()])
    g = torch.stack([gradient(i, False) @ P for i in range(5)])
    np.testing.assert_allclose(fast["tracin"], (g @ g.T).numpy(), rtol=1e-6, atol=1e-9)
    g = torch.stack([gradient(i, True) @ P for i in range(5)])
    K = sum(torch.outer(r, r) for r in g); K += 1e-3*K.diagonal().mean()*torch.eye(64)
    p = (log_probs(m, data)/torch.tensor(T)).exp()
    np.testing.assert_allclose(fast["trak"], (g @ torch.linalg.inv(K) @ g.T*(1 - p)).numpy(), rtol=1e-4, atol=1e-6)
    assert (fast["trak"].argmax(1) == np.arange(5)).all()


def split(n): return [4096]*(n//4096) + [n % 4096]*bool(n % 4096)


def test_wrong_attributions_are_refused():
    short = lambda q, F, P: bm25(dict(list(q.captions.items())[:3]), F.captions)
    with pytest.raises(DataError): benchmark(short, 0, 1)
    with pytest.raises(CapnbError): benchmark(by_chance(), 0, 9)
    with pytest.raises(CapnbError): benchmark(by_chance(), 0, 1, shuffle="weights")
    with pytest.raises(DataError): paired([dict(method="a", seed=0, lds=.1)], "a", "b", "lds")


def test_shuffling_keeps_everything_but_the_link():
    w = make_world(2, 1)
    for what in ("captions", "images"):
        P, F = shuffled(w.pretrain, w.finetune, what, 1)
        field = "captions" if what == "captions" else "scenes"
        text = lambda s: sorted(map(str, getattr(s, field).values()))
        assert sorted(text(P) + text(F)) == sorted(text(w.pretrain) + text(w.finetune)) and list(P.captions) == list(w.pretrain.captions)
        assert getattr(F, field) != getattr(w.finetune, field)


def test_quanda_and_dattri_views():
    w = make_world(2, 1)
    a = by_look_up(bm25)(w.queries, w.finetune)
    assert a.to_dattri().shape == (100, 16) and torch.equal(a.to_quanda(), a.to_dattri().T)
    r = relation_only(by_look_up(tuple_overlap))(w.queries, w.finetune)
    assert isinstance(r, Attribution) and (r.dense() <= tuple_overlap(w.queries.captions, w.finetune.captions, 100).dense() + 1e-12).all()
