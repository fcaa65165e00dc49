"Metrics on real captions and pictures: SPICE, CLIPScore with every kind of encoder, CHAIR, permutation tests, the two commands."
import json

import numpy as np
import pytest
import torch
from PIL import Image

from capnb.core.errors import MetricError
from capnb.metrics.scores import compare, score_captions
from capnb.metrics.significance import holm, permutation_test
from capnb.study.cli import main


@pytest.fixture(scope="module")
def coco(shared):
    "Image id -> captions, of the 80 images"
    out = {}
    for a in json.loads((shared / "data/coco/captions.json").read_text())["annotations"]: out.setdefault(str(a["image_id"]), []).append(a["caption"])
    return out


@pytest.fixture(scope="module")
def objects(shared):
    "Image id -> annotated objects"
    said = json.loads((shared / "data/coco/instances.json").read_text())
    names, out = {c["id"]: c["name"] for c in said["categories"]}, {}
    for a in said["annotations"]: out.setdefault(str(a["image_id"]), []).append({"category": names[a["category_id"]]})
    return out


def halves(coco): return {i: c[0] for i, c in coco.items()}, {i: c[1:] for i, c in coco.items()}


def test_spice_tells_the_right_captions_from_those_of_other_images(coco):
    said, refs = halves(coco)
    wrong = dict(zip(said, [*list(said.values())[1:], next(iter(said.values()))]))
    own, other = (score_captions(c, refs, ["spice", "soft_spice", "objects"]) for c in (said, wrong))
    d = compare(other, own)
    for k in ("SPICE", "soft SPICE", "object precision"): assert d[k].low > 0 and d[k].p < .001, (k, d[k])
    assert np.mean([a > b for a, b in zip(own.per_image["SPICE"], other.per_image["SPICE"])]) > .8
    assert own.corpus["SPICE"] == pytest.approx(np.mean(own.per_image["SPICE"]))


def test_spice_of_a_reference_itself_is_one_against_itself(coco):
    captions = [c[0] for c in coco.values()]
    s = score_captions(captions, [[c] for c in captions], ["spice"])
    assert all(v == pytest.approx(1) or not v for v in s.per_image["SPICE"]) and s.corpus["SPICE"] > .95  # 0: a caption in which nothing is found


def test_odd_captions_have_values():
    odd = ["", "   ", "dog", "🐕 🐕", "a dog (brown) [big] {x}", "dog " * 500, "Ein Hund läuft", "a\u2028dog\ron grass", "<script>alert(1)</script>", "..."]
    s = score_captions(odd, [["a brown dog on grass", o] for o in odd], ["bleu", "rouge_l", "cider_d", "spice", "soft_spice", "objects", "chair", "style"])
    for k, values in s.per_image.items(): assert all(v is None or np.isfinite(v) for v in values), k
    assert all(np.isfinite(v) for v in s.corpus.values())


def test_chair_of_people_is_low_and_of_shuffled_captions_high(coco, objects):
    said, refs = halves(coco)
    truth = {i: {"objects": objects.get(i, [])} for i in said}
    own = score_captions(said, refs, ["chair"], truth=truth)
    wrong = score_captions(dict(zip(said, [*list(said.values())[1:], next(iter(said.values()))])), refs, ["chair"], truth=truth)
    assert own.corpus["CHAIRs"] < .12 < .3 < wrong.corpus["CHAIRs"] and own.corpus["object recall"] > 4 * wrong.corpus["object recall"]
    assert own.settings["chair"] == "instances and references"
    without = score_captions(said, refs, ["chair"])
    assert without.settings["chair"] == "references only" and without.corpus["CHAIRs"] >= own.corpus["CHAIRs"]
    with pytest.raises(MetricError, match="chair"): compare(without, own)


def encoders():
    "One of each kind, random"
    from capnb.models.dual import OpenClipDual, build_open_clip
    from capnb.models.dual_load import load_dual_encoder
    torch.manual_seed(0)
    small = dict(embed_dim=16, vision_cfg=dict(image_size=32, layers=1, width=16, head_width=8, patch_size=16),
                 text_cfg=dict(context_length=20, vocab_size=49408, width=16, heads=2, layers=1))
    yield "open_clip", OpenClipDual(build_open_clip(small))
    yield "clip-tiny", load_dual_encoder("clip-tiny")


