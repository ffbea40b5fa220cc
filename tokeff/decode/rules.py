"""Rules of verification beside the default that keep the law of the text: rejection of drafts that were drawn, and deterministic trees.

A `Descent` walks down a draft. At each node it looks at the drafts of the next token, accepts at most one of them and goes there; where it
accepts none, the next token is drawn from what they left of the target's law. A rule says with which chance each is accepted and what is
left (`odds`), both computed without noise; so the law of what a rule emits is known exactly, and is tested so.

**Noise.** Coins and last draws are functions of (key, place), apart from each other, from the target's noise and from the drafter's
(decode/sample.py). Nodes at one place share theirs: at most one of them is reached.

**What `cut` takes away.** A pass may commit less than was accepted, at a length limit, an end of sequence or an eviction boundary. What it
commits keeps its law. Whether a token stands at a place is decided by drafts and noise of that place and those before it, so the
first c tokens of a pass are right for every c that is chosen without looking behind them: limit and boundary are known before the pass, an
end of sequence is itself the last token. Noise of later places has touched nothing that stays, so the next pass, which draws with it again,
meets it as new. The same holds behind a refusal.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from tokeff.decode.draft import Draft, Drafter
from tokeff.decode.rule import Rule
from tokeff.decode.sample import COIN, REST, Sampling, first_max, keys_for, log_law
from tokeff.decode.tree import path_to
from tokeff.errors import UserError


class Walk(struct.PyTreeNode):
    """How far the walk has come: the node reached, `level` below the root; which nodes stand for the same text as it; whether it goes on,
    and the law of the next token where it does not."""

    node_B: jax.Array
    level_B: jax.Array
    alike_BW: jax.Array
    going_B: jax.Array
    rest_BV: jax.Array


@dataclass(frozen=True)
class Descent(Rule):
    """Base class: at each node, in the order of their numbers, every draft of the next token has its chance.

    Nodes that repeat a token are drafts of one text: what follows any of them is looked at behind the one that was accepted. So k chains
    from the root need not be joined into a tree.
    """

    def check(self, drafter: Drafter) -> None:
        name, theirs = type(self).__name__, type(drafter).__name__
        if self.drawn and not drafter.drawn:
            raise UserError(f"{name} judges draws from a law, and {theirs} tells none; use DeterministicTree or the default rule")
        if self.drawn is False and drafter.drawn:
            raise UserError(f"{name} makes nothing of the laws that {theirs} draws from; use Recursive or KSeq")

    @abstractmethod
    def odds(self, draft: Draft, law_BV: jax.Array, among_BW: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(chance_BW, rest_BV) at a node whose next token has the law `law`: with which probability each of the drafts `among` is accepted
        when those before it were refused, and the law of the next token when all were. Where there is none, rest is `law`."""
        raise NotImplementedError

    def judge(self, draft, logits_BWV, place_BW, key_B, how, depth):
        s = self.descend(draft, logits_BWV, place_BW, key_B, how)
        path, count = path_to(draft.parent_BW, s.node_B, s.level_B + 1, depth)
        return path, emitted(draft, path, count, pick(s.rest_BV, at(place_BW, s.node_B), key_B)), count

    def descend(self, draft: Draft, logits_BWV, place_BW, key_B, how: Sampling) -> Walk:
        """Everything but the last draw."""
        exists = open_nodes(draft)
        root = jnp.broadcast_to(jnp.arange(exists.shape[1]) == 0, exists.shape)

        def step(s: Walk) -> Walk:
            law = jnp.exp(log_law(at(logits_BWV, s.node_B)[:, None], how))[:, 0]
            among = exists & jnp.take_along_axis(s.alike_BW, draft.parent_BW, axis=1)
            chance, rest = self.odds(draft, law, among)
            heads = among & (coins(at(place_BW, s.node_B), key_B, among.shape[1]) < chance)
            going = s.going_B & heads.any(axis=1)
            node = jnp.where(going, jnp.argmax(heads, axis=1).astype(jnp.int32), s.node_B)
            alike = among & (draft.tokens_BW == at(draft.tokens_BW, node)[:, None])
            return Walk(node, s.level_B + going, alike, going, jnp.where(s.going_B[:, None], rest, s.rest_BV))

        zero = jnp.zeros(exists.shape[0], jnp.int32)
        start = Walk(zero, zero, root, zero == 0, jnp.zeros_like(logits_BWV[:, 0]))
        return jax.lax.while_loop(lambda s: s.going_B.any(), step, start)


