"""column_mass for NVIDIA GPUs (Triton): a program owns a block of columns and walks over the queries.

Grid (B, K, column blocks). A program holds `COLUMNS` rows of K and their mass in registers and loads the R = T * G
query rows of its kv head, a block at a time, with their bounds, log-sum-exp and weight. K is read once, masked by what
lies between the lowest lo and the highest hi of the sequence; no program writes what another reads.

HBM bytes: C * H * itemsize for each (B, K). The queries, R * (H * itemsize + 16), are read once per column block,
mostly from L2, which holds the few MiB of one head's queries.
"""

from functools import partial

import jax
import jax.numpy as jnp

from tokeff.compat import pl, triton_params
from tokeff.kernels.gpu import dot, load_slots
from tokeff.kernels.rows import NOTHING, head_rows, round_up, token_rows

COLUMNS = 64
# Query rows a step, and the head sizes: what compiles for sm_90a without spilling registers to memory.
ROWS = {"bfloat16": 64, "float32": 16}
HEADS = {"bfloat16": (16, 32, 64, 128, 256), "float32": (16, 32, 64)}


def refusal(q_BTNH, k_BKCH, *_, scale, softcap):
    """Return in one line why this kernel cannot take the call, or None."""
    if {q_BTNH.dtype, k_BKCH.dtype} not in ({jnp.dtype("float32")}, {jnp.dtype("bfloat16")}):
        return f"q and k must both be float32 or both bfloat16, not {q_BTNH.dtype} and {k_BKCH.dtype}"
    if q_BTNH.shape[3] not in (sizes := HEADS[q_BTNH.dtype.name]):
        return f"head size {q_BTNH.shape[3]} in {q_BTNH.dtype} is not one of {sizes}"
    return None


def run(q_BTNH, k_BKCH, lse_BTN, weight_BT, order_BKC, lo_BT, hi_BT, *, scale, softcap, interpret=False):
    """Same contract as the public op, for calls that `refusal` accepts. interpret: as of `pl.pallas_call`."""
    (B, T, N, _), (K, C) = q_BTNH.shape, order_BKC.shape[1:]
    block_rows = ROWS[q_BTNH.dtype.name]
    R = round_up(T * N // K, block_rows)
    blocks = -(-C // COLUMNS)
    order_BKC = jnp.pad(order_BKC, [(0, 0), (0, 0), (0, blocks * COLUMNS - C)], constant_values=-1)
    span_B2 = jnp.stack([lo_BT.min(1), hi_BT.max(1)], -1)
    bounds = token_rows(lo_BT, N // K, R, 0), token_rows(hi_BT, N // K, R, NOTHING)
    weight_BR = token_rows(weight_BT.astype(jnp.float32), N // K, R, 0)
    rows = (*bounds, weight_BR, head_rows(lse_BTN, K, R), head_rows(q_BTNH, K, R))
    whole = pl.BlockSpec(memory_space=pl.ANY)
    column_spec = pl.BlockSpec((None, None, COLUMNS), lambda b, k, c: (b, k, c))
    mass_BKC = pl.pallas_call(
        partial(_kernel, block_rows=block_rows, scale=scale, softcap=softcap),
        grid=(B, K, blocks),
        in_specs=[pl.BlockSpec((None, 2), lambda b, k, c: (b, 0)), column_spec, *[whole] * 6],
        out_specs=column_spec,
        out_shape=jax.ShapeDtypeStruct(order_BKC.shape, jnp.float32),
        compiler_params=triton_params(num_warps=4, num_stages=2),
        interpret=interpret,
        name="column_mass",
    )(span_B2, order_BKC, *rows, k_BKCH)
    return mass_BKC[:, :, :C]


def _kernel(
    span_ref, order_ref, lo_ref, hi_ref, weight_ref, lse_ref, q_ref, k_ref, mass_ref, *, block_rows, scale, softcap
):
    """Add all query rows of one head to one block of columns."""
    b, kh, block = (pl.program_id(axis) for axis in range(3))
    order_X = order_ref[...]
    inside_X = (order_X >= span_ref[0]) & (order_X <= span_ref[1])
    k_XH = load_slots(k_ref, b, kh, block * COLUMNS + jnp.arange(COLUMNS), inside_X)

    def add_rows(i, mass_X):
        here = pl.ds(i * block_rows, block_rows)
        see_RX = (order_X[None] >= lo_ref[b, here][:, None]) & (order_X[None] <= hi_ref[b, here][:, None])

        def add():
            score_RX = dot(q_ref[b, kh, here, :], k_XH.T) * scale
            if softcap:
                score_RX = softcap * jnp.tanh(score_RX / softcap)
            p_RX = jnp.where(see_RX, jnp.exp(score_RX - lse_ref[b, kh, here][:, None]), 0)
            return mass_X + (p_RX * weight_ref[b, here][:, None]).sum(0)

        return jax.lax.cond(see_RX.astype(jnp.int32).max() > 0, add, lambda: mass_X)

    start_X = jnp.zeros((COLUMNS,), jnp.float32)
    mass_ref[...] = jax.lax.fori_loop(0, q_ref.shape[2] // block_rows, add_rows, start_X)
