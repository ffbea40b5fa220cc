"""The report page of a run: one file, nothing loaded from elsewhere, no scripts, everything escaped."""

import base64
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jinja2

from tokeff.evals.stats import RANKED_AT
from tokeff.report import kept as kept_file
from tokeff.report.folder import RunFolder
from tokeff.report.kept import Kept
from tokeff.report.plots import Image
from tokeff.report.table import MISSING, NOT_BETTER, Table, clean, digits, is_method, number, within_budget

LEVELS = 10
IN_NAME = ("method", "family", "lossless", "note")
"""Columns shown under the method's name, to keep the table narrow."""


@dataclasses.dataclass(frozen=True)
class Fact:
    """One thing to know first: a figure, what it is, and the fine print."""

    figure: str
    what: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the table: the method's name with what stands under it, and (value, interval) of every other cell."""

    name: str
    kind: str
    note: str
    look: str
    cells: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, row: dict[str, Any], table: Table, texts: Sequence[str]) -> "Line":
        """Return the line of one row; baselines and rows no better than random look different."""
        named = {column.name: text for column, text in zip(table.columns, texts)}
        kind = " · ".join(named[k] for k in ("family", "lossless") if named.get(k, MISSING) != MISSING)
        weak = "weak" if row.get("beats_random") is False else ""
        rest = [text.partition(" [") for name, text in named.items() if name not in IN_NAME]
        cells = tuple((value, mark.strip() + interval) for value, mark, interval in rest)
        note = named.get("note", MISSING)
        return cls(named["method"], kind, "" if note == MISSING else note,
                   "baseline" if row.get("family") == "baseline" else weak, cells)  # fmt: skip


def render(
    folder: RunFolder,
    rows: Sequence[dict[str, Any]],
    table: Table,
    images: Sequence[Image],
    kept: Sequence[tuple[str, Kept]],
) -> str:
    """Return the page for the rows of a run."""
    loader = jinja2.PackageLoader("tokeff.report", ".")
    page = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True).get_template("report.html.j2")  # fmt: skip
    config, environment = folder.config(), folder.environment()
    return page.render(
        name=config.get("experiment", {}).get("name", folder.path.name),
        about=config.get("about", ""),
        subtitle=config.get("about", "").partition("\n")[0],
        command=environment.get("command", ""),
        commit=environment.get("commit"),
        facts=facts(rows),
        warnings=warnings(rows),
        table=table,
        columns=[column for column in table.columns if column.name not in IN_NAME],
        lines=[Line.of(row, table, cells) for row, cells in zip(rows, table.cells)],
        images=[(image.title, image.wide, base64.b64encode(image.png).decode()) for image in images],
        texts=[(clean(name), _kept_share(what), kept_file.pieces(what, LEVELS)) for name, what in kept],
        levels=LEVELS,
        config_text=folder.config_text(),
        environment={k: v for k, v in environment.items() if v not in (None, "")},
        seconds=sum(number(row.get("measured_s")) or 0 for row in rows),
    )


def _kept_share(kept: Kept) -> str:
    """Return how much of the prompt was kept, over all layers and heads."""
    return f"{100 * kept.share_LS().mean():.1f}% of (token, layer, head)"


def facts(rows: Sequence[dict[str, Any]]) -> list[Fact]:
    """Return what a reader should know first, at the context with the most texts, or the longest; only what the rows can say."""
    most = max(rows, key=lambda row: (number(row.get("kl_n")) or 0.0, number(row.get("context")) or 0.0), default={})
    rows = [row for row in rows if number(row.get("context")) == number(most.get("context"))]
    full = next((row for row in rows if is_method(row, "full")), {})
    compared = [row for row in rows if row.get("family") != "baseline"]
    found = [_full(full), _closest(compared), _smallest(compared, full), _fastest(compared, full), _weak(compared), *_drafts(compared)]
    return [fact for fact in found if fact is not None]


def _full(full: dict[str, Any]) -> Fact | None:
    needles, n, speed = (number(full.get(k)) for k in ("needles_exact", "n", "decode_tok_s"))
    if needles is None and speed is None:
        return None
    parts = [f"{needles:g} of {n:g} needles" if needles is not None and n else "", _speed(speed)]
    context = number(full.get("context"))
    return Fact(", ".join(filter(None, parts)), "full cache" + (f", {context:g} tokens of context" if context else ""),
                "what every method is compared with")  # fmt: skip


def _speed(speed: float | None) -> str:
    return f"{digits(speed)} tok/s" if speed is not None else ""


