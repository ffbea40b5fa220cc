"""One table of a run: which columns, how a cell reads, and the footnotes that say what the marks mean."""

import dataclasses
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

MISSING = "—"
NOT_BETTER = "≈ random"
OVER = "↑"
SLACK = 1.05
"""How far above its budget a row may be for tables of orders and statistics before it is marked."""


@dataclasses.dataclass(frozen=True)
class Column:
    """A column: where its value is in a row, its heading, and how one value is written."""

    name: str
    title: str
    show: Callable[[dict[str, Any], str], str]
    meaning: str = ""
    right: bool = True


@dataclasses.dataclass(frozen=True)
class Table:
    """A table ready to be shown: cells are plain text, in need of escaping wherever they go."""

    columns: tuple[Column, ...]
    cells: tuple[tuple[str, ...], ...]
    shared: tuple[tuple[str, str], ...]
    """(heading, value) of what is the same in every row and so has no column."""
    notes: tuple[str, ...]


def number(value: Any) -> float | None:
    """Return a measured value as a float ('nan' and 'inf' are stored as text), or None where there is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def is_method(row: dict[str, Any], name: str) -> bool:
    """Say whether a row measures the named method, whatever its capitals."""
    return str(row.get("method")).lower() == name.lower()


def interval(row: dict[str, Any], name: str) -> tuple[float, float] | None:
    """Return the 95% interval of a value, or None where the row has none."""
    low, high = number(row.get(name + "_lo")), number(row.get(name + "_hi"))
    return None if low is None or high is None else (low, high)


def clean(text: Any) -> str:
    """Return text for one cell: one line, no control characters (a terminal would obey them)."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]+", " ", str(text)).strip()


def plain(row: dict[str, Any], name: str) -> str:
    """Write a value as it is."""
    value = row.get(name)
    return MISSING if value is None or value == "" else clean(value)


def significant(row: dict[str, Any], name: str) -> str:
    """Write a number with three significant digits, and its interval where the row has one."""
    value, ends = number(row.get(name)), interval(row, name)
    if value is None:
        return MISSING
    return digits(value) if ends is None else f"{digits(value)} [{digits(ends[0])}, {digits(ends[1])}]"


def digits(value: float) -> str:
    """Write a number with three significant digits and no exponent where it can be read without."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if not 1e-4 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def one(value: float, name: str) -> str:
    """Write one bare value of a column: ratios as percentages, counts whole."""
    if name in ("held", "read", "peak", "top1_agree", "greedy_match"):
        return f"{100 * value:.1f}%"
    return f"{value:g}" if name in ("needles_exact", "later_exact", "turns_exact") else digits(value)


def percent(row: dict[str, Any], name: str) -> str:
    """Write a ratio as a percentage, marked where it is above the budget the row was given in that ratio."""
    value = number(row.get(name))
    if value is None:
        return MISSING
    over = row.get("budgeted_by") == name and not within_budget(row)
    return f"{100 * value:.1f}%{' ' + OVER if over else ''}"


def within_budget(row: dict[str, Any]) -> bool:
    """Say whether a row kept to its budget, if it has one."""
    budget, value = number(row.get("budget")), number(row.get(str(row.get("budgeted_by"))))
    return budget is None or value is None or value <= budget * SLACK


def share(row: dict[str, Any], name: str) -> str:
    """Write a share with its interval as percentages."""
    value, ends = number(row.get(name)), interval(row, name)
    if value is None:
        return MISSING
    return f"{100 * value:.1f}%" + ("" if ends is None else f" [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]")


def count(row: dict[str, Any], name: str) -> str:
    """Write k of n, with the 95% (Wilson) interval of the share in percent."""
    value, n = number(row.get(name)), n_of(row, name)
    if value is None or not n:
        return MISSING if value is None else f"{value:g}"
    low, high = wilson(value, n)
    return f"{value:g}/{n:g} [{100 * low:.0f}, {100 * high:.0f}]"


def wilson(k: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """Return the Wilson interval of a share k / n; it stays honest for n = 3 and for k = 0 or n."""
    middle, half = (k + z * z / 2) / (n + z * z), z / (n + z * z) * math.sqrt(max(k * (n - k) / n, 0) + z * z / 4)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def n_of(row: dict[str, Any], name: str) -> float | None:
    """Return how many samples a value rests on: its own <name>_n, else the row's n."""
    return number(row.get(name + "_n", row.get("n")))


def yes_no(row: dict[str, Any], name: str) -> str:
    """Write whether a method is lossless."""
    value = row.get(name)
    return ("lossless" if value else "lossy") if isinstance(value, bool) else MISSING


def flag(row: dict[str, Any], name: str) -> str:
    """Write a yes or no."""
    value = row.get(name)
    return ("yes" if value else "no") if isinstance(value, bool) else share(row, name)


