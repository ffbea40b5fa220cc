"""The compiled decode step of a model of SmolLM2's shape (2 layers, 2048 rows) moves no array of cache or weight size."""

import hlo
import jax
import jax.numpy as jnp
import pytest
import tiny

from tokeff.bench.decode import policies
from tokeff.decode.draft import Plain
from tokeff.decode.loop import run
from tokeff.decode.methods import prompt_lookup
from tokeff.generation import Setup, decoding
from tokeff.kv.policy import Prefilled
from tokeff.models.config import Config, Precision
from tokeff.models.layout import abstract

pytestmark = pytest.mark.core
CFG = Config("smol", V=49152, D=576, F=1536, L=2, N=9, K=3, H=64, max_len=8192)
ROWS, NEW = 2048, 32


def compiled(policy, drafter):
    """The optimised program of the decode loop, compiled from shapes alone."""
    setup = Setup(policy, None, drafter)

    def struct(*shape, dtype="float32"):
        return jax.ShapeDtypeStruct(shape, dtype)

    rows, count = struct(1, CFG.K, ROWS, CFG.H), struct(1, dtype="int32")
    evidence = {ask: struct(1, CFG.K, ROWS) for ask in policy.needs()}
    layers = (Prefilled(rows, rows, struct(1, 1, ROWS, dtype="int32"), count, struct(dtype="int32"), evidence),) * CFG.L

    def begin(layers, tokens, length, logits):
        packed = policy.pack(layers, setup.room(NEW), CFG)
        return decoding(packed, tokens, length, length, logits, setup, NEW, 0, ())

    s = jax.eval_shape(begin, layers, struct(1, ROWS, dtype="int32"), count, struct(1, CFG.V))
    args = dict(policy=policy, drafter=drafter, how=setup.sampling, eos=())
    program = run.lower(abstract(CFG, Precision()), CFG, s, jnp.int32(NEW), **args)
    return tiny.compiled(program), {hlo.size(x) for layer in s.layers for x in (layer.k_BKCH, layer.v_BKCH)}


@pytest.mark.parametrize("method", ["Full", "SnapKV", "H2O", "Recent"])
@pytest.mark.parametrize("drafter", [Plain(), prompt_lookup(7)], ids=["plain", "lookup"])
def test_no_copies_of_cache_or_weights(method, drafter):
    (policy,) = policies([method], 0.1).values()
    if drafter.nodes > 1 and policy.drafts(drafter.depth):
        pytest.skip("evicts every row: no drafts")
    program, cache = compiled(policy, drafter)
    weights = {hlo.size(x) for x in jax.tree.leaves(abstract(CFG, Precision())) if len(x.shape) > 1}
    assert hlo.made(program.as_text(), cache | weights) == []
    assert hlo.moved(program.as_text(), cache | weights) == []


def test_a_copy_would_be_seen():
    """The reader of programs finds a transposed cache and a transposed weight."""
    cache, weight = (jax.ShapeDtypeStruct(s, "float32") for s in ((1, 3, 2112, 64), (CFG.V, 576)))

    def body(carry):
        i, cache, weight = carry
        return i + 1, cache.swapaxes(2, 3).reshape(cache.shape), weight.T.reshape(weight.shape)

    def loop(cache, weight):
        return jax.lax.while_loop(lambda c: c[0] < 9, body, (0, cache, weight))

    text = tiny.compiled(jax.jit(loop, donate_argnums=(0, 1)).lower(cache, weight)).as_text()
    for x in (cache, weight):
        assert hlo.made(text, {hlo.size(x)}) and hlo.moved(text, {hlo.size(x)})
