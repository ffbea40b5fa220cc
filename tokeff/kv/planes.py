"""Keys in two planes of bits: what every query reads, and what is read as well by a head that finds nothing in particular.

A key is a code of `high + low` bits for each number. Scores are made from the high bits alone. Where the softmax of a query has no clear
winner their errors matter, and the low bits add what they say; only these are read then, since the products with the high bits are there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from tokeff.compat import context_mesh, shard_map
from tokeff.errors import UserError
from tokeff.kernels.attend import group_rows
from tokeff.kernels.quant_decode.codes import dequantise, pack_bits, unpack_bits
from tokeff.kv.cache import per_head
from tokeff.kv.quant import affine, check_bits
from tokeff.models.attention import wide
from tokeff.sharding import spec


class Planes(struct.PyTreeNode):
    """The codes of C rows, packed: their high bits and their low bits; Q groups of a row have a zero and a step each."""

    high_BKCZ: jax.Array
    low_BKCZ: jax.Array
    zero_BKCQ: jax.Array
    step_BKCQ: jax.Array


@dataclass(frozen=True)
class Split:
    """How keys are written: each number as the nearest of 2**(high + low) equal steps over the range of its `group` of channels of a row.

    tau: a query whose largest attention probability, by the high bits, is below it makes its scores with the low bits too. 0 never reads
    them, anything above 1 always does. Until then a number stands in the middle of what its low bits leave open.
    """

    high: int = 8
    low: int = 4
    group: int = 32
    tau: float = 0.1

    def check(self, cfg) -> None:
        """Raise UserError where such keys cannot be written, or tau is none."""
        check_bits(self.high, cfg.H)
        check_bits(self.low, cfg.H)
        if self.group < 1 or cfg.H % min(self.group, cfg.H):
            raise UserError(f"groups of {self.group} do not divide rows of {cfg.H} numbers; give a group that does")
        if not self.tau >= 0:
            raise UserError(f"tau={self.tau} is no probability; give one from 0 on, 0.0 never reads the low bits, 2.0 always does")

    @property
    def middle(self) -> float:
        """Of the codes that the low bits can be."""
        return (2**self.low - 1) / 2

    def encode(self, x_BKTH: jax.Array) -> Planes:
        *rows, H = x_BKTH.shape
        Q = H // min(self.group, H)
        code, zero, step = affine(x_BKTH.reshape(*rows, Q, H // Q), self.high + self.low, -1)
        code = code.reshape(x_BKTH.shape).astype(jnp.int32)
        high, low = code >> self.low, code & (2**self.low - 1)
        return Planes(pack_bits(high, self.high), pack_bits(low, self.low), zero[..., 0], step[..., 0])

    def upper(self, q_BTNH: jax.Array, keys: Planes, scale: float) -> jax.Array:
        """float32 product_BKGTC of scaled queries with keys as the high bits give them."""
        (B, T, N, _), K = q_BTNH.shape, keys.high_BKCZ.shape[1]
        zero, step = (x.astype(wide(x.dtype)) for x in (keys.zero_BKCQ, keys.step_BKCQ))
        q = group_rows(q_BTNH.astype(zero.dtype) * scale, K)
        middle = {"zero_BKCQ": zero + step * self.middle, "step_BKCQ": step * 2**self.low}
        given = {"q_BKRH": q, "high_BKCZ": keys.high_BKCZ, **middle}
        return by_device(partial(products, bits=self.high), given).reshape(B, K, N // K, T, -1)

    def both(self, q_BTNH: jax.Array, keys: Planes, scale: float, product_BKGTC: jax.Array, asks_BKGT: jax.Array) -> jax.Array:
        """product_BKGTC where the queries that ask have theirs by all bits. A kv head none of whose queries asks is not read.

        The heads of which some do are taken one after the other, in a loop as long as they are many: what is left out is really left
        out, whichever sequence and head it is of. On a mesh each device goes through its own.
        """
        B, K, G, T, C = product_BKGTC.shape
        q = group_rows(q_BTNH.astype(product_BKGTC.dtype) * scale, K)
        given = {
            "product_BKRC": product_BKGTC.reshape(B, K, G * T, C), "q_BKRH": q, "asks_BKR": asks_BKGT.reshape(B, K, G * T),
            "low_BKCZ": keys.low_BKCZ, "step_BKCQ": keys.step_BKCQ,
        }  # fmt: skip
        return by_device(partial(added, bits=self.low), given).reshape(product_BKGTC.shape)


def by_device(f, given: dict[str, jax.Array]) -> jax.Array:
    """f of arrays named by their letters, each device with its own sequences and heads. The result lies as the first of them."""
    on = context_mesh()
    if on is None or on.size == 1:
        return f(*given.values())
    layouts = tuple(spec(name, x.shape, on) for name, x in given.items())
    return shard_map(f, on, layouts, layouts[0])(*given.values())


def products(q_BKRH: jax.Array, code_BKCZ: jax.Array, zero_BKCQ: jax.Array, step_BKCQ: jax.Array, bits: int) -> jax.Array:
    """product_BKRC of queries with keys in code. On a CPU head by head: one head's keys, written out, fit its cache (ten times as fast)."""

    def one(given):
        q_RH, code_CZ, zero_CQ, step_CQ = given
        return jnp.dot(q_RH, dequantise(code_CZ, zero_CQ, step_CQ, bits).T, precision="highest")

    def in_turn(*given):
        found = jax.lax.map(one, [x.reshape(-1, *x.shape[2:]) for x in given])
        return found.reshape(*given[0].shape[:2], *found.shape[1:])

    def at_once(*given):
        return per_head(lambda *x: one(x))(*given)

    return jax.lax.platform_dependent(q_BKRH, code_BKCZ, zero_BKCQ, step_BKCQ, cpu=in_turn, default=at_once)


def added(product_BKRC: jax.Array, q_BKRH: jax.Array, asks_BKR: jax.Array, low_BKCZ: jax.Array, step_BKCQ: jax.Array, bits: int):
    """product_BKRC with what low bits add, in the rows that ask, head by head."""
    K, wanted = asks_BKR.shape[1], asks_BKR.any(axis=2).reshape(-1)
    first = jnp.argsort(~wanted, stable=True)

    def one(i, product):
        b, k = first[i] // K, first[i] % K

        def of(x):
            return jax.lax.dynamic_slice(x, (b, k, *(0,) * (x.ndim - 2)), (1, 1, *x.shape[2:]))[0, 0]

        code, step = unpack_bits(of(low_BKCZ), bits).astype(product.dtype), of(step_BKCQ).astype(product.dtype)
        C, Q = step.shape
        rest_CH = ((code - (2**bits - 1) / 2).reshape(C, Q, -1) * step[..., None]).reshape(C, -1)
        more_RC = jnp.dot(of(q_BKRH), rest_CH.T, precision="highest")
        now_RC = of(product) + jnp.where(of(asks_BKR)[:, None], more_RC, 0)
        return jax.lax.dynamic_update_slice(product, now_RC[None, None], (b, k, 0, 0))

    return jax.lax.fori_loop(0, wanted.sum(), one, product_BKRC)
