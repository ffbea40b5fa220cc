"""block_sparse_prefill in jax.numpy that XLA compiles well on any platform: gather what a block of queries reads, attend to that.

Blocks of queries run one after the other, so one gathered copy is alive at a time. Early ones have few blocks before them: with
`first`, segments of query blocks gather only as many as can be there.
"""

import jax
import jax.numpy as jnp

from tokeff.kernels.attend import NEG, combine, scores, sees
from tokeff.kernels.decode_attention.xla import take

SEGMENT = 8  # query blocks that gather equally many key blocks


def run(
    q_BTNH, k_BKCH, v_BKCH, order_BKC, lo_BT, hi_BT, block_BKQM, row_BKM=None, *, size, scale, softcap, first, finite, clean=False
):  # fmt: skip
    """Same contract as the public op. clean: as gradients need it: unseen rows emptied, and probabilities made again, not kept."""
    rows = q_BTNH, k_BKCH, v_BKCH, order_BKC, lo_BT, hi_BT
    return read(*rows, block_BKQM, row_BKM, size=size, scale=scale, softcap=softcap, first=first, finite=finite and not clean, again=clean)


def read(
    q_BTNH, k_BKCH, v_BKCH, order_BKC, lo_BT, hi_BT, block_BKQM, row_BKM, *,
    size, scale, softcap, first, finite, again=False, own_BT=None, rule=None,
):  # fmt: skip
    """`run`, where a rule may hide more: rule(own_BK?T1, order_BK1M) -> which rows queries of these orders see of those read."""
    T = q_BTNH.shape[1]
    k, v, order = pad(k_BKCH, size, 2), pad(v_BKCH, size, 2), pad(order_BKC, size, 2, -1)
    asked = pad(q_BTNH, size, 1), pad(lo_BT, size, 1), pad(hi_BT, size, 1, -1), pad(hi_BT if own_BT is None else own_BT, size, 1, -1)
    asked = tuple(jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0) for x in asked)
    block_QBKM = jnp.moveaxis(block_BKQM, 2, 0)

    def one(part):
        return _one_block(part, (k, v, order), row_BKM, size, scale, softcap, finite, rule)

    one = jax.checkpoint(one) if again else one
    parts, (Q, *_, M) = [], block_QBKM.shape
    for a in range(0, Q, Q if first is None else SEGMENT):
        most = M if first is None else min(M, first // size + min(a + SEGMENT, Q))
        b = Q if first is None else a + SEGMENT
        parts.append(jax.lax.map(one, jax.tree.map(lambda x, a=a, b=b: x[a:b], (*asked, block_QBKM[..., :most]))))
    out, lse = (jnp.moveaxis(jnp.concatenate(x), 0, 1) for x in zip(*parts, strict=True))
    return tuple(x.reshape(x.shape[0], -1, *x.shape[3:])[:, :T] for x in (out, lse))


def pad(x, size, axis, fill=0):
    """Pad one axis to a multiple of size."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % size)
    return jnp.pad(x, widths, constant_values=fill)


def chosen_slots(block_BKM, row_BKM, size):
    """Return (slot_BKX, real_BKX): the slots of blocks and then of rows; not real where there is no block, or the row's is read anyway.

    Where nothing is real stands a slot of a block that is read, so that a gather touches nothing else.
    """
    (B, K, M) = block_BKM.shape
    any_BK1 = jnp.maximum(block_BKM.max(axis=-1, keepdims=True), 0)
    slot_BKX = (jnp.where(block_BKM < 0, any_BK1, block_BKM)[..., None] * size + jnp.arange(size)).reshape(B, K, M * size)
    real_BKX = jnp.repeat(block_BKM >= 0, size, axis=-1)
    if row_BKM is None:
        return slot_BKX, real_BKX
    inside = (row_BKM[..., None] // size == block_BKM[:, :, None]).any(axis=-1)
    slot_BKX = jnp.concatenate([slot_BKX, jnp.where(row_BKM < 0, any_BK1 * size, row_BKM)], axis=-1)
    return slot_BKX, jnp.concatenate([real_BKX, (row_BKM >= 0) & ~inside], axis=-1)


def _one_block(asked, stored, row_BKM, size, scale, softcap, finite, rule):
    """Return (out_BTNH, lse_BTN) of one block of queries."""
    (q_BTNH, lo_BT, hi_BT, own_BT, block_BKM), (k_BKCH, v_BKCH, order_BKC) = asked, stored
    slot_BKX, real_BKX = chosen_slots(block_BKM, row_BKM, size)
    k, v = take(k_BKCH, slot_BKX), take(v_BKCH, slot_BKX)
    order = jnp.where(real_BKX, jnp.take_along_axis(order_BKC, slot_BKX, axis=2, mode="clip"), -1)[:, :, None]
    seen = sees(order, lo_BT[:, None, :, None], hi_BT[:, None, :, None])
    seen = seen if rule is None else seen & rule(own_BT[:, None, :, None], order)
    if not finite:  # 0 * NaN is NaN
        seen_BKX1 = seen.any(axis=2)[..., None]
        k, v = jnp.where(seen_BKX1, k, 0), jnp.where(seen_BKX1, v, 0)
    seen = seen[:, :, None]
    logits = jnp.where(seen, scores(q_BTNH, k, scale, softcap), NEG)
    top = logits.max(axis=-1, keepdims=True)
    e = jnp.where(seen, jnp.exp(logits - top), 0.0)
    total = e.sum(axis=-1, keepdims=True)
    out = combine(e / jnp.maximum(total, 1e-37), v)
    lse = jnp.where(total > 0, top + jnp.log(jnp.maximum(total, 1e-37)), -jnp.inf)[..., 0]
    return out, jnp.moveaxis(lse, 3, 1).reshape(*q_BTNH.shape[:3])
