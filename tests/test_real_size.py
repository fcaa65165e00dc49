"""What a method needs at any size, by formula and as it is; the command of the true setting, broken off and continued; two processes of accelerate."""
import argparse, json, os, subprocess, sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
import torch
from conftest import ROOT, python_env

WORDS = "describe the image in one sentence : . , ? a red blue small big cat dog bird boat is on of and yes no".split()
SAID = "a red dog on a big boat and a small blue cat"


def toy(seed=0, dtype=torch.float32, **shape):
    "A LLaVA with random weights."
    from capnb.models.llava import LlavaCaptioner, build_llava, word_tokenizer
    torch.manual_seed(seed)
    return LlavaCaptioner(*build_llava(word_tokenizer(WORDS), **{**dict(image_size=32, patch=8, width=32, layers=2, vision_layers=2), **shape})).to(dtype)


def examples(n, size=32):
    from PIL import Image
    return [{"id": f"im{i}", "image": Image.new("RGB", (size, size), (40 * i % 256, 90, 20 * i % 256)), "caption": "a red dog" + i % 3 * " on the bird"} for i in range(n)]


def job(out, method):
    "Train `method` for five steps of six examples; run by accelerate in each process."
    from capnb.train.config import TrainConfig
    from capnb.train.loop import train
    from capnb.train.objective import caption_loss
    from capnb.tune.methods import attach
    torch.set_num_threads(1)
    tuned = attach(toy(), method)
    done = train(tuned, examples(12), caption_loss, TrainConfig(steps=5, batch_size=6, lr=.05, optimizer="sgd", seed=3))
    if os.environ.get("RANK", "0") == "0":
        torch.save({"weights": tuned.train_state(), "losses": [h["loss"] for h in done.history], "processes": torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1}, out)


if __name__ == "__main__":
    job(*sys.argv[1:])
    sys.exit()


# ---- accelerate

@pytest.mark.slow
def test_accelerate_launch_with_two_processes(tmp_path):
    "`accelerate launch` on two CPU processes gives LoRA the weights that one process gives it."
    def launch(n):
        out = tmp_path / f"{n}.pt"
        cmd = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", str(n), "--mixed_precision", "no", "--dynamo_backend", "no",
               "--main_process_port", "0", __file__, str(out), "lora"]  # with --cpu accelerate starts one process, whatever the number
        r = subprocess.run(cmd, env=dict(python_env(ROOT), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""), capture_output=True, text=True, timeout=300)
        assert r.returncode == 0, r.stdout[-2000:] + r.stderr[-4000:]
        return torch.load(out)
    two = launch(2)
    job(tmp_path / "1.pt", "lora")
    one = torch.load(tmp_path / "1.pt")
    assert (one["processes"], two["processes"]) == (1, 2) and one["weights"].keys() == two["weights"].keys() and len(one["weights"]) == 8
    assert max((one["weights"][k] - two["weights"][k]).abs().max().item() for k in one["weights"]) < 1e-5
    assert max(abs(a - b) for a, b in zip(one["losses"], two["losses"])) < 1e-5 and one["losses"][0] > one["losses"][-1]
    assert all(v.abs().max() > 0 for k, v in one["weights"].items() if "lora_B" in k)  # something was learned


# ---- memory

SHAPES = [dict(width=48, layers=3, heads=4), dict(width=64, layers=2, heads=8, image_size=48)]


def parts(method, shape, dtype, batch=3, optimizer="sgd"):
    "What is there, and what the formula says."
    from capnb.personalize.real_cost import expected_memory, size_of, step_cost
    from capnb.tune.methods import attach
    c = toy(dtype=dtype, **shape)
    size = size_of(c.model, c.visual_tokens)
    try: tuned = attach(c, method, **({"r": 16} if method == "adapter" else {"r": 8} if "ora" in method else {"n": 10} if method == "prefix" else {}))
    except ModuleNotFoundError: pytest.skip(f"{method} is not there")
    side = shape.get("image_size", 32)
    rows = [dict(e, caption=SAID) for e in examples(batch, side)]
    words = tuned.collate(rows)["input_ids"].shape[1] - size.see
    now = step_cost(tuned, rows, optimizer, steps=1)
    n = len(tuned.captioner.virtual.P) if method == "prompt" else 0
    return now, expected_memory(size, method, batch, {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype], optimizer, prompt=words - 12, caption=12), size, tuned, n


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", ["prompt", "prefix", "lora", "dora", "adapter", "full"])
def test_formula_against_what_is_there(method, dtype):
    "Weights, learned values, gradients and optimiser to the byte; activations within a quarter."
    from capnb.personalize.real_cost import trained_values
    optimizer = {"lora": "adamw", "full": "momentum"}.get(method, "sgd")
    for shape in SHAPES:
        now, want, size, tuned, n = parts(method, shape, dtype, optimizer=optimizer)
        learned = trained_values(size, method, **({"n": n} if n else {})) * (dtype.itemsize if method == "full" else 4)
        assert sum(p.numel() * p.element_size() for p in tuned.parameters()) == learned
        assert now["parts"]["weights"] == want["weights"] and now["parts"]["learned"] == now["parts"]["gradients"] == learned
        assert now["parts"]["optimizer"] == {"sgd": 0, "momentum": 1, "adamw": 2}[optimizer] * learned
        ratio = now["parts"]["activations"] / want["activations"]
        assert .75 < ratio < 1.25, (method, shape, ratio)
        assert now["bytes"] == sum(now["parts"].values())


