"""How much attention each stored row received: the columns of the attention matrix, added up without building it."""

import jax

from tokeff.kernels import dispatch
from tokeff.kernels.column_mass import pallas_gpu, pallas_tpu, reference, xla
from tokeff.kernels.decode_attention import check_shapes


def column_mass(
    q_BTNH, k_BKCH, lse_BTN, order_BKC, lo_BT, hi_BT, weight_BT, *, scale, softcap=0.0, implementation=None, mesh=None
) -> jax.Array:
    """Add up, for every stored row, the attention probability that the queries give it.

    mass[b, k, c] = sum over t and the G query heads of kv head k of weight_BT * exp(score - lse_BTN), over the pairs
    that see each other (see `decode_attention`). With lse from `decode_attention` over the same rows the terms are
    exact probabilities. One op serves H2O (weight 1), SnapKV (1 on the last w rows), TOVA (1 on the last row) and A2SF
    (alpha ** age); where most weights are 0, pass only the rows that count. T x C scores are never held at once.
    Differentiable in q, k, lse and weight, through the XLA path.

    Args:
      q_BTNH: queries, rotated; any T. N = K * G, and head n reads kv head n // G.
      k_BKCH: stored keys, in the layout of the cache, same dtype as q.
      lse_BTN: float32 log-sum-exp of each query's scores; -inf for a query that sees nothing.
      order_BKC, lo_BT, hi_BT: int32 visibility, as in `decode_attention`. Slots nobody sees may hold NaN.
      weight_BT: weight of each query row.
      scale, softcap, implementation, mesh: as in `decode_attention`.

    Returns:
      mass_BKC float32; 0 for a slot that no query sees.

    Raises:
      ValueError: a named implementation does not support the call (the message says which constraint), or shapes do
        not fit.
    """
    check_shapes(q_BTNH, k_BKCH, order_BKC, lo_BT, hi_BT)
    if lse_BTN.shape != q_BTNH.shape[:3] or weight_BT.shape != lo_BT.shape:
        raise ValueError(f"lse {lse_BTN.shape} and weight {weight_BT.shape} must be (B, T, N) and (B, T) of q's shape")
    arrays = (q_BTNH, k_BKCH, lse_BTN, weight_BT, order_BKC, lo_BT, hi_BT)
    return dispatch.call(OP, implementation, mesh, arrays, scale=float(scale), softcap=float(softcap))


OP = dispatch.Op(
    name="column_mass",
    run=dispatch.implementations(reference, xla, pallas_tpu, pallas_gpu),
    refusal=dispatch.refusals(pallas_tpu, pallas_gpu),
    dims=("BTNH", "BKCH", "BTN", "BT", "BKC", "BT", "BT"),
    out_dims="BKC",
    floats=4,
    localise=lambda arrays, shard, options: arrays,  # nothing here counts slots
    combine=lambda mass_BKC, *_: mass_BKC,  # each shard's columns are its own
)
