"""One battery of checks for every tuning method on every captioner family: a method that is listed but does nothing, or that
touches what it should not, fails here. Every method meets LLaVA and one of each kind the generic family; CAPNB_ALL=1 runs every pair."""
import copy, os
import pytest
import torch
from PIL import Image
from capnb.models.captioner import Template, fingerprint
from capnb.models.generic import HFCaptioner
from capnb.models.llava import LlavaCaptioner, build_llava, word_tokenizer
from capnb.tune.adapters import load_adapter
from capnb.tune.methods import METHODS, attach

WORDS = "user assistant : . , ? you see pictures describe the image in one sentence a red blue small cat dog bird is on of yes no".split()
CASES = {"prompt": dict(method="prompt"), "prompt_9": dict(method="prompt", n=9), "prompt_before": dict(method="prompt", n=4, place="before"),
         "lora": dict(method="lora", r=4), "lora_all": dict(method="lora", r=2, targets=["q_proj", "k_proj", "v_proj", "o_proj"]),
         "dora": dict(method="lora", r=2, dora=True), "full": dict(method="full"), "full_vision": dict(method="full", vision=True)}
FAMILIES = {"llava": LlavaCaptioner, "generic": HFCaptioner}
PHOTOS = [Image.effect_mandelbrot((32, 32), (-2, -1.5, x, 1.5), 20).convert("RGB") for x in (.4, .9, 1.6, .2)]
CAPTIONS = ["a red dog", "a small blue cat on a bird", "yes", "no , a dog"]
PROMPTS = [None, "is the cat of the dog red ?", "describe", None]


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    model, processor = build_llava(word_tokenizer(WORDS), image_size=32, width=32, layers=2, vision_layers=2)
    with torch.no_grad():
        for p in model.parameters(): p.mul_(3.)
    return mute(model), processor


def mute(model):
    "Never write a special token other than the end: a teacher-forced row with an image mark in its caption would be another prompt."
    with torch.no_grad(): model.lm_head.weight[[0, 1, 3, 4]] = 0.
    return model


def pairs(cases, *generic):
    "Parameters `case` and `captioner`: all cases on LLaVA, those named in `generic` on the generic family, too."
    chosen = [(c, f) for f in FAMILIES for c in cases if f == "llava" or c in generic or os.environ.get("CAPNB_ALL")]
    return pytest.mark.parametrize("case,captioner", chosen, indirect=["captioner"])


@pytest.fixture(params=FAMILIES)
def captioner(request, parts):
    model, processor = parts
    return FAMILIES[request.param](copy.deepcopy(model), processor, Template("describe the image", "you see pictures."))


def examples(prompts=(None,) * 4):
    return [{"id": i, "image": p, "prompt": q, "caption": c} for i, (p, q, c) in enumerate(zip(PHOTOS, prompts, CAPTIONS))]


def strong(tuned, size=.5):
    "Random values large enough that nobody can overlook them."
    torch.manual_seed(1)
    with torch.no_grad():
        for p in tuned.parameters(): p.add_(torch.randn_like(p) * size)
    if tuned.method == "full": mute(tuned.captioner.model)
    return tuned


def says(c, prompts=None): return c.caption(PHOTOS, prompts, max_new_tokens=6)


def forced(c, prompts, n=6):
    "Greedy captions without a cache and without batches: every token by a whole forward."
    out = []
    for photo, prompt in zip(PHOTOS, prompts):
        c.eval(); got = []
        with torch.no_grad():
            for _ in range(n):
                batch = c.collate([{"image": photo, "prompt": prompt}])
                more = torch.tensor([got], dtype=torch.long)
                batch["input_ids"] = torch.cat([batch["input_ids"], more], 1)
                batch["attention_mask"] = torch.ones_like(batch["input_ids"])
                if "slots" in batch: batch["slots"] = torch.cat([batch["slots"], torch.full_like(more, -1)], 1)
                for k in ("token_type_ids", "mm_token_type_ids"):
                    if k in batch: batch[k] = torch.cat([batch[k], torch.zeros_like(more)], 1)
                token = c(batch).logits[0, -1].argmax().item()
                if token in c.ends: break
                got.append(token)
        out.append(c.tokenizer.decode(got, skip_special_tokens=True).strip())
    return out


def test_every_listed_method_is_tested():
    assert {c["method"] for c in CASES.values()} | {"zero_shot"} == set(METHODS.table)


