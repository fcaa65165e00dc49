"""Lifted words against slow counts, on drawn corpora and on Scenes' truth; the topics page against hostile text and every form of its data."""
import math, random
from collections import Counter
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from capnb.core.errors import CapnbError, DataError, MetricError
from capnb.core.figures import figure_svg, plotting
from capnb.core.page import Page
from capnb.data.scene_oracle import read_caption
from capnb.data.scene_text import captions
from capnb.data.scene_world import CATEGORIES, SUBTYPE_OF
from capnb.data.scenes import Scenes, scene_of
from capnb.klaft.lift import (bags, draw_gain, draw_words, lift_gain, log_odds, names_said, replacements, supported, target_share,
                              target_words, word_distance, word_shares)
from capnb.klaft.topic_page import TOPIC_STYLE, add_topics, lifted_words, map_rows, topic_map_html, topic_page


def corpus(seed, n=40, letters="abcdefghij", power=1.):
    rng = random.Random(seed); w = [1/(k + 1)**power for k in range(len(letters))]
    return [[" ".join(rng.choices(letters, w, k=rng.randint(1, 9))) for _ in range(rng.randint(1, 3))] for _ in range(n)]


# ---- target-specific words

@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("prior", [None, .01, 1.])
def test_log_odds_is_the_slow_formula(seed, prior):
    A, B = corpus(seed, letters="abcdefgh"), corpus(seed + 50, letters="hgfedcbax")
    yi, yj = (Counter(w for image in c for t in image for w in t.split()) for c in (A, B)); ni, nj = yi.total(), yj.total()
    a = {w: prior if prior else 30*(yi[w] + yj[w])/(ni + nj) for w in yi | yj}; a0 = sum(a.values())
    for o in log_odds(A, B, 30., prior):
        y, z, p = yi[o.word], yj[o.word], a[o.word]
        delta = math.log((y + p)/(ni + a0 - y - p)) - math.log((z + p)/(nj + a0 - z - p))
        assert (o.target, o.source) == (y, z) and abs(o.delta - delta) < 1e-9 and abs(o.zeta - delta/math.sqrt(1/(y + p) + 1/(z + p))) < 1e-9


def test_two_samples_of_one_corpus_have_few_specific_words():
    "At 1.96 about one word in forty is called specific by chance when words are independent; repeated captions do worse, and never by much."
    found = total = 0
    for s in range(20):
        A, B = (corpus(s + k, 200, "abcdefghijklmnopqrst") for k in (0, 500))
        found += len(target_words(A, B)); total += len(bags(A)) and 20
    assert found/total < .06


def test_a_word_of_one_image_is_not_a_target_word():
    A, B = corpus(1, 100), corpus(2, 100)
    assert log_odds([*A, ["zebra"]*30], B)[0].word == "zebra" and "zebra" not in target_words([*A, ["zebra"]*30], B)
    assert target_words([*A, *[["zebra"]*10]*3], B)[0] == "zebra" and target_words([*A, *[["zebra"]*10]*3], B, among={"a"}) == []


def test_scenes_target_words_are_its_finer_names():
    target = {s: captions(scene_of("target", "val", s), "target") for s in range(300)}
    source = [captions(scene_of("source", "val", s), "sentence") for s in range(300)]
    names = set(target_words(target, source, among={*CATEGORIES, *SUBTYPE_OF}))
    assert names <= set(SUBTYPE_OF) and len(names) >= 26
    assert set(target_words(source, list(target.values()), among={*CATEGORIES, *SUBTYPE_OF})) >= set(CATEGORIES) - {"box", "car"}


# ---- gain

def test_shares_and_support_are_slow_counts():
    A, R, W = corpus(3), corpus(4), {"a", "d", "q"}
    flat = [w for image in A for t in image for w in t.split()]
    m = target_share(A, W)
    assert abs(m.value - sum(w in W for w in flat)/len(flat)) < 1e-12 and abs(sum(m.counts[:, 0])/sum(m.counts[:, 1]) - m.value) < 1e-12
    assert np.allclose(word_shares(["a", "q"], {"x": A})["x"], [flat.count("a")/len(flat), 0])
    said = [{w for t in i for w in t.split()} & W for i in A]; true = [{w for t in i for w in t.split()} & W for i in R]
    s = supported(A, R, W); both = sum(len(x & y) for x, y in zip(said, true))
    assert s["recall"].value == both/sum(map(len, true)) and s["precision"].value == both/sum(map(len, said))


def test_the_interval_covers_the_true_gain():
    hit, W = 0, {"x"}
    for s in range(100):
        rng = random.Random(s); say = lambda p: [" ".join("x" if rng.random() < p else "o" for _ in range(6)) for _ in range(60)]
        g = lift_gain(say(.2), say(.35), W, draws=300, seed=s); hit += g.low <= .15 <= g.high
        assert g.low <= g.value <= g.high
    assert 86 <= hit <= 100


