"Learning of HMLN weights on networks like those of captions: gradients, optima, planted weights, and what cannot be learned."
import numpy as np
import pytest

pytest.importorskip("torch")
from capnb.core.errors import CapnbError
from capnb.hmln.divergence import cd_gradient
from capnb.hmln.fast import plan_for
from capnb.hmln.gibbs import gibbs
from capnb.hmln.likelihood import Features, learn, likelihood, paired, states_of, tie, xor_feature
from capnb.hmln.network import enumerate_states
from capnb.hmln.pseudo import pseudo_likelihood
from capnb.metrics.significance import over_seeds

TRUE = {"there": -1.2, "C": .8, "XOR": .5, "on": -.6, "in": .4}


def captions_network(captions, atoms, rng, value=True):
    "Atoms shared by captions; templates C (the whole caption), XOR (random rivals), a unary weight, and one for each of two predicates."
    said = [tuple(rng.choice(atoms, min(atoms, rng.integers(1, 5)), replace=False)) for _ in range(captions)]
    rows = [((i,), "there", 1.) for i in range(atoms)] + [((i,), "on" if i % 2 else "in", 1.) for i in range(atoms) if i % 3]
    rows += [(c, "C", float(rng.uniform(.3, 1)) if value else 1.) for c in said if len(c) > 1]
    for _ in range(captions // 3):
        a, b = rng.choice(atoms, 2, replace=False)
        rows += [(t, "XOR", v) for t, v in xor_feature(a, b, float(rng.uniform(.3, 1)))]
    return rows


def features_of(rows_of_each, atoms):
    names, groups = tie([[label for _, label, _ in rows] for rows in rows_of_each])
    return names, [Features([a for a, _, _ in rows], g, [v for *_, v in rows], n) for rows, g, n in zip(rows_of_each, groups, atoms)]


def network(seed, sizes=((4, 10),)):
    rng = np.random.default_rng(seed)
    names, fs = features_of([captions_network(c, n, rng) for c, n in sizes], [n for _, n in sizes])
    return names, fs, rng


@pytest.mark.parametrize("seed", range(5))
def test_expectations_and_gradients(seed):
    names, fs, rng = network(seed, ((4, 9), (6, 11)))
    w, G = rng.normal(size=len(names)), len(names)
    for f in fs:
        states = np.array(list(np.ndindex(*[2] * f.n)))
        p = np.exp(f.network(w).score(states)); p /= p.sum()
        z, e = f.expected(w, G)
        assert z == pytest.approx(enumerate_states(f.network(w))[1], abs=1e-9)
        assert e == pytest.approx(sum(q * f.counts(s, G) for q, s in zip(p, states)), abs=1e-9)
    data = paired(fs, [rng.integers(0, 2, (5, f.n)) for f in fs])
    for J in (likelihood(data, .3), pseudo_likelihood(data, .3)):
        slope = [(J(w + d)[0] - J(w - d)[0]) / 2e-5 for d in 1e-5 * np.eye(G)]
        assert J(w)[1] == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("engine", ["numpy", "numba"])
def test_both_engines_give_the_same_gradient(engine):
    if engine == "numba": pytest.importorskip("numba")
    names, (f,), rng = network(1, ((60, 300),))
    w = np.array([TRUE[k] for k in names])
    plan_for(f.net, engine=engine)
    z, e = f.expected(w)
    h = 1e-5
    slope = [(f.expected(w + d)[0] - f.expected(w - d)[0]) / (2 * h) for d in h * np.eye(len(w))]
    assert np.isfinite(z) and e == pytest.approx(slope, rel=1e-5, abs=1e-5)


def test_planted_weights_come_back_on_large_networks():
    names, fs, _ = network(0, ((40, 150), (30, 120), (20, 90)))
    true = np.array([TRUE[k] for k in names])
    found = []
    for seed in range(5):
        states = [gibbs(f.network(true), chains=120, sweeps=1, burn=300, seed=100 * seed + k).x[:-1].T.numpy().astype(int) for k, f in enumerate(fs)]
        got = learn(fs, states, l2=0)
        assert got.converged
        seen, model = (sum(f.counts(x, 5) for f, x in zip(fs, states)), sum(f.expected(got.weights, 5)[1] for f in fs))
        assert model == pytest.approx(seen, abs=1e-3)  # equally many states of each network
        found.append(got.weights)
    limits = np.array([over_seeds(w) for w in np.array(found).T])
    assert abs(limits[:, 0] - true).max() < .06
    assert ((limits[:, 1] <= true) & (true <= limits[:, 2])).sum() >= 4  # 95 % intervals, five of them


@pytest.mark.parametrize("how", ["likelihood", "cd", "pseudo"])
def test_learners_agree_where_the_model_is_right(how):
    names, (f,), _ = network(3, ((30, 100),))
    true = np.array([TRUE[k] for k in names])
    x = gibbs(f.network(true), chains=600, sweeps=1, burn=300, seed=5).x[:-1].T.numpy().astype(int)
    options = dict(k=2, chains=600, steps=250) if how == "cd" else {}
    got = learn(f, x, how, l2=0, seed=1, **options)
    assert abs(got.weights - true).max() < .25 and got.how == how and got.converged
    again = learn(f, x, how, l2=0, seed=1, **options)
    assert (again.weights == got.weights).all()


def test_cd_bias_shrinks():
    bias = {1: 0., 30: 0.}
    for seed in range(4):
        names, (f,), rng = network(seed, ((5, 10),))
        w, x = 1.5 * rng.normal(size=len(names)), rng.integers(0, 2, (40, 10))
        exact = f.counts(x) - f.expected(w)[1]
        for k in bias: bias[k] += np.linalg.norm(cd_gradient([(f, x)], w, k, 20_000, seed) - exact)
    assert bias[30] < .15 and bias[30] < bias[1] / 3


def test_order_of_atoms_and_features_changes_nothing():
    names, (f,), rng = network(4)
    x = rng.integers(0, 2, (25, 10))
    turn, mix = rng.permutation(10), rng.permutation(len(f.atoms))  # atom i becomes turn[i]
    other = Features([[turn[i] for i in f.atoms[j]] for j in mix], f.group[mix], f.value[mix], 10)
    y = np.empty_like(x); y[:, turn] = x
    for how in ("likelihood", "pseudo"):
        assert learn(other, y, how).weights == pytest.approx(learn(f, x, how).weights, abs=1e-4)


def test_a_group_that_a_network_lacks():
    f, g = Features([(0,), (0, 1)], [0, 1]), Features([(0,)], [2], n=1)
    x, y = np.array([[1, 0], [1, 1], [0, 1], [0, 0], [1, 1]]), np.array([[1], [1], [0]])
    both = learn([f, g], [x, y], l2=0)
    assert both.weights == pytest.approx([*learn(f, x, l2=0).weights, np.log(2)], abs=1e-4)
    assert learn([f, f], [x, x], l2=0).weights == pytest.approx(learn(f, x, l2=0).weights, abs=1e-6)


def test_certain_data_have_no_optimum_but_a_penalised_one():
    f = Features([(0,), (0, 1)], [0, 1])
    x = np.ones((20, 2), int)
    free = learn(f, x, l2=0, steps=4)
    assert not free.converged and np.isfinite(free.weights).all()
    held = learn(f, x, l2=.01)
    assert held.converged and (held.weights > 0).all()


@pytest.mark.parametrize("bad", [dict(atoms=[()], group=[0]), dict(atoms=[(0,)], group=[0, 1]), dict(atoms=[(0,)], group=[-1]), dict(atoms=[(0,)], group=[0], value=[np.nan]),
                                 dict(atoms=[(5,)], group=[0], n=3)])
def test_features_are_checked(bad):
    with pytest.raises(CapnbError): Features(**bad)


def test_data_are_checked():
    f = Features([(0,), (0, 1)], [0, 1])
    for x in ([[0, 2]], [[0]], np.zeros((0, 2)), [[0, np.nan]]):
        with pytest.raises(CapnbError): learn(f, x)
    with pytest.raises(CapnbError): learn([f, f], [[[0, 1]]])
    with pytest.raises(CapnbError): learn(f, [[0, 1]], l2=-1)
    with pytest.raises(CapnbError): f.network([1.])
    assert states_of(["a", "b"], [{"b", "c"}]).tolist() == [[0, 1]]
