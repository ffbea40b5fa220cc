"""RazorAttention's compensation: one more row a head, the mean of those that were dropped."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct

from tokeff.errors import UserError
from tokeff.kernels import merge
from tokeff.kv.cache import Room, Rows, per_head
from tokeff.kv.evidence import Evidence
from tokeff.kv.keep import Keep
from tokeff.kv.policy import Policy, Prefilled, append
from tokeff.kv.read import read_draft, read_store
from tokeff.models.attention import NEG, scores
from tokeff.models.flow import EMPTY, Accepted, Flow, Here


class Compensated(struct.PyTreeNode):
    """A layer: kept rows, and per head the mean key and value of the others, with the bias of its logit (NEG where none was dropped)."""

    rows: Rows
    k_BKH: jax.Array
    v_BKH: jax.Array
    bias_BK: jax.Array


@dataclass(frozen=True)
class MeanRow(Policy):
    """What `rule` keeps, and a compensation row: the mean rotated key and mean value of the n rows it dropped, which counts n times
    (Tang et al. 2024, RazorAttention, eq. 5: a bias of log n on its logit). weighted=False counts it once, as the deployed code does.

    In a layer with a sliding window the dropped rows leave its sight one by one; there is no compensation row there.
    """

    rule: Keep
    weighted: bool = True

    def needs(self) -> tuple[Evidence, ...]:
        return self.rule.needs()

    def check(self, cfg, length: int) -> None:
        self.rule.check(cfg, length)
        if self.rule.evict:
            raise UserError("the compensation row is made once, at the end of the prompt; set evict=0")

    def role(self, layer: int):
        return self.rule.role(layer)

    def pack_layer(self, rows: Prefilled, room: Room, here: Here) -> Compensated:
        S, index = rows.order_BKS.shape[2], self.rule.choose(rows, here)
        kept = per_head(lambda i: jnp.zeros(S, bool).at[i].set(True, mode="drop"))(index)
        gone = (rows.order_BKS != EMPTY) & ~kept
        n_BK = gone.sum(axis=-1)

        def mean(x_BKSH):
            total = jnp.einsum("bksh,bks->bkh", x_BKSH.astype(jnp.float32), gone.astype(jnp.float32))
            return (total / jnp.maximum(n_BK, 1)[..., None]).astype(x_BKSH.dtype)

        bias = jnp.log(jnp.maximum(n_BK, 1).astype(jnp.float32)) if self.weighted else jnp.zeros(n_BK.shape)
        bias = jnp.where((n_BK > 0) & (here.window is None), bias, NEG)
        return Compensated(self.rule.store(rows, index, room, here), mean(rows.k_BKSH), mean(rows.v_BKSH), bias)

    def attend(self, q, k, v, ask: Flow, new: Flow, layer: Compensated, accepted: Accepted | None, across, here: Here):
        q, k = here.rotate(q, ask.angle_BT[:, :, None]), here.rotate(k, new.angle_BT[:, :, None])
        rows = append(layer.rows, k, v, new, accepted)
        out, lse = merge(*read_store(q, rows, ask, here), *self.read_mean(q, layer, here))
        if ask.among_BTW is not None:
            out, lse = merge(out, lse, *read_draft(q, rows.draft, ask, here))
        return out, layer.replace(rows=rows), across

    def read_mean(self, q: jax.Array, layer: Compensated, here: Here) -> tuple[jax.Array, jax.Array]:
        """(out_BTNH, lse_BTN) over the compensation row alone."""
        logit = scores(q, layer.k_BKH[:, :, None], here.cfg.scale, here.cfg.softcap)[..., 0] + layer.bias_BK[..., None, None]
        B, T, N, H = q.shape
        mean = jnp.broadcast_to(jnp.repeat(layer.v_BKH, N // here.cfg.K, axis=1)[:, None], (B, T, N, H))
        return mean, jnp.moveaxis(logit.reshape(B, N, T), 1, 2)

    def kept(self, layer: Compensated) -> jax.Array:
        """The rows that are held themselves."""
        return layer.rows.order_BKC
