"""The public names: which there are, how they are called, what importing them costs, and what they say to bad input."""

import inspect
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import tokeff
from tokeff.context import Compressed, from_json, to_json
from tokeff.errors import UserError
from tokeff.models.config import Precision
from tokeff.models.load import Model
from tokeff.models.tokenizer import Tokenizer

pytestmark = pytest.mark.core

ROOT = Path(__file__).parents[1]
HEAVY = ("tensorflow", "torch", "transformers", "tensorflow_datasets")

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
decode.draft_model(cfg: 'Config', length: 'int' = 5, copies: 'int' = 1, tree: 'tuple[tuple[int, ...], ...] | None' = None, coupled: \
'bool' = True) -> 'DraftModel'
decode.dynamic_exit(exits: 'tuple[int, ...]' = (4, 8, 12), lengths: 'tuple[int, ...]' = (2, 4, 6), every: 'int' = 8) -> 'DynamicExit'
decode.early_exit(exit: 'int' = 8, length: 'int' = 6) -> 'EarlyExit'
decode.equal_growth(cfg: 'Config', length: 'int' = 4, width: 'int' = 4, guesses: 'int' = 8, coupled: 'bool' = True) -> 'EqualGrowth'
decode.ffn_skipllm(tau: 'float' = 0.98, head: 'Budget' = 0.5, tail: 'Budget' = 0.1, warm: 'int' = 4) -> 'FfnSkip'
decode.find_skips(m: 'Model', ids: 'Sequence[int]', share: 'float' = 0.45, tail: 'int' = 50, *, tries: 'int' = 1000, good: 'float' = \
0.93, patience: 'int' = 300, seed: 'int' = 0) -> 'Halves'
decode.lookahead_decoding(window: 'int' = 3, ngram: 'int' = 5, guesses: 'int' = 3, pool: 'int' = 1024, fill: 'bool' = True, shift: 'bool' \
= True) -> 'Lookahead'
decode.lookahead_trie(nodes: 'int' = 16, length: 'int' = 10, query: 'int' = 2, weight: 'float' = 0.0001, own: 'float' = 0.5, most: 'int' \
= 32) -> 'Trie'
decode.measured_cost(path: 'str | Path', context: 'int | None' = None) -> 'tuple[tuple[int, float], ...]'
decode.paced(drafter: 'Drafter' = PromptLookup(rule=Coupled(), length=10, ngram=3, latest=False), widths: 'tuple[int, ...]' = (1, 4, 8, \
16), cost: 'tuple[tuple[int, float], ...]' = ((1, 1.0), (2, 1.2), (4, 1.4), (8, 1.6), (16, 2.1), (32, 3.1), (64, 4.4)), rate: 'float' = \
0.2, tries: 'int' = 8, rarest: 'int' = 64) -> 'Paced'
decode.pearl(cfg: 'Config', length: 'int' = 4) -> 'Pearl'
decode.plain() -> 'Plain'
decode.prompt_lookup(length: 'int' = 10, ngram: 'int' = 3, latest: 'bool' = False) -> 'PromptLookup'
decode.r2r(cfg: 'Config', length: 'int' = 8, sure: 'float' = 0.9, name: 'str' = 'small') -> 'Routed'
decode.rapid(cfg: 'Config', length: 'int' = 10, eta: 'float' = 10.0, chunk: 'int' = 64, budget: 'Budget' = 0.125, head: 'int' = 32, \
question: 'int' = 64) -> 'RetrievedDraft'
decode.rates(m: 'Model', prompts: 'Sequence[Sequence[int]]', new: 'int' = 64, depth: 'int' = 5, rank: 'int' = 8) -> 'np.ndarray'
decode.skip_decode(most: 'Budget' = 1.0, least: 'Budget' = 0.5, warm: 'int' = 1, over: 'int' = 64, stairs: 'int | None' = 4) -> \
'SkipDecode'
decode.spectr(cfg: 'Config', length: 'int' = 4, copies: 'int' = 4) -> 'DraftModel'
decode.suggest(m: 'Model', prompt: 'str | Sequence[int]', how: 'Superposed' = Superposed(drafts=3, top=None, alpha=0.54, weights=(0.01, \
0.04, 0.15, 0.18, 0.12), temperature=0.06, penalty=200.0), *, new: 'int' = 16, ngrams: 'NGrams | None' = None, kv: 'Policy | None' = \
None, stop: 'bool' = True) -> 'list[Suggestion]'
decode.swift(attention: 'tuple[int, ...]', ffn: 'tuple[int, ...]', length: 'int' = 5, candidates: 'int' = 3, sure: 'float' = 0.8) -> \
'Swift'
decode.token_recycling(tree: 'tuple[tuple[int, ...], ...]' = TREE_16, rank: 'int' = 8) -> 'TokenRecycling'
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
kv.compresskv(budget: 'Budget' = 0.125, window: 'int' = 8, kernel: 'int' = 5, judges: 'Heads' = ((0,),), importance: 'tuple[float, ...]' \
= ()) -> 'ByImportance'
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
kv.minicache(first: 'float' = 0.5, t: 'float' = 0.6, outliers: 'float' = 0.05, rest: 'Policy' = Full()) -> 'MiniCache'
kv.minicache_4bit(first: 'float' = 0.5, t: 'float' = 0.6, outliers: 'float' = 0.05, bits: 'int' = 4, group: 'int' = 32, residual: 'int' = \
32) -> 'MiniCache'
kv.pyramidkv(budget: 'Budget' = 0.125, window: 'int' = 16, kernel: 'int' = 5, pool: 'str' = 'avg', beta: 'int' = 20) -> 'Pyramid'
kv.random_rows(budget: 'Budget' = 0.125, seed: 'int' = 0) -> 'Keep'
kv.razor_attention(heads: 'Heads' = ((0,),), budget: 'Budget' = 0.2, sinks: 'int' = 4, weighted: 'bool' = True) -> 'ByClass'
kv.recent_rows(budget: 'Budget' = 0.125) -> 'Keep'
kv.rkv(budget: 'Budget' = 0.125, window: 'int' = 8, weight: 'float' = 0.1, evict: 'int' = 16) -> 'Keep'
kv.shadowkv(budget: 'Budget' = 0.125, rank: 'float | int' = 0.156, outliers: 'float | int' = 0.003, host: 'bool' = False) -> 'ShadowKV'
kv.snapkv(budget: 'Budget' = 0.125, window: 'int' = 16, kernel: 'int' = 5, pool: 'str' = 'avg') -> 'Keep'
kv.streaming_llm(budget: 'Budget' = 0.125, sinks: 'int' = 4, evict: 'int' = 1) -> 'Streaming'
kv.think(channels: 'float' = 0.6, window: 'int' = 32, rule: 'Policy' = Full()) -> 'Thin'
kv.tova(budget: 'Budget' = 0.125, evict: 'int' = 1) -> 'Keep'
kv.transmla(rank: 'float | int' = 0.5, rope: 'float' = 0.125, converted: 'bool' = False) -> 'TransMLA'
load(source: 'str | Path', precision: 'Precision | None' = None) -> 'Model'
methods() -> 'tuple[Method, ...]'
reduce.gemfilter(budget: 'Budget' = 0.125, layer: 'int' = 13) -> 'LastRowTopK'
reduce.promptdistill(budget: 'Budget' = 0.125, layer: 'int' = 13) -> 'LastRowTopK'
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
sparse.kascade(budget: 'Budget' = 0.125, dense: 'tuple[int, ...]' = (0, 1), select: 'tuple[int, ...]' = (2, 8, 13, 14), head_map: 'Heads \
| None' = None, recent: 'int' = 16) -> 'Read'
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
sparse.tidaldecode(budget: 'Budget' = 0.125, dense: 'tuple[int, ...]' = (0, 1), select: 'tuple[int, ...]' = (2, 9), recent: 'int' = 16) \
-> 'Read'
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
    from tokeff.decode.recycling import TREE_16
    from tokeff.decode.sample import GREEDY

    def said(name, thing):
        text = f"{name}{inspect.signature(thing)}".replace(repr(TREE_16), "TREE_16").replace(repr(GREEDY), "GREEDY")
        return text.removesuffix(" -> None")

    lines = []
    for name in tokeff.__all__:
        thing = getattr(tokeff, name)
        if inspect.ismodule(thing):
            lines += [said(f"{name}.{part}", getattr(thing, part)) for part in thing.__all__]
        else:
            lines.append(said(name, thing))
    return sorted(lines)


