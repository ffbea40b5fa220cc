"""Real shapes of k_centre: DivPrune's 64 of 576 patches of a picture, and 256 of 1024."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Case:
    """M of P rows in each of B sequences; the distances are those of random points in `width` dimensions."""

    name: str
    B: int = 1
    P: int = 576
    M: int = 64
    width: int = 16
    dtype: str = "float32"

    @property
    def options(self):
        """Keyword arguments of the op."""
        return {"most": self.M}


CPU = (Case("llava_576"), Case("tower_1024", P=1024, M=256))
ACCELERATOR = (Case("llava_576_by8", B=8), Case("tower_1024_by2", B=2, P=1024, M=256), Case("odd_729", P=729, M=100))
CASES = CPU + ACCELERATOR
CHAINED = "distance"  # what a call hands on to the next when a benchmark runs them in a row


def structs(case):
    """Return {name: jax.ShapeDtypeStruct} of the arrays of a case."""
    return {"distance": jax.ShapeDtypeStruct((case.B, case.P, case.P), "float32")}


def arrays(case, seed=0, empty=0.0, bad=0.0):
    """Return {name: array} of a case. A share `empty` of the rows, and what is measured to them, is `bad`."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((case.B, case.P, case.width), np.float32)
    distance = np.linalg.norm(x[:, :, None] - x[:, None], axis=-1)
    gone = rng.random((case.B, case.P)) < empty
    return {"distance": jnp.asarray(np.where(gone[:, :, None] | gone[:, None], bad, distance), jnp.float32)}


def arguments(a):
    """Return (positional, keyword) arguments of the op from the arrays, or structs, of a case."""
    return (a["distance"],), {}


def options(case):
    """Return the static keyword arguments of the op."""
    return case.options


def floor_bytes(case):
    """Return the bytes the op cannot do without: all distances once."""
    return 4 * case.B * case.P**2


def flops(case):
    """Return the operations: for the first choice a minimum over all distances, then a minimum and a maximum over the rows."""
    return case.B * case.P * (case.P + 2 * case.M)