@pairs(CASES, "prompt_before", "lora", "full_vision")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_battery(case, captioner, tmp_path):
    base_print, base_says = fingerprint(captioner.model), says(captioner)
    base_logits = captioner(captioner.collate(examples())).logits
    torch.manual_seed(0)
    t = strong(attach(captioner, **CASES[case]))

    # acts in generation, and generation is what the forward says, batched and left-padded
    tuned_says = says(t)
    assert tuned_says != base_says
    assert says(t, PROMPTS) == forced(t, PROMPTS)

    # off, alpha = 0 and alpha = 1
    with t.off():
        assert says(t) == base_says
        assert torch.equal(t(t.collate(examples())).logits, base_logits)
    batch = t.collate(examples())
    logits = t(batch).logits
    if CASES[case]["method"] != "prompt":
        assert torch.equal(t.scale(0)(t.collate(examples())).logits, base_logits)
    assert torch.equal(t.scale(1)(t.collate(examples())).logits, logits)

    # gradients reach what is trained, all of it and nothing else
    t.train(); t(t.collate(examples())).loss.backward(); t.eval()
    mine = set(t.parameters())
    unused = {p for n, p in t.named_parameters() if "vision_tower.post_layernorm" in n}  # LLaVA reads the tower before it
    assert mine and all(p.grad is not None and p.grad.abs().sum() > 0 for p in mine - unused)
    assert all(p.grad is None for p in torch.nn.Module.parameters(t) if p not in mine)
    touched = any("vision_tower" in n for n, p in t.named_parameters() if p.requires_grad)
    assert touched == (case == "full_vision")

    # saved, removed, loaded: bit-equal and trainable
    state = t.train_state(); t.save(tmp_path / "saved")
    assert t.detach() is captioner and fingerprint(captioner.model) == base_print
    assert torch.equal(captioner(captioner.collate(examples())).logits, base_logits)
    assert all(p.requires_grad for p in captioner.parameters())
    again = load_adapter(captioner, tmp_path / "saved")
    assert again.config == t.config and all(torch.equal(v, state[n]) for n, v in again.train_state().items())
    assert torch.equal(again(again.collate(examples())).logits, logits) and says(again) == tuned_says
    t = again
    t(t.collate(examples())).loss.backward()
    assert any(p.grad is not None for p in t.parameters())

    # merged
    if CASES[case]["method"] != "prompt":
        captioner.model.double()  # so that a wrong formula shows and rounding does not
        with torch.no_grad():  # features are then read the same way, trained tower or not
            logits = t(t.collate(examples())).logits
            merged = t.merge()
            torch.testing.assert_close(merged(merged.collate(examples())).logits, logits, rtol=1e-5, atol=1e-5)


COUNTS = {
    "prompt": lambda c: (len([i for i in c.prompt_ids(None)[0] if i not in c.tokenizer.all_special_ids])) * 32, "prompt_9": lambda c: 9 * 32,
    "lora": lambda c: 2 * 2 * 4 * (32 + 32), "lora_all": lambda c: 2 * 4 * 2 * (32 + 32), "dora": lambda c: 2 * 2 * (2 * 64 + 32),
    "full": lambda c: sum(p.numel() for n, p in c.model.named_parameters() if "vision_tower" not in n)}


@pairs(COUNTS, "prompt")
def test_counted_parameters(case, captioner):
    want = COUNTS[case](captioner)
    assert attach(captioner, **CASES[case]).counts()["trainable"] == want


@pairs(["prompt", "lora", "full"], "prompt")
def test_half_precision(case, captioner):
    captioner.model.to(torch.bfloat16)
    base = says(captioner)
    t = strong(attach(captioner, **CASES[case]))
    t(t.collate(examples())).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in t.parameters() if p.grad is not None)
    assert says(t) != base
    with t.off(): assert says(t) == base


@pairs(["prompt", "lora", "full"])
def test_alpha_is_a_straight_line(case, captioner):
    t = strong(attach(captioner, **CASES[case]))
    def effective():
        if case == "prompt": return t.virtual.rows()
        if case == "full": return dict(t.captioner.model.named_parameters())["lm_head.weight"].detach().clone()
        layer = t._layers()[0]; return layer.get_delta_weight("default")
    at = {a: (t.scale(a), effective())[1] for a in (0., .25, 1., 1.5)}
    for a in (.25, 1.5): torch.testing.assert_close(at[a], at[0.] + a * (at[1.] - at[0.]), rtol=1e-5, atol=1e-5)


def test_beams_and_batches(captioner):
    one = [captioner.caption([p], q, max_new_tokens=8, num_beams=3)[0] for p, q in zip(PHOTOS, PROMPTS)]
    assert captioner.caption(PHOTOS, PROMPTS, max_new_tokens=8, num_beams=3) == one
    assert captioner.caption(PHOTOS, PROMPTS, max_new_tokens=8, batch_size=3) == [captioner.caption([p], q, max_new_tokens=8)[0] for p, q in zip(PHOTOS, PROMPTS)]


def test_log_prob_is_the_sum_of_the_losses(captioner):
    total, count = captioner.log_prob(PHOTOS, CAPTIONS, PROMPTS, batch_size=3)
    for i, e in enumerate(examples(PROMPTS)):
        loss = captioner(captioner.collate([e])).loss
        torch.testing.assert_close(-total[i] / count[i], loss.detach().cpu(), rtol=1e-4, atol=1e-4)
