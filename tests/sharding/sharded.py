"""The tiny model of `tiny` with more heads, 8 ragged prompts, and whole generations on and off a mesh."""

import dataclasses
import inspect
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tokeff import sharding
from tokeff.collectives import Collective, collectives
from tokeff.decode.draft import Drafter
from tokeff.decode.draft_model import OwnModel
from tokeff.decode.loop import Decoding, run
from tokeff.generation import Setup, go, read, start
from tokeff.kv.prefill import Prompt
from tokeff.listing import methods
from tokeff.models.config import Config, Precision
from tokeff.models.load import Model

LENGTHS = (64, 51, 60, 64, 43, 64, 57, 64)
NEW = 12
HALF = ((0, 2, 3, 7),)  # of 8 kv heads: two classes that a mesh of 4 divides
METHODS = {m.name: m for m in methods()}
LOOPS: dict[tuple, jax.stages.Compiled] = {}
# What runs with every test: a method of each kind of store, reading, pass, prefill and drafting. The others run in `make proofs`.
DAILY = (
    "Full", "StreamingLLM", "H2O", "SnapKV", "AdaKV", "ShadowKV", "TidalDecode", "GemFilter", "PromptDistill", "PromptLookup",
    "TokenRecycling", "KIVI", "Quest", "DuoAttention", "TransMLA", "LazyLLM", "MInference", "EarlyExit", "DraftModel", "FFN-SkipLLM",
    "H2O+PromptLookup", "AdaKV+TokenRecycling",
)  # fmt: skip
ACTIVE = {"chunk": 8, "head": 4, "question": 8, "budget": 0.25, "sure": 0.2}  # settings of drafters with a model of their own


def named(*names: str) -> list:
    """Test parameters, grouped so that one worker runs all tests of a method, and of those that go on from a prompt as it does."""
    return tiny.sampled([pytest.param(name, marks=pytest.mark.xdist_group(f"sharded {going_on(name)}")) for name in names], DAILY)


@cache
def going_on(name: str) -> str:
    """The first method listed that decodes by the same program, but for shapes."""
    return next(other for other in (*METHODS, name) if alike(other) == alike(name))


@cache
def alike(name: str) -> tuple:
    parts = setup(name)
    return parts.kv.onward(), parts.decode, parts.sampling


def setup(name: str) -> Setup:
    """A listed method at which it is active on the tiny prompts, everything else plain; 'A+B' combines two."""
    if "+" in name:
        policy, drafter = (METHODS[part] for part in name.split("+"))
        return Setup(kv=policy.make(**tiny.fast(policy)), decode=drafter.make(**tiny.settings(drafter)))
    given, known = tiny.settings(METHODS[name]), inspect.signature(METHODS[name].make).parameters
    given |= {"heads": HALF} if "heads" in given else {}
    given |= {"cost": ((1, 1.0), (64, 1.01))} if "cost" in known else {}  # drafts pay
    if "cfg" in known:
        given |= {"cfg": small(config(8))} | {key: value for key, value in ACTIVE.items() if key in known}
    return Setup(**{METHODS[name].part: METHODS[name].make(**given)})


def ordinary(name: str) -> bool:
    """Whether it decodes by the ordinary loop of the whole model and nothing else, so that the sums in it are known."""
    drafter = setup(name).decode
    return type(drafter).drive is Drafter.drive and not drafter.own_layers and not isinstance(drafter, OwnModel)


def config(K: int) -> Config:
    """K kv heads with two query heads each."""
    return Config("tiny", V=64, D=32, F=48, L=3, N=2 * K, K=K, H=8, max_len=256, tied=False)


def small(cfg: Config) -> Config:
    """The first layers as a model of their own: what drafters run that run one."""
    return dataclasses.replace(cfg, name="small", L=2, windows=())


@cache
def model(K: int) -> Model:
    """A float32 model of K kv heads, and beside it the one that drafts."""
    params = jax.tree.map(lambda x: jnp.asarray(x, "float32"), tiny.weights(config(K))[0])
    m, lower = Model(config(K), params, None, Precision(), "tiny"), params.replace(blocks=params.blocks[: small(config(K)).L])
    return m.attach(**dict.fromkeys(parts_wanted(), lower))


@cache
def parts_wanted() -> tuple[str, ...]:
    """Under which names drafters look for a model of their own."""
    made = [setup(name).decode for name, m in METHODS.items() if m.part == "decode"]
    return tuple(sorted({drafter.name for drafter in made if isinstance(drafter, OwnModel)}))


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
    if rows is None and m is placed(8, 2, 4):
        prompt, s = begun_apart(name)
        if type(setup(name).decode).drive is not Drafter.drive:
            return prompt, driven(name)[0]
        return prompt, loop(name)(m.params, copied(s), jnp.int32(NEW))  # what `go` would compile again
    prompt, s = begun(m, name, rows)
    return prompt, go(m, s, setup(name), NEW, ())


def copied(state):
    """The same numbers in the same places, without a program to copy each shape."""

    def copy(x):
        return jnp.copy(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else jax.device_put(np.asarray(x), x.sharding)

    return jax.tree.map(copy, state)


def loop(name: str) -> jax.stages.Compiled:
    """The decode loop on data=2 x model=4."""
    leaves, tree = jax.tree.flatten(begun_apart(name)[1])
    found = going_on(name), tree, *((x.shape, x.dtype, x.sharding) for x in leaves)
    if found not in LOOPS:
        m, (policy, drafter, how) = placed(8, 2, 4), alike(name)
        with sharding.beside(m.params):
            lowered = run.lower(m.params, m.cfg, begun_apart(name)[1], jnp.int32(NEW), policy=policy, drafter=drafter, how=how, eos=())
            LOOPS[found] = lowered.compile()
    return LOOPS[found]


class Recorded:
    """A jitted function that keeps the text of each program it runs; inside another one it is traced as ever."""

    def __init__(self, function, texts: dict[str, None]):
        self.function, self.texts = function, texts

    def __call__(self, *args, **named):
        if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((args, named))):
            self.texts[self.function.lower(*args, **named).compile().as_text()] = None
        return self.function(*args, **named)


@cache
def driven(name: str) -> tuple[Decoding, list[str]]:
    """(the state after NEW tokens, the compiled text of what ran) of a drafter that drives the loop itself, on data=2 x model=4."""
    m, parts, texts = placed(8, 2, 4), setup(name), {}
    with pytest.MonkeyPatch.context() as patch:
        for module in {inspect.getmodule(run), inspect.getmodule(type(parts.decode))}:
            for key, value in list(vars(module).items()):
                if isinstance(value, type(run)):
                    patch.setattr(module, key, Recorded(value, texts))
        return go(m, copied(begun_apart(name)[1]), parts, NEW, ()), list(texts)


@cache
def sent(name: str) -> tuple[list[Collective], Decoding]:
    """(every collective of that loop, or of the programs that a drafter runs which drives it itself, the state that goes in)."""
    alone = type(setup(name).decode).drive is Drafter.drive
    texts = [loop(name).as_text()] if alone else driven(name)[1]
    return [c for text in texts for c in collectives(text)], begun_apart(name)[1]


ORDINARY = tuple(name for name in METHODS if ordinary(name))
DRAFTERS = tuple(name for name in METHODS if not ordinary(name))


@cache
def unsharded(K: int, name: str) -> tuple[Prompt, Decoding]:
    return generated(model(K), name)
