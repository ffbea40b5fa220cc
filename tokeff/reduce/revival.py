"""The caches of a decoding in which dropped rows of the prompt come back (LazyLLM, Fu et al. 2024), and the choice of every step.

The layers where a pass dropped rows of the prompt choose again in every decode step, for the newest row, among all rows that they hold.
Layers above read what was chosen and no other row of the prompt. A row whom the layers above have not got waits with the vector that it
had where it was dropped; `tokeff.decode.revive` runs it through them. By itself the policy chooses among the rows that are there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from tokeff.errors import UserError
from tokeff.kv.budget import rows_of
from tokeff.kv.cache import Room, Rows, per_head, take_rows, visible, whole_tiles, write
from tokeff.kv.evidence import Evidence, Seen
from tokeff.kv.policy import Policy, Prefilled
from tokeff.kv.read import read_store
from tokeff.models.attention import NEG, combine, scores, softmax
from tokeff.models.flow import EMPTY, Accepted, Flow, Here
from tokeff.reduce.cascade import LastRowCascade, best_rows, check_seen
from tokeff.sharding import top_k


class Entered(struct.PyTreeNode):
    """The vectors with which rows entered a layer, and which rows they are."""

    x_BSD: jax.Array
    order_BS: jax.Array


@dataclass(frozen=True)
class Dropped(Evidence):
    """`Entered` of every layer where this pass chose among the prompt's rows; None of the others."""

    cut: LastRowCascade

    def behind(self, cut: Any, cfg) -> None:
        mine = self.cut
        if cut is not None and not (isinstance(cut, LastRowCascade) and (cut.layers(cfg), cut.keep) == (mine.layers(cfg), mine.keep)):
            raise UserError(f"rows come back that another pass drops; give cut={mine!r} to the prompt, or no pass")

    def like(self, B: int, S: int, cfg) -> None:
        return None

    def gather(self, seen: Seen, before: Entered | None, here: Here) -> Entered | None:
        x = seen.x_BTD
        if x is None or x is seen.ask.x_BTD:  # all rows ask
            return before
        return Entered(x, seen.order_BKS[:, 0, -x.shape[1] :])


class Slots(struct.PyTreeNode):
    """One layer. The i-th row of a prompt has slot i, which is empty until the layer has computed it; what comes later lies behind them.

    prompt_B: rows of each prompt, S at most. In a layer that chooses, up_BS: which of them the layers above hold, as far as the next one
    that chooses. In the first such layer, x_BSD: the vector of each row that waits (LazyLLM's Aux Cache), None where no row was dropped.
    """

    rows: Rows
    prompt_B: jax.Array
    up_BS: jax.Array | None = None
    x_BSD: jax.Array | None = None
    S: int = struct.field(pytree_node=False, default=0)

    def missing(self, slot_BX: jax.Array) -> jax.Array:
        """Which of these slots hold rows that the layers above have not got."""
        assert self.up_BS is not None, "this layer does not choose"
        return (slot_BX != EMPTY) & ~jnp.take_along_axis(self.up_BS, jnp.maximum(slot_BX, 0), axis=1)

    def risen(self, slot_BX: jax.Array) -> Slots:
        """The layer once those above it hold these rows too; slot S is none."""
        assert self.up_BS is not None, "this layer does not choose"
        return self.replace(up_BS=put_rows(self.up_BS, slot_BX, jnp.ones_like(slot_BX, bool)))


class Chosen(struct.PyTreeNode):
    """slot_BM: the rows of the prompt that this step reads, ascending, EMPTY past their number. at_BT: the slots of this call's rows,
    which come back; None for a row that comes behind all others."""

    slot_BM: jax.Array
    at_BT: jax.Array | None = None

    def read_BX(self, layer: Slots) -> jax.Array:
        """The slots that are read: the chosen ones, and all behind the prompt, where rows that come back see nothing."""
        if self.at_BT is not None:
            return self.slot_BM
        tail = layer.prompt_B[:, None] + jnp.arange(layer.rows.capacity - layer.S, dtype=jnp.int32)
        return jnp.concatenate([self.slot_BM, tail], axis=1)


