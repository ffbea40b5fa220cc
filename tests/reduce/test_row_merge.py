"""Merging rows of an encoder against its oracle, what it conserves, and the baselines beside it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import joining

from tokeff.errors import UserError
from tokeff.kernels import bipartite_match
from tokeff.models.flow import EMPTY
from tokeff.models.whisper import attend
from tokeff.reduce.baselines import Pooled, RandomDrop
from tokeff.reduce.merge import ToMe, join, log_size, match, merge, schedule, to_share, trace, whole

pytestmark = pytest.mark.core
B, S, D, H = 2, 15, 4, 3
RNG = np.random.default_rng(0)
X, METRIC = RNG.normal(size=(B, S, D)), RNG.normal(size=(B, S, H))
SIZE, SOURCE = whole(S, B)
jitted = jax.jit(merge, static_argnums=(3, 4, 5))
CHOICES = (ToMe(), ToMe(ordered=True), Pooled(), RandomDrop())


def groups_of(source, M):
    return [set(np.flatnonzero(np.asarray(source) == m)) for m in range(M)]


@pytest.mark.parametrize(("r", "protected", "ordered"), [(7, 1, False), (11, 2, False), (12, 0, True)])
def test_merging_equals_its_oracle(r, protected, ordered):
    """In one round and in several, with a class row and a distillation row; which rows are one, where they stand, means and sizes."""
    x, size, source = jitted(X, METRIC, SIZE, r, protected, ordered)
    for b in range(B):
        groups, rows, sizes = joining.merged(X[b], METRIC[b], r, protected, ordered)
        assert groups_of(source[b], S - r) == groups
        np.testing.assert_allclose(x[b], rows, atol=1e-5)
        np.testing.assert_array_equal(size[b], sizes)
        assert source[b, :protected].tolist() == list(range(protected))


@pytest.mark.parametrize("how", CHOICES, ids=str)
def test_every_reduction_over_two_layers(how):
    """Sizes tell how many input rows stand in each row, and their weighted sum stays; a row that is gone stays gone."""

    @jax.jit
    def both(x, metric):
        x1, size1, step1 = how.reduce(x, metric, SIZE, 4, 1, 0)
        x2, size2, step2 = how.reduce(x1, x1, size1, 5, 1, 1)
        return x2, size2, trace(step1, step2)

    x2, size2, source = both(X, METRIC)
    assert x2.shape == (B, S - 9, D)
    for b in range(B):
        there = np.asarray(source[b]) != EMPTY
        assert there.sum() == (S if not isinstance(how, RandomDrop) else S - 9)
        np.testing.assert_array_equal(np.bincount(np.asarray(source[b])[there], minlength=S - 9), size2[b])
        np.testing.assert_allclose((x2[b] * size2[b][:, None]).sum(0), X[b][there].sum(0), atol=1e-5)
        assert int(source[b, 0]) == 0 and float(size2[b, 0]) == 1


@pytest.mark.parametrize("how", CHOICES, ids=str)
def test_nothing_taken_away_is_nothing_done(how):
    x, size, source = jax.jit(how.reduce, static_argnums=(3, 4, 5))(X, METRIC, SIZE, 0, 0, 0)
    np.testing.assert_allclose(x, X, rtol=1e-6)
    np.testing.assert_array_equal(size, SIZE)
    np.testing.assert_array_equal(source, SOURCE)


@partial(jax.jit, static_argnums=1)
def place(metric_BSH, r):
    return match(*bipartite_match(metric_BSH), metric_BSH.shape[1], r, ordered=True)


def test_equal_rows_merge_first_and_the_earlier_of_equals():
    metric = np.eye(8)[[0, 1, 2, 3, 2, 4, 5, 6]]
    metric[3] = metric[2]
    source = place(metric[None], 1)[0]
    assert source.tolist() == [0, 1, 2, 2, 3, 4, 5, 6]  # row 4 is as near to row 3; row 2 comes first


def test_rows_that_are_no_number_stay_alone():
    metric = METRIC.copy()
    metric[0, 4] = metric[0, 5] = np.nan
    source = place(metric, 6)[0]
    assert source.tolist().count(int(source[4])) == source.tolist().count(int(source[5])) == 1


def test_log_size_is_attention_over_all_that_a_row_stands_for():
    groups, rows, sizes = joining.merged(X[0], METRIC[0], 8)
    q = RNG.normal(size=(5, D))
    got = attend(jnp.asarray(q)[None, :, None], *(jnp.asarray(rows)[None, None],) * 2, log_size(jnp.asarray(sizes)[None]))
    np.testing.assert_allclose(got[0, :, 0], joining.attention(q, rows, rows, groups), atol=1e-5)


def test_join_weighs_by_size():
    x, size = join(jnp.asarray([[[1.0], [4.0], [10.0]]]), jnp.asarray([[3.0, 1.0, 2.0]]), jnp.asarray([[0, 0, EMPTY]]), 1)
    assert float(x[0, 0, 0]) == 7 / 4 and float(size[0, 0]) == 4


def test_schedules():
    assert schedule(197, 12, 16, protected=1) == (16,) * 11 + (10,)  # half of what is left ends it
    assert schedule(10, 3, (1, 2, 0)) == (1, 2, 0)
    for share in (1.0, 0.66, 0.33, 0.22, 0.11):
        drop, left, held = to_share(1500, 4, share), 1500, []
        for r in drop:
            left -= r
            held.append(left)
        assert abs(np.mean(held) / 1500 - share) < 1e-3 and min(drop) >= 0
    assert to_share(1500, 4, 1.0) == (0,) * 4 == to_share(1500, 4, 1.0, at_once=True)
    assert to_share(200, 3, 0.25, at_once=True) == (150, 0, 0)


def test_what_does_not_fit_is_refused():
    for r, protected in ((15, 0), (14, 1), (-1, 0), (1, -1)):
        for how in CHOICES:
            with pytest.raises(UserError, match="cannot be taken away"):
                how.reduce(jnp.asarray(X), jnp.asarray(METRIC), SIZE, r, protected, 0)
    for call in (lambda: schedule(10, 3, (1, 2)), lambda: schedule(10, 2, -1), lambda: to_share(10, 2, 0.0), lambda: to_share(10, 2, 1.5)):
        with pytest.raises(UserError):
            call()
