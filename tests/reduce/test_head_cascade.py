"""Heads that a pass lets go on the way up: which, against a naive oracle; what is no longer done, held and read; and what refuses it."""

from dataclasses import replace
from functools import cache
from math import ceil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import test_api
import tiny
from oracles import model as oracle
from oracles import spatten
from test_score_costs import products

import tokeff
from tokeff.context import Compressed
from tokeff.errors import UserError
from tokeff.evals import mean_rows
from tokeff.generation import Setup, check_pass
from tokeff.kv import methods as kv
from tokeff.kv.policy import tree_bytes
from tokeff.kv.prefill import Gather, blank, prefill
from tokeff.kv.some_heads import SomeHeads
from tokeff.models.flow import Flow, Here
from tokeff.models.transformer import one_layer, orders
from tokeff.reduce import methods as reduce
from tokeff.reduce.heads import HeadCascade, loudest, loudness
from tokeff.sparse import methods as sparse

pytestmark = [pytest.mark.core, pytest.mark.xdist_group("SpAttenHeads")]
CFG = replace(tiny.CFG, name="four kv heads", N=8, K=4, L=4, windows=())
GIVEN, ATOL = np.random.default_rng(2).integers(0, CFG.V, (2, 3)), 5e-4
CASES = {  # a pass, and what the oracle is told: shares of rows and numbers of kv heads, by layer
    "both": (HeadCascade((0, 2), (0.7, 0.4), (0, 1), (0.75, 0.5)), {0: 0.7, 2: 0.4}, {0: 3, 1: 2}),
    "heads alone": (HeadCascade((1,), (1.0,), (0, 2), (2, 1)), {1: 1.0}, {0: 2, 2: 1}),
    "heads after rows": (HeadCascade((0,), (0.5,), (2,), (0.25,)), {0: 0.5}, {2: 1}),
}  # fmt: skip


@cache
def known(name: str) -> list[spatten.Cascades]:
    model, (_, rows, heads) = oracle.Model(tiny.params(CFG), CFG), CASES[name]
    shares = [{at: ceil(round(share * n, 6)) for at, share in rows.items()} for n in tiny.LENGTHS]
    return [spatten.Cascades(model, ids, share, heads) for ids, share in zip(tiny.prompts(), shares, strict=True)]


@cache
def read(name: str):
    return tiny.read(tiny.FULL, cfg=CFG, cut=CASES[name][0])


@pytest.mark.parametrize("name", CASES)
def test_every_layer_has_the_heads_and_rows_of_the_oracle(name):
    prompt, cut = read(name), CASES[name][0]
    for b, found in enumerate(known(name)):
        for i, layer in enumerate(prompt.layers):
            heads = list(range(CFG.K)) if layer.head_BK is None else layer.head_BK[b].tolist()
            assert heads == found.alive[i] and layer.k_BKSH.shape[1] == len(heads) == cut.heads_in(i, CFG)
            assert [o for o in layer.order_BKS[b, 0].tolist() if o >= 0] == sorted(found.cache[i][heads[0]])
        np.testing.assert_allclose(prompt.logits_BV[b], found.logits, atol=ATOL)


@pytest.mark.parametrize("name", CASES)
def test_the_choice_holds_in_decoding(name):
    """Three more tokens under the heads that each prompt left; those that are gone hold nothing."""
    prompt, policy = read(name), Setup(cut=CASES[name][0]).kv
    assert policy == SomeHeads(tiny.FULL)
    packed = tiny.packed(policy, prompt, cfg=CFG)
    for t, (logits, layers) in enumerate(tiny.forced(policy, packed, prompt, GIVEN, cfg=CFG)):
        for b, found in enumerate(known(name)):
            np.testing.assert_allclose(logits[b], found.decode(int(GIVEN[b, t]), tiny.LENGTHS[b] + t), atol=ATOL)
            for i, layer in enumerate(layers):
                held = tiny.kept(policy, layer)[b]
                assert [h for h, orders in enumerate(held) if orders] == found.alive[i]
                assert all(orders == sorted(found.cache[i][h]) for h, orders in enumerate(held) if orders)
    known.cache_clear()


