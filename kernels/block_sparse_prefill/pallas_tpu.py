"""block_sparse_prefill for TPU (Mosaic): a block of queries stays in VMEM while the blocks chosen for it pass by.

Grid (B, K, Q, steps). A step holds the R = size * G query rows of one block of queries and kv head, their bounds, `n` chosen blocks
of K and of V, each block an operand with its own index map, and the orders of their rows along the lanes; so many blocks that
the products are about `WIDTH` rows wide. The running softmax stays in VMEM over the steps, as in flash_prefill.

The blocks are a scalar-prefetched list, in ascending order. What is not on it is never read; places past its end repeat its last
block, which is not fetched again, and are not multiplied. Single rows are gathered to a compact copy first and walked over by the
same kernel; the two results are merged by log-sum-exp. A row whose block is read anyway counts there.

K and V lie as (rows, H): blocks are mostly smaller than the 128 rows that the other layout's tiles hold. Where H is no multiple of 128
XLA writes them that way first, once, small next to reading the same blocks for every block of queries.

HBM bytes for each (B, K): 2 * (blocks read) * size * H * itemsize + 4 a row read for orders, and Q * R * (2 * H * itemsize + 1024) for
queries, output, bounds and log-sum-exp.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from tokeff.compat import pl, pltpu, tpu_params
from tokeff.kernels.block_sparse_prefill.layout import chosen, query_blocks, query_tokens, rows_beside
from tokeff.kernels.decode_attention import merge
from tokeff.kernels.decode_attention.pallas_tpu import MAX_TABLE
from tokeff.kernels.decode_attention.xla import take
from tokeff.kernels.flash_prefill.pallas_tpu import unfit
from tokeff.kernels.rows import round_up
from tokeff.kernels.running import LANES, Running, add, cleaned, finish, scratch, start, visible

WIDTH = 256  # stored rows of a step, where so many are chosen
MAX_ROWS = 1024  # query rows of a block: their (rows, WIDTH) float32 scores take 1 MiB
MAX_CALLS = 16  # of the kernel, one after the other, where the lists of all query blocks exceed scalar memory


def refusal(q_BTNH, k_BKCH, v_BKCH, order_BKC, lo_BT, hi_BT, block_BKQM, row_BKM=None, *, size, scale, softcap, first, finite):
    """Return in one line why this kernel cannot take the call, or None."""
    if reason := unfit(q_BTNH, k_BKCH, v_BKCH):
        return reason
    tile = 32 // k_BKCH.dtype.itemsize
    if size % tile:
        return f"size {size} is not a multiple of {tile}, the rows of a {k_BKCH.dtype} tile"
    if (R := size * (q_BTNH.shape[2] // k_BKCH.shape[1])) > MAX_ROWS:
        return f"size * G = {R} query rows a block exceed {MAX_ROWS}"
    if size > WIDTH * 2:
        return f"size {size} exceeds {WIDTH * 2}, what VMEM holds of K and V"
    if _calls(block_BKQM, row_BKM) > MAX_CALLS:
        return f"lists of {block_BKQM.size} blocks, or of single rows, exceed {MAX_CALLS} times the {MAX_TABLE} entries of scalar memory"
    return None


def run(
    q_BTNH, k_BKCH, v_BKCH, order_BKC, lo_BT, hi_BT, block_BKQM, row_BKM=None, *,
    size, scale, softcap, first, finite, interpret=False,
):  # fmt: skip
    """Same contract as the public op, for calls that `refusal` accepts. interpret: as of `pl.pallas_call`."""
    (T, N), K, Q = q_BTNH.shape[1:3], k_BKCH.shape[1], block_BKQM.shape[2]
    q_BKQRH, bounds = query_blocks(q_BTNH, lo_BT, hi_BT, K, Q, size, 16)
    bounds_BQR2 = jnp.stack(bounds, -1)
    walk = partial(_walk, scale=scale, softcap=softcap, interpret=interpret)
    clean = not finite or order_BKC.shape[2] % size > 0  # beyond the last row lies anything
    single = None if row_BKM is None else _compact(k_BKCH, v_BKCH, order_BKC, block_BKQM, row_BKM, size)
    parts, some = [], -(-Q // _calls(block_BKQM, row_BKM))
    for at in (slice(a, a + some) for a in range(0, Q, some)):
        asked, lists = (q_BKQRH[:, :, at], bounds_BQR2[:, at]), chosen(block_BKQM[:, :, at], order_BKC, size)
        found = walk(*asked, k_BKCH, v_BKCH, *lists, size=size, clean=clean)
        if single is not None:
            k, v, *lists = single
            found = merge(*found, *walk(*asked, k, v, *(x[:, :, at] for x in lists), size=LANES, clean=not finite))
        parts.append(found)
    out_BKQRH, lse_BKQR = (jnp.concatenate(x, axis=2) for x in zip(*parts))
    return query_tokens(out_BKQRH, T, N, size).astype(v_BKCH.dtype), query_tokens(lse_BKQR, T, N, size)


def _compact(k_BKCH, v_BKCH, order_BKC, block_BKQM, row_BKM, size):
    """Return (k, v, count, block, order) of the single rows: a store of their own, all of whose blocks every query block reads."""
    row_BKM = jnp.pad(row_BKM, [(0, 0), (0, 0), (0, -row_BKM.shape[2] % LANES)], constant_values=-1)
    k, v = (jnp.where(row_BKM[..., None] >= 0, take(x, row_BKM), 0) for x in (k_BKCH, v_BKCH))
    order_BKQX = rows_beside(order_BKC, block_BKQM, row_BKM, size)
    blocks = row_BKM.shape[2] // LANES
    block = jnp.broadcast_to(jnp.arange(blocks, dtype=jnp.int32), (*block_BKQM.shape[:3], blocks))
    return k, v, jnp.full(block.shape[:3], blocks, jnp.int32), block, order_BKQX


def _walk(q_BKQRH, bounds_BQR2, k_BKCH, v_BKCH, count_BKQ, block_BKQM, order_BKQX, *, size, clean, scale, softcap, interpret):
    """Return float32 (out_BKQRH, lse_BKQR) of blocks of queries over the listed blocks."""
    (B, K, Q, R, H), M = q_BKQRH.shape, block_BKQM.shape[3]
    unit = LANES // math.gcd(size, LANES)  # blocks whose orders fill whole lane tiles
    n = min(round_up(M, unit), unit * max(1, WIDTH // (unit * size)))
    missing = -M % n
    block_BKQM = jnp.pad(block_BKQM, [(0, 0)] * 3 + [(0, missing)], mode="edge")
    order_BKQX = jnp.pad(order_BKQX, [(0, 0)] * 3 + [(0, missing * size)], constant_values=-1)
    places = M + missing

    def stored_spec(i):
        def at(b, k, q, j, count_ref, block_ref):
            return b, k, block_ref[((b * K + k) * Q + q) * places + j * n + i], 0

        return pl.BlockSpec((None, None, size, H), at)

    def row_spec(width):
        return pl.BlockSpec((None, None, None, R, width), lambda b, k, q, j, *_: (b, k, q, 0, 0))

    stored = [stored_spec(i) for i in range(n)]
    out_BKQRH, lse_BKQR1 = pl.pallas_call(
        partial(_kernel, n=n, clean=clean, scale=scale, softcap=softcap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, K, Q, places // n),
            in_specs=[
                pl.BlockSpec((None, None, R, 2), lambda b, k, q, j, *_: (b, q, 0, 0)),
                row_spec(H),
                pl.BlockSpec((None, None, None, 1, n * size), lambda b, k, q, j, *_: (b, k, q, 0, j)),
                *stored,
                *stored,
            ],
            out_specs=[row_spec(H), row_spec(1)],
            scratch_shapes=scratch(R, H),
        ),
        out_shape=[jax.ShapeDtypeStruct((B, K, Q, R, width), jnp.float32) for width in (H, 1)],
        compiler_params=tpu_params("parallel", "parallel", "parallel", "arbitrary"),
        interpret=interpret,
        name="block_sparse_prefill",
    )(count_BKQ.reshape(-1), block_BKQM.reshape(-1), bounds_BQR2, q_BKQRH, order_BKQX[:, :, :, None], *[k_BKCH] * n, *[v_BKCH] * n)
    return out_BKQRH, lse_BKQR1[..., 0]


def _kernel(count_ref, block_ref, bounds_ref, q_ref, order_ref, *refs, n, clean, scale, softcap):
    """One step of one block of queries. refs: n blocks of K, n of V, then out, lse, and the running softmax."""
    k_refs, v_refs, (out_ref, lse_ref, *kept) = refs[:n], refs[n : 2 * n], refs[2 * n :]
    b, k, q, j = (pl.program_id(axis) for axis in range(4))
    count, at = count_ref[(b * pl.num_programs(1) + k) * pl.num_programs(2) + q], Running(*kept)

    @pl.when(j == 0)
    def _start():
        start(at, bounds_ref[...])

    @pl.when(j * n < count)
    def _add_blocks():
        k, v = (jnp.concatenate([ref[...] for ref in blocks], 0) for blocks in (k_refs, v_refs))
        see_RX = visible(order_ref[...], at)
        v = cleaned(v, see_RX, 0) if clean else v
        add(at, q_ref[...], k, v, see_RX, 0, scale, softcap)

    @pl.when(j == pl.num_programs(3) - 1)
    def _finish():
        finish(at, out_ref, lse_ref)


def _calls(block_BKQM, row_BKM):
    B, K, Q, M = block_BKQM.shape
    M = M if row_BKM is None else max(M, -(-row_BKM.shape[2] // LANES))
    return max(1, -(-Q // max(1, MAX_TABLE // (B * K * M))))
