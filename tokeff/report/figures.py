"""Figures an experiment may ask for. Plain choices; `tokeff.report.plots` draws them."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Scatter:
    """One point a row: `y` against `x`, one panel for each context length. Intervals come from <y>_lo, <y>_hi."""

    x: str
    y: str
    title: str = ""
    log_y: bool = False
    """Draw y on a logarithmic scale that is linear near zero."""


@dataclasses.dataclass(frozen=True)
class Lines:
    """One line a method that was measured at several `x`: `y` against them. Left out where none was."""

    x: str
    y: str
    title: str = ""


@dataclasses.dataclass(frozen=True)
class Bars:
    """One bar a row, longest context only, with a reference line at the method `reference`."""

    y: str
    title: str = ""
    reference: str = "full"


@dataclasses.dataclass(frozen=True)
class Curves:
    """One line a method through its budgets, `y` against `x`, a few methods a panel, from the best to the worst."""

    x: str
    y: str
    title: str = ""
    log_y: bool = False
    high: bool = False
    """Larger is better."""


@dataclasses.dataclass(frozen=True)
class Panels:
    """A panel for each value of `by`: a bar of `y` for each row, or with `x` a line a method. Rows without the values `at` are left out."""

    y: str
    by: str
    title: str = ""
    x: str | None = None
    level: float | None = None
    """Where to draw a dashed line: what it takes to gain anything."""
    at: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Payoff:
    """What a pass over more rows costs, as a curve, and what drafters get for it, as points; a panel for each prompt class.

    From columns `nodes`, `tn`, `mat`, `break_even`, `class` and `on`, T(n)/T(1) of other machines by name (evals/drafting.py).
    """

    title: str = ""
    at: tuple[tuple[str, Any], ...] = ()


Figure = Scatter | Lines | Bars | Curves | Panels | Payoff
