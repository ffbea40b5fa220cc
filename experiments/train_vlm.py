"""One small LLaVA that answers questions about cluttered pictures, pairs and clips, and what taking rows of its pictures away costs.

    python experiments/train_vlm.py               # train behind checkpoints/canvas-vit, release, measure; a stopped run goes on
    python experiments/train_vlm.py --seed 1      # another seed: measured, not released
    python experiments/train_vlm.py --measure     # only measure the released one

The tower is that of experiments/train_vit.py and stays as it is, as in LLaVA-1.5 (Liu et al. 2023); its last layer but one gives 196 rows a
picture. A projector and a Llama of three layers learn from pictures of `tokeff.data.canvases` that are made as they go. Pictures go in as
LLaVA-OneVision's: larger ones as a thumbnail and four crops, clips of eight frames at half the height and width, pairs in one prompt.

What must hold, written before any training, on 300 test examples a task (100 of scan and clips): (1) answers are right, in the mean over
the tasks, in 45% (at random it would be about 13%); (2) a third of the patches, drawn at random, loses at least 10 points on single
pictures (name, where, count, row) in the mean, or the pictures are too easy.

Writes checkpoints/canvas-llava/ and experiments/results/train_vlm.json.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from tokeff.data.canvases import SIDE, TASKS, WORDS, Look, make
from tokeff.data.digits import Material, material
from tokeff.errors import UserError
from tokeff.evals.stats import paired_difference
from tokeff.evals.vision import answer_logits, asked, picture_vectors, score_llava, shape_of
from tokeff.models.config import Config, Params, Precision
from tokeff.models.fresh import fresh_decoder, fresh_projector
from tokeff.models.llava import Llava, LlavaConfig
from tokeff.models.llava_hf import load_llava
from tokeff.models.llava_rows import fit
from tokeff.models.load import Model
from tokeff.models.tokenizer import Tokenizer
from tokeff.models.vision_save import save_llava
from tokeff.models.vit_config import ViTParams
from tokeff.models.vit_hf import ImageModel, load_vit
from tokeff.recipes import Recipe, learnt, main
from tokeff.reduce.video import FastVID, FramePairs, HoliTom
from tokeff.reduce.visual import DivPrune, FasterVLM, HiPrune, Picked
from tokeff.reduce.visual_baselines import PooledPatches, RandomPatches
from tokeff.reduce.visual_merge import PruMerge, VisionZip

TOWER = Path(__file__).parents[1] / "checkpoints" / "canvas-vit"
NAME = "canvas-llava"
SPECIAL = ("<pad>", "<eos>", "<image>", "<video>")
SINGLE, CLIPS = ("name", "where", "count", "row"), ("order", "motion")
LONG = ("scan", *CLIPS)
MIX = ({"name": 3, "where": 7, "count": 7, "row": 7}, {"pair": 4}, {"order": 1, "motion": 1}, {"scan": 1})
"""Examples of each task in a batch; those that go through the network together."""
TEST_SEED, TEST, FEW, LEAST, COST = 54321, 300, 100, 0.45, 0.10


@dataclass(frozen=True)
class Training:
    steps: int = 1800
    falls: int = 600  # steps over which the rate falls
    peak: float = 5e-3
    warm: int = 50
    seed: int = 0


def words() -> Tokenizer:
    """A token a word."""
    raw = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate((*SPECIAL, *WORDS))}, unk_token=SPECIAL[0]))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens(list(SPECIAL))
    return Tokenizer(raw, len(SPECIAL) + len(WORDS), special={"pad_token": SPECIAL[0], "eos_token": SPECIAL[1]})


def fresh(m: ImageModel, seed: int) -> Llava:
    """The tower in front of a projector and a decoder that know nothing yet."""
    tok = words()
    text = Config(NAME, V=tok.V, D=96, F=192, L=3, N=3, K=3, H=32, max_len=4096, eos=(1,))
    canvases = ((SIDE, 2 * SIDE), (2 * SIDE, SIDE), (2 * SIDE, 2 * SIDE))
    cfg = LlavaConfig(m.cfg, 2, (m.cfg.L - 2,), canvases=canvases, most=9, video=3)
    decoder = Model(text, fresh_decoder(text, seed), tok, Precision(), NAME)
    return Llava(cfg, fresh_projector(cfg, m.params, text.D, seed + 1), decoder, m.preprocessing, NAME)


def weights_of(v: Llava) -> dict[str, Any]:
    """What is trained: all but the tower."""
    return {"front": v.params.replace(tower=None), "text": v.text.params}


def taught(v: Llava, weights: dict[str, Any], tower: ViTParams) -> Llava:
    text = Model(v.text.cfg, weights["text"], v.text.tokenizer, v.text.precision, v.name)
    return Llava(v.cfg, weights["front"].replace(tower=tower), text, v.preprocessing, v.name)


@dataclass(frozen=True)
class Answered:
    """The loss: cross-entropy of the tokens of all answers. A batch is a list of groups; each group's kind of task and marks are static."""

    cfg: LlavaConfig
    text: Config
    groups: tuple[tuple[str, tuple[int, ...]], ...]

    def __call__(self, weights: dict[str, Any], tower: ViTParams, batch: list[dict[str, jax.Array]]):
        params: Params = weights["text"]
        v = Llava(self.cfg, weights["front"].replace(tower=tower), Model(self.text, params, None, Precision(), NAME), None, NAME)
        loss, n, figures = jnp.float32(0), jnp.float32(0), {}
        for (task, marks), some in zip(self.groups, batch, strict=True):
            pictured = picture_vectors(v, task, some["crops"], None)
            logits, ids, there = answer_logits(params, self.text, pictured, some["tokens"], some["length"], some["answer"], marks)
            logp = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], axis=2)[..., 0]
            loss, n = loss - jnp.where(there, logp, 0.0).sum(), n + there.sum()
            hits = ((jnp.argmax(logits, axis=2) == ids) | ~there).all(axis=1)
            figures[task] = hits.mean()
        return loss / n, figures


