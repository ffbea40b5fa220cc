"""flash_prefill for NVIDIA GPUs (Triton): a program owns a block of query rows and walks over the stored rows that it may see.

Grid (B, K, row blocks). A program holds its rows (of the R = T * G query rows of one kv head), bounds, running softmax and output in
registers and follows a list of blocks of stored rows, as on TPU made before it starts from the orders: a block that no row
may see is not read. Within a block, loads of K and V are masked by what some row sees, so an empty or unseen row can do no harm; where
rows are promised to be finite no load waits for a mask.

HBM bytes for each (B, K): 2 * C * H * itemsize for K and V, which the row blocks of a head mostly read from L2; R * 2 * H * itemsize
for queries and output; 12 a row for bounds and log-sum-exp.
"""

from functools import partial

import jax
import jax.numpy as jnp

from tokeff.compat import pl, triton
from tokeff.kernels.attend import sees
from tokeff.kernels.blocks import listed, seen_blocks
from tokeff.kernels.gpu import BLOCK, add, finish, load_slots, params, row_tiles, start, unfit, walk
from tokeff.kernels.rows import NOTHING, head_rows, token_rows, tokens


def refusal(q_BTNH, k_BKCH, v_BKCH, order_BKC, order_BC, lo_BT, hi_BT, *, scale, softcap, sinks, first, window, finite):
    """Return in one line why this kernel cannot take the call, or None."""
    return unfit(q_BTNH, k_BKCH, v_BKCH)


def run(
    q_BTNH, k_BKCH, v_BKCH, order_BKC, order_BC, lo_BT, hi_BT, *, scale, softcap, sinks, first, window, finite, interpret=False
):  # fmt: skip
    """Same contract as the public op, for calls that `refusal` accepts. interpret: as of `pl.pallas_call`."""
    (B, T, N, H), (K, C) = q_BTNH.shape, k_BKCH.shape[1:3]
    tiles, slots = row_tiles(T * N // K, H, q_BTNH.dtype), BLOCK[q_BTNH.dtype.name]
    rows, R = tiles.rows, tiles.total
    bounds = token_rows(lo_BT, N // K, R, 0), token_rows(hi_BT, N // K, R, NOTHING)
    order_BXC = order_BKC if order_BC is None else order_BC[:, None]
    order_BXC = jnp.pad(order_BXC, [(0, 0), (0, 0), (0, -C % slots)], constant_values=-1)
    lists = listed(seen_blocks(order_BXC, *bounds, rows, slots, sinks))

    def row_spec(*width):
        return pl.BlockSpec((None, None, rows, *width), lambda b, k, i: (b, k, i) + (0,) * len(width))

    bound_spec = pl.BlockSpec((None, rows), lambda b, k, i: (b, i))
    whole = pl.BlockSpec(memory_space=pl.ANY)
    out_BKRH, lse_BKR = pl.pallas_call(
        partial(_kernel, slots=slots, scale=scale, softcap=softcap, sinks=sinks, finite=finite),
        grid=(B, K, tiles.count),
        in_specs=[bound_spec, bound_spec, row_spec(H), *[whole] * 5],
        out_specs=[row_spec(H), row_spec()],
        out_shape=[jax.ShapeDtypeStruct((B, K, R, H), v_BKCH.dtype), jax.ShapeDtypeStruct((B, K, R), jnp.float32)],
        compiler_params=params(rows, H, q_BTNH.dtype),
        interpret=interpret,
        name="flash_prefill",
    )(*bounds, head_rows(q_BTNH, K, R), *lists, order_BXC, k_BKCH, v_BKCH)
    return tokens(out_BKRH, T, N), tokens(lse_BKR, T, N)


def _kernel(
    lo_ref, hi_ref, q_ref, count_ref, block_ref, order_ref, k_ref, v_ref, out_ref, lse_ref, *, slots, scale, softcap, sinks, finite
):  # fmt: skip
    """Attend one block of rows of one head to the blocks on its list."""
    b, kh, i = (pl.program_id(axis) for axis in range(3))
    shared = kh if order_ref.shape[1] > 1 else 0
    lo_R1, hi_R1, q_RH = lo_ref[...][:, None], hi_ref[...][:, None], q_ref[...]

    def place(j):
        block = block_ref[b, shared, i, jnp.minimum(j, block_ref.shape[3] - 1)]
        slot_X = block * slots + jnp.arange(slots)
        return slot_X, triton.load(order_ref.at[b, shared, slot_X])

    def take_in(here, state):
        slot_X, order_X = here
        see_RX = sees(order_X[None], lo_R1, hi_R1, sinks)
        seen_X = slot_X < k_ref.shape[2] if finite else see_RX.astype(jnp.int32).max(0) > 0
        k_XH, v_XH = (load_slots(ref, b, kh, slot_X, seen_X) for ref in (k_ref, v_ref))
        return add(state, q_RH, k_XH, v_XH, see_RX, scale, softcap)

    finish(walk(count_ref[b, shared, i], place, take_in, start(q_RH.shape)), out_ref, lse_ref)
