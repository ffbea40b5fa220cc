"""Every method, in one tuple. A method that stands here is run by the shared property tests, the command line and the reports."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokeff.decode import methods as decode
from tokeff.errors import UserError, nearest
from tokeff.kv import methods as kv
from tokeff.reduce import methods as reduce
from tokeff.sparse import methods as sparse


@dataclass(frozen=True)
class Paper:
    """Where a method was published. `id` is an arXiv number, or a place where there is none."""

    key: str
    title: str
    authors: str
    year: int
    id: str

    def bibtex(self) -> str:
        link = f"eprint = {{{self.id}}},\n  archivePrefix = {{arXiv}}" if self.id[:4].isdigit() else f"howpublished = {{{self.id}}}"
        return (
            f"@misc{{{self.key},\n  title = {{{self.title}}},\n  author = {{{self.authors}}},\n"
            f"  year = {{{self.year}}},\n  {link}\n}}"
        )


@dataclass(frozen=True)
class Method:
    """One method: `make(**settings)` gives the object that `generate` takes as its argument `part`.

    identity: settings at which it does nothing (full budget, full rank). budgeted_by: the ratio that
    `budget` sets. fast: settings in which it equals itself under drafts (an evicting policy needs blocks of more than one row).
    """

    name: str
    part: str  # 'kv', 'cut' or 'decode'
    family: str
    make: Callable[..., Any]
    lossless: bool
    paper: Paper | None = None
    trained: bool = False
    budgeted_by: str | None = None
    identity: dict[str, Any] | None = None
    fast: dict[str, Any] | None = None
    config: str = "configs/quickstart.py"

    def build(self, **settings: Any) -> Any:
        """`make` with a one-line error for a setting it does not have."""
        known = inspect.signature(self.make).parameters
        for name in settings:
            if name not in known:
                raise UserError(f"{self.name} has no setting {name!r}; {nearest(name, known)}")
        return self.make(**settings)


def _paper(key, title, authors, year, id):
    return Paper(key, title, authors, year, id)


STREAMING = _paper(
    "xiao2023streamingllm", "Efficient Streaming Language Models with Attention Sinks",
    "Xiao, Guangxuan and Tian, Yuandong and Chen, Beidi and Han, Song and Lewis, Mike", 2023, "2309.17453",
)  # fmt: skip
H2O = _paper(
    "zhang2023h2o", "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
    "Zhang, Zhenyu and Sheng, Ying and Zhou, Tianyi and Chen, Tianlong and Zheng, Lianmin and Cai, Ruisi and Song, Zhao and "
    "Tian, Yuandong and R{\\'e}, Christopher and Barrett, Clark and Wang, Zhangyang and Chen, Beidi", 2023, "2306.14048",
)  # fmt: skip
SNAPKV = _paper(
    "li2024snapkv", "SnapKV: LLM Knows What You are Looking for Before Generation",
    "Li, Yuhong and Huang, Yingbing and Yang, Bowen and Venkitesh, Bharat and Locatelli, Acyr and Ye, Hanchen and Cai, Tianle and "
    "Lewis, Patrick and Chen, Deming", 2024, "2404.14469",
)  # fmt: skip
ADAKV = _paper(
    "feng2024adakv", "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference",
    "Feng, Yuan and Lv, Junlin and Cao, Yukun and Xie, Xike and Zhou, S. Kevin", 2024, "2407.11550",
)  # fmt: skip
SHADOWKV = _paper(
    "sun2024shadowkv", "ShadowKV: KV Cache in Shadows for High-Throughput Long-Context LLM Inference",
    "Sun, Hanshi and Chang, Li-Wen and Bao, Wenlei and Zheng, Size and Zheng, Ningxin and Liu, Xin and Dong, Harry and "
    "Chi, Yuejie and Chen, Beidi", 2024, "2410.21465",
)  # fmt: skip
TIDAL = _paper(
    "yang2024tidaldecode", "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention",
    "Yang, Lijie and Zhang, Zhihao and Chen, Zhuofu and Li, Zikun and Jia, Zhihao", 2024, "2410.05076",
)  # fmt: skip
GEMFILTER = _paper(
    "shi2024gemfilter", "Discovering the Gems in Early Layers: Accelerating Long-Context LLMs with 1000x Input Token Reduction",
    "Shi, Zhenmei and Ming, Yifei and Nguyen, Xuan-Phi and Liang, Yingyu and Joty, Shafiq", 2024, "2409.17422",
)  # fmt: skip
DISTILL = _paper(
    "jin2025promptdistill", "PromptDistill: Query-based Selective Token Retention in Intermediate Layers for Efficient Large Language "
    "Model Inference", "Jin, Weisheng and Song, Maojia and Pala, Tej Deep and Chia, Yew Ken and Zadeh, Amir and Li, Chuan and "
    "Poria, Soujanya", 2025, "2503.23274",
)  # fmt: skip
LOOKUP = _paper(
    "saxena2023promptlookup", "Prompt Lookup Decoding", "Saxena, Apoorv", 2023, "GitHub: apoorvumang/prompt-lookup-decoding"
)
RECYCLING = _paper(
    "luo2024recycling", "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling",
    "Luo, Xianzhen and Wang, Yixuan and Zhu, Qingfu and Zhang, Zhiming and Zhang, Xuanyu and Yang, Qing and Xu, Dongliang",
    2024, "2408.08696",
)  # fmt: skip

_ALL = {"budget": 1.0}
_KEEP = {"budget": 1.0, "evict": 0}
_BLOCKS = {"evict": 16}

METHODS: tuple[Method, ...] = (
    Method("Full", "kv", "baseline", kv.full, True, identity={}),
    Method("Random", "kv", "baseline", kv.random_rows, False, budgeted_by="held", identity=_ALL),
    Method("Recent", "kv", "baseline", kv.recent_rows, False, budgeted_by="held", identity=_ALL),
    Method("StreamingLLM", "kv", "kv", kv.streaming_llm, False, STREAMING, budgeted_by="held", identity=_KEEP, fast=_BLOCKS),
    Method("H2O", "kv", "kv", kv.h2o, False, H2O, budgeted_by="held", identity=_KEEP, fast=_BLOCKS),
    Method("SnapKV", "kv", "kv", kv.snapkv, False, SNAPKV, budgeted_by="held", identity=_ALL),
    Method("AdaKV", "kv", "kv", kv.adakv, False, ADAKV, budgeted_by="held", identity=_ALL),
    Method("ShadowKV", "kv", "kv", kv.shadowkv, False, SHADOWKV, budgeted_by="read", identity={"budget": 1.0, "rank": 1.0}),
    Method("TidalDecode", "kv", "sparse", sparse.tidaldecode, False, TIDAL, budgeted_by="read", identity=_ALL),
    Method("GemFilter", "cut", "reduce", reduce.gemfilter, False, GEMFILTER, budgeted_by="held", identity=_ALL),
    Method("PromptDistill", "cut", "reduce", reduce.promptdistill, False, DISTILL, budgeted_by="held", identity=_ALL),
    Method("PromptLookup", "decode", "decode", decode.prompt_lookup, True, LOOKUP, identity={}),
    Method("TokenRecycling", "decode", "decode", decode.token_recycling, True, RECYCLING, identity={}),
)


def find(name: str) -> Method:
    """The method of that name; UserError with the nearest one where there is none."""
    for method in METHODS:
        if method.name == name:
            return method
    raise UserError(f"unknown method {name!r}; {nearest(name, [m.name for m in METHODS])}")


def methods() -> tuple[Method, ...]:
    """All methods, in the order reports show them."""
    return METHODS
