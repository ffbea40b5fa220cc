"""Vision transformers as pure functions: `encode` (patches through the blocks), `finish`, `pool`, `classify`.

One encoder for three families: supervised ViT (Dosovitskiy et al. 2021), CLIP's image tower (Radford et al. 2021) and SigLIP's (Zhai et
al. 2023). What a method of token reduction wants to know of a layer it asks for in `Taps`; nothing else of it is kept. The letters of
arrays are explained in `tokeff.models.vit_config`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from tokeff.errors import UserError
from tokeff.models.attention import combine, scores, wide
from tokeff.models.transformer import linear
from tokeff.models.vit_config import ViTBlock, ViTConfig, ViTParams
from tokeff.reduce.merge import Reducer, log_size, trace, whole


@dataclass(frozen=True)
class Taps:
    """Of which layers (0 is the first) what is wanted: the rows that left them, the class row's attention, the attention each row received,
    keys and queries."""

    x: tuple[int, ...] = ()
    cls: tuple[int, ...] = ()
    received: tuple[int, ...] = ()
    k: tuple[int, ...] = ()
    q: tuple[int, ...] = ()

    def __or__(self, other: Taps) -> Taps:
        def both(name: str):
            return tuple(sorted({*getattr(self, name), *getattr(other, name)}))

        return Taps(*(both(f.name) for f in fields(self)))

    def top(self) -> int:
        """The highest layer that is asked about, -1 if none is."""
        return max((i for f in fields(self) for i in getattr(self, f.name)), default=-1)


class Seen(struct.PyTreeNode):
    """What `Taps` asked for, by layer. cls_BNS: softmax of the class row's query, of every head. received_BS: the mean over heads and
    queries of the attention that a row received, so that rows add up to 1. What a caller adds: pixels_BYXC, what the tower read; side, the
    learned parts of methods (`ViTParams.side`)."""

    x_BSD: dict[int, jax.Array]
    cls_BNS: dict[int, jax.Array]
    received_BS: dict[int, jax.Array]
    k_BSNH: dict[int, jax.Array]
    q_BSNH: dict[int, jax.Array]
    pixels_BYXC: jax.Array | None = None
    side: dict[str, Any] | None = None


class Encoded(struct.PyTreeNode):
    """x_BSD that left the last block that ran; how many patches each row stands for, and where the row that holds patch s is now (as in
    `tokeff.reduce.merge`); and what `Taps` asked for."""

    x_BSD: jax.Array
    size_BS: jax.Array
    source_BS: jax.Array
    seen: Seen


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Layer norm over the last axis, in float32 (Ba et al. 2016)."""
    y = x.astype(wide(x.dtype))
    y = y - y.mean(axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * weight + bias).astype(x.dtype)


def activate(x: jax.Array, act: str) -> jax.Array:
    """'gelu' (exact), 'gelu_tanh', or CLIP's 'quick_gelu' x sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x) if act == "quick_gelu" else jax.nn.gelu(x, approximate=act == "gelu_tanh")


def patches_of(cfg: ViTConfig, pixels_BYXC: jax.Array) -> jax.Array:
    """patch_BSI of normalised pixels, in reading order. UserError for another size than the tower's."""
    B, size = pixels_BYXC.shape[0], pixels_BYXC.shape[1:]
    if size != (*cfg.image, cfg.channels):
        raise UserError(f"{cfg.name} reads images of {(*cfg.image, cfg.channels)}, these are {size}; use its preprocessing")
    (rows, columns), p = cfg.grid, cfg.patch
    cells = pixels_BYXC.reshape(B, rows, p, columns, p, cfg.channels)
    return cells.transpose(0, 1, 3, 5, 2, 4).reshape(B, cfg.patches, cfg.I)


@partial(jax.jit, static_argnames="cfg")
def embed_patches(params: ViTParams, cfg: ViTConfig, pixels_BYXC: jax.Array) -> jax.Array:
    """x_BSD that enters the first block."""
    x = linear(patches_of(cfg, pixels_BYXC).astype(params.patch_DI.dtype), params.patch_DI)
    x = x if params.patch_bias_D is None else x + params.patch_bias_D.astype(x.dtype)
    if params.cls_D is not None:
        first = jnp.broadcast_to(params.cls_D.astype(x.dtype), (x.shape[0], 1, cfg.D))
        x = jnp.concatenate([first, x], axis=1)
    x = x + params.place_SD.astype(x.dtype)
    if params.pre_norm_D is not None and params.pre_norm_bias_D is not None:
        x = layer_norm(x, params.pre_norm_D, params.pre_norm_bias_D, cfg.eps)
    return x


