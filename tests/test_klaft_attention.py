"KLAFT's mapping layer, masks and modified attention: leaks, caches, padding, precision, stored features."
import copy, itertools, pickle

import numpy as np
import pytest
import torch
from torch import nn

from capnb.core.errors import ConfigError, DataError
from capnb.klaft.mam import GATES, ModifiedAttention
from capnb.klaft.mapping import FORMS, MappingLayer, region_features
from capnb.klaft.masks import combined_masks, dependent_mask, independent_mask, leaks
from capnb.models.features import pick

SHAPES = ((1, 1, 2, 4, 1), (2, 3, 6, 12, 3), (3, 0, 5, 8, 2), (2, 7, 9, 20, 4))  # B, I_pf, T, d, heads


def noisy(m, std=.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    for p in m.parameters(): p.data = torch.randn(p.shape, generator=g, dtype=p.dtype) * std
    return m


def mam(d, gate="pair", seed=0, **kw): return noisy(ModifiedAttention(d, gate=gate, **{"length": 24, **kw}), seed=seed).double()


def sees(m, H, I_pf, **kw):
    "(L, L) True where the output at i depends on the input at j, by the gradient."
    H = H.clone().requires_grad_()
    out = m(H, I_pf, **kw)
    rows = [torch.autograd.grad(out[0, i].mul(torch.linspace(1, 2, out.shape[-1], dtype=out.dtype)).sum(), H, retain_graph=True)[0][0].abs().sum(-1) > 1e-12 for i in range(H.shape[1])]
    return torch.stack(rows)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("masks", ("both", "literal"))
def test_what_a_position_depends_on_is_what_the_masks_allow(shape, gate, masks):
    B, I_pf, T, d, heads = shape
    torch.manual_seed(T)
    H = torch.randn(B, I_pf + T, d, dtype=torch.double)
    for layers, back, training in itertools.product((1, 2, 3), (True, False), (True, False)):
        if layers > 1 and back: continue
        m = mam(d, gate, seed=layers, heads=heads, masks=masks, mu=0., layers=layers, visual_to_text=back).train(training)
        got = sees(m, H, I_pf)
        M_c, M_s = combined_masks(I_pf, T, masks, training, back)
        may = (M_c == 0) | (M_s == 0)
        reach = torch.linalg.matrix_power(may.double(), layers) > 0
        assert not (got & ~reach).any()
        assert not got[I_pf:, I_pf:].triu(1).any(), "a word sees a later word"
        if not training: assert not got[:I_pf, I_pf:].any(), "at inference an image token sees text"
        if layers == 1: assert torch.equal(got | torch.eye(len(got)).bool(), may | torch.eye(len(got)).bool()), "mu = 0 cuts nothing: all that is allowed is used"


def test_leaks_counts_every_pair():
    for I_pf, T in ((1, 2), (3, 6), (5, 9)):
        for depth in (2, 3, 6): assert leaks(dependent_mask(I_pf, T, True), I_pf, depth) == [(I_pf + i, I_pf + j) for i in range(T) for j in range(i + 1, T)]
        for depth in (1, 2, 6):
            for M in (independent_mask(I_pf, T), dependent_mask(I_pf, T, False), dependent_mask(I_pf, T, True, False)): assert leaks(M, I_pf, depth) == []
        assert leaks(dependent_mask(I_pf, T, True), I_pf, 1) == []


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("masks", ("both", "literal"))
def test_leaking_stacks_are_refused(gate, masks):
    for layers in (2, 5):
        with pytest.raises(ConfigError, match="visual_to_text=False"): ModifiedAttention(8, gate=gate, masks=masks, layers=layers)
        ModifiedAttention(8, gate=gate, masks=masks, layers=layers, visual_to_text=False)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("masks", ("both", "literal"))
@pytest.mark.parametrize("layers", (1, 3))
def test_cache_equals_the_full_pass(gate, masks, layers):
    for seed in range(3):
        torch.manual_seed(seed)
        B, I_pf, L = 4, int(torch.randint(1, 6, ())), 17
        m = noisy(ModifiedAttention(16, heads=4, length=L, gate=gate, masks=masks, layers=layers, visual_to_text=False), .15, seed).eval()
        H, real = torch.randn(B, L, 16), torch.ones(B, L, dtype=torch.long)
        first = I_pf + 5
        for b in range(B): real[b, :int(torch.randint(0, 5, ()))] = 0
        for pad in (None, real):
            full = m(H, I_pf, pad)
            for size in (1, 3):  # tokens a step
                cache, out = {}, []
                for a in [0, *range(first, L, size)]:
                    e = first if not a else min(L, a + size)
                    out.append(m(H[:, a:e], I_pf, None if pad is None else pad[:, :e], cache))
                torch.testing.assert_close(torch.cat(out, 1), full, rtol=0, atol=1e-6)
        cache = {}
        steps = [m(H[:, :first], I_pf, real[:, :first], cache)] + [m(H[:, t:t + 1], I_pf, None, cache) for t in range(first, L)]  # new tokens are real
        torch.testing.assert_close(torch.cat(steps, 1), full, rtol=0, atol=1e-6)


@pytest.mark.parametrize("gate", GATES)
def test_padding_anywhere_changes_nothing(gate):
    torch.manual_seed(1)
    m, I_pf, L = mam(12, gate, heads=3, length=9), 3, 9
    H = torch.randn(1, L, 12, dtype=torch.double)
    for training in (True, False):
        want = m.train(training)(H, I_pf)
        for places in ([0, 1], [3, 4], [9, 10], [0, 5, 10], [2]):  # before, between image and text, behind, all, inside the image
            real = torch.ones(1, L + len(places)).bool(); real[0, places] = False
            wide = torch.full((1, L + len(places), 12), float("nan"), dtype=torch.double); wide[real] = H[0]
            got = m(wide, I_pf, real)  # wider than length, yet not longer
            torch.testing.assert_close(got[real], want[0]); assert got[~real].isnan().all(), "padding passes unchanged"


@pytest.mark.parametrize("gate", GATES)
def test_rows_do_not_see_each_other_and_none_is_ever_nan(gate):
    torch.manual_seed(2)
    m = mam(12, gate, heads=3)
    H, real = torch.randn(3, 8, 12, dtype=torch.double), torch.ones(3, 8).bool()
    real[0, :3] = False; real[1] = False
    H.requires_grad_()
    for training in (True, False):
        got = m.train(training)(H, 2, real)
        assert got.isfinite().all() and torch.equal(got[1], H[1])
        for b in (0, 2): torch.testing.assert_close(got[b:b + 1], m(H[b:b + 1], 2, real[b:b + 1]))
        m.zero_grad(); got.pow(2).sum().backward()
        assert all(p.grad.isfinite().all() for p in [H, *m.parameters()])


@pytest.mark.parametrize("gate", GATES)
def test_a_prompt_before_the_image(gate):
    "Flags say where the image is; words before it do not see it, nor what stands behind them."
    torch.manual_seed(3)
    H, flags = torch.randn(1, 9, 12, dtype=torch.double), torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0, 0]])
    for training in (True, False):
        m = mam(12, gate, heads=3).train(training)
        got, visual = sees(m, H, flags), flags[0].bool()
        assert not got.triu(1)[~visual].any() and got[5:, 2:5].all() and not got[:2, 2:].any() and bool(got[2:5, 5:].any()) == training
    m.eval(); cache = {}
    steps = torch.cat([m(H[:, :6], flags[:, :6], None, cache)] + [m(H[:, t:t + 1], flags[:, t:t + 1], None, cache) for t in (6, 7, 8)], 1)
    torch.testing.assert_close(steps, m(H, flags))


