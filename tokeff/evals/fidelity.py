"""What one combination of parts costs in quality: answers, loss and distance from the full cache, teacher-forced.

A context is prefilled once; every question continues that prefill, every policy packs the result. Answers are decided in one pass:
an answer is exact when every arg-max is right, which is when greedy decoding would produce it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.data.haystack import encoder
from tokeff.data.tasks import Example
from tokeff.errors import UserError
from tokeff.generation import Setup, pad
from tokeff.kv.bounded import prefill_bounded
from tokeff.kv.evidence import Evidence
from tokeff.kv.extend import extend, pack
from tokeff.kv.prefill import Prompt, prefill
from tokeff.models.load import Model
from tokeff.sharding import beside


@dataclass(frozen=True)
class Encoded:
    """A context with its questions, answers and held-out continuation as token ids."""

    context: tuple[int, ...]
    questions: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]
    held_out: tuple[int, ...]
    needles: tuple[tuple[int, int], ...]


def encode_example(m: Model, example: Example) -> Encoded:
    """Each text by itself, so that all questions share one context. Only the context begins as a text does."""
    encode, start = encoder(m.tok), len(m.tok.encode(""))

    def ids(text: str) -> tuple[int, ...]:
        return tuple(encode(text))

    return Encoded(
        tuple(m.tok.encode(example.context)),
        tuple(ids(q.prompt) for q in example.questions),
        tuple(ids(q.answer) for q in example.questions),
        ids(example.held_out),
        tuple((a + start, b + start) for a, b in example.meta.get("needles", ())),
    )


@dataclass(frozen=True)
class Quality:
    """Per-item figures, so that rows can be compared item by item.

    exact, logprob: one entry per question (log-probability of the whole answer, nats). nll, top1: one per held-out token.
    logits_TV: float32 logits after each held-out token's predecessor.
    """

    exact: np.ndarray
    logprob: np.ndarray
    nll: np.ndarray
    logits_TV: np.ndarray

    def kl(self, full: Quality) -> np.ndarray:
        """KL(full || this) of the next-token distribution at each held-out token, nats."""
        return np.asarray(_kl(full.logits_TV, self.logits_TV))

    def top1(self, full: Quality) -> np.ndarray:
        return (full.logits_TV.argmax(-1) == self.logits_TV.argmax(-1)).astype(np.float64)


@jax.jit
def _kl(p_TV, q_TV):
    p, q = jax.nn.log_softmax(p_TV), jax.nn.log_softmax(q_TV)
    return (jnp.exp(p) * (p - q)).sum(-1)


class Reader:
    """Prefills of one or several contexts of equal length, read as a batch and shared by every combination that can share them.

    All questions on a context are read beside each other too, as sequences of one batch: question i of text b is sequence
    `b * questions + i`, so a pass reads the weights once for all of them. The texts have equally many, or UserError is raised.

    evidence: gathered by every prefill that does not need others, so that policies which want different evidence share one.
    """

    def __init__(self, m: Model, *texts: Encoded, evidence: Sequence[Evidence] = ()):
        if len({(len(text.questions), len(text.answers)) for text in texts}) > 1:
            asked = ", ".join(str(len(text.questions)) for text in texts)
            raise UserError(f"texts that are read as a batch have equally many questions, not {asked}; give each a Reader of its own")
        self.m, self.texts = m, texts
        self.evidence = tuple(kind for kind in evidence if type(kind).revisit is Evidence.revisit)
        self.seconds: dict[Any, float] = {}
        self._contexts: dict[Any, Prompt] = {}
        self._asked: dict[Any, Prompt] = {}

    @property
    def text(self) -> Encoded:
        """The only one, or the first."""
        return self.texts[0]

    def needs(self, setup: Setup) -> tuple[Evidence, ...]:
        """What a prefill gathers for this: what all ask for, where all can share it."""
        own = tuple(setup.kv.needs())
        return self.evidence if setup == Setup(setup.kv) and set(own) <= set(self.evidence) else own

    def key(self, setup: Setup) -> Any:
        """What a prefill depends on."""
        return setup.kv if setup.bounded else self.needs(setup), setup.cut, setup.prefill, setup.bounded

    def context(self, setup: Setup) -> Prompt:
        """The contexts alone, prefilled with the evidence this policy needs and the pass they go through."""
        return self._held(self._contexts, setup, lambda: self.whole([text.context for text in self.texts], setup))

    def asked(self, setup: Setup) -> Prompt:
        """The contexts, each with each of its questions; continues the shared prefill unless a pass must rank the whole prompt."""
        return self._held(self._asked, setup, lambda: self._ask(setup))

    def question(self, setup: Setup, i: int) -> Prompt:
        """The contexts with their question `i` alone."""
        n = len(self.text.questions)
        return of_sequences(self.asked(setup), lambda x: x[i::n])

    def _held(self, held: dict[Any, Prompt], setup: Setup, make: Callable[[], Prompt]) -> Prompt:
        """Of the prefills that only some can share the latest stays, for the next budget of the same method."""
        key, shared = self.key(setup), (self.evidence, None, None, None)
        if key not in held:
            for other in [k for k in held if k != shared]:
                del held[other]
            held[key] = make()
        return held[key]

    def _ask(self, setup: Setup) -> Prompt:
        if setup.cut is not None:
            return self.whole([text.context + question for text in self.texts for question in text.questions], setup)
        n = len(self.text.questions)
        tokens, length = snug([question for text in self.texts for question in text.questions])
        return self._prefill(tokens, length, setup, after=of_sequences(self.context(setup), lambda x: jnp.repeat(x, n, axis=0)))

    def whole(self, ids: Sequence[tuple[int, ...]], setup: Setup) -> Prompt:
        tokens, length = pad(ids)
        return self._prefill(tokens, length, setup)

    def _prefill(self, tokens, length, setup: Setup, after: Prompt | None = None) -> Prompt:
        m, asks = self.m, self.needs(setup)
        with beside(m.params):
            if setup.bounded and after is None:
                return prefill_bounded(
                    m.params, m.cfg, tokens, length, setup.kv, piece=setup.bounded, evidence=asks, dtype=m.precision.cache
                )
            return prefill(
                m.params, m.cfg, tokens, length,
                evidence=asks, cut=setup.cut, dtype=m.precision.cache, after=after, pattern=setup.prefill,
            )  # fmt: skip

    def forced(self, prompt: Prompt, setup: Setup, ids: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        """Of each sequence the logits_TV that predict each of its `ids` in turn, all but the first read from the packed cache."""
        T = max(map(len, ids))
        with beside(self.m.params):
            layers = pack(setup.kv, prompt.layers, setup.room(T), self.m.cfg)
            logits = np.asarray(self._extend(layers, prompt.next_B, setup, [row[:-1] for row in ids]))
        first = np.asarray(prompt.logits_BV)
        return [np.concatenate([first[b : b + 1], logits[b, : len(row) - 1]]) for b, row in enumerate(ids)]

    def _extend(self, layers, next_B, setup: Setup, ids: Sequence[tuple[int, ...]]):
        tokens, length = snug(ids)
        return extend(self.m.params, self.m.cfg, layers, tokens, next_B, length, setup.kv)[0]

    def qualities(self, setup: Setup) -> list[Quality]:
        """Every question, each known when its context is compressed, and the held-out text, of each text under one combination."""
        answers, n = [answer for text in self.texts for answer in text.answers], len(self.text.answers)
        found = [given(*both) for both in zip(self.forced(self.asked(setup), setup, answers), answers, strict=True)] if n else []
        ends = [text.held_out for text in self.texts]
        held = self.forced(self.context(setup), setup, ends)
        return [
            Quality(pairs[:, 0], pairs[:, 1], _nll(logits, ids), logits)
            for pairs, logits, ids in zip(np.reshape(found, (len(held), n, 2)), held, ends, strict=True)
        ]

    def quality(self, setup: Setup) -> Quality:
        """`qualities` of the only text."""
        (found,) = self.qualities(setup)
        return found

    def later(self, setup: Setup) -> list[list[tuple[float, float]]]:
        """Of each text (exact, log-probability) of every answer when the context was compressed before any question was known, and
        each question is asked of it anew."""
        n = len(self.text.answers)
        if not n:
            return [[] for _ in self.texts]
        prompt = self.context(setup)
        asked = [both for text in self.texts for both in zip(text.questions, text.answers, strict=True)]
        room = setup.room(max(len(q) + len(a) for q, a in asked))
        with beside(self.m.params):
            layers = setup.kv.fork(pack(setup.kv, prompt.layers, room, self.m.cfg), n, room)
            logits = np.asarray(self._extend(layers, jnp.repeat(prompt.next_B, n), setup, [(*q, *a[:-1]) for q, a in asked]))
        found = [given(x[len(q) - 1 : len(q) + len(a) - 1], a) for x, (q, a) in zip(logits, asked, strict=True)]
        return [found[b * n : (b + 1) * n] for b in range(len(self.texts))]

    def turns(self, setup: Setup) -> list[list[tuple[float, float]]]:
        """As `later`, but of one cache a text: every question is asked behind the questions before it and the right answers to these."""
        if not self.text.answers:
            return [[] for _ in self.texts]
        asked = [list(zip(text.questions, text.answers, strict=True)) for text in self.texts]
        said = [tuple(t for q, a in pairs for t in (*q, *a))[:-1] for pairs in asked]
        with beside(self.m.params):
            layers = pack(setup.kv, self.context(setup).layers, setup.room(max(map(len, said)) + 1), self.m.cfg)
            logits = np.asarray(self._extend(layers, self.context(setup).next_B, setup, said))
        found = []
        for b, pairs in enumerate(asked):
            ends = np.cumsum([len(q) + len(a) for q, a in pairs])
            found.append([given(logits[b, end - len(a) - 1 : end - 1], a) for end, (_, a) in zip(ends, pairs, strict=True)])
        return found


def snug(ids: Sequence[Sequence[int]]) -> tuple[jax.Array, jax.Array]:
    """(tokens_BT, length_B) of short rows, of which a batch has many: padded to a multiple of eight, not to a prompt's bucket. Rows may all
    be empty."""
    return pad(ids, max(-(-max(map(len, ids)) // 8), 1) * 8)


def of_sequences(prompt: Prompt, do: Callable[[jax.Array], jax.Array]) -> Prompt:
    """The prompt with `do` done to every array that has a row a sequence."""
    return jax.tree.map(lambda x: do(x) if x.ndim else x, prompt)


def given(logits_TV: np.ndarray, ids: tuple[int, ...]) -> tuple[float, float]:
    """(1 if every arg-max is right, log-probability in nats) of an answer."""
    return float((logits_TV.argmax(-1) == np.asarray(ids)).all()), float(-_nll(logits_TV, ids).sum())


def _nll(logits_TV: np.ndarray, ids: tuple[int, ...]) -> np.ndarray:
    """Negative log-likelihood of each id, nats."""
    return -np.asarray(jax.nn.log_softmax(logits_TV, axis=-1))[np.arange(len(ids)), list(ids)].astype(np.float64)
