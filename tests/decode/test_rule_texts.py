"""Rules of verification in whole texts: what drafters draw, the law of the text through the loop, and what does not go together."""

import functools
from collections import Counter
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from adversaries import Garbage, Replay
from oracles import drafts as oracle
from test_rules import U, laws
from test_sampling import CFG, PROMPT, V, conditionals

from tokeff.decode.draft import Draft, Drafter, Plain, last_token
from tokeff.decode.lookup import PromptLookup
from tokeff.decode.lossy import Rapid, Typical
from tokeff.decode.methods import rapid, spectr
from tokeff.decode.rule import COUPLED
from tokeff.decode.rules import ChainRejection, DeterministicTree, KSeq, Recursive
from tokeff.decode.sample import Sampling, draw, draw_draft, row_keys
from tokeff.errors import UserError
from tokeff.kv.methods import h2o
from tokeff.models.config import Precision
from tokeff.models.load import Model

pytestmark = [pytest.mark.core, pytest.mark.xdist_group("sampling")]


# -- draws of a drafter


def test_drafters_draw_from_the_law_they_tell():
    """Two copies at one place and the target's own draw there: each by its law, and apart from each other."""
    how, B = Sampling(1.3, top_k=3), 20_000
    logits, keys = jnp.broadcast_to(jnp.asarray([0.3, 1.2, -0.4, 0.9]), (B, 2, 4)), row_keys(5, jnp.arange(B))
    place = jnp.full((B, 2), 7)
    both = jax.jit(lambda *at: (*draw_draft(*at, how, copy=jnp.arange(2)), draw(*at, how)))
    token, logq, target = both(logits, place, keys)
    p = oracle.warped(np.asarray(logits[0, 0], np.float64), 1.3, 3)
    np.testing.assert_allclose(np.exp(logq[0, 0]), p, atol=1e-6)
    drawn = np.column_stack([token, target[:, :1]])
    seen = np.histogramdd(drawn, bins=[range(5)] * 3)[0]
    wanted = B * p[:, None, None] * p[:, None] * p
    kept = wanted > 0
    assert seen[~kept].sum() == 0
    assert ((seen - wanted)[kept] ** 2 / wanted[kept]).sum() < 54.1  # 26 degrees of freedom, p = 0.001


def test_coupled_drafts_are_right_as_often_as_stated():
    how, B, (p, q) = Sampling(1.0), 20_000, laws(3)
    keys, place = row_keys(6, jnp.arange(B)), jnp.full((B, 1), 9)
    target, drafter = (jnp.broadcast_to(jnp.log(jnp.asarray(law + 1e-30, jnp.float32)), (B, 1, U)) for law in (p, q))
    same = jax.jit(lambda p, q, *at: draw_draft(q, *at, how, coupled=True)[0] == draw(p, *at, how))
    right = float(same(target, drafter, place, keys).mean())
    wanted = sum(1 / np.maximum(p / p[x], q / q[x]).sum() for x in range(U))
    overlap = np.minimum(p, q).sum()
    assert overlap / (2 - overlap) <= wanted <= overlap and abs(right - wanted) < 4 * (wanted * (1 - wanted) / B) ** 0.5


def test_a_greedy_row_drafts_the_first_of_equals():
    logits = jnp.zeros((2, 1, 9)).at[:, 0, jnp.asarray([4, 7])].set(1.0)
    place, keys, how = jnp.zeros((2, 1), jnp.int32), row_keys(0, jnp.arange(2)), Sampling((0.0, 1.0))
    token, logq = jax.jit(lambda: draw_draft(logits, place, keys, how, copy=3))()
    assert int(token[0, 0]) == 4 and np.exp(logq[0, 0]).tolist() == np.eye(9)[4].tolist() and np.isfinite(logq[1]).all()


