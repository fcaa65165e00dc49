"Probes and retention: measures of a model that was changed, and the figure that joins them."
import dataclasses, math, random

import numpy as np
import pytest
import torch

from capnb.core.errors import ConfigError, DataError, MetricError
from capnb.data.records import Record
from capnb.data.scene_text import INSTRUCTIONS, captions, short_question
from capnb.data.scene_world import CATEGORIES
from capnb.data.scenes import Scenes
from capnb.metrics.inputs import Measure
from capnb.metrics.style_match import style_distance
from capnb.models.tiny import load_tiny
from capnb.personalize.probes import answer_probes, answers, by_image, is_right, make_probes, objects_of, probes_from_instances, short_kind, yes_no_kinds
from capnb.personalize.retention import Retention, counted, false_objects, group_of, kept, kept_interval, kept_share, shares
from capnb.tune.methods import attach


class Says:
    "A captioner that answers by rule"
    def __init__(self, rule): self.rule = rule
    def encode(self, records, keys=None): return list(records)
    def caption(self, images, prompts, **kw): return [self.rule(r, q) for r, q in zip(images, prompts)]


@pytest.fixture(scope="module")
def base():
    c = load_tiny()
    c.template_ = dataclasses.replace(c.template_, instruction=INSTRUCTIONS["sentence"][0])
    return c


@pytest.fixture(scope="module")
def retention(base): return Retention(base, n=6, seed=5)


def same(a, b): return a.keys() == b.keys() and all(a[k].value == b[k].value and a[k].per_image == b[k].per_image for k in a)


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("held_out", [False, True])
def test_probes_are_true_balanced_and_of_their_kind(seed, held_out):
    probes = make_probes(60, seed, held_out)
    for p in probes:
        scene, q = p.image.truth["scene"], p.question
        wordings = INSTRUCTIONS[p.kind.split(" ")[0]]
        fits = [w for w in wordings if q.startswith(w.split("{q}")[0]) and q.endswith(w.split("{q}")[1])]
        assert (wordings[-1] in fits) if held_out else any(w in fits for w in wordings[:-1])
        kind, sort = p.kind.split(" ")[1], p.kind.split(" ")[0]
        if sort == "yes/no" and kind != "relation":
            colour, category = q.split("Is there ")[1].split("?")[0].split(" ")[1:]
            there = {t.category: t.colour for t in scene.things}
            assert (there.get(category) == colour) == (p.answer == "yes")
            if p.answer == "no": assert (category in there) == (kind == "attribute")
        if sort == "yes/no" and kind == "relation":
            words = q.split("Is the ")[1].split("?")[0].split(" ")
            at = {t.category: i for i, t in enumerate(scene.things)}
            relation = next(r for r in ("left", "right", "above", "below", "inside", "on") if r in words)
            relation = {"left": "left of", "right": "right of"}.get(relation, relation)
            assert ((at[words[0]], relation, at[words[-1]]) in scene.facts()) == (p.answer == "yes")
    for k in {p.kind for p in probes if p.kind.startswith("yes/no")}:
        assert np.mean([p.answer == "yes" for p in probes if p.kind == k]) == .5
    assert len({(p.image.id, p.question) for p in probes if p.kind.startswith("short")}) == 120
    other = make_probes(60, seed + 1)
    assert not {p.image.truth["scene"].seed for p in probes} & {p.image.truth["scene"].seed for p in other}


def test_kinds_of_questions():
    scene = Scenes("source", 1, split="probe")[0].truth["scene"]
    there, away = scene.things[0], next(c for c in CATEGORIES if c not in {t.category for t in scene.things})
    assert yes_no_kinds(scene, f"Is there a {there.colour} {there.category}?", "yes") == ("object", "attribute")
    assert yes_no_kinds(scene, f"Is there a black {there.category}?", "no") == ("attribute",)
    assert yes_no_kinds(scene, f"Is there a red {away}?", "no") == ("object",)
    seen = {short_kind(short_question(r.truth["scene"], random.Random(i))[0]) for i, r in enumerate(Scenes("source", 80, split="probe"))}
    assert seen == {"colour", "size", "texture", "count", "background", "finer", "relation"}
    with pytest.raises(DataError, match="no known kind"): short_kind("Why?")


