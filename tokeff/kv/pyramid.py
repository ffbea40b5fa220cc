"""Budgets that differ by layer: more rows below, where attention is spread, fewer above, where it gathers; or some layers left whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp

from tokeff.errors import UserError
from tokeff.kv.keep import Keep
from tokeff.models.flow import Here


@dataclass(frozen=True)
class Pyramid(Keep):
    """PyramidKV's budgets (Cai et al. 2024, sec. 4.2 and the released code): with W recent rows and a mean budget of B rows, the last layer
    keeps W + (B - W) / beta rows, the first the same amount above the mean, those between lie on a line. `recent` is a number.

    Where the first layer's share exceeds the prompt, the line is turned about its middle until it fits, so the mean stays; a layer's
    rows are rounded down. A budget that is a number makes the same pyramid for every prompt, cut at its length (the code
    turns that one too), so that what a batch holds depends on no one's length. Every layer is as large as its own budget.
    """

    beta: int = 20
    span: ClassVar[str] = "model"

    def role(self, layer: int) -> int:
        return layer

    def check(self, cfg, length: int) -> None:
        super().check(cfg, length)
        if self.beta < 1:
            raise UserError(f"beta {self.beta} would give the last layer more than the mean; use 1 for equal layers")
        if self.evict or isinstance(self.recent, float):
            raise UserError("budgets that differ by layer are made once, around a fixed window; set evict=0 and recent to a number")

    def rows(self, n: Any, here: Here) -> Any:
        counted = isinstance(n, int)
        lower = min if counted else jnp.minimum
        share = not isinstance(self.budget, int)
        loose = (self.budget if isinstance(self.budget, int) else super().rows(n, here)) - self.recent
        first = 2 * loose - loose // self.beta
        first = lower(first, n - self.recent) if share else first
        last, steps = 2 * loose - first, max(here.cfg.L - 1, 1)
        found = self.recent + first - (here.layer * (first - last) + steps - 1) // steps
        # Rounding can give a shorter prompt one row more.
        return lower(found + (counted and share), n)


@dataclass(frozen=True)
class Spared(Keep):
    """`Keep` that leaves the layers named in `spared` whole; the budget is that of each other layer."""

    spared: tuple[int, ...] = ()

    def role(self, layer: int) -> bool:
        return layer in self.spared

    def check(self, cfg, length: int) -> None:
        super().check(cfg, length)
        if any(not 0 <= i < cfg.L for i in self.spared):
            raise UserError(f"spared names layers {self.spared}, and the model has 0 to {cfg.L - 1}; leave out those it has not")
        if self.spared and self.evict:
            raise UserError("a layer that is left whole evicts nothing; set evict=0")

    def rows(self, n: Any, here: Here) -> Any:
        return n if here.layer in self.spared else super().rows(n, here)
