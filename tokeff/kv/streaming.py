"""StreamingLLM's renumbered cache: keys stored unrotated, rotated on read by their position inside the cache."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from tokeff.kv.cache import Rows, commit, hold, take_rows, write
from tokeff.kv.keep import Keep
from tokeff.kv.policy import Prefilled
from tokeff.kv.read import read_rows
from tokeff.models.flow import EMPTY, Accepted, Flow, Here


@dataclass(frozen=True)
class Streaming(Keep):
    """Sinks and the most recent rows, evicting at every decode step; positions never exceed the cache (Xiao et al. 2024, sec. 3.2).

    A row's position is the number of rows before it that are still there. Every head keeps the same rows.
    """

    def stored_keys(self, rows: Prefilled, index_BKM: jax.Array, order_BKM: jax.Array, here: Here) -> jax.Array:
        return here.rotate(take_rows(rows.k_BKSH, index_BKM), jnp.maximum(order_BKM, 0), inverse=True)

    def position(self, order_Bx: jax.Array, layer: Rows, next_B: jax.Array) -> jax.Array:
        """Rank among the stored rows; rows from `next` on are not stored yet and stand behind them one by one."""
        stored_BC = jnp.sort(layer.order_BKC[:, 0], axis=1)
        flat = order_Bx.reshape(order_Bx.shape[0], -1)
        known = jnp.minimum(flat, next_B[:, None])
        rank = jax.vmap(jnp.searchsorted)(stored_BC, known) - (stored_BC == EMPTY).sum(axis=1)[:, None]
        return jnp.maximum(rank + flat - known, 0).reshape(order_Bx.shape)

    def attend(self, q, k, v, ask: Flow, new: Flow, layer: Rows, accepted: Accepted | None, across, here: Here):
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        if new.among_BTT is None:
            layer = write(self.make_room(layer, new.order_BT, here), k, v, new.order_BT)
            next_B = new.order_BT.max(axis=1) + 1
        else:
            assert accepted is not None
            layer = commit(layer, accepted)
            if layer.limit_B is not None:
                layer = self.evict_where(layer, layer.live_B >= layer.limit_B, here)
            layer = hold(layer, k, v, new.order_BT)
            next_B = new.order_BT[:, 0]
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