def test_pair_columns_are_absolute_positions():
    "A column of the gate belongs to a position of the sequence, wherever padding puts it."
    torch.manual_seed(4)
    m = mam(8, heads=2, length=10).eval()
    H = torch.randn(2, 6, 8, dtype=torch.double); want = m(H, 2)
    for k in range(6, 10): m.layers[0].W_b.data[:, k] = 9; m.layers[0].C_b.data[k] = 9; m.layers[0].C_b.data[:, k] = 9
    torch.testing.assert_close(m(H, 2), want)  # later columns belong to nobody here
    wide, real = torch.cat([torch.randn(2, 4, 8).double(), H], 1), torch.tensor([[0] * 4 + [1] * 6] * 2)
    torch.testing.assert_close(m(wide, 2, real)[:, 4:], want)
    m.layers[0].C_b.data[:, 5] -= 20
    got = m(H, 2)  # column 5 is the last word, which nobody before it sees
    torch.testing.assert_close(got[:, :5], want[:, :5]); assert (got[:, 5] != want[:, 5]).any()
    torch.testing.assert_close(m(wide, 2, real)[:, 4:], got)


def test_too_long_is_said_also_in_the_middle_of_generation():
    m, cache = ModifiedAttention(8, heads=2, length=6).eval(), {}
    m(torch.randn(2, 5, 8), 3, None, cache); m(torch.randn(2, 1, 8), 3, None, cache)
    with pytest.raises(ConfigError, match="7 positions is too long.*length=6"): m(torch.randn(2, 1, 8), 3, None, cache)
    for gate in ("token", "feature"): ModifiedAttention(8, heads=2, length=6, gate=gate)(torch.randn(2, 50, 8), 3)
    with pytest.raises(ConfigError, match="all visual tokens in the first call"): m(torch.randn(2, 1, 8), 3, None, {})
    with pytest.raises(ConfigError, match="visual tokens after the first call"): m(torch.randn(2, 1, 8), torch.ones(2, 1), None, cache)