def test_what_continues_the_prompt_has_its_heads():
    """Three more tokens in one call, before anything is packed."""
    tokens, length = tiny.padded(GIVEN.tolist(), 8)
    more = prefill(tiny.params(CFG), CFG, tokens, length, after=read("both"))
    for b, logits in enumerate(more.logits_BV):
        model = oracle.Model(tiny.params(CFG), CFG)
        _, rows, heads = CASES["both"]
        n = tiny.LENGTHS[b]
        found = spatten.Cascades(model, tiny.prompts()[b], {at: ceil(round(share * n, 6)) for at, share in rows.items()}, heads)
        wanted = [found.decode(int(token), n + t) for t, token in enumerate(GIVEN[b])]
        np.testing.assert_allclose(logits, wanted[-1], atol=ATOL)
        assert [layer.head_BK is None for layer in more.layers] == [True, False, False, False]


def test_magnitudes_of_rows_that_are_there():
    """Padding and numbers that are none say nothing; the first of equals stay; what is left keeps its number and its sum."""
    out = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 6, 2)), jnp.float32)
    order = jnp.asarray([[0, 1, -1]])
    said = loudness(out.at[0, 1, 4].set(jnp.nan), order, 2)
    wanted = np.abs(np.asarray(out))[0, :2].reshape(2, 3, 4)
    wanted[1, 2, :2] = 0
    np.testing.assert_allclose(said[0], wanted.sum(axis=(0, 2)), rtol=1e-6)
    flow = Flow(jnp.zeros((1, 3, 1)), order, order, order, head_BK=jnp.asarray([[1, 4, 5]]), loud_BK=jnp.asarray([[2.0, 1.0, 2.0]]))
    left = loudest(flow, 2)
    assert left.head_BK.tolist() == [[1, 5]] and left.loud_BK.tolist() == [[2.0, 2.0]]
    assert loudest(flow, 1).head_BK.tolist() == [[1]]


def test_heads_that_are_gone_cost_nothing():
    """Half of the heads: half of a layer's projections and attention in the prompt, half of the cache, half of what a step reads."""
    B, T = 2, 64

    def layer(head_BK):
        order = orders(jnp.asarray(tiny.LENGTHS), T)
        flow = Flow(jnp.zeros((B, T, CFG.D)), order, order, order, head_BK=head_BK)
        w, rows = tiny.params(CFG).blocks[1], blank(CFG, B, jnp.asarray(tiny.LENGTHS), "float32")[1]
        return one_layer(w, flow, rows, None, None, policy=Gather(), cut=None, here=Here(1, CFG), halves=(True, False))

    whole, half = (products(jax.make_jaxpr(layer)(head).jaxpr) for head in (None, jnp.zeros((B, 2), jnp.int32)))
    assert half * 2 == whole
    policy, prompt = SomeHeads(tiny.FULL), read("heads alone")
    all_heads, some, one = (tiny.packed(policy, prompt, cfg=CFG)[i] for i in (0, 1, 3))
    for layer, share in ((some, 2), (one, 4)):
        numbers = tree_bytes(layer.head_BK) + tree_bytes(layer.rows.live_B)
        assert (tree_bytes(layer) - numbers) * share == tree_bytes(all_heads) - tree_bytes(all_heads.rows.live_B)
        assert policy.bytes_read(layer, Here(1, CFG)) == tree_bytes(layer)


def test_operations_and_rows_are_counted_by_heads():
    """By hand: above the first layer half of the heads project, ask and are asked."""
    cut, n, row = HeadCascade((0,), (1.0,), (0,), (0.5,)), 20, CFG.D * (2 * CFG.N + 2 * CFG.K) * CFG.H
    layer = n * row + sum(2 * CFG.N * CFG.H for t in range(n) for _ in range(t + 1))
    fed = CFG.L * 3 * n * CFG.D * CFG.F + CFG.D * CFG.V
    assert mean_rows.flops(cut, CFG, n) == pytest.approx(2 * (layer * (1 + (CFG.L - 1) / 2) + fed))
    assert mean_rows.held_rows(cut, CFG, n) == pytest.approx((1 + (CFG.L - 1) / 2) / CFG.L)


