"""Real shapes of flash_prefill: whole prompts and chunks, of SmolLM2-135M (9 / 3 heads of 64) and of an 8B model (32 / 8 of 128)."""

from tokeff.kernels.cases import Case

CPU = (
    Case("smol_2k_prompt", C=2048, T=2048, ascending=True),
    Case("smol_8k_chunk512", C=8192, T=512, ascending=True),
    Case("smol_4k_window512", C=4096, T=4096, window=512, ascending=True),
)
ACCELERATOR = (
    Case("8b_8k_prompt", N=32, K=8, C=8192, H=128, T=8192, dtype="bfloat16", ascending=True),
    Case("8b_8k_prompt_f32", N=8, K=2, C=8192, H=128, T=2048, ascending=True),
    Case("smol_odd", C=2001, T=700),
    Case("smol_4k_window512_sinks4", C=4096, T=4096, window=512, sinks=4, dtype="bfloat16", ascending=True),
    Case("gemma2_4k_softcap", N=8, K=4, C=4096, H=256, T=2048, softcap=50.0, dtype="bfloat16", ascending=True),
)
CASES = CPU + ACCELERATOR


def arguments(a):
    """Return (positional, keyword) arguments of the op from the arrays, or structs, of a case."""
    return (a["q"], a["k"], a["v"], a["order"], a["lo"], a["hi"]), {}


def options(case):
    """Return the static keyword arguments of the op. Rows of a prompt are finite, and lie where they come in the text."""
    promise = {"first": case.C - case.T, "window": case.window or None} if case.ascending else {"first": None, "window": None}
    return case.options | promise | {"sinks": case.sinks, "finite": case.ascending}


def pairs(case):
    """Return how many stored rows the queries of one head see, all together."""
    spans = range(case.C - case.T + 1, case.C + 1)
    return sum(min(n, case.window + case.sinks) if case.window else n for n in spans)


def floor_bytes(case):
    """Return the bytes the op cannot do without: K, V and order once, queries, output and log-sum-exp."""
    itemsize = 2 if case.dtype == "bfloat16" else 4
    return case.B * (case.K * case.C * (2 * case.H * itemsize + 4) + case.T * case.N * (2 * case.H * itemsize + 4))


def flops(case):
    """Return the floating-point operations of both products, of the pairs that see each other."""
    return 4 * case.H * case.N * case.B * pairs(case)
