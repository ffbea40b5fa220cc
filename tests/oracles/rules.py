"""Verification of drafts as the papers state it, one draft after the other in float64, and the law of what comes of it.

p is the target's law and q the drafter's. Each rule takes p and the drafts of one place, [(token, q), ...], and returns the chance of
each to be accepted when those before it were refused, and the law of the token when all were.
"""

import numpy as np


def positive(x, otherwise):
    x = np.maximum(x, 0)
    return x / x.sum() if x.sum() > 1e-12 else otherwise


def recursive(p, drafts):
    """SpecInfer, Yang et al. 2024: min(1, p / q); refused, p <- norm((p - q)+). For one draft, Leviathan et al. 2023."""
    chances = []
    for x, q in drafts:
        chances.append(min(1.0, p[x] / q[x]))
        p = positive(p - q, p)
    return chances, p


def deterministic(p, drafts):
    """Accept x with p(x); refused, p(x) <- 0 and renormalise."""
    chances = []
    for x, _ in drafts:
        chances.append(p[x])
        p = positive(np.where(np.arange(len(p)) == x, 0, p), p)
    return chances, p


def beta(p, q, rho):
    return np.minimum(q, p / rho).sum()


def rho(p, q, k):
    """1 - (1 - beta)^k = rho beta, by bisection."""
    low, high = 1.0, float(k)
    for _ in range(100):
        middle = (low + high) / 2
        b = beta(p, q, middle)
        low, high = (middle, high) if 1 - (1 - b) ** k > middle * b else (low, middle)
    return high


def kseq(p, drafts):
    """Sun et al. 2023."""
    if not drafts:
        return [], p
    q, k = drafts[0][1], len(drafts)
    r = rho(p, q, k)
    b = beta(p, q, r)
    rest = positive(p - np.minimum(q, p / r) * (1 - (1 - b) ** k) / b if b > 0 else p, p)
    return [min(1.0, p[x] / (r * q[x])) for x, _ in drafts], rest


def rapid(eta):
    """Chen et al. 2025."""

    def rule(p, drafts):
        if not drafts:
            return [], p
        ((x, q),) = drafts
        lean = p * np.exp(-eta * np.where(q >= 0.1 * q.max(), p - q, 0))
        lean /= lean.sum()
        return [min(1.0, lean[x] / q[x])], positive(np.maximum(p - q, p - lean), p)

    return rule


def typical(law, parent, token, epsilon, delta) -> list[int]:
    """Cai et al. 2024: the longest path whose tokens all have p > min(epsilon, delta exp(-H)); of equals the likeliest."""
    best = (0, 0.0, [0])
    for node in range(1, len(token)):
        path = [node]
        while path[0]:
            path.insert(0, parent[path[0]])
        p = [law[above] for above in path[:-1]]
        said = np.array([law[x] for law, x in zip(p, np.array(token)[path[1:]], strict=True)])
        bound = [min(epsilon, delta * np.exp((q[q > 0] * np.log(q[q > 0])).sum())) for q in p]
        if (said > bound).all():
            best = max(best, (len(path) - 1, np.log(said).sum(), path), key=lambda found: found[:2])
    return best[2]


def outcomes(rule, law, parent, token, q):
    """Every way that verification of one draft can go: (nodes accepted, probability, law of the token behind them, what was thrown), where
    thrown is [(node, its chance, accepted), ...]. law[node] is p behind a node, q[node] the law that the node was drawn from.

    Nodes that repeat what was accepted count as it: theirs are drafts of the next place too."""

    def behind(path, alike, probability, thrown):
        nodes = [node for node in range(1, len(token)) if parent[node] in alike]
        chances, rest = rule(law[path[-1]], [(token[node], q[node]) for node in nodes])
        for node, chance in zip(nodes, chances, strict=True):
            same = {n for n in nodes if token[n] == token[node]}
            yield from behind([*path, node], same, probability * chance, [*thrown, (node, chance, True)])
            probability, thrown = probability * (1 - chance), [*thrown, (node, chance, False)]
        yield path, probability, rest, thrown

    return behind([0], {0}, 1.0, [])


def law_of_texts(found, token, p_of, n) -> dict[tuple[int, ...], float]:
    """Law of the next n tokens by the outcomes of one draft, the target's law p_of[text] behind them."""
    laws: dict[tuple[int, ...], float] = {}

    def go(text, probability, p):
        if len(text) == n:
            laws[text] = laws.get(text, 0.0) + probability
            return
        for x in np.nonzero(p)[0]:
            go((*text, int(x)), probability * p[x], p_of[(*text, int(x))] if len(text) + 1 < n else None)

    for path, probability, rest, _ in found:
        if probability > 0:
            go(tuple(token[node] for node in path[1:])[:n], probability, rest)
    return laws
