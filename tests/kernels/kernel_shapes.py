"""Odd shapes: for every op one strategy of small calls inside the limits of an implementation, for hypothesis to draw from.

Each function takes `pick` (a name and choices: a tuple of them, or a range) and the implementation, and returns a case.
"""

import numpy as np
from hypothesis import strategies as st
from kernel_calls import ragged
from kernel_ops import PUBLIC, poisoned

from tokeff.kernels import cases as kernel_cases
from tokeff.kernels import decode_attention
from tokeff.kernels.cases import Case

# Head sizes that an implementation takes: any; any (128 lies another way in memory than the others); powers of two.
WIDTHS = {"xla": (1, 5, 16, 33, 64), "pallas_tpu": (3, 16, 40, 64, 128), "pallas_gpu": (16, 32, 64)}
LONG = (*range(1, 70), 513, 530)  # more than one block of slots of every kernel; rarely drawn


def heads(pick, which):
    """Return sizes of batch and heads, {B, K, N, H, softcap}."""
    K = pick("K", range(1, 4))
    sizes = {"B": pick("B", (1, 2)), "K": K, "N": K * pick("G", range(1, 5)), "H": pick("H", WIDTHS[which])}
    return sizes | {"softcap": pick("softcap", (0.0, 2.5))}


def tile(which, H):
    """Return the slots of the smallest page that an implementation reads in float32."""
    return 1 if which != "pallas_tpu" else 8 if H % 128 == 0 else 128


def decode(pick, which):
    sizes, C = heads(pick, which), pick("C", LONG)
    page_size = tile(which, sizes["H"]) * pick("tiles", (1, 2, 5) if which == "xla" else (1, 2))
    return Case("odd", **sizes, T=pick("T", range(1, 7)), C=C, M=pick("M", range(min(4, -(-C // page_size)) + 1)), page_size=page_size)


def mass(pick, which):
    return Case("odd", **heads(pick, which), T=pick("T", range(1, 10)), C=pick("C", LONG))


def tree(pick, which):
    W = pick("W", range(1, 12))
    return Case("odd", **heads(pick, which), T=pick("T", range(1, W + 1)), W=W, C=pick("C", LONG))


def prompt(pick, which):
    T, window = pick("T", (*range(1, 40), 140)), pick("window", (0, 0, 5, 20))
    sinks = pick("sinks", (0, 3)) if window else 0
    return Case("odd", **heads(pick, which), T=T, C=T + pick("before", LONG) - 1, window=window, sinks=sinks, ascending=True)


def blocks(pick, which):
    size = pick("size", (1, 5, 16) if which != "pallas_tpu" else (8, 24))
    T = pick("T", range(1, 40))
    C = T + pick("before", (0, 0, size, 3 * size, 7))
    read = {"page_size": size, "blocks": pick("blocks", range(1, 5)), "rows": min(C, pick("rows", (0, 1, 6)))}
    return Case("odd", **heads(pick, which), **read, T=T, C=C, ascending=True)


def coded(pick, which):
    sizes = heads(pick, "pallas_gpu") | {"bits": pick("bits", (2, 4, 8))}
    sizes["H"] = {2: 64, 4: 32, 8: 16}[sizes["bits"]] * pick("times", (1, 2))
    page_size = pick("page_size", (1, 3, 8, 32) if which != "pallas_tpu" else (3, 8, 32))
    C = page_size * pick("pages", (*range(1, 9), 131))
    return PUBLIC["quant_decode"][1].Case("odd", **sizes, T=pick("T", range(1, 4)), C=C, page_size=page_size, group=pick("group", (8, 16)))


def pages(pick, which):
    sizes, page_size, C = heads(pick, which), pick("page_size", (1, 3, 16)), pick("C", LONG)
    of = {"chunks": pick("chunks", (1, 2, 3)), "summaries": pick("summaries", (1, 2))}
    M = pick("M", range(1, min(9, -(-C // page_size)) + 1))
    return PUBLIC["page_scores"][1].Case("odd", **sizes, **of, T=pick("T", range(1, 6)), C=C, M=M, page_size=page_size)


def rows(pick, which):
    sizes = heads(pick, which)
    C = pick("C", range(1, 40)) * (tile(which, sizes["H"]) if which == "pallas_tpu" and sizes["H"] == 128 else 1)
    C = C if which != "pallas_tpu" or sizes["H"] == 128 else pick("tiles", (1, 2, 3)) * 128
    W = pick("W", (0, 1, 7, 20))
    return PUBLIC["compact_rows"][1].Case("odd", **sizes, C=C, W=W, M=pick("M", range(1, min(C, W or 20) + 1)))


def lowrank(pick, which):
    sizes, page_size, P = heads(pick, which), pick("page_size", (1, 4, 8)), pick("P", range(1, 9))
    sizes["H"] = pick("width", {"xla": (2, 10, 64), "pallas_tpu": (6, 32, 64), "pallas_gpu": (32, 64)}[which])
    M, more = pick("M", range(1, P + 1)), pick("more", range(page_size))
    return PUBLIC["lowrank_scores"][1].Case(
        "odd", **sizes, T=pick("T", (1, 2)), C=P * page_size + more, M=M, page_size=page_size, rank=pick("Y", (1, 7, 20))
    )


def prefix(pick, which):
    sizes, J = heads(pick, which), pick("J", (1, 2, 3))
    sizes["B"] = J * pick("sequences", range(1, 6))
    return PUBLIC["shared_prefix"][1].Case("odd", **sizes, J=J, T=pick("T", (1, 2)), C=pick("C", LONG))


def match(pick, which):
    S = pick("S", (*range(2, 60), 530))
    return PUBLIC["bipartite_match"][1].Case(
        "odd", B=pick("B", (1, 2)), S=S, H=pick("H", (1, 7, 30)), protected=pick("protected", range(min(S, 4)))
    )


def centre(pick, which):
    P = pick("P", range(1, 60))
    return PUBLIC["k_centre"][1].Case("odd", B=pick("B", (1, 2)), P=P, M=pick("M", range(1, P + 1)))


CASES = {
    "decode_attention": decode, "column_mass": mass, "tree_attention": tree, "flash_prefill": prompt, "block_sparse_prefill": blocks,
    "quant_decode": coded, "page_scores": pages, "compact_rows": rows, "lowrank_scores": lowrank, "shared_prefix": prefix,
    "bipartite_match": match, "k_centre": centre,
}  # fmt: skip
PROMISE = ("decode_attention", "tree_attention", "flash_prefill", "block_sparse_prefill", "quant_decode", "shared_prefix")


@st.composite
def calls(draw, op, which):
    """Draw (case, its arrays, options to change). What is unseen holds NaN, or finite numbers where that is promised."""
    case = CASES[op](lambda name, choices: draw(st.sampled_from(choices), label=name), which)
    seed, finite = draw(st.integers(0, 2**16), label="seed"), draw(st.booleans(), label="finite")
    more = {"finite": finite} if op in PROMISE else {}
    if op.endswith("prefill"):
        if not finite:  # nothing else is promised then either
            more |= {"first": None} | ({"window": None} if op == "flash_prefill" else {})
        return case, kernel_cases.arrays(case, seed, *(() if finite else (0.2, np.nan))), more
    bad = 0.0 if finite else np.nan
    a = ragged(case, seed, bad) if op in ("decode_attention", "tree_attention", "column_mass") else poisoned(op, case, seed, bad)
    if op == "column_mass":
        a["lse"] = decode_attention(*(a[x] for x in ("q", "k", "v", "order", "lo", "hi")), **case.options)[1]
    return case, a, more

