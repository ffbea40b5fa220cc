"""Choosing and merging patches equals the papers' formulas, written as loops; and what must hold for all of it."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import visual

from tokeff.errors import UserError
from tokeff.models.flow import EMPTY
from tokeff.models.vit import Seen
from tokeff.models.vit_config import ViTConfig
from tokeff.reduce.visual import DivPrune, FasterVLM, HiPrune, spread
from tokeff.reduce.visual_baselines import PooledPatches, RandomPatches
from tokeff.reduce.visual_merge import PruMerge, VisionZip

CFG = ViTConfig("tower", D=16, F=8, L=3, N=2, image=(40, 56), patch=8)  # 5 x 7 patches
B, P = 2, CFG.patches
METHODS = (
    FasterVLM(0.2), DivPrune(0.2), HiPrune(12, middle=0, share=0.8), VisionZip(6, 4), PruMerge(6, near=4), RandomPatches(0.2, seed=3),
    PooledPatches(cells=(2, 4)), PruMerge(P, near=4, how="outliers"), PruMerge(P, near=4, how="plus"), PruMerge(5, near=4, how="plus"),
)  # fmt: skip
pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def tower():
    """(x_BSD, Seen) of two random pictures; the second is nothing like the first."""
    rng = np.random.default_rng(0)

    def softmax(*shape):
        e = np.exp(2 * rng.normal(size=shape))
        return e / e.sum(axis=-1, keepdims=True)

    def heads():
        return {i: jnp.asarray(rng.normal(size=(B, CFG.S, CFG.N, CFG.H)), jnp.float32) for i in range(CFG.L)}

    cls = {i: jnp.asarray(softmax(B, CFG.N, CFG.S), jnp.float32) for i in range(CFG.L)}
    received = {i: jnp.asarray(softmax(B, CFG.S), jnp.float32) for i in range(CFG.L)}
    x = jnp.asarray(rng.normal(size=(B, CFG.S, CFG.D)), jnp.float32)
    return x, Seen({}, cls, received, heads(), heads())


farthest = jax.jit(spread, static_argnums=1)


@partial(jax.jit, static_argnames=("method", "cfg"))
def reduced(method, x, seen, cfg=CFG):
    return method.reduce(x, seen, cfg)


def real(got, b):
    """(rows, places) of picture b."""
    there = np.ones(got.place_BM.shape[1], bool) if got.real_BM is None else np.asarray(got.real_BM[b])
    return np.asarray(got.x_BMD[b])[there], np.asarray(got.place_BM[b])[there].tolist()


def expected(method, x_SD, seen, b):
    """The oracle's (rows, places) for picture b."""
    cls = {i: np.float64(a)[b][:, 1:] for i, a in seen.cls_BNS.items()}
    received = {i: np.float64(a)[b][1:] for i, a in seen.received_BS.items()}
    k, q = ({i: np.float64(a)[b].swapaxes(0, 1) for i, a in x.items()} for x in (seen.k_BSNH, seen.q_BSNH))
    flat = {i: a.swapaxes(0, 1).reshape(CFG.S, CFG.D) for i, a in k.items()}
    match method:
        case FasterVLM():
            return visual.fastervlm(x_SD[1:], cls[1], 7)
        case DivPrune():
            return visual.divprune(x_SD[1:], 7)
        case HiPrune():
            return visual.hiprune(x_SD[1:], received[0], received[1], 12, 0.8, 7)
        case VisionZip():
            return visual.visionzip(x_SD, cls[1], k[1][:, 1:], 6, 4)
        case PruMerge():
            most = method.rows(CFG) - 1
            return visual.prumerge(x_SD[1:], q[2].swapaxes(0, 1).reshape(CFG.S, CFG.D)[0], flat[2], most, 4, method.how)
        case PooledPatches():
            return visual.pooled(x_SD[1:], (5, 7), (2, 4))


def test_every_method_equals_its_formula(tower, subtests):
    x, seen = tower
    for method in METHODS:
        with subtests.test(repr(method)):
            method.check(CFG)
            got = reduced(method, x, seen)
            assert got.x_BMD.shape == (B, method.rows(CFG), CFG.D) and got.place_BM.shape == (B, method.rows(CFG))
            for b in range(B):
                if (known := expected(method, np.float64(x[b]), seen, b)) is None:
                    continue
                rows, places = real(got, b)
                assert places == list(known[1])
                np.testing.assert_allclose(rows, known[0], atol=1e-5)


