"""Shared prefixes: the attention is that over a copy of the rows for every sequence, the bytes are those of one, and forks make trees."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from oracles import sharing

import tokeff
from tokeff import sharding
from tokeff.collectives import collectives
from tokeff.context import Compressed
from tokeff.decode.loop import run
from tokeff.decode.methods import token_recycling
from tokeff.decode.sample import GREEDY
from tokeff.errors import UserError
from tokeff.generation import Setup, ask, new_tokens, read, start
from tokeff.kv import methods as kv
from tokeff.kv.cache import Room, Rows
from tokeff.kv.extend import extend, pack
from tokeff.kv.policy import tree_bytes
from tokeff.kv.shared import Forked, Level, SharedPrefix, branch, read_level
from tokeff.models.config import Precision, Rope
from tokeff.models.flow import EMPTY, Flow, Here
from tokeff.models.load import Model, fingerprint

pytestmark = [pytest.mark.core, pytest.mark.xdist_group("shared")]
QUESTIONS = ([5, 9, 2, 33, 7], [8, 1], [40, 41, 42])
WINDOWED = dataclasses.replace(tiny.CFG, name="windowed", windows=(16, None, 16), local_rope=Rope(100.0))
ROOM = 24


def model(cfg=tiny.CFG) -> Model:
    return Model(cfg, tiny.params(cfg), None, Precision(), "tiny")


def context(policy, m: Model, decode=tiny.PLAIN, rows=None) -> Compressed:
    """What `tokeff.compress` makes of the second tiny prompt, which the bucket pads, from ids instead of text."""
    setup, ids = Setup(policy, decode=decode), rows or [list(tiny.prompts()[1])]
    prompt = read(m, ids, setup)
    layers = pack(policy, prompt.layers, setup.room(ROOM), m.cfg)
    return Compressed(setup, layers, tuple(ids[0]), len(ids[0]), prompt.logits_BV, ROOM, (), fingerprint(m))


def answers(policy, m: Model, questions=QUESTIONS, **options) -> list[list[int]]:
    return new_tokens(ask(m, context(policy, m, **options), list(questions), GREEDY, 0, 12, ()))


# -- the attention itself


def random_layer(rng, J: int, C: int, first: int, fill: int, K: int = 2, H: int = 8) -> Level:
    k, v = (rng.normal(size=(J, K, C, H)).astype(np.float32) for _ in range(2))
    order = np.where(np.arange(C) < fill, first + np.arange(C), EMPTY)
    return Level(jnp.asarray(k), jnp.asarray(v), jnp.asarray(np.broadcast_to(order, (J, K, C)), jnp.int32))


@pytest.mark.parametrize("window", [None, 9])
def test_two_levels_equal_the_oracle(window):
    """B = 4 sequences in 2 groups below 1 root, own rows of unequal number, one padded query."""
    cfg = dataclasses.replace(tiny.CFG, windows=(window,) * tiny.CFG.L)
    rng, B, T, here = np.random.default_rng(3), 4, 2, Here(0, cfg)
    N, K, H, G = cfg.N, cfg.K, cfg.H, cfg.N // cfg.K
    levels = (random_layer(rng, 1, 8, 0, 7), random_layer(rng, 2, 8, 7, 5))
    zero = jnp.zeros((B, K, 8, H))
    layer = Forked(levels, Rows(zero, zero, jnp.full((B, K, 8), EMPTY, jnp.int32), jnp.zeros(B, jnp.int32)))
    order = np.array([[12, 13], [12, EMPTY], [12, 13], [12, 13]], np.int32)
    flow = Flow(jnp.zeros((B, T, 1)), jnp.asarray(order), jnp.zeros((B, T), jnp.int32), jnp.asarray(order))  # angle 0: nothing is turned
    q, k, v = (rng.normal(size=(B, T, heads, H)).astype(np.float32) for heads in (N, K, K))
    out, after, _ = SharedPrefix().attend(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), flow, flow, layer, None, None, here)
    assert after.own.live_B.tolist() == [2, 1, 2, 2]
    for b, t in itertools.product(range(B), range(T)):
        if order[b, t] == EMPTY:
            continue
        rows = [(o, np.asarray(level.k_JKCH)[j, :, c], np.asarray(level.v_JKCH)[j, :, c])
                for level, j in zip(levels, (0, b // 2), strict=True)
                for c, o in enumerate(np.asarray(level.order_JKC)[j, 0]) if o != EMPTY]  # fmt: skip
        rows += [(order[b, s], k[b, s], v[b, s]) for s in range(T) if order[b, s] != EMPTY]
        lo = 0 if window is None else max(order[b, t] - window + 1, 0)
        wanted = sharing.attend(q[b, t], rows, G, cfg.scale, lo, order[b, t])
        np.testing.assert_allclose(out[b, t], wanted, atol=2e-6)


# -- the whole model


@pytest.mark.parametrize("cfg", tiny.sampled([tiny.CFG, WINDOWED], (tiny.CFG,)), ids=lambda cfg: cfg.name)
@pytest.mark.parametrize("rule", [kv.full(), kv.snapkv(0.5, 6)], ids=["Full", "SnapKV"])
def test_forked_questions_equal_copied_ones(rule, cfg):
    """Unequal questions on one context: the text of the rule under copies of its cache, whatever it kept."""
    m = model(cfg)
    assert answers(SharedPrefix(rule), m) == answers(rule, m)


@pytest.mark.parametrize("rule", [kv.full(), kv.snapkv(0.5, 6)], ids=["Full", "SnapKV"])
def test_drafts_on_a_fork(rule):
    m, drafter = model(), token_recycling(tiny.TREE)
    assert answers(SharedPrefix(rule), m, decode=drafter) == answers(rule, m)


def test_logits_of_a_fork():
    """Teacher-forced rows behind a context of 1, shared and copied: 1e-4."""
    cfg, found = tiny.CFG, []
    prompt = tiny.read(tiny.FULL, [tiny.prompts()[1]])
    given, length = tiny.padded(QUESTIONS, 5)
    for policy in (kv.full(), kv.hydragen()):
        layers = policy.fork(pack(policy, prompt.layers, Room(8), cfg), 3, Room(8))
        logits, layers = extend(tiny.params(), cfg, layers, given, jnp.full(3, 51), length, policy)
        found.append((np.asarray(logits), [tiny.kept(policy, layer) for layer in layers]))
    assert found[0][1] == found[1][1]
    for b, row in enumerate(QUESTIONS):
        np.testing.assert_allclose(found[1][0][b, : len(row)], found[0][0][b, : len(row)], atol=1e-4)


def tree_of_two_levels(policy, cfg=tiny.CFG):
    """Two prompts, two topics each, three endings each: the logits of the endings and the layers."""
    layers = pack(policy, tiny.read(policy, cfg=cfg).layers, Room(16), cfg)
    start_B, rng = jnp.asarray(tiny.LENGTHS, jnp.int32), np.random.default_rng(5)
    for times, n in ((2, 4), (3, 2)):
        layers, start_B = policy.fork(layers, times, Room(16)), jnp.repeat(start_B, times)
        B = len(start_B)
        tokens, length = rng.integers(0, cfg.V, (B, n)), n - np.arange(B) % 2
        logits, layers = extend(
            tiny.params(cfg), cfg, layers, jnp.asarray(tokens, jnp.int32), start_B, jnp.asarray(length, jnp.int32), policy
        )
        start_B = start_B + length
    last = jnp.take_along_axis(logits, jnp.asarray(length)[:, None, None] - 1, axis=1)
    return np.asarray(last), layers


@pytest.mark.parametrize("rule", [kv.full(), kv.snapkv(0.5, 6)], ids=["Full", "SnapKV"])
def test_two_forks_are_two_levels(rule):
    copied, by_copy = tree_of_two_levels(rule)
    shared, layers = tree_of_two_levels(SharedPrefix(rule))
    np.testing.assert_allclose(shared, copied, atol=1e-4)
    assert [level.k_JKCH.shape[0] for level in layers[0].levels] == [2, 4] and layers[0].own.live_B.shape == (12,)
    for a, b in zip(layers, by_copy, strict=True):
        assert tiny.kept(SharedPrefix(rule), a) == tiny.kept(rule, b)


def test_the_prefix_is_held_once():
    """16 questions: one prefix and 16 times their room, where copies hold 16 prefixes."""
    policy, room = kv.hydragen(), Room(8)
    layers = pack(policy, tiny.read(policy, [tiny.prompts()[0]]).layers, room, tiny.CFG)
    alone = tree_bytes([layer.levels for layer in layers])
    many = policy.fork(layers, 16, room)
    assert tree_bytes([layer.levels for layer in many]) == alone
    assert tree_bytes([layer.own for layer in many]) == 16 * tree_bytes([layer.own for layer in layers])
    full = kv.full()
    copied = tree_bytes(full.fork(pack(full, tiny.read(full, [tiny.prompts()[0]]).layers, room, tiny.CFG), 16, room))
    assert tree_bytes(many) < copied / 4


def test_forks_leave_the_context_as_it_was():
    """The loop consumes its state; the context's own arrays are not in it."""
    m = model()
    c = context(kv.hydragen(), m)
    first = new_tokens(ask(m, c, list(QUESTIONS), GREEDY, 0, 12, ()))
    assert new_tokens(ask(m, c, list(QUESTIONS), GREEDY, 0, 12, ())) == first
    assert all(not x.is_deleted() for x in jax.tree.leaves(c.layers))


