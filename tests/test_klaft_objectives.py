"""KLAFT's objectives (Eqs. 6-9) against slow references over shapes, seeds and number types; and the traps that their literal
readings fall into, each on several seeds: a trap that does not show is a claim of ours that is wrong."""
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from capnb.core.errors import CapnbError, ConfigError, TrainingError
from capnb.klaft.itm import FORMS, ClsTokens, itm_loss, negatives
from capnb.klaft.mrm import RegionHead, mask_regions, mrm_loss
from capnb.klaft.total import Weights, total_loss
from capnb.klaft.ttm import drop_tokens, ttm_loss


def gen(seed): return torch.Generator().manual_seed(seed)
def draw(seed, *shape, t=torch.float64): return torch.randn(*shape, generator=gen(seed), dtype=t)


# ---- TTM

@pytest.mark.parametrize("shape,K,d", [((), 1, 3), ((5,), 2, 1), ((2, 6), 10, 17), ((2, 3, 4), 3, 8)])
@pytest.mark.parametrize("omega", [.05, .4, 1.])
def test_ttm_is_the_slow_sum(shape, K, d, omega):
    h, g, q = draw(1, *shape, d), draw(2, K, d), draw(3, *shape, K + 1).softmax(-1)
    rows = [(a, b) for a, b in zip(h.reshape(-1, d), q.reshape(-1, K + 1))]
    slow = sum(b[z]*(a - g[z - 1]).square().sum() for a, b in rows for z in range(1, K + 1))
    assert torch.allclose(ttm_loss(h, g, q, omega), slow/len(rows)/d, rtol=1e-10)
    assert torch.allclose(ttm_loss(h, g, q, omega, "literal"), omega**2*slow, rtol=1e-10)
    assert torch.equal(ttm_loss(h, g, q, torch.tensor(omega)), ttm_loss(h, g, q, omega))


def test_our_gradients_stop_where_they_should():
    "Neither the states of TTM nor the target of MRM learn from our reading; both do literally."
    for r in ("ours", "literal"):
        h, v = draw(1, 5, 4).requires_grad_(), draw(2, 2, 3, 4).requires_grad_()
        a = torch.autograd.grad(ttm_loss(h, draw(3, 2, 4).requires_grad_(), draw(4, 5, 3).softmax(-1), .2, r), h, allow_unused=True)[0]
        b = torch.autograd.grad(mrm_loss(draw(5, 2, 3, 4).requires_grad_(), v, torch.ones(2, 3), r), v, allow_unused=True)[0]
        assert (a is None and b is None) if r == "ours" else (a.abs().sum() > 0 and b.abs().sum() > 0)


def test_ttm_moves_with_its_inputs():
    "Turning or shifting states and topics together changes nothing; scaling both scales by the square; topics may be renumbered."
    h, g, q = draw(1, 9, 6), draw(2, 4, 6), draw(3, 9, 5).softmax(-1)
    turn, order = torch.linalg.qr(draw(4, 6, 6))[0], torch.tensor([2, 0, 3, 1])
    for r in ("ours", "literal"):
        L = ttm_loss(h, g, q, .3, r)
        for a, b, c, k in ((h@turn, g@turn, q, 1), (h + 5, g + 5, q, 1), (3*h, 3*g, q, 9), (h, g[order], q[:, [0, *(order + 1)]], 1)):
            assert torch.allclose(ttm_loss(a, b, c, .3, r), k*L, rtol=1e-9)


@pytest.mark.parametrize("t", [torch.bfloat16, torch.float16])
def test_ttm_in_half_precision_is_finite_and_close(t):
    h, g, q = (100*draw(1, 30, 64)).to(t), (100*draw(2, 5, 64)).to(t), draw(3, 30, 6).softmax(-1)
    want = ttm_loss(h.double(), g.double(), q, .2)
    got = ttm_loss(h, g.requires_grad_(), q.to(t), .2)
    got.backward()
    assert got.dtype == torch.float32 and abs(got/want - 1) < .01 and torch.isfinite(g.grad).all() and g.grad.dtype == t


def test_ttm_with_nothing_on_topics_has_finite_gradients():
    logit = torch.tensor([[0., -300, -300], [0, 300, -300], [300, 0, 0]], requires_grad=True)
    g = draw(1, 2, 4, t=torch.float32).requires_grad_()
    ttm_loss(draw(2, 3, 4, t=torch.float32), g, logit.softmax(-1), .2).backward()
    assert torch.isfinite(logit.grad).all() and torch.isfinite(g.grad).all() and g.grad.abs().sum() > 0


