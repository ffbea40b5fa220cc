"""How long the ops take, next to plain attention and to the bytes they must move and the operations they must do.

A case is timed as a small model runs it: `layers` calls in one compiled program, each on arrays of its own and each waiting for the one
before; on an accelerator so many that starting the program does not count. Before every timing more memory is read than the last cache of
the processor holds, so that all of them start cold: a model's weights pass through that cache between two reads of a layer's rows.
"""

import contextlib
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.kernels import cases as kernel_cases
from tokeff.kernels import plain
from tokeff.kernels.attend import exact
from tokeff.kernels.bipartite_match import bipartite_match
from tokeff.kernels.bipartite_match import cases as bipartite_match_cases
from tokeff.kernels.block_sparse_prefill import block_sparse_prefill
from tokeff.kernels.block_sparse_prefill import cases as block_sparse_prefill_cases
from tokeff.kernels.column_mass import cases as column_mass_cases
from tokeff.kernels.column_mass import column_mass
from tokeff.kernels.compact_rows import cases as compact_rows_cases
from tokeff.kernels.compact_rows import compact_rows
from tokeff.kernels.decode_attention import cases as decode_attention_cases
from tokeff.kernels.decode_attention import decode_attention
from tokeff.kernels.flash_prefill import cases as flash_prefill_cases
from tokeff.kernels.flash_prefill import flash_prefill
from tokeff.kernels.k_centre import cases as k_centre_cases
from tokeff.kernels.k_centre import k_centre
from tokeff.kernels.lowrank_scores import cases as lowrank_scores_cases
from tokeff.kernels.lowrank_scores import lowrank_scores
from tokeff.kernels.page_scores import cases as page_scores_cases
from tokeff.kernels.page_scores import page_scores
from tokeff.kernels.plain import attention as _plain_attention
from tokeff.kernels.plain import scores as _plain_scores
from tokeff.kernels.quant_decode import cases as quant_decode_cases
from tokeff.kernels.quant_decode import quant_decode
from tokeff.kernels.shared_prefix import cases as shared_prefix_cases
from tokeff.kernels.shared_prefix import shared_prefix
from tokeff.kernels.tree_attention import cases as tree_attention_cases
from tokeff.kernels.tree_attention import tree_attention

BYTES = 64 * 2**20  # of arrays that one timing goes through, where 1 to 8 layers allow
CACHE_BYTES = 128 * 2**20  # taken for the last cache where the system does not tell: more than accelerators have
MOST_CACHE = 512 * 2**20  # so that what is read to empty a cache leaves room for the arrays
LONG, MOST_LAYERS, MOST_BYTES = 8 * 2**30, 64, 32 * 2**30  # of a program elsewhere: bytes it reads, calls, and bytes of all its arrays
TIMES = 100  # that memory is gone through in one program where its bandwidth is measured
SIDE = {"cpu": 1024, "other": 8192}  # of the square matrices whose product measures operations a second


def bench(op, cases=None, implementation=None, repeats=9):
    """Measure an op on each case: this op, the best way there is without it, and the floor.

    Args:
      op: a name in `OPS`.
      cases: cases to run; None takes the op's CPU cases on CPU and all its cases elsewhere.
      implementation: as of the op.
      repeats: timings of each program, interleaved; medians are reported.

    Returns:
      One dict a case: op, case, implementation, device, ms and dense_ms a call (plain attention over the whole cache; what
      else it is, `OPS` says), floor_ms (bytes it must move, by the measured bandwidth, or operations it must do, by those of
      a large matrix product, whichever takes longer), gb_per_s (the same bytes, by ms), gflop_per_s (the operations, by ms),
      of_floor (floor_ms / ms), speedup (dense_ms / ms), and where the case selects rows whole_ms, this op over all of them,
      and of_whole (whole_ms / ms). None for a plain way that does not fit the device's memory.

    Raises:
      ValueError: unknown op, or an implementation that does not support a case.
    """
    if op not in OPS:
        raise ValueError(f"op {op!r} is unknown: choose one of {sorted(OPS)}")
    device = jax.devices()[0]
    here = OPS[op][0]
    cases = cases or (here.CPU if device.platform == "cpu" else here.CASES)
    empty = emptied_cache()
    return [_row(op, case, implementation, device, empty, repeats) for case in cases]


