"""compact_rows for TPU (Mosaic): DMAs of tiles into VMEM, rows moved there, tiles written back over the cache.

Grid (B, K). Memory is addressed in tiles: 8 (float32) or 16 (bfloat16) slots, or 128 where H is not a multiple of 128 and C lies along
the lanes (see decode_attention's kernel). A step starts the copies of every tile that a row comes from and of every tile that a row
goes to, once each, and waits for them all; only then does it move rows between tiles, and write the latter back. So all is read before
anything is written, and the copies of a head are in flight together. The caches are their own output. A draft is filled up to whole
tiles by XLA first.

HBM bytes: for each row 2 tiles (K and V) read; for each tile that rows go to, 2 read and 2 written. Whole tiles are 8 to 128 times the
rows: the floor is reached only where rows go to neighbouring slots from neighbouring ones, as in compaction.
"""

from functools import partial

import jax
import jax.numpy as jnp

from tokeff.compat import pl, pltpu, tpu_params
from tokeff.kernels.decode_attention.pallas_tpu import slots_on_lanes
from tokeff.kernels.rows import round_up
from tokeff.kernels.running import LANES

MAX_TABLE = 2**16  # entries of the three tables together, in scalar memory
MAX_HELD = 2**23  # bytes of tiles in VMEM


def refusal(k_BKCH, v_BKCH, k_BKWH, v_BKWH, from_BKM, to_BKM):
    """Return in one line why this kernel cannot take the call, or None."""
    H, C, dtype = k_BKCH.shape[3], k_BKCH.shape[2], k_BKCH.dtype
    if dtype not in ("float32", "bfloat16"):
        return f"k and v must be float32 or bfloat16, not {dtype}"
    if C % (tile := _tile(k_BKCH)):
        return f"{C} slots are not whole tiles of {tile}, those of {dtype} at H = {H}"
    if (held := 4 * from_BKM.shape[2] * tile * H * k_BKCH.dtype.itemsize) > MAX_HELD:
        return f"{from_BKM.shape[2]} rows hold {held} bytes of tiles: over {MAX_HELD}, what VMEM holds"
    if (n := 3 * from_BKM.size) > MAX_TABLE:
        return f"tables of {n} slots exceed {MAX_TABLE} entries of scalar memory"
    return None


def run(k_BKCH, v_BKCH, k_BKWH, v_BKWH, from_BKM, to_BKM, *, interpret=False):
    """Same contract as the public op, for calls that `refusal` accepts. interpret: as of `pl.pallas_call`."""
    (B, K, _, H), M = k_BKCH.shape, from_BKM.shape[2]
    tile, on_lanes = _tile(k_BKCH), slots_on_lanes(k_BKCH)
    real_BKM = (from_BKM >= 0) & (to_BKM >= 0)
    from_BKM, to_BKM = (jnp.where(real_BKM, x, -1).astype(jnp.int32) for x in (from_BKM, to_BKM))
    tile_BKM = jnp.where(real_BKM, to_BKM // tile, -1)
    home_BKM = jnp.argmax(tile_BKM[..., None] == tile_BKM[:, :, None], -1).astype(jnp.int32)  # who holds the tile that a row goes to
    draft = [jnp.pad(x, [(0, 0), (0, 0), (0, round_up(x.shape[2], tile) - x.shape[2]), (0, 0)]) for x in (k_BKWH, v_BKWH) if x is not None]
    k, v, *draft = (x.swapaxes(2, 3) if on_lanes else x for x in (k_BKCH, v_BKCH, *draft))
    whole, held = pl.BlockSpec(memory_space=pl.ANY), pltpu.VMEM((2, M, H, tile) if on_lanes else (2, M, tile, H), k.dtype)
    k, v = pl.pallas_call(
        partial(_kernel, M=M, tile=tile, axis=int(on_lanes)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, K),
            in_specs=[whole] * (2 + len(draft)),
            out_specs=[whole] * 2,
            scratch_shapes=[held, held, pltpu.SemaphoreType.DMA],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        input_output_aliases={3: 0, 4: 1},
        compiler_params=tpu_params("arbitrary", "arbitrary"),
        interpret=interpret,
        name="compact_rows",
    )(*(x.reshape(-1) for x in (from_BKM, to_BKM, home_BKM)), k, v, *draft)
    return (k.swapaxes(2, 3), v.swapaxes(2, 3)) if on_lanes else (k, v)


def _tile(k_BKCH):
    """Return the slots of a tile."""
    return LANES if slots_on_lanes(k_BKCH) else 32 // k_BKCH.dtype.itemsize


def _kernel(from_ref, to_ref, home_ref, _k_ref, _v_ref, *refs, M, tile, axis):
    """Move the rows of one head. axis: of the slots in a tile. refs: K and V of a draft, if there is one, then of the cache; the tiles of
    both that rows come from, and that they go to; a semaphore."""
    *stored, source_ref, goal_ref, sem = refs
    b, k = pl.program_id(0), pl.program_id(1)
    first = (b * pl.num_programs(1) + k) * M

    def at(ref, slot):
        here = pl.ds(pl.multiple_of(jax.lax.div(slot, tile) * tile, tile), tile)
        return ref.at[b, k, :, here] if axis else ref.at[b, k, here]

    def copies(m, slot_ref, held_ref, back=False):
        for i, ref in enumerate(stored[:2] if held_ref is source_ref else stored[-2:]):
            there, held = at(ref, slot_ref[first + m]), held_ref.at[i, m]
            yield pltpu.make_async_copy(*((held, there) if back else (there, held)), sem)

    def each(do, own_tile=False):
        def body(m, _):
            wanted = to_ref[first + m] >= 0
            if own_tile:
                wanted &= home_ref[first + m] == m
            pl.when(wanted)(lambda: do(m))

        jax.lax.fori_loop(0, M, body, None)

    def start(*args):
        def each_copy(m):
            for copy in copies(m, *args):
                copy.start()

        return each_copy

    def wait(*args):
        def each_copy(m):
            for copy in copies(m, *args):
                copy.wait()

        return each_copy

    def move(m):
        source, goal = (jax.lax.rem(ref[first + m], tile) for ref in (from_ref, to_ref))
        home = home_ref[first + m]
        for i in range(2):
            tile_XX = source_ref[i, m].astype(jnp.float32)
            turned_XX = pltpu.roll(tile_XX, jax.lax.rem(goal - source + tile, tile), axis)
            here_XX = jax.lax.broadcasted_iota(jnp.int32, turned_XX.shape, axis) == goal
            goal_ref[i, home] = jnp.where(here_XX, turned_XX, goal_ref[i, home].astype(jnp.float32)).astype(goal_ref.dtype)

    each(start(from_ref, source_ref))
    each(start(to_ref, goal_ref), own_tile=True)
    each(wait(from_ref, source_ref))
    each(wait(to_ref, goal_ref), own_tile=True)
    each(move)
    each(start(to_ref, goal_ref, True), own_tile=True)
    each(wait(to_ref, goal_ref, True), own_tile=True)
