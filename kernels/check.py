"""Is an op right where it runs? Its real shapes against the float32 definition, twice, and with garbage where nobody looks.

Tests do this for small shapes by interpretation; here the kernel itself runs, on the device of this machine.
"""

import contextlib
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.kernels import cases as kernel_cases
from tokeff.kernels.bench import OPS

KERNEL = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # of `deviation`; devices have an exp of their own
TINY = 1e-6  # a row of zeros has no size
SWAPPED = 1e-3  # share of whole numbers that may differ: two pages, or two rows, that are worth the same but for rounding
PIECE = 512  # queries of a prompt whose definition is computed at a time: it holds all scores
EMPTY = 0.25  # share of slots, rows or pages that are poisoned


def check(op, case, implementation=None):
    """Run one case on the default device, as it is and poisoned.

    Args:
      op: a name in `tokeff.kernels.bench.OPS`.
      case: one of its cases.
      implementation: as of the op; None takes the kernel of this device, and what the op takes by itself where that refuses the case.

    Returns:
      {op, case, implementation, refusal: why the kernel was not it, or None, device, dtype, error and poisoned_error: the largest
      `deviation` from the definition (infinite where one is no number and the other is), swapped: the largest share of whole
      numbers that differ, repeats: whether second runs were equal bit for bit, seconds, passed}.

    Raises:
      ValueError: a named implementation does not support the case.
    """
    start, device = time.perf_counter(), jax.devices()[0]
    refusal = None
    if implementation is None and (kernel := KERNEL.get(device.platform)):
        implementation, refusal = _supported(op, case, kernel)
    found = {name: _compare(op, case, a, options, implementation) for name, (a, options) in _calls(op, case).items()}
    error, poisoned_error = (found[name][0] for name in ("clean", "poisoned"))
    swapped, repeats = max(x[1] for x in found.values()), all(x[2] for x in found.values())
    passed = max(error, poisoned_error) <= TOLERANCE[case.dtype] and swapped <= SWAPPED and repeats
    facts = {"op": op, "case": case.name, "implementation": implementation or "auto", "refusal": refusal, "device": device.device_kind}
    told = {"error": _number(error), "poisoned_error": _number(poisoned_error), "swapped": swapped, "repeats": repeats}
    return facts | {"dtype": case.dtype} | told | {"seconds": time.perf_counter() - start, "passed": passed}


def deviation(got, want):
    """Return (largest error of floats, largest share of whole numbers that differ) between two trees of arrays.

    An error is |x - y| by |y|, by the root mean square of y's row (last axis) where that is more, and by 1 where both are: attention over
    thousands of rows gives numbers of some hundredths, next to which one lost block of rows is to be seen.
    """
    error, swapped = 0.0, 0.0
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            swapped = max(swapped, float(np.mean(np.asarray(x) != np.asarray(y))))
            continue
        x, y = (np.asarray(z, np.float32) for z in (x, y))
        finite = np.isfinite(x) & np.isfinite(y)
        if not np.array_equal(x[~finite], y[~finite], equal_nan=True):
            return np.inf, swapped
        row = np.sqrt(np.mean(np.square(np.where(finite, y, 0)), axis=-1, keepdims=True)) if y.ndim else abs(y)
        scale = np.maximum(np.minimum(np.maximum(row, TINY), 1), abs(y))
        error = max(error, float((abs(x - y) / scale)[finite].max(initial=0)))
    return error, swapped


def _supported(op, case, kernel):
    """Return (kernel, None), or (None, why it does not take the case)."""
    module = OPS[op][0]
    structs = getattr(module, "structs", kernel_cases.structs)(case)
    try:
        jax.eval_shape(partial(_run, op, module.options(case), kernel), structs)
    except ValueError as refused:
        return None, " ".join(str(refused).split())
    return kernel, None


def _calls(op, case):
    """Return {'clean', 'poisoned': (arrays, options)}. Poisoned ones hold NaN where they are empty, and promise nothing."""
    module = OPS[op][0]
    arrays, options = getattr(module, "arrays", kernel_cases.arrays), module.options(case)
    bad = 0.0 if op == "bipartite_match" else np.nan  # a row there is always read; one of zeros has no direction
    a = arrays(case, 1, EMPTY, bad)
    if "hi" in a:  # and one query sees nothing
        a |= {"lo": a["lo"].at[-1, -1].set(case.C), "hi": a["hi"].at[-1, -1].set(0)}
    return {"clean": (arrays(case), options), "poisoned": (a, options | ({"finite": False} if "finite" in options else {}))}


def _compare(op, case, a, options, implementation):
    """Return (error, swapped, whether a second run was equal bit for bit) of one call."""
    f = jax.jit(partial(_run, op, options, implementation))
    # XLA's products of float32 are whole only where asked; a kernel asks by itself, and must be run as it is.
    whole = contextlib.nullcontext() if implementation in KERNEL.values() else jax.default_matmul_precision("highest")
    with whole:
        got, again = f(a), f(a)
    same = all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(again)))
    return *deviation(got, _definition(op, case, a, options)), same


def _run(op, options, implementation, a):
    """The op on the arrays of a case."""
    module, public = OPS[op][:2]
    positional, keys = module.arguments(a)
    return public(*positional, **keys, **options, implementation=implementation)


def _definition(op, case, a, options):
    """Return what the reference makes of a case, prompts a piece at a time."""
    f = jax.jit(partial(_run, op, options, "reference"))
    if not op.endswith("prefill"):
        return f(a)
    pieces = [jax.device_get(f(_piece(case, a, start))) for start in range(0, case.T, PIECE)]
    return tuple(np.concatenate(parts, axis=1) for parts in zip(*pieces))


def _piece(case, a, start):
    """Return the arrays of PIECE queries of a prompt, and the blocks that are named for them."""
    size, stop = case.page_size, start + PIECE
    piece = a | {name: a[name][:, start:stop] for name in ("q", "lo", "hi")}
    return piece | ({"block": a["block"][:, :, start // size : -(-stop // size)]} if "block" in a else {})


def _number(x):
    """Return a float that JSON can hold, or None for infinity."""
    return x if np.isfinite(x) else None
