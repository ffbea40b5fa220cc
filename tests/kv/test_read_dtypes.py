"""float32 activations over a bfloat16 cache: queries are asked in the cache's dtype, so kernels, which want one dtype, take the call."""

from unittest import mock

import jax
import jax.numpy as jnp
import pytest
import tiny

from tokeff.decode.loop import run
from tokeff.decode.methods import token_recycling
from tokeff.decode.sample import GREEDY
from tokeff.kernels import dispatch
from tokeff.kv import methods as kv
from tokeff.kv.policy import Full
from tokeff.kv.prefill import prefill
from tokeff.sparse.methods import quest

pytestmark = pytest.mark.core
TREE = token_recycling(tree=tiny.TREE)
READS = {
    "quant_decode": (kv.kivi(4, 8, 8), tiny.PLAIN),
    "page_scores": (quest(0.5, 4, (0,), 8), tiny.PLAIN),
    "lowrank_scores": (kv.shadowkv(0.25), tiny.PLAIN),
    "tree_attention": (Full(), TREE),
}


@pytest.mark.parametrize("op", READS)
def test_a_kernel_gets_one_dtype(op):
    policy, drafter = READS[op]
    tokens, length = tiny.padded(tiny.prompts())
    prompt = prefill(tiny.params(), tiny.CFG, tokens, length, evidence=policy.needs(), dtype="bfloat16")
    s, found, call = tiny.start(prompt, policy, drafter, new=4), [], dispatch.call

    def recorded(spec, implementation, mesh, arrays, **options):
        found.append((spec.name, {x.dtype.name for x in arrays[: spec.floats] if x is not None}))
        return call(spec, implementation, mesh, arrays, **options)

    with mock.patch.object(dispatch, "call", recorded):
        how = dict(policy=policy.onward(), drafter=drafter, how=GREEDY, eos=())
        jax.eval_shape(lambda s: run(tiny.params(), tiny.CFG, s, jnp.int32(4), **how), s)
    assert {kinds == {"bfloat16"} for name, kinds in found if name == op} == {True}
