"""How many rows each layer works on under a pass, what that costs, and at which budget a pass has a given share of them in the mean.

Pure functions of static numbers. A pass that cuts early and one that cuts late are compared fairly where the mean over layers is the
same. A layer's work is counted by the rows that go on through it, those that ask and pass its feed-forward. Rows that only leave a key and
value, in the layer where a pass chooses, are in `flops` and not in the mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tokeff.errors import UserError
from tokeff.kv.budget import AtLeast, Budget
from tokeff.models.config import Config
from tokeff.models.transformer import Pass
from tokeff.reduce.cascade import Cascade, Depth, layer_at
from tokeff.reduce.maps import DualFilter
from tokeff.reduce.pass_baselines import PooledRows, RandomRows
from tokeff.reduce.pictures import PictureCascade, Resting
from tokeff.reduce.prune import LastRows

BLIND = (LastRows, RandomRows, PooledRows)
"""Passes that choose without queries and keys."""
FEW = 0.05
"""The least share of the rows that a pass may leave at the top before it moves its stages down."""
STEPS = 50


@dataclass(frozen=True)
class Work:
    """One layer's rows. enter: leave a key and value. leave: ask and go through the feed-forward. ranked: have queries and keys made once
    more, to be chosen from before the layer."""

    enter: int
    leave: int
    ranked: int = 0


def many(budget: Budget | AtLeast, n: int) -> int:
    """How many of n rows, as `tokeff.kv.budget.rows_of` has it."""
    if isinstance(budget, AtLeast):
        return max(many(budget.share, n), many(budget.rows, n))
    return max(math.ceil(budget * n - 1e-4), 1) if isinstance(budget, float) else min(budget, n)


def left_of(cut: Pass, stage: int, length: int, pictures: int) -> int:
    """The rows that a stage leaves of a prompt. UserError for a pass whose numbers the picture decides."""
    if isinstance(cut, DualFilter) and (cut.total or cut.single):
        raise UserError(f"how many rows {type(cut).__name__} leaves is the picture's own; set total=0 and single=0 for `keep` alone")
    if isinstance(cut, PictureCascade):
        return length - pictures + cut.left(stage, pictures)
    return many(cut.keep[stage] if isinstance(cut, Cascade) else cut.budget, length)  # type: ignore[attr-defined]


def rows_by_layer(cut: Pass | None, cfg: Config, length: int, pictures: int = 0) -> tuple[Work, ...]:
    """The work of every layer on one prompt, in the order in which they run: a pass that starts the model again has its lower layers twice.

    pictures: how many of the rows are of pictures, for passes that let go of those alone. Raises UserError for what has no such numbers.
    """
    if isinstance(cut, Resting):
        raise UserError(f"{type(cut).__name__} lets no row go; it rests rows, which have no share")
    whole = Work(length, length)
    if cut is None:
        return (whole,) * cfg.L
    layers, looks = cut.layers(cfg), not isinstance(cut, BLIND)
    if cut.restart:
        left = left_of(cut, 0, length, pictures)
        return (*(whole,) * layers[0], Work(left, left, length * looks), *(Work(left, left),) * (cfg.L - 1))
    found, now = [], length
    for i in range(cfg.L):
        before, ranked = now, 0
        if i in layers:
            now = left_of(cut, layers.index(i), length, pictures)
            ranked = 0 if cut.writes else before * looks
        found.append(Work(before if cut.writes else now, now, ranked))
    return tuple(found)


def mean_rows(cut: Pass | None, cfg: Config, length: int, pictures: int = 0) -> float:
    """The rows that go on through a layer, the mean over the model's layers. A restarting pass counts its lower layers twice."""
    return sum(w.leave for w in rows_by_layer(cut, cfg, length, pictures)) / cfg.L


def mean_share(cut: Pass | None, cfg: Config, length: int, pictures: int = 0) -> float:
    """`mean_rows` as a share of the prompt, or, where it has pictures, those of pictures as a share of all their rows."""
    of = pictures or length
    return (mean_rows(cut, cfg, length, pictures) - length + of) / of


