"""tree_attention: the definition, the XLA path, gradients, both kernels by interpretation, both real compilers."""

import jax
import numpy as np
import pytest
from kernel_calls import assert_close, params, ragged
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
from tokeff.kernels import decode_attention
from tokeff.kernels.cases import Case
from tokeff.kernels.tree_attention import OP, cases, tree_attention

TREE = Case("tree", B=2, T=7, N=6, K=2, C=37, H=16, W=7, softcap=3.0)
PART = Case("part", T=3, N=4, K=2, C=1100, H=16, W=37)  # some rows of a wide draft, and several blocks of slots
WIDE = Case("wide", T=4, N=2, K=1, C=90, H=128, W=4)
TILES = Case("tiles", T=70, N=2, K=1, C=90, H=16, W=70)  # more query rows than one program holds on a GPU
CASES = params((TREE, PART)) + params((TILES,), ("float32",)) + params((WIDE,), ("bfloat16",))


def arrays_of(case):
    """A ragged case; draft rows that nobody descends from hold NaN, and one query sees nothing of the draft."""
    a = ragged(case)
    a["among"] = a["among"].at[:, -1].set(False).at[:, :, case.W - 1].set(False)
    return a | {name: a[name].at[:, :, case.W - 1].set(np.nan) for name in ("k_draft", "v_draft")}


def call(case, a):
    """(arrays in the order implementations take, static options)."""
    names = ("q", "k", "v", "k_draft", "v_draft", "order", "lo", "hi", "among")
    return tuple(a[name] for name in names), cases.options(case) | {"finite": False}


def attend(case, a, **more):
    positional, _ = cases.arguments(a)
    return tree_attention(*positional, **(cases.options(case) | {"finite": False} | more))


@pytest.mark.core
def test_reference_is_the_definition():
    a = arrays_of(TREE)
    order, lo, hi, among = (np.asarray(a[name]) for name in ("order", "lo", "hi", "among"))

    def see(b, t, head):
        return np.append((order[b, head] >= lo[b, t]) & (order[b, head] <= hi[b, t]), among[b, t])

    rows = (np.concatenate([a[name], a[f"{name}_draft"]], axis=2) for name in ("k", "v"))
    assert_close(run(OP, "reference", call(TREE, a)), naive(TREE, a, see, *rows), "float32")


@pytest.mark.core
@pytest.mark.parametrize("case", CASES)
def test_xla_equals_reference(case):
    made = call(case, arrays_of(case))
    assert_close(run(OP, "xla", made), run(OP, "reference", made), case.dtype)


@pytest.mark.core
@pytest.mark.parametrize(("T", "W", "C", "G"), [(1, 1, 1, 1), (2, 5, 3, 3), (9, 9, 2, 1)], ids=str)
def test_awkward_shapes(T, W, C, G):
    case = Case("odd", T=T, W=W, C=C, N=G, K=1, H=5)
    made = call(case, ragged(case))
    assert_close(run(OP, "xla", made), run(OP, "reference", made), "float32")


@pytest.mark.core
def test_a_chain_is_causal_attention_over_text_and_draft():
    """A draft without branches, whose rows are stored instead, is what decode_attention sees."""
    case = Case("chain", T=5, N=2, K=1, C=30, H=16, W=5, ascending=True)
    a = kernel_cases.arrays(case)
    a["among"] = np.tril(np.ones((1, 5, 5), bool))
    stored = decode_attention(a["q"], a["k"], a["v"], a["order"], a["lo"], a["hi"], **case.options)
    a |= {"k_draft": a["k"][:, :, -5:], "v_draft": a["v"][:, :, -5:]}
    rows = {name: a[name][:, :, :-5] for name in ("k", "v", "order")} | {"hi": np.full_like(a["hi"], 24)}
    first, again = (attend(case, a | rows) for _ in range(2))
    assert_close(first, stored, "float32")
    assert all((x == y).all() for x, y in zip(first, again))


@pytest.mark.core
def test_gradients_equal_the_references():
    arrays, options = call(TREE, arrays_of(TREE))
    names = ("q", "k", "v", "k_draft", "v_draft")

    def public(*floats):
        return attend(TREE, arrays_of(TREE) | dict(zip(names, floats)))

    check_gradients(public, lambda *floats: OP.run["reference"](*floats, *arrays[5:], **options), arrays[:5])


@pytest.mark.interp
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["pallas_tpu", "pallas_gpu"])
def test_kernels_equal_reference(case, name):
    check_kernel(OP, name, call(case, arrays_of(case)), case.dtype)


@pytest.mark.interp
def test_tpu_kernel_has_no_races_and_stays_in_bounds():
    check_kernel(OP, "pallas_tpu", call(TREE, arrays_of(TREE)), "float32", interpret_tpu())
    assert not races_found()


@pytest.mark.core
def test_shards_of_the_cache_count_the_draft_once():
    case = Case("mesh", B=2, T=4, N=4, K=2, C=32, H=16, W=4)
    a = ragged(case)
    there = jax.jit(lambda a: attend(case, a, mesh=mesh(2, 2, 2)))(a)
    assert_close(there, run(OP, "reference", call(case, a)), "float32")


@pytest.mark.core
def test_what_cannot_be_done_is_said_in_one_line():
    def structs(**more):
        return kernel_cases.structs(Case(**{"name": "refused", "T": 8, "N": 4, "K": 2, "C": 64, "H": 16, "W": 8} | more))

    assert "1200 query rows a kv head exceed 1024" in refused(OP, "pallas_tpu", call(TREE, structs(T=600)))
    assert "a draft of 600 rows exceeds 512" in refused(OP, "pallas_tpu", call(TREE, structs(W=600)))
    assert "head size 24 in float32 is not one of" in refused(OP, "pallas_gpu", call(TREE, structs(H=24)))
    mixed = structs(dtype="bfloat16")
    mixed |= {name: jax.ShapeDtypeStruct(mixed[name].shape, "float32") for name in ("k_draft", "v_draft")}
    assert "must be of the cache's dtype" in refused(OP, "pallas_gpu", call(TREE, mixed))
    with pytest.raises(ValueError, match="are not BKWH, BKWH and BTW"):
        jax.eval_shape(lambda a: attend(TREE, a | {"among": a["among"][:, 1:]}), structs())


@pytest.mark.aot
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("case", cases.ACCELERATOR[::2], ids=lambda case: case.name)
def test_tpu_kernel_compiles(case, generation):
    """K and V of the cache go into the kernel as they are stored: no copy to another layout."""
    text = compiled_for_tpu(cases, tree_attention, case, generation)
    assert "tpu_custom_call" in text
    cache = f"[{case.B},{case.K},{case.C},{case.H}]"
    assert not [line for line in text.splitlines() if cache in line.split(" copy(")[0] and " copy(" in line]


@pytest.mark.aot
@pytest.mark.parametrize("case", cases.ACCELERATOR[:3], ids=lambda case: case.name)
def test_gpu_kernel_lowers(case):
    assert TRITON in exported(cases, tree_attention, case, "cuda", "pallas_gpu")


@pytest.mark.aot
def test_automatic_choice_follows_the_platform_compiled_for():
    check_choice(cases, tree_attention, Case("choice", T=8, N=2, K=1, C=64, H=16, W=8))
