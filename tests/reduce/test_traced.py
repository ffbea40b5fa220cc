"""Which patches a row is made of: rows are the weighted sums they are said to be, and kept patches are at their places."""

import jax
import numpy as np
import pictures
import pytest
from test_visual_listing import CFG, about, inputs, settled

from tokeff.errors import UserError
from tokeff.models.flow import EMPTY
from tokeff.reduce.listing import picture_methods
from tokeff.reduce.traced import Traced, weights
from tokeff.reduce.video import FramePairs
from tokeff.reduce.visual import DivPrune, FasterVLM, Filmed, Told, Walked
from tokeff.reduce.visual_baselines import PooledPatches
from tokeff.reduce.visual_merge import VisionZip
from tokeff.report.patches import source_of

pytestmark = pytest.mark.core
P = CFG.patches
METHODS = [pytest.param(m, id=m.name) for m in picture_methods() if not isinstance(settled(m), Walked)]


@pytest.mark.parametrize("m", METHODS)
def test_rows_are_the_sums_they_are_said_to_be(m):
    """And nothing is chosen otherwise than without the numbers that patches carry."""
    method = settled(m)
    x, seen = inputs(method)
    text = about(3) if isinstance(method, Told) else None
    told = text is not None and isinstance(method, Told)
    want = jax.jit(lambda x, seen: method.answer(x, seen, CFG, text) if told else method.reduce(x, seen, CFG))(x, seen)
    left, weight_BMP = jax.jit(lambda x, seen: weights(method, x, seen, CFG, text))(x, seen)
    np.testing.assert_array_equal(left.place_BM, want.place_BM)
    np.testing.assert_allclose(left.x_BMD, want.x_BMD, atol=2e-5)
    real = np.ones(want.place_BM.shape, bool) if want.real_BM is None else np.asarray(want.real_BM)
    rows = np.asarray(x)[:, int(CFG.cls) :]
    of = rows.reshape(1, -1, rows.shape[2]).repeat(len(rows), axis=0) if isinstance(method, Filmed) else rows
    made = np.einsum("bmp,bpd->bmd", np.asarray(weight_BMP), of)
    there = real & (np.asarray(weight_BMP).sum(axis=2) > 0)  # VisionZip's class row is of no patch
    assert (there != real).sum() == (len(x) if isinstance(method, VisionZip) else 0)
    np.testing.assert_allclose(made[there], np.asarray(want.x_BMD)[there], atol=1e-4)


def test_sources():
    """By hand: patches that are kept, cells of a grid, and frames in pairs."""
    x, seen = pictures.looked(CFG, 4, 0)
    for method in (FasterVLM(9), DivPrune(5)):
        found, want = Traced(method).reduce(x, seen, CFG), method.reduce(x, seen, CFG)
        for place, source in zip(np.asarray(want.place_BM), np.asarray(found.place_BM)):
            assert (source[source != EMPTY] == np.flatnonzero(source != EMPTY)).all()
            np.testing.assert_array_equal(source != EMPTY, source_of(place, P) != EMPTY)
    cells = np.asarray(Traced(PooledPatches((3, 2))).reduce(x, seen, CFG).place_BM)[0].reshape(CFG.grid)
    assert (cells[:2, :3] == 0).all() and (cells[:2, 3:] == 3).all() and (cells[4:, 3:] == 27).all()
    pairs = np.asarray(Traced(FramePairs()).reduce(x, seen, CFG).place_BM)
    np.testing.assert_array_equal(pairs, np.arange(4 * P).reshape(4, P)[[0, 0, 2, 2]])
    merged = np.asarray(Traced(VisionZip(7, 4)).reduce(x, seen, CFG).place_BM)
    assert all((row != EMPTY).all() and len(np.unique(row)) == 6 + 4 for row in merged)  # the class row holds no patch


def test_what_it_cannot_trace():
    with pytest.raises(UserError, match="while the tower runs"):
        Traced(next(m.make() for m in picture_methods() if m.name == "FlowCut"))
    assert Traced(DivPrune(5)).projected and not Traced(FasterVLM(5)).projected
    assert hash(Traced(FasterVLM(5))) == hash(Traced(FasterVLM(5)))
