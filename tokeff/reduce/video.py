"""Rows of a video's frames that become fewer: HoliTom, DyCoke's temporal part, and rows of neighbouring frames averaged.

x_FPD: the F frames of one video, each of P rows as the decoder gets them (pooled, projected). A row that stands for several frames
stands in the first of them. What depends on the video is a mask, so shapes are static; the frames are F pictures to `Reduced`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.errors import UserError
from tokeff.kv.budget import check_budget
from tokeff.models.vit import Seen, Taps
from tokeff.models.vit_config import ViTConfig
from tokeff.reduce.peaks import density_peaks
from tokeff.reduce.visual import Filmed, Reduced, patches, unit


def like_next(x_FPD: jax.Array) -> jax.Array:
    """cosine_EP, E = F - 1, of every row with that of the same place in the next frame; at most 1."""
    u = unit(x_FPD)
    return jnp.minimum((u[:-1] * u[1:]).sum(axis=2), 1)


class Segments(NamedTuple):
    """Runs of frames. start_F: the first frame of the run each frame is in. static_FP: rows that stay alike through their run, which has
    more than one frame. gone: how many rows go when each static one becomes one row a run."""

    start_F: jax.Array
    static_FP: jax.Array
    gone: jax.Array


def segments(alike_EP: jax.Array, longest: int) -> Segments:
    """The cut of a video into runs of at most `longest` frames in which most rows become one (HoliTom, sec. 3.2), by dynamic programming.

    alike_EP: which rows are like those of the next frame. A run of n frames saves n - 1 rows for each place at which all its frames are
    alike; of equal cuts the one whose last run is shorter.
    """
    F = len(alike_EP) + 1
    most_F, from_F = [jnp.zeros((), jnp.int32)], [jnp.zeros((), jnp.int32)]
    for i in range(1, F):
        through = jnp.cumprod(alike_EP[:i][::-1].astype(jnp.int32), axis=0).sum(axis=1)[: longest - 1]  # places alike for 2, 3, ... frames
        starts = np.arange(i - 1, i - 1 - len(through), -1)
        before = jnp.stack([most_F[j - 1] if j else jnp.zeros((), jnp.int32) for j in starts]) if len(starts) else jnp.zeros(0, jnp.int32)
        saved = jnp.concatenate([most_F[-1][None], before + through * (i - starts)])
        at = jnp.argmax(saved)
        most_F.append(saved[at])
        from_F.append(jnp.asarray(np.array([i, *starts]))[at])
    start_F = _starts(jnp.stack(from_F))
    same_FF = start_F[:, None] == start_F
    broken_EP = same_FF[np.arange(F - 1), np.arange(1, F)][:, None] & ~alike_EP
    breaks_FP = jnp.einsum("fe,ep->fp", same_FF[:, :-1].astype(jnp.float32), broken_EP.astype(jnp.float32))
    return Segments(start_F, (breaks_FP == 0) & (same_FF.sum(axis=1) > 1)[:, None], most_F[-1])


def _starts(from_F: jax.Array) -> jax.Array:
    """start_F of the runs on the way back from the last frame. from_F: where the run that ends at each frame begins."""

    def back(start, frame):
        i, begins = frame
        start = jnp.where(i < start, begins, start)
        return start, start

    F = len(from_F)
    return jax.lax.scan(back, jnp.int32(F), (jnp.arange(F), from_F.astype(jnp.int32)), reverse=True)[1]


def over_runs(x_FPD: jax.Array, start_F: jax.Array) -> jax.Array:
    """Every row the mean over its run's frames."""
    same_FF = (start_F[:, None] == start_F).astype(jnp.float32)
    mean = jnp.einsum("fe,epd->fpd", same_FF, x_FPD.astype(jnp.float32), precision="highest")
    return (mean / same_FF.sum(axis=1)[:, None, None]).astype(x_FPD.dtype)


def top_of(score: jax.Array, count: jax.Array) -> jax.Array:
    """mask of the `count` best along the last axis; of equal ones the earlier; never one at -inf."""
    rank = jnp.argsort(jnp.argsort(-score, axis=-1, stable=True), axis=-1)
    return (rank < count) & (score > -jnp.inf)


