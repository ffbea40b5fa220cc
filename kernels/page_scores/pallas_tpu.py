"""page_scores for TPU (Mosaic): one pass over the summaries; the best pages are then XLA's `top_k`.

Grid (B, K, blocks of pages). A step holds the R = T * G query rows of one kv head, split into what is positive and what is not, and
the low and high summaries of X pages (in decode_attention's layout: (H, X) unless H is a multiple of 128). Two products on the MXU give
the bounds of all rows, a third with ones adds up the rows of a group. Only (T, X) of worth leaves the chip.

`jax.lax.top_k` ranks the worth of all heads at once. Inside the kernel one head at a time would go through the vector unit, `most` times
over, with one row in eight in use.

HBM bytes: 2 * P * H * itemsize for each (B, K) (half of it with one summary), plus 4 * T * P written and read again.
"""

import functools
from functools import partial

import jax
import jax.numpy as jnp

from tokeff.compat import pl, tpu_params
from tokeff.kernels.decode_attention.pallas_tpu import slots_on_lanes
from tokeff.kernels.page_scores.xla import best
from tokeff.kernels.rows import head_rows, round_up
from tokeff.kernels.running import mxu

PAGES = 1024  # of a block: two summaries of 128 bfloat16 numbers take 512 KiB
MAX_ROWS = 512  # query rows a kv head: their float32 bounds on a block take 2 MiB


def refusal(q_BTNH, low_BKPH, high_BKPH, open_BKTP, *, most, chunks, scale):
    """Return in one line why this kernel cannot take the call, or None."""
    (_, T, N, _), K = q_BTNH.shape, low_BKPH.shape[1]
    kinds = {x.dtype for x in (q_BTNH, low_BKPH, high_BKPH) if x is not None}
    if kinds not in ({jnp.dtype("float32")}, {jnp.dtype("bfloat16")}):
        return f"q and summaries must all be float32 or all bfloat16, not {', '.join(sorted(str(x) for x in kinds))}"
    if (R := T * N // K) > MAX_ROWS:
        return f"T * G = {R} query rows a kv head exceed {MAX_ROWS}"
    return None


def run(q_BTNH, low_BKPH, high_BKPH, open_BKTP, *, most, chunks, scale, interpret=False):
    """Same contract as the public op, for calls that `refusal` accepts. interpret: as of `pl.pallas_call`."""
    (B, T, N, H), (K, P) = q_BTNH.shape, low_BKPH.shape[1:3]
    R, X = round_up(T * N // K, 32 // q_BTNH.dtype.itemsize), min(PAGES, P)
    blocks, on_lanes = -(-P // X), slots_on_lanes(low_BKPH)
    summaries = [x.swapaxes(2, 3) if on_lanes else x for x in (low_BKPH, high_BKPH) if x is not None]
    lanes_spec = pl.BlockSpec((1, 1, H, X), lambda b, k, j: (b, k, 0, j))
    rows_spec = pl.BlockSpec((1, 1, X, H), lambda b, k, j: (b, k, j, 0))
    worth_BKTX = pl.pallas_call(
        partial(_kernel, axis=int(on_lanes), G=N // K, scale=scale),
        grid=(B, K, blocks),
        in_specs=[pl.BlockSpec((1, 1, R, H), lambda b, k, j: (b, k, 0, 0)), *[lanes_spec if on_lanes else rows_spec] * len(summaries)],
        out_specs=pl.BlockSpec((1, 1, T, X), lambda b, k, j: (b, k, 0, j)),
        out_shape=jax.ShapeDtypeStruct((B, K, T, blocks * X), jnp.float32),
        compiler_params=tpu_params("parallel", "parallel", "parallel"),
        interpret=interpret,
        name="page_scores",
    )(head_rows(q_BTNH, K, R), *summaries)
    return best(worth_BKTX[..., :P], open_BKTP, most, chunks)


def _kernel(q_ref, *refs, axis, G, scale):
    """The worth of one block of pages of one head. refs: one or two summaries, then worth. axis: of the pages in a summary."""
    *pages, worth_ref = refs
    q_RH = q_ref[0, 0]
    signs = (q_RH,) if len(pages) == 1 else (jnp.minimum(q_RH, 0), jnp.maximum(q_RH, 0))
    bound_RX = functools.reduce(jnp.add, (mxu(sign_RH, page[0, 0], 1, 1 - axis) for sign_RH, page in zip(signs, pages)))
    T, R = worth_ref.shape[2], q_RH.shape[0]
    if T == 1:
        worth_ref[0, 0] = bound_RX.sum(0, keepdims=True) * scale  # rows that fill a tile are zeros
    else:
        first_TR, row_TR = (jax.lax.broadcasted_iota(jnp.int32, (T, R), axis) for axis in (0, 1))
        own_TR = (row_TR >= first_TR * G) & (row_TR < first_TR * G + G)
        worth_ref[0, 0] = mxu(own_TR.astype(jnp.float32), bound_RX, 1, 0) * scale
