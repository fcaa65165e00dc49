"""Prefix tuning: the attention beside its formula, on the families with beams and copies, beside peft, and other hands in the same attention."""
import copy, math, pickle
import pytest
import torch
from PIL import Image
from capnb.core.errors import ConfigError
from capnb.models.families import ASKED, SENTENCES, TIERS, tiny_family
from capnb.models.points import changed_attention, changed_keys_values, find_points, hold, inject, let_go
from capnb.tune.battery import strong
from capnb.tune.methods import attach
from capnb.tune.prefix import PrefixRows, first_rows

PHOTOS = [Image.effect_mandelbrot((40, 32), (-2, -1.5, x, 1.5), 20).convert("RGB") for x in (.4, .9, 1.6)]
pytestmark = pytest.mark.filterwarnings("ignore")
_made = {}


def family(name):
    if name not in _made: _made[name] = tiny_family(name)
    return copy.deepcopy(_made[name])


def batch(c): return c.collate([{"image": p, "prompt": a, "caption": s} for p, a, s in zip(PHOTOS, ASKED, SENTENCES)])


@torch.no_grad()
def logits(c): return c.eval()(batch(c)).logits


def says(c, **kw): return c.caption(PHOTOS, ASKED, max_new_tokens=6, **kw)


def literal(q, k, v, scale, seen, score):
    "Attention, one query at a time: `seen` (B, S, T) true where a key is seen, `score` (T,) to be added."
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    out = torch.zeros(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                w = ((k[b, h] @ q[b, h, i]) * scale + score).exp() * seen[b, i]
                out[b, i, h] = w @ v[b, h] / w.sum()
    return out


@pytest.mark.parametrize("mask", ["none", "bool", "float", "bidirectional", "one_query"])
@pytest.mark.parametrize("scores", [(None, None), (.7, None), (None, -1.2), (.4, torch.tensor([.1, -2., .3]))])
def test_attention_is_the_formula(mask, scores):
    g = torch.Generator().manual_seed(3)
    B, H, h, S, T, d = 2, 4, 2, 5, 5, 8
    if mask == "one_query": S = 1
    q, k, v = torch.randn(B, H, S, d, generator=g), torch.randn(B, h, T, d, generator=g), torch.randn(B, h, T, d, generator=g)
    first, second = torch.randn(2, h, 2, d, generator=g), torch.randn(2, h, 3, d, generator=g)
    seen = torch.ones(B, S, T, dtype=torch.bool)
    if mask not in ("one_query", "bidirectional"): seen = seen.tril()
    if mask in ("bool", "float"): seen[1, :, :2] = False  # the second row is padded by two
    given = {"bool": seen[:, None], "float": torch.zeros(B, 1, S, T).masked_fill(~seen[:, None], torch.finfo(torch.float).min)}.get(mask)
    module = torch.nn.Module().eval()
    def change(P, score): return lambda i, k, v: (*(torch.cat([p.expand(len(x), -1, -1, -1), x], 2) for p, x in zip(P, (k, v))), *([] if score is None else [score]))
    module._changes = [(0, change(first, scores[0])), (0, change(second, scores[1]))]
    got = changed_attention(module, q, k, v, given, .3, is_causal=mask != "bidirectional")[0]
    K, V = (torch.cat([b.expand(B, -1, -1, -1), a.expand(B, -1, -1, -1), x], 2) for a, b, x in zip(first, second, (k, v)))
    score = torch.cat([torch.zeros(3) + (0 if scores[1] is None else scores[1]), torch.zeros(2) + (scores[0] or 0), torch.zeros(T)])
    want = literal(q, K, V, .3, torch.cat([torch.ones(B, S, 5, dtype=torch.bool), seen], 2), score)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TIERS)
