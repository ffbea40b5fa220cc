"""What pictures with digits are drawn from: glyphs scaled to any size, things that only look like digits, photographs behind them.

Pure numpy, a batch at a time. A glyph is a `BOX` x `BOX` picture of ink (uint8, 255 is full), as MNIST has them. M are the things drawn on
a picture, T the pictures of an example, C colours.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BOX = 28  # pixels on a side of a glyph
WINDOW = 28  # pixels on a side of what a scaled glyph is drawn in: the largest size of one
MIRRORED = (3, 4, 6, 7, 9)
"""Digits that are none when left and right are exchanged; 2 and 5 would be taken for each other."""
PIECE = 13  # pixels on a side of a piece cut out of a digit

# Letters of straight strokes, none like a digit: pairs of end points (x, y) in a box of 1.
LETTERS = {
    "A": ((0, 1, 0.5, 0), (0.5, 0, 1, 1), (0.2, 0.6, 0.8, 0.6)),
    "E": ((0, 0, 0, 1), (0, 0, 1, 0), (0, 0.5, 0.8, 0.5), (0, 1, 1, 1)),
    "F": ((0, 0, 0, 1), (0, 0, 1, 0), (0, 0.5, 0.8, 0.5)),
    "H": ((0, 0, 0, 1), (1, 0, 1, 1), (0, 0.5, 1, 0.5)),
    "K": ((0, 0, 0, 1), (0, 0.5, 1, 0), (0, 0.5, 1, 1)),
    "M": ((0, 1, 0, 0), (0, 0, 0.5, 0.7), (0.5, 0.7, 1, 0), (1, 0, 1, 1)),
    "N": ((0, 1, 0, 0), (0, 0, 1, 1), (1, 1, 1, 0)),
    "T": ((0, 0, 1, 0), (0.5, 0, 0.5, 1)),
    "V": ((0, 0, 0.5, 1), (0.5, 1, 1, 0)),
    "W": ((0, 0, 0.25, 1), (0.25, 1, 0.5, 0.3), (0.5, 0.3, 0.75, 1), (0.75, 1, 1, 0)),
    "X": ((0, 0, 1, 1), (1, 0, 0, 1)),
    "Y": ((0, 0, 0.5, 0.5), (1, 0, 0.5, 0.5), (0.5, 0.5, 0.5, 1)),
}
_STROKES = np.array([[*strokes, *[strokes[0]] * (4 - len(strokes))] for strokes in LETTERS.values()])


def _shrinking(size: int) -> np.ndarray:
    """(WINDOW, BOX) weights that draw `BOX` pixels at `size`, in the middle of the window: each pixel is the mean over what it covers."""
    edge = (np.arange(WINDOW + 1) - WINDOW / 2) * BOX / max(size, 1) + BOX / 2
    source = np.arange(BOX)
    covered = np.minimum(edge[1:, None], source + 1) - np.maximum(edge[:-1, None], source)
    return (np.clip(covered, 0, None) * size / BOX).astype(np.float32)


SHRINKING = np.stack([_shrinking(size) for size in range(WINDOW + 1)])


def scaled(glyph_BYX: np.ndarray, size_B: np.ndarray) -> np.ndarray:
    """ink_BYX (float32, 0 to 1) of glyphs whose box is `size` pixels, at most `WINDOW`, in the middle of a window."""
    across = SHRINKING[size_B]
    return np.matmul(np.matmul(across, glyph_BYX.astype(np.float32) / 255), across.transpose(0, 2, 1))


def paste(canvas_BYXC: np.ndarray, ink_BYX: np.ndarray, colour_BC: np.ndarray, y_B: np.ndarray, x_B: np.ndarray) -> None:
    """Paint windows of ink onto canvases (float, in place), their middles at (y, x). Canvases have `WINDOW` pixels to spare on all sides,
    which y and x do not count."""
    side, b = np.arange(WINDOW) + WINDOW // 2, np.arange(len(canvas_BYXC))[:, None, None]
    rows, columns = (y_B[:, None] + side)[:, :, None], (x_B[:, None] + side)[:, None]
    there = canvas_BYXC[b, rows, columns]
    canvas_BYXC[b, rows, columns] = there + ink_BYX[..., None] * (colour_BC[:, None, None] - there)


@functools.cache
def letters(n: int = 4096) -> np.ndarray:
    """glyph_NYX of letters, their ends and thickness as uneven as those of handwriting; always the same ones."""
    rng = np.random.default_rng(0)
    ends = _STROKES[rng.integers(len(_STROKES), size=n)].reshape(n, 4, 2, 2)
    wide = rng.uniform(11, 16, (n, 1, 1, 1))
    ends = (ends - 0.5) * np.concatenate([wide, np.full_like(wide, 18)], axis=3) + BOX / 2
    ends = ends + rng.normal(0, 0.9, ends.shape)
    a, along = ends[:, :, 0], ends[:, :, 1] - ends[:, :, 0]
    grid = np.arange(BOX) + 0.5
    point = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)  # (x, y)
    off = point - a[:, :, None]
    t = np.clip((off * along[:, :, None]).sum(-1) / np.maximum((along**2).sum(-1), 1e-9)[..., None], 0, 1)
    distance = np.linalg.norm(off - t[..., None] * along[:, :, None], axis=-1).min(axis=1)
    ink = np.clip(rng.uniform(1.2, 2.0, (n, 1)) - distance + 0.5, 0, 1)
    return (255 * ink).astype(np.uint8).reshape(n, BOX, BOX)


def pieces(rng: np.random.Generator, glyph_NYX: np.ndarray) -> np.ndarray:
    """A square of `PIECE` pixels cut out of each glyph off its middle, and moved there: the clutter of Mnih et al. 2014."""
    corner = rng.integers(4, BOX - PIECE - 3, (2, len(glyph_NYX)))
    n, side, to = np.arange(len(glyph_NYX))[:, None, None], np.arange(PIECE), (BOX - PIECE) // 2
    cut = np.zeros_like(glyph_NYX)
    cut[:, to : to + PIECE, to : to + PIECE] = glyph_NYX[n, (corner[0][:, None] + side)[:, :, None], (corner[1][:, None] + side)[:, None]]
    return cut


@dataclass(frozen=True, eq=False)
class Photographs:
    """Pictures of any size as one row of pixels, so that a batch of crops is one look-up."""

    pixels: np.ndarray
    start: np.ndarray
    height: np.ndarray
    width: np.ndarray

    def crops(self, rng: np.random.Generator, n: int, side: int) -> np.ndarray:
        """pixels_BYXC (float32, 0 to 255): squares of any place and scale of any photograph, turned over at times. A photograph that is
        smaller than `side` is stretched."""
        which = rng.integers(len(self.start), size=n)
        high, wide = self.height[which] - 1, self.width[which] - 1
        step = np.minimum(rng.uniform(0.75, 2.0, n), np.minimum(high, wide) / (side - 1))
        walk = step[:, None] * np.arange(side)
        y, x = (rng.uniform(0, 1, n)[:, None] * (end - walk[:, -1])[:, None] + walk for end in (high, wide))
        y, x = (np.where(rng.random(n)[:, None] < 0.5, v, v[:, ::-1]).astype(np.int64) for v in (y, x))
        at = self.start[which][:, None, None] + y[:, :, None] * self.width[which][:, None, None] + x[:, None]
        return self.pixels[at].astype(np.float32)


def photographs(pictures: Sequence[np.ndarray]) -> Photographs:
    """Of (height, width, 3) arrays of uint8."""
    height, width = np.array([p.shape[:2] for p in pictures]).T
    start = np.concatenate([[0], np.cumsum(height * width)[:-1]])
    return Photographs(np.concatenate([p.reshape(-1, 3) for p in pictures]), start, height, width)
