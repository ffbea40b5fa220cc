"""Prompts made shorter before the model reads them: self-information, stop words, and words that enter as one row."""

from functools import cache

import numpy as np
import pytest
import tiny
import tokenizers
from oracles import model as oracle

from tokeff.errors import UserError
from tokeff.kv.prefill import prefill
from tokeff.models.config import Precision
from tokeff.models.flow import EMPTY
from tokeff.models.load import Model
from tokeff.models.tokenizer import Tokenizer
from tokeff.reduce.prompts import STOP_WORDS, information, merged_words, selective_context, without_stop_words, words

pytestmark = [pytest.mark.core, pytest.mark.xdist_group("prompts")]
PROMPT = tiny.prompts()[0][:40]
PIECES = ["▁the", "▁count", "er", "_", "of", "▁a", "nd", "▁and", "▁is", "(", ")", "▁get", "Item", "▁theory", "▁The", ".", "s"]


@cache
def tok() -> Tokenizer:
    """Words in pieces that begin with a mark where a space stands, as sentencepiece writes them."""
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({p: i for i, p in enumerate(PIECES)}, unk_token="."))
    raw.decoder = tokenizers.decoders.Metaspace()
    return Tokenizer(raw, tiny.CFG.V)


def ids(*some: str) -> list[int]:
    return [PIECES.index(p) for p in some]


def model() -> Model:
    return Model(tiny.CFG, tiny.params(), tok(), Precision(), "tiny")


def test_self_information_equals_the_naive_forward():
    said = information(model(), PROMPT)
    naive = oracle.Model(tiny.params(), tiny.CFG)
    assert said[0] == np.inf and len(said) == 40
    for t in (1, 2, 17, 39):
        _, logits = oracle.prefill(naive, PROMPT[:t])
        known = np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[PROMPT[t]]
        np.testing.assert_allclose(said[t], known, atol=1e-3)


def test_what_says_most_stays_in_order():
    """As many tokens as the share says, the most surprising ones, the first among them; the end stays whatever it says."""
    said = information(model(), PROMPT)
    kept = selective_context(model(), PROMPT, 0.25)
    assert kept == [t for t, s in zip(PROMPT, said, strict=True) if s >= np.sort(said)[30]]
    assert len(kept) in (10, 11) and selective_context(model(), PROMPT, 1.0) == list(PROMPT)
    assert selective_context(model(), PROMPT, 0.25, last=8)[-8:] == list(PROMPT[-8:])
    assert selective_context(model(), PROMPT, 0.25, nats=said) == kept
    assert selective_context(model(), PROMPT, 0.25, last=41, nats=said) == list(PROMPT)


def test_units_stay_or_go_whole():
    nats = np.asarray([9.0, 1.0, 5.0, 5.0, 2.0, 0.0])
    assert selective_context(model(), [10, 11, 12, 13, 14, 15], 0.5, units=[0, 0, 1, 1, 2, 2], nats=nats) == [10, 11, 12, 13]
    assert selective_context(model(), [10, 11, 12, 13, 14, 15], 0.3, units=[0, 0, 1, 2, 2, 2], nats=nats) == [10, 11, 12]


def test_words_are_what_letters_hold_together():
    text = ids("▁the", "▁count", "er", "_", "of", "▁a", "nd", "▁is", "(", ")", "▁get", "Item", "s", ".")
    assert tok().decode(text) == "the counter_of and is() getItems."
    assert words(tok(), text) == [0, 1, 1, 1, 1, 2, 2, 3, 4, 5, 6, 6, 6, 7]


def test_stop_words_go_where_they_are_whole_words():
    text = ids("▁The", "▁theory", "▁a", "nd", "▁and", "▁count", "er", "▁is", "▁the", ".")
    left = without_stop_words(tok(), text)
    assert [PIECES[i] for i in left] == ["▁theory", "▁count", "er", "."]
    assert without_stop_words(tok(), text, last=3)[-3:] == text[-3:]
    assert without_stop_words(tok(), text, frozenset()) == text
    assert all(word == word.lower().strip() for word in STOP_WORDS) and 100 < len(STOP_WORDS) < 200


def test_a_word_enters_as_the_mean_of_its_pieces():
    """At the place of its last piece; the model then reads what it reads from such rows without those between."""
    m, rows = model(), [ids("▁get", "Item", "s", "(", "▁count", "er", ")"), ids("▁the", "▁theory", "s")]
    tokens, length, embeds = merged_words(m, rows)
    assert length.tolist() == [7, 3] and tokens[0, :7].tolist() == rows[0]
    assert [[p for p in row if p != EMPTY] for row in embeds.place_BM.tolist()] == [[2, 3, 5, 6], [0, 2]]
    table = np.asarray(m.params.embed_VD, np.float64)
    mean = [table[rows[0][:3]].mean(axis=0), table[rows[0][3]], table[rows[0][4:6]].mean(axis=0), table[rows[0][6]]]
    np.testing.assert_allclose(embeds.x_BMD[0, :4], mean, atol=1e-6)
    prompt = prefill(m.params, m.cfg, tokens, length, embeds=embeds)
    assert prompt.layers[0].here_B.tolist() == [4, 2] and prompt.next_B.tolist() == [7, 3]
    assert np.isfinite(prompt.logits_BV).all()


def test_words_of_one_piece_change_nothing():
    m, tokens = model(), [list(PROMPT)]
    text, length, embeds = merged_words(m, tokens, [list(range(40))])
    got, known = (prefill(m.params, m.cfg, text, length, embeds=e) for e in (embeds, None))
    np.testing.assert_allclose(got.logits_BV, known.logits_BV, atol=1e-4)


def test_what_cannot_work_is_refused():
    for call in (
        lambda: information(model(), []), lambda: selective_context(model(), PROMPT, 0.0), lambda: selective_context(model(), PROMPT, 1.5),
        lambda: merged_words(model(), [[1, 2]], [[0]]), lambda: merged_words(model(), [[1, 2]], [[1, 0]]),
        lambda: merged_words(model(), [[]], [[]]), lambda: selective_context(model(), [1, 2], nats=np.ones(3)),
        lambda: selective_context(model(), [1, 2], nats=np.array([1, np.nan])),
        lambda: selective_context(model(), [1, 2], nats=np.ones(2), units=[0]),
    ):  # fmt: skip
        with pytest.raises(UserError) as error:
            call()
        assert "\n" not in str(error.value)
