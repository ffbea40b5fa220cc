"""What every op of kernel_ops.py must show: each implementation against the definition, by interpretation and by the real compilers."""

import dataclasses
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import kernel_ops
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding
from kernel_calls import assert_close
from kernel_ops import OPS, PUBLIC, SMALL, both, internal, naive, poisoned, public, structs
from kernel_proofs import TRITON, tpus

from tokeff.collectives import collectives
from tokeff.compat import interpret_tpu, races_found
from tokeff.kernels.bench import bench
from tokeff.kernels.lowrank_scores.pallas_tpu import cos_sin

BF16 = ("int4", "mean_wide", "rows", "tree", "blocks")  # cases whose TPU kernel also runs in bfloat16, where tiles are others
PLAIN = ("tree", "groups", "all")  # those that plain interpretation and their neighbours cover; races take some ten times longer
STORED = {"quant_decode": "k", "page_scores": "low", "compact_rows": "k", "shared_prefix": "k"}  # the largest array of each
quiet = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")  # of programs for TPUs that are not here


FIRST = [cases[0] for cases in SMALL.values()]


def small(dtypes=both):
    return [pytest.param(op, case, id=f"{op}-{case.name}-{case.dtype}") for op in OPS for c in SMALL[op] for case in dtypes(c)]


def in_turn(case):
    """One dtype: float32 for the first case of an op, bfloat16 for the others."""
    return both(case)[:1] if case in FIRST else both(case)[-1:]


def real(*generations):
    """The first real shape of each op, on every generation of TPU, and the last one on the first generation. v5p is long proof."""
    found = [(op, at, *on) for op in OPS for at, on in (*((0, on) for on in generations), (-1, generations[0]))]
    proof = {True: pytest.mark.proof, False: ()}
    return [
        pytest.param(op, (case := PUBLIC[op][1].ACCELERATOR[at]), *on, id="-".join((op, case.name, *on)), marks=proof["v5p" in on])
        for op, at, *on in found
    ]


def assert_same(got, again):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))  # numpy knows no NaN of bfloat16


@pytest.mark.core
@pytest.mark.parametrize(("op", "case"), small(lambda case: [case]))
def test_reference_is_the_definition(op, case):
    a = poisoned(op, case)
    got, want = public(op, case, a, "reference"), naive(op, case, a)
    assert_close(got, tuple(want), "float32")


@pytest.mark.core
@pytest.mark.parametrize(("op", "case"), small(lambda case: both(case)[: 2 if case in FIRST else 1]))
def test_xla_equals_reference_and_repeats_bit_for_bit(op, case):
    a = poisoned(op, case)
    got = public(op, case, a, "xla")
    assert_close(got, public(op, case, a, "reference"), case.dtype)
    assert_same(got, public(op, case, a))  # the automatic choice on CPU, and a second run


def check_kernel(op, case, which, interpret):
    """Run a kernel twice on a poisoned call: equal to the definition, and to itself bit for bit."""
    spec, arrays, options = internal(op, case, poisoned(op, case))
    assert spec.refusal[which](*arrays, **options) is None
    run = jax.jit(partial(spec.run[which], interpret=interpret, **options))
    got = run(*arrays)
    assert_same(got, run(*arrays))
    want = jax.jit(partial(spec.run["reference"], **options))(*arrays)
    assert_close(*(x if isinstance(x, tuple) else (x,) for x in (got, want)), case.dtype)


@pytest.mark.interp
@pytest.mark.parametrize(("op", "case"), small(in_turn))
def test_gpu_kernel(op, case):
    check_kernel(op, case, "pallas_gpu", True)


@pytest.mark.interp
@pytest.mark.parametrize(("op", "case"), [p for p in small(lambda case: both(case)[1:]) if p.values[1].name in BF16])
def test_tpu_kernel_in_bfloat16(op, case):
    check_kernel(op, case, "pallas_tpu", True)


@pytest.mark.interp
@pytest.mark.parametrize(("op", "case"), [p for p in small(lambda case: [case]) if p.values[1].name not in PLAIN])
def test_tpu_kernel_has_no_races_and_stays_in_bounds(op, case):
    check_kernel(op, case, "pallas_tpu", interpret_tpu())
    assert not races_found()


