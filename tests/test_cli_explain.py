"The command `capnb explain` and `capnb study --explain`: files in, a page out, faults in words, Ctrl-C and going on."
import json, os, re, signal, subprocess, sys, time
from pathlib import Path

import pytest
from PIL import Image

from capnb.study import cli

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def files(tmp_path):
    write = lambda name, x: (tmp_path / name).write_text(x if isinstance(x, str) else json.dumps(x), encoding="utf-8")
    write("c.json", [dict(image_id=7, caption="a red dog on a cup"), dict(image_id=8, caption="a blue <b>car</b> near a tree"), dict(image_id=9, caption="")])
    write("t.json", dict(images=[dict(id=1, file_name="one.png")], annotations=[dict(image_id=1, caption="a red dog"), dict(image_id=1, caption="a dog on a mug"), dict(image_id=2, caption="a blue boat"), dict(image_id=3, caption="a car beside a tree")]))
    write("p.json", {"1": ["a blue sky", "a car"]})
    write("b.json", {"7": "a dog on a cup"})
    write("empty.json", []), write("torn.json", '[{"image_id"'), write("blank.json", [dict(image_id=1, caption=" ")]), write("other.json", {"99": "a dog"}), write("number.json", "7"), write("twice.json", [dict(image_id=1, caption="a"), dict(image_id=1, caption="b")])
    (tmp_path / "pics").mkdir()
    for n in ("one", "000000000002", "7", "8", "9"): Image.new("RGB", (40, 30), "green").save(tmp_path / "pics" / f"{n}.png")
    (tmp_path / "none").mkdir()
    return tmp_path


def call(capsys, *argv):
    code = cli.main([str(a) for a in argv]); out = capsys.readouterr()
    return code, out.out, out.err


def test_a_page_with_pictures_and_the_shares(files, capsys):
    code, out, err = call(capsys, "explain", files / "c.json", files / "t.json", "--images", files / "pics", "--train-images", files / "pics", "--before", files / "b.json", "--out", files / "why", "--shown", 2)
    assert code == 0 and "1 of 3 training images have no picture" in err and "3" in err and "Traceback" not in err
    html = (files / "why/index.html").read_text(encoding="utf-8")
    assert "3 captions against" in out and "known before" in out and html.count("<article") == 2 and html.count("<img") >= 4 and "<b>car" not in html and "&lt;b&gt;car" in html
    before = {p: p.stat().st_mtime_ns for p in (files / "why").glob("rows-*")}
    assert call(capsys, "explain", files / "c.json", files / "t.json", "--images", files / "pics", "--train-images", files / "pics", "--before", files / "b.json", "--out", files / "why", "--shown", 2)[0] == 0
    assert before == {p: p.stat().st_mtime_ns for p in (files / "why").glob("rows-*")} and (files / "why/index.html").read_text(encoding="utf-8") == html


def test_pretraining_captions_split_the_rest(files, capsys):
    code, out, _ = call(capsys, "explain", files / "c.json", files / "t.json", "--pretrain", files / "p.json", "--out", files / "why")
    assert code == 0 and re.search("memorised|recombined|not in pre-training", out) and " unexplained " not in out


@pytest.mark.parametrize("argv,text", [
    (("no.json", "t.json"), "no.json"), (("c.json", "no.json"), "no.json"), (("empty.json", "t.json"), "no captions"), (("torn.json", "t.json"), "torn.json"), (("c.json", "torn.json"), "torn.json"), (("number.json", "t.json"), "number.json"),
    (("blank.json", "t.json"), "no captions"), (("twice.json", "t.json"), "two candidate"), (("c.json", "scnes"), "scenes"), (("c.json", "coco:no.json:none"), "no.json"), (("c.json", "t.json", "--images", "none"), "images 7, 8, 9"), (("c.json", "t.json", "--images", "gone"), "gone"),
    (("c.json", "t.json", "--train-images", "none"), "No training image"), (("c.json", "t.json", "--pretrain", "torn.json"), "torn.json"), (("c.json", "t.json", "--before", "other.json"), "None of these images"), (("c.json", "scenes", "--train-images", "pics"), "their own"),
    (("c.json", "t.json", "--workers", "0"), "--workers 0"), (("c.json", "t.json", "--limit", "0"), "--limit 0"), (("c.json", "t.json", "--epsilon", "2"), "--epsilon"), (("c.json", "t.json", "--out", "c.json"), "This is a file")])
