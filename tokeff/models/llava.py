"""LLaVA: a decoder that reads pictures. An image tower, a projector into the decoder's space, and rows that enter it as vectors.

LLaVA-1.5 (Liu et al. 2023), LLaVA-NeXT with its crops (Liu et al. 2024), LLaVA-OneVision with its videos (Li et al. 2024); `llava_hf` loads
them. A prompt has one image token for a picture; `read` gives it as many rows as the picture has, or as a method of token reduction
leaves (`tokeff.reduce.visual`), and the decoder's own prefill, policies, passes and drafters do the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tokeff.decode.sample import GREEDY, Sampling
from tokeff.errors import UserError
from tokeff.generation import Generation, Setup, bucket, encode, finished, go, pad, start
from tokeff.kv.prefill import Embeds, Prompt, check_embeds, prefill
from tokeff.models.anyres import Size, best_size, crops, film, lay_out
from tokeff.models.flow import EMPTY
from tokeff.models.load import Model
from tokeff.models.pixels import Picture, Preprocessing, picture
from tokeff.models.transformer import embed, linear
from tokeff.models.vit import Seen, Taps
from tokeff.models.vit import encode as look
from tokeff.models.vit_config import ViTConfig, ViTParams
from tokeff.reduce.visual import Picked, Reduced
from tokeff.sharding import beside, follow


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
    """A picture as the decoder gets it: M rows, each at one of the places 0, 1, ... of the whole picture's rows (EMPTY: at none)."""

    x_MD: jax.Array
    place_M: jax.Array
    whole: int = struct.field(pytree_node=False)


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
    """(x_BSI with the class row if the tower has one, what was asked of the tower)."""
    taps = (taps or Taps()) | Taps(x=v.cfg.layers)
    seen = look(v.params.tower, v.cfg.tower, pixels_BYXC, taps=taps, upto=taps.top() + 1).seen
    return jnp.concatenate([seen.x_BSD[i] for i in v.cfg.layers], axis=2), seen


def see(v: Llava, pixels_BYXC: jax.Array, reduce: Picked | None = None) -> Reduced:
    """The rows of pictures of the tower's size, in the decoder's space; all of them without `reduce`."""
    tower = v.cfg.tower
    if reduce is None:
        x, _ = features(v, pixels_BYXC)
        x = project(v.params, x[:, int(tower.cls and not v.cfg.cls) :])
        return Reduced(x, jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]))
    x, seen = features(v, pixels_BYXC, reduce.taps(tower))
    if reduce.projected:
        return reduce.reduce(project(v.params, x), seen, tower)
    left = reduce.reduce(x, seen, tower)
    return left.replace(x_BMD=project(v.params, left.x_BMD))


