"""What a named case is: the shapes of one call, and arrays of these shapes. Each op lists its own in <op>/cases.py."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Case:
    """Shapes of one call (letters as everywhere). M pages of page_size slots are selected; M = 0 reads every slot."""

    name: str
    B: int = 1
    T: int = 1
    N: int = 9
    K: int = 3
    C: int = 2048
    H: int = 64
    M: int = 0
    page_size: int = 1
    softcap: float = 0.0
    dtype: str = "float32"

    @property
    def slots_read(self):
        """Slots of one kv head that the call must read."""
        return min(self.C, self.M * self.page_size) if self.M else self.C

    @property
    def options(self):
        """Keyword arguments of both ops."""
        return {"scale": self.H**-0.5, "softcap": self.softcap}


def structs(case):
    """Return {name: jax.ShapeDtypeStruct} of the arrays of a case; 'page' only if it selects pages."""
    B, T, N, K, C, H = case.B, case.T, case.N, case.K, case.C, case.H
    floats = {"q": (B, T, N, H), "k": (B, K, C, H), "v": (B, K, C, H)}
    ints = {"order": (B, K, C), "lo": (B, T), "hi": (B, T)} | ({"page": (B, K, case.M)} if case.M else {})
    rows = {"lse": (B, T, N), "weight": (B, T)}
    groups = ((case.dtype, floats), ("int32", ints), ("float32", rows))
    return {name: jax.ShapeDtypeStruct(s, dtype) for dtype, group in groups for name, s in group.items()}


def arrays(case, seed=0, empty=0.0, bad=0.0):
    """Return {name: array} for a case: a cache of C shuffled orders and the T queries that follow them.

    A share `empty` of the slots is empty and holds the value `bad` (NaN to prove that nobody looks).
    """
    rng = np.random.default_rng(seed)
    shape = {name: s.shape for name, s in structs(case).items()}
    order = rng.permuted(np.broadcast_to(np.arange(case.C), shape["order"]), axis=-1)
    order = np.where(rng.random(order.shape) < empty, -1, order)
    out = {name: rng.standard_normal(shape[name], np.float32) for name in ("q", "k", "v")}
    for name in ("k", "v"):
        out[name][order < 0] = bad
    out |= {"order": order, "lo": np.zeros(shape["lo"]), "lse": np.zeros(shape["lse"]), "weight": np.ones(shape["lo"])}
    out["hi"] = np.broadcast_to(case.C - case.T + np.arange(case.T), shape["hi"])
    if case.M:
        pages = np.arange(-(-case.C // case.page_size))
        out["page"] = rng.permuted(np.broadcast_to(pages, (case.B, case.K, len(pages))), axis=-1)[..., : case.M]
    return {name: jnp.asarray(out[name], s.dtype) for name, s in structs(case).items()}
