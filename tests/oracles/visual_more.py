"""Rules that choose, cut and merge patches of one picture, from the papers' formulas: loops over numpy arrays, float64.

Everything returns (rows, places) unless it says otherwise.
"""

from fractions import Fraction

import numpy as np
from oracles.tower import block, embed
from oracles.visual import cosine, top


def flowcut(params, cfg, pixels, layers, M, keep=0.5, every=2):
    """FlowCut (Tong et al. 2025): rows are taken out of the tower for good."""
    x, left, running = embed(params, cfg, pixels), list(range(cfg.patches)), {}
    last, found = max(layers) - 1, {}
    for i in range(max(layers) + 1):
        x, p, v, _, _ = block(params.blocks[i], cfg, x)
        found[i] = dict(zip(left, x[1:]))
        if i > last:
            continue
        a = p[:, 0, 1:].mean(axis=0)
        a = a / a.sum()
        like = np.array([[np.exp(head[0] @ row) for row in head] for head in v])
        like = (like / like.sum(axis=1, keepdims=True)).mean(axis=0)[1:]
        like = like / like.sum()
        score = (a + like) * np.abs(v.mean(axis=0)[1:]).sum(axis=1)
        running = {t: keep * running[t] + (1 - keep) * s if t in running else s for t, s in zip(left, score)}
        n, N = last - i, len(left)
        if n % every or N <= M:
            continue
        ratio = -(a * np.log(a)).sum() / np.log(N)
        gone = N - M if n == 0 else round((N - M) / n**0.5 * (1 - ratio**2))
        stay = sorted(sorted(left, key=lambda t: (-running[t], t))[: max(N - gone, M)])
        x = np.array([x[0], *(x[1 + left.index(t)] for t in stay)])
        left = stay
    return np.array([np.concatenate([found[i][t] for i in layers]) for t in left]), left


def mustdrop(params, cfg, pixels, layers, like, window):
    """MustDrop (Liu et al. 2024): windows behind the first layer."""
    x, left = embed(params, cfg, pixels), list(range(cfg.patches))
    found, columns = {}, cfg.grid[1]
    for i in range(max(layers) + 1):
        x, *_ = block(params.blocks[i], cfg, x)
        if i == 0:
            rows = {t: r for t, r in zip(left, x[1:])}
            for y in range(0, cfg.grid[0], window[0]):
                for z in range(0, columns, window[1]):
                    inside = [(y + a) * columns + z + b for a in range(window[0]) for b in range(window[1])]
                    pairs = [cosine(rows[s], rows[t]) for s in inside for t in inside if s != t]
                    if np.mean(pairs) >= like:
                        rows[inside[0]] = np.mean([rows[t] for t in inside], axis=0)
                        for t in inside[1:]:
                            del rows[t]
            left = sorted(rows)
            x = np.array([x[0], *(rows[t] for t in left)])
        found[i] = x[1:]
    return np.concatenate([found[i] for i in layers], axis=1), left


def context(q_NSH, k_NSH, above):
    """VFlowOpt's context relevance of all rows (Yang et al. 2025)."""
    p = np.exp(np.einsum("nsh,nth->nst", q_NSH, k_NSH) / q_NSH.shape[2] ** 0.5)
    p = (p / p.sum(axis=2, keepdims=True)).mean(axis=0)
    received = p.mean(axis=0)
    asks = [i for i in range(len(received)) if received[i] > above * received.mean()] or [int(received.argmax())]
    return np.mean([p[i] for i in asks], axis=0)


def bits(patch_I):
    """Entropy of one patch's levels."""
    n, total = len(patch_I), 0.0
    for level in set(patch_I.tolist()):
        share = (patch_I == level).sum() / n
        total -= share * np.log2(share)
    return total


