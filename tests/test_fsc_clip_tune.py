"""Fine-tuning dual encoders: cached gradients, methods x families, checkpoints, stops, a foreign loop, the command."""
import copy, json, os, signal, subprocess, sys, threading
import pytest
import torch
from capnb.core.errors import CapnbError
from capnb.fsc_clip.baselines import OBJECTIVES, collate_group, objective_named
from capnb.fsc_clip.cached import Cached
from capnb.fsc_clip.objective import FSCClip, collate_negatives
from capnb.fsc_clip.recipe import Negated, finetune, recipe
from capnb.fsc_clip.tuning import side_of
from capnb.data.scenes import Scenes
from capnb.models.dual import OpenClipDual, build_open_clip
from capnb.models.dual_hf import HFDual, build_clip, clip_tokenizer
from capnb.models.dual_load import load_dual_encoder
from capnb.models.pipclip import toy_pipclip
from capnb.tune.alpha import alpha_sweep
from capnb.tune.methods import attach

WORDS = "a red blue green dog cat mat on the left of".split()


def clip_hf():
    torch.manual_seed(0)
    return HFDual(*build_clip(clip_tokenizer(WORDS), image_size=32, patch=16, width=32, layers=2, text_layers=2, heads=2, dim=16))


def siglip_hf():
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipProcessor
    torch.manual_seed(0)
    t = clip_tokenizer(WORDS)
    small = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=1)
    text = dict(small, vocab_size=len(t), max_position_embeddings=12, projection_size=32, pad_token_id=t.pad_token_id, bos_token_id=t.bos_token_id, eos_token_id=t.eos_token_id)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=dict(small, image_size=32, patch_size=16))).eval()
    return HFDual(model, type("P", (), dict(tokenizer=t, image_processor=SiglipImageProcessor(size=dict(height=32, width=32))))())


def blip():
    from transformers import BlipConfig, BlipForImageTextRetrieval, BlipImageProcessor
    from capnb.models.dual_more import BlipDual
    torch.manual_seed(0)
    t = clip_tokenizer(WORDS)
    small = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=1)
    text = dict(small, bos_token_id=t.bos_token_id, eos_token_id=t.eos_token_id, pad_token_id=t.pad_token_id, encoder_hidden_size=32, vocab_size=len(t), max_position_embeddings=16, hidden_dropout_prob=0., attention_probs_dropout_prob=0.)
    model = BlipForImageTextRetrieval(BlipConfig(text_config=text, vision_config=dict(small, image_size=32, patch_size=16), image_text_hidden_size=16)).eval()
    return BlipDual(model, type("P", (), dict(tokenizer=t, image_processor=BlipImageProcessor(size=dict(height=32, width=32))))())


def open_clip(custom=False):
    torch.manual_seed(0)
    config = dict(embed_dim=16, quick_gelu=True, vision_cfg=dict(image_size=32, layers=2, width=32, head_width=16, patch_size=16),
                  text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=2))
    if custom: config["custom_text"] = True
    return OpenClipDual(build_open_clip(config), config=config)


FAMILIES = dict(clip=clip_hf, siglip=siglip_hf, blip=blip, open_clip=open_clip, custom=lambda: open_clip(True), two_towers=toy_pipclip)


def examples(dual, n=9):
    g = torch.Generator().manual_seed(1)
    side = 224 if dual.name == "pipclip" else 32
    words = WORDS if dual.name != "pipclip" else "a red blue fire engine hot pepper banana".split()
    say = lambda: " ".join(words[int(i)] for i in torch.randint(len(words), (int(torch.randint(1, 9, (1,), generator=g)),), generator=g))
    return [dict(id=i, image=torch.rand(3, side, side, generator=g), caption=say(), negatives=[say() for _ in range(i % 4)]) for i in range(n)]


def gradients(dual, objective, batch):
    dual.zero_grad()
    loss, _ = objective(dual, batch)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in dual.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{}, dict(lambda_l=0., gamma=0., beta=0.), dict(attention="softmax", aggregate="mean")])
