"""Rows of keys and values in slots: the store that most cache policies use, and its four pure operations.

`write` puts certain rows into slots, `hold` keeps draft rows aside, `commit` moves the drafts that the verifier accepted into
slots on the next call, `evict` frees slots. No row ever moves to another slot, so nothing of cache size is copied in a decode
loop: XLA updates `k_BKCH` in place as long as each call writes it before it reads it (docs/design.md, "Copies").
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from tokeff.kernels import compact_rows
from tokeff.models.attention import wide
from tokeff.models.flow import EMPTY, Accepted, Flow
from tokeff.sharding import top_k


@dataclass(frozen=True)
class Room:
    """What a packed cache must have space for: `rows` further tokens, and `draft` nodes (0: rows are always certain)."""

    rows: int
    draft: int = 0


class Draft(struct.PyTreeNode):
    """W rows that the last call computed and nobody has accepted yet; q and lse only for policies that score by attention."""

    k_BKWH: jax.Array
    v_BKWH: jax.Array
    order_BW: jax.Array
    q_BWNH: jax.Array | None = None
    lse_BWN: jax.Array | None = None


class Rows(struct.PyTreeNode):
    """C slots per key/value head. order_BKC says which row a slot holds (EMPTY: none); live_B counts rows per head.

    Rows fill slots 0, 1, .... A policy that evicts E rows whenever limit_B is reached names the slots it freed in free_BKE; the
    last E rows below the limit go there. mass_BKC is running evidence (H2O's accumulated attention). bias_BKC is added to the
    scores of a slot: log of how many rows a merged one stands for.
    """

    k_BKCH: jax.Array
    v_BKCH: jax.Array
    order_BKC: jax.Array
    live_B: jax.Array
    limit_B: jax.Array | None = None
    free_BKE: jax.Array | None = None
    mass_BKC: jax.Array | None = None
    draft: Draft | None = None
    bias_BKC: jax.Array | None = None

    @property
    def capacity(self) -> int:
        return self.k_BKCH.shape[2]


def whole_tiles(rows: int, dtype: DTypeLike) -> int:
    """Slots for so many rows: a multiple of the rows of a TPU tile, 8 of 32 bits or 16 of 16. XLA:TPU lays any other number out with heads
    innermost, which the attention kernel does not take, and so copies the whole store on every step."""
    tile = 32 // jnp.dtype(dtype).itemsize
    return -(-rows // tile) * tile


def per_head(f):
    """Map a function of one head's arrays over (B, K): partitions over data x model, unlike folding B and K together."""
    return jax.vmap(jax.vmap(f))


def take_rows(x_BKCH: jax.Array, index_BKM: jax.Array) -> jax.Array:
    """x_BKMH: the rows at `index` of every head. Indices must be in range."""
    return per_head(lambda x, i: jnp.take(x, i, axis=0, mode="clip"))(x_BKCH, index_BKM)


def slots_for(rows: Rows, nth_BT: jax.Array) -> jax.Array:
    """slot_BKT of each head's n-th live row. Only rows that arrive use this, so n counts from the current `live_B`."""
    B, K, C = rows.order_BKC.shape
    nth = jnp.broadcast_to(nth_BT[:, None], (B, K, nth_BT.shape[1]))
    if rows.free_BKE is None or rows.limit_B is None:
        return nth
    E = rows.free_BKE.shape[-1]
    first = (rows.limit_B - E)[:, None, None]
    freed = jnp.take_along_axis(rows.free_BKE, jnp.clip(nth - first, 0, E - 1), axis=2)
    return jnp.where(nth < first, nth, freed)


def write(rows: Rows, k_BKTH: jax.Array, v_BKTH: jax.Array, order_BT: jax.Array) -> Rows:
    """Put rows into slots, those with order EMPTY into none. The caller sees to it that they fit."""
    slot_BKT = arriving(rows, order_BT)
    k_BKCH = put(rows.k_BKCH, slot_BKT, k_BKTH.astype(rows.k_BKCH.dtype))
    v_BKCH = put(rows.v_BKCH, slot_BKT, v_BKTH.astype(rows.v_BKCH.dtype))
    return entered(rows, k_BKCH, v_BKCH, slot_BKT, order_BT)


def arriving(rows: Rows, order_BT: jax.Array) -> jax.Array:
    """slot_BKT of rows that arrive. Those with order EMPTY get slots out of range, which are dropped; distinct ones, since XLA writes in
    place where indices are promised to be unique."""
    valid = order_BT != EMPTY
    slot_BKT = slots_for(rows, rows.live_B[:, None] + jnp.cumsum(valid, axis=1) - 1)
    return jnp.where(valid[:, None], slot_BKT, rows.capacity + jnp.arange(order_BT.shape[1]))


def put(x_BKCx: jax.Array, slot_BKT: jax.Array, new_BKTx: jax.Array) -> jax.Array:
    """x with new rows, or numbers, in these slots of every head."""
    return per_head(lambda x, s, new: x.at[s].set(new, mode="drop", unique_indices=True))(x_BKCx, slot_BKT, new_BKTx)


def entered(rows: Rows, k_BKCH: jax.Array, v_BKCH: jax.Array, slot_BKT: jax.Array, order_BT: jax.Array) -> Rows:
    """The store whose keys and values came in, with their orders, and nothing noted of them yet."""
    zero_BKT = jnp.zeros(slot_BKT.shape)
    return rows.replace(
        k_BKCH=k_BKCH,
        v_BKCH=v_BKCH,
        order_BKC=put(rows.order_BKC, slot_BKT, jnp.broadcast_to(order_BT[:, None], slot_BKT.shape)),
        mass_BKC=None if rows.mass_BKC is None else put(rows.mass_BKC, slot_BKT, zero_BKT),
        bias_BKC=None if rows.bias_BKC is None else put(rows.bias_BKC, slot_BKT, zero_BKT),
        live_B=rows.live_B + (order_BT != EMPTY).sum(axis=1, dtype=jnp.int32),
    )


def accepted_orders(draft: Draft, accepted: Accepted) -> jax.Array:
    """order_BW along the accepted path, EMPTY past its end."""
    taken = jnp.arange(accepted.path_BW.shape[1])[None] < accepted.count_B[:, None]
    return jnp.where(taken, jnp.take_along_axis(draft.order_BW, accepted.path_BW, axis=1), EMPTY)


def commit(rows: Rows, accepted: Accepted) -> Rows:
    """Move the previous call's accepted draft rows into slots. Unaccepted ones are simply overwritten later."""
    draft = rows.draft
    assert draft is not None, "this cache was packed without room for drafts"
    order_BW, dtype = accepted_orders(draft, accepted), rows.k_BKCH.dtype
    if not rows.v_BKCH.shape[3]:  # rows that are key and value in one
        path_BKW = jnp.broadcast_to(accepted.path_BW[:, None], draft.k_BKWH.shape[:3])
        return write(rows, take_rows(draft.k_BKWH, path_BKW), take_rows(draft.v_BKWH, path_BKW), order_BW)
    slot_BKW = arriving(rows, order_BW)
    to_BKW = jnp.where((order_BW != EMPTY)[:, None], slot_BKW, EMPTY)
    path_BKW = jnp.broadcast_to(accepted.path_BW[:, None], to_BKW.shape)
    moved = compact_rows(rows.k_BKCH, rows.v_BKCH, path_BKW, to_BKW, draft.k_BKWH.astype(dtype), draft.v_BKWH.astype(dtype))
    return entered(rows, *moved, slot_BKW, order_BW)


def hold(rows: Rows, k_BKTH: jax.Array, v_BKTH: jax.Array, new: Flow, q=None) -> Rows:
    """Keep this call's rows aside as drafts: in the place of all earlier ones, or at place `new.at` among them."""
    like = rows.draft
    assert like is not None

    def put(old: jax.Array, x: jax.Array, axis: int, fill: int = 0) -> jax.Array:
        return aside(old, x.astype(old.dtype), axis, new.at, fill)

    draft = Draft(
        put(like.k_BKWH, k_BKTH, 2),
        put(like.v_BKWH, v_BKTH, 2),
        put(like.order_BW, new.order_BT, 1, EMPTY),
        None if like.q_BWNH is None or q is None else put(like.q_BWNH, q, 1),
        like.lse_BWN,
    )
    return rows.replace(draft=draft)


def aside(old: jax.Array, x: jax.Array, axis: int, at: jax.Array | None, fill: int = 0) -> jax.Array:
    """x in the place of `old`, filled up to its length along `axis`; or written into it at place `at`."""
    W, T = old.shape[axis], x.shape[axis]
    if T > W:
        raise ValueError(f"{T} draft rows, but the cache was packed for {W}")
    if at is not None:
        return jax.lax.dynamic_update_slice_in_dim(old, x, at, axis)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, W - T)
    return x if T == W else jnp.pad(x, widths, constant_values=fill)


