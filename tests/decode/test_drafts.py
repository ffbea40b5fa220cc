"""Drafts, trees and acceptance against lists and dicts."""

import copy
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from oracles import drafts as oracle
from oracles.against import dense
from oracles.model import decode as oracle_decode
from oracles.policies import Cache

from tokeff.decode.draft import Draft, Drafter, Result, last_token
from tokeff.decode.lookup import PromptLookup
from tokeff.decode.recycling import TREE_16, TREE_80, TokenRecycling
from tokeff.decode.tree import shape_of, walk
from tokeff.errors import UserError

pytestmark = pytest.mark.core


def random_trees(B=48, W=8, V=3, seed=0):
    """Random parents (each before its children), tokens of a tiny vocabulary so that paths often agree, and missing leaves."""
    rng = np.random.default_rng(seed)
    parent = np.stack([[0] + [rng.integers(0, w) for w in range(1, W)] for _ in range(B)])
    valid = rng.random((B, W)) < 0.9
    valid[:, 0] = True
    return parent, rng.integers(0, V, (B, W)), valid, rng.integers(0, V, (B, W))


def test_ancestors_and_depth():
    parent, *_ = random_trees()
    depth, above = (np.asarray(x) for x in shape_of(jnp.asarray(parent), 7))
    for b, row in enumerate(parent.tolist()):
        for node in range(len(row)):
            assert set(np.flatnonzero(above[b, node])) == oracle.ancestors(row, node)
            assert depth[b, node] == len(oracle.ancestors(row, node)) - 1


def test_walk_takes_the_path_of_greedy_tree_verification():
    parent, token, valid, target = random_trees()
    path, count = walk(Draft(*(jnp.asarray(x) for x in (token, parent, valid))), jnp.asarray(target), 7)
    lengths = set()
    for b in range(len(parent)):
        wanted, _ = oracle.accepted(parent[b].tolist(), token[b].tolist(), valid[b], target[b].tolist())
        assert path[b, : int(count[b])].tolist() == wanted
        lengths.add(len(wanted))
    assert lengths >= {1, 2, 3}


@pytest.mark.parametrize(("ngram", "latest"), [(3, False), (3, True), (1, False)])
def test_prompt_lookup_copies_what_followed(ngram, latest):
    rng, drafter = np.random.default_rng(ngram), PromptLookup(4, ngram, latest)
    count = rng.integers(1, 24, 64)
    text = rng.integers(0, 4, (64, 24))
    draft = jax.jit(lambda t, c: drafter.propose((), t, c))(jnp.asarray(text), jnp.asarray(count))
    for b, n in enumerate(count):
        wanted = oracle.prompt_lookup(text[b, :n].tolist(), 4, ngram, latest)
        given = np.asarray(draft.tokens_BW)[b, 1:][np.asarray(draft.valid_BW)[b, 1:]]
        assert given.tolist() == wanted, f"text {text[b, :n]}"
        assert int(draft.tokens_BW[b, 0]) == text[b, n - 1] and bool(draft.valid_BW[b, 0])
    assert draft.parent_BW[0].tolist() == [0, 0, 1, 2, 3]


@pytest.mark.parametrize(("tree", "depths"), [(TREE_16, [5, 5, 3, 1, 1]), (TREE_80, [8, 21, 25, 15, 8, 3])])
def test_published_trees(tree, depths):
    drafter = TokenRecycling(tree)
    assert [sum(len(path) == d + 1 for path in tree) for d in range(drafter.depth)] == depths
    assert drafter.nodes == len(tree) + 1 == sum(depths) + 1


def test_duplicate_tokens_of_a_pass_are_written_in_order():
    """Of nodes with one token the last writes, whatever the hardware's scatter does."""
    drafter, rng = TokenRecycling(tiny.TREE, rank=3), np.random.default_rng(0)
    token, logits = rng.integers(0, 4, (2, 8)), rng.normal(size=(2, 8, 11))
    result = Result(jnp.asarray(logits), None, None, None, {})
    state = drafter.observe(drafter.init(2, 11), Draft(jnp.asarray(token), None, None), result)
    for b in range(2):
        wanted = oracle.TokenRecycling(tiny.TREE, 3, 11)
        wanted.observe(token[b].tolist(), logits[b])
        assert jax.tree.leaves(state)[0][b].tolist() == list(wanted.table.values())


