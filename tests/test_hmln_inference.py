"Inference in ground networks: every solver against enumeration, against each other, and against identities of log Z."
import importlib.util, math, pickle
from itertools import combinations, product

import numpy as np
import pytest

from capnb.core.errors import CapnbError, ConfigError, DataError
from capnb.hmln import GroundNetwork
from capnb.hmln.compiled import CompiledPlan
from capnb.hmln.elimination import bucket_elimination
from capnb.hmln.fast import Pass, Plan, eliminated, plan_for, with_weights
from capnb.hmln.gibbs import anneal, gibbs, importance
from capnb.hmln.milp import Visual, abduce, solve, solve_toulbar2
from capnb.hmln.network import enumerate_states

NUMBA = bool(importlib.util.find_spec("numba"))


def random_net(n, d, rng, scale=1.0, k=0):
    "n atoms, n * d random pairs with repeats and loops, n // 3 conjunctions of up to k atoms."
    e = rng.integers(0, n, (int(n * d), 2))
    more = [(rng.integers(0, n, rng.integers(0, k + 1)), rng.normal() * scale) for _ in range(n // 3 if k else 0)]
    return GroundNetwork.from_arrays(rng.normal(size=n) * scale, e, rng.normal(size=len(e)) * scale, more)


def caption_net(n, queries, rng, scale=1.0):
    "Like a network from captions: groups of 1-4 atoms joined inside, XOR pairs from a few query atoms to some others."
    e, w, u, at = [], [], rng.normal(size=n) * scale, 0
    while at < n:
        group = list(range(at, min(n, at + rng.integers(1, 5)))); at = group[-1] + 1
        if rng.random() < 0.5 and group[0]: group.append(int(rng.integers(group[0])))
        for a, b in combinations(group, 2): e.append((a, b)); w.append(rng.normal() * scale)
    for q in range(queries):
        for i in rng.choice(n, n // 25, replace=False):
            if i != q: v = rng.normal() * scale; u[q] += v; u[i] += v; e.append((q, int(i))); w.append(-2 * v)
    return GroundNetwork.from_arrays(u, e, w)


def check(net, eps=1e-9):
    best, log_z, p = enumerate_states(net)
    got, z, m = net.map(), net.log_z(), net.marginals()
    size = eps * max(1.0, abs(best.value))
    assert got.exact and z.exact and m.exact and got.gap == 0
    assert abs(got.value - best.value) <= size and abs(z - log_z) <= size and np.abs(m - p).max(initial=0) <= eps
    assert abs(net.score(got.state) - best.value) <= size and got.state.shape == (net.n,)
    return best, log_z, p


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0, 500.0])
@pytest.mark.parametrize("k", [0, 3, 6])
def test_brute_force(scale, k):
    rng = np.random.default_rng(int(scale * 100) + k)
    for n in (1, 2, 3, 5, 8, 11, 13):
        for d in (0, 0.5, 1.5, 4):
            net = random_net(n, d, rng, scale, k)
            best, log_z, _ = check(net, 1e-9 if scale < 100 else 1e-8)
            assert abs(bucket_elimination(net) - log_z) < 1e-8 * max(1, scale) and abs(bucket_elimination(net, np.maximum) - best.value) < 1e-8 * max(1, scale)
            for plan in [CompiledPlan(net, compiled=c) for c in (False, True)[:1 + NUMBA]]:
                run, old = plan.run(net), Pass(Plan(net), net)
                assert abs(run.best - best.value) < 1e-8 * max(1, scale) and abs(run.log_z - log_z) < 1e-8 * max(1, scale)
                assert abs(net.score(run.state()) - best.value) < 1e-8 * max(1, scale)
                for a, b in zip(run.expect(), old.expect()): assert np.abs(a - b).max(initial=0) < 1e-9


def test_brute_force_18_atoms():
    rng = np.random.default_rng(18)
    for d, k in ((1.0, 0), (2.5, 0), (9.0, 0), (1.0, 5)): check(random_net(18, d, rng, k=k))
    full = list(combinations(range(19), 2))  # width 18
    check(GroundNetwork.from_arrays(rng.normal(size=19), full, rng.normal(size=len(full))))


def test_structures():
    rng = np.random.default_rng(5)
    ring = [(i, (i + 1) % 12) for i in range(12)]
    grid = [(i, j) for i in range(12) for j in (i + 1, i + 4) if j < 12 and (j != i + 1 or (i + 1) % 4)]
    star = [(0, i) for i in range(1, 12)]
    full = list(combinations(range(12), 2))
    for e in (ring, grid, star, full, [], ring[:5] + [(8, 9)]):
        check(GroundNetwork.from_arrays(rng.normal(size=12), e, rng.normal(size=len(e)) * 2))
    check(GroundNetwork.from_arrays(np.zeros(6), [], [], {tuple(range(6)): 3.0}))
    check(GroundNetwork.from_arrays([], [], []))


@pytest.mark.parametrize("k", [0, 4])
def test_evidence(k):
    rng = np.random.default_rng(k)
    for _ in range(6):
        net = random_net(10, 1.5, rng, k=k)
        known = {int(i): int(rng.integers(2)) for i in rng.choice(10, 4, replace=False)}
        part = net.clamp(known)
        x = np.array(list(product([0, 1], repeat=10)))
        x = x[np.all([x[:, i] == v for i, v in known.items()], axis=0)]
        s = net.score(x)
        best, log_z, p = check(part)
        assert np.allclose(part.score(x), s, atol=1e-9) and abs(best.value - s.max()) < 1e-9
        assert abs(part.log_z() - np.logaddexp.reduce(s)) < 1e-9
        assert np.allclose(part.marginals(), np.exp(s - np.logaddexp.reduce(s)) @ x, atol=1e-9)
        step = net
        for i, v in known.items(): step = step.clamp({i: v})
        assert abs(step.log_z() - part.log_z()) < 1e-9
    with pytest.raises(ConfigError): part.clamp({i: 1 - v for i, v in known.items()})
    everything = net.clamp({i: i % 2 for i in range(10)})
    assert everything.log_z() == everything.map().value and everything.marginals().tolist() == [0, 1] * 5


def test_log_z_identities():
    rng = np.random.default_rng(2)
    net = random_net(40, 0.8, rng, k=3).clamp({3: 1, 9: 0})
    run = eliminated(net)
    h, base = 1e-5, run.log_z
    for name, w, grad in zip(("unary", "pair", "clique"), (net.unary, net.pair, net.clique), run.expect()):
        for i in rng.choice(len(w), min(len(w), 12), replace=False):
            if name == "unary" and net.fixed[i] >= 0: continue
            e = np.eye(len(w))[i]
            up, down = (with_weights(net, **{name: w + s * h * e}).log_z() for s in (1, -1))
            assert abs((up - down) / (2 * h) - grad[i]) < 1e-7
            assert abs(math.exp(with_weights(net, **{name: w + math.log(2) * e}).log_z() - base) - 1 - grad[i]) < 1e-9
    for i in (0, 1, 2):
        assert abs(np.logaddexp(net.clamp({i: 1}).log_z(), net.clamp({i: 0}).log_z()) - base) < 1e-9
        assert abs(math.exp(net.clamp({i: 1}).log_z() - base) - net.marginals()[i]) < 1e-9
        assert abs(max(net.clamp({i: 1}).map().value, net.clamp({i: 0}).map().value) - run.best) < 1e-9


def test_mutual_information():
    net = caption_net(30, 2, np.random.default_rng(3))
    alone = GroundNetwork.from_arrays(np.r_[net.unary, .3, .4], [*net.edges.tolist(), (30, 31)], np.r_[net.pair, 1.5])
    info = lambda n, t, q: n.clamp(t | q).log_z() - n.clamp(q).log_z() - n.clamp(t).log_z() + n.log_z()
    t, q = {5: 1, 6: 1}, {0: 1, 1: 1}
    assert abs(info(net, t, q) - info(net, q, t)) < 1e-9 and abs(info(net, t, q) - info(alone, t, q)) < 1e-9
    inside = (net.edges < 10).all(1)
    small = GroundNetwork.from_arrays(net.unary[:10], net.edges[inside], net.pair[inside])
    x = np.array(list(product([0, 1], repeat=small.n))); p = np.exp(small.score(x) - small.log_z())
    P = lambda e: p[(x[:, list(e)] == 1).all(1)].sum()
    t, q = {2: 1, 3: 1}, {0: 1}
    assert abs(info(small, t, q) - math.log(P(t | q) / P(q) / P(t))) < 1e-9
    assert abs(info(alone, {30: 1}, q)) < 1e-9 and abs(info(alone, {30: 1}, {31: 1})) > 1e-3


def test_order_and_split_weights_do_not_matter():
    rng = np.random.default_rng(4)
    for k in (0, 4):
        net = random_net(60, 0.6, rng, k=k)
        new = rng.permutation(60); back = np.argsort(new)
        share = rng.normal(size=len(net.pair))
        moved = GroundNetwork.from_arrays(net.unary[back] * .5, np.r_[new[net.edges], new[net.edges][:, ::-1]], np.r_[share, net.pair - share],
            [(rng.permutation(new[list(c)]), w / 2) for c, w in zip(net.cliques, net.clique)] * 2 + [([i], net.unary[back][i] / 2) for i in range(60)], constant=net.constant)
        assert abs(moved.log_z() - net.log_z()) < 1e-9 and abs(moved.map().value - net.map().value) < 1e-9
        assert np.allclose(moved.marginals()[new], net.marginals(), atol=1e-9) and moved.score(net.map().state[back]) == pytest.approx(net.map().value)


def test_milp_elimination_and_toulbar2_agree():
    rng = np.random.default_rng(6)
    for k, make in enumerate((lambda: random_net(12, 1.5, rng, k=4), lambda: caption_net(120, 3, rng), lambda: random_net(25, 1, rng, 5.0).clamp({0: 1}))):
        net = make(); best = net.map()
        for backend in ("HiGHS", "CBC"):
            if backend == "HiGHS" and not importlib.util.find_spec("highspy"): continue
            for both in (False, True):
                got = solve(net, backend=backend, two_sided=both)
                assert got.exact and abs(got.value - best.value) < 1e-6 and abs(net.score(got.state) - got.value) < 1e-9
        if importlib.util.find_spec("pytoulbar2"): assert abs(solve_toulbar2(net).value - best.value) < 1e-5


def test_caption_sized_network_against_the_literal_version():
    net = caption_net(700, 3, np.random.default_rng(7))
    plan_for(net, engine="numpy")
    assert plan_for(net).width <= 14
    assert abs(net.log_z() - bucket_elimination(net)) < 1e-7 and abs(net.map().value - bucket_elimination(net, np.maximum)) < 1e-7
    assert abs(net.score(net.map().state) - net.map().value) < 1e-8
    if NUMBA:
        old, new = net._kept["pass"], CompiledPlan(net).run(net)
        assert abs(old.log_z - new.log_z) < 1e-8 and np.abs(old.expect()[0] - new.expect()[0]).max() < 1e-9


def test_too_wide_is_never_silent():
    rng = np.random.default_rng(8)
    e = [*combinations(range(14), 2), *((i, i + 1) for i in range(14, 29))]
    net = GroundNetwork.from_arrays(rng.normal(size=30), e, rng.normal(size=len(e)) / 2)
    best, z, p = net.map(), net.log_z(), net.marginals()
    assert best.exact and z.exact
    again = GroundNetwork.from_json(net.to_json())
    with pytest.raises(ConfigError, match="wider than 5"): again.map(method="elimination", width=5)
    got, w, m = again.map(width=5), again.log_z(width=5), again.marginals(width=5)
    assert got.bound >= got.value and got.exact and abs(got.value - best.value) < 1e-5 and "elimination +" in got.method
    assert not w.exact and 0 < w.error < 0.3 and abs(w - z) < 6 * w.error and w.ess > 20
    assert not m.exact and (m.error[:14] > 0).all() and (m.error[14:] == 0).all() and np.abs(m - p).max() < 0.03 and np.allclose(m[14:], p[14:], atol=1e-9)
    big = GroundNetwork.from_arrays(rng.normal(size=40), list(combinations(range(40), 2)), rng.normal(size=780))
    hurried = big.map(method="milp", time_limit=0.05)
    assert not hurried.exact and hurried.gap > 0 and abs(big.score(hurried.state) - hurried.value) < 1e-9


def test_gibbs_errors_are_honest():
    "The reported standard error covers the truth as often as it says; the annealed estimate of Z is unbiased."
    rng = np.random.default_rng(9)
    net = random_net(12, 1.2, rng, 0.7, k=3)
    _, log_z, p = enumerate_states(net)
    far = []
    for seed in range(6):
        m = gibbs(net, chains=32, sweeps=200, burn=50, seed=seed).marginals
        live = m.error > 1e-9  # without neighbours the value is exact
        far += ((m - p) / m.error)[live].tolist(); assert np.abs(m - p)[~live].max(initial=0) < 1e-9
        assert m.rhat.max() < 1.05 and (m.ess > 100).all()
    assert 0.6 < np.std(far) < 1.7 and abs(np.mean(far)) < 0.6
    runs = [anneal(net, chains=128, steps=40, seed=s)[0] for s in range(6)]
    assert abs(np.mean([math.exp(r - log_z) for r in runs]) - 1) < 0.05 and all(abs(r - log_z) < 5 * r.error for r in runs)


def test_importance_weights_reach_the_exact_ratio():
    net = random_net(10, 1.0, np.random.default_rng(10), k=3)
    q = {1: 1, 4: 1, 8: 1}
    exact = net.clamp(q).log_z() - net.log_z()
    x = np.array(list(product([0, 1], repeat=10))); P = np.exp(net.score(x) - net.log_z())
    to = x.copy(); to[:, list(q)] = 1
    u = np.exp(net.score(to) - net.score(x))
    assert abs(P @ u - 2**3 * math.exp(exact)) < 1e-9 * max(1, P @ u)
    assert np.allclose((P * u) @ to / (P @ u), net.clamp(q).marginals(), atol=1e-9)
    s = gibbs(net, chains=128, sweeps=400, burn=100, seed=1, thin=5)
    ratio, given = importance(net, s.states, q)
    assert abs(ratio - exact) < 0.15 and np.abs(given - net.clamp(q).marginals()).max() < 0.06 and not ratio.exact


def test_near_certain_weights_stop_gibbs_and_it_is_seen():
    w = 25.0
    e = list(combinations(range(6), 2))
    net = GroundNetwork.from_arrays(np.r_[-5 * w + 1.5, np.full(5, -5 * w)], e, np.full(15, 2 * w))  # all equal, all on favoured by e^1.5
    exact = net.marginals()
    assert abs(exact[0] - 1 / (1 + math.exp(-1.5))) < 1e-6
    stuck = gibbs(net, chains=64, sweeps=200, burn=50, seed=0).marginals
    assert stuck.rhat.max() > 3 and stuck.ess.min() < 200
    z, _ = anneal(net, chains=512, steps=400, seed=0)
    assert abs(z - net.log_z()) < 5 * z.error


def test_abduction_against_enumeration():
    rng = np.random.default_rng(12)
    for strength in (0.0, 2.0):
        net = random_net(6, 1, rng).clamp({0: 1})
        visual = [Visual(-1, 1, 0.2, strength), Visual(0, 2, 1, strength)]
        terms = [(float(rng.normal() * 3), (int(a), int(b)), t % 2) for t, (a, b) in enumerate(rng.integers(0, 6, (5, 2)))]
        grid = [np.linspace(v.low, v.high, 401) for v in visual]
        truth = -np.inf
        for x in product((0, 1), repeat=6):
            if not x[0]: continue
            s = net.score(x)
            for k, (v, r) in enumerate(zip(visual, grid)):
                on = sum(w for w, c, j in terms if j == k and all(x[i] for i in c))
                s += (on * r - v.strength * (r - v.centre) ** 2).max()
            truth = max(truth, s)
        got = abduce(net, visual, terms, tangents=201)
        assert truth - 1e-3 < got.best.value < truth + 1e-3 and got.best.bound >= truth - 1e-4
        assert got.best.exact or strength


def test_json_and_errors():
    net = GroundNetwork.from_arrays([0.1, 1 / 3, -2e-17], [(0, 2)], [math.pi], {(0, 1, 2): 0.7}, atoms=[("dog", "on", "sofa"), ("dog",), "x"]).clamp({1: 1})
    again = GroundNetwork.from_json(net.to_json())
    net.map(); sent = pickle.loads(pickle.dumps(net)); assert sent.log_z() == net.log_z() and not pickle.loads(pickle.dumps(net))._kept
    assert again.to_json() == net.to_json() and again.atoms == net.atoms and again.log_z() == net.log_z() and again.map().value == net.map().value
    for bad in (lambda: GroundNetwork.from_arrays([1.0], [(0, 1)], [1.0]), lambda: GroundNetwork.from_arrays([1.0, 2], [(0, 1)], [1.0, 2]), lambda: GroundNetwork.from_arrays([[1.0]], [], []),
                lambda: GroundNetwork.from_arrays([np.nan], [], []), lambda: GroundNetwork.from_arrays([1.0], [], [], {(0, 3): 1.0}), lambda: GroundNetwork.from_arrays([1.0], [(0.5, 0)], [1.0]),
                lambda: GroundNetwork.from_json("[]")):
        with pytest.raises(DataError): bad()
    for bad in (lambda: net.map(method="guess"), lambda: net.clamp({9: 1}), lambda: net.clamp({0: 2}), lambda: with_weights(net, pair=[1, 2])):
        with pytest.raises(CapnbError): bad()
