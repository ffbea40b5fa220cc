"""Quantised numbers as bytes: x ~ zero + step * code, codes of `bits` bits packed for real. What coders write and kernels read."""

from functools import reduce

import jax
import jax.numpy as jnp


def pack_bits(code: jax.Array, bits: int) -> jax.Array:
    """(..., H) whole numbers below 2**bits as (..., H * bits / 8) bytes. A byte holds numbers a fraction of H apart, so that unpacking
    is shifts and one concatenation."""
    parts = jnp.split(code.astype(jnp.uint8), 8 // bits, axis=-1)
    return reduce(jnp.bitwise_or, (part << (bits * i) for i, part in enumerate(parts)))


def unpack_bits(byte: jax.Array, bits: int) -> jax.Array:
    """The inverse of `pack_bits`."""
    return jnp.concatenate([(byte >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)], axis=-1)


def dequantise(code_BKPRZ: jax.Array, zero_BKPRQ: jax.Array, step_BKPRQ: jax.Array, bits: int) -> jax.Array:
    """x_BKPRH of pages of R rows, in the dtype of zero and step.

    Q groups divide the H numbers of a row in order. zero and step have R rows, or one row for all rows of the page: Q = H and one row
    is a zero and step a channel (KIVI's keys), R rows and Q = H / 32 one for every 32 numbers of a row (KIVI's values).
    """
    number_BKPRH = unpack_bits(code_BKPRZ, bits)
    *rows, H = number_BKPRH.shape
    Q = zero_BKPRQ.shape[-1]
    grouped = number_BKPRH.reshape(*rows, Q, H // Q)
    return (zero_BKPRQ[..., None] + step_BKPRQ[..., None] * grouped).reshape(number_BKPRH.shape)
