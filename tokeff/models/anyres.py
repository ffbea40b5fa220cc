"""Pictures of any size for a tower of one size: a thumbnail and crops on the way in, and how their rows are laid out again.

LLaVA-NeXT (Liu et al. 2024) and LLaVA-OneVision (Li et al. 2024), with roundings as in transformers 5.2 (Apache-2.0). Sizes are (height,
width) in pixels.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

Size = tuple[int, int]


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


def lay_out(x_BPD: jax.Array, size: Size, canvas: Size, cells: Size, newline_D: jax.Array, most: int | None = None) -> jax.Array:
    """rows_MD of a picture from those of its thumbnail and crops: the thumbnail's, then the canvas's line by line, each line ending in
    `newline`. size: of the picture; canvas: crops down and across; cells: patches of a crop. most: shrink a canvas of more than so many
    crops' patches (OneVision)."""
    (down, across), (rows, columns) = canvas, cells
    grid = x_BPD[1:].reshape(down, across, rows, columns, -1).swapaxes(1, 2).reshape(down * rows, across * columns, -1)
    y, x = unpadded(size, (down * rows, across * columns))
    grid = grid[y, x]
    if most is not None and (ratio := math.sqrt(grid.shape[0] * grid.shape[1] / (most * rows**2))) > 1.1:
        grid = resized(grid, (int(grid.shape[0] // ratio), int(grid.shape[1] // ratio)))
    lines = jnp.concatenate([grid, jnp.broadcast_to(newline_D.astype(grid.dtype), (len(grid), 1, grid.shape[2]))], axis=1)
    return jnp.concatenate([x_BPD[0], lines.reshape(-1, grid.shape[2])])


def resized(grid_YXD: jax.Array, size: Size) -> jax.Array:
    """Bilinear, without smoothing when it shrinks."""
    return jax.image.resize(grid_YXD, (*size, grid_YXD.shape[2]), "linear", antialias=False)


def film(x_BPD: jax.Array, cells: Size, newline_D: jax.Array) -> jax.Array:
    """rows_MD of the frames of a video: each at half its height and width (rounded up), one after the other, then one newline."""
    half = (-(-cells[0] // 2), -(-cells[1] // 2))
    frames = jax.vmap(lambda x: resized(x.reshape(*cells, -1), half))(x_BPD)
    return jnp.concatenate([frames.reshape(-1, x_BPD.shape[2]), newline_D[None].astype(x_BPD.dtype)])
