"""Attention over shared rows, from the definition: one softmax over everything a query may see, one query head at a time, in float64."""

import numpy as np


def attend(q_NH, rows, G: int, scale: float, lo: int, hi: int, certain=()):
    """[N, H] output of one query. rows: (order, k_KH, v_KH) of every row of its path through the tree, its own included; seen are those
    with lo <= order <= hi, and those whose order is named in `certain` (draft ancestors), if not below lo."""
    seen = [(k, v) for order, k, v in rows if lo <= order <= hi or (order in certain and order >= lo)]
    out = np.zeros(q_NH.shape)
    for n, q in enumerate(q_NH.astype(np.float64)):
        if not seen:
            continue
        logits = np.array([q @ k[n // G].astype(np.float64) * scale for k, _ in seen])
        weight = np.exp(logits - logits.max())
        out[n] = sum(w * v[n // G] for w, (_, v) in zip(weight / weight.sum(), seen, strict=True))
    return out
