"""Every method that reduces rows of pictures, videos and sound, in two tuples: shared tests and the documentation read them.

    for m in picture_methods():
        print(m.name, m.acts, m.make())

`picture_methods()` are those before the decoder. `inside_methods()` act inside a network: on rows of pictures in a decoder, or on any rows
of an encoder. `tokeff methods` shows both, beside those of text (tokeff/listing.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tokeff import published
from tokeff.errors import UserError, nearest
from tokeff.listed import named_settings
from tokeff.models.vit_config import ViTConfig
from tokeff.papers import Paper
from tokeff.reduce import inside_papers, video, visual_papers
from tokeff.reduce import methods as passes
from tokeff.reduce.baselines import Pooled, RandomDrop
from tokeff.reduce.merge import ToMe
from tokeff.reduce.visual import Cropped, DivPrune, FasterVLM, Filmed, HiPrune, Picked, Told, Walked
from tokeff.reduce.visual_baselines import PooledPatches, RandomPatches, SmallerImage
from tokeff.reduce.visual_crops import GlobalCom2, HiRED, TokenCorr
from tokeff.reduce.visual_diverse import CATP, CDPruner, ToDRE, VisPruner
from tokeff.reduce.visual_flow import VFlowOpt
from tokeff.reduce.visual_merge import AIM, PruMerge, VisionZip
from tokeff.reduce.visual_tower import FlowCut, MustDrop

GRID = "grid"  # in `identity`: as many cells a side as the tower has patches
CONFIG = "configs/leaderboard/reduce.py"


@dataclass(frozen=True)
class RowMethod:
    """One method. by: what it goes by: attention, likeness, merging, text, or nothing (a baseline). identity: settings at which all rows
    are left as they are; None where it always changes some. reading: its rule or its constants could not be recovered in full, and this
    is our reading. numbers: the published settings, for a tower of 576 patches; what they do not name is as in `make`. config: as `Listed`.
    """

    name: str
    by: str
    make: Callable[..., Any]
    paper: Paper | None
    identity: dict[str, Any] | None
    reading: bool = False
    numbers: dict[str, Any] = field(default_factory=dict)
    config: str | None = CONFIG
    lossless: bool = False
    trained: bool = False

    @property
    def acts(self) -> str:
        """Where."""
        raise NotImplementedError

    @property
    def part(self) -> str:
        """The argument that takes the object: `reduce` of what reads pictures or sound, or `cut` of a `Setup`."""
        return "cut" if self.acts == "decoder" else "reduce"

    @property
    def family(self) -> str:
        """Of whose rows: 'pictures', 'video', 'encoders' (of pictures and sound); or 'baseline'."""
        return "baseline" if self.by == "baseline" else {"frames": "video", "encoder": "encoders"}.get(self.acts, "pictures")

    @property
    def published(self) -> dict[str, Any] | None:
        """The paper's own numbers, as `tokeff.listing.Method` has them."""
        return None if self.paper is None else self.numbers

    def settings(self, name: str = "scaled") -> dict[str, Any]:
        """As `named_settings`."""
        return named_settings(self, name)


@dataclass(frozen=True)
class PictureMethod(RowMethod):
    """One method before the decoder. make(**settings) gives what `tokeff.models.llava.generate(reduce=)` takes."""

    make: Callable[..., Picked]

    @property
    def acts(self) -> str:
        """Where: inside the 'tower', on 'patches' behind it, between 'crops', on patches given the 'text', or between 'frames'."""
        made = self.make()
        kinds = ((Walked, "tower"), (Cropped, "crops"), (Told, "text"), (Filmed, "frames"))
        return next((where for kind, where in kinds if isinstance(made, kind)), "patches")

    def whole(self, cfg: ViTConfig, **settings: Any) -> Picked | None:
        """It at the settings that leave all rows of this tower as they are; `settings` beside these."""
        if self.identity is None:
            return None
        return self.make(**settings, **{k: cfg.grid if v == GRID else v for k, v in self.identity.items()})


@dataclass(frozen=True)
class InsideMethod(RowMethod):
    """One method inside a network. In a 'decoder' make(**settings) gives a pass over rows of pictures (`Setup(cut=)`); in an 'encoder' what
    `vit.encode`, `whisper.encode` and `transcribe` take as `reduce`, with as many rows a layer as their `drop` says."""

    at: str = "decoder"

    @property
    def acts(self) -> str:
        return self.at


