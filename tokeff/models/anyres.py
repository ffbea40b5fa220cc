"""Pictures of any size for a tower of one size: a thumbnail and crops on the way in, and how their rows are laid out again.

LLaVA-NeXT (Liu et al. 2024) and LLaVA-OneVision (Li et al. 2024), with roundings as in transformers 5.2 (Apache-2.0). Sizes are (height,
width) in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.models.flow import EMPTY

Size = tuple[int, int]


@dataclass(frozen=True)
class Canvas:
    """How the crops of a picture lie: so many down and across, each of `cells` (lines, columns) of patches; and which lines and columns of
    the canvas's patches show the picture, not the bars beside it (first, behind the last)."""

    down: int
    across: int
    cells: Size
    lines: tuple[int, int]
    columns: tuple[int, int]

    def shown(self) -> np.ndarray:
        """mask_BP of the crops' patches that show the picture."""
        inside = np.zeros((self.down * self.cells[0], self.across * self.cells[1]), bool)
        inside[slice(*self.lines), slice(*self.columns)] = True
        return self.cut(inside)

    def cut(self, grid_YX: np.ndarray) -> np.ndarray:
        """Numbers of the canvas's patches, crop by crop: (B, P), without the thumbnail."""
        lines, columns = self.cells
        return grid_YX.reshape(self.down, lines, self.across, columns).swapaxes(1, 2).reshape(self.down * self.across, lines * columns)

    def whole(self) -> int:
        """How many patches show the picture."""
        return (self.lines[1] - self.lines[0]) * (self.columns[1] - self.columns[0])


def laid(size: Size, canvas: Size, cells: Size) -> Canvas:
    """The canvas of a picture of this size. canvas: crops down and across; cells: patches of a crop."""
    y, x = unpadded(size, (canvas[0] * cells[0], canvas[1] * cells[1]))
    return Canvas(*canvas, cells, (y.start, y.stop), (x.start, x.stop))


def shrinks(canvas: Canvas, most: int | None) -> float:
    """By what a canvas's sides are divided, because it has more than `most` crops' patches (OneVision); 1 where it stays as it is."""
    ratio = 1.0 if most is None else math.sqrt(canvas.whole() / (most * canvas.cells[0] ** 2))
    return ratio if ratio > 1.1 else 1.0


def places(canvas: Canvas) -> tuple[np.ndarray, np.ndarray]:
    """(place_BP, line_Y2): where in the rows of `lay_out` the patches of thumbnail and crops stand, EMPTY in the bars, and where each line
    begins and has its newline. Of a canvas that is not shrunk."""
    P, wide = canvas.cells[0] * canvas.cells[1], canvas.columns[1] - canvas.columns[0]
    y = np.arange(canvas.down * canvas.cells[0])[:, None] - canvas.lines[0]
    x = np.arange(canvas.across * canvas.cells[1]) - canvas.columns[0]
    crops_BP = np.where(canvas.shown(), canvas.cut(P + y * (wide + 1) + x), EMPTY)
    end_Y = P + np.arange(canvas.lines[1] - canvas.lines[0]) * (wide + 1) + wide
    return np.concatenate([np.arange(P)[None], crops_BP]), np.stack([end_Y - wide, end_Y], axis=1)


def best_size(size: Size, sizes: tuple[Size, ...]) -> Size:
    """The canvas that shows most pixels of a picture, and of these the one that wastes fewest."""

    def seen(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[1] / size[1], canvas[0] / size[0])
        shown = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return shown, shown - canvas[0] * canvas[1]

    return max(sizes, key=seen)


def crops(image: Any, sizes: tuple[Size, ...], side: Size, resample: int) -> list[Any]:
    """PIL images of the tower's size: the whole picture squeezed into it, then the crops of its canvas in reading order."""
    from PIL import Image

    height, width = best_size((image.height, image.width), sizes)
    across, down = width / image.width, height / image.height
    if across < down:
        inner = (width, min(math.ceil(image.height * across), height))
    else:
        inner = (min(math.ceil(image.width * down), width), height)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize(inner, Image.Resampling(resample)), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    corners = [(x, y) for y in range(0, height, side[0]) for x in range(0, width, side[1])]
    whole = image.resize((side[1], side[0]), Image.Resampling(resample))
    return [whole, *(canvas.crop((x, y, x + side[1], y + side[0])) for x, y in corners)]


def unpadded(size: Size, grid: Size) -> tuple[slice, slice]:
    """Which rows and columns of a canvas's patches show the picture, not the bars beside it."""
    if size[1] / size[0] > grid[1] / grid[0]:
        bar = (grid[0] - int(round(size[0] * (grid[1] / size[1]), 7))) // 2
        return slice(bar, grid[0] - bar), slice(0, grid[1])
    bar = (grid[1] - int(round(size[1] * (grid[0] / size[0]), 7))) // 2
    return slice(0, grid[0]), slice(bar, grid[1] - bar)


def lay_out(x_BPD: jax.Array, canvas: Canvas, newline_D: jax.Array, most: int | None = None) -> jax.Array:
    """rows_MD of a picture from those of its thumbnail and crops: the thumbnail's, then the canvas's line by line, each line ending in
    `newline`. most: shrink a canvas of more than so many crops' patches (OneVision)."""
    (down, across), (rows, columns) = (canvas.down, canvas.across), canvas.cells
    grid = x_BPD[1:].reshape(down, across, rows, columns, -1).swapaxes(1, 2).reshape(down * rows, across * columns, -1)
    grid = grid[slice(*canvas.lines), slice(*canvas.columns)]
    if (ratio := shrinks(canvas, most)) > 1:
        grid = resized(grid, (int(grid.shape[0] // ratio), int(grid.shape[1] // ratio)))
    lines = jnp.concatenate([grid, jnp.broadcast_to(newline_D.astype(grid.dtype), (len(grid), 1, grid.shape[2]))], axis=1)
    return jnp.concatenate([x_BPD[0], lines.reshape(-1, grid.shape[2])])


def resized(grid_YXD: jax.Array, size: Size) -> jax.Array:
    """Bilinear, without smoothing when it shrinks."""
    return jax.image.resize(grid_YXD, (*size, grid_YXD.shape[2]), "linear", antialias=False)


def halved(cells: Size) -> Size:
    """Half the height and width of a frame's patches, rounded up."""
    return -(-cells[0] // 2), -(-cells[1] // 2)


def pooled(x_BPD: jax.Array, cells: Size) -> jax.Array:
    """Rows of frames of `cells` patches at half their height and width."""
    half = jax.vmap(lambda x: resized(x.reshape(*cells, -1), halved(cells)))(x_BPD)
    return half.reshape(len(x_BPD), -1, x_BPD.shape[2])


def film(x_BPD: jax.Array, cells: Size, newline_D: jax.Array) -> jax.Array:
    """rows_MD of the frames of a video: each pooled, one after the other, then one newline."""
    return jnp.concatenate([pooled(x_BPD, cells).reshape(-1, x_BPD.shape[2]), newline_D[None].astype(x_BPD.dtype)])
