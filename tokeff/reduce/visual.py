"""Which patches of a picture a language model gets to see: token reduction between the image tower and the decoder.

Every method is three steps on plain arrays. A score ranks the P patches of a picture (`importance`, attention received), a choice takes
M of them (`best`, `spread`, `upto`), and the others are dropped (`take`), merged or brought back. Shapes are static: where the number of
rows depends on the picture, M is the most there can be.

A `Picked` is a frozen choice. What it wants to know of the tower it says in `taps`; `reduce` maps the rows of a picture, x_BSD with the
class row first where the tower has one, to the M rows that are left and the patch each stands for. It is given every crop and every
frame as a picture of its own. What a method has learned (a router) stands in `ViTParams.side` and reaches it as `seen.side`. Four kinds
look further: at the tower's layers while they run (`Walked`), at a thumbnail and its crops (`Cropped`), at the frames of a video
(`Filmed`), at the text (`Told`). All methods are listed in `tokeff.reduce.listing`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tokeff.errors import UserError
from tokeff.kernels import k_centre
from tokeff.kv.budget import Budget, check_budget, most_rows
from tokeff.models.anyres import Canvas
from tokeff.models.attention import NEG
from tokeff.models.vit import Seen, Taps
from tokeff.models.vit_config import ViTConfig, ViTParams


class Reduced(struct.PyTreeNode):
    """What is left of pictures: M rows each, and the patch (in reading order) at whose place a row stands, EMPTY for a row of no place.
    real_BM: which of the M are rows at all, where a picture may have fewer; None if all are."""

    x_BMD: jax.Array
    place_BM: jax.Array
    real_BM: jax.Array | None = None


@dataclass(frozen=True)
class Picked:
    """Base class. projected: works on rows as the decoder gets them, not as they leave the tower. placed: every row is at a patch's place,
    in reading order, so positions can be kept."""

    projected: ClassVar[bool] = False
    placed: ClassVar[bool] = True

    def newlines(self) -> str:
        """Which lines of laid-out crops keep their newline: 'used' (those of which a patch is left), 'all' or 'none'."""
        return "used"

    def check(self, cfg: ViTConfig) -> None:
        """UserError for settings that do not fit the tower."""
        raise NotImplementedError

    def rows(self, cfg: ViTConfig) -> int:
        """M: how many rows are left of a picture, at most."""
        raise NotImplementedError

    def fewest(self, cfg: ViTConfig, crops: int) -> int:
        """How many rows are left of so many crops or frames of one picture, at least. A method whose number depends on what is seen says so
        here: prompts that are too long at any rate are refused before a tower runs."""
        return crops * self.rows(cfg)

    def taps(self, cfg: ViTConfig) -> Taps:
        """What it wants to know of the tower."""
        return Taps()

    def reduce(self, x_BSD: jax.Array, seen: Seen, cfg: ViTConfig) -> Reduced:
        """The rows that are left."""
        raise NotImplementedError


@dataclass(frozen=True)
class Walked(Picked):
    """Base class of methods that act while the tower runs."""

    def walk(self, params: ViTParams, cfg: ViTConfig, pixels_BYXC: jax.Array, layers: tuple[int, ...]) -> Reduced:
        """The rows that are left, those of `layers` side by side, as they leave the tower."""
        raise NotImplementedError


@dataclass(frozen=True)
class Cropped(Picked):
    """Base class of methods that share a budget between a thumbnail and its crops. A picture of one crop goes through `reduce`."""

    def stand_in(self, canvas: Canvas, cfg: ViTConfig) -> Canvas:
        """A canvas on which `across` leaves the same: all that have one stand-in share a program."""
        return canvas

    def across(self, x_BSD: jax.Array, seen: Seen, cfg: ViTConfig, canvas: Canvas) -> Reduced:
        """The rows that are left of one picture; B are its thumbnail and its crops."""
        raise NotImplementedError


@dataclass(frozen=True)
class Filmed(Picked):
    """Base class of methods that compare the frames of a video. B are its frames, pooled and projected."""

    projected: ClassVar[bool] = True

    def check(self, cfg: ViTConfig) -> None:
        self.taps(cfg)

    def rows(self, cfg: ViTConfig) -> int:
        """The most that can be left of a frame."""
        return cfg.patches

    def fewest(self, cfg: ViTConfig, crops: int) -> int:
        return 1

    def at_share(self, share: float, F: int, alike: Callable[[], np.ndarray]) -> Filmed | None:
        """It at the setting that leaves about this share of the rows of F frames, or at most it where the settings are few; None where none
        does. alike: cosines of rows with those of the next frame, of clips to go by."""
        raise NotImplementedError(f"{type(self).__name__} does not say at which setting it leaves a share of the rows; define at_share")


@dataclass(frozen=True)
class Told(Picked):
    """Base class of methods that read the text. `reduce` is what they do without one."""

    projected: ClassVar[bool] = True

    def answer(self, x_BSD: jax.Array, seen: Seen, cfg: ViTConfig, about_D: jax.Array) -> Reduced:
        """The rows that are left. about_D: the mean of the text's rows as the decoder gets them, each of length 1 (`direction`)."""
        raise NotImplementedError


