"KLAFT captioners on many bases, and the method `klaft` on the families: the base is met bit for bit, one pass equals steps, batches equal single rows."
import copy, json

import pytest
import torch
from PIL import Image

from capnb.core.errors import ConfigError
from capnb.core.registry import register
from capnb.klaft.captioner import KLAFTCaptioner, load_klaft
from capnb.klaft.klaft_method import Klaft
from capnb.klaft.objective import klaft_objective
from capnb.klaft.total import Weights
from capnb.models.captioner import fingerprint
from capnb.models.features import caption_tokenizer, toy_pairs
from capnb.models.families import tiny_family, written_is_forward
from capnb.models.load import FOLDERS, load_captioner
from capnb.models.transformer import build_transformer
from capnb.models.visualgpt import build_visualgpt
from capnb.train.config import TrainConfig
from capnb.train.loop import Interrupted, stop_training, train

torch.set_num_threads(1)
PAIRS = toy_pairs()
SETS, CAPTIONS = [p["feature"] for p in PAIRS], [p["caption"] for p in PAIRS]
TOKENIZER = caption_tokenizer(CAPTIONS)
PHOTOS = [Image.effect_noise((40, 40), s).convert("RGB").resize((28, 28)) for s in (20, 90, 160)]
SAID, ASKED = ["a red dog", "a small blue cat on a bird", "yes"], [None, "is the cat of the dog red", "describe"]


def lm(kind="gpt2", seed=0, **more):
    import transformers as tf
    torch.manual_seed(seed)
    d = dict(vocab_size=len(TOKENIZER), bos_token_id=1, eos_token_id=2, initializer_range=.2)
    rest = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=48, head_dim=8)
    sizes = {"gpt2": dict(n_embd=32, n_layer=2, n_head=2, n_positions=48), "llama": rest, "qwen2": rest, "gemma2": dict(**rest, final_logit_softcapping=5., query_pre_attn_scalar=8),
             "opt": dict(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=48, word_embed_proj_dim=32)}[kind]
    return tf.AutoModelForCausalLM.from_config(tf.AutoConfig.for_model(kind, **{**d, **sizes, **more})).eval()


def shake(parts, size=.2, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parts: p += size*torch.randn(p.shape, generator=g).to(p)


def shaken(captioner, **kw):
    shake([p for part in (captioner.mam, captioner.topics) if part is not None for p in part.parameters()], **kw)
    return captioner


def stepwise(captioner, example):
    "Minus log-probability of a caption, word by word with the cache."
    batch, cache, total = captioner.collate([example]), {}, 0.
    E, memory, ids = captioner.embed_inputs(batch), captioner.memory(batch), batch["input_ids"][0]
    learned = batch["labels"][0] != -100
    for t in range(len(ids) - 1):
        p = captioner.head(captioner.model.decode(E[:, t:t + 1], memory, cache))[0, 0].float().log_softmax(-1)
        if learned[t + 1]: total += p[ids[t + 1]].item()
    return total


def everything_agrees(captioner, images, captions):
    with torch.no_grad():
        total = captioner.log_prob(images, captions)[0]
        for i, (im, c) in enumerate(zip(images, captions)):
            alone = captioner.log_prob([im], [c])[0][0]
            assert abs(alone - total[i]) < 2e-3
            key = {"feature": im, "image": None} if isinstance(im, torch.Tensor) else {"image": im}
            assert abs(stepwise(captioner, {**key, "caption": c}) - alone) < 2e-3
    for n in (1, 3): assert captioner.caption(images, max_new_tokens=6, num_beams=n) == [captioner.caption([im], max_new_tokens=6, num_beams=n)[0] for im in images]
    assert len(captioner.caption(images, max_new_tokens=6, do_sample=True, top_p=.9)) == len(images)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "opt", "gemma2"])
@pytest.mark.parametrize("I_pf", [None, 3])
def test_any_language_model(kind, I_pf):
    base = lm(kind)
    for off in (dict(num_topics=0), dict(omega=0.)):
        bare = KLAFTCaptioner.from_parts(None, base, TOKENIZER, I_pf, feature_width=8, **off)
        batch = bare.collate([dict(PAIRS[0], feature=SETS[0][:2]), dict(PAIRS[1], feature=SETS[1][:2])])
        V = bare.memory(batch)["visual"]
        want = base(inputs_embeds=torch.cat([V, bare.embed_inputs(batch)], 1)).logits[:, V.shape[1]:]
        assert torch.equal(bare(batch).logits, want)
    everything_agrees(shaken(KLAFTCaptioner.from_parts(None, base, TOKENIZER, I_pf, feature_width=8, num_topics=3)), SETS[:3], CAPTIONS[:3])


