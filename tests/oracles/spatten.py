"""SpAtten (Wang et al. 2021), one prompt at a time, in float64 loops: heads and rows that leave on the way up (sec. III-A, III-B, alg. 2),
values of the most probable rows alone (sec. III-C), keys that are read again with more bits where attention is flat (sec. III-D)."""

import numpy as np
from oracles.model import Model, softmax
from oracles.policies import Cache


def best(score: dict, n: int) -> list:
    """The n keys of the highest scores, earlier ones first among equals, ascending."""
    return sorted(sorted(score, key=lambda key: (-score[key], key))[:n])


class Cascades:
    """A prompt under both cascades, and tokens behind it.

    rows, heads: {layer: how many rows, or kv heads, are left above it}. `alive[i]`: the kv heads that attend in layer i; `cache[i]`: of
    each of them its rows, order -> (rotated key, value).
    """

    def __init__(self, model: Model, tokens, rows: dict, heads: dict):
        self.m, self.rows, self.heads = model, rows, heads
        self.x = {order: model.embed(token) for order, token in enumerate(tokens)}
        self.score, self.loud = dict.fromkeys(self.x, 0.0), dict.fromkeys(range(model.cfg.K), 0.0)
        self.alive, self.cache = [], []
        for layer in range(model.cfg.L):
            self.layer(layer)
        self.logits = model.logits(self.x[max(self.x)])

    def layer(self, layer: int) -> None:
        made = {o: self.m.qkv(layer, x) for o, x in self.x.items()}
        q, k = ({o: np.stack([self.m.rope(layer, y, o) for y in made[o][i]]) for o in made} for i in (0, 1))
        heads = sorted(self.loud)
        looks = {(o, n): softmax({s: self.m.dot(q[o][n], k[s][n // self.m.G]) for s in k if s <= o}) for o in q for n in self.asks(heads)}
        for p in looks.values():
            for s in p:
                self.score[s] += p[s]
        asking = sorted(self.x)
        if layer in self.rows:
            asking = best({o: np.inf if o == max(self.x) else self.score[o] for o in self.x}, self.rows[layer])
        self.alive.append(heads)
        self.cache.append({h: {o: (k[o][h], made[o][2][h]) for o in k} for h in heads})
        out = {o: np.zeros((self.m.cfg.N, self.m.cfg.H)) for o in asking}
        for o in asking:
            for n in self.asks(heads):
                out[o][n] = sum(p * made[s][2][n // self.m.G] for s, p in looks[o, n].items())
                self.loud[n // self.m.G] += np.abs(out[o][n]).sum()
        self.x = {o: self.m.rest(layer, self.x[o], out[o]) for o in asking}
        if layer in self.heads:
            self.loud = {h: self.loud[h] for h in best(self.loud, self.heads[layer])}

    def asks(self, heads) -> list[int]:
        """The query heads of these kv heads."""
        return [h * self.m.G + g for h in heads for g in range(self.m.G)]

    def decode(self, token: int, order: int) -> np.ndarray:
        """Logits behind one more token, under the heads that the prompt left."""
        x = self.m.embed(token)
        for layer, heads in enumerate(self.alive):
            q, k, v = self.m.qkv(layer, x)
            q, k = (np.stack([self.m.rope(layer, y, order) for y in z]) for z in (q, k))
            out = np.zeros_like(q)
            for h in heads:
                rows = self.cache[layer][h]
                rows[order] = k[h], v[h]
                for n in self.asks([h]):
                    p = softmax({s: self.m.dot(q[n], rows[s][0]) for s in rows})
                    out[n] = sum(p[s] * rows[s][1] for s in rows)
            x = self.m.rest(layer, x, out)
        return self.m.logits(x)


def codes(row_H: np.ndarray, high: int, low: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """(a key by its high bits, a key by all bits): each group of numbers in 2**(high + low) equal steps over its range."""
    first, whole = np.empty_like(row_H), np.empty_like(row_H)
    for i in range(0, len(row_H), group):
        part = row_H[i : i + group]
        step = (part.max() - part.min()) / (2 ** (high + low) - 1)
        code = np.round((part - part.min()) / (step or 1))
        upper = np.floor(code / 2**low) * 2**low
        first[i : i + group] = part.min() + step * (upper + (2**low - 1) / 2)
        whole[i : i + group] = part.min() + step * code
    return first, whole


def read(q_GH, keys: dict, values: dict, dot, bits=None, tau: float = 0.0, n: int | None = None) -> tuple[list, bool]:
    """(what the query heads of a kv head get, whether one of them read the low bits). keys: rotated. n: values read, None for all."""
    written = {o: (k, k) if bits is None else codes(k, *bits) for o, k in keys.items()}
    looks, again = [], False
    for q in q_GH:
        p = softmax({o: dot(q, k[0]) for o, k in written.items()})
        if max(p.values()) < tau:
            p, again = softmax({o: dot(q, k[1]) for o, k in written.items()}), True
        looks.append(p)
    mass = {o: sum(p[o] for p in looks) for o in keys}
    chosen = keys if n is None else best(mass, n)
    return [sum((p[o] * values[o] for o in chosen), 0 * q_GH[0]) for p in looks], again


class Reads(Cache):
    """Decoding so. values: of how many rows; again[layer][head]: how often low bits were read."""

    def __init__(self, model, seen, bits=None, tau: float = 0.0, values: int | None = None, keep=None):
        self.bits, self.tau, self.n, self.keep = bits, tau, values, keep
        super().__init__(model, seen)
        self.again = [[0] * model.cfg.K for _ in seen]

    def first(self, layer, head, s):
        return s.orders if self.keep is None else self.keep(layer, head)

    def attend(self, layer, q_NH, k_KH, v_KH, order):
        G, out = self.m.G, np.zeros_like(q_NH)
        for head, rows in enumerate(self.rows[layer]):
            rows[order] = k_KH[head], v_KH[head]
            q_GH = [self.m.rope(layer, q, order) for q in q_NH[head * G : (head + 1) * G]]
            keys, values = {o: self.key(layer, head, o) for o in rows}, {o: rows[o][1] for o in rows}
            out[head * G : (head + 1) * G], again = read(q_GH, keys, values, self.m.dot, self.bits, self.tau, self.n)
            self.again[layer][head] += again
        return out
