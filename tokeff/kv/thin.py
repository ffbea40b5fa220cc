"""ThinK (Xu et al. 2024): keys without the channels that matter least to the queries."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct

from tokeff.errors import UserError
from tokeff.kernels import merge
from tokeff.kv.cache import Room, Rows, per_head, visible
from tokeff.kv.coded import check_rule, tail_of
from tokeff.kv.evidence import Evidence, QuerySquares
from tokeff.kv.policy import Policy, Prefilled, append
from tokeff.kv.read import read_draft, read_store
from tokeff.models.attention import combine, scores, softmax
from tokeff.models.flow import EMPTY, Accepted, Flow, Here
from tokeff.sharding import top_k


class Thinned(struct.PyTreeNode):
    """A layer: older rows, whose keys have only the Y channels named for their head, and the rows from the last window on."""

    k_BKCY: jax.Array
    v_BKCH: jax.Array
    order_BKC: jax.Array
    channel_BKY: jax.Array
    tail: Rows


@dataclass(frozen=True)
class Thin(Policy):
    """Of the keys that `rule` keeps of the prompt, each head holds the channels j with the largest |Q_j| * |K_j|: the Frobenius
    norm of what channel j adds to q.k (Xu et al. 2024, eq. 4), Q being the last `window` queries.

    channels: the share of channels that stays. The rows of the window, and all generated ones, keep every channel. The paper scores
    query heads; here the G heads of a group add up their squares, because they share the keys.
    """

    rule: Policy
    channels: float = 0.6
    window: int = 32

    @property
    def ask(self) -> QuerySquares:
        return QuerySquares(self.window)

    def needs(self) -> tuple[Evidence, ...]:
        return tuple(dict.fromkeys((*self.rule.needs(), self.ask)))

    def check(self, cfg, length: int) -> None:
        check_rule(self.rule)
        self.rule.check(cfg, length)
        if not 0 < self.channels <= 1:
            raise UserError(f"channels {self.channels} is not a share of a key; give a fraction in (0, 1]")
        if self.window < 1:
            raise UserError(f"a window of {self.window} queries asks for nothing; give at least 1")

    def role(self, layer: int):
        return self.rule.role(layer)

    def squeeze(self, rows: Prefilled, here: Here) -> Prefilled:
        return self.rule.squeeze(rows, here)

    def pack_layer(self, rows: Prefilled, room: Room, here: Here) -> Thinned:
        kept: Rows = self.rule.pack_layer(rows, Room(0), here)
        old_B = jnp.maximum(kept.live_B - self.window, 0)
        order = jnp.where(jnp.arange(kept.capacity) < old_B[:, None, None], kept.order_BKC, EMPTY)
        old = (order != EMPTY)[..., None]
        worth = rows.evidence_BKS[self.ask] * jnp.where(old, jnp.square(kept.k_BKCH.astype(jnp.float32)), 0).sum(axis=2)
        channel = jnp.sort(top_k(worth, max(1, round(self.channels * here.cfg.H)), "BKH")[1], axis=-1)
        k = per_head(lambda k, at: jnp.take(k, at, axis=1))(jnp.where(old, kept.k_BKCH, 0), channel)
        tail = tail_of(kept, old_B, self.window + room.rows, room.draft)
        return Thinned(k, jnp.where(old, kept.v_BKCH, 0), order, channel, tail)

    def attend(self, q, k, v, ask: Flow, new: Flow, layer: Thinned, accepted: Accepted | None, across, here: Here):
        q, k = here.rotate(q, ask.angle_BT[:, :, None]), here.rotate(k, new.angle_BT[:, :, None])
        tail = append(layer.tail, k, v, new, accepted)
        out, lse = merge(*read_store(q, tail, ask, here), *self.read_thin(q, layer, ask, here))
        if ask.among_BTW is not None:
            out, lse = merge(out, lse, *read_draft(q, tail.draft, ask, here))
        return out, layer.replace(tail=tail), across

    def read_thin(self, q_BTNH, layer: Thinned, ask: Flow, here: Here) -> tuple[jax.Array, jax.Array]:
        """(out_BTNH, lse_BTN) over the older rows: queries lose the same channels."""
        B, T, N, H = q_BTNH.shape
        K = here.cfg.K
        take = per_head(lambda q, at: jnp.take(q, at, axis=-1))
        q = take(jnp.moveaxis(q_BTNH.reshape(B, T, K, N // K, H), 2, 1), layer.channel_BKY)
        q = jnp.moveaxis(q, 1, 2).reshape(B, T, N, q.shape[-1])
        seen = visible(layer.order_BKC, here.lo(ask.order_BT), ask.hi_BT)[:, :, None]
        p, lse = softmax(scores(q, layer.k_BKCY, here.cfg.scale, here.cfg.softcap), seen)
        return combine(p, layer.v_BKCH), jnp.moveaxis(lse, 3, 1).reshape(B, T, N)

    def kept(self, layer: Thinned) -> jax.Array:
        return jnp.concatenate([layer.order_BKC, layer.tail.order_BKC], axis=-1)
