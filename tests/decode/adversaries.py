"""Drafters that know too little or too much: garbage, and the answer itself."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from tokeff.decode.draft import Chained, Draft, Drafter, last_token


def tree_of(parents, tokens_BW) -> Draft:
    return Draft(tokens_BW, jnp.broadcast_to(jnp.asarray(parents, jnp.int32), tokens_BW.shape), jnp.ones(tokens_BW.shape, bool))


@dataclass(frozen=True)
class Garbage(Drafter):
    """A two-branch tree of tokens that have nothing to do with the text; `never` is one the target is known not to draw, or None."""

    V: int
    never: int | None = None

    @property
    def nodes(self) -> int:
        return 8

    @property
    def depth(self) -> int:
        return 3

    def propose(self, state, tokens_BS, count_B) -> Draft:
        root = last_token(tokens_BS, count_B)
        noise = (root * 7919 + count_B[:, None] * 104729 + jnp.asarray([1, 1, 2, 2, 4, 1, 2]) * 11) % self.V
        rest = noise if self.never is None else jnp.full_like(noise, self.never)
        return tree_of((0, 0, 0, 1, 1, 2, 3, 4), jnp.concatenate([root, rest], axis=1).astype(jnp.int32))


@dataclass(frozen=True)
class Replay(Chained, Drafter):
    """A chain of what is known to come: text[b] is row b's prompt and answer."""

    text: tuple[tuple[int, ...], ...]
    length: int = 4

    def propose(self, state, tokens_BS, count_B) -> Draft:
        longest = max(map(len, self.text)) + self.length + 1
        table = jnp.asarray([row + (0,) * (longest - len(row)) for row in self.text], jnp.int32)
        at = count_B[:, None] - 1 + jnp.arange(self.length + 1)
        tokens = jax.vmap(lambda row, i: row[i])(table, at)
        return tree_of((0, *range(self.length)), tokens)


@dataclass(frozen=True)
class Bush(Replay):
    """The chain of `Replay` with a wrong node before each right one; at every `miss`-th place of the text both are wrong."""

    miss: int = 0

    @property
    def nodes(self) -> int:
        return 1 + 2 * self.length

    def propose(self, state, tokens_BS, count_B) -> Draft:
        chain = super().propose(state, tokens_BS, count_B).tokens_BW
        place, right = count_B[:, None] + jnp.arange(self.length), chain[:, 1:]
        wrong, other = (jnp.where(right >= n, right - n, right + n) for n in (1, 2))
        right = jnp.where(place % self.miss == 0, other, right) if self.miss else right
        parents = (0, *(2 * depth for depth in range(self.length) for _ in range(2)))
        return tree_of(parents, jnp.concatenate([chain[:, :1], jnp.stack([wrong, right], axis=2).reshape(len(chain), -1)], axis=1))
