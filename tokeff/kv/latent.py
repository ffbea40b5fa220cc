"""TransMLA's conversion (Meng et al. 2025): grouped keys and values as one low-rank row that every query head reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from tokeff.errors import UserError
from tokeff.kernels import merge
from tokeff.kv.cache import Draft, Room, Rows, among, visible, whole_tiles
from tokeff.kv.evidence import Evidence, Seen
from tokeff.kv.latent_bases import Bases, bases, directions, raw_rows, rotated, side_names
from tokeff.kv.policy import Policy, Prefilled, append, pad_slots
from tokeff.models.attention import combine, scores, softmax, wide
from tokeff.models.flow import EMPTY, Accepted, Flow, Here
from tokeff.models.load import Model


class Latent(struct.PyTreeNode):
    """C rows of a layer, one for all heads; W draft rows wait beside them. bases: None where they lie beside the weights."""

    low_BCY: jax.Array
    order_BC: jax.Array
    live_B: jax.Array
    bases: Bases | None
    draft_BWY: jax.Array | None
    draft_order_BW: jax.Array | None
    heads: int = struct.field(pytree_node=False)  # kv heads that the model has


@dataclass(frozen=True)
class Converted(Evidence):
    """The bases that `convert` put beside a layer's weights, for `pack`; the same for every sequence."""

    rope: float | int

    def like(self, B: int, S: int, cfg) -> Any:
        kind: Any = Bases  # shapes in the place of arrays
        return kind(*(jax.ShapeDtypeStruct((B, *shape), "float32") for shape in ((cfg.K, 2 * cfg.H, 2 * cfg.K * cfg.H), ())))

    def gather(self, seen: Seen, before, here: Here) -> Bases:
        B = seen.k_BKSH.shape[0]
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (B, *x.shape[1:])), beside(self.rope, here))

    def heads(self, value: Bases, index: Any, G: int) -> Bases:
        raise UserError("the bases of a converted model are of all its heads; give TransMLA all heads of a layer")


def beside(rope: float | int, here: Here) -> Bases:
    """The bases beside this layer's weights, with a batch of 1."""
    names = side_names(rope, here.cfg.K, here.cfg.H)
    if here.side is None or not set(names) <= set(here.side):
        raise UserError(f"the model holds no bases for rope={rope}; make it with tokeff.kv.convert.convert(model, text, {rope})")
    down, gain = (here.side[name][None] for name in names)
    return Bases(down, gain)


