"""Published KV-cache methods, each one expression over the parts of this folder.

`budget` is the share (float) or number (int) of prompt rows kept per kv head. Constants are the `scaled` setting: the paper's
numbers as shares of the context they were published for, which is what a 2k prompt on a small model can be measured with. Where heads
or layers come from a search on the model, `tokeff.calibration.settings(model, NAME)` has what it found.
"""

from __future__ import annotations

from tokeff.errors import UserError
from tokeff.kv.blend import Blend
from tokeff.kv.budget import Budget, Spread
from tokeff.kv.by_scores import ByScores
from tokeff.kv.classes import ByClass, Heads
from tokeff.kv.coded import Fold
from tokeff.kv.compress import ByImportance, HeadWindow
from tokeff.kv.depth import MiniCache
from tokeff.kv.gear import Gear
from tokeff.kv.keep import Keep
from tokeff.kv.latent import TransMLA
from tokeff.kv.mean_row import MeanRow
from tokeff.kv.merge_rows import Bequeath, GlobalLocal, Merged, Watched
from tokeff.kv.planes import Split
from tokeff.kv.policy import Full, Policy
from tokeff.kv.pool import KeepByHead, KeepByModel
from tokeff.kv.pyramid import Pyramid, Spared
from tokeff.kv.quant import ByChannel, ByToken
from tokeff.kv.retell import Reconstruction, Retold
from tokeff.kv.score import Chance, Chunked, Mass, Recency, Shared, TextFirst, WindowMass
from tokeff.kv.score_future import Expected
from tokeff.kv.score_keys import KeyDifference, KeyNorm, Lag, Unrepeated
from tokeff.kv.shadow import ShadowKV
from tokeff.kv.shared import SharedPrefix
from tokeff.kv.similar import Similar
from tokeff.kv.sparse_window import SparseWindow
from tokeff.kv.streaming import LambdaShaped, Streaming
from tokeff.kv.thin import Thin

_ALL = Full()


def full() -> Full:
    """Every row kept, every row read: the baseline that `held` and `read` are ratios to."""
    return Full()


def hydragen(rule: Policy = _ALL) -> SharedPrefix:
    """Hydragen (Juravsky et al. 2024): questions on one context share its rows, which are held once and read once for all of them.

    rule: what is kept of the context, `full()` or a `Keep` with evict=0.
    """
    return SharedPrefix(rule)


def cacheblend(chunk: int = 512, share: float = 0.16, layer: int = 1, dense: int = 64) -> Blend:
    """CacheBlend (Yao et al. 2024): the prompt from chunks that never saw each other, a `share` of its rows computed anew. Give it as
    `prefill`.

    dense: so many last rows are always computed, in the place of the question.
    """
    return Blend(chunk, dense, share, layer)


def kvshare(earlier: tuple[int, ...] = (), share: float = 0.16, layer: int = 1, dense: int = 64, least: int = 8) -> Similar:
    """KVShare (Yang et al. 2025), our reading: the prompt from the cache of an earlier one where both say the same. Give it as `prefill`.

    earlier: token ids of that prompt. least: runs of fewer equal tokens are computed like changed ones.
    """
    return Similar(least, dense, share, layer, earlier)


def random_rows(budget: Budget = 0.125, seed: int = 0) -> Keep:
    """Baseline: a random set of prompt rows per layer and head."""
    return Keep(budget, Chance(seed))


def recent_rows(budget: Budget = 0.125) -> Keep:
    """Baseline: only the end of the prompt."""
    return Keep(budget, Recency())


def streaming_llm(budget: Budget = 0.125, sinks: int = 4, evict: int = 1) -> Streaming:
    """StreamingLLM (Xiao et al. 2024): attention sinks and recent rows, positions counted inside the cache."""
    return Streaming(budget, Recency(), sinks=sinks, evict=evict)


def lm_infinite(budget: Budget = 0.125, sinks: int = 10, cap: int | None = None, evict: int = 1) -> LambdaShaped:
    """LM-Infinite (Han et al. 2023): the first rows and a window, distances capped at the window's length.

    Published with 10 to 100 sinks and a window and cap as long as the training context (4096). The prompt is prefilled densely.
    """
    return LambdaShaped(budget, Recency(), sinks=sinks, evict=evict, cap=cap)


def h2o(budget: Budget = 0.125, recent: float = 0.5, evict: int = 1) -> Keep:
    """H2O (Zhang et al. 2023): half heavy hitters by accumulated attention, half recent; evicts throughout decoding."""
    return Keep(budget, Mass(), recent=recent, evict=evict)


