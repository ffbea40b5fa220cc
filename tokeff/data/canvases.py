"""Pictures with digits among things that only look like digits, on photographs and textures, with a question and its answer.

On black, as MNIST has them, digits cost nothing to find, and any method of token reduction passes. Here every digit is a few patches of a
busy picture, and an answer may need all of them.

| task | pictures | question | answer |
|---|---|---|---|
| name | 1 | which digit ? | the only digit |
| where | 1 | which digit is at the top left ? | of 3 to 6 digits the one there |
| count | 1 | how many digits ? | 1 to 6 |
| row | 1 | read the row : | four digits |
| scan | 1, of twice the side | which digit ? | the only digit, among 36 places |
| pair | 2 | which digit is in the second ? | of two pictures with a digit each |
| order | 8 frames | which digit appears last ? | of three that appear one after the other, the first or last |
| motion | 8 frames | which way does the digit move ? | left, right, up or down |

Everything is a function of (task, material, n, seed, look). A picture is a grid of cells; a cell holds a digit, something else, or nothing.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from tokeff.data.digits import Material
from tokeff.data.drawing import BOX, MIRRORED, WINDOW, letters, paste, pieces, scaled
from tokeff.errors import UserError, nearest

SIDE = 84  # pixels of a picture
FRAMES = 8
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
WAYS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
ORDINALS = ("first", "second")
WORDS = (
    *map(str, range(10)), *WAYS, *ORDINALS,
    "which", "digit", "is", "at", "the", "in", "top", "bottom", "middle", "how", "many", "digits", "?", "read", "row", ":", "appears",
    "last", "way", "does", "move",
)  # fmt: skip
"""All words of questions and answers, each once."""


@dataclass(frozen=True)
class Task:
    """grid: rows and columns of cells. digits: how many cells have one, at least and at most; line: instead all those of one row. pictures:
    of one example."""

    grid: tuple[int, int] = (3, 3)
    digits: tuple[int, int] = (1, 1)
    pictures: int = 1
    side: int = SIDE
    video: bool = False
    line: bool = False


TASKS = {
    "name": Task(),
    "where": Task(digits=(3, 6)),
    "count": Task(digits=(1, 6)),
    "row": Task(grid=(3, 4), line=True),
    "scan": Task(grid=(6, 6), side=2 * SIDE),
    "pair": Task(pictures=2),
    "order": Task(digits=(3, 3), pictures=FRAMES, video=True),
    "motion": Task(pictures=FRAMES, video=True),
}


@dataclass(frozen=True)
class Look:
    """How hard it is. size: pixels of a digit's box, of which it fills five sevenths. strength: how much of the background its ink covers.
    clutter: the share of cells without a digit that hold something else. flat: what is left of a background's contrast."""

    size: tuple[int, int] = (17, 25)
    strength: tuple[float, float] = (0.65, 1.0)
    clutter: float = 0.4
    flat: tuple[float, float] = (0.2, 0.7)


@dataclass(frozen=True, eq=False)
class Canvases:
    """B examples. pictures_BTYXC: uint8. digit_BTM: what each cell of each picture shows, -1 where it is no digit. ink_BTYX: the digit that
    a pixel is ink of, -1 for none."""

    task: str
    pictures_BTYXC: np.ndarray
    digit_BTM: np.ndarray
    ink_BTYX: np.ndarray
    questions: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Scene:
    """What stands where: M things on B backgrounds, over T frames. digit_BM: -1 for what is none."""

    glyph_BMYX: np.ndarray
    digit_BM: np.ndarray
    y_BTM: np.ndarray
    x_BTM: np.ndarray
    shown_BTM: np.ndarray


def make(task: str, material: Material, n: int, seed: int, look: Look = Look()) -> Canvases:
    """n examples of a task. Raises UserError for a task that is not known and sizes that do not fit."""
    if task not in TASKS:
        raise UserError(f"no task named {task!r}; {nearest(task, TASKS)}")
    if n < 1 or not BOX // 4 <= look.size[0] <= look.size[1] <= WINDOW:
        raise UserError(f"{n} pictures with digits of {look.size} pixels cannot be made; give at least 1, of {BOX // 4} to {WINDOW}")
    rng = np.random.default_rng([seed, list(TASKS).index(task)])
    what = TASKS[task]
    if task == "pair":
        scene = still(rng, what, material, 2 * n)
        drawn, ink = (x.reshape(n, 2, *x.shape[2:]) for x in draw(rng, what, material, scene, look))
        digit = scene.digit_BM.reshape(n, 2, -1)
        return Canvases(task, drawn, digit, ink, *ask_pair(rng, digit))
    scene = still(rng, what, material, n)
    if task == "motion":
        scene, way = moving(rng, scene)
        asked = (("which way does the digit move ?",) * n, tuple(list(WAYS)[i] for i in way))
    elif task == "order":
        scene = appearing(rng, scene)
        asked = ask_order(rng, scene)
    else:
        asked = ASK[task](rng, scene.digit_BM)
    drawn, ink = draw(rng, what, material, scene, look)
    return Canvases(task, drawn, np.where(scene.shown_BTM, scene.digit_BM[:, None], -1), ink, *asked)


