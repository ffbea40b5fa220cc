"""Published methods that let only some prompt tokens go on through the network."""

from __future__ import annotations

from tokeff.errors import UserError
from tokeff.kv.budget import Budget
from tokeff.reduce.cascade import Depth, LastRowCascade, MassCascade
from tokeff.reduce.heads import HeadCascade
from tokeff.reduce.maps import DualFilter, PageRanked
from tokeff.reduce.pictures import DART, FastV, PyramidDrop, Resting, TransPrune
from tokeff.reduce.prune import LastRows, LastRowTopK
from tokeff.reduce.recycle import SparseVLM


def gemfilter(budget: Budget = 0.125, layer: int = 13) -> LastRowTopK:
    """GemFilter (Shi et al. 2024): rank the prompt at an early layer, then run the model on the best tokens alone."""
    return LastRowTopK(layer, budget, restart=True)


def promptdistill(budget: Budget = 0.125, layer: int = 13) -> LastRowTopK:
    """PromptDistill (Jin et al. 2025): rank the prompt at an early layer and go on with the best hidden rows."""
    return LastRowTopK(layer, budget)


def truncated(budget: Budget = 0.125) -> LastRows:
    """Baseline: the prompt cut off, its end read alone."""
    return LastRows(budget)


def lazyllm(budget: Budget = 0.125, at: tuple[Depth, ...] = (0.3, 0.6, 0.9)) -> LastRowCascade:
    """LazyLLM (Fu et al. 2024), of the prompt: prune by the last row's attention, again and again on the way up. With
    `tokeff.decode.revived` pruned tokens come back while decoding, as in the paper."""
    return LastRowCascade(at, shrinking(budget, at))


def spatten(budget: Budget = 0.125, at: tuple[Depth, ...] = (0.2, 0.4, 0.6, 0.8)) -> MassCascade:
    """SpAtten's cascade token pruning (Wang et al. 2021): prune by the attention that rows drew in all layers so far."""
    return MassCascade(at, shrinking(budget, at))


def spatten_heads(
    budget: Budget = 0.125, at: tuple[Depth, ...] = (0.2, 0.4, 0.6, 0.8), heads_left: Budget = 0.5,
    heads_at: tuple[Depth, ...] = (0.625, 0.875),
) -> HeadCascade:  # fmt: skip
    """SpAtten's cascades of tokens and of heads (Wang et al. 2021): heads go too, with their keys and values, by what they said so far.

    heads_left: how many kv heads are left in the end, the same share of what is left at each stage. They go at the depths of the released
    trace of GPT-2. With `kv=spatten_cache()` it is the paper whole.
    """
    return HeadCascade(at, shrinking(budget, at), heads_at, shrinking(heads_left, heads_at))


def fastv(budget: Budget = 0.5, layer: int = 2) -> FastV:
    """FastV (Chen et al. 2024): so many rows of a picture from `layer` on, by the last row's attention in the layer below."""
    return FastV((layer - 1,), (budget,))


def pyramiddrop(share: float = 0.5, at: tuple[Depth, ...] = (0.25, 0.5, 0.75), renumber: bool = True) -> PyramidDrop:
    """PyramidDrop (Xing et al. 2024): a share of a picture's rows is left at each stage."""
    return PyramidDrop(at, tuple(share ** (i + 1) for i in range(stages(at))), renumber=renumber)


def sparsevlm(
    keep: tuple[Budget, ...] = (0.52, 0.347, 0.19), at: tuple[Depth, ...] = (3 / 32, 7 / 32, 0.5), recycle: float = 0.3
) -> SparseVLM:
    """SparseVLM (Zhang et al. 2024): rows of a picture rated by words of the question; the best of the others go on as clusters."""
    return SparseVLM(at, keep, recycle=recycle)


def dart(budget: Budget = 0.222, layer: Depth = 2, pivots: int = 4) -> DART:
    """DART (Wen et al. 2025): a few pivots and the rows of a picture that are least like them."""
    return DART((layer,), (budget,), pivots=pivots)


def transprune(
    keep: tuple[Budget, ...] = (0.875, 0.625, 0.125), at: tuple[Depth, ...] = (7 / 32, 9 / 32, 12 / 32), renumber: bool = True
) -> TransPrune:
    """TransPrune (Li et al. 2025): rows of a picture that layers change most and the instruction looks at."""
    return TransPrune(at, keep, renumber=renumber)


def aim_decoder(first: Depth = 0.5, layers: int = 8) -> PageRanked:
    """AIM (Zhong et al. 2024), inside the decoder: from one layer on an equal part of a picture's rows goes in each, by page rank."""
    return PageRanked((first,), (*(1 - (i + 1) / layers for i in range(layers - 1)), 0))


def mustdrop_decoder(
    total: float = 0.001, single: float = 0.001, at: tuple[Depth, ...] = (2 / 32, 6 / 32, 10 / 32, 14 / 32), most: Budget = 1.0
) -> DualFilter:
    """MustDrop (Liu et al. 2024), inside the decoder: rows of a picture stay that the instruction looks at.

    How many is the picture's own, so at the defaults rows are masked and nothing is saved: arrays keep their size. `most` bounds their
    number, and with it the work.
    """
    return DualFilter(at, (most,) * stages(at), total=total, single=single)


def resting(every: int = 2, halves: tuple[bool, bool] = (False, True), first: Depth = 1, end: Depth = 1.0) -> Resting:
    """Skipping of Implicit Multimodal Alignment (Shukor & Cord 2024): rows of a picture pass halves of some layers by."""
    return Resting(every=every, halves=halves, first=first, end=end)


def stages(at: tuple[Depth, ...]) -> int:
    """How many there are. Raises UserError for one layer in the place of a tuple of them."""
    if not isinstance(at, tuple):
        raise UserError(f"at={at!r} is no tuple of layers; give for example at=({at!r},)")
    return len(at)


def shrinking(budget: Budget, at: tuple[Depth, ...]) -> tuple[Budget, ...]:
    """Budgets of these stages that end in `budget`: the same share of what is left at each; a number of rows is reached at the first."""
    n = stages(at)
    return tuple(budget ** ((i + 1) / n) if isinstance(budget, float) else budget for i in range(n - 1)) + (budget,)
