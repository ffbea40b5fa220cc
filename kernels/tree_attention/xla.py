"""tree_attention in jax.numpy: the stored rows by decode_attention's XLA path, the draft beside them, merged by log-sum-exp.

The stored rows stay where they are: putting the draft behind them would copy the cache.
"""

import jax.numpy as jnp

from tokeff.kernels.attend import combine, scores, softmax
from tokeff.kernels.decode_attention import merge
from tokeff.kernels.decode_attention import xla as decode_xla


def run(q_BTNH, k_BKCH, v_BKCH, k_BKWH, v_BKWH, order_BKC, lo_BT, hi_BT, among_BTW, *, scale, softcap, finite, clean=False):
    """Same contract as the public op. clean: empty unseen rows up front, as gradients need (0 * NaN is NaN)."""
    arrays = q_BTNH, k_BKCH, v_BKCH, order_BKC, lo_BT, hi_BT
    out, lse = decode_xla.run(*arrays, page_size=1, scale=scale, softcap=softcap, finite=finite and not clean, clean=clean)
    if clean or not finite:
        seen_B1W1 = among_BTW.any(1)[:, None, :, None]
        k_BKWH, v_BKWH = jnp.where(seen_B1W1, k_BKWH, 0), jnp.where(seen_B1W1, v_BKWH, 0)
    out_BTNH, lse_BTN = over_draft(q_BTNH, k_BKWH, v_BKWH, among_BTW, scale=scale, softcap=softcap)
    return merge(out, lse, out_BTNH, jnp.where(among_BTW.any(2)[..., None], lse_BTN, -jnp.inf))


def over_draft(q_BTNH, k_BKWH, v_BKWH, among_BTW, *, scale, softcap):
    """Return (out_BTNH, lse_BTN) of draft queries over the draft alone; lse about -1e30 for a query that sees none of it."""
    p_BKGTW, lse_BKGT = softmax(scores(q_BTNH, k_BKWH, scale, softcap), among_BTW[:, None, None])
    return combine(p_BKGTW, v_BKWH), jnp.moveaxis(lse_BKGT, 3, 1).reshape(q_BTNH.shape[:3])
