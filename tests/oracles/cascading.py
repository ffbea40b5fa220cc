"""Passes with several stages, one prompt at a time: rows leave a dict on the way up (float64, loops over rows and heads).

LazyLLM (Fu et al. 2024), SpAtten (Wang et al. 2021), FastV (Chen et al. 2024), PyramidDrop (Xing et al. 2024), TransPrune (Li et al. 2025),
SparseVLM (Zhang et al. 2024), DART (Wen et al. 2025), skipping (Shukor & Cord 2024). Rows are known by their order; `position` is what the
rotary embedding turns by.
"""

from math import ceil

import numpy as np
from oracles.model import Model, softmax


def best(score: dict, n: int) -> set:
    """The n rows with the highest score, earlier ones first among equals."""
    return set(sorted(score, key=lambda o: (-score[o], o))[:n])


def unit(x):
    return x / np.linalg.norm(x)


class Run:
    """A prompt through the network under a method, and tokens decoded behind it with all rows that each layer holds."""

    def __init__(self, model: Model, x: dict, pictured: set, method):
        self.m, self.x, self.pictured, self.method = model, dict(x), set(pictured) - {max(x)}, method
        self.first = dict(x)
        self.position = {o: o for o in x}
        self.score, self.cache = {}, []
        for layer in range(model.cfg.L):
            self.layer(layer)
        self.logits = model.logits(self.x[max(self.x)])

    def layer(self, layer: int):
        how, b = self.method, self.m.blocks[layer]
        if layer in how.at and not how.writes:
            self.project(layer)
            how.drop(self, layer, how.choose(self, layer))
        self.project(layer)
        how.note(self, layer)
        self.cache.append({o: (self.k[o], self.v[o]) for o in self.k})
        asking = how.choose(self, layer) if layer in how.at and how.writes else sorted(self.x)
        added = {o: np.einsum("dnh,nh->d", b["o_DNH"], self.attend(o)) for o in asking if o in self.q}
        how.added(self, layer, {o: self.m.rms(self.x[o], b["attn_norm_D"]) for o in added}, added)
        self.x = {o: self.x[o] + added.get(o, 0) for o in asking}
        fed = [o for o in asking if o not in how.resting(self, layer)[1]]
        none = np.zeros((self.m.cfg.N, self.m.cfg.H))
        added = {o: self.m.rest(layer, self.x[o], none) - self.x[o] for o in fed}
        how.added(self, layer, {o: self.m.rms(self.x[o], b["ffn_norm_D"]) for o in added}, added)
        self.x = {o: self.x[o] + added.get(o, 0) for o in asking}

    def project(self, layer: int):
        self.q, self.k, self.v = {}, {}, {}
        for o, x in self.x.items():
            if o in self.method.resting(self, layer)[0]:
                continue
            q, k, self.v[o] = self.m.qkv(layer, x)
            self.q[o], self.k[o] = (np.stack([self.m.rope(layer, y, self.position[o]) for y in z]) for z in (q, k))

    def looks(self, o: int, n: int) -> dict:
        """Attention of row o, head n, over the rows up to itself."""
        return softmax({s: self.m.dot(self.q[o][n], self.k[s][n // self.m.G]) for s in self.k if s <= o})

    def mean_look(self, o: int) -> dict:
        heads = [self.looks(o, n) for n in range(self.m.cfg.N)]
        return {s: float(np.mean([p[s] for p in heads])) for s in heads[0]}

    def attend(self, o: int):
        return np.stack([sum(p * self.v[s][n // self.m.G] for s, p in self.looks(o, n).items()) for n in range(self.m.cfg.N)])

    def asking(self) -> list:
        """Rows of text behind the last picture; where there are none, the prompt's last row, which always goes on."""
        end = max((o for o in self.x if o in self.pictured), default=-1)
        return [o for o in sorted(self.x) if o > end]

    def decode(self, token: int, order: int):
        """Logits after one more token, which goes through all layers."""
        x = self.m.embed(token)
        for layer, rows in enumerate(self.cache):
            q, k, v = self.m.qkv(layer, x)
            place = len(rows) if self.method.renumber else order
            q, k = (np.stack([self.m.rope(layer, y, place) for y in z]) for z in (q, k))
            rows[order] = k, v
            out = []
            for n in range(self.m.cfg.N):
                p = softmax({s: self.m.dot(q[n], key[n // self.m.G]) for s, (key, _) in rows.items()})
                out.append(sum(p[s] * rows[s][1][n // self.m.G] for s in rows))
            x = self.m.rest(layer, x, np.stack(out))
        return self.m.logits(x)


class Method:
    """Of the rows that may go, a share of those there were at first, or a number, by a score."""

    writes, renumber = True, False

    def __init__(self, at, keep, pictures: bool = True):
        self.at, self.keep, self.pictures, self.whole = tuple(at), tuple(keep), pictures, None

    def free(self, run: Run) -> list:
        return [o for o in sorted(run.x) if not self.pictures or o in run.pictured]

    def many(self, run: Run, layer: int) -> int:
        free, keep = self.free(run), self.keep[self.at.index(layer)]
        self.whole = len(free) if self.whole is None else self.whole
        return min(ceil(round(keep * self.whole, 6)) if isinstance(keep, float) else keep, len(free))

    def choose(self, run: Run, layer: int) -> list:
        n, score, free = self.many(run, layer), self.rank(run, layer), self.free(run)
        if not self.pictures:
            score = {**score, max(free): np.inf}
        return sorted(set(run.x) - set(free) | best({o: score[o] for o in free}, n))

    def drop(self, run: Run, layer: int, left: list):
        run.x = {o: run.x[o] for o in left}
        if self.renumber:
            run.position = {o: i for i, o in enumerate(left)}

    def note(self, run: Run, layer: int):
        pass

    def added(self, run: Run, layer: int, y: dict, out: dict):
        pass

    def resting(self, run: Run, layer: int) -> tuple:
        """Rows that pass attention by, and those that pass the feed-forward by."""
        return (), ()

    def rank(self, run: Run, layer: int) -> dict:
        raise NotImplementedError


class LastRow(Method):
    """LazyLLM, FastV: the last row's probabilities, the mean over heads."""

    def rank(self, run, layer):
        return run.mean_look(max(run.x))


class Mass(Method):
    """SpAtten: probabilities summed over heads, queries and layers."""

    def note(self, run, layer):
        for o in run.x:
            for s, p in run.mean_look(o).items():
                run.score[s] = run.score.get(s, 0) + p

    def rank(self, run, layer):
        return run.score


class PyramidDrop(LastRow):
    writes, renumber = False, True


class TransPrune(Method):
    writes, renumber = False, True

    def added(self, run, layer, y, out):
        if not self.at[0] - 1 <= layer < self.at[-1]:
            return
        turn = softmax({o: 1 - unit(y[o]) @ unit(out[o]) for o in y})
        for o in y:
            run.score[o] = run.score.get(o, 0) + np.linalg.norm(out[o]) / np.linalg.norm(y[o]) * turn[o]

    def rank(self, run, layer):
        free, asks = self.free(run), run.asking()
        looks = [run.mean_look(o) for o in asks]
        seen = {o: np.mean([p[o] for p in looks]) for o in free}
        return {o: seen[o] / sum(seen.values()) + run.score[o] / sum(run.score[s] for s in free) for o in free}


class DART(Method):
    """Pivots by the L1 norm of keys, then what is least like each of them; the remainder by that norm."""

    writes = False

    def note(self, run, layer):
        if layer + 1 in self.at:
            run.score = {o: float(np.abs(k).sum()) for o, k in run.k.items()}

    def choose(self, run, layer):
        n, free, pivots = self.many(run, layer), self.free(run), 4
        text = [o for o in run.x if o not in free]
        mine = sorted(free, key=lambda o: -run.score[o])[: min(pivots, n)]
        theirs = sorted(text, key=lambda o: -run.score[o])[:pivots]
        taken, each = set(mine), (n - len(mine)) // (2 * pivots)
        for p in mine + theirs:
            pool = [o for o in free if o not in taken]
            taken |= set(sorted(pool, key=lambda o: unit(run.x[o]) @ unit(run.x[p]))[:each])
        rest = [o for o in free if o not in taken]
        return sorted(text + list(taken | set(sorted(rest, key=lambda o: -run.score[o])[: n - len(taken)])))


class Resting(Method):
    def __init__(self, layers, halves):
        super().__init__((), ())
        self.layers, self.halves = layers, halves

    def resting(self, run, layer):
        return tuple(run.pictured if layer in self.layers and half else () for half in self.halves)


class SparseVLM(Method):
    writes, renumber = False, True

    def __init__(self, at, keep, recycle=0.3):
        super().__init__(at, keep)
        self.recycle = recycle

    def raters(self, run):
        seen, text = sorted(run.pictured), [o for o in run.first if o > max(run.pictured)]
        share = {t: 0.0 for t in text}
        for s in seen:
            for t, p in softmax({t: run.first[s] @ run.first[t] for t in text}).items():
                share[t] += p / len(seen)
        mean = np.mean(list(share.values()))
        return [t for t in text if share[t] > mean] if len(text) > 1 else text

    def note(self, run, layer):
        if layer + 1 in self.at:
            looks = [run.mean_look(o) for o in self.raters(run)]
            run.score = {o: np.mean([p[o] for p in looks]) for o in self.free(run)}

    def choose(self, run, layer):
        n, free = self.many(run, layer), self.free(run)
        self.stays = best({o: run.score[o] for o in free}, n)
        gone = {o: run.score[o] for o in free if o not in self.stays}
        self.groups = {}
        if gone and self.recycle:
            again = sorted(gone, key=lambda o: (-gone[o], o))[: int(len(gone) * self.recycle + 1e-9) + 1]
            self.groups = clusters({o: run.x[o] for o in again}, len(again) // 10 + 1)
        return sorted(set(run.x) - set(free) | self.stays | set(self.groups))

    def drop(self, run, layer, left):
        x = {c: np.mean([run.x[o] for o in group], axis=0) for c, group in self.groups.items()}
        run.x = {**run.x, **x}
        super().drop(run, layer, left)


def clusters(x: dict, n: int) -> dict:
    """{centre: its rows}: density peaks over nearest neighbours (Du et al. 2016)."""
    rows = list(x)
    d = {a: {b: np.linalg.norm(x[a] - x[b]) / len(x[a]) ** 0.5 for b in rows} for a in rows}
    log = {a: -np.mean([r**2 for r in sorted(d[a].values())[:n]]) for a in rows}
    far = max(max(row.values()) for row in d.values())
    before = {a: [b for i, b in enumerate(rows) if (log[b], -i) > (log[a], -rows.index(a))] for a in rows}
    apart = {a: min([d[a][b] for b in before[a]], default=far) for a in rows}
    with np.errstate(divide="ignore"):
        centres = sorted(rows, key=lambda a: -np.log(apart[a]) - log[a])[:n]
    groups = {c: [c] for c in centres}
    for a in rows:
        if a not in groups:
            groups[min(centres, key=lambda c: d[a][c])].append(a)
    return groups


def page_rank(dot, rows, heads: int, heat: float) -> dict:
    """Mass that starts evenly moves five times along each head's map at a temperature; the root of its mean square over heads. dot(t, s,
    n): the scaled product of row t's query with row s's key in head n."""
    total = 0
    for n in range(heads):
        p = np.zeros((len(rows), len(rows)))
        for i, t in enumerate(rows):
            seen = softmax({s: dot(t, s, n) / heat for s in rows if s <= t})
            p[i] = [seen.get(s, 0) for s in rows]
        total = total + np.linalg.matrix_power(p, 5).mean(axis=0) ** 2
    return dict(zip(rows, np.sqrt(total / heads), strict=True))


class AIM(Method):
    def __init__(self, at, keep, heat):
        super().__init__(at, keep)
        self.heat = heat

    def rank(self, run, layer):
        return page_rank(lambda t, s, n: run.m.dot(run.q[t][n], run.k[s][n // run.m.G]), sorted(run.x), run.m.cfg.N, self.heat)


class MustDrop(Method):
    """Stays where the instruction's attention sums to a share of all, or one of its rows gives it so much."""

    def __init__(self, at, keep, total, single):
        super().__init__(at, keep)
        self.total, self.single = total, single

    def choose(self, run, layer):
        n, free = self.many(run, layer), self.free(run)
        looks = [run.mean_look(o) for o in run.asking()]
        mass = {o: sum(p[o] for p in looks) for o in free}
        stays = {o: mass[o] for o in free if mass[o] >= self.total * sum(mass.values()) or max(p[o] for p in looks) >= self.single}
        return sorted(set(run.x) - set(free) | best(stays, n))
