"""decode_attention for NVIDIA GPUs (Triton): slots are split over programs, each with a running softmax.

Grid (B, K, splits * tiles). A program holds a tile of the R = T * G query rows of one kv head in registers and walks its share of the
slots, a block at a time, through pointers: dense slots, rows or pages of any size are the same loop. Blocks are dealt out in turn, so
that a cache which is filled in part keeps all programs busy; the tiles of a split follow each other and find its rows in L2. Loads of K
and V are masked by what some row may see, so unseen, unselected and empty slots are neither read nor able to do harm. The
programs of a head write (R, H) partial outputs and log-sum-exps, which XLA merges.

HBM bytes: 2 * (slots seen) * H * itemsize for each (B, K), plus 4 a slot for orders, plus 8 * R * H a split.
"""

from functools import partial

import jax
import jax.numpy as jnp

from tokeff.compat import pl, triton
from tokeff.kernels.gpu import BLOCK, add, finish, load_slots, merge_splits, params, row_tiles, slot_splits, start, unfit, walk
from tokeff.kernels.rows import NOTHING, head_rows, token_rows, tokens


def refusal(q_BTNH, k_BKCH, v_BKCH, order_BKC, lo_BT, hi_BT, page_BKM=None, bias_BKC=None, *, page_size, scale, softcap, finite=False):
    """Return in one line why this kernel cannot take the call, or None."""
    if bias_BKC is not None:
        return "a bias of stored rows is not built in"
    return unfit(q_BTNH, k_BKCH, v_BKCH)


def run(
    q_BTNH, k_BKCH, v_BKCH, order_BKC, lo_BT, hi_BT, page_BKM=None, bias_BKC=None, *,
    page_size, scale, softcap, finite=False, interpret=False,
):  # fmt: skip
    """Same contract as the public op, for calls that `refusal` accepts. interpret: as of `pl.pallas_call`."""
    (B, T, N, H), (K, C) = q_BTNH.shape, order_BKC.shape[1:]
    tiles, block = row_tiles(T * N // K, H, q_BTNH.dtype), BLOCK[q_BTNH.dtype.name]
    R, n = tiles.total, tiles.count
    bounds = token_rows(lo_BT, N // K, R, 0), token_rows(hi_BT, N // K, R, NOTHING)
    X = C if page_BKM is None else page_BKM.shape[2] * page_size
    splits = slot_splits(X, block, tiles, B * K)
    pages = () if page_BKM is None else (page_BKM,)

    def split_spec(*width):
        return pl.BlockSpec((None, None, None, tiles.rows, *width), lambda b, k, s: (b, k, s // n, s % n) + (0,) * len(width))

    row_spec = pl.BlockSpec((None, tiles.rows), lambda b, k, s: (b, s % n))
    whole = pl.BlockSpec(memory_space=pl.ANY)
    kernel = partial(_kernel, X=X, block=block, splits=splits, tiles=n, page_size=page_size, scale=scale, softcap=softcap)
    out_BKSRH, lse_BKSR = pl.pallas_call(
        kernel,
        grid=(B, K, splits.count * n),
        in_specs=[
            row_spec, row_spec, pl.BlockSpec((None, None, tiles.rows, H), lambda b, k, s: (b, k, s % n, 0)), *[whole] * (3 + len(pages))
        ],
        out_specs=[split_spec(H), split_spec()],
        out_shape=[jax.ShapeDtypeStruct((B, K, splits.count, R, *width), jnp.float32) for width in ((H,), ())],
        compiler_params=params(tiles.rows, H, q_BTNH.dtype),
        interpret=interpret,
        name="decode_attention",
    )(*bounds, head_rows(q_BTNH, K, R), order_BKC, k_BKCH, v_BKCH, *pages)  # fmt: skip
    out_BKRH, lse_BKR = merge_splits(out_BKSRH, lse_BKSR)
    return tokens(out_BKRH, T, N).astype(q_BTNH.dtype), tokens(lse_BKR, T, N)


def _kernel(lo_ref, hi_ref, q_ref, order_ref, k_ref, v_ref, *refs, X, block, splits, tiles, page_size, scale, softcap):
    """Attend a tile of one head's rows to one split of its slots. refs: the pages, if any, then out and lse."""
    *page_ref, out_ref, lse_ref = refs
    b, kh, split = pl.program_id(0), pl.program_id(1), pl.program_id(2) // tiles
    lo_R1, hi_R1, q_RH = lo_ref[...][:, None], hi_ref[...][:, None], q_ref[...]

    def place(i):
        x_X = splits.block(split, i) * block + jnp.arange(block)
        slot_X, here_X = x_X, x_X < X
        if page_ref:
            page_X = triton.load(page_ref[0].at[b, kh, x_X // page_size], mask=here_X, other=-1)
            slot_X = page_X * page_size + x_X % page_size
            here_X &= (page_X >= 0) & (slot_X < order_ref.shape[2])
        return slot_X, triton.load(order_ref.at[b, kh, slot_X], mask=here_X, other=-1)

    def take_in(here, state):
        slot_X, order_X = here
        see_RX = (order_X[None] >= lo_R1) & (order_X[None] <= hi_R1)
        seen_X = see_RX.astype(jnp.int32).max(0) > 0
        k_XH, v_XH = (load_slots(ref, b, kh, slot_X, seen_X) for ref in (k_ref, v_ref))
        return add(state, q_RH, k_XH, v_XH, see_RX, scale, softcap)

    finish(walk(splits.steps, place, take_in, start(q_RH.shape)), out_ref, lse_ref)
