"""Rows of a pass are counted as they run, every share is met, and the passes that do not look do what they say."""

import importlib

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tokeff.errors import UserError
from tokeff.evals import mean_rows, reading, seeing
from tokeff.evals.mean_rows import Family, Work, flops, mean_share, place, rows_by_layer, solved
from tokeff.models.config import Config
from tokeff.models.flow import EMPTY, Flow, Here
from tokeff.reduce import methods as reduce
from tokeff.reduce.cascade import LastRowCascade, MassCascade
from tokeff.reduce.maps import DualFilter
from tokeff.reduce.pass_baselines import PooledRows, RandomRows
from tokeff.reduce.pictures import DART, FastV, PyramidDrop
from tokeff.reduce.recycle import SparseVLM

pytestmark = pytest.mark.core
SMOL = Config("smol", V=49152, D=576, F=1536, L=30, N=9, K=3, H=64)
SHARES, IMAGE = (0.66, 0.33, 0.22, 0.11), 60
CUTS = (
    reduce.gemfilter(0.4, layer=1), reduce.promptdistill(0.3, layer=1), reduce.truncated(0.25), LastRowCascade((0, 1), (0.7, 0.3)),
    MassCascade((1, 2), (20, 7)), RandomRows((0, 2), (0.6, 0.3)), PooledRows(keep=(0.3,)), FastV((1,), (0.3,)),
    PyramidDrop((1, 2), (0.5, 0.2)), SparseVLM((1, 2), (0.3, 0.2), recycle=0.9), DART((1,), (14,)),
)  # fmt: skip


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: type(cut).__name__)
def test_rows_are_counted_as_they_run(cut, monkeypatch):
    """Of every layer that runs: keys in its cache, rows that leave it. A prompt of 51 tokens, 20 of a picture, padded to 64."""
    module, ran = importlib.import_module("tokeff.kv.prefill"), []
    once = module.one_layer

    def one_layer(*args, **named):
        flow, layer, across = once(*args, **named)
        ran.append((int((layer.order_BKS[0, 0] != EMPTY).sum()), int((flow.order_BT[0] != EMPTY).sum())))
        return flow, layer, across

    monkeypatch.setattr(module, "one_layer", one_layer)
    ids = [t % IMAGE for t in tiny.prompts()[1]]
    ids[10:30] = [IMAGE] * 20
    tiny.read(tiny.FULL, [ids], cut=cut.seeing((IMAGE,), [ids]), T=64)
    counted = rows_by_layer(cut, tiny.CFG, 51, 20)
    assert [(w.enter, w.leave) for w in counted] == ran
    assert mean_rows.mean_rows(cut, tiny.CFG, 51, 20) == pytest.approx(sum(leave for _, leave in ran) / tiny.CFG.L)


def test_operations_by_hand():
    """Query by query and key by key; a layer that chooses asks less; a window sees less."""
    cfg, n = tiny.CFG, 20
    q, k = cfg.N * cfg.H, cfg.K * cfg.H
    row = cfg.D * (2 * q + 2 * k) + 3 * cfg.D * cfg.F
    dense = cfg.L * (n * row + sum(2 * q for t in range(n) for _ in range(t + 1))) + cfg.D * cfg.V
    assert flops(None, cfg, n) == pytest.approx(2 * dense)
    near = Config("near", V=61, D=32, F=48, L=1, N=4, K=2, H=8, windows=(6,))
    assert flops(None, near, n) == pytest.approx(2 * (n * row + sum(2 * q for t in range(n) for _ in range(min(t + 1, 6))) + 32 * 61))
    cut = LastRowCascade((1,), (0.5,))
    assert rows_by_layer(cut, cfg, n) == (Work(20, 20), Work(20, 10), Work(10, 10))
    assert rows_by_layer(PyramidDrop((1,), (0.5,)), cfg, n, 8) == (Work(20, 20), Work(16, 16, 20), Work(16, 16))
    assert rows_by_layer(reduce.gemfilter(0.5, layer=1), cfg, n) == (Work(20, 20), Work(10, 10, 20), Work(10, 10), Work(10, 10))
    assert flops(cut, cfg, n) < flops(None, cfg, n) == flops(LastRowCascade((1,), (1.0,)), cfg, n)
    assert mean_rows.held_rows(cut, cfg, n) == pytest.approx(50 / 60)


