"""What the benchmarks share: options, interleaved timing, read bandwidth, and where the rows go.

Timings of one machine minutes apart can differ by half, so nothing is compared across time: all programs of a table take
turns, round after round, and ratios are medians of the ratios within a round.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from tokeff.bench.files import old, path_of, save
from tokeff.cli import Parser
from tokeff.errors import UserError
from tokeff.models.load import Model, load

Timer = Callable[[], float]  # does the work once and returns its seconds
READ_BYTES = 512 * 2**20
WIDTH = 130  # columns of the printed table, at least
READS = "read "  # names of the programs that measure bandwidth start with this


def parser(name: str, about: str, rounds: int) -> Parser:
    """The options that every benchmark takes."""
    p = Parser(f"tokeff bench {name}", description=about, allow_abbrev=False)
    p.add_argument("--rounds", type=positive, default=rounds, help="how often everything is timed (default: %(default)s)")
    p.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder of the JSON file (default: %(default)s)")
    return p


def model_options(p: Parser, contexts: Sequence[int], peer: bool = True) -> None:
    """The options of a benchmark that runs a model over contexts."""
    default = " ".join(map(str, contexts))
    p.add_argument("--model", default="smollm2-135m", help="what tokeff.load takes (default: %(default)s)")
    p.add_argument("--contexts", type=positive, nargs="+", default=list(contexts), help=f"lengths (default: {default})")
    if peer:
        p.add_argument("--no-peer", action="store_true", help="leave transformers out")


def positive(text: str) -> int:
    """An option's value that must be at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def open_model(source: str, contexts: Sequence[int], least: int = 0) -> Model:
    """Load a model and refuse contexts that it cannot read, or that are not above `least`."""
    if min(contexts) <= least:
        raise UserError(f"a context of {min(contexts)} is too short here; use more than {least}")
    m = load(source)
    if max(contexts) > m.cfg.max_len:
        raise UserError(f"{m.name} reads {m.cfg.max_len} tokens, not {max(contexts)}; use shorter --contexts")
    return m


def timed(f: Callable[..., Any], *args: Any) -> Timer:
    """A timer of one call whose result is waited for."""

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(f(*args))
        return time.perf_counter() - start

    return run


def interleave(
    timers: Mapping[str, Timer], rounds: int, what: str = "", warm: bool = True, first: int = 0
) -> dict[str, list[float]]:
    """Seconds of each timer in each round. With `warm`, one round before is not counted. Each round starts with
    another timer, the first one counted with the timer `first`."""
    names, seconds = list(timers), {name: [] for name in timers}
    with tqdm(total=(rounds + warm) * len(names), desc=what, disable=None, leave=False) as bar:
        for i in range(-1 if warm else 0, rounds):
            turn = (max(i, 0) + first) % len(names)
            for name in names[turn:] + names[:turn]:
                took = timers[name]()
                if i >= 0:
                    seconds[name].append(took)
                bar.update()
    return seconds


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median over rounds of one program's seconds by another's."""
    return median(a / b for a, b in zip(above, below, strict=True))


def reads(nbytes: int = READ_BYTES) -> dict[str, Timer]:
    """Timers that read `nbytes` in several ways: a sum to one number may run on one core, a product does not."""
    x = jnp.ones((nbytes // 4096, 1024), jnp.float32)
    forms = {"sum": jnp.sum, "rows": lambda x: x.sum(axis=1), "product": lambda x: x @ x[0]}
    return {READS + name: timed(jax.jit(form), x) for name, form in forms.items()}


def bandwidth(seconds: Mapping[str, Sequence[float]], nbytes: int = READ_BYTES) -> float:
    """Bytes a second of the best read of an interleaved run: what a floor may assume."""
    return nbytes / min(min(took) for name, took in seconds.items() if name.startswith(READS))


def weight_bytes(m: Model) -> int:
    """Bytes of weights that one pass reads: all but an embedding that is only looked up."""
    whole = sum(x.nbytes for x in jax.tree.leaves(m.params.replace(side=None)))
    return whole if m.params.head_VD is None else whole - m.params.embed_VD.nbytes


def check_out(out: Path) -> None:
    """Refuse a folder that cannot be written, before anything is measured."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error.strerror or 'not possible'}); choose another folder with --out") from error
    old(path_of(out))


def show(title: str, rows: list[dict[str, Any]], columns: Sequence[str] = ()) -> None:
    """Print rows as a table, one column a field (all of them, or those named)."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    columns = columns or tuple(rows[0])
    for name in columns:
        table.add_column(name.replace("_", " "), justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(Text(_cell(row[name])) for name in columns))
    console = Console()
    console.width = max(console.width, WIDTH)  # 80 where the output is a file
    console.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "—"
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 100 else f"{value:.0f}" if isinstance(value, float) else str(value)


def finish(name: str, rows: list[dict[str, Any]], out: Path, args: Sequence[str], columns: Sequence[str] = ()) -> None:
    """Print and save."""
    show(name, rows, columns)
    print(save(out, name, rows, args))