@pytest.mark.parametrize("seed", range(3))
def test_ttm_minimum_is_soft_k_means(seed):
    "Descending our loss on the topics ends at the weighted means of the states."
    h, q = draw(seed, 50, 6), draw(seed + 9, 50, 4).softmax(-1)
    g = torch.zeros(3, 6, dtype=torch.float64, requires_grad=True)
    for _ in range(400): g.data -= 10*torch.autograd.grad(ttm_loss(h, g, q, .2), g)[0]
    assert torch.allclose(g, (q[:, 1:].T@h)/q[:, 1:].sum(0)[:, None], atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_ttm_prior_learns_the_nearest_topic_and_literally_flees(seed):
    "Descent on the prior: ours sharpens towards the nearest topic and leaves the residual's odds, the literal one ends at the residual."
    h, g = draw(seed, 20, 6), draw(seed + 50, 3, 6)
    near = torch.cdist(h, g).argmin(1)
    for r in ("ours", "literal"):
        logit = torch.zeros(20, 4, dtype=torch.float64, requires_grad=True)
        opt = torch.optim.Adam([logit], .1)
        for _ in range(150):
            opt.zero_grad(); ttm_loss(h, g, logit.softmax(-1), .4, r).backward(); opt.step()
        q = logit.detach().softmax(-1)
        if r == "ours": assert (q[:, 1:].argmax(1) == near).all() and logit.detach()[:, 0].abs().max() < 1e-6
        else: assert (q[:, 0] > .9).all()


@pytest.mark.parametrize("seed", range(3))
def test_ttm_literal_collapses_a_tuned_base(seed):
    "Even at weight 0.1 the literal loss draws the states of different words together; ours does not touch them."
    spread = {}
    for r in ("ours", "literal"):
        h, g, W = draw(seed, 40, 256, t=torch.float32).requires_grad_(), torch.zeros(1, 256, requires_grad=True), draw(seed + 7, 10, 256, t=torch.float32)/16
        opt, x = torch.optim.Adam([h, g], .05), torch.arange(40) % 10
        for _ in range(60):
            opt.zero_grad(); (F.cross_entropy(h@W.T, x) + .1*ttm_loss(h, g, torch.tensor([.1, .9]).expand(40, 2), .4, r)).backward(); opt.step()
        spread[r] = h.detach().std(0).mean()
    assert spread["literal"] < .15*spread["ours"]


def test_dropped_tokens_keep_their_places_and_types():
    x = draw(1, 3, 50, 4).to(torch.bfloat16)
    y = drop_tokens(x, .5, gen(2))
    gone = (y == 0).all(-1)
    assert y.dtype == x.dtype and torch.equal(y[~gone], x[~gone]) and 40 < gone.sum() < 110
    ids = torch.arange(150).view(3, 50) + 1
    assert torch.equal(drop_tokens(ids, .5, gen(2), fill=0) == 0, gone), "ids and embeddings lose the same places on the same seed"
    assert not torch.equal(drop_tokens(ids, .5, gen(3)), drop_tokens(ids, .5, gen(2)))
    h = x.float().requires_grad_(); drop_tokens(h, .5, gen(2)).sum().backward()
    assert torch.equal(h.grad[..., 0] == 0, gone), "no gradient into a dropped token"


# ---- MRM

@pytest.mark.parametrize("B,n,d", [(1, 2, 1), (3, 7, 5), (8, 49, 16)])
def test_mrm_is_the_slow_mean(B, n, d):
    p, v = draw(1, B, n, d), draw(2, B, n, d)
    w, m = mask_regions(v, .3, gen(3))
    each = [(p[i, j] - v[i, j]).square().sum() for i in range(B) for j in range(n) if m[i, j]]
    assert torch.allclose(mrm_loss(p, v, m), sum(each)/len(each)/d, rtol=1e-12)
    assert torch.allclose(mrm_loss(p, v, m, "literal"), sum(each)/len(each), rtol=1e-12)
    assert mrm_loss(v, v, m) == 0
    far = p.masked_fill(~m[..., None], 1e9)
    assert torch.equal(mrm_loss(far, v, m), mrm_loss(p, v, m)), "what is said of a visible region does not count"


@pytest.mark.parametrize("p", [1e-9, .15, .5, .999, 1.])
@pytest.mark.parametrize("n", [2, 3, 50])
def test_some_region_is_hidden_and_some_is_seen(p, n):
    real = torch.arange(n) < torch.randint(0, n + 1, (300, 1), generator=gen(n))
    _, m = mask_regions(draw(1, 300, n, 2), p, gen(2), real)
    k, of = m.sum(1), real.sum(1)
    assert not (m & ~real).any() and (k[of > 1] >= 1).all() and (k[of > 1] < of[of > 1]).all() and not k[of < 2].any()


def test_mrm_of_one_token_is_skipped_whatever_it_holds():
    for bad in (torch.nan, torch.inf):
        p = torch.full((4, 1, 3), bad, requires_grad=True)
        loss = mrm_loss(p, torch.full((4, 1, 3), bad), torch.ones(4, 1, dtype=torch.bool)); loss.backward()
        assert loss == 0 and not p.grad.any()


class Mal(nn.Module):
    "MaL, and in place of MAM the mean over positions."
    def __init__(self, d): super().__init__(); self.mal, self.f = nn.Sequential(nn.Linear(d, 24), nn.GELU(), nn.Linear(24, d)), RegionHead(d, d)
    def forward(self, v): h = self.mal(v); return self.f(h + h.mean(1, keepdim=True))


@pytest.mark.parametrize("seed", range(3))
def test_mrm_literal_collapses_mal_and_ours_beats_the_mean(seed):
    regions = lambda s, B=64: draw(s, B, 1, 6, t=torch.float32) + .3*draw(s + 5000, B, 4, 6, t=torch.float32)
    spread = {}
    for r in ("ours", "literal"):
        torch.manual_seed(seed); net = Mal(6); opt = torch.optim.Adam(net.parameters(), .01)
        probe = regions(9999 + seed, 500); before = net.mal(probe).std(0).mean().item()
        for s in range(150):
            v = regions(s + 1000*seed); w, m = mask_regions(v, .15, gen(s))
            loss = mrm_loss(net(w), net.mal(v) if r == "literal" else v, m, r)
            opt.zero_grad(); loss.backward(); opt.step()
        spread[r] = net.mal(probe).std(0).mean().item()/before
        if r == "ours":
            w, m = mask_regions(probe, .15, gen(1)); m0 = torch.zeros_like(probe)
            assert mrm_loss(net(w), probe, m) < .5*mrm_loss(m0, probe, m), "hidden regions are not told from the others"
            assert net.mal[0].weight.grad.abs().sum() > 0
        else: assert loss.item() < .05
    assert spread["literal"] < .3 and spread["ours"] > .8


# ---- ITM

def loops(a, x, ids, form, eps, tau, literal=False):
    if not (literal and form == "triplet"): a, x = F.normalize(a, dim=-1), F.normalize(x, dim=-1)
    n = range(len(ids)); other = lambda i: [j for j in n if (j != i if literal else ids[j] != ids[i])]
    if not any(other(i) for i in n): return a.new_zeros(())
    if form == "triplet":
        t = [((a[i] - x[i]).norm() - (a[i] - x[j]).norm() + eps).clamp(min=0) for i in n for j in other(i)]
        return sum(t)/len(t)
    one = lambda s: sum(torch.logsumexp(s[i, [i, *other(i)]]/tau, 0) - s[i, i]/tau for i in n)/len(ids)
    return (one(a@x.T) + one(x@a.T))/2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(6))
