"""Which blocks of stored rows a kernel walks over: lists in ascending order, made by XLA before the kernel starts."""

import jax.numpy as jnp

from tokeff.kernels.attend import sees
from tokeff.kernels.rows import NOTHING

FAR = 2**30  # above every order and every block


def seen_blocks(order_BXC, lo_BR, hi_BR, rows, slots, sinks=0):
    """Name the blocks of `slots` stored rows that some query of a block of `rows` may see: (B, X, R / rows, C / slots), -1 for others.

    X is 1 or K, C a multiple of slots. The bounds of a block are those of all its queries together, so a block that is left out
    is seen by none, while one that is named may still be, where the intervals of its queries leave gaps.
    """
    B, X, C = order_BXC.shape
    some_BR = (lo_BR <= hi_BR) & (hi_BR >= 0)
    lo_BI = jnp.where(some_BR, lo_BR, FAR).reshape(B, -1, rows).min(-1)
    hi_BI = jnp.where(some_BR, hi_BR, NOTHING).reshape(B, -1, rows).max(-1)
    lo_B1I1, hi_B1I1 = lo_BI[:, None, :, None], hi_BI[:, None, :, None]
    live_BXIJ = sees(order_BXC[:, :, None], lo_B1I1, hi_B1I1, sinks).reshape(B, X, lo_BI.shape[1], C // slots, slots).any(-1)
    return jnp.where(live_BXIJ, jnp.arange(C // slots, dtype=jnp.int32), -1)


def listed(block_xM):
    """Return (count_x, block_xM): blocks in ascending order, those of -1 replaced by the last.

    A kernel that steps over all M places and works only in the first `count` then fetches nothing in the others: an operand that
    stays where it is is not read again.
    """
    count_x = (block_xM >= 0).sum(-1, dtype=jnp.int32)
    ascending_xM = jnp.sort(jnp.where(block_xM >= 0, block_xM, FAR), -1)
    last_x1 = jnp.where(block_xM >= 0, block_xM, 0).max(-1, keepdims=True)
    return count_x, jnp.where(jnp.arange(block_xM.shape[-1]) < count_x[..., None], ascending_xM, last_x1).astype(jnp.int32)
