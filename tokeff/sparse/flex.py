"""FlexPrefill (Lai et al. 2025): each head of each prompt finds out which pattern describes it, and how much of it is enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.scipy.special import rel_entr

from tokeff.errors import UserError
from tokeff.models.flow import EMPTY, Here
from tokeff.sharding import top_k
from tokeff.sparse.pattern import Pattern, Reading, Rows, own_blocks, pad_rows, tidy
from tokeff.sparse.patterns import block_means, diagonals, last_attention, last_rows


@dataclass(frozen=True)
class Flex(Pattern):
    """Query-aware blocks where the mean query predicts well which blocks the last rows look at, columns and diagonals elsewhere; of
    either, the fewest that hold a share `gamma` of the attention (Lai et al. 2025, sec. 3, alg. 1 to 4).

    The last block of rows speaks for the prompt. Its attention, added up by blocks of keys, is compared with softmax(mean query * mean
    keys): below `tau` in square-root Jensen-Shannon divergence (natural logarithm) the head is query-aware, and pooled scores of all blocks
    of queries, ranked together, say what is read (alg. 4). Otherwise the rows and the bundles of diagonals that hold `gamma` of the last
    block's attention are read (alg. 3). The first block and the queries' own are always read.

    most: the most blocks of keys that a block of queries reads, the heaviest first; vertical: the most single rows. They bound memory and
    time, which the published kernel lets grow; `Reading.count_BKQ` is what `gamma` asked for within them. Distributions of the query
    heads of a kv head are averaged before they are compared and ranked.
    """

    gamma: float = 0.9
    tau: float = 0.1
    most: int = 16
    vertical: int = 256
    whole_prompt: ClassVar[bool] = True

    def check(self, cfg: Any, length: int) -> None:
        super().check(cfg, length)
        if not 0 < self.gamma <= 1 or self.tau < 0:
            raise UserError(f"gamma={self.gamma} is a share of the attention in (0, 1], tau={self.tau} a distance of at least 0")
        if self.most < 2 or self.vertical < 1:
            raise UserError(f"most={self.most} must be at least 2, the first block and the own one; vertical={self.vertical} at least 1")

    def choose(self, rows: Rows, here: Here) -> Reading:
        own, R = own_blocks(rows, self.block), self.block
        p_BKWS, back_BWS = last_attention(rows, R, here)
        p_BKWS = p_BKWS / jnp.maximum(p_BKWS.sum(axis=(2, 3), keepdims=True), 1e-37)
        column = p_BKWS.sum(axis=2)
        aware = self.aware(rows, column, here)[:, :, None]
        pooled = pooled_attention(rows, R, here)
        B, K, Q, P = pooled.shape
        ranked = fewest(pooled.reshape(B, K, Q * P), self.gamma).reshape(B, K, Q, P)
        bundle = fewest(diagonals(p_BKWS, back_BWS, R), self.gamma)
        crossed = jnp.maximum(bundle, jnp.pad(bundle, ((0, 0), (0, 0), (1, 0)))[..., :-1])  # a bundle crosses two blocks of keys
        sure = (jnp.arange(P) == own[:, None]) | (jnp.arange(P) == 0)
        worth = jnp.where(sure, jnp.inf, jnp.where(aware[..., None], ranked, by_distance(crossed, own)))
        worth, block = top_k(worth, min(self.most, P), "BKQP")
        weight, row = top_k(fewest(column, self.gamma), min(self.vertical, column.shape[-1]), "BKS")
        return Reading(tidy(jnp.where(worth > 0, block, EMPTY), own), jnp.where(aware | (weight <= 0), EMPTY, row))

    def aware(self, rows: Rows, column_BKS: jax.Array, here: Here) -> jax.Array:
        """aware_BK: whether the mean query of the last block predicts where it looks (alg. 2)."""
        true = in_blocks(column_BKS, self.block)
        q, order = last_rows(rows, self.block)
        there = (order != EMPTY)[..., None, None]
        query = jnp.where(there, q, 0).sum(axis=1, keepdims=True) / jnp.maximum(there.sum(axis=1, keepdims=True), 1)
        guess = block_softmax(query, rows, self.block, jnp.full(1, true.shape[-1] - 1), here)[:, :, 0]
        middle = (true + guess) / 2
        return jnp.sqrt((rel_entr(true, middle) + rel_entr(guess, middle)).sum(axis=-1) / 2) < self.tau


def fewest(share_BKP: jax.Array, gamma: float) -> jax.Array:
    """The shares of each head that add up to gamma soonest; 0 for the others. At gamma 1 all, also those that are 0: the rows that were
    asked may not speak for others."""
    ranked, at = top_k(share_BKP, share_BKP.shape[-1], "BKP")
    if gamma >= 1:
        return jnp.maximum(share_BKP, jnp.finfo(share_BKP.dtype).tiny)
    some = jnp.where(jnp.cumsum(ranked, axis=-1) - ranked < gamma, ranked, 0)
    return jax.vmap(jax.vmap(lambda at, x: jnp.zeros_like(x).at[at].set(x, unique_indices=True)))(at, some)


def by_distance(worth_BKP: jax.Array, own_Q: jax.Array) -> jax.Array:
    """worth_BKQP of each block of keys for each block of queries, from how many blocks it lies back; 0 ahead."""
    P = worth_BKP.shape[-1]
    back = own_Q[:, None] - jnp.arange(P)
    return jnp.where(back >= 0, worth_BKP[..., jnp.clip(back, 0, P - 1)], 0)


def in_blocks(x_BKS: jax.Array, R: int) -> jax.Array:
    """sum_BKP over blocks of R rows."""
    x = pad_rows(x_BKS, R, 2)
    return x.reshape(*x.shape[:2], -1, R).sum(axis=-1)


def block_softmax(q_BQNH: jax.Array, rows: Rows, R: int, own_Q: jax.Array, here: Here) -> jax.Array:
    """p_BKQP: softmax over blocks of keys of mean query times mean key, averaged over the query heads of a kv head."""
    k_BPKH, there_BP = block_means(rows.k_BKSH.swapaxes(1, 2), rows.order_BS != EMPTY, R)
    B, Q, N, H = q_BQNH.shape
    q = q_BQNH.reshape(B, Q, k_BPKH.shape[2], -1, H)
    logits = jnp.einsum("bqkgh,bpkh->bkgqp", q, k_BPKH, preferred_element_type=jnp.float32) * here.cfg.scale
    seen = there_BP[:, None, None, None] & (jnp.arange(k_BPKH.shape[1]) <= own_Q[:, None]) & ~jnp.isnan(logits)
    return jnp.where(seen, jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1), 0).mean(axis=2)


def pooled_attention(rows: Rows, R: int, here: Here) -> jax.Array:
    """share_BKQP of a head's estimated attention, all blocks of queries that exist together adding up to 1."""
    q, there_BQ = block_means(rows.q_BTNH, rows.ask.order_BT != EMPTY, R)
    p = block_softmax(q, rows, R, own_blocks(rows, R), here)
    return p * (there_BQ / jnp.maximum(there_BQ.sum(axis=1, keepdims=True), 1))[:, None, :, None]
