"""column_mass in plain float32 jax.numpy: the definition every other implementation is tested against."""

import jax.numpy as jnp


def run(q_BTNH, k_BKCH, lse_BTN, weight_BT, order_BKC, lo_BT, hi_BT, *, scale, softcap):
    """Build every attention probability and add up its columns. Same contract as the public op."""
    B, T, N, H = q_BTNH.shape
    K = k_BKCH.shape[1]
    q_BTKGH = q_BTNH.astype(jnp.float32).reshape(B, T, K, N // K, H)
    see_BTKC = (order_BKC[:, None] >= lo_BT[:, :, None, None]) & (order_BKC[:, None] <= hi_BT[:, :, None, None])
    # Slots nobody sees may hold NaN; a row that sees nothing has lse = -inf. Neither may touch a gradient.
    k_BKCH = jnp.where(see_BTKC.any(1)[..., None], k_BKCH.astype(jnp.float32), 0)
    lse_BTKG1 = jnp.where(lse_BTN == -jnp.inf, 0, lse_BTN).reshape(B, T, K, N // K, 1)

    score_BTKGC = jnp.einsum("btkgh,bkch->btkgc", q_BTKGH, k_BKCH, precision="highest") * scale
    if softcap:
        score_BTKGC = softcap * jnp.tanh(score_BTKGC / softcap)
    score_BTKGC = jnp.where(see_BTKC[:, :, :, None], score_BTKGC - lse_BTKG1, -jnp.inf)
    return jnp.einsum("btkgc,bt->bkc", jnp.exp(score_BTKGC), weight_BT.astype(jnp.float32), precision="highest")