def test_images_are_paired_by_id():
    before, after = {"a": "bird", "b": "dog"}, {"b": "dog", "a": "puffin"}
    assert lift_gain(before, after, ["puffin"]).value == .5 and supported(after, {"b": "dog", "a": "puffin"}, ["puffin"])["recall"].value == 1
    with pytest.raises(MetricError): lift_gain(before, {"a": "puffin"}, ["puffin"])
    with pytest.raises(MetricError): supported(after, {"b": "dog", "c": "puffin"}, ["puffin"])
    assert lift_gain(["", "bird"], ["puffin", ""], ["puffin"]).value == 1  # an empty caption of one image is no obstacle
    for bad in ([None], [["a", None]], "text", 3):
        with pytest.raises(CapnbError): target_share(bad, ["a"])


# ---- replacements

def test_true_captions_never_name_wrongly_and_finer_ones_are_seen():
    for i in range(300):
        s = scene_of("target", "test", i)
        for style, finer, name in (("target", True, "finer"), ("target", False, "category"), ("sentence", False, "category"), ("detail", False, "category")):
            for c in captions(s, style, 2, **({"finer": finer} if style == "target" else {})):
                got = names_said(c, s)
                assert set(got) <= {name, None} and any(got), (c, got)


def test_wrong_names_are_those_the_oracle_calls_made_up():
    rng, wrong = random.Random(0), 0
    for i in range(300):
        s = scene_of("target", "test", i); t = rng.choice(s.things)
        other = next(x for x in CATEGORIES[t.category] if x != t.subtype)
        for said in (other, t.subtype, t.category):
            c = f"a {said}"
            r = read_caption(c, s); n = dict(zip((x.category for x in s.things), names_said(c, s)))[t.category]
            made_up = any(x.kind == "object" for x in r.hallucinated)
            assert (n == "wrong") == made_up and n is not None; wrong += made_up
    assert wrong == 300


def test_replacement_rates_are_what_was_put_in():
    "Captions in which a known share of categories became finer, wrong or unsaid."
    rng, scenes = random.Random(1), [scene_of("target", "test", i) for i in range(400)]
    count, before, after = Counter(), [], []
    for s in scenes:
        b, a = [], []
        for t in s.things:
            kind = rng.choices(["category", "replaced", "wrong", "lost"], [2, 4, 1, 1])[0]; count[kind] += 1
            b.append(t.category); other = next(x for x in CATEGORIES[t.category] if x != t.subtype)
            a.append({"category": t.category, "replaced": t.subtype, "wrong": other, "lost": "thing"}[kind])
        before.append("a " + " and a ".join(b)); after.append("A " + ", a ".join(a) + ".")
    got, n = replacements(before, after, [{"scene": s} for s in scenes]), count.total()
    for k in ("replaced", "wrong", "lost"): assert abs(got[k].value - count[k]/n) < 1e-12
    assert abs(got["finer"].value - count["replaced"]/(n - count["lost"])) < 1e-12
    record = Scenes("target", 3)[0]; assert len(names_said("x", record.truth)) == len(record.truth["scene"].things)


# ---- distance

@pytest.mark.parametrize("seed", range(4))
def test_distance_is_a_bounded_symmetric_divergence(seed):
    A, B, C = corpus(seed, power=.5), corpus(seed + 1, letters="jihgfxyz"), [["ö ä"]]
    for x, y in ((A, B), (A, C), (B, C)): assert 0 < word_distance(x, y) <= 1 and word_distance(x, y) == pytest.approx(word_distance(y, x), abs=1e-12)
    assert word_distance(A, A) == 0 and word_distance(A, C) == 1 and word_distance(A*3, A) == pytest.approx(0, abs=1e-12)
    root = lambda x, y: word_distance(x, y)**.5  # its root is a metric
    assert root(A, C) <= root(A, B) + root(B, C) + 1e-12
    p, q = (Counter(w for i in c for t in i for w in t.split()) for c in (A, B))
    P, Q = ({w: n/c.total() for w, n in c.items()} for c in (p, q)); H = lambda d: -sum(v*math.log2(v) for v in d.values() if v)
    M = {w: (P.get(w, 0) + Q.get(w, 0))/2 for w in P.keys() | Q}
    assert word_distance(A, B) == pytest.approx(H(M) - (H(P) + H(Q))/2, abs=1e-12)
    with pytest.raises(DataError): word_distance([""], A)


