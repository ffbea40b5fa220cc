"""Drafting changes no token of SmolLM2's greedy text: a sample of what experiments/lossless.py proves on all prompts."""

import importlib.util
import json
from pathlib import Path

import pytest

from tokeff.data.sources import PROMPT_KINDS, prompts
from tokeff.errors import UserError
from tokeff.models.config import Precision
from tokeff.models.load import load

FILE = Path(__file__).parents[1] / "experiments" / "lossless.py"
spec = importlib.util.spec_from_file_location("lossless_experiment", FILE)
assert spec is not None and spec.loader is not None
lossless = importlib.util.module_from_spec(spec)
__import__("sys").modules[spec.name] = lossless  # dataclasses look their module up
spec.loader.exec_module(lossless)


@pytest.mark.slow
def test_drafted_text_is_plain_text_on_a_sample():
    try:
        m = load("smollm2-135m", Precision())
    except UserError as e:
        pytest.skip(f"no model: {e}")
    rows = [lossless.measure(m, prompts(kind)[1], 32) for kind in PROMPT_KINDS]
    for name in lossless.DRAFTED:
        v = lossless.verdict(rows, name)
        print(name, {k: s for k, s in v.items() if k != "speed"}, lossless.speed(rows, name))
        assert not v["cuts_above_margin"]
        assert v["cuts"] <= 1  # of 4: the 2% are for the whole set
        assert lossless.speed(rows, name)["tokens_per_pass"] >= 1


@pytest.mark.core
def test_the_tie_rule_sees_every_difference():
    margin = lossless.np.array([1.0, 5e-4, 2.0])
    assert lossless.cut_of([1, 2, 3], [1, 2, 3], margin) is None
    assert lossless.cut_of([1, 9, 9], [1, 2, 3], margin) == lossless.Cut(1, 5e-4)
    assert lossless.cut_of([1, 2], [1, 2, 3], margin) == lossless.Cut(2, 2.0)
    assert lossless.cut_of([1, 2, 3, 4], [1, 2, 3], margin) == lossless.Cut(3, float("inf"))


@pytest.mark.core
def test_one_cut_in_sixty_passes_and_two_or_a_wide_one_fail():
    def rows(*margins):
        cuts = [{"at": 0, "margin": m} for m in margins] + [None] * (60 - len(margins))
        return [{"x": {"cut": cut, "same_again": True}} for cut in cuts]

    assert [lossless.verdict(rows(*m), "x")["passed"] for m in ((), (1e-4,), (1e-4, 1e-4), (2e-3,))] == [True, True, False, False]


@pytest.mark.core
def test_an_interrupted_run_goes_on(tmp_path):
    path, facts = tmp_path / "rows.jsonl", {"new": 32}
    assert lossless.resumed(path, facts) == []
    with path.open("a") as file:
        file.write(json.dumps({"kind": "prose"}) + "\n" + '{"kind": "co')
    assert lossless.resumed(path, facts) == [{"kind": "prose"}]
    assert path.read_text().endswith("}\n")
    assert lossless.resumed(path, {"new": 16}) == []


@pytest.mark.core
def test_the_committed_result_passed():
    file = FILE.parent / "results" / "lossless.json"
    found = json.loads(file.read_text())
    assert found["prompts"] >= 50 and {row["kind"] for row in found["rows"]} == set(PROMPT_KINDS)
    for name in lossless.DRAFTED:
        assert found[name]["passed"] and lossless.verdict(found["rows"], name)["passed"]
