"""Rows held in code, the most recent ones as they are: KIVI's store, which any policy that keeps rows once can fill.

What the rule keeps of the prompt becomes pages of `page` rows, written down by one coder for keys and one for values. The last rows
stay in full precision, in a window. Whenever `window` rows have gathered there they are coded together and the window is empty
again: that is the boundary that `vacancy` clips drafts to, so drafts see the same codes that one-row decoding would. A read attends to
the pages of one layer in code (kernels/quant_decode), or decodes them for that layer only, and joins them to the window by log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from tokeff.errors import UserError
from tokeff.kernels import merge, quant_decode
from tokeff.kv.cache import Room, Rows, commit, empty_draft, hold, per_head, take_rows, visible, whole_tiles, write
from tokeff.kv.keep import Keep
from tokeff.kv.policy import Full, Policy, Prefilled, pad_slots
from tokeff.kv.quant import Coder, Quantised
from tokeff.kv.read import read_draft, read_store
from tokeff.models.attention import combine, scores, softmax
from tokeff.models.flow import EMPTY, Accepted, Flow, Here


class Pages(struct.PyTreeNode):
    """P pages of R rows in code. order_BKPR is EMPTY in a page that nothing was written to."""

    key: Any
    value: Any
    order_BKPR: jax.Array


class Coded(struct.PyTreeNode):
    """A layer: the prompt's pages (never written again), pages_B pages of later rows, and the rows still in full precision."""

    prompt: Pages
    later: Pages
    pages_B: jax.Array
    window: Rows


