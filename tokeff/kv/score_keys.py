"""Scores that look at the keys and values alone: no query has to be asked, so a prefill gathers nothing for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from tokeff.errors import UserError
from tokeff.kv.cache import Rows, take_rows
from tokeff.kv.evidence import Ask
from tokeff.kv.policy import Prefilled, pad_slots
from tokeff.kv.score import Scorer, faded, pool
from tokeff.models.flow import EMPTY, Here


@dataclass(frozen=True)
class KeyNorm(Scorer):
    """-||k|| (Devoto et al. 2024, sec. 3): attention goes to small keys. Rotation does not change a norm.

    Lengths are compared to 16 bits: in the first layer equal tokens have keys of one length but for how their rotation was rounded.
    Of equals the earlier row stays.
    """

    def first(self, rows: Prefilled, here: Here) -> jax.Array:
        return -jax.lax.reduce_precision(jnp.linalg.norm(rows.k_BKSH.astype(jnp.float32), axis=-1), 8, 16)


@dataclass(frozen=True)
class KeyDifference(Scorer):
    """-cos(k, mean of the unit keys) (Park et al. 2025, KeyDiff, sec. 3), of rotated keys: those unlike the others are worth most."""

    running: ClassVar[bool] = True

    def first(self, rows: Prefilled, here: Here) -> jax.Array:
        return difference(rows.k_BKSH, rows.order_BKS != EMPTY)

    def later(self, layer: Rows, here: Here) -> jax.Array:
        return difference(layer.k_BKCH, layer.order_BKC != EMPTY)


def unit(k_BKSH: jax.Array, exists_BKS: jax.Array) -> jax.Array:
    """float32 rows of length 1; zeros where there is no row."""
    k = k_BKSH.astype(jnp.float32)
    k = k / jnp.maximum(jnp.linalg.norm(k, axis=-1, keepdims=True), 1e-9)
    return jnp.where(exists_BKS[..., None], k, 0.0)


def difference(k_BKSH: jax.Array, exists_BKS: jax.Array) -> jax.Array:
    """-cos_BKS of every key and the mean unit key of its head."""
    k = unit(k_BKSH, exists_BKS)
    anchor = k.sum(axis=2)
    anchor = anchor / jnp.maximum(jnp.linalg.norm(anchor, axis=-1, keepdims=True), 1e-9)
    return -jnp.einsum("bksh,bkh->bks", k, anchor)


@dataclass(frozen=True)
class Lag(Scorer):
    """LagKV (Liang et al. 2025, eq. 1-6): a row is worth how much it varies on the scale of the rows that come a lag later.

    After `sinks` rows the prompt falls into partitions of `size` rows. Keys and values of a partition are put on the scale of the
    next one (minimum 0, maximum 1 in every channel); a row's score is the standard deviation over its channels (of a sample, H - 1),
    softmaxed over the partition, keys plus values. Only the rank inside the partition counts, so that all give up equally many.
    The last whole partition and the rows behind it have no reference: they come before all others, newest first.
    """

    size: int = 128
    sinks: int = 4

    def check(self) -> None:
        if self.size < 1:
            raise UserError(f"lag {self.size} holds no row; give at least 1")

    def first(self, rows: Prefilled, here: Here) -> jax.Array:
        S = rows.order_BKS.shape[2]
        rank = self.ranks(rows.k_BKSH, rows.v_BKSH)
        scored_B = self.sinks + self.size * jnp.maximum((rows.here_B - self.sinks) // self.size - 1, 0)
        i = jnp.arange(S)[None, None]
        return jnp.where(i < scored_B[:, None, None], rank, 1.0 + i)

    def ranks(self, k_BKSH: jax.Array, v_BKSH: jax.Array) -> jax.Array:
        """rank_BKS in [0, 1) of each row inside its partition; 0 where there is no reference."""
        B, K, S, _ = k_BKSH.shape
        P = max(S - self.sinks, 0) // self.size
        if P < 2:
            return jnp.zeros((B, K, S))
        score = sum(self.spread(x[:, :, self.sinks : self.sinks + P * self.size]) for x in (k_BKSH, v_BKSH))
        rank = jnp.argsort(jnp.argsort(score, axis=-1), axis=-1).reshape(B, K, -1) / self.size
        return jnp.pad(rank, ((0, 0), (0, 0), (self.sinks, S - self.sinks - rank.shape[-1])))

    def spread(self, x_BKSH: jax.Array) -> jax.Array:
        """(B, K, P - 1, R): how much each row varies on the scale of the next partition."""
        B, K, S, H = x_BKSH.shape
        x = x_BKSH.astype(jnp.float32).reshape(B, K, -1, self.size, H)
        low, high = x[:, :, 1:].min(axis=3, keepdims=True), x[:, :, 1:].max(axis=3, keepdims=True)
        scaled = jnp.where(high > low, (x[:, :, :-1] - low) / jnp.where(high > low, high - low, 1.0), 0.0)
        return jax.nn.softmax(scaled.std(axis=-1, ddof=1), axis=-1)


@dataclass(frozen=True)
class Unrepeated(Scorer):
    """R-KV (Cai et al. 2025, sec. 3): weight * importance - (1 - weight) * redundancy.

    importance: attention from the last `window` queries, shared out among the rows before them, then the largest of `kernel`
    neighbours. redundancy: the mean cosine of a key with the others, softmaxed; of the keys that are closer than `alike` to one
    key, the latest `spare` share of all rows is not counted against it.

    Our reading: the window of queries is geometric weights of the same sum (1 - 1/window per step), so that decoding adds to one
    number a row. The group's query heads are summed, where the paper takes the largest.
    """

    window: int = 8
    weight: float = 0.1
    alike: float = 0.5
    spare: float = 0.1
    kernel: int = 7
    running: ClassVar[bool] = True

    def fade(self) -> float:
        return 1 - 1 / self.window

    def needs(self) -> tuple[Ask, ...]:
        return (faded(self.fade()),)

    def check(self) -> None:
        if self.window < 1 or self.kernel < 1:
            raise UserError(f"window {self.window} and kernel {self.kernel} must be at least 1")
        if not 0 <= self.weight <= 1 or not 0 <= self.spare <= 1:
            raise UserError(f"weight {self.weight} and spare {self.spare} are shares; give numbers in [0, 1]")

    def first(self, rows: Prefilled, here: Here) -> jax.Array:
        (ask,) = self.needs()
        order = jnp.broadcast_to(rows.order_BKS, rows.k_BKSH.shape[:3])
        return self.score(rows.k_BKSH, rows.evidence_BKS[ask], order)

    def later(self, layer: Rows, here: Here) -> jax.Array:
        assert layer.mass_BKC is not None
        at = jnp.argsort(jnp.where(layer.order_BKC == EMPTY, jnp.iinfo(jnp.int32).max, layer.order_BKC), axis=-1)
        order, mass = (jnp.take_along_axis(x, at, axis=-1) for x in (layer.order_BKC, layer.mass_BKC))
        score = self.score(take_rows(layer.k_BKCH, at), mass, order)
        return jnp.take_along_axis(score, jnp.argsort(at, axis=-1), axis=-1)

    def score(self, k_BKSH: jax.Array, mass_BKS: jax.Array, order_BKS: jax.Array) -> jax.Array:
        """score_BKS of rows in ascending order, empty ones last."""
        exists = order_BKS != EMPTY
        n_BK = exists.sum(axis=-1)
        before = exists & (jnp.arange(exists.shape[-1]) < n_BK[..., None] - self.window)
        mass = jnp.where(before, mass_BKS, 0.0)
        mass = pool(mass / jnp.maximum(mass.sum(axis=-1, keepdims=True), 1e-9), self.kernel, "max")
        similar = redundancy(unit(k_BKSH, exists), n_BK, self.alike, self.spare)
        return self.weight * mass - (1 - self.weight) * jax.nn.softmax(jnp.where(exists, similar, -jnp.inf), axis=-1)


def redundancy(k_BKSH: jax.Array, n_BK: jax.Array, alike: float, spare: float, block: int = 128) -> jax.Array:
    """mean_BKS of each unit key's cosine with the other n keys, a block of them at a time; see `Unrepeated` for those not counted."""
    B, K, S, H = k_BKSH.shape
    size = min(block, S)
    many = -(-S // size)
    blocks = jnp.moveaxis(pad_slots(k_BKSH, many * size, 2).reshape(B, K, many, size, H), 2, 0)
    spared = (spare * n_BK + 1e-4).astype(jnp.int32)[..., None, None]

    def add(total_BKS, block):
        k_BKRH, first = block
        cosine = jnp.einsum("bkrh,bksh->bkrs", k_BKRH, k_BKSH)
        cosine = jnp.where(first + jnp.arange(size)[:, None] == jnp.arange(S), 0.0, cosine)
        close = cosine > alike
        latest = jnp.cumsum(close[..., ::-1], axis=-1)[..., ::-1] <= spared
        return total_BKS + jnp.where(close & latest, 0.0, cosine).sum(axis=2), None

    total, _ = jax.lax.scan(add, jnp.zeros((B, K, S)), (blocks, size * jnp.arange(many)))
    return total / jnp.maximum(n_BK, 1)[..., None]
