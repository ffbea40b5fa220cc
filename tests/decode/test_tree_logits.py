"""What a verifying pass leaves: at every node the logits of a causal pass along its path alone, and then the cache of a fresh prefill."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from adversaries import Bush
from driven import go, model, plain, settled_is_fresh, start
from oracles import drafts as oracle
from oracles.float64 import float64_model
from oracles.model import Model, prefill
from oracles.policies import Cache
from test_drafts import one_row
from test_windows import CFG as WINDOWED

pytestmark = [pytest.mark.core, pytest.mark.xdist_group("windows")]
ROWS = (tiny.prompts()[0][:20], tiny.prompts()[1][:9])
CFGS = [tiny.CFG, WINDOWED]


@pytest.fixture(autouse=True, scope="module")
def double():
    with float64_model():
        yield


@dataclass(frozen=True)
class Watched(Bush):
    """Keeps the logits of its last pass."""

    def init(self, B, V):
        return jnp.zeros((B, self.nodes, V))

    def observe(self, state, draft, result):
        return result.logits_BWV


@functools.cache
def watched(cfg) -> Watched:
    """Right and wrong drafts, in paths that end now here and now there."""
    return Watched(tuple((*row, *new) for row, new in zip(ROWS, plain(tiny.FULL, ROWS, cfg=cfg), strict=True)), 6, miss=5)


class Rounded(Model):
    """With frequencies of rotation as they are by contract: numbers of float32."""

    def rope(self, layer, x_H, position):
        half = len(x_H) // 2
        angle = position * (self.cfg.rope_of(layer).base ** (-np.arange(half) / half)).astype(np.float32).astype(np.float64)
        a, b = x_H[:half], x_H[half:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)])


def caches(cfg) -> list[Cache]:
    m = Rounded(tiny.params(cfg, "float64"), cfg)
    return [Cache(m, prefill(m, row)[0]) for row in ROWS]


@pytest.mark.parametrize("cfg", CFGS, ids=lambda cfg: cfg.name)
def test_logits_at_every_node(cfg):
    """Nodes that are accepted, refused, and behind refused ones; the cache holds what passes before accepted."""
    drafter, m, lengths = watched(cfg), model(cfg), set()
    s, behind = start(tiny.FULL, drafter, m, ROWS), caches(cfg)
    propose = jax.jit(drafter.propose)
    for _ in range(3):
        draft = jax.tree.map(np.asarray, propose(s.drafter, s.tokens_BS, s.count_B))
        s = go(s, tiny.FULL, drafter, m, steps=1)
        for b, cache in enumerate(behind):
            parent, token = draft.parent_BW[b].tolist(), draft.tokens_BW[b].tolist()
            logits = oracle.tree_logits(one_row, [cache], parent, token)
            np.testing.assert_allclose(s.drafter[b], logits, atol=1e-9)
            path, _ = oracle.accepted(parent, token, draft.valid_BW[b], [int(np.argmax(x)) for x in logits])
            assert int(s.accepted.count_B[b]) == len(path)
            for node in path:
                behind[b] = one_row(behind[b], token[node])[1]
            lengths.add(len(path))
    assert len(lengths) > 1 and max(lengths) > 4


@pytest.mark.parametrize("cfg", CFGS, ids=lambda cfg: cfg.name)
def test_what_was_accepted_lies_where_a_fresh_prefill_puts_it(cfg):
    """While a span is pending, behind a span that a limit cut, and in a sequence that stopped long before the other."""
    drafter, m = watched(cfg), model(cfg)
    for steps, limits in ((2, (tiny.NEW, tiny.NEW)), (1000, (3, tiny.NEW)), (1000, (tiny.NEW, tiny.NEW))):
        s = start(tiny.FULL, drafter, m, ROWS).replace(limit_B=jnp.asarray(limits, jnp.int32))
        s = go(s, tiny.FULL, drafter, m, steps=steps)
        if steps == 2:
            assert int(s.accepted.count_B.max()) > 1, "nothing is pending"
        settled_is_fresh(s, ROWS, m)
