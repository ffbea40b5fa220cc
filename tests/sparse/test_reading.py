"""What `Read` promises whatever selects: it reads the chosen rows and no others, keeps a selection as long as it says, and counts bytes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from oracles.against import GIVEN

from tokeff.errors import UserError
from tokeff.kv.cache import Room
from tokeff.kv.extend import extend, pack
from tokeff.models.flow import Here
from tokeff.sparse import methods as sparse
from tokeff.sparse.read import Read
from tokeff.sparse.reuse import Every, WhileSimilar
from tokeff.sparse.select import slots_in

pytestmark = pytest.mark.core
LENGTH = 64
STEPS = 4


@pytest.fixture(scope="module")
def prompt():
    return tiny.read(sparse.infllm())


def packed(policy, prompt, room=STEPS):
    return pack(policy, prompt.layers, Room(room), tiny.CFG)


def first_logits(policy, layers, prompt):
    return next(tiny.forced(policy, layers, prompt, GIVEN))[0]


READERS = {
    "quest": sparse.quest(0.3, 4, (), 1),
    "labels": sparse.double_sparsity(0.3, dense=(), recent=4),
    "hip": sparse.hip(0.3, 2, 8, 1, 2, 4, ()),
}


@pytest.mark.parametrize("name", READERS)
def test_rows_that_are_not_chosen_are_not_read(name, prompt):
    """Layer 0 with the values of every row it did not choose replaced gives the same output; replacing one that it chose does not."""
    policy, here = READERS[name], Here(0, tiny.CFG)
    layer = packed(policy, prompt)[0]
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2, 1, 4, 8)), jnp.float32)
    flow, _ = _flow(prompt)
    page, _, _ = jax.jit(lambda layer: policy.selected(q, q, layer, flow, here))(layer)
    pages = jax.jit(lambda rows: policy.pages(rows, page, policy.selector.size, flow, here))(layer.rows)
    read = np.concatenate([np.asarray(x) for x in pages], axis=-1)
    slots = np.asarray(slots_in(jnp.asarray(read), policy.selector.size, layer.rows.capacity))[:, :, 0]
    outputs = jax.jit(lambda rows: policy.read(q, q, rows, page, policy.selector.size, flow, here))
    out = np.asarray(outputs(layer.rows))
    for b, k in ((0, 0), (1, 1)):
        chosen = sorted({int(s) for s in slots[b, k] if s >= 0})
        others = np.setdiff1d(np.arange(layer.rows.capacity), chosen)
        assert 0 < len(chosen) < 0.5 * LENGTH
        for rows, same in ((others, True), (chosen[:1], False)):
            rows_bk = layer.rows.replace(v_BKCH=layer.rows.v_BKCH.at[b, k, jnp.asarray(rows)].add(1e3))
            again = np.asarray(outputs(rows_bk))
            assert np.allclose(out, again) == same


def _flow(prompt):
    from tokeff.models.transformer import embed

    order = prompt.next_B[:, None] - 1  # the prompt's last row asks
    return embed(tiny.params(), tiny.CFG, jnp.zeros((2, 1), jnp.int32), order), order


def test_bytes_read_by_hand(prompt):
    """Quest reads 7 pages of 4 rows of K and V, the bounds of all pages, and the small arrays whole."""
    policy = sparse.quest(0.5, 4, (), 1)
    layer = packed(policy, prompt)[0]
    B, K, C, H = layer.rows.k_BKCH.shape
    P = layer.summary.low_BKPH.shape[2]
    small = 4 * (B * K * C + B + B)  # orders, numbers of rows, numbers of pages
    assert policy.bytes_read(layer, Here(0, tiny.CFG)) == small + 4 * B * K * 2 * H * (8 * 4 + P)
    oracle = packed(sparse.top_k_oracle(0.25, (), 8), prompt)[0]
    assert sparse.top_k_oracle(0.25, (), 8).bytes_read(oracle, Here(0, tiny.CFG)) == small + 4 * B * K * H * (C + 16)
    recycled = sparse.recycled_attention(0.25, every=4, recent=8)
    layer = packed(recycled, prompt)[0]
    last = layer.last.page_BKM.size + layer.last.q_BNH.size + layer.last.age_B.size
    few = small + 4 * (last + B * K * 2 * H * 16)
    assert recycled.bytes_read(layer, Here(0, tiny.CFG)) == few + 4 * B * K * 2 * H * (C - 16) / 4


REUSING = {
    "every 3": dataclasses.replace(sparse.lserve(0.5, 4, 2, 3, recent=4), reuse=Every(3)),
    "while similar": sparse.tokenselect(0.5, 4, 8, cosine=0.0),
}


@pytest.mark.parametrize("name", REUSING)
def test_a_selection_is_kept_and_then_made_anew(name, prompt):
    policy = REUSING[name]
    pages = []
    for _, layers in tiny.forced(policy, packed(policy, prompt, 10), prompt, GIVEN):
        pages.append([np.asarray(layer.last.page_BKM)[b] for layer in layers for b in range(2)])
    kept = [np.array_equal(a, b) for x, y in zip(pages, pages[1:], strict=False) for a, b in zip(x, y, strict=True)]
    assert 0.2 < np.mean(kept) < 0.95


@pytest.mark.parametrize("name", REUSING)
def test_tokens_at_once_are_tokens_one_by_one(name, prompt):
    """A question of unequal lengths: padding of the shorter one leaves no trace in its selection."""
    policy, n = REUSING[name], jnp.asarray([4, 2], jnp.int32)
    tokens = jnp.asarray(GIVEN[:, :5], jnp.int32)
    together, layers = extend(tiny.params(), tiny.CFG, packed(policy, prompt, 8), tokens[:, :4], prompt.next_B, n, policy)
    after, _ = extend(tiny.params(), tiny.CFG, layers, tokens[:, 4:], prompt.next_B + n, jnp.ones(2, jnp.int32), policy)
    for b in range(2):
        alone = jax.tree.map(lambda x, b=b: x[b : b + 1], packed(policy, prompt, 8))
        row = jnp.concatenate([tokens[b : b + 1, : int(n[b])], tokens[b : b + 1, 4:]], axis=1)
        for t in range(row.shape[1]):
            logits, alone = extend(
                tiny.params(), tiny.CFG, alone, row[:, t : t + 1], prompt.next_B[b : b + 1] + t, jnp.ones(1, jnp.int32), policy
            )
            wanted = together[b, t] if t < int(n[b]) else after[b, 0]
            np.testing.assert_allclose(logits[0, 0], wanted, atol=5e-4)


def test_nan_is_never_chosen(prompt):
    """A row whose key is not a number is not chosen, and the others are chosen as if it were not there."""
    policy, here = sparse.top_k_oracle(0.3, (), 4), Here(0, tiny.CFG)
    layer = packed(policy, prompt)[0]
    flow, _ = _flow(prompt)
    q = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 4, 8)), jnp.float32)
    page = policy.selected(q, q, layer, flow, here)[0]
    best = int(page[0, 0, 0, 0])
    broken = layer.replace(rows=layer.rows.replace(k_BKCH=layer.rows.k_BKCH.at[0, 0, best].set(jnp.nan)))
    broken = policy.selected(q, q, broken, flow, here)[0]
    assert best not in broken[0, 0].tolist()
    assert np.array_equal(page[1], broken[1])


def refused(policy) -> str:
    with pytest.raises(UserError) as error:
        policy.check(tiny.CFG, LENGTH)
    message = str(error.value)
    assert "\n" not in message and len(message) < 250
    return message


@pytest.mark.parametrize("budget", [0, 0.0, -3, 1.5, LENGTH + 1, float("nan")], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        sparse.quest, sparse.top_k_oracle, sparse.top_p_oracle, sparse.double_sparsity, sparse.tokenselect, sparse.kascade, sparse.lserve,
        sparse.infllm, sparse.hip, sparse.recycled_attention,
    ],
)  # fmt: skip
def test_budgets(make, budget):
    assert "budget" in refused(make(budget))


@pytest.mark.parametrize(
    ("policy", "word"),
    [
        (sparse.quest(0.5, page=0), "page"),
        (sparse.quest(0.5, recent=0), "recent"),
        (sparse.quest(0.5, 4, recent=-1), "negative"),
        (sparse.quest(8, 8), "budget"),  # the last page is all of it
        (sparse.top_p_oracle(0.9, p=0.0), "p="),
        (sparse.top_p_oracle(0.9, p=1.5), "p="),
        (sparse.double_sparsity(0.5, labels=0.0), "labels"),
        (sparse.double_sparsity(0.5, channels=(((0, 1),),)), "calibrate"),
        (sparse.tokenselect(0.5, 4, 8, cosine=2.0), "cosine"),
        (sparse.tokenselect(0.5, sinks=30, recent=30), "budget"),
        (sparse.kascade(0.5, (0,), ()), "select"),
        (sparse.kascade(0.5, (0,), (1,), head_map=((0, 1),) * 2), "heads"),
        (sparse.kascade(0.5, (0,), (1,), head_map=((0, 2),) * 3), "heads"),
        (sparse.lserve(0.5, 4, 3), "divisor"),
        (sparse.lserve(0.5, 4, 2, every=6, recent=4), "recent=6"),
        (sparse.lserve(0.5, 4, 2, every=0), "at least 1"),
        (sparse.lserve(0.5, 4, 2, streaming=((2,),) * 3), "streaming"),
        (sparse.infllm(0.9, 4, count=5, recent=8), "count"),
        (sparse.hip(0.9, 4, 12, recent=8), "start"),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_settings(policy, word):
    assert word in refused(policy)


@pytest.mark.parametrize("reuse", [Every(4), WhileSimilar()])
def test_drafts_under_a_kept_selection_are_refused_with_the_reason(reuse):
    policy = Read(0.5, sparse.quest().selector, recent=16, reuse=reuse)
    assert "every step" in str(policy.drafts(1))
    assert policy.chunk == 1
    assert dataclasses.replace(policy, reuse=None).drafts(15) is None
    assert "recent" in str(dataclasses.replace(policy, reuse=None).drafts(16))


@pytest.mark.parametrize("policy", [sparse.infllm(1.0, 4, 2, sinks=16, recent=12), sparse.lserve(1.0, 8, 2, sinks=40, recent=40)])
def test_prompts_shorter_than_sinks_and_window(policy):
    """Every row is read once, as in a dense layer."""
    rows = ((3, 1, 4, 1, 5), (9, 2))
    short = tiny.read(policy, rows)
    policy.check(tiny.CFG, 5)
    logits = first_logits(policy, packed(policy, short), short)
    np.testing.assert_allclose(logits, first_logits(tiny.FULL, packed(tiny.FULL, short), short), atol=5e-4)
