"""An experiment that puts combinations of parts side by side on one text: quality, bytes, speed and the tokens each kept."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import jax
import numpy as np

from tokeff import calibration
from tokeff.calibration import Calibration
from tokeff.data import tasks
from tokeff.data.haystack import encoder
from tokeff.decode.draft import Drafter, Plain
from tokeff.errors import UserError
from tokeff.evals.cost import cost
from tokeff.evals.fidelity import Encoded, Quality, Reader, encode_example
from tokeff.evals.stats import better_than, mean
from tokeff.experiment import Experiment, Row
from tokeff.generation import Setup
from tokeff.kv.bounded import check_bounded
from tokeff.kv.budget import AtLeast, Budget
from tokeff.kv.policy import Full, Policy
from tokeff.kv.prefill import Prompt
from tokeff.listing import Method, find
from tokeff.models.fetch import cache_dir
from tokeff.models.load import Model, load
from tokeff.models.transformer import Pass
from tokeff.report.figures import Bars, Figure, Lines, Scatter
from tokeff.report.kept import Kept
from tokeff.sparse.pattern import Pattern

BASE, CHANCE = "Full", "Random"
ALIKE = 1.1  # so many times the bytes of random rows may a method use that is said to beat them


@dataclass(frozen=True)
class Line(Row):
    """One combination. `method` names a listed method; the parts are what is measured.

    calibrated: whether the method's search on the experiment's model stands in its part (tokeff/calibration.py). None until the experiment
    is settled, and for methods without such a search; False keeps the part as it is, True refuses a model without a calibration.
    """

    kv: Policy = field(default_factory=Full)
    cut: Pass | None = None
    decode: Drafter = field(default_factory=Plain)
    prefill: Pattern | None = None
    bounded: int | None = None
    calibrated: bool | None = None

    @property
    def setup(self) -> Setup:
        return Setup(self.kv, self.cut, self.decode, prefill=self.prefill, bounded=self.bounded)


def line(method: str, setting: str = "scaled", **settings: Any) -> Line:
    """The listed method alone, under its 'scaled' or its 'paper' settings, with these instead of some of them. An experiment puts what is
    calibrated for its model in the place of defaults."""
    found = find(method)
    return Line(method, **{found.part: found.build(**(found.settings(setting) | settings))})


def settled(rows: Sequence[Line], model: str) -> tuple[Line, ...]:
    """The rows under what is calibrated for this model, where something is; each says in `calibrated` whether it is."""
    name = calibration.name_of(model)
    found = calibration.read(name)
    return tuple(settled_row(row, find(row.method), found, name) for row in rows)


def settled_row(row: Any, listed: Method, found: Calibration | None, model: str) -> Any:
    """One row, of a kind that has the fields `method`, `calibrated` and that of the method's part."""
    if not listed.calibrates or row.calibrated is False:
        return row
    part = calibration.calibrated(listed, getattr(row, listed.part), found)
    if part is not None:
        return replace(row, calibrated=True, **{listed.part: part})
    if row.calibrated:
        raise UserError(f"no calibration of {row.method} for {model} that its row leaves room for; {calibration.remedy(model)}")
    return replace(row, calibrated=False)


def fitting(m: Model, rows: Sequence[Line], lengths: Sequence[int], new: int = 1) -> Model:
    """The model, once every row was found to fit it and texts of these lengths with `new` tokens behind them, and calibrations to be made
    with its weights."""
    if any(row.calibrated for row in rows) and (found := calibration.read(m.name)) is not None:
        found.check(m)
    for row in rows:
        try:
            row.setup.fit(m).check(m, lengths, new)
        except UserError as error:
            raise UserError(f"{row.method}: {error}") from error
    return m


class Bench:
    """The model, and per context length the text, its prefills and the reference figures; made when first needed."""

    def __init__(self, experiment: Comparison, m: Model):
        self.experiment, self.m = experiment, m
        self.readers: dict[int, Reader] = {}
        self.qualities: dict[Any, Quality] = {}
        self.greedy: dict[int, list[int]] = {}

    def reader(self, length: int) -> Reader:
        if length not in self.readers:
            example = tasks.make(self.experiment.task, self.experiment.seed, length, encoder(self.m.tok))
            self.readers[length] = Reader(self.m, encode_example(self.m, example))
        return self.readers[length]

    def quality(self, length: int, setup: Setup) -> Quality:
        """Drafters do not change what is generated, so combinations that differ in them only share this."""
        key = (length, setup.kv, setup.cut, setup.prefill, setup.bounded)
        if key not in self.qualities:
            alone = Setup(setup.kv, setup.cut, prefill=setup.prefill, bounded=setup.bounded)
            self.qualities[key] = self.reader(length).quality(alone.fit(self.m))
        return self.qualities[key]


