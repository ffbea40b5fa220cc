"""Merges of rows as their papers state them, over explicit rows."""

from collections import defaultdict

import numpy as np
from oracles.policies import Cache, best, column_sum


def cosine(a, b) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


class Merged(Cache):
    """Rows of the prompt that are not kept join the kept row with the most similar rotated key (Wan et al. 2024, LOOK-M, sec. 3.3).

    keep(layer, head): orders kept. may(layer, head, kept): orders of the others that may join. sized: log of the number of rows that a
    row stands for is added to its scores.
    """

    def __init__(self, model, seen, keep, how: str, least: float = -1.0, may=None, sized: bool = False):
        self.keep, self.sized, self.turned, self.many = keep, sized, {}, defaultdict(int)
        super().__init__(model, seen)
        for layer, s in enumerate(seen):
            for head in range(model.cfg.K):
                kept = sorted(self.rows[layer][head])
                others = [o for o in s.orders if o not in kept] if may is None else may(layer, head, kept)
                self.join(layer, head, s, kept, others, how, least)

    def first(self, layer, head, s):
        return self.keep(layer, head)

    def join(self, layer, head, s, kept, others, how, least):
        keys, values = ({o: x[o][head] for o in s.orders} for x in (s.rotated, s.v))
        joined = defaultdict(list)
        for o in others:
            like = {c: cosine(keys[o], keys[c]) for c in kept}
            nearest = max(kept, key=lambda c, like=like: like[c])
            if like[nearest] >= least:
                joined[nearest].append((o, like[nearest]))
        for c in kept:
            self.turned[layer, head, c] = self.mean(c, joined[c], keys, how)
            raw, _ = self.rows[layer][head][c]
            self.rows[layer][head][c] = (raw, self.mean(c, joined[c], values, how))
            self.many[layer, head, c] = len(joined[c])

    def mean(self, c, joined, x, how):
        terms = {"average": lambda o, like: x[o], "pivot": lambda o, like: (x[o] + x[c]) / 2, "weighted": lambda o, like: like * x[o]}
        return np.mean([x[c], *(terms[how](o, like) for o, like in joined)], axis=0)

    def key(self, layer, head, order):
        return self.turned[layer, head, order] if (layer, head, order) in self.turned else super().key(layer, head, order)

    def bonus(self, layer, head, order):
        return np.log(1 + self.many[layer, head, order]) if self.sized else 0.0


def text_first(model, s, head: int, rows: int, recent: int, pictured) -> list[int]:
    """LOOK-M's rows (Wan et al. 2024, sec. 3.2): the last `recent`, and those with the most attention from all queries, all rows of text
    before the first of a picture; `rows` in all."""
    last = s.orders[len(s.orders) - recent :]
    mass = {o: column_sum(model, s, head, list(s.A[0]), o) for o in s.orders if o not in last}
    return sorted(sorted(mass, key=lambda o: (o in pictured, -mass[o]))[: rows - recent]) + last


def global_local(model, s, head: int, window: int, kernel: int) -> dict:
    """Our reading of EMS's score (Li et al. 2024): mean attention from all queries that see a row, and attention from the last window,
    each over its sum; added, then averaged over neighbours (padding counts as zeros)."""
    before = [o for o in s.orders if o <= s.orders[-1] - window]
    asking = list(s.A[0])
    everyone = np.array([column_sum(model, s, head, asking, o) / (s.orders[-1] + 1 - o) for o in before])
    last = np.array([column_sum(model, s, head, [a for a in asking if a > s.orders[-1] - window], o) for o in before])
    raw = everyone / everyone.sum() + last / last.sum()
    half = kernel // 2
    near = [raw[max(i - half, 0) : i + half + 1].sum() / kernel for i in range(len(raw))]
    return dict(zip(before, near, strict=True))


def ems_keep(model, s, head: int, rows: int, window: int, kernel: int) -> list[int]:
    """The window, and the best rows before it."""
    last = [o for o in s.orders if o > s.orders[-1] - window]
    return best(global_local(model, s, head, window, kernel), rows - len(last)) + last


