"""The documentation site: `python .ci/build_site.py` builds it into `_docs/`, `--out DIR` elsewhere.

Notebooks are staged in a scratch folder (the executed copies of the last test run where there are any), nbdev adds the API
entries, pages lose the number of their notebook, and Quarto renders them where it is installed, smalldocs elsewhere: the
addresses are the same. Formulas become MathML here, so that no page asks the network for anything.
Broken links and settings that smalldocs would ignore are errors.
The example report is put together as `report/index.html`; any .html file under nbs/ goes along under its own name too. Both can be
linked from a notebook, as pages of the site: the README leaves such links out.
"""
import argparse, ast, html, json, os, re, shutil, subprocess, sys, tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import example_report
from regenerate import relink, source

ROOT = Path(__file__).resolve().parent.parent
EXPORT = re.compile(r"^#\|\s*(export|exports|exporti)\b", re.M)
NUMBER = re.compile(r"^\d+[a-zA-Z0-9]*_")  # as nbdev: 03_registry.ipynb is the page registry.html


def page_path(path: str) -> str:
    "The staged path of the notebook `path`: folders as they are, the name without its number."
    folder, _, name = path.rpartition("/")
    return f"{folder}/{NUMBER.sub('', name.lower())}".lstrip("/") if name.endswith(".ipynb") else path


def title(nb: Path) -> str:
    "The first heading of a notebook."
    for cell in json.loads(nb.read_text(encoding="utf-8"))["cells"]:
        m = re.search(r"^# +(.+?) *$", source(cell), re.M) if cell["cell_type"] == "markdown" else None
        if m: return re.sub(r"[`*]", "", m[1])
    return page_path(nb.name).removesuffix(".ipynb").replace("_", " ")


def heading(area: str) -> str:
    "An area's heading: what its package's docstring says before the colon."
    tree = ast.parse((ROOT / "capnb" / area / "__init__.py").read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or area.capitalize()).split(":")[0]


def sidebar(nbs: Path) -> list:
    "The sidebar: the front page, then the areas in their order, each notebook under its own title."
    sys.path.insert(0, str(ROOT))
    from capnb.core.registry import AREAS
    out = [{"text": "Start here", "href": "index.ipynb"}]
    for area in reversed(AREAS):  # a reader meets studies first, foundations last
        pages = [{"text": title(p), "href": page_path(f"{area}/{p.name}")} for p in sorted((nbs / area).glob("*.ipynb"))]
        if pages: out.append({"section": heading(area), "contents": pages})
    return out


