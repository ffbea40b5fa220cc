"""Thousands of generated tokens: memory stays what it was after the prompt, and the rows are the ones the rule says."""

import numpy as np
import pytest
import tiny

from tokeff.kv import methods as kv
from tokeff.kv.policy import tree_bytes

pytestmark = pytest.mark.core
NEW, ROWS = 2500, 24
POLICIES = {
    "streaming": kv.streaming_llm(ROWS, sinks=4), "h2o": kv.h2o(ROWS, evict=4), "tova": kv.tova(ROWS), "a2sf": kv.a2sf(ROWS, recent=8),
    "alisa": kv.alisa(ROWS), "keydiff": kv.keydiff(ROWS), "rkv": kv.rkv(ROWS, window=4, evict=8), "infinite": kv.lm_infinite(ROWS, sinks=4),
}  # fmt: skip


@pytest.mark.parametrize("name", POLICIES)
def test_rows_and_bytes_after_thousands_of_tokens(name):
    policy = POLICIES[name]
    s = tiny.start(tiny.read(policy), policy, new=NEW)
    before = tree_bytes(s.layers)
    end = tiny.go(s, policy, steps=NEW)
    assert int(end.made_B.min()) == NEW and tree_bytes(end.layers) == before
    assert len({token for row in tiny.text(end) for token in row}) > 1
    for layer in end.layers:
        assert all(np.isfinite(np.asarray(x)).all() for x in (layer.k_BKCH, layer.v_BKCH))
        for b, heads in enumerate(tiny.kept(policy, layer)):
            newest = tiny.LENGTHS[b] + NEW - 2  # the last token drawn was not fed back
            for rows in heads:
                assert len(set(rows)) == len(rows) and ROWS - (policy.evict - 1) <= len(rows) <= ROWS
                assert rows[-1] == newest
                recent = policy.recent_rows(ROWS)
                assert rows[-recent:] == list(range(newest - recent + 1, newest + 1)) or not recent
                if policy.sinks:
                    assert rows == [*range(policy.sinks), *range(newest - ROWS + policy.sinks + 1, newest + 1)]
