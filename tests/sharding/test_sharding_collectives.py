"""What the compiled decode step of every listed method sends between devices, on data=2 x model=4."""

import jax
import jax.numpy as jnp
import pytest
import sharded

from tokeff import sharding
from tokeff.collectives import Collective, collectives
from tokeff.decode.loop import run

pytestmark = pytest.mark.core

LAYERS = sharded.config(8).L
ALWAYS = 3  # beside the activations: the arg-max over the split vocabulary (value, then index), and whether all rows are done
SMALL = 17  # all of those together of a drafter that runs layers; SWIFT has most, which also searches
# Methods whose formula crosses heads or that ask a question of the whole batch. Everything else sends nothing of its own.
EXTRA = {
    "StreamingLLM": 2,  # is any sequence full? and the orders of one head, from which positions are counted
    "H2O": 1,  # is any sequence full?
    "H2O+PromptLookup": 1,
    "CaM": 1,
    "KVzip": 4 * LAYERS,
    "TOVA": 1 + LAYERS,  # and the mean over heads, where a layer evicts
    "A2SF": 1,
    "ALISA": 1,
    "LM-Infinite": 1,
    "KeyDiff": 1,
    "R-KV": 1,
    "RazorAttention": 5 * LAYERS + 4,  # queries, keys and values to where their class of heads lies, and back; which rows go where
    "DuoAttention": 5 * LAYERS + 5,  # and whether any sequence is full
    "AdaKV": 4 * LAYERS,  # queries out to the pages; their maxima back and out, their sums back
    "TokenSelect": 4 * (LAYERS - 1),  # maximum and sum of the votes, products of the queries, and whether any sequence votes anew
    "TransMLA": LAYERS,  # a row is a sum over all heads
    "InfLLM": LAYERS - 1,  # blocks are worth a sum over all heads, in every layer but the dense one
    "HiP": 1,  # does any sequence choose anew?
    "LServe": 1,
    "RecycledAttention": 1,
    "SpAttenHeads": 6 * (LAYERS - 1),  # which heads are left of a layer, their queries, keys and values to where these lie, and back
    "FFN-SkipLLM": 2,  # may all rows go without? in each layer between the cold ones
    "TokenRecycling": 2,  # the best successors of each part of the vocabulary: values and indices
}


def cache_arrays(s) -> list[jax.Array]:
    """The arrays that hold the prompt's rows, a drafter's own among them: keys, values, or what stands for them."""
    stored = ("k_BKCH", "v_BKCH", "k_BPRH", "v_BPRH", "v_BKSH", "low_BSY", "low_BCY", "code_BKPRZ", "outlier_BKPRX", "k_JKCH", "v_JKCH")
    named = [(getattr(path[-1], "name", ""), x) for path, x in jax.tree_util.tree_leaves_with_path((s.layers, s.drafter))]
    return [x for name, x in named if name in stored and x.nbytes > max(x.nbytes for _, x in named) / 2]


def split(found: list[Collective], s) -> tuple[list[Collective], list[Collective]]:
    """(activations (B, T, D) added up over the model axis, everything else)."""
    T, D = s.accepted.path_BW.shape[1], sharded.config(8).D
    rows = len(sharded.LENGTHS) // 2
    wanted = {f"f32[{rows},{T},{D}]", f"f32[{rows * T},{D}]", f"f32[{D},{rows},{T}]"}  # the last: products with the weight on the left
    sums = [c for c in found if c.kind == "all-reduce" and c.shape in wanted]
    return sums, [c for c in found if c not in sums]


@pytest.mark.parametrize("name", sharded.named(*sharded.ORDINARY, "H2O+PromptLookup"))
def test_collectives(name):
    """Two sums of activations a layer and one for the embedding; nothing as large as a layer's keys on one device."""
    found, s = sharded.sent(name)
    sums, others = split(found, s)
    assert len(sums) == 2 * LAYERS + 1
    assert len(others) == ALWAYS + EXTRA.get(name, 0), others
    assert {c.kind for c in others} <= {"all-gather", "all-reduce", "all-to-all"}
    smallest = min(x.addressable_shards[0].data.nbytes for x in cache_arrays(s))
    assert all(c.bytes < smallest for c in others), others