def test_rows_act_with_beams_and_in_copies(name):
    c = family(name)
    before, base = says(c, num_beams=2), logits(c)
    t = strong(attach(c, "prefix", n=5), 2.)
    shapes = {tuple(p.shape) for p in t.parameters()}
    L, (_, h, n, d) = len(find_points(c)["keys_values"]), shapes.pop()
    assert not shapes and n == 5 and t.counts()["trainable"] == 2 * n * L * h * d
    assert says(t, num_beams=2) == [t.caption([p], a, max_new_tokens=6, num_beams=2)[0] for p, a in zip(PHOTOS, ASKED)] != before
    as_trained = logits(t)
    twin = copy.deepcopy(t)
    with torch.no_grad(): next(iter(twin.parameters())).add_(1.)
    assert torch.equal(logits(t), as_trained) and not torch.equal(logits(twin), as_trained)
    assert torch.equal(logits(twin.detach()), base) and torch.equal(logits(t), as_trained)
    assert torch.equal(logits(t.detach()), base)


@pytest.mark.parametrize("name", ["llava", "blip2", "paligemma", "blip"])
def test_alpha_two_is_every_row_twice(name):
    c = family(name)
    t = strong(attach(c, "prefix", n=3))
    rows = [p.detach().clone() for p in t.parameters()]
    doubled = logits(t.scale(2.))
    t.detach()
    t = attach(c, "prefix", n=6)
    with torch.no_grad():
        for p, r in zip(t.parameters(), rows): p.copy_(torch.cat([r, r], 2))
    torch.testing.assert_close(logits(t), doubled, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["sdpa", "eager"])
def test_the_base_may_have_another_attention(how):
    c = family("llava")
    c.model.set_attn_implementation(how)
    base = logits(c)
    t = strong(attach(c, "prefix", n=4))
    assert c.decoder.config._attn_implementation == "capnb" and not torch.equal(logits(t), base)
    with t.off(): assert c.decoder.config._attn_implementation == how and torch.equal(logits(t), base)
    assert torch.equal(logits(t.scale(0)), base)
    assert torch.equal(logits(t.detach()), base) and c.decoder.config._attn_implementation == how


@pytest.mark.parametrize("name", ["llava", "git", "vit_gpt2"])
def test_changes_come_and_go_in_any_order(name):
    c = family(name)
    modules, base = find_points(c)["keys_values"], logits(c)
    kinds = [(type(m), "forward" in m.__dict__) for m in modules]
    one, two = (lambda i, k, v: (k * 1.5, v)), (lambda i, k, v: (k, v + 1.))
    with changed_keys_values(modules, two): second = logits(c)
    hold(modules, one); hold(modules[:1], two); let_go(modules, one); hold(modules[1:], two); let_go(modules[:1], two); hold(modules[:1], two)
    assert torch.equal(logits(c), second)
    let_go(modules[1:], two); let_go(modules[:1], two)
    assert torch.equal(logits(c), base) and [(type(m), "forward" in m.__dict__) for m in modules] == kinds
    t = strong(attach(c, "prefix", n=4))
    tuned = logits(t)
    with inject(c, keys_values=two):
        both = logits(t)
        with t.off(): assert torch.equal(logits(t), second)
        assert torch.equal(logits(t), both)
    assert torch.equal(logits(t), tuned) and not torch.equal(both, tuned)
    t.detach(); assert torch.equal(logits(c), base)


def test_rows_are_counted_once_with_any_cache():
    "The generic decoder of transformers, with its cache, against whole forward passes: rows in the cache would be seen twice."
    c = family("qwen2_5_vl")
    t, seen = strong(attach(c, "prefix", n=4)), []
    with changed_keys_values(t.attention, lambda i, k, v: seen.append(k.shape[2]) or (k, v)): t.caption(PHOTOS[:1], max_new_tokens=4)
    T = seen[0]
    assert seen[:2 * len(t.attention):len(t.attention)] == [T, T + 1]  # the second change sees the first one's rows, at every step as many


def test_first_rows_are_the_words_of_the_prompt():
    c = family("llava")
    modules = find_points(c)["keys_values"]
    seen, b = {}, c.collate([{"image": Image.new("RGB", (224, 224))}])
    with torch.no_grad(), changed_keys_values(modules, lambda i, k, v: seen.update({i: (k[0], v[0])}) or (k, v)): c.eval()(b)
    for rows, (k, v) in zip(first_rows(c, modules, 2, "text"), seen.values()):  # the prompt ends "... the image :"
        torch.testing.assert_close(rows, torch.stack([k[:, -2:], v[:, -2:]]), rtol=1e-4, atol=1e-5)
    torch.manual_seed(5); a = first_rows(c, modules, 9, "random")
    torch.manual_seed(5); b = first_rows(c, modules, 9, "random")
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and not torch.equal(a[0], first_rows(c, modules, 9, "random")[0])