def test_outliers_are_as_many_as_a_picture_has(tower):
    """PruMerge's own count: two pictures of a batch keep different numbers; one without any keeps what is looked at most."""
    x, seen = tower
    seen = seen.replace(q_BSNH={i: a.at[1].multiply(0.1) for i, a in seen.q_BSNH.items()})  # the second looks at all more evenly
    counts = [[len(real(reduced(PruMerge(P, near=4, how=how), x, seen), b)[1]) - 1 for b in range(B)] for how in ("outliers", "plus")]
    assert counts[0][0] != counts[0][1] and all(few < many < P for few, many in zip(*counts))
    even = seen.replace(k_BSNH={i: 0 * a for i, a in seen.k_BSNH.items()})
    assert real(reduced(PruMerge(P, near=4, how="outliers"), x, even), 0)[1] == [0, EMPTY]


def test_what_holds_for_every_method(tower, subtests):
    """Places are of the picture and not twice; where positions can be kept they ascend; pictures in another order give the same."""
    x, seen = tower
    for method in METHODS:
        with subtests.test(repr(method)):
            got, turned = reduced(method, x, seen), reduced(method, x[::-1], jax.tree.map(lambda a: a[::-1], seen))
            np.testing.assert_array_equal(turned.place_BM[::-1], got.place_BM)
            np.testing.assert_array_equal(turned.x_BMD[::-1], got.x_BMD)
            for _, places in (real(got, b) for b in range(B)):
                kept = [p for p in places if p != EMPTY]
                assert len(set(kept)) == len(kept) and all(0 <= p < P for p in kept)
                assert not method.placed or places == sorted(kept)


def test_all_patches_are_all_patches(tower):
    x, seen = tower
    for method in (FasterVLM(1.0), DivPrune(P), HiPrune(P, middle=0), RandomPatches(1.0), PooledPatches(cells=(5, 7))):
        got = reduced(method, x, seen)
        np.testing.assert_array_equal(got.place_BM, np.tile(np.arange(P), (B, 1)))
        np.testing.assert_allclose(got.x_BMD, x[:, 1:], atol=1e-6)


def test_spread_is_within_half_of_the_best_set():
    """Greedy max-min reaches at least half of the best smallest distance where distances obey the triangle inequality: here unit vectors,
    whose cosine distance is half the squared Euclidean one, so at least a quarter."""
    for seed in range(4):
        x = np.random.default_rng(seed).normal(size=(9, 3))
        got = visual.diversity(x, np.asarray(farthest(jnp.asarray(x[None], jnp.float32), 4))[0])
        most = max(visual.diversity(x, index) for index in itertools.combinations(range(9), 4))
        assert most / 4 <= got <= most + 1e-6


def test_no_number_is_chosen_last(tower):
    """A score that is no number never wins over one that is."""
    x, seen = tower
    broken = seen.replace(cls_BNS={i: a.at[:, :, 5:9].set(jnp.nan) for i, a in seen.cls_BNS.items()})
    assert not set(range(4, 8)) & set(np.asarray(reduced(FasterVLM(0.2), x, broken).place_BM).ravel().tolist())
    for k in (6, P):
        for chosen in np.asarray(farthest(x[:, 1:].at[:, :2].set(jnp.nan), k)).tolist():
            assert len(set(chosen)) == k and (k == P or not {0, 1} & set(chosen))


def test_settings_that_cannot_work_are_refused():
    siglip = ViTConfig("siglip", D=16, F=8, L=3, N=2, image=(40, 56), patch=8, cls=False)
    for method, cfg in (
        (FasterVLM(0), CFG), (DivPrune(P + 1), CFG), (HiPrune(0.5, middle=0, share=2.0), CFG), (HiPrune(0.5), CFG), (VisionZip(1, 4), CFG),
        (VisionZip(0.9, 0.2), CFG), (PruMerge(), siglip), (PruMerge(near=0), CFG), (PooledPatches(cells=(6, 2)), CFG),
        (PruMerge(how="iqr"), CFG),
    ):  # fmt: skip
        with pytest.raises(UserError) as error:
            method.check(cfg)
        assert "\n" not in str(error.value)


def test_a_tower_without_a_class_row_ranks_by_what_patches_receive(tower):
    x, seen = tower
    siglip = ViTConfig("siglip", D=16, F=8, L=3, N=2, image=(40, 56), patch=8, cls=False)
    received, k = ({i: a[:, 1:] for i, a in x.items()} for x in (seen.received_BS, seen.k_BSNH))
    bare = seen.replace(received_BS=received, k_BSNH=k)
    got = reduced(FasterVLM(0.2), x[:, 1:], bare, siglip)
    assert got.place_BM[0].tolist() == visual.top(np.asarray(seen.received_BS[1])[0, 1:], 7)
    zipped = reduced(VisionZip(6, 4), x[:, 1:], bare, siglip)
    assert zipped.x_BMD.shape[1] == VisionZip(6, 4).rows(siglip) == 10 and (np.asarray(zipped.place_BM) >= 0).all()
