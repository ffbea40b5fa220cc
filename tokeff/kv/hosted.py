"""A store whose prompt lies in host memory: what every step reads is on the device as well, and what is chosen comes over.

The prompt's rows are never written again. What is generated goes to the device, since a write into host memory inside a TPU's loop would
bring all of it over. Slots count as in a store that holds everything, so whatever chooses rows there chooses the same ones here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from tokeff.kv.cache import Draft, Rows, per_head, take_rows, whole_tiles
from tokeff.kv.host import place, rows_from_host
from tokeff.kv.policy import append as append_rows
from tokeff.kv.policy import pad_slots, tree_bytes
from tokeff.models.flow import EMPTY, Accepted, Flow


class Hosted(struct.PyTreeNode):
    """The rows in slots `first` to edge_B - 1 of each sequence, which lie on the host from its slot 0 on, and on the device (`near`) the
    `first` ones, then those from edge_B on. order_BKC is of all slots, as in `Rows`.

    Both `first` and edge_B are whole pages, so a page lies in one place.
    """

    k_BKSH: jax.Array
    v_BKSH: jax.Array
    order_BKC: jax.Array
    near: Rows
    edge_B: jax.Array
    first: int = struct.field(pytree_node=False)

    @property
    def capacity(self) -> int:
        return self.order_BKC.shape[2]

    @property
    def live_B(self) -> jax.Array:
        return self.near.live_B + self.edge_B - self.first

    @property
    def draft(self) -> Draft | None:
        return self.near.draft

    def on_host(self, slot_BKX: jax.Array) -> jax.Array:
        return (slot_BKX >= self.first) & (slot_BKX < self.edge_B[:, None, None])

    def slots_near(self, slot_BKX: jax.Array) -> jax.Array:
        """Where in `near` these slots are; EMPTY for EMPTY and for those on the host."""
        moved = jnp.where(slot_BKX < self.first, slot_BKX, slot_BKX - self.edge_B[:, None, None] + self.first)
        return jnp.where((slot_BKX < 0) | self.on_host(slot_BKX), EMPTY, moved)

    def pages_near(self, page_BKTX: jax.Array, size: int) -> jax.Array:
        """Which pages of `near` these pages of `size` slots are; EMPTY for EMPTY and for those on the host."""
        slot = self.slots_near(page_BKTX.reshape(*page_BKTX.shape[:2], -1) * size)
        return jnp.where(slot == EMPTY, EMPTY, slot // size).reshape(page_BKTX.shape)


Store = Rows | Hosted


def split(rows: Rows, first: int, edge_B: jax.Array, edge: int, behind: int) -> Hosted:
    """Rows as `Hosted` holds them, still on the device (`on_host` moves them). edge: the most that edge_B is; behind: the most rows that
    there will ever be from edge_B on."""
    B, K, C = rows.order_BKC.shape
    there = edge_B[:, None, None] > jnp.arange(first, edge)

    def far(x):
        return jnp.where(there[..., None], pad_slots(x, max(C, edge), 2)[:, :, first:edge], 0)

    n = jnp.arange(whole_tiles(first + behind, rows.k_BKCH.dtype))
    slot = jnp.where(n < first, n, n + edge_B[:, None] - first)
    slot = jnp.broadcast_to(slot[:, None], (B, K, len(n)))
    order = jnp.where(slot < C, jnp.take_along_axis(rows.order_BKC, jnp.minimum(slot, C - 1), axis=2), EMPTY)
    k, v = (jnp.where((order != EMPTY)[..., None], take_rows(x, slot), 0) for x in (rows.k_BKCH, rows.v_BKCH))
    near = Rows(k, v, order, rows.live_B - edge_B + first, draft=rows.draft)
    return Hosted(far(rows.k_BKCH), far(rows.v_BKCH), rows.order_BKC, near, edge_B, first)


def append(store: Store, k_BTKH: jax.Array, v_BTKH: jax.Array, new: Flow, accepted: Accepted | None) -> Store:
    """This call's rows into an append-only store, as `tokeff.kv.policy.append`."""
    if isinstance(store, Rows):
        return append_rows(store, k_BTKH, v_BTKH, new, accepted)
    before, near = store.near.live_B, append_rows(store.near, k_BTKH, v_BTKH, new, accepted)
    most = k_BTKH.shape[1] if new.among_BTW is None or accepted is None else accepted.path_BW.shape[1]
    at = before[:, None] + jnp.arange(most)
    came = jnp.broadcast_to((at < near.live_B[:, None])[:, None], (*store.order_BKC.shape[:2], most))
    order = jnp.take_along_axis(near.order_BKC, jnp.broadcast_to(jnp.minimum(at, near.capacity - 1)[:, None], came.shape), axis=2)
    slot = jnp.where(came, (at + store.edge_B[:, None] - store.first)[:, None], store.capacity + jnp.arange(most))
    write = per_head(lambda x, s, new: x.at[s].set(new, mode="drop", unique_indices=True))
    return store.replace(near=near, order_BKC=write(store.order_BKC, slot, order))


def near_at(store: Store, slot_BKX: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(key_BKXH, value_BKXH) of slots that lie on the device, as all do that were filled since the prompt. Others give some row's."""
    near, slot = (store.near, store.slots_near(slot_BKX)) if isinstance(store, Hosted) else (store, slot_BKX)
    slot = jnp.maximum(slot, 0)
    return take_rows(near.k_BKCH, slot), take_rows(near.v_BKCH, slot)


def rows_at(store: Store, slot_BKX: jax.Array, size: int = 1) -> tuple[jax.Array, jax.Array]:
    """(key_BKXH, value_BKXH) of slots that come in pages of `size`, wherever they lie. A slot that is none gives some row's."""
    k, v = near_at(store, slot_BKX)
    if isinstance(store, Rows):
        return k, v
    page = slot_BKX[..., ::size]
    far = store.on_host(page)
    k_over, v_over = rows_from_host((store.k_BKSH, store.v_BKSH), jnp.where(far, page - store.first, 0), size)
    far = jnp.repeat(far, size, axis=2)[..., None]
    return jnp.where(far, k_over, k), jnp.where(far, v_over, v)


def on_host(store: Store) -> Store:
    """The store with what belongs in host memory there."""
    return store.replace(k_BKSH=place(store.k_BKSH), v_BKSH=place(store.v_BKSH)) if isinstance(store, Hosted) else store


def row_bytes(store: Store) -> int:
    """Bytes of one row of every head, key and value."""
    near = store.near if isinstance(store, Hosted) else store
    return tree_bytes((near.k_BKCH, near.v_BKCH)) // near.capacity


def slots_held(store: Store) -> int:
    """How many rows of every head it has memory for."""
    return store.capacity if isinstance(store, Rows) else store.near.capacity + store.k_BKSH.shape[2]
