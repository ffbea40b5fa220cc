"""Small calls of both ops for the tests, and what they must return, in numpy loops that follow the definition."""

import jax.numpy as jnp
import numpy as np
import pytest

from tokeff.kernels import cases
from tokeff.kernels.cases import Case
from tokeff.kernels.column_mass import cases as column_mass_cases
from tokeff.kernels.decode_attention import cases as decode_attention_cases

SMALL = (
    Case("one_row", N=6, K=2, C=40, H=16),
    Case("grouped_odd", B=2, T=3, N=6, K=2, C=37, H=16),
    Case("softcap", B=2, T=2, N=2, K=2, C=24, H=16, softcap=2.0),
    Case("many_rows", B=1, T=40, N=4, K=2, C=300, H=16),
)
PAGED = (
    Case("rows", B=2, T=2, N=6, K=2, C=50, H=16, M=9, page_size=1),
    Case("pages_odd", B=1, T=2, N=4, K=2, C=50, H=16, M=3, page_size=3),
    Case("pages16", B=2, T=3, N=4, K=2, C=150, H=16, M=5, page_size=16),  # the last page is cut at 150
    Case("pages128", B=2, T=3, N=4, K=2, C=500, H=16, M=2, page_size=128),
)
WIDE = Case(
    "wide", B=2, T=3, N=6, K=2, C=300, H=128
)  # heads as wide as a TPU tile, which its kernel lays out its own way
WIDE_PAGED = Case("wide_pages16", B=2, T=3, N=4, K=2, C=150, H=128, M=5, page_size=16)
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}


def params(cases, dtypes=("float32",)):
    """Return pytest parameters: each case in each dtype."""
    return [pytest.param(Case(**{**c.__dict__, "dtype": d}), id=f"{c.name}-{d}") for c in cases for d in dtypes]


def ragged(case, seed=0, bad=np.nan):
    """Return the arrays of a case as caches get: empty slots (holding `bad`), windows, a query that sees nothing."""
    a = cases.arrays(case, seed, empty=0.25, bad=bad)
    rng = np.random.default_rng(seed + 1)
    hi = rng.integers(0, case.C, a["hi"].shape)
    lo = np.maximum(0, hi - rng.integers(0, case.C, hi.shape))
    lo[-1, -1], hi[-1, -1] = case.C, 0
    a |= {"lo": jnp.asarray(lo, jnp.int32), "hi": jnp.asarray(hi, jnp.int32)}
    a["weight"] = jnp.asarray(rng.random(hi.shape), jnp.float32)
    if case.M > 1:
        a["page"] = a["page"].at[0, 0, 1].set(-1)
    return a


def biased(case):
    """`ragged`, in which every slot stands for 1 to 9 rows."""
    many = np.random.default_rng(7).integers(1, 10, (case.B, case.K, case.C))
    return ragged(case) | {"bias": jnp.asarray(np.log(many), jnp.float32)}


def attention_call(case, a):
    """Return (arrays in the order implementations take, static options)."""
    positional, keys = decode_attention_cases.arguments(a)
    return (*positional, keys.get("page_BKM"), keys.get("bias_BKC")), decode_attention_cases.options(case) | {"finite": False}


def mass_call(case, a):
    """Return (arrays in the order implementations take, static options), with the true log-sum-exp."""
    lse = naive_attention(case, a)[1]
    a = a | {"lse": jnp.asarray(lse, jnp.float32)}
    arrays = tuple(a[name] for name in ("q", "k", "lse", "weight", "order", "lo", "hi"))
    return arrays, column_mass_cases.options(case)


def mass_arguments(case, a):
    """Return the positional arguments of the public op, with the true log-sum-exp."""
    (q, k, lse, weight, order, lo, hi), _ = mass_call(case, a)
    return q, k, lse, order, lo, hi, weight


def naive_attention(case, a):
    """Return (out, lse) in float64, one query and head at a time."""
    out, lse = np.zeros(a["q"].shape), np.full(a["q"].shape[:3], -np.inf)
    for b, t, n, slots, scores in _pairs(case, a):
        if len(slots):
            top = scores.max()
            p = np.exp(scores - top)
            out[b, t, n] = p @ np.asarray(a["v"], np.float64)[b, n // (case.N // case.K), slots] / p.sum()
            lse[b, t, n] = top + np.log(p.sum())
    return out, lse


def naive_mass(case, a):
    """Return the mass in float64, one query and head at a time."""
    mass, lse = np.zeros(a["order"].shape), naive_attention(case, a)[1]
    for b, t, n, slots, scores in _pairs(case, a):
        mass[b, n // (case.N // case.K), slots] += float(a["weight"][b, t]) * np.exp(scores - lse[b, t, n])
    return mass


def _pairs(case, a):
    """Yield (b, t, n, slots it sees, scores of these slots) for every query head."""
    q, k = (np.asarray(a[name], np.float64) for name in ("q", "k"))
    order, lo, hi = (np.asarray(a[name]) for name in ("order", "lo", "hi"))
    for b, t, n in np.ndindex(q.shape[:3]):
        head = n // (case.N // case.K)
        see = (order[b, head] >= lo[b, t]) & (order[b, head] <= hi[b, t])
        if "page" in a:
            see &= np.isin(np.arange(case.C) // case.page_size, np.asarray(a["page"])[b, head])
        slots = np.flatnonzero(see)
        scores = k[b, head, slots] @ q[b, t, n] * case.options["scale"]
        scores = case.softcap * np.tanh(scores / case.softcap) if case.softcap else scores
        yield b, t, n, slots, scores + np.asarray(a["bias"], np.float64)[b, head, slots] if "bias" in a else scores


def assert_close(got, want, dtype):
    """Compare arrays, or tuples of them, as float32; infinities must agree."""
    got, want = (x if isinstance(x, tuple) else (x,) for x in (got, want))
    for x, y in zip(got, want, strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
