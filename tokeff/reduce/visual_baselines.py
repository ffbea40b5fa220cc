"""What choosing patches by attention or likeness has to beat: patches at random, means over cells of the picture, a smaller picture."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.errors import UserError
from tokeff.models.vit import Seen, Taps, encode
from tokeff.models.vit_config import ViTConfig, ViTParams
from tokeff.reduce.visual import Chosen, Picked, Reduced, Walked, patches


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


@dataclass(frozen=True)
class SmallerImage(Walked):
    """Baseline: a smaller picture, so that the tower works less too. cells: patches down and across that are left.

    Pixels are resized by bilinear interpolation with smoothing, learned positions by bicubic interpolation as transformers does for
    CLIP and SigLIP (`interpolate_pos_encoding`). A row stands at the place of the patch that its patch begins in.
    """

    cells: tuple[int, int] = (12, 12)

    def check(self, cfg: ViTConfig) -> None:
        if not all(1 <= cell <= side for cell, side in zip(self.cells, cfg.grid)):
            raise UserError(f"cells {self.cells} do not fit a picture of {cfg.grid} patches; give at most as many cells a side")

    def rows(self, cfg: ViTConfig) -> int:
        return self.cells[0] * self.cells[1]

    def walk(self, params: ViTParams, cfg: ViTConfig, pixels_BYXC: jax.Array, layers: tuple[int, ...]) -> Reduced:
        B, side = len(pixels_BYXC), (self.cells[0] * cfg.patch, self.cells[1] * cfg.patch)
        small = replace(cfg, image=side)
        pixels = jax.image.resize(pixels_BYXC.astype(jnp.float32), (B, *side, cfg.channels), "linear")
        params = params.replace(place_SD=smaller_places(params.place_SD, cfg, self.cells))
        seen = encode(params, small, pixels, taps=Taps(x=layers), upto=max(layers) + 1).seen
        rows = jnp.concatenate([patches(seen.x_BSD[i], cfg) for i in layers], axis=2)
        (_, top), (_, left) = (_cells(side, many) for side, many in zip(cfg.grid, self.cells))
        place = (top[:, None] * cfg.grid[1] + left[None]).reshape(-1)
        return Reduced(rows, jnp.broadcast_to(jnp.asarray(place, jnp.int32), rows.shape[:2]))


def smaller_places(place_SD: jax.Array, cfg: ViTConfig, cells: tuple[int, int]) -> jax.Array:
    """Learned positions of another number of patches; that of the class row stays."""
    down, across = (_bicubic(side, many) for side, many in zip(cfg.grid, cells))
    grid = patches(place_SD[None], cfg).reshape(*cfg.grid, -1).astype(jnp.float32)
    few = jnp.einsum("my,nx,yxd->mnd", down, across, grid, precision="highest").reshape(cells[0] * cells[1], -1)
    return jnp.concatenate([place_SD[: int(cfg.cls)], few.astype(place_SD.dtype)])


def _bicubic(side: int, many: int) -> np.ndarray:
    """weight_MS of bicubic interpolation (a = -0.75, Keys 1981) without smoothing, centres aligned, border values repeated: torch's."""
    at = (np.arange(many) + 0.5) * side / many - 0.5
    weight = np.zeros((many, side))
    for step in (-1, 0, 1, 2):
        source = np.floor(at) + step
        t = np.abs(at - source)
        near = (1.25 * t - 2.25) * t * t + 1
        far = -0.75 * (((t - 5) * t + 8) * t - 4)
        np.add.at(weight, (np.arange(many), np.clip(source, 0, side - 1).astype(int)), np.where(t <= 1, near, far))
    return weight.astype(np.float32)
