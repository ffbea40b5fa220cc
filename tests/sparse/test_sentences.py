"""SentenceKV: where sentences end, however the text arrives; what is read, against its oracle; tokens that travel with their rows."""

import itertools
from math import ceil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tokenizers
from oracles import sentences as oracle
from oracles.against import GIVEN, agree, dense
from oracles.model import decode

from tokeff.errors import UserError
from tokeff.kv import methods as kv
from tokeff.kv.cache import Room
from tokeff.kv.classes import ByClass
from tokeff.kv.extend import extend, pack
from tokeff.kv.prefill import prefill
from tokeff.models.config import Precision
from tokeff.models.flow import EMPTY, Here
from tokeff.models.load import Model
from tokeff.models.tokenizer import Tokenizer
from tokeff.reduce import methods as reduce
from tokeff.sparse import methods as sparse
from tokeff.sparse.sentences import Breaks, New, Sentences, Tokens, causal, sentence_ends

pytestmark = pytest.mark.core
ENDS = (3, 8, 21, 34, 40, 55)
SIZES = dict(sinks=4, recent=8, window=6, kernel=3, ends=ENDS, cell=4, longest=8)


def policy(budget=0.4, factor=1.5, **sizes):
    return sparse.sentencekv(budget, factor, **{**SIZES, **sizes})


def caches(budget=0.4, factor=1.5, **sizes):
    """One oracle cache per prompt."""
    given, found = {**SIZES, **sizes}, []
    for b, n in enumerate(tiny.LENGTHS):
        far = ceil(budget * n) - given["sinks"] - given["recent"]
        found.append(oracle.SentenceKV(*dense(b)[:2], [*tiny.prompts()[b], *GIVEN[b]], ceil(budget * factor * n), far, **given))
    return found


@pytest.mark.parametrize(
    "sizes",
    [{}, {"budget": 0.3, "factor": 2.0, "recent": 3, "sinks": 0}, {"cell": 1, "longest": 5}, {"cell": 8, "longest": 64, "ends": (3,)}],
    ids=str,
)
def test_sentencekv_equals_its_oracle(sizes):
    agree(policy(**sizes), caches(**sizes))


def state(B: int) -> Sentences:
    """Before any text."""
    zero = jnp.zeros(B, jnp.int32)
    return Sentences(*(None,) * 5, zero, zero, zero, zero, zero - 1, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("cell", "longest"), [(1, 1), (1, 6), (4, 8), (5, 64)])
def test_sentences_are_the_same_however_a_text_arrives(cell, longest):
    """At once, in ragged pieces, or one by one; and never more than the bound."""
    rng, breaks = np.random.default_rng(0), Breaks(ENDS, cell, longest)
    ids = np.where(rng.random((3, 90)) < 0.3, rng.choice(ENDS, (3, 90)), 1)
    wanted = np.array([oracle.split(row, ENDS, cell, longest) for row in ids])
    whole, _ = jax.jit(breaks.prompt)(jnp.asarray(ids), jnp.ones(ids.shape, bool))
    follow = jax.jit(lambda s, tokens, order: breaks.follow(s, New(tokens, order, causal(order), None))[1:])  # type: ignore[arg-type]
    np.testing.assert_array_equal(whole, wanted)
    assert wanted.max() < breaks.most(90)
    for size in (1, 7):
        s, at, found = state(3), np.zeros(3, int), [[], [], []]
        while (at < 90).any():
            n = np.minimum(rng.integers(0, size + 1, 3), 90 - at)
            order = np.where(np.arange(size) < n[:, None], at[:, None] + np.arange(size), EMPTY).astype(np.int32)
            tokens = np.take_along_axis(ids, np.clip(order, 0, 89), axis=1)
            number, s = follow(s, jnp.asarray(tokens), jnp.asarray(order))
            for b in range(3):
                found[b] += np.asarray(number)[b, : n[b]].tolist()
            at += n
        np.testing.assert_array_equal(found, wanted)


