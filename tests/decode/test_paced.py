"""As wide as pays: the text of plain decoding at any pace, the pace against a list of numbers, no copies, and one program."""

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tokeff.decode.loop import settle
from tokeff.decode.methods import draft_model, paced, plain, prompt_lookup, token_recycling
from tokeff.decode.paced import Paced, first_nodes, run_paced
from tokeff.decode.sample import GREEDY
from tokeff.errors import UserError
from tokeff.kv import methods as kv

pytestmark = [pytest.mark.core, pytest.mark.xdist_group("paced")]
FREE, SAVES, DEAR = ((1, 1.0), (16, 1.01)), ((1, 1.0), (16, 0.5)), ((1, 1.0), (16, 30.0))
POLICIES = {"full": kv.full(), "h2o": kv.h2o(0.5, evict=4)}
RECYCLING = token_recycling(tiny.TREE)


def made(policy, cost, new=48):
    """(text, passes, the width of every pass) of 48 tokens, asked for a pass at a time."""
    drafter, widths = paced(RECYCLING, (1, 4, 8), cost, tries=2, rarest=8), []
    s = tiny.start(tiny.read(policy), policy, drafter, new=new)
    while not s.done_B.all():
        widths.append(drafter.widths[int(s.drafter.choice)])
        s = tiny.go(s, policy, drafter, steps=1)
    return tiny.text(s), np.asarray(s.passes_B), widths


@pytest.mark.parametrize("name", tiny.sampled(POLICIES, ("full",)))
def test_the_text_is_that_of_plain_decoding_at_any_pace(name):
    """Where rows cost less and less the widest draft always pays: passes are those of the drafter alone. Where each costs as much as a pass
    no draft pays, since none commits more than 4 tokens: after the first pass only tries carry any, 4 passes later, then 8 after each."""
    policy = POLICIES[name]
    wanted = tiny.text(tiny.decode(policy, new=48))
    alone = tiny.decode(policy, RECYCLING, new=48)
    text, few, widths = made(policy, SAVES)
    assert text == wanted == tiny.text(alone)
    assert few.tolist() == alone.passes_B.tolist() and set(widths) == {8}
    text, many, widths = made(policy, DEAR)
    assert text == wanted
    assert widths == [8, *((1,) * 4 + (4,)), *((1,) * 8 + (4,)) * 5][: len(widths)]
    assert few.max() < 47 - 3 - widths.count(4) <= many.min(), "the first draft is 3 deep, those of tries 1"


def lowered(policy):
    drafter = paced(RECYCLING, (1, 4, 8), FREE)
    s = tiny.start(tiny.read(policy), policy, drafter, new=48)
    return s, run_paced.lower(tiny.params(), tiny.CFG, s, jnp.int32(5), policy=policy, drafter=drafter, how=GREEDY, eos=())


def test_no_width_copies_a_cache():
    """Nor does what moves accepted rows into slots before a pass without a draft."""
    s, program = lowered(POLICIES["full"])
    assert not hlo.moved(tiny.compiled(program).as_text(), {hlo.size(s.layers[0].k_BKCH)})


@pytest.mark.parametrize("name", POLICIES)
def test_accepted_rows_move_into_slots_without_a_look_at_the_weights(name):
    """What is not read may be NaN."""
    policy, params, drafter = POLICIES[name], tiny.params(), token_recycling(tiny.TREE)
    s = tiny.go(tiny.start(tiny.read(policy), policy, drafter, new=48), policy, drafter, steps=5)
    assert s.accepted.count_B.any()
    wrong = jax.tree.map(lambda x: x * jnp.nan, params)
    right, same = (settle(p, tiny.CFG, jax.tree.map(jnp.copy, s), policy=policy).layers for p in (params, wrong))
    jax.tree.map(np.testing.assert_array_equal, right, same)
    live = [np.asarray(layers[0].live_B) for layers in (s.layers, right)]
    assert name != "full" or (live[1] - live[0] == np.asarray(s.accepted.count_B)).all()


