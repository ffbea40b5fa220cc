"""Where sentences end in a text that grows: token ids, places, and the sentence of each row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tokeff.errors import UserError
from tokeff.kv.cache import aside
from tokeff.kv.evidence import Evidence, Seen
from tokeff.models.flow import EMPTY, Accepted, Here
from tokeff.models.tokenizer import Tokenizer


@lru_cache(maxsize=8)
def sentence_ends(tok: Tokenizer, marks: str = ".!?;\n") -> tuple[int, ...]:
    """Ids of the vocabulary's pieces whose text ends in one of `marks`, ascending: what ends a sentence for `sentencekv(ends=...)`."""
    ids = sorted(i for i in tok.raw.get_vocab().values() if i < tok.V)
    return tuple(i for i in ids if tok.decode([i]).endswith(tuple(marks)))


@dataclass(frozen=True)
class Tokens(Evidence):
    """The token id of each stored row, (B, K, S), the same for every head; EMPTY where no call that gathered it brought the row."""

    per_row: ClassVar[bool] = True

    def like(self, B: int, S: int, cfg) -> Any:
        return jax.ShapeDtypeStruct((B, cfg.K, S), "int32")

    def gather(self, seen: Seen, before, here: Here) -> jax.Array:
        if seen.id_BT is None:
            raise UserError("these rows come without tokens, so where sentences end is unknown; prefill the text itself")
        (B, K, S, _), T = seen.k_BKSH.shape, seen.id_BT.shape[1]
        found = jnp.full((B, K, S), EMPTY, jnp.int32).at[..., S - T :].set(seen.id_BT[:, None])
        return found if before is None else found.at[..., : before.shape[-1]].set(before)


class Heard(struct.PyTreeNode):
    """The W draft rows of the last call: their tokens, and their queries added up over the heads of a group."""

    id_BW: jax.Array
    q_BWKH: jax.Array

    def of(self, id_BT: jax.Array, q_BTKH: jax.Array) -> Heard:
        """Those of another call, which may be narrower."""
        return Heard(aside(self.id_BW, id_BT, 1, None, EMPTY), aside(self.q_BWKH, q_BTKH, 1, None))


class Sentences(struct.PyTreeNode):
    """P sentences of what a head keeps, and where in the text the next row stands.

    sum_BKPH, count_BKP, last_BKP: the sum of a sentence's rotated keys, their number and the slot of the last one. of_BKC: whose row a slot
    holds. asked_BKH: the sum of the unfinished sentence's queries. A row's place is its order + shift_B: its number among the rows that
    reached this layer. next_B: the place of the next row, number_B its sentence; begin_B: the place behind the last counted end; end_B:
    the place of the last end, counted or not.
    """

    sum_BKPH: jax.Array
    count_BKP: jax.Array
    last_BKP: jax.Array
    of_BKC: jax.Array
    asked_BKH: jax.Array
    shift_B: jax.Array
    next_B: jax.Array
    number_B: jax.Array
    begin_B: jax.Array
    end_B: jax.Array
    heard: Heard | None


class New(struct.PyTreeNode):
    """T rows of one call: their tokens, their orders, which of them each reads, and their queries added up over the heads of a group."""

    id_BT: jax.Array
    order_BT: jax.Array
    among_BTW: jax.Array
    q_BTKH: jax.Array

    @property
    def there_BT(self) -> jax.Array:
        return self.order_BT != EMPTY

    def places(self, s: Sentences) -> jax.Array:
        return self.order_BT + s.shift_B[:, None]