def tova(budget: Budget = 0.125, evict: int = 1) -> Keep:
    """TOVA (Oren et al. 2024): what the last query looks at, the mean over all heads of a layer; evicts throughout decoding.

    No sinks, no recent rows forced. The budget counts the newest row, which the paper adds to it.
    """
    return Keep(budget, Shared(Mass(0.0)), evict=evict)


def a2sf(budget: Budget = 0.125, factor: float = 0.95, recent: int = 16, evict: int = 1) -> Keep:
    """A2SF (Jo & Shin 2024): accumulated attention that fades by `factor` a step, so that old rows have no head start."""
    return Keep(budget, Mass(factor), recent=recent, evict=evict)


def alisa(
    budget: Budget = 0.125, steps: int = 16, recent: float = 0.5, evict: int = 1, host: bool = False
) -> Keep | SparseWindow:
    """ALISA's sparse window attention (Zhao et al. 2024, alg. 1): half the budget recent, half what the last `steps` queries looked at.

    Our reading: the sum over the last steps is geometric weights of the same sum, as in `rkv`, and a row that was left out is gone, where
    the paper may fetch it again. host: nothing is gone; the prompt's rows lie in host memory, the sum is exactly that over the last
    `steps` queries, and a row comes back when it is largest again. A row that is left out gets no attention, so that happens within
    `steps` queries of its leaving. Of the paper's scheduler nothing but that is part of this.
    """
    if steps < 1:
        raise UserError(f"steps {steps} looks at no query; give at least 1")
    if host and evict != 1:
        raise UserError(f"evict={evict} has no meaning where nothing is evicted; leave it at 1 with host=True")
    if host:
        return SparseWindow(budget, steps, recent)
    return Keep(budget, Mass(1 - 1 / steps), recent=recent, evict=evict)


def knorm(budget: Budget = 0.125, recent: int = 0, spared: tuple[int, ...] = ()) -> Spared:
    """Knorm (Devoto et al. 2024): the rows with the smallest keys. `spared` layers keep everything, in the paper the first two."""
    return Spared(budget, KeyNorm(), recent=recent, spared=spared)


def keydiff(budget: Budget = 0.125, evict: int = 1) -> Keep:
    """KeyDiff (Park et al. 2025): the rows whose keys are least like the mean key; evicts throughout decoding.

    The paper also evicts between blocks of a long prompt; here the whole prompt is ranked once.
    """
    return Keep(budget, KeyDifference(), evict=evict)


def lagkv(budget: Budget = 0.125, lag: int = 32, sinks: int = 4) -> Keep:
    """LagKV (Liang et al. 2025): rows that vary on the scale of the rows one lag later. Published with a lag of 128 and 4 sinks."""
    return Keep(budget, Lag(lag, sinks), sinks=sinks)


def rkv(budget: Budget = 0.125, window: int = 8, weight: float = 0.1, evict: int = 16) -> Keep:
    """R-KV (Cai et al. 2025): rows that are looked at and unlike the others, chosen anew every `evict` tokens (published: 128).

    The budget is what is held just before an eviction; the paper's buffer of new tokens comes on top of it.
    """
    return Keep(budget, Unrepeated(window, weight), recent=window, evict=evict)


def snapkv(budget: Budget = 0.125, window: int = 16, kernel: int = 5, pool: str = "avg") -> Keep:
    """SnapKV (Li et al. 2024): what the last `window` queries look at, pooled; the window itself is always kept."""
    return Keep(budget, WindowMass(window, kernel, pool), recent=window)


def expected_attention(budget: Budget = 0.125, future: int = 512, sinks: int = 4, floor: float = 0.0) -> Keep:
    """Expected Attention (Devoto et al. 2025): what queries of the next `future` places are expected to look at, times the value's length.

    Published with floor 0, and 0.01 where heads share a budget.
    """
    return Keep(budget, Expected(future, sinks, floor), sinks=sinks)


def chunkkv(budget: Budget = 0.125, window: int = 16, chunk: int = 10) -> Keep:
    """ChunkKV (Liu et al. 2025): SnapKV's attention without pooling, whole chunks at a time. Its reuse of one layer's chunks in the next
    saves time, not rows, and is left out."""
    return Keep(budget, Chunked(WindowMass(window, 1), chunk, window), recent=window)


def pyramidkv(
    budget: Budget = 0.125, window: int = 16, kernel: int = 5, pool: str = "avg", beta: int = 20
) -> Pyramid:
    """PyramidKV (Cai et al. 2024): SnapKV's scores, more rows in lower layers. `budget` is the mean over layers; published window: 8."""
    return Pyramid(budget, WindowMass(window, kernel, pool), recent=window, beta=beta)


