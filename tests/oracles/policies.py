"""Cache policies as their papers state them, over explicit sets of rows per layer and kv head.

A policy is a `Cache` whose few overridden methods say which rows stay after the prompt, which leave when one arrives, which are read,
and where they stand. Nothing here is shared with tokeff: numbers of rows are plain arguments.
"""

from collections import defaultdict

import numpy as np
from oracles.model import Model, Seen, softmax


class Cache:
    """Keep everything, read everything."""

    def __init__(self, model: Model, seen: list[Seen]):
        self.m, self.seen = model, seen
        self.rows = [[{o: (s.k[o][h], s.v[o][h]) for o in self.first(i, h, s)} for h in range(model.cfg.K)] for i, s in enumerate(seen)]

    def first(self, layer: int, head: int, s: Seen) -> list[int]:
        """Orders kept of the prompt."""
        return s.orders

    def make_room(self, layer: int, head: int) -> None:
        """Evict before one row arrives."""

    def position(self, layer: int, head: int, order: int) -> int:
        """Where a row stands for the rotary embedding."""
        return order

    def key(self, layer: int, head: int, order: int) -> np.ndarray:
        """The rotated key that a query meets."""
        return self.m.rope(layer, self.rows[layer][head][order][0], self.position(layer, head, order))

    def bonus(self, layer: int, head: int, order: int) -> float:
        """What is added to the score of a row."""
        return 0.0

    def chosen(self, layer: int, head: int, q_GH, order: int) -> list[int]:
        """Orders to read; q_GH: rotated queries of this kv head."""
        return list(self.rows[layer][head])

    def saw(self, layer: int, head: int, p: dict) -> None:
        """Evidence: one query head's probabilities."""

    def newest(self, s: Seen, n: int) -> list[int]:
        """The rows among the last n places of the prompt. A pass lets its last row go on, and perhaps not all the others."""
        return [o for o in s.orders if o > s.orders[-1] - n]

    def kept(self, layer: int, head: int) -> list[int]:
        return sorted(self.rows[layer][head])

    def attend(self, layer: int, q_NH, k_KH, v_KH, order: int) -> np.ndarray:
        """One new row in one layer: make room, store, choose, attend. Returns out_NH."""
        G, out = self.m.G, np.zeros_like(q_NH)
        for head in range(self.m.cfg.K):
            self.make_room(layer, head)
            self.rows[layer][head][order] = (k_KH[head], v_KH[head])
            at = self.position(layer, head, order)
            q_GH = np.stack([self.m.rope(layer, q, at) for q in q_NH[head * G : (head + 1) * G]])
            visible = [o for o in self.chosen(layer, head, q_GH, order) if o >= self.m.oldest(layer, order)]
            keys = {o: self.key(layer, head, o) for o in visible}
            for g in range(G):
                p = softmax({o: self.m.dot(q_GH[g], keys[o]) + self.bonus(layer, head, o) for o in visible})
                out[head * G + g] = sum((p[o] * self.rows[layer][head][o][1] for o in visible), np.zeros(self.m.cfg.H))
                self.saw(layer, head, p)
        return out


def best(score: dict, n: int) -> list[int]:
    """The n keys of the highest scores."""
    return sorted(sorted(score, key=lambda o: -score[o])[:n])


class Given(Cache):
    """Keep the `rows` prompt rows with the highest of the given scores: score(layer, head, order)."""

    def __init__(self, model, seen, rows: int, score):
        self.n, self.score = rows, score
        super().__init__(model, seen)

    def first(self, layer, head, s):
        return best({o: self.score(layer, head, o) for o in s.orders}, self.n)


class StreamingLLM(Cache):
    """Xiao et al. 2024: the first `sinks` rows and the most recent ones, `rows` in all; each row stands at its place in the cache.

    Before a row arrives in a full cache the `block` oldest rows that are no sinks leave (1 in the paper).
    """

    def __init__(self, model, seen, rows: int, sinks: int, block: int = 1):
        self.n, self.sinks, self.block = rows, sinks, block
        super().__init__(model, seen)

    def first(self, layer, head, s):
        if len(s.orders) <= self.n:
            return s.orders
        sinks = [o for o in s.orders if o < self.sinks]
        return sinks + s.orders[len(s.orders) - (self.n - len(sinks)) :]

    def make_room(self, layer, head):
        rows = self.rows[layer][head]
        if len(rows) == self.n:
            for o in sorted(o for o in rows if o >= self.sinks)[: self.block]:
                del rows[o]

    def position(self, layer, head, order):
        return sorted(self.rows[layer][head]).index(order)


def column_sum(model, s: Seen, head: int, asking, order: int) -> float:
    """Attention that the asking rows paid to one row, summed over the query heads of a kv head."""
    return sum(s.A[n][a].get(order, 0.0) for n in range(head * model.G, (head + 1) * model.G) for a in asking)


class H2O(Cache):
    """Zhang et al. 2023: a row is worth the attention it got from all queries so far. Of `rows`, the last `recent` always stay.

    Before a row arrives in a full cache the `block` rows leave that are worth least and not recent (1 in the paper).
    """

    def __init__(self, model, seen, rows: int, recent: int, block: int = 1):
        self.n, self.recent, self.block = rows, recent, block
        self.worth = [[defaultdict(float) for _ in range(model.cfg.K)] for _ in seen]
        super().__init__(model, seen)

    def first(self, layer, head, s):
        worth = self.worth[layer][head]
        for o in s.orders:
            worth[o] = column_sum(self.m, s, head, list(s.A[0]), o)
        last = self.newest(s, self.recent)
        return best({o: worth[o] for o in s.orders if o not in last}, self.n - len(last)) + last

    def make_room(self, layer, head):
        rows, worth = self.rows[layer][head], self.worth[layer][head]
        if len(rows) == self.n:
            loose = [o for o in rows if o <= max(rows) - self.recent]
            for o in sorted(loose, key=lambda o: worth[o])[: self.block]:
                del rows[o]

    def saw(self, layer, head, p):
        for o, x in p.items():
            self.worth[layer][head][o] += x


