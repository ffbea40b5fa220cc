"""Many methods at several budgets on several texts: one measurement a (method, budget, batch of texts), averaged for the table.

Texts are prefilled once for all methods that can share a prefill. What is measured is quality and bytes; seconds are
`tokeff bench`'s and `Comparison`'s, because a leaderboard runs for hours on a machine that does other things.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tokeff.compat import forget_programs
from tokeff.data import tasks
from tokeff.data.haystack import encoder
from tokeff.errors import UserError
from tokeff.evals.comparison import BASE, CHANCE, Line, budget_of, comparable, compile_cache, fitting, line, settled
from tokeff.evals.cost import dense_bytes, pattern_read, read_bytes
from tokeff.evals.crossover import longest
from tokeff.evals.fidelity import Encoded, Quality, Reader, encode_example
from tokeff.evals.stats import RANKED_AT, Interval, bootstrap_mean, mean, paired_difference
from tokeff.experiment import Experiment
from tokeff.generation import Setup
from tokeff.kv.bounded import check_bounded
from tokeff.kv.extend import pack
from tokeff.kv.policy import tree_bytes
from tokeff.listing import Method, find
from tokeff.models.load import Model, load
from tokeff.report.figures import Curves, Figure, Scatter
from tokeff.report.folder import RunFolder


def entries(methods: Sequence[Method], budgets: Sequence[float]) -> tuple[Line, ...]:
    """Every budgeted method at every budget, every other one once, each at its default settings otherwise."""
    given: list[tuple[Method, dict[str, Any]]] = [
        (m, {"budget": b} if m.budgeted_by else {}) for m in methods for b in (budgets if m.budgeted_by else budgets[:1])
    ]
    return tuple(line(m.name, **settings) for m, settings in given)


@dataclass(frozen=True)
class Batch:
    """`n` texts of one task and length, read together; `seed` is the first."""

    task: str
    length: int
    n: int = 4
    seed: int = 0
    ahead: int = 64
    """Tokens of the text's continuation on which loss and divergence are measured."""
    turns: bool = False
    """Whether the questions are also asked one after another, each behind the right answers to those before it."""


