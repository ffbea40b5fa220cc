"""Budgets that differ by head, in memory that really shrinks: pages owned by heads, attended page by page.

A layer's kept rows live in P pages of R rows; `owner_BP` names each page's kv head. Because AdaKV fixes the sum over heads, the
number of pages is static although the split is data. Attention reads every page once with its owner's queries and combines pages
by segment maximum and sum, so keys are never gathered and bytes read = sum of the budgets. Generated rows go to an ordinary store
beside the pool, equal for all heads; the two partial results merge by log-sum-exp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tokeff.errors import UserError
from tokeff.kernels import merge
from tokeff.kv.budget import Spread
from tokeff.kv.cache import Room, Rows, empty_draft, whole_tiles
from tokeff.kv.keep import Keep
from tokeff.kv.policy import Policy, Prefilled, append
from tokeff.kv.read import read_draft, read_store
from tokeff.models.attention import NEG, scores
from tokeff.models.flow import EMPTY, Accepted, Flow, Here


class Pool(struct.PyTreeNode):
    """Pages of kept rows. owner_BP = EMPTY for a page nobody needed; order_BPR = EMPTY for the unused end of a head's last page."""

    k_BPRH: jax.Array
    v_BPRH: jax.Array
    order_BPR: jax.Array
    owner_BP: jax.Array


class Paged(struct.PyTreeNode):
    """A layer: what the prompt left (never written again) and what came after."""

    pool: Pool
    tail: Rows


def pack_pool(rows: Prefilled, keep_BKS: jax.Array, P: int, R: int) -> Pool:
    """Kept rows of each head into consecutive pages, in order. P must be at least the sum over heads of ceil(rows / R)."""
    K = keep_BKS.shape[1]

    def one(k_KSH, v_KSH, order_KS, keep_KS):
        pages = -(-keep_KS.sum(axis=1) // R)
        start = jnp.cumsum(pages) - pages
        nth = jnp.cumsum(keep_KS, axis=1) - 1
        at = jnp.where(keep_KS, start[:, None] * R + nth, P * R + jnp.arange(keep_KS.size).reshape(keep_KS.shape)).reshape(-1)

        source = jnp.full(P * R, EMPTY, jnp.int32).at[at].set(jnp.arange(at.size), mode="drop", unique_indices=True)
        held = source != EMPTY

        def take(x_KSH):  # by reading the kept rows: writing them to their places would send whole layers between devices
            rows = x_KSH.reshape(-1, x_KSH.shape[-1])[jnp.maximum(source, 0)]
            return jnp.where(held[:, None], rows, 0).reshape(P, R, -1)

        order = jnp.where(held, jnp.broadcast_to(order_KS, keep_KS.shape).reshape(-1)[source], EMPTY)
        owner = jnp.searchsorted(jnp.cumsum(pages), jnp.arange(P), side="right")
        return take(k_KSH), take(v_KSH), order.reshape(P, R), jnp.where(owner < K, owner, EMPTY).astype(jnp.int32)

    return Pool(*jax.vmap(one)(rows.k_BKSH, rows.v_BKSH, rows.order_BKS, keep_BKS))


def read_pool(q_BTNH: jax.Array, pool: Pool, lo_BT: jax.Array, hi_BT: jax.Array, here: Here) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH, lse_BTN) over the pool: per-page softmax pieces, combined by owner."""
    cfg, (B, T, N, H) = here.cfg, q_BTNH.shape
    K, P = cfg.K, pool.owner_BP.shape[1]
    q = jnp.moveaxis(q_BTNH.reshape(B, T, K, N // K, H), 2, 1)
    safe = jnp.maximum(pool.owner_BP, 0)
    q_BPTGH = jnp.take_along_axis(q, safe[:, :, None, None, None], axis=1)
    logits = scores(jnp.moveaxis(q_BPTGH, 1, 2).reshape(B, T, P * (N // K), H), pool.k_BPRH, cfg.scale, cfg.softcap)
    seen = (pool.order_BPR[:, :, None] >= lo_BT[:, None, :, None]) & (pool.order_BPR[:, :, None] <= hi_BT[:, None, :, None])
    logits = jnp.where(seen[:, :, None], logits, NEG)  # (B, P, G, T, R)
    segment = jnp.where(pool.owner_BP == EMPTY, K, pool.owner_BP)  # out of range, so it counts nowhere

    def over_pages(reduce, x):
        return jax.vmap(lambda x, s: reduce(x, s, num_segments=K))(x, segment)

    top_BKGT = over_pages(jax.ops.segment_max, jnp.maximum(logits.max(axis=-1), NEG))
    top_BKGT = jnp.maximum(top_BKGT, NEG)  # a head that owns no page
    mine = jnp.take_along_axis(top_BKGT, safe[:, :, None, None], axis=1)[..., None]
    e = jnp.where(seen[:, :, None], jnp.exp(logits - mine), 0.0)
    total = over_pages(jax.ops.segment_sum, e.sum(axis=-1))
    out = over_pages(jax.ops.segment_sum, jnp.einsum("bpgtr,bprh->bpgth", e, pool.v_BPRH.astype(jnp.float32)))
    out = out / jnp.maximum(total, 1e-37)[..., None]
    lse = top_BKGT + jnp.log(jnp.maximum(total, 1e-37))
    out = jnp.moveaxis(out, 3, 1).reshape(B, T, N, H).astype(q_BTNH.dtype)
    return out, jnp.moveaxis(lse, 3, 1).reshape(B, T, N)


class Paging(Policy):
    """What policies with a pool share. `rule`: the scores and protection of a `Keep`; `page`: rows of a page."""

    rule: Keep
    page: int

    def needs(self):
        return self.rule.needs()

    def check(self, cfg, length: int) -> None:
        self.rule.check(cfg, length)
        if self.page < 1:
            raise UserError(f"page {self.page} must be at least 1")
        if self.rule.evict:
            raise UserError("budgets that differ by head are made once, at the end of the prompt; set evict=0")

    def role(self, layer: int) -> Any:
        return self.rule.role(layer)

    def squeeze(self, rows: Prefilled, here: Here) -> Prefilled:
        """Heads hold equally many rows until the prompt ends."""
        return self.rule.squeeze(rows, here)

    def paged(self, rows: Prefilled, keep_BKS: jax.Array, P: int, room: Room) -> Paged:
        """These rows in P pages, and room for what comes."""
        B, K, _, H = rows.k_BKSH.shape
        zero = jnp.zeros((B, K, whole_tiles(room.rows, rows.k_BKSH.dtype), H), rows.k_BKSH.dtype)
        tail = Rows(zero, zero, jnp.full(zero.shape[:3], EMPTY, jnp.int32), jnp.zeros(B, jnp.int32))
        return Paged(pack_pool(rows, keep_BKS, P, self.page), tail.replace(draft=empty_draft(zero, room.draft)))

    def attend(self, q, k, v, ask: Flow, new: Flow, layer: Paged, accepted: Accepted | None, across, here: Here):
        q, k = here.rotate(q, ask.angle_BT[:, :, None]), here.rotate(k, new.angle_BT[:, :, None])
        tail = append(layer.tail, k, v, new, accepted)
        out, lse = read_pool(q, layer.pool, here.lo(ask.order_BT), ask.hi_BT, here)
        out, lse = merge(out, lse, *read_store(q, tail, ask, here))
        if ask.among_BTW is not None:
            out, lse = merge(out, lse, *read_draft(q, tail.draft, ask, here))
        return out, layer.replace(tail=tail), across

    def kept(self, layer: Paged) -> jax.Array:
        """order_BKC with C = all slots of the pool and the tail; a slot of another head's page reads EMPTY."""
        B, K, _ = layer.tail.order_BKC.shape
        own = layer.pool.owner_BP[:, None] == jnp.arange(K)[None, :, None]
        pages = jnp.where(own[..., None], layer.pool.order_BPR[:, None], EMPTY).reshape(B, K, -1)
        return jnp.concatenate([pages, layer.tail.order_BKC], axis=-1)


