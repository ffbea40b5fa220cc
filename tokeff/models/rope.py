"""Rotary position embedding (Su et al. 2021, RoFormer) with the scalings the supported families use, and its inverse."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.kernels.lowrank_scores.rotation import turn
from tokeff.models.attention import wide
from tokeff.models.config import Rope


def frequencies(rope: Rope, H: int) -> np.ndarray:
    """(H/2,) float32 angular frequencies in radians per position."""
    freq = rope.base ** (-np.arange(0, H, 2, dtype=np.float64) / H)
    if rope.kind == "linear":
        freq = freq / rope.factor
    elif rope.kind == "llama3":
        turns = freq * rope.original_len / (2 * math.pi)  # rotations within the original context
        blend = np.clip((turns - rope.low) / (rope.high - rope.low), 0, 1)
        freq = freq * (blend + (1 - blend) / rope.factor)
    elif rope.kind == "yarn":
        freq = _yarn(freq, rope, H)
    elif rope.kind != "none":
        raise ValueError(f"unknown rope scaling {rope.kind!r}; use none, linear, llama3 or yarn")
    return freq.astype(np.float32)


def _yarn(freq: np.ndarray, rope: Rope, H: int) -> np.ndarray:
    """Peng et al. 2023, eq. 23: interpolate slow dimensions, keep fast ones, a linear ramp over the index between."""

    def index(rotations: float) -> float:
        return H * math.log(rope.original_len / (rotations * 2 * math.pi)) / (2 * math.log(rope.base))

    low, high = max(math.floor(index(rope.beta_fast)), 0), min(math.ceil(index(rope.beta_slow)), H - 1)
    ramp = np.clip((np.arange(H // 2) - low) / max(high - low, 1e-3), 0, 1)
    return freq / rope.factor * ramp + freq * (1 - ramp)


def rotate(x: jax.Array, angle: jax.Array, rope: Rope, *, inverse: bool = False) -> jax.Array:
    """Rotate the last axis (H) of `x` by `angle`, which has x's axes without the last one (or broadcasts to them).

    Halves are paired (rotate-half). `inverse=True` undoes it exactly up to rounding, which is how a policy that needs raw
    keys gets them back from a shared dense prefill. Computed in float32 (float64 for float64), returned in x's dtype.
    """
    freq = jnp.asarray(frequencies(rope, x.shape[-1]))
    theta = angle[..., None].astype(wide(x.dtype)) * freq
    return turn(x, theta, 1 / rope.attention_factor if inverse else rope.attention_factor, inverse=inverse)
