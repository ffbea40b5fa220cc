"""Methods that keep every row and choose, for each query, which to read: the rules of their papers over lists of pages.

A page is `size` rows that follow each other in the cache. The pages of the first `sinks` rows and those that hold one of the last
`recent` places are read in any case; `far` of the others are chosen.
"""

import numpy as np
from oracles.model import softmax
from oracles.policies import Cache, best


class Reader(Cache):
    """Every layer that is not dense chooses for itself: worth(layer, head, q_GH, pages) is {page: worth}.

    A choice serves `every` steps; pages that stop being recent before its end may be chosen. streaming[layer]: heads without chosen pages.
    """

    every, streaming = 1, [()] * 99

    def worth(self, layer, head, q_GH, pages) -> dict:
        raise NotImplementedError

    def __init__(self, model, seen, far: int, *, size=1, recent=1, sinks=0, dense=(), **options):
        self.far, self.size, self.recent, self.sinks, self.dense = far, size, recent, sinks, dense
        self.held, self.steps = {}, {}
        vars(self).update(options)
        super().__init__(model, seen)

    def chosen(self, layer, head, q_GH, order):
        rows = sorted(self.rows[layer][head])
        if layer in self.dense:
            return rows
        step = self.steps[layer, head] = self.steps.get((layer, head), -1) + 1
        if step % self.every == 0:
            self.held[layer, head] = self.pick(layer, head, q_GH, self.split(rows, order + self.every - 1)[1])
        sure, loose = self.split(rows, order)
        read = [] if head in self.streaming[layer] else [p for p in loose if p in self.held[layer, head]]
        return sorted(o for page in [*sure, *read] for o in page)

    def split(self, rows, order):
        """(pages that are read in any case, the others), each a tuple of orders."""
        pages = [tuple(rows[i : i + self.size]) for i in range(0, len(rows), self.size)]
        first = -(-self.sinks // self.size)
        sure = [p for i, p in enumerate(pages) if i < first or p[-1] > order - self.recent]
        return sure, [p for p in pages if p not in sure]

    def pick(self, layer, head, q_GH, pages):
        return best(self.worth(layer, head, q_GH, pages), self.far)


class Quest(Reader):
    """Tang et al. 2024: upper bound of q.k over a page, channel by channel; the query heads of a kv head add theirs up."""

    def worth(self, layer, head, q_GH, pages):
        found = {}
        for page in pages:
            keys = np.stack([self.key(layer, head, o) for o in page])
            low, high = keys.min(axis=0), keys.max(axis=0)
            found[page] = sum(sum(max(q * a, q * b) for q, a, b in zip(row, low, high, strict=True)) for row in q_GH)
        return found


class TopMass(Reader):
    """The rows with the largest attention, summed over the query heads of a kv head, among the rows to choose from; with p < 1 no more
    than it takes to reach that share."""

    p = 1.0

    def worth(self, layer, head, q_GH, pages):
        shares = [softmax({page: self.m.dot(q, self.key(layer, head, page[0])) for page in pages}) for q in q_GH]
        return {page: sum(s[page] for s in shares) / len(q_GH) for page in pages}

    def pick(self, layer, head, q_GH, pages):
        worth, read, mass = self.worth(layer, head, q_GH, pages), [], 0.0
        for page in sorted(pages, key=lambda page: -worth[page])[: self.far]:
            if mass < self.p:
                read.append(page)
            mass += worth[page]
        return read


class DoubleSparsity(Reader):
    """Yang et al. 2024: q.k over some channels of the key, channels[layer][head]; the query heads of a kv head add theirs up."""

    channels = [[[]]]

    def worth(self, layer, head, q_GH, pages):
        some = self.channels[layer][head]
        return {p: sum(q[c] * self.key(layer, head, p[0])[c] for q in q_GH for c in some) for p in pages}


def loudest_keys(seen, head: int, n: int) -> list[int]:
    """The n channels with the largest mean |k| of a prompt's rotated keys."""
    size = np.mean([np.abs(seen.rotated[o][head]) for o in seen.orders], axis=0)
    return sorted(range(len(size)), key=lambda c: -size[c])[:n]


def loudest_pairs(model, layer: int, seen, head: int, n: int) -> list[int]:
    """The n channels with the largest mean |q_c k_c| over all pairs of a query and a key of a text, summed over the head's queries."""
    size = pairs(model, layer, seen, head)
    return sorted(range(len(size)), key=lambda c: -size[c])[:n]


def pairs(model, layer: int, seen, head: int) -> np.ndarray:
    """That mean, of every channel."""
    q = {o: [model.rope(layer, x, o) for x in seen.q[o][head * model.G : (head + 1) * model.G]] for o in seen.orders}
    found = [
        np.mean([abs(q[a][g][c] * seen.rotated[b][head][c]) for a in seen.orders for b in seen.orders for g in range(model.G)])
        for c in range(model.cfg.H)
    ]
    return np.array(found)


class TokenSelect(Reader):
    """Wu et al. 2024, our reading: every query head gives a softmax of q.k (not divided by sqrt(d)), each at its own place, over the rows
    to choose from; their sums decide for the whole layer. A vote holds while the cosine of the layer's unrotated queries to those that
    voted is at least `cosine`."""

    cosine: float | None = None

    def attend(self, layer, q_NH, k_KH, v_KH, order):
        votes = self.held
        rows = [*sorted(self.rows[layer][0]), order]
        _, loose = self.split(rows, order)
        if layer not in votes or self.cosine is None or cosine(votes[layer][0], q_NH) < self.cosine:
            votes[layer] = q_NH, best(self.vote(layer, q_NH, order, loose), self.far)
        self.read = votes[layer][1]
        return super().attend(layer, q_NH, k_KH, v_KH, order)

    def vote(self, layer, q_NH, order, pages):
        total = dict.fromkeys(pages, 0.0)
        for n, q in enumerate(q_NH):
            q = self.m.rope(layer, q, order)
            for p, share in softmax({p: q @ self.key(layer, n // self.m.G, p[0]) for p in pages}).items():
                total[p] += share
        return total

    def pick(self, layer, head, q_GH, pages):
        return [p for p in self.read if p in pages]


def cosine(a, b) -> float:
    return (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)


class Kascade(TopMass):
    """Deshmukh et al. 2025: layers in `select` choose and read what they chose; the others read what the nearest one below chose for the
    kv head that `heads` names."""

    select, heads, found = (), [()], {}

    def attend(self, layer, q_NH, k_KH, v_KH, order):
        if layer in self.select:
            self.found = {}
        return super().attend(layer, q_NH, k_KH, v_KH, order)

    def pick(self, layer, head, q_GH, pages):
        if layer in self.select:
            self.found[head] = super().pick(layer, head, q_GH, pages)
            return self.found[head]
        return [p for p in pages if p in self.found[self.heads[layer][head]]]


class LServe(Quest):
    """Yang et al. 2025: a page is worth its best logical page, whose worth is Quest's bound."""

    logical = 1

    def worth(self, layer, head, q_GH, pages):
        parts = {p: [p[i : i + self.logical] for i in range(0, len(p), self.logical)] for p in pages}
        return {p: max(super(LServe, self).worth(layer, head, q_GH, some).values()) for p, some in parts.items()}


class Recycled(TopMass):
    """Xu et al. 2024: all rows at every `every`-th step, at which the rows with the most attention are chosen for the steps between."""

    def chosen(self, layer, head, q_GH, order):
        read = super().chosen(layer, head, q_GH, order)
        return sorted(self.rows[layer][head]) if self.steps[layer, head] % self.every == 0 else read


class InfLLM(Reader):
    """Xiao et al. 2024: blocks are worth the q.k of their `count` representatives, over all query heads; the query stands `recent` places
    from whatever is not recent, and those keys at place 0. Representatives have the most attention from the prompt's queries that had
    them in their local window of `recent` rows, or are the first rows of a block that filled later."""

    count = 1

    def attend(self, layer, q_NH, k_KH, v_KH, order):
        self.q = [self.m.rope(layer, q, self.recent) for q in q_NH]
        for head in range(self.m.cfg.K):
            self.rows[layer][head][order] = (k_KH[head], v_KH[head])
        return super().attend(layer, q_NH, k_KH, v_KH, order)

    def represented(self, layer, head, page):
        s, heads = self.seen[layer], range(head * self.m.G, (head + 1) * self.m.G)
        old = [o for o in page if o in s.k]
        mass = {o: sum(s.A[n][a].get(o, 0.0) for n in heads for a in range(o, o + self.recent) if a in s.A[n]) for o in old}
        return [*sorted(old, key=lambda o: -mass[o]), *(o for o in page if o not in old)][: self.count]

    def worth(self, layer, head, q_GH, pages):
        def one(n, page):
            h = n // self.m.G
            return sum(self.q[n] @ self.rows[layer][h][o][0] for o in self.represented(layer, h, page))

        return {page: sum(one(n, page) for n in range(self.m.cfg.N)) for page in pages}

    def chosen(self, layer, head, q_GH, order):
        read = super().chosen(layer, head, q_GH, order)
        self.near = {o for page in self.split(sorted(self.rows[layer][head]), order)[0] for o in page if page[-1] > order - self.recent}
        self.back = order - self.recent
        return read

    def key(self, layer, head, order):
        """A key that is not recent meets the query as if it stood `recent` places before it."""
        at = order if order in self.near else self.back
        return self.m.rope(layer, self.rows[layer][head][order][0], at)


class HiP(Reader):
    """Lee et al. 2024, our reading: chunks of `start` places, each worth the larger q.k of its first and last row (heads added up);
    the best that hold `spare` times the rows to be chosen are halved, down to pages."""

    spare, start = 2, 1

    def pick(self, layer, head, q_GH, pages):
        open_rows, size = [o for page in pages for o in page], self.start
        parts = self.by_place([tuple(open_rows)], size)
        while True:
            worth = {p: max(sum(q @ self.key(layer, head, o) for q in q_GH) for o in (p[0], p[-1])) for p in parts}
            if size == self.size:
                return best(worth, self.far)
            kept = best(worth, -(-self.spare * self.far * self.size // size))
            size //= 2
            parts = self.by_place(kept, size)

    def by_place(self, parts, size):
        """Parts cut where a new chunk of so many places begins."""
        return [tuple(o for o in p if o // size == c) for p in parts for c in sorted({o // size for o in p})]
