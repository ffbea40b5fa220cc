"""SWIFT's search while it generates: the text is plain decoding's, tries are worth what the oracle says, and what is off is not read."""

import dataclasses
import functools

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from oracles.against import dense
from oracles.float64 import float64_model
from oracles.policies import Cache
from oracles.skipping import Skipping, chain, grown

from tokeff.decode.draft import Target
from tokeff.decode.loop import run
from tokeff.decode.methods import swift
from tokeff.decode.sample import GREEDY, Sampling
from tokeff.decode.swift import Swift
from tokeff.decode.swift_online import Halves, OnlineSwift
from tokeff.errors import UserError
from tokeff.kv import methods as kv
from tokeff.models.config import Precision
from tokeff.models.load import Model
from tokeff.sparse.methods import tidaldecode

pytestmark = [pytest.mark.core, pytest.mark.xdist_group("swift-online")]
FULL, H2O = kv.full(), kv.h2o(0.5, evict=4)
CFG = dataclasses.replace(tiny.CFG, name="four", L=4, windows=())  # two layers whose halves may be left out
ONLINE = OnlineSwift(3, 2, 0.3, share=0.5, tail=5, good=1.1)
T = max(tiny.LENGTHS)


@pytest.fixture(autouse=True, scope="module")
def double():
    with float64_model():
        yield


def model() -> Model:
    return Model(CFG, tiny.params(CFG, "float64"), None, Precision("float64", "float64", "float64"), "four")


@functools.cache
def read(policy, rows=None):
    return tiny.read(policy, rows, cfg=CFG, dtype="float64", T=T)


def start(policy, drafter, rows=None, how=GREEDY):
    return tiny.start(read(policy, rows), policy, drafter, cfg=CFG, m=model(), how=how)


def go(s, policy, drafter, how=GREEDY, steps=1000):
    return tiny.go(s, policy, drafter, cfg=CFG, dtype="float64", how=how, steps=steps)


@functools.cache
def drafted():
    """(params, state) -> (draft, state), compiled once for all tests."""
    return jax.jit(lambda params, s: ONLINE.draft(s, Target(params, CFG, FULL, GREEDY)))


@pytest.mark.parametrize("policy", tiny.sampled([FULL, H2O], (FULL,)), ids=["full", "h2o"])
@pytest.mark.parametrize("rows", [None, ((5,), tiny.prompts()[1])], ids=["ragged", "one token"])
def test_text_is_that_of_plain_decoding(policy, rows):
    """While it searches; a sequence is done before the other has begun to."""
    plain = tiny.text(go(start(policy, tiny.PLAIN, rows), policy, tiny.PLAIN))
    s = start(policy, ONLINE, rows).replace(limit_B=jnp.asarray([4, tiny.NEW], jnp.int32))
    s = go(s, policy, ONLINE)
    assert tiny.text(s) == [plain[0][:4], plain[1]]
    assert int(s.passes_B[1]) < tiny.NEW - 1 and int(s.drafter.tried) > 3


def test_sampled_text_is_that_of_plain_decoding():
    how = Sampling(0.8, top_k=20)
    s = go(start(FULL, ONLINE, how=how), FULL, ONLINE, how)
    assert tiny.text(s) == tiny.text(go(start(FULL, tiny.PLAIN, how=how), FULL, tiny.PLAIN, how)) and int(s.drafter.tried)


