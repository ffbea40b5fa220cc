"""quant_decode for NVIDIA GPUs (Triton): decode_attention's kernel, with codes in the place of rows.

Grid (B, K, splits * tiles). A program walks its share of the rows, a block at a time, through pointers. It loads a block of bytes, (X, Z),
and takes out of them 8 / bits parts of Z neighbouring numbers, each scaled in registers by the zeros and steps of its groups and multiplied
against the same part of the queries; values the same, each part into its own columns of the output. Loads are masked by what some row
may see, so unseen codes, zeros and steps are neither read nor able to do harm. XLA merges the splits.

HBM bytes: for each (B, K) and row seen, 2 * H * bits / 8 of codes, and zeros and steps once, as stored; rows of a block that share
them find them in the caches. Plus 4 a row for orders, plus 8 * R * H a split.
"""

from functools import partial

import jax
import jax.numpy as jnp

from tokeff.compat import pl, triton
from tokeff.kernels.gpu import LOW, dot, ended, head_sizes, merge_splits, params, row_tiles, slot_splits, walk, weights
from tokeff.kernels.rows import NOTHING, head_rows, token_rows, tokens

BLOCK = 32  # rows a step; scaled parts of K and of V are in registers beside the bytes


def refusal(
    q_BTNH, k_zero_BKPRQ, k_step_BKPRQ, v_zero_BKPRQ, v_step_BKPRQ, k_code_BKPRZ, *_, bits, scale, softcap, finite=False
):  # fmt: skip
    """Return in one line why this kernel cannot take the call, or None."""
    H = q_BTNH.shape[3]
    kinds = {x.dtype for x in (q_BTNH, k_zero_BKPRQ, k_step_BKPRQ, v_zero_BKPRQ, v_step_BKPRQ)}
    if kinds not in ({jnp.dtype("float32")}, {jnp.dtype("bfloat16")}):
        return f"q, zeros and steps must all be float32 or all bfloat16, not {', '.join(sorted(str(x) for x in kinds))}"
    if (Z := H * bits // 8) not in (16, 32, 64, 128, 256):
        return f"{H} numbers of {bits} bits are {Z} bytes a row, not a power of two from 16 to 256"
    if (most := head_sizes(q_BTNH.dtype)[-1]) < H:
        return f"head size {H} in {q_BTNH.dtype} is over {most}"
    return None


def run(
    q_BTNH, k_zero_BKPRQ, k_step_BKPRQ, v_zero_BKPRQ, v_step_BKPRQ, k_code_BKPRZ, v_code_BKPRZ, order_BKPR, lo_BT, hi_BT, *,
    bits, scale, softcap, finite=False, interpret=False,
):  # fmt: skip
    """Same contract as the public op, for calls that `refusal` accepts. interpret: as of `pl.pallas_call`."""
    (B, T, N, H), (K, P, page_rows) = q_BTNH.shape, order_BKPR.shape[1:]
    tiles = row_tiles(T * N // K, H, q_BTNH.dtype, most=64)
    R, n = tiles.total, tiles.count
    bounds = token_rows(lo_BT, N // K, R, 0), token_rows(hi_BT, N // K, R, NOTHING)
    splits = slot_splits(P * page_rows, BLOCK, tiles, B * K)

    def split_spec(*width):
        return pl.BlockSpec((None, None, None, tiles.rows, *width), lambda b, k, s: (b, k, s // n, s % n) + (0,) * len(width))

    row_spec = pl.BlockSpec((None, tiles.rows), lambda b, k, s: (b, s % n))
    query_spec = pl.BlockSpec((None, None, tiles.rows, H), lambda b, k, s: (b, k, s % n, 0))
    whole = pl.BlockSpec(memory_space=pl.ANY)
    keys, values = (k_code_BKPRZ, k_zero_BKPRQ, k_step_BKPRQ), (v_code_BKPRZ, v_zero_BKPRQ, v_step_BKPRQ)
    out_BKSRH, lse_BKSR = pl.pallas_call(
        partial(_kernel, X=P * page_rows, splits=splits, tiles=n, bits=bits, scale=scale, softcap=softcap),
        grid=(B, K, splits.count * n),
        in_specs=[row_spec, row_spec, query_spec, *[whole] * 7],
        out_specs=[split_spec(H), split_spec()],
        out_shape=[jax.ShapeDtypeStruct((B, K, splits.count, R, *width), jnp.float32) for width in ((H,), ())],
        compiler_params=params(tiles.rows, H, q_BTNH.dtype),
        interpret=interpret,
        name="quant_decode",
    )(*bounds, head_rows(q_BTNH, K, R), order_BKPR, *keys, *values)
    out_BKRH, lse_BKR = merge_splits(out_BKSRH, lse_BKSR)
    return tokens(out_BKRH, T, N).astype(q_BTNH.dtype), tokens(lse_BKR, T, N)


def _kernel(lo_ref, hi_ref, q_ref, order_ref, *refs, X, splits, tiles, bits, scale, softcap):
    """Attend a tile of one head's rows to one split of its pages. refs: codes, zeros and steps of keys, of values, then out and lse."""
    key, value, (out_ref, lse_ref) = refs[:3], refs[3:6], refs[6:]
    b, kh, split = pl.program_id(0), pl.program_id(1), pl.program_id(2) // tiles
    lo_R1, hi_R1 = lo_ref[...][:, None], hi_ref[...][:, None]
    (R, H), Z, page_rows = q_ref.shape, key[0].shape[4], order_ref.shape[3]
    q_parts = [q_ref[:, pl.ds(i * Z, Z)] for i in range(8 // bits)]

    def place(i):
        x_X = splits.block(split, i) * BLOCK + jnp.arange(BLOCK)
        at = x_X // page_rows, x_X % page_rows
        return at, triton.load(order_ref.at[b, kh, *at], mask=x_X < X, other=-1)

    def take_in(here, state):
        (at, order_X), (top_R, sum_R, acc) = here, state
        see_RX = (order_X[None] >= lo_R1) & (order_X[None] <= hi_R1)
        seen_X = see_RX.astype(jnp.int32).max(0) > 0
        score_RX = sum(dot(q_RZ, k_XZ.T) for q_RZ, k_XZ in zip(q_parts, _parts(key, b, kh, at, seen_X, H, bits, q_ref.dtype))) * scale
        new_R, p_RX, decay_R = weights(top_R, score_RX, see_RX, softcap)
        p, parts = p_RX.astype(q_ref.dtype), _parts(value, b, kh, at, seen_X, H, bits, q_ref.dtype)
        acc = tuple(acc_RZ * decay_R[:, None] + dot(p, v_XZ) for acc_RZ, v_XZ in zip(acc, parts))
        return new_R, sum_R * decay_R + p_RX.sum(1), acc

    zero = jnp.zeros((R, Z), jnp.float32)
    start = jnp.full((R,), LOW, jnp.float32), jnp.zeros((R,), jnp.float32), (zero,) * len(q_parts)
    top_R, sum_R, acc = walk(splits.steps, place, take_in, start)
    lse_ref[...], sum_R = ended(top_R, sum_R)
    for i, acc_RZ in enumerate(acc):
        out_ref[:, pl.ds(i * Z, Z)] = acc_RZ / sum_R[:, None]


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
