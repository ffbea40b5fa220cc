"""The decoder as pure functions: `embed`, `stack` (a loop over `block`), `unembed`.

`stack` owns the loop over layers and knows nothing about any method. A layer's cache policy decides what its rows attend to
(`Policy.attend`), and a pass decides which rows go on (`Pass.choose`). See docs/design.md.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from tokeff.models.attention import wide
from tokeff.models.config import Block, Config, Params
from tokeff.models.flow import EMPTY, Accepted, Flow, Here
from tokeff.models.passes import Pass as Pass


class Attends(Protocol):
    """The part of a cache policy that a block calls (the whole of it: `tokeff.kv.policy.Policy`)."""

    def attend(
        self,
        q_BTNH: jax.Array,
        k_BTKH: jax.Array,
        v_BTKH: jax.Array,
        ask: Flow,
        new: Flow,
        layer: Any,
        accepted: Accepted | None,
        across: Any,
        here: Here,
        /,
    ) -> tuple[jax.Array, Any, Any]: ...

    def role(self, layer: int, /) -> Any: ...


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, in float32 (Zhang & Sennrich 2019)."""
    y = x.astype(wide(x.dtype))
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * weight.astype(y.dtype)).astype(x.dtype)


@partial(jax.jit, static_argnames="cfg", inline=True)
def embed(params: Params, cfg: Config, tokens_BT: jax.Array, order_BT: jax.Array, angle_BT: jax.Array | None = None) -> Flow:
    """Certain rows from token ids. Rows whose order is EMPTY are padding; their id may be anything in range."""
    x = params.embed_VD[jnp.maximum(tokens_BT, 0)]
    x = x if cfg.activations is None else x.astype(cfg.activations)
    if cfg.embed_scale != 1.0:
        x = x * jnp.asarray(cfg.embed_scale, x.dtype)
    angle = order_BT if angle_BT is None else angle_BT
    ids = jnp.where(order_BT == EMPTY, EMPTY, tokens_BT)
    return Flow(x, order_BT, jnp.maximum(angle, 0), order_BT, id_BT=ids)


def unembed(params: Params, cfg: Config, x_BMD: jax.Array) -> jax.Array:
    """float32 logits_BMV of the rows asked for."""
    x = rms_norm(x_BMD, params.norm_D, cfg.eps)
    head = params.embed_VD if params.head_VD is None else params.head_VD
    logits = product(x, head.astype(x.dtype), wide(x.dtype))
    return cfg.final_softcap * jnp.tanh(logits / cfg.final_softcap) if cfg.final_softcap else logits


FEW = 16  # rows


def product(x: jax.Array, w_FD: jax.Array, dtype: Any = None) -> jax.Array:
    """x (..., D) by a weight: (..., F) in `dtype`, that of x by default.

    XLA:CPU multiplies a few rows by a matrix at half the speed of one row when the rows stand on the left. With the weight on the left
    the products of SmolLM2 over 4 rows cost 1.3 times one row, not 2.1, over 16 rows 1.8, not 3.0 (experiments/few_rows.py). The barrier
    keeps XLA from turning the product round again.
    """
    last = x.ndim - 1

    def few(x, w):
        y = jax.lax.dot_general(w, x, (((1,), (last,)), ((), ())), preferred_element_type=dtype)
        return jnp.moveaxis(jax.lax.optimization_barrier(y), 0, -1)

    def many(x, w):
        return jax.lax.dot_general(x, w, (((last,), (1,)), ((), ())), preferred_element_type=dtype)

    some = 1 < math.prod(x.shape[:-1]) <= FEW
    return jax.lax.platform_dependent(x, w_FD, cpu=few, default=many) if some else many(x, w_FD)


def linear(x: jax.Array, w: jax.Array, out: int = 1) -> jax.Array:
    """x (..., in) through a weight whose first `out` axes are outputs and whose other axes are inputs.

    Both sides are folded to two axes first: a product that keeps heads apart (`btd,nhd->btnh`) makes XLA:CPU copy the weight into
    another layout on every call, a fifth of a decode step.
    """
    flat = w.reshape(math.prod(w.shape[:out]), -1).astype(x.dtype)
    lead = x.shape[: x.ndim - (w.ndim - out)]
    return product(x.reshape(*lead, flat.shape[1]), flat).reshape(*lead, *w.shape[:out])


