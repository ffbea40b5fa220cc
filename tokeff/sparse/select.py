"""Seam 3: what to read. Every row is kept; a selector names, for each query, the rows worth reading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import struct

from tokeff.errors import UserError
from tokeff.kernels import merge
from tokeff.kv.budget import Budget, check_budget, most_rows, rows_of
from tokeff.kv.cache import Room, Rows, take_rows, visible
from tokeff.kv.policy import Full, Prefilled, append, tree_bytes
from tokeff.kv.read import read_draft, read_rows
from tokeff.models.attention import NEG, combine, scores, softmax
from tokeff.models.flow import EMPTY, Accepted, Flow, Here
from tokeff.sharding import top_k


class Selection(struct.PyTreeNode):
    """Rows to read, by order: slots mean nothing outside their own layer. order_BKTM is EMPTY where there are fewer than M."""

    order_BKTM: jax.Array


class Readable(struct.PyTreeNode):
    """A full store, and how many rows beside the recent ones a query reads: far_B of each sequence, at most `far`."""

    rows: Rows
    far_B: jax.Array
    far: int = struct.field(pytree_node=False)


class Selector(Protocol):
    """Rows worth reading, for each query of a selecting layer, among stored rows with lo <= order <= hi."""

    def __call__(
        self, q_BTNH: jax.Array, layer: Readable, lo_BT: jax.Array, hi_BT: jax.Array, here: Here, /
    ) -> Selection: ...


@dataclass(frozen=True)
class TopScores:
    """The M largest raw q.k of each query, summed over the query heads of a kv head (TidalDecode, Yang et al. 2024, sec. 3.2)."""

    def __call__(self, q_BTNH: jax.Array, layer: Readable, lo_BT: jax.Array, hi_BT: jax.Array, here: Here) -> Selection:
        rows, M = layer.rows, min(layer.far, layer.rows.capacity)
        logits = scores(q_BTNH, rows.k_BKCH, here.cfg.scale, here.cfg.softcap).sum(axis=2)
        logits = jnp.where(visible(rows.order_BKC, lo_BT, hi_BT), logits, NEG)
        value, slot = top_k(logits, M, "BKTC")
        order = jnp.take_along_axis(rows.order_BKC[:, :, None], slot, axis=3)
        chosen = (value > NEG) & (jnp.arange(M) < layer.far_B[:, None, None, None])
        return Selection(jnp.where(chosen, order, EMPTY))


def slots_of(order_BKC: jax.Array, wanted_BKM: jax.Array) -> jax.Array:
    """slot_BKM in an append-only store, whose orders ascend; EMPTY where this layer does not hold the row."""
    ascending = jnp.where(order_BKC == EMPTY, jnp.iinfo(jnp.int32).max, order_BKC)
    find = jax.vmap(jax.vmap(jnp.searchsorted))
    slot = jnp.minimum(find(ascending, wanted_BKM), order_BKC.shape[-1] - 1)
    found = jnp.take_along_axis(order_BKC, slot, axis=2) == wanted_BKM
    return jnp.where(found & (wanted_BKM != EMPTY), slot, EMPTY).astype(jnp.int32)


@dataclass(frozen=True)
class Read(Full):
    """Dense layers, layers that select, and layers that read only what the nearest selecting layer below them chose.

    budget: rows one query reads in a reading layer, the `recent` last rows (its own included) among them. Because the recent rows
    are always read, a draft whose depth is below `recent` sees exactly what one-row decoding would.
    """

    budget: Budget
    selector: Selector
    dense: tuple[int, ...] = (0, 1)
    select: tuple[int, ...] = (2,)
    recent: int = 16

    def role(self, layer: int) -> str:
        return "dense" if layer in self.dense else "select" if layer in self.select else "read"

    def check(self, cfg, length: int) -> None:
        check_budget(self.budget, length)
        readers = [i for i in range(cfg.L) if self.role(i) == "read"]
        if readers and (not self.select or min(self.select) > readers[0]):
            raise UserError(f"layer {readers[0]} reads a selection no layer below it makes; add a lower layer to select")
        if most_rows(self.budget, length) <= self.recent:
            raise UserError(f"budget of {most_rows(self.budget, length)} rows is all recent ({self.recent}); raise the budget")

    def drafts(self, depth: int) -> str | None:
        if depth >= self.recent:
            return f"only the {self.recent} most recent rows are read for sure and drafts are {depth} deep; raise recent"
        return None

    def pack_layer(self, rows: Prefilled, room: Room, here: Here) -> Readable:  # type: ignore[override]
        # The length of the prompt, not of what a pass let through: every layer reads the same number of rows.
        # All of the context is all of what comes, too: a share of 1 reads generated rows like any other.
        more = room.rows if self.budget == 1.0 and isinstance(self.budget, float) else 0
        far = max(most_rows(self.budget, rows.order_BS.shape[1]) - self.recent, 1) + more
        return Readable(super().pack_layer(rows, room, here), rows_of(self.budget, rows.length_B) - self.recent + more, far)

    def attend(self, q, k, v, ask: Flow, new: Flow, layer: Readable, accepted: Accepted | None, across, here: Here):
        q, k = here.rotate(q, ask.angle_BT[:, :, None]), here.rotate(k, new.angle_BT[:, :, None])
        rows = append(layer.rows, k, v, new, accepted)
        layer = layer.replace(rows=rows)
        role = self.role(here.layer)
        if role == "read":
            return read_selected(q, rows, across, self.recent, ask, here), layer, across
        if role == "select":
            across = self.selector(q, layer, here.lo(ask.order_BT), ask.order_BT - self.recent, here)
        return read_rows(q, rows, ask, here), layer, across

    def kept(self, layer: Readable) -> jax.Array:
        return layer.rows.order_BKC

    def bytes_read(self, layer: Readable, here: Here) -> int:
        whole, C = tree_bytes(layer), layer.rows.capacity
        if self.role(here.layer) != "read":
            return whole
        kv = tree_bytes((layer.rows.k_BKCH, layer.rows.v_BKCH))
        return whole - kv + kv * min(layer.far + self.recent, C) // C


def read_selected(q_BTNH: jax.Array, layer: Rows, chosen: Selection, recent: int, ask: Flow, here: Here) -> jax.Array:
    """out_BTNH over the chosen rows and the last `recent` rows before each query."""
    B, K, T, M = chosen.order_BKTM.shape
    near = ask.order_BT[:, :, None] - jnp.arange(recent)
    near = jnp.broadcast_to(jnp.where(near > ask.hi_BT[:, :, None], EMPTY, near)[:, None], (B, K, T, recent))
    order = jnp.concatenate([chosen.order_BKTM, near], axis=-1)
    slot = slots_of(layer.order_BKC, jnp.maximum(order, EMPTY).reshape(B, K, -1)).reshape(B, K, T, -1)
    if T == 1 and ask.among_BTT is None:
        return read_rows(q_BTNH, layer, ask, here, pages=slot[:, :, 0])
    out, lse = gather_read(q_BTNH, layer, slot, ask, here)
    if ask.among_BTT is not None:
        out, _ = merge(out, lse, *read_draft(q_BTNH, layer.draft, ask, here))
    return out


def gather_read(q_BTNH: jax.Array, layer: Rows, slot_BKTM: jax.Array, ask: Flow, here: Here):
    """(out_BTNH, lse_BTN) where every query reads slots of its own: each becomes a row of a batch of one-query reads."""
    B, K, T, M = slot_BKTM.shape
    N, H = q_BTNH.shape[2:]
    flat = jnp.maximum(slot_BKTM, 0).reshape(B, K, T * M)

    def fold(x_BKTM):
        return jnp.moveaxis(x_BKTM.reshape(B, K, T, M, *x_BKTM.shape[3:]), 2, 1).reshape(B * T, K, M, *x_BKTM.shape[3:])

    k, v = fold(take_rows(layer.k_BKCH, flat)), fold(take_rows(layer.v_BKCH, flat))
    order = jnp.where(slot_BKTM == EMPTY, EMPTY, jnp.take_along_axis(layer.order_BKC, flat, axis=2).reshape(B, K, T, M))
    order = jnp.moveaxis(order, 2, 1).reshape(B * T, K, M)
    lo, hi = here.lo(ask.order_BT).reshape(-1, 1), ask.hi_BT.reshape(-1, 1)
    seen = visible(order, lo, hi)[:, :, None]
    p, lse = softmax(scores(q_BTNH.reshape(B * T, 1, N, H), k, here.cfg.scale, here.cfg.softcap), seen)
    return combine(p, v).reshape(B, T, N, H), lse.reshape(B, T, N)
