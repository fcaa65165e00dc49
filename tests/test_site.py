"The documentation site: built by its one command, whole without a network, and looked at in a browser where one is installed."
import base64, html, importlib.util, io, json, os, re, stat, sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from browser import Browser, find_chromium, serve
from conftest import PYTHON, ROOT, run
from PIL import Image

from capnb.data.scenes import Scenes

spec = importlib.util.spec_from_file_location("build_site", ROOT / ".ci/build_site.py")
build_site = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build_site)
notebooks = [p.relative_to(ROOT / "nbs").as_posix() for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
pages = [build_site.page_path(n).replace(".ipynb", ".html") for n in notebooks]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    "The site as smalldocs renders it; broken links and ignored settings are errors."
    out = tmp_path_factory.mktemp("site") / "html"
    path = os.pathsep.join(d for d in os.environ["PATH"].split(os.pathsep) if not (Path(d) / "quarto").exists())
    run(PYTHON, ROOT / ".ci/build_site.py", "--out", out, env=dict(os.environ, PATH=path))
    return out


def test_every_notebook_has_its_page(site):
    others = {p.relative_to(ROOT / "nbs").as_posix() for p in (ROOT / "nbs").rglob("*.html")} | {"report/index.html"}
    assert {p.relative_to(site).as_posix() for p in site.rglob("*.html")} == set(pages) | others


def test_example_report(site):
    "It is whole, shows the scenes it names, and holds the numbers of the table on the front page."
    text = (site / "report/index.html").read_text(encoding="utf-8")
    stored = json.loads((ROOT / "nbs/results/study_scenes.json").read_text(encoding="utf-8"))
    shown = re.findall(r'<img src="data:image/png;base64,([^"]*)" alt="(\w+) image \w+-test-0-(\d+):', text)
    assert len(shown) == text.count("<img") == 14 and {d for _, d, _ in shown} == {"target", "source", "near", "out"}
    for data, domain, i in shown:
        assert Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB").tobytes() == Scenes(domain, int(i) + 1, split="test")[int(i)].load_image().tobytes()
    assert text.count(build_site.example_report.style()) == 1 and "<style></style>" not in text and 'href="report/index.html"' in (site / "index.html").read_text(encoding="utf-8")
    sign = lambda x: f"{x:+.2f}".replace("-", "−")
    for row in stored["rows"][1:]:
        d = row["gained"][stored["lead"]]
        assert f'<b>{d["a"]:.2f}</b><small class="{"up" if d["low"] > 0 else "same"}">{sign(d["value"])} <span class="ci">[{sign(d["low"])}, {sign(d["high"])}]' in text, row["method"]


def test_the_picture_of_the_report(site):
    "Well-formed, the same wherever it is made, and its words are those of the page."
    svg = (ROOT / "nbs/report.svg").read_text(encoding="utf-8")
    assert svg == build_site.example_report.picture() and (site / "report.svg").read_text(encoding="utf-8") == svg
    said = " ".join(t.text for t in ElementTree.fromstring(svg).findall("{http://www.w3.org/2000/svg}text"))
    page = html.unescape(re.sub("<[^>]*>", " ", (site / "report/index.html").read_text(encoding="utf-8")))
    assert len(said) > 800 and all(s in " ".join(page.split()) for s in re.split(r"(?<=\.) ", said.split("Gained ")[1].replace("Not forgotten ", "")))


def test_the_readme_has_no_link_to_the_site():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)#]+)", text) if not t.startswith("http")]
    assert len(targets) > 10 and all((ROOT / t).exists() for t in targets), [t for t in targets if not (ROOT / t).exists()]


def test_pages_ask_nothing_of_the_network(site):
    for p in [*site.rglob("*.html"), *site.rglob("*.css"), *site.rglob("*.js")]:
        text = p.read_text(encoding="utf-8", errors="replace")
        asked = re.findall(r"""(?:<(?:script|img|iframe|source|video)\b[^>]*\bsrc=|<link\b[^>]*\bhref=)["'](?:https?:)?//[^"']+|@import\s+["'(]?(?:url\()?["']?https?:[^"')]+|url\(["']?(?:https?:)?//[^"')]+""", text)
        assert not asked, f"{p.relative_to(site)} asks for {asked[:3]}"


def test_formulas_are_drawn(site):
    for n, page in zip(notebooks, pages):
        text = (site / page).read_text(encoding="utf-8")
        assert "katex" not in text.lower() and "mathjax" not in text.lower()
        cells = json.loads((ROOT / "nbs" / n).read_text(encoding="utf-8"))["cells"]
        prose = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown" and not re.search(r"^#\|\s*hide", "".join(c["source"]), re.M))
        if re.search(r"^\$\$", re.sub(r"```.*?```", "", prose, flags=re.S), re.M): assert "<math" in text, f"{page} shows no formula"


def test_unknown_formulas_stop_the_build():
    assert "<mfrac>" in build_site.mathml(r"\frac{a}{b}", True, "page")
    with pytest.raises(SystemExit, match="page.*nosuch"): build_site.mathml(r"a + \nosuch", False, "page")


