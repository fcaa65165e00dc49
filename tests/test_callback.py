"Caption evaluation inside transformers' Trainer and TRL's SFTTrainer. A tiny LLaVA with random weights; two processes are real ones."
import json, os, socket, subprocess, sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from capnb.core.errors import CapnbError, ConfigError, DataError, TrainingError
from capnb.data.records import Record
from capnb.models.llava import build_llava, word_tokenizer
from capnb.train.callback import CaptionEval, as_found, captioner_of, image_set

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
COLOURS = "red green blue yellow black white".split()
ASK = "USER: <image>\nDescribe the image. ASSISTANT:"


def records(say, n=6): return [Record(i, Image.new("RGB", (32, 32), COLOURS[i]), [say.format(COLOURS[i])]) for i in range(n)]


SOURCE, TARGET = records("a {} square ."), records("{} paint !")


def tiny(seed=0, dropout=.0):
    torch.manual_seed(seed)
    model, processor = build_llava(word_tokenizer("user assistant : . ! describe the image a square paint".split() + COLOURS), image_size=32, patch=16, width=32, layers=2, vision_layers=1)
    for layer in model.model.language_model.layers: layer.self_attn.attention_dropout = dropout
    return model, processor


def trainer(model, processor, folder, data=TARGET, callbacks=(), **args):
    from transformers import PrinterCallback, Trainer, TrainingArguments

    def collate(rows):
        enc = processor(images=[r.image for r in rows], text=[f"{ASK} {r.captions[0]} </s>" for r in rows], return_tensors="pt", padding=True)
        enc["labels"] = enc["input_ids"].masked_fill(enc["attention_mask"] == 0, -100)
        enc["labels"][:, :len(processor(images=rows[0].image, text=ASK)["input_ids"][0])] = -100
        return enc

    args = dict(max_steps=4, per_device_train_batch_size=3, learning_rate=5e-3, save_strategy="no", logging_strategy="no", seed=5) | args
    args = TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False, **args)
    t = Trainer(model, args, data_collator=collate, train_dataset=data, eval_dataset=data, processing_class=processor, callbacks=list(callbacks))
    t.remove_callback(PrinterCallback)
    return t


def lora(model, **more):
    from peft import LoraConfig, get_peft_model
    return get_peft_model(model, LoraConfig(target_modules=r".*language_model.*[qv]_proj", lora_dropout=.2, task_type="CAUSAL_LM", **more))


def state(model): return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- leaving no trace

@pytest.mark.parametrize("wrap,args", [(None, {}), (lora, {}), (None, dict(gradient_checkpointing=True)), (lora, dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=False))), (None, dict(gradient_accumulation_steps=2))],
    ids=["full", "lora", "checkpointing", "lora-checkpointing", "accumulation"])
def test_training_is_the_same(wrap, args, tmp_path):
    def run(*callbacks):
        model, processor = tiny(1, dropout=.3)
        model.config.use_cache = False
        model = wrap(model) if wrap else model
        if wrap: torch.manual_seed(2); [torch.nn.init.normal_(p, std=.1) for n, p in model.named_parameters() if "lora" in n]
        start = state(model)
        trainer(model, processor, tmp_path, callbacks=callbacks, **args).train()
        assert model.config.use_cache is False
        return start, state(model)
    start, plain = run()
    watch = CaptionEval(TARGET, kept={"source": SOURCE}, every=1, max_new_tokens=4)
    assert same(plain, run(watch)[1]) and not same(start, plain)
    assert [r["step"] for r in watch.table] == [0, 1, 2, 3, 4]
    if wrap: assert watch.table[0]["eval_source_forgetting"] != 0  # the base is the model without the adapter, whose B is not 0 here