def test_checkpointing_keeps_the_inputs_of_layers():
    "Less than a third is kept on three layers, no less than the formula's inputs, and the gradient is the same."
    from capnb.personalize.real_cost import saved_bytes
    from capnb.tune.methods import attach
    grads, kept = [], []
    for on in (False, True):
        tuned = attach(toy(width=48, layers=3), "lora")
        with torch.no_grad():
            for p in tuned.parameters(): p.fill_(.01)
        tuned.train()
        if on: tuned.captioner.model.gradient_checkpointing_enable(dict(use_reentrant=False))
        loss, n = saved_bytes(lambda: tuned(tuned.collate(examples(3))).loss, tuned)
        loss.backward()
        kept.append(n); grads.append([p.grad for p in tuned.parameters()])
    torch.testing.assert_close(*grads)
    assert kept[1] < kept[0] / 3


# ---- the command

@pytest.fixture
def setting(tmp_path):
    "A base in a folder, a Karpathy file and a second set."
    from capnb.data.scenes import Scenes
    toy().save(tmp_path / "base")
    (tmp_path / "images").mkdir()
    entries = []
    for i, r in enumerate(Scenes("source", 10)):
        r.load_image().save(tmp_path / f"images/{i}.png")
        entries.append(dict(filename=f"{i}.png", cocoid=i, split=["train", "restval", "test"][0 if i < 4 else 1 if i < 6 else 2], sentences=[dict(raw="a red dog on a boat", sentid=i)]))
    (tmp_path / "k.json").write_text(json.dumps(dict(images=entries)))
    return lambda out: ["--base", str(tmp_path / "base"), "--data", f"karpathy:{tmp_path}/k.json:{tmp_path}/images", "--sets", "near=scenes:near,n=4", "--methods", "zero_shot", "lora", "full",
                        "--seeds", "2", "--epochs", "2", "--batch", "2", "--lr", "lora=0.5", "full=0.1", "--metrics", "bleu", "cider_d", "--max-new-tokens", "5", "--out", str(tmp_path / out)]


def test_the_command_goes_on(setting, tmp_path, monkeypatch, capsys):
    "Broken off while it captions, it ends with the numbers of a run that nobody disturbed; a third call does nothing."
    from capnb.core.files import read_json
    from capnb.personalize import real_size
    numbers = lambda files: {f.name: read_json(f)["train_info"]["metrics"] for f in files}
    whole = numbers(real_size.main(setting("whole")))
    assert len(whole) == 5 and all("near CIDEr-D" in m[-1] and "test BLEU-4" in m[-1] for m in whole.values())
    left, old = [9], real_size.append_line

    def stop(path, line):
        left[0] -= 1
        if not left[0]: raise KeyboardInterrupt
        old(path, line)
    monkeypatch.setattr(real_size, "append_line", stop)
    with pytest.raises(KeyboardInterrupt): real_size.main(setting("broken"))
    monkeypatch.setattr(real_size, "append_line", old)
    files = real_size.main(setting("broken"))
    assert numbers(files) == whole
    monkeypatch.setattr(real_size, "_one_run", None)
    assert real_size.main(setting("broken")) == files
    trained = [read_json(f) for f in files if "lora" in f.name]
    assert {r["run_info"]["train_config"]["seed"] for r in trained} == {0, 1} and all(r["run_info"]["train_config"]["max_steps"] == 6 for r in trained)  # 6 pairs, 2 epochs


@pytest.mark.parametrize("wrong,words", [(["--sets", "nocaps"], "NAME=VALUE"), (["--methods", "lorra"], "lora"), (["--base", "no/such/folder"], "no/such")])
def test_wrong_arguments_are_said(wrong, words, setting, tmp_path):
    from capnb.core.errors import CapnbError
    from capnb.personalize.real_size import main
    with pytest.raises(CapnbError, match=words): main(setting("x") + wrong)


def test_out_of_memory_is_written_down(tmp_path, monkeypatch):
    "What does not fit is stored as such, the captioner is free again, and the next is measured."
    from capnb.core.errors import ConfigError
    from capnb.personalize import real_size
    old, made = real_size.step_cost, []

    def cost(tuned, rows, *a):
        if tuned.method == "full" and len(rows) > 1: raise torch.OutOfMemoryError("too much")
        return old(tuned, rows, *a)
    monkeypatch.setattr(real_size, "step_cost", cost)

    def make(): made.append(1); return toy()
    kw = dict(batches=(1, 2), picture=32, steps=1)
    found = real_size.measure_methods(make, tmp_path / "m.json", methods=("full", "lora"), **kw)["methods"]
    assert found["full"]["2"] is None and found["full"]["1"]["bytes"] > found["lora"]["1"]["bytes"] and found["lora"]["2"]["images_per_second"] > 0 and len(made) == 1
    assert real_size.measure_methods(make, tmp_path / "m.json", methods=("full", "lora"), **kw)["methods"] == json.loads((tmp_path / "m.json").read_text())["methods"] and len(made) == 1
    with pytest.raises(ConfigError, match="other settings"): real_size.measure_methods(make, tmp_path / "m.json", optimizer="adamw", **kw)
