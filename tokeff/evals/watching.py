"""What a model of pictures loses and gains when rows of a clip go: the part `clips` of `tokeff.evals.reduction`.

How many rows a method leaves may be the clip's own, so a row's share is the mean over the clips. Answers are asked with the rows that are
gone passed over; what is timed has them taken out, up to the most of any clip.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.bench import common
from tokeff.data.canvases import FRAMES, Canvases
from tokeff.errors import UserError
from tokeff.evals import mean_rows, seeing
from tokeff.evals.vision import asked, normal, right, rows_of, score_llava
from tokeff.models.llava_rows import Llava, frame, see
from tokeff.reduce.listing import picture_methods
from tokeff.reduce.video import like_next
from tokeff.reduce.visual import Filmed, Picked
from tokeff.reduce.visual_baselines import RandomPatches

FULL, BATCH, TILE = "Full", 10, 16
PATCHES = ("FasterVLM", "DivPrune", "RandomPatches", "PooledPatches")
"""Methods that take every frame by itself."""
FILMS = tuple(m for m in picture_methods() if m.name in PATCHES or isinstance(m.make(), Filmed))
METHODS = tuple(name for m in FILMS for name in (m.name, m.name + seeing.IN_PLACE))
BLIND = tuple(name for m in FILMS for name in (m.name, m.name + seeing.IN_PLACE) if m.family == "baseline")
BASELINES = (*BLIND, *(name for name in seeing.SIMPLE if name in METHODS))
TASKS = ("order",)  # the small LLaVA never learnt which way a digit moves


@dataclass(eq=False)
class Watching:
    """A model of pictures, examples of some tasks about clips, and clips that are not among them (`apart`)."""

    v: Llava
    given: dict[str, Canvases]
    apart: Canvases
    rounds: int

    def figures(self, method: str, share: float) -> dict[str, Any]:
        """Answers to all tasks, seconds of a batch in turns with all rows, and what is counted of the decoder alone."""
        name, kept = method.removesuffix(seeing.IN_PLACE), method.endswith(seeing.IN_PLACE)
        v, cfg, way, positions = self.v, self.v.text.cfg, None, "kept" if kept else "renumbered"
        if method != FULL:
            way = self.way(name, share)
        found = {task: score_llava(v, some, reduce=way, batch=BATCH, positions=positions) for task, some in self.given.items()}
        left, a = [n for score in found.values() for n in score.left], asked(v, next(iter(self.given.values())))
        text, seen, mean = int(a.answer_B.max()) - 1, rows_of(v, a.task, FRAMES, None), float(np.mean(left))
        held, most = (text + mean) / (text + seen), min(-(-max(left) // TILE) * TILE, seen)
        some = (x[:BATCH] for x in (a.crops_BTYXC, a.tokens_BS, a.length_B, a.answer_B))
        run = partial(right, v.params, v.text.params, *some, cfg=v.cfg, text_cfg=cfg, task=a.task, marks=a.marks, kept=kept)
        timers = {"mine": common.timed(partial(run, reduce=way, most=None if way is None else most))}
        if way is not None:
            timers |= {"dense": common.timed(partial(run, reduce=None))}
        return {
            "by_task": {task: score.accuracy.value for task, score in found.items()},
            "paired": [float(hit) for score in found.values() for hit in score.hits],
            "share": (mean - 1) / (seen - 1), "rows_left": round(mean), "setting": repr(way), "held": held,
            "flops": mean_rows.flops(None, cfg, text + round(mean)) / mean_rows.flops(None, cfg, text + seen),
            "kv_mib": 2 * cfg.K * cfg.H * 4 * cfg.L * (text + mean) / 2**20, **seeing.turns(timers, self.rounds, "clip"),
        }  # fmt: skip

    def way(self, method: str, share: float) -> Picked:
        """The listed method with its default settings at a share. UserError where no setting leaves so few."""
        if method in PATCHES:
            return seeing.at_share(method, frame(self.v.cfg.tower), share)
        listed = next(m.make() for m in FILMS if m.name == method)
        found = listed.at_share(share, FRAMES, lambda: self.alike) if isinstance(listed, Filmed) else None
        if found is None:
            raise UserError(f"{method} leaves more than {share:g} of the rows at any setting")
        return found

    @cached_property
    def alike(self) -> np.ndarray:
        """Cosines of rows with those of the next frame, of the clips that are not asked about."""
        clips = jnp.asarray(asked(self.v, self.apart).crops_BTYXC)
        rows = jax.lax.map(lambda x: see(self.v, normal(x), RandomPatches(1.0), video=True).x_BMD, clips)
        return np.asarray(jax.vmap(like_next)(rows)).reshape(-1)
