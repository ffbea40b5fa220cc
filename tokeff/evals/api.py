"""`evaluate`: one combination of parts on one task, against the full cache, in one call."""

from __future__ import annotations

from typing import Any

import numpy as np

from tokeff.data import tasks
from tokeff.data.haystack import encoder
from tokeff.errors import UserError
from tokeff.evals.fidelity import Reader, encode_example
from tokeff.evals.stats import RANKED_AT, Interval, bootstrap_mean, mean, proportion
from tokeff.generation import Setup
from tokeff.kv.policy import Full, Policy
from tokeff.models.load import Model
from tokeff.models.transformer import Pass
from tokeff.sparse.pattern import Pattern


def evaluate(
    m: Model,
    kv: Policy | None = None,
    *,
    cut: Pass | None = None,
    prefill: Pattern | None = None,
    bounded: int | None = None,
    task: str = "multi_question",
    length: int = 2048,
    n: int = 4,
    seed: int = 0,
) -> dict[str, Any]:
    """Quality of a policy and a pass on `n` texts of `length` tokens; every figure is an `Interval` that carries its n.

    exact: share of questions answered exactly (`full_exact`: by the full cache). logprob: of the right answer, nats. loss: nats per
    held-out token. kl: from the full cache, nats per token; top1: how often both prefer the same token. ranked_by: the figure that
    may be used to rank methods at this task and length. Drafters are lossless and need no evaluation of quality.
    """
    if n < 1:
        raise UserError(f"n={n} texts measure nothing; give at least 1")
    setup, full = Setup(Full() if kv is None else kv, cut, prefill=prefill, bounded=bounded), Setup()
    setup.check(m, [length], tasks.HELD_OUT)
    setup = setup.fit(m)
    mine, base = [], []
    for i in range(n):
        reader = Reader(m, encode_example(m, tasks.make(task, seed + i, length, encoder(m.tok))))
        mine.append(reader.quality(setup))
        base.append(mine[-1] if setup == full else reader.quality(full))
    exact, full_exact = (np.concatenate([q.exact for q in qs]) for qs in (mine, base))
    figures: dict[str, Any] = {
        "loss": per_text([q.nll for q in mine]),
        "kl": per_text([q.kl(b) for q, b in zip(mine, base, strict=True)]),
        "top1": per_text([q.top1(b) for q, b in zip(mine, base, strict=True)]),
        "ranked_by": "kl",
    }
    if len(exact):
        figures |= {"exact": proportion(exact), "full_exact": proportion(full_exact)}
        figures["logprob"] = mean(np.concatenate([q.logprob for q in mine]))
        figures["ranked_by"] = "exact" if full_exact.mean() >= RANKED_AT else "logprob"
    return figures


def per_text(values: list[np.ndarray]) -> Interval:
    """Tokens of one text depend on each other: the text is the row, unless there is only one."""
    return bootstrap_mean(values[0]) if len(values) == 1 else mean([float(v.mean()) for v in values])
