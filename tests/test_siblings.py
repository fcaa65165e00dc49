"""The shipped siblings of `tiny`: they load, they look, they are the bases that tuning methods need, and a damaged one is refused."""
import copy, shutil
import numpy as np
import pytest
import torch
from capnb.core.errors import DataError
from capnb.data.scene_text import INSTRUCTIONS
from capnb.data.scenes import Scenes
from capnb.models.captioner import fingerprint
from capnb.models.cross import CrossCaptioner
from capnb.models.generic import HFCaptioner
from capnb.models.load import BASES, load_captioner
from capnb.models.siblings import SIBLINGS, load_sibling, sibling_card
from capnb.train.sibling_recipe import Asker, answer_loss, check_sibling, look, seen_and_said
from capnb.train.tiny_parts import pixels_of
from capnb.train.tiny_recipe import text_batch
from capnb.tune.methods import attach

ASK = INSTRUCTIONS["sentence"][0]
pytestmark = pytest.mark.filterwarnings("ignore")
_made = {}


@pytest.fixture(params=list(SIBLINGS))
def base(request):
    "A fresh copy; loading costs more."
    if request.param not in _made: _made[request.param] = load_captioner(request.param)
    return copy.deepcopy(_made[request.param])


@pytest.fixture(scope="module")
def fresh(): return list(Scenes("source", 60, seed=11, split="fresh"))


def target(n, seed=5): return list(Scenes("target", n, seed=seed, split="fresh"))


def batch_of(c, records): return c.collate([{"id": r.id, "image": r.load_image(), "prompt": ASK, "caption": r.captions[0]} for r in records])


def test_is_what_its_card_says(base):
    card = sibling_card(base.name)
    assert base.name in BASES.names() and card["name"] == base.name + "@1"
    assert type(base) is {"tiny-qformer": HFCaptioner, "tiny-encdec": CrossCaptioner}[base.name]
    assert sum(p.numel() for p in base.model.parameters()) == card["parameters"] < 1.6e6
    assert (SIBLINGS[base.name]/"model.safetensors").stat().st_size <= 3e6
    assert check_sibling(card) == [] and not base.training


def test_it_speaks_the_words_of_tiny(base):
    tiny = load_captioner("tiny")
    for text in ("Describe the image in one sentence.", "A big red dog is on the grass.", "USER: Is there a car? ASSISTANT:"):
        assert base.tokenizer(text)["input_ids"] == tiny.tokenizer(text)["input_ids"]


def test_it_looks(base, fresh):
    "Fresh scenes; with the pictures of others most of it is gone."
    right, wrong = seen_and_said(base, fresh), seen_and_said(base, fresh, fresh[20:] + fresh[:20])
    says = base.caption(fresh, ASK)
    assert len(set(says)) > 40
    assert right["CIDEr-D"] > 2*wrong["CIDEr-D"] + .5, (right, wrong)
    assert right["short"] > wrong["short"] + .15, (right, wrong)
    text = [r.captions[0] for r in fresh]
    gap = (base.log_prob(fresh, text, ASK)[0] - base.log_prob(fresh[20:] + fresh[:20], text, ASK)[0]).numpy()
    assert (gap > 0).mean() > .85 and gap.mean() > 3


def test_one_by_one_says_the_same(base, fresh):
    asks = [INSTRUCTIONS["detail"][0], ASK, "Is there a red car? Answer yes or no.", "What is the background? Answer briefly."]
    together = base.caption(fresh[:4], asks)
    assert together == [base.caption([r], a)[0] for r, a in zip(fresh, asks)] and len(set(together)) == 4


def test_the_loss_of_the_recipe_is_that_of_the_captioner(base, fresh):
    "Patch states taken once and decoded, against the whole way from pictures."
    images = np.stack([np.asarray(r.load_image()) for r in fresh[:5]])
    pairs = [(ASK, r.captions[0]) for r in fresh[:5]]
    with torch.no_grad():
        short = answer_loss(base, look(base, images), text_batch(Asker(base), pairs))
        whole = base(batch_of(base, fresh[:5])).loss
    torch.testing.assert_close(short, whole, rtol=1e-4, atol=1e-5)


def test_features(base, fresh):
    v = base.encode([r.load_image() for r in fresh[:3]])
    assert len(v) == 3
    if isinstance(base, CrossCaptioner):
        assert v.shape == (3, 17, 128)
        assert base.caption(v, ASK) == base.caption(fresh[:3], ASK)


@pytest.mark.parametrize("method,settings,lr", [("lora", dict(r=4), 5e-3), ("prompt", dict(instruction=ASK), 2e-2), ("full", dict(), 1e-3)])
def test_methods_learn_another_style(base, method, settings, lr):
    "A few steps on the target's style lower the loss of other target captions; off, the base is back bit by bit."
    train, held = target(32), target(24, seed=6)
    before = fingerprint(base.model)
    held_out = batch_of(base, held)
    with torch.no_grad(): start = base(held_out).loss.item()
    tuned = attach(base, method, **settings)
    weights = list(tuned.parameters())
    assert weights and all(p.requires_grad for p in weights)
    optimizer = torch.optim.Adam(weights, lr=lr)
    torch.manual_seed(0)
    for step in range(24):
        rows = train[step % 4*8:step % 4*8 + 8]
        loss = tuned(batch_of(base, rows)).loss
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    with torch.no_grad():
        learned = tuned(batch_of(base, held)).loss.item()
        with tuned.off(): off = base(held_out).loss.item()
    assert learned < start - .3, (start, learned)
    assert off == start
    tuned.detach()
    assert fingerprint(base.model) == before
    assert base(held_out).loss.item() == start


@pytest.mark.parametrize("name", SIBLINGS)
def test_damage_is_found(name, tmp_path):
    there = tmp_path/"s"
    shutil.copytree(SIBLINGS[name], there)
    raw = bytearray((there/"model.safetensors").read_bytes()); raw[-1] ^= 1
    (there/"model.safetensors").write_bytes(raw)
    with pytest.raises(DataError, match="damaged"): load_sibling(name, there)


def test_the_queries_are_not_one(fresh):
    "Queries that started alike would still give the same answer."
    c = load_captioner("tiny-qformer")
    with torch.no_grad():
        v = c.model.vision_model(pixel_values=pixels_of(np.stack([np.asarray(r.load_image()) for r in fresh[:4]]))).last_hidden_state
        e = c.model.qformer(query_embeds=c.model.query_tokens.expand(4, -1, -1), encoder_hidden_states=v).last_hidden_state  # (4, 16, d)
    x = torch.nn.functional.normalize(e - e.mean(1, keepdim=True), dim=-1)
    alike = (x @ x.transpose(1, 2) - torch.eye(16)).amax(-1)  # (4, 16) nearest other query
    assert alike.mean() < .95


def test_the_tower_of_the_encoder_decoder_is_that_of_tiny(fresh):
    a, b = load_captioner("tiny-encdec").tower.state_dict(), load_captioner("tiny").tower.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