def stage(project: Path) -> Path:
    "Copy what the site needs into `project`, let nbdev add the API entries, rename the pages; returns the folder to render."
    shutil.copy(ROOT / "pyproject.toml", project)
    os.symlink(ROOT / "capnb", project / "capnb")
    shutil.copytree(ROOT / "nbs", project / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints", "sidebar.yml"))
    write_report(project / "nbs")
    for done in (ROOT / ".executed").glob("**/*.ipynb"):
        to = project / "nbs" / done.relative_to(ROOT / ".executed")
        if to.exists() and sources(done) == sources(to): shutil.copy(done, to)
    for p in (project / "nbs").rglob("*.ipynb"):  # nbdev would run every cell with an import, by itself: the saved outputs count
        nb = json.loads(p.read_text(encoding="utf-8"))
        for cell in nb["cells"]:
            if cell["cell_type"] == "code" and not EXPORT.search(source(cell)): cell["source"] = "#| eval: false\n" + source(cell)
        p.write_text(json.dumps(nb), encoding="utf-8")
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1", "CAPNB_QUIET": "1"}
    code = "from nbdev.quarto import refresh_quarto_yml, proc_nbs; refresh_quarto_yml(); proc_nbs('nbs', n_workers=2, force=True)"
    subprocess.run([sys.executable, "-c", f"if __name__ == '__main__':\n    {code}"], cwd=project, env=env, check=True)
    pages = project / "_proc"
    for p in sorted(pages.rglob("*.ipynb")):
        nb = without_sources(json.loads(p.read_text(encoding="utf-8")))
        for cell in nb["cells"]:
            if cell["cell_type"] == "markdown": cell["source"] = relink(source(cell), page_link)
            if cell["cell_type"] == "raw": cell["source"] = re.sub(r"^output-file:.*\n", "", source(cell), flags=re.M)
        p.unlink()
        to = p.with_name(page_path(p.name))
        if to.exists(): sys.exit(f"two notebooks make the page {to.relative_to(pages)}: rename one of them")
        to.write_text(json.dumps(nb), encoding="utf-8")
    return pages


def write_report(nbs: Path) -> None:
    "The example report, a page that is linked from the front page."
    sys.path.insert(0, str(ROOT))
    to = nbs / "report/index.html"
    to.parent.mkdir(exist_ok=True)
    to.write_text(example_report.page(), encoding="utf-8")


SOURCE_LINK = re.compile(r"\[source\]\(/?blob/[^)]*\)(\{[^}]*\})?\s*")


def without_sources(x):
    "Drop nbdev's links to source files: the project names no host for them."
    if isinstance(x, str): return SOURCE_LINK.sub("", x)
    if isinstance(x, list): return [without_sources(o) for o in x]
    return {k: without_sources(v) for k, v in x.items()} if isinstance(x, dict) else x


def sources(nb: Path) -> list: return [source(c) for c in json.loads(nb.read_text(encoding="utf-8"))["cells"]]


def page_link(target: str) -> str:
    path, hash_, tail = target.partition("#")
    return page_path(path) + hash_ + tail


def settings(pages: Path, quarto: bool) -> None:
    "Write the staged `_quarto.yml`: ours, with nbdev's title and the sidebar, and only what the renderer reads."
    import yaml
    cfg, extra = (yaml.safe_load((pages / f).read_text(encoding="utf-8")) for f in ("_quarto.yml", "nbdev.yml"))
    web = cfg["website"]
    web |= {k: extra["website"][k] for k in ("title", "description")}
    web["sidebar"] = web["sidebar"] | {"contents": sidebar(pages.parent / "nbs")}
    cfg["project"]["output-dir"] = "_site"
    cfg.pop("metadata-files")
    if not quarto: cfg["format"]["html"].pop("html-math-method")
    (pages / "nbdev.yml").unlink()
    (pages / "_quarto.yml").write_text(yaml.safe_dump(cfg, sort_keys=False, allow_unicode=True), encoding="utf-8")


def mathml(tex: str, display: bool, where: str) -> str:
    "A formula as MathML, which browsers draw by themselves."
    from latex2mathml.converter import convert
    tex = html.unescape(tex).strip()
    try: out = convert(tex, display="block" if display else "inline")
    except Exception as e: sys.exit(f"{where}: this formula cannot be rendered ({type(e).__name__}: {e}): {tex}")
    left = re.search(r">(\\[a-zA-Z]+)<", out)
    if left: sys.exit(f"{where}: {left[1]} is not known in the formula {tex}")
    return out.replace("<math ", f'<math alttext="{html.escape(tex)}" ', 1)


MATH = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.S)
REMOTE = re.compile(r'[ \t]*(?:<script[^>]*\bsrc="(?:https?:)?//[^"]*"[^>]*>\s*</script>|<link[^>]*\bhref="(?:https?:)?//[^"]*"[^>]*>)\n?')


def finish(site: Path) -> None:
    "Formulas become MathML, and what a page would fetch from another host goes."
    for p in site.rglob("*.html"):
        text = p.read_text(encoding="utf-8")
        new = MATH.sub(lambda m: f'<span class="math {m[1]}">{mathml(m[2], m[1] == "display", str(p.relative_to(site)))}</span>', text)
        p.write_text(REMOTE.sub("", new), encoding="utf-8")


def build(out: Path) -> None:
    quarto = shutil.which("quarto")
    with tempfile.TemporaryDirectory(prefix="capnb-site-") as tmp:
        pages = stage(Path(tmp))
        settings(pages, bool(quarto))
        if quarto: subprocess.run([quarto, "render", "--no-execute"], cwd=pages, check=True)
        else: subprocess.run([sys.executable, "-m", "smalldocs.cli", "render", "--strict", "--quiet", str(pages)], check=True)
        finish(pages / "_site")
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(pages / "_site", out)
    print(f"{len(list(out.rglob('*.html')))} pages in {out}, rendered with {'Quarto' if quarto else 'smalldocs'}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=ROOT / "_docs", help="folder to write, emptied first")
    a = p.parse_args()
    try: build(a.out.resolve())
    except subprocess.CalledProcessError as e: sys.exit(f"the site was not built: {' '.join(map(str, e.cmd[-3:]))} ended with code {e.returncode}")


if __name__ == "__main__":
    main()