def test_tokens_at_once_are_tokens_one_by_one():
    """A question of unequal lengths behind the prompt, then one more token."""
    p, n = tiny.read(policy()), jnp.asarray([6, 3], jnp.int32)
    tokens = jnp.asarray(GIVEN[:, :7], jnp.int32)

    def packed():
        return pack(policy(), p.layers, Room(10), tiny.CFG)

    together, layers = extend(tiny.params(), tiny.CFG, packed(), tokens[:, :6], p.next_B, n, policy())
    after, _ = extend(tiny.params(), tiny.CFG, layers, tokens[:, 6:], p.next_B + n, jnp.ones(2, jnp.int32), policy())
    for b in range(2):
        alone, row = jax.tree.map(lambda x, b=b: x[b : b + 1], packed()), [*range(int(n[b])), 6]
        for t, at in enumerate(row):
            token = tokens[b : b + 1, at : at + 1]
            logits, alone = extend(tiny.params(), tiny.CFG, alone, token, p.next_B[b : b + 1] + t, jnp.ones(1, jnp.int32), policy())
            wanted = together[b, t] if t < int(n[b]) else after[b, 0]
            np.testing.assert_allclose(logits[0, 0], wanted, atol=5e-4)


def summary(prompt):
    return [layer.summary for layer in pack(policy(), prompt.layers, Room(4), tiny.CFG)]


def test_a_prompt_in_two_turns_has_the_sentences_of_one():
    """Padding between the turns leaves no trace."""
    first, second = (20, 13), (16, 16)
    tokens = [row[: a + b] for row, a, b in zip(tiny.prompts(), first, second, strict=True)]
    whole = tiny.read(policy(), tokens)
    begun = tiny.read(policy(), [row[:a] for row, a in zip(tokens, first, strict=True)])
    more, length = tiny.padded([row[a:] for row, a in zip(tokens, first, strict=True)])
    joined = prefill(tiny.params(), tiny.CFG, more, length, evidence=policy().needs(), after=begun)
    for a, b in zip(summary(whole), summary(joined), strict=True):
        for name in ("count_BKP", "last_BKP", "number_B", "begin_B", "end_B", "next_B"):
            P = min(getattr(x, name).shape[-1] for x in (a, b)) if name.endswith("P") else None
            np.testing.assert_array_equal(getattr(a, name)[..., :P], getattr(b, name)[..., :P], err_msg=name)
        P = min(a.sum_BKPH.shape[2], b.sum_BKPH.shape[2])
        np.testing.assert_allclose(a.sum_BKPH[:, :, :P], b.sum_BKPH[:, :, :P], atol=1e-4)


@pytest.mark.parametrize("chunk", [None, 24])
def test_tokens_travel_with_their_rows(chunk):
    """Through chunks, and through a pass: above it the rows that are left know their tokens."""
    cut = reduce.promptdistill(0.5, layer=1) if chunk is None else None
    prompt = tiny.read(tiny.FULL, cut=cut, chunk=chunk, evidence=(Tokens(),))
    for layer in prompt.layers:
        ids, order = np.asarray(layer.evidence_BKS[Tokens()]), np.asarray(layer.order_BKS)[:, 0]
        for b, row in enumerate(tiny.prompts()):
            for k, i in itertools.product(range(tiny.CFG.K), range(order.shape[1])):
                token = EMPTY if order[b, i] == EMPTY else row[order[b, i]]
                assert ids[b, k, i] == token


def test_bytes_read_by_hand():
    """26 rows of keys and values, the sentences whole, and the small arrays."""
    p = policy()
    layer = pack(p, tiny.read(p).layers, Room(4), tiny.CFG)[0]
    (B, K, C, H), P = layer.rows.k_BKCH.shape, layer.summary.count_BKP.shape[2]
    assert layer.rows.live_B.tolist() == [39, 31]
    assert Breaks(ENDS, 4, 8).most(64 + 4) == P
    sentences = B * K * (P * H + 2 * P + C + H) + 5 * B
    assert p.bytes_read(layer, Here(0, tiny.CFG)) == 4 * (2 * B * K * H * 26 + B * K * C + B + B + sentences)


