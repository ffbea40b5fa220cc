"""Drafters that read the text: the same trees as tries, dicts and lists give, and the text of plain decoding."""

from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from oracles import drafts, text_drafts
from oracles.against import dense
from oracles.float64 import float64_model
from oracles.policies import Cache
from oracles.text_drafts import paths_of
from test_drafts import one_row

from tokeff.decode.draft import Result
from tokeff.decode.jacobi import Lookahead
from tokeff.decode.loop import advance, begin
from tokeff.decode.methods import aded, lookahead_decoding, lookahead_trie
from tokeff.decode.sample import GREEDY, row_keys
from tokeff.decode.tree import walk
from tokeff.decode.trie import Trie
from tokeff.decode.trigram import Trigram
from tokeff.errors import UserError
from tokeff.kv import methods as kv
from tokeff.models.load import Model, Precision

pytestmark = [pytest.mark.core, pytest.mark.xdist_group("text drafters")]
S, TEXTS = 40, 100


def texts(V, seed=0):
    """Random texts of few tokens, of any length, and where the prompt ends."""
    rng = np.random.default_rng(seed)
    count = rng.integers(2, S + 1, TEXTS)
    return rng.integers(0, V, (TEXTS, S)).astype(np.int32), count.astype(np.int32), (rng.random(TEXTS) * (count - 1)).astype(np.int32) + 1


@partial(jax.jit, static_argnames="drafter")
def drawn(text, count, prompt, given, drafter):
    s = SimpleNamespace(tokens_BS=text, count_B=count, made_B=count - prompt)
    side = None if given is None else {"trigrams_U": given}
    return drafter.draft(s, SimpleNamespace(params=SimpleNamespace(side=side)))[0]


def trees(drafter, text, count, prompt, given=None):
    """Every tree as the set of its paths; parents stand before their children."""
    draft = jax.tree.map(np.asarray, drawn(text, count, prompt, given, drafter))
    assert (draft.parent_BW <= np.maximum(np.arange(drafter.nodes) - 1, 0)).all()
    assert (draft.tokens_BW[:, 0] == text[np.arange(TEXTS), count - 1]).all() and draft.valid_BW[:, 0].all()
    return [paths_of(*parts) for parts in zip(draft.tokens_BW, draft.parent_BW, draft.valid_BW, strict=True)]


@pytest.mark.parametrize("drafter", [Trie(most=S), Trie(8, 3, 2, 0.1, 0.25, most=S)])
def test_trie_equals_a_real_trie(drafter):
    sizes = set()
    for V in (3, 6):
        text, count, prompt = texts(V)
        for b, paths in enumerate(trees(drafter, text, count, prompt)):
            trie = text_drafts.Trie(text[b, : count[b]].tolist(), prompt[b], drafter.query, drafter.length)
            assert paths == trie.draft(drafter.size, drafter.weight, drafter.own), f"text {text[b, : count[b]]}"
            sizes.add(len(paths))
    assert sizes >= set(range(drafter.size))


def test_trie_of_the_latest_occurrences():
    """Beyond `most` the earliest occurrences of the suffix are dropped."""
    drafter = Trie(query=1, most=3)
    text, count, prompt = texts(2)
    cut = 0
    for b, paths in enumerate(trees(drafter, text, count, prompt)):
        row = text[b, : count[b]].tolist()
        starts = [i for i in range(len(row) - 1) if row[i] == row[-1]]
        cut += len(starts) > 3
        assert paths == text_drafts.Trie(row, prompt[b], 1, drafter.length, starts[-3:]).draft(16, drafter.weight, drafter.own)
    assert cut > TEXTS / 2


GIVEN = np.random.default_rng(5).integers(0, 3, 23).astype(np.int32)


@pytest.mark.parametrize(
    ("drafter", "given"), [(Trigram(), None), (Trigram(24, 14, 5, 40, 3, recent=6, gain=0.3, cap=1.1, c1=2, c2=1), GIVEN)]
)  # fmt: skip
def test_trigram_equals_a_search_over_dicts(drafter, given):
    sizes, numbers = set(), [np.asarray(drafter.chance(count)) for count in range(S + 1)]
    table = dict(recent=drafter.recent, gain=drafter.gain, cap=drafter.cap)
    search = dict(length=drafter.length, successors=drafter.successors, c1=drafter.c1, c2=drafter.c2)
    for V in (3, 5):
        text, count, prompt = texts(V)
        for b, paths in enumerate(trees(drafter, text, count, prompt, given)):
            row = text[b, : count[b]].tolist()
            known = text_drafts.trigrams(row, prompt[b], () if given is None else given.tolist(), **table)
            wanted = text_drafts.Search(known, row, numbers[count[b]], **search)
            assert paths == wanted.draft(drafter.paths, drafter.nodes), f"text {row}, prompt of {prompt[b]}"
            sizes.add(len(paths))
    assert 0 in sizes and max(sizes) > drafter.paths + 3


