"""Selection policies against their oracles: chosen rows and logits."""

import dataclasses
from math import ceil

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from oracles import selection as oracle
from oracles.against import agree, dense

from tokeff.kernels import decode_attention
from tokeff.kv.shadow import ShadowKV, low_rank
from tokeff.sparse.methods import tidaldecode
from tokeff.sparse.select import slots_of

pytestmark = pytest.mark.core
TIDAL = {
    "one selection": tidaldecode(0.375, dense=(0,), select=(1,), recent=8),
    "no recent rows, as published": tidaldecode(0.375, dense=(0,), select=(1,), recent=0),
    "chosen again": tidaldecode(0.375, dense=(), select=(0, 2), recent=8),
}
SHADOW = ShadowKV(0.25, rank=0.5, chunk_rows=4, outliers=0.1, local=2)


@pytest.mark.parametrize("name", TIDAL)
def test_tidaldecode_equals_its_oracle(name):
    policy = TIDAL[name]
    far = [ceil(policy.budget * n) - policy.recent for n in tiny.LENGTHS]
    caches = [oracle.TidalDecode(*dense(b)[:2], far[b], policy.recent, policy.dense, policy.select) for b in range(2)]
    agree(policy, caches)


@pytest.mark.parametrize("rank", [0.5, 1.0])
def test_shadowkv_equals_its_oracle(rank):
    policy = dataclasses.replace(SHADOW, rank=rank)
    R, caches = policy.chunk_rows, []
    for b, n in enumerate(tiny.LENGTHS):
        read, outliers = ceil(policy.budget * n) // R, max(1, round(policy.outliers * (n // R)))
        caches.append(oracle.ShadowKV(*dense(b)[:2], read, round(rank * 16), R, outliers, policy.local))
    agree(policy, caches, compare_kept=False)


@pytest.mark.parametrize("rank", [1, 5, 16])
def test_low_rank_keys_are_the_best_of_their_rank(rank):
    """The error of the factors is the truncated singular values, which no matrix of that rank can beat (Eckart-Young)."""
    x = np.random.default_rng(0).normal(size=(2, 40, 16)) * np.linspace(0.1, 3, 16)
    low, basis = low_rank(jnp.asarray(x, jnp.float32), rank)
    error = np.linalg.norm(x - np.asarray(low) @ np.asarray(basis), axis=(1, 2))
    lost = [np.linalg.norm(np.linalg.svd(row)[1][rank:]) for row in x]
    np.testing.assert_allclose(error, lost, rtol=1e-3, atol=1e-4)


def test_shadow_reads_more_exactly_as_rank_grows():
    """There is no full-rank identity at rank < 1: the error must fall with rank instead."""
    model, seen, _ = dense(0)
    sizes = [np.linalg.norm(np.stack([s.k[o].reshape(-1) for o in s.orders])) for s in seen]
    errors = []
    for rank in (2, 6, 12, 16):
        cut = oracle.ShadowKV(model, seen, 4, rank, 4, 1, 2).low
        errors.append(sum(
            np.linalg.norm(np.stack([(s.k[o] - low[o]).reshape(-1) for o in s.orders])) / size
            for s, low, size in zip(seen, cut, sizes, strict=True)
        ))  # fmt: skip
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-9


def test_selection_crosses_layers_of_different_capacity():
    """Orders, not slots, cross layers: a layer that lacks a row does not read it, whatever its slots are."""
    order = jnp.asarray([[[2, 5, 9, 11, -1, -1]]])
    wanted = jnp.asarray([[[9, 3, 2, -1, 11, 40]]])
    assert slots_of(order, wanted)[0, 0].tolist() == [2, -1, 0, -1, 3, -1]
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, 1, 1, 8), (1, 1, 6, 8), (1, 1, 6, 8)))
    lo, hi = jnp.zeros((1, 1), jnp.int32), jnp.full((1, 1), 30)
    out, _ = decode_attention(q, k, v, order, lo, hi, page_BKM=slots_of(order, wanted), scale=0.3)
    some = jnp.array([0, 2, 3])
    few, _ = decode_attention(q, k[:, :, some], v[:, :, some], order[:, :, some], lo, hi, scale=0.3)
    np.testing.assert_allclose(out, few, atol=1e-6)
