"""SentenceKV (Zhu et al. 2025) over sets of rows: what SnapKV keeps, grouped by sentence, and read by the sentence being written."""

import numpy as np
from oracles.policies import Cache, best, snap_scores


def split(ids, ends, cell: int, longest: int, closed: int | None = None) -> list[int]:
    """The sentence of each token. A sentence ends at the first end in each `cell` places, at place `closed`, and after `longest` tokens."""
    found, number, begin, cells = [], 0, 0, set()
    for place, token in enumerate(ids):
        if place == closed:
            number, begin = number + 1, place
        elif place > begin and (place - begin) % longest == 0:
            number += 1
        found.append(number)
        if token in ends:
            if place // cell not in cells:
                number, begin = number + 1, place + 1
            cells.add(place // cell)
    return found


class SentenceKV(Cache):
    """ids: the prompt's tokens and those that will be given. Of the prompt `rows` stay: the first `sinks`, the window or the recent rows,
    and the best by SnapKV's score. A query reads the first `sinks`, the last `recent`, and `far` rows of sentences wholly before those."""

    def __init__(self, model, seen, ids, rows: int, far: int, *, sinks, recent, window, kernel, ends, cell, longest):
        self.n, self.far, self.sinks, self.recent, self.window, self.kernel = rows, far, sinks, recent, window, kernel
        prompt = len(seen[0].orders)
        self.of = split(ids, ends, cell, longest, prompt)
        self.asked = {}
        super().__init__(model, seen)

    def first(self, layer, head, s):
        sure = {*s.orders[: self.sinks], *self.newest(s, max(self.window, self.recent))}
        score = snap_scores(self.m, s, head, self.window, self.kernel, "max")
        return sorted(sure | set(best({o: x for o, x in score.items() if o not in sure}, self.n - len(sure))))

    def chosen(self, layer, head, q_GH, order):
        asked = self.asked.setdefault((layer, head), {})
        asked[order] = q_GH
        query = sum(q for o, qs in asked.items() if self.of[o] == self.of[order] for q in qs)
        rows = sorted(self.rows[layer][head])
        recent = [o for o in rows if o > order - self.recent]
        worth = {}
        for sentence in {self.of[o] for o in rows} - {self.of[o] for o in recent}:
            own = [o for o in rows if self.of[o] == sentence]
            worth |= dict.fromkeys(own, query @ np.mean([self.key(layer, head, o) for o in own], axis=0))
        loose = sorted((o for o in worth if o >= self.sinks), key=lambda o: (-worth[o], o))
        return sorted({*(o for o in rows if o < self.sinks), *loose[: self.far], *recent})
