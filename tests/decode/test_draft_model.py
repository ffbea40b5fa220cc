"""Drafts by another model: its own cache follows the text, the text is the target's, and the two may lie on different devices."""

import dataclasses
import functools
from math import ceil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from driven import SHORT, SMALL, decode, ending, lower, model, plain, start
from oracles.against import dense
from oracles.drafts import warped
from oracles.float64 import float64_model
from oracles.policies import Cache
from oracles.skipping import Skipping, grown

from tokeff import generation, sharding
from tokeff.decode.draft import Target
from tokeff.decode.draft_model import DraftModel
from tokeff.decode.grow import Levels
from tokeff.decode.pearl import Pearl
from tokeff.decode.sample import GREEDY, Sampling
from tokeff.decode.self_draft import EarlyExit
from tokeff.errors import UserError
from tokeff.kv import methods as kv

pytestmark = [pytest.mark.core, pytest.mark.xdist_group("draft-model")]
FULL, H2O = kv.full(), kv.h2o(0.5, evict=4)
CHAIN, TREE = DraftModel(SMALL, 4), DraftModel(SMALL, tree=tiny.TREE)
SAMPLED = Sampling(0.8, top_k=20)


@pytest.fixture(autouse=True, scope="module")
def double():
    with float64_model():
        yield


def small(**more):
    return model(draft=lower(SMALL.L), **more)


@functools.cache
def drafted(policy, drafter, rows=None):
    return decode(policy, drafter, small(), rows)


def same(policy, drafter, rows=None) -> bool:
    """Whether the text is plain decoding's; fails where no draft was accepted, since nothing would be shown."""
    s = drafted(policy, drafter, rows)
    assert int(s.passes_B.max()) < tiny.NEW - 1
    return tiny.text(s) == plain(policy, rows)


@pytest.mark.parametrize(("policy", "drafter"), [(FULL, CHAIN), (H2O, CHAIN), (FULL, TREE)], ids=["full", "h2o", "tree"])
def test_text_is_that_of_plain_decoding(policy, drafter):
    assert same(policy, drafter)


def test_prompt_of_one_token():
    assert same(FULL, CHAIN, SHORT)


def test_a_model_of_the_first_layers_drafts_as_these_layers_do():
    """Two ways to the same drafts: passes are cut alike."""
    assert drafted(FULL, CHAIN).passes_B.tolist() == decode(FULL, EarlyExit(SMALL.L, 4)).passes_B.tolist()


def test_the_target_as_its_own_draft_model_is_always_right():
    """With the same noise it draws the same tokens. Every pass commits the draft and one more, whose token it reads with the next root."""
    s = decode(FULL, DraftModel(tiny.CFG, 4), model(draft=tiny.params(tiny.CFG, "float64")), how=SAMPLED)
    assert tiny.text(s) == plain(FULL, how=SAMPLED)
    assert s.passes_B.tolist() == [ceil((tiny.NEW - 1) / 5)] * 2


def test_length_limits_of_rows():
    m = small()
    for limit in range(2, 9):
        s = start(FULL, CHAIN, m).replace(limit_B=jnp.asarray([limit, tiny.NEW], jnp.int32))
        s = CHAIN.drive(m.params, m.cfg, s, 1000, policy=FULL, how=GREEDY, eos=())
        assert tiny.text(s) == [plain(FULL)[0][:limit], plain(FULL)[1]]


def test_end_of_sequence_inside_an_accepted_span():
    """What the draft model wrote behind it is not emitted."""
    m, eos = small(), ending(FULL, CHAIN, small())
    s = decode(FULL, CHAIN, m, eos=(eos,))
    assert tiny.text(s) == [row[: row.index(eos) + 1] if eos in row else row for row in plain(FULL)] and s.done_B.all()


# -- what is drafted, pass by pass


def small_oracle() -> tuple[Skipping, list[Cache]]:
    """The small model, and what it holds of each prompt: what the whole model holds in its first layers."""
    light = Skipping(tiny.params().replace(blocks=tiny.params().blocks[: SMALL.L]), SMALL)
    return light, [Cache(light, dense(b)[1][: SMALL.L]) for b in range(2)]


