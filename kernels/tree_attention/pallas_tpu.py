"""tree_attention for TPU (Mosaic): one pass over the blocks of the cache that are seen, then over the draft, in one running softmax.

Grid (B, K, steps). A step holds the R = T * G query rows of one kv head, their bounds and their rows of the ancestor mask (all
resident over the steps of a head), a block of stored rows with its orders, and the draft's W rows (resident). The last step
takes the draft in after its own block. Blocks pass by as in flash_prefill: a scalar-prefetched list of those that some query may see.

K and V of the cache are taken as (H, slots) unless H is a multiple of 128, as XLA keeps them; those of the draft as (W, H).

HBM bytes for each (B, K): 2 * (slots of blocks seen) * H * itemsize + 4 a slot for orders, 2 * W * H * itemsize for the draft, 4 * R * W
for the mask.
"""

from functools import partial

import jax
import jax.numpy as jnp

from tokeff.compat import pl, pltpu, tpu_params
from tokeff.kernels.blocks import listed, seen_blocks
from tokeff.kernels.decode_attention.pallas_tpu import MAX_ROWS, MAX_TABLE, _block_slots, slots_on_lanes
from tokeff.kernels.flash_prefill.pallas_tpu import unfit
from tokeff.kernels.rows import NOTHING, head_rows, round_up, token_rows, tokens
from tokeff.kernels.running import LANES, Running, add, cleaned, finish, scratch, start, visible

MAX_DRAFT = 512  # rows of a draft: (MAX_ROWS, MAX_DRAFT) scores and mask take 2 MiB each


