"""Real shapes of page_scores: Quest's pages of 16 rows over SmolLM2-135M (9 / 3 heads of 64) and an 8B model (32 / 8 heads of 128)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.kernels import cases


@dataclass(frozen=True)
class Case(cases.Case):
    """C slots in pages of `page_size` rows, of which M are chosen. summaries: two a chunk (lowest and highest key) or one (mean)."""

    M: int = 64
    page_size: int = 16
    chunks: int = 1
    summaries: int = 2
    scale: float = 0.125

    @property
    def options(self):
        """Keyword arguments of the op."""
        return {"most": self.M, "chunks": self.chunks, "scale": self.scale}


CPU = (
    Case("smol_8k_quest", C=8192),
    Case("smol_32k_quest", C=32768),
    Case("smol_32k_mean_tree16", C=32768, T=16, summaries=1),
)
ACCELERATOR = (
    Case("8b_32k_quest", B=8, N=32, K=8, C=32768, H=128, dtype="bfloat16"),
    Case("8b_128k_lserve", B=1, N=32, K=8, C=2**17, H=128, M=128, page_size=64, chunks=4, dtype="bfloat16"),
    Case("smol_odd_mean", C=8200, T=3, summaries=1),
)
CASES = CPU + ACCELERATOR


def structs(case):
    """Return {name: jax.ShapeDtypeStruct} of the arrays of a case; 'high' only with two summaries."""
    B, T, N, K, H = case.B, case.T, case.N, case.K, case.H
    P = -(-case.C // case.page_size)
    floats = {"q": (B, T, N, H), "low": (B, K, P * case.chunks, H)}
    floats |= {"high": floats["low"]} if case.summaries == 2 else {}
    out = {name: jax.ShapeDtypeStruct(s, case.dtype) for name, s in floats.items()}
    return out | {"open": jax.ShapeDtypeStruct((B, K, T, P), "bool")}


def arrays(case, seed=0, empty=0.0, bad=0.0):
    """Return {name: array} of a case. A share `empty` of the pages is closed to all queries, and its summaries are `bad`."""
    rng = np.random.default_rng(seed)
    shape = {name: s.shape for name, s in structs(case).items()}
    closed = rng.random(shape["open"][:2] + shape["open"][3:]) < empty
    keys = rng.standard_normal((case.summaries, *shape["low"]), np.float32)
    low, high = keys.min(0), keys.max(0)
    low[np.repeat(closed, case.chunks, -1)] = high[np.repeat(closed, case.chunks, -1)] = bad
    out = {"q": rng.standard_normal(shape["q"], np.float32), "low": low, "high": high}
    out["open"] = np.broadcast_to(~closed[:, :, None], shape["open"])
    return {name: jnp.asarray(out[name], s.dtype) for name, s in structs(case).items()}


def arguments(a):
    """Return (positional, keyword) arguments of the op from the arrays, or structs, of a case."""
    return (a["q"], a["low"], a.get("high"), a["open"]), {}


def options(case):
    """Return the static keyword arguments of the op."""
    return case.options


def floor_bytes(case):
    """Return the bytes the op cannot do without: summaries, and which pages are open."""
    chunk = case.summaries * case.H * jnp.dtype(case.dtype).itemsize * case.chunks + case.T
    return case.B * case.K * -(-case.C // case.page_size) * chunk


def flops(case):
    """Return the floating-point operations: a product for each summary, and the sum over a group's heads."""
    rows, chunks = case.T * case.N // case.K, -(-case.C // case.page_size) * case.chunks
    return case.B * case.K * rows * chunks * (2 * case.summaries * case.H + 1)
