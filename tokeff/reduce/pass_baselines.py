"""What a pass that chooses rows by attention has to beat: rows at random, and means over neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from tokeff.kv.budget import Budget, rows_of
from tokeff.models.flow import EMPTY, Flow, Here
from tokeff.reduce.cascade import Cascade, Depth


@dataclass(frozen=True)
class RandomRows(Cascade):
    """Baseline: rows at random, and the last one. What is drawn depends on the seed and a row's place alone, so what a stage leaves are
    rows that the stage below left, and texts of one length keep the same places."""

    seed: int = 0
    writes: ClassVar[bool] = False

    def looks(self, cfg) -> tuple[int, ...]:
        return ()

    def score(self, q_BTNH: jax.Array, k_BTKH: jax.Array, flow: Flow, here: Here) -> jax.Array:
        key = jax.random.key(self.seed)
        return jax.vmap(jax.vmap(lambda place: jax.random.uniform(jax.random.fold_in(key, place))))(flow.order_BT)


@dataclass(frozen=True)
class PooledRows(Cascade):
    """Baseline: the rows cut into pieces of nearly equal length, each the mean of its vectors as they enter the layer, at the place of its
    last row. One stage. The prompt's last row ends the last piece."""

    at: tuple[Depth, ...] = (0,)
    keep: tuple[Budget, ...] = (0.125,)
    writes: ClassVar[bool] = False

    def looks(self, cfg) -> tuple[int, ...]:
        return ()

    def piece(self, flow: Flow) -> tuple[jax.Array, jax.Array]:
        """(piece_BT of each row, EMPTY for padding; how many pieces a sequence has)."""
        n_B = (flow.order_BT != EMPTY).sum(axis=1)
        keep_B = rows_of(self.keep[0], n_B)
        t = jnp.arange(flow.order_BT.shape[1])[None]
        return jnp.where(flow.order_BT == EMPTY, EMPTY, t * keep_B[:, None] // n_B[:, None]), keep_B

    def choose(self, q_BTNH, k_BTKH, flow, here):
        _, keep_B = self.piece(flow)
        n_B, M = (flow.order_BT != EMPTY).sum(axis=1), self.most(0, flow.order_BT.shape[1])
        m = jnp.arange(M)[None]
        end = -(-(m + 1) * n_B[:, None] // keep_B[:, None]) - 1  # the last t of which t * keep // n is m
        return jnp.where(m < keep_B[:, None], end, EMPTY).astype(jnp.int32)

    def take(self, flow, index_BM, here):
        piece_BT, _ = self.piece(flow)

        def mean(x_TD, piece_T):
            at = jnp.where(piece_T == EMPTY, len(piece_T), piece_T)
            total = jnp.zeros(x_TD.shape, jnp.float32).at[at].add(x_TD.astype(jnp.float32), mode="drop")
            count = jnp.zeros(len(piece_T), jnp.float32).at[at].add(1.0, mode="drop")
            return (total / jnp.maximum(count, 1.0)[:, None])[jnp.maximum(piece_T, 0)]

        mixed = jax.vmap(mean)(flow.x_BTD, piece_BT).astype(flow.x_BTD.dtype)
        return super().take(flow.replace(x_BTD=mixed), index_BM, here)
