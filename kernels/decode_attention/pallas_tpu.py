"""decode_attention for TPU (Mosaic): one pass over the pages that are read, with a running softmax.

Grid (B, K, steps). A step holds the R = T * G query rows of one kv head (resident over all its steps), `n` pages of K
and of V, each page an operand with its own index map, and the orders of their slots along the lanes. The running
softmax (kernels/running.py) stays in VMEM over the steps of a head.

Which pages a step fetches is a scalar-prefetched table, so a page that is not selected is never read. Without page_BKM
the pages are blocks of slots, one a step, and the table drops the blocks that hold no slot between the lowest lo and
the highest hi: the empty tail of a cache is not read either. A dropped entry repeats the page its operand holds
already, which the pipeline does not fetch again.

Along the lanes, 128 wide, lies H where it is a multiple of 128. Any other H would waste lanes, so XLA keeps such a
cache with C along the lanes; the kernel then takes K and V as (H, slots), which is that layout and costs no copy. A
page must be whole tiles of it: 128 slots there, 8 (float32) or 16 (bfloat16) otherwise.

HBM bytes: 2 * (slots read) * H * itemsize for each (B, K), plus 4 a slot for orders.
"""

import functools
import math
from functools import partial

import jax
import jax.numpy as jnp

from tokeff.compat import pl, pltpu, tpu_params
from tokeff.kernels.decode_attention.xla import take_orders
from tokeff.kernels.rows import NOTHING, head_rows, round_up, token_rows, tokens
from tokeff.kernels.running import LANES, Running, add, cleaned, finish, scratch, start, visible

MAX_ROWS = 1024
MAX_TABLE = 2**16  # page table entries; SMEM holds 1 MiB in all
MAX_STEP = 2**19  # elements of a page of K, and of its scores: all of a step, twice, fits the 16 MiB of VMEM of a v5e


