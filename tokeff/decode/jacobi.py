"""Lookahead decoding (Fu et al. 2024): Jacobi iteration on the tokens ahead gives n-grams, and those that begin rightly are verified."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tokeff.decode.draft import Draft, Drafter, Result
from tokeff.decode.sample import first_max
from tokeff.decode.trie import latest
from tokeff.errors import UserError
from tokeff.models.flow import EMPTY

PIECE = 64  # n-grams of a prompt that go into the pool at once
APART = 7919  # between the places whose tokens new entries of the window are


class Trajectories(struct.PyTreeNode):
    """grid_BW: the window, its rows one after another; entry 0 is the root. pool_BMY: the M latest n-grams, all different, the oldest
    first; EMPTY where there are none. turn_B: passes so far."""

    grid_BW: jax.Array
    pool_BMY: jax.Array
    turn_B: jax.Array


@dataclass(frozen=True)
class Lookahead(Drafter):
    """Lookahead decoding (Fu et al. 2024, sec. 3): n-grams from parallel Jacobi iterations, verified by the pass that makes the next.

    The window has ngram - 1 rows of `window` tokens; row 0 begins with the root, and entry (l, i) stands l + i behind it, reads
    row 0 up to column i and the rows between in its own column. What the last row predicts becomes the next last row; every column from
    row 0 down to it is an n-gram. `guesses` n-grams of the pool that begin with the root are verified.

    pool: n-grams remembered, whatever they begin with. fill: those of the prompt and of the text as it grows are among them.
    shift: the window also moves left by the tokens accepted, and its last columns begin anew; the released code lets it stand.

    Difference: the released pool keeps the latest `guesses` n-grams of every first token, without bound on those; here the latest `pool`
    are kept, and the latest `guesses` of the root's are taken: the same ones, until the pool is full. New entries are tokens of the text
    at places far apart, not at random ones. All rows begin so at once, and n-grams count after ngram - 2 passes, when they no longer hold
    any such token behind the first; the released code fills one row a pass, and verifies nothing meanwhile.
    """

    window: int = 3
    ngram: int = 5
    guesses: int = 3
    pool: int = 1024
    fill: bool = True
    shift: bool = True

    def __post_init__(self):
        if self.window < 1 or self.ngram < 2 or self.guesses < 1:
            raise UserError(f"window {self.window}, ngram {self.ngram} and guesses {self.guesses} must be at least 1, 2 and 1")
        if self.pool < max(self.guesses, self.window):
            raise UserError(f"a pool of {self.pool} holds less than {self.guesses} guesses or a window of {self.window}; raise pool")

    @property
    def scouts(self) -> int:
        """Nodes of the window, root included."""
        return self.window * (self.ngram - 1)

    @property
    def nodes(self) -> int:
        return (self.window + self.guesses) * (self.ngram - 1)

    @property
    def depth(self) -> int:
        return self.ngram - 1

    def init(self, B: int, V: int) -> Trajectories:
        pool = jnp.full((B, self.pool, self.ngram), EMPTY, jnp.int32)
        return Trajectories(jnp.zeros((B, self.scouts), jnp.int32), pool, jnp.zeros(B, jnp.int32))

    def prepare(self, m, tokens_BT, length_B, new):
        state = self.init(tokens_BT.shape[0], m.cfg.V)
        return state.replace(pool_BMY=read(state.pool_BMY, tokens_BT, length_B)) if self.fill else state

    def draft(self, s, target):
        first = s.passes_B == 0
        state = jax.vmap(self._arrive)(s.drafter, s.tokens_BS, s.count_B, jnp.where(first, 1, s.accepted.count_B), first)
        return jax.vmap(self._propose)(state), s.replace(drafter=state)

    def _arrive(self, state: Trajectories, tokens_S, count, new, first) -> Trajectories:
        """The window and the pool behind `new` more tokens of the text."""
        grid = state.grid_BW.reshape(self.ngram - 1, self.window)
        fresh = tokens_S[(1 + jnp.arange(self.scouts, dtype=jnp.int32)) * APART % count].reshape(grid.shape)
        column = jnp.arange(self.window) + (jnp.maximum(new - 1, 0) if self.shift else 0)
        moved = jnp.take_along_axis(grid, jnp.minimum(column, self.window - 1)[None], axis=1)
        grid = jnp.where(first | (column >= self.window), fresh, moved).at[0, 0].set(tokens_S[count - 1])
        state = state.replace(grid_BW=grid.reshape(-1))
        if not self.fill:
            return state
        end = count - self.ngram + jnp.arange(self.ngram, dtype=jnp.int32)
        at = end[:, None] - self.ngram + 1 + jnp.arange(self.ngram, dtype=jnp.int32)
        pool = put(state.pool_BMY, tokens_S[jnp.maximum(at, 0)], (end >= count - new) & (at[:, 0] >= 0))
        return state.replace(pool_BMY=pool)

    def _propose(self, state: Trajectories) -> Draft:
        """The root, a branch for each of the latest n-grams that begin with it, and the rest of the window."""
        grid, pool = state.grid_BW, state.pool_BMY
        at = latest(pool[:, 0] == grid[0], self.guesses)
        here = jnp.repeat(at >= 0, self.depth)
        parent, depth, sees, scout = layout(self.window, self.ngram, self.guesses)
        return Draft(
            jnp.concatenate([grid[:1], jnp.where(here, pool[at, 1:].reshape(-1), 0), grid[1:]]), parent,
            jnp.concatenate([jnp.ones(1, bool), here, jnp.ones(self.scouts - 1, bool)]), scout_BW=scout, sees_BWW=sees, depth_BW=depth,
        )  # fmt: skip

    def observe(self, state: Trajectories, draft: Draft, result: Result) -> Trajectories:
        if result.logits_BWV.shape[1] < self.nodes:  # a pass that carried no window leaves it as it is
            return state
        last = np.arange(self.scouts - self.window, self.scouts)
        best = first_max(result.logits_BWV)  # of all nodes: under greedy decoding the rule asks the same
        new = best[:, np.where(last > 0, last + self.guesses * self.depth, 0)]
        rows = jnp.concatenate([state.grid_BW, new.astype(jnp.int32)], axis=1)
        gram = rows.reshape(-1, self.ngram, self.window).swapaxes(1, 2)
        keep = jnp.broadcast_to((state.turn_B >= self.ngram - 2)[:, None], gram.shape[:2])
        return Trajectories(rows[:, self.window :], jax.vmap(put)(state.pool_BMY, gram, keep), state.turn_B + 1)


def layout(window: int, ngram: int, guesses: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(parent_W, depth_W, sees_WW, scout_W) of a draft: the root, the branches, each a chain, then the rows of the window."""
    row, column = (x.reshape(-1) for x in np.mgrid[: ngram - 1, :window])
    branch, step = (x.reshape(-1) for x in np.mgrid[:guesses, : ngram - 1])
    n, m = branch.size, row.size - 1
    sees = np.zeros((1 + n + m, 1 + n + m), bool)
    grid = np.array([0, *range(1 + n, 1 + n + m)])
    sees[np.ix_(grid, grid)] = ((row == 0) & (column <= column[:, None])) | ((column == column[:, None]) & (row <= row[:, None]))
    sees[1 : 1 + n, 1 : 1 + n] = (branch == branch[:, None]) & (step <= step[:, None])
    sees[1 : 1 + n, 0] = True
    parent = np.concatenate([[0], np.where(step == 0, 0, np.arange(n)), np.zeros(m, int)])
    depth = np.concatenate([[0], step + 1, (row + column)[1:]])
    return jnp.asarray(parent, jnp.int32), jnp.asarray(depth, jnp.int32), jnp.asarray(sees), jnp.arange(1 + n + m) > n


