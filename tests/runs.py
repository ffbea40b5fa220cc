"""Each listed method run once per setting on the tiny model; the property tests read what came out.

Results are cached for the session of a worker, and tests are grouped by method, so no setting is compiled twice.
"""

import sys
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tokeff.decode.loop import Decoding, run
from tokeff.errors import UserError
from tokeff.generation import Setup
from tokeff.kv.bounded import prefill_bounded
from tokeff.kv.cache import Room
from tokeff.kv.keep import Keep
from tokeff.kv.policy import Ask, Policy
from tokeff.kv.prefill import Prompt
from tokeff.kv.some_heads import SomeHeads
from tokeff.listing import METHODS as LISTED
from tokeff.models.config import Precision
from tokeff.models.flow import Flow, Here
from tokeff.models.load import Model

STEPS = 6
UNDER_ALL = "PromptDistill"  # the pass over which every policy stands
METHODS = tuple(m for m in LISTED if m.bare)  # drafters that run another model have tests of their own
GIVEN = np.random.default_rng(2).integers(0, tiny.CFG.V, (len(tiny.LENGTHS), STEPS))
CHUNK = PIECE = 48  # of a prompt read in chunks, or in bounded memory; the short prompt's last rows cross the border


def listed(*kinds: str, where=lambda method: True) -> list:
    """Test parameters: the names of the listed methods of these parts, grouped so that one worker runs all tests of a method, and of those
    that share its programs."""
    chosen = [m for m in METHODS if (m.part in kinds or not kinds) and where(m)]
    return [pytest.param(m.name, marks=together(m.name)) for m in chosen]


def together(name: str):
    """The mark of the tests of a method: one worker runs them, and those of the policies that go on from a prompt alike."""
    return pytest.mark.xdist_group(going_on().get(name, name))


@cache
def going_on() -> dict[str, str]:
    """Of each policy the first one listed that decodes by the same program: those differ in what they keep of the prompt alone."""
    ways = {m.name: part(m.name)["kv"].onward() for m in METHODS if m.part == "kv"}
    return {name: next(other for other, theirs in ways.items() if theirs == way) for name, way in ways.items()}


@cache
def attending() -> frozenset[str]:
    """The first listed policy of each that attends by code of its own."""
    codes = {m.name: type(part(m.name)["kv"].onward()).attend for m in METHODS if m.part == "kv"}
    return frozenset(next(other for other, theirs in codes.items() if theirs == code) for code in codes.values())


def ways_of_going_on() -> list:
    """`listed` policies, one for each way of decoding."""
    return listed("kv", where=lambda m: going_on()[m.name] == m.name)


def method(name: str):
    return next(m for m in METHODS if m.name == name)


def programs() -> dict[str, int]:
    """How many programs each jitted function of the library holds, of those that hold any."""
    modules = [(name, module) for name, module in list(sys.modules.items()) if name.startswith("tokeff")]
    jitted = {f"{name}.{key}": f for name, module in modules for key, f in list(vars(module).items()) if isinstance(f, type(run))}
    return {name: size for name, f in jitted.items() if (size := f._cache_size())}


def part(name: str, kind: str = "small") -> dict[str, Any]:
    """{'kv' | 'cut' | 'prefill' | 'decode': object} of one method, a new object every time.

    kind: small, fast (exact under drafts) or identity.
    """
    m = method(name)
    given = {"small": tiny.settings, "fast": tiny.fast, "identity": tiny.identity}[kind](m)
    return {m.part: m.make(**given)}


def holding(name: str, kind: str = "small") -> Policy:
    """The policy that holds what the method leaves of a prompt: its own, or everything in the heads that its pass leaves."""
    return Setup(**part(name, kind)).kv


def model() -> Model:
    return Model(tiny.CFG, tiny.params(), None, Precision(), "tiny")


def refusal(setup: Setup, m: Model | None = None, lengths: tuple[int, ...] = tiny.LENGTHS) -> str | None:
    """Why a combination is refused, on the tiny model and its prompts unless others are given, or None."""
    try:
        setup.check(m or model(), lengths, tiny.NEW)
    except UserError as error:
        return str(error)
    return None


@cache
def evidence() -> tuple[Ask, ...]:
    """What any listed policy wants to know: gathered once, by one prefill for all."""
    policies = [part(m.name, kind).get("kv", tiny.FULL) for m in METHODS for kind in ("small", "identity")]
    return tuple(dict.fromkeys(ask for policy in policies for ask in policy.needs()))


@cache
def prompt(name: str | None = None, kind: str = "small", form: str = "batch") -> Prompt:
    """`prefilled`, once."""
    return prefilled(name, kind, form)


def prefilled(name: str | None = None, kind: str = "small", form: str = "batch") -> Prompt:
    """The prefill, dense unless `name` is a method that acts on it.

    form: batch, chunked, swapped (rows in the other order) or single (the second prompt alone, not padded).
    """
    rows = {"swapped": tiny.prompts()[::-1], "single": tiny.prompts()[1:]}.get(form, tiny.prompts())
    parts, chunk = part(name, kind) if name else {}, CHUNK if form == "chunked" else None
    return tiny.read(tiny.FULL, rows, evidence=asked(name), cut=parts.get("cut"), pattern=parts.get("prefill"), chunk=chunk)


def asked(name: str | None) -> tuple[Ask, ...]:
    """What a prompt is asked for: everything, but nothing behind a sparse prefill, where only Full reads, and behind most passes what the
    few policies want that stand over them."""
    if name in (None, UNDER_ALL):
        return evidence()
    return part("H2O")["kv"].needs() if method(name).part == "cut" else ()


