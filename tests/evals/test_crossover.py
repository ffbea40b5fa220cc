"""Where a method starts to pay is read off two lengths; a run measures, resumes and reports."""

import pytest
import tiny

from tokeff import experiment
from tokeff.decode.methods import prompt_lookup
from tokeff.errors import UserError
from tokeff.evals import crossover
from tokeff.evals.comparison import Line, line
from tokeff.evals.crossover import Crossover, pays_from
from tokeff.kv import methods as kv
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
