"""Passes that choose several times on the way up: which rows go on, ever fewer of them, and the scores they are ranked by.

A `Cascade` has stages: the layers where it chooses, and how many rows are left above each. Scores are functions of one layer's queries
and keys (`looked_at`), or gather over layers in `Flow.score_BT`. `tokeff.reduce.pictures` has the cascades that let go of image rows alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from tokeff.errors import UserError
from tokeff.kernels import column_mass
from tokeff.kv.budget import Budget, check_budget, most_rows, rows_of
from tokeff.models.attention import NEG, flash
from tokeff.models.flow import EMPTY, Flow, Here
from tokeff.models.transformer import Pass
from tokeff.sharding import top_k

Depth = int | float
"""A layer: its number, or a share of the model's layers, rounded down."""


def layer_at(at: Depth, L: int) -> int:
    """The layer's number in a model of L layers."""
    return int(at * L + 1e-9) if isinstance(at, float) else at


def sound(flow: Flow, *rows: jax.Array) -> tuple[Flow, *tuple[jax.Array, ...]]:
    """The flow and arrays of its rows as if rows that are no numbers in any of them were not there: order EMPTY and 0 instead, so that they
    are no keys and no queries, and have no part in a softmax or a sum."""
    fine = flow.order_BT != EMPTY
    for a in (flow.x_BTD, *rows):
        fine &= jnp.isfinite(a).reshape(*fine.shape, -1).all(axis=2)
    fine = fine if flow.score_BT is None else fine & ~jnp.isnan(flow.score_BT)

    def clean(a):
        return jnp.where(fine.reshape(fine.shape + (1,) * (a.ndim - 2)), a, 0)

    order, hi, ids = (None if a is None else jnp.where(fine, a, EMPTY) for a in (flow.order_BT, flow.hi_BT, flow.id_BT))
    score = None if flow.score_BT is None else clean(flow.score_BT)
    return flow.replace(x_BTD=clean(flow.x_BTD), order_BT=order, hi_BT=hi, id_BT=ids, score_BT=score), *map(clean, rows)


def looked_at(
    q_BTNH: jax.Array, k_BTKH: jax.Array, flow: Flow, here: Here, weight_BT: jax.Array | None = None, last: int | None = None
) -> jax.Array:
    """score_BT: the attention that each row receives in this layer, softmaxed over all rows that a query sees, the mean over heads and the
    sum over queries, each by its weight (1). last: only the last so many rows ask. NaN for a row that is no number, or none at all.

    The layer's attention is computed once more for the sums over what a query sees, and its scores a second time: with all rows asking
    1.9 times the multiply-adds of the layer's own attention at T=2048 (8 query heads over 2), with the last 64 .08, with one .001.
    """
    flow, q, k = sound(flow, q_BTNH, k_BTKH)
    order, lo, hi = flow.order_BT, here.lo(flow.order_BT), flow.hi_BT
    q, k = (here.rotate(x, flow.angle_BT[:, :, None]) for x in (q, k))
    weight, first = jnp.where(order == EMPTY, 0.0, 1.0 if weight_BT is None else weight_BT), 0
    if last is not None and last < order.shape[1]:
        _, at = top_k(order, last, "BT")
        q = jnp.take_along_axis(q, at[:, :, None, None], axis=1)
        lo, hi, weight = (jnp.take_along_axis(x, at, axis=1) for x in (lo, hi, weight))
        first = None
    k, cfg = k.swapaxes(1, 2), here.cfg
    stored = jnp.broadcast_to(order[:, None], k.shape[:3])
    window = None if first is None else here.window
    _, lse = flash(q, k, k, lo, hi, stored, scale=cfg.scale, softcap=cfg.softcap, first=first, window=window)
    mass = column_mass(q, k, lse, stored, lo, hi, weight, scale=cfg.scale, softcap=cfg.softcap)
    return jnp.where(order == EMPTY, jnp.nan, mass.sum(axis=1) / cfg.N)


