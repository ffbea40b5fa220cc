"""Every cache policy against its naive oracle: kept rows and logits, decoding one row at a time, two unequal prompts in a batch."""

from math import ceil

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from oracles import classes, retelling, scores
from oracles import policies as oracle
from oracles.against import agree, dense, read

from tokeff.errors import UserError
from tokeff.kv import methods as kv
from tokeff.kv.budget import Spread
from tokeff.kv.cache import Room
from tokeff.kv.extend import pack
from tokeff.kv.pool import KeepByHead
from tokeff.kv.score import Chance
from tokeff.models.flow import Here

pytestmark = pytest.mark.core
ROWS = [ceil(0.5 * n) for n in tiny.LENGTHS]  # 32 and 26


def caches(make):
    """One oracle cache per prompt: make(model, seen, rows, b)."""
    return [make(*dense(b)[:2], ROWS[b], b) for b in range(len(ROWS))]


def chance(b):
    """tokeff's own random scores of prompt b: what is random is not for an oracle to say, what is kept is."""
    layers = read((), None).layers
    score = [np.asarray(Chance(3).first(rows, Here(i, tiny.CFG)))[b] for i, rows in enumerate(layers)]
    return lambda layer, head, order: score[layer][head, order]


def small_keys(b):
    """Minus the length of each key of prompt b, not rotated: equal for equal tokens in the first layer."""
    seen = dense(b)[1]
    return lambda layer, head, order: -np.sqrt((seen[layer].k[order][head] ** 2).sum())


HEADS = ((0, 1), (1,), ())
JUDGES, ERRORS = ((0, 3), (1,), (2, 3)), (0.5, 0.3, 0.2)


def own(layer):
    """The heads that keep everything, of each layer."""
    return HEADS[layer]


def told(b):
    """The oracle's scores of prompt b told again in pieces of 20 tokens."""
    model, seen, _ = dense(b)
    return retelling.reconstruction(model, seen, tiny.prompts()[b], 20, 4, (3, 5))


