"""The XLA path on CPU reads K and V where they are: no copy of the cache's size in the compiled program."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
import tiny

from tokeff.kernels import cases, column_mass, decode_attention
from tokeff.kernels.cases import Case

pytestmark = pytest.mark.core

# Operations that hand a buffer on or write a few rows into it, rather than making another.
FREE = {"parameter", "bitcast", "tuple", "get-tuple-element", "while", "conditional", "scatter", "call", "iota"}
SHAPES = [pytest.param(T, C, id=f"T{T}-C{C}") for T, C in ((1, 2048), (8, 2048), (64, 1024))]


def cache_sized(compiled, case):
    """Return the instructions that produce an array as large as K, outside the branch that runs after a NaN."""
    elements, found = case.B * case.K * case.C * case.H, []
    for name, lines in reachable(compiled.as_text()).items():
        for line in lines:
            made = re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = \w+\[([\d,]+)\]\S* ([\w\-]+)\(", line)
            if (
                made
                and made[2] not in FREE
                and "calls=%wrapped_scatter" not in line
                and math.prod(map(int, made[1].split(","))) == elements
            ):
                found.append(f"{name}: {line.strip()[:160]}")
    return found


def reachable(text):
    """Return {computation: its lines} of those that run on a healthy cache: not the first branch of a conditional."""
    computations, entry, name = {}, None, None
    for line in text.splitlines():
        if opened := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = opened[2]
            computations[name], entry = [], name if opened[1] else entry
        elif name:
            computations[name].append(re.sub(r"branch_computations=\{%?[\w.\-]+, ", "branch_computations={", line))
    seen, todo = {}, [entry]
    while todo:
        if (name := todo.pop()) not in seen:
            seen[name] = computations[name]
            todo += [n for line in seen[name] for n in re.findall(r"%([\w.\-]+)", line) if n in computations]
    return seen


def test_the_counter_sees_a_copy():
    case = Case("copied", C=2048)
    a = cases.structs(case)
    select = jax.jit(lambda q, k: jnp.einsum("btkh,bkch->bkc", q[:, :, :3], jnp.where(k > 0, k, 0)))
    assert cache_sized(tiny.compiled(select.lower(a["q"], a["k"])), case)


@pytest.mark.parametrize(("T", "C"), SHAPES)
def test_decode_attention_copies_no_cache(T, C):
    case = Case("copies", T=T, C=C)
    a = cases.structs(case)
    f = jax.jit(lambda a: decode_attention(*(a[n] for n in ("q", "k", "v", "order", "lo", "hi")), **case.options))
    assert cache_sized(tiny.compiled(f.lower(a)), case) == []


@pytest.mark.parametrize(("T", "C"), SHAPES)
def test_column_mass_copies_no_cache(T, C):
    case = Case("copies", T=T, C=C)
    names = ("q", "k", "lse", "order", "lo", "hi", "weight")
    f = jax.jit(lambda a: column_mass(*(a[n] for n in names), **case.options))
    assert cache_sized(tiny.compiled(f.lower(cases.structs(case))), case) == []


def test_decode_loop_that_writes_and_reads_a_cache_copies_none():
    case = Case("copies", B=2, C=2048)

    def step(carry):
        i, q, k, v, order = carry
        at = jnp.arange(case.B)[:, None], jnp.arange(case.K), jnp.full((case.B, case.K), i)
        row = q.reshape(case.B, case.K, -1, case.H)[:, :, 0]
        k, v = (x.at[at].set(row, unique_indices=True) for x in (k, v))
        order = order.at[at].set(i, unique_indices=True)
        seen = jnp.zeros((case.B, 1), jnp.int32), jnp.full((case.B, 1), i)
        return i + 1, decode_attention(q, k, v, order, *seen, **case.options)[0], k, v, order

    def loop(q, k, v, order):
        return jax.lax.while_loop(lambda c: c[0] < 9, step, (0, q, k, v, order))

    a = cases.structs(case)
    lowered = jax.jit(loop, donate_argnums=(1, 2, 3)).lower(*(a[n] for n in ("q", "k", "v", "order")))
    assert cache_sized(tiny.compiled(lowered), case) == []