def budget(row: dict[str, Any], name: str) -> str:
    """Write the budget with the ratio it limits."""
    value = number(row.get(name))
    return MISSING if value is None else clean(f"{100 * value:g}% {row.get('budgeted_by') or ''}")


def remark(row: dict[str, Any], name: str) -> str:
    """Write the row's note, and first of all whether the row is no better than random rows."""
    marks = [NOT_BETTER] if row.get("beats_random") is False else []
    return "; ".join([*marks, *([clean(row[name])] if row.get(name) else [])]) or MISSING


def first_of(*others: str) -> Callable[[dict[str, Any], str], str]:
    """Return how a column is written whose value stands under one of several names."""
    return lambda row, name: significant(row, next((n for n in (name, *others) if row.get(n) is not None), name))


COLUMNS = (
    Column("kind", "kind", plain, right=False),
    Column("method", "method", plain, right=False),
    Column("share", "rows kept", share, "rows kept: share of the rows that a layer works on, in the mean over layers"),
    Column("family", "family", plain, right=False),
    Column("lossless", "output", yes_no, "lossless: gives the tokens of plain decoding; lossy: may not", right=False),
    Column("budget", "budget", budget, "budget: share of the full cache a row may hold, or read in one decode step"),
    Column("class", "prompts", plain, right=False),
    Column("batch", "batch", plain),
    Column("context", "context", plain),
    Column("needles_exact", "needles", count, "needles: answers with every token right when teacher-forced, of n"),
    Column("answer_logprob", "answer log p", significant, "answer log p: mean log-likelihood of the right answer"),
    Column("later_exact", "asked later", count, "asked later: the same questions, put to the context after it was compressed"),
    Column("later_logprob", "later log p", significant, "later log p: answer log p of questions asked later"),
    Column("turns_exact", "in turns", count, "in turns: the same, one after another to one compressed context, answers between"),
    Column("turns_logprob", "turns log p", significant, "turns log p: answer log p of questions asked in turns"),
    Column("hard_logprob", "hard log p", significant, "hard log p: answer log p of tasks of which the full cache gets less than 80% right"),
    Column("accuracy", "right", first_of("labelled", "watched"), "right: share of pictures answered or named rightly"),
    Column("wer", "WER", share, "WER: words inserted, deleted and replaced / words said"),
    Column("changed", "changed", share, "changed: the same against the transcript that all rows give"),
    Column("perplexity", "perplexity", significant, "perplexity: of held-out text"),
    Column("loss", "loss", significant, "loss: nats a token on held-out text"),
    Column("kl", "KL to full", first_of("heard_kl"), "KL to full: of the next-token distribution, in nats, full cache as truth"),
    Column("top1_agree", "top-1", share, "top-1: share of next tokens that agree with the full cache's first choice"),
    Column("greedy_match", "greedy", flag, "greedy: agreement with the full cache's greedy continuation"),
    Column("held", "held", percent, "held: bytes of the decode state after prefill / bytes of a full cache"),
    Column("read", "read", percent, "read: cache bytes touched by one decode step / bytes of a full cache"),
    Column("peak", "peak", percent, "peak: memory of the compiled program / bytes of a full cache"),
    Column("prefill_read", "prompt read", share, "prompt read: rows that a sparse prefill's queries read / rows before them"),
    Column("prefill_s", "prefill", significant, "prefill: seconds, after warm-up"),
    Column("first_token_s", "first token", significant, "first token: seconds until it can be drawn"),
    Column(
        "speedup", "speed-up", first_of("encoder_speedup", "picture_speedup", "clip_speedup"),
        "speed-up: seconds over all rows / these, in turns",
    ),
    Column("first_token_speedup", "first token x", significant, "first token x: seconds to it over all rows / these, in turns"),
    Column("decoder_speedup", "decoder x", significant, "decoder x: of its prefill, seconds over all rows / these, in turns"),
    Column("flops", "FLOPs", share, "FLOPs: of the prefill by arithmetic / those over all rows; what scores cost is left out"),
    Column("kv_mib", "KV MiB", significant, "KV MiB: keys and values held after the prompt"),
    Column("beats", "beats", flag, "beats: better than every baseline at its share, 95% interval of the differences of examples"),
    Column("decode_tok_s", "tok/s", significant, "tok/s: tokens decoded a second, after warm-up"),
    Column("nodes", "rows", plain, "rows: that one pass carries for a sequence, the last token and its drafts"),
    Column("texts", "texts", plain, "texts: prompts decoded"),
    Column("mat", "MAT", significant, "MAT: tokens that a pass of the target committed; plain decoding has 1"),
    Column("of_dense", "of dense", significant, "of dense: speed as a multiple of dense decoding's, the two timed in turns"),
    Column("of_floor", "of floor", significant, "of floor: speed as a share of what reading weights and cache once would allow"),
    Column("overhead_ms", "overhead ms", significant, "overhead ms: of a step, beyond one that reads as many bytes and decides nothing"),
    Column("pays_from", "pays from", plain, "pays from: context from which a step beats dense decoding (straight lines; >n: not up to n)"),
    Column("tn", "T(n)/T(1)", significant, "T(n)/T(1): seconds of a pass over so many rows by those of one row, drafts wrong"),
    Column("draft_ms", "draft ms", significant, "draft ms: of a pass beyond T(n); below zero where drafting does a part of the pass"),
    Column("break_even", "break-even", significant, "break-even: MAT - draft/T(1), the T(n)/T(1) below which drafting pays"),
    Column("expected", "expected", significant, "expected: MAT / (T(n)/T(1) + draft/T(1)), what of dense should be"),
    Column("pays_on", "pays on", plain, "pays on: machines whose T(n)/T(1), by bytes and peak rates, is below break-even"),
    Column("exact", "exact", flag, "exact: every text is plain decoding's; one may end where its two best logits are closer than 0.001"),
    Column("tokens_per_pass", "tok/pass", significant, "tok/pass: tokens committed by one forward pass"),
    Column("note", "note", remark, right=False),
)
_BRIEF = ("kind", "method", "share", "class", "batch", "context", "needles_exact", "kl", "held", "read", "speedup", "decode_tok_s", "mat",
          "of_dense", "tn", "break_even", "exact", "tokens_per_pass", "note")  # fmt: skip
