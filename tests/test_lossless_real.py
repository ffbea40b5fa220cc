"""Drafting changes no token of SmolLM2's greedy text: a sample of what experiments/lossless.py proves on all prompts."""

import importlib.util
import json
import os
import subprocess
import sys
from inspect import Parameter
from pathlib import Path

import numpy as np
import pytest

from tokeff.data.sources import PROMPT_KINDS
from tokeff.decode.methods import prompt_lookup
from tokeff.errors import UserError
from tokeff.evals.ties import Cut, cut_of
from tokeff.listing import methods
from tokeff.models.config import Precision
from tokeff.models.load import load

FILE = Path(__file__).parents[1] / "experiments" / "lossless.py"
spec = importlib.util.spec_from_file_location("lossless_experiment", FILE)
assert spec is not None and spec.loader is not None
lossless = importlib.util.module_from_spec(spec)
__import__("sys").modules[spec.name] = lossless  # dataclasses look their module up
spec.loader.exec_module(lossless)


@pytest.mark.slow
def test_drafted_text_is_plain_text_on_a_sample(tmp_path):
    """A chain and a tree, on a prompt of each kind; in a process whose programs are optimised."""
    try:
        load("smollm2-135m", Precision())
    except UserError as e:
        pytest.skip(f"no model: {e}")
    some, out = ("PromptLookup", "TokenRecycling"), tmp_path / "lossless.json"
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, FILE, "--limit", "1", "--papers", "0", "--only", *some, "--out", out]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == len(PROMPT_KINDS), done.stderr[-500:]
    for name in some:
        v = lossless.verdict(rows, name)
        assert not v["cuts_above_margin"]
        assert v["cuts"] <= 1  # of 5: the 2% are for the whole set
        assert lossless.tokens_per_pass(rows, name) >= 1


@pytest.mark.core
def test_a_drafter_that_is_not_listed_is_refused():
    with pytest.raises(UserError, match="give some of PromptLookup"):
        lossless.drafters("smollm2-135m", only=["PromptLokup"])


@pytest.mark.core
def test_the_tie_rule_sees_every_difference():
    margin = np.array([1.0, 5e-4, 2.0])
    assert cut_of([1, 2, 3], [1, 2, 3], margin) is None
    assert cut_of([1, 9, 9], [1, 2, 3], margin) == Cut(1, 5e-4) and Cut(1, 5e-4).tie
    assert cut_of([1, 2], [1, 2, 3], margin) == Cut(2, 2.0) and not Cut(2, 2.0).tie
    assert cut_of([1, 2, 3, 4], [1, 2, 3], margin) == Cut(3, float("inf"))


@pytest.mark.core
def test_one_cut_in_sixty_passes_and_two_or_a_wide_one_fail():
    def rows(*margins):
        cuts = [{"at": 0, "margin": m} for m in margins] + [None] * (60 - len(margins))
        return [{"x": {"cut": cut}} for cut in cuts]

    assert [lossless.verdict(rows(*m), "x")["passed"] for m in ((), (1e-4,), (1e-4, 1e-4), (2e-3,))] == [True, True, False, False]


@pytest.mark.core
def test_an_interrupted_run_goes_on(tmp_path):
    path, facts = tmp_path / "rows.jsonl", {"new": 32}
    assert lossless.resumed(path, facts) == {}
    rows = [{"prompt": "prose 0", "x": 1}, {"prompt": "code 0"}, {"prompt": "prose 0", "x": 1, "y": 2}]
    with path.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows) + '{"prompt": "co')
    assert lossless.resumed(path, facts) == {"prose 0": rows[2], "code 0": rows[1]}
    assert path.read_text().endswith("}\n")
    with pytest.raises(UserError, match="another new; write to another file"):
        lossless.resumed(path, {"new": 16})
    assert lossless.resumed(path, facts)


@pytest.mark.core
def test_a_drafter_that_came_later_or_changed_is_measured_alone():
    old, new = prompt_lookup(), prompt_lookup(4)
    row = {"PromptLookup": {"settings": lossless.digest(old, "")}}
    assert lossless.missing(row, {"PromptLookup": old}) == {}
    assert lossless.missing(row, {"PromptLookup": new, "Other": old}) == {"PromptLookup": new, "Other": old}


@pytest.mark.core
def test_the_experiment_decodes_with_every_listed_lossless_drafter():
    listed = {m.name for m in methods() if m.part == "decode" and m.lossless and Parameter.empty not in m.settings().values()}
    assert set(lossless.drafters("smollm2-135m")) == listed
    paper = lossless.drafters("smollm2-135m", setting="paper")
    assert paper["TokenRecycling 80"].nodes == 81 and not set(paper) & listed


@pytest.mark.core
def test_the_committed_result_is_of_every_listed_lossless_drafter_and_passed():
    found = json.loads((FILE.parent / "results" / "lossless.json").read_text())
    listed = {m.name for m in methods() if m.part == "decode" and m.lossless}
    assert found["prompts"] == len(found["rows"]) == 200 and found["new"] == 32
    assert listed <= set(found["drafters"])
    for name, v in found["drafters"].items():
        rows = [row for row in found["rows"] if name in row]
        assert len(rows) == (200 if name in listed else 20)
        assert v["passed"] and lossless.verdict(rows, name)["passed"]
