"""Real shapes of compact_rows: an accepted path of a tree (8 rows) and rows that fill the slots eviction freed (64)."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from tokeff.kernels import cases


@dataclass(frozen=True)
class Case(cases.Case):
    """M rows of each head move among C slots."""

    @property
    def options(self):
        """Keyword arguments of the op: none."""
        return {}


CPU = (
    Case("smol_8k_commit8", C=8192, M=8),
    Case("smol_8k_compact64", C=8192, M=64),
)
ACCELERATOR = (
    Case("8b_8k_commit8", B=8, N=32, K=8, C=8192, H=128, M=8, dtype="bfloat16"),
    Case("8b_8k_compact64", B=8, N=32, K=8, C=8192, H=128, M=64, dtype="bfloat16"),
    Case("8b_8k_compact64_f32", B=2, N=32, K=8, C=8192, H=128, M=64),
    Case("smol_8k_commit8_f32", C=8192, M=8),
)
CASES = CPU + ACCELERATOR
GIVEN = ("k", "v")  # written in place


def structs(case):
    """Return {name: jax.ShapeDtypeStruct} of the arrays of a case."""
    shapes = cases.structs(case)
    return {name: shapes[name] for name in ("k", "v")} | dict.fromkeys(("from", "to"), shapes["page"])


def arrays(case, seed=0, empty=0.0, bad=0.0):
    """Return {name: array} of a case: distinct slots to go to, and to come from, which may be the same ones. A share `empty` of the pairs
    moves nothing; slots that no row comes from hold `bad` where it is not 0."""
    rng = np.random.default_rng(seed)
    shape = {name: s.shape for name, s in structs(case).items()}
    slots = np.broadcast_to(np.arange(case.C), (case.B, case.K, case.C))
    out = {name: rng.permuted(slots, axis=-1)[..., : case.M] for name in ("from", "to")}
    for name in out:
        out[name] = np.where(rng.random(shape[name]) < empty, -1, out[name])
    for name in ("k", "v"):
        out[name] = rng.standard_normal(shape[name], np.float32)
        if bad:
            used = (slots[..., None] == out["from"][:, :, None]).any(-1)
            out[name][~used] = bad
    return {name: jnp.asarray(out[name], s.dtype) for name, s in structs(case).items()}


def arguments(a):
    """Return (positional, keyword) arguments of the op from the arrays, or structs, of a case."""
    return (a["k"], a["v"], a["from"], a["to"]), {}


def options(case):
    """Return the static keyword arguments of the op."""
    return case.options


def floor_bytes(case):
    """Return the bytes the op cannot do without: M rows of K and V read and written, and their slots."""
    return case.B * case.K * case.M * (4 * case.H * jnp.dtype(case.dtype).itemsize + 8)


def flops(case):
    """Return the floating-point operations: none."""
    return 0
