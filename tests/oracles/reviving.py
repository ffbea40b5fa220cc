"""LazyLLM with its Aux Cache (Fu et al. 2024, sec. 3.2), one prompt, row, layer and head at a time (float64).

A row's vector waits in `aux` at the layer where the row was dropped. Every decode step starts with the whole prompt; at each pruning layer
it goes on with the rows that the newest one looks at most. A row whose key is missing above is taken out of `aux` and computed.
"""

from collections import Counter

import numpy as np
from oracles.cascading import LastRow, Run, best
from oracles.model import softmax


class Reviving(Run):
    """most: how many missing rows may come back at a layer in one step."""

    def __init__(self, model, x: dict, at, keep, most=None):
        self.aux, self.computed, self.n, self.most = {}, Counter(), len(x), most
        super().__init__(model, x, set(), LastRow(at, keep, pictures=False))

    def layer(self, layer: int):
        entered = dict(self.x)
        super().layer(layer)
        self.aux.update({o: (layer, x) for o, x in entered.items() if o not in self.x})
        self.computed.update((layer, o) for o in entered)

    def rotated(self, layer: int, x, o: int):
        q, k, v = self.m.qkv(layer, x)
        q, k = (np.stack([self.m.rope(layer, y, o) for y in z]) for z in (q, k))
        return q, k, v

    def over(self, layer: int, q, orders):
        """(out_NH, mean probabilities) of a query over stored rows."""
        rows, out, mean = self.cache[layer], [], dict.fromkeys(orders, 0.0)
        for n in range(self.m.cfg.N):
            g = n // self.m.G
            p = softmax({o: self.m.dot(q[n], rows[o][0][g]) for o in orders})
            out.append(sum(p[o] * rows[o][1][g] for o in orders))
            mean = {o: mean[o] + p[o] / self.m.cfg.N for o in orders}
        return np.stack(out), mean

    def write(self, layer: int, o: int, k, v):
        assert o not in self.cache[layer], "computed twice"
        self.cache[layer][o] = k, v
        self.computed[layer, o] += 1

    def decode(self, token: int, order: int):
        """(logits, {pruning layer: rows chosen}, [(pruning layer, row that came back)])."""
        x, reads, chosen, back = self.m.embed(token), list(range(self.n)), {}, []
        for layer in range(self.m.cfg.L):
            q, k, v = self.rotated(layer, x, order)
            self.write(layer, order, k, v)
            out, mean = self.over(layer, q, reads + list(range(self.n, order + 1)))
            x = self.m.rest(layer, x, out)
            if layer in self.method.at:
                before, reads = reads, self.choose(layer, reads, mean)
                chosen[layer] = reads
                for o in reads:
                    if o not in self.cache[layer + 1]:
                        self.revive(o, layer, before, reads)
                        back.append((layer, o))
        return self.m.logits(x), chosen, back

    def choose(self, layer: int, rows: list, mean: dict) -> list:
        keep = self.method.keep[self.method.at.index(layer)]
        n = int(np.ceil(round(keep * self.n, 6))) if isinstance(keep, float) else min(keep, self.n)
        missing = {o: mean[o] for o in rows if o not in self.cache[layer + 1]}
        waits = set(missing) - best(missing, len(missing) if self.most is None else self.most)
        return sorted(best({o: mean[o] for o in rows if o not in waits}, n))

    def revive(self, o: int, layer: int, before: list, reads: list):
        """From the layer where it waits up to the next one that prunes, over what this step reads, as far as it is not younger."""
        at, x = self.aux.pop(o)
        assert at == layer
        q, _, _ = self.rotated(layer, x, o)
        x = self.m.rest(layer, x, self.over(layer, q, [s for s in before if s <= o])[0])
        for above in range(layer + 1, self.m.cfg.L):
            q, k, v = self.rotated(above, x, o)
            self.write(above, o, k, v)
            if above in self.method.at:
                self.aux[o] = above, x
                return
            x = self.m.rest(above, x, self.over(above, q, [s for s in reads if s <= o])[0])


def generate(run: Reviving, n: int):
    """(text, [(logits, chosen, who came back) of every step]) of n greedy tokens."""
    text, said = [int(np.argmax(run.logits))], []
    while len(text) < n:
        said.append(run.decode(text[-1], run.n + len(text) - 1))
        text.append(int(np.argmax(said[-1][0])))
    return text, said