def prompt(task: str, question: str) -> str:
    """What a model of pictures reads: a mark for each picture, then the question."""
    if TASKS[task].video:
        return f"<video> {question}"
    return f"{' '.join(f'{o} <image>' for o in ORDINALS)} {question}" if task == "pair" else f"<image> {question}"


# -- what stands where


def still(rng: np.random.Generator, what: Task, material: Material, n: int) -> Scene:
    """Digits in some cells, and in all others something that is none; `draw` leaves part of that out. T is 1."""
    rows, columns = what.grid
    M, high, wide = rows * columns, what.side / rows, what.side / columns
    if what.line:
        digits = np.arange(M) // columns == rng.integers(rows, size=(n, 1))
    else:
        digits = rng.random((n, M)).argsort(axis=1).argsort(axis=1) < rng.integers(what.digits[0], what.digits[1] + 1, (n, 1))
    index = rng.integers(len(material.label_N), size=(n, M))
    glyph = np.where(digits[..., None, None], material.glyph_NYX[index], distractors(rng, material, n * M).reshape(n, M, BOX, BOX))
    middle_y, middle_x = (np.arange(rows) + 0.5) * high, (np.arange(columns) + 0.5) * wide
    loose = np.array([high, wide]) / 2 - 10
    y = np.repeat(middle_y, columns) + rng.uniform(-1, 1, (n, M)) * loose[0]
    x = np.tile(middle_x, rows) + rng.uniform(-1, 1, (n, M)) * loose[1]
    return Scene(glyph, np.where(digits, material.label_N[index], -1), y[:, None], x[:, None], np.ones((n, 1, M), bool))


def distractors(rng: np.random.Generator, material: Material, n: int) -> np.ndarray:
    """glyph_NYX: a third letters, a third pieces of digits, a third digits with left and right exchanged."""
    kind = rng.integers(3, size=n)
    glyph = material.glyph_NYX[rng.integers(len(material.label_N), size=n)]
    able = mirrored(material)
    glyph[kind == 2] = material.glyph_NYX[able[rng.integers(len(able), size=(kind == 2).sum())]][:, :, ::-1]
    glyph[kind == 1] = pieces(rng, glyph[kind == 1])
    glyph[kind == 0] = letters()[rng.integers(len(letters()), size=(kind == 0).sum())]
    return glyph


@functools.cache
def mirrored(material: Material) -> np.ndarray:
    """Which digits are none when left and right are exchanged."""
    return np.flatnonzero(np.isin(material.label_N, MIRRORED))


def moving(rng: np.random.Generator, scene: Scene) -> tuple[Scene, np.ndarray]:
    """(the scene over `FRAMES` frames in which its digit crosses the picture, the number of its way)."""
    n = len(scene.digit_BM)
    way = rng.integers(len(WAYS), size=n)
    step = np.array(list(WAYS.values()))[way] * rng.uniform(4.0, 6.5, (n, 1))
    along = (np.arange(FRAMES) - (FRAMES - 1) / 2)[None, :, None] * step[:, None]  # (n, frame, axis)
    room = SIDE / 2 - 10 - np.abs(along).max(axis=1)
    start = SIDE / 2 + rng.uniform(-1, 1, (n, 2)) * room
    is_digit = (scene.digit_BM >= 0)[:, None]
    y, x = (np.where(is_digit, start[:, None, None, i] + along[:, :, None, i], at) for i, at in enumerate((scene.y_BTM, scene.x_BTM)))
    return Scene(scene.glyph_BMYX, scene.digit_BM, y, x, np.ones(y.shape, bool)), way


def appearing(rng: np.random.Generator, scene: Scene) -> Scene:
    """The scene over `FRAMES` frames, its digits there from different frames on."""
    n, M = scene.digit_BM.shape
    rank = np.where(scene.digit_BM >= 0, rng.random((n, M)), 2.0).argsort(axis=1).argsort(axis=1)
    begin = np.sort(rng.random((n, FRAMES)).argsort(axis=1)[:, :3], axis=1)
    from_frame = np.where(scene.digit_BM >= 0, np.take_along_axis(begin, np.minimum(rank, 2), axis=1), 0)
    shown = np.arange(FRAMES)[None, :, None] >= from_frame[:, None]
    y, x = (np.broadcast_to(v, shown.shape) for v in (scene.y_BTM, scene.x_BTM))
    return Scene(scene.glyph_BMYX, scene.digit_BM, y, x, shown)


# -- questions


def ask_name(rng: np.random.Generator, digit_BM: np.ndarray):
    return ("which digit ?",) * len(digit_BM), tuple(map(str, digit_BM.max(axis=1)))


def ask_where(rng: np.random.Generator, digit_BM: np.ndarray):
    at = np.where(digit_BM >= 0, rng.random(digit_BM.shape), -1).argmax(axis=1)
    return tuple(f"which digit is at the {PLACES[i]} ?" for i in at), tuple(map(str, digit_BM[np.arange(len(at)), at]))


def ask_count(rng: np.random.Generator, digit_BM: np.ndarray):
    return ("how many digits ?",) * len(digit_BM), tuple(map(str, (digit_BM >= 0).sum(axis=1)))


