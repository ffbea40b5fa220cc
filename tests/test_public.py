"""The public names: which there are and how they are called."""

import inspect

import pytest

import tokeff

pytestmark = pytest.mark.core

NAMES = """
Precision(weights: 'str' = 'float32', activations: 'str' = 'float32', cache: 'str' = 'float32')
Sampling(temperature: 'float | tuple[float, ...]' = 0.0, top_k: 'int' = 0, top_p: 'float' = 1.0, min_p: 'float' = 0.0)
compress(m: 'Model', text: 'str', kv: 'Policy | None' = None, *, cut: 'Pass | None' = None, decode: 'Drafter | None' = None, prefill: \
'Pattern | None' = None, bounded: 'int | None' = None, room: 'int' = 256) -> 'Compressed'
decode.ChainRejection()
decode.Coupled()
decode.DeterministicTree()
decode.KSeq()
decode.Rapid(eta: 'float' = 10.0)
decode.Recursive()
decode.Typical(epsilon: 'float' = 0.09, delta: 'float' = 0.3)
decode.aded(nodes: 'int' = 16, paths: 'int' = 8, length: 'int' = 6, simulations: 'int' = 32, successors: 'int' = 12, recent: 'int' = 16, \
gain: 'float' = 0.04, cap: 'float' = 3.0, c1: 'float' = 32.0, c2: 'float' = 8.0) -> 'Trigram'
decode.best_tree(rate: 'np.ndarray', cost: 'Cost', most: 'int' = 64) -> 'Tree'
decode.draft_model(cfg: 'Config', length: 'int' = 5, copies: 'int' = 1, tree: 'tuple[tuple[int, ...], ...] | None' = None, coupled: 'bool' \
= True) -> 'DraftModel'
decode.dynamic_exit(exits: 'tuple[int, ...]' = (4, 8, 12), lengths: 'tuple[int, ...]' = (2, 4, 6), every: 'int' = 8) -> 'DynamicExit'
decode.early_exit(exit: 'int' = 8, length: 'int' = 6) -> 'EarlyExit'
decode.equal_growth(cfg: 'Config', length: 'int' = 4, width: 'int' = 4, guesses: 'int' = 8, coupled: 'bool' = True) -> 'EqualGrowth'
decode.ffn_skipllm(tau: 'float' = 0.98, head: 'Budget' = 0.5, tail: 'Budget' = 0.1, warm: 'int' = 4) -> 'FfnSkip'
decode.find_skips(m: 'Model', ids: 'Sequence[int]', share: 'float' = 0.45, tail: 'int' = 50, *, tries: 'int' = 1000, good: 'float' = 0.93, \
patience: 'int' = 300, seed: 'int' = 0) -> 'Halves'
decode.lookahead_decoding(window: 'int' = 3, ngram: 'int' = 5, guesses: 'int' = 3, pool: 'int' = 1024, fill: 'bool' = True, shift: 'bool' \
= True) -> 'Lookahead'
decode.lookahead_trie(nodes: 'int' = 16, length: 'int' = 10, query: 'int' = 2, weight: 'float' = 0.0001, own: 'float' = 0.5, most: 'int' = \
32) -> 'Trie'
decode.measured_cost(path: 'str | Path', context: 'int | None' = None) -> 'tuple[tuple[int, float], ...]'
decode.paced(drafter: 'Drafter' = PromptLookup(rule=Coupled(), length=10, ngram=3, latest=False), widths: 'tuple[int, ...]' = (1, 4, 8, \
16), cost: 'tuple[tuple[int, float], ...]' = ((1, 1.0), (2, 1.3), (4, 1.4), (8, 1.7), (16, 2.4), (32, 3.4), (64, 5.1)), rate: 'float' = \
0.2, tries: 'int' = 8, rarest: 'int' = 64) -> 'Paced'
decode.pearl(cfg: 'Config', length: 'int' = 4) -> 'Pearl'
decode.plain() -> 'Plain'
decode.prompt_lookup(length: 'int' = 10, ngram: 'int' = 3, latest: 'bool' = False) -> 'PromptLookup'
decode.r2r(cfg: 'Config', length: 'int' = 8, sure: 'float' = 0.9, name: 'str' = 'small') -> 'Routed'
decode.rapid(cfg: 'Config', length: 'int' = 10, eta: 'float' = 10.0, chunk: 'int' = 64, budget: 'Budget' = 0.125, head: 'int' = 32, \
question: 'int' = 64) -> 'RetrievedDraft'
decode.rates(m: 'Model', prompts: 'Sequence[Sequence[int]]', new: 'int' = 64, depth: 'int' = 5, rank: 'int' = 8) -> 'np.ndarray'
decode.revived(cut: 'LastRowCascade | None' = None, most: 'Budget' = 1.0, rows: 'int' = 16) -> 'dict[str, Any]'
decode.skip_decode(most: 'Budget' = 1.0, least: 'Budget' = 0.5, warm: 'int' = 1, over: 'int' = 64, stairs: 'int | None' = 4) -> \
'SkipDecode'
decode.spectr(cfg: 'Config', length: 'int' = 4, copies: 'int' = 4) -> 'DraftModel'
decode.suggest(m: 'Model', prompt: 'str | Sequence[int]', how: 'Superposed' = Superposed(drafts=3, top=None, alpha=0.54, weights=(0.01, \
0.04, 0.15, 0.18, 0.12), temperature=0.06, penalty=200.0), *, new: 'int' = 16, ngrams: 'NGrams | None' = None, kv: 'Policy | None' = None, \
stop: 'bool' = True) -> 'list[Suggestion]'
decode.swift(attention: 'tuple[int, ...] | None' = None, ffn: 'tuple[int, ...] | None' = None, length: 'int' = 5, candidates: 'int' = 3, \
sure: 'float' = 0.8, share: 'float' = 0.45, tail: 'int' = 50) -> 'Swift | OnlineSwift'
decode.token_recycling(tree: 'tuple[tuple[int, ...], ...]' = TREE_4, rank: 'int' = 8) -> 'TokenRecycling'
evaluate(m: 'Model', kv: 'Policy | None' = None, *, cut: 'Pass | None' = None, prefill: 'Pattern | None' = None, bounded: 'int | None' = \
None, task: 'str' = 'multi_question', length: 'int' = 2048, n: 'int' = 4, seed: 'int' = 0) -> 'dict[str, Any]'
generate(m: 'Model', prompts: 'str | Sequence[str] | Sequence[Sequence[int]]', *, kv: 'Policy | None' = None, cut: 'Pass | None' = None, \
decode: 'Drafter | None' = None, max_new: 'int' = 64, sampling: 'Sampling' = GREEDY, seed: 'int' = 0, prefill: 'Pattern | None' = None, \
chunk: 'int | None' = None, bounded: 'int | None' = None, stop: 'bool' = True, cache: 'Compressed | None' = None) -> 'Generation'
kv.a2sf(budget: 'Budget' = 0.125, factor: 'float' = 0.95, recent: 'int' = 16, evict: 'int' = 1) -> 'Keep'
kv.adakv(budget: 'Budget' = 0.125, window: 'int' = 16, kernel: 'int' = 7, pool: 'str' = 'max', floor: 'float' = 0.2, page: 'int' = 16) -> \
'KeepByHead'
kv.alisa(budget: 'Budget' = 0.125, steps: 'int' = 16, recent: 'float' = 0.5, evict: 'int' = 1, host: 'bool' = False) -> 'Keep | \
SparseWindow'
kv.cacheblend(chunk: 'int' = 512, share: 'float' = 0.16, layer: 'int' = 1, dense: 'int' = 64) -> 'Blend'
kv.cam(budget: 'Budget' = 0.125, sinks: 'float | int' = 4, over: 'int' = 32, evict: 'int' = 1, seed: 'int' = 0) -> 'Bequeath'
kv.chunkkv(budget: 'Budget' = 0.125, window: 'int' = 16, chunk: 'int' = 10) -> 'Keep'
kv.compresskv(budget: 'Budget' = 0.125, window: 'int' = 8, kernel: 'int' = 5, judges: 'Heads' = ((0,),), importance: 'tuple[float, ...]' = \
(), floor: 'float | int' = 0.25) -> 'ByImportance'
kv.duo_attention(heads: 'Heads' = ((0,),), budget: 'Budget' = 0.125, sinks: 'int' = 4, evict: 'int' = 1) -> 'ByClass'
kv.ems(budget: 'Budget' = 0.125, window: 'int' = 16, more: 'float' = 1.0, least: 'float' = 0.6) -> 'Merged'
kv.expected_attention(budget: 'Budget' = 0.125, future: 'int' = 512, sinks: 'int' = 4, floor: 'float' = 0.0) -> 'Keep'
kv.full() -> 'Full'
kv.gear(bits: 'int' = 2, group: 'int' = 64, residual: 'int' = 64, rank: 'float | int' = 0.03125, outliers: 'float' = 0.01, rule: 'Policy' \
= Full()) -> 'Fold'
kv.h2o(budget: 'Budget' = 0.125, recent: 'float' = 0.5, evict: 'int' = 1) -> 'Keep'
kv.hydragen(rule: 'Policy' = Full()) -> 'SharedPrefix'
kv.keydiff(budget: 'Budget' = 0.125, evict: 'int' = 1) -> 'Keep'
kv.kivi(bits: 'int' = 2, group: 'int' = 32, residual: 'int' = 32, rule: 'Policy' = Full()) -> 'Fold'
kv.knorm(budget: 'Budget' = 0.125, recent: 'int' = 0, spared: 'tuple[int, ...]' = ()) -> 'Spared'
kv.kvshare(earlier: 'tuple[int, ...]' = (), share: 'float' = 0.16, layer: 'int' = 1, dense: 'int' = 64, least: 'int' = 8) -> 'Similar'
kv.kvzip(budget: 'Budget' = 0.3, sinks: 'int' = 4, piece: 'int' = 2048, ask: 'tuple[int, ...]' = (), page: 'int' = 16) -> 'KeepByModel'
kv.lagkv(budget: 'Budget' = 0.125, lag: 'int' = 32, sinks: 'int' = 4) -> 'Keep'
kv.lm_infinite(budget: 'Budget' = 0.125, sinks: 'int' = 10, cap: 'int | None' = None, evict: 'int' = 1) -> 'LambdaShaped'
kv.look_m(budget: 'Budget' = 0.125, recent: 'float' = 0.5, how: 'str' = 'pivot') -> 'Merged'
kv.minicache(first: 'float' = 0.5, t: 'float' = 0.6, outliers: 'float' = 0.05, rest: 'Policy' = Full(), most: 'float' = 0.05) -> \
'MiniCache'
kv.minicache_4bit(first: 'float' = 0.5, t: 'float' = 0.6, outliers: 'float' = 0.05, bits: 'int' = 4, group: 'int' = 32, residual: 'int' = \
32, most: 'float' = 0.05) -> 'MiniCache'
kv.pyramidkv(budget: 'Budget' = 0.125, window: 'int' = 16, kernel: 'int' = 5, pool: 'str' = 'avg', beta: 'int' = 20) -> 'Pyramid'
kv.random_rows(budget: 'Budget' = 0.125, seed: 'int' = 0) -> 'Keep'
kv.razor_attention(heads: 'Heads' = ((0,),), budget: 'Budget' = 0.2, sinks: 'int' = 4, weighted: 'bool' = True) -> 'ByClass'
kv.recent_rows(budget: 'Budget' = 0.125) -> 'Keep'
kv.rkv(budget: 'Budget' = 0.125, window: 'int' = 8, weight: 'float' = 0.1, evict: 'int' = 16) -> 'Keep'
kv.shadowkv(budget: 'Budget' = 0.125, rank: 'float | int' = 0.156, outliers: 'float | int' = 0.003, host: 'bool' = False) -> 'ShadowKV'
kv.snapkv(budget: 'Budget' = 0.125, window: 'int' = 16, kernel: 'int' = 5, pool: 'str' = 'avg') -> 'Keep'
kv.spatten_cache(high: 'int | None' = 8, low: 'int' = 4, tau: 'float' = 0.1, values: 'Budget' = 0.3, group: 'int' = 32, rule: 'Policy' = \
Full()) -> 'ByScores'
kv.streaming_llm(budget: 'Budget' = 0.125, sinks: 'int' = 4, evict: 'int' = 1) -> 'Streaming'
kv.think(channels: 'float' = 0.6, window: 'int' = 32, rule: 'Policy' = Full()) -> 'Thin'
kv.tova(budget: 'Budget' = 0.125, evict: 'int' = 1) -> 'Keep'
kv.transmla(rank: 'float | int' = 0.5, rope: 'float | int' = 0.125, converted: 'bool' = False) -> 'TransMLA'
load(source: 'str | Path', precision: 'Precision | None' = None) -> 'Model'
methods() -> 'tuple[Method, ...]'
reduce.AIM(rounds: 'int' = 2)
reduce.CATP(budget: 'Budget' = 0.5, text: 'float' = 1.0)
reduce.CDPruner(budget: 'Budget' = 0.1111111111111111, opposite: 'bool' = False)
reduce.DivPrune(budget: 'Budget' = 0.098)
reduce.DyCoke(drop: 'float' = 0.7)
reduce.FastVID(budget: 'float' = 0.1, context: 'float' = 0.4, segments: 'int' = 8, tau: 'float' = 0.9, every: 'int' = 4, beta: 'float' = \
0.6, layer: 'int' = -2)
reduce.FasterVLM(budget: 'Budget' = 0.1111111111111111, layer: 'int' = -2)
reduce.FlowCut(budget: 'Budget' = 0.2222222222222222, every: 'int' = 2, keep: 'float' = 0.5)
reduce.FramePairs(frames: 'int' = 2)
reduce.GlobalCom2(budget: 'Budget' = 0.25, heat: 'float' = 10.0, layer: 'int' = -1)
reduce.HiPrune(budget: 'Budget' = 0.1111111111111111, layer: 'int' = -2, middle: 'int' = 8, share: 'float' = 0.1)
reduce.HiRED(budget: 'Budget' = 0.2, alpha: 'float' = 0.5, layer: 'int' = -2, first: 'int' = 0, strips: 'bool' = False, lines: 'str' = \
'none')
reduce.HoliTom(budget: 'float' = 0.1, tau: 'float' = 0.8, longest: 'int' = 1024, near: 'int' = 7, beta: 'float' = 0.6, layer: 'int' = -2)
reduce.MustDrop(like: 'float' = 0.8, window: 'tuple[int, int]' = (3, 3))
reduce.PooledPatches(cells: 'tuple[int, int]' = (8, 8))
reduce.PruMerge(budget: 'Budget' = 0.1111111111111111, layer: 'int' = -1, near: 'int' = 32, how: 'str' = 'budget')
reduce.RandomPatches(budget: 'Budget' = 0.1111111111111111, seed: 'int' = 0)
reduce.SmallerImage(cells: 'tuple[int, int]' = (12, 12))
reduce.StillRuns(tau: 'float' = 0.9)
reduce.ToDRE(budget: 'Budget' = 0.1, total: 'bool' = True)
reduce.TokenCorr(budget: 'Budget' = 1.0, like: 'float' = 0.8, often: 'float' = 0.1, layer: 'int' = -2)
reduce.VFlowOpt(budget: 'Budget' = 0.11661529508161146, above: 'float' = 39.26492840997221, cell: 'float' = 17.4, entropy: 'float' = 0.0, \
layer: 'int' = -2, span: 'tuple[float, float]' = (-1.0, 1.0))
reduce.VisPruner(budget: 'Budget' = 0.2222222222222222, share: 'float' = 0.5, step: 'int' = 8, layer: 'int' = -2)
reduce.VisionZip(budget: 'Budget' = 0.09375, contextual: 'Budget' = 0.017361111111111112, layer: 'int' = -2)
reduce.aim_decoder(first: 'Depth' = 0.5, layers: 'int' = 8) -> 'PageRanked'
reduce.dart(budget: 'Budget' = 0.222, layer: 'Depth' = 2, pivots: 'int' = 4) -> 'DART'
reduce.fastv(budget: 'Budget' = 0.5, layer: 'int' = 2) -> 'FastV'
reduce.gemfilter(budget: 'Budget' = 0.125, layer: 'int' = 13) -> 'LastRowTopK'
reduce.lazyllm(budget: 'Budget' = 0.125, at: 'tuple[Depth, ...]' = (0.3, 0.6, 0.9)) -> 'LastRowCascade'
reduce.mustdrop_decoder(total: 'float' = 0.001, single: 'float' = 0.001, at: 'tuple[Depth, ...]' = (0.0625, 0.1875, 0.3125, 0.4375), most: \
'Budget' = 1.0) -> 'DualFilter'
reduce.picture_methods() -> 'tuple[PictureMethod, ...]'
reduce.promptdistill(budget: 'Budget' = 0.125, layer: 'int' = 13) -> 'LastRowTopK'
reduce.pyramiddrop(share: 'float' = 0.5, at: 'tuple[Depth, ...]' = (0.25, 0.5, 0.75), renumber: 'bool' = True) -> 'PyramidDrop'
reduce.resting(every: 'int' = 2, halves: 'tuple[bool, bool]' = (False, True), first: 'Depth' = 1, end: 'Depth' = 1.0) -> 'Resting'
reduce.sparsevlm(keep: 'tuple[Budget, ...]' = (0.52, 0.347, 0.19), at: 'tuple[Depth, ...]' = (0.09375, 0.21875, 0.5), recycle: 'float' = \
0.3) -> 'SparseVLM'
reduce.spatten(budget: 'Budget' = 0.125, at: 'tuple[Depth, ...]' = (0.2, 0.4, 0.6, 0.8)) -> 'MassCascade'
reduce.spatten_heads(budget: 'Budget' = 0.125, at: 'tuple[Depth, ...]' = (0.2, 0.4, 0.6, 0.8), heads_left: 'Budget' = 0.5, heads_at: \
'tuple[Depth, ...]' = (0.625, 0.875)) -> 'HeadCascade'
reduce.transprune(keep: 'tuple[Budget, ...]' = (0.875, 0.625, 0.125), at: 'tuple[Depth, ...]' = (0.21875, 0.28125, 0.375), renumber: \
'bool' = True) -> 'TransPrune'
reduce.truncated(budget: 'Budget' = 0.125) -> 'LastRows'
sparse.a_shape(sinks: 'int' = 16, window: 'int' = 256, dense: 'int' = 0, block: 'int' = 64) -> 'AShape'
sparse.block_top_k(top: 'int' = 8, dense: 'int' = 64, block: 'int' = 64) -> 'TopBlocks'
sparse.chunk_prefill(size: 'int' = 2, previous: 'int' = 1, first: 'int' = 1, dense: 'int' = 64, block: 'int' = 64) -> 'Chunks'
sparse.double_sparsity(budget: 'Budget' = 0.125, labels: 'float' = 0.25, channels: 'Channels | None' = None, dense: 'tuple[int, ...]' = \
(0, 1), recent: 'int' = 16) -> 'Read'
sparse.flexprefill(gamma: 'float' = 0.9, tau: 'float' = 0.1, most: 'int' = 16, vertical: 'int' = 256, dense: 'int' = 64, block: 'int' = \
64) -> 'Flex'
sparse.hip(budget: 'Budget' = 0.125, page: 'int' = 8, start: 'int' = 64, every: 'int' = 8, sinks: 'int' = 16, recent: 'int' = 64, dense: \
'tuple[int, ...]' = (0, 1)) -> 'Read'
sparse.infllm(budget: 'Budget' = 0.125, page: 'int' = 16, count: 'int' = 2, sinks: 'int' = 16, recent: 'int' = 48, dense: 'tuple[int, \
...]' = (), host: 'bool' = False) -> 'OneDistance'
sparse.kascade(budget: 'Budget' = 0.125, dense: 'tuple[int, ...]' = (0, 1), select: 'tuple[int, ...]' = (2, 8, 13, 14), head_map: 'Heads | \
None' = None, recent: 'int' = 16) -> 'Read'
sparse.lserve(budget: 'Budget' = 0.125, page: 'int' = 16, logical: 'int' = 4, every: 'int' = 4, streaming: 'Heads | None' = None, sinks: \
'int' = 4, recent: 'int' = 4, dense: 'tuple[int, ...]' = ()) -> 'Read'
sparse.minference(vertical: 'int' = 96, slash: 'int' = 3, top: 'int' = 8, sinks: 'int' = 16, window: 'int' = 256, dense: 'int' = 64, \
block: 'int' = 64, heads: 'tuple[tuple[int, ...], ...]' = (), first: 'int | None' = None) -> 'VerticalSlash | PerHead'
sparse.quest(budget: 'Budget' = 0.125, page: 'int' = 16, dense: 'tuple[int, ...]' = (0, 1), recent: 'int' = 1, within: 'Policy | None' = \
None) -> 'Read'
sparse.recycled_attention(budget: 'Budget' = 0.125, every: 'int' = 16, recent: 'int' = 16, dense: 'tuple[int, ...]' = ()) -> 'Read'
sparse.s2_attention(near: 'int' = 2, stride: 'int' = 8, dense: 'int' = 64, block: 'int' = 64) -> 'Strided'
sparse.sentencekv(budget: 'Budget' = 0.125, factor: 'float' = 3.0, ends: 'tuple[int, ...] | None' = None, sinks: 'int' = 8, recent: 'int' \
= 16, window: 'int' = 32, kernel: 'int' = 7, cell: 'int' = 16, longest: 'int' = 64, host: 'bool' = False) -> 'SentenceKV'
sparse.tidaldecode(budget: 'Budget' = 0.125, dense: 'tuple[int, ...]' = (0, 1), select: 'tuple[int, ...]' = (2, 9), recent: 'int' = 16) -> \
'Read'
sparse.tokenselect(budget: 'Budget' = 0.125, sinks: 'int' = 8, recent: 'int' = 48, cosine: 'float | None' = 0.9, dense: 'tuple[int, ...]' \
= ()) -> 'Read'
sparse.top_k_oracle(budget: 'Budget' = 0.125, dense: 'tuple[int, ...]' = (), recent: 'int' = 16) -> 'Read'
sparse.top_p_oracle(budget: 'Budget' = 0.5, p: 'float' = 0.95, dense: 'tuple[int, ...]' = (), recent: 'int' = 16) -> 'Read'
sparse.tri_shape(sinks: 'int' = 16, window: 'int' = 256, dense: 'int' = 64, block: 'int' = 64) -> 'AShape'
stream(m: 'Model', prompt: 'str | Sequence[int]', *, kv: 'Policy | None' = None, cut: 'Pass | None' = None, decode: 'Drafter | None' = \
None, max_new: 'int' = 64, sampling: 'Sampling' = GREEDY, seed: 'int' = 0, prefill: 'Pattern | None' = None, chunk: 'int | None' = None, \
bounded: 'int | None' = None, stop: 'bool' = True, every: 'int' = 4) -> 'Iterator[str]'
"""


