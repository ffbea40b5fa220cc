"""ALISA with all rows held (Zhao et al. 2024): a query reads the recent rows and those that the last few queries looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tokeff.errors import UserError
from tokeff.kv.budget import Budget, check_budget, most_rows, rows_of
from tokeff.kv.cache import Room, per_head, visible
from tokeff.kv.evidence import Evidence, Seen
from tokeff.kv.hosted import Hosted, Store, append, near_at, on_host, row_bytes, rows_at, slots_held, split
from tokeff.kv.keep import numbers, part_of
from tokeff.kv.policy import Full, Policy, Prefilled, tree_bytes
from tokeff.models.attention import NEG, combine, scores, softmax
from tokeff.models.flow import EMPTY, Accepted, Flow, Here
from tokeff.sharding import top_k

_ALL = Full()


class Asked(struct.PyTreeNode):
    """Rotated queries of T rows and their orders, oldest first; EMPTY where there is none."""

    q_BTNH: jax.Array
    order_BT: jax.Array


@dataclass(frozen=True)
class LastQueries(Evidence):
    """The rotated queries of the prompt's last `last` rows, themselves."""

    last: int

    def attends(self) -> float:
        return self.last

    def like(self, B: int, S: int, cfg) -> Any:
        kind: Any = Asked  # shapes in the place of arrays
        return kind(jax.ShapeDtypeStruct((B, self.last, cfg.N, cfg.H), "float32"), jax.ShapeDtypeStruct((B, self.last), "int32"))

    def gather(self, seen: Seen, before, here: Here) -> Asked:
        row, wanted = seen.ask.order_BT, seen.length_B[:, None] - self.last + jnp.arange(self.last)
        same = (row[:, None] == wanted[:, :, None]) & (row != EMPTY)[:, None]
        q = jnp.einsum("bst,btnh->bsnh", same.astype(jnp.float32), seen.q_BTNH.astype(jnp.float32), precision="highest")
        order = jnp.where(same.any(axis=2), wanted, EMPTY)
        return Asked(q, order) if before is None else Asked(before.q_BTNH + q, jnp.maximum(before.order_BT, order))

    def heads(self, value: Asked, index, G: int) -> Asked:
        asked = (np.asarray(index)[:, None] * G + np.arange(G)).reshape(-1)
        return value.replace(q_BTNH=value.q_BTNH[:, :, asked])

    def longer(self, value, more_B: jax.Array) -> None:
        return None


class Watched(struct.PyTreeNode):
    """Rows, and the attention that each of the last T queries paid to every slot, summed over the query heads of a kv head; the next
    query takes the place age_B % T. far_B, recent_B: how many chosen and how many recent rows a query reads, at most `far` and `recent`."""

    rows: Store
    mass_BKTC: jax.Array
    age_B: jax.Array
    far_B: jax.Array
    recent_B: jax.Array
    far: int = struct.field(pytree_node=False)
    recent: int = struct.field(pytree_node=False)


