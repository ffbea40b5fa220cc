"""The decode loop: propose, one pass, walk, commit; the whole of it inside one jitted `while_loop`.

Plain decoding is the drafter with one node. Its row is certain, so it goes to its slot at once; the rows of a larger draft wait in
the cache's draft store until the next call says which of them were accepted. Nothing is ever rolled back.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from tokeff.decode.draft import Draft, Drafter, Result, Target
from tokeff.decode.sample import Sampling, draw
from tokeff.decode.tree import check_tree, shape_of
from tokeff.kv.policy import Policy
from tokeff.models.config import Config, Params
from tokeff.models.flow import EMPTY, Accepted, Flow, Here
from tokeff.models.transformer import alike, embed, stack, unembed


class Decoding(struct.PyTreeNode):
    """Everything a generation carries from call to call; save it and it goes on.

    tokens_BS: the text, count_B tokens of it known. The last known one is the root of the next draft; rows of all tokens before
    it are in the cache or, accepted but not yet moved, in its draft store. A token's order is its place in the text less gone_B,
    the prompt tokens that a restarting pass left out.
    """

    layers: tuple[Any, ...]
    tokens_BS: jax.Array
    count_B: jax.Array
    gone_B: jax.Array
    accepted: Accepted
    drafter: Any
    key_B: jax.Array
    made_B: jax.Array
    limit_B: jax.Array
    done_B: jax.Array
    passes_B: jax.Array


def begin(
    layers, tokens_BS, length_B, gone_B, logits_BV, drafter: Drafter, key_B, limit_B, how: Sampling, eos: tuple[int, ...], state: Any = None
) -> Decoding:
    """Draw the first token from the prompt's last logits. tokens_BS holds `length` tokens and room for `limit` more per row; state is
    what the drafter prepared, None for one that prepares nothing."""
    s = _first(tokens_BS, length_B, gone_B, logits_BV, key_B, limit_B, drafter=drafter, how=how, eos=eos)
    return s.replace(layers=layers, drafter=drafter.init(*logits_BV.shape) if state is None else state)


@partial(jax.jit, static_argnames=("drafter", "how", "eos"))
def _first(tokens_BS, length_B, gone_B, logits_BV, key_B, limit_B, *, drafter: Drafter, how: Sampling, eos: tuple[int, ...]) -> Decoding:
    """`begin` without the layers, which a jitted function would copy."""
    B = logits_BV.shape[0]
    first = draw(logits_BV[:, None], length_B[:, None] - gone_B[:, None], key_B, how)[:, 0]
    tokens = jax.vmap(lambda t, i, new, more: t.at[i].set(jnp.where(more, new, t[i])))(tokens_BS, length_B, first, limit_B > 0)
    made = jnp.minimum(limit_B, 1)
    done = (made >= limit_B) | is_eos(first, eos)
    zero = jnp.zeros(B, jnp.int32)
    return Decoding(
        layers=(), tokens_BS=tokens, count_B=length_B + made, gone_B=gone_B, accepted=Accepted.nothing(B, drafter.nodes),
        drafter=(), key_B=key_B, made_B=made, limit_B=limit_B, done_B=done, passes_B=zero,
    )  # fmt: skip


def is_eos(token: jax.Array, eos: tuple[int, ...]) -> jax.Array:
    hit = jnp.zeros(token.shape, bool)
    for e in eos:
        hit = hit | (token == e)
    return hit


def step(params: Params, cfg: Config, s: Decoding, policy: Policy, drafter: Drafter, how: Sampling, eos: tuple[int, ...]) -> Decoding:
    """One pass: between 1 and depth + 1 new tokens for every row that is not done."""
    draft, s = drafter.draft(s, Target(params, cfg, policy, how))
    return verify(params, cfg, s, draft, policy, drafter, how, eos)


def verify(
    params: Params, cfg: Config, s: Decoding, draft: Draft, policy: Policy, drafter: Drafter, how: Sampling, eos: tuple[int, ...]
) -> Decoding:
    """The target's pass over a draft, and what comes of it."""
    check_tree(draft, drafter)
    flow, place = rows_of(params, cfg, s, draft, drafter)
    flow, layers, taps = stack(
        params, cfg, flow, s.layers, policy=policy, accepted=s.accepted, run=tuple(range(draft.below, cfg.L)), moved=draft.moved,
        taps=drafter.taps,
    )  # fmt: skip
    logits = unembed(params, cfg, flow.x_BTD)
    path, emitted, count = drafter.rule.judge(draft, logits, place + 1, s.key_B, how, drafter.depth)
    count = cut(s, emitted, count, vacancy(policy, layers), eos)
    state = drafter.observe(s.drafter, draft, Result(logits, path, emitted, count, {**(draft.taps_BWD or {}), **taps}))
    return advance(s, layers, path, emitted, count, state, eos)


