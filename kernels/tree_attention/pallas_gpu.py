"""tree_attention for NVIDIA GPUs (Triton): slots are split over programs, and one more program takes the draft.

Grid (B, K, splits + 1). A program holds the R = T * G query rows of one kv head in registers and walks its share of the cache's
slots, as in decode_attention; the last program of a head walks over the draft under the ancestor mask. Each writes an (R, H) partial
output and its log-sum-exp, which XLA merges. Loads of K and V are masked by what some row sees.

HBM bytes for each (B, K): 2 * (slots seen + W) * H * itemsize, plus 4 a slot for orders, 4 * R * W for the mask, and 8 * R * H a split.
"""

from functools import partial

import jax
import jax.numpy as jnp

from tokeff.compat import pl, triton, triton_params
from tokeff.kernels.attend import sees
from tokeff.kernels.decode_attention.pallas_gpu import BLOCK, MAX_TILE, PROGRAMS, _merge_splits, load_slots, padded_rows
from tokeff.kernels.flash_prefill.pallas_gpu import add, finish, start, unfit
from tokeff.kernels.rows import NOTHING, head_rows, round_up, token_rows, tokens
from tokeff.kernels.tree_attention.pallas_tpu import mask_rows, mixed


def refusal(q_BTNH, k_BKCH, v_BKCH, k_BKWH, v_BKWH, order_BKC, lo_BT, hi_BT, among_BTW, *, scale, softcap, finite):
    """Return in one line why this kernel cannot take the call, or None."""
    if reason := unfit(q_BTNH, k_BKCH, v_BKCH) or mixed(k_BKCH, k_BKWH, v_BKWH):
        return reason
    (_, T, N, H), K = q_BTNH.shape, k_BKCH.shape[1]
    if (tile := padded_rows(T * N // K) * H) > (most := MAX_TILE[q_BTNH.dtype.name]):
        return f"T * G rounded up to a power of two, times H, is {tile}: over {most}, the registers for {q_BTNH.dtype}"
    return None


def run(
    q_BTNH, k_BKCH, v_BKCH, k_BKWH, v_BKWH, order_BKC, lo_BT, hi_BT, among_BTW, *, scale, softcap, finite, interpret=False
):  # fmt: skip
    """Same contract as the public op, for calls that `refusal` accepts. interpret: as of `pl.pallas_call`."""
    (B, T, N, H), (K, C), R = q_BTNH.shape, order_BKC.shape[1:], padded_rows(q_BTNH.shape[1] * q_BTNH.shape[2] // order_BKC.shape[1])
    block = BLOCK[q_BTNH.dtype.name]
    W, blocks = round_up(among_BTW.shape[2], block), -(-C // block)
    splits = max(1, min(blocks, PROGRAMS // (B * K)))
    bounds = token_rows(lo_BT, N // K, R, 0), token_rows(hi_BT, N // K, R, NOTHING)

    def split_spec(*width):
        return pl.BlockSpec((None, None, None, R, *width), lambda b, k, s: (b, k, s, 0) + (0,) * len(width))

    row_spec = pl.BlockSpec((None, R), lambda b, k, s: (b, 0))
    whole = pl.BlockSpec(memory_space=pl.ANY)
    out_BKSRH, lse_BKSR = pl.pallas_call(
        partial(_kernel, splits=splits, steps=-(-blocks // splits), block=block, scale=scale, softcap=softcap),
        grid=(B, K, splits + 1),
        in_specs=[row_spec, row_spec, pl.BlockSpec((None, None, R, H), lambda b, k, s: (b, k, 0, 0)), *[whole] * 6],
        out_specs=[split_spec(H), split_spec()],
        out_shape=[jax.ShapeDtypeStruct((B, K, splits + 1, R, *width), jnp.float32) for width in ((H,), ())],
        compiler_params=triton_params(num_warps=4, num_stages=2),
        interpret=interpret,
        name="tree_attention",
    )(*bounds, head_rows(q_BTNH, K, R), order_BKC, k_BKCH, v_BKCH, mask_rows(among_BTW, N // K, R, W), k_BKWH, v_BKWH)
    out_BKRH, lse_BKR = _merge_splits(out_BKSRH, lse_BKSR)
    return tokens(out_BKRH, T, N).astype(q_BTNH.dtype), tokens(lse_BKR, T, N)


def _kernel(
    lo_ref, hi_ref, q_ref, order_ref, k_ref, v_ref, among_ref, kd_ref, vd_ref, out_ref, lse_ref, *, splits, steps, block, scale, softcap
):  # fmt: skip
    """Attend one head's rows to one split of its slots, or to the draft."""
    b, kh, split = (pl.program_id(axis) for axis in range(3))
    lo_R1, hi_R1, q_RH = lo_ref[...][:, None], hi_ref[...][:, None], q_ref[...]

    def take_in(carry, slot_X, see_RX, k_ref, v_ref):
        seen_X = see_RX.astype(jnp.int32).max(0) > 0
        k_XH, v_XH = (load_slots(ref, b, kh, slot_X, seen_X) for ref in (k_ref, v_ref))
        return add(carry, q_RH, k_XH, v_XH, see_RX, scale, softcap)

    def stored(i, carry):
        slot_X = (split * steps + i) * block + jnp.arange(block)
        order_X = triton.load(order_ref.at[b, kh, slot_X], mask=slot_X < order_ref.shape[2], other=-1)
        return take_in(carry, slot_X, sees(order_X[None], lo_R1, hi_R1), k_ref, v_ref)

    def draft(i, carry):
        see_RX = among_ref[b, :, pl.ds(i * block, block)] > 0
        return take_in(carry, i * block + jnp.arange(block), see_RX, kd_ref, vd_ref)

    def walk(steps, step):
        return lambda: jax.lax.fori_loop(0, steps, step, start(q_RH.shape))

    carry = jax.lax.cond(split < splits, walk(steps, stored), walk(among_ref.shape[2] // block, draft))
    finish(carry, out_ref, lse_ref)