@dataclass(frozen=True)
class Chosen(Picked):
    """Base class of methods with a budget: a share of a picture's patches, or a number of them. Those that drop the others override
    `choose` alone."""

    budget: Budget = 1 / 9

    def check(self, cfg: ViTConfig) -> None:
        check_budget(self.budget, cfg.patches)

    def rows(self, cfg: ViTConfig) -> int:
        return most_rows(self.budget, cfg.patches)

    def reduce(self, x_BSD: jax.Array, seen: Seen, cfg: ViTConfig) -> Reduced:
        return take(patches(x_BSD, cfg), self.choose(x_BSD, seen, cfg))

    def choose(self, x_BSD: jax.Array, seen: Seen, cfg: ViTConfig) -> jax.Array:
        """index_BM of the patches that stay, ascending."""
        raise NotImplementedError


def patches(x_BSD: jax.Array, cfg: ViTConfig) -> jax.Array:
    """The rows (or numbers a row) of patches, without that of the class row."""
    return x_BSD[:, int(cfg.cls) :]


def asked(layer: int, cfg: ViTConfig) -> Taps:
    """Taps for `importance`."""
    return Taps(cls=(cfg.layer(layer),)) if cfg.cls else Taps(received=(cfg.layer(layer),))


def importance(seen: Seen, layer: int, cfg: ViTConfig) -> jax.Array:
    """score_BP: attention of the class row, the mean over heads; in a tower without one the attention that patches receive."""
    at = cfg.layer(layer)
    return patches(seen.cls_BNS[at].mean(axis=1), cfg) if cfg.cls else seen.received_BS[at]


def best(score_BP: jax.Array, M: int) -> jax.Array:
    """index_BM, ascending, of the M highest scores. Of equal ones the earlier counts; what is no number is chosen last."""
    score = jnp.where(jnp.isnan(score_BP), -jnp.inf, score_BP)
    return jnp.sort(jax.lax.top_k(score, M)[1], axis=1)


def upto(score_BP: jax.Array, count_B: jax.Array, M: int) -> tuple[jax.Array, jax.Array]:
    """(index_BM, real_BM) of the `count` best of each picture, at most M, ascending; what is not real stands behind them."""
    P = score_BP.shape[1]
    index = jax.lax.top_k(jnp.where(jnp.isnan(score_BP), -jnp.inf, score_BP), M)[1]
    index = jnp.sort(jnp.where(jnp.arange(M) < count_B[:, None], index, P), axis=1)
    return jnp.minimum(index, P - 1), index < P


def take(x_BPD: jax.Array, index_BM: jax.Array, real_BM: jax.Array | None = None) -> Reduced:
    """The chosen rows as they are; all others are gone."""
    return Reduced(jnp.take_along_axis(x_BPD, index_BM[..., None], axis=1), index_BM, real_BM)


def in_place(left: Reduced, P: int) -> Reduced:
    """The rows in the order of their places; those that are not real behind them."""
    real = jnp.ones(left.place_BM.shape, bool) if left.real_BM is None else left.real_BM
    order = jnp.argsort(jnp.where(real, left.place_BM, P), axis=1, stable=True)
    rows = jnp.take_along_axis(left.x_BMD, order[..., None], axis=1)
    return Reduced(rows, jnp.take_along_axis(left.place_BM, order, axis=1), jnp.take_along_axis(real, order, axis=1))