@dataclass(frozen=True)
class KeepByHead(Paging):
    """`Keep`'s scores and protection with another division among the heads of a layer, held in a pool of pages of `page` rows."""

    rule: Keep
    spread: Spread = Spread()
    page: int = 16

    def check(self, cfg, length: int) -> None:
        super().check(cfg, length)
        if not 0 <= self.spread.floor <= 1:
            raise UserError(f"floor {self.spread.floor} must be in [0, 1]")

    def pack_layer(self, rows: Prefilled, room: Room, here: Here) -> Paged:
        K = rows.k_BKSH.shape[1]
        keep = self.spread.keep(*self.rule.guarded(rows, here))
        # Every head wastes less than one page, so the sum of ceil(rows / R) is at most (K * M + K * (R - 1)) / R. Rounded up to
        # a multiple of K: a mesh that divides the heads then divides the pages.
        P = K * math.ceil((self.rule.rows(rows.most, here) + self.page - 1) / self.page)
        return self.paged(rows, keep, P, room)


@dataclass(frozen=True)
class KeepByModel(Paging):
    """`Keep`'s scores and protection with one budget for all layers and heads: the highest scores of the model stay, wherever they are.

    How many pages a layer needs is known only when the scores are. `plan` looks at them and writes it into `pages`.
    """

    rule: Keep
    page: int = 16
    pages: tuple[int, ...] = ()
    span: ClassVar[str] = "model"

    def plan(self, layers: tuple[Prefilled, ...], cfg) -> KeepByModel:
        if self.pages:
            return self
        counts = jax.jit(lambda layers: jnp.stack([keep.sum(axis=-1) for keep in self.keep(layers, cfg)]))(layers)
        pages_L = (-(-np.asarray(counts) // self.page)).sum(axis=2).max(axis=1)
        return replace(self, pages=tuple(cfg.K * max(1, -(-int(n) // cfg.K)) for n in pages_L))

    def keep(self, layers: tuple[Prefilled, ...], cfg) -> list[jax.Array]:
        """mask_BKS of each layer: together the budget of every head of every layer."""
        guarded = [self.rule.guarded(rows, Here(i, cfg)) for i, rows in enumerate(layers)]
        B, total_B = len(layers[0].length_B), cfg.K * jnp.stack([keep_B for _, _, keep_B in guarded]).sum(axis=0)
        flat = [jnp.where(forced & (score > -jnp.inf), jnp.inf, score).reshape(B, -1) for score, forced, _ in guarded]
        rank = jnp.argsort(jnp.argsort(-jnp.concatenate(flat, axis=1), axis=1), axis=1)
        parts = jnp.split(rank, np.cumsum([x.shape[1] for x in flat])[:-1].tolist(), axis=1)
        found = [part.reshape(score.shape) < total_B[:, None, None] for part, (score, _, _) in zip(parts, guarded, strict=True)]
        return [mask & (score > -jnp.inf) for mask, (score, _, _) in zip(found, guarded, strict=True)]

    def pack(self, layers: tuple[Prefilled, ...], room: Room, cfg) -> tuple[Paged, ...]:
        assert len(self.pages) == len(layers), "plan comes first"
        return tuple(self.paged(rows, keep, P, room) for rows, keep, P in zip(layers, self.keep(layers, cfg), self.pages, strict=True))
