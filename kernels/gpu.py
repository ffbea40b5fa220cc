"""What the Triton kernels share: tiles of query rows, slots split over programs, and a running softmax in registers.

A program holds a tile of query rows of one kv head, their running softmax and their output, and walks over slots of stored rows, a block
at a time. Registers decide the sizes: an SM has 65,536, a thread at most 255, and what does not fit is written to memory at every step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokeff.compat import pl, triton, triton_params

# Slots a step, and the largest tile, rows times head size: what compiles for sm_90a without spilling registers to memory (ptxas.json).
# Exact float32 products run without tensor cores and take more registers.
BLOCK = {"bfloat16": 64, "float32": 32}
MAX_ROWS = 128
MAX_TILE = {"bfloat16": 128 * 128, "float32": 32 * 64}
WIDE = 10 * 1024  # rows by what a row has in registers, its output and a block of scores: that much is shared by 8 warps, less by 4
LEAST = 8  # slots of a split for each row of its tile, whose partial output is written and read again
PROGRAMS = 512  # aim: about four for each multiprocessor of a large GPU, of which three fit at once where G is small
LOW = -1e30  # running maximum before anything was seen: finite, so that it can be subtracted


def unfit(q_BTNH, k_BKCH, v_BKCH):
    """Return in one line what about dtypes and head size no kernel of this kind takes, or None."""
    if {q_BTNH.dtype, k_BKCH.dtype, v_BKCH.dtype} not in ({jnp.dtype("float32")}, {jnp.dtype("bfloat16")}):
        return f"q, k and v must all be float32 or all bfloat16, not {q_BTNH.dtype}, {k_BKCH.dtype}, {v_BKCH.dtype}"
    if (H := q_BTNH.shape[3]) not in (sizes := head_sizes(q_BTNH.dtype)):
        return f"head size {H} in {q_BTNH.dtype} is not one of {sizes}"
    return None


def head_sizes(dtype):
    """Return the head sizes of which a tile holds 16 rows at least, as a product needs."""
    return [H for H in (16, 32, 64, 128, 256) if MAX_TILE[jnp.dtype(dtype).name] >= 16 * H]


def padded_rows(rows):
    """Return the rows of a Triton tile that holds so many: blocks are powers of two, products at least 16 wide."""
    return max(16, pl.next_power_of_2(rows))


class Tiles(NamedTuple):
    """`count` tiles of `rows` query rows each."""

    rows: int
    count: int

    @property
    def total(self):
        """Rows with their padding."""
        return self.rows * self.count


def row_tiles(rows, H, dtype, most=None):
    """Return the tiles that hold so many query rows: a power of two of them, at least 16, as registers allow."""
    tile = min(most or MAX_ROWS, MAX_TILE[jnp.dtype(dtype).name] // H, padded_rows(rows))
    return Tiles(tile, -(-rows // tile))


def params(rows, H, dtype):
    """Return the compiler parameters for a tile."""
    return triton_params(num_warps=8 if rows * (H + BLOCK[jnp.dtype(dtype).name]) >= WIDE else 4, num_stages=2)


class Splits(NamedTuple):
    """Blocks of slots dealt out in turn to `count` programs, `steps` each: rows that lie together keep all of them busy."""

    count: int
    steps: int

    def block(self, split, step):
        """The block that a program takes in a step."""
        return step * self.count + split


def slot_splits(slots, block, tiles, others):
    """Return how so many slots are split for each of these tiles, where so many others stand beside."""
    blocks = -(-slots // block)
    count = max(1, min(blocks, slots // (LEAST * tiles.rows), PROGRAMS // (tiles.count * others)))
    return Splits(count, -(-blocks // count))


def walk(steps, place, take_in, state):
    """Take in so many blocks. `place(i)` loads where block i lies and what its orders are; that of the next block is on its way while one
    is multiplied, so a step waits for keys and values alone."""

    def step(i, carry):
        here, state = carry
        ahead = place(i + 1)
        return ahead, take_in(here, state)

    return jax.lax.fori_loop(0, steps, step, (place(0), state))[1]


def load_slots(ref_BKCH, b, k, slot_X, seen_X):
    """Return the rows of these slots as (X, H), 0 where not seen; those bytes are not read."""
    shape = (*slot_X.shape, ref_BKCH.shape[3])
    slot_XH, seen_XH = (jnp.broadcast_to(x[:, None], shape) for x in (slot_X, seen_X))
    return triton.load(ref_BKCH.at[b, k, slot_XH, jax.lax.broadcasted_iota(jnp.int32, shape, 1)], mask=seen_XH, other=0)


def dot(a, b):
    """Return a @ b in float32; float32 operands keep their precision (no tf32)."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def start(shape):
    """A running softmax that saw nothing yet: the largest score, the sum of exponentials and the output."""
    R, H = shape
    return jnp.full((R,), LOW, jnp.float32), jnp.zeros((R,), jnp.float32), jnp.zeros((R, H), jnp.float32)


def add(carry, q_RH, k_XH, v_XH, see_RX, scale, softcap):
    """Take a block of stored rows into the running softmax."""
    top_R, sum_R, acc_RH = carry
    new_R, p_RX, decay_R = weights(top_R, dot(q_RH, k_XH.T) * scale, see_RX, softcap)
    return new_R, sum_R * decay_R + p_RX.sum(1), acc_RH * decay_R[:, None] + dot(p_RX.astype(v_XH.dtype), v_XH)


def weights(top_R, score_RX, see_RX, softcap):
    """Return the new largest score, the exponentials below it, and what the old ones are to be scaled by."""
    if softcap:
        score_RX = softcap * jnp.tanh(score_RX / softcap)
    score_RX = jnp.where(see_RX, score_RX, LOW)
    new_R = jnp.maximum(top_R, score_RX.max(1))
    return new_R, jnp.where(see_RX, jnp.exp(score_RX - new_R[:, None]), 0), jnp.exp(top_R - new_R)


def finish(carry, out_ref, lse_ref):
    """Write output and log-sum-exp: 0 and -inf for a row that saw nothing."""
    top_R, sum_R, acc_RH = carry
    lse_ref[...], sum_R = ended(top_R, sum_R)
    out_ref[...] = (acc_RH / sum_R[:, None]).astype(out_ref.dtype)


def ended(top_R, sum_R):
    """Return the log-sum-exp, -inf for a row that saw nothing, and what to divide the output by."""
    some_R = sum_R > 0
    sum_R = jnp.where(some_R, sum_R, 1)
    return jnp.where(some_R, top_R + jnp.log(sum_R), -jnp.inf), sum_R


def merge_splits(out_BKSRH, lse_BKSR):
    """Join what the programs of a head found, by their log-sum-exps."""
    top_BK1R = lse_BKSR.max(2, keepdims=True)
    w_BKSR = jnp.exp(lse_BKSR - jnp.where(top_BK1R == -jnp.inf, 0, top_BK1R))
    sum_BKR = w_BKSR.sum(2)
    some_BKR = sum_BKR > 0
    sum_BKR = jnp.where(some_BKR, sum_BKR, 1)
    out_BKRH = (out_BKSRH * w_BKSR[..., None]).sum(2) / sum_BKR[..., None]
    return out_BKRH, jnp.where(some_BKR, top_BK1R[:, :, 0] + jnp.log(sum_BKR), -jnp.inf)
