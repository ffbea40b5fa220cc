"""Passes that let go of rows of pictures on the way through the decoder, and of no others.

Which rows are of pictures is told by their tokens (`Flow.id_BT`): `tokeff.models.llava` fills in what token stands for a picture, and, from
the prompts of the batch, how many rows can be left at each stage (`seeing`). Budgets are shares of a prompt's picture rows, or numbers of
them; rows of text always go on. A prompt without pictures passes through whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from tokeff.errors import UserError
from tokeff.kv.budget import Budget, check_budget, most_rows, rows_of
from tokeff.models.flow import EMPTY, Flow, Here
from tokeff.reduce.cascade import Cascade, Depth, best_rows, last_of, layer_at, looked_at, sound


def whole_steps(n: int) -> int:
    """A number of picture rows rounded down, so that pictures of similar size share compiled code."""
    return n - n % (16 if n < 256 else 64 if n < 1024 else 256)


@dataclass(frozen=True)
class PictureCascade(Cascade):
    """Base class. Filled in by `seeing`, and static: pictures, the tokens of picture rows; gone, how many rows of any prompt of the batch
    have left after each stage, at least; behind, how many rows of text stand behind the first picture, at most. () and 0: not known.

    Static numbers come from pictures' rows, not from the prompt's length, so prompts of one bucket with pictures of one size share
    compiled code.
    """

    pictures: tuple[int, ...] = ()
    gone: tuple[int, ...] = ()
    behind: int = 0

    empties: ClassVar[bool] = False  # a stage may leave none of a picture's rows

    def seeing(self, tokens: tuple[int, ...], texts: Sequence[Sequence[int]]) -> Self:
        marked = [[t in tokens for t in text[:-1]] for text in texts]  # the last row goes on whatever it is
        seen = whole_steps(min(map(sum, marked)))
        behind = max(len(row) + 1 - row.index(True) - sum(row) if any(row) else 1 for row in marked)
        gone = tuple(seen - self.left(stage, seen) for stage in range(self.stages))
        return replace(self, pictures=tokens, gone=gone, behind=max(16, 1 << (behind - 1).bit_length()))

    @property
    def stages(self) -> int:
        return len(self.keep)

    def left(self, stage: int, seen: int) -> int:
        """How many rows a stage leaves of so many picture rows."""
        return min(most_rows(self.keep[stage], seen), seen) if self.keep[stage] else 0

    def check_stage(self, budget: Budget, length: int) -> None:
        if budget != 0 or not self.empties:
            check_budget(budget, length)

    def check(self, cfg, length: int) -> None:
        super().check(cfg, length)
        if not self.pictures:
            raise UserError(
                f"{type(self).__name__} lets go of rows of pictures; generate with tokeff.models.llava, or name their token: pictures=(ID,)"
            )

    def rows(self, length: int) -> int:
        return max(length - self.gone[-1], 1) if self.gone else length

    def most(self, stage: int, T: int) -> int:
        return max(T - self.gone[stage] + (self.gone[stage - 1] if stage else 0), 1) if self.gone else T

    def pictured(self, flow: Flow) -> jax.Array:
        """Which rows are of pictures and may go: not the prompt's last row, whose logits come next."""
        assert flow.id_BT is not None
        of = jnp.isin(flow.id_BT, jnp.asarray(self.pictures, jnp.int32))
        return of & (flow.order_BT != EMPTY) & ~last_of(flow.order_BT)

    def sure(self, flow, here):
        return ~self.pictured(flow)

    def kept(self, flow: Flow, here: Here) -> jax.Array:
        """keep_B: how many picture rows this stage leaves."""
        seen_B = self.pictured(flow).sum(axis=1)
        keep = self.keep[self.stage(here)]
        return jnp.minimum(rows_of(keep, seen_B if flow.whole_B is None else flow.whole_B), seen_B) if keep else jnp.zeros_like(seen_B)

    def choose(self, q_BTNH, k_BTKH, flow, here):
        real = flow.order_BT != EMPTY
        text_B = (real & ~self.pictured(flow)).sum(axis=1)
        score = self.ranked(q_BTNH, k_BTKH, flow, here)
        return best_rows(score, self.sure(flow, here), real, text_B + self.kept(flow, here), self.most(self.stage(here), real.shape[1]))

    def take(self, flow, index_BM, here):
        whole_B = self.pictured(flow).sum(axis=1) if flow.whole_B is None else flow.whole_B
        return super().take(flow.replace(whole_B=whole_B), index_BM, here)

    def asking(self, flow: Flow) -> jax.Array:
        """Which rows are text behind the last picture: the instruction. Where there is none, the prompt's last row."""
        seen = self.pictured(flow)
        end_B1 = jnp.where(seen, flow.order_BT, EMPTY).max(axis=1, keepdims=True)
        return (flow.order_BT > end_B1) & ~seen


