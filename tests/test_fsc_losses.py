"The losses of FSC-CLIP against a literal reading of the paper, in shapes, scales and precisions of all kinds; two processes are real ones."
import math, socket, subprocess, sys
from itertools import product

import pytest
import torch
from conftest import ROOT, python_env
from torch.nn import functional as F

import capnb.fsc_clip as fsc
from capnb.core.errors import CapnbError
from capnb.fsc_clip.fused import saved_bytes
from capnb.models.dual import OpenClipDual, build_open_clip


def batch(B, K, P, T, D, seed=0, keep=.8, most=None, dtype=torch.float64):
    "Tensors by the names of the functions' arguments; captions of 1 to `most` tokens; about `keep` of the negatives, in any order."
    g = torch.Generator().manual_seed(seed)
    def r(*shape): return torch.randn(*shape, generator=g, dtype=dtype)
    owner = torch.arange(B).repeat(K)[torch.rand(B*K, generator=g) < keep]
    owner = owner[torch.randperm(len(owner), generator=g)]
    def mask(n):
        length = torch.randint(1, (most or T - 1) + 1, (n,), generator=g)
        return (torch.arange(T) >= 1) & (torch.arange(T) <= length[:, None])
    M = len(owner)
    return dict(image=F.normalize(r(B, D), dim=-1), text=F.normalize(r(B, D), dim=-1), negatives=F.normalize(r(M, D), dim=-1), patches=r(B, P, D), tokens=r(B, T, D), mask=mask(B),
                negative_tokens=r(M, T, D), negative_mask=mask(M), owner=owner)


def literal(x, scale, gamma=2., beta=.02, attention="min-max", aggregate="logsumexp", local_scale=None):
    "Loops over images, captions and words: (clip, global, local)."
    image, text, own = x["image"], x["text"], x["owner"].tolist()
    z = scale*image @ text.T
    clip = -sum(z[i, i] - z[i].logsumexp(0) + z[i, i] - z[:, i].logsumexp(0) for i in range(len(z)))/(2*len(z))

    def similarity(v, tokens, mask):
        words, s = [], scale if local_scale is None else local_scale
        for t in tokens[mask]:
            raw = (v @ t).detach()
            if attention == "softmax": a = raw.softmax(0)
            else:
                a = (raw - raw.min())/(raw.max() - raw.min())
                if attention == "sparse": a = torch.where(a < 1/len(a), 0, a)
                a = a/a.sum()
            words.append(s*F.cosine_similarity((a[:, None]*v).sum(0), t, dim=0))
        words = torch.stack(words)
        if aggregate == "mean-cosine": return words.mean()
        return words.logsumexp(0) - (math.log(len(words)) if aggregate == "mean" else 0)

    def calibrated(rows):
        losses = []
        for logits in rows:
            if len(logits) == 1: continue
            log_p = torch.stack(logits).log_softmax(0)
            y = torch.full_like(log_p, beta/len(logits)); y[0] += 1 - beta
            losses.append(-((1 - log_p.exp())**gamma*y*log_p).sum())
        return torch.stack(losses).mean() if losses else z.sum()*0

    mine = [[m for m, o in enumerate(own) if o == i] for i in range(len(z))]
    g = calibrated([[z[i, i]] + [scale*image[i] @ x["negatives"][m] for m in mine[i]] for i in range(len(z))])
    l = calibrated([[similarity(x["patches"][i], x["tokens"][i], x["mask"][i])] + [similarity(x["patches"][i], x["negative_tokens"][m], x["negative_mask"][m]) for m in mine[i]] for i in range(len(z))])
    return clip, g, l


FLOATS = ["image", "text", "negatives", "patches", "tokens", "negative_tokens"]


def leaves(x, dtype=None):
    return {k: (v.to(dtype or v.dtype).detach().requires_grad_() if k in FLOATS else v) for k, v in x.items()}


def close(a, b, rtol=1e-4):
    for p, q in zip(a, b): assert (p - q).norm() <= rtol*q.norm() + 1e-9, ((p - q).norm()/q.norm()).item()


SHAPES = [(4, 3, 5, 7, 8), (1, 1, 2, 3, 4), (5, 0, 3, 4, 8), (3, 6, 9, 12, 16), (7, 2, 49, 10, 5), (2, 11, 4, 5, 33)]


