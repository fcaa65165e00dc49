"The topic mixture at its limits: sizes and logits that break fp32, low precision, memory, changed weights, real models."
import copy, math
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from capnb.klaft.fused import mixture_nll
from capnb.klaft.mixture import TRANSFORMS, mixture_log_probs, naive_log_probs, streamed_log_probs
from capnb.klaft.topics import TopicControl, caption_states, init_topics, softcap_of, topic_map

close = torch.testing.assert_close


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    "Small tensors: on a busy machine two threads would mostly wait for each other."
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def draw(*shape, seed=0, scale=1.): return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(d, V, bias=True, seed=0):
    head = nn.Linear(d, V, bias=bias)
    with torch.no_grad():
        head.weight.copy_(draw(V, d, seed=seed))
        if bias: head.bias.copy_(draw(V, seed=seed + 1))
    return head


def control(d, K, seed=5, **kw):
    c = TopicControl(d, K, **kw)
    with torch.no_grad(): c.g.add_(draw(K, d, seed=seed)); c.W_TZ.add_(draw(d, K + 1, seed=seed + 1)); c.beta[:1].zero_()
    return c


def all_grads(y, leaves, seed=9):
    return torch.autograd.grad((y * draw(*y.shape, seed=seed)).sum(), leaves, allow_unused=True)


@pytest.mark.parametrize("omega", [0., .05, .2, .4, .9, 1.])
@pytest.mark.parametrize("K,V,bias", [(1, 7, True), (10, 3000, True), (20, 500, False)])
def test_factored_is_naive(omega, K, V, bias):
    head, h, g, a = layer(32, V, bias), draw(4, 6, 32, seed=2), draw(K, 32, seed=3), draw(4, 6, K + 1, seed=4)
    got = []
    for f in (lambda h, g, p: mixture_log_probs(head(h), head(g), p, omega), lambda h, g, p: naive_log_probs(h, head, p, g, omega)):
        leaves = [x.clone().requires_grad_() for x in (h, g, a)]
        y = f(*leaves[:2], leaves[2].log_softmax(-1))
        got.append((y, *all_grads(y, [*leaves, *head.parameters()])))
    close(got[0][0], got[1][0], rtol=1e-5, atol=1e-5)
    close(got[0][0].exp().sum(-1), torch.ones(4, 6), rtol=0, atol=1e-5)
    scale = max(1, V**.5 / 10)  # what arrives at the words sums up to about sqrt(V), and cancels
    for x, y in zip(*(o[1:] for o in got)): close(x, y, rtol=1e-3, atol=1e-5 * max(scale, y.abs().max().item()))


