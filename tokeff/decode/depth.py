"""Less of the network for a token: FFN-SkipLLM leaves out feed-forwards that have saturated, SkipDecode whole layers, by position.

Both are plain decoding whose pass the drafter makes itself, so a prompt is read densely, any cache policy serves, and no other drafter
stands beside. Both change the text, most of all that of a model which was not trained for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from tokeff.decode.draft import Draft, Drafter, Plain, Target
from tokeff.decode.loop import Decoding, rows_of, run
from tokeff.errors import UserError
from tokeff.kv.budget import Budget, most_rows
from tokeff.models.attention import wide
from tokeff.models.flow import EMPTY, Flow, Here
from tokeff.models.transformer import alike, one_layer, stack

if TYPE_CHECKING:
    from tokeff.models.config import Block


class Ran(struct.PyTreeNode):
    """How many layers (or feed-forwards) were run, and how many dense decoding runs. All rows of a call together are one, since weights are
    read once for them."""

    ran: jax.Array
    dense: jax.Array

    @property
    def skipped(self) -> float:
        """The share that was left out."""
        return 1 - int(self.ran) / max(int(self.dense), 1)


@dataclass(frozen=True)
class Shallow(Drafter):
    """Base class: no draft, and a pass of its own with less than the whole network. The state is a `Ran`."""

    nodes: ClassVar[int] = 1  # type: ignore[misc]
    depth: ClassVar[int] = 0  # type: ignore[misc]
    exact: ClassVar[bool] = False

    def init(self, B: int, V: int) -> Ran:
        return Ran(jnp.int32(0), jnp.int32(0))

    def draft(self, s: Decoding, target: Target) -> tuple[Draft, Decoding]:
        draft, L = Plain().propose((), s.tokens_BS, s.count_B), target.cfg.L
        flow, _ = rows_of(target.params, target.cfg, s, draft, self)
        flow, layers, ran = self.through(flow, s, target)
        return draft.replace(x_BWD=flow.x_BTD, below=L), s.replace(layers=layers, drafter=Ran(s.drafter.ran + ran, s.drafter.dense + L))

    def through(self, flow: Flow, s: Decoding, target: Target) -> tuple[Flow, tuple[Any, ...], jax.Array | int]:
        """(the rows that reach the top, the new caches, how much was run)."""
        raise NotImplementedError


@dataclass(frozen=True)
class FfnSkip(Shallow):
    """FFN-SkipLLM (Jaiswal et al. 2024): once the cosine of the hidden row before a feed-forward and behind it (residual included) reaches
    `tau`, the row goes without the feed-forwards of all layers above, up to the cold ones. Attention always runs, so caches are complete.

    head, tail: how many first and last layers are cold, as a share (rounded up) or a number; theirs always run. warm: so many tokens of
    every text go through everything, its first one among them, which the dense prompt gives.

    Whether a row goes without depends on that row alone, not on its batch mates. Weights are left unread where every row that is not done
    goes without: a batch saves less than its rows would alone. A tau above 1 is dense decoding. The paper finds cold layers and tau of a
    model on a calibration text.
    """

    tau: float = 0.98
    head: Budget = 0.5
    tail: Budget = 0.1
    warm: int = 4

    def __post_init__(self):
        if not self.tau > 0 or self.warm < 0:
            raise UserError(f"tau={self.tau} must be above 0, and warm={self.warm} from 0 on; tau=2.0 skips nothing")

    def check(self, m) -> None:
        super().check(m)
        check_layers("head", self.head, m.cfg.L)
        check_layers("tail", self.tail, m.cfg.L)
        if not self.middle(m.cfg.L):
            raise UserError(f"head={self.head} and tail={self.tail} leave none of the {m.cfg.L} layers of {m.cfg.name} to skip; lower one")

    def middle(self, L: int) -> range:
        """Layers whose feed-forward may be left out. Of the first of them it never is: nothing was measured yet."""
        return range(number(self.head, L), L - number(self.tail, L))

    def through(self, flow, s, target):
        cfg, layers, across, ran = target.cfg, list(s.layers), None, jnp.int32(0)
        gone_BT, skips_BT = flow.order_BT == EMPTY, jnp.zeros(flow.order_BT.shape, bool)
        for i, w in enumerate(target.params.blocks):
            here = Here(alike(target.policy, None, cfg, i), cfg)
            flow, layers[i], across = one_layer(
                w, flow, layers[i], s.accepted, across, policy=target.policy, cut=None, here=here, halves=(True, False)
            )
            x, fed = flow.x_BTD, partial(feed, w, flow, here, target.policy)
            if i not in self.middle(cfg.L):
                flow, ran = flow.replace(x_BTD=fed(x)), ran + 1
                continue
            none = (skips_BT | gone_BT).all()
            y = jnp.where(skips_BT[..., None], x, jax.lax.cond(none, lambda x: x, fed, x))
            flow, ran = flow.replace(x_BTD=y), ran + ~none
            skips_BT = skips_BT | (cosine(x, y) >= self.tau) & (s.made_B >= self.warm)[:, None]
        return flow, tuple(layers), ran


def feed(w: Block, flow: Flow, here: Here, policy, x_BTD: jax.Array) -> jax.Array:
    """x_BTD behind the feed-forward half of a layer."""
    return one_layer(w, flow.replace(x_BTD=x_BTD), None, None, None, policy=policy, cut=None, here=here, halves=(False, True))[0].x_BTD


def cosine(a_BTD: jax.Array, b_BTD: jax.Array) -> jax.Array:
    """cos_BT of pairs of rows, in float32."""
    a, b = (x.astype(wide(x.dtype)) for x in (a_BTD, b_BTD))
    return (a * b).sum(axis=-1) * jax.lax.rsqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))


def number(share: Budget, L: int) -> int:
    """How many of L layers: a share is rounded up, and 0 of either kind is none."""
    return most_rows(share, L) if share else 0


def check_layers(name: str, share: Budget, L: int) -> None:
    most = 1.0 if isinstance(share, float) else L
    if not 0 <= share <= most:
        raise UserError(f"{name}={share} is no number of {L} layers; give a share of them in [0, 1] or a number from 0 to {L}")


@dataclass(frozen=True)
class Some(Shallow):
    """The layers `layers`, in order, for every token. What the others hold of the prompt is not read."""

    layers: tuple[int, ...]

    def through(self, flow, s, target):
        flow, layers, _ = stack(target.params, target.cfg, flow, s.layers, policy=target.policy, accepted=s.accepted, run=self.layers)
        return flow, layers, len(self.layers)


@dataclass(frozen=True)
class SkipDecode(Shallow):
    """SkipDecode (Del Corro et al. 2023): how many layers run depends on the place of the token alone. At the t-th generated one it is
    most - (most - least) min(t / over, 1), rounded, halves up: the first `warm` layers, and of the others the topmost.

    So what runs shrinks as the text grows, and a layer that runs holds the rows of all tokens before: none is computed late. All sequences
    of a batch agree. most, least: as a share (rounded up) or a number of layers. Tokens with equal budgets are one compiled loop; the host
    starts the next. stairs: so many budgets, evenly between the two, each for an equal part of `over` tokens, in the place of one for every
    number of layers (None), since each takes the compiler as long as the whole model. The paper fine-tunes each model for its task.
    """

    most: Budget = 1.0
    least: Budget = 0.5
    warm: int = 1
    over: int = 64
    stairs: int | None = 4

    own_layers: ClassVar[bool] = True

    def __post_init__(self):
        if self.over < 1 or self.warm < 0 or (self.stairs is not None and self.stairs < 2):
            raise UserError(f"over={self.over} must be 1 or more, warm={self.warm} 0, stairs={self.stairs} 2; least=1.0 skips nothing")

    def check(self, m) -> None:
        super().check(m)
        check_layers("most", self.most, m.cfg.L)
        check_layers("least", self.least, m.cfg.L)
        most, least = number(self.most, m.cfg.L), number(self.least, m.cfg.L)
        if not max(self.warm, 1) <= least <= most:
            raise UserError(f"most={most} layers, least={least} and warm={self.warm} must fall in this order, to 1 or more; raise least")

    def fits(self, policy, cfg) -> str | None:
        sets = {self.layers(t, cfg.L): None for t in range(self.over + 1)}
        return next((reason for layers in sets if (reason := policy.alone(layers, cfg))), None)

    def budget(self, t: int, L: int) -> int:
        """How many layers run for the t-th generated token; the dense prompt gave the first, t = 0."""
        most, least, t, over = number(self.most, L), number(self.least, L), min(t, self.over), self.over
        if self.stairs is not None:
            t, over = min(self.stairs * t // over, self.stairs - 1), self.stairs - 1
        return (2 * (most * over - (most - least) * t) + over) // (2 * over)

    def layers(self, t: int, L: int) -> tuple[int, ...]:
        """The layers that run for it."""
        low = L - self.budget(t, L) + self.warm
        return tuple(i for i in range(L) if i < self.warm or i >= low)

    def segment(self, t: int, L: int) -> tuple[Some, int | None]:
        """(what runs for the t-th token, the first token behind it with a smaller budget, None where there is none)."""
        now = self.budget(t, L)
        return Some(self.layers(t, L)), next((u for u in range(t + 1, self.over + 1) if self.budget(u, L) < now), None)

    def drive(self, params, cfg, s: Decoding, steps: int, *, policy, how, eos) -> Decoding:
        """One compiled loop after the other."""
        while steps > 0 and not bool(s.done_B.all()):
            t = int(jnp.where(s.done_B, 0, s.made_B).max())
            some, upto = self.segment(t, cfg.L)
            n = steps if upto is None else min(steps, upto - t)
            s = run(params, cfg, s, jnp.int32(n), policy=policy, drafter=some, how=how, eos=eos)
            steps -= n
        return s
