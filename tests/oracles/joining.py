"""Token merging as ToMe states it (Bolya et al. 2023, sec. 3), row by row over explicit sets."""

import numpy as np


def cosine(a, b) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def one_round(groups, x, metric, r: int, protected: int, ordered: bool):
    """groups: for each row the set of input rows it stands for; x, metric: one vector of each input row.

    Every even row finds its most similar odd row; the r even rows with the best partners join them. A row's vector is the mean over the
    input rows it stands for. Returns the new groups in the order in which rows stand.
    """
    m = [np.mean([metric[i] for i in g], axis=0) for g in groups]
    A, B = (list(range(start, len(groups), 2)) for start in (0, 1))
    free = [b for b in B if b >= protected]
    edges = []
    for a in A:
        if a >= protected:
            b = max(free, key=lambda b: cosine(m[a], m[b]))
            edges.append((cosine(m[a], m[b]), a, b))
    joins = {a: b for _, a, b in sorted(edges, key=lambda e: -e[0])[:r]}
    new = {i: set(g) for i, g in enumerate(groups) if i not in joins}
    for a, b in joins.items():
        new[b] |= groups[a]
    first = [i for i in new if i < protected]
    rest = sorted(i for i in new if i >= protected)
    if not ordered:
        rest = [i for i in rest if i % 2 == 0] + [i for i in rest if i % 2]
    return [new[i] for i in first + rest]


def merged(x, metric, r: int, protected: int = 0, ordered: bool = False):
    """(groups, rows, sizes) with r rows fewer, at most half of them a round."""
    groups = [{i} for i in range(len(x))]
    while r:
        now = min(r, (len(groups) - protected) // 2)
        groups, r = one_round(groups, x, metric, now, protected, ordered), r - now
    return groups, np.array([np.mean([x[i] for i in sorted(g)], axis=0) for g in groups]), np.array([len(g) for g in groups])


def attention(q, k, v, groups):
    """Proportional attention (eq. 1) is attention over as many equal rows as each row stands for."""
    rows = [j for j, g in enumerate(groups) for _ in g]
    logits = q @ k[rows].T / np.sqrt(q.shape[-1])
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True) @ v[rows]


def joined(x, sizes, metric, r: int, protected: int = 0):
    """(rows, sizes) of one round over rows that stand for several already: means weigh each by its size, likeness does not."""
    groups = one_round([{i} for i in range(len(x))], x, metric, r, protected, ordered=False)
    sizes = np.array(sizes)
    rows = [sum(sizes[i] * x[i] for i in sorted(g)) / sum(sizes[i] for i in g) for g in groups]
    return np.array(rows), [int(sum(sizes[i] for i in g)) for g in groups]
