"""Sampling: the warpers, the law of speculatively sampled text by exact enumeration, and noise that belongs to (seed, row, place)."""

import functools
import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from adversaries import Garbage
from oracles import drafts as oracle
from oracles.model import Model, prefill

from tokeff.decode import loop, rule, sample
from tokeff.decode.sample import Sampling, draw, row_keys, warp
from tokeff.errors import UserError
from tokeff.models.config import Config

pytestmark = [pytest.mark.core, pytest.mark.xdist_group("sampling")]
V, PROMPT = 3, (2, 0, 1, 1)
ROWS = 416  # one batch size for all cells, so that code compiles once
CFG = Config("law", V=V, D=8, F=8, L=1, N=2, K=1, H=4, tied=False, max_len=32)
# How, and how many tokens: 4 where two tokens at most are possible at each place, so that the cells stay few.
HOWS = [(Sampling(2.0), 3), (Sampling(3.0, top_k=2), 4), (Sampling(6.0, top_p=0.8), 3), (Sampling(6.0, top_k=2, min_p=0.3), 4),
        (Sampling(3.0, top_k=2, top_p=0.8), 4)]  # fmt: skip


@pytest.mark.parametrize(
    "how", [*(how for how, _ in HOWS), Sampling(0.7, 5, 0.9), Sampling(1.0, min_p=0.2), Sampling((0.0, 2.0, 0.5), 3, 0.7)], ids=str
)
def test_warpers_equal_their_definition(how):
    logits = np.random.default_rng(0).normal(size=(3, 4, 9)) * 2
    given = np.exp(np.asarray(warp(jnp.asarray(logits, jnp.float32), how)))
    for b in range(3):
        t = how.temperature[b] if isinstance(how.temperature, tuple) else how.temperature
        for w in range(4):
            np.testing.assert_allclose(given[b, w], oracle.warped(logits[b, w], t, how.top_k, how.top_p, how.min_p), atol=1e-6)


# -- the law of whole texts. A token is drawn by inverting its cumulative distribution at a number u of its (row, place), which is what
# -- the noise amounts to; u is then cut into all the cells within which no draw at any node of any tree can change.


def by_inversion(warper):
    """A stand-in for `draw`: keys are u_BU, one number per place."""

    def draw(logits_BWV, position_BW, u_BU, how):
        u = jnp.take_along_axis(u_BU, jnp.clip(position_BW - len(PROMPT), 0, u_BU.shape[1] - 1), axis=1)
        below = jnp.cumsum(jnp.exp(warper(logits_BWV, how)), axis=-1)
        return jnp.minimum((below <= u[..., None]).sum(-1), V - 1).astype(jnp.int32)

    return draw


def replace_draw(monkeypatch, draw) -> None:
    """For the first token, and for the target's token at every node."""
    monkeypatch.setattr(loop, "draw", draw)
    monkeypatch.setattr(rule, "draw", draw)


def swapped(logits, how):
    """The order of tpu-inference's verifier: top-p before temperature."""
    return warp(warp(logits, Sampling(1.0, top_p=how.top_p)), Sampling(how.temperature))


@functools.cache
def conditionals(how, n):
    """{text: probabilities of the next token} by the oracle, for all possible texts shorter than n."""
    model, found, texts = Model(tiny.params(CFG), CFG), {}, [()]
    for text in texts:
        found[text] = oracle.warped(prefill(model, PROMPT + text)[1], how.temperature, how.top_k, how.top_p, how.min_p)
        if len(text) < n - 1:
            texts += [(*text, token) for token in range(V) if found[text][token] > 0]
    return found


def cells(conditional, n):
    """(u_RU, measure_R): a point in every cell of the unit cube, and how large the cell is."""
    points, widths = [], []
    for d in range(n):
        cuts = {c for text, p in conditional.items() if len(text) == d for c in np.cumsum(p) if 1e-9 < c < 1 - 1e-9}
        edges = np.array([0.0, *sorted(cuts), 1.0])
        points.append((edges[:-1] + edges[1:]) / 2)
        widths.append(np.diff(edges))
    u = np.stack([x.ravel() for x in np.meshgrid(*points, indexing="ij")], axis=1)
    return u, np.prod([x.ravel() for x in np.meshgrid(*widths, indexing="ij")], axis=0)


@functools.cache
def prompt():
    return tiny.read(tiny.FULL, (PROMPT,) * ROWS, cfg=CFG)


def emitted(how, u) -> tuple[list[tuple[int, ...]], set[int]]:
    """(the text that speculative decoding emits for each u, how many passes that took), with garbage trees as drafts."""
    drafter, n = Garbage(V), u.shape[1]
    padded = np.concatenate([u, np.full((ROWS - len(u), n), 0.5)])
    s = tiny.start(prompt(), tiny.FULL, drafter, cfg=CFG, new=n, how=how, keys=jnp.asarray(padded, jnp.float32))
    s = tiny.go(s, tiny.FULL, drafter, cfg=CFG, how=how)
    return [tuple(text) for text in tiny.text(s)[: len(u)]], set(s.passes_B[: len(u)].tolist())


def far(texts, measure, conditional, n) -> float:
    """The largest difference between the law of the emitted texts and that of plain sampling."""
    found = Counter()
    for text, m in zip(texts, measure, strict=True):
        found[text] += m
    wanted = oracle.law(conditional, n)
    assert set(found) <= set(wanted), "a text that plain sampling never gives"
    return max(abs(found[text] - p) for text, p in wanted.items())