@pytest.mark.parametrize("shape,scale", list(product(SHAPES, (1., 14.3, 100.))))
def test_equals_the_paper(shape, scale):
    x, s = leaves(batch(*shape, seed=sum(shape))), torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    wanted = [x[k] for k in FLOATS] + [s]
    for gamma, beta in ((2., .02), (0., 0.), (1., .1), (.5, .3))[:3 if scale == 100 else 4]:  # the root of 1 - p = 0 has no slope in the literal form
        want = dict(zip(("clip", "global", "local"), literal(x, s, gamma, beta)))
        got = fsc.fsc_clip_terms(**x, scale=s, gamma=gamma, beta=beta)
        for k in want: torch.testing.assert_close(got[k], want[k], atol=1e-8, rtol=1e-8)
        total = want["clip"] + .5*want["global"] + .2*want["local"]
        loss = fsc.fsc_clip_loss(**x, scale=s, gamma=gamma, beta=beta)
        close(torch.autograd.grad(loss, wanted), [g if g is not None else torch.zeros_like(w) for g, w in zip(torch.autograd.grad(total, wanted, allow_unused=True), wanted)], 1e-7)


@pytest.mark.parametrize("scale", (5., 100.))
def test_equals_the_paper_in_float32(scale):
    x = batch(16, 3, 49, 20, 64, seed=3, dtype=torch.float32)
    deep = leaves({k: v.double() if k in FLOATS else v for k, v in x.items()})
    want = literal(deep, scale)
    x = leaves(x)
    got = fsc.fsc_clip_terms(**x, scale=scale)
    for a, b in zip(got.values(), want): assert abs(a.item() - b.item()) < 1e-5*max(1, abs(b.item()))
    close(torch.autograd.grad(sum(got.values()), [x[k] for k in FLOATS]), torch.autograd.grad(sum(want), [deep[k] for k in FLOATS]))


@pytest.mark.parametrize("attention,aggregate", list(product(("min-max", "sparse", "softmax"), ("logsumexp", "mean", "mean-cosine"))))
def test_options(attention, aggregate):
    x = leaves(batch(5, 3, 6, 8, 8, seed=1))
    want = literal(x, 20., attention=attention, aggregate=aggregate, local_scale=7.)[2]
    got = fsc.fsc_clip_terms(**x, scale=20., local_scale=7., attention=attention, aggregate=aggregate)["local"]
    torch.testing.assert_close(got, want)
    args = [x[k] for k in ("patches", "tokens", "negative_tokens")]
    close(torch.autograd.grad(got, args), torch.autograd.grad(want, args), 1e-7)


def run(x, **how): return fsc.fsc_clip_loss(**x, scale=how.pop("scale", 30.), **how)


def test_what_changes_nothing():
    x, g = batch(6, 3, 7, 9, 8), torch.Generator().manual_seed(5)
    base, M = run(x), len(x["owner"])
    order = torch.randperm(M, generator=g)
    turned = x | {k: x[k][order] for k in ("negatives", "negative_tokens", "negative_mask", "owner")}
    torch.testing.assert_close(run(turned), base)
    order = torch.randperm(9, generator=g)
    torch.testing.assert_close(run(x | {k: x[k][:, order] for k in ("tokens", "mask", "negative_tokens", "negative_mask")}), base)
    wide = x | {k: F.pad(x[k], (0, 0, 0, 4), value=math.nan) for k in ("tokens", "negative_tokens")} | {k: F.pad(x[k], (0, 4)) for k in ("mask", "negative_mask")}
    wide = leaves(wide)
    torch.testing.assert_close(run(wide), base)
    run(wide).backward(); assert all(wide[k].grad.isfinite().all() for k in FLOATS)
    torch.testing.assert_close(run(x | dict(tokens=3*x["tokens"], image=5*x["image"], mask=x["mask"].long(), owner=x["owner"].tolist())), base)  # lengths, kinds of masks and lists
    short = x | dict(negative_tokens=x["negative_tokens"][:, :x["negative_mask"].any(0).nonzero().max() + 1], negative_mask=x["negative_mask"][:, :x["negative_mask"].any(0).nonzero().max() + 1])
    torch.testing.assert_close(run(short), base)
    images = torch.randperm(6, generator=g)  # images in another order
    moved = x | {k: x[k][images] for k in ("image", "text", "patches", "tokens", "mask")} | dict(owner=images.argsort()[x["owner"]])
    torch.testing.assert_close(run(moved), base)


