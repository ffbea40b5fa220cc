"""Tables: what a cell says, what is left out, what is escaped."""

import pytest

from tokeff.errors import UserError
from tokeff.report import table
from tokeff.report.compare import compare
from tokeff.report.folder import RunFolder

pytestmark = pytest.mark.core

ROW = {"key": "a", "method": "a", "family": "kv", "lossless": False, "kl": 0.25, "kl_lo": 0.2, "kl_hi": 0.3, "n": 3}


def cells(shown):
    """Return the cells of a table by method and column name."""
    names = [column.name for column in shown.columns]
    return {line[0]: dict(zip(names, line)) for line in shown.cells}


def test_missing_values_are_dashes_and_empty_columns_are_left_out():
    """A row without a column still has a cell."""
    shown = table.build([ROW, {"method": "b", "held": 0.5}])
    by = cells(shown)
    assert by["b"]["kl"] == table.MISSING and by["b"]["held"] == "50.0%" and by["a"]["held"] == table.MISSING
    assert "loss" not in by["a"]


def test_intervals_and_n():
    """One n stands in the heading; unlike n stand in the cells; k of n has a Wilson interval."""
    shown = table.build([ROW, {**ROW, "method": "b"}])
    assert {c.name: c.title for c in shown.columns}["kl"] == "KL to full (n=3)"
    assert cells(shown)["a"]["kl"] == "0.250 [0.200, 0.300]"
    shown = table.build([ROW, {**ROW, "method": "b", "kl_n": 128}])
    assert cells(shown)["b"]["kl"] == "0.250 [0.200, 0.300] n=128"
    assert cells(table.build([{**ROW, "needles_exact": 3}]))["a"]["needles_exact"] == "3/3 [44, 100]"
    assert cells(table.build([{**ROW, "needles_exact": 0}]))["a"]["needles_exact"] == "0/3 [0, 56]"


def test_marks():
    """No better than random, above the budget, lossless or lossy."""
    over = {**ROW, "budget": 0.125, "budgeted_by": "held", "held": 0.3, "read": 0.3, "beats_random": False, "note": "x"}
    by = cells(table.build([over, {**over, "method": "b", "held": 0.126, "beats_random": True, "lossless": True}]))
    assert by["a"]["held"] == "30.0% ↑" and by["a"]["read"] == "30.0%" and by["b"]["held"] == "12.6%"
    assert by["a"]["note"] == "≈ random; x" and by["b"]["note"] == "x"
    assert (by["a"]["lossless"], by["b"]["lossless"]) == ("lossy", "lossless")
    assert any("random rows" in note for note in table.build([over]).notes)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (1234.0, "1234"), (0.00012345, "0.000123"), (1e-7, "1.00e-07"), (-9.1, "-9.10"), (33.14, "33.1")],
)
def test_digits(value, shown):
    """Three significant digits."""
    assert table.digits(value) == shown


def test_not_finite_is_shown_not_hidden():
    """A diverged loss is a result."""
    by = cells(table.build([{"method": "a", "loss": "nan"}, {"method": "b", "loss": "inf"}]))
    assert (by["a"]["loss"], by["b"]["loss"]) == ("nan", "inf")


def test_hostile_text_stays_text():
    """A method name cannot colour the terminal, end a Markdown cell, or become HTML or a link."""
    name = "a|b\n\x1b[31m<script>[x](y)[bold]"
    shown = table.build([{"method": name, "context": 5}, {"method": "b", "context": 5}])
    plain = table.text(shown)
    assert "\x1b" not in plain and "[bold]" in plain and "context: 5" in plain
    line = next(line for line in table.markdown(shown).splitlines() if "script" in line)
    assert "<" not in line and "\\[x\\](y)" in line and line.replace("\\|", "").count("|") == 2


def test_files_of_a_run(finished):
    """Both files show every method."""
    for name in ("table.md", "table.txt"):
        written = (finished.path / name).read_text()
        assert "gemfilter" in written and "≈ random" in written


def write(path, rows, config="c\n", **environment):
    """Write a run folder by hand."""
    folder = RunFolder(path)
    folder.path.mkdir()
    folder.start(config, {"experiment": {"name": config}}, {"commit": "1", "dirty": False, "cpu": "x", **environment})
    with folder.appending() as appender:
        for row in rows:
            appender.add(**{"key": row["key"], "row": row})
    return folder


def test_compare(tmp_path):
    """Values side by side by key, differences, and every reason for doubt."""
    a = write(tmp_path / "a", [ROW, {**ROW, "key": "gone"}])
    b = write(tmp_path / "b", [{**ROW, "kl": 0.5, "kl_lo": 0.4, "kl_hi": 0.6, "held": 0.1}], "d\n", commit="2", cpu="y")
    shown, warnings = compare(a, b)
    assert shown.cells == (("a", "0.250 → 0.500 (+100.0%) ≠", "— → 10.0%"),)
    said = "\n".join(warnings)
    for part in ("commit differs: 1 and 2", "cpu differs: x and y", "configs differ", "only in the first: gone"):
        assert part in said
    same, warnings = compare(a, a)
    assert same.cells[0][1] == "0.250" and not warnings
    with pytest.raises(UserError, match="no run in"):
        compare(a, RunFolder(tmp_path / "nothing"))
