"""HiP (Lee et al. 2024): find the best pages by halving the best chunks, looking only at the ends of each."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from tokeff.errors import UserError
from tokeff.kv.cache import take_rows
from tokeff.models.attention import NEG
from tokeff.models.flow import EMPTY, Here
from tokeff.sharding import top_k
from tokeff.sparse.select import Readable, Selector, Span, check_page, pages_of


@dataclass(frozen=True)
class Halving(Selector):
    """Our reading of the tree search (sec. 3.2): chunks of `start` rows are worth the larger q.k of their first and last row; the best
    ones are halved, and so on down to pages. Nothing is kept beside the rows, and O(log) keys are read.

    spare: between stages as many chunks go on as hold so many times the rows that are chosen at last. The published version
    has three stages (256, 32 and 8 rows) with numbers of their own. Query heads of a kv head add their q.k up.
    """

    page: int = 8
    start: int = 64
    spare: int = 2

    @property
    def size(self) -> int:
        return self.page

    def check(self, cfg, length: int) -> None:
        check_page(self.page)
        ratio = self.start // self.page
        if self.start != ratio * self.page or ratio < 1 or ratio & (ratio - 1) or self.spare < 1:
            raise UserError(f"chunks of {self.start} rows do not halve to pages of {self.page}; set start to the page times 2, 4, 8, ...")

    def goes_on(self, far, size: int):
        """How many chunks of `size` rows are halved, where `far` pages are chosen."""
        return -(-self.spare * far * self.page // size)

    def choose(self, q_BTNH: jax.Array, layer: Readable, span: Span, here: Here) -> jax.Array:
        B, T, N, H = q_BTNH.shape
        q = q_BTNH.reshape(B, T, here.cfg.K, -1, H).sum(axis=3)
        C, far_B = layer.rows.capacity, layer.far_B[:, None, None, None]
        chunk, size = jnp.broadcast_to(jnp.arange(pages_of(C, self.start)), (*span.end_BKT.shape, pages_of(C, self.start))), self.start
        while size > self.page:
            most = min(self.goes_on(layer.far, size), chunk.shape[-1])
            chunk = self.best(q, layer, chunk, size, span, most, self.goes_on(far_B, size), here)
            halves = jnp.stack([2 * chunk, 2 * chunk + 1], axis=-1)
            chunk = jnp.where(chunk[..., None] == EMPTY, EMPTY, halves).reshape(*chunk.shape[:3], -1)
            size //= 2
        return self.best(q, layer, chunk, size, span, min(layer.far, pages_of(C, size)), far_B, here)

    def best(self, q_BTKH, layer: Readable, chunk_BKTP, size: int, span: Span, most: int, number, here: Here) -> jax.Array:
        """chunk_BKTM of the `number` best of these chunks, EMPTY past it."""
        rows, shape = layer.rows, chunk_BKTP.shape
        first = jnp.maximum(chunk_BKTP * size, span.first * self.page)
        last = jnp.minimum((chunk_BKTP + 1) * size, span.end_BKT[..., None] * self.page) - 1
        slot = jnp.clip(jnp.stack([first, last], axis=-1), 0, rows.capacity - 1).reshape(*shape[:2], -1)
        key = take_rows(layer.keys_BKCH, slot).reshape(*shape, 2, -1)
        worth = jnp.einsum("btkh,bktpeh->bktpe", q_BTKH, key, preferred_element_type=jnp.float32).max(axis=-1)
        newest = jnp.take_along_axis(rows.order_BKC, slot, axis=2).reshape(*shape, 2)[..., 1]
        seen = (chunk_BKTP != EMPTY) & (first <= last) & (newest >= span.lo_BT[:, None, :, None]) & ~jnp.isnan(worth)
        value, at = top_k(jnp.where(seen, worth, NEG), most, "BKTM")
        kept = (value > NEG) & (jnp.arange(most) < number)
        return jnp.where(kept, jnp.take_along_axis(chunk_BKTP, at, axis=3), EMPTY).astype(jnp.int32)

    def keys_read(self, layer: Readable) -> int:
        size, keys = self.start, 2 * pages_of(layer.rows.capacity, self.start)
        while size > self.page:
            keys += 4 * min(self.goes_on(layer.far, size), pages_of(layer.rows.capacity, size))
            size //= 2
        return keys
