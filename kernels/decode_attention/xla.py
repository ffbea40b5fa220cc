"""decode_attention in jax.numpy that XLA compiles well on any platform.

On CPU a decode step is bound by reading K and V once, so three things are shaped by measurements there:

- K and V are operands of a matrix product exactly as stored: any transpose or select of them is a full-cache copy
  (a select of V takes 3-4 times as long as the attention itself). K stands on the left of its product, which XLA:CPU
  runs 15-40% faster at few rows than K on the right.
- A slot nobody may see can hold NaN, and 0 * NaN is NaN. On CPU the product therefore runs on V as it is, and is done
  again on a cleaned V only if something non-finite came out (a `cond` that never fires on a healthy cache).
- Queries run in blocks of T so that the scores of one block stay under `SCORE_BYTES`.

Selected pages are gathered to a compact copy first: that reads the selected rows, and writes and rereads the copy.
"""

from functools import partial

import jax
import jax.numpy as jnp

SCORE_BYTES = 64 * 2**20


def run(q_BTNH, k_BKCH, v_BKCH, order_BKC, lo_BT, hi_BT, page_BKM=None, *, page_size, scale, softcap, clean=False):
    """Same contract as the public op. clean: empty unseen slots up front, as gradients need (0 * NaN again)."""
    if page_BKM is not None:
        k_BKCH, v_BKCH, order_BKC = take_pages(k_BKCH, v_BKCH, order_BKC, page_BKM, page_size)
    if clean or page_BKM is not None:  # the gathered copy is written anyway: cleaning it on the way is free
        seen_BKC1 = seen_by_any(order_BKC, lo_BT, hi_BT)[..., None]
        k_BKCH, v_BKCH = jnp.where(seen_BKC1, k_BKCH, 0), jnp.where(seen_BKC1, v_BKCH, 0)
        weigh = lambda p_BKRC, v_BKCH, *_: weighted_values(p_BKRC, v_BKCH)
    else:
        weigh = weighted_values_or_clean

    def block(rows):
        q_BtNH, lo_Bt, hi_Bt = rows
        return attend(q_BtNH, k_BKCH, v_BKCH, order_BKC, lo_Bt, hi_Bt, weigh, scale=scale, softcap=softcap)

    B, T, N, _ = q_BTNH.shape
    rows = max(1, min(T, SCORE_BYTES // (4 * B * N * k_BKCH.shape[2])))
    return map_rows(block, (q_BTNH, lo_BT, hi_BT), rows)


def attend(q_BTNH, k_BKCH, v_BKCH, order_BKC, lo_BT, hi_BT, weigh, *, scale, softcap):
    """Attention of one block of queries, K and V used as stored. Returns (out_BTNH in q's dtype, lse_BTN float32)."""
    (B, T, N, _), K = q_BTNH.shape, k_BKCH.shape[1]
    score_BKTGC = scores(q_BTNH, k_BKCH, order_BKC, lo_BT, hi_BT, scale=scale, softcap=softcap)
    score_BKRC = score_BKTGC.reshape(B, K, T * (N // K), -1)
    top_BKR1 = jax.lax.stop_gradient(jnp.max(score_BKRC, -1, keepdims=True, initial=-1e30))  # finite if all is hidden
    p_BKRC = jnp.exp(score_BKRC - top_BKR1)
    sum_BKR1 = p_BKRC.sum(-1, keepdims=True)
    some_BKR1 = sum_BKR1 > 0
    sum_BKR1 = jnp.where(some_BKR1, sum_BKR1, 1)
    out_BKRH = weigh(p_BKRC, v_BKCH, order_BKC, lo_BT, hi_BT) / sum_BKR1
    lse_BKR1 = jnp.where(some_BKR1, top_BKR1 + jnp.log(sum_BKR1), -jnp.inf)
    to_BTN = lambda x: x.reshape(B, K, T, N // K, -1).swapaxes(1, 2).reshape(B, T, N, -1)
    return to_BTN(out_BKRH).astype(q_BTNH.dtype), to_BTN(lse_BKR1)[..., 0]


def scores(q_BTNH, k_BKCH, order_BKC, lo_BT, hi_BT, *, scale, softcap):
    """Return masked scores as float32 (B, K, T, G, C): -inf where the query may not see the slot."""
    B, T, N, H = q_BTNH.shape
    K, C = order_BKC.shape[1:]
    q_BKRH = q_BTNH.reshape(B, T, K, N // K, H).swapaxes(1, 2).reshape(B, K, -1, H)
    score_BKRC = jnp.einsum("bkch,bkrh->bkrc", k_BKCH, q_BKRH, preferred_element_type=jnp.float32) * scale
    if softcap:
        score_BKRC = softcap * jnp.tanh(score_BKRC / softcap)
    order_BK1C, (lo_B1T1, hi_B1T1) = order_BKC[:, :, None], (x[:, None, :, None] for x in (lo_BT, hi_BT))
    see_BKTC = (order_BK1C >= lo_B1T1) & (order_BK1C <= hi_B1T1)
    return jnp.where(see_BKTC[:, :, :, None], score_BKRC.reshape(B, K, T, N // K, C), -jnp.inf)


def weighted_values(p_BKRC, v_BKCH):
    """Return sum_c p * v, accumulated in float32. bfloat16 values are met by bfloat16 weights, as on the MXU."""
    return jnp.einsum("bkrc,bkch->bkrh", p_BKRC.astype(v_BKCH.dtype), v_BKCH, preferred_element_type=jnp.float32)


def weighted_values_or_clean(p_BKRC, v_BKCH, order_BKC, lo_BT, hi_BT):
    """Return sum_c p * v, untouched by slots that no query sees."""

    def cleaned(p_BKRC, v_BKCH, order_BKC, lo_BT, hi_BT):
        seen_BKC1 = seen_by_any(order_BKC, lo_BT, hi_BT)[..., None]
        return weighted_values(p_BKRC, jnp.where(seen_BKC1, v_BKCH, 0))

    def retried(p_BKRC, v_BKCH, *bounds):
        out_BKRH = weighted_values(p_BKRC, v_BKCH)
        healthy = jnp.isfinite(out_BKRH).all()
        return jax.lax.cond(healthy, lambda: out_BKRH, partial(cleaned, p_BKRC, v_BKCH, *bounds))

    # Accelerators can fuse the select into the read of V; there a data-dependent branch is the dearer of the two.
    return jax.lax.platform_dependent(p_BKRC, v_BKCH, order_BKC, lo_BT, hi_BT, cpu=retried, default=cleaned)


def seen_by_any(order_BKC, lo_BT, hi_BT):
    """Return which slots at least one query row sees, as bool (B, K, C). XLA fuses the (B, T, K, C) compare away."""
    lo_BT11, hi_BT11 = lo_BT[:, :, None, None], hi_BT[:, :, None, None]
    return ((order_BKC[:, None] >= lo_BT11) & (order_BKC[:, None] <= hi_BT11)).any(1)


def take_pages(k_BKCH, v_BKCH, order_BKC, page_BKM, page_size):
    """Gather pages into a compact cache of X = M * page_size slots."""
    slot_BKX = page_slots(page_BKM, page_size)
    return take(k_BKCH, slot_BKX), take(v_BKCH, slot_BKX), take_orders(order_BKC, page_BKM, page_size)


def take_orders(order_BKC, page_BKM, page_size):
    """Gather the orders of the slots of pages, -1 for slots of page -1 and past the end of the cache."""
    slot_BKX = page_slots(page_BKM, page_size)
    return jnp.where((slot_BKX >= 0) & (slot_BKX < order_BKC.shape[2]), take(order_BKC, slot_BKX), -1)


def page_slots(page_BKM, page_size):
    """Return the slots of pages as (B, K, X = M * page_size); those of page -1 are negative."""
    return (page_BKM[..., None] * page_size + jnp.arange(page_size)).reshape(*page_BKM.shape[:2], -1)


def take(stored_BKCx, slot_BKX):
    """Gather slots, anything for those out of range. One head vmapped: partitions over B and K with no collective."""
    one_head = jax.vmap(jax.vmap(lambda stored_Cx, slot_X: stored_Cx.at[slot_X].get(mode="clip")))
    return one_head(stored_BKCx, jnp.maximum(slot_BKX, 0))


def map_rows(block, arrays_BTx, rows):
    """Apply block to `rows` query rows (axis 1 of each array) at a time and join the results along axis 1."""
    T = arrays_BTx[0].shape[1]
    if rows >= T:
        return block(arrays_BTx)
    joined = jax.lax.map(block, jax.tree.map(lambda x: row_blocks(x, rows), arrays_BTx))
    return jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1).reshape(y.shape[1], -1, *y.shape[3:])[:, :T], joined)


def row_blocks(x_BTx, rows, fill=0):
    """Split axis 1 into blocks of `rows`, padded with fill, and put the blocks in front: (n, B, rows, ...)."""
    B, T = x_BTx.shape[:2]
    n = -(-T // rows)
    x_BTx = jnp.pad(x_BTx, [(0, 0), (0, n * rows - T)] + [(0, 0)] * (x_BTx.ndim - 2), constant_values=fill)
    return jnp.moveaxis(x_BTx.reshape(B, n, rows, *x_BTx.shape[2:]), 1, 0)
