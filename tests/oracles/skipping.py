"""A model that leaves out halves of its layers, over rows that the whole model left: self-speculation as its papers state it."""

import copy

import numpy as np
from oracles.model import Model


class Skipping(Model):
    """The same weights without the attention of some layers and the feed-forward of others."""

    def __init__(self, params, cfg, attention=(), ffn=()):
        super().__init__(params, cfg)
        self.attention, self.ffn = attention, ffn

    def rest(self, layer, x_D, out_NH):
        if layer not in self.ffn:
            return super().rest(layer, x_D, out_NH)
        return x_D + np.einsum("dnh,nh->d", self.blocks[layer]["o_DNH"], out_NH)

    def row(self, cache, token: int, order: int) -> np.ndarray:
        """Logits behind one more row, which the cache takes in at the layers that attend."""
        x = self.embed(token)
        for layer in range(self.cfg.L):
            nothing = np.zeros((self.cfg.N, self.cfg.H))
            out = nothing if layer in self.attention else cache.attend(layer, *self.qkv(layer, x), order)
            x = self.rest(layer, x, out)
        return self.logits(x)


def grown(cache):
    """A cache that may take in rows without the given one taking them in."""
    new = copy.copy(cache)
    new.rows = [[dict(head) for head in layer] for layer in cache.rows]
    return new


def chain(model: Skipping, cache, root: int, length: int, sure: float = 0.0) -> tuple[list[int], list[list[int]]]:
    """(drafted tokens, the order of all tokens by their logits at each): ends behind the first whose probability is below `sure`."""
    cache, tokens, ranked = grown(cache), [root], []
    order = 1 + max(o for layer in cache.rows for head in layer for o in head)
    for t in range(length):
        logits = model.row(cache, tokens[-1], order + t)
        ranked.append(np.argsort(-logits, kind="stable").tolist())
        tokens.append(ranked[-1][0])
        if 1 / np.exp(logits - logits.max()).sum() < sure:
            break
    return tokens[1:], ranked


def agreement(model: Skipping, cache, tokens: list[int]) -> float:
    """The share of tokens[1:] that the model names, reading tokens[:-1] behind what the cache holds."""
    cache = grown(cache)
    order = 1 + max(o for layer in cache.rows for head in layer for o in head)
    named = [int(np.argmax(model.row(cache, token, order + t))) for t, token in enumerate(tokens[:-1])]
    return float(np.mean([a == b for a, b in zip(named, tokens[1:], strict=True)]))
