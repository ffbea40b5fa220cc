"""Does a model of pictures still answer right when rows of its pictures are gone? Accuracy on `tokeff.data.canvases`, task by task.

A batch of pictures is one compiled program. An answer is right when greedy decoding would write it and then stop: every token of it is the
most likely one behind the tokens before it, which one pass over question and answer tells.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.data.canvases import TASKS, Canvases, prompt
from tokeff.errors import UserError
from tokeff.evals.stats import Interval, proportion
from tokeff.generation import Setup
from tokeff.kv.prefill import Gather, blank, enter, run_layers
from tokeff.models.anyres import Canvas, crops, film, lay_out
from tokeff.models.config import Config, Params, Precision
from tokeff.models.flow import EMPTY
from tokeff.models.llava import check, check_places
from tokeff.models.llava_rows import Llava, LlavaConfig, LlavaParams, Pixels, canvas_of, fit, see, standing
from tokeff.models.load import Model
from tokeff.models.transformer import embed, orders, unembed
from tokeff.models.vit import classify, encode, finish, pool
from tokeff.models.vit_config import ViTConfig, ViTParams
from tokeff.models.vit_hf import ImageModel
from tokeff.reduce.merge import Reducer
from tokeff.reduce.visual import Picked, Told, unit

LONGEST, ANSWER = 16, 5  # tokens of a question with its answer, and of an answer


@dataclass(frozen=True)
class Score:
    """accuracy: with its Wilson interval at 95%. rows: of all pictures of an example, as its reader gets them, at most. seconds: of all
    examples, without compiling. hits: example by example, to compare two ways on the same examples
    (`tokeff.evals.stats.paired_difference`). left: of each example how many of its rows are there."""

    task: str
    accuracy: Interval
    rows: int
    seconds: float
    hits: tuple[bool, ...]
    left: tuple[int, ...]

    def facts(self) -> dict[str, Any]:
        """The figures for a results file."""
        a = self.accuracy
        return {
            "accuracy": round(a.value, 4), "low": round(a.low, 4), "high": round(a.high, 4), "n": a.n, "rows": self.rows,
            "left": round(float(np.mean(self.left)), 1), "seconds": round(self.seconds, 2),
        }  # fmt: skip


def normal(pixels: jax.Array) -> jax.Array:
    """Bytes from -1 to 1, as `Preprocessing` with means and deviations of one half."""
    return pixels.astype(jnp.float32) / 127.5 - 1


# -- a supervised tower


@partial(jax.jit, static_argnames=("cfg", "reduce", "drop"))
def labels(params: ViTParams, cfg: ViTConfig, pixels_BYXC: jax.Array, reduce: Reducer | None = None, drop: tuple[int, ...] = ()):
    """label_B of pictures (bytes)."""
    out = encode(params, cfg, normal(pixels_BYXC), reduce=reduce, drop=drop)
    return jnp.argmax(classify(params, pool(params, cfg, finish(params, cfg, out.x_BSD))), axis=1)


def score_vit(m: ImageModel, given: Canvases, *, reduce: Reducer | None = None, drop: tuple[int, ...] = (), batch: int = 50) -> Score:
    """Labels of pictures with one digit, with rows taken away inside the tower. UserError for other tasks than 'name'."""
    if given.task != "name":
        raise UserError(f"a label is the answer to the task 'name', not to {given.task!r}; score a LLaVA on that")
    pixels, truth = given.pictures_BTYXC[:, 0], np.array(list(map(int, given.answers)))
    found, seconds = _timed(lambda part: labels(m.params, m.cfg, pixels[part], reduce, drop), len(truth), batch)
    rows = m.cfg.S - sum(drop)
    return _score("name", found == truth, rows, seconds, [rows] * len(truth))


# -- a LLaVA


@dataclass(frozen=True, eq=False)
class Asked:
    """Examples of one task as a LLaVA reads them: crops (bytes), and text tokens with a mark for each picture. The marks stand at the same
    places of all. answer_B: where the answer begins; the end of the text is its last token."""

    task: str
    crops_BTYXC: np.ndarray
    tokens_BS: np.ndarray
    length_B: np.ndarray
    answer_B: np.ndarray
    marks: tuple[int, ...]


def asked(v: Llava, given: Canvases) -> Asked:
    """The examples with their answers behind them. UserError where the model has no video token, or its tokenizer not the words."""
    tokens, length, answer = (np.zeros(shape, np.int32) for shape in ((len(given.answers), LONGEST), *[len(given.answers)] * 2))
    for b, (question, said) in enumerate(zip(given.questions, given.answers, strict=True)):
        text, end = v.text.tok.encode(prompt(given.task, question)), [*v.text.tok.encode(said), *v.text.cfg.eos[:1]]
        if len(text) + len(end) > LONGEST or len(end) > ANSWER:
            raise UserError(f"{v.name} has no tokens for whole words; give a model with a tokenizer of the words of tokeff.data.canvases")
        tokens[b, : len(text) + len(end)], length[b], answer[b] = text + end, len(text) + len(end), len(text)
    places = np.isin(tokens, [t for t in (v.cfg.image, v.cfg.video) if t is not None])
    wanted = 1 if TASKS[given.task].video else given.pictures_BTYXC.shape[1]
    if (places != places[0]).any() or places[0].sum() != wanted:
        raise UserError(f"{v.name} has no token for the pictures of {given.task!r}; give a model with <image> and <video>")
    return Asked(given.task, cropped(v.cfg, given), tokens, length, answer, tuple(map(int, np.flatnonzero(places[0]))))


def cropped(cfg: LlavaConfig, given: Canvases) -> np.ndarray:
    """crops_BTYXC: pictures of the tower's size as they are, larger ones as a thumbnail and crops."""
    size = given.pictures_BTYXC.shape[2:4]
    if size == cfg.tower.image:
        return given.pictures_BTYXC
    from PIL import Image

    if given.pictures_BTYXC.shape[1] != 1 or not cfg.canvases:
        raise UserError(f"pictures of {size} pixels, {given.pictures_BTYXC.shape[1]} an example, are not of the tower's {cfg.tower.image}")
    made = [crops(Image.fromarray(x[0]), cfg.canvases, cfg.tower.image, Image.Resampling.BICUBIC) for x in given.pictures_BTYXC]
    return np.stack([np.stack([np.asarray(crop) for crop in some]) for some in made])