def test_answers_do_not_depend_on_batches_and_marks_are_literal():
    probes = make_probes(15, 2)
    truth = {(p.image.id, p.question): p.answer for p in probes}
    half = Says(lambda r, q: "yes" if len(q) % 2 else truth[r.id, q])
    found = answer_probes(half, probes, batch_size=7)
    slow = lambda ps: np.mean([is_right(half.caption([p.image], [p.question])[0], p) for p in ps])
    for k in {p.kind for p in probes}: assert found[k].value == slow([p for p in probes if p.kind == k])
    assert answers(half, probes, batch_size=1000) == answers(half, probes, batch_size=3)
    yes = [p for p in probes if p.kind.startswith("yes/no")]
    images = list({id(p.image): p.image for p in probes}.values())
    m = by_image(yes, found["yes/no"].per_image, images)
    assert m.per_image == [slow([p for p in yes if p.image is r]) for r in images]
    with pytest.raises(ConfigError, match="no questions"): answer_probes(half, [])


def test_questions_about_annotated_objects():
    rng = random.Random(3)
    names = ["cat", "dog", "car", "apple", "toothbrush"]
    records = [Record(i, None, ["a cat"] if i % 3 == 0 else ["a photo"], "", {"objects": [{"category": c} for c in rng.sample(names, 2)]}) for i in range(30)]
    often = lambda c: sum(c in objects_of(r) for r in records)
    for how in ("random", "popular", "adversarial"):
        probes = probes_from_instances(records, 1, 2, how)
        assert probes == probes_from_instances(records, 1, 2, how) and probes
        for r in records:
            mine = [(next(c for c in names if f" {c} in" in p.question), p.answer) for p in probes if p.image is r]
            assert sum(a == "yes" for _, a in mine) == len(mine)/2 and len(set(mine)) == len(mine)
            assert all((c in objects_of(r)) == (a == "yes") for c, a in mine)
            no = [c for c, a in mine if a == "no"]
            assert not (r.id % 3 == 0 and "cat" in no)
            if how == "popular" and no:
                rest = [c for c in names if c not in objects_of(r) and c not in no and not (r.id % 3 == 0 and c == "cat")]
                assert min(map(often, no)) >= max(map(often, rest), default=0)
    with pytest.raises(ConfigError, match="cannot be chosen"): probes_from_instances(records, how="rare")
    with pytest.raises(DataError, match="nothing is known"): probes_from_instances([Record(1, None, ["a dog"])])
    with pytest.raises(DataError, match="no question"): probes_from_instances([Record(1, None, ["x"], "", {"objects": [{"category": "dog"}]})])
    with pytest.raises(DataError, match="no scene"): make_probes(records=records)


def strengthen(tuned, scale=.5):
    "Weights of a method, moved by chance"
    torch.manual_seed(0)
    with torch.no_grad():
        for p in tuned.parameters(): p.add_(torch.randn_like(p)*scale*p.std().nan_to_num(1).clamp(min=.05))


@pytest.mark.parametrize("method,config", [("lora", dict(r=4)), ("prompt", {}), ("full", {})])
def test_off_and_scale_zero_keep_everything_and_detach_leaves_no_trace(base, retention, method, config):
    tuned = attach(base, method, **config)
    strengthen(tuned, 3.)
    try:
        with tuned.off(): assert same(retention.before, retention.measure(tuned))
        changed = retention.measure(tuned)
        assert kept(retention.before, changed) < .9
        tuned.scale(0); assert kept(retention.before, retention.measure(tuned)) == 1
        if method == "lora":
            again = Retention(tuned.scale(1), n=6, seed=5)
            assert same(again.before, retention.before) and again.own == retention.own
            with pytest.raises(ConfigError, match="is tuned"): Retention(base, n=1)
    finally: tuned.detach()
    assert same(retention.before, retention.measure(base))