_ALL = {"budget": 1.0}
METHODS = (
    PictureMethod("FasterVLM", "attention", FasterVLM, visual_papers.FASTERVLM, _ALL),
    PictureMethod("HiPrune", "attention", HiPrune, visual_papers.HIPRUNE, _ALL, numbers={"budget": 64, "share": 0.1}),
    PictureMethod("FlowCut", "attention", FlowCut, visual_papers.FLOWCUT, _ALL, numbers={"budget": 128, "every": 2, "keep": 0.5}),
    PictureMethod("TokenCorrCompress", "attention", TokenCorr, visual_papers.TOKENCORR, {"often": 1.0}, reading=True),
    PictureMethod(
        "HiRED", "attention", HiRED, visual_papers.HIRED, {"budget": 1.0, "lines": "used"}, numbers={"budget": 0.2, "alpha": 0.5}
    ),
    PictureMethod("GlobalCom2", "attention", GlobalCom2, visual_papers.GLOBALCOM2, _ALL, numbers={"budget": 0.25, "heat": 10.0}),
    PictureMethod("DivPrune", "likeness", DivPrune, visual_papers.DIVPRUNE, _ALL, numbers={"budget": 0.098}),
    PictureMethod("ToDRE", "likeness", ToDRE, visual_papers.TODRE, _ALL, reading=True, numbers={"budget": 0.1}),
    PictureMethod("VisPruner", "likeness", VisPruner, visual_papers.VISPRUNER, _ALL, numbers={"share": 0.5, "step": 8}),
    PictureMethod("CDPruner", "text", CDPruner, visual_papers.CDPRUNER, _ALL, reading=True),
    PictureMethod("CATP", "text", CATP, visual_papers.CATP, _ALL, reading=True),
    PictureMethod("VisionZip", "merging", VisionZip, visual_papers.VISIONZIP, None, numbers={"budget": 54, "contextual": 10}),
    PictureMethod("PruMerge", "merging", PruMerge, visual_papers.PRUMERGE, None, numbers={"budget": 1.0, "how": "outliers", "near": 32}),
    PictureMethod("AIM", "merging", AIM, visual_papers.AIM, {"rounds": 0}, numbers={"rounds": 2}),
    PictureMethod(
        "VFlowOpt", "merging", VFlowOpt, visual_papers.VFLOWOPT, _ALL,
        numbers={"budget": 0.11661529508161146, "above": 39.26492840997221, "cell": 17.4},
    ),
    PictureMethod("MustDrop", "merging", MustDrop, visual_papers.MUSTDROP, {"like": 2.0}, numbers={"like": 0.8, "window": (3, 3)}),
    PictureMethod(
        "HoliTom", "merging", video.HoliTom, visual_papers.HOLITOM, {"budget": 1.0, "tau": 1.0}, numbers={"budget": 0.1, "tau": 0.8}
    ),
    PictureMethod(
        "FastVID", "merging", video.FastVID, visual_papers.FASTVID, {"budget": 1.0, "context": 0.0}, reading=True,
        numbers={"context": 0.4, "segments": 8, "tau": 0.9, "every": 4, "beta": 0.6},
    ),
    PictureMethod("DyCoke", "likeness", video.DyCoke, visual_papers.DYCOKE, {"drop": 0.0}, numbers={"drop": 0.7}),
    PictureMethod("StillRuns", "merging", video.StillRuns, None, {"tau": 1.0}),
    PictureMethod("OnDeviceSora", "merging", video.FramePairs, visual_papers.SORA, {"frames": 1}),
    PictureMethod("RandomPatches", "baseline", RandomPatches, None, _ALL),
    PictureMethod("PooledPatches", "baseline", PooledPatches, None, {"cells": GRID}),
    PictureMethod("SmallerImage", "baseline", SmallerImage, None, {"cells": GRID}),
)  # fmt: skip

_EVERY = {"keep": (1.0, 1.0, 1.0)}
INSIDE = (
    InsideMethod("FastV", "attention", passes.fastv, inside_papers.FASTV, _ALL, numbers=published.FASTV),
    InsideMethod(
        "PyramidDrop", "attention", passes.pyramiddrop, inside_papers.PYRAMIDDROP, {"share": 1.0}, numbers=published.PYRAMIDDROP
    ),
    InsideMethod("SparseVLM", "text", passes.sparsevlm, inside_papers.SPARSEVLM, _EVERY, numbers=published.SPARSEVLM),
    InsideMethod("DART", "likeness", passes.dart, inside_papers.DART, _ALL, numbers=published.DART),
    InsideMethod("TransPrune", "text", passes.transprune, inside_papers.TRANSPRUNE, _EVERY, numbers=published.TRANSPRUNE),
    InsideMethod("AIM (decoder)", "attention", passes.aim_decoder, visual_papers.AIM, None, numbers=published.AIM, config=None),
    InsideMethod(
        "MustDrop (decoder)", "text", passes.mustdrop_decoder, visual_papers.MUSTDROP, {"total": 0.0, "single": 0.0},
        numbers=published.MUSTDROP,
    ),
    InsideMethod("IMA-skip", "skipping", passes.resting, inside_papers.IMA, None, config=None),
    InsideMethod("ToMe", "merging", ToMe, inside_papers.TOME, None, at="encoder"),
    InsideMethod("Pooled", "baseline", Pooled, None, None, at="encoder"),
    InsideMethod("RandomDrop", "baseline", RandomDrop, None, None, at="encoder"),
)  # fmt: skip


def picture_methods() -> tuple[PictureMethod, ...]:
    """All methods before the decoder, in the order reports show them."""
    return METHODS


def inside_methods() -> tuple[InsideMethod, ...]:
    """All methods inside a decoder over rows of pictures, or inside an encoder."""
    return INSIDE


def find(name: str) -> PictureMethod:
    """The method before the decoder of that name; UserError with the nearest one where there is none."""
    for method in METHODS:
        if method.name == name:
            return method
    raise UserError(f"unknown method {name!r}; {nearest(name, [m.name for m in METHODS])}")
