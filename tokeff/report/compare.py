"""Two runs side by side: every key that both measured, column by column, and what makes the comparison unfair."""

from collections.abc import Sequence
from typing import Any

from tokeff.report import environment
from tokeff.report.folder import RunFolder, first_difference
from tokeff.report.table import COLUMNS, MISSING, Column, Table, clean, interval, number, one

NAMES = (
    "needles_exact", "answer_logprob", "later_exact", "later_logprob", "turns_exact", "turns_logprob", "loss", "kl", "top1_agree",
    "held", "read", "peak", "prefill_s", "decode_tok_s", "tokens_per_pass",
)  # fmt: skip
APART = "≠"


def compare(first: RunFolder, second: RunFolder) -> tuple[Table, list[str]]:
    """Return the table of two runs, and warnings that say how they differ beside their figures."""
    a_rows, b_rows = ({row["key"]: row for row in folder.require().rows()} for folder in (first, second))
    keys = [key for key in a_rows if key in b_rows]
    pairs = [(a_rows[key], b_rows[key]) for key in keys]
    titles = {column.name: column.title for column in COLUMNS}
    names = [name for name in NAMES if any(number(row.get(name)) is not None for pair in pairs for row in pair)]
    columns = [Column("key", "key", lambda row, name: "", right=False)]
    columns += [Column(name, titles[name], lambda row, name: "") for name in names]
    cells = tuple((clean(a["key"]), *(cell(a, b, name) for name in names)) for a, b in pairs)
    return Table(tuple(columns), cells, (), _notes(cells)), _warnings(first, second, a_rows, b_rows)


def cell(a: dict[str, Any], b: dict[str, Any], name: str) -> str:
    """Return 'first → second (difference)', marked where the 95% intervals do not meet."""
    x, y = number(a.get(name)), number(b.get(name))
    if x is None and y is None:
        return MISSING
    if x is None or y is None:
        return f"{MISSING if x is None else one(x, name)} → {MISSING if y is None else one(y, name)}"
    if x == y:
        return one(x, name)
    change = f"{100 * (y - x) / abs(x):+.1f}%" if x else f"{y - x:+.3g}"
    return f"{one(x, name)} → {one(y, name)} ({change}){' ' + APART if _apart(a, b, name) else ''}"


def _apart(a: dict[str, Any], b: dict[str, Any], name: str) -> bool:
    """Say whether both values have intervals and those do not meet."""
    first, second = interval(a, name), interval(b, name)
    return first is not None and second is not None and (first[1] < second[0] or second[1] < first[0])


def _notes(cells: Sequence[Sequence[str]]) -> tuple[str, ...]:
    notes = ["first → second (change); one figure where both are the same"]
    marked = any(text.endswith(APART) for line in cells for text in line)
    return (*notes, f"{APART}: the 95% intervals do not meet") if marked else tuple(notes)


def _warnings(first: RunFolder, second: RunFolder, a_rows: dict[str, Any], b_rows: dict[str, Any]) -> list[str]:
    """Return how the two runs differ beside their figures."""
    told = environment.differences(first.environment(), second.environment())
    if first.config_text() != second.config_text():
        where = first_difference(first.config().get("experiment"), second.config().get("experiment"))
        told.append(f"the configs differ: {where}")
    for which, rows, others in (("first", a_rows, b_rows), ("second", b_rows, a_rows)):
        missing = [clean(key) for key in rows if key not in others]
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            told.append(f"only in the {which}: {', '.join(missing[:5])}{more}")
    return told
