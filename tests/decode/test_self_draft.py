"""Drafts by the model's own layers: the text and the caches are plain decoding's, the drafts those of the layers that made them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from driven import SHORT, decode, ending, model, plain, start
from heads import Probe
from oracles.against import dense
from oracles.float64 import float64_model
from oracles.policies import Cache
from oracles.skipping import Skipping, agreement, chain, grown

from tokeff.decode.draft import Target
from tokeff.decode.dynamic_exit import DynamicExit, Shadow, cost
from tokeff.decode.loop import rows_of, settle
from tokeff.decode.sample import GREEDY
from tokeff.decode.self_draft import EarlyExit
from tokeff.decode.swift import Agreement, Swift, find_skips
from tokeff.errors import UserError
from tokeff.kv import methods as kv
from tokeff.models.transformer import stack, unembed
from tokeff.sparse.methods import tidaldecode

pytestmark = [pytest.mark.core, pytest.mark.xdist_group("self-draft")]
FULL, H2O, TIDAL = kv.full(), kv.h2o(0.5, evict=4), tidaldecode(0.5, (0,), (1,), 8)
EXIT, SWIFT = EarlyExit(2, 4), Swift((1,), (2,), 3, 3, sure=0.9)


@pytest.fixture(autouse=True, scope="module")
def double():
    with float64_model():
        yield


@functools.cache
def drafted(policy, drafter, rows=None):
    return decode(policy, drafter, rows=rows)


def same(policy, drafter, rows=None) -> bool:
    """Whether the text is plain decoding's; fails where no draft was accepted, since nothing would be shown."""
    s = drafted(policy, drafter, rows)
    assert int(s.passes_B.max()) < tiny.NEW - 1
    return tiny.text(s) == plain(policy, rows)


@pytest.mark.parametrize("policy", [FULL, H2O], ids=["full", "h2o"])
@pytest.mark.parametrize("drafter", [EXIT, SWIFT], ids=["exit", "swift"])
def test_text_is_that_of_plain_decoding(drafter, policy):
    """Ragged batch; eviction in blocks by attention mass, in layers that run alone and in layers that do not."""
    assert same(policy, drafter)


def test_a_selection_that_crosses_layers():
    """Layer 1 chooses for those above it: they may not run without it, below the exit or above."""
    assert same(TIDAL, EarlyExit(1, 3))
    assert "layer 2 reads" in EarlyExit(2, 3).fits(TIDAL, tiny.CFG)
    assert "layer 2 reads" in Swift((1,), (), 3).fits(TIDAL, tiny.CFG)
    assert Swift((2,), (1,), 3).fits(TIDAL, tiny.CFG) is None


@pytest.mark.parametrize("drafter", [EXIT, SWIFT], ids=["exit", "swift"])
def test_prompt_of_one_token(drafter):
    assert same(FULL, drafter, SHORT)


@pytest.mark.parametrize("drafter", [EXIT, SWIFT], ids=["exit", "swift"])
def test_end_of_sequence_inside_an_accepted_span(drafter):
    eos = ending(FULL, drafter)
    wanted = [row[: row.index(eos) + 1] if eos in row else row for row in plain(FULL)]
    s = decode(FULL, drafter, eos=(eos,))
    assert tiny.text(s) == wanted and s.done_B.all()


@pytest.mark.parametrize("drafter", [EXIT, SWIFT], ids=["exit", "swift"])
def test_length_limits_of_rows(drafter):
    for limit in range(2, 9):
        s = start(FULL, drafter).replace(limit_B=jnp.asarray([limit, tiny.NEW], jnp.int32))
        s = tiny.go(s, FULL, drafter, dtype="float64")
        assert tiny.text(s) == [plain(FULL)[0][:limit], plain(FULL)[1]]


@pytest.mark.parametrize("policy", [FULL, H2O], ids=["full", "h2o"])
@pytest.mark.parametrize("drafter", [EXIT, SWIFT], ids=["exit", "swift"])
def test_caches_are_those_of_plain_decoding(drafter, policy):
    """Rows, where they lie, and the attention they drew; what was drafted and refused has left nothing."""
    one = decode(policy, tiny.PLAIN)
    many = settle(model().params, tiny.CFG, jax.tree.map(jnp.copy, drafted(policy, drafter)), policy=policy)
    for a, b in zip(one.layers, many.layers, strict=True):
        np.testing.assert_array_equal(a.order_BKC, b.order_BKC)
        held = np.asarray(a.order_BKC) >= 0
        for x, y in ((a.k_BKCH, b.k_BKCH), (a.v_BKCH, b.v_BKCH), (a.mass_BKC, b.mass_BKC)):
            if x is not None:
                np.testing.assert_allclose(np.asarray(x)[held], np.asarray(y)[held], atol=1e-10)


