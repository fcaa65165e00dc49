"Kendall's tau against its definition, readers of human judgements in the forms in which they circulate, and what is scored with what."
import json, math, random
from itertools import combinations

import numpy as np
import pytest

from capnb.core.errors import CapnbError, ConfigError, DataError, MetricError
from capnb.metrics.agreement import (Judgements, Pair, Pairs, human_agreement, judged, kendall_tau, metric_values, pair_agreement, read_any, read_consensus,
    read_flickr8k, read_foil, read_judgements, read_pairs)
from capnb.metrics.scores import score_captions

NOUNS, PLACES = ["dog", "cat", "man", "woman", "bus", "horse", "child", "bird"], ["on the grass", "in a street", "near the water", "at a table"]


def flickr(folder, images=12, seed=0):
    "A made-up Flickr8k: our own captions in the published layout."
    rng = random.Random(seed)
    tokens, expert, crowd = {}, [], []
    for k in range(images):
        noun, place = NOUNS[k % 8], PLACES[k // 3 % 4]
        tokens[f"{k:03}_x.jpg"] = [f"A {noun} stands {place} .", f"One {rng.choice(['small', 'big', 'old'])} {noun} {place} .", f"The {noun} is {place} today .", f"A {noun} and nobody else .", f"There is a {noun} {place} ."]
    names = list(tokens)
    for i in names:
        for other in rng.sample(names, 4):
            same = tokens[i][0].split()[1] == tokens[other][0].split()[1]
            base = 4 if other == i else 3 if same else 1
            expert.append((i, f"{other}#{rng.randrange(5)}", *(max(1, min(4, base + rng.choice([0, 0, 1]))) for _ in range(3))))
            yes = 3 if other == i else rng.choice([0, 0, 1])
            crowd.append((i, f"{other}#{rng.randrange(5)}", yes / 3, yes, 3 - yes))
    (folder / "Flickr8k.token.txt").write_text("".join(f"{i}#{k}\t{c}\n" for i, cs in tokens.items() for k, c in enumerate(cs)))
    (folder / "ExpertAnnotations.txt").write_text("".join("\t".join(map(str, r)) + "\n" for r in expert))
    (folder / "CrowdFlowerAnnotations.txt").write_text("".join(f"{i}\t{c}\t{p:.12g}\t{y}\t{n}\n" for i, c, p, y, n in crowd))
    return tokens, expert, crowd


def clipscore_form(tokens, expert):
    "What CLIPScore's preparation makes of the experts' file, by the rule alone."
    captions = {f"{i}#{k}": c for i, cs in tokens.items() for k, c in enumerate(cs)}
    out, skipped = {}, 0
    for i, c, *rs in expert:
        if captions[c] in tokens[i]: skipped += 1; continue
        at = out.setdefault(i, {"ground_truth": tokens[i], "human_judgement": []})
        at["human_judgement"] += [{"caption": captions[c], "rating": float(r)} for r in rs]
    return out, skipped


# ---- tau

def slow_tau(x, y, variant):
    pairs = list(combinations(range(len(x)), 2))
    s = sum(np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i, j in pairs)
    if variant == "c":
        m = min(len(set(x)), len(set(y)))
        return 2 * s / (len(x) ** 2 * (m - 1) / m)
    return s / math.sqrt(sum(x[i] != x[j] for i, j in pairs) * sum(y[i] != y[j] for i, j in pairs))


@pytest.mark.parametrize("variant", ["b", "c"])
def test_tau_is_its_definition(variant):
    rng = np.random.default_rng(0)
    for n, a, b in ((2, 2, 2), (5, 2, 5), (40, 3, 40), (60, 60, 4), (60, 1000, 1000), (30, 2, 2)):
        x, y = rng.integers(0, a, n) / 7, rng.integers(-b, b, n) * 1.5
        if len(set(x)) > 1 and len(set(y)) > 1:
            assert math.isclose(kendall_tau(x, y, variant), slow_tau(x, y, variant), abs_tol=1e-12)
            assert math.isclose(kendall_tau(y, x, variant), kendall_tau(x, y, variant), abs_tol=1e-12)
            assert math.isclose(kendall_tau(x, -y, variant), -kendall_tau(x, y, variant), abs_tol=1e-12)
            assert math.isclose(kendall_tau(np.exp(x), y ** 3, variant), kendall_tau(x, y, variant), abs_tol=1e-12)
    assert math.isnan(kendall_tau([1, 1], [1, 2], variant))


def test_tau_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=3000).round(2), rng.integers(1, 5, 3000)
    for v in "bc": assert math.isclose(kendall_tau(x, y, v), stats.kendalltau(x, y, variant=v)[0], abs_tol=1e-12)


