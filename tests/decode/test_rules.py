"""Rules of verification: the chances and residual laws of the papers, and the exact law of what comes of them, draft by draft."""

import functools
import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import drafts as oracle
from oracles import rules as exact
from test_sampling import V, swapped

from tokeff.decode import rules
from tokeff.decode.draft import Draft
from tokeff.decode.lossy import Rapid, Typical
from tokeff.decode.rules import ChainRejection, Descent, DeterministicTree, KSeq, Recursive
from tokeff.decode.sample import Sampling, first_max, warp

pytestmark = [pytest.mark.core, pytest.mark.xdist_group("sampling")]


@dataclass(frozen=True)
class MedusaNucleus(Descent):
    """A negative control: every branch is compared with a draw of its own; where none agrees there is one more, from the whole law."""

    def odds(self, draft, law_BV, among_BW):
        return jnp.take_along_axis(law_BV, draft.tokens_BW, axis=1), law_BV


# -- one place, all draws of up to four drafts: the law of what is emitted, by the rule's own chances and rests.

U = 6  # tokens
DRAWS = np.array(list(itertools.product(range(U), repeat=4)))


def laws(seed):
    """(p, q): random laws of 3 to 6 tokens, not all of them shared."""
    rng, size = np.random.default_rng(seed), 3 + seed % 4
    p, q = np.zeros(U), np.zeros(U)
    p[:size], q[-size:] = rng.dirichlet(np.ones(size)), rng.dirichlet(np.ones(size))
    return (np.eye(U)[seed % U] if seed >= 6 else p), q


@functools.cache
def odds(rule):
    """(chance_BW, rest_BV) of drafts that all hang on the root. A rule that throws no coins has chances of 0 and 1, and is sure of what it
    emits in the place of drafts."""

    def of(tokens, logq, law, among):
        draft = Draft(tokens, jnp.zeros_like(tokens), among, logq)
        if isinstance(rule, Descent):
            return rule.odds(draft, law, among)
        logits = jnp.broadcast_to(jnp.log(law)[:, None], (*tokens.shape, U))
        path, text, count = rule.judge(draft, logits, jnp.zeros_like(tokens), None, Sampling(1.0), 1)
        return (jnp.arange(tokens.shape[1]) == path[:, 1:2]) & (count > 1)[:, None] & among, jax.nn.one_hot(text[:, 0], U)

    return jax.jit(of)


def emits(rule, p, k, q_BWV):
    """(law_BV, accepted_B): what the rule emits after each of DRAWS, of which k are drafts."""
    among = np.broadcast_to(np.arange(5) % 5 <= k, (len(DRAWS), 5)) & (np.arange(5) > 0)
    tokens = np.pad(DRAWS, ((0, 0), (1, 0)))
    with np.errstate(divide="ignore"):
        given = odds(rule)(tokens.astype(np.int32), np.log(q_BWV).astype(np.float32), np.tile(p, (len(DRAWS), 1)).astype(np.float32), among)
    chance, rest = (np.asarray(x, np.float64) for x in given)
    law, going = np.zeros_like(rest), np.ones(len(DRAWS))
    for node in range(1, k + 1):
        law[np.arange(len(DRAWS)), tokens[:, node]] += going * chance[:, node]
        going = going * (1 - chance[:, node])
    return law + going[:, None] * rest, 1 - going


def drawn(q, k, distinct=False):
    """(weight_B, q_BWV): probability of each of DRAWS when k are drawn from q, and the law that each was drawn from."""
    q_BWV, weight, left = np.zeros((len(DRAWS), 5, U)), np.ones(len(DRAWS)), np.tile(q, (len(DRAWS), 1))
    for i in range(4):
        q_BWV[:, i + 1] = left
        weight *= left[np.arange(len(DRAWS)), DRAWS[:, i]] if i < k else DRAWS[:, i] == 0
        if distinct:
            left = np.where(np.arange(U) == DRAWS[:, i, None], 0, left)
            left = left / np.maximum(left.sum(axis=1, keepdims=True), 1e-300)
    return weight, q_BWV


def far(rule, seed, k, distinct=False):
    """(how far the emitted law is from the target's, probability that a draft is accepted)."""
    p, q = laws(seed)
    weight, q_BWV = drawn(q, k, distinct)
    law, accepted = emits(rule, p, k, q_BWV)
    return np.abs(weight @ law - p).max(), weight @ accepted


