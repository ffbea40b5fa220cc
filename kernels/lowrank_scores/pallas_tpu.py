"""lowrank_scores for TPU (Mosaic): keys are rebuilt, rotated and scored in VMEM.

XLA gathers the rows of the pages first, (B, K, T, X, Y): a page of 8 rows is less than a tile of them. Grid (B, K, T, blocks of rows). A
step holds both halves of the basis of one kv head, (Y, H / 2) each, G query rows likewise, and a block of low-rank rows with their angles.
Two products give the halves of the keys with the rows along the lanes, sine and cosine of angle times frequency turn them (halves are
paired), two more score them. Keys exist in VMEM alone. One reduction serves sine and cosine: jnp's own, one each and for any number, took
two thirds of a step.

HBM bytes: for each (B, K, T), X * Y * itemsize of rows, three times with the gather, plus 4 * X * G of scores; Y * H * itemsize of
basis for each (B, K). XLA alone would write and read 2 * X * H * itemsize of keys beside that, before and after rotation.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from tokeff.compat import pl, tpu_params
from tokeff.kernels.lowrank_scores.xla import hide, take_rows
from tokeff.kernels.rows import round_up
from tokeff.kernels.running import mxu

ROWS = 512  # of a block: their float32 keys, sines and cosines take 2 MiB at H = 256
MAX_BASIS = 2**18  # numbers of a head's basis: 1 MiB in float32, held twice
# A quarter turn in pieces of 7 bits, the last one of 24: n times a piece is exact while n is below 2**17, so for angles below 205,000.
# Above, the error is that of the float32 angle itself.
QUARTER = (1.578125, -0.00732421875, -4.470348358154297e-06, 1.5893254712295857e-08)


def refusal(q_BTNH, low_BSY, basis_BYKH, angle_BS, page_BKTM, freq_h, *, gain, page_size, scale):
    """Return in one line why this kernel cannot take the call, or None."""
    (H, N), (Y, K) = q_BTNH.shape[:1:-1], basis_BYKH.shape[1:3]
    if {q_BTNH.dtype, low_BSY.dtype, basis_BYKH.dtype} not in ({jnp.dtype("float32")}, {jnp.dtype("bfloat16")}):
        return f"q, low and basis must all be float32 or all bfloat16, not {q_BTNH.dtype}, {low_BSY.dtype}, {basis_BYKH.dtype}"
    if (n := Y * H) > MAX_BASIS:
        return f"a basis of {n} numbers a head exceeds {MAX_BASIS}, what VMEM holds"
    if N // K > 128:
        return f"G = {N // K} query heads of a kv head exceed 128"
    return None


def run(q_BTNH, low_BSY, basis_BYKH, angle_BS, page_BKTM, freq_h, *, gain, page_size, scale, interpret=False):
    """Same contract as the public op, for calls that `refusal` accepts. interpret: as of `pl.pallas_call`."""
    (B, T, N, H), (Y, K) = q_BTNH.shape, basis_BYKH.shape[1:3]
    G, half = round_up(N // K, 32 // q_BTNH.dtype.itemsize), H // 2
    low_BKTXY, angle_BKTX = take_rows(low_BSY, page_BKTM, page_size), take_rows(angle_BS, page_BKTM, page_size)
    X = low_BKTXY.shape[3]
    block = min(ROWS, X)
    blocks = -(-X // block)
    q_BKTGH = q_BTNH.reshape(B, T, K, N // K, H).swapaxes(1, 2)
    q_BKTGH = jnp.pad(q_BKTGH, [(0, 0)] * 3 + [(0, G - N // K), (0, 0)])
    basis_BKYH = basis_BYKH.swapaxes(1, 2)
    parts = [x[..., part] for x in (q_BKTGH, basis_BKYH) for part in (slice(None, half), slice(half, None))]

    def lane_spec(height):
        return pl.BlockSpec((1, 1, 1, height, block), lambda b, k, t, x: (b, k, t, 0, x))

    q_spec = pl.BlockSpec((1, 1, 1, G, half), lambda b, k, t, x: (b, k, t, 0, 0))
    basis_spec = pl.BlockSpec((1, 1, Y, half), lambda b, k, t, x: (b, k, 0, 0))
    score_BKTGX = pl.pallas_call(
        partial(_kernel, scale=scale * gain),
        grid=(B, K, T, blocks),
        in_specs=[
            pl.BlockSpec((half, 1), lambda b, k, t, x: (0, 0)),
            *[q_spec, q_spec, basis_spec, basis_spec],
            pl.BlockSpec((1, 1, 1, block, Y), lambda b, k, t, x: (b, k, t, x, 0)),
            lane_spec(1),
        ],
        out_specs=lane_spec(G),
        out_shape=jax.ShapeDtypeStruct((B, K, T, G, blocks * block), jnp.float32),
        compiler_params=tpu_params("parallel", "parallel", "parallel", "parallel"),
        interpret=interpret,
        name="lowrank_scores",
    )(freq_h.astype(jnp.float32)[:, None], *parts, low_BKTXY, angle_BKTX[:, :, :, None])
    return hide(score_BKTGX[..., : N // K, :X], page_BKTM, page_size)


def _kernel(freq_ref, qa_ref, qb_ref, basis_a_ref, basis_b_ref, low_ref, angle_ref, score_ref, *, scale):
    """Score one block of rows of one query and kv head."""
    low_XY = low_ref[0, 0, 0]
    a_hX, b_hX = (mxu(basis_ref[0, 0], low_XY, 0, 1) for basis_ref in (basis_a_ref, basis_b_ref))
    theta_hX = freq_ref[...] * angle_ref[0, 0, 0].astype(jnp.float32)
    cos, sin = cos_sin(theta_hX)
    turned = a_hX * cos - b_hX * sin, b_hX * cos + a_hX * sin
    score_ref[0, 0, 0] = sum(mxu(q[0, 0, 0], k_hX.astype(q.dtype), 1, 0) for q, k_hX in zip((qa_ref, qb_ref), turned)) * scale


def cos_sin(theta_hX):
    """Return cosine and sine of float32 angles: what is left of n quarter turns, in the polynomials of Cephes (cosf.c), and n mod 4."""
    n_hX = jnp.floor(theta_hX * (2 / math.pi) + 0.5)
    for piece in QUARTER:
        theta_hX -= n_hX * piece
    z_hX = theta_hX * theta_hX
    sin_hX = theta_hX + theta_hX * z_hX * (-1.6666654611e-1 + z_hX * (8.3321608736e-3 + z_hX * -1.9515295891e-4))
    cos_hX = 1 - z_hX * (0.5 - z_hX * (4.166664568298827e-2 + z_hX * (-1.388731625493765e-3 + z_hX * 2.443315711809948e-5)))
    n_hX = n_hX.astype(jnp.int32)
    odd_hX = (n_hX & 1) == 1
    cos_hX, sin_hX = jnp.where(odd_hX, sin_hX, cos_hX), jnp.where(odd_hX, cos_hX, sin_hX)
    return jnp.where(((n_hX + 1) & 2) == 2, -cos_hX, cos_hX), jnp.where((n_hX & 2) == 2, -sin_hX, sin_hX)
