"""What becomes of a video's rows equals the papers' rules, written as loops; and a video in a prompt."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pictures
import pytest
from oracles import filming

from tokeff.errors import UserError
from tokeff.models.vit_config import ViTConfig
from tokeff.reduce.peaks import density_peaks
from tokeff.reduce.video import (
    DyCoke,
    FastVID,
    FramePairs,
    HoliTom,
    StillRuns,
    clustered,
    like_next,
    segments,
)

CFG = ViTConfig("frames", D=8, F=8, L=3, N=2, image=(16, 12), patch=4, cls=False)  # 4 x 3 rows a frame
P = CFG.patches
pytestmark = pytest.mark.core


def video(F, seed=0, moves=0.4):
    """(x_FPD, Seen): frames in which each place drifts, and at times jumps."""
    rng = np.random.default_rng(seed)
    x = np.cumsum(np.where(rng.random((F, P, 1)) < 0.25, 3.0, moves) * rng.normal(size=(F, P, CFG.D)), axis=0)
    return jnp.asarray(x, jnp.float32), pictures.looked(CFG, F, seed)[1]


@partial(jax.jit, static_argnames="method")
def reduced(method, x, seen):
    return method.reduce(x, seen, CFG)


def rows(got):
    """{(frame, place): row} of what is real."""
    real = np.asarray(got.real_BM)
    return {(f, int(got.place_BM[f, m])): np.asarray(got.x_BMD[f, m]) for f, m in zip(*np.nonzero(real))}


def same(got, want):
    assert list(got) == list(want)
    for key, row in want.items():
        np.testing.assert_allclose(got[key], row, atol=1e-4)


@pytest.mark.parametrize("F", [1, 2, 7])
def test_holitom_is_its_rule(F):
    for seed, (budget, tau, longest) in enumerate(((0.3, 0.8, 1024), (0.5, 0.9, 3), (0.2, 0.5, 1024), (1.0, 0.8, 1024))):
        x, seen = video(F, seed)
        method = HoliTom(budget, tau, longest, near=3)
        method.check(CFG)
        want = filming.holitom(np.float64(x), np.float64(seen.received_BS[1]), budget, tau, 3, 0.6, longest)
        same(rows(reduced(method, x, seen)), want)


@pytest.mark.parametrize("F", [1, 2, 9])
def test_fastvid_is_its_rule(F):
    for seed, settings in enumerate(((0.5, 0.4, 3, 0.5, 4, 0.6), (0.4, 0.6, 1, -1.0, 2, 0.3), (0.3, 0.0, 8, 0.9, 4, 0.6))):
        x, seen = video(F, seed)
        method = FastVID(*settings)
        method.check(CFG)
        same(rows(reduced(method, x, seen)), filming.fastvid(np.float64(x), np.float64(seen.received_BS[1]), *settings))


def test_runs_save_as_many_rows_as_any_cut():
    """The dynamic programme against every cut of seven frames, and against the rule by which ties are broken."""
    cut = jax.jit(segments, static_argnums=1)
    for seed in range(6):
        like = np.random.default_rng(seed).random((6, P)) < 0.6
        runs = cut(jnp.asarray(like), 1024)
        assert int(runs.gone) == max(filming.saved(like, c) for c in filming.every_cut(7))
        known, _ = filming.best_runs(like, 1024)
        assert runs.start_F.tolist() == [first for first, last in known for _ in range(first, last + 1)]
    still = cut(jnp.ones((6, P), bool), 1024)
    assert int(still.gone) == 6 * P and still.start_F.tolist() == [0] * 7 and bool(still.static_FP.all())
    never = cut(jnp.zeros((6, P), bool), 1024)
    assert int(never.gone) == 0 and never.start_F.tolist() == list(range(7)) and not bool(never.static_FP.any())


def test_clusters_are_density_peaks():
    group = jax.jit(lambda x, there, count: clustered(x, there, count, 5, 0.6))
    rng = np.random.default_rng(0)
    for count in (0, 1, 3, 6):
        x, there = rng.normal(size=(10, 4)), rng.permutation(10) < 7
        got, centre = group(jnp.asarray(x, jnp.float32), jnp.asarray(there), count)
        at = np.flatnonzero(there)
        want = filming.clusters(list(x[at]), count, 5, 0.6)
        assert np.flatnonzero(centre).tolist() == [at[c] for c in want]
        for c, row in want.items():
            np.testing.assert_allclose(got[at[c]], row, atol=1e-5)
    _, centre = group(jnp.ones((10, 4)), jnp.ones(10, bool), 4)  # all alike: still as many as asked for
    assert int(centre.sum()) == 4


def test_peaks_at_any_scale_and_of_twins():
    """Where exp(-d^2 / D) is 0 in float32 the ranks are still those of the formula; of twins the first is a centre; NaN is none."""
    peaks = jax.jit(lambda x, there: density_peaks(x, there, 3, 3)[0])
    x = np.random.default_rng(1).normal(size=(12, 8)).repeat(2, axis=0)[:23]
    for scale in (1e-3, 1.0, 300.0):
        known, _ = filming.peaks(list(np.float64(np.float32(scale * x))), 3)
        got = peaks(jnp.asarray(scale * x, jnp.float32), jnp.ones(23, bool))
        assert np.argsort(-got, stable=True).tolist() == np.argsort(-known, stable=True).tolist()
        assert all(i % 2 == 0 for i in np.argsort(-got, stable=True)[:12])
    spoiled = peaks(jnp.asarray(x, jnp.float32).at[4].set(jnp.nan), jnp.ones(23, bool))
    absent = peaks(jnp.asarray(x, jnp.float32), jnp.arange(23) != 4)
    assert spoiled[4] == -np.inf
    np.testing.assert_allclose(spoiled, absent, atol=1e-5)


@pytest.mark.parametrize("F", [1, 5, 8])
def test_the_others_are_their_rules(F):
    x, seen = video(F)
    for method, want in (
        (DyCoke(0.7), filming.dycoke(np.float64(x), 0.7)), (StillRuns(0.85), filming.still_runs(np.float64(x), 0.85)),
        (FramePairs(2), filming.frame_pairs(np.float64(x), 2)), (FramePairs(3), filming.frame_pairs(np.float64(x), 3)),
    ):  # fmt: skip
        method.check(CFG)
        same(rows(reduced(method, x, seen)), want)


def test_a_still_video_is_one_picture():
    """Frames that are all the same: HoliTom and StillRuns keep rows of the first alone."""
    x, seen = video(1)
    x, seen = jnp.repeat(x, 6, axis=0), jax.tree.map(lambda a: jnp.repeat(a, 6, axis=0), seen)
    for method in (HoliTom(0.1, 0.99, beta=1.0), StillRuns(0.99)):
        got = rows(reduced(method, x, seen))
        assert {f for f, _ in got} == {0} and (len(got) == P if isinstance(method, StillRuns) else len(got) == round(0.6 * P))
        for (f, p), row in got.items():
            np.testing.assert_allclose(row, x[f, p], atol=1e-5)


def test_equal_frames_are_at_most_equal():
    x, _ = video(5)
    assert float(like_next(jnp.repeat(x[:1], 2, axis=0)).max()) <= 1


def test_settings_that_cannot_work_are_refused():
    for method in (
        HoliTom(0.0), HoliTom(1.5), HoliTom(longest=0), HoliTom(beta=2.0), HoliTom(layer=7), FastVID(0.05), FastVID(context=2.0),
        FastVID(every=0), DyCoke(1.0), DyCoke(-0.1), FramePairs(0),
    ):  # fmt: skip
        with pytest.raises(UserError) as error:
            method.check(CFG)
        assert "\n" not in str(error.value)
