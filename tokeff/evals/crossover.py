"""From which context length on does a method pay? Seconds of one decode step, next to dense decoding's, on random rows.

Nothing is prefilled: speed does not depend on what rows hold, but of methods that work harder when queries change (TokenSelect) or scores
are level (SpAttenCache), which random rows make work all the time. Each measurement times a method, dense decoding and `Recent` (rows
of as many bytes, with nothing to decide) in turns. Between two lengths a step's seconds are taken as a straight line: it reads weights,
which do not grow, and rows, which do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from tokeff.bench import common
from tokeff.bench.decode import Loop
from tokeff.compat import forget_programs
from tokeff.decode.draft import Plain
from tokeff.errors import UserError
from tokeff.evals.comparison import BASE, Line, budget_of, compile_cache, fitting, settled
from tokeff.evals.cost import dense_bytes
from tokeff.experiment import Experiment
from tokeff.kv.keep import Keep
from tokeff.kv.score import Recency
from tokeff.listing import find
from tokeff.models.load import Model, load
from tokeff.report.figures import Bars, Figure

NEVER, ALWAYS, LEVEL = "never", "always", "≈ dense"


@dataclass(frozen=True)
class Crossover(Experiment):
    """Every cache policy at each of `contexts` (two or more lengths)."""

    rows: tuple[Line, ...]  # type: ignore[assignment]
    model: str = "smollm2-135m"
    """A preset, a folder, a repo id or a .gguf file."""
    contexts: tuple[int, ...] = (1024, 8192)
    """Cached rows at which a step is timed."""
    tokens: int = 16
    """Steps of each timing."""
    rounds: int = 5
    """How often each is timed."""

    def settled(self) -> Crossover:
        return replace(self, rows=settled(self.rows, self.model))

    def check(self) -> None:
        if len(self.contexts) < 2:
            raise UserError(f"contexts {self.contexts} make no line; give two lengths or more")
        for row in self.rows:
            if row.setup.cut is not None or row.setup.prefill is not None:
                raise UserError(f"{row.method} acts on the prompt and not on decoding; leave it out")
            if row.bounded is not None or row.setup.decode != Plain():
                raise UserError(f"{row.method} is timed on rows that are there, one row a step; leave out bounded and decode")

    def identity(self) -> Crossover:
        return Crossover(self.name, (), self.model, self.contexts, self.tokens, self.rounds)

    def stands(self, measured: dict[str, Any]) -> bool:
        return any(measured.get("settings") == repr(row) for row in self.rows)

    def keys(self) -> list[str]:
        return [f"{row.method}/{n}" for n in self.contexts for row in self.rows]

    def prepare(self) -> Timed:
        compile_cache()
        return Timed(self, fitting(load(self.model), self.rows, self.contexts[:1]))  # rows of longer ones are made up

    def measure(self, context: Timed, key: str) -> dict[str, Any]:
        name, length = key.split("/")
        row = next(row for row in self.rows if row.method == name)
        return context.figures(row, int(length)) | {"settings": repr(row)}

    def summary(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """A line a measurement, the longest contexts first; theirs say where a method starts to pay."""
        last = longest(rows)
        there = {(row["method"], row["context"]) for row in last}
        return [*last, *(row for row in rows if (row["method"], row["context"]) not in there)]

    def report(self) -> tuple[Figure, ...]:
        return (
            Bars("of_dense", "Speed of decoding, dense decoding = 1", reference=BASE),
            Bars("overhead_ms", "Milliseconds of a step beyond reading as many bytes and deciding nothing"),
        )


def longest(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every method at its longest context, and from which context on it pays."""
    rows = sorted(rows, key=lambda row: row["context"])
    first, last = ({row["method"]: row for row in some} for some in (reversed(rows), rows))
    return [row | ({} if name == BASE else {"pays_from": pays_from(first[name], row)}) for name, row in last.items()]


def pays_from(short: dict[str, Any], long: dict[str, Any]) -> str:
    """The context length from which a step is faster than dense decoding's, on straight lines through two lengths; '>n' where that lies
    beyond the longer one, n, and 'below n' for what is faster up to there only. Level where rounds disagree at both lengths."""
    if all(row.get("rounds") and min(row["rounds"]) <= 1 <= max(row["rounds"]) for row in (short, long)):
        return LEVEL
    (a, b), gain = (short["context"], long["context"]), [row["dense_ms"] - row["step_ms"] for row in (short, long)]
    slope = (gain[1] - gain[0]) / (b - a) if b > a else 0.0
    if slope == 0 or min(gain) > 0 or max(gain) <= 0 > slope:  # no length changes who is faster
        return ALWAYS if min(gain) > 0 else NEVER
    level = a - gain[0] / slope
    if slope < 0:
        return f"below {level:.0f}"
    return ALWAYS if gain[0] >= 0 else f">{b}" if level > b else f"{level:.0f}"


@dataclass(eq=False)
class Timed:
    """The model, and the loops of the context being measured that every method is timed with."""

    experiment: Crossover
    m: Model
    length: int = 0
    dense: Loop | None = None
    recent: dict[float, Loop] = field(default_factory=dict)

    def loop(self, row: Line, length: int) -> Loop:
        return Loop(self.m, row.kv, length, self.experiment.tokens)

    def figures(self, row: Line, length: int) -> dict[str, Any]:
        forget_programs()
        if self.length != length or self.dense is None:
            self.length, self.dense, self.recent = length, self.loop(Line(BASE), length), {}
        mine = self.loop(row, length)
        share = round(mine.read / dense_bytes(self.m.cfg, length, self.m.precision.cache), 2)
        if share < 0.95 and share not in self.recent:  # how long it takes to read so many rows and decide nothing
            self.recent[share] = self.loop(Line("Recent", kv=Keep(max(share, 0.01), Recency())), length)
        timers = {"mine": mine, "dense": self.dense, "recent": self.recent.get(share, self.dense), **common.reads()}
        seconds = common.interleave(timers, self.experiment.rounds)
        return self.row(row, length, mine, seconds)

    def row(self, row: Line, length: int, mine: Loop, seconds: dict[str, list[float]]) -> dict[str, Any]:
        listed, step = find(row.method), seconds["mine"]
        floor = (common.weight_bytes(self.m) + mine.read) / common.bandwidth(seconds)
        return {
            "method": row.method, "family": listed.family, "lossless": listed.lossless, "budgeted_by": listed.budgeted_by,
            "calibrated": row.calibrated, "budget": budget_of(row), "context": length,
            "step_ms": 1e3 * median(step), "dense_ms": 1e3 * median(seconds["dense"]),
            "decode_tok_s": 1 / median(step), "of_dense": common.ratio(seconds["dense"], step),
            "rounds": [a / b for a, b in zip(seconds["dense"], step, strict=True)], "of_floor": floor / median(step),
            "read": mine.read / dense_bytes(self.m.cfg, length, self.m.precision.cache),
            "overhead_ms": 1e3 * (median(step) - median(seconds["recent"])), "slowest_of_fastest": max(step) / min(step),
        }  # fmt: skip