def of_heads(w: Block, head_K: jax.Array) -> Block:
    """The attention weights of these kv heads and of the query heads that ask them."""
    G = w.q_NHD.shape[0] // w.k_KHD.shape[0]
    asks = (head_K[:, None] * G + jnp.arange(G)).reshape(-1)
    q, k, v = (None if b is None else b[at] for b, at in ((w.q_bias_NH, asks), (w.k_bias_KH, head_K), (w.v_bias_KH, head_K)))
    heads = {"q_NHD": w.q_NHD[asks], "k_KHD": w.k_KHD[head_K], "v_KHD": w.v_KHD[head_K], "o_DNH": w.o_DNH[:, asks]}
    return w.replace(**heads, q_bias_NH=q, k_bias_KH=k, v_bias_KH=v)


def project(w: Block, cfg: Config, x_BTD: jax.Array, head_BK: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Unrotated q_BTNH, k_BTKH, v_BTKH of normed input rows; head_BK: of these heads of each sequence alone, and no others are made."""
    if head_BK is not None:
        return jax.vmap(lambda x, heads: project(of_heads(w, heads), cfg, x))(x_BTD, head_BK)
    q, k, v = linear(x_BTD, w.q_NHD, 2), linear(x_BTD, w.k_KHD, 2), linear(x_BTD, w.v_KHD, 2)
    if w.q_bias_NH is not None and w.k_bias_KH is not None and w.v_bias_KH is not None:
        q, k, v = (x + b.astype(x.dtype) for x, b in ((q, w.q_bias_NH), (k, w.k_bias_KH), (v, w.v_bias_KH)))
    if w.q_norm_H is not None and w.k_norm_H is not None:
        q, k = rms_norm(q, w.q_norm_H, cfg.eps), rms_norm(k, w.k_norm_H, cfg.eps)
    return q, k, v


def joined(w: Block, out_BTNH: jax.Array, head_BK: jax.Array | None = None) -> jax.Array:
    """x_BTD: what the heads say together; head_BK: these alone speak."""
    if head_BK is None:
        return linear(out_BTNH, w.o_DNH)
    return jax.vmap(lambda out, heads: linear(out, of_heads(w, heads).o_DNH))(out_BTNH, head_BK)


def feed_forward(w: Block, cfg: Config, x_BTD: jax.Array) -> jax.Array:
    """Gated feed-forward: down(act(gate x) * up x)."""
    gate = linear(x_BTD, w.gate_FD)
    act = jax.nn.silu(gate) if cfg.act == "silu" else jax.nn.gelu(gate, approximate=True)
    return linear(act * linear(x_BTD, w.up_FD), w.down_DF)


def block(
    w: Block,
    flow: Flow,
    layer: Any,
    accepted: Accepted | None,
    across: Any,
    *,
    policy: Attends,
    cut: Pass | None,
    here: Here,
    halves: tuple[bool, bool] = (True, True),
) -> tuple[Flow, Any, Any]:
    """One layer, or one of its halves (attention, feed-forward), for the rows that a `cut` does not keep out of it."""
    for half in (0, 1):
        if not halves[half]:
            continue
        index_BM = None if cut is None else cut.awake(half, flow, here)
        some = flow if index_BM is None else flow.take(index_BM)
        if half == 0:
            some, layer, across = mix(w, some, layer, accepted, across, policy=policy, cut=cut, here=here)
        else:
            some = feed(w, some, cut, here)
        flow = some if index_BM is None else flow.put(some, index_BM)
    return flow, layer, across


def feed(w: Block, flow: Flow, cut: Pass | None, here: Here) -> Flow:
    """The feed-forward half of a layer."""
    x, cfg = flow.x_BTD, here.cfg
    y = rms_norm(x, w.ffn_norm_D, cfg.eps)
    out = feed_forward(w, cfg, y)
    if w.post_ffn_norm_D is not None:
        out = rms_norm(out, w.post_ffn_norm_D, cfg.eps)
    flow = flow if cut is None else cut.added(y, out, flow, here)
    return flow.replace(x_BTD=x + out)


@partial(jax.jit, static_argnames=("policy", "cut", "here", "halves"))
def one_layer(w, flow, layer, accepted, across, *, policy, cut, here, halves=(True, True)):
    """`block`, traced once for all layers that are alike, and compiled once where it is called outside a jitted function."""
    return block(w, flow, layer, accepted, across, policy=policy, cut=cut, here=here, halves=halves)


def acting(cut: Pass | None, cfg: Config, layer: int) -> Pass | None:
    """The pass where it does anything in this layer."""
    return None if cut is None or cut.role(layer, cfg) is None else cut


def alike(policy: Attends, cut: Pass | None, cfg: Config, layer: int) -> int:
    """The first layer that is the same program: same window and rope, same role in the policy and in the pass."""

    def kind(i: int):
        return cfg.windows[i], cfg.rope_of(i), policy.role(i), None if cut is None else cut.role(i, cfg)

    return next(i for i in range(layer + 1) if kind(i) == kind(layer))


def mix(w: Block, flow: Flow, layer, accepted, across, *, policy: Attends, cut: Pass | None, here: Here) -> tuple[Flow, Any, Any]:
    """The attention half of a layer. Where a `cut` chooses, the other rows are gone before it, or all write their key and value and only
    the chosen ones ask and go on. Heads that a pass let go below are not made."""
    cfg, here, heads = here.cfg, replace(here, side=w.side), flow.head_BK
    whole, here = here, here if heads is None else here.fewer(heads.shape[1])
    chooses = cut is not None and here.layer in cut.layers(cfg)
    if cut is not None and chooses and not cut.writes:
        q, k, _ = project(w, cfg, rms_norm(flow.x_BTD, w.attn_norm_D, cfg.eps), heads)
        flow = cut.take(flow, cut.choose(q, k, flow, here), here)
    q, k, v = project(w, cfg, rms_norm(flow.x_BTD, w.attn_norm_D, cfg.eps), heads)
    flow = flow if cut is None else cut.note(q, k, flow, here)
    ask = flow
    if cut is not None and chooses and cut.writes:
        index_BM = cut.choose(q, k, flow, here)
        ask = cut.take(flow, index_BM, here)
        q = jnp.take_along_axis(q, jnp.maximum(index_BM, 0)[..., None, None], axis=1)
    out, layer, across = policy.attend(q, k, v, ask, flow, layer, accepted, across, here)
    ask = ask if cut is None else cut.listen(out, ask, whole)
    mixed = joined(w, out.astype(flow.x_BTD.dtype), heads)
    if w.post_attn_norm_D is not None:
        mixed = rms_norm(mixed, w.post_attn_norm_D, cfg.eps)
    ask = ask if cut is None else cut.added(rms_norm(ask.x_BTD, w.attn_norm_D, cfg.eps), mixed, ask, here)
    return ask.replace(x_BTD=ask.x_BTD + mixed), layer, across


def stack(
    params: Params,
    cfg: Config,
    flow: Flow,
    layers: tuple[Any, ...],
    *,
    policy: Attends,
    accepted: Accepted | None = None,
    cut: Pass | None = None,
    run: tuple[int, ...] | None = None,
    moved: tuple[int, ...] = (),
    taps: tuple[int, ...] = (),
    skip: tuple[tuple[int, ...], tuple[int, ...]] = ((), ()),
) -> tuple[Flow, tuple[Any, ...], dict[int, jax.Array]]:
    """Every row through the layers named in `run` (all by default): (the rows that reach the top, the new caches, {layer: x_BTD that
    left it} of those in `taps`). Layers in `moved` have taken in already what was accepted. skip: the layers whose attention, and those
    whose feed-forward, is left out.

    `across` starts empty on every call and is handed from layer to layer: what a policy puts there (a selection, say) the
    layers above may use.
    """
    out, across, tapped = list(layers), None, {}
    done = None if accepted is None else Accepted.nothing(*accepted.path_BW.shape)
    for i in range(cfg.L) if run is None else run:
        pending = done if i in moved else accepted
        here, halves = Here(alike(policy, cut, cfg, i), cfg), (i not in skip[0], i not in skip[1])
        flow, out[i], across = one_layer(
            params.blocks[i], flow, layers[i], pending, across, policy=policy, cut=acting(cut, cfg, i), here=here, halves=halves
        )
        if i in taps:
            tapped[i] = flow.x_BTD
    return flow, tuple(out), tapped


@partial(jax.jit, inline=True)
def last_row(flow: Flow) -> jax.Array:
    """x_B1D of each sequence's row with the largest order."""
    at = jnp.argmax(flow.order_BT, axis=1)
    return jnp.take_along_axis(flow.x_BTD, at[:, None, None], axis=1)


@partial(jax.jit, static_argnames="T", inline=True)
def orders(length_B: jax.Array, T: int) -> jax.Array:
    """order_BT of right-padded prompts: 0, 1, ... and EMPTY from each length on."""
    t = jnp.arange(T, dtype=jnp.int32)[None]
    return jnp.where(t < length_B[:, None], t, EMPTY)
