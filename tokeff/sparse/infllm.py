"""InfLLM (Xiao et al. 2024): blocks known by a few of their rows, and one distance for everything that is not recent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from tokeff.errors import UserError
from tokeff.kernels import merge
from tokeff.kv.cache import Rows, per_head, take_rows
from tokeff.kv.hosted import Store, near_at
from tokeff.kv.policy import Ask, Prefilled, pad_slots
from tokeff.kv.read import read_draft
from tokeff.models.attention import scores
from tokeff.models.flow import EMPTY, Flow, Here
from tokeff.sharding import top_k
from tokeff.sparse.gather import read_few
from tokeff.sparse.read import Read
from tokeff.sparse.select import Readable, Selector, check_page, in_pages


class Known(struct.PyTreeNode):
    """R unrotated keys that stand for each of P blocks."""

    key_BKPRH: jax.Array


@dataclass(frozen=True)
class Representatives(Selector):
    """Blocks whose `count` representatives have the largest q.k, summed over them and over all query heads: one set for a layer.

    Representatives are the rows of a block that got the most attention from the prompt's queries in whose local window they were, the last
    `window` rows of each (sec. 3.2). A block that fills during decoding is represented by its first rows, since nothing measures attention
    then.
    """

    page: int = 16
    count: int = 2
    window: int = 48

    @property
    def size(self) -> int:
        return self.page

    def needs(self) -> tuple[Ask, ...]:
        return (Ask(near=self.window),)

    def check(self, cfg, length: int) -> None:
        check_page(self.page)
        if not 1 <= self.count <= self.page:
            raise UserError(f"{self.count} representatives are not 1 to {self.page}, the rows of a block; change count")
        if self.window < 1:
            raise UserError(f"a local window of {self.window} rows measures no attention; set recent=1 or more")

    def summary(self, rows: Prefilled, store: Rows, here: Here) -> Known:
        order = in_pages(store.order_BKC, self.page, EMPTY)
        (ask,) = self.needs()
        mass = in_pages(pad_slots(rows.evidence_BKS[ask], store.capacity, 2), self.page)
        B, K, P, _ = mass.shape
        first = jnp.where(jnp.isnan(mass), jnp.inf, mass)  # a row that is no number stands for its block, which then ranks last
        _, at = top_k(jnp.where(order == EMPTY, -jnp.inf, first), self.count, "BKPR")
        slot = jnp.minimum(jnp.arange(P)[:, None] * self.page + at, store.capacity - 1).reshape(B, K, -1)
        key = here.rotate(take_rows(store.k_BKCH, slot), jnp.maximum(jnp.take_along_axis(store.order_BKC, slot, axis=2), 0), inverse=True)
        return Known(key.reshape(B, K, P, self.count, -1))

    def arrive(self, summary: Known, store: Store, slot_BT: jax.Array, here: Here) -> Known:
        B, K, P, R, H = summary.key_BKPRH.shape
        slot = jnp.broadcast_to(slot_BT[:, None], (B, K, slot_BT.shape[1]))
        safe = jnp.maximum(slot, 0)
        order = jnp.take_along_axis(store.order_BKC, safe, axis=2)
        key = here.rotate(near_at(store, safe)[0], jnp.maximum(order, 0), inverse=True)
        nth = safe % self.page
        at = jnp.where((slot == EMPTY) | (nth >= R), P * R + jnp.arange(slot.shape[2]), safe // self.page * R + nth)
        put = per_head(lambda x, s, new: x.at[s].set(new, mode="drop", unique_indices=True))
        return Known(put(summary.key_BKPRH.reshape(B, K, P * R, H), at, key).reshape(summary.key_BKPRH.shape))

    def worth(self, q_BTNH: jax.Array, layer: Readable, open_BKTP: jax.Array, here: Here) -> jax.Array:
        known: Known = layer.summary
        B, K, P, R, H = known.key_BKPRH.shape
        each = scores(q_BTNH, known.key_BKPRH.reshape(B, K, P * R, H), here.cfg.scale, 0.0)
        each = each.reshape(*each.shape[:-1], P, R).sum(axis=(1, 2, 5))
        return jnp.broadcast_to(each[:, None], open_BKTP.shape)


@dataclass(frozen=True)
class OneDistance(Read):
    """`Read`, where the first rows and the chosen ones stand `recent` places before every query, whatever their place (sec. 3.3)."""

    raw_keys: ClassVar[bool] = True

    def asking(self, q_BTNH: jax.Array, raw_BTNH: jax.Array, here: Here) -> jax.Array:
        return here.rotate(raw_BTNH, jnp.full(raw_BTNH.shape[:3], self.recent))

    def read(self, q_BTNH, raw_BTNH, rows: Store, chosen_BKTM: jax.Array, size: int, ask: Flow, here: Here) -> jax.Array:
        near, sinks, chosen = self.pages(rows, chosen_BKTM, size, ask, here)
        out, lse = read_few(q_BTNH, rows, near, chosen[..., :0], size, ask, here)
        far = self.asking(q_BTNH, raw_BTNH, here)
        out, lse = merge(out, lse, *read_few(far, rows, sinks, chosen, size, ask, here, unrotated=True))
        if ask.among_BTW is not None:
            out, lse = merge(out, lse, *read_draft(q_BTNH, rows.draft, ask, here))
        return out
