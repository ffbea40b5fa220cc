"""Draw the figures of a run as PNG and SVG: one colour and marker for each family, labels beside the data."""

import dataclasses
import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import FuncFormatter, PercentFormatter, ScalarFormatter

from tokeff.report import labels
from tokeff.report.curves import draw_curves
from tokeff.report.figures import Bars, Curves, Figure, Lines, Panels, Payoff, Scatter
from tokeff.report.kept import Kept
from tokeff.report.panels import draw_panels
from tokeff.report.payoff import draw_payoff
from tokeff.report.table import clean, interval, is_method, number

FAMILIES = {
    "baseline": ("#555555", "s"),
    "kv": ("#0072b2", "o"),
    "sparse": ("#d55e00", "^"),
    "reduce": ("#009e73", "D"),
    "decode": ("#aa4499", "P"),
}
OTHER = ("#8c6d31", "X")
AXES = {
    "held": "bytes held, share of the full cache",
    "read": "bytes read per decode step, share of the full cache",
    "peak": "peak memory / full cache",
    "kl": "KL to the full cache, nats (lower is better)",
    "loss": "loss on held-out text, nats a token (lower is better)",
    "answer_logprob": "log-likelihood of the right answer (higher is better)",
    "later_logprob": "log-likelihood of the right answer, asked later (higher is better)",
    "turns_logprob": "log-likelihood of the right answer, asked in turns (higher is better)",
    "top1_agree": "next token agrees with the full cache (higher is better)",
    "decode_tok_s": "tokens decoded a second",
    "tokens_per_pass": "tokens committed by one forward pass",
    "mat": "tokens committed by one pass (MAT)",
    "of_dense": "speed / dense decoding's",
    "batch": "batch size",
    "prefill_s": "prefill, seconds",
    "share": "rows a layer works on, mean over layers",
    "wer": "word error rate (lower is better)",
    "accuracy": "right answers (higher is better)",
    "labelled": "digits named rightly (higher is better)",
    "watched": "right answers about clips (higher is better)",
    "speedup": "prefill of all rows / the method's, seconds",
    "encoder_speedup": "encoder over all rows / the method's, seconds",
    "picture_speedup": "batch with all rows / the method's, seconds",
    "clip_speedup": "batch with all rows / the method's, seconds",
    "context": "context, tokens",
}
PERCENT = ("held", "read", "top1_agree", "share")
STYLE: dict[Any, Any] = {
    "font.size": 9.5, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "axes.edgecolor": "#999999", "grid.color": "#e6e6e6", "grid.linewidth": 0.7, "legend.frameon": False,
    "svg.hashsalt": "tokeff", "text.parse_math": False,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Image:
    """A drawn figure."""

    name: str
    title: str
    png: bytes = dataclasses.field(repr=False)
    svg: bytes = dataclasses.field(repr=False)
    wide: bool = False
    """Too wide for half of the page."""


def draw_all(
    rows: Sequence[dict[str, Any]], figures: Sequence[Figure], kept: Sequence[tuple[str, Kept]]
) -> list[Image]:
    """Draw every figure that has data, and the kept-token strips when some method kept tokens."""
    with matplotlib.rc_context(STYLE):
        drawn = [image for figure in figures if (image := draw(rows, figure)) is not None]
        return [*drawn, strips(kept)] if kept else drawn


def draw(rows: Sequence[dict[str, Any]], figure: Figure) -> Image | None:
    """Draw one figure, or return None when no row has its columns."""
    match figure:
        case Scatter():
            return _scatter(_having(rows, figure.x, figure.y), figure)
        case Lines():
            return _lines(_having(rows, figure.x, figure.y), figure)
        case Bars():
            return _bars(_having(rows, figure.y), figure)
        case Curves():
            drawing = draw_curves(_having(rows, figure.x, figure.y), figure, AXES, PERCENT)
            return drawing and as_image(drawing, f"{figure.y}-{figure.x}-curves", figure.title, wide=True)
        case Panels():
            drawing = draw_panels(_having(rows, figure.y, *([figure.x] if figure.x else [])), figure, AXES)
            return drawing and as_image(drawing, f"{figure.y}-{figure.x or 'bars'}-by-{figure.by}", figure.title, wide=True)
        case Payoff():
            drawing = draw_payoff(rows, figure)
            return drawing and as_image(drawing, "payoff", figure.title, wide=True)


def _having(rows: Sequence[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    """Return the rows with a finite number in every named column."""
    values = [[number(row.get(name)) for name in names] for row in rows]
    return [row for row, its in zip(rows, values) if all(value is not None and math.isfinite(value) for value in its)]


def _look(row: dict[str, Any]) -> tuple[str, str]:
    return FAMILIES.get(str(row.get("family")), OTHER)


def _values(rows: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([number(row[name]) for row in rows], float)


def _reach(row: dict[str, Any], name: str) -> np.ndarray:
    """Return how far the interval of a value reaches (below, above) it, as matplotlib wants it."""
    value, ends = number(row.get(name)), interval(row, name)
    if value is None or ends is None or not all(map(math.isfinite, ends)):
        return np.zeros((2, 1))
    return np.array([[max(value - ends[0], 0.0)], [max(ends[1] - value, 0.0)]])


def _scatter(rows: list[dict[str, Any]], figure: Scatter) -> Image | None:
    """Draw a panel for each context length."""
    if not rows:
        return None
    lengths = sorted({number(row.get("context")) or 0 for row in rows})
    across = min(len(lengths), 2)
    down = math.ceil(len(lengths) / across)
    drawing = Drawing(figsize=(7.6 * across, 4.9 * down), dpi=144, layout="constrained")
    panels = drawing.subplots(down, across, squeeze=False).ravel()
    for panel in panels[len(lengths) :]:
        panel.set_axis_off()
    here = [[row for row in rows if (number(row.get("context")) or 0) == length] for length in lengths]
    for panel, some, length in zip(panels, here, lengths):
        _points(panel, some, figure)
        if length:
            panel.set_title(f"context {length:g} tokens", fontsize=9.5, fontweight="normal", color="#555555")
    drawing.draw_without_rendering()  # labels are placed in pixels, once no panel moves any more
    for panel, some in zip(panels, here):
        _names(panel, some, figure)
    title = figure.title or f"{figure.y} against {figure.x}"
    return as_image(drawing, f"{figure.y}-{figure.x}", title, wide=across > 1)


def _points(panel: Axes, rows: list[dict[str, Any]], figure: Scatter) -> None:
    """Draw the points of one context length, with their intervals and families."""
    xs, ys = _values(rows, figure.x), _values(rows, figure.y)
    for row, x, y in zip(rows, xs, ys):
        colour, marker = _look(row)
        panel.errorbar(x, y, yerr=_reach(row, figure.y), color=colour, elinewidth=0.8, alpha=0.45, zorder=2)
        panel.plot(x, y, marker, color=colour, markersize=7, markeredgecolor="white", markeredgewidth=0.6, zorder=3)
    if figure.log_y:
        positive = ys[ys > 0]
        panel.set_yscale("symlog", linthresh=float(positive.min()) if positive.size else 1.0)
        panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))  # mathematics in text is off: names may hold a $
    level = _random_level(rows, figure.y)
    if level is not None:
        panel.axhline(level, color="#555555", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    panel.margins(x=0.14, y=0.12)
    _axis(panel, figure.x, figure.y, xs)
    _legend(panel, rows)


def _names(panel: Axes, rows: list[dict[str, Any]], figure: Scatter) -> None:
    """Write the names beside the points, off the intervals and the random baseline's line."""
    points = list(zip(_values(rows, figure.x), _values(rows, figure.y)))
    reach = [_reach(row, figure.y)[:, 0] for row in rows]
    avoid = [((x, y - below), (x, y + above)) for (x, y), (below, above) in zip(points, reach) if below or above]
    level = _random_level(rows, figure.y)
    if level is not None:
        left, right = panel.get_xlim()
        avoid.append(((left, level), (right, level)))
    labels.place(panel, points, [clean(row["method"]) for row in rows], avoid)


def _random_level(rows: list[dict[str, Any]], y: str) -> float | None:
    """Return the level of the random baseline, if it was measured: a method on its wrong side adds nothing."""
    return next((number(row[y]) for row in rows if is_method(row, "random")), None)


def _axis(panel: Axes, x: str, y: str, xs: np.ndarray) -> None:
    """Name the axes, and write shares as percentages."""
    panel.set_xlabel(AXES.get(x, x))
    panel.set_ylabel(AXES.get(y, y))
    if x in PERCENT:
        panel.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        panel.set_xlim(left=0.0, right=1.1 * max(1.0, float(xs.max())))
    if y in PERCENT:
        panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _legend(panel: Axes, rows: list[dict[str, Any]]) -> None:
    """Say which colour and marker is which family, above the panel and out of the data's way."""
    for family in dict.fromkeys(str(row.get("family", "other")) for row in rows):
        colour, marker = FAMILIES.get(family, OTHER)
        panel.plot([], [], marker, color=colour, label=clean(family))
    panel.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=6, fontsize=8.5, handletextpad=0.2, columnspacing=1)


def _lines(rows: list[dict[str, Any]], figure: Lines) -> Image | None:
    """Draw a line a method, named at its right end, of the methods measured at several x; where none is there is nothing to draw."""
    at = {method: {number(row[figure.x]) or 0.0 for row in rows if row["method"] == method} for method in {r["method"] for r in rows}}
    rows = [row for row in rows if len(at[row["method"]]) > 1]
    ticks = sorted({x for row in rows for x in at[row["method"]]})
    if not rows:
        return None
    drawing = Drawing(figsize=(7.6, 4.9), dpi=144, layout="constrained")
    panel = drawing.subplots()
    ends = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = sorted((row for row in rows if row["method"] == method), key=lambda row: number(row[figure.x]) or 0.0)
        colour, marker = _look(mine[0])
        xs, ys = _values(mine, figure.x), _values(mine, figure.y)
        panel.plot(xs, ys, marker + "-", color=colour, markersize=6, linewidth=1.4, markeredgecolor="white", alpha=0.9)
        ends.append((xs[-1], ys[-1], clean(method), colour))
    _axis(panel, figure.x, figure.y, _values(rows, figure.x))
    panel.set_ylim(bottom=0)
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks)
    panel.xaxis.set_major_formatter(ScalarFormatter())
    panel.minorticks_off()
    _legend(panel, rows)
    drawing.draw_without_rendering()
    _end_labels(panel, ends)
    return as_image(drawing, f"{figure.y}-{figure.x}", figure.title or f"{figure.y} against {figure.x}")


def _end_labels(panel: Axes, ends: list[tuple[float, float, str, str]], size: float = 8.5) -> None:
    """Name the lines in a column to the right of the axes, spread so that no two names touch. Layout comes first."""
    height = panel.get_window_extent().height
    to_share = panel.transData + panel.transAxes.inverted()
    at = [to_share.transform((x, y)) for x, y, _, _ in ends]
    gap = size * 1.25 * panel.figure.dpi / 72 / height
    for (x, y, name, colour), level in zip(ends, labels.spread([p[1] for p in at], gap)):
        arrow = dict(arrowstyle="-", color=colour, linewidth=0.6, alpha=0.6, shrinkA=0, shrinkB=3, relpos=(0, 0.5))
        panel.annotate(name, (x, y), (1.04, level), textcoords="axes fraction", va="center", fontsize=size,
                       color=colour, arrowprops=arrow, annotation_clip=False)  # fmt: skip


def _bars(rows: list[dict[str, Any]], figure: Bars) -> Image | None:
    """Draw a bar a row at the longest context, with its value written at its end: to the left of it below zero."""
    if not rows:
        return None
    longest = max(number(row.get("context")) or 0 for row in rows)
    rows = [row for row in rows if (number(row.get("context")) or 0) == longest]
    drawing = Drawing(figsize=(7.6, 0.9 + 0.32 * len(rows)), dpi=144, layout="constrained")
    panel = drawing.subplots()
    values = _values(rows, figure.y)
    reach = np.concatenate([_reach(row, figure.y) for row in rows], axis=1)
    panel.barh(range(len(rows)), values, color=[_look(row)[0] for row in rows], alpha=0.85, height=0.68,
               xerr=reach if reach.any() else None, ecolor="#333333", error_kw={"linewidth": 0.8})  # fmt: skip
    left, right = min(float((values - reach[0]).min()), 0.0), max(float((values + reach[1]).max()), 0.0)
    span = right - left or 1.0
    for i, (value, below, above) in enumerate(zip(values, *reach)):
        end, side = (value - below - 0.01 * span, "right") if value < 0 else (value + above + 0.01 * span, "left")
        panel.text(end, i, f"{value:.3g}", va="center", ha=side, fontsize=8.5)
    reference = next((v for row, v in zip(rows, values) if is_method(row, figure.reference)), None)
    if reference is not None:
        panel.axvline(reference, color="#333333", linewidth=0.9, linestyle=(0, (4, 3)), zorder=3)
    panel.set_yticks(range(len(rows)), [clean(row["method"]) for row in rows])
    panel.invert_yaxis()
    panel.grid(axis="y", visible=False)
    panel.set_xlabel(AXES.get(figure.y, figure.y) + (f" (context {longest:g})" if longest else ""))
    panel.set_xlim(left - 0.1 * span if left < 0 else 0.0, right + 0.1 * span)
    _legend(panel, rows)
    return as_image(drawing, f"{figure.y}-bars", figure.title or figure.y)


def strips(kept: Sequence[tuple[str, Kept]]) -> Image:
    """Draw a strip a method: layers down, prompt positions along, shaded by the share of heads that kept a position."""
    drawing = Drawing(figsize=(9.6, 0.9 + 0.92 * len(kept)), dpi=144, layout="constrained")
    panels = drawing.subplots(len(kept), 1, squeeze=False)[:, 0]
    for panel, (method, what) in zip(panels, kept):
        share_LS = what.share_LS()
        panel.imshow(share_LS, aspect="auto", cmap="YlGnBu", vmin=0, vmax=1, interpolation="antialiased",
                               interpolation_stage="data", extent=(0, share_LS.shape[1], len(share_LS), 0))  # fmt: skip
        for a, b in what.needles:
            panel.plot([a, max(b, a + 4)], [-0.04, -0.04], color="#d55e00", linewidth=4, clip_on=False,
                       transform=panel.get_xaxis_transform(), solid_capstyle="butt")  # fmt: skip
        panel.set_ylabel(clean(method), rotation=0, ha="right", va="center", fontsize=9)
        panel.set_yticks([0, len(share_LS)], ["0", str(len(share_LS))], fontsize=6.5, color="#777777")
        panel.grid(False)
        panel.tick_params(axis="x", labelbottom=panel is panels[-1], length=3)
    panels[-1].set_xlabel("prompt position, tokens (orange: needles); each strip has layer 0 on top", labelpad=8)
    bar = drawing.colorbar(panels[0].images[0], ax=list(panels), shrink=min(1.0, 3 / len(kept)), aspect=20, pad=0.01)
    bar.ax.set_ylabel("share of heads that kept the position", fontsize=8.5)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return as_image(drawing, "kept-tokens", "Which tokens each method kept", wide=True)


def as_image(drawing: Drawing, name: str, title: str, wide: bool = False) -> Image:
    """Write a drawing in both formats, the same bytes for the same data."""
    png, svg = io.BytesIO(), io.BytesIO()
    drawing.savefig(png, format="png", metadata={"Software": None})
    drawing.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return Image(name, title, png.getvalue(), svg.getvalue(), wide)