def _closest(rows: Sequence[dict[str, Any]]) -> Fact | None:
    """Return the lossy row with the smallest KL to the full cache, at the budget of most rows, the smallest of several."""
    given = [budget for row in rows if (budget := number(row.get("budget"))) is not None]
    usual = max(sorted(set(given)), key=given.count, default=None)
    best = _least([row for row in rows if row.get("lossless") is False and number(row.get("budget")) == usual and within_budget(row)], "kl")
    if best is None:
        return None
    detail = f"KL {digits(number(best['kl']) or 0.0)} nats{_bytes(best)}"
    return Fact(clean(best["method"]), "closest to the full cache of the lossy methods within budget", detail)


def _smallest(rows: Sequence[dict[str, Any]], full: dict[str, Any]) -> Fact | None:
    """Return the row that answered every needle while holding the fewest bytes, where the full cache answers enough to rank by that."""
    if (number(full.get("needles_exact")) or 0.0) < RANKED_AT * (number(full.get("n")) or math.inf):
        return None
    every = [row for row in rows if number(row.get("n")) and number(row.get("needles_exact")) == number(row.get("n"))]
    best = _least([row for row in every if (number(row.get("held")) or 1.0) < 0.99], "held")
    if best is None:
        return None
    return Fact(clean(best["method"]), "fewest bytes held with every needle answered", f"n={best['n']}{_bytes(best, 'held')}")


def _fastest(rows: Sequence[dict[str, Any]], full: dict[str, Any]) -> Fact | None:
    """Return the fastest lossless row as a ratio of the full cache's speed."""
    base = number(full.get("decode_tok_s"))
    timed = [row for row in rows if row.get("lossless") is True and number(row.get("decode_tok_s"))]
    if not base or not timed:
        return None
    best = max(timed, key=lambda row: number(row["decode_tok_s"]) or 0.0)
    speed = number(best["decode_tok_s"]) or 0.0
    return Fact(f"{speed / base:.2f}x", f"decoding speed of {clean(best['method'])}, the fastest lossless method",
                f"{digits(speed)} against {digits(base)} tok/s")  # fmt: skip


def _weak(rows: Sequence[dict[str, Any]]) -> Fact | None:
    """Return how many methods the random baseline holds its own against at every budget."""
    judged = [row for row in rows if isinstance(row.get("beats_random"), bool)]
    better = {row["method"] for row in judged if row["beats_random"]}
    weak = list(dict.fromkeys(clean(row["method"]) for row in judged if row["method"] not in better))
    return Fact(f"{len(weak)} of {len({row['method'] for row in judged})}", f"methods marked {NOT_BETTER}",
                ", ".join(weak) or "all beat random rows at the same budget") if judged else None  # fmt: skip


def _drafts(rows: Sequence[dict[str, Any]]) -> list[Fact]:
    """Return where drafting paid by the clock, and the most tokens that a pass committed."""
    rows = [row for row in rows if number(row.get("mat")) is not None and row.get("exact")]
    if not rows:
        return []
    fast, far = (max(rows, key=lambda row: number(row.get(name)) or 0.0) for name in ("of_dense", "mat"))
    paid = {row["method"] for row in rows if (number(row["of_dense"]) or 0.0) > 1}
    where = (f"on {clean(row.get('class'))} prompts, batch size {row.get('batch')}" for row in (fast, far))
    return [
        Fact(f"{fast['of_dense']:.2f}x", f"speed of {clean(fast['method'])}, the most that an exact drafter gained", next(where)),
        Fact(f"{far['mat']:.2f}", f"tokens a pass by {clean(far['method'])}", next(where)),
        Fact(f"{len(paid)} of {len({row['method'] for row in rows})}", "drafters were faster than plain decoding on some prompts"),
    ]


def _least(rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """Return the row with the smallest number in a column, or None when none has one."""
    having = [row for row in rows if number(row.get(name)) is not None]
    return min(having, key=lambda row: number(row[name]) or 0.0) if having else None


def _bytes(row: dict[str, Any], name: str | None = None) -> str:
    """Return a ratio for fine print: the one the row is budgeted by, or the one named."""
    name = name or ("read" if row.get("budgeted_by") == "read" else "held")
    value = number(row.get(name))
    return "" if value is None else f", {100 * value:.1f}% of the bytes {name}"


def warnings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return what weakens the comparison."""
    commits = {commit for row in rows for commit in row.get("commits", [row.get("commit")])}
    told = []
    if len(known := commits - {None, ""}) > 1:
        told.append(f"The rows were measured at {len(known)} commits; those with the settings of today stand.")
    if any(row.get("dirty") for row in rows):
        told.append("Some rows were measured with uncommitted changes: the commit does not say which code made them.")
    if commits & {None, ""}:
        told.append("The commit is unknown: this copy of tokeff was not run from a checkout.")
    return told
