"""No host round trip inside the decode loop: the program of a whole generation asks nothing of the host and tells it nothing."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from driven import start
from every import FORMS, LISTED, attached
from oracles.float64 import float64_model

from tokeff.decode.draft import Drafter
from tokeff.decode.loop import run
from tokeff.decode.paced import Paced, run_paced
from tokeff.decode.sample import GREEDY

pytestmark = [pytest.mark.core, pytest.mark.xdist_group("no-host")]
TALKS = re.compile(r"callback|infeed|outfeed|\bsend\b|\brecv\b")
LOOPS = {Drafter.drive: run, Paced.drive: run_paced}  # what `drive` calls, once
DRIVEN = {name: drafter for name, drafter in (LISTED | FORMS).items() if type(drafter).drive not in LOOPS}


@pytest.fixture(autouse=True, scope="module")
def double():
    with float64_model():
        yield


@pytest.mark.parametrize("name", [name for name in LISTED | FORMS if name not in DRIVEN])
def test_a_generation_is_one_program_that_runs_alone(name):
    """Of every listed drafter whose state is arrays and whose loop is the compiled one.

    DEL, PEARL and SkipDecode drive theirs from the host: DEL reads its sums after every `every` passes and chooses the program that runs
    next; PEARL dispatches two programs a turn, for two sets of devices, and reads one boolean of the turn before; SkipDecode starts a
    program for each number of layers.
    """
    drafter, m = (LISTED | FORMS)[name], attached()
    loop, s = LOOPS[type(drafter).drive], start(tiny.FULL, drafter, m)
    text = loop.lower(m.params, m.cfg, s, jnp.int32(5), policy=tiny.FULL, drafter=drafter, how=GREEDY, eos=()).as_text()
    assert "stablehlo.while" in text and not TALKS.findall(text)


def test_those_driven_by_the_host_are_known():
    assert set(DRIVEN) == {"DEL", "PEARL", "SkipDecode"}


def test_a_round_trip_would_be_found():
    def host(x):
        return jax.pure_callback(lambda x: np.asarray(x), jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    asks = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, x: host(x) + 1, x))
    tells = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, x: (jax.debug.print("{}", x), x + 1)[1], x))
    for talking in (asks, tells):
        assert TALKS.findall(talking.lower(jnp.ones(2)).as_text())