@pytest.mark.parametrize(("how", "n"), HOWS, ids=str)
def test_speculative_text_has_the_law_of_plain_sampling(how, n, monkeypatch):
    replace_draw(monkeypatch, by_inversion(warp))
    u, measure = cells(conditionals(how, n), n)
    texts, passes = emitted(how, u)
    assert len(passes) > 1, "some drafts must be right and some wrong"
    assert far(texts, measure, conditionals(how, n), n) < 1e-6


def test_law_with_greedy_rows_in_the_batch(monkeypatch):
    """Rows of temperature 0 beside others keep their arg-max; the others keep their law."""
    replace_draw(monkeypatch, by_inversion(warp))
    how, n = Sampling(6.0, top_p=0.9), 3
    u, measure = cells(conditionals(how, n), n)
    both = np.concatenate([u, np.random.default_rng(0).random((5, n))])
    texts, _ = emitted(Sampling((6.0,) * len(u) + (0.0,) * (ROWS - len(u)), top_p=0.9), both)
    assert far(texts[:-5], measure, conditionals(how, n), n) < 1e-6
    (best,) = (text for text, p in oracle.law(conditionals(Sampling(), n), n).items() if p == 1)
    assert texts[-5:] == [best] * 5


def test_warpers_in_another_order_have_another_law(monkeypatch):
    """Negative control: the comparison must notice."""
    how, n = Sampling(5.0, top_p=0.8), 3  # not one of HOWS: their loops are compiled already, with the right order
    replace_draw(monkeypatch, by_inversion(swapped))
    conditional = conditionals(how, n)
    u, measure = cells(conditional, n)
    wanted, found = oracle.law(conditional, n), Counter()
    for text, m in zip(emitted(how, u)[0], measure, strict=True):
        found[text] += m
    assert max(abs(found[text] - p) for text, p in wanted.items()) > 1e-2


# -- the noise itself


def test_draws_follow_the_warped_law():
    """Chi-square over many rows, one token and pairs of tokens at neighbouring places."""
    how, B = Sampling(1.3, top_k=3), 20_000
    logits = jnp.asarray([0.3, 1.2, -0.4, 0.9])
    keys = row_keys(5, jnp.arange(B))
    place = jnp.broadcast_to(jnp.asarray([[7, 8]]), (B, 2))
    drawn = np.asarray(draw(jnp.broadcast_to(logits, (B, 2, 4)), place, keys, how))
    p = oracle.warped(np.asarray(logits, np.float64), 1.3, 3)
    pairs = np.histogram2d(drawn[:, 0], drawn[:, 1], bins=[range(5)] * 2)[0]
    wanted = B * np.outer(p, p)
    assert pairs[wanted == 0].sum() == 0
    kept = wanted > 0
    assert ((pairs - wanted)[kept] ** 2 / wanted[kept]).sum() < 26.1  # 8 degrees of freedom, p = 0.001


def test_noise_belongs_to_seed_row_and_place():
    draw, how = jax.jit(sample.draw, static_argnums=3), Sampling(1.0)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 50)), jnp.float32)
    place, keys = jnp.asarray([[4, 5, 9]] * 4), row_keys(3, jnp.arange(4))
    whole = draw(logits, place, keys, how)
    for b, w in itertools.product(range(4), range(3)):
        alone = draw(logits[b : b + 1, w : w + 1], place[b : b + 1, w : w + 1], row_keys(3, jnp.asarray([b])), how)
        assert int(alone[0, 0]) == int(whole[b, w])
    flat, places = jnp.zeros((64, 8, 50)), jnp.broadcast_to(jnp.arange(8), (64, 8))
    many, other = (draw(flat, places, row_keys(seed, jnp.arange(64)), how) for seed in (3, 4))
    assert len({tuple(r) for r in np.asarray(many).tolist()}) == 64 and float((many == other).mean()) < 0.1
    assert len({tuple(c) for c in np.asarray(many).T.tolist()}) == 8


@pytest.mark.parametrize(
    "how",
    [Sampling(-1.0), Sampling((0.5, -0.1)), Sampling((0.5,)), Sampling(1.0, top_k=-1), Sampling(1.0, top_p=0.0), Sampling(1.0, top_p=1.5),
     Sampling(1.0, min_p=-0.1), Sampling(1.0, min_p=2.0), Sampling(float("nan")), Sampling(1.0, top_p=float("nan"))],
    ids=str,
)  # fmt: skip
def test_bad_settings_are_refused_in_one_line(how):
    with pytest.raises(UserError) as error:
        how.check(2)
    assert "\n" not in str(error.value)


def test_greedy_ignores_the_seed():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 9)), jnp.float32)
    place = jnp.zeros((2, 3), jnp.int32)
    for how in (Sampling(), Sampling((0.0, 0.0)), Sampling((0.0, 1.0))):
        drawn = draw(logits, place, row_keys(1, jnp.arange(2)), how)
        assert drawn[0].tolist() == jnp.argmax(logits[0], -1).tolist()
    assert jax.eval_shape(lambda: draw(logits, place, row_keys(1, jnp.arange(2)), Sampling(1.0))).dtype == jnp.int32


def test_a_greedy_row_takes_the_first_of_equals_in_any_company():
    logits = jnp.zeros((2, 1, 9)).at[:, 0, jnp.asarray([4, 7])].set(1.0)
    for seed in range(8):
        drawn = draw(logits, jnp.zeros((2, 1), jnp.int32), row_keys(seed, jnp.arange(2)), Sampling((0.0, 1.0)))
        assert int(drawn[0, 0]) == 4