@dataclass(frozen=True)
class Renumbered(PictureCascade):
    """Base class of cascades that drop rows before a layer, after which the rows left stand side by side.

    renumber: rows move together: each angle is the prompt's last one less the number of rows between. Distances are those of positions
    0, 1, 2, ... in the layers above, and what is generated follows without a gap. False: rows keep their angles.
    """

    renumber: bool = True
    writes: ClassVar[bool] = False

    @property
    def renumbers(self) -> bool:
        return self.renumber

    def take(self, flow, index_BM, here):
        left = super().take(flow, index_BM, here)
        if not self.renumber:
            return left
        last_B1 = jnp.where(flow.order_BT == EMPTY, 0, flow.angle_BT).max(axis=1, keepdims=True)
        many_B1 = (index_BM != EMPTY).sum(axis=1, keepdims=True)
        return left.replace(angle_BT=jnp.maximum(last_B1 - many_B1 + 1 + jnp.arange(index_BM.shape[1]), 0))


@dataclass(frozen=True)
class FastV(PictureCascade):
    """FastV (Chen et al. 2024): the picture rows that the prompt's last row looks at most, by its attention in one layer (the mean over
    heads), positions kept.

    "After layer K" is K = at + 1: the attention is that of layer K - 1, and its dropped rows neither ask there nor reach layer K. The
    paper's text averages over all queries; its code takes the last, as here. Decoding keeps the choice of the prompt.
    """

    at: tuple[Depth, ...] = (1,)
    keep: tuple[Budget, ...] = (0.5,)

    def score(self, q_BTNH, k_BTKH, flow, here):
        return looked_at(q_BTNH, k_BTKH, flow, here, last=1)


@dataclass(frozen=True)
class PyramidDrop(Renumbered):
    """PyramidDrop (Xing et al. 2024): a share of the picture rows is left at the end of each stage, ranked by the last row's attention with
    the queries and keys of the next layer, which the others do not enter; positions renumbered.

    Defaults: half of what is left after every quarter of the layers, as published for 32 layers (8, 16, 24).
    """

    at: tuple[Depth, ...] = (0.25, 0.5, 0.75)
    keep: tuple[Budget, ...] = (0.5, 0.25, 0.125)

    def score(self, q_BTNH, k_BTKH, flow, here):
        return looked_at(q_BTNH, k_BTKH, flow, here, last=1)


