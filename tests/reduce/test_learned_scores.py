"""Which rows go on, by weights of a method's own: they live beside the decoder's or the tower's, and have gradients by what goes on."""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pictures
import pytest
import tiny

from tokeff.generation import Setup
from tokeff.kv.prefill import Gather, blank, prefill
from tokeff.models.flow import EMPTY
from tokeff.models.llava import Pixels, picture_rows, read
from tokeff.models.llava_rows import features, project, reduced, see
from tokeff.models.transformer import embed, orders, stack
from tokeff.reduce.cascade import Cascade
from tokeff.reduce.visual import Chosen, best, patches

pytestmark = pytest.mark.core
CFG = tiny.CFG
TOKENS, LENGTH = tiny.padded(tiny.prompts())
traces = []


def direction(D, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=D), jnp.float32)


def slopes(loss, route_D, step):
    """(the gradient along a way, the same measured)."""
    way = direction(len(route_D), 9)
    way = way / jnp.linalg.norm(way)
    return float(jax.grad(loss)(route_D) @ way), (float(loss(route_D + step * way)) - float(loss(route_D - step * way))) / (2 * step)


# -- inside the decoder


@dataclass(frozen=True)
class Routed(Cascade):
    """A toy: rows go on by a learned direction, each times a gate of its score, through which the score has a gradient."""

    writes: ClassVar[bool] = False

    def looks(self, cfg):
        return ()

    def score(self, q_BTNH, k_BTKH, flow, here):
        return jnp.einsum("btd,d->bt", flow.x_BTD, here.side["route_D"], precision="highest")

    def take(self, flow, index_BM, here):
        gate = jax.nn.sigmoid(self.score(None, None, flow, here))
        return super().take(flow.replace(x_BTD=flow.x_BTD * gate[..., None]), index_BM, here)


CUT = Routed((1,), (0.25,))


def routed(route_D):
    """The decoder with a direction beside every layer."""
    weights = tiny.params()
    return weights.replace(blocks=tuple(block.replace(side={"route_D": route_D}) for block in weights.blocks))


@jax.jit
def loss(route_D):
    """Negative log-likelihood of token 7 behind each prompt."""
    traces.append(1)
    prompt = prefill(routed(route_D), CFG, TOKENS, LENGTH, cut=CUT)
    return -jax.nn.log_softmax(prompt.logits_BV)[:, 7].mean()


@jax.jit
def enters():
    """x_BTD that enters layer 1."""
    flow, layers = embed(tiny.params(), CFG, TOKENS, orders(LENGTH, TOKENS.shape[1])), blank(CFG, 2, LENGTH, "float32")
    return stack(tiny.params(), CFG, flow, layers, policy=Gather(), run=(0,), taps=(0,))[2][0]


