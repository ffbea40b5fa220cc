"""ADED (Liu et al. 2025): the text's trigrams stand in for the model, and a tree search among them finds what to draft."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tokeff.decode.draft import Draft, Drafter
from tokeff.errors import UserError
from tokeff.models.flow import EMPTY

SIDE = "trigrams_U"  # the name of a given text's tokens in `Params.side`


class Trigrams(struct.PyTreeNode):
    """The trigrams of a text: those that begin with one bigram together, the likeliest first.

    Of each: bigram_S, the number of its first two tokens; token_S, its third; p_S, its probability; next_S, the number of its last two.
    start_S: where the trigrams of each bigram begin. last: the number of the text's last two tokens.
    """

    bigram_S: jax.Array
    token_S: jax.Array
    p_S: jax.Array
    next_S: jax.Array
    start_S: jax.Array
    last: jax.Array

    def after(self, bigram, n: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(token, p, next) of the n likeliest trigrams that begin so; p is 0 where there are fewer."""
        S = self.token_S.shape[0]
        at = self.start_S[bigram][..., None] + jnp.arange(n, dtype=jnp.int32)
        safe = jnp.minimum(at, S - 1)
        real = (at < S) & (self.bigram_S[safe] == jnp.asarray(bigram)[..., None])
        return self.token_S[safe], jnp.where(real, self.p_S[safe], 0), self.next_S[safe]


class Search(struct.PyTreeNode):
    """A search tree of M nodes. Node 0 is the root; each simulation has a block of children, whether it opens a node or not.

    p_M: probability behind the parent, 0 for a node that does not exist; sum_M: those on the way to it; open_M: the first of its children,
    0 for none; visits_M and value_M: how many simulations passed, and the sum of what they found.
    """

    bigram_M: jax.Array
    token_M: jax.Array
    p_M: jax.Array
    sum_M: jax.Array
    parent_M: jax.Array
    open_M: jax.Array
    visits_M: jax.Array
    value_M: jax.Array


