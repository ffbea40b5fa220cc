"""How many tokens one pass commits."""

from tokeff.decode.methods import plain, prompt_lookup, token_recycling

__all__ = ["plain", "prompt_lookup", "token_recycling"]
