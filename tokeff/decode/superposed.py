"""Superposed Decoding (Shen et al. 2024): several continuations of one prompt for the passes of one.

    for s in suggest(m, "It was a dark and", Superposed(drafts=3), new=10):
        print(s.score, s.text)

All drafts share one row a token. Its embedding is the mean of their last tokens' embeddings, weighted with the drafts' probabilities. So
the model answers for all of them at once, vaguely, and n-grams of given texts say which of its tokens continues which draft. Lossy: only
one draft without n-grams is the text of greedy decoding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.decode.ngrams import NGrams
from tokeff.errors import UserError
from tokeff.generation import Setup, encode, read
from tokeff.kv.cache import Room
from tokeff.kv.extend import pack
from tokeff.kv.policy import Full, Policy
from tokeff.models.attention import wide
from tokeff.models.config import Config, Params
from tokeff.models.flow import Flow
from tokeff.models.load import Model
from tokeff.models.tokenizer import Tokenizer
from tokeff.models.transformer import embed, stack, unembed
from tokeff.sharding import beside, follow, top_k


@dataclass(frozen=True)
class Suggestion:
    """score: the mean log-score of its tokens, an end of sequence included; higher is better."""

    text: str
    tokens: tuple[int, ...]
    score: float


@dataclass(frozen=True)
class Growing:
    """A draft: its tokens behind the prompt, and the sum of their log-scores."""

    tokens: tuple[int, ...] = ()
    total: float = 0.0

    @property
    def mean(self) -> float:
        return self.total / len(self.tokens)


@dataclass(frozen=True)
class Superposed:
    """Superposed Decoding (Shen et al. 2024, section 3), with the constants of its released code for three drafts.

    drafts: how many are kept. top: the model's most probable tokens, with which each draft is continued (None: three times `drafts`). Their
    probabilities p, at `temperature` and among themselves, are interpolated with an n-gram model: the log-score of a token is
    (1 - alpha) log p + alpha log q, where q is the sum over n = 2, 3, .. of weights[n - 2] times the token's share of what followed the
    draft's last n - 1 tokens, the prompt's among them. A token with q = 0 does not continue a draft, unless all have: then the log-score is
    (1 - alpha) log p - penalty. alpha=0 leaves n-grams out.

    The best `drafts` of all continuations go on, superposed by the softmax of their summed scores. One that ends leaves its place to the
    next. Where the n-grams allow fewer, fewer go on. For ten drafts the released code has temperature .12.
    """

    drafts: int = 3
    top: int | None = None
    alpha: float = 0.54
    weights: tuple[float, ...] = (0.01, 0.04, 0.15, 0.18, 0.12)
    temperature: float = 0.06
    penalty: float = 200.0

    def __post_init__(self):
        if self.drafts < 1 or self.ranked <= self.drafts:
            raise UserError(f"top {self.top} must be above drafts {self.drafts}, which must be at least 1; three times as many is usual")
        if not 0 <= self.alpha <= 1 or not 0 < self.temperature < float("inf") or not self.penalty >= 0:
            raise UserError(
                f"alpha {self.alpha} must lie in [0, 1], temperature {self.temperature} above 0 and penalty {self.penalty} not below"
            )
        if not self.weights or min(self.weights) < 0 or not sum(self.weights) > 0:
            raise UserError(f"weights {self.weights} must be one for each n from 2 on, none negative; to leave n-grams out give alpha=0")

    @property
    def ranked(self) -> int:
        return 3 * self.drafts if self.top is None else self.top

    def check(self, cfg: Config, ngrams: NGrams | None) -> None:
        """Raise UserError when they do not fit the model or the n-grams."""
        if self.ranked > cfg.V:
            raise UserError(f"top {self.ranked} is more than the {cfg.V} tokens of {cfg.name}; give fewer drafts or a smaller top")
        if ngrams is not None and not isinstance(ngrams, NGrams):
            raise UserError(f"ngrams={type(ngrams).__name__} is no table of n-grams; give NGrams.of([ids, ...])")
        if ngrams is not None and self.alpha > 0 and ngrams.longest <= len(self.weights):
            raise UserError(f"{len(self.weights)} weights need n-grams of {len(self.weights) + 1}; give NGrams.of(texts, longest=...)")

    def scored(self, text: Sequence[int], token_M: np.ndarray, logp_M: np.ndarray, ngrams: NGrams | None) -> np.ndarray:
        """The log-scores with which the tokens continue a text; -inf where one does not."""
        if self.alpha == 0 or ngrams is None:
            return logp_M
        share = [w * ngrams.share(text[-n:], token_M) for n, w in enumerate(self.weights, 1) if n <= len(text)]
        q_M, own_M = np.sum(share, axis=0), (1 - self.alpha) * logp_M
        seen = q_M > 0
        if not seen.any():
            return own_M - self.penalty
        return np.where(seen, own_M + self.alpha * np.log(np.where(seen, q_M, 1.0)), -np.inf)

    def grown(
        self, drafts: list[Growing], before: list[int], token_M, logit_M, ngrams: NGrams | None, eos: tuple[int, ...]
    ) -> tuple[list[Growing], list[Growing]]:
        """(the drafts that go on, those that end here), best first. before: what stands before the drafts, as far as n-grams reach."""
        x = logit_M.astype(np.float64) / self.temperature
        logp_M, found = x - x.max() - np.log(np.exp(x - x.max()).sum()), []
        for draft in drafts:
            score_M = self.scored([*before, *draft.tokens], token_M, logp_M, ngrams).tolist()
            found += [Growing((*draft.tokens, int(t)), draft.total + s) for t, s in zip(token_M, score_M, strict=True) if s > -np.inf]
        best = sorted(found, key=lambda draft: -draft.total)[: self.drafts * (1 + len(eos))]
        ended = [draft for draft in best if draft.tokens[-1] in eos]
        return [draft for draft in best if draft.tokens[-1] not in eos][: self.drafts], ended

    def mixed(self, drafts: list[Growing]) -> tuple[np.ndarray, np.ndarray]:
        """(token_1W, weight_1W) of the row that all drafts share: their last tokens, the best draft's first."""
        missing = (0, self.drafts - len(drafts))
        total = np.array([draft.total for draft in drafts])
        weight = np.exp(total - total.max())
        token = np.array([draft.tokens[-1] for draft in drafts], np.int32)
        return np.pad(token, missing)[None], np.pad(weight / weight.sum(), missing)[None]

    def search(self, rank: Callable, prompt: list[int], new: int, ngrams: NGrams | None, eos: tuple[int, ...]) -> list[Growing]:
        """The best drafts of `new` tokens or up to an end of sequence. rank(t, drafts) -> (logit_M, token_M) behind their t tokens."""
        going, ended, before = [Growing()], [], prompt[-len(self.weights) :]
        for t in range(new):
            logit_M, token_M = rank(t, going)
            going, ends = self.grown(going, before, token_M, logit_M, ngrams, eos)
            ended = sorted(ended + ends, key=lambda draft: -draft.total)[: self.drafts]
            if not going:
                break
        return sorted(going + ended, key=lambda draft: -draft.mean)[: self.drafts]


