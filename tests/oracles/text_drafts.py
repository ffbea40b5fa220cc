"""Drafters that know the text alone, with tries, lists, dicts and node objects, as the papers state them."""

import math

import numpy as np

Path = tuple[int, ...]


class Trie:
    """Zhao et al. 2024: a trie of n-grams with counts in the prompt and in the output, and the query for the longest suffix."""

    def __init__(self, text: list[int], prompt: int, query: int, length: int, starts=None):
        self.root, self.text, self.query, self.length = {}, text, query, length
        for start in range(len(text)) if starts is None else starts:
            nodes = self.root
            for place, token in enumerate(text[start : start + query + length], start):
                node = nodes.setdefault(token, {"given": 0, "made": 0, "seen": 0, "next": {}})
                node["given" if start < prompt else "made"] += 1
                node["seen"], nodes = place, node["next"]

    def below(self, suffix: list[int]) -> dict:
        nodes = self.root
        for token in suffix:
            if token not in nodes:
                return {}
            nodes = nodes[token]["next"]
        return nodes

    def subtree(self, nodes: dict, path: Path = ()) -> dict[Path, dict]:
        found = {}
        for token, node in nodes.items() if len(path) < self.length else ():
            found |= {(*path, token): node} | self.subtree(node["next"], (*path, token))
        return found

    def kept(self, n: int, size: int, weight: float, own: float) -> set[Path]:
        """Paths of the nodes below the last n tokens, cut to size - 1."""
        found = self.subtree(self.below(self.text[len(self.text) - n :]))

        def best(paths, worth, k) -> list[Path]:  # of equals the shallower, then the later
            return sorted(paths, key=lambda path: (-worth(found[path]), len(path), -found[path]["seen"]))[:k]

        made = best([p for p in found if found[p]["made"]], lambda node: node["made"], min(int(own * size), size - 1))
        mixed = lambda node: (1 - weight) * node["given"] + weight * node["made"]  # noqa: E731
        return {*made, *best(set(found) - set(made), mixed, size - 1 - len(made))}

    def draft(self, size: int, weight: float, own: float) -> set[Path]:
        for n in range(min(self.query, len(self.text)), 0, -1):
            paths = self.kept(n, size, weight, own)
            if 1 + len(paths) >= max(min(self.length, size), 2):
                break
        return paths


def paths_of(token, parent, valid) -> set[Path]:
    """Every node of a draft as the tokens on the way to it."""
    paths = {0: ()}
    for node in range(1, len(token)):
        if valid[node]:
            paths[node] = (*paths[int(parent[node])], int(token[node]))
    found = [path for node, path in paths.items() if node]
    assert len(found) == len(set(found)), "a node stands twice"
    return set(found)


F = np.float32  # the search compares sums: in the precision of the one that is compared with, added up in the same order


def trigrams(text: list[int], prompt: int, given=(), *, recent: int, gain: float, cap: float) -> dict:
    """Liu et al. 2025: {(a, b): {c: p}}. Shares of the prompt's and the given text's trigrams; then every made token adds `gain` to those
    in the last `recent` tokens. Successors stand likeliest first, of equals the one seen later."""
    table, last = {}, {}
    for part in (given, text[:prompt]):
        for i in range(len(part) - 2):
            row = table.setdefault(tuple(part[i : i + 2]), {})
            row[part[i + 2]] = row.get(part[i + 2], 0) + 1
    table = {key: {c: n / sum(row.values()) for c, n in row.items()} for key, row in table.items()}
    for count in range(prompt + 1, len(text) + 1):
        for i in range(max(count - recent, 0), count - 2):
            row = table.setdefault(tuple(text[i : i + 2]), {})
            row[text[i + 2]] = min(row.get(text[i + 2], 0) + gain, cap)
    for offset, part in ((0, given), (len(given), text)):
        last |= {tuple(part[i : i + 3]): offset + i for i in range(len(part) - 2)}
    return {
        key: {c: F(row[c]) for c in sorted(row, key=lambda c: (-round(row[c], 6), -last[(*key, c)]))} for key, row in table.items()
    }  # fmt: skip


class Node:
    def __init__(self, pair, p=0, above=None):
        self.pair, self.p, self.above, self.children, self.visits, self.value = pair, F(p), above, [], 0, F(0)

    @property
    def path(self) -> Path:
        return () if self.above is None else (*self.above.path, self.pair[1])

    def sum(self):
        return F(0) if self.above is None else self.above.sum() + self.p


