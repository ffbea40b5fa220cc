"""Every method of text, in one tuple. A method that stands here is run by the shared property tests, the command line and the reports.

Those over rows of pictures, videos and sound are listed in tokeff/reduce/listing.py; `every` has both.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokeff import papers, published
from tokeff.decode import methods as decode
from tokeff.errors import UserError, nearest
from tokeff.kv import methods as kv
from tokeff.listed import SETTINGS as SETTINGS
from tokeff.listed import Listed, named_settings
from tokeff.papers import Paper
from tokeff.reduce import listing as rows
from tokeff.reduce import methods as reduce
from tokeff.sparse import methods as sparse


@dataclass(frozen=True)
class Method:
    """One method: `make(**settings)` gives the object that `generate` takes as its argument `part`.

    identity: settings at which it does nothing (full budget, full rank). budgeted_by: the ratio that
    `budget` sets. fast: settings in which it equals itself under drafts (an evicting policy needs blocks of more than one row).
    converges: settings, coarse to fine, along which a method that approximates every row comes closer to dense.
    published: settings that give the paper's numbers (tokeff/published.py); None for a baseline. reading: its rule or its constants could
    not be recovered in full, and this is our reading of the paper. calibrates: settings that a search on the model finds; the defaults
    stand in for them (tokeff/calibration.py).
    """

    name: str
    part: str  # 'kv', 'cut', 'prefill' or 'decode'
    family: str
    make: Callable[..., Any]
    lossless: bool
    paper: Paper | None = None
    published: dict[str, Any] | None = None
    trained: bool = False
    budgeted_by: str | None = None
    identity: dict[str, Any] | None = None
    fast: dict[str, Any] | None = None
    converges: tuple[dict[str, Any], ...] = ()
    config: str = "configs/leaderboard/kv.py"
    reading: bool = False
    calibrates: tuple[str, ...] = ()

    def settings(self, name: str = "scaled") -> dict[str, Any]:
        """As `named_settings`."""
        return named_settings(self, name)

    @property
    def bare(self) -> bool:
        """Whether it can be made without naming anything: a drafter that runs another model must be told which."""
        return all(p.default is not p.empty for p in inspect.signature(self.make).parameters.values())

    def build(self, **settings: Any) -> Any:
        """`make` with a one-line error for a setting it does not have: build(**method.settings("paper"))."""
        known = inspect.signature(self.make).parameters
        for name in settings:
            if name not in known:
                raise UserError(f"{self.name} has no setting {name!r}; {nearest(name, known)}")
        return self.make(**settings)


_QUICK = "configs/quickstart.py"
_DECODE = "configs/leaderboard/decoding.py"
_ALL = {"budget": 1.0}
_KEEP = {"budget": 1.0, "evict": 0}
_BLOCKS = {"evict": 16}
_NEAR = {"recent": 16}
_ANEW = {"cosine": None}
_WINDOW = {"budget": 1.0, "recent": 2**20}
_STEP = {"every": 1}
_STEPS = {"every": 1, "recent": 16}
_BITS = ({"bits": 2}, {"bits": 4}, {"bits": 8})
_LONG = {"residual": 2**20}
_WHOLE = tuple({"outliers": share, "most": 1.0} for share in (0.125, 0.5, 1.0))
_FINER = tuple(a | b for a, b in zip(_WHOLE, _BITS, strict=True))
_RANKS = ({"rank": 0.25, "rope": 1.0}, {"rank": 0.5, "rope": 1.0}, {"rank": 1.0, "rope": 1.0})
_PLANES = tuple({"high": bits, "low": bits, "tau": 2.0, "values": 1.0} for bits in (2, 4, 8))
_CHANNELS = ({"channels": 0.25}, {"channels": 0.5}, {"channels": 1.0})

METHODS: tuple[Method, ...] = (
    Method("Full", "kv", "baseline", kv.full, True, identity={}),
    Method("Random", "kv", "baseline", kv.random_rows, False, budgeted_by="held", identity=_ALL),
    Method("Recent", "kv", "baseline", kv.recent_rows, False, budgeted_by="held", identity=_ALL),
    Method("Truncated", "cut", "baseline", reduce.truncated, False, budgeted_by="held", identity=_ALL),
    Method(
        "StreamingLLM", "kv", "kv", kv.streaming_llm, False, papers.STREAMING, published.STREAMING, budgeted_by="held", identity=_KEEP,
        fast=_BLOCKS,
    ),
    Method("H2O", "kv", "kv", kv.h2o, False, papers.H2O, published.H2O, budgeted_by="held", identity=_KEEP, fast=_BLOCKS),
    Method(
        "LM-Infinite", "kv", "kv", kv.lm_infinite, False, papers.INFINITE, published.INFINITE, budgeted_by="held", identity=_KEEP,
        fast=_BLOCKS,
    ),
    Method("TOVA", "kv", "kv", kv.tova, False, papers.TOVA, published.TOVA, budgeted_by="held", identity=_KEEP, fast=_BLOCKS),
    Method("A2SF", "kv", "kv", kv.a2sf, False, papers.A2SF, published.A2SF, budgeted_by="held", identity=_KEEP, fast=_BLOCKS),
    Method(
        "ALISA", "kv", "kv", kv.alisa, False, papers.ALISA, published.ALISA, budgeted_by="held", identity=_KEEP, fast=_BLOCKS, reading=True
    ),
    Method("Knorm", "kv", "kv", kv.knorm, False, papers.KNORM, published.KNORM, budgeted_by="held", identity=_ALL),
    Method("KeyDiff", "kv", "kv", kv.keydiff, False, papers.KEYDIFF, published.KEYDIFF, budgeted_by="held", identity=_KEEP, fast=_BLOCKS),
    Method("LagKV", "kv", "kv", kv.lagkv, False, papers.LAGKV, published.LAGKV, budgeted_by="held", identity=_ALL),
    Method(
        "ExpectedAttention", "kv", "kv", kv.expected_attention, False, papers.EXPECTED, published.EXPECTED, budgeted_by="held",
        identity=_ALL,
    ),
    Method("ChunkKV", "kv", "kv", kv.chunkkv, False, papers.CHUNKKV, published.CHUNKKV, budgeted_by="held", identity=_ALL),
    Method("R-KV", "kv", "kv", kv.rkv, False, papers.RKV, published.RKV, budgeted_by="held", identity=_KEEP, fast=_BLOCKS),
    Method("SnapKV", "kv", "kv", kv.snapkv, False, papers.SNAPKV, published.SNAPKV, budgeted_by="held", identity=_ALL),
    Method("PyramidKV", "kv", "kv", kv.pyramidkv, False, papers.PYRAMID, published.PYRAMID, budgeted_by="held", identity=_ALL),
    Method("RazorAttention", "kv", "kv", kv.razor_attention, False, papers.RAZOR, published.RAZOR, identity=_ALL, calibrates=("heads",)),
    Method(
        "DuoAttention", "kv", "kv", kv.duo_attention, False, papers.DUO, published.DUO, identity=_KEEP, fast=_BLOCKS, calibrates=("heads",)
    ),
    Method(
        "CompressKV", "kv", "kv", kv.compresskv, False, papers.COMPRESS, published.COMPRESS, budgeted_by="held", identity=_ALL,
        calibrates=("judges", "importance"),
    ),
    Method("KVzip", "kv", "kv", kv.kvzip, False, papers.KVZIP, published.KVZIP, budgeted_by="held", identity=_ALL),
    Method("AdaKV", "kv", "kv", kv.adakv, False, papers.ADAKV, published.ADAKV, budgeted_by="held", identity=_ALL),
    Method(
        "ShadowKV", "kv", "kv", kv.shadowkv, False, papers.SHADOWKV, published.SHADOWKV, budgeted_by="read",
        identity={"budget": 1.0, "rank": 1.0},
    ),
    Method("CaM", "kv", "kv", kv.cam, False, papers.CAM, published.CAM, budgeted_by="held", identity=_KEEP, fast=_BLOCKS),
    Method("LOOK-M", "kv", "kv", kv.look_m, False, papers.LOOKM, published.LOOKM, budgeted_by="held", identity=_ALL),
    Method("EMS", "kv", "kv", kv.ems, False, papers.EMS, published.EMS, budgeted_by="held", identity=_ALL, reading=True),
    Method("KIVI", "kv", "kv", kv.kivi, False, papers.KIVI, published.KIVI, identity=_LONG, converges=_BITS),
    Method("GEAR", "kv", "kv", kv.gear, False, papers.GEAR, published.GEAR, identity=_LONG, converges=_BITS),
    Method("MiniCache", "kv", "kv", kv.minicache, False, papers.MINICACHE, published.MINICACHE, identity=_WHOLE[-1], converges=_WHOLE),
    Method(
        "MiniCache4bit", "kv", "kv", kv.minicache_4bit, False, papers.MINICACHE, published.MINICACHE_4BIT, identity=_WHOLE[-1] | _LONG,
        converges=_FINER,
    ),
    Method("ThinK", "kv", "kv", kv.think, False, papers.THINK, published.THINK, identity=_CHANNELS[-1], converges=_CHANNELS),
    Method("TransMLA", "kv", "kv", kv.transmla, False, papers.TRANSMLA, published.TRANSMLA, identity=_RANKS[-1], converges=_RANKS),
    Method(
        "SpAttenCache", "kv", "kv", kv.spatten_cache, False, papers.SPATTEN, published.SPATTEN_CACHE,
        identity={"high": None, "values": 1.0}, converges=_PLANES, reading=True,
    ),
    Method("Hydragen", "kv", "reuse", kv.hydragen, True, papers.HYDRAGEN, published.HYDRAGEN, identity={}),
    Method(
        "TidalDecode", "kv", "sparse", sparse.tidaldecode, False, papers.TIDAL, published.TIDAL, budgeted_by="read", identity=_ALL,
        calibrates=("select",),
    ),
    Method("Quest", "kv", "sparse", sparse.quest, False, papers.QUEST, published.QUEST, budgeted_by="read", identity=_ALL, fast=_NEAR),
    Method(
        "DoubleSparsity", "kv", "sparse", sparse.double_sparsity, False, papers.DOUBLE, published.DOUBLE, budgeted_by="read", identity=_ALL,
        calibrates=("channels",),
    ),
    Method(
        "TokenSelect", "kv", "sparse", sparse.tokenselect, False, papers.TOKENSELECT, published.TOKENSELECT, budgeted_by="read",
        identity=_ALL, fast=_ANEW, reading=True,
    ),
    Method(
        "Kascade", "kv", "sparse", sparse.kascade, False, papers.KASCADE, published.KASCADE, budgeted_by="read", identity=_ALL,
        calibrates=("select", "head_map"),
    ),
    Method("InfLLM", "kv", "sparse", sparse.infllm, False, papers.INFLLM, published.INFLLM, budgeted_by="read", identity=_WINDOW),
    Method(
        "SentenceKV", "kv", "sparse", sparse.sentencekv, False, papers.SENTENCEKV, published.SENTENCEKV, budgeted_by="read",
        identity=_WINDOW,
    ),
    Method(
        "HiP", "kv", "sparse", sparse.hip, False, papers.HIP, published.HIP, budgeted_by="read", identity=_ALL, fast=_STEP, reading=True
    ),
    Method("LServe", "kv", "sparse", sparse.lserve, False, papers.LSERVE, published.LSERVE, budgeted_by="read", identity=_ALL, fast=_STEPS),
    Method(
        "RecycledAttention", "kv", "sparse", sparse.recycled_attention, False, papers.RECYCLED, published.RECYCLED, budgeted_by="read",
        identity=_ALL, fast=_STEP, reading=True,
    ),
    Method("TopK", "kv", "baseline", sparse.top_k_oracle, False, budgeted_by="read", identity=_ALL),
    Method("TopP", "kv", "baseline", sparse.top_p_oracle, False, budgeted_by="read", identity={"budget": 1.0, "p": 1.0}),
    Method("GemFilter", "cut", "reduce", reduce.gemfilter, False, papers.GEMFILTER, published.GEMFILTER, budgeted_by="held", identity=_ALL),
    Method(
        "PromptDistill", "cut", "reduce", reduce.promptdistill, False, papers.DISTILL, published.DISTILL, budgeted_by="held", identity=_ALL
    ),
    Method("LazyLLM", "cut", "reduce", reduce.lazyllm, False, papers.LAZY, published.LAZY, budgeted_by="held", identity=_ALL, reading=True),
    Method(
        "SpAtten", "cut", "reduce", reduce.spatten, False, papers.SPATTEN, published.SPATTEN, budgeted_by="held", identity=_ALL,
        reading=True,
    ),
    Method(
        "SpAttenHeads", "cut", "reduce", reduce.spatten_heads, False, papers.SPATTEN, published.SPATTEN_HEADS, budgeted_by="held",
        identity=_ALL | {"heads_left": 1.0}, reading=True,
    ),
    Method("AShape", "prefill", "sparse", sparse.a_shape, False, papers.MINFERENCE, published.A_SHAPE, identity={"window": 1 << 20}),
    Method("TriShape", "prefill", "sparse", sparse.tri_shape, False, papers.SCBENCH, published.TRI_SHAPE, identity={"window": 1 << 20}),
    Method(
        "BlockTopK", "prefill", "sparse", sparse.block_top_k, False, papers.MINFERENCE, published.BLOCK_TOP_K, identity={"top": 1 << 20}
    ),
    Method(
        "MInference", "prefill", "sparse", sparse.minference, False, papers.MINFERENCE, published.MINFERENCE, identity={"slash": 1 << 20},
        calibrates=("top", "window", "heads"),
    ),
    Method(
        "FlexPrefill", "prefill", "sparse", sparse.flexprefill, False, papers.FLEXPREFILL, published.FLEXPREFILL,
        identity={"gamma": 1.0, "most": 1 << 20},
    ),
    Method("S2-Attention", "prefill", "sparse", sparse.s2_attention, False, papers.S2, published.S2, identity={"stride": 1}),
    Method(
        "Video-XL-2", "prefill", "sparse", sparse.chunk_prefill, False, papers.VIDEOXL2, published.VIDEOXL2, identity={"previous": 1 << 20}
    ),
    Method("CacheBlend", "prefill", "reuse", kv.cacheblend, False, papers.CACHEBLEND, published.CACHEBLEND, identity={"share": 1.0}),
    Method("KVShare", "prefill", "reuse", kv.kvshare, False, papers.KVSHARE, published.KVSHARE, identity={"share": 1.0}, reading=True),
    Method("PromptLookup", "decode", "decode", decode.prompt_lookup, True, papers.LOOKUP, published.LOOKUP, identity={}, config=_QUICK),
    Method(
        "TokenRecycling", "decode", "decode", decode.token_recycling, True, papers.RECYCLING, published.RECYCLING, identity={},
        config=_QUICK,
    ),
    Method("Lookahead (Alipay)", "decode", "decode", decode.lookahead_trie, True, papers.TRIE, published.TRIE, identity={}, config=_DECODE),
    Method(
        "LookaheadDecoding", "decode", "decode", decode.lookahead_decoding, True, papers.LADE, published.LADE, identity={}, config=_DECODE
    ),
    Method("ADED", "decode", "decode", decode.aded, True, papers.ADED, published.ADED, identity={}, config=_DECODE),
    Method("EarlyExit", "decode", "decode", decode.early_exit, True, papers.LAYERSKIP, published.EXIT, identity={}, config=_DECODE),
    Method(
        "SWIFT", "decode", "decode", decode.swift, True, papers.SWIFT, published.SWIFT, identity={}, config=_DECODE,
        calibrates=("attention", "ffn"),
    ),
    Method("DEL", "decode", "decode", decode.dynamic_exit, True, papers.DEL, published.DEL, identity={}, config=_DECODE),
    Method("SmartSpec", "decode", "decode", decode.paced, True, papers.SMARTSPEC, published.SMARTSPEC, identity={}, config=_DECODE),
    Method("DraftModel", "decode", "decode", decode.draft_model, True, papers.SPECULATIVE, published.DRAFT, identity={}, config=_DECODE),
    Method("SpecTr", "decode", "decode", decode.spectr, True, papers.SPECTR, published.SPECTR, identity={}, config=_DECODE),
    Method(
        "Yggdrasil", "decode", "decode", decode.equal_growth, True, papers.YGGDRASIL, published.YGGDRASIL, identity={}, config=_DECODE,
        reading=True,
    ),
    Method("PEARL", "decode", "decode", decode.pearl, True, papers.PEARL, published.PEARL, identity={}, config=_DECODE),
    Method("RAPID", "decode", "decode", decode.rapid, False, papers.RAPID, published.RAPID, identity={"eta": 0.0}, config=_DECODE),
    Method(
        "FFN-SkipLLM", "decode", "decode", decode.ffn_skipllm, False, papers.FFNSKIP, published.FFNSKIP, identity={"tau": 2.0},
        config=_DECODE, reading=True,
    ),
    Method(
        "SkipDecode", "decode", "decode", decode.skip_decode, False, papers.SKIPDECODE, published.SKIPDECODE, identity={"least": 1.0},
        config=_DECODE, reading=True,
    ),
    Method(
        "R2R", "decode", "decode", decode.r2r, False, papers.R2R, published.R2R, identity={"sure": 2.0}, config=_DECODE, reading=True
    ),
)  # fmt: skip


def find(name: str) -> Method:
    """The method of that name; UserError with the nearest one where there is none."""
    for method in METHODS:
        if method.name == name:
            return method
    raise UserError(f"unknown method {name!r}; {nearest(name, [m.name for m in METHODS])}")


def methods() -> tuple[Method, ...]:
    """All methods, in the order reports show them."""
    return METHODS


def every() -> tuple[Listed, ...]:
    """All methods of any kind: those of text, then those over rows of pictures and videos before a decoder, and inside networks."""
    return (*METHODS, *rows.picture_methods(), *rows.inside_methods())
