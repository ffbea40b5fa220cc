"""TransMLA (Meng et al. 2025, sec. 4): what is left of each row's key and value after the conversion, head by head, in float64."""

import numpy as np
from oracles.policies import Cache


def top(x_ND, n: int):
    """The n strongest principal directions (no mean taken off), as rows."""
    return np.linalg.svd(x_ND, full_matrices=True)[2][:n]


class Conversion:
    """Found on keys and values of a text: k_SKH unrotated, v_SKH. heads: so many keep their rotation, and of half a head more the half of
    its frequencies that turns fastest; rank: directions of the rest."""

    def __init__(self, k_SKH, v_SKH, heads: float, rank: int):
        (S, self.K, self.H), half = k_SKH.shape, k_SKH.shape[2] // 2
        whole, more = int(heads), int(heads % 1 * half)
        self.stays = np.zeros((self.K, self.H), bool)  # which numbers of a turned key keep their rotation
        self.stays[:whole] = True
        for i in range(more):
            self.stays[whole, i] = self.stays[whole, i + half] = True
        self.turns = []  # one (K, K) a frequency: row j is the j-th strongest mixture of heads
        for i in range(half):
            self.turns.append(top(np.concatenate([k_SKH[:, :, i], k_SKH[:, :, i + half]]), self.K))
        rest, v = np.stack([self.turn(k)[~self.stays] for k in k_SKH]), v_SKH.reshape(S, -1)
        of_k, of_v = (np.linalg.norm(x, axis=1).mean() for x in (rest, v))
        self.scale = of_v / of_k if of_k else 1.0
        self.directions = top(np.concatenate([self.scale * rest, v], axis=1), rank)

    def turn(self, k_KH, back=False):
        half, out = self.H // 2, np.empty_like(k_KH)
        for i, turn in enumerate(self.turns):
            for at in (i, i + half):
                out[:, at] = (turn.T if back else turn) @ k_KH[:, at]
        return out

    def row(self, k_KH, v_KH):
        """(the part of each head's key that keeps its rotation, the part that lost it, value)."""
        near, far = self.turn(k_KH), np.zeros_like(k_KH)
        flat = np.concatenate([self.scale * near[~self.stays], v_KH.reshape(-1)])
        flat = self.directions.T @ (self.directions @ flat)
        n = int((~self.stays).sum())
        far[~self.stays] = flat[:n] / self.scale
        near[~self.stays] = 0
        return self.turn(near, back=True), self.turn(far, back=True), flat[n:].reshape(self.K, self.H)


class TransMLA(Cache):
    """found: one Conversion a layer."""

    def __init__(self, model, seen, found):
        self.found, self.now = found, 0
        super().__init__(model, seen)
        self.parts = [{} for _ in seen]
        for layer, s in enumerate(seen):
            for o in s.orders:
                self.write(layer, o, s.k[o], s.v[o])

    def write(self, layer, order, k_KH, v_KH):
        near, far, value = self.parts[layer][order] = self.found[layer].row(k_KH, v_KH)
        for head in range(len(k_KH)):
            self.rows[layer][head][order] = (k_KH[head], value[head])

    def attend(self, layer, q_NH, k_KH, v_KH, order):
        self.now, self.new = order, (k_KH, v_KH)
        return super().attend(layer, q_NH, k_KH, v_KH, order)

    def chosen(self, layer, head, q_GH, order):
        self.write(layer, order, *self.new)  # the new row too is read as it is stored
        return super().chosen(layer, head, q_GH, order)

    def key(self, layer, head, order):
        """One part stands where the row does; the other where the query does, which is the same as no rotation of either."""
        near, far, _ = self.parts[layer][order]
        return self.m.rope(layer, near[head], order) + self.m.rope(layer, far[head], self.now)


def of_text(seen, heads: float, rank: int) -> list[Conversion]:
    """The conversions that one text's rows give, layer by layer."""
    rows = [[np.stack([x[o] for o in s.orders]) for x in (s.k, s.v)] for s in seen]
    return [Conversion(k, v, heads, rank) for k, v in rows]
