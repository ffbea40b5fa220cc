"""Kascade's search from its definition: every set of anchors is tried."""

from itertools import combinations

import numpy as np
from oracles import model as oracle


def looked(m: oracle.Model, tokens):
    """([A of each query head] a layer, turned_L): attention and 1 - cosine of rows before and after attention is added."""
    rows, attention, turned = {order: m.embed(t) for order, t in enumerate(tokens)}, [], []
    for layer in range(m.cfg.L):
        s = oracle.Seen(sorted(rows), A=[{} for _ in range(m.cfg.N)])
        for order in s.orders:
            s.q[order], s.k[order], s.v[order] = m.qkv(layer, rows[order])
            s.rotated[order] = np.stack([m.rope(layer, k, order) for k in s.k[order]])
        angles = []
        for order in s.orders:
            out, x = oracle.attend_dense(m, layer, s, order), rows[order]
            y = x + np.einsum("dnh,nh->d", m.blocks[layer]["o_DNH"], out)
            angles.append(1 - x @ y / np.sqrt((x @ x) * (y @ y)))
            rows[order] = m.rest(layer, x, out)
        attention.append(s.A)
        turned.append(np.mean(angles))
    return attention, np.array(turned)


def alike(m: oracle.Model, attention, tokens, rows: int, recent: int, last: int):
    """[a][b][i][j]: how much of its own choice head j of layer b gives to what head i of layer a chooses, at the worst query."""
    L, K, n = m.cfg.L, m.cfg.K, len(tokens)

    def mass(layer, head, t):
        return {o: sum(attention[layer][head * m.G + g][t][o] for g in range(m.G)) for o in range(t + 1)}

    def chosen(layer, head, t):
        p = mass(layer, head, t)
        return sorted((o for o in p if o <= t - recent), key=lambda o: (-p[o], o))[:rows] + [o for o in p if o > t - recent]

    found = np.full((L, L, K, K), np.inf)
    for t in range(n - last, n):
        p = {(b, j): mass(b, j, t) for b in range(L) for j in range(K)}
        own = {key: chosen(*key, t) for key in p}
        for (a, i), mine in own.items():
            for (b, j), weight in p.items():
                share = sum(weight[o] for o in mine) / sum(weight[o] for o in own[b, j])
                found[a, b, i, j] = min(found[a, b, i, j], share)
    return found


def search(alike_LLKK, weight_L, count: int, dense):
    """(anchors, head map) by trying every set."""
    L, _, K, _ = alike_LLKK.shape
    free = [i for i in range(L) if i not in dense]

    def below(anchors, i):
        return max(a for a in anchors if a <= i)

    def worth(anchors):
        return sum(weight_L[i] * np.mean([max(alike_LLKK[below(anchors, i), i, :, j]) for j in range(K)]) for i in free)

    best = max(((free[0], *rest) for rest in combinations(free[1:], count - 1)), key=worth)
    heads = [
        tuple(range(K)) if i in dense or i in best else tuple(int(np.argmax(alike_LLKK[below(best, i), i, :, j])) for j in range(K))
        for i in range(L)
    ]
    return best, tuple(heads)