SUPERPOSED = Superposed()


def suggest(
    m: Model,
    prompt: str | Sequence[int],
    how: Superposed = SUPERPOSED,
    *,
    new: int = 16,
    ngrams: NGrams | None = None,
    kv: Policy | None = None,
    stop: bool = True,
) -> list[Suggestion]:
    """Up to `how.drafts` continuations of one prompt by `new` tokens, the best first, for new - 1 passes over one row each.

    ngrams: of which texts; those of the prompt and of a book that no task reads where none are given. Tables made once serve any number of
    prompts. kv: the policy of the cache. stop: a draft may end at the model's end-of-sequence tokens.

    The model and the ranking of its tokens run on the device; `how.ranked` numbers come to the host after every pass, where drafts and
    n-grams are, and `how.drafts` tokens and weights go back. Raises UserError before computing anything.
    """
    if not isinstance(how, Superposed) or not one_text(prompt):
        raise UserError("suggest continues one prompt, a string or token ids; the number of drafts is Superposed(drafts=3)")
    setup, (ids,), tok = Setup(Full() if kv is None else kv), encode(m, [prompt]), m.tok  # type: ignore[list-item]
    setup.check(m, [len(ids)], new)
    how.check(m.cfg, ngrams)
    if ngrams is None and how.alpha > 0:
        ngrams = NGrams.of([ids, book(tok)], 1 + len(how.weights))
    drafts = how.search(ranker(m, setup.fit(m), ids, new, how.ranked, how.mixed), ids, new, ngrams, m.cfg.eos if stop else ())
    return [Suggestion(tok.decode(draft.tokens), draft.tokens, draft.mean) for draft in drafts]


