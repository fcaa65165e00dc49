"""One battery for the classical captioners: what holds for one must hold for all. They are trained by the loop of every other
captioner, on stored features of Scenes. CAPNB_ALL=1 tries every tuning method on every one of them."""
import math, os
import pytest
import torch
from capnb.core.errors import ConfigError, DataError
from capnb.data.scenes import Scenes
from capnb.models.captioner import fingerprint
from capnb.models.features import CLASSICAL, caption_tokenizer, load_classical, toy_pairs
from capnb.models.load import load_captioner
from capnb.models.load import load_captioner
from capnb.train.config import TrainConfig
from capnb.train.loop import Interrupted, stop_training, train
from capnb.train.objective import caption_loss
from capnb.tune.methods import attach

CASES = {"transformer": dict(build="transformer", layers=2), "attention_on_attention": dict(build="attention_on_attention", layers=2),
         "meshed_memory": dict(build="meshed_memory", layers=2, slots=4), "clipcap_mlp": dict(build="clipcap", layers=2, k=4),
         "clipcap_transformer": dict(build="clipcap", mapper="transformer", layers=2, k=4, mapping=dict(layers=1, pool=False)),
         "visualgpt": dict(build="visualgpt", layers=2, levels=2)}
PAIRS = toy_pairs()
SETS, CAPTIONS = [p["feature"] for p in PAIRS], [p["caption"] for p in PAIRS]
TOY = caption_tokenizer(CAPTIONS)


def build(case, tokenizer=TOY, feature_width=8, width=32, heads=2, seed=0, **kw):
    torch.manual_seed(seed)
    settings = {"width": width, "heads": heads, **CASES[case], **kw}
    return CLASSICAL.load(settings.pop("build"))(tokenizer, feature_width, **settings)


def loud(captioner):
    "Weights that make captions of several words, different from image to image."
    torch.manual_seed(1)
    with torch.no_grad():
        for n, p in captioner.model.named_parameters():
            if p.ndim > 1: p.mul_(1.5)
        captioner.head.weight[[0, 1, 3, 4]] = -1.  # hardly a special token but the end
    return captioner


@pytest.fixture(params=CASES)
def case(request): return request.param


@torch.no_grad()
def forced(c, feature, prompt=None, n=7):
    "A greedy caption without a cache and without a batch: every word by a whole forward."
    ids, got = c.prompt_ids(prompt)[0], []
    for _ in range(n):
        batch = c.collate([{"feature": feature, "prompt": prompt}])
        batch["input_ids"] = torch.tensor([ids + got])
        new = c(batch).logits[0, -1].argmax().item()
        if new in c.ends: break
        got.append(new)
    return c.tokenizer.decode(got, skip_special_tokens=True)


# ---- one by one, batched, cached

def test_caption_is_the_same_alone_in_a_batch_and_without_a_cache(case):
    c, sets, asks = loud(build(case)), SETS[:6], [None, "red ring", None, "the", None, "a blue"]
    want = [forced(c, f, a) for f, a in zip(sets, asks)]
    assert c.caption(sets, asks, max_new_tokens=7) == want == [c.caption([f], a, max_new_tokens=7)[0] for f, a in zip(sets, asks)]
    assert c.caption(sets, asks, max_new_tokens=7, batch_size=2) == want and len(set(want)) > 1
    beams = c.caption(sets, asks, max_new_tokens=5, num_beams=3)
    assert beams == [c.caption([f], a, max_new_tokens=5, num_beams=3)[0] for f, a in zip(sets, asks)]


def test_hidden_states_do_not_depend_on_company_or_cache(case):
    c = build(case)
    with torch.no_grad():
        whole = c.collate(PAIRS[:3]); H = c.lm_head_input(whole)
        for i, p in enumerate(PAIRS[:3]):
            one = c.collate([p])
            torch.testing.assert_close(c.lm_head_input(one)[0], H[i, :one["input_ids"].shape[1]], rtol=1e-4, atol=1e-5)
        E, memory, cache = c.embed_inputs(whole), c.memory(whole), {}
        parts = [c.model.decode(E[:, :3], memory, cache)] + [c.model.decode(E[:, t:t + 1], memory, cache) for t in range(3, E.shape[1])]
        torch.testing.assert_close(torch.cat(parts, 1), H, rtol=1e-4, atol=1e-5)


def test_no_position_sees_a_later_word_and_all_see_the_image(case):
    c = build(case); batch = c.collate(PAIRS[:2]); H = c.lm_head_input(batch)
    other = dict(batch, input_ids=batch["input_ids"].clone()); other["input_ids"][:, 4:] = 7
    torch.testing.assert_close(c.lm_head_input(other)[:, :4], H[:, :4], rtol=1e-4, atol=1e-5)
    swapped = dict(batch, features=batch["features"].flip(0), feature_mask=batch["feature_mask"].flip(0))
    assert ((c.lm_head_input(swapped) - H).abs().amax((0, 2)) > 1e-4).all()


