"The documentation site: built by its one command, whole without a network, and looked at in a browser where one is installed."
import html, importlib.util, json, os, re, stat, sys
from pathlib import Path

import pytest
from browser import Browser, find_chromium, serve
from conftest import PYTHON, ROOT, run

spec = importlib.util.spec_from_file_location("build_site", ROOT / ".ci/build_site.py")
build_site = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build_site)
notebooks = [p.relative_to(ROOT / "nbs").as_posix() for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
pages = [build_site.page_path(n).replace(".ipynb", ".html") for n in notebooks]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    "The site as smalldocs renders it; `--check` fails on broken links and ignored settings."
    out = tmp_path_factory.mktemp("site") / "html"
    path = os.pathsep.join(d for d in os.environ["PATH"].split(os.pathsep) if not (Path(d) / "quarto").exists())
    run(PYTHON, ROOT / ".ci/build_site.py", "--check", "--out", out, env=dict(os.environ, PATH=path))
    return out


def test_every_notebook_has_its_page(site):
    others = {p.relative_to(ROOT / "nbs").as_posix() for p in (ROOT / "nbs").rglob("*.html")}  # finished reports and the like
    assert {p.relative_to(site).as_posix() for p in site.rglob("*.html")} == set(pages) | others


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
    build_site.build(tmp_path / "html", check=False)
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


@pytest.mark.parametrize("width", [1200, 390])
def test_pages_in_a_browser(browser, width):
    "No error in the console, no request elsewhere, pictures loaded, formulas of a size, nothing wider than the window."
    for page in pages:
        browser.errors.clear(), browser.requests.clear()
        browser.open(f"{browser.address}/{page}", width=width)
        seen = browser.eval("""({wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
            broken: [...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src.slice(0, 80)),
            flat: [...document.querySelectorAll('math')].filter(m => m.getBoundingClientRect().height < 4).map(m => m.getAttribute('alttext')),
            text: (document.querySelector('main') || document.body).innerText.length})""")
        assert not browser.errors, f"{page}: {browser.errors}"
        away = [u for u in browser.requests if not u.startswith((browser.address, "data:", "blob:"))]
        assert not away, f"{page} asks for {away}"
        assert not seen["broken"] and not seen["flat"], f"{page}: {seen}"
        assert seen["wide"] <= 1, f"{page} is {seen['wide']} px wider than a window of {width} px"
        assert seen["text"] > 200, f"{page} shows almost nothing"


def test_figures_are_on_their_pages(browser):
    with_figures = [p for n, p in zip(notebooks, pages) if any(k.startswith("image/") for c in json.loads((ROOT / "nbs" / n).read_text())["cells"] for o in c.get("outputs", []) for k in o.get("data", {}))]
    for page in with_figures:
        browser.open(f"{browser.address}/{page}")
        assert browser.eval("[...document.querySelectorAll('main img, main .cell-output svg')].filter(i => i.getBoundingClientRect().width > 20).length") > 0, f"{page} lost its figure"


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
