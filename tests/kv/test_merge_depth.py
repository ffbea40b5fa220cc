"""MiniCache, alone and in 4 bits, against its oracle; the arc between directions; the bytes that a pair saves."""

from math import ceil

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from oracles import merging as oracle
from oracles import quant
from oracles.against import STEPS, agree, dense, read

from tokeff.errors import UserError
from tokeff.kv import methods as kv
from tokeff.kv.cache import Room
from tokeff.kv.depth import slerp
from tokeff.kv.extend import pack
from tokeff.kv.policy import tree_bytes

pytestmark = pytest.mark.core


@pytest.mark.parametrize(("first", "pairs", "outliers", "most"), [(0.5, (1,), 0.25, 1.0), (0.0, (0,), 0.75, 0.125)])
def test_minicache_equals_its_oracle(first, pairs, outliers, most):
    """As many rows stay whole as lie in the top of the range, in the second case more than there is memory for."""
    made = [oracle.MiniCache(*dense(b)[:2], pairs, outliers, ceil(most * n)) for b, n in enumerate(tiny.LENGTHS)]
    many = [len(cache.far[pairs[0]]) for cache in made]
    assert all(0 < x < n for x, n in zip(many, tiny.LENGTHS, strict=True)) and len(set(many)) == 2
    assert (many[0] > ceil(most * tiny.LENGTHS[0])) == (most < 1)
    agree(kv.minicache(first, outliers=outliers, most=most), made)


def test_minicache_in_4_bits_equals_its_oracle():
    """The layers of pairs code their directions, the others their rows as KIVI does."""

    made = []
    for b, n in enumerate(tiny.LENGTHS):
        model, seen, _ = dense(b)
        kivi, pairs = quant.Kivi(model, seen, 4, 8, 8), oracle.MiniCache(model, seen, (1,), 0.25, ceil(0.125 * n), code=directions)
        made.append(ByLayer([kivi, pairs, pairs]))
    agree(kv.minicache_4bit(outliers=0.25, group=8, residual=8, most=0.125), made)


class ByLayer:
    """A cache for each layer."""

    def __init__(self, caches):
        self.caches, self.m = caches, caches[0].m

    def attend(self, layer, *row):
        return self.caches[layer].attend(layer, *row)

    def kept(self, layer, head):
        return self.caches[layer].kept(layer, head)


def directions(rows_SH, values):
    """4 bits: keys by channel in pages of 8 rows, the last one filled with zeros; values by token."""
    S = len(rows_SH)
    full = np.concatenate([rows_SH, np.zeros((-S % 8, rows_SH.shape[1]))])
    parts = [full[i : i + 8] for i in range(0, len(full), 8)]
    return np.concatenate([quant.by_token(p, 4, 8) if values else quant.by_channel(p, 4) for p in parts])[:S]


@pytest.mark.parametrize("t", [0.0, 0.6, 1.0])
def test_slerp_walks_the_arc(t):
    rng = np.random.default_rng(0)
    a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in rng.normal(size=(2, 50, 8)))
    a[0], b[1] = b[0], -a[1]  # equal, and opposite
    way, angle = slerp(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), t)
    assert np.isfinite(way).all()
    np.testing.assert_allclose(jnp.linalg.norm(way, axis=-1)[2:], 1, atol=1e-5)
    np.testing.assert_allclose(way[0], a[0], atol=1e-5)
    np.testing.assert_allclose(np.arccos(np.clip((np.asarray(way) * a).sum(-1), -1, 1))[2:], t * np.asarray(angle)[2:], atol=2e-3)


def test_a_pair_holds_its_directions_once():
    prompt = read(())
    plain, cut = (pack(p, prompt.layers, Room(STEPS), tiny.CFG) for p in (kv.full(), kv.minicache(0.5, outliers=0.05)))
    saved = tree_bytes(plain[1:]) - tree_bytes(cut[1:])
    kv_bytes = 2 * 2 * tiny.CFG.K * 64 * tiny.CFG.H * 4
    norms, outliers = 2 * 2 * 2 * tiny.CFG.K * 64 * 4, 2 * 2 * 2 * tiny.CFG.K * 8 * tiny.CFG.H * 4
    assert cut[2].shared is None and saved > kv_bytes - norms - outliers - 4 * 4 * tiny.CFG.K * 90 * 2


BAD = {
    "no pair": (kv.minicache(0.75), "first"),
    "start beyond the end": (kv.minicache(1.5), "first"),
    "more than all of the range": (kv.minicache(outliers=1.5), "outliers"),
    "more than all rows": (kv.minicache(most=1.5), "most"),
    "a rest that drops rows": (kv.minicache(rest=kv.snapkv(0.5, 6)), "rows"),
    "a rest that codes what another keeps": (kv.minicache(rest=kv.kivi(4, rule=kv.snapkv(0.5, 6))), "rows"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings(name):
    policy, word = BAD[name]
    with pytest.raises(UserError, match=word) as e:
        policy.check(tiny.CFG, 64)
    assert "\n" not in str(e.value)
