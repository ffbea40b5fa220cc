"""Cut real text to an exact number of tokens, with sentences inserted at chosen depths, and what comes after it.

Tokenizers enter as a function `encode(text) -> list[int]` without special tokens. Token counts of pieces are only used
to guess; the result is measured by encoding it whole, so any tokenizer gives contexts of exactly the asked length.
"""

import bisect
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tokeff.data import sources
from tokeff.errors import UserError

Encode = Callable[[str], list[int]]
Part = tuple[str, int]
"""A part of a context, and its number among the inserts; -1 for text of the source."""

LEAST_PROSE = 16
"""Tokens of text there must be room for beside the inserted sentences."""
_TRIES = 200


@dataclasses.dataclass(frozen=True)
class Insert:
    """A sentence to hide: `text` (starts with its own white space) at `depth` in [0, 1] of the context's tokens."""

    depth: float
    text: str


@dataclasses.dataclass(frozen=True)
class Haystack:
    """Text of an exact length.

    context: `length` tokens. It starts inside a sentence and ends at the end of one.
    held_out: how the text goes on, exactly as many tokens as asked when encoded by itself; starts with its white space.
    spans: (start, end) of each insert in tokens of `encode(context)`, in the order the inserts were given.
    repeats: how often the source text was laid end to end to be long enough; 1 = no repetition.
    """

    context: str
    held_out: str
    spans: tuple[tuple[int, int], ...]
    repeats: int


@functools.lru_cache(maxsize=8)
def encoder(tokenizer: Any) -> Encode:
    """Return `encode` of a tokeff Tokenizer (special tokens left out); a function is returned as it is.

    The same tokenizer always gives the same function, so that token counts of the sources are remembered.
    """
    return tokenizer if callable(tokenizer) else functools.partial(tokenizer.encode, special=False)  # type: ignore[return-value]


def build(
    rng: np.random.Generator,
    length: int,
    encode: Encode,
    inserts: Sequence[Insert] = (),
    source: str = sources.PROSE,
    held_out: int = 128,
    repeat: bool = True,
) -> Haystack:
    """Cut `source` at a random place to `length` tokens with `inserts` in it.

    rng: chooses where in the source the context ends.
    length, held_out: tokens of the context and of the continuation (0: none).
    repeat: whether a source that is too short may be repeated, as RULER does with its essays.
    An insert goes to the piece boundary nearest to its depth, so depths are exact to about half a sentence.
    Raises UserError when the length has no room for the inserts, or the source is too short and may not repeat.
    """
    taken = sum(len(encode(insert.text)) for insert in inserts)
    if length < taken + LEAST_PROSE:
        raise UserError(f"{length} tokens are too short for this task; use a length of at least {taken + LEAST_PROSE}")
    pieces, ends, repeats = _enough(source, encode, length - taken + held_out, repeat)
    first, last = _range_of_ends(ends, length - taken, held_out)
    chosen = int(rng.integers(first, last + 1))
    for attempt in range(_TRIES):
        end = first + (chosen - first + attempt) % (last + 1 - first)
        parts = _fit(pieces, ends, end, length, taken, encode, inserts)
        after = prefix("".join(pieces[end : _last_piece(ends, end, held_out)]), held_out, encode)
        if parts is not None and after is not None:
            return Haystack(_join(parts), after, _spans(parts, encode), repeats)
    raise UserError(f"no cut of {source!r} has exactly {length} tokens; use a length a little larger or smaller")


def prefix(text: str, n: int, encode: Encode) -> str | None:
    """Return the start of `text` that has exactly `n` tokens, cut at a word where possible, inside one otherwise.

    Returns None where the tokenizer has no such cut: one more character may change the tokens by two.
    """
    words = re.findall(r"\s*\S+", text)
    sizes = list(itertools.accumulate((len(encode(word)) for word in words), initial=0))
    guess = bisect.bisect_left(sizes, n)
    near = sorted(range(max(guess - 4, 0), min(guess + 5, len(sizes))), key=lambda k: abs(k - guess))
    cuts = ["".join(words[:k]) for k in near]
    longest = max(cuts, key=len)
    for cut in itertools.chain(cuts, (longest[:end] for end in range(len(longest), 0, -1))):
        if len(encode(cut)) == n:
            return cut
    return None


def passages(source: str, length: int, encode: Encode) -> Iterator[str]:
    """Yield a source as passages that follow one another, each of at most `length` tokens.

    A passage ends where a sentence or line ends; one that is longer than `length` by itself is left out.
    """
    pieces, start = sources.pieces(source), 0
    ends = _ends(source, encode)
    while start < len(pieces):
        end = max(bisect.bisect_right(ends, ends[start] + length) - 1, start + 1)
        while end > start and len(encode("".join(pieces[start:end]).lstrip())) > length:
            end -= 1
        if end > start:
            yield "".join(pieces[start:end]).lstrip()
        start = max(end, start + 1)