def test_modes_and_flags_come_back():
    model = lora(tiny()[0]).train()
    model.base_model.model.model.vision_tower.eval()
    for n, p in model.named_parameters():
        if "lora_A" in n: p.requires_grad_(False)
    modes, flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    with pytest.raises(ZeroDivisionError), as_found(model):
        with model.disable_adapter(): pass
        assert not any(m.training for m in model.modules())
        1 / 0
    assert modes == [m.training for m in model.modules()] and flags == [p.requires_grad for p in model.parameters()]
    assert True in modes and False in modes and True in flags


# ---- adapters of peft

def test_learned_vectors_are_seen_as_peft_sees_them():
    from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
    for config in (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=16)):
        model, processor = tiny()
        bare = captioner_of(model, processor).caption(SOURCE, max_new_tokens=5)
        soft = get_peft_model(model, config)
        torch.manual_seed(4); torch.nn.init.normal_(next(p for n, p in soft.named_parameters() if "prompt_encoder" in n), std=3.)
        soft.eval()
        c = captioner_of(soft, processor)
        said = c.caption(SOURCE, max_new_tokens=5)
        enc = processor(images=SOURCE[0].image, text=ASK, return_tensors="pt")
        rows = torch.cat([enc["input_ids"], torch.tensor([c.caption_ids("a red square .")])], 1)
        labels = rows.clone(); labels[:, :enc["input_ids"].shape[1]] = -100
        with torch.no_grad(): loss = soft(input_ids=rows, attention_mask=torch.ones_like(rows), pixel_values=enc["pixel_values"], labels=labels).loss.item()
        total, n = c.log_prob(SOURCE[:1], ["a red square ."])
        assert -total.item() / n.item() == pytest.approx(loss, abs=1e-4) and said != bare
    with pytest.raises(ConfigError, match="PREFIX"): captioner_of(get_peft_model(tiny()[0], PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, num_layers=2, token_dim=32, num_attention_heads=4)), tiny()[1])
    with pytest.raises(ConfigError, match="processor"): captioner_of(model, tiny()[1].tokenizer)


def test_prompt_tuning_is_watched(tmp_path):
    from peft import PromptTuningConfig, get_peft_model
    model, processor = tiny()
    soft = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    watch = CaptionEval(TARGET, kept={"source": SOURCE}, max_new_tokens=4)
    trainer(soft, processor, tmp_path, callbacks=[watch], learning_rate=.3, max_steps=6, eval_strategy="steps", eval_steps=3).train()
    assert [r["step"] for r in watch.table] == [0, 3, 6] and watch.captioner.virtual.n == 3
    assert len({r["eval_source_own_log_prob"] for r in watch.table}) == 3


# ---- the trainer's own mechanisms

def test_best_weights_are_chosen_by_captions(tmp_path):
    from transformers import EarlyStoppingCallback
    model, processor = tiny()
    model = lora(model, r=16, lora_alpha=64, modules_to_save=["lm_head"])  # of a whole LLaVA, transformers 5.23 stores names that its Trainer then does not find again
    watch = CaptionEval(TARGET, max_new_tokens=4)
    t = trainer(model, processor, tmp_path, callbacks=[watch, EarlyStoppingCallback(2)], max_steps=40, learning_rate=2e-2, eval_strategy="steps", eval_steps=5, save_strategy="steps", save_steps=5, save_total_limit=1,
        load_best_model_at_end=True, metric_for_best_model="target_CIDEr-D")
    t.train()
    values = {r["step"]: r["eval_target_CIDEr-D"] for r in watch.table if r["step"]}
    assert t.args.greater_is_better and t.state.best_metric == max(values.values()) > 0
    assert values[t.state.best_global_step] == max(values.values())
    logged = {h["step"]: h["eval_target_CIDEr-D"] for h in t.state.log_history if "eval_target_CIDEr-D" in h}
    assert {k: v for k, v in logged.items() if k} == values
    assert t.evaluate()["eval_target_CIDEr-D"] == pytest.approx(t.state.best_metric)  # the weights have been put back: measured anew
    json.dumps(t.state.log_history, allow_nan=False)


