"""The tie rule: when two greedy texts that rounding may part count as equal.

Float32 logits of a pass over one row and of a pass over many differ by about 5e-5. So a text may leave plain decoding's at a place where
the two best logits of plain decoding are closer than `MARGIN`, and is compared up to there. In a set of prompts at most `CUT_SHARE` of the
texts may be cut so; one that is cut where they are further apart is another text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.generation import pad
from tokeff.kv.cache import Room
from tokeff.kv.extend import extend, pack
from tokeff.kv.policy import Full, Policy
from tokeff.kv.prefill import Prompt
from tokeff.models.load import Model

MARGIN = 1e-3
CUT_SHARE = 0.02
FULL = Full()


@dataclass(frozen=True)
class Cut:
    """Where drafted and plain text part, and how far apart plain decoding's two best logits are there."""

    at: int
    margin: float

    @property
    def tie(self) -> bool:
        """Whether rounding explains it."""
        return self.margin < MARGIN


def margins(m: Model, prompt: Prompt, texts: Sequence[Sequence[int]], new: int, kv: Policy = FULL) -> list[np.ndarray]:
    """For each sequence the distance of the two best logits at every generated place, from one teacher-forced pass over plain decoding's
    tokens (at most `new` each)."""
    layers = pack(kv, prompt.layers, Room(new), m.cfg)
    forced, length = pad(texts, new)
    logits, _ = extend(m.params, m.cfg, layers, forced, prompt.next_B, length, kv)
    best = jax.lax.top_k(jnp.concatenate([prompt.logits_BV[:, None], logits[:, : new - 1]], axis=1), 2)[0]
    apart = np.asarray(best[..., 0] - best[..., 1])
    return [row[: len(text)] for row, text in zip(apart, texts, strict=True)]


def cut_of(tokens: Sequence[int], true: Sequence[int], margin: np.ndarray) -> Cut | None:
    """None for equal texts, else where they part. Beyond the end of plain decoding's text the margin is infinite."""
    tokens, true = list(tokens), list(true)
    if tokens == true:
        return None
    at = next(i for i in range(max(len(tokens), len(true))) if tokens[i : i + 1] != true[i : i + 1])
    return Cut(at, float(margin[at]) if at < len(margin) else float("inf"))
