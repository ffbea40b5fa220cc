"""Trees that suit measured rates and a measured cost: against trying every tree, and rates against a count on paper."""

import importlib.util
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tokeff.decode.draft import Result
from tokeff.decode.methods import token_recycling
from tokeff.decode.recycling import TREE_4, TREE_16, TokenRecycling
from tokeff.decode.shape import Watched, best_tree, chances, counts, likeliest, measured_cost, rate_of
from tokeff.errors import UserError

pytestmark = pytest.mark.core
RATE = np.array([[0.5, 0.2, 0.1], [0.4, 0.1, 0.05], [0.3, 0.1, 0.0]])
PATHS = [path for d in (1, 2, 3) for path in itertools.product(range(3), repeat=d)]


def closed(tree) -> bool:
    return all(path[:-1] in tree or len(path) == 1 for path in tree)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_no_tree_of_as_many_nodes_is_right_more_often(n):
    most = max(sum(chances(tree, RATE)) for tree in itertools.combinations(PATHS, n) if closed(tree))
    tree = likeliest(RATE, n)
    assert len(tree) == n and closed(tree)
    assert sum(chances(tree, RATE)) == pytest.approx(most)
    TokenRecycling(tree, 3)  # parents first, every rank there


def test_the_cost_decides_how_many_nodes():
    free, dear = ((1, 1.0), (40, 1.001)), ((1, 1.0), (2, 3.0), (40, 60.0))
    assert len(best_tree(RATE, free)) > 20 and best_tree(RATE, dear) == ()
    step = ((1, 1.0), (4, 1.05), (5, 2.0), (40, 9.0))  # a pass over up to 4 rows is almost free
    assert best_tree(RATE, step) == likeliest(RATE, 3)


def test_rates_count_nodes_whose_parents_were_right():
    drafter, rng = Watched(TokenRecycling(tiny.TREE, 3)), np.random.default_rng(0)
    parents = np.asarray(drafter.inner.parents)
    observe = jax.jit(drafter.observe)
    state, right, asked = drafter.init(2, 5), np.zeros((2, 3, 3)), np.zeros((2, 3, 3))
    for _ in range(6):
        table = jnp.asarray(rng.integers(0, 5, (2, 5, 3)), jnp.int32)
        state = state.replace(inner=state.inner.replace(top_BUY=table))
        draft = drafter.propose(state, jnp.asarray([[1, 2], [3, 4]]), jnp.asarray([2, 2]))
        logits = rng.normal(size=(2, drafter.nodes, 5))
        count = rng.integers(0, 2, 2)
        state = observe(state, draft, Result(jnp.asarray(logits, jnp.float32), draft.parent_BW, draft.tokens_BW, jnp.asarray(count), {}))
        tokens, wanted = np.asarray(draft.tokens_BW), logits.argmax(-1)
        for b in np.flatnonzero(count):
            good = {0}
            for node, path in enumerate(tiny.TREE, 1):
                at = (b, len(path) - 1, path[-1])
                if parents[node] in good:
                    asked[at] += 1
                    if tokens[b, node] == wanted[b, parents[node]]:
                        good.add(node)
                        right[at] += 1
    np.testing.assert_array_equal(state.right_BWY, right)
    np.testing.assert_array_equal(state.asked_BWY, asked)
    assert right.sum() > 0


def test_a_measured_cost_is_read_or_refused(tmp_path):
    file = tmp_path / "cpu.json"
    rows = [{"context": 512, "rows": n, "of_one_row": t} for n, t in ((8, 1.6), (1, 1.0), (4, 1.3))]
    file.write_text(json.dumps({"verify-cost": {"rows": rows}}))
    assert measured_cost(file) == ((1, 1.0), (4, 1.3), (8, 1.6))
    for bad, text in ((file, None), (tmp_path / "none.json", None), (file, "{}"), (file, "[")):
        if text is not None:
            file.write_text(text)
        with pytest.raises(UserError, match="verify-cost"):
            measured_cost(bad, None if text is not None else 4096)


def test_rates_of_greedy_texts():
    """Every pass asks about each rank below the root once, and drafts that were right are the tokens beyond one a pass."""
    from runs import model

    right, asked = counts(model(), tiny.prompts(), tiny.NEW, 2, 2)
    passes = asked[0, 0]
    assert (asked[0] == passes).all() and (asked[1] == right[0].sum()).all()
    whole = len(tiny.LENGTHS) * (tiny.NEW - 1) - passes
    assert whole <= right.sum() <= whole + 2 * len(tiny.LENGTHS)  # the last pass of a text may be right beyond its limit
    assert right.sum() > 0 and (rate_of(right, asked) == np.maximum(right, 0.5) / asked).all()


def default_tree():
    path = Path(__file__).parents[2] / "experiments" / "default_tree.py"
    spec = importlib.util.spec_from_file_location("default_tree", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.found()


def test_the_default_tree_is_the_best_by_the_committed_measurements():
    """On two cores no tree pays over all classes; the default is the best of those with a draft. Where rows are free larger ones are."""
    found = default_tree()
    whole = found["all"]
    assert set(whole["draft"]) == set(TREE_4) == set(token_recycling().tree) and whole["tree"] == () and whole["gain"] < 1
    assert len(TREE_16) == 15 and whole["default"] < whole["sixteen"] < whole["same_size"] < whole["large"]
    assert [round(whole[name], 2) for name in ("default", "sixteen", "same_size", "large")] == [1.24, 1.35, 1.37, 1.47]