@dataclass(frozen=True)
class LazyRows(Policy):
    """Every decode step chooses rows of the prompt at the layers of `cut`, by its rule and budgets: the newest row's attention
    probabilities, the mean over heads, over what it reads in that layer. Tokens behind the prompt are always read, and no budget counts
    them (our reading). A layer that chooses still reads what the one below it chose.

    All layers have room for all rows, so what is held is what a full cache holds, and the vectors that wait. A layer reads its budget.
    """

    cut: LastRowCascade
    chunk: ClassVar[int | None] = 1  # every row chooses for itself
    lasts: ClassVar[bool] = False  # vectors wait where the prompt lost rows

    def needs(self) -> tuple[Evidence, ...]:
        return (Dropped(self.cut),)

    def check(self, cfg, length: int) -> None:
        name = type(self).__name__
        if not isinstance(self.cut, LastRowCascade):
            raise UserError(f"{name} brings back what LazyLLM drops, not {self.cut!r}; give for example cut=tokeff.reduce.lazyllm(0.5)")
        self.cut.check_layers(cfg)
        layers = self.cut.layers(cfg)
        if layers[-1] == cfg.L - 1:
            raise UserError(f"{name} chooses at layer {layers[-1]}, and no layer above it reads; give layers from 0 to {cfg.L - 2}")
        check_seen(name, layers, cfg, length)

    def fit(self, m: Any) -> LazyRows:
        return replace(self, cut=replace(self.cut, at=self.cut.layers(m.cfg)))

    def drafts(self, depth: int) -> str | None:
        return "every node of a draft would choose rows of its own; leave out the drafter"

    def alone(self, run: tuple[int, ...], cfg) -> str | None:
        return "its layers read what layers below them chose in the same pass; leave out the drafter"

    def role(self, layer: int) -> Any:
        """Layers that choose differ. A share of the depth is no layer before `fit`; every layer may be one until then."""
        at = self.cut.at
        return layer if layer in at or not all(isinstance(a, int) for a in at) else None

    # -- which layers choose how many

    def chooses(self, cfg, S: int) -> dict[int, int]:
        """{layer that may leave out some of S rows: the most that it chooses}, ascending."""
        found, before, width = {}, 1.0, S
        for stage, (i, keep) in enumerate(zip(self.cut.layers(cfg), self.cut.keep, strict=True)):
            most = self.cut.most(stage, width)
            if keep != before and (isinstance(keep, float) or keep < width):
                found[i] = most
            before, width = keep, most
        return found

    def absent(self, S: int) -> int:
        """How many rows a layer may choose that the layers above have not got."""
        return 0

    # -- end of prompt

    def pack(self, layers: tuple[Prefilled, ...], room: Room, cfg) -> tuple[Slots, ...]:
        first, S = layers[0], layers[0].order_BKS.shape[2]
        C, table_BS = whole_tiles(S + room.rows, first.k_BKSH.dtype), layers[0].order_BKS[:, 0]
        chooses, packed, x = tuple(self.chooses(cfg, S)), [], None
        for i, layer in enumerate(layers):
            slot = slots_of(table_BS, layer.order_BKS[:, 0])
            packed.append(Slots(spread(layer, slot, C, first.here_B), first.here_B, S=S))
            entered = layer.evidence_BKS.get(Dropped(self.cut)) if i in chooses else None
            if entered is not None:  # a row waits with the vector of the highest layer that it entered and where some were dropped
                x = jnp.zeros((len(slot), S, entered.x_BSD.shape[2]), entered.x_BSD.dtype) if x is None else x
                x = put_rows(x, slots_of(table_BS, entered.order_BS), entered.x_BSD)
        for i in chooses:
            up = packed[i + 1].rows.order_BKC[:, 0, :S] != EMPTY
            packed[i] = packed[i].replace(up_BS=up, x_BSD=x if i == chooses[0] else None)
        return tuple(packed)

    # -- decoding

    def attend(self, q, k, v, ask: Flow, new: Flow, layer: Slots, accepted: Accepted | None, across: Chosen | None, here: Here):
        q = here.rotate(q, ask.angle_BT[:, :, None])
        layer = arrived(layer, k, v, new, None if across is None else across.at_BT, here)
        if here.layer not in self.chooses(here.cfg, layer.S):
            return read(q, layer, across, ask, here), layer, across
        slot_BX = every_slot(layer) if across is None else across.slot_BM
        out, score_BX = weigh(q, layer, across, ask, here)
        return out, layer, Chosen(self.choose(score_BX, slot_BX, layer, ask, here))

    def choose(self, score_BX: jax.Array, slot_BX: jax.Array, layer: Slots, ask: Flow, here: Here) -> jax.Array:
        """slot_BM of the best of these rows: those that the layers above hold, and the best few of the others."""
        missing_BX = layer.missing(slot_BX)
        fit = (slot_BX != EMPTY) & ~missing_BX | best_of(score_BX, missing_BX, self.absent(layer.S))
        keep_B = rows_of(self.cut.keep[self.cut.stage(here)], layer.prompt_B)
        keep_B = jnp.where(ask.order_BT[:, 0] == EMPTY, 0, keep_B)
        most = self.chooses(here.cfg, layer.S)[here.layer]
        index = best_rows(score_BX, jnp.zeros_like(fit), fit, keep_B, most)
        return jnp.where(index == EMPTY, EMPTY, jnp.take_along_axis(slot_BX, jnp.maximum(index, 0), axis=1))

    def kept(self, layer: Slots) -> jax.Array:
        return layer.rows.order_BKC

    def bytes_read(self, layer: Slots, here: Here) -> int:
        """Of a step that brings no row back."""
        rows, below = layer.rows, [M for i, M in self.chooses(here.cfg, layer.S).items() if i < here.layer]
        B, K, C, H = rows.k_BKCH.shape
        read = below[-1] + C - layer.S if below else C
        flags = 0 if layer.up_BS is None else layer.up_BS.size
        return B * K * read * (2 * H * rows.k_BKCH.dtype.itemsize + rows.order_BKC.dtype.itemsize) + flags


