"""What must hold for every listed method: identity, budget, protection, batch = single, chunked = one-shot, activity, one compile."""

import inspect
import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import runs
import tiny
from runs import listed, method, part, steps

from tokeff.context import Compressed, from_json, to_json
from tokeff.errors import UserError
from tokeff.evals.comparison import Line, budget_of
from tokeff.evals.cost import dense_bytes
from tokeff.generation import Setup
from tokeff.kv.budget import most_rows
from tokeff.kv.classes import ByClass
from tokeff.kv.extend import pack
from tokeff.kv.policy import tree_bytes
from tokeff.kv.shadow import ShadowKV
from tokeff.models.flow import Here
from tokeff.models.load import fingerprint

pytestmark = pytest.mark.core
ATOL = 5e-4  # two float32 passes of other shapes, logits up to 12


def budgeted(m) -> bool:
    """Whether it has a budget, of all heads or of some."""
    return "budget" in tiny.settings(m)


def whole_heads(policy, layer: int) -> tuple[int, ...]:
    """The kv heads of a layer that keep everything, whatever the budget of the others."""
    return policy.of(layer) if isinstance(policy, ByClass) else ()


def rows_kept(name: str):
    """(layer, sequence, head, orders kept after the prompt and after every given token) under one method."""
    history = steps(name).kept
    for i in range(tiny.CFG.L):
        for b in range(len(tiny.LENGTHS)):
            for h in range(tiny.CFG.K):
                yield i, b, h, [step[i][b][h] for step in history]


@pytest.mark.parametrize("name", listed("kv", "cut", "prefill"))
def test_identity_settings_equal_dense(name):
    assert method(name).identity is not None, "name the settings at which this method does nothing"
    np.testing.assert_allclose(steps(name, "identity").logits, steps("Full").logits, atol=1e-4)


@pytest.mark.parametrize("name", listed())
def test_lossy_says_so_and_is_so(name):
    """Lossless methods give the dense text; lossy ones, at a small budget, give another: a listing that claims too much fails here."""
    same = tiny.text(runs.decoded(**runs.under(name))) == tiny.text(runs.decoded())
    assert same == method(name).lossless