def batch_of(v: Llava, m: Material, seed: int, i: int) -> tuple[list[dict[str, np.ndarray]], Any]:
    """(step i's groups, what of them is static)."""
    batch, static = [], []
    for group in MIX:
        made = [asked(v, make(task, m, n, 1_000_000 * (seed + 11) + i)) for task, n in group.items()]
        names = {"crops": "crops_BTYXC", "tokens": "tokens_BS", "length": "length_B", "answer": "answer_B"}
        batch.append({name: np.concatenate([getattr(a, field) for a in made]) for name, field in names.items()})
        static.append((made[0].task, made[0].marks))
    return batch, tuple(static)


def train(how: Training) -> tuple[Llava, list[dict[str, float]]]:
    m, digits = load_vit(TOWER), material("train")
    v = fresh(m, how.seed)
    check(v, digits)
    loss = Answered(v.cfg, v.text.cfg, batch_of(v, digits, how.seed, 0)[1])
    told = v.cfg, v.text.cfg, MIX, Look(), fingerprint(m)
    weights, seen = learnt(NAME, how, told, weights_of(v), m.params, lambda i: batch_of(v, digits, how.seed, i)[0], loss)
    return taught(v, weights, m.params), seen


def fingerprint(m: ImageModel) -> str:
    """A short hash of the tower's weights."""
    h = hashlib.sha256()
    for x in jax.tree.leaves(m.params):
        h.update(np.asarray(x, np.float32).tobytes())
    return h.hexdigest()[:12]


# -- what it is worth