def test_rows_go_on_by_a_learned_direction():
    """The best of the rows that enter the layer, and the last; other values choose others, with the same programs."""
    x, found = np.float64(enters()), []
    for seed in (1, 2):
        route_D = direction(CFG.D, seed)
        prompt = prefill(routed(route_D), CFG, TOKENS, LENGTH, cut=CUT)
        for b, n in enumerate(tiny.LENGTHS):
            score = x[b, :n] @ np.float64(route_D)
            score[n - 1] = np.inf
            known = sorted(np.argsort(-score, kind="stable")[: -(-n // 4)].tolist())
            assert [o for o in prompt.layers[1].order_BKS[b, 0].tolist() if o != EMPTY] == known
            found.append(known)
    assert found[0] != found[2] and found[1] != found[3]


def test_a_router_in_the_decoder_has_a_gradient():
    route_D = direction(CFG.D, 1)
    slope, measured = slopes(loss, route_D, 1e-3)
    assert abs(slope) > 1e-2 and slope == pytest.approx(measured, rel=1e-2)
    before = len(traces)
    float(loss(2 * route_D))
    assert len(traces) == before


# -- before the decoder


@dataclass(frozen=True)
class RoutedPatches(Chosen):
    """A toy: patches by a learned direction, each times a gate of its score."""

    def score(self, x_BSD, seen, cfg):
        return jnp.einsum("bpd,d->bp", patches(x_BSD, cfg), seen.side["route_D"], precision="highest")

    def choose(self, x_BSD, seen, cfg):
        return best(self.score(x_BSD, seen, cfg), self.rows(cfg))

    def reduce(self, x_BSD, seen, cfg):
        left = super().reduce(x_BSD, seen, cfg)
        gate = jax.nn.sigmoid(jnp.take_along_axis(self.score(x_BSD, seen, cfg), left.place_BM, axis=1))
        return left.replace(x_BMD=left.x_BMD * gate[..., None])


@dataclass(frozen=True)
class RoutedRows(RoutedPatches):
    """The same of rows as the decoder gets them."""

    projected: ClassVar[bool] = True


def taught(v, route_D):
    """The model with a direction beside its tower."""
    return replace(v, params=v.params.replace(tower=v.params.tower.replace(side={"route_D": route_D})))


def pixels(n=1, video=False):
    return Pixels(np.random.default_rng(4).normal(size=(n, 24, 24, 3)).astype(np.float32), video=video)


def test_patches_are_left_by_a_learned_direction():
    """The best of the tower's rows, each times its gate; other values leave others, with the same program; the decoder reads them."""
    v, found = pictures.llava(), []
    x = np.float64(features(v, jnp.asarray(pixels().crops_BYXC))[0])[0, 1:]
    for seed in (1, 2):
        route_D, before = direction(pictures.TOWER.D, seed), reduced._cache_size()
        got = picture_rows(taught(v, route_D), pixels(), RoutedPatches(9))
        assert seed == 1 or reduced._cache_size() == before
        score = x @ np.float64(route_D)
        known = sorted(np.argsort(-score, kind="stable")[:9].tolist())
        assert got.place_M.tolist() == known
        rows = x[known] / (1 + np.exp(-score[known]))[:, None]
        np.testing.assert_allclose(got.x_MD, project(v.params, jnp.asarray(rows, jnp.float32)), atol=1e-4)
        found.append(known)
    assert found[0] != found[1]
    ids = [3, pictures.IMAGE, 5, 7]
    prompt = read(taught(v, direction(pictures.TOWER.D, 1)), [ids], [[pixels()]], Setup(), 2, reduce=RoutedPatches(9))
    assert int(prompt.length_B[0]) == 3 + 9 and np.isfinite(prompt.logits_BV).all()


def test_frames_are_left_by_a_learned_direction():
    """What is learned is not pooled with the rows that it ranks."""
    v = pictures.llava(((24, 48),), 2, False)
    got = picture_rows(taught(v, direction(tiny.CFG.D, 3)), pixels(6, video=True), RoutedRows(4))
    x = np.float64(picture_rows(v, pixels(6, video=True)).x_MD)[:-1].reshape(6, 9, -1)
    score = x @ np.float64(direction(tiny.CFG.D, 3))
    known = [9 * f + p for f in range(6) for p in sorted(np.argsort(-score[f], kind="stable")[:4].tolist())]
    assert got.place_M.tolist() == [*known, 54]


def test_a_router_of_patches_has_a_gradient():
    v, crops = pictures.llava(), jnp.asarray(pixels().crops_BYXC)

    @jax.jit
    def loss(route_D):
        traces.append(2)
        return jnp.square(see(taught(v, route_D), crops, RoutedPatches(9)).x_BMD).mean()

    route_D = 0.05 * direction(pictures.TOWER.D, 4)  # gates that are not all open or shut
    slope, measured = slopes(loss, route_D, 1e-3)
    assert abs(slope) > 1e-2 and slope == pytest.approx(measured, rel=1e-2)
    before = len(traces)
    float(loss(2 * route_D))
    assert len(traces) == before
