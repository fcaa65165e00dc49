"What of capnb.core does not fit a notebook: other processes, real devices, foreign locales, what is imported."
import os, subprocess, sys, textwrap
from pathlib import Path
import pytest
from capnb.core.errors import CapnbError
from capnb.core.files import append_line, atomic_write, read_lines

ROOT = Path(__file__).resolve().parents[1]


def run(code, **env):
    "Run `code` in a fresh Python and return what it prints"
    full = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=full, timeout=120)
    assert out.returncode == 0, out.stderr
    return out.stdout.strip()


def test_core_loads_nothing_heavy():
    modules = "errors files progress registry results attribution markup figures page doctor".split()
    code = f"""
        import importlib, sys
        for m in {modules}: importlib.import_module('capnb.core.' + m)
        print([m for m in ('torch', 'transformers', 'matplotlib', 'PIL', 'spacy', 'IPython', 'fastcore') if m in sys.modules])"""
    assert run(code) == "[]"


def test_figure_in_a_fresh_process_has_the_same_bytes():
    code = """
        from capnb.core.page import figure_svg, new_figure, plotting
        from capnb.core.files import sha256
        with plotting():
            fig, ax = new_figure(); ax.plot([0, 1], [1, 0], label='a'); ax.legend()
        print(sha256(figure_svg(fig, 'a line').encode('utf-8')))"""
    assert run(code, PYTHONHASHSEED="1") == run(code, PYTHONHASHSEED="2")


def test_ascii_locale_writes_utf8(tmp_path):
    code = f"""
        from capnb.core.files import *
        from capnb.core.page import Page
        write_json(r'{tmp_path}/a.json', {{'F\\xfc\\xdfe': .5}}); append_line(r'{tmp_path}/a.jsonl', '\\u72ac')
        Page('F\\xfc\\xdfe').add('\\u72ac').write(r'{tmp_path}/a.html')
        print(ascii(read_json(r'{tmp_path}/a.json')), ascii(read_lines(r'{tmp_path}/a.jsonl')))"""
    assert run(code, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0") == ascii({"Füße": .5}) + " " + ascii(["犬"])
    assert "犬" in (tmp_path / "a.html").read_text(encoding="utf-8")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_append_to_a_full_device():
    with pytest.raises(CapnbError, match="the disk is full"): append_line("/dev/full", {"a": 1})


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may write everywhere")
def test_read_only_folder(tmp_path):
    path = atomic_write(tmp_path / "a", "old")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CapnbError, match="permission denied"): atomic_write(path, "new")
    finally: tmp_path.chmod(0o700)
    assert path.read_text() == "old"


@pytest.mark.skipif(os.name == "nt", reason="no such signal")
def test_killed_while_writing(tmp_path):
    "After kill -9 the file written atomically is whole, and the line file has only whole lines"
    code = f"""
        from capnb.core.files import *
        i = 0
        while True:
            atomic_write(r'{tmp_path}/whole', str(i % 10) * 100_000); append_line(r'{tmp_path}/lines', [i] * 100); i += 1
            if i == 3: print('go', flush=True)"""
    for _ in range(3):
        p = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
        p.stdout.readline(); p.kill(); p.wait(); p.stdout.close()
        text = (tmp_path / "whole").read_text()
        assert len(text) == 100_000 and len(set(text)) == 1
        assert all(len(set(line)) == 1 and len(line) == 100 for line in read_lines(tmp_path / "lines"))
    append_line(tmp_path / "lines", "last")
    assert read_lines(tmp_path / "lines")[-1] == "last"


def test_readers_see_old_or_new_only(tmp_path):
    "One process writes all the time while another reads"
    code = f"""
        from capnb.core.files import write_json
        i = 0
        while True: write_json(r'{tmp_path}/a.json', [i] * 2000); i += 1"""
    from capnb.core.files import read_json, write_json
    write_json(tmp_path / "a.json", [0] * 2000)
    p = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        for _ in range(300):
            got = read_json(tmp_path / "a.json")
            assert len(got) == 2000 and len(set(got)) == 1
    finally: p.kill(); p.wait()


def test_doctor_is_fast_and_plain():
    code = """
        import time; t = time.perf_counter()
        from capnb.core.doctor import doctor, format_doctor
        text = format_doctor(doctor()); print(time.perf_counter() - t < 5, 'Python' in text)"""
    assert run(code) == "True True"
