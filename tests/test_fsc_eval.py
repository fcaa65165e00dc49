"Evaluation of dual encoders: strict marks, the Scenes suite against its oracle, readers on odd files, forgetting reports."
import csv, io, json, random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from capnb.core.errors import CapnbError, ConfigError, DataError, MetricError
from capnb.data.records import CaptionDataset, Record
from capnb.data.scene_oracle import read_caption
from capnb.data.scene_text import plural
from capnb.data.scene_world import CATEGORIES, DOMAINS, SUBTYPE_OF, held_out, lot
from capnb.fsc_clip.forgetting import change, forgetting_page, forgetting_report
from capnb.fsc_clip.image_sets import ARO, SETS, comp, read_eqben, read_imagecode, read_spec, read_svo, read_winoground
from capnb.fsc_clip.items import Crop, Item, Items, Looked, chance_of, mark, open_key, score_items, wins
from capnb.fsc_clip.real_images import blinded, negative_items, pair_items
from capnb.fsc_clip.real_sets import class_set, retrieval_marks, score_classes
from capnb.fsc_clip.suite import CLASSES, SUITE, TASKS, clip_suite, suite_items, suite_means, suite_picture, suite_scene
from capnb.fsc_clip.text_sets import order_shuffles, plain_words, read_aro_order, read_aro_vg, read_crepe, read_sugarcrepe, read_valse, read_vl_checklist, read_whatsup
from capnb.fsc_clip.zero_shot import found_at, retrieve


class Table:
    "A dual encoder with given vectors; images are their keys."
    def __init__(self, v, t): self.v, self.t, self.asked = v, t, []
    def encode_images(self, images): self.asked.append(len(images)); return torch.stack([torch.as_tensor(self.v[images[i]]) for i in range(len(images))])
    def encode_texts(self, texts): self.asked.append(len(texts)); return torch.stack([torch.as_tensor(self.t[x]) for x in texts])


class Hashed:
    "A random but fixed unit vector for everything."
    def __init__(self, d=24): self.d = d
    def _v(self, x): return normalize(torch.randn(self.d, generator=torch.Generator().manual_seed(lot("h", x))), dim=0)
    def encode_images(self, images): return torch.stack([self._v(images[i]) for i in range(len(images))])
    def encode_texts(self, texts): return torch.stack([self._v(x) for x in texts])


# ---- strict marks

def test_winoground_scores_are_the_published_ones():
    "Against the four comparisons as their authors write them."
    rng = np.random.default_rng(0)
    for n in range(300):
        z = rng.integers(0, 4, (2, 2))/8. if n % 2 else rng.random((2, 2))
        # vectors with these cosines: images e1, e2; texts have the columns of z and a rest of their own
        v = {"i0": np.eye(4)[0], "i1": np.eye(4)[1]}
        t = {f"t{j}": np.r_[z[:, j], np.eye(2)[j]*np.sqrt(max(0., 1 - (z[:, j]**2).sum()))] for j in range(2)}
        if any(abs(np.linalg.norm(x) - 1) > 1e-9 for x in t.values()): continue
        rows = score_items(Table(v, t), [Item("x", ("i0", "i1"), ("t0", "t1"), ((0, 0), (1, 1)), "k", "group")], load=lambda k: k)
        text, image = bool(z[0, 0] > z[0, 1] and z[1, 1] > z[1, 0]), bool(z[0, 0] > z[1, 0] and z[1, 1] > z[0, 1])
        assert (rows["i2t"]["right"], rows["t2i"]["right"], rows["group"]["right"]) == ([text], [image], [text and image])


def test_a_constant_model_gets_nothing():
    one = {k: np.ones(3)/3**.5 for k in ("a", "b", "x", "y")}
    rows = score_items(Table(one, one), [Item("0", ("a", "b"), ("x", "y"), ((0, 0), (1, 1)), "", "group")], load=lambda k: k)
    assert all(r["accuracy"] == 0 for r in rows.values())


