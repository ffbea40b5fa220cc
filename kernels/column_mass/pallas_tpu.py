"""column_mass for TPU (Mosaic): a block of query rows stays in VMEM while the stored rows that it may see pass by.

Grid (B, K, row blocks, column blocks). A step holds `ROWS` of the R = T * G query rows of a kv head, with their bounds, log-sum-exp and
weight spread over the lanes once a row block (kernels/running.py says why), and X rows of K with their orders along the lanes (as in
decode_attention's kernel, (H, X) unless H is a multiple of 128). It adds their columns to the (C / X, X) float32 of mass, which stay over
all row blocks of a head.

Which blocks can see each other is known from the lowest and highest order of each, scalar-prefetched: a mask in registers would take longer
to ask than its product takes. Before the first block of columns that a row block may see, and behind the last, that one is named again
and not fetched.

HBM bytes: for each (B, K) the queries once (R * (H * itemsize + 1024 for the two padded side arrays)), and (R / ROWS) * (rows seen by a
row block) * H * itemsize.
"""

from functools import partial

import jax
import jax.numpy as jnp

from tokeff.compat import pl, pltpu, tpu_params
from tokeff.kernels.blocks import FAR
from tokeff.kernels.decode_attention.pallas_tpu import MAX_TABLE, _block_slots, slots_on_lanes
from tokeff.kernels.rows import NOTHING, head_rows, round_up, token_rows
from tokeff.kernels.running import LANES, across, mxu

ROWS = 512  # query rows of a block: (ROWS, 512) float32 scores take 1 MiB