@dataclass(frozen=True)
class TransMLA(Policy):
    """One row of a layer for all heads. Keys are turned across heads, frequency by frequency, so that the first heads hold most of them,
    and the first `rope` share of heads keeps its rotation, or so many numbers (an even integer: whole heads, and of the next one its
    fastest frequencies); the rest loses it, which is the conversion's known loss. That rest and the values are written as `rank` of
    their directions (a share, or a number), and queries read them there, as in multi-head latent attention.

    The paper finds the bases on a calibration text and trains afterwards. converted=True takes those that `convert` put beside the
    weights; by default the prompt is that text, and its bases count as held. Nothing is trained. At full rank with the rotation of all
    heads it is the model itself.
    """

    rank: float | int = 0.5
    rope: float | int = 0.125
    converted: bool = False

    raw_keys: ClassVar[bool] = True

    def needs(self) -> tuple[Evidence, ...]:
        return (Converted(self.rope),) if self.converted else ()

    def check(self, cfg, length: int) -> None:
        share = isinstance(self.rank, float)
        if self.rank <= 0 or (share and self.rank > 1) or not 0 < self.rope <= (1 if isinstance(self.rope, float) else cfg.K * cfg.H):
            raise UserError(f"rank={self.rank} is a share of the directions or their number, rope={self.rope} a share of heads above 0")
        if rotated(self.rope, cfg.K, cfg.H) % 2:
            raise UserError(f"rope={self.rope} numbers are not pairs, which turn together; give an even number, or a share of heads")
        all_of_them = directions(self.rope, cfg.K, cfg.H)
        if not self.converted and length < self.low(cfg) < all_of_them:
            raise UserError(f"a prompt of {length} tokens does not determine {self.low(cfg)} directions; give rank={length} or less")

    def by_head(self) -> str | None:
        return "one row serves all heads of a layer"

    def fit(self, m: Model) -> TransMLA:
        if self.converted:
            for i, w in enumerate(m.params.blocks):
                beside(self.rope, Here(i, m.cfg, w.side))
        return self

    def low(self, cfg) -> int:
        """How many directions are kept."""
        all_of_them = directions(self.rope, cfg.K, cfg.H)
        return max(1, round(self.rank * all_of_them)) if isinstance(self.rank, float) else min(self.rank, all_of_them)

    def near(self, cfg) -> int:
        """How many numbers of a row carry rotation."""
        return rotated(self.rope, cfg.K, cfg.H)

    def pack_layer(self, rows: Prefilled, room: Room, here: Here) -> Latent:
        k, v, angle = raw_rows(rows, here)
        given = rows.evidence_BKS[Converted(self.rope)] if self.converted else bases(k, v, self.rope, self.low(here.cfg))
        used = self.first(given, k.dtype, here)
        low = self.rows(k, v, angle, used, here)
        (B, _, Y), C, order = low.shape, whole_tiles(k.shape[1] + room.rows, k.dtype), rows.order_BKS[:, 0]
        draft = (jnp.zeros((B, room.draft, Y), low.dtype), jnp.full((B, room.draft), EMPTY, jnp.int32)) if room.draft else (None, None)
        held = None if self.converted else used
        return Latent(pad_slots(low, C, 1), pad_slots(order, C, 1, EMPTY), rows.here_B, held, *draft, k.shape[2])

    def first(self, given: Bases, dtype: Any, here: Here) -> Bases:
        """The bases of the directions that are kept."""
        return given.replace(down_BKHY=given.down_BKHY[..., : self.near(here.cfg) + self.low(here.cfg)].astype(dtype))

    def rows(self, k_BTKH, v_BTKH, angle_BT, used: Bases, here: Here) -> jax.Array:
        """low_BTY of unrotated keys and values: one sum over heads."""
        both = jnp.concatenate([k_BTKH, v_BTKH], axis=-1)
        low = jnp.einsum("btkh,bkhy->bty", both, used.down_BKHY, preferred_element_type=wide(both.dtype))
        near = self.near(here.cfg)
        return jnp.concatenate([turned(low[..., :near], angle_BT, here), low[..., near:]], axis=-1).astype(k_BTKH.dtype)

    def attend(self, q, k, v, ask: Flow, new: Flow, layer: Latent, accepted: Accepted | None, across, here: Here):
        used = layer.bases or self.first(beside(self.rope, here), layer.low_BCY.dtype, here)
        low = self.rows(k, v, new.angle_BT, used, here)
        layer = arrived(layer, low, new, accepted)
        asked, lo = self.queries(q, ask.angle_BT, used, here), here.lo(ask.order_BT)
        seen = visible(layer.order_BC[:, None], lo, ask.hi_BT)
        out, lse = self.read(asked, layer.low_BCY, seen, here)
        if ask.among_BTW is not None:
            assert layer.draft_BWY is not None and layer.draft_order_BW is not None
            out, _ = merge(out, lse, *self.read(asked, layer.draft_BWY, among(ask, lo, layer.draft_order_BW)[:, None], here))
        return self.values(out, used, here).astype(q.dtype), layer, across

    def queries(self, q_BTNH, angle_BT, used: Bases, here: Here) -> jax.Array:
        """q_BTNY: each query head where the rows are. Rows without rotation meet queries without."""
        B, T, N, H = q_BTNH.shape
        near, down = self.near(here.cfg), used.down_BKHY[:, :, :H]
        gain = used.gain_B * here.cfg.rope_of(here.layer).attention_factor ** 2
        stands, raw = (
            jnp.einsum("btkgh,bkhy->btkgy", x.reshape(B, T, here.cfg.K, -1, H), some, preferred_element_type=wide(x.dtype))
            for x, some in ((here.rotate(q_BTNH, angle_BT[:, :, None]), down[..., :near]), (q_BTNH, down[..., near:]))
        )
        q = jnp.concatenate([stands, raw * gain[:, None, None, None, None]], axis=-1)
        return q.reshape(B, T, N, -1).astype(q_BTNH.dtype)

    def read(self, q_BTNY, low_BCY, seen_BKTC, here: Here) -> tuple[jax.Array, jax.Array]:
        """(low_BTNY, lse_BTN): all query heads over the one row of each token, K = 1."""
        (B, T, N, _), cfg = q_BTNY.shape, here.cfg
        p, lse = softmax(scores(q_BTNY, low_BCY[:, None], cfg.scale, cfg.softcap), seen_BKTC[:, :, None])
        return combine(p, low_BCY[:, None]), jnp.moveaxis(lse, 3, 1).reshape(B, T, N)

    def values(self, low_BTNY, used: Bases, here: Here) -> jax.Array:
        """out_BTNH: each head's own values out of the directions."""
        B, T, N, _ = low_BTNY.shape
        up = used.down_BKHY[:, :, here.cfg.H :, self.near(here.cfg) :]
        low = low_BTNY[..., self.near(here.cfg) :].reshape(B, T, here.cfg.K, N // here.cfg.K, -1)
        return jnp.einsum("btkgy,bkhy->btkgh", low, up, preferred_element_type=wide(low.dtype)).reshape(B, T, N, here.cfg.H)

    def kept(self, layer: Latent) -> jax.Array:
        """All heads read the same rows."""
        B, C = layer.order_BC.shape
        return jnp.broadcast_to(layer.order_BC[:, None], (B, layer.heads, C))


def turned(low_BTY: jax.Array, angle_BT: jax.Array, here: Here) -> jax.Array:
    """The numbers of a row that keep their rotation, at the row's place: whole heads, then the first frequencies of one more."""
    H, (B, T, Y) = here.cfg.H, low_BTY.shape
    whole, more = Y // H * H, Y % H // 2
    last = pad_slots(low_BTY[..., whole:].reshape(B, T, 2, more), H // 2, 3).reshape(B, T, 1, H)
    heads = jnp.concatenate([low_BTY[..., :whole].reshape(B, T, -1, H), *([last] if more else [])], axis=2)
    heads = here.rotate(heads, angle_BT[:, :, None])
    part = heads[:, :, whole // H :].reshape(B, T, -1, 2, H // 2)[..., :more].reshape(B, T, -1)
    return jnp.concatenate([heads[:, :, : whole // H].reshape(B, T, whole), part], axis=-1)


def arrived(layer: Latent, low_BTY: jax.Array, new: Flow, accepted: Accepted | None) -> Latent:
    """The layer with this call's rows: a store of one head, without values."""

    def none(x_BCY):
        return jnp.zeros((*x_BCY.shape[:1], 1, x_BCY.shape[1], 0), x_BCY.dtype)

    draft = None
    if layer.draft_BWY is not None and layer.draft_order_BW is not None:
        draft = Draft(layer.draft_BWY[:, None], none(layer.draft_BWY), layer.draft_order_BW)
    before = Rows(layer.low_BCY[:, None], none(layer.low_BCY), layer.order_BC[:, None], layer.live_B, draft=draft)
    rows = append(before, low_BTY[:, :, None], none(low_BTY).swapaxes(1, 2), new, accepted)
    layer = layer.replace(low_BCY=rows.k_BKCH[:, 0], order_BC=rows.order_BKC[:, 0], live_B=rows.live_B)
    return layer if rows.draft is None else layer.replace(draft_BWY=rows.draft.k_BKWH[:, 0], draft_order_BW=rows.draft.order_BW)
