"""Pages judged by the smallest and largest key of each channel: Quest, and LServe's pages of several such chunks."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct

from tokeff.errors import UserError
from tokeff.kernels import page_scores
from tokeff.kv.cache import Rows, per_head
from tokeff.kv.hosted import Store, near_at
from tokeff.kv.policy import Prefilled
from tokeff.models.flow import EMPTY, Here
from tokeff.sparse.select import Readable, Selector, Span, check_page, in_pages, open_pages


class Bounds(struct.PyTreeNode):
    """The smallest and the largest rotated key of each chunk, channel by channel. P counts chunks."""

    low_BKPH: jax.Array
    high_BKPH: jax.Array


@dataclass(frozen=True)
class MinMax(Selector):
    """Pages with the largest bound on q.k: sum over channels of max(q * low, q * high) (Quest, Tang et al. 2024, sec. 3.2).

    Quest ranks pages for each query head. Here the bounds of a kv head's query heads are added up, and they read the same pages.
    chunk: rows that share bounds; a page of several chunks is worth its best one (LServe, Yang et al. 2025, sec. 3.4). None: a page.
    """

    page: int = 16
    chunk: int | None = None

    @property
    def size(self) -> int:
        return self.page

    @property
    def rows(self) -> int:
        """Rows of a chunk."""
        return self.chunk or self.page

    def check(self, cfg, length: int) -> None:
        check_page(self.page)
        if self.rows < 1 or self.page % self.rows:
            raise UserError(f"chunks of {self.rows} rows do not divide a page of {self.page}; give a divisor")

    def summary(self, rows: Prefilled, store: Rows, here: Here) -> Bounds:
        k, most = store.k_BKCH, jnp.finfo(store.k_BKCH.dtype).max
        real = (store.order_BKC != EMPTY)[..., None]

        def chunks(none):
            """Whole pages of chunks (the last page may have more than the store), with `none` where no row is."""
            pages = in_pages(jnp.where(real, k, none), self.page, none)
            B, K, P, R, H = pages.shape
            return pages.reshape(B, K, P * R // self.rows, self.rows, H)

        return Bounds(chunks(most).min(axis=3), chunks(-most).max(axis=3))

    def arrive(self, summary: Bounds, store: Store, slot_BT: jax.Array, here: Here) -> Bounds:
        B, K, P, _ = summary.low_BKPH.shape
        slot = jnp.broadcast_to(slot_BT[:, None], (B, K, slot_BT.shape[1]))
        k, chunk = near_at(store, slot)[0], jnp.where(slot == EMPTY, P, slot // self.rows)
        return Bounds(
            per_head(lambda x, p, k: x.at[p].min(k, mode="drop"))(summary.low_BKPH, chunk, k),
            per_head(lambda x, p, k: x.at[p].max(k, mode="drop"))(summary.high_BKPH, chunk, k),
        )

    def choose(self, q_BTNH: jax.Array, layer: Readable, span: Span, here: Here) -> jax.Array:
        bounds: Bounds = layer.summary
        seen = open_pages(layer.rows, span, self.size, here)
        M = min(layer.far, seen.shape[-1])
        _, page = page_scores(
            q_BTNH.astype(bounds.low_BKPH.dtype), bounds.low_BKPH, bounds.high_BKPH, seen,
            most=M, chunks=self.page // self.rows, scale=here.cfg.scale,
        )  # fmt: skip
        return jnp.where(jnp.arange(M) < layer.far_B[:, None, None, None], page, EMPTY)