@dataclass(frozen=True)
class TransPrune(Renumbered):
    """TransPrune (Li et al. 2025): picture rows that layers change most, and that the instruction looks at, go on; positions renumbered.

    Change (token transition) of a module: |out| / |in| times the softmax over all rows of 1 - cos(in, out), where `in` is normed and `out`
    not yet added; summed over attention and feed-forward of the layers from the one below the first stage to the one below the last.
    Attention: that of the rows behind the last picture, by the queries and keys of the stage's layer. Each is divided by its sum over
    picture rows, and both are added. Defaults as published for 32 layers (7, 9, 12), as shares.
    """

    at: tuple[Depth, ...] = (7 / 32, 9 / 32, 12 / 32)
    keep: tuple[Budget, ...] = (0.875, 0.625, 0.125)

    def role(self, layer: int, cfg):
        stages = self.layers(cfg)
        return layer if layer in stages else "changes" if stages[0] - 1 <= layer < stages[-1] else None

    def added(self, y_BTD, out_BTD, flow, here):
        stages = self.layers(here.cfg)
        if not stages[0] - 1 <= here.layer < stages[-1]:
            return flow
        good, y, out = sound(flow, y_BTD, out_BTD)
        real = good.order_BT != EMPTY
        change = jnp.where(real, transition(y, out, real), jnp.nan)
        return flow.replace(score_BT=change if flow.score_BT is None else flow.score_BT + change)

    def score(self, q_BTNH, k_BTKH, flow, here):
        seen, asks = self.pictured(flow), self.asking(flow)
        weight = asks / jnp.maximum(asks.sum(axis=1, keepdims=True), 1)
        looked = looked_at(q_BTNH, k_BTKH, flow, here, weight, last=self.behind or None)
        parts = (looked,) if flow.score_BT is None else (looked, flow.score_BT)
        return sum(part / (jnp.where(seen, part, 0).sum(axis=1, keepdims=True) + 1e-8) for part in parts)  # type: ignore[return-value]


def transition(y_BTD: jax.Array, out_BTD: jax.Array, real_BT: jax.Array) -> jax.Array:
    """change_BT of a module that made `out` of `y`: the ratio of lengths times the softmax over rows of 1 - cosine (TransPrune)."""
    y, out = y_BTD.astype(jnp.float32), out_BTD.astype(jnp.float32)
    long_y, long_out = (jnp.sqrt(jnp.square(x).sum(axis=-1)) for x in (y, out))
    cosine = (y * out).sum(axis=-1) / jnp.maximum(long_y * long_out, 1e-12)
    turn = jax.nn.softmax(jnp.where(real_BT, 1 - cosine, -jnp.inf), axis=1)
    return jnp.where(real_BT, long_out / jnp.maximum(long_y, 1e-12) * turn, 0)


@dataclass(frozen=True)
class DART(PictureCascade):
    """DART (Wen et al. 2025): a few pivots, and the picture rows that are least like them; what is dropped is a duplicate. Positions kept.

    Pivots are the `pivots` picture rows and as many text rows with the longest keys in the layer below (L1 norm over all heads). Each in
    turn, pictures first, longest first, takes an equal share of the budget: the rows of the pool whose vectors have the lowest cosine
    with its own. What the division leaves over goes to the longest keys, so that the budget is met. Vectors are those that enter the
    layer; the released code puts them through the model's last norm first. Its default keeps 128 of 576.
    """

    at: tuple[Depth, ...] = (2,)
    keep: tuple[Budget, ...] = (0.222,)
    pivots: int = 4
    writes: ClassVar[bool] = False

    def looks(self, cfg) -> tuple[int, ...]:
        return ()

    def role(self, layer: int, cfg):
        stages = self.layers(cfg)
        return layer if layer in stages else "measures" if layer + 1 in stages else None

    def check(self, cfg, length: int) -> None:
        super().check(cfg, length)
        if self.pivots < 1 or self.layers(cfg)[0] < 1:
            raise UserError(f"DART with {self.pivots} pivots at layer {self.layers(cfg)[0]} has no keys to go by; give at least 1 of each")

    def note(self, q_BTNH, k_BTKH, flow, here):
        if here.layer + 1 not in self.layers(here.cfg):
            return flow
        k = here.rotate(k_BTKH, flow.angle_BT[:, :, None]).astype(jnp.float32)
        return flow.replace(score_BT=jnp.abs(k).sum(axis=(2, 3)))

    def choose(self, q_BTNH, k_BTKH, flow, here):
        real, keep_B, (good,) = flow.order_BT != EMPTY, self.kept(flow, here), sound(flow)
        assert good.score_BT is not None
        seen = self.pictured(good)
        unlike = partial(least_alike, pivots=min(self.pivots, real.shape[1]))
        taken = jax.vmap(unlike)(good.x_BTD, good.score_BT, seen, (good.order_BT != EMPTY) & ~seen, keep_B)
        text = real & ~self.pictured(flow)
        score = jnp.where(good.order_BT == EMPTY, jnp.nan, good.score_BT)
        return best_rows(score, text | taken, real, text.sum(axis=1) + keep_B, self.most(self.stage(here), real.shape[1]))


