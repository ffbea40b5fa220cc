"""R2R (Fu et al. 2025): a small model writes, and the large one gives the tokens at which it is unsure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from tokeff.decode.draft import Draft, Result, Target, last_token
from tokeff.decode.draft_model import FULL, OwnModel
from tokeff.decode.grow import Grower, Grown, Levels
from tokeff.decode.rule import Rule
from tokeff.decode.sample import draw
from tokeff.decode.self_draft import chain_parents
from tokeff.errors import UserError

if TYPE_CHECKING:
    from tokeff.decode.loop import Decoding


@dataclass(frozen=True)
class Trust(Rule):
    """Every token of a chain stands. Behind a chain that ends early the target draws one. Behind a whole one the drafter goes on by itself:
    its last token, which the target's cache does not take in yet, is the next root."""

    lossless: ClassVar[bool] = False

    def judge(self, draft, logits_BWV, place_BW, key_B, how, depth):
        n = draft.valid_BW[:, 1:].sum(axis=1, dtype=jnp.int32)
        at = jnp.arange(depth + 1, dtype=jnp.int32)[None]
        ahead = jnp.pad(draft.tokens_BW[:, 1:], ((0, 0), (0, 1)))
        emitted = jnp.where(at < n[:, None], ahead, draw(logits_BWV, place_BW, key_B, how))
        count = jnp.minimum(n + 1, depth)
        return jnp.minimum(at, count[:, None] - 1), emitted, count


TRUST = Trust()


class Routing(struct.PyTreeNode):
    """The small model's cache, and how many tokens the large one gave after the first."""

    layers: tuple[Any, ...]
    asked_B: jax.Array


@dataclass(frozen=True)
class Routed(OwnModel):
    """The small model, `params.side[name]` with the sizes `cfg`, generates; a token to which it gives less than the probability `sure` the
    large model, whose parameters these are, generates in its place (R2R, Fu et al. 2025).

    As a drafter: the small model drafts until it is unsure, nothing it drafted is refused, and the pass in which the large model reads all
    of that also gives the next token. After `length` sure tokens the large model reads without being asked, so the text does not depend on
    `length`. The first token is the large model's, which read the prompt.

    The paper's router is a small network that sees logits, hidden row and token, trained on tokens behind which the two models' texts were
    found to diverge. This one is a threshold on the small model's best probability (before temperature) that nobody tuned: the mechanism,
    not the paper's quality. sure=0 is the small model alone; above 1, the large one alone.
    """

    sure: float = 0.9
    rule: Rule = field(default=TRUST, kw_only=True)

    def __post_init__(self):
        if self.length < 2 or not self.sure >= 0:
            raise UserError(f"length={self.length} must be at least 2 and sure={self.sure} a probability; use plain decoding for one model")

    def prepare(self, m, tokens_BT, length_B, new) -> Routing:
        return Routing(self.read(m, tokens_BT, length_B, new, draft=self.nodes), jnp.zeros_like(length_B))

    def draft(self, s: Decoding, target: Target) -> tuple[Draft, Decoding]:
        B, root_B, own = s.count_B.shape[0], s.count_B - 1, (target.params.side or {})[self.name]
        grower = Grower(
            own, self.cfg, FULL, target.how, Levels.chains(self.length), s.key_B, root_B, root_B - s.gone_B, s.done_B, self.nodes,
            stop_B=jnp.full(B, self.sure),
        )  # fmt: skip
        g = grower.plant(s.drafter.layers, last_token(s.tokens_BS, s.count_B), s.accepted)
        g = self.routed(grower.named(g))

        def more(g: Grown) -> jax.Array:
            return (g.level < self.length) & (g.valid_BW[:, g.level] & ~s.done_B).any()

        g = jax.lax.while_loop(more, lambda g: self.routed(grower.named(grower.ran(g))), g)
        return Draft(g.tokens_BW, chain_parents(self.length, B), g.valid_BW), s.replace(drafter=s.drafter.replace(layers=g.layers))

    def routed(self, g: Grown) -> Grown:
        """Without the tokens that are the large model's to give."""
        return g.replace(valid_BW=(g.valid_BW & (g.sure_BW >= self.sure)).at[:, 0].set(True))

    def observe(self, state: Routing, draft: Draft, result: Result) -> Routing:
        n = draft.valid_BW[:, 1:].sum(axis=1, dtype=jnp.int32)
        return state.replace(asked_B=state.asked_B + ((n < self.length) & (result.count_B == n + 1)))
