"""Attention over rows that several sequences share: the queries of a group read them as one block, once for all of them."""

from typing import Any

import jax

from tokeff.kernels import dispatch
from tokeff.kernels.decode_attention import OP as DECODE
from tokeff.kernels.shared_prefix import pallas_gpu, pallas_tpu, reference, xla


def shared_prefix(
    q_BTNH, k_JKCH, v_JKCH, order_JKC, lo_BT, hi_BT, *, scale, softcap=0.0, finite=False, implementation=None, mesh=None
) -> tuple[jax.Array, jax.Array]:
    """Attend the T query rows of B sequences to the rows of their group (Juravsky et al. 2024, Hydragen, sec. 3.1 and 3.2).

    J groups of B / J sequences stand side by side, in order. The queries of a group become one block against its rows: a matrix product
    where each sequence by itself would take a product with a vector, and one read of K and V where there were B / J. `merge` joins the
    result to what each sequence has of its own, exactly. Differentiable in q, k and v, through the XLA path.

    Args:
      q_BTNH: queries, rotated. N = K * G, and head n reads kv head n // G.
      k_JKCH, v_JKCH: shared keys and values of each group, same dtype as q.
      order_JKC: int32 place in the sequence of each row, -1 where there is none.
      lo_BT, hi_BT: int32 first and last order a query sees, inclusive; lo > hi sees nothing.
      scale, softcap, finite, implementation: as in `decode_attention`.
      mesh: as in `decode_attention`. Groups are split over 'data' where it divides them; else all of them are read on every device.

    Returns:
      out_BTNH in the dtype of q, and lse_BTN float32. A query that sees nothing gets out 0 and lse -inf.

    Raises:
      ValueError: a named implementation does not support the call (the message says which constraint), or shapes do not fit.
    """
    (B, T, N, H), (J, K, C, _) = q_BTNH.shape, k_JKCH.shape
    if B % J or N % K or k_JKCH.shape != (J, K, C, H) or v_JKCH.shape != k_JKCH.shape or order_JKC.shape != (J, K, C):
        raise ValueError(f"q {q_BTNH.shape}, k {k_JKCH.shape}, v {v_JKCH.shape}, order {order_JKC.shape} are not BTNH, JKCH, JKCH, JKC")
    if lo_BT.shape != (B, T) or hi_BT.shape != (B, T):
        raise ValueError(f"lo {lo_BT.shape} and hi {hi_BT.shape} must both be (B, T) = {(B, T)}")
    options = {"scale": float(scale), "softcap": float(softcap), "finite": finite}
    # Laid out by group before a mesh splits anything, so that the queries of a group stay with its rows.
    q, lo, hi = (x.reshape(J, -1, *x.shape[2:]) for x in (q_BTNH, lo_BT, hi_BT))
    joined: Any = dispatch.call(OP, implementation, mesh, (q, k_JKCH, v_JKCH, order_JKC, lo, hi), **options)
    out, lse = joined
    return out.reshape(q_BTNH.shape), lse.reshape(B, T, N)


OP = dispatch.Op(
    name="shared_prefix",
    run=dispatch.implementations(reference, xla, pallas_tpu, pallas_gpu),
    refusal=dispatch.refusals(pallas_tpu, pallas_gpu),
    dims=("BTNH", "BKCH", "BKCH", "BKC", "BT", "BT"),  # B: groups, T: the queries of all sequences of a group
    out_dims=("BTNH", "BTN"),
    floats=3,
    localise=lambda arrays, shard, options: arrays,
    combine=DECODE.combine,
)
