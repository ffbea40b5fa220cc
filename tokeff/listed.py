"""What is told of every listed method, whatever it acts on: `tokeff methods` and docs/methods.md read nothing else."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

from tokeff.errors import UserError, nearest
from tokeff.papers import Paper

SETTINGS = ("scaled", "paper")  # names of settings


class Listed(Protocol):
    """published: the settings in which the paper differs from the defaults; None for a baseline. config: the file that runs it; None where
    none does."""

    @property
    def name(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def make(self) -> Callable[..., Any]: ...
    @property
    def lossless(self) -> bool: ...
    @property
    def trained(self) -> bool: ...
    @property
    def paper(self) -> Paper | None: ...
    @property
    def published(self) -> dict[str, Any] | None: ...
    @property
    def config(self) -> str | None: ...
    def settings(self, name: str = "scaled") -> dict[str, Any]: ...


def named_settings(method: Listed, name: str) -> dict[str, Any]:
    """Every setting of `make` under a name: 'scaled', the defaults, which are shares of context, heads and width; or 'paper', the published
    numbers. Raises UserError for another name, and for a baseline's 'paper'."""
    if name not in SETTINGS:
        raise UserError(f"no settings named {name!r}; {nearest(name, SETTINGS)}")
    if name == "paper" and method.published is None:
        raise UserError(f"{method.name} is no published method; use its 'scaled' settings")
    scaled = {k: p.default for k, p in inspect.signature(method.make).parameters.items()}
    return scaled | (method.published or {}) if name == "paper" else scaled
