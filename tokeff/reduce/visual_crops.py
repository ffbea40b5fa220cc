"""Budgets that pictures, thumbnails and crops do not share evenly: HiRED, GlobalCom2, and the density of TokenCorrCompressor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.errors import UserError
from tokeff.kv.budget import Budget, check_budget, most_rows
from tokeff.models.anyres import Canvas
from tokeff.models.vit import Seen, Taps
from tokeff.models.vit_config import ViTConfig
from tokeff.reduce.visual import Chosen, Cropped, Reduced, best, cosines, importance, patches, take, upto

NEWLINES = ("used", "all", "none")


@dataclass(frozen=True)
class Shared(Cropped):
    """A budget, as a share of all patches of thumbnail and crops or as a number of rows, in a tower with a class row."""

    budget: Budget = 0.2

    def check(self, cfg: ViTConfig) -> None:
        if isinstance(self.budget, (float, bool)):
            check_budget(self.budget, cfg.patches)
        elif self.budget < 1:
            raise UserError(f"budget {self.budget} rows does not fit a picture; give at least 1")
        if not cfg.cls:
            raise UserError(f"{type(self).__name__} ranks by the class row, which {cfg.name} has none of; use a method for single crops")

    def rows(self, cfg: ViTConfig) -> int:
        """How many rows are left of a picture of one crop."""
        return most_rows(self.budget, cfg.patches)


@dataclass(frozen=True)
class HiRED(Shared):
    """HiRED (Arif et al. 2024): a budget split between the full image and its crops, and among the crops by what the first layer looks at.

    `alpha` of the budget goes to the thumbnail. Of its patches, the (1 - alpha) P that the class row looks at most in layer `first` are
    counted by the crop in which they lie, and each crop gets its share of what is left, rounded down. Within thumbnail and crops the class
    row's attention at `layer` ranks. The released code counts patches by strips of consecutive ones (`strips`), which are crops' places
    only where crops lie above one another. Patches in the bars beside a picture cost budget and are gone. Newlines go too, as released.
    A share of all patches is rounded up before it is split.
    """

    alpha: float = 0.5
    layer: int = -2
    first: int = 0
    strips: bool = False
    lines: str = "none"

    def check(self, cfg: ViTConfig) -> None:
        super().check(cfg)
        self.taps(cfg)
        if not 0 <= self.alpha < 1:
            raise UserError(f"alpha {self.alpha} leaves nothing for the crops; give a share from 0 up to 1")
        if self.lines not in NEWLINES:
            raise UserError(f"lines {self.lines!r} are not known; give one of {', '.join(NEWLINES)}")

    def newlines(self) -> str:
        return self.lines

    def taps(self, cfg: ViTConfig) -> Taps:
        return Taps(cls=tuple(sorted({cfg.layer(self.layer), cfg.layer(self.first)})))

    def stand_in(self, canvas: Canvas, cfg: ViTConfig) -> Canvas:
        """The canvas without bars, where these move no patch of the thumbnail to another crop."""
        lines, columns = canvas.cells
        bare = Canvas(canvas.down, canvas.across, canvas.cells, (0, canvas.down * lines), (0, canvas.across * columns))
        return bare if self.strips or (crop_of_patch(cfg, bare) == crop_of_patch(cfg, canvas)).all() else canvas

    def reduce(self, x_BSD: jax.Array, seen: Seen, cfg: ViTConfig) -> Reduced:
        return take(patches(x_BSD, cfg), best(importance(seen, self.layer, cfg), self.rows(cfg)))

    def fewest(self, cfg: ViTConfig, crops: int) -> int:
        if crops == 1:
            return self.rows(cfg)
        total = most_rows(self.budget, crops * cfg.patches)
        return total if total == crops * cfg.patches else min(int(total * self.alpha), cfg.patches)

    def across(self, x_BSD: jax.Array, seen: Seen, cfg: ViTConfig, canvas: Canvas) -> Reduced:
        B, P = len(x_BSD), cfg.patches
        if (total := most_rows(self.budget, B * P)) == B * P:
            return take(patches(x_BSD, cfg), jnp.broadcast_to(jnp.arange(P), (B, P)))
        thumbnail = min(int(total * self.alpha), P)
        rest, K = min(total - thumbnail, (B - 1) * P), int(P * (1 - self.alpha))
        looked = best(importance(seen, self.first, cfg)[:1], K)[0]
        cell_P = np.arange(P) * (B - 1) // P if self.strips else crop_of_patch(cfg, canvas)
        found = (jnp.asarray(cell_P)[looked][:, None] == jnp.arange(B - 1)).sum(axis=0)
        count = jnp.concatenate([jnp.array([thumbnail]), jnp.minimum(found * rest // max(K, 1), P)])
        index, real = upto(importance(seen, self.layer, cfg), count, max(thumbnail, min(rest, P), 1))
        return take(patches(x_BSD, cfg), index, real)


def crop_of_patch(cfg: ViTConfig, canvas: Canvas) -> np.ndarray:
    """cell_P: the crop in which the middle of each patch of the thumbnail lies. The thumbnail shows the picture from edge to edge; on the
    canvas there are bars beside it."""
    (top, bottom), (left, right) = canvas.lines, canvas.columns
    y, x = np.divmod(np.arange(cfg.patches), cfg.grid[1])
    line, column = (2 * y + 1) * (bottom - top) // (2 * cfg.grid[0]), (2 * x + 1) * (right - left) // (2 * cfg.grid[1])
    return (top + line) // canvas.cells[0] * canvas.across + (left + column) // canvas.cells[1]


@dataclass(frozen=True)
class GlobalCom2(Shared):
    """GlobalCom2 (Liu et al. 2025): the thumbnail says how much of each crop stays, and has a say in which patches.

    With share R of the thumbnail's patches, crop j keeps R (1 + softmax_j(s / heat) - mean), at most 1, of its patches that show the
    picture, s_j the class row's attention to the thumbnail's patches in it. Both numbers are rounded down, as released. A crop's patches
    are ranked by their own attention plus that of the thumbnail, resized to the canvas, each of length 1. Attention is the mean over heads
    at `layer`. At R = 1 nothing goes. Every line keeps its newline, as released, where those of the bars stay too. Of a picture of one crop
    R stays as well; there the released code leaves everything.
    """

    budget: Budget = 0.25
    heat: float = 10.0
    layer: int = -1

    def check(self, cfg: ViTConfig) -> None:
        super().check(cfg)
        self.taps(cfg)
        if not self.heat > 0 or self.rows(cfg) > cfg.patches:
            raise UserError(f"heat {self.heat} or budget {self.budget} fits no crop; give a heat above 0 and no more than a crop's patches")

    def rows(self, cfg: ViTConfig) -> int:
        return max(int(self.budget * cfg.patches + 1e-9), 1) if isinstance(self.budget, float) else self.budget

    def fewest(self, cfg: ViTConfig, crops: int) -> int:
        return crops * cfg.patches if self.rows(cfg) == cfg.patches else self.rows(cfg)

    def newlines(self) -> str:
        return "all"

    def taps(self, cfg: ViTConfig) -> Taps:
        return Taps(cls=(cfg.layer(self.layer),))

    def reduce(self, x_BSD: jax.Array, seen: Seen, cfg: ViTConfig) -> Reduced:
        return take(patches(x_BSD, cfg), best(importance(seen, self.layer, cfg), self.rows(cfg)))

    def across(self, x_BSD: jax.Array, seen: Seen, cfg: ViTConfig, canvas: Canvas) -> Reduced:
        attention, crops, P, M = importance(seen, self.layer, cfg), len(x_BSD) - 1, cfg.patches, self.rows(cfg)
        R = self.budget if isinstance(self.budget, float) else M / P
        in_crop = crop_of_patch(cfg, canvas) == np.arange(crops)[:, None]
        weight = jax.nn.softmax(jnp.where(in_crop, attention[0], 0).sum(axis=1) / self.heat)
        keep = jnp.ones(crops) if M == P else jnp.minimum(R * (1 + weight - 1 / crops), 1)
        shown = canvas.shown()
        count = jnp.floor(keep * shown.sum(axis=1) + 1e-4).astype(jnp.int32)  # a whole number of patches is one in float32 too
        own, above = (_length_one(jnp.where(shown, a, 0)) for a in (attention[1:], self.above(attention[0], cfg, canvas)))
        score = jnp.concatenate([attention[:1], jnp.where(shown, own + above, -jnp.inf)])
        most = min(P, math.ceil(P * min(1, R * (2 - 1 / crops))))
        index, real = upto(score, jnp.concatenate([jnp.array([M]), count]), max(M, most))
        return take(patches(x_BSD, cfg), index, real)

    def above(self, attention_P: jax.Array, cfg: ViTConfig, canvas: Canvas) -> jax.Array:
        """score_BP of the crops' patches: the thumbnail's attention, resized to what the canvas shows."""
        (top, bottom), (left, right) = canvas.lines, canvas.columns
        grid = jax.image.resize(attention_P.reshape(cfg.grid), (bottom - top, right - left), "linear", antialias=False)
        tall, wide = canvas.down * cfg.grid[0], canvas.across * cfg.grid[1]
        grid = jnp.pad(grid, ((top, tall - bottom), (left, wide - right)))
        parts = grid.reshape(canvas.down, cfg.grid[0], canvas.across, cfg.grid[1]).swapaxes(1, 2)
        return parts.reshape(canvas.down * canvas.across, cfg.patches)


def _length_one(score_BP: jax.Array) -> jax.Array:
    return score_BP / jnp.maximum(jnp.linalg.norm(score_BP, axis=1, keepdims=True), 1e-12)


@dataclass(frozen=True)
class TokenCorr(Chosen):
    """TokenCorrCompressor (Zhang et al. 2024): every crop keeps as many patches as it has that are not repeated. Our reading.

    A patch is repeated if more than `often` of the crop's other patches have keys (the mean over heads) within a cosine of `like`; the
    share of those that are not is the crop's density, and the budget, a bound, times no more than that stays: the patches that the class
    row looks at most. Published are the two steps; both thresholds, the layer and a draw in the place of the best are not recovered.
    """

    budget: Budget = 1.0
    like: float = 0.8
    often: float = 0.1
    layer: int = -2

    def check(self, cfg: ViTConfig) -> None:
        super().check(cfg)
        self.taps(cfg)
        if not cfg.cls:
            raise UserError(f"TokenCorr ranks by the class row, which {cfg.name} has none of; use FasterVLM or DivPrune")
        if not 0 <= self.often <= 1:
            raise UserError(f"often={self.often} is not a share of the patches; give a fraction from 0 to 1")

    def fewest(self, cfg: ViTConfig, crops: int) -> int:
        return crops

    def taps(self, cfg: ViTConfig) -> Taps:
        return Taps(cls=(cfg.layer(self.layer),), k=(cfg.layer(self.layer),))

    def reduce(self, x_BSD: jax.Array, seen: Seen, cfg: ViTConfig) -> Reduced:
        count = jnp.clip(density(patches(seen.k_BSNH[cfg.layer(self.layer)].mean(axis=2), cfg), self.like, self.often), 1, self.rows(cfg))
        index, real = upto(importance(seen, self.layer, cfg), count, self.rows(cfg))
        return take(patches(x_BSD, cfg), index, real)


def density(k_BPH: jax.Array, like: float, often: float) -> jax.Array:
    """count_B of patches that no more than `often` of the others are like."""
    P = k_BPH.shape[1]
    alike_BPP = (cosines(k_BPH, k_BPH) > like) & ~jnp.eye(P, dtype=bool)
    return (alike_BPP.sum(axis=2) <= often * (P - 1)).sum(axis=1)
