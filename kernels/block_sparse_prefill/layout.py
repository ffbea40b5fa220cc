"""How both kernels lay out a call: queries by their blocks, chosen blocks as lists, and the orders of what is read."""

import jax.numpy as jnp

from tokeff.kernels.blocks import listed
from tokeff.kernels.decode_attention.xla import take
from tokeff.kernels.rows import NOTHING, head_rows, round_up, token_rows, tokens


def query_blocks(q_BTNH, lo_BT, hi_BT, K, Q, size, multiple):
    """Return (q_BKQRH, (lo_BQR, hi_BQR)): the rows of each block of queries, R = size * G padded to a multiple by rows that see nothing."""
    (B, T, N, H) = q_BTNH.shape
    G = N // K
    R, short = round_up(size * G, multiple), Q * size - T
    q_BTNH = jnp.pad(q_BTNH, [(0, 0), (0, short), (0, 0), (0, 0)])
    q_BKQRH = head_rows(q_BTNH, K, Q * size * G).reshape(B, K, Q, size * G, H)
    q_BKQRH = jnp.pad(q_BKQRH, [(0, 0)] * 3 + [(0, R - size * G), (0, 0)])

    def bound(x_BT, fill):
        x_BQR = token_rows(x_BT, G, Q * size * G, fill).reshape(B, Q, size * G)
        return jnp.pad(x_BQR, [(0, 0), (0, 0), (0, R - size * G)], constant_values=fill)

    return q_BKQRH, (bound(lo_BT, 0), bound(hi_BT, NOTHING))


def query_tokens(x_BKQRx, T, N, size):
    """Undo `query_blocks`: (B, K, Q, R, ...) -> (B, T, N, ...)."""
    B, K, Q, _, *rest = x_BKQRx.shape
    return tokens(x_BKQRx[:, :, :, : size * N // K].reshape(B, K, Q * size * (N // K), *rest), T, N)


def chosen(block_BKQM, order_BKC, size):
    """Return (count_BKQ, block_BKQM, order_BKQX): lists of blocks as `listed` makes them, and the orders of their rows."""
    count_BKQ, block_BKQM = listed(block_BKQM)
    (B, K, Q, M), C = block_BKQM.shape, order_BKC.shape[2]
    slot_BKQX = (block_BKQM[..., None] * size + jnp.arange(size)).reshape(B, K, Q * M * size)
    order_BKQX = take(order_BKC, slot_BKQX).reshape(B, K, Q, M * size)
    there_BKQX = (jnp.arange(M * size) < count_BKQ[..., None] * size) & (slot_BKQX.reshape(B, K, Q, -1) < C)
    return count_BKQ, block_BKQM, jnp.where(there_BKQX, order_BKQX, -1)


def rows_beside(order_BKC, block_BKQM, row_BKM, size):
    """Return the orders of the single rows as each block of queries sees them, (B, K, Q, rows): -1 for one whose block it reads."""
    inside_BKQM = (row_BKM[:, :, None, :, None] // size == block_BKQM[:, :, :, None]).any(-1)
    return jnp.where(inside_BKQM | (row_BKM < 0)[:, :, None], -1, take(order_BKC, row_BKM)[:, :, None])
