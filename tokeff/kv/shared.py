"""Hydragen: rows that several sequences share are kept once and read once for all of them (Juravsky et al. 2024).

A layer holds `levels`, each the rows of J groups of sequences that stand side by side, and every sequence's own rows behind them. The
queries of a group form one block against the group's level: a matrix product where each sequence by itself would take a product with a
vector, and one read of the keys where there were as many as sequences. Results merge by log-sum-exp, so nothing is approximated
(sec. 3.1, 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from tokeff.compat import context_mesh
from tokeff.kernels import merge, shared_prefix
from tokeff.kv.cache import Room, Rows, empty_draft, whole_tiles
from tokeff.kv.coded import check_rule
from tokeff.kv.policy import Full, Policy, Prefilled, append
from tokeff.kv.read import read_draft, read_store
from tokeff.models.flow import EMPTY, Accepted, Flow, Here
from tokeff.sharding import RULES


class Level(struct.PyTreeNode):
    """Rows that all sequences of a group read; J groups, which divide the batch evenly and in order. Never written again."""

    k_JKCH: jax.Array
    v_JKCH: jax.Array
    order_JKC: jax.Array


class Forked(struct.PyTreeNode):
    """A layer: the shared levels, oldest first, and behind them what each sequence has of its own."""

    levels: tuple[Level, ...]
    own: Rows


@dataclass(frozen=True)
class SharedPrefix(Policy):
    """The prompt's rows, as `rule` keeps them, in a level of their own; whatever comes later in own rows of each sequence.

    `fork` makes several sequences of each: the levels stay as they are, and own rows that were there become one more level, so a tree of
    texts is a list of levels. rule: `full()`, or a `Keep` with evict=0 and without a store of its own.
    """

    rule: Policy = Full()

    def needs(self):
        return self.rule.needs()

    def check(self, cfg, length: int) -> None:
        check_rule(self.rule)
        self.rule.check(cfg, length)

    def role(self, layer: int):
        return self.rule.role(layer)

    def squeeze(self, rows: Prefilled, here: Here) -> Prefilled:
        return self.rule.squeeze(rows, here)

    def pack_layer(self, rows: Prefilled, room: Room, here: Here) -> Forked:
        kept: Rows = self.rule.pack_layer(rows, Room(0), here)
        return Forked((Level(kept.k_BKCH, kept.v_BKCH, kept.order_BKC),), nothing_yet(kept.k_BKCH, room, 1))

    def fork(self, layers: tuple[Forked, ...], times: int, room: Room) -> tuple[Forked, ...]:
        return tuple(branch(layer, times, room) for layer in layers)

    def attend(self, q, k, v, ask: Flow, new: Flow, layer: Forked, accepted: Accepted | None, across, here: Here):
        q, k = here.rotate(q, ask.angle_BT[:, :, None]), here.rotate(k, new.angle_BT[:, :, None])
        own = append(layer.own, k, v, new, accepted)
        out, lse = read_store(q, own, ask, here)
        for level in layer.levels:
            out, lse = merge(out, lse, *read_level(q, level, ask, here))
        if ask.among_BTW is not None:
            out, lse = merge(out, lse, *read_draft(q, own.draft, ask, here))
        return out, layer.replace(own=own), across

    def kept(self, layer: Forked) -> jax.Array:
        B = layer.own.live_B.shape[0]
        shared = [jnp.repeat(level.order_JKC, B // level.order_JKC.shape[0], axis=0) for level in layer.levels]
        return jnp.concatenate([*shared, layer.own.order_BKC], axis=-1)


@partial(jax.jit, static_argnames=("room", "times"))
def nothing_yet(like_BKCH: jax.Array, room: Room, times: int) -> Rows:
    """A store without rows, for `times` as many sequences. Compiled, because a loop cannot take one buffer as both k and v."""
    B, K, _, H = like_BKCH.shape
    zero = jnp.zeros((times * B, K, whole_tiles(room.rows, like_BKCH.dtype), H), like_BKCH.dtype)
    order = jnp.full(zero.shape[:3], EMPTY, jnp.int32)
    return Rows(zero, zero, order, jnp.zeros(times * B, jnp.int32), draft=empty_draft(zero, room.draft))


def branch(layer: Forked, times: int, room: Room) -> Forked:
    """Every sequence of a layer `times` times, side by side. Levels are copied once: the loop that decodes consumes its state."""
    own, levels = layer.own, layer.levels
    if used := int(own.live_B.max()):
        C = whole_tiles(used, own.k_BKCH.dtype)
        levels += (Level(own.k_BKCH[:, :, :C], own.v_BKCH[:, :, :C], own.order_BKC[:, :, :C]),)
    return Forked(jax.tree.map(jnp.copy, levels), nothing_yet(own.k_BKCH, room, times))


def read_level(q_BTNH: jax.Array, level: Level, ask: Flow, here: Here) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH, lse_BTN) over a level: the queries of a group as if they were one sequence's."""
    level = on_each_device(level, q_BTNH.shape[0])
    return shared_prefix(
        q_BTNH.astype(level.k_JKCH.dtype), level.k_JKCH, level.v_JKCH, level.order_JKC, here.lo(ask.order_BT), ask.hi_BT,
        scale=here.cfg.scale, softcap=here.cfg.softcap, finite=True,
    )  # fmt: skip


def on_each_device(level: Level, B: int) -> Level:
    """On a mesh that splits the batch finer than the groups, the level counted once for each part of the batch. It lies whole on
    every device there, so each takes its own part of the queries to it and nothing moves."""
    mesh = context_mesh()
    ways, J = 1 if mesh is None else mesh.shape.get(RULES["J"], 1), level.k_JKCH.shape[0]
    if ways == J or ways % J or B % ways:
        return level
    return jax.tree.map(lambda x: jnp.broadcast_to(x[:, None], (J, ways // J, *x.shape[1:])).reshape(ways, *x.shape[1:]), level)