LADE = Lookahead(3, 3, 2, pool=64, shift=False)


@partial(jax.jit, static_argnames="drafter")
def turn(s, target_BW, drafter):
    """(draft, state behind it): one pass of a model that wants these tokens."""
    draft, s = drafter.draft(s, None)
    path, count = walk(draft, target_BW, drafter.depth)
    emitted = jnp.take_along_axis(target_BW, path, axis=1)
    state = drafter.observe(s.drafter, draft, Result(jax.nn.one_hot(target_BW, 8), path, emitted, count, {}))
    return draft, advance(s, (), path, emitted, count, state, ())


@pytest.mark.parametrize("drafter", [LADE, Lookahead(3, 4, 3, pool=12, shift=True), Lookahead(4, 2, 2, fill=False)])
def test_lookahead_equals_lists_and_dicts(drafter):
    """Window, pool and branches of many texts over several passes: every node's token, and what is accepted of them."""
    B, V, passes, rng = 64, 3, 10, np.random.default_rng(1)
    text, length = rng.integers(0, V, (B, 20)).astype(np.int32), rng.integers(1, 21, B).astype(np.int32)
    table, limit = jnp.pad(text, ((0, 0), (0, 60))), jnp.full(B, 60, jnp.int32)
    state = drafter.prepare(MODEL, jnp.asarray(text), jnp.asarray(length), 60)
    first = jax.nn.one_hot(rng.integers(0, V, B), 8)
    s = begin((), table, jnp.asarray(length), jnp.zeros(B, jnp.int32), first, drafter, row_keys(0, jnp.arange(B)), limit, GREEDY, (), state)
    how = dict(window=drafter.window, ngram=drafter.ngram, guesses=drafter.guesses, bound=drafter.pool, fill=drafter.fill)
    known = [text_drafts.Lookahead(text[b, : length[b]].tolist(), **how, shift=drafter.shift) for b in range(B)]
    new, n, found = [[int(np.argmax(row))] for row in first], drafter.guesses * drafter.depth, set()
    for _ in range(passes):
        target = rng.integers(0, V, (B, drafter.nodes)).astype(np.int32)
        draft, s = turn(s, target, drafter)
        draft = jax.tree.map(np.asarray, draft)
        for b, wanted in enumerate(known):
            wanted.arrive(new[b])
            token, valid = draft.tokens_BW[b], draft.valid_BW[b]
            assert [token[0], *token[1 + n :]] == [t for row in wanted.grid for t in row]
            assert token[1 : 1 + n][valid[1 : 1 + n]].tolist() == [t for branch in wanted.guessed() for t in branch]
            path, new[b] = drafts.accepted(draft.parent_BW[b].tolist(), token, valid & ~draft.scout_BW[b], target[b].tolist())
            assert s.accepted.path_BW[b, : s.accepted.count_B[b]].tolist() == path
            predicted = [target[b, 0], *target[b, 1 + n :]][-drafter.window :]
            wanted.observe([int(t) for t in predicted])
            found.add(len(path))
    assert found == set(range(1, drafter.ngram + 1))


def test_lookahead_on_the_model():
    """Places and sight: what the model predicts at the window's entries and accepts of the branches is what it does on rows read one by
    one, each entry behind exactly those that it reads."""
    prompt = tiny.read(tiny.FULL)
    state = LADE.prepare(MODEL, prompt.tokens_BT, prompt.length_B, tiny.NEW)
    s = tiny.start(prompt, tiny.FULL, LADE).replace(drafter=state)
    known, caches, new = [], [], []
    for b in range(2):
        model, seen, logits = dense(b)
        caches.append(Cache(model, seen))
        known.append(text_drafts.Lookahead(list(tiny.prompts()[b]), window=3, ngram=3, guesses=2, bound=64, fill=True, shift=False))
        new.append([int(np.argmax(logits))])
    for _ in range(7):
        s = tiny.go(s, tiny.FULL, LADE, steps=1)
        for b, wanted in enumerate(known):
            wanted.arrive(new[b])
            parent, token = [0], [wanted.text[-1]]
            for branch in wanted.guessed():
                parent, token = [*parent, 0, *range(len(token), len(token) + 1)], [*token, *branch]
            logits = drafts.tree_logits(one_row, [caches[b]], parent, token)
            path, new[b] = drafts.accepted(parent, token, [True] * len(token), [int(np.argmax(x)) for x in logits])
            wanted.observe([predicted(caches[b], wanted.reads(1, i)) for i in range(3)])
            for node in path:
                caches[b] = one_row(caches[b], token[node])[1]
            assert tiny.text(s)[b] == [*wanted.text[tiny.LENGTHS[b] :], *new[b]]
            assert s.drafter.grid_BW[b].reshape(2, 3).tolist() == wanted.grid
            assert [tuple(g) for g in s.drafter.pool_BMY[b].tolist() if g[0] >= 0] == wanted.order
    assert max(map(len, tiny.text(s))) > 8, "no draft was accepted"


