"""What holds for every method that reduces the rows of pictures and videos: each that is listed joins these tests."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pictures
import pytest

from tokeff.errors import UserError
from tokeff.models.anyres import Canvas
from tokeff.models.flow import EMPTY
from tokeff.models.vit import Taps, encode
from tokeff.models.vit_config import ViTConfig
from tokeff.reduce.listing import find, picture_methods
from tokeff.reduce.visual import Cropped, Filmed, Told, Walked

CFG = pictures.TOWER
P = CFG.patches
BARS, FULL = Canvas(2, 2, CFG.grid, (2, 10), (0, 12)), Canvas(2, 2, CFG.grid, (0, 12), (0, 12))
# Settings for 36 patches and 3 layers, where the defaults are for more.
SETTINGS = {
    "HiPrune": {"budget": 12, "middle": 0, "share": 0.8}, "VisionZip": {"budget": 6, "contextual": 4}, "PruMerge": {"near": 4},
    "VFlowOpt": {"budget": 0.3, "cell": 3.0, "above": 1.1, "entropy": 0.5}, "TokenCorrCompress": {"budget": 12, "like": 0.1, "often": 0.3},
    "MustDrop": {"like": 0.87, "window": (2, 2)}, "HoliTom": {"budget": 0.3, "tau": 0.2}, "FastVID": {"budget": 0.3, "tau": 0.5},
    "StillRuns": {"tau": 0.2}, "PooledPatches": {"cells": (2, 3)}, "SmallerImage": {"cells": (3, 4)}, "VisPruner": {"step": 2},
    "DivPrune": {"budget": 9},
}  # fmt: skip
FEW = {"HiPrune": {"middle": 0}}  # for three layers
STEADY = ("AIM", "OnDeviceSora")  # rows stand at the same places whatever is merged in them
OWN = ("TokenCorrCompress", "MustDrop", "VFlowOpt", "HoliTom", "FastVID", "StillRuns", "HiRED", "GlobalCom2")  # as many as the picture says
pytestmark = pytest.mark.core
ALL = [pytest.param(m, id=m.name) for m in picture_methods()]
traces = []


def inputs(method, seed=0):
    """(x_BSD, seen) that a method of this kind reads: two pictures, a thumbnail and four crops, or five frames that move little."""
    if isinstance(method, Cropped):
        return pictures.looked(CFG, 5, seed)
    if not isinstance(method, Filmed):
        return pictures.looked(CFG, 2, seed)
    x, seen = pictures.looked(CFG, 5, seed)
    return x.at[1:3].set(x[:1] + 0.3 * x[1:3]), seen


@jax.jit
def about(seed):
    """A direction of a text."""
    x_TD = jax.random.normal(jax.random.key(seed), (7, CFG.D))
    return (x_TD / jnp.linalg.norm(x_TD, axis=1, keepdims=True)).mean(axis=0)


@cache
def program(method, canvas=BARS):
    """The method as one compiled function, which notes its traces."""

    def run(x, seen, about_D):
        traces.append(method)
        if isinstance(method, Walked):
            return method.walk(pictures.tower(), CFG, seen.pixels_BYXC, (1,))
        if isinstance(method, Cropped):
            return method.across(x, seen, CFG, canvas)
        if isinstance(method, Told):
            return method.answer(x, seen, CFG, about_D)
        return method.reduce(x, seen, CFG)

    return jax.jit(run)


def left(method, x, seen, canvas=BARS):
    """(rows, places) of every picture, crop or frame, without those that are not real."""
    got = program(method, canvas)(x, seen, about(0))
    real = np.ones(got.place_BM.shape, bool) if got.real_BM is None else np.asarray(got.real_BM)
    return [(np.asarray(rows)[r], np.asarray(places)[r]) for rows, places, r in zip(got.x_BMD, got.place_BM, real, strict=True)]


def settled(m):
    return m.make(**SETTINGS.get(m.name, {}))


@pytest.mark.parametrize("m", ALL)
def test_rows_are_counted_and_in_place(m):
    """Each is at one patch's place, none twice, in reading order; never more or fewer than promised, and fewer than there were."""
    method = settled(m)
    method.check(CFG)
    found = left(method, *inputs(method))
    for rows, places in found:
        assert len(rows) == len(places) and np.isfinite(rows).all()
        assert len(places) <= (P if isinstance(method, Cropped) else method.rows(CFG))
        real = places[places != EMPTY]
        assert len(set(real)) == len(real) and ((real >= 0) & (real < P)).all()
        assert not method.placed or (len(real) == len(places) and (np.diff(real) > 0).all())
    many, least = sum(len(places) for _, places in found), method.fewest(CFG, len(found))
    assert 0 < least <= many < len(found) * P and (least == many or m.name in OWN)


