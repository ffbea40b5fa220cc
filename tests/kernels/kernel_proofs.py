"""What every op must show, given its `dispatch.Op`: kernels equal to the definition and to themselves, and through the real compilers."""

import functools
from functools import partial

import jax
import numpy as np
import pytest
import tiny
from jax import export
from jax.experimental import topologies
from jax.sharding import AxisType, SingleDeviceSharding
from kernel_calls import assert_close

from tokeff.kernels import cases, dispatch
from tokeff.kernels.static import TOPOLOGY

TRITON = "__gpu$xla.gpu.triton"
GENERATIONS = tiny.sampled(TOPOLOGY, ("v5e",))


def run(op, name, call, **more):
    """Run one implementation on (arrays, options). more: options to change, and `interpret` for a kernel."""
    arrays, options = call
    return jax.jit(partial(op.run[name], **(options | more)))(*arrays)


def check_kernel(op, name, call, dtype, interpret=True):
    """A kernel, interpreted twice on a call: equal to the definition, and to itself bit for bit."""
    arrays, options = call
    assert op.refusal[name](*arrays, **options) is None
    kernel = jax.jit(partial(op.run[name], interpret=interpret, **options))
    got, again = kernel(*arrays), kernel(*arrays)
    assert_close(got, run(op, "reference", call), dtype)
    for x, y in zip(got, again, strict=True):
        np.testing.assert_array_equal(x, y)


def check_gradients(public, definition, floats):
    """Gradients of two functions of the same arrays agree and are finite, those of the log-sum-exp included."""

    def loss(f, floats):
        out, lse = f(*floats)
        return jax.numpy.sin(out).sum() + jax.numpy.where(lse == -jax.numpy.inf, 0, jax.numpy.cos(lse)).sum()

    got, want = (jax.jit(jax.grad(partial(loss, f)))(floats) for f in (public, definition))
    assert_close(got, want, "float32")
    assert all(np.isfinite(x).all() for x in got)


def naive(case, a, see, k=None, v=None):
    """(out, lse) in float64 by the formula of softmax attention, one query and head at a time. see(b, t, head): the rows it sees."""
    q, k, v = (np.asarray(x, np.float64) for x in (a["q"], a["k"] if k is None else k, a["v"] if v is None else v))
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    for b, t, n in np.ndindex(q.shape[:3]):
        head = n // (case.N // case.K)
        rows = np.flatnonzero(see(b, t, head))
        if len(rows):
            scores = k[b, head, rows] @ q[b, t, n] * case.options["scale"]
            scores = case.softcap * np.tanh(scores / case.softcap) if case.softcap else scores
            p = np.exp(scores - scores.max())
            out[b, t, n], lse[b, t, n] = p @ v[b, head, rows] / p.sum(), scores.max() + np.log(p.sum())
    return out, lse


@functools.cache
def tpus(generation):
    """Four devices that only the compiler knows."""
    pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, is not installed")
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY[generation]).devices


def public_call(module, public, case, implementation):
    """A function of a case's {name: array}."""

    def f(a):
        positional, keys = module.arguments(a)
        return public(*positional, **keys, **module.options(case), implementation=implementation)

    return f


def compiled_for_tpu(module, public, case, generation):
    """The text of the program that libtpu makes of the TPU kernel."""
    on = SingleDeviceSharding(tpus(generation)[0])
    structs = {n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=on) for n, s in cases.structs(case).items()}
    return jax.jit(public_call(module, public, case, "pallas_tpu")).lower(structs).compile().as_text()


def exported(module, public, case, platform, implementation=None):
    """The program as it is lowered for a platform."""
    unchecked = [export.DisabledSafetyCheck.custom_call(TRITON)]
    f = jax.jit(public_call(module, public, case, implementation))
    return export.export(f, platforms=[platform], disabled_checks=unchecked)(cases.structs(case)).mlir_module()


def check_choice(module, public, case):
    """Left to itself, the op takes the kernel of the platform compiled for."""
    on_tpu, on_gpu, on_cpu = (exported(module, public, case, platform) for platform in ("tpu", "cuda", "cpu"))
    assert "tpu_custom_call" in on_tpu and TRITON not in on_tpu
    assert TRITON in on_gpu and "tpu_custom_call" not in on_gpu
    assert "tpu_custom_call" not in on_cpu and TRITON not in on_cpu


def mesh(*sizes):
    """A mesh data x model x seq of virtual CPU devices."""
    return jax.make_mesh(sizes, ("data", "model", "seq"), axis_types=(AxisType.Auto,) * 3)


def refused(op, name, call):
    """Why an implementation does not take a call; one line."""
    arrays, options = call
    reason = dispatch.refusal(op, name, arrays, tuple(options.items()))
    assert reason is None or "\n" not in reason
    return reason
