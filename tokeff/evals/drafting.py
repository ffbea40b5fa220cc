"""What drafting gains, and why: tokens a pass, seconds, and what a pass of that width costs, each drafter beside plain decoding.

Every measurement decodes prompts of one class under one drafter and, in turns with it, by plain decoding and by a chain of as many drafts
that are wrong. So ratios hold whatever else the machine does, the chain gives T(n), and what a pass takes beyond T(n) is the draft's cost.

    MAT         committed tokens / passes of the target; plain decoding has 1
    of_dense    plain decoding's seconds a token with the full cache / the drafter's
    T(n)/T(1)   a pass over n rows by one over a single row, n the drafter's nodes; the same batch and cache
    draft_ms    milliseconds of a pass beyond T(n); below zero where drafting does a part of the pass, or passes are narrower than n
    break_even  the T(n)/T(1) below which it is faster than plain decoding (evals/machines.py)

A batch is read together and ends with its longest text; MAT counts each sequence's own passes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from inspect import Parameter
from typing import Any

from tokeff import calibration
from tokeff.bench import common, verify_cost
from tokeff.bench.verify_cost import Chain
from tokeff.compat import forget_programs
from tokeff.decode.draft import Drafter, Plain
from tokeff.decode.draft_model import OwnModel
from tokeff.errors import UserError
from tokeff.evals import machines
from tokeff.evals.comparison import compile_cache, settled_row
from tokeff.evals.continuations import CLASSES, LONGEST, Continuation, ids, of_class, read
from tokeff.evals.machines import MACHINES, Work
from tokeff.evals.speedup import DENSE, MINE, PLAIN, WRONG, Group, exactness, speeds
from tokeff.experiment import Experiment, Row
from tokeff.generation import Setup
from tokeff.kv.evidence import Evidence
from tokeff.kv.policy import Full, Policy
from tokeff.kv.prefill import Prompt
from tokeff.listing import Method, find
from tokeff.models.load import Model, fingerprint, load
from tokeff.report.figures import Figure, Panels, Payoff

CURVE = "verify-cost"


@dataclass(frozen=True)
class Drafted(Row):
    """One drafter. `method` is its name in the report, so several settings of one method have names of their own.

    listed: the listed method that it is, "" for a drafter of one's own. calibrated: as in `Line`, once the experiment is settled.
    classes: prompt classes, None for the experiment's. prompts: how many of each, None for the experiment's. batches: batch sizes; those
    above 1 take the first prompts of the experiment's `batched` classes. given: what a drafter that runs a draft model is made of, once
    the experiment knows that model; `weights` is then the fingerprint of the draft model's.
    """

    decode: Drafter = field(default_factory=Plain)
    kv: Policy = field(default_factory=Full)
    listed: str = ""
    calibrated: bool | None = None
    classes: tuple[str, ...] | None = None
    prompts: int | None = None
    batches: tuple[int, ...] = (1,)
    given: tuple[tuple[str, Any], ...] | None = None
    weights: str = ""

    @property
    def setup(self) -> Setup:
        return Setup(self.kv, None, self.decode)


def drafted(method: str, setting: str = "scaled", *, name: str = "", row: Drafted | None = None, **settings: Any) -> Drafted:
    """A listed drafter under its 'scaled' or 'paper' settings, with these instead of some of them, as the row `name`. row: everything else.

    A setting that has no default is the sizes of a draft model, `cfg`: such a drafter waits for the experiment's `draft`.
    """
    listed = find(method)
    if listed.part != "decode":
        raise UserError(f"{method} is no drafter; `tokeff methods` lists those of family 'decode'")
    given = listed.settings(setting) | settings
    row = replace(row or Drafted(""), method=name or method, listed=method)
    open_ = sorted(key for key, value in given.items() if value is Parameter.empty)
    if not open_:
        return replace(row, decode=listed.build(**given))
    if open_ != ["cfg"]:
        raise UserError(f"{method} needs {', '.join(key for key in open_ if key != 'cfg')}; give a value")
    return replace(row, given=tuple(given.items()))


def entries(methods: Sequence[Method], setting: str = "scaled", row: Drafted | None = None) -> tuple[Drafted, ...]:
    """Every listed drafter under its settings of one kind. Under 'paper', those alone that differ from 'scaled', named by their drafts.

    Left out, with a notice: drafters with settings that a search on the model finds and that have no defaults (`drafted` takes them).
    """
    found = []
    for m in methods:
        if setting == "paper" and m.published is None:
            continue
        if lacking := [name for name, value in m.settings(setting).items() if value is Parameter.empty and name != "cfg"]:
            print(f"left out: {m.name} needs {', '.join(lacking)}; add a row drafted({m.name!r}, ...) that gives them", file=sys.stderr)
            continue
        scaled = drafted(m.name, row=row)
        if setting == "scaled":
            found.append(scaled)
        else:
            paper = drafted(m.name, setting, row=row)
            size = "paper" if paper.given else str(paper.decode.nodes - 1)
            found += [replace(paper, method=f"{m.name} {size}")] if paper != scaled else []
    return tuple(found)


@dataclass(frozen=True)
class Drafting(Experiment):
    """Every drafter on prompts of every class, one measurement a (row, class, batch size).

    Rows, classes and widths may be added later: what was measured with the same settings stays.
    """

    rows: tuple[Drafted, ...]  # type: ignore[assignment]
    model: str = "smollm2-135m"
    """A preset, a folder, a repo id or a .gguf file."""
    draft: str | None = None
    """The draft model, of the same kinds, for drafters that run one; without it those are left out."""
    classes: tuple[str, ...] = CLASSES
    """Prompt classes (evals/continuations.py)."""
    batched: tuple[str, ...] = ("chat",)
    """Classes of which batches are made."""
    widths: tuple[int, ...] = ()
    """Rows of a pass at which T(n)/T(1) is measured for the curve, beside the widths of the drafters."""
    prompts: int = 8
    """Prompts of a class, each decoded alone; the first ones."""
    new: int = 64
    """Greedy tokens of each prompt."""
    rounds: int = 3
    """How often each prompt is decoded by each decoder."""
    passes: int = 8
    """Passes of a timing of T(n)."""

    def settled(self) -> Drafting:
        """With what is calibrated for the model, and with drafters that run a draft model made, or left out where there is none."""
        waiting, rows = [row.method for row in self.rows if row.given is not None], self.rows
        if waiting and self.draft is None:
            print(f"left out, for want of a draft model: {', '.join(waiting)}; give its folder with --draft", file=sys.stderr)
            rows = tuple(row for row in rows if row.given is None)
        elif waiting and self.draft is not None:
            d = load(self.draft)
            rows = tuple(with_draft(row, d) if row.given is not None else row for row in rows)
        name = calibration.name_of(self.model)
        found = calibration.read(name)
        return replace(self, rows=tuple(settled_row(row, find(row.listed), found, name) if row.listed else row for row in rows))

    def check(self) -> None:
        for name in ("prompts", "new", "rounds", "passes"):
            if getattr(self, name) < (least := 2 if name == "new" else 1):
                raise UserError(f"{name} {getattr(self, name)} measures nothing; give {least} or more")
        for row in self.rows:
            if row.decode == Plain():
                raise UserError(f"{row.method} drafts nothing; plain decoding is measured beside every row, so leave it out")
            if reason := row.kv.drafts(row.decode.depth):
                raise UserError(f"{row.method} does not fit {type(row.kv).__name__}: {reason}")
            for name, batch in self.parts(row):
                n, most = self.count(row, batch), len(of_class(name))
                if not 1 <= n <= most:
                    raise UserError(f"{row.method} wants {n} prompts of class {name!r}, which has {most}; ask for 1 to {most}")

    def identity(self) -> Drafting:
        return Drafting(self.name, (), self.model, new=self.new, rounds=self.rounds, passes=self.passes)

    def stands(self, measured: dict[str, Any]) -> bool:
        if "curve" in measured:
            return measured["settings"] == repr(self.widths)
        row = next((row for row in self.rows if row.method == measured["method"]), None)
        return row is not None and measured["settings"] == self.settings(row, measured["batch"])

    def settings(self, row: Drafted, batch: int) -> str:
        """What decides a row's figures, beside the experiment's identity and the key."""
        return repr((row.decode, row.kv, row.weights, self.count(row, batch)))

    def keys(self) -> list[str]:
        """Row by row, so that an interrupted run has whole drafters and each is compiled once."""
        found = [f"{row.method}/{name}/{batch}" for row in self.rows for name, batch in self.parts(row)]
        return [CURVE, *found] if self.widths else found

    def parts(self, row: Drafted) -> list[tuple[str, int]]:
        """(class, batch size) of each of a row's measurements."""
        classes = self.classes if row.classes is None else row.classes
        return [(name, batch) for batch in row.batches for name in (classes if batch == 1 else self.batched)]

    def count(self, row: Drafted, batch: int) -> int:
        """How many prompts a measurement takes."""
        return batch if batch != 1 else self.prompts if row.prompts is None else row.prompts

    def prepare(self) -> Drafts:
        compile_cache()
        m = load(self.model)
        if any(row.calibrated for row in self.rows) and (found := calibration.read(m.name)) is not None:
            found.check(m)
        if self.draft is not None and (names := {getattr(row.decode, "name", "draft") for row in self.rows if row.weights}):
            weights = load(self.draft).params
            m = m.attach(**dict.fromkeys(sorted(names), weights))
        for row in self.rows:
            row.setup.check(m, [LONGEST], self.new)
        return Drafts(self, m)

    def measure(self, context: Drafts, key: str) -> dict[str, Any]:
        forget_programs()
        if key == CURVE:
            return {"method": CURVE, "curve": context.curve(), "settings": repr(self.widths)}
        method, name, batch = key.rsplit("/", 2)
        row = next(row for row in self.rows if row.method == method)
        return context.figures(row, name, int(batch)) | {"settings": self.settings(row, int(batch))}

    def summary(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Class by class, single prompts before batches; the curve as a line a width."""
        curve = next((row for row in rows if "curve" in row), None)
        stamp = {name: curve[name] for name in ("commit", "dirty", "measured_at") if curve and name in curve}
        stamp |= {"family": "baseline", "batch": 1}
        widths = [{"method": f"T({n})", "nodes": n, "tn": tn, **stamp} for n, tn in (curve or {}).get("curve", ())]
        order = {name: i for i, name in enumerate(dict.fromkeys((*self.classes, *(row.get("class") for row in rows))))}
        mine = [row for row in rows if "curve" not in row]
        return widths + sorted(mine, key=lambda row: (row["batch"], order[row["class"]]))

    def report(self) -> tuple[Figure, ...]:
        alone = (("batch", 1),)
        return (
            Payoff("Drafting pays above the curve: tokens a pass against what the pass costs", at=alone),
            Panels("mat", "class", "Tokens committed by a pass (plain decoding: 1)", level=1.0, at=alone),
            Panels("of_dense", "class", "Speed by the clock, dense decoding = 1", level=1.0, at=alone),
            Panels("of_dense", "class", "Speed against batch size, dense decoding of the same batch = 1", x="batch", level=1.0),
        )


def with_draft(row: Drafted, d: Model) -> Drafted:
    """The row with its drafter made for this draft model."""
    made = find(row.listed).build(**dict(row.given or ()) | {"cfg": d.cfg})
    return replace(row, decode=made, given=None, weights=fingerprint(d))


def elsewhere(drafter: Drafter, work: Work, batch: int, found: dict[str, Any]) -> dict[str, Any]:
    """On which machines drafting would pay, by arithmetic: of drafters alone that find their drafts in text, whose cost is not the model's.
    Where passes were narrower than all rows, what that saved here is not taken for a gain there."""
    if drafter.own_layers or isinstance(drafter, OwnModel) or drafter.nodes == 1:
        return {}
    on, level = {x.name: machines.ratio(x, work, drafter.nodes, batch) for x in MACHINES}, min(found["break_even"], found["mat"])
    return {"on": on, "pays_on": ", ".join(name for name, tn in on.items() if tn < level) or "none"}


@dataclass(eq=False)
class Drafts:
    """The model, and the prefills of the prompts met so far."""

    experiment: Drafting
    m: Model
    prefilled: dict[tuple, Prompt] = field(default_factory=dict)

    def curve(self) -> list[tuple[int, float]]:
        """(n, T(n)/T(1)) at the experiment's widths, over as many cached rows as a prompt's."""
        e = self.experiment
        length = LONGEST // 2 + e.passes + 1
        found = verify_cost.rows(self.m, (length,), e.widths, passes=e.passes, rounds=e.rounds + 2, nbytes=common.READ_BYTES // 8)
        return [(row["rows"], row["of_one_row"]) for row in found]

    def figures(self, row: Drafted, name: str, batch: int) -> dict[str, Any]:
        """One row on one class at one batch size."""
        count = self.experiment.count(row, batch)
        groups = [self.timed(row, self.read(name, i, batch, row.kv.needs()), i) for i in range(0, count, batch)]
        found = speeds([g for g in groups if g.decoded]) | exactness(self.m, groups)
        return {
            "method": row.method, "family": "decode", "lossless": row.decode.lossless, "class": name, "batch": batch, "texts": count,
            "nodes": row.decode.nodes, **found, **elsewhere(row.decode, Work.of(self.m), batch, found),
        }  # fmt: skip

    def read(self, name: str, first: int, batch: int, evidence: tuple[Evidence, ...]) -> Prompt:
        """Prompts of a class from the first on, with what a policy wants to know of them."""
        if (key := (name, first, batch, evidence)) not in self.prefilled:
            self.prefilled[key] = read(self.m, [ids(self.m, p) for p in of_class(name)[first : first + batch]], evidence)
        return self.prefilled[key]

    def timed(self, row: Drafted, prompt: Prompt, first: int) -> Group:
        """One prompt or batch under every decoder, in turns; `first` says whose turn it is first."""
        e = self.experiment

        def run(setup: Setup, passes: int | None = None) -> Continuation:
            return Continuation(self.m, prompt, setup.fit(self.m), e.new, passes)

        runs = {DENSE: run(Setup()), MINE: run(row.setup)}
        runs[PLAIN] = runs[DENSE] if row.kv == Full() else run(Setup(row.kv))
        n = row.decode.nodes  # one for methods that make a pass cheaper, not wider
        runs[WRONG] = runs[PLAIN] if n == 1 else run(Setup(row.kv, None, Chain(n)), e.passes)
        for each in (turns := {id(x): x for x in runs.values()}).values():
            own = type(each.setup.decode).drive is not Drafter.drive  # may go on to further programs as the text goes on
            Continuation(self.m, prompt, each.setup, e.new, None if own else 2)()  # compiles
        seconds = common.interleave({str(i): x for i, x in turns.items()}, e.rounds, row.method, warm=False, first=first)
        return Group(prompt, runs, {name: seconds[str(id(x))] for name, x in runs.items()})
