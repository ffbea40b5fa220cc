"""What a kept row takes on from those that left: merges after the prompt (LOOK-M, EMS), and at every eviction (CaM)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from tokeff.errors import UserError
from tokeff.kv.cache import Room, Rows, per_head
from tokeff.kv.keep import Keep, chosen
from tokeff.kv.policy import Ask, Prefilled, pad_slots
from tokeff.kv.score import Recency, Scorer, pool
from tokeff.models.attention import NEG
from tokeff.models.flow import EMPTY, Here
from tokeff.sharding import top_k

BLOCK = 256  # rows whose cosines with the kept ones are held at a time


def dropped(rows: Prefilled, index_BKM: jax.Array) -> jax.Array:
    """gone_BKS: the rows of a prompt that are not among the kept ones (index S = none)."""
    S = rows.order_BKS.shape[2]
    kept = per_head(lambda at: jnp.zeros(S, bool).at[at].set(True, mode="drop"))(index_BKM)
    return ~kept & (rows.order_BKS != EMPTY)


def nearest(k_BKSH: jax.Array, kept_BKMH: jax.Array, there_BKM: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(slot_BKS, cosine_BKS): the kept row whose key has the largest cosine with each key. Blocked over rows: never S x M numbers."""

    def unit(x):
        x = x.astype(jnp.float32)
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-20)

    def best(k_BKRH):
        cosine = jnp.einsum("bkrh,bkmh->bkrm", unit(k_BKRH), unit(kept_BKMH), precision="highest")
        cosine = jnp.where(there_BKM[:, :, None], cosine, NEG)
        return jnp.argmax(cosine, axis=-1), cosine.max(axis=-1)

    B, K, S, H = k_BKSH.shape
    R = min(S, BLOCK)
    blocks = pad_slots(k_BKSH, -(-S // R) * R, 2).reshape(B, K, -1, R, H)
    slot, cosine = (jnp.moveaxis(x, 0, 2).reshape(B, K, -1)[..., :S] for x in jax.lax.map(best, jnp.moveaxis(blocks, 2, 0)))
    return slot, cosine


@dataclass(frozen=True)
class GlobalLocal(Scorer):
    """EMS's global-local score, our reading of Li et al. 2024, sec. 3.1: the mean attention a row got from all queries that saw it, and
    from the last `window`, each scaled to a sum of 1 over the rows of its head; their sum, averaged over `kernel` neighbours."""

    window: int = 16
    kernel: int = 5

    def needs(self) -> tuple[Ask, ...]:
        return (Ask(), Ask(last=self.window))

    def check(self) -> None:
        if self.window < 1 or self.kernel < 1:
            raise UserError(f"window {self.window} and kernel {self.kernel} must be at least 1")

    def first(self, rows: Prefilled, here: Here) -> jax.Array:
        order, n = rows.order_BKS, rows.length_B[:, None, None]
        outside = (order != EMPTY) & (order < n - self.window)
        everyone, last = (rows.evidence_BKS[ask] for ask in self.needs())
        parts = [jnp.where(outside, x, 0.0) for x in (everyone / jnp.maximum(n - order, 1), last)]
        far, near = (x / jnp.maximum(x.sum(axis=-1, keepdims=True), 1e-20) for x in parts)
        return pool(far + near, self.kernel, "avg")


@dataclass(frozen=True)
class Merged(Keep):
    """`Keep`, in which rows of the prompt that are dropped go on in the kept row whose key is nearest by cosine.

    With n rows merged into it a kept row x becomes, in key and value alike, a mean of 1 + n terms: itself and
    how = 'average': the n rows; 'pivot': the n means of such a row with x; 'weighted': the n rows times their cosines.
    least: a row with a smaller cosine is lost. more: how many of the dropped rows may merge, the best first, as a multiple of the rows
    kept; None for all. sized: a row made of 1 + n has log(1 + n) added to its scores, so that it draws the attention of them all.
    """

    how: str = "average"
    least: float = -1.0
    more: float | None = None
    sized: bool = False

    def check(self, cfg, length: int) -> None:
        super().check(cfg, length)
        if self.how not in ("average", "pivot", "weighted"):
            raise UserError(f"unknown merge {self.how!r}; use 'average', 'pivot' or 'weighted'")
        if self.evict:
            raise UserError("rows are merged once, at the end of the prompt; set evict=0")
        if self.more is not None and self.more < 0:
            raise UserError(f"more={self.more} rows cannot merge; give 0 or more, or None for all")

    def store(self, rows: Prefilled, index_BKM: jax.Array, room: Room, here: Here) -> Rows:
        layer, M = super().store(rows, index_BKM, room, here), index_BKM.shape[-1]
        slot, cosine = nearest(rows.k_BKSH, layer.k_BKCH[:, :, :M], layer.order_BKC[:, :, :M] != EMPTY)
        joins = self.joining(rows, index_BKM, here) & (cosine >= self.least)
        to = jnp.where(joins, slot, layer.capacity)
        many = sums(jnp.ones(to.shape), to, layer.capacity)
        half = self.how == "pivot"
        weight = cosine if self.how == "weighted" else jnp.full(to.shape, 0.5 if half else 1.0)

        def merged(x_BKCH, given_BKSH):
            own = x_BKCH * (1 + many / 2 if half else jnp.ones_like(many))[..., None]
            return ((own + sums(weight[..., None] * given_BKSH, to, layer.capacity)) / (1 + many)[..., None]).astype(x_BKCH.dtype)

        layer = layer.replace(k_BKCH=merged(layer.k_BKCH, rows.k_BKSH), v_BKCH=merged(layer.v_BKCH, rows.v_BKSH))
        return layer.replace(bias_BKC=jnp.log1p(many)) if self.sized else layer

    def squeeze(self, rows: Prefilled, here: Here) -> Prefilled:
        """Rows are merged once, at the end of the prompt, and wait for it: a mean of means would be another rule."""
        return rows

    def joining(self, rows: Prefilled, index_BKM: jax.Array, here: Here) -> jax.Array:
        """joins_BKS: the dropped rows, or the `more` best of them."""
        gone = dropped(rows, index_BKM)
        if self.more is None:
            return gone
        score = jnp.where(gone, self.score.first(rows, here).astype(jnp.float32), -jnp.inf)
        rank = jnp.argsort(jnp.argsort(-score, axis=-1), axis=-1)
        kept = (index_BKM < rows.order_BKS.shape[2]).sum(axis=-1, keepdims=True)
        return gone & (rank < self.more * kept)


def sums(x_BKSx: jax.Array, to_BKS: jax.Array, C: int) -> jax.Array:
    """total_BKCx of the rows that go to each slot; those that go to slot C go nowhere."""
    return per_head(lambda x, to: jnp.zeros((C, *x.shape[1:]), x.dtype).at[to].add(x, mode="drop"))(x_BKSx, to_BKS)


@dataclass(frozen=True)
class Watched(Recency):
    """The newest rows win, and beside that the attention each row gets is added up."""

    def fade(self) -> float:
        return 1.0

    def needs(self) -> tuple[Ask, ...]:
        return (Ask(),)


@dataclass(frozen=True)
class Bequeath(Keep):
    """CaM (Zhang et al. 2024): the value of a row that leaves goes, in `over` equal parts, to the rows of the next `over` places.

    It does so with the probability a / mean(a'), at most 1, of the attention a that it got so far and a' of the rows behind it. Keys
    are left alone. Differences from the authors' code: attention is that of all queries, there of the last one; the coin
    is a function of (seed, head, order), so that a row's fate depends on nothing else; of a prompt, a dropped row gives to those of the
    next places that stay.
    """

    over: int = 32
    seed: int = 0

    def check(self, cfg, length: int) -> None:
        super().check(cfg, length)
        if self.over < 1:
            raise UserError(f"over={self.over} rows receive nothing; give at least 1")
        if self.score.fade() is None:
            raise UserError(f"{type(self.score).__name__} adds up no attention; give a score that does")

    def coin(self, order_BKx: jax.Array) -> jax.Array:
        """A number in [0, 1) for every row of every head."""
        K = order_BKx.shape[1]
        number = jnp.maximum(order_BKx, 0) * K + jnp.arange(K)[None, :, None]
        draw = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(jax.random.key(self.seed), i)))
        return per_head(draw)(number)

    def store(self, rows: Prefilled, index_BKM: jax.Array, room: Room, here: Here) -> Rows:
        layer = super().store(rows, index_BKM, room, here)
        return layer.replace(v_BKCH=layer.v_BKCH + self.received(rows, index_BKM, layer.order_BKC).astype(layer.v_BKCH.dtype))

    def squeeze(self, rows: Prefilled, here: Here) -> Prefilled:
        """Rows leave between pieces as they do at any eviction: what stays receives their values."""
        index = self.choose(rows, here)
        left = chosen(rows, index)
        return left.replace(v_BKSH=left.v_BKSH + self.received(rows, index, left.order_BKS).astype(left.v_BKSH.dtype))

    def received(self, rows: Prefilled, index_BKM: jax.Array, order_BKC: jax.Array) -> jax.Array:
        """float32 (B, K, C, H) for the kept rows of these orders. Sums over the rows before each one: what it receives is the difference
        of two places of them."""
        gone = dropped(rows, index_BKM)
        order = jnp.broadcast_to(rows.order_BKS, gone.shape)
        mass = rows.evidence_BKS[self.needs()[0]]
        stays = ~gone & (order != EMPTY)
        total, count = (jnp.cumsum(jnp.where(stays, x, 0)[..., ::-1], axis=-1)[..., ::-1] for x in (mass, jnp.ones_like(mass)))
        gives = gone & (self.coin(order) * total < mass * count)
        gift = jnp.where(gives[..., None], rows.v_BKSH / self.over, 0).astype(jnp.float32)
        before = jnp.pad(jnp.cumsum(gift, axis=2), ((0, 0), (0, 0), (1, 0), (0, 0)))
        ascending = jnp.where(rows.order_BKS[:, 0] == EMPTY, jnp.iinfo(jnp.int32).max, rows.order_BKS[:, 0])
        find = jax.vmap(lambda a, x_KC: jnp.searchsorted(a, x_KC.reshape(-1)).reshape(x_KC.shape))
        ends = (find(ascending, order_BKC - back) for back in (0, self.over))
        last, first = (per_head(lambda x, at: x[at])(before, at) for at in ends)
        return jnp.where((order_BKC != EMPTY)[..., None], last - first, 0)

    def evict_where(self, layer: Rows, full_B: jax.Array, here: Here) -> Rows:
        after = super().evict_where(layer, full_B, here)
        if after.free_BKE is None or after.mass_BKC is None:
            return after
        order, mass = (jnp.take_along_axis(x, after.free_BKE, axis=2)[..., None] for x in (layer.order_BKC, after.mass_BKC))
        behind = (after.order_BKC[:, :, None] > order) & full_B[:, None, None, None]  # (B, K, E, C)
        total = jnp.where(behind, after.mass_BKC[:, :, None], 0).sum(axis=-1)
        gives = (order[..., 0] != EMPTY) & (self.coin(order[..., 0]) * total < mass[..., 0] * behind.sum(axis=-1))
        gift = jnp.where(gives[..., None], per_head(lambda v, at: v[at])(layer.v_BKCH, after.free_BKE) / self.over, 0)
        near = behind & (after.order_BKC[:, :, None] <= order + self.over)
        found, slot = top_k(near.astype(jnp.int32), min(self.over, near.shape[-1]), "BKEC")
        slot = jnp.where(found > 0, slot, near.shape[-1])
        add = per_head(lambda v, at, gift: v.at[at].add(jnp.broadcast_to(gift[:, None], (*at.shape, v.shape[1])), mode="drop"))
        return after.replace(v_BKCH=add(layer.v_BKCH, slot, gift.astype(layer.v_BKCH.dtype)))
