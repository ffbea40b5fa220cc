"""Which patches of a picture, or of a clip's frames, were kept, merged or dropped, drawn over it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.axes import Axes
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
ELSEWHERE, TINT = np.array([0.0, 0.447, 0.698]), 0.6
"""Colour of patches that are in a row of another place, and how much of it they take."""


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
        down = math.ceil((1 + len(sources)) / ACROSS)
        across = math.ceil((1 + len(sources)) / down)
        high = 2.55 * pixels_YXC.shape[0] / pixels_YXC.shape[1] + 0.57  # two lines of title
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
            merged, rows = int((sizes(source) > 1).sum()), len(np.unique(source[source != EMPTY]))
            said = f"{clean(name)}\n{rows} rows" + (f", {merged} patches merged" if merged else "")
            panel.set_title(said, fontsize=9, fontweight="normal")
        return as_image(drawing, "kept-patches", "Which patches the rows hold", wide=True)


def frames_as_seen(frames_TYXC: np.ndarray, source_TS: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The frames (0 to 1) as their rows hold them. source: for each patch the number, through all frames, of the patch at whose place its
    row stands. There a row's patches are shown as their mean; the others of it are tinted, and what is gone has faded."""
    T, height, width = frames_TYXC.shape[:3]
    tall = (T * grid[0], grid[1])
    shown = as_seen(frames_TYXC.reshape(T * height, width, -1), source_TS.reshape(-1), tall).reshape(frames_TYXC.shape)
    there = (source_TS == np.arange(source_TS.size).reshape(source_TS.shape)) | (source_TS == EMPTY)
    away = np.repeat(np.repeat(~there.reshape(T, *grid), height // grid[0], axis=1), width // grid[1], axis=2)[..., None]
    return np.where(away, (1 - TINT) * frames_TYXC / 255.0 + TINT * ELSEWHERE, shown)


def kept_frames(frames_TYXC: np.ndarray, sources: Mapping[str, np.ndarray], grid: tuple[int, int]) -> Image:
    """A clip (bytes) from left to right, and a line below it for each of `sources` (source_TS by name, patches in reading order; its
    numbers as in `frames_as_seen`): kept patches as they are, what stands for several as their mean, what it took in tinted, dropped ones
    faded.

    Raises UserError for sources and frames that do not fit the grid.
    """
    T = len(frames_TYXC)
    if frames_TYXC.ndim != 4 or frames_TYXC.shape[1] % grid[0] or frames_TYXC.shape[2] % grid[1]:
        raise UserError(f"frames of shape {frames_TYXC.shape} are not {grid[0]} x {grid[1]} patches; give frames, height, width, channels")
    for name, source in sources.items():
        if source.shape != (T, grid[0] * grid[1]):
            raise UserError(f"{name}: {source.shape} rows are not those of {T} frames of {grid[0]} x {grid[1]} patches; give source_TS")
    shown = {"all": (whole := np.arange(T * grid[0] * grid[1]).reshape(T, -1))} | dict(sources)
    with matplotlib.rc_context(STYLE):
        high = frames_TYXC.shape[1] / frames_TYXC.shape[2]
        drawing = Drawing(figsize=(1.15 * T + 1.4, (1.15 * high + 0.12) * len(shown) + 0.3), dpi=144)
        drawing.set_layout_engine("constrained", w_pad=0.02, h_pad=0.03, wspace=0.02, hspace=0.02)
        panels = drawing.subplots(len(shown), T, squeeze=False)
        for line, (name, source) in zip(panels, shown.items()):
            frames, said = frames_as_seen(frames_TYXC, source, grid), f"{clean(name)}\n{len(np.unique(source[source != EMPTY]))} rows"
            line[0].set_ylabel(said, rotation=0, ha="right", va="center", fontsize=9, labelpad=6)
            for t, panel in enumerate(line):
                draw_frame(panel, frames[t], source[t], t * grid[0] * grid[1], grid, bordered=source is not whole)
        for t, panel in enumerate(panels[0]):
            panel.set_title(f"frame {t + 1}", fontsize=8.5, fontweight="normal", loc="center")
        return as_image(drawing, "kept-frames", "Which patches of a clip the rows hold", wide=True)


def draw_frame(panel: Axes, shown_YXC: np.ndarray, source_S: np.ndarray, first: int, grid: tuple[int, int], bordered: bool) -> None:
    """One frame; borders are drawn around rows that stand in it. first: the number of its first patch."""
    panel.imshow(shown_YXC, extent=(0, grid[1], grid[0], 0), interpolation="nearest", vmin=0, vmax=1)
    if bordered:
        here = np.where(source_S == first + np.arange(len(source_S)), source_S, EMPTY)
        panel.add_collection(LineCollection(list(borders(here, grid)), colors="#111111", linewidths=0.7))
    panel.set_xticks([])
    panel.set_yticks([])
    panel.grid(False)
    panel.spines[:].set_visible(False)