def refusal(q_BTNH, k_BKCH, v_BKCH, order_BKC, lo_BT, hi_BT, page_BKM=None, bias_BKC=None, *, page_size, scale, softcap, finite=False):
    """Return in one line why this kernel cannot take the call, or None."""
    if bias_BKC is not None:
        return "a bias of stored rows is not built in"
    (_, T, N, H), (B, K, C, _) = q_BTNH.shape, k_BKCH.shape
    R, dtype = T * N // K, k_BKCH.dtype
    if {q_BTNH.dtype, dtype, v_BKCH.dtype} not in ({jnp.dtype("float32")}, {jnp.dtype("bfloat16")}):
        return f"q, k and v must all be float32 or all bfloat16, not {q_BTNH.dtype}, {dtype}, {v_BKCH.dtype}"
    if R > MAX_ROWS:
        return f"T * G = {R} query rows a kv head exceed {MAX_ROWS}"
    pages = B * K * -(-C // _block_slots(C, R)) if page_BKM is None else page_BKM.size
    if pages > MAX_TABLE:
        return f"a table of {pages} pages exceeds {MAX_TABLE} entries of scalar memory"
    tile = LANES if slots_on_lanes(k_BKCH) else _sublanes(dtype)
    if page_BKM is not None and page_size % tile:
        return f"page_size {page_size} is not a multiple of {tile}, the slots of a {dtype} tile at H = {H}"
    if page_BKM is not None and page_size * max(R, H) > MAX_STEP:
        return f"page_size {page_size} times {max(R, H)}, the larger of T * G and H, exceeds {MAX_STEP}, what VMEM holds"
    return None


def run(
    q_BTNH, k_BKCH, v_BKCH, order_BKC, lo_BT, hi_BT, page_BKM=None, bias_BKC=None, *,
    page_size, scale, softcap, finite=False, interpret=False,
):  # fmt: skip
    """Same contract as the public op, for calls that `refusal` accepts. interpret: as of `pl.pallas_call`."""
    (B, T, N, H), K = q_BTNH.shape, k_BKCH.shape[1]
    R = round_up(T * N // K, _sublanes(q_BTNH.dtype))
    bounds_BR2 = jnp.stack([token_rows(lo_BT, N // K, R, 0), token_rows(hi_BT, N // K, R, NOTHING)], -1)
    if page_BKM is None:
        page_size, n = _block_slots(order_BKC.shape[2], R), 1
        page_BKM, order_BKX = _live_blocks(order_BKC, lo_BT, hi_BT, page_size)
    else:
        n = LANES // math.gcd(page_size, LANES)  # pages a step, so that their orders fill whole lane tiles
        page_BKM, order_BKX = _pad_pages(page_BKM, order_BKC, page_size, n)
    steps, on_lanes = page_BKM.shape[2] // n, slots_on_lanes(k_BKCH)
    k, v = (x.swapaxes(2, 3) if on_lanes else x for x in (k_BKCH, v_BKCH))
    clean = not finite or k_BKCH.shape[2] % page_size > 0  # beyond the last slot lies anything

    def page_spec(i):
        def index(b, k, j, table_ref):
            entry = table_ref[_entry(b, k, j, K, steps) * n + i]
            page = jnp.where(entry < 0, ~entry, entry)
            return (b, k, 0, page) if on_lanes else (b, k, page, 0)

        return pl.BlockSpec((None, None, H, page_size) if on_lanes else (None, None, page_size, H), index)

    def head_spec(width):
        return pl.BlockSpec((None, None, R, width), lambda b, k, j, _: (b, k, 0, 0))

    pages = [page_spec(i) for i in range(n)]
    out_BKRH, lse_BKR1 = pl.pallas_call(
        partial(_kernel, n=n, axis=int(on_lanes), clean=clean, scale=scale, softcap=softcap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, K, steps),
            in_specs=[
                pl.BlockSpec((None, R, 2), lambda b, k, j, _: (b, 0, 0)),
                head_spec(H),
                pl.BlockSpec((None, None, 1, n * page_size), lambda b, k, j, _: (b, k, 0, j)),
                *pages,
                *pages,
            ],
            out_specs=[head_spec(H), head_spec(1)],
            scratch_shapes=scratch(R, H),
        ),
        out_shape=[jax.ShapeDtypeStruct((B, K, R, H), q_BTNH.dtype), jax.ShapeDtypeStruct((B, K, R, 1), jnp.float32)],
        compiler_params=tpu_params("parallel", "parallel", "arbitrary"),
        interpret=interpret,
        name="decode_attention",
    )(_table(page_BKM, n), bounds_BR2, head_rows(q_BTNH, K, R), order_BKX[:, :, None], *[k] * n, *[v] * n)
    return tokens(out_BKRH, T, N), tokens(lse_BKR1, T, N)[..., 0]


def _kernel(table_ref, bounds_ref, q_ref, order_ref, *refs, n, axis, clean, scale, softcap):
    """One step of one head. refs: n pages of K, n of V, then out, lse, and the running softmax. axis: of the slots in a page."""
    k_refs, v_refs, (out_ref, lse_ref, *kept) = refs[:n], refs[n : 2 * n], refs[2 * n :]
    b, k, j = (pl.program_id(axis) for axis in range(3))
    first, at = _entry(b, k, j, pl.num_programs(1), pl.num_programs(2)) * n, Running(*kept)

    @pl.when(j == 0)
    def _start():
        start(at, bounds_ref[...])

    @pl.when(functools.reduce(jnp.logical_or, [table_ref[first + i] >= 0 for i in range(n)]))
    def _add_pages():
        k, v = (jnp.concatenate([ref[...] for ref in page], axis) for page in (k_refs, v_refs))
        see_RX = visible(order_ref[...], at)
        add(at, q_ref[...], k, cleaned(v, see_RX, axis) if clean else v, see_RX, axis, scale, softcap)

    @pl.when(j == pl.num_programs(2) - 1)
    def _finish():
        finish(at, out_ref, lse_ref)


def _live_blocks(order_BKC, lo_BT, hi_BT, slots):
    """Cut the cache into blocks of `slots`: (block numbers, -1 for one that nobody can see, padded orders)."""
    order_BKX = _pad_last(order_BKC, round_up(order_BKC.shape[2], slots))
    lo_B11, hi_B11 = lo_BT.min(1)[:, None, None], hi_BT.max(1)[:, None, None]
    live_BKM = ((order_BKX >= lo_B11) & (order_BKX <= hi_B11)).reshape(*order_BKX.shape[:2], -1, slots).any(-1)
    return jnp.where(live_BKM, jnp.arange(live_BKM.shape[2], dtype=jnp.int32), -1), order_BKX


def _pad_pages(page_BKM, order_BKC, page_size, n):
    """Pad the pages to a multiple of n with -1, and gather their orders (4 bytes a slot, next to 2 * H * itemsize)."""
    page_BKM = _pad_last(page_BKM, round_up(page_BKM.shape[2], n))
    return page_BKM, take_orders(order_BKC, page_BKM, page_size)


def _table(page_BKM, n):
    """Return the page table, flat. A missing page is ~p, with p the page fetched one step before at its place."""
    B, K, M = page_BKM.shape
    page_BKJn = page_BKM.reshape(B, K, M // n, n)
    step_J1 = jnp.arange(M // n)[:, None]
    last_BKJn = jax.lax.cummax(jnp.where(page_BKJn >= 0, step_J1, 0), axis=2)
    held_BKJn = jnp.maximum(jnp.take_along_axis(page_BKJn, last_BKJn, 2), 0)
    return jnp.where(page_BKJn >= 0, page_BKJn, ~held_BKJn).reshape(-1)


def _entry(b, k, j, K, steps):
    return (b * K + k) * steps + j


def _block_slots(C, R):
    """Return how many slots a block holds: enough to hide the cost of a step, few enough for (R, slots) scores."""
    return min(C, max(LANES, min(1024, 2**18 // R // LANES * LANES)))


def slots_on_lanes(k_BKCH):
    """Return whether XLA lays a cache of this shape out with its slots, not H, along the lanes."""
    return k_BKCH.shape[3] % LANES != 0


def _sublanes(dtype):
    return 32 // jnp.dtype(dtype).itemsize


def _pad_last(x, n):
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, n - x.shape[-1])], constant_values=-1)