def refusal(q_BTNH, k_BKCH, v_BKCH, k_BKWH, v_BKWH, order_BKC, lo_BT, hi_BT, among_BTW, *, scale, softcap, finite):
    """Return in one line why this kernel cannot take the call, or None."""
    (_, T, N, _), (B, K, C, _) = q_BTNH.shape, k_BKCH.shape
    if reason := unfit(q_BTNH, k_BKCH, v_BKCH) or mixed(k_BKCH, k_BKWH, v_BKWH):
        return reason
    if (R := T * N // K) > MAX_ROWS:
        return f"T * G = {R} query rows a kv head exceed {MAX_ROWS}"
    if (W := among_BTW.shape[2]) > MAX_DRAFT:
        return f"a draft of {W} rows exceeds {MAX_DRAFT}, what VMEM holds"
    if (places := B * K * -(-C // _block_slots(C, R))) > MAX_TABLE:
        return f"lists of {places} blocks exceed {MAX_TABLE} entries of scalar memory"
    return None


def mixed(k_BKCH, k_BKWH, v_BKWH):
    """Return in one line that the draft is kept in another dtype than the cache, or None."""
    if {k_BKWH.dtype, v_BKWH.dtype} != {k_BKCH.dtype}:
        return f"the draft in {k_BKWH.dtype} and {v_BKWH.dtype} must be of the cache's dtype, {k_BKCH.dtype}"
    return None


def run(
    q_BTNH, k_BKCH, v_BKCH, k_BKWH, v_BKWH, order_BKC, lo_BT, hi_BT, among_BTW, *, scale, softcap, finite, interpret=False
):  # fmt: skip
    """Same contract as the public op, for calls that `refusal` accepts. interpret: as of `pl.pallas_call`."""
    (B, T, N, H), (K, C), on_lanes = q_BTNH.shape, k_BKCH.shape[1:3], slots_on_lanes(k_BKCH)
    R, W = round_up(T * N // K, 16), round_up(among_BTW.shape[2], LANES)
    slots = _block_slots(C, R)
    steps = -(-C // slots)
    lo_BR, hi_BR = token_rows(lo_BT, N // K, R, 0), token_rows(hi_BT, N // K, R, NOTHING)
    order_BKC = jnp.pad(order_BKC, [(0, 0), (0, 0), (0, steps * slots - C)], constant_values=-1)
    lists = listed(seen_blocks(order_BKC, lo_BR, hi_BR, R, slots))
    k, v = (x.swapaxes(2, 3) if on_lanes else x for x in (k_BKCH, v_BKCH))
    draft = (jnp.pad(x, [(0, 0), (0, 0), (0, W - x.shape[2]), (0, 0)]) for x in (k_BKWH, v_BKWH))

    def head_spec(height, width):
        return pl.BlockSpec((None, None, height, width), lambda b, k, j, *_: (b, k, 0, 0))

    def token_spec(width):
        return pl.BlockSpec((None, R, width), lambda b, k, j, *_: (b, 0, 0))

    def slot_spec(shape, on_lanes):
        def at(b, k, j, count_ref, block_ref):
            block = block_ref[(b * K + k) * steps + j]
            return (b, k, 0, block) if on_lanes else (b, k, block, 0)

        return pl.BlockSpec((None, None, *shape), at)

    stored = slot_spec((H, slots) if on_lanes else (slots, H), on_lanes)
    out_BKRH, lse_BKR1 = pl.pallas_call(
        partial(_kernel, axis=int(on_lanes), clean=not finite or C % slots > 0, scale=scale, softcap=softcap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, K, steps),
            in_specs=[
                token_spec(2), token_spec(W), head_spec(R, H), slot_spec((1, slots), True), stored, stored,
                head_spec(W, H), head_spec(W, H),
            ],
            out_specs=[head_spec(R, H), head_spec(R, 1)],
            scratch_shapes=scratch(R, H),
        ),
        out_shape=[jax.ShapeDtypeStruct((B, K, R, H), q_BTNH.dtype), jax.ShapeDtypeStruct((B, K, R, 1), jnp.float32)],
        compiler_params=tpu_params("parallel", "parallel", "arbitrary"),
        interpret=interpret,
        name="tree_attention",
    )(
        *(x.reshape(-1) for x in lists), jnp.stack([lo_BR, hi_BR], -1), mask_rows(among_BTW, N // K, R, W),
        head_rows(q_BTNH, K, R), order_BKC[:, :, None], k, v, *draft,
    )  # fmt: skip
    return tokens(out_BKRH, T, N), tokens(lse_BKR1, T, N)[..., 0]


def mask_rows(among_BTW, G, R, W):
    """Return the ancestor mask as int32 (B, R, W), in the row order of `head_rows`; 0 for what is padding."""
    among_BRW = jnp.repeat(among_BTW.astype(jnp.int32), G, axis=1)
    return jnp.pad(among_BRW, [(0, 0), (0, R - among_BRW.shape[1]), (0, W - among_BRW.shape[2])])


def _kernel(
    count_ref, block_ref, bounds_ref, among_ref, q_ref, order_ref, k_ref, v_ref, kd_ref, vd_ref, out_ref, lse_ref, *kept,
    axis, clean, scale, softcap,
):  # fmt: skip
    """One step of one head. axis: of the slots in K and V of the cache. clean: V may hold NaN where nobody looks."""
    b, k, j = (pl.program_id(axis) for axis in range(3))
    count, at = count_ref[b * pl.num_programs(1) + k], Running(*kept)

    @pl.when(j == 0)
    def _start():
        start(at, bounds_ref[...])

    @pl.when(j < count)
    def _add_block():
        see_RX = visible(order_ref[...], at)
        v = cleaned(v_ref[...], see_RX, axis) if clean else v_ref[...]
        add(at, q_ref[...], k_ref[...], v, see_RX, axis, scale, softcap)

    @pl.when(j == pl.num_programs(2) - 1)
    def _add_draft():
        see_RW = among_ref[...] > 0
        add(at, q_ref[...], kd_ref[...], cleaned(vd_ref[...], see_RW, 0), see_RW, 0, scale, softcap)
        finish(at, out_ref, lse_ref)
