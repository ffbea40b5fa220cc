"""The decoder's own functions: logits, causality, windows, angles apart from orders, layers left out."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from dense import Causal
from oracles import model as oracle
from oracles import policies
from oracles.against import agree

from tokeff.decode.tree import shape_of
from tokeff.kv import methods as kv
from tokeff.kv.cache import Room
from tokeff.kv.extend import pack
from tokeff.models.config import Rope
from tokeff.models.flow import EMPTY, Accepted, Flow
from tokeff.models.transformer import embed, orders, stack, unembed

pytestmark = [pytest.mark.core, pytest.mark.xdist_group("transformer")]
WINDOWED = dataclasses.replace(tiny.CFG, name="windowed", windows=(16, None, 16), local_rope=Rope(100.0))
T = 24


@partial(jax.jit, static_argnames="cfg")
def logits_of(flow: Flow, cfg=tiny.CFG):
    """logits_BTV of a plain causal pass."""
    flow, *_ = stack(tiny.params(cfg), cfg, flow, (None,) * cfg.L, policy=Causal())
    return unembed(tiny.params(cfg), cfg, flow.x_BTD)


def rows(angle=lambda order: order, tokens=None) -> Flow:
    tokens = jnp.asarray([tiny.prompts()[0][:T]]) if tokens is None else tokens
    order = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), tokens.shape)
    return embed(tiny.params(), tiny.CFG, tokens, order, angle(order))


@pytest.mark.parametrize("cfg", [tiny.CFG, WINDOWED], ids=lambda cfg: cfg.name)
def test_logits_equal_the_naive_forward(cfg):
    given = np.asarray(logits_of(rows(), cfg))[0]
    seen, last = oracle.prefill(oracle.Model(tiny.params(cfg), cfg), tiny.prompts()[0][:T])
    np.testing.assert_allclose(given[-1], last, atol=5e-4)
    _, early = oracle.prefill(oracle.Model(tiny.params(cfg), cfg), tiny.prompts()[0][:9])
    np.testing.assert_allclose(given[8], early, atol=5e-4)


def test_later_inputs_have_no_gradient():
    """Causality: the logits of a row do not depend, not even infinitesimally, on the inputs of later rows."""
    flow = rows()

    def one(x, t):
        return jnp.sum(jnp.sin(logits_of(flow.replace(x_BTD=x))[0, t]))

    slope = jax.jit(jax.grad(one))
    for t in (0, 7, T - 1):
        size = np.abs(np.asarray(slope(flow.x_BTD, t)))[0].sum(axis=1)
        assert (size[: t + 1] > 0).all() and (size[t + 1 :] == 0).all()


def test_only_differences_of_angles_matter_and_orders_do_not():
    """Angles are not orders: shifted ones change nothing, stretched ones do, and visibility follows order all the while."""
    plain = np.asarray(logits_of(rows()))
    np.testing.assert_allclose(logits_of(rows(lambda order: order + 100)), plain, atol=1e-3)
    assert np.abs(np.asarray(logits_of(rows(lambda order: 2 * order))) - plain).max() > 0.1
    flow = rows()
    later = flow.replace(order_BT=flow.order_BT * 3 + 5, hi_BT=flow.hi_BT * 3 + 5)
    np.testing.assert_allclose(logits_of(later), plain, atol=1e-4)


def test_angles_apart_from_orders_equal_the_naive_forward():
    stretched = type("Stretched", (oracle.Model,), {"rope": lambda self, i, x, p: oracle.Model.rope(self, i, x, 3 * p + 2)})
    _, last = oracle.prefill(stretched(tiny.params(), tiny.CFG), tiny.prompts()[0][:T])
    np.testing.assert_allclose(np.asarray(logits_of(rows(lambda order: 3 * order + 2)))[0, -1], last, atol=5e-4)


def test_padding_rows_change_nothing():
    tokens = jnp.asarray([tiny.prompts()[0][:T], tiny.prompts()[1][:9] + (0,) * (T - 9)])
    order = orders(jnp.asarray([T, 9]), T)
    assert int(order[1, 9]) == EMPTY
    both = logits_of(embed(tiny.params(), tiny.CFG, tokens, order))
    other = logits_of(embed(tiny.params(), tiny.CFG, tokens.at[1, 9:].set(33), order))
    np.testing.assert_array_equal(both[1, :9], other[1, :9])
    np.testing.assert_allclose(both[0], logits_of(rows())[0], atol=1e-4)


WINDOW_CASES = {
    "full": (kv.full(), lambda m, s, n: policies.Cache(m, s)),
    "h2o": (kv.h2o(0.5, evict=4), lambda m, s, n: policies.H2O(m, s, n, n // 2, 4)),
    "snapkv": (kv.snapkv(0.5, 6), lambda m, s, n: policies.SnapKV(m, s, n, 6, 5, "avg")),
}


@pytest.mark.parametrize("name", WINDOW_CASES)
def test_policies_respect_sliding_windows(name):
    """Layers with a window of 16 rows and their own rotary base between full layers."""
    policy, make = WINDOW_CASES[name]
    model = oracle.Model(tiny.params(WINDOWED), WINDOWED)
    agree(policy, [make(model, oracle.prefill(model, row)[0], (len(row) + 1) // 2) for row in tiny.prompts()], cfg=WINDOWED)


@pytest.mark.parametrize("policy", [kv.full(), kv.h2o(0.5, evict=4)], ids=["full", "h2o"])
def test_layer_skipping_drafts_leave_no_trace(policy):
    """A draft pass through some of the layers writes only draft rows, which the next call overwrites."""
    parents = jnp.asarray([[0, 0, 1, 1]] * 2)
    depth, above = shape_of(parents, 2)
    prompt = tiny.read(policy)
    layers = pack(policy, prompt.layers, Room(4, 4), tiny.CFG)
    place = prompt.next_B[:, None] + depth
    hi = jnp.broadcast_to(prompt.next_B[:, None] - 1, place.shape)

    def call(layers, tokens, run=None):
        flow = embed(tiny.params(), tiny.CFG, tokens, place).replace(hi_BT=hi, among_BTW=above)
        flow, layers, _ = stack(tiny.params(), tiny.CFG, flow, layers, policy=policy, accepted=Accepted.nothing(2, 4), run=run)
        return unembed(tiny.params(), tiny.CFG, flow.x_BTD), layers

    tokens = jnp.asarray([[3, 1, 4, 1], [5, 9, 2, 6]])
    once, _ = jax.jit(call)(layers, tokens)
    _, touched = jax.jit(call, static_argnums=2)(layers, tokens + 7, (0, 2))
    again, _ = jax.jit(call)(touched, tokens)
    np.testing.assert_array_equal(once, again)