@quiet
@pytest.mark.aot
@pytest.mark.parametrize(("op", "case", "generation"), real(["v5e"], ["v5p"], ["v6e"]))
def test_tpu_kernel_compiles(op, case, generation):
    sharding = SingleDeviceSharding(tpus(generation)[0])
    given = (0, 1) if op == "compact_rows" else ()
    f = jax.jit(lambda *a: public(op, case, dict(zip(names, a)), "pallas_tpu"), donate_argnums=given)
    names, shapes = zip(*structs(op, case, sharding).items())
    text = f.lower(*shapes).compile().as_text()
    assert "tpu_custom_call" in text
    # The largest array goes into the kernel as it is stored. Codes of 128 bytes a row lie with these along the lanes, and are copied.
    if op in STORED and (op != "quant_decode" or structs(op, case)["k"].shape[-1] % 128):
        size = math.prod(structs(op, case)[STORED[op]].shape)
        made = re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", text)
        assert size not in [math.prod(map(int, shape.split(","))) for shape in made]


def exported(op, case, platform, implementation=None):
    unchecked = [export.DisabledSafetyCheck.custom_call(TRITON)]
    f = jax.jit(lambda a: public(op, case, a, implementation))
    return export.export(f, platforms=[platform], disabled_checks=unchecked)(structs(op, case)).mlir_module()


@pytest.mark.aot
@pytest.mark.parametrize(("op", "case"), real(()))
def test_gpu_kernel_lowers(op, case):
    assert TRITON in exported(op, case, "cuda", "pallas_gpu")


@pytest.mark.aot
@pytest.mark.parametrize("op", OPS)
def test_automatic_choice_follows_the_platform_compiled_for(op):
    case = PUBLIC[op][1].ACCELERATOR[0]
    kernels = {platform: exported(op, case, platform) for platform in ("tpu", "cuda", "cpu")}
    assert "tpu_custom_call" in kernels["tpu"] and TRITON not in kernels["tpu"]
    assert TRITON in kernels["cuda"] and "tpu_custom_call" not in kernels["cuda"]
    assert TRITON not in kernels["cpu"] and "tpu_custom_call" not in kernels["cpu"]


@pytest.mark.core
@pytest.mark.parametrize("op", OPS)
def test_on_a_mesh_it_returns_what_one_device_returns(op):
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices: jax was started before tests/conftest.py could ask for them")
    mesh = jax.make_mesh((2, 2, 2), ("data", "model", "seq"), axis_types=(AxisType.Auto,) * 3)
    case = SMALL[op][0]
    a = poisoned(op, case)
    assert_close(jax.jit(partial(public, op, case, mesh=mesh))(a), public(op, case, a), "float32")


@pytest.mark.core
@pytest.mark.parametrize(
    ("op", "i", "implementation"), [("quant_decode", 0, None), ("page_scores", 1, None), ("page_scores", 1, "reference")]
)
def test_pages_are_split_where_heads_are_whole(op, i, implementation):
    """3 kv heads on model=2: each device reads its own pages, and nothing as large as those of one is sent."""
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices: jax was started before tests/conftest.py could ask for them")
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    case = dataclasses.replace(SMALL[op][i], B=2, T=1, N=6, K=3, C=80)
    a = poisoned(op, case)
    run = jax.jit(partial(public, op, case, implementation=implementation, mesh=mesh))
    assert_close(run(a), public(op, case, a), "float32")
    paged = {"quant_decode": "BKPRZ", "page_scores": "BKPH"}[op]
    dims = {name: "BKTP" if name == "open" else paged[: x.ndim] if x.shape[1] == 3 else "B" for name, x in a.items()}
    axes = {"B": "data", "P": "model"}
    there = {name: NamedSharding(mesh, PartitionSpec(*map(axes.get, letters))) for name, letters in dims.items()}
    sent = collectives(run.lower({name: jax.device_put(x, there[name]) for name, x in a.items()}).compile().as_text())
    assert sent and all(c.bytes < a[STORED[op]].nbytes / 4 for c in sent), sent


