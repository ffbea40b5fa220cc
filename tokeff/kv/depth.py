"""MiniCache (Liu et al. 2024): neighbouring layers share the directions of their keys and values, and keep their own lengths."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from tokeff.errors import UserError
from tokeff.kernels import merge
from tokeff.kv.cache import Room, Rows, empty_draft, take_rows, visible, whole_tiles
from tokeff.kv.coded import Fold, Pages
from tokeff.kv.policy import Full, Policy, Prefilled, append, pad_slots, tree_bytes
from tokeff.kv.quant import Coder, Exact
from tokeff.kv.read import read_draft, read_store
from tokeff.models.attention import combine, scores, softmax, wide
from tokeff.models.flow import EMPTY, Accepted, Flow, Here
from tokeff.sharding import top_k

EXACT = Exact()


class Half(struct.PyTreeNode):
    """One layer of a pair: the lengths of its S = P * R keys and values, rows kept whole (outliers, then what is generated), and, in
    the lower layer, the directions that both share. order_BKS is EMPTY at outliers and padding."""

    key_norm_BKS: jax.Array
    value_norm_BKS: jax.Array
    order_BKS: jax.Array
    whole: Rows
    shared: Pages | None


def unit(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(direction, length) of the last axis."""
    length = jnp.linalg.norm(x.astype(wide(x.dtype)), axis=-1)
    return x / jnp.maximum(length, 1e-20)[..., None], length


def slerp(a: jax.Array, b: jax.Array, t: float) -> tuple[jax.Array, jax.Array]:
    """(direction on the great circle from unit vectors a to b, at share t of the way; their angle) (MiniCache, eq. 3)."""
    angle = jnp.arccos(jnp.clip((a * b).sum(axis=-1), -1, 1))
    near = jnp.sin(angle) < 1e-4  # equal, or opposite and without a way: a straight line, made a unit vector
    sin = jnp.where(near, 1, jnp.sin(angle))
    of_a, of_b = (jnp.where(near, flat, jnp.sin(flat * angle) / sin) for flat in (1 - t, t))
    return unit(of_a[..., None] * a + of_b[..., None] * b)[0], angle


