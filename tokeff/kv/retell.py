"""KVzip (Kim et al. 2025): a row is worth what a model needs of it to say the context again. A second pass over the prompt finds out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from tokeff.errors import UserError
from tokeff.kv.evidence import Evidence, Seen
from tokeff.kv.policy import Prefilled, pad_slots
from tokeff.kv.prefill import Embeds, Prompt, prefill
from tokeff.kv.score import Scorer
from tokeff.models.attention import scores, softmax
from tokeff.models.flow import Here
from tokeff.models.transformer import embed

TAIL = 8  # tokens of the piece before that lead into a piece


class Told(struct.PyTreeNode):
    """The largest attention so far that each stored row got while rows lo to hi - 1 are told again by rows from `end` on."""

    lo_B: jax.Array
    hi_B: jax.Array
    end_B: jax.Array
    most_BKS: jax.Array


@dataclass(frozen=True)
class Telling(Evidence):
    """Attention, while one piece is told again, to each of its rows: the largest over queries and the heads of a group. Probabilities are
    among the first `sinks` rows, the piece, and what is being said. `before` names the piece."""

    sinks: int
    block: int = 128

    def gather(self, seen: Seen, before: Told, here: Here) -> Told:
        T, S = seen.q_BTNH.shape[1], seen.order_BKS.shape[2]
        most = pad_slots(before.most_BKS, S, 2)
        for a in range(0, T, self.block):
            most = jnp.maximum(most, self.part(seen, slice(a, a + self.block), before, here))
        return before.replace(most_BKS=most)

    def part(self, seen: Seen, some: slice, told: Told, here: Here) -> jax.Array:
        """most_BKS of one block of queries."""
        order = seen.order_BKS[:, 0]
        lo, hi, end = (x[:, None] for x in (told.lo_B, told.hi_B, told.end_B))
        piece = (order >= lo) & (order < hi)
        asked = seen.ask.order_BT[:, some, None]
        among = (piece | (order < self.sinks) | (order >= end))[:, None]
        visible = among & (order[:, None] >= here.lo(asked)) & (order[:, None] <= asked)
        p, _ = softmax(scores(seen.q_BTNH[:, some], seen.k_BKSH, here.cfg.scale, here.cfg.softcap), visible[:, None, None])
        return jnp.where(piece[:, None], p.max(axis=(2, 3)), 0.0)


@dataclass(frozen=True)
class Retold(Evidence):
    """The prompt told again after its prefill, piece by piece of `piece` tokens: `ask` (token ids of "Repeat the previous context:"), the
    last 8 tokens of the piece before, and the piece, over the whole cache (Kim et al. 2025, sec. 3.2)."""

    piece: int = 2048
    sinks: int = 4
    ask: tuple[int, ...] = ()
    per_row: ClassVar[bool] = True

    def check(self, cfg, length: int) -> None:
        again = len(self.ask) + TAIL + min(self.piece, length)
        if length + again > cfg.max_len:
            raise UserError(f"telling {again} tokens again after {length} exceeds the {cfg.max_len} that {cfg.name} reads; lower piece")
        if any(not 0 <= t < cfg.V for t in self.ask):
            raise UserError(f"ask names a token outside the vocabulary; {cfg.name} has ids 0 to {cfg.V - 1}")

    def like(self, B: int, S: int, cfg) -> Any:
        return jax.ShapeDtypeStruct((B, cfg.K, S), "float32")

    def gather(self, seen: Seen, before, here: Here) -> jax.Array:
        """Nothing yet: room for the rows of this call."""
        B, K, S, _ = seen.k_BKSH.shape
        return jnp.zeros((B, K, S), jnp.float32) if before is None else pad_slots(before, S, 2)

    def revisit(self, params, cfg, prompt: Prompt, tokens_BT: jax.Array, length_B: jax.Array, dtype: str, x_BTD=None) -> Prompt:
        """The prompt with what telling its last `length` tokens again found."""
        for a in range(0, tokens_BT.shape[1], self.piece):
            layers = tuple(self.tell(params, cfg, prompt, tokens_BT, length_B, a, dtype, x_BTD))
            prompt = prompt.replace(layers=layers)
        return prompt

    def tell(self, params, cfg, prompt: Prompt, tokens_BT, length_B, a: int, dtype: str, x_BTD):
        """The layers after one piece, which begins at token `a` of those."""
        start, stop = max(a - TAIL, 0), min(a + self.piece, tokens_BT.shape[1])
        ask_BT = jnp.tile(jnp.asarray(self.ask, tokens_BT.dtype), (len(length_B), 1))
        said, vectors = jnp.concatenate([ask_BT, tokens_BT[:, start:stop]], axis=1), None
        if x_BTD is not None:
            vectors = Embeds(jnp.concatenate([embed(params, cfg, ask_BT, ask_BT).x_BTD, x_BTD[:, start:stop]], axis=1))
        many_B = jnp.where(length_B > a, len(self.ask) + jnp.minimum(length_B, stop) - start, 0)
        first_B, telling = prompt.next_B - length_B, Telling(self.sinks)
        primed = [
            layer.replace(evidence_BKS={telling: Told(first_B + a, first_B + stop, prompt.next_B, jnp.zeros(layer.k_BKSH.shape[:3]))})
            for layer in prompt.layers
        ]
        before = prompt.replace(layers=tuple(primed))
        found = prefill(params, cfg, said, many_B, evidence=(telling,), after=before, dtype=dtype, embeds=vectors)
        for layer, told in zip(prompt.layers, found.layers, strict=True):
            most = told.evidence_BKS[telling].most_BKS[..., : layer.k_BKSH.shape[2]]
            yield layer.replace(evidence_BKS=layer.evidence_BKS | {self: jnp.maximum(layer.evidence_BKS[self], most)})


@dataclass(frozen=True)
class Reconstruction(Scorer):
    """The largest attention a row gets while the context is told again (Kim et al. 2025, eq. 3)."""

    told: Retold = Retold()

    def needs(self) -> tuple[Evidence, ...]:
        return (self.told,)

    def check(self) -> None:
        if self.told.piece < 1:
            raise UserError(f"pieces of {self.told.piece} tokens tell nothing again; give at least 1")

    def first(self, rows: Prefilled, here: Here) -> jax.Array:
        return rows.evidence_BKS[self.told]
