"Prompt sweep, remedies against forgetting and the alpha sweep under conditions that nobody wishes for."
import dataclasses, math, random
import numpy as np
import pytest
import torch
from PIL import Image
from capnb.core.errors import CapnbError, ConfigError, DataError, MetricError
from capnb.models.captioner import Template, fingerprint
from capnb.models.families import tiny_family
from capnb.models.llava import LlavaCaptioner, build_llava, word_tokenizer
from capnb.train.config import TrainConfig
from capnb.train.loop import Interrupted, stop_training, train
from capnb.train.mixing import CaptionLoss, Rehearsal, hold_back
from capnb.train.objective import caption_loss
from capnb.tune.adapters import load_adapter
from capnb.tune.alpha import AlphaCurve, alpha_sweep, front, hypervolume
from capnb.tune.methods import attach
from capnb.tune.prompt_sweep import PromptSweep
from capnb.tune.remedies import REMEDIES, Distil, L2SP, apply_remedies, base_scores, caption_scores, list_remedies, split_method

WORDS = "user assistant : . ? you see pictures describe the image in one sentence a red blue small cat dog is yes no".split()
PHOTOS = [Image.effect_mandelbrot((32, 32), (-2, -1.5, x, 1.5), 20).convert("RGB") for x in (.4, .9, 1.6, .2)]
pytestmark = pytest.mark.filterwarnings("ignore")


def toy(loud=3.):
    torch.manual_seed(0)
    model, processor = build_llava(word_tokenizer(WORDS), image_size=32, width=32, layers=2, vision_layers=1)
    with torch.no_grad():
        for p in model.parameters(): p.mul_(loud)
    return LlavaCaptioner(model, processor, Template("describe the image", "you see pictures."))


