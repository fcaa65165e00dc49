"Results in the form of peft's method comparison, and the Pareto page."
import html as html_, itertools, json, math, random, re, warnings
from html.parser import HTMLParser

import pytest
from browser import Browser, find_chromium

from capnb.core.errors import CapnbError, ConfigError, DataError
from capnb.core.results import load_results
from capnb.personalize.exchange import APP_ENTRY, CONFIG, MEMORY, PACKAGES, SYSTEM, comparison_row, read_method_comparison, to_method_comparison, write_method_comparison
from capnb.personalize.pareto import curve_points, method_points, pareto, pareto_page
from capnb.study.answer import made_up_study


# ---- files of peft's own kind, written by us in the same shape

def theirs(name, last, peft=None, **change):
    run = dict(created_at="2026-08-01T08:00:00+00:00", total_time=1800.5, experiment_name=name, peft_branch="main", peft_worktree_is_dirty=False,
        train_config=dict.fromkeys(CONFIG) | dict(model_id="some/model", seed=0, max_steps=5000), peft_config=peft, error_msg="")
    train = dict.fromkeys(MEMORY, 12_000_000_000) | dict(train_time=1700.2, file_size=36_000_000, num_trainable_params=9_175_040, num_total_params=3_221_924_864, status="success",
        metrics=[{"step": 250, "valid accuracy": .3, "train loss": .9, "train samples": 1000}, {"step": 5000, "train loss": .6, "train samples": 20000, **last}])
    meta = dict(model_info=dict(sha="a", created_at="b"), dataset_info={"d": dict(sha="a", created_at="b")}, package_info={f"{p}-version": "1" for p in PACKAGES}, system_info=dict.fromkeys(SYSTEM, "x"), pytorch_info="")
    return dict(run_info=run | change.get("run", {}), train_info=train | change.get("train", {}), meta_info=meta)


