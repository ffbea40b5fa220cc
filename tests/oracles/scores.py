"""What rows are worth, as papers state it, over explicit sets of rows of one head: keys and values are dicts from order to vector."""

from collections import defaultdict

import numpy as np
from oracles.model import softmax
from oracles.policies import Cache, best, snap_scores


class Scored(Cache):
    """Keep `rows` rows: sinks, the last `recent` ones, and those worth most; before a row arrives in a full cache the `block` least worthy
    of the others leave (0: nothing leaves after the prompt).

    worth(layer, head, orders) gives {order: worth} of rows in ascending order.
    """

    def __init__(self, model, seen, rows: int, recent: int = 0, sinks: int = 0, block: int = 0):
        self.n, self.recent, self.sinks, self.block = rows, recent, sinks, block
        self.now = [s.orders[-1] for s in seen]
        super().__init__(model, seen)

    def attend(self, layer, q_NH, k_KH, v_KH, order):
        self.now[layer] = order - 1
        return super().attend(layer, q_NH, k_KH, v_KH, order)

    def forced(self, order: int, newest: int) -> bool:
        return order < self.sinks or order > newest - self.recent

    def key(self, layer, head, order):
        s = self.seen[layer]
        return s.rotated[order][head] if order in s.rotated else super().key(layer, head, order)

    def value(self, layer, head, order):
        s = self.seen[layer]
        return s.v[order][head] if order in s.v else self.rows[layer][head][order][1]

    def first(self, layer, head, s):
        always = [o for o in s.orders if self.forced(o, s.orders[-1])]
        worth = self.worth(layer, head, s.orders)
        return sorted(best({o: worth[o] for o in s.orders if o not in always}, self.n - len(always)) + always)

    def make_room(self, layer, head):
        rows = self.rows[layer][head]
        if self.block and len(rows) == self.n:
            worth = self.worth(layer, head, sorted(rows))
            loose = [o for o in sorted(rows) if not self.forced(o, max(rows))]
            for o in sorted(loose, key=lambda o: worth[o])[: self.block]:
                del rows[o]


