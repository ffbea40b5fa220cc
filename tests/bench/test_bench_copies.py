"""The compiled decode step of a model of SmolLM2's shape (2 layers, 2048 rows) moves no array of cache or weight size."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
import tiny

from tokeff.bench.decode import policies
from tokeff.decode.draft import Plain
from tokeff.decode.loop import run
from tokeff.decode.methods import prompt_lookup
from tokeff.generation import Setup, decoding
from tokeff.kv.policy import Prefilled
from tokeff.models.config import Config, Precision
from tokeff.models.layout import abstract

pytestmark = pytest.mark.core
CFG = Config("smol", V=49152, D=576, F=1536, L=2, N=9, K=3, H=64, max_len=8192)
ROWS, NEW = 2048, 32
# What makes no array of its own, or writes a few rows into one that is there.
FREE = {"parameter", "bitcast", "tuple", "get-tuple-element", "while", "conditional", "scatter", "call", "constant"}
MADE = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = f32\[([\d,]+)\]\S* ([\w\-]+)\(")


def compiled(policy, drafter):
    """The optimised program of the decode loop, compiled from shapes alone."""
    setup = Setup(policy, None, drafter)

    def struct(*shape, dtype="float32"):
        return jax.ShapeDtypeStruct(shape, dtype)

    rows, count = struct(1, CFG.K, ROWS, CFG.H), struct(1, dtype="int32")
    evidence = {ask: struct(1, CFG.K, ROWS) for ask in policy.needs()}
    layers = (Prefilled(rows, rows, struct(1, 1, ROWS, dtype="int32"), count, struct(dtype="int32"), evidence),) * CFG.L

    def begin(layers, tokens, length, logits):
        packed = policy.pack(layers, setup.room(NEW), CFG)
        return decoding(packed, tokens, length, length, logits, setup, NEW, 0, ())

    s = jax.eval_shape(begin, layers, struct(1, ROWS, dtype="int32"), count, struct(1, CFG.V))
    args = dict(policy=policy, drafter=drafter, how=setup.sampling, eos=())
    program = run.lower(abstract(CFG, Precision()), CFG, s, jnp.int32(NEW), **args)
    return tiny.compiled(program), {x.size for layer in s.layers for x in (layer.k_BKCH, layer.v_BKCH)}


def computations(text):
    """{computation: its lines} and the name of the loop's body; a branch that runs only after a NaN is cut off."""
    found, name = {}, None
    for line in text.splitlines():
        if opened := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = opened[1]
            found[name] = []
        elif name:
            # The first branch of attention's conditional cleans V; it returns one tuple of the output alone.
            found[name].append(re.sub(r"branch_computations=\{%?[\w.\-]+, ", "branch_computations={", line))
    return found


def body_lines(text):
    """Every line that a turn of the outermost loop may run, of fused computations only what they return."""
    found = computations(text)
    whiles = [line for lines in found.values() for line in lines if " while(" in line]
    todo, seen = [re.search(r"body=%?([\w.\-]+)", max(whiles, key=len))[1]], {}
    while todo:
        if (name := todo.pop()) not in seen:
            seen[name] = found[name]
            called = [n for line in found[name] if " fusion(" not in line for n in re.findall(r"%([\w.\-]+)", line)]
            todo += [n for n in called if n in found]
    return [(name, line) for name, lines in seen.items() for line in lines], found


def made(text, sizes):
    """Instructions of the loop's body that make an array of one of these sizes. A fusion that ends in a scatter writes in place."""
    lines, found = body_lines(text)
    out = []
    for name, line in lines:
        hit = MADE.match(line)
        if not hit or hit[2] in FREE or math.prod(map(int, hit[1].split(","))) not in sizes:
            continue
        calls = re.search(r"calls=%?([\w.\-]+)", line)
        if calls and any("ROOT" in inner and re.search(r" (scatter|dynamic-update-slice)\(", inner) for inner in found[calls[1]]):
            continue
        out.append(f"{name}: {line.strip()[:200]}")
    return out


@pytest.mark.parametrize("method", ["Full", "SnapKV", "H2O", "Recent"])
@pytest.mark.parametrize("drafter", [Plain(), prompt_lookup(7)], ids=["plain", "lookup"])
def test_no_copies_of_cache_or_weights(method, drafter):
    (policy,) = policies([method], 0.1).values()
    if drafter.nodes > 1 and policy.drafts(drafter.depth):
        pytest.skip("evicts every row: no drafts")
    program, cache = compiled(policy, drafter)
    weights = {math.prod(x.shape) for x in jax.tree.leaves(abstract(CFG, Precision())) if len(x.shape) > 1}
    assert made(program.as_text(), cache | weights) == []


def test_a_copy_would_be_seen():
    """The reader of programs finds a transposed cache and a transposed weight."""
    cache, weight = (jax.ShapeDtypeStruct(s, "float32") for s in ((1, 3, 2112, 64), (CFG.V, 576)))

    def loop(cache, weight):
        def body(carry):
            i, cache, x = carry
            cache = jnp.where(i % 2 == 0, cache.swapaxes(2, 3).reshape(cache.shape), cache)
            return i + 1, cache, x + jnp.cumsum(weight, axis=0)[i]

        return jax.lax.while_loop(lambda c: c[0] < 9, body, (0, cache, jnp.zeros(576)))

    text = tiny.compiled(jax.jit(loop, donate_argnums=0).lower(cache, weight)).as_text()
    assert len(made(text, {3 * 2112 * 64})) >= 1
