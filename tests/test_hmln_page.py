"The page of explained captions: what it says, what it withstands, and how it works in a browser, on a phone, with the keyboard and without JavaScript."
import json, re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from capnb.core.errors import ConfigError, DataError
from capnb.hmln.explain import Explainer, Thumbnails, explain, nearest_wording, texts_of
from capnb.hmln.page import ORIGINS, chosen_rows, explain_page, pieces, shares

EVIL = ["</script><img src=x onerror=alert(1)>", "<!--<script>alert(2)</script>", "\"'><svg onload=alert(3)>", "]]>\u2028\u2029\u202egnihtyna\x00\x07", "&lt;b&gt; {braces}", "", "日本語 🐶 العربية", "a " * 1500]


def phrase(text, span, origin, evidence=(), contrast=(), p=.7):
    return dict(text=text, span=span, atom=text.split(), origin=origin, p=p, interval=[p - .1, p + .1], evidence=list(evidence), contrast=list(contrast))


def row(id, caption, phrases, map_score=-1., **kw):
    return dict(id=id, caption=caption, map_score=map_score, log_p=2 * map_score, exact=True, width=3, n_atoms=40, phrases=phrases, explaining=[], contrasting=[], network=None) | kw


def made_up(n=30):
    "Rows of which every origin and every form of span is one."
    out, names = [], list(ORIGINS)
    for k in range(n):
        o = [names[(k + j) % 6] for j in range(3)]
        ps = [phrase("red dog", [2, 9], o[0], [["t1", 2., "a red dog"], ["t2", None, "a dog"]], [["t3", -1., "a cat"]]), phrase("dog on cup", [[6, 9], [10, 18]], o[1], [["t4", 1., "a dog on a cup"]]), phrase("hat", None, o[2])]
        net = dict(atoms=["dog is red", "dog on cup", "cat on cup"], mark=[0, 1], p=[.9, .8, .1], of=40, edges=[[0, 1], [1, 2]], pair=[1., -2.])
        out.append(row(k, "a red dog on a cup", ps, -k / 7, network=net, explaining=[["t1", 2., "a red dog"]], contrasting=[["t3", -1., "a cat"]]))
    return out


class Tree(HTMLParser):
    "Elements of a page, and whether every one is closed in its place."
    void = {"meta", "img", "br", "hr", "input", "wbr", "col"}

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.seen, self.ids, self.bad = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs); self.seen.append((tag, a))
        if "id" in a: self.ids.append(a["id"])
        if tag not in self.void: self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.void: return
        if not self.open or self.open.pop() != tag: self.bad.append(tag)


# ---- what the page says

def test_pieces_are_the_caption_and_the_shortest_phrase_wins():
    rng = np.random.default_rng(0)
    for _ in range(300):
        n = int(rng.integers(0, 30)); text = "".join(rng.choice(list("ab <&\u00e9"), n))
        spans = [sorted(int(x) for x in rng.integers(-2, n + 4, 2)) for _ in range(int(rng.integers(0, 5)))]
        cut = pieces(text, [dict(span=s) for s in spans])
        assert "".join(t for t, _ in cut) == text
        at = 0
        for t, k in cut:
            for i in range(at, at + len(t)):
                over = [j for j, (a, b) in enumerate(spans) if max(0, a) <= i < min(b, n)]
                assert (k is None) == (not over) and (k is None or spans[k][1] - spans[k][0] == min(spans[j][1] - spans[j][0] for j in over))
            at += len(t)


def test_shares_against_counting_and_a_slow_bootstrap():
    rows = made_up(12) + [row(99, "", [])]
    got = shares(rows, draws=4000)
    for o, (v, low, high) in got.items():
        n = [sum(p["origin"] == o for p in r["phrases"]) for r in rows]; m = [len(r["phrases"]) for r in rows]
        assert v == sum(n) / sum(m)
        rng = np.random.default_rng(5); draws = [rng.integers(0, len(rows), len(rows)) for _ in range(3000)]
        slow = np.quantile([sum(n[i] for i in d) / max(1, sum(m[i] for i in d)) for d in draws], [.025, .975])
        assert abs(low - slow[0]) < .03 and abs(high - slow[1]) < .03
    assert abs(sum(v[0] for v in got.values()) - 1) < 1e-12


def test_every_number_is_on_the_page_and_the_markup_is_sound():
    rows = made_up(30); html = explain_page(rows, shown=4).html(); tree = Tree(html)
    assert not tree.bad and not tree.open and len(tree.ids) == len(set(tree.ids))
    targets = {a["href"][1:] for t, a in tree.seen if t == "a" and a.get("href", "").startswith("#")}
    assert targets <= set(tree.ids)
    assert sum(t == "article" for t, _ in tree.seen) == 4 and "4 of 30 captions" in html
    for i in chosen_rows(rows, 4): assert f"−{-rows[i]['map_score']:.3f}" in html or rows[i]["map_score"] == 0
    text = re.sub("<[^>]*>", "", html)
    for word in ("exact (elimination, width 3)", "40 atoms", "P = 0.70 [0.60, 0.80]", "I = +2.00 · t1", "I = −1.00 · t3", "3 of 40 atoms"): assert word in text, word
    assert not [a for t, a in tree.seen if t in ("link", "iframe")] and not re.search(r"(src|href)=\"(?!data:|#)", html)


