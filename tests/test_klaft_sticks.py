"The stick-breaking prior of TCM: weights, losses, training, files, on every way to topic control."
import math
import pytest, torch
from capnb.core.errors import ConfigError
from capnb.klaft.mixture import naive_log_probs, stick_log_prior
from capnb.klaft.topics import TopicControl


def draw(*shape, seed=0, scale=1.): return scale*torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shaken(c, seed=3):
    with torch.no_grad():
        for i, p in enumerate(c.parameters()): p += .5*draw(*p.shape, seed=seed + i)
    return c


@pytest.mark.parametrize("K", [1, 2, 7, 40])
def test_weights_are_broken_off_one_after_another(K):
    a, rest, want = draw(3, K, scale=3.).double(), torch.ones(3, dtype=torch.double), []
    for v in a.sigmoid().unbind(-1): want.append(v*rest); rest = rest*(1 - v)
    torch.testing.assert_close(stick_log_prior(a).exp(), torch.stack([*want, rest], -1))


@pytest.mark.parametrize("gamma", [.2, 1., 6.])
def test_concentration_spreads_the_topics(gamma):
    c = TopicControl(4, 30, prior="stick")
    with torch.no_grad(): c.log_gamma.fill_(math.log(gamma))
    pi = c.log_prior(draw(5, 4)).exp()[0]
    k = torch.arange(1, 30)
    torch.testing.assert_close(pi[1:-1], .1*gamma**(k - 1)/(1 + gamma)**k, rtol=1e-4, atol=1e-7)
    assert abs(pi[0] - .9) < 1e-6 and abs(pi.sum() - 1) < 1e-5
    most = int((pi[1:].cumsum(0) < .099).sum()) + 1  # topics that hold 99 % of what the residual leaves
    assert most == {.2: 3, 1.: 7, 6.: 30}[gamma]


@pytest.mark.parametrize("transform", ["addition", "multiplication", "affine"])
def test_loss_and_posterior_are_those_of_the_naive_mixture(transform):
    c, head = shaken(TopicControl(6, 5, prior="stick", transform=transform)), torch.nn.Linear(6, 23)
    h, x = draw(4, 6), torch.tensor([0, 22, 7, 7])
    log_p = naive_log_probs(h, head, c.log_prior(h), c.topics, c.omega, transform)
    torch.testing.assert_close(c.nll(h, head, x), -log_p.gather(1, x[:, None])[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(4))
    torch.testing.assert_close(c.posterior(h, head, x).sum(-1), torch.ones(4))
    c.nll(h, head, x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in c.parameters()) and c.log_gamma.grad != 0
    c.alpha = 0.
    torch.testing.assert_close(c.log_probs(h, head), head(h).log_softmax(-1))


def test_as_a_tuning_method_with_files(tmp_path):
    from capnb.data.scenes import Scenes
    from capnb.models.load import load_captioner
    from capnb.tune.methods import attach
    base, r = load_captioner("tiny"), list(Scenes("target", 2))
    likely = lambda: base.log_prob([x.load_image() for x in r], [x.captions[0] for x in r])[0]
    before = likely()
    tuned = attach(base, "tcm", num_topics=6, prior="stick")
    shaken(tuned.control); after = likely()
    assert tuned.control.W_TZ.shape[1] == 6 and not torch.allclose(before, after)
    tuned.save(tmp_path); config = tuned.config; tuned.detach()
    assert torch.equal(likely(), before) and config["prior"] == "stick"
    again = attach(base, "tcm", **config); again.load(tmp_path)
    assert torch.equal(likely(), after); again.detach()
    with pytest.raises(ConfigError, match="softmax"): attach(base, "tcm", prior="dirichlet")


def test_as_a_captioner_learns():
    from capnb.klaft.captioner import KLAFTCaptioner
    from capnb.klaft.objective import klaft_objective
    from capnb.models.clipcap import language_model
    from capnb.models.features import caption_tokenizer, toy_pairs
    from capnb.train.config import TrainConfig
    from capnb.train.loop import train
    pairs = toy_pairs(); tokenizer = caption_tokenizer([p["caption"] for p in pairs])
    torch.manual_seed(0); lm = language_model(None, tokenizer, n_embd=32, n_layer=2, n_head=2, n_positions=48).eval()
    c = KLAFTCaptioner.from_parts(None, lm, tokenizer, feature_width=8, num_topics=12, topics=dict(prior="stick")).init_topics(pairs)
    ran = train(c, pairs, klaft_objective(c), TrainConfig(steps=12, batch_size=9, lr=1e-2, warmup=2))
    assert ran.loss < ran.history[0]["loss"] - .3 and c.topics.concentration != 1
