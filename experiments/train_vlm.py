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

import argparse
import hashlib
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from tokeff.data.canvases import SIDE, TASKS, WORDS, Look, make
from tokeff.data.digits import Material, material
from tokeff.errors import UserError, one_line
from tokeff.evals.comparison import compile_cache
from tokeff.evals.stats import paired_difference
from tokeff.evals.vision import answer_logits, asked, picture_vectors, score_llava
from tokeff.models.config import Config, Params, Precision
from tokeff.models.fetch import cache_dir
from tokeff.models.fresh import fresh_decoder, fresh_projector
from tokeff.models.llava import Llava, LlavaConfig
from tokeff.models.llava_hf import load_llava
from tokeff.models.load import Model
from tokeff.models.tokenizer import Tokenizer
from tokeff.models.vision_save import save_llava
from tokeff.models.vit_config import ViTParams
from tokeff.models.vit_hf import ImageModel, load_vit
from tokeff.reduce.visual import DivPrune, FasterVLM, HiPrune, Picked
from tokeff.reduce.visual_baselines import PooledPatches, RandomPatches
from tokeff.reduce.visual_merge import PruMerge, VisionZip
from tokeff.report.environment import describe
from tokeff.training import adamw, lately, learn

ROOT = Path(__file__).parents[1]
RESULTS, TOWER = ROOT / "experiments" / "results" / "train_vlm.json", ROOT / "checkpoints" / "canvas-vit"
NAME = "canvas-llava"
SPECIAL = ("<pad>", "<eos>", "<image>", "<video>")
SINGLE, LONG = ("name", "where", "count", "row"), ("scan", "order", "motion")
MIX = ({"name": 3, "where": 7, "count": 7, "row": 7}, {"pair": 4}, {"order": 1, "motion": 1}, {"scan": 1})
"""Examples of each task in a batch; those that go through the network together."""
TEST_SEED, TEST, FEW, LEAST, COST = 54321, 300, 100, 0.45, 0.10


@dataclass(frozen=True)
class Training:
    steps: int = 1800
    falls: int = 600  # steps over which the rate falls
    peak: float = 2e-3
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
    told = hashlib.sha256(repr((replace(how, steps=0, falls=0), v.cfg, v.text.cfg, MIX, Look(), fingerprint(m))).encode()).hexdigest()[:12]
    falls, loss = max(how.steps - how.falls, 0), Answered(v.cfg, v.text.cfg, batch_of(v, digits, how.seed, 0)[1])
    where, optimiser = cache_dir() / "training" / f"{NAME}-{told}", adamw(how.peak, how.steps, how.warm, falls)
    weights = weights_of(v)
    weights, seen = learn(weights, m.params, lambda i: batch_of(v, digits, how.seed, i)[0], loss, optimiser, how.steps, falls, where)
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
WAYS_LONG = ("full", "RandomPatches, a third", "PooledPatches, a third", "FasterVLM, a third")


def measured(v: Llava, n: int = TEST) -> dict[str, Any]:
    """Every way on every task: facts by task and way, and which thresholds held."""
    digits, scores = material("test"), {}
    for task in TASKS:
        given = make(task, digits, FEW if task in LONG else n, TEST_SEED)
        for name in WAYS_LONG if task in LONG else WAYS:
            scores[task, name] = score_llava(v, given, reduce=WAYS[name], batch=10 if task in LONG else 25)
            print(task, name, scores[task, name].accuracy, file=sys.stderr)
    found: dict[str, Any] = {task: {} for task in TASKS}
    for (task, name), score in scores.items():
        lost = paired_difference(scores[task, "full"].hits, score.hits)
        found[task][name] = score.facts() | {"lost": round(lost.value, 4), "lost_low": round(lost.low, 4), "lost_high": round(lost.high, 4)}
    full = float(np.mean([scores[task, "full"].accuracy.value for task in TASKS]))
    random = float(np.mean([found[task]["RandomPatches, a third"]["lost"] for task in SINGLE]))
    held = {"right": full >= LEAST, "random costs": random >= COST}
    return {"test": found, "held": held, "mean": round(full, 4), "random costs": round(random, 4)}


def release(out: Path, v: Llava, facts: dict[str, Any]) -> dict[str, Any]:
    """The folder, measured with the weights as they are rounded in it, in the place of the last one."""
    new = out.with_name(f".{out.name}-new")
    shutil.rmtree(new, ignore_errors=True)
    found = measured(load_llava(save_llava(new, v, {})))
    shutil.rmtree(new)
    save_llava(new, v, facts | {"accuracy": {task: ways["full"] for task, ways in found["test"].items()}})
    shutil.rmtree(out, ignore_errors=True)
    os.replace(new, out)
    return found


def run(how: Training, out: Path, only: bool) -> None:
    result = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"seeds": {}}
    if only:
        found = measured(load_llava(out))
        result["seeds"][str(how.seed)] |= found
    else:
        v, seen = train(how)
        facts = {
            "recipe": {"script": "experiments/train_vlm.py", **asdict(how)}, "steps": len(seen),
            "examples": len(seen) * sum(sum(group.values()) for group in MIX), "train_seconds": round(sum(row["seconds"] for row in seen)),
            "last": lately(seen), "look": asdict(Look()), "weights": sum(x.size for x in jax.tree.leaves((v.params, v.text.params))),
        }  # fmt: skip
        found = release(out, v, facts)
        curve = [[round(x, 4) for k, x in row.items() if k != "seconds"] for row in seen[::10]]
        result["seeds"][str(how.seed)] = {**facts, **found, "curve": curve}
    result["thresholds"] = {"right": LEAST, "random costs": COST}
    result["environment"] = describe([]) | {"command": " ".join(["python experiments/train_vlm.py", *sys.argv[1:]])}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("--steps", type=int, default=Training.steps, help="of 31 examples (default: %(default)s)")
    p.add_argument("--falls", type=int, default=Training.falls, help="last steps over which the rate falls (default: %(default)s)")
    p.add_argument("--peak", type=float, default=Training.peak, help="highest learning rate (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the weights and pictures; 0 is the one that is released")
    p.add_argument("--out", type=Path, help=f"folder that is written (default: checkpoints/{NAME}; for seeds above 0 one in the cache)")
    p.add_argument("--measure", action="store_true", help="only measure the folder")
    known = p.parse_args()
    compile_cache()
    try:
        if min(known.steps, known.falls) < 1 or known.seed < 0 or known.peak <= 0:
            raise UserError("steps and falls must be at least 1, the seed at least 0 and the rate above 0")
        if not TOWER.is_dir():
            raise UserError(f"there is no tower in {TOWER}; train it first, with experiments/train_vit.py")
        released = ROOT / "checkpoints" / NAME if not known.seed else cache_dir() / "training" / f"{NAME}-seed{known.seed}"
        run(Training(steps=known.steps, falls=known.falls, peak=known.peak, seed=known.seed), known.out or released, known.measure)
    except (UserError, KeyboardInterrupt) as error:
        said, code = one_line(error) or (str(error), 1)
        sys.exit(print(f"error: {said}", file=sys.stderr) or code)


if __name__ == "__main__":
    main()
