"""Drafters that prepare something or drive their own loop, on the tiny model in float64."""

import functools

import tiny

from tokeff.decode.sample import GREEDY
from tokeff.kv.policy import Policy
from tokeff.models.config import Params, Precision
from tokeff.models.load import Model

T = max(tiny.LENGTHS)
SHORT = ((5,), tiny.prompts()[1])  # a prompt of one token beside a long one
WIDE = Precision("float64", "float64", "float64")


def model(**parts) -> Model:
    """The tiny model with these parts attached."""
    m = Model(tiny.CFG, tiny.params(tiny.CFG, "float64"), None, WIDE, "tiny")
    return m.attach(**parts) if parts else m


def lower(layers: int) -> Params:
    """The first layers of the tiny model as a model of their own."""
    whole = tiny.params(tiny.CFG, "float64")
    return whole.replace(blocks=whole.blocks[:layers])


@functools.cache
def read(policy: Policy, rows=None):
    return tiny.read(policy, rows, T=T, dtype="float64")


def start(policy, drafter, m: Model | None = None, rows=None, how=GREEDY, eos=()):
    prompt = read(policy, rows)
    return tiny.start(prompt, policy, drafter, how=how, eos=eos, m=m or model())


def decode(policy, drafter, m: Model | None = None, rows=None, how=GREEDY, eos=()):
    m = m or model()
    return drafter.drive(m.params, m.cfg, start(policy, drafter, m, rows, how, eos), 1000, policy=policy, how=how, eos=eos)


@functools.cache
def plain(policy, rows=None, how=GREEDY):
    return tiny.text(decode(policy, tiny.PLAIN, rows=rows, how=how))


def ending(policy, drafter, m: Model | None = None) -> int:
    """A token that this drafter's passes accept with others behind it, and that its text did not have before."""
    m, made = m or model(), [(1, 1)]
    s = start(policy, drafter, m)
    while not s.done_B.all():
        s = drafter.drive(m.params, m.cfg, s, 1, policy=policy, how=GREEDY, eos=())
        made.append(tuple(s.made_B.tolist()))
    text = tiny.text(s)
    spans = [(b, i) for before, after in zip(made, made[1:]) for b in range(2) for i in range(before[b], after[b] - 1)]
    return next(text[b][i] for b, i in spans if text[b][i] not in text[b][:i])
