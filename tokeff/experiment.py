"""What an experiment is: rows to compare, measurements to make, figures to draw.

A file in `configs/` holds a function `experiment()` that returns one object of a subclass of `Experiment`. The
object is frozen: its printed form is the config text of the run, and two runs are the same run when those are equal.

    @dataclasses.dataclass(frozen=True)
    class Lengths(Experiment):
        contexts: tuple[int, ...] = (512, 1024)

        def keys(self):                   # one id for each measurement
            return [f"{row.method}/{c}" for row in self.rows for c in self.contexts]

        def prepare(self):                # once, and only when a key is still to be measured
            return tokeff.load("smollm2-135m")

        def measure(self, context, key):  # one flat row of JSON values
            return {"method": key.split("/")[0], "context": 512, "kl": 0.1}
"""

import abc
import dataclasses
import importlib.util
import inspect
import pathlib
import pprint
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from tokeff.errors import UserError, nearest
from tokeff.report.figures import Figure


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a comparison. Subclasses add the choices (policy, pass, decoder) that the line is made of."""

    method: str


@dataclasses.dataclass(frozen=True)
class Experiment(abc.ABC):
    """Rows to compare and how to measure them."""

    name: str
    """Name of the run, and of its folder under runs/."""
    rows: tuple[Row, ...]
    """What is compared, in the order of the table."""

    def check(self) -> None:  # noqa: B027 (most experiments have nothing to refuse)
        """Raise `UserError` for settings that cannot work. Called before anything is written or loaded."""

    def settled(self) -> "Experiment":
        """Return it with what it leaves open decided. Called once, before `check`; what comes out is what is measured and recorded."""
        return self

    @abc.abstractmethod
    def keys(self) -> Iterable[str]:
        """Return the unique id of every measurement, such as 'snapkv/needle/2048', in the order of the table."""

    @abc.abstractmethod
    def prepare(self) -> Any:
        """Load what measuring needs (model, texts). Called once, and only if some key is not measured yet."""

    @abc.abstractmethod
    def measure(self, context: Any, key: str) -> dict[str, Any]:
        """Return the row of one key: JSON values, at least 'method'; `kept` may hold a `tokeff.report.kept.Kept`."""

    def identity(self) -> "Experiment":
        """Return what makes two runs the same run: all of it, unless some of it may grow."""
        return self

    def stands(self, measured: dict[str, Any]) -> bool:
        """Return whether a row of an earlier run of the same `identity` is still what its key would measure."""
        return True

    def summary(self, rows: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        """Return what the table and the figures show of the measurements: all of them, unless they are to be averaged."""
        return rows

    def report(self) -> tuple[Figure, ...]:
        """Return the figures of the report; the table and the kept-token pictures are always there."""
        return ()


@dataclasses.dataclass(frozen=True)
class Config:
    """An experiment with the file it came from."""

    experiment: Experiment
    path: pathlib.Path
    about: str
    """The docstring of the file: command, hardware, time, expected numbers."""


def load(path: str, suite: str | None = None, only: tuple[str, ...] = ()) -> Config:
    """Run the config file at `path` and return its experiment, cut to the rows whose method is in `only`."""
    file = pathlib.Path(path)
    module = _import(file)
    build = getattr(module, "experiment", None)
    if not callable(build):
        raise UserError(f"{path} has no function experiment(); add one that returns a tokeff.experiment.Experiment")
    takes_suite = "suite" in inspect.signature(build).parameters
    if suite is not None and not takes_suite:
        raise UserError(f"{path} has only one suite; leave out --suite")
    built = build(suite=suite) if suite is not None else build()
    if not isinstance(built, Experiment):
        kind = type(built).__name__
        raise UserError(f"experiment() in {path} returned {kind}; it must return a tokeff.experiment.Experiment")
    return Config(_only(built, only), file, inspect.cleandoc(module.__doc__ or ""))


def _import(file: pathlib.Path):
    """Import one Python file by its path, without making it importable by name."""
    if file.suffix != ".py" or not file.is_file():
        found = sorted(str(p) for p in file.parent.glob("*.py")) if file.parent.is_dir() else []
        raise UserError(f"no config file {file}; {nearest(str(file), found) if found else 'give a path to a .py file'}")
    spec = importlib.util.spec_from_file_location(f"tokeff_config_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # classes defined in the file look their module up
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{file} is not valid Python: line {error.lineno}: {error.msg}") from error
    return module


def _only(experiment: Experiment, only: tuple[str, ...]) -> Experiment:
    """Return the experiment with only the rows whose method is named."""
    known = {row.method for row in experiment.rows}
    for name in only:
        if name not in known:
            raise UserError(f"no row has the method {name!r} in {experiment.name}; {nearest(name, known)}")
    rows = tuple(row for row in experiment.rows if row.method in only)
    return dataclasses.replace(experiment, rows=rows) if only else experiment


def config_text(experiment: Experiment) -> str:
    """Return the printed form that identifies a run."""
    text = pprint.pformat(experiment, width=100, sort_dicts=False) + "\n"
    address = re.search(r"<[^<>]* at 0x[0-9a-f]+>", text)
    if address:
        raise UserError(f"the config holds {address[0]}, which prints differently each time; use a frozen dataclass")
    return text


def config_json(value: Any) -> Any:
    """Return a value as JSON types; a dataclass becomes its fields with its class name under 'type'."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: config_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, dict):
        return {str(k): config_json(v) for k, v in value.items()}
    if isinstance(value, (tuple, list, set, frozenset)):
        return [config_json(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)
