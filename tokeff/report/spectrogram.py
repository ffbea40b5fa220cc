"""Which rows of a sound an encoder merged, drawn on its spectrogram."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import StrMethodFormatter

from tokeff.errors import UserError
from tokeff.models.audio import HOP, RATE
from tokeff.models.flow import EMPTY
from tokeff.report.plots import STYLE, Image, as_image


def as_held(mel_TI: np.ndarray, source_S: np.ndarray) -> np.ndarray:
    """mel_TI in which every frame is the mean of all frames that ended in the same row; NaN for rows that are gone."""
    S, each = len(source_S), len(mel_TI) // len(source_S)
    pairs = mel_TI[: S * each].reshape(S, -1)
    held = np.full(pairs.shape, np.nan)
    for row in np.unique(source_S[source_S != EMPTY]):
        held[source_S == row] = pairs[source_S == row].mean(axis=0)
    return held.reshape(S * each, -1)


def sizes(source_S: np.ndarray) -> np.ndarray:
    """For every row of the input, how many are in the row that holds it; 0 for those that are gone."""
    there = source_S != EMPTY
    return np.where(there, np.bincount(source_S[there], minlength=1)[np.where(there, source_S, 0)], 0)


def merged_rows(mel_TI: np.ndarray, sources: Mapping[str, np.ndarray], upto: float) -> Image:
    """The first `upto` seconds of a log-mel window, and below it for each of `sources` (source_S by name) what its rows hold: the window
    with every frame replaced by the mean over its merged row, and a strip of how many input rows that has. UserError for sources that do
    not fit the window."""
    for name, source in sources.items():
        if len(source) == 0 or len(mel_TI) % len(source):
            raise UserError(f"{name}: {len(source)} rows do not divide {len(mel_TI)} frames; give the source_BS of this window")
    with matplotlib.rc_context(STYLE):
        ratios = [1.0, *(ratio for _ in sources for ratio in (1.0, 0.16))]
        drawing = Drawing(figsize=(9.6, 1.1 + 1.45 * len(sources) + 1.1), dpi=144, layout="constrained")
        panels = drawing.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
        end, low, high = len(mel_TI) * HOP / RATE, float(mel_TI.min()), float(mel_TI.max())
        most = max(2, *(int(sizes(source).max()) for source in sources.values()))
        shape = {"aspect": "auto", "origin": "lower", "interpolation": "nearest"}
        shown = {f"all {len(next(iter(sources.values())))} rows": mel_TI} | {
            f"{name} of rows,\n{len(np.unique(source[source != EMPTY]))} left": as_held(mel_TI, source) for name, source in sources.items()
        }
        for panel, (name, mel) in zip((panels[0], *panels[1::2]), shown.items()):
            panel.imshow(mel.T, cmap="magma", vmin=low, vmax=high, extent=(0, end, 0, mel_TI.shape[1]), **shape)
            panel.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        strip = None
        for panel, source in zip(panels[2::2], sources.values()):
            strip = panel.imshow(sizes(source)[None], cmap="YlGnBu", norm=LogNorm(1, most), extent=(0, end, 0, 1), **shape)
        for panel in panels:
            panel.set_yticks([])
            panel.grid(False)
            panel.set_xlim(0, min(upto, end))
        panels[-1].set_xlabel("seconds; bands of the mel scale upwards; each strip: how many input rows the row there holds")
        if strip is not None:
            bar = drawing.colorbar(strip, ax=list(panels), shrink=0.6, aspect=30, pad=0.01)
            bar.ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            bar.ax.set_ylabel("input rows in one row", fontsize=8.5)
        return as_image(drawing, "merged-rows", "What merged rows hold", wide=True)
