"""The kernels through the real compilers, at real shapes, with no TPU and no GPU: libtpu compiles, CUDA lowers."""

import jax
import numpy as np
import pytest
from jax import export
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from kernel_proofs import GENERATIONS, TRITON, tpus

from tokeff.kernels import cases, column_mass, decode_attention
from tokeff.kernels.cases import Case
from tokeff.kernels.column_mass import cases as mass_cases
from tokeff.kernels.decode_attention import cases as attention_cases

# A compile cache can store programs for absent TPUs, but not read them back, and says so each time.
pytestmark = [pytest.mark.aot, pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")]

OPS = {"decode_attention": (attention_cases, decode_attention), "column_mass": (mass_cases, column_mass)}
EVERY = [pytest.param(op, case, id=f"{op}-{case.name}") for op in OPS for case in OPS[op][0].ACCELERATOR]


def call(op, case, implementation=None, mesh=None):
    """Return (function of a flat tuple of arrays, the function that orders a case's arrays)."""
    module, public = OPS[op]
    options = module.options(case)

    def f(a):
        positional, keys = module.arguments(a)
        return public(*positional, **keys, **options, implementation=implementation, mesh=mesh)

    return f


def structs(case, sharding):
    """Return the shapes of a case with a sharding each: one for all, or {name: sharding}."""
    shapes = cases.structs(case)
    where = sharding if isinstance(sharding, dict) else dict.fromkeys(shapes, sharding)
    return {n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where[n]) for n, s in shapes.items()}


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(("op", "case"), EVERY)
def test_tpu_kernel_compiles(op, case, generation):
    device = tpus(generation)[0]
    compiled = jax.jit(call(op, case, "pallas_tpu")).lower(structs(case, SingleDeviceSharding(device))).compile()
    text = compiled.as_text()
    assert "tpu_custom_call" in text
    # K and V go into the kernel as they are stored: no copy of the cache to another layout.
    cache = f"[{case.B},{case.K},{case.C},{case.H}]"
    assert not [line for line in text.splitlines() if f"{cache}" in line.split(" copy(")[0] and " copy(" in line]


@pytest.mark.parametrize(("op", "case"), EVERY)
def test_gpu_kernel_lowers(op, case):
    assert TRITON in exported(op, case, "cuda", "pallas_gpu")


def exported(op, case, platform, implementation=None):
    unchecked = [export.DisabledSafetyCheck.custom_call(TRITON)]
    f = jax.jit(call(op, case, implementation))
    return export.export(f, platforms=[platform], disabled_checks=unchecked)(structs(case, None)).mlir_module()


@pytest.mark.parametrize("op", list(OPS))
def test_automatic_choice_follows_the_platform_compiled_for(op):
    case = Case("choice", B=1, T=2, N=4, K=2, C=256, H=64)
    kernels = {platform: exported(op, case, platform) for platform in ("tpu", "cuda", "cpu")}
    assert "tpu_custom_call" in kernels["tpu"] and TRITON not in kernels["tpu"]
    assert TRITON in kernels["cuda"] and "tpu_custom_call" not in kernels["cuda"]
    assert "custom_call" not in kernels["cpu"].replace("custom_call @Sharding", "")


def test_selection_the_tpu_kernel_refuses_goes_to_xla():
    case = Case("rows", N=4, K=2, C=256, H=64, M=32, page_size=1)
    assert "tpu_custom_call" not in exported("decode_attention", case, "tpu")
    assert TRITON in exported("decode_attention", case, "cuda")


@pytest.mark.parametrize("op", list(OPS))
def test_kernels_compile_on_a_mesh_of_tpus(op):
    mesh = Mesh(np.array(tpus("v5e")).reshape(2, 2), ("data", "model"))
    case = Case("mesh", B=4, T=4, N=8, K=4, C=1024, H=128, dtype="bfloat16")
    split = {"q": ("data", None, "model"), "lse": ("data", None, "model"), "k": ("data", "model")}
    split |= {"v": split["k"], "order": split["k"], "lo": ("data",), "hi": ("data",), "weight": ("data",)}
    shardings = {name: NamedSharding(mesh, PartitionSpec(*axes)) for name, axes in split.items()}
    compiled = jax.jit(call(op, case, mesh=mesh)).lower(structs(case, shardings)).compile().as_text()
    assert "tpu_custom_call" in compiled
    assert not [c for c in ("all-gather", "all-reduce", "all-to-all", "collective-permute") if f" {c}" in compiled]
