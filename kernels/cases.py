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
    W: int = 0  # rows of a draft that the T queries see beside the cache
    blocks: int = 0  # that each block of page_size queries reads
    rows: int = 0  # single ones that all queries of a head read as well
    window: int = 0  # of the queries; 0 for none
    sinks: int = 0  # first rows that stay visible beside a window
    ascending: bool = False  # slots lie in the order of the text, as a prompt's do; shuffled otherwise
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
    floats |= {"k_draft": (B, K, case.W, H), "v_draft": (B, K, case.W, H)} if case.W else {}
    ints |= {"block": (B, K, -(-T // case.page_size), case.blocks)} if case.blocks else {}
    ints |= {"row": (B, K, case.rows)} if case.rows else {}
    bools = {"among": (B, T, case.W)} if case.W else {}
    groups = ((case.dtype, floats), ("int32", ints), ("float32", rows), ("bool", bools))
    return {name: jax.ShapeDtypeStruct(s, dtype) for dtype, group in groups for name, s in group.items()}


def arrays(case, seed=0, empty=0.0, bad=0.0):
    """Return {name: array} for a case: a cache of C shuffled orders and the T queries that follow them.

    A share `empty` of the slots is empty and holds the value `bad` (NaN to prove that nobody looks).
    """
    rng = np.random.default_rng(seed)
    shape = {name: s.shape for name, s in structs(case).items()}
    order = np.broadcast_to(np.arange(case.C), shape["order"])
    order = order if case.ascending else rng.permuted(order, axis=-1)
    order = np.where(rng.random(order.shape) < empty, -1, order)
    out = {name: rng.standard_normal(shape[name], np.float32) for name in ("q", "k", "v", "k_draft", "v_draft") if name in shape}
    for name in ("k", "v"):
        out[name][order < 0] = bad
    out |= {"order": order, "lo": np.zeros(shape["lo"]), "lse": np.zeros(shape["lse"]), "weight": np.ones(shape["lo"])}
    out["hi"] = np.broadcast_to(case.C - case.T + np.arange(case.T), shape["hi"])
    if case.window:
        out["lo"] = np.maximum(out["hi"] - case.window + 1, 0)
    if case.W:
        out["among"] = _ancestors(shape["among"], rng)
    if case.blocks:
        out["block"] = _chosen(shape["block"], (case.C - case.T) // case.page_size, rng)
    if case.rows:
        out["row"] = rng.permuted(np.broadcast_to(np.arange(case.C), (*shape["order"],)), axis=-1)[..., : case.rows]
    if case.M:
        pages = np.arange(-(-case.C // case.page_size))
        out["page"] = rng.permuted(np.broadcast_to(pages, (case.B, case.K, len(pages))), axis=-1)[..., : case.M]
    return {name: jnp.asarray(out[name], s.dtype) for name, s in structs(case).items()}


def _ancestors(shape, rng):
    """Return the mask of a random tree of W rows, for its last T: a row sees its ancestors and itself."""
    B, T, W = shape
    mask = np.zeros((B, W, W), bool)
    for b, w in np.ndindex(B, W):
        mask[b, w] = mask[b, rng.integers(w)] if w else False
        mask[b, w, w] = True
    return mask[:, W - T :]


def _chosen(shape, before, rng):
    """Return for each block of queries its own block and random earlier ones, ascending, then -1. before: blocks ahead of the first."""
    block = np.full(shape, -1)
    for *at, q in np.ndindex(shape[:3]):
        picked = np.append(rng.permutation(before + q)[: shape[3] - 1], before + q)
        block[*at, q, : len(picked)] = np.sort(picked)
    return block
