"""Every kind of adapter of capnb.tune.kinds and capnb.tune.bottleneck on model families: LLaVA and one of each sort, all of them with CAPNB_ALL=1."""
import copy, os, sys, types
import pytest
import torch
from PIL import Image
from capnb.core.errors import ConfigError
from capnb.models.captioner import fingerprint
from capnb.models.families import ASKED, SENTENCES, TIERS, WORDS, tiny_family, written_is_forward
from capnb.models.llava import LlavaCaptioner, build_llava, word_tokenizer
from capnb.tune.adapters import load_adapter
from capnb.tune.bottleneck import decoder_layers
from capnb.tune.kinds import NewBias, OldBias
from capnb.tune.methods import attach, decoder_name, part_of

PHOTOS = [Image.effect_mandelbrot((40, 32), (-2, -1.5, x, 1.5), 20).convert("RGB") for x in (.4, .9, 1.6)]
KINDS = {"rslora": dict(r=3), "dora": dict(r=3), "ia3": {}, "bias": {}, "prompt_tuning": dict(n=5), "adapter": dict(r=6), "qlora": dict(r=3)}
SORTS = ("llava", "blip2", "blip")                                          # its own greedy decoder; the generic one; cross-attention
ALL = tuple(TIERS) if os.environ.get("CAPNB_ALL") else SORTS
PAIRS = [(k, f) for f in ALL for k in KINDS] + [("ia3", "git"), ("ia3", "vit_gpt2"), ("bias", "qwen2_5_vl")] * (ALL is SORTS)
NO_MERGE = ("prompt_tuning", "adapter", "qlora")
pytestmark = pytest.mark.filterwarnings("ignore")
_made = {}


def family(name):
    "A fresh copy; building it costs more."
    if name not in _made: _made[name] = tiny_family(name)
    return copy.deepcopy(_made[name])


def make(kind, name):
    "The base, and the method on it."
    if kind == "qlora":
        pytest.importorskip("bitsandbytes")
        if name == "vit_gpt2": pytest.skip("its matrices are not linear layers")
    c = family(name)
    torch.manual_seed(0)
    return c, lambda: attach(c, kind, **KINDS[kind])


def strong(t, size=.4):
    torch.manual_seed(1)
    with torch.no_grad():
        for p in t.parameters(): p.add_(torch.randn_like(p) * size)
    return t


def examples(): return [{"id": i, "image": p, "prompt": a, "caption": c} for i, (p, a, c) in enumerate(zip(PHOTOS, ASKED, SENTENCES))]


@torch.no_grad()
def scores(c): return c(c.collate(examples())).logits


def says(c): return c.caption(PHOTOS, ASKED, max_new_tokens=6)


@pytest.mark.parametrize("kind,name", PAIRS)
def test_kind(kind, name, tmp_path):
    c, put_on = make(kind, name)
    before, logits, print_ = says(c), scores(c), fingerprint(c.model)
    t = put_on()
    if kind not in ("prompt_tuning", "qlora"): torch.testing.assert_close(scores(t), logits, rtol=1e-4, atol=1e-4)  # the start is the base
    root, mine = decoder_name(c.model), set(strong(t).parameters())
    names = {n for n, p in c.named_parameters() if p in mine}
    assert names and all(n.startswith((f"model.{root}.", "bottleneck.", "virtual.")) for n in names)

    # acts in generation, which follows the forward, batched and padded on the left
    tuned, far = says(t), scores(t)
    assert tuned != before
    assert tuned == [t.caption([p], [a], max_new_tokens=6)[0] for p, a in zip(PHOTOS, ASKED)]
    assert all(written_is_forward(t.captioner, p, a) for p, a in zip(PHOTOS, ASKED))

    # off and alpha
    with t.off(): assert torch.equal(scores(t), logits) and says(t) == before
    assert torch.equal(scores(t.scale(0)), logits) and says(t) == before
    assert not torch.allclose(scores(t.scale(.5)), far)
    with t.off(): assert torch.equal(scores(t), logits)                     # also from half way
    assert torch.equal(scores(t.scale(1)), far) and set(t.parameters()) == mine

    # gradients reach what is trained and nothing else; a step changes nothing else
    t.train(); t(t.collate(examples())).loss.backward(); t.eval()
    blind = {p for n, p in c.named_parameters() if n.endswith(("k_proj.bias", "key.bias"))}  # a softmax does not see them
    assert all(p.grad is not None for p in mine) and all(p.grad.abs().sum() > 0 for p in mine - blind)
    assert all(p.grad is None for p in c.parameters() if p not in mine)
    frozen = {n: p.detach().clone() for n, p in c.named_parameters() if p not in mine}
    torch.optim.SGD(t.parameters(), lr=.01).step()
    assert all(torch.equal(p, frozen[n]) for n, p in c.named_parameters() if n in frozen)
    assert {part_of(n.removeprefix("model."), root) for n in frozen} >= {"vision"}
    t.zero_grad()

    # saved, removed, loaded: bit-equal and trainable
    state, far, tuned = t.train_state(), scores(t), says(t)
    t.save(tmp_path / "saved"); assert t.detach() is c and fingerprint(c.model) == print_
    assert torch.equal(scores(c), logits) and all(p.requires_grad for p in c.parameters() if p.is_floating_point())
    t = load_adapter(c, tmp_path / "saved")
    assert t.method == kind and t.config.items() >= KINDS[kind].items()
    assert all(torch.equal(v, state[n]) for n, v in t.train_state().items()) and t.train_state().keys() == state.keys()
    assert torch.equal(scores(t), far) and says(t) == tuned
    t(t.collate(examples())).loss.backward(); assert all(p.grad is not None for p in t.parameters())

    # merged
    if kind in NO_MERGE or isinstance(t, NewBias):
        with pytest.raises(ConfigError, match="cannot|no biases"): t.merge()
        t.detach(); assert fingerprint(c.model) == print_
    else:
        c.model.double(); far = scores(t)
        torch.testing.assert_close(scores(t.merge()), far, rtol=1e-5, atol=1e-5)
        assert c.tuned_by is None and says(c) is not None


