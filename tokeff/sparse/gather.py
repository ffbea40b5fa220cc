"""Reading pages that each query names for itself: one by one through the kernel, or gathered."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tokeff.kernels import merge
from tokeff.kv.cache import Rows, visible
from tokeff.kv.hosted import Hosted, Store, rows_at
from tokeff.kv.read import read_rows, read_store
from tokeff.models.attention import combine, scores, softmax
from tokeff.models.flow import EMPTY, Flow, Here
from tokeff.sparse.select import slots_in


def flat(x_BKTM: jax.Array) -> jax.Array:
    return x_BKTM.reshape(*x_BKTM.shape[:2], -1)


def fold(x_BKTM: jax.Array) -> jax.Array:
    """Every query as a sequence of its own: (B * T, K, M, ...)."""
    B, K, T, M, *rest = x_BKTM.shape
    return jnp.moveaxis(x_BKTM, 2, 1).reshape(B * T, K, M, *rest)


def orders_at(order_BKC: jax.Array, slot_BKTM: jax.Array) -> jax.Array:
    """order_BKTM of slots; EMPTY for slot EMPTY."""
    order = jnp.take_along_axis(order_BKC, jnp.maximum(flat(slot_BKTM), 0), axis=2).reshape(slot_BKTM.shape)
    return jnp.where(slot_BKTM == EMPTY, EMPTY, order)


def read_all(q_BTNH: jax.Array, store: Store, ask: Flow, here: Here) -> jax.Array:
    """out_BTNH over everything, drafts included, of a store that lies on the device."""
    assert isinstance(store, Rows)
    return read_rows(q_BTNH, store, ask, here)


def read_few(
    q_BTNH: jax.Array, store: Store, sure_BKTX: jax.Array, chosen_BKTM: jax.Array, size: int, ask: Flow, here: Here, unrotated=False
) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH, lse_BTN) over pages of `size` slots, of each query its own: those that are read in any case, which lie on the device
    wherever the others do, and chosen ones.

    unrotated: take the rotation off the keys, for queries that carry a distance instead of a position.
    """
    if isinstance(store, Hosted) and not sure_BKTX.shape[-1]:
        return gather_read(q_BTNH, store, chosen_BKTM, size, ask, here, unrotated)
    if isinstance(store, Hosted):
        sure = store.pages_near(sure_BKTX, size)
        out, lse = read_few(q_BTNH, store.near, sure, sure[..., :0], size, ask, here, unrotated)
        if not chosen_BKTM.shape[-1]:
            return out, lse
        return merge(out, lse, *gather_read(q_BTNH, store, chosen_BKTM, size, ask, here, unrotated))
    page = jnp.concatenate([sure_BKTX, chosen_BKTM], axis=-1)
    if q_BTNH.shape[1] == 1 and not unrotated:
        return read_store(q_BTNH, store, ask, here, page[:, :, 0], size)
    return gather_read(q_BTNH, store, page, size, ask, here, unrotated)


def gather_read(
    q_BTNH: jax.Array, store: Store, page_BKTX: jax.Array, size: int, ask: Flow, here: Here, unrotated: bool = False
) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH, lse_BTN) of `read_few`: each query becomes a row of a batch of one-query reads."""
    B, T, N, H = q_BTNH.shape
    slot = slots_in(page_BKTX, size, store.capacity)
    k, v = (fold(x.reshape(*slot.shape, H)) for x in rows_at(store, flat(slot), size))
    order = fold(orders_at(store.order_BKC, slot))
    if unrotated:
        k = here.rotate(k, jnp.maximum(order, 0), inverse=True)
    lo, hi = here.lo(ask.order_BT).reshape(-1, 1), ask.hi_BT.reshape(-1, 1)
    seen = visible(order, lo, hi)[:, :, None]
    p, lse = softmax(scores(q_BTNH.reshape(B * T, 1, N, H), k, here.cfg.scale, here.cfg.softcap), seen)
    return combine(p, v).reshape(B, T, N, H), lse.reshape(B, T, N)
