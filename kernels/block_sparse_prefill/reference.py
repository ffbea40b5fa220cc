"""block_sparse_prefill in plain float32 jax.numpy: the definition every other implementation is tested against."""

import jax.numpy as jnp

from tokeff.kernels.attend import sees
from tokeff.kernels.flash_prefill.reference import masked_attention


def run(q_BTNH, k_BKCH, v_BKCH, order_BKC, lo_BT, hi_BT, block_BKQM, row_BKM=None, *, size, scale, softcap, first, finite):
    """Score every pair and hide those that were not chosen. Same contract as the public op."""
    T, C = q_BTNH.shape[1], order_BKC.shape[2]
    slot_C1 = jnp.arange(C)[:, None]
    read_BKQC = (slot_C1 // size == block_BKQM[:, :, :, None]).any(-1)
    if row_BKM is not None:
        read_BKQC |= (slot_C1 == row_BKM[:, :, None]).any(-1)[:, :, None]
    read_BTKC = jnp.repeat(read_BKQC, size, axis=2)[:, :, :T].swapaxes(1, 2)
    see_BTKC = read_BTKC & sees(order_BKC[:, None], lo_BT[:, :, None, None], hi_BT[:, :, None, None])
    out_BTNH, lse_BTN = masked_attention(q_BTNH, k_BKCH, v_BKCH, see_BTKC, scale=scale, softcap=softcap)
    return out_BTNH.astype(v_BKCH.dtype), lse_BTN