@pytest.mark.parametrize("kind,name", [(k, f) for k, f in PAIRS if k not in NO_MERGE])
def test_alpha_is_the_line_of_weights(kind, name):
    "Against weights mixed by hand, in double precision; merging half way writes those."
    c, put_on = make(kind, name)
    c.model.double(); W = {n: p.clone() for n, p in c.model.state_dict().items()}
    t = strong(put_on())
    if isinstance(t, NewBias):                                              # no weight takes it up: the bias itself is the line
        B = [p.detach().clone() for p in t.parameters()]
        for a in (.25, .8):
            got = scores(t.scale(a)); t.scale(1)
            with torch.no_grad():
                for p, b in zip(t.parameters(), B): p.copy_(a * b)
            torch.testing.assert_close(got, scores(t), rtol=1e-5, atol=1e-5)
            with torch.no_grad():
                for p, b in zip(t.parameters(), B): p.copy_(b)
        return
    merged = copy.deepcopy(t).merge(); W1 = {n: p.clone() for n, p in merged.model.state_dict().items()}
    at = {}
    for a in (.25, .8, 1.5):
        merged.model.load_state_dict({n: W[n] + a * (W1[n] - W[n]) for n in W})
        at[a] = scores(merged); torch.testing.assert_close(scores(t.scale(a)), at[a], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores(t.scale(.25).merge()), at[.25], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SORTS)
def test_alpha_of_blocks_and_rows(name):
    c = family(name)
    t = strong(attach(c, "adapter", r=4)); want = scores(t.scale(.25)); t.scale(1)
    with torch.no_grad():
        for b in c.bottleneck: b.up.mul_(.25)
    torch.testing.assert_close(scores(t), want, rtol=1e-5, atol=1e-5)
    t.detach(); t = strong(attach(c, "prompt_tuning", n=4)); v = t.virtual
    want = scores(t.scale(.25)); t.scale(1)
    with torch.no_grad(): v.P.copy_(v.start + .25 * (v.P - v.start))
    torch.testing.assert_close(scores(t), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind):
    c, put_on = make(kind, "llava")
    c.model.to(torch.bfloat16); before = says(c)
    t = strong(put_on(), .5)
    t(t.collate(examples())).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in t.parameters())
    assert says(t) != before
    assert says(t.scale(0)) == before
    scores(t.scale(.5))
    with t.off(): assert says(t) == before


@pytest.mark.parametrize("kind", KINDS)
def test_beams(kind):
    c, put_on = make(kind, "llava")
    beams = lambda: c.caption(PHOTOS, ASKED, max_new_tokens=4, num_beams=2)
    before, t = beams(), strong(put_on(), .5)
    assert beams() != before and beams() == [c.caption([p], a, max_new_tokens=4, num_beams=2)[0] for p, a in zip(PHOTOS, ASKED)]
    with t.off(): assert beams() == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llava", "blip2"])