# -- with other parts


def test_the_paper_whole():
    """Both cascades, planes of keys, few values: drafts give the text that one token at a time gives."""
    parts = {"kv": kv.spatten_cache(4, 4, 0.4, 0.5, 8), "cut": reduce.spatten_heads(0.6, (0, 1), 0.5, (0,))}
    m, texts = test_api.model(), [test_api.text(64), test_api.text(40, 2)]
    drafts = tokeff.decode.token_recycling(tiny.TREE)
    plain, drafted = (tokeff.generate(m, texts, max_new=10, stop=False, decode=d, **parts) for d in (None, drafts))
    assert plain.tokens == drafted.tokens


def test_a_saved_context_has_its_heads(tmp_path):
    m, question = test_api.model(), [test_api.text(5, 2), test_api.text(3, 3)]
    context = tokeff.compress(m, test_api.text(64), cut=reduce.spatten_heads(0.6, (0, 1), 0.5, (0,)), room=16)
    context.save(tmp_path / "c")
    again = Compressed.load(m, tmp_path / "c")
    assert [layer.head_BK is None for layer in again.layers] == [True, False, False]
    assert tokeff.generate(m, question, cache=again, max_new=6).tokens == tokeff.generate(m, question, cache=context, max_new=6).tokens


@pytest.mark.parametrize(
    ("policy", "word"),
    [
        (kv.duo_attention(0.5, ((0,), (), (0, 1))), "classes"), (kv.kvzip(0.5, piece=20, ask=(3,)), "all layers"),
        (kv.compresskv(0.5, 6, judges=((0,),)), "judges"), (sparse.tidaldecode(0.5, (0,), (1,), 8), "another layer"),
    ],
)  # fmt: skip
def test_policies_that_need_all_heads_are_refused(policy, word):
    reason = runs.refusal(Setup(kv=policy, cut=HeadCascade((0,), (0.9,), (0,), (0.5,))))
    assert reason and word in reason and "heads_left" in reason
    assert "SomeHeads" not in repr(Setup(kv=policy, cut=HeadCascade((0,), (0.9,), (0,), (1.0,))).kv)


def test_prefills_that_need_all_heads_are_refused():
    cut = CASES["both"][0]
    with pytest.raises(UserError, match="heads_left"):
        check_pass(sparse.minference(heads=((0, 1),)), cut)
    check_pass(sparse.tri_shape(), cut)


BAD = {
    "a layer without a share": (HeadCascade((0,), (0.5,), (0, 1), (0.5,)), "share for each"),
    "layers that do not ascend": (HeadCascade((0,), (0.5,), (1, 0), (0.5, 0.5)), "share for each"),
    "a layer that is not there": (HeadCascade((0,), (0.5,), (3,), (0.5,)), "share for each"),
    "no head": (HeadCascade((0,), (0.5,), (0,), (0,)), "kv heads"),
    "more heads than there are": (HeadCascade((0,), (0.5,), (0,), (3,)), "kv heads"),
    "no share": (HeadCascade((0,), (0.5,), (0,), (1.5,)), "kv heads"),
    "heads that come back": (HeadCascade((0,), (0.5,), (0, 1), (1, 2)), "do not grow"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings(name):
    cut, word = BAD[name]
    with pytest.raises(UserError, match=word) as error:
        cut.check(tiny.CFG, 64)
    assert "\n" not in str(error.value) and len(str(error.value)) < 220


def test_stages_are_tuples():
    with pytest.raises(UserError, match="heads_at"):
        HeadCascade((0,), (0.5,), 0.5, (0.5,))  # type: ignore[arg-type]
    assert reduce.spatten_heads(heads_left=0.625).heads_left == pytest.approx((0.625**0.5, 0.625))
