"""RAPID's drafter (Chen et al. 2025): a draft model that reads a short context retrieved from the prompt, not all of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import ModuleType

import jax.numpy as jnp
import numpy as np

from tokeff.decode.draft_model import DraftModel, OwnCache
from tokeff.errors import UserError
from tokeff.kv.budget import Budget, check_budget, most_rows


@dataclass(frozen=True)
class RetrievedDraft(DraftModel):
    """A draft model whose text is the prompt's first `head` tokens, what was retrieved of the rest, its last `question` tokens, and what is
    generated, in that order (RAPID's RAG drafter, Chen et al. 2025).

    So each draft row reads a short cache, whatever the prompt's length, and a model as large as the target drafts, or the target itself,
    whose weights are attached as they are: `m.attach(draft=m.params)`.

    chunk: tokens of a chunk. budget: how many tokens are retrieved, a share of the prompt or a number, rounded up to whole chunks. Chunks
    are ranked by BM25 (Robertson and Zaragoza 2009; k1 = 1.5, b = .75) over token ids, for the question; of equals the earlier one is
    taken. The paper retrieves a share of 1/32, at least 4096 tokens, in chunks of 512 (its script: 128).

    Differences: the paper ranks by similarity of BGE-M3's embeddings, above a threshold; its code has BM25 beside. It gets the question
    apart from the context and puts the instructions around what was retrieved; here `head` and `question` stand for them. Its drafts stop
    early where they are unsure.
    """

    chunk: int = field(default=64, kw_only=True)
    budget: Budget = field(default=0.125, kw_only=True)
    head: int = field(default=32, kw_only=True)
    question: int = field(default=64, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        check_budget(self.budget, 1 << 30)
        if self.chunk < 1 or self.head < 0 or self.question < 1:
            raise UserError(f"chunk {self.chunk} and question {self.question} must be at least 1, and head {self.head} at least 0")

    def check(self, m) -> None:
        super().check(m)
        library()

    def prepare(self, m, tokens_BT, length_B, new) -> OwnCache:
        from tokeff.generation import pad

        rows = [row[:n] for row, n in zip(np.asarray(tokens_BT), np.asarray(length_B), strict=True)]
        short_BT, short_B = pad([row[self.places(row)] for row in rows])
        return OwnCache(self.read(m, short_BT, short_B, new, draft=self.rows), length_B - jnp.asarray(short_B))

    def places(self, text_S: np.ndarray) -> np.ndarray:
        """Where the tokens stand that the draft model reads of one prompt, ascending."""
        n = len(text_S)
        ends = max(n - self.question, 0)
        starts = np.arange(min(self.head, ends), ends, self.chunk)
        count = math.ceil(most_rows(self.budget, n) / self.chunk)
        if count >= len(starts):
            return np.arange(n)
        chunks = [np.arange(start, min(start + self.chunk, ends)) for start in starts]
        score = scores(text_S, chunks, np.arange(ends, n))
        best = np.sort(np.argsort(-score, kind="stable")[:count])
        return np.concatenate([np.arange(starts[0]), *(chunks[i] for i in best), np.arange(ends, n)])


def scores(text_S: np.ndarray, chunks: list[np.ndarray], query: np.ndarray) -> np.ndarray:
    """BM25 of each chunk for a query; chunks and query are places in the text."""
    known, number_S = np.unique(text_S, return_inverse=True)
    index = library().BM25(k1=1.5, b=0.75, method="lucene")
    corpus = [number_S[places].tolist() for places in chunks], {int(token): i for i, token in enumerate(known)}
    index.index(corpus, create_empty_token=False, show_progress=False)
    return index.get_scores_from_ids(number_S[query].tolist())


def library() -> ModuleType:
    """bm25s; UserError where it is not installed."""
    try:
        import bm25s
    except ImportError:
        raise UserError("retrieval for the draft model needs bm25s: pip install bm25s") from None
    return bm25s
