"""lowrank_scores in jax.numpy that XLA compiles well on any platform: gather, two products, with the rotation between them."""

import jax
import jax.numpy as jnp

from tokeff.kernels.attend import exact, scores, wide
from tokeff.kernels.lowrank_scores.rotation import turn


def run(q_BTNH, low_BSY, basis_BYKH, angle_BS, page_BKTM, freq_h, *, gain, page_size, scale, clean=False):
    """Same contract as the public op. clean: empty the rows that stand for page -1, as gradients need (0 * NaN is NaN)."""
    (B, T, N, H), (K, M) = q_BTNH.shape, page_BKTM.shape[1::2]
    X = M * page_size
    low_BKTXY, angle_BKTX = take_rows(low_BSY, page_BKTM, page_size), take_rows(angle_BS, page_BKTM, page_size)
    if clean:
        low_BKTXY = jnp.where(jnp.repeat(page_BKTM >= 0, page_size, -1)[..., None], low_BKTXY, 0)
    low_BKXY = low_BKTXY.reshape(B, K, T * X, -1)
    k_BKXH = jnp.einsum("bkmy,bykh->bkmh", low_BKXY, basis_BYKH, precision=exact(low_BKXY, basis_BYKH))
    theta_BKXh = angle_BKTX.reshape(B, K, T * X, 1).astype(wide(k_BKXH.dtype)) * freq_h
    k_BKXH = turn(k_BKXH, theta_BKXh, gain)
    # Each query becomes a sequence of its own: it scores its rows and no others.
    k_LKXH = jnp.moveaxis(k_BKXH.reshape(B, K, T, X, H), 2, 1).reshape(B * T, K, X, H)
    score_LKG1X = scores(q_BTNH.reshape(B * T, 1, N, H), k_LKXH, scale, 0.0)
    score_BKTGX = jnp.moveaxis(score_LKG1X.reshape(B, T, K, N // K, X), 1, 2)
    return hide(score_BKTGX, page_BKTM, page_size)


def take_rows(x_BSx, page_BKTM, page_size):
    """Gather the rows of pages: (B, S, ...) -> (B, K, T, X, ...), anything for page -1."""
    row_BKTX = (page_BKTM[..., None] * page_size + jnp.arange(page_size)).reshape(*page_BKTM.shape[:3], -1)
    return jax.vmap(lambda x, row: x.at[row].get(mode="clip"))(x_BSx, jnp.maximum(row_BKTX, 0))


def hide(score_BKTGX, page_BKTM, page_size):
    """Return float32 scores, -inf for rows of page -1."""
    real_BKT1X = jnp.repeat(page_BKTM >= 0, page_size, -1)[:, :, :, None]
    return jnp.where(real_BKT1X, score_BKTGX, -jnp.inf).astype(jnp.float32)
