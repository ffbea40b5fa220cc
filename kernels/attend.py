"""Attention in jax.numpy, in pieces that XLA paths and models share: scores, softmax with its log-sum-exp, values."""

from __future__ import annotations

import jax
import jax.numpy as jnp

NEG = -1e30  # finite, so that a fully masked row gives zeros rather than NaN


def exact(*arrays: jax.Array) -> str | None:
    """The precision of a product: float32 means float32, on accelerators too, where XLA's default there would round its operands."""
    return "highest" if all(x.dtype == jnp.float32 for x in arrays) else None


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
    rows = group_rows(q_BTNH * jnp.asarray(scale, q_BTNH.dtype), K)
    logits = jnp.einsum("bkrh,bkch->bkrc", rows, k_BKCH, preferred_element_type=wide(q_BTNH.dtype), precision=exact(rows, k_BKCH))
    logits = logits.reshape(B, K, N // K, T, -1)
    return softcap * jnp.tanh(logits / softcap) if softcap else logits


def group_rows(x_BTNH: jax.Array, K: int) -> jax.Array:
    """(B, K, G * T, H): the T rows of each query head of a kv head, one head after the other."""
    B, T, N, H = x_BTNH.shape
    return jnp.moveaxis(x_BTNH.reshape(B, T, K, N // K, H), 1, 3).reshape(B, K, N // K * T, H)


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
    p_BKRC = p_BKGTC.reshape(B, K, G * T, C).astype(v_BKCH.dtype)
    out = jnp.einsum("bkrc,bkch->bkrh", p_BKRC, v_BKCH, precision=exact(p_BKRC, v_BKCH))
    return jnp.moveaxis(out.reshape(B, K, G, T, -1), 3, 1).reshape(B, T, K * G, v_BKCH.shape[-1])


def sees(order, lo, hi, sinks: int = 0):
    """Which pairs see each other: orders from lo to hi, and below `sinks` up to hi. The arrays broadcast; -1 is no row."""
    inside = (order >= lo) & (order <= hi)
    return inside | ((order >= 0) & (order < sinks) & (order <= hi)) if sinks else inside


def seen_by_any(order_BKC: jax.Array, lo_BT: jax.Array, hi_BT: jax.Array, sinks: int = 0) -> jax.Array:
    """seen_BKC, whether some query sees the row. XLA fuses the (B, T, K, C) compare away."""
    return sees(order_BKC[:, None], lo_BT[:, :, None, None], hi_BT[:, :, None, None], sinks).any(axis=1)
