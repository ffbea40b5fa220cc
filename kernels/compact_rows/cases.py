"""Real shapes of compact_rows: an accepted path (8 rows) of a draft of 16, and rows that fill the slots eviction freed (64)."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from tokeff.kernels import cases


@dataclass(frozen=True)
class Case(cases.Case):
    """M rows of each head move to C slots, from a draft of W rows, or from slots where there is none."""

    @property
    def options(self):
        """Keyword arguments of the op: none."""
        return {}


CPU = (
    Case("smol_8k_commit8", C=8192, M=8, W=16),
    Case("smol_8k_compact64", C=8192, M=64),
)
ACCELERATOR = (
    Case("8b_8k_commit8", B=8, N=32, K=8, C=8192, H=128, M=8, W=16, dtype="bfloat16"),
    Case("8b_8k_compact64", B=8, N=32, K=8, C=8192, H=128, M=64, dtype="bfloat16"),
    Case("8b_8k_compact64_f32", B=2, N=32, K=8, C=8192, H=128, M=64),
    Case("smol_8k_commit8_f32", C=8192, M=8, W=16),
)
CASES = CPU + ACCELERATOR
GIVEN = ("k", "v")  # written in place


def structs(case):
    """Return {name: jax.ShapeDtypeStruct} of the arrays of a case."""
    shapes = cases.structs(case)
    names = ("k", "v", *(("k_draft", "v_draft") if case.W else ()))
    return {name: shapes[name] for name in names} | dict.fromkeys(("from", "to"), shapes["page"])


def arrays(case, seed=0, empty=0.0, bad=0.0):
    """Return {name: array} of a case: distinct slots to go to, and to come from, which may be the same ones. A share `empty` of the pairs
    moves nothing; rows of the draft, or slots, that no row comes from hold `bad` where it is not 0."""
    rng = np.random.default_rng(seed)
    shape = {name: s.shape for name, s in structs(case).items()}
    slots, sources = (np.broadcast_to(np.arange(n), (case.B, case.K, n)) for n in (case.C, case.W or case.C))
    out = {name: rng.permuted(x, axis=-1)[..., : case.M] for name, x in (("from", sources), ("to", slots))}
    for name in out:
        out[name] = np.where(rng.random(shape[name]) < empty, -1, out[name])
    for name in [name for name in shape if name not in out]:
        out[name] = rng.standard_normal(shape[name], np.float32)
        if bad and (name.endswith("draft") or not case.W):
            used = (sources[..., None] == out["from"][:, :, None]).any(-1)
            out[name][~used] = bad
    return {name: jnp.asarray(out[name], s.dtype) for name, s in structs(case).items()}


def arguments(a):
    """Return (positional, keyword) arguments of the op from the arrays, or structs, of a case."""
    return tuple(a[name] for name in ("k", "v", "from", "to", "k_draft", "v_draft") if name in a), {}


def options(case):
    """Return the static keyword arguments of the op."""
    return case.options


def floor_bytes(case):
    """Return the bytes the op cannot do without: M rows of K and V read and written, and their slots."""
    return case.B * case.K * case.M * (4 * case.H * jnp.dtype(case.dtype).itemsize + 8)


def flops(case):
    """Return the floating-point operations: none."""
    return 0