def one_row(cache, token):
    """(logits, cache) of one more row, the cache given left as it was."""
    grown = copy.copy(cache)
    grown.rows = [[dict(head) for head in layer] for layer in cache.rows]
    order = max(grown.rows[0][0]) + 1
    ((logits, _),) = oracle_decode(cache.m, grown, [token], order)
    return logits, grown


def test_token_recycling_pass_by_pass():
    """Every pass: the drafted tree, what is committed and the table, against dicts and one forward walk per node."""
    drafter = TokenRecycling(tiny.TREE, rank=8)
    s = tiny.start(tiny.read(tiny.FULL), tiny.FULL, drafter)
    oracles, prefixes, texts = [], [], []
    for b in range(2):
        model, seen, logits = dense(b)
        oracles.append(oracle.TokenRecycling(tiny.TREE, 8, tiny.CFG.V))
        prefixes.append(Cache(model, seen))
        texts.append([int(np.argmax(logits))])
    for _ in range(12):
        draft = drafter.propose(s.drafter, s.tokens_BS, s.count_B)
        s = tiny.go(s, tiny.FULL, drafter, steps=1)
        for b, recycling in enumerate(oracles):
            parent, token = recycling.propose(texts[b][-1])
            assert draft.tokens_BW[b].tolist() == token and draft.parent_BW[b].tolist() == parent
            logits = oracle.tree_logits(one_row, [prefixes[b]], parent, token)
            path, new = oracle.accepted(parent, token, [True] * len(token), [int(np.argmax(x)) for x in logits])
            for node in path:
                prefixes[b] = one_row(prefixes[b], token[node])[1]
            texts[b] += new
            recycling.observe(token, logits)
            assert tiny.text(s)[b] == texts[b]
            assert jax.tree.leaves(s.drafter)[0][b].tolist() == list(recycling.table.values())
    assert max(map(len, texts)) > 13, "no draft was accepted"


# -- trees that are none


@dataclass(frozen=True)
class Numbered(Drafter):
    """A tree whose parents are known before anything runs."""

    parent: tuple[int, ...] = (0, 0, 0, 1)
    nodes: int = 4  # type: ignore[assignment]
    depth: int = 2  # type: ignore[assignment]
    rows: int = 2  # of sequences, that the parents are given for

    def propose(self, state, tokens_BS, count_B):
        root = last_token(tokens_BS, count_B)
        tokens = jnp.broadcast_to(root, (len(root), len(self.parent)))
        return Draft(tokens, np.tile(np.array(self.parent, np.int32), (self.rows, 1)), jnp.ones(tokens.shape, bool))


@functools.cache
def begun():
    return tiny.start(tiny.read(tiny.FULL), tiny.FULL, Numbered())


@pytest.mark.parametrize(
    ("drafter", "says"),
    [
        (Numbered((0, 0, 0, 1, 3)), "W at most its nodes=4"), (Numbered(rows=1), r"parent_BW \(1, 4\)"),
        (Numbered((0, 2, 1, 0)), "node 1 on node 2; list parents first"), (Numbered((0, 0, 0, 3)), "node 3 on node 3"),
        (Numbered((1, 0, 0, 0)), "node 0 on node 1"), (Numbered((0, 0, -1, 0)), "node 2 on node -1"),
        (Numbered((0, 0, 1, 2)), "3 nodes below the root, and depth=2; raise depth"),
    ],
    ids=str,
)  # fmt: skip
def test_a_draft_that_is_no_tree_of_its_size_is_refused(drafter, says):
    """In one line, while the loop is traced and before anything runs."""
    with pytest.raises(UserError, match=says) as error:
        tiny.go(begun(), tiny.FULL, drafter)
    assert "\n" not in str(error.value)


def test_a_tree_of_numbers_is_drafted():
    """Also one that is smaller than it might be."""
    assert tiny.text(tiny.decode(tiny.FULL, Numbered((0, 0, 1)))) == tiny.text(tiny.decode(tiny.FULL))
