"""Real shapes of shared_prefix: 16 and 64 sequences that share 2k to 16k rows."""

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp

from tokeff.kernels import cases


@dataclass(frozen=True)
class Case(cases.Case):
    """B sequences in J groups, each of which shares C rows."""

    J: int = 1


CPU = (
    Case("smol_2k_by16", B=16, C=2048),
    Case("smol_8k_by16", B=16, C=8192),
)
ACCELERATOR = (
    Case("8b_16k_by64", B=64, N=32, K=8, C=16384, H=128, dtype="bfloat16"),
    Case("8b_2k_4x16", B=64, J=4, N=32, K=8, C=2048, H=128, dtype="bfloat16"),
    Case("smol_odd_by33", B=33, C=2001),
)
CASES = CPU + ACCELERATOR


def structs(case):
    """Return {name: jax.ShapeDtypeStruct} of the arrays of a case."""
    asked, stored = (cases.structs(dataclasses.replace(case, B=n)) for n in (case.B, case.J))
    return {name: (asked if name in ("q", "lo", "hi") else stored)[name] for name in ("q", "k", "v", "order", "lo", "hi")}


def arrays(case, seed=0, empty=0.0, bad=0.0):
    """Return {name: array} of a case, as `tokeff.kernels.cases.arrays` makes them."""
    asked, stored = (cases.arrays(dataclasses.replace(case, B=n), seed, empty, bad) for n in (case.B, case.J))
    return {name: (asked if name in ("q", "lo", "hi") else stored)[name] for name in structs(case)}


def copied(a):
    """Return the arrays of a case with a copy of its group's rows for each sequence."""
    times = a["q"].shape[0] // a["k"].shape[0]
    return a | {name: jnp.repeat(a[name], times, axis=0) for name in ("k", "v", "order")}


def arguments(a):
    """Return (positional, keyword) arguments of the op from the arrays, or structs, of a case."""
    return tuple(a[name] for name in ("q", "k", "v", "order", "lo", "hi")), {}


def options(case):
    """Return the static keyword arguments of the op. Slots of a store are finite, as the library promises."""
    return case.options | {"finite": True}


def floor_bytes(case):
    """Return the bytes the op cannot do without: K, V and order of every group once, queries and outputs."""
    itemsize = jnp.dtype(case.dtype).itemsize
    return case.J * case.K * case.C * (2 * case.H * itemsize + 4) + case.B * case.T * case.N * (2 * case.H * itemsize + 4)


def flops(case):
    """Return the floating-point operations of the two products."""
    return 4 * case.B * case.T * case.N * case.C * case.H