def ranker(m: Model, setup: Setup, ids: list[int], new: int, top: int, mixed: Callable) -> Callable:
    """rank(t, drafts), which `search` asks: logits and tokens of the `top` best behind the prompt, then behind each superposed row."""
    given = read(m, [ids], setup)
    with beside(m.params):
        layers = follow(m.params, pack(setup.kv, given.layers, Room(new), m.cfg))

    def rank(t: int, drafts: list[Growing]) -> tuple[np.ndarray, np.ndarray]:
        nonlocal layers
        with beside(m.params):
            if t == 0:
                logit, token = best(given.logits_BV, top=top)
            else:
                order_B = np.array([len(ids) + t - 1], np.int32)
                logit, token, layers = one_pass(m.params, m.cfg, layers, *mixed(drafts), order_B, policy=setup.kv, top=top)
        return np.asarray(logit)[0], np.asarray(token)[0]

    return rank


def one_text(prompt) -> bool:
    return isinstance(prompt, str) or (isinstance(prompt, (Sequence, np.ndarray)) and all(isinstance(t, Integral) for t in prompt))


@functools.lru_cache(maxsize=2)
def book(tok: Tokenizer) -> list[int]:
    """The committed book that is there to calibrate methods on."""
    from tokeff.data import sources

    return tok.encode(sources.text(sources.CALIBRATION), special=False)


@functools.partial(jax.jit, static_argnames="top")
def best(logits_BV: jax.Array, *, top: int) -> tuple[jax.Array, jax.Array]:
    """(logit_BM, token_BM) of the `top` most probable tokens, best first."""
    value, index = top_k(logits_BV, top, "BV")
    return value, index.astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("cfg", "policy", "top"), donate_argnames="layers")
def one_pass(params: Params, cfg: Config, layers, token_BW, weight_BW, order_B, *, policy: Policy, top: int):
    """(logit_BM, token_BM, layers) behind one more row of each sequence, the superposition of these tokens. Consumes the caches."""
    flow, layers, _ = stack(params, cfg, superpose(params, cfg, token_BW, weight_BW, order_B), layers, policy=policy)
    return *best(unembed(params, cfg, flow.x_BTD)[:, 0], top=top), layers


def superpose(params: Params, cfg: Config, token_BW: jax.Array, weight_BW: jax.Array, order_B: jax.Array) -> Flow:
    """One certain row of each sequence, the weighted sum of the tokens' embeddings; to methods that read the text it is the first token."""
    order = order_B[:, None]
    one = embed(params, cfg, token_BW[:, :1], order)
    x = embed(params, cfg, token_BW, jnp.broadcast_to(order, token_BW.shape)).x_BTD
    mean = (weight_BW[..., None] * x.astype(wide(x.dtype))).sum(axis=1, keepdims=True)
    return one.replace(x_BTD=mean.astype(x.dtype))
