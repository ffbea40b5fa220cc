"""LLaVA: a decoder that reads pictures. An image tower, a projector into the decoder's space, and rows that enter it as vectors.

`llava_rows` makes rows of pictures; `llava_hf` loads models. A prompt has one image token for a picture; `read` gives it as many rows as
the picture has, or as a method of token reduction leaves (`tokeff.reduce.visual`), and the decoder's own prefill, policies, passes and
drafters do the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.decode.sample import GREEDY, Sampling
from tokeff.errors import UserError
from tokeff.generation import Generation, Setup, bucket, check_new, encode, finished, go, pad, start
from tokeff.kv.prefill import Embeds, Prompt, check_embeds, prefill
from tokeff.models.flow import EMPTY
from tokeff.models.llava_rows import Llava, LlavaConfig, LlavaParams, Pixels, Rows, least_rows, picture_rows, prepare, see
from tokeff.models.pixels import Picture
from tokeff.models.transformer import embed
from tokeff.reduce.visual import Filmed, Picked, Told, unit
from tokeff.sharding import beside, follow

__all__ = [
    "POSITIONS", "Llava", "LlavaConfig", "LlavaParams", "Pixels", "Rows", "check", "direction", "generate", "mixed", "picture_rows",
    "prepare", "read", "see", "spelled",
]  # fmt: skip

POSITIONS = ("renumbered", "kept")


def spelled(v: Llava, ids: Sequence[int], seen: Sequence[Rows], kept: bool) -> tuple[list[int], list[int], list[int]]:
    """(the text with as many image tokens as a picture has places, the place of each row that enters, which of these are of pictures).

    kept: rows stand at their places in the whole picture; else one after the other. UserError unless there is one picture an image token.
    """
    text, place, pictured, left = [], [], [], list(seen)
    words_of(v, ids, len(seen))
    for token in ids:
        if token not in (v.cfg.image, v.cfg.video):
            place.append(len(text))
            text.append(token)
            continue
        one = left.pop(0)
        many = one.whole if kept else len(one.place_M)
        at = np.asarray(one.place_M) if kept else np.arange(many)
        pictured += range(len(place), len(place) + len(at))
        place += (len(text) + at).tolist()
        text += [token] * many
    return text, place, pictured


def words_of(v: Llava, ids: Sequence[int], pictures: int | None = None) -> list[int]:
    """The tokens that stand for no picture. UserError unless the others are as many as the pictures, where that is given."""
    words = [t for t in ids if t not in (v.cfg.image, v.cfg.video)]
    if pictures is not None and (marks := len(ids) - len(words)) != pictures:
        raise UserError(f"a prompt has {marks} image tokens (id {v.cfg.image}) and {pictures} pictures; give one for each")
    return words


@partial(jax.jit, static_argnames="cfg")
def _mixed(params, ids_BM, row_R, at_R, pictures, *, cfg):
    """x_BMD: the tokens' embeddings, with the rows x_SD of all pictures in the place of row `at` of sequence `row`, if there is one."""
    x = embed(params, cfg, ids_BM, jnp.zeros_like(ids_BM)).x_BTD
    return x.at[row_R, at_R].set(jnp.concatenate(pictures).astype(x.dtype), mode="drop") if pictures else x


def entering(pictured: Sequence[Sequence[int]], seen: Sequence[Sequence[Rows]]) -> tuple[np.ndarray, np.ndarray]:
    """(row_R, at_R) of the rows of all pictures, padding included, which goes to a sequence past the last. pictured: of each sequence."""
    row, at = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    for b, (left, pictures) in enumerate(zip(pictured, seen, strict=True)):
        for one in pictures:
            n, spare = len(one.place_M), len(one.x_SD) - len(one.place_M)
            row.append(np.repeat(np.array([b, len(seen)], np.int32), (n, spare)))
            at.append(np.pad(np.asarray(left[:n], np.int32), (0, spare)))
            left = left[n:]
    return np.concatenate(row), np.concatenate(at)


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
    found = tuple(one.x_SD for pictures in seen for one in pictures)
    x = _mixed(v.text.params, read, *entering([of for _, _, of in made], seen), found, cfg=v.text.cfg)
    return [text for text, _, _ in made], tokens, length, Embeds(x, jnp.asarray(place) if kept else None)


