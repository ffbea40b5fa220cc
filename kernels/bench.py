"""How long the ops take, next to plain attention and to the bytes they must move.

A case is timed as a small model runs it: `layers` calls in one compiled program, each on arrays of its own (so that a
cache of the processor cannot hold them all) and each waiting for the one before.
"""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.kernels import cases as kernel_cases
from tokeff.kernels.column_mass import cases as column_mass_cases
from tokeff.kernels.column_mass import column_mass
from tokeff.kernels.decode_attention import cases as decode_attention_cases
from tokeff.kernels.decode_attention import decode_attention

BYTES = 64 * 2**20  # of arrays that one timing goes through, where 1 to 8 layers allow
BANDWIDTH_BYTES = 128 * 2**20


def bench(op, cases=None, implementation=None, repeats=9):
    """Measure an op on each case: this op, plain attention over the whole cache, and the bandwidth floor.

    Args:
      op: 'decode_attention' or 'column_mass'.
      cases: cases to run; None takes the op's CPU cases on CPU and all its cases elsewhere.
      implementation: as of the op.
      repeats: timings of each program, interleaved; medians are reported.

    Returns:
      One dict a case: op, case, implementation, device, ms and dense_ms a call, floor_ms (bytes it must move, by the
      measured bandwidth), gb_per_s (the same bytes, by ms), of_floor (floor_ms / ms) and speedup (dense_ms / ms).

    Raises:
      ValueError: unknown op, or an implementation that does not support a case.
    """
    if op not in OPS:
        raise ValueError(f"op {op!r} is unknown: choose one of {sorted(OPS)}")
    device = jax.devices()[0]
    here = OPS[op][0]
    cases = cases or (here.CPU if device.platform == "cpu" else here.CASES)
    per_second = bandwidth(repeats)
    return [_row(op, case, implementation, device, per_second, repeats) for case in cases]


def bandwidth(repeats=9):
    """Return the bytes a second that the default device reads, or reads and writes in place, whichever is more."""
    x = jnp.zeros(BANDWIDTH_BYTES // 4, jnp.float32)
    read, bump = jax.jit(jnp.sum), jax.jit(lambda x: x + 1, donate_argnums=0)
    seconds = {"read": [], "both": []}
    for _ in range(repeats + 1):  # the first round compiles
        seconds["read"].append(_seconds(read, x)[0])
        took, x = _seconds(bump, x)
        seconds["both"].append(took)
    return max(n * x.nbytes / float(np.median(seconds[k][1:])) for k, n in (("read", 1), ("both", 2)))


def _row(op, case, implementation, device, per_second, repeats):
    module, this, plain, chain = OPS[op]
    layers = max(1, min(8, BYTES // module.floor_bytes(case)))
    inputs = [kernel_cases.arrays(case, seed) for seed in range(layers)]
    this = partial(this, **module.options(case), implementation=implementation)
    programs = {"ms": this, "dense_ms": partial(plain, scale=case.options["scale"], softcap=case.softcap)}
    programs = {name: jax.jit(partial(_stack, module, f, chain)) for name, f in programs.items()}
    seconds = {name: [] for name in programs}
    for _ in range(repeats + 1):  # the first round compiles
        for name, program in programs.items():
            seconds[name].append(_seconds(program, inputs)[0])
    ms = {name: float(np.median(s[1:])) / layers * 1e3 for name, s in seconds.items()}
    floor_ms = module.floor_bytes(case) / per_second * 1e3
    facts = {"op": op, "case": case.name, "implementation": implementation or "auto", "device": device.device_kind}
    speed = {"floor_ms": floor_ms, "gb_per_s": module.floor_bytes(case) / ms["ms"] / 1e6}
    return facts | ms | speed | {"of_floor": floor_ms / ms["ms"], "speedup": ms["dense_ms"] / ms["ms"]}


def _stack(module, f, chain, inputs):
    """Run f on each layer's arrays, each call waiting for the one before: its output changes the next one's input."""
    out, q = None, inputs[0]["q"]
    for a in inputs:
        positional, keys = module.arguments(a | {"q": q})
        out = f(*positional, **keys)
        q = chain(q, out)
    return out


def _seconds(program, *args):
    start = time.perf_counter()
    out = jax.block_until_ready(program(*args))
    return time.perf_counter() - start, out


def _plain_scores(q_BTNH, k_BKCH, order_BKC, lo_BT, hi_BT, scale, softcap):
    """Return masked scores (B, K, T, G, C) as a textbook writes them: every slot, no care for NaN."""
    B, T, N, H = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(B, T, k_BKCH.shape[1], -1, H)
    score = jnp.einsum("btkgh,bkch->bktgc", q_BTKGH, k_BKCH, preferred_element_type=jnp.float32) * scale
    score = softcap * jnp.tanh(score / softcap) if softcap else score
    order, lo, hi = order_BKC[:, :, None, None], lo_BT[:, None, :, None, None], hi_BT[:, None, :, None, None]
    return jnp.where((order >= lo) & (order <= hi), score, -jnp.inf)


def _plain_attention(q_BTNH, k_BKCH, v_BKCH, *visibility, scale, softcap, page_BKM=None):
    p = jax.nn.softmax(_plain_scores(q_BTNH, k_BKCH, *visibility, scale, softcap))
    return jnp.einsum("bktgc,bkch->btkgh", p.astype(v_BKCH.dtype), v_BKCH).reshape(q_BTNH.shape)


def _plain_mass(q_BTNH, k_BKCH, lse_BTN, order_BKC, lo_BT, hi_BT, weight_BT, *, scale, softcap):
    (B, T, N), K = lse_BTN.shape, k_BKCH.shape[1]
    lse = lse_BTN.reshape(B, T, K, N // K, 1).swapaxes(1, 2)
    p = jnp.exp(_plain_scores(q_BTNH, k_BKCH, order_BKC, lo_BT, hi_BT, scale, softcap) - lse)
    return jnp.einsum("bktgc,bt->bkc", p, weight_BT)


def _chain_attention(q_BTNH, out):
    return out[0] if isinstance(out, tuple) else out


def _chain_mass(q_BTNH, mass_BKC):
    return q_BTNH + (1e-30 * mass_BKC.min()).astype(q_BTNH.dtype)


OPS = {
    "decode_attention": (decode_attention_cases, decode_attention, _plain_attention, _chain_attention),
    "column_mass": (column_mass_cases, column_mass, _plain_mass, _chain_mass),
}