@dataclass(frozen=True)
class MiniCache(Policy):
    """From layer `first` * L on, layers are merged in pairs: one direction a row, `t` of the way from the lower layer's to the upper's,
    and both lengths, for keys and values alike.

    outliers: both keep the rows whole whose angle between the layers lies in this top share of the range of angles (sec. 4.3), however
    many these are, up to the share `most` of all rows, for which there is memory; where there are more, those with the largest angles.
    A row's angle is the sum of its keys' and its values', the mean over heads: it is whole in both, or in neither.
    rest: the policy of the other layers, `Full()` or a `Fold` over it; its coders then write the directions down too. Generated rows are
    whole in paired layers.
    """

    first: float = 0.5
    t: float = 0.6
    outliers: float = 0.05
    rest: Policy = Full()
    most: float = 0.05

    @property
    def chunk(self) -> int | None:  # type: ignore[override]
        return self.rest.chunk

    def lower(self, L: int) -> tuple[int, ...]:
        """The lower layers of the pairs."""
        return tuple(range(int(self.first * L), L - 1, 2))

    def check(self, cfg, length: int) -> None:
        if type(self.rest) is not Full and not (isinstance(self.rest, Fold) and type(self.rest.rule) is Full):
            raise UserError(f"rest={self.rest} keeps its own rows, pairs need all; use full(), or kivi() or gear() over it")
        self.rest.check(cfg, length)
        if not 0 <= self.first < 1 or any(not 0 <= share <= 1 for share in (self.t, self.outliers, self.most)):
            said = f"first={self.first}, t={self.t}, outliers={self.outliers} and most={self.most}"
            raise UserError(f"{said} are shares; give fractions in [0, 1]")
        if not self.lower(cfg.L):
            raise UserError(f"first={self.first} leaves no two of {cfg.L} layers to merge; lower first")

    def drafts(self, depth: int) -> str | None:
        return self.rest.drafts(depth)

    def alone(self, run: tuple[int, ...], cfg) -> str | None:
        lost = next((i + 1 for i in self.lower(cfg.L) if i + 1 in run and i not in run), None)
        return self.rest.alone(run, cfg) if lost is None else f"layer {lost} reads directions that layer {lost - 1} holds; draft with both"

    def coders(self) -> tuple[Coder, Coder]:
        """How directions of keys, and of values, are written down."""
        return (self.rest.key, self.rest.value) if isinstance(self.rest, Fold) else (EXACT, EXACT)

    @property
    def page(self) -> int:
        return self.rest.page if isinstance(self.rest, Fold) else 8

    def pack(self, layers: tuple[Prefilled, ...], room: Room, cfg) -> tuple[Any, ...]:
        out = [self.rest.pack_layer(rows, room, Here(i, cfg)) for i, rows in enumerate(layers)]
        for i in self.lower(cfg.L):
            if layers[i].order_BKS.shape == layers[i + 1].order_BKS.shape:  # a pass may have dropped rows between the two
                out[i], out[i + 1] = self.pair(layers[i], layers[i + 1], room)
        return tuple(out)

    def apart(self, angle_BS: jax.Array, there_BS: jax.Array, count_B: jax.Array) -> jax.Array:
        """index_BX, ascending, of the rows that stay whole; S past their number."""
        S = angle_BS.shape[1]
        top, low = (pick(jnp.where(there_BS, angle_BS, end), axis=1)[:, None] for pick, end in ((jnp.max, -jnp.inf), (jnp.min, jnp.inf)))
        far = there_BS & (top - angle_BS <= self.outliers * (top - low))
        X = math.ceil(self.most * S - 1e-9) if self.outliers else 0
        index = top_k(jnp.where(far, angle_BS, -1.0), X, "BS")[1]
        many_B = jnp.minimum(far.sum(axis=1), jnp.ceil(self.most * count_B - 1e-4)).astype(jnp.int32)
        return jnp.sort(jnp.where(jnp.arange(X) < many_B[:, None], index, S), axis=-1)

    def pair(self, below: Prefilled, above: Prefilled, room: Room) -> tuple[Half, Half]:
        (B, K, S, _), order, R = below.k_BKSH.shape, below.order_BKS[:, 0], self.page
        units = [[unit(rows.k_BKSH), unit(rows.v_BKSH)] for rows in (below, above)]
        (key, far_k), (value, far_v) = (slerp(a, b, self.t) for (a, _), (b, _) in zip(*units, strict=True))
        index = self.apart((far_k + far_v).mean(axis=1), order != EMPTY, below.count_B)
        merged = jax.vmap(lambda order, at: order.at[at].set(EMPTY, mode="drop"))(order, index)
        slots = -(-S // R) * R
        merged = pad_slots(jnp.broadcast_to(merged[:, None], (B, K, S)), slots, 2, EMPTY)

        def paged(x_BKSH):
            x = jnp.where((merged != EMPTY)[..., None], pad_slots(x_BKSH, slots, 2), 0)
            return x.reshape(B, K, slots // R, R, -1).astype(below.k_BKSH.dtype)

        write_key, write_value = self.coders()
        shared = Pages(write_key.encode(paged(key), True), write_value.encode(paged(value), True), merged.reshape(B, K, slots // R, R))

        def half(rows: Prefilled, units, shared):
            of_key, of_value = (pad_slots(length, slots, 2).astype(rows.k_BKSH.dtype) for _, length in units)
            return Half(of_key, of_value, merged, whole_rows(rows, index, room), shared)

        return half(below, units[0], shared), half(above, units[1], None)

    def vacancy(self, layer: Any) -> jax.Array | None:
        return None if isinstance(layer, Half) else self.rest.vacancy(layer)

    def attend(self, q, k, v, ask: Flow, new: Flow, layer, accepted: Accepted | None, across, here: Here):
        if not isinstance(layer, Half):
            return self.rest.attend(q, k, v, ask, new, layer, accepted, across, here)
        shared: Pages = across if layer.shared is None else layer.shared
        q, k = here.rotate(q, ask.angle_BT[:, :, None]), here.rotate(k, new.angle_BT[:, :, None])
        whole = append(layer.whole, k, v, new, accepted)
        out, lse = merge(*read_store(q, whole, ask, here), *self.read_half(q, shared, layer, ask, here))
        if ask.among_BTW is not None:
            out, lse = merge(out, lse, *read_draft(q, whole.draft, ask, here))
        return out, layer.replace(whole=whole), shared if layer.shared is not None else None

    def read_half(self, q_BTNH, shared: Pages, layer: Half, ask: Flow, here: Here) -> tuple[jax.Array, jax.Array]:
        """(out_BTNH, lse_BTN) over the shared directions: a key's length multiplies its score, a value's its probability."""
        cfg, order = here.cfg, layer.order_BKS
        k, v = (coder.decode(code).reshape(*order.shape, cfg.H) for coder, code in zip(self.coders(), (shared.key, shared.value)))
        logits = scores(q_BTNH, k, cfg.scale, 0.0) * layer.key_norm_BKS[:, :, None, None]
        logits = cfg.softcap * jnp.tanh(logits / cfg.softcap) if cfg.softcap else logits
        p, lse = softmax(logits, visible(order, here.lo(ask.order_BT), ask.hi_BT)[:, :, None])
        out = combine(p * layer.value_norm_BKS[:, :, None, None], v)
        return out, jnp.moveaxis(lse, 3, 1).reshape(q_BTNH.shape[:3])

    def kept(self, layer: Any) -> jax.Array:
        if not isinstance(layer, Half):
            return self.rest.kept(layer)
        return jnp.concatenate([layer.order_BKS, layer.whole.order_BKC], axis=-1)

    def bytes_read(self, layer: Any, here: Here) -> int:
        """The upper layer reads the directions too, which the lower one holds."""
        if not isinstance(layer, Half):
            return self.rest.bytes_read(layer, here)
        if layer.shared is not None:
            return tree_bytes(layer)
        B, K, S = layer.order_BKS.shape
        like = jax.ShapeDtypeStruct((B, K, S // self.page, self.page, here.cfg.H), layer.key_norm_BKS.dtype)
        return tree_bytes((layer, [jax.eval_shape(lambda x, c=c: c.encode(x, True), like) for c in self.coders()]))


def whole_rows(rows: Prefilled, index_BX: jax.Array, room: Room) -> Rows:
    """The named rows of every head (index S = none) in the first slots of a store with space for those to come."""
    (B, K, S, _), X = rows.k_BKSH.shape, index_BX.shape[1]
    C = whole_tiles(X + room.rows, rows.k_BKSH.dtype)
    order = jnp.take_along_axis(pad_slots(rows.order_BKS[:, 0], S + 1, 1, EMPTY), index_BX, axis=1)
    at = jnp.broadcast_to(index_BX[:, None], (B, K, X))
    k, v = (pad_slots(jnp.where((order != EMPTY)[:, None, :, None], take_rows(x, at), 0), C, 2) for x in (rows.k_BKSH, rows.v_BKSH))
    order_BKC = jnp.broadcast_to(pad_slots(order, C, 1, EMPTY)[:, None], (B, K, C))
    return Rows(k, v, order_BKC, (order != EMPTY).sum(axis=1, dtype=jnp.int32), draft=empty_draft(k, room.draft))