def words(cfg) -> Tokenizer:
    """A tokenizer of single words w0, w1, ..."""
    raw = tokenizers.Tokenizer(WordLevel({f"w{i}": i for i in range(cfg.V)}, unk_token="w0"))
    raw.pre_tokenizer = Whitespace()
    return Tokenizer(raw, cfg.V)


@cache
def model(seed: int = 0) -> Model:
    """The tiny model of the shared tests, with a tokenizer; another `seed` gives other weights."""
    params = tiny.params() if seed == 0 else jax.tree.map(lambda x: 1.5 * x, tiny.params())
    return Model(tiny.CFG, params, words(tiny.CFG), Precision(), "tiny")


def text(n: int, first: int = 1) -> str:
    rng = np.random.default_rng(first)
    return " ".join(f"w{i}" for i in rng.integers(1, tiny.CFG.V, n))


def python(code: str, *args: str) -> str:
    """Run code in a fresh interpreter that finds this checkout and its tests."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    done = subprocess.run([sys.executable, "-c", code, *args], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# -- names and imports


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


def test_import_costs_nothing():
    loaded = python("import sys, tokeff; print(*sys.modules)").split()
    for name in (*HEAVY, "jax", "jaxlib", "flax", "numpy", "matplotlib"):
        assert name not in loaded


def test_generating_imports_no_other_framework():
    code = (
        "import sys, test_api, tokeff; m = test_api.model(); tokeff.generate(m, [test_api.text(40)], max_new=2);"
        "tokeff.methods(); tokeff.evaluate; print(*sys.modules)"
    )
    loaded = python(code).split()
    assert "jax" in loaded
    for name in HEAVY:
        assert name not in loaded


def test_example_lifts_one_policy():
    out = python((ROOT / "examples" / "lift_one_policy.py").read_text())
    assert "kept 24 of 96 rows" in out and "rows now 25" in out


# -- use


def test_generate_takes_text_texts_or_ids():
    m, one = model(), text(40)
    ids = m.tok.encode(one)
    made = [tokeff.generate(m, given, max_new=4).tokens[0] for given in (one, [one], [ids])]
    assert made[0] == made[1] == made[2] and len(made[0]) == 4


def test_stream_says_what_generate_says():
    m = model()
    whole = tokeff.generate(m, text(40), max_new=12).texts[0]
    pieces = list(tokeff.stream(m, text(40), max_new=12))
    assert "".join(pieces) == whole and len(pieces) > 1


POLICIES = {
    "Full": lambda: tokeff.kv.full(),
    "H2O": lambda: tokeff.kv.h2o(0.5),
    "AdaKV": lambda: tokeff.kv.adakv(0.5, window=6, page=4),
    "ShadowKV": lambda: tokeff.kv.shadowkv(0.5),
    "TidalDecode": lambda: tokeff.sparse.tidaldecode(0.5, dense=(0,), select=(1,), recent=8),
}


def test_saved_contexts_answer_the_same_in_another_process(tmp_path):
    m, questions, here = model(), [text(5, 2), text(3, 3)], {}
    for name, make in POLICIES.items():
        context = tokeff.compress(m, text(64), make(), room=24)
        context.save(tmp_path / name)
        here[name] = [tokeff.generate(m, questions, cache=context, max_new=12).tokens, context.bytes, repr(context.setup)]
    code = (
        "import sys, json, pathlib, test_api, tokeff; from tokeff.context import Compressed; m = test_api.model();"
        "questions = [test_api.text(5, 2), test_api.text(3, 3)];"
        "contexts = {p.name: Compressed.load(m, p) for p in pathlib.Path(sys.argv[1]).iterdir()};"
        "print(json.dumps({name: [tokeff.generate(m, questions, cache=c, max_new=12).tokens, c.bytes, repr(c.setup)]"
        " for name, c in contexts.items()}))"
    )
    assert json.loads(python(code, str(tmp_path))) == here


def test_context_is_asked_again_without_trace():
    """A question does not change the context: the second answer to it equals the first."""
    m = model()
    context = tokeff.compress(m, text(64), tokeff.kv.h2o(0.5), room=24)
    first = tokeff.generate(m, text(5, 2), cache=context, max_new=8).tokens
    tokeff.generate(m, text(9, 4), cache=context, max_new=8)
    assert tokeff.generate(m, text(5, 2), cache=context, max_new=8).tokens == first


def test_one_model_call_serves_many_drafted_answers(tmp_path):
    m = model()
    context = tokeff.compress(m, text(64), decode=tokeff.decode.token_recycling(tiny.TREE), room=24)
    context.save(tmp_path / "c")
    again = Compressed.load(m, tmp_path / "c")
    plain = tokeff.compress(m, text(64), room=24)
    question = [text(5, 2), text(3, 3)]
    assert tokeff.generate(m, question, cache=again, max_new=8).tokens == tokeff.generate(m, question, cache=plain, max_new=8).tokens


# -- bad input


LONG = tiny.CFG.max_len + 1
BAD = {
    "empty text": lambda m: tokeff.generate(m, ""),
    "one of several empty": lambda m: tokeff.generate(m, [text(9), ""]),
    "empty ids": lambda m: tokeff.generate(m, [[]]),
    "no prompts": lambda m: tokeff.generate(m, []),
    "empty stream": lambda m: list(tokeff.stream(m, "")),
    "empty context": lambda m: tokeff.compress(m, ""),
    "too long": lambda m: tokeff.generate(m, text(LONG)),
    "too long with what is wanted": lambda m: tokeff.generate(m, text(200), max_new=100),
    "context too long": lambda m: tokeff.compress(m, text(200), room=100),
    "nothing wanted": lambda m: tokeff.generate(m, text(9), max_new=0),
    "budget 0": lambda m: tokeff.generate(m, text(64), kv=tokeff.kv.snapkv(0, window=4)),
    "budget 0.0": lambda m: tokeff.generate(m, text(64), kv=tokeff.kv.h2o(0.0)),
    "budget 1.5": lambda m: tokeff.generate(m, text(64), kv=tokeff.kv.recent_rows(1.5)),
    "budget above the context": lambda m: tokeff.generate(m, text(64), kv=tokeff.kv.random_rows(65)),
    "budget 0 of a pass": lambda m: tokeff.generate(m, text(64), cut=tokeff.reduce.gemfilter(0.0, layer=1)),
    "budget 0 of a selection": lambda m: tokeff.generate(m, text(64), kv=tokeff.sparse.tidaldecode(0)),
    "budget all protected": lambda m: tokeff.generate(m, text(64), kv=tokeff.kv.snapkv(0.1, window=16)),
    "no such layer": lambda m: tokeff.generate(m, text(64), cut=tokeff.reduce.promptdistill(0.5, layer=13)),
    "chunks and a pass": lambda m: tokeff.generate(m, text(64), cut=tokeff.reduce.promptdistill(0.5, layer=1), chunk=16),
    "drafts and per-step eviction": lambda m: tokeff.generate(m, text(64), kv=tokeff.kv.h2o(0.5), decode=tokeff.decode.prompt_lookup()),
    "negative temperature": lambda m: tokeff.generate(m, text(9), sampling=tokeff.Sampling(temperature=-1.0)),
    "two temperatures, one prompt": lambda m: tokeff.generate(m, text(9), sampling=tokeff.Sampling(temperature=(0.5, 1.0))),
    "tree without parents": lambda m: tokeff.decode.token_recycling(((0, 0),)),
    "no text to measure": lambda m: tokeff.evaluate(m, n=0),
    "unknown task": lambda m: tokeff.evaluate(m, task="needl", length=64),
    "unknown model": lambda m: tokeff.load("smollm2-135n"),
    "pickle": lambda m: tokeff.load("weights.pt"),
    "no such context": lambda m: Compressed.load(m, "/nonexistent/context"),
    "an id beyond the vocabulary": lambda m: tokeff.generate(m, [[1, tiny.CFG.V]], max_new=2),
    "a negative id": lambda m: tokeff.generate(m, [[1, -5]], max_new=2),
    "a method's name for the method": lambda m: tokeff.generate(m, text(9), kv="snapkv"),
    "a method that was not called": lambda m: tokeff.generate(m, text(9), kv=tokeff.kv.snapkv),
    "a drafter for a policy": lambda m: tokeff.generate(m, text(9), kv=tokeff.decode.prompt_lookup()),
    "chunks of no tokens": lambda m: tokeff.generate(m, text(9), chunk=-1),
    "negative eviction": lambda m: tokeff.generate(m, text(64), kv=tokeff.kv.h2o(0.5, evict=-1)),
    "unknown pooling": lambda m: tokeff.generate(m, text(64), kv=tokeff.kv.snapkv(0.5, window=4, pool="mean")),
    "rank above 1": lambda m: tokeff.generate(m, text(64), kv=tokeff.kv.shadowkv(0.5, rank=2.0)),
    "a tree without nodes": lambda m: tokeff.generate(m, text(64), decode=tokeff.decode.token_recycling(())),
}

@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name):
    with pytest.raises(UserError) as e:
        BAD[name](model())
    said = str(e.value)
    assert "\n" not in said and 20 < len(said) < 300


@cache
def saved() -> Compressed:
    return tokeff.compress(model(), text(64), tokeff.kv.snapkv(0.5, window=6), room=24)


CONTEXT_USE = {
    "question beyond the room": lambda m, c: tokeff.generate(m, text(30), cache=c, max_new=4),
    "answer beyond the room": lambda m, c: tokeff.generate(m, text(5), cache=c, max_new=20),
    "empty question": lambda m, c: tokeff.generate(m, "", cache=c, max_new=4),
    "another policy": lambda m, c: tokeff.generate(m, text(5), kv=tokeff.kv.full(), cache=c, max_new=4),
    "another model": lambda m, c: tokeff.generate(model(1), text(5), cache=c, max_new=4),
    "nothing wanted": lambda m, c: tokeff.generate(m, text(5), cache=c, max_new=0),
}


@pytest.mark.parametrize("name", CONTEXT_USE)
def test_context_that_cannot_serve(name):
    with pytest.raises(UserError) as e:
        CONTEXT_USE[name](model(), saved())
    assert "\n" not in str(e.value)


def test_saving_twice_is_refused_and_leaves_the_first(tmp_path):
    saved().save(tmp_path / "c")
    before = {p.name: p.read_bytes() for p in (tmp_path / "c").iterdir()}
    with pytest.raises(UserError, match="exists"):
        saved().save(tmp_path / "c")
    assert {p.name: p.read_bytes() for p in (tmp_path / "c").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_saving_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        saved().save(tmp_path / "file" / "c")


def test_context_of_another_model(tmp_path):
    saved().save(tmp_path / "c")
    with pytest.raises(UserError, match="another model") as e:
        Compressed.load(model(1), tmp_path / "c")
    assert "\n" not in str(e.value)


def change(**fields):
    def edit(folder: Path):
        about = json.loads((folder / "context.json").read_text())
        (folder / "context.json").write_text(json.dumps(about | fields))

    return edit


def in_policy(**fields):
    def edit(folder: Path):
        about = json.loads((folder / "context.json").read_text())
        about["setup"]["kv"] |= fields
        (folder / "context.json").write_text(json.dumps(about))

    return edit


def without(name: str):
    def edit(folder: Path):
        about = json.loads((folder / "context.json").read_text())
        del about[name]
        (folder / "context.json").write_text(json.dumps(about))

    return edit


def cut_short(folder: Path):
    whole = (folder / "cache.safetensors").read_bytes()
    (folder / "cache.safetensors").write_bytes(whole[: len(whole) // 2])


DAMAGE = {
    "unknown class": in_policy(type="Evil"),
    "unknown field": in_policy(colour="red"),
    "other budget": in_policy(budget=0.75),
    "other room": change(room=1000),
    "not JSON": lambda folder: (folder / "context.json").write_text("{"),
    "truncated arrays": cut_short,
    "no arrays": lambda folder: (folder / "cache.safetensors").unlink(),
    "no model": without("model"),
    "no setup": without("setup"),
    "setup is another class": change(setup={"type": "Full"}),
    "a list": lambda folder: (folder / "context.json").write_text("[]"),
}

@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_context(name, tmp_path):
    saved().save(tmp_path / "c")
    DAMAGE[name](tmp_path / "c")
    with pytest.raises(UserError) as e:
        Compressed.load(model(), tmp_path / "c")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("method", [m for m in tokeff.methods() if m.bare], ids=lambda method: method.name)
def test_every_method_saves_and_loads(method, tmp_path):
    """The choices come back equal from JSON, and the arrays to the bit."""
    part = {method.part: method.make(**tiny.settings(method))}
    context = tokeff.compress(model(), text(64), **part, room=8)
    context.save(tmp_path / "c")
    again = Compressed.load(model(), tmp_path / "c")
    assert again.setup == context.setup and again.tokens == context.tokens and again.next == context.next
    assert from_json(json.loads(json.dumps(to_json(method.make())))) == method.make()
    for mine, theirs in zip(jax.tree.leaves(context.layers), jax.tree.leaves(again.layers), strict=True):
        np.testing.assert_array_equal(mine, theirs)
