"""Seam 2: what a row is worth keeping for. A scorer is a frozen dataclass; higher = keep.

`first` scores the rows of a prefill from the evidence the scorer asked for. `later` scores the slots of a cache during decoding,
for policies that evict throughout; scorers whose rule exists only at the end of a prompt do not have it (`running` is False).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp

from tokeff.errors import UserError
from tokeff.kv.cache import Rows
from tokeff.kv.evidence import Ask, Evidence, Pictured
from tokeff.kv.policy import Prefilled, pad_slots
from tokeff.models.flow import EMPTY, Here


@dataclass(frozen=True)
class Scorer:
    """Base class. `running` says that it has `later`."""

    running: ClassVar[bool] = False

    def fade(self) -> float | None:
        """None: no attention mass wanted while decoding. Else each new query's mass is added to `fade` times the mass so far, and the
        one Ask of `needs` is what the prompt begins with."""
        return None

    def needs(self) -> tuple[Evidence, ...]:
        return ()

    def check(self) -> None:
        """Raise UserError for settings that cannot work."""

    def seeing(self, marks: tuple[int, ...]) -> Scorer:
        """Itself for texts in which these tokens stand for rows of pictures."""
        return self

    def first(self, rows: Prefilled, here: Here) -> jax.Array:
        """score_BKS of prefilled rows; padding may hold anything."""
        raise NotImplementedError

    def later(self, layer: Rows, here: Here) -> jax.Array:
        """score_BKC of cache slots; free slots may hold anything."""
        raise NotImplementedError(f"{type(self).__name__} scores only at the end of the prompt")


@dataclass(frozen=True)
class Recency(Scorer):
    """The newest rows win: recent-only baseline, StreamingLLM."""

    running: ClassVar[bool] = True

    def first(self, rows: Prefilled, here: Here) -> jax.Array:
        B, K, S, _ = rows.k_BKSH.shape
        return jnp.broadcast_to(rows.order_BKS.astype(jnp.float32), (B, K, S))

    def later(self, layer: Rows, here: Here) -> jax.Array:
        return layer.order_BKC.astype(jnp.float32)


@dataclass(frozen=True)
class Chance(Scorer):
    """Random rows, the baseline every ranking must beat. A hash of (seed, layer, head, order): the same row scores the same
    in any batch and on any mesh."""

    seed: int = 0

    def first(self, rows: Prefilled, here: Here) -> jax.Array:
        B, K, S, _ = rows.k_BKSH.shape
        order = jnp.broadcast_to(rows.order_BKS, (B, K, S)).astype(jnp.uint32)
        head = jnp.arange(K, dtype=jnp.uint32)[None, :, None]
        x = order * jnp.uint32(0x9E3779B1) + head * jnp.uint32(0x85EBCA77)
        x = x ^ (jnp.uint32(self.seed * 0xC2B2AE3D & 0xFFFFFFFF) + rows.index.astype(jnp.uint32) * jnp.uint32(0x27D4EB2F))
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # lowbias32 (Wellons 2018): a full-avalanche mixer
            x = (x ^ (x >> shift)) * jnp.uint32(factor)
        return ((x ^ (x >> 16)) >> 8).astype(jnp.float32)


@dataclass(frozen=True)
class Mass(Scorer):
    """Accumulated attention: the column sum of A over the queries so far, summed over the group, a query `d` rows back weighted by
    `factor ** d`. 1: H2O (Zhang et al. 2023, eq. for F_score in sec. 4); early rows were seen by more queries, and like H2O we let that
    stand. In between: A2SF (Jo & Shin 2024, eq. 5). 0: the last query alone (TOVA)."""

    factor: float = 1.0
    running: ClassVar[bool] = True

    def fade(self) -> float:
        return self.factor

    def needs(self) -> tuple[Ask, ...]:
        return (faded(self.factor),)

    def check(self) -> None:
        if not 0 <= self.factor <= 1:
            raise UserError(f"factor {self.factor} would let old attention grow; give a number in [0, 1]")

    def first(self, rows: Prefilled, here: Here) -> jax.Array:
        return rows.evidence_BKS[faded(self.factor)]

    def later(self, layer: Rows, here: Here) -> jax.Array:
        assert layer.mass_BKC is not None
        return layer.mass_BKC


@dataclass(frozen=True)
class TextFirst(Mass):
    """`Mass` at the end of a prompt, where every row of text is worth more than any row of a picture (LOOK-M, Wan et al. 2024, sec. 3.2).

    marks: the tokens that stand for pictures, which a model of pictures says (`seeing`); none where all rows are text.
    """

    marks: tuple[int, ...] = ()
    running: ClassVar[bool] = False

    def needs(self) -> tuple[Evidence, ...]:  # type: ignore[override]
        return (*super().needs(), *([Pictured(self.marks)] if self.marks else []))

    def seeing(self, marks: tuple[int, ...]) -> TextFirst:
        return replace(self, marks=marks)

    def first(self, rows: Prefilled, here: Here) -> jax.Array:
        mass = super().first(rows, here)
        return jnp.where(rows.evidence_BKS[Pictured(self.marks)], -1 / (1 + mass), mass) if self.marks else mass


def faded(factor: float) -> Ask:
    """What a prompt's queries add up to when each step leaves `factor` of the mass so far."""
    return Ask(decay=factor) if factor else Ask(last=1)