def clustered(x_PD: jax.Array, there_P: jax.Array, count: jax.Array, near: int, beta: float) -> tuple[jax.Array, jax.Array]:
    """(x_PD, centre_P): the rows that are there as `count` clusters (HoliTom, sec. 3.3).

    The best `density_peaks`, over at most `count` nearest, are centres, a row joins its nearest, and a centre becomes beta itself plus
    1 - beta the mean of those that joined it.
    """
    there_P = there_P & jnp.isfinite(x_PD).all(axis=1)
    P, x = len(x_PD), jnp.where(there_P[:, None], x_PD, 0).astype(jnp.float32)
    score_P, d_PP = density_peaks(x, there_P, jnp.minimum(near, count), near)
    centre_P = top_of(score_P, count)
    joins_P = jnp.argmin(jnp.where(centre_P, d_PP, jnp.inf), axis=1)
    goes_PP = (joins_P == jnp.arange(P)[:, None]) & there_P & ~centre_P
    size = goes_PP.sum(axis=1)[:, None]
    mean = jnp.einsum("cp,pd->cd", goes_PP.astype(jnp.float32), x, precision="highest") / jnp.maximum(size, 1)
    return jnp.where(size > 0, beta * x + (1 - beta) * mean, x).astype(x_PD.dtype), centre_P


@dataclass(frozen=True)
class HoliTom(Filmed):
    """HoliTom (Shao et al. 2025), what it does before the decoder: runs of frames whose still parts are averaged, then fewer rows in each.

    A row is still where its cosine with the next frame's is above `tau`; the video is cut into runs of at most `longest` frames so that
    averaging the rows still through a run takes most away (`segments`). The share R = budget all rows / those that are left, at most 1,
    is then kept: of the others of each frame, those that receive most attention at `layer` of the tower, rounded up; of a run's
    averaged rows, that many clusters (`clustered`), rounded to the nearest. Rows stand in reading order, averaged ones in the first frame
    of their run, as released for lines of frames; where a video has no lines the released code puts a run's averaged rows first. The
    paper's last step, merging rows in a layer of the decoder, is not here.
    """

    budget: float = 0.1
    tau: float = 0.8
    longest: int = 1024
    near: int = 7
    beta: float = 0.6
    layer: int = -2

    def check(self, cfg: ViTConfig) -> None:
        super().check(cfg)
        check_budget(float(self.budget), cfg.patches)
        if self.longest < 1 or self.near < 1 or not 0 <= self.beta <= 1:
            raise UserError(f"longest={self.longest}, near={self.near}, beta={self.beta} merge nothing; give 1 or more, beta from 0 to 1")

    def at_share(self, share: float, F: int, alike: Callable[[], np.ndarray]) -> Filmed | None:
        return replace(self, budget=share)

    def taps(self, cfg: ViTConfig) -> Taps:
        return Taps(received=(cfg.layer(self.layer),))

    def reduce(self, x_BSD: jax.Array, seen: Seen, cfg: ViTConfig) -> Reduced:
        x, F, P = patches(x_BSD, cfg), len(x_BSD), cfg.patches
        attention = patches(seen.received_BS[cfg.layer(self.layer)], cfg)
        runs = segments(like_next(x) > self.tau, self.longest)
        share = jnp.minimum(self.budget * F * P / (F * P - runs.gone), 1)
        moving = ~runs.static_FP
        count_F = jnp.ceil(share * moving.sum(axis=1) - 1e-4)
        best = top_of(jnp.where(moving, attention, -jnp.inf), count_F[:, None])
        still_F = jnp.round(share * runs.static_FP.sum(axis=1)).astype(jnp.int32)
        merged, centre = jax.vmap(lambda x, there, c: clustered(x, there, c, min(self.near, P), self.beta))(
            over_runs(x, runs.start_F), runs.static_FP, still_F
        )
        first = (runs.start_F == jnp.arange(F))[:, None]
        real = best | (centre & first)
        return Reduced(jnp.where(runs.static_FP[..., None], merged, x), jnp.broadcast_to(jnp.arange(P), (F, P)), real)


