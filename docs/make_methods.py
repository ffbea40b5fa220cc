"""Write docs/methods.md, the table of all methods, from the listing: python docs/make_methods.py"""

from __future__ import annotations

from pathlib import Path

from tokeff.listing import Method, methods

HOME = {"kv": "tokeff.kv", "sparse": "tokeff.sparse", "reduce": "tokeff.reduce", "decode": "tokeff.decode", "baseline": "tokeff.kv"}
HEAD = """# Methods

Generated from `tokeff/listing.py` by `python docs/make_methods.py`; do not edit by hand. `tokeff methods --bibtex NAME` prints a citation.

- *argument*: the argument of `tokeff.generate` that takes the object.
- *budget sets*: the ratio that `budget` fixes: `held` bytes, or bytes `read` per step. [design.md](design.md) defines both.
- *output*: lossless methods generate exactly what the full cache does.

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


def text() -> str:
    """The whole page."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *map(cells, methods())]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    about = "".join(f"- **{m.name}**: {(m.make.__doc__ or '').splitlines()[0]}\n" for m in methods())
    return f"{HEAD}{table}\n## In one line each\n\n{about}"


if __name__ == "__main__":
    (Path(__file__).parent / "methods.md").write_text(text(), encoding="utf-8")