def test_weights_are_repetitions():
    from capnb.metrics.agreement import _levels, _tau
    rng = np.random.default_rng(1)
    x, y, w = rng.integers(0, 9, 30), rng.integers(0, 4, 30), rng.integers(0, 4, 30)
    (cx, nx), (cy, ny) = _levels(x), _levels(y)
    for v in "bc": assert math.isclose(_tau(cx, cy, w.astype(float), nx, ny, v), slow_tau(np.repeat(x, w), np.repeat(y, w), v), abs_tol=1e-12)


# ---- Flickr8k

def test_both_layouts_are_the_same_set(tmp_path):
    tokens, expert, _ = flickr(tmp_path)
    form, skipped = clipscore_form(tokens, expert)
    (tmp_path / "flickr8k.json").write_text(json.dumps(form))
    a, b = read_flickr8k(tmp_path), read_judgements(tmp_path / "flickr8k.json")
    assert (a.images, a.captions, a.references, a.ratings, a.variant) == (b.images, b.captions, b.references, b.ratings, b.variant)
    assert a.dropped == skipped > 0 and b.dropped == 0 and sum(map(len, a.ratings)) == sum(len(v["human_judgement"]) for v in form.values())
    assert not any(c in a.references[i] for i, c in zip(a.images, a.captions))
    assert type(read_any(tmp_path)) is type(read_any(tmp_path / "flickr8k.json")) is Judgements
    assert len(read_flickr8k(tmp_path, own="keep")) > len(a)


def test_the_crowd_loses_references_instead(tmp_path):
    tokens, _, crowd = flickr(tmp_path)
    j = read_flickr8k(tmp_path / "CrowdFlowerAnnotations.txt")
    captions = {f"{i}#{k}": c for i, cs in tokens.items() for k, c in enumerate(cs)}
    want = {i: list(cs) for i, cs in tokens.items()}
    for i, c, *_ in crowd:
        if captions[c] in want[i]: want[i].remove(captions[c])
    assert j.references == {i: want[i] for i in j.references} and j.variant == "b" and j.dropped == 0 and sum(map(len, j.ratings)) == len(crowd)


@pytest.mark.parametrize("change, message", [
    (lambda t: t.replace("\t", " "), "1 columns"), (lambda t: t.replace("#0", "#9", 1).replace("#1", "#9", 1).replace("#2", "#9", 1).replace("#3", "#9", 1).replace("#4", "#9", 1), "no such caption"),
    (lambda t: t[:-2] + "5\n", "not 1, 2, 3 or 4"), (lambda t: t[:-2] + "x\n", "no number"), (lambda t: "", "no judgements"), (lambda t: "nowhere.jpg" + t[9:], "no such caption or image")])
def test_faults_of_files_are_named(tmp_path, change, message):
    flickr(tmp_path)
    path = tmp_path / "ExpertAnnotations.txt"
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=message): read_flickr8k(path)


def test_faults_of_json_are_named(tmp_path):
    path = tmp_path / "j.json"
    good = {"a": {"ground_truth": ["x y"], "human_judgement": [{"caption": "z", "rating": 1}]}}
    for bad, message in (({"a": {"ground_truth": ["x"]}}, "'a'"), ({"a": {**good["a"], "human_judgement": [{"caption": "z", "rating": "much"}]}}, "not as expected"),
                         ({"a": {**good["a"], "ground_truth": []}}, "no references"), ({}, "no judgements"), ("text", "not judgements")):
        path.write_text(json.dumps(bad))
        with pytest.raises(DataError, match=message): read_judgements(path)
    path.write_text(json.dumps({"a": {**good["a"], "human_judgement": [{"caption": "z", "rating": 1}, {"caption": "z", "rating": float("nan")}]}}))
    with pytest.raises(CapnbError): read_judgements(path)  # NaN is not JSON
    with pytest.raises(CapnbError): human_agreement(tmp_path / "missing.json")


# ---- scoring