def beyond_cache():
    """Return so many bytes that reading them leaves nothing else in the last cache of the default device."""
    held = [Path(p).read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    told = max((int(size[:-1]) * 2**10 for size in held if size.endswith("K")), default=CACHE_BYTES)
    return min(MOST_CACHE, told if jax.default_backend() == "cpu" else CACHE_BYTES) * 3 // 2


def emptied_cache():
    """Return a function that reads more than the last cache of the default device holds."""
    x, read = jnp.zeros(beyond_cache() // 4, jnp.float32), jax.jit(jnp.sum)
    return lambda: jax.block_until_ready(read(x))


def bandwidth(repeats=9):
    """Return the bytes a second that the default device reads, or reads and writes in place, whichever is more, at best."""
    x, times = jnp.zeros(beyond_cache() // 4, jnp.float32), 1 if jax.default_backend() == "cpu" else TIMES
    read = jax.jit(lambda x: jax.lax.fori_loop(0, times, lambda _, total: jnp.sum(x + total), 0.0))  # each waits for the one before
    bump = jax.jit(lambda x: jax.lax.fori_loop(0, times, lambda _, x: x + 1, x), donate_argnums=0)
    seconds = {"read": [], "both": []}
    for _ in range(repeats + 1):  # the first round compiles
        seconds["read"].append(_seconds(read, x)[0])
        took, x = _seconds(bump, x)
        seconds["both"].append(took)
    return max(n * times * x.nbytes / min(seconds[k][1:]) for k, n in (("read", 1), ("both", 2)))


def arithmetic(dtype, repeats=9):
    """Return the floating-point operations a second of a large matrix product on the default device, of the best of `repeats`; float32 is
    multiplied as such, as the ops do."""
    side = SIDE.get(jax.default_backend(), SIDE["other"])
    x, product = jnp.ones((side, side), dtype), jax.jit(partial(jnp.matmul, precision=exact(jnp.ones((), dtype))))
    seconds = [_seconds(product, x, x)[0] for _ in range(repeats + 1)]
    return 2 * side**3 / min(seconds[1:])


def _row(op, case, implementation, device, empty, repeats):
    module, this, plain_way, chain = OPS[op]
    arrays = getattr(module, "arrays", kernel_cases.arrays)
    inputs = [arrays(case)]
    layers = _layers(module.floor_bytes(case), sum(x.nbytes for x in jax.tree.leaves(inputs)))
    inputs += [arrays(case, seed) for seed in range(1, layers)]
    this = partial(this, **module.options(case), implementation=implementation)
    programs = {"ms": this, "dense_ms": partial(plain_way, **case.options)}
    if (selects := getattr(module, "SELECTS", None)) and case.M:
        programs["whole_ms"] = partial(_without, this, selects)
    given = {name: inputs for name in programs} | {"dense_ms": [getattr(module, "copied", dict)(a) for a in inputs]}
    timers = {name: _timer(module, f, chain, given[name]) for name, f in programs.items()}
    # XLA's products of float32 are whole only where asked; the op asks by itself.
    with jax.default_matmul_precision("highest") if case.dtype == "float32" else contextlib.nullcontext():
        taken = _medians(timers, empty, repeats)
    ms: dict[str, Any] = {"whole_ms": None} | {name: s and s / layers * 1e3 for name, s in taken.items()}
    flops = module.flops(case)
    floor_ms = module.floor_bytes(case) / bandwidth(repeats) * 1e3  # right after the case: rates move from minute to minute
    floor_ms = max(floor_ms, flops / arithmetic(case.dtype, repeats) * 1e3)
    facts = {"op": op, "case": case.name, "implementation": implementation or "auto", "device": device.device_kind}
    speed = {"floor_ms": floor_ms, "gb_per_s": module.floor_bytes(case) / ms["ms"] / 1e6}
    speed["gflop_per_s"] = flops / ms["ms"] / 1e6
    ratios = {"speedup": ms["dense_ms"] and ms["dense_ms"] / ms["ms"], "of_whole": ms["whole_ms"] and ms["whole_ms"] / ms["ms"]}
    return facts | ms | speed | {"of_floor": floor_ms / ms["ms"]} | ratios


def _layers(floor_bytes, nbytes):
    """Return how many calls one program makes: of a few megabytes in all on a CPU; elsewhere as many as take milliseconds, since starting a
    program takes tens of microseconds there, and fit the memory."""
    if jax.default_backend() == "cpu":
        return max(1, min(8, BYTES // floor_bytes))
    return max(1, min(MOST_LAYERS, LONG // floor_bytes, MOST_BYTES // nbytes))


def _medians(timers, empty, repeats):
    """Return the median seconds of each timer, taking turns; None for one beside the op that does not fit the device's memory."""
    seconds, left = {name: [] for name in timers}, dict(timers)
    for _ in range(repeats + 1):  # the first round compiles
        for name, timer in list(left.items()):
            empty()
            try:
                seconds[name].append(timer())
            except jax.errors.JaxRuntimeError as error:
                if name == "ms" or "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                del left[name]
    return {name: float(np.median(s[1:])) if name in left else None for name, s in seconds.items()}


def _without(f, key, *arrays, **keys):
    """Call f without the argument that names a selection."""
    return f(*arrays, **{name: x for name, x in keys.items() if name != key})


def _timer(module, f, chain, inputs):
    """Return a function that runs f on each layer's arrays and returns the seconds that took."""
    given = getattr(module, "GIVEN", ())
    if not given:
        program = jax.jit(partial(_stack, module, f, chain))
        return lambda: _seconds(program, inputs)[0]
    program = jax.jit(partial(_stack_in_place, module, f, given), donate_argnums=0)
    held = [{name: jnp.copy(a[name]) for name in given} for a in inputs]
    kept = [{name: x for name, x in a.items() if name not in given} for a in inputs]

    def run():
        took, held[:] = _seconds(program, held, kept)
        return took

    return run


def _stack(module, f, chain, inputs):
    """Run f on each layer's arrays, each call waiting for the one before: its output changes the next one's input."""
    chained = getattr(module, "CHAINED", "q")
    out, x = None, inputs[0][chained]
    for a in inputs:
        positional, keys = module.arguments(a | {chained: x})
        out = f(*positional, **keys)
        x = chain(x, out)
    return out


def _stack_in_place(module, f, given, held, kept):
    """Run f on each layer's arrays, of which those that it gives back are given away to it."""
    return [dict(zip(given, f(*module.arguments(a | b)[0]))) for a, b in zip(held, kept)]


def _seconds(program, *args):
    start = time.perf_counter()
    out = jax.block_until_ready(program(*args))
    return time.perf_counter() - start, out


def _plain_mass(q_BTNH, k_BKCH, lse_BTN, order_BKC, lo_BT, hi_BT, weight_BT, *, scale, softcap):
    (B, T, N), K = lse_BTN.shape, k_BKCH.shape[1]
    lse = lse_BTN.reshape(B, T, K, N // K, 1).swapaxes(1, 2)
    p = jnp.exp(_plain_scores(q_BTNH, k_BKCH, order_BKC, lo_BT, hi_BT, scale, softcap) - lse)
    return jnp.einsum("bktgc,bt->bkc", p, weight_BT)


def _library_attention(q_BTNH, k_BKCH, v_BKCH, order_BKC, lo_BT, hi_BT, *, scale, softcap):
    """jax's own attention with a mask; the textbook where scores are capped, which that cannot do. Heads hold the same rows."""
    if softcap:
        return _plain_attention(q_BTNH, k_BKCH, v_BKCH, order_BKC, lo_BT, hi_BT, scale=scale, softcap=softcap)
    order_B11C = order_BKC[:, :1, None]
    mask_B1TC = (order_B11C >= lo_BT[:, None, :, None]) & (order_B11C <= hi_BT[:, None, :, None])
    return jax.nn.dot_product_attention(q_BTNH, k_BKCH.swapaxes(1, 2), v_BKCH.swapaxes(1, 2), mask=mask_B1TC, scale=scale)


def _dense_prefill(q_BTNH, k_BKCH, v_BKCH, order_BKC, lo_BT, hi_BT, block_BKQM, row_BKM=None, *, scale, softcap):
    """The same prompt, all of it read: what choosing blocks is worth."""
    first = k_BKCH.shape[2] - q_BTNH.shape[1]
    return flash_prefill(q_BTNH, k_BKCH, v_BKCH, order_BKC, lo_BT, hi_BT, scale=scale, softcap=softcap, first=first, finite=True)


def _plain_tree(q_BTNH, k_BKCH, v_BKCH, order_BKC, lo_BT, hi_BT, k_BKWH, v_BKWH, among_BTW, *, scale, softcap):
    """Textbook attention of the draft behind the cache, which the draft is first joined to."""
    k_BKXH, v_BKXH = jnp.concatenate([k_BKCH, k_BKWH], 2), jnp.concatenate([v_BKCH, v_BKWH], 2)
    order_BKX = jnp.pad(order_BKC, [(0, 0), (0, 0), (0, k_BKWH.shape[2])])
    bounds = jnp.full_like(lo_BT, -1), jnp.full_like(hi_BT, 2**30)
    score = _plain_scores(q_BTNH, k_BKXH, order_BKX, *bounds, scale, softcap)
    order, lo, hi = order_BKC[:, :, None, None], lo_BT[:, None, :, None, None], hi_BT[:, None, :, None, None]
    stored = jnp.broadcast_to((order >= lo) & (order <= hi), (*score.shape[:4], order_BKC.shape[2]))
    draft = jnp.broadcast_to(among_BTW[:, None, :, None], (*score.shape[:4], among_BTW.shape[2]))
    p = jax.nn.softmax(jnp.where(jnp.concatenate([stored, draft], -1), score, -jnp.inf))
    return jnp.einsum("bktgc,bkch->btkgh", p.astype(v_BKXH.dtype), v_BKXH).reshape(q_BTNH.shape)


def _chain_attention(q_BTNH, out):
    return out[0] if isinstance(out, tuple) else out


def _chain_mass(q_BTNH, mass_BKC):
    return q_BTNH + (1e-30 * mass_BKC.min()).astype(q_BTNH.dtype)


def _chain_first(x, out):
    return _chain_mass(x, out[0] if isinstance(out, tuple) else out)


OPS = {
    "block_sparse_prefill": (block_sparse_prefill_cases, block_sparse_prefill, _dense_prefill, _chain_attention),
    "flash_prefill": (flash_prefill_cases, flash_prefill, _library_attention, _chain_attention),
    "tree_attention": (tree_attention_cases, tree_attention, _plain_tree, _chain_attention),
    "decode_attention": (decode_attention_cases, decode_attention, _plain_attention, _chain_attention),
    "column_mass": (column_mass_cases, column_mass, _plain_mass, _chain_mass),
    "quant_decode": (quant_decode_cases, quant_decode, plain.quant_decode, _chain_attention),
    "page_scores": (page_scores_cases, page_scores, plain.page_scores, _chain_first),
    "compact_rows": (compact_rows_cases, compact_rows, plain.compact_rows, None),
    "lowrank_scores": (lowrank_scores_cases, lowrank_scores, plain.lowrank_scores, _chain_first),
    "shared_prefix": (shared_prefix_cases, shared_prefix, plain.shared_prefix, _chain_attention),
    "bipartite_match": (bipartite_match_cases, bipartite_match, plain.bipartite_match, _chain_first),
    "k_centre": (k_centre_cases, k_centre, plain.k_centre, _chain_first),
}
