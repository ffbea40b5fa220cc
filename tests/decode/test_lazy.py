"""LazyLLM with its Aux Cache against one row, layer and head at a time: what every step chooses, who comes back, and the logits."""

import re
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
from oracles.model import Model
from oracles.reviving import Reviving, generate

from tokeff.decode.draft import Target
from tokeff.decode.loop import rows_of, run, verify
from tokeff.decode.methods import prompt_lookup, skip_decode
from tokeff.decode.revive import Revive, Revived, Waking, revived
from tokeff.decode.sample import GREEDY
from tokeff.errors import UserError
from tokeff.generation import Setup
from tokeff.kv.methods import h2o
from tokeff.kv.policy import tree_bytes
from tokeff.kv.prefill import prefill
from tokeff.models.flow import EMPTY, Here
from tokeff.models.transformer import unembed
from tokeff.reduce.cascade import LastRowCascade
from tokeff.reduce.methods import promptdistill
from tokeff.reduce.revival import LazyRows

pytestmark = [pytest.mark.core, pytest.mark.xdist_group("revival")]
CFG = replace(tiny.CFG, name="five", L=5, windows=())  # a layer between the two that choose, and one above them
CUT, NEW, ATOL = LastRowCascade((0, 2), (0.5, 0.25)), 12, 5e-4
LENGTHS = (40, 29)
FORMS = {"the paper's rule": Revive(rows=4), "two a layer and step": Revive(most=2, rows=16)}


@cache
def rows():
    return tuple(row[:n] for row, n in zip(tiny.prompts(), LENGTHS, strict=True))


def start(cut=CUT, drafter=FORMS["the paper's rule"], given=CUT, **options):
    """given: the pass over the prompt."""
    policy = LazyRows(cut)
    return tiny.start(tiny.read(policy, rows(), cfg=CFG, cut=given), policy, drafter, cfg=CFG, new=NEW, **options)


@partial(jax.jit, static_argnames="drafter")
def one(s, *, drafter):
    """(logits_BV, {layer: what it chose}, the next state) of one pass."""
    policy = LazyRows(CUT)
    target = Target(tiny.params(CFG), CFG, policy, GREEDY)
    draft = tiny.PLAIN.propose((), s.tokens_BS, s.count_B)
    flow, layers, chosen, rows_B = drafter.climb(rows_of(target.params, CFG, s, draft, drafter)[0], s.layers, target)
    draft, s = draft.replace(x_BWD=flow.x_BTD, below=CFG.L), s.replace(layers=layers, drafter=Revived(s.drafter.rows_B + rows_B))
    s = verify(target.params, CFG, s, draft, policy, drafter, GREEDY, ())
    return unembed(target.params, CFG, flow.x_BTD)[:, 0], {i: c.slot_BM for i, c in chosen.items()}, s


@cache
def by_hand(most):
    """(the oracle's run, text, steps) of each prompt."""
    model, found = Model(tiny.params(CFG), CFG), []
    for row in rows():
        known = Reviving(model, {o: model.embed(t) for o, t in enumerate(row)}, CUT.at, CUT.keep, most)
        found.append((known, *generate(known, NEW)))
    return found


def held(layer, b) -> list[int]:
    """Rows of the prompt that a layer has computed."""
    return [o for o in layer.rows.order_BKC[b, 0, : layer.S].tolist() if 0 <= o < LENGTHS[b]]


@pytest.mark.parametrize("form", FORMS)
def test_every_step_equals_the_rule(form):
    """Rows chosen at each stage and logits, step by step; then the rows that came back, and what layers hold. Another order of rounds or
    another number of rows in one changes nothing."""
    drafter = FORMS[form]
    wanted, s = by_hand(drafter.most if isinstance(drafter.most, int) else None), start(drafter=drafter)
    for t in range(NEW - 1):
        logits, chosen, s = one(s, drafter=drafter)
        for b, (_, _, said) in enumerate(wanted):
            got = {i: [o for o in slot[b].tolist() if o != EMPTY] for i, slot in chosen.items()}
            assert got == said[t][1], f"step {t}, sequence {b}"
            np.testing.assert_allclose(logits[b], said[t][0], atol=ATOL, err_msg=f"step {t}, sequence {b}")
    assert tiny.text(s) == [text for _, text, _ in wanted]
    assert s.drafter.rows_B.tolist() == [sum(len(back) for *_, back in said) for *_, said in wanted]
    for i, layer in enumerate(s.layers):
        for b, (known, *_) in enumerate(wanted):
            assert held(layer, b) == sorted(o for o in known.cache[i] if o < LENGTHS[b])


