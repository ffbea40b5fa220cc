"""Published methods that keep everything and read little.

`budget` is the share (float) or number (int) of rows that a query reads in a layer that reads few, recent rows and sinks included. The
defaults are the `scaled` setting; each docstring gives the `paper` one, for models and contexts of the size it was published for.
"""

from __future__ import annotations

from tokeff.kv.budget import Budget
from tokeff.kv.policy import Policy
from tokeff.sparse.exact import TopMass, TopScores, Vote
from tokeff.sparse.flex import Flex
from tokeff.sparse.hip import Halving
from tokeff.sparse.infllm import OneDistance, Representatives
from tokeff.sparse.labels import Channels, Labels
from tokeff.sparse.pages import MinMax
from tokeff.sparse.patterns import AShape, Chunks, PerHead, Strided, TopBlocks, VerticalSlash
from tokeff.sparse.read import Read
from tokeff.sparse.reuse import Every, WhileSimilar
from tokeff.sparse.sentencekv import BySentence, SentenceKV
from tokeff.sparse.sentences import Breaks

Heads = tuple[tuple[int, ...], ...]  # kv heads of each layer


def tidaldecode(budget: Budget = 0.125, dense: tuple[int, ...] = (0, 1), select: tuple[int, ...] = (2, 9), recent: int = 16) -> Read:
    """TidalDecode (Yang et al. 2024): two selecting layers choose rows by raw q.k, all others read what they chose.

    `recent` rows before each query are always read; the paper forces none. It makes drafts exact (see `Read`). On SmolLM2-135M the best
    second selecting layer is 5 (`tokeff.calibration.settings(model, "TidalDecode")`); 9 is the published default.
    """
    return Read(budget, TopScores(), dense, select, recent, own=False)


def quest(
    budget: Budget = 0.125, page: int = 16, dense: tuple[int, ...] = (0, 1), recent: int = 1, within: Policy | None = None
) -> Read:
    """Quest (Tang et al. 2024): every layer reads the pages whose largest and smallest keys promise the largest q.k.

    The last page is always read. Quest chooses pages for each query head; here the query heads of a kv head choose together, by the
    sum of their bounds, and the cache stays at kv-head size. No minimum of 3 pages. Drafts need a `recent` above their depth. `paper`:
    budget=2048 (512 to 4096). within: what stays of the prompt; `quest(0.125, within=snapkv(0.25))` evicts and then selects, as RocketKV
    (Behnam et al. 2025) does in two stages.
    """
    return Read(budget, MinMax(page), dense, recent=recent, within=within)


def hip(
    budget: Budget = 0.125, page: int = 8, start: int = 64, every: int = 8, sinks: int = 16, recent: int = 64,
    dense: tuple[int, ...] = (0, 1),
) -> Read:  # fmt: skip
    """HiP (Lee et al. 2024), our reading: pages found by halving the best chunks; one selection serves `every` steps, as its masks do.

    every=1 for drafts. `paper`: budget=2048 and 1280 more for sinks=256 and recent=1024, chunks from 256 rows down to 8, dense=(0, 1, 2)
    and more; it also renumbers positions to reach beyond the trained length, and refreshes each stage at a rate of its own.
    """
    reuse = None if every == 1 else Every(every)
    return Read(budget, Halving(page, start), dense, recent=recent, sinks=sinks, reuse=reuse)


def kascade(
    budget: Budget = 0.125, dense: tuple[int, ...] = (0, 1), select: tuple[int, ...] = (2, 8, 13, 14), head_map: Heads | None = None,
    recent: int = 16,
) -> Read:  # fmt: skip
    """Kascade (Deshmukh et al. 2025): anchor layers choose the rows with the most attention, summed over the query heads of a kv head,
    and read those; each layer above reads what the nearest anchor below it chose.

    head_map: for every layer, which head of the anchor each kv head follows; None: the same one. `tokeff.sparse.anchors.anchors(model,
    texts)` finds both by the paper's search; `tokeff.calibration.settings(model, "Kascade")` has what it found. The default anchors are
    the published ones of Llama-3.1-8B (0, 2, 8, 13, 14) with layer 1, which there follows layer 0, dense as well. `paper`: a budget
    of 0.1, at least 128 rows. Prefill is dense; in the paper tiles of 32 queries select there too. `recent` rows are always read, so that
    drafts are exact.
    """
    return Read(budget, TopMass(), dense, select, recent, heads=head_map)