@pytest.mark.parametrize("gate", ["pair", "token", "feature"])
@pytest.mark.parametrize("masks", ["both", "literal"])
@pytest.mark.parametrize("transform", ["addition", "multiplication", "affine"])
def test_forms_of_the_parts(gate, masks, transform):
    c = shaken(KLAFTCaptioner.from_parts(None, lm(), TOKENIZER, feature_width=8, num_topics=2, mam=dict(gate=gate, masks=masks), topics=dict(transform=transform)))
    everything_agrees(c, SETS[:2], CAPTIONS[:2])


def test_later_words_change_nothing_before_them():
    c = shaken(KLAFTCaptioner.from_parts(None, lm(), TOKENIZER, feature_width=8, num_topics=3)).train()
    batch = c.collate(PAIRS[:2]); other = {**batch, "input_ids": batch["input_ids"].clone()}; other["input_ids"][:, 4:] = 6
    a, b = c.lm_head_input(batch), c.lm_head_input(other)
    torch.testing.assert_close(a[:, :4], b[:, :4]); assert not torch.allclose(a[:, 4:], b[:, 4:])


BASES = {"blip": lambda: tiny_family("blip"), "vit_gpt2": lambda: tiny_family("vit_gpt2"), "tiny-encdec": lambda: load_captioner("tiny-encdec"),
         "visualgpt": lambda: build_visualgpt(TOKENIZER, 8, width=16, layers=2, heads=2, levels=2), "transformer": lambda: build_transformer(TOKENIZER, 8, width=16, layers=2, heads=2)}

@pytest.mark.parametrize("name", BASES)
def test_bases_that_look_across(name):
    torch.manual_seed(0)
    base = BASES[name]().eval(); images = PHOTOS if base.name not in ("visualgpt", "transformer") else SETS[:3]
    said = SAID if images is PHOTOS else CAPTIONS[:3]
    want, written = base.log_prob(images, said)[0], base.caption(images, max_new_tokens=6)
    for off in (dict(num_topics=0), dict(omega=0.), dict(num_topics=0, mam=None)):
        bare = KLAFTCaptioner.from_base(base, **off)
        torch.testing.assert_close(bare.log_prob(images, said)[0], want, rtol=1e-4, atol=1e-4)
        if name not in ("blip", "vit_gpt2"): assert bare.caption(images, max_new_tokens=6) == written  # those two are muted by a hook
    c = shaken(KLAFTCaptioner.from_base(base, num_topics=3)); before = fingerprint(base)
    everything_agrees(c, images, said)
    key = "image" if images is PHOTOS else "feature"
    batch = c.train().collate([{"id": i, key: images[j], "caption": said[j]} for i, j in enumerate((0, 1, 2, 0))])
    klaft_objective(c)(c, batch)[0].backward()
    grads = {n: p.grad is not None and bool(p.grad.any()) for n, p in c.named_parameters()}
    assert [n for n, p in c.named_parameters() if grads[n] != p.requires_grad] == [] and fingerprint(base) == before


@pytest.mark.parametrize("name", ["lm", "tiny-encdec", "visualgpt"])
def test_saved_and_loaded_by_name_of_the_folder(name, tmp_path):
    if "klaft.json" not in FOLDERS: register(FOLDERS, "klaft.json", "capnb.klaft.captioner:load_klaft")
    torch.manual_seed(0)
    c = KLAFTCaptioner.from_parts(None, lm("llama"), TOKENIZER, feature_width=8, num_topics=3) if name == "lm" else KLAFTCaptioner.from_base(BASES[name](), num_topics=3, mam=dict(gate="token"))
    images, said = (PHOTOS, SAID) if name == "tiny-encdec" else (SETS[:3], CAPTIONS[:3])
    shaken(c).save(tmp_path/"a")
    again = load_captioner(tmp_path/"a")
    assert isinstance(again, KLAFTCaptioner) and torch.equal(again.log_prob(images, said)[0], c.log_prob(images, said)[0]) and again.train_state().keys() == c.train_state().keys()
    assert {f.suffix for f in (tmp_path/"a").rglob("*") if f.is_file()} <= {".json", ".safetensors", ".jinja", ".txt", ".model"}
    again.save(tmp_path/"b"); assert fingerprint(load_klaft(tmp_path/"b")) == fingerprint(c)
    said = json.loads((tmp_path/"a/klaft.json").read_text()); said.pop("kind"); (tmp_path/"a/klaft.json").write_text(json.dumps(said))
    with pytest.raises(ConfigError, match="does not describe"): load_captioner(tmp_path/"a")


