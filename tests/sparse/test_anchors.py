"""Kascade's search against its definition: attention of a naive model, every set of anchors tried, and what it must refuse."""

import numpy as np
import pytest
import tiny
from oracles import anchoring
from oracles import model as oracle

from tokeff.errors import UserError
from tokeff.models.config import Precision
from tokeff.models.load import Model
from tokeff.sparse import methods as sparse
from tokeff.sparse.anchors import anchors, best_anchors, looks, overlap

pytestmark = [pytest.mark.core, pytest.mark.xdist_group("anchors")]
M = Model(tiny.CFG, tiny.params(), None, Precision(), "tiny")
TEXTS = [list(tiny.prompts()[0][:48]), list(tiny.prompts()[1][:48])]
LAST, RECENT, BUDGET = 6, 4, 0.25


@pytest.fixture(scope="module")
def facts():
    """(alike_LLKK, weight_L) of the naive model, the mean over both texts."""
    m, found = oracle.Model(tiny.params(), tiny.CFG), []
    for text in TEXTS:
        attention, turned = anchoring.looked(m, text)
        found.append((anchoring.alike(m, attention, text, 12 - RECENT, RECENT, LAST), turned))
    return np.mean([a for a, _ in found], axis=0), np.mean([t for _, t in found], axis=0)


def test_overlaps_and_importance_equal_their_definition(facts):
    found = [looks(M, text, LAST) for text in TEXTS]
    np.testing.assert_allclose(np.mean([turned for _, turned in found], axis=0), facts[1], atol=1e-4)
    mine = np.mean([overlap(p, 12 - RECENT, RECENT) for p, _ in found], axis=0)
    np.testing.assert_allclose(mine, facts[0], atol=2e-3)
    assert mine.min() < 0.9, "heads that all choose alike would test nothing"
    assert all(np.allclose(np.diagonal(mine[i, i]), 1) for i in range(tiny.CFG.L))


@pytest.mark.parametrize(("count", "dense"), [(1, (0,)), (2, (0,)), (2, ()), (3, ())])
def test_the_search_equals_trying_every_set(facts, count, dense):
    select, heads = anchors(M, TEXTS, count, BUDGET, dense, RECENT, LAST)
    assert (select, heads) == anchoring.search(*facts, count, dense)
    sparse.kascade(BUDGET, dense, select, heads, RECENT).check(tiny.CFG, 48)


@pytest.mark.parametrize("seed", range(5))
def test_dynamic_programming_finds_the_best_of_all_sets(seed):
    rng = np.random.default_rng(seed)
    gain = rng.random((9, 9))
    for count in range(1, 10):
        one = gain[..., None, None]
        assert best_anchors(gain, count) == anchoring.search(one, np.ones(9), count, ())[0]


def test_planted_groups_are_found():
    """Layers 0-2, 3-6 and 7-8 choose alike."""
    group = np.array([0, 0, 0, 1, 1, 1, 1, 2, 2])
    assert best_anchors((group[:, None] == group).astype(float), 3) == (0, 3, 7)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: anchors(M, TEXTS, 5), "1 to"),
        (lambda: anchors(M, TEXTS, 0), "1 to"),
        (lambda: anchors(M, TEXTS, 1, 0.25, (0,), recent=12), "longer texts"),
        (lambda: anchors(M, TEXTS, 1, 0.25, (0,), recent=4, last=48), "longer texts"),
    ],
)
def test_what_cannot_be_searched_is_refused(call, word):
    with pytest.raises(UserError, match=word):
        call()
