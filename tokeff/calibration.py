"""Settings that a search on a model found: kept in one JSON file a model, and given to the methods that leave them open.

    m = tokeff.load("smollm2-135m")
    tokeff.generate(m, prompts, kv=tokeff.kv.compresskv(0.25, **calibration.settings(m, "CompressKV")))

`Method.calibrates` names what a method leaves open. The files are data: numbers in lists, made by `python experiments/calibrate.py MODEL`
on a text that no evaluation reads.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

from tokeff.errors import UserError
from tokeff.listing import Method, find
from tokeff.models.load import Model, fingerprint
from tokeff.models.presets import PRESETS

FOLDER = Path(__file__).parent / "calibrated"


@dataclass(frozen=True)
class Calibration:
    """What was found for one model: of each method the settings to give its expression. Made with these weights, at this precision."""

    model: str
    fingerprint: str
    precision: str
    settings: dict[str, dict[str, Any]]

    def check(self, m: Model) -> None:
        """Raise UserError where the model's weights are not those it was made with. Rounded to another precision they cannot be told."""
        if repr(m.precision) == self.precision and fingerprint(m) != self.fingerprint:
            raise UserError(f"the calibration of {self.model} was made with other weights of that name; {remedy(self.model)}")


def remedy(model: str) -> str:
    """What to do about a calibration that is missing or no good."""
    return f"make it with: python experiments/calibrate.py {model}"


def name_of(source: str) -> str:
    """The name that `tokeff.load` gives the model of this source."""
    path = Path(source).expanduser()
    if source in PRESETS or not path.exists():
        return source
    return path.resolve().name if path.is_dir() else path.stem


def file_of(model: str) -> Path:
    """Where the calibration of a model of this name is kept, whether there is one or not."""
    return FOLDER / f"{model.replace('/', '--')}.json"


def read(model: str) -> Calibration | None:
    """The calibration kept for a model of this name, None where there is none. Raises UserError for a file that is damaged."""
    file = file_of(model)
    if not file.is_file():
        return None
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        found = {name: settings_of(find(name), entry["settings"]) for name, entry in about["methods"].items()}
        return Calibration(_text(about["model"]), _text(about["fingerprint"]), _text(about["precision"]), found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, UserError) as e:
        why = " ".join(f"{type(e).__name__}: {e}".split())[:120]
        raise UserError(f"{file} is damaged ({why}); {remedy(model)}") from None


def settings(m: Model | str, method: str) -> dict[str, Any]:
    """What was found for a method on a loaded model, or on one of this name: settings for its expression.

    Raises UserError where nothing was, or other weights were read, with the command that finds it.
    """
    listed, model = find(method), m if isinstance(m, str) else m.name
    if not listed.calibrates:
        raise UserError(f"{method} leaves nothing to a calibration; use its settings as they are")
    found = read(model)
    if found is None or method not in found.settings:
        raise UserError(f"no calibration of {method} for {model}; {remedy(model)}")
    if not isinstance(m, str):
        found.check(m)
    return dict(found.settings[method])


def calibrated(method: Method, part: Any, found: Calibration | None) -> Any | None:
    """`part`, an object of this method, with what was found in the place of the defaults; None where nothing was found, or where the
    part has something of its own in such a place."""
    if found is None or method.name not in found.settings:
        return None
    try:
        return _moved(part, method.make(), method.build(**found.settings[method.name]))
    except _Taken:
        return None


class _Taken(Exception):
    """What is to be changed has been changed otherwise."""


def _moved(own: Any, base: Any, goal: Any) -> Any:
    """`own` with what `goal` changes of `base`, field by field."""
    if base == goal or own == goal:
        return own
    if own == base:
        return goal
    if not dataclasses.is_dataclass(own) or not type(own) is type(base) is type(goal):
        raise _Taken
    names = [f.name for f in dataclasses.fields(own)]
    return dataclasses.replace(own, **{name: _moved(*(getattr(x, name) for x in (own, base, goal))) for name in names})  # type: ignore[type-var]


def settings_of(method: Method, found: dict[str, Any]) -> dict[str, Any]:
    """Settings as the method's expression takes them, from JSON. Raises ValueError for names and kinds of values that it does not take."""
    kinds = typing.get_type_hints(method.make)
    if set(found) != set(method.calibrates):
        raise ValueError(f"{method.name} has the settings {sorted(found)} and wants {sorted(method.calibrates)}")
    given = {name: _tuples(value) for name, value in found.items()}
    for name, value in given.items():
        if not _fits(value, kinds[name]):
            raise ValueError(f"{name} of {method.name} is not of the kind {kinds[name]}")
    return given


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind made of numbers, None, `X | Y` and `tuple[X, ...]`."""
    inside = typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, UnionType):
        return any(_fits(value, one) for one in inside)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(x, inside[0]) for x in value)
    return type(value) is kind and (not isinstance(value, float) or math.isfinite(value))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value
