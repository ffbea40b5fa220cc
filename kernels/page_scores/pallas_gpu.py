"""page_scores for NVIDIA GPUs (Triton): one pass over the summaries; the best pages are then XLA's `top_k`.

Grid (B, K, blocks of PAGES pages). A program holds the R = T * G query rows of one kv head, split into what is positive and what is not,
and the summaries of its pages in registers: two products, then one with ones that adds up the rows of a group. `jax.lax.top_k` (a
radix select of whole rows) ranks the worth, 4 bytes a page and query.

HBM bytes: 2 * P * H * itemsize for each (B, K) (half of it with one summary), plus 4 * T * P written and read again.
"""

from functools import partial

import jax
import jax.numpy as jnp

from tokeff.compat import pl, triton_params
from tokeff.kernels.gpu import MAX_TILE, dot, load_slots, padded_rows
from tokeff.kernels.page_scores.xla import best
from tokeff.kernels.rows import head_rows

PAGES = {"bfloat16": 64, "float32": 32}  # of a block


def refusal(q_BTNH, low_BKPH, high_BKPH, open_BKTP, *, most, chunks, scale):
    """Return in one line why this kernel cannot take the call, or None."""
    (_, T, N, H), K = q_BTNH.shape, low_BKPH.shape[1]
    kinds = {x.dtype for x in (q_BTNH, low_BKPH, high_BKPH) if x is not None}
    if kinds not in ({jnp.dtype("float32")}, {jnp.dtype("bfloat16")}):
        return f"q and summaries must all be float32 or all bfloat16, not {', '.join(sorted(str(x) for x in kinds))}"
    if H not in (16, 32, 64, 128, 256):
        return f"head size {H} is not a power of two from 16 to 256"
    if (tile := padded_rows(T * N // K) * H) > (limit := MAX_TILE[q_BTNH.dtype.name]):
        return f"T * G rounded up to a power of two, times H, is {tile}: over {limit}, the registers for {q_BTNH.dtype}"
    return None


def run(q_BTNH, low_BKPH, high_BKPH, open_BKTP, *, most, chunks, scale, interpret=False):
    """Same contract as the public op, for calls that `refusal` accepts. interpret: as of `pl.pallas_call`."""
    (B, T, N, H), (K, P) = q_BTNH.shape, low_BKPH.shape[1:3]
    R, rows, X = padded_rows(T * N // K), padded_rows(T), PAGES[q_BTNH.dtype.name]
    blocks, summaries = -(-P // X), [x for x in (low_BKPH, high_BKPH) if x is not None]
    worth_BKTX = pl.pallas_call(
        partial(_kernel, G=N // K, scale=scale),
        grid=(B, K, blocks),
        in_specs=[pl.BlockSpec((None, None, R, H), lambda b, k, j: (b, k, 0, 0)), *[pl.BlockSpec(memory_space=pl.ANY)] * len(summaries)],
        out_specs=pl.BlockSpec((None, None, rows, X), lambda b, k, j: (b, k, 0, j)),
        out_shape=jax.ShapeDtypeStruct((B, K, rows, blocks * X), jnp.float32),
        compiler_params=triton_params(num_warps=4, num_stages=2),
        interpret=interpret,
        name="page_scores",
    )(head_rows(q_BTNH, K, R), *summaries)
    return best(worth_BKTX[:, :, :T, :P], open_BKTP, most, chunks)


def _kernel(q_ref, *refs, G, scale):
    """The worth of one block of pages of one head. refs: one or two summaries, then worth."""
    *pages, worth_ref = refs
    b, k, block = (pl.program_id(axis) for axis in range(3))
    (rows, X), q_RH = worth_ref.shape, q_ref[...]
    page_X = block * X + jnp.arange(X)
    signs = (q_RH,) if len(pages) == 1 else (jnp.minimum(q_RH, 0), jnp.maximum(q_RH, 0))
    bound_RX = sum(dot(sign_RH, load_slots(ref, b, k, page_X, page_X < ref.shape[2]).T) for sign_RH, ref in zip(signs, pages))
    own_TR = jnp.arange(q_RH.shape[0])[None] // G == jnp.arange(rows)[:, None]
    worth_ref[...] = dot(own_TR.astype(jnp.float32), bound_RX) * scale