def test_a_trained_vision_tower_is_looked_at_anew(base, retention):
    tuned = attach(base, "full", vision=True, projector=False, language=False)
    try:
        with torch.no_grad():
            for p in tuned.captioner.tower.parameters(): p.zero_()
        blind = retention.measure(tuned)
        assert blind["source CIDEr-D"].value < .5*retention.before["source CIDEr-D"].value
        assert len(set(retention._captions(tuned, "source"))) == 1
    finally: tuned.detach()


def test_details_and_surprise_by_the_literal_definition(base, retention):
    found = retention.measure(base, details=True)
    assert {"yes/no object", "short answers"} < set(found) and not group_of("short colour")
    total, n = base.log_prob(retention.domains["source"], retention.own)
    assert math.isclose(found["own surprise"].value, -float(total.sum())/int(n.sum()), rel_tol=1e-4)
    assert not set(retention.keys["source"].values()) & set(retention.keys["near"].values())


NAMES = ["source CIDEr-D", "near CIDEr-D", "own surprise", "yes/no", "short answers", "held-out wording", "hallucination"]


def measures(rng, n=20):
    "Measures of a base that can do something"
    out = {k: Measure(0., list(rng.uniform(.5, 3, n))) for k in NAMES[:2] + ["held-out wording"]}
    for k, low, high in (("own surprise", 2, 4), ("yes/no", 5, 6), ("short answers", 3, 6), ("hallucination", 0, 3)):
        c = np.stack([rng.integers(low, high + 1, n), np.full(n, 6)], 1).astype(float)
        out[k] = Measure(0., list(c[:, 0]/c[:, 1]), c, "ratio")
    return {k: m._replace(value=float(np.mean(m.per_image))) for k, m in out.items()}


@pytest.mark.parametrize("seed", range(5))
def test_kept_is_one_for_the_base_falls_with_each_measure_and_stays_in_bounds(seed):
    rng = np.random.default_rng(seed)
    before = measures(rng)
    assert sorted(counted(before)) == sorted(NAMES) and kept(before, before) == 1
    value = {k: m.value for k, m in before.items()}
    for k in NAMES:
        steps = np.sort(rng.uniform(0, 1, 6))[::-1]
        worse = [{**value, k: value[k] + 5*(1 - s) if k == "own surprise" else 1 - (1 - value[k])*s if k == "hallucination" else .5 + (value[k] - .5)*s if k == "yes/no" else value[k]*s} for s in steps]
        figures = [kept(value, v) for v in [value, *worse]]
        assert all(a > b for a, b in zip(figures, figures[1:])), k
    after = measures(rng)
    assert 0 <= kept(before, after) <= 1
    assert kept(before, {k: (m.value + 1 if k.endswith("D") else m.value) for k, m in before.items()}) == 1  # a gain pays for nothing
    silent = {k: Measure(60. if k == "own surprise" else 0., [None]*20, np.zeros((20, 2)), "ratio") for k in before}
    assert kept(before, silent) < 1e-9
    assert kept(before, {**before, "yes/no": .2}) == kept(before, {**before, "yes/no": .5})  # worse than a guess is nothing known


