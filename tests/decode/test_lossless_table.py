"""Every lossless drafter against plain decoding, strictly, in float64: its text, and all that ends an accepted span early."""

import pytest
import tiny
from driven import SHORT, decode, ended, ending, limited, plain, settled_is_fresh
from every import LISTED, LOSSLESS, attached, listed
from oracles.float64 import float64_model

from tokeff.kv import methods as kv

pytestmark = pytest.mark.core
FULL, H2O = kv.full(), kv.h2o(0.5, evict=4)
# Daily runs what no file of a drafter's own shows; `make proofs` runs the whole table.
NEW_HERE = ("SmartSpec", "DEL", "PEARL")


@pytest.fixture(autouse=True, scope="module")
def double():
    with float64_model():
        yield


def table(*daily: str) -> list:
    """Test parameters: one worker runs all tests of a drafter, which share its programs."""
    return tiny.sampled([pytest.param(name, marks=pytest.mark.xdist_group(f"table {name}")) for name in LOSSLESS], daily)


def test_no_listed_drafter_is_missing():
    assert listed() == set(LISTED) and listed(lossless=True) <= set(LOSSLESS)
    assert not listed(lossless=False) & set(LOSSLESS)


@pytest.mark.parametrize("name", table("SmartSpec", "DEL", "SpecTr"))
def test_text_is_that_of_plain_decoding(name):
    """Ragged batch; under rules that draw anew, since greedy text is plain decoding's there too."""
    s = decode(FULL, LOSSLESS[name], attached())
    assert tiny.text(s) == plain(FULL)
    assert int(s.passes_B.min()) < tiny.NEW - 1, "no draft was ever accepted, so nothing was tested"


@pytest.mark.parametrize("name", table())
def test_text_under_eviction(name):
    """At boundaries that drafts run into, where plain decoding evicts at the same ones."""
    s = decode(H2O, LOSSLESS[name], attached())
    assert tiny.text(s) == plain(H2O) and int(s.passes_B.min()) < tiny.NEW - 1


@pytest.mark.parametrize("name", table(*NEW_HERE))
def test_end_of_sequence_inside_an_accepted_span(name):
    drafter, m = LOSSLESS[name], attached()
    eos = ending(FULL, drafter, m)
    s = decode(FULL, drafter, m, eos=(eos,))
    assert tiny.text(s) == ended(plain(FULL), eos) != plain(FULL)
    assert s.done_B.all()


@pytest.mark.parametrize("name", table(*NEW_HERE))
def test_length_limits_of_rows(name):
    """Of each row its own, inside accepted spans and at their ends."""
    for limits in ((2, 7), (6, 3), (4, 5), (8, tiny.NEW)):
        assert limited(FULL, LOSSLESS[name], limits, attached()) == [row[:n] for row, n in zip(plain(FULL), limits, strict=True)]


@pytest.mark.parametrize("name", table(*NEW_HERE))
def test_prompt_of_one_token(name):
    s = decode(FULL, LOSSLESS[name], attached(), SHORT)
    assert tiny.text(s) == plain(FULL, SHORT) and int(s.passes_B.min()) < tiny.NEW - 1


@pytest.mark.parametrize("name", table("DEL"))
def test_what_lies_in_the_cache_is_what_a_fresh_prefill_puts_there(name):
    """Of accepted drafts, and of no others, wherever they stood in their draft."""
    rows, m = ((5,), tiny.prompts()[1][:30]), attached()
    settled_is_fresh(decode(FULL, LOSSLESS[name], m, rows), rows, m)
