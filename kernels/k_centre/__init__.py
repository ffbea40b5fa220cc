"""Rows far from each other: greedy max-min selection, also known as k-centre, from a matrix of distances."""

import jax

from tokeff.kernels import dispatch
from tokeff.kernels.k_centre import pallas_gpu, pallas_tpu, reference, xla


def k_centre(distance_BPP, *, most, implementation=None, mesh=None) -> jax.Array:
    """Return `most` rows far from each other, in the order of their choice (Alvar et al. 2025, DivPrune, alg. 1; Gonzalez 1985).

    First the row whose nearest neighbour is farthest, then always the one whose nearest chosen row is farthest. Of equal ones the first
    counts.

    Args:
      distance_BPP: float32 distances; the diagonal counts as no neighbour. Where it is NaN the row is no row, and comes last; any other NaN
        counts as far.
      most: how many, at most P.
      implementation, mesh: as in `decode_attention`.

    Returns:
      index_BM int32.

    Raises:
      ValueError: a named implementation does not support the call (the message says which constraint), or shapes do not fit.
    """
    if distance_BPP.ndim != 3 or distance_BPP.shape[1] != distance_BPP.shape[2] or not 1 <= most <= distance_BPP.shape[1]:
        raise ValueError(f"distance {distance_BPP.shape} is not (B, P, P), or most={most} is not 1 to P")
    return dispatch.call(OP, implementation, mesh, (distance_BPP,), most=most)


OP = dispatch.Op(
    name="k_centre",
    run=dispatch.implementations(reference, xla, pallas_tpu, pallas_gpu),
    refusal=dispatch.refusals(pallas_tpu, pallas_gpu),
    dims=("Bpp",),  # p: rows stay whole
    out_dims="BM",
    floats=0,
    localise=lambda arrays, shard, options: arrays,
    combine=lambda outs, *_: outs,
)
