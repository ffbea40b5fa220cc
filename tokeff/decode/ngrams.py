"""How often tokens followed others in given texts: n-grams as sorted arrays in host memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokeff.errors import UserError

TOKEN = 32  # bits of a key that hold the last token; those above them number what stands before it


@dataclass(frozen=True, eq=False)
class NGrams:
    """The n-grams of some texts, n = 2 to `longest`, none across two texts.

    key_S of each n: its n-grams in ascending order, as (number of the first n - 1 tokens, last token); a token's number is itself, a longer
    one's its place in the arrays before. upto_S: how many n-grams stand before each, repeats counted; one entry more.
    """

    key_S: tuple[np.ndarray, ...]
    upto_S: tuple[np.ndarray, ...]

    @property
    def longest(self) -> int:
        return 1 + len(self.key_S)

    @staticmethod
    def of(texts: Sequence[Sequence[int]], longest: int = 6) -> NGrams:
        """Of texts as token ids; some tenths of a second for a book. UserError for what is no such text."""
        if longest < 2:
            raise UserError(f"longest={longest} leaves no n-grams; give at least 2")
        rows = [ids_of(text) for text in texts]
        token_S = np.concatenate([np.zeros(0, np.int64), *rows])
        which_S = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        at, number, keys, upto = np.arange(len(token_S)), token_S, [], []
        for n in range(2, longest + 1):
            inside = at + n - 1 < len(token_S)
            inside[inside] = which_S[at[inside]] == which_S[at[inside] + n - 1]
            at, number = at[inside], number[inside]
            key, number, count = np.unique(number << TOKEN | token_S[at + n - 1], return_inverse=True, return_counts=True)
            keys.append(key)
            upto.append(np.concatenate([np.zeros(1, np.int64), np.cumsum(count)]))
        return NGrams(tuple(keys), tuple(upto))

    def share(self, before: Sequence[int], token_M: np.ndarray) -> np.ndarray:
        """share_M of what followed `before` (1 to longest - 1 tokens) in the texts, for each token; 0 where it never stood there."""
        number, nothing = int(before[0]), np.zeros(len(token_M))
        for token, key_S in zip(before[1:], self.key_S):
            key = number << TOKEN | int(token)
            number = int(np.searchsorted(key_S, key))
            if number == len(key_S) or key_S[number] != key:
                return nothing
        key_S, upto_S = (x[len(before) - 1] for x in (self.key_S, self.upto_S))
        first, last = np.searchsorted(key_S, [number << TOKEN, (number + 1) << TOKEN])
        if first == last:
            return nothing
        wanted = number << TOKEN | np.asarray(token_M, np.int64)
        at = np.minimum(np.searchsorted(key_S, wanted), len(key_S) - 1)
        return np.where(key_S[at] == wanted, upto_S[at + 1] - upto_S[at], 0) / (upto_S[last] - upto_S[first])


def ids_of(text: Sequence[int]) -> np.ndarray:
    """The ids of one text; UserError for a string, floats, or ids below 0."""
    row = np.asarray(text)
    if row.ndim != 1 or (len(row) and (row.dtype.kind not in "iu" or row.min() < 0 or row.max() >= 1 << 31)):
        raise UserError("n-grams are counted in texts as lists of token ids, such as [m.tok.encode(text)]; encode them first")
    return row.astype(np.int64)
