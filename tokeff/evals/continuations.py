"""Short prompts and their greedy continuations: prefilled once, decoded and timed under any drafter."""

from __future__ import annotations

import time
from collections.abc import Sequence

import jax
import numpy as np

from tokeff.data import sources
from tokeff.errors import UserError, nearest
from tokeff.generation import Setup, go, new_tokens, pad, start
from tokeff.kv.evidence import Evidence
from tokeff.kv.prefill import Prompt, prefill
from tokeff.models.load import Model

LONGEST = 192
"""Prompts are padded to this, so that all of them share compiled code; a chat template adds some forty tokens to the 128."""
COPY_HEAVY = "copy-heavy"
CLASSES = (COPY_HEAVY, "code", "prose", "chat", "summarise")


def of_class(name: str) -> tuple[sources.Prompt, ...]:
    """The committed prompts of a class, in a fixed order. UserError for an unknown one."""
    if name not in CLASSES:
        raise UserError(f"no prompt class {name!r}; {nearest(name, CLASSES)}")
    return sources.copy_heavy() if name == COPY_HEAVY else sources.prompts(name)


def ids(m: Model, prompt: sources.Prompt) -> list[int]:
    """Token ids of a prompt; what a user says goes through the chat template."""
    return m.tok.encode(m.tok.chat([{"role": "user", "content": prompt.text}]) if prompt.said else prompt.text)


def read(m: Model, tokens: Sequence[Sequence[int]], evidence: tuple[Evidence, ...] = ()) -> Prompt:
    """The dense prefill of some prompts, which every decoder starts from. evidence: what the policy wants to know."""
    padded, length = pad(tokens, max(LONGEST, *map(len, tokens)))
    return prefill(m.params, m.cfg, padded, length, evidence=evidence, dtype=m.precision.cache)


class Continuation:
    """Prompts read together, under one setup. Calling it decodes them greedily and returns the seconds without the prefill.

    texts: the new tokens of each sequence, passes: the model's passes until each was done, both of the last call. steady: whether all calls
    gave the same text.
    """

    def __init__(self, m: Model, prompt: Prompt, setup: Setup, new: int, passes: int | None = None):
        """At most `new` tokens and, where that is given, so many passes."""
        self.m, self.prompt, self.setup, self.new, self.steps = m, prompt, setup, new, passes or new
        self.texts: list[list[int]] = []
        self.passes: list[int] = []
        self.steady = True

    def __call__(self) -> float:
        s = jax.block_until_ready(start(self.m, self.prompt, self.setup, self.new, eos=self.m.cfg.eos))
        begun = time.perf_counter()
        s = jax.block_until_ready(go(self.m, s, self.setup, self.steps, self.m.cfg.eos))
        took = time.perf_counter() - begun
        texts = new_tokens(s)
        self.steady = self.steady and self.texts in ([], texts)
        self.texts, self.passes = texts, np.asarray(s.passes_B).tolist()
        return took

    @property
    def committed(self) -> list[int]:
        """Tokens of each sequence that passes committed: the first one came from the prompt's own logits."""
        return [len(text) - 1 for text in self.texts]
