"""How many tokens one pass commits, and how much of the network a token takes."""

from typing import TYPE_CHECKING, Any

from tokeff.decode.lossy import Rapid, Typical
from tokeff.decode.methods import (
    aded,
    draft_model,
    dynamic_exit,
    early_exit,
    equal_growth,
    ffn_skipllm,
    lookahead_decoding,
    lookahead_trie,
    paced,
    pearl,
    plain,
    prompt_lookup,
    r2r,
    rapid,
    skip_decode,
    spectr,
    swift,
    token_recycling,
)
from tokeff.decode.revive import revived
from tokeff.decode.rule import Coupled
from tokeff.decode.rules import ChainRejection, DeterministicTree, KSeq, Recursive
from tokeff.decode.shape import best_tree, measured_cost, rates
from tokeff.decode.swift import find_skips

if TYPE_CHECKING:
    from tokeff.decode.superposed import suggest

__all__ = [
    "ChainRejection",
    "Coupled",
    "DeterministicTree",
    "KSeq",
    "Rapid",
    "Recursive",
    "Typical",
    "aded",
    "best_tree",
    "draft_model",
    "dynamic_exit",
    "early_exit",
    "equal_growth",
    "ffn_skipllm",
    "find_skips",
    "lookahead_decoding",
    "lookahead_trie",
    "measured_cost",
    "paced",
    "pearl",
    "plain",
    "prompt_lookup",
    "r2r",
    "rapid",
    "rates",
    "revived",
    "skip_decode",
    "spectr",
    "suggest",
    "swift",
    "token_recycling",
]


def __getattr__(name: str) -> Any:
    """`suggest` generates text, and what generates text imports this package."""
    if name == "suggest":
        from tokeff.decode.superposed import suggest

        return suggest
    raise AttributeError(f"module 'tokeff.decode' has no attribute {name!r}")