def test_what_the_base_cannot_do_is_not_counted_and_errors_are_clear():
    before = measures(np.random.default_rng(0))
    guess = np.tile([3., 6.], (20, 1))
    lucky = {**before, "yes/no": Measure(.53, [.53]*20, guess, "ratio"), "near CIDEr-D": 0.}
    assert "yes/no" not in counted(lucky) and "near CIDEr-D" not in counted(lucky)
    assert kept(lucky, {**before, "yes/no": 0.}) == 1
    with pytest.raises(MetricError, match="no short answers"): shares(before, {k: m for k, m in before.items() if k != "short answers"})
    with pytest.raises(MetricError, match="nothing that could be kept"): kept({"near CIDEr-D": 0.}, {"near CIDEr-D": 0.})
    short = {**before, "yes/no": before["yes/no"]._replace(per_image=before["yes/no"].per_image[:5])}
    with pytest.raises(MetricError, match="different images"): kept_interval(before, [short])
    assert kept_share("hallucination", .1, .1, .8, .4) == .5


@pytest.mark.parametrize("seed", [1, 2])
def test_interval_is_the_bootstrap_of_kept(seed):
    rng = np.random.default_rng(seed)
    before, runs = measures(rng), [measures(rng) for _ in range(2)]
    found = kept_interval(before, runs[:1], draws=60, level=.9)
    n, figures = 20, []
    for w in np.random.default_rng([0, n]).multinomial(n, np.full(n, 1/n), size=60):
        rows = np.repeat(np.arange(n), w)
        def again(m):
            if m.counts is None: return m._replace(value=float(np.mean([m.per_image[i] for i in rows])), per_image=[m.per_image[i] for i in rows])
            return m._replace(value=float(m.counts[rows, 0].sum()/m.counts[rows, 1].sum()), per_image=[m.per_image[i] for i in rows])
        a, b = ({k: again(m) for k, m in ms.items()} for ms in (before, runs[0]))
        part = {k: float(kept_share(k, a[k].value, b[k].value)) for k in counted(before)}
        groups = {}
        for k, r in part.items(): groups.setdefault(group_of(k), []).append(min(1, r))
        figures.append(np.mean([np.mean(g) for g in groups.values()]))
    assert np.allclose([found.low, found.high], np.percentile(figures, [5, 95])) and math.isclose(found.value, kept(before, runs[0]))
    assert kept_interval(before, [before]*3)[:3] == (1, 1, 1)
    assert kept_interval(before, runs, runs[::-1]).value == pytest.approx(0)
    ignorant = {k: Measure(0., [0.]*20, np.tile([0., 6.], (20, 1)), "ratio") for k in ("short answers", "yes/no")}
    wide = kept_interval(before, [before, before | ignorant], draws=200)
    assert wide.high == 1 and wide.low < .7  # runs that differ make a wide interval


def test_false_objects_of_scenes_and_of_annotated_images():
    records = list(Scenes("source", 30, split="t"))
    true = [captions(r.truth["scene"], "detail", 1)[0] for r in records]
    assert false_objects(true, records).value == 0
    other = true[1:] + true[:1]
    m = false_objects(other, records)
    assert .3 < m.value < 1 and math.isclose(m.value, m.counts[:, 0].sum()/m.counts[:, 1].sum())
    coco = [Record(1, None, ["a dog"], "", {"objects": ["dog"]}), Record(2, None, ["a red car"], "", {"objects": ["car"]})]
    assert false_objects(["a dog and a cat", "nothing"], coco).value == .5


def test_style_sees_style_and_not_content():
    scenes = [r.truth["scene"] for r in Scenes("target", 40, split="t")]
    refs = [captions(s, "target", 5) for s in scenes]
    own, mixed = [captions(s, "target", 1, seed=4)[0] for s in scenes], [captions(s, "sentence", 1)[0] for s in scenes]
    near, far = style_distance(own, refs, 100), style_distance(mixed, refs, 100)
    assert near.value < .1 < far.value and near.high < far.low
    shuffled = style_distance(own[1:] + own[:1], refs, 10)
    assert shuffled.value == pytest.approx(near.value)  # the style of the set, not of an image
    blend = [style_distance(own[:k] + mixed[k:], refs, 10).value for k in (0, 20, 40)]
    assert blend[0] > blend[1] > blend[2]
    assert style_distance([""]*40, refs, 10).value > .9
