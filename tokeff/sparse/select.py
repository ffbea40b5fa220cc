"""Seam 3: what to read. Every row is kept; a `Selector` names, for each query, the pages of rows worth reading.

A page is `page` neighbouring slots of an append-only store; a selector of single rows has pages of one. `tokeff.sparse.read` is the
policy that asks a selector, adds the rows that are read in any case, and attends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from tokeff.errors import UserError
from tokeff.kv.cache import Rows
from tokeff.kv.hosted import Store
from tokeff.kv.policy import Ask, Prefilled, pad_slots
from tokeff.models.attention import NEG
from tokeff.models.flow import EMPTY, Here
from tokeff.sharding import top_k


class Selection(struct.PyTreeNode):
    """What crosses layers: rows by order, since slots mean nothing outside their own layer. EMPTY where there are fewer than M."""

    order_BKTM: jax.Array


class Last(struct.PyTreeNode):
    """A selection that is read for several steps: its pages, the query that chose them, and the steps since the prompt."""

    page_BKM: jax.Array
    q_BNH: jax.Array
    age_B: jax.Array


class Readable(struct.PyTreeNode):
    """A store of all rows and what selecting from it needs.

    far_B: how many pages, beside those read in any case, a query of each sequence reads; at most `far`. summary: whatever the
    selector keeps beside the rows, with a leading batch axis in every array. last: the selection in use where one serves several steps.
    """

    rows: Store
    far_B: jax.Array
    summary: Any
    last: Last | None
    far: int = struct.field(pytree_node=False)

    @property
    def keys_BKCH(self) -> jax.Array:
        """The key of every slot, for a selector that looks at them (`keys_read`); such a layer lies on the device."""
        assert isinstance(self.rows, Rows)
        return self.rows.k_BKCH


@dataclass(frozen=True)
class Span:
    """Which pages a query may choose from: from page `first` up to, not including, end_BKT. The later ones are read in any case."""

    first: int
    end_BKT: jax.Array
    lo_BT: jax.Array  # the smallest order it may read (sliding windows)


@dataclass(frozen=True)
class Selector:
    """Base class: rank the pages by `worth`, take the best. Only pages whose rows are all committed can be chosen, so what a draft
    row chooses does not depend on other drafts."""

    @property
    def size(self) -> int:
        """Rows of a page."""
        return 1

    def needs(self) -> tuple[Ask, ...]:
        """Evidence that `summary` wants of the prefill."""
        return ()

    def check(self, cfg, length: int) -> None:
        """Raise UserError for settings that cannot work."""

    def by_head(self) -> str | None:
        """None when it can choose for some heads of a layer alone; else the reason it cannot."""
        return None

    def summary(self, rows: Prefilled, store: Rows, here: Here) -> Any:
        """What is kept beside the rows, made once from the packed prompt; None for nothing."""
        return None

    def arrive(self, summary: Any, store: Store, slot_BT: jax.Array, here: Here) -> Any:
        """The summary after rows became certain, which are in these slots now (EMPTY: none). Drafts arrive once accepted.
        Where rows may lie in host memory, `near_at` finds these."""
        return summary

    def worth(self, q_BTNH: jax.Array, layer: Readable, open_BKTP: jax.Array, here: Here) -> jax.Array:
        """float32 worth_BKTP of every page to each query; pages that are not open may hold anything."""
        raise NotImplementedError

    def choose(self, q_BTNH: jax.Array, layer: Readable, span: Span, here: Here) -> jax.Array:
        """page_BKTM of the best open pages of each query and kv head, EMPTY past far_B."""
        seen = open_pages(layer.rows, span, self.size, here)
        worth = self.worth(q_BTNH, layer, seen, here)
        return best_pages(jnp.where(seen, worth, NEG), layer)

    def keys_read(self, layer: Readable) -> int:
        """How many stored keys a head looks at to choose, beside the summary."""
        return 0


def best_pages(worth_BKTP: jax.Array, layer: Readable) -> jax.Array:
    """page_BKTM of the highest worth above NEG, best first, EMPTY past far_B. NaN is never chosen."""
    worth_BKTP = jnp.where(jnp.isnan(worth_BKTP), NEG, worth_BKTP)
    M = min(layer.far, worth_BKTP.shape[-1])
    value, page = top_k(worth_BKTP, M, "BKTP")
    return jnp.where((value > NEG) & (jnp.arange(M) < layer.far_B[:, None, None, None]), page, EMPTY).astype(jnp.int32)


def open_pages(store: Store, span: Span, size: int, here: Here) -> jax.Array:
    """open_BKTP: pages inside the span, with a row inside the sliding window. K is the store's."""
    B, K, C = store.order_BKC.shape
    P = pages_of(C, size)
    page = jnp.arange(P)
    seen = (page >= span.first) & (page < span.end_BKT[..., None])
    seen = jnp.broadcast_to(seen, (B, K, span.end_BKT.shape[2], P))
    if here.window is None:
        return seen
    newest = in_pages(store.order_BKC, size, EMPTY).max(axis=3)
    return seen & (newest[:, :, None] >= span.lo_BT[:, None, :, None])


def pages_of(rows: int, size: int) -> int:
    """How many pages hold so many rows."""
    return -(-rows // size)


def in_pages(x_BKC: jax.Array, size: int, fill: Any = 0) -> jax.Array:
    """The slot axis as pages of `size` slots, the last one filled up: (B, K, P, R, ...)."""
    B, K, C = x_BKC.shape[:3]
    P = pages_of(C, size)
    return pad_slots(x_BKC, P * size, 2, fill).reshape(B, K, P, size, *x_BKC.shape[3:])


def slots_in(page_BKTM: jax.Array, size: int, C: int) -> jax.Array:
    """slot_BKTX of all rows of pages, EMPTY for page EMPTY and past the end of a store of C slots."""
    slot = page_BKTM[..., None] * size + jnp.arange(size)
    slot = jnp.where((page_BKTM[..., None] == EMPTY) | (slot >= C), EMPTY, slot)
    return slot.reshape(*page_BKTM.shape[:-1], -1).astype(jnp.int32)


def slots_of(order_BKC: jax.Array, wanted_BKM: jax.Array) -> jax.Array:
    """slot_BKM in an append-only store, whose orders ascend; EMPTY where this layer does not hold the row."""
    ascending = jnp.where(order_BKC == EMPTY, jnp.iinfo(jnp.int32).max, order_BKC)
    find = jax.vmap(jax.vmap(jnp.searchsorted))
    slot = jnp.minimum(find(ascending, wanted_BKM), order_BKC.shape[-1] - 1)
    found = jnp.take_along_axis(order_BKC, slot, axis=2) == wanted_BKM
    return jnp.where(found & (wanted_BKM != EMPTY), slot, EMPTY).astype(jnp.int32)


def rows_upto(store: Store, order_BT: jax.Array) -> jax.Array:
    """count_BKT of stored rows whose order is at most this one: the slot of the next, since slots of such a store are in order."""
    order = store.order_BKC[:, :, None]
    return ((order != EMPTY) & (order <= order_BT[:, None, :, None])).sum(axis=3, dtype=jnp.int32)


def check_page(page: int) -> None:
    if page < 1:
        raise UserError(f"page={page} holds no row; give at least 1")
