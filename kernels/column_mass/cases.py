"""Real shapes of column_mass: one decoded row (TOVA, H2O), the last 64 rows (SnapKV), a prefill chunk (H2O)."""

from tokeff.kernels.cases import Case

CPU = (
    Case("smol_2k_row", C=2048),
    Case("smol_8k_row", C=8192),
    Case("smol_8k_window64", C=8192, T=64),
    Case("smol_2k_chunk512", C=2048, T=512),
)
ACCELERATOR = (
    Case("smol_8k_chunk2048", C=8192, T=2048),
    Case("8b_8k_row", B=8, N=32, K=8, C=8192, H=128, dtype="bfloat16"),
    Case("8b_8k_chunk2048", B=1, N=32, K=8, C=8192, H=128, T=2048, dtype="bfloat16"),
    Case("smol_odd", C=2001, T=70),
    Case("gemma2_4k_softcap", N=8, K=4, C=4096, H=256, T=256, softcap=50.0, dtype="bfloat16"),
)
CASES = CPU + ACCELERATOR


def arguments(a):
    """Return (positional, keyword) arguments of the op from the arrays, or structs, of a case."""
    return (a["q"], a["k"], a["lse"], a["order"], a["lo"], a["hi"], a["weight"]), {}


def options(case):
    """Return the static keyword arguments of the op."""
    return case.options


def floor_bytes(case):
    """Return the bytes the op cannot do without: K and order once, the queries once, the mass written."""
    itemsize = 2 if case.dtype == "bfloat16" else 4
    return case.B * (case.K * case.C * (case.H * itemsize + 8) + case.T * case.N * (case.H * itemsize + 4))


def flops(case):
    """Return the floating-point operations of the product, of the pairs that see each other."""
    return 2 * case.H * case.N * case.B * (case.T * (case.C - case.T) + case.T * (case.T + 1) // 2)
