"""What stands before the decoder of a LLaVA: from a picture to the rows that the decoder reads, all of them or those a method leaves.

LLaVA-1.5 (Liu et al. 2023), LLaVA-NeXT with its crops (Liu et al. 2024), LLaVA-OneVision with its videos (Li et al. 2024). Crops are laid
out in lines, each of which ends in a newline row; frames follow each other. What is left of them stands where it stood.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tokeff.errors import UserError
from tokeff.generation import bucket
from tokeff.models.anyres import Canvas, Size, best_size, crops, film, halved, laid, lay_out, places, pooled, shrinks
from tokeff.models.flow import EMPTY
from tokeff.models.load import Model
from tokeff.models.pixels import Picture, Preprocessing, picture
from tokeff.models.transformer import linear
from tokeff.models.vit import Seen, Taps
from tokeff.models.vit import encode as look
from tokeff.models.vit_config import ViTConfig, ViTParams
from tokeff.reduce.visual import Cropped, Filmed, Picked, Reduced, Told, Walked, patches


@dataclass(frozen=True)
class LlavaConfig:
    """image, video: the token that stands for a picture, a video. layers: those of the tower whose rows, side by side, are the features.
    cls: the class row is one of them. canvases: sizes that larger pictures are laid out on, () for one size only; most: see `lay_out`."""

    tower: ViTConfig
    image: int
    layers: tuple[int, ...]
    cls: bool = False
    canvases: tuple[Size, ...] = ()
    most: int | None = None
    video: int | None = None


class LlavaParams(struct.PyTreeNode):
    """What stands before the decoder. The projector is out(gelu(into x)); I are the numbers of a feature."""

    tower: ViTParams
    into_DI: jax.Array
    out_DD: jax.Array
    into_bias_D: jax.Array | None = None
    out_bias_D: jax.Array | None = None
    newline_D: jax.Array | None = None


@dataclass(frozen=True, eq=False)
class Llava:
    """A model of pictures and text. text: the decoder, a `Model` like any other."""

    cfg: LlavaConfig
    params: LlavaParams
    text: Model
    preprocessing: Preprocessing | None
    name: str


class Rows(struct.PyTreeNode):
    """A picture as the decoder gets it: M rows, each at one of the places 0, 1, ... of the whole picture's rows (EMPTY: at none).

    x_SD: these rows, and padding behind them, so that pictures of which other numbers of rows are left share compiled code.
    """

    x_SD: jax.Array
    place_M: np.ndarray
    whole: int = struct.field(pytree_node=False)

    @property
    def x_MD(self) -> jax.Array:
        """The rows without padding."""
        return self.x_SD[: len(self.place_M)]


@dataclass(frozen=True, eq=False)
class Pixels:
    """What the tower reads of one picture: normalised crops (B, Y, X, C), the thumbnail first, and the picture's own size. video: the
    crops are frames."""

    crops_BYXC: Any
    size: Size | None = None
    video: bool = False


def prepare(v: Llava, given: Picture) -> Pixels:
    """A picture's pixels by the model's own preprocessing. UserError where the folder had none, and for what cannot be read."""
    if v.preprocessing is None:
        raise UserError(f"{v.name} has no preprocessor_config.json; put it in the model's folder, or give Pixels")
    image = picture(given)
    if not v.cfg.canvases:
        return Pixels(v.preprocessing(image))
    parts = crops(image, v.cfg.canvases, v.cfg.tower.image, v.preprocessing.resample)
    return Pixels(v.preprocessing(parts), (image.height, image.width))


@jax.jit
def project(params: LlavaParams, x_BSI: jax.Array) -> jax.Array:
    """x_BSD of features, as wide as the decoder."""
    y = linear(x_BSI, params.into_DI)
    y = jax.nn.gelu(y if params.into_bias_D is None else y + params.into_bias_D.astype(y.dtype), approximate=False)
    y = linear(y, params.out_DD)
    return y if params.out_bias_D is None else y + params.out_bias_D.astype(y.dtype)


def features(v: Llava, pixels_BYXC: jax.Array, taps: Taps | None = None) -> tuple[jax.Array, Seen]:
    """(x_BSI with the class row if the tower has one, what was asked of the tower, the pixels, and what methods have learned)."""
    taps = (taps or Taps()) | Taps(x=v.cfg.layers)
    seen = look(v.params.tower, v.cfg.tower, pixels_BYXC, taps=taps, upto=taps.top() + 1).seen
    return jnp.concatenate([seen.x_BSD[i] for i in v.cfg.layers], axis=2), seen.replace(pixels_BYXC=pixels_BYXC, side=v.params.tower.side)


def see(
    v: Llava,
    pixels_BYXC: jax.Array,
    reduce: Picked | None = None,
    *,
    canvas: Canvas | None = None,
    video: bool = False,
    about_D: jax.Array | None = None,
) -> Reduced:
    """The rows of pictures of the tower's size, in the decoder's space; all of them without `reduce`.

    canvas: they are the thumbnail and the crops of one picture. video: they are frames, and are pooled before rows leave. about_D: the
    direction of the text, for methods that read it.
    """
    tower = v.cfg.tower
    if reduce is None:
        x, _ = features(v, pixels_BYXC)
        x = project(v.params, x[:, int(tower.cls and not v.cfg.cls) :])
        return Reduced(x, jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]))
    if isinstance(reduce, Walked):
        left = reduce.walk(v.params.tower, tower, pixels_BYXC, v.cfg.layers)
        return left.replace(x_BMD=project(v.params, left.x_BMD))
    x, seen = features(v, pixels_BYXC, reduce.taps(tower))
    behind = video or reduce.projected
    if behind:
        x = project(v.params, x)
    if video:
        x, seen, tower = _pooled(x, cfg=tower), _pooled(seen.replace(pixels_BYXC=None), cfg=tower), frame(tower)
    # Pictures of other sizes share the programs of all other methods.
    laid_out = reduce.stand_in(canvas, tower) if canvas is not None and isinstance(reduce, Cropped) else None
    left = reduced(x, seen, about_D, reduce=reduce, cfg=tower, canvas=laid_out)
    return left if behind else left.replace(x_BMD=project(v.params, left.x_BMD))


@partial(jax.jit, static_argnames=("reduce", "cfg", "canvas"))
def reduced(x_BSD: jax.Array, seen: Seen, about_D: jax.Array | None, *, reduce: Picked, cfg: ViTConfig, canvas: Canvas | None) -> Reduced:
    """What a method leaves, by all it is given."""
    if canvas is not None and isinstance(reduce, Cropped):
        return reduce.across(x_BSD, seen, cfg, canvas)
    if about_D is not None and isinstance(reduce, Told):
        return reduce.answer(x_BSD, seen, cfg, about_D)
    return reduce.reduce(x_BSD, seen, cfg)


def frame(cfg: ViTConfig) -> ViTConfig:
    """The tower as its pooled rows look: half the patches a side."""
    lines, columns = halved(cfg.grid)
    return replace(cfg, image=(lines * cfg.patch, columns * cfg.patch))


@partial(jax.jit, static_argnames="cfg")
def _pooled(tree: Any, *, cfg: ViTConfig) -> Any:
    """Rows of frames, and numbers a row, at half their height and width; those of a class row stay, and so does what is learned."""

    def one(a: jax.Array) -> jax.Array:
        rows = a.reshape(*a.shape[:2], -1)
        few = jnp.concatenate([rows[:, : int(cfg.cls)], pooled(patches(rows, cfg), cfg.grid).astype(a.dtype)], axis=1)
        return few.reshape(*few.shape[:2], *a.shape[2:])

    if not isinstance(tree, Seen):
        return one(tree)
    heads_first = {i: one(a.swapaxes(1, 2)).swapaxes(1, 2) for i, a in tree.cls_BNS.items()}
    return jax.tree.map(one, tree.replace(cls_BNS={}, side=None)).replace(cls_BNS=heads_first, side=tree.side)


class Standing(NamedTuple):
    """Where the rows of a whole picture stand: place_BP of the patches of each crop or frame, EMPTY for those cut off; where each line
    begins and has its newline; and how many places there are."""

    place_BP: np.ndarray
    line_Y2: np.ndarray
    whole: int


def standing(v: Llava, pixels: Pixels, canvas: Canvas | None) -> Standing:
    """Where the rows of this picture stand."""
    cfg, (B, P) = v.cfg.tower, (len(pixels.crops_BYXC), v.cfg.tower.patches)
    if v.params.newline_D is None:
        before = int(v.cfg.cls)
        return Standing(before + np.arange(P)[None], np.zeros((0, 2), int), before + P)
    if canvas is not None:
        place_BP, line_Y2 = places(canvas)
        return Standing(place_BP, line_Y2, int(line_Y2[-1, 1]) + 1)
    P = frame(cfg).patches if pixels.video else P
    return Standing(np.arange(B * P).reshape(B, P), np.array([[0, B * P]]), B * P + 1)


def settled(left: Reduced, stand: Standing, newline_D: jax.Array | None, reduce: Picked) -> Rows:
    """The rows that are left in the order in which the decoder reads them, with the newlines that stay.

    Rows at places stand in the order of these; those at patches that are cut off with the bars beside a picture are gone. Where rows have
    no places all stand, crop by crop in their own order, and of the newlines the last is left.
    """
    B, M, _ = left.x_BMD.shape
    at = np.asarray(left.place_BM)
    place = np.where(at == EMPTY, EMPTY, np.take_along_axis(stand.place_BP, np.maximum(at, 0), axis=1))
    real = np.ones((B, M), bool) if left.real_BM is None else np.asarray(left.real_BM)
    real = real & (place != EMPTY) if reduce.placed else real
    row, lines = np.flatnonzero(real), stand.line_Y2
    found = place.ravel()[row]
    match reduce.newlines():
        case "none":
            lines = lines[:0]
        case "used" if reduce.placed:
            lines = lines[((found[:, None] >= lines[:, 0]) & (found[:, None] < lines[:, 1])).any(axis=0)]
    ends = lines[:, 1] if reduce.placed else lines[-1:, 1]
    row, found = np.concatenate([row, np.full(len(ends), B * M)]), np.concatenate([found, ends])
    order = np.argsort(found, kind="stable") if reduce.placed else np.arange(len(found))
    index_S = np.full(bucket(max(len(order), 1)), B * M + 1, np.int32)
    index_S[: len(order)] = row[order]
    return Rows(_taken(left.x_BMD, newline_D, index_S), found[order].astype(np.int32), stand.whole)


@jax.jit
def _taken(x_BMD: jax.Array, newline_D: jax.Array | None, index_S: jax.Array) -> jax.Array:
    """x_SD of chosen rows, of which the one behind the last is the newline, and zeros at the numbers past that."""
    table = x_BMD.reshape(-1, x_BMD.shape[2])
    if newline_D is not None:
        table = jnp.concatenate([table, newline_D[None].astype(table.dtype)])
    return table.at[index_S].get(mode="fill", fill_value=0)


def canvas_of(v: Llava, pixels: Pixels) -> Canvas | None:
    """How crops lie; None for one crop, and for frames. UserError for what the model does not read."""
    B, tower = len(pixels.crops_BYXC), v.cfg.tower
    if v.params.newline_D is None and (B != 1 or pixels.video):
        raise UserError(f"{v.name} reads a picture as one crop, these are {B}; give its own preprocessing")
    if B == 1 or pixels.video:
        return None
    if pixels.size is None:
        raise UserError(f"{B} crops can be laid out in many ways; give the picture's size, Pixels(crops, (height, width))")
    height, width = best_size(pixels.size, v.cfg.canvases)
    canvas = laid(pixels.size, (height // tower.image[0], width // tower.image[1]), tower.grid)
    if len(pixels.crops_BYXC) != 1 + canvas.down * canvas.across:
        raise UserError(f"a picture of {pixels.size} has 1 + {canvas.down} x {canvas.across} crops, not {B}; give its own preprocessing")
    return canvas


def fit(v: Llava, pixels: Pixels, canvas: Canvas | None, reduce: Picked) -> None:
    """UserError where a method cannot work on this picture, before anything is computed."""
    name = type(reduce).__name__
    if isinstance(reduce, Filmed) and not pixels.video:
        raise UserError(f"{name} compares the frames of a video, this is a picture; give Pixels(frames, video=True), or another method")
    if isinstance(reduce, (Walked, Cropped)) and pixels.video:
        raise UserError(f"{name} does not know the rows of a video, which are pooled behind the tower; use HoliTom or a method for patches")
    if canvas is not None and shrinks(canvas, v.cfg.most) > 1:
        raise UserError(f"{v.name} shrinks the rows of so large a picture, so {name} has no patches to choose from; give a smaller picture")
    reduce.check(frame(v.cfg.tower) if pixels.video else v.cfg.tower)


def least_rows(v: Llava, pixels: Pixels, reduce: Picked | None = None, kept: bool = False) -> int:
    """How many tokens of a prompt a picture takes, at least: all its places where rows stay at them (`kept`), else what a method is sure to
    leave. Nothing is computed. UserError for what the model does not read, and where a method cannot work."""
    canvas = canvas_of(v, pixels)
    if reduce is not None:
        fit(v, pixels, canvas, reduce)
    elif canvas is not None and (ratio := shrinks(canvas, v.cfg.most)) > 1:
        lines, columns = (int((last - first) // ratio) for first, last in (canvas.lines, canvas.columns))
        return v.cfg.tower.patches + lines * (columns + 1)
    stand = standing(v, pixels, canvas)
    if reduce is None or kept:
        return stand.whole
    rows = reduce.fewest(frame(v.cfg.tower) if pixels.video else v.cfg.tower, len(pixels.crops_BYXC))
    bars = canvas.shown().size - canvas.whole() if canvas is not None and reduce.placed else 0
    return max(rows - bars, 0) + len(stand.line_Y2) * (reduce.newlines() == "all" and reduce.placed)


def picture_rows(v: Llava, pixels: Pixels, reduce: Picked | None = None, about_D: jax.Array | None = None) -> Rows:
    """One picture or video. about_D: the direction of the text beside it. UserError for what cannot be reduced, and for too many rows."""
    canvas, cfg, newline = canvas_of(v, pixels), v.cfg, v.params.newline_D
    if (n := least_rows(v, pixels, reduce)) > (most := v.text.cfg.max_len):
        what = f"{n} rows" if reduce is None else f"at least {n} rows under {type(reduce).__name__}"
        raise UserError(f"{len(pixels.crops_BYXC)} crops or frames are {what}, {v.name} reads {most}; give fewer, or leave fewer of each")
    if reduce is not None:
        left = see(v, jnp.asarray(pixels.crops_BYXC), reduce, canvas=canvas, video=pixels.video, about_D=about_D)
        return settled(left, standing(v, pixels, canvas), newline, reduce)
    x = see(v, jnp.asarray(pixels.crops_BYXC)).x_BMD
    if newline is None:
        rows = x[0]
    elif pixels.video:
        rows = film(x, cfg.tower.grid, newline)
    elif canvas is None:
        rows = jnp.concatenate([x[0], newline[None].astype(x.dtype)])
    else:
        rows = lay_out(x, canvas, newline, cfg.most)
    return Rows(rows, np.arange(len(rows), dtype=np.int32), len(rows))
