"""k_centre for TPU (Mosaic): the whole loop runs on distances that lie in VMEM.

Grid (B,). A step holds the (P, P) distances of one sequence; P is along the lanes. Each choice takes a maximum over P numbers, the first
place that holds it, and one row of distances, addressed by that place. As XLA operations the same is a handful of kernels a choice.

HBM bytes: 4 * P * P for each sequence, and what XLA needs to clear NaN out of them first.
"""

from functools import partial

import jax
import jax.numpy as jnp

from tokeff.compat import pl, tpu_params
from tokeff.kernels.k_centre.xla import begin

MAX_ROWS = 1024  # their distances take 4 MiB, held twice


def refusal(distance_BPP, *, most):
    """Return in one line why this kernel cannot take the call, or None."""
    if distance_BPP.dtype != "float32":
        return f"distances must be float32, not {distance_BPP.dtype}"
    if (P := distance_BPP.shape[1]) > MAX_ROWS:
        return f"distances of {P} rows exceed those of {MAX_ROWS}, what VMEM holds"
    return None


def run(distance_BPP, *, most, interpret=False):
    """Same contract as the public op, for calls that `refusal` accepts. interpret: as of `pl.pallas_call`."""
    B, P, _ = distance_BPP.shape
    distance_BPP, first_B, near_BP = begin(distance_BPP)
    index_B1M = pl.pallas_call(
        partial(_kernel, most=most),
        grid=(B,),
        in_specs=[pl.BlockSpec((1, 1, n), lambda b: (b, 0, 0)) for n in (1, P)] + [pl.BlockSpec((1, P, P), lambda b: (b, 0, 0))],
        out_specs=pl.BlockSpec((1, 1, most), lambda b: (b, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((B, 1, most), jnp.int32),
        compiler_params=tpu_params("parallel"),
        interpret=interpret,
        name="k_centre",
    )(first_B[:, None, None], near_BP[:, None], distance_BPP)
    return index_B1M[:, 0]


def _kernel(first_ref, near_ref, distance_ref, index_ref, *, most):
    """All choices of one sequence."""
    place_1P, turn_1M = (jax.lax.broadcasted_iota(jnp.int32, ref.shape[1:], 1) for ref in (near_ref, index_ref))

    def choose(i, state):
        near_1P, index_1M = state
        at = jnp.min(jnp.where(near_1P == jnp.max(near_1P), place_1P, place_1P.shape[1]))
        near_1P = jnp.minimum(near_1P, distance_ref[0, pl.ds(at, 1)])
        return jnp.where(place_1P == at, -jnp.inf, near_1P), jnp.where(turn_1M == i, at, index_1M)

    start = near_ref[0], jnp.broadcast_to(first_ref[0], turn_1M.shape)
    index_ref[0] = jax.lax.fori_loop(1, most, choose, start)[1]
