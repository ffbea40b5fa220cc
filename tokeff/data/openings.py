"""Beginnings for a model to continue, so that another one can be trained on what it writes. No evaluation reads any of them.

Four kinds, all short: `prose` (Persuasion, which only calibrations read), `code` (files of the standard library that are not those of the
evaluation), `chat` (a wording by a subject, both written for tokeff) and `passage` (a request about a sentence of Persuasion). What shares
`RUN` words in a row with a prompt or a text of the evaluation is left out; a test counts again.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tokeff.data import load_text, sources
from tokeff.errors import UserError, nearest

KINDS = ("prose", "code", "chat", "passage")
LONGEST = 64
"""Tokens of an opening, the chat template's included."""
RUN = 8
PASSAGE = 24  # tokens of a sentence that a request is about
TEXT = 56  # tokens of prose or code to continue
CHATS = (
    "What is {}?",
    "Tell me about {}.",
    "Explain {} to a beginner.",
    "Why does {} matter?",
    "Give me three facts about {}.",
    "Write a paragraph about {}.",
    "What are common mistakes people make with {}?",
    "Write a short dialogue between two friends about {}.",
    "How would you teach {} to a class of teenagers?",
    "List the most important words one needs to talk about {}.",
    "What is the history of {}?",
    "Ask me three questions about {} and answer them yourself.",
    "Write the first lines of a story that begins with {}.",
    "Compare {} with something similar.",
)
SUBJECTS = (
    "bread baking", "the moon", "chess", "bees", "electric cars", "the Roman Empire", "gravity", "jazz", "volcanoes", "public libraries",
    "knitting", "vaccines", "the stock market", "trees in cities", "recursion in programming", "the human heart", "coffee", "deserts",
    "sorting algorithms", "penguins", "democracy", "the guitar", "glaciers", "running a marathon", "the number zero", "black holes",
    "cheese", "maps", "learning a language", "honest advertising", "bridges", "the printing press", "dogs", "solar panels", "tea",
    "unit tests", "rivers", "money", "the violin", "earthquakes", "a garden of herbs", "databases", "fog", "sailing boats",
)  # fmt: skip
REQUESTS = (
    "Rewrite in simple modern English: {}",
    "{}\n\nWho is this sentence about, and what do we learn?",
    "Put this in your own words: {}",
    "{}\n\nContinue this in the same style.",
    "Correct the spelling if needed: {}",
    "{}\n\nSay the same in fewer words.",
)


def openings(kind: str, tokenizer: Any, seed: int = 0) -> list[list[int]]:
    """Token ids of all openings of a kind, in an order that the seed decides. Raises UserError for an unknown kind."""
    if kind not in KINDS:
        raise UserError(f"no kind of opening {kind!r}; {nearest(kind, KINDS)}")
    seen, template = _evaluated(), _template(tokenizer)
    texts = [text for text in _TEXTS[kind](tokenizer) if not runs(text, RUN) & seen]
    said = texts if kind in ("prose", "code") else [template.replace(_SLOT, text) for text in texts]
    ids = [row for row in map(tokenizer.encode, said) if len(row) <= LONGEST]
    return [ids[i] for i in np.random.default_rng(seed).permutation(len(ids))]


def runs(text: str, n: int) -> set[tuple[str, ...]]:
    """Every n words of a text that stand in a row."""
    words = text.split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def _chats(tokenizer: Any) -> Iterator[str]:
    return (wording.format(subject) for wording in CHATS for subject in SUBJECTS)


def _passages(tokenizer: Any) -> Iterator[str]:
    for i, text in enumerate(_read(sources.CALIBRATION, PASSAGE, tokenizer)):
        yield REQUESTS[i % len(REQUESTS)].replace("{}", text)


def _read(source: str, length: int, tokenizer: Any) -> list[str]:
    data = load_text(source, length, tokenizer)
    return [str(data[i]) for i in range(len(data))]


_TEXTS = {
    "prose": lambda tokenizer: _read(sources.CALIBRATION, TEXT, tokenizer),
    "code": lambda tokenizer: _read(sources.TRAINING_CODE, TEXT, tokenizer),
    "chat": _chats,
    "passage": _passages,
}
_SLOT = "THE USER'S WORDS"


def _template(tokenizer: Any) -> str:
    """The chat template around `_SLOT`, rendered once for all."""
    return tokenizer.chat([{"role": "user", "content": _SLOT}])


@functools.cache
def _evaluated() -> frozenset[tuple[str, ...]]:
    """The runs of words in what evaluations read."""
    texts: Sequence[str] = (sources.text(sources.PROSE), sources.text(sources.CODE), *(prompt.text for prompt in sources.prompts()))
    return frozenset().union(*(runs(text, RUN) for text in texts))
