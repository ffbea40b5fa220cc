"""The ops that share test_kernel_ops.py: small calls of each, and what they must return, in loops that follow the definition."""

import dataclasses
import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from kernel_calls import naive_attention

from tokeff.kernels import dispatch
from tokeff.kernels.bench import OPS as BENCHED
from tokeff.kernels.bipartite_match import cases as bipartite_cases
from tokeff.kernels.compact_rows import cases as compact_cases
from tokeff.kernels.k_centre import cases as centre_cases
from tokeff.kernels.lowrank_scores import cases as lowrank_cases
from tokeff.kernels.page_scores import cases as page_cases
from tokeff.kernels.quant_decode import cases as quant_cases
from tokeff.kernels.shared_prefix import cases as prefix_cases

PUBLIC = {op: (public, cases) for op, (cases, public, *_) in BENCHED.items()}
SMALL = {
    "quant_decode": (
        quant_cases.Case("int4", B=2, T=3, N=6, K=2, C=40, H=32, page_size=8, group=16),
        quant_cases.Case("int4_tiles", T=20, N=4, K=1, C=24, H=32, page_size=8, group=16),  # 80 rows: two tiles on a GPU
        quant_cases.Case("int8_softcap", N=4, K=2, C=21, H=16, page_size=7, bits=8, group=8, softcap=2.0),
        quant_cases.Case("int2_two_blocks", N=2, K=1, C=516, H=64, page_size=4, bits=2, group=64),
    ),
    "page_scores": (
        page_cases.Case("quest", B=2, T=3, N=6, K=2, C=70, H=16, M=4, page_size=4),
        page_cases.Case("chunks", N=4, K=2, C=60, H=16, M=15, page_size=4, chunks=2),
        page_cases.Case("mean_wide", B=1, T=2, N=2, K=1, C=200, H=128, M=9, page_size=1, summaries=1),
    ),
    "compact_rows": (
        compact_cases.Case("slots_on_lanes", B=1, N=2, K=2, C=256, H=16, M=9),
        compact_cases.Case("rows", B=2, N=2, K=2, C=48, H=128, M=12),
        compact_cases.Case("draft", B=2, N=2, K=2, C=256, H=16, M=5, W=7),
        compact_cases.Case("draft_wide", N=2, K=2, C=48, H=128, M=9, W=20),
    ),
    "lowrank_scores": (
        lowrank_cases.Case("tree", B=2, T=2, N=6, K=2, C=45, H=32, M=3, page_size=4, rank=7),
        lowrank_cases.Case("long", N=2, K=1, C=550, H=32, M=65, page_size=8, rank=40),
    ),
    "shared_prefix": (
        prefix_cases.Case("groups", B=6, T=2, N=6, K=2, C=37, H=16, J=2),
        prefix_cases.Case("blocks", B=33, N=8, K=1, C=30, H=16),
    ),
    "bipartite_match": (
        bipartite_cases.Case("odd", B=2, S=37, H=24, protected=3),
        bipartite_cases.Case("blocks", S=540, H=8),
    ),
    "k_centre": (centre_cases.Case("some", B=2, P=37, M=9), centre_cases.Case("all", P=11, M=11)),
}
OPS = tuple(SMALL)


def both(case):
    """Return the case in float32 and, where the op takes it, in bfloat16."""
    return [dataclasses.replace(case, dtype=dtype) for dtype in ("float32", "bfloat16") if dtype == "float32" or hasattr(case, "H")]


def poisoned(op, case, seed=0, bad=np.nan):
    """Return the arrays of a case in which a quarter of what may be left out is left out, and holds `bad`; and a blind query."""
    bad = 0.0 if op == "bipartite_match" else bad  # a row there is always read; a row of zeros has no direction
    a = PUBLIC[op][1].arrays(case, seed, empty=0.25, bad=bad)
    if "hi" in a:
        rng = np.random.default_rng(seed + 1)
        hi = rng.integers(0, case.C, a["hi"].shape)
        lo = np.maximum(0, hi - rng.integers(0, case.C, hi.shape))
        lo[-1, -1], hi[-1, -1] = case.C, 0
        a |= {"lo": jnp.asarray(lo, jnp.int32), "hi": jnp.asarray(hi, jnp.int32)}
    return a


def public(op, case, a, implementation=None, mesh=None, **more):
    """Call the op as a user does, with `more` options changed, and nothing promised else; a tuple of what it returns."""
    f, cases = PUBLIC[op]
    positional, keys = cases.arguments(a)
    options = cases.options(case)
    options |= ({"finite": False} if "finite" in options else {}) | more
    out = f(*positional, **keys, **options, implementation=implementation, mesh=mesh)
    return out if isinstance(out, tuple) else (out,)


class Recorded(Exception):
    """What an op would have dispatched."""


def internal(op, case, a, **more):
    """Return (the op, its arrays in the order implementations take, static options)."""

    def record(spec, implementation, mesh, arrays, **options):
        raise Recorded(spec, arrays, options)

    with mock.patch.object(dispatch, "call", record):
        try:
            public(op, case, a, **more)
        except Recorded as call:
            return call.args
    raise AssertionError(f"{op} dispatched nothing")


