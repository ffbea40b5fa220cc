"""column_mass in jax.numpy that XLA compiles well on any platform.

A scan over blocks of T adds each block's columns to the mass, so the scores held at a time do not grow with T. K is
read once a block, as stored; nothing of K's size is written. The rows of a head are summed by a product with their
weights, which XLA:CPU runs 2-3 times faster than a sum over the rows.
"""

import jax
import jax.numpy as jnp

from tokeff.kernels.decode_attention.xla import block_tokens, product, row_blocks, scores, seen_by_any
from tokeff.kernels.rows import head_rows, token_rows


def run(q_BTNH, k_BKCH, lse_BTN, weight_BT, order_BKC, lo_BT, hi_BT, *, scale, softcap, clean=False):
    """Same contract as the public op. clean: empty unseen slots up front, as gradients need (0 * NaN is NaN)."""
    N, (B, K, C) = q_BTNH.shape[2], order_BKC.shape
    if clean:
        k_BKCH = jnp.where(seen_by_any(order_BKC, lo_BT, hi_BT)[..., None], k_BKCH, 0)
    lse_BTN = jnp.where(lse_BTN == -jnp.inf, 0, lse_BTN)  # a row that sees nothing: its probabilities are 0 anyway

    def block(mass_BKC, rows):
        q_BtNH, lse_BtN, weight_Bt, lo_Bt, hi_Bt = rows
        R = q_BtNH.shape[1] * N // K
        score_BKRC = scores(q_BtNH, k_BKCH, order_BKC, lo_Bt, hi_Bt, scale=scale, softcap=softcap)
        p_BKRC = jnp.exp(score_BKRC - head_rows(lse_BtN, K, R)[..., None])
        weight_BKR = jnp.broadcast_to(token_rows(weight_Bt, N // K, R, 0)[:, None], (B, K, R))
        return mass_BKC + product("bkrc,bkr->bkc", p_BKRC, weight_BKR), None

    tokens = block_tokens(q_BTNH, k_BKCH)
    arrays = (q_BTNH, lse_BTN, weight_BT.astype(jnp.float32), lo_BT)
    # Padding rows see nothing (hi = -2 is below every order), so they add nothing.
    blocks = (*(row_blocks(x, tokens) for x in arrays), row_blocks(hi_BT, tokens, fill=-2))
    return jax.lax.scan(block, jnp.zeros((B, K, C), jnp.float32), blocks)[0]
