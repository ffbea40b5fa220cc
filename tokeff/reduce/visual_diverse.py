"""Patches that differ from each other: ToDRE, VisPruner, and with an eye on the text CDPruner and CATP."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.errors import UserError
from tokeff.kv.budget import Budget, check_budget, most_rows
from tokeff.models.vit import Seen, Taps
from tokeff.models.vit_config import ViTConfig
from tokeff.reduce.visual import Chosen, Reduced, Told, asked, cosines, greedy, importance, patches, take, unit


@dataclass(frozen=True)
class ToDRE(Chosen):
    """ToDRE (Li et al. 2025), its first stage: a tenth of the patches, as different as a greedy choice makes them. Our reading.

    By the cosine distance of rows as they leave the tower. total: the next patch is the one with the largest sum of distances to those
    chosen (max-sum, the second version of the paper); else the one farthest from the nearest of them (k-centre, the first version). With
    which patch it starts could not be recovered: here the one with the largest sum of distances to all. The second stage, which drops all
    rows of pictures at a layer of the decoder where text looks at them little, is not here.
    """

    budget: Budget = 0.1
    total: bool = True

    def choose(self, x_BSD, seen, cfg):
        distance_BPP = 1 - cosines(patches(x_BSD, cfg), patches(x_BSD, cfg))

        def one(d_PP):
            reach_P = jnp.where(jnp.isnan(jnp.diagonal(d_PP)), -jnp.inf, jnp.nansum(d_PP, axis=1))
            return jnp.sort(greedy(d_PP, jnp.argmax(reach_P), self.rows(cfg), self.total))

        return jax.vmap(one)(distance_BPP)


@dataclass(frozen=True)
class VisPruner(Chosen):
    """VisPruner (Zhang et al. 2025): some of the budget for what the class row looks at, the rest for patches that repeat no other.

    `share` of it goes to the patches with most attention, the mean over heads at `layer`. The others, in the order of their attention,
    are compared even with odd by cosine as they leave the tower; the `step` even ones most like an odd one go, and so on until the budget
    is left. As released, the even ones that stay stand in the order of their likeness, before the odd ones.
    """

    budget: Budget = 128 / 576
    share: float = 0.5
    step: int = 8
    layer: int = -2

    def check(self, cfg: ViTConfig) -> None:
        super().check(cfg)
        self.taps(cfg)
        if not 0 <= self.share <= 1 or self.step < 1:
            raise UserError(f"share={self.share}, step={self.step} choose nothing; give a share from 0 to 1, and steps of at least 1")

    def taps(self, cfg: ViTConfig) -> Taps:
        return asked(self.layer, cfg)

    def newlines(self) -> str:
        return "none"  # as released for LLaVA-NeXT

    def choose(self, x_BSD, seen, cfg):
        score, M = importance(seen, self.layer, cfg), self.rows(cfg)
        order_BP = jnp.argsort(jnp.where(jnp.isnan(score), jnp.inf, -score), axis=1, stable=True)
        A = int(M * self.share)
        cosine_BPP = cosines(patches(x_BSD, cfg), patches(x_BSD, cfg))
        left = jax.vmap(lambda cosine, order: distinct(cosine, order, M - A, self.step))(cosine_BPP, order_BP[:, A:])
        return jnp.sort(jnp.concatenate([order_BP[:, :A], left], axis=1), axis=1)


def distinct(cosine_PP: jax.Array, order_R: jax.Array, M: int, step: int) -> jax.Array:
    """index_M of rows, given in an order, that are left when those most like another go `step` at a time (VisPruner, sec. 3.3)."""
    R, n, sizes = len(order_R), len(order_R), []
    while n > M > 0:
        sizes.append((n, min(step, n - M, n - n // 2)))
        n -= sizes[-1][1]
    even, odd = jnp.arange(0, R, 2), jnp.arange(1, R, 2)

    def one(order, size):
        n, gone = size
        likeness = jnp.where((odd < n)[None], cosine_PP[order[even]][:, order[odd]], -jnp.inf).max(axis=1, initial=-jnp.inf)
        rank = jnp.argsort(jnp.where(even < n, -likeness, jnp.inf), stable=True)  # of the even ones, the likest first
        stays = (jnp.arange(len(even)) >= gone) & (even[rank] < n)
        line, there = jnp.concatenate([order[even][rank], order[odd]]), jnp.concatenate([stays, odd < n])
        return line[jnp.argsort(~there, stable=True)], None

    if sizes:
        order_R, _ = jax.lax.scan(one, order_R, np.array(sizes, np.int32))
    return order_R[:M]


def aligned(x_BPD: jax.Array, about_D: jax.Array) -> jax.Array:
    """relevance_BP: the mean cosine of a patch with the rows of a text, from 0 for the least of a picture to 1; 1 where all are alike."""
    score = jnp.einsum("bpd,d->bp", unit(x_BPD), about_D.astype(jnp.float32), precision="highest")
    return scaled(score)


def scaled(score_BP: jax.Array) -> jax.Array:
    """Scores from 0 for the least of a picture to 1."""
    low, high = jnp.nanmin(score_BP, axis=1, keepdims=True), jnp.nanmax(score_BP, axis=1, keepdims=True)
    return jnp.where(high > low, (score_BP - low) / jnp.where(high > low, high - low, 1), 1.0)


@dataclass(frozen=True)
class CDPruner(Told):
    """CDPruner (Zhang et al. 2025): the set of patches that a determinantal point process finds most likely, given the text.

    Its kernel is r_i cos(i, j) r_j of rows as the decoder gets them, r a patch's relevance to the text scaled to 0..1; the greedy choice
    adds the patch that multiplies the determinant most. The released code takes the relevance from CLIP's text tower, and the opposite of
    it (`opposite`), as patches of CLIP ask for; our reading is the cosine with the text as the decoder embeds it, the mean over its rows.
    Without a text all patches are equally relevant.
    """

    budget: Budget = 64 / 576
    opposite: bool = False

    def check(self, cfg: ViTConfig) -> None:
        check_budget(self.budget, cfg.patches)

    def rows(self, cfg: ViTConfig) -> int:
        return most_rows(self.budget, cfg.patches)

    def newlines(self) -> str:
        return "none"  # as released for LLaVA-NeXT

    def reduce(self, x_BSD: jax.Array, seen: Seen, cfg: ViTConfig) -> Reduced:
        return self.among(patches(x_BSD, cfg), jnp.ones((len(x_BSD), cfg.patches)), cfg)

    def answer(self, x_BSD: jax.Array, seen: Seen, cfg: ViTConfig, about_D: jax.Array) -> Reduced:
        x = patches(x_BSD, cfg)
        return self.among(x, aligned(x, -about_D if self.opposite else about_D) + 1e-6, cfg)

    def among(self, x_BPD: jax.Array, relevance_BP: jax.Array, cfg: ViTConfig) -> Reduced:
        cosine = cosines(x_BPD, x_BPD)
        cosine = jnp.where(jnp.eye(cfg.patches, dtype=bool) & (cosine > 0.5), 1, cosine)  # so that equal patches are equal
        kernel = relevance_BP[:, :, None] * cosine * relevance_BP[:, None]
        return take(x_BPD, jnp.sort(jax.vmap(lambda k: likeliest(k, self.rows(cfg)))(kernel), axis=1))


def likeliest(kernel_PP: jax.Array, M: int) -> jax.Array:
    """index_M, in the order of choice, of a greedy search for the M rows whose kernel has the largest determinant (Chen et al. 2018).

    gain_i is the squared length of what row i adds to those chosen; a new row takes its direction out of all others.
    """
    P = len(kernel_PP)
    gain_P = jnp.where(jnp.isnan(jnp.diagonal(kernel_PP)), -1.0, jnp.diagonal(kernel_PP))
    kernel_PP = jnp.nan_to_num(kernel_PP, nan=0.0)

    def step(i, state):
        gain_P, basis_MP, index_M = state
        at = jnp.argmax(gain_P)
        rest = kernel_PP[at] - jnp.matmul(basis_MP[:, at], basis_MP, precision="highest")
        # Past the kernel's rank only rounding is left to add; such a row changes nothing for the others.
        new_P = jnp.where(gain_P[at] > 1e-6, rest * jax.lax.rsqrt(jnp.maximum(gain_P[at], 1e-6)), 0)
        return (gain_P - new_P**2).at[at].set(-jnp.inf), basis_MP.at[i].set(new_P), index_M.at[i].set(at)

    return jax.lax.fori_loop(0, M, step, (gain_P, jnp.zeros((M, P), jnp.float32), jnp.zeros(M, jnp.int32)))[2]


@dataclass(frozen=True)
class CATP(Told):
    """CATP (Li et al. 2025), its first stage: patches that differ from each other and go with the text beside them. Our reading.

    Published is that both decide, on rows behind the projector; how they are put together, and how many stay, could not be recovered.
    Here the first patch is the one most relevant to the text, and the next is always the one with the largest sum of its distance
    to the nearest chosen one (1 - cosine) and `text` times its relevance, scaled to 0..1. The text is that of the whole prompt. Without
    a text the patches are those of a k-centre choice. The paper's second stage, in shallow layers of the decoder by the difference of
    attention and by relevance, is not here: its rule could not be recovered.
    """

    budget: Budget = 0.5
    text: float = 1.0

    def check(self, cfg: ViTConfig) -> None:
        check_budget(self.budget, cfg.patches)
        if not self.text >= 0:
            raise UserError(f"text={self.text} rewards patches for not being in the text; give a weight from 0")

    def rows(self, cfg: ViTConfig) -> int:
        return most_rows(self.budget, cfg.patches)

    def reduce(self, x_BSD: jax.Array, seen: Seen, cfg: ViTConfig) -> Reduced:
        return take(patches(x_BSD, cfg), ToDRE(self.budget, total=False).choose(x_BSD, seen, cfg))

    def answer(self, x_BSD: jax.Array, seen: Seen, cfg: ViTConfig, about_D: jax.Array) -> Reduced:
        x = patches(x_BSD, cfg)
        relevance = jnp.nan_to_num(aligned(x, about_D), nan=0.0)

        def one(distance_PP, relevance_P):
            return greedy(distance_PP, jnp.argmax(relevance_P), self.rows(cfg), bonus_P=self.text * relevance_P)

        return take(x, jnp.sort(jax.vmap(one)(1 - cosines(x, x), relevance), axis=1))