def infllm(
    budget: Budget = 0.125, page: int = 16, count: int = 2, sinks: int = 16, recent: int = 48, dense: tuple[int, ...] = (),
    host: bool = False,
) -> OneDistance:  # fmt: skip
    """InfLLM (Xiao et al. 2024): first rows, a window of recent ones, and the blocks whose representatives answer the query; all that
    is not recent stands at one distance.

    One set of blocks for a layer, chosen for each query (in decoding the paper's execution block is one row). The rows that represent a
    block are those with the most attention from the local windows of the prompt, `recent` rows each. The prompt is read densely.
    host: the prompt's rows lie in host memory, as published, and the chosen blocks come over at every step; the paper keeps those it read
    lately on the device. `paper`: page=128, count=4, sinks=128, recent=4096 and 16 blocks, so budget=6400: recent rows
    that begin inside a page take one page more.
    """
    return OneDistance(budget, Representatives(page, count, recent), dense, recent=recent, sinks=sinks, host=host)


def lserve(
    budget: Budget = 0.125, page: int = 16, logical: int = 4, every: int = 4, streaming: Heads | None = None,
    sinks: int = 4, recent: int = 4, dense: tuple[int, ...] = (),
) -> Read:  # fmt: skip
    """LServe (Yang et al. 2025): pages are worth the best bound of their logical pages, one selection serves `every` steps, and
    streaming heads read only the first and the last pages.

    Bounds of a kv head's query heads are added up. streaming: kv heads of each layer, in the paper the half with the smallest
    DuoAttention gates; None: no head. every=1 for drafts. `paper`: budget=4096, page=64, logical=16, sinks=128 and recent=256 for streaming
    heads; its 4-bit cache and sparse prefill are other methods.
    """
    reuse = None if every == 1 else Every(every)
    return Read(budget, MinMax(page, logical), dense, recent=recent, sinks=sinks, reuse=reuse, streaming=streaming)


def recycled_attention(budget: Budget = 0.125, every: int = 16, recent: int = 16, dense: tuple[int, ...] = ()) -> Read:
    """Recycled Attention (Xu et al. 2024), our reading: every `every` steps a query reads all rows, and those with the most attention
    serve the steps until the next, with the rows that came meanwhile.

    Attention is summed over the query heads of a kv head. The paper also has a rule by similarity of queries; its numbers are not
    known to us. every=1 reads everything at every step.
    """
    reuse = None if every == 1 else Every(every)
    return Read(budget, TopMass(), dense, recent=recent, own=False, reuse=reuse)


def double_sparsity(
    budget: Budget = 0.125, labels: float = 0.25, channels: Channels | None = None, dense: tuple[int, ...] = (0, 1), recent: int = 16
) -> Read:
    """Double Sparsity (Yang et al. 2024): rows are chosen by q.k over a few channels, whose copies are all that is read to choose.

    channels: from `tokeff.sparse.calibrate.calibrate(model, text, labels)`, the paper's offline calibration (SmolLM2's are in
    `tokeff.calibration.settings(model, "DoubleSparsity")`); None takes them from the prompt's own keys. Scores of a kv head's
    query heads are added up. `recent` rows are always read; the paper forces none. `paper`: budget=128 with
    labels=0.5 or 0.25, or 256 with labels=0.125; its label cache has 4 or 2 bits, ours the cache's dtype.
    """
    return Read(budget, Labels(labels, channels), dense, recent=recent)


def tokenselect(
    budget: Budget = 0.125, sinks: int = 8, recent: int = 48, cosine: float | None = 0.9, dense: tuple[int, ...] = ()
) -> Read:
    """TokenSelect (Wu et al. 2024), our reading: the heads of a layer vote for the rows that all of them read, and keep the vote while the
    query stays similar.

    cosine: below it a layer votes again, at its own time; None votes at every step, which drafts need. `paper`: budget=2688 (2048 voted
    for), sinks=128, recent=512; ours are those shares of 256 rows. Our reading is of the positions: queries vote, and read, at their own
    distance from every row. In the paper unrotated keys meet a query at one distance, and rows that are read are renumbered, to reach
    beyond the trained length; its prompt selects in chunks of 512, ours is read densely.
    """
    return Read(budget, Vote(), dense, recent=recent, sinks=sinks, reuse=None if cosine is None else WhileSimilar(cosine))


def sentencekv(
    budget: Budget = 0.125, factor: float = 3.0, ends: tuple[int, ...] | None = None, sinks: int = 8, recent: int = 16,
    window: int = 32, kernel: int = 7, cell: int = 16, longest: int = 64, host: bool = False,
) -> SentenceKV:  # fmt: skip
    """SentenceKV (Zhu et al. 2025): `factor` times the budget is kept as SnapKV would, and whole sentences of it are read.

    ends: the tokens that end a sentence; None takes those that `tokeff.sparse.sentences.sentence_ends` finds in the vocabulary. cell: of
    the ends in so many places of the text the first counts, which bounds the number of sentences; longest: longer ones are split.
    host: the rows kept of the prompt lie in host memory, as published, and chosen sentences come over at every step. `paper`:
    budget=1024, sinks=32, recent=32, factor=3 (5 in the code).
    """
    by = BySentence(Breaks(ends, cell, longest))
    return SentenceKV(budget, by, (), None, recent, sinks, host=host, factor=factor, window=window, kernel=kernel)


