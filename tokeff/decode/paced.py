"""How much of a draft a pass carries, decided as generation goes: as wide as pays, and no draft at all where none does.

SmartSpec (Liu et al. 2024) sets the length of drafts by goodput: the tokens a pass is expected to commit, over all sequences of the
batch, by the time it takes at that width and that load. Here the widths are the first nodes of any drafter's draft, time is a measured
curve T(rows) / T(1) (`tokeff bench verify-cost`), and the expectation is a running mean of what was accepted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from tokeff.decode.draft import Draft, Drafter, Plain, Result
from tokeff.decode.loop import Decoding, settle_rows, step
from tokeff.errors import UserError
from tokeff.models.flow import Accepted

# T(rows) / T(1) of a pass of SmolLM2 on two CPU cores (benchmarks/cpu.json, verify-cost).
CURVE = ((1, 1.0), (2, 1.3), (4, 1.4), (8, 1.7), (16, 2.4), (32, 3.4), (64, 5.1))


class Pace(struct.PyTreeNode):
    """inner: the drafter's own state. mean_O: tokens that a pass of each width committed lately. choice: the width of the next pass.
    wait: passes until a wider draft is tried, 0 where the next pass is that try; gap: how many there are between two tries."""

    inner: Any
    mean_O: jax.Array
    choice: jax.Array
    wait: jax.Array
    gap: jax.Array


@dataclass(frozen=True)
class Part(Drafter):
    """The first `width` nodes of another's draft; none of them for a width of 1."""

    inner: Drafter
    width: int

    @property
    def nodes(self) -> int:
        return self.width

    @property
    def depth(self) -> int:
        return min(self.inner.depth, self.width - 1)

    def draft(self, s: Decoding, target) -> tuple[Draft, Decoding]:
        if self.width == 1:
            return Plain().propose((), s.tokens_BS, s.count_B), s
        draft, s = self.inner.draft(s, target)
        return first_nodes(draft, self.width), s

    def observe(self, state, draft: Draft, result: Result):
        return self.inner.observe(state, draft, result)


def first_nodes(draft: Draft, n: int) -> Draft:
    """The draft without nodes from n on: parents come first, so a tree stays one."""
    cut = jax.tree.map(lambda x: x[:, :n], draft)
    return cut if cut.sees_BWW is None else cut.replace(sees_BWW=cut.sees_BWW[:, :, :n])


