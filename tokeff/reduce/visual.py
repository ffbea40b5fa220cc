"""Which patches of a picture a language model gets to see: token reduction between the image tower and the decoder.

Every method is three steps on plain arrays. A score ranks the P patches of a picture (`importance`, attention received), a choice takes
M of them (`best`, `spread`), and the others are dropped (`take`), merged or brought back (`contextual`, `gathered`). Counts are static.

A `Picked` is a frozen choice. What it wants to know of the tower it says in `taps`; `reduce` maps the rows of a picture, x_BSD with the
class row first where the tower has one, to the M rows that are left and the patch each stands for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tokeff.errors import UserError
from tokeff.kv.budget import Budget, check_budget, most_rows
from tokeff.models.attention import NEG
from tokeff.models.flow import EMPTY
from tokeff.models.vit import Seen, Taps
from tokeff.models.vit_config import ViTConfig


class Reduced(struct.PyTreeNode):
    """What is left of pictures: M rows each, and the patch (in reading order) at whose place a row stands, EMPTY for a row of no place."""

    x_BMD: jax.Array
    place_BM: jax.Array


@dataclass(frozen=True)
class Picked:
    """Base class. projected: works on rows as the decoder gets them, not as they leave the tower. placed: every row is at a patch's place,
    in reading order, so positions can be kept."""

    projected: ClassVar[bool] = False
    placed: ClassVar[bool] = True

    def check(self, cfg: ViTConfig) -> None:
        """UserError for settings that do not fit the tower."""
        raise NotImplementedError

    def rows(self, cfg: ViTConfig) -> int:
        """M: how many rows are left of a picture."""
        raise NotImplementedError

    def taps(self, cfg: ViTConfig) -> Taps:
        """What it wants to know of the tower."""
        return Taps()

    def reduce(self, x_BSD: jax.Array, seen: Seen, cfg: ViTConfig) -> Reduced:
        """The rows that are left."""
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


def take(x_BPD: jax.Array, index_BM: jax.Array) -> Reduced:
    """The chosen rows as they are; all others are gone."""
    return Reduced(jnp.take_along_axis(x_BPD, index_BM[..., None], axis=1), index_BM)


def cosines(a_BPD: jax.Array, b_BPD: jax.Array) -> jax.Array:
    """cosine_BPP of rows with rows, in float32; 0 with a row of zeros."""

    def unit(x):
        x = x.astype(jnp.float32)
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    return jnp.einsum("bpd,bmd->bpm", unit(a_BPD), unit(b_BPD), precision="highest")


def spread(x_BPD: jax.Array, M: int) -> jax.Array:
    """index_BM, ascending, of rows far from each other (DivPrune, Alvar et al. 2025, alg. 1).

    By cosine distance: first the row whose nearest neighbour is farthest, then always the one whose nearest chosen row is farthest. Rows
    that are no numbers come last.
    """
    distance_BPP = 1 - cosines(x_BPD, x_BPD)
    P = x_BPD.shape[1]

    def one(d_PP):
        bad_P, self_PP = jnp.isnan(jnp.diagonal(d_PP)), jnp.eye(P, dtype=bool)
        d_PP = jnp.where(self_PP | jnp.isnan(d_PP), jnp.inf, d_PP)
        first = jnp.argmax(jnp.where(bad_P, -jnp.inf, d_PP.min(axis=1)))

        def step(i, state):
            near_P, index_M = state
            at = jnp.argmax(near_P)
            return jnp.minimum(near_P, d_PP[at]).at[at].set(-jnp.inf), index_M.at[i].set(at)

        near_P = jnp.where(bad_P, NEG, d_PP[first]).at[first].set(-jnp.inf)
        return jnp.sort(jax.lax.fori_loop(1, M, step, (near_P, jnp.zeros(M, jnp.int32).at[0].set(first)))[1])

    return jax.vmap(one)(distance_BPP)


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
    """DivPrune (Alvar et al. 2025): a set of patches far from each other, as the decoder gets them. The published share is .098."""

    budget: Budget = 0.098
    projected: ClassVar[bool] = True

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


@dataclass(frozen=True)
class VisionZip(Chosen):
    """VisionZip (Yang et al. 2024): the class row and the patches it looks at most; the others merged onto `contextual` of them.

    Merging: targets at even strides among the others; each remaining one goes to the target whose keys (the mean over heads) are closest,
    and a target becomes itself plus the mean of what it got. The defaults are the published 54 + 10 of 576. As published, merged rows
    stand behind the rest. A tower without a class row ranks by the attention received, and has no such row.
    """

    budget: Budget = 54 / 576
    contextual: Budget = 10 / 576
    layer: int = -2
    placed: ClassVar[bool] = False

    def check(self, cfg: ViTConfig) -> None:
        super().check(cfg)
        check_budget(self.contextual, cfg.patches)
        if self.rows(cfg) > cfg.patches or self.dominant(cfg) < 1:
            raise UserError(f"{self.budget} + {self.contextual} of {cfg.patches} patches is too much or too little; change the budget")

    def dominant(self, cfg: ViTConfig) -> int:
        """Patches kept as they are, beside the class row."""
        return most_rows(self.budget, cfg.patches) - int(cfg.cls)

    def rows(self, cfg: ViTConfig) -> int:
        return most_rows(self.budget, cfg.patches) + most_rows(self.contextual, cfg.patches)

    def taps(self, cfg: ViTConfig) -> Taps:
        return asked(self.layer, cfg) | Taps(k=(cfg.layer(self.layer),))

    def reduce(self, x_BSD, seen, cfg) -> Reduced:
        x, C = patches(x_BSD, cfg), most_rows(self.contextual, cfg.patches)
        kept = best(importance(seen, self.layer, cfg), self.dominant(cfg))
        merged = contextual(x, patches(seen.k_BSNH[cfg.layer(self.layer)].mean(axis=2), cfg), kept, C)
        first = [x_BSD[:, :1]] if cfg.cls else []
        place = jnp.concatenate([jnp.full((len(x), len(first)), EMPTY), kept, merged.place_BM], axis=1)
        return Reduced(jnp.concatenate([*first, take(x, kept).x_BMD, merged.x_BMD], axis=1), place)


def contextual(x_BPD: jax.Array, metric_BPH: jax.Array, kept_BM: jax.Array, C: int) -> Reduced:
    """The rows that are not kept, merged onto C of them: every (rest // C)-th is a target (VisionZip, sec. 3.2)."""
    P, R = x_BPD.shape[1], x_BPD.shape[1] - kept_BM.shape[1]
    gone = jax.vmap(lambda at: jnp.zeros(P, bool).at[at].set(True))(kept_BM)
    rest_BR = jnp.argsort(gone, axis=1, stable=True)[:, :R]
    target = np.arange(C) * max(R // C, 1)
    others = np.setdiff1d(np.arange(R), target)
    x, metric = (jnp.take_along_axis(a, rest_BR[..., None], axis=1) for a in (x_BPD, metric_BPH))
    best_BO = jnp.argmax(cosines(metric[:, others], metric[:, target]), axis=2)
    goes_BOC = jax.nn.one_hot(best_BO, C, dtype=jnp.float32)
    mean = jnp.einsum("boc,bod->bcd", goes_BOC, x[:, others].astype(jnp.float32), precision="highest")
    mean = mean / jnp.maximum(goes_BOC.sum(axis=1), 1)[..., None]
    return Reduced((x[:, target] + mean).astype(x.dtype), rest_BR[:, target])


@dataclass(frozen=True)
class PruMerge(Chosen):
    """LLaVA-PruMerge (Shang et al. 2024): the patches that the class row looks at most, each with what lies near it added, and one row for
    all that is left.

    Attention is that of one head as wide as the model, at `layer`. A kept row adds sum_j a_j x_j over the `near` patches whose keys are
    closest by cosine; the last row is that sum over all patches that were not kept. Neither is normalised, as published. How many are
    kept is the picture's own in the paper (`outliers`); here it is the budget, so that pictures can share a batch. Kept rows stand in
    reading order.
    """

    layer: int = -1
    near: int = 32
    placed: ClassVar[bool] = False

    def check(self, cfg: ViTConfig) -> None:
        super().check(cfg)
        if not cfg.cls:
            raise UserError(f"PruMerge ranks by the class row, which {cfg.name} has none of; use FasterVLM or DivPrune")
        if self.near < 1:
            raise UserError(f"near={self.near} patches add nothing; give at least 1")

    def rows(self, cfg: ViTConfig) -> int:
        return super().rows(cfg) + 1

    def taps(self, cfg: ViTConfig) -> Taps:
        return Taps(k=(cfg.layer(self.layer),), q=(cfg.layer(self.layer),))

    def reduce(self, x_BSD, seen, cfg) -> Reduced:
        at = cfg.layer(self.layer)
        k = seen.k_BSNH[at].reshape(*x_BSD.shape[:2], cfg.D)
        score = one_head(seen.q_BSNH[at].reshape(k.shape)[:, :1], k)
        return gathered(patches(x_BSD, cfg), patches(k, cfg), patches(score, cfg), self.rows(cfg) - 1, min(self.near, cfg.patches - 1))


def one_head(q_B1D: jax.Array, k_BSD: jax.Array) -> jax.Array:
    """score_BS: softmax of one query's products over all rows, as one head of the whole width."""
    logits = jnp.einsum("bqd,bsd->bs", q_B1D, k_BSD, preferred_element_type=jnp.float32, precision="highest")
    return jax.nn.softmax(logits * k_BSD.shape[-1] ** -0.5, axis=-1)


def gathered(x_BPD: jax.Array, k_BPD: jax.Array, score_BP: jax.Array, M: int, near: int) -> Reduced:
    """M best rows with their neighbours added, and one row of what is left (PruMerge, sec. 3.2 and 3.3; the sums as released)."""
    index, P = best(score_BP, M), x_BPD.shape[1]
    like = cosines(jnp.take_along_axis(k_BPD, index[..., None], axis=1), k_BPD)
    like = jnp.where(jnp.arange(P) == index[..., None], -jnp.inf, like)
    close_BMJ = jax.lax.top_k(like, near)[1]
    among_BMP = jax.nn.one_hot(close_BMJ, P, dtype=jnp.float32).sum(axis=2)
    left_B1P = 1 - jax.nn.one_hot(index, P, dtype=jnp.float32).sum(axis=1, keepdims=True)
    weight = jnp.concatenate([among_BMP, left_B1P], axis=1) * score_BP[:, None]
    more = jnp.einsum("bmp,bpd->bmd", weight, x_BPD.astype(jnp.float32), precision="highest").astype(x_BPD.dtype)
    own = jnp.pad(take(x_BPD, index).x_BMD, ((0, 0), (0, 1), (0, 0)))
    return Reduced(own + more, jnp.pad(index, ((0, 0), (0, 1)), constant_values=EMPTY))


def outliers(score_BP: jax.Array) -> jax.Array:
    """count_B of scores above the third quartile by more than 1.5 interquartile ranges: how many patches PruMerge keeps (sec. 3.2)."""
    low, high = jnp.percentile(score_BP, jnp.asarray([25.0, 75.0]), axis=1)
    return (score_BP > (high + 1.5 * (high - low))[:, None]).sum(axis=1)
