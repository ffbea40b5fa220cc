"""What pictures with digits are composed of: all of MNIST (LeCun et al. 1998) out of its idx files, and photographs, each split in two.

`material("train")` and `material("test")` share no digit and no photograph. Both are fetched into the cache when they are asked for.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokeff.data.drawing import BOX, Photographs, photographs
from tokeff.errors import UserError
from tokeff.models.fetch import fetch
from tokeff.models.presets import IMAGES

SPLITS = ("train", "test")
FILES = {"train": "train", "test": "t10k"}
MOST = 1 << 17  # pictures that an idx file may have
SHORT = 200  # pixels of the shorter side that photographs are shrunk to
TEST_PHOTOGRAPHS = ("camera.png", "coffee.png", "gravel.png", "hubble_deep_field.jpg", "rocket.jpg")
"""Backgrounds of test pictures alone."""


@dataclass(frozen=True, eq=False)
class Material:
    """One split. glyph_NYX: uint8, 255 is ink. label_N: the digit of each. photographs: what pictures stand on, textures among them."""

    split: str
    glyph_NYX: np.ndarray
    label_N: np.ndarray
    photographs: Photographs


@functools.cache
def material(split: str) -> Material:
    """Digits and photographs of 'train' or 'test'. Raises UserError for another name, and as `tokeff.models.fetch.fetch`."""
    if split not in SPLITS:
        raise UserError(f"no split named {split!r}; give one of {', '.join(SPLITS)}")
    glyph, label = mnist(fetch("mnist").parent, split)
    folder = fetch("photographs").parent
    names = sorted(m.name for m in IMAGES["photographs"].members if (m.name in TEST_PHOTOGRAPHS) == (split == "test"))
    return Material(split, glyph, label, photographs([shrunk(folder / name) for name in names]))


def mnist(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(glyph_NYX, label_N) of a folder that holds the idx files. Raises UserError, one line, where they are not what they should be."""
    glyph_file, label_file = (folder / f"{FILES[split]}-{kind}" for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    glyph, label = read_idx(glyph_file, 3), read_idx(label_file, 1)
    if glyph.shape[1:] != (BOX, BOX) or len(glyph) != len(label) or not len(label):
        shapes = f"{glyph.shape} and {label_file.name} {label.shape}"
        raise UserError(f"{glyph_file} holds {shapes}, no labelled digits of {BOX} pixels; fetch them again")
    if label.max() > 9:
        raise UserError(f"{label_file} has the label {label.max()}, which is no digit; fetch it again")
    return glyph, label.astype(np.int64)


def read_idx(path: Path, axes: int) -> np.ndarray:
    """An array of uint8 out of an idx file: two zero bytes, 8 for bytes, the number of axes, then their lengths as big-endian numbers of 4
    bytes, then the data (LeCun et al. 1998).

    Raises UserError, one line, for another number of axes, more than `MOST` pictures, and a file that is longer or shorter than its
    header says. Nothing is allocated before that is known.
    """
    head = 4 + 4 * axes
    try:
        with path.open("rb") as f:
            start = f.read(head)
            shape = tuple(int.from_bytes(start[i : i + 4], "big") for i in range(4, head, 4))
            if len(start) < head or start[:4] != bytes((0, 0, 8, axes)):
                raise UserError(f"{path} is no idx file of bytes in {axes} axes; delete it and fetch it again")
            if shape[0] > MOST or any(n > BOX for n in shape[1:]):
                said = " x ".join(map(str, shape))
                raise UserError(f"{path} says it holds {said} bytes, more than there can be; delete it and fetch it again")
            size = math.prod(shape)
            data = f.read(size + 1)
    except OSError as e:
        raise UserError(f"cannot read {path} ({e.strerror}); delete it and fetch it again") from None
    if len(data) != size:
        how = "longer" if len(data) > size else "shorter"
        raise UserError(f"{path} is {how} than the {size} bytes its header says; delete it and fetch it again")
    return np.frombuffer(data, np.uint8).reshape(shape)


def shrunk(path: Path) -> np.ndarray:
    """(height, width, 3) of a photograph whose shorter side is at most `SHORT` pixels. UserError for what is no picture."""
    from PIL import Image

    from tokeff.models.pixels import picture

    image = picture(path)
    scale = min(1.0, SHORT / min(image.size))
    return np.asarray(image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BOX))
