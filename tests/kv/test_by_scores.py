"""What the scores decide: low bits of keys and values of rows against naive oracles, what is really left unread, and what it counts."""

from math import ceil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
from oracles import model
from oracles import spatten as oracle
from oracles.against import GIVEN, STEPS, dense

from tokeff.errors import UserError
from tokeff.kv import methods as kv
from tokeff.kv.by_scores import ByScores, read_again
from tokeff.kv.cache import Room
from tokeff.kv.planes import Split
from tokeff.kv.policy import Full, Prefilled, tree_bytes
from tokeff.models.config import Config
from tokeff.models.flow import EMPTY, Flow, Here

pytestmark = [pytest.mark.core, pytest.mark.xdist_group("SpAttenCache")]
FULL, ATOL = Full(), 2e-5


def share(of: float, n: int) -> int:
    return ceil(round(of * n, 6))


# -- against the oracle


@pytest.mark.parametrize(("high", "low", "group"), [(8, 4, 8), (4, 4, 32), (2, 2, 4), (4, 8, 16)])
def test_codes_equal_their_oracle(high, low, group):
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 16)).astype(np.float32)
    split = Split(high, low, group)
    keys = split.encode(jnp.asarray(x))
    assert keys.high_BKCZ.shape[-1] == 16 * high // 8 and keys.low_BKCZ.shape[-1] == 16 * low // 8
    # Unit queries get the numbers of the keys.
    q = jnp.broadcast_to(jnp.eye(16)[None, :, None], (2, 16, 3, 16))
    first = split.upper(q, keys, 1.0)
    both = split.both(q, keys, 1.0, first, jnp.ones(first.shape[:4], bool))
    for b, k, t in np.ndindex(2, 3, 5):
        wanted = oracle.codes(x[b, k, t].astype(np.float64), high, low, min(group, 16))
        for got, want in zip((first, both), wanted, strict=True):
            np.testing.assert_allclose(got[b, k, 0, :, t], want, atol=1e-5)


CASES = {
    "keys as they are, values of a share": (kv.spatten_cache(None, values=0.3), lambda n: dict(values=share(0.3, n))),
    "values of a number": (kv.spatten_cache(None, values=7), lambda n: dict(values=7)),
    "high bits alone": (kv.spatten_cache(4, 4, 0.0, 1.0, 8), lambda n: dict(bits=(4, 4, 8))),
    "all bits": (kv.spatten_cache(2, 4, 2.0, 1.0, 4), lambda n: dict(bits=(2, 4, 4), tau=2.0)),
    "low bits where attention is flat": (kv.spatten_cache(2, 8, 0.5, 1.0, 8), lambda n: dict(bits=(2, 8, 8), tau=0.5)),
    "both": (kv.spatten_cache(4, 4, 0.4, 0.2, 8), lambda n: dict(bits=(4, 4, 8), tau=0.4, values=share(0.2, n))),
}


def follow(policy, caches) -> tuple:
    """The layers after STEPS given tokens, whose logits are those of the oracles.

    In code a number may be one step off, where float32 and float64 round it to different sides; in all of a cache some are.
    """
    prompt = runs.prompt()
    packed, atol = tiny.packed(policy, prompt, Room(STEPS)), 5e-4 if policy.keys is None else 5e-3
    steps = [model.decode(c.m, c, GIVEN[b], tiny.LENGTHS[b]) for b, c in enumerate(caches)]
    layers = packed
    for logits, now in tiny.forced(policy, packed, prompt, GIVEN):
        np.testing.assert_allclose(logits, np.stack([next(step)[0] for step in steps]), atol=atol)
        layers = now
    return layers


@pytest.mark.parametrize("name", CASES)
def test_decoding_equals_the_oracle(name):
    """Logits of ragged prompts, and how often low bits were read."""
    policy, given = CASES[name]
    caches = [oracle.Reads(*dense(b)[:2], **given(n)) for b, n in enumerate(tiny.LENGTHS)]
    layers = follow(policy, caches)
    for b, cache in enumerate(caches):
        assert [layer.again_BK[b].tolist() for layer in layers] == cache.again
        assert all(int(layer.calls_B[b]) == (STEPS if policy.keys else 0) for layer in layers)
    if policy.keys is None:
        return
    many = sum(sum(map(sum, cache.again)) for cache in caches)
    assert read_again(layers) == pytest.approx(many / (len(caches) * tiny.CFG.L * tiny.CFG.K * STEPS))
    if 0 < policy.keys.tau < 1:
        assert 0 < read_again(layers) < 1, "some heads must find something and some not"
    else:
        assert read_again(layers) == float(policy.keys.tau > 1)