def test_gradient_caching_is_exact_in_every_family(family, settings):
    dual = FAMILIES[family]()
    if family != "two_towers": dual = dual.double()
    dual.train()
    batch = collate_negatives(dual, examples(dual, 5 if family == "two_towers" else 9))
    tight = dict(rtol=1e-8, atol=1e-11) if family != "two_towers" else dict(rtol=1e-3, atol=1e-5)
    loss, direct = gradients(dual, FSCClip(**settings), batch)
    assert len(direct) >= 3
    for chunk in (2, 4, 64):
        same, cached = gradients(dual, Cached(FSCClip(**settings), chunk), batch)
        assert cached.keys() == direct.keys()
        torch.testing.assert_close(same, loss, **tight)
        for n in direct: torch.testing.assert_close(cached[n], direct[n], **tight, msg=n)


def test_caching_with_no_negatives_and_under_autocast():
    dual = clip_hf()
    none = collate_negatives(dual, [dict(e, negatives=[]) for e in examples(dual)])
    assert torch.isclose(gradients(dual, FSCClip(), none)[0], gradients(dual, Cached(FSCClip(), 2), none)[0])
    batch = collate_negatives(dual, examples(dual))
    with torch.autocast("cpu", torch.bfloat16): a, b = (gradients(dual, o, batch) for o in (FSCClip(), Cached(FSCClip(), 4)))
    assert torch.isclose(a[0], b[0], rtol=2e-2) and all(g.isfinite().all() for g in b[1].values())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_and_caches(name):
    dual, objective = clip_hf().double(), objective_named(name)
    ex = [dict(e, others=["a dog"]*(e["id"] % 2)) for e in examples(dual)]
    batch = (collate_group if name in ("tsvlc", "dac", "gnm-clip") else collate_negatives)(dual, ex)
    loss, direct = gradients(dual, objective, batch)
    same, cached = gradients(dual, Cached(objective, 3), batch)
    torch.testing.assert_close(loss, same)
    for n in direct: torch.testing.assert_close(cached[n], direct[n], rtol=1e-7, atol=1e-10)
    half = collate_negatives(dual.to(torch.bfloat16), examples(dual))
    loss, grads = gradients(dual, objective_named(name), half)
    assert loss.isfinite() and all(g.isfinite().all() for g in grads.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["full", "lora", "text_only"])
def test_methods_on_families(family, method, tmp_path):
    dual = FAMILIES[family]()
    names, before, flags = dual.state_dict().keys(), copy.deepcopy(dual.state_dict()), [p.requires_grad for p in dual.parameters()]
    ids = dual.tokenize([e["caption"] for e in examples(dual)])
    pixels = dual.preprocess([e["image"] for e in examples(dual)][:2])
    with torch.no_grad(): v, u = dual.image(pixels).vector, dual.text(**ids).vector
    tuned = attach(dual, method)
    with torch.no_grad():  # the same model before the first step
        torch.testing.assert_close(tuned.image(pixels).vector, v, rtol=0, atol=1e-6); torch.testing.assert_close(tuned.text(**ids).vector, u, rtol=0, atol=1e-6)
    if method == "text_only": assert all(side_of(n.removeprefix("captioner.")) == "text" for n in tuned.train_state())
    torch.manual_seed(2)
    with torch.no_grad(): [p.add_(.1*torch.randn_like(p)) for p in tuned.parameters()]
    with torch.no_grad(): moved = tuned.text(**ids).vector
    assert not torch.allclose(moved, u)
    tuned.save(tmp_path/"t"); tuned.scale(.4)
    with torch.no_grad(): part = tuned.text(**ids).vector; tuned.scale(1); torch.testing.assert_close(tuned.text(**ids).vector, moved)
    with tuned.off(), torch.no_grad(): torch.testing.assert_close(tuned.text(**ids).vector, u, rtol=0, atol=1e-6)
    curve = alpha_sweep(tuned, lambda t: dict(x=t.text(**ids).vector.sum().item()), (0, .4, 1))
    assert curve.alphas == [0, .4, 1] and tuned.alpha == 1
    tuned.detach()
    assert dual.state_dict().keys() == names and all(torch.equal(p, before[n]) for n, p in dual.state_dict().items())
    assert sum(p.requires_grad for p in dual.parameters()) == sum(flags)
    again = attach(dual, method).load(tmp_path/"t")
    with torch.no_grad(): torch.testing.assert_close(again.text(**ids).vector, moved)
    plain = again.scale(.4).merge()
    with torch.no_grad(): torch.testing.assert_close(plain.text(**ids).vector, part)
    assert plain is dual and dual.tuned_by is None and dual.state_dict().keys() == names


