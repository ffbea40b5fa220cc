"""What recipes that train small models share: an optimiser, a step, batches made ahead, and checkpoints that a stopped run goes on from."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
import optax.contrib
import orbax.checkpoint as ocp
from flax import struct
from optax.contrib import MuonDimensionNumbers
from tqdm import tqdm

from tokeff.sharding import letters

T = TypeVar("T")
Loss = Callable[[Any, Any, Any], tuple[jax.Array, dict[str, jax.Array]]]  # (weights, frozen, batch) -> (loss, figures)


class Learning(struct.PyTreeNode):
    """What training changes: the weights, the optimiser's state, and how many steps were taken."""

    weights: Any
    optimiser: Any
    step: jax.Array


def optimiser(peak: float, steps: int, warm: int, falls: int, decay: float = 0.05) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024; updates scaled to the size of Adam's, Liu et al. 2025) for the matrices of blocks; for all else AdamW
    (Loshchilov & Hutter 2019; betas .9 and .98, with Nesterov's momentum) at two fifths of the rate. All weights decay, norms of gradients
    are cut at 1. The rate rises for `warm` steps, stays, and falls to zero with a cosine from step `falls` on: before
    that a run may be made longer or shorter."""

    def rate(peak: float) -> optax.Schedule:
        falling = optax.cosine_decay_schedule(peak, max(steps - falls, 1))
        parts = (optax.linear_schedule(peak / 50, peak, warm), optax.constant_schedule(peak), falling)
        return optax.join_schedules(parts, [warm, max(falls, warm)])

    muon = optax.contrib.muon(
        rate(peak), weight_decay=decay, adam_b2=0.98, adam_weight_decay=decay, adam_learning_rate=rate(0.4 * peak),
        muon_weight_dimension_numbers=sides, consistent_rms=0.2,
    )  # fmt: skip
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def sides(weights: Any) -> Any:
    """Which axes of each array are a matrix's inputs and outputs, None for arrays that are none of a block. Rows of width D are its one
    side, as its letters say: of q_NHD they come in, of o_DNH they go out."""

    def of(path: tuple[Any, ...], x: jax.Array) -> MuonDimensionNumbers | None:
        names = [getattr(key, "name", "") for key in path]
        if x.ndim < 2 or "blocks" not in names:
            return None
        axes = tuple(range(x.ndim))
        return MuonDimensionNumbers(axes[1:], axes[:1]) if letters(names[-1])[0] == "D" else MuonDimensionNumbers(axes[-1:], axes[:-1])

    return jax.tree_util.tree_map_with_path(of, weights)


@partial(jax.jit, static_argnames=("loss", "optimiser"), donate_argnames="state")
def step(state: Learning, frozen: Any, batch: Any, *, loss: Loss, optimiser: Any) -> tuple[Learning, dict[str, jax.Array]]:
    """One step: (what was learnt, figures before it with the loss among them)."""
    (value, figures), grads = jax.value_and_grad(loss, has_aux=True)(state.weights, frozen, batch)
    updates, inner = optimiser.update(grads, state.optimiser, state.weights)
    weights: Any = optax.apply_updates(state.weights, updates)
    return Learning(weights, inner, state.step + 1), {"loss": value, **figures}


def ahead(make: Callable[[int], T], steps: range, depth: int = 4) -> Iterator[T]:
    """make(i) of every step, made by a thread that is up to `depth` steps ahead. What it raises is raised here."""
    ready: queue.Queue[Any] = queue.Queue(depth)
    left = threading.Event()

    def put(item: Any) -> bool:
        while not left.is_set():
            try:
                ready.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for i in steps:
                if not put((make(i), None)):
                    return
        except BaseException as e:
            put((None, e))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        for _ in steps:
            item, error = ready.get()
            if error is not None:
                raise error
            yield item
    finally:
        left.set()
        thread.join()


def learn(
    weights: Any,
    frozen: Any,
    make: Callable[[int], Any],
    loss: Loss,
    optimiser: optax.GradientTransformation,
    steps: int,
    falls: int,
    where: Path,
    save: int = 50,
) -> tuple[Any, list[dict[str, float]]]:
    """(the weights when they have learnt, figures and seconds of every step), from the last checkpoint in `where` on.

    Batch i is make(i), so a run that was stopped sees what it would have seen. At most `save` steps are lost. Checkpoints from before step
    `falls`, from which on the rate falls, serve runs of any length.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)
    options = ocp.CheckpointManagerOptions(max_to_keep=3)
    with ocp.CheckpointManager(where / "steady", options=options) as steady, ocp.CheckpointManager(
        where / f"falling-{falls}-{steps}", options=options
    ) as falling:  # leaving them waits for what is being written, also when the run is stopped
        state, seen = restored(Learning(weights, optimiser.init(weights), jnp.int32(0)), steady, falling, falls)
        left = range(len(seen), steps)
        shown = tqdm(ahead(make, left), desc="training", disable=None, initial=len(seen), total=steps)
        for i, batch in zip(left, shown):
            begun = time.perf_counter()
            state, figures = step(state, frozen, batch, loss=loss, optimiser=optimiser)
            figures = {name: float(x) for name, x in figures.items()}
            seen.append({**figures, "seconds": time.perf_counter() - begun})
            shown.set_postfix({name: f"{x:.3f}" for name, x in figures.items()})
            if (i + 1) % save == 0 or i + 1 in (falls, steps):
                now = {"steps": list(seen)}  # written later, when there are more
                saving = ocp.args.Composite(state=ocp.args.StandardSave(state), seen=ocp.args.JsonSave(now))
                (steady if i < falls else falling).save(i + 1, args=saving, force=True)
    return state.weights, seen


def restored(
    state: Learning, steady: ocp.CheckpointManager, falling: ocp.CheckpointManager, falls: int
) -> tuple[Learning, list[dict[str, float]]]:
    """The last checkpoint that a run of this length may go on from; `state` where there is none."""
    found = [(i, falling) for i in falling.all_steps()] or [(i, steady) for i in steady.all_steps() if i <= falls]
    if not found:
        return state, []
    last, manager = max(found, key=lambda pair: pair[0])
    saved = manager.restore(last, args=ocp.args.Composite(state=ocp.args.StandardRestore(state), seen=ocp.args.JsonRestore()))
    return saved["state"], saved["seen"]["steps"]


def lately(seen: list[dict[str, float]], over: int = 50) -> dict[str, float]:
    """The mean of each figure over the last steps."""
    return {name: round(sum(row[name] for row in seen[-over:]) / len(seen[-over:]), 4) for name in seen[-1]}
