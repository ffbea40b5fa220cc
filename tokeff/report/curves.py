"""Many methods at several budgets: a line a method, a few methods a panel, all others behind them in grey. A method with one setting is a
point, in panels of such methods."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from tokeff.report.figures import Curves
from tokeff.report.table import clean, number

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "os^DvP"
IN_A_PANEL = len(COLOURS)
TICKS = (0.05, 0.1, 0.25, 0.5, 1.0)
BEHIND = {"Random": "--", "Recent": ":", "RandomPatches": "--", "RandomPatches, in place": ":"}
"""Baselines that every panel shows, and their dashes."""
WHOLE = "Full"
ALL = 0.99  # what holds, or reads, as much as the full cache says nothing about holding, or reading, less


def draw_curves(rows: Sequence[dict[str, Any]], figure: Curves, names: dict[str, str], percent: Sequence[str]) -> Drawing | None:
    """Panels of methods from the best to the worst, at the context length with the most rows; None where no method has two budgets. Against
    bytes held stand those that hold less than all."""
    lengths = [number(row.get("context")) or 0 for row in rows]
    longest = max(lengths, key=lengths.count, default=0)
    rows = [row for row, length in zip(rows, lengths) if length == longest]
    lines = {name: line(rows, name, figure) for name in dict.fromkeys(row["method"] for row in rows)}
    whole = lines.pop(WHOLE, (np.array([]), np.array([])))[1]  # what all is compared with has no budgets: a level
    lines = {name: xy for name, xy in lines.items() if len(xy[0]) and xy[0].min() < ALL}
    usual = common(rows, [name for name, xy in lines.items() if len(xy[0]) > 1])
    ranks = {name: standing(line(usual, name, figure), figure) for name in lines}
    shown = sorted((name for name in lines if name not in BEHIND), key=lambda name: ranks[name], reverse=figure.high)
    shown, points = ([name for name in shown if (len(lines[name][0]) > 1) == several] for several in (True, False))
    if not shown:
        return None
    groups = [some[i : i + IN_A_PANEL] for some in (shown, points) for i in range(0, len(some), IN_A_PANEL)]
    across = min(3, len(groups))
    down = math.ceil(len(groups) / across)
    drawing = Drawing(figsize=(4.6 * across, 3.9 * down), dpi=144, layout="constrained")
    panels = drawing.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()
    for panel in panels[len(groups) :]:
        panel.set_axis_off()
    for panel, group in zip(panels, groups):
        draw_panel(panel, lines, group, figure)
        if len(whole) == 1 and (whole[0] > 0 or not figure.log_y):
            panel.axhline(whole[0], color="black", linewidth=0.8, zorder=2, label=WHOLE)
        panel.legend(fontsize=7.5, loc="best", handlelength=1.6, labelspacing=0.25)
    for panel in panels[: len(groups)]:
        panel.set_xlabel(names.get(figure.x, figure.x), fontsize=8)
        if figure.x in percent:
            panel.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for panel in panels[::across]:
        panel.set_ylabel(names.get(figure.y, figure.y), fontsize=8)
    return drawing


def line(rows: Sequence[dict[str, Any]], method: str, figure: Curves) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of a method's rows, by x."""
    found = [(number(row.get(figure.x)), number(row.get(figure.y))) for row in rows if row["method"] == method]
    points = sorted((x, y) for x, y in found if x is not None and y is not None)
    return np.array([x for x, _ in points]), np.array([y for _, y in points])


def common(rows: Sequence[dict[str, Any]], methods: Sequence[str]) -> Sequence[dict[str, Any]]:
    """The rows at budgets that all of these methods have, and all rows of other methods; every row where they have none in common."""
    budgets = [{row.get("budget") for row in rows if row["method"] == name} for name in methods]
    shared = set.intersection(*budgets) if budgets else set()
    return [row for row in rows if row["method"] not in methods or row.get("budget") in shared] if shared else rows


def standing(xy: tuple[np.ndarray, np.ndarray], figure: Curves) -> float:
    """How good a line is: its mean height, on the scale it is drawn in."""
    y = np.log(np.maximum(xy[1], 1e-6)) if figure.log_y else xy[1]
    return float(y.mean())


def draw_panel(panel: Axes, lines: dict[str, tuple[np.ndarray, np.ndarray]], group: Sequence[str], figure: Curves) -> None:
    """The lines of a group, over all others."""
    for name, (x, y) in lines.items():
        if name not in group and name not in BEHIND:
            panel.plot(x, y, "-", color="#dddddd", linewidth=0.7, zorder=1)
    for name, dash in BEHIND.items():
        if name in lines:
            panel.plot(*lines[name], dash, color="#555555", linewidth=1.2, zorder=2, label=clean(name))
    for name, colour, marker in zip(group, COLOURS, MARKERS):
        look: dict[str, Any] = dict(color=colour, linewidth=1.6, markersize=5, markeredgecolor="white", zorder=3, label=clean(name))
        panel.plot(*lines[name], marker + "-", **look)
    panel.set_xscale("log", base=2)
    panel.set_xticks(TICKS)
    panel.set_xlim(0.04, 1.15)
    panel.minorticks_off()
    if figure.log_y:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