def logits_at(draft, b: int, cache, light, order: int) -> list[np.ndarray]:
    """The small model's logits at every node, each along its own path."""
    seen, out = {}, []
    for node, token in enumerate(np.asarray(draft.tokens_BW)[b].tolist()):
        seen[node] = grown(cache if node == 0 else seen[int(draft.parent_BW[b, node])])
        depth = 0 if node == 0 else max(o for o in seen[node].rows[0][0]) + 1 - order
        out.append(light.row(seen[node], token, order + depth))
    return out


def test_a_tree_has_the_best_guesses_of_the_draft_model():
    """Pass by pass, while its own cache takes in what was accepted."""
    m, s, ranks = small(), start(FULL, TREE, small()), sorted(tiny.TREE, key=lambda path: (len(path), path))
    propose = jax.jit(lambda params, s: TREE.draft(s, Target(params, tiny.CFG, FULL, GREEDY))[0])
    light, caches = small_oracle()
    for _ in range(3):
        draft, before, order = propose(m.params, s), tiny.text(s), np.asarray(s.count_B) - 1
        for b, cache in enumerate(caches):
            logits = logits_at(draft, b, cache, light, int(order[b]))
            for node in range(1, TREE.nodes):
                best = np.argsort(-logits[int(draft.parent_BW[b, node])], kind="stable")
                assert int(draft.tokens_BW[b, node]) == best[ranks[node - 1][-1]]
        s = TREE.drive(m.params, m.cfg, s, 1, policy=FULL, how=GREEDY, eos=())
        for b, cache in enumerate(caches):
            for t, token in enumerate(tiny.text(s)[b][len(before[b]) - 1 : -1]):
                light.row(cache, token, int(order[b]) + t)
    assert max(map(len, tiny.text(s))) > 4


def test_copies_tell_the_law_that_they_were_drawn_from():
    how, drafter, m = Sampling(8.0, top_k=9), DraftModel(SMALL, 2, copies=3, coupled=False), small()
    s = start(FULL, drafter, m, how=how)
    draft = jax.jit(lambda params, s: drafter.draft(s, Target(params, tiny.CFG, FULL, how))[0])(m.params, s)
    light, caches = small_oracle()
    for b, cache in enumerate(caches):
        logits = np.stack(logits_at(draft, b, cache, light, len(tiny.prompts()[b])))
        for node in range(1, drafter.nodes):
            law = warped(logits[int(draft.parent_BW[b, node])], how.temperature, how.top_k)
            np.testing.assert_allclose(np.exp(draft.logq_BWV[b, node]), law, atol=1e-4)
            assert law[int(draft.tokens_BW[b, node])] > 0
    assert draft.parent_BW[0].tolist() == [0, 0, 0, 0, 1, 2, 3]
    assert max(len(set(np.asarray(draft.tokens_BW)[b, 1:4].tolist())) for b in range(2)) > 1


def test_levels_of_a_tree():
    levels = Levels.of(((0,), (1,), (0, 0), (0, 2), (1, 1), (0, 2, 0)))
    assert (levels.depth, levels.T, levels.nodes, levels.guesses) == (3, 3, 7, 3)
    assert levels.at() == [0, 1, 2, 4, 5, 6, 7] and levels.parents() == [0, 0, 0, 1, 1, 2, 4]
    assert [np.flatnonzero(row).tolist() for row in levels.sees()[[0, 5, 6, 7]]] == [[0], [0, 1, 5], [0, 2, 6], [0, 1, 5, 7]]
    assert Levels.chains(3, 2).parents() == [0, 0, 0, 1, 2, 3, 4]


# -- both at once


def apart(params):
    """The tiny model on one device, this draft model on another."""
    here, there = jax.devices()[:2]
    m = model()
    m = dataclasses.replace(m, params=jax.device_put(m.params, here))
    return m.attach(draft=jax.device_put(params, there)), there