def test_figures_show_what_they_are_given():
    A, B = corpus(1), corpus(2)
    with plotting():
        words = draw_words(["a", "b"], word_shares(["a", "b"], {"<source>": A, "after": B})).axes[0]
        gain = draw_gain({"near": (.1, lift_gain(A, B, ["a"])), "far": (.6, lift_gain(A, B, ["b"]))})
        assert [l.get_label() for l in words.lines] == ["<source>", "after"] and len(words.lines[0].get_xdata()) == 2
        assert "<svg" in figure_svg(gain, "gain")


# ---- page

class Look(HTMLParser):
    void = {"meta", "img", "br", "hr", "path", "use"}
    def __init__(self, text): super().__init__(); self.open, self.tags, self.attrs, self.text = [], [], [], ""; self.feed(text); self.close()
    def handle_starttag(self, t, attrs): self.tags.append(t); self.attrs += attrs; self.open += [t]*(t not in self.void)
    def handle_endtag(self, t): assert t in self.void or self.open.pop() == t, t
    def handle_data(self, s): self.text += s


WORDS = ["puffin", "", " ", "<b>", "</style>", '"><script>alert(1)</script>', "'onclick='x()'", "&lt;", "日本", "a\x00b", "\u202edb", "🐧", "{}", "%s", "}*{color:red}", "javascript:x", "--q:1%;}", "don't", "x"*300]


@pytest.mark.parametrize("seed", range(3))
def test_any_words_make_a_whole_and_safe_page(seed):
    rng = random.Random(seed); w = lambda: rng.choice(WORDS)
    def q(K): p = [rng.random()**3 for _ in range(K + 1)]; return [x/sum(p) for x in p]
    caps = [dict(map=[(w(), q(K), q(K)) for _ in range(rng.randint(0, 8))], before=rng.choice([None, w() + " " + w()]), id=w()) for K in (1, 2, 10, 30)]
    html = topic_page([[w(), (w(), .5)] for _ in range(12)], caps, WORDS, w(), w() or "t", w(), w()).html()
    look = Look(html)
    assert look.open == [] and not {"script", "img", "iframe", "link", "b"} & set(look.tags) and not any(k.startswith("on") for k, _ in look.attrs)
    assert all(v.startswith("#") for k, v in look.attrs if k in ("href", "src"))
    styles = [v for k, v in look.attrs if k == "style" and "--q" in v]
    assert all(s.replace("%", "").replace("--q:", "").split(";")[0].isdigit() and set(s) <= set("-q:0123456789%;tvar(c)") for s in styles)
    assert look.tags.count("style") == 1 and html.count("</style>") == 1


def test_maps_come_in_every_form():
    q = torch.tensor([[.9, .1, 0], [.2, .3, .5]]); p = q.flip(0)
    want = map_rows([("a", p[0].tolist(), q[0].tolist()), ("b", p[1].tolist(), q[1].tolist())])
    for m in ([("a", p[0], q[0]), ("b", p[1], q[1])], [["a", p[0].numpy(), q[0].numpy()], ["b", p[1].numpy(), q[1].numpy()]],
              SimpleNamespace(words=["a", "b"], prior=p, posterior=q), SimpleNamespace(words=["a", "b"], prior=p.tolist(), posterior=q.tolist())):
        assert map_rows(m) == want
    assert [r[2] for r in map_rows([("a", torch.tensor(.3), np.float32(.25)), ("b", 0, 1)])] == [.25, 1]
    for bad in ([("a", q[0], q[0]*2)], [("a", .1, float("inf"))], [("a", .1, -.2)], [("a",)], ["ab"], [("a", q, q)], [("a", .1, [math.nan, 1])]):
        with pytest.raises(DataError): map_rows(bad)


def test_shade_is_the_posterior_of_the_topics():
    html = topic_map_html([("a", .5, 0), ("b", .5, .5), ("c", .5, [.01] + [0]*9 + [.99])])
    assert ["--q:0%" in html, "--q:50%" in html, "--q:99%;--t:var(--c2)" in html] == [True]*3 and "likeliest topic 10" in html


def test_lifted_words_and_images():
    assert lifted_words("A bird.", "A Puffin, a canoe; puffin", ["puffin", "canoe", "hut"]) == ["puffin", "canoe"]
    assert lifted_words("the puffin", "Puffin!", ["puffin"]) == [] and lifted_words("", "", ["x"]) == []
    page = add_topics(Page("report", style="main{top:0}"), None, [dict(map=[("Puffin,", .1, .9)], before="a bird", image=Image.new("RGB", (4, 4)))], ["puffin"])
    html = page.html()
    assert html.count('<mark class="lifted">Puffin,</mark>') == 1 and "data:image/" in html and page.style == "main{top:0}" + TOPIC_STYLE
    assert add_topics(page, [["a"]]).style.count(".topics{") == 1 and list(page.sections) == ["captions", "topics"]
