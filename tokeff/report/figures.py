"""Figures an experiment may ask for. Plain choices; `tokeff.report.plots` draws them."""

import dataclasses


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
    """One line a method: `y` against `x`. Left out where every row has the same x."""

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


Figure = Scatter | Lines | Bars | Curves
