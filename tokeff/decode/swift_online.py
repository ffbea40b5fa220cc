"""SWIFT's search while it generates (Xia et al. 2024): which halves draft is data, so trying others compiles nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import struct

from tokeff.decode.draft import Draft, Target
from tokeff.decode.grow import Grower
from tokeff.decode.loop import settle_rows
from tokeff.decode.sample import draw, first_max
from tokeff.decode.swift import GOOD, Leaved, left_out, spread
from tokeff.errors import UserError
from tokeff.kv.policy import Policy
from tokeff.models.config import Config, Params
from tokeff.models.flow import EMPTY, Accepted, Flow, Here
from tokeff.models.transformer import alike, embed, one_layer, unembed

if TYPE_CHECKING:
    from tokeff.decode.loop import Decoding


class Halves(struct.PyTreeNode):
    """Whether each layer's attention, and its feed-forward, drafts. Those of the first and the last layer always do."""

    attention_L: jax.Array
    ffn_L: jax.Array

    @staticmethod
    def without(gone: jax.Array) -> Halves:
        """All but those that are gone of the halves between the first layer and the last: attention of layer 1, its feed-forward, ..."""
        first, second = (jnp.pad(~gone[half::2], 1, constant_values=True) for half in (0, 1))
        return Halves(first, second)


class Search(struct.PyTreeNode):
    """The best halves so far, and what they are worth (-1 before they are tried); how many choices were tried, how many since then."""

    best: Halves
    worth: jax.Array
    tried: jax.Array
    since: jax.Array

    def heard(self, halves: Halves, worth: jax.Array) -> Search:
        """With one more choice tried."""
        worth = worth.astype(self.worth.dtype)
        better = worth > self.worth
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), halves, self.best)
        return Search(best, jnp.maximum(worth, self.worth), self.tried + 1, jnp.where(better, 0, self.since + 1))


@dataclass(frozen=True)
class Chosen(Grower):
    """A grower that runs the halves which data names."""

    halves: Halves | None = None

    def through(self, flow: Flow, layers, accepted: Accepted):
        assert self.halves is not None
        return *run_halves(self.params, self.cfg, flow, layers, self.policy, accepted, self.halves), {}


def run_halves(
    params: Params, cfg: Config, flow: Flow, layers: tuple[Any, ...], policy: Policy, accepted: Accepted, halves: Halves
) -> tuple[Flow, tuple[Any, ...]]:
    """Every row through the halves that draft. Each is a loop of one turn or none, whose weights are not read where there is none: a
    branch would copy caches, loops hand them on."""
    out = list(layers)
    for i, w in enumerate(params.blocks):
        one = partial(one_layer, w, policy=policy, cut=None, here=Here(alike(policy, None, cfg, i), cfg))
        if i in (0, cfg.L - 1):
            flow, out[i], _ = one(flow, out[i], accepted, None)
            continue

        def attend(carry, one=one, flow=flow):
            on, x, layer = carry
            after, layer, _ = one(flow.replace(x_BTD=x), layer, accepted, None, halves=(True, False))
            return jnp.zeros_like(on), after.x_BTD, layer

        def feed(carry, one=one, flow=flow):
            on, x = carry
            return jnp.zeros_like(on), one(flow.replace(x_BTD=x), None, None, None, halves=(False, True))[0].x_BTD

        _, x, out[i] = jax.lax.while_loop(lambda c: c[0], attend, (halves.attention_L[i], flow.x_BTD, out[i]))
        _, x = jax.lax.while_loop(lambda c: c[0], feed, (halves.ffn_L[i], x))
        flow = flow.replace(x_BTD=x)
    return flow, tuple(out)