@pytest.mark.parametrize("omega", [.2, .5, 1.])
@pytest.mark.parametrize("lift", [30., 120., 400., 5000.])
def test_a_word_only_a_topic_likes(omega, lift):
    "From where fp32 factors serve to where rows go to log space, values and gradients follow double precision."
    b, t, p = draw(5, 60, scale=4.), draw(3, 60, seed=1, scale=4.), draw(5, 4, seed=2).log_softmax(-1)
    b[:3, 7], t[1, 7] = -lift, lift
    got = []
    for f, kind in ((mixture_log_probs, torch.float32), (streamed_log_probs, torch.float64)):
        leaves = [x.detach().to(kind).requires_grad_() for x in (b, t, p)]
        y = f(*leaves, omega)
        got.append((y, *all_grads(y, leaves)))
    close(got[0][0].double(), got[1][0], rtol=2e-6, atol=1e-5 + 4e-7 * lift)
    for x, y in zip(*(o[1:] for o in got)): close(x.double(), y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("omega", [0., .2, 1.])
def test_huge_logits_stay_finite(omega):
    b, t, p = (x.requires_grad_() for x in (draw(8, 300, scale=1e4), draw(4, 300, seed=1, scale=1e4), draw(8, 5, seed=2).log_softmax(-1)))
    y = mixture_log_probs(b, t, p, omega)
    assert y.isfinite().all() and all(g.isfinite().all() for g in all_grads(y, (b, t, p)))
    close(y.exp().sum(-1), torch.ones(8), rtol=0, atol=1e-2)  # logits of 1e4 are known to 1e-3 only
    W, g, x = draw(300, 16, scale=1e3), draw(4, 16, seed=3, scale=10.).requires_grad_(), torch.arange(8)
    h = draw(8, 16, seed=4).requires_grad_()
    loss = mixture_nll(h, W, None, g, p, omega, x)
    assert loss.isfinite().all() and all(v.isfinite().all() for v in torch.autograd.grad(loss.sum(), (h, g, p)))


def test_the_residual_alone_and_topics_alone():
    b, t = draw(6, 50), draw(2, 50, seed=1)
    only = lambda z: torch.full((6, 3), -math.inf).index_fill(1, torch.tensor([z]), 0.)
    close(mixture_log_probs(b, t, only(0), .4), b.log_softmax(-1))
    for z in (1, 2): close(mixture_log_probs(b, t, only(z), .4), (.6 * b + .4 * t[z - 1]).log_softmax(-1))
    p = only(1).requires_grad_(); b.requires_grad_()
    assert all(g.isfinite().all() for g in all_grads(mixture_log_probs(b, t, p, .4), (b, p)))


@pytest.mark.parametrize("where", ["forward", "both"])
def test_autocast(where):
    "The layer runs in bf16, the mixture in fp32; the fused loss sees the same logits."
    head, h, c, x = layer(32, 400), draw(3, 20, 32, seed=2), control(32, 5), torch.arange(60).reshape(3, 20)
    got = []
    for f in (lambda h: cross_entropy(c.log_probs(h, head).flatten(0, 1), x.flatten()), lambda h: c.nll(h, head, x, 16).mean(),
              lambda h: -naive_log_probs(h, head, c.log_prior(h), c.g, .2).gather(-1, x[..., None]).mean()):
        z = h.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = f(z)
            if where == "both": grads = torch.autograd.grad(loss, [z, *c.parameters(), *head.parameters()])
        if where == "forward": grads = torch.autograd.grad(loss, [z, *c.parameters(), *head.parameters()])
        assert loss.dtype == torch.float32 and all(g.isfinite().all() for g in grads)
        got.append((loss, *grads))
    close(got[0][0], got[1][0], rtol=1e-5, atol=1e-5)
    close(got[0][0], got[2][0], rtol=1e-2, atol=1e-2)
    for a, b in zip(got[0][1:], got[1][1:]): close(a, b, rtol=5e-2, atol=1e-2 * b.abs().max().item())


def test_bf16_weights():
    head, c, h = layer(16, 90).bfloat16(), control(16, 3), draw(7, 16, seed=2).bfloat16()
    want = naive_log_probs(h.float(), copy.deepcopy(head).float(), c.log_prior(h), c.g, .2)
    for low in (c, copy.deepcopy(c).bfloat16()):
        y = low.log_probs(h, head)
        assert y.dtype == torch.float32
        close(y, want, rtol=5e-2, atol=.15)
        low.nll(h, head, torch.arange(7)).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in low.parameters())


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_loss_in_chunks(chunk):
    head, c, h, x = layer(16, 90), control(16, 4, learn_omega=True), draw(5, 6, 16, seed=2), torch.randint(90, (5, 6), generator=torch.Generator().manual_seed(1))
    x[1] = -100; x[0, 3] = -1
    got = []
    for f in (lambda h: c.nll(h, head, x, chunk), lambda h: -naive_log_probs(h, head, c.log_prior(h), c.g, c.omega).gather(-1, x.clamp(min=0)[..., None])[..., 0] * (x >= 0)):
        z = h.clone().requires_grad_()
        y = f(z)
        got.append((y, *all_grads(y, [z, *c.parameters(), *head.parameters()])))
    for a, b in zip(*got): close(a, b, rtol=1e-3, atol=1e-5 * max(1, b.abs().max().item()))
    assert c.nll(h[:0], head, x[:0], chunk).shape == (0, 6)
    y = c.nll(h, head, x * 0 - 100, chunk)
    assert (y == 0).all() and all((g == 0).all() for g in all_grads(y, [*c.parameters()]))


