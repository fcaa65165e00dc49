"Human studies: what pages hold and hide, answers back and forth, the page in a browser, and statistics with known truth."
import csv, io, json, math, re
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from capnb.core.errors import CapnbError, ConfigError, DataError
from capnb.data.records import Record
from capnb.metrics.human import (COLUMNS, Question, SIDES, answers_csv, check_sum, contrastive, likert, pairwise, read_answers, study_key, study_page)
from capnb.metrics.raters import alpha_interval, crossed_means, krippendorff_alpha, mean_test, preference_rates, sign_test, simulate_raters, summary

METHODS = ("LoRA-r8-secret", "zero_shot_secret")
EVIL = ["</script><img src=x onerror=alert(1)>", "<!--<script>alert(2)</script>", "\"'><svg onload=alert(3)>", "]]>\u2028\u2029\u202egnihtyna\x00\x07", "&lt;b&gt; {braces} \\u003c", "", "日本語 🐶 العربية", "a" * 3000]


def pictures(n=6): return {f"secretname{k:03}.jpg": Image.new("RGB", (64, 48), (40 * k % 255, 90, 200 - 20 * k)) for k in range(n)}


def study(n=6, **kw):
    p = pictures(n)
    return pairwise(p, {i: f"the first says {k}" for k, i in enumerate(p)}, {i: f"the second says {k}" for k, i in enumerate(p)}, names=METHODS, **{"seed": 5, **kw})