@dataclass(frozen=True)
class Trigram(Drafter):
    """ADED (Liu et al. 2025): trigrams of the text, and the paths that a Monte Carlo tree search visits most.

    size: nodes of a draft, root included; paths: the most visited nodes of the search that are drafted; each is followed by its likeliest
    successor while there are nodes. length: levels of a draft, that successor included. simulations: of the search, in each pass. A node
    has its `successors` likeliest successors for children, and the child with the best mean value + (c1 + ln((n + c2 + 1) / c2)) p sqrt(n)
    / (1 + its visits) is entered, n being the node's visits; from the first new node on tokens are drawn with the trigrams' probabilities.
    A simulation's value is 1 + the sum of the probabilities on its way.

    A trigram's probability is its share of the prompt's that begin so, plus `gain` for every token made while it stood among the `recent`
    last ones, at most `cap`. A given text counts like the prompt: `m.attach(trigrams_U=ids)`, int32.

    Difference: the released code counts the recent tokens once a pass, this once a token, which is the same for passes of one token. So
    a draft depends on the text and on where the prompt ends, and not on how passes were cut; nothing is kept between passes. No corpus
    ships. The code adds, for a trigram (a, b, c), the probability of (a, b, b) to the value; this adds that of (a, b, c).
    """

    size: int = 16
    paths: int = 8
    length: int = 6
    simulations: int = 32
    successors: int = 12
    recent: int = 16
    gain: float = 0.04
    cap: float = 3.0
    c1: float = 32.0
    c2: float = 8.0

    def __post_init__(self):
        if self.size < 2 or self.paths < 1 or self.paths >= self.size:
            raise UserError(f"{self.paths} paths do not fit {self.size} nodes; give at least 2 nodes, and 1 to size - 1 paths")
        if self.length < 2 or self.successors < 1 or self.simulations * self.successors < self.paths:
            raise UserError(f"give a length of at least 2 (not {self.length}), and {self.paths} simulations or more for as many paths")
        if self.recent < 3 or not 0 < self.gain <= self.cap:
            raise UserError(f"recent {self.recent} must be at least 3, and gain {self.gain} above 0 and at most cap {self.cap}")
        if self.c1 < 0 or self.c2 <= 0:
            raise UserError(f"c1 {self.c1} must not be negative and c2 {self.c2} must be above 0")

    @property
    def nodes(self) -> int:
        return min(self.size, 2 * self.paths + 1)

    @property
    def depth(self) -> int:
        return min(self.length, self.nodes - 1)

    def check(self, m) -> None:
        super().check(m)
        given = (m.params.side or {}).get(SIDE)
        if given is not None and (given.ndim != 1 or not jnp.issubdtype(given.dtype, jnp.integer)):
            raise UserError(f"{SIDE} has shape {given.shape} of {given.dtype}; attach the token ids of one text")

    def draft(self, s, target):
        return self.tree(s.tokens_BS, s.count_B, s.count_B - s.made_B, (target.params.side or {}).get(SIDE)), s

    def tree(self, tokens_BS: jax.Array, count_B: jax.Array, prompt_B: jax.Array, given_U: jax.Array | None = None) -> Draft:
        """The draft that continues tokens[:count], of which the first `prompt` are the prompt."""
        U = 0 if given_U is None else given_U.shape[0]

        def one(tokens_S, count, prompt):
            text = tokens_S if given_U is None else jnp.concatenate([given_U.astype(tokens_S.dtype), tokens_S])
            t = self.trigrams(text, U + count, U + prompt, U)
            return self._draft(tokens_S[count - 1], t, self.search(t, self.chance(count)))

        return jax.vmap(one)(tokens_BS, count_B, prompt_B)

    def chance(self, count) -> jax.Array:
        """Numbers in [0, 1) that decide what the simulations behind so many tokens draw, on each level below the first."""
        return jax.random.uniform(jax.random.fold_in(jax.random.key(0), count), (self.simulations, self.length - 2), jnp.float32)

    def trigrams(self, text_S: jax.Array, count, prompt, given: int) -> Trigrams:
        """Of text[given:count] and of the given text before it. prompt: where the prompt ends."""
        S = text_S.shape[0] + 1
        at, text = jnp.arange(S, dtype=jnp.int32), jnp.pad(text_S, (2, 1))
        ends = (at == count) | ((at == given) & (given > 0))  # two tokens that nothing follows here
        there = ((at >= given + 2) & (at <= count)) | ((at >= 2) & (at <= given))
        times = jnp.where(at >= given + 2, jnp.minimum(count, at + self.recent - 2) - jnp.maximum(prompt, at), 0)
        gone = jnp.iinfo(jnp.int32).max
        keys = (text[:S], text[1 : S + 1], jnp.where(ends, EMPTY, text[2:]))
        a, b, c, at = jax.lax.sort((*(jnp.where(there, key, gone) for key in keys), at), num_keys=3)
        begins = (a != jnp.roll(a, 1)) | (b != jnp.roll(b, 1)) | (jnp.arange(S) == 0)
        head = begins | (c != jnp.roll(c, 1))
        bigram, same = (jnp.cumsum(x, dtype=jnp.int32) - 1 for x in (begins, head))
        counted = ((c != EMPTY) & (at < prompt)).astype(jnp.float32)

        def total(x, group):
            return jax.ops.segment_sum(x, group, S)[group]

        share = total(counted, same) / jnp.maximum(total(counted, bigram), 1)
        p = jnp.minimum(share + self.gain * total(jnp.maximum(times, 0)[at].astype(jnp.float32), same), self.cap)
        number = jnp.zeros(S + 1, jnp.int32).at[at].set(bigram)
        latest = jax.ops.segment_max(at, same, S)[same]
        kept = head & (c != EMPTY) & (a != gone)
        bigram, p, _, token, follows = jax.lax.sort((jnp.where(kept, bigram, S), -p, -latest, c, number[at + 1]), num_keys=3)
        start = jax.ops.segment_min(jnp.arange(S, dtype=jnp.int32), bigram, S)
        return Trigrams(bigram, token, -p, follows, jnp.minimum(start, S), number[count])

    def search(self, t: Trigrams, chance_XL: jax.Array) -> Search:
        """The tree that the simulations leave, from the text's last two tokens on. chance: what `chance` gives."""
        M = 1 + self.simulations * self.successors
        none, zero = jnp.zeros(M, jnp.int32), jnp.zeros(M, jnp.float32)

        def simulate(i, tree: Search) -> Search:
            tree, node, level = self._open(t, tree, *self._enter(tree), 1 + i.astype(jnp.int32) * self.successors)
            return self._back(tree, node, 1 + tree.sum_M[node] + self._roll(t, tree.bigram_M[node], level, chance_XL[i]))

        root = Search(none.at[0].set(t.last), none, zero, zero, none, none, none, zero)
        return jax.lax.fori_loop(0, self.simulations, simulate, root)

    def _enter(self, tree: Search) -> tuple[jax.Array, jax.Array]:
        """(node, level): from the root along the best children to a node without any, or to the last level."""
        n = np.arange(self.simulations + 1)
        explore = jnp.asarray((self.c1 + np.log((n + self.c2 + 1) / self.c2)) * np.sqrt(n), jnp.float32)
        node = level = jnp.int32(0)
        for _ in range(self.length - 1):
            at = tree.open_M[node] + jnp.arange(self.successors, dtype=jnp.int32)
            p, visits = tree.p_M[at], tree.visits_M[at]
            score = tree.value_M[at] / jnp.maximum(visits, 1) + explore[tree.visits_M[node]] * p / (1 + visits)
            best = at[jnp.argmax(jnp.where(p > 0, jnp.where(visits > 0, score, jnp.inf), -jnp.inf))]
            has = tree.open_M[node] > 0
            node, level = jnp.where(has, best, node), level + has.astype(jnp.int32)
        return node, level

    def _open(self, t: Trigrams, tree: Search, node, level, block) -> tuple[Search, jax.Array, jax.Array]:
        """Give a node its children, from place `block` on, and enter the first, unless it stands on the last level or nothing follows."""
        token, p, follows = t.after(tree.bigram_M[node], self.successors)
        may = (level < self.length - 1) & (p[0] > 0)

        def put(x, new):
            return jax.lax.dynamic_update_slice(x, jnp.where(may, new, 0).astype(x.dtype), (block,))

        tree = tree.replace(
            bigram_M=put(tree.bigram_M, follows), token_M=put(tree.token_M, token), p_M=put(tree.p_M, p),
            sum_M=put(tree.sum_M, tree.sum_M[node] + p), parent_M=put(tree.parent_M, jnp.broadcast_to(node, p.shape)),
            open_M=tree.open_M.at[node].add(jnp.where(may, block, 0)),
        )  # fmt: skip
        return tree, jnp.where(may, block, node), level + may.astype(jnp.int32)

    def _roll(self, t: Trigrams, bigram, level, chance_L) -> jax.Array:
        """The sum of the probabilities of tokens drawn one after another, down to the last level."""
        found = jnp.float32(0)
        for chance in chance_L:
            _, p, follows = t.after(bigram, self.successors)
            go = (level < self.length - 1) & (p[0] > 0)
            pick = jnp.argmax(chance * p.sum() < jnp.cumsum(p))
            found, bigram, level = found + jnp.where(go, p[pick], 0), jnp.where(go, follows[pick], bigram), level + go.astype(jnp.int32)
        return found

    def _back(self, tree: Search, node, value) -> Search:
        """One more visit of this value on the way from a node up to the root."""
        visits, values, on = tree.visits_M, tree.value_M, jnp.int32(1)
        for _ in range(self.length):
            visits, values = visits.at[node].add(on), values.at[node].add(on * value)
            on, node = on * (node > 0), tree.parent_M[node]
        return tree.replace(visits_M=visits, value_M=values)

    def _draft(self, root, t: Trigrams, tree: Search) -> Draft:
        """The most visited nodes, of equals the one made first, so parents come first; then the likeliest successors that are not there."""
        at = jnp.argsort(jnp.where(tree.p_M > 0, -tree.visits_M, 1), stable=True)[: self.paths]
        here, above = tree.p_M[at] > 0, tree.parent_M[at]
        parent = jnp.where(above > 0, 1 + jnp.argmax(at == above[:, None], axis=1), 0)
        token, p, _ = t.after(tree.bigram_M[at], 1)
        known = ((at == tree.open_M[at][:, None]) & here & (tree.open_M[at] > 0)[:, None]).any(axis=1)
        more = here & (p[:, 0] > 0) & ~known
        behind = jnp.argsort(~more, stable=True)[: self.nodes - 1 - at.shape[0]]
        one, zero = jnp.ones(1, bool), jnp.zeros(1, jnp.int32)
        parts = (
            (root[None], tree.token_M[at], token[behind, 0]),
            (zero, jnp.where(here, parent, 0), jnp.where(more[behind], 1 + behind, 0)),
            (one, here, more[behind]),
        )
        tokens, parent, valid = (jnp.concatenate([x.astype(part[0].dtype) for x in part]) for part in parts)
        return Draft(tokens, parent, valid)
