"""Which tokens go on through the network. Functions make passes inside the decoder, classes reduce pictures and videos before it."""

import importlib
from typing import TYPE_CHECKING, Any

from tokeff.reduce.methods import (
    aim_decoder,
    dart,
    fastv,
    gemfilter,
    lazyllm,
    mustdrop_decoder,
    promptdistill,
    pyramiddrop,
    resting,
    sparsevlm,
    spatten,
    spatten_heads,
    transprune,
    truncated,
)

if TYPE_CHECKING:
    from tokeff.reduce.listing import picture_methods
    from tokeff.reduce.video import DyCoke, FastVID, FramePairs, HoliTom, StillRuns
    from tokeff.reduce.visual import DivPrune, FasterVLM, HiPrune
    from tokeff.reduce.visual_baselines import PooledPatches, RandomPatches, SmallerImage
    from tokeff.reduce.visual_crops import GlobalCom2, HiRED, TokenCorr
    from tokeff.reduce.visual_diverse import CATP, CDPruner, ToDRE, VisPruner
    from tokeff.reduce.visual_flow import VFlowOpt
    from tokeff.reduce.visual_merge import AIM, PruMerge, VisionZip
    from tokeff.reduce.visual_tower import FlowCut, MustDrop

# Imported when first used: image towers import `tokeff.reduce.merge`, and what reduces their rows imports image towers.
_LAZY = {
    "listing": ("picture_methods",),
    "video": ("DyCoke", "FastVID", "FramePairs", "HoliTom", "StillRuns"),
    "visual": ("DivPrune", "FasterVLM", "HiPrune"),
    "visual_baselines": ("PooledPatches", "RandomPatches", "SmallerImage"),
    "visual_crops": ("GlobalCom2", "HiRED", "TokenCorr"),
    "visual_diverse": ("CATP", "CDPruner", "ToDRE", "VisPruner"),
    "visual_flow": ("VFlowOpt",),
    "visual_merge": ("AIM", "PruMerge", "VisionZip"),
    "visual_tower": ("FlowCut", "MustDrop"),
}

__all__ = [
    "AIM",
    "CATP",
    "CDPruner",
    "DivPrune",
    "DyCoke",
    "FastVID",
    "FasterVLM",
    "FlowCut",
    "FramePairs",
    "GlobalCom2",
    "HiPrune",
    "HiRED",
    "HoliTom",
    "MustDrop",
    "PooledPatches",
    "PruMerge",
    "RandomPatches",
    "SmallerImage",
    "StillRuns",
    "ToDRE",
    "TokenCorr",
    "VFlowOpt",
    "VisPruner",
    "VisionZip",
    "aim_decoder",
    "dart",
    "fastv",
    "gemfilter",
    "lazyllm",
    "mustdrop_decoder",
    "picture_methods",
    "promptdistill",
    "pyramiddrop",
    "resting",
    "sparsevlm",
    "spatten",
    "spatten_heads",
    "transprune",
    "truncated",
]


def __getattr__(name: str) -> Any:
    for module, names in _LAZY.items():
        if name in names:
            return getattr(importlib.import_module(f"tokeff.reduce.{module}"), name)
    raise AttributeError(f"module 'tokeff.reduce' has no attribute {name!r}; it has {', '.join(__all__)}")
