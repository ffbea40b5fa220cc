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
from tokeff.reduce.cascade import Depth, best_rows, looked_at
from tokeff.reduce.pictures import Renumbered


@dataclass(frozen=True)
class SparseVLM(Renumbered):
    """SparseVLM (Zhang et al. 2024), as in version 1.5 of its code: picture rows rated by some rows of the question, after several layers;
    positions renumbered.

    Raters (sec. 3.2) are the rows behind the last picture that match it above average as they enter the network: `raters`. A picture row's
    score is their attention in the layer below a stage, the mean over heads and raters. Recycling (sec. 3.4): of the rows that are
    dropped, the best `recycle` and one more fall into clusters, a tenth of them and one more (`density_peaks`); the mean of each goes on.
    It stands at the place of its centre; the released code puts clusters behind the picture. Stages are named by the layer that dropped
    rows do not enter: (3, 7, 16) of 32 for "after 2, 6, 15". Defaults: those, and the counts for 192 of 576 rows in the mean, as shares.
    """

    at: tuple[Depth, ...] = (3 / 32, 7 / 32, 0.5)
    keep: tuple[Budget, ...] = (0.52, 0.347, 0.19)
    recycle: float = 0.3

    def check(self, cfg, length: int) -> None:
        super().check(cfg, length)
        if self.layers(cfg)[0] < 1:
            raise UserError("SparseVLM rates rows in the layer below a stage; give stages from layer 1 on")
        if not 0 <= self.recycle <= 1:
            raise UserError(f"recycle {self.recycle} of the dropped rows is no share; give a fraction from 0 to 1")

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
        seen = self.pictured(flow)
        if here.layer == 0:
            flow = flow.replace(score_BT=raters(flow.x_BTD, seen, self.asking(flow)).astype(jnp.float32))
        if here.layer + 1 not in self.layers(here.cfg):
            return flow
        assert flow.score_BT is not None
        rates = jnp.where(seen, 0, flow.score_BT)
        looked = looked_at(q_BTNH, k_BTKH, flow, here, rates / jnp.maximum(rates.sum(axis=1, keepdims=True), 1))
        return flow.replace(score_BT=jnp.where(seen, looked, rates))

    def parted(self, flow: Flow, here: Here) -> tuple[jax.Array, jax.Array]:
        """(the picture rows that stay, of each row at what row its cluster stands or EMPTY)."""
        seen, keep_B = self.pictured(flow), self.kept(flow, here)
        assert flow.score_BT is not None
        T = seen.shape[1]
        index = best_rows(flow.score_BT, jnp.zeros_like(seen), seen, keep_B, T)
        stay = jax.vmap(lambda i: jnp.zeros(T + 1, bool).at[jnp.where(i == EMPTY, T, i)].set(True)[:T])(index)
        R, C = (min(int(n), T) for n in self.again(np.asarray(T)))
        if R == 0:
            return stay, jnp.full(seen.shape, EMPTY, jnp.int32)
        rows_B, many_B = (n.astype(jnp.int32) for n in self.again(seen.sum(axis=1) - keep_B))
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
    x = x_BTD.astype(jnp.float32)
    match = jnp.where(text_BT[:, None], jnp.einsum("bvd,btd->bvt", x, x, precision="highest"), NEG)
    share = jnp.where(text_BT[:, None] & seen_BT[:, :, None], jax.nn.softmax(match, axis=2), 0).sum(axis=1)
    mean = share.sum(axis=1, keepdims=True) / jnp.maximum(text_BT.sum(axis=1, keepdims=True), 1)
    return (share > mean) & text_BT


def recycled(x_TD: jax.Array, score_T: jax.Array, gone_T: jax.Array, rows: jax.Array, many: jax.Array, *, R: int, C: int) -> jax.Array:
    """at_T: of the `rows` best rows that are gone, at what row their cluster stands; EMPTY for all others."""
    value, index = jax.lax.top_k(jnp.where(gone_T, jnp.nan_to_num(score_T, nan=NEG), -jnp.inf), R)
    there = (value > -jnp.inf) & (jnp.arange(R) < rows)
    centre_C, label_R = density_peaks(x_TD[index], there, many, C)
    at = jnp.where(there, index[centre_C[label_R]], EMPTY)
    return jnp.full(len(gone_T), EMPTY, jnp.int32).at[index].set(at.astype(jnp.int32))


def density_peaks(x_RD: jax.Array, there_R: jax.Array, many: jax.Array, C: int) -> tuple[jax.Array, jax.Array]:
    """(centre_C, the first `many` of them in use; label_R, which centre each row belongs to) of density peaks over nearest neighbours.

    Density of a row: exp of minus the mean squared distance to its `many` nearest rows, itself among them, distances divided by sqrt(D).
    Centres are the rows with the largest product of density and distance to the nearest denser row; the rest joins the nearest centre
    (Du et al. 2016; SparseVLM, sec. 3.4). Equal densities stay equal; the released code adds noise.
    """
    x, R = x_RD.astype(jnp.float32), len(x_RD)
    square = jnp.square(x).sum(axis=1)
    d = jnp.maximum(square[:, None] + square[None] - 2 * jnp.matmul(x, x.T, precision="highest"), 0) / x.shape[1]
    d = jnp.where(jnp.eye(R, dtype=bool), 0, jnp.sqrt(d))
    both = there_R[:, None] & there_R[None]
    near = jnp.sort(jnp.where(both, d, jnp.inf), axis=1)[:, :C]
    among = jnp.arange(near.shape[1]) < many
    density = jnp.exp(-jnp.where(among, jnp.square(near), 0).sum(axis=1) / jnp.maximum(many, 1))
    far = jnp.where(both, d, 0).max()
    apart = jnp.where(both & (density[None] > density[:, None]), d, far).min(axis=1)
    _, centre = jax.lax.top_k(jnp.where(there_R, apart * density, -1.0), min(C, R))
    used = jnp.arange(len(centre)) < many
    label = jnp.argmin(jnp.where(used[:, None], d[centre], jnp.inf), axis=0)
    return centre, label.at[jnp.where(used, centre, R)].set(jnp.arange(len(centre)), mode="drop")


def means(x_TD: jax.Array, at_T: jax.Array) -> jax.Array:
    """Rows with the mean of each cluster at its centre; the others as they are."""
    T = len(at_T)
    put = jnp.where(at_T == EMPTY, T, at_T)
    total = jnp.zeros((T, x_TD.shape[1]), jnp.float32).at[put].add(x_TD.astype(jnp.float32), mode="drop")
    count = jnp.zeros(T, jnp.float32).at[put].add(1.0, mode="drop")[:, None]
    return jnp.where(count > 0, (total / jnp.maximum(count, 1)).astype(x_TD.dtype), x_TD)