class Vectors(NamedTuple):
    """What stands in a prompt for one of its marks: vectors, which of them are rows at all, where each stands in the whole picture, and how
    many places that has."""

    x_BMD: jax.Array
    real_BM: jax.Array
    place_BM: jax.Array
    whole: int


def shape_of(v: Llava, task: str, T: int) -> tuple[Pixels, Canvas | None]:
    """(what `llava_rows` asks of the pixels behind one mark, how its crops lie)."""
    what = TASKS[task]
    many = T if what.video or what.side != v.cfg.tower.image[0] else 1
    pixels = Pixels(np.zeros((many, 1, 1, 1)), (what.side, what.side), what.video)
    return pixels, canvas_of(v, pixels)


def directions(v: Llava, tokens_BS: jax.Array, answer_B: jax.Array) -> jax.Array:
    """about_BD of the questions: `tokeff.models.llava.direction` of each."""
    x_BSD = unit(embed(v.text.params, v.text.cfg, tokens_BS, jnp.zeros_like(tokens_BS)).x_BTD)
    word = (jnp.arange(tokens_BS.shape[1]) < answer_B[:, None]) & (tokens_BS != v.cfg.image) & (tokens_BS != v.cfg.video)
    return jnp.where(word[..., None], x_BSD, 0).sum(axis=1) / jnp.maximum(word.sum(axis=1), 1)[:, None]


