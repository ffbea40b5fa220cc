"""What becomes of a video's rows, from the papers' formulas: loops over numpy arrays, float64. x_FPD: frames, their rows.

Everything returns {(frame, place): row}; the decoder reads them in this order.
"""

import itertools

import numpy as np
from oracles.visual import cosine


def alike(x_FPD, tau):
    """Which rows are like those of the next frame."""
    F, P = x_FPD.shape[:2]
    return np.array([[cosine(x_FPD[f, p], x_FPD[f + 1, p]) > tau for p in range(P)] for f in range(F - 1)], bool).reshape(F - 1, P)


def saved(like_EP, runs):
    """Rows that go when rows alike through a run become one."""
    return sum((end - start) * like_EP[start:end].all(axis=0).sum() for start, end in runs if end > start)


def every_cut(F):
    """All ways to cut F frames into runs (first, last)."""
    for marks in itertools.product((False, True), repeat=F - 1):
        ends = [i for i, cut in enumerate(marks) if cut] + [F - 1]
        yield list(zip([0, *(e + 1 for e in ends[:-1])], ends))


def best_runs(like_EP, longest):
    """The dynamic programme of HoliTom's released rule: runs of 1, 2, 3, ... frames, the first best one counts."""
    F = len(like_EP) + 1
    most, begins = [0] * F, list(range(F))
    for i in range(F):
        most[i] = most[i - 1] if i else 0
        for size in range(2, min(i + 1, longest) + 1):
            j = i - size + 1
            got = (most[j - 1] if j else 0) + saved(like_EP, [(j, i)])
            if got > most[i]:
                most[i], begins[i] = got, j
    runs, i = [], F - 1
    while i >= 0:
        runs.insert(0, (begins[i], i))
        i = begins[i] - 1
    return runs, most[-1]


def peaks(rows, near):
    """(logarithms of the scores of rows as centres by density peaks, distances); of equally dense rows the earlier is denser."""
    n = len(rows)
    d = np.array([[np.linalg.norm(a - b) for b in rows] for a in rows]) / rows[0].shape[0] ** 0.5
    dense = [-np.mean(np.sort(d[i])[:near] ** 2) for i in range(n)]
    apart = [min([d[i, j] for j in range(n) if (dense[j], -j) > (dense[i], -i)], default=d.max()) for i in range(n)]
    with np.errstate(divide="ignore"):
        return np.log(apart) + dense, d


def clusters(rows, count, near, beta):
    """{index of a centre: row} as in HoliTom."""
    if not count:
        return {}
    score, d = peaks(rows, min(near, count))
    centres = sorted(sorted(range(len(rows)), key=lambda i: (-score[i], i))[:count])
    joined = {c: [] for c in centres}
    for i in range(len(rows)):
        if i not in joined:
            joined[min(centres, key=lambda c: (d[i, c], c))].append(rows[i])
    return {c: beta * rows[c] + (1 - beta) * np.mean(joined[c], axis=0) if joined[c] else rows[c] for c in centres}


def holitom(x_FPD, a_FP, budget, tau, near=7, beta=0.6, longest=1024):
    """HoliTom before the decoder (Shao et al. 2025)."""
    F, P = x_FPD.shape[:2]
    like = alike(x_FPD, tau)
    runs, gone = best_runs(like, longest)
    share = min(budget * F * P / (F * P - gone), 1)
    out = {}
    for first, last in runs:
        still = [p for p in range(P) if last > first and like[first:last, p].all()]
        for f in range(first, last + 1):
            moving = [p for p in range(P) if p not in still]
            keep = int(np.ceil(len(moving) * share - 1e-9))
            for p in sorted(moving, key=lambda p: (-a_FP[f, p], p))[:keep]:
                out[f, p] = x_FPD[f, p]
        means = [x_FPD[first : last + 1, p].mean(axis=0) for p in still]
        for i, row in clusters(means, round(len(still) * share), near, beta).items():
            out[first, still[i]] = row
    return dict(sorted(out.items()))


def dycoke(x_FPD, drop):
    """DyCoke's temporal merging (Tao et al. 2025)."""
    F, P = x_FPD.shape[:2]
    keep = int((1 - drop) * P + 1e-9)

    def least(f, g):
        return sorted(range(P), key=lambda p: (cosine(x_FPD[f, p], x_FPD[g, p]), p))[:keep]

    kept = {f: range(P) for f in range(F)}
    for f in range(0, F - 1, 2):
        kept[f + 1] = least(f, f + 1)
    for f in range(0, F - 4, 4):
        kept[f + 2] = least(f, f + 2)
    return {(f, p): x_FPD[f, p] for f in range(F) for p in sorted(kept[f])}


def still_runs(x_FPD, tau):
    """Every place's rows averaged while each is like the next."""
    F, P = x_FPD.shape[:2]
    out = {}
    for p in range(P):
        f = 0
        while f < F:
            g = f
            while g + 1 < F and cosine(x_FPD[g, p], x_FPD[g + 1, p]) > tau:
                g += 1
            out[f, p] = x_FPD[f : g + 1, p].mean(axis=0)
            f = g + 1
    return dict(sorted(out.items()))


def frame_pairs(x_FPD, frames):
    """Means over neighbouring frames."""
    out = {}
    for f in range(0, len(x_FPD), frames):
        for p, row in enumerate(x_FPD[f : f + frames].mean(axis=0)):
            out[f, p] = row
    return out


def fastvid(x_FPD, a_FP, budget, context, segments, tau, every, beta):
    """FastVID (Shen et al. 2025), with the mean row as a frame's feature."""
    F, P = x_FPD.shape[:2]
    n = int(P * budget)
    few = int(n * context)
    looked = [sorted(range(P), key=lambda p: (-a_FP[f, p], p))[: n - few] for f in range(F)]
    out = {(f, p): x_FPD[f, p] for f in range(F) for p in looked[f]}
    rest = [[p for p in range(P) if p not in looked[f]] for f in range(F)]
    like = [cosine(x_FPD[f].mean(axis=0), x_FPD[f + 1].mean(axis=0)) for f in range(F - 1)]
    cuts = set(sorted(range(F - 1), key=lambda f: (like[f], f))[: segments - 1]) | {f for f in range(F - 1) if like[f] < tau}
    first = 0
    for last in [*sorted(cuts), F - 1]:
        length = last - first + 1
        anchors = [f for f in range(first, last + 1) if (last - f) % every == 0]
        everyone = [x_FPD[f, p] for f in range(first, last + 1) for p in rest[f]]
        for f in anchors:
            rows = [x_FPD[f, p] for p in rest[f]]
            score, _ = peaks(rows, 4)
            centres = sorted(range(len(rows)), key=lambda i: (-score[i], i))[: few * length // len(anchors)]
            got = {c: [] for c in centres}
            for row in everyone:
                if centres:
                    got[max(sorted(centres), key=lambda c: cosine(row, rows[c]))].append(row)
            for c in centres:
                w = max(beta, 1 / (len(got[c]) + 1))
                out[f, rest[f][c]] = w * rows[c] + (1 - w) * (np.mean(got[c], axis=0) if got[c] else 0)
        first = last + 1
    return dict(sorted(out.items()))
