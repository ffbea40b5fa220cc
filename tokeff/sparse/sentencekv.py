"""SentenceKV (Zhu et al. 2025): rows are kept as SnapKV keeps them, and read sentence by sentence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from tokeff.errors import UserError
from tokeff.kv.budget import AtLeast, Budget, most_rows, rows_of
from tokeff.kv.cache import Room, Rows, accepted_orders, per_head
from tokeff.kv.evidence import Evidence
from tokeff.kv.hosted import Store, append, near_at
from tokeff.kv.keep import Keep
from tokeff.kv.policy import Prefilled, pad_slots
from tokeff.kv.score import WindowMass
from tokeff.models.attention import NEG, scores, wide
from tokeff.models.flow import EMPTY, Accepted, Flow, Here
from tokeff.models.load import Model
from tokeff.sparse.gather import read_all
from tokeff.sparse.read import Read
from tokeff.sparse.select import Readable, Selector
from tokeff.sparse.sentences import Breaks, Heard, New, Sentences, Tokens, causal, certain, sentence_ends

add = per_head(lambda x, at, new: x.at[at].add(new, mode="drop"))
top = per_head(lambda x, at, new: x.at[at].max(new, mode="drop"))


@dataclass(frozen=True)
class BySentence(Selector):
    """Rows of the sentences whose mean key has the largest product with the query; one that is not wholly open is not chosen. Rows of a
    sentence are worth the same, so they are taken together, the first ones where the budget ends inside it."""

    breaks: Breaks

    def check(self, cfg, length: int) -> None:
        self.breaks.check(cfg)

    def worth(self, q_BTNH: jax.Array, layer: Readable, open_BKTP: jax.Array, here: Here) -> jax.Array:
        s: Sentences = layer.summary
        mean = scores(q_BTNH, s.sum_BKPH, 1.0, 0.0).sum(axis=2) / jnp.maximum(s.count_BKP, 1)[:, :, None]
        shape = (*open_BKTP.shape[:3], s.last_BKP.shape[2])
        whole = jnp.take_along_axis(open_BKTP, jnp.broadcast_to(jnp.maximum(s.last_BKP, 0)[:, :, None], shape), axis=3)
        worth = jnp.where(whole & (s.count_BKP > 0)[:, :, None], mean, NEG)
        return jnp.take_along_axis(worth, jnp.broadcast_to(s.of_BKC[:, :, None], open_BKTP.shape), axis=3)


@dataclass(frozen=True)
class SentenceKV(Read):
    """Of the prompt the `budget * factor` rows that SnapKV would keep stay, with the mean key of each sentence; of those a query reads the
    first `sinks`, the last `recent`, and whole sentences by the mean query of the sentence being written, `budget` rows in all (Zhu et al.
    2025, sec. 3).

    The sentence that is being written counts from its first row, or from the end of the prompt; the published code reads everything it
    kept while that sentence has one row. A sentence can be chosen when the last of its rows is no longer recent, which makes drafts exact;
    there, when it ends. Queries of a kv head's query heads are added up. The prompt's last sentence ends with the prompt.
    """

    selector: BySentence
    factor: float = 3.0
    window: int = 32
    kernel: int = 7

    @property
    def rule(self) -> Keep:
        """What stays of the prompt."""
        return Keep(times(self.budget, self.factor), WindowMass(self.window, self.kernel, "max"), self.sinks, max(self.window, self.recent))

    def needs(self) -> tuple[Evidence, ...]:  # type: ignore[override]
        return (*self.rule.needs(), Tokens())

    def check(self, cfg, length: int) -> None:
        super().check(cfg, length)
        if self.factor < 1:
            raise UserError(f"factor={self.factor} keeps fewer rows than the budget reads; give at least 1")
        if (self.select, self.own, self.reuse, self.heads) != (None, True, None, None):
            raise UserError("sentences are chosen anew in every layer and step; leave select, own, reuse and heads as they are")
        if self.within is not None:
            raise UserError("SentenceKV has a rule of its own for what stays of the prompt; leave out within")
        self.rule.score.check()
        rows, sure = most_rows(self.rule.budget, length), self.sinks + max(self.window, self.recent)
        if not self.whole and sure > rows:
            raise UserError(f"{rows} rows are kept, fewer than {sure} sinks and rows of the window; raise budget or factor")

    def fit(self, m: Model) -> SentenceKV:
        breaks = self.selector.breaks
        if breaks.ends is not None:
            return self
        ends = sentence_ends(m.tok)
        if not ends:
            raise UserError(f"no piece of {m.name}'s vocabulary ends a sentence; give ends, the token ids that do")
        return replace(self, selector=BySentence(replace(breaks, ends=ends)))

    def drafts(self, depth: int) -> str | None:
        return super().drafts(depth + 1)  # one more: a sentence is closed by a row behind it

    def alone(self, run: tuple[int, ...], cfg) -> str | None:
        return "a row chooses with all queries of its sentence, which must come in one call; use a drafter that runs no layers"

    def pack_layer(self, rows: Prefilled, room: Room, here: Here) -> Readable:
        index = self.rule.choose(rows, here)
        store = self.rule.store(rows, index, room, here)
        far, far_B = self.far(most_rows(self.budget, rows.most)), self.far(rows_of(self.budget, rows.length_B))
        if self.whole:
            far, far_B = store.capacity, jnp.full_like(far_B, store.capacity)
        summary = self.sentences(rows, index, store, room)
        return Readable(self.laid(store, index.shape[2], room, here), far_B, summary, None, max(far, 1))

    def sentences(self, rows: Prefilled, index_BKM: jax.Array, store: Rows, room: Room) -> Sentences:
        """Those of the prompt, from the rows that were kept."""
        (B, K, C), S, H, breaks = store.order_BKC.shape, rows.order_BKS.shape[2], store.k_BKCH.shape[-1], self.selector.breaks
        number_BS, end_B = breaks.prompt(rows.evidence_BKS[Tokens()][:, 0], rows.order_BKS[:, 0] != EMPTY)
        number = jnp.broadcast_to(pad_slots(number_BS, S + 1, 1)[:, None], (B, K, S + 1))
        of, P = pad_slots(jnp.take_along_axis(number, index_BKM, axis=2), C, 2), breaks.most(S + room.rows)
        dtype, slot = wide(store.k_BKCH.dtype), jnp.where(store.order_BKC == EMPTY, C, jnp.arange(C, dtype=jnp.int32))
        at = jnp.where(slot == C, P, of)
        last = top(jnp.full((B, K, P), EMPTY, jnp.int32), at, slot)
        heard = Heard(jnp.full((B, room.draft), EMPTY, jnp.int32), jnp.zeros((B, room.draft, K, H), dtype)) if room.draft else None
        total = add(jnp.zeros((B, K, P, H), dtype), at, store.k_BKCH.astype(dtype))
        count = add(jnp.zeros((B, K, P), jnp.int32), at, jnp.ones_like(at))
        asked, shift_B = jnp.zeros((B, K, H), dtype), rows.here_B - rows.length_B
        return Sentences(total, count, last, of, asked, shift_B, rows.here_B, number_BS[:, -1] + 1, rows.here_B, end_B, heard)

    def listen(self, s: Sentences, new: New) -> jax.Array:
        """sum_BTKH of the queries of each row's sentence so far, its own included: what its choice is made with."""
        breaks = self.selector.breaks
        start, _, _ = breaks.follow(s, new)
        now = breaks.start(s.begin_B, s.next_B)
        mine = new.among_BTW & new.there_BT[:, None] & (new.places(s)[:, None] >= start[:, :, None])
        earlier = jnp.where((start == now[:, None])[..., None, None], s.asked_BKH[:, None], 0)
        return earlier + jnp.einsum("bts,bskh->btkh", mine.astype(new.q_BTKH.dtype), new.q_BTKH, precision="highest")

    def arrive(self, s: Sentences, new: New, before: Store, rows: Store) -> Sentences:
        """The sentences after these rows became certain; they are in the slots behind those that were filled before."""
        breaks, there = self.selector.breaks, new.there_BT
        _, number, after = breaks.follow(s, new)
        now, then = breaks.start(s.begin_B, s.next_B), breaks.start(after.begin_B, after.next_B)
        mine = (there & (new.places(s) >= then[:, None]))[..., None, None]
        asked = jnp.where((now == then)[:, None, None], s.asked_BKH, 0) + jnp.where(mine, new.q_BTKH, 0).sum(axis=1)
        (B, K, C), T = rows.order_BKC.shape, there.shape[1]
        slot = before.live_B[:, None] + jnp.cumsum(there, axis=1, dtype=jnp.int32) - 1
        slot = jnp.broadcast_to(jnp.where(there, slot, C + jnp.arange(T, dtype=jnp.int32))[:, None], (B, K, T))
        at = jnp.broadcast_to(jnp.where(there, number, s.count_BKP.shape[2])[:, None], (B, K, T))
        k = near_at(rows, slot)[0].astype(s.sum_BKPH.dtype)
        put = per_head(lambda x, at, new: x.at[at].set(new, mode="drop", unique_indices=True))
        return after.replace(
            sum_BKPH=add(s.sum_BKPH, at, k), count_BKP=add(s.count_BKP, at, jnp.ones_like(at)), last_BKP=top(s.last_BKP, at, slot),
            of_BKC=put(s.of_BKC, slot, at), asked_BKH=asked,
        )  # fmt: skip

    def attend(self, q, k, v, ask: Flow, new: Flow, layer: Readable, accepted: Accepted | None, across, here: Here):
        raw = q
        q, k = here.rotate(q, ask.angle_BT[:, :, None]), here.rotate(k, new.angle_BT[:, :, None])
        before, rows, s = layer.rows, append(layer.rows, k, v, new, accepted), layer.summary
        asks = q.astype(s.asked_BKH.dtype).reshape(*k.shape[:3], -1, k.shape[3]).sum(axis=3)
        assert new.id_BT is not None
        now = New(new.id_BT, new.order_BT, causal(new.order_BT) if new.among_BTW is None else new.among_BTW, asks)
        if new.among_BTW is None:
            chooses, s = self.listen(s, now), self.arrive(s, now, before, rows)
        else:
            assert accepted is not None and before.draft is not None and s.heard is not None
            heard, real = s.heard.of(new.id_BT, asks), certain(s.heard, accepted_orders(before.draft, accepted), accepted)
            s = self.arrive(s, real, before, rows)
            chooses, s = self.listen(s, now), s.replace(heard=heard)
        layer = layer.replace(rows=rows, summary=s)
        if self.kind(here.layer) == "dense":
            return read_all(q, rows, ask, here), layer, across
        page, _, layer = self.selected(chooses, raw, layer, ask, here)
        return self.read(q, raw, rows, page, 1, ask, here), layer, across


def times(budget: Budget | AtLeast, factor: float) -> Any:
    """So many times a budget, at most all rows."""
    if isinstance(budget, AtLeast):
        return AtLeast(min(budget.share * factor, 1.0), round(budget.rows * factor))
    return min(budget * factor, 1.0) if isinstance(budget, float) else round(budget * factor)
