"""flash_prefill in plain float32 jax.numpy: the definition every other implementation is tested against."""

import jax.numpy as jnp

from tokeff.kernels.attend import sees


def run(q_BTNH, k_BKCH, v_BKCH, order_BKC, order_BC, lo_BT, hi_BT, *, scale, softcap, sinks, first, window, finite):
    """Score every pair, hide the invisible ones, softmax over what is left. Same contract as the public op."""
    K = k_BKCH.shape[1]
    order_BKC = order_BKC if order_BC is None else jnp.repeat(order_BC[:, None], K, 1)
    see_BTKC = sees(order_BKC[:, None], lo_BT[:, :, None, None], hi_BT[:, :, None, None], sinks)
    out_BTNH, lse_BTN = masked_attention(q_BTNH, k_BKCH, v_BKCH, see_BTKC, scale=scale, softcap=softcap)
    return out_BTNH.astype(v_BKCH.dtype), lse_BTN


def masked_attention(q_BTNH, k_BKCH, v_BKCH, see_BTKC, *, scale, softcap):
    """Return float32 (out_BTNH, lse_BTN) of queries over the rows that a mask shows them."""
    B, T, N, H = q_BTNH.shape
    K = k_BKCH.shape[1]
    # A row nobody may see can hold anything, even NaN, and 0 * NaN is NaN: empty it first.
    seen_BKC1 = see_BTKC.any(1)[..., None]
    k_BKCH = jnp.where(seen_BKC1, k_BKCH.astype(jnp.float32), 0)
    v_BKCH = jnp.where(seen_BKC1, v_BKCH.astype(jnp.float32), 0)
    q_BTKGH = q_BTNH.astype(jnp.float32).reshape(B, T, K, N // K, H)
    score_BTKGC = jnp.einsum("btkgh,bkch->btkgc", q_BTKGH, k_BKCH, precision="highest") * scale
    if softcap:
        score_BTKGC = softcap * jnp.tanh(score_BTKGC / softcap)
    see_BTK1C = see_BTKC[:, :, :, None]
    score_BTKGC = jnp.where(see_BTK1C, score_BTKGC, -jnp.inf)
    top_BTKG1 = jnp.max(score_BTKGC, -1, keepdims=True, initial=-1e30)  # finite where nothing is visible
    p_BTKGC = jnp.where(see_BTK1C, jnp.exp(score_BTKGC - top_BTKG1), 0)
    sum_BTKG1 = p_BTKGC.sum(-1, keepdims=True)
    some_BTKG1 = sum_BTKG1 > 0
    sum_BTKG1 = jnp.where(some_BTKG1, sum_BTKG1, 1)
    out_BTKGH = jnp.einsum("btkgc,bkch->btkgh", p_BTKGC, v_BKCH, precision="highest") / sum_BTKG1
    lse_BTKG1 = jnp.where(some_BTKG1, top_BTKG1 + jnp.log(sum_BTKG1), -jnp.inf)
    return out_BTKGH.reshape(B, T, N, H), lse_BTKG1.reshape(B, T, N)