class Faded(Scored):
    """Jo & Shin 2024 (A2SF): the attention a row got from all queries so far, one of `d` rows ago weighted by factor**d."""

    def __init__(self, model, seen, rows, factor: float, recent=0, block=1):
        self.factor = factor
        self.asked = [[[] for _ in range(model.cfg.K)] for _ in seen]  # (order of the query, probabilities)
        for layer, s in enumerate(seen):
            for n in range(model.cfg.N):
                self.asked[layer][n // model.G] += [(order, s.A[n][order]) for order in s.A[n]]
        super().__init__(model, seen, rows, recent, block=block)

    def saw(self, layer, head, p):
        self.asked[layer][head].append((self.now[layer] + 1, p))

    def mass(self, layer, head, order):
        now = self.now[layer]
        return sum(self.factor ** (now - q) * p.get(order, 0.0) for q, p in self.asked[layer][head] if q <= now)

    def worth(self, layer, head, orders):
        return {o: self.mass(layer, head, o) for o in orders}


class TOVA(Faded):
    """Oren et al. 2024: the mean over all heads of the last query's attention; every head keeps the same rows."""

    def __init__(self, model, seen, rows, block=1):
        super().__init__(model, seen, rows, 0.0, block=block)

    def worth(self, layer, head, orders):
        heads = range(self.m.cfg.K)
        return {o: sum(self.mass(layer, h, o) for h in heads) / self.m.cfg.N for o in orders}


def cosine(a, b) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


class KeyDiff(Scored):
    """Park et al. 2025: minus the cosine of a key with the mean of all unit keys that are there."""

    def worth(self, layer, head, orders):
        keys = {o: self.key(layer, head, o) for o in orders}
        anchor = np.mean([k / np.sqrt(k @ k) for k in keys.values()], axis=0)
        return {o: -cosine(k, anchor) for o, k in keys.items()}


class LagKV(Scored):
    """Liang et al. 2025: behind the sinks, partitions of `lag` rows; each is scaled by the minimum and maximum of the next, channel by
    channel. Rows are ranked by the spread over channels, softmaxed over the partition, of keys plus values. Rows without a
    reference come first, newest before older ones."""

    def __init__(self, model, seen, rows, lag: int, sinks: int):
        self.lag = lag
        super().__init__(model, seen, rows, sinks=sinks)

    def worth(self, layer, head, orders):
        behind = orders[self.sinks :]
        parts = [behind[i : i + self.lag] for i in range(0, len(behind), self.lag) if i + self.lag <= len(behind)]
        worth = {o: 1.0 + i for i, o in enumerate(orders)}
        for part, following in zip(parts, parts[1:]):
            total = {o: 0.0 for o in part}
            for read in (self.key, self.value):
                reference = [read(layer, head, o) for o in following]
                low, high = np.min(reference, axis=0), np.max(reference, axis=0)
                spread = {o: np.std((read(layer, head, o) - low) / (high - low), ddof=1) for o in part}
                for o, p in softmax(spread).items():
                    total[o] += p
            for rank, o in enumerate(sorted(part, key=lambda o: total[o])):
                worth[o] = rank / self.lag
        return worth


class ChunkKV(Scored):
    """Liu et al. 2025: a row before the window is worth the mean attention, from the window's queries, to the rows of its chunk."""

    def __init__(self, model, seen, rows, window: int, chunk: int):
        self.chunk = chunk
        super().__init__(model, seen, rows, recent=window)

    def worth(self, layer, head, orders):
        score = snap_scores(self.m, self.seen[layer], head, self.recent, 1, "avg")
        chunks = defaultdict(list)
        for i, o in enumerate(orders):
            if o in score:
                chunks[i // self.chunk].append(score[o])
        return {o: np.mean(chunks[i // self.chunk]) if o in score else np.inf for i, o in enumerate(orders)}


class RKV(Faded):
    """Cai et al. 2025, with fading attention for its window of queries: weight * importance - (1 - weight) * redundancy."""

    def __init__(self, model, seen, rows, window: int, weight: float, block: int, alike=0.5, spare=0.1, kernel=7):
        self.window, self.weight, self.alike, self.spare, self.kernel = window, weight, alike, spare, kernel
        super().__init__(model, seen, rows, 1 - 1 / window, recent=window, block=block)

    def worth(self, layer, head, orders):
        n, half = len(orders), self.kernel // 2
        mass = [self.mass(layer, head, o) if i < n - self.window else 0.0 for i, o in enumerate(orders)]
        share = [x / sum(mass) for x in mass]
        importance = [max(share[max(i - half, 0) : i + half + 1]) for i in range(n)]
        keys = np.array([self.key(layer, head, o) for o in orders])
        keys /= np.linalg.norm(keys, axis=1, keepdims=True)
        similar = keys @ keys.T  # cosine of key i with key j
        for i in range(n):
            similar[i, i] = 0.0
            close = [j for j in range(n) if similar[i, j] > self.alike]
            for j in close[len(close) - min(int(self.spare * n), len(close)) :]:
                similar[i, j] = 0.0
        redundancy = softmax(dict(enumerate(similar.mean(axis=0))))
        return {o: self.weight * importance[i] - (1 - self.weight) * redundancy[i] for i, o in enumerate(orders)}


class Expected(Scored):
    """Devoto et al. 2025: queries as a normal distribution, turned by the mean rotation of the next `future` places; the expected attention
    of a row behind the sinks, plus `floor`, times the length of its value."""

    def __init__(self, model, seen, rows, future: int, sinks: int, floor: float):
        self.future, self.floor = future, floor
        super().__init__(model, seen, rows, sinks=sinks)

    def worth(self, layer, head, orders):
        s, H = self.seen[layer], self.m.cfg.H
        places = range(s.orders[-1] + 1, s.orders[-1] + 1 + self.future)
        turn = np.mean([[self.m.rope(layer, unit, p) for unit in np.eye(H)] for p in places], axis=0).T
        behind, heads = [o for o in orders if o >= self.sinks], range(head * self.m.G, (head + 1) * self.m.G)
        shares = []
        for n in heads:
            asked = np.array([s.q[o][n] for o in s.q if o >= self.sinks])
            mean, covariance = turn @ asked.mean(axis=0), turn @ np.cov(asked.T, bias=True) @ turn.T
            keys = {o: self.key(layer, head, o) for o in behind}
            shares.append(softmax({o: k @ mean / H**0.5 + k @ covariance @ k / H / 2 for o, k in keys.items()}))
        sizes = {o: np.sqrt((self.value(layer, head, o) ** 2).sum()) for o in orders}
        return {o: (np.mean([p.get(o, 0.0) for p in shares]) + self.floor) * sizes[o] for o in orders}


class CompressKV(Scored):
    """Lin et al. 2025: rows before the window by the attention of the window's queries in the layer's judges (query heads), the mean over
    judges, averaged over `kernel` neighbours; the same rows in every kv head. Of a mean budget `rows` a layer keeps `floor` rows and its
    importance of the rest of all layers, at most three times the mean."""

    def __init__(self, model, seen, rows, window, kernel, judges, importance, floor: int = 32):
        self.kernel, self.judges, self.importance, self.mean, self.floor = kernel, judges, importance, rows, floor
        super().__init__(model, seen, rows, recent=window)

    def first(self, layer, head, s):
        if self.importance:
            more = self.importance[layer] * self.m.cfg.L * (self.mean - self.floor)
            self.n = min(self.floor + int(more + 1e-3), 3 * self.mean, len(s.orders))
        return super().first(layer, head, s)

    def worth(self, layer, head, orders):
        s, half = self.seen[layer], self.kernel // 2
        before = orders[: -self.recent]
        raw = [
            np.mean([sum(s.A[n][a].get(o, 0.0) for a in orders[-self.recent :]) for n in self.judges[layer]]) for o in before
        ]
        pooled = [sum(raw[max(i - half, 0) : i + half + 1]) / self.kernel for i in range(len(raw))]
        return dict(zip(before, pooled)) | {o: np.inf for o in orders[-self.recent :]}
