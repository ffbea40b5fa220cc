"""Rows in code: the bits, the error of a code, KIVI and what it composes with against oracles, and the bytes it really holds."""

from math import ceil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from oracles import policies
from oracles import quant as oracle
from oracles.against import STEPS, agree, dense, read

from tokeff.errors import UserError
from tokeff.kernels.quant_decode.codes import pack_bits, unpack_bits
from tokeff.kv import methods as kv
from tokeff.kv.cache import Room
from tokeff.kv.coded import Fold
from tokeff.kv.extend import pack
from tokeff.kv.policy import Full, tree_bytes
from tokeff.kv.quant import ByChannel, ByToken

pytestmark = pytest.mark.core
BITS = (2, 4, 8)


def rows(seed: int, *shape: int) -> np.ndarray:
    """Normal numbers, a few channels of which are large and off zero, as in real keys."""
    x = np.random.default_rng(seed).normal(size=shape)
    x[..., 1] = 8 * x[..., 1] + 30
    return x.astype(np.float32)


@pytest.mark.parametrize("bits", BITS)
def test_bits_are_packed_and_come_back(bits):
    code = np.random.default_rng(0).integers(0, 2**bits, (3, 5, 16))
    packed = pack_bits(jnp.asarray(code), bits)
    assert packed.dtype == jnp.uint8 and packed.shape == (3, 5, 2 * bits)
    np.testing.assert_array_equal(unpack_bits(packed, bits), code)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["keys", "values"])
def test_error_is_at_most_half_a_step(kind, bits, dtype):
    """The bound of rounding: half the distance of two neighbouring codes. bfloat16 steps are themselves rounded by 2**-9."""
    x = jnp.asarray(rows(0, 2, 2, 3, 8, 16), dtype)
    coder = ByChannel(bits) if kind == "keys" else ByToken(bits, 8)
    code = coder.encode(x, True)
    step = jnp.repeat(code.step_BKPRQ, 8, axis=-1) if kind == "values" else code.step_BKPRQ
    error = jnp.abs(coder.decode(code).astype("float32") - x.astype("float32"))
    slack = 1e-5 if dtype == "float32" else 2.0**-8 * (jnp.abs(x).astype("float32") + 2.0**bits * step.astype("float32"))
    assert (error <= 0.5 * step.astype("float32") * (1 + 1e-5) + slack).all()


@pytest.mark.parametrize("bits", BITS)
def test_codes_equal_their_oracles(bits):
    x = rows(1, 1, 2, 3, 4, 16)
    coders = ByChannel(bits), ByToken(bits, 4)
    keys, values = (jax.jit(lambda x, c=coder: c.decode(c.encode(x, True)))(jnp.asarray(x)) for coder in coders)
    for k in range(2):
        for p in range(3):
            np.testing.assert_allclose(keys[0, k, p], oracle.by_channel(x[0, k, p], bits), atol=1e-4)
            np.testing.assert_allclose(values[0, k, p], oracle.by_token(x[0, k, p], bits, 4), atol=1e-4)


def test_groups_without_a_range_are_exact():
    x = jnp.full((1, 1, 1, 4, 8), -3.25)
    for coder in (ByChannel(2), ByToken(2, 4)):
        np.testing.assert_array_equal(coder.decode(coder.encode(x, True)), x)


class KiviApart(oracle.Kivi):
    """Values of 4 bits, keys of the given ones."""

    def values(self, rows_SH, prompt):
        return oracle.by_token(rows_SH, 4, self.group)


KIVI = {
    "2 bits": (kv.kivi(2, 4, 4), (2, 4, 4)),
    "4 bits": (kv.kivi(4, 4, 8), (4, 4, 8)),
    "a window longer than the group": (kv.kivi(4, 8, 16), (4, 8, 16)),
    "nothing coded": (kv.kivi(2, 8, 1024), (2, 8, 1024)),
}


@pytest.mark.parametrize("name", KIVI)
def test_kivi_equals_its_oracle(name):
    policy, given = KIVI[name]
    agree(policy, [oracle.Kivi(*dense(b)[:2], *given) for b in range(2)])