@dataclass(frozen=True)
class OnlineSwift(Leaved):
    """The model drafts with halves of its layers left out, and learns which while it generates (Xia et al. 2024).

    It begins with evenly spread ones. As soon as a sequence has `tail` new tokens every pass tries one choice, the even one first, then
    random ones: what it is worth is the share of the last `tail` tokens that drafting with it names. The best so far drafts. The search
    ends at one that is worth `good`, after `tries`, or after `patience` without a better one. All sequences of a batch draft alike.

    share: of the halves of all layers but the first and the last, how many are left out. seed: of the random choices; the text does not
    depend on it. The others as in `Leaved`.

    Differences: every 25th of the paper's tries is Bayesian, all of ours are random. The paper reads the last tokens as one text with
    the choice's own keys; here each reads what the whole model kept of the text before it, as the first draft of a pass does, so they go
    through in calls of as many rows as a pass has. A search belongs to its generation. A call reads no weight of a half that is left out.
    """

    length: int = 5
    candidates: int = 3
    sure: float = 0.8
    share: float = 0.45
    tail: int = 50
    tries: int = 1000
    good: float = GOOD
    patience: int = 300
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if min(self.tail, self.tries, self.patience) < 1:
            raise UserError(f"tail={self.tail}, tries={self.tries} and patience={self.patience} must be at least 1; good=0.0 tries one")

    def check(self, m) -> None:
        super().check(m)
        left_out(self.share, m.cfg.L)

    def fits(self, policy, cfg) -> str | None:
        """Any layer may have to draft without those below it."""
        return next((reason for i in range(cfg.L) if (reason := policy.alone((i,), cfg))), None)

    def prepare(self, m, tokens_BT, length_B, new) -> Search:
        even = Halves.without(jnp.asarray(spread(self.share, m.cfg.L)))
        return Search(even, jnp.float32(-1), jnp.int32(0), jnp.int32(0))

    def draft(self, s: Decoding, target: Target) -> tuple[Draft, Decoding]:
        # A layer that is left out cannot take in what was accepted: all of them do so first, and nothing is pending for the pass.
        s = self.searched(settle_rows(target.params, target.cfg, s, target.policy), target)
        return self.leaved(s, target, kind=Chosen, halves=s.drafter.best)

    def searched(self, s: Decoding, target: Target) -> Decoding:
        """With one more choice tried, while there is reason to."""
        old, ready_B = s.drafter, ~s.done_B & (s.made_B >= self.tail)
        looking = ready_B.any() & (old.worth < self.good) & (old.tried < self.tries) & (old.since < self.patience)

        def turn(carry):
            on, layers, search = carry
            halves = self.choice(search.tried, target.cfg.L)
            layers, worth = self.agreement(s.replace(layers=layers), target, halves, ready_B)
            return jnp.zeros_like(on), layers, search.heard(halves, worth)

        _, layers, search = jax.lax.while_loop(lambda c: c[0], turn, (looking, s.layers, old))
        return s.replace(layers=layers, drafter=search)

    def choice(self, tried: jax.Array, L: int) -> Halves:
        """The halves of try number `tried`."""
        key = jax.random.fold_in(jax.random.key(self.seed), tried)
        some = jax.random.permutation(key, 2 * (L - 2))[: left_out(self.share, L)]
        even = spread(self.share, L)
        return Halves.without(jnp.where(tried == 0, even, jnp.zeros(even.shape, bool).at[some].set(True)))

    def agreement(self, s: Decoding, target: Target, halves: Halves, ready_B: jax.Array) -> tuple[tuple[Any, ...], jax.Array]:
        """(the caches, the share of the last `tail` tokens of these sequences that drafting with these halves names)."""
        T, (B,) = min(self.nodes, self.tail), ready_B.shape
        own = jnp.broadcast_to(jnp.eye(T, dtype=bool), (B, T, T))

        def piece(i, carry):
            layers, right = carry
            back = self.tail - i.astype(jnp.int32) * T - jnp.arange(T, dtype=jnp.int32)  # how far before the last token a row stands
            at = s.count_B[:, None] - 1 - back
            there = (back > 0) & ready_B[:, None]
            token, wanted = (jnp.take_along_axis(s.tokens_BS, jnp.maximum(at + more, 0), axis=1) for more in (0, 1))
            order = at - s.gone_B[:, None]
            before = jnp.where(there, order, s.count_B[:, None] - 1 - s.gone_B[:, None]) - 1
            flow = embed(target.params, target.cfg, token, jnp.where(there, order, EMPTY)).replace(hi_BT=before, among_BTW=own)
            nothing = Accepted.nothing(*s.accepted.path_BW.shape)
            flow, layers = run_halves(target.params, target.cfg, flow, layers, target.policy, nothing, halves)
            logits = unembed(target.params, target.cfg, flow.x_BTD)
            named = draw(logits, order + 1, s.key_B, target.how) if self.coupled else first_max(logits)
            return layers, right + ((named == wanted) & there).sum(dtype=jnp.int32)

        layers, right = jax.lax.fori_loop(0, -(-self.tail // T), piece, (s.layers, jnp.int32(0)))
        return layers, right / jnp.maximum(ready_B.sum() * self.tail, 1)
