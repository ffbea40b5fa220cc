"""Every implementation of every op equals the definition in float32, on shapes that hypothesis draws inside its limits."""

from functools import partial

import jax
import pytest
from hypothesis import HealthCheck, given, settings
from kernel_calls import assert_close
from kernel_ops import internal
from kernel_shapes import CASES, calls

EXAMPLES = {"xla": 5, "pallas_tpu": 2, "pallas_gpu": 2}  # a new shape is a new program, and compiling is what takes the time


def check(op, which, call):
    """One call of an implementation, interpreted where that is a kernel, beside the definition."""
    case, a, more = call
    if which != "xla" and case == simplest(op, which):  # hypothesis begins with it, and interpreting a kernel takes long
        return
    spec, arrays, options = internal(op, case, a, **more)
    assert which == "xla" or spec.refusal[which](*arrays, **options) is None
    options, how = dict(options), {} if which == "xla" else {"interpret": True}
    got, want = (jax.jit(partial(spec.run[name], **options, **keys))(*arrays) for name, keys in ((which, how), ("reference", {})))
    assert_close(*(x if isinstance(x, tuple) else (x,) for x in (got, want)), "float32")


def simplest(op, which):
    return CASES[op](lambda name, choices: next(iter(choices)), which)


def on_odd_shapes(op, which):
    """Draw calls, the same ones every time."""
    slow = [HealthCheck.too_slow, HealthCheck.large_base_example, HealthCheck.data_too_large]
    how = settings(max_examples=EXAMPLES[which], derandomize=True, database=None, deadline=None, suppress_health_check=slow)
    how(given(calls(op, which))(lambda call: check(op, which, call)))()


@pytest.mark.core
@pytest.mark.parametrize("op", CASES)
def test_xla_equals_the_definition(op):
    on_odd_shapes(op, "xla")


@pytest.mark.interp
@pytest.mark.parametrize("which", ["pallas_tpu", "pallas_gpu"])
@pytest.mark.parametrize("op", CASES)
def test_kernels_equal_the_definition(op, which):
    on_odd_shapes(op, which)
