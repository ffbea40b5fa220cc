"""A running softmax in VMEM, as the attention kernels for TPU share it: blocks of stored rows are taken in one after the other.

A register holds 8 x 128 numbers, and spreading one over its lanes goes through the two units that permute, beside four that compute.
So what a query row has one of (its bounds, the largest score so far) is held once in every lane, which takes no more memory than one
lane of each would, and the sum of exponentials by lane, to be added up at the end. A hidden score is LOW and the maximum begins at
half of that: exp(LOW - maximum) is 0 also in a row that has seen nothing, and scores are masked once. A step of flash_prefill on v5e
came from 1.8 times the bundles that its products take to 1.06, with a quarter of the spills (libtpu 0.0.42.1).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokeff.compat import pltpu

LANES = 128
LOW = -1e30  # a hidden score: finite, so that it can be subtracted


class Running(NamedTuple):
    """References to the scratch of R query rows."""

    top_Rx: jax.Array  # the largest score so far, in each of LANES lanes
    sum_Rx: jax.Array  # sum of exponentials, by lane
    lo_Rx: jax.Array  # first and last order that the row sees, in each lane
    hi_Rx: jax.Array
    acc_RH: jax.Array  # the output so far, to be divided by the sum


def scratch(rows, H):
    """Return the scratch shapes that `Running` wraps."""
    kinds = (jnp.float32, jnp.float32, jnp.int32, jnp.int32)
    return [*(pltpu.VMEM((rows, LANES), kind) for kind in kinds), pltpu.VMEM((rows, H), jnp.float32)]


def start(at, bounds_R2):
    """Nothing was seen yet by rows with these bounds."""
    at.top_Rx[...] = jnp.full_like(at.top_Rx, LOW / 2)
    at.sum_Rx[...] = jnp.zeros_like(at.sum_Rx)
    at.acc_RH[...] = jnp.zeros_like(at.acc_RH)
    for i, ref in enumerate((at.lo_Rx, at.hi_Rx)):
        ref[...] = jnp.broadcast_to(bounds_R2[:, i : i + 1], ref.shape)


def add(at, q_RH, k, v, see_RX, axis, scale, softcap):
    """Take a block of stored rows in. axis: of the slots in K and V. V must be finite; what K holds where nobody looks is nothing."""
    score_RX = masked_scores(q_RH, k, axis, see_RX, scale, softcap)
    before = at.top_Rx[...]
    top = jnp.maximum(before, score_RX.max(1, keepdims=True))
    p_RX = jnp.exp(score_RX - across(top, score_RX.shape[1]))
    decay = jnp.exp(before - top)
    at.top_Rx[...] = top
    at.sum_Rx[...] = at.sum_Rx[...] * decay + by_lane(p_RX)
    at.acc_RH[...] = at.acc_RH[...] * across(decay, at.acc_RH.shape[1]) + mxu(p_RX.astype(v.dtype), v, 1, axis)


def finish(at, out_ref, lse_ref):
    """Write output and log-sum-exp: 0 and -inf for a row that saw nothing."""
    sum_R1 = at.sum_Rx[...].sum(1, keepdims=True)
    some_R1 = sum_R1 > 0
    sum_R1 = jnp.where(some_R1, sum_R1, 1)
    out_ref[...] = (at.acc_RH[...] / sum_R1).astype(out_ref.dtype)
    lse_ref[...] = jnp.where(some_R1, at.top_Rx[:, :1] + jnp.log(sum_R1), -jnp.inf)


def visible(order_1X, at, sinks=0):
    """Return which slots each row sees: orders along the lanes against bounds along the sublanes."""
    width = order_1X.shape[1]
    lo_RX, hi_RX = across(at.lo_Rx[...], width), across(at.hi_Rx[...], width)
    inside_RX = (order_1X >= lo_RX) & (order_1X <= hi_RX)
    return inside_RX | ((order_1X >= 0) & (order_1X < sinks) & (order_1X <= hi_RX)) if sinks else inside_RX


def cleaned(v, see_RX, axis):
    """Return V with 0 in the slots, along `axis`, that no row sees: 0 * NaN is NaN.

    The mask has its slots along the lanes. Where V has them along the sublanes, a product of one row of it against ones, both as
    high as a tile, brings it into the layout of V: a sixteenth of what the product with V costs, or less.
    """
    seen = see_RX.astype(jnp.float32).max(0, keepdims=True)
    if axis == 0:
        seen_tX = jnp.broadcast_to(seen, (16, seen.shape[1])).astype(v.dtype)
        seen = mxu(seen_tX, jnp.ones((16, v.shape[1]), v.dtype), 0, 0)
    return jnp.where(seen > 0, v, 0)


def masked_scores(q_RH, k, axis, see_RX, scale, softcap):
    """Return float32 scores, LOW where a row does not see the slot (whatever NaN the slot held). axis: K's slots."""
    score_RX = mxu(q_RH, k, 1, 1 - axis) * scale
    if softcap:
        score_RX = softcap * jnp.tanh(score_RX / softcap)
    return jnp.where(see_RX, score_RX, LOW)


def mxu(a, b, a_axis, b_axis):
    """Contract one axis of each matrix into float32. float32 operands keep their precision (not one bfloat16 pass)."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def across(x_Rx, width):
    """Return `width` columns of an array that holds the same number in each of its LANES lanes."""
    return jnp.concatenate([x_Rx] * -(-width // LANES), 1)[:, :width]


def by_lane(x_RX):
    """Return (R, LANES): the sum of the columns of each lane."""
    x_RX = jnp.pad(x_RX, [(0, 0), (0, -x_RX.shape[1] % LANES)])
    return sum(x_RX[:, i : i + LANES] for i in range(0, x_RX.shape[1], LANES))
