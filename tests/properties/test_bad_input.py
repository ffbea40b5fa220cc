"""Bad input to every listed method that keeps, reads or cuts prompt rows: refused in one line that names the fix, or a defined result.

Prompts too short for a window keep the shapes of the usual batch, so most of these run with programs that are compiled already.
"""

import inspect
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
from runs import listed, method

from tokeff.errors import UserError
from tokeff.generation import Setup, check_chunk
from tokeff.kv import methods as kv
from tokeff.kv.blend import choose
from tokeff.kv.classes import ByClass
from tokeff.kv.compress import ByImportance
from tokeff.kv.keep import Keep
from tokeff.kv.policy import Policy, Prefilled
from tokeff.kv.prefill import Prompt
from tokeff.kv.pyramid import Pyramid
from tokeff.kv.score_keys import KeyNorm
from tokeff.models.flow import EMPTY, Flow, Here
from tokeff.reduce.prune import LastRowTopK
from tokeff.sparse.pattern import Rows
from tokeff.sparse.read import Read

pytestmark = pytest.mark.core
KINDS = ("kv", "cut", "prefill")
BUDGETS = [0, 0.0, -3, -0.5, 1.5, 65, float("nan"), "0.5", True, None, np.float32(0.5), 16.0]
WORST = 20  # the row whose numbers are NaN


def refused(setup: Setup, lengths=tiny.LENGTHS) -> str | None:
    """The one line, or None."""
    reason = runs.refusal(setup, lengths=lengths)
    assert reason is None or ("\n" not in reason and 20 < len(reason) < 250), reason
    return reason


def has(m, *names: str) -> list[str]:
    return [name for name in names if name in inspect.signature(m.make).parameters]


def setup_of(name: str, kind: str = "small", **changed) -> Setup:
    m = method(name)
    given = {"small": tiny.settings, "identity": tiny.identity, "default": lambda m: {}}[kind](m)
    return Setup(**{m.part: m.make(**given | changed)})


def runs_once(policy: Policy) -> None:
    runs.check_policy(policy, runs.prompt() if set(policy.needs()) <= set(runs.evidence()) else tiny.read(policy))


# -- budgets


@pytest.mark.parametrize("budget", BUDGETS, ids=repr)
@pytest.mark.parametrize("name", listed(*KINDS, where=lambda m: has(m, "budget")))
def test_budgets_that_are_none(name, budget):
    assert "budget" in (refused(setup_of(name, budget=budget), (64,)) or "")


@pytest.mark.parametrize("name", listed("kv", where=lambda m: has(m, "budget")))
def test_budgets_that_round_to_no_row(name):
    """A share of less than a row is one row; where that leaves no room for what the method needs, it is refused."""
    setup = setup_of(name, budget=0.001)
    if reason := refused(setup):
        assert "budget" in reason or "keep" in reason
        return
    runs.check_token(setup.kv, runs.prompt())


@pytest.mark.parametrize("name", listed("cut"))
def test_a_pass_that_lets_one_row_through(name):
    """The last row, in every sequence."""
    cut = setup_of(name, budget=0.001).cut
    assert refused(Setup(cut=cut)) is None
    order = jnp.asarray([[*range(n), *[EMPTY] * (64 - n)] for n in tiny.LENGTHS], jnp.int32)
    q, k = (jax.random.normal(jax.random.key(n), (2, 64, n, tiny.CFG.H)) for n in (tiny.CFG.N, tiny.CFG.K))
    flow = Flow(jnp.zeros((2, 64, 1)), order, order, order)
    index = jax.jit(lambda q, k: cut.choose(q, k, flow, Here(1, tiny.CFG)))(q, k)
    assert [[i for i in row if i != EMPTY] for row in index.tolist()] == [[n - 1] for n in tiny.LENGTHS]


