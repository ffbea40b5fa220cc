"""What recipes of small models share beside the training itself (tokeff/training.py): where a run keeps its checkpoints, the folder that is
released, what is written of it, and the command line.

A recipe's settings are a frozen dataclass of its own with at least steps, falls (the last steps, over which the rate falls), peak and warm
(of the rate) and seed: `how` below.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from tokeff.errors import UserError, one_line
from tokeff.evals.comparison import compile_cache
from tokeff.models.fetch import cache_dir
from tokeff.report.environment import describe
from tokeff.training import Loss, lately, learn, optimiser

M = TypeVar("M")
Figures = dict[str, Any]


def learnt(
    name: str, how: Any, told: tuple[Any, ...], weights: Any, frozen: Any, batch: Callable[[int], Any], loss: Loss
) -> tuple[Any, list[dict[str, float]]]:
    """`learn`, its checkpoints in the cache under a name that says what was learnt: all settings but the length of the run, and `told`."""
    key = hashlib.sha256(repr((replace(how, steps=0, falls=0), *told)).encode()).hexdigest()[:12]
    where, falls = cache_dir() / "training" / f"{name}-{key}", max(how.steps - how.falls, 0)
    return learn(weights, frozen, batch, loss, optimiser(how.peak, how.steps, how.warm, falls), how.steps, falls, where)


@dataclass(frozen=True)
class Recipe(Generic[M]):
    """A small model that is trained, measured and released.

    script: its file, in the folder experiments/ of a repository. about: what its command line says first. how: its settings by default.
    batch: (how many examples a step sees, what they are). train: (the model, figures of every step) by settings. save writes a folder
    with what is to be known of the model, load reads it, and measured gives its figures. facts: what else is told of a model. accuracy:
    of the figures, what the folder tells. curve: figures that every tenth step is written down with; () for all. ready: UserError where
    something is lacking.
    """

    script: Path
    about: str
    name: str
    how: Any
    batch: tuple[int, str]
    train: Callable[[Any], tuple[M, list[dict[str, float]]]]
    save: Callable[[Path, M, Figures], Path]
    load: Callable[[Path], M]
    measured: Callable[[M], Figures]
    facts: Callable[[M], Figures]
    accuracy: Callable[[Figures], Any]
    thresholds: Figures
    curve: tuple[str, ...] = ()
    ready: Callable[[], None] = lambda: None

    @property
    def results(self) -> Path:
        return self.script.parent / "results" / f"{self.script.stem}.json"

    @property
    def called(self) -> str:
        return f"experiments/{self.script.name}"

    def released(self, seed: int) -> Path:
        """The folder that is written where none is named: of seed 0 the one that is released."""
        if seed:
            return cache_dir() / "training" / f"{self.name}-seed{seed}"
        return self.script.parents[1] / "checkpoints" / self.name


def release(recipe: Recipe[M], out: Path, model: M, facts: Figures) -> Figures:
    """The folder, measured with the weights as they are rounded in it, in the place of the last one: the figures."""
    new = out.with_name(f".{out.name}-new")
    shutil.rmtree(new, ignore_errors=True)
    found = recipe.measured(recipe.load(recipe.save(new, model, {})))
    shutil.rmtree(new)
    recipe.save(new, model, facts | {"accuracy": recipe.accuracy(found)})
    shutil.rmtree(out, ignore_errors=True)
    os.replace(new, out)
    return found


def trained(recipe: Recipe[M], how: Any, out: Path) -> tuple[Figures, Figures]:
    """The model is trained and released: (what is written of it, the figures among that)."""
    model, seen = recipe.train(how)
    many, examples = recipe.batch
    facts = {
        "recipe": {"script": recipe.called, **asdict(how)}, "steps": len(seen), examples: len(seen) * many,
        "train_seconds": round(sum(row["seconds"] for row in seen)), "last": lately(seen), **recipe.facts(model),
    }  # fmt: skip
    found = release(recipe, out, model, facts)
    curve = [[round(row[k], 4) for k in recipe.curve or row if k != "seconds"] for row in seen[::10]]
    return {**facts, **found, "curve": curve}, found


def run(recipe: Recipe[Any], how: Any, out: Path, only: bool) -> None:
    """Train and release, or `only` measure the folder; write the results and print the figures."""
    result = json.loads(recipe.results.read_text()) if recipe.results.is_file() else {"seeds": {}}
    seed = str(how.seed)
    if only:
        found = recipe.measured(recipe.load(out))
        result["seeds"][seed] |= found
    else:
        result["seeds"][seed], found = trained(recipe, how, out)
    result["thresholds"] = recipe.thresholds
    result["environment"] = describe([]) | {"command": " ".join([f"python {recipe.called}", *sys.argv[1:]])}
    recipe.results.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def parser(recipe: Recipe[Any]) -> argparse.ArgumentParser:
    p, many = argparse.ArgumentParser(description=recipe.about.splitlines()[0]), " ".join(map(str, recipe.batch))
    p.add_argument("--steps", type=int, default=recipe.how.steps, help=f"of {many} (default: %(default)s)")
    p.add_argument("--falls", type=int, default=recipe.how.falls, help="last steps over which the rate falls (default: %(default)s)")
    p.add_argument("--peak", type=float, default=recipe.how.peak, help="highest learning rate (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the weights and pictures; 0 is the one that is released")
    p.add_argument(
        "--out", type=Path, help=f"folder that is written (default: checkpoints/{recipe.name}; for seeds above 0 one in the cache)"
    )
    p.add_argument("--measure", action="store_true", help="only measure the folder")
    return p


def main(recipe: Recipe[Any]) -> None:
    """The command of a recipe. An error that a user can act on is one line."""
    known = parser(recipe).parse_args()
    compile_cache()
    try:
        if min(known.steps, known.falls) < 1 or known.seed < 0 or known.peak <= 0:
            raise UserError("steps and falls must be at least 1, the seed at least 0 and the rate above 0")
        recipe.ready()
        how = replace(recipe.how, steps=known.steps, falls=known.falls, peak=known.peak, seed=known.seed)
        run(recipe, how, known.out or recipe.released(known.seed), known.measure)
    except (UserError, KeyboardInterrupt) as error:
        said, code = one_line(error) or (str(error), 1)
        sys.exit(print(f"error: {said}", file=sys.stderr) or code)
