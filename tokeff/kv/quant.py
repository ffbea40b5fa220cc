"""Coders: rows of keys or values as a few bits each, page by page. `Coded` (kv/coded.py) is the policy that keeps rows this way.

Numbers are quantised in groups to `bits` bits with a zero point and a step, x ~ zero + step * code, and the codes are packed into
bytes for real. Zero and step are kept in the dtype of the cache, as the papers do beside a float16 cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from tokeff.errors import UserError
from tokeff.kernels.quant_decode.codes import dequantise, pack_bits
from tokeff.models.attention import wide


@dataclass(frozen=True)
class Coder:
    """How rows are written down: x_BKPRH, P pages of R rows a head, to any pytree whose axes begin with BKP, and back."""

    def check(self, cfg, page: int) -> None:
        """Raise UserError when rows of this model cannot be coded in pages of so many."""

    def encode(self, x_BKPRH: jax.Array, prompt: bool) -> Any:
        """The code of these pages. prompt: they are a whole prompt (a shorter one ends in pages of zeros), else pages by themselves."""
        raise NotImplementedError

    def decode(self, code: Any) -> jax.Array:
        """x_BKPRH, as near as the code says."""
        raise NotImplementedError


class Whole(struct.PyTreeNode):
    """Rows as they are."""

    row_BKPRH: jax.Array


@dataclass(frozen=True)
class Exact(Coder):
    """Rows written down as they are."""

    def encode(self, x_BKPRH: jax.Array, prompt: bool) -> Whole:
        return Whole(x_BKPRH)

    def decode(self, code: Whole) -> jax.Array:
        return code.row_BKPRH


class Quantised(struct.PyTreeNode):
    """Codes of H numbers in Z bytes a row; Q groups have a zero and a step each: a group is a row's part or a page's channel."""

    code_BKPRZ: jax.Array
    zero_BKPRQ: jax.Array
    step_BKPRQ: jax.Array


def affine(x: jax.Array, bits: int, axis: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(code, zero, step) with one zero and step for all numbers along `axis`: the range cut into 2**bits - 1 equal steps."""
    wider = x.astype(wide(x.dtype))
    low, high = wider.min(axis=axis, keepdims=True), wider.max(axis=axis, keepdims=True)
    step = ((high - low) / (2**bits - 1)).astype(x.dtype)
    code = jnp.round((wider - low) / jnp.where(step > 0, step, 1))
    return jnp.clip(code, 0, 2**bits - 1), low.astype(x.dtype), step


def check_bits(bits: int, H: int) -> None:
    """Refuse numbers of bits that do not fill bytes."""
    if bits not in (2, 4, 8):
        raise UserError(f"{bits} bits do not divide a byte; use 2, 4 or 8")
    if H * bits % 8:
        raise UserError(f"{H} numbers of {bits} bits do not fill bytes; use 4 or 8 bits")


@dataclass(frozen=True)
class ByChannel(Coder):
    """One zero and step for each channel of a page: a few channels of keys are far larger than the others, in every row
    (Liu et al. 2024, KIVI, sec. 3.2)."""

    bits: int = 2

    def check(self, cfg, page: int) -> None:
        check_bits(self.bits, cfg.H)

    def encode(self, x_BKPRH: jax.Array, prompt: bool) -> Quantised:
        code, zero, step = affine(x_BKPRH, self.bits, 3)
        return Quantised(pack_bits(code, self.bits), zero, step)

    def decode(self, code: Quantised) -> jax.Array:
        return dequantise(code.code_BKPRZ, code.zero_BKPRQ, code.step_BKPRQ, self.bits)


@dataclass(frozen=True)
class ByToken(Coder):
    """One zero and step for every `group` channels of a row, or for the whole row where it is shorter: values have no large
    channels, and a row's error stays its own (Liu et al. 2024, KIVI, sec. 3.2)."""

    bits: int = 2
    group: int = 32

    def check(self, cfg, page: int) -> None:
        check_bits(self.bits, cfg.H)
        if self.group < 1 or cfg.H % min(self.group, cfg.H):
            raise UserError(f"groups of {self.group} do not divide rows of {cfg.H} numbers; give a group that does")

    def encode(self, x_BKPRH: jax.Array, prompt: bool) -> Quantised:
        *rows, H = x_BKPRH.shape
        Q = H // min(self.group, H)
        code, zero, step = affine(x_BKPRH.reshape(*rows, Q, H // Q), self.bits, -1)
        return Quantised(pack_bits(code.reshape(x_BKPRH.shape), self.bits), zero[..., 0], step[..., 0])

    def decode(self, code: Quantised) -> jax.Array:
        return dequantise(code.code_BKPRZ, code.zero_BKPRQ, code.step_BKPRQ, self.bits)
