"""Less of the network for a token: FFN-SkipLLM, SkipDecode and R2R against one token, layer and head at a time."""

import re
from dataclasses import dataclass, replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
from oracles import depth as oracle
from oracles.against import ATOL, dense
from oracles.model import Model, prefill
from oracles.policies import Cache

from tokeff.decode.depth import FfnSkip, SkipDecode, Some
from tokeff.decode.draft import Target
from tokeff.decode.loop import run, verify
from tokeff.decode.route import Routed
from tokeff.decode.sample import GREEDY, Sampling
from tokeff.errors import UserError
from tokeff.generation import Setup
from tokeff.kernels import decode_attention
from tokeff.kv.policy import Full, append
from tokeff.models.flow import EMPTY
from tokeff.models.transformer import unembed
from tokeff.sparse.methods import tidaldecode

pytestmark = pytest.mark.core
L, NEW = tiny.CFG.L, tiny.NEW
FFN = {"one": (0.9, 1, 0, 4), "all": (0.01, 1, 0, 0), "some": (0.85, 0, 1, 2)}  # tau, head, tail, warm
DECODE = {"most": 3, "least": 1, "warm": 1, "over": 8, "stairs": None}


def start(drafter, policy=tiny.FULL, rows=None, **options):
    return tiny.start(tiny.read(tiny.FULL, rows), policy, drafter, **options)


@cache
def plain():
    return tiny.text(tiny.go(start(tiny.PLAIN), tiny.FULL))


@partial(jax.jit, static_argnames=("drafter", "policy"))
def one(s, *, drafter, policy=tiny.FULL):
    """(logits_BV, the next state) of one pass."""
    params = tiny.params()
    draft, s = drafter.draft(s, Target(params, tiny.CFG, policy, GREEDY))
    assert draft.x_BWD is not None
    logits = unembed(params, tiny.CFG, draft.x_BWD)[:, 0]
    return logits, verify(params, tiny.CFG, s, draft, policy, drafter, GREEDY, ())


def by_hand(step, **settings):
    """The oracle's (text, logits, what ran) of each prompt."""
    given = [(*dense(b), len(prompt)) for b, prompt in enumerate(tiny.prompts())]
    return [oracle.generate(step, Cache(model, seen), logits, n, NEW, **settings) for model, seen, logits, n in given]


def agree(s, drafter_at, wanted):
    """Pass by pass: logits; at the end the texts."""
    for t in range(NEW - 1):
        logits, s = one(s, drafter=drafter_at(t + 1))
        np.testing.assert_allclose(logits, np.stack([said[t] for _, said, _ in wanted]), atol=ATOL, err_msg=f"token {t + 1}")
    assert tiny.text(s) == [text for text, *_ in wanted]
    return s


@pytest.mark.parametrize("name", FFN)
def test_ffn_skip_equals_the_rule_a_row(name):
    """A row follows its own rule beside another one; what was read is what any of them needed."""
    tau, head, tail, warm = FFN[name]
    drafter, wanted = FfnSkip(*FFN[name]), by_hand(oracle.ffn_skip, tau=tau, head=head, tail=tail, warm=warm)
    s = agree(start(drafter), lambda t: drafter, wanted)
    needed = [set(a) | set(b) for a, b in zip(*(ran for *_, ran in wanted), strict=True)]
    assert int(s.drafter.ran) == sum(map(len, needed)) and int(s.drafter.dense) == L * (NEW - 1)
    assert 0 < s.drafter.skipped == 1 - sum(map(len, needed)) / (L * (NEW - 1))
    assert all(layers == set(range(L)) for layers in needed[: max(warm - 1, 0)])


def test_ffn_skip_alone_waits_for_nobody():
    """The compiled loop, of one text: what its rule leaves out is left unread."""
    tau, head, tail, warm = FFN["some"]
    drafter, (_, (text, _, ran)) = FfnSkip(*FFN["some"]), by_hand(oracle.ffn_skip, tau=tau, head=head, tail=tail, warm=warm)
    s = tiny.go(start(drafter, rows=tiny.prompts()[1:]), tiny.FULL, drafter)
    assert tiny.text(s) == [text] and int(s.drafter.ran) == sum(map(len, ran))


@pytest.mark.parametrize("drafter", [FfnSkip(2.0), SkipDecode(least=1.0)], ids=["FFN-SkipLLM", "SkipDecode"])
def test_settings_that_skip_nothing_are_dense(drafter):
    s = tiny.go(start(drafter), tiny.FULL, drafter)
    assert tiny.text(s) == plain() and s.drafter.skipped == 0


def test_what_is_skipped_is_not_read_and_no_weight_is_copied():
    """In the compiled loop each middle feed-forward stands in a branch; weights go into it where they lie."""
    drafter = FfnSkip(*FFN["one"])
    s = start(drafter, rows=tiny.prompts()[:1])
    program = run.lower(tiny.params(), tiny.CFG, s, jnp.int32(5), policy=tiny.FULL, drafter=drafter, how=GREEDY, eos=())
    lines = tiny.compiled(program).as_text().splitlines()
    assert sum(" conditional(" in line for line in lines) == len(drafter.middle(L))
    weight = re.compile(rf"= \w+\[({tiny.CFG.F},{tiny.CFG.D}|{tiny.CFG.D},{tiny.CFG.F})\]\S* (?!parameter|get-tuple-element|bitcast)")
    assert not [line for line in lines if weight.search(line)]


