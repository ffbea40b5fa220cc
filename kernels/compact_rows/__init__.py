"""Rows of a cache that change their slots, keys and values together and in place."""

import jax

from tokeff.kernels import dispatch
from tokeff.kernels.compact_rows import pallas_gpu, pallas_tpu, reference, xla


def compact_rows(k_BKCH, v_BKCH, from_BKM, to_BKM, *, implementation=None, mesh=None) -> tuple[jax.Array, jax.Array]:
    """Move M rows of every head from some slots to others: what eviction leaves to the front, an accepted path of a tree to its slots.

    Row to_BKM[b, k, m] of head (b, k) becomes what row from_BKM[b, k, m] was before the call: all rows are read before one is written.
    Nothing else changes, bit for bit. Where the caller gives the caches away (donates them, or carries them through a loop) they are
    written in place. Differentiable in k and v, through the XLA path.

    Args:
      k_BKCH, v_BKCH: stored keys and values, in the layout of the cache.
      from_BKM, to_BKM: int32 slots; a pair with -1 in either moves nothing. No two pairs of a head may share a `to`.
      implementation: as in `decode_attention`.
      mesh: as in `decode_attention`; slots are not split, since a row may come from anywhere.

    Returns:
      (k_BKCH, v_BKCH).

    Raises:
      ValueError: a named implementation does not support the call (the message says which constraint), or shapes do not fit.
    """
    if k_BKCH.shape != v_BKCH.shape or k_BKCH.dtype != v_BKCH.dtype:
        raise ValueError(f"k {k_BKCH.dtype}{k_BKCH.shape} and v {v_BKCH.dtype}{v_BKCH.shape} must have the same shape and dtype")
    if from_BKM.shape != to_BKM.shape or from_BKM.shape[:2] != k_BKCH.shape[:2]:
        raise ValueError(f"from {from_BKM.shape} and to {to_BKM.shape} must both be (B, K, M) of a cache {k_BKCH.shape}")
    return dispatch.call(OP, implementation, mesh, (k_BKCH, v_BKCH, from_BKM, to_BKM))


OP = dispatch.Op(
    name="compact_rows",
    run=dispatch.implementations(reference, xla, pallas_tpu, pallas_gpu),
    refusal=dispatch.refusals(pallas_tpu, pallas_gpu),
    dims=("BKcH", "BKcH", "BKM", "BKM"),  # c: slots stay whole
    out_dims=("BKcH", "BKcH"),
    floats=2,
    localise=lambda arrays, shard, options: arrays,
    combine=lambda outs, *_: outs,
)
