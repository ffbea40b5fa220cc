"""column_mass in jax.numpy that XLA compiles well on any platform.

A scan over blocks of T adds each block's columns to the mass, so the scores held at a time stay under SCORE_BYTES
whatever T is. K is read once a block, as stored; nothing of K's size is written.
"""

import jax
import jax.numpy as jnp

from tokeff.kernels.decode_attention.xla import row_blocks, scores, seen_by_any

SCORE_BYTES = 16 * 2**20


def run(q_BTNH, k_BKCH, lse_BTN, weight_BT, order_BKC, lo_BT, hi_BT, *, scale, softcap, clean=False):
    """Same contract as the public op. clean: empty unseen slots up front, as gradients need (0 * NaN is NaN)."""
    B, T, N, _ = q_BTNH.shape
    K, C = order_BKC.shape[1:]
    if clean:
        k_BKCH = jnp.where(seen_by_any(order_BKC, lo_BT, hi_BT)[..., None], k_BKCH, 0)
    lse_BTN = jnp.where(lse_BTN == -jnp.inf, 0, lse_BTN)  # a row that sees nothing: its probabilities are 0 anyway

    def block(mass_BKC, rows):
        q_BtNH, lse_BtN, weight_Bt, lo_Bt, hi_Bt = rows
        score_BKtGC = scores(q_BtNH, k_BKCH, order_BKC, lo_Bt, hi_Bt, scale=scale, softcap=softcap)
        lse_BKtG1 = lse_BtN.reshape(B, -1, K, N // K).swapaxes(1, 2)[..., None]
        p_BKtGC = jnp.exp(score_BKtGC - lse_BKtG1) * weight_Bt[:, None, :, None, None]
        return mass_BKC + p_BKtGC.sum((2, 3)), None

    rows = max(1, min(T, SCORE_BYTES // (4 * B * N * C)))
    arrays = (q_BTNH, lse_BTN, weight_BT.astype(jnp.float32), lo_BT)
    # Padding rows see nothing (hi = -2 is below every order), so they add nothing.
    blocks = (*(row_blocks(x, rows) for x in arrays), row_blocks(hi_BT, rows, fill=-2))
    return jax.lax.scan(block, jnp.zeros((B, K, C), jnp.float32), blocks)[0]