NO_ROW = {
    "a layer of a pyramid": Pyramid(1, KeyNorm()),
    "a layer of no importance": ByImportance(2, KeyNorm(), importance=(0.0, 0.0, 1.0)),
    "a head whose scores are lowest": kv.adakv(1, window=1, floor=0.0, page=4),
    "a class without heads": ByClass(kv.snapkv(0.5, 6), kv.recent_rows(0.5), ((),)),
    "all classes but one": ByClass(kv.snapkv(0.5, 6), kv.recent_rows(0.5), ((0, 1),)),
}


@pytest.mark.parametrize("what", NO_ROW)
def test_heads_without_a_row_of_the_prompt(what):
    """They read what is generated, itself included."""
    policy = NO_ROW[what]
    assert refused(Setup(kv=policy)) is None
    prompt = tiny.read(tiny.FULL, evidence=policy.needs())
    packed = tiny.packed(policy, prompt)
    for t, (logits, layers) in enumerate(tiny.forced(policy, packed, prompt, runs.GIVEN[:, :2])):
        assert np.isfinite(logits).all()
        for layer in layers:
            for heads, n in zip(tiny.kept(policy, layer), tiny.LENGTHS, strict=True):
                assert all(orders[-1] == n + t for orders in heads)


# -- short prompts and long windows


@cache
def short(n: int) -> Prompt:
    """The usual batch with a prompt of n tokens in the place of the second one, which keeps its shapes."""
    return tiny.read(tiny.FULL, (tiny.prompts()[0], tiny.prompts()[1][:n]), evidence=runs.evidence())


@pytest.mark.parametrize("n", [1, 3, 7])
@pytest.mark.parametrize("kind", tiny.sampled(["small", "identity"], ("small",)))
@pytest.mark.parametrize("name", listed("kv"))
def test_prompts_shorter_than_sinks_and_window(name, kind, n):
    """Refused with what to change, or packed and decoded: finite numbers, no row twice, the newest row read."""
    setup = setup_of(name, kind)
    if reason := refused(setup, (64, n)):
        assert any(word in reason for word in ("raise", "lower", "longer", "use one", "give", "set"))
        return
    prompt = short(n)
    packed = tiny.packed(setup.kv, prompt)
    ((logits, layers),) = tiny.forced(setup.kv, packed, prompt, runs.GIVEN[:, :1])
    assert np.isfinite(logits).all()
    runs.check_rows(setup.kv, layers, (64, n))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("name", listed("cut", "prefill"))
def test_short_prompts_go_through(name, n):
    parts = runs.part(name)
    assert refused(Setup(**parts), (64, n)) is None
    rows = (tiny.prompts()[0], tiny.prompts()[1][:n])
    prompt = tiny.read(tiny.FULL, rows, evidence=runs.asked(name), cut=parts.get("cut"), pattern=parts.get("prefill"))
    assert np.isfinite(prompt.logits_BV).all() and int(prompt.layers[-1].here_B[1]) >= 1


LONG = {"window": 100, "recent": 100, "sinks": 100, "lag": 100, "residual": 96, "group": 96, "vertical": 100, "top": 100, "start": 128}


@pytest.mark.parametrize("name", listed(*KINDS, where=lambda m: has(m, *LONG)))
def test_windows_longer_than_the_prompt(name):
    """Each such setting by itself: refused with the fix, or it works as if the prompt were all window."""
    m = method(name)
    for setting in has(m, *LONG):
        if isinstance(inspect.signature(m.make).parameters[setting].default, float):
            continue
        setup = setup_of(name, **{setting: LONG[setting]})
        if refused(setup) is None and m.part == "kv":
            runs_once(setup.kv)
        elif refused(setup) is None:
            assert np.isfinite(tiny.read(tiny.FULL, cut=setup.cut, pattern=setup.prefill).logits_BV).all()


# -- pages that divide nothing


@pytest.mark.parametrize("name", listed(*KINDS, where=lambda m: has(m, "page", "group", "block", "chunk", "cell")))
def test_pages_that_do_not_divide_the_cache(name):
    """7 rows a page, of 64 and 51: the last page is shorter, or the setting is refused with one that divides."""
    m = method(name)
    for setting in has(m, "page", "group", "block", "chunk", "cell"):
        setup = setup_of(name, **{setting: 7})
        if reason := refused(setup):
            assert setting in reason or "divide" in reason or "page" in reason or "cell" in reason or "budget" in reason
        elif m.part == "kv":
            runs_once(setup.kv)
        else:
            assert np.isfinite(tiny.read(tiny.FULL, pattern=setup.prefill).logits_BV).all()


