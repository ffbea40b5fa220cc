"""After drafts, the next question: `settle` leaves the cache that plain decoding leaves, whatever was pending."""

import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny

from tokeff.decode.loop import settle
from tokeff.decode.methods import token_recycling
from tokeff.kv.extend import extend

pytestmark = pytest.mark.core
QUESTION = np.asarray([[3, 1, 4, 1], [2, 7, 1, 8]])
RECYCLING = token_recycling(tiny.TREE)


def asked(policy, drafter):
    """(the generated text, logits over a question behind it). The programs are those of the property tests; the question goes where
    their last tokens do."""
    s = tiny.start(runs.prompt(), policy, drafter)
    s = tiny.go(s.replace(limit_B=jnp.full(2, tiny.NEW - QUESTION.shape[1], jnp.int32)), policy, drafter)
    said = tiny.text(s)
    s = settle(tiny.params(), tiny.CFG, s, policy=policy.onward())
    last = jnp.take_along_axis(s.tokens_BS, s.count_B[:, None] - 1, axis=1)
    tokens = jnp.concatenate([last, jnp.asarray(QUESTION, jnp.int32)], axis=1)
    length = jnp.full(2, tokens.shape[1], jnp.int32)
    logits, _ = extend(tiny.params(), tiny.CFG, s.layers, tokens, s.count_B - 1 - s.gone_B, length, policy)
    return said, np.asarray(logits)


def stores() -> list:
    """One listed policy of each kind of store, and of each with a mass that drafts add to."""

    def kind(name: str):
        policy = runs.part(name, "fast")["kv"].onward()
        fade = getattr(getattr(policy, "score", None), "fade", lambda: None)()
        return type(policy).attend, fade is None

    names = [m.name for m in runs.METHODS if m.part == "kv"]
    first = {kind(name): name for name in reversed(names)}
    return runs.listed("kv", where=lambda m: m.name in first.values())


@pytest.mark.parametrize("name", tiny.sampled(stores(), ("Full", "StreamingLLM", "H2O", "AdaKV", "Quest", "KIVI")))
def test_a_question_after_drafts_is_answered_as_after_plain_decoding(name):
    policy = runs.part(name, "fast")["kv"]
    if reason := policy.drafts(RECYCLING.depth):
        pytest.skip(reason)
    said, logits = asked(policy, RECYCLING)
    plainly, expected = asked(policy, tiny.PLAIN)
    assert said == plainly
    np.testing.assert_allclose(logits, expected, atol=5e-4)
