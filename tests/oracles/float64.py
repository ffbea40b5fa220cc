"""A float64 model, for strict tests: two ways to compute one thing then differ by 1e-12, so equal tokens mean equal algorithms.

The kernels accumulate in float32 by contract, so while the context is open plain float64 definitions stand in for their XLA path.
"""

from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp

from tokeff.kernels import column_mass, decode_attention, dispatch, tree_attention


@contextmanager
def float64_model():
    """64-bit types on, float64 attention and column mass."""
    ops = {decode_attention: attention, column_mass: mass, tree_attention: tree}
    tables = {op: __import__(op.__module__, fromlist=["OP"]).OP.run for op in ops}
    before = {op: table["xla"] for op, table in tables.items()}
    dispatch._compiled.cache_clear()
    with jax.enable_x64(True):
        for op, table in tables.items():
            table["xla"] = partial(ops[op])
        try:
            yield
        finally:
            for op, table in tables.items():
                table["xla"] = before[op]
            dispatch._compiled.cache_clear()


def logits(q_BTNH, k_BKCH, order_BKC, lo_BT, hi_BT, scale, softcap):
    """(logits_BKTGC, seen_BKTGC)."""
    B, T, N, H = q_BTNH.shape
    K = k_BKCH.shape[1]
    x = jnp.einsum("btkgh,bkch->bktgc", q_BTNH.reshape(B, T, K, N // K, H), k_BKCH) * scale
    x = softcap * jnp.tanh(x / softcap) if softcap else x
    order = order_BKC[:, :, None, None]
    seen = (order >= lo_BT[:, None, :, None, None]) & (order <= hi_BT[:, None, :, None, None])
    return x, jnp.broadcast_to(seen, x.shape)


def heads_last(x_BKTG):
    """(B, T, N, ...) from (B, K, T, G, ...)."""
    B, K, T, G, *rest = x_BKTG.shape
    return jnp.moveaxis(x_BKTG, 1, 2).reshape(B, T, K * G, *rest)


def attention(
    q_BTNH, k_BKCH, v_BKCH, order_BKC, lo_BT, hi_BT, page_BKM=None, bias_BKC=None, *, page_size, scale, softcap, finite=False, clean=False
):
    """`decode_attention` by its definition."""
    x, seen = logits(q_BTNH, k_BKCH, order_BKC, lo_BT, hi_BT, scale, softcap)
    if bias_BKC is not None:
        x = x + bias_BKC[:, :, None, None]
    if page_BKM is not None:
        page = jnp.arange(k_BKCH.shape[2]) // page_size
        seen = seen & (page[:, None] == page_BKM[:, :, None]).any(-1)[:, :, None, None]
    return weighed(x, seen, v_BKCH)


def weighed(x_BKTGC, seen_BKTGC, v_BKCH):
    """(out_BTNH, lse_BTN) of the rows that are seen."""
    lse = jax.nn.logsumexp(jnp.where(seen_BKTGC, x_BKTGC, -jnp.inf), axis=-1)
    p = jnp.where(seen_BKTGC, jnp.exp(x_BKTGC - jnp.where(jnp.isfinite(lse), lse, 0)[..., None]), 0)
    return heads_last(jnp.einsum("bktgc,bkch->bktgh", p, v_BKCH)), heads_last(lse)


def tree(
    q_BTNH, k_BKCH, v_BKCH, k_BKWH, v_BKWH, order_BKC, lo_BT, hi_BT, among_BTW, *, scale, softcap, finite=False, clean=False
):  # fmt: skip
    """`tree_attention` by its definition: the draft behind the stored rows."""
    B, K, W, _ = k_BKWH.shape
    x, seen = logits(q_BTNH, k_BKCH, order_BKC, lo_BT, hi_BT, scale, softcap)
    y, _ = logits(q_BTNH, k_BKWH, jnp.zeros((B, K, W), jnp.int32), lo_BT, hi_BT, scale, softcap)
    among = jnp.broadcast_to(among_BTW[:, None, :, None], y.shape)
    both = [jnp.concatenate(pair, axis=-1) for pair in ((x, y), (seen, among))]
    return weighed(*both, jnp.concatenate([v_BKCH, v_BKWH], axis=2))


def mass(q_BTNH, k_BKCH, lse_BTN, weight_BT, order_BKC, lo_BT, hi_BT, *, scale, softcap, clean=False):
    """`column_mass` by its definition."""
    B, T, N, _ = q_BTNH.shape
    K = k_BKCH.shape[1]
    x, seen = logits(q_BTNH, k_BKCH, order_BKC, lo_BT, hi_BT, scale, softcap)
    lse = jnp.moveaxis(lse_BTN.reshape(B, T, K, N // K), 2, 1)[..., None]
    p = jnp.where(seen, jnp.exp(x - jnp.where(jnp.isfinite(lse), lse, 0)), 0)
    return jnp.einsum("bktgc,bt->bkc", p, weight_BT.astype(p.dtype))
