"""Scores, choices and merges of pictures' rows equal their papers' formulas, written as loops."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pictures
import pytest
from oracles import visual_more as known

from tokeff.errors import UserError
from tokeff.models.anyres import Canvas, laid, lay_out, places, shrinks
from tokeff.reduce.visual_baselines import SmallerImage, smaller_places
from tokeff.reduce.visual_crops import GlobalCom2, HiRED, TokenCorr, crop_of_patch
from tokeff.reduce.visual_diverse import CATP, CDPruner, ToDRE, VisPruner
from tokeff.reduce.visual_flow import KNOBS, Knob, VFlowOpt, bits, completed, search
from tokeff.reduce.visual_merge import AIM
from tokeff.reduce.visual_tower import FlowCut, MustDrop

CFG, BARE = pictures.TOWER, pictures.BARE
P, B = CFG.patches, 2
CANVAS = Canvas(2, 3, CFG.grid, (2, 10), (0, 18))
pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def looked():
    return pictures.looked(CFG, 7)


@partial(jax.jit, static_argnames=("method", "how"))
def reduced(method, x, seen, extra=None, how="reduce"):
    return getattr(method, how)(x, seen, CFG, *(() if extra is None else (extra,)))


def real(got, b):
    """(rows, places) of picture b."""
    there = np.ones(got.place_BM.shape[1], bool) if got.real_BM is None else np.asarray(got.real_BM[b])
    return np.asarray(got.x_BMD[b])[there], np.asarray(got.place_BM[b])[there].tolist()


def same(got, want, atol=1e-5):
    assert got[1] == list(want[1])
    np.testing.assert_allclose(got[0], want[0], atol=atol)


def numbers(seen, b):
    """(class row's attention to patches, keys of all rows) by layer, float64."""
    cls = {i: np.float64(a)[b].mean(axis=0)[1:] for i, a in seen.cls_BNS.items()}
    keys = {i: np.float64(a)[b].swapaxes(0, 1) for i, a in seen.k_BSNH.items()}
    return cls, keys


def test_choices_behind_the_tower(looked, subtests):
    """ToDRE, VisPruner, AIM, TokenCorrCompress."""
    x, seen = looked
    for method, rule in (
        (ToDRE(9), lambda x, cls, k: known.todre(x, 9, True)), (ToDRE(9, total=False), lambda x, cls, k: known.todre(x, 9, False)),
        (VisPruner(13, 0.5, 4), lambda x, cls, k: known.vispruner(x, cls[1], 13, 0.5, 4)),
        (VisPruner(3, 0.5, 8), lambda x, cls, k: known.vispruner(x, cls[1], 3, 0.5, 8)),
        (AIM(2), lambda x, cls, k: known.aim(x, 2)), (AIM(3), lambda x, cls, k: known.aim(x, 3)),
        (TokenCorr(20, 0.2, 0.25), lambda x, cls, k: known.tokencorr(x, k[1].mean(axis=0)[1:], cls[1], 20, 0.2, 0.25)),
    ):  # fmt: skip
        with subtests.test(repr(method)):
            got = reduced(method, x[:B], jax.tree.map(lambda a: a[:B], seen))
            for b in range(B):
                same(real(got, b), rule(np.float64(x[b, 1:]), *numbers(seen, b)))


def test_crops_of_the_densest_pictures_keep_most():
    """TokenCorrCompress: a picture of one key everywhere keeps a single patch, one without two alike keeps what the budget allows."""
    x, seen = pictures.looked(CFG, 2)
    k = seen.k_BSNH[1]
    k = k.at[0].set(1.0)
    got = reduced(TokenCorr(20, 0.99, 0.1), x, seen.replace(k_BSNH={1: k}))
    assert [len(real(got, b)[1]) for b in range(2)] == [1, 20]


def test_choices_by_the_text(looked):
    x, seen = looked
    text = np.random.default_rng(5).normal(size=(6, CFG.D))
    about = jnp.asarray((text / np.linalg.norm(text, axis=1, keepdims=True)).mean(axis=0), jnp.float32)
    some = jax.tree.map(lambda a: a[:B], seen)
    for method, rule in (
        (CDPruner(9), lambda x, r: known.cdpruner(x, r + 1e-6, 9)), (CATP(9, 0.7), lambda x, r: known.catp(x, r, 9, 0.7)),
        (CDPruner(9, opposite=True), lambda x, r: known.cdpruner(x, 1 - r + 1e-6, 9)),
    ):  # fmt: skip
        got = reduced(method, x[:B], some, about, how="answer")
        for b in range(B):
            rows = np.float64(x[b, 1:])
            same(real(got, b), rule(rows, known.relevance(rows, text)))
    got = reduced(CDPruner(9), x[:B], some)
    same(real(got, 0), known.cdpruner(np.float64(x[0, 1:]), np.ones(P), 9))
    got = reduced(CATP(9), x[:B], some)
    same(real(got, 0), known.todre(np.float64(x[0, 1:]), 9, False))


def test_flowcut_takes_rows_out_of_the_tower():
    """Masked rows are rows that are gone: the features equal those of a tower that runs on fewer and fewer rows."""
    params, pixels = pictures.tower(), pictures.pixels(CFG, B)
    for method, layers in ((FlowCut(10), (1,)), (FlowCut(10, every=1), (2,)), (FlowCut(20, every=1, keep=0.3), (2, 1))):
        got = method.walk(params, CFG, pixels, layers)
        for b in range(B):
            want = known.flowcut(params, CFG, np.asarray(pixels[b]), layers, method.rows(CFG), method.keep, method.every)
            same(real(got, b), want, atol=1e-4)


def test_mustdrop_merges_windows_in_the_tower():
    params, pixels = pictures.tower(), pictures.pixels(CFG, B)
    merged = []
    for like, window in ((0.875, (2, 2)), (0.85, (3, 3))):
        method = MustDrop(like, window)
        got = method.walk(params, CFG, pixels, (1,))
        for b in range(B):
            rows, left = known.mustdrop(params, CFG, np.asarray(pixels[b]), (1,), like, window)
            same(real(got, b), (rows, left), atol=1e-4)
            merged.append(P - len(left))
    assert any(merged) and len(set(merged)) > 2


def test_vflowopt_ranks_and_merges(looked):
    x, seen = looked
    some = jax.tree.map(lambda a: a[:B], seen)
    for method in (VFlowOpt(12, 1.05, 3.0, 0.4), VFlowOpt(15, 50.0, 2.5), VFlowOpt(9, 1.05, 4.0, -0.5)):
        got = reduced(method, x[:B], some)
        score = np.asarray(method.score(some, CFG))
        for b in range(B):
            q, k = (np.float64(a[1][b]).swapaxes(0, 1) for a in (seen.q_BSNH, seen.k_BSNH))
            want = known.context(q, k, method.above)[1:]
            if method.entropy:
                grey = np.round(255 * (np.asarray(seen.pixels_BYXC[b], np.float32).mean(axis=2) + 1) / 2)
                tiles = grey.reshape(6, 4, 6, 4).swapaxes(1, 2).reshape(P, 16)
                e = np.exp([known.bits(tile) for tile in tiles])
                want = want + method.entropy * e / e.sum()
            np.testing.assert_allclose(score[b], want, atol=1e-5)
            same(real(got, b), known.vflowopt(np.float64(x[b, 1:]), np.float64(score[b]), method.budget, CFG.grid, method.cell), atol=1e-4)


def test_entropy_is_of_levels():
    """A patch of one level has none, one of 16 levels has 4 bits; the range is what `span` says."""
    pixels = np.full((1, 24, 24, 3), -1.0, np.float32)
    pixels[0, :4, :4] = (np.arange(16).reshape(4, 4, 1) / 255) * 2 - 1
    got = bits(jnp.asarray(pixels), CFG, (-1.0, 1.0))[0]
    np.testing.assert_allclose(got, [4, *(0,) * 35], atol=1e-6)
    assert float(bits(jnp.asarray(pixels), CFG, (-100.0, 100.0))[0, 0]) == 0


def test_hired_and_globalcom2_share_a_budget(looked):
    x, seen = looked
    attention = {i: np.float64(a).mean(axis=1)[:, 1:] for i, a in seen.cls_BNS.items()}
    for share, alpha in ((0.2, 0.5), (0.5, 0.3), (0.9, 0.5)):
        got = reduced(HiRED(share, alpha), x, seen, extra=None, how="reduce")
        assert got.place_BM.shape == (7, HiRED(share).rows(CFG))
        got = HiRED(share, alpha).across(x, seen, CFG, CANVAS)
        want = known.hired(attention[0][0], attention[1], CFG.grid, 3, CANVAS.lines, CANVAS.columns, share, alpha)
        for b in range(7):
            same(real(got, b), (np.asarray(x[b, 1:])[want[b]], want[b]))
    for R, heat in ((0.3, 10.0), (0.5, 0.1), (0.75, 0.05)):
        got = GlobalCom2(R, heat).across(x, seen, CFG, CANVAS)
        want = known.globalcom2(attention[2], CFG.grid, 2, 3, CANVAS.lines, CANVAS.columns, R, heat)
        for b in range(7):
            same(real(got, b), (np.asarray(x[b, 1:])[want[b]], want[b]))


def test_patches_lie_in_the_crops_that_show_them():
    """Three crops side by side show a third of the picture each; with bars at either end, the outer ones show less of it."""
    for columns, first in (((0, 18), 2), ((4, 14), 1)):
        cell = crop_of_patch(CFG, Canvas(1, 3, CFG.grid, (0, 6), columns)).reshape(CFG.grid)
        assert (cell == cell[0]).all() and (cell[0] == 0).sum() == (cell[0] == 2).sum() == first
    for canvas, columns in ((Canvas(2, 2, CFG.grid, (2, 10), (0, 12)), (0, 12)), (Canvas(1, 3, CFG.grid, (0, 6), (5, 13)), (5, 13))):
        alike = HiRED().stand_in(canvas, CFG)
        assert (crop_of_patch(CFG, alike) == crop_of_patch(CFG, canvas)).all() and alike.columns == columns and alike.lines[0] == 0


def test_strips_are_crops_only_below_each_other(looked):
    """HiRED's released count of patches equals that of the crops in which they lie where a canvas is one crop wide."""
    x, seen = looked
    tall, wide = Canvas(6, 1, CFG.grid, (0, 36), (0, 6)), Canvas(1, 6, CFG.grid, (0, 6), (0, 36))
    for canvas in (tall, wide):
        a, b = (HiRED(0.3, strips=strips).across(x, seen, CFG, canvas).real_BM.sum(axis=1).tolist() for strips in (False, True))
        assert (a == b) == (canvas is tall)


def test_places_are_where_rows_are_laid_out():
    """`places` finds every row of `lay_out` again, newlines included."""
    rng = np.random.default_rng(0)
    for size, shape in (((30, 47), (1, 2)), ((47, 30), (2, 1)), ((40, 44), (2, 2)), ((9, 60), (1, 3))):
        canvas = laid(size, shape, CFG.grid)
        x = jnp.asarray(rng.normal(size=(1 + shape[0] * shape[1], P, 4)), jnp.float32)
        whole = np.asarray(lay_out(x, canvas, jnp.full(4, 7.0)))
        at, lines = places(canvas)
        assert (at[1:] >= 0).sum() == canvas.whole() and shrinks(canvas, 1) >= 1 and shrinks(canvas, None) == 1
        np.testing.assert_array_equal(whole[at[at >= 0]], np.asarray(x)[at >= 0])
        assert (whole[lines[:, 1]] == 7).all() and len(whole) == P + canvas.whole() + len(lines) == lines[-1, 1] + 1


def test_a_smaller_image_has_interpolated_positions():
    params = pictures.tower()
    for cells in ((3, 4), (6, 6), (5, 2)):
        got = smaller_places(params.place_SD, CFG, cells)
        want = known.bicubic(np.float64(params.place_SD[1:]).reshape(6, 6, -1), cells).reshape(-1, CFG.D)
        np.testing.assert_array_equal(got[0], params.place_SD[0])
        np.testing.assert_allclose(got[1:], want, atol=1e-5)
    got = SmallerImage((2, 3)).walk(params, CFG, pictures.pixels(CFG, 1), (1, 0))
    assert got.x_BMD.shape == (1, 6, 2 * CFG.D) and got.place_BM[0].tolist() == [0, 2, 4, 18, 20, 22]


def test_the_search_finds_the_top_of_a_hill():
    """A smooth objective of five numbers, and one that is no number in places; the same seed gives the same."""
    top = {k.name: k.low + 0.7 * (k.high - k.low) for k in KNOBS}

    def hill(at):
        return -sum(((at[k.name] - top[k.name]) / (k.high - k.low)) ** 2 for k in KNOBS)

    found, value = search(hill)
    assert value == hill(found) > -0.005 and (found, value) == search(hill)
    assert all(k.low <= found[k.name] <= k.high for k in KNOBS) and set(found) == {k.name for k in KNOBS}
    found, value = search(lambda at: float("nan") if at["a"] < 0.5 else at["a"], (Knob("a", 0.0, 1.0),), calls=60, first=5)
    assert value == found["a"] > 0.9
    with pytest.raises(UserError):
        search(hill, (Knob("a", 1.0, 1.0),))


def test_the_last_cut_makes_up_the_budget():
    """The released settings: a tenth, a quarter and half of all rows in the mean over 28 layers."""
    for first, second, last, mean in ((0.11661529508161146, 1.0, 0.6011, 0.1), (0.265, 0.9833, 0.877, 0.25), (0.723, 0.749, 0.487, 0.5)):
        assert completed((first, second), (9, 18), 28, mean) == pytest.approx(last, abs=0.01)
    for shares, cuts, mean in (((0.9, 0.9), (9, 18), 0.1), ((0.9,), (9, 18), 0.5), ((0.5, 0.5), (18, 9), 0.5)):
        with pytest.raises(UserError) as error:
            completed(shares, cuts, 28, mean)
        assert "\n" not in str(error.value)


def test_settings_that_cannot_work_are_refused():
    for method, cfg in (
        (FlowCut(), BARE), (FlowCut(0), CFG), (FlowCut(every=0), CFG), (MustDrop(window=(4, 3)), CFG), (MustDrop(window=(1, 1)), CFG),
        (VFlowOpt(2, cell=1.5), CFG), (VFlowOpt(span=(1.0, 1.0)), CFG), (VFlowOpt(layer=5), CFG),
        (HiRED(), BARE), (HiRED(0), CFG), (HiRED(1.5), CFG), (HiRED(alpha=1.0), CFG), (HiRED(lines="some"), CFG), (GlobalCom2(), BARE),
        (GlobalCom2(heat=0.0), CFG), (TokenCorr(), BARE), (TokenCorr(often=2.0), CFG), (ToDRE(0), CFG), (VisPruner(share=1.5), CFG),
        (CDPruner(P + 1), CFG), (CATP(text=-1.0), CFG), (AIM(-1), CFG), (AIM(6), CFG), (SmallerImage((7, 2)), CFG),
    ):  # fmt: skip
        with pytest.raises(UserError) as error:
            method.check(cfg)
        assert "\n" not in str(error.value), error.value
    with pytest.raises(UserError, match="layers"):
        MustDrop().walk(pictures.tower(), CFG, pictures.pixels(CFG, 1), (CFG.L,))
    with pytest.raises(UserError, match="below the features"):
        FlowCut().walk(pictures.tower(), CFG, pictures.pixels(CFG, 1), (0,))
