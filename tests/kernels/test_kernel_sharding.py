"""On a mesh of 8 virtual CPU devices both ops return what one device returns, without moving the cache."""

import re

import jax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from kernel_calls import assert_close, biased, mass_arguments, ragged

from tokeff.kernels import column_mass, decode_attention
from tokeff.kernels.cases import Case
from tokeff.kernels.column_mass import cases as mass_cases
from tokeff.kernels.decode_attention import cases as attention_cases

pytestmark = pytest.mark.core

MESHES = {"data4_model2": (4, 2, 1), "model2_seq4": (1, 2, 4), "data2_model2_seq2": (2, 2, 2)}
DENSE = Case("dense", B=4, T=2, N=8, K=4, C=64, H=16)
PAGES = Case("pages", B=4, T=2, N=8, K=4, C=128, H=16, M=4, page_size=8)
SPLIT = {name: ("data", "model", "seq") for name in ("k", "v", "order", "bias")} | {"page": ("data", "model")}


def mesh_of(sizes):
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices: jax was started before tests/conftest.py could ask for them")
    return jax.make_mesh(sizes, ("data", "model", "seq"), axis_types=(AxisType.Auto,) * 3)


def place(mesh, a):
    """Put the cache on the mesh as tokeff shards it, the rest by batch."""
    specs = {name: PartitionSpec(*SPLIT.get(name, ("data",))) for name in a}
    return {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in a.items()}


def attend(case, a, mesh, implementation=None):
    positional, keys = attention_cases.arguments(a)
    options = attention_cases.options(case) | {"finite": False}
    return decode_attention(*positional, **keys, **options, mesh=mesh, implementation=implementation)


def collectives(compiled):
    return re.findall(r" (all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\(", compiled.as_text())


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("case", [DENSE, PAGES], ids=["dense", "pages"])
def test_decode_attention_on_a_mesh(case, sizes):
    mesh = mesh_of(sizes)
    a = ragged(case)
    compiled = jax.jit(lambda a: attend(case, a, mesh)).lower(place(mesh, a)).compile()
    assert_close(compiled(place(mesh, a)), attend(case, a, None), "float32")
    # Only the merge by log-sum-exp talks: a maximum and two sums, of query size.
    assert collectives(compiled) == ["all-reduce"] * len(collectives(compiled))
    assert len(collectives(compiled)) <= (3 if sizes[2] > 1 else 0)


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("case", [DENSE, PAGES], ids=["dense", "pages"])
def test_bias_on_a_mesh(case, sizes):
    mesh, a = mesh_of(sizes), biased(case)
    there = jax.jit(lambda a: attend(case, a, mesh))(place(mesh, a))
    assert_close(there, attend(case, a, None), "float32")


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_column_mass_on_a_mesh(sizes):
    mesh = mesh_of(sizes)
    a = ragged(DENSE)
    q, k, *rest = mass_arguments(DENSE, a)
    placed = place(mesh, {"k": k, "order": rest[1]})

    def f(q, k, *rest, mesh):
        return column_mass(q, k, *rest, **mass_cases.options(DENSE), mesh=mesh)

    compiled = (
        jax.jit(f, static_argnames="mesh")
        .lower(q, placed["k"], rest[0], placed["order"], *rest[2:], mesh=mesh)
        .compile()
    )
    assert_close(compiled(q, placed["k"], rest[0], placed["order"], *rest[2:]), f(q, k, *rest, mesh=None), "float32")
    assert collectives(compiled) == []


def test_mesh_set_around_the_call_is_used():
    mesh = mesh_of((2, 2, 2))
    a = ragged(DENSE)
    want = attend(DENSE, a, None)
    with jax.set_mesh(mesh):
        assert_close(jax.jit(lambda a: attend(DENSE, a, None))(a), want, "float32")


def test_kernel_runs_on_each_shard():
    """The interpreted TPU kernel inside shard_map: heads 3 over model 2 do not divide, so they stay whole."""
    case = Case("odd", B=2, T=1, N=6, K=3, C=32, H=16)
    a = ragged(case)
    assert_close(attend(case, a, mesh_of((2, 2, 2)), "interpret"), attend(case, a, None, "reference"), "float32")


def test_gradients_on_a_mesh():
    a = ragged(DENSE)

    def loss(k, mesh):
        return attend(DENSE, a | {"k": k}, mesh)[0].sum()

    grads = [jax.jit(jax.grad(loss), static_argnums=1)(a["k"], mesh) for mesh in (mesh_of((2, 2, 2)), None)]
    assert_close(*grads, "float32")


def test_pages_that_cross_a_shard_are_refused():
    case = Case("crossing", B=1, N=2, K=2, C=40, H=16, M=2, page_size=4)  # 10 slots a shard
    with pytest.raises(ValueError, match="page_size 4 must divide the 10 slots"):
        attend(case, ragged(case), mesh_of((1, 2, 4)))
