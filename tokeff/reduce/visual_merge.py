"""Patches of a picture that become one row: VisionZip, PruMerge, and the rounds of AIM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.errors import UserError
from tokeff.kv.budget import Budget, check_budget, most_rows
from tokeff.models.flow import EMPTY
from tokeff.models.vit import Seen, Taps
from tokeff.models.vit_config import ViTConfig
from tokeff.reduce.merge import merge
from tokeff.reduce.visual import Chosen, Picked, Reduced, asked, best, cosines, importance, patches, take, upto

COUNTS = ("budget", "outliers", "plus")


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
    closest by cosine; the last row is that sum over all patches that were not kept. Neither is normalised, as published. Kept rows stand
    in reading order. How many are kept is what `how` says:

    - 'budget': as many as the budget, so that pictures share a number.
    - 'outliers', as published: those whose attention is above the third quartile by more than 1.5 times the quartiles' distance.
    - 'plus' (PruMerge+): these n, and as released every s-th patch from the first on but the last, s = floor(floor(P / n) / 3).

    The last two depend on the picture; the budget bounds them, those with most attention first. Where there is no outlier, the patch with
    the most attention stands for one; there the released code breaks off.
    """

    layer: int = -1
    near: int = 32
    how: str = "budget"
    placed: ClassVar[bool] = False

    def check(self, cfg: ViTConfig) -> None:
        super().check(cfg)
        if not cfg.cls:
            raise UserError(f"PruMerge ranks by the class row, which {cfg.name} has none of; use FasterVLM or DivPrune")
        if self.near < 1:
            raise UserError(f"near={self.near} patches add nothing; give at least 1")
        if self.how not in COUNTS:
            raise UserError(f"how={self.how!r} is no number of patches; give one of {', '.join(COUNTS)}")

    def rows(self, cfg: ViTConfig) -> int:
        return super().rows(cfg) + 1

    def fewest(self, cfg: ViTConfig, crops: int) -> int:
        return crops * (self.rows(cfg) if self.how == "budget" else 2)

    def taps(self, cfg: ViTConfig) -> Taps:
        return Taps(k=(cfg.layer(self.layer),), q=(cfg.layer(self.layer),))

    def reduce(self, x_BSD, seen, cfg) -> Reduced:
        at = cfg.layer(self.layer)
        k = seen.k_BSNH[at].reshape(*x_BSD.shape[:2], cfg.D)
        score = one_head(seen.q_BSNH[at].reshape(k.shape)[:, :1], k)
        score, M = patches(score, cfg), self.rows(cfg) - 1
        kept = (best(score, M), None)
        if self.how != "budget":
            among = outliers(score)
            wanted = among | evenly(among.sum(axis=1), cfg.patches) if self.how == "plus" else among
            wanted = wanted & ~jnp.isnan(score)
            kept = upto(jnp.where(wanted, score, -jnp.inf), wanted.sum(axis=1), M)
        return gathered(patches(x_BSD, cfg), patches(k, cfg), score, kept, min(self.near, cfg.patches - 1))


def outliers(score_BP: jax.Array) -> jax.Array:
    """mask_BP of the scores that lie above the third quartile by more than 1.5 times the distance of the first to the third; where there is
    none, of the highest (PruMerge, sec. 3.2). Quartiles between two scores are interpolated."""
    low, high = jnp.nanpercentile(score_BP, jnp.array([25.0, 75.0]), axis=1)
    above = score_BP > (high + 1.5 * (high - low))[:, None]
    first = jnp.arange(score_BP.shape[1]) == best(score_BP, 1)
    return above | (first & ~above.any(axis=1, keepdims=True))


def evenly(count_B: jax.Array, P: int) -> jax.Array:
    """mask_BP of every s-th patch but the last one, s a third of P / count, both rounded down (PruMerge+); s is 1 at least."""
    step = jnp.maximum(P // count_B // 3, 1)[:, None]
    return (jnp.arange(P) % step == 0) & (jnp.arange(P) < P - 1)


def one_head(q_B1D: jax.Array, k_BSD: jax.Array) -> jax.Array:
    """score_BS: softmax of one query's products over all rows, as one head of the whole width."""
    logits = jnp.einsum("bqd,bsd->bs", q_B1D, k_BSD, preferred_element_type=jnp.float32, precision="highest")
    return jax.nn.softmax(logits * k_BSD.shape[-1] ** -0.5, axis=-1)


def gathered(x_BPD: jax.Array, k_BPD: jax.Array, score_BP: jax.Array, kept: tuple[jax.Array, jax.Array | None], near: int) -> Reduced:
    """The kept rows (index_BM, and which are real) with their neighbours added, and one row of what is left (PruMerge, sec. 3.2 and 3.3;
    the sums as released)."""
    (index, real), P = kept, x_BPD.shape[1]
    like = cosines(jnp.take_along_axis(k_BPD, index[..., None], axis=1), k_BPD)
    like = jnp.where(jnp.arange(P) == index[..., None], -jnp.inf, like)
    close_BMJ = jax.lax.top_k(like, near)[1]
    among_BMP = jax.nn.one_hot(close_BMJ, P, dtype=jnp.float32).sum(axis=2)
    own_BMP = jax.nn.one_hot(index if real is None else jnp.where(real, index, P), P, dtype=jnp.float32)
    left_B1P = 1 - own_BMP.sum(axis=1, keepdims=True)
    weight = jnp.concatenate([among_BMP, left_B1P], axis=1) * score_BP[:, None]
    more = jnp.einsum("bmp,bpd->bmd", weight, x_BPD.astype(jnp.float32), precision="highest").astype(x_BPD.dtype)
    own = jnp.pad(take(x_BPD, index).x_BMD, ((0, 0), (0, 1), (0, 0)))
    real = None if real is None else jnp.pad(real, ((0, 0), (0, 1)), constant_values=True)
    return Reduced(own + more, jnp.pad(index, ((0, 0), (0, 1)), constant_values=EMPTY), real)


@dataclass(frozen=True)
class AIM(Picked):
    """AIM (Zhong et al. 2024), what it does before the decoder: rounds of bipartite matching, each of which halves the rows.

    Of rows as the decoder gets them, and by their own cosines: every even row joins the odd one that is most like it, and the odd one
    becomes the plain mean of all that meet in it; the next round does not know how many rows a row stands for. Two rounds as published,
    which leave a quarter. Where their number is odd, the row with the least likeness stays alone; here it keeps its place in the line.
    """

    rounds: int = 2
    projected: ClassVar[bool] = True

    def check(self, cfg: ViTConfig) -> None:
        if self.rounds < 0 or cfg.patches >> self.rounds < 1:
            raise UserError(f"{self.rounds} rounds leave nothing of {cfg.patches} patches; give fewer rounds, from 0")

    def rows(self, cfg: ViTConfig) -> int:
        left = cfg.patches
        for _ in range(self.rounds):
            left -= left // 2
        return left

    def reduce(self, x_BSD: jax.Array, seen: Seen, cfg: ViTConfig) -> Reduced:
        x = patches(x_BSD, cfg)
        place = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        for _ in range(self.rounds):
            S = x.shape[1]
            key_S = jnp.arange(S) + S * (jnp.arange(S) % 2)  # a group stands where its odd row was
            x, _, source_BS = merge(x, x, jnp.ones(x.shape[:2], jnp.float32), S // 2, ordered=True)
            last = jax.vmap(lambda of, key=key_S, M=x.shape[1]: jax.ops.segment_max(key, of, M))(source_BS) % S
            place = jnp.take_along_axis(place, last, axis=1)
        return Reduced(x, place)