@pytest.mark.parametrize("name", sharded.named(*sharded.DRAFTERS))
def test_collectives_of_drafters_that_run_layers(name):
    """Sums of activations and, however many layers there are, so many small ones to name drafts, to judge them and to end; nothing as
    large as a layer's keys on one device."""
    found, s = sharded.sent(name)
    D = sharded.config(8).D
    others = [c for c in found if not (c.kind == "all-reduce" and (f",{D}]" in c.shape or f"[{D}," in c.shape))]
    assert ALWAYS <= len(others) <= SMALL, others
    assert {c.kind for c in found} <= {"all-gather", "all-reduce"}
    smallest = min(x.addressable_shards[0].data.nbytes for x in cache_arrays(s))
    assert all(c.bytes < smallest for c in found), found


@pytest.mark.parametrize("name", sharded.named(*sharded.METHODS))
def test_every_array_lies_where_its_name_says(name):
    """The compiled loop keeps the layout: what the caches held on one device after `start` is their share, and no more."""
    _, s = sharded.sent(name)
    for x in cache_arrays(s):
        assert "data" in x.sharding.spec and (x.ndim == 3 or "model" in x.sharding.spec)


PAGED = {"KIVI": ("code_BKPRZ", "zero_BKPRQ", "step_BKPRQ", "order_BKPR"), "Quest": ("low_BKPH", "high_BKPH")}


@pytest.mark.parametrize("name", sharded.named(*PAGED))
def test_no_page_is_sent_where_heads_do_not_divide(name):
    """3 kv heads on model=2: pages are split in the place of heads, each device reads its own, and only what it made of them is sent."""
    m, parts = sharded.placed(3, 2, 2), sharded.setup(name)
    _, s = sharded.begun(m, name)
    pages = [(path[-1].name, x) for path, x in jax.tree_util.tree_leaves_with_path(s.layers) if path[-1].name in PAGED[name]]
    assert pages and all("model" in x.sharding.spec for _, x in pages)
    with sharding.beside(m.params):
        step = run.lower(m.params, m.cfg, s, jnp.int32(2), policy=parts.kv.onward(), drafter=parts.decode, how=parts.sampling, eos=())
    found = collectives(step.compile().as_text())
    shapes = {f"[{x.sharding.shard_shape(x.shape)[0]},{','.join(map(str, x.shape[1:]))}]" for _, x in pages}
    assert not [c for c in found if any(shape in c.shape for shape in shapes)], found
    smallest = min(x.addressable_shards[0].data.nbytes for kind, x in pages if kind in ("code_BKPRZ", "low_BKPH"))
    _, others = split(found, s)
    assert all(c.bytes <= smallest for c in others if c.kind == "all-gather"), others


def test_counting():
    """A combined one adds up, an asynchronous start counts its result, pieces of one count once."""
    text = """
  %a = (f32[4,2]{1,0}, s32[]) all-reduce(%x, %y), channel_id=1
  %b = (bf16[4,2]{1,0}, bf16[8,2]{1,0:T(8,128)}) all-gather-start(%x), channel_id=2
  %c = f32[3]{0} all-gather(%x), channel_id=13, frontend_attributes={chain_id="0"}
  %d = f32[3]{0} all-gather(%x), channel_id=13, frontend_attributes={chain_id="0"}
  %e = f32[3]{0} fusion(%all-gather.1), kind=kLoop"""
    assert collectives(text) == [
        Collective("all-reduce", "f32[4,2] s32[]", 36),
        Collective("all-gather", "bf16[8,2]", 32),
        Collective("all-gather", "f32[3]", 12),
    ]
