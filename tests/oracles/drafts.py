"""Drafting and verification over lists and dicts, and the law of sampled text, as the papers state them."""

import numpy as np


def ancestors(parent: list[int], node: int) -> set[int]:
    """A node and everything above it; the root is its own parent."""
    found = {node}
    while parent[node] != node:
        node = parent[node]
        found.add(node)
    return found


def accepted(parent, token, valid, target) -> tuple[list[int], list[int]]:
    """(path from the root, committed tokens): a node is accepted iff its parent is and its token is the target's there. Commits the
    deepest accepted path (the first of equals) and the target's token at its end."""
    good = {0}
    for node in range(1, len(parent)):
        if valid[node] and parent[node] in good and token[node] == target[parent[node]]:
            good.add(node)
    end = max(sorted(good), key=lambda node: len(ancestors(parent, node)))
    path = sorted(ancestors(parent, end), key=lambda node: len(ancestors(parent, node)))
    return path, [target[node] for node in path]


def prompt_lookup(text: list[int], length: int, ngram: int, latest: bool = False) -> list[int]:
    """Saxena 2023: for the longest n-gram at the end that occurred before, the tokens that followed its first occurrence."""
    for n in range(min(ngram, len(text) - 1), 0, -1):
        starts = [i for i in range(len(text) - n) if text[i : i + n] == text[-n:]]
        if starts:
            at = starts[-1 if latest else 0] + n
            return text[at : at + length]
    return []


class TokenRecycling:
    """Luo et al. 2024: {token: its last seen best successors} fills a fixed tree; every node of a pass writes back, in order."""

    def __init__(self, tree, rank: int, V: int):
        self.tree, self.rank, self.table = tree, rank, {token: [0] * rank for token in range(V)}

    def propose(self, last: int) -> tuple[list[int], list[int]]:
        """(parent, token) of every node, the root first."""
        at, parent, token = {(): 0}, [0], [last]
        for path in self.tree:
            parent.append(at[path[:-1]])
            token.append(self.table[token[parent[-1]]][path[-1]])
            at[path] = len(token) - 1
        return parent, token

    def observe(self, token, logits) -> None:
        for t, row in zip(token, logits, strict=True):
            self.table[t] = np.argsort(-row, kind="stable")[: self.rank].tolist()


def tree_logits(step, caches, parent, token) -> list[np.ndarray]:
    """Logits at every node, each by its own separate walk: step(cache, token) -> (logits, new cache); caches: [the committed prefix]."""
    seen, out = {}, []
    for node in range(len(token)):
        before = caches[0] if node == 0 else seen[parent[node]]
        logits, seen[node] = step(before, token[node])
        out.append(logits)
    return out


def warped(logits, temperature, top_k=0, top_p=1.0, min_p=0.0) -> np.ndarray:
    """Probabilities after temperature, then top-k, then top-p (the token that crosses the threshold stays), then min-p."""
    if temperature == 0:
        return np.eye(len(logits))[np.argmax(logits)]
    return min_p_cut(top_p_cut(top_k_cut(soft(logits / temperature), top_k), top_p), min_p)


def soft(x):
    e = np.exp(x - np.max(x))
    return e / e.sum()


def top_k_cut(p, k):
    return normal(np.where(p >= np.sort(p)[-k], p, 0)) if 0 < k < len(p) else p


def top_p_cut(p, share):
    if share >= 1:
        return p
    kept, total = np.zeros_like(p), 0.0
    for token in np.argsort(-p, kind="stable"):
        if total >= share:
            break
        kept[token], total = p[token], total + p[token]
    return normal(kept)


def min_p_cut(p, share):
    return normal(np.where(p >= share * p.max(), p, 0))


def normal(p):
    return p / p.sum()


def law(conditional: dict, n: int) -> dict[tuple[int, ...], float]:
    """Probability of every possible text of n tokens, from {text so far: probabilities of the next token}."""
    texts = {(): 1.0}
    for _ in range(n):
        texts = {(*t, v): m * p for t, m in texts.items() for v, p in enumerate(conditional[t]) if p > 0}
    return texts