def picture_rows(v: Llava, pixels: Pixels, reduce: Picked | None = None) -> Rows:
    """One picture or video. UserError where reduction would break the lines that crops and frames are laid out in."""
    left, cfg = see(v, jnp.asarray(pixels.crops_BYXC), reduce), v.cfg
    x, newline = left.x_BMD, v.params.newline_D
    if newline is None:
        if len(x) != 1 or pixels.video:
            raise UserError(f"{v.name} reads a picture as one crop, these are {len(x)}; give its own preprocessing")
        whole = cfg.tower.patches + int(cfg.cls)
        before = 0 if reduce is None else whole - cfg.tower.patches
        return Rows(x[0], jnp.where(left.place_BM == EMPTY, EMPTY, left.place_BM + before)[0], whole)
    if reduce is not None:
        raise UserError(f"{type(reduce).__name__} works on pictures of one crop; {v.name} lays out crops in lines, leave out reduce")
    if pixels.video:
        laid = film(x, cfg.tower.grid, newline)
    elif len(x) == 1:
        laid = jnp.concatenate([x[0], newline[None].astype(x.dtype)])
    else:
        assert pixels.size is not None
        side, canvas = cfg.tower.image, best_size(pixels.size, cfg.canvases)
        laid = lay_out(x, pixels.size, (canvas[0] // side[0], canvas[1] // side[1]), cfg.tower.grid, newline, cfg.most)
    return Rows(laid, jnp.arange(len(laid)), len(laid))


POSITIONS = ("renumbered", "kept")


def spelled(v: Llava, ids: Sequence[int], seen: Sequence[Rows], kept: bool) -> tuple[list[int], list[int], list[int]]:
    """(the text with as many image tokens as a picture has places, the place of each row that enters, which of these are of pictures).

    kept: rows stand at their places in the whole picture; else one after the other. UserError unless there is one picture an image token.
    """
    text, place, pictured, left = [], [], [], list(seen)
    marks = [t for t in ids if t in (v.cfg.image, v.cfg.video)]
    if len(marks) != len(seen):
        raise UserError(f"a prompt has {len(marks)} image tokens (id {v.cfg.image}) and {len(seen)} pictures; give one for each")
    for token in ids:
        if token not in (v.cfg.image, v.cfg.video):
            place.append(len(text))
            text.append(token)
            continue
        one = left.pop(0)
        many = one.whole if kept else len(one.x_MD)
        at = np.asarray(one.place_M) if kept else np.arange(many)
        pictured += range(len(place), len(place) + len(at))
        place += (len(text) + at).tolist()
        text += [token] * many
    return text, place, pictured


@partial(jax.jit, static_argnames="cfg")
def _mixed(params, ids_BM, row_R, at_R, x_RD, *, cfg):
    """x_BMD: the tokens' embeddings, with x_RD in the place of row `at` of sequence `row`."""
    x = embed(params, cfg, ids_BM, jnp.zeros_like(ids_BM)).x_BTD
    return x.at[row_R, at_R].set(x_RD.astype(x.dtype))


def mixed(v: Llava, ids: Sequence[Sequence[int]], seen: Sequence[Sequence[Rows]], positions: str = "renumbered"):
    """(the texts as lists of tokens, tokens_BT, length_B, Embeds): what `prefill` reads. Image tokens of a text stand for places, so with
    positions 'kept' there are more of them than rows."""
    kept = positions == "kept"
    made = [spelled(v, row, pictures, kept) for row, pictures in zip(ids, seen, strict=True)]
    tokens, length = pad([text for text, _, _ in made])
    M = bucket(max(len(place) for _, place, _ in made)) if kept else tokens.shape[1]
    place, read = np.full((len(made), M), EMPTY, np.int32), np.zeros((len(made), M), np.int32)
    for b, (text, at, _) in enumerate(made):
        place[b, : len(at)], read[b, : len(at)] = at, np.asarray(text)[at]
    row = np.concatenate([np.full(len(of), b, np.int32) for b, (_, _, of) in enumerate(made)])
    at = np.concatenate([np.asarray(of, np.int32) for _, _, of in made])
    found = [one.x_MD for pictures in seen for one in pictures]
    vectors = jnp.concatenate(found) if found else jnp.zeros((0, v.text.cfg.D))
    x = _mixed(v.text.params, read, row, at, vectors, cfg=v.text.cfg)
    return [text for text, _, _ in made], tokens, length, Embeds(x, jnp.asarray(place) if kept else None)


def check(v: Llava, setup: Setup, reduce: Picked | None, positions: str) -> None:
    """UserError for parts that do not fit each other, before anything is computed."""
    if positions not in POSITIONS:
        raise UserError(f"positions {positions!r} are not known; give one of {', '.join(POSITIONS)}")
    if setup.bounded is not None:
        raise UserError("bounded reads tokens piece by piece, which pictures have none of; leave it out")
    if reduce is not None:
        reduce.check(v.cfg.tower)
        if positions == "kept" and not reduce.placed:
            raise UserError(f"rows of {type(reduce).__name__} have no places of their own; use positions='renumbered'")
    check_embeds(positions == "kept", setup.kv.needs(), setup.prefill)


def read(
    v: Llava,
    ids: Sequence[Sequence[int]],
    pictures: Sequence[Sequence[Picture | Pixels]],
    setup: Setup,
    new: int,
    *,
    reduce: Picked | None = None,
    positions: str = "renumbered",
    chunk: int | None = None,
) -> Prompt:
    """Prefill prompts that hold one image token for each of their pictures. Raises UserError for parts that do not fit."""
    check(v, setup, reduce, positions)
    seen = [[picture_rows(v, p if isinstance(p, Pixels) else prepare(v, p), reduce) for p in some] for some in pictures]
    texts, tokens, length, embeds = mixed(v, ids, seen, positions)
    setup.check(v.text, [len(text) for text in texts], new)
    given = follow(v.text.params, {"tokens_BT": tokens, "length_B": length})
    with beside(v.text.params):
        return prefill(
            v.text.params, v.text.cfg, given["tokens_BT"], given["length_B"], evidence=setup.kv.needs(), cut=setup.cut,
            chunk=chunk, dtype=v.text.precision.cache, pattern=setup.prefill, embeds=embeds,
        )  # fmt: skip


def generate(
    v: Llava,
    prompts: str | Sequence[str] | Sequence[Sequence[int]],
    pictures: Sequence[Sequence[Picture | Pixels]],
    *,
    setup: Setup | None = None,
    reduce: Picked | None = None,
    positions: str = "renumbered",
    max_new: int = 64,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop: bool = True,
) -> Generation:
    """Continue each prompt; `pictures` has a list for each, in the order of its image tokens.

    reduce: which rows of a picture the decoder gets. positions: 'renumbered' as if the others had never been, as the published methods
    that work before the decoder do, or 'kept'. setup: the parts that `tokeff.generate` takes one by one. Raises UserError for parts that
    do not fit.
    """
    ids, eos = encode(v.text, prompts), v.text.cfg.eos if stop else ()
    if len(pictures) != len(ids):
        raise UserError(f"there are {len(ids)} prompts and {len(pictures)} lists of pictures; give one list for each prompt")
    setup = replace(setup or Setup(), sampling=sampling).fit(v.text)
    prompt = read(v, ids, pictures, setup, max_new, reduce=reduce, positions=positions)
    s = start(v.text, prompt, setup, max_new, seed, eos)
    return finished(v.text, go(v.text, s, setup, max_new, eos))
