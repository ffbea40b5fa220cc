"""The picture that says when drafting pays: what a pass over n rows costs, as a curve, and the tokens it commits, as points."""

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from tokeff.report import labels
from tokeff.report.figures import Payoff
from tokeff.report.panels import GAINS, chosen
from tokeff.report.table import clean, number

Point = tuple[float, float]
NEEDED = ("nodes", "tn", "mat", "break_even")
GUIDES = ("#0072b2", "#009e73", "#e69f00")
TICKS = (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def draw_payoff(rows: Sequence[dict[str, Any]], figure: Payoff) -> Drawing | None:
    """A panel for each class of prompts; None where nothing was measured."""
    rows = [row for row in chosen(rows, figure.at) if number(row.get("nodes")) and number(row.get("tn"))]
    points = [row for row in rows if all(number(row.get(name)) is not None for name in NEEDED)]
    groups = {name: [row for row in points if row.get("class") == name] for name in dict.fromkeys(row.get("class") for row in points)}
    if not groups:
        return None
    curve, across = curve_of(rows), min(len(groups), 2)
    down = math.ceil(len(groups) / across)
    drawing = Drawing(figsize=(7.4 * across, 4.9 * down), dpi=144, layout="constrained")
    panels = list(drawing.subplots(down, across, squeeze=False, sharey=True).ravel())
    for panel in panels[len(groups) :]:
        panel.set_axis_off()
    for panel, (name, group) in zip(panels, groups.items()):
        costs(panel, curve, guides_of(points))
        gains(panel, group)
        panel.set_title(f"prompts: {clean(name)}", fontsize=9.5, fontweight="normal", color="#333333")
    axes_of(panels[: len(groups)], across, points, curve)
    legend(panels[-1], panels[0], inside=len(groups) == len(panels))
    drawing.draw_without_rendering()
    drawing.set_layout_engine("none")  # names are placed in pixels: no panel may move any more
    for panel, group in zip(panels, groups.values()):
        at = [(float(row["nodes"]), float(row["mat"])) for row in group]
        stems = [((x, min(y, float(row["break_even"]))), (x, y)) for (x, y), row in zip(at, group)]
        labels.place(panel, at, [clean(row["method"]) for row in group], stems, size=8)
    return drawing


def curve_of(rows: Sequence[dict[str, Any]]) -> list[Point]:
    """(n, T(n)/T(1)) from n = 1 on: as it was measured for its own sake and, beyond that, beside the drafters."""
    own = {float(row["nodes"]): float(row["tn"]) for row in rows if number(row.get("mat")) is None}
    beside = sorted({float(row["nodes"]) for row in rows if float(row["nodes"]) > max(own, default=1.0)})
    found = own | {1.0: 1.0} | {n: median(float(row["tn"]) for row in rows if row["nodes"] == n) for n in beside}
    return sorted(found.items())


def guides_of(rows: Sequence[dict[str, Any]]) -> dict[str, list[Point]]:
    """The same by arithmetic, for each machine that rows name."""
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        for name, ratio in (row.get("on") or {}).items():
            found.setdefault(name, {1.0: 1.0})[float(row["nodes"])] = float(ratio)
    return {name: sorted(points.items()) for name, points in found.items()}


def costs(panel: Axes, curve: Sequence[Point], guides: dict[str, list[Point]]) -> None:
    """The measured curve, the ground above it, and the other machines' lines."""
    widths, ratios = zip(*curve)
    panel.fill_between(widths, ratios, 1e3, color="#f1f6ee", zorder=0)
    panel.plot(widths, ratios, "-", color="#222222", linewidth=1.8, zorder=2, label="T(n)/T(1), measured here")
    for i, ((name, points), colour) in enumerate(zip(guides.items(), GUIDES)):
        dashes = (4 * i, (4, 4))  # out of step, since lines may lie on each other
        panel.plot(*zip(*points), linestyle=dashes, color=colour, linewidth=1.2, zorder=2, label=f"{clean(name)}, by arithmetic")


def gains(panel: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Drafters: a point at MAT, from which a stem goes down to break-even. Full where it was faster than plain decoding by the clock."""
    for row in rows:
        x, y, paid = float(row["nodes"]), float(row["mat"]), (number(row.get("of_dense")) or 0.0) > 1
        panel.plot([x, x], [max(float(row["break_even"]), TICKS[0]), y], "-", color=GAINS, linewidth=1.0, alpha=0.6, zorder=3)
        panel.plot(x, y, "o", color=GAINS if paid else "white", markeredgecolor=GAINS, markersize=6, zorder=4)
    for label, colour in (("MAT of a drafter, faster by the clock", GAINS), ("and slower; its stem: less the draft's cost", "white")):
        panel.plot([], [], "o", color=colour, markeredgecolor=GAINS, markersize=6, label=label)


def axes_of(panels: Sequence[Axes], across: int, rows: Sequence[dict[str, Any]], curve: Sequence[Point]) -> None:
    """Both axes double by equal steps, so that a gain of a share looks alike everywhere."""
    top = max(max(float(row["mat"]) for row in rows), curve[-1][1])
    right = max(max(float(row["nodes"]) for row in rows), curve[-1][0])
    low = min(min(float(row["break_even"]) for row in rows), 1.0)
    for i, panel in enumerate(panels):
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_xlim(0.92, 1.5 * right)
        panel.set_ylim(max(0.9 * low, TICKS[0]), 1.25 * top)
        panel.xaxis.set_major_locator(FixedLocator([2.0**k for k in range(12)]))
        panel.yaxis.set_major_locator(FixedLocator(TICKS))
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_locator(NullLocator())
        panel.set_xlabel("rows of a pass, n")
        if i % across == 0:
            panel.set_ylabel("tokens a pass; T(n)/T(1)")


def legend(last: Axes, first: Axes, inside: bool) -> None:
    """In the place that no panel takes, or else inside the first one."""
    look: dict[str, Any] = dict(handlelength=1.8, labelspacing=0.35)
    if inside:
        first.legend(loc="upper left", fontsize=7, frameon=True, framealpha=0.85, edgecolor="none", **look)
    else:
        last.legend(*first.get_legend_handles_labels(), loc="center left", fontsize=9.5, **look)