def test_nothing_is_known_by_colour_alone():
    html = explain_page(made_up(6), shown=6).html()
    letters = [v[0] for v in ORIGINS.values()]
    lines = [(v[3], v[0]) for v in ORIGINS.values()]
    assert len(set(letters)) == 6 and len(set(lines)) == 6
    for origin, (letter, label, _, line) in ORIGINS.items():
        n = list(ORIGINS).index(origin)
        assert f">{letter}</sup>" in html and f", {label}</span>" in html and f"text-decoration-style:{line}" in html and f'class="phrase o{n}"' in html


def test_hostile_captions_stay_text():
    rows = [row(e, e, [phrase(e, [0, 3], "fine-tuning", [[e, 1., e]], [[e, -1., e]]) | dict(atom=[e])], network=dict(atoms=[e], mark=[0], p=[.5], of=3, edges=[], pair=[])) for e in EVIL]
    html = explain_page(rows, title=EVIL[0], byline=EVIL[1]).html(); tree = Tree(html)
    assert not tree.bad and sum(t == "script" for t, _ in tree.seen) == 1 and "onerror" not in {k for _, a in tree.seen for k in a} and "onload" not in {k for _, a in tree.seen for k in a}
    assert all(a["src"].startswith("data:image/") for t, a in tree.seen if t == "img") and "\x00" not in html and "\u202e" not in html


def test_a_page_stays_small():
    noise = {f"t{k}": Image.fromarray(np.random.default_rng(k).integers(0, 255, (400, 300, 3), dtype=np.uint8)) for k in range(1, 5)}
    thumbs = Thumbnails(noise, room=200_000)
    html = explain_page(made_up(200), lambda i: None, thumbs, shown=40).html()
    assert thumbs.left_out > 0 and len(html) < 1_000_000 and html.count("data:image/jpeg") >= 5


# ---- explain, from captions to the page

TRAIN = {"t1": ["a red dog on a cup", "a dog"], "t2": "a poodle on top of a mug", "t3": "a blue car next to a tree", "t4": "a red dog", "t5": "a cat on a sofa"}


def test_explain_finds_the_planted_source_and_goes_on(tmp_path):
    asked = {k: c for k, c in enumerate(["A red dog on a cup.", "a blue car beside a tree", "", "a dog on a sofa", "seven zebras"])}
    got = explain(asked, TRAIN, out=tmp_path, before={0: "a red dog"}, shown=5, draws=3, lot=2)
    by = {r["id"]: r for r in got.rows}
    assert list(by) == list(asked) and by[0]["explaining"][0][0] == "t1" and by[1]["explaining"][0][0] == "t3" and by[2]["phrases"] == []
    origins = {p["text"].lower(): p["origin"] for p in by[0]["phrases"]}
    assert origins["red"] == "known before" if "red" in origins else any(o == "known before" for o in origins.values())
    assert all(p["origin"] == "unexplained" for p in by[4]["phrases"]) and any(p["origin"] == "fine-tuning" for p in by[1]["phrases"])
    kept, = tmp_path.glob("rows-*.jsonl"); lines = kept.read_text().splitlines()
    kept.write_text("\n".join(lines[:2]) + "\n" + lines[2][:20])  # killed while it wrote the third
    again = explain(asked, TRAIN, out=tmp_path, before={0: "a red dog"}, shown=5, draws=3, lot=2)
    assert again.rows == got.rows and again.html() == got.html()
    other = explain(asked, TRAIN, out=tmp_path, shown=5, draws=3, limit=1)  # other settings, other file
    assert len(other) == 1 and len(list(tmp_path.glob("rows-*.jsonl"))) == 2


def test_pretraining_splits_the_unexplained():
    got = Explainer({"f": "a tree"}, pretrain=["a red dog on a cup", "a blue hat", "a green boat"], draws=2).rows({0: "a red dog", 1: "a blue boat", 2: "a purple zebra"})
    assert [r["phrases"][0]["origin"] for r in got] == ["memorised", "recombined", "unknown"]


@pytest.mark.parametrize("bad", [[], {}, [""], "no/such.json", [dict(image_id=1)], 7])
def test_what_is_no_captions_is_said(bad):
    with pytest.raises((DataError, ConfigError, TypeError)) as e: texts_of(bad)
    assert not isinstance(e.value, TypeError) or bad == 7


def test_the_wording_shown_is_the_nearest():
    assert nearest_wording(["a cat", "the dog runs on grass", "a dog"], "dog on grass") == "the dog runs on grass" and nearest_wording(["b", "a long one"], "zzz") == "b"


# ---- in a browser, from a file

