"""Attention of a few query rows over a cache, or over selected pages of it, with its log-sum-exp."""

from typing import Any

import jax
import jax.numpy as jnp

from tokeff.kernels import dispatch
from tokeff.kernels.decode_attention import pallas_gpu, pallas_tpu, reference, xla


def decode_attention(
    q_BTNH, k_BKCH, v_BKCH, order_BKC, lo_BT, hi_BT, *,
    page_BKM=None, bias_BKC=None, page_size=1, scale, softcap=0.0, finite=False, implementation=None, mesh=None,
) -> Any:  # fmt: skip
    """Attend T query rows to the stored rows they may see, and return the output and its log-sum-exp.

    Query t of sequence b sees a slot c of kv head k when lo_BT[b, t] <= order_BKC[b, k, c] <= hi_BT[b, t]. An empty
    slot has order -1 and lo is at least 0, so it is never seen; whatever it holds, NaN included, has no effect.
    Differentiable in q, k and v, through the XLA path.

    Args:
      q_BTNH: queries, rotated; T is small (1 for decoding, up to 64 for draft trees). N = K * G, and head n reads
        kv head n // G.
      k_BKCH, v_BKCH: stored keys and values, in the layout of the cache, same dtype as q.
      order_BKC: int32 place in the sequence of each stored row, -1 if the slot is empty.
      lo_BT, hi_BT: int32 first and last order a query sees, inclusive; lo > hi sees nothing.
      page_BKM: int32 pages to read, -1 for none, each page at most once; None reads every slot. Page p is the
        `page_size` slots from p * page_size on. The Pallas kernels read the bytes of these pages and no others.
      bias_BKC: float32 number added to the scores of each slot, finite, for rows that stand for several: log of how many. Not
        differentiated. The Pallas kernels do not take one; the XLA path runs then.
      page_size: slots a page; 1 selects single rows.
      scale: factor on q . k, usually H ** -0.5.
      softcap: if not 0, scores become softcap * tanh(scaled score / softcap).
      finite: the caller promises that unseen slots hold finite numbers too. On CPU that saves a look at every result, 4%
        of a decode step of a small model.
      implementation: None for the best that supports the call, or 'reference', 'xla', 'pallas_tpu', 'pallas_gpu',
        'interpret' (the TPU kernel, interpreted; runs anywhere, slowly).
      mesh: devices to run on, by default the one set by `jax.set_mesh`. B is split over its axis 'data', heads over
        'model', C over 'seq', each where it divides.

    Returns:
      out_BTNH in the dtype of q, accumulated in float32, and lse_BTN float32: the natural logarithm of the sum of
      exp(score). A query that sees nothing gets out 0 and lse -inf.

    Raises:
      ValueError: a named implementation does not support the call (the message says which constraint), shapes do not
        fit, or page_size does not divide the slots of a shard of 'seq'.
    """
    check_shapes(q_BTNH, k_BKCH, order_BKC, lo_BT, hi_BT)
    if v_BKCH.shape != k_BKCH.shape:
        raise ValueError(f"k {k_BKCH.shape} and v {v_BKCH.shape} must have the same shape")
    arrays = (q_BTNH, k_BKCH, v_BKCH, order_BKC, lo_BT, hi_BT, page_BKM, bias_BKC)
    options = {"page_size": page_size, "scale": float(scale), "softcap": float(softcap), "finite": finite}
    return dispatch.call(OP, implementation, mesh, arrays, **options)


def merge(out_BTNH, lse_BTN, out2_BTNH, lse2_BTN):
    """Join attention over two disjoint sets of rows, as if one softmax had run over both.

    Args:
      out_BTNH, lse_BTN, out2_BTNH, lse2_BTN: what `decode_attention` returned for each set; lse -inf for none seen.

    Returns:
      (out_BTNH in the dtype of the first, lse_BTN float32); out 0 and lse -inf where neither set was seen.
    """
    top_BTN = jnp.maximum(lse_BTN, lse2_BTN)
    top_BTN = jax.lax.stop_gradient(jnp.where(top_BTN == -jnp.inf, 0, top_BTN))
    w_BTN, w2_BTN = jnp.exp(lse_BTN - top_BTN), jnp.exp(lse2_BTN - top_BTN)
    sum_BTN = w_BTN + w2_BTN
    some_BTN = sum_BTN > 0
    sum_BTN = jnp.where(some_BTN, sum_BTN, 1)
    joined_BTNH = out_BTNH * (w_BTN / sum_BTN)[..., None] + out2_BTNH * (w2_BTN / sum_BTN)[..., None]
    return joined_BTNH.astype(out_BTNH.dtype), jnp.where(some_BTN, top_BTN + jnp.log(sum_BTN), -jnp.inf)


def check_shapes(q_BTNH, k_BKCH, order_BKC, lo_BT, hi_BT):
    """Raise ValueError, in one line, unless the shapes of queries, keys and visibility fit together."""
    (B, T, N, H), (_, K, C, _) = q_BTNH.shape, k_BKCH.shape
    if k_BKCH.shape != (B, K, C, H) or order_BKC.shape != (B, K, C) or N % K:
        raise ValueError(f"q {q_BTNH.shape}, k {k_BKCH.shape} and order {order_BKC.shape} are not BTNH, BKCH and BKC")
    if lo_BT.shape != (B, T) or hi_BT.shape != (B, T):
        raise ValueError(f"lo {lo_BT.shape} and hi {hi_BT.shape} must both be (B, T) = {(B, T)}")


def _localise(arrays, shard, options):
    """Number the pages as one shard of the slots counts them; pages of other shards become -1."""
    *others, page_BKM, bias_BKC = arrays
    if page_BKM is None:
        return arrays
    slots, page_size = others[3].shape[2], options["page_size"]
    if slots % page_size:
        raise ValueError(f"page_size {page_size} must divide the {slots} slots of a shard of mesh axis 'seq'")
    page_BKM = page_BKM - shard * (slots // page_size)
    return *others, jnp.where((page_BKM >= 0) & (page_BKM < slots // page_size), page_BKM, -1), bias_BKC


def _combine(outs, axis, *_):
    """Merge by log-sum-exp what each shard of the slots returned."""
    out_BTNH, lse_BTN = outs
    top_BTN = jax.lax.pmax(lse_BTN, axis)
    top_BTN = jnp.where(top_BTN == -jnp.inf, 0, top_BTN)
    w_BTN = jnp.exp(lse_BTN - top_BTN)
    sum_BTN = jax.lax.psum(w_BTN, axis)
    some_BTN = sum_BTN > 0
    out_BTNH = jax.lax.psum(out_BTNH * w_BTN[..., None], axis) / jnp.where(some_BTN, sum_BTN, 1)[..., None]
    lse_BTN = jnp.where(some_BTN, top_BTN + jnp.log(jnp.where(some_BTN, sum_BTN, 1)), -jnp.inf)
    return out_BTNH.astype(outs[0].dtype), lse_BTN


OP = dispatch.Op(
    name="decode_attention",
    run=dispatch.implementations(reference, xla, pallas_tpu, pallas_gpu),
    refusal=dispatch.refusals(pallas_tpu, pallas_gpu),
    dims=("BTNH", "BKCH", "BKCH", "BKC", "BT", "BT", "BKM", "BKC"),
    out_dims=("BTNH", "BTN"),
    floats=3,
    localise=_localise,
    combine=_combine,
)
