"""Trees of drafts: depth and ancestors from parents, and the path that the target's own tokens take through one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from tokeff.errors import UserError

if TYPE_CHECKING:
    from tokeff.decode.draft import Draft, Drafter


def check_tree(draft: Draft, drafter: Drafter) -> None:
    """Raise UserError where a draft is no tree of its drafter's size. Parents that are known before anything runs (numpy) are looked at
    too; those that are data are trusted."""
    name, parent, shape = type(drafter).__name__, draft.parent_BW, draft.tokens_BW.shape
    if not parent.shape == draft.valid_BW.shape == shape or shape[1] > drafter.nodes:
        given = f"tokens_BW {shape}, parent_BW {parent.shape} and valid_BW {draft.valid_BW.shape}"
        raise UserError(f"{name} drafts {given}; give all three one shape (B, W), with W at most its nodes={drafter.nodes}")
    if isinstance(parent, Tracer):
        return
    parent, row, depth = np.asarray(parent), np.arange(len(parent)), np.zeros(shape, int)
    for node in range(shape[1]):
        if len(wrong := np.flatnonzero((parent[:, node] < 0) | (parent[:, node] > max(node - 1, 0)))):
            raise UserError(f"{name} hangs node {node} on node {parent[wrong[0], node]}; list parents first, and the root as its own")
        depth[:, node] = depth[row, parent[:, node]] + (node > 0)
    if depth.max() > drafter.depth:
        raise UserError(f"{name} has a path of {depth.max()} nodes below the root, and depth={drafter.depth}; raise depth")


def shape_of(parent_BW: jax.Array, depth: int) -> tuple[jax.Array, jax.Array]:
    """(depth_BW, ancestor_BWW): ancestor[b, i, j] says node j is i or above it. `depth` bounds the deepest node."""
    B, W = parent_BW.shape
    own = jnp.broadcast_to(jnp.eye(W, dtype=bool), (B, W, W))
    above = own
    for _ in range(depth):
        above = own | jnp.take_along_axis(above, parent_BW[:, :, None], axis=1)
    return above.sum(axis=2, dtype=jnp.int32) - 1, above


def walk(draft: Draft, target_BW: jax.Array, depth: int) -> tuple[jax.Array, jax.Array]:
    """(path_BW, count_B) from the root along nodes whose token is the one the target draws at their parent.

    path holds node numbers, root first; entries from count on repeat the last node. W entries although at most depth + 1 are used:
    the next call takes as many draft rows as this one gave.
    """
    parent = draft.parent_BW
    right = draft.valid_BW & (draft.tokens_BW == jnp.take_along_axis(target_BW, parent, axis=1))
    return longest(parent, right if draft.scout_BW is None else right & ~draft.scout_BW, depth)


def longest(parent: jax.Array, right_BW: jax.Array, depth: int) -> tuple[jax.Array, jax.Array]:
    """(path_BW, count_B) of the deepest node that is right together with all above it; the first of several."""
    right = right_BW.at[:, 0].set(True)
    for _ in range(depth):
        right = right & jnp.take_along_axis(right, parent, axis=1)
    level, _ = shape_of(parent, depth)
    end = jnp.argmax(jnp.where(right, level, -1), axis=1)  # equal siblings: the first
    return path_to(parent, end, jnp.take_along_axis(level, end[:, None], axis=1)[:, 0] + 1, depth)


def path_to(parent: jax.Array, end_B: jax.Array, count_B: jax.Array, depth: int) -> tuple[jax.Array, jax.Array]:
    """(path_BW, count_B) from the root to a node that stands count - 1 below it."""
    W = parent.shape[1]
    up = [end_B]
    for _ in range(depth):
        up.append(jnp.take_along_axis(parent, up[-1][:, None], axis=1)[:, 0])
    up_BU = jnp.stack(up, axis=1)  # the end first, then upwards; the root repeats
    step = jnp.clip(count_B[:, None] - 1 - jnp.arange(W)[None], 0, depth)
    return jnp.take_along_axis(up_BU, step, axis=1).astype(jnp.int32), count_B.astype(jnp.int32)
