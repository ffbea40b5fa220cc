"""Merged rows against their oracles, and what the size of a row is for: equal rows merged with it change nothing."""

from functools import partial
from math import ceil

import jax
import jax.numpy as jnp
import numpy as np
import pictures
import pytest
import tiny
from oracles import merging as oracle
from oracles import model, policies
from oracles.against import ATOL, GIVEN, STEPS, agree, dense, read, same_rows

from tokeff.errors import UserError
from tokeff.generation import Setup
from tokeff.kv import methods as kv
from tokeff.kv.cache import Room
from tokeff.kv.extend import pack
from tokeff.kv.merge_rows import Bequeath, GlobalLocal, Merged, nearest
from tokeff.kv.policy import Prefilled
from tokeff.kv.score import Recency
from tokeff.models import llava
from tokeff.models.flow import Here

pytestmark = pytest.mark.core
ROWS = [ceil(0.5 * n) for n in tiny.LENGTHS]


def look_m(how: str, least: float = -1.0, sized: bool = False):
    """Oracle caches over H2O's rows at the end of the prompt: half of the budget heavy, half recent."""
    made = []
    for b, rows in enumerate(ROWS):
        model, seen, _ = dense(b)
        kept = policies.H2O(model, seen, rows, rows // 2).kept
        made.append(oracle.Merged(model, seen, kept, how, least, sized=sized))
    return made


@pytest.mark.parametrize("how", ["average", "pivot", "weighted"])
def test_look_m_equals_its_oracle(how):
    agree(kv.look_m(0.5, how=how), look_m(how))


class Vectors(model.Model):
    """The naive model, on rows that enter as vectors."""

    def embed(self, token):
        return super().embed(token) if isinstance(token, int) else token


@pytest.mark.parametrize("budget", [0.4, 0.25])
def test_look_m_keeps_text_before_pictures(budget):
    """A tiny LLaVA's picture of 36 rows among 20 of text: at .4 all text and some of the picture are kept, at .25 some text alone."""
    v, rng = pictures.llava(), np.random.default_rng(2)
    ids = [t % 60 for t in tiny.prompts()[0][:20]]
    ids, pixels = [*ids[:4], pictures.IMAGE, *ids[4:]], llava.Pixels(rng.normal(size=(1, 24, 24, 3)).astype(np.float32))
    setup = llava.fitted(v, Setup(kv.look_m(budget)))
    prompt = llava.read(v, [ids], [[pixels]], setup, 4)
    x_MD = np.asarray(llava.mixed(v, [ids], [[llava.picture_rows(v, pixels, None)]])[3].x_BMD, np.float64)[0, :56]
    m = Vectors(tiny.params(), tiny.CFG)
    seen, logits = model.prefill(m, list(x_MD))
    np.testing.assert_allclose(np.asarray(prompt.logits_BV)[0], logits, atol=ATOL)
    rows, picture = ceil(budget * 56), range(4, 40)

    def keep(layer, head):
        return oracle.text_first(m, seen[layer], head, rows, rows // 2, picture)

    held = [[len(set(keep(layer, head)) & set(picture)) for head in range(tiny.CFG.K)] for layer in range(tiny.CFG.L)]
    assert held == [[rows - 20 if budget == 0.4 else 0] * tiny.CFG.K] * tiny.CFG.L
    packed = tiny.packed(setup.kv, prompt, Room(STEPS))
    cache = oracle.Merged(m, seen, keep, "pivot")
    same_rows(setup.kv, packed, [cache], "after the prompt")
    given = [int(t) % 60 for t in GIVEN[0, :4]]
    wanted = [logits for logits, _ in model.decode(m, cache, given, 56)]
    for t, (logits, _) in enumerate(tiny.forced(setup.kv, packed, prompt, [given])):
        np.testing.assert_allclose(logits[0], wanted[t], atol=ATOL)
    plain = [tiny.kept(kv.look_m(budget), layer) for layer in tiny.packed(kv.look_m(budget), prompt, Room(STEPS))]
    assert plain != [tiny.kept(setup.kv, layer) for layer in packed], "H2O's order keeps other rows"


def test_a_prompt_of_text_is_ranked_as_by_h2o():
    assert kv.look_m(0.5).needs() == kv.h2o(0.5).needs()
    marked = kv.look_m(0.5).seeing((tiny.CFG.V,))  # of which there is none
    prompt = read(marked.needs())
    for layers in zip(*(pack(p, tiny.only(p, prompt).layers, Room(0), tiny.CFG) for p in (kv.look_m(0.5), marked)), strict=True):
        jax.tree.map(np.testing.assert_array_equal, *layers)


def test_a_threshold_and_the_size_of_rows_equal_their_oracle():
    agree(Merged(0.5, kv.look_m().score, recent=0.5, how="average", least=0.5, sized=True), look_m("average", 0.5, True))


def test_ems_equals_its_oracle():
    made = []
    for b, rows in enumerate(ROWS):
        model, seen, _ = dense(b)

        def keep(layer, head, m=model, s=seen, rows=rows):
            return oracle.ems_keep(m, s[layer], head, rows, 6, 5)

        def may(layer, head, kept, m=model, s=seen):
            score = {o: x for o, x in oracle.global_local(m, s[layer], head, 6, 5).items() if o not in kept}
            return policies.best(score, int(0.5 * len(kept)))

        made.append(oracle.Merged(model, seen, keep, "average", 0.3, may, sized=True))
    agree(kv.ems(0.5, 6, more=0.5, least=0.3), made)


@pytest.mark.parametrize("block", [1, 4])
def test_cam_equals_its_oracle(block):
    policy = kv.cam(0.5, 4, over=6, evict=block)
    made = []
    for b, rows in enumerate(ROWS):
        model, seen, _ = dense(b)

        def coin(head, order):
            return float(policy.coin(jnp.full((1, tiny.CFG.K, 1), order))[0, head, 0])

        made.append(oracle.CaM(model, seen, rows, 4, 6, coin, block))
    agree(policy, made)


def test_equal_rows_merged_with_their_size_are_what_they_were():
    """The hard case: four copies of each row, one of them kept. Its score plus log 4 draws what the four would."""
    rng, (B, K, S, H) = np.random.default_rng(0), (2, tiny.CFG.K, 32, tiny.CFG.H)
    k, v = (jnp.asarray(np.tile(rng.normal(size=(B, K, S // 4, H)), (1, 1, 4, 1)), jnp.float32) for _ in range(2))
    order = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
    rows = Prefilled(k, v, order[:, None], jnp.full(B, S), jnp.int32(0), {})
    here, out = Here(0, tiny.CFG), []
    for policy in (kv.full(), Merged(S // 4, Recency(), sized=True), Merged(S // 4, Recency(), sized=False)):
        layer = policy.pack_layer(rows, Room(1), here)
        row = [jnp.asarray(np.random.default_rng(1).normal(size=(B, 1, n, H)), jnp.float32) for n in (tiny.CFG.N, K, K)]
        flow = flow_of(jnp.full((B, 1), S, jnp.int32))
        out.append(policy.attend(*row, flow, flow, layer, None, None, here)[0])
    np.testing.assert_allclose(out[1], out[0], atol=1e-5)
    assert jnp.abs(out[2] - out[0]).max() > 1e-2


def flow_of(order_BT):
    from tokeff.models.flow import Flow

    return Flow(jnp.zeros((*order_BT.shape, 1)), order_BT, order_BT, order_BT)


def test_nearest_in_blocks_is_nearest():
    rng = np.random.default_rng(0)
    k, kept = (jnp.asarray(rng.normal(size=(2, 2, n, 8)), jnp.float32) for n in (600, 9))
    slot, like = nearest(k, kept, jnp.arange(9)[None, None] < jnp.asarray([9, 4])[:, None, None])
    unit = partial(lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True))
    cosine = np.einsum("bksh,bkmh->bksm", unit(np.asarray(k)), unit(np.asarray(kept)))
    cosine[1, :, :, 4:] = -2
    np.testing.assert_array_equal(slot, cosine.argmax(-1))
    np.testing.assert_allclose(like, cosine.max(-1), atol=1e-5)


def test_merging_changes_rows_and_not_how_many():
    policy, plain = kv.look_m(0.5), kv.h2o(0.5, evict=0)
    prompt = read(plain.needs())
    for a, b in zip(*(pack(p, prompt.layers, Room(2), tiny.CFG) for p in (policy, plain)), strict=True):
        np.testing.assert_array_equal(a.order_BKC, b.order_BKC)
        assert a.k_BKCH.shape == b.k_BKCH.shape and jnp.abs(a.v_BKCH - b.v_BKCH).max() > 0.1


BAD = {
    "unknown merge": (kv.look_m(how="median"), "merge"),
    "merging while evicting": (Merged(0.5, kv.h2o().score, evict=1), "evict"),
    "fewer than no rows": (kv.ems(0.5, 6, more=-1.0), "more"),
    "no window": (kv.ems(0.5, 0), "window"),
    "nobody receives": (kv.cam(0.5, over=0), "over"),
    "no attention to go by": (Bequeath(0.5, Recency(), evict=1), "attention"),
    "a kernel of nothing": (Merged(0.5, GlobalLocal(6, 0)), "kernel"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings(name):
    policy, word = BAD[name]
    with pytest.raises(UserError, match=word) as e:
        policy.check(tiny.CFG, 64)
    assert "\n" not in str(e.value)
