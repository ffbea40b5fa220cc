"""shared_prefix for TPU (Mosaic): decode_attention's kernel over blocks of a group's queries.

That kernel keeps R = T * G query rows of a kv head in VMEM while K and V pass by once. A group has more: its queries go in blocks of as
many as fill the MXU and leave room for their scores, and K and V pass by once a block.

HBM bytes: 2 * C * H * itemsize for each (J, K) and block of ROWS rows, where each sequence by itself would read that much.
"""

from functools import partial

import jax

from tokeff.kernels.decode_attention import pallas_tpu
from tokeff.kernels.decode_attention.xla import map_rows

ROWS = 256  # query rows a block: scores of 1024 slots for them take 1 MiB


def refusal(q_JTNH, k_JKCH, v_JKCH, order_JKC, lo_JT, hi_JT, **options):
    """Return in one line why this kernel cannot take the call, or None."""
    q, lo, hi = (first_block(x, tokens_of_block(q_JTNH, k_JKCH, ROWS)) for x in (q_JTNH, lo_JT, hi_JT))
    return pallas_tpu.refusal(q, k_JKCH, v_JKCH, order_JKC, lo, hi, page_size=1, **options)


def run(q_JTNH, k_JKCH, v_JKCH, order_JKC, lo_JT, hi_JT, *, interpret=False, **options):
    """Same contract as the public op, for calls that `refusal` accepts. interpret: as of `pl.pallas_call`."""
    attend = partial(pallas_tpu.run, page_size=1, interpret=interpret, **options)
    return in_blocks(attend, ROWS, q_JTNH, k_JKCH, v_JKCH, order_JKC, lo_JT, hi_JT)


def in_blocks(attend, rows, q_JTNH, k_JKCH, v_JKCH, order_JKC, lo_JT, hi_JT):
    """Attend at most so many query rows a kv head at a time."""

    def block(asked):
        q, lo, hi = asked
        return attend(q, k_JKCH, v_JKCH, order_JKC, lo, hi)

    return map_rows(block, (q_JTNH, lo_JT, hi_JT), tokens_of_block(q_JTNH, k_JKCH, rows))


def tokens_of_block(q_JTNH, k_JKCH, rows):
    """Return how many queries of a group go together."""
    T, N = q_JTNH.shape[1:3]
    return min(T, max(1, rows * k_JKCH.shape[1] // N))


def first_block(x_JTx, rows):
    """Return the shape of the first block of so many queries."""
    return jax.ShapeDtypeStruct((x_JTx.shape[0], rows, *x_JTx.shape[2:]), x_JTx.dtype)
