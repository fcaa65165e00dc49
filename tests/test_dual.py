"Every dual encoder keeps the same promises, whatever library it comes from."
import copy

import pytest
import torch
from PIL import Image
from torch import nn

from capnb.core.errors import ConfigError
from capnb.models.dual import DualEncoder, OpenClipDual, build_open_clip, clip_loss, real_tokens
from capnb.models.dual_hf import HFDual, build_clip, clip_tokenizer
from capnb.models.dual_more import BlipDual, Joined, TwoTowers, ends_of

WORDS = "a red blue cat dog on the left of two big".split()
TEXTS = ["a cat", "two big dog on the left of a red cat", "a blue dog"]
PHOTOS = [Image.radial_gradient("L").convert("RGB"), Image.linear_gradient("L").convert("RGB").resize((40, 60)), Image.new("RGB", (20, 20), "red")]


def open_clip_vit(**kw):
    text = dict(context_length=20, vocab_size=49408, width=32, heads=2, layers=2, **kw.pop("text", {}))
    vision = dict(image_size=32, layers=2, width=32, head_width=16, patch_size=8, **kw.pop("vision", {}))
    return OpenClipDual(build_open_clip(dict(embed_dim=16, quick_gelu=True, vision_cfg=vision, text_cfg=text, **kw)))


def hf_clip(): return HFDual(*build_clip(clip_tokenizer(WORDS), 32, 8, 32, 2, 2, 2, 16, 20))


def hf_siglip():
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipProcessor
    tok = clip_tokenizer(WORDS)
    tower = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2)
    config = SiglipConfig(text_config=dict(tower, vocab_size=len(tok), max_position_embeddings=16, projection_size=32), vision_config=dict(tower, image_size=16, patch_size=8))
    return HFDual(SiglipModel(config).eval(), SiglipProcessor(SiglipImageProcessor(size=dict(height=16, width=16)), tok))


def blip():
    from transformers import BlipConfig, BlipForImageTextRetrieval, BlipImageProcessor, BlipProcessor
    tok = clip_tokenizer(WORDS)
    tower = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2)
    ends = dict(zip(("bos_token_id", "eos_token_id", "pad_token_id"), ends_of(tok)))
    text = dict(tower, **ends, encoder_hidden_size=32, vocab_size=len(tok), max_position_embeddings=16, hidden_dropout_prob=0., attention_probs_dropout_prob=0.)
    config = BlipConfig(text_config=text, vision_config=dict(tower, image_size=16, patch_size=8), image_text_hidden_size=24)
    return BlipDual(BlipForImageTextRetrieval(config).eval(), BlipProcessor(BlipImageProcessor(size=dict(height=16, width=16)), tok))


def two_towers():
    import timm
    from torchvision import transforms as T
    from transformers import BertConfig, BertModel
    tok, trunk = clip_tokenizer(WORDS), timm.create_model("test_efficientnet", num_classes=0).eval()
    bert = BertModel(BertConfig(vocab_size=len(tok), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64), add_pooling_layer=False).eval()
    return TwoTowers(Joined(trunk, bert, nn.Linear(trunk.num_features, 24), nn.Linear(32, 24)), tok, T.Compose([T.Resize((32, 32)), T.ToTensor()]), frozen=())


MAKE = dict(open_clip=open_clip_vit, open_clip_mean=lambda: open_clip_vit(vision=dict(pool_type="avg", final_ln_after_pool=True), custom_text=True),
            two_way_text=lambda: open_clip_vit(custom_text=True, init_logit_bias=-10, text=dict(no_causal_mask=True, proj_bias=True, pool_type="last")),
            hf_clip=hf_clip, hf_siglip=hf_siglip, blip=blip, two_towers=two_towers)


def library(dual, batch):
    "Image and text vectors by the library's own functions."
    m = dual.model
    if isinstance(dual, OpenClipDual): return m.encode_image(batch["pixels"]), m.encode_text(dual.tokenizer(TEXTS))
    if isinstance(dual, HFDual): return m.get_image_features(batch["pixels"]).pooler_output, m.get_text_features(batch["ids"]).pooler_output
    if isinstance(dual, BlipDual):
        return (m.vision_proj(m.vision_model(batch["pixels"]).last_hidden_state[:, 0]),
                m.text_proj(m.text_encoder(input_ids=batch["ids"], attention_mask=batch["mask"].long()).last_hidden_state[:, 0]))
    own = [m.text(**dual.tokenizer(t, return_tensors="pt", return_token_type_ids=False)).last_hidden_state.mean(1) for t in TEXTS]
    return m.image_proj(m.trunk(batch["pixels"])), m.text_proj(torch.cat(own))