def picture_vectors(v: Llava, task: str, crops_BTYXC: jax.Array, reduce: Picked | None, about_BD: jax.Array | None = None) -> list[Vectors]:
    """Of each mark of the prompt, as `llava_rows.picture_rows` has them of a picture alone. about_BD: for methods that read the text."""
    (B, T), (shape, canvas), newline = crops_BTYXC.shape[:2], shape_of(v, task, crops_BTYXC.shape[1]), v.params.newline_D
    pixels, grid = normal(crops_BTYXC), v.cfg.tower.grid
    assert newline is not None
    whole = shape.video or canvas is not None  # one mark for all crops
    if reduce is not None and (whole or isinstance(reduce, Told)):
        marks = [pixels] if whole else [pixels[:, t : t + 1] for t in range(T)]
        settled, places = jax.vmap(partial(_settled, v, shape, canvas, reduce)), standing(v, shape, canvas).whole
        return [Vectors(*settled(some, about_BD), places) for some in marks]
    left = see(v, pixels.reshape(B * T, *pixels.shape[2:]), reduce)
    x_BTMD = left.x_BMD.reshape(B, T, *left.x_BMD.shape[1:])
    if whole:
        x = jax.vmap(lambda x: lay_out(x, canvas, newline, v.cfg.most) if canvas else film(x, grid, newline))(x_BTMD)
        return [Vectors(x, jnp.ones(x.shape[:2], bool), jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]), x.shape[1])]
    P = v.cfg.tower.patches
    place_BTM = jnp.pad(left.place_BM.reshape(x_BTMD.shape[:3]), ((0, 0), (0, 0), (0, 1)), constant_values=P)
    real_BTM = jnp.ones(x_BTMD.shape[:3], bool) if left.real_BM is None else left.real_BM.reshape(x_BTMD.shape[:3])
    last = jnp.full((B, 1), reduce is None or reduce.newlines() != "none")
    end = jnp.broadcast_to(newline, (B, 1, len(newline)))
    x_BTMD = jnp.concatenate([x_BTMD, jnp.broadcast_to(end[:, None], (B, T, *end.shape[1:]))], axis=2)
    real_BTM = jnp.concatenate([real_BTM, jnp.broadcast_to(last[:, None], (B, T, 1))], axis=2)
    return [Vectors(x_BTMD[:, t], real_BTM[:, t], place_BTM[:, t], P + 1) for t in range(T)]


def _settled(v: Llava, shape: Pixels, canvas: Canvas | None, reduce: Picked, pixels_TYXC, about_D: jax.Array | None):
    """(x_MD, real_M, place_M) of what is left of the crops or frames of one mark, in the order of places: `llava_rows.settled`, with a
    static number of rows."""
    left, newline = see(v, pixels_TYXC, reduce, canvas=canvas, video=shape.video, about_D=about_D), v.params.newline_D
    stand = standing(v, shape, canvas)
    assert newline is not None
    place = jnp.take_along_axis(jnp.asarray(stand.place_BP), jnp.maximum(left.place_BM, 0), axis=1)
    place = jnp.where(left.place_BM == EMPTY, EMPTY, place)
    real = (place != EMPTY) | (left.place_BM == EMPTY)
    real = (real if left.real_BM is None else real & left.real_BM).reshape(-1)
    begin, end = jnp.asarray(stand.line_Y2).T
    found = jnp.where(real, place.reshape(-1), EMPTY)
    if not reduce.placed:
        ends, keep = end[-1:], jnp.full(1, reduce.newlines() != "none")
    else:
        used = ((found[:, None] >= begin) & (found[:, None] < end)).any(axis=0)
        ends, keep = end, {"none": jnp.zeros(len(end), bool), "used": used}.get(reduce.newlines(), jnp.ones(len(end), bool))
    x = jnp.concatenate([left.x_BMD.reshape(len(real), -1), jnp.broadcast_to(newline, (len(ends), len(newline)))])
    real, at = jnp.concatenate([real, keep]), jnp.concatenate([found, ends])
    order = jnp.argsort(jnp.where(real, at, stand.whole), stable=True) if reduce.placed else jnp.arange(len(at))
    return x[order], real[order], at[order]