def test_rows_without_negatives_do_not_count():
    x = leaves(batch(6, 3, 5, 6, 8, keep=1.))
    some = x["owner"] > 2
    y = x | {k: x[k][some] for k in ("negatives", "negative_tokens", "negative_mask", "owner")}
    got = fsc.fsc_clip_terms(**y, scale=10.)
    few = {k: (v[3:] if k in ("image", "text", "patches", "tokens", "mask") else v) for k, v in y.items()} | dict(owner=y["owner"] - 3)
    want = fsc.fsc_clip_terms(**few, scale=10.)
    for k in ("global", "local"): torch.testing.assert_close(got[k], want[k])
    grads = torch.autograd.grad(got["global"] + got["local"], [y["image"], y["patches"], y["tokens"]])
    assert all(g[:3].eq(0).all() and g[3:].ne(0).any() for g in grads)


def test_no_negatives_is_clip():
    x = leaves(batch(4, 0, 5, 6, 8))
    s = torch.tensor(20., dtype=torch.float64, requires_grad=True)
    loss, clip = fsc.fsc_clip_loss(**x, scale=s), fsc.clip_loss(x["image"], x["text"], s)
    assert torch.equal(loss, clip)
    args = [x["image"], x["text"], s]
    for a, b in zip(torch.autograd.grad(loss, args, retain_graph=True), torch.autograd.grad(clip, args)): torch.testing.assert_close(a, b)
    loss.backward(); assert x["patches"].grad.eq(0).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("case", ("plain", "constant", "one patch", "zero patches", "zero text", "huge", "separated"))
def test_never_nan(case, dtype):
    x = batch(4, 2, 6, 7, 8, dtype=torch.float32)
    if case == "constant": x["patches"] = x["patches"][:, :1].expand(4, 6, 8)
    if case == "one patch": x["patches"] = x["patches"][:, :1]
    if case == "zero patches": x["patches"] = 0*x["patches"]
    if case == "zero text": x["text"], x["tokens"] = 0*x["text"], 0*x["tokens"]
    if case == "huge": x["patches"], x["tokens"] = 1e4*x["patches"], 1e4*x["tokens"]
    if case == "separated": x["text"], x["negatives"] = x["image"], -x["image"][x["owner"]]
    for gamma, autocast in product((0., .5, 2.), (False, True)):
        y, s = leaves(x, dtype), torch.tensor(100., requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast): loss = fsc.fsc_clip_loss(**y, scale=s, gamma=gamma)
        loss.backward()
        assert loss.dtype == torch.float32 and loss.isfinite() and s.grad.isfinite(), (case, gamma)
        assert all(y[k].grad.isfinite().all() and y[k].grad.dtype == dtype for k in FLOATS), (case, gamma)


def test_precision_of_half_inputs():
    "Half precision costs the rounding of the inputs, not that of the loss."
    x = batch(8, 3, 9, 8, 64, dtype=torch.float32)
    rounded = {k: v.bfloat16().float() if k in FLOATS else v for k, v in x.items()}
    half = {k: v.bfloat16() if k in FLOATS else v for k, v in x.items()}
    a, b = fsc.fsc_clip_terms(**half, scale=100.), fsc.fsc_clip_terms(**rounded, scale=100.)
    torch.testing.assert_close(a["local"], b["local"], rtol=1e-5, atol=1e-6)
    for k in ("clip", "global"): torch.testing.assert_close(a[k], b[k], rtol=.01, atol=.01)


def test_gradcheck():
    x = leaves(batch(3, 2, 2, 4, 5))  # two patches: min-max weights are 0 and 1, so finite differences apply to the whole
    s = torch.tensor(8., dtype=torch.float64, requires_grad=True)
    def f(*args): return fsc.fsc_clip_loss(**(x | dict(zip(FLOATS, args))), scale=args[-1])
    assert torch.autograd.gradcheck(f, (*(x[k] for k in FLOATS), s))


