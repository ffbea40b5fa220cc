"""Patches that leave while the tower runs: FlowCut drops them layer by layer, MustDrop merges windows that look alike behind the first.

How many go depends on the picture. So all rows stay where they are, and those that are gone are read by none: the tower computes what it
would over fewer rows, and does not compute less. What is saved is saved in the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from tokeff.errors import UserError
from tokeff.kv.budget import Budget, check_budget, most_rows
from tokeff.models.vit import attention, embed_patches, mlp
from tokeff.models.vit_config import ViTBlock, ViTConfig, ViTParams
from tokeff.reduce.visual import Reduced, Walked, cosines, take, upto


@partial(jax.jit, static_argnames="cfg")
def block(w: ViTBlock, x_BSD: jax.Array, there_BS: jax.Array, *, cfg: ViTConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(x_BSD, cls_BNS, v_BSNH) of one layer, in which rows that are not `there` are read by none. cls: the first row's attention."""
    x, p_BNTS, made = attention(w, cfg, x_BSD, there_BS.astype(jnp.float32))  # a row that stands for none draws no attention
    return mlp(w, cfg, x), p_BNTS[:, :, 0], made["v"]


def everything(cfg: ViTConfig, B: int) -> jax.Array:
    """there_BS before anything is gone."""
    return jnp.ones((B, cfg.S), bool)


def side_by_side(x_BSD: dict[int, jax.Array], layers: tuple[int, ...], cfg: ViTConfig) -> jax.Array:
    """x_BPI of patches, those of `layers` side by side."""
    return jnp.concatenate([x_BSD[i][:, int(cfg.cls) :] for i in layers], axis=2)


@dataclass(frozen=True)
class FlowCut(Walked):
    """FlowCut (Tong et al. 2025): patches go every other layer, as many as the class row's attention is far from even.

    A patch's score is (a + s) |v|_1: the class row's attention, the softmax of the class row's value with all values, both the mean over
    heads and adding up to 1 over the patches that are left; and the length of its mean value. What counts is a running mean, half old and
    half new. With n layers to go and N patches left, round((N - M) / sqrt(n) (1 - (entropy / log N)^2)) go; with none to go, all but M. As
    released, n counts layers, not the cuts among them. The last cut is one layer below the features. For crops the released code gives each
    half of the budget and cuts again in the decoder; of their newlines it keeps none. Of a batch its largest cut is every picture's; here
    each has its own.
    """

    budget: Budget = 128 / 576
    every: int = 2
    keep: float = 0.5

    def check(self, cfg: ViTConfig) -> None:
        check_budget(self.budget, cfg.patches)
        if not cfg.cls:
            raise UserError(f"FlowCut ranks by the class row, which {cfg.name} has none of; use FasterVLM or DivPrune")
        if self.every < 1 or not 0 <= self.keep < 1:
            raise UserError(f"every={self.every}, keep={self.keep} is no running mean; give every from 1 and keep from 0 up to 1")

    def rows(self, cfg: ViTConfig) -> int:
        return most_rows(self.budget, cfg.patches)

    def newlines(self) -> str:
        return "none"

    def walk(self, params: ViTParams, cfg: ViTConfig, pixels_BYXC: jax.Array, layers: tuple[int, ...]) -> Reduced:
        if (top := max(layers)) < 1:
            raise UserError(f"FlowCut cuts below the features, which are those of layer {top}; use FasterVLM")
        x = embed_patches(params, cfg, pixels_BYXC)
        there, running, found = everything(cfg, len(x)), None, {}
        for i in range(top + 1):
            x, cls, v = block(params.blocks[i], x, there, cfg=cfg)
            if i in layers:
                found[i] = x
            if (left := top - 1 - i) >= 0:
                running, there = flow_cut(running, cls, v, there, jnp.float32(left), method=self, cfg=cfg, cut=left % self.every == 0)
        patches = side_by_side(found, layers, cfg)
        index, _ = upto(there[:, 1:].astype(jnp.float32), jnp.full(len(x), self.rows(cfg)), self.rows(cfg))
        return take(patches, index)


@partial(jax.jit, static_argnames=("method", "cfg", "cut"))
def flow_cut(running_BP, cls_BNS, v_BSNH, there_BS, left, *, method: FlowCut, cfg: ViTConfig, cut: bool):
    """(running_BP, there_BS) behind a layer with `left` layers to go until the last cut. cut: patches go here."""
    there, M = there_BS[:, 1:], method.rows(cfg)
    a_BP = share(cls_BNS.mean(axis=1)[:, 1:], there)
    score = jnp.where(there, flow_score(a_BP, v_BSNH, there_BS), 0)
    running = score if running_BP is None else method.keep * running_BP + (1 - method.keep) * score
    if not cut:
        return running, there_BS
    N = there.sum(axis=1)
    entropy = -jnp.where(a_BP > 0, a_BP * jnp.log(jnp.maximum(a_BP, 1e-37)), 0).sum(axis=1)
    gone = jnp.round((N - M) / jnp.sqrt(jnp.maximum(left, 1)) * (1 - (entropy / jnp.log(jnp.maximum(N, 2))) ** 2)).astype(jnp.int32)
    stay = jnp.where(N <= M, N, jnp.where(left == 0, M, jnp.maximum(N - gone, M)))
    rank = jnp.argsort(jnp.argsort(jnp.where(there, -running, jnp.inf), axis=1, stable=True), axis=1)
    return running, jnp.concatenate([there_BS[:, :1], there & (rank < stay[:, None])], axis=1)


