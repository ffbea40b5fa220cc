"""Sinks and a window: StreamingLLM's renumbered cache (keys stored unrotated, rotated on read by their position inside the cache), and
LM-Infinite's capped distances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from tokeff.errors import UserError
from tokeff.kernels import merge
from tokeff.kv.budget import most_rows
from tokeff.kv.cache import Rows, commit, hold, take_rows, visible, write
from tokeff.kv.keep import Keep
from tokeff.kv.policy import Policy, Prefilled
from tokeff.kv.read import read_draft, read_rows, read_store
from tokeff.models.attention import combine, scores, softmax
from tokeff.models.flow import EMPTY, Accepted, Flow, Here


@dataclass(frozen=True)
class Streaming(Keep):
    """Sinks and the most recent rows, evicting at every decode step; positions never exceed the cache (Xiao et al. 2024, sec. 3.2).

    A row's position is the number of rows before it that are still there. Every head keeps the same rows.
    """

    raw_keys: ClassVar[bool] = True

    def stored_keys(self, rows: Prefilled, index_BKM: jax.Array, order_BKM: jax.Array, here: Here) -> jax.Array:
        return here.rotate(take_rows(rows.k_BKSH, index_BKM), jnp.maximum(order_BKM, 0), inverse=True)

    def position(self, order_Bx: jax.Array, layer: Rows, next_B: jax.Array) -> jax.Array:
        """Rank among the stored rows; rows from `next` on are not stored yet and stand behind them one by one."""
        stored_BC = jnp.sort(layer.order_BKC[:, 0], axis=1)
        flat = order_Bx.reshape(order_Bx.shape[0], -1)
        known = jnp.minimum(flat, next_B[:, None])
        rank = jax.vmap(jnp.searchsorted)(stored_BC, known) - (stored_BC == EMPTY).sum(axis=1)[:, None]
        return jnp.maximum(rank + flat - known, 0).reshape(order_Bx.shape)

    def onward(self) -> Policy:
        return self

    def attend(self, q, k, v, ask: Flow, new: Flow, layer: Rows, accepted: Accepted | None, across, here: Here):
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        if new.among_BTW is None:
            layer = write(self.make_room(layer, new.order_BT, here), k, v, new.order_BT)
            next_B = new.order_BT.max(axis=1) + 1
        else:
            assert accepted is not None
            layer = commit(layer, accepted)
            if layer.limit_B is not None:
                layer = self.evict_where(layer, layer.live_B >= layer.limit_B, here)
            layer = hold(layer, k, v, new)
            assert layer.draft is not None
            next_B = layer.draft.order_BW[:, 0]
        q = here.rotate(q, self.position(ask.order_BT, layer, next_B)[:, :, None])
        return read_rows(q, self.rotated(layer, next_B, here), ask, here), layer, across

    def rotated(self, layer: Rows, next_B: jax.Array, here: Here) -> Rows:
        """The store as it is read now. The turned keys live for one layer of one call only."""
        angle = self.position(layer.order_BKC[:, :1], layer, next_B)
        view = layer.replace(k_BKCH=here.rotate(layer.k_BKCH, angle))
        if layer.draft is None:
            return view
        turn = self.position(layer.draft.order_BW, layer, next_B)[:, None]
        return view.replace(draft=layer.draft.replace(k_BKWH=here.rotate(layer.draft.k_BKWH, turn)))


@dataclass(frozen=True)
class LambdaShaped(Keep):
    """LM-Infinite's attention (Han et al. 2023, sec. 4): the first rows and the most recent ones, no further away than `cap`.

    A query `t` meets a row `s` at distance min(t - s, cap). Within the window every distance is true; a sink further off than
    `cap` is seen as if it stood there. cap None: as far as the window reaches. Keys are stored rotated by their own place, and those of
    the few sinks turned on by what exceeds the cap, which is the published capped distance.
    """

    cap: int | None = None

    raw_keys: ClassVar[bool] = True

    def check(self, cfg, length: int) -> None:
        super().check(cfg, length)
        if isinstance(self.sinks, float):
            raise UserError(f"sinks={self.sinks} is a share, and these sinks are turned one by one; give a number of rows")
        window = most_rows(self.budget, length) - self.sinks
        if self.cap is not None and self.cap < window:
            raise UserError(f"cap {self.cap} is shorter than the window of {window} rows; raise it, or give None for the window's length")

    def onward(self) -> Policy:
        return self

    def read(self, q, layer: Rows, ask: Flow, here: Here) -> jax.Array:
        if not self.sinks or (self.cap is None and layer.limit_B is None):
            return read_rows(q, layer, ask, here)
        near = layer.replace(order_BKC=jnp.where(layer.order_BKC < self.sinks, EMPTY, layer.order_BKC))
        out, lse = merge(*read_store(q, near, ask, here), *self.read_sinks(q, layer, ask, here))
        if ask.among_BTW is not None:
            out, _ = merge(out, lse, *read_draft(q, layer.draft, ask, here))
        return out

    def read_sinks(self, q_BTNH, layer: Rows, ask: Flow, here: Here) -> tuple[jax.Array, jax.Array]:
        """(out, lse) over the sinks, which lie in the first slots, each query with keys turned for it."""
        E = min(self.sinks, layer.capacity)
        order, k, v = layer.order_BKC[:, :, :E], layer.k_BKCH[:, :, :E], layer.v_BKCH[:, :, :E]
        order = jnp.where(order < self.sinks, order, EMPTY)
        cap_B = jnp.full_like(layer.live_B, self.cap) if self.cap is not None else jnp.asarray(layer.limit_B) - self.sinks
        place, at = jnp.maximum(order, 0)[:, None], ask.order_BT[:, :, None, None]
        k = here.rotate(here.rotate(k, place[:, 0], inverse=True)[:, None], jnp.maximum(place, at - cap_B[:, None, None, None]))
        (B, T, N, H), K = q_BTNH.shape, k.shape[2]
        logits = scores(q_BTNH.reshape(B * T, 1, N, H), k.reshape(B * T, K, E, H), here.cfg.scale, here.cfg.softcap)
        seen = jnp.moveaxis(visible(order, here.lo(ask.order_BT), ask.hi_BT), 1, 2).reshape(B * T, K, 1, 1, E)
        p, lse = softmax(logits, seen)
        v = jnp.broadcast_to(v[:, None], (B, T, K, E, H)).reshape(B * T, K, E, H)
        return combine(p, v).reshape(B, T, N, H), lse.reshape(B, T, N)