def razor_attention(
    heads: Heads = ((0,),), budget: Budget = 0.2, sinks: int = 4, weighted: bool = True
) -> ByClass:
    """RazorAttention (Tang et al. 2024): retrieval heads keep everything, the others sinks, recent rows and one mean row for the rest.

    `heads` come from `tokeff.kv.heads.razor_heads(model)`; the default, the first head of each layer, was not searched for. `budget` is
    that of the other heads: published max(4000, N / 5) rows, 256 in the deployed code. Nothing leaves after the prompt.
    """
    return ByClass(Full(), MeanRow(Keep(budget, Recency(), sinks=sinks), weighted), heads)


def duo_attention(heads: Heads = ((0,),), budget: Budget = 0.125, sinks: int = 4, evict: int = 1) -> ByClass:
    """DuoAttention (Xiao et al. 2024): retrieval heads keep everything, streaming heads sinks and recent rows, throughout decoding.

    `heads` come from `tokeff.kv.heads`: `duo_heads(model, text)`, or `strongest(gates, share)` of learned gates; the default, the first
    head of each layer, was not searched for. `budget` is that of the streaming heads (published: 64 sinks and 256 recent rows); they keep
    their places in the text. The prompt is prefilled densely, where the paper's streaming heads stream it.
    """
    return ByClass(Full(), Keep(budget, Recency(), sinks=sinks, evict=evict), heads)


def kvzip(
    budget: Budget = 0.3, sinks: int = 4, piece: int = 2048, ask: tuple[int, ...] = (), page: int = 16
) -> KeepByModel:
    """KVzip (Kim et al. 2025): rows that the model needs to say the context again, whatever will be asked; costs a second prefill.

    One budget for all layers and heads. `ask`: token ids of the published "Repeat the previous context:", none by default. Published:
    pieces of 2048 tokens, budgets down to 0.3.
    """
    return KeepByModel(Keep(budget, Reconstruction(Retold(piece, sinks, ask)), sinks=sinks), page)


def compresskv(
    budget: Budget = 0.125, window: int = 8, kernel: int = 5, judges: Heads = ((0,),), importance: tuple[float, ...] = (),
    floor: float | int = 0.25,
) -> ByImportance:  # fmt: skip
    """CompressKV (Lin et al. 2025): rows that a layer's semantic retrieval heads look at, one choice for all its kv heads.

    `judges` are query heads of each layer, from `tokeff.kv.compress.semantic_heads` (published: 4 a layer; the default, the first head,
    was not searched for), `importance` a share of the budget for each layer, from `layer_importance` (none: all alike). floor: what
    every layer keeps, rows or a share of the budget; published 32 rows, a quarter of the smallest budget of the paper.
    """
    return ByImportance(budget, HeadWindow(window, kernel, "avg", judges), recent=window, importance=importance, floor=floor)


def adakv(budget: Budget = 0.125, window: int = 16, kernel: int = 7, pool: str = "max", floor: float = 0.2, page: int = 16) -> KeepByHead:
    """AdaKV on SnapKV scores (Feng et al. 2024): the layer's budget goes where the scores are, whatever the head."""
    return KeepByHead(snapkv(budget, window, kernel, pool), Spread(floor), page)


def shadowkv(budget: Budget = 0.125, rank: float | int = 0.156, outliers: float | int = 0.003, host: bool = False) -> ShadowKV:
    """ShadowKV (Sun et al. 2024): low-rank keys, chunks chosen by landmarks. `budget` is what a query reads.

    rank, outliers: shares of the width of all keys and of the chunks of 8 rows, or numbers of them. host: values in host memory.
    """
    return ShadowKV(budget, rank, outliers=outliers, host=host)


def kivi(bits: int = 2, group: int = 32, residual: int = 32, rule: Policy = _ALL) -> Fold:
    """KIVI (Liu et al. 2024): keys in `bits` bits by channel, values by token, in groups of 32; recent rows in full precision.

    rule: what is kept of the prompt to be quantised; `kivi(4, rule=snapkv(0.25))` is SnapKV under int4. As published: bits 2,
    group 32, residual 128 (32 for short prompts).
    """
    return Fold(rule, ByChannel(bits), ByToken(bits, group), page=group, window=residual)


def gear(
    bits: int = 2, group: int = 64, residual: int = 64, rank: float | int = 0.03125, outliers: float = 0.01, rule: Policy = _ALL
) -> Fold:
    """GEAR (Kang et al. 2024): KIVI's codes, the low-rank part of their error, and 1% outliers at each end of a vector.

    As published: rank 4 for a prompt (2 for later pages), whatever the head's width; outliers=0 is GEAR-L.
    """
    key = Gear(ByChannel(bits), rank, outliers, axis=3)
    return Fold(rule, key, Gear(ByToken(bits, group), rank, outliers), page=group, window=residual)