@pytest.mark.core
@pytest.mark.parametrize("op", [op for op in OPS if op != "k_centre"])
def test_gradients_equal_the_references_where_slots_hold_nan(op):
    case = SMALL[op][0]
    spec, given, options = internal(op, case, poisoned(op, case))
    plain = internal(op, case, poisoned(op, case, bad=0.0))[1]  # the definition's own gradient is NaN where a slot holds one
    if op == "bipartite_match":  # the length of a row of zeros has no gradient
        given = plain = internal(op, case, PUBLIC[op][1].arrays(case))[1]
    given = plain if op == "compact_rows" else given  # what moves nowhere is part of the result

    def total(outs):
        outs = [x for x in jax.tree.leaves(outs) if jnp.issubdtype(x.dtype, jnp.floating)]
        return sum(jnp.sin(jnp.where(jnp.isfinite(x), x, 0)).sum() for x in outs)

    def gradients(f, arrays):
        floats, ints = arrays[: spec.floats], arrays[spec.floats :]
        return tuple(jax.tree.leaves(jax.jit(jax.grad(lambda floats: total(f(*floats, *ints))))(floats)))

    got = gradients(lambda *arrays: kernel_ops.dispatch.call(spec, None, None, arrays, **options), given)
    assert all(jnp.isfinite(x).all() for x in got)
    assert_close(got, gradients(partial(spec.run["reference"], **options), plain), "float32")


@pytest.mark.core
def test_sine_and_cosine_of_large_angles():
    """Without what a compiler may fuse, as on a TPU: one operation at a time."""
    rng = np.random.default_rng(0)
    angle = np.concatenate([most * rng.random(2000) * sign for most in (1.0, 1000, 131_072, 200_000) for sign in (1, -1)])
    angle = np.concatenate([angle, np.floor(angle)]).astype(np.float32)
    with jax.disable_jit():
        got = cos_sin(jnp.asarray(angle))
    for x, f in zip(got, (np.cos, np.sin), strict=True):
        np.testing.assert_allclose(x, f(angle.astype(np.float64)), atol=1.2e-7, rtol=0)


REFUSED = (
    ("quant_decode", {"group": 4}, "pallas_tpu", "groups of 4 values and slices of 16 do not divide into whole tiles"),
    ("quant_decode", {"T": 400}, "interpret", "are 9600: over 8192"),
    ("quant_decode", {"H": 48}, "pallas_gpu", "48 numbers of 4 bits are 24 bytes a row, not a power of two"),
    ("page_scores", {"T": 200}, "interpret", "T . G = 600 query rows a kv head exceed 512"),
    ("page_scores", {"H": 24}, "pallas_gpu", "head size 24 is not a power of two"),
    ("compact_rows", {"C": 250}, "pallas_tpu", "250 slots are not whole tiles of 128"),
    ("compact_rows", {"H": 32, "M": 200}, "interpret", "200 rows hold 13107200 bytes of tiles"),
    ("compact_rows", {"H": 24}, "pallas_gpu", "head size 24 is not a power of two"),
    ("compact_rows", {"C": 1024, "M": 600}, "pallas_gpu", "600 rows exceed 512"),
    ("lowrank_scores", {"rank": 9000}, "pallas_tpu", "a basis of 288000 numbers a head exceeds 262144"),
    ("lowrank_scores", {"H": 48}, "pallas_gpu", "head size 48 is not 32, 64 or 128"),
    ("shared_prefix", {"dtype": "float16"}, "pallas_tpu", "must all be float32 or all bfloat16"),
    ("bipartite_match", {"H": 3000}, "interpret", "rows of 3000 numbers exceed 2048"),
    ("k_centre", {"P": 1030}, "pallas_tpu", "distances of 1030 rows exceed"),
    ("k_centre", {"P": 5000}, "pallas_gpu", "5000 rows exceed 4096"),
)


@pytest.mark.core
@pytest.mark.parametrize(("op", "change", "implementation", "message"), REFUSED)
def test_what_an_implementation_cannot_do_is_said_in_one_line(op, change, implementation, message):
    case = dataclasses.replace(SMALL[op][0], **change)
    with pytest.raises(ValueError, match=message) as error:
        jax.eval_shape(lambda a: public(op, case, a, implementation), structs(op, case))
    assert "\n" not in str(error.value)


@pytest.mark.core
@pytest.mark.parametrize("op", ["quant_decode", "page_scores", "compact_rows", "k_centre"])  # one of each way to run calls in a row
def test_benchmark_of_small_shapes(op):
    (row,) = bench(op, [SMALL[op][-1]], repeats=1)
    assert row["op"] == op and row["ms"] > 0 and row["floor_ms"] > 0 and abs(row["speedup"] * row["ms"] - row["dense_ms"]) < 1e-9