@pytest.mark.parametrize("family", reading.families(), ids=lambda f: f.name)
def test_every_pass_meets_every_share(family):
    for share in SHARES:
        found = place(family, share, SMOL, 2048)
        assert mean_share(found.cut, SMOL, 2048) == pytest.approx(share, abs=0.005) and 0 < found.budget <= 1
        found.cut.check(SMOL, 2048)
        assert found.moved == (found.layers != tuple(at if isinstance(at, int) else int(at * 30 + 1e-9) for at in family.places))
    assert not place(family, 0.66, SMOL, 2048).moved


@pytest.mark.parametrize("family", seeing.PASSES, ids=lambda f: f.name)
def test_picture_passes_meet_shares(family):
    for share in SHARES:
        cut = place(family, share, SMOL, 210, 197).cut.seeing((IMAGE,), [[IMAGE] * 197 + [1] * 13])
        assert mean_share(cut, SMOL, 210, 197) == pytest.approx(share, abs=0.02)
        cut.check(SMOL, 210)


def test_what_cannot_be_met_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"layers \(13,\) of 30 leaves 43.4% in the mean at least, not 33.0%"):
        solved(lambda b: reduce.gemfilter(b, layer=13), 0.33, SMOL, 1000)
    for share in (0.0, 1.5):
        with pytest.raises(UserError, match="not a share"):
            solved(lambda b: reduce.truncated(b), share, SMOL, 1000)
    with pytest.raises(UserError, match="at least"):
        place(Family("one", lambda layers, b: FastV(layers, (b,)), (2,), first=2), 0.33, tiny.CFG, 50, 30)
    with pytest.raises(UserError, match="picture's own"):
        rows_by_layer(DualFilter((0,), (0.5,)), tiny.CFG, 50, 30)
    with pytest.raises(UserError, match="no row go"):
        place(Family("rests", lambda layers, b: reduce.resting(), (0,)), 0.33, tiny.CFG, 50, 30)


# -- passes that do not look


def flow_of(lengths=(23, 40), T=48) -> Flow:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, T, 8)), jnp.float32)
    order = jnp.where(jnp.arange(T)[None] < jnp.asarray(lengths)[:, None], jnp.arange(T), EMPTY)
    return Flow(x, order, jnp.maximum(order, 0), order)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_pooled_rows_are_means_of_pieces(share):
    flow, cut, here = flow_of(), PooledRows(keep=(share,)), Here(0, tiny.CFG)
    left = cut.take(flow, cut.choose(flow.x_BTD, flow.x_BTD, flow, here), here)
    for b, n in enumerate((23, 40)):
        m = int(np.ceil(share * n - 1e-4))
        pieces = [[t for t in range(n) if t * m // n == i] for i in range(m)]
        assert left.order_BT[b][:m].tolist() == [piece[-1] for piece in pieces] and (left.order_BT[b][m:] == EMPTY).all()
        np.testing.assert_allclose(left.x_BTD[b, :m], [flow.x_BTD[b, np.array(p)].mean(axis=0) for p in pieces], atol=1e-6)


def test_random_rows_are_nested_and_the_same_in_every_batch():
    cut, flow = RandomRows((0, 1), (0.5, 0.2)), flow_of()
    first = cut.take(flow, cut.choose(flow.x_BTD, flow.x_BTD, flow, Here(0, tiny.CFG)), Here(0, tiny.CFG))
    second = cut.take(first, cut.choose(first.x_BTD, first.x_BTD, first, Here(1, tiny.CFG)), Here(1, tiny.CFG))
    short = flow_of((23, 23), 32)
    alone = cut.choose(short.x_BTD, short.x_BTD, short, Here(0, tiny.CFG))[0]
    kept = [[int(o) for o in row if o != EMPTY] for row in (*first.order_BT, *second.order_BT)]
    assert list(map(len, kept)) == [12, 20, 5, 8] and set(kept[2]) <= set(kept[0]) and set(kept[3]) <= set(kept[1])
    assert kept[2][-1] == 22 and kept[3][-1] == 39 and [int(t) for t in alone if t != EMPTY] == kept[0]


def test_all_rows_are_the_untouched_model():
    known = tiny.read(tiny.FULL)
    for cut in (PooledRows(keep=(1.0,)), RandomRows((0, 1), (1.0, 1.0))):
        np.testing.assert_allclose(tiny.read(tiny.FULL, cut=cut).logits_BV, known.logits_BV, atol=1e-4)
