"""FlexPrefill against its oracle: which heads are query-aware, which blocks and rows are read, and what comes out."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from oracles.flexing import Flex as Oracle

from tokeff.errors import UserError
from tokeff.models.flow import EMPTY, Flow, Here
from tokeff.sparse import methods as sparse
from tokeff.sparse.pattern import Rows, read_blocks

pytestmark = [pytest.mark.core, pytest.mark.xdist_group("prefill patterns")]
S, R, LENGTHS = 88, 8, (88, 61)
HERE = Here(0, tiny.CFG)
B, K, G, H = 2, tiny.CFG.K, tiny.CFG.N // tiny.CFG.K, tiny.CFG.H
HEADS = list(itertools.product(range(B), range(K)))
LARGE = 1 << 20


def prompt(sharp: float):
    """Rows whose keys share a direction within each block, so that mean keys say something; a flat head is easy to predict."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in ((B, S, K * G, H), (B, K, S, H), (B, K, S, H)))
    k += 2 * np.repeat(rng.normal(size=(B, K, S // R, H)), R, axis=2).astype(np.float32)
    q *= np.where(np.arange(K * G) < G, sharp, 3.0)[:, None].astype(np.float32)
    order = np.where(np.arange(S) < np.asarray(LENGTHS)[:, None], np.arange(S), EMPTY).astype(np.int32)
    ask = Flow(jnp.zeros((B, S, 1)), *(jnp.asarray(order),) * 3)
    return Rows(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(order), ask, jnp.asarray(LENGTHS), 0)


@partial(jax.jit, static_argnums=0)
def chosen(pattern, rows):
    return pattern.choose(rows, HERE)


@partial(jax.jit, static_argnums=0)
def outputs(pattern, rows, reading):
    return read_blocks(pattern, rows, reading, HERE)[0]


@pytest.fixture(scope="module")
def rows():
    return prompt(0.1)


def oracle(rows, b, h, gamma, tau):
    n = LENGTHS[b]
    q, k = np.asarray(rows.q_BTNH)[b, :n, h * G : (h + 1) * G], np.asarray(rows.k_BKSH)[b, h, :n]
    return Oracle(q, k, tiny.CFG.scale, R, gamma, tau)


def tau_between(rows) -> float:
    """A threshold that some heads pass and some do not, far from any."""
    found = sorted(oracle(rows, b, h, 0.9, 0.0).distance for b, h in HEADS)
    gap, at = max((y - x, i) for i, (x, y) in enumerate(itertools.pairwise(found)))
    assert gap > 0.05
    return (found[at] + found[at + 1]) / 2


def naive(rows, b, h, t, read):
    """[G, H] outputs of query t over a set of rows."""
    at = np.asarray(sorted(o for o in read if o <= t))
    q = np.asarray(rows.q_BTNH[b, t, h * G : (h + 1) * G], np.float64)
    k, v = (np.asarray(x, np.float64)[b, h, at] for x in (rows.k_BKSH, rows.v_BKSH))
    e = np.exp(q @ k.T * tiny.CFG.scale)
    return e @ v / e.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("gamma", [0.5, 0.8, 0.95])
def test_heads_blocks_and_outputs_equal_the_oracle(rows, gamma):
    tau = tau_between(rows)
    pattern = sparse.flexprefill(gamma, tau, LARGE, LARGE, 0, R)
    reading = chosen(pattern, rows)
    out = np.asarray(outputs(pattern, rows, reading))
    kinds = set()
    for b, h in HEADS:
        wanted = oracle(rows, b, h, gamma, tau)
        kinds.add(wanted.aware)
        singles = {int(x) for x in reading.row_BKM[b, h] if x != EMPTY}
        for own, (blocks, columns) in enumerate(wanted.read()):
            assert {int(x) for x in reading.block_BKQM[b, h, own] if x != EMPTY} == blocks, f"{b}, {h}, {own}"
            assert singles == columns
            assert int(reading.count_BKQ[b, h, own]) == len(blocks)
            reach = columns | {row for j in blocks for row in range(j * R, (j + 1) * R)}
            for t in wanted.blocks[own]:
                np.testing.assert_allclose(out[b, t, h * G : (h + 1) * G], naive(rows, b, h, t, reach), atol=2e-5)
    assert kinds == {True, False}, "one kind of head is not tested"


def test_more_gamma_reads_more(rows):
    counts = [int(chosen(sparse.flexprefill(g, 0.5, LARGE, LARGE, 0, R), rows).count_BKQ.sum()) for g in (0.3, 0.6, 0.9, 1.0)]
    assert counts == sorted(counts) and counts[0] < counts[-1]


@pytest.mark.parametrize("tau", [0.0, 9.0], ids=["columns and diagonals", "query-aware"])
def test_bounds_hold_and_keep_the_heaviest(rows, tau):
    """With room for three blocks a block of queries reads the first, its own, and the heaviest of the others that it wants."""
    few, all_of_them = (chosen(sparse.flexprefill(0.9, tau, most, 5, 0, R), rows) for most in (3, LARGE))
    assert few.row_BKM is not None and few.block_BKQM.shape[-1] == 3 and few.row_BKM.shape[-1] == 5
    pattern = sparse.flexprefill(0.9, tau, 3, 5, 0, R)
    for b, h in HEADS:
        for own in range(-(-LENGTHS[b] // R)):
            read, wanted = ({int(x) for x in r.block_BKQM[b, h, own] if x != EMPTY} for r in (few, all_of_them))
            assert {0, own} <= read <= wanted and len(read) == min(3, len(wanted))
    spoiled = np.array(rows.v_BKSH)
    last = -(-LENGTHS[0] // R) - 1
    for h in range(K):
        read = {row for j in np.asarray(few.block_BKQM[0, h, last]) if j != EMPTY for row in range(j * R, (j + 1) * R)}
        read |= {int(x) for x in few.row_BKM[0, h] if x != EMPTY}
        assert len(read) < S
        spoiled[0, h, [row for row in range(S) if row not in read]] = np.nan
    values = (rows.v_BKSH, jnp.asarray(spoiled))
    clean, poisoned = (outputs(pattern, rows.replace(v_BKSH=v), few)[0, last * R :] for v in values)
    np.testing.assert_array_equal(clean, poisoned)


def test_no_tau_makes_every_head_read_columns_and_diagonals(rows):
    assert not np.asarray(chosen(sparse.flexprefill(tau=0.0, block=R), rows).row_BKM == EMPTY).all(axis=-1).any()
    assert np.asarray(chosen(sparse.flexprefill(tau=9.0, block=R), rows).row_BKM == EMPTY).all()


@pytest.mark.parametrize("given", [{"gamma": 0.0}, {"gamma": 1.5}, {"tau": -1.0}, {"most": 1}, {"vertical": 0}], ids=str)
def test_bad_settings_are_refused_in_one_line(given):
    with pytest.raises(UserError, match=next(iter(given))) as error:
        sparse.flexprefill(**given).check(tiny.CFG, 64)
    assert "\n" not in str(error.value)
