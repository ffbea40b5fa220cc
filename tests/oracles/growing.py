"""A tree that grows by as many nodes in every step, over lists and dicts (Yggdrasil's equal growth)."""

import numpy as np


def equal_growth(step, cache, root: int, length: int, width: int, guesses: int) -> tuple[list[int], list[int]]:
    """(parent, token) of every node, the root first. step(cache, token) -> (logits, a cache with that row).

    A guess is worth the product of the probabilities from the root down to it. In each of `length` steps the `width` guesses that are worth
    most become nodes, of those behind any node that ran; of equals the one behind the earlier node, then the more probable one.
    """
    parent, token, worth, caches, found, fresh = [0], [root], [0.0], [cache], {}, [0]
    for _ in range(length):
        for node in fresh:
            logits, caches[node] = step(caches[node], token[node])
            share = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
            for rank, guess in enumerate(np.argsort(-logits, kind="stable")[:guesses].tolist()):
                found[node, rank] = (worth[node] + share[guess], guess)
        best = sorted(found, key=lambda at: (-found[at][0], *at))[:width]
        fresh = list(range(len(token), len(token) + len(best)))
        for at in best:
            value, guess = found.pop(at)
            parent, token, worth, caches = [*parent, at[0]], [*token, guess], [*worth, value], [*caches, caches[at[0]]]
    return parent, token
