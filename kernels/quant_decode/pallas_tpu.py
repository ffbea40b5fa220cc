"""quant_decode for TPU (Mosaic): pages lie along the lanes, and codes become numbers in VMEM.

Grid (B, K, blocks of PAGES pages). A step holds the R = T * G query rows of one kv head and the codes of a block of pages as
(rows of a page, Z, pages): one row of every page is a (Z, pages) tile. Keys have a zero and a step a channel, (H, pages), which lines up
with every such tile; values have theirs a row and group, (rows of a page, Q, pages), spread over the sublanes of their group. Nothing
moves along the lanes: 8 / bits shifts of a tile give as many slices of H. A loop over the rows of a page makes the scores of the block;
after their maximum a second one adds up the values. Running maximum, sum and (R, H) output stay in VMEM over the blocks of a head.

Which blocks are fetched is a scalar-prefetched table, as in decode_attention's kernel: one that nobody can see is not read.

That is how XLA lays codes out whose Z is below 128, so nothing is copied on the way in. Codes of 128 bytes a row (8 bits at H = 128) have
Z along the lanes, and XLA copies them on every call: read, written and read again they move 3 bytes a number, where bfloat16 rows move 2:
int8 then saves memory and no time.

HBM bytes: for each (B, K) and row read, 2 * H * bits / 8 of codes, 4 * Q * itemsize and 4 for the order; 2 * H * itemsize a page.
The 5 operations a number (shift, mask, conversion, product, sum) bound a v5e at 4 bits sooner than its memory does.
"""

from functools import partial

import jax
import jax.numpy as jnp

from tokeff.compat import pl, pltpu, tpu_params
from tokeff.kernels.decode_attention.pallas_tpu import MAX_TABLE, _entry, _table
from tokeff.kernels.rows import NOTHING, head_rows, round_up, token_rows, tokens
from tokeff.kernels.running import LOW, mxu

PAGES = 128  # of a block: one lane each
MAX_SCORES = 2**13  # rows of a page times query rows: their float32 scores take 4 MiB
MAX_CODES = 2**13  # rows of a page times bytes of a row: 1 MiB a block, held four times


