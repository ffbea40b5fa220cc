"""The tiny model of `tiny` with more heads, 8 ragged prompts, and whole generations on and off a mesh."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tokeff import sharding
from tokeff.collectives import Collective, collectives
from tokeff.decode.draft import Drafter
from tokeff.decode.loop import Decoding, run
from tokeff.generation import Setup, go, read, start
from tokeff.kv.prefill import Prompt
from tokeff.listing import methods
from tokeff.models.config import Config, Precision
from tokeff.models.load import Model

LENGTHS = (64, 51, 60, 64, 43, 64, 57, 64)
NEW = 12
HALF = ((0, 2, 3, 7),)  # of 8 kv heads: two classes that a mesh of 4 divides
METHODS = {m.name: m for m in methods() if m.bare}


def ordinary(m) -> bool:
    """Whether it decodes by the ordinary loop of the whole model, whose collectives can be counted."""
    return m.part != "decode" or (type(made := m.make()).drive is Drafter.drive and not made.own_layers)


ORDINARY = tuple(name for name, m in METHODS.items() if ordinary(m))


def named(*names: str) -> list:
    """Test parameters, grouped so that one worker runs all tests of a method."""
    return [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in names]


def setup(name: str) -> Setup:
    """A listed method at which it is active on the tiny prompts, everything else plain; 'A+B' combines two."""
    if "+" in name:
        policy, drafter = (METHODS[part] for part in name.split("+"))
        return Setup(kv=policy.make(**tiny.fast(policy)), decode=drafter.make(**tiny.settings(drafter)))
    given = tiny.settings(METHODS[name])
    given |= {"heads": HALF} if "heads" in given else {}
    return Setup(**{METHODS[name].part: METHODS[name].make(**given)})


@cache
def model(K: int) -> Model:
    """A float32 model of K kv heads with two query heads each."""
    cfg = Config("tiny", V=64, D=32, F=48, L=3, N=2 * K, K=K, H=8, max_len=256, tied=False)
    params = jax.tree.map(lambda x: jnp.asarray(x, "float32"), tiny.weights(cfg)[0])
    return Model(cfg, params, None, Precision(), "tiny")


@cache
def placed(K: int, data: int, model_axis: int) -> Model:
    return sharding.place(model(K), sharding.mesh(data, model_axis))


@cache
def prompts() -> tuple[tuple[int, ...], ...]:
    rng = np.random.default_rng(2)
    rows = [rng.integers(0, 64, n) for n in LENGTHS]
    for row in rows:
        row[17:41] = row[:24]  # something for drafters to find, and no two equal chunks
    return tuple(tuple(row.tolist()) for row in rows)


@cache
def dense(split: bool) -> Prompt:
    """The prompts read once for all policies, on one device or on data=2 x model=4, with all evidence that any of them asks for."""
    asked = dict.fromkeys(kind for name in METHODS for kind in setup(name).kv.needs())
    return read(placed(8, 2, 4) if split else model(8), prompts(), Setup(), evidence=tuple(asked))


def prompt_of(m: Model, name: str, rows=None) -> Prompt:
    parts = setup(name)
    if rows is None and parts.cut is None and parts.prefill is None and (m is model(8) or m is placed(8, 2, 4)):
        return tiny.only(parts.kv, dense(m is not model(8)))
    return read(m, rows or prompts(), parts)


def begun(m: Model, name: str, rows=None) -> tuple[Prompt, Decoding]:
    """(the prefilled prompts, the state before the first decode step)."""
    prompt = prompt_of(m, name, rows)
    return prompt, start(m, prompt, setup(name), NEW)


@cache
def begun_apart(name: str) -> tuple[Prompt, Decoding]:
    """`begun` on data=2 x model=4. Do not go on from it: it is shared."""
    return begun(placed(8, 2, 4), name)


def generated(m: Model, name: str, rows=None) -> tuple[Prompt, Decoding]:
    """(the prefilled prompts, the state after NEW tokens)."""
    if rows is None and m is placed(8, 2, 4) and type(setup(name).decode).drive is Drafter.drive:
        prompt, s = begun_apart(name)
        return prompt, loop(name)(m.params, jax.tree.map(jnp.copy, s), jnp.int32(NEW))  # what `go` would compile again
    prompt, s = begun(m, name, rows)
    return prompt, go(m, s, setup(name), NEW, ())


@cache
def loop(name: str) -> jax.stages.Compiled:
    """The decode loop on data=2 x model=4."""
    m, parts = placed(8, 2, 4), setup(name)
    args = dict(policy=parts.kv.onward(), drafter=parts.decode, how=parts.sampling, eos=())
    with sharding.beside(m.params):
        return run.lower(m.params, m.cfg, begun_apart(name)[1], jnp.int32(NEW), **args).compile()


@cache
def sent(name: str) -> tuple[list[Collective], Decoding]:
    """(every collective of that loop, the state that goes into it)."""
    return collectives(loop(name).as_text()), begun_apart(name)[1]


@cache
def unsharded(K: int, name: str) -> tuple[Prompt, Decoding]:
    return generated(model(K), name)
