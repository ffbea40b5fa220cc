"""Real shapes of decode_attention: SmolLM2-135M (9 / 3 heads of 64) on CPU, an 8B model (32 / 8 heads of 128)."""

from tokeff.kernels.cases import Case

CPU = (
    Case("smol_2k", C=2048),
    Case("smol_8k", C=8192),
    Case("smol_8k_tree32", C=8192, T=32),
    Case("smol_8k_rows1024", C=8192, M=1024),
    Case("smol_8k_pages64x16", C=8192, M=64, page_size=16),
    Case("smol_32k_pages205x16", C=32768, M=205, page_size=16),  # a tenth
)
ACCELERATOR = (
    Case("8b_8k", B=8, N=32, K=8, C=8192, H=128, dtype="bfloat16"),
    Case("8b_8k_tree64", B=8, N=32, K=8, C=8192, H=128, T=64, dtype="bfloat16"),
    Case("8b_8k_pages64x16", B=8, N=32, K=8, C=8192, H=128, M=64, page_size=16, dtype="bfloat16"),
    Case("8b_32k_pages205x16", B=2, N=32, K=8, C=32768, H=128, M=205, page_size=16, dtype="bfloat16"),
    Case("8b_32k_pages32x64", B=8, N=32, K=8, C=32768, H=128, M=32, page_size=64, dtype="bfloat16"),
    Case("smol_8k_f32", C=8192),
    Case("smol_odd", C=2001),
    Case("smol_8k_pages8x128", C=8192, M=8, page_size=128, dtype="bfloat16"),
    Case("gemma2_4k_softcap", N=8, K=4, C=4096, H=256, softcap=50.0, dtype="bfloat16"),
)
CASES = CPU + ACCELERATOR
SELECTS = "page_BKM"  # the argument without which every slot is read


def arguments(a):
    """Return (positional, keyword) arguments of the op from the arrays, or structs, of a case."""
    keys = {name: a[key] for name, key in (("page_BKM", "page"), ("bias_BKC", "bias")) if key in a}
    return (a["q"], a["k"], a["v"], a["order"], a["lo"], a["hi"]), keys


def options(case):
    """Return the static keyword arguments of the op. Slots of a store are finite, as the library promises."""
    return case.options | {"page_size": case.page_size, "finite": True}


def floor_bytes(case):
    """Return the bytes the op cannot do without: K, V and order of the slots read; the queries are nothing."""
    itemsize = 2 if case.dtype == "bfloat16" else 4
    return case.B * case.K * case.slots_read * (2 * case.H * itemsize + 4)


def flops(case):
    """Return the floating-point operations of both products."""
    return 4 * case.H * case.N * case.B * case.T * case.slots_read
