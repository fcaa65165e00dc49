"Order of the tests, which are slow, seconds of work per stage, and the shared fixtures."
import os, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = "notebooks", "layout", "wheel", "tests", "site"
seconds = dict.fromkeys(STAGES, 0.0)


def stage(nodeid: str) -> str:
    name = Path(nodeid.split("::")[0]).stem.removeprefix("test_")
    return name if name in STAGES else "tests"


def pytest_addoption(parser): parser.addoption("--slow", action="store_true", help="run the tests marked slow, too: what takes long and is tested more briefly elsewhere")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long and is tested more briefly elsewhere; run with --slow")
    config.option.loadscopereorder = False  # pytest-xdist hands out the files in the order below


def place(nodeid: str) -> tuple:
    """Where a test comes: notebooks first, as they take longest; the site among the tests, late enough to show the executed notebooks
    and early enough not to be waited for at the end."""
    file = nodeid.split("::")[0]
    return {"notebooks": 0, "layout": 1, "wheel": 2, "site": 4}.get(stage(nodeid), 3 if file < "tests/test_k" else 5), file


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        config.hook.pytest_deselected(items=[o for o in items if o.get_closest_marker("slow")])
        items[:] = [o for o in items if not o.get_closest_marker("slow")]
    items.sort(key=lambda item: place(item.nodeid))


def pytest_runtest_logreport(report): seconds[stage(report.nodeid)] += report.duration


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line("seconds of work: " + ", ".join(f"{k} {v:.0f}" for k, v in seconds.items() if v))


@pytest.fixture(scope="session")
def root() -> Path: return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    "The folder of shared data beside the checkout (or at CAPNB_SHARED): real images that are not part of the project."
    p = Path(os.environ.get("CAPNB_SHARED", ROOT.parent / "shared"))
    if not (p / "data").is_dir(): pytest.skip("no shared data beside the checkout (set CAPNB_SHARED)")
    return p


def copy_checkout(to: Path) -> Path:
    "The checkout as git sees it, new files included, ignored ones not."
    names = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        src, dst = ROOT / name, to / name
        if not src.exists(): continue
        dst.parent.mkdir(parents=True, exist_ok=True)
        if src.is_symlink(): os.symlink(os.readlink(src), dst)
        else: dst.write_bytes(src.read_bytes())
    return to


def run(*cmd, **kw):
    "Run a command and return what it printed; a failure shows both its streams."
    r = subprocess.run([str(c) for c in cmd], capture_output=True, text=True, stdin=subprocess.DEVNULL, **kw)
    assert r.returncode == 0, f"{' '.join(map(str, cmd))} ended with code {r.returncode}\n{r.stdout[-3000:]}\n{r.stderr[-3000:]}"
    return r.stdout


def python_env(path: Path) -> dict:
    "An environment for child processes that import the package from `path`."
    return {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "PYTHONPATH")} | {"PYTHONPATH": str(path), "CAPNB_QUIET": "1"}


PYTHON = sys.executable


@pytest.fixture(scope="module")
def browser():
    "A tab for pages that are files; skipped without Chromium."
    from browser import Browser, find_chromium
    chromium = find_chromium()
    if not chromium: pytest.skip("no Chromium is installed (or name one in CHROME)")
    b = Browser(chromium)
    yield b
    b.close()