def best_rows(score_BT: jax.Array, sure_BT: jax.Array, real_BT: jax.Array, keep_B: jax.Array, M: int) -> jax.Array:
    """index_BM of `keep` rows: the sure ones, then those with the highest score, earlier ones first among equals and NaN last; ascending,
    EMPTY past their number."""
    T = score_BT.shape[1]
    score = jnp.where(sure_BT, jnp.inf, jnp.where(jnp.isnan(score_BT), NEG, jnp.maximum(score_BT, NEG)))
    value, index = top_k(jnp.where(real_BT, score, -jnp.inf), min(M, T), "BT")
    there = (jnp.arange(min(M, T))[None] < keep_B[:, None]) & (value > -jnp.inf)
    index = jnp.sort(jnp.where(there, index, T), axis=1)
    return jnp.where(index == T, EMPTY, index)


def last_of(order_BT: jax.Array) -> jax.Array:
    """Which row is each sequence's last."""
    return (order_BT == order_BT.max(axis=1, keepdims=True)) & (order_BT != EMPTY)


def check_seen(name: str, layers: tuple[int, ...], cfg, length: int) -> None:
    """Refuse to rank a prompt by layers whose sliding window does not reach its first rows: these would all have 0."""
    sees = [i for i, window in enumerate(cfg.windows) if window is None or window >= length]
    for i in layers:
        if i in sees:
            continue
        near = f"the nearest layer that sees all is {min(sees, key=lambda j: abs(j - i))}, rank there" if sees else "no layer sees all"
        raise UserError(f"{name} ranks {length} rows by layer {i}, whose window is {cfg.windows[i]}; {near}")


