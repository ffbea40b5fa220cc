"""What a pass left of the heads of each layer: any policy over those alone, and nothing held or read of the others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from tokeff.errors import UserError
from tokeff.kv.cache import Room
from tokeff.kv.evidence import Evidence
from tokeff.kv.policy import Policy, Prefilled, tree_bytes
from tokeff.models.flow import EMPTY, Accepted, Flow, Here


class Headed(struct.PyTreeNode):
    """A layer: the cache of the kv heads that are left, and which they are, of K; head_BK is None where all are."""

    rows: Any
    head_BK: jax.Array | None
    K: int = struct.field(pytree_node=False)


@dataclass(frozen=True)
class SomeHeads(Policy):
    """`rule` over the kv heads that a pass left in each layer (`Prefilled.head_BK`), as many in every sequence, though not the same ones.

    A head that is gone holds no row, and its query heads say nothing. Their part of the projections is computed all the same: the
    weights are read once for a batch whose sequences lost different heads.
    """

    rule: Policy

    @property
    def chunk(self) -> int | None:  # type: ignore[override]
        return self.rule.chunk

    @property
    def span(self) -> str:  # type: ignore[override]
        return self.rule.span

    def needs(self) -> tuple[Evidence, ...]:
        return self.rule.needs()

    def check(self, cfg, length: int) -> None:
        if reason := next(filter(None, (part.by_head() for part in (self.rule, *self.needs()))), None):
            raise UserError(f"{type(self.rule).__name__} cannot have the heads that a pass leaves: {reason}; set heads_left=1.0")
        self.rule.check(cfg, length)

    def drafts(self, depth: int) -> str | None:
        return self.rule.drafts(depth)

    def alone(self, run: tuple[int, ...], cfg) -> str | None:
        return self.rule.alone(run, cfg)

    def by_head(self) -> str | None:
        return "it has the heads that a pass leaves"

    def role(self, layer: int) -> Any:
        return self.rule.role(layer)

    def plan(self, layers: tuple[Prefilled, ...], cfg) -> SomeHeads:
        return replace(self, rule=self.rule.plan(layers, cfg))

    def onward(self) -> Policy:
        return replace(self, rule=self.rule.onward())

    def pack_layer(self, rows: Prefilled, room: Room, here: Here) -> Headed:
        return Headed(self.rule.pack_layer(rows, room, here.fewer(rows.k_BKSH.shape[1])), rows.head_BK, here.cfg.K)

    def attend(self, q, k, v, ask: Flow, new: Flow, layer: Headed, accepted: Accepted | None, across, here: Here):
        if layer.head_BK is None:
            out, rows, across = self.rule.attend(q, k, v, ask, new, layer.rows, accepted, across, here)
            return out, layer.replace(rows=rows), across
        out, rows = in_heads(layer.head_BK, self.rule, q, k, v, ask, new, layer.rows, accepted, here)
        return out, layer.replace(rows=rows), across

    def fork(self, layers: tuple[Headed, ...], times: int, room: Room) -> tuple[Headed, ...]:
        forked = self.rule.fork(tuple(layer.rows for layer in layers), times, room)
        heads = [None if layer.head_BK is None else jnp.repeat(layer.head_BK, times, axis=0) for layer in layers]
        return tuple(layer.replace(rows=rows, head_BK=h) for layer, rows, h in zip(layers, forked, heads, strict=True))

    def place(self, layers: tuple[Headed, ...]) -> tuple[Headed, ...]:
        placed = self.rule.place(tuple(layer.rows for layer in layers))
        return tuple(layer.replace(rows=rows) for layer, rows in zip(layers, placed, strict=True))

    def bytes_moved(self, layer: Headed, here: Here) -> int:
        return self.rule.bytes_moved(layer.rows, inside_of(layer, here))

    def vacancy(self, layer: Headed) -> jax.Array | None:
        return self.rule.vacancy(layer.rows)

    def kept(self, layer: Headed) -> jax.Array:
        """order_BKC of all K heads; those that are gone hold nothing."""
        order = self.rule.kept(layer.rows)
        if layer.head_BK is None:
            return order
        none = jnp.full((order.shape[0], layer.K, order.shape[2]), EMPTY, order.dtype)
        return jax.vmap(lambda all_KC, at, some: all_KC.at[at].set(some, unique_indices=True))(none, layer.head_BK, order)

    def bytes_read(self, layer: Headed, here: Here) -> int:
        return self.rule.bytes_read(layer.rows, inside_of(layer, here)) + tree_bytes(layer.head_BK)


def in_heads(head_BK: jax.Array, policy: Policy, q, k, v, ask: Flow, new: Flow, rows: Any, accepted: Accepted | None, here: Here):
    """(out_BTNH of all heads, the new rows): a policy's `attend` in these kv heads alone; the query heads of the others say nothing."""
    asks = of_groups(head_BK, here.cfg.N // here.cfg.K)
    q, k, v = heads_of(q, asks), heads_of(k, head_BK), heads_of(v, head_BK)
    out, rows, _ = policy.attend(q, k, v, ask, new, rows, accepted, None, here.fewer(head_BK.shape[1]))
    return among(out, asks, here.cfg.N), rows


def inside_of(layer: Headed, here: Here) -> Here:
    """The layer as its heads see it."""
    return here if layer.head_BK is None else here.fewer(layer.head_BK.shape[1])


def of_groups(head_BK: jax.Array, G: int) -> jax.Array:
    """asks_BN: the query heads of these kv heads."""
    return (head_BK[..., None] * G + jnp.arange(G)).reshape(head_BK.shape[0], -1)


def heads_of(x_BTNH: jax.Array, at_BN: jax.Array) -> jax.Array:
    """The heads that each sequence names."""
    return jnp.take_along_axis(x_BTNH, at_BN[:, None, :, None], axis=2)


def among(out_BTNH: jax.Array, at_BN: jax.Array, N: int) -> jax.Array:
    """out of all N query heads: those named say this, the others nothing."""
    B, T, _, H = out_BTNH.shape
    put = jax.vmap(lambda zero, at, out: zero.at[:, at].set(out, unique_indices=True))
    return put(jnp.zeros((B, T, N, H), out_BTNH.dtype), at_BN, out_BTNH)
