"""From pictures to the numbers that an image tower reads: size, crop, scale, as a preprocessor_config.json says. Pillow does the work.

The meaning of the fields, and where numbers are rounded, follow the image processors of transformers 5.2 (Apache-2.0). As there, EXIF
rotation is not applied, of a moving picture the first frame counts, and transparency is dropped.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokeff.errors import UserError
from tokeff.models.fields import Fields, read_json

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
BILINEAR, BICUBIC = 2, 3  # Pillow's numbers
RESAMPLE = (0, 1, 2, 3, 4, 5)
MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
LONGEST = 1 << 15  # pixels on a side, after resizing too
Picture = Any  # a PIL.Image.Image, an array (height, width, 3) of uint8, or the path of a file


@dataclass(frozen=True)
class Preprocessing:
    """short: pixels of the shorter side after resizing, aspect kept; exact: (height, width) instead; neither: as the picture is.

    crop: (height, width) cut from the middle. square: the picture is first padded to a square in the colour of the mean. scale multiplies
    bytes; then mean is taken off and divided by std, channel by channel.
    """

    short: int | None = None
    exact: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    square: bool = False
    resample: int = BICUBIC
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that a picture is resized to. UserError for one so narrow that its other side would be too long."""
        if self.exact is not None or self.short is None:
            return self.exact or (height, width)
        low, high = sorted((height, width))
        longer = int(self.short * high / low)
        if longer > LONGEST:
            raise UserError(f"a picture of {height} x {width} pixels is too narrow to be read; crop it first")
        return (longer, self.short) if width <= height else (self.short, longer)

    def __call__(self, pictures: Picture | Sequence[Picture]) -> np.ndarray:
        """pixels_BYXC (float32) of one picture or several; all must come out in one size. UserError for what cannot be read."""
        several = pictures if isinstance(pictures, list | tuple) else [pictures]
        made = [self.normal(self.resized(picture(p))) for p in several]
        if not made:
            raise UserError("there is no picture to read; give at least one")
        if len({x.shape for x in made}) > 1:
            raise UserError("these pictures have different sizes and the preprocessing keeps them; give one at a time")
        return np.stack(made)

    def resized(self, image: Any) -> Any:
        """A PIL image padded, resized and cropped."""
        from PIL import Image

        if self.square and image.width != image.height:
            side = max(image.size)
            canvas = Image.new("RGB", (side, side), tuple(int(255 * m) for m in self.mean))
            canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = canvas
        height, width = self.shape(image.height, image.width)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling(self.resample))
        if self.crop is None:
            return image
        top, left = (image.height - self.crop[0]) // 2, (image.width - self.crop[1]) // 2
        if top < 0 or left < 0:
            raise UserError(f"a picture of {image.height} x {image.width} pixels is smaller than the crop of {self.crop}; enlarge it first")
        return image.crop((left, top, left + self.crop[1], top + self.crop[0]))

    def normal(self, image: Any) -> np.ndarray:
        """pixels_YXC of an RGB image of the right size."""
        x = np.asarray(image, np.float32) * np.float32(self.scale)
        return (x - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)


def picture(given: Picture) -> Any:
    """An RGB PIL image of a path, an array or an image. Raises UserError, one line, for what is none or has more than 8 bits a channel."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(given, np.ndarray):
        if given.dtype != np.uint8 or given.ndim != 3 or given.shape[2] != 3 or not given.size:
            raise UserError(f"an array of shape {given.shape} and type {given.dtype} is no picture; give (height, width, 3) of uint8")
        return Image.fromarray(given)
    if isinstance(given, str | Path):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(given) as file:
                    file.load()
                    return picture(file)
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            raise UserError(f"cannot read {given} as a picture ({' '.join(str(e).split())[:120]}); give a PNG or JPEG file") from None
    if not isinstance(given, Image.Image):
        raise UserError(f"a {type(given).__name__} is no picture; give a path, a PIL image or an array (height, width, 3) of uint8")
    if given.mode not in MODES:
        raise UserError(f"a picture of mode {given.mode} has more than 8 bits a channel; convert it to RGB first")
    if not given.width or not given.height:
        raise UserError(f"a picture of {given.height} x {given.width} pixels is empty; give one that is not")
    return given.convert("RGB")


def read_preprocessing(folder: Path) -> Preprocessing | None:
    """That of a model folder, None where it has no preprocessor_config.json. Raises UserError for what is not supported."""
    file = folder / "preprocessor_config.json"
    return preprocessing(read_json(file), str(file)) if file.is_file() else None


def preprocessing(raw: dict[str, Any], where: str) -> Preprocessing:
    """Parse a preprocessor_config.json."""
    f = Fields(raw, where)
    kind = f.word("image_processor_type", f.word("feature_extractor_type", "")).removesuffix("Fast")
    clip = kind.startswith(("CLIP", "Llava")) and not kind.startswith("LlavaOnevision")
    default = {"shortest_edge": 224} if clip else {"height": 224, "width": 224}
    sized = Fields({"size": default, "crop_size": 224, **raw}, where)
    short, exact = _size(sized, "size", clip) if f.flag("do_resize", True) else (None, None)
    side, crop = _size(sized, "crop_size", False) if f.flag("do_center_crop", clip) else (None, None)
    if side:
        raise UserError(f"{where}: crop_size needs height and width")
    if crop is not None and ((short and max(crop) > short) or (exact and (crop[0] > exact[0] or crop[1] > exact[1]))):
        raise UserError(f"{where}: a crop of {crop} is larger than the size it is cut from; set size to at least that")
    resample = f.whole("resample", BICUBIC if clip or kind.startswith("Siglip") else BILINEAR, low=0)
    if resample not in RESAMPLE:
        raise f.fail("resample", f"one of {', '.join(map(str, RESAMPLE))}")
    mean, std = (_channels(f, key, given) for key, given in zip(("image_mean", "image_std"), CLIP if clip else HALF))
    plain = not f.flag("do_normalize", True)
    return Preprocessing(
        short,
        exact,
        crop,
        square=kind == "LlavaImageProcessor" and f.flag("do_pad", False),
        resample=resample,
        scale=f.number("rescale_factor", 1 / 255) if f.flag("do_rescale", True) else 1.0,
        mean=(0.0, 0.0, 0.0) if plain else mean,
        std=(1.0, 1.0, 1.0) if plain else std,
    )


def _size(f: Fields, key: str, aspect: bool) -> tuple[int | None, tuple[int, int] | None]:
    """(shorter side, None) or (None, (height, width)). A bare number is the shorter side where the aspect is kept, else both sides."""
    if isinstance(f.get(key), int):
        n = f.whole(key, high=LONGEST)
        return (n, None) if aspect else (None, (n, n))
    table = Fields(f.table(key), f"{f.where} {key}")
    if "longest_edge" in table.values:
        raise UserError(f"{table.where}: longest_edge is not supported; give shortest_edge, or height and width")
    if "shortest_edge" in table.values:
        return table.whole("shortest_edge", high=LONGEST), None
    return None, (table.whole("height", high=LONGEST), table.whole("width", high=LONGEST))


def _channels(f: Fields, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
    """Three numbers, above 0 where they divide."""
    value = f.get(key, default)
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(isinstance(x, int | float) and 0 <= x <= 1e3 for x in value):
        raise f.fail(key, "three numbers")
    if key == "image_std" and not min(value) > 0:
        raise f.fail(key, "three numbers above 0")
    return tuple(map(float, value))
