"""A prompt read piece by piece over explicit sets of rows, some of which leave each head between two pieces."""

import numpy as np
from oracles.model import Model, softmax
from oracles.policies import best


class Piecewise:
    """rows[layer][head]: {order: (rotated key, value)}. `keep(mass, last, orders, end)` names the orders that stay in one head: mass is
    the attention each row got so far from any query, last[q] what it got from the query at order q of this piece, both summed over the
    group; end is the order behind the piece. A list has one for each head. `leave(head, rows, mass, gone)` may change rows that stay."""

    def __init__(self, model: Model, tokens, piece: int, keep, leave=None):
        self.m, self.keep, self.leave, cfg = model, keep, leave, model.cfg
        self.rows = [[{} for _ in range(cfg.K)] for _ in range(cfg.L)]
        self.mass = [[{} for _ in range(cfg.K)] for _ in range(cfg.L)]
        for a in range(0, len(tokens), piece):
            some = range(a, min(a + piece, len(tokens)))
            x = {order: model.embed(tokens[order]) for order in some}
            for layer in range(cfg.L):
                x = self.layer(layer, x, some)
        self.logits = model.logits(x[len(tokens) - 1])

    def layer(self, layer: int, x: dict, some: range) -> dict:
        m, out = self.m, {}
        qkv = {order: m.qkv(layer, x[order]) for order in some}
        for order in some:
            for h in range(m.cfg.K):
                self.rows[layer][h][order] = (m.rope(layer, qkv[order][1][h], order), qkv[order][2][h])
        last = [{} for _ in range(m.cfg.K)]
        for order in some:
            read = np.stack([self.read(layer, n, order, qkv[order][0][n], last[n // m.G]) for n in range(m.cfg.N)])
            out[order] = m.rest(layer, x[order], read)
        for h, rows in enumerate(self.rows[layer]):
            keep = self.keep[h] if isinstance(self.keep, list) else self.keep
            gone = sorted(set(rows) - set(keep(self.mass[layer][h], last[h], sorted(rows), some.stop)))
            if self.leave:
                self.leave(h, rows, self.mass[layer][h], gone)
            for order in gone:
                del rows[order]
        return out

    def read(self, layer: int, n: int, order: int, q_H, last: dict):
        m, h = self.m, n // self.m.G
        q, rows = m.rope(layer, q_H, order), self.rows[layer][h]
        p = softmax({o: m.dot(q, k) for o, (k, _) in rows.items() if o <= order})
        for o, share in p.items():
            self.mass[layer][h][o] = self.mass[layer][h].get(o, 0) + share
            last.setdefault(order, {})
            last[order][o] = last[order].get(o, 0) + share
        return sum(share * rows[o][1] for o, share in p.items())

    def kept(self, layer: int, head: int) -> list[int]:
        return sorted(self.rows[layer][head])


def heavy(budget: int, recent: int):
    """H2O: `recent` newest rows, and those with the most attention so far."""

    def keep(mass, last, orders, end):
        new = orders[-recent:]
        return best({o: mass[o] for o in orders if o not in new}, budget - len(new)) + new

    return keep


def window(budget: int, size: int, kernel: int):
    """SnapKV: the last `size` rows, and those that these looked at most, averaged over neighbours among the rows that are there."""

    def keep(mass, last, orders, end):
        new = [o for o in orders if o >= end - size]
        seen = [0.0 if o in new else sum(p.get(o, 0.0) for q, p in last.items() if q >= end - size) for o in orders]
        half = kernel // 2
        pooled = {o: sum(seen[max(i - half, 0) : i + half + 1]) / kernel for i, o in enumerate(orders)}
        return best({o: pooled[o] for o in orders if o not in new}, budget - len(new)) + new

    return keep


def bequeathed(over: int, coin):
    """CaM: each row that goes adds its value / over to the rows of the next `over` places that stay, if coin(head, order) falls below its
    attention so far over the mean of that of the rows behind it that stay."""

    def leave(head, rows, mass, gone):
        for o in gone:
            behind = [x for x in rows if x > o and x not in gone]
            if behind and coin(head, o) < mass[o] / np.mean([mass[x] for x in behind]):
                for x in behind:
                    if x <= o + over:
                        rows[x] = (rows[x][0], rows[x][1] + rows[o][1] / over)

    return leave


def newest(budget: int, sinks: int = 0):
    def keep(mass, last, orders, end):
        new = [o for o in orders if o < sinks]
        return new + [o for o in orders if o >= sinks][-(budget - len(new)) :]

    return keep
