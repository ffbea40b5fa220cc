"""Reading a store through the attention kernels: stored rows, and draft rows beside them, in one softmax."""

from __future__ import annotations

import jax

from tokeff.kernels import decode_attention, merge, tree_attention
from tokeff.kernels.tree_attention.xla import over_draft
from tokeff.kv.cache import Draft, Rows, among
from tokeff.models.flow import Flow, Here


def read_draft(q_BTNH: jax.Array, draft: Draft | None, ask: Flow, here: Here) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH, lse_BTN) of draft queries over the draft rows that they descend from."""
    assert draft is not None, "this cache was packed without room for drafts"
    seen_BTW = among(ask, here.lo(ask.order_BT), draft.order_BW)
    return over_draft(q_BTNH, draft.k_BKWH, draft.v_BKWH, seen_BTW, scale=here.cfg.scale, softcap=here.cfg.softcap)


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
    draft = layer.draft
    if ask.among_BTW is not None and draft is not None and pages is None and layer.bias_BKC is None and _alike(layer.k_BKCH, draft):
        lo_BT = here.lo(ask.order_BT)
        return tree_attention(
            q_BTNH.astype(layer.k_BKCH.dtype), layer.k_BKCH, layer.v_BKCH, layer.order_BKC, lo_BT, ask.hi_BT,
            draft.k_BKWH, draft.v_BKWH, among(ask, lo_BT, draft.order_BW),
            scale=here.cfg.scale, softcap=here.cfg.softcap, finite=True,
        )[0]  # fmt: skip
    out, lse = read_store(q_BTNH, layer, ask, here, pages, size)
    if ask.among_BTW is not None:
        out, _ = merge(out, lse, *read_draft(q_BTNH, layer.draft, ask, here))
    return out


def _alike(k_BKCH: jax.Array, draft: Draft) -> bool:
    """Whether cache and draft are of one dtype, as the kernel wants them."""
    return k_BKCH.dtype == draft.k_BKWH.dtype
