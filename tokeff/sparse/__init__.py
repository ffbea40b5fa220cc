"""What a query reads of a cache that keeps everything."""

from tokeff.sparse.methods import tidaldecode

__all__ = ["tidaldecode"]
