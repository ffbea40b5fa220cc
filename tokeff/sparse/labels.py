"""Double Sparsity (Yang et al. 2024): a few channels of every key, kept side by side, stand for the key when rows are chosen."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct

from tokeff.errors import UserError
from tokeff.kv.cache import Rows, per_head
from tokeff.kv.hosted import Store, near_at
from tokeff.kv.policy import Prefilled
from tokeff.models.attention import scores
from tokeff.models.flow import EMPTY, Here
from tokeff.sparse.select import Readable, Selector

Channels = tuple[tuple[tuple[int, ...], ...], ...]


class Labelled(struct.PyTreeNode):
    """The label cache: Y channels of every stored key, and which ones those are."""

    label_BKCY: jax.Array
    channel_BKY: jax.Array


@dataclass(frozen=True)
class Labels(Selector):
    """The rows with the largest q.k over a `share` of the channels, summed over the query heads of a kv head (sec. 3.2).

    channels: which, for each layer and kv head, as `tokeff.sparse.calibrate` finds them on a text; None takes those whose prompt keys
    are largest on average, one of the paper's measures, from the prompt at hand. The label cache has the cache's dtype; the
    paper stores it in 4 bits or fewer.
    """

    share: float = 0.25
    channels: Channels | None = None

    def width(self, H: int) -> int:
        return max(1, round(self.share * H))

    def check(self, cfg, length: int) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"labels {self.share} are not a share of the channels; give a fraction in (0, 1]")
        if self.channels is None:
            return
        shape = {(len(self.channels), len(layer), len(head)) for layer in self.channels for head in layer}
        if shape != {(cfg.L, cfg.K, self.width(cfg.H))}:
            raise UserError(f"channels are not {self.width(cfg.H)} for each of {cfg.K} heads and {cfg.L} layers; calibrate on this model")

    def by_head(self) -> str | None:
        return None if self.channels is None else "its channels are listed for all heads; leave out channels"

    def summary(self, rows: Prefilled, store: Rows, here: Here) -> Labelled:
        B, K, _, H = store.k_BKCH.shape
        if self.channels is None:
            real = (store.order_BKC != EMPTY)[..., None]
            _, channel = jax.lax.top_k(jnp.where(real, jnp.abs(store.k_BKCH.astype(jnp.float32)), 0).sum(axis=2), self.width(H))
        else:
            channel = jnp.broadcast_to(jnp.asarray(self.channels, jnp.int32)[rows.index], (B, K, self.width(H)))
        return Labelled(jnp.take_along_axis(store.k_BKCH, channel[:, :, None], axis=3), channel)

    def arrive(self, summary: Labelled, store: Store, slot_BT: jax.Array, here: Here) -> Labelled:
        B, K, C, _ = summary.label_BKCY.shape
        T = slot_BT.shape[1]
        slot = jnp.broadcast_to(slot_BT[:, None], (B, K, T))
        label = jnp.take_along_axis(near_at(store, slot)[0], summary.channel_BKY[:, :, None], axis=3)
        slot = jnp.where(slot == EMPTY, C + jnp.arange(T), slot)
        put = per_head(lambda x, s, new: x.at[s].set(new, mode="drop", unique_indices=True))
        return summary.replace(label_BKCY=put(summary.label_BKCY, slot, label))

    def worth(self, q_BTNH: jax.Array, layer: Readable, open_BKTP: jax.Array, here: Here) -> jax.Array:
        labels: Labelled = layer.summary
        B, T, N, H = q_BTNH.shape
        K = here.cfg.K
        q = jnp.take_along_axis(q_BTNH.reshape(B, T, K, N // K, H), labels.channel_BKY[:, None, :, None], axis=4)
        return scores(q.reshape(B, T, N, -1), labels.label_BKCY, here.cfg.scale, 0.0).sum(axis=2)