def public() -> list[str]:
    """One line a public function or class: its name and how it is called."""
    from tokeff.decode.recycling import TREE_4
    from tokeff.decode.sample import GREEDY

    def said(name, thing):
        text = f"{name}{inspect.signature(thing)}".replace(repr(TREE_4), "TREE_4").replace(repr(GREEDY), "GREEDY")
        return text.removesuffix(" -> None")

    lines = []
    for name in tokeff.__all__:
        thing = getattr(tokeff, name)
        if inspect.ismodule(thing):
            lines += [said(f"{name}.{part}", getattr(thing, part)) for part in thing.__all__]
        else:
            lines.append(said(name, thing))
    return sorted(lines)


def test_at_most_twelve_public_names():
    assert len(tokeff.__all__) <= 12
    assert tokeff.__all__ == sorted(tokeff.__all__)
    assert set(tokeff.__all__) | {"__version__"} == set(dir(tokeff))


def test_public_signatures():
    assert public() == sorted(NAMES.strip().splitlines())


def test_everything_public_is_documented():
    for name in tokeff.__all__:
        thing = getattr(tokeff, name)
        assert thing.__doc__, name
        for part in getattr(thing, "__all__", ()):
            assert getattr(thing, part).__doc__, f"{name}.{part}"


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match="generate"):
        tokeff.genrate  # noqa: B018
