"""Attention of the many query rows of a prompt over the rows stored so far, with its log-sum-exp."""

from typing import Any

from tokeff.compat import context_mesh
from tokeff.kernels import dispatch
from tokeff.kernels.decode_attention import OP as DECODE
from tokeff.kernels.flash_prefill import pallas_gpu, pallas_tpu, reference, xla
from tokeff.kernels.flash_prefill.backward import backward


def flash_prefill(
    q_BTNH, k_BKCH, v_BKCH, order_BKC, lo_BT, hi_BT, *,
    scale, softcap=0.0, sinks=0, first=None, window=None, finite=False, implementation=None, mesh=None,
) -> Any:  # fmt: skip
    """Attend T query rows to the stored rows they may see, and return the output and its log-sum-exp.

    Query t of sequence b sees a row c of kv head k when lo_BT[b, t] <= order_BKC[b, k, c] <= hi_BT[b, t], or when that order is
    below both `sinks` and hi + 1 (Xiao et al. 2023: the first rows stay visible beside a sliding window). Blocks of rows that
    no query of a block may see are not read, and cost no product. Differentiable in q, k and v: the backward pass keeps
    (out, lse), not probabilities, and makes those again a block at a time (Dao et al. 2022, appendix B).

    Args:
      q_BTNH: queries, rotated; any T. N = K * G, and head n reads kv head n // G.
      k_BKCH, v_BKCH: stored keys and values. The Pallas kernels want the dtype of q.
      order_BKC: int32 place in the sequence of each stored row, -1 for no row; (B, 1, C) where all heads hold the same rows.
      lo_BT, hi_BT: int32 first and last order a query sees, inclusive; lo > hi sees nothing. A sliding window is a `lo`.
      scale: factor on q . k, usually H ** -0.5.
      softcap: if not 0, scores become softcap * tanh(scaled score / softcap).
      sinks: rows of an order below this are seen by every query that comes after them.
      first: a promise that lets the XLA path skip: rows lie in ascending order and query t is stored row first + t.
      window: with `first`, a promise that no query sees a row more than window - 1 rows before it (sinks apart).
      finite: a promise that unseen rows hold finite numbers too. Otherwise they may hold NaN, and are cleaned on the way.
      implementation, mesh: as in `decode_attention`.

    Returns:
      out_BTNH in the dtype of v, accumulated in float32, and lse_BTN, the natural logarithm of the sum of exp(score), float32
      (float64 from float64). A query that sees nothing gets out 0 and lse -inf.

    Raises:
      ValueError: a named implementation does not support the call (the message says which constraint), or shapes do not fit.
    """
    check_prompt_shapes(q_BTNH, k_BKCH, v_BKCH, order_BKC, lo_BT, hi_BT)
    mesh = context_mesh() if mesh is None else mesh
    if mesh is not None and mesh.shape.get("seq", 1) > 1:
        first = window = None  # they number the rows of the whole, and a shard counts its own
    shared = order_BKC.shape[1] < k_BKCH.shape[1]
    arrays = (q_BTNH, k_BKCH, v_BKCH, None if shared else order_BKC, order_BKC[:, 0] if shared else None, lo_BT, hi_BT)
    options = {"scale": float(scale), "softcap": float(softcap), "sinks": sinks, "first": first, "window": window, "finite": finite}
    return dispatch.call(OP, implementation, mesh, arrays, **options)


def check_prompt_shapes(q_BTNH, k_BKCH, v_BKCH, order_BKC, lo_BT, hi_BT):
    """Raise ValueError, in one line, unless the shapes fit together. The head axis of order may be 1."""
    (B, T, N, H), (_, K, C, _) = q_BTNH.shape, k_BKCH.shape
    if k_BKCH.shape != (B, K, C, H) or order_BKC.shape not in ((B, K, C), (B, 1, C)) or N % K:
        raise ValueError(f"q {q_BTNH.shape}, k {k_BKCH.shape} and order {order_BKC.shape} are not BTNH, BKCH and BKC or B1C")
    if v_BKCH.shape != k_BKCH.shape:
        raise ValueError(f"k {k_BKCH.shape} and v {v_BKCH.shape} must have the same shape")
    if lo_BT.shape != (B, T) or hi_BT.shape != (B, T):
        raise ValueError(f"lo {lo_BT.shape} and hi {hi_BT.shape} must both be (B, T) = {(B, T)}")


OP = dispatch.Op(
    name="flash_prefill",
    run=dispatch.implementations(reference, xla, pallas_tpu, pallas_gpu),
    refusal=dispatch.refusals(pallas_tpu, pallas_gpu),
    dims=("BTNH", "BKCH", "BKCH", "BKC", "BC", "BT", "BT"),
    out_dims=("BTNH", "BTN"),
    floats=3,
    localise=lambda arrays, shard, options: arrays,  # orders say it all: nothing here counts slots
    combine=DECODE.combine,
    backward=backward,
)
