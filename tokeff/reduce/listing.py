"""Every method that reduces rows of pictures and videos before the decoder, in one tuple: shared tests and the documentation read it.

    for m in picture_methods():
        print(m.name, m.acts, m.make())
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokeff.errors import UserError, nearest
from tokeff.models.vit_config import ViTConfig
from tokeff.papers import Paper
from tokeff.reduce import video, visual_papers
from tokeff.reduce.visual import Cropped, DivPrune, FasterVLM, Filmed, HiPrune, Picked, Told, Walked
from tokeff.reduce.visual_baselines import PooledPatches, RandomPatches, SmallerImage
from tokeff.reduce.visual_crops import GlobalCom2, HiRED, TokenCorr
from tokeff.reduce.visual_diverse import CATP, CDPruner, ToDRE, VisPruner
from tokeff.reduce.visual_flow import VFlowOpt
from tokeff.reduce.visual_merge import AIM, PruMerge, VisionZip
from tokeff.reduce.visual_tower import FlowCut, MustDrop

GRID = "grid"  # in `identity`: as many cells a side as the tower has patches


@dataclass(frozen=True)
class PictureMethod:
    """One method. make(**settings) gives what `generate(reduce=)` takes.

    family: what it goes by: attention, likeness, merging, text, or a baseline. identity: settings at which all rows are left as they are;
    None where it always changes some. reading: its rule or its constants could not be recovered in full, and this is our reading.
    """

    name: str
    family: str
    make: Callable[..., Picked]
    paper: Paper | None
    identity: dict[str, Any] | None
    reading: bool = False

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


_ALL = {"budget": 1.0}
METHODS = (
    PictureMethod("FasterVLM", "attention", FasterVLM, visual_papers.FASTERVLM, _ALL),
    PictureMethod("HiPrune", "attention", HiPrune, visual_papers.HIPRUNE, _ALL),
    PictureMethod("FlowCut", "attention", FlowCut, visual_papers.FLOWCUT, _ALL),
    PictureMethod("TokenCorrCompress", "attention", TokenCorr, visual_papers.TOKENCORR, {"often": 1.0}, reading=True),
    PictureMethod("HiRED", "attention", HiRED, visual_papers.HIRED, {"budget": 1.0, "lines": "used"}),
    PictureMethod("GlobalCom2", "attention", GlobalCom2, visual_papers.GLOBALCOM2, _ALL),
    PictureMethod("DivPrune", "likeness", DivPrune, visual_papers.DIVPRUNE, _ALL),
    PictureMethod("ToDRE", "likeness", ToDRE, visual_papers.TODRE, _ALL, reading=True),
    PictureMethod("VisPruner", "likeness", VisPruner, visual_papers.VISPRUNER, _ALL),
    PictureMethod("CDPruner", "text", CDPruner, visual_papers.CDPRUNER, _ALL, reading=True),
    PictureMethod("CATP", "text", CATP, visual_papers.CATP, _ALL, reading=True),
    PictureMethod("VisionZip", "merging", VisionZip, visual_papers.VISIONZIP, None),
    PictureMethod("PruMerge", "merging", PruMerge, visual_papers.PRUMERGE, None),
    PictureMethod("AIM", "merging", AIM, visual_papers.AIM, {"rounds": 0}),
    PictureMethod("VFlowOpt", "merging", VFlowOpt, visual_papers.VFLOWOPT, _ALL),
    PictureMethod("MustDrop", "merging", MustDrop, visual_papers.MUSTDROP, {"like": 2.0}),
    PictureMethod("HoliTom", "merging", video.HoliTom, visual_papers.HOLITOM, {"budget": 1.0, "tau": 1.0}),
    PictureMethod("FastVID", "merging", video.FastVID, visual_papers.FASTVID, {"budget": 1.0, "context": 0.0}, reading=True),
    PictureMethod("DyCoke", "likeness", video.DyCoke, visual_papers.DYCOKE, {"drop": 0.0}),
    PictureMethod("StillRuns", "merging", video.StillRuns, None, {"tau": 1.0}),
    PictureMethod("OnDeviceSora", "merging", video.FramePairs, visual_papers.SORA, {"frames": 1}),
    PictureMethod("RandomPatches", "baseline", RandomPatches, None, _ALL),
    PictureMethod("PooledPatches", "baseline", PooledPatches, None, {"cells": GRID}),
    PictureMethod("SmallerImage", "baseline", SmallerImage, None, {"cells": GRID}),
)


def picture_methods() -> tuple[PictureMethod, ...]:
    """All methods, in the order reports show them."""
    return METHODS


def find(name: str) -> PictureMethod:
    """The method of that name; UserError with the nearest one where there is none."""
    for method in METHODS:
        if method.name == name:
            return method
    raise UserError(f"unknown method {name!r}; {nearest(name, [m.name for m in METHODS])}")
