"""Two layers of the 8B decode step through the real TPU compiler, for eight chips that are not there."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import tiny

from tokeff import sharding
from tokeff.collectives import collectives
from tokeff.kv import methods as kv
from tokeff.models.presets import LLAMA3_8B
from tokeff.sparse.methods import tidaldecode

# A compile cache can store programs for absent TPUs, but not read them back, and says so each time.
pytestmark = [pytest.mark.aot, pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")]

CFG = dataclasses.replace(LLAMA3_8B, L=2, windows=(None, None))
B, S, NEW = 8, 8192, 64
KERNEL = ("Full", "SnapKV", "AdaKV", "ShadowKV")  # they read their stores through the Pallas kernel, inside shard_map
POLICIES = {
    "Full": kv.full(),
    "SnapKV": kv.snapkv(816),
    "StreamingLLM": kv.streaming_llm(816),
    "H2O": kv.h2o(816),
    "AdaKV": kv.adakv(816),
    "TidalDecode": tidaldecode(816, dense=(), select=(0,)),
    "ShadowKV": kv.shadowkv(816),
}


@pytest.fixture(scope="module")
def aot():
    """The experiment's own code, loaded from its file."""
    pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, is not installed")
    file = Path(__file__).parents[2] / "experiments" / "aot_8b_decode.py"
    spec = importlib.util.spec_from_file_location("aot_8b_decode", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EVERY = [pytest.param(name, 2, 4) for name in POLICIES]


@pytest.mark.parametrize(("name", "data", "model"), [("Full", 1, 8), *tiny.sampled(EVERY, ("Full", "AdaKV", "H2O"))])
def test_8b_decode_step(aot, name, data, model):
    compiled, params, s = aot.compile_step(CFG, POLICIES[name], sharding.mesh(data, model, aot.chips()), B=B, S=S, new=NEW)
    memory, text = compiled.memory_analysis(), compiled.as_text()

    # A chip holds its share of the weights and the state, as the table says, and the step writes the state in place.
    assert memory.argument_size_in_bytes == pytest.approx(aot.share((params, s)), abs=2**16)
    assert memory.alias_size_in_bytes == pytest.approx(aot.share(s), abs=2**16)
    assert memory.temp_size_in_bytes < 2**23  # a quarter of one full layer's share; StreamingLLM turns its keys on every read
    assert aot.cache_copies(text, s) == 0
    assert (name not in KERNEL) or "tpu_custom_call" in text

    # Two sums of activations a layer and one for the embedding; all else together is smaller than one of them.
    found = collectives(text)
    rows = f"bf16[{B // data},"
    sums = [c for c in found if c.kind == "all-reduce" and c.shape.startswith(rows) and c.shape.endswith(f"{CFG.D}]")]
    others = sum(c.bytes for c in found if c not in sums)
    assert len(sums) == 2 * CFG.L + 1
    assert others < 2**16 or name == "AdaKV"
    assert others < 2**20


def test_weights_are_shared_out(aot):
    """Every weight but the norms is split over model=8, so a chip holds an eighth."""
    params = aot.on_mesh(aot.abstract(CFG, aot.BFLOAT16), sharding.mesh(1, 8, aot.chips()))
    whole = sum(x.size * x.dtype.itemsize for x in aot.jax.tree.leaves(params))
    assert aot.share(params) == pytest.approx(whole / 8, rel=1e-3)
