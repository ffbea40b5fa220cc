"""A small experiment without a model, whose figures are shaped like the quickstart's."""

import dataclasses

import numpy as np

from tokeff.errors import UserError
from tokeff.experiment import Experiment, Row
from tokeff.report.figures import Bars, Lines, Scatter
from tokeff.report.kept import Kept

# method, family, lossless, held, read, needles, kl, answer log p, tok/s, tokens per pass
FIGURES = (
    ("full", "baseline", True, 1.0, 1.0, 3, 0.0, -0.02, 33.1, 1.0),
    ("random", "baseline", False, 0.128, 0.128, 0, 0.81, -9.1, 48.2, 1.0),
    ("recent", "baseline", False, 0.126, 0.126, 0, 0.44, -8.2, 48.9, 1.0),
    ("streaming_llm", "kv", False, 0.127, 0.127, 0, 0.36, -8.5, 47.3, 1.0),
    ("h2o", "kv", False, 0.131, 0.131, 1, 0.33, -4.1, 45.0, 1.0),
    ("snapkv", "kv", False, 0.127, 0.127, 3, 0.21, -0.11, 48.0, 1.0),
    ("adakv", "kv", False, 0.13, 0.13, 3, 0.20, -0.10, 41.2, 1.0),
    ("shadowkv", "kv", False, 0.31, 0.14, 3, 0.12, -0.06, 27.5, 1.0),
    ("tidal_decode", "sparse", False, 1.0, 0.17, 3, 0.09, -0.05, 39.5, 1.0),
    ("gemfilter", "reduce", False, 0.126, 0.126, 2, 0.92, -1.8, 50.3, 1.0),
    ("prompt_distill", "reduce", False, 0.52, 0.52, 3, 0.27, -0.31, 41.0, 1.0),
    ("prompt_lookup", "decode", True, 1.0, 0.61, 3, 0.0, -0.02, 47.7, 1.64),
    ("token_recycling", "decode", True, 1.0, 0.48, 3, 0.0, -0.02, 44.4, 2.21),
)
WORDS = [
    "It",
    "was",
    "the",
    "best",
    "of",
    "times",
    ",",
    "it",
    "was",
    "the",
    "worst",
    "of",
    "times",
    ";",
    "the",
    "secret",
    "number",
    "is",
    "4",
    "7",
    "1",
    ";",
    "",
]


@dataclasses.dataclass(frozen=True)
class Policy:
    """Stands in for a method's choices."""

    budget: float = 0.125
    recent: int = 8


@dataclasses.dataclass(frozen=True)
class FakeRow(Row):
    """A row with one choice."""

    kv: Policy = Policy()


@dataclasses.dataclass(frozen=True)
class Fake(Experiment):
    """Measures nothing: looks the figures up."""

    budget: float = 0.125
    """Share of the cache."""
    contexts: tuple[int, ...] = (2048,)
    model: str | None = None

    def check(self):
        if not 0 < self.budget <= 1:
            raise UserError(f"budget {self.budget:g} is not in (0, 1]; use for example --budget 0.125")

    def keys(self):
        return [f"{row.method}/{context}" for context in self.contexts for row in self.rows]

    def prepare(self):
        return np.random.default_rng(0)

    def measure(self, context, key):
        method, length = key.split("/")
        return figures(method, int(length), self.budget, context)

    def report(self):
        return (
            Scatter("held", "kl", "Distance from the full cache against bytes held"),
            Scatter("read", "answer_logprob", "Answers against bytes read"),
            Lines("context", "decode_tok_s", "Decoding speed against context length"),
            Bars("decode_tok_s", "Decoding speed"),
        )


@dataclasses.dataclass(frozen=True)
class Plain(Fake):
    """Asks for no figures, so that a run takes no time."""

    def report(self):
        """Draw nothing."""
        return ()


def figures(method, length, budget, rng):
    """Return a row of made-up measurements."""
    _, family, lossless, held, read, needles, kl, logprob, speed, tokens = next(f for f in FIGURES if f[0] == method)
    given = {"budget": budget, "budgeted_by": "read" if family == "sparse" else "held", "beats_random": kl < 0.8}
    return {
        "method": method, "family": family, "lossless": lossless, "context": length, "needles_exact": needles, "n": 3,
        "answer_logprob": logprob, "answer_logprob_lo": 1.3 * logprob, "answer_logprob_hi": 0.7 * logprob,
        "loss": 3.1 + kl, "loss_lo": 3.0 + kl, "loss_hi": 3.2 + kl, "loss_n": 128,
        "kl": kl, "kl_lo": 0.85 * kl, "kl_hi": 1.15 * kl, "kl_n": 128, "top1_agree": 1 - kl / 2,
        "greedy_match": 1 - kl / 3, "held": held, "read": read, "peak": 1.2 + held, "prefill_s": 3.2 + length / 2048,
        "decode_tok_s": np.float32(speed * (2048 / length) ** 0.5), "tokens_per_pass": tokens,
        "kept": kept(length, held, rng) if family == "kv" else None,
        **({} if family in ("baseline", "decode") else given),
    }  # fmt: skip


def kept(length, share, rng, layers=30, heads=3):
    """Return made-up kept rows: the start, the end and a random rest."""
    count = max(int(length * share), 8)
    orders = []
    for _ in range(layers):
        weight = np.ones(length)
        weight[:4] = weight[-32:] = 1e4
        weight[length // 2 : length // 2 + 20] = 60
        rows = [rng.choice(length, count, replace=False, p=weight / weight.sum()) for _ in range(heads)]
        orders.append(np.stack(rows))
    tokens = tuple(" " + WORDS[i % len(WORDS)] for i in range(length))
    return Kept(orders, tokens, ((length // 10, length // 10 + 12), (length // 2, length // 2 + 14)))


def fake(name="fake", kind=Fake, **more):
    """Return the experiment with a row for every made-up method."""
    return kind(name, tuple(FakeRow(f[0]) for f in FIGURES), **more)
