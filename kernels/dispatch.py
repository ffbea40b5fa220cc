"""Which implementation of an op runs: by name, or the first that supports the call on the platform it compiles for.

Every op goes through `call`, which puts around the implementation, from the outside in: a gradient (the op's own, or
through its XLA path), a `shard_map` on a multi-device mesh, and the choice of implementation.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial

import jax
from jax.sharding import PartitionSpec

from tokeff.compat import context_mesh, shard_map
from tokeff.sharding import RULES

IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu", "pallas_gpu", "interpret")
# The first that supports the call wins. The platform is the one compiled for, known only when XLA lowers:
# `jax.default_backend()` names the machine that compiles, and picks the wrong kernel when the two differ.
PREFERENCE = {"tpu": ("pallas_tpu", "xla"), "cuda": ("pallas_gpu", "xla"), "default": ("xla",)}

_FORCED = jax.make_user_context(None)  # a key of jit's caches: what is traced in here is a program of its own

log = logging.getLogger("tokeff.kernels")


@dataclass(frozen=True)
class Op:
    """One op and what `call` must know of it. `dims` and `out_dims` are dimension letters, one string an array."""

    name: str
    run: Mapping[str, Callable]  # implementation -> f(*arrays, **options)
    refusal: Mapping[str, Callable]  # implementation -> f(*arrays, **options): one line why not, or None
    dims: tuple[str, ...]
    out_dims: tuple[str, ...] | str
    floats: int  # so many arrays, the first ones, are differentiable; the others are integers
    localise: Callable  # (arrays, index of this shard of C, options) -> arrays as the shard counts its slots
    combine: Callable  # (outs, mesh axis, arrays of this shard, options) -> outs: joins what the shards of C made of their own slots
    pages: bool = False  # C counts pages, which caches split over the heads' axis of the mesh where their heads stay whole
    backward: Callable | None = None  # f(arrays, outs, cotangents, **options) -> those of the floats; None: through the XLA path

    def __hash__(self):
        return hash(self.name)


@dataclass(frozen=True)
class Spec:
    """The static half of a call."""

    op: Op
    implementation: str | None
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None
    options: tuple[tuple[str, object], ...]


def implementations(reference, xla, pallas_tpu, pallas_gpu):
    """Return {implementation: function} of an op from its modules. 'interpret' is the TPU kernel, run by XLA."""
    named = {"reference": reference, "xla": xla, "pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}
    return {name: module.run for name, module in named.items()} | {"interpret": partial(pallas_tpu.run, interpret=True)}


def refusals(pallas_tpu, pallas_gpu):
    """Return {implementation: function that says why not} of an op from its kernels."""
    return {"pallas_tpu": pallas_tpu.refusal, "pallas_gpu": pallas_gpu.refusal, "interpret": pallas_tpu.refusal}


def forced(implementation):
    """Return a context in which every op that is not told otherwise takes this implementation: a whole model with it, to compare.

    Raises ValueError for an unknown one. What is compiled in the context is not mistaken for what is compiled outside.
    """
    _check(implementation)
    return _FORCED(implementation)


def call(op, implementation, mesh, arrays, **options):
    """Run op on its arrays. mesh None means the one set by `jax.set_mesh`, if any.

    Raises ValueError for an unknown implementation, or a named one that does not support the call.
    """
    _check(implementation)
    implementation = _FORCED.value if implementation is None else implementation
    spec = Spec(op, implementation, context_mesh() if mesh is None else mesh, tuple(options.items()))
    return _differentiable(spec, arrays[: op.floats], arrays[op.floats :])


def _check(implementation):
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation {implementation!r} is unknown: choose None or one of {IMPLEMENTATIONS}")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(spec, floats, ints):
    return _over_mesh(spec, (*floats, *ints))


def _forward(spec, floats, ints):
    outs = _over_mesh(spec, (*floats, *ints))
    return outs, (floats, ints, outs if spec.op.backward else None)


def _backward(spec, saved, cotangents):
    floats, ints, outs = saved
    if spec.op.backward:
        return spec.op.backward((*floats, *ints), outs, cotangents, **dict(spec.options)), None
    path = partial(spec.op.run["xla"], clean=True, **dict(spec.options))
    return jax.vjp(lambda *floats: path(*floats, *ints), *floats)[1](cotangents), None


_differentiable.defvjp(_forward, _backward)


def _over_mesh(spec, arrays):
    """Run the op once per device on its own sequences, heads and slots: Mosaic calls do not partition themselves."""
    op, mesh = spec.op, spec.mesh
    if mesh is None or mesh.size == 1:
        return _choose(spec, arrays)
    axis = _split_axes(mesh, op, arrays)

    def local(*arrays):
        if "C" not in axis:
            return _choose(spec, arrays)
        options = dict(spec.options)
        arrays = op.localise(arrays, jax.lax.axis_index(axis["C"]), options)
        return op.combine(_choose(spec, arrays), axis["C"], arrays, options)

    def layout(dims):
        return PartitionSpec(*(axis.get(letter) for letter in dims))

    return shard_map(local, mesh, tuple(map(layout, op.dims)), jax.tree.map(layout, op.out_dims))(*arrays)


def _split_axes(mesh, op, arrays):
    """Return {letter: mesh axis} for the dimensions that the mesh splits evenly; the others stay whole everywhere."""
    sizes = {(letter, n) for dims, x in zip(op.dims, arrays) if x is not None for letter, n in zip(dims, x.shape)}
    found = {letter for letter, _ in sizes}

    def splits(letter, axis):
        ways = mesh.shape.get(axis, 1)
        return ways > 1 and all(n % ways == 0 for other, n in sizes if other == letter)

    axes = {letter: axis for letter, axis in RULES.items() if letter in found and splits(letter, axis)}
    if "K" in found and "K" not in axes:
        axes.pop("N", None)  # a query head stays with its kv head
        if op.pages and "C" not in axes and splits("C", RULES["P"]):
            axes["C"] = RULES["P"]  # where the cache has them: gathering the pages of all devices would cost more than reading them
    return axes


def _choose(spec, arrays):
    """Run the named implementation, or per platform the first that supports the call."""
    op, name = spec.op, spec.implementation
    if name is not None:
        if reason := refusal(op, name, arrays, spec.options):
            raise ValueError(f"{op.name}: {name} does not support this call: {reason}")
        return _compiled(op, name, spec.options)(*arrays)
    chosen = {platform: _first(op, names, arrays, spec.options) for platform, names in PREFERENCE.items()}
    if set(chosen.values()) == {"xla"}:
        return _compiled(op, "xla", spec.options)(*arrays)
    return jax.lax.platform_dependent(*arrays, **{p: _compiled(op, n, spec.options) for p, n in chosen.items()})


def refusal(op, implementation, arrays, options):
    """Return in one line why the implementation cannot take this call, or None if it can."""
    why = op.refusal.get(implementation)
    return why(*arrays, **dict(options)) if why else None


def _first(op, names, arrays, options):
    for name in names:
        reason = refusal(op, name, arrays, options)
        if reason is None:
            return name
        _log_once(op.name, name, reason)
    raise AssertionError(f"{op.name}: the last of {names} must support every call")


@cache
def _log_once(op_name, implementation, reason):
    log.info("%s: %s does not support this call, taking the next: %s", op_name, implementation, reason)


@cache
def _compiled(op, implementation, options):
    """Return one jitted function an implementation, so that equal calls (the layers of a model) trace it once."""
    return jax.jit(partial(op.run[implementation], **dict(options)))