def test_keys_and_values_of_other_bits_equal_their_oracle():
    """2 bits for keys and 4 for values: the kernel takes one number of bits, so they are decoded for the read."""
    agree(Fold(Full(), ByChannel(2), ByToken(4, 8), page=8, window=8), [KiviApart(*dense(b)[:2], 2, 8, 8) for b in range(2)])


def test_snapkv_under_4_bits_equals_its_oracle():
    policy = kv.kivi(4, 4, 4, rule=kv.snapkv(0.5, 6))
    caches = []
    for b, n in enumerate(tiny.LENGTHS):
        model, seen, _ = dense(b)
        kept = policies.SnapKV(model, seen, ceil(0.5 * n), 6, 5, "avg")
        caches.append(oracle.Kivi(model, seen, 4, 4, 4, kept.kept))
    agree(policy, caches)


def test_bytes_are_those_of_the_codes():
    """A byte for 8 / bits numbers, a zero and a step a group in the dtype of the cache, a 4-byte order a row; and the window."""
    prompt, K, H, rows = read(()), tiny.CFG.K, tiny.CFG.H, max(tiny.LENGTHS)
    for bits in BITS:
        for layer in pack(kv.kivi(bits, 8, 8), prompt.layers, Room(STEPS), tiny.CFG):
            codes = 2 * rows * H * bits // 8
            groups = 2 * 4 * (rows // 8 * H + rows)
            assert tree_bytes(layer.prompt) == 2 * K * (codes + groups + 4 * rows)
            assert layer.window.capacity == 8 and layer.prompt.key.code_BKPRZ.dtype == jnp.uint8
            assert tree_bytes(layer) < tree_bytes(pack(Full(), prompt.layers, Room(STEPS), tiny.CFG)[0])


def test_rows_move_from_the_window_to_the_pages():
    """Every row is in one place, and a fold takes a whole window."""
    policy, prompt = kv.kivi(2, 4, 8), read(())
    packed = pack(policy, prompt.layers, Room(20), tiny.CFG)
    given = np.zeros((2, 20), np.int32)
    for t, (_, layers) in enumerate(tiny.forced(policy, packed, prompt, given)):
        for b, n in enumerate(tiny.LENGTHS):
            assert int(layers[0].window.live_B[b]) == (n + t) % 8 + 1
            coded = (n + t) // 8 - n // 8
            assert int(layers[0].pages_B[b]) == 2 * coded
            assert tiny.kept(policy, layers[0])[b][0] == list(range(n + t + 1))


BAD = {
    "bits that do not divide a byte": (kv.kivi(3), "bits"),
    "a group that does not divide the row": (kv.kivi(2, 3, 3), "group"),
    "a window of parts of pages": (kv.kivi(2, 8, 12), "window"),
    "no window": (kv.kivi(2, 8, 0), "window"),
    "a rule that evicts": (kv.kivi(rule=kv.h2o(0.5)), "evict"),
    "a rule with its own store": (kv.kivi(rule=kv.adakv(0.5, 6)), "store"),
    "a rule that turns its keys": (kv.kivi(rule=kv.streaming_llm(0.5, evict=0)), "store"),
    "a rule that is refused": (kv.kivi(rule=kv.snapkv(1.5)), "budget"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings(name):
    policy, word = BAD[name]
    with pytest.raises(UserError, match=word) as e:
        policy.check(tiny.CFG, 64)
    assert "\n" not in str(e.value)


def test_prompts_shorter_than_the_window():
    """Nothing to code yet: equal to dense until the window is full, and it fills while decoding."""
    rows = ((5, 9, 3), (7,))
    policy = Fold(Full(), ByChannel(8), ByToken(8, 8), page=8, window=8)
    whole, coded = (tiny.decode(p, rows=rows, T=8, new=12) for p in (Full(), policy))
    assert [row[:5] for row in tiny.text(whole)] == [row[:5] for row in tiny.text(coded)]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(coded.layers) if jnp.issubdtype(x.dtype, jnp.floating))
