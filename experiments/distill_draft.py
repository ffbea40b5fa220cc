"""One small draft model for SmolLM2, distilled from the target's own words: two trained layers under the target's embedding and head.

    python experiments/distill_draft.py              # all of it; what was made before is read, an interrupted run goes on
    python experiments/distill_draft.py --try        # which of the target's layers to begin as
    python experiments/distill_draft.py --measure    # only the acceptance of the released draft

The target continues short openings (Persuasion, standard library files that no evaluation reads, chat requests by wording and subject,
requests about sentences of Persuasion), a third of them greedily, a third at temperature .6, a third at 1, and tells the 64 most likely
successors of every place. The student is two of its layers; its loss is KL(target || student) with all other tokens as one. Their sum
of exponentials is exact for the 4096 tokens that are likeliest over all lessons and estimated from 1024 of the others, drawn anew in
every step. The target stays as it is.

Openings that the lessons leave out measure the acceptance: the share of greedy passes in which a draft is right, by its place in a chain of
four. So do prompts of the evaluation. Writes checkpoints/smollm2-135m-draft/ and experiments/results/distill_draft.json.

Expected: 1.45 tokens a pass on held-out openings, 1.27 on prompts of the evaluation, after half an hour on two busy cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

import tokeff
from tokeff.data.openings import KINDS, LONGEST, openings
from tokeff.decode import distill
from tokeff.decode.distill import Learning, Lessons
from tokeff.decode.draft_model import DraftModel
from tokeff.decode.sample import Sampling
from tokeff.errors import UserError, one_line
from tokeff.evals.comparison import compile_cache
from tokeff.evals.continuations import CLASSES, ids, of_class
from tokeff.generation import Setup, go, new_tokens, pad, read, start
from tokeff.models.borrow import is_layers, load_layers, save_layers
from tokeff.models.fetch import cache_dir
from tokeff.models.load import Model, fingerprint
from tokeff.report.environment import describe

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results" / "distill_draft.json"
MODEL, NAME, CHAIN, NEW = "smollm2-135m", "smollm2-135m-draft", 4, 64
HELD, EACH = 4, 2  # held-out openings of each kind and prompts of each class of the evaluation, for acceptance
CHOICES = ((0, 1), (0, 29), (28, 29))
Figures = list[float]  # of one step: loss, agreement, seconds


@dataclass(frozen=True)
class Lesson:
    """What the target writes and says. Batch i continues openings of kind i modulo 4; its rows go through the temperatures."""

    batches: int = 8
    rows: int = 64
    new: int = 96
    rank: int = 64
    temperatures: tuple[float, ...] = (0.0, 0.6, 1.0)
    held_out: int = 8  # openings of each kind that are not continued here
    seed: int = 0


@dataclass(frozen=True)
class Training:
    """How the student learns: it begins as these layers of the target. The rate falls over the last `decay` steps; until then a run may go
    on with another number of epochs. `save` steps are lost at most."""

    layers: tuple[int, ...] = (0, 1)
    epochs: int = 2
    rows: int = 8
    peak: float = 2e-3
    decay: int = 32
    common: int = 4096
    drawn: int = 1024
    save: int = 32
    seed: int = 0


# -- the target


def folder(m: Model, what: Lesson) -> Path:
    """Where what this model said under these settings is kept; the number of batches may grow."""
    told = hashlib.sha256(json.dumps([fingerprint(m), asdict(replace(what, batches=0))]).encode()).hexdigest()[:12]
    return cache_dir() / "distill" / f"{m.name}-{told}"


def teach(m: Model, what: Lesson) -> list[Lessons]:
    """All batches of lessons; those that are on disk are read."""
    where, found = folder(m, what), []
    where.mkdir(parents=True, exist_ok=True)
    how = Sampling(tuple(what.temperatures[i % len(what.temperatures)] for i in range(what.rows)))
    given = {kind: openings(kind, m.tok, what.seed)[what.held_out :] for kind in KINDS}
    for i in tqdm(range(what.batches), desc="the target writes", disable=None):
        if not (file := where / f"{i:03}.npz").exists():
            turn, kind = divmod(i, len(KINDS))
            some = given[KINDS[kind]][turn * what.rows : (turn + 1) * what.rows]
            if len(some) < what.rows:
                raise UserError(f"openings of kind {KINDS[kind]!r} are enough for {i} batches; ask for no more with --batches")
            write(file, distill.lessons(m, *pad(some, LONGEST), what.new, how, what.seed * 1000 + i, what.rank))
        with np.load(file) as stored:
            found.append(Lessons(**{name: stored[name] for name in stored.files}))
    return found


def write(file: Path, made: Lessons) -> None:
    """Whole or not at all."""
    part = file.with_suffix(".part.npz")
    arrays = {name: np.asarray(x) for name, x in vars(made).items()}
    np.savez(part, **arrays | {"id_BSY": arrays["id_BSY"].astype(np.uint16)})
    os.replace(part, file)


# -- the student


class Rows:
    """Lessons one by one, for grain."""

    def __init__(self, given: list[Lessons]):
        self.all = jax.tree.map(lambda *x: np.concatenate(x), *given)

    def __len__(self) -> int:
        return len(self.all.known_B)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: x[index] for name, x in vars(self.all).items()}


def batches(given: list[Lessons], how: Training) -> grain.MapDataset:
    """Every lesson once an epoch, in a new order each time."""
    return grain.MapDataset.source(Rows(given)).seed(how.seed).shuffle().repeat(how.epochs).batch(how.rows, drop_remainder=True)


def learn(m: Model, given: list[Lessons], how: Training, where: Path) -> tuple[Model, list[Figures]]:
    """(the student when it has learnt, the figures of every step), from the last checkpoint on. Those from before the rate falls serve
    runs of any length."""
    data, d = batches(given, how), distill.student(m, how.layers, NAME)
    steps, falls = len(data), max(len(data) - how.decay, 0)
    common = distill.common_ids(given, m.cfg.V, how.common)
    optimiser = distill.schedule(how.peak, steps, decay=how.decay)
    take = partial(distill.step, cfg=d.cfg, optimiser=optimiser, common=how.common)
    told = hashlib.sha256(repr((replace(how, epochs=0, decay=0), len(data) // how.epochs)).encode()).hexdigest()[:12]
    steady, falling = kept(where / f"student-{told}"), kept(where / f"student-{told}-{steps}-{how.decay}")
    state, seen = restored(distill.begin_learning(d, optimiser), steady, falling, falls)
    for i in (shown := tqdm(range(len(seen), steps), desc="the student learns", disable=None, initial=len(seen), total=steps)):
        begun = time.perf_counter()
        state, figures = take(state, d.params, Lessons(**data[i]), drawn(common, m.cfg.V, how, i))
        seen.append([*map(float, figures), time.perf_counter() - begun])
        shown.set_postfix(loss=f"{seen[-1][0]:.3f}", agree=f"{seen[-1][1]:.2f}")
        if (i + 1) % how.save == 0 or i + 1 in (falls, steps):
            into = steady if i < falls else falling
            now = {"steps": list(seen)}  # written later, when there are more
            all_ = ocp.args.Composite(state=ocp.args.StandardSave(state), seen=ocp.args.JsonSave(now))
            into.save(i + 1, args=all_, force=True)
    for manager in (steady, falling):
        manager.close()
    return replace(d, params=distill.taught(d.params, state.weights)), seen


def kept(where: Path) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(where, options=ocp.CheckpointManagerOptions(max_to_keep=3))


def restored(state: Learning, steady: ocp.CheckpointManager, falling: ocp.CheckpointManager, falls: int) -> tuple[Learning, list[Figures]]:
    """The last checkpoint that a run of this length may go on from; `state` where there is none."""
    found = [(i, falling) for i in falling.all_steps()] or [(i, steady) for i in steady.all_steps() if i <= falls]
    if not found:
        return state, []
    last, manager = max(found, key=lambda pair: pair[0])
    saved = manager.restore(last, args=ocp.args.Composite(state=ocp.args.StandardRestore(state), seen=ocp.args.JsonRestore()))
    return saved["state"], saved["seen"]["steps"]


def drawn(common: np.ndarray, V: int, how: Training, i: int) -> jax.Array:
    """The tokens whose logits step i computes."""
    return jnp.asarray(distill.drawn_ids(common, V, how.drawn, np.random.default_rng([how.seed, i])))


# -- what it is worth


@dataclass(frozen=True)
class Chains:
    """Prompts decoded greedily pass by pass. count_PB: tokens that each pass committed, 0 where a limit or the end cut it."""

    count_PB: np.ndarray
    made_B: np.ndarray
    passes_B: np.ndarray
    same_B: np.ndarray

    def figures(self, at: slice) -> dict[str, Any]:
        """Of some prompts. mat: committed tokens a pass. reached[i]: the share of passes in which draft i and all before it were right;
        right[i]: the same, of those passes that reached it. same: texts that are plain decoding's."""
        count = self.count_PB[:, at]
        reached = [int((count > i).sum()) for i in range(CHAIN + 1)]
        return {
            "prompts": len(self.same_B[at]), "passes": reached[0], "mat": round(float(self.made_B[at].sum() / self.passes_B[at].sum()), 3),
            "right": [round(b / max(a, 1), 3) for a, b in zip(reached, reached[1:])],
            "reached": [round(x / max(reached[0], 1), 3) for x in reached[1:]], "same": int(self.same_B[at].sum()),
        }  # fmt: skip