def peak(f):
    "Bytes at the peak of `f` above its start, by the allocator's record."
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: f()
    now = most = 0
    for e in sorted((e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += e.nbytes(); most = max(most, now)
    return most


@pytest.mark.parametrize("T", [64, 600])
def test_memory_of_training(T):
    head, c, h, x = layer(16, 8000).requires_grad_(False), control(16, 10), draw(T, 16, seed=2), torch.arange(T)
    def step(loss):
        z = h.clone().requires_grad_()
        loss(z).backward(); c.zero_grad()
    plain = lambda: step(lambda z: cross_entropy(head(z), x))
    fused, full = lambda: step(lambda z: c.nll(z, head, x).mean()), lambda: step(lambda z: cross_entropy(c.log_probs(z, head), x))
    for f in (plain, fused, full): f()
    base = peak(plain)
    assert base > 2 * T * 8000 * 4 * .9
    assert peak(fused) <= 2.5 * base
    assert peak(full) <= 2.5 * base


@pytest.mark.parametrize("form", TRANSFORMS)
@pytest.mark.parametrize("mixture", ["prob", "hidden"])
def test_forms_and_levels(form, mixture):
    head, c, h, x = layer(16, 90), control(16, 4, transform=form, mixture=mixture), draw(2, 6, 16, seed=2), torch.arange(12).reshape(2, 6)
    y = c.log_probs(h, head)
    close(y.exp().sum(-1), torch.ones(2, 6), rtol=0, atol=1e-5)
    close(c.nll(h, head, x), -y.gather(-1, x[..., None])[..., 0], rtol=1e-4, atol=1e-5)
    q = c.posterior(h, head, x)
    close(q.sum(-1), torch.ones(2, 6)); assert q.shape == (2, 6, 5)
    c.alpha = 0.
    close(c.log_probs(h, head), head(h).log_softmax(-1), rtol=1e-4, atol=1e-5)


def test_kept_topics_follow_the_weights():
    head, c, h = layer(16, 90), control(16, 3, learn_omega=True), draw(4, 16, seed=2)
    def agree():
        with torch.no_grad(): close(c.log_probs(h, head), naive_log_probs(h, head, c.log_prior(h), c.g, c.omega), rtol=1e-4, atol=1e-5)
    agree()
    for change in (lambda: c.g.data.mul_(2), lambda: head.weight.data.add_(.1), lambda: c.omega_logit.data.add_(1), lambda: head.bias.data.zero_(),
                   lambda: c.load_state_dict(control(16, 3, seed=8, learn_omega=True).state_dict()), lambda: head.double().float()):
        change(); agree()
    other = layer(16, 90, seed=7)
    with torch.no_grad(): close(c.log_probs(h, other), naive_log_probs(h, other, c.log_prior(h), c.g, c.omega), rtol=1e-4, atol=1e-5)
    agree(); copy.deepcopy(c).state_dict()
    assert c.topic_logits(nn.Sequential(head)).shape == (3, 90)  # not a plain layer: nothing is kept


@torch.no_grad()
@pytest.mark.parametrize("kw", [{}, dict(learn_omega=True), dict(softcap=5.), dict(transform="affine"), dict(mixture="hidden")])
def test_equal_calls_give_equal_bits(kw):
    "The first call, which keeps the topics' logits, and those that use them."
    head, c, h, x = layer(64, 3000), control(64, 7, **kw), draw(9, 64, seed=2), torch.arange(9)
    first, q = c.log_probs(h, head), c.posterior(h, head, x)
    c._cache = None
    assert torch.equal(c.posterior(h, head, x), q)
    for _ in range(2): assert torch.equal(c.log_probs(h, head), first)


def test_a_squeezed_model():
    "Gemma-2's squeeze belongs to every component; with no topic the mixture is the model."
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma2Config(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                                       num_key_value_heads=1, head_dim=8, final_logit_softcapping=.1)
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(config).eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        want, h = model(ids).logits.log_softmax(-1), model.model(ids).last_hidden_state
        close(TopicControl(16, 0, softcap=softcap_of(config)).log_probs(h, model.lm_head), want)
        c = control(16, 3, softcap=softcap_of(config))
        P = sum(c.log_prior(h)[..., z:z + 1].exp() * (.1 * torch.tanh(model.lm_head(h if z == 0 else .8 * h + .2 * c.g[z - 1]) / .1)).softmax(-1) for z in range(4))
        close(c.log_probs(h, model.lm_head), P.log(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["mean", "kmeans"])
@pytest.mark.parametrize("seen", [True, False])
def test_topics_separate_when_trained(how, seen):
    """Two kinds of contexts, each with twenty words of its own, more than one topic can lift: each kind gets its topic.
    Kinds that differ by a shift of all coordinates get none: the prior's LayerNorm takes the mean away (equation 4)."""
    head, d = layer(8, 40, seed=3).requires_grad_(False), 8
    e = torch.tensor([1., -1.]).repeat(d // 2) if seen else torch.ones(d)
    h = torch.cat([draw(60, d, seed=1, scale=.3) + e, draw(60, d, seed=2, scale=.3) - e])
    x = torch.cat([(head.weight @ v).topk(20).indices[torch.randint(20, (60,), generator=torch.Generator().manual_seed(4))] for v in (-e, e)])
    c = TopicControl(d, 2, omega=.4).init(torch.cat([-h[:5], -h[-5:]]), how)
    start, opt = c.nll(h, head, x).mean().item(), torch.optim.Adam(c.parameters(), .1)
    for _ in range(60):
        loss = c.nll(h, head, x).mean(); opt.zero_grad(); loss.backward(); opt.step()
    first, second = c.log_prior(h).exp().detach().split(60)
    apart = (first.mean(0) - second.mean(0)).abs().max()
    assert loss < .65 * start
    assert apart > .9 if seen else apart < .2


def test_on_the_small_captioner():
    from capnb.data.scenes import Scenes
    from capnb.models.tiny import load_tiny
    captioner, records = load_tiny(), [r for r in Scenes(n=6, seed=3)]
    h, words, of = caption_states(captioner, records)
    c = init_topics(captioner, TopicControl(h.shape[1], 5), records)
    nll = torch.zeros(len(records)).index_add_(0, of, TopicControl(h.shape[1], 0).nll(h, captioner.head, words).detach())
    want, _ = captioner.log_prob(records, [r.captions[0] for r in records])
    close(-nll, want, rtol=1e-4, atol=1e-3)
    m = topic_map(captioner, c, records[0], records[0].captions[0])
    assert m.words == captioner.tokenizer.decode(captioner.caption_ids(records[0].captions[0]), skip_special_tokens=True).split()
    assert all(abs(sum(q) - 1) < 1e-3 for q in m.posterior + m.prior)
