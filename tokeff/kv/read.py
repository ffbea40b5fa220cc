"""Reading a store: stored rows through the decode-attention kernel, draft rows beside them, merged by log-sum-exp."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tokeff.kernels import decode_attention, merge
from tokeff.kv.cache import Draft, Rows, among
from tokeff.models.attention import combine, scores, softmax
from tokeff.models.flow import Flow, Here


def read_draft(q_BTNH: jax.Array, draft: Draft | None, ask: Flow, here: Here) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH, lse_BTN) of draft queries over the draft rows that they descend from."""
    assert draft is not None, "this cache was packed without room for drafts"
    cfg = here.cfg
    seen = among(ask, here.lo(ask.order_BT), draft.order_BW)[:, None, None]
    p, lse = softmax(scores(q_BTNH, draft.k_BKWH, cfg.scale, cfg.softcap), seen)
    B, K, G, T = lse.shape
    return combine(p, draft.v_BKWH), jnp.moveaxis(lse, 3, 1).reshape(B, T, K * G)


def read_store(
    q_BTNH: jax.Array, layer: Rows, ask: Flow, here: Here, pages: jax.Array | None = None, size: int = 1
) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH, lse_BTN) over the store, or over its pages of `size` slots named in pages_BKM.

    Free slots of a store hold zeros or rows that were evicted, never NaN: that is the promise behind `finite`.
    """
    return decode_attention(
        q_BTNH.astype(layer.k_BKCH.dtype), layer.k_BKCH, layer.v_BKCH, layer.order_BKC, here.lo(ask.order_BT), ask.hi_BT,
        page_BKM=pages, bias_BKC=layer.bias_BKC, page_size=size, scale=here.cfg.scale, softcap=here.cfg.softcap, finite=True,
    )  # fmt: skip


def read_rows(q_BTNH: jax.Array, layer: Rows, ask: Flow, here: Here, pages: jax.Array | None = None, size: int = 1) -> jax.Array:
    """out_BTNH over the store (or over its pages of `size` slots named in pages_BKM) and, in a draft call, over the drafts."""
    out, lse = read_store(q_BTNH, layer, ask, here, pages, size)
    if ask.among_BTW is not None:
        out, _ = merge(out, lse, *read_draft(q_BTNH, layer.draft, ask, here))
    return out
