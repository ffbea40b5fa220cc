"""`tokeff bench patterns`: seconds to read a prompt under each sparse prefill, next to a dense one, and from which length on it pays.

What a pattern reads is counted while it reads. It saves attention alone, so its bound is what the rest of a pass takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import jax.numpy as jnp

from tokeff.bench import common
from tokeff.bench.common import Timer, interleave, ratio
from tokeff.data import tasks
from tokeff.data.haystack import encoder
from tokeff.errors import UserError, nearest
from tokeff.evals.comparison import Line, line, settled
from tokeff.evals.cost import pattern_read
from tokeff.evals.crossover import ALWAYS, NEVER
from tokeff.evals.fidelity import encode_example
from tokeff.kv.prefill import prefill
from tokeff.listing import methods
from tokeff.models.load import Model

CONTEXTS = (2048, 8192)
DENSE = "dense"
PATTERNS = tuple(m.name for m in methods() if m.part == "prefill" and not m.build(**m.settings()).own_pass)
SHOWN = ("method", "context", "seconds", "dense_seconds", "of_dense", "prompt_read", "pays_from")


def rows(m: Model, contexts: Sequence[int], names: Sequence[str], *, rounds: int = 3) -> list[dict[str, Any]]:
    """One row a context and pattern, on real text. All take turns with a dense prefill of the same rows."""
    lines = settled([line(name) for name in names], m.name)
    found = [row for context in contexts for row in at(m, context, lines, rounds)]
    for row in found:
        row["pays_from"] = pays_from([other for other in found if other["method"] == row["method"]])
    return found


def at(m: Model, context: int, lines: Sequence[Line], rounds: int) -> list[dict[str, Any]]:
    """The rows of one context."""
    tokens = jnp.asarray([text(m, context)], jnp.int32)
    length = jnp.array([context], jnp.int32)

    def timer(pattern) -> Timer:
        return common.timed(lambda: prefill(m.params, m.cfg, tokens, length, dtype=m.precision.cache, pattern=pattern))

    timers = {DENSE: timer(None)} | {row.method: timer(row.prefill) for row in lines}
    seconds = interleave(timers, rounds, f"prefill {context}")
    return [
        {
            "method": row.method, "context": context, "calibrated": row.calibrated, "seconds": median(seconds[row.method]),
            "dense_seconds": median(seconds[DENSE]), "of_dense": ratio(seconds[DENSE], seconds[row.method]),
            "prompt_read": row.prefill and pattern_read(m, row.prefill, tokens, length), "rounds": rounds,
        }
        for row in lines
    ]  # fmt: skip


def text(m: Model, context: int) -> list[int]:
    """So many tokens of the committed prose, with a sentence hidden in them."""
    return list(encode_example(m, tasks.make("single_needle", 0, context, encoder(m.tok))).context[:context])


def pays_from(of: Sequence[dict[str, Any]]) -> str:
    """The first measured context from which on a pattern is faster than dense at every longer one."""
    of = sorted(of, key=lambda row: row["context"])
    faster = [row["of_dense"] > 1 for row in of]
    if all(faster):
        return ALWAYS
    return NEVER if not faster[-1] else str(of[len(faster) - faster[::-1].index(False)]["context"])


def main(args: list[str]) -> None:
    """Command line."""
    p = common.parser("patterns", "Prefill seconds of every sparse prefill, next to a dense one.", rounds=3)
    common.model_options(p, CONTEXTS, peer=False)
    p.add_argument("--methods", nargs="+", default=list(PATTERNS), help=f"which (default: {' '.join(PATTERNS)})")
    known = p.parse_args(args)
    for name in known.methods:
        if name not in PATTERNS:
            raise UserError(f"{name!r} is no sparse prefill that reads blocks; {nearest(name, PATTERNS)}")
    common.check_out(known.out)
    m = common.open_model(known.model, known.contexts)
    common.finish("patterns", rows(m, known.contexts, known.methods, rounds=known.rounds), known.out, args, SHOWN)
