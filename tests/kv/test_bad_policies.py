"""Settings that cannot work are refused before anything is computed, in one line that names the fix."""

import pytest
import tiny

from tokeff.decode.methods import prompt_lookup, token_recycling
from tokeff.errors import UserError
from tokeff.generation import Setup
from tokeff.kv import methods as kv
from tokeff.kv.keep import Keep
from tokeff.kv.score import Mass, Recency, WindowMass
from tokeff.kv.shadow import ShadowKV
from tokeff.models.config import Precision
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
