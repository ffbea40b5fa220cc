"""flash_prefill in jax.numpy that XLA compiles well on any platform: blocked over queries, so that logits stay small.

Segments of queries are static, because the rows that each may see differ in number; within one, blocks of queries run one after
the other and reuse one buffer of logits. On CPU fresh buffers cost more than the arithmetic: one block a segment takes 2.5 times
as long.
"""

import jax
import jax.numpy as jnp

from tokeff.kernels.attend import NEG, combine, scores, seen_by_any, sees

SEGMENT = 256  # queries that are given the same stored rows
BLOCK = 128  # queries whose logits are held at a time


def run(
    q_BTNH, k_BKCH, v_BKCH, order_BKC, order_BC, lo_BT, hi_BT, *, scale, softcap, sinks, first, window, finite, clean=False
):  # fmt: skip
    """Same contract as the public op. clean: empty unseen rows whatever `finite` says."""
    order_BKC = order_BKC if order_BC is None else order_BC[:, None]
    if clean or not finite:
        k_BKCH, v_BKCH = emptied(k_BKCH, v_BKCH, order_BKC, lo_BT, hi_BT, sinks)
    parts = []
    for a, b, rows in segments(q_BTNH.shape[1], k_BKCH.shape[2], first, window, sinks):
        stored = tuple(take_ranges(x, rows) for x in (k_BKCH, v_BKCH, order_BKC))
        asked = (q_BTNH[:, a:b], lo_BT[:, a:b], hi_BT[:, a:b])
        parts.append(_by_blocks(asked, stored, scale, softcap, sinks))
    return jnp.concatenate([out for out, _ in parts], axis=1), jnp.concatenate([lse for _, lse in parts], axis=1)


def segments(T, C, first, window, sinks):
    """Yield (a, b, ranges of stored rows) for each segment of queries a to b."""
    for a in range(0, T, SEGMENT):
        b = min(a + SEGMENT, T)
        end = C if first is None else min(first + b, C)
        start = 0 if first is None or window is None else max(first + a - window + 1, 0)
        yield a, b, (*(((0, min(sinks, start)),) if sinks and start else ()), (start, end))


def take_ranges(x_BKCx, ranges):
    """Return the rows of these ranges, joined."""
    parts = [x_BKCx[:, :, start:end] for start, end in ranges]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)


def emptied(k_BKCH, v_BKCH, order_BKC, lo_BT, hi_BT, sinks):
    """Return K and V with 0 in the rows that no query sees: 0 * NaN is NaN."""
    seen_BKC1 = seen_by_any(order_BKC, lo_BT, hi_BT, sinks)[..., None]
    return jnp.where(seen_BKC1, k_BKCH, 0), jnp.where(seen_BKC1, v_BKCH, 0)


def split_blocks(x_BTx):
    """Return blocks of BLOCK queries in front, (n, B, BLOCK, ...); None where that does not divide their number."""
    B, T = x_BTx.shape[:2]
    if T <= BLOCK or T % BLOCK:
        return None
    return jnp.moveaxis(x_BTx.reshape(B, T // BLOCK, BLOCK, *x_BTx.shape[2:]), 1, 0)


def join_blocks(x_nBtx):
    """Undo `split_blocks`."""
    x_Bntx = jnp.moveaxis(x_nBtx, 0, 1)
    return x_Bntx.reshape(x_Bntx.shape[0], -1, *x_Bntx.shape[3:])


def _by_blocks(asked, stored, scale, softcap, sinks):
    """`_block` over BLOCK queries at a time where that divides their number."""
    blocks = tuple(split_blocks(x) for x in asked)
    if blocks[0] is None:
        return _block(asked, stored, scale, softcap, sinks)
    out, lse = jax.lax.map(lambda block: _block(block, stored, scale, softcap, sinks), blocks)
    return join_blocks(out), join_blocks(lse)


def _block(asked, stored, scale, softcap, sinks):
    """Return (out_BTNH, lse_BTN) of one block of queries over the rows it may see."""
    (q_BTNH, lo_BT, hi_BT), (k_BKCH, v_BKCH, order_BKC) = asked, stored
    B, T, N, _ = q_BTNH.shape
    seen = sees(order_BKC[:, :, None], lo_BT[:, None, :, None], hi_BT[:, None, :, None], sinks)
    logits = jnp.where(seen[:, :, None], scores(q_BTNH, k_BKCH, scale, softcap), NEG)
    top = logits.max(axis=-1)
    e = jnp.exp(logits - top[..., None])
    total = e.sum(axis=-1)
    lse = jnp.moveaxis(jnp.where(top > NEG, top + jnp.log(total), -jnp.inf), 3, 1).reshape(B, T, N)
    # Divided after the product with v, over H numbers a row instead of C; a row that sees nothing gets 0.
    share = jnp.moveaxis(jnp.where(top > NEG, 1 / total, 0.0), 3, 1).reshape(B, T, N, 1)
    out = combine(e, v_BKCH)
    return out * share.astype(out.dtype), lse