@dataclass(frozen=True)
class Shared(Scorer):
    """One score for all heads of a layer: the mean of `score` over them. They then keep the same rows, in the same slots."""

    score: Scorer

    @property
    def running(self) -> bool:  # type: ignore[override]
        return self.score.running

    def fade(self) -> float | None:
        return self.score.fade()

    def needs(self) -> tuple[Evidence, ...]:
        return self.score.needs()

    def check(self) -> None:
        self.score.check()

    def first(self, rows: Prefilled, here: Here) -> jax.Array:
        return over_heads(self.score.first(rows, here))

    def later(self, layer: Rows, here: Here) -> jax.Array:
        return over_heads(self.score.later(layer, here))


def over_heads(score_BKS: jax.Array) -> jax.Array:
    """The mean over kv heads, for each of them."""
    return jnp.broadcast_to(score_BKS.mean(axis=1, keepdims=True), score_BKS.shape)


@dataclass(frozen=True)
class WindowMass(Scorer):
    """SnapKV (Li et al. 2024, sec. 4): attention mass from the last `window` queries, pooled over neighbours.

    The paper pools per query head and keeps per query head; here the G heads of a group are summed first, so the cache stays at
    kv-head size. Average pooling commutes with that sum; max pooling does not, and is then taken over the sum.
    """

    window: int = 64
    kernel: int = 5
    pool: str = "avg"

    @property
    def asked(self) -> Evidence:
        return Ask(last=self.window)

    def needs(self) -> tuple[Evidence, ...]:
        return (self.asked,)

    def check(self) -> None:
        if self.window < 1 or self.kernel < 1:
            raise UserError(f"window {self.window} and kernel {self.kernel} must be at least 1")
        if self.pool not in ("avg", "max"):
            raise UserError(f"unknown pooling {self.pool!r}; use 'avg' or 'max'")

    def first(self, rows: Prefilled, here: Here) -> jax.Array:
        # Rows inside the window are kept anyway and must not lend their own large mass to neighbours outside it.
        n_B = rows.length_B[:, None]
        outside = rows.order_BKS < (n_B - self.window)[..., None]
        return pool(jnp.where(outside, rows.evidence_BKS[self.asked], 0.0), self.kernel, self.pool)


@dataclass(frozen=True)
class Chunked(Scorer):
    """ChunkKV (Liu et al. 2025, alg. 1): neighbours stay or go together. A row is worth the mean of `score` over its chunk of `size` rows.

    Chunks are counted from the first row of the prompt; the last `recent` rows, which are kept anyway, do not enter a mean. Each kv
    head takes its best chunks. The last one taken is cut where the budget ends, so that no budget is left unused.
    """

    score: Scorer
    size: int = 10
    recent: int = 0

    def needs(self) -> tuple[Evidence, ...]:
        return self.score.needs()

    def check(self) -> None:
        self.score.check()
        if self.size < 1:
            raise UserError(f"chunks of {self.size} rows hold nothing; give at least 1")

    def first(self, rows: Prefilled, here: Here) -> jax.Array:
        score, order = self.score.first(rows, here), rows.order_BKS
        counted = (order != EMPTY) & (order < rows.length_B[:, None, None] - self.recent)
        B, K, S = score.shape
        parts = [pad_slots(x, -(-S // self.size) * self.size, 2) for x in (jnp.where(counted, score, 0.0), counted)]
        total, count = (x.reshape(*x.shape[:2], -1, self.size).sum(axis=3) for x in parts)
        return jnp.repeat(total / jnp.maximum(count, 1), self.size, axis=2)[:, :, :S]


def pool(x_BKS: jax.Array, kernel: int, kind: str) -> jax.Array:
    """1-D pooling over the last axis, stride 1, zero padding kernel // 2 (torch's avg_pool1d counts the padding too)."""
    if kernel == 1:
        return x_BKS
    size, pads = (1, 1, kernel), ((0, 0), (0, 0), (kernel // 2, (kernel - 1) // 2))
    if kind == "max":
        return jax.lax.reduce_window(x_BKS, -jnp.inf, jax.lax.max, size, (1, 1, 1), pads)
    if kind != "avg":
        raise ValueError(f"unknown pooling {kind!r}; use 'avg' or 'max'")
    return jax.lax.reduce_window(x_BKS, 0.0, jax.lax.add, size, (1, 1, 1), pads) / kernel