def prompt_of(name: str, kind: str, form: str = "batch") -> Prompt:
    return prompt(name, kind, form) if method(name).part in ("cut", "prefill") else prompt(None, "small", form)


@dataclass(frozen=True)
class Steps:
    """One-row decoding of given tokens: the packed caches, then logits and kept rows after every token."""

    packed: tuple
    logits: np.ndarray
    kept: list  # [layer][b][head], after the prompt and after every token


def over(cut: str | None, policy: Policy) -> Policy:
    """The policy over what a pass leaves."""
    return policy if cut is None else Setup(kv=policy, **part(cut)).kv


@cache
def steps(name: str, kind: str = "small", form: str = "batch") -> Steps:
    """Decode GIVEN under one method."""
    policy, p = holding(name, kind), prompt_of(name, kind, form)
    given = GIVEN[1:] if form == "single" else GIVEN
    packed = tiny.packed(policy, p)
    logits, kept = [], [[tiny.kept(policy, layer) for layer in packed]]
    for out, layers in tiny.forced(policy, packed, p, given):
        logits.append(out)
        kept.append([tiny.kept(policy, layer) for layer in layers])
    return Steps(packed, np.stack(logits), kept)


@cache
def bounded(policy) -> Prompt:
    """The prompts read in pieces, with what the policy lets go between them."""
    tokens, length = tiny.padded(tiny.prompts())
    return prefill_bounded(tiny.params(), tiny.CFG, tokens, length, policy, piece=PIECE, evidence=policy.needs(), dtype="float32")


@cache
def decoded(
    kv: str = "Full", cut: str | None = None, decode: str | None = None, kind: str = "small", form: str = "batch",
    prefill: str | None = None,
) -> Decoding:  # fmt: skip
    """Greedy text under one combination. Do not go on from it: it is shared."""
    return generate(kv, cut, decode, kind, form, prefill)


def generate(kv="Full", cut=None, decode=None, kind="small", form="batch", prefill=None, read=prompt, **options) -> Decoding:
    """`decoded`, anew but for the prompt, which `read` gives (`prefilled` makes it anew too); options as of `tiny.start`."""
    policy, drafter = over(cut, part(kv, kind)["kv"]), part(decode, kind)["decode"] if decode else tiny.PLAIN
    named = {name: options[name] for name in ("how", "eos") if name in options}
    s = tiny.start(read(cut or prefill, "small", form), policy, drafter, **options)
    return tiny.go(s, policy, drafter, **named)


def asks(seed: int = 0):
    """Random q, k, v of one token a sequence."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(len(tiny.LENGTHS), 1, n, tiny.CFG.H)), jnp.float32) for n in (tiny.CFG.N, tiny.CFG.K, tiny.CFG.K)]


@partial(jax.jit, static_argnames=("policy", "at"))
def one_token(layers, next_B, q, k, v, *, policy, at: tuple[int, ...]):
    """(out_BTNH, the layer, what it hands on) of one token in the last of these layers: packed and asked, the lower ones for what they
    hand on."""
    order = next_B[:, None]
    flow, across = Flow(jnp.zeros((len(tiny.LENGTHS), 1, tiny.CFG.D)), order, order, order, id_BT=jnp.zeros_like(order)), None
    for i, rows in zip(at, layers, strict=True):
        layer = policy.pack_layer(rows, Room(1), Here(i, tiny.CFG))
        out, layer, across = policy.attend(q, k, v, flow, flow, layer, None, across, Here(i, tiny.CFG))
    return out, layer, across


def check_token(policy, prompt: Prompt, at: tuple[int, ...] = (1,), rows=None) -> None:
    layers = [prompt.layers[i] for i in at] if rows is None else [rows]
    out, layer, _ = one_token(layers, prompt.next_B, *asks(), policy=policy, at=at)
    assert np.isfinite(out).all()
    check_rows(policy, [layer], prompt.next_B.tolist(), Here(at[-1], tiny.CFG))


def check_policy(policy, prompt: Prompt, at: tuple[int, ...] = (1,)) -> None:
    """One token, in these layers, or in all of a policy that decides over all of them."""
    if type(policy).pack is Policy.pack:
        return check_token(policy, prompt, at)
    ((logits, layers),) = tiny.forced(policy, tiny.packed(policy, prompt), prompt, GIVEN[:, :1])
    assert np.isfinite(logits).all()
    check_rows(policy, layers, prompt.next_B.tolist())


def check_rows(policy, layers: list, lengths, here=None) -> None:
    """No row twice, the newest there, and of the prompt no more than the budget."""
    rule = getattr(policy, "rule", policy)
    for i, layer in enumerate(layers):
        for b, heads in enumerate(tiny.kept(policy, layer)):
            left = [orders for orders in heads if orders or not isinstance(policy, SomeHeads)]  # a pass may leave a head nothing
            assert all(len(set(orders)) == len(orders) and orders[-1] == lengths[b] for orders in left)
            if isinstance(rule, Keep) and rule.span == policy.span == "layer":
                most = rule.rows(int(lengths[b]), here or Here(i, tiny.CFG))
                assert sum(o < lengths[b] for orders in heads for o in orders) <= most * len(heads)


def under(name: str, kind: str = "small") -> dict[str, Any]:
    """Arguments of `decoded` that run one method, whatever its part, with the rest plain."""
    return {method(name).part: name, "kind": kind}
