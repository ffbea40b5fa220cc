"""tree_attention in plain float32 jax.numpy: the definition every other implementation is tested against."""

import jax.numpy as jnp

from tokeff.kernels.attend import sees
from tokeff.kernels.flash_prefill.reference import masked_attention


def run(q_BTNH, k_BKCH, v_BKCH, k_BKWH, v_BKWH, order_BKC, lo_BT, hi_BT, among_BTW, *, scale, softcap, finite):
    """Put the draft rows behind the stored ones and mask. Same contract as the public op."""
    see_BTKC = sees(order_BKC[:, None], lo_BT[:, :, None, None], hi_BT[:, :, None, None])
    among_BTKW = jnp.broadcast_to(among_BTW[:, :, None], (*see_BTKC.shape[:3], among_BTW.shape[2]))
    see = jnp.concatenate([see_BTKC, among_BTKW], axis=3)
    k, v = jnp.concatenate([k_BKCH, k_BKWH], axis=2), jnp.concatenate([v_BKCH, v_BKWH], axis=2)
    out_BTNH, lse_BTN = masked_attention(q_BTNH, k, v, see, scale=scale, softcap=softcap)
    return out_BTNH.astype(q_BTNH.dtype), lse_BTN