@pytest.mark.parametrize("name", listed("kv", where=lambda m: m.converges))
def test_finer_settings_come_closer_to_dense(name):
    """What approximates every row has no exact setting; its error falls along those that the listing names, by half or more in all."""
    p, errors = runs.prompt(), []
    for setting in method(name).converges:
        policy = method(name).make(**(tiny.settings(method(name)) | setting))
        layers = tiny.packed(policy, p)
        logits = np.stack([out for out, _ in tiny.forced(policy, layers, p, runs.GIVEN[:, :2])])
        errors.append(np.sqrt(np.square(logits - steps("Full").logits[:2]).mean()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 2, errors


@pytest.mark.parametrize("name", listed("kv", "cut", where=lambda m: budgeted(m) or m.converges))
def test_active(name):
    """A budget below 1 that holds and reads 99% of the rows did nothing."""
    policy, packed = runs.holding(name), steps(name).packed
    full = steps("Full").packed
    held = tree_bytes(packed) / tree_bytes(full)
    read = sum(policy.bytes_read(layer, Here(i, tiny.CFG)) for i, layer in enumerate(packed)) / tree_bytes(full)
    assert min(held, read) < 0.99, f"held {held:.2f}, read {read:.2f} of dense"
    assert {"held": held, "read": read}[method(name).budgeted_by or "held"] < 0.99
    if budgeted(method(name)):  # what a comparison goes by, which refuses rows that do nothing
        assert budget_of(Line(name, **part(name))) == pytest.approx(tiny.settings(method(name))["budget"])


@pytest.mark.parametrize("name", listed("kv", "cut", where=lambda m: budgeted(m) and m.budgeted_by != "read"))
def test_rows_and_bytes_stay_within_budget(name):
    """Prompt rows kept never exceed the share, summed over what the budget is a mean of: the heads of a layer that it is for, or of the
    model. An evicting policy holds the total to it throughout."""
    policy = runs.holding(name)
    given = runs.prompt_of(name, "small").next_B.tolist()
    evicts, whole = policy.vacancy(steps(name).packed[0]) is not None, policy.span == "model"
    totals = {}
    for i, b, h, history in rows_kept(name):
        assert all(len(set(orders)) == len(orders) for orders in history), "a row is kept twice"
        if h in whole_heads(policy, i):
            continue
        for t, orders in enumerate(history):
            counted = orders if evicts else [o for o in orders if o < given[b]]
            at = (t, tiny.CFG.L - 1 if whole else i, b)
            totals[at] = totals.get(at, 0) + len(counted)
    above = -1 if method(name).part == "kv" or part(name)["cut"].restart else part(name)["cut"].layers(tiny.CFG)[-1]
    budget = tiny.settings(method(name))["budget"]
    for (t, i, b), rows in totals.items():
        if i > above:  # layers up to a pass hold the whole prompt
            heads = (tiny.CFG.K - len(whole_heads(policy, i))) * (tiny.CFG.L if whole else 1)
            assert rows <= heads * most_rows(budget, tiny.LENGTHS[b]), f"step {t}, layer {i}, sequence {b}"


@pytest.mark.parametrize("name", listed("kv", where=lambda m: budgeted(m) and m.budgeted_by != "read"))
def test_bytes_held_are_the_budget_and_what_is_stated(name):
    """Keys and values of the budget (of all rows in heads that keep them), of the rows to come, and of at most a page a head and the rest
    of a tile of 8 rows; then 4-byte orders, statistics and tables."""
    policy, packed = part(name)["kv"], steps(name).packed
    share = most_rows(tiny.settings(method(name))["budget"], tiny.LENGTHS[0])
    rows = share + (tiny.NEW if policy.vacancy(packed[0]) is None else 0) + getattr(policy, "page", 0) + 7
    all_rows, heads = tiny.LENGTHS[0] + tiny.NEW + 7, tiny.CFG.L * tiny.CFG.K
    kept_whole = sum(len(whole_heads(policy, i)) for i in range(tiny.CFG.L))
    slots = kept_whole * all_rows + (heads - kept_whole) * rows
    stated = dense_bytes(tiny.CFG, slots, "float32") * len(tiny.LENGTHS) // heads
    kv = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(packed) if x.shape[-1] == tiny.CFG.H and x.ndim == 4)
    assert kv <= stated
    small = 4 * 3 * (slots + 8 * heads) * len(tiny.LENGTHS)
    assert tree_bytes(packed) <= stated + small


def keeps(m):
    """The part of a policy that promises sinks and recent rows, if it has one."""
    policy = part(m.name).get("kv")
    return next((p for p in (policy, getattr(policy, "rule", None)) if hasattr(p, "recent_rows")), None)


@pytest.mark.parametrize("name", listed("kv", where=keeps))
def test_protected_rows_survive(name):
    """Sinks and recent rows that a policy promises are there at every step, whatever their score."""
    rule = keeps(method(name))
    for _, b, _, history in rows_kept(name):
        recent = rule.recent_rows(most_rows(rule.budget, tiny.LENGTHS[b]))
        for t, orders in enumerate(history):
            last = tiny.LENGTHS[b] + t
            sure = {*range(rule.sinks), *range(max(last - max(recent, 1 if rule.evict and t else 0), 0), last)}
            assert sure <= set(orders), f"step {t}: {sorted(sure - set(orders))} are gone"


@pytest.mark.parametrize("name", listed("kv", "cut", "prefill"))
def test_batch_equals_single(name):
    """The shorter prompt alone, not padded, and beside a longer one."""
    alone, beside = steps(name, form="single"), steps(name)
    np.testing.assert_allclose(alone.logits[:, 0], beside.logits[:, 1], atol=ATOL)
    for a, b in zip(alone.kept, beside.kept, strict=True):
        assert [layer[0] for layer in a] == [layer[1] for layer in b]


@pytest.mark.parametrize("name", listed())
def test_batch_mates_do_not_matter(name):
    """Rows in another order give the same text."""
    args = runs.under(name)
    assert tiny.text(runs.decoded(**args, form="swapped")) == tiny.text(runs.decoded(**args))[::-1]


@pytest.mark.parametrize("name", listed("kv", "cut", "prefill"))
def test_chunked_equals_one_shot_or_is_refused(name):
    if any(getattr(acts, "whole_prompt", False) for acts in part(name).values()):
        with pytest.raises(UserError, match="whole prompt"):
            runs.prompt(name, form="chunked")
        return
    chunked, whole = steps(name, form="chunked"), steps(name)
    np.testing.assert_allclose(chunked.logits, whole.logits, atol=ATOL)
    assert chunked.kept == whole.kept


@pytest.mark.parametrize("name", listed())
def test_equal_settings_compile_once(name):
    """Equal, hashable, printable: a second object with the same settings finds the compiled code of the first, in the prompt that it acts
    on, in packing and in decoding."""
    (first,), (again,) = part(name).values(), part(name).values()
    assert first == again and hash(first) == hash(again) and first is not again and repr(first) == repr(again)
    args = runs.under(name) | ({"read": runs.prefilled} if method(name).part in ("cut", "prefill") else {})
    before = tiny.text(runs.generate(**args))  # anew: its programs may have been dropped since they were compiled
    programs = runs.programs()
    assert tiny.text(runs.generate(**args)) == before
    assert runs.programs() == programs


@pytest.mark.parametrize("name", listed())
def test_every_method_saves_and_loads(name, tmp_path):
    """The choices come back equal from JSON, and the arrays to the bit."""
    m, setup, p = runs.model(), Setup(**part(name)), runs.prompt_of(name, "small", "single")
    setup = replace(setup, kv=setup.kv.plan(tiny.only(setup.kv, p).layers, tiny.CFG))
    layers = steps(name if method(name).part != "decode" else "Full", form="single").packed
    if setup.decode.nodes > 1:
        layers = pack(setup.kv, tiny.only(setup.kv, p).layers, setup.room(tiny.NEW), tiny.CFG)
    rows = tuple((layer.order_BKS.shape[2], layer.whole or 0) for layer in p.layers)
    context = Compressed(setup, layers, tiny.prompts()[1], int(p.next_B[0]), p.logits_BV, tiny.NEW, rows, fingerprint(m))
    context.save(tmp_path / "c")
    again = Compressed.load(m, tmp_path / "c")
    assert again.setup == context.setup and again.tokens == context.tokens and again.next == context.next
    assert from_json(json.loads(json.dumps(to_json(method(name).make())))) == method(name).make()
    for mine, theirs in zip(jax.tree.leaves(context.layers), jax.tree.leaves(again.layers), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("name", listed())
def test_listing_is_complete(name):
    m = method(name)
    assert m.family and (m.paper or m.family == "baseline") and isinstance(m.lossless, bool)
    for given in (m.identity or {}, m.fast or {}):
        assert set(given) <= set(inspect.signature(m.make).parameters)
    if m.paper:
        assert m.paper.key in m.paper.bibtex() and m.paper.year > 2000


def test_shadowkv_has_no_identity_below_full_rank():
    """With every chunk read, only the rank of the keys stands between ShadowKV and dense: the error falls as it grows."""
    p, errors = runs.prompt(), []
    for rank in (0.25, 0.75, 1.0):
        policy = ShadowKV(1.0, rank)
        layers = tiny.packed(policy, p)
        logits = np.stack([out for out, _ in tiny.forced(policy, layers, p, runs.GIVEN[:, :2])])
        errors.append(np.abs(logits - steps("Full").logits[:2]).max())
    assert errors == sorted(errors, reverse=True) and errors[-1] < ATOL
