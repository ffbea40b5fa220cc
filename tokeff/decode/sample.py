"""Sampling: warpers in one order for everybody, and noise that depends only on (seed, row, position).

A token is the arg-max of warped log-probabilities plus Gumbel noise of its (row, position). So a sequence is a function of its seed
and row alone: not of batch mates, padding, chunk size, or how many tokens one pass commits. Speculative decoding then needs no rule
of its own for sampling: a draft is right when it equals the token that plain sampling draws at that place.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from tokeff.errors import UserError
from tokeff.sharding import top_k


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; a tuple gives one per row. top_k 0, top_p 1, min_p 0 are off. Applied in that order."""

    temperature: float | tuple[float, ...] = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def check(self, rows: int) -> None:
        given = self.temperature if isinstance(self.temperature, tuple) else (self.temperature,)
        if bad := [t for t in given if not 0 <= t < float("inf")]:
            raise UserError(f"temperature {bad[0]} is not a number from 0 on; use 0 for greedy decoding")
        if isinstance(self.temperature, tuple) and len(self.temperature) != rows:
            raise UserError(f"{len(self.temperature)} temperatures for {rows} prompts; give one number or one per prompt")
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise UserError("top_k must be >= 0, top_p in (0, 1], min_p in [0, 1]")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or (isinstance(self.temperature, tuple) and max(self.temperature) == 0)


GREEDY = Sampling()


def warp(logits_BWV: jax.Array, how: Sampling) -> jax.Array:
    """Log-probabilities after temperature, top-k, top-p, min-p; -inf where cut. Greedy rows keep their arg-max only.

    Cuts compare logits, not probabilities: XLA may compute those twice, with other rounding, and would lose the token at the threshold.
    """
    t = jnp.asarray(how.temperature, jnp.float32).reshape(-1, 1, 1)
    warm = jnp.where(t > 0, t, 1.0)
    x, V = logits_BWV, logits_BWV.shape[-1]
    if how.top_k and how.top_k < V:
        x = jnp.where(x < top_k(x, how.top_k, "BWV")[0][..., -1:], -jnp.inf, x)
    if how.top_p < 1:
        sorted_x = jnp.sort(x, axis=-1)[..., ::-1]
        p = jax.nn.softmax(sorted_x / warm)
        inside = jnp.cumsum(p, axis=-1) - p < how.top_p  # the token that crosses the threshold stays
        x = jnp.where(x < jnp.min(jnp.where(inside, sorted_x, jnp.inf), axis=-1, keepdims=True), -jnp.inf, x)
    if how.min_p:
        x = jnp.where((x - x.max(axis=-1, keepdims=True)) / warm < jnp.log(how.min_p), -jnp.inf, x)
    one = jnp.where(logits_BWV == logits_BWV.max(axis=-1, keepdims=True), 0.0, -jnp.inf)
    return jnp.where(t > 0, jax.nn.log_softmax(x / warm), one)


def log_law(logits_BWV: jax.Array, how: Sampling) -> jax.Array:
    """The warped log-law that a token is drawn from: `warp`, with a greedy row's on the first of equals alone."""
    x = warp(logits_BWV, how)
    at = jax.lax.broadcasted_iota(jnp.int32, x.shape, 2)
    first = jnp.where(at == first_max(logits_BWV)[..., None], 0.0, -jnp.inf)
    return jnp.where(jnp.asarray(how.temperature).reshape(-1, 1, 1) > 0, x, first)


def row_keys(seed: int | jax.Array, row_B: jax.Array) -> jax.Array:
    """One key per row: fold the row's own number into the seed."""
    return jax.vmap(lambda r: jax.random.fold_in(jax.random.key(seed), r))(row_B)


def draw(logits_BWV: jax.Array, position_BW: jax.Array, key_B: jax.Array, how: Sampling) -> jax.Array:
    """token_BW for the places `position` (order of the token drawn). Nodes at one place share their noise: only one of them is
    on the true path, and it must draw what plain decoding draws."""
    return first_max(noised(logits_BWV, position_BW, key_B, how))


def noised(logits_BWV: jax.Array, position_BW: jax.Array, key_B: jax.Array, how: Sampling) -> jax.Array:
    """What `draw` takes the arg-max of: the logits of greedy rows, elsewhere warped log-probabilities plus the noise of (row, place). A
    draft that may guess several times takes its best ones."""
    if how.greedy:
        return logits_BWV
    x = warp(logits_BWV, how)
    V = x.shape[-1]
    noise = jax.vmap(lambda key, at: jax.vmap(lambda p: jax.random.gumbel(jax.random.fold_in(key, p), (V,)))(at))
    t = jnp.asarray(how.temperature, jnp.float32).reshape(-1, 1, 1)
    return jnp.where(t > 0, x + noise(key_B, position_BW), logits_BWV)  # a greedy row takes the first of equals, as alone


# What noise is for, beside `draw`. These numbers are above every place, so that no two uses share a key.
DRAFT, COIN, REST = (2**31 + use for use in range(3))


def keys_for(use: int, key_B: jax.Array, *number_BW: jax.Array) -> jax.Array:
    """key_BW of (row, use, numbers): the first number is a place."""
    fold = functools.partial(functools.reduce, jax.random.fold_in)
    one = jax.vmap(lambda key, *numbers: fold(numbers, key), (None, *(0 for _ in number_BW)))
    return jax.vmap(lambda key, *numbers: one(fold((use,), key), *numbers))(key_B, *number_BW)


def draw_draft(
    logits_BTV: jax.Array, place_BT: jax.Array, key_B: jax.Array, how: Sampling, copy: int | jax.Array = 0, coupled: bool = False
) -> tuple[jax.Array, jax.Array]:
    """(token_BT, logq_BTV): a drafter's own draws for the places `place` (order of the token drawn), and the warped log-law that each
    came from, which `Draft.logq_BWV` keeps at the node of that token.

    copy: which of several draws at one place, a number or an array like `place`. Nodes of one place that may stand for the same text need
    copies of their own: each of k chains, each sibling. The noise is a function of (key, place, copy), apart from the target's. With
    `coupled` it is the target's own (`draw`) and copies agree: under `Coupled` a draft from law q is then right with probability
    sum_x 1 / sum_y max(p_y / p_x, q_y / q_x), between (1 - TV) / (1 + TV) and 1 - TV (Daliri, Musco and Suresh 2024).

    Places behind a refused draft are drawn again in the next pass, with the same noise. A drafter whose state has seen its own draws there
    folds the pass into `key_B` first, lest its law and its noise depend on each other.
    """
    x, t = log_law(logits_BTV, how), jnp.asarray(how.temperature).reshape(-1, 1, 1)
    if coupled or how.greedy:
        return draw(logits_BTV, place_BT, key_B, how), x
    keys = keys_for(DRAFT, key_B, place_BT, jnp.broadcast_to(jnp.asarray(copy), place_BT.shape))
    noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, x.shape[-1:])))(keys)
    return first_max(x + jnp.where(t > 0, noise, 0.0)), x


def first_max(x_BWV: jax.Array) -> jax.Array:
    """arg-max over the last axis, the first of equals. XLA:CPU's own argmax is a scalar loop, two to four times slower."""
    at = jax.lax.broadcasted_iota(jnp.int32, x_BWV.shape, x_BWV.ndim - 1)
    V = x_BWV.shape[-1]
    top = jnp.where(x_BWV == x_BWV.max(axis=-1, keepdims=True), at, V).min(axis=-1)
    return jnp.minimum(top, V - 1)  # V only where a logit is NaN