def ask_row(rng: np.random.Generator, digit_BM: np.ndarray):
    return ("read the row :",) * len(digit_BM), tuple(" ".join(map(str, row[row >= 0])) for row in digit_BM)


def ask_pair(rng: np.random.Generator, digit_BTM: np.ndarray):
    which = rng.integers(2, size=len(digit_BTM))
    questions = tuple(f"which digit is in the {ORDINALS[i]} ?" for i in which)
    return questions, tuple(map(str, digit_BTM.max(axis=2)[np.arange(len(which)), which]))


def ask_order(rng: np.random.Generator, scene: Scene):
    frames = np.where(scene.digit_BM >= 0, scene.shown_BTM.sum(axis=1), -1)
    first, last = frames.argmax(axis=1), np.where(frames > 0, -frames, -FRAMES - 1).argmax(axis=1)
    late = rng.random(len(first)) < 0.5
    questions = tuple(f"which digit appears {'last' if x else 'first'} ?" for x in late)
    return questions, tuple(map(str, scene.digit_BM[np.arange(len(late)), np.where(late, last, first)]))


ASK = {"name": ask_name, "where": ask_where, "count": ask_count, "row": ask_row, "scan": ask_name}


# -- pictures


def dressed(rng: np.random.Generator, what: Task, material: Material, scene: Scene, look: Look) -> tuple[np.ndarray, ...]:
    """(background_BYXC, ink_BMYX, colour_BMC): what things look like in all frames, light where their cell is dark; some are left out."""
    (n, M), side, (rows, columns) = scene.digit_BM.shape, what.side, what.grid
    back = material.photographs.crops(rng, n, side)
    mean = back[:, ::4, ::4].mean(axis=(1, 2), keepdims=True)
    back = mean + (back - mean) * rng.uniform(*look.flat, (n, 1, 1, 1)).astype(np.float32)
    green = back[..., 1].reshape(n, rows, side // rows, columns, side // columns).mean(axis=(2, 4)).reshape(n, M)  # most of what is bright
    colour = np.where((green < 128)[..., None], rng.uniform(190, 255, (n, M, 3)), rng.uniform(0, 65, (n, M, 3)))
    size = rng.integers(look.size[0], look.size[1] + 1, n * M)
    ink = scaled(scene.glyph_BMYX.reshape(-1, BOX, BOX), size).reshape(n, M, WINDOW, WINDOW)
    left_out = (scene.digit_BM < 0) & (rng.random((n, M)) >= look.clutter)
    strength = np.where(left_out, 0, rng.uniform(*look.strength, (n, M)))
    return back, ink * strength.astype(np.float32)[..., None, None], colour.astype(np.float32)


def draw(rng: np.random.Generator, what: Task, material: Material, scene: Scene, look: Look) -> tuple[np.ndarray, np.ndarray]:
    """(pictures_BTYXC, ink_BTYX)."""
    (n, T, M), side = scene.shown_BTM.shape, what.side
    back, ink, colour = dressed(rng, what, material, scene, look)
    y, x = (np.floor(v).astype(np.int64).reshape(n * T, M) for v in (scene.y_BTM, scene.x_BTM))
    canvas = np.repeat(np.pad(back, ((0, 0), (WINDOW, WINDOW), (WINDOW, WINDOW), (0, 0))), T, axis=0)
    mark = np.zeros((*canvas.shape[:3], 1), np.float32)
    order = np.argsort(scene.digit_BM >= 0, axis=1, kind="stable")  # digits are drawn last: what a moving one meets is behind it
    frame, example = np.arange(n * T), np.repeat(np.arange(n), T)
    for i in range(M):
        at = order[example, i]
        shown = ink[example, at] * scene.shown_BTM.reshape(n * T, M)[frame, at][:, None, None]
        paste(canvas, shown, colour[example, at], y[frame, at], x[frame, at])
        digit = scene.digit_BM[example, at]
        if (digit >= 0).any():
            inked = (digit >= 0)[:, None, None] & (shown > 0.25)
            paste(mark, inked.astype(np.float32), digit[:, None] + 1.0, y[frame, at], x[frame, at])
    inner = slice(WINDOW, WINDOW + side)
    noise = 3 * rng.standard_normal((n * T, side, side, 1), np.float32)
    pictures = np.clip(canvas[:, inner, inner] + noise, 0, 255).astype(np.uint8)
    return pictures.reshape(n, T, side, side, 3), (mark[:, inner, inner, 0].astype(np.int8) - 1).reshape(n, T, side, side)


def patch_digits(ink_BTYX: np.ndarray, patch: int, least: int = 4) -> np.ndarray:
    """digit_BTS of every patch, in reading order: the one that at least `least` of its pixels are ink of, -1 where there is none."""
    B, T, Y, X = ink_BTYX.shape
    cells = ink_BTYX.reshape(B, T, Y // patch, patch, X // patch, patch).swapaxes(3, 4).reshape(B, T, -1, patch * patch)
    return np.where((cells >= 0).sum(axis=3) >= least, cells.max(axis=3), -1)