@dataclass(frozen=True)
class Paced(Drafter):
    """inner: whose drafts. widths: how many of their nodes a pass may carry, root included, ascending from 1 (no draft). cost: (rows,
    T(rows) / T(1)) of the machine, ascending; between and beyond them straight lines. rate: weight of the newest pass in the running means.
    tries: what wider drafts would commit is not seen, so the next wider one is tried after so many passes and judged by that try alone;
    where it does not pay, again after twice as many, up to `rarest`.

    The text is that of `inner`, which is right to the same degree.
    """

    inner: Drafter
    widths: tuple[int, ...] = (1, 4, 8, 16)
    cost: tuple[tuple[int, float], ...] = CURVE
    rate: float = 0.2
    tries: int = 8
    rarest: int = 64

    def __post_init__(self):
        if self.inner.nodes < 2 or isinstance(self.inner, Paced):
            raise UserError(f"{type(self.inner).__name__} drafts nothing to be cut; give a drafter, such as prompt_lookup()")
        if self.inner.every_pass:
            raise UserError(f"{type(self.inner).__name__} must read every token to draft the next; pace one without a model of its own")
        widths = tuple(dict.fromkeys(min(w, self.inner.nodes) for w in self.widths))
        if len(widths) < 2 or list(widths) != sorted(widths) or widths[0] != 1:
            raise UserError(f"widths {self.widths} must ascend from 1, and one must be above it; give for example (1, 4, 16)")
        if len(self.cost) < 2 or any(t <= 0 for _, t in self.cost) or list(self.cost) != sorted(self.cost):
            raise UserError("cost must list two or more (rows, time) in ascending order; measure it with `tokeff bench verify-cost`")
        if not 0 < self.rate <= 1 or not 1 <= self.tries <= self.rarest:
            raise UserError(f"rate {self.rate} must be in (0, 1] and tries {self.tries} between 1 and rarest {self.rarest}")
        object.__setattr__(self, "widths", widths)
        object.__setattr__(self, "rule", self.inner.rule)

    @property
    def lossless(self) -> bool:
        return self.inner.lossless

    @property
    def own_layers(self) -> bool:  # type: ignore[override]
        return self.inner.own_layers

    @property
    def nodes(self) -> int:
        return self.widths[-1]

    @property
    def depth(self) -> int:
        return min(self.inner.depth, self.nodes - 1)

    def check(self, m) -> None:
        self.inner.check(m)
        if self.inner.taps or type(self.inner).drive is not Drafter.drive:
            raise UserError(f"{type(self.inner).__name__} sets its own pace; use it without paced()")

    def fits(self, policy, cfg) -> str | None:
        return self.inner.fits(policy, cfg)

    def prepare(self, m, tokens_BT, length_B, new: int) -> Pace:
        return self.begun(self.inner.prepare(m, tokens_BT, length_B, new))

    def init(self, B: int, V: int) -> Pace:
        return self.begun(self.inner.init(B, V))

    def begun(self, inner: Any) -> Pace:
        """Before anything is known a pass of any width is expected to commit what would just pay, where its draft is that deep."""
        rows = jnp.asarray(self.widths, jnp.float32)
        hoped = jnp.minimum(self.time(rows) * 1.01, jnp.minimum(rows, self.inner.depth + 1))
        return Pace(inner, hoped, jnp.int32(len(self.widths) - 1), jnp.int32(self.tries), jnp.int32(self.tries))

    def time(self, rows: jax.Array) -> jax.Array:
        """T(rows) / T(1)."""
        (a, ta), (b, tb) = self.cost[-2:]
        x, y = (jnp.asarray(side, jnp.float32) for side in zip(*self.cost, strict=True))
        return jnp.interp(rows, x, y) + jnp.maximum(rows - b, 0) * (tb - ta) / (b - a)

    def paced(self, pace: Pace, j: int, path_BW: jax.Array, count_B: jax.Array, live_B: jax.Array) -> Pace:
        """What a pass of width number j says of itself and of all narrower ones, and the next choice."""
        live = jnp.maximum(live_B.sum(), 1)
        taken = jnp.arange(path_BW.shape[1]) < count_B[:, None]
        widths = jnp.asarray(self.widths)
        inside = taken[:, :, None] & (path_BW[:, :, None] < widths)  # nodes of the path that a pass of each width would have carried
        found_O = (inside.sum(axis=1) * live_B[:, None]).sum(axis=0) / live
        option, widest, tried = jnp.arange(len(self.widths)), len(self.widths) - 1, pace.wait <= 0
        rate = jnp.where(tried & (option == j), 1.0, self.rate)  # the mean of a width not used since is of another text
        mean = jnp.where(option <= j, pace.mean_O + rate * (found_O - pace.mean_O), pace.mean_O)
        mean = jnp.maximum(mean, mean[0]).astype(pace.mean_O.dtype)
        best = jnp.argmax(mean / self.time(live * widths)).astype(jnp.int32)
        failed, anew = best < j, tried | (best == widest)
        gap = jnp.where(failed, jnp.minimum(2 * pace.gap, self.rarest), jnp.where(anew, self.tries, pace.gap))
        wait = jnp.where(failed | anew, gap, pace.wait - 1)
        choice = jnp.where(wait <= 0, jnp.minimum(best + 1, widest), best)
        return pace.replace(mean_O=mean, choice=choice, wait=wait, gap=gap)

    def drive(self, params, cfg, s: Decoding, steps: int, *, policy, how, eos) -> Decoding:
        return run_paced(params, cfg, s, jnp.int32(steps), policy=policy, drafter=self, how=how, eos=eos)


def carried(params, cfg, s: Decoding, policy, drafter: Paced, j: int, how, eos) -> Decoding:
    """One pass of width number j."""
    pace, W, live_B = s.drafter, drafter.nodes, ~s.done_B
    after = step(params, cfg, s.replace(drafter=pace.inner), policy, Part(drafter.inner, drafter.widths[j], rule=drafter.rule), how, eos)
    path, count = after.accepted.path_BW, after.accepted.count_B
    pace = drafter.paced(pace.replace(inner=after.drafter), j, path, count, live_B)
    # A row that was certain went to its slot at once; of a draft the next call moves what was accepted.
    wide = Accepted(jnp.pad(path, ((0, 0), (0, W - path.shape[1]))), jnp.zeros_like(count) if drafter.widths[j] == 1 else count)
    return after.replace(drafter=pace, accepted=wide)


@partial(jax.jit, static_argnames=("cfg", "policy", "drafter", "how", "eos"), donate_argnames="s")
def run_paced(params, cfg, s: Decoding, steps: jax.Array, *, policy, drafter: Paced, how, eos) -> Decoding:
    """At most `steps` passes. One loop a width, each running while that is the choice, inside one loop around all: branches would copy
    caches, loops hand them on."""

    def more(carry) -> jax.Array:
        i, s = carry
        return (i < steps) & ~s.done_B.all()

    def settled(carry):
        i, s = carry
        return i, settle_rows(params, cfg, s, policy)

    def round(carry):
        for j in range(len(drafter.widths)):
            if drafter.widths[j] == 1:
                pending = lambda c: more(c) & (c[1].drafter.choice == 0) & (c[1].accepted.count_B > 0).any()  # noqa: E731
                carry = jax.lax.while_loop(pending, settled, carry)
            mine = lambda c, j=j: more(c) & (c[1].drafter.choice == j)  # noqa: E731
            carry = jax.lax.while_loop(mine, lambda c, j=j: (c[0] + 1, carried(params, cfg, c[1], policy, drafter, j, how, eos)), carry)
        return carry

    return jax.lax.while_loop(more, round, (jnp.int32(0), s))[1]

