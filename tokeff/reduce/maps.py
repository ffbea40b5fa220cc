"""Cascades whose scores need whole maps of attention, row by row and head by head. A head's map is made and used before the next one's.

At T=2048 (8 query heads over 2) a map costs .89 of the multiply-adds of the layer's own attention, and page rank over it .96; `mean_map`
holds T x T numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from tokeff.errors import UserError
from tokeff.kv.budget import Budget
from tokeff.models.attention import NEG, softmax
from tokeff.models.flow import EMPTY, Flow, Here
from tokeff.reduce.cascade import Depth, best_rows, layer_at, sound
from tokeff.reduce.pictures import PictureCascade


def map_of(q_BTNH: jax.Array, k_BTKH: jax.Array, flow: Flow, here: Here, heat: float = 1.0) -> Callable[[jax.Array], jax.Array]:
    """A function from a query head's number to its map p_BTT: softmax over the rows that each row sees, of scores divided by `heat`."""
    cfg, order = here.cfg, flow.order_BT
    q, k = (here.rotate(x, flow.angle_BT[:, :, None]) for x in (q_BTNH, k_BTKH))
    lo, hi = here.lo(order)[:, :, None], flow.hi_BT[:, :, None]
    sees = (order[:, None] >= lo) & (order[:, None] <= hi) & (order[:, None] != EMPTY) & (order[:, :, None] != EMPTY)

    def one(n: jax.Array) -> jax.Array:
        logits = jnp.einsum("bth,bsh->bts", q[:, :, n], k[:, :, n // (cfg.N // cfg.K)], preferred_element_type=jnp.float32) * cfg.scale
        logits = cfg.softcap * jnp.tanh(logits / cfg.softcap) if cfg.softcap else logits
        return softmax(logits / heat, sees)[0]

    return one


def mean_map(q_BTNH: jax.Array, k_BTKH: jax.Array, flow: Flow, here: Here) -> jax.Array:
    """p_BTT: the mean over heads."""
    one, shape = map_of(q_BTNH, k_BTKH, flow, here), (*flow.order_BT.shape, flow.order_BT.shape[1])
    return jax.lax.fori_loop(0, here.cfg.N, lambda n, p: p + one(n), jnp.zeros(shape, jnp.float32)) / here.cfg.N


def page_rank(q_BTNH: jax.Array, k_BTKH: jax.Array, flow: Flow, here: Here, heat: float, rounds: int) -> jax.Array:
    """score_BT: mass that starts evenly on all rows and moves `rounds` times along each head's map, at a temperature; the root of its mean
    square over heads (Zhong et al. 2024, sec. 3.3)."""
    one, real = map_of(q_BTNH, k_BTKH, flow, here, heat), flow.order_BT != EMPTY

    def add(n, total):
        p, mass = one(n), real / jnp.maximum(real.sum(axis=1, keepdims=True), 1)
        for _ in range(rounds):
            mass = jnp.einsum("bt,bts->bs", mass, p, precision="highest")
        return jnp.hypot(total, mass)  # the squares of small masses are none in float32

    return jax.lax.fori_loop(0, here.cfg.N, add, jnp.zeros(real.shape, jnp.float32)) * here.cfg.N**-0.5


@dataclass(frozen=True)
class PageRanked(PictureCascade):
    """AIM's schedule inside the decoder (Zhong et al. 2024): from layer `at` on every layer lets go of an eighth of a picture's rows, those
    of the least page rank, until none is left; positions kept.

    Page rank walks `rounds` times along softmax(scores / heat), d = 0. Released for 28 layers: 14 to 21. AIM's merging before the decoder
    is another step (`tokeff.reduce.merge`).
    """

    at: tuple[Depth, ...] = (0.5,)
    keep: tuple[Budget, ...] = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0)
    heat: float = 0.1
    rounds: int = 5
    empties: ClassVar[bool] = True

    def layers(self, cfg) -> tuple[int, ...]:
        first = layer_at(self.at[0], cfg.L)
        return tuple(range(first, first + len(self.keep)))

    def score(self, q_BTNH, k_BTKH, flow, here):
        return page_rank(q_BTNH, k_BTKH, flow, here, self.heat, self.rounds)


@dataclass(frozen=True)
class DualFilter(PictureCascade):
    """MustDrop's dual-attention filter inside the decoder (Liu et al. 2024): a picture's row stays where the instruction as a whole looks
    at it, or one of its rows does; positions kept.

    A row goes where its attention from the rows behind the last picture (the mean over heads), summed over them, is below `total` of that
    sum over all picture rows, and from none of them reaches `single`. How many stay is the picture's own; `keep` bounds it, by the sum.
    At the default `keep` rows are masked and nothing is saved: arrays keep their size; a smaller bound makes them smaller.
    Defaults: the thresholds released for about 192 of 576 rows; 32 layers filter at 2, 6, 10 and 14. The tower's protected key set and the
    cache that is filtered after the prompt are not part of it.
    """

    at: tuple[Depth, ...] = (2 / 32, 6 / 32, 10 / 32, 14 / 32)
    keep: tuple[Budget, ...] = (1.0, 1.0, 1.0, 1.0)
    total: float = 0.001
    single: float = 0.001

    def check(self, cfg, length: int) -> None:
        super().check(cfg, length)
        if self.total < 0 or self.single < 0:
            raise UserError(f"thresholds total={self.total}, single={self.single} are attention; give numbers from 0")

    def choose(self, q_BTNH, k_BTKH, flow, here):
        good, q, k = sound(flow, q_BTNH, k_BTKH)
        seen, real = self.pictured(good), flow.order_BT != EMPTY
        looks = jnp.where(self.asking(good)[:, :, None] & seen[:, None], mean_map(q, k, good, here), 0)
        mass = looks.sum(axis=1)
        faint = (mass < self.total * mass.sum(axis=1, keepdims=True)) & (looks.max(axis=1) < self.single)
        stays, text = seen & ~faint, real & ~self.pictured(flow)
        keep_B = text.sum(axis=1) + jnp.minimum(self.kept(flow, here), stays.sum(axis=1))
        score = jnp.where(stays, mass, NEG)
        return best_rows(score, text, real, keep_B, self.most(self.stage(here), real.shape[1]))