def test_rows_that_are_not_chosen_are_not_read():
    """The first given token, with the values of every row that the oracle does not read replaced."""
    p, prompt = policy(), tiny.read(policy())
    layers = pack(p, prompt.layers, Room(4), tiny.CFG)
    spoiled = list(layers)
    for b, cache in enumerate(caches()):
        read, choose = {}, cache.chosen
        cache.chosen = lambda i, k, q, order, choose=choose, read=read: read.setdefault((i, k), choose(i, k, q, order))
        next(decode(cache.m, cache, GIVEN[b], int(prompt.next_B[b])))
        for i, k in itertools.product(range(tiny.CFG.L), range(tiny.CFG.K)):
            rows = spoiled[i].rows
            slots = [c for c, o in enumerate(np.asarray(rows.order_BKC)[b, k]) if o != EMPTY and int(o) not in read[i, k]]
            assert len(slots) > 5
            spoiled[i] = spoiled[i].replace(rows=rows.replace(v_BKCH=rows.v_BKCH.at[b, k, jnp.asarray(slots)].add(1e3)))
    clean, poisoned = (next(tiny.forced(p, x, prompt, GIVEN))[0] for x in (layers, tuple(spoiled)))
    np.testing.assert_array_equal(clean, poisoned)


def test_ends_of_a_vocabulary():
    vocabulary = {"a": 0, "b.": 1, "?": 2, "c;": 3, ".d": 4, "\n": 5, "é!": 6, "，": 7, "x.": 8, "<s>.": 9}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "a"))
    raw.add_special_tokens(["<s>."])
    assert sentence_ends(Tokenizer(raw, 8)) == (1, 2, 3, 5, 6)
    assert sentence_ends(Tokenizer(raw, 10), "，") == (7,)


def test_what_is_left_open_comes_from_the_model():
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b.": 1, "c;": 2}, "a"))
    m = Model(tiny.CFG, tiny.params(), Tokenizer(raw, tiny.CFG.V), Precision(), "tiny")
    policy(ends=None).check(tiny.CFG, 64)
    assert policy(ends=None).fit(m) == policy(ends=(1, 2)) and policy().fit(m) == policy()
    assert ByClass(policy(ends=None), kv.full(), ((0,),)).fit(m) == ByClass(policy(ends=(1, 2)), kv.full(), ((0,),))
    with pytest.raises(UserError, match="sentence_ends"):
        pack(policy(ends=None), tiny.read(policy()).layers, Room(4), tiny.CFG)
    silent = Model(tiny.CFG, tiny.params(), Tokenizer(raw, 1), Precision(), "tiny")
    with pytest.raises(UserError, match="vocabulary"):
        policy(ends=None).fit(silent)


@pytest.mark.parametrize(
    ("made", "word"),
    [
        (policy(ends=()), "sentence_ends"), (policy(ends=(3, 61)), "vocabulary"), (policy(ends=(-1,)), "vocabulary"),
        (policy(cell=0), "cell"), (policy(cell=9, longest=8), "longest"), (policy(factor=0.5), "factor"),
        (policy(window=60), "window"), (policy(window=0), "window"), (policy(budget=12), "budget"), (policy(budget=0.0), "budget"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_bad_settings_are_refused_in_one_line(made, word):
    with pytest.raises(UserError, match=word) as error:
        made.check(tiny.CFG, 64)
    assert "\n" not in str(error.value) and len(str(error.value)) < 250


def test_drafts_that_reach_a_closing_row_are_refused():
    assert policy(recent=8).drafts(6) is None
    assert "recent" in str(policy(recent=8).drafts(7))
