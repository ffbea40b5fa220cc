"""Every listed drafter on the tiny model, at settings at which it is active there, with the parts that it wants attached."""

import functools

import tiny
from driven import SMALL, lower, model

from tokeff.decode import methods
from tokeff.decode.draft import Drafter
from tokeff.decode.draft_model import DraftModel
from tokeff.decode.lookup import PromptLookup
from tokeff.decode.rules import ChainRejection, DeterministicTree, Recursive
from tokeff.listing import METHODS
from tokeff.models.load import Model

PAYS = ((1, 1.0), (16, 1.01))  # rows cost next to nothing, so drafts pay
RETRIEVED = {"chunk": 8, "budget": 0.25, "head": 4, "question": 8}
LISTED = {
    "PromptLookup": methods.prompt_lookup(4, 2),
    "TokenRecycling": methods.token_recycling(tiny.TREE),
    "Lookahead (Alipay)": methods.lookahead_trie(8, 4, 2),
    "LookaheadDecoding": methods.lookahead_decoding(3, 3, 2, 64, shift=False),
    "ADED": methods.aded(10, 6, 4, 12, 4),
    "EarlyExit": methods.early_exit(2, 4),
    "SWIFT": methods.swift(length=3, candidates=2, sure=0.3, share=0.5, tail=5),
    "DEL": methods.dynamic_exit((1, 2), (3,), every=1),  # chooses anew in every pass, however passes are asked for
    "SmartSpec": methods.paced(methods.token_recycling(tiny.TREE), (1, 4, 8), PAYS, tries=1, rarest=2),  # all widths, to and fro
    "DraftModel": methods.draft_model(SMALL, 4),
    "SpecTr": methods.spectr(SMALL, 3, 3),
    "Yggdrasil": methods.equal_growth(SMALL, 4, 3, 3),
    "PEARL": methods.pearl(SMALL, 3),
    "RAPID": methods.rapid(SMALL, 4, **RETRIEVED),
    "FFN-SkipLLM": methods.ffn_skipllm(0.5, 1, 0, 2),
    "SkipDecode": methods.skip_decode(1.0, 1, 1, 6),
    "R2R": methods.r2r(SMALL, 4, 0.5),
}
# Beside the listed ones: lossless forms of those that are not, and rules that draw anew.
FORMS = {
    "RAPID, eta=0": methods.rapid(SMALL, 4, 0.0, **RETRIEVED),
    "a tree of a draft model": methods.draft_model(SMALL, tree=tiny.TREE),
    "a chain under rejection": DraftModel(SMALL, 4, coupled=False, rule=ChainRejection()),
    "copies under recursive rejection": DraftModel(SMALL, 3, copies=3, coupled=False, rule=Recursive()),
    "n-grams as a deterministic tree": PromptLookup(4, 2, rule=DeterministicTree()),
}
LOSSLESS: dict[str, Drafter] = {name: drafter for name, drafter in (LISTED | FORMS).items() if drafter.lossless}


def listed(lossless: bool | None = None) -> set[str]:
    """The names of the listed drafters, or of those that are lossless, or are not."""
    return {m.name for m in METHODS if m.part == "decode" and (lossless is None or m.lossless == lossless)}


@functools.cache
def attached() -> Model:
    """The tiny model with its first layers beside it, which drafters run that run a model."""
    return model(draft=lower(SMALL.L), small=lower(SMALL.L))