def chains(m: Model, drafter: DraftModel, prompts: list[list[int]]) -> Chains:
    drafted, plain, counts = Setup(decode=drafter), Setup(), []
    prompt = read(m, prompts, drafted)
    s = start(m, prompt, drafted, NEW, eos=m.cfg.eos)
    while not bool(s.done_B.all()):
        s = go(m, s, drafted, 1, m.cfg.eos)
        counts.append(np.where(np.asarray(s.done_B), 0, np.asarray(s.accepted.count_B)))
    alone = new_tokens(go(m, start(m, prompt, plain, NEW, eos=m.cfg.eos), plain, NEW, m.cfg.eos))
    texts = new_tokens(s)
    made, same = np.array([len(text) - 1 for text in texts]), np.array([a == b for a, b in zip(texts, alone, strict=True)])
    return Chains(np.stack(counts), made, np.asarray(s.passes_B), same)


def measure(m: Model, d: Model, what: Lesson) -> dict[str, Any]:
    """Acceptance on openings that were held out, kind by kind, and on the first prompts of each class of the evaluation."""
    m, drafter = m.attach(draft=d.params), DraftModel(d.cfg, CHAIN)
    sets = {
        "held out": {kind: openings(kind, m.tok, what.seed)[: min(HELD, what.held_out)] for kind in KINDS},
        "evaluation": {name: [ids(m, p) for p in of_class(name)[:EACH]] for name in CLASSES},
    }
    found = {}
    for name, groups in sets.items():
        made, at = chains(m, drafter, [row for rows in groups.values() for row in rows]), 0
        found[name] = made.figures(slice(None))
        for kind, rows in groups.items():
            found[f"{name}: {kind}"], at = made.figures(slice(at, at + len(rows))), at + len(rows)
    return found


