"""Rows that go to slots of a cache, from other slots or from a draft, keys and values together and in place."""

import jax

from tokeff.kernels import dispatch
from tokeff.kernels.compact_rows import pallas_gpu, pallas_tpu, reference, xla


def compact_rows(
    k_BKCH, v_BKCH, from_BKM, to_BKM, k_BKWH=None, v_BKWH=None, *, implementation=None, mesh=None
) -> tuple[jax.Array, jax.Array]:
    """Move M rows of every head to slots of its cache: the accepted path of a draft, or what eviction leaves to the front.

    Row to_BKM[b, k, m] of head (b, k) becomes what row from_BKM[b, k, m] of the draft is; without one, what that row of the cache itself
    was before the call: all rows are read before one is written. Nothing else changes, bit for bit. Where the caller gives the caches
    away (donates them, or carries them through a loop) they are written in place. Differentiable in k and v, through the XLA path.

    Args:
      k_BKCH, v_BKCH: stored keys and values, in the layout of the cache.
      from_BKM, to_BKM: int32 slots; a pair with -1 in either moves nothing. No two pairs of a head may share a `to`.
      k_BKWH, v_BKWH: keys and values of a draft, in the dtype of the cache.
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
    for x in (k_BKWH, v_BKWH):
        if (k_BKWH is None) != (x is None) or (x is not None and (x.shape[:2], x.shape[3:], x.dtype) != _head(k_BKCH)):
            raise ValueError(f"both drafts must be (B, K, W, H) in {k_BKCH.dtype}, beside a cache {k_BKCH.shape}, or both None")
    return dispatch.call(OP, implementation, mesh, (k_BKCH, v_BKCH, k_BKWH, v_BKWH, from_BKM, to_BKM))


def _head(k_BKCH):
    """Return what cache and draft have in common: B and K, H, and the dtype."""
    return k_BKCH.shape[:2], k_BKCH.shape[3:], k_BKCH.dtype


OP = dispatch.Op(
    name="compact_rows",
    run=dispatch.implementations(reference, xla, pallas_tpu, pallas_gpu),
    refusal=dispatch.refusals(pallas_tpu, pallas_gpu),
    dims=("BKcH", "BKcH", "BKWH", "BKWH", "BKM", "BKM"),  # c: slots stay whole
    out_dims=("BKcH", "BKcH"),
    floats=4,
    localise=lambda arrays, shard, options: arrays,
    combine=lambda outs, *_: outs,
)
