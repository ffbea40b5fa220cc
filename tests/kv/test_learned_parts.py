"""A policy with weights of its own: they live beside the layer's, reach `attend` by `here.side`, and have gradients."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tokeff.errors import UserError
from tokeff.kv.cache import Room
from tokeff.kv.extend import pack
from tokeff.kv.policy import Full
from tokeff.models.checkpoint import save
from tokeff.models.transformer import embed, stack, unembed

pytestmark = pytest.mark.core
ROWS = jnp.asarray([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], jnp.int32)


@dataclass(frozen=True)
class Gated(Full):
    """A toy: every query head's output is scaled by a learned gate."""

    def attend(self, q, k, v, ask, new, layer, accepted, across, here):
        out, layer, across = super().attend(q, k, v, ask, new, layer, accepted, across, here)
        return out * here.side["gate_N"][:, None], layer, across


def gated(gates):
    weights = tiny.params()
    blocks = tuple(block.replace(side={"gate_N": gate}) for block, gate in zip(weights.blocks, gates, strict=True))
    return weights.replace(blocks=blocks)


traces = []


@jax.jit
def loss(gates, layers, order_BT):
    """Mean negative log-likelihood of token 7 behind each of ROWS."""
    traces.append(1)
    flow, *_ = stack(gated(gates), tiny.CFG, embed(tiny.params(), tiny.CFG, ROWS, order_BT), layers, policy=Gated())
    return -jax.nn.log_softmax(unembed(tiny.params(), tiny.CFG, flow.x_BTD))[..., 7].mean()


@pytest.fixture(scope="module")
def given():
    prompt = tiny.read(Gated())
    gates = tuple(jnp.asarray(g, jnp.float32) for g in np.random.default_rng(0).uniform(0.5, 1.5, (tiny.CFG.L, tiny.CFG.N)))
    return gates, pack(Gated(), prompt.layers, Room(8), tiny.CFG), prompt.next_B[:, None] + jnp.arange(ROWS.shape[1])[None]


def test_gradient_of_a_gate_is_its_slope(given):
    gates, layers, order = given
    slope = jax.grad(loss)(gates, layers, order)
    rng = np.random.default_rng(1)
    for layer in (0, tiny.CFG.L - 1):
        way = jnp.asarray(rng.normal(size=tiny.CFG.N), jnp.float32)
        assert float(jnp.abs(slope[layer]).max()) > 1e-5

        def at(h, layer=layer, way=way):
            moved = tuple(g + h * way if i == layer else g for i, g in enumerate(gates))
            return float(loss(moved, layers, order))

        measured = (at(1e-2) - at(-1e-2)) / 2e-2
        assert float(slope[layer] @ way) == pytest.approx(measured, rel=2e-2, abs=2e-5)


def test_new_values_do_not_trace_again(given):
    gates, layers, order = given
    float(loss(gates, layers, order))
    before = len(traces)
    float(loss(tuple(2 * g for g in gates), layers, order))
    assert len(traces) == before


def test_gates_of_one_are_the_model_itself(given):
    _, layers, order = given
    ones = tuple(jnp.ones(tiny.CFG.N) for _ in range(tiny.CFG.L))

    @jax.jit  # as the gated one is: compiled apart, sums of 12.7 differ in their last two bits
    def dense(layers):
        flow, *_ = stack(tiny.params(), tiny.CFG, embed(tiny.params(), tiny.CFG, ROWS, order), layers, policy=Full())
        return -jax.nn.log_softmax(unembed(tiny.params(), tiny.CFG, flow.x_BTD))[..., 7].mean()

    assert float(loss(ones, layers, order)) == pytest.approx(float(dense(layers)), abs=1e-6)


def test_a_model_folder_refuses_what_it_would_lose(tmp_path):
    with pytest.raises(UserError, match="side=None"):
        save(tmp_path / "model", tiny.CFG, gated(tuple(jnp.ones(tiny.CFG.N) for _ in range(tiny.CFG.L))))
    assert not list(tmp_path.iterdir())
