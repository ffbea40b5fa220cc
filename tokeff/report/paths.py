"""How a drafted text came about: the tree of every pass with the path that was accepted, and the text by the pass that made it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#8c6d31", "#56b4e9")
GREY, INK = "#9a9a9a", "#222222"
WORD, LINE = 11, 108  # the longest label of a node, and a line of text, in characters
WIDE, ROW, DPI = 11.0, 0.27, 90  # of a figure, and of a row of a tree, in inches


@dataclass(frozen=True)
class Pass:
    """One pass. nodes: the text of each node that exists, the root first; parent: the number of each node's parent; path: the numbers of
    the accepted ones, root first; gained: the text of the tokens that the pass committed, the last of them the model's own."""

    nodes: tuple[str, ...]
    parent: tuple[int, ...]
    path: tuple[int, ...]
    gained: tuple[str, ...]


def colour(number: int) -> str:
    """That of a pass, so that neighbours differ."""
    return COLOURS[number % len(COLOURS)]


def shown(text: str, most: int | None = None) -> str:
    """A token as it can be written down: visible line ends and leading spaces, a sign for one without text, cut to `most` characters."""
    text = (text or "\u2205").replace("\n", "\u21b5").replace("\t", "\u21e5")
    text = "\u00b7" + text[1:] if text.startswith(" ") else text
    return text if most is None or len(text) <= most else text[: most - 1] + "\u2026"


def places(one: Pass) -> list[tuple[int, float]]:
    """(depth, row) of every node: the accepted path along the top, a node beside its first child, leaves one below the other."""
    children: dict[int, list[int]] = {}
    for node in range(1, len(one.nodes)):
        children.setdefault(one.parent[node], []).append(node)
    spot: dict[int, tuple[int, float]] = {}
    rows = 0

    def put(node: int, depth: int) -> None:
        nonlocal rows
        spot[node] = (depth, rows)
        for i, child in enumerate(sorted(children.get(node, ()), key=lambda child: child not in one.path)):
            rows += i > 0
            put(child, depth + 1)

    put(0, 0)
    return [spot[node] for node in range(len(one.nodes))]


def draw_trees(passes: Sequence[Pass], numbers: Sequence[int]) -> bytes:
    """A PNG of these passes (numbers from 0), one below the other, on one scale."""
    spots = [places(passes[i]) for i in numbers]
    rows = [max(y for _, y in spot) - min(answer(passes[i], spot)[1], 0) + 2.4 for i, spot in zip(numbers, spots)]
    deepest = max(x for i, spot in zip(numbers, spots) for x, _ in [*spot, answer(passes[i], spot)])
    figure = Figure(figsize=(WIDE, ROW * sum(rows)))
    for axes, i in zip(figure.subplots(len(rows), height_ratios=rows, squeeze=False)[:, 0], numbers):
        draw_tree(axes, passes[i], i)
        axes.set_xlim(-0.08, max(deepest, 4) + 0.8)
    figure.subplots_adjust(0, 0, 1, 1, 0, 0)
    return png(figure)


def png(figure: Figure) -> bytes:
    figure.savefig(out := io.BytesIO(), format="png", dpi=DPI)
    return out.getvalue()


def draw_tree(axes: Axes, one: Pass, number: int) -> None:
    """A pass from left to right: what was drafted grey, what was accepted in the pass's colour, and behind it, framed, the token that the
    model itself gave."""
    spots, tint = places(one), colour(number)
    for node in range(1, len(one.nodes)):
        on = node in one.path
        line(axes, spots[one.parent[node]], spots[node], tint if on else GREY, 1.8 if on else 0.8)
    for node, spot in enumerate(spots):
        on = node in one.path
        word(axes, spot, one.nodes[node], tint if on else "white", "white" if on else GREY, tint if on else GREY)
    own = answer(one, spots)
    line(axes, spots[one.path[-1]], own, tint, 1.2, ":")
    word(axes, own, one.gained[-1], "white", tint, tint)
    top = min(0.0, own[1])
    title = f"pass {number + 1}: {len(one.nodes) - 1} drafted, {len(one.gained)} committed"
    axes.text(0, top - 1.0, title, fontsize=9, color=tint, weight="bold", va="center")
    axes.set(ylim=(max(y for _, y in spots) + 0.8, top - 1.6))
    axes.axis("off")


