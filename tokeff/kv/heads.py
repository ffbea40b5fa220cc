"""Which kv heads look far back: searches that need no training. Each gives the heads of every layer, as methods take them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tokeff.errors import UserError
from tokeff.kv.classes import Heads
from tokeff.kv.evidence import Evidence, QueryMoments, Seen
from tokeff.kv.prefill import prefill
from tokeff.models.attention import scores
from tokeff.models.flow import EMPTY, Here
from tokeff.models.load import Model
from tokeff.sharding import beside


def strongest(score_LK: Any, share: float) -> Heads:
    """The `share` of all kv heads with the highest scores (learned gates, say), rounded up: kv heads of each layer, ascending."""
    score = np.asarray(score_LK, np.float64)
    if score.ndim != 2 or not 0 <= share <= 1:
        raise UserError(f"scores of shape {score.shape} and share {share}; give one score a layer and kv head, and a share in [0, 1]")
    if not np.isfinite(score).all():
        raise UserError("a score is not a finite number; measure the heads again")
    best = np.argsort(-score.reshape(-1), kind="stable")[: math.ceil(share * score.size - 1e-9)]
    chosen = np.zeros(score.size, bool)
    chosen[best] = True
    return tuple(tuple(np.flatnonzero(row).tolist()) for row in chosen.reshape(score.shape))


def union(a: Heads, b: Heads) -> Heads:
    """The heads in either."""
    return tuple(tuple(sorted({*x, *y})) for x, y in zip(a, b, strict=True))


class Echoes(struct.PyTreeNode):
    """Over the queries that have earlier copies: how many, and the attention of each query head to copies and to what followed them."""

    count_B: jax.Array
    echo_BN: jax.Array
    induction_BN: jax.Array


@dataclass(frozen=True)
class Repetition(Evidence):
    """In a text of one piece of `period` tokens again and again: attention to earlier copies of a query's own token, and to the tokens
    right behind them (Tang et al. 2024, sec. 3.3)."""

    period: int
    block: int = 128

    def gather(self, seen: Seen, before: Echoes | None, here: Here) -> Echoes:
        found = [self.part(seen, slice(a, a + self.block), here) for a in range(0, seen.q_BTNH.shape[1], self.block)]
        found = found if before is None else [before, *found]
        return jax.tree.map(lambda *parts: jnp.stack(parts).sum(axis=0), *found)

    def part(self, seen: Seen, some: slice, here: Here) -> Echoes:
        """One block of queries."""
        q, lse, place = seen.q_BTNH[:, some], seen.lse_BTN[:, some], seen.ask.order_BT[:, some]
        B, T, N, _ = q.shape
        logits = scores(q, seen.k_BKSH, here.cfg.scale, here.cfg.softcap)
        lse = jnp.moveaxis(lse.reshape(B, T, here.cfg.K, -1), 1, 3)[..., None]
        asks = place >= self.period
        stored, own = seen.order_BKS[:, 0][:, None], place[:, :, None]
        back = jnp.where((stored != EMPTY) & (stored <= own) & asks[..., None], own - stored, EMPTY)

        def mass(hit_BTS):
            p = jnp.where(hit_BTS[:, None, None], jnp.exp(logits - lse), 0.0)
            return p.sum(axis=(3, 4)).reshape(B, N)

        echo = (back > 0) & (back % self.period == 0)
        return Echoes(asks.sum(axis=1), mass(echo), mass((back >= 0) & (back % self.period == self.period - 1)))


def razor_heads(
    m: Model, echo: float = 0.01, induction: float = 0.14, tokens: int = 256, copies: int = 4, seed: int = 0
) -> Heads:
    """RazorAttention's search (Tang et al. 2024, sec. 3.3): heads that look at earlier copies of a token, or at what followed them, in
    random tokens repeated `copies` times (published: 2500 four times). The best `echo` and `induction` shares of all kv heads, each
    head as good as the best query head of its group."""
    if min(tokens, copies - 1) < 1 or tokens * copies > m.cfg.max_len:
        raise UserError(f"{copies} copies of {tokens} tokens do not fit {m.cfg.name}, which reads {m.cfg.max_len}; lower one of them")
    piece = np.random.default_rng(seed).integers(0, m.cfg.V, tokens)
    ask = Repetition(tokens)
    found = [layer.evidence_BKS[ask] for layer in _read(m, np.tile(piece, copies), ask)]

    def score(name: str) -> np.ndarray:
        return np.stack([np.asarray(getattr(x, name))[0].reshape(m.cfg.K, -1).max(axis=1) for x in found])

    return union(strongest(score("echo_BN"), echo), strongest(score("induction_BN"), induction))


def duo_heads(m: Model, ids: Any, share: float = 0.5, places: int = 500, sinks: int = 4) -> Heads:
    """DuoAttention's heads without training: the `share` of kv heads whose mean query, at the last of `places`, looks furthest back.

    Our reading of the published library's score: the mean query and mean key of a text, before rotation, stand at every place; a head is
    worth its attention summed up from the first place on, averaged over places and its group. ids: tokens of a text.
    """
    ask = QueryMoments(sinks)
    means = [far_reach(layer, ask, places, Here(i, m.cfg)) for i, layer in enumerate(_read(m, np.asarray(ids), ask))]
    return strongest(np.stack(means), share)


def far_reach(layer, ask: QueryMoments, places: int, here: Here) -> np.ndarray:
    """(K,) mean cumulative attention of a layer's mean query over its mean key at `places` places."""
    q_NH = layer.evidence_BKS[ask].mean_BNH[0]
    order = layer.order_BKS[0, 0, ask.skip :]
    raw = here.rotate(layer.k_BKSH[0, :, ask.skip :].astype(jnp.float32), jnp.maximum(order, 0), inverse=True)
    k_KH = jnp.where((order != EMPTY)[None, :, None], raw, 0).sum(axis=1) / (order != EMPTY).sum()
    at = jnp.arange(places)
    q = here.rotate(q_NH, at[-1])
    k = here.rotate(k_KH[:, None], at)
    logits = jnp.einsum("kgh,kph->kgp", q.reshape(here.cfg.K, -1, here.cfg.H), k) * here.cfg.scale
    return np.asarray(jnp.cumsum(jax.nn.softmax(logits, axis=-1), axis=-1).mean(axis=(1, 2)))


def _read(m: Model, ids: np.ndarray, ask: Evidence):
    """The layers of a dense prefill of one text."""
    tokens, length = jnp.asarray(ids, jnp.int32)[None], jnp.asarray([len(ids)], jnp.int32)
    with beside(m.params):
        return prefill(m.params, m.cfg, tokens, length, evidence=(ask,), dtype=m.precision.cache).layers
