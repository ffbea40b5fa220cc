"""Causality of every listed method: nothing that was computed for a row depends on rows that come later.

Behind the prompt that is meant to the bit: other tokens behind a place leave the logits up to it as they were. In the prompt, a pass may
choose by the end which rows go on, and a pattern which blocks are read. A choice has no gradient, so that of the keys and values of a
row with respect to later inputs is zero all the same.
"""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
from runs import listed, part

from tokeff.kv.extend import extend
from tokeff.kv.prefill import prefill

pytestmark = pytest.mark.core
KNOWN = 3  # of the tokens behind the prompt
PLACE = 40  # in the prompt, which has tokens below HALF up to there and tokens above it from there on
HALF = tiny.CFG.V // 2
DAILY = ("Full", "H2O", "AdaKV", "TidalDecode", "PromptDistill", "TriShape")


@pytest.mark.parametrize("name", tiny.sampled(runs.ways_of_going_on(), DAILY))
def test_later_tokens_leave_earlier_logits(name):
    """Several certain rows in one call, where the policy takes them so; one by one where it must, which is seen to be so."""
    policy, p = part(name)["kv"], runs.prompt()
    packed, length = tiny.packed(policy, p), jnp.full(len(tiny.LENGTHS), runs.STEPS)
    other = np.where(np.arange(runs.STEPS) < KNOWN, runs.GIVEN, (runs.GIVEN + 1) % tiny.CFG.V)
    given, changed = (
        np.asarray(extend(tiny.params(), tiny.CFG, packed, jnp.asarray(tokens, jnp.int32), p.next_B, length, policy)[0])
        for tokens in (runs.GIVEN, other)
    )
    np.testing.assert_array_equal(given[:, :KNOWN], changed[:, :KNOWN])
    assert (given[:, KNOWN:] != changed[:, KNOWN:]).any(axis=-1).all()


@cache
def halves() -> tuple[tuple[int, ...], ...]:
    """Prompts of LENGTHS in which no token before PLACE stands behind it."""
    rng = np.random.default_rng(3)
    return tuple((*rng.integers(0, HALF, PLACE).tolist(), *rng.integers(HALF, tiny.CFG.V, n - PLACE).tolist()) for n in tiny.LENGTHS)


@jax.jit
def told(layer, place_BM) -> jax.Array:
    """A number that tells of the keys and values of one layer's rows before PLACE in the text."""
    order = layer.order_BKS
    place = order if place_BM is None else jnp.take_along_axis(place_BM[:, None], jnp.maximum(order, 0), axis=2)
    early = ((order >= 0) & (place < PLACE))[..., None]
    return sum(jnp.where(early, jnp.sin(x), 0).sum() for x in (layer.k_BKSH, layer.v_BKSH))


@pytest.mark.parametrize("name", tiny.sampled(listed("cut", "prefill"), DAILY))
def test_rows_of_a_prompt_have_no_gradient_of_later_inputs(name):
    """The embeddings of tokens that stand only behind a place have no part in any key or value before it."""
    cut, pattern = part(name).get("cut"), part(name).get("prefill")
    if hasattr(pattern, "earlier"):  # rows that are taken over were computed behind the rows of another prompt: one without later tokens
        pattern = dataclasses.replace(pattern, earlier=halves()[0][: PLACE // 2])
    tokens, length = tiny.padded(halves())

    def early(embed_VD):
        prompt = prefill(tiny.params().replace(embed_VD=embed_VD), tiny.CFG, tokens, length, cut=cut, pattern=pattern)
        return sum(told(layer, prompt.place_BM) for layer in prompt.layers)

    size = np.abs(np.asarray(jax.grad(early)(tiny.params().embed_VD))).sum(axis=1)
    assert (size[:HALF] > 0).any() and (size[HALF:] == 0).all()
