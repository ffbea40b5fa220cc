"""compact_rows in jax.numpy that XLA compiles well on any platform.

A gather of the M rows, then a scatter with unique indices, written for one head and mapped: XLA updates a cache that is given away in
place, and partitions both over B and K with no collective.
"""

import jax
import jax.numpy as jnp


def run(k_BKCH, v_BKCH, k_BKWH, v_BKWH, from_BKM, to_BKM, *, clean=False):
    """Same contract as the public op. clean: nothing to do, a row that moves nowhere has no part in the result."""
    C, M = k_BKCH.shape[2], from_BKM.shape[2]
    real_BKM = (from_BKM >= 0) & (to_BKM >= 0)
    to_BKM = jnp.where(real_BKM, to_BKM, C + jnp.arange(M))  # out of range is dropped; distinct, as promised

    def move(x_CH, source_XH, from_M, to_M):
        rows_MH = source_XH.at[jnp.maximum(from_M, 0)].get(mode="clip")
        return x_CH.at[to_M].set(rows_MH, mode="drop", unique_indices=True)

    def each_head(x_BKCH, source_BKXH):
        return jax.vmap(jax.vmap(move))(x_BKCH, x_BKCH if source_BKXH is None else source_BKXH, from_BKM, to_BKM)

    return each_head(k_BKCH, k_BKWH), each_head(v_BKCH, v_BKWH)