@dataclass(frozen=True)
class DyCoke(Filmed):
    """DyCoke (Tao et al. 2025), its temporal part: in windows of four frames the rows that are most like those of an earlier frame go.

    Of the second and fourth frame those most like the first's and third's, of the third those most like the first's, each `drop` of them;
    what stays is rounded down. As released, the third frame of the last window stays whole, and here so does a last frame without a
    partner, which the released code loses. At drop 0 nothing goes.
    """

    drop: float = 0.7

    def check(self, cfg: ViTConfig) -> None:
        if not 0 <= self.drop < 1:
            raise UserError(f"drop {self.drop} is not a share of a frame's rows; give a fraction from 0 up to 1")

    def earlier(self, F: int) -> np.ndarray:
        """earlier_F: the frame each of F frames is compared with; itself where it stays whole."""
        earlier = np.arange(F)
        earlier[1::2] = np.arange(0, F - 1, 2)
        thirds = np.arange(2, F - 2, 4)
        earlier[thirds] = thirds - 2
        return earlier

    def at_share(self, share: float, F: int, alike: Callable[[], np.ndarray]) -> Filmed | None:
        whole = int((self.earlier(F) == np.arange(F)).sum())
        rest = 1 - (1 - share) * F / (F - whole)
        return replace(self, drop=1 - rest) if rest > 0 else None

    def reduce(self, x_BSD: jax.Array, seen: Seen, cfg: ViTConfig) -> Reduced:
        x, F, P = patches(x_BSD, cfg), len(x_BSD), cfg.patches
        earlier, u = self.earlier(F), unit(x)
        like = (u * u[earlier]).sum(axis=2)
        rank = jnp.argsort(jnp.argsort(jnp.nan_to_num(like, nan=2.0), axis=1, stable=True), axis=1)
        return Reduced(x, jnp.broadcast_to(jnp.arange(P), (F, P)), rank < self.stays(F, P)[:, None])

    def stays(self, F: int, P: int) -> np.ndarray:
        """count_F of the rows that stay."""
        return np.where(self.earlier(F) == np.arange(F), P, max(int((1 - self.drop) * P + 1e-6), 1))

    def fewest(self, cfg: ViTConfig, crops: int) -> int:
        return int(self.stays(crops, cfg.patches).sum())


@dataclass(frozen=True)
class FastVID(Filmed):
    """FastVID (Shen et al. 2025): segments at changes of scene, the rows that are looked at, and clusters over each segment. Our reading.

    A frame keeps n = floor(budget P) rows in the mean, n - floor(context n) of them those that receive most attention at `layer`. A video
    is cut where neighbouring frames are least alike, at least `segments` - 1 times, and wherever their cosine is below `tau`. Counted
    from a segment's last frame, every `every`-th is an anchor and gets an equal part of the segment's other rows: density peaks over 4
    nearest of the frame's rest. Each anchor merges the rest of all the segment's frames into them, by cosine: w itself plus 1 - w the mean
    of what it got, w = max(beta, 1 / (1 + their number)). The paper takes a frame's feature and its attention from SigLIP's pooling head,
    which a LLaVA has not; here they are the mean of its rows, and the attention received.
    """

    budget: float = 0.1
    context: float = 0.4
    segments: int = 8
    tau: float = 0.9
    every: int = 4
    beta: float = 0.6
    layer: int = -2

    def check(self, cfg: ViTConfig) -> None:
        super().check(cfg)
        check_budget(float(self.budget), cfg.patches)
        if int(self.budget * cfg.patches + 1e-6) < 1:
            raise UserError(f"budget {self.budget} of {cfg.patches} rows is less than one a frame; give more")
        if not (0 <= self.context <= 1 and 0 <= self.beta <= 1) or min(self.segments, self.every) < 1:
            raise UserError(f"{self} has no shares or no segments; give context and beta from 0 to 1, segments and every from 1")

    def at_share(self, share: float, F: int, alike: Callable[[], np.ndarray]) -> Filmed | None:
        return replace(self, budget=share)

    def taps(self, cfg: ViTConfig) -> Taps:
        return Taps(received=(cfg.layer(self.layer),))

    def reduce(self, x_BSD: jax.Array, seen: Seen, cfg: ViTConfig) -> Reduced:
        x, F, P = patches(x_BSD, cfg), len(x_BSD), cfg.patches
        looks, context = self.parts(cfg)
        looked = top_of(patches(seen.received_BS[cfg.layer(self.layer)], cfg), jnp.full((F, 1), looks))
        segment_F = self.cut(x)
        same_FF = segment_F[:, None] == segment_F
        length_F, behind_F = same_FF.sum(axis=1), (same_FF & (jnp.arange(F) > jnp.arange(F)[:, None])).sum(axis=1)
        anchor_F = behind_F % self.every == 0
        count_F = jnp.where(anchor_F, context * length_F // -(-length_F // self.every), 0)
        score, _ = jax.vmap(lambda x, there: density_peaks(x, there, 4, 4))(x, ~looked)
        centre = top_of(score, count_F[:, None])
        merged = jax.lax.map(lambda a: self.gathered(x, ~looked & a[1][:, None], a[0], a[2]), (x, same_FF, centre))
        return Reduced(jnp.where(centre[..., None], merged, x), jnp.broadcast_to(jnp.arange(P), (F, P)), looked | centre)

    def parts(self, cfg: ViTConfig) -> tuple[int, int]:
        """Rows of a frame that are looked at, and clusters of the others in the mean."""
        n = int(self.budget * cfg.patches + 1e-6)
        return n - int(n * self.context), int(n * self.context)

    def fewest(self, cfg: ViTConfig, crops: int) -> int:
        return max(crops * self.parts(cfg)[0], 1)

    def cut(self, x_FPD: jax.Array) -> jax.Array:
        """segment_F: the number of the segment each frame is in."""
        u = unit(x_FPD.astype(jnp.float32).mean(axis=1))
        like_E = (u[:-1] * u[1:]).sum(axis=1)
        cuts_E = top_of(-like_E, jnp.int32(self.segments - 1)) | (like_E < self.tau)
        return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(cuts_E).astype(jnp.int32)])

    def gathered(self, x_FPD: jax.Array, goes_FP: jax.Array, own_PD: jax.Array, centre_P: jax.Array) -> jax.Array:
        """x_PD of an anchor: its centres with the rows that go, of any frame, merged into the most similar of them."""
        rows, P = x_FPD.reshape(-1, x_FPD.shape[2]).astype(jnp.float32), len(own_PD)
        fine_R = jnp.isfinite(rows).all(axis=1)
        rows, goes_R = jnp.where(fine_R[:, None], rows, 0), goes_FP.reshape(-1) & fine_R
        like = jnp.where(centre_P, jnp.einsum("rd,cd->rc", unit(rows), unit(own_PD), precision="highest"), -jnp.inf)
        goes_RC = (jnp.argmax(like, axis=1)[:, None] == jnp.arange(P)) & goes_R[:, None]
        size = goes_RC.sum(axis=0)[:, None]
        mean = jnp.einsum("rc,rd->cd", goes_RC.astype(jnp.float32), rows, precision="highest") / jnp.maximum(size, 1)
        own = jnp.maximum(self.beta, 1 / (size + 1))
        return (own * own_PD + (1 - own) * mean).astype(own_PD.dtype)