BRIEF = tuple(column for column in COLUMNS if column.name in _BRIEF)
"""The columns that fit a terminal."""


def build(rows: Sequence[dict[str, Any]], columns: Sequence[Column] = COLUMNS) -> Table:
    """Return the table of some rows: empty columns left out, columns of one value said once above the table."""
    shown, shared = [], []
    for column in columns:
        values = {column.show(row, column.name) for row in rows}
        if values <= {MISSING}:
            continue
        if len(values) == 1 and len(rows) > 1 and column.name in ("context", "budget"):
            shared.append((column.title, values.pop()))
        else:
            shown.append(column)
    shown = [_with_n(column, rows) for column in shown]
    cells = tuple(tuple(column.show(row, column.name) for column in shown) for row in rows)
    return Table(tuple(shown), cells, tuple(shared), _notes(rows, shown, cells))


def _with_n(column: Column, rows: Sequence[dict[str, Any]]) -> Column:
    """Return the column with the n of its intervals: in the heading where it is one n, else in each cell."""
    sizes = {n_of(row, column.name) for row in rows if row.get(column.name + "_lo") is not None} - {None}
    if len(sizes) == 1:
        return dataclasses.replace(column, title=f"{column.title} (n={sizes.pop():g})")
    return dataclasses.replace(column, show=lambda row, name: _cell_with_n(column, row)) if sizes else column


def _cell_with_n(column: Column, row: dict[str, Any]) -> str:
    cell, n = column.show(row, column.name), n_of(row, column.name)
    return cell if cell == MISSING or n is None else f"{cell} n={n:g}"


def _notes(rows: Sequence[dict[str, Any]], shown: Sequence[Column], cells) -> tuple[str, ...]:
    """Return the footnotes that this table needs."""
    flat = [cell for line in cells for cell in line]
    notes = [column.meaning for column in shown if column.meaning]
    if any("[" in cell and "]" in cell for cell in flat):
        notes.append("[low, high]: 95% interval")
    if any(row.get("beats_random") is False for row in rows):
        notes.append(f"{NOT_BETTER}: not better than keeping random rows at the same budget")
    if any(cell.endswith(OVER) for cell in flat):
        notes.append(f"{OVER}: above the budget the row was given")
    return tuple(notes)


def markdown(table: Table) -> str:
    """Write a table as Markdown, its cells escaped."""
    lines = [f"{title}: {escape_markdown(value)}" for title, value in table.shared]
    lines += [""] if lines else []
    lines.append("| " + " | ".join(column.title for column in table.columns) + " |")
    lines.append("|" + "|".join("---:" if column.right else "---" for column in table.columns) + "|")
    lines += ["| " + " | ".join(map(escape_markdown, line)) + " |" for line in table.cells]
    return "\n".join([*lines, "", *(f"- {escape_markdown(note)}" for note in table.notes)]) + "\n"


def escape_markdown(text: str) -> str:
    """Return text that Markdown shows as it is: no cell ends, no HTML, no emphasis or links."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", escaped)


def text(table: Table, width: int = 240) -> str:
    """Write a table for a terminal of `width` columns, without colour."""
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, highlight=False)
    show(table, console)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def show(table: Table, console: Console) -> None:
    """Print a table on a terminal; what rows say is never taken for markup."""
    for title, value in table.shared:
        console.print(Text(f"{title}: {value}"))
    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns:
        drawn.add_column(Text(column.title), justify="right" if column.right else "left", overflow="fold")
    for line in table.cells:
        drawn.add_row(*map(Text, line))
    console.print(drawn)
    for note in table.notes:
        console.print(Text(note, style="dim"))
