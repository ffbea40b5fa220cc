"""column_mass off the accelerator: the definition, the XLA path, gradients, refusals."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from kernel_calls import SMALL, assert_close, mass_arguments, mass_call, naive_mass, params, ragged

from tokeff.kernels import cases as kernel_cases
from tokeff.kernels import column_mass, decode_attention
from tokeff.kernels.cases import Case
from tokeff.kernels.column_mass import cases, pallas_tpu, reference
from tokeff.kernels.column_mass import xla as mass_xla
from tokeff.kernels.decode_attention import xla

pytestmark = pytest.mark.core


def mass(case, a, implementation=None):
    return column_mass(*mass_arguments(case, a), **cases.options(case), implementation=implementation)


@pytest.mark.parametrize("case", params(SMALL))
def test_reference_is_the_definition(case):
    a = ragged(case)
    assert_close(mass(case, a, "reference"), naive_mass(case, a), "float32")


@pytest.mark.parametrize("case", params(SMALL, ("float32", "bfloat16")))
def test_xla_equals_reference(case):
    a = ragged(case)
    got = mass(case, a, "xla")
    assert got.dtype == jnp.float32
    assert_close(got, mass(case, a, "reference"), case.dtype)
    assert (mass(case, a) == got).all()  # the automatic choice on CPU, and a second run


def test_blocks_of_tokens_change_nothing(monkeypatch):
    case = SMALL[3]
    a = ragged(case)
    whole = mass(case, a, "reference")
    monkeypatch.setattr(xla, "BLOCK_ROWS", 14)
    monkeypatch.setattr(xla, "BLOCK_SCORES", 1)
    arrays, options = mass_call(case, a)
    assert_close(mass_xla.run(*arrays, **options), whole, "float32")


def test_mass_of_weight_one_is_the_number_of_query_heads_that_see_something():
    case = SMALL[1]
    a = ragged(case)
    a["weight"] = jnp.ones_like(a["weight"])
    lse = decode_attention(*(a[n] for n in ("q", "k", "v", "order", "lo", "hi")), **cases.options(case))[1]
    assert abs(float(mass(case, a).sum()) - float((lse > -jnp.inf).sum())) < 1e-3


@pytest.mark.parametrize("case", params((SMALL[1], SMALL[2])))
def test_gradients_equal_the_references(case):
    arrays, options = mass_call(case, ragged(case))
    q, k, lse, weight, *ints = arrays

    def public(q, k, lse, weight):
        return jnp.sin(column_mass(q, k, lse, *ints, weight, **options)).sum()

    def definition(q, k, lse, weight):
        return jnp.sin(reference.run(q, k, lse, weight, *ints, **options)).sum()

    got, want = (jax.jit(jax.grad(f, (0, 1, 2, 3)))(q, k, lse, weight) for f in (public, definition))
    assert_close(got, want, "float32")
    assert all(jnp.isfinite(x).all() for x in got)


def test_what_cannot_be_done_is_said_in_one_line():
    case = Case("refused", N=4, K=2, C=64, H=24)
    with pytest.raises(ValueError, match="head size 24 in float32 is not one of"):
        mass(case, ragged(case), "pallas_gpu")
    long = kernel_cases.structs(Case("long", B=64, N=8, K=8, C=2**18))
    assert "ranges of 131584 blocks exceed 65536" in pallas_tpu.refusal(long["q"], long["k"], **case.options)
    call = partial(column_mass, **cases.options(case))
    q, k, lse, order, lo, hi, weight = mass_arguments(case, ragged(case))
    with pytest.raises(ValueError, match=r"must be \(B, T, N\)"):
        call(q, k, lse[..., 0], order, lo, hi, weight)