THIRD, NINTH = 65, 22  # of 196 patches
WAYS: dict[str, Picked | None] = {
    "full": None,
    "RandomPatches, a third": RandomPatches(THIRD),
    "PooledPatches, a third": PooledPatches((8, 8)),
    "FasterVLM, a third": FasterVLM(THIRD),
    "DivPrune, a third": DivPrune(THIRD),
    "HiPrune, a third": HiPrune(THIRD, middle=2),
    "VisionZip, a third": VisionZip(THIRD - 10, 10),
    "PruMerge, a third": PruMerge(THIRD - 1, layer=-2),
    "RandomPatches, a ninth": RandomPatches(NINTH),
    "PooledPatches, a ninth": PooledPatches((5, 4)),
    "FasterVLM, a ninth": FasterVLM(NINTH),
    "DivPrune, a ninth": DivPrune(NINTH),
}
WAYS_LONG = {name: WAYS[name] for name in ("full", "RandomPatches, a third", "PooledPatches, a third", "FasterVLM, a third")}
FRAME = 16  # of the 49 rows that a frame of a clip has
WAYS_CLIPS: dict[str, Picked | None] = {
    "full": None,
    "RandomPatches, a third": RandomPatches(FRAME),
    "PooledPatches, a third": PooledPatches((4, 4)),
    "FasterVLM, a third": FasterVLM(FRAME),
    "HoliTom, a third": HoliTom(0.33),
    "FastVID, a third": FastVID(0.33),
    "FramePairs, a half": FramePairs(2),
}


def ways(task: str) -> dict[str, Picked | None]:
    """What is tried on a task."""
    return WAYS_CLIPS if task in CLIPS else WAYS_LONG if task in LONG else WAYS


def check(v: Llava, digits: Material) -> None:
    """UserError for a way that does not fit its task, before anything is trained."""
    for task in TASKS:
        crops = asked(v, make(task, digits, 1, TEST_SEED)).crops_BTYXC.shape[1]
        for way in ways(task).values():
            if way is not None:
                fit(v, *shape_of(v, task, crops), way)


def measured(v: Llava, n: int = TEST) -> dict[str, Any]:
    """Every way on every task: facts by task and way, and which thresholds held."""
    digits, scores = material("test"), {}
    for task in TASKS:
        given = make(task, digits, FEW if task in LONG else n, TEST_SEED)
        for name, way in ways(task).items():
            scores[task, name] = score_llava(v, given, reduce=way, batch=10 if task in LONG else 25)
            print(task, name, scores[task, name].accuracy, file=sys.stderr)
    found: dict[str, Any] = {task: {} for task in TASKS}
    for (task, name), score in scores.items():
        lost = paired_difference(scores[task, "full"].hits, score.hits)
        found[task][name] = score.facts() | {"lost": round(lost.value, 4), "lost_low": round(lost.low, 4), "lost_high": round(lost.high, 4)}
    full = float(np.mean([scores[task, "full"].accuracy.value for task in TASKS]))
    random = float(np.mean([found[task]["RandomPatches, a third"]["lost"] for task in SINGLE]))
    held = {"right": full >= LEAST, "random costs": random >= COST}
    return {"test": found, "held": held, "mean": round(full, 4), "random costs": round(random, 4)}


def ready() -> None:
    if not TOWER.is_dir():
        raise UserError(f"there is no tower in {TOWER}; train it first, with experiments/train_vit.py")


RECIPE = Recipe(
    script=Path(__file__), about=__doc__ or "", name=NAME, how=Training(), batch=(sum(sum(g.values()) for g in MIX), "examples"),
    train=train, save=save_llava, load=load_llava, measured=measured,
    facts=lambda v: {"look": asdict(Look()), "weights": sum(x.size for x in jax.tree.leaves((v.params, v.text.params)))},
    accuracy=lambda found: {task: ways["full"] for task, ways in found["test"].items()},
    thresholds={"right": LEAST, "random costs": COST}, ready=ready,
)  # fmt: skip

if __name__ == "__main__":
    main(RECIPE)
