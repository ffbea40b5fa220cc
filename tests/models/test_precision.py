"""`Precision`: which dtypes are the default where, and what is float32 whatever it says."""

import jax
import jax.numpy as jnp
import pytest
import tiny

from tokeff.kv.cache import Room
from tokeff.kv.extend import extend, pack
from tokeff.kv.methods import h2o
from tokeff.kv.policy import Ask
from tokeff.kv.prefill import prefill
from tokeff.models.config import Precision
from tokeff.models.layout import abstract

pytestmark = pytest.mark.core
HALF = Precision("bfloat16", "bfloat16", "bfloat16")


@pytest.mark.parametrize(("platform", "precision"), [("cpu", Precision()), ("gpu", HALF), ("tpu", HALF), (None, Precision())])
def test_defaults(platform, precision):
    """None is the machine of these tests, a CPU."""
    assert Precision.default(platform) == precision


def read_and_decode(params, tokens_BT, length_B):
    """A prompt that was asked for attention, and a token behind it under a policy that goes on asking: (prompt, logits, layers)."""
    prompt = prefill(params, tiny.CFG, tokens_BT, length_B, evidence=(Ask(),), dtype=HALF.cache)
    layers = pack(h2o(0.5), prompt.layers, Room(1), tiny.CFG)
    return prompt, *extend(params, tiny.CFG, layers, tokens_BT[:, :1], prompt.next_B, jnp.ones_like(length_B), h2o(0.5))


def given() -> tuple:
    B, T = len(tiny.LENGTHS), max(tiny.LENGTHS)
    return abstract(tiny.CFG, HALF), jax.ShapeDtypeStruct((B, T), jnp.int32), jax.ShapeDtypeStruct((B,), jnp.int32)


def test_logits_and_attention_mass_are_float32_under_bfloat16():
    prompt, logits, layers = jax.eval_shape(read_and_decode, *given())
    assert {x.dtype for layer in prompt.layers for x in (layer.k_BKSH, layer.v_BKSH)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for layer in layers for x in (layer.k_BKCH, layer.v_BKCH)} == {jnp.dtype("bfloat16")}
    assert prompt.logits_BV.dtype == logits.dtype == jnp.float32
    masses = [layer.evidence_BKS[Ask()] for layer in prompt.layers] + [layer.mass_BKC for layer in layers]
    assert {x.dtype for x in masses} == {jnp.dtype("float32")}


def equations(jaxpr):
    """Every equation of a program, those of the functions that it calls included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_softmax_and_norms_are_float32_under_bfloat16():
    """Exponentials, their logarithms and inverse roots. The activation's own (a sigmoid) is not among them."""
    names, program = ("exp", "exp2", "log", "rsqrt"), jax.make_jaxpr(read_and_decode)(*given())
    found = [eqn for eqn in equations(program) if eqn.primitive.name in names]
    assert {eqn.primitive.name for eqn in found} >= {"exp", "log", "rsqrt"}
    assert {eqn.invars[0].aval.dtype for eqn in found} == {jnp.dtype("float32")}