@pytest.mark.parametrize("family", ["clip", "open_clip", "custom"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_saved_checkpoints_are_ordinary(family, method, tmp_path):
    dual = FAMILIES[family]()
    data = examples(dual)
    tuned, _ = finetune(dual, data, method=method, config=recipe(method, len(data), steps=2, batch_size=9, lr=1e-2), chunk=4)
    ids = dual.tokenize([e["caption"] for e in data])
    with torch.no_grad(): want = tuned.text(**ids).vector
    tuned.merge().save(tmp_path/"m")
    again = load_dual_encoder(tmp_path/"m")
    assert all(torch.equal(p, again.state_dict()[n]) for n, p in dual.state_dict().items())
    with torch.no_grad(): torch.testing.assert_close(again.text(**ids).vector, want)
    if family != "clip":  # without capnb: open_clip itself
        from safetensors.torch import load_file
        saved = json.loads((tmp_path/"m"/"open_clip_config.json").read_text())["model_cfg"]
        own = build_open_clip(saved)
        own.load_state_dict(load_file(tmp_path/"m"/"open_clip_model.safetensors"))
        with torch.no_grad(): torch.testing.assert_close(own.encode_text(ids["ids"] if ids["ids"].shape[1] == 77 else torch.nn.functional.pad(ids["ids"], (0, 77 - ids["ids"].shape[1]))), want, rtol=1e-4, atol=1e-5)
    else:
        from transformers import CLIPModel
        torch.testing.assert_close(CLIPModel.from_pretrained(tmp_path/"m").state_dict(), dual.model.state_dict())


def test_lora_learns_and_leaves_scale_and_projections():
    dual, before = clip_hf(), clip_hf().state_dict()
    data = examples(dual, 12)
    tuned, done = finetune(dual, data, method="lora", config=recipe("lora", 12, steps=12, batch_size=12, lr=2e-2), r=2)
    assert done.history[-1]["loss"] < done.history[0]["loss"]
    merged = tuned.merge().state_dict()
    assert all(torch.equal(merged[n], before[n]) for n in before if "projection" in n or "logit_scale" in n or n.endswith("bias") or "norm" in n or "embedding" in n and "patch" not in n)
    assert any(not torch.equal(merged[n], before[n]) for n in before if "q_proj" in n) and not torch.equal(merged["model.vision_model.embeddings.patch_embedding.weight"], before["model.vision_model.embeddings.patch_embedding.weight"])


def test_interrupted_run_goes_on_to_the_same_weights(tmp_path):
    dual = clip_hf()
    data = examples(dual, 12)
    settings = dict(steps=8, batch_size=6, lr=1e-3, seed=3, checkpoint_every=2)
    whole, _ = finetune(clip_hf(), data, method="full", config=recipe("full", 12, **settings))
    from capnb.train.loop import Interrupted, stop_training
    seen = []
    class Stops(FSCClip):
        def __call__(self, model, batch):
            seen.append(1)
            if len(seen) == 4: stop_training()
            return super().__call__(model, batch)
    with pytest.raises(Interrupted): finetune(dual, data, Stops(), config=recipe("full", 12, out=str(tmp_path/"r"), **settings))
    assert dual.tuned_by is None and all(torch.equal(a, b) for a, b in zip(dual.parameters(), clip_hf().parameters()))  # the base is whole
    again, done = finetune(clip_hf(), data, FSCClip(), config=recipe("full", 12, out=str(tmp_path/"r"), **settings))
    assert done.resumed == 4 and done.steps == 8
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters()))


def test_scale_stays_within_its_limits():
    for start, lr in ((4.7, 1e-3), (0.01, .5)):
        dual = clip_hf()
        with torch.no_grad(): dual.log_scale.fill_(start)
        seen = []
        class Looks(FSCClip):
            def of(self, image, text, owner, scale): seen.append(scale.item()); return super().of(image, text, owner, scale)
        tuned, _ = finetune(dual, examples(dual), Looks(), config=recipe(n=9, steps=4, batch_size=9, lr=lr, warmup=0))
        assert all(1 - 1e-5 <= s <= 100.01 for s in [*seen, tuned.logit_scale.item()]), seen


