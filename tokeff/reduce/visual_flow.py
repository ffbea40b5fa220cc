"""VFlowOpt (Yang et al. 2025): patches ranked by context and entropy, the rest merged by cells; and the search for its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.errors import UserError
from tokeff.kv.budget import Budget
from tokeff.models.attention import scores
from tokeff.models.vit import Seen, Taps, patches_of
from tokeff.models.vit_config import ViTConfig
from tokeff.reduce.visual import Chosen, Reduced, in_place, patches


@dataclass(frozen=True)
class VFlowOpt(Chosen):
    """VFlowOpt, what it does behind the tower: patches that matter to the context stay, the others become one row a cell of the picture.

    A patch counts for the attention it draws from the queries that matter: those of patches which receive more than `above` times the
    mean; of the one that receives most where none does. `entropy` weighs a softmax over the patches' entropies, in bits, of 256 grey
    levels between the ends of `span`, the range of a channel as the tower reads it. The published search covers -1 to 1, and the released
    settings have 0; the released code casts normalised pixels to bytes, which folds the negative ones onto the others.
    Of the patches that go, `cell` x `cell` ones become their mean, weighted by what they count for, at the place of the best. As released,
    the budget pays for P / cell^2 of them, and cells at the edge come on top, so at most `rows` are left. The defaults are those found for
    a tenth of all rows in LLaVA-OneVision, of which the decoder's cuts are a part; `completed` gives the share of the last of these, the
    cuts themselves are not here. There all rows of a laid-out picture are ranked together; here every crop by itself.
    """

    budget: Budget = 0.11661529508161146
    above: float = 39.26492840997221
    cell: float = 17.4
    entropy: float = 0.0
    layer: int = -2
    span: tuple[float, float] = (-1.0, 1.0)

    def check(self, cfg: ViTConfig) -> None:
        super().check(cfg)
        self.taps(cfg)
        if self.cell < 1 or self.kept(cfg) < 0:
            raise UserError(f"cells of {self.cell} patches a side take more rows than the budget {self.budget} has; give larger cells")
        if not self.span[0] < self.span[1]:
            raise UserError(f"span {self.span} is no range of pixels; give the least and the greatest value the tower reads")

    def kept(self, cfg: ViTConfig) -> int:
        """Patches that stay as they are."""
        if (M := super().rows(cfg)) == cfg.patches:
            return M
        return M - int(cfg.patches / self.cell**2)

    def cells(self, cfg: ViTConfig) -> tuple[int, int]:
        return math.ceil(cfg.grid[0] / self.cell), math.ceil(cfg.grid[1] / self.cell)

    def rows(self, cfg: ViTConfig) -> int:
        """The most that can be left: what is kept, and a row of every cell."""
        return cfg.patches if (K := self.kept(cfg)) >= cfg.patches else min(K + math.prod(self.cells(cfg)), cfg.patches)

    def fewest(self, cfg: ViTConfig, crops: int) -> int:
        K = self.kept(cfg)
        return crops * min(K + 1, cfg.patches)

    def taps(self, cfg: ViTConfig) -> Taps:
        return Taps(q=(cfg.layer(self.layer),), k=(cfg.layer(self.layer),))

    def score(self, seen: Seen, cfg: ViTConfig) -> jax.Array:
        """score_BP of patches."""
        at = cfg.layer(self.layer)
        context_BP = context(seen.q_BSNH[at], seen.k_BSNH[at], self.above)[:, int(cfg.cls) :]
        if not self.entropy:
            return context_BP
        if seen.pixels_BYXC is None:
            raise UserError("the entropy of patches is that of pixels, which are not there; give entropy=0.0")
        return context_BP + self.entropy * jax.nn.softmax(bits(seen.pixels_BYXC, cfg, self.span), axis=1)

    def reduce(self, x_BSD: jax.Array, seen: Seen, cfg: ViTConfig) -> Reduced:
        x, K, P = patches(x_BSD, cfg), self.kept(cfg), cfg.patches
        if K == P:
            return Reduced(x, jnp.broadcast_to(jnp.arange(P), x.shape[:2]))
        score = self.score(seen, cfg)
        rank = jnp.argsort(jnp.argsort(score, axis=1, stable=True), axis=1)  # from the least; of equal ones the earlier goes first
        kept = jnp.sort(jnp.argsort(rank, axis=1)[:, P - K :], axis=1)
        merged = by_cell(x, score, rank < P - K, cell_of(cfg, self.cell), math.prod(self.cells(cfg)))
        rows = jnp.concatenate([jnp.take_along_axis(x, kept[..., None], axis=1), merged.x_BMD], axis=1)
        real = jnp.concatenate([jnp.ones(kept.shape, bool), merged.real_BM], axis=1)  # pyright: ignore[reportArgumentType, reportCallIssue]
        left = in_place(Reduced(rows, jnp.concatenate([kept, merged.place_BM], axis=1), real), P)
        return jax.tree.map(lambda a: a[:, : self.rows(cfg)], left)


def context(q_BSNH: jax.Array, k_BSNH: jax.Array, above: float) -> jax.Array:
    """score_BS: attention, the mean over heads, that rows draw from those which draw more than `above` times the mean of it themselves."""
    logits = scores(q_BSNH, k_BSNH.swapaxes(1, 2), q_BSNH.shape[-1] ** -0.5, 0.0)
    p_BSS = jax.nn.softmax(logits, axis=-1).mean(axis=(1, 2))
    received = p_BSS.mean(axis=1)
    asks = received > above * received.mean(axis=1, keepdims=True)
    asks = asks | (~asks.any(axis=1, keepdims=True) & (jnp.arange(received.shape[1]) == received.argmax(axis=1)[:, None]))
    weight = asks / asks.sum(axis=1, keepdims=True)
    return jnp.einsum("bt,bts->bs", weight, p_BSS, precision="highest")


def bits(pixels_BYXC: jax.Array, cfg: ViTConfig, span: tuple[float, float]) -> jax.Array:
    """entropy_BP of every patch's grey levels, in bits."""
    grey = pixels_BYXC.astype(jnp.float32).mean(axis=3, keepdims=True)
    level = jnp.clip(jnp.round(255 * (grey - span[0]) / (span[1] - span[0])), 0, 255)
    level_BPI = jnp.sort(patches_of(replace(cfg, channels=1), level), axis=2)
    count = jax.vmap(jax.vmap(lambda s: jnp.searchsorted(s, s, side="right") - jnp.searchsorted(s, s)))(level_BPI)
    return math.log2(level_BPI.shape[2]) - jnp.log2(count).mean(axis=2)