def slots_of(table_BS: jax.Array, order_BT: jax.Array) -> jax.Array:
    """slot_BT of rows by their orders, S for none. table_BS: the orders of all, ascending, EMPTY at the end."""
    S = table_BS.shape[1]
    last = jnp.iinfo(table_BS.dtype).max
    at = jax.vmap(jnp.searchsorted)(jnp.where(table_BS == EMPTY, last, table_BS), order_BT)
    return jnp.where(order_BT == EMPTY, S, at).astype(jnp.int32)


def spread(layer: Prefilled, slot_BT: jax.Array, C: int, live_B: jax.Array) -> Rows:
    """The rows of a layer in their slots, among empty ones."""
    B, K, _, H = layer.k_BKSH.shape
    slot = jnp.where(layer.order_BKS[:, 0] == EMPTY, C, slot_BT)
    none = jnp.zeros((B, K, C, H), layer.k_BKSH.dtype)
    order = put_rows(jnp.full((B, C), EMPTY, jnp.int32), slot, layer.order_BKS[:, 0])
    put = jax.vmap(lambda x, s, new: x.at[:, s].set(new, mode="drop"))
    return Rows(put(none, slot, layer.k_BKSH), put(none, slot, layer.v_BKSH), jnp.broadcast_to(order[:, None], (B, K, C)), live_B)


