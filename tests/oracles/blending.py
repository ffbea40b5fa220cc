"""CacheBlend's selective recomputation in float64, one row at a time, from section 4 of the paper."""

from math import ceil

import numpy as np
from oracles import model as oracle


def chunked(model, tokens, sizes) -> list[dict]:
    """Of each layer {order in the whole prompt: (unrotated k_KH, v_KH)} of chunks of these sizes, each prefilled as a text of its own."""
    loaded, start = [{} for _ in range(model.cfg.L)], 0
    for size in sizes:
        seen, _ = oracle.prefill(model, tokens[start : start + size])
        for layer, s in zip(loaded, seen, strict=True):
            layer |= {start + order: (s.k[order], s.v[order]) for order in s.orders}
        start += size
    return loaded


def taken(model, earlier, source) -> list[dict]:
    """The same of the rows `source` names in an earlier prompt; -1 for none."""
    seen, _ = oracle.prefill(model, earlier)
    return [{t: (s.k[a], s.v[a]) for t, a in enumerate(source) if a >= 0} for s in seen]


def blend(model, tokens, loaded, share: float, check: int, sure):
    """(rows [layer]{order: (rotated k_KH, v_KH)}, logits, recomputed orders). sure: the orders computed in any case."""
    rows, found, n = {t: model.embed(token) for t, token in enumerate(tokens)}, [], len(tokens)
    chosen = set(range(n))
    for layer in range(model.cfg.L):
        held = {} if layer <= check else dict(loaded[layer])
        q = {}
        for t in sorted(chosen):
            q[t], k, v = model.qkv(layer, rows[t])
            held[t] = (k, v)
        if layer == check:
            free = [t for t in range(n) if t not in sure]
            deviation = {t: np.square(held[t][1] - loaded[layer][t][1]).sum() for t in free}
            chosen = set(sure) | set(sorted(free, key=lambda t: -deviation[t])[: ceil(share * len(free) - 1e-9)])
        rotated = {t: (np.stack([model.rope(layer, k, t) for k in ks]), v) for t, (ks, v) in held.items()}
        rows = {t: model.rest(layer, rows[t], attend(model, layer, rotated, q[t], t)) for t in chosen}
        found.append(rotated)
    return found, model.logits(rows[n - 1]), chosen


def attend(model, layer, rotated, q_NH, t):
    """out_NH of the row at order t over every row up to itself, computed or loaded."""
    out, lo = np.zeros(q_NH.shape), model.oldest(layer, t)
    for n in range(model.cfg.N):
        q, g = model.rope(layer, q_NH[n], t), n // model.G
        p = oracle.softmax({o: model.dot(q, k[g]) for o, (k, _) in rotated.items() if lo <= o <= t})
        out[n] = sum(w * rotated[o][1][g] for o, w in p.items())
    return out
