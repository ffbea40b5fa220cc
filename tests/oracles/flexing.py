"""FlexPrefill (Lai et al. 2025, alg. 1 to 4) over one sequence, one kv head at a time: sets of rows that each query reads."""

import numpy as np


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def fewest(share: dict, gamma: float) -> list:
    """Keys of the largest shares, until they add up to gamma."""
    found, total = [], 0.0
    for key in sorted(share, key=lambda key: -share[key]):
        if total < gamma:
            found.append(key)
            total += share[key]
    return found


def divergence(p, q) -> float:
    """Square root of the Jensen-Shannon divergence, natural logarithm."""
    m = (p + q) / 2

    def kl(a):
        return sum(x * np.log(x / y) for x, y in zip(a, m, strict=True) if x > 0)

    return float(np.sqrt((kl(p) + kl(q)) / 2))


class Flex:
    """q_SGH, k_SH: rotated queries of one kv head and its keys, of one prompt without padding."""

    def __init__(self, q_SGH, k_SH, scale: float, R: int, gamma: float, tau: float):
        self.q, self.k, self.scale, self.R, self.gamma = q_SGH.astype(np.float64), k_SH.astype(np.float64), scale, R, gamma
        n = len(k_SH)
        self.blocks = [range(j, min(j + R, n)) for j in range(0, n, R)]
        self.keys = np.stack([self.k[list(b)].mean(axis=0) for b in self.blocks])
        self.p = self.last_attention(n)
        column = np.sum(list(self.p.values()), axis=0)
        true = np.array([column[list(b)].sum() for b in self.blocks])
        self.distance = divergence(true, self.guess(self.q[max(n - R, 0) :].mean(axis=0), len(self.blocks)))
        self.aware = self.distance < tau
        self.column = dict(enumerate(column.tolist()))

    def last_attention(self, n: int) -> dict:
        """{order of a row of the last R: its mean attention over the group}, together 1."""
        last = range(max(n - self.R, 0), n)
        found = {}
        for t in last:
            rows = [np.pad(softmax(q @ self.k[: t + 1].T * self.scale), (0, n - t - 1)) for q in self.q[t]]
            found[t] = np.mean(rows, axis=0) / len(last)
        return found

    def guess(self, q_GH, seen: int):
        """Softmax over the first `seen` blocks of mean query times mean key, mean over the group."""
        return np.mean([softmax(q @ self.keys[:seen].T * self.scale) for q in q_GH], axis=0)

    def read(self) -> list[tuple[set, set]]:
        """(blocks, single rows) that each block of queries reads."""
        Q = len(self.blocks)
        if self.aware:
            share = {}
            for own, block in enumerate(self.blocks):
                for j, x in enumerate(self.guess(self.q[list(block)].mean(axis=0), own + 1)):
                    share[own, j] = x / Q
            picked = fewest(share, self.gamma)
            return [({0, own} | {j for o, j in picked if o == own}, set()) for own in range(Q)]
        bundle = dict.fromkeys(range(Q), 0.0)
        for t, row in self.p.items():
            for s in range(t + 1):
                bundle[(t - s) // self.R] += row[s]
        back = {e for d in fewest(bundle, self.gamma) for e in (d, d + 1)}
        columns = set(fewest(self.column, self.gamma))
        return [({0, own} | {own - e for e in back if e <= own}, columns) for own in range(Q)]
