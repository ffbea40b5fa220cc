"""The compiled decode loop writes rows into the cache where it lies: no copy of a cache-sized buffer in the body of the loop."""

import re

import jax
import jax.numpy as jnp
import pytest
import runs
import tiny
from runs import listed, part

from tokeff.decode.loop import begin, run
from tokeff.decode.methods import early_exit, token_recycling
from tokeff.decode.sample import GREEDY, row_keys
from tokeff.kv.cache import Room
from tokeff.kv.extend import extend, pack
from tokeff.kv.methods import hydragen

pytestmark = pytest.mark.core
# Handing a buffer on, writing rows into it in place.
FREE = {"parameter", "bitcast", "tuple", "get-tuple-element", "while", "conditional", "scatter", "call", "broadcast", "select"}
STRICT = {"Full", "H2O", "TidalDecode"}  # others turn or gather keys in every step, and say so


def instructions(text: str):
    """(computation, shape, operation, line) of every instruction of a compiled module."""
    computation = None
    for line in text.splitlines():
        if opened := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            computation = "entry" if opened[1] else opened[2]
        if made := re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = \w+\[([\d,]+)\]\S* ([\w\-]+)\(", line):
            yield computation, tuple(map(int, made[1].split(","))), made[2], line.strip()


def large(text: str, shapes: set[tuple[int, ...]]) -> list[tuple[str, str]]:
    """(operation, line) of what makes an array of a cache's dimensions, in any order of axes, outside the entry and outside the branch
    that only a NaN takes."""
    rescue = set(re.findall(r"branch_computations=\{%?([\w.\-]+), ", text))  # the first branch is the condition being false
    return [
        (operation, line)
        for computation, shape, operation, line in instructions(text)
        if computation != "entry" and computation not in rescue and tuple(sorted(shape)) in shapes and operation not in FREE
    ]


def compiled(policy, drafter=tiny.PLAIN):
    """(HLO text of the decode loop of this policy, sorted dimensions of its stores of keys and values)."""
    s = tiny.start(runs.prompt(), policy, drafter)
    program = run.lower(tiny.params(), tiny.CFG, s, jnp.int32(5), policy=policy.onward(), drafter=drafter, how=GREEDY, eos=())
    rows = [x.shape for x in jax.tree.leaves(s.layers) if x.ndim == 4 and x.shape[-1] == tiny.CFG.H and x.shape[2] >= 16]
    stores = rows + [x.shape for x in jax.tree.leaves(s.layers) if x.ndim == 5 and x.dtype == jnp.uint8]  # pages of codes
    stores += [x.shape for path, x in jax.tree_util.tree_leaves_with_path(s.layers) if path[-1].name == "low_BCY"]  # one row for all heads
    assert stores
    return tiny.compiled(program).as_text(), {tuple(sorted(shape)) for shape in stores}


@pytest.mark.parametrize("name", tiny.sampled(runs.ways_of_going_on(), runs.attending()))
def test_decode_loop_copies_no_cache(name):
    """One token at a time, eviction, ragged batch, inside the loop."""
    text, shapes = compiled(part(name)["kv"])
    found = large(text, shapes)
    assert not [line for operation, line in found if operation.startswith("copy")]
    if name in STRICT:
        others = [line for operation, line in found if not (operation == "fusion" and "scatter" in line)]
        assert not others, others


@pytest.mark.parametrize("name", listed("kv", where=lambda m: m.name in ("Full", "H2O")))
@pytest.mark.parametrize("drafter", [token_recycling(tiny.TREE), early_exit(2, 4)], ids=["text", "layers"])
def test_draft_loop_copies_no_cache(name, drafter):
    """Drafts from the text, and drafts of layers that run row by row in a loop of their own."""
    text, shapes = compiled(part(name, "fast")["kv"], drafter)
    assert not [line for operation, line in large(text, shapes) if operation.startswith("copy")]


@pytest.mark.parametrize("drafter", [tiny.PLAIN, token_recycling(tiny.TREE)], ids=["plain", "drafts"])
def test_forked_loop_copies_no_prefix(drafter):
    """Three sequences on one prompt, with a second level of their own: neither level nor own rows are copied, or made anew in any form."""
    policy, room = hydragen(), Room(24, drafter.nodes if drafter.nodes > 1 else 0)
    layers = pack(policy, tiny.read(policy, [tiny.prompts()[0]]).layers, room, tiny.CFG)
    given, length = tiny.padded([[5] * 18] * 2)
    for times in (2, 3):
        layers = policy.fork(layers, times, room)
        if times == 2:
            _, layers = extend(tiny.params(), tiny.CFG, layers, given, jnp.full(2, 64), length, policy)
    tokens, length = jnp.zeros((6, 82 + 24), jnp.int32), jnp.full(6, 82)
    logits, limit, nobody = jnp.zeros((6, tiny.CFG.V)), jnp.full(6, 24), jnp.zeros(6, jnp.int32)
    s = begin(layers, tokens, length, nobody, logits, drafter, row_keys(0, jnp.arange(6)), limit, GREEDY, ())
    program = run.lower(tiny.params(), tiny.CFG, s, jnp.int32(5), policy=policy, drafter=drafter, how=GREEDY, eos=())
    levels = {x.shape for x in jax.tree.leaves([layer.levels for layer in layers]) if x.ndim == 4}
    assert sorted(levels) == [(1, 2, 64, 8), (2, 2, 24, 8)]
    found = large(tiny.compiled(program).as_text(), {tuple(sorted(shape)) for shape in levels | {layers[0].own.k_BKCH.shape}})
    assert not [line for operation, line in found if not (operation == "fusion" and "scatter" in line)]


@pytest.mark.xdist_group("Full")
def test_the_check_sees_a_copy():
    """Negative control: a buffer written after it was read in the same step is copied, and found."""

    def body(i, x):
        before = x * 2.0
        x = x.at[:, :, i].set(1.0)
        return x.at[:, :, i + 1].set(before[:, :, i] + jnp.flip(before, 2)[:, :, i])

    cache = jnp.zeros((2, 2, 84, 8))
    program = jax.jit(lambda x: jax.lax.fori_loop(0, 9, body, x)).lower(cache)
    assert large(tiny.compiled(program).as_text(), {tuple(sorted(cache.shape))})