@dataclass(frozen=True)
class StillRuns(Filmed):
    """Adaptive merging over time: a place's rows become their mean for as long as each is like the next, cosine above `tau`.

    Every place has runs of its own, so a part that stands still is read once however much moves beside it. Our reading of what the
    temporal halves of HoliTom, PruneVid and others share.
    """

    tau: float = 0.9

    def fewest(self, cfg: ViTConfig, crops: int) -> int:
        return cfg.patches  # those of the first frame

    def at_share(self, share: float, F: int, alike: Callable[[], np.ndarray]) -> Filmed | None:
        rest = 1 - (1 - share) * F / (F - 1)  # rows behind the first frame that begin a run
        return replace(self, tau=float(np.quantile(alike(), rest))) if rest > 0 else None

    def reduce(self, x_BSD: jax.Array, seen: Seen, cfg: ViTConfig) -> Reduced:
        x, F, P = patches(x_BSD, cfg), len(x_BSD), cfg.patches
        starts = jnp.concatenate([jnp.ones((1, P), bool), ~(like_next(x) > self.tau)])
        run_FP = jnp.cumsum(starts, axis=0)
        same_FFP = (run_FP[:, None] == run_FP[None]).astype(jnp.float32)
        mean = jnp.einsum("fep,epd->fpd", same_FFP, x.astype(jnp.float32), precision="highest") / same_FFP.sum(axis=1)[..., None]
        return Reduced(mean.astype(x.dtype), jnp.broadcast_to(jnp.arange(P), (F, P)), starts)


@dataclass(frozen=True)
class FramePairs(Filmed):
    """On-device Sora's temporal merging (Kim et al. 2025): `frames` neighbouring frames become their mean, in the place of the first.

    In the paper tokens of a video that is being made are merged before attention and copied back behind it; here what is merged goes on to
    the decoder. The last frames become one though they may be fewer.
    """

    frames: int = 2

    def fewest(self, cfg: ViTConfig, crops: int) -> int:
        return -(-crops // self.frames) * cfg.patches

    def at_share(self, share: float, F: int, alike: Callable[[], np.ndarray]) -> Filmed | None:
        few = [n for n in range(1, F + 1) if -(-F // n) <= share * F]
        return replace(self, frames=few[0]) if few else None

    def check(self, cfg: ViTConfig) -> None:
        if self.frames < 1:
            raise UserError(f"{self.frames} frames do not become one; give at least 1")

    def reduce(self, x_BSD: jax.Array, seen: Seen, cfg: ViTConfig) -> Reduced:
        x, F, P = patches(x_BSD, cfg), len(x_BSD), cfg.patches
        first = np.arange(F) // self.frames * self.frames
        real = np.broadcast_to((first == np.arange(F))[:, None], (F, P))
        return Reduced(over_runs(x, jnp.asarray(first)), jnp.broadcast_to(jnp.arange(P), (F, P)), jnp.asarray(real))
