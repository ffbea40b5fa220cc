"""What prompts decoded in turns by a drafter, by plain decoding and by a chain of wrong drafts say of the drafter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from tokeff.errors import UserError
from tokeff.evals import machines
from tokeff.evals.continuations import Continuation
from tokeff.evals.stats import mean
from tokeff.evals.ties import Cut, cut_of, margins
from tokeff.kv.prefill import Prompt
from tokeff.models.load import Model

DENSE, PLAIN, WRONG, MINE = "dense", "plain", "wrong", "mine"
"""The decoders: plain decoding with the full cache, plain decoding with the drafter's cache, wrong drafts of its width, the drafter."""
ENOUGH = 5  # prompts from which on a mean has an interval


@dataclass(eq=False)
class Group:
    """Prompts read together: one, or a batch. runs: its decoders; seconds: of each in each round."""

    prompt: Prompt
    runs: dict[str, Continuation]
    seconds: dict[str, list[float]]

    def per_pass(self, name: str) -> np.ndarray:
        """Seconds of a pass in each round."""
        return np.array(self.seconds[name]) / max(self.runs[name].passes)

    def per_token(self, name: str) -> np.ndarray:
        return np.array(self.seconds[name]) / sum(self.runs[name].committed)

    @property
    def decoded(self) -> bool:
        """Whether there was anything to decode: a text may end with its first token."""
        return sum(self.runs[DENSE].committed) > 0

    def cuts(self, m: Model) -> list[Cut | None]:
        """For each sequence where the drafted text leaves plain decoding's."""
        mine, plain = self.runs[MINE], self.runs[PLAIN]
        if mine.texts == plain.texts:
            return [None] * len(mine.texts)
        apart = margins(m, self.prompt, plain.texts, plain.new, plain.setup.kv)
        return [cut_of(*both) for both in zip(mine.texts, plain.texts, apart, strict=True)]


def speeds(groups: Sequence[Group]) -> dict[str, Any]:
    """Tokens a pass, and ratios: medians within rounds of each prompt, then weighed as the prompts' own seconds are."""
    if not groups:
        raise UserError("every text ends with its first token, so there is nothing to draft; take other prompts")
    tokens, passes = ([x for g in groups for x in getattr(g.runs[MINE], side)] for side in ("committed", "passes"))
    made = [sum(g.runs[MINE].committed) for g in groups]
    faster = [median(g.per_token(DENSE) / g.per_token(MINE)) for g in groups]
    plain, wrong, mine = (np.concatenate([g.per_pass(name) for g in groups]) for name in (PLAIN, WRONG, MINE))
    mat, tn, share = sum(tokens) / sum(passes), float(np.median(wrong / plain)), float(np.median((mine - wrong) / plain))
    dense = sum(sum(g.runs[DENSE].committed) for g in groups) / sum(median(g.seconds[DENSE]) for g in groups)
    return {
        **over("mat", tokens, passes), **over("of_dense", made, [n / r for n, r in zip(made, faster)]),
        "tn": tn, "draft_ms": 1e3 * float(np.median(mine - wrong)), "t1_ms": 1e3 * float(np.median(plain)),
        "break_even": machines.break_even(mat, share), "expected": machines.expected(mat, tn, share),
        "decode_tok_s": sum(made) / sum(median(g.seconds[MINE]) for g in groups), "dense_tok_s": dense,
        "tokens": tokens, "passes": passes, "faster": faster, "slowest_of_fastest": float(plain.max() / plain.min()),
    }  # fmt: skip


def over(name: str, above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """sum(above) / sum(below) with, from `ENOUGH` samples on, the interval of a ratio of sums (Cochran 1977, section 6.4)."""
    a, b = np.asarray(above, float), np.asarray(below, float)
    value = float(a.sum() / b.sum())
    if len(a) < ENOUGH:
        return {name: value}
    error = mean((a - value * b) / b.mean())
    return {name: value, f"{name}_lo": value + error.low, f"{name}_hi": value + error.high, f"{name}_n": len(a)}


def exactness(m: Model, groups: Sequence[Group]) -> dict[str, Any]:
    """Whether the texts are plain decoding's under the tie rule (evals/ties.py), and a note where they are not the same to the letter."""
    cuts = [cut for g in groups for cut in g.cuts(m)]
    steady = all(run.steady for g in groups for run in g.runs.values())
    other = [cut for cut in cuts if cut is not None and not cut.tie]
    ties = sum(cut is not None and cut.tie for cut in cuts)
    notes = [f"{len(other)} of {len(cuts)} texts differ from plain decoding's"] if other else []
    notes += [f"{ties} of {len(cuts)} cut at a tie"] if ties else []
    notes += [] if steady else ["the text changed between rounds"]
    return {"exact": not other and steady, "note": "; ".join(notes)}