@dataclass(frozen=True)
class SparseWindow(Policy):
    """Every row is held; a query reads the `recent` last ones (a share of the budget, or a number; its own among them) and, for the rest of
    the `budget`, those with the most attention from the `steps` queries before it (Zhao et al. 2024, alg. 1).

    A row that a query does not read gets none of its attention, so a row comes back while what it got before it was left out still counts
    and the rows that took its place have got less: for `steps` queries at most, unless so few rows were looked at that others fill the
    budget. The number of rows read stays that of the prompt. host: the prompt's rows lie in host memory, and what is chosen comes over at
    every step; the paper keeps some on the device, moves only the others, and drops and computes rows anew when both are full.
    """

    budget: Budget
    steps: int = 16
    recent: float | int = 0.5
    host: bool = True
    chunk: ClassVar[int] = 1

    def needs(self) -> tuple[Evidence, ...]:
        return (LastQueries(self.steps),)

    def check(self, cfg, length: int) -> None:
        check_budget(self.budget, length)
        rows = most_rows(self.budget, length)
        if self.steps < 1:
            raise UserError(f"steps {self.steps} looks at no query; give at least 1")
        if not 1 <= part_of(self.recent, rows) < rows:
            raise UserError(f"recent={self.recent} of {rows} rows leaves none to choose, or not the newest; raise the budget or change it")

    def drafts(self, depth: int) -> str | None:
        return "what a row reads depends on what the row before it looked at; draft nothing, or leave out host and set evict"

    def pack_layer(self, rows: Prefilled, room: Room, here: Here) -> Watched:
        store, most = _ALL.pack_layer(rows, room, here), most_rows(self.budget, rows.most)
        budget_B, recent = rows_of(self.budget, rows.count_B), part_of(self.recent, most)
        recent_B = jnp.broadcast_to(part_of(self.recent, budget_B), budget_B.shape)
        asked: Asked = rows.evidence_BKS[LastQueries(self.steps)]
        seen = visible(store.order_BKC, here.lo(asked.order_BT), asked.order_BT)[:, :, None]
        p, _ = softmax(scores(asked.q_BTNH.astype(store.k_BKCH.dtype), store.k_BKCH, here.cfg.scale, here.cfg.softcap), seen)
        laid: Store = store
        if self.host:
            edge_B = jnp.maximum(store.live_B - recent_B, 0)
            laid = split(store, 0, edge_B, rows.order_BKS.shape[2], recent + room.rows)
        return Watched(laid, p.sum(axis=2), jnp.zeros_like(recent_B), budget_B - recent_B, recent_B, most - recent, recent)

    def attend(self, q, k, v, ask: Flow, new: Flow, layer: Watched, accepted: Accepted | None, across, here: Here):
        q, k = here.rotate(q, ask.angle_BT[:, :, None]), here.rotate(k, new.angle_BT[:, :, None])
        layer = layer.replace(rows=append(layer.rows, k, v, new, accepted))
        near, chosen = self.recent_slots(layer), self.chosen(layer, ask, here)
        found = zip(near_at(layer.rows, near), rows_at(layer.rows, chosen), strict=True)
        k, v = (jnp.concatenate(parts, axis=2) for parts in found)
        slot = jnp.concatenate([near, chosen], axis=2)
        order = jnp.where(slot == EMPTY, EMPTY, jnp.take_along_axis(layer.rows.order_BKC, jnp.maximum(slot, 0), axis=2))
        seen = visible(order, here.lo(ask.order_BT), ask.hi_BT)[:, :, None]
        p, _ = softmax(scores(q, k, here.cfg.scale, here.cfg.softcap), seen)
        return combine(p, v), noted(layer, slot, p.sum(axis=(2, 3)), ask.order_BT[:, 0] != EMPTY), across

    def recent_slots(self, layer: Watched) -> jax.Array:
        """slot_BKM of the last rows."""
        nth = jnp.arange(layer.recent)
        slot = (layer.rows.live_B - 1)[:, None] - nth
        slot = jnp.where((nth < layer.recent_B[:, None]) & (slot >= 0), slot, EMPTY)
        return jnp.broadcast_to(slot[:, None], (*layer.rows.order_BKC.shape[:2], layer.recent))

    def chosen(self, layer: Watched, ask: Flow, here: Here) -> jax.Array:
        """slot_BKM of the rows before those that the last queries looked at most."""
        order, C = layer.rows.order_BKC, layer.rows.capacity
        older = jnp.arange(C) < (layer.rows.live_B - layer.recent_B)[:, None]
        seen = older[:, None] & visible(order, here.lo(ask.order_BT), ask.hi_BT)[:, :, 0]
        value, slot = top_k(jnp.where(seen, numbers(layer.mass_BKTC.sum(axis=2)), NEG), min(layer.far, C), "BKC")
        taken = (value > NEG) & (jnp.arange(slot.shape[2]) < layer.far_B[:, None, None])
        return jnp.where(taken, slot, EMPTY).astype(jnp.int32)

    def place(self, layers: tuple[Watched, ...]) -> tuple[Watched, ...]:
        return tuple(layer.replace(rows=on_host(layer.rows)) for layer in layers)

    def bytes_moved(self, layer: Watched, here: Here) -> int:
        """Of as many rows as are chosen, wherever they lie: shapes do not depend on what is chosen."""
        return row_bytes(layer.rows) * layer.far if isinstance(layer.rows, Hosted) else 0

    def kept(self, layer: Watched) -> jax.Array:
        return layer.rows.order_BKC

    def bytes_read(self, layer: Watched, here: Here) -> int:
        return tree_bytes(layer) - row_bytes(layer.rows) * (slots_held(layer.rows) - layer.far - layer.recent)


def noted(layer: Watched, slot_BKM: jax.Array, mass_BKM: jax.Array, real_B: jax.Array) -> Watched:
    """The layer after one more query paid these slots this attention; sequences that have none stay as they are."""
    B, K, T, C = layer.mass_BKTC.shape
    at = jnp.where(real_B, layer.age_B % T, T)[:, None]
    at = jnp.broadcast_to(at, (B, K))
    slot = jnp.where(slot_BKM == EMPTY, C + jnp.arange(slot_BKM.shape[2]), slot_BKM)
    write = per_head(lambda x, t, s, new: x.at[t].set(0, mode="drop").at[t, s].set(new, mode="drop", unique_indices=True))
    return layer.replace(mass_BKTC=write(layer.mass_BKTC, at, slot, mass_BKM), age_B=layer.age_B + real_B.astype(jnp.int32))