@pytest.fixture(scope="module", params=MAKE)
def dual(request):
    torch.manual_seed(0)
    return MAKE[request.param]()


@pytest.fixture(scope="module")
def batch(dual): return dual.collate([dict(image=p, caption=c) for p, c in zip(PHOTOS, TEXTS)])


def close(a, b, atol=1e-6): torch.testing.assert_close(a, b, atol=atol, rtol=0)


@torch.no_grad()
def test_vectors_are_the_librarys_own(dual, batch):
    image, text = dual(batch)
    v, t = library(dual, batch)
    close(image.vector, v); close(text.vector, t)


@torch.no_grad()
def test_shapes_and_masks(dual, batch):
    image, text = dual(batch)
    d = image.vector.shape[1]
    assert image.tokens.shape == (*image.mask.shape, d) and text.tokens.shape == (*text.mask.shape, d) and image.mask.all()
    words = [len(t.split()) for t in TEXTS]
    assert text.mask.sum(1).tolist() == [w + 1 for w in words], "words and the end token, neither start nor padding"
    assert dual.image(batch["pixels"], tokens=False).tokens is None and dual.text(batch["ids"], batch["mask"], tokens=False).tokens is None


@torch.no_grad()
def test_padding_changes_nothing(dual, batch):
    image, text = dual(batch)
    for i, (p, c) in enumerate(zip(PHOTOS, TEXTS)):
        v, t = dual(dual.collate([dict(image=p, caption=c)]))
        close(v.vector[0], image.vector[i], 1e-5); close(t.vector[0], text.vector[i], 1e-5)
        close(t.tokens[0][t.mask[0]], text.tokens[i][text.mask[i]], 1e-5)
        close(v.tokens[0], image.tokens[i], 1e-5)


@torch.no_grad()
def test_mask_may_be_left_out(dual, batch):
    a, b = dual.text(**batch_text(batch)), dual.text(batch["ids"])
    close(a.vector, b.vector); assert torch.equal(a.mask, b.mask)


def batch_text(batch): return dict(ids=batch["ids"], mask=batch["mask"])


@torch.no_grad()
def test_collections_are_the_same_in_any_batch_size(dual, batch):
    image, text = dual(batch)
    close(dual.encode_images(PHOTOS, batch_size=2), image.unit, 1e-5); close(dual.encode_texts(TEXTS, batch_size=2, normalize=False), text.vector, 1e-5)
    close(dual.encode_images(batch["pixels"]), image.unit, 1e-5)
    was = dual.training; dual.train(); dual.encode_texts(TEXTS); assert dual.training; dual.train(was)


def test_gradients_reach_everything(dual, batch):
    dual.zero_grad()
    image, text = dual(batch)
    (clip_loss(dual.similarity(image, text)) + (image.tokens.mean(1)*text.tokens.mean(1)).sum()).backward()
    without = [n for n, p in dual.named_parameters() if p.grad is None and "itm_head" not in n and "cross" not in n.lower() and "logit_bias" not in n]
    assert not without and all(p.grad.isfinite().all() for p in dual.parameters() if p.grad is not None)
    assert dual.log_scale.grad.abs() > 0
    dual.zero_grad()


@torch.no_grad()
def test_half_precision(dual):
    half = copy.deepcopy(dual).to(torch.bfloat16)
    for a, b in ((half.encode_images(PHOTOS), dual.encode_images(PHOTOS)), (half.encode_texts(TEXTS), dual.encode_texts(TEXTS))):
        assert a.dtype == torch.bfloat16 and (a.float() - b).abs().max() < .06
    assert half.similarity(*half(half.collate([dict(image=PHOTOS[0], caption="a cat")]))).dtype == torch.bfloat16


@torch.no_grad()
def test_scale_is_the_factor_itself(dual, batch):
    image, text = dual(batch)
    z = dual.similarity(image, text)
    cos = torch.nn.functional.cosine_similarity(image.vector[:, None], text.vector[None], dim=-1)
    close(z, dual.logit_scale*cos + dual.logit_bias, 1e-4)
    close(dual.similarity(image.vector, text.vector), z)


