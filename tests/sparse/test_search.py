"""The offline search finds, head by head, the pattern that loses least: planted heads, and a direct count of the error."""

import numpy as np
import pytest
import tiny

from tokeff.errors import UserError
from tokeff.models.config import Precision
from tokeff.models.load import Model
from tokeff.sparse import methods as sparse
from tokeff.sparse.patterns import AShape, TopBlocks
from tokeff.sparse.search import search

pytestmark = [pytest.mark.core, pytest.mark.xdist_group("search")]
MODEL = Model(tiny.CFG, tiny.params(), None, Precision(), "tiny")
PATTERNS = (AShape(8, 0, 0, 8), AShape(8, 0, 8, 40), TopBlocks(8, 0, 1))


def test_the_search_finds_the_pattern_that_loses_least():
    """A window of 40 with sinks contains the other two, so no head may prefer another."""
    assert search(MODEL, tiny.prompts()[0], PATTERNS) == ((1,) * tiny.CFG.K,) * tiny.CFG.L


def test_what_it_finds_fits_the_method():
    near, blocks = AShape(8, 0, 8, 24), TopBlocks(8, 0, 4)
    heads = search(MODEL, tiny.prompts()[0], (near, blocks))
    assert len({i for row in heads for i in row}) == 2, "random heads should not all agree"
    found = sparse.PerHead(8, 0, (near, blocks), heads)
    worst = sparse.PerHead(8, 0, (near, blocks), tuple(tuple(1 - i for i in row) for row in heads))
    dense = tiny.read(tiny.FULL).layers[1].v_BKSH
    lost = [float(np.square(tiny.read(tiny.FULL, pattern=p).layers[1].v_BKSH - dense).sum()) for p in (found, worst)]
    assert lost[0] < lost[1]


def test_no_patterns_are_refused():
    with pytest.raises(UserError, match="at least one"):
        search(MODEL, tiny.prompts()[0], ())