def put(pool_MY: jax.Array, gram_XY: jax.Array, keep_X: jax.Array) -> jax.Array:
    """The pool behind these n-grams, one after another: each goes to the end, from where it stood or in the place of the oldest."""
    X = gram_XY.shape[0]
    later = (gram_XY[:, None] == gram_XY).all(axis=2) & keep_X & (jnp.arange(X) > jnp.arange(X)[:, None])
    keep_X = keep_X & ~later.any(axis=1)
    again = ((pool_MY[:, None] == gram_XY).all(axis=2) & keep_X).any(axis=1)
    real = jnp.concatenate([(pool_MY[:, 0] != EMPTY) & ~again, keep_X])
    both = jnp.where(real[:, None], jnp.concatenate([pool_MY, gram_XY]), EMPTY)
    return both[jnp.argsort(real, stable=True)[X:]]


@jax.jit
def read(pool_BMY: jax.Array, tokens_BT: jax.Array, length_B: jax.Array) -> jax.Array:
    """The pools behind all n-grams of these prompts."""
    T, Y = tokens_BT.shape[1], pool_BMY.shape[2]

    def one(pool, tokens, length):
        def some(i, pool):
            start = i * PIECE + jnp.arange(PIECE)
            gram = tokens[jnp.minimum(start[:, None] + jnp.arange(Y), T - 1)]
            return put(pool, gram, start + Y <= length)

        return jax.lax.fori_loop(0, -(-T // PIECE), some, pool)

    return jax.vmap(one)(pool_BMY, tokens_BT, length_B)