class Toy:
    "Examples with ids; two captions an image; keys as a careless caller chooses them, the same in every set."
    def __init__(self, n, words, shift=0.): self.n, self.words, self.shift, self.ids, self.seen = n, words, shift, [f"{i//2}#{i%2}" for i in range(n)], []
    def __len__(self): return self.n
    def __getitem__(self, i):
        if not 0 <= i < self.n: raise IndexError(i)
        self.seen.append(self.ids[i])
        photo = Image.effect_mandelbrot((32, 32), (-2, -1.5, .2 + self.shift + .1*(i//2), 1.5), 20).convert("RGB")
        return dict(id=self.ids[i], image=photo, key=f"train/{i//2}", caption=f"{self.words} {'cat' if i % 2 else 'dog'}")


def shaken(t, size=.2):
    torch.manual_seed(1)
    with torch.no_grad():
        for p in t.parameters(): p.add_(torch.randn_like(p)*size)
    return t


def weights(t): return [p.detach().clone() for p in t.parameters()]
def same(a, b): return len(a) == len(b) and all(map(torch.equal, a, b))


# ---- prompt sweep

SWEPT = ["a red cat", "is the dog small ?"]
REFERENCES = [["a red dog"], ["a cat"], ["yes"], ["no , a small dog"]]


@pytest.mark.parametrize("name", ["blip2", "idefics3", "paligemma", "blip", "vit_gpt2", "git", "qwen2_5_vl"])
def test_every_family_can_be_swept(name):
    c = tiny_family(name); own, before = c.template_, fingerprint(c.model)
    says = {p: c.caption(PHOTOS, p, max_new_tokens=8) for p in [own.instruction, *SWEPT]}
    for wanted in says:
        t = PromptSweep(c, prompts=SWEPT)
        log = t.fit(PHOTOS, [[s or "yes"] for s in says[wanted]], max_new_tokens=8)
        assert log["value"] == max(log["table"].values()) >= log["own"] and set(log["table"]) == set(says)
        assert t.caption(PHOTOS, max_new_tokens=8) == says[log["chosen"]]
        if len({tuple(s) for s in says.values()}) == len(says) and all(says[wanted]): assert log["chosen"] == wanted
        with t.off(): assert t.caption(PHOTOS, max_new_tokens=8) == says[own.instruction]
        assert t.detach().template_ is own and fingerprint(c.model) == before and c.caption(PHOTOS, max_new_tokens=8) == says[own.instruction]


def test_whoever_is_not_asked_says_so():
    c = tiny_family("blip"); c.template_ = Template("", "", "{instruction}")
    t = PromptSweep(c); log = t.fit(PHOTOS, REFERENCES, max_new_tokens=5)
    assert log["note"] and len(log["table"]) == 1 and log["chosen"] == ""
    t.detach(); c.template_ = Template("unheard", "", "<s>")  # words have no place in this form
    assert PromptSweep(c).candidates().keys() == {"unheard"}


def test_sweep_wins_over_the_instruction_of_a_study():
    c = toy(); first = c.template_
    says = c.caption(PHOTOS, SWEPT[0], max_new_tokens=40)
    c.template_ = dataclasses.replace(c.template_, instruction="one sentence ?")  # what run_study does with plan.prompt
    t = PromptSweep(c, prompts=SWEPT)
    assert t.fit(PHOTOS, dict(zip("abcd", says)))["chosen"] == SWEPT[0]  # references as a dict, and as plain strings
    assert t.caption(PHOTOS, max_new_tokens=40) == says and c.template(None) == c.template(SWEPT[0])
    t.detach(); assert c.template_.instruction == "one sentence ?" and first.instruction == "describe the image"


def test_interrupted_sweep_leaves_no_trace(monkeypatch):
    c = toy(); own, calls = c.template_, []
    t = PromptSweep(c, prompts=SWEPT)
    def caption(*a, **kw):
        calls.append(c.template_.instruction)
        if len(calls) == 2: raise KeyboardInterrupt
        return ["a cat"]*4
    monkeypatch.setattr(c, "caption", caption)
    with pytest.raises(KeyboardInterrupt): t.fit(PHOTOS, REFERENCES)
    assert calls == ["describe the image", SWEPT[0]] and c.template_ == own and t.config["instruction"] is None
    monkeypatch.undo()
    monkeypatch.setattr(c, "caption", lambda *a, **kw: ["a red dog"]*4)  # all alike: a tie, the own words stay
    assert t.fit(PHOTOS, REFERENCES)["chosen"] == own.instruction and t.config["instruction"] is None


def test_bad_sweeps_are_refused():
    t = PromptSweep(toy(), prompts=SWEPT)
    for images, references in (([], []), (PHOTOS, REFERENCES[:1])):
        with pytest.raises(DataError, match="images and"): t.fit(images, references)
    with pytest.raises(CapnbError): t.fit(PHOTOS, REFERENCES, metric="ciderrr")
    assert t.captioner.template_ == t.own and t.fit(PHOTOS, REFERENCES, n=99, metric="rouge_l", max_new_tokens=8)["metric"] == "rouge_l"
    for alpha in (.5, 2, -1):
        with pytest.raises(ConfigError, match="0 or 1"): t.scale(alpha)


def test_a_swept_folder_is_an_adapter(tmp_path):
    c = toy(); says = c.caption(PHOTOS, SWEPT[1], max_new_tokens=8)
    t = attach(c, "prompt-sweep", prompts=SWEPT); t.fit(PHOTOS, [[s] for s in c.caption(PHOTOS, SWEPT[1], max_new_tokens=40)])
    t.scale(0).save(tmp_path); t.detach()
    t = load_adapter(c, tmp_path)
    assert t.method == "prompt_sweep" and t.alpha == 0 and t.scale(1).caption(PHOTOS, max_new_tokens=8) == says


# ---- remedies

@pytest.mark.parametrize("name", ["llava", "blip2", "idefics3", "blip", "git", "vit_gpt2"])
def test_the_teacher_is_the_base_on_every_family(name):
    c = tiny_family(name)
    examples = [dict(id=i, image=p, caption=s[0]) for i, (p, s) in enumerate(zip(PHOTOS, REFERENCES))]
    batch = c.collate(examples)
    with torch.no_grad(): expected = caption_scores(c(batch), batch["labels"])
    for method, kw in (("full", dict(vision=True)), ("lora", dict(r=2)), ("prompt", dict(n=3, place="start"))):
        t = shaken(attach(c, method, **kw)); t.eval()
        own = t.collate(examples)
        d = Distil(caption_loss, t, 1., data=examples)
        loss, log = d(t, own)
        with torch.no_grad(): kl = torch.nn.functional.kl_div(caption_scores(t(own), own["labels"]).log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="sum")/len(expected)
        assert torch.allclose(log["distil"], kl, rtol=1e-3, atol=1e-4) and log["distil"] > 1e-5, (method, log, kl)
        t.train()  # dropout is for the pupil alone
        if method != "prompt": assert torch.allclose(base_scores(t, batch), expected, atol=1e-4)
        t.detach().eval()


def test_a_killed_training_with_remedies_goes_on_to_the_same_weights(tmp_path):
    target, source = Toy(24, "a red"), Toy(10, "a small blue", .05)
    def run(out, stop=None, method="full"):
        torch.manual_seed(3); t = attach(toy(1.), method); steps = []
        data, objective, c, validate = apply_remedies(["distil", "rehearse20", "l2sp"], t, target, caption_loss, TrainConfig(steps=6, batch_size=8, lr=1e-2, out=str(out), checkpoint_every=2), source=source)
        def counted(model, batch):
            steps.append(1)
            if len(steps) == stop: stop_training()
            return objective(model, batch)
        return train(t, data, counted, c, validate), weights(t)
    for method in ("full", "lora"):
        _, whole = run(tmp_path/f"{method}-whole", method=method)
        with pytest.raises(Interrupted): run(tmp_path/f"{method}-cut", 3, method)
        r, cut = run(tmp_path/f"{method}-cut", method=method)
        assert r.resumed == 3 and same(whole, cut)


def test_pieces_of_a_batch_count_each_penalty_once():
    got = []
    for pieces in (1, 4):
        t = attach(toy(1.), "full"); shaken(t, .0)
        objective = L2SP(Distil(caption_loss, t, .7), t, .5); shaken(t, .05)  # away from the start, so that both pull
        train(t, Toy(8, "a red"), objective, TrainConfig(steps=1, batch_size=8, lr=.1, optimizer="sgd", momentum=0., weight_decay=0., clip=None, accumulate=pieces))
        got.append(weights(t))
    assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(*got))


def test_pulls_pull():
    "Stronger remedies leave the tuned model nearer to the base, each by its own measure."
    target = Toy(16, "a red"); far, kl = [], []
    for weight in (0., 30.):
        t = attach(toy(1.), "full"); begin = weights(t)
        train(t, target, L2SP(caption_loss, t, weight), TrainConfig(steps=12, batch_size=8, lr=1e-2))
        far.append(sum(float((a - b).square().sum()) for a, b in zip(begin, weights(t))))
        t = attach(toy(1.), "lora")
        train(t, target, Distil(caption_loss, t, weight), TrainConfig(steps=12, batch_size=8, lr=3e-2))
        with torch.no_grad(): kl.append(float(Distil(caption_loss, t, 1.)(t, t.collate([target[i] for i in range(8)]))[1]["distil"]))
    assert far[1] < .5*far[0] and kl[1] < .5*kl[0]


def test_same_keys_do_not_mix_up_pictures():
    c, target, source = toy(), Toy(12, "a red"), Toy(12, "a small blue", .45)
    r = Rehearsal(target, source, .5)
    with torch.no_grad(): batch = c.collate([r[i] for i in range(len(r))])
    for name, feature in zip(r.ids, batch["features"]):
        from_, i = (source, name.removeprefix("rehearsal/")) if name.startswith("rehearsal/") else (target, name)
        alone = toy().encode([from_[from_.ids.index(i)]["image"]])[0]
        assert torch.equal(feature, alone), name


def test_an_objective_that_does_not_call_the_model_is_distilled_too():
    t = shaken(attach(toy(), "lora")); target = Toy(4, "a red")
    batch = t.collate([target[i] for i in range(4)])
    bypass = lambda model, batch: caption_loss(model.captioner, batch)
    assert torch.allclose(Distil(bypass, t)(t, batch)[0], Distil(caption_loss, t)(t, batch)[0])


def test_learned_prompts_need_the_examples():
    t = attach(toy(), "prompt", n=9); target = Toy(4, "a red")
    with pytest.raises(ConfigError, match="give data="): Distil(caption_loss, t)(t, t.collate([target[0]]))


def test_held_back_images_are_never_trained_on():
    target, source = Toy(40, "a red"), Toy(6, "a small blue", .05)
    t = attach(toy(1.), "lora")
    data, objective, config, validate = apply_remedies(["rehearse20", "early"], t, target, caption_loss, TrainConfig(steps=20, batch_size=8), source=source, settings={"early": {"share": .3}})
    back = {i.split("#")[0] for i in validate.data.ids}
    assert len(back) == 6 and not any(i.split("#")[0] in back for i in data.ids if not i.startswith("rehearsal/"))
    target.seen.clear(); train(t, data, objective, dataclasses.replace(config, eval_every=0, patience=0))
    assert target.seen and not {i.split("#")[0] for i in target.seen} & back


def test_early_stopping_stops_and_takes_the_best():
    t = attach(toy(1.), "lora"); values = iter([3., 1., 2., 2., 2., 0., 0.]); seen = []
    def validate(model): seen.append(weights(t)); return next(values)
    parts = apply_remedies("early", t, Toy(8, "a red"), caption_loss, TrainConfig(steps=20, batch_size=8, lr=1e-2), validate=validate, settings={"early": {"evals": 20}})
    r = train(t, *parts)
    assert (r.ended, r.steps, r.best_step, r.best) == ("early", 5, 2, 1.) and same(weights(t), seen[1])
    assert apply_remedies(["early"], t, Toy(8, "a red"), caption_loss, TrainConfig(steps=9, eval_every=4, patience=7, better="max"), validate=len)[2].better == "max"
    with pytest.raises(DataError, match="too few"): hold_back(Toy(2, "a red"))


def test_budget_is_that_of_the_bare_training():
    t = attach(toy(1.), "lora"); config = TrainConfig(epochs=2, batch_size=8)
    for r in REMEDIES:
        c = apply_remedies([r], t, Toy(40, "a red"), caption_loss, config, source=Toy(6, "a small blue"))[2]
        assert (c.steps, c.epochs) == (10, None)
    assert apply_remedies([], t, (data := Toy(4, "a")), caption_loss, config) == (data, caption_loss, config, None)


@pytest.mark.parametrize("weight", [-1, math.nan, math.inf, "strong", None])
def test_bad_weights(weight):
    t = attach(toy(), "lora")
    for cls in (L2SP, Distil):
        with pytest.raises(ConfigError, match="weight"): cls(caption_loss, t, weight)
    t.detach()


def test_bad_remedies():
    t, data, config = attach(toy(), "lora"), Toy(8, "a red"), TrainConfig(steps=2)
    for names, source, settings, why in (
            (["l3sp"], None, None, "did you mean l2sp"), (["rehearse5"], None, None, "source data"), (["rehearse5"], [], None, "source data"), (["distil"], [], None, "source is empty"),
            (["rehearse1", "rehearse20"], data, None, "one share"), (["l2sp", "l2sp"], data, None, "twice"), (["l2sp"], None, {"l2sp": {"wait": 1}}, "no such setting"),
            (["rehearse5"], data, {"rehearse5": {"share": 1.}}, "cannot be rehearsed"), (["early"], None, {"early": {"share": 0}}, "cannot be held back")):
        with pytest.raises(ConfigError, match=why): apply_remedies(names, t, data, caption_loss, config, source=source, settings=settings)
    swept = PromptSweep(t.detach())
    with pytest.raises(ConfigError, match="trains nothing"): apply_remedies(["l2sp"], swept, data, caption_loss, config)
    assert split_method("prompt_sweep") == ("prompt_sweep", []) and list_remedies().keys() == REMEDIES.keys() and all(list_remedies().values())


# ---- alpha

def logits(t, c=None):
    with torch.no_grad(): return t(t.collate([Toy(4, "a red")[i] for i in range(4)])).logits


@pytest.mark.parametrize("method,kw", [("full", {}), ("lora", dict(r=4)), ("prompt", {})])
def test_a_sweep_leaves_the_method_as_it_was(method, kw):
    c = toy(); base = logits(c)
    t = shaken(attach(c, method, **kw)); t.eval()
    trained, at, seen = weights(t), {a: logits(t.scale(a)) for a in (1, .5, 0)}, {}
    assert torch.equal(at[0], base) and not torch.allclose(at[.5], base, atol=1e-2) and not torch.allclose(at[.5], at[1], atol=1e-2)
    for was in (1, .5, 0):
        t.scale(was)
        curve = alpha_sweep(t, lambda t: seen.update({t.alpha: logits(t)}) or {"a": t.alpha})
        assert curve.values["a"] == curve.alphas == [0, .25, .5, .75, 1] and t.alpha == was and torch.equal(logits(t), at[was])
        assert all(torch.equal(seen[a], at[a]) for a in at)
        calls = []
        def stops(t):
            calls.append(t.alpha)
            if len(calls) == 3: raise KeyboardInterrupt
            return {"a": 1.}
        with pytest.raises(KeyboardInterrupt): alpha_sweep(t, stops)
        assert t.alpha == was and torch.equal(logits(t), at[was])
    assert same(weights(t.scale(1)), trained)


def test_full_weights_lie_on_the_line():
    c = toy(); start = {n: p.detach().clone() for n, p in c.model.named_parameters()}
    t = shaken(attach(c, "full")); end = {n: p.detach().clone() for n, p in t.own.items()}
    def check(t):
        for n, p in t.own.items(): assert torch.allclose(p, start[n] + t.alpha*(end[n] - start[n]), atol=1e-5)
        return {"a": 0.}
    alpha_sweep(t, check, (.3, .9, 1.5))


def test_a_switch_is_refused_before_anything_is_computed():
    t = PromptSweep(toy()); calls = []
    with pytest.raises(ConfigError, match="0 or 1"): alpha_sweep(t, lambda t: calls.append(1) or {"a": 1.})
    assert not calls and t.alpha == 1
    assert alpha_sweep(t, lambda t: {"a": t.alpha}, (1,)).alphas == [0, 1]


class Line:
    method, alpha = "line", 1.
    def scale(self, alpha): self.alpha = alpha; return self


@pytest.mark.parametrize("bad", [math.nan, math.inf, None, "good", [1]])
def test_a_value_that_is_none_is_not_taken(bad):
    t = Line()
    with pytest.raises(MetricError, match="source has no value at alpha 0.5"): alpha_sweep(t, lambda t: {"target": 1., "source": bad if t.alpha == .5 else 1.})
    assert t.alpha == 1


def test_bad_evaluations_and_alphas():
    t = Line()
    for evaluate in (lambda t: {}, lambda t: {"a": 1.} if t.alpha < .5 else {"b": 1.}, lambda t: 3., lambda t: None):
        with pytest.raises(ConfigError, match="evaluate gives"): alpha_sweep(t, evaluate)
    for alphas in ((-.1, 1), (math.nan,), ("1",), (math.inf,), (True,)):
        with pytest.raises(ConfigError, match="alpha cannot be"): alpha_sweep(t, lambda t: {"a": 1.}, alphas)
    calls = []
    with pytest.raises(ConfigError, match="no value 'b'"): alpha_sweep(t, lambda t: calls.append(1) or {"a": 1.}, lower=("b",))
    assert calls == [1] and alpha_sweep(t, lambda t: {"a": 1.}, (1, .5, 1, .5)).alphas == [0, .5, 1] and alpha_sweep(t, lambda t: {"a": 1.}, ()).alphas == [0]
    for a, v in (([.5, 1], [1, 2]), ([0, 1, .5], [1, 2, 3]), ([0, 0], [1, 1]), ([0, 1], [1]), ([], [])):
        with pytest.raises(ConfigError): AlphaCurve(a, {"a": v})
    with pytest.raises(ConfigError): AlphaCurve([0], {})
    with pytest.raises(ConfigError, match="did you mean source"): AlphaCurve([0], {"source": [1.], "target": [1.]}).pick(keep="sorce")


def test_an_evaluation_that_meddles_with_alpha():
    t = Line(); t.alpha = .75
    def evaluate(t): a = t.alpha; t.scale(.123); return {"a": a}
    assert alpha_sweep(t, evaluate).values["a"] == [0, .25, .5, .75, 1] and t.alpha == .75


def test_no_pick_breaks_its_budget():
    rng = random.Random(4)
    for trial in range(300):
        n = rng.randint(1, 7); alphas = [0, *sorted(rng.sample(range(1, 40), n))]
        values = {k: [rng.choice([-2, -1, 0, 1, 2, 3]) + rng.random()*(trial % 2) for _ in alphas] for k in ("target", "source")}
        lower, lose = rng.choice([(), ("source",), ("target",), ("source", "target")]), rng.choice([0, .02, .5, 1])
        curve = AlphaCurve(alphas, values, lower=lower)
        g, k = curve.of("target"), curve.of("source")
        allowed = [i for i in range(n + 1) if k[0] - k[i] <= lose*abs(k[0]) + 1e-9]
        best = max(g[i] for i in allowed)
        assert curve.pick(lose=lose) == next(curve.alphas[i] for i in allowed if g[i] == best)
        assert AlphaCurve.from_json(curve.to_json()) == curve
        def f(t): return {"target": math.sin(7*t.alpha + trial), "source": 1 + math.cos(3*t.alpha + trial)/2}
        t = Line(); c = alpha_sweep(t, f); before = f(t.scale(c.pick(lose=.05)))["target"]; t.scale(1)
        a = c.pick(lose=.05, refine=5, tuned=t, evaluate=f)
        after = f(t.scale(a)); assert after["target"] >= before and after["source"] >= .95*f(t.scale(0))["source"] - 1e-9


def test_areas():
    assert front([]) == [] and hypervolume([(math.inf, 1)], (0, 0)) == math.inf
    with pytest.raises(MetricError, match="no share"): AlphaCurve([0, 1], {"target": [0, 1], "source": [0, 1]}).area()
    a = AlphaCurve([0, .5, 1], {"target": [1, 2, 3], "source": [4, 3, 2]})
    assert a.area() == .75*1 + .5*1 and a.area(reference=(.5, 0)) == .25 and a.area(reference=(2, 0)) == 0
    finer = AlphaCurve([0, .25, .5, 1], {"target": [1, 1.5, 2, 3], "source": [4, 3.5, 3, 2]})
    assert finer.area() > a.area()  # only measured places count