@pytest.mark.parametrize("wrap", [None, lora], ids=["full", "lora"])
def test_resumed_training_knows_the_base(wrap, tmp_path):
    def run(folder, resume=None, steps=4, **more):
        model, processor = tiny()
        model = wrap(model) if wrap else model
        watch = CaptionEval(TARGET, kept={"source": SOURCE}, max_new_tokens=4, **more)
        trainer(model, processor, folder, callbacks=[watch], max_steps=steps, lr_scheduler_type="constant", eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=2).train(resume_from_checkpoint=resume)
        return watch, state(model)
    whole, weights = run(tmp_path / "a")
    run(tmp_path / "b", steps=3)  # ended after step 3; the last checkpoint is that of step 2
    last = str(tmp_path / "b" / "checkpoint-2")
    again, new = run(tmp_path / "b", last)
    assert again.own == whole.own and [r["step"] for r in again.table] == [0, 1, 2, 3, 4] and again.table[:3] == whole.table[:3]
    if wrap: assert same(weights, new) and again.table == whole.table  # the whole LLaVA is not found again by transformers 5.23
    (tmp_path / "b" / "caption_eval.json").unlink()
    if wrap:  # the base is at hand when the adapter is off
        assert run(tmp_path / "b", last)[0].own == whole.own
        return
    with pytest.raises(ConfigError, match="source, step 2"): run(tmp_path / "b", last)
    given, _ = run(tmp_path / "b", last, own={"source": whole.own["source"]["captions"]})
    assert given.table[-1]["eval_source_own_log_prob"] == again.table[-1]["eval_source_own_log_prob"] and "eval_source_forgetting" not in given.table[-1]


def test_loggers_get_the_values(tmp_path):
    from transformers import TrainerCallback
    class Logger(TrainerCallback):
        seen = []
        def on_log(self, args, state, control, logs=None, **kw): self.seen.append(dict(logs))
    model, processor = tiny()
    watch = CaptionEval(TARGET, max_new_tokens=4, start=False)
    t = watch.add_to(trainer(model, processor, tmp_path, callbacks=[Logger()]))
    found = t.evaluate()
    assert any(l.get("eval_target_CIDEr-D") == found["eval_target_CIDEr-D"] for l in Logger.seen) and "eval_loss" in found


# ---- what cannot be

def test_refusals(tmp_path):
    model, processor = tiny()
    assert image_set((["x"] * 4, ["one", ["two", "three"]] * 2))[1] == [["one"], ["two", "three"]] * 2
    for bad in ([], ([1], []), [Record(0, None, [])], [Image.new("RGB", (4, 4))]):
        with pytest.raises(DataError): image_set(bad)
    for kw in (dict(kept={"target": SOURCE}), dict(every=0), dict(own={"source": ["a"]}), dict(kept={"source": SOURCE}, own={"source": ["a"]})):
        with pytest.raises(ConfigError): CaptionEval(TARGET, **kw)
    with torch.no_grad(): model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="step 0"): trainer(model, processor, tmp_path, callbacks=[CaptionEval(TARGET, kept={"source": SOURCE}, own={"source": ["a red square ."] * 6}, max_new_tokens=2)]).train()
    model, processor = tiny()
    model.lm_head.weight.ds_id = 7  # as DeepSpeed marks a weight that lives elsewhere
    with pytest.raises(ConfigError, match="lm_head"): trainer(model, processor, tmp_path, callbacks=[CaptionEval(TARGET)]).train()


def test_a_base_that_says_nothing(tmp_path):
    model, processor = tiny()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every logit 0: the first token, a pad, is written again and again
    watch = CaptionEval(TARGET, kept={"source": SOURCE}, max_new_tokens=3)
    with pytest.warns(UserWarning, match="source"): trainer(model, processor, tmp_path, callbacks=[watch], max_steps=1).train()
    assert watch.table[0]["eval_target_words"] == 0 and "eval_source_forgetting" not in watch.table[0]


