"""Every notebook runs, in a child process of its own with a hard limit, and its saved text is what it printed.

Two notebooks at a time, one thread each. The executed copies stay in `.executed/` (the site shows them); figures are not compared,
and the last digits of decimal numbers may differ between machines."""
import json, multiprocessing, os, re, threading, time, tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forked
import pytest
from conftest import ROOT

LIMIT = float(os.environ.get("CAPNB_NOTEBOOK_SECONDS", 120))  # for one notebook; more on a machine that is busy with something else
NBS, DONE = ROOT / "nbs", ROOT / ".executed"
notebooks = sorted(p for p in NBS.rglob("*.ipynb") if not any(o.startswith((".", "_")) for o in p.relative_to(NBS).parts))
ids = [p.relative_to(NBS).as_posix() for p in notebooks]


@pytest.fixture(scope="module")
def results(request):
    "Starts all collected notebooks, two at a time; gives a future for each."
    wanted = [i.callspec.params["nb"] for i in request.session.items if "nb" in getattr(getattr(i, "callspec", None), "params", {}) and i.fspath == request.fspath]
    flags = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["nbdev"]["tst_flags"]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["forked"])
    old = {k: os.environ.get(k) for k in ("CAPNB_PRELOAD", "OMP_NUM_THREADS", "PYTHONPATH")}
    os.environ.update(CAPNB_PRELOAD="1", OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), str(ROOT)]))
    starting = threading.Lock()

    def one(nb: Path):
        copy, log = DONE / nb.relative_to(NBS), DONE / nb.relative_to(NBS).with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        copy.unlink(missing_ok=True)
        with starting:
            child = context.Process(target=forked.execute, args=(str(nb), str(copy), str(ROOT), str(log), flags))
            child.start()
        start = time.time()
        child.join(LIMIT)
        late = child.is_alive()
        forked.kill(child)
        return "late" if late else child.exitcode, time.time() - start, log

    pool = ThreadPoolExecutor(2)
    yield {nb: pool.submit(one, nb) for nb in sorted(dict.fromkeys(wanted), key=lambda p: p.stat().st_size, reverse=True)}
    pool.shutdown(cancel_futures=True)
    for k, v in old.items(): os.environ.pop(k) if v is None else os.environ.update({k: v})


def said(cell) -> list:
    "The text of a cell's outputs, pictures left out."
    out = []
    for o in cell.get("outputs", []):
        data = o.get("data", {})
        if any(k.startswith("image/") for k in data): continue
        text = "".join(o.get("text", "")) or "".join(data.get("text/markdown", data.get("text/html", data.get("text/plain", ""))))
        text = re.sub(r'(?:data:image/[^"\')\s]*|<svg.*?</svg>)', "", text, flags=re.S)
        if text.strip() and not text.startswith("<Figure"): out.append(text.strip())
    return out


NUMBER = re.compile(r"-?\d+\.\d+(?:e[+-]?\d+)?")


def same(a: str, b: str) -> bool:
    "Equal text; decimals may differ by 2 % or two units of the last place printed, whole numbers may not."
    x, y = NUMBER.findall(a), NUMBER.findall(b)
    if len(x) != len(y) or re.sub(r"\s+", " ", NUMBER.sub("0", a)) != re.sub(r"\s+", " ", NUMBER.sub("0", b)): return False
    near = lambda u, v: abs(float(u) - float(v)) <= max(.02 * abs(float(u)), 2.001 * 10.0 ** -len(u.split("e")[0].split(".")[1]))
    return all(near(u, v) for u, v in zip(x, y))


@pytest.mark.parametrize("nb", notebooks, ids=ids)
def test_notebook(nb, results):
    code, took, log = results[nb].result()
    text = log.read_text(encoding="utf-8", errors="replace")[-4000:]
    assert code != "late", f"{nb.name} ran longer than {LIMIT:.0f} s\n{text}"
    assert code == 0, f"{nb.name} failed (exit code {code})\n{text}"
    load = lambda p: json.loads(p.read_text(encoding="utf-8"))["cells"]
    for saved, now in zip(load(nb), load(DONE / nb.relative_to(NBS)), strict=True):
        a, b = said(saved), said(now)
        assert len(a) == len(b) and all(map(same, a, b)), f"{nb.name}: saved output differs from what the cell prints now; run the notebook and save it\n--- {''.join(now['source'])[:300]}\nsaved: {a}\nnow:   {b}"


def test_comparison_itself():
    assert same("loss 0.501, 3 of 5", "loss 0.502, 3 of 5") and same("1.0e-5", "1.01e-5")
    assert not same("loss 0.50, 3 of 5", "loss 0.50, 4 of 5") and not same("loss 0.5", "loss 0.9") and not same("a", "b")


def test_a_hung_notebook_is_killed(tmp_path):
    "A child that ignores everything, and the process it started, are gone after `kill`."
    context = multiprocessing.get_context("fork")
    def hang():
        os.setsid()
        if os.fork() == 0: (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(600)
    child = context.Process(target=hang)
    child.start()
    for _ in range(100):
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(): break
        time.sleep(.05)
    forked.kill(child)
    assert not child.is_alive()
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        try: state = Path(f"/proc/{pid}/stat").read_text().split()[2] if Path("/proc").is_dir() else os.kill(pid, 0) or "R"
        except (OSError, ProcessLookupError): state = "gone"
        if state in ("gone", "Z"): break
        time.sleep(.05)
    assert state in ("gone", "Z")