def put_rows(x_BSx: jax.Array, slot_BT: jax.Array, new_BTx: jax.Array) -> jax.Array:
    """x with these rows in these slots; slot S or above is none."""
    return jax.vmap(lambda x, s, new: x.at[s].set(new.astype(x.dtype), mode="drop"))(x_BSx, slot_BT, new_BTx)


def arrived(layer: Slots, k_BTKH: jax.Array, v_BTKH: jax.Array, new: Flow, at_BT: jax.Array | None, here: Here) -> Slots:
    """The layer with this call's rows, keys unrotated: behind all others, or in slots of the prompt that were kept for them."""
    rows, k, v = layer.rows, here.rotate(k_BTKH, new.angle_BT[:, :, None]).swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    if at_BT is None:
        return layer.replace(rows=write(rows, k, v, new.order_BT))
    (B, K, C), T = rows.order_BKC.shape, at_BT.shape[1]
    slot = jnp.where(at_BT == EMPTY, C + jnp.arange(T), at_BT)  # distinct, so that XLA may write in place
    slot, order = (jnp.broadcast_to(a[:, None], (B, K, T)) for a in (slot, new.order_BT))
    put = per_head(lambda x, s, new: x.at[s].set(new.astype(x.dtype), mode="drop", unique_indices=True))
    return layer.replace(
        rows=rows.replace(k_BKCH=put(rows.k_BKCH, slot, k), v_BKCH=put(rows.v_BKCH, slot, v), order_BKC=put(rows.order_BKC, slot, order))
    )


def every_slot(layer: Slots) -> jax.Array:
    """slot_BS of the whole prompt, EMPTY past its end."""
    slot = jnp.arange(layer.S, dtype=jnp.int32)[None]
    return jnp.where(slot < layer.prompt_B[:, None], slot, EMPTY)


def read(q_BTNH: jax.Array, layer: Slots, across: Chosen | None, ask: Flow, here: Here) -> jax.Array:
    """out_BTNH of rotated queries over what was chosen below, or over everything. Other slots are not touched."""
    slot = None if across is None else across.read_BX(layer)
    page = None if slot is None else jnp.broadcast_to(slot[:, None], (*layer.rows.order_BKC.shape[:2], slot.shape[1]))
    return read_store(q_BTNH, layer.rows, ask, here, page)[0]


def weigh(q_BTNH: jax.Array, layer: Slots, across: Chosen | None, ask: Flow, here: Here) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH of one row, score_BX of the X rows of the prompt that it reads): one pass over their keys."""
    k, v, order, cfg = layer.rows.k_BKCH, layer.rows.v_BKCH, layer.rows.order_BKC, here.cfg
    X = layer.S if across is None else across.slot_BM.shape[1]
    if across is not None:
        slot = across.read_BX(layer)[:, None]
        slot = jnp.broadcast_to(slot, (*order.shape[:2], slot.shape[2]))
        at = jnp.maximum(slot, 0)
        k, v, order = take_rows(k, at), take_rows(v, at), jnp.where(slot == EMPTY, EMPTY, jnp.take_along_axis(order, at, axis=2))
    seen = visible(order, here.lo(ask.order_BT), ask.hi_BT)[:, :, None]
    p, _ = softmax(scores(q_BTNH.astype(k.dtype), k, cfg.scale, cfg.softcap), seen)
    return combine(p, v), p[..., :X].sum(axis=(1, 2, 3)) / cfg.N


def best_of(score_BX: jax.Array, which_BX: jax.Array, n: int) -> jax.Array:
    """Which of these are among their n best: NaN last, earlier ones first among equals."""
    X = score_BX.shape[1]
    if n >= X:
        return which_BX
    if not n:
        return jnp.zeros_like(which_BX)
    score = jnp.where(which_BX, jnp.where(jnp.isnan(score_BX), NEG, score_BX), -jnp.inf)
    _, index = top_k(score, n, "BX")
    return which_BX & (index[:, :, None] == jnp.arange(X)).any(axis=1)