def test_gradient_checkpointing(kind, name):
    "The same gradients, though the layers run twice."
    def grads(on):
        c, put_on = make(kind, name)
        t = strong(put_on())
        if on: c.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        t.train(); torch.manual_seed(0); t(t.collate(examples())).loss.backward()
        return [p.grad for p in t.parameters()]
    for a, b in zip(grads(False), grads(True)): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_prompt_files_of_peft(tmp_path):
    "Saved by peft's own prompt tuning on LLaVA: the logits are peft's."
    from peft import PromptTuningConfig, get_peft_model
    torch.manual_seed(0)
    c = LlavaCaptioner(*build_llava(word_tokenizer(WORDS), image_size=32, width=48, layers=2, vision_layers=1))  # a width unlike the number of words: peft looks for that number
    with torch.no_grad():
        for p in c.model.parameters(): p.mul_(3)
    theirs = get_peft_model(copy.deepcopy(c.model), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    with torch.no_grad(): theirs.prompt_encoder["default"].embedding.weight.normal_(0, 2)
    theirs.save_pretrained(tmp_path)
    batch = c.collate(examples()); inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    want = theirs(**inputs, pixel_values=c.pixels(PHOTOS)).logits
    t = load_adapter(c, tmp_path); P = t.virtual.P.detach().clone()
    for again in (False, True):                                             # read from the file; then the same rows by name
        if again:
            t.detach(); t = attach(c, "prompt_tuning", n=5)
            with torch.no_grad(): t.virtual.P.copy_(P)
        got, keep = scores(t), batch["attention_mask"].bool()
        torch.testing.assert_close(got[:, 5:][keep], want[:, 5:][keep], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got[:, :5], want[:, :5], rtol=1e-4, atol=1e-4)


def test_four_bits_are_refused_with_a_reason(monkeypatch):
    c = family("llava"); print_ = fingerprint(c.model)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"capnb\[qlora\]"): attach(c, "qlora")
    def broken(*args, **kw): raise RuntimeError("no kernel for this machine")
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.SimpleNamespace(__version__="0", nn=types.SimpleNamespace(Linear4bit=broken)))
    with pytest.raises(ConfigError, match="cannot run: no kernel"): attach(c, "qlora")
    assert c.tuned_by is None and fingerprint(c.model) == print_ and all(p.requires_grad for p in c.parameters())


def test_four_bits_by_hand():
    "The layers against matrices that were rounded and read back; half way against the base's own; a base that is in 4 bits already."
    bnb = pytest.importorskip("bitsandbytes")
    c = family("llava"); layer = c.decoder.layers[0].self_attn.q_proj; W = layer.weight.detach().clone()
    print_, x = fingerprint(c.model), torch.randn(3, W.shape[1])
    t = strong(attach(c, "qlora", r=3, alpha=6)); q = c.decoder.layers[0].self_attn.q_proj; p = q.get_base_layer().weight
    assert p.dtype == torch.uint8 and isinstance(c.decoder.layers[1].mlp.up_proj, bnb.nn.Linear4bit) and type(c.head) is torch.nn.Linear
    Q = bnb.functional.dequantize_4bit(p.data, p.quant_state)               # (d_out, d_in)
    assert 0 < (Q - W).abs().max() < .5 * W.abs().max()
    Wt = Q + 6 / 3 * q.lora_B["default"].weight @ q.lora_A["default"].weight
    torch.testing.assert_close(q(x), x @ Wt.T, rtol=1e-4, atol=1e-4)
    for a in (0, .25, 1): t.scale(a); torch.testing.assert_close(q(x), x @ (W + a * (Wt - W)).T, rtol=1e-4, atol=1e-4)
    root = c.decoder; four = {n: m for n, m in root.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    t.detach(); assert fingerprint(c.model) == print_
    for n, m in four.items():
        parent, _, leaf = n.replace(".base_layer", "").rpartition("."); setattr(root.get_submodule(parent), leaf, m)
    print_, before = fingerprint(c.model), scores(c)
    t = strong(attach(c, "qlora", r=3))
    assert not torch.allclose(scores(t), before)
    with t.off(): assert torch.equal(scores(t), before)
    assert torch.equal(scores(t.scale(0)), before)
    t.detach(); assert fingerprint(c.model) == print_


def test_biases_by_family():
    for name in TIERS:
        t = attach(family(name), "bias")
        assert isinstance(t, NewBias if name in ("llava", "llava_next", "idefics3", "paligemma") else OldBias), name
    c = family("blip2")
    t = attach(c, "bias", targets=["v_proj"])
    assert {n.split(".")[-2] for n, p in c.model.named_parameters() if p.requires_grad} == {"v_proj"}
    t.detach()
    with pytest.raises(ConfigError, match="no bias"): attach(c, "bias", targets=["nothing"])
    assert c.tuned_by is None and all(p.requires_grad for p in c.parameters())


@pytest.mark.parametrize("name", TIERS)
def test_what_trains(name):
    "Counts by hand from the decoder's own modules, and a step of training that leaves vision and connector as they were."
    c = family(name); L = len(decoder_layers(c)); d = c.decoder.config.hidden_size
    for kind, want in dict(adapter=L * 2 * 6 * d, prompt_tuning=5 * d).items():
        t = attach(c, kind, **KINDS[kind]); assert t.counts()["trainable"] == want; t.detach()
    inside = decoder_name(c.model)
    if not os.environ.get("CAPNB_ALL") and name not in SORTS: return
    for kind in ("dora", "ia3", "bias", "full"):
        c = family(name); seen = {n: p.detach().clone() for n, p in c.model.named_parameters() if part_of(n, inside) != "language"}
        t = attach(c, kind, **({"projector": False} if kind == "full" else {}))
        opt = torch.optim.SGD(t.parameters(), lr=.05)
        for _ in range(2): opt.zero_grad(); t(t.collate(examples())).loss.backward(); opt.step()
        now = dict(c.model.named_parameters())
        assert seen and all(torch.equal(now[n], v) for n, v in seen.items()), kind