def top_k_oracle(budget: Budget = 0.125, dense: tuple[int, ...] = (), recent: int = 16) -> Read:
    """Reference point: every layer reads the rows that get the most attention. All keys are read to find them; they count."""
    return Read(budget, TopMass(), dense, recent=recent)


def top_p_oracle(budget: Budget = 0.5, p: float = 0.95, dense: tuple[int, ...] = (), recent: int = 16) -> Read:
    """Reference point: every layer reads the fewest rows that get a share `p` of the attention, at most `budget` of them.

    The share is of the attention to rows that are not recent. `bytes_read` counts the whole budget: how much less is needed differs
    from query to query, and shapes do not.
    """
    return Read(budget, TopMass(p), dense, recent=recent)


# -- the prompt itself: which blocks its rows read


def a_shape(sinks: int = 16, window: int = 256, dense: int = 0, block: int = 64) -> AShape:
    """A-shape (MInference, Jiang et al. 2024): sinks and a window, rows beyond never read. `paper`: sinks=128, window=3968."""
    return AShape(block, dense, sinks, window)


def tri_shape(sinks: int = 16, window: int = 256, dense: int = 64, block: int = 64) -> AShape:
    """Tri-shape (SCBench, Li et al. 2024): A-shape, and the prompt's last rows read everything. `paper`: dense=100."""
    return AShape(block, dense, sinks, window)


def block_top_k(top: int = 8, dense: int = 64, block: int = 64) -> TopBlocks:
    """Block-sparse prefill (MInference, Jiang et al. 2024, sec. 3.2): blocks ranked by mean query times mean key. `paper`: top=100,
    dense=0; our own last rows read everything, so that policies may ask them."""
    return TopBlocks(block, dense, top)


def s2_attention(near: int = 2, stride: int = 8, dense: int = 64, block: int = 64) -> Strided:
    """S2-Attention's pattern (Lin et al. 2024): near blocks and a strided share that differs by head. The paper trains with it; on a
    model that was not, this measures the loss. `paper`: near=32, stride=8, dense=0."""
    return Strided(block, dense, near, stride)


def chunk_prefill(size: int = 2, previous: int = 1, first: int = 1, dense: int = 64, block: int = 64) -> Chunks:
    """Video-XL-2's chunk pattern (Qin et al. 2025) on text: chunks see themselves, the chunks just before and the first block. `paper`:
    previous=3, groups of four frames a chunk, and every timestamp, for which text has nothing."""
    return Chunks(block, dense, size, previous, first)


def minference(
    vertical: int = 96, slash: int = 3, top: int = 8, sinks: int = 16, window: int = 256, dense: int = 64, block: int = 64,
    heads: tuple[tuple[int, ...], ...] = (), first: int | None = None,
) -> VerticalSlash | PerHead:  # fmt: skip
    """MInference (Jiang et al. 2024): vertical-slash, A-shape or block-sparse, chosen offline for each head.

    heads: 0, 1 or 2 for each layer and kv head, from `tokeff.sparse.search.search(model, text)` or, with the sizes they were compared at,
    `tokeff.calibration.settings(model, "MInference")`; none given takes vertical-slash
    everywhere, which the paper's search prefers for most heads. Patterns belong to kv heads here, to query heads there. first: columns
    that vertical-slash reads in any case, None for as many as `sinks`. `paper`: vertical=1000 with first=30, slash=6096 diagonals (here
    bundles of `block`, rounded up: 96), top=100, sinks=128, window=3968, dense=0.
    """
    columns = VerticalSlash(block, dense, vertical, slash, first=min(sinks if first is None else first, vertical))
    if not heads:
        return columns
    return PerHead(block, dense, (columns, AShape(block, 0, sinks, window), TopBlocks(block, 0, top)), heads)


def flexprefill(gamma: float = 0.9, tau: float = 0.1, most: int = 16, vertical: int = 256, dense: int = 64, block: int = 64) -> Flex:
    """FlexPrefill (Lai et al. 2025): each head reads what holds a share `gamma` of its attention, by columns and diagonals or, where the
    mean query predicts it, by ranked blocks.

    most, vertical: bounds on the blocks and single rows that a block of queries reads; shapes are fixed, so the time is theirs.
    `paper`: block=128, dense=0, and a minimum of 1024 rows where these are upper bounds.
    """
    return Flex(block, dense, gamma, tau, most, vertical)