def predicted(cache, tokens) -> int:
    for token in tokens:
        logits, cache = one_row(cache, token)
    return int(np.argmax(logits))


POLICIES = {"full": kv.full(), "tova": kv.tova(0.5, evict=4)}
DRAFTERS = {"trie": lookahead_trie(8, 4, 2), "lookahead": LADE, "aded": aded(10, 6, 4, 12, 4)}
T, PROMPTS = max(tiny.LENGTHS), tiny.prompts()
SHORT = ((5,), tiny.prompts()[1])  # a prompt of one token beside a long one
MODEL = Model(tiny.CFG, tiny.params(), None, Precision(), "tiny")


@pytest.fixture(scope="module")
def double():
    with float64_model():
        yield


@cache
def plain(policy, rows=PROMPTS):
    return tiny.text(tiny.decode(policy, rows=rows, T=T, dtype="float64"))


def started(policy, drafter, rows=PROMPTS, eos=()):
    prompt = tiny.read(policy, rows, dtype="float64", T=T)
    s = tiny.start(prompt, policy, drafter, eos=eos)
    return s.replace(drafter=drafter.prepare(MODEL, prompt.tokens_BT, prompt.length_B, tiny.NEW))


def drafted(policy, drafter, rows=PROMPTS, eos=(), limit=None):
    s = started(policy, drafter, rows, eos)
    s = s if limit is None else s.replace(limit_B=jnp.asarray(limit, jnp.int32))
    return tiny.go(s, policy, drafter, dtype="float64", eos=eos)


@pytest.mark.parametrize("policy", tiny.sampled(POLICIES, ("full",)))
@pytest.mark.parametrize("name", DRAFTERS)
def test_equals_plain(double, name, policy):
    """Strictly, on a ragged batch, under drafts that wait for an eviction boundary too."""
    s = drafted(POLICIES[policy], DRAFTERS[name])
    assert tiny.text(s) == plain(POLICIES[policy])
    assert int(s.passes_B.min()) < tiny.NEW - 1, "no draft was ever accepted, so nothing was tested"


@pytest.mark.parametrize("name", DRAFTERS)
def test_prompt_of_one_token_and_limits(double, name):
    full = POLICIES["full"]
    assert tiny.text(drafted(full, DRAFTERS[name], SHORT)) == plain(full, SHORT)
    for limit in range(2, 9):
        s = drafted(full, DRAFTERS[name], limit=[limit, tiny.NEW])
        assert tiny.text(s) == [plain(full)[0][:limit], plain(full)[1]]


@pytest.mark.parametrize("name", DRAFTERS)
def test_end_of_sequence_inside_an_accepted_span(double, name):
    full, drafter = POLICIES["full"], DRAFTERS[name]
    s, made, text = started(full, drafter), [(1, 1)], plain(full)
    while not s.done_B.all():
        s = tiny.go(s, full, drafter, dtype="float64", steps=1)
        made.append(s.made_B.tolist())
    spans = [(b, i) for before, after in zip(made, made[1:]) for b in range(2) for i in range(before[b], after[b] - 1)]
    eos = next(text[b][i] for b, i in spans if text[b][i] not in text[b][:i])
    s = drafted(full, drafter, eos=(eos,))
    assert tiny.text(s) == [row[: row.index(eos) + 1] if eos in row else row for row in text] and s.done_B.all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: lookahead_trie(nodes=1), lambda: lookahead_trie(length=0), lambda: lookahead_trie(query=0), lambda: lookahead_trie(most=0),
        lambda: lookahead_trie(weight=0.6), lambda: lookahead_trie(own=1.5), lambda: lookahead_decoding(window=0),
        lambda: lookahead_decoding(ngram=1), lambda: lookahead_decoding(guesses=0), lambda: lookahead_decoding(pool=2),
        lambda: aded(paths=16), lambda: aded(nodes=1), lambda: aded(length=1), lambda: aded(successors=0), lambda: aded(simulations=0),
        lambda: aded(recent=2), lambda: aded(gain=0.0), lambda: aded(cap=0.01), lambda: aded(c1=-1.0), lambda: aded(c2=0.0),
        lambda: aded().check(MODEL.attach(trigrams_U=jnp.zeros((2, 3), jnp.int32))),
        lambda: aded().check(MODEL.attach(trigrams_U=jnp.zeros(3))),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_in_one_line(make):
    with pytest.raises(UserError) as refused:
        make()
    assert "\n" not in str(refused.value)
