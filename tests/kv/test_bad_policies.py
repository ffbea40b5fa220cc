"""Settings that cannot work are refused before anything is computed, in one line that names the fix."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tokeff.decode.methods import prompt_lookup, token_recycling
from tokeff.errors import UserError
from tokeff.generation import Setup
from tokeff.kv import methods as kv
from tokeff.kv.keep import Keep
from tokeff.kv.policy import Prefilled
from tokeff.kv.score import Mass, Recency, WindowMass
from tokeff.kv.score_keys import KeyNorm
from tokeff.kv.shadow import ShadowKV
from tokeff.models.config import Precision
from tokeff.models.flow import Here
from tokeff.models.load import Model
from tokeff.reduce.methods import gemfilter, promptdistill
from tokeff.sparse.methods import tidaldecode

pytestmark = pytest.mark.core
LENGTH = 64
BUDGETS = [0, 0.0, -3, -0.5, 1.5, LENGTH + 1, float("nan")]


def refused(check, *args) -> str:
    """The one line of the refusal."""
    with pytest.raises(UserError) as error:
        check(*args)
    message = str(error.value)
    assert message and "\n" not in message and len(message) < 250
    return message


def checked(decode=None, lengths=(LENGTH,), new=8, **parts):
    """Check a combination on the tiny model."""
    m = Model(tiny.CFG, tiny.params(), None, Precision(), "tiny")
    Setup(**parts, **({"decode": decode} if decode else {})).check(m, lengths, new)


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("make", [kv.recent_rows, kv.streaming_llm, kv.h2o, kv.snapkv, kv.adakv, kv.shadowkv, tidaldecode])
def test_budgets_of_policies(make, budget):
    assert "budget" in refused(make(budget).check, tiny.CFG, LENGTH)


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("make", [gemfilter, promptdistill])
def test_budgets_of_passes(make, budget):
    assert "budget" in refused(make(budget, layer=1).check, tiny.CFG, LENGTH)


@pytest.mark.parametrize("budget", [1, 0.01, LENGTH, 1.0], ids=str)
def test_the_smallest_and_largest_budgets_work(budget):
    kv.recent_rows(budget).check(tiny.CFG, LENGTH)


@pytest.mark.parametrize(
    ("policy", "word"),
    [
        (Keep(0.5, WindowMass(6), recent=6, evict=1), "evict"),
        (Keep(0.5, Recency(), evict=-1), "evict"),
        (Keep(0.5, Recency(), sinks=-1), "sinks"),
        (Keep(0.5, Recency(), recent=-1), "recent"),
        (Keep(0.5, Recency(), recent=1.5), "recent"),
        (Keep(8, Recency(), sinks=4, recent=6), "budget"),
        (Keep(8, Mass(), recent=4, evict=5), "evict"),
        (kv.snapkv(0.5, 6, pool="median"), "pool"),
        (kv.snapkv(0.5, 6, kernel=0), "kernel"),
        (kv.snapkv(0.5, window=0), "window"),
        (kv.adakv(0.5, 6, floor=-0.1), "floor"),
        (kv.adakv(0.5, 6, floor=1.5), "floor"),
        (kv.adakv(0.5, 6, page=0), "page"),
        (kv.a2sf(0.5, 1.5), "factor"),
        (kv.tova(4, evict=5), "evict"),
        (kv.lm_infinite(0.5, 4, cap=10), "cap"),
        (kv.lm_infinite(4, sinks=10), "budget"),
        (Keep(0.5, KeyNorm(), evict=1), "evict"),
        (kv.lagkv(0.5, lag=0), "lag"),
        (kv.chunkkv(0.5, 6, chunk=0), "chunk"),
        (kv.rkv(0.5, window=0), "window"),
        (kv.rkv(0.5, 6, weight=1.5), "weight"),
        (kv.rkv(0.25, 8, evict=16), "evict"),
        (kv.expected_attention(0.5, future=0), "future"),
        (kv.expected_attention(0.5, floor=-1.0), "floor"),
        (kv.pyramidkv(0.5, 6, beta=0), "beta"),
        (kv.pyramidkv(0.25, window=32), "budget"),
        (kv.compresskv(0.5, 6, judges=((0,), (1,))), "layers"),
        (kv.compresskv(0.5, 6, judges=((9,),)), "query head"),
        (kv.compresskv(0.5, 6, judges=((),)), "query head"),
        (kv.compresskv(0.5, 6, importance=(0.5, 0.5)), "importance"),
        (kv.compresskv(0.5, 6, importance=(0.5, 0.3, 0.2), floor=33), "floor"),
        (kv.compresskv(0.5, 6, floor=-1), "floor"),
        (kv.compresskv(0.5, 6, importance=(0.5, 0.5, 0.5, 0.5)), "importance"),
        (kv.kvzip(0.5, piece=0), "piece"),
        (kv.kvzip(0.5, ask=(tiny.CFG.V,)), "vocabulary"),
        (kv.kvzip(0.5, ask=(1,) * 200), "piece"),
        (kv.razor_attention(((5,),)), "heads"),
        (kv.duo_attention(((0,),), budget=0.01), "budget"),
        (ShadowKV(0.25, rank=0.0), "rank"),
        (ShadowKV(0.25, rank=2.0), "rank"),
        (ShadowKV(0.25, chunk_rows=0), "chunk"),
        (ShadowKV(0.25, chunk_rows=16), "prompt"),
        (tidaldecode(0.5, dense=(0,), select=()), "select"),
        (tidaldecode(0.5, dense=(0,), select=(2,)), "select"),
        (tidaldecode(0.25, (0,), (1,), recent=16), "budget"),
        (gemfilter(0.5, layer=4), "layer"),
        (gemfilter(0.5, layer=-1), "layer"),
    ],
    ids=str,
)
def test_settings(policy, word):
    assert word in refused(policy.check, tiny.CFG, LENGTH)


@pytest.mark.parametrize(
    ("parts", "word"),
    [
        ({"kv": kv.h2o(0.5), "decode": token_recycling()}, "evict"),
        ({"kv": kv.streaming_llm(0.5, evict=2), "decode": prompt_lookup(3)}, "evict"),
        ({"kv": tidaldecode(0.5, (0,), (1,), recent=4), "decode": prompt_lookup(4)}, "recent"),
        ({"kv": kv.snapkv(0.25, window=12), "cut": gemfilter(0.5, 1)}, "budget"),
        ({"kv": kv.recent_rows(40), "cut": promptdistill(0.5, 1)}, "budget"),
        ({"lengths": (0,)}, "empty"),
        ({"lengths": (5, tiny.CFG.max_len)}, "prompt 1"),
        ({"new": 0}, "max_new"),
    ],
    ids=str,
)
def test_combinations(parts, word):
    assert word in refused(lambda: checked(**parts))


@pytest.mark.parametrize(
    "make",
    [
        lambda: token_recycling(tree=((0, 0), (0,))),  # a child before its parent
        lambda: token_recycling(tree=((0,), (1, 0, 0))),  # no parent at all
        lambda: token_recycling(tree=((0,), (0,))),  # twice
        lambda: token_recycling(tree=()),
        lambda: token_recycling(tree=((0,), ())),  # the root below itself
        lambda: token_recycling(tree=((8,),)),  # no such rank
        lambda: token_recycling(tree=((-1,),)),
        lambda: token_recycling(rank=0),
        lambda: prompt_lookup(length=0),
        lambda: prompt_lookup(ngram=0),
    ],
)
def test_drafters(make):
    refused(make)


def test_more_successors_than_tokens():
    assert "rank" in refused(lambda: checked(decode=token_recycling(rank=tiny.CFG.V + 1)))


def test_alisa_without_a_step():
    assert "steps" in refused(kv.alisa, 0.5, 0)


def test_a_score_that_is_no_number_is_the_lowest():
    """A row with NaN is dropped before any other, and kept where there is room for all."""
    k = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 8, 8)), jnp.float32).at[0, 0, 3, 0].set(jnp.nan)
    rows = Prefilled(k, k, jnp.arange(8)[None, None], jnp.array([8]), jnp.int32(0), {})
    for budget, missing in ((7, {3}), (8, set())):
        index = kv.knorm(budget).choose(rows, Here(0, tiny.CFG))[0, 0]
        assert set(range(8)) - set(index.tolist()) == missing