def answer(one: Pass, spots: Sequence[tuple[int, float]]) -> tuple[int, float]:
    """Where the model's own token goes: behind the accepted path, above drafts that stand there."""
    x, y = spots[one.path[-1]]
    return x + 1, y if (x + 1, y) not in spots else y - 1


def line(axes: Axes, start: tuple[int, float], end: tuple[int, float], tint: str, width: float, style: str = "-") -> None:
    """From a node to its child, a little down first and then level."""
    (x0, y0), (x1, y1) = start, end
    axes.plot([x0, x0 + 0.25, x1], [y0, y1, y1], style, color=tint, linewidth=width, zorder=1)


def word(axes: Axes, spot: tuple[int, float], text: str, fill: str, ink: str, edge: str) -> None:
    """A token in a box that begins at its spot."""
    box = {"boxstyle": "round,pad=0.22", "facecolor": fill, "edgecolor": edge, "linewidth": 1.0}
    axes.text(*spot, shown(text, WORD), family="monospace", fontsize=8.5, color=ink, bbox=box, va="center", ha="left", zorder=3)


def draw_text(passes: Sequence[Pass]) -> bytes:
    """A PNG of the generated text, each token on the colour of the pass that made it (paler where it was drafted, full where the model gave
    it itself), over the number of tokens that each pass committed."""
    lines = wrapped(passes)
    height = 0.24 * len(lines)
    figure = Figure(figsize=(WIDE, height + 2.5), layout="constrained")
    text, bars = figure.subplots(2, height_ratios=(height, 2.3))
    for row, pieces in enumerate(lines):
        x = 0
        for said, number, drafted in pieces:
            text.add_patch(Rectangle((x, row - 0.44), len(said), 0.88, color=colour(number), alpha=0.25 if drafted else 0.6, linewidth=0))
            for i, letter in enumerate(said):
                text.text(x + i + 0.5, row, letter, family="monospace", fontsize=10, color=INK, va="center", ha="center")
            x += len(said)
    text.set(xlim=(0, LINE), ylim=(len(lines) - 0.5, -0.5))
    text.axis("off")
    draw_gains(bars, passes)
    return png(figure)


def wrapped(passes: Sequence[Pass]) -> list[list[tuple[str, int, bool]]]:
    """Lines of (token, its pass, whether it was drafted); a token is not broken."""
    lines: list[list[tuple[str, int, bool]]] = [[]]
    for number, one in enumerate(passes):
        for i, token in enumerate(one.gained):
            said = shown(token, LINE).replace("\u00b7", " ")
            if sum(len(before) for before, *_ in lines[-1]) + len(said) > LINE:
                lines.append([])
            lines[-1].append((said, number, i < len(one.gained) - 1))
    return lines


def draw_gains(axes: Axes, passes: Sequence[Pass]) -> None:
    """Tokens of each pass, and their mean."""
    gains = [len(one.gained) for one in passes]
    mean = sum(gains) / len(gains)
    axes.bar(range(1, len(gains) + 1), gains, color=[colour(i) for i in range(len(gains))], width=0.85)
    axes.axhline(mean, color=INK, linewidth=1, linestyle="--")
    axes.set_title(f"{sum(gains)} tokens in {len(gains)} passes: {mean:.2f} a pass", loc="left", fontsize=10)
    axes.set(xlabel="pass of the model", ylabel="tokens", xlim=(0.4, max(len(gains), 16) + 0.6), ylim=(0, max(gains) + 0.5))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
