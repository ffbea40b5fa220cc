"""Trees of fixed size whose parents are data: the text is plain decoding's, the tree a search over dicts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from driven import SHORT, decode, ending, lower, model, plain, start
from oracles.float64 import float64_model
from oracles.growing import equal_growth
from oracles.skipping import grown
from test_draft_model import SMALL, small_oracle

from tokeff.decode.draft import Target
from tokeff.decode.equal_growth import EqualGrowth
from tokeff.decode.sample import GREEDY, Sampling
from tokeff.errors import UserError
from tokeff.kv import methods as kv

pytestmark = [pytest.mark.core, pytest.mark.xdist_group("draft-model")]
FULL, H2O = kv.full(), kv.h2o(0.5, evict=4)
GROWTH = EqualGrowth(SMALL, 4, 3, 3)


@pytest.fixture(autouse=True, scope="module")
def double():
    with float64_model():
        yield


def small():
    return model(draft=lower(SMALL.L))


@pytest.mark.parametrize(("policy", "rows"), [(FULL, None), (FULL, SHORT), (H2O, None)], ids=["full", "one token", "h2o"])
def test_text_is_that_of_plain_decoding(policy, rows):
    """Ragged batch, a prompt of one token, eviction in blocks."""
    s = decode(policy, GROWTH, small(), rows)
    assert tiny.text(s) == plain(policy, rows)
    assert int(s.passes_B.max()) < tiny.NEW - 1, "no draft was accepted, so nothing was tested"


def test_trees_are_those_of_a_search_over_dicts():
    """Pass by pass, while the draft model's cache takes in what was accepted: of leaves of the last step, too, which have no row there."""
    m, s = small(), start(FULL, GROWTH, small())
    propose = jax.jit(lambda params, s: GROWTH.draft(s, Target(params, tiny.CFG, FULL, GREEDY))[0])
    light, caches = small_oracle()
    shapes, ends = set(), set()

    def step(cache, token):
        order = 1 + max(cache.rows[0][0])
        return light.row(new := grown(cache), token, order), new

    for _ in range(4):
        draft, before, order = propose(m.params, s), tiny.text(s), np.asarray(s.count_B) - 1
        for b, cache in enumerate(caches):
            parent, token = equal_growth(step, cache, before[b][-1], GROWTH.length, GROWTH.width, GROWTH.guesses)
            assert draft.parent_BW[b].tolist() == parent and draft.tokens_BW[b].tolist() == token and draft.valid_BW[b].all()
            shapes.add(tuple(parent))
        s = GROWTH.drive(m.params, m.cfg, s, 1, policy=FULL, how=GREEDY, eos=())
        for b, cache in enumerate(caches):
            ends.add(int(s.accepted.path_BW[b, s.accepted.count_B[b] - 1]))
            for t, token in enumerate(tiny.text(s)[b][len(before[b]) - 1 : -1]):
                light.row(cache, token, int(order[b]) + t)
    assert len(shapes) > 5, "the topology never changed"
    assert max(ends) >= 1 + (GROWTH.length - 1) * GROWTH.width > min(ends)


def test_the_target_as_its_own_draft_model_with_its_own_noise():
    """The most probable guess of each place is then the token that is drawn."""
    how, drafter = Sampling(0.8, top_k=20), EqualGrowth(tiny.CFG, 3, 1, 1)
    s = decode(FULL, drafter, model(draft=tiny.params(tiny.CFG, "float64")), how=how)
    assert tiny.text(s) == plain(FULL, how=how)
    assert s.passes_B.tolist() == [-(-(tiny.NEW - 1) // 4)] * 2


def test_end_of_sequence_and_limits_inside_an_accepted_span():
    m, eos = small(), ending(FULL, GROWTH, small())
    s = decode(FULL, GROWTH, m, eos=(eos,))
    assert tiny.text(s) == [row[: row.index(eos) + 1] if eos in row else row for row in plain(FULL)] and s.done_B.all()
    for limit in range(2, 7):
        s = start(FULL, GROWTH, m).replace(limit_B=jnp.asarray([limit, tiny.NEW], jnp.int32))
        s = GROWTH.drive(m.params, m.cfg, s, 1000, policy=FULL, how=GREEDY, eos=())
        assert tiny.text(s) == [plain(FULL)[0][:limit], plain(FULL)[1]]


@pytest.mark.parametrize(
    "make", [lambda: EqualGrowth(SMALL, 0), lambda: EqualGrowth(SMALL, 2, 0), lambda: EqualGrowth(SMALL, 2, 4, 3),
             lambda: EqualGrowth(SMALL, 2, 4, 62).check(small())],
)  # fmt: skip
def test_bad_settings_are_refused_in_one_line(make):
    with pytest.raises(UserError) as error:
        make()
    assert "\n" not in str(error.value)
