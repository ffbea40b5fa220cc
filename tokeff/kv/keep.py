"""`Keep`: score the rows, protect some, keep the best within a budget; once after the prompt, or throughout decoding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from tokeff.errors import UserError
from tokeff.kv.budget import Budget, best, check_budget, most_rows, rows_of
from tokeff.kv.cache import (
    Room,
    Rows,
    accepted_orders,
    among,
    aside,
    commit,
    empty_draft,
    evict,
    hold,
    take_rows,
    visible,
    whole_tiles,
    write,
)
from tokeff.kv.evidence import Evidence
from tokeff.kv.policy import Full, Policy, Prefilled, append, pad_slots
from tokeff.kv.read import read_rows
from tokeff.kv.score import Scorer
from tokeff.models.attention import combine, scores, softmax
from tokeff.models.flow import EMPTY, Accepted, Flow, Here


@dataclass(frozen=True)
class Keep(Policy):
    """Keep the `budget` best rows of every head.

    budget: share of the prompt's rows, or a number of rows. score: what a row is worth. sinks, recent: the first and last rows
    that are always kept and count towards the budget (a float is a share of the budget, rounded down). evict: 0 keeps what the
    prompt left and appends every generated row; E >= 1 holds the number of rows at the budget by evicting E whenever it is
    reached (E = 1 is the published per-step rule; larger E leaves room for drafts).
    """

    budget: Budget
    score: Scorer
    sinks: float | int = 0
    recent: float | int = 0
    evict: int = 0

    def needs(self) -> tuple[Evidence, ...]:
        return self.score.needs()

    @property
    def chunk(self) -> int | None:  # type: ignore[override]
        return 1 if self.evict else None

    def seeing(self, marks: tuple[int, ...]) -> Keep:
        return replace(self, score=self.score.seeing(marks))

    def check(self, cfg, length: int) -> None:
        check_budget(self.budget, length)
        if min(self.sinks, self.recent, self.evict) < 0:
            raise UserError(f"sinks={self.sinks}, recent={self.recent}, evict={self.evict}: none may be negative; use 0 for none")
        self.score.check()
        for kind in self.needs():
            kind.check(cfg, length)
        rows = most_rows(self.budget, length)
        if self.evict and not self.score.running:
            raise UserError(f"{type(self.score).__name__} is defined at the end of the prompt; set evict=0")
        sinks, recent = self.sink_rows(rows), self.recent_rows(rows)
        if sinks + recent > rows:
            raise UserError(f"sinks {sinks} and recent {recent} exceed a budget of {rows} rows; raise the budget, or lower sinks or window")
        if self.evict and sinks + recent + self.evict > rows:
            raise UserError(f"evict={self.evict} leaves no row of the budget of {rows} to evict; lower evict or recent")

    def rows(self, n: Any, here: Here) -> Any:
        """How many of n rows (a number, or one per sequence) each head of this layer keeps; for a number, the most that n or fewer can."""
        return most_rows(self.budget, n) if isinstance(n, int) else rows_of(self.budget, n)

    def recent_rows(self, rows):
        """Of a budget of `rows` (a number or one per sequence), how many are the most recent."""
        return part_of(self.recent, rows)

    def sink_rows(self, rows):
        """Of a budget of `rows` (a number or one per sequence), how many are sinks."""
        return part_of(self.sinks, rows)

    def drafts(self, depth: int) -> str | None:
        if self.evict and depth > self.evict:
            return f"it evicts every {self.evict} rows and the drafts are {depth} deep; set evict={depth} or more"
        return None

    # -- end of prompt

    def guarded(self, rows: Prefilled, here: Here) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(score_BKS with -inf for padding, forced_BKS, keep_B): forced are the sinks and the last rows of each prompt."""
        keep_B = self.rows(rows.count_B, here)
        exists = rows.order_BKS != EMPTY
        order, n = rows.order_BKS, rows.length_B[:, None, None]
        first, last = (jnp.reshape(x, (-1, 1, 1)) for x in (self.sink_rows(keep_B), self.recent_rows(keep_B)))
        forced = exists & ((order < first) | (order >= n - last))
        score = numbers(self.score.first(rows, here).astype(jnp.float32))
        return jnp.where(exists, score, -jnp.inf), jnp.broadcast_to(forced, score.shape), keep_B

    def pack_layer(self, rows: Prefilled, room: Room, here: Here) -> Rows:
        return self.store(rows, self.choose(rows, here), room, here)

    def choose(self, rows: Prefilled, here: Here) -> jax.Array:
        """index_BKM of the rows kept, ascending; S past their number."""
        score, forced, keep_B = self.guarded(rows, here)
        most = min(self.rows(rows.most, here), rows.order_BKS.shape[2])
        return best(jnp.where(forced, jnp.inf, score), keep_B, most)

    def squeeze(self, rows: Prefilled, here: Here) -> Prefilled:
        return chosen(rows, self.choose(rows, here))

    def store(self, rows: Prefilled, index_BKM: jax.Array, room: Room, here: Here) -> Rows:
        """The chosen rows (index S = none) in the first slots of a new cache."""
        S, M = rows.order_BKS.shape[2], index_BKM.shape[-1]
        C = whole_tiles(M if self.evict else M + room.rows, rows.v_BKSH.dtype)
        order = orders_of(rows, index_BKM)
        k = pad_slots(self.stored_keys(rows, index_BKM, order, here), C, 2)
        v = pad_slots(take_rows(rows.v_BKSH, index_BKM), C, 2)
        limit = free = mass = None
        if self.evict:
            limit = self.rows(rows.count_B, here)
            free = jnp.maximum(limit[:, None, None] - self.evict, 0) + jnp.arange(self.evict, dtype=jnp.int32)
            free = jnp.broadcast_to(free, (*order.shape[:2], self.evict))
        if self.evict and self.score.fade() is not None:
            (ask,) = self.score.needs()
            mass = pad_slots(jnp.take_along_axis(pad_slots(rows.evidence_BKS[ask], S + 1, 2), index_BKM, axis=2), C, 2)
        N = here.cfg.N if mass is not None else None
        live = (order[:, 0] != EMPTY).sum(axis=-1, dtype=jnp.int32)
        return Rows(k, v, pad_slots(order, C, 2, EMPTY), live, limit, free, mass, empty_draft(k, room.draft, N))

    def read(self, q, layer: Rows, ask: Flow, here: Here) -> jax.Array:
        """out_BTNH of rotated queries over the store, and in a draft call over the drafts."""
        return read_rows(q, layer, ask, here)

    def stored_keys(self, rows: Prefilled, index_BKM: jax.Array, order_BKM: jax.Array, here: Here) -> jax.Array:
        return take_rows(rows.k_BKSH, index_BKM)

    # -- decoding

    def onward(self) -> Policy:
        return self if self.evict else Full()

    def vacancy(self, layer: Rows) -> jax.Array | None:
        return None if layer.limit_B is None else layer.limit_B - layer.live_B

    def attend(self, q, k, v, ask: Flow, new: Flow, layer: Rows, accepted: Accepted | None, across, here: Here):
        q, k = here.rotate(q, ask.angle_BT[:, :, None]), here.rotate(k, new.angle_BT[:, :, None])
        if not self.evict:
            layer = append(layer, k, v, new, accepted)
            return self.read(q, layer, ask, here), layer, across
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        if new.among_BTW is None:
            layer = write(self.make_room(layer, new.order_BT, here), k, v, new.order_BT)
            if layer.mass_BKC is None:
                return self.read(q, layer, ask, here), layer, across
            return *read_and_weigh(q, layer, self.score.fade(), ask, here), across
        assert accepted is not None
        return *self.attend_drafts(q, k, v, ask, layer, accepted, here), across

    def make_room(self, layer: Rows, arriving_BT: jax.Array, here: Here) -> Rows:
        """Evict where the rows that arrive would not fit. Small arrays only, and only when some sequence is full."""
        if layer.limit_B is None:
            return layer
        full_B = layer.live_B + (arriving_BT != EMPTY).sum(axis=1) > layer.limit_B
        return self.evict_where(layer, full_B, here)

    def evict_where(self, layer: Rows, full_B: jax.Array, here: Here) -> Rows:
        """Free `evict` slots of every head in the sequences that are full."""
        small = layer.replace(k_BKCH=None, v_BKCH=None, draft=None)

        def do(small: Rows) -> Rows:
            order = small.order_BKC
            seen = small.replace(k_BKCH=layer.k_BKCH, v_BKCH=layer.v_BKCH)  # read only; a scorer that ignores them costs nothing
            recent = order > order.max(axis=-1, keepdims=True) - jnp.reshape(self.recent_rows(layer.limit_B), (-1, 1, 1))
            first = jnp.reshape(self.sink_rows(layer.limit_B), (-1, 1, 1))
            forced = (order != EMPTY) & ((order < first) | recent)
            return evict(small, jnp.where(forced, jnp.inf, numbers(self.score.later(seen, here))), self.evict, full_B)

        small = jax.lax.cond(full_B.any(), do, lambda small: small, small)
        return small.replace(k_BKCH=layer.k_BKCH, v_BKCH=layer.v_BKCH, draft=layer.draft)

    def attend_drafts(self, q, k, v, ask: Flow, layer: Rows, accepted: Accepted, here: Here):
        """Commit, score, evict, then mask: one pass over the keys serves the accepted queries and the new ones."""
        before = layer.draft
        assert before is not None
        layer = commit(layer, accepted)
        full_B = layer.live_B >= jnp.asarray(layer.limit_B)
        if before.q_BWNH is None or layer.mass_BKC is None:
            layer = hold(self.evict_where(layer, full_B, here), k, v, ask)
            return self.read(q, layer, ask, here), layer
        asked = jnp.take_along_axis(before.q_BWNH, accepted.path_BW[..., None, None], axis=1)
        logits = scores(jnp.concatenate([asked, q], axis=1), layer.k_BKCH, here.cfg.scale, here.cfg.softcap)
        W = asked.shape[1]
        layer = weigh_accepted(logits[..., :W, :], layer, before, accepted, self.score.fade(), here)
        layer = hold(self.evict_where(layer, full_B, here), k, v, ask, q)
        out, lse = attend_both(logits[..., W:, :], q, layer, ask, here)
        draft = layer.draft
        assert draft is not None and draft.lse_BWN is not None
        return out, layer.replace(draft=draft.replace(lse_BWN=aside(draft.lse_BWN, lse, 1, ask.at)))


