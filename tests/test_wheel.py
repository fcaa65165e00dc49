"The built wheel, installed away from the checkout: every module, the data files, the command."
import json, re, subprocess, sys, zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from conftest import PYTHON, ROOT, copy_checkout, python_env, run


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    "The wheel of a clean copy of the checkout."
    copy = copy_checkout(tmp_path_factory.mktemp("source") / "capnb")
    out = tmp_path_factory.mktemp("wheel")
    # The build tools that are installed are used as they are: nothing is fetched here.
    run(PYTHON, "-m", "build", "--no-isolation", "--outdir", out, copy, env=python_env(copy))  # the wheel from the source archive
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    "A folder that holds the wheel's content and nothing else of ours; its parent is the scratch folder to run in."
    site = tmp_path_factory.mktemp("scratch") / "site"
    zipfile.ZipFile(wheel).extractall(site)
    return site


def test_metadata(wheel):
    z = zipfile.ZipFile(wheel)
    meta = Parser().parsestr(z.read(next(n for n in z.namelist() if n.endswith("METADATA"))).decode())
    assert meta["Name"] == "capnb" and meta["Requires-Python"] == ">=3.11"
    assert "Apache-2.0" in (meta["License"] or meta["License-Expression"])
    requires = meta.get_all("Requires-Dist")
    assert any(r.startswith("torch>=") for r in requires) and any("smalldocs" in r and "extra == " in r for r in requires)
    assert "# capnb" in meta.get_payload()
    entry = z.read(next(n for n in z.namelist() if n.endswith("entry_points.txt"))).decode()
    assert "capnb = capnb.study.cli:main" in entry and "capnb._modidx:d" in entry


def test_holds_all_of_the_package(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard", "capnb"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    missing = {n for n in ours.split("\0") if n and (ROOT / n).is_file()} - names
    assert not missing, f"not in the wheel: {sorted(missing)}"
    assert not [n for n in names if n.split("/")[0] not in ("capnb",) and ".dist-info/" not in n], "the wheel holds more than the package"


def test_every_module_imports(installed):
    code = """
import importlib, pkgutil, sys, json
from pathlib import Path
import capnb
assert Path(capnb.__file__).is_relative_to(sys.argv[1]), capnb.__file__
names = [m.name for m in pkgutil.walk_packages(capnb.__path__, 'capnb.')]
for n in names: importlib.import_module(n)
print(json.dumps(names))
"""
    names = json.loads(run(PYTHON, "-c", code, installed, cwd=installed.parent, env=python_env(installed)).strip().splitlines()[-1])
    assert len(names) > 20


def test_shipped_files_are_read(installed):
    "Each weight file opens, each JSON file parses."
    for p in (installed / "capnb").rglob("*.json"): json.loads(p.read_text(encoding="utf-8"))
    from safetensors import safe_open
    for p in (installed / "capnb").rglob("*.safetensors"):
        with safe_open(p, "np") as f: assert len(list(f.keys()))


@pytest.mark.skipif(not (ROOT / "capnb/study/cli.py").exists(), reason="the command line is not there yet")
def test_command(installed):
    "What the `capnb` command calls, run from a folder that is not the checkout."
    call = "import sys; sys.argv[0] = 'capnb'; from capnb.study.cli import main; sys.exit(main())"
    capnb = lambda *a: run(PYTHON, "-c", call, *a, cwd=installed.parent, env=python_env(installed))
    text = capnb("--help")
    assert "study" in text and "capnb study" in text
    assert "torch" in capnb("doctor")
    if list((installed / "capnb/notebooks").glob("*.ipynb")):
        capnb("notebooks", "mine")
        assert len(list((installed.parent / "mine").glob("*.ipynb"))) == 3
