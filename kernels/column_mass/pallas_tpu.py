"""column_mass for TPU (Mosaic): a block of columns stays in VMEM while all queries pass by.

Grid (B, K, column blocks, row blocks). A step holds `X` rows of K (as in decode_attention's kernel, (H, X) unless H is
a multiple of 128), resident over the row blocks, and one block of the
R = T * G query rows of the kv head with their bounds, log-sum-exp and weight; it adds its columns to an (1, X) float32
output block that also stays. Pairs of blocks that cannot see each other cost a fetch of queries but no product.

HBM bytes: C * H * itemsize for each (B, K), plus the queries (R * (H * itemsize + 1024 for the two padded side arrays))
once per column block: the larger X, the fewer passes.
"""

from functools import partial

import jax
import jax.numpy as jnp

from tokeff.compat import pl, tpu_params
from tokeff.kernels.decode_attention.pallas_tpu import masked_scores, slots_on_lanes, visible
from tokeff.kernels.rows import NOTHING, head_rows, round_up, token_rows

COLUMNS = 1024  # slots of a block
ROWS = 256  # query rows of a block: (ROWS, COLUMNS) float32 scores take 1 MiB


def refusal(q_BTNH, k_BKCH, *_, scale, softcap):
    """Return in one line why this kernel cannot take the call, or None."""
    if {q_BTNH.dtype, k_BKCH.dtype} not in ({jnp.dtype("float32")}, {jnp.dtype("bfloat16")}):
        return f"q and k must both be float32 or both bfloat16, not {q_BTNH.dtype} and {k_BKCH.dtype}"
    return None


def run(q_BTNH, k_BKCH, lse_BTN, weight_BT, order_BKC, lo_BT, hi_BT, *, scale, softcap, interpret=False):
    """Same contract as the public op, for calls that `refusal` accepts. interpret: as of `pl.pallas_call`."""
    (B, T, N, H), (K, C) = q_BTNH.shape, order_BKC.shape[1:]
    rows = min(ROWS, round_up(T * N // K, 16))
    R = round_up(T * N // K, rows)
    X = min(COLUMNS, C)
    blocks, on_lanes = -(-C // X), slots_on_lanes(k_BKCH)
    order_BK1C = jnp.pad(order_BKC, [(0, 0), (0, 0), (0, blocks * X - C)], constant_values=-1)[:, :, None]
    bounds_BR2 = jnp.stack([token_rows(lo_BT, N // K, R, 0), token_rows(hi_BT, N // K, R, NOTHING)], -1)
    weight_BTN = jnp.broadcast_to(weight_BT.astype(jnp.float32)[..., None], lse_BTN.shape)
    side_BKR2 = head_rows(jnp.stack([lse_BTN, weight_BTN], -1), K, R)

    def lane_spec(height):
        return pl.BlockSpec((1, 1, height, X), lambda b, k, c, r: (b, k, 0, c))

    def row_spec(width):
        return pl.BlockSpec((1, 1, rows, width), lambda b, k, c, r: (b, k, r, 0))

    mass_BK1C = pl.pallas_call(
        partial(_kernel, axis=int(on_lanes), scale=scale, softcap=softcap),
        grid=(B, K, blocks, R // rows),
        in_specs=[
            pl.BlockSpec((1, rows, 2), lambda b, k, c, r: (b, r, 0)),
            row_spec(2),
            row_spec(H),
            lane_spec(1),
            lane_spec(H) if on_lanes else pl.BlockSpec((1, 1, X, H), lambda b, k, c, r: (b, k, c, 0)),
        ],
        out_specs=lane_spec(1),
        out_shape=jax.ShapeDtypeStruct((B, K, 1, blocks * X), jnp.float32),
        compiler_params=tpu_params("parallel", "parallel", "parallel", "arbitrary"),
        interpret=interpret,
        name="column_mass",
    )(bounds_BR2, side_BKR2, head_rows(q_BTNH, K, R), order_BK1C, k_BKCH.swapaxes(2, 3) if on_lanes else k_BKCH)
    return mass_BK1C[:, :, 0, :C]


def _kernel(bounds_ref, side_ref, q_ref, order_ref, k_ref, mass_ref, *, axis, scale, softcap):
    """Add one block of rows to one block of columns. axis: of the slots in K."""

    @pl.when(pl.program_id(3) == 0)
    def _start():
        mass_ref[...] = jnp.zeros_like(mass_ref)

    see_RX = visible(order_ref[0, 0], bounds_ref[0])

    @pl.when(jnp.any(see_RX))
    def _add_rows():
        lse_R1, weight_R1 = side_ref[0, 0, :, :1], side_ref[0, 0, :, 1:]
        score_RX = masked_scores(q_ref[0, 0], k_ref[0, 0], axis, see_RX, scale, softcap)
        p_RX = jnp.where(see_RX, jnp.exp(score_RX - lse_R1), 0)
        mass_ref[0, 0] += (p_RX * weight_R1).sum(0, keepdims=True)
