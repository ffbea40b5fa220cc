"""Superposed Decoding beside its oracle: the same drafts with the same scores, whatever the cache keeps."""

import dataclasses
import functools

import numpy as np
import pytest
import tiny
from driven import model, plain
from oracles import superposing as oracle
from oracles.float64 import float64_model
from oracles.model import Model, prefill
from oracles.policies import H2O, Cache

from tokeff.decode.ngrams import NGrams
from tokeff.decode.superposed import Superposed, suggest
from tokeff.errors import UserError
from tokeff.kv import methods as kv

pytestmark = [pytest.mark.core, pytest.mark.xdist_group("superposed")]
FULL, EVICTS = kv.full(), kv.h2o(24, recent=8, evict=4)
PROMPT, NEW, EOS = tiny.prompts()[1], 10, 6
CFG = dataclasses.replace(tiny.CFG, eos=(EOS,))


@pytest.fixture(autouse=True, scope="module")
def double():
    with float64_model():
        yield


class Letters:
    """One character a token."""

    def encode(self, text, special=True):
        return [ord(c) % CFG.V for c in text]

    def decode(self, ids, special=False):
        return "".join(chr(97 + i) for i in ids)


def small():
    return dataclasses.replace(model(), cfg=CFG, tokenizer=Letters())


@functools.cache
def texts():
    """The prompts, and one in which successors often follow."""
    rng, (_, successor) = np.random.default_rng(5), tiny.weights(tiny.CFG)
    text = [3]
    for _ in range(600):
        text.append(int(successor[text[-1]]) if rng.random() < 0.6 else int(rng.integers(tiny.CFG.V)))
    return (*tiny.prompts(), tuple(text))


@functools.cache
def tables():
    return NGrams.of(texts())


@functools.cache
def read():
    light = Model(tiny.params(tiny.CFG, "float64"), tiny.CFG)
    return light, *prefill(light, PROMPT)


def wanted(how: Superposed, policy, eos=()):
    light, seen, logits = read()
    cache = Cache(light, seen) if policy is FULL else H2O(light, seen, 24, 8, 4)
    return oracle.suggested(
        light, cache, logits, PROMPT, texts(), k=how.drafts, top=how.ranked, alpha=how.alpha, weights=how.weights,
        temperature=how.temperature, penalty=how.penalty, new=NEW, eos=eos,
    )  # fmt: skip


def agree(found, expected):
    assert [s.tokens for s in found] == [tokens for tokens, _ in expected]
    np.testing.assert_allclose([s.score for s in found], [score for _, score in expected], rtol=2e-5)
    assert all(s.text == Letters().decode(s.tokens) for s in found)


CASES = [Superposed(), Superposed(alpha=0.9, temperature=2.0), Superposed(temperature=1.5, penalty=3.0, weights=(0, 0, 0.5, 0.5)),
         Superposed(alpha=0.0, temperature=1.0)]  # fmt: skip


@pytest.mark.parametrize("how", CASES, ids=["released", "n-grams first", "mostly unseen", "none"])
@pytest.mark.parametrize("policy", [FULL, EVICTS], ids=["full", "h2o"])
def test_drafts_and_scores_are_those_of_the_paper(policy, how):
    found = suggest(small(), PROMPT, how, new=NEW, ngrams=tables(), kv=policy, stop=False)
    agree(found, wanted(how, policy))
    assert len(set(found)) == 3 and {len(s.tokens) for s in found} == {NEW}


def test_drafts_that_end_are_kept_as_they_are():
    how = CASES[1]
    found = suggest(small(), PROMPT, how, new=NEW, ngrams=tables())
    agree(found, wanted(how, FULL, (EOS,)))
    ended = [s for s in found if EOS in s.tokens]
    assert 0 < len(ended) < 3 and all(s.tokens.index(EOS) == len(s.tokens) - 1 < NEW - 1 for s in ended)


@pytest.mark.parametrize("policy", [FULL, EVICTS], ids=["full", "h2o"])
def test_one_draft_without_ngrams_is_greedy_decoding(policy):
    (found,) = suggest(small(), PROMPT, Superposed(1, alpha=0.0), new=tiny.NEW, kv=policy, stop=False)
    assert list(found.tokens) == plain(policy)[1]


def test_shares_are_those_of_counting():
    few = [list(text[:40]) for text in texts()] + [[], [7], [1, 2] * 5]
    found, tokens = NGrams.of(few, 4), np.arange(tiny.CFG.V)
    for n in (1, 2, 3):
        for before in [few[0][5 : 5 + n], few[0][-n:], [*few[0][-1:], *few[1][: n - 1]], [1, 2, 1][:n], [60] * n]:
            counted = [max(oracle.share(few, before, t), 0) for t in tokens]
            np.testing.assert_allclose(found.share(before, tokens), counted, atol=1e-12)
    assert found.share([1, 2, 1], np.array([2])) == 1 and NGrams.of([]).share([1], tokens).sum() == 0


def test_tables_are_the_prompts_and_the_books_where_none_are_given():
    from tokeff.data import sources

    text, tok = "she was not unhappy", Letters()
    own = NGrams.of([tok.encode(text), tok.encode(sources.text(sources.CALIBRATION))])
    found = suggest(small(), text, CASES[1], new=4, stop=False)
    assert found == suggest(small(), text, CASES[1], new=4, ngrams=own, stop=False) != suggest(small(), text, CASES[3], new=4, stop=False)


BAD = [
    lambda: Superposed(0), lambda: Superposed(3, top=3), lambda: Superposed(alpha=1.1), lambda: Superposed(temperature=0.0),
    lambda: Superposed(penalty=-1.0), lambda: Superposed(weights=()), lambda: Superposed(weights=(0.0,)),
    lambda: suggest(small(), PROMPT, 3), lambda: suggest(small(), ["a", "b"]), lambda: suggest(small(), ""),
    lambda: suggest(small(), PROMPT, new=0), lambda: suggest(small(), PROMPT, Superposed(30)), lambda: suggest(small(), [99]),
    lambda: suggest(small(), PROMPT, ngrams=texts()), lambda: suggest(small(), PROMPT, ngrams=NGrams.of(texts(), 3)),
    lambda: suggest(model(), PROMPT), lambda: NGrams.of(["text"]), lambda: NGrams.of([[1.5]]), lambda: NGrams.of([[-1]]),
    lambda: NGrams.of(texts(), 1),
]  # fmt: skip


@pytest.mark.parametrize("do", BAD)
def test_bad_input_is_refused_in_one_line(do):
    with pytest.raises(UserError) as error:
        do()
    assert "\n" not in str(error.value)
