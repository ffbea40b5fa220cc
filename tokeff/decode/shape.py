"""Which tree to draft: measured rates at which ranks are right, and the machine's own cost of a pass.

A node is right when all on its path are. With rates that depend on depth and rank alone, its chance is their product, and the best
tree of n nodes takes the n likeliest: those of a tree's own parents come before it. How many nodes pay is then a question of one number,
expected tokens by T(n) / T(1) (Chen et al. 2024, Sequoia, sec. 3; Cai et al. 2024, Medusa, sec. 2.3.3 choose nodes the same way).
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tokeff.decode.draft import Draft, Drafter, Result
from tokeff.decode.recycling import TokenRecycling
from tokeff.decode.sample import first_max
from tokeff.errors import UserError
from tokeff.models.load import Model

Tree = tuple[tuple[int, ...], ...]
Cost = Sequence[tuple[int, float]]


def chances(tree: Tree, rate: np.ndarray) -> list[float]:
    """Of every node the chance that it and all above it are right; rate[d, r] is that of rank r at depth d, its parent right."""
    return [float(np.prod([rate[d, r] for d, r in enumerate(path)])) for path in tree]


def likeliest(rate: np.ndarray, most: int) -> Tree:
    """The `most` likeliest nodes, best first (so parents first), as paths of ranks. Nodes that are never right are left out."""
    depth, ranks = rate.shape
    found: list[tuple[int, ...]] = []
    heap: list[tuple[float, tuple[int, ...]]] = [(-float(rate[0, r]), (r,)) for r in range(ranks)]
    heapq.heapify(heap)
    while heap and len(found) < most:
        chance, path = heapq.heappop(heap)
        if chance >= 0:
            break
        found.append(path)
        if len(path) < depth:
            for r in range(ranks):
                heapq.heappush(heap, (chance * float(rate[len(path), r]), (*path, r)))
    return tuple(found)


def best_tree(rate: np.ndarray, cost: Cost, most: int = 64) -> Tree:
    """The tree with the most expected tokens a unit of time; empty where no draft pays. cost: (rows, T(rows) / T(1)), ascending, as
    `tokeff bench verify-cost` measures it; rows between two are taken to cost what the line through them says."""
    rows, time = (np.asarray(side, np.float64) for side in zip(*cost, strict=True))
    tree = likeliest(rate, min(most, int(rows[-1]) - 1))
    tokens = 1 + np.concatenate([[0.0], np.cumsum(chances(tree, rate))])
    speed = tokens / np.interp(np.arange(1, len(tokens) + 1), rows, time)
    return tree[: int(np.argmax(speed))]


def measured_cost(path: str | Path, context: int | None = None) -> tuple[tuple[int, float], ...]:
    """(rows, T(rows) / T(1)) from a file that `tokeff bench verify-cost` wrote, at this context (the first one measured if None)."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))["verify-cost"]["rows"]
        context = found[0]["context"] if context is None else context
        cost = tuple(sorted((int(row["rows"]), float(row["of_one_row"])) for row in found if row["context"] == context))
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{path} holds no verify-cost; measure it with `tokeff bench verify-cost`") from error
    if len(cost) < 2:
        raise UserError(f"{path} has no verify-cost at context {context}; measure it with --contexts {context}")
    return cost


class Watch(struct.PyTreeNode):
    """The watched drafter's state. right_BWY[b, d, r] counts nodes of rank r that were right d + 1 below the root, asked_BWY those whose
    parent was."""

    inner: Any
    right_BWY: jax.Array
    asked_BWY: jax.Array


@dataclass(frozen=True)
class Watched(Drafter):
    """Token Recycling that counts how often its ranks are right. It drafts the same, and changes no token."""

    inner: TokenRecycling

    @property
    def nodes(self) -> int:
        return self.inner.nodes

    @property
    def depth(self) -> int:
        return self.inner.depth

    def init(self, B: int, V: int) -> Watch:
        right, asked = (jnp.zeros((B, self.depth, self.inner.rank)) for _ in range(2))  # the loop donates both
        return Watch(self.inner.init(B, V), right, asked)

    def propose(self, state: Watch, tokens_BS, count_B) -> Draft:
        return self.inner.propose(state.inner, tokens_BS, count_B)

    def observe(self, state: Watch, draft: Draft, result: Result) -> Watch:
        level = jnp.asarray([len(path) - 1 for path in self.inner.tree])
        rank = jnp.asarray([path[-1] for path in self.inner.tree])
        right = draft.tokens_BW == jnp.take_along_axis(first_max(result.logits_BWV), draft.parent_BW, axis=1)
        on = right.at[:, 0].set(True)
        for _ in range(self.depth):
            on = on & jnp.take_along_axis(on, draft.parent_BW, axis=1)
        asked = jnp.take_along_axis(on, draft.parent_BW, axis=1)[:, 1:] & (result.count_B > 0)[:, None]
        put = jax.vmap(lambda x, add: x.at[level, rank].add(add.astype(x.dtype)))
        return Watch(
            self.inner.observe(state.inner, draft, result),
            put(state.right_BWY, asked & on[:, 1:]),
            put(state.asked_BWY, asked),
        )


def rates(m: Model, prompts: Sequence[Sequence[int]], new: int = 64, depth: int = 5, rank: int = 8) -> np.ndarray:
    """rate[d, r], measured with Token Recycling's full tree of few ranks at every depth, over greedy continuations of these prompts."""
    return rate_of(*counts(m, prompts, new, depth, rank))


def rate_of(right: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Shares of counts. A rank that was never asked has the rate 0; where one was, the smallest count is one half."""
    rate = right / np.maximum(asked, 1.0)
    return np.where(asked > 0, np.maximum(rate, 0.5 / np.maximum(asked, 1.0)), 0.0)


def counts(m: Model, prompts: Sequence[Sequence[int]], new: int, depth: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """(right[d, r], asked[d, r]): how often rank r was right d + 1 below the root, and how often its parent was."""
    from tokeff.generation import Setup, go, read, start

    tree = tuple(path for d in range(depth) for path in _full(d, rank))
    setup = Setup(decode=Watched(TokenRecycling(tree, rank)))
    right, asked = np.zeros((depth, rank)), np.zeros((depth, rank))
    for ids in prompts:
        s = go(m, start(m, read(m, [list(ids)], setup), setup, new), setup, new, ())
        right += np.asarray(s.drafter.right_BWY).sum(axis=0)
        asked += np.asarray(s.drafter.asked_BWY).sum(axis=0)
    return right, asked


def _full(depth: int, rank: int) -> list[tuple[int, ...]]:
    """Every rank below the chain of first ranks, and below the second rank at depth 0: enough to see each (depth, rank)."""
    stems = [(0,) * depth] if depth == 0 else [(0,) * depth, (1, *(0,) * (depth - 1))]
    return [(*stem, r) for stem in stems for r in range(rank)]
