"""What a layer keeps: cache policies, and the published methods made of them."""

from tokeff.kv.methods import adakv, full, h2o, random_rows, recent_rows, shadowkv, snapkv, streaming_llm

__all__ = ["adakv", "full", "h2o", "random_rows", "recent_rows", "shadowkv", "snapkv", "streaming_llm"]
