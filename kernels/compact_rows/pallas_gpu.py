"""compact_rows for NVIDIA GPUs (Triton): rows go through the registers of one program, all read before one is written.

Grid (B, K, blocks of H). A program loads its columns of all M rows of K and of V, waits until its threads have all done so (a barrier:
nothing else orders loads before the stores of other threads), and stores them. Programs share no slot and column. The caches are their
own output.

HBM bytes: 4 * M * H * itemsize for each (B, K), plus 8 a row for slots, once a block of H.
"""

from functools import partial

import jax
import jax.numpy as jnp

from tokeff.compat import pl, triton, triton_params

MAX_HELD = 2**13  # numbers of K, and as many of V, in the registers of a program of 4 warps
COLUMNS = 16  # at least so many neighbouring numbers of a row go together


def refusal(k_BKCH, v_BKCH, k_BKWH, v_BKWH, from_BKM, to_BKM):
    """Return in one line why this kernel cannot take the call, or None."""
    H, M = k_BKCH.shape[3], from_BKM.shape[2]
    if k_BKCH.dtype not in ("float32", "bfloat16"):
        return f"k and v must be float32 or bfloat16, not {k_BKCH.dtype}"
    if H not in (16, 32, 64, 128, 256):
        return f"head size {H} is not a power of two from 16 to 256"
    if pl.next_power_of_2(M) * COLUMNS > MAX_HELD:
        return f"{M} rows exceed {MAX_HELD // COLUMNS}, what the registers of a program hold"
    return None


def run(k_BKCH, v_BKCH, k_BKWH, v_BKWH, from_BKM, to_BKM, *, interpret=False):
    """Same contract as the public op, for calls that `refusal` accepts. interpret: as of `pl.pallas_call`."""
    (B, K, _, H), M = k_BKCH.shape, pl.next_power_of_2(from_BKM.shape[2])
    columns = min(H, MAX_HELD // M)
    slots = [jnp.pad(x, [(0, 0), (0, 0), (0, M - x.shape[2])], constant_values=-1) for x in (from_BKM, to_BKM)]
    draft = [] if k_BKWH is None else [k_BKWH, v_BKWH]
    row_spec, whole = pl.BlockSpec((None, None, M), lambda b, k, h: (b, k, 0)), pl.BlockSpec(memory_space=pl.ANY)
    k, v = pl.pallas_call(
        partial(_kernel, columns=columns, barrier=not interpret),  # interpreted, an operation ends before the next begins
        grid=(B, K, H // columns),
        in_specs=[row_spec, row_spec, whole, whole, *[whole] * len(draft)],
        out_specs=[whole, whole],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_BKCH, v_BKCH)],
        input_output_aliases={2: 0, 3: 1},
        compiler_params=triton_params(num_warps=4, num_stages=1),
        interpret=interpret,
        name="compact_rows",
    )(*slots, k_BKCH, v_BKCH, *draft)
    return k, v


def _kernel(from_ref, to_ref, _k_ref, _v_ref, *refs, columns, barrier):
    """Move one block of columns of one head's rows. refs: K and V of a draft, if there is one, then of the cache."""
    b, k, block = (pl.program_id(axis) for axis in range(3))
    real_M = (from_ref[...] >= 0) & (to_ref[...] >= 0)
    shape = (*real_M.shape, columns)
    real, source, goal = (jnp.broadcast_to(x[:, None], shape) for x in (real_M, from_ref[...], to_ref[...]))
    h = block * columns + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    rows = [triton.load(ref.at[b, k, jnp.maximum(source, 0), h], mask=real, other=0) for ref in refs[:2]]
    if barrier:
        triton.debug_barrier()
    for ref, x in zip(refs[-2:], rows):
        triton.store(ref.at[b, k, jnp.maximum(goal, 0), h], x, mask=real)
