"""block_sparse_prefill for NVIDIA GPUs (Triton): a program owns rows of one block of queries and gathers what was chosen for it.

Grid (B, K, Q * tiles). A program holds some of the R = size * G query rows of a block of queries and kv head in registers and walks
over a list of slots: the single rows first, then the rows of the chosen blocks. It ends with the last block there is. Loads of K and V
are masked by what some row sees, so what was not chosen, is empty or stands twice is not read. Where rows are promised to be finite no
load waits for that.

HBM bytes for each (B, K) and block of queries: 2 * (rows read) * H * itemsize, plus 8 a row for slots and orders, plus R * 2 * H * itemsize
for queries and output. Tiles of one block of queries read the same rows, mostly from L2.
"""

from functools import partial

import jax
import jax.numpy as jnp

from tokeff.compat import pl, triton
from tokeff.kernels.attend import sees
from tokeff.kernels.block_sparse_prefill.layout import chosen, query_blocks, query_tokens, rows_beside
from tokeff.kernels.gpu import BLOCK, add, finish, load_slots, params, row_tiles, start, unfit, walk


def refusal(q_BTNH, k_BKCH, v_BKCH, order_BKC, lo_BT, hi_BT, block_BKQM, row_BKM=None, *, size, scale, softcap, first, finite):
    """Return in one line why this kernel cannot take the call, or None."""
    return unfit(q_BTNH, k_BKCH, v_BKCH)


def run(
    q_BTNH, k_BKCH, v_BKCH, order_BKC, lo_BT, hi_BT, block_BKQM, row_BKM=None, *,
    size, scale, softcap, first, finite, interpret=False,
):  # fmt: skip
    """Same contract as the public op, for calls that `refusal` accepts. interpret: as of `pl.pallas_call`."""
    (B, T, N, H), K, Q = q_BTNH.shape, k_BKCH.shape[1], block_BKQM.shape[2]
    rows = row_tiles(size * N // K, H, q_BTNH.dtype).rows
    q_BKQRH, bounds = query_blocks(q_BTNH, lo_BT, hi_BT, K, Q, size, rows)
    count_BKQ, slots, orders = _slots(block_BKQM, row_BKM, order_BKC, size)
    tiles = q_BKQRH.shape[3] // rows

    def row_spec(*width):
        return pl.BlockSpec((None, None, None, rows, *width), lambda b, k, i: (b, k, i // tiles, i % tiles) + (0,) * len(width))

    bound_spec = pl.BlockSpec((None, None, rows), lambda b, k, i: (b, i // tiles, i % tiles))
    whole = pl.BlockSpec(memory_space=pl.ANY)
    out_BKQRH, lse_BKQR = pl.pallas_call(
        partial(_kernel, tiles=tiles, block=BLOCK[q_BTNH.dtype.name], scale=scale, softcap=softcap, finite=finite),
        grid=(B, K, Q * tiles),
        in_specs=[bound_spec, bound_spec, row_spec(H), *[whole] * 5],
        out_specs=[row_spec(H), row_spec()],
        out_shape=[
            jax.ShapeDtypeStruct(q_BKQRH.shape, v_BKCH.dtype), jax.ShapeDtypeStruct(q_BKQRH.shape[:4], jnp.float32),
        ],
        compiler_params=params(rows, H, q_BTNH.dtype),
        interpret=interpret,
        name="block_sparse_prefill",
    )(*bounds, q_BKQRH, count_BKQ, slots, orders, k_BKCH, v_BKCH)  # fmt: skip
    return query_tokens(out_BKQRH, T, N, size), query_tokens(lse_BKQR, T, N, size)


def _slots(block_BKQM, row_BKM, order_BKC, size):
    """Return (count_BKQ, slot_BKQX, order_BKQX): so many slots that each block of queries walks over, and their orders."""
    count_BKQ, listed_BKQM, order_BKQX = chosen(block_BKQM, order_BKC, size)
    slot_BKQX = (listed_BKQM[..., None] * size + jnp.arange(size)).reshape(order_BKQX.shape)
    if row_BKM is None:
        return count_BKQ * size, slot_BKQX, order_BKQX
    beside = rows_beside(order_BKC, block_BKQM, row_BKM, size)
    slot_BKQX = jnp.concatenate([jnp.broadcast_to(row_BKM[:, :, None], beside.shape), slot_BKQX], -1)
    return row_BKM.shape[2] + count_BKQ * size, slot_BKQX, jnp.concatenate([beside, order_BKQX], -1)


def _kernel(
    lo_ref, hi_ref, q_ref, count_ref, slot_ref, order_ref, k_ref, v_ref, out_ref, lse_ref, *, tiles, block, scale, softcap, finite
):  # fmt: skip
    """Attend some rows of one block of queries to its slots."""
    b, kh, i = (pl.program_id(axis) for axis in range(3))
    qb = i // tiles
    lo_R1, hi_R1, q_RH = lo_ref[...][:, None], hi_ref[...][:, None], q_ref[...]
    count = count_ref[b, kh, qb]

    def place(j):
        x_X = j * block + jnp.arange(block)
        slot_X = triton.load(slot_ref.at[b, kh, qb, x_X], mask=x_X < count, other=0)
        order_X = triton.load(order_ref.at[b, kh, qb, x_X], mask=x_X < count, other=-1)
        return x_X < count, slot_X, order_X

    def take_in(here, state):
        there_X, slot_X, order_X = here
        see_RX = sees(order_X[None], lo_R1, hi_R1)
        seen_X = there_X if finite else see_RX.astype(jnp.int32).max(0) > 0
        k_XH, v_XH = (load_slots(ref, b, kh, slot_X, seen_X) for ref in (k_ref, v_ref))
        return add(state, q_RH, k_XH, v_XH, see_RX, scale, softcap)

    finish(walk((count + block - 1) // block, place, take_in, start(q_RH.shape)), out_ref, lse_ref)