class Numbers:
    """The controller on paper: a running mean a width, goodput, and tries further and further apart."""

    def __init__(self, drafter: Paced):
        self.d = drafter
        self.mean = [min(self.time(w) * 1.01, w, drafter.inner.depth + 1) for w in drafter.widths]
        self.wait = self.gap = drafter.tries

    def time(self, rows):
        for (a, ta), (b, tb) in zip(self.d.cost, self.d.cost[1:]):
            if rows <= b or (b, tb) == self.d.cost[-1]:
                return ta if rows < a else ta + (rows - a) * (tb - ta) / (b - a)

    def heard(self, j, paths, live):
        tried, last = self.wait == 0, len(self.d.widths) - 1
        for o, w in enumerate(self.d.widths[: j + 1]):
            found = np.mean([sum(node < w for node in path) for path, on in zip(paths, live) if on])
            self.mean[o] = found if tried and o == j else self.mean[o] + self.d.rate * (found - self.mean[o])
        self.mean = [max(m, self.mean[0]) for m in self.mean]
        goodput = [m / self.time(sum(live) * w) for m, w in zip(self.mean, self.d.widths)]
        best = int(np.argmax(goodput))
        if best < j:
            self.wait = self.gap = min(2 * self.gap, self.d.rarest)
        elif tried or best == last:
            self.wait = self.gap = self.d.tries
        else:
            self.wait -= 1
        return best + 1 if self.wait == 0 else best


@pytest.mark.parametrize("dear", [1.2, 4.0])
def test_the_pace_is_goodput(dear):
    rng, cost = np.random.default_rng(3), ((1, 1.0), (8, 1.0 + dear), (24, 9.0))
    drafter = paced(RECYCLING, (1, 4, 8), cost, rate=0.3, tries=2, rarest=8)
    heard = jax.jit(drafter.paced, static_argnums=1)
    pace, paper, seen, j = drafter.init(3, tiny.CFG.V), Numbers(drafter), set(), 2
    for step in range(60):
        live = rng.random(3) < 0.8
        live[0] = True
        count = rng.integers(1, 2 + (step // 20 % 2) * 3, 3)  # times in which drafts are right, and times in which they are not
        path = np.zeros((3, 8), np.int32)
        for b in range(3):
            nodes = np.sort(rng.choice(np.arange(1, drafter.widths[j]), min(count[b], drafter.widths[j]) - 1, replace=False))
            count[b], path[b, 1 : 1 + len(nodes)] = 1 + len(nodes), nodes
        pace = heard(pace, j, jnp.asarray(path[:, : drafter.widths[j]]), jnp.asarray(count), jnp.asarray(live))
        wanted = paper.heard(j, [path[b, : count[b]].tolist() for b in range(3)], live)
        np.testing.assert_allclose(pace.mean_O, paper.mean, atol=1e-4)
        assert (int(pace.choice), int(pace.wait), int(pace.gap)) == (wanted, paper.wait, paper.gap)
        j = wanted
        seen.add(j)
    assert len(seen) > 1


def test_a_text_that_turns_easy_gets_its_width_back():
    """Wrong drafts at first, then all that a pass carries are right: every width above the one in use must be tried to be found."""
    drafter = paced(prompt_lookup(length=15), (1, 4, 8, 16), ((1, 1.0), (16, 2.0)), tries=2, rarest=8)
    heard, pace, j, used = jax.jit(drafter.paced, static_argnums=1), drafter.init(1, tiny.CFG.V), 3, []
    for step in range(80):
        width = drafter.widths[j]
        pace = heard(pace, j, jnp.arange(width)[None], jnp.full(1, 1 if step < 30 else width), jnp.ones(1, bool))
        j = int(pace.choice)
        used.append(drafter.widths[j])
    assert set(used[20:30]) <= {1, 4} and used[20:30].count(1) >= 8 and set(used[-20:]) == {16}, used


def test_a_cut_tree_is_a_tree():
    draft = jax.jit(lambda: RECYCLING.propose(RECYCLING.init(2, 61), jnp.ones((2, 5), jnp.int32), jnp.full(2, 5)))()
    cut = first_nodes(draft, 4)
    assert cut.tokens_BW.shape == (2, 4) and (np.asarray(cut.parent_BW) < np.maximum(np.arange(4), 1)).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: paced(plain()),
        lambda: paced(paced(RECYCLING)),
        lambda: paced(draft_model(tiny.CFG)),
        lambda: paced(RECYCLING, widths=(4, 8)),
        lambda: paced(RECYCLING, widths=(1,)),
        lambda: paced(RECYCLING, cost=((1, 1.0),)),
        lambda: paced(RECYCLING, cost=((1, 1.0), (4, 0.0))),
        lambda: paced(RECYCLING, rate=0.0),
        lambda: paced(RECYCLING, tries=9, rarest=8),
    ],
)
def test_what_cannot_be_paced_is_refused(make):
    with pytest.raises(UserError) as error:
        make()
    assert "\n" not in str(error.value)


def test_it_cuts_no_wider_than_the_draft():
    assert paced(prompt_lookup(length=5)).widths == (1, 4, 6)
