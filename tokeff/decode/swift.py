"""SWIFT (Xia et al. 2024): the model without some halves of its layers drafts. Here they are given, and found by a search between
generations; swift_online.py searches while it generates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.decode.draft import Draft, Target, last_token
from tokeff.decode.self_draft import SelfDraft, chain_parents
from tokeff.errors import UserError
from tokeff.kv.prefill import Gather, Prompt, prefill
from tokeff.models.flow import Here
from tokeff.models.transformer import alike, block, embed, unembed

if TYPE_CHECKING:
    from tokeff.decode.loop import Decoding
    from tokeff.models.load import Model

Halves = tuple[tuple[int, ...], tuple[int, ...]]  # layers whose attention, and layers whose feed-forward, is left out
GOOD = 0.93  # share of the last tokens at which the published search ends
CANDIDATES = ((0.95, 3), (0.8, 5), (0.5, 8), (0.0, 10))  # above this probability of the best guess, so many guesses


class Leaved(SelfDraft):
    """Base class of both SWIFTs: a chain, and beside each of its drafts the next best candidates, as leaves.

    At most `length` drafts follow each other; behind one that is less probable than `sure` comes none. Candidates are 3 in all where the
    best is nearly certain, up to 10 where it is not (CANDIDATES), but no more than `candidates`, which fixes the shape of the pass. The
    published numbers are length 25 and 10 candidates. Every layer runs again in the pass that verifies.
    """

    length: int
    candidates: int
    sure: float

    def __post_init__(self):
        if self.length < 1 or self.candidates < 1:
            raise UserError(f"length {self.length} and candidates {self.candidates} must be at least 1; use plain decoding for no drafts")
        if self.candidates > 1 and self.drawn:
            raise UserError("leaves are not drawn, so they have no law; give candidates=1, or coupled=True")

    @property
    def nodes(self) -> int:
        return 1 + self.length * self.candidates

    @property
    def depth(self) -> int:
        return self.length

    def check(self, m) -> None:
        super().check(m)
        if self.candidates > m.cfg.V:
            raise UserError(f"{self.candidates} candidates are more than the vocabulary of {m.cfg.V}; lower candidates")

    def leaved(self, s: Decoding, target: Target, **more: Any) -> tuple[Draft, Decoding]:
        """The draft of layers that a grower runs, which is told so by `more`."""
        B, W = s.done_B.shape[0], self.length + 1
        grower = self.grower(s, target, self.length, guesses=self.candidates, stop_B=jnp.full(B, self.sure), **more)
        g = grower.grow(grower.plant(s.layers, last_token(s.tokens_BS, s.count_B), s.accepted), self.length - 1)
        tokens, parent, valid = g.tokens_BW, chain_parents(self.length, B), g.valid_BW
        if self.candidates > 1:
            which = jnp.arange(1, self.candidates)
            many = jnp.select([g.sure_BW > p for p, _ in CANDIDATES[:-1]], [n for _, n in CANDIDATES[:-1]], CANDIDATES[-1][1])
            leaf = (valid[..., None] & (which < many[..., None]))[:, 1:].reshape(B, -1)
            on = jnp.broadcast_to(jnp.repeat(jnp.arange(W - 1, dtype=jnp.int32), len(which)), leaf.shape)
            tokens = jnp.concatenate([tokens, g.top_BWY[:, 1:, 1:].reshape(B, -1)], axis=1)
            parent, valid = jnp.concatenate([parent, on], axis=1), jnp.concatenate([valid, leaf], axis=1)
        return Draft(tokens, parent, valid, g.logq_BWV), s.replace(layers=g.layers)


@dataclass(frozen=True)
class Swift(Leaved):
    """The model drafts with halves of its layers left out (Xia et al. 2024): those that are given.

    attention, ffn: the layers whose attention, and those whose feed-forward, drafts do without (`find_skips`). The others as in `Leaved`.
    """

    attention: tuple[int, ...]
    ffn: tuple[int, ...]
    length: int = 5
    candidates: int = 3
    sure: float = 0.8

    def check(self, m) -> None:
        super().check(m)
        check_halves((self.attention, self.ffn), m.cfg)

    def attends(self, L: int) -> tuple[int, ...]:
        """Layers whose attention drafts."""
        return tuple(i for i in range(L) if i not in self.attention)

    def fits(self, policy, cfg) -> str | None:
        return policy.alone(self.attends(cfg.L), cfg)

    def draft(self, s: Decoding, target: Target) -> tuple[Draft, Decoding]:
        draft, s = self.leaved(s, target, skip=(self.attention, self.ffn))
        return draft.replace(moved=self.attends(target.cfg.L)), s


def check_halves(skip: Halves, cfg) -> None:
    for name, layers in zip(("attention", "ffn"), skip):
        if tuple(sorted(set(layers) & set(range(cfg.L)))) != tuple(layers):
            raise UserError(f"{name}={layers} must be layers of {cfg.name}, 0 to {cfg.L - 1}, in order; find_skips gives such lists")


# -- the search


def find_skips(
    m: Model, ids: Sequence[int], share: float = 0.45, tail: int = 50, *, tries: int = 1000, good: float = GOOD, patience: int = 300,
    seed: int = 0,
) -> Halves:
    """(attention, ffn) of `Swift`: which `share` of the halves of all layers but the first and the last to leave out.

    ids: a text of the model's own, prompt and answer. A choice is worth the share of its last `tail` tokens that the model without these
    halves has as its arg-max, given what the whole model kept of the text before (one parallel pass). Starts with evenly spread halves and
    tries random ones, until one is worth `good`, after `tries`, or after `patience` without a better one (Xia et al. 2024; every 25th of
    their tries is Bayesian). Another choice is another compiled program.
    Raises UserError for a text that is too short, or a share that leaves out nothing or everything.
    """
    n, even = len(ids), spread(share, m.cfg.L)
    if n < tail + 2 or tail < 1:
        raise UserError(f"{n} tokens do not have {tail} behind a beginning; give {tail + 2} or more, or a smaller tail")
    score = Agreement.of(m, ids, tail)
    rng, best, found, since = np.random.default_rng(seed), -1.0, ((), ()), 0
    for t in range(tries):
        skip = named(np.flatnonzero(even) if t == 0 else rng.choice(len(even), even.sum(), replace=False))
        if (worth := score(skip)) > best:
            best, found, since = worth, skip, -1
        since += 1
        if best >= good or since >= patience:
            break
    return found


def left_out(share: float, L: int) -> int:
    """How many halves a share of those between the first layer and the last is; UserError for none or all of them."""
    halves = 2 * (L - 2)
    if not 0 < (out := round(share * halves)) < halves:
        raise UserError(f"a share of {share} leaves out {out} of {halves} halves; give one between")
    return out


def spread(share: float, L: int) -> np.ndarray:
    """Which of the halves are left out where they are spread evenly."""
    halves, even = 2 * (L - 2), np.zeros(2 * (L - 2), bool)
    even[np.linspace(0, halves - 1, left_out(share, L)).round().astype(int)] = True
    return even


def named(chosen: np.ndarray) -> Halves:
    """The layers of halves numbered 0, 1, ...: attention and feed-forward of layer 1, of layer 2, and so on."""
    first, second = (tuple(sorted(1 + int(i) // 2 for i in chosen if i % 2 == half)) for half in (0, 1))
    return first, second


@dataclass(frozen=True, eq=False)
class Agreement:
    """What share of a text's last tokens the model without some halves gets right."""

    m: Model
    prompt: Prompt
    tokens_BT: jax.Array
    next_BT: jax.Array

    @staticmethod
    def of(m: Model, ids: Sequence[int], tail: int) -> Agreement:
        text, before = jnp.asarray([list(ids)], jnp.int32), len(ids) - tail - 1
        prompt = prefill(m.params, m.cfg, text[:, :before], jnp.asarray([before]), dtype=m.precision.cache)
        return Agreement(m, prompt, text[:, before:-1], text[:, before + 1 :])

    def __call__(self, skip: Halves) -> float:
        params, cfg, policy = self.m.params, self.m.cfg, Gather()
        order = self.prompt.next_B[:, None] + jnp.arange(self.tokens_BT.shape[1])
        flow = embed(params, cfg, self.tokens_BT, order)
        for i in range(cfg.L):
            halves, here = (i not in skip[0], i not in skip[1]), Here(alike(policy, None, cfg, i), cfg)
            if any(halves):
                flow = _part(params.blocks[i], flow, self.prompt.layers[i] if halves[0] else None, here=here, halves=halves)
        return float(_agree(params, flow.x_BTD, self.next_BT, cfg=cfg))


@partial(jax.jit, static_argnames=("here", "halves"))
def _part(w, flow, layer, *, here: Here, halves: tuple[bool, bool]):
    return block(w, flow, layer, None, None, policy=Gather(), cut=None, here=here, halves=halves)[0]


@partial(jax.jit, static_argnames="cfg")
def _agree(params, x_BTD, next_BT, *, cfg):
    return (jnp.argmax(unembed(params, cfg, x_BTD), axis=-1) == next_BT).mean()