def test_half_precision():
    c = shaken(KLAFTCaptioner.from_parts(None, lm("llama"), TOKENIZER, feature_width=8, num_topics=3), size=.05)
    want = c.log_prob(SETS, CAPTIONS)[0]; half = copy.deepcopy(c).to(torch.bfloat16)
    got = half.log_prob(SETS, CAPTIONS)[0]
    assert (got - want).abs().max() < .05*want.abs().max() and len(half.caption(SETS, max_new_tokens=5, num_beams=2)) == 9
    batch = half.train().collate(PAIRS[:3]); loss, _ = klaft_objective(half)(half, batch); loss.backward()
    assert loss.dtype == torch.float32 and all(p.grad.isfinite().all() for p in half.parameters() if p.grad is not None)
    with torch.autocast("cpu", torch.bfloat16): loss, _ = klaft_objective(c)(c.train(), batch)
    loss.backward(); assert loss.isfinite()


def test_training_goes_on_where_it_was_stopped(tmp_path):
    def run(out, stop=None):
        c = KLAFTCaptioner.from_parts(None, lm(), TOKENIZER, feature_width=8, num_topics=2, frozen=False)
        full, steps = klaft_objective(c), []
        def objective(model, batch):
            steps.append(1)
            if stop and len(steps) == stop: stop_training()
            return full(model, batch)
        try: train(c, PAIRS, objective, TrainConfig(steps=6, batch_size=4, lr=1e-2, out=out))
        except Interrupted: assert stop
        return c
    whole = run(tmp_path/"a"); run(tmp_path/"b", stop=3)
    assert fingerprint(run(tmp_path/"b")) == fingerprint(whole)


def test_new_parts_learn_to_steer_a_frozen_language_model():
    base = lm(); ids = torch.tensor([[1] + KLAFTCaptioner.from_parts(None, base, TOKENIZER, feature_width=8).caption_ids(c) for c in CAPTIONS])
    opt = torch.optim.AdamW(base.requires_grad_(True).parameters(), lr=1e-2)
    for _ in range(60): opt.zero_grad(); base(ids, labels=ids).loss.backward(); opt.step()
    mark = fingerprint(base)
    c = KLAFTCaptioner.from_parts(None, base, TOKENIZER, feature_width=8, num_topics=3).init_topics(PAIRS)
    assert not torch.allclose(c.topics.g[0], KLAFTCaptioner.from_parts(None, base, TOKENIZER, feature_width=8, num_topics=3).topics.g[0], atol=.1)
    train(c, PAIRS, klaft_objective(c), TrainConfig(steps=80, batch_size=9, lr=1e-2, warmup=5))
    assert c.caption(SETS) == CAPTIONS == c.caption(SETS, num_beams=3) and c.caption(SETS[::-1]) == CAPTIONS[::-1] and fingerprint(base) == mark


def test_parts_are_left_out_one_by_one():
    c = KLAFTCaptioner.from_parts(None, lm(), TOKENIZER, feature_width=8, num_topics=2); batch = c.collate(PAIRS[:4])
    for part in ("ttm", "mrm", "itm"): assert set(klaft_objective(c, Weights(**{part: 0.}))(c, batch)[1]) == {"tcm", "ttm", "mrm", "itm", "weight"} - {part}
    one = KLAFTCaptioner.from_parts(None, lm(), TOKENIZER, 1, feature_width=8)
    assert "mrm" not in klaft_objective(one)(one, one.collate(PAIRS[:4]))[1]
    few = KLAFTCaptioner.from_parts(None, lm(), TOKENIZER, 3, feature_width=8)
    with pytest.raises(ConfigError, match="MRM cannot tell"): klaft_objective(few)(few, few.collate(PAIRS[1:3]))
    bare = KLAFTCaptioner.from_parts(None, lm(), TOKENIZER, feature_width=8, mam=None)
    loss, log = klaft_objective(bare)(bare, bare.collate(PAIRS[:4])); loss.backward(); assert log["itm"] > 0


def test_text_of_image_text_matching_does_not_see_the_image():
    for c in (KLAFTCaptioner.from_parts(None, lm(), TOKENIZER, feature_width=8), KLAFTCaptioner.from_base(BASES["visualgpt"]())):
        shaken(c)
        (v_a, v_x), (u_a, u_x) = (c.image_and_text(c.collate([dict(PAIRS[0], feature=f)])) for f in (SETS[0], 5*SETS[8]))
        assert torch.equal(v_x, u_x) and not torch.allclose(v_a, u_a)
        (v_a, v_x), (u_a, u_x) = (c.image_and_text(c.collate([dict(PAIRS[0], caption=t)])) for t in CAPTIONS[:2])
        assert torch.equal(v_a, u_a) and not torch.allclose(v_x, u_x)


