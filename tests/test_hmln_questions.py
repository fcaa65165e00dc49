"Questions with answers as evidence: true answers state what is so, wrong ones what is not; learned weights on captions."
import random

import numpy as np
import pytest

pytest.importorskip("torch")
from capnb.core.errors import DataError
from capnb.data.scene_text import short_question, yes_no
from capnb.data.scene_world import COLOURS, implied
from capnb.data.scenes import Scenes
from capnb.hmln.atoms import base_word, oriented
from capnb.hmln.caption_weights import ground_features, learn_weights
from capnb.hmln.ground import ground
from capnb.hmln.questions import answer_atoms, statement
from capnb.hmln.retrieval import Index, parsed


def true_of(scene):
    names = [{t.category, t.subtype} - {None} for t in scene.things]
    out = {(n,) for ns in names for n in ns}
    out |= {(n, "is", base_word(v)) for t, ns in zip(scene.things, names) for n in ns for v in (*t.attributes(), str(t.count))}
    return out | {oriented(n, r, m) for rel in scene.relations for a, r, b in implied(*rel) for n in names[a] for m in names[b]}


@pytest.mark.parametrize("domain", ["source", "near", "target"])
def test_answers_are_as_the_scene_is(domain):
    right = total = 0
    for k, record in enumerate(Scenes(domain, 60, split="val")):
        scene = record.truth["scene"]
        for ask in (short_question, yes_no):
            q, a = ask(scene, random.Random(900 + k))
            if "background" in q: continue
            got = answer_atoms(q, a)
            total += 1
            right += bool(got) and all((x in true_of(scene)) == bool(v) for x, v in got.items())
    assert total > 90 and right / total > .95


def test_wrong_answers_are_not():
    wrong = total = 0
    for k, record in enumerate(Scenes("source", 80, split="val")):
        scene = record.truth["scene"]
        if len({t.category for t in scene.things}) < len(scene.things): continue
        t = scene.things[0]
        got = answer_atoms(f"What color {'are' if t.count > 1 else 'is'} the {t.category}?", next(c for c in COLOURS if c != t.colour))
        total += 1
        wrong += not set(got) & true_of(scene)
    assert total > 30 and wrong / total > .95


@pytest.mark.parametrize("q, a, text, yes", [
    ("what colour are the cars", "blue", "the cars are blue", True), ("How many people are in the room?", "3", "3 people", True), ("Is there a cat on the bed?", "No", "a cat on the bed", False),
    ("Who is riding the horse?", "a woman", "a woman is riding the horse", True), ("Are the dogs small or big?", "small", "the dogs are small", True), ("Where are the birds?", "above the house", "the birds are above the house", True)])
def test_statements(q, a, text, yes):
    assert statement(q, a) == (text, yes)


def test_own_templates_come_first_and_nothing_is_guessed():
    assert statement("Season?", "winter", [(r"season", "it is {a}")]) == ("it is winter", True)
    with pytest.raises(DataError): statement("Why is the sky blue?", "physics")
    with pytest.raises(DataError): answer_atoms("", "yes")


def test_weights_of_captions_follow_the_counts():
    data = Scenes("near", 50)
    said = parsed([c for k in range(50) for c in data.captions(k)])
    index = Index(data.ids, [[[m.atom for m in said[c]] for c in data.captions(k)] for k in range(50)])
    grounds = [ground(cs[0], [(p, index.said[p]) for p, _ in index.top(cs[0], 8)], near=index.vocabulary.near) for cs in index.said[:8]]
    weights, got = learn_weights(grounds, l2=0)
    names, fs, xs = ground_features(grounds)
    share = np.array([len(x) for x in xs]) / sum(len(x) for x in xs)
    w = np.array([weights[n] for n in names])
    seen, model = (sum(s * v for s, v in zip(share, vs)) for vs in ([f.counts(x, len(w)) for f, x in zip(fs, xs)], [f.expected(w, len(w))[1] for f in fs]))
    assert got.converged and model == pytest.approx(seen, abs=1e-3)
    for f, g, x in zip(fs, grounds, xs):
        assert f.network(w).score(x) == pytest.approx(g.network(weights).score(x), abs=1e-9)
