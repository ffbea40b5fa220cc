"""Speculative decoding equals one-token decoding under the same policy, strictly, in float64: good drafts, garbage, perfect ones."""

import functools
from math import ceil

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from adversaries import Garbage, Replay
from oracles.float64 import float64_model

from tokeff.decode.methods import prompt_lookup, token_recycling
from tokeff.kv import methods as kv
from tokeff.sparse.methods import double_sparsity, infllm, quest, tidaldecode

pytestmark = [pytest.mark.core, pytest.mark.xdist_group("lossless")]
POLICIES = {
    "full": kv.full(),
    "h2o": kv.h2o(0.5, evict=4),
    "a2sf": kv.a2sf(0.5, 0.8, recent=8, evict=4),
    "tova": kv.tova(0.5, evict=4),
    "lm-infinite": kv.lm_infinite(0.5, 4, evict=4),
    "streaming": kv.streaming_llm(0.5, evict=4),
    "tidaldecode": tidaldecode(0.5, (0,), (1,), 8),
    "quest": quest(0.5, 4, (0,), 8),
    "double sparsity": double_sparsity(0.5, dense=(0,), recent=8),
    "infllm": infllm(0.5, 4, 2, sinks=4, recent=8),
}
LOOKUP, RECYCLING = prompt_lookup(length=4, ngram=2), token_recycling(tiny.TREE)
T, PROMPTS = max(tiny.LENGTHS), tiny.prompts()
SHORT = ((5,), tiny.prompts()[1])  # a prompt of one token beside a long one


@pytest.fixture(autouse=True, scope="module")
def double():
    with float64_model():
        assert tiny.params(tiny.CFG, "float64").norm_D.dtype == jnp.float64
        yield


@functools.cache
def plain(policy, rows=PROMPTS):
    return tiny.text(tiny.decode(policy, rows=rows, T=T, dtype="float64"))


def drafted(policy, drafter, rows=PROMPTS, **options):
    return tiny.decode(policy, drafter, rows, T=T, dtype="float64", **options)


def answers(rows=PROMPTS) -> tuple[tuple[int, ...], ...]:
    """Prompt and greedy continuation of each row."""
    return tuple((*row, *new) for row, new in zip(rows, plain(POLICIES["full"], rows), strict=True))


@pytest.mark.parametrize("name", tiny.sampled(POLICIES, ("full", "h2o", "tidaldecode", "quest")))
def test_token_recycling_equals_plain(name):
    """Trees, ragged batch, eviction at block boundaries, selection across layers."""
    s = drafted(POLICIES[name], RECYCLING)
    assert tiny.text(s) == plain(POLICIES[name])
    assert int(s.passes_B.max()) < tiny.NEW - 1, "no draft was ever accepted, so nothing was tested"


@pytest.mark.parametrize("name", ["full", "h2o"])
def test_prompt_lookup_equals_plain(name):
    s = drafted(POLICIES[name], LOOKUP)
    assert tiny.text(s) == plain(POLICIES[name])
    assert int(s.passes_B.min()) < tiny.NEW - 1


@pytest.mark.parametrize("name", ["full", "h2o"])
def test_garbage_changes_nothing(name):
    assert tiny.text(drafted(POLICIES[name], Garbage(tiny.CFG.V))) == plain(POLICIES[name])


def test_perfect_drafts_take_as_few_passes_as_can_be():
    """The first token comes from the prompt; every pass then commits depth + 1, the last one no more than the limit."""
    s = drafted(POLICIES["full"], Replay(answers()))
    assert tiny.text(s) == plain(POLICIES["full"])
    assert s.passes_B.tolist() == [ceil((tiny.NEW - 1) / 5)] * 2


def test_prompt_of_one_token():
    assert tiny.text(drafted(POLICIES["full"], RECYCLING, SHORT)) == plain(POLICIES["full"], SHORT)
    assert tiny.text(drafted(POLICIES["full"], LOOKUP, SHORT)) == plain(POLICIES["full"], SHORT)


def test_end_of_sequence_inside_an_accepted_span():
    """Tokens 6 to 10 of a row are one accepted span; what follows its end-of-sequence token is not emitted, and the row stops."""
    text = plain(POLICIES["full"])
    eos = text[0][7]
    wanted = [row[: row.index(eos) + 1] if eos in row else row for row in text]
    s = drafted(POLICIES["full"], Replay(answers()), eos=(eos,))
    assert tiny.text(s) == wanted
    assert s.done_B.all() and len(wanted[0]) <= 8


def test_length_limits_of_rows_cut_inside_a_span():
    prompt = tiny.read(POLICIES["full"], dtype="float64")
    drafter = Replay(answers())
    s = tiny.start(prompt, POLICIES["full"], drafter).replace(limit_B=jnp.asarray([3, tiny.NEW], jnp.int32))
    s = tiny.go(s, POLICIES["full"], drafter, dtype="float64")
    assert tiny.text(s) == [plain(POLICIES["full"])[0][:3], plain(POLICIES["full"])[1]]
    assert s.passes_B.tolist() == [1, 4]


@pytest.mark.parametrize("name", tiny.sampled(["h2o", "a2sf", "tova"], ("h2o", "tova")))
def test_refused_drafts_leave_no_evidence(name):
    """After garbage, the rows held and their attention, accumulated, faded or of the last query alone, are those of plain decoding."""
    policy, passes = POLICIES[name], 6
    garbage = Garbage(tiny.CFG.V, never=min(set(range(tiny.CFG.V)) - {t for row in plain(policy) for t in row}))
    prompt = tiny.read(policy, dtype="float64")
    one = tiny.go(tiny.start(prompt, policy), policy, dtype="float64", steps=passes)
    # A pass leaves its evidence with its drafts; the next one adds what was accepted of it.
    prompt = tiny.read(policy, dtype="float64")
    many = tiny.go(tiny.start(prompt, policy, garbage), policy, garbage, dtype="float64", steps=passes + 1)
    assert many.made_B.tolist() == [passes + 2] * 2
    for a, b in zip(one.layers, many.layers, strict=True):
        np.testing.assert_array_equal(a.order_BKC, b.order_BKC)
        held = np.asarray(a.order_BKC) >= 0
        np.testing.assert_allclose(np.asarray(a.mass_BKC)[held], np.asarray(b.mass_BKC)[held], atol=1e-10)
