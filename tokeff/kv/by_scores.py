"""Reading decided by the scores themselves: more bits of the keys where attention is flat, values of the rows with most of it alone.

SpAtten's progressive quantisation and local value pruning (Wang et al. 2021, sec. III-C and III-D). A row is written down as it arrives, by
itself, and what a query reads depends on that query alone; so drafts, and any number of rows at once, read what one row at a time would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from tokeff.errors import UserError
from tokeff.kv.budget import Budget, most_rows, rows_of
from tokeff.kv.cache import Draft, Room, Rows, accepted_orders, among, empty_draft, hold, per_head, take_rows, visible, whole_tiles
from tokeff.kv.coded import check_rule
from tokeff.kv.planes import Planes, Split
from tokeff.kv.policy import Policy, Prefilled, pad_slots, tree_bytes
from tokeff.models.attention import combine, scores, softmax
from tokeff.models.flow import EMPTY, Accepted, Flow, Here
from tokeff.sharding import top_k


class Scored(struct.PyTreeNode):
    """A layer: keys as they are (k_BKCH) or in planes, values, orders; slots are filled in order.

    values_B: of how many rows a query of each sequence reads values, at most `most`. calls_B, again_BK: how often a sequence was asked,
    and how often the low bits of a head were read for it.
    """

    k_BKCH: jax.Array | None
    planes: Planes | None
    v_BKCH: jax.Array
    order_BKC: jax.Array
    live_B: jax.Array
    values_B: jax.Array
    calls_B: jax.Array
    again_BK: jax.Array
    draft: Draft | None
    most: int = struct.field(pytree_node=False)


@dataclass(frozen=True)
class ByScores(Policy):
    """rule: what is kept of the prompt, `Full()` or a `Keep` without eviction. keys: how keys are written, None for as they are.

    values: of how many rows a query reads values, a share of those that `rule` kept, or a number: of each kv head those with the most
    probability, summed over its query heads. Probabilities stay those of all rows. 1.0 reads all, of what comes too.
    """

    rule: Policy
    keys: Split | None = None
    values: Budget = 1.0

    def needs(self):
        return self.rule.needs()

    def check(self, cfg, length: int) -> None:
        check_rule(self.rule)
        self.rule.check(cfg, length)
        if self.keys is not None:
            self.keys.check(cfg)
        share, number = isinstance(self.values, float), type(self.values) in (int, float)
        if not number or not 0 < self.values <= (1 if share else length):
            raise UserError(f"values={self.values!r} is no number of {length} rows; give a share of them in (0, 1], or 1 to {length}")

    def role(self, layer: int) -> Any:
        return self.rule.role(layer)

    @property
    def whole(self) -> bool:
        """Every value is read."""
        return isinstance(self.values, float) and self.values == 1.0

    def squeeze(self, rows: Prefilled, here: Here) -> Prefilled:
        return self.rule.squeeze(rows, here)

    def pack_layer(self, rows: Prefilled, room: Room, here: Here) -> Scored:
        kept: Rows = self.rule.pack_layer(rows, Room(0), here)
        C = whole_tiles(kept.capacity + room.rows, kept.k_BKCH.dtype)
        k, v = pad_slots(kept.k_BKCH, C, 2), pad_slots(kept.v_BKCH, C, 2)
        order, (B, K) = pad_slots(kept.order_BKC, C, 2, EMPTY), k.shape[:2]
        values, none = rows_of(self.values, kept.live_B), jnp.zeros(B, jnp.int32)
        plain, planes = (k, None) if self.keys is None else (None, self.keys.encode(k))
        draft, most = empty_draft(k, room.draft), most_rows(self.values, kept.capacity)
        return Scored(plain, planes, v, order, kept.live_B, values, none, jnp.zeros((B, K), jnp.int32), draft, most)

    def attend(self, q, k, v, ask: Flow, new: Flow, layer: Scored, accepted: Accepted | None, across, here: Here):
        q, k = here.rotate(q, ask.angle_BT[:, :, None]), here.rotate(k, new.angle_BT[:, :, None])
        layer = self.append(layer, k.swapaxes(1, 2), v.swapaxes(1, 2), new, accepted)
        draft = None if ask.among_BTW is None else layer.draft
        p, layer = self.probabilities(q.astype(layer.v_BKCH.dtype), layer, draft, ask, here)
        out = add_up(p, layer.v_BKCH, draft) if self.whole else add_best(p, layer, draft)
        return out, layer, across

    def append(self, layer: Scored, k_BKTH, v_BKTH, new: Flow, accepted: Accepted | None) -> Scored:
        """This call's rows: certain ones to slots, draft rows aside after the accepted ones moved in."""
        if new.among_BTW is None:
            return self.put(layer, k_BKTH, v_BKTH, new.order_BT)
        draft = layer.draft
        assert accepted is not None and draft is not None, "this cache was packed without room for drafts"
        path = jnp.broadcast_to(accepted.path_BW[:, None], draft.k_BKWH.shape[:3])
        held: Any = self.put(layer, take_rows(draft.k_BKWH, path), take_rows(draft.v_BKWH, path), accepted_orders(draft, accepted))
        return hold(held, k_BKTH, v_BKTH, new)  # type: ignore[return-value]

    def put(self, layer: Scored, k_BKTH: jax.Array, v_BKTH: jax.Array, order_BT: jax.Array) -> Scored:
        """Rows into the next slots, those with order EMPTY into none."""
        there, (_, K, C) = order_BT != EMPTY, layer.order_BKC.shape
        slot = layer.live_B[:, None] + jnp.cumsum(there, axis=1) - 1
        slot = jnp.where(there, slot, C + jnp.arange(order_BT.shape[1]))  # distinct, out of range: dropped
        slot = jnp.broadcast_to(slot[:, None], (len(slot), K, order_BT.shape[1]))
        write = per_head(lambda x, s, new: x.at[s].set(new, mode="drop", unique_indices=True))

        def into(x, new):
            return write(x, slot, new.astype(x.dtype))

        k = k_BKTH.astype(layer.v_BKCH.dtype)
        plain = None if layer.k_BKCH is None else into(layer.k_BKCH, k)
        planes = None if self.keys is None else jax.tree.map(into, layer.planes, self.keys.encode(k))
        order = into(layer.order_BKC, jnp.broadcast_to(order_BT[:, None], slot.shape))
        live_B = layer.live_B + there.sum(axis=1, dtype=jnp.int32)
        return layer.replace(k_BKCH=plain, planes=planes, v_BKCH=into(layer.v_BKCH, v_BKTH), order_BKC=order, live_B=live_B)

    def probabilities(self, q_BTNH, layer: Scored, draft: Draft | None, ask: Flow, here: Here) -> tuple[jax.Array, Scored]:
        """(p_BKGTC over the slots and behind them this call's drafts, the layer with what reading it took)."""
        lo, cfg = here.lo(ask.order_BT), here.cfg
        seen = visible(layer.order_BKC, lo, ask.hi_BT)[:, :, None]
        if draft is not None:
            fresh = among(ask, lo, draft.order_BW)[:, None, None]
            seen = jnp.concatenate([seen, jnp.broadcast_to(fresh, (*seen.shape[:4], fresh.shape[-1]))], axis=-1)

        def shares(product: list[jax.Array]) -> jax.Array:
            """Of the products with stored keys and with drafts."""
            logits = jnp.concatenate(product, axis=-1)
            return softmax(cfg.softcap * jnp.tanh(logits / cfg.softcap) if cfg.softcap else logits, seen)[0]

        fresh_k = [] if draft is None else [draft.k_BKWH]
        if self.keys is None or layer.planes is None:
            assert layer.k_BKCH is not None
            return shares([scores(q_BTNH, k, cfg.scale, 0.0) for k in (layer.k_BKCH, *fresh_k)]), layer
        split, keys = self.keys, [layer.planes, *map(self.keys.encode, fresh_k)]
        product, there_BT = [split.upper(q_BTNH, k, cfg.scale) for k in keys], ask.order_BT != EMPTY
        asks = (shares(product).max(axis=-1) < split.tau) & there_BT[:, None, None]
        product = [split.both(q_BTNH, k, cfg.scale, x, asks) for k, x in zip(keys, product, strict=True)]
        again = layer.again_BK + asks.any(axis=(2, 3))
        return shares(product), layer.replace(again_BK=again, calls_B=layer.calls_B + there_BT.any(axis=1))

    def bytes_read(self, layer: Scored, here: Here) -> int:
        """At most: as if every head read its low bits. `read_again` says how often they did."""
        C, v = layer.order_BKC.shape[2], tree_bytes(layer.v_BKCH)
        return tree_bytes(layer) - (0 if self.whole else v - v * min(layer.most, C) // C)


def add_up(p_BKGTC: jax.Array, v_BKCH: jax.Array, draft: Draft | None) -> jax.Array:
    """out_BTNH over all values, of slots and of drafts behind them."""
    C = v_BKCH.shape[2]
    out = combine(p_BKGTC[..., :C], v_BKCH)
    return out if draft is None else out + combine(p_BKGTC[..., C:], draft.v_BKWH)


def add_best(p_BKGTC: jax.Array, layer: Scored, draft: Draft | None) -> jax.Array:
    """out_BTNH over the values of the rows with the most probability, of slots and drafts alike; others are not read.

    Where so many queries come at once that they would gather more rows than there are, all are read, once, and the others count nothing.
    """
    B, K, G, T, X = p_BKGTC.shape
    mass, C, M = p_BKGTC.sum(axis=2), layer.order_BKC.shape[2], min(layer.most, X)
    _, at = top_k(jnp.where(jnp.isnan(mass), -1.0, mass), M, "BKTC")
    counts = jnp.broadcast_to(jnp.arange(M) < layer.values_B[:, None, None, None], at.shape)
    if T * M > X:
        put = jax.vmap(per_head(lambda at, counts: jnp.zeros(X, bool).at[at].set(counts)))
        return add_up(jnp.where(put(at, counts)[:, :, None], p_BKGTC, 0), layer.v_BKCH, draft)
    p = jnp.where(counts[:, :, None], jnp.take_along_axis(p_BKGTC, at[:, :, None], axis=4), 0)
    slot = at.reshape(B, K, T * M)
    v = take_rows(layer.v_BKCH, jnp.minimum(slot, C - 1))
    if draft is not None:
        v = jnp.where((slot < C)[..., None], v, take_rows(draft.v_BKWH, jnp.maximum(slot - C, 0)))
    # Every query is a head by itself, with rows of its own.
    out = combine(jnp.moveaxis(p, 3, 2).reshape(B, K * T, G, 1, M), v.reshape(B, K * T, M, -1))
    return jnp.moveaxis(out.reshape(B, K, T, G, -1), 2, 1).reshape(B, T, K * G, -1)


def read_again(layers: Sequence[Scored]) -> float:
    """How often heads read the low bits of their keys, as a share of the times that they were asked: what `bytes_read` counts as always."""
    calls = sum(int(layer.calls_B.sum()) * layer.again_BK.shape[1] for layer in layers)
    return sum(int(layer.again_BK.sum()) for layer in layers) / max(calls, 1)