CASES = [*((ChainRejection(), 1), (Rapid(0.0), 1)), *((rule, k) for rule in (Recursive(), KSeq()) for k in (1, 2, 4))]


@pytest.mark.parametrize(("rule", "k"), CASES, ids=str)
def test_what_is_emitted_has_the_targets_law(rule, k):
    for seed in range(8):
        assert far(rule, seed, k)[0] < 1e-6


def test_drafts_without_replacement_keep_the_law():
    for seed, k in ((0, 2), (1, 4), (3, 4), (5, 4), (7, 3)):
        assert far(Recursive(), seed, k, distinct=True)[0] < 1e-6
    assert far(KSeq(), 3, 4, distinct=True)[0] > 1e-3, "a negative control: k-SEQ is for i.i.d. drafts"


def test_a_deterministic_tree_keeps_the_law_whatever_its_tokens():
    """For every list of tokens, repeated ones among them."""
    for seed, k in ((0, 1), (2, 2), (3, 4), (5, 4), (7, 4)):
        p, _ = laws(seed)
        law, accepted = emits(DeterministicTree(), p, k, np.ones((len(DRAWS), 5, U)))
        np.testing.assert_allclose(law, np.tile(p, (len(DRAWS), 1)), atol=1e-6)
        np.testing.assert_allclose(accepted, [p[sorted(set(row[:k]))].sum() for row in DRAWS.tolist()], atol=1e-6)


def test_rules_that_are_not_lossless_fail_the_same_comparison():
    assert max(far(Rapid(10.0), seed, 1)[0] for seed in range(6)) > 1e-2
    for rule, k in itertools.product((Typical(), MedusaNucleus()), (1, 2, 4)):
        found = [off for off, accepted in (far(rule, seed, k) for seed in range(6)) if accepted > 0]
        assert len(found) >= 4 and min(found) > 1e-2, "wherever any draft can be right"
    p, twice = np.array([0.5, 0.3, 0.2, 0, 0, 0]), (DRAWS == 0).all(axis=1)
    law, _ = emits(MedusaNucleus(), p, 2, np.ones((len(DRAWS), 5, U)))
    np.testing.assert_allclose(law[twice][0][:3], [0.875, 0.075, 0.05], atol=1e-6)


def test_how_often_drafts_are_accepted():
    """1 - TV for one draft; by the equations of each rule for more; never above sum min(p, 1 - (1 - q)^k)."""
    for seed, k in itertools.product(range(6), (1, 2, 4)):
        p, q = laws(seed)
        rrs, left = 1.0, p
        for _ in range(k):
            rrs, left = rrs * (1 - np.minimum(left, q).sum()), exact.positive(left - q, left)
        spectr = 1 - (1 - exact.beta(p, q, exact.rho(p, q, k))) ** k
        bound = np.minimum(p, 1 - (1 - q) ** k).sum()
        found = [far(rule, seed, k)[1] for rule in (Recursive(), KSeq())]
        np.testing.assert_allclose(found, [1 - rrs, spectr], atol=1e-6)
        assert max(found) < bound + 1e-6
        if k == 1:
            np.testing.assert_allclose(found, np.minimum(p, q).sum(), atol=1e-6)


# -- whole drafts: every draft, and every way its verification can go, with coins that fall just to the side of each chance.

W = 6
LAYOUTS = {
    "chain": (ChainRejection(), exact.recursive, (0, 0, 1, 2), 3, False),
    "rapid": (Rapid(3.0), exact.rapid(3.0), (0, 0, 1, 2), 3, False),
    "chains": (KSeq(), exact.kseq, (0, 0, 1, 0, 3), 2, False),
    "four": (KSeq(), exact.kseq, (0, 0, 0, 0, 0, 1), 2, False),
    "recursive": (Recursive(), exact.recursive, (0, 0, 1, 0, 3), 2, False),
    "distinct": (Recursive(), exact.recursive, (0, 0, 0, 1, 1), 2, True),
    "tree": (DeterministicTree(), exact.deterministic, (0, 0, 0, 1, 1, 2), 2, None),
}
TEMPERATURES = (0.0, 0.8, 2.0)
HOWS = [("chain", {"top_p": 0.8}), ("rapid", {}), ("chains", {}), ("chains", {"top_k": 2, "min_p": 0.3}), ("four", {"top_k": 2}),
        ("recursive", {"top_p": 0.9}), ("distinct", {}), ("tree", {"top_k": 2}), ("chain", {"top_k": 2, "top_p": 0.8}),
        ("chains", {"top_k": 2, "top_p": 0.8})]  # fmt: skip