class Search:
    """Liu et al. 2025, as released: 150 simulations of 4 tokens there; chance[i] are the numbers that simulation i draws with."""

    def __init__(self, table, text, chance, *, length: int, successors: int, c1: float, c2: float):
        self.table, self.length, self.successors, self.c1, self.c2 = table, length, successors, c1, c2
        self.root = Node(tuple(text[-2:]))
        self.made = []
        for numbers in chance:
            self.simulate(iter(numbers))

    def after(self, pair) -> list[tuple[int, np.float32]]:
        return list(self.table.get(pair, {}).items())[: self.successors]

    def score(self, child: Node, n: int):
        if not child.visits:
            return math.inf
        explore = F((self.c1 + np.log((n + self.c2 + 1) / self.c2)) * np.sqrt(n))
        return child.value / F(child.visits) + explore * child.p / F(1 + child.visits)

    def simulate(self, numbers):
        node, level = self.root, 0
        while node.children:
            node, level = max(node.children, key=lambda child: self.score(child, node.visits)), level + 1
        if level < self.length - 1 and self.after(node.pair):
            node.children = [Node((node.pair[1], c), p, node) for c, p in self.after(node.pair)]
            self.made += node.children
            node, level = node.children[0], level + 1
        value, pair = F(1) + node.sum(), node.pair
        found = F(0)
        while level < self.length - 1 and (row := self.after(pair)):
            c, p = self.drawn(row, next(numbers))
            found, pair, level = found + p, (pair[1], c), level + 1
        while node:
            node.visits, node.value, node = node.visits + 1, node.value + (value + found), node.above

    def drawn(self, row, number):
        total = np.cumsum([p for _, p in row], dtype=F)
        return row[int(np.argmax(number * total[-1] < total))]

    def draft(self, paths: int, nodes: int) -> set[Path]:
        """The most visited paths, and behind each its likeliest successor while there are nodes."""
        best = sorted(self.made, key=lambda node: -node.visits)[:paths]
        found = [node.path for node in best]
        more = [(*node.path, self.after(node.pair)[0][0]) for node in best if self.after(node.pair)]
        return {*found, *[path for path in more if path not in found][: nodes - 1 - paths]}


class Lookahead:
    """Fu et al. 2024: a window of Jacobi trajectories in lists, and the pool as released, {first token: its latest n-grams, the oldest
    first}. `bound` n-grams are remembered in all."""

    APART = 7919

    def __init__(self, text: list[int], *, window: int, ngram: int, guesses: int, bound: int, fill: bool, shift: bool):
        self.W, self.N, self.G, self.bound, self.fill, self.shift = window, ngram, guesses, bound, fill, shift
        self.text, self.pool, self.order, self.turn = list(text), {}, [], 0
        self.grid = [[] for _ in range(ngram - 1)]
        for start in range(len(text) - ngram + 1) if fill else ():
            self.insert(text[start : start + ngram])

    def insert(self, gram):
        gram = tuple(gram)
        self.order = [*(g for g in self.order if g != gram), gram]
        row = self.pool.setdefault(gram[0], [])
        if gram[1:] in row:
            row.remove(gram[1:])
        row.append(gram[1:])
        del row[: -self.G]
        if len(self.order) > self.bound:
            first, *rest = self.order.pop(0)
            if tuple(rest) in self.pool[first]:
                self.pool[first].remove(tuple(rest))

    def arrive(self, new: list[int]):
        """Tokens that became certain; the first of all comes from the prompt."""
        start, self.text = len(self.text), self.text + new
        moved = len(new) - 1 if self.shift and self.turn else 0
        for l in range(self.N - 1):
            kept = self.grid[l][moved:] if self.turn else []
            places = (1 + l * self.W + i for i in range(len(kept), self.W))
            self.grid[l] = [*kept, *(self.text[place * self.APART % len(self.text)] for place in places)]
        self.grid[0][0] = self.text[-1]
        for end in range(start, len(self.text)) if self.fill else ():
            if end - self.N + 1 >= 0:
                self.insert(self.text[end - self.N + 1 : end + 1])

    def guessed(self) -> list[tuple[int, ...]]:
        """The branches, the latest n-gram first."""
        return self.pool.get(self.text[-1], [])[::-1]

    def reads(self, l: int, i: int) -> list[int]:
        """Tokens that entry i of row l reads, itself last, in their order behind the text before the root."""
        return [*self.grid[0][: i + 1], *(self.grid[row][i] for row in range(1, l + 1))]

    def observe(self, predicted: list[int]):
        """What the last row's entries predict."""
        rows = [*self.grid, predicted]
        for gram in zip(*rows, strict=True) if self.turn >= self.N - 2 else ():
            self.insert(gram)
        self.grid, self.turn = [list(row) for row in rows[1:]], self.turn + 1