def test_what_was_dropped_comes_back_and_is_computed_once():
    """In the loop as users run it: rows that no layer above held after the prompt are there; every key that was there stays as it is, to
    the bit; and there are as many new ones as rows that came back, so none was computed twice."""
    s = start()
    before = [(held(layer, 0), held(layer, 1), np.asarray(layer.rows.k_BKCH)) for layer in s.layers]
    drafter = FORMS["the paper's rule"]
    s = tiny.go(s, LazyRows(CUT), drafter, cfg=CFG)
    assert tiny.text(s) == [text for _, text, _ in by_hand(None)]
    gained = np.zeros(2, int)
    for i, (layer, (*old, k)) in enumerate(zip(s.layers, before, strict=True)):
        for b in range(2):
            now, was = held(layer, b), old[b]
            assert set(was) <= set(now) and (len(now) > len(was)) == (i > CUT.at[0])
            np.testing.assert_array_equal(np.asarray(layer.rows.k_BKCH)[b, :, was], k[b, :, was])
            gained[b] += (len(now) - len(was)) * (i in [a + 1 for a in CUT.at])
    assert s.drafter.rows_B.tolist() == gained.tolist() and (gained > 4).all()
    assert all(most == 1 for known, *_ in by_hand(None) for most in known.computed.values())


def test_full_budgets_are_plain_decoding_to_the_bit():
    whole = LastRowCascade(CUT.at, (1.0, 1.0))
    drafter, s = Revive(), start(whole, Revive(), whole)
    assert all(layer.x_BSD is None for layer in s.layers)
    s = tiny.go(s, LazyRows(whole), drafter, cfg=CFG)
    plain = tiny.decode(rows=rows(), cfg=CFG, new=NEW)
    assert tiny.text(s) == tiny.text(plain) and s.drafter.rows_B.tolist() == [0, 0]
    for a, b in zip(s.layers, plain.layers, strict=True):
        np.testing.assert_array_equal(a.rows.k_BKCH, b.k_BKCH)
        np.testing.assert_array_equal(a.rows.v_BKCH, b.v_BKCH)


def test_a_sequence_alone_and_a_dense_prompt():
    """Beside a longer prompt or alone, the same text. Behind a prompt that lost no row, nothing has to come back."""
    drafter = FORMS["the paper's rule"]
    policy = LazyRows(CUT)
    alone = tiny.start(tiny.read(policy, rows()[1:], cfg=CFG, cut=CUT), policy, drafter, cfg=CFG, new=NEW, rows=[1])
    assert tiny.text(tiny.go(alone, policy, drafter, cfg=CFG)) == [by_hand(None)[1][1]]
    s = tiny.go(start(given=None), policy, drafter, cfg=CFG)
    assert s.drafter.rows_B.tolist() == [0, 0] and bool(s.done_B.all())


def test_what_a_step_does_not_choose_it_does_not_read():
    """NaN in the keys and values of every row that the step leaves out, in the layers that leave it out, changes no bit."""
    drafter, s = FORMS["the paper's rule"], start()
    for _ in range(3):
        _, _, s = one(s, drafter=drafter)
    logits, chosen, _ = one(s, drafter=drafter)

    def spoiled(layer, slot_BM):
        out = np.ones((2, layer.rows.capacity), bool)
        out[:, layer.S :] = out[:, 0] = False  # where a sequence chooses fewer, slot 0 fills up, with no weight
        for b in range(2):
            out[b, slot_BM[b][slot_BM[b] != EMPTY]] = out[b, LENGTHS[b] :] = False
        assert out.sum() > 20
        k, v = (jnp.where(out[:, None, :, None], jnp.nan, x) for x in (layer.rows.k_BKCH, layer.rows.v_BKCH))
        return layer.replace(rows=layer.rows.replace(k_BKCH=k, v_BKCH=v))

    low, high = (np.asarray(chosen[i]) for i in CUT.at)
    layers = [s.layers[0], *(spoiled(s.layers[i], low if i <= CUT.at[1] else high) for i in range(1, CFG.L))]
    again, *_ = one(s.replace(layers=tuple(layers)), drafter=drafter)
    np.testing.assert_array_equal(again, logits)


def test_the_program_reads_chosen_rows_and_copies_no_cache():
    """Whole stores are operands below the first stage alone; above it products are over what was chosen. The compiled loop copies no
    cache and not the vectors that wait."""
    drafter, s = Revive(rows=4), start()
    C, S = s.layers[0].rows.capacity, s.layers[0].S
    low, high = LazyRows(CUT).chooses(CFG, S).values()
    program = run.lower(tiny.params(CFG), CFG, s, jnp.int32(5), policy=LazyRows(CUT), drafter=drafter, how=GREEDY, eos=())
    products = re.findall(r"dot_general .*: \(tensor<([\dx]+)x\w+>, tensor<([\dx]+)x\w+>\)", program.as_text())
    stored = [shape[2] for pair in products for shape in (tuple(map(int, x.split("x"))) for x in pair) if len(shape) == 4]
    stored = [n for n in stored if n > 8]  # keys or values: queries and weights of at most 4 rows and 2 heads are the other operand
    assert stored.count(C) == 4, "keys and values in the layer that chooses first, of the newest row and of those that come back"
    assert set(stored) == {C, low, low + C - S, high, high + C - S}
    shapes = "|".join(re.escape(f"[{','.join(map(str, x.shape))}]") for x in (s.layers[0].rows.k_BKCH, s.layers[0].x_BSD))
    body = tiny.compiled(program).as_text().split("\nENTRY ")[0]
    assert not [line for line in body.splitlines() if re.search(rf"= \w+({shapes})\S* copy\(", line)]