def rows_of(params: Params, cfg: Config, s: Decoding, draft: Draft, drafter: Drafter) -> tuple[Flow, jax.Array]:
    """(the rows of a draft as they enter the network, or the layer that the drafter left off at; their places in the text)."""
    depth, sees = shape_of(draft.parent_BW, drafter.depth)
    depth = depth if draft.depth_BW is None else draft.depth_BW
    root_B = s.count_B - 1 - s.gone_B
    place = root_B[:, None] + depth
    order = jnp.where(draft.valid_BW & ~s.done_B[:, None], place, EMPTY)
    flow = embed(params, cfg, draft.tokens_BW, order)
    for x in (draft.embed_BWD, draft.x_BWD):
        flow = flow if x is None else flow.replace(x_BTD=x.astype(flow.x_BTD.dtype))
    if drafter.nodes > 1:
        committed = jnp.broadcast_to(root_B[:, None] - 1, order.shape)
        among = (sees if draft.sees_BWW is None else draft.sees_BWW) & draft.valid_BW[:, None]
        flow = flow.replace(hi_BT=committed, among_BTW=among)
    return flow, place


def vacancy(policy: Policy, layers) -> jax.Array | None:
    """The fewest rows any layer can still take before its eviction boundary."""
    free = [f for f in map(policy.vacancy, layers) if f is not None]
    return jnp.stack(free).min(axis=0) if free else None


def cut(s: Decoding, emitted_BW, count_B, free_B, eos) -> jax.Array:
    """Accept no further than the eviction boundary, the length limit, or the first end-of-sequence token."""
    count = jnp.minimum(count_B, s.limit_B - s.made_B)
    if free_B is not None and emitted_BW.shape[1] > 1:
        count = jnp.minimum(count, free_B)
    ends = is_eos(emitted_BW, eos)
    first = jnp.where(ends.any(axis=1), jnp.argmax(ends, axis=1) + 1, emitted_BW.shape[1])
    return jnp.where(s.done_B, 0, jnp.minimum(count, first)).astype(jnp.int32)


def advance(s: Decoding, layers, path, emitted, count, drafter_state, eos) -> Decoding:
    """Write the new tokens into the table and count them."""
    B, W = emitted.shape
    at = jnp.where(jnp.arange(W)[None] < count[:, None], s.count_B[:, None] + jnp.arange(W)[None], s.tokens_BS.shape[1])
    tokens = jax.vmap(lambda t, i, e: t.at[i].set(e, mode="drop"))(s.tokens_BS, at, emitted)
    ended = (is_eos(emitted, eos) & (jnp.arange(W)[None] < count[:, None])).any(axis=1)
    made = s.made_B + count
    path = jnp.pad(path, ((0, 0), (0, s.accepted.path_BW.shape[1] - W)))  # a draft narrower than the caches have room for
    return s.replace(
        layers=layers,
        tokens_BS=tokens,
        count_B=s.count_B + count,
        accepted=Accepted(path, count),
        drafter=drafter_state,
        made_B=made,
        done_B=s.done_B | ended | (made >= s.limit_B),
        passes_B=s.passes_B + (~s.done_B).astype(jnp.int32),
    )


@partial(jax.jit, static_argnames=("cfg", "policy", "drafter", "how", "eos"), donate_argnames="s")
def run(
    params: Params, cfg: Config, s: Decoding, steps: jax.Array, *, policy: Policy, drafter: Drafter, how: Sampling, eos: tuple[int, ...]
) -> Decoding:
    """At most `steps` passes, fewer when every row is done. The state is donated."""

    def go(carry):
        i, s = carry
        return (i < steps) & ~s.done_B.all()

    def body(carry):
        i, s = carry
        return i + 1, step(params, cfg, s, policy, drafter, how, eos)

    return jax.lax.while_loop(go, body, (jnp.int32(0), s))[1]


@partial(jax.jit, static_argnames=("cfg", "policy"), donate_argnames="s")
def settle(params: Params, cfg: Config, s: Decoding, *, policy: Policy) -> Decoding:
    """Move the rows that the last call accepted into their slots, so that certain rows (the next question) may follow. The last token of
    the text has no row yet; what follows starts with it."""
    return settle_rows(params, cfg, s, policy)


def settle_rows(params: Params, cfg: Config, s: Decoding, policy: Policy) -> Decoding:
    """`settle` inside a jitted function. A draft call whose one row is not there: every policy commits, scores and evicts in it as it
    always does. No weight is read for it: what nobody will ever see may be zero."""
    B, W = s.accepted.path_BW.shape
    if W == 1:  # plain decoding has nothing pending
        return s
    nobody = jnp.full((B, 1), EMPTY, jnp.int32)
    flow = embed(params, cfg, nobody, nobody).replace(among_BTW=jnp.zeros((B, 1, 1), bool))
    layers, across = [], None
    for i, (w, layer) in enumerate(zip(params.blocks, s.layers, strict=True)):
        here = Here(alike(policy, None, cfg, i), cfg)
        layer, across = _taken_in(flow, layer, s.accepted, across, w.side, policy=policy, here=here)
        layers.append(layer)
    return s.replace(layers=tuple(layers), accepted=Accepted.nothing(B, W))


@partial(jax.jit, static_argnames=("policy", "here"))
def _taken_in(flow: Flow, layer, accepted: Accepted, across, side, *, policy: Policy, here: Here):
    """(the cache of one layer after a call whose rows are zeros, across), traced once for all layers that are alike."""
    cfg, (B, T, _) = here.cfg, flow.x_BTD.shape
    q, k = (jnp.zeros((B, T, heads, cfg.H), flow.x_BTD.dtype) for heads in (cfg.N, cfg.K))
    return policy.attend(q, k, k, flow, flow, layer, accepted, across, replace(here, side=side))[1:]