def share(score_BP: jax.Array, there_BP: jax.Array) -> jax.Array:
    """Scores of the rows that are there, adding up to 1."""
    score = jnp.where(there_BP, score_BP.astype(jnp.float32), 0)
    return score / jnp.maximum(score.sum(axis=1, keepdims=True), 1e-37)


def flow_score(a_BP: jax.Array, v_BSNH: jax.Array, there_BS: jax.Array) -> jax.Array:
    """score_BP: (attention + likeness of values) times the length of the mean value (FlowCut, sec. 3)."""
    v = v_BSNH.astype(jnp.float32)
    logits = jnp.einsum("bnh,bsnh->bns", v[:, 0], v, precision="highest")
    like = jax.nn.softmax(jnp.where(there_BS[:, None], logits, -jnp.inf), axis=2).mean(axis=1)
    return (a_BP + share(like[:, 1:], there_BS[:, 1:])) * jnp.abs(v.mean(axis=2)[:, 1:]).sum(axis=2)


@dataclass(frozen=True)
class MustDrop(Walked):
    """MustDrop (Liu et al. 2024), its stage in the tower: behind the first layer, windows of patches that are like each other are merged.

    A window goes where the cosine of its pairs, the mean over all of them, reaches `like`; it becomes its mean, at the place of its first
    patch, and the rest of the tower runs on what is left.
    The released code puts merged rows first and merges as many windows in every picture of a batch; here rows stay in reading order. The
    paper's key set, the 8% of patches that the class row looks at most in the last layer and that no later stage may drop, is not made.
    """

    like: float = 0.8
    window: tuple[int, int] = (3, 3)

    def check(self, cfg: ViTConfig) -> None:
        if min(self.window) < 1 or max(self.window) < 2 or any(side % w for side, w in zip(cfg.grid, self.window)):
            raise UserError(f"windows of {self.window} do not tile {cfg.grid} patches; give sides that divide them")

    def rows(self, cfg: ViTConfig) -> int:
        """The most there can be: all patches, where no window is merged."""
        return cfg.patches

    def fewest(self, cfg: ViTConfig, crops: int) -> int:
        return crops * cfg.patches // (self.window[0] * self.window[1])

    def walk(self, params: ViTParams, cfg: ViTConfig, pixels_BYXC: jax.Array, layers: tuple[int, ...]) -> Reduced:
        if not 0 <= (top := max(layers)) < cfg.L:
            raise UserError(f"layers {layers} are not of {cfg.name}; give 0 to {cfg.L - 1}")
        x, found = embed_patches(params, cfg, pixels_BYXC), {}
        there = everything(cfg, len(x))
        for i in range(top + 1):
            x, *_ = block(params.blocks[i], x, there, cfg=cfg)
            if i == 0:
                x, there = merged_windows(x, cfg=cfg, like=self.like, window=self.window)
            if i in layers:
                found[i] = x
        there_BP = there[:, int(cfg.cls) :]
        index, real = upto(there_BP.astype(jnp.float32), there_BP.sum(axis=1), cfg.patches)
        return take(side_by_side(found, layers, cfg), index, real)


@partial(jax.jit, static_argnames=("cfg", "like", "window"))
def merged_windows(x_BSD: jax.Array, *, cfg: ViTConfig, like: float, window: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """(x_BSD, there_BS): windows whose patches are alike hold their mean in their first patch; their other patches are not there."""
    (lines, columns), (h, w), B, first = cfg.grid, window, len(x_BSD), int(cfg.cls)
    tiles = x_BSD[:, first:].reshape(B, lines // h, h, columns // w, w, cfg.D).swapaxes(2, 3).reshape(-1, h * w, cfg.D)
    cosine = cosines(tiles, tiles) * (1 - jnp.eye(h * w))
    alike = cosine.sum(axis=(1, 2)) / (h * w * (h * w - 1)) >= like
    leads = alike[:, None] & (jnp.arange(h * w) == 0)
    mean = tiles.astype(jnp.float32).mean(axis=1, keepdims=True).astype(x_BSD.dtype)

    def back(tile):
        return tile.reshape(B, lines // h, columns // w, h, w, -1).swapaxes(2, 3).reshape(B, cfg.patches, -1)

    x = jnp.concatenate([x_BSD[:, :first], back(jnp.where(leads[..., None], mean, tiles))], axis=1)
    there = back(leads | ~alike[:, None])[..., 0]
    return x, jnp.concatenate([jnp.ones((B, first), bool), there], axis=1)
