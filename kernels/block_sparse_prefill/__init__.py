"""Attention of a prompt's rows over chosen blocks of stored rows, and single rows, with its log-sum-exp."""

from typing import Any

import jax.numpy as jnp

from tokeff.compat import context_mesh
from tokeff.kernels import dispatch
from tokeff.kernels.block_sparse_prefill import pallas_gpu, pallas_tpu, reference, xla
from tokeff.kernels.decode_attention import OP as DECODE
from tokeff.kernels.flash_prefill import check_prompt_shapes


def block_sparse_prefill(
    q_BTNH, k_BKCH, v_BKCH, order_BKC, lo_BT, hi_BT, block_BKQM, row_BKM=None, *,
    size, scale, softcap=0.0, first=None, finite=False, implementation=None, mesh=None,
) -> Any:  # fmt: skip
    """Attend each block of query rows to the blocks of stored rows that are named for it, and to nothing else.

    Queries q * size to (q + 1) * size - 1 read the stored rows p * size to (p + 1) * size - 1 for every p in block_BKQM[b, k, q],
    and the rows row_BKM[b, k], as far as their orders allow (lo <= order <= hi, as in `decode_attention`). A single row inside a
    block that is read counts once. What is not named is not read, NaN included. Differentiable in q, k and v through the XLA path.

    Args:
      q_BTNH: queries, rotated; any T. N = K * G, and head n reads kv head n // G: the heads of a group share a choice.
      k_BKCH, v_BKCH: stored keys and values. The Pallas kernels want the dtype of q.
      order_BKC: int32 place in the sequence of each stored row, -1 for no row; (B, 1, C) where all heads hold the same rows.
      lo_BT, hi_BT: int32 first and last order a query sees, inclusive.
      block_BKQM: int32 blocks that each of the Q = ceil(T / size) blocks of queries reads, each at most once, -1 for none.
      row_BKM: int32 single rows that all queries of the head read, each at most once, -1 for none; None for no rows at all.
      size: rows of a block, of queries and of stored rows.
      scale, softcap, implementation, mesh: as in `decode_attention`.
      first: a promise that lets the XLA path do less: query t is stored row first + t, a multiple of size, no block ahead of the
        queries is named, and -1 comes last.
      finite: a promise that rows which are read hold finite numbers, whether a query sees them or not.

    Returns:
      out_BTNH in the dtype of v, accumulated in float32, and lse_BTN, the natural logarithm of the sum of exp(score), float32
      (float64 from float64). A query that sees nothing gets out 0 and lse -inf.

    Raises:
      ValueError: a named implementation does not support the call (the message says which constraint), shapes do not fit, or size
        does not divide the rows of a shard of 'seq'.
    """
    check_prompt_shapes(q_BTNH, k_BKCH, v_BKCH, order_BKC, lo_BT, hi_BT)
    (B, K, C), blocks = k_BKCH.shape[:3], -(-q_BTNH.shape[1] // size)
    if block_BKQM.shape[:3] != (B, K, blocks) or not block_BKQM.shape[3]:
        raise ValueError(f"block {block_BKQM.shape} must be (B, K, Q, at least 1) with Q = ceil(T / size): {(B, K, blocks)}")
    if row_BKM is not None and (row_BKM.shape[:2] != (B, K) or not row_BKM.shape[2]):
        raise ValueError(f"row {row_BKM.shape} must be (B, K, at least 1) with B, K = {(B, K)}")
    mesh = context_mesh() if mesh is None else mesh
    if mesh is not None and mesh.shape.get("seq", 1) > 1:
        first = None  # it numbers the rows of the whole, and a shard counts its own
    arrays = (q_BTNH, k_BKCH, v_BKCH, jnp.broadcast_to(order_BKC, (B, K, C)), lo_BT, hi_BT, block_BKQM, row_BKM)
    options = {"size": size, "scale": float(scale), "softcap": float(softcap), "first": first, "finite": finite}
    return dispatch.call(OP, implementation, mesh, arrays, **options)


def _localise(arrays, shard, options):
    """Number blocks and rows as one shard of the stored rows counts them; those of other shards become -1."""
    *others, block_BKQM, row_BKM = arrays
    slots, size = others[3].shape[2], options["size"]
    if slots % size:
        raise ValueError(f"size {size} must divide the {slots} rows of a shard of mesh axis 'seq'")

    def here(index, n):
        index = index - shard * n
        return jnp.where((index >= 0) & (index < n), index, -1)

    return *others, here(block_BKQM, slots // size), None if row_BKM is None else here(row_BKM, slots)


OP = dispatch.Op(
    name="block_sparse_prefill",
    run=dispatch.implementations(reference, xla, pallas_tpu, pallas_gpu),
    refusal=dispatch.refusals(pallas_tpu, pallas_gpu),
    dims=("BTNH", "BKCH", "BKCH", "BKC", "BT", "BT", "BKQM", "BKM"),
    out_dims=("BTNH", "BTN"),
    floats=3,
    localise=_localise,
    combine=DECODE.combine,
)
