"""BM25 in the form that Lucene has it: Robertson and Zaragoza 2009, with an idf that is never negative."""

import math


def bm25(chunks: list[list[int]], query: list[int], k1: float = 1.5, b: float = 0.75) -> list[float]:
    """One score a chunk: sum over the query's tokens of idf tf / (tf + k1 (1 - b + b length / mean length))."""
    mean = sum(map(len, chunks)) / len(chunks)
    scores = []
    for chunk in chunks:
        score = 0.0
        for token in query:
            having, tf = sum(token in other for other in chunks), chunk.count(token)
            idf = math.log(1 + (len(chunks) - having + 0.5) / (having + 0.5))
            score += idf * tf / (tf + k1 * (1 - b + b * len(chunk) / mean))
        scores.append(score)
    return scores