def test_links_to_notebooks_lose_their_number():
    assert build_site.page_link("../data/00_records.ipynb#splits") == "../data/records.ipynb#splits"
    assert build_site.relink("see [a](../core/01_files.ipynb) and [b](https://x.org/01_y.ipynb)\n```\n[c](01_z.ipynb)\n```", build_site.page_link) == \
        "see [a](../core/files.ipynb) and [b](https://x.org/01_y.ipynb)\n```\n[c](01_z.ipynb)\n```"


def test_quarto_gets_the_same_pages(tmp_path, monkeypatch):
    "With a `quarto` on the path, that renders what is staged: here a stand-in that lists the pages it was given."
    fake = tmp_path / "bin/quarto"
    fake.parent.mkdir()
    fake.write_text(f"#!{sys.executable}\n" + """
import pathlib, sys, yaml
cfg = yaml.safe_load(pathlib.Path("_quarto.yml").read_text())
assert sys.argv[1] == "render" and cfg["website"]["sidebar"]["contents"] and cfg["format"]["html"]["html-math-method"] == "mathml"
for p in pathlib.Path(".").rglob("*.ipynb"):
    to = pathlib.Path(cfg["project"]["output-dir"], p.with_suffix(".html"))
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text('<script src="https://cdn.example/x.js"></script><p>page</p>')
""")
    fake.chmod(fake.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{fake.parent}{os.pathsep}{os.environ['PATH']}")

    def stage(project):  # the staging itself is what the other tests build with; here the names are enough
        for n in notebooks:
            to = project / "_proc" / build_site.page_path(n)
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_text("{}")
        (project / "nbs").symlink_to(ROOT / "nbs")
        for f in ("_quarto.yml", "nbs/nbdev.yml"): (project / "_proc" / Path(f).name).write_text((ROOT / f).read_text())
        return project / "_proc"

    monkeypatch.setattr(build_site, "stage", stage)
    build_site.build(tmp_path / "html")
    assert {p.relative_to(tmp_path / "html").as_posix() for p in (tmp_path / "html").rglob("*.html")} == set(pages)
    assert (tmp_path / "html/index.html").read_text() == "<p>page</p>"


def test_sidebar_follows_the_areas():
    from capnb.core.registry import AREAS
    names = [e["section"] for e in build_site.sidebar(ROOT / "nbs") if "section" in e]
    assert names == [build_site.heading(a) for a in reversed(AREAS) if list((ROOT / "nbs" / a).glob("*.ipynb"))]


# ---- in a browser

@pytest.fixture(scope="module")
def browser(site):
    chromium = find_chromium()
    if not chromium: pytest.skip("no Chromium is installed (or name one in CHROME)")
    server, address = serve(site)
    b = Browser(chromium)
    b.address = address
    yield b
    b.close()
    server.shutdown()


LOOK = """({wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    broken: [...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src.slice(0, 80)),
    flat: [...document.querySelectorAll('math')].filter(m => m.getBoundingClientRect().height < 4).map(m => m.getAttribute('alttext')),
    figures: [...document.querySelectorAll('main img, main .cell-output svg')].filter(i => i.getBoundingClientRect().width > 20).length,
    text: (document.querySelector('main') || document.body).innerText.length})"""


def test_pages_in_a_browser(browser):
    "No error in the console, no request elsewhere, pictures and figures there, formulas of a size, nothing wider than a wide or a narrow window."
    pictures = lambda n: any(k.startswith("image/") for c in json.loads((ROOT / "nbs" / n).read_text())["cells"] for o in c.get("outputs", []) for k in o.get("data", {}))
    for notebook, page in zip(notebooks, pages):
        browser.errors.clear(), browser.requests.clear()
        browser.open(f"{browser.address}/{page}")
        for width in 1200, 390:
            browser.resize(width)
            seen = browser.eval(LOOK)
            assert not seen["broken"] and not seen["flat"], f"{page} at {width} px: {seen}"
            assert seen["wide"] <= 1, f"{page} is {seen['wide']} px wider than a window of {width} px"
            assert seen["text"] > 200, f"{page} shows almost nothing at {width} px"
            assert seen["figures"] or not pictures(notebook), f"{page} lost its figure"
        assert not browser.errors, f"{page}: {browser.errors}"
        away = [u for u in browser.requests if not u.startswith((browser.address, "data:", "blob:"))]
        assert not away, f"{page} asks for {away}"


def test_search(browser):
    "Typing into the search box finds a page, and the hit leads there."
    browser.errors.clear()
    browser.open(f"{browser.address}/index.html")
    browser.eval("(() => { const i = document.querySelector('.smalldocs-search input'); i.focus(); i.value = 'atomic'; i.dispatchEvent(new Event('input', {bubbles: true})); i.dispatchEvent(new KeyboardEvent('keyup', {key: 'c', bubbles: true})); })()")
    hit = browser.wait("document.querySelector('.search-result')?.href")
    assert hit and hit.startswith(browser.address), "the search found nothing"
    browser.open(hit)
    assert not browser.errors and "atomic" in browser.eval("document.body.innerText").lower()


def test_sidebar_leads_everywhere(browser):
    browser.open(f"{browser.address}/index.html")
    linked = set(browser.eval("[...document.querySelectorAll('a')].map(a => a.href.split('#')[0])"))
    missing = [p for p in pages if f"{browser.address}/{p}" not in linked and p != "index.html"]
    assert not missing, f"the sidebar leaves out {missing}"
