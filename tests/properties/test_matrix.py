"""docs/compatibility.md is what the parts say, and what it calls possible runs: finite numbers, no row twice, the newest row read, within
the budget.

Other tests run some pairs for every method: a pass and drafts in test_composition.py, chunks in test_every_method.py, host memory in
tests/kv/test_host.py. The rest runs here: behind a pattern, a blend and bounded reading with the programs that decode an ordinary prompt,
with one partner of a kind every day and with the others in `make proofs`; as a part of another policy in one layer.
"""

import sys
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
from runs import listed, method

from tokeff.generation import Setup
from tokeff.kv.cache import Room, Rows
from tokeff.kv.evidence import Evidence
from tokeff.kv.keep import Keep
from tokeff.kv.policy import pad_slots
from tokeff.kv.prefill import Prompt
from tokeff.kv.score import Recency
from tokeff.models.flow import EMPTY, Here
from tokeff.sparse.read import Read

pytestmark = pytest.mark.core
PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"


@cache
def matrix():
    """docs/make_matrix.py."""
    sys.path.append(str(PAGE.parent))
    import make_matrix

    return make_matrix


@cache
def cell(name: str, column: str):
    found = matrix()
    return found.cell(method(name), next(c for c in (*found.POLICIES, *found.OTHERS) if c.name == column))


def column(name: str):
    return next(c for c in matrix().POLICIES if c.name == name)


def joined(name: str, kind: str) -> list[Setup]:
    """The combinations of a method with this kind of partner, at the settings that the page says; none where it says no."""
    found = cell(name, kind)
    return [] if found.change is None else list(column(kind).join(method(name), found.change, matrix().TINY))


def test_the_page_is_what_the_parts_say():
    assert PAGE.read_text(encoding="utf-8") == matrix().text(), "run: python docs/make_matrix.py"


@pytest.mark.parametrize("name", listed())
def test_reasons_are_one_line(name):
    m = method(name)
    reasons = [matrix().cell(m, kind).reason for kind in (matrix().POLICIES if m.part == "kv" else matrix().OTHERS)]
    assert all("\n" not in reason and len(reason) < 250 for reason in reasons if reason is not None)


# -- a prompt that came into being in another way


DAILY = {"pattern": "AShape", "blend": "CacheBlend", "pass": runs.UNDER_ALL}  # the partner that every policy has every day


@cache
def made(kind: str, partner: str | None = None) -> Prompt:
    """A prompt of this kind of prefill, whose last 6 rows read everything, with what the policies that it goes with want to know."""
    pattern = runs.part(partner or DAILY[kind])["prefill"]
    return tiny.read(tiny.FULL, evidence=wanted(lambda name: cell(name, kind).change is not None), pattern=replace(pattern, dense=6))


def others(kind: str) -> list[str]:
    """The listed partners of a kind that are not the daily one."""
    found = {"pattern": matrix().PATTERNS, "blend": matrix().BLENDS, "pass": matrix().PASSES}[kind]
    return [m.name for m in found if m.name != DAILY[kind]]


def wanted(by) -> tuple[Evidence, ...]:
    """What the listed policies want to know for which this holds."""
    names = [m.name for m in runs.METHODS if m.part == "kv" and by(m.name)]
    return tuple(dict.fromkeys(kind for name in names for kind in runs.part(name)["kv"].needs()))


@pytest.mark.parametrize("kind", ["pattern", "blend", "bounded"])
@pytest.mark.parametrize("name", listed("kv"))
def test_a_prompt_read_in_another_way_decodes(name, kind):
    if not joined(name, kind):
        assert cell(name, kind).reason
        return
    policy = joined(name, kind)[0].kv
    prompt = runs.bounded(policy) if kind == "bounded" else made(kind)
    packed = tiny.packed(policy, prompt)
    ((logits, layers),) = tiny.forced(policy, packed, prompt, runs.GIVEN[:, :1])
    assert np.isfinite(logits).all()
    runs.check_rows(policy, layers, tiny.LENGTHS)


@pytest.mark.proof
@pytest.mark.parametrize("name", listed("kv"))
@pytest.mark.parametrize(("kind", "partner"), [(kind, partner) for kind in ("pattern", "blend") for partner in others(kind)])
def test_behind_every_other_prefill(name, kind, partner):
    """One token behind the prompt that it read."""
    found = joined(name, kind)
    if found:
        return runs.check_policy(found[0].kv, made(kind, partner), where(found[0].kv))
    assert cell(name, kind).reason


