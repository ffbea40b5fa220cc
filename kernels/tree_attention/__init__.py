"""Attention of draft rows over a cache and over each other, in one pass, with its log-sum-exp."""

from typing import Any

from tokeff.kernels import dispatch
from tokeff.kernels.decode_attention import OP as DECODE
from tokeff.kernels.decode_attention import check_shapes
from tokeff.kernels.tree_attention import pallas_gpu, pallas_tpu, reference, xla


def tree_attention(
    q_BTNH, k_BKCH, v_BKCH, order_BKC, lo_BT, hi_BT, k_BKWH, v_BKWH, among_BTW, *,
    scale, softcap=0.0, finite=False, implementation=None, mesh=None,
) -> Any:  # fmt: skip
    """Attend T rows of a draft to the stored rows they may see and to the rows of the draft they descend from.

    One softmax runs over both: the stored rows with lo <= order <= hi, as in `decode_attention`, and the draft rows that
    among_BTW shows (Miao et al. 2024, SpecInfer, section 4.2: a tree is verified in one pass by a mask of ancestors). What a
    query does not see, NaN included, has no effect. Differentiable in q and in all keys and values, through the XLA path.

    Args:
      q_BTNH: queries, rotated; T is W, or less where only some rows of the draft ask. N = K * G, and head n reads kv head n // G.
      k_BKCH, v_BKCH: stored keys and values, in the layout of the cache. The Pallas kernels want one dtype everywhere.
      order_BKC: int32 place in the sequence of each stored row, -1 if the slot is empty.
      lo_BT, hi_BT: int32 first and last stored order a query sees, inclusive; hi is the last one committed.
      k_BKWH, v_BKWH: keys and values of the draft.
      among_BTW: bool, which draft rows each query sees: its ancestors and itself, inside its sliding window.
      scale, softcap, finite, implementation, mesh: as in `decode_attention`.

    Returns:
      out_BTNH in the dtype of q, accumulated in float32, and lse_BTN, the natural logarithm of the sum of exp(score) over both.
      A query that sees nothing gets out 0 and lse -inf.

    Raises:
      ValueError: a named implementation does not support the call (the message says which constraint), or shapes do not fit.
    """
    check_shapes(q_BTNH, k_BKCH, order_BKC, lo_BT, hi_BT)
    (B, T, _, H), K, W = q_BTNH.shape, k_BKCH.shape[1], among_BTW.shape[2]
    if v_BKCH.shape != k_BKCH.shape:
        raise ValueError(f"k {k_BKCH.shape} and v {v_BKCH.shape} must have the same shape")
    if k_BKWH.shape != (B, K, W, H) or v_BKWH.shape != (B, K, W, H) or among_BTW.shape != (B, T, W):
        raise ValueError(f"draft k {k_BKWH.shape}, v {v_BKWH.shape} and among {among_BTW.shape} are not BKWH, BKWH and BTW")
    arrays = (q_BTNH, k_BKCH, v_BKCH, k_BKWH, v_BKWH, order_BKC, lo_BT, hi_BT, among_BTW)
    return dispatch.call(OP, implementation, mesh, arrays, scale=float(scale), softcap=float(softcap), finite=finite)


def _localise(arrays, shard, options):
    """Show the draft to the first shard of the slots alone: every shard holds it, and it counts once."""
    *others, among_BTW = arrays
    return *others, among_BTW & (shard == 0)


OP = dispatch.Op(
    name="tree_attention",
    run=dispatch.implementations(reference, xla, pallas_tpu, pallas_gpu),
    refusal=dispatch.refusals(pallas_tpu, pallas_gpu),
    dims=("BTNH", "BKCH", "BKCH", "BKWH", "BKWH", "BKC", "BT", "BT", "BTW"),
    out_dims=("BTNH", "BTN"),
    floats=5,
    localise=_localise,
    combine=DECODE.combine,
)