# -- pieces of a prompt


@pytest.mark.parametrize("piece", [0, -1, 1.5, "16"])
@pytest.mark.parametrize("name", listed("kv"))
def test_pieces_of_no_token(name, piece):
    setup = Setup(**runs.part(name), bounded=piece)
    assert f"bounded={piece}" in (refused(setup) or "")


@pytest.mark.parametrize("name", listed("cut", "prefill"))
def test_bounded_reading_with_what_needs_the_whole_prompt(name):
    assert "bounded" in (refused(Setup(**runs.part(name), bounded=16)) or "")


@pytest.mark.parametrize(
    ("chunk", "bounded", "word"), [(0, None, "chunk=0"), (-4, None, "chunk"), (2.5, None, "chunk"), (16, 16, "leave out chunk")]
)
def test_chunks_of_nothing_and_chunks_of_pieces(chunk, bounded, word):
    with pytest.raises(UserError, match=word) as error:
        check_chunk(chunk, bounded)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", listed("cut", "prefill"))
def test_chunks_are_refused_before_anything_is_computed(name):
    programs = runs.programs()
    with pytest.raises(UserError) as error:
        tiny.read(tiny.FULL, chunk=20, cut=runs.part(name).get("cut"), pattern=runs.part(name).get("prefill"))
    assert "chunk" in str(error.value) and runs.programs() == programs


# -- NaN


def spoiled(rows: Prefilled) -> Prefilled:
    """NaN in the key of one row of the first head, and in all evidence of that row."""
    evidence = {
        kind: value.at[:, 0, WORST].set(jnp.nan) if kind.per_row and value.dtype == jnp.float32 else value
        for kind, value in rows.evidence_BKS.items()
    }
    return rows.replace(k_BKSH=rows.k_BKSH.at[:, 0, WORST].set(jnp.nan), evidence_BKS=evidence)


@pytest.mark.parametrize("name", listed("kv"))
def test_a_prompt_with_nan_is_packed_as_large_as_any(name):
    """As many rows as without it, none twice. A rule that ranks by keys or attention drops the row that has it."""
    policy, p = runs.part(name)["kv"], runs.prompt()
    clean, packed = (tiny.packed(policy, prompt) for prompt in (p, p.replace(layers=tuple(map(spoiled, p.layers)))))
    rows = [[tiny.kept(policy, layer) for layer in layers] for layers in (clean, packed)]

    def count(layers) -> list[int]:
        return [sum(len(orders) for layer in layers for orders in layer[b]) for b in range(2)]

    assert count(rows[0]) == count(rows[1])
    assert all(len(set(orders)) == len(orders) for layer in rows[1] for heads in layer for orders in heads)
    ((_, layers),) = tiny.forced(policy, packed, p, runs.GIVEN[:, :1])
    runs.check_rows(policy, layers, tiny.LENGTHS)


def rule(policy) -> Keep | None:
    found = getattr(policy, "rule", policy)
    return found if isinstance(found, Keep) else None


@pytest.mark.parametrize("name", listed("kv", where=lambda m: rule(runs.part(m.name)["kv"])))
def test_scores_that_are_no_numbers_are_the_lowest(name):
    """In any scorer, of one row or of all."""
    keep, p = rule(runs.part(name)["kv"]), runs.prompt()
    assert keep is not None
    here, rows = Here(1, tiny.CFG), p.layers[1]
    score = jax.jit(lambda rows: keep.score.first(rows, here))(rows)

    class Spoiled(type(keep.score)):
        def first(self, rows, here):
            return jnp.where(jnp.isin(rows.order_BKS, self.rows), jnp.nan, score)

    for bad, gone in (([WORST], {WORST}), (list(range(64)), set())):
        spoiler = object.__new__(Spoiled)
        spoiler.__dict__.update(vars(keep.score))
        object.__setattr__(spoiler, "rows", jnp.asarray(bad))
        found, forced, keep_B = type(keep)(**{**vars(keep), "score": spoiler}).guarded(rows, here)
        assert not jnp.isnan(found).any()
        there = rows.order_BKS != EMPTY
        assert bool(((found == jnp.finfo(jnp.float32).min) == (jnp.isin(rows.order_BKS, jnp.asarray(bad)) & there)).all())
        assert gone <= {WORST} and int(keep_B[0]) >= 1


