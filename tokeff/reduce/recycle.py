"""SparseVLM: picture rows that the question's own words rate, and clusters of the dropped ones that go on in their places."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.errors import UserError
from tokeff.kv.budget import Budget
from tokeff.models.attention import NEG
from tokeff.models.flow import EMPTY, Flow, Here
from tokeff.reduce.cascade import Depth, best_rows, looked_at, sound
from tokeff.reduce.peaks import density_peaks
from tokeff.reduce.pictures import Renumbered

BLOCK = 128  # rows of a picture whose match with the text is held at a time


@dataclass(frozen=True)
class SparseVLM(Renumbered):
    """SparseVLM (Zhang et al. 2024), as in version 1.5 of its code: picture rows rated by some rows of the question, after several layers;
    positions renumbered.

    Raters (sec. 3.2) are the rows behind the last picture that match it above average as they enter the network: `raters`; all of them
    where none is above, as where there is but one. A picture row's
    score is their attention in the layer below a stage, the mean over heads and raters. Recycling (sec. 3.4): of the rows that are
    dropped, the best `recycle` and one more fall into clusters, a tenth of them and one more (`density_peaks`); the mean of each goes on.
    It stands at the place of its centre; the released code puts clusters behind the picture. Stages are named by the layer that dropped
    rows do not enter: (3, 7, 16) of 32 for "after 2, 6, 15". Defaults: those, and the counts for 192 of 576 rows in the mean, as shares.
    """

    at: tuple[Depth, ...] = (3 / 32, 7 / 32, 0.5)
    keep: tuple[Budget, ...] = (0.52, 0.347, 0.19)
    recycle: float = 0.3

    def check_layers(self, cfg) -> None:
        super().check_layers(cfg)
        if self.layers(cfg)[0] < 1:
            raise UserError("SparseVLM rates rows in the layer below a stage; give stages from layer 1 on")

    def check(self, cfg, length: int) -> None:
        super().check(cfg, length)
        if not 0 <= self.recycle <= 1:
            raise UserError(f"recycle {self.recycle} of the dropped rows is no share; give a fraction from 0 to 1")

    def looks(self, cfg) -> tuple[int, ...]:
        return tuple(layer - 1 for layer in self.layers(cfg))

    def role(self, layer: int, cfg):
        stages = self.layers(cfg)
        return layer if layer == 0 or layer in stages or layer + 1 in stages else None

    def left(self, stage: int, seen: int) -> int:
        now = self.left(stage - 1, seen) if stage else seen
        keep = min(super().left(stage, seen), now)
        return keep + int(self.again(np.asarray(now - keep))[1])

    def again(self, gone):
        """(how many of so many dropped rows are recycled, how many clusters they make), of an array of numbers."""
        rows = ((gone * self.recycle + 1e-4) // 1 + 1) * ((gone > 0) & (self.recycle > 0))
        return rows, (rows // 10 + 1) * (rows > 0)

    def note(self, q_BTNH, k_BTKH, flow, here):
        below = here.layer + 1 in self.layers(here.cfg)
        if here.layer != 0 and not below:
            return flow
        good, q, k = sound(flow, q_BTNH, k_BTKH)
        seen, asks = self.pictured(good), self.asking(good)
        if here.layer == 0:
            good = good.replace(score_BT=raters(good.x_BTD, seen, asks).astype(jnp.float32))
        assert good.score_BT is not None
        rates = jnp.where(asks, good.score_BT, 0)
        rates = jnp.where(rates.any(axis=1, keepdims=True), rates, asks)
        score = rates
        if below:
            looked = looked_at(q, k, good, here, rates / jnp.maximum(rates.sum(axis=1, keepdims=True), 1), last=self.behind or None)
            score = jnp.where(seen, looked, rates)
        return flow.replace(score_BT=jnp.where(good.order_BT == EMPTY, jnp.nan, score))

    def parted(self, flow: Flow, here: Here) -> tuple[jax.Array, jax.Array]:
        """(the picture rows that stay, of each row at what row its cluster stands or EMPTY)."""
        keep_B, (flow,) = self.kept(flow, here), sound(flow)
        seen = self.pictured(flow)
        assert flow.score_BT is not None
        T = seen.shape[1]
        index = best_rows(flow.score_BT, jnp.zeros_like(seen), seen, keep_B, T)
        stay = jax.vmap(lambda i: jnp.zeros(T + 1, bool).at[jnp.where(i == EMPTY, T, i)].set(True)[:T])(index)
        R, C = (min(int(n), T) for n in self.again(np.asarray(T)))
        if R == 0:
            return stay, jnp.full(seen.shape, EMPTY, jnp.int32)
        rows_B, many_B = (n.astype(jnp.int32) for n in self.again((seen & ~stay).sum(axis=1)))
        centre = jax.vmap(partial(recycled, R=R, C=C))(flow.x_BTD, flow.score_BT, seen & ~stay, rows_B, many_B)
        return stay, centre

    def choose(self, q_BTNH, k_BTKH, flow, here):
        seen, real = self.pictured(flow), flow.order_BT != EMPTY
        stay, centre = self.parted(flow, here)
        sure = (real & ~seen) | stay | (centre == jnp.arange(seen.shape[1]))
        return best_rows(jnp.zeros(seen.shape), sure, sure, sure.sum(axis=1), self.most(self.stage(here), seen.shape[1]))

    def take(self, flow, index_BM, here):
        _, centre = self.parted(flow, here)
        return super().take(flow.replace(x_BTD=jax.vmap(means)(flow.x_BTD, centre)), index_BM, here)


def raters(x_BTD: jax.Array, seen_BT: jax.Array, text_BT: jax.Array) -> jax.Array:
    """Which rows of the text rate the picture: those whose share of a picture row's match (softmax over the text of plain products, the
    mean over picture rows) is above the mean of all text rows."""
    x, T = x_BTD.astype(jnp.float32), x_BTD.shape[1]

    def part(block):  # T x T products are never held at once
        y_BVD, these_BV = block
        match = jnp.where(text_BT[:, None], jnp.einsum("bvd,btd->bvt", y_BVD, x, precision="highest"), NEG)
        return jnp.where(text_BT[:, None] & these_BV[..., None], jax.nn.softmax(match, axis=2), 0).sum(axis=1)

    size = min(BLOCK, T)
    blocks = (jnp.pad(a, ((0, 0), (0, -T % size), *(((0, 0),) * (a.ndim - 2)))) for a in (x, seen_BT))
    blocks = tuple(jnp.moveaxis(a.reshape(len(a), -1, size, *a.shape[2:]), 1, 0) for a in blocks)
    share = jax.lax.map(part, blocks).sum(axis=0)
    mean = share.sum(axis=1, keepdims=True) / jnp.maximum(text_BT.sum(axis=1, keepdims=True), 1)
    return (share > mean) & text_BT


def recycled(x_TD: jax.Array, score_T: jax.Array, gone_T: jax.Array, rows: jax.Array, many: jax.Array, *, R: int, C: int) -> jax.Array:
    """at_T: of the `rows` best rows that are gone, at what row their cluster stands; EMPTY for all others.

    The `many` best `density_peaks` over as many nearest rows are centres, and the rest joins the nearest (sec. 3.4).
    """
    value, index = jax.lax.top_k(jnp.where(gone_T, jnp.nan_to_num(score_T, nan=NEG), -jnp.inf), R)
    there = (value > -jnp.inf) & (jnp.arange(R) < rows)
    peak_R, d_RR = density_peaks(x_TD[index], there, many, C)
    _, centre_C = jax.lax.top_k(peak_R, C)
    used_C = jnp.arange(C) < many
    label_R = jnp.argmin(jnp.where(used_C[:, None], d_RR[centre_C], jnp.inf), axis=0)
    label_R = label_R.at[jnp.where(used_C, centre_C, R)].set(jnp.arange(C), mode="drop")
    at = jnp.where(there, index[centre_C[label_R]], EMPTY)
    return jnp.full(len(gone_T), EMPTY, jnp.int32).at[index].set(at.astype(jnp.int32))


def means(x_TD: jax.Array, at_T: jax.Array) -> jax.Array:
    """Rows with the mean of each cluster at its centre; the others as they are."""
    T = len(at_T)
    put = jnp.where(at_T == EMPTY, T, at_T)
    total = jnp.zeros((T, x_TD.shape[1]), jnp.float32).at[put].add(x_TD.astype(jnp.float32), mode="drop")
    count = jnp.zeros(T, jnp.float32).at[put].add(1.0, mode="drop")[:, None]
    return jnp.where(count > 0, (total / jnp.maximum(count, 1)).astype(x_TD.dtype), x_TD)