def vflowopt(x_PD, score_P, M, grid, cell):
    """Keep, and merge by cells (Yang et al. 2025, sec. 3.2)."""
    P = len(x_PD)
    low = sorted(range(P), key=lambda i: (score_P[i], i))[: P - M + int(P / cell**2)]
    rows = {i: x_PD[i] for i in range(P) if i not in low}
    for y in range(int(np.ceil(grid[0] / cell))):
        for z in range(int(np.ceil(grid[1] / cell))):
            inside = [i for i in sorted(low) if (i // grid[1]) // cell == y and (i % grid[1]) // cell == z]
            if inside:
                weight = score_P[inside] / score_P[inside].sum()
                rows[inside[int(score_P[inside].argmax())]] = weight @ x_PD[inside]
    at = sorted(rows)
    return np.array([rows[i] for i in at]), at


def todre(x_PD, k, total):
    """Greedy max-sum or k-centre; the first row is the one farthest from all (Li et al. 2025)."""
    P = len(x_PD)
    d = np.array([[1 - cosine(a, b) for b in x_PD] for a in x_PD])
    chosen = [int(d.sum(axis=1).argmax())]
    while len(chosen) < k:
        left = [i for i in range(P) if i not in chosen]
        far = [(sum if total else min)(d[i, j] for j in chosen) for i in left]
        chosen.append(left[int(np.argmax(far))])
    return x_PD[sorted(chosen)], sorted(chosen)


def vispruner(x_PD, a_P, M, share, step):
    """Attention, then the removal of duplicates (Zhang et al. 2025, sec. 3.3)."""
    order = sorted(range(len(a_P)), key=lambda i: (-a_P[i], i))
    A = int(M * share)
    kept, rest = order[:A], order[A:]
    while len(rest) > M - A > 0:
        r = min(step, len(rest) - (M - A), (len(rest) + 1) // 2)
        even, odd = rest[::2], rest[1::2]
        likeness = {i: max(cosine(x_PD[i], x_PD[j]) for j in odd) for i in even}
        even = sorted(even, key=lambda i: (-likeness[i], rest.index(i)))
        rest = even[r:] + odd
    at = sorted(kept + rest[: M - A])
    return x_PD[at], at


def relevance(x_PD, text_TD):
    """The mean cosine with the text's rows, scaled to 0..1."""
    r = np.array([np.mean([cosine(x, t) for t in text_TD]) for x in x_PD])
    return (r - r.min()) / (r.max() - r.min())


def cdpruner(x_PD, r_P, M):
    """The greedy set of largest log determinant (Zhang et al. 2025)."""
    P = len(x_PD)
    kernel = np.array([[r_P[i] * cosine(x_PD[i], x_PD[j]) * r_P[j] for j in range(P)] for i in range(P)])
    chosen = []
    while len(chosen) < M:
        left = [i for i in range(P) if i not in chosen]
        gain = [np.linalg.slogdet(kernel[np.ix_([*chosen, i], [*chosen, i])])[1] for i in left]
        chosen.append(left[int(np.argmax(gain))])
    return x_PD[sorted(chosen)], sorted(chosen)


def catp(x_PD, r_P, M, text):
    """Distance to the nearest chosen row, and relevance."""
    chosen = [int(r_P.argmax())]
    while len(chosen) < M:
        left = [i for i in range(len(x_PD)) if i not in chosen]
        worth = [min(1 - cosine(x_PD[i], x_PD[j]) for j in chosen) + text * r_P[i] for i in left]
        chosen.append(left[int(np.argmax(worth))])
    return x_PD[sorted(chosen)], sorted(chosen)


def aim(x_PD, rounds):
    """Every even row joins the odd one most like it; plain means (Zhong et al. 2024)."""
    rows, places = list(x_PD), list(range(len(x_PD)))
    for _ in range(rounds):
        even, odd = range(0, len(rows), 2), range(1, len(rows), 2)
        best = {i: max(odd, key=lambda j, i=i: (cosine(rows[i], rows[j]), -j)) for i in even}
        close = sorted(even, key=lambda i: (-cosine(rows[i], rows[best[i]]), i))[: len(rows) // 2]
        groups = {j: [j] for j in range(len(rows)) if j not in close}
        for i in close:
            groups[best[i]].append(i)
        rows, places = [np.mean([rows[i] for i in groups[j]], axis=0) for j in sorted(groups)], [places[j] for j in sorted(groups)]
    return np.array(rows), places


def tokencorr(x_PD, k_PH, a_P, M, like, often):
    """As many patches as are not repeated."""
    P = len(x_PD)
    alone = sum(sum(cosine(k_PH[i], k_PH[j]) > like for j in range(P) if j != i) <= often * (P - 1) for i in range(P))
    at = top(a_P, min(max(alone, 1), M))
    return x_PD[at], at


def crop_of(i, grid, across, lines, columns):
    """The crop that shows what patch i of the full image shows. The full image is squeezed into the tower's square; on the canvas the same
    picture spans these lines and columns of patches, of which each crop has `grid`."""
    middle = [Fraction(2 * a + 1, 2 * n) for a, n in zip(divmod(i, grid[1]), grid)]  # of the patch, as shares of the picture
    y, x = (first + share * (last - first) for share, (first, last) in zip(middle, (lines, columns)))
    return int(y / grid[0]) * across + int(x / grid[1])


def hired(top_P, bottom_BP, grid, across, lines, columns, share, alpha):
    """places of each crop (Arif et al. 2024): the budget of crops by where the first layer looks."""
    B, P = bottom_BP.shape
    total = int(np.ceil(B * P * share - 1e-9))
    full = min(int(total * alpha), P)
    rest = min(total - full, (B - 1) * P)
    looked = top(top_P, int(P * (1 - alpha)))
    found = [0] * (B - 1)
    for i in looked:
        found[crop_of(i, grid, across, lines, columns)] += 1
    counts = [full] + [min(int(n * rest / len(looked) + 1e-9), P) for n in found]
    return [top(a, n) for a, n in zip(bottom_BP, counts)]


def bilinear(grid, size):
    """Resized with centres aligned, borders repeated."""
    out = np.zeros(size)
    for y in range(size[0]):
        for x in range(size[1]):
            v, u = (min(max((i + 0.5) * n / m - 0.5, 0), n - 1) for i, n, m in zip((y, x), grid.shape, size))
            a, b = int(v), int(u)
            c, d = min(a + 1, grid.shape[0] - 1), min(b + 1, grid.shape[1] - 1)
            v, u = v - a, u - b
            out[y, x] = (grid[a, b] * (1 - u) + grid[a, d] * u) * (1 - v) + (grid[c, b] * (1 - u) + grid[c, d] * u) * v
    return out


def globalcom2(a_BP, grid, down, across, lines, columns, R, heat):
    """places of each crop (Liu et al. 2025). lines, columns: of the canvas's patches, those that show the picture."""
    P = grid[0] * grid[1]
    above = np.zeros((down * grid[0], across * grid[1]))
    shown = np.zeros_like(above, bool)
    shown[slice(*lines), slice(*columns)] = True
    above[slice(*lines), slice(*columns)] = bilinear(a_BP[0].reshape(grid), (lines[1] - lines[0], columns[1] - columns[0]))
    s = np.zeros(down * across)
    for i in range(P):
        s[crop_of(i, grid, across, lines, columns)] += a_BP[0, i]
    e = np.exp((s - s.max()) / heat)
    scale = np.minimum(R * (1 + e / e.sum() - 1 / len(e)), 1)
    found = [top(a_BP[0], int(P * R + 1e-9))]
    for j in range(down * across):
        y, x = j // across * grid[0], j % across * grid[1]
        mask = shown[y : y + grid[0], x : x + grid[1]].ravel()
        valid = [i for i in range(P) if mask[i]]
        own, up = a_BP[1 + j][valid], above[y : y + grid[0], x : x + grid[1]].ravel()[valid]
        score = own / np.linalg.norm(own) + up / np.linalg.norm(up)
        found.append([valid[i] for i in top(score, int(len(valid) * scale[j] + 1e-9))])
    return found


def cubic(t):
    """Keys' kernel at a = -0.75."""
    t, a = abs(t), -0.75
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def bicubic(grid_YXD, size):
    """Resized by bicubic interpolation, borders repeated."""
    Y, X = grid_YXD.shape[:2]
    out = np.zeros((*size, grid_YXD.shape[2]))
    for y in range(size[0]):
        for x in range(size[1]):
            v, u = (y + 0.5) * Y / size[0] - 0.5, (x + 0.5) * X / size[1] - 0.5
            for i in range(int(np.floor(v)) - 1, int(np.floor(v)) + 3):
                for j in range(int(np.floor(u)) - 1, int(np.floor(u)) + 3):
                    out[y, x] += cubic(v - i) * cubic(u - j) * grid_YXD[min(max(i, 0), Y - 1), min(max(j, 0), X - 1)]
    return out