# ---- several processes

def child(folder):
    "One of two processes: five images, so that one process has more than the other."
    model, processor = tiny(3)
    watch = CaptionEval(records("{} paint !", 5), kept={"source": records("a {} square .", 5)}, max_new_tokens=4, every=1)
    t = trainer(model, processor, folder, callbacks=[watch], max_steps=2, eval_strategy="steps", eval_steps=2, metric_for_best_model="target_CIDEr-D", save_strategy="best", ddp_find_unused_parameters=True)
    t.train()
    rank = int(os.environ["RANK"])
    error = ""
    if rank == 1: watch.captioner.caption = lambda *a, **k: 1 / 0
    try: t.evaluate()
    except CapnbError as e: error = str(e)
    out = dict(table=watch.table, own=watch.own, said=watch.captions, best=t.state.best_metric, error=error, weights=float(sum(p.double().sum() for p in model.parameters())))
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(out))


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path):
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    env = dict(os.environ, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]))
    work = [subprocess.Popen([sys.executable, __file__, str(tmp_path)], env=dict(env, RANK=str(r), LOCAL_RANK=str(r)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for r in range(2)]
    try: said = [w.communicate(timeout=240)[0] for w in work]
    finally: [w.kill() for w in work]
    assert not any(w.returncode for w in work), "\n".join(said)[-4000:]
    a, b = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2))
    assert a["table"] == b["table"] and a["own"] == b["own"] and a["weights"] == b["weights"] and a["best"] == b["best"] == a["table"][-1]["eval_target_CIDEr-D"]
    assert [r["step"] for r in a["table"]] == [0, 1, 2] and "process 1: ZeroDivisionError" in a["error"] and a["error"] == b["error"]
    model, processor = tiny(3)
    assert a["own"]["source"]["captions"] == captioner_of(model, processor).caption(SOURCE[:5], max_new_tokens=4)


# ---- TRL

@pytest.mark.parametrize("wrap", [None, lora], ids=["full", "lora"])
def test_sft_trainer(wrap, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from capnb.models.captioner import Template
    def run(*callbacks):
        model, processor = tiny(1, dropout=.3)
        ask = Template().jinja()
        processor.chat_template = ask.replace("{%- endfor -%}{{-", "{%- endfor -%}{{-", 1) + "{%- for m in messages if m['role'] == 'assistant' -%}{%- for c in m['content'] if c['type'] == 'text' -%}{{- ' ' + c['text'] + ' </s>' -}}{%- endfor -%}{%- endfor -%}"
        model = wrap(model) if wrap else model
        rows = [dict(images=[r.image], prompt=[dict(role="user", content="Describe the image.")], completion=[dict(role="assistant", content=r.captions[0])]) for r in TARGET]
        args = trl.SFTConfig(str(tmp_path), max_steps=4, per_device_train_batch_size=3, learning_rate=5e-3, save_strategy="no", use_cpu=True, report_to="none", disable_tqdm=True, bf16=False, seed=5, dataloader_pin_memory=False, max_length=None)
        t = trl.SFTTrainer(model, args, train_dataset=datasets.Dataset.from_list(rows), processing_class=processor, callbacks=list(callbacks))
        t.train()
        return t, state(t.model)
    _, plain = run()
    watch = CaptionEval(TARGET, kept={"source": SOURCE}, every=2, max_new_tokens=4, template=Template())
    t, seen = run(watch)
    assert same(plain, seen) and [r["step"] for r in watch.table] == [0, 2, 4]
    assert [h["step"] for h in t.state.log_history if "eval_target_CIDEr-D" in h] == [0, 2, 4]
    assert watch.table[-1]["eval_source_own_log_prob"] != watch.table[0]["eval_source_own_log_prob"]


if __name__ == "__main__": child(sys.argv[1])