def evict(rows: Rows, score_BKC: jax.Array, E: int, full_B: jax.Array) -> Rows:
    """Free the E lowest-scored live slots of every head, in the sequences where `full_B` holds.

    Only order, score and the free list pass through; keys and values stay where they are.
    """
    assert rows.free_BKE is not None

    _, slot = top_k(jnp.where(rows.order_BKC == EMPTY, -jnp.inf, -score_BKC), E, "BKC")
    gone = per_head(lambda order, slot: order.at[slot].set(EMPTY))(rows.order_BKC, slot)
    full = full_B[:, None, None]
    order, free = jnp.where(full, gone, rows.order_BKC), jnp.where(full, slot.astype(jnp.int32), rows.free_BKE)
    return rows.replace(order_BKC=order, free_BKE=free, live_B=rows.live_B - E * full_B.astype(jnp.int32))


def empty_draft(k_BKCH: jax.Array, W: int, N: int | None = None, dtype=None) -> Draft | None:
    """Space for W draft rows beside a store; with N query heads also their queries and log-sum-exps."""
    if not W:
        return None
    B, K, _, H = k_BKCH.shape
    zero = jnp.zeros((B, K, W, H), k_BKCH.dtype)
    q = None if N is None else jnp.zeros((B, W, N, H), dtype or k_BKCH.dtype)
    lse = None if N is None else jnp.zeros((B, W, N), wide(k_BKCH.dtype))
    return Draft(zero, zero, jnp.full((B, W), EMPTY, jnp.int32), q, lse)


def visible(order_BKC: jax.Array, lo_BT: jax.Array, hi_BT: jax.Array) -> jax.Array:
    """visible_BKTC of stored rows. EMPTY lies below every `lo`, so free slots are never seen."""
    order = order_BKC[:, :, None]
    return (order >= lo_BT[:, None, :, None]) & (order <= hi_BT[:, None, :, None])


def among(flow: Flow, lo_BT: jax.Array, order_BW: jax.Array) -> jax.Array:
    """visible_BTW of the draft's rows, whose orders these are, inside the sliding window."""
    assert flow.among_BTW is not None
    more = order_BW.shape[1] - flow.among_BTW.shape[2]  # a call of a draft narrower than the cache has room for
    seen = jnp.pad(flow.among_BTW, ((0, 0), (0, 0), (0, more))) if more else flow.among_BTW
    return seen & (order_BW[:, None] >= lo_BT[:, :, None]) & (order_BW[:, None] != EMPTY)