@pytest.mark.parametrize("name", ["open_clip", "clip-tiny"])
def test_clip_score_is_its_formula_with_any_encoder(name):
    encoder = dict(encoders())[name]
    images = [Image.radial_gradient("L").convert("RGB"), Image.linear_gradient("L").convert("RGB"), Image.new("RGB", (40, 30), "red")]
    said, refs = ["a red ball", "a dog on the grass", "a dog " * 60], [["one ball", "a ball"], ["a cat"], ["two dogs", "red"]]
    s = score_captions(said, refs, ["clip_score"], images=images, encoder=encoder)
    text = lambda t: encoder.encode_texts(["A photo depicts " + t])[0]
    for k, (image, c, rs) in enumerate(zip(images, said, refs)):
        v, c = encoder.encode_images([image])[0], text(c)
        clip, near = 2.5 * max(float(v @ c), 0), max(max(float(c @ text(r)) for r in rs), 0)
        assert s.per_image["CLIPScore"][k] == pytest.approx(clip, abs=2e-5)
        assert s.per_image["RefCLIPScore"][k] == pytest.approx(2 * clip * near / (clip + near) if clip * near else 0, abs=2e-5)
    assert s.per_image["cut"] == [0, 0, 1] and s.settings["clip_score"]["prompt"] == "A photo depicts "
    with pytest.raises(MetricError, match="clip_score"): compare(s, score_captions(said, refs, ["clip_score"], images=images, encoder=dict(encoders())["clip-tiny" if name == "open_clip" else "open_clip"]))


def test_pictures_that_are_missing_or_broken_are_named(tmp_path):
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises(MetricError, match="x.png"): score_captions({"a": "x"}, {"a": ["x"]}, ["clip_score"], images={"a": tmp_path / "x.png"})
    with pytest.raises(MetricError, match="no image"): score_captions({"a": "x"}, {"a": ["x"]}, ["clip_score"], images={})


def test_a_permutation_test_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    from capnb.metrics.inputs import Measure
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=12), rng.normal(.6, size=12)
    ours = permutation_test([Measure(a.mean(), list(a))], [Measure(b.mean(), list(b))], draws=5000)  # all 4,096 swaps
    theirs = stats.permutation_test((a, b), lambda x, y: np.mean(y - x), permutation_type="samples", n_resamples=np.inf).pvalue
    assert ours == pytest.approx(theirs)


def test_holm_keeps_the_chance_of_any_false_finding():
    rng = np.random.default_rng(0)
    false = np.mean([min(holm(rng.random(8).tolist())) < .05 for _ in range(2000)])
    assert false < .065


@pytest.fixture
def files(tmp_path):
    put = lambda name, rows: (tmp_path / name).write_text(json.dumps(rows)) and str(tmp_path / name)
    return dict(refs=put("refs.json", {"1": ["a red ball"], "2": ["a dog runs", "one dog"]}), good=put("good.json", {"1": "a ball", "2": "a dog"}),
                less=put("less.json", {"1": "a ball"}), more=put("more.json", {"1": "a ball", "2": "a dog", "3": "x"}), twice=put("twice.json", [{"image_id": 1, "caption": "x"}] * 2),
                number=put("number.json", {"1": 5, "2": "x"}), lists=put("lists.json", {"1": ["x"], "2": ["y"]}), flat=put("flat.json", {"1": "x", "2": "y"}), nothing=put("nothing.json", []))


@pytest.mark.parametrize("which, words", [(("less", "refs"), "lacks 1 image"), (("more", "refs"), "lacks 1 image"), (("twice", "refs"), "two candidate"), (("number", "refs"), "int"),
                                          (("lists", "refs"), "one caption as text"), (("good", "flat"), "list of captions"), (("nothing", "refs"), "no captions")])
def test_the_command_names_every_mismatch(files, which, words, capsys):
    assert main(["score", *(files[w] for w in which)]) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said and any(f"{w}.json" in said for w in which)


def test_compare_prints_the_table_and_common_scores_the_rest(files, capsys):
    assert main(["compare", files["good"], files["more"], files["refs"], "--metrics", "bleu", "cider", "--common"]) == 0
    out, err = capsys.readouterr()
    assert "2 images" in out and "p (Holm)" in out and "0 images got better" in out and "left out: 1 image" in err


def test_tables_of_every_image(files, tmp_path, capsys):
    for kind in ("csv", "json", "parquet"):
        if kind == "parquet": pytest.importorskip("pyarrow")
        assert main(["score", files["good"], files["refs"], "--metrics", "bleu", "spice", "--table", str(tmp_path / f"t.{kind}")]) == 0
    assert (tmp_path / "t.csv").read_text().splitlines()[0].startswith("id,BLEU-1,") and len((tmp_path / "t.csv").read_text().splitlines()) == 3
    import pyarrow.parquet
    table = pyarrow.parquet.read_table(tmp_path / "t.parquet").to_pydict()
    assert table["id"] == ["1", "2"] and table["SPICE"] == json.loads((tmp_path / "t.json").read_text())["SPICE"]
    assert main(["score", files["good"], files["refs"], "--metrics", "bleu", "--table", str(tmp_path / "t.xls")]) == 2
