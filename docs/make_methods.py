"""Write docs/methods.md, the table of all methods, and docs/drafters.md from the listing: python docs/make_methods.py"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokeff
from tokeff.decode.draft import Drafter
from tokeff.decode.draft_model import OwnModel
from tokeff.listed import Listed
from tokeff.listing import Method, methods
from tokeff.models.config import Config
from tokeff.reduce.listing import InsideMethod, PictureMethod, inside_methods, picture_methods

HOME = {"kv": "tokeff.kv", "sparse": "tokeff.sparse", "reduce": "tokeff.reduce", "decode": "tokeff.decode", "baseline": "tokeff.kv"}
HOME |= {"reuse": "tokeff.kv"}
HEAD = """# Methods

Generated from `tokeff/listing.py` and `tokeff/reduce/listing.py` by `python docs/make_methods.py`; do not edit by hand.
`tokeff methods --bibtex NAME` prints a citation. Methods over rows of pictures, videos and sound stand [below](#pictures-videos-and-sound).

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


def link(method: Listed) -> str:
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


PICTURES = """
## Pictures, videos and sound

These stand beside everything above; they are lossy, and none is trained. What reduces rows before a decoder is given to
`tokeff.models.llava.generate` as `reduce`; a pass over rows of pictures inside the decoder to its `Setup` as `cut`; what merges rows inside
an encoder, of pictures or of sound, to `encode` and `transcribe` as `reduce`. More in [vision.md](vision.md) and [reduce.md](reduce.md).

- *acts*: inside the image tower, on patches behind it, between a thumbnail and its crops, on patches given the text, between frames; inside
  the decoder, or inside an encoder.
- *nothing is left out at*: settings at which all rows stay as they are; `grid` is as many cells as the tower has patches.
- *paper's numbers*: the settings it names; most defaults are theirs, as shares.

"""


def home(make: Any) -> str:
    """How a user reaches it: from `tokeff.reduce`, or from its own module."""
    return "tokeff.reduce" if make.__name__ in tokeff.reduce.__all__ else make.__module__


def pictured(m: PictureMethod | InsideMethod) -> tuple[str, ...]:
    same, paper = ((", ".join(f"`{k}={said(v)}`" for k, v in (given or {}).items()) or "—") for given in (m.identity, m.published))
    source = link(m) if m.paper or m.family == "baseline" else "—"
    call = f"`{home(m.make)}.{m.make.__name__}()`"
    return m.name, call, f"`{m.part}`", m.acts, m.by, same, paper, "our reading" if m.reading else "", source


def pictures() -> str:
    """The section of what reduces rows of pictures, videos and sound."""
    head = ("method", "expression", "argument", "acts", "goes by", "nothing is left out at", "paper's numbers", "remark", "paper")
    return PICTURES + table(head, map(pictured, (*picture_methods(), *inside_methods())))


def text() -> str:
    """The whole page."""
    listed = table(COLUMNS, map(cells, methods()))
    named = table(("method", "paper", "scaled", "remark"), (settings(m) for m in methods() if m.published is not None))
    about = "".join(f"- **{m.name}**: {(m.make.__doc__ or '').splitlines()[0]}\n" for m in methods())
    return f"{HEAD}{listed}{SETTINGS}{named}\n## In one line each\n\n{about}{pictures()}"


DRAFTERS = """# Drafters

Generated from `tokeff/listing.py` by `python docs/make_methods.py`; do not edit by hand. [decode.md](decode.md) explains them.

- *nodes*, *depth*: of a pass at the default settings, the last known token included in the nodes.
- *drafts come from*: the text alone, some of the model's own layers, or another model, which is attached beside the target's weights.
- *output*: "same tokens" as plain decoding with the same seed; "same law", greedy text the same; or lossy.

"""


# For what a drafter cannot be made without: a model's sizes, and halves of layers to leave out.
ANY = {"cfg": Config("any", V=8, D=8, F=8, L=2, N=1, K=1, H=8), "attention": (1,), "ffn": (1,)}


def made(method: Method) -> Drafter:
    asked = inspect.signature(method.make).parameters.values()
    return method.make(**{p.name: ANY[p.name] for p in asked if p.default is p.empty})


def source(drafter: Drafter) -> str:
    """Where drafts come from."""
    if isinstance(drafter, OwnModel):
        return "another model"
    if drafter.nodes == 1:
        return "no drafts"
    return "the model's layers" if drafter.own_layers else "the text"


def drafter(method: Method) -> tuple[str, ...]:
    it = made(method)
    output = "lossy" if not it.lossless else "same tokens" if it.rule.same else "same law"
    return method.name, f"`tokeff.decode.{method.make.__name__}()`", source(it), str(it.nodes), str(it.depth), output, link(method)


def drafters() -> str:
    """The page of the drafters."""
    rows = [drafter(m) for m in methods() if m.part == "decode"]
    return DRAFTERS + table(("method", "expression", "drafts come from", "nodes", "depth", "output", "paper"), rows)


if __name__ == "__main__":
    (Path(__file__).parent / "methods.md").write_text(text(), encoding="utf-8")
    (Path(__file__).parent / "drafters.md").write_text(drafters(), encoding="utf-8")
