"""Patterns of sparse prefill: fixed shapes, ranked blocks, verticals and slashes, and a pattern for each head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tokeff.errors import UserError
from tokeff.kv.keep import numbers
from tokeff.models.attention import NEG, scores
from tokeff.models.flow import EMPTY, Here
from tokeff.sharding import top_k
from tokeff.sparse.pattern import Pattern, Reading, Rows, own_blocks, pad_rows, tidy


def local(own_Q: jax.Array, n: int) -> jax.Array:
    """block_QM: a block of queries and the n - 1 before it."""
    return own_Q[:, None] - jnp.arange(n)


def beside(near_QM: jax.Array, far_BKQM: jax.Array, own_Q: jax.Array) -> jax.Array:
    """Both sets of blocks, those of `far` only where `near` lacks them. near must be the most recent blocks."""
    n = near_QM.shape[-1]
    far = jnp.where(far_BKQM > (own_Q - n)[:, None], EMPTY, far_BKQM)
    near = jnp.broadcast_to(near_QM, (*far.shape[:3], n))
    return tidy(jnp.concatenate([far, near], axis=-1), own_Q)


@dataclass(frozen=True)
class AShape(Pattern):
    """The first `sinks` rows and the last `window` rows before each query, itself included (MInference, Jiang et al. 2024, sec. 3.1;
    StreamingLLM's mask). With `dense` it is Tri-shape (SCBench, Li et al. 2024)."""

    sinks: int = 16
    window: int = 256

    def check(self, cfg: Any, length: int) -> None:
        super().check(cfg, length)
        if self.sinks < 0 or self.window < 1:
            raise UserError(f"sinks={self.sinks} must not be negative and window={self.window} at least 1")

    def choose(self, rows: Rows, here: Here) -> Reading:
        own, R = own_blocks(rows, self.block), self.block
        first = jnp.broadcast_to(jnp.arange(-(-self.sinks // R)), (*rows.k_BKSH.shape[:2], own.size, -(-self.sinks // R)))
        return Reading(beside(local(own, min((self.window + R - 2) // R + 1, _blocks(rows, R))), first, own))

    def sees(self, order_BT1, order_BK1M, here: Here):
        return (order_BK1M < self.sinks) | (order_BK1M > order_BT1 - self.window)


@dataclass(frozen=True)
class Strided(Pattern):
    """S2-Attention (Lin et al. 2024): the last `near` blocks, and every `stride`-th block, another phase for each kv head, so that the
    heads together cover the context. Places are absolute: a block a head once skipped it never reads."""

    near: int = 4
    stride: int = 4

    def check(self, cfg: Any, length: int) -> None:
        super().check(cfg, length)
        if self.near < 1 or self.stride < 1:
            raise UserError(f"near={self.near} and stride={self.stride} must be at least 1")

    def choose(self, rows: Rows, here: Here) -> Reading:
        own, (B, K), P = own_blocks(rows, self.block), rows.k_BKSH.shape[:2], _blocks(rows, self.block)
        phase = -jnp.arange(K) * max(1, self.stride // K) % self.stride
        far = phase[:, None] + self.stride * jnp.arange(-(-P // self.stride))
        far = jnp.broadcast_to(far[None, :, None], (B, K, own.size, far.shape[-1]))
        return Reading(beside(local(own, min(self.near, P)), far, own))


@dataclass(frozen=True)
class Chunks(Pattern):
    """Chunks of `size` blocks that see themselves, the `previous` chunks before them and the first `first` blocks: how Video-XL-2
    (Qin et al. 2025) reads groups of frames, with text in the place of frames."""

    size: int = 4
    previous: int = 3
    first: int = 1

    def check(self, cfg: Any, length: int) -> None:
        super().check(cfg, length)
        if self.size < 1 or min(self.previous, self.first) < 0:
            raise UserError(f"size={self.size} must be at least 1, previous={self.previous} and first={self.first} not negative")

    def choose(self, rows: Rows, here: Here) -> Reading:
        own, (B, K), P = own_blocks(rows, self.block), rows.k_BKSH.shape[:2], _blocks(rows, self.block)
        start = jnp.maximum((own // self.size - self.previous) * self.size, 0)
        near = start[:, None] + jnp.arange(min((self.previous + 1) * self.size, P))
        first = jnp.broadcast_to(jnp.arange(min(self.first, P)), (own.size, min(self.first, P)))
        first = jnp.where(first >= start[:, None], EMPTY, first)
        block = jnp.concatenate([first, near], axis=-1)
        return Reading(tidy(jnp.broadcast_to(block, (B, K, *block.shape)), own))


@dataclass(frozen=True)
class TopBlocks(Pattern):
    """The `top` blocks by mean query times mean key, each block of queries its own (MInference's block-sparse heads, sec. 3.2). The
    block itself is always read."""

    top: int = 4

    def check(self, cfg: Any, length: int) -> None:
        super().check(cfg, length)
        if self.top < 1:
            raise UserError(f"top={self.top} reads nothing; give at least 1")

    def choose(self, rows: Rows, here: Here) -> Reading:
        own, P = own_blocks(rows, self.block), _blocks(rows, self.block)
        score = pooled_scores(rows, self.block)
        score = jnp.where(jnp.arange(P) == own[:, None], jnp.inf, score)
        value, block = top_k(score, min(self.top, P), "BKQP")
        return Reading(tidy(jnp.where(value == -jnp.inf, EMPTY, block), own))


def pooled_scores(rows: Rows, R: int) -> jax.Array:
    """score_BKQP: mean query of each block (over its rows and the group) times mean key of each block; -inf ahead."""

    q_BQNH, _ = block_means(rows.q_BTNH, rows.ask.order_BT != EMPTY, R)
    k_BPKH, _ = block_means(rows.k_BKSH.swapaxes(1, 2), rows.order_BS != EMPTY, R)
    B, Q, N, H = q_BQNH.shape
    q_BQKH = q_BQNH.reshape(B, Q, k_BPKH.shape[2], -1, H).mean(axis=3)
    score = numbers(jnp.einsum("bqkh,bpkh->bkqp", q_BQKH, k_BPKH))
    return jnp.where(jnp.arange(score.shape[-1]) <= own_blocks(rows, R)[:, None], score, -jnp.inf)


def block_means(x_BTNH: jax.Array, there_BT: jax.Array, R: int) -> tuple[jax.Array, jax.Array]:
    """(mean_BQNH, there_BQ): each head's mean over the rows of a block that are there, and whether any is."""
    x, n = (pad_rows(y, R, 1) for y in (jnp.where(there_BT[..., None, None], x_BTNH, 0), there_BT.astype(jnp.float32)))
    n = n.reshape(n.shape[0], -1, R).sum(axis=-1)
    return x.reshape(x.shape[0], -1, R, *x.shape[2:]).sum(axis=2) / jnp.maximum(n, 1)[..., None, None], n > 0


@dataclass(frozen=True)
class VerticalSlash(Pattern):
    """Columns and diagonals that the last `last` rows look at (MInference, Jiang et al. 2024, sec. 3.2, alg. 2): the `vertical` heaviest
    rows, the first `first` among them, and the `slash` heaviest diagonals, the nearest among them.

    Diagonals are taken in bundles as wide as a block, which is what the published kernel reads of them too.
    """

    vertical: int = 128
    slash: int = 4
    last: int = 64
    first: int = 16
    whole_prompt: ClassVar[bool] = True

    def check(self, cfg: Any, length: int) -> None:
        super().check(cfg, length)
        if min(self.vertical, self.slash, self.last) < 1 or not 0 <= self.first <= self.vertical:
            raise UserError(
                f"vertical={self.vertical}, slash={self.slash} and last={self.last} must be at least 1, first={self.first} at most vertical"
            )

    def choose(self, rows: Rows, here: Here) -> Reading:
        own, (B, K, S, _), R = own_blocks(rows, self.block), rows.k_BKSH.shape, self.block
        P = _blocks(rows, R)
        p_BKWS, back_BWS = last_attention(rows, self.last, here)
        column = jnp.where(rows.order_BS[:, None] < self.first, jnp.inf, p_BKWS.sum(axis=2))
        column = jnp.where(rows.order_BS[:, None] == EMPTY, -jnp.inf, column)
        value, row = top_k(column, min(self.vertical, S), "BKS")
        _, chosen = top_k(diagonals(p_BKWS, back_BWS, R).at[..., 0].set(jnp.inf), min(self.slash, P), "BKP")
        wanted = jnp.zeros((B, K, P + 1), bool)
        wanted = jax.vmap(jax.vmap(lambda w, c: w.at[c].set(True).at[c + 1].set(True)))(wanted, chosen)[..., :P]
        M = min(2 * self.slash, P)
        yes, offset = top_k(wanted.astype(jnp.float32), M, "BKP")
        block = jnp.where((yes > 0)[:, :, None], own[:, None] - offset[:, :, None], EMPTY)
        return Reading(tidy(block, own), jnp.where(value == -jnp.inf, EMPTY, row))


def last_rows(rows: Rows, last: int) -> tuple[jax.Array, jax.Array]:
    """(q_BWNH, order_BW) of each prompt's last rows, the last one first; EMPTY where it has fewer."""
    order, at = top_k(rows.ask.order_BT, min(last, rows.q_BTNH.shape[1]), "BT")
    return jnp.take_along_axis(rows.q_BTNH, at[..., None, None], axis=1), order


def last_attention(rows: Rows, last: int, here: Here) -> tuple[jax.Array, jax.Array]:
    """(p_BKWS, back_BWS): attention of each prompt's last rows, summed over the group, and how far back each stored row lies."""
    q, order = last_rows(rows, last)
    back = jnp.where(rows.order_BS[:, None] == EMPTY, -1, order[..., None] - rows.order_BS[:, None])
    seen = ((back >= 0) & (rows.order_BS[:, None] >= here.lo(order)[..., None]) & (order != EMPTY)[..., None])[:, None, None]
    logits = scores(q, rows.k_BKSH, here.cfg.scale, here.cfg.softcap)
    seen = seen & ~jnp.isnan(logits)
    logits = jnp.where(seen, logits, NEG)
    return jnp.where(seen, jax.nn.softmax(logits, axis=-1), 0.0).sum(axis=2), back


def diagonals(p_BKWS: jax.Array, back_BWS: jax.Array, R: int) -> jax.Array:
    """sum_BKP of the attention that lies R*d to R*d + R-1 rows back, in bundle d."""
    (B, K, *_), P = p_BKWS.shape, -(-p_BKWS.shape[-1] // R)
    bundle = jnp.where(back_BWS < 0, P, back_BWS // R).reshape(B, -1)
    add = jax.vmap(jax.vmap(lambda p, s: jax.ops.segment_sum(p, s, num_segments=P), (0, None)))
    return add(p_BKWS.reshape(B, K, -1), bundle)


@dataclass(frozen=True)
class PerHead(Pattern):
    """Another pattern for each layer and kv head: `heads[layer][k]` is a place in `patterns`, all with this pattern's block."""

    patterns: tuple[Pattern, ...] = ()
    heads: tuple[tuple[int, ...], ...] = ()

    by_head: ClassVar[bool] = True

    @property
    def whole_prompt(self) -> bool:  # type: ignore[override]
        return any(p.whole_prompt for p in self.patterns)

    def check(self, cfg: Any, length: int) -> None:
        super().check(cfg, length)
        for pattern in self.patterns:
            pattern.check(cfg, length)
        if any(p.block != self.block for p in self.patterns):
            raise UserError(f"every pattern must have blocks of {self.block}; give all of them block={self.block}")
        if len(self.heads) != cfg.L or any(len(row) != cfg.K for row in self.heads):
            raise UserError(f"heads must name a pattern for each of {cfg.L} layers and {cfg.K} kv heads of this model; search again")
        if any(not 0 <= i < len(self.patterns) for row in self.heads for i in row):
            raise UserError(f"heads name patterns 0 to {len(self.patterns) - 1} only; search again")

    def role(self, layer: int) -> Any:
        return self.heads[layer]

    def choose(self, rows: Rows, here: Here) -> Reading:
        of = jnp.asarray(self.heads[here.layer])
        readings = [p.choose(rows, here) for p in self.patterns]
        block = _by_head(of, [r.block_BKQM for r in readings])
        if all(r.row_BKM is None for r in readings):
            return Reading(block)
        none = jnp.full((*block.shape[:2], 1), EMPTY, jnp.int32)
        return Reading(block, _by_head(of, [none if r.row_BKM is None else r.row_BKM for r in readings]))

    def sees(self, order_BT1, order_BK1M, here: Here):
        of, shape = jnp.asarray(self.heads[here.layer]), (*order_BK1M.shape[:2], order_BT1.shape[2], order_BK1M.shape[3])
        each = jnp.stack([jnp.broadcast_to(p.sees(order_BT1, order_BK1M, here), shape) for p in self.patterns])
        return jnp.take_along_axis(each, of[None, None, :, None, None], axis=0)[0]


def _by_head(of_K: jax.Array, each: list[jax.Array]) -> jax.Array:
    """Of several arrays (B, K, ..., M_i), padded with EMPTY to one M, the one that each head names."""
    M = max(x.shape[-1] for x in each)
    same = jnp.stack([jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, M - x.shape[-1])], constant_values=EMPTY) for x in each])
    return jnp.take_along_axis(same, of_K.reshape(1, 1, -1, *(1,) * (same.ndim - 3)), axis=0)[0]


def _blocks(rows: Rows, R: int) -> int:
    """How many blocks of stored rows there are."""
    return -(-rows.k_BKSH.shape[2] // R)
