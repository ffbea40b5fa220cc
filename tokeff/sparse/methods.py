"""Published methods that keep everything and read little."""

from __future__ import annotations

from tokeff.kv.budget import Budget
from tokeff.sparse.select import Read, TopScores


def tidaldecode(budget: Budget = 0.125, dense: tuple[int, ...] = (0, 1), select: tuple[int, ...] = (2, 9), recent: int = 16) -> Read:
    """TidalDecode (Yang et al. 2024): two selecting layers choose rows by raw q.k, all others read what they chose.

    `recent` rows before each query are always read; the paper forces none. It makes drafts exact (see `Read`).
    """
    return Read(budget, TopScores(), dense, select, recent)
