"""What choosing patches by attention or likeness has to beat: patches at random, and means over cells of the picture."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.errors import UserError
from tokeff.models.vit import Seen
from tokeff.models.vit_config import ViTConfig
from tokeff.reduce.visual import Chosen, Picked, Reduced, patches


@dataclass(frozen=True)
class RandomPatches(Chosen):
    """Baseline: patches at random, the same ones of every picture. The draw depends on the seed alone."""

    seed: int = 0

    def choose(self, x_BSD: jax.Array, seen: Seen, cfg: ViTConfig) -> jax.Array:
        index_M = jnp.sort(jax.random.permutation(jax.random.key(self.seed), cfg.patches)[: self.rows(cfg)])
        return jnp.broadcast_to(index_M, (len(x_BSD), self.rows(cfg)))


@dataclass(frozen=True)
class PooledPatches(Picked):
    """Baseline: the mean of every cell of a grid of `cells` (rows, columns) laid over the picture, at the place of its first patch.

    Where a cell does not come out even it shares its border patches with the next one (adaptive average pooling, as M3 and others use).
    """

    cells: tuple[int, int] = (8, 8)

    def check(self, cfg: ViTConfig) -> None:
        if not all(1 <= cell <= side for cell, side in zip(self.cells, cfg.grid)):
            raise UserError(f"cells {self.cells} do not fit a picture of {cfg.grid} patches; give at most as many cells a side")

    def rows(self, cfg: ViTConfig) -> int:
        return self.cells[0] * self.cells[1]

    def reduce(self, x_BSD: jax.Array, seen: Seen, cfg: ViTConfig) -> Reduced:
        (down, top), (across, left) = (_cells(side, many) for side, many in zip(cfg.grid, self.cells))
        grid = patches(x_BSD, cfg).reshape(len(x_BSD), *cfg.grid, -1).astype(jnp.float32)
        mean = jnp.einsum("my,nx,byxd->bmnd", down, across, grid, precision="highest").reshape(len(x_BSD), self.rows(cfg), -1)
        place = (top[:, None] * cfg.grid[1] + left[None]).reshape(-1)
        return Reduced(mean.astype(x_BSD.dtype), jnp.broadcast_to(jnp.asarray(place, jnp.int32), mean.shape[:2]))


def _cells(side: int, many: int) -> tuple[np.ndarray, np.ndarray]:
    """(weights of each patch of a side in each cell, first patch of each cell)."""
    first = np.arange(many) * side // many
    last = -(-(np.arange(many) + 1) * side // many)
    inside = (np.arange(side) >= first[:, None]) & (np.arange(side) < last[:, None])
    return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32), first
