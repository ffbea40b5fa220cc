"""flash_prefill: the definition, the XLA path and its promises, gradients, both kernels by interpretation, both real compilers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_calls import assert_close, params, ragged
from kernel_proofs import (
    GENERATIONS,
    TRITON,
    check_choice,
    check_gradients,
    check_kernel,
    compiled_for_tpu,
    exported,
    mesh,
    naive,
    refused,
    run,
)

from tokeff.compat import interpret_tpu, races_found
from tokeff.kernels import cases as kernel_cases
from tokeff.kernels import gpu
from tokeff.kernels.cases import Case
from tokeff.kernels.flash_prefill import OP, backward, cases, flash_prefill, pallas_tpu, xla

RAGGED = Case("ragged", B=2, T=23, N=6, K=2, C=37, H=16)
SINKS = Case("window_sinks_softcap", B=2, T=40, N=4, K=2, C=70, H=16, window=9, sinks=3, softcap=2.0, ascending=True)
PROMPT = Case("prompt", T=150, N=4, K=2, C=300, H=32, ascending=True)
WIDE = Case("wide", T=20, N=2, K=1, C=150, H=128, ascending=True)
CASES = params((RAGGED, SINKS, PROMPT)) + params((SINKS, WIDE), ("bfloat16",))


def arrays_of(case, bad=np.nan):
    """A case with empty slots that hold NaN; shuffled ones with random bounds too, of which a query sees nothing."""
    return kernel_cases.arrays(case, empty=0.2, bad=bad) if case.ascending else ragged(case, bad=bad)


def call(case, a, shared=False, **more):
    """(arrays in the order implementations take, static options); nothing is promised unless `more` says so."""
    order = (None, a["order"][:, 0]) if shared else (a["order"], None)
    options = cases.options(case) | {"first": None, "window": None, "finite": False} | more
    return (a["q"], a["k"], a["v"], *order, a["lo"], a["hi"]), options


def attend(case, a, **more):
    positional, keys = cases.arguments(a)
    return flash_prefill(*positional, **keys, **(cases.options(case) | {"first": None, "window": None, "finite": False} | more))


def small_blocks(monkeypatch):
    """Many blocks in a small call."""
    monkeypatch.setattr(pallas_tpu, "ROWS", 32)
    monkeypatch.setattr(pallas_tpu, "SLOTS", 128)
    monkeypatch.setattr(gpu, "MAX_ROWS", 32)


@pytest.mark.core
@pytest.mark.parametrize("case", params((RAGGED, SINKS)))
def test_reference_is_the_definition(case):
    a = arrays_of(case)
    order, lo, hi = (np.asarray(a[name]) for name in ("order", "lo", "hi"))

    def see(b, t, head):
        at = order[b, head]
        return (at >= 0) & (at <= hi[b, t]) & ((at >= lo[b, t]) | (at < case.sinks))

    assert_close(run(OP, "reference", call(case, a)), naive(case, a, see), "float32")


@pytest.mark.core
@pytest.mark.parametrize("case", CASES)
def test_xla_equals_reference(case):
    made = call(case, arrays_of(case))
    assert_close(run(OP, "xla", made), run(OP, "reference", made), case.dtype)


@pytest.mark.core
@pytest.mark.parametrize(
    ("T", "C", "N", "K", "H"), [(1, 1, 1, 1, 2), (2, 9, 3, 1, 5), (257, 3, 2, 2, 8), (130, 131, 5, 5, 1)], ids=str
)
def test_awkward_shapes(T, C, N, K, H):
    made = call(Case("odd", B=1, T=T, N=N, K=K, C=C, H=H), ragged(Case("odd", B=1, T=T, N=N, K=K, C=C, H=H)))
    assert_close(run(OP, "xla", made), run(OP, "reference", made), "float32")


@pytest.mark.core
@pytest.mark.parametrize("case", params((SINKS, PROMPT)))
def test_promises_change_nothing(case, monkeypatch):
    """Ranges and blocks that `first` and `window` leave out are those nobody sees."""
    monkeypatch.setattr(xla, "SEGMENT", 32)
    monkeypatch.setattr(xla, "BLOCK", 16)
    a = kernel_cases.arrays(case)
    promised = call(case, a, first=case.C - case.T, window=case.window or None, finite=True)
    assert_close(run(OP, "xla", promised), run(OP, "reference", call(case, a)), "float32")
    *_, ranges = next(xla.segments(case.T, case.C, case.C - case.T, case.window or None, case.sinks))
    assert sum(end - start for start, end in ranges) < case.C


@pytest.mark.core
def test_heads_that_hold_the_same_rows_share_their_orders():
    a = kernel_cases.arrays(PROMPT)
    shared = flash_prefill(a["q"], a["k"], a["v"], a["order"][:, :1], a["lo"], a["hi"], **PROMPT.options)
    assert_close(shared, run(OP, "reference", call(PROMPT, a)), "float32")
    again = flash_prefill(a["q"], a["k"], a["v"], a["order"][:, :1], a["lo"], a["hi"], **PROMPT.options)
    assert all((x == y).all() for x, y in zip(shared, again))


@pytest.mark.core
@pytest.mark.parametrize("case", params((RAGGED, SINKS)))
def test_gradients_equal_the_references(case, monkeypatch):
    monkeypatch.setattr(xla, "SEGMENT", 32)
    monkeypatch.setattr(xla, "BLOCK", 16)
    a = arrays_of(case)
    arrays, options = call(case, a)
    promise = {"first": case.C - case.T, "window": case.window} if case.ascending else {}

    def public(q, k, v):
        return attend(case, a | {"q": q, "k": k, "v": v}, **promise)

    check_gradients(public, lambda *floats: OP.run["reference"](*floats, *arrays[3:], **options), arrays[:3])


@pytest.mark.core
def test_backward_pass_needs_no_second_forward():
    """What the forward pass kept is all it takes: output and log-sum-exp of any implementation."""
    a = arrays_of(RAGGED, bad=0.0)
    arrays, options = call(RAGGED, a)

    @jax.jit
    def both(arrays):
        outs, pull = jax.vjp(lambda *floats: OP.run["reference"](*floats, *arrays[3:], **options), *arrays[:3])
        ones = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), 1, 0).astype(x.dtype), outs)
        return backward(arrays, outs, ones, **options), pull(ones)

    assert_close(*both(arrays), "float32")


@pytest.mark.interp
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["pallas_tpu", "pallas_gpu"])
def test_kernels_equal_reference(case, name, monkeypatch):
    small_blocks(monkeypatch)
    check_kernel(OP, name, call(case, arrays_of(case)), case.dtype)


@pytest.mark.interp
@pytest.mark.parametrize("finite", [True, False])
def test_tpu_kernel_has_no_races_and_stays_in_bounds(finite, monkeypatch):
    small_blocks(monkeypatch)
    a = arrays_of(SINKS, bad=0.0 if finite else np.nan)
    check_kernel(OP, "pallas_tpu", call(SINKS, a, finite=finite), "float32", interpret_tpu())
    assert not races_found()


@pytest.mark.interp
@pytest.mark.parametrize("name", ["xla", "pallas_tpu", "pallas_gpu"])
def test_blocks_nobody_can_see_are_not_read(name, monkeypatch):
    """NaN in whole blocks before a window changes nothing although all rows are said to be finite: skipped, not masked."""
    small_blocks(monkeypatch)
    case = Case("skipped", T=40, N=2, K=1, C=512, H=16, window=60, ascending=True)
    a = kernel_cases.arrays(case)
    spoiled = a | {name: a[name].at[:, :, :384].set(jnp.nan) for name in ("k", "v")}
    promise = {"first": case.C - case.T, "window": case.window, "finite": True, "shared": True}
    how = {} if name == "xla" else {"interpret": True}
    clean, poisoned = (run(OP, name, call(case, x, **promise), **how) for x in (a, spoiled))
    for x, y in zip(clean, poisoned):
        np.testing.assert_array_equal(x, y)


@pytest.mark.interp
def test_lists_too_long_for_scalar_memory_are_cut(monkeypatch):
    small_blocks(monkeypatch)
    monkeypatch.setattr(pallas_tpu, "MAX_TABLE", 40)
    made = call(PROMPT, arrays_of(PROMPT))
    assert 1 < pallas_tpu._calls(*made[0][:2], None) <= pallas_tpu.MAX_CALLS
    check_kernel(OP, "pallas_tpu", made, "float32")
    monkeypatch.setattr(pallas_tpu, "MAX_CALLS", 1)
    assert "entries of scalar memory" in refused(OP, "pallas_tpu", made)


@pytest.mark.core
def test_shards_of_the_rows_merge():
    case = Case("mesh", B=2, T=6, N=4, K=2, C=32, H=16, window=9, sinks=2, ascending=True)
    a = kernel_cases.arrays(case)
    promised = {"first": case.C - case.T, "window": case.window}
    there = jax.jit(lambda a: attend(case, a, mesh=mesh(2, 2, 2), **promised))(a)
    assert_close(there, run(OP, "reference", call(case, a)), "float32")


@pytest.mark.core
def test_what_cannot_be_done_is_said_in_one_line():
    a = kernel_cases.structs(Case("refused", T=8, N=4, K=2, C=64, H=24))
    made = call(Case("refused"), a)
    assert "head size 24 in float32 is not one of" in refused(OP, "pallas_gpu", made)
    a = kernel_cases.structs(Case("refused", T=8, N=4, K=2, C=64, H=512))
    assert "head size 512 exceeds 256" in refused(OP, "pallas_tpu", call(Case("refused"), a))
    a = kernel_cases.structs(Case("refused", T=8, N=4, K=2, C=64, H=16, dtype="float16"))
    with pytest.raises(ValueError, match="flash_prefill: pallas_tpu does not support this call: q, k and v must all be"):
        jax.eval_shape(lambda a: attend(Case("refused"), a, implementation="pallas_tpu"), a)
    with pytest.raises(ValueError, match="are not BTNH, BKCH and BKC"):
        jax.eval_shape(lambda a: attend(Case("refused"), a | {"order": a["order"][:, :, 1:]}), a)


@pytest.mark.aot
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("case", cases.ACCELERATOR[:3:2], ids=lambda case: case.name)
def test_tpu_kernel_compiles(case, generation):
    assert "tpu_custom_call" in compiled_for_tpu(cases, flash_prefill, case, generation)


@pytest.mark.aot
@pytest.mark.parametrize("case", cases.ACCELERATOR[:4], ids=lambda case: case.name)
def test_gpu_kernel_lowers(case):
    assert TRITON in exported(cases, flash_prefill, case, "cuda", "pallas_gpu")


@pytest.mark.aot
def test_automatic_choice_follows_the_platform_compiled_for():
    check_choice(cases, flash_prefill, PROMPT)