def test_what_another_rule_kept():
    """SnapKV's rows in planes: the same rows, and values of a share of those that are left."""
    rule = kv.snapkv(0.5, 6)
    packed, caches = tiny.packed(rule, runs.prompt()), []
    for b, n in enumerate(tiny.LENGTHS):
        kept = [tiny.kept(rule, layer)[b] for layer in packed]
        values = share(0.5, share(0.5, n))
        caches.append(oracle.Reads(*dense(b)[:2], (4, 4, 8), 0.4, values, keep=lambda layer, head, kept=kept: kept[layer][head]))
    policy = kv.spatten_cache(4, 4, 0.4, 0.5, 8, rule)
    for i, layer in enumerate(follow(policy, caches)):
        for b, heads in enumerate(tiny.kept(policy, layer)):
            assert heads == [caches[b].kept(i, h) for h in range(tiny.CFG.K)]


# -- random shapes


def layer_of(rng, B, K, H, S) -> tuple[Prefilled, list[int]]:
    lengths = [S, *rng.integers(S // 2, S, B - 1).tolist()]
    k, v = (jnp.asarray(rng.normal(size=(B, K, S, H)), jnp.float32) for _ in range(2))
    order = jnp.asarray([[[*range(n), *[EMPTY] * (S - n)]] for n in lengths], jnp.int32)
    return Prefilled(k, v, order, jnp.asarray(lengths, jnp.int32), jnp.int32(0), {}), lengths


def asked(rng, cfg, lengths, T) -> tuple[list[jax.Array], Flow]:
    shapes = [(len(lengths), T, n, cfg.H) for n in (cfg.N, cfg.K, cfg.K)]
    order = jnp.asarray(lengths, jnp.int32)[:, None] + jnp.arange(T, dtype=jnp.int32)
    return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes], Flow(jnp.zeros((*order.shape, cfg.D)), order, order, order)


@pytest.mark.parametrize("shape", [(1, 1, 1, 8, 9, 1), (3, 2, 3, 16, 33, 1), (2, 3, 2, 8, 20, 4), (2, 1, 4, 32, 40, 2)])
def test_random_rows_equal_the_oracle(shape):
    """Attention over random ragged rows, one or several certain rows at once: gathered, or all read where that is less."""
    B, K, G, H, S, T = shape
    cfg, rng = Config("random", V=8, D=8, F=8, L=1, N=G * K, K=K, H=H, max_len=64), np.random.default_rng(S)
    policy, here = kv.spatten_cache(4, 4, 0.3, 0.25, 8), Here(0, cfg)
    rows, lengths = layer_of(rng, B, K, H, S)
    (q, k, v), flow = asked(rng, cfg, lengths, T)
    layer = jax.jit(lambda rows: policy.pack_layer(rows, Room(T), here))(rows)
    out, layer, _ = jax.jit(lambda *x: policy.attend(*x, flow, flow, layer, None, None, here))(q, k, v)
    turned = [np.asarray(here.rotate(x, flow.angle_BT[:, :, None]), np.float64) for x in (q, k)]
    again = np.zeros((B, K), int)
    for b, h in np.ndindex(B, K):
        keys = {o: np.asarray(rows.k_BKSH[b, h, o], np.float64) for o in range(lengths[b])}
        values = {o: np.asarray(rows.v_BKSH[b, h, o], np.float64) for o in range(lengths[b])}
        for t in range(T):
            keys[lengths[b] + t], values[lengths[b] + t] = turned[1][b, t, h], np.asarray(v[b, t, h], np.float64)
            dot = lambda q, k: q @ k * cfg.scale  # noqa: E731
            wanted, more = oracle.read(turned[0][b, t, h * G : (h + 1) * G], keys, values, dot, (4, 4, 8), 0.3, share(0.25, lengths[b]))
            again[b, h] = max(again[b, h], more)
            np.testing.assert_allclose(out[b, t, h * G : (h + 1) * G], wanted, atol=ATOL)
    np.testing.assert_array_equal(layer.again_BK, again)
    np.testing.assert_array_equal(layer.calls_B, 1)


# -- what is not read


def packed_layer(policy, prompt):
    return tiny.packed(policy, prompt, Room(1))[1]


def test_low_bits_that_nobody_asks_for_are_not_read():
    """Other low bits change what the heads that ask say, and nothing else, to the bit."""
    policy, prompt = kv.spatten_cache(2, 8, 0.5, 1.0, 8), runs.prompt()
    here, (q, k, v) = Here(1, tiny.CFG), runs.asks()
    q = q * jnp.asarray([9.0, 9.0, 0.1, 0.1])[:, None]  # the first kv head finds something, the second does not
    layer = packed_layer(policy, prompt)
    order = prompt.next_B[:, None]
    flow = Flow(jnp.zeros((2, 1, tiny.CFG.D)), order, order, order)
    step = jax.jit(lambda layer: policy.attend(q, k, v, flow, flow, layer, None, None, here)[:2])
    (out, after), spoiled = step(layer), layer.planes.replace(low_BKCZ=layer.planes.low_BKCZ ^ 255)
    other, _ = step(layer.replace(planes=spoiled))
    asks = np.asarray(after.again_BK).astype(bool)
    assert asks.tolist() == [[False, True]] * 2
    same = np.asarray(out == other).reshape(2, tiny.CFG.K, -1).all(axis=-1)
    np.testing.assert_array_equal(same, ~asks)


def uses(jaxpr, var) -> list[str]:
    """What a program does with one of its variables, at its own level."""
    return [eqn.primitive.name for eqn in jaxpr.eqns for v in eqn.invars if v is var]


def test_low_bits_go_into_a_loop_over_the_heads_that_ask():
    """The program's only use of them is a loop, which takes one head a turn and as many turns as heads ask."""
    split, q = Split(8, 4, 8, 0.1), jnp.zeros((2, 1, 4, 8))
    keys = split.encode(jnp.zeros((2, 2, 64, 8)))
    product, asks = split.upper(q, keys, 1.0), jnp.zeros((2, 2, 2, 1), bool)

    def both(low):
        return split.both(q, keys.replace(low_BKCZ=low), 1.0, product, asks)

    jaxpr = jax.make_jaxpr(both)(keys.low_BKCZ).jaxpr
    (loop,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "while"]
    assert uses(jaxpr, jaxpr.invars[0]) == ["while"]
    body, at = loop.params["body_jaxpr"].jaxpr, loop.invars.index(jaxpr.invars[0]) - loop.params["cond_nconsts"]
    assert uses(body, body.invars[at]) == ["dynamic_slice"]


def test_values_of_other_rows_are_not_read():
    """NaN in the values of all rows but the most probable ones goes nowhere."""
    policy, whole, prompt = kv.spatten_cache(None, values=9), ByScores(FULL), runs.prompt()
    here, (q, k, v) = Here(1, tiny.CFG), runs.asks()
    order = prompt.next_B[:, None]
    flow = Flow(jnp.zeros((2, 1, tiny.CFG.D)), order, order, order)
    turned, key = (here.rotate(x, flow.angle_BT[:, :, None]) for x in (q, k))
    layer = whole.append(packed_layer(whole, prompt), key.swapaxes(1, 2), v.swapaxes(1, 2), flow, None)
    p = np.asarray(whole.probabilities(turned, layer, None, flow, here)[0]).sum(axis=(2, 3))
    rank = np.argsort(np.argsort(-p, axis=-1, kind="stable"), axis=-1)
    layer = packed_layer(policy, prompt)
    spoiled = layer.replace(v_BKCH=jnp.where(jnp.asarray(rank < 9)[..., None], layer.v_BKCH, jnp.nan))
    step = jax.jit(lambda layer: policy.attend(q, k, v, flow, flow, layer, None, None, here)[0])
    np.testing.assert_array_equal(step(spoiled), step(layer))


def test_bytes():
    """Planes, a zero and a step a group, values, orders; of the values a step reads what `values` says, of the planes at most all."""
    prompt, K, H, rows, B = runs.prompt(), tiny.CFG.K, tiny.CFG.H, max(tiny.LENGTHS) + 8, 2
    for high, low in ((8, 4), (4, 2)):
        policy = kv.spatten_cache(high, low, values=0.25, group=8)
        layer = tiny.packed(policy, prompt, Room(8))[1]
        keys, small = B * K * rows * (H * (high + low) // 8 + 2 * 4), B * K * rows * 4 + 4 * (3 * B + B * K)
        assert tree_bytes(layer.planes) == keys and tree_bytes(layer) == keys + B * K * rows * H * 4 + small
        assert policy.bytes_read(layer, Here(1, tiny.CFG)) == keys + B * K * 16 * H * 4 + small
    plain = tiny.packed(kv.spatten_cache(None, values=1.0), prompt, Room(8))[1]
    assert plain.planes is None and kv.spatten_cache(None, values=1.0).bytes_read(plain, Here(1, tiny.CFG)) == tree_bytes(plain)


# -- settings


BAD = {
    "bits that do not divide a byte": (kv.spatten_cache(6, 4), "bits"),
    "low bits that do not": (kv.spatten_cache(8, 3), "bits"),
    "a group that does not divide the row": (kv.spatten_cache(group=3), "group"),
    "no threshold": (kv.spatten_cache(tau=float("nan")), "tau"),
    "a negative threshold": (kv.spatten_cache(tau=-0.1), "tau"),
    "no values": (kv.spatten_cache(values=0), "values"),
    "more values than rows": (kv.spatten_cache(values=65), "values"),
    "values of another kind": (kv.spatten_cache(values="0.5"), "values"),  # type: ignore[arg-type]
    "a rule that evicts": (kv.spatten_cache(rule=kv.h2o(0.5)), "evict"),
    "a rule with its own store": (kv.spatten_cache(rule=kv.adakv(0.5, 6)), "store"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings(name):
    policy, word = BAD[name]
    with pytest.raises(UserError, match=word) as error:
        policy.check(tiny.CFG, 64)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200
