"""tree_attention for NVIDIA GPUs (Triton): slots are split over programs, and one more program takes the draft.

Grid (B, K, (splits + 1) * tiles). A program holds a tile of the R = T * G query rows of one kv head in registers and walks its share of the
cache's slots, as in decode_attention; the last ones of a head walk over the draft under the ancestor mask. They write (R, H) partial
outputs and log-sum-exps, which XLA merges. Loads of K and V are masked by what some row sees.

HBM bytes for each (B, K): 2 * (slots seen + W) * H * itemsize, plus 4 a slot for orders, 4 * R * W for the mask, and 8 * R * H a split.
"""

from functools import partial

import jax
import jax.numpy as jnp

from tokeff.compat import pl, triton
from tokeff.kernels.attend import sees
from tokeff.kernels.gpu import BLOCK, add, finish, load_slots, merge_splits, params, row_tiles, slot_splits, start, unfit, walk
from tokeff.kernels.rows import NOTHING, head_rows, round_up, token_rows, tokens
from tokeff.kernels.tree_attention.pallas_tpu import mask_rows, mixed


def refusal(q_BTNH, k_BKCH, v_BKCH, k_BKWH, v_BKWH, order_BKC, lo_BT, hi_BT, among_BTW, *, scale, softcap, finite):
    """Return in one line why this kernel cannot take the call, or None."""
    return unfit(q_BTNH, k_BKCH, v_BKCH) or mixed(k_BKCH, k_BKWH, v_BKWH)


def run(
    q_BTNH, k_BKCH, v_BKCH, k_BKWH, v_BKWH, order_BKC, lo_BT, hi_BT, among_BTW, *, scale, softcap, finite, interpret=False
):  # fmt: skip
    """Same contract as the public op, for calls that `refusal` accepts. interpret: as of `pl.pallas_call`."""
    (B, T, N, H), (K, C), block = q_BTNH.shape, order_BKC.shape[1:], BLOCK[q_BTNH.dtype.name]
    tiles = row_tiles(T * N // K, H, q_BTNH.dtype)
    R, n = tiles.total, tiles.count
    W, splits = round_up(among_BTW.shape[2], block), slot_splits(C, block, tiles, B * K)
    bounds = token_rows(lo_BT, N // K, R, 0), token_rows(hi_BT, N // K, R, NOTHING)

    def split_spec(*width):
        return pl.BlockSpec((None, None, None, tiles.rows, *width), lambda b, k, s: (b, k, s // n, s % n) + (0,) * len(width))

    row_spec = pl.BlockSpec((None, tiles.rows), lambda b, k, s: (b, s % n))
    mask_spec = pl.BlockSpec((None, tiles.rows, W), lambda b, k, s: (b, s % n, 0))
    query_spec = pl.BlockSpec((None, None, tiles.rows, H), lambda b, k, s: (b, k, s % n, 0))
    whole = pl.BlockSpec(memory_space=pl.ANY)
    out_BKSRH, lse_BKSR = pl.pallas_call(
        partial(_kernel, splits=splits, tiles=n, block=block, scale=scale, softcap=softcap),
        grid=(B, K, (splits.count + 1) * n),
        in_specs=[row_spec, row_spec, query_spec, whole, whole, whole, mask_spec, whole, whole],
        out_specs=[split_spec(H), split_spec()],
        out_shape=[jax.ShapeDtypeStruct((B, K, splits.count + 1, R, *width), jnp.float32) for width in ((H,), ())],
        compiler_params=params(tiles.rows, H, q_BTNH.dtype),
        interpret=interpret,
        name="tree_attention",
    )(*bounds, head_rows(q_BTNH, K, R), order_BKC, k_BKCH, v_BKCH, mask_rows(among_BTW, N // K, R, W), k_BKWH, v_BKWH)
    out_BKRH, lse_BKR = merge_splits(out_BKSRH, lse_BKSR)
    return tokens(out_BKRH, T, N).astype(q_BTNH.dtype), tokens(lse_BKR, T, N)


def _kernel(
    lo_ref, hi_ref, q_ref, order_ref, k_ref, v_ref, among_ref, kd_ref, vd_ref, out_ref, lse_ref, *, splits, tiles, block, scale, softcap
):  # fmt: skip
    """Attend a tile of one head's rows to one split of its slots, or to the draft."""
    b, kh, split = pl.program_id(0), pl.program_id(1), pl.program_id(2) // tiles
    lo_R1, hi_R1, q_RH = lo_ref[...][:, None], hi_ref[...][:, None], q_ref[...]

    def take_in(carry, slot_X, see_RX, k_ref, v_ref):
        seen_X = see_RX.astype(jnp.int32).max(0) > 0
        k_XH, v_XH = (load_slots(ref, b, kh, slot_X, seen_X) for ref in (k_ref, v_ref))
        return add(carry, q_RH, k_XH, v_XH, see_RX, scale, softcap)

    def place(i):
        slot_X = splits.block(split, i) * block + jnp.arange(block)
        return slot_X, triton.load(order_ref.at[b, kh, slot_X], mask=slot_X < order_ref.shape[2], other=-1)

    def stored(here, state):
        return take_in(state, here[0], sees(here[1][None], lo_R1, hi_R1), k_ref, v_ref)

    def draft(i, carry):
        see_RX = among_ref[:, pl.ds(i * block, block)] > 0
        return take_in(carry, i * block + jnp.arange(block), see_RX, kd_ref, vd_ref)

    state = jax.lax.cond(
        split < splits.count,
        lambda: walk(splits.steps, place, stored, start(q_RH.shape)),
        lambda: jax.lax.fori_loop(0, among_ref.shape[1] // block, draft, start(q_RH.shape)),
    )
    finish(state, out_ref, lse_ref)
