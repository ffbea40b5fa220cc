"""block_sparse_prefill: the definition, the XLA path, gradients, both kernels by interpretation, both real compilers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_calls import assert_close, params
from kernel_proofs import (
    GENERATIONS,
    TRITON,
    check_choice,
    check_gradients,
    check_kernel,
    compiled_for_tpu,
    exported,
    mesh,
    naive,
    refused,
    run,
)

from tokeff.compat import interpret_tpu, races_found
from tokeff.kernels import cases as kernel_cases
from tokeff.kernels.block_sparse_prefill import OP, block_sparse_prefill, cases, pallas_tpu
from tokeff.kernels.cases import Case

BLOCKS = Case("blocks", B=2, T=70, N=6, K=2, C=150, H=16, page_size=16, blocks=3, softcap=3.0, ascending=True)
ROWS = Case("blocks_rows", B=2, T=50, N=4, K=2, C=70, H=16, page_size=16, blocks=2, rows=9, ascending=True)
MANY = Case("many_rows", T=32, N=1, K=1, C=400, H=128, page_size=32, blocks=11, rows=140, window=90, ascending=True)
SMALL = Case("small", T=32, N=2, K=1, C=37, H=16, page_size=16, blocks=2, rows=3, ascending=True)
CASES = params((BLOCKS, ROWS)) + params((MANY,), ("bfloat16",))


def arrays_of(case, bad=np.nan):
    """A case with empty slots that hold NaN, a query that sees nothing, and a place without a row."""
    a = kernel_cases.arrays(case, empty=0.2, bad=bad)
    a["hi"] = a["hi"].at[-1, 1].set(-1)
    return a | ({"row": a["row"].at[0, 0, 1].set(-1)} if case.rows else {})


def call(case, a, **more):
    """(arrays in the order implementations take, static options); nothing is promised unless `more` says so."""
    options = cases.options(case) | {"first": None, "finite": False} | more
    return (*(a[name] for name in ("q", "k", "v", "order", "lo", "hi", "block")), a.get("row")), options


def attend(case, a, **more):
    positional, keys = cases.arguments(a)
    return block_sparse_prefill(*positional, **keys, **(cases.options(case) | {"first": None, "finite": False} | more))


@pytest.mark.core
@pytest.mark.parametrize("case", params((BLOCKS, ROWS)))
def test_reference_is_the_definition(case):
    a = arrays_of(case)
    order, lo, hi, block = (np.asarray(a[name]) for name in ("order", "lo", "hi", "block"))

    def see(b, t, head):
        read = np.isin(np.arange(case.C) // case.page_size, block[b, head, t // case.page_size])
        if case.rows:
            read |= np.isin(np.arange(case.C), np.asarray(a["row"])[b, head])
        return read & (order[b, head] >= lo[b, t]) & (order[b, head] <= hi[b, t])

    assert_close(run(OP, "reference", call(case, a)), naive(case, a, see), "float32")


@pytest.mark.core
@pytest.mark.parametrize("case", CASES)
def test_xla_equals_reference(case):
    made = call(case, arrays_of(case))
    assert_close(run(OP, "xla", made), run(OP, "reference", made), case.dtype)


@pytest.mark.core
@pytest.mark.parametrize(("T", "C", "size", "blocks", "rows"), [(1, 1, 1, 1, 0), (7, 11, 3, 2, 4), (9, 9, 5, 4, 1)], ids=str)
def test_awkward_shapes(T, C, size, blocks, rows):
    case = Case("odd", B=1, T=T, N=3, K=1, C=C, H=5, page_size=size, blocks=blocks, rows=rows, ascending=True)
    made = call(case, kernel_cases.arrays(case))
    assert_close(run(OP, "xla", made), run(OP, "reference", made), "float32")


@pytest.mark.core
def test_promises_change_nothing():
    case = Case("aligned", T=88, N=2, K=1, C=104, H=8, page_size=8, blocks=4, rows=3, ascending=True)
    a = kernel_cases.arrays(case)
    promised = attend(case, a, first=16, finite=True)
    assert_close(promised, run(OP, "reference", call(case, a)), "float32")
    assert all((x == y).all() for x, y in zip(promised, attend(case, a, first=16, finite=True)))


@pytest.mark.core
def test_gradients_equal_the_references():
    arrays, options = call(ROWS, arrays_of(ROWS))

    def public(q, k, v):
        return attend(ROWS, arrays_of(ROWS) | {"q": q, "k": k, "v": v})

    check_gradients(public, lambda *floats: OP.run["reference"](*floats, *arrays[3:], **options), arrays[:3])


@pytest.mark.interp
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["pallas_tpu", "pallas_gpu"])
def test_kernels_equal_reference(case, name):
    check_kernel(OP, name, call(case, arrays_of(case)), case.dtype)


@pytest.mark.interp
def test_tpu_kernel_has_no_races_and_stays_in_bounds():
    check_kernel(OP, "pallas_tpu", call(SMALL, arrays_of(SMALL)), "float32", interpret_tpu())
    assert not races_found()


@pytest.mark.interp
@pytest.mark.parametrize("name", ["xla", "pallas_tpu", "pallas_gpu"])
def test_what_was_not_chosen_is_not_read(name):
    """NaN in every row that nobody chose changes nothing although all rows are said to be finite: skipped, not masked."""
    case = Case("skipped", T=48, N=2, K=1, C=160, H=16, page_size=16, blocks=2, rows=3, ascending=True)
    a = kernel_cases.arrays(case)
    read = jnp.isin(jnp.arange(case.C) // case.page_size, a["block"]) | jnp.isin(jnp.arange(case.C), a["row"])
    assert not read.all()
    spoiled = a | {name: jnp.where(read[:, None], a[name], jnp.nan) for name in ("k", "v")}
    how = {} if name == "xla" else {"interpret": True}
    clean, poisoned = (run(OP, name, call(case, x, finite=True), **how) for x in (a, spoiled))
    for x, y in zip(clean, poisoned):
        np.testing.assert_array_equal(x, y)


@pytest.mark.interp
def test_lists_too_long_for_scalar_memory_are_cut(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "MAX_TABLE", 6)
    case = Case("long", T=64, N=1, K=1, C=64, H=16, page_size=16, blocks=3, ascending=True)
    made = call(case, arrays_of(case))
    assert pallas_tpu._calls(made[0][6], None) == 2
    check_kernel(OP, "pallas_tpu", made, "float32")
    many = dataclasses.replace(case, blocks=1, rows=130, C=192)  # two lane tiles of single rows for each of four blocks of queries
    rows = call(many, arrays_of(many))
    assert pallas_tpu._calls(rows[0][6], None) == 1 and pallas_tpu._calls(rows[0][6], rows[0][7]) == 2
    check_kernel(OP, "pallas_tpu", rows, "float32")
    monkeypatch.setattr(pallas_tpu, "MAX_CALLS", 1)
    assert "entries of scalar memory" in refused(OP, "pallas_tpu", made)


@pytest.mark.core
def test_shards_of_the_rows_merge():
    case = Case("mesh", B=2, T=32, N=4, K=2, C=64, H=16, page_size=8, blocks=3, rows=5, ascending=True)
    a = kernel_cases.arrays(case)
    there = jax.jit(lambda a: attend(case, a, first=32, mesh=mesh(2, 2, 2)))(a)
    assert_close(there, run(OP, "reference", call(case, a)), "float32")


@pytest.mark.core
def test_what_cannot_be_done_is_said_in_one_line():
    def structs(**more):
        case = Case(**{"name": "refused", "T": 64, "N": 4, "K": 2, "C": 64, "H": 16, "page_size": 16, "blocks": 2} | more)
        return case, kernel_cases.structs(case)

    case, a = structs(page_size=4)
    assert "size 4 is not a multiple of 8" in refused(OP, "pallas_tpu", call(case, a))
    case, a = structs(page_size=640, T=640, C=640)
    assert "1280 query rows a block exceed 1024" in refused(OP, "pallas_tpu", call(case, a))
    case, a = structs(H=24)
    assert "head size 24 in float32 is not one of" in refused(OP, "pallas_gpu", call(case, a))
    with pytest.raises(ValueError, match="must be \\(B, K, Q, at least 1\\)"):
        jax.eval_shape(lambda a: attend(case, a | {"block": a["block"][:, :, 1:]}), a)


@pytest.mark.aot
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("case", cases.ACCELERATOR[2:], ids=lambda case: case.name)
def test_tpu_kernel_compiles(case, generation):
    assert "tpu_custom_call" in compiled_for_tpu(cases, block_sparse_prefill, case, generation)


@pytest.mark.aot
@pytest.mark.parametrize("case", cases.ACCELERATOR[1:3], ids=lambda case: case.name)
def test_gpu_kernel_lowers(case):
    assert TRITON in exported(cases, block_sparse_prefill, case, "cuda", "pallas_gpu")


@pytest.mark.aot
def test_automatic_choice_follows_the_platform_compiled_for():
    check_choice(cases, block_sparse_prefill, Case("choice", T=64, N=2, K=1, C=64, H=16, page_size=16, blocks=2, rows=3, ascending=True))