@dataclass(frozen=True)
class Fold(Policy):
    """rule: what is kept of the prompt, `Full()` or a `Keep` without eviction. key, value: how rows are written down.

    window: how many recent rows are coded at once when that many have gathered, a multiple of `page`.
    """

    rule: Policy
    key: Coder
    value: Coder
    page: int = 32
    window: int = 32

    chunk: ClassVar[int | None] = 1  # which rows are in code decides what the next one reads

    def needs(self):
        return self.rule.needs()

    def check(self, cfg, length: int) -> None:
        check_rule(self.rule)
        if self.page < 1 or self.window < 1 or self.window % self.page:
            raise UserError(f"a window of {self.window} rows is not whole pages of {self.page}; give a multiple of the page")
        self.rule.check(cfg, length)
        for coder in (self.key, self.value):
            coder.check(cfg, self.page)

    def drafts(self, depth: int) -> str | None:
        if depth > self.window:
            return f"it codes every {self.window} rows and the drafts are {depth} deep; set window={depth} or more"
        return None

    def role(self, layer: int) -> Any:
        return self.rule.role(layer)

    def pack_layer(self, rows: Prefilled, room: Room, here: Here) -> Coded:
        kept: Rows = self.rule.pack_layer(rows, Room(0), here)
        C = kept.capacity
        coded_B = kept.live_B // self.window * self.window
        order = jnp.where(jnp.arange(C) < coded_B[:, None, None], kept.order_BKC, EMPTY)
        prompt = self.pages(kept.k_BKCH, kept.v_BKCH, order, C, prompt=True)
        none = jnp.full((*order.shape[:2], 0), EMPTY, jnp.int32)
        zero = kept.k_BKCH[:, :, :0]
        later = self.pages(zero, zero, none, min(self.window - 1, C) + room.rows, prompt=False)
        tail = tail_of(kept, coded_B, min(self.window, C + room.rows), room.draft)
        return Coded(prompt, later, jnp.zeros_like(kept.live_B), tail)

    def squeeze(self, rows: Prefilled, here: Here) -> Prefilled:
        return self.rule.squeeze(rows, here)

    def pages(self, k_BKCH, v_BKCH, order_BKC, most: int, *, prompt: bool) -> Pages:
        """Pages for as many of `most` rows as ever fill windows; rows whose order is EMPTY are coded as zeros."""
        slots = most // self.window * self.window

        def paged(x, fill):
            x = pad_slots(x[:, :, :slots], slots, 2, fill)
            return x.reshape(*x.shape[:2], slots // self.page, self.page, *x.shape[3:])

        order = paged(order_BKC, EMPTY)
        k, v = (jnp.where((order != EMPTY)[..., None], paged(x, 0), 0) for x in (k_BKCH, v_BKCH))
        return Pages(self.key.encode(k, prompt), self.value.encode(v, prompt), order)

    def vacancy(self, layer: Coded) -> jax.Array | None:
        return self.window - layer.window.live_B

    def attend(self, q, k, v, ask: Flow, new: Flow, layer: Coded, accepted: Accepted | None, across, here: Here):
        q, k = here.rotate(q, ask.angle_BT[:, :, None]), here.rotate(k, new.angle_BT[:, :, None])
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        if new.among_BTW is None:
            layer = self.fold(layer)
            layer = layer.replace(window=write(layer.window, k, v, new.order_BT))
        else:
            assert accepted is not None
            layer = self.fold(layer.replace(window=commit(layer.window, accepted)))
            layer = layer.replace(window=hold(layer.window, k, v, new))
        out, lse = read_store(q, layer.window, ask, here)
        for part in (part for part in (layer.prompt, layer.later) if part.order_BKPR.shape[2]):
            out, lse = merge(out, lse, *self.read_pages(q, part, ask, here))
        if ask.among_BTW is not None:
            out, lse = merge(out, lse, *read_draft(q, layer.window.draft, ask, here))
        return out, layer, across

    def fold(self, layer: Coded) -> Coded:
        """Where the window is full, its rows in code behind the later pages, and an empty window."""
        rows, n = layer.window, self.window // self.page
        if not layer.later.order_BKPR.shape[2]:  # the window holds all that will ever come
            return layer
        full_B = rows.live_B == self.window
        fresh = self.pages(rows.k_BKCH, rows.v_BKCH, rows.order_BKC, self.window, prompt=False)
        at_B = jnp.where(full_B, layer.pages_B, layer.later.order_BKPR.shape[2])
        at = jnp.broadcast_to(at_B[:, None, None] + jnp.arange(n), (*rows.order_BKC.shape[:2], n))
        put = per_head(lambda x, at, new: x.at[at].set(new, mode="drop", unique_indices=True))
        later = jax.tree.map(lambda x, new: put(x, at, new.astype(x.dtype)), layer.later, fresh)
        order = jnp.where(full_B[:, None, None], EMPTY, rows.order_BKC)
        window = rows.replace(order_BKC=order, live_B=jnp.where(full_B, 0, rows.live_B))
        return layer.replace(later=later, window=window, pages_B=layer.pages_B + n * full_B.astype(jnp.int32))

    def read_pages(self, q_BTNH, pages: Pages, ask: Flow, here: Here) -> tuple[jax.Array, jax.Array]:
        """(out_BTNH, lse_BTN) over pages. Plain codes go to the kernel as they are, where keys and values have as many bits; others are
        decoded, for this read only."""
        key, value = pages.key, pages.value
        if isinstance(key, Quantised) and isinstance(value, Quantised) and key.code_BKPRZ.shape == value.code_BKPRZ.shape:
            coded = (key.code_BKPRZ, key.zero_BKPRQ, key.step_BKPRQ, value.code_BKPRZ, value.zero_BKPRQ, value.step_BKPRQ)
            bounds, cfg = (here.lo(ask.order_BT), ask.hi_BT), here.cfg
            q_BTNH = q_BTNH.astype(key.zero_BKPRQ.dtype)
            return quant_decode(q_BTNH, *coded, pages.order_BKPR, *bounds, scale=cfg.scale, softcap=cfg.softcap, finite=True)
        k, v = (coder.decode(code) for coder, code in ((self.key, key), (self.value, value)))
        B, K, P, R, H = k.shape
        order = pages.order_BKPR.reshape(B, K, P * R)
        seen = visible(order, here.lo(ask.order_BT), ask.hi_BT)[:, :, None]
        p, lse = softmax(scores(q_BTNH, k.reshape(B, K, P * R, H), here.cfg.scale, here.cfg.softcap), seen)
        out = combine(p, v.reshape(B, K, P * R, H))
        return out, jnp.moveaxis(lse, 3, 1).reshape(*q_BTNH.shape[:3])

    def kept(self, layer: Coded) -> jax.Array:
        """order_BKC of the pages' rows and of the window's."""
        parts = (layer.prompt.order_BKPR, layer.later.order_BKPR)
        flat = [order.reshape(*order.shape[:2], -1) for order in parts]
        return jnp.concatenate([*flat, layer.window.order_BKC], axis=-1)


def check_rule(rule: Policy) -> None:
    """Refuse a rule that does not leave rows of the prompt as they are in `Rows`, to be read as they are."""
    own = type(rule)
    parts = ("attend", "read", "store", "stored_keys", "pack")
    plain = own is Full or (isinstance(rule, Keep) and all(getattr(own, x) is getattr(Keep, x) for x in parts))
    if plain and isinstance(rule, Keep) and rule.evict:
        raise UserError(f"{own.__name__} evicts while it decodes, and what takes its rows keeps them; set evict=0")
    if not plain:
        raise UserError(f"{own.__name__} has a store of its own; take the rows of full() or of a Keep with evict=0 and without one")


def tail_of(kept: Rows, from_B: jax.Array, slots: int, draft: int) -> Rows:
    """A store of so many slots with the kept rows from the `from`-th on, in which those that come take the next ones."""
    slots = whole_tiles(slots, kept.k_BKCH.dtype)
    at = jnp.broadcast_to(from_B[:, None, None] + jnp.arange(slots), (*kept.order_BKC.shape[:2], slots))
    live_B = kept.live_B - from_B
    order = jnp.take_along_axis(kept.order_BKC, jnp.minimum(at, kept.capacity - 1), axis=2)
    order = jnp.where(jnp.arange(slots) < live_B[:, None, None], order, EMPTY)
    k, v = (jnp.where((order != EMPTY)[..., None], take_rows(x, at), 0) for x in (kept.k_BKCH, kept.v_BKCH))
    return Rows(k, v, order, live_B, draft=empty_draft(k, draft))