def test_held_bytes_are_a_full_cache_and_the_vectors_that_wait():
    s, full = start(), tiny.packed(tiny.FULL, tiny.read(tiny.FULL, rows(), cfg=CFG), tiny.Room(NEW), cfg=CFG)
    aux, flags, lengths = 2 * 40 * CFG.D * 4, 2 * 2 * 40, CFG.L * 2 * 4
    assert tree_bytes(s.layers) == tree_bytes(full) + aux + flags + lengths
    policy, C = LazyRows(CUT), s.layers[0].rows.capacity
    read = [policy.bytes_read(layer, Here(i, CFG)) for i, layer in enumerate(s.layers)]
    row = 2 * CFG.K * (2 * CFG.H * 4 + 4)
    assert read == [row * C + 80, row * (C - 20), row * (C - 20) + 80, row * (C - 30), row * (C - 30)]


def test_bfloat16_runs():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.params(CFG))
    policy, drafter = LazyRows(CUT), FORMS["the paper's rule"]
    prompt = prefill(half, CFG, *tiny.padded(rows()), evidence=policy.needs(), cut=CUT)
    s = tiny.start(prompt, policy, drafter, cfg=CFG, new=NEW)
    s = drafter.drive(half, CFG, s, 100, policy=policy, how=GREEDY, eos=())
    assert s.layers[0].x_BSD.dtype == s.layers[1].rows.k_BKCH.dtype == jnp.bfloat16
    assert bool(s.done_B.all()) and bool((s.drafter.rows_B > 0).all())


def test_the_policy_alone_chooses_among_what_is_there():
    """Plain decoding and given tokens: the rule without rows that come back."""
    given, policy = np.asarray([[3, 17, 42], [8, 1, 30]]), LazyRows(CUT)
    prompt, model = tiny.read(policy, rows(), cfg=CFG, cut=CUT), Model(tiny.params(CFG), CFG)
    known = [Reviving(model, {o: model.embed(t) for o, t in enumerate(row)}, CUT.at, CUT.keep, 0) for row in rows()]
    for t, (logits, _) in enumerate(tiny.forced(policy, tiny.packed(policy, prompt, cfg=CFG), prompt, given, cfg=CFG)):
        wanted = [run.decode(given[b, t], LENGTHS[b] + t) for b, run in enumerate(known)]
        np.testing.assert_allclose(logits, np.stack([said for said, *_ in wanted]), atol=ATOL)
        assert not any(back for *_, back in wanted)


PARTS = revived(LastRowCascade((0, 1), (0.5, 0.25)))
BAD = {
    "another cache": Setup(**PARTS | {"kv": tiny.FULL}),
    "a cache that evicts": Setup(**PARTS | {"kv": h2o(0.5)}),
    "drafts": Setup(**PARTS | {"decode": prompt_lookup()}),
    "some layers alone": Setup(**PARTS | {"decode": skip_decode(least=1, warm=1, over=6)}),
    "nothing above": Setup(**revived(LastRowCascade((0, 2), (0.5, 0.25)))),
    "no such layer": Setup(**revived(LastRowCascade((0, 7), (0.5, 0.25)))),
    "another pass's rows": Setup(kv=LazyRows(promptdistill(0.5, 1)), decode=Revive()),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_work_is_refused_in_one_line(name):
    said = runs.refusal(BAD[name])
    assert said and "\n" not in said and len(said) < 250
    assert runs.refusal(Setup(**PARTS)) is None


def test_a_prompt_under_another_pass_is_refused_before_it_is_read():
    for other in (promptdistill(0.5, 1), LastRowCascade((0, 2), (0.5, 0.5))):
        with pytest.raises(UserError, match="rows come back that another pass drops"):
            tiny.read(LazyRows(CUT), rows(), cfg=CFG, cut=other)
    for bad in (lambda: Revive(most=0.0), lambda: Revive(most=1.5), lambda: Revive(rows=0)):
        with pytest.raises(UserError):
            bad()


def test_shares_of_the_depth_become_layers_of_the_model():
    policy = LazyRows(LastRowCascade((0.0, 0.4), (0.5, 0.25)))
    m = replace(runs.model(), cfg=CFG)
    assert policy.fit(m) == LazyRows(CUT) and policy.role(3) == 3 and policy.fit(m).role(3) is None
    few = LastRowCascade((0, 2), (0.995, 0.99))  # 101 and 100 of 101 rows, in as many slots
    assert LazyRows(few).chooses(CFG, 101) == {0: 101, 2: 101} and not LazyRows(LastRowCascade((0, 2), (1.0, 1.0))).chooses(CFG, 101)
    assert LazyRows(LastRowCascade((0, 2), (12, 12))).chooses(CFG, 101) == {0: 12}
    assert Waking(CUT, 2).absent(40) == 2 and Waking(CUT).absent(40) == 40