@pytest.mark.proof
@pytest.mark.parametrize("name", listed("kv"))
@pytest.mark.parametrize("partner", others("pass"))
def test_over_every_other_pass(name, partner):
    """One token over the rows that it let through."""
    found = dict(zip([m.name for m in matrix().PASSES], joined(name, "pass"), strict=True))
    runs.check_policy(found[partner].kv, passed(found[partner].cut), where(found[partner].kv))


@cache
def passed(cut) -> Prompt:
    return tiny.read(tiny.FULL, evidence=wanted(lambda name: cell(name, "pass").change is not None), cut=cut)


def where(policy) -> tuple[int, ...]:
    """The last layer, and the one that chooses for it."""
    return (2,) if getattr(policy, "select", None) is None else (1, 2)


# -- one layer: parts of other policies


POLICIES = [m.name for m in runs.METHODS if m.part == "kv"]


@pytest.mark.parametrize(
    "names", [pytest.param(POLICIES[i : i + 2], id="+".join(POLICIES[i : i + 2])) for i in range(0, len(POLICIES), 2)]
)
def test_heads_of_a_layer_under_two_policies(names):
    """Each policy beside the next of the list."""
    found = [setup.kv for name in names for setup in joined(name, "heads")]
    assert all(cell(name, "heads").reason for name in names if not joined(name, "heads"))
    if found:
        runs.check_token(replace(found[0], rest=found[-1].some), runs.prompt())


@pytest.mark.parametrize("name", listed("kv", where=lambda m: isinstance(runs.part(m.name)["kv"], Read)))
def test_selecting_within_a_rule(name):
    if not joined(name, "within"):
        assert cell(name, "within").reason
        return
    policy = joined(name, "within")[0].kv
    runs.check_token(policy, runs.prompt(), (1,) if policy.select is None else (1, 2))


@dataclass(frozen=True)
class Left(Evidence):
    """The name under which a layer carries what a rule left of it."""

    squeezed: bool = False


@dataclass(frozen=True)
class Given(Keep):
    """A rule that hands on what another one left. What takes the rows of a rule asks it for nothing else (`check_rule`), so one program
    serves all rules."""

    def pack_layer(self, rows, room, here):
        return rows.evidence_BKS[Left()]

    def squeeze(self, rows, here):
        return rows.evidence_BKS[Left(squeezed=True)]


@partial(jax.jit, static_argnames=("rule", "here"))
def left_by(rows, *, rule, here):
    """What a rule leaves of a layer, as a store and as rows, with free slots behind it up to as many as there were."""
    C = rows.order_BKS.shape[2]
    kept, few = rule.pack_layer(rows, Room(0), here), rule.squeeze(rows, here)
    kept = Rows(pad_slots(kept.k_BKCH, C, 2), pad_slots(kept.v_BKCH, C, 2), pad_slots(kept.order_BKC, C, 2, EMPTY), kept.live_B)
    order = jnp.broadcast_to(few.order_BKS, few.k_BKSH.shape[:3])
    few = few.replace(
        k_BKSH=pad_slots(few.k_BKSH, C, 2), v_BKSH=pad_slots(few.v_BKSH, C, 2), order_BKS=pad_slots(order, C, 2, EMPTY), evidence_BKS={}
    )
    return kept, few


def rule_of(policy):
    return policy.within if hasattr(policy, "within") else policy.rule


@pytest.mark.parametrize("name", listed("kv"))
def test_the_rows_of_a_rule_in_other_hands(name):
    """In code, with fewer channels, selected among, shared."""
    setups = [setup.kv for kind in ("codes", "select within", "shared") for setup in joined(name, kind)]
    if not setups:
        assert all(cell(name, kind).reason for kind in ("codes", "select within", "shared"))
        return
    prompt, here = runs.prompt(), Here(1, tiny.CFG)
    kept, squeezed = left_by(prompt.layers[1], rule=rule_of(setups[0]), here=here)
    for policy in setups:
        inside = "within" if hasattr(policy, "within") else "rule"
        taking = replace(policy, **{inside: Given(1.0, Recency())})
        wanted = {kind: prompt.layers[1].evidence_BKS[kind] for kind in taking.needs()}
        rows = prompt.layers[1].replace(evidence_BKS={**wanted, Left(): kept, Left(True): squeezed})
        runs.check_token(taking, prompt, rows=rows)
        there = policy.kept(runs.one_token([rows], prompt.next_B, *runs.asks(), policy=taking, at=(1,))[1])
        new = np.asarray(prompt.next_B)[:, None, None]
        for mine, theirs in zip(np.asarray(there), np.asarray(kept.order_BKC), strict=True):
            for a, b in zip(mine, theirs, strict=True):
                assert {int(o) for o in a if o >= 0} - set(new.ravel().tolist()) <= {int(o) for o in b if o >= 0}


