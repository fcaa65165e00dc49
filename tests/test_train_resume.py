"""Training is killed at many places and must end with the very same weights.

A server process imports torch once and forks a child for each job; a job trains a toy whose data is augmented at random, with dropout,
accumulation, validation and early stopping, and kills itself with SIGKILL where it is told to."""
import hashlib, json, os, random, signal, subprocess, sys, time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


# ---- the job, run in a child process

def toy(dropout=0.2):
    "Model, data, objective and validation."
    import numpy as np, torch
    from torch import nn
    import torch.nn.functional as F

    class Data(list):
        def __getitem__(self, i):  # all three generators take part in the augmentation
            e = super().__getitem__(i)
            return dict(e, x=e["x"] + dropout * (random.random() + np.random.rand() + torch.rand(()).item()))

    class Model(nn.Sequential):
        def collate(self, examples):
            return {"x": torch.stack([e["x"] for e in examples]), "y": torch.tensor([e["y"] for e in examples])}

    torch.manual_seed(3)
    data = Data({"id": f"im{i}", "x": x, "y": int(x.sum() > 0)} for i, x in enumerate(torch.randn(41, 6)))
    model = Model(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 2))

    def objective(model, batch):  # the weight differs from the number of examples
        counts = 1 + batch["y"].float()
        loss = (F.cross_entropy(model(batch["x"]), batch["y"], reduction="none") * counts).sum() / counts.sum()
        return loss, {"weight": counts.sum(), "share": batch["y"].float().mean()}

    def validate(model): return objective(model, model.collate(list(data)))[0]
    return model, data, objective, validate


def die(): os.kill(os.getpid(), signal.SIGKILL)


def kill_at(where, n, objective):
    "Arrange that this process is killed at the n-th passage of a place; returns the objective to use."
    import capnb.train.checkpoint as checkpoint, capnb.train.loop as loop
    left = [n]

    def now():
        left[0] -= 1
        return left[0] == 0

    def patch(module, name, before=None, after=None):
        old = getattr(module, name)

        def new(*a, **k):
            hit = now()
            if hit and before: before(*a); die()
            out = old(*a, **k)
            if hit: die()
            return out
        setattr(module, name, new)

    def half(path): Path(path).write_bytes(b"\x07" * 100)
    class Half:  # stands for a module, one of whose functions is patched
        def __init__(self, module): self.__dict__.update(vars(module))
    if where == "step":
        def wrapped(model, batch):
            if now(): die()
            return objective(model, batch)
        return wrapped
    if where == "weights torn": patch(checkpoint, "save_file", lambda w, path: half(path))
    if where == "state torn": checkpoint.torch = Half(checkpoint.torch); patch(checkpoint.torch, "save", lambda s, path: half(path))
    if where == "info torn": patch(checkpoint, "write_json", lambda path, o: half(path))
    if where == "files written": patch(checkpoint, "write_json")
    if where in ("rename before", "rename after"):
        checkpoint.os = Half(checkpoint.os); patch(checkpoint.os, "replace", (lambda *a: None) if where == "rename before" else None)
    if where == "half removed":
        def rm(path, **k):
            for f in list(Path(path).glob("*"))[:1]: f.unlink()
        checkpoint.shutil = Half(checkpoint.shutil); patch(checkpoint.shutil, "rmtree", rm)
    if where == "history torn":
        def torn(path, obj):
            with open(path, "a") as f: f.write(json.dumps(obj)[:9])
        patch(loop, "append_line", torn)
    return objective


def job(spec):
    "Train as told; what comes out is written to spec['answer']."
    import torch
    from capnb.train.config import TrainConfig
    from capnb.train.loop import train
    torch.set_num_threads(1)
    model, data, objective, validate = toy(spec.get("dropout", 0.2))
    if spec.get("kill"): objective = kill_at(*spec["kill"], objective)
    if spec.get("pause"):
        fast = objective
        def objective(model, batch): time.sleep(spec["pause"]); return fast(model, batch)
    config = TrainConfig(**spec["config"])
    done = train(model, data, objective, config, validate if config.eval_every else None)
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    answer = {"processes": processes, "digest": digest, "history": done.history, "ended": done.ended, "resumed": done.resumed, "best": done.best}
    if os.environ.get("RANK", "0") == "0":
        if spec.get("weights"): torch.save(model.state_dict(), spec["weights"])
        Path(spec["answer"]).write_text(json.dumps(answer))


