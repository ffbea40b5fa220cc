"""Thirteen ways to spend fewer tokens, side by side on one real text with SmolLM2-135M.

Command:   tokeff run configs/quickstart.py
Hardware:  2 CPU cores, float32
Time:      with an empty compile cache, model on disk: 5 min 13 s on an Intel Xeon that decodes 31 tok/s (nine rows more were timed then),
           8 min 44 s on an AMD EPYC that decodes 15 tok/s
Expected:  Full answers 3 of 3 needles; KL to the full cache: Random 0.73, SnapKV 0.06, ShadowKV 0.05, TidalDecode 0.10, GemFilter 0.11;
           both drafters change nothing; prompt lookup commits 1.8 tokens a pass
"""

from tokeff.evals.comparison import Comparison, line

BUDGET = 0.125
TIMED = ("Full", "SnapKV", "ShadowKV", "TokenRecycling")
"""Measured at two lengths: one method that evicts, one that selects, one that drafts, beside the full cache."""


def experiment() -> Comparison:
    """One committed passage of 2,048 tokens with needles at depths .1, .5 and .9, one budget for every method that has one."""
    rows = (
        line("Full"),
        line("Random", budget=BUDGET),
        line("Recent", budget=BUDGET),
        line("StreamingLLM", budget=BUDGET),
        line("H2O", budget=BUDGET),
        line("SnapKV", budget=BUDGET),
        line("AdaKV", budget=BUDGET),
        line("ShadowKV", budget=BUDGET),
        line("TidalDecode", budget=BUDGET),
        line("GemFilter", budget=BUDGET),
        line("PromptDistill", budget=BUDGET),
        line("PromptLookup"),
        line("TokenRecycling"),
    )
    return Comparison(name="quickstart", rows=rows, contexts=(2048,), speeds=(512,), timed=TIMED)