def refusal(q_BTNH, k_BKCH, *_, scale, softcap):
    """Return in one line why this kernel cannot take the call, or None."""
    if {q_BTNH.dtype, k_BKCH.dtype} not in ({jnp.dtype("float32")}, {jnp.dtype("bfloat16")}):
        return f"q and k must both be float32 or both bfloat16, not {q_BTNH.dtype} and {k_BKCH.dtype}"
    (B, T, N, _), (_, K, C, _) = q_BTNH.shape, k_BKCH.shape
    rows, X = _sizes(T * N // K, C)
    if (n := B * K * (-(-T * N // K // rows) + -(-C // X))) > MAX_TABLE:
        return f"ranges of {n} blocks exceed {MAX_TABLE} entries of scalar memory"
    return None


def run(q_BTNH, k_BKCH, lse_BTN, weight_BT, order_BKC, lo_BT, hi_BT, *, scale, softcap, interpret=False):
    """Same contract as the public op, for calls that `refusal` accepts. interpret: as of `pl.pallas_call`."""
    (B, T, N, H), (K, C) = q_BTNH.shape, order_BKC.shape[1:]
    rows, X = _sizes(T * N // K, C)
    R, blocks, on_lanes = round_up(T * N // K, rows), -(-C // X), slots_on_lanes(k_BKCH)
    order_BKC = jnp.pad(order_BKC, [(0, 0), (0, 0), (0, blocks * X - C)], constant_values=-1)
    lo_BR, hi_BR = token_rows(lo_BT, N // K, R, 0), token_rows(hi_BT, N // K, R, NOTHING)
    weight_BTN = jnp.broadcast_to(weight_BT.astype(jnp.float32)[..., None], lse_BTN.shape)
    side_BKR2 = head_rows(jnp.stack([lse_BTN, weight_BTN], -1), K, R)
    spans, (first_BKI, last_BKI) = _ranges(order_BKC, lo_BR, hi_BR, X, rows)

    def row_spec(width):
        return pl.BlockSpec((None, None, rows, width), lambda b, k, i, j, *_: (b, k, i, 0))

    def slot_spec(shape, lanes):
        def at(b, k, i, j, first_ref, last_ref, *_):
            place = (b * K + k) * (R // rows) + i
            block = jnp.clip(j, first_ref[place], last_ref[place])
            return (b, k, 0, block) if lanes else (b, k, block, 0)

        return pl.BlockSpec((None, None, *shape), at)

    mass_BKJX = pl.pallas_call(
        partial(_kernel, axis=int(on_lanes), scale=scale, softcap=softcap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(B, K, R // rows, blocks),
            in_specs=[
                pl.BlockSpec((None, rows, 2), lambda b, k, i, j, *_: (b, i, 0)),
                row_spec(2),
                row_spec(H),
                slot_spec((1, X), True),
                slot_spec((H, X) if on_lanes else (X, H), on_lanes),
            ],
            out_specs=pl.BlockSpec((None, None, blocks, X), lambda b, k, i, j, *_: (b, k, 0, 0)),
            scratch_shapes=[pltpu.VMEM((rows, LANES), kind) for kind in (jnp.int32, jnp.int32, jnp.float32, jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((B, K, blocks, X), jnp.float32),
        compiler_params=tpu_params("parallel", "parallel", "arbitrary", "arbitrary"),
        interpret=interpret,
        name="column_mass",
    )(
        *(x.reshape(-1) for x in (first_BKI, last_BKI, *spans)), jnp.stack([lo_BR, hi_BR], -1), side_BKR2, head_rows(q_BTNH, K, R),
        order_BKC[:, :, None], k_BKCH.swapaxes(2, 3) if on_lanes else k_BKCH,
    )  # fmt: skip
    return mass_BKJX.reshape(B, K, -1)[..., :C]


def _sizes(R, C):
    """Return how many rows and how many columns a block has."""
    rows = min(ROWS, round_up(R, 16))
    return rows, _block_slots(C, rows)


def _ranges(order_BKC, lo_BR, hi_BR, X, rows):
    """Return ((low_BKJ, high_BKJ, lo_BI, hi_BI), (first_BKI, last_BKI)): the orders in each block of columns and those that a block of
    rows sees, lowest and highest; and the blocks of columns between which all lie that a block of rows sees."""
    B, K, _ = order_BKC.shape
    some_BR, order_BKJX = lo_BR <= hi_BR, order_BKC.reshape(B, K, -1, X)
    low_BKJ, high_BKJ = jnp.where(order_BKJX < 0, FAR, order_BKJX).min(-1), order_BKJX.max(-1)
    lo_BI = jnp.where(some_BR, lo_BR, FAR).reshape(B, -1, rows).min(-1)
    hi_BI = jnp.where(some_BR, hi_BR, NOTHING).reshape(B, -1, rows).max(-1)
    live_BKIJ = (lo_BI[:, None, :, None] <= high_BKJ[:, :, None]) & (low_BKJ[:, :, None] <= hi_BI[:, None, :, None])
    j_J = jnp.arange(low_BKJ.shape[2], dtype=jnp.int32)
    last_BKI = jnp.where(live_BKIJ, j_J, 0).max(-1)
    return (low_BKJ, high_BKJ, lo_BI, hi_BI), (jnp.minimum(jnp.where(live_BKIJ, j_J, FAR).min(-1), last_BKI), last_BKI)


def _kernel(
    first_ref, last_ref, low_ref, high_ref, lo_ref, hi_ref, bounds_ref, side_ref, q_ref, order_ref, k_ref, mass_ref, *kept,
    axis, scale, softcap,
):  # fmt: skip
    """Add one block of rows to one block of columns. axis: of the slots in K. kept: bounds, log-sum-exp and weight in every lane."""
    b, k, i, j = (pl.program_id(axis) for axis in range(4))
    rows, columns = b * pl.num_programs(2) + i, (b * pl.num_programs(1) + k) * pl.num_programs(3) + j

    @pl.when((i == 0) & (j == 0))
    def _start():
        mass_ref[...] = jnp.zeros_like(mass_ref)

    @pl.when(j == 0)
    def _spread():
        numbers = *jnp.split(bounds_ref[...], 2, 1), *jnp.split(side_ref[...], 2, 1)
        for ref, x_R1 in zip(kept, numbers):
            ref[...] = jnp.broadcast_to(x_R1, ref.shape)

    @pl.when((lo_ref[rows] <= high_ref[columns]) & (low_ref[columns] <= hi_ref[rows]))
    def _add_rows():
        order_1X = order_ref[...]
        lo_RX, hi_RX, lse_RX, weight_RX = (across(ref[...], order_1X.shape[1]) for ref in kept)
        score_RX = mxu(q_ref[...], k_ref[...], 1, 1 - axis) * scale
        if softcap:
            score_RX = softcap * jnp.tanh(score_RX / softcap)
        see_RX = (order_1X >= lo_RX) & (order_1X <= hi_RX)
        p_RX = jnp.where(see_RX, jnp.exp(score_RX - lse_RX), 0)  # whatever NaN the slot held
        mass_ref[pl.ds(j, 1)] += (p_RX * weight_RX).sum(0, keepdims=True)
