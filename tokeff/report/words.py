"""How far up a network the tokens of a text go, drawn on the text itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure as Drawing
from matplotlib.patches import Rectangle

from tokeff.errors import UserError
from tokeff.kv.prefill import Prompt
from tokeff.models.config import Config
from tokeff.models.flow import EMPTY
from tokeff.models.transformer import Pass
from tokeff.report.paths import shown
from tokeff.report.plots import STYLE, Image, as_image
from tokeff.report.table import clean

LINE = 104  # characters
WIDE, ROW, EM = 9.6, 0.215, 0.602  # inches of a figure and of a line; what a letter of the fixed-width font takes of its size
SHADES, NEEDLE = "Blues", "#d55e00"


def reach_of(prompt: Prompt, cut: Pass, cfg: Config, row: int = 0) -> np.ndarray:
    """count_S of a prompt's tokens: how many layers work on each. A row that leaves at a layer has written its key there, which counts.
    Where the model runs again on the rows that were chosen, all the others have gone through the layers below once."""
    length = int(prompt.length_B[row])
    count_S = np.zeros(length, int)
    for layer in prompt.layers:
        order_S = np.asarray(layer.order_BKS)[row, 0]
        at = order_S[order_S != EMPTY]
        count_S[at if prompt.place_BM is None else np.asarray(prompt.place_BM)[row][at]] += 1
    return np.maximum(count_S, cut.layers(cfg)[0] + 1) if cut.restart else count_S


def lines_of(tokens: Sequence[str]) -> list[list[tuple[int, str]]]:
    """(number, text) of the tokens line by line; a token is broken only where it is longer than a line."""
    lines: list[list[tuple[int, str]]] = [[]]
    for i, token in enumerate(tokens):
        text = shown(token, LINE)
        text = f" {text[1:]}" if text.startswith("\u00b7") else text
        if sum(len(before) for _, before in lines[-1]) + len(text) > LINE:
            lines.append([])
        lines[-1].append((i, text))
    return lines


def kept_words(
    tokens: Sequence[str], reach: Mapping[str, np.ndarray], layers: int, needles: Sequence[tuple[int, int]] = ()
) -> Image:
    """A text once for each of `reach` (by name, how many of the `layers` work on each token), its tokens on a shade of that number.

    needles: (start, end) of tokens to underline. Raises UserError for numbers that are not one a token.
    """
    for name, count in reach.items():
        if len(count) != len(tokens) or min(count, default=0) < 0 or max(count, default=0) > layers:
            raise UserError(f"{name}: {len(count)} numbers of layers up to {layers} for {len(tokens)} tokens; give one a token")
    rows = lines_of(tokens)
    high = 0.34 + ROW * len(rows)
    total = high * len(reach) + 0.62
    marked = {i for a, b in needles for i in range(a, b)}
    with matplotlib.rc_context(STYLE):
        drawing = Drawing(figsize=(WIDE, total), dpi=144)
        for n, (name, count) in enumerate(reach.items()):
            panel = drawing.add_axes((0.01, (total - high * (n + 1)) / total, 0.98, ROW * len(rows) / total))
            top = int((np.asarray(count) == layers).sum())
            panel.set_title(f"{clean(name)}: {top} of {len(tokens)} tokens go through all {layers} layers", fontsize=9.5, pad=4)
            draw_lines(panel, rows, np.asarray(count), layers, marked)
        bar = drawing.add_axes((0.3, 0.36 / total, 0.4, 0.09 / total))
        drawing.colorbar(ScalarMappable(Normalize(0, layers), SHADES), cax=bar, orientation="horizontal")
        bar.set_xlabel("layers that work on a token", fontsize=8.5, labelpad=1)
        bar.tick_params(labelsize=8)
        return as_image(drawing, "kept-words", "How far up the tokens go", wide=True)


def draw_lines(panel: Axes, rows: Sequence[Sequence[tuple[int, str]]], count: np.ndarray, layers: int, marked: set[int]) -> None:
    """Lines of a text in axes that are as wide as a line of letters."""
    size, shade = 0.98 * WIDE / LINE * 72 / EM, matplotlib.colormaps[SHADES]
    for row, pieces in enumerate(rows):
        x = 0
        for i, text in pieces:
            colour = shade(count[i] / layers)
            ink = "white" if np.dot(colour[:3], (0.3, 0.59, 0.11)) < 0.55 else "#222222"
            panel.add_patch(Rectangle((x, row - 0.5), len(text), 1, color=colour, linewidth=0))
            panel.text(x, row, text, family="DejaVu Sans Mono", fontsize=size, color=ink, va="center_baseline", ha="left")
            if i in marked:
                panel.plot([x, x + len(text)], [row + 0.44] * 2, color=NEEDLE, linewidth=1.8, solid_capstyle="butt")
            x += len(text)
    panel.set(xlim=(0, LINE), ylim=(len(rows) - 0.5, -0.5))
    panel.axis("off")
