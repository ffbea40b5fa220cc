"""Attention of many query rows over many stored rows: plain XLA, blocked over queries so that logits stay small."""

from __future__ import annotations

import jax
import jax.numpy as jnp

NEG = -1e30  # finite, so that a fully masked row gives zeros rather than NaN


def wide(dtype) -> jnp.dtype:
    """The type that logits and norms are computed in: float32, or float64 for a model that is float64 throughout."""
    return jnp.promote_types(jnp.float32, dtype)


def scores(q_BTNH: jax.Array, k_BKCH: jax.Array, scale: float, softcap: float) -> jax.Array:
    """float32 (float64 from float64) logits_BKGTC of every query head against its kv head's rows, before masking.

    The queries of a kv head are laid side by side first: asked to keep (t, k, g) apart, XLA:CPU leaves its matrix product for a
    loop nine times slower.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BKCH.shape[1]
    q = (q_BTNH * jnp.asarray(scale, q_BTNH.dtype)).reshape(B, T, K, N // K, H)
    rows = jnp.moveaxis(q, 1, 3).reshape(B, K, N // K * T, H)
    logits = jnp.einsum("bkrh,bkch->bkrc", rows, k_BKCH, preferred_element_type=wide(q.dtype)).reshape(B, K, N // K, T, -1)
    return softcap * jnp.tanh(logits / softcap) if softcap else logits


def softmax(logits: jax.Array, visible: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(probabilities, log-sum-exp) over the last axis in float32; a row that sees nothing gives zeros and NEG."""
    logits = jnp.where(visible, logits, NEG)
    top = jnp.max(logits, axis=-1, keepdims=True)
    e = jnp.where(visible, jnp.exp(logits - top), 0.0)
    total = jnp.sum(e, axis=-1, keepdims=True)
    return e / jnp.maximum(total, 1e-37), (top + jnp.log(jnp.maximum(total, 1e-37)))[..., 0]


def combine(p_BKGTC: jax.Array, v_BKCH: jax.Array) -> jax.Array:
    """out_BTNH of probabilities over values, in the values' dtype."""
    B, K, G, T, C = p_BKGTC.shape
    out = jnp.einsum("bkrc,bkch->bkrh", p_BKGTC.reshape(B, K, G * T, C).astype(v_BKCH.dtype), v_BKCH)
    return jnp.moveaxis(out.reshape(B, K, G, T, -1), 3, 1).reshape(B, T, K * G, v_BKCH.shape[-1])


def flash(
    q_BTNH: jax.Array,
    k_BKCH: jax.Array,
    v_BKCH: jax.Array,
    lo_BT: jax.Array,
    hi_BT: jax.Array,
    order_BKC: jax.Array,
    *,
    scale: float,
    softcap: float = 0.0,
    first: int | None = None,
    window: int | None = None,
    segment: int = 256,
    size: int = 128,
) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH, lse_BTN): each query reads the rows whose order lies in [lo, hi]. order_BKC is (B, 1, C) where heads hold the same rows.

    `first`: query t stands at stored row `first + t`, so rows after its segment, and those more than `window` before it, are not
    even touched; None when the queries are an arbitrary subset. Segments are static because their rows differ in number; within
    one, blocks of `size` queries run one after the other and reuse one buffer of logits. On CPU fresh buffers cost more than the
    arithmetic: one block a segment takes 2.5 times as long.
    """
    T, C = q_BTNH.shape[1], k_BKCH.shape[2]
    parts = []
    for a in range(0, T, segment):
        b = min(a + segment, T)
        end = C if first is None else min(first + b, C)
        start = 0 if first is None or window is None else max(first + a - window + 1, 0)
        stored = (k_BKCH[:, :, start:end], v_BKCH[:, :, start:end], order_BKC[:, :, start:end])
        asked = (q_BTNH[:, a:b], lo_BT[:, a:b], hi_BT[:, a:b])
        parts.append(_by_blocks(asked, stored, scale, softcap, size))
    return jnp.concatenate([out for out, _ in parts], axis=1), jnp.concatenate([lse for _, lse in parts], axis=1)


def _by_blocks(asked, stored, scale: float, softcap: float, size: int) -> tuple[jax.Array, jax.Array]:
    """`_block` over `size` queries at a time where that divides their number."""
    B, T = asked[1].shape
    if size >= T or T % size:
        return _block(asked, stored, scale, softcap)
    blocks = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(B, T // size, size, *x.shape[2:]), 1, 0), asked)
    done = jax.lax.map(lambda block: _block(block, stored, scale, softcap), blocks)
    out, lse = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, T, *x.shape[3:]), done)
    return out, lse


def _block(asked, stored, scale: float, softcap: float) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH, lse_BTN) of one block of queries over the rows it may see."""
    (q_BTNH, lo_BT, hi_BT), (k_BKCH, v_BKCH, order_BKC) = asked, stored
    B, T, N, _ = q_BTNH.shape
    order = order_BKC[:, :, None]
    seen = (order >= lo_BT[:, None, :, None]) & (order <= hi_BT[:, None, :, None])
    logits = jnp.where(seen[:, :, None], scores(q_BTNH, k_BKCH, scale, softcap), NEG)
    top = logits.max(axis=-1)
    e = jnp.exp(logits - top[..., None])
    total = e.sum(axis=-1)
    lse = jnp.moveaxis(jnp.where(top > NEG, top + jnp.log(total), NEG), 3, 1).reshape(B, T, N)
    # Divided after the product with v, over H numbers a row instead of C; a row that sees nothing gets 0.
    share = jnp.moveaxis(jnp.where(top > NEG, 1 / total, 0.0), 3, 1).reshape(B, T, N, 1)
    out = combine(e, v_BKCH)
    return out * share.astype(out.dtype), lse