def test_no_gradient_through_the_attention():
    x = leaves(batch(2, 1, 6, 5, 8, keep=1.))
    a = fsc.local_similarity(x["patches"], x["tokens"], x["mask"], 10.)
    fixed = torch.softmax(torch.einsum("nwd,npd->nwp", x["tokens"], x["patches"]), -1).detach()
    b = fsc.local_similarity(x["patches"], x["tokens"], x["mask"], 10., attention="softmax")
    c = (10*F.cosine_similarity(fixed @ x["patches"], x["tokens"], dim=-1)).masked_fill(~x["mask"], -math.inf).logsumexp(-1)
    torch.testing.assert_close(b, c)
    close(torch.autograd.grad(b.sum(), x["tokens"]), torch.autograd.grad(c.sum(), x["tokens"]), 1e-9)
    assert a.requires_grad


def test_frozen_towers_and_repeated_backward():
    x = leaves(batch(5, 2, 6, 7, 8))
    full = torch.autograd.grad(run(x), [x["patches"], x["tokens"], x["negative_tokens"]])
    for free in ("patches", "tokens", "negative_tokens"):
        y = {k: v.detach() if k in FLOATS and k != free else v for k, v in x.items()}
        torch.testing.assert_close(torch.autograd.grad(run(y), y[free])[0], full[("patches", "tokens", "negative_tokens").index(free)])
    loss = run(x)
    once = torch.autograd.grad(2*loss, x["patches"], retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, x["patches"])[0], once/2)
    with torch.no_grad(): torch.testing.assert_close(run(x), loss.detach())


@pytest.mark.parametrize("most", (20, 75))
def test_what_is_kept_for_the_backward_pass(most):
    "Batch 64, 3 negatives of which a fifth is missing, 77 slots, 49 patches: a third of the direct form at most."
    x = leaves(batch(64, 3, 49, 77, 128, most=most, dtype=torch.float32))
    x = {k: v for k, v in x.items() if k not in ("image", "text", "negatives")} | dict(scale=100.)
    lean, direct = saved_bytes(lambda: fsc.local_hard_negative_loss(**x)), saved_bytes(lambda: fsc.direct_local_loss(**x))
    assert direct > 3*lean, (direct, lean)
    cut = {k: v[:, :most + 1] if k in ("tokens", "mask", "negative_tokens", "negative_mask") else v for k, v in x.items()}
    assert saved_bytes(lambda: fsc.direct_local_loss(**cut)) > 3*lean  # also less than the direct form on short slots


@pytest.mark.parametrize("change,said", [
    (dict(text=torch.zeros(3, 8)), "text has the shape"), (dict(negatives=torch.zeros(8, 5)), "negatives has the shape"), (dict(tokens=torch.zeros(4, 7, 9)), "tokens has the shape"),
    (dict(mask=torch.ones(4, 6)), "mask has the shape"), (dict(patches=torch.zeros(4, 8)), "patches has the shape"), (dict(owner=[0]*7 + [4]), "0 to 4"), (dict(owner=[0]*7 + [-1]), "-1 to 0"),
    (dict(owner=[0]*7), "owner has the shape"), (dict(owner=torch.zeros(8)), "whole numbers"), (dict(mask=torch.zeros(4, 7)), "4 captions have no valid token"),
    (dict(negative_mask=torch.eye(8, 7)), "1 captions have no valid token"), (dict(gamma=-1.), "gamma"), (dict(beta=1.5), "beta"), (dict(attention="hard"), "attention"), (dict(aggregate="max"), "aggregate")])
def test_errors_are_for_people(change, said):
    x = batch(4, 2, 5, 7, 8, keep=1.)
    with pytest.raises(CapnbError, match=said): fsc.fsc_clip_loss(**(x | dict(scale=10.) | change))


# ---- dual encoders

def tiny_clip():
    torch.manual_seed(0)
    vision = dict(image_size=32, layers=1, width=32, head_width=16, patch_size=16)
    return build_open_clip(dict(embed_dim=16, quick_gelu=True, vision_cfg=vision, text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=2)))


def examples(n=5):
    torch.manual_seed(1)
    return [dict(id=i, image=torch.rand(3, 32, 32), caption=f"a {'red blue green'.split()[i % 3]} cat" + " on a mat"*(i % 2), negatives=[f"a dog number {k}" for k in range((2, 0, 1, 3, 0)[i % 5])]) for i in range(n)]


def test_bring_your_own_open_clip_loop():
    "The example of the notebook: three new lines in a training step."
    from capnb.fsc_clip import FSCClip, collate_negatives
    model = tiny_clip().train()
    dual, objective = OpenClipDual(model), FSCClip()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(.9, .98), weight_decay=.1)
    losses = []
    for step in range(4):
        batch = collate_negatives(dual, examples())
        with torch.autocast("cpu", torch.bfloat16): loss, log = objective(dual, batch)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        dual.clamp_scale()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and log["negatives"] == 6/5
    assert all(p.grad is not None for p in model.parameters())


