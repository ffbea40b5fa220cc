"""Published ways to commit more than one token a pass."""

from __future__ import annotations

from tokeff.decode.draft import Plain
from tokeff.decode.lookup import PromptLookup
from tokeff.decode.recycling import TREE_16, TokenRecycling


def plain() -> Plain:
    """One token a pass."""
    return Plain()


def prompt_lookup(length: int = 10, ngram: int = 3, latest: bool = False) -> PromptLookup:
    """Prompt lookup decoding (Saxena 2023): copy what followed the last n-gram before."""
    return PromptLookup(length, ngram, latest)


def token_recycling(tree: tuple[tuple[int, ...], ...] = TREE_16, rank: int = 8) -> TokenRecycling:
    """Token Recycling (Luo et al. 2024): a static tree over each token's last seen successors."""
    return TokenRecycling(tree, rank)
