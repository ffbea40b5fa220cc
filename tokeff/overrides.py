"""Typed overrides of an experiment's fields from the command line, through tyro.

What can be said after the config file:

    --budget 0.25                       a field of the experiment
    --rows.snapkv.kv.budget 0.25        a field of one row's choices, the row named by its method or its place
"""

import contextlib
import io
import re
from collections.abc import Sequence
from typing import Any

import tyro

from tokeff.errors import UserError, nearest
from tokeff.experiment import Experiment

SETTINGS: dict[str, Any] = {"prog": "tokeff run CONFIG", "config": (tyro.conf.AvoidSubcommands,)}
"""For tyro: a field that may hold one of several choices keeps the one it has."""
BORDERS = re.compile(r"[│╭╮╰╯─├┤|]+|^\s+|\s+$")


def apply(experiment: Experiment, args: Sequence[str]) -> Experiment:
    """Return the experiment with the fields named in `args` replaced, or refuse an unknown name or a wrong value."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            changed, unknown = tyro.cli(
                type(experiment),
                default=experiment,
                args=_places(experiment, args),
                return_unknown_args=True,
                **SETTINGS,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_by_method(experiment, _first_sentence(said.getvalue()))) from None
    if unknown:
        raise UserError(_unknown(experiment, unknown[0]))
    return changed


def print_help(experiment: Experiment) -> None:
    """Print every field that can be set, with its type and value."""
    places = ", ".join(f"{i} is {row.method}" for i, row in enumerate(experiment.rows))
    print(f"\nFields of {experiment.name}. A row is named by its place or its method: {places}.\n")
    _tyro_help(experiment)


def _tyro_help(experiment: Experiment) -> None:
    """Print the fields as tyro lists them."""
    with contextlib.suppress(SystemExit):
        tyro.cli(type(experiment), default=experiment, args=["--help"], **SETTINGS)


def _places(experiment: Experiment, args: Sequence[str]) -> list[str]:
    """Return the arguments with rows named by method turned into rows named by place, which is what tyro knows."""
    methods = [row.method for row in experiment.rows]
    places = {name: str(methods.index(name)) for name in methods if methods.count(name) == 1}

    def place(arg: str) -> str:
        start, dot, rest = arg.partition("--rows.")
        name = max((n for n in places if rest.startswith(f"{n}.")), key=len, default=None)
        return arg if start or not dot or name is None else f"--rows.{places[name]}{rest[len(name) :]}"

    return [place(arg) for arg in args]


def _first_sentence(box: str) -> str:
    """Return the message in tyro's box of text, without title, rules and help."""
    lines = [BORDERS.sub("", line).strip() for line in box.splitlines()]
    rules = [i for i, line in enumerate(box.splitlines()) if re.search(r"[-─]{6}", line)]
    start, stop = (rules[0] + 1, rules[1]) if len(rules) > 1 else (0, len(lines))
    message = re.sub(r"\s+", " ", " ".join(lines[start:stop])).strip() or "an override could not be read"
    return f"{message.rstrip('.')}; `tokeff run CONFIG --help` lists the fields and their types"


def _unknown(experiment: Experiment, arg: str) -> str:
    """Return the line for an argument that names no field."""
    if not arg.startswith("-"):
        return f"{arg!r} is not an option; write overrides as --field value, after the config file"
    name = arg.lstrip("-").partition("=")[0]
    return f"{experiment.name} has no field {name!r}; {nearest(name, field_names(experiment))}"


def field_names(experiment: Experiment) -> list[str]:
    """Return every name that can be set, as on the command line."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        _tyro_help(experiment)
    return sorted(set(re.findall(r"--(?!help\b)([\w][\w.-]*)", _by_method(experiment, said.getvalue()))))


def _by_method(experiment: Experiment, text: str) -> str:
    """Return tyro's text with rows named by their method instead of their place."""
    return re.sub(r"\brows\.(\d+)\.", lambda m: f"rows.{experiment.rows[int(m[1])].method}.", text)
