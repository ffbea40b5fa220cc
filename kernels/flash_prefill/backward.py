"""Gradients of flash_prefill in jax.numpy, from the output and log-sum-exp that the forward pass kept.

With p = exp(s - lse), the row's output o and the cotangents do and dlse (Dao et al. 2022, appendix B.2; the derivative of lse by a
score is p, which adds the last term):

    dv = p^T do        ds = p * (do v^T - sum(o * do) + dlse)        dq = scale * ds k        dk = scale * ds^T q

and through a cap s = c tanh(x / c), ds becomes ds * (1 - (s / c)^2). Probabilities are made again for one block of queries at a
time, over the same ranges of stored rows as in the forward pass: memory is dK and dV in float32 and one block of logits.
"""

import jax
import jax.numpy as jnp

from tokeff.kernels.attend import combine, exact, group_rows, scores, sees, wide
from tokeff.kernels.flash_prefill.xla import emptied, join_blocks, segments, split_blocks, take_ranges


def backward(arrays, outs, cotangents, *, scale, softcap, sinks, first, window, finite):
    """Return (dq_BTNH, dk_BKCH, dv_BKCH)."""
    q_BTNH, k_BKCH, v_BKCH, order_BKC, order_BC, lo_BT, hi_BT = arrays
    (out_BTNH, lse_BTN), (dout_BTNH, dlse_BTN) = outs, cotangents
    order_BKC = order_BKC if order_BC is None else order_BC[:, None]
    if not finite:
        k_BKCH, v_BKCH = emptied(k_BKCH, v_BKCH, order_BKC, lo_BT, hi_BT, sinks)
    dtype = wide(q_BTNH.dtype)
    fall_BTN = (out_BTNH.astype(dtype) * dout_BTNH.astype(dtype)).sum(-1) - dlse_BTN
    blind_BTN = lse_BTN == -jnp.inf  # sees nothing: its output is constant, whatever comes back through it
    rows_BTx = (q_BTNH, dout_BTNH, jnp.where(blind_BTN, 0, lse_BTN), jnp.where(blind_BTN, 0, fall_BTN), lo_BT, hi_BT)
    dk_BKCH, dv_BKCH, dq = jnp.zeros(k_BKCH.shape, dtype), jnp.zeros(v_BKCH.shape, dtype), []
    for a, b, ranges in segments(q_BTNH.shape[1], k_BKCH.shape[2], first, window, sinks):
        stored = tuple(take_ranges(x, ranges) for x in (k_BKCH, v_BKCH, order_BKC))
        part, dk, dv = _segment(tuple(x[:, a:b] for x in rows_BTx), stored, scale, softcap, sinks)
        dq.append(part)
        dk_BKCH, dv_BKCH = _add_ranges(dk_BKCH, dk, ranges), _add_ranges(dv_BKCH, dv, ranges)
    return jnp.concatenate(dq, axis=1).astype(q_BTNH.dtype), dk_BKCH.astype(k_BKCH.dtype), dv_BKCH.astype(v_BKCH.dtype)


def _segment(asked, stored, scale, softcap, sinks):
    """Return (dq_BTNH, dk_BKCH, dv_BKCH) of the queries of a segment and the rows given to it."""
    blocks = tuple(split_blocks(x) for x in asked)
    if blocks[0] is None:
        return _block(asked, stored, scale, softcap, sinks)

    def step(carry, block):
        dq, dk, dv = _block(block, stored, scale, softcap, sinks)
        return (carry[0] + dk, carry[1] + dv), dq

    zeros = tuple(jnp.zeros(x.shape, wide(asked[0].dtype)) for x in stored[:2])
    (dk, dv), dq = jax.lax.scan(step, zeros, blocks)
    return join_blocks(dq), dk, dv


def _block(asked, stored, scale, softcap, sinks):
    (q_BTNH, dout_BTNH, lse_BTN, fall_BTN, lo_BT, hi_BT), (k_BKCH, v_BKCH, order_BKC) = asked, stored
    K = k_BKCH.shape[1]
    seen = sees(order_BKC[:, :, None], lo_BT[:, None, :, None], hi_BT[:, None, :, None], sinks)[:, :, None]
    logits_BKGTC = scores(q_BTNH, k_BKCH, scale, softcap)
    p_BKGTC = jnp.where(seen, jnp.exp(logits_BKGTC - _beside(lse_BTN, K)), 0)
    ds_BKGTC = p_BKGTC * (scores(dout_BTNH, v_BKCH, 1.0, 0.0) - _beside(fall_BTN, K))
    if softcap:
        ds_BKGTC = ds_BKGTC * (1 - jnp.square(logits_BKGTC / softcap))
    dq_BTNH = combine(ds_BKGTC, k_BKCH) * jnp.asarray(scale, k_BKCH.dtype)
    return dq_BTNH, _columns(ds_BKGTC, q_BTNH, K) * scale, _columns(p_BKGTC, dout_BTNH, K)


def _beside(x_BTN, K):
    """A number of each query row, laid out beside its logits: (B, K, G, T, 1)."""
    B, T, N = x_BTN.shape
    return jnp.moveaxis(x_BTN.reshape(B, T, K, N // K), 1, 3)[..., None]


def _columns(p_BKGTC, x_BTNH, K):
    """Return (B, K, C, H): for each stored row the sum of x over the queries, weighted by p."""
    B, _, G, T, C = p_BKGTC.shape
    p_BKRC = p_BKGTC.reshape(B, K, G * T, C).astype(x_BTNH.dtype)
    rows_BKRH = group_rows(x_BTNH, K)
    return jnp.einsum(
        "bkrc,bkrh->bkch", p_BKRC, rows_BKRH, preferred_element_type=wide(x_BTNH.dtype), precision=exact(p_BKRC, rows_BKRH)
    )


def _add_ranges(x_BKCH, part_BKXH, ranges):
    at = 0
    for start, end in ranges:
        x_BKCH = x_BKCH.at[:, :, start:end].add(part_BKXH[:, :, at : at + end - start])
        at += end - start
    return x_BKCH