def snap_scores(model, s: Seen, head: int, window: int, kernel: int, pool: str) -> dict:
    """Li et al. 2024: attention of the last `window` rows to each row before them, pooled over `kernel` neighbours (stride 1, padding
    that counts as zeros for the average)."""
    before = [o for o in s.orders if o <= s.orders[-1] - window]
    asking = [o for o in s.A[0] if o not in before]
    raw = [column_sum(model, s, head, asking, o) for o in before]
    half = kernel // 2
    near = [[raw[j] for j in range(i - half, i + half + 1) if 0 <= j < len(raw)] for i in range(len(raw))]
    return {o: max(x) if pool == "max" else sum(x) / kernel for o, x in zip(before, near, strict=True)}


class SnapKV(Cache):
    """Keep the best rows before the window, and the window: `rows` in all. Nothing leaves afterwards."""

    def __init__(self, model, seen, rows: int, window: int, kernel: int, pool: str):
        self.n, self.window, self.kernel, self.pool = rows, window, kernel, pool
        super().__init__(model, seen)

    def first(self, layer, head, s):
        score, last = snap_scores(self.m, s, head, self.window, self.kernel, self.pool), self.newest(s, self.window)
        return best(score, self.n - len(last)) + last


class AdaKV(SnapKV):
    """Feng et al. 2024 on SnapKV's scores: of the rows outside the window every head keeps its best ceil(floor * mean); the rest of
    the layer's budget goes to the highest scores of any head."""

    def __init__(self, model, seen, rows, window, kernel, pool, floor: float):
        self.floor = floor
        super().__init__(model, seen, rows, window, kernel, pool)

    def first(self, layer, head, s):
        heads, last = range(self.m.cfg.K), self.newest(s, self.window)
        loose = self.n - len(last)
        score = [snap_scores(self.m, s, h, self.window, self.kernel, self.pool) for h in heads]
        safe = [(h, o) for h in heads for o in best(score[h], int(np.ceil(self.floor * loose - 1e-9)))]
        others = {(h, o): score[h][o] for h in heads for o in score[h] if (h, o) not in safe}
        rest = sorted(others, key=lambda key: -others[key])[: loose * len(heads) - len(safe)]
        return sorted(o for h, o in safe + rest if h == head) + last


class PyramidKV(SnapKV):
    """Cai et al. 2024 on SnapKV's scores: beside the window the last layer keeps (mean - window) / beta rows, the first as many more than
    the mean as the last keeps fewer, layers between lie on a line; a first layer larger than the prompt gives what is over to the last."""

    def __init__(self, model, seen, rows, window, kernel, pool, beta: int):
        self.beta = beta
        super().__init__(model, seen, rows, window, kernel, pool)

    def first(self, layer, head, s):
        last = self.newest(s, self.window)
        mean = self.n - len(last)
        top, bottom = 2 * mean - mean // self.beta, mean // self.beta
        if top > len(s.orders) - len(last):
            top = len(s.orders) - len(last)
            bottom = 2 * mean - top
        rows = int(np.floor(top - layer * (top - bottom) / (self.m.cfg.L - 1) + 1e-9))
        return best(snap_scores(self.m, s, head, self.window, self.kernel, self.pool), rows) + last


class LMInfinite(StreamingLLM):
    """Han et al. 2023: the same rows where they stood in the text, but no row further from the query than the window is long (`cap`)."""

    def __init__(self, model, seen, rows, sinks, block=1, cap=None):
        self.cap = rows - sinks if cap is None else cap
        super().__init__(model, seen, rows, sinks, block)

    def position(self, layer, head, order):
        return order

    def chosen(self, layer, head, q_GH, order):
        self.now = order
        return super().chosen(layer, head, q_GH, order)

    def key(self, layer, head, order):
        return self.m.rope(layer, self.rows[layer][head][order][0], max(order, self.now - self.cap))


class ALISA(Cache):
    """Zhao et al. 2024, with all rows held: a query reads the last `recent` rows and, of the others, those with the most attention from the
    `steps` queries before it; `rows` in all. A row that a query does not read gets none from it."""

    def __init__(self, model, seen, rows: int, steps: int, recent: int):
        super().__init__(model, seen)
        self.n, self.steps, self.recent = rows, steps, recent
        heads = range(model.cfg.K)
        self.looks = [[[self.of_prompt(s, h, a) for a in s.orders[-steps:]] for h in heads] for s in seen]
        self.read = []  # (layer, head, order, orders read) of every query

    def of_prompt(self, s: Seen, head: int, asking: int) -> dict:
        return {o: column_sum(self.m, s, head, [asking], o) for o in s.orders}

    def chosen(self, layer, head, q_GH, order):
        rows, looks = sorted(self.rows[layer][head]), self.looks[layer][head][-self.steps :]
        near = rows[-self.recent :]
        older = [o for o in rows if o not in near and o >= self.m.oldest(layer, order)]
        found = best({o: sum(p.get(o, 0.0) for p in looks) for o in older}, self.n - self.recent) + near
        self.looks[layer][head].append(defaultdict(float))
        self.read.append((layer, head, order, found))
        return found

    def saw(self, layer, head, p):
        for o, x in p.items():
            self.looks[layer][head][-1][o] += x
