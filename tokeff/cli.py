"""The command line: `tokeff run | methods | fetch | bench | compare`.

Nothing heavy is imported before the command is known. Every error a user can act on is one line and exit code 2.
"""

import argparse
import importlib
import importlib.metadata
import inspect
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from tokeff.errors import UserError, nearest, one_line

BENCHES = {
    "kernels": "each op against its bandwidth floor",
    "decode": "decode tokens/s against the bandwidth floor",
    "prefill": "prefill seconds",
    "patterns": "prefill seconds of every sparse prefill, next to a dense one",
    "presses": "prefill, compression and decoding next to kvpress' same methods",
    "end-to-end": "prefill and decoding with the kernels and without",
    "verify-cost": "what a pass over several draft tokens costs",
}
"""Benchmarks by name; `tokeff bench verify-cost` calls main(args) of tokeff.bench.verify_cost."""

TERMINAL = 130
"""Columns of the table printed after a run."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise UserError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        return _main(args)
    except BrokenPipeError:  # the reader of our output went away, as in `tokeff methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        told = one_line(error)
        if told is None:
            raise
        print(f"tokeff: {told[0]}", file=sys.stderr)
        return told[1]


def _main(args: list[str]) -> int:
    """Parse the command line and call its command."""
    parser = _parser()
    if args and not args[0].startswith("-") and args[0] not in COMMANDS:
        raise UserError(f"no command {args[0]!r}; {nearest(args[0], COMMANDS)}")
    known, rest = parser.parse_known_args(args)
    if known.command is None:
        parser.print_help()
        return 0
    if rest and known.command not in ("run", "bench"):
        raise UserError(f"`tokeff {known.command}` does not take {rest[0]!r}; see `tokeff {known.command} --help`")
    COMMANDS[known.command](known, rest, args)
    return 0


def _parser() -> Parser:
    """Build the parser of all commands."""
    parser = Parser("tokeff", description="Token efficiency in JAX: run, list and compare methods.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"tokeff {version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    _run_parser(commands)
    methods = commands.add_parser("methods", help="list every method", allow_abbrev=False)
    methods.add_argument("--json", action="store_true", help="print a JSON list of objects")
    methods.add_argument("--bibtex", metavar="NAME", help="print the BibTeX entry of one method's paper")
    fetch = commands.add_parser("fetch", help="download a model and cache it", allow_abbrev=False)
    fetch.add_argument("model", nargs="?", default="smollm2-135m", help="name of the model (default: %(default)s)")
    about = "\n".join(f"  {name:12} {what}" for name, what in BENCHES.items())
    bench = commands.add_parser("bench", help="measure speed", add_help=False, allow_abbrev=False,
                                description=about, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    bench.add_argument("name", nargs="?", help="which benchmark; what follows goes to it")
    compare = commands.add_parser("compare", help="show two runs side by side", allow_abbrev=False)
    compare.add_argument("first", metavar="RUN", help="folder of a run")
    compare.add_argument("second", metavar="RUN", help="folder of another run")
    return parser


def _run_parser(commands) -> None:
    """Add the parser of `tokeff run`; the fields of the config are its further options."""
    run = commands.add_parser("run", help="run an experiment", add_help=False, allow_abbrev=False,
                              usage="tokeff run CONFIG [options] [--field value ...]")  # fmt: skip
    run.add_argument("config", nargs="?", help="a Python file with experiment(), such as configs/quickstart.py")
    run.add_argument("--out", help="folder of the run (default: runs/<name>)")
    run.add_argument("--suite", help="how much to measure, where the config offers it: smoke, full, or what else it names")
    run.add_argument("--only", nargs="+", default=(), metavar="METHOD", help="keep only the rows of these methods")
    run.add_argument("--fresh", action="store_true", help="measure again what is already in the folder")
    run.add_argument("-h", "--help", action="store_true", help="show this, and the fields of CONFIG when it is given")
    run.set_defaults(print_help=run.print_help)


def version() -> str:
    """Return the version of tokeff as installed."""
    try:
        return importlib.metadata.version("tokeff")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _run(known: argparse.Namespace, rest: list[str], args: list[str]) -> None:
    """Run an experiment into its folder."""
    import dataclasses

    from tokeff import experiment, overrides

    if known.config is None:
        if known.help:
            return known.print_help()
        raise UserError("name a config file, such as `tokeff run configs/quickstart.py`")
    config = experiment.load(known.config, known.suite, tuple(known.only))
    if known.help:
        known.print_help()
        return overrides.print_help(config.experiment)
    config = dataclasses.replace(config, experiment=overrides.apply(config.experiment, rest))

    from tokeff.report import table
    from tokeff.report.run import run, summed

    folder = run(config, known.out or os.path.join("runs", config.experiment.name), fresh=known.fresh, args=args)
    print(table.text(table.build(summed(config.experiment, folder), table.BRIEF), TERMINAL), end="")
    print(f"\nreport: {folder.path / 'report.html'}")


def _methods(known: argparse.Namespace, rest: list[str], args: list[str]) -> None:
    """List the methods, or print one's BibTeX entry."""
    from tokeff import listing

    methods = {method.name: method for method in listing.every()}
    if known.bibtex is not None:
        if known.bibtex not in methods:
            raise UserError(f"no method {known.bibtex!r}; {nearest(known.bibtex, methods)}")
        paper = methods[known.bibtex].paper
        if paper is None:
            raise UserError(f"{known.bibtex} has no paper; choose a method that `tokeff methods` shows with one")
        print(paper.bibtex())
        return
    fields = ("name", "family", "lossless", "trained", "config")
    rows = [
        {**{f: getattr(m, f) for f in fields}, "paper": m.paper.title if m.paper else None} for m in methods.values()
    ]
    if known.json:
        for row, m in zip(rows, methods.values(), strict=True):
            row["paper_settings"] = None if m.published is None else m.settings("paper")
            row["scaled_settings"] = m.settings("scaled")
        print(json.dumps(rows, indent=2, ensure_ascii=False, default=repr))
        return
    _print_methods(rows)