def test_itm_is_the_loops(form, seed):
    rng = random.Random(seed); n = rng.choice((2, 5, 12))
    ids = [rng.choice("abcd") for _ in range(n)]
    a, x = draw(seed, n, 5), draw(seed + 100, n, 5)
    for literal in (False, True):
        got = itm_loss(a, x, ids, form, .3, .2, "literal" if literal else "ours")
        assert torch.allclose(got, loops(a, x, ids, form, .3, .2, literal), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_no_same_image_pair_is_a_negative(seed):
    "Texts of one image may do as they like to each other: no gradient passes from one image to a sister text."
    ids = [0, 0, 0, 1, 1, 2]
    N = negatives(ids); assert torch.equal(N, N.T) and not N.diagonal().any()
    assert all(bool(N[i, j]) == (ids[i] != ids[j]) for i in range(6) for j in range(6))
    for form in FORMS:
        for i in range(6):
            a, x = draw(seed, 6, 5), draw(seed + 10, 6, 5).requires_grad_()
            a_i = a.clone(); a_i[i] += .01*draw(seed + 20, 5)
            grad = lambda a, r: torch.autograd.grad(itm_loss(a, x, ids, form, 100., 1., r), x)[0]  # every hinge is active
            sisters = [j for j in range(6) if j != i and ids[j] == ids[i]]
            moved, lit = grad(a_i, "ours") - grad(a, "ours"), grad(a_i, "literal") - grad(a, "literal")
            assert all(moved[j].abs().max() < 1e-12 for j in sisters) and all(lit[j].abs().max() > 1e-6 for j in sisters)
            assert all(moved[j].abs().max() > 1e-6 for j in range(6) if ids[j] != ids[i]), "negatives do feel the image"


@pytest.mark.parametrize("seed", range(4))
def test_literal_itm_never_falls_below_the_charge_for_sisters(seed):
    "Whatever the vectors, five captions of one image cost at least the margin literally, and nothing in our reading."
    a = draw(seed, 1, 6).expand(5, 6) * 3; x = draw(seed + 1, 5, 6)
    assert itm_loss(a, x, [0]*5, epsilon=.2, reading="literal") >= .2 - 1e-12 and itm_loss(a, x, [0]*5) == 0
    assert itm_loss(a, x, [0]*5, "contrastive") == 0 and itm_loss(a, x, [0]*5, "contrastive", reading="literal") > .5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("t", [torch.float32, torch.bfloat16])
def test_itm_is_never_nan(form, t):
    for n, ids in ((1, ["x"]), (4, ["x"]*4), (4, [1, 1, 2, 3]), (0, [])):
        for make in (lambda: draw(n, n, 8), lambda: torch.zeros(n, 8), lambda: 1e30*torch.ones(n, 8)):
            a, x = make().to(t).requires_grad_(), make().to(t).requires_grad_()
            loss = itm_loss(a, x, ids, form); loss.backward()
            assert torch.isfinite(loss) and torch.isfinite(a.grad).all() and torch.isfinite(x.grad).all()
            if len(set(ids)) < 2: assert loss == 0


def test_itm_learns_to_match():
    "Texts that say what their images show are matched by training, on pairs not seen."
    torch.manual_seed(0); f_a, f_x, mix = nn.Linear(6, 6), nn.Linear(6, 6), draw(1, 6, 6, t=torch.float32)
    for form in FORMS:
        opt = torch.optim.Adam([*f_a.parameters(), *f_x.parameters()], .01)
        for _ in range(200):
            z = torch.randn(24, 6); loss = itm_loss(f_a(z), f_x(z@mix), range(24), form); opt.zero_grad(); loss.backward(); opt.step()
        z = torch.randn(100, 6); near = torch.cdist(F.normalize(f_a(z), dim=-1), F.normalize(f_x(z@mix), dim=-1)).argmin(1)
        assert (near == torch.arange(100)).float().mean() > .5


@pytest.mark.parametrize("seed", range(2))
def test_text_that_sees_the_image_wins_without_reading(seed):
    left = {}
    for sees in (True, False):
        torch.manual_seed(seed); f_a, f_x = nn.Linear(8, 8), nn.Linear(16, 8); opt = torch.optim.Adam([*f_a.parameters(), *f_x.parameters()], .01)
        for _ in range(150):
            a, x = torch.randn(2, 32, 8); loss = itm_loss(f_a(a), f_x(torch.cat([x, a*sees], 1)), range(32)); opt.zero_grad(); loss.backward(); opt.step()
        left[sees] = loss.item()
    assert left[True] < .02 and left[False] > .15


@pytest.mark.parametrize("side", ["left", "right", "ragged"])
def test_cls_stands_after_the_last_real_token(side):
    cls, B, T = ClsTokens(4), 5, 7
    n = torch.tensor([0, 1, 3, 7, 5])
    keep = {"left": torch.arange(T) >= T - n[:, None], "right": torch.arange(T) < n[:, None], "ragged": torch.rand(B, T, generator=gen(1)) < .5}[side]
    H = draw(1, B, T, 4, t=torch.float32); got, real, at = cls.text(H, keep)
    for b in range(B):
        places = keep[b].nonzero()[:, 0].tolist(); end = places[-1] + 1 if places else 0
        assert at[b] == end and torch.equal(got[b, end], cls.x) and real[b].nonzero()[:, 0].tolist() == [*places, end]
        for j in places: assert torch.equal(got[b, j], H[b, j])
    got[torch.arange(B), at].sum().backward(); assert torch.equal(cls.x.grad, torch.full((4,), float(B))) and cls.a.grad is None


# ---- the sum

@pytest.mark.parametrize("seed", range(3))
def test_total_is_the_weighted_sum(seed):
    rng = random.Random(seed); w = Weights(*(rng.random() for _ in range(3)))
    parts = {k: torch.tensor(rng.random(), requires_grad=True) for k in ("tcm", "mrm", "itm", "ttm") if k == "tcm" or rng.random() < .7}
    loss, log = total_loss(parts, w); loss.backward()
    assert abs(loss.item() - sum(getattr(w, k, 1.)*v.item() for k, v in parts.items())) < 1e-6 and set(log) == set(parts)
    for k, v in parts.items(): assert abs(v.grad.item() - getattr(w, k, 1.)) < 1e-7


def test_total_names_what_went_wrong():
    one = torch.tensor(1., requires_grad=True)
    for k in ("tcm", "mrm", "itm", "ttm"):
        for bad in (torch.nan, torch.inf):
            with pytest.raises(TrainingError, match=f"part {k}"): total_loss({"tcm": one, k: one*bad})
    loss, _ = total_loss({"tcm": one, "itm": one*torch.nan}, Weights(itm=0)); loss.backward()
    assert loss == 1 and torch.isfinite(one.grad)
    with pytest.raises(ConfigError): total_loss({"tcm": one, "mam": one})
    with pytest.raises(CapnbError): Weights(mrm=float("inf"))