def flops(cut: Pass | None, cfg: Config, length: int, pictures: int = 0) -> float:
    """Floating-point operations of a prefill: of every layer the projections, scores and sums of causal attention, and the feed-forward;
    and the last row's logits. A multiplication with its addition is two.

    A query sees half of the keys in the mean, or its window. What a score takes beyond projecting queries and keys once is left out.
    """
    total, work = 0.0, rows_by_layer(cut, cfg, length, pictures)
    again = len(work) - cfg.L  # layers that a pass which starts the model again has run before
    for n, w in enumerate(work):
        i = n if n < again else n - again
        k = heads_in(cut, cfg, i) * cfg.H
        q = cfg.N // cfg.K * k
        window = min(cfg.windows[i] or w.enter, w.enter)
        seen = window - window * (window - 1) / (2 * max(w.enter, 1))
        total += cfg.D * (w.enter * (q + 2 * k) + w.leave * q + w.ranked * (q + k)) + 2 * w.leave * seen * q + 3 * w.leave * cfg.D * cfg.F
    return 2 * (total + cfg.D * cfg.V)


def held_rows(cut: Pass | None, cfg: Config, length: int, pictures: int = 0) -> float:
    """Keys that the layers hold after the prompt, in the heads that they have, as a share of a full cache."""
    work = rows_by_layer(cut, cfg, length, pictures)[-cfg.L :]
    return sum(w.enter * heads_in(cut, cfg, i) for i, w in enumerate(work)) / (cfg.K * cfg.L * length)


def heads_in(cut: Pass | None, cfg: Config, i: int) -> int:
    """The kv heads of the i-th layer that runs."""
    return cfg.K if cut is None else cut.heads_in(i % cfg.L, cfg)


def check_share(share: float) -> None:
    """Refuse what is no share of the rows."""
    if not 0 < share <= 1:
        raise UserError(f"share {share} is not a share of the rows; give a fraction in (0, 1]")


def solved(make: Callable[[float], Pass], share: float, cfg: Config, length: int, pictures: int = 0) -> tuple[Pass, float]:
    """(the pass, its budget) whose `mean_share` is nearest to `share`. make: a pass for a budget in (0, 1], more rows for a larger one.

    Raises UserError for a share that is none, and where the layers below the first stage alone take more.
    """
    check_share(share)
    low, high = 1e-12, 1.0
    least = mean_share(make(low), cfg, length, pictures)
    if least > share + 1 / (pictures or length):
        where = make(low).layers(cfg)
        raise UserError(f"{type(make(low)).__name__} at layers {where} of {cfg.L} leaves {least:.1%} in the mean at least, not {share:.1%}")
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if mean_share(make(middle), cfg, length, pictures) >= share else (middle, high)
    budget = min((low, high), key=lambda b: abs(mean_share(make(b), cfg, length, pictures) - share))
    return make(budget), budget


@dataclass(frozen=True)
class Family:
    """A pass with one knob beside its places. make(layers, budget); places: where it is listed to choose, () where it has no such setting.
    first: the lowest layer at which it can choose."""

    name: str
    make: Callable[[tuple[int, ...], float], Pass]
    places: tuple[Depth, ...] = ()
    baseline: bool = False
    first: int = 0


@dataclass(frozen=True)
class Placed:
    """A pass at a share. budget: what is left at its last stage. moved: its stages stand lower than listed."""

    cut: Pass
    budget: float
    layers: tuple[int, ...]
    moved: bool


def place(family: Family, share: float, cfg: Config, length: int, pictures: int = 0) -> Placed:
    """The pass at the budget that has this share in the mean, its stages where it is listed to choose, as far as the model has so many
    layers. Where it then left next to nothing at the top, or could not be so small at all, all stages move down by one factor, so that
    the layers below the first one take half of the share.

    Raises UserError where that does not help.
    """
    places = ascending([layer_at(at, cfg.L) for at in family.places], family.first)
    listed = tuple(at for at in places if at < cfg.L)
    if listed or not places:
        try:
            cut, budget = solved(lambda b: family.make(listed, b), share, cfg, length, pictures)
            if budget >= FEW or not listed:
                return Placed(cut, budget, listed, False)
        except UserError:
            if not listed or listed[0] <= family.first:
                raise
    start = max(family.first, min(int(share * cfg.L / 2), places[0]))
    lower = ascending([start * at // places[0] for at in places] if places[0] else list(places), family.first)
    layers = tuple(at for at in lower if at < cfg.L)
    return Placed(*solved(lambda b: family.make(layers, b), share, cfg, length, pictures), layers, layers != listed)


def ascending(layers: list[int], first: int) -> tuple[int, ...]:
    """The layers, each at least one above the one before and none below `first`."""
    found: list[int] = []
    for layer in layers:
        found.append(max(layer, found[-1] + 1 if found else first))
    return tuple(found)
