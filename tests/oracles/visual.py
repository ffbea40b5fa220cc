"""Choosing and merging patches of one picture, from the papers' formulas: loops over rows of numpy arrays, float64.

x_PD: rows of patches; a picture's other numbers are given as the method names them. Everything returns (rows, places); -1 is no place.
"""

import itertools

import numpy as np


def top(score, k):
    """The k best, earlier ones first among equals, in reading order."""
    return sorted(sorted(range(len(score)), key=lambda i: (-score[i], i))[:k])


def cosine(a, b):
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def fastervlm(x_PD, cls_NP, k):
    """The class row's attention, the mean over heads."""
    at = top(cls_NP.mean(axis=0), k)
    return x_PD[at], at


def divprune(x_PD, k):
    """Max-min diversity, greedily (Alvar et al. 2025, alg. 1)."""
    P = len(x_PD)
    d = np.array([[1 - cosine(a, b) for b in x_PD] for a in x_PD])
    chosen = [max(range(P), key=lambda i: (min(d[i, j] for j in range(P) if j != i), -i))]
    while len(chosen) < k:
        left = [i for i in range(P) if i not in chosen]
        chosen.append(max(left, key=lambda i: (min(d[i, j] for j in chosen), -i)))
    return x_PD[sorted(chosen)], sorted(chosen)


def diversity(x_PD, index):
    """The smallest cosine distance between two chosen rows."""
    return min(1 - cosine(x_PD[i], x_PD[j]) for i, j in itertools.combinations(index, 2))


def hiprune(x_PD, middle_P, deep_P, k, share, columns):
    """Anchors, buffers, registers (Liu et al. 2025); neighbours by number, clamped to the ends."""
    P = len(x_PD)
    chosen = set()
    for a in top(middle_P, round(share * k / 5)):
        chosen |= {min(max(a + step, 0), P - 1) for step in (0, -1, 1, -columns, columns)}
    for i in sorted(range(P), key=lambda i: (-deep_P[i], i)):
        if len(chosen) < k:
            chosen.add(i)
    at = sorted(chosen)
    return x_PD[at], at


def visionzip(x_SD, cls_NP, k_NPH, dominant, targets):
    """Dominant and contextual tokens (Yang et al. 2024, sec. 3.2). x_SD has the class row first; dominant counts it."""
    x_PD, metric = x_SD[1:], k_NPH.mean(axis=0)
    kept = top(cls_NP.mean(axis=0), dominant - 1)
    rest = [i for i in range(len(x_PD)) if i not in kept]
    step = max(1, len(rest) // targets)
    target = [rest[c * step] for c in range(targets)]
    got = {t: [] for t in target}
    for i in rest:
        if i not in got:
            likeness = [cosine(metric[i], metric[t]) for t in target]
            got[target[int(np.argmax(likeness))]].append(x_PD[i])
    merged = [x_PD[t] + (np.mean(got[t], axis=0) if got[t] else 0) for t in target]
    return np.array([x_SD[0], *x_PD[kept], *merged]), [-1, *kept, *target]


def quartile(score, share):
    """Between the two scores that the share of the ranks falls between."""
    ranked, at = sorted(score), share * (len(score) - 1)
    low = int(at)
    return ranked[low] + (at - low) * (ranked[min(low + 1, len(ranked) - 1)] - ranked[low])


def adaptive(score, most, plus):
    """The patches that PruMerge keeps: outliers by the distance of the quartiles; plus: and an even grid of them."""
    low, high = quartile(score, 0.25), quartile(score, 0.75)
    kept = {i for i, a in enumerate(score) if a > high + 1.5 * (high - low)} or set(top(score, 1))
    if plus:
        kept |= set(range(0, len(score) - 1, max(len(score) // len(kept) // 3, 1)))
    return sorted(sorted(kept, key=lambda i: (-score[i], i))[:most])


def prumerge(x_PD, q_D, k_SD, k, near, how="budget"):
    """LLaVA-PruMerge (Shang et al. 2024): one head of the whole width; k_SD has the class row first."""
    logits = k_SD @ q_D / len(q_D) ** 0.5
    a = np.exp(logits - logits.max())
    a = (a / a.sum())[1:]
    keys, kept = k_SD[1:], top(a, k) if how == "budget" else adaptive(a, k, how == "plus")
    rows = []
    for i in kept:
        others = [j for j in range(len(x_PD)) if j != i]
        close = sorted(others, key=lambda j: (-cosine(keys[i], keys[j]), j))[:near]
        rows.append(x_PD[i] + sum(a[j] * x_PD[j] for j in close))
    rows.append(sum(a[j] * x_PD[j] for j in range(len(x_PD)) if j not in kept))
    return np.array(rows), [*kept, -1]


def pooled(x_PD, grid, cells):
    """Means over cells from floor(i n / m) to ceil((i + 1) n / m), on both sides."""
    x, rows, places = x_PD.reshape(*grid, -1), [], []
    for i, j in np.ndindex(*cells):
        y, z = (slice(c * n // m, -(-(c + 1) * n // m)) for c, n, m in zip((i, j), grid, cells))
        rows.append(x[y, z].reshape(-1, x.shape[2]).mean(axis=0))
        places.append(y.start * grid[1] + z.start)
    return np.array(rows), places
