"""Selectors of single rows that look at every stored key: TidalDecode's, oracles, and the vote of TokenSelect."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from tokeff.errors import UserError
from tokeff.models.attention import NEG, scores
from tokeff.models.flow import EMPTY, Here
from tokeff.sparse.select import Readable, Selector, Span, best_pages, open_pages


@dataclass(frozen=True)
class Exact(Selector):
    """Base class: all keys are read to choose."""

    def keys_read(self, layer: Readable) -> int:
        return layer.rows.capacity


@dataclass(frozen=True)
class TopScores(Exact):
    """The rows with the largest raw q.k, summed over the query heads of a kv head (TidalDecode, Yang et al. 2024, sec. 3.2)."""

    def worth(self, q_BTNH: jax.Array, layer: Readable, open_BKTP: jax.Array, here: Here) -> jax.Array:
        return scores(q_BTNH, layer.keys_BKCH, here.cfg.scale, here.cfg.softcap).sum(axis=2)


def log_shares(logits_BKGTC: jax.Array, open_BKTC: jax.Array) -> jax.Array:
    """Logarithm of the softmax of each query head over the open rows: shares that underflow still have a rank. NaN has no share."""
    return jax.nn.log_softmax(jnp.where(open_BKTC[:, :, None] & ~jnp.isnan(logits_BKGTC), logits_BKGTC, NEG), axis=-1)


@dataclass(frozen=True)
class TopMass(Exact):
    """The rows with the most attention, summed over the query heads of a kv head: what any selector tries to find.

    p: no more rows than together hold this share of the mass, which is a softmax over the rows to choose from: those that are read in
    any case have no part in it, or a draft would choose differently.
    """

    p: float = 1.0

    def check(self, cfg, length: int) -> None:
        if not 0 < self.p <= 1:
            raise UserError(f"p={self.p} is not a share of the attention; give a fraction in (0, 1]")

    def worth(self, q_BTNH: jax.Array, layer: Readable, open_BKTP: jax.Array, here: Here) -> jax.Array:
        logits = scores(q_BTNH, layer.keys_BKCH, here.cfg.scale, here.cfg.softcap)
        return jax.nn.logsumexp(log_shares(logits, open_BKTP), axis=2)

    def choose(self, q_BTNH: jax.Array, layer: Readable, span: Span, here: Here) -> jax.Array:
        seen = open_pages(layer.rows, span, 1, here)
        worth = jnp.where(seen, self.worth(q_BTNH, layer, seen, here), NEG)
        row = best_pages(worth, layer)
        if self.p == 1:
            return row
        share = jnp.exp(jnp.take_along_axis(worth, jnp.maximum(row, 0), axis=3)) / (here.cfg.N // here.cfg.K)
        before = jnp.cumsum(share, axis=3) - share
        return jnp.where(before < self.p, row, EMPTY)


@dataclass(frozen=True)
class Vote(Exact):
    """One set of rows for a whole layer: the softmax of q.k of every query head, summed over all heads (TokenSelect, Wu et al. 2024,
    sec. 4.2). As published q.k is not divided by sqrt(H), which sharpens the votes. Query head n meets kv head n // G. Our reading: keys
    stand at their own places; in the paper they are unrotated, and meet the query at one distance."""

    def worth(self, q_BTNH: jax.Array, layer: Readable, open_BKTP: jax.Array, here: Here) -> jax.Array:
        votes = log_shares(scores(q_BTNH, layer.keys_BKCH, 1.0, 0.0), open_BKTP)
        return jnp.broadcast_to(jax.nn.logsumexp(votes, axis=(1, 2))[:, None], open_BKTP.shape)
