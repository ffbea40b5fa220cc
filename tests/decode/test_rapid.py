"""RAPID's drafter: what it retrieves, that its drafts are those of the short text, and that eta=0 changes nothing."""

import sys
from math import ceil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from driven import SHORT, T, model, plain, start
from oracles.float64 import float64_model
from oracles.retrieving import bm25

from tokeff.decode import methods
from tokeff.decode.draft import Target
from tokeff.decode.loop import verify
from tokeff.decode.retrieval import RetrievedDraft
from tokeff.decode.rules import ChainRejection
from tokeff.decode.sample import Sampling, log_law
from tokeff.errors import UserError
from tokeff.kv import methods as kv
from tokeff.kv.budget import AtLeast

pytestmark = [pytest.mark.core, pytest.mark.xdist_group("draft-model")]
FULL = kv.full()
PARTS = {"chunk": 8, "budget": 0.25, "head": 4, "question": 8}
RAPID = methods.rapid(tiny.CFG, 4, 0.0, **PARTS)


@pytest.fixture(autouse=True, scope="module")
def double():
    with float64_model():
        yield


def itself():
    return model(draft=tiny.params(tiny.CFG, "float64"))


def random_text(n: int, V: int = 30) -> np.ndarray:
    return np.random.default_rng(n).integers(0, V, n)


# -- what is retrieved


@pytest.mark.parametrize(("n", "budget"), [(203, 0.2), (61, 17), (400, AtLeast(0.1, 64))])
def test_chunks_are_the_best_by_bm25(n, budget):
    text, drafter = random_text(n), RetrievedDraft(tiny.CFG, **PARTS | {"budget": budget})
    places, rows = drafter.places(text).tolist(), {203: 41, 61: 17, 400: 64}[n]
    assert places == sorted(set(places)) and places[:4] == [0, 1, 2, 3] and places[-8:] == list(range(n - 8, n))
    chunks = [range(a, min(a + 8, n - 8)) for a in range(4, n - 8, 8)]
    taken = [set(chunk) <= set(places) for chunk in chunks]
    assert sum(taken) == ceil(rows / 8) and len(places) == 12 + sum(len(c) for c, is_in in zip(chunks, taken) if is_in)
    score = bm25([text[list(chunk)].tolist() for chunk in chunks], text[-8:].tolist())
    kept, left = ([s for s, is_in in zip(score, taken) if is_in is which] for which in (True, False))
    assert min(kept) >= max(left) - 1e-5 and max(kept) > min(left)


def test_what_the_question_names_is_found_and_of_equals_the_first():
    text, drafter = np.arange(400), RetrievedDraft(tiny.CFG, **PARTS | {"budget": 16})
    text[198:201] = text[-3:]
    assert drafter.places(text).tolist() == [*range(12), *range(196, 204), *range(392, 400)]
    assert drafter.places(np.arange(100)).tolist() == [*range(20), *range(92, 100)]


@pytest.mark.parametrize("n", [1, 8, 12, 20])
def test_a_short_prompt_is_read_whole(n):
    assert RetrievedDraft(tiny.CFG, **PARTS).places(random_text(n)).tolist() == list(range(n))


# -- what is drafted

HOW = Sampling((0.0, 1.5), top_k=9)  # the first sequence is greedy, the second sampled
LAW = jax.jit(log_law, static_argnums=1)


@jax.jit
def one(params, s):
    """One pass: (the draft, what came of it)."""
    draft, s = RAPID.draft(s, Target(params, tiny.CFG, FULL, HOW))
    return draft, verify(params, tiny.CFG, s, draft, FULL, RAPID, HOW, ())


def ended(s):
    while not s.done_B.all():
        _, s = one(itself().params, s)
    return s


def test_drafts_are_those_of_the_short_text():
    """Pass after pass, each draft's law is the model's behind what was retrieved and what is generated."""
    m, short = itself(), [np.array(row)[RAPID.places(np.array(row))].tolist() for row in tiny.prompts()]
    assert [len(row) for row in short] == [28, 28]
    s = start(FULL, RAPID, m, how=HOW)
    for _ in range(3):
        text, (draft, s) = tiny.text(s), one(m.params, s)
        for node in range(1, RAPID.nodes):
            before = np.asarray(draft.tokens_BW)[:, 1:node].tolist()
            rows = tuple((*a, *b, *c) for a, b, c in zip(short, text, before, strict=True))
            law = np.exp(LAW(tiny.read(FULL, rows, dtype="float64", T=T).logits_BV[:, None], HOW))[:, 0]
            np.testing.assert_allclose(np.exp(np.asarray(draft.logq_BWV)[:, node]), law, atol=1e-5)
    assert s.made_B.sum() > 2 + 2 * 3  # some were accepted


@pytest.mark.parametrize("rows", [None, SHORT], ids=["long", "one token"])
def test_at_eta_zero_greedy_text_is_that_of_plain_decoding(rows):
    s = ended(start(FULL, RAPID, itself(), rows, how=HOW))
    assert tiny.text(s)[0] == plain(FULL, rows)[0] and s.passes_B[0] < tiny.NEW - 1


def test_a_draft_that_reads_all_is_always_right():
    whole, (tokens, length) = methods.rapid(tiny.CFG, 4, 0.0, **PARTS | {"budget": 1.0}), tiny.padded(tiny.prompts(), T)
    state = whole.prepare(itself(), tokens, length, tiny.NEW)
    s = ended(start(FULL, RAPID, itself(), how=HOW).replace(drafter=state))
    assert not state.gone_B.any() and s.passes_B.tolist() == [ceil((tiny.NEW - 1) / 5)] * 2


def test_what_is_lossless():
    assert RAPID.lossless and not RAPID.rule.same and isinstance(RAPID.rule, ChainRejection)
    assert not methods.rapid(tiny.CFG).lossless and RetrievedDraft(tiny.CFG).lossless


# -- what is refused


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(UserError, match="pip install bm25s"):
        RAPID.check(itself())


@pytest.mark.parametrize(
    "bad", [{"chunk": 0}, {"head": -1}, {"question": 0}, {"budget": 0}, {"budget": 1.5}, {"budget": True}, {"eta": -1.0}]
)
def test_bad_settings_are_refused_in_one_line(bad):
    with pytest.raises(UserError) as error:
        methods.rapid(tiny.CFG, **bad)
    assert "\n" not in str(error.value)


def test_a_prompt_too_long_for_the_draft_model_is_refused():
    with pytest.raises(UserError, match="shorten them"):
        RAPID.prepare(itself(), jnp.zeros((1, 300), jnp.int32), jnp.array([300]), 230)
    RAPID.check(itself())
