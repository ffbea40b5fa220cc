"""Drafts that layers make: rows go through them level by level, and what leaves them names the nodes of the next level.

The layers are the first ones of the target, some of them, or another model's; the drafters differ in that and in the tree. Draft rows wait
beside the cache that the layers have, as those of a verifying pass do, so a draft leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tokeff.decode.sample import Sampling, draw_draft, first_max, noised
from tokeff.errors import UserError
from tokeff.kv.policy import Policy
from tokeff.models.attention import wide
from tokeff.models.config import Config, Params
from tokeff.models.flow import EMPTY, Accepted, Flow
from tokeff.models.transformer import embed, stack, unembed
from tokeff.sharding import top_k


@dataclass(frozen=True)
class Levels:
    """A tree by its levels below the root. parent[d][t]: which node of the level above node t hangs on; rank[d][t]: which of that node's
    guesses it is.

    Tables give every level the T nodes of the widest one: node t of level d (the root is level 0) stands at 1 + (d - 1) T + t.
    """

    parent: tuple[tuple[int, ...], ...]
    rank: tuple[tuple[int, ...], ...]

    @staticmethod
    def chains(length: int, copies: int = 1) -> Levels:
        """`copies` chains from the root."""
        each = tuple(range(copies))
        return Levels(((0,) * copies, *(each for _ in range(length - 1))), (each,) * length)

    @staticmethod
    def of(paths: Sequence[tuple[int, ...]]) -> Levels:
        """Nodes as paths of ranks: (0, 2) is the third best guess behind the best one. UserError for one without a parent."""
        if not paths or min(map(len, paths)) < 1 or min(map(min, paths)) < 0 or len(set(paths)) < len(paths):
            raise UserError("the tree needs nodes, each once, as paths of ranks from 0 on; give at least ((0,),)")
        levels: list[list[tuple[int, ...]]] = [[()]]
        for depth in range(1, max(map(len, paths)) + 1):
            levels.append(sorted(path for path in paths if len(path) == depth))
            if lost := next((path for path in levels[-1] if path[:-1] not in levels[-2]), None):
                raise UserError(f"tree node {lost} has no parent; add {lost[:-1]}")
        return Levels(
            tuple(tuple(above.index(path[:-1]) for path in level) for above, level in zip(levels, levels[1:])),
            tuple(tuple(path[-1] for path in level) for level in levels[1:]),
        )

    @property
    def depth(self) -> int:
        return len(self.parent)

    @property
    def T(self) -> int:
        return max(map(len, self.parent))

    @property
    def nodes(self) -> int:
        """The root and what hangs on it."""
        return 1 + sum(map(len, self.parent))

    @property
    def guesses(self) -> int:
        """How many tokens are named behind one node."""
        return 1 + max(map(max, self.rank))

    def start(self, level: Any) -> Any:
        """Where a level's nodes start in the tables."""
        return 1 + (level - 1) * self.T

    def at(self) -> list[int]:
        """Where each node stands in the tables, level by level."""
        return [0, *(self.start(d + 1) + t for d, level in enumerate(self.parent) for t in range(len(level)))]

    def above(self) -> np.ndarray:
        """above_W: where each table entry's parent stands; 0 for those that are missing."""
        above = np.zeros(1 + self.depth * self.T, np.int32)
        for d, level in enumerate(self.parent):
            for t, parent in enumerate(level):
                above[self.start(d + 1) + t] = 0 if d == 0 else self.start(d) + parent
        return above

    def parents(self) -> list[int]:
        """The parent of each node, of those that exist, level by level."""
        at, above = self.at(), self.above()
        return [at.index(above[place]) for place in at]

    def sees(self) -> np.ndarray:
        """sees_WW: the ancestors of each table entry, and itself."""
        above, own = self.above(), np.eye(1 + self.depth * self.T, dtype=bool)
        for place in range(1, len(own)):
            own[place] |= own[above[place]]
        return own

    def table(self, rows: tuple[tuple[int, ...], ...], fill: int) -> np.ndarray:
        """(depth, T) with `fill` for nodes that a level does not have."""
        return np.array([level + (fill,) * (self.T - len(level)) for level in rows], np.int32)