def least_alike(x_TD: jax.Array, long_T: jax.Array, seen_T: jax.Array, text_T: jax.Array, keep: jax.Array, *, pivots: int) -> jax.Array:
    """Which of the `seen` rows are taken, at most `keep`: the pivots among them, and what is least like these and those among the text."""
    x = x_TD.astype(jnp.float32)
    unit = x / jnp.maximum(jnp.sqrt(jnp.square(x).sum(axis=1, keepdims=True)), 1e-12)
    found = []
    for among in (seen_T, text_T):
        value, index = jax.lax.top_k(jnp.where(among, long_T, -jnp.inf), pivots)
        found.append((index, value > -jnp.inf))
    (index, there), (others, these) = found
    there = there & (jnp.arange(pivots) < keep)
    taken = jnp.zeros_like(seen_T).at[jnp.where(there, index, len(seen_T))].set(True, mode="drop")
    each = (keep - there.sum()) // (2 * pivots)
    for pivot, is_one in zip(jnp.concatenate([index, others]), jnp.concatenate([there, these]), strict=True):
        pool = seen_T & ~taken
        rank = jnp.argsort(jnp.argsort(jnp.where(pool, unit @ unit[pivot], jnp.inf)))
        taken = taken | (pool & (rank < each) & is_one)
    return taken


@dataclass(frozen=True)
class Resting(PictureCascade):
    """Implicit multimodal alignment (Shukor & Cord 2024): rows of pictures pass layers by, for their vectors change little on the way.

    Every `every`-th layer from `first` up to before `end`: what rests is `halves`, (attention, feed-forward). A row that passes attention
    by has no key in that layer. No row is dropped for good.
    """

    at: tuple[Depth, ...] = ()
    keep: tuple[Budget, ...] = ()
    every: int = 2
    first: Depth = 1
    end: Depth = 1.0
    halves: tuple[bool, bool] = (False, True)

    def layers(self, cfg) -> tuple[int, ...]:
        return ()

    @property
    def budget(self) -> float:
        return 1.0

    def resting(self, cfg) -> tuple[int, ...]:
        """The layers that picture rows pass by."""
        return tuple(i for i in range(layer_at(self.first, cfg.L), layer_at(self.end, cfg.L)) if i % self.every == 0)

    def role(self, layer: int, cfg):
        return "rests" if layer in self.resting(cfg) else None

    @property
    def stages(self) -> int:
        return 1

    def left(self, stage: int, seen: int) -> int:
        return 0

    def check_layers(self, cfg) -> None:
        pass

    def check(self, cfg, length: int) -> None:
        if not self.pictures:
            raise UserError(f"{type(self).__name__} rests rows of pictures; generate with tokeff.models.llava, or name their token")
        if self.every < 1 or not any(self.halves) or not self.resting(cfg):
            raise UserError(f"every={self.every}, halves={self.halves} rest nothing in {cfg.L} layers; lower every or first")

    def rows(self, length: int) -> int:
        return length

    def awake(self, half, flow, here):
        if not self.halves[half] or here.layer not in self.resting(here.cfg):
            return None
        text = (flow.order_BT != EMPTY) & ~self.pictured(flow)
        return best_rows(jnp.zeros(text.shape), text, text, text.sum(axis=1), self.most(0, text.shape[1]))
