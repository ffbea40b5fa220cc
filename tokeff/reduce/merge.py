"""Rows of an encoder that become one: token merging by bipartite soft matching (Bolya et al. 2023, ToMe).

For encoders, whose rows all see each other: audio frames, image patches. Between the attention and the feed-forward of a layer r rows
join rows that are like them, in three steps on plain arrays: `bipartite_match`, a kernel, scores, `match` decides, `join` takes means.

x_BSD: rows. metric_BSH: what likeness is measured on, the mean of a row's keys over heads in the paper. size_BS (float32): how many
rows of the input each row stands for, 1 at first. source_BS: for every row of the input of a step, the row of its output that holds it
now, or EMPTY where none does; so `x_out[source]` puts rows back in their places, and sources of steps compose (`trace`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.errors import UserError
from tokeff.kernels import bipartite_match
from tokeff.models.flow import EMPTY


class Reducer(Protocol):
    """A choice that takes r of S rows away at each layer of an encoder: `ToMe` below, the baselines in `tokeff.reduce.baselines`."""

    def reduce(
        self, x_BSD: jax.Array, metric_BSH: jax.Array, size_BS: jax.Array, r: int, protected: int, layer: int, /
    ) -> tuple[jax.Array, jax.Array, jax.Array]: ...


def whole(S: int, B: int) -> tuple[jax.Array, jax.Array]:
    """(size_BS, source_BS) of rows that nothing was done to yet."""
    return jnp.ones((B, S), jnp.float32), jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))


def log_size(size_BS: jax.Array) -> jax.Array:
    """bias_BS to add to the logits of each row as a key, so that it draws the attention of all it stands for (ToMe, eq. 1)."""
    return jnp.log(size_BS)


def trace(before_BS: jax.Array, step_BM: jax.Array) -> jax.Array:
    """source_BS over two steps: where the rows that entered the first are after the second. A row that is gone stays gone."""
    after = jnp.take_along_axis(step_BM, jnp.maximum(before_BS, 0), axis=1)
    return jnp.where(before_BS == EMPTY, EMPTY, after)


def match(closest_BA: jax.Array, partner_BA: jax.Array, S: int, r: int, protected: int = 0, ordered: bool = False) -> jax.Array:
    """source_BS: the r even rows with the closest partners join these; all others stay (ToMe, sec. 3, steps 1 to 5).

    Of equal candidates the earlier one counts. What stays stands as [protected, rest of A, rest of B], as in the released code, which
    leaves the rest of A in the order of its cosines where there is no class token; here it always keeps its own. ordered: rows stay in
    the order of the sequence, so that the next step again compares neighbours.
    """
    B, A = closest_BA.shape
    E = S - A
    _, joins_BR = jax.lax.top_k(closest_BA, r)
    gone_BA = jax.vmap(lambda at: jnp.zeros(A, bool).at[at].set(True))(joins_BR)
    stays_BS = _interleave(~gone_BA, jnp.ones((B, E), bool))
    row = np.arange(A + E)
    line = row if ordered else np.lexsort((row, np.where(row < protected, -1, row % 2)))  # the rows, in the order in which they will stand
    place_BS = (jnp.cumsum(stays_BS[:, line], axis=1) - 1)[:, np.argsort(line)]
    joined_BA = jnp.take_along_axis(place_BS[:, 1::2], partner_BA, axis=1)
    return _interleave(jnp.where(gone_BA, joined_BA, place_BS[:, ::2]), place_BS[:, 1::2]).astype(jnp.int32)


def _interleave(even_BA: jax.Array, odd_BE: jax.Array) -> jax.Array:
    """Even and odd rows of a sequence as one."""
    B, A = even_BA.shape
    S = A + odd_BE.shape[1]
    return jnp.zeros((B, S), even_BA.dtype).at[:, ::2].set(even_BA).at[:, 1::2].set(odd_BE)


def join(x_BSD: jax.Array, size_BS: jax.Array, source_BS: jax.Array, M: int) -> tuple[jax.Array, jax.Array]:
    """(x_BMD, size_BM): each output row is the mean of its rows, weighted by their sizes; sizes add up. In float32, x in its own dtype.
    Rows whose source is EMPTY have no part."""

    def total(x, source):
        return jnp.zeros((M, *x.shape[1:]), jnp.float32).at[jnp.where(source == EMPTY, M, source)].add(x, mode="drop")

    size_BM = jax.vmap(total)(size_BS, source_BS)
    weighted = jax.vmap(total)(x_BSD.astype(jnp.float32) * size_BS[..., None], source_BS)
    return (weighted / size_BM[..., None]).astype(x_BSD.dtype), size_BM


def check_rows(S: int, r: int, protected: int) -> None:
    """UserError unless r rows can go and one is left beside the protected ones."""
    if protected < 0 or not 0 <= r <= max(S - protected - 1, 0):
        raise UserError(f"{r} of {S} rows cannot be taken away with {protected} protected; give 0 to {max(S - protected - 1, 0)}")


def merge(
    x_BSD: jax.Array, metric_BSH: jax.Array, size_BS: jax.Array, r: int, protected: int = 0, ordered: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(x_BMD, size_BM, source_BS) with r rows fewer. The first `protected` rows (a class token) neither join nor are joined.

    A round halves the rows at most; where r is more it takes several, with the metric merged as the rows are. The paper stops at half.
    Raises UserError for an r that leaves nothing.
    """
    S = x_BSD.shape[1]
    check_rows(S, r, protected)
    _, source_BS = whole(S, x_BSD.shape[0])
    while r:
        now = min(r, (S - protected) // 2)
        step = match(*bipartite_match(metric_BSH, protected=protected), S, now, protected, ordered)
        S, r = S - now, r - now
        if r:
            metric_BSH, _ = join(metric_BSH, size_BS, step, S)
        x_BSD, size_BS = join(x_BSD, size_BS, step, S)
        source_BS = trace(source_BS, step)
    return x_BSD, size_BS, source_BS


@dataclass(frozen=True)
class ToMe:
    """`merge` as a choice. ordered: see `match`."""

    ordered: bool = False

    def reduce(self, x_BSD: jax.Array, metric_BSH: jax.Array, size_BS: jax.Array, r: int, protected: int = 0, layer: int = 0):
        """(x_BMD, size_BM, source_BS) with r rows fewer."""
        return merge(x_BSD, metric_BSH, size_BS, r, protected, self.ordered)


def schedule(S: int, layers: int, r: int | tuple[int, ...], protected: int = 0) -> tuple[int, ...]:
    """How many rows each layer takes away: r everywhere or one number a layer, each cut off where a layer would lose more than half of
    what may merge (ToMe, sec. 3). Raises UserError for numbers that do not fit the layers."""
    wanted = (r,) * layers if isinstance(r, int) else r
    if len(wanted) != layers or min(wanted, default=0) < 0:
        raise UserError(f"r={r} does not fit {layers} layers; give one number, or one a layer, of at least 0")
    taken = []
    for n in wanted:
        taken.append(min(n, max(S - protected, 0) // 2))
        S -= taken[-1]
    return tuple(taken)


def to_share(S: int, layers: int, share: float, protected: int = 0, at_once: bool = False) -> tuple[int, ...]:
    """How many rows each layer takes away so that layers hold share * S rows in the mean, counted behind their own merge: each layer goes
    on with the same share of what entered it. at_once: the first layer takes all. Raises UserError for a share outside (0, 1]."""
    if not 0 < share <= 1:
        raise UserError(f"share {share} is not a share of the rows; give a fraction in (0, 1]")
    if at_once:
        return (S - max(round(share * S), protected + 1), *(0,) * (layers - 1))
    low, high = 0.0, 1.0
    for _ in range(50):
        q = (low + high) / 2
        low, high = (q, high) if sum(q**i for i in range(1, layers + 1)) < share * layers else (low, q)
    counts = [S] + [max(round(S * high**i), protected + 1) for i in range(1, layers + 1)]
    return tuple(before - after for before, after in zip(counts, counts[1:]))
