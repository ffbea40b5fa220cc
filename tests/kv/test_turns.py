"""A context and then a question: two prefills of unequal, padded rows leave what one prefill of the whole text leaves."""

import dataclasses
import functools

import numpy as np
import pytest
import tiny
from oracles.against import GIVEN

from tokeff.kv import methods as kv
from tokeff.kv.cache import Room
from tokeff.kv.compress import HeadMass
from tokeff.kv.evidence import Ask, QueryMoments
from tokeff.kv.extend import pack
from tokeff.kv.prefill import prefill
from tokeff.models.config import Rope
from tokeff.sparse.methods import infllm, quest, tidaldecode, tokenselect

pytestmark = [pytest.mark.core, pytest.mark.xdist_group("turns")]
FIRST = (40, 33)  # tokens of the first turn: 7 places of padding stay between the turns of the shorter row
EVIDENCE = (Ask(), Ask(last=6), Ask(decay=0.8), Ask(last=1), Ask(near=8), QueryMoments(4), HeadMass(6, ((1,),)))
POLICIES = {
    "full": kv.full(),
    "h2o": kv.h2o(0.5),
    "a2sf": kv.a2sf(0.5, 0.8, recent=8),
    "tova": kv.tova(0.5),
    "expected": kv.expected_attention(0.5, 40),
    "compresskv": kv.compresskv(0.5, 6, judges=((1,),)),
    "streaming": kv.streaming_llm(0.5),
    "snapkv": kv.snapkv(0.5, 6),
    "adakv": kv.adakv(0.5, 6, page=4),
    "shadowkv": kv.shadowkv(0.25),
    "tidaldecode": tidaldecode(0.5, (0,), (1,), 8),
    "quest": quest(0.5, 4, (0,), 8),
    "infllm": infllm(0.5, 4, 2, sinks=4, recent=8),
    "tokenselect": tokenselect(0.5, sinks=4, recent=8, cosine=0.5),
}


@functools.cache
def prompts():
    """(in two turns, in one)."""
    rows, then = zip(*((row[:n], row[n:]) for row, n in zip(tiny.prompts(), FIRST, strict=True)), strict=True)
    before = prefill(tiny.params(), tiny.CFG, *tiny.padded(rows), evidence=EVIDENCE)
    both = prefill(tiny.params(), tiny.CFG, *tiny.padded(then), evidence=EVIDENCE, after=before)
    return both, tiny.read(tiny.FULL, evidence=EVIDENCE)


@pytest.mark.parametrize("name", POLICIES)
def test_two_turns_equal_one(name):
    policy, found = POLICIES[name], []
    for prompt in prompts():
        packed = pack(policy, prompt.layers, Room(3), tiny.CFG)
        logits = np.stack([out for out, _ in tiny.forced(policy, packed, prompt, GIVEN[:, :3])])
        found.append((logits, [tiny.kept(policy, layer) for layer in packed]))
    assert found[0][1] == found[1][1], "other rows are kept"
    np.testing.assert_allclose(found[0][0], found[1][0], atol=5e-4)


def test_two_turns_give_the_same_logits_and_text():
    both, whole = prompts()
    np.testing.assert_allclose(both.logits_BV, whole.logits_BV, atol=5e-4)
    for b, row in enumerate(tiny.prompts()):
        assert both.tokens_BT[b, : len(row)].tolist() == list(row)
        assert int(both.next_B[b]) == int(both.length_B[b]) == len(row)


def test_windows_reach_over_the_padding_behind_a_context():
    """One sequence whose first turn was padded to a bucket: a window counts orders, not slots."""
    cfg = dataclasses.replace(tiny.CFG, name="windowed", windows=(16, None, 16), local_rope=Rope(100.0))
    row, weights = tiny.prompts()[1], tiny.params(cfg)
    before = prefill(weights, cfg, *tiny.padded([row[:33]], T=40))
    both = prefill(weights, cfg, *tiny.padded([row[33:]]), after=before)
    whole = prefill(weights, cfg, *tiny.padded([row]))
    np.testing.assert_allclose(both.logits_BV, whole.logits_BV, atol=5e-4)