# -- the release


def tried(m: Model, given: list[Lessons], how: Training, where: Path) -> dict[str, Any]:
    """(loss, agreement) over the last quarter of one short epoch, for each choice of layers to begin as."""
    found = {}
    for layers in CHOICES:
        _, seen = learn(m, given, replace(how, layers=layers, epochs=1), where)
        found[str(list(layers))] = [round(float(x), 4) for x in np.mean(seen[-len(seen) // 4 :], axis=0)[:2]]
        print(layers, found[str(list(layers))], file=sys.stderr)
    return found


def about(what: Lesson, how: Training, given: list[Lessons], seen: list[Figures]) -> dict[str, Any]:
    """What there is to know of the recipe. tokens: the places that lessons told of."""
    return {
        "recipe": {"script": "experiments/distill_draft.py", "lesson": asdict(what), "training": asdict(how)}, "seed": how.seed,
        "tokens": sum(int(np.sum(x.known_B)) for x in given), "steps": len(seen), "train_seconds": round(sum(x[2] for x in seen)),
        "loss": {"first": round(seen[0][0], 3), "last": round(float(np.mean([x[0] for x in seen[-16:]])), 3)},
        "agree": {"first": round(seen[0][1], 3), "last": round(float(np.mean([x[1] for x in seen[-16:]])), 3)},
        "licence": "Apache-2.0, as SmolLM2-135M-Instruct, of whose layers it is made",
    }  # fmt: skip


def release(out: Path, m: Model, d: Model, what: Lesson, how: Training, facts: dict[str, Any]) -> dict[str, Any]:
    """The folder, measured with the weights as they are rounded in it, in the place of the last one."""
    new = out.with_name(f".{out.name}-new")
    shutil.rmtree(new, ignore_errors=True)
    d = load_layers(save_layers(new, d, how.layers, m, {}), m)
    shutil.rmtree(new)
    found = measure(m, d, what)
    save_layers(new, d, how.layers, m, facts | {"acceptance": {name: found[name] for name in ("held out", "evaluation")}})
    shutil.rmtree(out, ignore_errors=True)
    os.replace(new, out)
    return found


def run(what: Lesson, how: Training, out: Path, stage: str) -> None:
    m = tokeff.load(MODEL)
    result = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if stage == "measure":
        if not is_layers(out):
            raise UserError(f"no released draft in {out}; make it first, without --measure")
        result["acceptance"] = measure(m, load_layers(out, m), what)
    elif stage == "try":
        result["tried"] = tried(m, teach(m, replace(what, batches=len(KINDS))), how, folder(m, what))
    else:
        given = teach(m, what)
        d, seen = learn(m, given, how, folder(m, what))
        facts = about(what, how, given, seen)
        result |= {"acceptance": release(out, m, d, what, how, facts), **facts, "curve": [[round(x, 4) for x in row[:2]] for row in seen]}
    result["environment"] = describe([]) | {"command": " ".join(["python experiments/distill_draft.py", *sys.argv[1:]])}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["tried"] if stage == "try" else result["acceptance"], indent=1))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("--batches", type=int, default=Lesson.batches, help="of 64 openings that the target continues (default: %(default)s)")
    p.add_argument("--epochs", type=int, default=Training.epochs, help="passes of the student over them (default: %(default)s)")
    p.add_argument("--decay", type=int, default=Training.decay, help="last steps over which the rate falls (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the openings, the target's draws and the training")
    p.add_argument("--out", type=Path, default=ROOT / "checkpoints" / NAME, help="the folder that is written (default: %(default)s)")
    stage = p.add_mutually_exclusive_group()
    stage.add_argument("--measure", dest="stage", action="store_const", const="measure", help="only the acceptance of the folder")
    stage.add_argument("--try", dest="stage", action="store_const", const="try", help="only which layers to begin as, on a short run")
    known = p.parse_args()
    compile_cache()
    try:
        if min(known.batches, known.epochs) < 1 or min(known.decay, known.seed) < 0:
            raise UserError("batches and epochs must be at least 1, decay and seed at least 0")
        what = Lesson(batches=known.batches, seed=known.seed)
        how = Training(epochs=known.epochs, decay=known.decay, seed=known.seed)
        run(what, how, known.out, known.stage or "all")
    except (UserError, KeyboardInterrupt) as error:
        said, code = one_line(error) or (str(error), 1)
        sys.exit(print(f"error: {said}", file=sys.stderr) or code)


if __name__ == "__main__":
    main()