def test_full_slots_and_trimmed_ones_train_alike():
    dual = OpenClipDual(tiny_clip())
    batch = fsc.collate_negatives(dual, examples())
    full = batch | {k: F.pad(batch[k], (0, 77 - batch[k].shape[1])) for k in ("ids", "mask")}
    grads = []
    for b, trims in ((batch, True), (full, True), (full, False)):
        dual.trims = trims; dual.zero_grad()
        loss, _ = fsc.FSCClip()(dual, b); loss.backward()
        grads.append([loss.detach(), *(p.grad.clone() for p in dual.parameters())])
    for other in grads[1:]:
        close(grads[0], other)


def test_siglip_trains_too():
    from test_dual import hf_siglip
    dual = hf_siglip().train()
    more = [dict(image=torch.rand(3, 16, 16), caption="a cat", negatives=["a dog"]), dict(image=torch.rand(3, 16, 16), caption="a big dog", negatives=[])]
    loss, log = fsc.FSCClip(attention="softmax", local_scale=5.)(dual, fsc.collate_negatives(dual, more))
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in dual.parameters()) and set(log) >= {"clip", "global", "local"}


PART = '''
import sys, torch, torch.distributed as dist
sys.path.insert(0, "tests")
from test_fsc_losses import batch, leaves, FLOATS, shared_part
import capnb.fsc_clip as fsc
rank, port, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
result = []
for case in range(3):
    W, x = shared_part(case, rank)
    loss = fsc.fsc_clip_loss(**x(W), scale=W["scale"], gather=True)
    (loss*x.share).backward()
    for p in W.values(): dist.all_reduce(p.grad)
    total = (loss*x.share).detach(); dist.all_reduce(total)
    result.append([total, *(p.grad for p in W.values())])
if rank == 0: torch.save(result, out)
dist.barrier(); dist.destroy_process_group()  # or one process may end while the other still talks to it
'''


def shared_part(case, rank=None):
    "Weights shared by the processes, and the batch (or one process's part of it) as a function of them."
    x = batch(7, 3, 5, 6, 8, seed=case, keep=(.7, .7, 0)[case], dtype=torch.float64)
    cut = (3, 6, 5)[case]  # rows of the first process
    if case == 1: x = x | {k: x[k][x["owner"] < 6] for k in ("negatives", "negative_tokens", "negative_mask", "owner")}  # the second has an image, but no negatives
    lo, hi = (0, 7) if rank is None else (0, cut) if rank == 0 else (cut, 7)
    mine = (x["owner"] >= lo) & (x["owner"] < hi)
    part = {k: x[k][mine] if k in ("negatives", "negative_tokens", "negative_mask") else x["owner"][mine] - lo if k == "owner" else x[k][lo:hi] for k in x}
    torch.manual_seed(0)
    W = dict(v=torch.randn(8, 8, dtype=torch.float64, requires_grad=True), t=torch.randn(8, 8, dtype=torch.float64, requires_grad=True), scale=torch.tensor(9., dtype=torch.float64, requires_grad=True))
    def make(W): return part | {k: part[k] @ W["v"] for k in ("image", "patches")} | {k: part[k] @ W["t"] for k in ("text", "negatives", "tokens", "negative_tokens")}
    make.share = (hi - lo)/7
    return W, make


def test_two_processes_are_as_one(tmp_path):
    "Values and gradients, with parts of different size and a process without negatives."
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = str(s.getsockname()[1])
    out = tmp_path/"two.pt"
    children = [subprocess.Popen([sys.executable, "-c", PART, str(r), port, str(out)], cwd=ROOT, env=python_env(ROOT), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for r in range(2)]
    said = [c.communicate(timeout=120)[0] for c in children]
    assert not any(c.returncode for c in children), said
    for case, got in enumerate(torch.load(out)):
        W, x = shared_part(case)
        loss = fsc.fsc_clip_loss(**x(W), scale=W["scale"])
        loss.backward()
        for a, b in zip(got, [loss.detach(), *(p.grad for p in W.values())]): torch.testing.assert_close(a, b)