@functools.lru_cache(maxsize=8)
def _ends(source: str, encode: Encode) -> tuple[int, ...]:
    """Return the cumulative token counts of a source's pieces: entry i is the end of piece i - 1, entry 0 is 0."""
    return tuple(itertools.accumulate((len(encode(piece)) for piece in sources.pieces(source)), initial=0))


def _enough(source: str, encode: Encode, need: int, repeat: bool) -> tuple[Sequence[str], Sequence[int], int]:
    """Return pieces and their ends with room for `need` tokens, repeating the source if it is too short."""
    pieces, ends = sources.pieces(source), _ends(source, encode)
    slack = 2 * max(b - a for a, b in itertools.pairwise(ends))  # a context may overshoot by a piece before it is cut
    if ends[-1] >= need + slack:
        return pieces, ends, 1
    if not repeat:
        fix = "use a shorter length, or your own longer .txt file as the source"
        raise UserError(f"{source!r} has {ends[-1]} tokens and {need + slack} are needed; {fix}")
    repeats = -(-(need + slack) // ends[-1])
    longer = [ends[-1] * turn + end for turn in range(repeats) for end in ends[1:]]
    return pieces * repeats, (0, *longer), repeats


def _range_of_ends(ends: Sequence[int], prose: int, held_out: int) -> tuple[int, int]:
    """Return the first and last piece number a context may end before: enough text before it and after it."""
    first = bisect.bisect_left(ends, prose + 1)
    last = bisect.bisect_right(ends, ends[-1] - held_out - 1) - 1 if held_out else len(ends) - 1
    return first, max(first, last)


def _last_piece(ends: Sequence[int], end: int, held_out: int) -> int:
    """Return the piece number before which a continuation from piece `end` surely has `held_out` tokens."""
    return min(bisect.bisect_left(ends, ends[end] + 2 * held_out + 8), len(ends) - 1) if held_out else end


def _fit(
    pieces: Sequence[str],
    ends: Sequence[int],
    end: int,
    length: int,
    taken: int,
    encode: Encode,
    inserts: Sequence[Insert],
) -> list[Part] | None:
    """Return the parts of a context of exactly `length` tokens that ends before piece `end`, or None.

    Whole pieces are taken until there are enough tokens; then words are dropped from the front of the first one.
    """
    start = bisect.bisect_right(ends, ends[end] - (length - taken)) - 1
    if start < 0:
        return None
    words = re.findall(r"\s*\S+", pieces[start])
    sizes = list(itertools.accumulate((len(encode(word)) for word in words), initial=0))
    guess = bisect.bisect_left(sizes, ends[end] - ends[start] + taken - length)
    for drop in sorted(range(max(guess - 2, 0), min(guess + 3, len(words))), key=lambda k: abs(k - guess)):
        counts = [sizes[-1] - sizes[drop], *(b - a for a, b in itertools.pairwise(ends[start + 1 : end + 1]))]
        parts = _place(["".join(words[drop:]), *pieces[start + 1 : end]], counts, length, encode, inserts)
        if len(encode(_join(parts))) == length:
            return parts
    return None


def _place(texts: list[str], counts: list[int], length: int, encode: Encode, inserts: Sequence[Insert]) -> list[Part]:
    """Return the texts with each insert at the boundary where its first token is nearest to depth x length."""
    ends = list(itertools.accumulate(counts, initial=0))
    parts, done, taken = [], 0, 0
    for number in sorted(range(len(inserts)), key=lambda i: inserts[i].depth):
        goal = inserts[number].depth * length - taken
        at = min(range(done, len(ends)), key=lambda i: abs(ends[i] - goal))
        parts.extend((text, -1) for text in texts[done:at])
        parts.append((inserts[number].text, number))
        done, taken = at, taken + len(encode(inserts[number].text))
    return parts + [(text, -1) for text in texts[done:]]


def _join(parts: list[Part]) -> str:
    """Return the context that the parts make."""
    return "".join(text for text, _ in parts).lstrip()


def _spans(parts: list[Part], encode: Encode) -> tuple[tuple[int, int], ...]:
    """Return (start, end) in tokens of every insert, in the order the inserts were given."""
    spans, before = {}, ""
    for text, number in parts:
        after = (before + text).lstrip()
        if number >= 0:
            spans[number] = (len(encode(before)), len(encode(after)))
        before = after
    return tuple(spans[number] for number in sorted(spans))
