"""The Pallas kernels, interpreted on CPU.

Plain interpretation checks the arithmetic. `interpret_tpu` simulates the memories and the DMAs of a TPU as well: it
raises on reads out of bounds, fills what was never written with NaN, and finds races; it is some ten times slower.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_calls import PAGED, SMALL, WIDE, WIDE_PAGED, assert_close, attention_call, mass_call, params, ragged

from tokeff.compat import interpret_tpu, races_found
from tokeff.kernels import cases
from tokeff.kernels.cases import Case
from tokeff.kernels.column_mass import pallas_gpu as mass_gpu
from tokeff.kernels.column_mass import pallas_tpu as mass_tpu
from tokeff.kernels.column_mass import reference as mass_reference
from tokeff.kernels.decode_attention import pallas_gpu, pallas_tpu, reference

pytestmark = pytest.mark.interp

BOTH = ("float32", "bfloat16")
TPU_PAGED = (PAGED[3], WIDE_PAGED)
PROMPT = Case("prompt", T=70, N=2, K=1, C=300, H=16, ascending=True)
TILES = Case("tiles", B=2, T=70, N=4, K=2, C=130, H=16)  # more query rows than one program holds on a GPU
LONG = Case("long", N=2, K=1, C=1100, H=16)  # more than one block of slots, the last one cut


def in_turn(*some):
    """Each case in one dtype, and neighbours in different ones."""
    return [param for i, case in enumerate(some) for param in params((case,), BOTH[i % 2 : i % 2 + 1])]


def check(call, kernel, definition, case, interpret):
    """Run a kernel twice on a ragged, NaN-poisoned call: equal to the definition, and to itself bit for bit."""
    arrays, options = call(case, ragged(case))
    assert kernel.refusal(*arrays, **options) is None
    run = jax.jit(partial(kernel.run, interpret=interpret, **options))
    got, again = run(*arrays), run(*arrays)
    assert_close(got, jax.jit(partial(definition.run, **options))(*arrays), case.dtype)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("case", in_turn(*SMALL, *TPU_PAGED, LONG, WIDE))
def test_decode_attention_tpu(case):
    check(attention_call, pallas_tpu, reference, case, True)


@pytest.mark.parametrize("case", in_turn(LONG, *PAGED, *SMALL, TILES))
def test_decode_attention_gpu(case):
    check(attention_call, pallas_gpu, reference, case, True)


@pytest.mark.parametrize("case", in_turn(LONG, WIDE, *SMALL))
def test_column_mass_tpu(case):
    check(mass_call, mass_tpu, mass_reference, case, True)


@pytest.mark.parametrize("case", in_turn(*SMALL, LONG))
def test_column_mass_gpu(case):
    check(mass_call, mass_gpu, mass_reference, case, True)


@pytest.mark.parametrize("case", params((SMALL[1], LONG, *TPU_PAGED)) + params((WIDE,), ("bfloat16",)))
def test_decode_attention_tpu_has_no_races_and_stays_in_bounds(case):
    check(attention_call, pallas_tpu, reference, case, interpret_tpu())
    assert not races_found()


@pytest.mark.parametrize("case", params((SMALL[1], SMALL[3], LONG)) + params((WIDE,), ("bfloat16",)))
def test_column_mass_tpu_has_no_races_and_stays_in_bounds(case):
    check(mass_call, mass_tpu, mass_reference, case, interpret_tpu())
    assert not races_found()


@pytest.mark.parametrize("case", [SMALL[3], PROMPT], ids=lambda case: case.name)
def test_column_mass_tpu_in_many_blocks(case, monkeypatch):
    """Several blocks of rows add to one row of mass; those before and behind what they see name the nearest that they do."""
    monkeypatch.setattr(mass_tpu, "ROWS", 32)
    monkeypatch.setattr(mass_tpu, "_block_slots", lambda C, R: min(C, 128))
    a = cases.arrays(case, empty=0.2, bad=np.nan) if case.ascending else ragged(case)
    arrays, options = mass_call(case, a)
    got = mass_tpu.run(*arrays, **options, interpret=interpret_tpu())
    assert not races_found()
    assert_close(got, mass_reference.run(*arrays, **options), "float32")


def test_ranges_of_blocks_are_those_that_are_seen():
    order_BKC = jnp.arange(40)[None, None].at[:, :, 30:].set(-1)
    lo_BR, hi_BR = jnp.array([[0, 0, 12, 12, 5, 5]]), jnp.array([[3, 9, 21, 20, 4, 4]])  # the last two rows see nothing
    (low, high, lo, hi), (first, last) = mass_tpu._ranges(order_BKC, lo_BR, hi_BR, 8, 2)
    assert (low[0, 0].tolist()[:4], high[0, 0].tolist()) == ([0, 8, 16, 24], [7, 15, 23, 29, -1])
    assert (lo[0].tolist()[:2], hi[0].tolist()) == ([0, 12], [9, 21, -2])
    assert (first[0, 0].tolist(), last[0, 0].tolist()) == ([0, 1, 0], [1, 2, 0])


def test_blocks_nobody_can_see_are_not_fetched():
    """A page table that drops blocks must not change the result, and must name only the block already held."""
    arrays, options = attention_call(LONG, ragged(LONG))
    q, k, v, order, lo, hi, *_ = arrays
    order = jnp.arange(LONG.C).at[128:].set(-1)[None, None]  # only the first block of 128 holds anything
    lo = jnp.zeros_like(lo)
    page_BKM, _ = pallas_tpu._live_blocks(order, lo, hi, 128)
    assert page_BKM[0, 0].tolist() == [0] + [-1] * 8
    table = pallas_tpu._table(page_BKM, 1)
    assert table.tolist() == [0] + [~0] * 8
    got = pallas_tpu.run(q, k, v, order, lo, hi, interpret=True, **options)
    assert_close(got, reference.run(q, k, v, order, lo, hi, **options), "float32")