@pytest.mark.parametrize("m", ALL)
def test_everything_is_everything(m):
    """At the settings that are listed for it, a method leaves the tower's rows as they are."""
    if (method := m.whole(CFG, **FEW.get(m.name, {}))) is None:
        return
    method.check(CFG)
    x, seen = inputs(method)
    if isinstance(method, Walked):
        x = encode(pictures.tower(), CFG, seen.pixels_BYXC, taps=Taps(x=(1,)), upto=2).seen.x_BSD[1]
    for b, (rows, places) in enumerate(left(method, *inputs(method), FULL)):
        assert places.tolist() == list(range(P))
        np.testing.assert_allclose(rows, x[b, 1:], atol=1e-5)


@pytest.mark.parametrize("m", ALL)
def test_a_batch_of_pictures_is_its_pictures(m):
    """One picture alone, and beside others, leaves the same. (Crops and frames are of one picture: they are compared in other values.)"""
    method = settled(m)
    if isinstance(method, (Cropped, Filmed)):
        return
    x, seen = inputs(method)
    both = left(method, x, seen)
    for b in range(2):
        (rows, places), = left(method, x[b : b + 1], jax.tree.map(lambda a, b=b: a[b : b + 1], seen))
        np.testing.assert_array_equal(places, both[b][1])
        np.testing.assert_allclose(rows, both[b][0], atol=1e-5)


@pytest.mark.parametrize("m", ALL)
def test_one_program_a_setting(m):
    """Other pictures, and an equal method made anew, compile nothing; what is left is not always the same."""
    method = settled(m)
    first = left(method, *inputs(method))
    before = len(traces)
    other = left(settled(m), *inputs(method, seed=1))
    assert len(traces) == before
    if m.name not in (*STEADY, *(b.name for b in picture_methods() if b.family == "baseline")):
        assert any(len(a[1]) != len(b[1]) or (a[1] != b[1]).any() for a, b in zip(first, other))


@pytest.mark.parametrize("m", [pytest.param(m, id=m.name) for m in picture_methods() if "budget" in m.settings()])
def test_budgets_below_one_row_are_refused(m):
    """Counts of 0 or less, shares that are none; a share of less than a row is one, but for FastVID, which keeps some of every frame."""
    for budget in (0, -1, 0.0, -0.5, 1.5, float("nan")):
        with pytest.raises(UserError) as error:
            m.make(budget=budget).check(CFG)
        assert "budget" in str(error.value) and "\n" not in str(error.value)
    if m.name not in ("FastVID", "VisionZip", "VFlowOpt", "HoliTom"):
        assert m.make(budget=1e-6).rows(CFG) == 1 + (m.name == "PruMerge")


def test_defaults_fit_the_towers_they_were_published_for():
    """CLIP-L at 336 pixels, SigLIP at 384 with 14 x 14 rows a frame; every method but the baselines says where it is from."""
    clip = ViTConfig("clip", D=1024, F=4096, L=24, N=16, image=(336, 336), patch=14)
    frame = ViTConfig("siglip", D=1152, F=4304, L=27, N=16, image=(196, 196), patch=14, cls=False)
    for m in picture_methods():
        method, cfg = m.make(), frame if m.acts == "frames" else clip
        method.check(cfg)
        assert 0 < method.rows(cfg) <= cfg.S and method.taps(cfg).top() < cfg.L
        assert m.paper is not None or m.family == "baseline" or m.name == "StillRuns"
        assert type(method).__doc__ and hash(method) == hash(m.make())
    assert {m.acts for m in picture_methods()} == {"tower", "patches", "crops", "text", "frames"}
    with pytest.raises(UserError, match="HoliTom"):
        find("HoliTon")
