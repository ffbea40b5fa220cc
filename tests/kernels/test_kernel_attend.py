"""The pieces of attention that XLA paths share: float32 means float32, and rounded operands stay as cheap as they are."""

import jax
import jax.numpy as jnp
import pytest

from tokeff.kernels.attend import combine, scores
from tokeff.reduce.visual_diverse import likeliest

pytestmark = pytest.mark.core
H = "(Precision.HIGHEST, Precision.HIGHEST)"


def precisions(f, *arrays) -> list[str]:
    """The precision of every matrix product in a function that names one."""
    lines = str(jax.make_jaxpr(f)(*arrays)).split("precision=")[1:]
    return [line.split("preferred")[0].strip() for line in lines]


@pytest.mark.parametrize(("dtype", "exact"), [("float32", True), ("bfloat16", False), ("float64", False)])
def test_products_of_float32_are_exact(dtype, exact):
    with jax.enable_x64(dtype == "float64"):
        q_BTNH, k_BKCH, p_BKGTC = (jnp.ones(shape, dtype) for shape in ((1, 2, 4, 8), (1, 2, 5, 8), (1, 2, 2, 2, 5)))
        found = precisions(lambda q, k: scores(q, k, 1.0, 0.0), q_BTNH, k_BKCH) + precisions(combine, p_BKGTC, k_BKCH)
    assert found == ([H, H] if exact else [])


def test_a_recurrence_does_not_round():
    """A greedy determinant subtracts nearly equal numbers step after step."""
    assert precisions(lambda x: likeliest(x, 3), jnp.eye(4)) == [H]