@dataclass(frozen=True)
class Cascade(Pass):
    """Base class of passes with stages.

    at: the layers where rows are chosen, as numbers or shares of the depth. keep: how much is left above each, as shares of the rows that
    entered, or as numbers of rows; never growing.
    """

    at: tuple[Depth, ...]
    keep: tuple[Budget, ...]

    whole_prompt: ClassVar[bool] = True  # ranks all rows against each other, so the prompt cannot come in chunks

    def __post_init__(self):
        name = type(self).__name__
        for field, given in (("at", self.at), ("keep", self.keep)):
            if not isinstance(given, tuple):
                raise UserError(f"{name} has stages: {field}={given!r} is no tuple; give for example {field}=({given!r},)")
        for at in self.at:
            if isinstance(at, bool) or not isinstance(at, (int, float)):
                raise UserError(f"{name} cannot choose at {at!r}; give a layer's number, or a share of the depth as a float")

    @property
    def budget(self) -> Budget:
        """What is left in the end."""
        return self.keep[-1]

    def layers(self, cfg) -> tuple[int, ...]:
        return tuple(layer_at(a, cfg.L) for a in self.at)

    def looks(self, cfg) -> tuple[int, ...]:
        """The layers whose attention ranks rows at its stages."""
        return self.layers(cfg)

    def check_layers(self, cfg) -> None:
        name, layers = type(self).__name__, self.layers(cfg)
        if not layers or len(layers) != len(self.keep):
            raise UserError(f"{name} has {len(layers)} layers and {len(self.keep)} budgets; give one budget for each layer of at")
        if layers != tuple(sorted(set(layers))) or not 0 <= layers[0] <= layers[-1] < cfg.L:
            raise UserError(f"{name} cannot choose at layers {layers} of {cfg.L}; give ascending ones from 0 to {cfg.L - 1}")
        for budget in self.keep:
            self.check_stage(budget, cfg.max_len)

    def check(self, cfg, length: int) -> None:
        self.check_layers(cfg)
        name = type(self).__name__
        check_seen(name, self.looks(cfg), cfg, length)
        for budget in self.keep:
            self.check_stage(budget, length)
        left = [most_rows(budget, length) if budget else 0 for budget in self.keep]
        if left != sorted(left, reverse=True):
            raise UserError(f"{name} keeps {left} of {length} rows at its stages; give budgets that do not grow")

    def check_stage(self, budget: Budget, length: int) -> None:
        """Raise UserError for what a stage cannot leave."""
        check_budget(budget, length)

    def rows(self, length: int) -> int:
        return most_rows(self.keep[-1], length)

    def stage(self, here: Here) -> int:
        """Which of its stages this layer is."""
        return self.layers(here.cfg).index(here.layer)

    def most(self, stage: int, T: int) -> int:
        """The static number of rows that a stage can leave of T. The shares of both stages are of what entered, so what is left of T is at
        most their ratio."""
        now, before = self.keep[stage], self.keep[stage - 1] if stage else 1.0
        if isinstance(now, float):
            return most_rows(min(now / before, 1.0), T) if isinstance(before, float) else T
        return most_rows(now, T)

    def sure(self, flow: Flow, here: Here) -> jax.Array:
        """Which rows always go on: the last one."""
        return last_of(flow.order_BT)

    def score(self, q_BTNH: jax.Array, k_BTKH: jax.Array, flow: Flow, here: Here) -> jax.Array:
        """score_BT of rows at a stage; higher goes on. Rows that are no numbers are out of the flow by then (`sound`)."""
        raise NotImplementedError

    def ranked(self, q_BTNH: jax.Array, k_BTKH: jax.Array, flow: Flow, here: Here) -> jax.Array:
        """`score`, with NaN for rows that are no numbers: they go first."""
        good, q, k = sound(flow, q_BTNH, k_BTKH)
        return jnp.where(good.order_BT == EMPTY, jnp.nan, self.score(q, k, good, here))

    def choose(self, q_BTNH: jax.Array, k_BTKH: jax.Array, flow: Flow, here: Here) -> jax.Array:
        stage, real = self.stage(here), flow.order_BT != EMPTY
        keep_B = rows_of(self.keep[stage], real.sum(axis=1) if flow.whole_B is None else flow.whole_B)
        score = self.ranked(q_BTNH, k_BTKH, flow, here)
        return best_rows(score, self.sure(flow, here), real, keep_B, self.most(stage, real.shape[1]))

    def take(self, flow: Flow, index_BM: jax.Array, here: Here) -> Flow:
        whole_B = (flow.order_BT != EMPTY).sum(axis=1) if flow.whole_B is None else flow.whole_B
        return flow.replace(whole_B=whole_B).take(index_BM)


@dataclass(frozen=True)
class LastRowCascade(Cascade):
    """At each stage the rows go on that the prompt's last row looks at most: its attention probabilities, the mean over heads.

    LazyLLM's rule for the prompt (Fu et al. 2024, sec. 3.2 and eq. 1), positions kept. `tokeff.decode.revive` has its revival.
    """

    def score(self, q_BTNH, k_BTKH, flow, here):
        return looked_at(q_BTNH, k_BTKH, flow, here, last=1)


@dataclass(frozen=True)
class MassCascade(Cascade):
    """At each stage the rows go on that drew most attention so far: probabilities summed over all queries, heads and the layers below and
    at the stage.

    SpAtten's cascade token pruning (Wang et al. 2021, sec. III-A, alg. 2). The sums take another 1.9 times the attention of every layer up
    to the last stage (`looked_at`); a layer above it costs nothing more.
    """

    def role(self, layer: int, cfg):
        stages = self.layers(cfg)
        return layer if layer in stages else "counts" if layer < stages[-1] else None

    def note(self, q_BTNH, k_BTKH, flow, here):
        if here.layer > self.layers(here.cfg)[-1]:
            return flow
        mass = looked_at(q_BTNH, k_BTKH, flow, here) * here.cfg.N  # a sum over heads, of which layers may have fewer
        return flow.replace(score_BT=mass if flow.score_BT is None else flow.score_BT + mass)

    def score(self, q_BTNH, k_BTKH, flow, here):
        return self.note(q_BTNH, k_BTKH, flow, here).score_BT if flow.score_BT is None else flow.score_BT
