"""Attention of many query rows over many stored rows: plain XLA, blocked over queries so that logits stay small."""

from __future__ import annotations

import jax
import jax.numpy as jnp

NEG = -1e30  # finite, so that a fully masked row gives zeros rather than NaN


def wide(dtype) -> jnp.dtype:
    """The type that logits and norms are computed in: float32, or float64 for a model that is float64 throughout."""
    return jnp.promote_types(jnp.float32, dtype)


def scores(q_BTNH: jax.Array, k_BKCH: jax.Array, scale: float, softcap: float) -> jax.Array:
    """float32 logits_BKGTC of every query head against its kv head's rows, before masking."""
    B, T, N, H = q_BTNH.shape
    K = k_BKCH.shape[1]
    q = (q_BTNH * jnp.asarray(scale, q_BTNH.dtype)).reshape(B, T, K, N // K, H)
    logits = jnp.einsum("btkgh,bkch->bkgtc", q, k_BKCH, preferred_element_type=wide(q.dtype))
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
    B, K, G, T, _ = p_BKGTC.shape
    out = jnp.einsum("bkgtc,bkch->btkgh", p_BKGTC.astype(v_BKCH.dtype), v_BKCH)
    return out.reshape(B, T, K * G, v_BKCH.shape[-1])


def flash(
    q_BTNH: jax.Array,
    k_BKCH: jax.Array,
    v_BKCH: jax.Array,
    lo_BT: jax.Array,
    hi_BT: jax.Array,
    order_BC: jax.Array,
    *,
    scale: float,
    softcap: float = 0.0,
    first: int | None = None,
    window: int | None = None,
    size: int = 256,
) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH, lse_BTN): each query reads the rows whose order lies in [lo, hi].

    `first`: query t stands at stored row `first + t`, so rows after it, and those more than `window` before it, are not even
    touched; None when the queries are an arbitrary subset. Queries go in static blocks of `size`: 2048 x 2048 logits of
    every head at once would be 150 MB on a 9-head model and fall out of every cache.
    """
    T, C = q_BTNH.shape[1], k_BKCH.shape[2]
    outs, lses = [], []
    for a in range(0, T, size):
        b = min(a + size, T)
        end = C if first is None else min(first + b, C)
        start = 0 if first is None or window is None else max(first + a - window + 1, 0)
        order = order_BC[:, None, start:end]
        seen = (order >= lo_BT[:, a:b, None]) & (order <= hi_BT[:, a:b, None])
        p, lse = softmax(scores(q_BTNH[:, a:b], k_BKCH[:, :, start:end], scale, softcap), seen[:, None, None])
        outs.append(combine(p, v_BKCH[:, :, start:end]))
        lses.append(jnp.moveaxis(lse, 3, 1).reshape(lse.shape[0], b - a, -1))
    return jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=1)
