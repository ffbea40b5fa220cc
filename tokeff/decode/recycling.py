"""Token Recycling (Luo et al. 2024): a static tree over a table of what followed each token."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct

from tokeff.decode.draft import Draft, Drafter, Result, last_token
from tokeff.errors import UserError
from tokeff.sharding import top_k


class Successors(struct.PyTreeNode):
    """What followed each token of the vocabulary: top_BUY, Y successors of each of U tokens. U is a vocabulary that is looked up,
    not multiplied with, so a mesh leaves it whole: split, every node of the tree would wait for a collective."""

    top_BUY: jax.Array


@dataclass(frozen=True)
class TokenRecycling(Drafter):
    """A tree filled from a table of each token's last seen top successors (Luo et al. 2024).

    tree: every node as its path of child ranks, parents first. The table holds, per sequence, `rank` successors of every token; all
    nodes of a pass write to it, refused ones too, the later node winning. It starts at zero as published.
    """

    tree: tuple[tuple[int, ...], ...]
    rank: int = 8

    def __post_init__(self):
        if not self.tree:
            raise UserError("the tree has no nodes; give at least ((0,),), or use plain decoding")
        known: dict[tuple[int, ...], int] = {(): 0}
        for path in self.tree:
            if path[:-1] not in known or path in known:
                raise UserError(f"tree node {path} has no parent before it, or stands twice; list parents first")
            if not 0 <= path[-1] < self.rank:
                raise UserError(f"tree node {path} wants rank {path[-1]} of {self.rank}; raise rank")
            known[path] = len(known)

    @property
    def nodes(self) -> int:
        return len(self.tree) + 1

    @property
    def depth(self) -> int:
        return max(map(len, self.tree))

    @property
    def parents(self) -> tuple[int, ...]:
        at = {(): 0, **{path: i + 1 for i, path in enumerate(self.tree)}}
        return (0, *(at[path[:-1]] for path in self.tree))

    def check(self, m) -> None:
        super().check(m)
        if self.rank > m.cfg.V:
            raise UserError(f"rank {self.rank} is more than the vocabulary of {m.cfg.V}; lower rank")

    def init(self, B: int, V: int) -> Successors:
        return Successors(jnp.zeros((B, V, self.rank), jnp.int32))

    def propose(self, state: Successors, tokens_BS, count_B) -> Draft:
        def one(top_UY, root):
            nodes = [root]
            for path, parent in zip(self.tree, self.parents[1:], strict=True):
                nodes.append(top_UY[nodes[parent], path[-1]])
            return jnp.stack(nodes)

        tokens = jax.vmap(one)(state.top_BUY, last_token(tokens_BS, count_B)[:, 0])
        parent = jnp.broadcast_to(jnp.asarray(self.parents, jnp.int32), tokens.shape)
        return Draft(tokens, parent, jnp.ones(tokens.shape, bool))

    def observe(self, state: Successors, draft: Draft, result: Result) -> Successors:
        top = top_k(result.logits_BWV, self.rank, "BWV")[1]
        W = draft.tokens_BW.shape[1]
        later = jnp.arange(W)[None, :] > jnp.arange(W)[:, None]
        beaten = ((draft.tokens_BW[:, None] == draft.tokens_BW[:, :, None]) & later).any(axis=2)
        # A node whose token a later node repeats writes nowhere: an order for what would be a racing scatter.
        row = jnp.where(beaten, state.top_BUY.shape[1] + jnp.arange(W), draft.tokens_BW)
        return Successors(jax.vmap(lambda m, r, t: m.at[r].set(t, mode="drop", unique_indices=True))(state.top_BUY, row, top))


def _paths(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(c) for c in word) for word in text.split())


# The default: of trees with at least one draft that with the most tokens by the cost of its pass, T(n) and rates as measured on two CPU
# cores over all kinds of prompts (experiments/default_tree.py).
TREE_4 = _paths("0 1 00")
# 15 drafts: the first ranks of the published tree. They give 98% of the tokens a pass of the likeliest 15 nodes, and pay where a pass is
# bound by reading weights.
TREE_16 = _paths("0 1 2 3 4 00 01 02 10 20 000 001 010 0000 00000")
# The published 80 nodes (Luo et al. 2024, appendix; 8/21/25/15/8/3 by depth).
TREE_80 = _paths(
    "0 1 2 3 4 5 6 7 "
    "00 01 02 03 04 05 06 07 10 11 12 13 20 21 22 30 31 40 50 60 70 "
    "000 001 002 003 004 005 006 007 010 011 012 020 021 030 040 050 060 070 100 101 110 200 300 400 500 "
    "0000 0001 0002 0003 0004 0010 0011 0020 0030 0040 0100 0200 1000 2000 3000 "
    "00000 00001 00002 00010 00020 00100 01000 10000 "
    "000000 000001 000100"
)