def unit(x: jax.Array) -> jax.Array:
    """Rows of length 1, in float32; a row of zeros stays one."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def cosines(a_BPD: jax.Array, b_BPD: jax.Array) -> jax.Array:
    """cosine_BPP of rows with rows, in float32; 0 with a row of zeros."""
    return jnp.einsum("bpd,bmd->bpm", unit(a_BPD), unit(b_BPD), precision="highest")


def greedy(distance_PP: jax.Array, first: jax.Array, M: int, total: bool = False, bonus_P: jax.Array | float = 0.0) -> jax.Array:
    """index_M in the order of choice: `first`, then always the row farthest from the chosen ones.

    By its distance to the nearest of them, which makes them cover the others (k-centre) and keeps them apart (max-min); total: by the sum
    of its distances to all of them (max-sum). bonus: what a row counts for besides. Rows that are no numbers come last.
    """
    bad_P = jnp.isnan(jnp.diagonal(distance_PP))
    known_PP = jnp.where(jnp.isnan(distance_PP), 0.0 if total else jnp.inf, distance_PP)

    def step(i, state):
        far_P, index_M = state
        at = jnp.argmax(far_P + bonus_P)
        far_P = far_P + known_PP[at] if total else jnp.minimum(far_P, known_PP[at])
        return far_P.at[at].set(-jnp.inf), index_M.at[i].set(at)

    far_P = jnp.where(bad_P, NEG, known_PP[first]).at[first].set(-jnp.inf)
    return jax.lax.fori_loop(1, M, step, (far_P, jnp.zeros(M, jnp.int32).at[0].set(first)))[1]


def spread(x_BPD: jax.Array, M: int) -> jax.Array:
    """index_BM, ascending, of rows far from each other (DivPrune, Alvar et al. 2025, alg. 1).

    By cosine distance: first the row whose nearest neighbour is farthest, then always the one whose nearest chosen row is farthest. Rows
    that are no numbers come last.
    """
    return jnp.sort(k_centre(1 - cosines(x_BPD, x_BPD), most=M), axis=1)


@dataclass(frozen=True)
class FasterVLM(Chosen):
    """FasterVLM (Zhang et al. 2024): the patches that the class row looks at most, by the mean over heads at `layer`."""

    layer: int = -2

    def taps(self, cfg: ViTConfig) -> Taps:
        return asked(self.layer, cfg)

    def choose(self, x_BSD, seen, cfg):
        return best(importance(seen, self.layer, cfg), self.rows(cfg))


@dataclass(frozen=True)
class DivPrune(Chosen):
    """DivPrune (Alvar et al. 2025): a set of patches far from each other, as the decoder gets them. The published share is .098. A
    share is rounded to the nearest number of patches, as released: 56 of 576."""

    budget: Budget = 0.098
    projected: ClassVar[bool] = True

    def rows(self, cfg: ViTConfig) -> int:
        return max(round(self.budget * cfg.patches), 1) if isinstance(self.budget, float) else super().rows(cfg)

    def choose(self, x_BSD, seen, cfg):
        return spread(patches(x_BSD, cfg), self.rows(cfg))


@dataclass(frozen=True)
class HiPrune(Chosen):
    """HiPrune (Liu et al. 2025): anchors that receive most attention at a middle layer, their neighbours, and then what receives most at a
    deep layer. `share` of the budget goes to anchors with their four neighbours. As released, neighbours are by number in reading order, so
    those at an edge wrap to the next line; past the ends they are the first and last patch."""

    layer: int = -2
    middle: int = 8
    share: float = 0.1

    def check(self, cfg: ViTConfig) -> None:
        super().check(cfg)
        self.taps(cfg)
        if not 0 <= self.share <= 1:
            raise UserError(f"share {self.share} of the rows cannot go to anchors; give a fraction from 0 to 1")

    def anchors(self, cfg: ViTConfig) -> int:
        """How many patches are anchors; never more than leave room for their neighbours."""
        return min(round(self.share * self.rows(cfg) / 5), self.rows(cfg) // 5)

    def taps(self, cfg: ViTConfig) -> Taps:
        return Taps(received=(cfg.layer(self.layer), cfg.layer(self.middle)))

    def choose(self, x_BSD, seen, cfg):
        deep, middle = (patches(seen.received_BS[cfg.layer(at)], cfg) for at in (self.layer, self.middle))
        if not (A := self.anchors(cfg)):
            return best(deep, self.rows(cfg))
        columns = cfg.grid[1]
        near = best(middle, A)[..., None] + jnp.asarray([0, -1, 1, -columns, columns])
        near = jnp.clip(near, 0, cfg.patches - 1).reshape(len(deep), -1)
        forced = jax.vmap(lambda at: jnp.zeros(cfg.patches, bool).at[at].set(True))(near)
        return best(jnp.where(forced, jnp.inf, deep), self.rows(cfg))