def test_state_goes_out_and_in(dual):
    other = copy.deepcopy(dual)
    with torch.no_grad():
        for p in other.parameters(): p.add_(.1)
    other.load_train_state(dual.train_state())
    close(other.encode_texts(TEXTS), dual.encode_texts(TEXTS))


def test_lora_finds_its_layers(dual, batch):
    from peft import LoraConfig, inject_adapter_in_model
    tuned = copy.deepcopy(dual)
    before = tuned.encode_texts(TEXTS)
    names = [n.removeprefix("model.") for n, m in tuned.named_modules() if type(m) is nn.Linear]
    assert names, "no plain linear layer to adapt"
    inject_adapter_in_model(LoraConfig(r=2, target_modules=names), tuned.model)
    close(tuned.encode_texts(TEXTS), before, 1e-5)  # nothing has changed yet
    clip_loss(tuned.similarity(*tuned(batch))).backward()
    grads = {n for n, p in tuned.named_parameters() if "lora_B" in n and p.grad is not None and p.grad.abs().sum() > 0}
    assert grads


def test_our_loop_trains_it(dual, tmp_path):
    from capnb.train.config import TrainConfig
    from capnb.train.loop import train
    model, other = copy.deepcopy(dual), copy.deepcopy(dual)
    data = [dict(id=i, image=p, caption=c) for i, (p, c) in enumerate(zip(PHOTOS, TEXTS))]
    objective = lambda m, b: (clip_loss(m.similarity(*m(b))), {})
    config = TrainConfig(steps=4, batch_size=3, lr=1e-3, checkpoint_every=2, out=str(tmp_path))
    done = train(model, data, objective, config)
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in done.history) and not torch.equal(model.encode_texts(TEXTS), dual.encode_texts(TEXTS))
    assert train(other, data, objective, config).resumed == 4  # a finished run is read, not done again
    a, b = model.train_state(), other.train_state()
    assert all(torch.equal(a[k], b[k]) for k in a)


# ---- what only some have

@torch.no_grad()
def test_end_token_is_where_clip_reads():
    for make in (open_clip_vit, hf_clip):
        dual = make(); b = dual.tokenize(TEXTS); out = dual.text(**b)
        close(out.tokens[range(3), b["mask"].sum(1) - 1], out.vector)


def test_padding_is_found_by_the_end_token_not_by_its_id():
    dual = open_clip_vit()
    ids = dual.tokenizer(["?!?!"])
    inside = (ids[0, 1:3] == 0).any() or (ids == 0).sum() < 20
    assert inside and dual.counting(ids).sum() == (ids == dual.end).int().argmax(1)  # all tokens between start and end, and the end
    ids = torch.tensor([[dual.start, 0, 320, dual.end, 0, 0]])  # id 0 is '!' inside a word
    assert dual.counting(ids).int().tolist() == [[0, 1, 1, 1, 0, 0]]
    ours, theirs = dual.counting(dual.tokenizer(TEXTS)), dual.tokenizer(TEXTS) > 0
    theirs[:, 0] = False  # FSC-CLIP's rule
    assert torch.equal(ours, theirs)


def test_truncated_captions_keep_their_end():
    for make in (open_clip_vit, hf_clip, hf_siglip):
        dual = make(); b = dual.tokenize(["a cat " * 60])
        assert b["mask"].all() and b["ids"][0, -1] == dual.end and dual.text(**b).vector.isfinite().all()


def test_true_sizes_on_no_memory():
    import open_clip
    with torch.device("meta"): model = build_open_clip(open_clip.get_model_config("ViT-B-32"), quick_gelu=True)
    dual = OpenClipDual(model)
    assert sum(p.numel() for p in dual.parameters()) == 151_277_313 and dual.trims and dual.end == 49407


def test_what_is_no_dual_encoder_is_refused():
    import open_clip
    with torch.device("meta"), pytest.raises(ConfigError, match="does not give patches"): OpenClipDual(build_open_clip(open_clip.get_model_config("RN50")))
    with pytest.raises(ConfigError, match="no adapter"): HFDual(nn.Linear(1, 1), None)
    with pytest.raises(ConfigError, match="captions"): build_open_clip(open_clip.get_model_config("coca_ViT-B-32"))
    assert isinstance(hf_clip(), DualEncoder) and real_tokens(torch.tensor([[1, 2]])).all()
