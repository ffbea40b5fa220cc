"""Searches for heads against their definition, on the attention of a naive model; and what a head search must refuse."""

import numpy as np
import pytest
import tiny
from oracles import model as oracle
from oracles.policies import Cache

from tokeff.errors import UserError
from tokeff.kv import methods as kv
from tokeff.kv.compress import layer_importance, semantic_heads
from tokeff.kv.heads import duo_heads, razor_heads, strongest, union
from tokeff.models.config import Precision
from tokeff.models.load import Model

pytestmark = [pytest.mark.core, pytest.mark.xdist_group("heads")]
M = Model(tiny.CFG, tiny.params(), None, Precision(), "tiny")
PIECE, COPIES = 12, 3


def best(score_LK: np.ndarray, n: int):
    """The n highest scores as heads of each layer."""
    cut = np.sort(score_LK.reshape(-1))[-n]
    return tuple(tuple(h for h in range(score_LK.shape[1]) if row[h] >= cut) for row in score_LK)


@pytest.mark.parametrize(("echo", "induction"), [(0.125, 0.25), (0.5, 0.0), (0.0, 0.5)])
def test_razor_heads_equal_their_definition(echo, induction):
    text = np.tile(np.random.default_rng(0).integers(0, tiny.CFG.V, PIECE), COPIES).tolist()
    m = oracle.Model(tiny.params(), tiny.CFG)
    copies, after = np.zeros((2, tiny.CFG.L, tiny.CFG.K))
    for layer, s in enumerate(oracle.prefill(m, text)[0]):
        for n in range(tiny.CFG.N):
            mine = [(t, o, p) for t in range(PIECE, len(text)) for o, p in s.A[n][t].items()]
            own = sum(p for t, o, p in mine if o in range(t - PIECE, -1, -PIECE))
            next_ = sum(p for t, o, p in mine if o in range(t + 1 - PIECE, -1, -PIECE))
            copies[layer, n // m.G] = max(copies[layer, n // m.G], own)
            after[layer, n // m.G] = max(after[layer, n // m.G], next_)
    heads, none = tiny.CFG.L * tiny.CFG.K, ((),) * tiny.CFG.L
    wanted = [best(score, round(heads * share)) if share else none for score, share in ((copies, echo), (after, induction))]
    assert razor_heads(M, echo, induction, tokens=PIECE, copies=COPIES) == union(*wanted)


def test_duo_heads_equal_their_definition():
    text, places, sinks = list(tiny.prompts()[0]), 30, 4
    m = oracle.Model(tiny.params(), tiny.CFG)
    score = np.zeros((tiny.CFG.L, tiny.CFG.K))
    for layer, s in enumerate(oracle.prefill(m, text)[0]):
        for n in range(tiny.CFG.N):
            q = m.rope(layer, np.mean([s.q[o][n] for o in s.orders[sinks:]], axis=0), places - 1)
            k = np.mean([s.k[o][n // m.G] for o in s.orders[sinks:]], axis=0)
            p = oracle.softmax({place: m.dot(q, m.rope(layer, k, place)) for place in range(places)})
            score[layer, n // m.G] += np.mean(np.cumsum([p[place] for place in range(places)])) / m.G
    assert duo_heads(M, text, 0.375, places, sinks) == best(score, 3)


def test_semantic_heads_equal_their_definition():
    prompt, answer, (start, stop) = list(tiny.prompts()[0][:40]), [5, 9, 2], (10, 16)
    total = np.zeros((tiny.CFG.L, tiny.CFG.N))
    for layer, s in enumerate(oracle.prefill(oracle.Model(tiny.params(), tiny.CFG), [*prompt, *answer[:-1]])[0]):
        for n in range(tiny.CFG.N):
            total[layer, n] = sum(s.A[n][t][o] for t in (39, 40, 41) for o in range(start, stop))
    wanted = tuple(tuple(sorted(np.argsort(-row)[:2].tolist())) for row in total)
    assert semantic_heads(M, [(prompt, (start, stop), answer)], count=2) == wanted


def test_layer_importance_is_each_layers_error():
    """Against outputs of a naive model, behind the output projection, that compresses one layer at a time; shares add up to 1."""
    context, question = list(tiny.prompts()[1]), list(tiny.prompts()[0][:5])
    m = oracle.Model(tiny.params(), tiny.CFG)
    seen = oracle.prefill(m, context)[0]

    def outputs(small: int | None):
        """Attention outputs of each layer where layer `small` keeps its last 12 rows and what is asked."""
        cache, found = Cache(m, seen), [[] for _ in seen]
        for order, token in enumerate(question, len(context)):
            x = m.embed(token)
            for layer in range(tiny.CFG.L):
                q, k, v = m.qkv(layer, x)
                out = cache.attend(layer, q, k, v, order)
                x = m.rest(layer, x, out)
                if layer == small:
                    full = cache.rows[layer]
                    cache.rows[layer] = [{o: row for o, row in rows.items() if o >= len(context) - 12} for rows in full]
                    out = cache.attend(layer, q, k, v, order)
                    cache.rows[layer] = full
                found[layer].append(out)
        return [np.einsum("dnh,tnh->td", m.blocks[i]["o_DNH"], np.array(x)) for i, x in enumerate(found)]

    exact = outputs(None)
    error = [np.linalg.norm(outputs(i)[i] - exact[i]) / np.linalg.norm(exact[i]) for i in range(tiny.CFG.L)]
    found = layer_importance(M, [(context, question)], kv.recent_rows(12))
    np.testing.assert_allclose(found, np.array(error) / sum(error), atol=1e-4)


def test_strongest_rounds_up_and_takes_the_first_of_equals():
    assert strongest([[1.0, 0.0], [0.0, 1.0]], 0.3) == ((0,), (1,))
    assert strongest([[1.0, 1.0], [1.0, 1.0]], 0.25) == ((0,), ())
    assert strongest([[1.0, 1.0]], 0.0) == ((),)
    assert strongest([[1.0, 1.0]], 1.0) == ((0, 1),)


@pytest.mark.parametrize(
    ("search", "word"),
    [
        (lambda: strongest([1.0, 2.0], 0.5), "layer"),
        (lambda: strongest([[1.0, 2.0]], 1.5), "share"),
        (lambda: strongest([[1.0, float("nan")]], 0.5), "finite"),
        (lambda: razor_heads(M, tokens=200), "reads 256"),
        (lambda: razor_heads(M, tokens=10, copies=1), "copies"),
    ],
)
def test_refusals(search, word):
    with pytest.raises(UserError, match=word) as error:
        search()
    assert "\n" not in str(error.value)