CASES = {
    "full": (kv.full(), lambda m, s, n, b: oracle.Cache(m, s)),
    "random": (kv.random_rows(0.5, seed=3), lambda m, s, n, b: oracle.Given(m, s, n, chance(b))),
    "recent": (kv.recent_rows(0.5), lambda m, s, n, b: oracle.Given(m, s, n, lambda layer, head, order: order)),
    "streaming": (kv.streaming_llm(0.5), lambda m, s, n, b: oracle.StreamingLLM(m, s, n, 4)),
    "streaming in blocks": (kv.streaming_llm(0.5, evict=4), lambda m, s, n, b: oracle.StreamingLLM(m, s, n, 4, 4)),
    "h2o": (kv.h2o(0.5), lambda m, s, n, b: oracle.H2O(m, s, n, n // 2)),
    "h2o in blocks": (kv.h2o(0.5, evict=4), lambda m, s, n, b: oracle.H2O(m, s, n, n // 2, 4)),
    "lm-infinite": (kv.lm_infinite(0.5, 4), lambda m, s, n, b: oracle.LMInfinite(m, s, n, 4)),
    "lm-infinite in blocks": (kv.lm_infinite(0.5, 4, evict=4), lambda m, s, n, b: oracle.LMInfinite(m, s, n, 4, 4)),
    "lm-infinite, further": (kv.lm_infinite(0.5, 4, 40), lambda m, s, n, b: oracle.LMInfinite(m, s, n, 4, cap=40)),
    "tova": (kv.tova(0.5), lambda m, s, n, b: scores.TOVA(m, s, n)),
    "tova in blocks": (kv.tova(0.5, evict=4), lambda m, s, n, b: scores.TOVA(m, s, n, 4)),
    "a2sf": (kv.a2sf(0.5, 0.8, recent=8), lambda m, s, n, b: scores.Faded(m, s, n, 0.8, 8)),
    "a2sf in blocks": (kv.a2sf(0.5, 0.8, recent=8, evict=4), lambda m, s, n, b: scores.Faded(m, s, n, 0.8, 8, 4)),
    "alisa": (kv.alisa(0.5, 4), lambda m, s, n, b: scores.Faded(m, s, n, 0.75, n // 2)),
    "knorm": (kv.knorm(0.45), lambda m, s, n, b: oracle.Given(m, s, ceil(0.45 * tiny.LENGTHS[b]), small_keys(b))),
    "keydiff": (kv.keydiff(0.5), lambda m, s, n, b: scores.KeyDiff(m, s, n, block=1)),
    "lagkv": (kv.lagkv(0.5, 8, 3), lambda m, s, n, b: scores.LagKV(m, s, n, 8, 3)),
    "expected": (kv.expected_attention(0.5, 40, 3), lambda m, s, n, b: scores.Expected(m, s, n, 40, 3, 0.0)),
    "expected, floor": (kv.expected_attention(0.5, 40, 3, 0.01), lambda m, s, n, b: scores.Expected(m, s, n, 40, 3, 0.01)),
    "lagkv, all in the first lags": (kv.lagkv(0.5, 32, 3), lambda m, s, n, b: scores.LagKV(m, s, n, 32, 3)),
    "chunkkv": (kv.chunkkv(0.5, 6, 5), lambda m, s, n, b: scores.ChunkKV(m, s, n, 6, 5)),
    "rkv in blocks": (kv.rkv(0.5, 6, 0.3, evict=4), lambda m, s, n, b: scores.RKV(m, s, n, 6, 0.3, 4)),
    "snapkv": (kv.snapkv(0.5, 6), lambda m, s, n, b: oracle.SnapKV(m, s, n, 6, 5, "avg")),
    "snapkv, max": (kv.snapkv(0.5, 6, 7, "max"), lambda m, s, n, b: oracle.SnapKV(m, s, n, 6, 7, "max")),
    "pyramidkv": (kv.pyramidkv(0.3, 6), lambda m, s, n, b: oracle.PyramidKV(m, s, ceil(0.3 * tiny.LENGTHS[b]), 6, 5, "avg", 20)),
    "pyramidkv, turned": (kv.pyramidkv(0.7, 6), lambda m, s, n, b: oracle.PyramidKV(m, s, ceil(0.7 * tiny.LENGTHS[b]), 6, 5, "avg", 20)),
    "pyramidkv, rows": (kv.pyramidkv(20, 6, beta=3), lambda m, s, n, b: oracle.PyramidKV(m, s, 20, 6, 5, "avg", 3)),
    "duo": (kv.duo_attention(HEADS, 0.5), lambda m, s, n, b: classes.Classes(m, s, n, 4, own)),
    "duo in blocks": (kv.duo_attention(HEADS, 0.5, evict=4), lambda m, s, n, b: classes.Classes(m, s, n, 4, own, 4)),
    "duo, one entry": (kv.duo_attention(((1,),), 0.5, 3, 2), lambda m, s, n, b: classes.Classes(m, s, n, 3, lambda layer: (1,), 2)),
    "razor": (kv.razor_attention(HEADS, 0.5), lambda m, s, n, b: classes.Razor(m, s, n, 4, own, lambda n: n)),
    "razor, counted once": (kv.razor_attention(HEADS, 0.5, 4, False), lambda m, s, n, b: classes.Razor(m, s, n, 4, own, lambda n: 1)),
    "kvzip": (kv.kvzip(0.5, 4, 20, (3, 5), 4), lambda m, s, n, b: retelling.KVzip(m, s, n, 4, told(b))),
    "compresskv": (kv.compresskv(0.5, 6, 5, JUDGES), lambda m, s, n, b: scores.CompressKV(m, s, n, 6, 5, JUDGES, ())),
    "compresskv, by layer": (
        kv.compresskv(0.5, 6, 5, JUDGES, ERRORS), lambda m, s, n, b: scores.CompressKV(m, s, n, 6, 5, JUDGES, ERRORS, n // 4)
    ),
    "compresskv, by layer above rows": (
        kv.compresskv(0.5, 6, 5, JUDGES, ERRORS, 12), lambda m, s, n, b: scores.CompressKV(m, s, n, 6, 5, JUDGES, ERRORS, 12)
    ),
    "adakv": (kv.adakv(0.5, 6, page=4), lambda m, s, n, b: oracle.AdaKV(m, s, n, 6, 7, "max", 0.2)),
}


PLAINLY = [name for name in CASES if "," not in name and name not in ("a2sf in blocks", "tova in blocks")]


@pytest.mark.parametrize("name", tiny.sampled(CASES, PLAINLY))
def test_policy_equals_its_oracle(name):
    policy, make = CASES[name]
    agree(policy, caches(make))


def test_oracles_differ():
    """The comparison means something: no two policies keep the same rows of this prompt."""
    same = ("blocks", "lm-infinite", "pyramidkv, turned", "pyramidkv, rows", "razor", "one entry")  # the rows of another entry
    kept = {
        name: tuple(tuple(caches(make)[0].kept(1, h)) for h in range(2))
        for name, (_, make) in CASES.items()
        if not any(word in name for word in same)
    }
    assert len(set(kept.values())) == len(kept)


def test_pool_equals_rows_at_equal_budgets():
    """A safeguard of 1 gives every head the same number of rows: pages and plain slots then hold and read the same."""
    rule = kv.snapkv(0.5, 6)
    make = CASES["snapkv"][1]
    agree(KeepByHead(rule, Spread(1.0), page=4), caches(make))


def test_heads_have_different_budgets_and_memory_is_their_sum():
    """AdaKV's heads hold unequal numbers of rows; the pool is as large as their sum, to a page a head."""
    policy = kv.adakv(0.5, 6, page=4)
    prompt = read(policy.needs())
    unequal = 0
    for layer in pack(policy, prompt.layers, Room(0), tiny.CFG):
        counts = [[len(head) for head in row] for row in tiny.kept(policy, layer)]
        assert [sum(row) for row in counts] == [2 * n for n in ROWS]
        unequal += counts[0][0] != counts[0][1]
        assert layer.pool.k_BPRH.shape[1] * 4 <= 2 * ROWS[0] + 2 * 4
    assert unequal


def test_pyramid_layers_shrink_and_memory_with_them():
    """Lower layers hold more rows than upper ones, their stores are as large as that, and the sum is the budget's."""
    policy = kv.pyramidkv(0.4, 6)
    packed = pack(policy, read(policy.needs()).layers, Room(0), tiny.CFG)
    counts = [[len(heads[0]) for heads in tiny.kept(policy, layer)] for layer in packed]
    for b, length in enumerate(tiny.LENGTHS):
        rows = [count[b] for count in counts]
        assert rows == sorted(rows, reverse=True) and rows[0] > 2 * rows[-1]
        assert 3 * ceil(0.4 * length) - 3 < sum(rows) <= 3 * ceil(0.4 * length)
    for layer, count in zip(packed, counts, strict=True):
        assert layer.k_BKCH.shape[2] <= count[0] + 1 + 7


def test_pyramid_bound_holds_for_shorter_prompts():
    """The static number of rows is enough for every prompt up to that length."""
    for budget in (0.1, 0.33, 0.5, 0.7, 0.95, 1.0, 20):
        policy = kv.pyramidkv(budget, 6, beta=7)
        for layer in range(tiny.CFG.L):
            here = Here(layer, tiny.CFG)
            lengths = np.arange(max(6, ceil(6 / budget)) if budget < 1 else 21, 300)
            rows = np.asarray(policy.rows(jnp.asarray(lengths), here))
            bound = np.array([policy.rows(int(n), here) for n in lengths])
            assert (np.maximum.accumulate(rows) <= bound).all() and (rows >= 6).all()


def test_two_classes_of_heads_free_memory():
    """Each class has a store of its own, as large as its own rows and, where it evicts, no larger."""
    policy = kv.duo_attention(HEADS, 0.25)
    for i, layer in enumerate(pack(policy, read(policy.needs()).layers, Room(8), tiny.CFG)):
        full, streaming = len(HEADS[i]), tiny.CFG.K - len(HEADS[i])
        rows = [part.k_BKCH.shape[1:3] for part in (layer.some, layer.rest) if part is not None]
        assert rows == [*([(full, 72)] if full else []), *([(streaming, 16)] if streaming else [])]


@pytest.mark.parametrize(
    ("heads", "word"), [(((0,), (1,)), "layers"), (((2,),), "kv heads"), (((1, 0),), "ascending"), (((0, 0),), "ascending")], ids=str
)
def test_heads_that_do_not_exist_are_refused(heads, word):
    with pytest.raises(UserError, match=word):
        kv.duo_attention(heads, 0.5).check(tiny.CFG, 64)


def test_one_budget_for_the_model_frees_memory():
    """Layers hold unequal numbers of rows, each in as many pages as it needs; together they hold the budget."""
    policy = kv.kvzip(0.3, 4, 20, (3, 5), 4)
    layers = read(policy.needs()).layers
    packed, planned = pack(policy, layers, Room(0), tiny.CFG), policy.plan(layers, tiny.CFG)
    counts = np.array([[[len(head) for head in row] for row in tiny.kept(policy, layer)] for layer in packed])
    assert counts.sum(axis=(0, 2)).tolist() == [6 * ceil(0.3 * n) for n in tiny.LENGTHS]
    assert len(set(counts[:, 0].sum(axis=1))) > 1 and [layer.pool.owner_BP.shape[1] for layer in packed] == list(planned.pages)
    assert sum(planned.pages) * 4 <= counts.sum(axis=2).max(axis=1).sum() + 6 * (3 + 4)
    assert planned.plan(layers, tiny.CFG) is planned


def test_heads_share_the_budget_that_the_rule_gives_their_layer():
    """AdaKV's division of PyramidKV's budgets: each layer holds its own."""
    rule = kv.pyramidkv(0.5, window=6)
    layers = read(rule.needs(), None).layers
    held = [[sum(map(len, tiny.kept(policy, layer)[0])) for layer in pack(policy, layers, Room(0), tiny.CFG)]
            for policy in (rule, KeepByHead(rule, page=4))]  # fmt: skip
    assert held[0] == held[1] and len(set(held[0])) == tiny.CFG.L
