"""Real shapes of lowrank_scores: ShadowKV on SmolLM2-135M (rank 30 of 192) and on an 8B model (rank 160 of 1024), chunks of 8 rows."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.kernels import cases


@dataclass(frozen=True)
class Case(cases.Case):
    """C rows of rank `rank`, of which a query reads M pages."""

    M: int = 64
    page_size: int = 8
    rank: int = 30

    @property
    def options(self):
        """Keyword arguments of the op."""
        return {"gain": 1.0, "page_size": self.page_size, "scale": self.H**-0.5}


CPU = (
    Case("smol_8k_chunks64", C=8192),
    Case("smol_8k_chunks128", C=8192, M=128),
)
ACCELERATOR = (
    Case("8b_32k_chunks128", B=8, N=32, K=8, C=32768, H=128, M=128, rank=160, dtype="bfloat16"),
    Case("smol_8k_chunks64_f32", C=8192),
)
CASES = CPU + ACCELERATOR


def structs(case):
    """Return {name: jax.ShapeDtypeStruct} of the arrays of a case."""
    B, T, K, S, Y = case.B, case.T, case.K, case.C, case.rank
    freq = {"freq": (case.H // 2,)}
    floats = {"q": (B, T, case.N, case.H), "low": (B, S, Y), "basis": (B, Y, K, case.H)}
    ints = {"angle": (B, S), "page": (B, K, T, case.M)}
    groups = ((case.dtype, floats), ("int32", ints), ("float32", freq))
    return {name: jax.ShapeDtypeStruct(s, dtype) for dtype, group in groups for name, s in group.items()}


def arrays(case, seed=0, empty=0.0, bad=0.0):
    """Return {name: array} of a case. A share `empty` of the page numbers is -1; rows that no page names are `bad` where it is not 0."""
    rng = np.random.default_rng(seed)
    shape = {name: s.shape for name, s in structs(case).items()}
    out = {name: rng.standard_normal(shape[name], np.float32) for name in ("q", "low")}
    out["basis"] = rng.standard_normal(shape["basis"], np.float32) * case.rank**-0.5
    P = case.C // case.page_size
    page = rng.permuted(np.broadcast_to(np.arange(P), (*shape["page"][:3], P)), axis=-1)[..., : case.M]
    out["page"] = np.where(rng.random(shape["page"]) < empty, -1, page)
    if bad:
        used = (np.arange(P)[:, None] == out["page"].reshape(case.B, 1, -1)).any(-1)
        out["low"][~np.pad(np.repeat(used, case.page_size, 1), [(0, 0), (0, case.C - P * case.page_size)])] = bad
    out["freq"] = 10_000.0 ** (-np.arange(0, case.H, 2) / case.H)
    out["angle"] = np.broadcast_to(np.arange(case.C), shape["angle"])
    return {name: jnp.asarray(out[name], s.dtype) for name, s in structs(case).items()}


def arguments(a):
    """Return (positional, keyword) arguments of the op from the arrays, or structs, of a case."""
    return tuple(a[name] for name in ("q", "low", "basis", "angle", "page", "freq")), {}


def options(case):
    """Return the static keyword arguments of the op."""
    return case.options


def floor_bytes(case):
    """Return the bytes the op cannot do without: the chosen rows and their angles, the basis, and the scores written."""
    itemsize, X = jnp.dtype(case.dtype).itemsize, case.M * case.page_size
    heads = case.T * X * (case.rank * itemsize + 4 + 4 * case.N // case.K) + case.rank * case.H * itemsize
    return case.B * case.K * heads


def flops(case):
    """Return the floating-point operations: keys rebuilt, turned (6 for a pair) and scored."""
    return case.B * case.K * case.T * case.M * case.page_size * case.H * (2 * case.rank + 3 + 2 * case.N // case.K)
