"""The comparison with kvpress: what its rows hold with a stand-in, and with kvpress itself on a tiny model."""

import json
import math

import pytest
from tiny import CFG, params

from tokeff import cli
from tokeff.bench import presses
from tokeff.bench.peer import peer, peers_python
from tokeff.kv import methods as kv
from tokeff.models.config import Precision
from tokeff.models.load import Model


def tiny():
    return Model(CFG, params(), None, Precision(), "tiny")


def check(rows, names):
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows and [row["method"] for row in rows] == names
    for row in rows:
        assert set(row) >= set(presses.SHOWN)
        assert all(math.isfinite(x) and x > 0 for x in row.values() if isinstance(x, float))


@pytest.mark.core
def test_rows_take_turns_with_a_stand_in():
    asked = []

    class Other:
        def ask(self, **request):
            asked.append(request)
            return 8.0

    found = presses.rows(tiny(), Other(), (64,), ["SnapKV", "TOVA"], budget=0.5, tokens=4, rounds=2)
    check(found, ["SnapKV", "TOVA"])
    press = ["SnapKVPress", {"compression_ratio": 0.5, "window_size": 16, "kernel_size": 5}]
    assert asked.count({"do": "prefill", "press": press, "context": 64}) == 3  # the first turn is not counted
    assert asked.count({"do": "decode", "press": press, "context": 59, "tokens": 4}) == 3 and len(asked) == 12
    for row in found:
        assert row["kvpress_seconds"] == 8.0 and row["kvpress_tokens_per_s"] == 0.5
        assert row["prefill_of_kvpress"] > 1 and row["decode_of_kvpress"] > 1


@pytest.mark.core
def test_pairs_are_one_method():
    """Nothing leaves while decoding, and their settings are ours."""
    assert presses.pair("TOVA", 0.25) == (kv.tova(0.25, evict=0), ["TOVAPress", {"compression_ratio": 0.75}])
    policy, (_, theirs) = presses.pair("ExpectedAttention", 0.5)
    assert theirs == {"compression_ratio": 0.5, "n_future_positions": 512, "n_sink": 4, "epsilon": 0.0}
    assert policy == kv.expected_attention(0.5, 512, 4, 0.0)


@pytest.mark.core
@pytest.mark.parametrize(
    ("args", "words"), [(["--methods", "SnapKW"], "did you mean 'SnapKV'"), (["--rounds", "0"], "at least 1"), (["--no-peer"], "--no-peer")]
)
def test_bad_arguments_are_one_line_and_exit_2(args, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "presses", *args]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and words in err and not list(tmp_path.rglob("*.json"))


@pytest.mark.core
def test_without_the_other_library_it_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKEFF_PEERS_PYTHON", str(tmp_path / "none"))
    assert cli.main(["bench", "presses"]) == 2
    assert "make peers" in capsys.readouterr().err


@pytest.mark.peers
def test_kvpress_answers():
    """Every press that is timed runs, twice from one compressed cache."""
    if peers_python() is None:
        pytest.skip("no peers environment: make peers, or set TOKEFF_PEERS_PYTHON")
    m, names = tiny(), list(presses.PRESSES)
    with peer(m, script=presses.SCRIPT) as other:
        check(presses.rows(m, other, (96,), names, budget=0.5, tokens=4, rounds=1), names)
