"""Drafts under every listed policy equal one-token decoding under it, strictly: in float64, where equal tokens mean equal algorithms.

Attention, its mass and draft rows are float64 (tests/oracles/float64.py); what kernels read of codes and bounds is float32 by contract.
"""

import jax.numpy as jnp
import pytest
import tiny
from oracles.float64 import float64_model
from runs import listed, part

from tokeff.decode.methods import token_recycling

pytestmark = [pytest.mark.core, pytest.mark.proof]
RECYCLING = token_recycling(tiny.TREE)


@pytest.fixture(autouse=True, scope="module")
def double():
    with float64_model():
        assert tiny.params(tiny.CFG, "float64").norm_D.dtype == jnp.float64
        yield


@pytest.mark.parametrize("name", listed("kv"))
def test_drafts_under_a_policy_equal_one_token_decoding(name):
    """Trees, ragged batch, eviction in blocks, compared with eviction at the same boundaries. Every day for those that
    tests/decode/test_lossless.py names."""
    policy = part(name, "fast")["kv"]
    assert policy.drafts(RECYCLING.depth) is None, "with `fast` its listing says settings in which drafts are exact"
    s = tiny.decode(policy, RECYCLING, T=max(tiny.LENGTHS), dtype="float64")
    assert tiny.text(s) == tiny.text(tiny.decode(policy, T=max(tiny.LENGTHS), dtype="float64"))
    assert int(s.passes_B.min()) < tiny.NEW - 1, "no draft was ever accepted, so nothing was tested"
