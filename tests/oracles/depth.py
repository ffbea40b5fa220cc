"""FFN-SkipLLM, SkipDecode and R2R as their papers state them, one token and one layer at a time.

A step reads the last token of a text and gives the logits of the next one; `t` is how many tokens were generated before that one.
"""

from fractions import Fraction
from math import floor

import numpy as np
from oracles.model import decode


def mixed(model, layer: int, x_D, out_NH):
    """A row behind the attention half."""
    return x_D + np.einsum("dnh,nh->d", model.blocks[layer]["o_DNH"], out_NH)


def fed(model, layer: int, x_D):
    """A row behind the feed-forward half: the block without attention."""
    return model.rest(layer, x_D, np.zeros((model.cfg.N, model.cfg.H)))


def ffn_skip(cache, token: int, order: int, t: int, tau: float, head: int, tail: int, warm: int):
    """Jaiswal et al. 2024: (logits, layers whose feed-forward ran). Once one of the middle hardly turns the row, those above it are left
    out, up to the last `tail`."""
    model, ran, saturated = cache.m, [], False
    x, L = model.embed(token), model.cfg.L
    for layer in range(L):
        x = mixed(model, layer, x, cache.attend(layer, *model.qkv(layer, x), order))
        cold = layer < head or layer >= L - tail
        if saturated and not cold:
            continue
        y = fed(model, layer, x)
        ran.append(layer)
        if not cold and t >= warm and x @ y / np.sqrt((x @ x) * (y @ y)) >= tau:
            saturated = True
        x = y
    return model.logits(x), ran


def skip_decode(cache, token: int, order: int, t: int, most: int, least: int, warm: int, over: int, stairs: int | None):
    """Del Corro et al. 2023: (logits, layers that ran). Fails where a layer that runs misses a row."""
    model, way = cache.m, min(Fraction(t, over), 1)
    if stairs:  # the part of the way that the token lies in
        way = Fraction(min(floor(way * stairs), stairs - 1), stairs - 1)
    budget = floor(most - (most - least) * way + Fraction(1, 2))
    x, L = model.embed(token), model.cfg.L
    ran = [*range(warm), *range(L - (budget - warm), L)]
    for layer in ran:
        assert cache.kept(layer, 0) == list(range(order)), f"layer {layer} has not every row before {order}"
        x = model.rest(layer, x, cache.attend(layer, *model.qkv(layer, x), order))
    return model.logits(x), ran


def generate(step, cache, logits, start: int, n: int, **settings):
    """(text, logits of every step, what ran in every step) of n greedy tokens, the first of them from the prompt's logits."""
    text, said, ran = [int(np.argmax(logits))], [], []
    while len(text) < n:
        logits, layers = step(cache, text[-1], start + len(text) - 1, len(text), **settings)
        text.append(int(np.argmax(logits)))
        said.append(logits)
        ran.append(layers)
    return text, said, ran


def routed(large, small, logits, start: int, n: int, sure: float):
    """Fu et al. 2025 with a threshold for a router: (text, which of its tokens the large model gave). Both models read every token."""
    text, asked = [int(np.argmax(logits))], [True]
    while len(text) < n:
        here = [text[-1]], start + len(text) - 1
        ((mine, _),), ((theirs, _),) = decode(large.m, large, *here), decode(small.m, small, *here)
        p = np.exp(theirs - theirs.max())
        asked.append(bool(p.max() / p.sum() < sure))
        text.append(int(np.argmax(mine if asked[-1] else theirs)))
    return text, asked
