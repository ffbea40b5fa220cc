"""What a tower and a model of pictures lose and gain when rows of their pictures go: the two picture parts of `tokeff.evals.reduction`.

Pictures are `tokeff.data.canvases`, one an example. Rows go inside a supervised tower (`Labelling`); before the decoder, by a listed
method, or inside the decoder, by a pass (`Answering`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.bench import common
from tokeff.data.canvases import Canvases
from tokeff.errors import UserError
from tokeff.evals import mean_rows
from tokeff.evals.fidelity import snug
from tokeff.evals.hearing import AT_ONCE, RULES
from tokeff.evals.mean_rows import Family, Placed
from tokeff.evals.stats import proportion
from tokeff.evals.vision import Asked, asked, directions, labels, picture_vectors, right, rows_of, score_llava, score_vit
from tokeff.generation import Setup, pad
from tokeff.kv.extend import extend, pack
from tokeff.kv.prefill import Embeds, Prompt, prefill
from tokeff.models.config import Config
from tokeff.models.llava_rows import Llava
from tokeff.models.transformer import Pass, embed, orders
from tokeff.models.vit_config import ViTConfig
from tokeff.models.vit_hf import ImageModel
from tokeff.reduce.listing import picture_methods
from tokeff.reduce.maps import DualFilter
from tokeff.reduce.merge import ToMe, to_share
from tokeff.reduce.methods import shrinking
from tokeff.reduce.pictures import DART, FastV, PyramidDrop, TransPrune
from tokeff.reduce.recycle import SparseVLM
from tokeff.reduce.visual import Filmed, Picked, Told

FULL, BATCH = "Full", 25
IN_PLACE = ", in place"
"""Behind a method's name: rows that are left stay at their places, so the text stays as far from each. As published they move together."""
VISUAL = tuple(m for m in picture_methods() if not isinstance(m.make(), Filmed))
"""Listed methods that a single picture can be given to."""
PASSES = (
    Family("FastV", lambda layers, b: FastV(layers, (b,)), (1,)),
    Family("PyramidDrop", lambda layers, b: PyramidDrop(layers, shrinking(b, layers)), (0.25, 0.5, 0.75)),
    Family("SparseVLM", lambda layers, b: SparseVLM(layers, shrinking(b, layers)), (3 / 32, 7 / 32, 0.5), first=1),
    Family("DART", lambda layers, b: DART(layers, (b,)), (2,), first=1),
    Family("TransPrune", lambda layers, b: TransPrune(layers, shrinking(b, layers)), (7 / 32, 9 / 32, 12 / 32)),
    Family("PyramidDrop" + IN_PLACE, lambda layers, b: PyramidDrop(layers, shrinking(b, layers), renumber=False), (0.25, 0.5, 0.75)),
    Family(
        "SparseVLM" + IN_PLACE, lambda layers, b: SparseVLM(layers, shrinking(b, layers), renumber=False), (3 / 32, 7 / 32, 0.5), first=1
    ),
    Family(
        "TransPrune" + IN_PLACE, lambda layers, b: TransPrune(layers, shrinking(b, layers), renumber=False), (7 / 32, 9 / 32, 12 / 32)
    ),
    Family(
        "MustDrop filter", lambda layers, b: DualFilter(layers, shrinking(b, layers), total=0.0, single=0.0),
        (2 / 32, 6 / 32, 10 / 32, 14 / 32),
    ),
)  # fmt: skip
"""Passes inside the decoder with a share as their knob. MustDrop's ranks by its sum of attention, without its thresholds. AIM's schedule
takes eight layers and lets all rows go; skipping lets none go: neither has a share."""
STAY = tuple(name + IN_PLACE for name in ("FasterVLM", "HiPrune", "DivPrune", "CDPruner", "CATP", "RandomPatches", "PooledPatches"))
METHODS = (*(m.name for m in VISUAL), *STAY, *(f.name for f in PASSES))
SIMPLE = ("FasterVLM", "DART")  # rules of one line that look: every other method has to beat them too, where they fit the share
BLIND = tuple(name for m in VISUAL for name in (m.name, m.name + IN_PLACE) if m.family == "baseline" and name in METHODS)
BASELINES = (*BLIND, *SIMPLE)