@pytest.mark.parametrize("policy", [FULL, H2O], ids=["full", "h2o"])
def test_draft_and_target_on_two_devices(policy):
    """The text is plain decoding's, and each side's cache stays where its weights are."""
    m, there = apart(lower(SMALL.L))
    drafter = Pearl(SMALL, 3)
    s = decode(policy, drafter, m)
    assert tiny.text(s) == plain(policy)
    assert int(s.passes_B.min()) < tiny.NEW - 1
    ahead, _ = s.drafter
    assert {x.devices() == {there} for x in jax.tree.leaves(ahead)} == {True}
    assert {x.devices() == {there} for x in jax.tree.leaves(s.layers)} == {False}


@pytest.mark.parametrize("policy", tiny.sampled([FULL, H2O], (FULL,)), ids=["full", "h2o"])
def test_draft_and_target_on_two_meshes(policy):
    """Four devices each, with sequences, heads and weights split over them: the same text, and each cache on its own mesh."""
    here, there = (sharding.mesh(2, 2, jax.devices()[first : first + 4]) for first in (0, 4))
    m = sharding.place(model(), here).attach(draft=sharding.shard(lower(SMALL.L), there))
    parts = generation.Setup(policy, decode=Pearl(SMALL, 3))
    s = generation.start(m, generation.read(m, tiny.prompts(), parts), parts, tiny.NEW)
    s = generation.go(m, s, parts, tiny.NEW, ())
    assert tiny.text(s) == plain(policy)
    assert int(s.passes_B.min()) < tiny.NEW - 1
    for layers, mesh in ((s.drafter[0].layers, there), (s.layers, here)):
        assert {frozenset(x.devices()) for x in jax.tree.leaves(layers)} == {frozenset(mesh.devices.flat)}
        assert not layers[0].k_BKCH.sharding.is_fully_replicated


def test_drafts_that_are_always_right_never_stop():
    """The first pass verifies one token, each one after that a whole draft: both devices draw with the same noise."""
    m, _ = apart(tiny.params(tiny.CFG, "float64"))
    s = decode(FULL, Pearl(tiny.CFG, 3), m, how=SAMPLED)
    assert tiny.text(s) == plain(FULL, how=SAMPLED)
    assert s.passes_B.tolist() == [1 + ceil((tiny.NEW - 2) / 3)] * 2


def test_turns_one_at_a_time():
    """As a stream asks for them: what is pending between two calls is not lost."""
    m, _ = apart(lower(SMALL.L))
    drafter = Pearl(SMALL, 3)
    whole, s = decode(FULL, drafter, m), start(FULL, drafter, m)
    while not s.done_B.all():
        s = drafter.drive(m.params, m.cfg, s, 1, policy=FULL, how=GREEDY, eos=())
    assert tiny.text(s) == plain(FULL) and s.passes_B.tolist() == whole.passes_B.tolist()


# -- what is refused


@pytest.mark.parametrize("kind", [DraftModel, Pearl])
def test_a_model_that_does_not_fit_is_refused_with_the_fix(kind):
    with pytest.raises(UserError, match=r"m\.attach\(draft=d\.params\)"):
        kind(SMALL, 4).check(model())
    with pytest.raises(UserError, match="with its tokenizer"):
        kind(dataclasses.replace(SMALL, V=60), 4).check(small())
    with pytest.raises(UserError, match=r"d\.cfg"):
        kind(tiny.CFG, 4).check(small())
    with pytest.raises(UserError, match="shorten them"):
        start(FULL, kind(dataclasses.replace(SMALL, max_len=70), 4), small())
    kind(SMALL, 4).check(small())


@pytest.mark.parametrize(
    "make",
    [lambda: DraftModel(SMALL, 0), lambda: DraftModel(SMALL, 2, copies=2), lambda: DraftModel(SMALL, tree=((0, 0),)),
     lambda: DraftModel(SMALL, tree=()), lambda: Pearl(SMALL, 1)],
)  # fmt: skip
def test_bad_settings_are_refused_in_one_line(make):
    with pytest.raises(UserError) as error:
        make()
    assert "\n" not in str(error.value)