@functools.cache
def tables(depth):
    """Logits of target and drafter behind every text; equals among those of the target."""
    texts = [text for n in range(depth + 1) for text in itertools.product(range(V), repeat=n)]
    both = [{text: 1.5 * np.random.default_rng((seed, len(text), *text)).normal(size=V) for text in texts} for seed in (1, 2)]
    both[0][(1,)] = np.array([0.3, 0.9, 0.9])
    return [{text: x.astype(np.float32).astype(np.float64) for text, x in table.items()} for table in both]


def all_drafts(parent, q_of, distinct):
    """(token of every node, text behind it, law it was drawn from, probability) of every draft."""
    for token in itertools.product(range(V), repeat=len(parent) - 1):
        token, text, q, weight = (0, *token), [()], [None], 1.0
        for node in range(1, len(parent)):
            before = [token[n] for n in range(1, node) if parent[n] == parent[node]]
            law = q_of[text[parent[node]]]
            if distinct:
                law = exact.positive(np.where(np.isin(np.arange(V), before), 0, law), np.zeros(V))
            text.append((*text[parent[node]], token[node]))
            weight *= 1.0 if distinct is None else law[token[node]]
            q.append(law)
        if weight > 0:
            yield token, text, q, weight


def every_way(layout, warped):
    """(rows for the rule, what each must give, [(law of texts, weight)] by temperature)."""
    _, formula, parent, depth, distinct = LAYOUTS[layout]
    target, drafter = tables(depth)
    rows, found = [], {t: [] for t in TEMPERATURES}
    for t in TEMPERATURES:
        p_of = {text: oracle.warped(x, t, **warped) for text, x in target.items()}
        drawn_at = 1.0 if distinct and t == 0 else t  # no draw without replacement is greedy
        q_of = {text: oracle.warped(x, drawn_at, **warped) for text, x in drafter.items()}
        for token, text, q, weight in all_drafts(parent, q_of, distinct):
            ways = list(exact.outcomes(formula, [p_of[x] for x in text], parent, token, q))
            found[t].append((exact.law_of_texts(ways, token, p_of, depth + 1), weight, p_of))
            rows += [(t, token, text, q, way) for way in ways if way[1] > 1e-5]
    return rows, found


def as_arrays(layout, rows):
    """Draft, logits and coins. Nodes that the layout lacks are there too, but look ahead or do not exist."""
    parent = (*LAYOUTS[layout][2], *[0] * (W - len(LAYOUTS[layout][2])))
    B, missing, target = len(rows), W - len(LAYOUTS[layout][2]), tables(LAYOUTS[layout][3])[0]
    tokens, logits, coin, q = np.zeros((B, W), np.int32), np.zeros((B, W, V)), np.full((B, W), 0.5), np.ones((B, W, V)) / V
    for b, (_, token, text, laws, (_, _, _, thrown)) in enumerate(rows):
        tokens[b, : len(token)], logits[b, : len(text)] = token, [target[x] for x in text]
        q[b, 1 : len(laws)] = laws[1:]
        for node, chance, right in thrown:
            coin[b, node] = chance - 2e-6 if right else chance + 2e-6
    exists = np.arange(W) < W - missing
    ahead = (np.arange(W) == W - 1) & (missing == 2)
    with np.errstate(divide="ignore"):
        logq = None if LAYOUTS[layout][4] is None else jnp.log(jnp.asarray(q, jnp.float32))
    parent, exists, ahead = (jnp.asarray(np.broadcast_to(x, (B, W))) for x in (parent, exists | ahead, ahead))
    return Draft(jnp.asarray(tokens), parent, exists, logq, ahead), jnp.asarray(logits, jnp.float32), jnp.asarray(coin, jnp.float32)


