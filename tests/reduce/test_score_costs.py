"""What scores cost beside the layer's own attention, counted in the programs: the numbers that docs/reduce.md and docs/vision.md give."""

import math

import jax
import jax.numpy as jnp
import pytest

from tokeff.models.attention import flash
from tokeff.models.config import Config
from tokeff.models.flow import Flow, Here
from tokeff.reduce.cascade import looked_at
from tokeff.reduce.maps import mean_map, page_rank

pytestmark = pytest.mark.core
T, N, K, H = 2048, 8, 2, 64
CFG = Config("counted", V=8, D=64, F=64, L=1, N=N, K=K, H=H, max_len=T)


def products(jaxpr) -> int:
    """Multiply-adds of a program's matrix products, loops unrolled."""
    total = 0
    for eqn in jaxpr.eqns:
        inner = [getattr(p, "jaxpr", p) for v in eqn.params.values() for p in (v if isinstance(v, (tuple, list)) else (v,))]
        inner = [p for p in inner if hasattr(p, "eqns")]
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        # One branch of a condition runs; kernels of other platforms count less.
        total += times * (max if eqn.primitive.name == "cond" else sum)([0, *map(products, inner)])
        if eqn.primitive.name == "dot_general":
            (along, _), _ = eqn.params["dimension_numbers"]
            total += math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[0].aval.shape[i] for i in along)
    return total


def test_documented_costs_are_those_of_the_programs():
    order, here = jnp.arange(T)[None], Here(0, CFG)
    flow = Flow(jnp.zeros((1, T, 1)), order, order, order)
    q, k = jax.ShapeDtypeStruct((1, T, N, H), jnp.float32), jax.ShapeDtypeStruct((1, T, K, H), jnp.float32)

    def attention(q, k):
        k = k.swapaxes(1, 2)
        stored = jnp.broadcast_to(order[:, None], (1, K, T))
        return flash(q, k, k, jnp.zeros_like(order), order, stored, scale=1.0, first=0)

    own = products(jax.make_jaxpr(attention)(q, k).jaxpr)
    for call, share in (
        (lambda q, k: looked_at(q, k, flow, here), 1.9), (lambda q, k: looked_at(q, k, flow, here, last=64), 0.084),
        (lambda q, k: looked_at(q, k, flow, here, last=1), 0.0013), (lambda q, k: mean_map(q, k, flow, here), 0.89),
        (lambda q, k: page_rank(q, k, flow, here, 0.1, 5), 0.96),
    ):  # fmt: skip
        assert products(jax.make_jaxpr(call)(q, k).jaxpr) / own == pytest.approx(share, rel=0.03)
