"""flash_prefill for TPU (Mosaic): a block of query rows stays in VMEM while the blocks of stored rows that it may see pass by.

Grid (B, K, row blocks, steps). A step holds `ROWS` of the R = T * G query rows of one kv head (the heads of a group read the
same K, so they share its fetch), their bounds, and one block of `SLOTS` stored rows: K, V, and orders along the lanes. The running
softmax (kernels/running.py) stays in VMEM over the steps of a row block.

Which blocks pass by is a scalar-prefetched list for each row block: those with an order between the lowest lo and the highest
hi of the row block (or a sink), so under a causal mask half of all blocks are neither read nor multiplied, and under a window all
but a band. Places past the end of the list repeat its last block, which the pipeline does not fetch again.

As in decode_attention, K and V are taken as (H, slots) unless H is a multiple of 128: that is how XLA keeps them.

HBM bytes for each (B, K): (R / ROWS) * (rows seen by a row block) * 2 * H * itemsize, about R * C * H * itemsize / ROWS for a causal
prompt in whole; once R * 2 * H * itemsize for queries and output; and R * 1024 for the bounds and the log-sum-exp, whose
last dimensions a TPU pads to 128. ROWS operations a byte: 512 is twice what a v5e needs to be busy with products.
"""

from functools import partial

import jax
import jax.numpy as jnp

from tokeff.compat import pl, pltpu, tpu_params
from tokeff.kernels.blocks import listed, seen_blocks
from tokeff.kernels.decode_attention.pallas_tpu import MAX_TABLE, slots_on_lanes
from tokeff.kernels.rows import NOTHING, head_rows, round_up, token_rows, tokens
from tokeff.kernels.running import Running, add, cleaned, finish, scratch, start, visible

ROWS = 512
SLOTS = 512  # (ROWS, SLOTS) float32 scores take 1 MiB, and a few of them are alive at a time
MAX_CALLS = 16  # of the kernel, one after the other, where the lists of all row blocks exceed scalar memory
MAX_WIDTH = 256  # of a head: with it all of a step, twice, fits the 16 MiB of VMEM of a v5e


def refusal(q_BTNH, k_BKCH, v_BKCH, order_BKC, order_BC, lo_BT, hi_BT, *, scale, softcap, sinks, first, window, finite):
    """Return in one line why this kernel cannot take the call, or None."""
    if reason := unfit(q_BTNH, k_BKCH, v_BKCH):
        return reason
    if (calls := _calls(q_BTNH, k_BKCH, order_BC)) > MAX_CALLS:
        return f"lists of the blocks seen exceed the {MAX_TABLE} entries of scalar memory {calls} times, over {MAX_CALLS}"
    return None


def unfit(q_BTNH, k_BKCH, v_BKCH):
    """Return in one line what about dtypes and head size no kernel of this kind takes, or None."""
    if {q_BTNH.dtype, k_BKCH.dtype, v_BKCH.dtype} not in ({jnp.dtype("float32")}, {jnp.dtype("bfloat16")}):
        return f"q, k and v must all be float32 or all bfloat16, not {q_BTNH.dtype}, {k_BKCH.dtype}, {v_BKCH.dtype}"
    if (H := q_BTNH.shape[3]) > MAX_WIDTH:
        return f"head size {H} exceeds {MAX_WIDTH}, what VMEM holds"
    return None