def attend(q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, size_BS: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH, p_BNTS): every query over every row. size_BS: rows count that often, which adds the log of it to their scores."""
    logits = scores(q_BTNH, k_BSNH.swapaxes(1, 2), q_BTNH.shape[-1] ** -0.5, 0.0)
    if size_BS is not None:
        logits = logits + log_size(size_BS)[:, None, None, None]
    p = jax.nn.softmax(logits, axis=-1)
    return combine(p, v_BSNH.swapaxes(1, 2)), p[:, :, 0]


def heads_of(w: Any, x_BSD: jax.Array, name: str) -> jax.Array:
    """One of the queries, keys and values x_BSNH that a layer makes of its normed rows."""
    y, bias = linear(x_BSD, getattr(w, f"{name}_NHD"), 2), getattr(w, f"{name}_bias_NH")
    return y if bias is None else y + bias.astype(y.dtype)


def mlp(w: Any, cfg: Any, x_BSD: jax.Array) -> jax.Array:
    """x plus the feed-forward of its norm."""
    y = layer_norm(x_BSD, w.ffn_norm_D, w.ffn_norm_bias_D, cfg.eps)
    y = activate(linear(y, w.up_FD) + w.up_bias_F.astype(y.dtype), cfg.act)
    return x_BSD + linear(y, w.down_DF) + w.down_bias_D.astype(y.dtype)


def attention(w: Any, cfg: Any, x_BSD: jax.Array, size_BS: jax.Array | None) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """(x_BSD plus the attention of its norm, p_BNTS as `attend` gives it, its q, k and v by name)."""
    y = layer_norm(x_BSD, w.attn_norm_D, w.attn_norm_bias_D, cfg.eps)
    made = {name: heads_of(w, y, name) for name in "qkv"}
    out, p_BNTS = attend(made["q"], made["k"], made["v"], size_BS)
    return x_BSD + linear(out, w.o_DNH) + w.o_bias_D.astype(y.dtype), p_BNTS, made


@partial(jax.jit, static_argnames=("cfg", "wanted", "reduce", "r", "layer"))
def one_block(
    w: ViTBlock, x_BSD, size_BS, source_BS, *, cfg: ViTConfig, wanted: frozenset[str], reduce: Reducer | None, r: int, layer: int
):
    """(x_BSD, size_BS, source_BS, what is wanted of this layer by name). layer: 0 where none is merged, so that such layers share code."""
    x, p_BNTS, made = attention(w, cfg, x_BSD, None if reduce is None else size_BS)
    if reduce is not None and r:
        x, size_BS, step = reduce.reduce(x, made["k"].mean(axis=2), size_BS, r, int(cfg.cls), layer)
        source_BS = trace(source_BS, step)
    x = mlp(w, cfg, x)
    found = {"x": x, "cls": p_BNTS[:, :, 0], "received": p_BNTS.mean(axis=(1, 2)), **made}
    return x, size_BS, source_BS, {name: found[name] for name in wanted}


def encode(
    params: ViTParams,
    cfg: ViTConfig,
    pixels_BYXC: jax.Array,
    *,
    taps: Taps = Taps(),
    reduce: Reducer | None = None,
    drop: tuple[int, ...] = (),
    upto: int | None = None,
) -> Encoded:
    """Normalised images through the blocks.

    reduce: takes `drop[i]` rows away at layer i, between attention and feed-forward, by the mean of the keys over heads (ToMe, Bolya et al.
    2023); a row then draws attention for all the patches it stands for. upto: run so many blocks; all by default. One compiled program
    serves all blocks of which the same is asked. Raises UserError for images of another size, and for a class row that is not there.
    """
    if taps.cls and not cfg.cls:
        raise UserError(f"{cfg.name} has no class row whose attention could rank patches; rank by the attention they receive")
    if reduce is not None and len(drop) != cfg.L:
        raise UserError(f"drop names {len(drop)} layers, {cfg.name} has {cfg.L}; see tokeff.reduce.merge.schedule")
    x, seen = embed_patches(params, cfg, pixels_BYXC), {f.name: {} for f in fields(Taps)}
    size, source = whole(cfg.S, x.shape[0])
    for i in range(cfg.L if upto is None else upto):
        wanted, r = frozenset(name for name in seen if i in getattr(taps, name)), 0 if reduce is None else drop[i]
        x, size, source, found = one_block(
            params.blocks[i], x, size, source, cfg=cfg, wanted=wanted, reduce=reduce, r=r, layer=i if r else 0
        )
        for name, value in found.items():
            seen[name][i] = value
    return Encoded(x, size, source, Seen(seen["x"], seen["cls"], seen["received"], seen["k"], seen["q"]))


def finish(params: ViTParams, cfg: ViTConfig, x_BSD: jax.Array) -> jax.Array:
    """Rows as the tower hands them out: normed, but for CLIP's."""
    return layer_norm(x_BSD, params.norm_D, params.norm_bias_D, cfg.eps) if cfg.norm_rows else x_BSD


def pool(params: ViTParams, cfg: ViTConfig, rows_BSD: jax.Array) -> jax.Array:
    """pooled_BD of what `finish` gave: the class row, or by SigLIP's learned query. UserError for a tower that has neither."""
    w = params.pool
    if w is not None:
        probe = jnp.broadcast_to(w.probe_D.astype(rows_BSD.dtype), (rows_BSD.shape[0], 1, cfg.D))
        out, _ = attend(heads_of(w, probe, "q"), heads_of(w, rows_BSD, "k"), heads_of(w, rows_BSD, "v"))
        return mlp(w, cfg, linear(out, w.o_DNH) + w.o_bias_D.astype(rows_BSD.dtype))[:, 0]
    if not cfg.cls:
        raise UserError(f"{cfg.name} has neither a class row nor a pooling head; use its rows")
    return rows_BSD[:, 0] if cfg.norm_rows else layer_norm(rows_BSD[:, 0], params.norm_D, params.norm_bias_D, cfg.eps)


def classify(params: ViTParams, pooled_BD: jax.Array) -> jax.Array:
    """float32 logits_BV of labels (ViT), or the pooled row in the space it shares with texts (CLIP). UserError without a head."""
    if params.head_VD is None:
        raise UserError("this tower has no head; use its pooled rows")
    y = linear(pooled_BD, params.head_VD).astype(jnp.float32)
    return y if params.head_bias_V is None else y + params.head_bias_V
