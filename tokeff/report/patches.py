"""Which patches of a picture were kept, merged or dropped, drawn over it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure as Drawing

from tokeff.errors import UserError
from tokeff.models.flow import EMPTY
from tokeff.report.plots import STYLE, Image, as_image
from tokeff.report.spectrogram import sizes
from tokeff.report.table import clean

GONE = 0.22
"""What is left of a dropped patch's contrast; the rest is white."""
ACROSS = 4


def source_of(place_M: np.ndarray, patches: int) -> np.ndarray:
    """source_S of a method that keeps some patches as they are and drops the others: the row at each patch's place, EMPTY where there is
    none. place_M: the patch at whose place each row stands, EMPTY for rows of no place (`tokeff.reduce.visual.Reduced`)."""
    source, place = np.full(patches, EMPTY), np.asarray(place_M)
    source[place[place != EMPTY]] = np.flatnonzero(place != EMPTY)
    return source


def as_seen(pixels_YXC: np.ndarray, source_S: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The picture (0 to 1) as its rows hold it: a patch that shares its row has the mean of these patches, pixel by pixel of a patch; one
    that is gone has faded."""
    (down, across), (height, width) = grid, pixels_YXC.shape[:2]
    y, x = height // down, width // across
    cells = pixels_YXC.reshape(down, y, across, x, -1).swapaxes(1, 2).reshape(down * across, y, x, -1) / 255.0
    shown = np.where((source_S == EMPTY)[:, None, None, None], 1 - GONE * (1 - cells), cells)
    for row in np.unique(source_S[source_S != EMPTY]):
        shown[source_S == row] = cells[source_S == row].mean(axis=0)
    return shown.reshape(down, across, y, x, -1).swapaxes(1, 2).reshape(height, width, -1)


def borders(source_S: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """segments_N22: (x, y) ends, in patches, of the edges between patches of unlike rows, and around those of any row."""
    row = np.pad(source_S.reshape(grid), 1, constant_values=EMPTY)
    upright, level = np.argwhere(row[1:-1, :-1] != row[1:-1, 1:]), np.argwhere(row[:-1, 1:-1] != row[1:, 1:-1])
    ends = [np.stack([at[:, ::-1], at[:, ::-1] + step], axis=1) for at, step in ((upright, (0, 1)), (level, (1, 0)))]
    return np.concatenate(ends)


def kept_patches(pixels_YXC: np.ndarray, sources: Mapping[str, np.ndarray], grid: tuple[int, int]) -> Image:
    """A picture (bytes), and beside it for each of `sources` (source_S by name, patches in reading order, without a class row) what its
    rows hold: kept patches as they are, merged ones as their mean inside one border, dropped ones faded.

    Raises UserError for sources and pictures that do not fit the grid.
    """
    if pixels_YXC.ndim != 3 or pixels_YXC.shape[0] % grid[0] or pixels_YXC.shape[1] % grid[1]:
        raise UserError(f"a picture of shape {pixels_YXC.shape} is not {grid[0]} x {grid[1]} patches; give height, width, channels")
    for name, source in sources.items():
        if source.shape != (grid[0] * grid[1],):
            raise UserError(f"{name}: {source.shape} rows are not {grid[0]} x {grid[1]} patches; leave the class row out of source_S")
    with matplotlib.rc_context(STYLE):
        many = 1 + len(sources)
        across = min(many, ACROSS)
        down = math.ceil(many / across)
        high = 2.6 * pixels_YXC.shape[0] / pixels_YXC.shape[1] + 0.6  # two lines of title
        drawing = Drawing(figsize=(2.6 * across, high * down), dpi=144, layout="constrained")
        panels = drawing.subplots(down, across, squeeze=False).ravel()
        for panel in panels:
            panel.set_axis_off()
        extent = (0, grid[1], grid[0], 0)
        panels[0].imshow(pixels_YXC, extent=extent, interpolation="nearest")
        panels[0].set_title(f"all {grid[0] * grid[1]} patches", fontsize=9, fontweight="normal")
        for panel, (name, source) in zip(panels[1:], sources.items()):
            panel.imshow(as_seen(pixels_YXC, source, grid), extent=extent, interpolation="nearest", vmin=0, vmax=1)
            panel.add_collection(LineCollection(list(borders(source, grid)), colors="#111111", linewidths=0.9))
            merged = int((sizes(source) > 1).sum())
            rows = len(np.unique(source[source != EMPTY]))
            said = f"{clean(name)}\n{rows} rows" + (f", {merged} patches merged" if merged else "")
            panel.set_title(said, fontsize=9, fontweight="normal")
        return as_image(drawing, "kept-patches", "Which patches the rows hold", wide=True)
