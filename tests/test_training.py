"""A run that was stopped and goes on is the run that was not; batches come ahead, in order; the rate rises, stays and falls."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokeff.models.fresh import fresh_vit
from tokeff.models.vit_config import ViTConfig
from tokeff.training import ahead, lately, learn, optimiser

pytestmark = pytest.mark.core


@dataclass(frozen=True)
class Squares:
    """A linear fit."""

    def __call__(self, weights, frozen, batch):
        off = batch["x"] @ weights["w"] - frozen
        return (off**2).mean(), {"off": jnp.abs(off).mean()}


def make(i):
    return {"x": np.random.default_rng(i).normal(size=(4, 3)).astype(np.float32)}


def run(where, steps, falls=8, make=make):
    return learn({"w": jnp.zeros((3, 2))}, jnp.ones(2), make, Squares(), optimiser(0.25, steps, 2, falls), steps, falls, where, save=3)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path):
    def stops(at):
        return lambda i: (_ for _ in ()).throw(KeyboardInterrupt) if i == at else make(i)

    whole, seen = run(tmp_path / "whole", 12)
    assert len(seen) == 12 and set(seen[0]) == {"loss", "off", "seconds"} and seen[-1]["loss"] < seen[0]["loss"]
    for at in (5, 10):  # while the rate stays, and while it falls
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", 12, make=stops(at))
    asked = []
    again, steps = run(tmp_path / "stopped", 12, make=lambda i: asked.append(i) or make(i))
    assert asked == [9, 10, 11]
    np.testing.assert_array_equal(again["w"], whole["w"])
    assert [row["loss"] for row in steps] == [row["loss"] for row in seen]
    assert lately(seen, 2)["loss"] == pytest.approx((seen[-1]["loss"] + seen[-2]["loss"]) / 2, abs=1e-4)


def test_another_length_goes_on_from_before_the_rate_falls(tmp_path):
    short, _ = run(tmp_path / "a", 12)
    asked = []
    longer, _ = run(tmp_path / "a", 20, falls=16, make=lambda i: asked.append(i) or make(i))
    assert asked == list(range(8, 20))
    fresh, _ = run(tmp_path / "b", 20, falls=16)
    np.testing.assert_array_equal(longer["w"], fresh["w"])
    again, _ = run(tmp_path / "a", 12, make=lambda i: pytest.fail("was done"))
    np.testing.assert_array_equal(again["w"], short["w"])


def test_batches_come_in_order_and_a_thread_that_is_left_ends():
    assert list(ahead(lambda i: i * i, range(3, 9), depth=2)) == [9, 16, 25, 36, 49, 64]
    some = ahead(lambda i: i, range(10**9), depth=2)
    assert [next(some) for _ in range(3)] == [0, 1, 2]
    some.close()


def test_the_rate():
    """Without gradients a weight of 1 decays by the rate, which is two fifths of the peak where it is none of a block's matrix."""
    rule, w = optimiser(2.5, 20, 4, 12, decay=1.0), jnp.ones(1)
    state, rates = rule.init(w), []
    for _ in range(20):
        update, state = rule.update(jnp.zeros(1), state, w)
        rates.append(-float(update[0]))
    expected = [1 / 50 + (1 - 1 / 50) * i / 4 for i in range(4)] + [1.0] * 8 + [(1 + np.cos(np.pi * i / 8)) / 2 for i in range(8)]
    np.testing.assert_allclose(rates, expected, atol=1e-4)


def test_matrices_of_blocks_move_by_orthogonal_steps():
    """An update of a block's matrix has all its singular values about alike, heads and width as its letters say."""
    cfg = ViTConfig("tiny", D=8, F=12, L=1, N=2, image=(4, 4), patch=2, V=3)
    weights = fresh_vit(cfg, 0)
    rule, rng = optimiser(1.0, 20, 0, 12, decay=0.0), np.random.default_rng(0)
    grads = jax.tree.map(lambda x: jnp.asarray(1e-3 * rng.normal(size=x.shape), x.dtype), weights)
    update, _ = jax.jit(rule.update)(grads, jax.jit(rule.init)(weights), weights)
    shapes = {"q_NHD": (8, 8), "o_DNH": (8, 8), "up_FD": (12, 8), "down_DF": (8, 12)}
    for name, shape in shapes.items():
        value = np.linalg.svd(np.reshape(getattr(update.blocks[0], name), shape), compute_uv=False)
        assert value.max() < 2 * value.min(), name
    head = np.linalg.svd(update.head_VD, compute_uv=False)
    assert head.max() > 2 * head.min()