# ---- the loss

def test_loss_of_a_padded_batch_is_that_of_its_rows(case):
    c = build(case)
    examples = [dict(PAIRS[0], caption="a ball"), dict(PAIRS[2], prompt="the red"), PAIRS[5]]
    out = c(c.collate(examples)); alone = [c(c.collate([e])) for e in examples]
    torch.testing.assert_close(out.token_loss, torch.cat([a.token_loss for a in alone]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.loss, torch.cat([a.token_loss for a in alone]).mean())
    assert torch.bincount(out.rows).tolist() == [3, 7, 7]


def test_only_caption_tokens_count(case):
    c = build(case); batch = c.collate([dict(PAIRS[0], caption="a ball"), dict(PAIRS[1], prompt="the red")])
    assert [[t for t in row if t >= 0] for row in batch["labels"].tolist()] == [c.caption_ids("a ball"), c.caption_ids(CAPTIONS[1])]
    padded = dict(batch, input_ids=torch.where(batch["attention_mask"] == 1, batch["input_ids"], 8))
    torch.testing.assert_close(c(padded).loss, c(batch).loss)
    total, count = c.log_prob(SETS[:2], ["a ball", CAPTIONS[1]], [None, "the red"])
    torch.testing.assert_close(-total.sum() / count.sum(), c(batch).loss.detach())


# ---- files

def test_saved_and_loaded_is_the_same(case, tmp_path):
    c = loud(build(case)); c.save(tmp_path)
    assert not [p.name for p in tmp_path.iterdir() if p.suffix not in (".json", ".safetensors")]
    again = load_captioner(tmp_path)  # told by classical.json
    assert fingerprint(again.model) == fingerprint(c.model) and again.name == c.name and again.model.recipe == c.model.recipe
    assert again.caption(SETS, max_new_tokens=6) == c.caption(SETS, max_new_tokens=6)
    batch = c.collate(PAIRS); assert torch.equal(again(batch).loss, c(batch).loss)
    (tmp_path / "weights.safetensors").write_bytes(b"no")
    with pytest.raises(DataError, match="cannot be read"): load_classical(tmp_path)


def test_weights_of_another_recipe_are_refused(tmp_path):
    build("transformer").save(tmp_path / "a"); build("meshed_memory").save(tmp_path / "b"); build("transformer", width=16).save(tmp_path / "c")
    for other in "bc":
        (tmp_path / "a/weights.safetensors").write_bytes((tmp_path / other / "weights.safetensors").read_bytes())
        with pytest.raises(ConfigError, match="belong to another|has shape"): load_classical(tmp_path / "a")
    with pytest.raises(ConfigError, match="no classical captioner"): load_classical(tmp_path / "nowhere")


# ---- bad input

def test_bad_features_are_told_with_the_record(case):
    c = build(case); good = dict(PAIRS[0], id="good")
    bad = lambda f: [good, dict(PAIRS[1], id="bad", feature=f)]
    with pytest.raises(ConfigError, match="record bad.*(V, 8).*feature_width=5"): c.collate(bad(torch.zeros(2, 5)))
    with pytest.raises(DataError, match="without any.*record bad"): c.collate(bad(torch.zeros(0, 8)))
    with pytest.raises(DataError, match="NaN.*record bad"): c.collate(bad(torch.full((2, 8), math.nan)))
    with pytest.raises(DataError, match="not an image's features.*record bad"): c.collate(bad(torch.zeros(2, 8, dtype=torch.long)))
    with pytest.raises(ConfigError, match="reads features"): c.collate([{"id": 0, "image": "cat.jpg", "caption": "a"}])
    with pytest.raises(DataError, match="empty"): c.collate([dict(good, caption=" ")])


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="cannot share"): build("transformer", heads=5)
    with pytest.raises(ConfigError, match="tau"): build("visualgpt", tau=.5)
    with pytest.raises(ConfigError, match="mapper"): build("clipcap_mlp", mapper="rnn")
    with pytest.raises(ConfigError, match="frozen"): build("clipcap_mlp", frozen=True)
    with pytest.raises(ConfigError, match="did you mean transformer"): CLASSICAL.load("tranformer")


# ---- training

@pytest.fixture(scope="module")
def scenes():
    "Stored features of 260 scenes and their captions: examples for training, and 60 held out."
    records, eyes = Scenes(domain="source", n=260, seed=0), load_captioner("tiny")
    features = eyes.encode([records[i] for i in range(260)])
    examples = [{"id": records[i].id, "feature": f, "caption": records[i].captions[0]} for i, f in enumerate(features)]
    tokenizer = caption_tokenizer(e["caption"] for e in examples[:200])
    return examples[:200], examples[200:], tokenizer