def serve():
    "Fork a child per line of stdin, {'spec':, 'log':, 'kill_after':, 'signal_after':}; answers with the exit status."
    import torch, accelerate, safetensors.torch, capnb.train.loop  # noqa: F401
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])  # imports a good deal, once instead of in each child
    print("ready", flush=True)
    for line in sys.stdin:
        o = json.loads(line)
        pid = os.fork()
        if not pid:
            fd = os.open(o["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC); os.dup2(fd, 1); os.dup2(fd, 2)
            code = 1
            try: job(o["spec"]); code = 0
            except BaseException as e: print(f"{type(e).__name__}: {e}", file=sys.stderr)
            sys.stdout.flush(); sys.stderr.flush(); os._exit(code)
        if o.get("signal"):
            time.sleep(o["signal"][1])
            try: os.kill(pid, o["signal"][0])
            except ProcessLookupError: pass
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve": serve()
    else: job(json.loads(sys.argv[1]))
    sys.exit()


# ---- the tests

ENV = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", CAPNB_QUIET="1")
CONFIG = dict(epochs=6, batch_size=9, lr=0.02, warmup=0.1, accumulate=2, checkpoint_every=3, eval_every=7, patience=9)


class Server:
    def __init__(self):
        self.p = subprocess.Popen([sys.executable, __file__, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENV)
        assert self.p.stdout.readline() == "ready\n"

    def __call__(self, tmp, kill=None, signal=None, **spec):
        "Run a job; returns exit status, its answer (None: there is none) and what it printed."
        answer, log = tmp / "answer.json", tmp / "log.txt"
        answer.unlink(missing_ok=True)
        spec = {"config": CONFIG, **spec, "kill": kill, "answer": str(answer)}
        self.p.stdin.write(json.dumps({"spec": spec, "log": str(log), "signal": signal}) + "\n"); self.p.stdin.flush()
        status = int(self.p.stdout.readline())
        return status, json.loads(answer.read_text()) if answer.exists() else None, log.read_text()


@pytest.fixture(scope="module")
def server():
    s = Server()
    yield s
    s.p.kill(); s.p.wait()


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    "The answer of a run that nobody disturbed and that kept nothing."
    status, answer, log = server(tmp_path_factory.mktemp("whole"))
    assert status == 0, log
    assert answer["ended"] == "finished" and len(answer["history"]) == 30
    return answer


def same(answer, whole):
    assert answer["digest"] == whole["digest"]
    assert answer["history"] == whole["history"]


# a place in the code, and the passages of it at which to kill: first one or two of each place, and those for CAPNB_ALL=1
PLACES = {"step": ([1, 14, 60], [2, 7, 13, 36]), "weights torn": ([2], [1, 5]), "state torn": ([1], [4]), "info torn": ([2], [3]), "files written": ([2], [6]),
          "rename before": ([1, 4], [3, 5, 8]), "rename after": ([3], [1, 4, 5, 8]), "half removed": ([1], [2, 3]), "history torn": ([8], [1, 29])}
PLACES = [(where, n) for where, (some, more) in PLACES.items() for n in some + more * bool(os.environ.get("CAPNB_ALL"))]


@pytest.mark.parametrize("where,n", PLACES)
def test_killed_at(where, n, server, whole, tmp_path):
    config = dict(CONFIG, out=str(tmp_path / "run"))
    status, answer, log = server(tmp_path, kill=(where, n), config=config)
    assert status == -signal.SIGKILL and answer is None, log
    status, answer, log = server(tmp_path, config=config)
    assert status == 0, log
    same(answer, whole)
    left = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["step-000000028", "step-000000030"]


def test_killed_again_and_again(server, whole, tmp_path):
    "Every sitting is killed after a random time, until one gets through."
    config, chance = dict(CONFIG, out=str(tmp_path / "run"), checkpoint_every=1), random.Random(5)
    kills = 0
    for sitting in range(30):
        status, answer, log = server(tmp_path, config=config, pause=0.004, signal=(signal.SIGKILL, chance.uniform(0.02, 0.3)) if sitting < 10 else None)
        if status == 0: break
        assert status == -signal.SIGKILL, log
        kills += 1
    assert kills >= 2
    assert answer["digest"] == whole["digest"] and answer["history"] == whole["history"]


def test_loading_processes(server, whole, tmp_path):
    "Loading ahead in other processes changes nothing, neither does going on with another number of them."
    config = dict(CONFIG, out=str(tmp_path / "run"), num_workers=2)
    assert server(tmp_path, kill=("step", 40), config=config)[0] == -signal.SIGKILL
    status, answer, log = server(tmp_path, config=dict(config, num_workers=1))
    assert status == 0, log
    same(answer, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_politely(number, server, whole, tmp_path):
    config = dict(CONFIG, out=str(tmp_path / "run"), checkpoint_every=0)
    status, answer, log = server(tmp_path, config=config, pause=0.05, signal=(number, 1.0))
    assert status == 1 and answer is None
    assert "Interrupted: Training was stopped after step" in log and f"kept in {config['out']}: start it again with the same settings" in log
    status, answer, log = server(tmp_path, config=config)
    assert status == 0 and answer["resumed"] > 0, log
    same(answer, whole)


def test_early_stop_survives(server, tmp_path):
    "The best weights are there after a kill, too."
    config = dict(CONFIG, lr=2.0, steps=400, epochs=None, eval_every=4, patience=3)
    _, whole, _ = server(tmp_path, config=config)
    assert whole["ended"] == "early"
    steps = len(whole["history"])
    for n in (2 * steps - 1, 9):
        kept = dict(config, out=str(tmp_path / f"run{n}"))
        assert server(tmp_path, kill=("step", n), config=kept)[0] == -signal.SIGKILL
        status, answer, log = server(tmp_path, config=kept)
        assert status == 0, log
        same(answer, whole)
        assert answer["best"] == whole["best"]
    assert server(tmp_path, config=kept)[1]["digest"] == whole["digest"]  # once more: nothing to do, same model


@pytest.mark.parametrize("change,words", [({"lr": 0.03}, "config lr: 0.02 there, 0.03 now"), ({"batch_size": 8}, "config batch_size")])
def test_another_run_is_refused(change, words, server, tmp_path):
    config = dict(CONFIG, out=str(tmp_path / "run"), epochs=1)
    assert server(tmp_path, config=config)[0] == 0
    status, _, log = server(tmp_path, config=dict(config, **change))
    assert status == 1 and "ConfigError: The folder holds another run" in log and words in log and "resume=False" in log


def test_damaged_checkpoint_costs_steps_only(server, whole, tmp_path):
    config = dict(CONFIG, out=str(tmp_path / "run"))
    assert server(tmp_path, kill=("step", 40), config=config)[0] == -signal.SIGKILL
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    (newest / "weights.safetensors").write_bytes(b"")
    status, answer, log = server(tmp_path, config=config)
    assert status == 0, log
    same(answer, whole)


def test_full_disk_names_the_folder(tmp_path):
    "A write that fails is an error for people and leaves no half folder."
    from capnb.core.errors import CapnbError
    from capnb.train import checkpoint
    import torch
    def full(*a): raise OSError(28, "No space left on device")
    old, checkpoint.save_file = checkpoint.save_file, full
    try:
        with pytest.raises(CapnbError, match="disk is full"): checkpoint.save_checkpoint(tmp_path, 3, {"w": torch.zeros(2)}, {}, {})
    finally: checkpoint.save_file = old
    assert list((tmp_path / "checkpoints").iterdir()) == []


def launch(processes, spec):
    "Run the job by accelerate's launcher."
    cmd = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", str(processes),
           "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", __file__, json.dumps(spec)]  # with --cpu accelerate would start one process, whatever the number
    return subprocess.run(cmd, env=dict(ENV, CUDA_VISIBLE_DEVICES=""), capture_output=True, text=True, timeout=120)


def test_two_processes_equal_one(server, tmp_path):
    "Two processes started by `accelerate launch` learn what one learns with the same batches."
    import torch
    config = dict(CONFIG, epochs=3, accumulate=1, out=str(tmp_path / "two"))
    spec = dict(config=config, dropout=0.0, answer=str(tmp_path / "answer.json"), weights=str(tmp_path / "two.pt"))
    r = launch(2, spec)
    assert r.returncode == 0, r.stdout[-2000:] + r.stderr[-4000:]
    two = json.loads((tmp_path / "answer.json").read_text())
    status, one, log = server(tmp_path, config=dict(config, out=None), dropout=0.0, weights=str(tmp_path / "one.pt"))
    assert status == 0, log
    assert (one["processes"], two["processes"]) == (1, 2)
    a, b = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-6
    assert all(abs(x["loss"] - y["loss"]) < 1e-5 for x, y in zip(one["history"], two["history"])) and len(one["history"]) == len(two["history"]) == 15


@pytest.mark.parametrize("method", ["prompt", "lora", "full"])
def test_captioner_goes_on(method, tmp_path):
    "A tiny random LLaVA with a tuning method: broken off and continued, same weights; accumulation gives the whole batch's gradient."
    import torch
    from PIL import Image
    from capnb.models.llava import LlavaCaptioner, build_llava, word_tokenizer
    from capnb.train.config import TrainConfig
    from capnb.train.loop import train
    from capnb.train.objective import caption_loss
    from capnb.tune.methods import attach
    words = "describe the image in one sentence : . a red blue small cat dog bird is on of".split()
    data = [{"id": f"im{i}", "image": Image.new("RGB", (32, 32), (40 * i, 90, 20)), "caption": "a red dog" + i * " on the bird"} for i in range(6)]

    def tuned():
        torch.manual_seed(0)
        return attach(LlavaCaptioner(*build_llava(word_tokenizer(words), image_size=32, width=32, layers=2, vision_layers=2)), method)

    def learned(left=None, **config):
        torch.manual_seed(1)
        model, left = tuned(), iter(range(left)) if left is not None else None
        def objective(model, batch):
            if left is not None and next(left, None) is None: raise RuntimeError("lights out")
            return caption_loss(model, batch)
        c = TrainConfig(**dict(dict(steps=5, batch_size=3, checkpoint_every=2, clip=0.5), **config))
        try: train(model, data, objective, c)
        except RuntimeError as e: assert "lights out" in str(e)
        return [p.detach() for p in model.parameters()]
    whole, out = learned(), str(tmp_path)
    assert any((a != b).any() for a, b in zip(whole, learned(left=3, out=out)))
    assert all(torch.equal(a, b) for a, b in zip(whole, learned(out=out)))
    sgd = dict(optimizer="sgd", lr=0.1)
    torch.testing.assert_close(learned(**sgd), learned(accumulate=3, **sgd), atol=1e-5, rtol=1e-4)
