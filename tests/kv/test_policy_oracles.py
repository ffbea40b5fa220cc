"""Every cache policy against its naive oracle: kept rows and logits, decoding one row at a time, two unequal prompts in a batch."""

from math import ceil

import numpy as np
import pytest
import tiny
from oracles import policies as oracle
from oracles.against import agree, dense, read

from tokeff.kv import methods as kv
from tokeff.kv.budget import Spread
from tokeff.kv.cache import Room
from tokeff.kv.extend import pack
from tokeff.kv.pool import KeepByHead
from tokeff.kv.score import Chance
from tokeff.models.flow import Here

pytestmark = pytest.mark.core
ROWS = [ceil(0.5 * n) for n in tiny.LENGTHS]  # 32 and 26


def caches(make):
    """One oracle cache per prompt: make(model, seen, rows, b)."""
    return [make(*dense(b)[:2], ROWS[b], b) for b in range(len(ROWS))]


def chance(b):
    """tokeff's own random scores of prompt b: what is random is not for an oracle to say, what is kept is."""
    layers = read((), None).layers
    score = [np.asarray(Chance(3).first(rows, Here(i, tiny.CFG)))[b] for i, rows in enumerate(layers)]
    return lambda layer, head, order: score[layer][head, order]


CASES = {
    "full": (kv.full(), lambda m, s, n, b: oracle.Cache(m, s)),
    "random": (kv.random_rows(0.5, seed=3), lambda m, s, n, b: oracle.Given(m, s, n, chance(b))),
    "recent": (kv.recent_rows(0.5), lambda m, s, n, b: oracle.Given(m, s, n, lambda layer, head, order: order)),
    "streaming": (kv.streaming_llm(0.5), lambda m, s, n, b: oracle.StreamingLLM(m, s, n, 4)),
    "streaming in blocks": (kv.streaming_llm(0.5, evict=4), lambda m, s, n, b: oracle.StreamingLLM(m, s, n, 4, 4)),
    "h2o": (kv.h2o(0.5), lambda m, s, n, b: oracle.H2O(m, s, n, n // 2)),
    "h2o in blocks": (kv.h2o(0.5, evict=4), lambda m, s, n, b: oracle.H2O(m, s, n, n // 2, 4)),
    "snapkv": (kv.snapkv(0.5, 6), lambda m, s, n, b: oracle.SnapKV(m, s, n, 6, 5, "avg")),
    "snapkv, max": (kv.snapkv(0.5, 6, 7, "max"), lambda m, s, n, b: oracle.SnapKV(m, s, n, 6, 7, "max")),
    "adakv": (kv.adakv(0.5, 6, page=4), lambda m, s, n, b: oracle.AdaKV(m, s, n, 6, 7, "max", 0.2)),
}


@pytest.mark.parametrize("name", CASES)
def test_policy_equals_its_oracle(name):
    policy, make = CASES[name]
    agree(policy, caches(make))


def test_oracles_differ():
    """The comparison means something: no two policies keep the same rows of this prompt."""
    kept = {name: tuple(tuple(caches(make)[0].kept(2, h)) for h in range(2)) for name, (_, make) in CASES.items() if "blocks" not in name}
    assert len(set(kept.values())) == len(kept)


def test_pool_equals_rows_at_equal_budgets():
    """A safeguard of 1 gives every head the same number of rows: pages and plain slots then hold and read the same."""
    rule = kv.snapkv(0.5, 6)
    make = CASES["snapkv"][1]
    agree(KeepByHead(rule, Spread(1.0), page=4), caches(make))


def test_heads_have_different_budgets_and_memory_is_their_sum():
    """AdaKV's heads hold unequal numbers of rows; the pool is as large as their sum, to a page a head."""
    policy = kv.adakv(0.5, 6, page=4)
    prompt = read(policy.needs())
    unequal = 0
    for layer in pack(policy, prompt.layers, Room(0), tiny.CFG):
        counts = [[len(head) for head in row] for row in tiny.kept(policy, layer)]
        assert [sum(row) for row in counts] == [2 * n for n in ROWS]
        unequal += counts[0][0] != counts[0][1]
        assert layer.pool.k_BPRH.shape[1] * 4 <= 2 * ROWS[0] + 2 * 4
    assert unequal
