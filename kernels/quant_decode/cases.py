"""Real shapes of quant_decode: KIVI's caches of SmolLM2-135M (9 / 3 heads of 64) and of an 8B model (32 / 8 heads of 128)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.kernels import cases


@dataclass(frozen=True)
class Case(cases.Case):
    """C slots in pages of `page_size` rows, keys with a zero and step a channel and page, values one for `group` numbers of a row."""

    page_size: int = 32
    bits: int = 4
    group: int = 32


CPU = (
    Case("smol_2k_int4", C=2048),
    Case("smol_8k_int4", C=8192),
    Case("smol_8k_int8", C=8192, bits=8),
    Case("smol_8k_int2_tree32", C=8192, T=32, bits=2),
)
ACCELERATOR = (
    Case("8b_8k_int4", B=8, N=32, K=8, C=8192, H=128, dtype="bfloat16"),
    Case("8b_32k_int8", B=8, N=32, K=8, C=32768, H=128, bits=8, dtype="bfloat16"),
    Case("8b_8k_int2_tree16", B=8, N=32, K=8, C=8192, H=128, T=16, bits=2, dtype="bfloat16"),
    Case("smol_odd_int4", C=2080),
)
CASES = CPU + ACCELERATOR


def structs(case):
    """Return {name: jax.ShapeDtypeStruct} of the arrays of a case."""
    B, T, N, K, H, R = case.B, case.T, case.N, case.K, case.H, case.page_size
    P, Z, Q = case.C // R, H * case.bits // 8, H // case.group
    floats = {"q": (B, T, N, H), "k_zero": (B, K, P, 1, H), "k_step": (B, K, P, 1, H), "v_zero": (B, K, P, R, Q), "v_step": (B, K, P, R, Q)}
    ints = {"order": (B, K, P, R), "lo": (B, T), "hi": (B, T)}
    groups = ((case.dtype, floats), ("uint8", {"k": (B, K, P, R, Z), "v": (B, K, P, R, Z)}), ("int32", ints))
    return {name: jax.ShapeDtypeStruct(s, dtype) for dtype, group in groups for name, s in group.items()}


def arrays(case, seed=0, empty=0.0, bad=0.0):
    """Return {name: array} of a case: random codes of rows in [-1, 1], and the T queries that follow them.

    A share `empty` of the rows, and of the pages whole, is empty; there zeros and steps are `bad`, and codes garbage.
    """
    rng = np.random.default_rng(seed)
    shape, most = {name: s.shape for name, s in structs(case).items()}, 2**case.bits - 1
    out = {name: rng.integers(0, 256, shape[name]) for name in ("k", "v")}
    for name in ("k", "v"):
        out[f"{name}_zero"] = -1 + 0.2 * rng.standard_normal(shape[f"{name}_zero"])
        out[f"{name}_step"] = (2 + 0.2 * rng.standard_normal(shape[f"{name}_step"])) / most
    gone = (rng.random(shape["order"]) < empty) | (rng.random(shape["order"][:3]) < empty)[..., None]
    out["order"] = np.where(gone, -1, np.arange(case.C).reshape(shape["order"][2:]))
    for name in ("zero", "step"):
        out[f"v_{name}"][gone] = bad
        out[f"k_{name}"][gone.all(-1)] = bad
    out |= {"q": rng.standard_normal(shape["q"]), "lo": np.zeros(shape["lo"])}
    out["hi"] = np.broadcast_to(case.C - case.T + np.arange(case.T), shape["hi"])
    return {name: jnp.asarray(out[name], s.dtype) for name, s in structs(case).items()}


def arguments(a):
    """Return (positional, keyword) arguments of the op from the arrays, or structs, of a case."""
    return tuple(a[name] for name in ("q", "k", "k_zero", "k_step", "v", "v_zero", "v_step", "order", "lo", "hi")), {}


def options(case):
    """Return the static keyword arguments of the op. Slots of a store are finite, as the library promises."""
    return case.options | {"finite": True}


def floor_bytes(case):
    """Return the bytes the op cannot do without: codes, zeros, steps and orders; the queries are nothing."""
    itemsize, numbers = jnp.dtype(case.dtype).itemsize, 2 * case.H // case.group + 2 * case.H / case.page_size
    return int(case.B * case.K * case.C * (2 * case.H * case.bits / 8 + numbers * itemsize + 4))


def flops(case):
    """Return the floating-point operations: two products, and a multiplication and an addition for every number that is read."""
    return 4 * case.B * case.K * case.C * case.H * (case.T * case.N // case.K + 1)