def orders_of(rows: Prefilled, index_BKM: jax.Array) -> jax.Array:
    """order_BKM of the chosen rows of each head; EMPTY for index S."""
    B, K, S, _ = rows.k_BKSH.shape
    order = jnp.broadcast_to(rows.order_BKS, (B, K, S))
    return jnp.take_along_axis(pad_slots(order, S + 1, 2, EMPTY), index_BKM, axis=2)


def chosen(rows: Prefilled, index_BKM: jax.Array) -> Prefilled:
    """The prefilled layer with only these rows of each head, in ascending order (index S = none)."""
    S = rows.order_BKS.shape[2]

    def take(x_BKS):
        return jnp.take_along_axis(pad_slots(x_BKS, S + 1, 2), index_BKM, axis=2)

    return rows.replace(
        k_BKSH=take_rows(rows.k_BKSH, index_BKM), v_BKSH=take_rows(rows.v_BKSH, index_BKM), order_BKS=orders_of(rows, index_BKM),
        evidence_BKS={a: take(x) if a.per_row else x for a, x in rows.evidence_BKS.items()},
    )  # fmt: skip


def part_of(some: float | int, rows):
    """A number of rows, or a share of `rows` (a number or one per sequence), rounded down."""
    if not isinstance(some, float):
        return some
    return int(some * rows) if isinstance(rows, int) else (some * rows).astype(jnp.int32)


