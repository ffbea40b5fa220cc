"""decode_attention off the accelerator: the definition, the XLA path, gradients, merging, refusals."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_calls import PAGED, SMALL, assert_close, attention_call, biased, naive_attention, params, ragged

from tokeff.kernels import cases as kernel_cases
from tokeff.kernels import decode_attention, merge
from tokeff.kernels.cases import Case
from tokeff.kernels.decode_attention import cases, reference, xla

pytestmark = pytest.mark.core


def attend(case, a, implementation=None, **more):
    positional, keys = cases.arguments(a)
    return decode_attention(*positional, **keys, **(cases.options(case) | {"finite": False} | more), implementation=implementation)


@pytest.mark.parametrize("case", params(SMALL + PAGED))
def test_reference_is_the_definition(case):
    a = ragged(case)
    assert_close(attend(case, a, "reference"), naive_attention(case, a), "float32")


@pytest.mark.parametrize("case", params(SMALL + PAGED, ("float32", "bfloat16")))
def test_xla_equals_reference(case):
    a = ragged(case)
    out, lse = attend(case, a, "xla")
    assert out.dtype == a["q"].dtype and lse.dtype == jnp.float32
    assert_close((out, lse), attend(case, a, "reference"), case.dtype)


@pytest.mark.parametrize("case", params(SMALL + PAGED))
def test_bias_is_added_to_the_scores(case):
    """A slot that stands for several rows draws what all of them would: log of their number, on top of its score."""
    a = biased(case)
    assert_close(attend(case, a, "reference"), naive_attention(case, a), "float32")
    assert_close(attend(case, a, "xla"), attend(case, a, "reference"), "float32")
    assert_close(attend(case, a), attend(case, a, "reference"), "float32")


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu", "interpret"])
def test_kernels_leave_a_bias_to_xla(implementation):
    with pytest.raises(ValueError, match="a bias of stored rows"):
        attend(SMALL[0], biased(SMALL[0]), implementation)


def test_automatic_choice_is_xla_on_cpu_and_repeats_bit_for_bit():
    case = SMALL[1]
    a = ragged(case)
    first, again, named = attend(case, a), attend(case, a), attend(case, a, "xla")
    for x, y, z in zip(first, again, named):
        assert (x == y).all() and (x == z).all()


def test_query_that_sees_nothing_returns_zero_and_minus_infinity():
    case = SMALL[1]
    a = ragged(case)
    a["hi"] = a["lo"] - 1
    for implementation in ("reference", "xla"):
        out, lse = attend(case, a, implementation)
        assert (out == 0).all() and (lse == -jnp.inf).all()


def test_blocks_of_tokens_change_nothing(monkeypatch):
    case = SMALL[3]
    arrays, options = attention_call(case, ragged(case))
    whole = xla.run(*arrays, **options)
    monkeypatch.setattr(xla, "BLOCK_ROWS", 14)
    monkeypatch.setattr(xla, "BLOCK_SCORES", 1)
    assert xla.block_tokens(arrays[0], arrays[1]) == 7  # 40 tokens do not divide by 7
    assert_close(xla.run(*arrays, **options), whole, "float32")


@pytest.mark.parametrize("case", params((SMALL[1], SMALL[2], PAGED[0], PAGED[2])))
def test_gradients_equal_the_references(case):
    arrays, options = attention_call(case, ragged(case))
    a = ragged(case)

    def loss(f, q, k, v):
        out, lse = f(q, k, v)
        return jnp.sin(out).sum() + jnp.where(lse == -jnp.inf, 0, jnp.cos(lse)).sum()

    def public(q, k, v):
        return attend(case, a | {"q": q, "k": k, "v": v})

    def definition(q, k, v):
        return reference.run(q, k, v, *arrays[3:], **options)

    got, want = (jax.jit(jax.grad(partial(loss, f), (0, 1, 2)))(*arrays[:3]) for f in (public, definition))
    assert_close(got, want, "float32")
    assert all(jnp.isfinite(x).all() for x in got)


def test_merged_parts_equal_the_whole():
    case = SMALL[1]
    a = ragged(case)
    left, right = ({n: x[:, :, part] if n in ("k", "v", "order") else x for n, x in a.items()} for part in HALVES)
    whole, parts = attend(case, a), (*attend(case, left), *attend(case, right))
    assert_close(merge(*parts), whole, "float32")
    nothing = jnp.zeros_like(whole[0]), jnp.full_like(whole[1], -jnp.inf)
    assert_close(merge(*whole, *nothing), whole, "float32")
    assert_close(merge(*nothing, *nothing), nothing, "float32")


HALVES = slice(0, 11), slice(11, None)


@pytest.mark.parametrize(
    ("change", "implementation", "message"),
    [
        ({"M": 3, "page_size": 3, "H": 128}, "pallas_tpu", "page_size 3 is not a multiple of 8"),
        ({"M": 3, "page_size": 8, "dtype": "bfloat16", "H": 128}, "interpret", "page_size 8 is not a multiple of 16"),
        ({"M": 3, "page_size": 16}, "interpret", "page_size 16 is not a multiple of 128"),
        ({"M": 1, "page_size": 8192, "H": 128, "C": 8192}, "pallas_tpu", "page_size 8192 times 128"),
        ({"M": 2**14, "page_size": 128, "C": 2**21, "B": 4, "H": 1}, "pallas_tpu", "a table of 131072 pages exceeds"),
        ({"T": 600}, "pallas_tpu", "1200 query rows a kv head exceed"),
        ({"H": 24}, "pallas_gpu", "head size 24 in float32 is not one of"),
        ({"dtype": "float16"}, "pallas_tpu", "all be float32 or all bfloat16"),
        ({}, "cuda", "implementation 'cuda' is unknown"),
    ],
)
def test_what_an_implementation_cannot_do_is_said_in_one_line(change, implementation, message):
    case = Case(**{"name": "refused", "N": 4, "K": 2, "C": 64, "H": 16, **change})
    with pytest.raises(ValueError, match=message) as error:
        jax.eval_shape(lambda a: attend(case, a, implementation), kernel_cases.structs(case))
    assert "\n" not in str(error.value)


def test_shapes_that_do_not_fit_are_named():
    case = SMALL[0]
    a = ragged(case)
    with pytest.raises(ValueError, match="are not BTNH, BKCH and BKC"):
        attend(case, a | {"order": a["order"][:, :, 1:]})
    with pytest.raises(ValueError, match="must both be"):
        attend(case, a | {"lo": a["lo"][0]})
    with pytest.raises(ValueError, match="must have the same shape"):
        attend(case, a | {"v": a["v"][:, :, 1:]})


def test_falling_to_the_next_is_logged_once(caplog):
    case = Case("logged", N=2, K=2, C=21, H=24)
    with caplog.at_level("INFO", logger="tokeff.kernels"):
        for seed in range(3):
            attend(case, ragged(case, seed))
    said = [r.message for r in caplog.records if "head size 24" in r.message]
    assert len(said) == 1 and "pallas_gpu does not support this call" in said[0]
    assert np.isfinite(attend(case, ragged(case))[0]).all()
