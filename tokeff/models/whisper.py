"""Whisper (Radford et al. 2022) as pure functions: `encode` (sound to rows), `listen`, `decode` (text over them), `greedy`.

Rows of the encoder can be merged on the way (`reduce`, `drop`), as those of an image tower. Everything has static shapes: a window is
30 seconds long, shorter clips end in silence, and all sequences of a batch stand at the same place of their transcripts.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tokeff.errors import UserError
from tokeff.models.attention import NEG, combine, scores, softmax, wide
from tokeff.models.flow import EMPTY
from tokeff.models.transformer import linear, product
from tokeff.models.vit import activate, heads_of, layer_norm, mlp
from tokeff.models.vit_config import ViTBlock
from tokeff.models.whisper_config import WhisperConfig, WhisperParams
from tokeff.reduce.merge import Reducer, log_size, trace, whole

BLOCK = 128  # queries whose logits are held at a time; see `attention.flash`


class Encoded(struct.PyTreeNode):
    """x_BMD that left the encoder, how many of its S rows each stands for, and where row s is now (as in `tokeff.reduce.merge`)."""

    x_BMD: jax.Array
    size_BM: jax.Array
    source_BS: jax.Array


class Heard(struct.PyTreeNode):
    """What one decoder layer reads of the encoder, and what each row adds to its score (None for nothing)."""

    k_BNMH: jax.Array
    v_BNMH: jax.Array
    bias_BM: jax.Array | None


class Said(struct.PyTreeNode):
    """One decoder layer's cache: slot c holds the row of place c."""

    k_BNCH: jax.Array
    v_BNCH: jax.Array


