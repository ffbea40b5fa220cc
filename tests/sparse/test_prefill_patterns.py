"""Sparse prefill against naive attention over sets of rows, written from each pattern's rule; and what is not read is not touched."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tokeff.errors import UserError
from tokeff.generation import Setup
from tokeff.kv import methods as kv
from tokeff.models.config import Precision
from tokeff.models.flow import EMPTY, Flow, Here
from tokeff.models.load import Model
from tokeff.sparse import methods as sparse
from tokeff.sparse.pattern import Rows, read_blocks
from tokeff.sparse.patterns import AShape, TopBlocks

pytestmark = [pytest.mark.core, pytest.mark.xdist_group("prefill patterns")]
S, R, LENGTHS = 88, 8, (88, 61)
HERE = Here(0, tiny.CFG)
B, K, G, H = 2, tiny.CFG.K, tiny.CFG.N // tiny.CFG.K, tiny.CFG.H


@pytest.fixture(scope="module")
def given():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in ((B, S, K * G, H), (B, K, S, H), (B, K, S, H)))
    order = np.where(np.arange(S) < np.asarray(LENGTHS)[:, None], np.arange(S), EMPTY).astype(np.int32)
    return 2 * q, k, v, order


@partial(jax.jit, static_argnames=("pattern", "first"))
def attended(pattern, q, k, v, order, first=0):
    """(out_BTNH, lse_BTN) of the queries from `first` on."""
    q, order_q = jnp.asarray(q[:, first:]), jnp.asarray(order[:, first:])
    ask = Flow(jnp.zeros((B, S - first, 1)), order_q, order_q, order_q)
    return pattern.attend(q, jnp.asarray(k), jnp.asarray(v), jnp.asarray(order), ask, jnp.asarray(LENGTHS), first, HERE)


def naive(q, k, v, b, h, t, rows):
    """[G, H] outputs and [G] log-sum-exps of query t over a set of stored rows."""
    rows = sorted(rows)
    logits = q[b, t, h * G : (h + 1) * G].astype(np.float64) @ k[b, h, rows].T.astype(np.float64) * tiny.CFG.scale
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e @ v[b, h, rows] / e.sum(axis=1, keepdims=True), logits.max(axis=1) + np.log(e.sum(axis=1))


def blocks(numbers):
    return {row for j in numbers for row in range(j * R, (j + 1) * R)}


def a_shape(q, k, b, h, t):
    return {*range(4), *range(t - 9, t + 1)}


def tri_shape(q, k, b, h, t):
    return set(range(t + 1)) if t >= LENGTHS[b] - 6 else a_shape(q, k, b, h, t)


def s2(q, k, b, h, t):
    own = t // R
    return blocks(j for j in range(own + 1) if own - j < 2 or (j + h * max(1, 4 // K)) % 4 == 0)


def chunks(q, k, b, h, t):
    c = t // (2 * R)
    return blocks([0, *range(2 * max(c - 1, 0), 2 * c + 2)])


def top_blocks(q, k, b, h, t):
    """The own block and the 2 others of the largest mean-pooled score."""
    own, n = t // R, LENGTHS[b]

    def mean(x, j):
        return x[j * R : min((j + 1) * R, n)].mean(axis=0)

    query = mean(q[b, :, h * G : (h + 1) * G].mean(axis=1), own)
    ranked = sorted(range(own), key=lambda j: -query @ mean(k[b, h], j))
    return blocks([own, *ranked[:2]])


def vertical_slash(q, k, b, h, t):
    """Rows and bundles of diagonals by the attention of the last 12 rows."""
    n, column, bundle = LENGTHS[b], np.zeros(S), np.zeros(S // R)
    for asking, g in itertools.product(range(n - 12, n), range(G)):
        logits = q[b, asking, h * G + g].astype(np.float64) @ k[b, h, : asking + 1].T * tiny.CFG.scale
        p = np.exp(logits - logits.max())
        p /= p.sum()
        column[: asking + 1] += p
        for row in range(asking + 1):
            bundle[(asking - row) // R] += p[row]
    column[:3], bundle[0] = np.inf, np.inf
    far = {e for d in np.argsort(-bundle)[:2] for e in (d, d + 1)}
    return blocks(t // R - e for e in far if e <= t // R) | set(np.argsort(-column)[:10].tolist())


CASES = {
    "A-shape": (sparse.a_shape(4, 10, block=R), a_shape),
    "Tri-shape": (sparse.tri_shape(4, 10, 6, R), tri_shape),
    "S2": (sparse.s2_attention(2, 4, 0, R), s2),
    "chunks": (sparse.chunk_prefill(2, 1, 1, 0, R), chunks),
    "top blocks": (sparse.block_top_k(3, 0, R), top_blocks),
    "vertical-slash": (sparse.VerticalSlash(R, 0, 10, 2, 12, 3), vertical_slash),
}


@pytest.mark.parametrize("name", CASES)
def test_pattern_equals_its_oracle(name, given):
    q, k, v, order = given
    pattern, rule = CASES[name]
    out, lse = map(np.asarray, jax.jit(lambda: attended(pattern, q, k, v, order))())
    for b, h in itertools.product(range(B), range(K)):
        for t in range(LENGTHS[b]):
            rows = {row for row in rule(q, k, b, h, t) if 0 <= row <= t}
            wanted, wanted_lse = naive(q, k, v, b, h, t, rows)
            np.testing.assert_allclose(out[b, t, h * G : (h + 1) * G], wanted, atol=2e-5, err_msg=f"{b}, {h}, {t}")
            np.testing.assert_allclose(lse[b, t, h * G : (h + 1) * G], wanted_lse, atol=2e-5)


def test_each_head_has_its_pattern(given):
    q, k, v, order = given
    both = sparse.minference(10, 2, 3, 4, 10, 0, R, heads=((1, 2),) * tiny.CFG.L)
    out, _ = attended(both, q, k, v, order)
    for h, alone in enumerate((AShape(R, 0, 4, 10), TopBlocks(R, 0, 3))):
        np.testing.assert_allclose(out[:, :, h * G : (h + 1) * G], attended(alone, q, k, v, order)[0][:, :, h * G : (h + 1) * G], atol=2e-6)


@pytest.mark.parametrize("name", ["A-shape", "S2", "chunks", "top blocks"])
def test_a_later_chunk_reads_what_the_whole_prompt_reads(name, given):
    q, k, v, order = given
    whole, part = (attended(CASES[name][0], q, k, v, order, first)[0] for first in (0, 3 * R))
    for b, n in enumerate(LENGTHS):
        np.testing.assert_allclose(part[b, : n - 3 * R], whole[b, 3 * R : n], atol=2e-6)


@pytest.mark.parametrize("name", ["A-shape", "S2", "chunks", "top blocks", "vertical-slash"])
def test_blocks_that_are_not_read_are_not_touched(name, given):
    """NaN in every row that the last block of queries does not read changes nothing there: it is skipped, not masked."""
    q, k, v, order = given
    pattern, last = CASES[name][0], S - R
    ask = Flow(jnp.zeros((B, S, 1)), *(jnp.asarray(order),) * 3)
    rows = Rows(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(order), ask, jnp.asarray(LENGTHS), 0)
    reading = jax.jit(lambda rows: pattern.choose(rows, HERE))(rows)
    spoiled = np.array(v)
    for h in range(K):
        read = blocks(int(j) for j in reading.block_BKQM[0, h, -1] if j != EMPTY)
        read |= set() if reading.row_BKM is None else set(np.asarray(reading.row_BKM[0, h]).tolist())
        assert len(read) < S
        spoiled[0, h, [row for row in range(S) if row not in read]] = np.nan
    outputs = jax.jit(lambda v: read_blocks(pattern, rows.replace(v_BKSH=v), reading, HERE)[0])
    clean, poisoned = (outputs(x)[0, last:] for x in (v, spoiled))
    np.testing.assert_array_equal(clean, poisoned)


def checked(length=64, **parts):
    m = Model(tiny.CFG, tiny.params(), None, Precision(), "tiny")
    Setup(**parts).check(m, [length], 4)


def test_evidence_that_sparse_prefill_lacks_is_refused():
    with pytest.raises(UserError, match="every prompt row"):
        checked(kv=kv.h2o(0.5), prefill=sparse.a_shape())
    with pytest.raises(UserError, match="set dense=6"):
        checked(kv=kv.snapkv(0.5, 6), prefill=sparse.a_shape())
    checked(kv=kv.snapkv(0.5, 6), prefill=sparse.tri_shape(dense=6))


@pytest.mark.parametrize(
    "pattern",
    [
        sparse.a_shape(window=0), sparse.a_shape(sinks=-1), sparse.a_shape(block=0), sparse.block_top_k(0), sparse.s2_attention(0),
        sparse.chunk_prefill(0), sparse.minference(vertical=0, sinks=0), sparse.minference(heads=((0, 1),)),
        sparse.minference(heads=((0, 3),) * tiny.CFG.L),
    ],
    ids=str,
)  # fmt: skip
def test_bad_settings_are_refused_in_one_line(pattern):
    with pytest.raises(UserError) as error:
        checked(prefill=pattern)
    assert "\n" not in str(error.value)


def test_chunks_that_split_a_block_are_refused():
    with pytest.raises(UserError, match="chunk=24"):
        tiny.read(tiny.FULL, pattern=sparse.a_shape(block=8), chunk=20)


def test_a_policy_packs_what_a_pattern_left():
    """SnapKV over Tri-shape: its window read densely, so its evidence is that of the rows the pattern let it see."""
    prompt = tiny.read(kv.snapkv(0.5, 6), pattern=sparse.tri_shape(4, 8, 6, 8))
    s = tiny.go(tiny.start(prompt, kv.snapkv(0.5, 6)), kv.snapkv(0.5, 6))
    assert all(len(row) == tiny.NEW for row in tiny.text(s))
