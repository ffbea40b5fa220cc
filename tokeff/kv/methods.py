"""Published KV-cache methods, each one expression over the parts of this folder.

`budget` is the share (float) or number (int) of prompt rows kept per kv head. Constants are the `scaled` setting: the paper's
numbers as shares of the context they were published for, which is what a 2k prompt on a small model can be measured with.
"""

from __future__ import annotations

from tokeff.kv.budget import Budget, Spread
from tokeff.kv.keep import Keep
from tokeff.kv.policy import Full
from tokeff.kv.pool import KeepByHead
from tokeff.kv.score import Chance, Mass, Recency, WindowMass
from tokeff.kv.shadow import ShadowKV
from tokeff.kv.streaming import Streaming


def full() -> Full:
    """Every row kept, every row read: the baseline that `held` and `read` are ratios to."""
    return Full()


def random_rows(budget: Budget = 0.125, seed: int = 0) -> Keep:
    """Baseline: a random set of prompt rows per layer and head."""
    return Keep(budget, Chance(seed))


def recent_rows(budget: Budget = 0.125) -> Keep:
    """Baseline: only the end of the prompt."""
    return Keep(budget, Recency())


def streaming_llm(budget: Budget = 0.125, sinks: int = 4, evict: int = 1) -> Streaming:
    """StreamingLLM (Xiao et al. 2024): attention sinks and recent rows, positions counted inside the cache."""
    return Streaming(budget, Recency(), sinks=sinks, evict=evict)


def h2o(budget: Budget = 0.125, recent: float = 0.5, evict: int = 1) -> Keep:
    """H2O (Zhang et al. 2023): half heavy hitters by accumulated attention, half recent; evicts throughout decoding."""
    return Keep(budget, Mass(), recent=recent, evict=evict)


def snapkv(budget: Budget = 0.125, window: int = 16, kernel: int = 5, pool: str = "avg") -> Keep:
    """SnapKV (Li et al. 2024): what the last `window` queries look at, pooled; the window itself is always kept."""
    return Keep(budget, WindowMass(window, kernel, pool), recent=window)


def adakv(budget: Budget = 0.125, window: int = 16, kernel: int = 7, pool: str = "max", floor: float = 0.2, page: int = 16) -> KeepByHead:
    """AdaKV on SnapKV scores (Feng et al. 2024): the layer's budget goes where the scores are, whatever the head."""
    return KeepByHead(snapkv(budget, window, kernel, pool), Spread(floor), page)


def shadowkv(budget: Budget = 0.125, rank: float = 0.156) -> ShadowKV:
    """ShadowKV (Sun et al. 2024): low-rank keys, chunks chosen by landmarks. `budget` is what a query reads."""
    return ShadowKV(budget, rank)
