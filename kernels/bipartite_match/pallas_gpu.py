"""bipartite_match for NVIDIA GPUs (Triton): a program owns a block of even rows and walks over the odd ones.

Grid (B, blocks of even rows). A program adds up cosines of a block over slices of H, updates a running maximum and its place in
registers, and forgets them.

HBM bytes: S * H * 4 once for the even half and once a block of even rows for the odd half, mostly from L2; XLA also writes and reads
S * S / 4 float32 cosines. At these sizes the bound is the products, S * S * H / 2 operations in float32 precision.
"""

from functools import partial

import jax
import jax.numpy as jnp

from tokeff.compat import pl, triton, triton_params
from tokeff.kernels.bipartite_match.pallas_tpu import search
from tokeff.kernels.bipartite_match.xla import unit
from tokeff.kernels.gpu import dot

ROWS = 32  # of a block, even and odd
SLICE = 32  # of H


def refusal(metric_BSH, *, protected):
    """Return in one line why this kernel cannot take the call, or None."""
    if metric_BSH.dtype not in ("float32", "bfloat16"):
        return f"the metric must be float32 or bfloat16, not {metric_BSH.dtype}"
    return None


def run(metric_BSH, *, protected, interpret=False):
    """Same contract as the public op, for calls that `refusal` accepts. interpret: as of `pl.pallas_call`."""
    B, S, _ = metric_BSH.shape
    A = -(-S // 2)
    blocks, whole = -(-A // ROWS), pl.BlockSpec(memory_space=pl.ANY)
    best_spec = pl.BlockSpec((None, ROWS), lambda b, i: (b, i))
    cosine_BA, partner_BA = pl.pallas_call(
        partial(_kernel, E=S // 2, protected=protected),
        grid=(B, blocks),
        in_specs=[whole],
        out_specs=[best_spec, best_spec],
        out_shape=[jax.ShapeDtypeStruct((B, blocks * ROWS), dtype) for dtype in (jnp.float32, jnp.int32)],
        compiler_params=triton_params(num_warps=4, num_stages=2),
        interpret=interpret,
        name="bipartite_match",
    )(unit(metric_BSH))
    return cosine_BA[:, :A], partner_BA[:, :A]


def _kernel(x_ref, cosine_ref, partner_ref, *, E, protected):
    """One block of even rows against all odd rows."""
    b, i = pl.program_id(0), pl.program_id(1)
    _, S, H = x_ref.shape

    def rows(row_R, first):
        shape = (ROWS, SLICE)
        row_Rh, h_Rh = (jnp.broadcast_to(z, shape) for z in (row_R[:, None], first + jnp.arange(SLICE)[None]))
        return triton.load(x_ref.at[b, row_Rh, h_Rh], mask=(row_Rh < S) & (h_Rh < H), other=0)

    def step(j, best):
        even_R, odd_R = 2 * (i * ROWS + jnp.arange(ROWS)), 2 * (j * ROWS + jnp.arange(ROWS)) + 1

        def add(h, cosine_RR):
            return cosine_RR + dot(rows(even_R, h * SLICE), rows(odd_R, h * SLICE).T)

        cosine_RR = jax.lax.fori_loop(0, -(-H // SLICE), add, jnp.zeros((ROWS, ROWS), jnp.float32))
        top_R1, at_R1 = search(cosine_RR, i * ROWS, j * ROWS, E, protected)
        better_R1 = top_R1 > best[0]  # strictly: of equal ones the first stays
        return jnp.where(better_R1, top_R1, best[0]), jnp.where(better_R1, at_R1, best[1])

    start = jnp.full((ROWS, 1), -jnp.inf, jnp.float32), jnp.zeros((ROWS, 1), jnp.int32)
    top_R1, at_R1 = jax.lax.fori_loop(0, -(-E // ROWS), step, start)
    cosine_ref[...], partner_ref[...] = top_R1.max(1), at_R1.max(1)