class Page(HTMLParser):
    "What is in a page, by a reader that is not ours."
    void = {"meta", "img", "br", "hr", "input"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.labels, self.scripts, self.handlers, self.urls = [], Counter(), [], [], [], [], []
        self.feed(text), self.close()

    def handle_starttag(self, t, attrs):
        a = dict(attrs)
        self.tags[t] += 1
        if t not in self.void: self.open.append(t)
        if t == "script": self.scripts.append([a, ""])
        if "id" in a: self.ids.append(a["id"])
        if t == "label": self.labels.append(a.get("for"))
        self.handlers += [k for k in a if k.startswith("on")]
        self.urls += [a[k] for k in ("src", "href") if k in a]

    def handle_endtag(self, t): assert t in self.void or self.open.pop() == t, t

    def handle_data(self, text):
        if self.open and self.open[-1] == "script": self.scripts[-1][1] += text


def data_of(text): return json.loads(Page(text).scripts[0][1])


# ---- the page

def all_kinds():
    p = pictures()
    ids = list(p)
    captions = {i: f"caption of {k}" for k, i in enumerate(ids)}
    yield study(checks=2)
    yield likert(p, {m: captions for m in METHODS}, checks=2)
    yield contrastive(p, captions, {i: [(ids[0], "near"), (ids[1], "nearer")] for i in ids}, {i: [(ids[2], "far")] for i in ids}, names=METHODS, checks=1)


@pytest.mark.parametrize("n", range(3))
def test_pages_are_blind_whole_and_well_formed(n):
    s = list(all_kinds())[n]
    text = study_page(s).html()
    for name in [*METHODS, *pictures(), "secretname", "expected", '"seed"', '"method"']: assert name not in text, name
    page = Page(text)
    assert not page.open and not page.handlers and page.tags["img"] == 0  # pictures are placed by the program
    assert len(page.ids) == len(set(page.ids)) and all(u.startswith(("#", "data:")) for u in page.urls)
    assert all(f in page.ids for f in page.labels if f) and page.tags["script"] == 2 and page.tags["noscript"] == 1
    assert "default-src &#x27;none&#x27;" in text and not re.search(r"https?://|\bfetch\(|XMLHttpRequest|innerHTML|eval\(", text)
    data = data_of(text)
    assert {"lang", "html"} and '<html lang="en">' in text and len(data["items"]) == len(s.items)
    assert all(u.startswith("data:image/") for u in data["pictures"].values())
    assert all(set(i) <= {"id", "picture", "caption", "left", "right"} for i in data["items"])


def test_pictures_lose_what_a_camera_wrote(tmp_path):
    im = Image.new("RGB", (30, 30))
    exif = im.getexif(); exif[0x010E] = "secret description"
    im.save(tmp_path / "a.jpg", exif=exif)
    s = pairwise({1: str(tmp_path / "a.jpg")}, {1: "x"}, {1: "y"})
    import base64
    assert all(b"secret" not in base64.b64decode(u.partition(",")[2]) for u in s.pictures.values())


def test_hostile_captions_stay_text():
    p = pictures(len(EVIL))
    s = pairwise(p, dict(zip(p, EVIL)), dict(zip(p, reversed(EVIL))), title=EVIL[0], instructions=EVIL[1], questions=[Question("q", EVIL[2], SIDES)])
    page = Page(study_page(s).html())
    assert page.tags["script"] == 2 and page.tags["img"] == 0 and page.tags["svg"] == 0 and not page.handlers and not page.open
    shown = [e["text"] for i in data_of(study_page(s).html())["items"] for side in ("left", "right") for e in i[side]]
    assert EVIL[0] in shown and EVIL[6] in shown and "(this caption is empty)" in shown
    assert not any(c in t for t in shown for c in "\u202e\x00\x07\u2028")


def test_seed_decides_everything():
    a, b, c = (study_page(study(seed=s)).html() for s in (5, 5, 6))
    assert a == b != c
    order = lambda t: [i["left"][0]["text"][-1] for i in data_of(t)["items"]]
    assert sorted(order(a)) == sorted(order(c)) and order(a) != order(c)
    assert {i["id"] for i in data_of(a)["items"]}.isdisjoint(i["id"] for i in data_of(c)["items"])


@pytest.mark.parametrize("n", [1, 7, 40])
def test_sides_are_balanced_and_exchanged_between_versions(n):
    key = study_key(study(n), versions=4)
    lefts = [v["left"] for v in key["versions"].values()]
    for left in lefts: assert abs(2 * Counter(left.values())[METHODS[0]] - n) <= 1
    assert len(lefts) == 4 and lefts[0] == lefts[2] and all(lefts[0][i] != lefts[1][i] for i in lefts[0])


def test_records_and_rows_will_do():
    records = [Record(k, im, []) for k, im in enumerate(pictures(3).values())]
    rows = lambda w: [{"image_id": k, "caption": f"{w} {k}"} for k in range(3)]
    assert len(pairwise(records, rows("a"), rows("b")).items) == 3


def test_what_cannot_be_asked_is_said():
    p = pictures(2)
    c = dict.fromkeys(p, "x")
    for bad, message in ((lambda: pairwise(p, c, {}), "different images"), (lambda: pairwise(p, [{"image_id": 1, "caption": "x"}] * 2, c), "two captions"),
                         (lambda: pairwise(p, {**c, "z": "y"}, {**c, "z": "y"}), "no picture"), (lambda: pairwise(p, c, {**c, next(iter(p)): None}), "not text"),
                         (lambda: pairwise(p, c, c, names=("x", "x")), "names of their own"), (lambda: pairwise({}, {}, {}), "no items"),
                         (lambda: pairwise({1: b"no picture"}, {1: "x"}, {1: "y"}), "image 1"), (lambda: pairwise(p, ["x"], ["y"]), "image ids")):
        with pytest.raises(CapnbError, match=message): bad()


# ---- answers

def answered(s, tmp_path, version=0, rater="R 1", choose=lambda i, q, choices: choices[0], name="a.csv"):
    key = study_key(s, 2)
    v = list(key["versions"])[version]
    rows = [(i, q, choose(i, q, choices), 2.5) for i in key["items"] for q, choices in key["questions"].items()]
    path = tmp_path / name
    path.write_text(answers_csv(rows, rater, v), newline="")
    return path, key


@pytest.mark.parametrize("n", range(3))
def test_answers_come_back_unblinded(n, tmp_path):
    s = list(all_kinds())[n]
    path, key = answered(s, tmp_path)
    got = read_answers(path, key)
    assert len(got.rows) == sum(i.expected is None for i in s.items) * len(s.questions) and got.missing == {"R 1": 0}
    items = {i.id: i for i in s.items}
    for a in got.rows:
        assert a.image == items[a.item].image and a.seconds == 2.5
        if s.kind == "likert": assert a.choice == 1 and a.method == items[a.item].method
        else: assert a.choice == a.left in METHODS
    assert len(got.table()) == len(got.rows)


def test_both_sides_of_two_versions_agree(tmp_path):
    s = study(9)
    want = {i.id: METHODS[k % 2] for k, i in enumerate(s.items)}
    files = []
    for v in range(2):
        key = study_key(s, 2)
        left = list(key["versions"].values())[v]["left"]
        files.append(answered(s, tmp_path, v, f"R{v}", lambda i, q, c: "left" if left[i] == want[i] else "right", f"{v}.csv")[0])
    got = read_answers(files, key)
    assert all(a.choice == want[a.item] for a in got.rows) and krippendorff_alpha(got.matrix("fluency")[0]) == 1
    assert read_answers(tmp_path, key).rows == got.rows


def test_every_change_of_a_file_is_noticed(tmp_path):
    path, key = answered(study(), tmp_path)
    good = path.read_text()
    table = list(csv.reader(io.StringIO(good)))
    assert table[0] == COLUMNS and len(table) == 13
    rng = np.random.default_rng(0)
    for n in range(60):  # a random cell that defines an answer gets another cell's value, or a new one
        t = [list(r) for r in table]
        r, c = int(rng.integers(1, len(t))), int(rng.choice([0, 1, 2, 3, 5, 6]))
        new = str(rng.choice(["right", "adequacy", "R 2", "0" * 12, "x", t[1 + (r % 12)][c]]))
        if new == t[r][c]: continue
        t[r][c] = new
        path.write_text("\r\n".join(map(",".join, t)) + "\r\n", newline="")
        with pytest.raises(DataError): read_answers(path, key)
    for change, message in ((lambda t: t.replace("check", "sum"), "no column check"), (lambda t: t + t.splitlines()[3] + "\r\n", "answered twice"),
                            (lambda t: t + "a,b\r\n", "too few"), (lambda t: t.splitlines()[0], "no answers"), (lambda t: t.replace(",2.5,", ",-1,"), "seconds")):
        path.write_text(change(good), newline="")
        with pytest.raises(DataError, match=message): read_answers(path, key)
    path.write_bytes(good.encode("utf-16"))
    with pytest.raises(DataError, match="UTF-8"): read_answers(path, key)


def test_one_name_is_one_person_and_spreadsheets_are_forgiven(tmp_path):
    s = study()
    a, key = answered(s, tmp_path, 0, "Ann", name="a.csv")
    b, _ = answered(s, tmp_path, 1, "ANN", name="b.csv")
    with pytest.raises(DataError, match="Two files.*a.csv and .*b.csv"): read_answers([a, b], key)
    plain = read_answers(a, key).rows
    a.write_text("\ufeff" + a.read_text().replace(",", ";").replace("2.5", "2,5"))
    assert read_answers(a, key).rows == plain
    with pytest.raises(DataError, match="another study"): read_answers(a, study_key(study(seed=6)))
    with pytest.raises(CapnbError): read_answers(tmp_path / "none.csv", key)


def test_keys_are_kept_apart(tmp_path):
    pages, key = study().write(tmp_path, versions=3)
    assert sorted(p.name for p in (tmp_path / "raters").iterdir()) == ["study_1.html", "study_2.html", "study_3.html"] and key.parent == tmp_path
    assert METHODS[0] in key.read_text() and json.loads(key.read_text()) == json.loads(json.dumps(study_key(study(), 3)))
    study().write(tmp_path, versions=3)
    with pytest.raises(DataError, match="another study"): study(seed=9).write(tmp_path)


# ---- statistics

def test_alpha_against_the_formula_on_many_tables():
    def slow(units, level):
        units = [u for u in units if len(u) > 1]
        v = [c for u in units for c in u]
        def d(c, k):
            if level == "nominal": return float(c != k)
            if level == "interval": return (c - k) ** 2
            return 0. if c == k else (sum(min(c, k) <= g <= max(c, k) for g in v) - (v.count(c) + v.count(k)) / 2) ** 2
        do = sum(d(a, b) / (len(u) - 1) for u in units for a in u for b in u) / len(v)
        return 1 - do / (sum(d(a, b) for a in v for b in v) / (len(v) * (len(v) - 1)))
    rng = np.random.default_rng(3)
    for n in range(12):
        x = rng.integers(-2, 4, (int(rng.integers(2, 6)), 8)).astype(float)
        x[rng.random(x.shape) < .3] = np.nan
        units = [[v for v in u if v == v] for u in x.T]
        if len({v for u in units if len(u) > 1 for v in u}) < 2: continue
        for level in ("nominal", "ordinal", "interval"): assert math.isclose(krippendorff_alpha(x, level), slow(units, level), abs_tol=1e-10)


def test_alpha_does_not_care_who_or_in_which_order():
    x = np.random.default_rng(0).integers(1, 6, (4, 20)).astype(float)
    shuffled = np.random.default_rng(1).permuted(x, axis=0)[:, ::-1]
    for level in ("nominal", "ordinal", "interval"):
        assert math.isclose(krippendorff_alpha(x, level), krippendorff_alpha(shuffled, level))
        assert math.isclose(krippendorff_alpha(x, level), krippendorff_alpha(np.c_[x, np.r_[1, [np.nan] * 3]], level))  # a unit with one value adds nothing
    assert math.isclose(krippendorff_alpha(x * 3 + 1, "interval"), krippendorff_alpha(x, "interval")) and math.isclose(krippendorff_alpha(x ** 3, "ordinal"), krippendorff_alpha(x, "ordinal"))


def test_intervals_hold_the_truth_as_often_as_they_say():
    "Win rates of simulated raters: 95 % intervals over items and raters hold the computed truth in nearly all of 24 studies."
    F = lambda z: 1 / (1 + np.exp(-z))
    s, hits = study(30, questions="fluency"), 0
    for seed in range(24):
        d, t = .8, .5
        texts = simulate_raters(s, d, raters=5, tie=t, bias=.3, seed=seed)
        key = study_key(s)
        rows = np.array([[1 if key["versions"][r[5]]["left"][r[0]] == METHODS[0] and r[2] == "left" or key["versions"][r[5]]["left"][r[0]] != METHODS[0] and r[2] == "right" else 0
                          for r in list(csv.reader(io.StringIO(x)))[1:]] for x in texts], float)
        truth = np.mean([F(d + .3 * l - t) for l in (1, -1)])
        low, high = np.percentile(crossed_means(rows, 300, seed), [2.5, 97.5])
        hits += low <= truth <= high
    assert hits >= 21


def test_permutation_and_sign_tests():
    rng = np.random.default_rng(0)
    assert sign_test([1] * 10) == 2 / 1024 and sign_test([]) == 1 and sign_test([0, 0, 1, -1]) == 1
    x = rng.normal(.2, 1, 13)
    from itertools import product
    exact = np.mean([abs(np.dot(f, x)) >= abs(x.sum()) - 1e-12 for f in product((1, -1), repeat=13)])
    assert math.isclose(mean_test(x), exact)
    assert abs(mean_test(np.r_[x, x], 20000) - mean_test(np.r_[x, x], 20000, seed=1)) < .02


def test_ability_and_bias_are_recovered(tmp_path):
    s = study(80, questions="adequacy", checks=3)
    rng = np.random.default_rng(0)
    d = dict(zip(pictures(80), rng.normal(0, 2, 80)))
    def result(**kw):
        for old in tmp_path.glob("*.csv"): old.unlink()
        for n, t in enumerate(simulate_raters(s, d, raters=6, seed=2, versions=2, **kw)): (tmp_path / f"{n}.csv").write_text(t, newline="")
        return summary(read_answers(tmp_path, study_key(s, 2)), draws=200)
    able, random, biased = result(ability=3.), result(ability=0.), result(ability=1., bias=2.)
    assert able.rows[0]["alpha"].low > .6 and abs(random.rows[0]["alpha"].value) < .1
    assert biased.rows[0]["side A"] > .75 and abs(able.rows[0]["side A"] - .5) < .08
    assert able.about["simulated"] and "simulated" in able.line() and all(ok == n == 3 for ok, n in able.about["checks"].values())


def test_raters_who_fail_checks_can_be_left_out(tmp_path):
    s = study(12, questions="fluency", checks=4)
    good = simulate_raters(s, 1., raters=2)
    path, key = answered(s, tmp_path, 0, "careless", lambda i, q, c: "tie", "c.csv")
    for n, t in enumerate(good): (tmp_path / f"{n}.csv").write_text(t, newline="")
    got = read_answers(tmp_path, key)
    assert got.checks["careless"] == (0, 4)
    kept, everyone = summary(got, max_failed=1, draws=50), summary(got, draws=50)
    assert kept.about["left_out"] == ["careless"] and kept.about["raters"] == 2 and everyone.about["raters"] == 3
    assert "careless failed 4 of 4" in everyone.line() and not everyone.about["simulated"]


# ---- in a browser, from a folder, without a server

def key_press(b, k):
    code = {"Enter": 13, "Tab": 9, " ": 32}.get(k) or ord(k)
    text = {"Enter": "\r", "Tab": ""}.get(k, k)
    b("Input.dispatchKeyEvent", type="keyDown", key=k, text=text, windowsVirtualKeyCode=code)
    b("Input.dispatchKeyEvent", type="keyUp", key=k, windowsVirtualKeyCode=code)


def start(b, path, rater, width=1200):
    b.errors.clear(), b.requests.clear()
    b.open(path.as_uri(), width=width)
    b.eval(f"document.getElementById('rater').value = {json.dumps(rater)}; document.getElementById('begin').click()")


def saved(b, folder, button):
    "Click a button that saves a file; the file."
    for old in folder.glob("*.csv"): old.unlink()
    b("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    b.eval(f"document.getElementById('{button}').click()")
    import time
    for _ in range(100):
        if found := [p for p in folder.glob("*.csv") if p.stat().st_size]: return found[0]
        time.sleep(.1)
    raise TimeoutError("nothing was saved")


def test_a_study_is_answered_with_the_keyboard_left_resumed_and_saved(browser, tmp_path):
    b, s = browser, study(3, checks=1)
    (page,), key = s.write(tmp_path)
    start(b, page, "Müller 1")
    order = data_of(page.read_text())["items"]
    assert b.eval("document.activeElement.id") == "heading" and b.eval("document.getElementById('place').textContent").startswith("Item 1 of 4, 0 of 8")
    key_press(b, "1"), key_press(b, "3"), key_press(b, "Enter")  # fluency A, adequacy B, next
    key_press(b, "2")
    assert b.eval("document.getElementById('place').textContent") == "Item 2 of 4, 3 of 8 questions answered"
    start(b, page, "Müller 1")  # closed and opened again: the same item, the same answers
    assert b.eval("document.getElementById('place').textContent") == "Item 2 of 4, 3 of 8 questions answered"
    assert b.eval("document.querySelector('#asked input:checked').value") == "tie"
    partial = saved(b, tmp_path / "out" if (tmp_path / "out").mkdir() is None else None, "part")
    assert len(read_answers(partial, key).rows) + sum(read_answers(partial, key).checks.get("Müller 1", (0, 0))[1:]) == 3
    text = partial.read_text()
    for _ in range(3): b.eval("document.getElementById('next').click()")
    assert not b.eval("document.getElementById('end').hidden") and "5 of 8 questions are open" in b.eval("document.getElementById('open').textContent")
    b.eval("document.getElementById('first').click()")
    assert b.eval("document.getElementById('heading').textContent") == "Item 2"
    key_press(b, "1"), key_press(b, "Enter")
    for _ in range(2): key_press(b, "3"), key_press(b, "1"), key_press(b, "Enter")
    assert "All 8" in b.eval("document.getElementById('open').textContent")
    full = read_answers(saved(b, tmp_path / "out", "save"), key)
    left = json.loads(key.read_text())["versions"]
    left = next(iter(left.values()))["left"]
    want = {(order[0]["id"], "fluency"): "left", (order[0]["id"], "adequacy"): "right", (order[1]["id"], "fluency"): "tie", (order[1]["id"], "adequacy"): "left"} | {(o["id"], q): c for o in order[2:] for q, c in (("fluency", "right"), ("adequacy", "left"))}
    got = {(a.item, a.question): "tie" if a.choice == "tie" else "left" if a.choice == a.left else "right" for a in full.rows}
    assert got == {k: v for k, v in want.items() if k in got} and len(got) == 6 and full.raters == ["Müller 1"] and full.missing == {"Müller 1": 0}
    assert all(0 <= a.seconds < 120 for a in full.rows)
    assert not b.errors and all(u.startswith(("file:", "data:", "blob:")) for u in b.requests)
    # a saved file goes on in a browser that knows nothing
    b.eval("localStorage.clear()")
    (tmp_path / "partial.csv").write_text(text, newline="")
    b.open(page.as_uri())
    node = b("DOM.querySelector", nodeId=b("DOM.getDocument")["root"]["nodeId"], selector="#file")["nodeId"]
    b("DOM.setFileInputFiles", files=[str(tmp_path / "partial.csv")], nodeId=node)
    assert b.wait("document.getElementById('item').hidden === false") and "3 of 8" in b.eval("document.getElementById('place').textContent")
    b.eval("load(" + json.dumps(text.replace(",tie,", ",left,")) + ")")
    assert "was changed" in b.eval("document.getElementById('said').textContent")
    b.eval("load('item,question')")
    assert "not a file saved by this page" in b.eval("document.getElementById('said').textContent")


@pytest.mark.parametrize("width", [1200, 360])
def test_every_control_is_reached_and_named(browser, tmp_path, width):
    b, kinds = browser, list(all_kinds())
    for s in kinds:
        (page,), _ = s.write(tmp_path / s.kind)
        start(b, page, "7", width)
        seen = b.eval("""({wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
            broken: [...document.images].filter(i => !i.src.startsWith('data:image/') || !i.alt).length,
            unnamed: [...document.querySelectorAll('input')].filter(i => i.type !== 'hidden' && !(i.labels && i.labels.length)).length,
            groups: [...document.querySelectorAll('fieldset')].every(f => f.querySelector('legend').textContent.length > 5),
            small: [...document.querySelectorAll('fieldset label, #item button')].filter(e => e.getBoundingClientRect().height < 40).length})""")
        assert seen["wide"] <= 1 and not seen["broken"] and not seen["unnamed"] and seen["groups"] and not seen["small"], (s.kind, seen)
        reached = set()
        for _ in range(12 + 2 * len(s.questions)):
            key_press(b, "Tab")
            reached.add(b.eval("document.activeElement.id || document.activeElement.name || ''"))
        assert {"next", "part", "digits"} <= reached and any(r.startswith(s.questions[-1].key) for r in reached), reached
        assert not b.errors


def test_hostile_captions_in_a_browser(browser, tmp_path):
    b, p = browser, pictures(len(EVIL))
    s = pairwise(p, dict(zip(p, EVIL)), dict(zip(p, reversed(EVIL))), instructions=EVIL[0], title=EVIL[1])
    (page,), _ = s.write(tmp_path)
    b.errors.clear()
    start(b, page, "1")
    for _ in EVIL:
        assert b.eval("document.querySelectorAll('#stage script, #stage svg').length") == 0 and b.eval("document.querySelectorAll('#stage img').length") == 1
        b.eval("document.getElementById('next').click()")
    assert not b.errors
    # the policy stops what is not the page's own program
    assert b.eval("(() => { window.ran = 0; const e = document.createElement('script'); e.textContent = 'window.ran = 1'; document.body.append(e); return window.ran; })()") == 0
    b.errors.clear()


def test_python_and_the_page_compute_the_same_check_sum(browser, tmp_path):
    (page,), _ = study(1).write(tmp_path)
    browser.open(page.as_uri())
    for text in ("", "a", "ab|fluency|left|Müller 1|0123", "日本語 🐶"): assert browser.eval(f"mark({json.dumps(text)})") == check_sum(text)
    browser.eval("document.getElementById('rater').value = '=1+1'; document.getElementById('begin').click()")
    assert "letters" in browser.eval("document.getElementById('said').textContent") and not browser.eval("document.getElementById('start').hidden")