def test_logits_of_a_resumed_pass_are_those_of_a_whole_one():
    """What left the lower layers row by row is what all rows together leave there, behind accepted drafts and refused ones."""
    params, s = model().params, start(FULL, EXIT)
    s = tiny.go(s, FULL, EXIT, dtype="float64", steps=2)

    @jax.jit
    def both(params, s):
        draft, after = EXIT.draft(s, Target(params, tiny.CFG, FULL, GREEDY))
        out = []
        for below, layers, d in ((draft.below, after.layers, draft), (0, s.layers, draft.replace(x_BWD=None))):
            flow, _ = rows_of(params, tiny.CFG, s, d, EXIT)
            flow, *_ = stack(params, tiny.CFG, flow, layers, policy=FULL, accepted=s.accepted, run=tuple(range(below, tiny.CFG.L)))
            out.append(unembed(params, tiny.CFG, flow.x_BTD))
        return out

    resumed, whole = both(params, s)
    assert s.accepted.count_B.max() > 1
    np.testing.assert_allclose(resumed, whole, atol=1e-9)


@pytest.mark.parametrize("drafter", [EXIT, SWIFT], ids=["exit", "swift"])
def test_drafts_are_those_of_the_layers_that_make_them(drafter):
    """Pass by pass against the oracle's rows: the chain, where it ends for want of confidence, and the guesses beside it."""
    above = tuple(range(EXIT.exit, tiny.CFG.L))
    skip, sure = ((above, above), 0.0) if drafter is EXIT else ((SWIFT.attention, SWIFT.ffn), SWIFT.sure)
    s, params, lengths = start(FULL, drafter), model().params, set()
    caches = [Cache(dense(b)[0], dense(b)[1]) for b in range(2)]
    light = Skipping(tiny.params(), tiny.CFG, *skip)
    whole = Skipping(tiny.params(), tiny.CFG)
    propose = jax.jit(lambda params, s: drafter.draft(s, Target(params, tiny.CFG, FULL, GREEDY))[0])
    for _ in range(3):
        draft, before, count = propose(params, s), tiny.text(s), np.asarray(s.count_B)
        for b, cache in enumerate(caches):
            tokens, ranked = chain(light, cache, before[b][-1], drafter.length, sure)
            valid, given = np.asarray(draft.valid_BW)[b], np.asarray(draft.tokens_BW)[b]
            assert given[1 : 1 + drafter.length][valid[1 : 1 + drafter.length]].tolist() == tokens
            lengths.add(len(tokens))
            for node in range(1 + drafter.length, drafter.nodes):
                at = int(draft.parent_BW[b, node])
                assert not valid[node] or given[node] in ranked[at][1:3]
        s = tiny.go(s, FULL, drafter, dtype="float64", steps=1)
        for b, cache in enumerate(caches):
            for t, token in enumerate(tiny.text(s)[b][len(before[b]) - 1 : -1]):
                whole.row(cache, token, int(count[b]) - 1 + t)
    assert drafter is EXIT or len(lengths) > 1


# -- SWIFT's search


def test_agreement_counts_what_the_skipped_model_names():
    ids, tail = list(tiny.prompts()[0]) + plain(FULL)[0], 19
    score = Agreement.of(model(), ids, tail)
    assert score(((), ())) == 1.0
    light = Skipping(tiny.params(), tiny.CFG, (1,), (1, 2))
    caches = Cache(dense(0)[0], dense(0)[1])
    wanted = agreement(light, caches, ids[len(ids) - tail - 1 :])
    assert score(((1,), (1, 2))) == pytest.approx(wanted) and 0 < wanted < 1


def test_the_search_finds_the_best_of_what_it_tries():
    ids = list(tiny.prompts()[0]) + plain(FULL)[0]
    found = find_skips(model(), ids, share=0.5, tail=19, tries=12, good=1.0)
    assert sum(map(len, found)) == 1 and set(found[0]) | set(found[1]) == {1}
    score = Agreement.of(model(), ids, 19)
    assert score(found) == max(map(score, [((1,), ()), ((), (1,))]))
    with pytest.raises(UserError, match="smaller tail"):
        find_skips(model(), ids[:40])


# -- DEL's choice


def shadow(light: Skipping, cache: Cache, text: list[int], order: int) -> np.ndarray:
    """(right ones before the first wrong one, wrong, and their confidence) of what the layers name for text[1:]."""
    cache, sums = grown(cache), np.zeros(4)
    for t, (token, after) in enumerate(zip(text, text[1:])):
        logits = light.row(cache, token, order + t)
        wrong = int(np.argmax(logits) != after)
        sums[[wrong, 2 + wrong]] += 1, 1 / np.exp(logits - logits.max()).sum()
        if wrong:
            break
    return sums


