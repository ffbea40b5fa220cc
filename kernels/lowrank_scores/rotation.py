"""Rotary embedding from its frequencies (Su et al. 2021, RoFormer): halves of a vector are paired."""

import jax
import jax.numpy as jnp


def turn(x: jax.Array, theta: jax.Array, gain: float = 1.0, *, inverse: bool = False) -> jax.Array:
    """x (..., H) turned by theta (..., H / 2), in theta's dtype, and made `gain` times as long; the other way round with `inverse`."""
    cos, sin = jnp.cos(theta) * gain, jnp.sin(theta) * (-gain if inverse else gain)
    a, b = jnp.split(x.astype(theta.dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
