"""Where a method starts to pay is read off two lengths; a run measures, resumes and reports."""

import jax
import numpy as np
import pytest
import runs
import tiny

from tokeff import experiment
from tokeff.bench.decode import Loop, rows_of
from tokeff.decode.methods import prompt_lookup
from tokeff.errors import UserError
from tokeff.evals import crossover
from tokeff.evals.comparison import Line, line
from tokeff.evals.crossover import Crossover, pays_from
from tokeff.generation import Setup
from tokeff.kv import methods as kv
from tokeff.kv.extend import pack
from tokeff.models.config import Precision
from tokeff.models.load import Model
from tokeff.report.run import run

pytestmark = pytest.mark.core


def at(context, dense, step):
    return {"context": context, "dense_ms": dense, "step_ms": step}


@pytest.mark.parametrize(
    ("short", "long", "found"),
    [
        (at(1000, 10, 12), at(5000, 30, 16), "1500"),  # 2 ms slower at 1k, 14 ms faster at 5k: level an eighth of the way
        (at(1000, 10, 9), at(5000, 30, 16), "always"),
        (at(1000, 10, 9), at(5000, 10, 9), "always"),
        (at(1000, 10, 12), at(5000, 30, 34), "never"),
        (at(1000, 10, 11), at(5000, 30, 30.999), ">5000"),  # on a line to 4 million, which two lengths cannot tell
        (at(1000, 10, 9), at(5000, 30, 33), "below 2000"),
    ],
)
def test_straight_lines_meet(short, long, found):
    assert pays_from(short, long) == found


def test_rounds_that_disagree_are_level():
    wide, sure = {"rounds": [0.9, 1.1]}, {"rounds": [1.1, 1.2]}
    assert pays_from(at(1000, 10, 9) | wide, at(5000, 30, 29) | wide) == crossover.LEVEL
    assert pays_from(at(1000, 10, 9) | wide, at(5000, 30, 16) | sure) == "always"


@pytest.mark.parametrize("name", tiny.sampled(runs.listed("kv"), ("SentenceKV", "KVzip", "ExpectedAttention")))
def test_every_policy_packs_random_rows(name):
    """Whatever it wants to know of them; telling a prompt again does not come into it, however long it is."""
    m, policy = Model(tiny.CFG, tiny.params(), None, Precision("float32", "float32", "float32"), "tiny"), runs.part(name)["kv"]
    policy = policy.fit(m)
    layers = pack(policy, rows_of(m, policy, 60), Setup(policy).room(4), m.cfg)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(layers) if x.dtype == np.float32)


def test_a_context_as_long_as_the_model_reads_is_timed():
    m = Model(tiny.CFG, tiny.params(), None, Precision("float32", "float32", "float32"), "tiny")
    assert Loop(m, runs.part("KVzip")["kv"], tiny.CFG.max_len, 2)() > 0


def test_a_run_times_and_reports(tmp_path, monkeypatch):
    """On the tiny model: figures are there and consistent; a second run measures nothing again, and may bring more rows."""
    m = Model(tiny.CFG, tiny.params(), None, Precision("float32", "float32", "float32"), "tiny")
    monkeypatch.setattr(crossover, "load", lambda name: m)
    monkeypatch.setattr(crossover.common, "reads", dict)
    monkeypatch.setattr(crossover.common, "bandwidth", lambda seconds: 1e9)
    rows = (Line("Full"), Line("SnapKV", kv=kv.snapkv(0.25, window=6)))
    board = Crossover("speed", rows, contexts=(64, 128), tokens=4, rounds=2)
    folder = run(experiment.Config(board, tmp_path / "speed.py", ""), tmp_path / "out")
    found = folder.rows()
    assert [row["key"] for row in found] == ["Full/64", "SnapKV/64", "Full/128", "SnapKV/128"]
    for row in found:
        assert row["step_ms"] > 0 and row["decode_tok_s"] == pytest.approx(1e3 / row["step_ms"])
    assert found[3]["read"] < 0.5 < found[2]["read"]
    assert "pays from" in (tmp_path / "out" / "table.md").read_text()
    more = Crossover("speed", (*rows, Line("Recent", kv=kv.recent_rows(0.25))), contexts=(64, 128), tokens=4, rounds=2)
    again = run(experiment.Config(more, tmp_path / "speed.py", ""), tmp_path / "out").rows()
    assert again[:4] == found and [row["key"] for row in again[4:]] == ["Recent/64", "Recent/128"]


def test_what_cannot_be_timed_is_refused():
    with pytest.raises(UserError, match="two lengths"):
        Crossover("speed", (line("Full"),), contexts=(64,)).check()
    with pytest.raises(UserError, match="acts on the prompt"):
        Crossover("speed", (line("GemFilter"),)).check()
    for row in (Line("Full", decode=prompt_lookup()), Line("SnapKV", kv=kv.snapkv(0.25), bounded=64)):
        with pytest.raises(UserError, match="leave out bounded and decode"):
            Crossover("speed", (row,)).check()
