"""The compiled decode loop writes rows into the cache where it lies: no copy of a cache-sized buffer in the body of the loop."""

import hlo
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
STRICT = {"Full", "H2O", "TidalDecode"}  # others turn or gather keys in every step, and say so


def compiled(policy, drafter=tiny.PLAIN):
    """(HLO text of the decode loop of this policy, sizes of its stores of keys and values)."""
    s = tiny.start(runs.prompt(), policy, drafter)
    program = run.lower(tiny.params(), tiny.CFG, s, jnp.int32(5), policy=policy.onward(), drafter=drafter, how=GREEDY, eos=())
    leaves = [(path[-1].name, x) for path, x in jax.tree_util.tree_leaves_with_path(s.layers)]
    stores = [x for _, x in leaves if x.ndim == 4 and x.shape[-1] == tiny.CFG.H and x.shape[2] >= 16]
    stores += [x for _, x in leaves if x.ndim == 5 and x.dtype == jnp.uint8]  # pages of codes
    stores += [x for name, x in leaves if name == "low_BCY"]  # one row for all heads
    assert stores
    return tiny.compiled(program).as_text(), set(map(hlo.size, stores))


@pytest.mark.parametrize("name", tiny.sampled(runs.ways_of_going_on(), runs.attending()))
def test_decode_loop_copies_no_cache(name):
    """One token at a time, eviction, ragged batch, inside the loop."""
    text, sizes = compiled(part(name)["kv"])
    assert not hlo.moved(text, sizes)
    if name in STRICT:
        assert not hlo.made(text, sizes)


@pytest.mark.parametrize("name", listed("kv", where=lambda m: m.name in ("Full", "H2O")))
@pytest.mark.parametrize("drafter", [token_recycling(tiny.TREE), early_exit(2, 4)], ids=["text", "layers"])
def test_draft_loop_copies_no_cache(name, drafter):
    """Drafts from the text, and drafts of layers that run row by row in a loop of their own. At half the rows a store of H2O would have as
    many numbers as the queries of accepted and new rows."""
    settings = tiny.fast(runs.method(name)) | ({"budget": 0.6} if name == "H2O" else {})
    text, sizes = compiled(runs.method(name).make(**settings), drafter)
    assert not hlo.moved(text, sizes)


@pytest.mark.parametrize("drafter", [tiny.PLAIN, token_recycling(tiny.TREE)], ids=["plain", "drafts"])
def test_forked_loop_copies_no_prefix(drafter):
    """Three sequences on one prompt, with a second level of their own: neither level nor own rows are copied, or made anew in any form."""
    policy, room = hydragen(), Room(32, drafter.nodes if drafter.nodes > 1 else 0)
    layers = pack(policy, tiny.read(policy, [tiny.prompts()[0]]).layers, room, tiny.CFG)
    given, length = tiny.padded([[5] * 26] * 2)
    for times in (2, 3):
        layers = policy.fork(layers, times, room)
        if times == 2:
            _, layers = extend(tiny.params(), tiny.CFG, layers, given, jnp.full(2, 64), length, policy)
    tokens, length = jnp.zeros((6, 90 + 24), jnp.int32), jnp.full(6, 90)
    logits, limit, nobody = jnp.zeros((6, tiny.CFG.V)), jnp.full(6, 24), jnp.zeros(6, jnp.int32)
    s = begin(layers, tokens, length, nobody, logits, drafter, row_keys(0, jnp.arange(6)), limit, GREEDY, ())
    program = run.lower(tiny.params(), tiny.CFG, s, jnp.int32(5), policy=policy, drafter=drafter, how=GREEDY, eos=())
    levels = [x for x in jax.tree.leaves([layer.levels for layer in layers]) if x.ndim == 4]
    assert sorted({x.shape for x in levels}) == [(1, 2, 64, 8), (2, 2, 32, 8)]
    text, sizes = tiny.compiled(program).as_text(), set(map(hlo.size, [*levels, layers[0].own.k_BKCH]))
    assert not hlo.moved(text, sizes) and not hlo.made(text, sizes)


CACHE = jax.ShapeDtypeStruct((2, 2, 84, 8), "float32")


def after_a_read(i, x):
    """A buffer written after it was read in the same step."""
    before = x * 2.0
    x = x.at[:, :, i].set(1.0)
    return x.at[:, :, i + 1].set(before[:, :, i] + jnp.flip(before, 2)[:, :, i])


def turned(i, x):
    """One whose axes change places."""
    return x.swapaxes(2, 3).reshape(x.shape).at[:, :, i].set(1.0)


def folded(i, x):
    """One whose heads and sequences become one axis, and rows stand first."""
    return x.reshape(4, 84, 8).swapaxes(0, 1).reshape(x.shape).at[:, :, i].add(1.0)


def in_place(i, x):
    return x.at[:, :, i].set(x[:, :, i - 1].sum())


@pytest.mark.xdist_group("Full")
@pytest.mark.parametrize(("body", "copied"), [(after_a_read, " copy("), (turned, " fusion("), (folded, " fusion("), (in_place, None)])
def test_the_check_sees_copies(body, copied):
    """By themselves and at the end of a fusion; and nothing where there is none."""
    program = jax.jit(lambda x: jax.lax.fori_loop(0, 9, body, x), donate_argnums=0).lower(CACHE)
    found = hlo.moved(tiny.compiled(program).as_text(), {hlo.size(CACHE)})
    assert any(copied in line for line in found) if copied else not found
