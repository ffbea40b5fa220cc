"""Lookahead with a trie (Zhao et al. 2024): what followed the last tokens wherever they stood before, merged into one tree."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from tokeff.decode.draft import Draft, Drafter
from tokeff.errors import UserError


def latest(found_S: jax.Array, n: int) -> jax.Array:
    """The last n places that are found, the latest first; -1 behind those. A top_k would gather a batch that lies on several devices."""
    so_far = jnp.cumsum(found_S, dtype=jnp.int32)
    number = so_far[-1] - jnp.arange(n, dtype=jnp.int32)
    return jnp.where(number > 0, (so_far < number[:, None]).sum(axis=1, dtype=jnp.int32), -1)


@dataclass(frozen=True)
class Trie(Drafter):
    """The subtree below the longest known suffix, cut to the most frequent nodes (Zhao et al. 2024, sec. 4).

    size: nodes of a draft, root included; length: the most tokens that follow a suffix; query: tokens of the longest suffix tried. One
    token is left off until the tree has `length` nodes. A node is worth (1 - weight) times its count in the prompt plus `weight` times its
    count in the output, so the prompt comes first; a share `own` of the nodes goes to the output's most frequent ones before that.
    most: occurrences of a suffix that are merged, the latest ones; earlier ones are dropped.

    Difference: a forest of n-grams is a view of the text, so this one is read off the text table in every pass. There are no capacities
    and nothing is halved or squeezed; an n-gram counts as soon as its first tokens are known, and one that starts in the prompt runs on
    into the output. Other requests' texts are not kept. Equal counts: the shallower node, then the one that was seen later.
    """

    size: int = 16
    length: int = 10
    query: int = 2
    weight: float = 1e-4
    own: float = 0.5
    most: int = 32

    def __post_init__(self):
        if self.size < 2 or self.length < 1:
            raise UserError(f"{self.size} nodes of {self.length} levels draft nothing; give at least 2 and 1, or use plain decoding")
        if self.query < 1 or self.most < 1:
            raise UserError(f"query {self.query} and most {self.most} must be at least 1")
        if not 0 <= self.weight <= 0.5 or not 0 <= self.own <= 1:
            raise UserError(f"weight {self.weight} must lie in [0, 0.5] and own {self.own} in [0, 1]")

    @property
    def nodes(self) -> int:
        return self.size

    @property
    def depth(self) -> int:
        return min(self.length, self.size - 1)

    def draft(self, s, target):
        return self.tree(s.tokens_BS, s.count_B, s.count_B - s.made_B), s

    def tree(self, tokens_BS: jax.Array, count_B: jax.Array, prompt_B: jax.Array) -> Draft:
        """The draft that continues tokens[:count], of which the first `prompt` are the prompt."""
        return jax.vmap(self._one)(tokens_BS, count_B, prompt_B)

    def _one(self, tokens_S, count, prompt) -> Draft:
        number_Q = jnp.arange(1, self.query + 1)
        trees = jax.vmap(lambda at_M, n: self._merge(tokens_S, count, at_M, at_M - n + 1 < prompt))(self._ends(tokens_S, count), number_Q)
        enough_Q = trees.valid_BW.sum(axis=1) >= max(min(self.length, self.size), 2)
        best = jnp.where(enough_Q.any(), self.query - 1 - jnp.argmax(enough_Q[::-1]), 0)
        return jax.tree.map(lambda x: x[best], trees)

    def _ends(self, tokens_S, count) -> jax.Array:
        """at_QM: where the last 1, 2, ... tokens ended before, latest first; -1 behind those."""
        S = tokens_S.shape[0]
        same, found = jnp.arange(S) < count - 1, []
        for back in range(self.query):
            last = jnp.where(count - 1 - back >= 0, tokens_S[jnp.maximum(count - 1 - back, 0)], -1)
            same = same & (jnp.pad(tokens_S, (back, 0), constant_values=-2)[:S] == last)
            found.append(same)
        return jax.vmap(latest, (0, None))(jnp.stack(found), min(self.most, S))

    def _merge(self, tokens_S, count, at_M, prompt_M) -> Draft:
        """The tree of what follows these places; prompt_M: whose n-gram starts in the prompt.

        Place i stands at depth d for the node of its first d + 1 tokens; the first place with the same tokens is the node.
        """
        M, L = at_M.shape[0], self.length
        next_ML = at_M[:, None] + 1 + jnp.arange(L)
        known_ML = (at_M >= 0)[:, None] & (next_ML < count)
        token_ML = tokens_S[jnp.minimum(next_ML, tokens_S.shape[0] - 1)]
        equal = (token_ML[:, None] == token_ML[None]) & known_ML[:, None] & known_ML[None]
        same_MML = jnp.cumprod(equal, axis=2).astype(bool)
        first_ML = jnp.argmax(same_MML, axis=1).astype(jnp.int32)
        node_ML = known_ML & (first_ML == jnp.arange(M)[:, None])
        above_ML = jnp.pad(first_ML, ((0, 0), (1, 0)))[:, :L] + jnp.arange(-1, L - 1, dtype=jnp.int32) * M  # negative below the root
        given_ML = (same_MML & prompt_M[None, :, None]).sum(axis=1).astype(jnp.float32)
        made_ML = (same_MML & ~prompt_M[None, :, None]).sum(axis=1).astype(jnp.float32)
        node, given, made, above, token = (x.T.reshape(-1) for x in (node_ML, given_ML, made_ML, above_ML, token_ML))
        kept = self._keep(node, given, made)
        above = above[kept]
        parent = jnp.where(above < 0, 0, 1 + jnp.argmax(kept[None] == above[:, None], axis=1).astype(jnp.int32))
        valid, root = kept < node.shape[0], jnp.zeros(1, jnp.int32)
        return Draft(
            jnp.concatenate([tokens_S[count - 1][None], token[kept]]),
            jnp.concatenate([root, jnp.where(valid, parent, 0)]),
            jnp.concatenate([root == 0, valid]),
        )

    def _keep(self, node, given, made) -> jax.Array:
        """Numbers of the nodes kept, ascending and so parents first, then numbers of none. A child is no more frequent than its parent in
        either count, and of equals the shallower is kept, so what is kept hangs together."""
        n, most = node.shape[0], self.size - 1

        def best(worth, k):
            at = jnp.argsort(-worth, stable=True)[:k].astype(jnp.int32)
            return jnp.where(worth[at] >= 0, at, n)

        worth = jnp.where(node, (1 - self.weight) * given + self.weight * made, -1.0)
        if own := min(int(self.own * self.size), most):
            worth = worth.at[best(jnp.where(node & (made > 0), made, -1.0), own)].set(jnp.inf, mode="drop")
        kept = jnp.sort(best(worth, most))
        return jnp.pad(kept, (0, most - kept.shape[0]), constant_values=n)
