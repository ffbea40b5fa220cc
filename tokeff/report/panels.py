"""A column of rows by another one's values: panels of bars beside each other, or of lines."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import NullLocator, ScalarFormatter

from tokeff.report.curves import COLOURS, MARKERS
from tokeff.report.figures import Panels
from tokeff.report.table import clean, number

GAINS, LOSES = "#aa4499", "#d9c3d5"
"""Colours of bars above and below the level."""


def chosen(rows: Sequence[dict[str, Any]], at: Sequence[tuple[str, Any]]) -> list[dict[str, Any]]:
    """The rows that have these values."""
    return [row for row in rows if all(row.get(name) == value for name, value in at)]


def draw_panels(rows: Sequence[dict[str, Any]], figure: Panels, names: dict[str, str]) -> Drawing | None:
    """The figure, or None where no row has its columns, or no line two points."""
    rows = [row for row in chosen(rows, figure.at) if row.get(figure.by)]
    groups = {value: [row for row in rows if row[figure.by] == value] for value in dict.fromkeys(row[figure.by] for row in rows)}
    if figure.x is not None:
        groups = {value: kept for value, group in groups.items() if (kept := in_lines(group, figure.x))}
    if not groups:
        return None
    methods = list(dict.fromkeys(row["method"] for group in groups.values() for row in group))
    size = (max(2.6 + 2.1 * len(groups), 6.4), 1.0 + 0.27 * len(methods)) if figure.x is None else (4.6 * len(groups) + 1.4, 4.2)
    drawing = Drawing(figsize=size, dpi=144, layout="constrained")
    panels = drawing.subplots(1, len(groups), squeeze=False, sharex=True, sharey=True)[0]
    for panel, (value, group) in zip(panels, groups.items()):
        bars(panel, group, methods, figure) if figure.x is None else lines(panel, group, methods, figure)
        panel.set_title(clean(value), fontsize=9.5, fontweight="normal", color="#333333")
    drawing.supxlabel(names.get(figure.x or figure.y, figure.x or figure.y), fontsize=9)
    if figure.x is not None:
        panels[0].set_ylabel(names.get(figure.y, figure.y))
        panels[-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8.5)
    return drawing


def in_lines(rows: Sequence[dict[str, Any]], x: str) -> list[dict[str, Any]]:
    """The rows of methods that have two points or more."""
    having = [row for row in rows if number(row.get(x)) is not None]
    many = {row["method"] for row in having if len({other[x] for other in having if other["method"] == row["method"]}) > 1}
    return [row for row in having if row["method"] in many]


def bars(panel: Axes, rows: Sequence[dict[str, Any]], methods: Sequence[str], figure: Panels) -> None:
    """A bar a row, in the place of its method, paler where it is at or below the level; its value at its end."""
    values = np.array([number(row[figure.y]) or 0.0 for row in rows])
    low, high = (np.array([number(row.get(f"{figure.y}_{end}")) or value for row, value in zip(rows, values)]) for end in ("lo", "hi"))
    at = [methods.index(row["method"]) for row in rows]
    colours = [GAINS if figure.level is None or value > figure.level else LOSES for value in values]
    reach = np.stack([values - low, high - values])
    panel.barh(at, values, color=colours, height=0.7, xerr=reach if reach.any() else None, ecolor="#555555", error_kw={"linewidth": 0.7})
    right = max(panel.get_xlim()[1], 1.25 * float(max(high.max(), figure.level or 0.0)))  # one scale for all panels
    for i, value, end in zip(at, values, high):
        back = dict(facecolor="white", edgecolor="none", pad=0.4, alpha=0.85)
        panel.text(end + 0.02 * right, i, f"{value:.2f}", va="center", fontsize=7.5, bbox=back, zorder=4)
    if figure.level is not None:
        panel.axvline(figure.level, color="#333333", linewidth=0.9, linestyle=(0, (4, 3)), zorder=3)
    panel.set_xlim(0, right)
    panel.set_ylim(len(methods) - 0.5, -0.5)
    panel.set_yticks(range(len(methods)), [clean(name) for name in methods], fontsize=8.5)
    panel.grid(axis="y", visible=False)


def lines(panel: Axes, rows: Sequence[dict[str, Any]], methods: Sequence[str], figure: Panels) -> None:
    """A line a method against x, which doubles from tick to tick."""
    assert figure.x is not None
    for i, method in enumerate(methods):
        points = sorted((number(row[figure.x]) or 0.0, number(row[figure.y]) or 0.0) for row in rows if row["method"] == method)
        look: dict[str, Any] = dict(color=COLOURS[i % len(COLOURS)], linewidth=1.6, markeredgecolor="white", label=clean(method))
        panel.plot(*zip(*points), MARKERS[i % len(MARKERS)] + "-", **look) if points else panel.plot([], [], **look)
    if figure.level is not None:
        panel.axhline(figure.level, color="#333333", linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    panel.set_xscale("log", base=2)
    panel.set_xticks(sorted({number(row[figure.x]) or 1.0 for row in rows}))
    panel.xaxis.set_major_formatter(ScalarFormatter())
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_ylim(bottom=0)
