"""Methods that choose pages or rows for every query, against their oracles: logits after every token, two unequal prompts."""

import dataclasses
from math import ceil

import pytest
import tiny
from oracles import reading as oracle
from oracles.against import agree, dense

from tokeff.errors import UserError
from tokeff.models.config import Precision
from tokeff.models.load import Model
from tokeff.sparse import methods as sparse
from tokeff.sparse.calibrate import calibrate

pytestmark = pytest.mark.core
ROWS = [ceil(0.5 * n) for n in tiny.LENGTHS]  # 32 and 26


def caches(make, far, **options):
    """One oracle cache per prompt; far: {rows of the budget: pages chosen}."""
    return [make(*dense(b)[:2], far(rows), **options) for b, rows in enumerate(ROWS)]


QUEST = {
    "the last page": (sparse.quest(0.5, 4, (0,), 1), lambda n: (n - 4) // 4, dict(size=4, recent=1, dense=(0,))),
    "recent rows for drafts": (sparse.quest(0.5, 4, (0,), 8), lambda n: (n - 12) // 4, dict(size=4, recent=8, dense=(0,))),
    "pages that do not divide the cache": (sparse.quest(0.5, 6, (), 3), lambda n: (n - 12) // 6, dict(size=6, recent=3)),
}


@pytest.mark.parametrize("name", QUEST)
def test_quest_equals_its_oracle(name):
    policy, far, options = QUEST[name]
    agree(policy, caches(oracle.Quest, far, **options))


@pytest.mark.parametrize("recent", [0, 1, 8])
def test_top_k_equals_its_oracle(recent):
    policy = sparse.top_k_oracle(0.5, recent=recent)
    agree(policy, caches(oracle.TopMass, lambda n: n - recent, recent=recent))


@pytest.mark.parametrize("p", [0.6, 0.95])
def test_top_p_equals_its_oracle(p):
    policy = sparse.top_p_oracle(0.5, p, recent=1)
    agree(policy, caches(oracle.TopMass, lambda n: n - 1, p=p))


def channels_of(b: int):
    """The loudest channels of each layer and head of prompt b."""
    return [[oracle.loudest_keys(s, h, 2) for h in range(tiny.CFG.K)] for s in dense(b)[1]]


def test_double_sparsity_equals_its_oracle():
    """Channels of each prompt of a batch are its own."""
    policy = sparse.double_sparsity(0.5, dense=(0,), recent=8)
    found = [oracle.DoubleSparsity(*dense(b)[:2], ROWS[b] - 8, recent=8, dense=(0,), channels=channels_of(b)) for b in range(2)]
    agree(policy, found)


def test_double_sparsity_with_calibrated_channels():
    """Calibration takes the channels of the formula, they differ from the prompt's own, and the policy uses them."""
    model, seen, _ = dense(0)
    m = Model(tiny.CFG, tiny.params(), None, Precision(), "tiny")
    found = calibrate(m, [tiny.prompts()[0]], 0.25)
    wanted = [[oracle.loudest_pairs(model, i, s, h, 2) for h in range(tiny.CFG.K)] for i, s in enumerate(seen)]
    assert [[list(head) for head in layer] for layer in found] == wanted != channels_of(0)
    policy = sparse.double_sparsity(0.5, channels=found, dense=(0,), recent=8)
    agree(policy, caches(oracle.DoubleSparsity, lambda n: n - 8, recent=8, dense=(0,), channels=wanted))
    with pytest.raises(UserError, match="calibrate"):
        policy.check(dataclasses.replace(tiny.CFG, L=2, windows=(None,) * 2), 64)


def test_every_calibration_text_counts_the_same():
    """The longer of two does not count for more, and each alone would give other channels."""
    m = Model(tiny.CFG, tiny.params(), None, Precision(), "tiny")
    each = [calibrate(m, [text], 0.25) for text in tiny.prompts()]
    found = calibrate(m, tiny.prompts(), 0.25)
    for i in range(tiny.CFG.L):
        for head in range(tiny.CFG.K):
            size = sum(oracle.pairs(dense(b)[0], i, dense(b)[1][i], head) for b in range(2))
            assert list(found[i][head]) == sorted(range(tiny.CFG.H), key=lambda c, size=size: -size[c])[:2]
    assert found not in each


@pytest.mark.parametrize("cosine", [None, 0.9, 0.0])
def test_tokenselect_equals_its_oracle(cosine):
    policy = sparse.tokenselect(0.5, sinks=4, recent=8, cosine=cosine)
    found = caches(oracle.TokenSelect, lambda n: n - 12, sinks=4, recent=8, cosine=cosine)
    agree(policy, found)


@pytest.mark.parametrize("heads", [None, ((0, 1), (0, 1), (1, 0), (1, 1))])
def test_kascade_equals_its_oracle(heads):
    policy = sparse.kascade(0.5, (0,), (1, 3), heads, recent=8)
    options = dict(recent=8, dense=(0,), select=(1, 3), heads=heads or [(0, 1)] * 4)
    agree(policy, caches(oracle.Kascade, lambda n: n - 8, **options))


@pytest.mark.parametrize("every", [1, 3])
def test_lserve_equals_its_oracle(every):
    streaming = ((), (0,), (0, 1), (1,))
    policy = sparse.lserve(0.5, 4, 2, every, streaming, sinks=3, recent=3)
    options = dict(size=4, recent=3, sinks=3, logical=2, every=every, streaming=streaming)
    agree(policy, caches(oracle.LServe, lambda n: (n - 4 - 8) // 4, **options))


def test_recycled_attention_equals_its_oracle():
    policy = sparse.recycled_attention(0.25, every=4, recent=5)
    found = [oracle.Recycled(*dense(b)[:2], ceil(0.25 * n) - 5, recent=5, every=4) for b, n in enumerate(tiny.LENGTHS)]
    agree(policy, found)


@pytest.mark.parametrize("count", [1, 3])
def test_infllm_equals_its_oracle(count):
    policy = sparse.infllm(0.5, 4, count, sinks=3, recent=6)
    agree(policy, caches(oracle.InfLLM, lambda n: (n - 4 - 12) // 4, size=4, count=count, sinks=3, recent=6))


@pytest.mark.parametrize(("page", "start", "every", "sinks"), [(2, 16, 1, 4), (4, 8, 3, 0), (2, 2, 4, 2)])
def test_hip_equals_its_oracle(page, start, every, sinks):
    policy = sparse.hip(0.5, page, start, every, sinks, recent=5, dense=(0,))
    near = (-(-4 // page) + 1) * page
    options = dict(size=page, recent=5, sinks=sinks, start=start, every=every, dense=(0,))
    agree(policy, caches(oracle.HiP, lambda n: (n - sinks - near) // page, **options))
