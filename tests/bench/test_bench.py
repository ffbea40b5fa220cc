"""The benchmarks on a tiny model: what their rows hold, how they are saved, what they refuse."""

import json
import math

import pytest
from tiny import CFG, params

from tokeff import cli
from tokeff.bench import common, decode, kernels, patterns, prefill, verify_cost
from tokeff.errors import UserError
from tokeff.kernels.bench import OPS
from tokeff.models.config import Precision
from tokeff.models.load import Model

pytestmark = pytest.mark.core
SMALL = 2**20


@pytest.fixture(scope="module")
def tiny():
    return Model(CFG, params(), None, Precision(), "tiny")


def check(rows, fields, *, none=()):
    """Every row has these fields, in JSON types, and its numbers are positive; `none` are the fields without a value."""
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    for row in rows:
        assert set(row) >= set(fields)
        for name, value in row.items():
            assert (value is None) == (name in none), name
            if isinstance(value, float) and not name.endswith("_adds"):
                assert math.isfinite(value) and value > 0, name


def test_decode_rows(tiny):
    rows = decode.rows(tiny, (64,), ("Full", "SnapKV", "H2O"), budget=0.5, tokens=4, rounds=2, nbytes=SMALL)
    assert [row["method"] for row in rows] == ["Full", "SnapKV", "H2O"]
    check(
        rows, ("tokens_per_s", "floor_tokens_per_s", "of_floor", "of_dense"), none=("of_transformers", "transformers_tokens_per_s")
    )
    assert rows[0]["of_dense"] == 1
    assert rows[1]["cache_read_mb"] < rows[0]["cache_read_mb"]
    for row in rows:
        whole = (row["cache_read_mb"] + row["weights_mb"]) * 1e6
        assert row["floor_tokens_per_s"] == pytest.approx(row["bandwidth_gb_per_s"] * 1e9 / whole)


def test_weights_that_are_only_looked_up_are_not_read(tiny):
    assert not CFG.tied
    whole = sum(x.nbytes for x in (tiny.params.norm_D, tiny.params.head_VD)) + CFG.L * sum(
        x.nbytes for x in vars(tiny.params.blocks[0]).values() if x is not None
    )
    assert common.weight_bytes(tiny) == whole


def test_decode_takes_turns_with_a_peer(tiny):
    asked = []

    class Other:
        def decode(self, context, tokens):
            asked.append((context, tokens))
            return 8.0

    (row,) = decode.rows(tiny, (64,), ("Full",), tokens=4, rounds=2, nbytes=SMALL, other=Other())
    assert asked == [(59, 4)] * 3  # the context ends at 64, and the first turn is not counted
    assert row["transformers_tokens_per_s"] == 0.5
    assert row["of_transformers"] > 1


def test_prefill_rows(tiny):
    rows = prefill.rows(tiny, (32,), rounds=1)
    check(rows, ("seconds", "window_adds", "mass_of_attention"), none=("of_transformers", "transformers_seconds"))


def test_verify_cost_rows(tiny):
    rows = verify_cost.rows(tiny, (64,), (1, 4), passes=3, rounds=2, nbytes=SMALL)
    check(rows, ("rows", "ms_per_pass", "of_one_row"))
    assert [(row["rows"], row["of_one_row"] == 1) for row in rows] == [(1, True), (4, False)]


def test_kernel_rows():
    name = min(OPS["column_mass"][0].CASES, key=OPS["column_mass"][0].floor_bytes).name
    (row,) = kernels.rows(["column_mass", "decode_attention"], [name], rounds=1)
    assert (row["op"], row["case"]) == ("column_mass", name)


def test_interleaving_gives_every_timer_every_turn():
    order = []
    timers = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    seconds = common.interleave(timers, 3)
    assert seconds == {name: [1.0] * 3 for name in "abc"}
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"


def test_results_are_merged_by_name_and_appear_whole(tmp_path, monkeypatch):
    path = common.save(tmp_path, "decode", [{"a": 1}], ["--rounds", "1"])
    common.save(tmp_path, "prefill", [{"b": 2}], [])
    common.save(tmp_path, "decode", [{"a": 3}], [])
    found = json.loads(path.read_text())
    assert {name: part["rows"] for name, part in found.items()} == {"decode": [{"a": 3}], "prefill": [{"b": 2}]}
    assert found["decode"]["environment"]["command"] == "tokeff bench decode"
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        common.save(tmp_path, "decode", [{"a": math.nan}], [])
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        common.save(tmp_path, "decode", [{"a": 4}], [])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["decode", "--methods", "SnapKW"], "did you mean 'SnapKV'"),
        (["decode", "--rounds", "0"], "at least 1"),
        (["decode", "--contexts", "many"], "'many'"),
        (["decode", "--contexts", "20"], "use more than 32"),
        (["decode", "--round", "3"], "unrecognized arguments"),
        (["verify-cost", "--widths", "-1"], "'-1'"),
        (["prefill", "--model", "smollm3"], "did you mean 'smollm2-135m'"),
        (["patterns", "--methods", "AShap"], "did you mean 'AShape'"),
        (["kernels", "--ops", "attention"], "no op 'attention'"),
        (["kernels", "--cases", "smol_2"], "no case 'smol_2'"),
        (["kernels", "--implementation", "cuda", "--cases", "smol_2k"], "cuda"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(args, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", *args]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and words in err
    assert not list(tmp_path.rglob("*.json"))


def test_folder_that_cannot_be_used_is_refused_first(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        common.check_out(tmp_path / "file")
    common.path_of(tmp_path).write_text("{half")
    with pytest.raises(UserError, match="damaged"):
        common.check_out(tmp_path)


def test_contexts_longer_than_the_model_are_refused(tiny, monkeypatch):
    monkeypatch.setattr(common, "load", lambda source: tiny)
    with pytest.raises(UserError, match="reads 256 tokens"):
        common.open_model("tiny", (64, 512))


def test_sparse_prefills_take_turns_with_a_dense_one(tiny, monkeypatch):
    monkeypatch.setattr(patterns, "text", lambda m, context: [(7 * i) % CFG.V for i in range(context)])
    rows = patterns.rows(tiny, (64, 128), ("AShape", "BlockTopK"), rounds=1)
    assert [(row["method"], row["context"]) for row in rows] == [(name, n) for n in (64, 128) for name in ("AShape", "BlockTopK")]
    for row in rows:
        assert row["of_dense"] == pytest.approx(row["dense_seconds"] / row["seconds"]) and 0 < row["prompt_read"] <= 1


def test_a_sparse_prefill_pays_from_the_length_on_that_it_is_faster_at():
    def of(*ratios):
        return patterns.pays_from([{"context": 2**i, "of_dense": x} for i, x in enumerate(ratios)])

    assert [of(1.1, 1.2), of(0.9, 1.2), of(1.1, 0.9), of(1.1, 0.9, 1.2)] == ["always", "2", "never", "4"]