class Grown(struct.PyTreeNode):
    """A draft in the making: levels below `level` are named and their rows ran through `layers`. x_BTD left them at the last one.

    sure_BW: how probable the best guess was where a token was named; top_BWY: the best guesses there; taps_BWD: what layers put out.
    """

    level: jax.Array
    layers: tuple[Any, ...]
    x_BTD: jax.Array
    tokens_BW: jax.Array
    valid_BW: jax.Array
    sure_BW: jax.Array
    top_BWY: jax.Array
    logq_BWV: jax.Array | None
    taps_BWD: dict[int, jax.Array]


@dataclass(frozen=True)
class Grower:
    """The layers that draft, and how tokens are named.

    root_B: the root's order in the cache of these layers; place_B: its order in the target's. run, skip, taps: as in `stack`. drawn: tokens
    are draws from the warped law, with noise of their own; else the best guesses: with the target's noise where `coupled`, else the most
    probable ones. guesses: how many are kept at each node. stop_B: a node whose best guess is less probable than that is named, and nothing
    behind it; None never stops. room: how many draft rows the caches have room for; before: how many of them stand before the root.
    """

    params: Params
    cfg: Config
    policy: Policy
    how: Sampling
    levels: Levels
    key_B: jax.Array
    root_B: jax.Array
    place_B: jax.Array
    done_B: jax.Array
    room: int
    run: tuple[int, ...] | None = None
    skip: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    taps: tuple[int, ...] = ()
    drawn: bool = False
    coupled: bool = True
    guesses: int = 1
    stop_B: jax.Array | None = None
    before: int = 0

    def call(self, layers, token_BT, order_BT, among_BTW, at, accepted: Accepted):
        """(x_BTD, the caches, taps_BTD) of these rows."""
        hi = jnp.broadcast_to(self.root_B[:, None] - 1, order_BT.shape)
        flow = embed(self.params, self.cfg, token_BT, order_BT)
        among = among_BTW[:, :, : self.room]  # a level that is only named has no rows
        flow = flow.replace(hi_BT=hi, among_BTW=among, at=jnp.asarray(at, jnp.int32))
        flow, layers, taps = self.through(flow, layers, accepted)
        return flow.x_BTD, layers, taps

    def through(self, flow: Flow, layers, accepted: Accepted) -> tuple[Flow, tuple[Any, ...], dict[int, jax.Array]]:
        """(the rows behind the layers that draft, the caches, taps_BTD)."""
        return stack(
            self.params, self.cfg, flow, layers, policy=self.policy, accepted=accepted, run=self.run, skip=self.skip, taps=self.taps
        )

    def plant(self, layers, root_B1, accepted: Accepted, unread: tuple[jax.Array, jax.Array] | None = None) -> Grown:
        """The root's row, and before it a token (token_B1, order_B1; order EMPTY for none) that these layers have not read yet."""
        B, W = root_B1.shape[0], 1 + self.levels.depth * self.levels.T
        order = self.orders(jnp.ones((B, 1), bool), 0)
        token, rows = root_B1, self.before + 1
        if unread is not None:
            token, order = jnp.concatenate([unread[0], token], axis=1), jnp.concatenate([unread[1], order], axis=1)
        among = jnp.broadcast_to(jnp.tril(jnp.ones((rows, self.before + W), bool)), (B, rows, self.before + W))
        x, layers, taps = self.call(layers, token, order, among, 0, accepted)
        x, taps = x[:, -1:], {i: y[:, -1:] for i, y in taps.items()}
        kind = wide(x.dtype)

        def first(value, fill=0):
            return jnp.full((B, W, *value.shape[2:]), fill, value.dtype).at[:, :1].set(value)

        return Grown(
            level=jnp.int32(1), layers=layers, x_BTD=jnp.broadcast_to(x, (B, self.levels.T, x.shape[2])),
            tokens_BW=first(root_B1), valid_BW=first(jnp.ones((B, 1), bool)), sure_BW=jnp.ones((B, W), kind),
            top_BWY=jnp.zeros((B, W, self.guesses), jnp.int32),
            logq_BWV=jnp.zeros((B, W, self.cfg.V), kind) if self.drawn else None, taps_BWD={i: first(y) for i, y in taps.items()},
        )  # fmt: skip

    def orders(self, valid_BT, level) -> jax.Array:
        """order_BT of rows so far below the root: one number for all, or one for each."""
        return jnp.where(valid_BT & ~self.done_B[:, None], self.root_B[:, None] + level, EMPTY)

    def grow(self, g: Grown, upto: int) -> Grown:
        """Every level named, and those up to `upto` run."""

        def more(g: Grown):
            going = g.level <= upto
            return going if self.stop_B is None else going & (self.opens(g) & ~self.done_B[:, None]).any()

        g = jax.lax.while_loop(more, lambda g: self.ran(self.named(g)), g)
        return g if upto == self.levels.depth else self.named(g)

    def opens(self, g: Grown) -> jax.Array:
        """valid_BT: which nodes of the next level there are."""
        levels = self.levels
        exists = jnp.asarray(levels.table(levels.parent, EMPTY) != EMPTY)[g.level - 1]
        up_T = self.up(g.level)
        valid = exists & g.valid_BW[:, up_T]
        return valid if self.stop_B is None else valid & (g.sure_BW[:, up_T] >= self.stop_B[:, None])

    def up(self, level) -> jax.Array:
        """Where the parents of a level's nodes stand."""
        return jax.lax.dynamic_slice_in_dim(jnp.asarray(self.levels.above()), self.levels.start(level), self.levels.T)

    def named(self, g: Grown) -> Grown:
        """The tokens of the next level."""
        levels, T = self.levels, self.levels.T
        above_T, rank_T = (jnp.asarray(levels.table(x, 0))[g.level - 1] for x in (levels.parent, levels.rank))
        logits = unembed(self.params, self.cfg, g.x_BTD)
        logits = logits if T == 1 else logits[:, above_T]
        place = jnp.broadcast_to(self.place_B[:, None] + g.level, logits.shape[:2])
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=levels.start(g.level), axis=1)
        g = g.replace(valid_BW=put(g.valid_BW, self.opens(g)))
        if self.stop_B is not None:
            g = g.replace(sure_BW=put(g.sure_BW, jnp.exp(jax.nn.log_softmax(logits).max(axis=-1))))
        if self.drawn:
            token, logq = draw_draft(logits, place, self.key_B, self.how, jnp.broadcast_to(rank_T, place.shape))
            return g.replace(tokens_BW=put(g.tokens_BW, token), logq_BWV=put(jnp.asarray(g.logq_BWV), logq))
        score = noised(logits, place, self.key_B, self.how) if self.coupled else logits
        top = first_max(score)[..., None] if self.guesses == 1 else top_k(score, self.guesses, "BTV")[1].astype(jnp.int32)
        token = jnp.take_along_axis(top, jnp.broadcast_to(rank_T, place.shape)[..., None], axis=2)[..., 0]
        return g.replace(tokens_BW=put(g.tokens_BW, token), top_BWY=put(g.top_BWY, top))

    def ran(self, g: Grown) -> Grown:
        """The rows of the level just named."""
        start, T = self.levels.start(g.level), self.levels.T
        token, valid = (jax.lax.dynamic_slice_in_dim(x, start, T, axis=1) for x in (g.tokens_BW, g.valid_BW))
        among = jnp.pad(self.sight(g), ((0, 0), (0, 0), (self.before, 0)), constant_values=True)
        nothing = Accepted.nothing(len(token), self.room)
        x, layers, taps = self.call(g.layers, token, self.orders(valid, self.deep(g)), among, self.before + start, nothing)
        taps = {i: jax.lax.dynamic_update_slice_in_dim(g.taps_BWD[i], y, start, axis=1) for i, y in taps.items()}
        return g.replace(level=g.level + 1, layers=layers, x_BTD=x, taps_BWD=taps)

    def deep(self, g: Grown) -> jax.Array:
        """How far below the root the rows of the level just named stand."""
        return g.level

    def sight(self, g: Grown) -> jax.Array:
        """sees_BTW of these rows: the nodes above each, and itself."""
        sees = jax.lax.dynamic_slice_in_dim(jnp.asarray(self.levels.sees()), self.levels.start(g.level), self.levels.T)
        return jnp.broadcast_to(sees, (g.tokens_BW.shape[0], *sees.shape))