def test_every_entry_is_scored_on_its_own_references(tmp_path):
    flickr(tmp_path)
    j = read_flickr8k(tmp_path)
    values = metric_values(j.captions, [j.references[i] for i in j.images], ["rouge_l"])["ROUGE-L"]
    for k in (0, 7, len(j) - 1):
        alone = score_captions([j.captions[k]], [j.references[j.images[k]]], ["rouge_l"]).corpus["ROUGE-L"]
        assert math.isclose(values[k], alone, abs_tol=1e-12)
    table = human_agreement(j, ["rouge_l", "cider_d"], draws=100)
    assert table["CIDEr-D"].tau > 0 and all(r.low <= r.tau <= r.high for r in table)
    y = [r for rs in j.ratings for r in rs]
    assert math.isclose(table["ROUGE-L"].tau, kendall_tau(np.repeat(values, [len(r) for r in j.ratings]), y, "c"), abs_tol=1e-12)


def test_repeating_judgements_changes_no_document_frequency(tmp_path):
    "Three ratings as three entries, as pycocoevalcap was given them, or as one: the same CIDEr-D up to n-grams no reference has."
    flickr(tmp_path)
    j = read_flickr8k(tmp_path)
    refs = [j.references[i] for i in j.images]
    one = metric_values(j.captions, refs, ["cider_d"])["CIDEr-D"]
    three = metric_values(j.captions * 3, refs * 3, ["cider_d"])["CIDEr-D"]
    assert np.corrcoef(np.tile(one, 3), three)[0, 1] > .999 and abs(kendall_tau(np.tile(one, 3), three)) > .99