# -- passes, prefills and drafters among each other

DRAFTERS = ("PromptLookup", "TokenRecycling")  # a chain and a tree; test_every_method.py has all of them behind an ordinary prompt


@pytest.mark.parametrize("name", listed("kv"))
def test_a_pass_over_a_longer_prompt(name):
    """Where half of the tiny prompt is too short: one layer above a pass that lets nearly all of it through."""
    setup = joined(name, "pass")[-1]
    if cell(name, "pass").change.share is None:
        assert runs.refusal(Setup(kv=runs.part(name)["kv"], cut=setup.cut)) is None, "test_composition.py runs it"
        return
    runs.check_token(setup.kv, longer_pass(setup.cut), at=(2,))


@cache
def longer_pass(cut) -> Prompt:
    """With what the methods want to know that need it."""
    return tiny.read(tiny.FULL, evidence=wanted(lambda name: cell(name, "pass").change.share is not None), cut=cut)


@pytest.mark.parametrize("name", tiny.sampled(listed("kv"), runs.attending()))
def test_a_pass_that_lets_heads_go(name):
    """The layer above it, in the heads that it left."""
    found = joined(name, "pass of heads")
    if not found:
        assert cell(name, "pass of heads").reason
        return
    runs.check_token(found[-1].kv, narrow_pass(found[-1].cut), at=(2,))


@cache
def narrow_pass(cut) -> Prompt:
    return tiny.read(tiny.FULL, evidence=wanted(lambda name: cell(name, "pass of heads").change is not None), cut=cut)


# A pattern over the shorter prompt of a pass that begins anew; and one pattern below and above passes that choose half-way up.
@pytest.mark.parametrize(
    ("cut", "pattern"),
    [pytest.param("Truncated", m.name, marks=pytest.mark.xdist_group(m.name)) for m in runs.METHODS if m.part == "prefill"]
    + [pytest.param(cut, "AShape", marks=pytest.mark.xdist_group("AShape")) for cut in ("GemFilter", "PromptDistill")],
)
def test_a_pass_over_a_pattern(cut, pattern):
    parts = runs.part(cut) | runs.part(pattern)
    if runs.refusal(Setup(**parts)):
        assert parts["prefill"].own_pass
        return
    prompt = tiny.read(tiny.FULL, cut=parts["cut"], pattern=parts["prefill"])
    rows = int(prompt.layers[-1].here_B[0])
    assert np.isfinite(prompt.logits_BV).all() and rows == parts["cut"].rows(tiny.LENGTHS[0])


@pytest.mark.parametrize("name", listed("prefill"))
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_drafts_behind_a_prefill(name, drafter):
    """The prompt came into being in another way; drafts give the text that plain decoding gives behind it."""
    drafted = runs.decoded(decode=drafter, prefill=name)
    assert tiny.text(drafted) == tiny.text(runs.decoded(prefill=name))


@pytest.mark.xdist_group("GemFilter")
def test_drafts_behind_a_truncated_prompt():
    assert tiny.text(runs.decoded(cut="Truncated", decode="TokenRecycling")) == tiny.text(runs.decoded(cut="Truncated"))


@pytest.mark.xdist_group("Full")
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_drafts_behind_chunks_and_bounded_reading(drafter):
    how = runs.part(drafter)["decode"]
    assert tiny.text(runs.decoded(decode=drafter, form="chunked")) == tiny.text(runs.decoded())
    assert tiny.text(tiny.go(tiny.start(runs.bounded(tiny.FULL), tiny.FULL, how), tiny.FULL, how)) == tiny.text(runs.decoded())