FAMILIES = ["llava", "llava_next", "blip2", "qwen2_5_vl", "idefics3", "paligemma", "internvl"]

@pytest.mark.parametrize("name", FAMILIES)
def test_method_on_families(name):
    c = tiny_family(name); base, mark = c.log_prob(PHOTOS, SAID, ASKED)[0], fingerprint(c)
    tuned = Klaft(c, num_topics=0)
    assert torch.equal(tuned.log_prob(PHOTOS, SAID, ASKED)[0], base); tuned.detach()
    tuned = Klaft(c, num_topics=3); shake(list(tuned.parameters()), .1)
    changed = tuned.log_prob(PHOTOS, SAID, ASKED)[0]
    assert not torch.allclose(changed, base, atol=.05)
    with tuned.off(): assert torch.equal(tuned.log_prob(PHOTOS, SAID, ASKED)[0], base)
    assert torch.equal(tuned.scale(0).log_prob(PHOTOS, SAID, ASKED)[0], base); tuned.scale(1)
    torch.testing.assert_close(torch.stack([tuned.log_prob([p], [s], [a])[0][0] for p, s, a in zip(PHOTOS, SAID, ASKED)]), changed, rtol=1e-3, atol=1e-2)
    assert all(written_is_forward(tuned, p, a) for p, a in zip(PHOTOS, ASKED))
    for n in (1, 3): assert tuned.caption(PHOTOS, ASKED, max_new_tokens=5, num_beams=n) == [tuned.caption([p], [a], max_new_tokens=5, num_beams=n)[0] for p, a in zip(PHOTOS, ASKED)]
    batch = tuned.train().collate([dict(id=i, image=PHOTOS[j], caption=SAID[j]) for i, j in enumerate((0, 1, 2, 0))])
    loss, log = tuned.objective(tuned, batch); loss.backward()
    assert {"tcm", "ttm", "itm"} <= set(log) and log["itm"] > 0
    tuned.eval()
    (v_a, v_x), (u_a, u_x) = (tuned.image_and_text(tuned.collate([dict(id=0, image=p, caption=SAID[0])])) for p in PHOTOS[:2])
    assert torch.equal(v_x, u_x) and not torch.equal(v_a, u_a)
    assert [n for n, p in tuned.named_parameters() if (p.grad is not None and bool(p.grad.any())) != p.requires_grad] == []
    assert fingerprint(tuned.detach()) == mark and torch.equal(c.eval().log_prob(PHOTOS, SAID, ASKED)[0], base)


@pytest.mark.parametrize("name", ["git", "blip", "vit_gpt2"])
def test_method_without_mam(name):
    c = tiny_family(name); base = c.log_prob(PHOTOS, SAID, ASKED)[0]
    with pytest.raises(ConfigError, match="mam=False"): Klaft(c)
    assert c.tuned_by is None and not hasattr(c, "klaft")
    tuned = Klaft(c, mam=False, num_topics=3)
    with tuned.off(): assert torch.equal(tuned.log_prob(PHOTOS, SAID, ASKED)[0], base)
    batch = tuned.collate([dict(id=i, image=p, caption=s) for i, (p, s) in enumerate(zip(PHOTOS, SAID))])
    assert set(tuned.objective(tuned, batch)[1]) == {"tcm", "ttm", "weight"}


def test_images_through_a_vision(tmp_path):
    tiny = load_captioner("tiny"); c = shaken(KLAFTCaptioner.from_parts(tiny, lm(), TOKENIZER, num_topics=2))
    assert c.model.feature_width == tiny.encode(PHOTOS).shape[-1] and not any(n.startswith("eyes") for n, _ in c.named_parameters())
    everything_agrees(c, PHOTOS, CAPTIONS[:3])
    assert c.caption(PHOTOS, max_new_tokens=6) == c.caption(list(tiny.encode(PHOTOS)), max_new_tokens=6)
    c.save(tmp_path/"c"); again = load_klaft(tmp_path/"c", vision=tiny)
    assert torch.equal(again.log_prob(PHOTOS, CAPTIONS[:3])[0], c.log_prob(PHOTOS, CAPTIONS[:3])[0])
    with pytest.raises(ConfigError, match="width of the features"): KLAFTCaptioner.from_parts(None, lm(), TOKENIZER)