def goes_as_told(layout, warped, rows, monkeypatch):
    """Run every way through `judge` and compare."""
    rule, _, parent, depth, _ = LAYOUTS[layout]
    how = Sampling(tuple(t for t, *_ in rows), **warped)
    monkeypatch.setattr(rules, "coins", lambda place, coin_BW, W: coin_BW)
    monkeypatch.setattr(rules, "pick", lambda law, place, key: first_max(law))

    def both(draft, logits, coin):
        place = jnp.zeros(draft.tokens_BW.shape, jnp.int32)
        return rule.descend(draft, logits, place, coin, how), rule.judge(draft, logits, place, coin, how, depth)

    walk, (path, text, count) = jax.tree.map(np.asarray, jax.jit(both)(*as_arrays(layout, rows)))
    np.testing.assert_array_equal(walk.node_B, [way[0][-1] for *_, way in rows])
    np.testing.assert_array_equal(count, [len(way[0]) for *_, way in rows])
    np.testing.assert_allclose(walk.rest_BV, [way[2] for *_, way in rows], atol=2e-5)
    for b, (_, token, _, _, (nodes, _, _, _)) in enumerate(rows):
        assert all(parent[j] == i for i, j in itertools.pairwise(path[b, : count[b]])) and path[b, 0] == 0
        assert text[b, : count[b]].tolist() == [*(token[node] for node in nodes[1:]), int(walk.rest_BV[b].argmax())]


@pytest.mark.parametrize(("layout", "warped"), HOWS, ids=str)
def test_every_way_of_every_draft(layout, warped, monkeypatch):
    """The rule goes it where the formulas do, within 2e-6 of every chance, and the formulas give the law of plain sampling."""
    rows, found = every_way(layout, warped)
    goes_as_told(layout, warped, rows, monkeypatch)
    for t, drafts in found.items():
        apart = []
        for laws, weight, p_of in drafts:
            wanted = oracle.law(p_of, LAYOUTS[layout][3] + 1)
            apart.append((weight, np.array([laws.get(text, 0.0) - p for text, p in wanted.items()]), abs(sum(laws.values()) - 1)))
        assert max(lost for *_, lost in apart) < 1e-9
        off = np.abs(sum(weight * x for weight, x, _ in apart)).max() if layout != "tree" else max(np.abs(x).max() for _, x, _ in apart)
        assert off > 1e-2 if layout == "rapid" and t > 0 else off < 1e-9


def test_warpers_in_another_order_are_noticed(monkeypatch):
    """By their order alone: of the rows that are drawn, which `warp` serves as well as the law that also knows greedy rows."""
    warped = {"top_p": 0.8}
    rows = [row for row in every_way("chain", warped)[0] if row[0] > 0]
    monkeypatch.setattr(rules, "log_law", warp)
    goes_as_told("chain", warped, rows, monkeypatch)
    monkeypatch.setattr(rules, "log_law", swapped)
    with pytest.raises(AssertionError):
        goes_as_told("chain", warped, rows, monkeypatch)


def test_typical_acceptance():
    """Path and tokens by its definition."""
    parent, how, rng = (0, 0, 0, 1, 1, 2), Sampling((0.9,) * 150 + (0.0,) * 50), np.random.default_rng(0)
    tokens, logits = rng.integers(0, U, (200, W)), rng.normal(size=(200, W, U)) * 1.5
    draft = Draft(jnp.asarray(tokens, jnp.int32), jnp.broadcast_to(jnp.asarray(parent), (200, W)), jnp.ones((200, W), bool))
    rule = Typical(0.2, 0.5)
    judge = jax.jit(lambda x: rule.judge(draft, x, draft.parent_BW, None, how, 2))
    path, text, count = map(np.asarray, judge(jnp.asarray(logits, jnp.float32)))
    for b in range(200):
        law = [oracle.warped(x, how.temperature[b]) for x in logits[b]]
        wanted = exact.typical(law, parent, tokens[b], 0.2, 0.5)
        assert path[b, : count[b]].tolist() == wanted
        assert text[b, : count[b]].tolist() == [*tokens[b][wanted[1:]], int(logits[b, wanted[-1]].argmax())]
    assert set(count.tolist()) == {1, 2, 3} and not rule.lossless and not Rapid(1.0).lossless and Rapid(0.0).lossless