def at_share(name: str, cfg: ViTConfig, share: float) -> Picked:
    """The listed method with its default settings at the setting that leaves most rows of those that leave at most this share of the
    patches; a grid of cells, and halvings, the nearest. UserError where the number of rows is the picture's own."""
    make, most = next(m.make for m in VISUAL if m.name == name), round(share * cfg.patches)
    knobs = inspect.signature(make).parameters
    settings = {"middle": cfg.L // 3} if "middle" in knobs else {}  # published: layer 8 of 24
    if "cells" in knobs:
        sides = [(y, x) for y in range(1, cfg.grid[0] + 1) for x in range(1, cfg.grid[1] + 1) if abs(y - x) < 2]
        return make(cells=min(sides, key=lambda yx: abs(yx[0] * yx[1] - most)))
    if "rounds" in knobs:
        return min((make(rounds=n) for n in range(5)), key=lambda made: abs(made.rows(cfg) - most))
    if "like" in knobs:
        raise UserError(f"how many rows {name} leaves is the picture's own")
    for budget in range(most, 0, -1):
        made = make(budget=budget, **settings)
        if made.rows(cfg) <= most:
            made.check(cfg)
            return made
    raise UserError(f"{name} leaves more than {most} of {cfg.patches} rows at any budget")


# -- a supervised tower


@dataclass(eq=False)
class Labelling:
    """A tower and pictures with one digit."""

    m: ImageModel
    given: Canvases
    rounds: int

    def figures(self, method: str, share: float) -> dict[str, Any]:
        """Accuracy, seconds of a batch, and what is counted, under one rule of merging or dropping (`hearing.RULES`)."""
        cfg, how = self.m.cfg, RULES.get(method.removesuffix(AT_ONCE))
        how = ToMe() if isinstance(how, ToMe) else how  # as published for images
        drop = (0,) * cfg.L if how is None else to_share(cfg.S, cfg.L, share, int(cfg.cls), at_once=method.endswith(AT_ONCE))
        found = score_vit(self.m, self.given, reduce=how, drop=drop if how else (), batch=BATCH)
        left = np.cumsum([cfg.S - drop[0], *(-r for r in drop[1:])])
        some = self.given.pictures_BTYXC[:BATCH, 0]
        ways = {"mine": (None, ())} if how is None else {"dense": (None, ()), "mine": (how, drop)}
        timers = {name: common.timed(lambda r, d: labels(self.m.params, cfg, some, r, d), *way) for name, way in ways.items()}
        return {
            "share": float(left.mean()) / cfg.S, "rows_left": int(left[-1]), "paired": [float(hit) for hit in found.hits],
            "flops": tower_flops(cfg, drop) / tower_flops(cfg, (0,) * cfg.L), **turns(timers, self.rounds),
        }  # fmt: skip


def tower_flops(cfg: ViTConfig, drop: tuple[int, ...]) -> float:
    """Multiplications of a tower's blocks: attention over the rows that enter each, the feed-forward of those that leave it."""
    left, total = cfg.S, cfg.patches * cfg.I * cfg.D
    for r in drop:
        total += 4 * left * cfg.D**2 + 2 * left**2 * cfg.D
        left -= r
        total += 2 * left * cfg.D * cfg.F
    return total


def turns(timers: dict[str, common.Timer], rounds: int, of: str = "picture") -> dict[str, Any]:
    """Seconds and speed-up of two programs that take turns; of one alone, `mine`, where it is that of all rows. of: pictures or clips."""
    seconds = common.interleave(timers, rounds, f"{of}s")
    mine, dense = seconds["mine"], seconds.get("dense", seconds["mine"])
    return {"prefill_s": median(mine), "dense_prefill_s": median(dense), f"{of}_speedup": common.ratio(dense, mine)}


# -- a model of pictures


@dataclass(eq=False)
class Answering:
    """A model of pictures and examples of some tasks, a picture each."""

    v: Llava
    given: dict[str, Canvases]
    rounds: int

    def way(self, method: str, share: float) -> Picked | Placed | None:
        """What a row does to a picture: a method before the decoder, a pass inside it, or nothing. UserError where it cannot."""
        if method == FULL:
            return None
        if method not in {f.name for f in PASSES}:
            return at_share(method.removesuffix(IN_PLACE), self.v.cfg.tower, share)
        family, (text, seen) = next(f for f in PASSES if f.name == method), self.sizes()
        return mean_rows.place(family, share, self.v.text.cfg, text + seen, seen)

    def sizes(self) -> tuple[int, int]:
        """(rows of text beside a picture, at most; rows of the picture with its newline)."""
        some = [asked(self.v, given) for given in self.given.values()]
        return max(int(a.answer_B.max()) for a in some) - 1, rows_of(self.v, some[0].task, 1, None)

    def figures(self, method: str, share: float) -> dict[str, Any]:
        """Answers to all tasks, seconds of a batch, and of the decoder's prefill alone, in turns with all rows, and what is counted of the
        decoder alone."""
        way, (text, seen), cfg, kept = self.way(method, share), self.sizes(), self.v.text.cfg, method.endswith(IN_PLACE)
        hits = {task: self.hits(given, way, kept) for task, given in self.given.items()}
        found = {"by_task": {task: float(np.mean(h)) for task, h in hits.items()}, "paired": [float(x) for h in hits.values() for x in h]}
        a = asked(self.v, next(iter(self.given.values())))
        if isinstance(way, Placed):
            cut = way.cut
            counted = {"share": mean_rows.mean_share(cut, cfg, text + seen, seen), "layers": list(way.layers), "moved": way.moved}
            work, held = mean_rows.flops(cut, cfg, text + seen, seen), mean_rows.held_rows(cut, cfg, text + seen, seen)
            ways: tuple[Callable[[], Any], ...] = tuple(partial(self.read, a, c, slice(0, BATCH)) for c in (None, cut))
        else:
            rows = rows_of(self.v, a.task, 1, way)
            counted = {"share": (rows - 1) / (seen - 1), "rows_left": rows}
            work, held = mean_rows.flops(None, cfg, text + rows), (text + rows) / (text + seen)
            ways = tuple(partial(self.answered, a, w, slice(0, BATCH), kept) for w in (None, way))
        timers = {name: common.timed(f) for name, f in zip(("dense", "mine"), ways, strict=True) if way is not None or name == "mine"}
        kv = 2 * cfg.K * cfg.H * 4 * cfg.L * held * (text + seen)
        counted |= {"flops": work / mean_rows.flops(None, cfg, text + seen), "held": held, "kv_mib": kv / 2**20}
        return found | counted | turns(timers, self.rounds) | self.decoder(a, way)

    def decoder(self, a: Asked, way: Picked | Placed | None) -> dict[str, float]:
        """How many times faster the decoder reads the questions of a batch and what is left of their pictures, the tower's work done."""
        ways = {"mine": way} if way is None else {"mine": way, "dense": None}
        timers = {name: common.timed(partial(self.prefilled, *self.entering(a, w, slice(0, BATCH)))) for name, w in ways.items()}
        seconds = common.interleave(timers, self.rounds, "decoder")
        return {"decoder_speedup": common.ratio(seconds.get("dense", seconds["mine"]), seconds["mine"])}

    def hits(self, given: Canvases, way: Picked | Placed | None, kept: bool = False) -> np.ndarray:
        if not isinstance(way, Placed):
            positions = "kept" if kept else "renumbered"
            return np.array(score_llava(self.v, given, reduce=way, batch=BATCH, positions=positions).hits)
        a = asked(self.v, given)
        parts = [slice(i, i + BATCH) for i in range(0, len(a.length_B), BATCH)]
        return np.concatenate([self.forced(a, way.cut, part) for part in parts])

    def answered(self, a: Asked, reduce: Picked | None, part: slice, kept: bool = False) -> jax.Array:
        """The tower, what a method leaves of it, and the decoder over question and answer."""
        v = self.v
        return right(
            v.params, v.text.params, a.crops_BTYXC[part], a.tokens_BS[part], a.length_B[part], a.answer_B[part],
            cfg=v.cfg, text_cfg=v.text.cfg, task=a.task, marks=a.marks, reduce=reduce, kept=kept,
        )[0]  # fmt: skip

    def read(self, a: Asked, cut: Pass | None, part: slice) -> Prompt:
        """The questions, their pictures' rows in the place of the mark, through the decoder under a pass: the answer is not there yet."""
        return self.prefilled(*self.entering(a, cut, part))

    def prefilled(self, tokens: jax.Array, length: jax.Array, x: jax.Array, cut: Pass | None) -> Prompt:
        text = self.v.text
        return prefill(text.params, text.cfg, tokens, length, cut=cut, dtype=text.precision.cache, embeds=Embeds(x))

    def entering(self, a: Asked, way: Picked | Placed | Pass | None, part: slice) -> tuple[jax.Array, jax.Array, jax.Array, Pass | None]:
        """(tokens_BT, length_B, x_BTD, pass) of a batch: what enters the decoder under a method before it, or inside it."""
        cfg, mark, reduce = self.v.text.cfg, a.marks[0], way if isinstance(way, Picked) else None
        cut = way.cut if isinstance(way, Placed) else way if isinstance(way, Pass) else None
        about = directions(self.v, jnp.asarray(a.tokens_BS[part]), jnp.asarray(a.answer_B[part])) if isinstance(reduce, Told) else None
        pictured = _vectors(self.v, a.task, a.crops_BTYXC[part], reduce, about)
        texts = [
            (*row[:mark], *[self.v.cfg.image] * pictured.shape[1], *row[mark + 1 : end])
            for row, end in zip(a.tokens_BS[part].tolist(), a.answer_B[part].tolist())
        ]
        tokens, length = pad(texts)
        x = _mixed(self.v.text.params, cfg, tokens, length, pictured, mark)
        cut = cut.seeing((self.v.cfg.image,), texts) if cut is not None else None
        if cut is not None:
            cut.check(cfg, max(map(len, texts)))
        return tokens, length, x, cut

    def forced(self, a: Asked, cut: Pass | None, part: slice) -> np.ndarray:
        """hit_B: whether greedy decoding behind the pass would write the answer and then stop."""
        cfg, params, setup = self.v.text.cfg, self.v.text.params, Setup()
        prompt = self.read(a, cut, part)
        said = [row[b:e] for row, b, e in zip(a.tokens_BS[part].tolist(), a.answer_B[part].tolist(), a.length_B[part].tolist())]
        layers = pack(setup.kv, prompt.layers, setup.room(max(map(len, said))), cfg)
        tokens, length = snug([row[:-1] for row in said])
        logits, _ = extend(params, cfg, layers, tokens, prompt.next_B, length, setup.kv)
        best = np.asarray(jnp.concatenate([prompt.logits_BV[:, None], logits], axis=1).argmax(axis=2))
        return np.array([best[b, : len(row)].tolist() == row for b, row in enumerate(said)])


def _vectors(v: Llava, task: str, crops_BTYXC: np.ndarray, reduce: Picked | None, about_BD: jax.Array | None) -> jax.Array:
    """x_BMD of the only picture of each example: all of its rows, or what a method leaves, at most where that is the picture's own."""
    make = jax.jit(lambda crops, about: picture_vectors(v, task, crops, reduce, about)[0][:2])
    x_BMD, real_BM = make(jnp.asarray(crops_BTYXC), about_BD)
    first = np.argsort(~np.asarray(real_BM), axis=1, kind="stable")[:, : int(real_BM.sum(axis=1).max())]
    return jnp.take_along_axis(x_BMD, first[..., None], axis=1)


@partial(jax.jit, static_argnames=("cfg", "mark"))
def _mixed(params: Any, cfg: Config, tokens_BT: jax.Array, length_B: jax.Array, pictured_BMD: jax.Array, mark: int) -> jax.Array:
    """x_BTD that enters: the tokens' embeddings, pictures from place `mark` on."""
    x = embed(params, cfg, tokens_BT, orders(length_B, tokens_BT.shape[1])).x_BTD
    return x.at[:, mark : mark + pictured_BMD.shape[1]].set(pictured_BMD.astype(x.dtype))


def averaged(part: dict[str, Any], name: str) -> dict[str, Any]:
    """One row as a line of the report: its accuracy with the Wilson interval, as `name`."""
    found = proportion(part["paired"])
    return {name: found.value, f"{name}_lo": found.low, f"{name}_hi": found.high, "n": found.n}
