"""DEL (Entezari Zarch et al. 2025): the exit layer and the length of drafts, chosen while the text is made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tokeff.decode.draft import Draft, Result, Target
from tokeff.decode.sample import first_max, noised
from tokeff.decode.self_draft import SelfDraft, below, check_exit, halves, resumed
from tokeff.errors import UserError
from tokeff.models.transformer import unembed

if TYPE_CHECKING:
    from tokeff.decode.loop import Decoding


class Shadow(struct.PyTreeNode):
    """What each of L exits would have been worth, as fading sums over passes: hit_L tokens named right before the first wrong one, miss_L
    wrong ones, and the confidence with which they were named. And the last pass, not counted yet: what left the exits at the nodes of the
    accepted path, the tokens that came of them, and how many."""

    hit_L: jax.Array
    miss_L: jax.Array
    sure_hit_L: jax.Array
    sure_miss_L: jax.Array
    x_BLWD: jax.Array
    emitted_BW: jax.Array
    count_B: jax.Array


@dataclass(frozen=True)
class DynamicExit(SelfDraft):
    """Early exit whose layer and length follow the text (DEL, Entezari Zarch et al. 2025).

    At every node that was accepted, the head reads each exit: what it names there are shadow tokens, and those before the first wrong one
    tell how often drafts from that exit would be right. The sums fade by `fade` a pass. After every `every` passes the host takes the exit
    and the length with the most expected tokens per cost, (1 + a + ... + a^length) / (layers and heads run). Within a chain, a draft less
    probable than the mean confidence of right and of wrong ones at that exit is the last (`dynamic`).

    exits, lengths: the ones to choose from; each pair is one compiled program, compiled when first chosen. The paper takes all layers and
    lengths up to 18, counts layers only, and begins with the prompt's last 32 tokens; here every exit begins at one half.
    now: the pair in use, for the compiled loop.
    """

    exits: tuple[int, ...] = (4, 8, 12)
    lengths: tuple[int, ...] = (2, 4, 6)
    every: int = 8
    fade: float = 0.95
    dynamic: bool = True
    now: tuple[int, int] | None = None

    def __post_init__(self):
        for name in ("exits", "lengths"):
            some = getattr(self, name)
            if not some or min(some) < 1 or tuple(sorted(set(some))) != tuple(some):
                raise UserError(f"{name}={some} must be different numbers from 1 on, ascending; give for example {name}=(2, 4)")
        if self.every < 1 or not 0 < self.fade <= 1:
            raise UserError(f"every={self.every} must be at least 1 and fade={self.fade} in (0, 1]")

    @property
    def nodes(self) -> int:
        return max(self.lengths) + 1

    @property
    def depth(self) -> int:
        return max(self.lengths) if self.now is None else self.now[1]

    @property
    def taps(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(exit - 1 for exit in self.exits)

    def check(self, m) -> None:
        super().check(m)
        check_exit(max(self.exits), m.cfg)

    def fits(self, policy, cfg) -> str | None:
        return next((reason for exit in self.exits if (reason := halves(policy, cfg, exit))), None)

    def prepare(self, m, tokens_BT, length_B, new) -> Shadow:
        B, L, W = tokens_BT.shape[0], len(self.exits), self.nodes
        hit, miss, sure, unsure = (jnp.full(L, x, jnp.float32) for x in (0.5, 0.5, 0.25, 0.25))
        x = jnp.zeros((B, L, W, m.cfg.D), m.precision.activations)
        return Shadow(hit, miss, sure, unsure, x, jnp.zeros((B, W), jnp.int32), jnp.zeros(B, jnp.int32))

    def draft(self, s: Decoding, target: Target) -> tuple[Draft, Decoding]:
        assert self.now is not None, "driven by `drive`"
        exit, length = self.now
        shadow = self.counted(s, target)
        which = self.exits.index(exit)
        tau = (mean(shadow.sure_hit_L, shadow.hit_L) + mean(shadow.sure_miss_L, shadow.miss_L))[which] / 2
        stop = jnp.broadcast_to(tau, s.done_B.shape) if self.dynamic else None
        g = below(self, s, target, exit, length, self.taps, stop)
        return resumed(g, exit), s.replace(layers=g.layers, drafter=shadow)

    def counted(self, s: Decoding, target: Target) -> Shadow:
        """With the last pass counted: what each exit names at the accepted nodes, against the tokens that came of them."""
        last = s.drafter
        B, L, W, D = last.x_BLWD.shape
        logits = unembed(target.params, target.cfg, last.x_BLWD.reshape(B, L * W, D))
        first = s.count_B - last.count_B - s.gone_B
        place = jnp.broadcast_to(first[:, None, None] + jnp.arange(W), (B, L, W)).reshape(B, L * W)
        named = first_max(noised(logits, place, s.key_B, target.how) if self.coupled else logits).reshape(B, L, W)
        sure = jnp.exp(jax.nn.log_softmax(logits).max(axis=-1)).reshape(B, L, W)
        right = (named == last.emitted_BW[:, None]) & (jnp.arange(W) < last.count_B[:, None, None])
        hit = jnp.cumprod(right, axis=2)
        miss = (jnp.arange(W) == hit.sum(axis=2, keepdims=True)) & (jnp.arange(W) < last.count_B[:, None, None])

        def add(sum_L, x_BLW):
            more = x_BLW.sum(axis=(0, 2))
            return jnp.where(last.count_B.any(), self.fade * sum_L + more, sum_L).astype(sum_L.dtype)

        return last.replace(
            hit_L=add(last.hit_L, hit), miss_L=add(last.miss_L, miss),
            sure_hit_L=add(last.sure_hit_L, hit * sure), sure_miss_L=add(last.sure_miss_L, miss * sure),
            count_B=jnp.zeros_like(last.count_B),
        )  # fmt: skip

    def observe(self, state: Shadow, draft: Draft, result: Result) -> Shadow:
        more = self.nodes - result.path_BW.shape[1]
        path, emitted = (jnp.pad(x, ((0, 0), (0, more))) for x in (result.path_BW, result.emitted_BW))
        x = jnp.stack([jnp.take_along_axis(result.taps[i], path[..., None], axis=1) for i in self.taps], axis=1)
        return state.replace(x_BLWD=x.astype(state.x_BLWD.dtype), emitted_BW=emitted.astype(jnp.int32), count_B=result.count_B)

    def drive(self, params, cfg, s: Decoding, steps: int, *, policy, how, eos) -> Decoding:
        """The host chooses between segments of passes; a cache goes through no branch."""
        from tokeff.decode.loop import run

        while steps > 0 and not bool(s.done_B.all()):
            now, some = self.best(s.drafter, cfg), min(steps, self.every)
            s = run(params, cfg, s, jnp.int32(some), policy=policy, drafter=replace(self, now=now), how=how, eos=eos)
            steps -= some
        return s

    def best(self, state: Shadow, cfg) -> tuple[int, int]:
        """(exit, length) with the most expected tokens per cost."""
        hit, miss = np.asarray(state.hit_L, np.float64), np.asarray(state.miss_L, np.float64)
        rate = hit / (hit + miss)
        return max(
            ((exit, length) for exit in self.exits for length in self.lengths),
            key=lambda pair: expected(rate[self.exits.index(pair[0])], pair[1]) / cost(*pair, cfg),
        )


def mean(sum_L: jax.Array, number_L: jax.Array) -> jax.Array:
    """One half where sums that fade have become nothing."""
    return (sum_L + 1e-6) / (number_L + 2e-6)


def expected(rate: float, length: int) -> float:
    """Tokens of a pass whose drafts are right with this probability, each given those before it."""
    return sum(rate**j for j in range(length + 1))


def cost(exit: int, length: int, cfg) -> float:
    """Layers run for a pass of `length` drafts, one row as much as several: `exit` of them again for every draft, and the head, in layers'
    worth of weights."""
    layer = cfg.D * cfg.H * 2 * (cfg.N + cfg.K) + 3 * cfg.D * cfg.F
    return length * exit + cfg.L + (length + 1) * cfg.V * cfg.D / layer
