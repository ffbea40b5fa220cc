"""One small supervised ViT that names the digit in a cluttered picture, and what taking its rows away costs.

    python experiments/train_vit.py               # train, release, measure; a run that was stopped goes on
    python experiments/train_vit.py --seed 1      # another seed: measured, not released
    python experiments/train_vit.py --measure     # only measure the released one

A tower of half a million weights, 197 rows a picture of 84 x 84 pixels, learns from pictures of `tokeff.data.canvases` that are made as it
goes: a third with one digit, some with several, the rest full of them. The class row learns which digits a picture has (of the full ones
it does not), and every patch which digit it is of, if any (token labelling, Jiang et al. 2021; its head is thrown away). Digits and
photographs of the test pictures are in no training picture.

What must hold, written before any training, on 600 test pictures with one digit: (1) the digit is named in 75% of them; (2) rows dropped
at random, so that a third of them is left behind the last layer, cost at least 10 points, or the pictures are too easy; (3) ToMe costs
fewer points than dropping at random with as many rows left.

Writes checkpoints/canvas-vit/ and experiments/results/train_vit.json.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.data.canvases import SIDE, Canvases, Look, Task, draw, make, patch_digits, still
from tokeff.data.digits import Material, material
from tokeff.evals.stats import better_than, paired_difference
from tokeff.evals.vision import Score, normal, score_vit
from tokeff.models.fresh import fresh_vit
from tokeff.models.pixels import HALF, Preprocessing
from tokeff.models.transformer import linear
from tokeff.models.vision_save import save_vit
from tokeff.models.vit import classify, encode, finish, pool
from tokeff.models.vit_config import ViTConfig
from tokeff.models.vit_hf import ImageModel, load_vit
from tokeff.recipes import Recipe, learnt, main
from tokeff.reduce.baselines import Pooled, RandomDrop
from tokeff.reduce.merge import Reducer, ToMe, schedule, to_share

NAME, DIGITS = "canvas-vit", 10
CFG = ViTConfig(NAME, D=96, F=288, L=5, N=3, image=(SIDE, SIDE), patch=6, V=DIGITS, act="gelu_tanh", eps=1e-6)
MIX = {"name": 6, "where": 2}  # pictures of each task in a batch, for the class row and the patches
PAGE, PAGES = Task(grid=(4, 4), digits=(8, 12)), 8  # and pictures full of digits, for the patches alone
TEST_SEED, TEST, LEAST, COST = 12345, 600, 0.75, 0.10
RATES = (8, 16, 26)  # rows that every layer takes away; 26 leave a third


@dataclass(frozen=True)
class Training:
    """weight: of patches that are ink, against one that is none. patches: of the loss of patches, against that of the class row."""

    steps: int = 6500
    falls: int = 5000  # steps over which the rate falls
    peak: float = 5e-3
    warm: int = 80
    weight: float = 4.0
    patches: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Labelled:
    """The loss. share_BV: what part of a picture's digits each digit is. digit_BP: of each patch, `DIGITS` for none."""

    cfg: ViTConfig
    how: Training

    def __call__(self, weights: dict[str, Any], frozen: None, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        tower = weights["tower"]
        rows = finish(tower, self.cfg, encode(tower, self.cfg, normal(batch["pixels_BYXC"])).x_BSD)
        logp = jax.nn.log_softmax(classify(tower, pool(tower, self.cfg, rows)))
        few = sum(MIX.values())
        named = -(batch["share_BV"] * logp)[:few].sum(axis=1).mean()
        each = jax.nn.log_softmax(linear(rows[:, 1:], weights["patch_head_VD"]) + weights["patch_bias_V"])
        digit = batch["digit_BP"]
        weight = jnp.where(digit == DIGITS, 1.0, self.how.weight)
        patched = -(weight * jnp.take_along_axis(each, digit[..., None], axis=2)[..., 0]).sum() / weight.sum()
        one = jnp.arange(len(logp)) < MIX["name"]
        hit = (jnp.argmax(logp, axis=1) == jnp.argmax(batch["share_BV"], axis=1)) & one
        return named + self.how.patches * patched, {"named": named, "patched": patched, "right": hit.sum() / one.sum()}


def batch_of(m: Material, seed: int, i: int) -> dict[str, np.ndarray]:
    """Step i's pictures, those with one digit first."""
    at = 1_000_000 * (seed + 1) + i
    made = [make(task, m, n, at) for task, n in MIX.items()]
    rng = np.random.default_rng(at)
    page = still(rng, PAGE, m, PAGES)
    pictures, ink = draw(rng, PAGE, m, page, Look())
    digit = [row[row >= 0] for rows in (*(c.digit_BTM[:, 0] for c in made), page.digit_BM) for row in rows]
    patch = np.concatenate([patch_digits(some, CFG.patch)[:, 0] for some in (*(c.ink_BTYX for c in made), ink)])
    return {
        "pixels_BYXC": np.concatenate([*(c.pictures_BTYXC[:, 0] for c in made), pictures[:, 0]]),
        "share_BV": np.stack([np.bincount(row, minlength=DIGITS) / len(row) for row in digit]).astype(np.float32),
        "digit_BP": np.where(patch < 0, DIGITS, patch).astype(np.int32),
    }


def train(how: Training) -> tuple[ImageModel, list[dict[str, float]]]:
    digits, tower = material("train"), fresh_vit(CFG, how.seed)
    weights = {"tower": tower, "patch_head_VD": jnp.zeros((DIGITS + 1, CFG.D)), "patch_bias_V": jnp.zeros(DIGITS + 1)}
    told = CFG, MIX, PAGE, PAGES, Look()
    weights, seen = learnt(NAME, how, told, weights, None, lambda i: batch_of(digits, how.seed, i), Labelled(CFG, how))
    return ImageModel(CFG, weights["tower"], Preprocessing(exact=CFG.image, mean=HALF[0], std=HALF[1]), NAME), seen


# -- what it is worth


def ways() -> dict[str, tuple[Reducer | None, tuple[int, ...]]]:
    """Name -> (how rows go, how many at each layer)."""
    found: dict[str, tuple[Reducer | None, tuple[int, ...]]] = {"full": (None, ())}
    drops = {f"{r} a layer": schedule(CFG.S, CFG.L, r, 1) for r in RATES}
    drops["a third at once"] = to_share(CFG.S, CFG.L, 1 / 3, 1, at_once=True)
    for name, drop in drops.items():
        for reduce in (ToMe(), Pooled(), RandomDrop()):
            found[f"{type(reduce).__name__}, {name}"] = reduce, drop
    return found


def measured(m: ImageModel, n: int = TEST) -> dict[str, Any]:
    test: Canvases = make("name", material("test"), n, TEST_SEED)
    scores: dict[str, Score] = {name: score_vit(m, test, reduce=reduce, drop=drop) for name, (reduce, drop) in ways().items()}
    full, third = scores["full"], f"{RATES[-1]} a layer"
    found = {}
    for name, score in scores.items():
        lost = paired_difference(full.hits, score.hits)
        found[name] = score.facts() | {"lost": round(lost.value, 4), "lost_low": round(lost.low, 4), "lost_high": round(lost.high, 4)}
    tome, random = (scores[f"{name}, {third}"] for name in ("ToMe", "RandomDrop"))
    held = {
        "named": full.accuracy.value >= LEAST,
        "random costs": full.accuracy.value - random.accuracy.value >= COST,
        "ToMe costs less": better_than(tome.hits, random.hits).better,
    }
    return {"test": found, "held": held}


RECIPE = Recipe(
    script=Path(__file__), about=__doc__ or "", name=NAME, how=Training(), batch=(sum(MIX.values()) + PAGES, "pictures"), train=train,
    save=save_vit, load=load_vit, measured=measured,
    facts=lambda m: {"look": asdict(Look()), "weights": sum(x.size for x in jax.tree.leaves(m.params))},
    accuracy=lambda found: found["test"]["full"], thresholds={"named": LEAST, "random costs": COST}, curve=("named", "patched", "right"),
)  # fmt: skip

if __name__ == "__main__":
    main(RECIPE)