def off(halves: Halves) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(layers without attention, layers without feed-forward)."""
    first, second = (tuple(np.flatnonzero(~np.asarray(on)).tolist()) for on in (halves.attention_L, halves.ffn_L))
    return first, second


def share(light: Skipping, cache: Cache, text: list[int]) -> float:
    """Of the last tokens of a text, how many the light model names behind what the whole one kept of the text before each."""
    right = []
    for order in range(len(text) - 1 - ONLINE.tail, len(text) - 1):
        before = grown(cache)
        before.rows = [[{o: row for o, row in head.items() if o < order} for head in layer] for layer in before.rows]
        right.append(int(np.argmax(light.row(before, text[order], order))) == text[order + 1])
    return float(np.mean(right))


def test_tries_and_drafts_are_those_of_the_oracle():
    """Pass by pass: what is tried, what it is worth, what is kept, and the chain that the best draft."""
    s, params = start(FULL, ONLINE), tiny.params(CFG, "float64")
    whole, caches = Skipping(tiny.params(CFG), CFG), [Cache(dense(b, CFG)[0], dense(b, CFG)[1]) for b in range(2)]
    best, since, seen = (-1.0, off(s.drafter.best)), 0, set()
    while not s.done_B.all():
        texts = [[*row, *new] for row, new in zip(tiny.prompts(), tiny.text(s), strict=True)]
        draft, after = drafted()(params, s)
        ready = [b for b in range(2) if int(s.made_B[b]) >= ONLINE.tail and not s.done_B[b]]
        if ready:
            gone = off(ONLINE.choice(s.drafter.tried, CFG.L))
            seen.add(gone)
            assert sum(map(len, gone)) == 2 and {*gone[0], *gone[1]} <= {1, 2}
            worth = float(np.mean([share(Skipping(tiny.params(CFG), CFG, *gone), caches[b], texts[b]) for b in ready]))
            since = 0 if worth > best[0] else since + 1
            best = max(best, (worth, gone), key=lambda found: found[0])
        assert (float(after.drafter.worth), int(after.drafter.since)) == pytest.approx((best[0], since))
        assert off(after.drafter.best) == best[1] and int(after.drafter.tried) == int(s.drafter.tried) + bool(ready)
        for b in range(2):
            tokens, _ = chain(Skipping(tiny.params(CFG), CFG, *best[1]), caches[b], texts[b][-1], ONLINE.length, ONLINE.sure)
            valid, given = (np.asarray(x)[b, 1 : 1 + ONLINE.length] for x in (draft.valid_BW, draft.tokens_BW))
            assert s.done_B[b] or given[valid].tolist() == tokens
        s = go(s, FULL, ONLINE, steps=1)
        for b, cache in enumerate(caches):
            for order in range(len(texts[b]) - 1, int(s.count_B[b]) - 1):
                whole.row(cache, int(s.tokens_BS[b, order]), order)
    assert len(seen) > 2 and best[0] > 0


def test_it_ends_when_there_is_no_more_reason():
    """And begins when there are tokens to go by."""
    early, params = start(FULL, ONLINE), tiny.params(CFG, "float64")
    late = go(jax.tree.map(jnp.copy, early), FULL, ONLINE, steps=6)
    tried = int(late.drafter.tried)
    ended = ({"worth": jnp.float32(1.2)}, {"tried": jnp.int32(ONLINE.tries)}, {"since": jnp.int32(ONLINE.patience)})
    for s in (early, *(late.replace(drafter=late.drafter.replace(**more)) for more in ended)):
        assert int(drafted()(params, s)[1].drafter.tried) == int(s.drafter.tried)
    assert int(drafted()(params, late)[1].drafter.tried) == tried + 1


def test_weights_of_halves_that_are_off_are_not_read():
    """Nor do other halves make another program."""
    params, count = tiny.params(CFG, "float64"), run._cache_size
    blocks = list(params.blocks)
    blocks[1] = blocks[1].replace(q_NHD=blocks[1].q_NHD * jnp.nan)
    blocks[2] = blocks[2].replace(up_FD=blocks[2].up_FD * jnp.nan)
    halves = Halves.without(jnp.asarray([True, False, False, True]))
    s = start(FULL, ONLINE)
    s = s.replace(drafter=s.drafter.replace(best=halves))
    found = [drafted()(p, s)[0].tokens_BW.tolist() for p in (params, params.replace(blocks=tuple(blocks)))]
    assert found[0] == found[1]
    go(jax.tree.map(jnp.copy, s), FULL, ONLINE, steps=1)
    before = count()
    go(s.replace(drafter=s.drafter.replace(best=Halves.without(jnp.asarray([False, True, True, False])))), FULL, ONLINE, steps=1)
    assert count() == before


def test_the_loop_copies_no_cache():
    s = start(FULL, ONLINE)
    program = run.lower(tiny.params(CFG, "float64"), CFG, s, jnp.int32(5), policy=FULL, drafter=ONLINE, how=GREEDY, eos=())
    assert not hlo.moved(tiny.compiled(program).as_text(), {hlo.size(s.layers[0].k_BKCH)})


def test_what_swift_makes():
    assert swift() == OnlineSwift() and swift((1,), ()) == Swift((1,), ()) and swift(tail=9).tail == 9


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="0 of 2 halves"):
        OnlineSwift(share=0.1).check(dataclasses.replace(model(), cfg=tiny.CFG))
    with pytest.raises(UserError, match="at least 1"):
        OnlineSwift(tail=0)
    assert "reads what a layer chose" in ONLINE.fits(tidaldecode(0.5, (0,), (1,), 8), CFG)
    assert ONLINE.fits(H2O, CFG) is None
