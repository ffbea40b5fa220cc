"""Write docs/methods.md, the table of all methods, from the listing: python docs/make_methods.py"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokeff.listing import Method, methods

HOME = {"kv": "tokeff.kv", "sparse": "tokeff.sparse", "reduce": "tokeff.reduce", "decode": "tokeff.decode", "baseline": "tokeff.kv"}
HOME |= {"reuse": "tokeff.kv"}
HEAD = """# Methods

Generated from `tokeff/listing.py` by `python docs/make_methods.py`; do not edit by hand. `tokeff methods --bibtex NAME` prints a citation.

- *argument*: the argument of `tokeff.generate` that takes the object.
- *budget sets*: the ratio that `budget` fixes: `held` bytes, or bytes `read` per step. [design.md](design.md) defines both.
- *output*: lossless methods generate exactly what the full cache does.

"""
SETTINGS = """
## Settings

Each method has two named settings. `paper` has the published numbers, for models and contexts of the size they were published for; a prompt
on which they do not fit is refused. `scaled`, the defaults, is the same method as shares of the context, the heads and the width, for any
prompt. A share of n rows is rounded up, `ceil(budget * n)`, and at least one row; a share of a budget (`recent`, `sinks`) is rounded
down; a share of the width is rounded to the nearest. `line(NAME, "paper")` puts the first into a comparison; the table has the
settings that the paper names, and `find(NAME).settings("paper")` all of them. `AtLeast(a, b)` is the larger of a share and a number.

"our reading": the rule or its constants could not be recovered in full from what was published.

"""
COLUMNS = ("method", "expression", "argument", "family", "output", "budget sets", "paper")


def link(method: Method) -> str:
    """The paper as a link, where it has an arXiv number."""
    paper = method.paper
    if paper is None:
        return "none (baseline)"
    first = paper.authors.split(",")[0]
    said = f"{first} {'et al. ' if ' and ' in paper.authors else ''}{paper.year}"
    return f"[{said}](https://arxiv.org/abs/{paper.id})" if paper.id[:4].isdigit() else f"{said}, {paper.id}"


def cells(method: Method) -> tuple[str, ...]:
    call = f"`{HOME[method.family]}.{method.make.__name__}()`"
    output = "lossless" if method.lossless else "lossy"
    budget = f"`{method.budgeted_by}`" if method.budgeted_by else "—"
    return method.name, call, f"`{method.part}`", method.family, output, budget, link(method)


def said(value: Any) -> str:
    """A setting as it is shown; a long one cut."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def settings(method: Method) -> tuple[str, ...]:
    """The settings in which `paper` and `scaled` differ, side by side, with those that the paper names."""
    paper, scaled = method.settings("paper"), method.settings("scaled")
    named = [k for k in scaled if k in (method.published or {})]
    both = (", ".join(f"`{k}={said(found[k])}`" for k in named) or "—" for found in (paper, scaled))
    return method.name, *both, "our reading" if method.reading else ""


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Rows as a Markdown table."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ("---",) * len(head), *rows))


def text() -> str:
    """The whole page."""
    listed = table(COLUMNS, map(cells, methods()))
    named = table(("method", "paper", "scaled", "remark"), (settings(m) for m in methods() if m.published is not None))
    about = "".join(f"- **{m.name}**: {(m.make.__doc__ or '').splitlines()[0]}\n" for m in methods())
    return f"{HEAD}{listed}{SETTINGS}{named}\n## In one line each\n\n{about}"


if __name__ == "__main__":
    (Path(__file__).parent / "methods.md").write_text(text(), encoding="utf-8")
