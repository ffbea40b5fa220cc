"""When drafting pays: the cost model, and T(n)/T(1) of named machines by arithmetic.

A pass over n rows of each sequence takes T(n). Plain decoding commits one token in T(1), a drafter MAT tokens in T(n) + draft. So

    speed-up = MAT / (T(n)/T(1) + draft/T(1)),    and drafting pays where T(n)/T(1) < MAT - draft/T(1).

The right-hand side is the row's break-even. T(n) of a machine is taken as its roofline (Williams et al. 2009): weights and cache once over
the bandwidth, or all multiplications and additions over the peak, whichever takes longer. That is arithmetic, not a measurement: no launch
costs, no caches, peak rates.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax

from tokeff.models.load import Model


@dataclass(frozen=True)
class Machine:
    """bytes_per_s: read bandwidth. flops_per_s: peak of dense matrix products. number: bytes of a weight, and of a cached number, there."""

    name: str
    bytes_per_s: float
    flops_per_s: float
    number: int
    source: str


H200 = Machine("H200", 4.8e12, 989e12, 2, "NVIDIA H200 SXM data sheet: 4.8 TB/s; bfloat16 1,979 TFLOPS with sparsity, half of it without")
V5E = Machine("TPU v5e", 819e9, 197e12, 2, "Google Cloud TPU v5e, key chip specifications: 819 GB/s, 197 TFLOPS in bfloat16")
MACHINES = (V5E, H200)  # of a CPU it would be wrong: products of few rows run at a fraction of its peak (`tokeff bench verify-cost`)


@dataclass(frozen=True)
class Work:
    """What a pass does. weights: numbers that it multiplies with. cached: numbers that a token leaves in the caches of all layers.
    scores: operations of one row on one cached row, in all layers."""

    weights: int
    cached: int
    scores: int

    @staticmethod
    def of(m: Model) -> Work:
        """Of a dense decoder; what stands beside its weights is not of a pass, nor is an embedding that is only looked up."""
        cfg, params = m.cfg, m.params.replace(side=None)
        looked_up = 0 if params.head_VD is None else params.embed_VD.size
        weights = sum(x.size for x in jax.tree.leaves(params)) - looked_up
        return Work(int(weights), 2 * cfg.L * cfg.K * cfg.H, 4 * cfg.L * cfg.N * cfg.H)


def seconds(machine: Machine, work: Work, rows: int, batch: int = 1, context: int = 128) -> float:
    """T(rows): of a pass over so many rows of each of `batch` sequences that have `context` cached rows each."""
    read = (work.weights + batch * context * work.cached) * machine.number
    operations = batch * rows * (2 * work.weights + context * work.scores)
    return max(read / machine.bytes_per_s, operations / machine.flops_per_s)


def ratio(machine: Machine, work: Work, rows: int, batch: int = 1, context: int = 128) -> float:
    """T(rows) / T(1)."""
    return seconds(machine, work, rows, batch, context) / seconds(machine, work, 1, batch, context)


def expected(mat: float, tn: float, draft: float = 0.0) -> float:
    """Speed-up over plain decoding. tn: T(n)/T(1), draft: draft/T(1)."""
    return mat / (tn + draft)


def break_even(mat: float, draft: float = 0.0) -> float:
    """The T(n)/T(1) at which a drafter is as fast as plain decoding."""
    return mat - draft