@dataclass(frozen=True)
class Breaks:
    """Where sentences end: at tokens of `ends`, of which the first counts in each `cell` places of the text, and every `longest` rows.
    So a text of n rows has at most n / cell + n / longest + 2 sentences. ends=None: those that `sentence_ends` finds in a model."""

    ends: tuple[int, ...] | None
    cell: int = 16
    longest: int = 64

    def check(self, cfg) -> None:
        if self.ends == ():
            raise UserError("no token ends a sentence; give ends=tokeff.sparse.sentences.sentence_ends(model.tok), or None for the same")
        if self.ends is not None and not 0 <= min(self.ends) <= max(self.ends) < cfg.V:
            raise UserError(f"ends names a token outside the vocabulary; {cfg.name} has ids 0 to {cfg.V - 1}")
        if not 1 <= self.cell <= self.longest:
            raise UserError(f"cell={self.cell} must be at least 1 and longest={self.longest} no less than it")

    def most(self, n: int) -> int:
        return -(-n // self.cell) + n // self.longest + 2

    def is_end(self, id_BT: jax.Array) -> jax.Array:
        if not self.ends:
            raise UserError("which tokens end a sentence is open; give ends=tokeff.sparse.sentences.sentence_ends(model.tok)")
        table = np.zeros(max(self.ends) + 2, bool)
        table[list(self.ends)] = True  # its last entry is that of all larger ids
        return (id_BT >= 0) & jnp.asarray(table)[jnp.clip(id_BT, 0, len(table) - 1)]

    def start(self, begin: jax.Array, place: jax.Array) -> jax.Array:
        """The place where the sentence of a row starts, behind the end before it."""
        return begin + (place - begin) // self.longest * self.longest

    def prompt(self, id_BS: jax.Array, there_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(number_BS, end_B): the sentence of each row of a prompt, and the place of the last end (-1: none)."""
        place = jnp.cumsum(there_BS, axis=1, dtype=jnp.int32) - 1

        def before(mark_BS):
            """The largest place before each row that is marked, -1 for none."""
            return jnp.pad(jax.lax.cummax(jnp.where(mark_BS, place, -1), axis=1), ((0, 0), (1, 0)), constant_values=-1)

        end = self.is_end(id_BS) & there_BS
        last = before(end)
        counted = end & (last[:, :-1] // self.cell < place // self.cell)
        start = self.start(before(counted)[:, :-1] + 1, place)
        return jnp.cumsum(jnp.diff(start, axis=1, prepend=start[:, :1]) > 0, axis=1, dtype=jnp.int32), last[:, -1]

    def follow(self, s: Sentences, new: New) -> tuple[jax.Array, jax.Array, Sentences]:
        """(start_BT, number_BT, the places after all these rows) of each row behind those that it reads."""
        there, place = new.there_BT, new.places(s)
        among = new.among_BTW & there[:, None] & there[:, :, None]
        strictly = among & (place[:, None] < place[:, :, None])

        def latest(mark_BT, since_B):
            """(place_BT of the last marked row before each row, place_B of the last one of all); `since` where there is none."""
            found = jnp.where(mark_BT, place, EMPTY)
            of_row = jnp.where(strictly, found[:, None], EMPTY).max(axis=2)
            return jnp.maximum(of_row, since_B[:, None]), jnp.maximum(found.max(axis=1), since_B)

        end = self.is_end(new.id_BT) & there
        last_BT, end_B = latest(end, s.end_B)
        last_BT, begin_B = latest(end & (last_BT // self.cell < place // self.cell), s.begin_B - 1)
        start, now = self.start(last_BT + 1, place), self.start(s.begin_B, s.next_B)
        first = there & (place == start) & (start > now[:, None])
        next_B = jnp.maximum(jnp.where(there, place, EMPTY).max(axis=1) + 1, s.next_B)
        then = self.start(begin_B + 1, next_B)
        number_B = s.number_B + first.sum(axis=1, dtype=jnp.int32) + ((then == next_B) & (then > now))
        number = s.number_B[:, None] + (among & first[:, None]).sum(axis=2, dtype=jnp.int32)
        return start, number, s.replace(next_B=next_B, begin_B=begin_B + 1, end_B=end_B, number_B=number_B)


def causal(order_BT: jax.Array) -> jax.Array:
    """among_BTW of rows that are all certain: each reads those before it and itself."""
    return order_BT[:, None] <= order_BT[:, :, None]


def certain(heard: Heard | None, order_BW: jax.Array, accepted: Accepted) -> New:
    """The accepted rows of the last call, which have these orders."""
    assert heard is not None, "this cache was packed without room for drafts"
    path = accepted.path_BW
    ids, asks = jnp.take_along_axis(heard.id_BW, path, axis=1), jnp.take_along_axis(heard.q_BWKH, path[..., None, None], axis=1)
    return New(ids, order_BW, causal(order_BW), asks)