def naive(op, case, a):
    """Return what the op must return, as a tuple of float64 or whole numbers."""
    a = {name: np.asarray(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x) for name, x in a.items()}
    return NAIVE[op](case, a)


def _naive_quant(case, a):
    for name in ("k", "v"):
        code, zero, step = (a[key].astype(np.float64) for key in (name, f"{name}_zero", f"{name}_step"))
        (B, K, P, R, Z), (_, Q) = code.shape, zero.shape[3:]
        x = np.zeros((B, K, P, R, case.H))
        for b, k, p, r, h in np.ndindex(x.shape):
            number = int(code[b, k, p, r, h % Z]) >> (case.bits * (h // Z)) & (2**case.bits - 1)
            at = b, k, p, min(r, zero.shape[3] - 1), h // (case.H // Q)
            x[b, k, p, r, h] = zero[at] + step[at] * number
        a = a | {name: x.reshape(B, K, P * R, case.H)}
    return naive_attention(case, a | {"order": a["order"].reshape(*a["order"].shape[:2], -1)})


def _naive_pages(case, a):
    M, G = case.M, case.N // case.K
    shape = (case.B, case.K, case.T, M)
    worth, page = np.full(shape, -np.inf), np.full(shape, -1)
    for b, k, t in np.ndindex(*shape[:3]):
        found = []
        for p in np.flatnonzero(a["open"][b, k, t]):
            chunks = []
            for c in range(p * case.chunks, (p + 1) * case.chunks):
                low, high = (a[name][b, k, c].astype(np.float64) for name in ("low", "high" if "high" in a else "low"))
                q = a["q"][b, t, k * G : (k + 1) * G].astype(np.float64)
                chunks.append(np.maximum(q * low, q * high).sum() * case.scale)
            found.append((-max(chunks), p))
        for m, (w, p) in enumerate(sorted(found)[:M]):
            worth[b, k, t, m], page[b, k, t, m] = -w, p
    return worth, page


def _naive_rows(case, a):
    k, v = a["k"].copy(), a["v"].copy()
    for b, head, m in np.ndindex(a["from"].shape):
        source, goal = a["from"][b, head, m], a["to"][b, head, m]
        if source >= 0 and goal >= 0:
            k[b, head, goal], v[b, head, goal] = (a[f"{x}_draft" if case.W else x][b, head, source] for x in "kv")
    return k, v


def _naive_lowrank(case, a):
    G, R, h = case.N // case.K, case.page_size, case.H // 2
    score = np.full((case.B, case.K, case.T, G, case.M * R), -np.inf)
    for b, k, t, m in np.ndindex(a["page"].shape):
        if (page := a["page"][b, k, t, m]) < 0:
            continue
        for r, g in itertools.product(range(R), range(G)):
            row = page * R + r
            key = a["low"][b, row].astype(np.float64) @ a["basis"][b, :, k].astype(np.float64)
            turned = (key[:h] + 1j * key[h:]) * np.exp(1j * a["angle"][b, row] * a["freq"].astype(np.float64))
            q = a["q"][b, t, k * G + g].astype(np.float64)
            score[b, k, t, g, m * R + r] = (q[:h] @ turned.real + q[h:] @ turned.imag) * case.H**-0.5
    return (score,)


def _naive_prefix(case, a):
    return naive_attention(case, prefix_cases.copied({name: jnp.asarray(x) for name, x in a.items()}))


def _naive_match(case, a):
    x = a["metric"].astype(np.float64)
    even = range(0, case.S, 2)
    cosine, partner = np.full((case.B, len(even)), -np.inf), np.zeros((case.B, len(even)), int)
    for b, i in itertools.product(range(case.B), even):
        for j in range(1, case.S, 2):
            near = x[b, i] @ x[b, j] / max(np.linalg.norm(x[b, i]), 1e-20) / max(np.linalg.norm(x[b, j]), 1e-20)
            if min(i, j) >= case.protected and near > cosine[b, i // 2]:
                cosine[b, i // 2], partner[b, i // 2] = near, j // 2
    return cosine, partner


def _naive_centre(case, a):
    index = np.zeros((case.B, case.M), int)
    for b, d in enumerate(a["distance"]):
        real = [p for p in range(case.P) if not np.isnan(d[p, p])]
        left, chosen = list(range(case.P)), []
        for m in range(case.M):
            far = {p: min((d[p, c] for c in (chosen or real) if c != p and not np.isnan(d[p, c])), default=np.inf) for p in left}
            best = max((p for p in left if p in real), key=lambda p: (far[p], -p), default=None)
            index[b, m] = left[0] if best is None else best
            left.remove(index[b, m])
            chosen.append(index[b, m])
    return (index,)


NAIVE = {
    "quant_decode": _naive_quant,
    "page_scores": _naive_pages,
    "compact_rows": _naive_rows,
    "lowrank_scores": _naive_lowrank,
    "shared_prefix": _naive_prefix,
    "bipartite_match": _naive_match,
    "k_centre": _naive_centre,
}


def structs(op, case, sharding=None):
    """Return the shapes of a case, laid out."""
    shapes = PUBLIC[op][1].structs(case)
    return {name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding) for name, s in shapes.items()}