@dataclass(frozen=True)
class Unwritten(Full):
    """Every slot claims to hold the row of its number; those not written yet hold NaN, which a read shows."""

    def pack_layer(self, rows, room, here):
        store = super().pack_layer(rows, room, here)
        k, v = (jnp.where((store.order_BKC == EMPTY)[..., None], jnp.nan, x) for x in (store.k_BKCH, store.v_BKCH))
        order = jnp.broadcast_to(jnp.arange(store.capacity, dtype=jnp.int32), store.order_BKC.shape)
        return store.replace(k_BKCH=k, v_BKCH=v, order_BKC=order)

    def attend(self, q, k, v, ask, new, layer, accepted, across, here):
        q, k = here.rotate(q, ask.angle_BT[:, :, None]), here.rotate(k, new.angle_BT[:, :, None])
        layer = append(layer, k, v, new, accepted)
        out, _ = decode_attention(
            q, layer.k_BKCH, layer.v_BKCH, layer.order_BKC, here.lo(ask.order_BT), ask.hi_BT, scale=here.cfg.scale, finite=False
        )
        return out, layer, across


def test_skip_decode_equals_the_rule_and_reads_no_unwritten_slot():
    """Logits pass by pass. Then one compiled loop after the other, among slots of NaN, and cut into pieces that are not those loops."""
    drafter, wanted = SkipDecode(**DECODE), by_hand(oracle.skip_decode, **DECODE)
    agree(start(drafter), lambda t: drafter.segment(t, L)[0], wanted)
    s = start(drafter, Unwritten())
    while not bool(s.done_B.all()):
        s = tiny.go(s, Unwritten(), drafter, steps=3)
    assert tiny.text(s) == [text for text, *_ in wanted]
    ran = wanted[0][2]
    assert int(s.drafter.ran) == sum(map(len, ran))
    for b, length in enumerate(tiny.LENGTHS):
        assert [int(layer.live_B[b]) - length for layer in s.layers] == [sum(i in layers for layers in ran) for i in range(L)]
    assert {len(layers) for layers in ran} == {3, 2, 1}


def test_stairs_are_even_and_lead_down():
    """Of a model of 30 layers; what runs on a lower stair ran on all above."""
    drafter = SkipDecode(least=0.5, warm=2, over=40, stairs=4)
    ran = [drafter.layers(t, 30) for t in range(50)]
    assert [len(layers) for layers in ran] == [30] * 10 + [25] * 10 + [20] * 10 + [15] * 20
    assert all(set(below) <= set(above) for above, below in zip(ran, ran[1:])) and ran[-1] == (0, 1, *range(17, 30))
    assert drafter.segment(3, 30) == (Some(tuple(range(30))), 10) and drafter.segment(44, 30) == (Some(ran[-1]), None)


def test_a_layer_that_runs_again_reads_an_unwritten_slot():
    """Negative control: without the order of the budgets the NaN shows."""
    s = start(Some((0, 2)), Unwritten())
    _, s = one(s, drafter=Some((0, 2)), policy=Unwritten())
    assert not np.isfinite(one(s, drafter=Some((0, 1, 2)), policy=Unwritten())[0]).any()


SURE = 0.95
SMALL = replace(tiny.CFG, name="small", L=1, windows=())
BOTH = runs.model().attach(small=tiny.params(SMALL))


def route(sure, length=3, how=GREEDY) -> tuple[list[list[int]], list[int]]:
    """(the text of each prompt, how many of its tokens behind the first the large model gave)."""
    drafter = Routed(SMALL, length, sure, name="small")
    prompt = tiny.read(tiny.FULL)
    s = tiny.start(prompt, tiny.FULL, drafter, how=how, m=BOTH)
    s = drafter.drive(BOTH.params, tiny.CFG, s, 1000, policy=tiny.FULL, how=how, eos=())
    return tiny.text(s), s.drafter.asked_B.tolist()


@cache
def by_hand_routed(sure):
    """The oracle's (text, who gave each token) of each prompt."""
    found = []
    for b, prompt in enumerate(tiny.prompts()):
        (large, seen, logits), small = dense(b), Model(tiny.params(SMALL), SMALL)
        found.append(oracle.routed(Cache(large, seen), Cache(small, prefill(small, prompt)[0]), logits, len(prompt), NEW, sure))
    return found


@pytest.mark.parametrize("sure", [0.0, SURE, 2.0])
def test_routing_equals_two_models_token_by_token(sure):
    """Never, sometimes and always the large model; always is plain decoding of it."""
    text, asked = route(sure)
    wanted = by_hand_routed(sure)
    assert text == [said for said, _ in wanted] and asked == [sum(who[1:]) for _, who in wanted]
    if sure > 1:
        assert text == plain() and asked == [NEW - 1] * 2
    else:
        assert all(count == 0 for count in asked) if sure == 0 else all(2 < count < NEW - 3 for count in asked)


def test_routed_text_does_not_hang_on_how_drafts_are_cut():
    """Sampled: the noise of a place is the same whichever model draws there."""
    text, asked = route(SURE, 2, Sampling(0.7))
    assert route(SURE, 5, Sampling(0.7)) == (text, asked) and all(0 < count < NEW - 1 for count in asked)


BAD = {
    "no layer between": FfnSkip(head=2, tail=2),
    "more cold layers than there are": FfnSkip(head=9),
    "fewer than first layers": SkipDecode(least=1, warm=2),
    "growing": SkipDecode(most=0.5, least=1.0),
    "small model not attached": Routed(SMALL),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_one_line(name):
    said = runs.refusal(Setup(decode=BAD[name]))
    assert said and "\n" not in said


def test_skip_decode_refuses_a_policy_whose_layers_need_one_that_is_skipped():
    said = runs.refusal(Setup(kv=tidaldecode(0.5, (0,), (1,), 8), decode=SkipDecode(**DECODE)))
    assert said and "SkipDecode does not fit" in said
    for bad in (lambda: FfnSkip(tau=0.0), lambda: SkipDecode(over=0), lambda: Routed(SMALL, 1)):
        with pytest.raises(UserError):
            bad()