def refusal(
    q_BTNH, k_zero_BKPRQ, k_step_BKPRQ, v_zero_BKPRQ, v_step_BKPRQ, k_code_BKPRZ, v_code_BKPRZ, *_, bits, scale, softcap, finite=False
):  # fmt: skip
    """Return in one line why this kernel cannot take the call, or None."""
    H, (B, K, P, page_rows, Z) = q_BTNH.shape[3], k_code_BKPRZ.shape
    kinds = {x.dtype for x in (q_BTNH, k_zero_BKPRQ, k_step_BKPRQ, v_zero_BKPRQ, v_step_BKPRQ)}
    if kinds not in ({jnp.dtype("float32")}, {jnp.dtype("bfloat16")}):
        return f"q, zeros and steps must all be float32 or all bfloat16, not {', '.join(sorted(str(x) for x in kinds))}"
    if k_zero_BKPRQ.shape[3:] != (1, H) or (page_rows > 1 and v_zero_BKPRQ.shape[3] == 1):
        return "keys are not grouped by channel, or values not by row"
    piece = min(width := H // v_zero_BKPRQ.shape[4], Z)
    if piece % 8 or max(width, Z) % piece:
        return f"groups of {width} values and slices of {Z} do not divide into whole tiles of 8"
    if (n := page_rows * _rows(q_BTNH, K)) > MAX_SCORES:
        return f"T * G rows times the {page_rows} of a page are {n}: over {MAX_SCORES}, what VMEM holds"
    if page_rows * Z > MAX_CODES:
        return f"pages of {page_rows} rows of {Z} bytes exceed {MAX_CODES}, what VMEM holds of {PAGES} pages"
    if (n := B * K * -(-P // PAGES)) > MAX_TABLE:
        return f"a table of {n} blocks exceeds {MAX_TABLE} entries of scalar memory"
    return None


def run(
    q_BTNH, k_zero_BKPRQ, k_step_BKPRQ, v_zero_BKPRQ, v_step_BKPRQ, k_code_BKPRZ, v_code_BKPRZ, order_BKPR, lo_BT, hi_BT, *,
    bits, scale, softcap, finite=False, interpret=False,
):  # fmt: skip
    """Same contract as the public op, for calls that `refusal` accepts. interpret: as of `pl.pallas_call`."""
    (B, T, N, H), (K, P, page_rows) = q_BTNH.shape, order_BKPR.shape[1:]
    R, block = _rows(q_BTNH, K), min(PAGES, P)
    blocks, Q = -(-P // block), v_zero_BKPRQ.shape[4]
    bounds_BR2 = jnp.stack([token_rows(lo_BT, N // K, R, 0), token_rows(hi_BT, N // K, R, NOTHING)], -1)
    order_BKRP = jnp.pad(order_BKPR, [(0, 0), (0, 0), (0, blocks * block - P), (0, 0)], constant_values=-1).swapaxes(2, 3)
    live_BKRP = (order_BKRP >= lo_BT.min(1)[:, None, None, None]) & (order_BKRP <= hi_BT.max(1)[:, None, None, None])
    live_BKM = live_BKRP.reshape(B, K, page_rows, blocks, block).any((2, 4))
    table = _table(jnp.where(live_BKM, jnp.arange(blocks, dtype=jnp.int32), -1), 1)

    def page_spec(*dims):
        def index(b, k, j, table_ref):
            entry = table_ref[_entry(b, k, j, K, blocks)]
            return (b, k) + (0,) * len(dims) + (jnp.where(entry < 0, ~entry, entry),)

        return pl.BlockSpec((1, 1, *dims, block), index)

    def head_spec(width):
        return pl.BlockSpec((1, 1, R, width), lambda b, k, j, _: (b, k, 0, 0))

    codes = [jnp.moveaxis(x, 2, -1) for x in (k_code_BKPRZ, v_code_BKPRZ)]
    keys, values = ([jnp.moveaxis(x, 2, -1) for x in pair] for pair in ((k_zero_BKPRQ, k_step_BKPRQ), (v_zero_BKPRQ, v_step_BKPRQ)))
    Z = codes[0].shape[3]
    out_BKRH, lse_BKR1 = pl.pallas_call(
        partial(_kernel, bits=bits, scale=scale, softcap=softcap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, K, blocks),
            in_specs=[
                pl.BlockSpec((1, R, 2), lambda b, k, j, _: (b, 0, 0)),
                head_spec(H),
                *[page_spec(page_rows), page_spec(page_rows, Z), page_spec(page_rows, Z)],
                *[page_spec(H)] * 2,
                *[page_spec(page_rows, Q)] * 2,
            ],
            out_specs=[head_spec(H), head_spec(1)],
            scratch_shapes=[
                pltpu.VMEM((page_rows, R, block), jnp.float32),
                *[pltpu.VMEM((R, width), jnp.float32) for width in (1, 1, H)],
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((B, K, R, H), q_BTNH.dtype), jax.ShapeDtypeStruct((B, K, R, 1), jnp.float32)],
        compiler_params=tpu_params("parallel", "parallel", "arbitrary"),
        interpret=interpret,
        name="quant_decode",
    )(table, bounds_BR2, head_rows(q_BTNH, K, R), order_BKRP, *codes, *(x[:, :, 0] for x in keys), *values)
    return tokens(out_BKRH, T, N), tokens(lse_BKR1, T, N)[..., 0]


def _rows(q_BTNH, K):
    """Return the query rows of a kv head, to whole tiles."""
    return round_up(q_BTNH.shape[1] * q_BTNH.shape[2] // K, 32 // q_BTNH.dtype.itemsize)


def _kernel(table_ref, bounds_ref, q_ref, order_ref, k_ref, v_ref, k_zero_ref, k_step_ref, v_zero_ref, v_step_ref, out_ref, lse_ref,
            score_ref, top_ref, sum_ref, acc_ref, *, bits, scale, softcap):  # fmt: skip
    """One block of pages of one head."""
    b, k, j = (pl.program_id(axis) for axis in range(3))
    entry = _entry(b, k, j, pl.num_programs(1), pl.num_programs(2))
    page_rows, Z = k_ref.shape[2:4]

    @pl.when(j == 0)
    def _start():
        top_ref[...] = jnp.full_like(top_ref, LOW)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def see(row):
        order_1P, bounds_R2 = order_ref[0, 0, pl.ds(row, 1)], bounds_ref[0]
        return (order_1P >= bounds_R2[:, :1]) & (order_1P <= bounds_R2[:, 1:])

    def add_scores(row, top_R1):
        byte_ZP, score_RP = k_ref[0, 0, row].astype(jnp.int32), 0.0
        for i in range(8 // bits):
            here = pl.ds(i * Z, Z)
            key_ZP = k_zero_ref[0, 0, here].astype(jnp.float32) + k_step_ref[0, 0, here].astype(jnp.float32) * _codes(byte_ZP, i, bits)
            score_RP += mxu(q_ref[0, 0, :, here], key_ZP.astype(q_ref.dtype), 1, 0)
        score_RP = score_RP * scale
        if softcap:
            score_RP = softcap * jnp.tanh(score_RP / softcap)
        score_RP = jnp.where(see(row), score_RP, LOW)
        score_ref[row] = score_RP
        return jnp.maximum(top_R1, score_RP.max(1, keepdims=True))

    def add_values(row, _):
        see_RP = see(row)
        p_RP = jnp.where(see_RP, jnp.exp(score_ref[row] - top_ref[...]), 0)
        sum_ref[...] += p_RP.sum(1, keepdims=True)
        seen_1P = see_RP.astype(jnp.float32).max(0, keepdims=True) > 0
        byte_ZP = v_ref[0, 0, row].astype(jnp.int32)
        for i in range(8 // bits):
            zero_ZP, step_ZP = (_spread(ref, row, i * Z, Z, q_ref.shape[3]) for ref in (v_zero_ref, v_step_ref))
            v_ZP = jnp.where(seen_1P, zero_ZP + step_ZP * _codes(byte_ZP, i, bits), 0)  # 0 * NaN is NaN
            acc_ref[:, pl.ds(i * Z, Z)] += mxu(p_RP.astype(q_ref.dtype), v_ZP.astype(q_ref.dtype), 1, 1)

    @pl.when(table_ref[entry] >= 0)
    def _add_block():
        old_R1 = top_ref[...]
        top_ref[...] = jax.lax.fori_loop(0, page_rows, add_scores, old_R1)
        decay_R1 = jnp.exp(old_R1 - top_ref[...])
        sum_ref[...] *= decay_R1
        acc_ref[...] *= decay_R1
        jax.lax.fori_loop(0, page_rows, add_values, None)

    @pl.when(j == pl.num_programs(2) - 1)
    def _finish():
        some_R1 = sum_ref[...] > 0
        sum_R1 = jnp.where(some_R1, sum_ref[...], 1)
        out_ref[0, 0] = (acc_ref[...] / sum_R1).astype(out_ref.dtype)
        lse_ref[0, 0] = jnp.where(some_R1, top_ref[...] + jnp.log(sum_R1), -jnp.inf)


def _codes(byte_ZP, i, bits):
    """Return the i-th slice of the numbers that bytes hold, as float32."""
    return ((byte_ZP >> (bits * i)) & (2**bits - 1)).astype(jnp.float32)


def _spread(ref, row, first, Z, H):
    """Return what the groups of numbers first to first + Z of a row hold, once a number: (Z, pages)."""
    Q, P = ref.shape[3:]
    piece = min(H // Q, Z)
    parts = [ref[0, 0, row, pl.ds((first + at) // (H // Q), 1)].astype(jnp.float32) for at in range(0, Z, piece)]
    return jnp.concatenate([jnp.broadcast_to(part, (piece, P)) for part in parts], 0)