def test_beams_reorder_the_cache():
    torch.manual_seed(5)
    m, cache = mam(8, heads=2).eval(), {}
    H = torch.randn(3, 6, 8, dtype=torch.double); m(H, 2, None, cache)
    rows, new = torch.tensor([2, 0, 0, 1]), torch.randn(4, 1, 8, dtype=torch.double)
    got = m(new, 2, None, pick(cache, rows))
    torch.testing.assert_close(got, m(torch.cat([H[rows], new], 1), 2)[:, -1:])


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("masks", ("both", "literal"))
def test_starts_as_the_base_to_the_bit(gate, masks):
    torch.manual_seed(6)
    for base, own in itertools.product((torch.float32, torch.bfloat16, torch.float16), repeat=2):
        H = (torch.randn(2, 7, 16) * 30).to(base)
        m = ModifiedAttention(16, gate=gate, masks=masks, mu=.3, dropout=.5, ffn=2, length=7).to(own)
        assert m(H, 3).dtype == base and torch.equal(m(H, 3), H) and torch.equal(m.eval()(H, 3, torch.ones(2, 7)), H)
        with torch.autocast("cpu", torch.bfloat16): assert torch.equal(m(H, 3), H)
    deep = ModifiedAttention(16, gate=gate, masks=masks, layers=4, visual_to_text=False)
    H = torch.randn(2, 7, 16); assert torch.equal(deep(H, 3), H)


@pytest.mark.parametrize("gate", GATES)
def test_bf16_stays_near_fp32(gate):
    torch.manual_seed(7)
    m = noisy(ModifiedAttention(16, heads=4, gate=gate, length=9), .1).eval(); H = torch.randn(2, 9, 16)
    want = m(H, 3)
    with torch.autocast("cpu", torch.bfloat16): cast = m(H, 3)
    low = copy.deepcopy(m).bfloat16()(H.bfloat16(), 3)
    for got in (cast, low): assert got.isfinite().all() and (got.float() - want).abs().max() < .1
    huge = copy.deepcopy(m).bfloat16()((H * 1e15).bfloat16(), 3, torch.tensor([[1] * 9, [0] * 9]))
    assert huge.isfinite().all()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("mu", (0., .2, .45))
def test_it_learns_from_the_start(gate, mu):
    "Words are to say what the image holds; every parameter moves, although the last matrices start at zero."
    torch.manual_seed(8)
    m = ModifiedAttention(8, heads=2, length=6, gate=gate, mu=mu, ffn=2)
    before, opt, loss = copy.deepcopy(m.state_dict()), torch.optim.Adam(m.parameters(), lr=.01), []
    for _ in range(60):
        H = torch.randn(32, 6, 8)
        loss.append((m(H, 2)[:, 2:] - H[:, 2:] - H[:, :1]).pow(2).mean())
        opt.zero_grad(); loss[-1].backward(); opt.step()
    assert loss[-1] < .8 * loss[0] and all((before[k] != v).any() for k, v in m.state_dict().items())


def test_a_cut_gate_gives_the_other_side_everything():
    torch.manual_seed(9)
    H = torch.randn(2, 7, 8, dtype=torch.double)
    m = mam(8, "token", heads=2, mu=.5); f = m.layers[0]
    nn.init.zeros_(f.W_b); nn.init.constant_(f.C_b, -.01)  # sigma just below the threshold
    below = m(H, 3)
    nn.init.constant_(f.C_b, -1e4)
    torch.testing.assert_close(below, m(H, 3))


@pytest.mark.parametrize("gate", GATES)
def test_config_builds_the_same_again(gate):
    m = noisy(ModifiedAttention(16, gate=gate, length=9, mu=.1, layers=2, visual_to_text=False))
    again = ModifiedAttention(**m.config); again.load_state_dict(m.state_dict())
    H = torch.randn(2, 9, 16); assert torch.equal(again(H, 4), m(H, 4))
    for form in FORMS:
        a = MappingLayer(5, 16, 3, form); b = MappingLayer(**a.config); b.load_state_dict(a.state_dict())
        assert torch.equal(a.eval()(H[:, :, :5]), b.eval()(H[:, :, :5]))