MATHS = {"test accuracy": .48, "train total tokens": 4_197_579, "forgetting": .05, "forgetting before": 1.5}
IMAGES = {"test dino_similarity": .66, "drift": .21}


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items(): (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def test_reads_peft_files(tmp_path):
    folder = write(tmp_path / "MetaMathQA" / "results", **{"lora--r32": theirs("lora/r32", MATHS, dict(peft_type="LORA", r=32)), "full--lr": theirs("full/lr", MATHS)})
    write(folder, **{"oft--flux": theirs("oft/flux", IMAGES, dict(peft_type="OFT"))})
    full, lora, oft = read_method_comparison(tmp_path / "MetaMathQA")
    assert (full["peft_type"], lora["peft_type"], lora["task_name"], oft["task_name"]) == ("full-finetuning", "LORA", "MetaMathQA", "image-gen")
    assert lora["test_accuracy"] == .48 and lora["forgetting"] == .05 and lora["forgetting_before"] == 1.5 and lora["train_total_tokens"] == 4_197_579
    assert oft["test_dino_similarity"] == .66 and oft["drift"] == .21 and "forgetting" not in oft
    named = ("task_name experiment_name model_id train_config peft_type peft_config total_time train_time file_size num_trainable_params train_loss train_samples "
             "peft_version peft_branch transformers_version datasets_version torch_version package_info system_info created_at").split()
    for row in (full, lora, oft): assert {*named, *MEMORY} <= row.keys()
    assert read_method_comparison(folder / "full--lr.json") == [full]
    assert "full" in pareto_page([full, lora])


BAD = dict(torn=('{"run_info": {"created', "not whole JSON"), empty=("", "empty"), alist=("[1, 2]", "not an object"), other=('{"a": 1}', "run_info is missing"),
    nan=(json.dumps(theirs("a/b", MATHS)).replace("0.48", "NaN"), "NaN"), failed=(theirs("a/b", MATHS, train=dict(status="failed")), "status 'failed'"),
    cancelled=(theirs("a/c", MATHS, train=dict(status="canceled")), "status 'canceled'"), unforgotten=(theirs("a/d", {k: v for k, v in MATHS.items() if k != "forgetting"}), "forgetting is missing"),
    drifting=(theirs("a/e", {"test dino_similarity": .6}), "drift is missing"), text=(theirs("a/f", MATHS | {"test accuracy": "0.4"}), "not a finite number"), true=(theirs("a/g", MATHS | {"forgetting": True}), "not a finite number"),
    nothing=(theirs("a/h", MATHS, train=dict(metrics=[])), "score"), scoreless=(theirs("a/i", {}), "score"), old=(theirs("a/j", MATHS, train=dict(accelerator_memory_max=None)), "accelerator_memory_max is missing"),
    peft=(theirs("a/k", MATHS, dict(r=8)), "another form"), words=(theirs("a/l", MATHS, "LORA"), "another form"), block=(theirs("a/m", MATHS, run=dict(capnb="x")), "another form"), stepless=(theirs("a/n", MATHS, train=dict(metrics=3)), "metrics"))


def test_bad_files_are_named_and_left_out(tmp_path):
    write(tmp_path, good=theirs("lora/r32", MATHS), **{k: v for k, (v, _) in BAD.items()})
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe{}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = read_method_comparison(tmp_path)
    assert [r["experiment_name"] for r in rows] == ["lora/r32"] and rows.skipped.keys() == {f"{k}.json" for k in BAD} | {"bytes.json"}
    for k, (_, why) in BAD.items(): assert why in rows.skipped[f"{k}.json"], (k, rows.skipped[f"{k}.json"])
    page = pareto_page(tmp_path)
    assert "unforgotten.json" in page and "forgetting is missing" in page
    files = write_method_comparison(tmp_path, tmp_path / "out")
    assert len(files) == 1 and files.skipped.keys() == rows.skipped.keys()
    with pytest.raises(DataError, match="no results"): read_method_comparison(tmp_path / "nowhere")


# ---- ours

@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return made_up_study(tmp_path_factory.mktemp("study"), dict(zero_shot=0., prompt=.1, lora=.5, full=.55), seeds=3)


def test_study_goes_out_and_comes_in(study, tmp_path):
    files = write_method_comparison(study, tmp_path)
    assert len(files) == 10 and not files.skipped and all(f.parent == tmp_path / "results" and re.fullmatch(r"[a-z_]+--[^/]+\.json", f.name) for f in files)
    rows = read_method_comparison(tmp_path)
    assert rows == read_method_comparison(study)
    raw = {r["run_info"]["experiment_name"]: r for r in load_results(study / "results")}
    own = lambda r: -sum(r["study"]["own"]["log_prob"]) / sum(r["study"]["own"]["tokens"])
    zero = next(own(r) for n, r in raw.items() if n.startswith("zero_shot"))
    for row in rows:
        r = raw[row["experiment_name"]]
        corpus = {d: v["scores"]["corpus"]["CIDEr-D"] for d, v in r["study"]["domains"].items()}
        assert row["test_score"] == corpus["target"] and all(row[f"{d}_CIDEr-D"] == corpus[d] for d in ("source", "near", "out"))
        assert row["forgetting"] == pytest.approx(own(r) - zero) and row["method"] == r["study"]["run"]["method"] and row["seed"] == r["study"]["run"]["seed"]



def test_app_can_read_what_we_write(study, tmp_path):
    "What the app does with a file, key by key, and the types of its table."
    for f in write_method_comparison(study, tmp_path):
        r = json.loads(f.read_text(encoding="utf-8"))
        run, train, meta = r["run_info"], r["train_info"], r["meta_info"]
        last = train["metrics"][-1]
        assert run["peft_config"] is None or isinstance(run["peft_config"]["peft_type"], str)
        assert isinstance(run["train_config"]["model_id"], str) and train["status"] == "success"
        for k in (*MEMORY, "file_size", "num_trainable_params", "num_total_params"): assert type(train[k]) is int, k
        for k in ("train samples", "train total tokens"): assert type(last[k]) is int, k
        for k in ("test score", "forgetting"): assert math.isfinite(last[k])
        assert last["train loss"] is None or math.isfinite(last["train loss"])
        for k in APP_ENTRY["columns"].values(): assert k in last
        for p in PACKAGES: assert {f"{p}-version", f"{p}-commit-hash"} <= meta["package_info"].keys()
        assert "study" not in r and f.stat().st_size < 60_000
        assert to_method_comparison(r) == r


def test_values_of_the_run_win(study):
    raw = load_results(study / "results")
    lora = next(r for r in raw if r["run_info"]["experiment_name"].startswith("lora"))
    lora["train_info"]["metrics"][-1] |= {"forgetting": .7, "test score": 3., "source CIDEr-D": .1, "train total tokens": 12, "train samples": 8, "kept": .9}
    row = comparison_row(to_method_comparison(lora, task="mine"))
    assert (row["forgetting"], row["test_score"], row["source_CIDEr-D"], row["train_total_tokens"], row["train_samples"], row["kept"], row["task_name"]) == (.7, 3., .1, 12, 8, .9, "mine")
    lora["train_info"]["metrics"][-1]["forgetting"] = float("nan")
    with pytest.raises(CapnbError, match="nan"): to_method_comparison(lora)
    lora["train_info"]["status"] = "failed"
    with pytest.raises(DataError, match="lora"): to_method_comparison(lora)


# ---- the front

def slow(ps):
    ok = [i for i, p in enumerate(ps) if all(v is not None and math.isfinite(v) for v in p)]
    return [i for i in ok if not any(ps[j][0] >= ps[i][0] and ps[j][1] >= ps[i][1] and ps[j] != ps[i] for j in ok)]


def test_front_is_the_definition():
    rng = random.Random(3)
    for trial in range(300):
        pick = lambda: rng.choice([rng.randint(-3, 3), rng.random(), None, math.nan, math.inf, -math.inf, 0., -0.]) if trial % 3 else rng.randint(0, 4)
        ps = [(pick(), pick()) for _ in range(rng.randint(0, 25))]
        found = pareto(ps)
        assert sorted(found) == slow(ps) and [ps[i][0] for i in found] == sorted(ps[i][0] for i in found)
    many = [(rng.random(), rng.random()) for _ in range(2000)]
    assert sorted(pareto(many)) == slow(many)


# ---- the page

def row(method, seed=0, **values):
    return dict(dict(task_name="captioning", method=method, seed=seed, model_id="tiny", experiment_name=f"{method}/{seed}", test_score=.5, forgetting=0., num_trainable_params=9, file_size=36, accelerator_memory_max=0, train_time=2.), **values)


HOSTILE = ["</script><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "$\\frac{", "&lt;b&gt;", "' onload='x", "a\u202eb", "línea 図", "x" * 400, "", "constructor", "__proto__"]


class Tags(HTMLParser):
    "What a browser sees: names of elements, and attributes."
    def __init__(self, page):
        super().__init__(); self.names, self.attributes = [], []
        self.feed(page)
    def handle_starttag(self, tag, attrs): self.names.append(tag); self.attributes += [(k, v or "") for k, v in attrs]


def data_of(page): return json.loads(html_.unescape(re.search(r'data-points="([^"]*)"', page)[1]))


def test_hostile_names_and_missing_numbers():
    rows = [row("zero_shot", **{"source_CIDEr-D": .8})] + [row(n, test_score=.6 + i / 10, forgetting=[.1, math.nan, None, math.inf][i % 4], **{"source_CIDEr-D": [.5, None, math.nan][i % 3]}) for i, n in enumerate(HOSTILE)]
    page = pareto_page(rows, title=HOSTILE[0], curves={HOSTILE[1]: dict(alphas=[0, 1], values=dict(gain=[0., math.nan], kept=[1., .5]))})
    assert page.count("<script>") == page.count("</script>") == 1 and "<img" not in page and "\u202e" not in page
    assert not re.search(r"NaN|Infinity|[\s>(\[]nan\b", re.sub(r"<script>.*?</script>", "", page, flags=re.S))
    found = Tags(page)
    assert not {"img", "iframe", "link", "object", "b"} & set(found.names) and found.names.count("script") == 1
    assert all(v.startswith("#") for k, v in found.attributes if k in ("src", "href", "xlink:href")) and not any(k.startswith("on") for k, _ in found.attributes)
    assert "url(http" not in page and "@import" not in page
    assert [m["label"] for m in data_of(page)["methods"]][1] == HOSTILE[0].replace("_", " ")
    assert len(data_of(page)["curves"][0]["points"][1]) == 2  # a missing value is no value


def test_one_method_and_none(tmp_path):
    page = pareto_page([row("lora")], tmp_path / "p.html")
    assert (tmp_path / "p.html").read_text(encoding="utf-8") == page and len(data_of(page)["methods"]) == 1 and "gain" not in data_of(page)["axes"]
    for nothing in ([], [row("lora", test_score=None, forgetting=None, num_trainable_params=None, file_size=None, accelerator_memory_max=None, train_time=None)]):
        with pytest.raises(ConfigError): pareto_page(nothing)


def test_means_over_seeds_and_models():
    rows = [row("zero_shot", test_score=.5), row("zero_shot", model_id="other", test_score=1.), *(row("lora", s, test_score=.5 + s) for s in range(3)), row("lora", model_id="other", test_score=1.25)]
    points = {p["label"]: p for p in method_points(rows)}
    assert points["lora on tiny"]["values"]["gain"] == (1., 0., 2.) and points["lora on other"]["values"]["gain"] == (.25, .25, .25) and points["lora on tiny"]["seeds"] == 3
    assert points["lora on tiny"]["values"]["kept"] is None
    assert method_points([row("zero_shot", **{"source_CIDEr-D": 0.}), row("full", **{"source_CIDEr-D": .1})])[1]["values"]["kept"] is None  # nothing was there to be kept
    class Curve: alphas, values = [0., 1.], dict(target=[1., 3.], source=[2., 1.])
    assert curve_points(Curve()) == [dict(alpha=0., target=1., source=2., gain=0., kept=1.), dict(alpha=1., target=3., source=1., gain=2., kept=.5)]
    with pytest.raises(ConfigError): curve_points(dict(alphas=[0, 1], values=dict(gain=[1])))


def test_page_in_a_browser(study, tmp_path):
    chromium = find_chromium()
    if not chromium: pytest.skip("no Chromium")
    pytest.importorskip("websocket")
    sweep = dict(alphas=[0, .5, 1], values=dict(gain=[0., .3, .5], kept=[1., .95, .8]))
    pareto_page(read_method_comparison(study) + [row(HOSTILE[0], test_score=1.2, **{"source_CIDEr-D": .9})], tmp_path / "index.html", {"lora": sweep})
    data = data_of((tmp_path / "index.html").read_text(encoding="utf-8"))
    sign = lambda k: -1 if data["axes"][k]["better"] == "low" else 1
    tab = Browser(chromium)
    try:
        tab.open(f"file://{tmp_path / 'index.html'}", width=390, height=800)
        assert tab.eval("document.querySelectorAll('#pareto svg').length") == 1 and tab.eval("document.documentElement.scrollWidth") <= 390
        assert tab.eval("[...document.querySelectorAll('#pareto title')].filter(t=>t.textContent.startsWith('lora, alpha')).length") == 3
        for x, y in itertools.permutations(["gain", "kept", "lost", "num_trainable_params"], 2):
            tab.eval(f"for(const [k,v] of [['x','{x}'],['y','{y}']]){{const e=document.getElementById('axis-'+k);e.value=v;e.dispatchEvent(new Event('change'))}}")
            seen = [m for m in data["methods"] if m["values"].get(x) and m["values"].get(y)]
            want = {seen[i]["label"] for i in pareto([(sign(x) * m["values"][x][0], sign(y) * m["values"][y][0]) for m in seen])}
            assert set(tab.eval("[...document.querySelectorAll('#pareto circle[tabindex]')].filter(c=>c.getAttribute('aria-label').endsWith('on the front')).map(c=>c.getAttribute('aria-label').split(': ')[0])")) == {w.split(": ")[0] for w in want}, (x, y)
            assert tab.eval("document.querySelectorAll('#pareto circle[tabindex]').length") == len(seen)
        tab.eval("document.getElementById('axis-x').focus()")
        assert tab.eval("document.activeElement.id") == "axis-x" and not tab.errors
        assert all(u.startswith(("file:", "data:")) for u in tab.requests)
    finally: tab.close()