def attend(q_BTNH: jax.Array, k_BNMH: jax.Array, v_BNMH: jax.Array, bias_BM: jax.Array | None = None) -> jax.Array:
    """out_BTNH: every query over every row, `BLOCK` queries at a time."""
    B, T, N, H = q_BTNH.shape
    n = -(-T // BLOCK)

    def some(q):
        logits = scores(q, k_BNMH, H**-0.5, 0.0)
        if bias_BM is not None:
            logits = logits + bias_BM[:, None, None, None]
        return combine(jax.nn.softmax(logits, axis=-1), v_BNMH)

    if n == 1:
        return some(q_BTNH)
    blocks = jnp.pad(q_BTNH, ((0, 0), (0, n * BLOCK - T), (0, 0), (0, 0))).reshape(B, n, BLOCK, N, H)
    out = jax.lax.map(some, jnp.moveaxis(blocks, 1, 0))
    return jnp.moveaxis(out, 0, 1).reshape(B, n * BLOCK, N, H)[:, :T]


def convolve(x_BTI: jax.Array, w_DIX: jax.Array, bias_D: jax.Array, stride: int = 1) -> jax.Array:
    """y_BTD: a convolution over time with a border of zeros, as one matrix product a tap."""
    X, T = w_DIX.shape[2], x_BTI.shape[1]
    x = jnp.pad(x_BTI, ((0, 0), (X // 2, X // 2), (0, 0)))
    taps = (linear(x[:, i : i + T : stride], w_DIX[:, :, i]) for i in range(X))
    return sum(taps, bias_D.astype(x.dtype))


def mix_rows(w: ViTBlock, cfg: WhisperConfig, x_BSD: jax.Array, bias_BS: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """(x_BSD after the attention half of an encoder layer, metric_BSH: the mean of its keys over heads)."""
    y = layer_norm(x_BSD, w.attn_norm_D, w.attn_norm_bias_D, cfg.eps)
    q, k, v = (heads_of(w, y, name) for name in "qkv")
    out = attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), bias_BS)
    return x_BSD + linear(out, w.o_DNH) + w.o_bias_D.astype(y.dtype), k.mean(axis=2)


@partial(jax.jit, static_argnames=("cfg", "reduce", "drop", "proportional"))
def encode(
    params: WhisperParams,
    cfg: WhisperConfig,
    mel_BTI: jax.Array,
    *,
    reduce: Reducer | None = None,
    drop: tuple[int, ...] = (),
    proportional: bool = True,
) -> Encoded:
    """Log-mel windows of 2 S frames through the encoder.

    reduce: takes `drop[i]` rows away at layer i, between attention and feed-forward, by the mean of the keys over heads (ToMe, Bolya et
    al. 2023). proportional: a row then draws attention for all it stands for. Raises UserError for windows of another size.
    """
    if mel_BTI.shape[1:] != (2 * cfg.S, cfg.I):
        raise UserError(f"{cfg.name} reads windows of {2 * cfg.S} frames x {cfg.I} bands, these are {mel_BTI.shape[1:]}; see models.audio")
    if reduce is not None and len(drop) != cfg.L:
        raise UserError(f"drop names {len(drop)} layers, the encoder of {cfg.name} has {cfg.L}; see tokeff.reduce.merge.schedule")
    x = activate(convolve(mel_BTI.astype(params.conv1_DIX.dtype), params.conv1_DIX, params.conv1_bias_D), cfg.act)
    x = activate(convolve(x, params.conv2_DDX, params.conv2_bias_D, stride=2), cfg.act)
    x = x + params.place_SD.astype(x.dtype)
    size, source = whole(cfg.S, x.shape[0])
    for i, w in enumerate(params.encoder):
        merged = reduce is not None and proportional and any(drop[:i])
        x, metric = mix_rows(w, cfg, x, log_size(size) if merged else None)
        if reduce is not None and drop[i]:
            x, size, step = reduce.reduce(x, metric, size, drop[i], 0, i)
            source = trace(source, step)
        x = mlp(w, cfg, x)
    return Encoded(layer_norm(x, params.norm_D, params.norm_bias_D, cfg.eps), size, source)


def listen(params: WhisperParams, rows: Encoded, proportional: bool = False) -> tuple[Heard, ...]:
    """Keys and values of the encoder's rows for every decoder layer. proportional: rows draw attention for all they stand for here too."""
    bias = log_size(rows.size_BM) if proportional else None

    def heard(w):
        return Heard(heads_of(w, rows.x_BMD, "k").swapaxes(1, 2), heads_of(w, rows.x_BMD, "v").swapaxes(1, 2), bias)

    return tuple(heard(block.cross) for block in params.decoder)


def silence(cfg: WhisperConfig, B: int, C: int, dtype=jnp.float32) -> tuple[Said, ...]:
    """Empty caches of C slots."""
    return (Said(*(jnp.zeros((B, cfg.N, C, cfg.H), dtype),) * 2),) * cfg.layers


def decode(
    params: WhisperParams, cfg: WhisperConfig, tokens_BT: jax.Array, at: jax.Array | int, heard: tuple[Heard, ...], said: tuple[Said, ...]
) -> tuple[jax.Array, tuple[Said, ...]]:
    """(float32 logits_BTV, caches) of tokens that stand at places at, at + 1, ... of every transcript."""
    T, C = tokens_BT.shape[1], said[0].k_BNCH.shape[2]
    place_T = at + jnp.arange(T)
    x = params.embed_VD[tokens_BT] + params.place_TD[place_T].astype(params.embed_VD.dtype)
    visible = jnp.arange(C)[None] <= place_T[:, None]
    new = []
    for block, audio, cache in zip(params.decoder, heard, said):
        w = block.own
        y = layer_norm(x, w.attn_norm_D, w.attn_norm_bias_D, cfg.eps)
        q, k, v = (heads_of(w, y, name) for name in "qkv")
        k, v = (
            jax.lax.dynamic_update_slice(old, rows.swapaxes(1, 2).astype(old.dtype), (0, 0, at, 0))
            for old, rows in ((cache.k_BNCH, k), (cache.v_BNCH, v))
        )
        p, _ = softmax(scores(q, k, cfg.H**-0.5, 0.0), visible)
        x = x + linear(combine(p, v), w.o_DNH) + w.o_bias_D.astype(x.dtype)
        c = block.cross
        q = heads_of(c, layer_norm(x, c.attn_norm_D, c.attn_norm_bias_D, cfg.eps), "q")
        x = x + linear(attend(q, audio.k_BNMH, audio.v_BNMH, audio.bias_BM), c.o_DNH) + c.o_bias_D.astype(x.dtype)
        x = mlp(w, cfg, x)
        new.append(Said(k, v))
    x = layer_norm(x, params.text_norm_D, params.text_norm_bias_D, cfg.eps)
    return product(x, params.embed_VD.astype(x.dtype), wide(x.dtype)), tuple(new)


def best(logits_BV: jax.Array, never: tuple[int, ...], V: int) -> jax.Array:
    """token_B with the largest logit of those that may be written."""
    out = np.isin(np.arange(V), never)
    return jnp.argmax(jnp.where(out, NEG, logits_BV), axis=-1).astype(jnp.int32)


@partial(jax.jit, static_argnames=("cfg", "most"))
def greedy(params: WhisperParams, cfg: WhisperConfig, heard: tuple[Heard, ...], most: int = 128) -> jax.Array:
    """token_BT of greedy transcripts, at most `most` tokens without start and end; EMPTY past each end."""
    n, B = len(cfg.start), heard[0].k_BNMH.shape[0]
    if not 0 < most <= cfg.max_len - n:
        raise UserError(f"a transcript of {most} tokens does not fit {cfg.name}; give 1 to {cfg.max_len - n}")
    said = silence(cfg, B, n + most, params.embed_VD.dtype)
    logits, said = decode(params, cfg, jnp.broadcast_to(jnp.asarray(cfg.start), (B, n)), 0, heard, said)
    first = best(logits[:, -1], cfg.never + cfg.never_first, cfg.V)

    def running(state):
        i, last, _, _ = state
        return (i < most) & jnp.any(last != cfg.eos)

    def step(state):
        i, last, text, said = state
        text = text.at[:, i].set(jnp.where(last == cfg.eos, EMPTY, last))
        logits, said = decode(params, cfg, last[:, None], n + i, heard, said)
        after = best(logits[:, 0], cfg.never, cfg.V)
        return i + 1, jnp.where(last == cfg.eos, last, after), text, said

    text = jnp.full((B, most), EMPTY, jnp.int32)
    return jax.lax.while_loop(running, step, (0, first, text, said))[2]
