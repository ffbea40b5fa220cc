"""lowrank_scores in plain float32 jax.numpy: the definition every other implementation is tested against."""

import jax.numpy as jnp

from tokeff.kernels.lowrank_scores.rotation import turn


def run(q_BTNH, low_BSY, basis_BYKH, angle_BS, page_BKTM, freq_h, *, gain, page_size, scale):
    """Rebuild every key, rotate it, score it, take the rows of the pages. Same contract as the public op."""
    (B, T, N, H), K = q_BTNH.shape, basis_BYKH.shape[2]
    k_BKSH = jnp.einsum("bsy,bykh->bksh", low_BSY.astype(jnp.float32), basis_BYKH.astype(jnp.float32), precision="highest")
    k_BKSH = turn(k_BKSH, angle_BS[:, None, :, None].astype(jnp.float32) * freq_h, gain)
    q_BKTGH = q_BTNH.astype(jnp.float32).reshape(B, T, K, N // K, H).swapaxes(1, 2)
    score_BKTGS = jnp.einsum("bktgh,bksh->bktgs", q_BKTGH, k_BKSH, precision="highest") * scale
    row_BKTX = (page_BKTM[..., None] * page_size + jnp.arange(page_size)).reshape(B, K, T, 1, -1)
    score_BKTGX = jnp.take_along_axis(score_BKTGS, jnp.maximum(row_BKTX, 0), -1)
    return jnp.where(row_BKTX >= 0, score_BKTGX, -jnp.inf)