@dataclass(frozen=True)
class Comparison(Experiment):
    """Every row on one text of `task` at each of `contexts`, and its decode speed alone at each of `speeds`."""

    rows: tuple[Line, ...]  # type: ignore[assignment]
    model: str = "smollm2-135m"
    """A preset, a folder, a repo id or a .gguf file."""
    task: str = "multi_question"
    """The synthetic task whose text and questions are used."""
    contexts: tuple[int, ...] = (2048,)
    """Context lengths in tokens at which everything is measured."""
    speeds: tuple[int, ...] = ()
    """Further context lengths at which only speed and bytes are measured."""
    timed: tuple[str, ...] = ()
    """The methods measured at `speeds`; all rows unless some are named. Each costs one more compiled decode loop."""
    new: int = 64
    """Greedy tokens generated and timed."""
    seed: int = 0
    """Which text and questions."""

    def settled(self) -> Comparison:
        return replace(self, rows=settled(self.rows, self.model))

    def check(self) -> None:
        for row in self.rows:
            row.setup.check_evidence()
            check_bounded(row.bounded, row.kv, row.cut, row.prefill)
        if BASE not in {row.method for row in self.rows}:
            raise UserError(f"a comparison needs the row {BASE!r} to compare with; add line({BASE!r})")
        rows = [row.method for row in self.rows]
        if unknown := next((name for name in self.timed if name not in rows), None):
            raise UserError(f"timed={unknown!r} is no row of this comparison; name some of {', '.join(rows)}")

    def keys(self) -> list[str]:
        whole = [f"{row.method}/{n}" for n in self.contexts for row in self.rows]
        timed = self.timed or [row.method for row in self.rows]
        return whole + [f"{name}/{n}/speed" for n in self.speeds for name in timed]

    def prepare(self) -> Bench:
        compile_cache()
        return Bench(self, fitting(load(self.model), self.rows, self.contexts + self.speeds, self.new))

    def measure(self, context: Bench, key: str) -> dict[str, Any]:
        method, length, *only = key.split("/")
        row = next(r for r in self.rows if r.method == method)
        figures = speed(context, row, int(length), self.new, pictures=not only)
        return figures if only else figures | quality(context, row, int(length), self.rows)

    def summary(self, rows: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        """As measured, but that only rows of about as many bytes as random ones can beat these."""
        chance = {row["context"]: row for row in rows if row["method"] == CHANCE}

        def fair(row: dict[str, Any]) -> dict[str, Any]:
            theirs = chance.get(row["context"])
            if theirs is None or comparable([row], [theirs]):
                return row
            return {name: value for name, value in row.items() if name != "beats_random"}

        return [fair(row) for row in rows]

    def report(self) -> tuple[Figure, ...]:
        return (
            Scatter("held", "kl", "Distance from the full cache against bytes held", log_y=True),
            Scatter("read", "kl", "Distance from the full cache against bytes read per step", log_y=True),
            Lines("context", "decode_tok_s", "Decoding speed against context length"),
            Bars("decode_tok_s", "Decoding speed", reference=BASE),
        )


def compile_cache() -> None:
    """Keep compiled programs on disk, so that a resumed run starts where it stopped."""
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def speed(bench: Bench, row: Line, length: int, new: int, pictures: bool) -> dict[str, Any]:
    """Bytes, seconds and kept tokens of one row."""
    m, setup, reader = bench.m, row.setup.fit(bench.m), bench.reader(length)
    listed = find(row.method)
    prompt, prefill_s = timed_prefill(reader, setup)
    ratios, timing, layers = cost(m, prompt, setup, new)
    figures: dict[str, Any] = {
        "method": row.method, "family": listed.family, "lossless": listed.lossless, "budgeted_by": listed.budgeted_by,
        "calibrated": row.calibrated, "budget": budget_of(row), "context": length,
        "held": ratios.held, "read": ratios.read, "peak": ratios.peak,
        "prefill_s": prefill_s, "decode_tok_s": timing.tokens_per_s, "tokens_per_pass": (len(timing.tokens) - 1) / timing.passes,
        "greedy_match": greedy_match(bench, length, row, timing.tokens),
    }  # fmt: skip
    if ratios.held >= 0.99 and ratios.read >= 0.99 and (figures["budget"] or 1.0) < 1:
        raise UserError(f"{row.method} held and read everything at a budget of {figures['budget']}; its settings are inactive here")
    if pictures:
        figures["kept"] = kept(m, reader.text, prompt, setup, layers)
    return figures


def greedy_match(bench: Bench, length: int, row: Line, tokens: list[int]) -> float:
    """Share of the continuation before its first token that differs from the full cache's."""
    if row.setup == Setup():
        bench.greedy[length] = tokens
    if length not in bench.greedy:  # the full cache was measured by an earlier, interrupted run
        full = Setup()
        bench.greedy[length] = cost(bench.m, bench.reader(length).context(full), full, len(tokens))[1].tokens
    same = np.asarray(tokens) == np.asarray(bench.greedy[length])
    return float(same.cumprod().mean())


def timed_prefill(reader: Reader, setup: Setup) -> tuple[Prompt, float]:
    """The context's prefill and its seconds, compiled code warm. Policies that want the same evidence share both."""
    prompt, key = jax.block_until_ready(reader.context(setup)), reader.key(setup)  # else the clock starts while it is still being made
    if key not in reader.seconds:
        start = time.perf_counter()
        jax.block_until_ready(reader.whole([reader.text.context], setup))
        reader.seconds[key] = time.perf_counter() - start
    return prompt, reader.seconds[key]


def budget_of(row: Line) -> float | None:
    """The budget of its pass, or of its policy or one inside that (the rule of what is coded, the heads that do not keep everything)."""
    budget = next((b for part in (row.cut, row.kv) if (b := budget_in(part)) is not None), None)
    return None if budget is None else float(budget.share if isinstance(budget, AtLeast) else budget)


def budget_in(part: Any) -> Budget | AtLeast | None:
    if (own := getattr(part, "budget", None)) is not None or not is_dataclass(part):
        return own
    inside = (getattr(part, f.name) for f in fields(part))
    return next((b for x in inside if isinstance(x, Policy) and (b := budget_in(x)) is not None), None)


def comparable(rows: Sequence[dict[str, Any]], chance: Sequence[dict[str, Any]]) -> bool:
    """Whether a method uses about as many bytes as random rows do, of the kind that it is budgeted by."""
    kind = rows[0].get("budgeted_by") or "held"
    mine, theirs = (float(np.mean([row[kind] for row in some])) for some in (rows, chance))
    return mine <= theirs * ALIKE


def kept(m: Model, text: Encoded, prompt: Prompt, setup: Setup, layers) -> Kept:
    """The rows that each layer's queries may still read after the prompt, as places in the text."""
    found = []
    for layer in layers:
        order = np.asarray(setup.kv.kept(layer))[0]
        if prompt.place_BM is not None:
            place = np.asarray(prompt.place_BM)[0]
            order = np.where((order >= 0) & (order < len(place)), place[np.clip(order, 0, len(place) - 1)], -1)
        found.append(order)
    return Kept(found, tuple(m.tok.decode([t]) for t in text.context), text.needles)


def quality(bench: Bench, row: Line, length: int, rows: tuple[Line, ...]) -> dict[str, Any]:
    """Answers, loss and distance from the full cache of one row, with intervals."""
    base = bench.quality(length, next(r for r in rows if r.method == BASE).setup)
    mine = bench.quality(length, row.setup)
    kl, n = mean(mine.kl(base)), len(mine.exact)
    loss, answer, top1 = mean(mine.nll), mean(mine.logprob), mean(mine.top1(base))
    figures: dict[str, Any] = {
        "needles_exact": int(mine.exact.sum()), "n": n, "answer_logprob": answer.value,
        "answer_logprob_lo": answer.low, "answer_logprob_hi": answer.high,
        "loss": loss.value, "loss_lo": loss.low, "loss_hi": loss.high, "loss_n": loss.n,
        "kl": kl.value, "kl_lo": kl.low, "kl_hi": kl.high, "kl_n": kl.n, "top1_agree": top1.value,
    }  # fmt: skip
    chance = next((r for r in rows if r.method == CHANCE), None)
    if chance is not None and row.method not in (BASE, CHANCE):
        theirs = bench.quality(length, chance.setup).kl(base)
        figures["beats_random"] = better_than(mine.kl(base), theirs, higher_is_better=False).better
    return figures
