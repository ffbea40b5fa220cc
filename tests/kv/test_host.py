"""Rows in host memory: the same text, rows where they belong, only chosen rows brought over, and no copy of the whole in the program."""

import dataclasses
import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_api
import tiny
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import tokeff
from tokeff import sharding
from tokeff.context import Compressed, abstract
from tokeff.decode.loop import begin, run
from tokeff.decode.methods import token_recycling
from tokeff.decode.sample import GREEDY, row_keys
from tokeff.errors import UserError
from tokeff.generation import Setup
from tokeff.kv import methods as kv
from tokeff.kv.cache import Room
from tokeff.kv.extend import extend, pack
from tokeff.kv.host import HOST, fetch, host_bytes, place, rows_from_host
from tokeff.kv.hosted import append, rows_at, split
from tokeff.kv.policy import Full
from tokeff.kv.sparse_window import SparseWindow
from tokeff.models.flow import EMPTY, Flow, Here
from tokeff.sparse import methods as sparse

CFG = dataclasses.replace(tiny.CFG, L=2, windows=())
DRAFTS = token_recycling(tiny.TREE)
LENGTH = max(tiny.LENGTHS)
SPLIT = dict(ends=(3, 8, 21, 34, 40, 55), sinks=4, recent=8, window=6, kernel=3, cell=4, longest=8)
QUEST = sparse.quest(0.5, 4, (), 8)
PAIRS = {  # on the device, and on the host
    "ShadowKV": (kv.shadowkv(0.25), kv.shadowkv(0.25, host=True)),
    "InfLLM": (sparse.infllm(0.5, 4, 2, 4, 8), sparse.infllm(0.5, 4, 2, 4, 8, host=True)),
    "SentenceKV": (sparse.sentencekv(0.4, 1.5, **SPLIT), sparse.sentencekv(0.4, 1.5, **SPLIT, host=True)),
    "ALISA": (SparseWindow(0.5, 4, host=False), kv.alisa(0.5, 4, host=True)),
    "Quest": (QUEST, dataclasses.replace(QUEST, host=True)),
}
# Of every head and the longest prompt: arrays of rows on the host, their rows, and rows that come over.
COUNTS = {
    "ShadowKV": (1, 64, 64 // 4),  # values; a quarter of the prompt
    "InfLLM": (2, 56 - 4, 32 - 4 * 4),  # keys and values; less a page of sinks, and 3 of recent rows
    "SentenceKV": (2, 39 - 4 - 8, 26 - 4 - 8),  # of 39 rows kept
    "ALISA": (2, 64, 32 // 2),
}
every = pytest.mark.parametrize("name", COUNTS)


@cache
def prompt(name: str):
    return tiny.read(PAIRS[name][0], cfg=CFG)


def start(name: str, drafter=tiny.PLAIN, which: int = 1):
    return tiny.start(prompt(name), PAIRS[name][which], drafter, cfg=CFG)


@cache
def ends(name: str):
    """The last states of the two."""
    return [tiny.go(start(name, which=i), policy, cfg=CFG) for i, policy in enumerate(PAIRS[name])]


def rows_of(layer) -> list[jax.Array]:
    """What belongs on the host."""
    return [layer.v_BKSH] if hasattr(layer, "v_BKSH") else [layer.rows.k_BKSH, layer.rows.v_BKSH]


def kinds(layers) -> set[str]:
    return {x.sharding.memory_kind for layer in layers for x in rows_of(layer)}


@pytest.mark.core
def test_rows_come_over_as_they_are():
    rng = np.random.default_rng(0)
    x, y = (place(jnp.asarray(rng.standard_normal((2, 3, 16, 4)), jnp.float32)) for _ in range(2))
    index = jnp.asarray(rng.integers(0, 16, (2, 3, 5)), jnp.int32)
    assert x.sharding.memory_kind == HOST
    found = jax.jit(rows_from_host)(x, index)
    assert found.sharding.memory_kind != HOST and fetch(x).sharding.memory_kind != HOST
    np.testing.assert_array_equal(found, np.take_along_axis(np.asarray(x), np.asarray(index)[..., None], axis=2))
    pages = jax.jit(lambda *both: rows_from_host(both, index // 4 * 4, 4))(x, y)
    slots = (np.asarray(index) // 4 * 4)[..., None] + np.arange(4)
    for whole, some in zip((x, y), pages, strict=True):
        np.testing.assert_array_equal(some, np.take_along_axis(np.asarray(whole), slots.reshape(2, 3, 20, 1), axis=2))


@pytest.mark.core
def test_slots_are_those_of_a_store_that_holds_all():
    """Ragged prompts, one shorter than the sinks, and rows that came later: any page of any part is the same from both stores."""
    rng, length, S, room = np.random.default_rng(0), np.array([29, 3, 17]), 29, 11
    order = jnp.where(jnp.arange(S) < length[:, None], jnp.arange(S), EMPTY)[:, None].astype(jnp.int32)
    k, v = (jnp.asarray(rng.normal(size=(3, CFG.K, S, CFG.H)), jnp.float32) for _ in range(2))
    later = (length + np.arange(room)[:, None])[..., None].astype(np.int32)
    later[4, 2] = EMPTY  # a step without a row
    new = [jnp.asarray(x) for x in (later, *rng.normal(size=(2, room, 3, 1, CFG.K, CFG.H)).astype(np.float32))]

    @jax.jit
    def found(rows, new):
        whole = Full().pack_layer(rows, Room(room), Here(0, CFG))
        hosted = split(whole, 8, jnp.maximum((whole.live_B - 5) // 4 * 4, 8), 24, 5 + 4 + room)

        def step(stores, given):
            at, k, v = given
            return tuple(append(store, k, v, Flow(at, at, at, at), None) for store in stores), None

        stores, _ = jax.lax.scan(step, (whole, hosted), new)
        slots = jnp.broadcast_to(jnp.arange(whole.capacity), whole.order_BKC.shape)
        return [(store.order_BKC, store.live_B, *rows_at(store, slots, 4)) for store in stores]

    whole, hosted = found(prompt("Quest").layers[0].replace(k_BKSH=k, v_BKSH=v, order_BKS=order), new)
    there = np.asarray(whole[0]) != EMPTY
    for i, (one, other) in enumerate(zip(whole, hosted, strict=True)):
        np.testing.assert_array_equal(*((one, other) if i < 2 else (np.asarray(one)[there], np.asarray(other)[there])))


@pytest.mark.core
@pytest.mark.parametrize("name", PAIRS)
def test_the_text_is_that_of_rows_on_the_device(name):
    one, other = ends(name)
    assert tiny.text(one) == tiny.text(other)
    assert kinds(other.layers) == {HOST}


@pytest.mark.core
@pytest.mark.parametrize("name", [name for name in COUNTS if not PAIRS[name][0].drafts(DRAFTS.depth)])
def test_drafts_leave_the_text(name):
    end = tiny.go(start(name, DRAFTS), PAIRS[name][1], DRAFTS, cfg=CFG)
    assert tiny.text(end) == tiny.text(ends(name)[0]) and int(end.passes_B.max()) < tiny.NEW - 1
    assert kinds(end.layers) == {HOST}


@pytest.mark.core
@pytest.mark.parametrize("name", ["InfLLM", "Quest"])
def test_generated_rows_are_chosen_alike(name):
    """At the end of the text queries choose the same pages from both, some of them of rows that were generated."""
    q = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, CFG.N, CFG.H)), jnp.float32)
    order = jnp.broadcast_to(ends(name)[0].count_B[:, None] - 1, (2, 32))
    ask, pages = Flow(order, order, order, order), []
    for policy, end in zip(PAIRS[name], ends(name), strict=True):
        pages.append(np.asarray(jax.jit(lambda layer, p=policy: p.selected(q, q, layer, ask, Here(0, CFG))[0])(end.layers[0])))
    np.testing.assert_array_equal(*pages)
    assert (pages[0] >= LENGTH // 4).any()


@pytest.mark.core
def test_a_question_reads_as_on_the_device():
    """Certain rows, unequal in number, and their logits."""
    given, n, found = jnp.asarray([[5, 9, 2], [7, 1, 0]]), jnp.asarray([3, 2]), []
    for policy in PAIRS["InfLLM"]:
        packed = pack(policy, prompt("InfLLM").layers, Room(4), CFG)
        logits, after = extend(tiny.params(CFG), CFG, packed, given, prompt("InfLLM").next_B, n, policy)
        found.append(np.asarray(logits)[np.arange(3) < np.asarray(n)[:, None]])
    np.testing.assert_allclose(*found, atol=1e-4)
    assert kinds(after) == {HOST}


@pytest.mark.core
@every
def test_what_lies_on_the_host_and_what_comes_over_is_counted(name):
    here, there = (pack(policy, prompt(name).layers, Room(4), CFG) for policy in PAIRS[name])
    arrays, held, moved = COUNTS[name]
    one = arrays * len(tiny.LENGTHS) * CFG.K * CFG.H * 4
    assert host_bytes(there) == CFG.L * one * held and host_bytes(here) == 0
    assert [policy.bytes_moved(x[0], Here(0, CFG)) for policy, x in zip(PAIRS[name], (here, there), strict=True)] == [0, one * moved]
    more = there[0].rows.near.order_BKC.nbytes + there[0].rows.edge_B.nbytes if name != "ShadowKV" else 0
    read = [policy.bytes_read(x[0], Here(0, CFG)) for policy, x in zip(PAIRS[name], (here, there), strict=True)]
    assert read[1] - read[0] == more, "as many rows are read, wherever they lie"


@pytest.mark.core
@every
def test_a_fork_stays_on_the_host(name):
    policy = PAIRS[name][1]
    packed = pack(policy, prompt(name).layers, Room(4), CFG)[:1]
    forked = policy.fork(packed, 3, Room(4))
    assert kinds(forked) == {HOST}
    for one, three in zip(rows_of(packed[0]), rows_of(forked[0]), strict=True):
        np.testing.assert_array_equal(three, np.repeat(one, 3, axis=0))


@pytest.mark.core
@every
def test_on_a_mesh_it_stays_on_the_hosts(name):
    """Sharded over batch and heads: the same text, rows still in host memory and split like everything else."""
    policy, mesh = PAIRS[name][1], sharding.mesh(2, 2)
    params, s = sharding.shard(tiny.params(CFG), mesh), sharding.shard(start(name), mesh)
    assert kinds(s.layers) == {HOST}
    assert {x.sharding.spec for x in rows_of(s.layers[0])} == {jax.sharding.PartitionSpec("data", "model", None, None)}
    with sharding.beside(params):
        end = run(params, CFG, s, jnp.int32(100), policy=policy, drafter=tiny.PLAIN, how=GREEDY, eos=())
    assert tiny.text(end) == tiny.text(ends(name)[1]) and kinds(end.layers) == {HOST}


@pytest.mark.core
@every
def test_the_loop_reads_host_memory_and_keeps_no_copy(name):
    """In the compiled loop the rows are in memory space 5, the host's, from argument to result, and nothing makes as many anew."""
    s = start(name)
    how = dict(policy=PAIRS[name][1], drafter=tiny.PLAIN, how=GREEDY, eos=())
    text = run.lower(tiny.params(CFG), CFG, s, jnp.int32(tiny.NEW), **how).compile().as_text()
    shape = "f32[{},{},{},{}]".format(*rows_of(s.layers[0])[0].shape)
    entry = text.splitlines()[0].split("->")
    for side in entry[:2]:
        found = re.findall(re.escape(shape) + r"\{[^}]*\}", side)
        assert sum("S(5)" in x for x in found) == CFG.L * COUNTS[name][0]
    assert not re.search(rf" = {re.escape(shape)}\S* copy\(", text)


@pytest.mark.core
@pytest.mark.parametrize("name", tiny.sampled(COUNTS, ("InfLLM", "ALISA")))
def test_a_loaded_context_is_on_the_host(name, tmp_path):
    """Array for array, and what it says to a question."""
    m, policy = test_api.model(), PAIRS[name][1]
    made = tokeff.compress(m, test_api.text(64), policy, room=8)
    made.save(tmp_path / "c")
    again = Compressed.load(m, tmp_path / "c")
    assert kinds(made.layers) == kinds(again.layers) == {HOST}
    jax.tree.map(np.testing.assert_array_equal, made.layers, again.layers)
    texts = [tokeff.generate(m, test_api.text(3, 2), cache=context, max_new=5).tokens for context in (made, again)]
    assert texts[0] == texts[1]


@pytest.mark.core
def test_only_what_chooses_without_keys_is_on_the_host():
    """Layers that read everything stay on the device; a selector that looks at every key is refused."""
    quest = dataclasses.replace(sparse.quest(0.5, 4, (0,), 8), host=True)
    tidal = dataclasses.replace(sparse.tidaldecode(0.5, (0,), (1,), 8), host=True)
    assert [quest.hosts(i) for i in range(3)] == [False, True, True]
    assert [tidal.hosts(i) for i in range(4)] == [False, False, True, True]
    for policy in (sparse.top_k_oracle(0.5), sparse.hip(0.9, 4, 16, 1, 4, 8), sparse.recycled_attention(0.5)):
        with pytest.raises(UserError, match="all keys"):
            dataclasses.replace(policy, host=True).check(tiny.CFG, LENGTH)


@pytest.mark.aot
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")  # it stores programs for absent TPUs it cannot read
@pytest.mark.parametrize(("generation", "size"), [("v5e", 1), ("v5e", 16), ("v6e", 16)])
def test_on_a_tpu_only_chosen_rows_leave_the_host(generation, size):
    """A gather of 256 of 8192 rows: 32 MiB are arguments in host memory, and the device needs a few MiB at most."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=f"{generation}:2x2").devices[0]
    at = [SingleDeviceSharding(device, memory_kind=kind) for kind in (HOST, "device")]
    x = jax.ShapeDtypeStruct((2, 8, 8192, 128), jnp.bfloat16, sharding=at[0])
    index = jax.ShapeDtypeStruct((2, 8, 256 // size), jnp.int32, sharding=at[1])
    program = jax.jit(rows_from_host, static_argnums=2).lower(x, index, size).compile()
    use, text = program.memory_analysis(), program.as_text()
    assert use.host_argument_size_in_bytes == 2 * 8 * 8192 * 128 * 2
    assert use.argument_size_in_bytes + use.temp_size_in_bytes + use.output_size_in_bytes < 4 * 2**20
    assert "host-call" in text and re.search(r"bf16\[2,8,8192,128\]\{[^}]*S\(5\)\} parameter", text)


@pytest.mark.aot
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
def test_on_a_tpu_the_loop_leaves_the_rest_on_the_host():
    """InfLLM's decode loop behind 8192 rows: 16 MiB of keys and values are arguments and results in host memory. Each step writes a row and
    reads 256, and the device needs a few MiB at most."""
    cfg, policy = dataclasses.replace(CFG, L=1, H=128, windows=()), sparse.infllm(256, 16, 2, 16, 64, host=True)
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    layers = abstract(cfg, Setup(policy), ((8192, 0),), 16, "float32")
    zero, how = jnp.zeros(1, jnp.int32), (tiny.PLAIN, row_keys(0, jnp.arange(1)), jnp.ones(1, jnp.int32), GREEDY, ())
    s = jax.eval_shape(lambda layers: begin(layers, jnp.zeros((1, 8208), jnp.int32), zero, zero, jnp.zeros((1, cfg.V)), *how), layers)

    def there(x, kind="device"):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device, memory_kind=kind)), x)

    def loop(params, s, k, v):
        k, v = jax.device_put((k, v), jax.memory.Space.Host)  # shapes alone do not say where arrays lie
        layer = s.layers[0].replace(rows=s.layers[0].rows.replace(k_BKSH=k, v_BKSH=v))
        return run.__wrapped__(params, cfg, s.replace(layers=(layer,)), jnp.int32(9), policy=policy, drafter=tiny.PLAIN, how=GREEDY, eos=())

    rows, params = s.layers[0].rows, jax.eval_shape(lambda: tiny.params(cfg))
    none = s.replace(layers=(s.layers[0].replace(rows=rows.replace(k_BKSH=None, v_BKSH=None)),))
    given = there(params), there(none), there(rows.k_BKSH, HOST), there(rows.v_BKSH, HOST)
    use = jax.jit(loop, donate_argnums=(1, 2, 3)).lower(*given).compile().memory_analysis()
    assert use.host_argument_size_in_bytes == use.host_output_size_in_bytes == 2 * rows.k_BKSH.size * 4 > 15 * 2**20
    assert use.argument_size_in_bytes + use.temp_size_in_bytes < 8 * 2**20
