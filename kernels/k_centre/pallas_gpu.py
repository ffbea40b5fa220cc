"""k_centre for NVIDIA GPUs (Triton): one program makes all choices of a sequence.

Grid (B,). Each row's distance to the nearest chosen one stays in registers; a choice takes a maximum, its first place, and one row of
distances by pointer. As XLA operations the same is a handful of kernels a choice.

HBM bytes: 4 * P * P for each sequence to clear NaN, then 4 * P a choice, from L2 where the distances fit it.
"""

from functools import partial

import jax
import jax.numpy as jnp

from tokeff.compat import pl, triton, triton_params
from tokeff.kernels.k_centre.xla import begin

MAX_ROWS = 4096  # one number each in the registers of 4 warps, three times


def refusal(distance_BPP, *, most):
    """Return in one line why this kernel cannot take the call, or None."""
    if distance_BPP.dtype != "float32":
        return f"distances must be float32, not {distance_BPP.dtype}"
    if (P := distance_BPP.shape[1]) > MAX_ROWS:
        return f"{P} rows exceed {MAX_ROWS}, what the registers of a program hold"
    return None


def run(distance_BPP, *, most, interpret=False):
    """Same contract as the public op, for calls that `refusal` accepts. interpret: as of `pl.pallas_call`."""
    B, P, _ = distance_BPP.shape
    distance_BPP, first_B, near_BP = begin(distance_BPP)
    width, turns = pl.next_power_of_2(P), pl.next_power_of_2(most)
    near_BX = jnp.pad(near_BP, [(0, 0), (0, width - P)], constant_values=-jnp.inf)
    index_BM = pl.pallas_call(
        partial(_kernel, most=most),
        grid=(B,),
        in_specs=[pl.BlockSpec((None,), lambda b: (b,)), pl.BlockSpec((None, width), lambda b: (b, 0)), pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=pl.BlockSpec((None, turns), lambda b: (b, 0)),
        out_shape=jax.ShapeDtypeStruct((B, turns), jnp.int32),
        compiler_params=triton_params(num_warps=4, num_stages=1),
        interpret=interpret,
        name="k_centre",
    )(first_B, near_BX, distance_BPP)
    return index_BM[:, :most]


def _kernel(first_ref, near_ref, distance_ref, index_ref, *, most):
    """All choices of one sequence."""
    b, P = pl.program_id(0), distance_ref.shape[2]
    place_X, turn_M = jnp.arange(near_ref.shape[0]), jnp.arange(index_ref.shape[0])

    def choose(i, state):
        near_X, index_M = state
        at = jnp.where(near_X == near_X.max(), place_X, P - 1).min()
        row_X = triton.load(distance_ref.at[b, at, place_X], mask=place_X < P, other=-jnp.inf)
        return jnp.where(place_X == at, -jnp.inf, jnp.minimum(near_X, row_X)), jnp.where(turn_M == i, at, index_M)

    start = near_ref[...], jnp.full(turn_M.shape, first_ref[...], jnp.int32)
    index_ref[...] = jax.lax.fori_loop(1, most, choose, start)[1]
