"""Seam 4: which rows go on. A pass scores a prompt's rows at one layer and lets only the best through.

`layer`: at this layer every row still writes its key and value, and only the chosen rows ask and go on. `restart`: instead of going
on, the whole model runs again on the chosen tokens, renumbered from 0 (GemFilter).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from tokeff.errors import UserError
from tokeff.kv.budget import Budget, check_budget, most_rows, rows_of
from tokeff.models.attention import NEG, scores
from tokeff.models.flow import EMPTY, Flow, Here
from tokeff.models.transformer import Pass
from tokeff.sharding import top_k


def last_scores(q_BTNH: jax.Array, k_BTKH: jax.Array, flow: Flow, here: Here) -> jax.Array:
    """score_BT: raw q.k of each sequence's last row against every row, summed over heads; no softmax."""
    at = jnp.argmax(flow.order_BT, axis=1)[:, None]
    q = here.rotate(q_BTNH, flow.angle_BT[:, :, None])
    q = jnp.take_along_axis(q, at[:, :, None, None], axis=1)
    k = here.rotate(k_BTKH, flow.angle_BT[:, :, None]).swapaxes(1, 2)
    return scores(q, k, here.cfg.scale, here.cfg.softcap).sum(axis=(1, 2))[:, 0]


def smooth(score_BT: jax.Array, real_BT: jax.Array, kernel: int) -> jax.Array:
    """Average over neighbours that exist. Dividing by the kernel instead would pull raw logits at the borders towards zero,
    which is not neutral for them (a defect of both published codes)."""
    if kernel == 1:
        return score_BT
    ones = jnp.ones(kernel)

    def total(x):
        return jax.vmap(lambda row: jnp.convolve(row, ones, mode="same", precision="highest"))(x)

    real = real_BT.astype(jnp.float32)
    return total(jnp.where(real_BT, score_BT, 0.0)) / jnp.maximum(total(real), 1.0)


@dataclass(frozen=True)
class LastRowTopK(Pass):
    """Keep the rows that the prompt's last row looks at most at `layer` (and the last row itself).

    GemFilter (Shi et al. 2024): restart=True; PromptDistill (Jin et al. 2025): restart=False, original positions kept. Both average
    the scores over 5 neighbours. Sum and mean over heads rank alike, so one score serves both.
    """

    layer: int
    budget: Budget
    restart: bool = False
    kernel: int = 5

    whole_prompt: ClassVar[bool] = True  # ranks all rows against each other, so the prompt cannot come in chunks

    def layers(self, cfg) -> tuple[int, ...]:
        return (self.layer,)

    def check_layers(self, cfg) -> None:
        super().check_layers(cfg)
        check_budget(self.budget, cfg.max_len)

    def check(self, cfg, length: int) -> None:
        check_budget(self.budget, length)
        if not 0 <= self.layer < cfg.L:
            raise UserError(f"layer {self.layer} is outside the model; give 0 to {cfg.L - 1}")

    def rows(self, length: int) -> int:
        return most_rows(self.budget, length)

    def choose(self, q_BTNH: jax.Array, k_BTKH: jax.Array, flow: Flow, here: Here) -> jax.Array:
        """index_BM of the rows that go on, ascending, EMPTY past their number."""
        real = flow.order_BT != EMPTY
        n_B = real.sum(axis=1)
        score = last_scores(q_BTNH, k_BTKH, flow, here)
        number = real & ~jnp.isnan(score)
        last = flow.order_BT == flow.order_BT.max(axis=1, keepdims=True)
        score = jnp.where(last, jnp.inf, jnp.where(number, smooth(score, number, self.kernel), NEG))
        T = score.shape[1]
        M = most_rows(self.budget, T)
        _, index = top_k(score, M, "BT")
        keep = jnp.arange(M)[None] < rows_of(self.budget, n_B)[:, None]
        index = jnp.sort(jnp.where(keep, index, T), axis=1)
        return jnp.where(index == T, EMPTY, index)


@dataclass(frozen=True)
class LastRows(Pass):
    """The end of the prompt and nothing else, read as a prompt of its own: what a user does who cuts the text off."""

    budget: Budget

    restart: ClassVar[bool] = True
    whole_prompt: ClassVar[bool] = True

    def layers(self, cfg) -> tuple[int, ...]:
        return (0,)

    def check_layers(self, cfg) -> None:
        check_budget(self.budget, cfg.max_len)

    def check(self, cfg, length: int) -> None:
        check_budget(self.budget, length)

    def rows(self, length: int) -> int:
        return most_rows(self.budget, length)

    def choose(self, q_BTNH: jax.Array, k_BTKH: jax.Array, flow: Flow, here: Here) -> jax.Array:
        """index_BM of the last rows, ascending, EMPTY past their number."""
        n_B = (flow.order_BT != EMPTY).sum(axis=1)
        keep_B = rows_of(self.budget, n_B)
        at = jnp.arange(most_rows(self.budget, flow.order_BT.shape[1]))[None]
        return jnp.where(at < keep_B[:, None], (n_B - keep_B)[:, None] + at, EMPTY)
