"""The benchmark returns plain rows that a command line can print."""

import json

import pytest

from tokeff.kernels.bench import bench
from tokeff.kernels.cases import Case

pytestmark = pytest.mark.core

COLUMNS = {"op", "case", "implementation", "device", "ms", "dense_ms", "floor_ms", "gb_per_s", "gflop_per_s", "of_floor", "speedup"}


@pytest.mark.parametrize(("op", "M"), [("decode_attention", 0), ("decode_attention", 8), ("column_mass", 0)])
def test_rows_are_plain_and_consistent(op, M):
    case = Case("tiny", N=4, K=2, C=256, H=16, M=M, page_size=8 if M else 1)
    (row,) = bench(op, [case], repeats=2)
    assert set(row) == COLUMNS and json.loads(json.dumps(row)) == row
    assert row["case"] == "tiny" and row["implementation"] == "auto"
    assert row["ms"] > 0 and abs(row["speedup"] * row["ms"] - row["dense_ms"]) < 1e-9


@pytest.mark.parametrize("op", ["block_sparse_prefill", "flash_prefill", "tree_attention"])
def test_operations_are_a_floor_too(op):
    case = Case("tiny", T=64, N=4, K=2, C=64, H=16, W=64, page_size=16, blocks=2, ascending=True)
    (row,) = bench(op, [case], repeats=1)
    assert set(row) == COLUMNS and row["gflop_per_s"] > 0 and row["floor_ms"] > 0


def test_unknown_op_is_named():
    with pytest.raises(ValueError, match="op 'attention' is unknown"):
        bench("attention")