def numbers(score: jax.Array) -> jax.Array:
    """Scores; a row whose score is no number is worth least of all, but exists."""
    return jnp.where(jnp.isnan(score), jnp.finfo(score.dtype).min, score)


def aged(mass_BKC: jax.Array | None, fade: float | None, count_B: jax.Array) -> jax.Array:
    """What `count` new queries leave of the mass so far."""
    assert mass_BKC is not None and fade is not None
    return mass_BKC if fade == 1 else mass_BKC * (fade**count_B)[:, None, None]


def read_and_weigh(q_BTNH: jax.Array, layer: Rows, fade: float | None, ask: Flow, here: Here) -> tuple[jax.Array, Rows]:
    """Attention of one certain row over the store, and its probabilities added to each slot's mass, from one pass over the keys."""
    cfg = here.cfg
    seen = visible(layer.order_BKC, here.lo(ask.order_BT), ask.hi_BT)[:, :, None]
    p, _ = softmax(scores(q_BTNH, layer.k_BKCH, cfg.scale, cfg.softcap), seen)
    before = aged(layer.mass_BKC, fade, (ask.order_BT != EMPTY).sum(axis=1))
    return combine(p, layer.v_BKCH), layer.replace(mass_BKC=before + p.sum(axis=(2, 3)))