@pytest.mark.parametrize("where", ["image", "text"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_silent_nan(where, bad):
    v, t = {"a": np.array([1., 0])}, {"x": np.array([1., 0]), "y": np.array([0., 1])}
    (v if where == "image" else t)["a" if where == "image" else "y"] = np.array([bad, 0])
    with pytest.raises(MetricError, match=f"{where} is not a number"): score_items(Table(v, t), [Item("0", ("a",), ("x", "y"), ((0, 0),))], load=lambda k: k)


def test_every_image_and_text_is_encoded_once():
    v, t = {k: np.eye(4)[i] for i, k in enumerate("ab")}, {k: np.eye(4)[i] for i, k in enumerate(("x", "y", "z"))}
    model = Table(v, t)
    score_items(model, [Item(str(i), ("a", "b")[:1 + i % 2], ("x", "y", "z")[:2 + i % 2], ((0, 0),)) for i in range(40)], load=lambda k: k)
    assert model.asked == [2, 3]


def test_order_of_items_and_of_texts_does_not_matter():
    items = [Item(f"{i}", (f"im{i}",), (f"a{i}", f"b{i}", f"c{i}"), ((0, 0),), str(i % 3)) for i in range(60)]
    turned = [Item(i.id, i.images, i.texts[::-1], ((0, 2),), i.kind) for i in items[::-1]]
    a, b = (score_items(Hashed(), x, load=lambda k: k)["i2t"] for x in (items, turned))
    assert dict(zip(a["ids"], a["right"])) == dict(zip(b["ids"], b["right"])) and a["answer"] == b["answer"][::-1] and abs(a["accuracy"] - 1/3) < .2


def test_several_right_pairs():
    "Two true texts of three: the best of them must win; a text true of all images asks nothing."
    z = np.array([[.1, .9, .5], [.3, .2, .8]])
    R = np.array([[True, True, False], [True, False, True]])
    assert wins(z, R)[1].tolist() == [True, True] and wins(z.T, R.T)[0].tolist() == [False, True, True]
    assert chance_of(R, "i2t") == pytest.approx(4/9) and chance_of(np.ones((2, 2), bool)) == 1.


def test_bad_items_are_named():
    for item in (Item("q7", ("a",), ("x",), ()), Item("q7", ("a",), ("x",), ((1, 0),)), Item("q7", ("a",), ("x",), ((0, 0),), "", "both")):
        with pytest.raises(DataError, match="q7"): Items([item], "mine")


# ---- the Scenes suite

@pytest.mark.parametrize("domain", DOMAINS)
def test_oracle_agrees_with_every_item(domain):
    for task in TASKS:
        if task == "shuffle": continue
        for item in suite_items(task, 16, seed=11, domain=domain):
            scenes = [suite_scene(k) for k in item.images]
            assert item.truth().tolist() == [[not read_caption(t, s).hallucinated for t in item.texts] for s in scenes], item
            assert len({suite_picture(k).tobytes() for k in item.images}) == len(item.images)
            if domain != "target": assert not any(held_out(t.category, t.colour) for s in scenes for t in s.things)
            assert all(0 <= x and 0 <= y and x + w <= 64 and y + h <= 64 for s in scenes for t in s.things for x, y, w, h in t.boxes)


@pytest.mark.parametrize("task", ["binding", "order", "swap"])
def test_same_words_in_another_order(task):
    for item in suite_items(task, 30, seed=3):
        words = [sorted("a" if w == "an" else w for w in t.split()) for t in item.texts]
        assert words[0] == words[1] and item.texts[0] != item.texts[1]


def test_suite_is_seeded_and_grows():
    assert suite_items("relation", 5, 1) == suite_items("relation", 9, 1)[:5] and suite_items("relation", 5, 1) != suite_items("relation", 5, 2)
    assert all(len({i.texts for i in suite_items(t, 60)}) > 50 for t in TASKS)


NOUNS = {f: w for w in [*CATEGORIES, *SUBTYPE_OF] for f in (w, plural(w))}


class Knows:
    "Knows what is true of which scene, by the oracle: an image's vector has a one for every true text."
    def __init__(self): self.texts = []
    def encode_images(self, images):
        keys = [images[i] for i in range(len(images))]; rows = np.zeros((len(keys), len(self.texts)))
        for i, k in enumerate(keys):
            scene = suite_scene(k); kinds = {n for t in scene.things for n in (t.category, t.subtype)}
            for j, t in enumerate(self.texts):
                said = {NOUNS[w] for w in t.lower().rstrip(".").split() if w in NOUNS}
                if said <= kinds: rows[i, j] = not read_caption(t, scene).hallucinated
        return normalize(torch.tensor(rows), dim=-1)
    def encode_texts(self, texts):
        new = list(texts)
        if new != self.texts: self.texts = new; raise _Again
        return torch.eye(len(new), dtype=torch.double)


class _Again(Exception): pass


def test_a_model_that_knows_the_truth_wins_everything():
    tasks = tuple(t for t in SUITE if t != "shuffle")
    model = Knows(); images, model.encode_images = model.encode_images, lambda x: torch.ones(len(x), 1)
    with pytest.raises(_Again): clip_suite(model, seed=5, n=5, tasks=tasks, load=lambda k: k)  # first look: which texts there are
    model.encode_images = images
    marks = clip_suite(model, seed=5, n=5, tasks=tasks, load=lambda k: k)
    assert {k: r["accuracy"] for k, r in marks.items() if r["accuracy"] < 1} == {} and set(suite_means(marks).values()) == {1.}


def test_a_random_model_is_at_chance():
    marks = clip_suite(Hashed(), seed=1, n=100, tasks=(*TASKS, "zero-shot count", "zero-shot background"), load=lambda k: k)
    for k, r in marks.items(): assert r["low"] - .05 < r["chance"] < r["high"] + .05, (k, r["accuracy"], r["chance"])


def test_suite_is_plain_data_and_names_its_tasks():
    marks = clip_suite(Hashed(), n=6, load=lambda k: k)
    assert json.loads(json.dumps(marks)) == marks and len(marks) == 28
    assert all(len(r["ids"]) == len(r["right"]) == r["n"] for r in marks.values())
    assert {f"{t} {s}" for t in TASKS if t != "shuffle" for s in ("i2t", "t2i", "group")} | {f"zero-shot {c}" for c in CLASSES} <= set(marks)
    with pytest.raises(ConfigError, match="no task 'colour'"): clip_suite(Hashed(), tasks=("colour",))
    with pytest.raises(ConfigError): suite_items("binding", 0)


# ---- forgetting

def test_change_is_antisymmetric_and_covers():
    rng = np.random.default_rng(1)
    for n in (1, 2, 7, 50, 400):
        a, b = rng.integers(0, 2, (2, n))
        d, e = change(a, b), change(b, a)
        assert d["change"] == -e["change"] and d["p"] == e["p"] and d["low"] == pytest.approx(-e["high"]) and (d["lost"], d["gained"]) == (e["gained"], e["lost"])
        assert -1 <= d["low"] <= d["high"] <= 1 and 0 <= d["p"] <= 1
    assert change([1]*30, [0]*30)["high"] < -.7 and change([1]*30, [0]*30)["p"] < 1e-6
    with pytest.raises(MetricError): change([], [])
    with pytest.raises(MetricError): change([1, 0], [1])


def test_report_survives_a_file_and_finds_the_lost_class():
    labels = [f"c{i % 10}" for i in range(400)]
    rng = np.random.default_rng(2)
    right = (rng.random(400) < .9).astype(int)
    after = np.where([l == "c3" for l in labels], 0, right)
    rows = [dict(t=mark("t", range(400), r, labels, query=list(map(str, range(400))), truth=labels, answer=labels) | dict(group="zero-shot", score="class")) for r in (right, after)]
    report = forgetting_report(*json.loads(json.dumps(rows)), headline="t")
    assert report["headline"]["classes"][0]["label"] == "c3" and report["headline"]["classes"][0]["after"] == 0
    assert sum(r["high"] < 0 for r in report["classes"]) == 1 and report["classes"][0]["holm"] < .01 and {e["label"] for e in report["examples"]} == {"c3"}
    assert all(r["holm"] >= r["p"] for r in report["tasks"] + report["classes"])
    assert json.loads(json.dumps(report)) == report


def test_page_escapes_everything():
    evil = "</p><script>alert(1)</script>{x}%s&amp;"
    a = {evil: mark(evil, range(30), [1]*30, [evil, "b"]*15, query=[evil]*30, truth=[evil]*30, answer=[evil]*30) | dict(group=evil, score="class")}
    b = {evil: a[evil] | dict(right=[0]*30)}
    page = forgetting_page(forgetting_report(a, b, evil), title=evil, byline=evil).html()
    assert "<script" not in page and "&lt;script&gt;" in page
    pictures = forgetting_page(forgetting_report(a, b, evil), lambda k: Image.new("RGB", (8, 8))).html()
    assert "<script" not in pictures and pictures.count("<img") >= 2


# ---- zero-shot and retrieval

def test_retrieval_against_a_plain_loop():
    rng = np.random.default_rng(3)
    v, t = (normalize(torch.tensor(rng.standard_normal((n, 5))), dim=-1) for n in (13, 31))
    R = rng.random((13, 31)) < .1; R[:, 0] = False; R[0, 1] = True
    seen = Looked(Table(dict(zip(map(str, range(13)), v)), dict(zip(map(str, range(31)), t))), list(map(str, range(13))), list(map(str, range(31))), load=lambda k: k)
    for block in (1, 4, 256):
        out = retrieve(seen, list(map(str, range(13))), list(map(str, range(31))), R, (1, 3), block=block)
        for way, z, r in (("i2t", (v @ t.T).numpy(), R), ("t2i", (t @ v.T).numpy(), R.T)):
            for k in (1, 3):
                want = [sum(not b and s >= max(s2 for s2, b2 in zip(row, right) if b2) for s, b in zip(row, right)) < k for row, right in zip(z, r) if right.any()]
                assert out[f"retrieval {way} R@{k}"]["right"] == list(map(int, want))
            top = [row.argmax() for row, right in zip(z, r) if right.any()]
            assert out[f"retrieval {way} R@1"]["answer"] == [str(j) for j in top]
    with pytest.raises(MetricError): retrieve(seen, ["0"], ["0"], np.zeros((1, 1), bool))


def test_duplicate_captions_and_class_names():
    data = CaptionDataset.from_records([Record(i, lambda: Image.new("RGB", (4, 4)), ["a dog", "a dog"] if i % 2 else ["a dog", f"cat {i}"]) for i in range(4)])
    class Same:
        encode_images = lambda self, images: torch.stack([images[i] is not None and torch.tensor([1., 0]) for i in range(len(images))])
        encode_texts = lambda self, texts: torch.tensor([[1., 0] if t == "a dog" else [0, 1.] for t in texts])
    rows = retrieval_marks(Same(), data)
    assert rows["retrieval t2i R@1"]["n"] == 3 and rows["retrieval i2t R@1"]["accuracy"] == 1
    assert rows["retrieval t2i R@1"]["right"][0] == 1 and rows["retrieval t2i R@1"]["right"][1:] == [0, 0]  # all images tie for "cat 0"
    class Set:
        classes = ["missile", "dog", "missile"]
        def __len__(self): return 3
        def __getitem__(self, i): return Image.new("RGB", (4, 4)), i
    row = score_classes(Same(), class_set(Set(), "s", templates=["a {c}"]))
    assert row["chance"] == .5 and row["n"] == 3 and row["right"] == [0, 1, 0] and row["class_mean"] == .5


# ---- readers

@pytest.fixture
def place(tmp_path):
    (tmp_path / "im").mkdir()
    for n in ("1.jpg", "2.jpg", "000000000001.jpg"): Image.new("RGB", (30, 20), "red").save(tmp_path / "im" / n)
    return tmp_path


def put(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


GOOD = {read_sugarcrepe: ("swap_obj.json", {"0": dict(filename="1.jpg", caption="Ein Hund – ü", negative_caption="B")}),
        read_aro_vg: ("visual_genome_relation.json", [dict(image_path="1.jpg", bbox_x=0, bbox_y=0, bbox_w=5, bbox_h=5, true_caption="a", false_caption="b", relation_name="on")]),
        read_valse: ("plurals.json", {"p": dict(image_file="1.jpg", caption="a", foil="b", mturk=dict(caption=2))}),
        read_vl_checklist: ("color.json", [["1.jpg", dict(POS=["a"], NEG=["b"])]]),
        read_whatsup: ("vg_qa_one_obj.json", [[1, "a", "b"]]),
        read_winoground: ("examples.jsonl", json.dumps(dict(image_0="1", image_1="2", caption_0="a", caption_1="b"))),
        read_eqben: ("eqben.json", [dict(image0="1.jpg", image1="2.jpg", caption0="a", caption1="b")]),
        read_svo: ("svo_probes.csv", "sentence,pos_image_id,neg_image_id,subj_neg,verb_neg,obj_neg\na,1,2,False,False,True\n"),
        read_crepe: ("prod_vg_hard_negs_atom_complexity_4.csv", "image_id,x,y,width,height,caption,hard_negs\n1,0,0,5,5,a,\"['b', 'c']\"\n")}


@pytest.mark.parametrize("read", GOOD, ids=lambda f: f.__name__)
def test_reader_on_good_missing_and_broken_files(read, place):
    name, value = GOOD[read]
    items = read(put(place / name, value), place / "im")
    assert len(items) == 1 and not items.skipped and items[0].right[0] == (0, 0) and items.name
    rows = score_items(Hashed(), items, load=str)
    assert rows["counts"]["n"] == 1 and rows["counts"]["chance"] is not None
    open_key(items[0].images[0]).load()
    (place / "none").mkdir()
    with pytest.raises(DataError) as e: read(place / name, place / "none")
    assert "missing image" in str(e.value) and "none" in str(e.value)
    with pytest.raises(DataError, match="no such file"): read(place / f"nowhere_{name}", place / "im")
    if name.endswith(".json"):
        for broken in ("", "{", "[1]" if isinstance(value, list) else '{"0": 1}', json.dumps([{}] if isinstance(value, list) else {"0": {}})):
            with pytest.raises(CapnbError) as e: read(put(place / "broken" / name, broken), place / "im")
            assert name in str(e.value)


def test_missing_images_are_counted_and_the_rest_is_read(place):
    rows = io.StringIO(); w = csv.writer(rows); w.writerow("index sentence pos_image_id neg_image_id subj_neg verb_neg obj_neg".split())
    for i in range(50): w.writerow([i, f"s {i}", 1, 2 if i % 5 else 99, "True", "False", "False"])
    items = read_svo(put(place / "svo_probes.csv", rows.getvalue()), place / "im")
    assert len(items) == 40 and items.skipped == {"missing image": 10} and "10 missing image" in repr(items)
    got = score_items(Hashed(), items, load=str)
    assert got["t2i"]["n"] == 40 and "i2t" not in got


def test_eqben_cap_is_seeded(place):
    f = put(place / "e.json", [dict(image0="1.jpg", image1="2.jpg", caption0=f"a{i}", caption1="b") for i in range(300)])
    ids = lambda **kw: [i.id for i in read_eqben(f, place / "im", **kw)]
    assert len(ids()) == 300 and len(ids(limit=100)) == 100 and ids(limit=100) == ids(limit=100) != ids(limit=100, seed=1) and set(ids(limit=50)) < set(ids(limit=100))
    import inspect
    assert inspect.signature(read_eqben).parameters["limit"].default == 20_000


def test_spec_and_imagecode_ask_the_right_way(place):
    (place / "im/s").mkdir()
    for k in (*range(10), "x"): Image.new("RGB", (4, 4)).save(place / f"im/s/img{k}.jpg")
    items = read_imagecode(put(place / "v.json", {"s": {"3": "x", "9": "y"}}), place / "im")
    assert [i.right for i in items] == [((3, 0),), ((9, 0),)] and all(len(i.images) == 10 for i in items)
    rows = score_items(Hashed(), items, load=str)
    assert "i2t" not in rows and rows["t2i"]["chance"] == pytest.approx(.1)
    put(place / "im/sub/image2text.json", [dict(query="9.jpg", keys=["a", "b", "c"], label=3)])
    with pytest.raises(DataError, match="label 3"): read_spec(place / "im")


def test_order_shuffles_keep_words_and_seed(place):
    tag = lambda texts: [[(w, random.Random(w).choice(["NN", "JJ", "IN", "VBZ", "NNS"])) for w in t.split()] for t in texts]
    text = "one two three four five six seven eight nine ten eleven"
    made = order_shuffles(tag([text])[0])
    assert len(made) == 4 and all(sorted(m.split()) == sorted(text.split()) for m in made) and made == order_shuffles(tag([text])[0]) != order_shuffles(tag([text])[0], 1)
    f = put(place / "flickr30k_test.json", [dict(image="1.jpg", caption=[text.title() + "!", "Two words."]), dict(image="gone.jpg", caption=["a b c"])])
    items = read_aro_order(f, place / "im", tags=tag)
    assert items.name == "Flickr-Order" and all(t == plain_words(t) for i in items for t in i.texts) and items.skipped["missing image"] == 1
    assert all(i.texts[0] not in i.texts[1:] and len(set(i.texts)) == len(i.texts) for i in items)


def test_comp_needs_all_eleven():
    values = {s: i/11 for i, s in enumerate(SETS)}
    assert len(SETS) == 11 and comp(values) == pytest.approx(5/11)
    for s in SETS:
        with pytest.raises(ConfigError, match=s): comp({k: v for k, v in values.items() if k != s})
    parts = {k: v for k, v in values.items() if k != "ARO"} | dict.fromkeys(ARO[:3], .5)
    with pytest.raises(ConfigError, match="Flickr-Order"): comp(parts)
    with pytest.raises(ConfigError, match="not a number"): comp(values | {"SPEC": float("nan")})


def test_crop_keeps_to_the_box(place):
    im = Image.new("RGB", (30, 20), "red"); im.paste("blue", (10, 5, 15, 10)); im.save(place / "im/box.png")
    assert open_key(Crop(str(place / "im/box.png"), (10, 5, 5, 5))).getcolors() == [(25, (0, 0, 255))]


# ---- real images

def test_sugarcrepe_as_published(shared, tmp_path):
    folder = shared / "data/sugarcrepe"
    if not folder.is_dir(): pytest.skip("no SugarCrepe here")
    files = {f.stem: json.loads(f.read_text()) for f in folder.glob("*.json")}
    assert sum(map(len, files.values())) == 7511 and len(files) == 7
    (tmp_path / "im").mkdir()
    with pytest.raises(DataError, match="7511 missing image"): read_sugarcrepe(folder, tmp_path / "im")
    some = {e["filename"] for e in random.Random(0).sample(list(files["swap_att"].values()), 5)}
    for n in some: Image.new("RGB", (8, 8)).save(tmp_path / "im" / n)
    items = read_sugarcrepe(folder, tmp_path / "im")
    want = [(k, e) for k, f in files.items() for e in f.values() if e["filename"] in some]
    assert len(items) == len(want) >= 5 and items.skipped["missing image"] == 7511 - len(want) and {i.texts for i in items} == {(e["caption"], e["negative_caption"]) for _, e in want}


def test_pairs_and_negatives_of_photographs(shared):
    from capnb.data.coco import read_coco
    coco = shared / "data/coco"
    if not coco.is_dir(): pytest.skip("no COCO here")
    data = read_coco(coco / "captions.json", coco / "images").subset(range(6))
    items = negative_items(data)
    assert len({i.kind for i in items}) >= 5 and {i.images[0] for i in items} <= {str(i) for i in data.ids} and all(i.texts[0] in data.captions(list(map(str, data.ids)).index(i.images[0])) for i in items)
    seen = Looked(Hashed(), [k for i in items for k in i.images], [t for i in items for t in i.texts], load=str)
    marks, dark = score_items(seen, items)["i2t"], score_items(blinded(seen), items)["i2t"]
    assert marks["ids"] == dark["ids"] and .2 < marks["accuracy"] < .8 and np.ptp(blinded(seen).v, axis=0).max() == 0


def test_name_pairs_do_not_mix_styles():
    record = lambda id, name, domain: Record(id, lambda: Image.new("RGB", (4, 4)), [name], domain)
    data = CaptionDataset.from_records([record(f"{d}{c}", f"{c} heart", d) for d in "ab" for c in ("red", "blue", "green")])
    items = pair_items(data)
    assert len(items) == 4 and all(i.images[0][0] == i.images[1][0] and i.kind == "colour" for i in items)
