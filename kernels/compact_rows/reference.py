"""compact_rows in plain jax.numpy: the definition every other implementation is tested against."""

import jax.numpy as jnp


def run(k_BKCH, v_BKCH, k_BKWH, v_BKWH, from_BKM, to_BKM):
    """For every slot, look for a pair that goes there. Same contract as the public op."""
    C = k_BKCH.shape[2]
    real_BKM = (from_BKM >= 0) & (to_BKM >= 0)
    goes_BKCM = (jnp.arange(C)[:, None] == to_BKM[:, :, None]) & real_BKM[:, :, None]
    from_BKC1 = jnp.take_along_axis(from_BKM, jnp.argmax(goes_BKCM, -1), -1)[..., None]
    comes_BKC1 = goes_BKCM.any(-1)[..., None]

    def moved(x_BKCH, source_BKXH):
        there = jnp.take_along_axis(source_BKXH, jnp.where(comes_BKC1, from_BKC1, 0), 2)
        return jnp.where(comes_BKC1, there, x_BKCH)

    return moved(k_BKCH, k_BKCH if k_BKWH is None else k_BKWH), moved(v_BKCH, v_BKCH if v_BKWH is None else v_BKWH)