def run(
    q_BTNH, k_BKCH, v_BKCH, order_BKC, order_BC, lo_BT, hi_BT, *, scale, softcap, sinks, first, window, finite, interpret=False
):  # fmt: skip
    """Same contract as the public op, for calls that `refusal` accepts. interpret: as of `pl.pallas_call`."""
    T, calls = q_BTNH.shape[1], _calls(q_BTNH, k_BKCH, order_BC)
    some = -(-T // calls)
    stored = k_BKCH, v_BKCH, order_BKC, order_BC
    one = partial(_call, scale=scale, softcap=softcap, sinks=sinks, finite=finite, interpret=interpret)
    parts = [one(q_BTNH[:, at], lo_BT[:, at], hi_BT[:, at], *stored) for at in (slice(a, a + some) for a in range(0, T, some))]
    return tuple(jnp.concatenate(x, axis=1) for x in zip(*parts)) if calls > 1 else parts[0]


def _calls(q_BTNH, k_BKCH, order_BC):
    """How many calls of the kernel, each over some of the queries, have lists that fit scalar memory."""
    (B, T, N, _), (_, K, C, _) = q_BTNH.shape, k_BKCH.shape
    blocks = -(-(T * N // K) // block_rows(T * N // K))
    each = B * (K if order_BC is None else 1) * -(-C // min(SLOTS, C))
    return -(-blocks // max(1, MAX_TABLE // each - 1))


def _call(q_BTNH, lo_BT, hi_BT, k_BKCH, v_BKCH, order_BKC, order_BC, *, scale, softcap, sinks, finite, interpret):
    """Return (out_BTNH, lse_BTN) of one call of the kernel."""
    (B, T, N, H), (K, C), on_lanes = q_BTNH.shape, k_BKCH.shape[1:3], slots_on_lanes(k_BKCH)
    rows, slots = block_rows(T * N // K), min(SLOTS, C)
    R, steps = round_up(T * N // K, rows), -(-C // slots)
    lo_BR, hi_BR = token_rows(lo_BT, N // K, R, 0), token_rows(hi_BT, N // K, R, NOTHING)
    order_BXC = order_BKC if order_BC is None else order_BC[:, None]
    order_BXC = jnp.pad(order_BXC, [(0, 0), (0, 0), (0, steps * slots - C)], constant_values=-1)
    heads = order_BXC.shape[1]
    lists = listed(seen_blocks(order_BXC, lo_BR, hi_BR, rows, slots, sinks))
    k, v = (x.swapaxes(2, 3) if on_lanes else x for x in (k_BKCH, v_BKCH))

    def row_spec(width):
        return pl.BlockSpec((None, None, rows, width), lambda b, k, i, j, *_: (b, k, i, 0))

    def slot_spec(shape, index):
        def at(b, k, i, j, count_ref, block_ref):
            return index(b, k, block_ref[entry(b, k, i, heads, R // rows) * steps + j])

        return pl.BlockSpec(shape, at)

    shape = (H, slots) if on_lanes else (slots, H)
    stored = slot_spec((None, None, *shape), lambda b, k, c: (b, k, 0, c) if on_lanes else (b, k, c, 0))
    out_BKRH, lse_BKR1 = pl.pallas_call(
        partial(
            _kernel, axis=int(on_lanes), heads=heads, tail=C if C % slots else None,
            finite=finite, scale=scale, softcap=softcap, sinks=sinks,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, K, R // rows, steps),
            in_specs=[
                pl.BlockSpec((None, rows, 2), lambda b, k, i, j, *_: (b, i, 0)),
                row_spec(H),
                slot_spec((None, None, 1, slots), lambda b, k, c: (b, k if heads > 1 else 0, 0, c)),
                stored,
                stored,
            ],
            out_specs=[row_spec(H), row_spec(1)],
            scratch_shapes=scratch(rows, H),
        ),
        out_shape=[jax.ShapeDtypeStruct((B, K, R, H), v.dtype), jax.ShapeDtypeStruct((B, K, R, 1), jnp.float32)],
        compiler_params=tpu_params("parallel", "parallel", "parallel", "arbitrary"),
        interpret=interpret,
        name="flash_prefill",
    )(*(x.reshape(-1) for x in lists), jnp.stack([lo_BR, hi_BR], -1), head_rows(q_BTNH, K, R), order_BXC[:, :, None], k, v)  # fmt: skip
    return tokens(out_BKRH, T, N), tokens(lse_BKR1, T, N)[..., 0]


def _kernel(
    count_ref, block_ref, bounds_ref, q_ref, order_ref, k_ref, v_ref, out_ref, lse_ref, *kept,
    axis, heads, tail, finite, scale, softcap, sinks,
):  # fmt: skip
    """One step of one row block. axis: of the slots in K and V. tail: rows there are, where the last block reaches beyond."""
    b, k, i, j = (pl.program_id(axis) for axis in range(4))
    place = entry(b, k, i, heads, pl.num_programs(2))
    steps, at = pl.num_programs(3), Running(*kept)

    @pl.when(j == 0)
    def _start():
        start(at, bounds_ref[...])

    @pl.when(j < count_ref[place])
    def _add_block():
        order_1X, v = order_ref[...], v_ref[...]
        see_RX = visible(order_1X, at, sinks)
        if not finite:
            v = cleaned(v, see_RX, axis)
        elif tail is not None:
            first = block_ref[place * steps + j] * order_1X.shape[1]
            v = jnp.where(jax.lax.broadcasted_iota(jnp.int32, v.shape, axis) < tail - first, v, 0)
        add(at, q_ref[...], k_ref[...], v, see_RX, axis, scale, softcap)

    @pl.when(j == steps - 1)
    def _finish():
        finish(at, out_ref, lse_ref)


def entry(b, k, i, heads, blocks):
    """The place of a row block among the lists; heads is 1 where all heads share theirs."""
    return (b * heads + (k if heads > 1 else 0)) * blocks + i


def block_rows(R):
    """How many query rows of a kv head a block holds."""
    return min(ROWS, round_up(R, 16))
