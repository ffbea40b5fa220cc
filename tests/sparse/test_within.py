"""Evict, then select: a selecting policy over the rows that another rule kept; and selecting heads beside streaming ones."""

import numpy as np
import pytest
import tiny

from tokeff.errors import UserError
from tokeff.evals.cost import read_bytes
from tokeff.generation import Setup
from tokeff.kv import methods as kv
from tokeff.kv.cache import Room
from tokeff.kv.classes import ByClass
from tokeff.kv.extend import pack
from tokeff.kv.policy import tree_bytes
from tokeff.sparse import methods as sparse

pytestmark = pytest.mark.core
SNAP = kv.snapkv(0.5, window=8)
GIVEN = np.random.default_rng(3).integers(0, tiny.CFG.V, (len(tiny.LENGTHS), 4))


def logits(policy, prompt):
    packed = pack(policy, prompt.layers, Room(4), tiny.CFG)
    return packed, np.stack([out for out, _ in tiny.forced(policy, packed, prompt, GIVEN)])


@pytest.mark.parametrize("select", [sparse.quest, sparse.tokenselect, sparse.double_sparsity, sparse.top_k_oracle])
def test_selecting_all_of_the_rows_kept_is_the_rule_alone(select):
    from dataclasses import replace

    policy = replace(select(1.0, dense=(0,)), within=SNAP)
    prompt = tiny.read(policy)
    packed, found = logits(policy, prompt)
    alone, expected = logits(SNAP, prompt)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert [tiny.kept(policy, layer) for layer in packed] == [tiny.kept(SNAP, layer) for layer in alone]


def test_evict_then_select_holds_what_the_rule_holds_and_reads_less():
    """RocketKV's two stages: half of the rows are held, and a quarter of all is read of them."""
    policy = sparse.quest(0.25, page=4, dense=(0,), recent=4, within=SNAP)
    prompt = tiny.read(policy)
    packed, found = logits(policy, prompt)
    alone, snap = logits(SNAP, prompt)
    full, _ = logits(sparse.quest(0.25, page=4, dense=(0,), recent=4), prompt)
    assert tree_bytes(alone) < tree_bytes(packed) < 0.75 * tree_bytes(full)  # beside the rows only bounds of pages
    assert read_bytes(Setup(policy), packed, tiny.CFG) < read_bytes(Setup(SNAP), alone, tiny.CFG)
    assert np.abs(found - snap).max() > 1e-3


def test_drafts_over_an_evicted_store_equal_one_row_decoding():
    policy = sparse.quest(0.4, page=4, dense=(0,), recent=8, within=SNAP)
    prompt, drafter = tiny.read(policy), tiny_drafter()
    assert policy.drafts(drafter.depth) is None
    drafted = tiny.go(tiny.start(prompt, policy, drafter), policy, drafter)
    assert tiny.text(drafted) == tiny.text(tiny.go(tiny.start(prompt, policy), policy))
    assert int(drafted.passes_B.min()) < tiny.NEW - 1


def tiny_drafter():
    from tokeff.decode.methods import token_recycling

    return token_recycling(tiny.TREE)


def test_retrieval_heads_over_pages_beside_streaming_heads():
    """DuoAttention's heads: those that fetch select pages, the others keep sinks and recent rows."""
    heads = ((0,), (0, 1), ())
    policy = ByClass(sparse.quest(0.5, page=4, dense=(), recent=4), kv.streaming_llm(0.25, evict=0), heads)
    policy.check(tiny.CFG, tiny.LENGTHS[0])
    prompt = tiny.read(policy)
    packed, found = logits(policy, prompt)
    assert np.isfinite(found).all()
    for i, layer in enumerate(packed):
        for h, rows in enumerate(tiny.kept(policy, layer)[0]):
            assert len(rows) == (tiny.LENGTHS[0] if h in heads[i] else tiny.LENGTHS[0] // 4)
    whole = ByClass(sparse.quest(1.0, page=4, dense=(), recent=4), kv.streaming_llm(1.0, evict=0), heads)
    np.testing.assert_allclose(logits(whole, prompt)[1], logits(tiny.FULL, prompt)[1], atol=1e-4)


def test_a_rule_with_a_store_of_its_own_is_refused():
    for rule in (kv.h2o(0.5), kv.kivi(4), kv.adakv(0.5)):
        with pytest.raises(UserError, match="store of its own|set evict=0"):
            sparse.quest(0.25, page=4, recent=4, within=rule).check(tiny.CFG, 64)
