"""The benchmark returns plain rows that a command line can print, and times ops beside ways that compute the same."""

import json

import jax
import pytest
from kernel_calls import assert_close
from kernel_ops import PUBLIC, SMALL, public

from tokeff.kernels import bench as bench_module
from tokeff.kernels.bench import OPS, bench
from tokeff.kernels.cases import Case
from tokeff.kernels.decode_attention import cases as decode_cases

pytestmark = pytest.mark.core

COLUMNS = {
    "op", "case", "implementation", "device", "ms", "dense_ms", "whole_ms", "floor_ms", "gb_per_s", "gflop_per_s",
    "of_floor", "speedup", "of_whole",
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    """Nothing here is timed for its own sake."""
    monkeypatch.setattr(bench_module, "beyond_cache", lambda: 2**20)


@pytest.mark.parametrize(("op", "M"), [("decode_attention", 0), ("decode_attention", 8), ("column_mass", 0)])
def test_rows_are_plain_and_consistent(op, M):
    case = Case("tiny", N=4, K=2, C=256, H=16, M=M, page_size=8 if M else 1)
    (row,) = bench(op, [case], repeats=2)
    assert set(row) == COLUMNS and json.loads(json.dumps(row)) == row
    assert row["case"] == "tiny" and row["implementation"] == "auto"
    assert row["ms"] > 0 and abs(row["speedup"] * row["ms"] - row["dense_ms"]) < 1e-9
    assert (row["of_whole"] is None) == (M == 0)  # a selection is timed beside the same op over all rows


def test_a_plain_way_that_does_not_fit_the_device_is_left_out(monkeypatch):
    def too_large(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setitem(OPS, "column_mass", (*OPS["column_mass"][:2], too_large, OPS["column_mass"][3]))
    (row,) = bench("column_mass", [Case("tiny", N=4, K=2, C=256, H=16)], repeats=1)
    assert row["dense_ms"] is None and row["speedup"] is None and row["ms"] > 0


def test_every_op_has_cases_for_cpus_and_accelerators():
    for op, (module, *_) in OPS.items():
        assert module.CPU and module.ACCELERATOR, op
    tenth = [case for case in decode_cases.CPU if case.C == 32768 and 0.09 < case.M * case.page_size / case.C < 0.11]
    assert tenth, "selected pages, a tenth of 32k"


@pytest.mark.parametrize("op", SMALL)
def test_the_plain_way_computes_the_same(op):
    case = SMALL[op][0]
    a = PUBLIC[op][1].arrays(case)
    positional, keys = PUBLIC[op][1].arguments(a)
    plain, ours = OPS[op][2](*positional, **keys, **case.options), public(op, case, a)
    plain = plain if isinstance(plain, tuple) else (plain,)  # textbook attention has no log-sum-exp
    assert_close(plain, ours[: len(plain)], "float32")


@pytest.mark.parametrize("op", ["block_sparse_prefill", "flash_prefill", "tree_attention"])
def test_operations_are_a_floor_too(op):
    case = Case("tiny", T=64, N=4, K=2, C=64, H=16, W=64, page_size=16, blocks=2, ascending=True)
    (row,) = bench(op, [case], repeats=1)
    assert set(row) == COLUMNS and row["gflop_per_s"] > 0 and row["floor_ms"] > 0


def test_unknown_op_is_named():
    with pytest.raises(ValueError, match="op 'attention' is unknown"):
        bench("attention")
