"""lowrank_scores for NVIDIA GPUs (Triton): rows of pages are fetched by pointer, keys rebuilt, rotated and scored in registers.

Grid (B, K * T, blocks of rows). A program adds up the two halves of ROWS keys over slices of the rank, turns them by sine and cosine of
angle times frequency (halves are paired), and multiplies them with the G query rows. Rows of page -1 are not read.

HBM bytes: for each (B, K, T), X * Y * itemsize of rows and 4 * X * G of scores. The basis, Y * H * itemsize, is read by every program,
mostly from L2.
"""

from functools import partial

import jax
import jax.numpy as jnp

from tokeff.compat import pl, triton, triton_params
from tokeff.kernels.gpu import dot, padded_rows
from tokeff.kernels.lowrank_scores.xla import hide

ROWS = {"bfloat16": 64, "float32": 16}  # of a block: two halves of their keys, and sine and cosine, are in registers
SLICE = 32  # of the rank


def refusal(q_BTNH, low_BSY, basis_BYKH, angle_BS, page_BKTM, freq_h, *, gain, page_size, scale):
    """Return in one line why this kernel cannot take the call, or None."""
    H = q_BTNH.shape[3]
    if {q_BTNH.dtype, low_BSY.dtype, basis_BYKH.dtype} not in ({jnp.dtype("float32")}, {jnp.dtype("bfloat16")}):
        return f"q, low and basis must all be float32 or all bfloat16, not {q_BTNH.dtype}, {low_BSY.dtype}, {basis_BYKH.dtype}"
    if H not in (32, 64, 128):
        return f"head size {H} is not 32, 64 or 128"
    if (G := q_BTNH.shape[2] // basis_BYKH.shape[2]) > 32:
        return f"G = {G} query heads of a kv head exceed 32"
    return None


def run(q_BTNH, low_BSY, basis_BYKH, angle_BS, page_BKTM, freq_h, *, gain, page_size, scale, interpret=False):
    """Same contract as the public op, for calls that `refusal` accepts. interpret: as of `pl.pallas_call`."""
    (B, T, N, H), (K, M) = q_BTNH.shape, page_BKTM.shape[1::2]
    G, half, X, block = padded_rows(N // K), H // 2, M * page_size, ROWS[q_BTNH.dtype.name]
    blocks = -(-X // block)
    q_BKTGH = jnp.pad(q_BTNH.reshape(B, T, K, N // K, H).swapaxes(1, 2), [(0, 0)] * 3 + [(0, G - N // K), (0, 0)])
    q_spec = pl.BlockSpec((None, None, None, G, H), lambda b, i, x: (b, i // T, i % T, 0, 0))
    score_BKTGX = pl.pallas_call(
        partial(_kernel, T=T, X=X, page_size=page_size, scale=scale * gain),
        grid=(B, K * T, blocks),
        in_specs=[pl.BlockSpec((half,), lambda b, i, x: (0,)), q_spec, *[pl.BlockSpec(memory_space=pl.ANY)] * 4],
        out_specs=pl.BlockSpec((None, None, None, G, block), lambda b, i, x: (b, i // T, i % T, 0, x)),
        out_shape=jax.ShapeDtypeStruct((B, K, T, G, blocks * block), jnp.float32),
        compiler_params=triton_params(num_warps=4, num_stages=2),
        interpret=interpret,
        name="lowrank_scores",
    )(freq_h.astype(jnp.float32), q_BKTGH, low_BSY, basis_BYKH, angle_BS, page_BKTM)
    return hide(score_BKTGX[..., : N // K, :X], page_BKTM, page_size)


def _kernel(freq_ref, q_ref, low_ref, basis_ref, angle_ref, page_ref, score_ref, *, T, X, page_size, scale):
    """Score one block of rows of one query and kv head."""
    b, i, x = (pl.program_id(axis) for axis in range(3))
    k, t, half, (block, Y) = i // T, i % T, freq_ref.shape[0], (score_ref.shape[1], low_ref.shape[2])
    x_X = x * block + jnp.arange(block)
    page_X = triton.load(page_ref.at[b, k, t, x_X // page_size], mask=x_X < X, other=-1)
    real_X, row_X = page_X >= 0, jnp.maximum(page_X, 0) * page_size + x_X % page_size

    def add(step, halves):
        y_y = step * SLICE + jnp.arange(SLICE)
        y_Xy, row_Xy, real_Xy = (jnp.broadcast_to(z, (block, SLICE)) for z in (y_y[None], row_X[:, None], real_X[:, None]))
        low_Xy = triton.load(low_ref.at[b, row_Xy, y_Xy], mask=real_Xy & (y_Xy < Y), other=0)
        y_yh, h_yh = (jnp.broadcast_to(z, (SLICE, half)) for z in (y_y[:, None], jnp.arange(half)[None]))
        parts = (triton.load(basis_ref.at[b, y_yh, k, h_yh + first], mask=y_yh < Y, other=0) for first in (0, half))
        return tuple(sum_Xh + dot(low_Xy, part_yh) for sum_Xh, part_yh in zip(halves, parts))

    zero = jnp.zeros((block, half), jnp.float32)
    a_Xh, b_Xh = jax.lax.fori_loop(0, -(-Y // SLICE), add, (zero, zero))
    angle_X = triton.load(angle_ref.at[b, row_X], mask=real_X, other=0)
    theta_Xh = angle_X[:, None].astype(jnp.float32) * freq_ref[...][None]
    cos, sin = jnp.cos(theta_Xh), jnp.sin(theta_Xh)
    turned = a_Xh * cos - b_Xh * sin, b_Xh * cos + a_Xh * sin
    q_parts = (q_ref[:, pl.ds(first, half)] for first in (0, half))
    score_ref[...] = sum(dot(q_Gh, k_Xh.astype(q_ref.dtype).T) for q_Gh, k_Xh in zip(q_parts, turned)) * scale