def places(embeds: Embeds, texts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Of each prompt where in its text the rows stand that enter; EMPTY for padding."""
    return [range(len(text)) for text in texts] if embeds.place_BM is None else np.asarray(embeds.place_BM).tolist()


@partial(jax.jit, static_argnames="cfg")
def _direction(params, ids_1M, *, cfg):
    x_MD = unit(embed(params, cfg, ids_1M, jnp.zeros_like(ids_1M)).x_BTD[0])
    there_M1 = (ids_1M[0] != EMPTY)[:, None]
    return jnp.where(there_M1, x_MD, 0).sum(axis=0) / jnp.maximum(there_M1.sum(), 1)


def direction(v: Llava, ids: Sequence[int]) -> jax.Array:
    """about_D: the mean of the embeddings of a prompt's words, image tokens left out, each of length 1 first."""
    words = words_of(v, ids)
    row = np.full((1, bucket(max(len(words), 1))), EMPTY, np.int32)
    row[0, : len(words)] = words
    return _direction(v.text.params, row, cfg=v.text.cfg)


def fitted(v: Llava, setup: Setup) -> Setup:
    """With what the policy leaves open filled in from the model, and the tokens that stand for pictures in its texts."""
    setup = setup.fit(v.text)
    return replace(setup, kv=setup.kv.seeing(marks_of(v)))


def marks_of(v: Llava) -> tuple[int, ...]:
    """The tokens that stand for pictures and videos."""
    return tuple(t for t in (v.cfg.image, v.cfg.video) if t is not None)


def check(v: Llava, setup: Setup, reduce: Picked | None, positions: str) -> None:
    """UserError for parts that do not fit each other or the model, before anything is computed."""
    setup.check_kinds()
    if setup.cut is not None:
        setup.cut.check_layers(v.text.cfg)
    if positions not in POSITIONS:
        raise UserError(f"positions {positions!r} are not known; give one of {', '.join(POSITIONS)}")
    if setup.bounded is not None:
        raise UserError("bounded reads tokens piece by piece, which pictures have none of; leave it out")
    if reduce is not None:
        if not isinstance(reduce, Picked):
            raise UserError(f"reduce={reduce!r} reduces no picture; give for example reduce=tokeff.reduce.FasterVLM(64)")
        if not isinstance(reduce, Filmed):  # what compares frames is checked against these
            reduce.check(v.cfg.tower)
        check_places(reduce, positions)
    check_embeds(positions == "kept", setup.kv.needs(), setup.prefill)


def check_places(reduce: Picked, positions: str) -> None:
    if positions == "kept" and not reduce.placed:
        raise UserError(f"rows of {type(reduce).__name__} have no places of their own; use positions='renumbered'")


def check_lengths(
    v: Llava, ids: Sequence[Sequence[int]], pixels: Sequence[Sequence[Pixels]], new: int, reduce: Picked | None, positions: str
) -> None:
    """UserError for pictures that cannot be read or reduced, and for prompts whose pictures take more rows than the decoder reads, as far
    as that is known before a tower runs: exactly, or by the fewest rows that a method can leave."""
    kept, cfg = reduce is not None and positions == "kept", v.text.cfg
    at_least = "" if reduce is None or kept else "at least "
    fix = "fewer pictures or frames" if reduce is not None else "fewer pictures or frames, or reduce them"
    fix = f"positions='renumbered', or {fix}" if kept else fix
    for i, (row, some) in enumerate(zip(ids, pixels, strict=True)):
        n = len(words_of(v, row, len(some))) + sum(least_rows(v, p, reduce, kept) for p in some)
        if n + new > cfg.max_len:
            raise UserError(f"prompt {i} has {at_least}{n} rows and {new} more are wanted, but {cfg.name} reads {cfg.max_len}; give {fix}")


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
    """Prefill prompts that hold one image token for each of their pictures. A policy that tells their rows from text wants a setup that is
    `fitted`. Raises UserError for parts that do not fit."""
    check(v, setup, reduce, positions)
    check_new(new)
    pixels = [[p if isinstance(p, Pixels) else prepare(v, p) for p in some] for some in pictures]
    check_lengths(v, ids, pixels, new, reduce, positions)
    about = [direction(v, row) if isinstance(reduce, Told) else None for row in ids]
    seen = [[picture_rows(v, p, reduce, about_D) for p in some] for some, about_D in zip(pixels, about, strict=True)]
    texts, tokens, length, embeds = mixed(v, ids, seen, positions)
    if setup.cut is not None:
        there = [[text[at] for at in place if at != EMPTY] for text, place in zip(texts, places(embeds, texts), strict=True)]
        setup = replace(setup, cut=setup.cut.seeing(marks_of(v), there))
    setup.check(v.text, [len(text) for text in texts], new)
    given = follow(v.text.params, {"tokens_BT": tokens, "length_B": length, "embeds": embeds})
    with beside(v.text.params):
        return prefill(
            v.text.params, v.text.cfg, given["tokens_BT"], given["length_B"], evidence=setup.kv.needs(), cut=setup.cut,
            chunk=chunk, dtype=v.text.precision.cache, pattern=setup.prefill, embeds=given["embeds"],
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
    if setup is not None and not isinstance(setup, Setup):
        raise UserError(f"setup={setup!r} is no Setup; give for example setup=tokeff.generation.Setup(tokeff.kv.snapkv(0.1))")
    setup = replace(setup or Setup(), sampling=sampling)
    check_new(max_new)
    check(v, setup, reduce, positions)
    setup = fitted(v, setup)
    prompt = read(v, ids, pictures, setup, max_new, reduce=reduce, positions=positions)
    s = start(v.text, prompt, setup, max_new, seed, eos)
    return finished(v.text, go(v.text, s, setup, max_new, eos))