def close(some: Vectors, most: int) -> Vectors:
    """The rows that are there side by side, in space for `most`."""
    at_BM = jnp.argsort(~some.real_BM, axis=1, stable=True)[:, :most]
    real, place = (jnp.take_along_axis(x, at_BM, axis=1) for x in (some.real_BM, some.place_BM))
    return Vectors(jnp.take_along_axis(some.x_BMD, at_BM[..., None], axis=1), real, place, some.whole)


def answer_logits(
    params: Params, cfg: Config, pictured: Sequence[Vectors], tokens_BS, length_B, answer_B, marks: tuple[int, ...], kept: bool = False,
):  # fmt: skip
    """(logits_BAV, id_BA, there_BA): of the tokens of the answers, each behind the true ones before it; these tokens; and which there are.
    `pictured` has what stands at each mark; rows that are none are passed over. kept: those that are left stay at their places, and so does
    the text; else all stand one after the other."""
    text, S = enter(params, cfg, tokens_BS, orders(length_B, tokens_BS.shape[1]), None), tokens_BS.shape[1]
    known_BS, at, more, parts, there, place = text.order_BT != EMPTY, 0, 0, [], [], []
    for mark, some in zip(marks, pictured, strict=True):
        parts += [text.x_BTD[:, at:mark], some.x_BMD.astype(text.x_BTD.dtype)]
        there += [known_BS[:, at:mark], some.real_BM]
        place += [jnp.broadcast_to(jnp.arange(at, mark) + more, there[-2].shape), some.place_BM + mark + more]
        at, more = mark + 1, more + some.whole - 1
    x_BTD, real_BT = jnp.concatenate([*parts, text.x_BTD[:, at:]], axis=1), jnp.concatenate([*there, known_BS[:, at:]], axis=1)
    place_BT = jnp.concatenate([*place, jnp.broadcast_to(jnp.arange(at, S) + more, known_BS[:, at:].shape)], axis=1)
    order_BT = jnp.where(real_BT, place_BT if kept else jnp.cumsum(real_BT, axis=1) - 1, EMPTY).astype(jnp.int32)
    flow = enter(params, cfg, jnp.zeros(order_BT.shape, jnp.int32), order_BT, x_BTD)
    flow, _ = run_layers(params, cfg, flow, blank(cfg, len(x_BTD), real_BT.sum(axis=1), x_BTD.dtype), policy=Gather())
    at_BA, more = answer_B[:, None] + jnp.arange(ANSWER), x_BTD.shape[1] - S
    there_BA, at_BA = at_BA < length_B[:, None], jnp.minimum(at_BA, S - 1)
    rows = jnp.take_along_axis(flow.x_BTD, (at_BA + more - 1)[..., None], axis=1)
    return unembed(params, cfg, rows), jnp.take_along_axis(tokens_BS, at_BA, axis=1), there_BA


