"""bipartite_match for TPU (Mosaic): blocks of cosines are made, searched and forgotten in VMEM.

Grid (B, blocks of even rows, blocks of odd rows). A step multiplies ROWS even unit vectors with as many odd ones and updates the running
maximum and its place, (ROWS, 1) each, which stay over the blocks of odd rows.

HBM bytes: S * H * 4 once for the even half and once a block of even rows for the odd half; XLA also writes and reads S * S / 4 float32
cosines. At these sizes the bound is the products, S * S * H / 2 operations in float32 precision.
"""

from functools import partial

import jax
import jax.numpy as jnp

from tokeff.compat import pl, pltpu, tpu_params
from tokeff.kernels.bipartite_match.xla import unit
from tokeff.kernels.rows import round_up
from tokeff.kernels.running import mxu

ROWS = 256  # of a block, even and odd: their cosines take 256 KiB
MAX_WIDTH = 2048  # numbers of a row: two blocks of them take 4 MiB, held twice


def refusal(metric_BSH, *, protected):
    """Return in one line why this kernel cannot take the call, or None."""
    if metric_BSH.dtype not in ("float32", "bfloat16"):
        return f"the metric must be float32 or bfloat16, not {metric_BSH.dtype}"
    if metric_BSH.shape[2] > MAX_WIDTH:
        return f"rows of {metric_BSH.shape[2]} numbers exceed {MAX_WIDTH}, what VMEM holds of {ROWS}"
    return None


def run(metric_BSH, *, protected, interpret=False):
    """Same contract as the public op, for calls that `refusal` accepts. interpret: as of `pl.pallas_call`."""
    B, S, H = metric_BSH.shape
    even, odd = (unit(metric_BSH)[:, first::2] for first in (0, 1))
    A, E = even.shape[1], odd.shape[1]
    rows = min(ROWS, round_up(A, 8))
    blocks = -(-A // rows), -(-E // rows)
    best_spec = pl.BlockSpec((1, rows, 1), lambda b, i, j: (b, i, 0))
    cosine_BA1, partner_BA1 = pl.pallas_call(
        partial(_kernel, E=E, protected=protected),
        grid=(B, *blocks),
        in_specs=[pl.BlockSpec((1, rows, H), lambda b, i, j: (b, i, 0)), pl.BlockSpec((1, rows, H), lambda b, i, j: (b, j, 0))],
        out_specs=[best_spec, best_spec],
        out_shape=[jax.ShapeDtypeStruct((B, blocks[0] * rows, 1), dtype) for dtype in (jnp.float32, jnp.int32)],
        scratch_shapes=[pltpu.VMEM((rows, 1), dtype) for dtype in (jnp.float32, jnp.int32)],
        compiler_params=tpu_params("parallel", "parallel", "arbitrary"),
        interpret=interpret,
        name="bipartite_match",
    )(even, odd)
    return cosine_BA1[:, :A, 0], partner_BA1[:, :A, 0]


def _kernel(even_ref, odd_ref, cosine_ref, partner_ref, top_ref, at_ref, *, E, protected):
    """One block of even rows against one of odd rows."""
    i, j = pl.program_id(1), pl.program_id(2)
    rows = even_ref.shape[1]

    @pl.when(j == 0)
    def _start():
        top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
        at_ref[...] = jnp.zeros_like(at_ref)

    top_A1, at_A1 = search(mxu(even_ref[0], odd_ref[0], 1, 1), i * rows, j * rows, E, protected)
    better_A1 = top_A1 > top_ref[...]  # strictly: of equal ones the first stays
    at_ref[...] = jnp.where(better_A1, at_A1, at_ref[...])
    top_ref[...] = jnp.where(better_A1, top_A1, top_ref[...])

    @pl.when(j == pl.num_programs(2) - 1)
    def _finish():
        cosine_ref[0], partner_ref[0] = top_ref[...], at_ref[...]


def search(cosine_AE, first_even, first_odd, E, protected):
    """Return (maximum, its place among all odd rows) of each row of a block of cosines, (A, 1); protected rows and padding are hidden."""
    even_A1 = first_even + jax.lax.broadcasted_iota(jnp.int32, (cosine_AE.shape[0], 1), 0)
    odd_1E = first_odd + jax.lax.broadcasted_iota(jnp.int32, (1, cosine_AE.shape[1]), 1)
    free_1E = (2 * odd_1E + 1 >= protected) & (odd_1E < E)
    cosine_AE = jnp.where(free_1E & (cosine_AE == cosine_AE), cosine_AE, -jnp.inf)
    top_A1 = cosine_AE.max(1, keepdims=True)
    at_A1 = jnp.where(cosine_AE == top_A1, odd_1E, E).min(1, keepdims=True)
    return jnp.where(2 * even_A1 >= protected, top_A1, -jnp.inf), at_A1
