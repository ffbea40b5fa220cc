"""The measuring loop: one row a key, kept on disk at once, skipped when already there."""

import contextlib
import datetime
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tokeff.errors import UserError
from tokeff.experiment import Config, config_json, config_text
from tokeff.report import environment, html, plots, table
from tokeff.report.folder import RunFolder
from tokeff.report.kept import Kept
from tokeff.report.table import number


def run(config: Config, out: str | os.PathLike[str], *, fresh: bool = False, args: Sequence[str] = ()) -> RunFolder:
    """Measure every key of an experiment that is not yet in the folder `out`, then write table, plots and report.

    Nothing is loaded before the settings have been checked and the folder found writable, and nothing written before what is to be
    measured fits what was loaded. `args` is the command line to record.
    """
    experiment = config.experiment.settled()
    experiment.check()
    keys, text = unique(list(experiment.keys()), experiment.name), config_text(experiment.identity())
    folder = RunFolder(out)
    folder.check_writable()
    about = {"about": config.about, "file": config.path.as_posix(), "experiment": config_json(experiment)}
    where = environment.describe(args)
    if not fresh:
        folder.check_config(text, about)
    context = None if not fresh and set(keys) <= done_in(folder, experiment) else loaded(experiment)
    with folder.alone():
        if fresh:
            folder.clear()
        folder.start(text, about, where)
        done = done_in(folder, experiment)
        with folder.appending() as appender:
            _measure(experiment, context, keys, done, appender, {"commit": where["commit"], "dirty": where["dirty"]})
        finish(folder, experiment, keys)
    return folder


def done_in(folder: RunFolder, experiment) -> set[str]:
    """Keys of the measurements that stand there."""
    return {row["key"] for row in folder.rows() if experiment.stands(row)}


def loaded(experiment) -> Any:
    """What the measurements share."""
    start = time.perf_counter()
    with waiting("loading"):
        context = experiment.prepare()
    print(f"loaded in {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    return context


def unique(keys: list[str], name: str) -> list[str]:
    """Return the keys, or refuse an experiment whose keys are not unique or that has none."""
    twice = next((k for i, k in enumerate(keys) if k in keys[:i]), None)
    if twice is not None:
        raise UserError(f"{name} measures {twice!r} twice; give each row and setting a key of its own")
    if not keys:
        raise UserError(f"{name} has nothing to measure; give it at least one row")
    return keys


def _measure(experiment, context: Any, keys: list[str], done: set[str], appender, stamp: dict[str, Any]) -> None:
    """Measure the keys that are not done, showing how far the run is."""
    left = [key for key in keys if key not in done]
    if len(left) < len(keys):
        print(f"{len(keys) - len(left)} of {len(keys)} measurements are already here", file=sys.stderr)
    if not left:
        return
    with progress(len(left)) as step:
        for key in left:
            with step(key):
                start = time.perf_counter()
                row = experiment.measure(context, key)
                seconds = round(time.perf_counter() - start, 3)
            if "method" not in row:
                raise UserError(f"measure() of {experiment.name} returned no 'method' for {key!r}; add it to the row")
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            appender.add(key, row, measured_at=now, measured_s=seconds, **stamp)


def summed(experiment, folder: RunFolder, keys: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The lines of the table: of what was measured with the settings of the experiment."""
    by_key = {row["key"]: row for row in folder.rows() if experiment.stands(row)}
    return list(experiment.summary([by_key[key] for key in keys or experiment.keys() if key in by_key]))


def finish(folder: RunFolder, experiment, keys: Sequence[str]) -> None:
    """Write table, plots and report from the rows in the folder."""
    rows = summed(experiment, folder, keys)
    with waiting("drawing the report"):
        shown = table.build(rows)
        folder.write("table.md", table.markdown(shown))
        folder.write("table.txt", table.text(shown))
        kept = kept_of(folder, rows)
        images = plots.draw_all(rows, experiment.report(), kept)
        for image in images:
            folder.write(f"plots/{image.name}.png", image.png)
            folder.write(f"plots/{image.name}.svg", image.svg)
        folder.write("report.html", html.render(folder, rows, shown, images, kept))


def kept_of(folder: RunFolder, rows: Sequence[dict[str, Any]]) -> list[tuple[str, Kept]]:
    """Return (name, kept tokens) of the rows at the longest context: by method, or by key where methods repeat."""
    longest = max((number(row.get("context")) or 0.0 for row in rows if row.get("kept")), default=0.0)
    having = [row for row in rows if row.get("kept") and (number(row.get("context")) or 0.0) == longest]
    methods = [row["method"] for row in having]
    names = methods if len(set(methods)) == len(methods) else [row["key"] for row in having]
    return [(name, kept) for name, row in zip(names, having) if (kept := folder.kept(row)) is not None]


@contextlib.contextmanager
def progress(total: int, stream: TextIO | None = None) -> Iterator[Any]:
    """Yield step(name), a context manager around each piece of work: a bar on a terminal, plain lines elsewhere."""
    console = Console(file=stream or sys.stderr)
    show = _bar(console, total) if console.is_terminal else _lines(stream or sys.stderr, total)
    with show as step:
        yield step


@contextlib.contextmanager
def _bar(console: Console, total: int) -> Iterator[Any]:
    """Show one bar with the current key, the count and the time left."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("", total=total)

        @contextlib.contextmanager
        def step(name: str):
            bar.update(task, description=name)
            yield
            bar.advance(task)

        yield step


@contextlib.contextmanager
def _lines(stream: TextIO, total: int) -> Iterator[Any]:
    """Write one line a finished piece of work, with its seconds and an estimate of the time left."""
    took: list[float] = []

    @contextlib.contextmanager
    def step(name: str):
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        took.append(seconds)
        left = sum(took) / len(took) * (total - len(took))
        print(f"[{len(took)}/{total}] {name}: {seconds:.1f} s, about {left:.0f} s left", file=stream, flush=True)

    yield step


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show that something of unknown length is going on, on a terminal only."""
    console = Console(stderr=True)
    with console.status(what) if console.is_terminal else contextlib.nullcontext():
        yield
