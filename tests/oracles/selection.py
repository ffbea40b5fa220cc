"""Methods that keep every row and read few (TidalDecode, ShadowKV), and passes that let few rows go on (GemFilter, PromptDistill)."""

from dataclasses import dataclass

import numpy as np
from oracles.model import Model, Seen, prefill, softmax
from oracles.policies import Cache, best


class TidalDecode(Cache):
    """Yang et al. 2024: selecting layers read everything and choose the `far` rows with the largest q.k; the layers above them read those.

    The last `recent` rows are always read and are no candidates. A kv head's query heads choose together, by the sum.
    """

    def __init__(self, model, seen, far: int, recent: int, dense, select):
        self.far, self.recent, self.dense, self.select, self.selection = far, recent, dense, select, {}
        super().__init__(model, seen)

    def chosen(self, layer, head, q_GH, order):
        rows = sorted(self.rows[layer][head])
        near = [o for o in rows if o > order - self.recent]
        if layer in self.select:
            score = {o: sum(self.m.dot(q, self.key(layer, head, o)) for q in q_GH) for o in rows if o not in near}
            self.selection[head] = best(score, self.far)
        if layer in self.select or layer in self.dense:
            return rows
        return [o for o in rows if o in self.selection[head] or o in near]


class ShadowKV(Cache):
    """Sun et al. 2024: unrotated keys of all heads as one matrix cut to `rank`; chunks with landmarks; the `outliers` chunks that their
    landmark describes worst, the last `local` chunks, the incomplete one and generated rows stay exact."""

    def __init__(self, model, seen, read: int, rank: int, chunk: int, outliers: int, local: int):
        self.read, self.rank, self.chunk, self.outliers, self.local = read, rank, chunk, outliers, local
        super().__init__(model, seen)
        self.low = [self.cut_rank(s) for s in seen]
        self.open = [[self.landmarks(s, h) for h in range(model.cfg.K)] for s in seen]

    def cut_rank(self, s: Seen) -> dict:
        """{order: (K, H) low-rank unrotated key}."""
        x = np.stack([s.k[o].reshape(-1) for o in s.orders])
        u, size, basis = np.linalg.svd(x, full_matrices=False)
        x = u[:, : self.rank] * size[: self.rank] @ basis[: self.rank]
        return {o: x[i].reshape(self.m.cfg.K, -1) for i, o in enumerate(s.orders)}

    def landmarks(self, s: Seen, head: int) -> dict:
        """{orders of a chunk: its landmark} of the chunks that are read by landmark."""
        whole = [tuple(s.orders[i : i + self.chunk]) for i in range(0, len(s.orders) - self.chunk + 1, self.chunk)]
        far = whole[: len(whole) - self.local]
        mean = {c: np.mean([s.rotated[o][head] for o in c], axis=0) for c in far}
        cosine = {c: min(self.cos(s.rotated[o][head], mean[c]) for o in c) for c in far}
        worst = sorted(far, key=lambda c: cosine[c])[: self.outliers]
        return {c: mean[c] for c in far if c not in worst}

    def cos(self, a, b) -> float:
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    def key(self, layer, head, order):
        if any(order in c for c in self.open[layer][head]):
            return self.m.rope(layer, self.low[layer][order][head], order)
        return super().key(layer, head, order)

    def chosen(self, layer, head, q_GH, order):
        chunks = self.open[layer][head]
        shares = [softmax({c: self.m.dot(q, mark) for c, mark in chunks.items()}) for q in q_GH]
        read = best({c: max(p[c] for p in shares) for c in chunks}, self.read)
        hidden = {o for c in chunks if c not in read for o in c}
        return [o for o in self.rows[layer][head] if o not in hidden]


@dataclass
class LastRowTopK:
    """Raw q.k of the last row, summed over heads and averaged over the neighbours that exist; the last row always goes on."""

    layer: int
    rows: int
    kernel: int = 5

    def choose(self, model: Model, layer: int, s: Seen) -> list[int]:
        last = s.orders[-1]
        q = [model.rope(layer, x, last) for x in s.q[last]]
        raw = [sum(model.dot(q[n], s.rotated[o][n // model.G]) for n in range(model.cfg.N)) for o in s.orders]
        half = self.kernel // 2
        near = [raw[max(0, i - half) : i + half + 1] for i in range(len(raw))]
        score = {o: np.mean(x) for o, x in zip(s.orders, near, strict=True) if o != last}
        return [*best(score, self.rows - 1), last]


def promptdistill(model: Model, tokens, layer: int, rows: int):
    """Jin et al. 2025: from `layer` on only the chosen hidden rows, at their own positions."""
    return prefill(model, tokens, LastRowTopK(layer, rows))


def gemfilter(model: Model, tokens, layer: int, rows: int):
    """Shi et al. 2024: (places chosen at `layer`, prefill of those tokens alone, renumbered)."""
    seen, _ = prefill(model, tokens)
    places = LastRowTopK(layer, rows).choose(model, layer, seen[layer])
    return places, *prefill(model, [tokens[o] for o in places])
