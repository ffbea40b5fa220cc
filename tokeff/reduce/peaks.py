"""Density peaks: rows that can stand for those around them, as centres of clusters."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tokeff.models.attention import NEG


def density_peaks(x_PD: jax.Array, there_P: jax.Array, k: jax.Array | int, near: int) -> tuple[jax.Array, jax.Array]:
    """(score_P, distance_PP) of the rows that are there as centres (Du et al. 2016); -inf for the others and for rows that are no numbers.

    Distance is Euclidean over sqrt D, 0 where rows differ by less than rounding. A row's density is exp(- the mean square distance to its
    k <= near nearest, itself included); its score is that times the distance to the nearest denser row, or the largest distance where there
    is none. Both are compared as logarithms: exp is 0 in float32 where rows are ten apart. Released codes break ties by noise; here of
    equally dense rows the earlier is denser, so twins are one centre.
    """
    there_P = there_P & jnp.isfinite(x_PD).all(axis=1)
    P, x = len(x_PD), jnp.where(there_P[:, None], x_PD, 0).astype(jnp.float32)
    x = jnp.where(there_P[:, None], x - x.sum(axis=0) / jnp.maximum(there_P.sum(), 1), 0)  # differences of long products round worse
    length_P, products_PP = (x * x).sum(axis=1), jnp.einsum("pd,ed->pe", x, x, precision="highest")
    both_PP = length_P[:, None] + length_P
    square_PP = both_PP - 2 * products_PP
    square_PP = jnp.where((square_PP < 1e-6 * both_PP) | jnp.eye(P, dtype=bool), 0, square_PP) / x.shape[1]
    pair = there_P[:, None] & there_P
    d_PP = jnp.where(pair, jnp.sqrt(square_PP), jnp.inf)
    nearest = jnp.sort(jnp.where(pair, square_PP, jnp.inf), axis=1)[:, :near]
    nearest = jnp.where((jnp.arange(nearest.shape[1]) < k) & jnp.isfinite(nearest), nearest, 0)
    dense_P = -nearest.sum(axis=1) / jnp.maximum(jnp.minimum(k, there_P.sum()), 1)
    denser_PP = (dense_P > dense_P[:, None]) | ((dense_P == dense_P[:, None]) & (jnp.arange(P) < jnp.arange(P)[:, None]))
    far = jnp.where(pair, d_PP, 0).max()
    apart_P = jnp.where(denser_PP & pair, d_PP, far).min(axis=1)
    score_P = jnp.where(apart_P > 0, jnp.log(jnp.where(apart_P > 0, apart_P, 1)) + dense_P, NEG)
    return jnp.where(there_P, score_P, -jnp.inf), d_PP