class CaM(Cache):
    """Zhang et al. 2024 over sinks and recent rows: a row that leaves adds its value / over to the rows of the next `over` places, if
    coin(head, order) falls below its attention so far over the mean of that of the rows behind it."""

    def __init__(self, model, seen, rows: int, sinks: int, over: int, coin, block: int = 1):
        self.n, self.sinks, self.over, self.coin, self.block = rows, sinks, over, coin, block
        self.worth = [[defaultdict(float) for _ in range(model.cfg.K)] for _ in seen]
        super().__init__(model, seen)
        for layer, s in enumerate(seen):
            for head in range(model.cfg.K):
                kept = set(self.rows[layer][head])
                for o in s.orders:
                    self.worth[layer][head][o] = column_sum(model, s, head, list(s.A[0]), o)
                for o in s.orders:
                    if o not in kept:
                        self.bequeath(layer, head, o, s.v[o][head])

    def first(self, layer, head, s):
        sinks = [o for o in s.orders if o < self.sinks]
        return sinks + [o for o in s.orders[len(s.orders) - (self.n - len(sinks)) :] if o not in sinks]

    def bequeath(self, layer, head, order, value):
        rows, worth = self.rows[layer][head], self.worth[layer][head]
        behind = [o for o in rows if o > order]
        if behind and self.coin(head, order) < worth[order] / np.mean([worth[o] for o in behind]):
            for o in behind:
                if o <= order + self.over:
                    rows[o] = (rows[o][0], rows[o][1] + value / self.over)

    def make_room(self, layer, head):
        rows = self.rows[layer][head]
        if len(rows) == self.n:
            gone = {o: rows.pop(o)[1] for o in sorted(o for o in rows if o >= self.sinks)[: self.block]}
            for o, value in gone.items():
                self.bequeath(layer, head, o, value)

    def saw(self, layer, head, p):
        for o, x in p.items():
            self.worth[layer][head][o] += x


class MiniCache(Cache):
    """Liu et al. 2024: the two layers of a pair share the direction of a row's key and value, `t` of the way along the arc from the
    lower layer's to the upper's, and keep the lengths. Rows stay whole whose angle is in the top share `outliers` of the range of angles,
    of which no more than `most`, those with the largest. code(rows_SH, values): what a matrix of directions becomes in storage; rows
    that stay whole are zeros in it."""

    def __init__(self, model, seen, pairs, outliers: float, most: int, t: float = 0.6, code=lambda rows, values: rows):
        super().__init__(model, seen)
        self.back, self.far = {}, {}
        for low in pairs:
            orders, below, above = seen[low].orders, seen[low], seen[low + 1]
            angle = {o: sum(angle_of(a[o][h], b[o][h]) for a, b in both(below, above) for h in range(model.cfg.K)) for o in orders}
            cut = max(angle.values()) - outliers * (max(angle.values()) - min(angle.values()))
            self.far[low] = sorted((o for o in orders if angle[o] >= cut), key=lambda o, angle=angle: -angle[o])
            whole = self.far[low][:most]
            for head in range(model.cfg.K):
                for values, (a, b) in enumerate(both(below, above)):
                    ways = [np.zeros(model.cfg.H) if o in whole else arc(a[o][head], b[o][head], t) for o in orders]
                    shared = code(np.stack(ways), values)
                    for layer, x in ((low, a), (low + 1, b)):
                        for o, direction in zip(orders, shared, strict=True):
                            if o not in whole:
                                self.put(layer, head, o, values, np.linalg.norm(x[o][head]) * direction)

    def put(self, layer, head, order, values, row):
        if values:
            self.rows[layer][head][order] = (self.rows[layer][head][order][0], row)
        else:
            self.back[layer, head, order] = row

    def key(self, layer, head, order):
        return self.back[layer, head, order] if (layer, head, order) in self.back else super().key(layer, head, order)


def both(below, above):
    """((keys of two layers), (values of two layers)), rows by order."""
    return (below.rotated, above.rotated), (below.v, above.v)


def angle_of(a, b) -> float:
    return float(np.arccos(np.clip(cosine(a, b), -1, 1)))


def arc(a, b, t: float):
    """The unit vector `t` of the way from the direction of a to that of b."""
    angle = angle_of(a, b)
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