DEL = DynamicExit((1, 3), (2, 4), every=3)


def test_dynamic_exit_keeps_the_text_and_changes_its_mind():
    """It begins in the belief that only the deep exit is ever right, and gives that up for the shallow one, whose drafts cost less."""
    s, chosen = start(FULL, DEL), []
    s = s.replace(drafter=s.drafter.replace(hit_L=jnp.asarray([0.01, 0.5], jnp.float32), miss_L=jnp.asarray([0.5, 0.01], jnp.float32)))
    while not s.done_B.all():
        chosen.append(DEL.best(s.drafter, tiny.CFG))
        s = tiny.go(s, FULL, DEL, dtype="float64", steps=3)
    assert tiny.text(s) == plain(FULL) and int(s.passes_B.max()) < tiny.NEW - 1
    assert chosen[0][0] == 3 and chosen[-1][0] == 1, chosen


def test_shadow_tokens_are_counted_up_to_the_first_wrong_one():
    """Every exit's fading sums after each pass, from the oracle's layers at the nodes of the accepted path."""
    s, params, wanted = start(FULL, DEL), model().params, {e: np.array([0.5, 0.5, 0.25, 0.25]) for e in DEL.exits}
    caches = [Cache(dense(b)[0], dense(b)[1]) for b in range(2)]
    count = jax.jit(lambda p, s: DEL.counted(s, Target(p, tiny.CFG, FULL, GREEDY)))
    for _ in range(3):
        before, order = tiny.text(s), np.asarray(s.count_B) - 1
        s = tiny.go(s, FULL, DEL, dtype="float64", steps=1)
        for e in DEL.exits:
            wanted[e] *= DEL.fade
            above = tuple(range(e, tiny.CFG.L))
            for b, cache in enumerate(caches):
                text = tiny.text(s)[b][len(before[b]) - 1 :]
                wanted[e] += shadow(Skipping(tiny.params(), tiny.CFG, above, above), cache, text, int(order[b]))
        for b, cache in enumerate(caches):
            for t, token in enumerate(tiny.text(s)[b][len(before[b]) - 1 : -1]):
                Skipping(tiny.params(), tiny.CFG).row(cache, token, int(order[b]) + t)
        given = count(params, s)
        for i, e in enumerate(DEL.exits):
            sums = [float(x[i]) for x in (given.hit_L, given.miss_L, given.sure_hit_L, given.sure_miss_L)]
            np.testing.assert_allclose(sums, wanted[e], atol=1e-5)
    assert wanted[3][0] > 0.5


def test_the_best_pair_has_the_most_tokens_for_its_cost():
    state = Shadow(*(jnp.asarray(x) for x in ((3.0, 9.0), (7.0, 1.0), (0.0, 0.0), (0.0, 0.0))), None, None, None)
    rates = {1: 0.3, 3: 0.9}
    value = {(e, n): sum(rates[e] ** j for j in range(n + 1)) / cost(e, n, tiny.CFG) for e in (1, 3) for n in (2, 4)}
    assert DEL.best(state, tiny.CFG) == max(value, key=value.get)


# -- weights of a drafter's own, and features of the target


@pytest.mark.parametrize("layer", tiny.sampled(range(tiny.CFG.L), (1,)), ids=["first", "middle", "last"])
def test_heads_on_what_a_layer_puts_out(layer):
    """Heads that were made to be right now and then, and random ones."""
    probe, passes = Probe(layer=layer, length=3), []
    for clever in (True, False):
        s = decode(FULL, probe, model(probe=probe.weights(tiny.CFG, clever)))
        assert tiny.text(s) == plain(FULL)
        passes.append(int(s.passes_B.sum()))
    assert passes[0] < passes[1]


# -- what is refused


@pytest.mark.parametrize(
    ("drafter", "says"),
    [
        (EarlyExit(3, 2), "exit=2 or less"), (DynamicExit((1, 5), (2,)), "exit=2 or less"), (Swift((3,), (), 2), "0 to 2"),
        (Swift((1,), (), 2, candidates=62), "lower candidates"),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit_the_model_is_refused(drafter, says):
    with pytest.raises(UserError, match=says):
        drafter.check(model())


@pytest.mark.parametrize(
    "make",
    [lambda: EarlyExit(0, 2), lambda: EarlyExit(2, 0), lambda: Swift((), (), 0), lambda: DynamicExit((3, 1)), lambda: DynamicExit(every=0),
     lambda: Swift((), (), 2, coupled=False)],
)  # fmt: skip
def test_bad_settings_are_refused_in_one_line(make):
    with pytest.raises(UserError) as error:
        make()
    assert "\n" not in str(error.value)