def _print_methods(rows: list[dict[str, Any]]) -> None:
    """Print the methods as a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table("name", "family", "output", "trained", "paper", box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        output = "lossless" if row["lossless"] else "lossy"
        trained = "yes" if row["trained"] else "no"
        drawn.add_row(*map(Text, (row["name"], row["family"], output, trained, row["paper"] or "—")))
    Console().print(drawn)


def _fetch(known: argparse.Namespace, rest: list[str], args: list[str]) -> None:
    """Download a model and print where it is."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from tokeff.models import fetch

    if "progress" not in inspect.signature(fetch.fetch).parameters:
        print(fetch.fetch(known.model))
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(known.model, total=None)
        path = fetch.fetch(known.model, progress=lambda done, total: bar.update(task, completed=done, total=total))
    print(path)


def _bench(known: argparse.Namespace, rest: list[str], args: list[str]) -> None:
    """Call one benchmark with the arguments that follow its name."""
    if known.name is None:
        print("usage: tokeff bench NAME [options]\n\n" + "\n".join(f"  {n:12} {what}" for n, what in BENCHES.items()))
        return
    if known.name not in BENCHES:
        raise UserError(f"no benchmark {known.name!r}; {nearest(known.name, BENCHES)}")
    importlib.import_module(f"tokeff.bench.{known.name.replace('-', '_')}").main(args[args.index(known.name) + 1 :])


def _compare(known: argparse.Namespace, rest: list[str], args: list[str]) -> None:
    """Print two runs side by side."""
    from tokeff.report import table
    from tokeff.report.compare import compare
    from tokeff.report.folder import RunFolder

    shown, warnings = compare(RunFolder(known.first), RunFolder(known.second))
    print(table.text(shown), end="")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


COMMANDS = {"run": _run, "methods": _methods, "fetch": _fetch, "bench": _bench, "compare": _compare}

if __name__ == "__main__":
    sys.exit(main())