@dataclass(frozen=True)
class Leaderboard(Experiment):
    """Every row on every batch of texts, all against the full cache on the same texts. One measurement is a row on a batch.

    Rows may be added later: what was measured with the same settings stays.
    """

    rows: tuple[Line, ...]  # type: ignore[assignment]
    model: str = "smollm2-135m"
    """A preset, a folder, a repo id or a .gguf file."""
    batches: tuple[Batch, ...] = (Batch("multi_question", 2048),)
    """What is read."""
    own: tuple[float, ...] = (0.25,)
    """Budgets of rows with a prefill of their own, which cannot share the dense one."""
    speeds: str | None = None
    """The folder of a run of configs/leaderboard/kv_speed.py: what it measured stands beside rows of the same budget, if it is there."""

    def settled(self) -> Leaderboard:
        return replace(self, rows=settled(self.rows, self.model))

    def check(self) -> None:
        for row in self.rows:
            row.setup.check_evidence()
            check_bounded(row.bounded, row.kv, row.cut, row.prefill)
        if BASE not in {row.method for row in self.rows}:
            raise UserError(f"a leaderboard needs the row {BASE!r} to compare with; add line({BASE!r})")

    def identity(self) -> Leaderboard:
        return replace(self, rows=(), speeds=None)

    def stands(self, measured: dict[str, Any]) -> bool:
        return any(measured.get("settings") == repr(row) for row in self.rows)

    def keys(self) -> list[str]:
        """Batch by batch, so that an interrupted run has whole batches and every text is prefilled once."""
        return [f"{name_of(row)}/{i}" for i in range(len(self.batches)) for row in self.rows if self.affords(row)]

    def affords(self, row: Line) -> bool:
        """Whether a row is measured: those with a prefill of their own are at some budgets only."""
        return row.cut is None or budget_of(row) in (None, *self.own)

    def prepare(self) -> Shelf:
        compile_cache()
        lengths, ahead = sorted({batch.length for batch in self.batches}), max(batch.ahead for batch in self.batches)
        return Shelf(self, fitting(load(self.model), self.rows, lengths, ahead))

    def measure(self, context: Shelf, key: str) -> dict[str, Any]:
        forget_programs()
        name, i = key.rsplit("/", 1)
        row, batch = next(r for r in self.rows if name_of(r) == name), self.batches[int(i)]
        found = context.at(batch).figures(row)
        return found | {"task": batch.task, "context": batch.length, "batch": int(i), "settings": repr(row)}

    def summary(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """One line a method, budget and length: means over its texts, with intervals over texts. Answers are those to tasks that the full
        cache masters at that length; those to the others have a column of their own."""
        groups: dict[tuple, list[dict[str, Any]]] = {}
        for row in rows:
            groups.setdefault((row["method"], row["budget"], row["context"]), []).append(row)
        chance, mastered = {(k[1], k[2]): g for k, g in groups.items() if k[0] == CHANCE}, ranked(rows)
        found = [averaged(group, chance.get((k[1], k[2])), mastered) for k, group in sorted(groups.items(), key=lambda g: g[0][2])]
        times = timed(self.speeds)
        return [row | times.get((row["method"], row["budget"]), {}) for row in found]

    def report(self) -> tuple[Figure, ...]:
        return (
            Curves("held", "kl", "Distance from the full cache against bytes held", log_y=True),
            Curves("read", "kl", "Distance from the full cache against bytes read per step", log_y=True),
            Scatter("of_dense", "kl", "Distance from the full cache against speed, dense decoding = 1", log_y=True),
            Curves("held", "answer_logprob", "Log-likelihood of the right answer against bytes held, question known", high=True),
            Curves("held", "later_logprob", "The same, question asked after the context was compressed", high=True),
            Curves("held", "turns_logprob", "The same, questions asked one after another, with their answers between them", high=True),
        )


def name_of(row: Line) -> str:
    budget = budget_of(row)
    return row.method if budget is None else f"{row.method}@{budget:g}"


@dataclass(eq=False)
class Shelf:
    """The model and the texts being measured; only one batch is held at a time."""

    experiment: Leaderboard
    m: Model
    batch: Batch | None = None
    texts: Texts | None = None

    def at(self, batch: Batch) -> Texts:
        if self.batch != batch or self.texts is None:
            self.texts = None  # its prefills go before the next ones come
            made = [tasks.make(batch.task, batch.seed + i, batch.length, encoder(self.m.tok)) for i in range(batch.n)]
            wanted = tuple(dict.fromkeys(kind for row in self.experiment.rows for kind in row.kv.needs() if row.setup == Setup(row.kv)))
            reader = Reader(self.m, *(ahead(encode_example(self.m, example), batch.ahead) for example in made), evidence=wanted)
            self.batch, self.texts = batch, Texts(self.m, reader, batch.turns)
        return self.texts


def ahead(text: Encoded, most: int) -> Encoded:
    """The text with no more than so many tokens held out."""
    return replace(text, held_out=text.held_out[:most])


@dataclass(eq=False)
class Texts:
    """A batch of texts with its shared prefills and what the full cache makes of it."""

    m: Model
    reader: Reader
    turns: bool = False
    full: list[Quality] = field(default_factory=list)

    def base(self) -> list[Quality]:
        if not self.full:
            self.full = self.reader.qualities(Setup())
        return self.full

    def figures(self, row: Line) -> dict[str, Any]:
        """Quality and bytes of one row on these texts; what differs by text is a list."""
        setup, listed, base = row.setup.fit(self.m), find(row.method), self.base()
        mine = base if setup == Setup() else self.reader.qualities(setup)
        whole = setup.cut is None and bool(self.reader.text.answers)
        later, turns = (ask(setup) if do else None for ask, do in ((self.reader.later, whole), (self.reader.turns, whole and self.turns)))
        prompt = self.reader.context(setup)
        layers = pack(setup.kv, prompt.layers, setup.room(len(self.reader.text.held_out)), self.m.cfg)
        dense = dense_bytes(self.m.cfg, int(prompt.length_B.sum()), self.m.precision.cache)
        held, read = tree_bytes(layers) / dense, read_bytes(setup, layers, self.m.cfg) / dense
        if min(held, read) >= 0.99 and (budget_of(row) or 1.0) < 1:
            raise UserError(f"{row.method} held and read everything at a budget of {budget_of(row)}; its settings are inactive here")
        return {
            "method": row.method, "family": listed.family, "lossless": listed.lossless, "budgeted_by": listed.budgeted_by,
            "calibrated": row.calibrated, "budget": budget_of(row), "held": held, "read": read, "exact": [int(q.exact.sum()) for q in mine],
            "full_exact": [int(q.exact.sum()) for q in base], "asked": [len(q.exact) for q in mine],
            "answer_logprob": [float(q.logprob.mean()) if len(q.logprob) else None for q in mine],
            **asked_later("later", later), **asked_later("turns", turns),
            "prefill_read": setup.prefill and pattern_read(self.m, setup.prefill, prompt.tokens_BT, prompt.length_B),
            "loss": [float(q.nll.mean()) for q in mine],
            "kl": [float(q.kl(b).mean()) for q, b in zip(mine, base, strict=True)],
            "top1_agree": [float(q.top1(b).mean()) for q, b in zip(mine, base, strict=True)],
        }  # fmt: skip


def asked_later(name: str, texts: list[list[tuple[float, float]]] | None) -> dict[str, Any]:
    """Of each text how many answers are right, and their mean log-probability; None where nothing was asked."""
    if not texts:
        return {f"{name}_exact": None, f"{name}_logprob": None}
    exact = [int(sum(e for e, _ in of)) for of in texts]
    return {f"{name}_exact": exact, f"{name}_logprob": [float(np.mean([p for _, p in of])) if of else None for of in texts]}


def timed(folder: str | None) -> dict[tuple[str, float | None], dict[str, Any]]:
    """{(method, budget): what a run of configs/leaderboard/kv_speed.py measured at its longest context}; nothing without such a run."""
    if folder is None or not RunFolder(folder).exists():
        return {}
    told = ("of_dense", "of_floor", "overhead_ms", "pays_from")
    return {(row["method"], row["budget"]): {name: row[name] for name in told if name in row} for row in longest(RunFolder(folder).rows())}


def ranked(rows: Sequence[dict[str, Any]]) -> set[tuple[str, int]]:
    """(task, length) of those whose questions the full cache answers often enough for exact answers to rank methods."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["task"], row["context"]), []).append(row)
    return {at for at, of in found.items() if sum(flat(of, "full_exact")) >= RANKED_AT * sum(flat(of, "asked"))}


def averaged(rows: list[dict[str, Any]], chance: list[dict[str, Any]] | None, mastered: set[tuple[str, int]]) -> dict[str, Any]:
    """The batches of one method, budget and length as one line. mastered: as of `ranked`."""
    keep = ("method", "family", "lossless", "calibrated", "budgeted_by", "budget", "context", "measured_at")
    found = {name: rows[0][name] for name in keep if name in rows[0]}
    found |= {name: float(np.mean([row[name] for row in rows])) for name in ("held", "read")}
    found |= {"commits": sorted({row.get("commit") or "" for row in rows}), "dirty": any(row.get("dirty") for row in rows)}
    if rows[0].get("prefill_read") is not None:
        found["prefill_read"] = float(np.mean([row["prefill_read"] for row in rows]))
    found |= {"measured_s": sum(row.get("measured_s") or 0 for row in rows), "top1_agree": float(np.mean(flat(rows, "top1_agree")))}
    found |= means(rows, "kl") | means(rows, "loss") | answers([row for row in rows if (row["task"], row["context"]) in mastered])
    found |= means([row for row in rows if (row["task"], row["context"]) not in mastered], "answer_logprob", "hard_logprob")
    if rows[0]["family"] != "baseline" and chance and comparable(rows, chance):
        theirs = {(row["batch"], b): kl for row in chance for b, kl in enumerate(row["kl"])}
        both = [(kl, theirs[row["batch"], b]) for row in rows for b, kl in enumerate(row["kl"]) if (row["batch"], b) in theirs]
        if len(both) > 1:
            found["beats_random"] = paired_difference([mine for mine, _ in both], [theirs for _, theirs in both]).high < 0
    return found


def answers(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What was answered, with the question known when the context was compressed, and with questions that came later."""
    if not sum(flat(rows, "asked")):
        return {}
    found = {"needles_exact": sum(flat(rows, "exact")), "n": sum(flat(rows, "asked")), "full_exact": sum(flat(rows, "full_exact"))}
    for name in ("later", "turns"):  # not of a pass; in turns on some texts only
        if asked := [row for row in rows if row.get(f"{name}_exact") is not None]:
            exact, n = sum(flat(asked, f"{name}_exact")), sum(flat(asked, "asked"))
            found |= {f"{name}_exact": exact, f"{name}_exact_n": n, f"{name}_logprob": float(np.mean(flat(asked, f"{name}_logprob")))}
    return found | means(rows, "answer_logprob")


def means(rows: list[dict[str, Any]], name: str, called: str = "") -> dict[str, Any]:
    """The mean of a figure over texts, with its interval where there are several; nothing where no text has it."""
    if not (values := flat(rows, name)):
        return {}
    value, called = over_texts(values), called or name
    ends = {f"{called}_lo": value.low, f"{called}_hi": value.high, f"{called}_n": value.n} if value.n > 1 else {}
    return {called: value.value} | ends


def flat(rows: list[dict[str, Any]], name: str) -> list[Any]:
    """One figure of every text of these batches; texts without it (no question asked) are left out."""
    return [x for row in rows for x in row[name] if x is not None]


def over_texts(values: list[float]) -> Interval:
    """Texts are the rows; from ten on their distribution speaks for itself."""
    return bootstrap_mean(values) if len(values) >= 10 else mean(values)
