"Hard negatives: on any text, in any order, and never the caption again."
import json, os, random, re, subprocess, sys
from importlib import metadata
from types import SimpleNamespace

import pytest
from conftest import PYTHON, ROOT, python_env

from capnb.core.errors import CapnbError
from capnb.data.scenes import Scenes
from capnb.fsc_clip.lexicon import indefinite, lexicon
from capnb.fsc_clip.negatives import FAMILIES, KINDS, HardNegatives, StoredNegatives, WithNegatives, precompute, read_negatives
from capnb.fsc_clip.plausible import CaptionModel, Plausible
from capnb.fsc_clip.swap import Negative, alike
from capnb.fsc_clip.tagged import analyse, meaning, tagged_from_json, tagged_to_json

SENTENCES = [
    "A man in a black hat is holding an old umbrella near a red bus.", "Two dogs are lying on a small sofa and a cat sleeps under the table.",
    "There is a woman with her dog on the beach.", "An orange cat sits to the left of a white cup.", "Three boys play soccer in a green field while a girl watches.",
    "A plate of pizza and a glass of beer on a wooden table.", "The hot dog is next to two oranges.", "A teddy bear that is wearing a tie.",
    "A woman wearing a dress and holding an umbrella.", "Two girls catching a ball and throwing a frisbee.", "A man walks and a dog sits.",
    "Some people ride horses up a steep hill.", "A kitchen with no window and an open door."]
ODD = ["", " ", ".", "a", "A dog", "DOGS RUN ON THE RED GRASS", "un chien sur le canapé", "\ud83d\udc36 a dog \U0001f436 on a couch", "a dog\non a   couch", "dog " * 300,
       "A \"big\" dog -- on (a) couch's arm; isn't it?", "1 dog, 2 cats & 03 birds", "\u4e00\u53ea\u72d7", "an an an a a a", "and and with on under"]
ODD = [c.encode("utf-8", "ignore").decode() for c in ODD]
ALL = list(KINDS.table)


@pytest.fixture(scope="module")
def parsed():
    texts = SENTENCES + ODD + [c for d in ("source", "target", "near", "out") for r in Scenes(d, 12, split="test") for c in r.captions[:3]]
    return analyse(texts)


@pytest.mark.parametrize("kind", ALL)
def test_every_negative_is_another_well_formed_caption(parsed, kind):
    make, given = HardNegatives(kind, per_caption=4, each=4), 0
    for t in parsed:
        found = make.of(t)
        given += len(found)
        assert len({n.lower() for n in found} | {t.text.lower()}) == len(found) + 1
        for n in found:
            assert isinstance(n, Negative) and n.kind == kind and n.strip() and not re.search(r"  | [.,]$", n) or re.search(r"  | [.,]$", t.text)
            assert len(n.spans) == len(n.source) > 0 and all(0 <= a <= b <= len(n) for a, b in n.spans) and all(0 <= a <= b <= len(t.text) for a, b in n.source)
            # outside the spans nothing but articles has changed
            kept = lambda s, spans: re.sub(r"(?i)\b(an|a)\b|\s", "", "".join(s[b:c] for (_, b), (c, _) in zip([(0, 0), *spans], [*spans, (len(s), 0)]))).lower()
            if kind != "negation": assert kept(n, n.spans) == kept(t.text, n.source), (t.text, n)
    assert given >= dict([("swap-adverb", 0), ("swap-verb", 2)]).get(kind, 5), f"{kind} gave {given}"


def test_articles_fit(parsed):
    make = HardNegatives([k for k in ALL if k != "shuffle"], per_caption=30, each=3, seed=4)
    wrong = lambda s: [m[0] for m in re.finditer(r"\b(an?)\s+([^\W\d_]+)", s, re.I) if m[1].lower() != indefinite(m[2])]
    for t in parsed:
        if t.text in SENTENCES or t.text.endswith("."):
            for n in make.of(t): assert len(wrong(n)) <= len(wrong(t.text)), (t.text, n)


def test_number_and_verbs_agree():
    make = HardNegatives("count", each=9, per_caption=9)
    found = {str(n) for n in make("Two dogs are lying on a rug that has stripes.")[0]}
    assert "A dog is lying on a rug that has stripes." in found and any("rugs that have stripes" in n for n in found)
    assert not any(re.search(r"\b(A|a|an) \w+ (are|have)\b|\b(two|three|four|five) \w+ (is|has)\b", n, re.I) for n in found)
    assert {str(n) for n in make("A man walks.")[0]} == {"Two men walk.", "Three men walk."}


@pytest.mark.parametrize("caption", ["A dog and a cat.", "A couch on a sofa.", "A dog next to a cat.", "A black dog and a white dog.",
                                     "A dog beside another dog.", "A big dog near a large cat."])
def test_a_swap_that_changes_nothing_is_no_negative(caption):
    assert HardNegatives("swap", each=4, per_caption=4)(caption) == [[]]


def test_replacements_are_neither_synonyms_nor_too_close(parsed):
    make, nouns = HardNegatives("replace", each=9, per_caption=9), lexicon()["nouns"]
    n = 0
    for t in parsed:
        for x in make.of(t):
            (a, b), (c, d) = x.spans[0], x.source[0]
            assert not alike(x[a:b].lower(), t.text[c:d].lower()); n += 1
            if x.kind == "replace-object": assert not nouns.close(x[a:b].lower()) & {w[5] for w in t.words}
    assert n > 100


