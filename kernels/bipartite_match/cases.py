"""Real shapes of bipartite_match: 1500 frames of Whisper, 576 patches of a tower, 4096 rows."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Case:
    """S rows of H numbers in each of B sequences."""

    name: str
    B: int = 1
    S: int = 1500
    H: int = 64
    protected: int = 0
    dtype: str = "float32"

    @property
    def options(self):
        """Keyword arguments of the op."""
        return {"protected": self.protected}


CPU = (Case("whisper_1500"), Case("tower_577", B=4, S=577, protected=1))
ACCELERATOR = (
    Case("whisper_1500_by8", B=8, dtype="bfloat16"),
    Case("rows_4096", S=4096, H=128),
    Case("tower_577_by8", B=8, S=577, H=80, protected=1),
)
CASES = CPU + ACCELERATOR
CHAINED = "metric"  # what a call hands on to the next when a benchmark runs them in a row


def structs(case):
    """Return {name: jax.ShapeDtypeStruct} of the arrays of a case."""
    return {"metric": jax.ShapeDtypeStruct((case.B, case.S, case.H), case.dtype)}


def arrays(case, seed=0, empty=0.0, bad=0.0):
    """Return {name: array} of a case. A share `empty` of the rows is `bad`."""
    rng = np.random.default_rng(seed)
    metric = rng.standard_normal((case.B, case.S, case.H), np.float32)
    metric[rng.random(metric.shape[:2]) < empty] = bad
    return {"metric": jnp.asarray(metric, case.dtype)}


def arguments(a):
    """Return (positional, keyword) arguments of the op from the arrays, or structs, of a case."""
    return (a["metric"],), {}


def options(case):
    """Return the static keyword arguments of the op."""
    return case.options


def floor_bytes(case):
    """Return the bytes the op cannot do without: the metric read, and a cosine and a place for each even row."""
    return case.B * case.S * (case.H * jnp.dtype(case.dtype).itemsize + 4)


def flops(case):
    """Return the floating-point operations of the product."""
    return case.B * case.S**2 * case.H // 2
