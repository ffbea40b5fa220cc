"""flash_prefill for NVIDIA GPUs (Triton): a program owns a block of query rows and walks over the stored rows that it may see.

Grid (B, K, row blocks). A program holds its rows (of the R = T * G query rows of one kv head), bounds, running softmax and output in
registers and follows a list of blocks of stored rows, as on TPU made before it starts from the orders: a block that no row
may see is not read. Within a block, loads of K and V are masked by what some row sees, so an empty or unseen row can do no harm.

HBM bytes for each (B, K): 2 * C * H * itemsize for K and V, which the row blocks of a head mostly read from L2; R * 2 * H * itemsize
for queries and output; 12 a row for bounds and log-sum-exp.
"""

from functools import partial

import jax
import jax.numpy as jnp

from tokeff.compat import pl, triton, triton_params
from tokeff.kernels.attend import sees
from tokeff.kernels.blocks import listed, seen_blocks
from tokeff.kernels.decode_attention.pallas_gpu import BLOCK, LOW, MAX_TILE, dot, load_slots
from tokeff.kernels.rows import NOTHING, head_rows, round_up, token_rows, tokens

MAX_ROWS = 128


def refusal(q_BTNH, k_BKCH, v_BKCH, order_BKC, order_BC, lo_BT, hi_BT, *, scale, softcap, sinks, first, window, finite):
    """Return in one line why this kernel cannot take the call, or None."""
    return unfit(q_BTNH, k_BKCH, v_BKCH)


def unfit(q_BTNH, k_BKCH, v_BKCH):
    """Return in one line what about dtypes and head size no kernel of this kind takes, or None."""
    if {q_BTNH.dtype, k_BKCH.dtype, v_BKCH.dtype} not in ({jnp.dtype("float32")}, {jnp.dtype("bfloat16")}):
        return f"q, k and v must all be float32 or all bfloat16, not {q_BTNH.dtype}, {k_BKCH.dtype}, {v_BKCH.dtype}"
    sizes = [H for H in (16, 32, 64, 128, 256) if MAX_TILE[q_BTNH.dtype.name] >= 16 * H]
    if (H := q_BTNH.shape[3]) not in sizes:
        return f"head size {H} in {q_BTNH.dtype} is not one of {sizes}"
    return None


def tile_rows(rows, H, dtype):
    """How many query rows a program holds: a power of two, at least 16, as registers allow."""
    return max(16, min(MAX_ROWS, MAX_TILE[jnp.dtype(dtype).name] // H, pl.next_power_of_2(rows)))


def run(
    q_BTNH, k_BKCH, v_BKCH, order_BKC, order_BC, lo_BT, hi_BT, *, scale, softcap, sinks, first, window, finite, interpret=False
):  # fmt: skip
    """Same contract as the public op, for calls that `refusal` accepts. interpret: as of `pl.pallas_call`."""
    (B, T, N, H), (K, C) = q_BTNH.shape, k_BKCH.shape[1:3]
    rows, slots = tile_rows(T * N // K, H, q_BTNH.dtype), BLOCK[q_BTNH.dtype.name]
    R = round_up(T * N // K, rows)
    bounds = token_rows(lo_BT, N // K, R, 0), token_rows(hi_BT, N // K, R, NOTHING)
    order_BXC = order_BKC if order_BC is None else order_BC[:, None]
    order_BXC = jnp.pad(order_BXC, [(0, 0), (0, 0), (0, -C % slots)], constant_values=-1)
    lists = listed(seen_blocks(order_BXC, *bounds, rows, slots, sinks))

    def row_spec(*width):
        return pl.BlockSpec((None, None, rows, *width), lambda b, k, i: (b, k, i) + (0,) * len(width))

    bound_spec = pl.BlockSpec((None, rows), lambda b, k, i: (b, i))
    whole = pl.BlockSpec(memory_space=pl.ANY)
    out_BKRH, lse_BKR = pl.pallas_call(
        partial(_kernel, slots=slots, scale=scale, softcap=softcap, sinks=sinks),
        grid=(B, K, R // rows),
        in_specs=[bound_spec, bound_spec, row_spec(H), *[whole] * 5],
        out_specs=[row_spec(H), row_spec()],
        out_shape=[jax.ShapeDtypeStruct((B, K, R, H), v_BKCH.dtype), jax.ShapeDtypeStruct((B, K, R), jnp.float32)],
        compiler_params=triton_params(num_warps=4, num_stages=2),
        interpret=interpret,
        name="flash_prefill",
    )(*bounds, head_rows(q_BTNH, K, R), *lists, order_BXC, k_BKCH, v_BKCH)
    return tokens(out_BKRH, T, N), tokens(lse_BKR, T, N)


def _kernel(lo_ref, hi_ref, q_ref, count_ref, block_ref, order_ref, k_ref, v_ref, out_ref, lse_ref, *, slots, scale, softcap, sinks):
    """Attend one block of rows of one head to the blocks on its list."""
    b, kh, i = (pl.program_id(axis) for axis in range(3))
    shared = kh if order_ref.shape[1] > 1 else 0
    lo_R1, hi_R1, q_RH = lo_ref[...][:, None], hi_ref[...][:, None], q_ref[...]

    def step(j, carry):
        slot_X = block_ref[b, shared, i, j] * slots + jnp.arange(slots)
        order_X = triton.load(order_ref.at[b, shared, slot_X])
        see_RX = sees(order_X[None], lo_R1, hi_R1, sinks)
        seen_X = see_RX.astype(jnp.int32).max(0) > 0
        k_XH, v_XH = (load_slots(ref, b, kh, slot_X, seen_X) for ref in (k_ref, v_ref))
        return add(carry, q_RH, k_XH, v_XH, see_RX, scale, softcap)

    finish(jax.lax.fori_loop(0, count_ref[b, shared, i], step, start(q_RH.shape)), out_ref, lse_ref)


def start(shape):
    """A running softmax that saw nothing yet: the largest score, the sum of exponentials and the output."""
    R, H = shape
    return jnp.full((R,), LOW, jnp.float32), jnp.zeros((R,), jnp.float32), jnp.zeros((R, H), jnp.float32)


def add(carry, q_RH, k_XH, v_XH, see_RX, scale, softcap):
    """Take a block of stored rows into the running softmax."""
    top_R, sum_R, acc_RH = carry
    score_RX = dot(q_RH, k_XH.T) * scale
    if softcap:
        score_RX = softcap * jnp.tanh(score_RX / softcap)
    score_RX = jnp.where(see_RX, score_RX, LOW)
    new_R = jnp.maximum(top_R, score_RX.max(1))
    p_RX = jnp.where(see_RX, jnp.exp(score_RX - new_R[:, None]), 0)
    decay_R = jnp.exp(top_R - new_R)
    return new_R, sum_R * decay_R + p_RX.sum(1), acc_RH * decay_R[:, None] + dot(p_RX.astype(v_XH.dtype), v_XH)


def finish(carry, out_ref, lse_ref):
    """Write output and log-sum-exp: 0 and -inf for a row that saw nothing."""
    top_R, sum_R, acc_RH = carry
    some_R = sum_R > 0
    sum_R = jnp.where(some_R, sum_R, 1)
    out_ref[...] = (acc_RH / sum_R[:, None]).astype(out_ref.dtype)
    lse_ref[...] = jnp.where(some_R, top_R + jnp.log(sum_R), -jnp.inf)