def test_reparsed_negatives_state_something_else(parsed):
    "The graph of the edited text itself, read anew, differs from the caption's."
    make, same, n = HardNegatives([k for k in ALL if k not in ("shuffle", "negation")], per_caption=20), [], 0
    pairs = [(t, x) for t in parsed if t.text[-1:] == "." for x in make.of(t)]
    for (t, x), again in zip(pairs, analyse([x for _, x in pairs])):
        if meaning(again) == meaning(t): same.append((t.text, str(x), x.kind))
    print(same)
    assert len(pairs) > 200 and len(same) <= .005*len(pairs), same[:9]


def test_nothing_depends_on_order_batch_or_hash_seed(parsed):
    texts = [t.text for t in parsed][:40]
    make = HardNegatives(ALL, per_caption=5, seed=3)
    whole = make(texts, parsed[:40])
    mixed = random.Random(0).sample(range(40), 40)
    assert [make([texts[i]], [parsed[i]])[0] for i in mixed] == [whole[i] for i in mixed]
    code = ("import json,sys; from capnb.fsc_clip.negatives import *; from capnb.fsc_clip.tagged import *; "
            "t=[tagged_from_json(x) for x in json.load(sys.stdin)]; print(json.dumps(HardNegatives(list(KINDS.table), per_caption=5, seed=3)([x.text for x in t], t)))")
    given = json.dumps([tagged_to_json(t) for t in parsed[:40]])
    for k in "17":
        out = subprocess.run([PYTHON, "-c", code], input=given, capture_output=True, text=True, cwd=ROOT, env=python_env(ROOT) | {"PYTHONHASHSEED": k}, check=True).stdout
        assert json.loads(out) == whole


def test_filter_keeps_the_promise_and_its_counts():
    captions = [c for r in Scenes("source", 60) for c in r.captions]
    f = Plausible(captions)
    make = HardNegatives(["replace", "colour"], filter=f)
    assert make(captions[:20]) == make(captions[:20][::-1])[::-1] and sum(map(len, make(captions[:40]))) < sum(map(len, HardNegatives(["replace", "colour"])(captions[:40])))
    known, rest = captions[7], [c for c in captions if c != captions[7]]
    n = captions.count(known)
    if n == 1 and CaptionModel(rest).size == f.model.size: assert f.model.score(captions[3], f.model.without(known)) == pytest.approx(CaptionModel(rest).score(captions[3]), abs=.2)


def test_files_own_negatives_and_errors(tmp_path, parsed):
    make = HardNegatives(seed=5)
    texts = [t.text for t in parsed[:10]]
    precompute(texts, make, parsed[:10]).save(tmp_path / "n.json")
    again = read_negatives(tmp_path / "n.json")
    assert again(texts) == make(texts, parsed[:10]) and [[n.kind for n in f] for f in again(texts)] == [[n.kind for n in f] for f in make(texts, parsed[:10])]
    data = WithNegatives([dict(image=None, captions=["a dog", "a fox"], id=3)], {"a dog": ["a cat"], "a fox": []})
    assert data[0]["negatives"] == {"a dog": ["a cat"], "a fox": []}[data[0]["caption"]] and data[0]["id"] == 3
    (tmp_path / "list.json").write_text("[1]")
    for bad in (lambda: HardNegatives("swop"), lambda: HardNegatives([]), lambda: HardNegatives(each=0), lambda: make([3]), lambda: make(["a"], []),
                lambda: read_negatives(tmp_path / "list.json"), lambda: StoredNegatives({"a": [1]}), lambda: Plausible([])):
        with pytest.raises(CapnbError): bad()


def test_other_packages_add_kinds(monkeypatch):
    place = SimpleNamespace(name="backwards", value="test_fsc_negatives:backwards")
    real = metadata.entry_points
    monkeypatch.setattr(metadata, "entry_points", lambda **kw: [place] if kw.get("group") == "capnb.negatives" else real(**kw))
    monkeypatch.setitem(sys.modules, "test_fsc_negatives", sys.modules[__name__])
    assert HardNegatives("backwards")("a dog runs")[0] == ["runs dog a"] and "backwards" in KINDS.names()
    KINDS._loaded.pop("backwards", None)


def backwards(t, rng): yield " ".join(reversed(t.lower()))


def test_batches_for_the_objective():
    import torch
    from capnb.fsc_clip.objective import collate_negatives
    class Model:
        device = "cpu"
        def preprocess(self, images): return torch.zeros(len(images), 3, 2, 2)
        def tokenize(self, texts): return dict(ids=torch.zeros(len(texts), 4, dtype=torch.long), texts=list(texts))
    data = WithNegatives(Scenes("source", 4), HardNegatives(["replace", "swap", "shuffle"]))
    batch = collate_negatives(Model(), [data[i] for i in range(4)])
    total = sum(len(data[i]["negatives"]) for i in range(4))
    assert len(batch["texts"]) == 4 + total == 4 + len(batch["owner"]) and batch["owner"].tolist() == sorted(batch["owner"].tolist()) and total >= 4
    first = data[0]["caption"]
    data.set_epoch(1)
    assert any(data[i]["negatives"] != WithNegatives(data.records, data.negatives)[i]["negatives"] for i in range(4)) and first
