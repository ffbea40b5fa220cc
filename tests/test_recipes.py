"""What recipes share: a stopped or failed run leaves what was released, the folder is measured as it is stored, and errors are one line."""

import json
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
import pytest

from tokeff import recipes
from tokeff.errors import UserError
from tokeff.recipes import Recipe, learnt, main, release, run

pytestmark = pytest.mark.core


@dataclass(frozen=True)
class Training:
    steps: int = 6
    falls: int = 2
    peak: float = 0.1
    warm: int = 1
    seed: int = 0


def save(folder, model, facts):
    folder.mkdir(parents=True)
    (folder / "model.json").write_text(json.dumps({"w": round(model, 1), "about": facts}))
    return folder


def load(folder):
    if not folder.is_dir():
        raise UserError(f"there is no model in {folder}; train it")
    return json.loads((folder / "model.json").read_text())["w"]


def train(how):
    return 1.23456, [{"loss": 1 / (i + 1), "seconds": 1.0} for i in range(how.steps)]


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKEFF_CACHE", str(tmp_path / "cache"))
    (tmp_path / "experiments" / "results").mkdir(parents=True)
    (tmp_path / "checkpoints").mkdir()
    return Recipe(
        script=tmp_path / "experiments" / "train_it.py", about="One small model.\n\nMore.", name="it", how=Training(), batch=(4, "things"),
        train=train, save=save, load=load, measured=lambda m: {"test": {"full": m}}, facts=lambda m: {"look": 1},
        accuracy=lambda found: found["test"]["full"], thresholds={"named": 0.5},
    )  # fmt: skip


def test_a_run_is_released_and_written_down(recipe, capsys):
    out = recipe.released(0)
    run(recipe, recipe.how, out, only=False)
    assert json.loads(capsys.readouterr().out) == {"test": {"full": 1.2}}  # as rounded in the folder
    told = json.loads(recipe.results.read_text())
    assert set(told) == {"seeds", "thresholds", "environment"}
    assert told["environment"]["command"].startswith("python experiments/train_it.py")
    facts = json.loads((out / "model.json").read_text())["about"]
    assert facts == {
        "recipe": {"script": "experiments/train_it.py", "steps": 6, "falls": 2, "peak": 0.1, "warm": 1, "seed": 0}, "steps": 6,
        "things": 24, "train_seconds": 6, "last": {"loss": 0.4083, "seconds": 1.0}, "look": 1, "accuracy": 1.2,
    }  # fmt: skip
    assert told["seeds"]["0"] == {**{k: v for k, v in facts.items() if k != "accuracy"}, "test": {"full": 1.2}, "curve": [[1.0]]}
    run(recipe, replace(recipe.how, seed=3), recipe.released(3), only=False)
    assert set(json.loads(recipe.results.read_text())["seeds"]) == {"0", "3"} and recipe.released(3).parent.name == "training"


def test_measuring_alone_changes_the_figures_alone(recipe):
    run(recipe, recipe.how, recipe.released(0), only=False)
    run(replace(recipe, measured=lambda m: {"test": {"full": 7}}), recipe.how, recipe.released(0), only=True)
    told = json.loads(recipe.results.read_text())["seeds"]["0"]
    assert told["test"] == {"full": 7} and told["steps"] == 6 and load(recipe.released(0)) == 1.2


def test_what_fails_on_the_way_leaves_the_last_folder(recipe):
    out = recipe.released(0)
    release(recipe, out, 5.0, {})

    def fails(m):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        release(replace(recipe, measured=fails), out, 6.0, {})
    assert load(out) == 5.0
    release(recipe, out, 7.0, {})  # over what the other left behind
    assert load(out) == 7.0 and [p.name for p in out.parent.iterdir()] == ["it"]


@pytest.mark.parametrize(
    ("args", "says"), [(["--steps", "0"], "at least 1"), (["--peak", "0"], "above 0"), (["--measure"], "there is no model in")]
)
def test_errors_are_one_line(recipe, args, says, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train_it.py", *args])
    monkeypatch.setattr(recipes, "compile_cache", lambda: None)
    with pytest.raises(SystemExit) as stop:
        main(recipe)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and says in said and said.count("\n") == 1


def test_what_is_lacking_is_said_before_anything_runs(recipe, monkeypatch, capsys):
    def ready():
        raise UserError("there is no tower; train it first")

    monkeypatch.setattr("sys.argv", ["train_it.py", "--seed", "2"])
    monkeypatch.setattr(recipes, "compile_cache", lambda: None)
    with pytest.raises(SystemExit):
        main(replace(recipe, ready=ready, train=lambda how: pytest.fail("ran")))
    assert "no tower" in capsys.readouterr().err


@dataclass(frozen=True)
class Squares:
    def __call__(self, weights, frozen, batch):
        return ((batch @ weights) ** 2).mean(), {}


def test_a_run_of_another_length_finds_the_checkpoints(recipe, tmp_path):
    def learn(how, *told):
        make = lambda i: np.random.default_rng(i).normal(size=(2, 3)).astype(np.float32)  # noqa: E731
        learnt("it", how, told, jnp.ones(3), None, make, Squares())
        return {p.name for p in (tmp_path / "cache" / "training").iterdir()}

    (first,) = learn(Training(), "mix")
    assert learn(Training(steps=8, falls=3), "mix") == {first}
    assert len(learn(Training(), "other")) == 2 and len(learn(Training(peak=0.2), "mix")) == 3