def test_a_loop_of_your_own():
    """Fifteen lines: hard negatives in an ordinary open_clip training loop."""
    from capnb.fsc_clip import FSCClip, collate_negatives
    from capnb.models.dual import OpenClipDual
    model = open_clip().model.train()
    data = examples(open_clip(), 6)
    # the example begins
    dual, objective = OpenClipDual(model), FSCClip()
    decays = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([dict(params=decays, weight_decay=.1), dict(params=others, weight_decay=0.)], lr=1e-3, betas=(.9, .98), eps=1e-6)
    losses = []
    for step in range(8):
        batch = collate_negatives(dual, data)
        loss, log = objective(dual, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        dual.clamp_scale()
        losses.append(loss.item())
    # the example ends
    assert losses[-1] < losses[0] and model.state_dict().keys() == open_clip().model.state_dict().keys()


def test_weights_decay_only_where_they_should():
    from capnb.train.config import make_optimizer
    for make in FAMILIES.values():
        dual = make()
        tuned = attach(dual, "full")
        groups = make_optimizer(tuned.parameters(), recipe()).param_groups
        assert all(p.ndim >= 2 for p in groups[0]["params"]) and all(p.ndim < 2 for p in groups[1]["params"])
        assert all(g["eps"] == 1e-6 and g["betas"] == (.9, .98) for g in groups) and groups[1]["weight_decay"] == 0
        tuned.detach()


def test_people_get_errors(tmp_path):
    dual = clip_hf()
    for f, said in ((lambda: attach(dual, "loraa"), "lora"), (lambda: attach(dual, "lora", r=0), "rank"), (lambda: attach(dual, "lora", rank=4), "no setting"),
                    (lambda: Negated(dual, [], {}), "no captioned image"), (lambda: Negated(dual, Scenes(n=1), {}, variants=True) and objective_named("nothing"), "nothing"),
                    (lambda: attach(dual, "full").load(tmp_path), "no saved method")):
        with pytest.raises(CapnbError, match=said): f()
        if getattr(dual, "tuned_by", None): dual.tuned_by = None
    from PIL import Image
    from capnb.data.records import Record
    with pytest.raises(CapnbError, match="drawn anew"): Negated(dual, [Record(0, Image.new("RGB", (8, 8)), ["a dog"])], {}, variants=True)[0]


def command(*more, env=None): return [sys.executable, "-c", "import sys, argparse\nfrom capnb.study.clip_finetune import clip_finetune_command\nfrom capnb.core.errors import CapnbError\np = argparse.ArgumentParser(); f = clip_finetune_command(p)\ntry: f(p.parse_args(sys.argv[1:]))\nexcept KeyboardInterrupt: sys.exit(130)\nexcept CapnbError as e: print(e, file=sys.stderr); sys.exit(2)", *map(str, more)]


def test_command_on_a_folder_of_ones_own(tmp_path):
    records = Scenes("source", 24, split="own")
    rows = {"images": [], "annotations": []}
    (tmp_path/"images").mkdir()
    for i, r in enumerate(records):
        r.load_image().save(tmp_path/"images"/f"{i}.png")
        rows["images"].append(dict(id=i, file_name=f"{i}.png"))
        rows["annotations"] += [dict(id=10*i + k, image_id=i, caption=c) for k, c in enumerate(r.captions[:2])]
    (tmp_path/"captions.json").write_text(json.dumps(rows))
    (tmp_path/"neg.json").write_text(json.dumps({a["caption"]: [" ".join(reversed(a["caption"].split()))] for a in rows["annotations"]}))
    args = ["--data", f"coco:{tmp_path/'captions.json'}:{tmp_path/'images'}", "--negatives", tmp_path/"neg.json", "--out", tmp_path/"out", *"--steps 2 --batch-size 8 --chunk 16 --alphas 0 1 --method lora".split()]
    ran = subprocess.run(command(*args), capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert ran.returncode == 0, ran.stderr
    assert "checkpoint" in ran.stdout and "retrieval" in ran.stdout and (tmp_path/"out"/"forgetting.html").stat().st_size > 1000
    assert load_dual_encoder(tmp_path/"out"/"model").model.state_dict().keys() == load_dual_encoder("clip-tiny").model.state_dict().keys()
    ran = subprocess.run(command(*args, "--lr", ".1"), capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert ran.returncode == 2 and "another run" in ran.stderr and "Traceback" not in ran.stderr