def cell_of(cfg: ViTConfig, cell: float) -> np.ndarray:
    """group_P: the cell in which each patch lies, in reading order."""
    y, x = np.divmod(np.arange(cfg.patches), cfg.grid[1])
    return (y // cell * math.ceil(cfg.grid[1] / cell) + x // cell).astype(np.int32)


def by_cell(x_BPD: jax.Array, score_BP: jax.Array, goes_BP: jax.Array, group_P: np.ndarray, groups: int) -> Reduced:
    """One row for the patches of each group that go: their mean by score, at the place of the best; not real where none goes."""
    among_BGP = goes_BP[:, None] & (group_P == np.arange(groups)[:, None])
    weight = jnp.where(among_BGP, score_BP[:, None], 0)
    total = weight.sum(axis=2, keepdims=True)
    weight = jnp.where(total == 0, among_BGP, weight) / jnp.where(total == 0, jnp.maximum(among_BGP.sum(axis=2, keepdims=True), 1), total)
    mean = jnp.einsum("bgp,bpd->bgd", weight, x_BPD.astype(jnp.float32), precision="highest").astype(x_BPD.dtype)
    place = jnp.argmax(jnp.where(among_BGP, score_BP[:, None], -jnp.inf), axis=2)
    return Reduced(mean, place, among_BGP.any(axis=2))


def completed(shares: Sequence[float], cuts: Sequence[int], layers: int, mean: float) -> float:
    """The share that the last cut has to keep so that the decoder's layers hold `mean` of all rows in the mean (VFlowOpt, sec. 3.3).

    shares: of the patches that are left before the decoder, and of what each cut but the last keeps of what it gets. cuts: the layers
    that hold the rows up to each. At most 1. Raises UserError where the other layers hold more than that by themselves.
    """
    if len(shares) != len(cuts) or sorted(cuts) != list(cuts) or not cuts[-1] < layers:
        raise UserError(f"{len(shares)} shares do not fit cuts at {tuple(cuts)} of {layers} layers; give a share a cut, in their order")
    held, spent, below = 1.0, 0.0, 0
    for share, cut in zip(shares, cuts):
        held *= share
        spent, below = spent + held * (cut - below), cut
    last = (mean * layers - spent) / (layers - below) / held
    if last <= 0:
        raise UserError(f"layers below {below} hold more than {mean} of the rows by themselves; give smaller shares")
    return min(last, 1.0)


@dataclass(frozen=True)
class Knob:
    """A number to be found between `low` and `high`."""

    name: str
    low: float
    high: float


# What the released search covers for a quarter of the rows: what is left behind the tower, what the first cut keeps, and three settings.
KNOBS = (
    Knob("budget", 0.25, 0.375),
    Knob("first", 0.2 / 0.375, 1.0),
    Knob("above", 0.0, 50.0),
    Knob("cell", 3.0, 24.0),
    Knob("entropy", -1.0, 1.0),
)


def search(
    objective: Callable[[dict[str, float]], float], knobs: Sequence[Knob] = KNOBS, *, calls: int = 300, first: int = 27, seed: int = 42
) -> tuple[dict[str, float], float]:
    """(settings, value) at which a measured objective was greatest, of `calls` tries.

    In VFlowOpt the objective is the sum, over some prompts, of the cosine between the last token's last hidden row with and without
    pruning; it is the caller's to write. `first` tries are uniform; each later one moves some of the best settings so far, by steps that
    become smaller. The paper models the objective by a Gaussian process instead. What is no number counts as the worst. Raises UserError
    for knobs that cannot turn.
    """
    if calls < 1 or not knobs or any(not k.low < k.high for k in knobs):
        raise UserError(f"{calls} tries of {len(knobs)} knobs find nothing; give at least one try, and knobs with low below high")
    rng = np.random.default_rng(seed)
    low, high = (np.array([getattr(k, end) for k in knobs]) for end in ("low", "high"))
    best, value = None, -math.inf
    for i in range(calls):
        if best is None or i < first:
            point = rng.uniform(low, high)
        else:
            moved = rng.random(len(knobs)) < 1 / len(knobs)
            moved[rng.integers(len(knobs))] = True
            step = (high - low) * 0.3 * 0.1 ** (i / calls)
            point = np.clip(best + moved * rng.normal(size=len(knobs)) * step, low, high)
        got = float(objective({k.name: float(n) for k, n in zip(knobs, point)}))
        if best is None or got > value:
            best, value = point, got if got == got else -math.inf
    assert best is not None
    return {k.name: float(n) for k, n in zip(knobs, best)}, value