def coins(place_B: jax.Array, key_B: jax.Array, W: int) -> jax.Array:
    """u_BW, uniform on [0, 1): a coin for every node that may carry the token of the place."""
    return jax.vmap(lambda key: jax.random.uniform(key, (W,)))(keys_for(COIN, key_B, place_B[:, None])[:, 0])


def pick(law_BV: jax.Array, place_B: jax.Array, key_B: jax.Array) -> jax.Array:
    """A token of the law at the place."""
    noise = jax.vmap(lambda key: jax.random.gumbel(key, law_BV.shape[1:]))(keys_for(REST, key_B, place_B[:, None])[:, 0])
    return first_max(jnp.log(law_BV) + noise)


def at(x_BW: jax.Array, node_B: jax.Array) -> jax.Array:
    """x[b, node[b]], of whatever x has beside."""
    return jax.vmap(lambda x, node: x[node])(x_BW, node_B)


def open_nodes(draft: Draft) -> jax.Array:
    """Which nodes may be accepted: not the root, nor those that look ahead."""
    exists = draft.valid_BW.at[:, 0].set(False)
    return exists if draft.scout_BW is None else exists & ~draft.scout_BW


def emitted(draft: Draft, path_BW: jax.Array, count_B: jax.Array, last_B: jax.Array) -> jax.Array:
    """The tokens of the nodes behind the root, and one more."""
    tokens = jnp.take_along_axis(draft.tokens_BW, path_BW, axis=1)
    behind = jnp.concatenate([tokens[:, 1:], tokens[:, -1:]], axis=1)
    return jnp.where(jnp.arange(tokens.shape[1]) == count_B[:, None] - 1, last_B[:, None], behind)


def ratio(p: jax.Array, q: jax.Array) -> jax.Array:
    return jnp.minimum(p / jnp.maximum(q, jnp.finfo(q.dtype).tiny), 1.0)


def normal(x_BV: jax.Array, otherwise_BV: jax.Array) -> jax.Array:
    """x as a law; where nothing is left of it, which then has probability zero up to rounding, another."""
    total = x_BV.sum(axis=1, keepdims=True)
    return jnp.where(total > 0, x_BV / jnp.where(total > 0, total, 1.0), otherwise_BV)


@dataclass(frozen=True)
class Recursive(Descent):
    """Recursive rejection (SpecInfer, Miao et al. 2023; without replacement, Yang et al. 2024): draft x of law q is accepted with
    min(1, p(x) / q(x)); refused, it leaves p <- norm((p - q)+) to the next.

    Exact for siblings drawn i.i.d. and for those drawn without replacement: a node's `logq` is the law it was drawn from after the siblings
    before it. Tokens are emitted by the law p whatever earlier siblings were, since what a refusal leaves does not depend on the token.
    """

    drawn: ClassVar[bool | None] = True

    def odds(self, draft, law_BV, among_BW):
        assert draft.logq_BWV is not None
        logq, tokens = draft.logq_BWV, draft.tokens_BW

        def visit(carry):
            left, todo, chance = carry
            node, some = jnp.argmax(todo, axis=1), todo.any(axis=1, keepdims=True)
            x, q = at(tokens, node), jnp.exp(at(logq, node))
            here = some & (jnp.arange(todo.shape[1]) == node[:, None])
            chance = jnp.where(here, ratio(at(left, x), at(q, x))[:, None], chance)
            return jnp.where(some, normal(jnp.maximum(left - q, 0.0), left), left), todo & ~here, chance

        start = law_BV, among_BW, jnp.zeros(among_BW.shape, law_BV.dtype)
        rest, _, chance = jax.lax.while_loop(lambda carry: carry[1].any(), visit, start)
        return chance, rest


@dataclass(frozen=True)
class ChainRejection(Descent):
    """Speculative sampling (Leviathan et al. 2023; Chen et al. 2023) of one chain: a draft stands with min(1, p(x) / q(x)), probability
    1 - TV(p, q) over all; the first refused place is drawn from norm((p - q)+), the token behind a whole chain from p."""

    drawn: ClassVar[bool | None] = True

    def check(self, drafter):
        super().check(drafter)
        if not drafter.chain:
            raise UserError(f"{type(self).__name__} judges one chain, not {drafter.nodes} nodes of depth {drafter.depth}; use Recursive")

    def odds(self, draft, law_BV, among_BW):
        assert draft.logq_BWV is not None
        node = jnp.argmax(among_BW, axis=1)
        x, q = at(draft.tokens_BW, node), jnp.exp(at(draft.logq_BWV, node))
        lean = self.lean(law_BV, q)
        rest = normal(jnp.maximum(law_BV - jnp.minimum(q, lean), 0.0), law_BV)
        chance = jnp.where(among_BW, ratio(at(lean, x), at(q, x))[:, None], 0.0)
        return chance, jnp.where(among_BW.any(axis=1, keepdims=True), rest, law_BV)

    def lean(self, law_BV, q_BV):
        """What drafts are compared with."""
        return law_BV


