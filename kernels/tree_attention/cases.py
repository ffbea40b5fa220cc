"""Real shapes of tree_attention: drafts of 8 to 64 rows over a cache, of SmolLM2-135M and of an 8B model."""

from tokeff.kernels.cases import Case

CPU = (
    Case("smol_2k_tree8", C=2048, T=8, W=8),
    Case("smol_8k_tree32", C=8192, T=32, W=32),
)
ACCELERATOR = (
    Case("8b_8k_tree64", B=8, N=32, K=8, C=8192, H=128, T=64, W=64, dtype="bfloat16"),
    Case("8b_8k_tree16", B=8, N=32, K=8, C=8192, H=128, T=16, W=16, dtype="bfloat16"),
    Case("smol_odd", C=2001, T=5, W=9),
    Case("gemma2_4k_softcap", N=8, K=4, C=4096, H=256, T=16, W=16, softcap=50.0, dtype="bfloat16"),
)
CASES = CPU + ACCELERATOR


def arguments(a):
    """Return (positional, keyword) arguments of the op from the arrays, or structs, of a case."""
    return (a["q"], a["k"], a["v"], a["order"], a["lo"], a["hi"], a["k_draft"], a["v_draft"], a["among"]), {}


def options(case):
    """Return the static keyword arguments of the op. Slots of a store are finite, as the library promises."""
    return case.options | {"finite": True}


def floor_bytes(case):
    """Return the bytes the op cannot do without: K, V and order of the cache, K and V of the draft."""
    itemsize = 2 if case.dtype == "bfloat16" else 4
    return case.B * case.K * ((case.C + case.W) * 2 * case.H * itemsize + case.C * 4)


def flops(case):
    """Return the floating-point operations of both products."""
    return 4 * case.H * case.N * case.B * case.T * (case.C + case.W)