def weigh_accepted(logits_BKGWC, layer: Rows, draft, accepted: Accepted, fade: float | None, here: Here) -> Rows:
    """The layer with the mass that the previous call's accepted queries give to every slot, their own rows included."""
    order_BW = accepted_orders(draft, accepted)
    lse = jnp.take_along_axis(draft.lse_BWN, accepted.path_BW[..., None], axis=1)
    B, W, N = lse.shape
    lse = jnp.moveaxis(lse.reshape(B, W, here.cfg.K, N // here.cfg.K), 1, 3)[..., None]
    seen = visible(layer.order_BKC, here.lo(order_BW), order_BW)[:, :, None]
    assert fade is not None
    weight = fade ** jnp.maximum(accepted.count_B[:, None] - 1 - jnp.arange(W), 0)
    added = (jnp.where(seen, jnp.exp(logits_BKGWC - lse), 0.0) * weight[:, None, None, :, None]).sum(axis=(2, 3))
    return layer.replace(mass_BKC=aged(layer.mass_BKC, fade, accepted.count_B) + added)


def attend_both(logits_BKGTC, q, layer: Rows, ask: Flow, here: Here) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH, lse_BTN) of draft queries over the store and the draft's rows in one softmax."""
    cfg, draft = here.cfg, layer.draft
    assert draft is not None
    lo = here.lo(ask.order_BT)
    stored = visible(layer.order_BKC, lo, ask.hi_BT)[:, :, None]
    W = draft.k_BKWH.shape[2]
    fresh = jnp.broadcast_to(among(ask, lo, draft.order_BW)[:, None, None], (*stored.shape[:-1], W))
    logits = jnp.concatenate([logits_BKGTC, scores(q, draft.k_BKWH.astype(q.dtype), cfg.scale, cfg.softcap)], axis=-1)
    p, lse = softmax(logits, jnp.concatenate([stored, fresh], axis=-1))
    C = layer.capacity
    out = combine(p[..., :C], layer.v_BKCH) + combine(p[..., C:], draft.v_BKWH)
    B, K, G, T = lse.shape
    return out, jnp.moveaxis(lse, 3, 1).reshape(B, T, K * G)
