"""quant_decode for NVIDIA GPUs (Triton): decode_attention's kernel, with codes in the place of rows.

Grid (B, K, splits). A program walks its share of the rows, a block at a time, through pointers. It loads a block of bytes, (X, Z), and
takes out of them 8 / bits parts of Z neighbouring numbers, each scaled in registers by the zeros and steps of its groups and multiplied
against the same part of the queries; values the same, each part into its own columns of the output. Loads are masked by what some row
may see, so unseen codes, zeros and steps are neither read nor able to do harm. XLA merges the splits.

HBM bytes: for each (B, K) and row seen, 2 * H * bits / 8 of codes, and zeros and steps once, as stored; rows of a block that share
them find them in the caches. Plus 4 a row for orders, plus 8 * R * H a split.
"""

from functools import partial

import jax
import jax.numpy as jnp

from tokeff.compat import pl, triton, triton_params
from tokeff.kernels.decode_attention.pallas_gpu import LOW, MAX_TILE, PROGRAMS, _merge_splits, dot, padded_rows
from tokeff.kernels.rows import NOTHING, head_rows, token_rows, tokens

BLOCK = 32  # rows a step; scaled parts of K and of V are in registers beside the bytes


def refusal(
    q_BTNH, k_zero_BKPRQ, k_step_BKPRQ, v_zero_BKPRQ, v_step_BKPRQ, k_code_BKPRZ, *_, bits, scale, softcap, finite=False
):  # fmt: skip
    """Return in one line why this kernel cannot take the call, or None."""
    (_, T, N, H), K = q_BTNH.shape, k_zero_BKPRQ.shape[1]
    kinds = {x.dtype for x in (q_BTNH, k_zero_BKPRQ, k_step_BKPRQ, v_zero_BKPRQ, v_step_BKPRQ)}
    if kinds not in ({jnp.dtype("float32")}, {jnp.dtype("bfloat16")}):
        return f"q, zeros and steps must all be float32 or all bfloat16, not {', '.join(sorted(str(x) for x in kinds))}"
    if (Z := H * bits // 8) not in (16, 32, 64, 128, 256):
        return f"{H} numbers of {bits} bits are {Z} bytes a row, not a power of two from 16 to 256"
    if (tile := padded_rows(T * N // K) * H) > (most := MAX_TILE[q_BTNH.dtype.name]):
        return f"T * G rounded up to a power of two, times H, is {tile}: over {most}, the registers for {q_BTNH.dtype}"
    return None


def run(
    q_BTNH, k_zero_BKPRQ, k_step_BKPRQ, v_zero_BKPRQ, v_step_BKPRQ, k_code_BKPRZ, v_code_BKPRZ, order_BKPR, lo_BT, hi_BT, *,
    bits, scale, softcap, finite=False, interpret=False,
):  # fmt: skip
    """Same contract as the public op, for calls that `refusal` accepts. interpret: as of `pl.pallas_call`."""
    (B, T, N, H), (K, P, page_rows) = q_BTNH.shape, order_BKPR.shape[1:]
    R = padded_rows(T * N // K)
    bounds = token_rows(lo_BT, N // K, R, 0), token_rows(hi_BT, N // K, R, NOTHING)
    steps = -(-P * page_rows // BLOCK)
    splits = max(1, min(steps, PROGRAMS // (B * K)))

    def head_spec(*width):
        return pl.BlockSpec((None, None, R, *width), lambda b, k, s: (b, k, 0) + (0,) * len(width))

    def split_spec(*width):
        return pl.BlockSpec((None, None, None, R, *width), lambda b, k, s: (b, k, s, 0) + (0,) * len(width))

    row_spec = pl.BlockSpec((None, R), lambda b, k, s: (b, 0))
    whole = pl.BlockSpec(memory_space=pl.ANY)
    keys, values = (k_code_BKPRZ, k_zero_BKPRQ, k_step_BKPRQ), (v_code_BKPRZ, v_zero_BKPRQ, v_step_BKPRQ)
    out_BKSRH, lse_BKSR = pl.pallas_call(
        partial(_kernel, X=P * page_rows, steps=-(-steps // splits), bits=bits, scale=scale, softcap=softcap),
        grid=(B, K, splits),
        in_specs=[row_spec, row_spec, head_spec(H), *[whole] * 7],
        out_specs=[split_spec(H), split_spec()],
        out_shape=[jax.ShapeDtypeStruct((B, K, splits, R, *width), jnp.float32) for width in ((H,), ())],
        compiler_params=triton_params(num_warps=4, num_stages=2),
        interpret=interpret,
        name="quant_decode",
    )(*bounds, head_rows(q_BTNH, K, R), order_BKPR, *keys, *values)
    out_BKRH, lse_BKR = _merge_splits(out_BKSRH, lse_BKSR)
    return tokens(out_BKRH, T, N).astype(q_BTNH.dtype), tokens(lse_BKR, T, N)


def _kernel(lo_ref, hi_ref, q_ref, order_ref, *refs, X, steps, bits, scale, softcap):
    """Attend one head's rows to one split of its pages. refs: codes, zeros and steps of keys, of values, then out and lse."""
    key, value, (out_ref, lse_ref) = refs[:3], refs[3:6], refs[6:]
    b, kh, split = (pl.program_id(axis) for axis in range(3))
    lo_R1, hi_R1 = lo_ref[...][:, None], hi_ref[...][:, None]
    (R, H), Z, page_rows = q_ref.shape, key[0].shape[4], order_ref.shape[3]
    q_parts = [q_ref[:, pl.ds(i * Z, Z)] for i in range(8 // bits)]

    def step(i, carry):
        top_R, sum_R, acc = carry
        x_X = (split * steps + i) * BLOCK + jnp.arange(BLOCK)
        at = x_X // page_rows, x_X % page_rows
        order_X = triton.load(order_ref.at[b, kh, *at], mask=x_X < X, other=-1)
        see_RX = (order_X[None] >= lo_R1) & (order_X[None] <= hi_R1)
        seen_X = see_RX.astype(jnp.int32).max(0) > 0
        score_RX = sum(dot(q_RZ, k_XZ.T) for q_RZ, k_XZ in zip(q_parts, _parts(key, b, kh, at, seen_X, H, bits, q_ref.dtype))) * scale
        if softcap:
            score_RX = softcap * jnp.tanh(score_RX / softcap)
        score_RX = jnp.where(see_RX, score_RX, LOW)
        new_R = jnp.maximum(top_R, score_RX.max(1))
        p_RX = jnp.where(see_RX, jnp.exp(score_RX - new_R[:, None]), 0)
        decay_R = jnp.exp(top_R - new_R)
        p, parts = p_RX.astype(q_ref.dtype), _parts(value, b, kh, at, seen_X, H, bits, q_ref.dtype)
        acc = tuple(acc_RZ * decay_R[:, None] + dot(p, v_XZ) for acc_RZ, v_XZ in zip(acc, parts))
        return new_R, sum_R * decay_R + p_RX.sum(1), acc

    zero = jnp.zeros((R, Z), jnp.float32)
    start = jnp.full((R,), LOW, jnp.float32), jnp.zeros((R,), jnp.float32), (zero,) * len(q_parts)
    top_R, sum_R, acc = jax.lax.fori_loop(0, steps, step, start)
    some_R = sum_R > 0
    sum_R = jnp.where(some_R, sum_R, 1)
    for i, acc_RZ in enumerate(acc):
        out_ref[:, pl.ds(i * Z, Z)] = acc_RZ / sum_R[:, None]
    lse_ref[...] = jnp.where(some_R, top_R + jnp.log(sum_R), -jnp.inf)


def _parts(coded, b, k, at, seen_X, H, bits, dtype):
    """Return the numbers of these rows as 8 / bits arrays (X, Z), 0 where not seen; those bytes are not read."""
    code_ref, zero_ref, step_ref = coded
    Z = code_ref.shape[4]
    shape = (*seen_X.shape, Z)
    page_XZ, row_XZ, seen_XZ = (jnp.broadcast_to(x[:, None], shape) for x in (*at, seen_X))
    z_XZ = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    byte_XZ = triton.load(code_ref.at[b, k, page_XZ, row_XZ, z_XZ], mask=seen_XZ, other=0).astype(jnp.int32)
    line_XZ = row_XZ if zero_ref.shape[3] > 1 else jnp.zeros_like(row_XZ)

    def scaled(i):
        group_XZ = (i * Z + z_XZ) // (H // zero_ref.shape[4])
        zero, step = (
            triton.load(ref.at[b, k, page_XZ, line_XZ, group_XZ], mask=seen_XZ, other=0).astype(jnp.float32) for ref in (zero_ref, step_ref)
        )
        return (zero + step * ((byte_XZ >> (bits * i)) & (2**bits - 1)).astype(jnp.float32)).astype(dtype)

    return [scaled(i) for i in range(8 // bits)]