@pytest.mark.parametrize("name", listed("kv", where=lambda m: isinstance(runs.part(m.name)["kv"], Read)))
def test_a_row_with_nan_is_never_chosen(name):
    """What a query reads beside the rows that are read in any case is finite."""
    policy, p = runs.part(name)["kv"], runs.prompt()
    layer = next(i for i in range(tiny.CFG.L) if policy.kind(i) == "select")
    out, _, across = runs.one_token([spoiled(p.layers[layer])], p.next_B, *runs.asks(), policy=policy, at=(layer,))
    if policy.own and policy.reuse is None:
        assert np.isfinite(out).all()
    if across is not None:
        assert not (np.asarray(across.order_BKTM)[:, 0] == WORST).any()


def test_a_pass_drops_rows_whose_scores_are_no_numbers():
    """In the order of scores that the other rows have without it; its neighbours are averaged without it."""
    order = jnp.arange(64)[None]
    q, k = (jax.random.normal(jax.random.key(n), (1, 64, n, tiny.CFG.H)) for n in (tiny.CFG.N, tiny.CFG.K))
    flow, k = Flow(jnp.zeros((1, 64, 1)), order, order, order), k.at[:, WORST].set(jnp.nan)
    for budget in (8, 63):
        index = jax.jit(lambda q, k, cut: cut.choose(q, k, flow, Here(1, tiny.CFG)), static_argnames="cut")(q, k, LastRowTopK(1, budget))
        index = index[0].tolist()
        assert len(set(index)) == budget and WORST not in index and 63 in index


@pytest.mark.parametrize("name", listed("prefill", where=lambda m: not runs.part(m.name)["prefill"].own_pass))
def test_patterns_read_blocks_that_exist_beside_nan(name):
    """NaN in one key: as many blocks of the others as without it can be chosen, each once, none ahead of its queries."""
    pattern, rng = runs.part(name)["prefill"], np.random.default_rng(4)
    order = jnp.asarray([[*range(n), *[EMPTY] * (64 - n)] for n in tiny.LENGTHS], jnp.int32)
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 64, 4, 8), (2, 2, 64, 8), (2, 2, 64, 8)))
    ask, choose = Flow(jnp.zeros((2, 64, 1)), order, order, order), jax.jit(lambda rows: pattern.choose(rows, Here(1, tiny.CFG)))
    for spoil in (k.at[:, 0, WORST].set(jnp.nan), jnp.full_like(k, jnp.nan)):
        reading = choose(Rows(q, spoil, v, order, ask, jnp.asarray(tiny.LENGTHS), 0))
        block = np.asarray(reading.block_BKQM)
        for b, h, t in np.ndindex(block.shape[:3]):
            found = block[b, h, t][block[b, h, t] != EMPTY].tolist()
            assert len(set(found)) == len(found) and set(found) <= set(range(t + 1)) and t in found
        if reading.row_BKM is not None:
            rows = np.asarray(reading.row_BKM)
            assert ((rows >= EMPTY) & (rows < 64)).all()


def test_a_loaded_row_that_is_no_number_is_computed_anew():
    order = jnp.arange(16)[None]
    d = jnp.asarray([[*range(16)]], jnp.float32).at[0, 3].set(jnp.nan)
    sure = order >= 15
    assert choose(d, order, sure, 0.1, 16)[0].tolist()[:3] == [3, 14, 15]