def test_judging_knows_row_and_place_alone():
    """Rows in another order give the same; another seed or place does not."""
    rng, B, parent = np.random.default_rng(0), 64, (0, 0, 1, 0, 3)
    tokens, logits, q = rng.integers(0, U, (B, 5)), rng.normal(size=(B, 5, U)), rng.normal(size=(B, 5, U))

    @jax.jit
    def judge(tokens, logits, q, keys, start):
        draft = Draft(tokens, jnp.broadcast_to(jnp.asarray(parent), (B, 5)), jnp.ones((B, 5), bool), jax.nn.log_softmax(q))
        place = jnp.broadcast_to(start + jnp.asarray([0, 1, 2, 1, 2]), (B, 5))
        return Recursive().judge(draft, logits, place, keys, Sampling(1.0), 2)

    given = [jnp.asarray(x, y) for x, y in ((tokens, jnp.int32), (logits, jnp.float32), (q, jnp.float32))]
    keys, order = row_keys(1, jnp.arange(B)), rng.permutation(B)
    first = judge(*given, keys, 7)
    for x, y in zip(first, judge(*(x[order] for x in given), keys[order], 7), strict=True):
        np.testing.assert_array_equal(np.asarray(x)[order], y)
    for other in (judge(*given, row_keys(2, jnp.arange(B)), 7), judge(*given, keys, 8)):
        assert 0 < float((first[1][:, 0] == other[1][:, 0]).mean()) < 0.9


# -- whole texts through the loop


@dataclass(frozen=True)
class Drawn(Drafter):
    """`copies` chains from the root, each drawn from a law that knows the last token alone."""

    copies: int = 1
    length: int = 3
    told: bool = True
    coupled: bool = False
    distinct: bool = False

    @property
    def nodes(self):
        return 1 + self.copies * self.length

    @property
    def depth(self):
        return self.length

    @property
    def drawn(self):
        return self.told

    def draft(self, s, target):
        table, k, L = jnp.asarray(np.random.default_rng(3).normal(size=(V, V)), jnp.float32), self.copies, self.length
        root = last_token(s.tokens_BS, s.count_B)
        token, found = jnp.repeat(root, k, axis=1), []
        for d in range(L):
            place = jnp.broadcast_to((s.count_B - s.gone_B)[:, None] + d, token.shape)
            token, logq = draw_draft(table[token], place, s.key_B, target.how, jnp.arange(k), self.coupled)
            found.append((token, logq))
        tokens, logq = (jnp.stack(x, axis=2).reshape(len(root), k * L, *x[0].shape[2:]) for x in zip(*found, strict=True))
        parent = jnp.asarray([0, *(0 if d == 0 else c * L + d for c in range(k) for d in range(L))], jnp.int32)
        tokens = jnp.concatenate([root, tokens], axis=1)
        logq = jnp.concatenate([logq[:, :1], logq], axis=1) if self.told else None
        return Draft(tokens, jnp.broadcast_to(parent, tokens.shape), jnp.ones(tokens.shape, bool), logq), s


ROWS, GREEDY_ROWS, HOT = 4096, 8, {"top_p": 0.95}
MIXED = Sampling((2.5,) * (ROWS - GREEDY_ROWS) + (0.0,) * GREEDY_ROWS, **HOT)
OTHER = replace(CFG, name="other", L=2, windows=())  # of a draft model that has laws of its own


@functools.cache
def prompt(policy=tiny.FULL):
    return tiny.read(policy, (PROMPT,) * ROWS, cfg=CFG)


@functools.cache
def model():
    """The model, and another one beside it that drafts where a drafter wants one."""
    return Model(CFG, tiny.params(CFG), None, Precision(), "law").attach(draft=tiny.params(OTHER))


def texts(drafter, n, eos=(), policy=tiny.FULL):
    m = model()
    s = tiny.start(prompt(policy), policy, drafter, cfg=CFG, new=n, how=MIXED, eos=eos, seed=11, m=m)
    s = drafter.drive(m.params, CFG, s, 1000, policy=policy.onward(), how=MIXED, eos=eos)
    return [tuple(text) for text in tiny.text(s)], int(s.passes_B.min()), int(s.passes_B.max())


def ended(text, eos):
    """A text up to its first end."""
    return text[: next((i + 1 for i, token in enumerate(text) if token in eos), len(text))]


