"""Prompt lookup decoding (Saxena 2023): what followed the last tokens before, as a chain."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from tokeff.decode.draft import Chained, Draft, Drafter
from tokeff.errors import UserError


@dataclass(frozen=True)
class PromptLookup(Chained, Drafter):
    """Copy what followed an earlier occurrence of the last tokens (Saxena 2023). Tries the longest n-gram first.

    The published code takes the first occurrence; `latest=True` takes the last one.
    """

    length: int = 10
    ngram: int = 3
    latest: bool = False

    def __post_init__(self):
        if self.length < 1 or self.ngram < 1:
            raise UserError(f"length {self.length} and ngram {self.ngram} must be at least 1; use plain decoding for no drafts")

    def propose(self, state, tokens_BS, count_B) -> Draft:
        return jax.vmap(self._one)(tokens_BS, count_B)

    def _one(self, tokens_S, count) -> Draft:
        S, n = tokens_S.shape[0], self.ngram
        back = jnp.arange(n)
        tail = jnp.where(count - 1 - back >= 0, tokens_S[jnp.maximum(count - 1 - back, 0)], -1)
        at = jnp.arange(S)[:, None] - back  # a window ending at s, newest token first
        same = (tokens_S[jnp.maximum(at, 0)] == tail) & (at >= 0)
        matched = jnp.cumprod(same, axis=1).sum(axis=1)  # how many of the last tokens agree, up to n
        matched = jnp.where(jnp.arange(S) < count - 1, matched, 0)
        found = matched == matched.max()
        end = S - 1 - jnp.argmax(found[::-1]) if self.latest else jnp.argmax(found)
        at = end + 1 + jnp.arange(self.length)
        valid = (matched.max() > 0) & (at < count)
        tokens = jnp.concatenate([tokens_S[count - 1][None], tokens_S[jnp.minimum(at, S - 1)]])
        parent = jnp.maximum(jnp.arange(self.length + 1) - 1, 0)
        return Draft(tokens, parent, jnp.concatenate([jnp.ones(1, bool), valid]))
