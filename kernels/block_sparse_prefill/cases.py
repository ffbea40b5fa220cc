"""Real shapes of block_sparse_prefill: blocks of 64 rows, chosen at random; single rows as vertical-slash patterns take them."""

from tokeff.kernels.cases import Case

CPU = (
    Case("smol_4k_blocks8", C=4096, T=4096, page_size=64, blocks=8, ascending=True),
    Case("smol_4k_blocks4_rows128", C=4096, T=4096, page_size=64, blocks=4, rows=128, ascending=True),
)
ACCELERATOR = (
    Case("8b_16k_blocks16", N=32, K=8, C=16384, H=128, T=16384, page_size=64, blocks=16, dtype="bfloat16", ascending=True),
    Case("8b_8k_blocks8x128_rows256", N=8, K=2, C=8192, H=128, T=4096, page_size=128, blocks=8, rows=256, dtype="bfloat16", ascending=True),
    Case("smol_4k_blocks8_f32", C=4096, T=2048, page_size=64, blocks=8, ascending=True),
    Case("smol_odd", C=2001, T=721, page_size=16, blocks=5, rows=7, ascending=True),
)
CASES = CPU + ACCELERATOR


def arguments(a):
    """Return (positional, keyword) arguments of the op from the arrays, or structs, of a case."""
    return (a["q"], a["k"], a["v"], a["order"], a["lo"], a["hi"], a["block"]), {"row_BKM": a["row"]} if "row" in a else {}


def options(case):
    """Return the static keyword arguments of the op. Rows of a prompt are finite."""
    aligned = case.ascending and (case.C - case.T) % case.page_size == 0
    return case.options | {"size": case.page_size, "first": case.C - case.T if aligned else None, "finite": case.ascending}


def rows_read(case):
    """Return for each block of queries how many stored rows of one kv head it reads."""
    before = (case.C - case.T) // case.page_size
    return [min(case.blocks, before + q + 1) * case.page_size + case.rows for q in range(-(-case.T // case.page_size))]


def floor_bytes(case):
    """Return the bytes the op cannot do without: K and V of every row that is read, once; queries, output and log-sum-exp."""
    itemsize = 2 if case.dtype == "bfloat16" else 4
    stored = min(case.C, sum(rows_read(case)))
    return case.B * (case.K * stored * (2 * case.H * itemsize + 4) + case.T * case.N * (2 * case.H * itemsize + 4))


def flops(case):
    """Return the floating-point operations of both products over the rows that are read."""
    return 4 * case.H * case.N * case.B * case.page_size * sum(rows_read(case))