def test_rules_with_a_store_of_their_own_are_refused():
    for rule in (kv.h2o(0.5), kv.streaming_llm(0.5, evict=0), kv.adakv(0.5)):
        with pytest.raises(UserError, match="store of its own|set evict=0"):
            SharedPrefix(rule).check(tiny.CFG, 64)


# -- on a mesh


def test_one_prefix_on_a_mesh_that_splits_the_batch():
    """Four sequences over data=2, their prefix whole on both: each device takes its own queries to it, and neither rows nor
    queries move."""
    rng, B = np.random.default_rng(0), 4
    level, on = random_layer(rng, 1, 64, 0, 60), sharding.mesh(2, 1)
    q = jnp.asarray(rng.normal(size=(B, 1, 4, 8)), jnp.float32)
    order = jnp.full((B, 1), 60, jnp.int32)

    def read_it(q, level, order):
        return read_level(q, level, Flow(q[:, :, 0], order, order, order), Here(0, tiny.CFG))

    wanted = read_it(q, level, order)
    named = sharding.shard({"q_BTNH": q, "level": level, "order_BT": order}, on)
    given = (named["q_BTNH"], named["level"], named["order_BT"])
    with jax.set_mesh(on):
        program = jax.jit(read_it).lower(*given).compile()
    assert collectives(str(program.as_text())) == []
    for got, want in zip(program(*given), wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
def test_forks_on_a_mesh_give_the_text_of_one_device(groups):
    rows, texts = [list(row) for row in tiny.prompts()][:groups], []
    for m in (model(), sharding.place(model(), sharding.mesh(2, 2))):
        setup = Setup(kv.hydragen())
        prompt = read(m, rows, setup)
        s = start(m, prompt, setup, ROOM)
        layers = setup.kv.fork(s.layers, 4 // groups, Room(ROOM))
        s = jax.tree.map(lambda x: jnp.repeat(x, 4 // groups, axis=0), s.replace(layers=()))
        s = sharding.follow(m.params, s.replace(layers=layers))
        with sharding.beside(m.params):
            s = run(m.params, m.cfg, s, jnp.int32(100), policy=setup.kv, drafter=setup.decode, how=GREEDY, eos=())
        texts.append(new_tokens(s))
    assert texts[0] == texts[1] and len(texts[0][0]) == ROOM


def test_hydragen_wraps_what_keeps_rows(tmp_path):
    """Through the public functions, and saved: SnapKV's rows of the context, shared."""
    import test_api

    m, questions = test_api.model(), [test_api.text(5, 2), test_api.text(3, 3)]
    made = []
    for policy in (tokeff.kv.snapkv(0.5, window=6), tokeff.kv.hydragen(tokeff.kv.snapkv(0.5, window=6))):
        c = tokeff.compress(m, test_api.text(64), policy, room=24)
        c.save(tmp_path / type(policy).__name__)
        made.append(tokeff.generate(m, questions, cache=c, max_new=12).tokens)
        again = Compressed.load(m, tmp_path / type(policy).__name__)
        assert again.setup == c.setup and tokeff.generate(m, questions, cache=again, max_new=12).tokens == made[-1]
    assert made[0] == made[1]


def test_a_branch_without_rows_of_its_own_adds_no_level():
    policy = kv.hydragen()
    (layer, *_) = pack(policy, tiny.read(policy).layers, Room(8), tiny.CFG)
    twice = branch(branch(layer, 2, Room(8)), 2, Room(8))
    assert len(twice.levels) == 1 and twice.own.live_B.shape == (8,)