def right(
    front: LlavaParams, text: Params, crops_BTYXC, tokens_BS, length_B, answer_B, *,
    cfg: LlavaConfig, text_cfg: Config, task: str, marks: tuple[int, ...], reduce: Picked | None, most: int | None = None,
    kept: bool = False,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(hit_B, left_B): whether greedy decoding would write the answer and then stop; and how many rows the pictures had. most: no example
    has more rows for one mark, so the decoder is given no more. kept: rows that are left stay at their places."""
    looks = TASKS[task]
    first = next(name for name, t in TASKS.items() if (t.pictures, t.side, t.video) == (looks.pictures, looks.side, looks.video))
    return _right(
        front, text, crops_BTYXC, tokens_BS, length_B, answer_B,
        cfg=cfg, text_cfg=text_cfg, task=first, marks=marks, reduce=reduce, most=most,
        kept=kept and reduce is not None,  # where all rows are left both are the same, and share a program
    )  # fmt: skip


@partial(jax.jit, static_argnames=("cfg", "text_cfg", "task", "marks", "reduce", "most", "kept"))
def _right(
    front: LlavaParams, text: Params, crops_BTYXC, tokens_BS, length_B, answer_B, *,
    cfg: LlavaConfig, text_cfg: Config, task: str, marks: tuple[int, ...], reduce: Picked | None, most: int | None, kept: bool,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """`right`, one program for all tasks whose pictures are alike; `task` is the first of them."""
    v = Llava(cfg, front, Model(text_cfg, text, None, Precision(), text_cfg.name), None, text_cfg.name)
    about_BD = directions(v, tokens_BS, answer_B) if isinstance(reduce, Told) else None
    pictured = picture_vectors(v, task, crops_BTYXC, reduce, about_BD)
    left_B = jnp.stack([some.real_BM.sum(axis=1) for some in pictured]).sum(axis=0)
    pictured = pictured if most is None else [close(some, most) for some in pictured]
    logits, ids, there = answer_logits(text, text_cfg, pictured, tokens_BS, length_B, answer_B, marks, kept)
    return ((jnp.argmax(logits, axis=2) == ids) | ~there).all(axis=1), left_B


def rows_of(v: Llava, task: str, T: int, reduce: Picked | None) -> int:
    """How many rows an example's pictures are to the decoder at most, newlines included."""
    shape = jax.ShapeDtypeStruct((1, T, *v.cfg.tower.image, v.cfg.tower.channels), jnp.uint8)
    made = jax.eval_shape(lambda x: picture_vectors(v, task, x, reduce), shape)
    return sum(x.x_BMD.shape[1] for x in made)


def score_llava(v: Llava, given: Canvases, *, reduce: Picked | None = None, batch: int = 25, positions: str = "renumbered") -> Score:
    """Answers to one task, with rows of each picture taken away before the decoder. positions: as of `tokeff.models.llava.generate`. Raises
    UserError for settings that do not fit."""
    a, kept = asked(v, given), positions == "kept"
    check(v, Setup(), None, positions)
    if reduce is not None:
        check_places(reduce, positions)
        fit(v, *shape_of(v, given.task, a.crops_BTYXC.shape[1]), reduce)

    def some(part: slice) -> jax.Array:
        both = right(
            v.params, v.text.params, a.crops_BTYXC[part], a.tokens_BS[part], a.length_B[part], a.answer_B[part],
            cfg=v.cfg, text_cfg=v.text.cfg, task=a.task, marks=a.marks, reduce=reduce, kept=kept,
        )  # fmt: skip
        return jnp.stack(both, axis=1)

    found, seconds = _timed(some, len(a.length_B), batch)
    hits, left = found.T
    return _score(given.task, hits, rows_of(v, given.task, a.crops_BTYXC.shape[1], reduce), seconds, left)


def _timed(some: Any, n: int, batch: int) -> tuple[np.ndarray, float]:
    """(what `some` finds of every part, seconds). Every part has `batch` examples, the last one some of those before it again, so that one
    program serves all; the first call, which compiles, is made twice and timed once."""
    batch, found, seconds = min(batch, n), [], 0.0
    for begin in range(0, n, batch):
        part = slice(min(begin, n - batch), min(begin, n - batch) + batch)
        if not begin:
            jax.block_until_ready(some(part))
        started = time.perf_counter()
        found.append(np.asarray(some(part))[begin - part.start :])
        seconds += (time.perf_counter() - started) * len(found[-1]) / batch
    return np.concatenate(found), seconds


def _score(task: str, hits: np.ndarray, rows: int, seconds: float, left: Sequence[int]) -> Score:
    return Score(task, proportion(hits), rows, seconds, tuple(map(bool, hits)), tuple(map(int, left)))