def test_intervals_draw_images_not_ratings():
    "Copies of an image's ratings must not narrow the interval."
    rng = np.random.default_rng(0)
    q = rng.normal(size=60)
    def interval(copies):
        j = Judgements([k // 2 for k in range(60)], ["c"] * 60, {k: ["r"] for k in range(30)}, [[float(np.clip(round(2.5 + v), 1, 4))] * copies for v in q])
        r = human_agreement(j, {"m": q + rng.normal(size=60) * 0 + np.random.default_rng(5).normal(size=60)}, draws=300)[0]
        return r.tau, r.high - r.low
    (t1, w1), (t9, w9) = interval(1), interval(9)
    assert abs(t1 - t9) < .03 and .8 < w9 / w1 < 1.25


def test_other_peoples_values_and_bad_ones():
    j = judged([("a", "x", [1, 2]), ("a", "y", [4]), ("b", "z", [2])], {"a": ["r"], "b": ["s"]})
    t = human_agreement(j, {"up": [1, 3, 2], "down": [3, 1, 2]}, draws=0)
    assert [r.metric for r in t] == ["up", "down"] and t["up"].tau == -t["down"].tau > .5 and math.isnan(t[0].low)
    for bad, error in (({"m": [1, 2]}, MetricError), ({"m": [1, 2, None]}, MetricError)):
        with pytest.raises(error): human_agreement(j, bad)
    for kw in ({"ratings": "median"}, {"ratings": "all"}):
        with pytest.raises(ConfigError): human_agreement(j, {"m": [1, 2, 3]}, **kw)
    with pytest.raises(ConfigError): judged([], {}, own="maybe")


# ---- pairs

def test_pairs_count_what_people_and_metrics_leave_open(tmp_path):
    rng = np.random.default_rng(0)
    votes = rng.integers(0, 4, (200, 2))
    pairs = Pairs([Pair(k // 4, "a", "b", ["r"], *map(int, v), "XY"[k % 2]) for k, v in enumerate(votes)])
    x = rng.integers(0, 3, 400).astype(float)
    t = pair_agreement(pairs, {"m": x}, draws=200)
    want = [.5 if a == b or p == q else float((a > b) == (p > q)) for a, b, (p, q) in zip(x[:200], x[200:], votes)]
    assert math.isclose(t[0].accuracy, np.mean(want)) and [r.kind for r in t] == ["all", "X", "Y"] and all(r.low <= r.accuracy <= r.high for r in t)
    assert math.isclose(t[0].tied, np.mean(x[:200] == x[200:]))
    (tmp_path / "p.json").write_text(json.dumps([p._asdict() for p in pairs]))
    assert human_agreement(tmp_path / "p.json", {"m": x}, draws=200) == t
    with pytest.raises(DataError, match="no pairs"): pair_agreement(Pairs([]))


def test_pairs_are_scored_by_metrics():
    pairs = Pairs([Pair(1, "a dog runs on the grass", "a red bus", ["a dog is running on the grass"], 5, 0), Pair(2, "a dog", "a bus in a street", ["the bus is in a street"], 1, 4)])
    t = pair_agreement(pairs, ["rouge_l", "cider_d"], draws=20)
    assert t["ROUGE-L"].accuracy == 1


def foil(folder, annotations, captions):
    (folder / "foilv1.0_test_2017.json").write_text(json.dumps({"annotations": annotations}))
    (folder / "captions_val2014.json").write_text(json.dumps({"annotations": captions}))
    return folder / "foilv1.0_test_2017.json", folder / "captions_val2014.json"


def test_foil_pairs_a_caption_with_each_of_its_foils(tmp_path):
    captions = [{"image_id": i, "caption": f"Caption {k} of image {i}."} for i in (1, 2) for k in range(5)]
    entry = lambda id, i, c, f: {"id": id, "image_id": i, "caption": c, "foil": f, "target_word": "ORIG" if not f else "x", "foil_word": "ORIG" if not f else "y"}
    paths = foil(tmp_path, [entry(7, 1, "Caption 2 of image 1.", False), entry(7, 1, "Foil one.", True), entry(7, 1, "Foil two.", True), entry(9, 2, "Caption 0 of image 2.", False), entry(9, 2, "Foil three.", True)], captions)
    pairs = read_foil(*paths)
    assert [(p.image, p.b) for p in pairs] == [(1, "Foil one."), (1, "Foil two."), (2, "Foil three.")]
    assert all(len(p.references) == 4 and p.a not in p.references and (p.votes_a, p.votes_b) == (1, 0) for p in pairs)
    assert [len(p.references) for p in read_foil(*paths, references=1)] == [1, 1, 1]
    with pytest.raises(DataError, match="no true caption"): read_foil(*foil(tmp_path, [entry(7, 1, "Foil.", True)], captions))
    with pytest.raises(DataError, match="no other references"): read_foil(*foil(tmp_path, [entry(7, 3, "x", False)], captions))
    with pytest.raises(DataError, match="not as expected"): read_foil(*foil(tmp_path, [{"id": 1}], captions))


def test_consensus_files_of_matlab(tmp_path):
    io = pytest.importorskip("scipy.io", reason="scipy is not installed, and .mat files are read with it")
    def struct(rows):
        out = np.zeros((1, len(rows)), [(f"f{k}", object) for k in range(len(rows[0]))])
        out[0, :] = rows
        return out
    cell = lambda t: np.array([[t]], object)
    rng = random.Random(0)
    pairs = [(f"{k // 2}.jpg", f"caption one of {k}", f" caption two of {k} ") for k in range(6)]
    votes = [[rng.choice([1, -1]) for _ in range(48)] for _ in pairs]
    rows = [(cell(f"reference {n} of {k}"), cell(b), cell(c), votes[k][n]) for k, (_, b, c) in enumerate(pairs) for n in range(48)]
    io.savemat(tmp_path / "consensus_pascal.mat", {"triplets": struct(rows)})
    io.savemat(tmp_path / "pair_pascal.mat", {"new_input": struct(pairs), "category": np.array([[1, 2, 3, 4, 1, 2]])})
    got = read_any(tmp_path / "consensus_pascal.mat")
    assert [(p.image, p.a, p.b, p.kind) for p in got] == [(i, b.strip(), c.strip(), k) for (i, b, c), k in zip(pairs, ["HC", "HI", "HM", "MM", "HC", "HI"])]
    assert [(p.votes_a, p.votes_b) for p in got] == [(v.count(1), v.count(-1)) for v in votes] and all(len(set(p.references)) == 5 for p in got)
    assert got == read_consensus(tmp_path / "consensus_pascal.mat") != read_consensus(tmp_path / "consensus_pascal.mat", seed=1)
    io.savemat(tmp_path / "pair_pascal.mat", {"new_input": struct(pairs[:2]), "category": np.array([[1, 2]])})
    with pytest.raises(DataError, match="2 categories for 6 pairs"): read_consensus(tmp_path / "consensus_pascal.mat")
    io.savemat(tmp_path / "consensus_abstract.mat", {"triplets": struct(rows[:96])})
    assert [p.kind for p in read_consensus(tmp_path / "consensus_abstract.mat")] == ["", ""]
    io.savemat(tmp_path / "x.mat", {"other": 1})
    with pytest.raises(DataError, match="no field 'triplets'"): read_consensus(tmp_path / "x.mat")


def test_pairs_of_ones_own_are_checked(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps([{"image": 1, "a": "x", "b": "y", "references": ["r"], "votes_a": 1}]))
    with pytest.raises(DataError, match="no votes_b.*number 0"): read_pairs(tmp_path / "p.json")