def spatten_cache(
    high: int | None = 8, low: int = 4, tau: float = 0.1, values: Budget = 0.3, group: int = 32, rule: Policy = _ALL
) -> ByScores:
    """SpAtten's reading (Wang et al. 2021): scores by the `high` bits of the keys, and by `low` more where the largest probability is
    below `tau`; values of the most probable rows alone.

    high=None leaves keys as they are. values: how many rows a query reads values of. Keys have a zero and a step for every `group` of
    channels of a row. As published: 8 and 4 bits, values of 0.3; the cascades of the prompt are `tokeff.reduce.spatten_heads`.
    """
    return ByScores(rule, None if high is None else Split(high, low, group, tau), values)


def think(channels: float = 0.6, window: int = 32, rule: Policy = _ALL) -> Thin:
    """ThinK (Xu et al. 2024): each head's keys keep the channels that the last queries look at; recent rows keep all.

    As published: 0.6 of the channels (a pruning ratio of 0.4), window 32, on top of SnapKV: `think(rule=snapkv(0.25))`.
    """
    return Thin(rule, channels, window)


def cam(budget: Budget = 0.125, sinks: float | int = 4, over: int = 32, evict: int = 1, seed: int = 0) -> Bequeath:
    """CaM (Zhang et al. 2024): sinks and recent rows; the value of a row that leaves goes to the rows after it, by a coin.

    `over` (the paper's merge budget m) and positions as published; the released code has as many sinks as recent rows (sinks=0.5).
    Larger `evict` leaves room for drafts.
    """
    return Bequeath(budget, Watched(), sinks=sinks, evict=evict, over=over, seed=seed)


def look_m(budget: Budget = 0.125, recent: float = 0.5, how: str = "pivot") -> Merged:
    """LOOK-M (Wan et al. 2024): H2O's rows once after the prompt, those of text before those of pictures; the others are merged into the
    kept row nearest by key.

    Where all rows are text that is H2O's order; `tokeff.models.llava.generate` says which are not. As published: budget 0.2, half recent;
    how='average', 'pivot' or 'weighted'. One choice for the query heads of a kv head.
    """
    return Merged(budget, TextFirst(), recent=recent, how=how)


def ems(budget: Budget = 0.125, window: int = 16, more: float = 1.0, least: float = 0.6) -> Merged:
    """EMS (Li et al. 2024), our reading: the best rows by a global-local score, the next best merged into those like them.

    Of the rows that are not kept, `more` times as many as are merge where their key's cosine with the nearest kept one is at least
    `least`; the zero class takes the others. How many merge in each head follows from its redundancy. The paper's constants
    could not be recovered; that a merged row counts for all of its rows (log of their number on its scores) is ours.
    """
    return Merged(budget, GlobalLocal(window), recent=window, how="average", least=least, more=more, sized=True)


def minicache(first: float = 0.5, t: float = 0.6, outliers: float = 0.05, rest: Policy = _ALL, most: float = 0.05) -> MiniCache:
    """MiniCache (Liu et al. 2024): from the middle on, two neighbouring layers share directions and keep lengths.

    Rows whose angle between the layers is in the top `outliers` of its range stay whole. As published, but for a bound: there is memory for
    the share `most` of the rows, and where more lie in that range those with the largest angles stay. One choice for keys and values.
    """
    return MiniCache(first, t, outliers, rest, most)


def minicache_4bit(
    first: float = 0.5, t: float = 0.6, outliers: float = 0.05, bits: int = 4, group: int = 32, residual: int = 32, most: float = 0.05
) -> MiniCache:
    """MiniCache with 4-bit codes (Liu et al. 2024, sec. 5): shared directions, and the rows of the other layers, as KIVI writes them."""
    return MiniCache(first, t, outliers, kivi(bits, group, residual), most)


def transmla(rank: float | int = 0.5, rope: float | int = 0.125, converted: bool = False) -> TransMLA:
    """TransMLA (Meng et al. 2025), without its training: one low-rank row for all heads, few of whose numbers carry rotation.

    rank: share or number of directions of what carries none. rope: share of heads, at least one, that keep their rotation, or how many
    numbers do. converted: bases from a calibration text, put beside the weights by `tokeff.kv.convert.convert(model, text, rope)`, as
    published; by default each prompt finds its own, which are held with it. `paper`: rank=512, rope=64 (of a head of 128 the fastest
    half of the frequencies, where the paper merges near ones), and training, without which its perplexities rise by a fifth to eightfold.
    """
    return TransMLA(rank, rope, converted)