@dataclass(frozen=True)
class DeterministicTree(Descent):
    """Drafts that were not drawn (top-k, n-grams), as draws from a law that is sure (SpecInfer, EAGLE, lookahead): child x is accepted with
    p(x); refused, it leaves p without x to the next. So a node goes on with the probability of its children's tokens together.

    The default rule accepts as often on average, with one random number a place, and gives the text of plain decoding beside.
    """

    drawn: ClassVar[bool | None] = False

    def odds(self, draft, law_BV, among_BW):
        tokens, before = draft.tokens_BW, jnp.tri(among_BW.shape[1], k=-1, dtype=bool)
        again = ((tokens[:, :, None] == tokens[:, None]) & among_BW[:, None] & before).any(axis=2)
        p = jnp.where(among_BW & ~again, jnp.take_along_axis(law_BV, tokens, axis=1), 0.0)
        row = jnp.arange(len(tokens))[:, None]
        rest = law_BV.at[row, jnp.where(among_BW, tokens, law_BV.shape[1])].set(0.0, mode="drop")
        # Summed from the end, not taken from 1: a difference of near numbers would be noise.
        left = jnp.cumsum(p[:, ::-1], axis=1)[:, ::-1] + rest.sum(axis=1, keepdims=True)
        return ratio(p, left), normal(rest, law_BV)


@dataclass(frozen=True)
class KSeq(Descent):
    """SpecTr's k-SEQ (Sun et al. 2023): k drafts of law q are each accepted with min(1, p(x) / (rho q(x))), in turn. With
    beta = sum_x min(q, p / rho), rho solves 1 - (1 - beta)^k = rho beta; what is left is p - min(q, p / rho) (1 - (1 - beta)^k) / beta.
    At every depth k is the number of drafts whose tokens so far were accepted, on whatever nodes.

    Siblings are i.i.d., and how many there are may not depend on what they are. Exact for every rho from the solution up to k: bisection
    keeps its upper end, and its error costs acceptance alone.
    """

    drawn: ClassVar[bool | None] = True

    def check(self, drafter):
        super().check(drafter)
        if drafter.distinct:
            raise UserError(f"KSeq judges i.i.d. drafts; {type(drafter).__name__} draws without replacement, for which use Recursive")

    def odds(self, draft, law_BV, among_BW):
        assert draft.logq_BWV is not None
        q = jnp.exp(at(draft.logq_BWV, jnp.argmax(among_BW, axis=1)))
        k = jnp.maximum(among_BW.sum(axis=1, keepdims=True), 1).astype(q.dtype)
        rho = solve(lambda rho: (lambda beta: any_of(beta, k) - rho * beta)(overlap(q, law_BV, rho)), k)
        beta = overlap(q, law_BV, rho)
        often = any_of(beta, k) / jnp.where(beta > 0, beta, 1.0)
        rest = normal(jnp.maximum(law_BV - jnp.minimum(q, law_BV / rho) * often, 0.0), law_BV)
        p, q = (jnp.take_along_axis(x, draft.tokens_BW, axis=1) for x in (law_BV, q))
        return ratio(p, rho * q), jnp.where(among_BW.any(axis=1, keepdims=True), rest, law_BV)


def overlap(q_BV, p_BV, rho_B1):
    return jnp.minimum(jnp.minimum(q_BV, p_BV / rho_B1).sum(axis=1, keepdims=True), 1.0)


def any_of(beta_B1, k_B1):
    """1 - (1 - beta)^k, exact for small beta too."""
    return -jnp.expm1(k_B1 * jnp.log1p(-beta_B1))


def solve(falling, k_B1, halvings: int = 24):
    """Upper end of where a falling function crosses zero, between 1 and k."""

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        above = falling(middle) > 0
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    return jax.lax.fori_loop(0, halvings, halve, (jnp.ones_like(k_B1), k_B1))[1]
