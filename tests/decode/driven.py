"""Drafters that prepare something or drive their own loop, on the tiny model in float64."""

import functools
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import tiny

from tokeff.decode.loop import settle
from tokeff.decode.sample import GREEDY
from tokeff.kv.policy import Policy
from tokeff.models.config import Config, Params, Precision
from tokeff.models.load import Model

T = max(tiny.LENGTHS)
SHORT = ((5,), tiny.prompts()[1])  # a prompt of one token beside a long one
WIDE = Precision("float64", "float64", "float64")
SMALL = replace(tiny.CFG, name="small", L=2, windows=())  # the first layers of the target, as a model of their own


def model(cfg: Config = tiny.CFG, **parts) -> Model:
    """The tiny model with these parts attached."""
    m = Model(cfg, tiny.params(cfg, "float64"), None, WIDE, "tiny")
    return m.attach(**parts) if parts else m


def lower(layers: int, cfg: Config = tiny.CFG) -> Params:
    """The first layers of the tiny model as a model of their own."""
    whole = tiny.params(cfg, "float64")
    return whole.replace(blocks=whole.blocks[:layers])


@functools.cache
def read(policy: Policy, rows=None, cfg: Config = tiny.CFG):
    return tiny.read(policy, rows, cfg=cfg, T=T, dtype="float64")


def start(policy, drafter, m: Model | None = None, rows=None, how=GREEDY, eos=()):
    m = m or model()
    return tiny.start(read(policy, rows, m.cfg), policy, drafter, cfg=m.cfg, how=how, eos=eos, m=m)


def go(s, policy, drafter, m: Model | None = None, how=GREEDY, eos=(), steps=1000):
    m = m or model()
    return drafter.drive(m.params, m.cfg, s, steps, policy=policy, how=how, eos=eos)


def decode(policy, drafter, m: Model | None = None, rows=None, how=GREEDY, eos=()):
    return go(start(policy, drafter, m, rows, how, eos), policy, drafter, m, how, eos)


@functools.cache
def plain(policy, rows=None, how=GREEDY, cfg: Config = tiny.CFG):
    return tiny.text(decode(policy, tiny.PLAIN, model(cfg), rows, how))


def limited(policy, drafter, limits, m: Model | None = None) -> list[list[int]]:
    """The text of rows that may have so many new tokens."""
    s = start(policy, drafter, m).replace(limit_B=jnp.asarray(limits, jnp.int32))
    return tiny.text(go(s, policy, drafter, m))


def ending(policy, drafter, m: Model | None = None) -> int:
    """A token that this drafter's passes accept with others behind it, and that its text did not have before."""
    m, made = m or model(), [(1, 1)]
    s = start(policy, drafter, m)
    while not s.done_B.all():
        s = go(s, policy, drafter, m, steps=1)
        made.append(tuple(s.made_B.tolist()))
    text = tiny.text(s)
    spans = [(b, i) for before, after in zip(made, made[1:]) for b in range(2) for i in range(before[b], after[b] - 1)]
    return next(text[b][i] for b, i in spans if text[b][i] not in text[b][:i])


def ended(text: list[list[int]], eos: int) -> list[list[int]]:
    """Each row up to its first end of sequence."""
    return [row[: row.index(eos) + 1] if eos in row else row for row in text]


def settled_is_fresh(s, rows, m: Model) -> None:
    """Assert that the rows of the text lie in the caches of `Full` as a prefill of the text puts them there: orders, keys and values. The
    last token of a text has no row. Consumes `s`."""
    text = tuple((*row, *new[:-1]) for row, new in zip(rows, tiny.text(s), strict=True))
    layers = settle(m.params, m.cfg, s, policy=tiny.FULL).layers
    for layer, fresh in zip(layers, read(tiny.FULL, text, m.cfg).layers, strict=True):
        for b, row in enumerate(text):
            order, n = np.asarray(layer.order_BKC[b]), len(row)
            assert ((order >= 0).sum(axis=1) == n).all()
            at = np.argsort(order, axis=1)[:, -n:]  # free slots have the lowest order
            assert (np.take_along_axis(order, at, axis=1) == np.asarray(fresh.order_BKS)[b, :, :n]).all()
            for kept, made in ((layer.k_BKCH, fresh.k_BKSH), (layer.v_BKCH, fresh.v_BKSH)):
                kept = np.take_along_axis(np.asarray(kept[b]), at[..., None], axis=1)
                np.testing.assert_allclose(kept, np.asarray(made[b])[:, :n], atol=1e-9)