def test_faults_are_sentences(files, capsys, monkeypatch, argv, text):
    monkeypatch.delenv("CAPNB_DEBUG", raising=False); monkeypatch.chdir(files)
    code, _, err = call(capsys, "explain", *argv)
    assert code == 2 and text in err and "Traceback" not in err and len(err) < 600, err


def test_help_names_it_and_loads_nothing(files):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = "import sys, capnb.study.cli as c; c.parser().format_help(); c.parser('explain').format_help(); print([m for m in ('torch', 'transformers', 'spacy', 'numpy', 'capnb.hmln.explain') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=env).stdout.strip() == "[]"
    assert "explain" in cli.SUBCOMMANDS and "clip-finetune" in cli.SUBCOMMANDS


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signals of Unix")
def test_control_c_keeps_what_is_done_and_goes_on(tmp_path):
    from capnb.data.scenes import Scenes
    data = Scenes("source", 1200, seed=1).references()
    (tmp_path / "c.json").write_text(json.dumps([dict(image_id=i, caption=c[0]) for i, c in data.items()]), encoding="utf-8")
    (tmp_path / "t.json").write_text(json.dumps({i: c for i, c in list(data.items())[:40]}), encoding="utf-8")
    argv = [sys.executable, "-m", "capnb.study.cli", "explain", "c.json", "t.json", "--out", "why", "--workers", "2", "--shown", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}; env.pop("CAPNB_DEBUG", None)
    p = subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # a shell's background jobs ignore Ctrl-C
    end, kept = time.time() + 300, []
    while time.time() < end and p.poll() is None and not (kept := [f for f in tmp_path.glob("why/rows-*.jsonl") if f.stat().st_size]): time.sleep(.05)
    assert kept, p.communicate()
    os.killpg(p.pid, signal.SIGINT)  # as a terminal does: to the command and to its workers
    out, err = p.communicate(timeout=300)
    assert p.returncode == 130 and "goes on from here" in err and "Traceback" not in err + out and not (tmp_path / "why/index.html").exists(), err
    done = kept[0].read_bytes()
    assert 0 < done.count(b"\n") < len(data)
    again = subprocess.run([*argv, "--limit", str(done.count(b"\n"))], cwd=tmp_path, capture_output=True, text=True, env=env, timeout=300)
    assert again.returncode == 0 and "Traceback" not in again.stderr


def test_a_study_is_explained_afterwards_without_running_again(tmp_path, monkeypatch):
    from capnb.data.scenes import Scenes
    from capnb.study.answer import read_study
    from capnb.study.plan import Plan
    from capnb.study.report import write_report
    from capnb.study.run import run_study
    small = dict(train_images=12, test_images=6, steps=3, batch_size=8, samples=3, max_new_tokens=8, methods=("lora",), seeds=1, metrics=("cider_d",), out=str(tmp_path / "s"), quick=True)
    before = run_study(Plan(**small), lambda line: None).read_text(encoding="utf-8")
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "s/results").iterdir()}
    lines = []; html = run_study(Plan(**small, explain=True), lines.append).read_text(encoding="utf-8")
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "s/results").iterdir()} and any("come from" in l for l in lines)
    assert "copied" in before and "copied" not in html and "phrases learned" in html and "MAP score" in html and "look-up" not in html and "where the phrases come from" in html
    study = read_study(tmp_path / "s"); assert len(study.done) == 2 and all(len(r["study"]["source"]["learned"]) == 6 for r in study.done)
    assert write_report(tmp_path / "s").read_text(encoding="utf-8") == html
