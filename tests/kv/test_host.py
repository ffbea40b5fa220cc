"""Rows in host memory: the same text, values where they belong, only chosen rows brought over, and no copy of the whole in the program."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from tokeff import sharding
from tokeff.decode.loop import run
from tokeff.decode.sample import GREEDY
from tokeff.kv import methods as kv
from tokeff.kv.cache import Room
from tokeff.kv.extend import pack
from tokeff.kv.host import HOST, fetch, host_bytes, place, rows_from_host
from tokeff.models.flow import Here

HERE, THERE = kv.shadowkv(0.25), kv.shadowkv(0.25, host=True)


@pytest.mark.core
def test_rows_come_over_as_they_are():
    rng = np.random.default_rng(0)
    x = place(jnp.asarray(rng.standard_normal((2, 3, 16, 4)), jnp.float32))
    index = jnp.asarray(rng.integers(0, 16, (2, 3, 5)), jnp.int32)
    assert x.sharding.memory_kind == HOST
    found = jax.jit(rows_from_host)(x, index)
    assert found.sharding.memory_kind != HOST and fetch(x).sharding.memory_kind != HOST
    np.testing.assert_array_equal(found, np.take_along_axis(np.asarray(x), np.asarray(index)[..., None], axis=2))


@pytest.mark.core
def test_the_text_is_that_of_values_on_the_device():
    prompt = tiny.read(HERE)
    one, other = (tiny.go(tiny.start(prompt, policy), policy) for policy in (HERE, THERE))
    assert tiny.text(one) == tiny.text(other)
    assert all(layer.v_BKSH.sharding.memory_kind == HOST for layer in other.layers)


@pytest.mark.core
def test_what_lies_on_the_host_and_what_comes_over_is_counted():
    packed = pack(THERE, tiny.read(THERE).layers, Room(4), tiny.CFG)
    assert host_bytes(packed) == sum(layer.v_BKSH.nbytes for layer in packed)
    assert host_bytes(pack(HERE, tiny.read(HERE).layers, Room(4), tiny.CFG)) == 0
    rows = 64 // 4  # a quarter of the longest prompt, in whole chunks of 8
    assert THERE.bytes_moved(packed[0], Here(0, tiny.CFG)) == len(tiny.LENGTHS) * tiny.CFG.K * rows * tiny.CFG.H * 4
    assert HERE.bytes_moved(packed[0], Here(0, tiny.CFG)) == 0


@pytest.mark.core
def test_a_fork_stays_on_the_host():
    packed = pack(THERE, tiny.read(THERE, tiny.prompts()[:1]).layers, Room(4), tiny.CFG)
    forked = THERE.fork(packed, 3, Room(4))
    assert forked[0].v_BKSH.shape[0] == 3 and forked[0].v_BKSH.sharding.memory_kind == HOST
    np.testing.assert_array_equal(forked[0].v_BKSH[2], packed[0].v_BKSH[0])


@pytest.mark.core
def test_on_a_mesh_it_stays_on_the_hosts():
    """Sharded over batch and heads: the same text, values still in host memory and split like everything else."""
    rows = tiny.prompts()
    prompt = tiny.read(THERE, rows)
    alone = tiny.text(tiny.go(tiny.start(prompt, THERE), THERE))
    mesh = sharding.mesh(2, 2)
    params = sharding.shard(tiny.params(), mesh)
    s = sharding.shard(tiny.start(prompt, THERE), mesh)
    assert {layer.v_BKSH.sharding.memory_kind for layer in s.layers} == {HOST}
    assert s.layers[0].v_BKSH.sharding.spec == jax.sharding.PartitionSpec("data", "model", None, None)
    with sharding.beside(params):
        end = run(params, tiny.CFG, s, jnp.int32(100), policy=THERE, drafter=tiny.PLAIN, how=GREEDY, eos=())
    assert tiny.text(end) == alone


@pytest.mark.core
def test_the_loop_reads_host_memory_and_keeps_no_copy():
    """In the compiled loop values are in memory space 5, the host's, from argument to result."""
    prompt = tiny.read(THERE)
    s = tiny.start(prompt, THERE)
    how = dict(policy=THERE, drafter=tiny.PLAIN, how=GREEDY, eos=())
    text = run.lower(tiny.params(), tiny.CFG, s, jnp.int32(4), **how).compile().as_text()
    shape = "f32[{},{},{},{}]".format(*s.layers[0].v_BKSH.shape)
    entry = text.splitlines()[0].split("->")
    for side in entry[:2]:
        found = re.findall(re.escape(shape) + r"\{[^}]*\}", side)
        assert sum("S(5)" in x for x in found) == tiny.CFG.L


@pytest.mark.aot
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")  # it stores programs for absent TPUs it cannot read
@pytest.mark.parametrize("generation", ["v5e", "v6e"])
def test_on_a_tpu_only_chosen_rows_leave_the_host(generation):
    """A gather of 256 of 8192 rows: 32 MiB are arguments in host memory, and the device needs a few MiB at most."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=f"{generation}:2x2").devices[0]
    at = [SingleDeviceSharding(device, memory_kind=kind) for kind in (HOST, "device")]
    x = jax.ShapeDtypeStruct((2, 8, 8192, 128), jnp.bfloat16, sharding=at[0])
    index = jax.ShapeDtypeStruct((2, 8, 256), jnp.int32, sharding=at[1])
    program = jax.jit(rows_from_host).lower(x, index).compile()
    use, text = program.memory_analysis(), program.as_text()
    assert use.host_argument_size_in_bytes == 2 * 8 * 8192 * 128 * 2
    assert use.argument_size_in_bytes + use.temp_size_in_bytes + use.output_size_in_bytes < 4 * 2**20
    assert "host-call" in text and re.search(r"bf16\[2,8,8192,128\]\{[^}]*S\(5\)\} parameter", text)