def test_where_a_prompt_has_no_words_rows_begin_at_random():
    from capnb.models.captioner import Template
    c = family("blip"); c.template_ = Template(form="{instruction}", instruction="")
    t = attach(c, "prefix", n=4)
    assert all(p.std() > 0 for p in t.parameters()) and torch.isfinite(logits(t)).all()


def test_trained_under_autocast_and_saved_at_an_alpha(tmp_path):
    c = family("llava")
    t = strong(attach(c, "prefix", n=4))
    with torch.autocast("cpu", torch.bfloat16): t.train()(batch(t)).loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in t.parameters())
    want = logits(t.scale(.4)); t.save(tmp_path); t.detach()
    again = attach(c, "prefix", n=4).load(tmp_path)
    assert again.alpha == .4 and torch.equal(logits(again), want)
    again.detach()
    pickle.loads(pickle.dumps(find_points(c)["keys_values"][0]))  # nothing of ours is left in it
    with pytest.raises(ConfigError, match="another shape"): attach(c, "prefix", n=5).load(tmp_path)


@pytest.mark.parametrize("wrong", [dict(n=0), dict(init="zero"), dict(rows=3)])
def test_wrong_settings_leave_the_base_alone(wrong):
    c = family("llava")
    base = logits(c)
    with pytest.raises(ConfigError): attach(c, "prefix", **wrong)
    assert c.tuned_by is None and torch.equal(logits(c), base) and c.decoder.config._attn_implementation == "sdpa"
    t = attach(c, "prefix", n=2)
    for alpha in (-1, math.nan, math.inf):
        with pytest.raises(ConfigError): t.scale(alpha)


def peft_pair(name, n):
    "peft's prefix tuning with random rows on a copy, and ours with its keys turned back by n positions."
    from peft import PrefixTuningConfig, get_peft_model
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    c = family(name)
    text = c.model.config.text_config
    L, h, d = text.num_hidden_layers, text.num_key_value_heads, text.hidden_size // text.num_attention_heads
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=n, num_layers=L, num_attention_heads=h, token_dim=h * d, num_transformer_submodules=1)
    inner = copy.deepcopy(c.model)
    model = get_peft_model(inner, config).eval()
    W = model.prompt_encoder["default"].embedding.weight
    with torch.no_grad(): W.copy_(torch.randn(W.shape, generator=torch.Generator().manual_seed(1)))
    KV = W.detach().view(n, L, 2, h, d).permute(1, 2, 3, 0, 4)  # (L, 2, h, n, d_h)
    cos, sin = c.decoder.rotary_emb(KV, torch.tensor([[-n]]))
    t = attach(c, "prefix", n=n)
    with torch.no_grad():
        for p, (K, V) in zip(t.parameters(), KV): p.copy_(torch.stack([apply_rotary_pos_emb(K[None], K[None], cos, sin)[1][0], V]))
    return model, t


@pytest.mark.parametrize("name,n", [("idefics3", 1), ("internvl", 6)])
def test_same_as_peft_where_positions_are_rotary(name, n):
    model, t = peft_pair(name, n)
    b = batch(t)
    inputs = {k: v for k, v in t.captioner.model_inputs(b).items()}
    with torch.no_grad(): want = model(**inputs).logits
    there = b["attention_mask"].bool()
    torch.testing.assert_close(logits(t)[there], want[there], rtol=1e-3, atol=1e-3)
    write = t.captioner.model_inputs(t.collate([{"image": PHOTOS[0]}]))
    kw = dict(max_new_tokens=6, do_sample=False, pad_token_id=t.tokenizer.pad_token_id, eos_token_id=t.ends)
    out = model.generate(**write, **kw)[:, write["input_ids"].shape[1]:]
    assert t.tokenizer.decode(out[0], skip_special_tokens=True).strip() == t.caption(PHOTOS[0], max_new_tokens=6)[0]