def held_out_loss(c, examples, features):
    total, count = c.log_prob(features, [e["caption"] for e in examples])
    return -(total.sum() / count.sum()).item()


def test_it_learns_scenes_and_uses_the_image(case, scenes):
    learn, test, tokenizer = scenes
    c = build(case, tokenizer, learn[0]["feature"].shape[1], width=48, heads=4, dropout=0.)
    features = [e["feature"] for e in test]
    before = held_out_loss(c, test, features)
    ran = train(c, learn, caption_loss, TrainConfig(steps=110, batch_size=10, lr=1e-2 if case == "attention_on_attention" else 5e-3, warmup=8))
    right = held_out_loss(c, test, features)
    wrong = sum(held_out_loss(c, test, features[k:] + features[:k]) for k in (7, 23, 41)) / 3
    assert ran.loss < .5 * ran.history[0]["loss"] and right < .5 * before
    assert right < wrong - .03, f"{case}: {right:.3f} with the right features, {wrong:.3f} with others"


def test_it_goes_on_where_it_was_stopped(case, tmp_path):
    config = lambda out: TrainConfig(steps=5, batch_size=4, lr=1e-2, checkpoint_every=2, out=str(out))
    whole, parts = build(case), build(case)
    train(whole, PAIRS, caption_loss, config(tmp_path / "whole"))
    calls = []
    def stopped(model, batch):
        calls.append(1)
        if len(calls) == 3: stop_training()
        return caption_loss(model, batch)
    stopped.__name__ = "caption_loss"
    with pytest.raises(Interrupted): train(parts, PAIRS, stopped, config(tmp_path / "parts"))
    again = build(case)
    assert train(again, PAIRS, caption_loss, config(tmp_path / "parts")).resumed == 3
    assert all(torch.equal(t, again.train_state()[n]) for n, t in whole.train_state().items())


def test_it_trains_in_bf16(case):
    full, half = build(case), build(case)
    ran = [train(c, PAIRS, caption_loss, TrainConfig(steps=3, batch_size=9, lr=1e-3, precision=p)) for c, p in ((full, "no"), (half, "bf16"))]
    assert ran[1].loss < ran[1].history[0]["loss"] and abs(ran[0].loss - ran[1].loss) < .05
    assert len(half.to(torch.bfloat16).caption(SETS, max_new_tokens=3, num_beams=2)) == len(half.caption(SETS, max_new_tokens=3)) == 9


# ---- images, methods

def test_images_are_read_through_the_vision_of_another_captioner(scenes):
    learn, _, tokenizer = scenes
    eyes, records = load_captioner("tiny"), Scenes(domain="source", n=3, seed=0)
    c = CLASSICAL.load("transformer")(tokenizer, learn[0]["feature"].shape[1], width=16, vision=eyes)
    images = [records[i] for i in range(3)]
    assert torch.equal(c.encode(images), torch.stack([e["feature"] for e in learn[:3]])) and len(eyes.cache) == 3
    assert c.caption(images, max_new_tokens=4) == c.caption(c.encode(images), max_new_tokens=4)
    assert not [n for n, _ in c.named_parameters() if "vision" in n]


TUNED = {"lora": dict(method="lora", r=2), "prompt": dict(method="prompt", n=3, place="start", init="random"), "full": dict(method="full")}
ONE_OF_EACH = [("transformer", "lora"), ("attention_on_attention", "lora"), ("clipcap_transformer", "lora"), ("meshed_memory", "prompt"),
               ("clipcap_mlp", "prompt"), ("visualgpt", "full")]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # peft of GPT-2's transposed matrices
@pytest.mark.parametrize("case,method", [(c, m) for c in CASES for m in TUNED] if os.environ.get("CAPNB_ALL") else ONE_OF_EACH)
def test_tuning_methods_work_on_them(case, method):
    method = TUNED[method]
    c = loud(build(case)); before, base = c.caption(SETS, max_new_tokens=6), fingerprint(c.model)
    tuned = attach(c, **method)
    start = c(c.collate(PAIRS)).loss.item()
    train(tuned, PAIRS, caption_loss, TrainConfig(steps=10, batch_size=9, lr=3e-2 if method["method"] != "full" else 5e-3))
    assert c(c.collate(PAIRS)).loss.item() < start - (.005 if c.virtual else .05)  # a network that knows nothing can hardly be asked
    want = [forced(c, f) for f in SETS] if c.virtual is None else [c.caption([f], max_new_tokens=7)[0] for f in SETS]
    assert c.caption(SETS, max_new_tokens=7) == want
    with tuned.off(): assert c.caption(SETS, max_new_tokens=6) == before
    tuned.detach()
    assert fingerprint(c.model) == base
