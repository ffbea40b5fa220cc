"""Certain rows into a packed cache: the next question, a teacher-forced answer, held-out text."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from tokeff.kv.cache import Room
from tokeff.kv.policy import Policy, Prefilled
from tokeff.kv.prefill import run_layers
from tokeff.models.config import Config, Params
from tokeff.models.flow import EMPTY, Here
from tokeff.models.transformer import alike, block, embed, unembed


@partial(jax.jit, static_argnames=("policy", "room", "here"))
def _pack_one(rows: Prefilled, *, policy: Policy, room: Room, here: Here):
    return policy.pack_layer(rows, room, here)


@partial(jax.jit, static_argnames=("policy", "room", "cfg"))
def _pack_all(layers: tuple[Prefilled, ...], *, policy: Policy, room: Room, cfg: Config):
    return policy.pack(layers, room, cfg)


def pack(policy: Policy, layers: tuple[Prefilled, ...], room: Room, cfg: Config):
    """The policy's cache from a dense prefill: layer by layer where the policy decides so, else as a whole under one jit."""
    policy = policy.plan(layers, cfg)
    if type(policy).pack is not Policy.pack:
        return policy.place(_pack_all(layers, policy=policy, room=room, cfg=cfg))
    return policy.place(
        tuple(
            _pack_one(rows, policy=policy, room=room, here=Here(alike(policy, None, cfg, i), cfg))
            for i, rows in enumerate(layers)
        )
    )


def extend(params: Params, cfg: Config, layers, tokens_BT: jax.Array, start_B: jax.Array, length_B: jax.Array, policy: Policy):
    """(logits_BTV, layers) after `length_B` right-padded tokens that start at order `start_B`.

    A policy that evicts during decoding takes them one by one, because the rows it would evict between them decide what the later
    ones see; others take them in one pass. After drafts, `settle` (decode/loop.py) first: rows that were accepted but not yet
    moved are not in the cache.
    """
    T, policy = tokens_BT.shape[1], policy.onward()
    t = jnp.arange(T, dtype=jnp.int32)[None]
    order = jnp.where(t < length_B[:, None], start_B[:, None] + t, EMPTY)
    if policy.chunk is not None and policy.chunk < T:
        return _one_by_one(params, layers, tokens_BT, order, cfg=cfg, policy=policy)
    flow, layers = run_layers(params, cfg, embed(params, cfg, tokens_BT, order), layers, policy=policy)
    return _logits(params, flow.x_BTD, cfg=cfg), layers


@partial(jax.jit, static_argnames="cfg")
def _logits(params, x_BTD, *, cfg):
    return unembed(params, cfg, x_BTD)


def _one_by_one(params, layers, tokens_BT, order_BT, *, cfg, policy):
    """One compiled layer, whatever the number of tokens and layers; the caller's cache is copied once and then updated in place. Ends
    with the longest sequence: what is padding everywhere is not run."""
    layers, logits = list(jax.tree.map(jnp.copy, layers)), []
    heres = [Here(alike(policy, None, cfg, i), cfg) for i in range(len(layers))]
    for t in range(max(1, int((order_BT != EMPTY).sum(axis=1).max()))):
        flow, across = _embed(params, tokens_BT[:, t : t + 1], order_BT[:, t : t + 1], cfg=cfg), None
        for i, (layer, here) in enumerate(zip(layers, heres, strict=True)):
            flow, layers[i], across = _one_layer(params.blocks[i], flow, layer, across, policy=policy, here=here)
        logits.append(_logits(params, flow.x_BTD, cfg=cfg)[:, 0])
    logits = jnp.stack(logits, axis=1)
    return jnp.pad(logits, ((0, 0), (0, tokens_BT.shape[1] - logits.shape[1]), (0, 0))), tuple(layers)


@partial(jax.jit, static_argnames="cfg")
def _embed(params, token_B1, order_B1, *, cfg):
    return embed(params, cfg, token_B1, order_B1)


@partial(jax.jit, static_argnames=("policy", "here"), donate_argnames="layer")
def _one_layer(w, flow, layer, across, *, policy, here):
    return block(w, flow, layer, None, across, policy=policy, cut=None, here=here)