def chi_square(seen, wanted) -> tuple[float, float]:
    """(statistic, its value at p = 0.001 by Wilson and Hilferty), rare texts taken together."""
    total, rare = sum(seen.values()), [text for text, p in wanted.items() if p * sum(seen.values()) < 5]
    cells = [(seen[text], p * total) for text, p in wanted.items() if text not in rare]
    cells += [(sum(seen[text] for text in rare), sum(wanted[text] for text in rare) * total)] if rare else []
    df = len(cells) - 1
    return sum((o - e) ** 2 / e for o, e in cells), df * (1 - 2 / (9 * df) + 3.09 * (2 / (9 * df)) ** 0.5) ** 3


THROUGH = {
    "rejection": (Drawn(rule=ChainRejection(), coupled=True), ()),
    "k-SEQ": (Drawn(2, 2, rule=KSeq()), (1,)),
    "recursive": (Drawn(2, 2, rule=Recursive()), ()),
    "deterministic": (Garbage(V, rule=DeterministicTree()), (1,)),
    "SpecTr": (spectr(OTHER, 2, 3), (1,)),
    "RAPID, eta=0": (rapid(OTHER, 2, 0.0), ()),
}


@pytest.mark.parametrize("name", tiny.sampled(THROUGH, set(THROUGH) - {"RAPID, eta=0"}))
def test_texts_have_the_law_of_plain_sampling(name):
    """With an end of sequence and the limit inside accepted spans, and greedy rows in the batch."""
    (drafter, eos), n = THROUGH[name], 3
    found, fewest, most = texts(drafter, n, eos)
    assert fewest < most, "some drafts must be right and some wrong"
    wanted = Counter()
    for text, p in oracle.law(conditionals(Sampling(2.5, **HOT), n), n).items():
        wanted[ended(text, eos)] += p
    seen = Counter(found[:-GREEDY_ROWS])
    assert set(seen) <= set(wanted)
    statistic, bound = chi_square(seen, wanted)
    assert statistic < bound
    (best,) = (text for text, p in oracle.law(conditionals(Sampling(), n), n).items() if p == 1)
    assert found[-GREEDY_ROWS:] == [ended(best, eos)] * GREEDY_ROWS
    other, _ = chi_square(seen, {text: p for text, p in zip(wanted, sorted(wanted.values()), strict=True)})
    assert other > bound, "the comparison must notice"


def test_cut_at_eviction_boundaries_the_law_is_that_of_plain_decoding():
    """What a boundary clips is drafted and judged again with the same noise."""
    policy, n = h2o(3, evict=2), 4
    one, two = (Counter(texts(Drawn(rule=rule), n, policy=policy)[0][:-GREEDY_ROWS]) for rule in (ChainRejection(), COUPLED))
    cells = [(one[text], two[text]) for text in one | two if one[text] + two[text] >= 10]
    assert len(cells) > 20
    assert sum((a - b) ** 2 / (a + b) for a, b in cells) < len(cells) + 3.1 * (2 * len(cells)) ** 0.5


# -- what does not go together


@pytest.mark.parametrize(
    ("rule", "drafter"),
    [(ChainRejection(), PromptLookup()), (Recursive(), Plain()), (KSeq(), Garbage(V)), (Rapid(), Replay(((0,),))),
     (DeterministicTree(), Drawn()), (ChainRejection(), Drawn(2)), (Rapid(), Drawn(2)), (KSeq(), Drawn(2, distinct=True))],
    ids=str,
)  # fmt: skip
def test_what_a_rule_cannot_judge_is_refused(rule, drafter):
    with pytest.raises(UserError) as error:
        rule.check(drafter)
    assert "\n" not in str(error.value) and "use " in str(error.value)


def test_what_a_rule_can_judge_is_not():
    for rule, drafter in [(ChainRejection(), Drawn()), (Recursive(), Drawn(2, distinct=True)), (DeterministicTree(), PromptLookup()),
                          (Typical(), Drawn(2)), (Typical(), Plain()), (KSeq(), Drawn(4, 1)), (Rapid(), Drawn())]:  # fmt: skip
        rule.check(drafter)


@pytest.mark.parametrize("make", [lambda: Rapid(-1.0), lambda: Rapid(float("nan")), lambda: Typical(0.0), lambda: Typical(0.3, 1.5)])
def test_settings_that_cannot_work_are_refused(make):
    with pytest.raises(UserError):
        make()