@pytest.mark.parametrize("form", FORMS)
def test_mapping_of_any_features(form):
    torch.manual_seed(10)
    for I_pf, n, d_pf, d_h in ((None, 1, 7, 12), (4, 1, 7, 12), (3, 10, 5, 70), (6, 4, 3, 128), (5, 5, 2048 // 64, 16)):
        m, x = MappingLayer(d_pf, d_h, I_pf, form, layers=3).eval(), torch.randn(3, n, d_pf)
        y = m(x)
        assert y.shape == (3, I_pf or n, d_h) and y.isfinite().all()
        torch.testing.assert_close(m(x[1:2])[0], y[1], rtol=1e-4, atol=1e-5)
        if n == 1: torch.testing.assert_close(m(x[:, 0]), y)
        low = copy.deepcopy(m).bfloat16()(x)
        assert low.dtype == torch.bfloat16 and (low.float() - y).abs().max() < .15
    m = MappingLayer(5, 16, form=form).eval()
    torch.testing.assert_close(m(torch.arange(60.).view(1, 3, 4, 5)), m(torch.arange(60.).view(1, 12, 5)))
    for bad in (torch.randn(2, 3, 4), torch.randn(5), torch.randn(2, 0, 5), torch.randn(2, 4)):
        with pytest.raises(ConfigError, match="the features are"): m(bad)


@pytest.mark.parametrize("form", FORMS)
def test_dropout_only_in_training(form):
    m, x = MappingLayer(5, 16, 3, form, dropout=.5), torch.randn(2, 4, 5)
    if form != "linear": assert not torch.equal(m(x), m(x))
    m.eval(); assert torch.equal(m(x), m(x))


def tables(folder):
    h5py = pytest.importorskip("h5py")
    a, b = np.arange(8, dtype="float32").reshape(2, 4), np.arange(12, dtype="float32").reshape(3, 4) + 1
    with h5py.File(folder / "each.h5", "w") as f: f["7_features"], f["42_features"], f["7_boxes"] = a, b.astype("float16"), np.ones((2, 4))
    with h5py.File(folder / "groups.hdf5", "w") as f:
        for k, v in (("7", a), ("42", b)): f[f"{k}/features"] = v; f[f"{k}/boxes"] = np.ones((len(v), 4))
    with h5py.File(folder / "table.h5", "w") as f: f["features"], f["image_ids"], f["num_boxes"] = np.stack([np.pad(a, ((0, 1), (0, 0))), b]), [7, 42], [2, 3]
    with h5py.File(folder / "names.h5", "w") as f: f["features"] = np.stack([a[0], b[0]]); f["ids"] = [b"7", b"42"]
    return a, b


def test_h5_features(tmp_path):
    a, b = tables(tmp_path)
    for name in ("each.h5", "groups.hdf5", "table.h5"):
        regions = region_features(tmp_path / name)
        for r in (regions, pickle.loads(pickle.dumps(regions))):
            assert sorted(r) == ["42", "7"] and r[7].tolist() == a.tolist() and r["42"].tolist() == b.tolist() and 8 not in r and r[42].dtype == torch.float32
        with pytest.raises(DataError, match="no features of this image"): regions[8]
    assert region_features(tmp_path / "names.h5")["42"].tolist() == [b[0].tolist()]
    (tmp_path / "torn.h5").write_bytes((tmp_path / "each.h5").read_bytes()[:600])
    with pytest.raises(DataError, match="cannot be read"): region_features(tmp_path / "torn.h5")


def test_npz_features_that_are_wrong(tmp_path):
    np.savez(tmp_path / "a.npz", **{"1": np.zeros((2, 3, 4)), "2": np.array([{}], dtype=object), "3": np.array(1.), "4": np.full((1, 2), np.inf)})
    regions = region_features(tmp_path / "a.npz")
    assert regions[1].shape == (6, 4)  # a grid, row by row
    for i in (2, 3, 4):
        with pytest.raises(DataError, match=f"image {i}"): regions[i]
    (tmp_path / "torn.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:90])
    (tmp_path / "empty").mkdir(); (tmp_path / "x.csv").write_text("")
    (tmp_path / "two").mkdir(); np.savez(tmp_path / "two/5.npz", left=np.zeros(2), right=np.zeros(2))
    for name, word in (("torn.npz", "cannot be read"), ("empty", "no features in here"), ("x.csv", "not read from .csv"), ("none", "no such file")):
        with pytest.raises(DataError, match=word): region_features(tmp_path / name)
    with pytest.raises(DataError, match="no feature array"): region_features(tmp_path / "two")[5]
