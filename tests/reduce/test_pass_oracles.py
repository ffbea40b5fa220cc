"""Passes against their oracles: which rows go on, and what layers below and above the pass hold, in prefill and decode."""

from math import ceil

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from oracles import policies, selection
from oracles.against import agree, dense, read

from tokeff.kv import methods as kv
from tokeff.reduce.methods import gemfilter, promptdistill, truncated
from tokeff.reduce.prune import smooth
from tokeff.sparse.methods import tidaldecode

pytestmark = pytest.mark.core
LAYER, BUDGET = 1, 0.5
ROWS = [ceil(BUDGET * n) for n in tiny.LENGTHS]
DISTILL, GEM = promptdistill(BUDGET, LAYER), gemfilter(BUDGET, LAYER)


def distilled(b):
    """(model, Seen of each layer, logits) with rows dropped at LAYER."""
    return dense(b)[0], *selection.promptdistill(dense(b)[0], tiny.prompts()[b], LAYER, ROWS[b])


def gems(b):
    """(model, Seen of each layer, logits) of the chosen tokens alone."""
    return dense(b)[0], *selection.gemfilter(dense(b)[0], tiny.prompts()[b], LAYER, ROWS[b])[1:]


@pytest.mark.parametrize(("cut", "make"), [(DISTILL, distilled), (GEM, gems)], ids=["PromptDistill", "GemFilter"])
def test_prefill_drops_the_rows_the_oracle_drops(cut, make):
    prompt = read((), cut)
    for b in range(2):
        _, seen, logits = make(b)
        np.testing.assert_allclose(prompt.logits_BV[b], logits, atol=5e-4)
        for i, layer in enumerate(prompt.layers):
            assert [o for o in layer.order_BKS[b, 0].tolist() if o >= 0] == seen[i].orders, f"layer {i}, sequence {b}"


def test_gemfilter_renumbers_and_remembers_places():
    prompt = read((), GEM)
    for b, n in enumerate(ROWS):
        places = selection.gemfilter(dense(b)[0], tiny.prompts()[b], LAYER, n)[0]
        assert int(prompt.next_B[b]) == n and int(prompt.length_B[b]) == tiny.LENGTHS[b]
        if prompt.place_BM is not None:
            assert [p for p in prompt.place_BM[b].tolist() if p >= 0] == places


FULL = (kv.full(), lambda m, s, n: policies.Cache(m, s))
# Layers below the pass hold 64 rows, layers above 32: a share means a share of what a layer holds.
POLICIES = {
    "full": FULL,
    "streaming": (kv.streaming_llm(0.5), lambda m, s, n: Above(policies.StreamingLLM, m, s, 4)),
    "h2o": (kv.h2o(0.5, evict=4), lambda m, s, n: Above(policies.H2O, m, s, None, 4)),
    "snapkv": (kv.snapkv(0.5, 6), lambda m, s, n: Above(policies.SnapKV, m, s, 6, 5, "avg")),
    "tidaldecode": (tidaldecode(0.375, (0,), (1,), 8), lambda m, s, n: selection.TidalDecode(m, s, ceil(0.375 * n) - 8, 8, (0,), (1,))),
}


class Above:
    """One oracle per layer, each with half of the rows of its layer, behind the interface of one."""

    def __init__(self, make, model, seen, *options):
        self.m, self.parts = model, []
        for s in seen:
            n = ceil(len(s.orders) / 2)
            self.parts.append(make(model, seen, n, *(n // 2 if x is None else x for x in options)))

    def attend(self, layer, *row):
        return self.parts[layer].attend(layer, *row)

    def kept(self, layer, head):
        return self.parts[layer].kept(layer, head)


@pytest.mark.parametrize("name", POLICIES)
def test_policy_over_dropped_rows_equals_its_oracle(name):
    """Orders with gaps above the pass: protected rows and windows go by order, places in the cache by the rows that are there."""
    policy, make = POLICIES[name]
    agree(policy, [make(*distilled(b)[:2], tiny.LENGTHS[b]) for b in range(2)], cut=DISTILL)


@pytest.mark.parametrize("name", ["full", "h2o"])
def test_policy_over_renumbered_rows_equals_its_oracle(name):
    policy, make = POLICIES[name]
    agree(policy, [make(*gems(b)[:2], ROWS[b]) for b in range(2)], cut=GEM)


def test_smoothing_counts_only_neighbours_that_exist():
    score = jnp.asarray([[5.0, 1.0, 3.0, 7.0, 100.0]])
    real = jnp.asarray([[True, True, True, True, False]])
    np.testing.assert_allclose(smooth(score, real, 5)[0, :4], [3.0, 4.0, 4.0, 11 / 3], rtol=1e-6)
    np.testing.assert_allclose(smooth(score, real, 1), score)


def test_a_truncated_prompt_is_its_end_alone():
    rows = [row[-n:] for row, n in zip(tiny.prompts(), ROWS, strict=True)]
    cut, alone = tiny.read(tiny.FULL, cut=truncated(BUDGET)), tiny.read(tiny.FULL, rows)
    np.testing.assert_allclose(cut.logits_BV, alone.logits_BV, atol=5e-4)
    assert cut.next_B.tolist() == ROWS
    for b, n in enumerate(tiny.LENGTHS):
        assert [i for i in cut.place_BM[b].tolist() if i >= 0] == list(range(n - ROWS[b], n))