@pytest.fixture(scope="module")
def page(tmp_path_factory):
    pictures = {f"t{k}": Image.new("RGB", (120, 90), (60 * k, 90, 120)) for k in range(1, 5)}
    return explain_page(made_up(30), lambda i: Thumbnails(pictures)("t1"), Thumbnails(pictures), shown=6).write(tmp_path_factory.mktemp("page") / "index.html")


def key_press(b, k):
    code = {"Enter": 13, "Tab": 9}[k]
    b("Input.dispatchKeyEvent", type="keyDown", key=k, text={"Enter": "\r"}.get(k, ""), windowsVirtualKeyCode=code)
    b("Input.dispatchKeyEvent", type="keyUp", key=k, windowsVirtualKeyCode=code)


SEEN = "(d => d.open && d.querySelector('.card').getBoundingClientRect().height > 10 && [...d.querySelectorAll('img')].every(i => i.src.startsWith('data:image/') && i.alt))(document.querySelector('a.phrase').closest('article').querySelector('details.why'))"


@pytest.mark.parametrize("width", [1200, 360])
def test_a_click_on_a_phrase_shows_its_examples(browser, page, width):
    b = browser; b.errors.clear(), b.requests.clear()
    b.open(page.as_uri(), width=width)
    assert b.eval("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 1
    assert not b.eval("document.querySelector('details.why').open")
    box = b.eval("(e => { e.scrollIntoView({block: 'center', behavior: 'instant'}); const r = e.getBoundingClientRect(); return [r.x + r.width/2, r.y + r.height/2]; })(document.querySelector('a.phrase'))")
    for kind in ("mousePressed", "mouseReleased"): b("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)
    assert b.wait(SEEN, 5)
    assert "Contrasting" in b.eval("document.querySelector('details.why').innerText") and b.eval("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 1
    b.eval("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert b.eval("document.querySelector('svg.net text').getBoundingClientRect().height") > 8  # the network can be read, on a phone by scrolling sideways
    assert b.eval("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 1
    assert not b.errors and all(u.startswith(("file:", "data:")) for u in b.requests)


def test_everything_is_reached_with_the_keyboard(browser, page):
    b = browser; b.open(page.as_uri() + "?keys", width=1200)
    for _ in range(40):
        key_press(b, "Tab")
        if b.eval("document.activeElement.matches('a.phrase')"): break
    assert b.eval("document.activeElement.matches('a.phrase')")
    key_press(b, "Enter"); assert b.wait(SEEN, 5)
    reached = set()
    for _ in range(12): key_press(b, "Tab"); reached.add(b.eval("document.activeElement.tagName"))
    assert "SUMMARY" in reached and b.eval("[...document.querySelectorAll('details.why summary')].every(s => s.getBoundingClientRect().height >= 40)")


def test_it_is_read_without_javascript(browser, page):
    b = browser; b("Emulation.setScriptExecutionDisabled", value=True)
    try:
        b.open(page.as_uri() + "?plain", width=360)
        root = b("DOM.getDocument")["root"]["nodeId"]
        node = b("DOM.querySelector", nodeId=root, selector="details.why summary")["nodeId"]
        b("DOM.scrollIntoViewIfNeeded", nodeId=node)
        q = b("DOM.getBoxModel", nodeId=node)["model"]["content"]
        for kind in ("mousePressed", "mouseReleased"): b("Input.dispatchMouseEvent", type=kind, x=q[0] + 60, y=(q[1] + q[5]) / 2, button="left", clickCount=1)
        card = b("DOM.querySelector", nodeId=root, selector="details.why .card")["nodeId"]
        assert b("DOM.getBoxModel", nodeId=card)["model"]["height"] > 10
    finally: b("Emulation.setScriptExecutionDisabled", value=False)


def test_hostile_captions_do_nothing_in_a_browser(browser, tmp_path):
    rows = [row(e, e, [phrase(e, [0, 3], "unknown", [[e, 1., e]])]) for e in EVIL]
    b = browser; b.errors.clear()
    b.open(explain_page(rows, title=EVIL[2]).write(tmp_path / "index.html").as_uri(), width=360)
    assert b.eval("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 1 and not b.errors and b.eval("document.querySelectorAll('article').length") == len(EVIL)


def test_a_notebook_shows_it_without_a_script(browser, tmp_path):
    got = explain({0: "a red dog on a cup", 1: "a blue car"}, TRAIN, draws=2)
    shown = got._repr_html_(); (tmp_path / "n.html").write_text(f"<!doctype html><body>{shown}{shown}", encoding="utf-8")
    assert "<script" not in shown and len(shown) < 100_000
    b = browser; b.errors.clear(); b.open((tmp_path / "n.html").as_uri(), width=800)
    line = b.eval("getComputedStyle(document.querySelector('.capnb-explain a.phrase')).textDecorationStyle + getComputedStyle(document.querySelector('.capnb-explain a.phrase')).textDecorationLine")
    assert "underline" in line and b.eval("getComputedStyle(document.body).textDecorationLine") == "none" and not b.errors
