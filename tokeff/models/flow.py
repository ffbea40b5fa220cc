"""Rows on their way through the network, and what a layer's code may look up while it handles them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import struct

from tokeff.models.config import Config
from tokeff.models.rope import rotate

EMPTY = -1  # the order of a row that is not there: padding in a Flow, a free slot in a cache


class Flow(struct.PyTreeNode):
    """T rows of a batch travelling through the layers.

    order_BT: place in the sequence; unique, causal, EMPTY for padding. angle_BT: rotary position; may differ from order.
    hi_BT: the largest stored order this row may read (its own order for certain rows, the last committed one for drafts).
    among_BTW: which rows of the draft each row reads (tree ancestors and itself); None = every row is certain. A call brings the whole
    draft, or, where a drafter runs layers itself, the T rows of it that stand from place `at` (a number, of W) on.
    id_BT: the token of each row, EMPTY for padding, for methods that read the text; None where rows are not of tokens.
    score_BT, whole_B: what a pass notes on the way (`Pass.note`): a number of each row, and of how many rows its shares are.
    head_BK, loud_BK: which kv heads attend, ascending (None: all), and what a pass adds up of what each of them says (`Pass.listen`).
    """

    x_BTD: jax.Array
    order_BT: jax.Array
    angle_BT: jax.Array
    hi_BT: jax.Array
    among_BTW: jax.Array | None = None
    id_BT: jax.Array | None = None
    at: jax.Array | None = None
    score_BT: jax.Array | None = None
    whole_B: jax.Array | None = None
    head_BK: jax.Array | None = None
    loud_BK: jax.Array | None = None

    def take(self, index_BM: jax.Array) -> Flow:
        """The chosen rows (index EMPTY = no row). Only certain rows can be chosen from."""
        safe = jnp.maximum(index_BM, 0)

        def pick(a):
            return jnp.take_along_axis(a, safe.reshape(safe.shape + (1,) * (a.ndim - 2)), axis=1)

        gone = index_BM == EMPTY
        return Flow(
            pick(self.x_BTD),
            jnp.where(gone, EMPTY, pick(self.order_BT)),
            pick(self.angle_BT),
            jnp.where(gone, EMPTY, pick(self.hi_BT)),
            id_BT=None if self.id_BT is None else jnp.where(gone, EMPTY, pick(self.id_BT)),
            score_BT=None if self.score_BT is None else pick(self.score_BT),
            whole_B=self.whole_B,
            head_BK=self.head_BK,
            loud_BK=self.loud_BK,
        )

    def put(self, some: Flow, index_BM: jax.Array) -> Flow:
        """These rows with the vectors of `some`, which were taken by that index, back in their places."""
        at = jnp.where(index_BM == EMPTY, self.x_BTD.shape[1], index_BM)
        return self.replace(x_BTD=jax.vmap(lambda x, i, y: x.at[i].set(y, mode="drop"))(self.x_BTD, at, some.x_BTD))


class Accepted(struct.PyTreeNode):
    """Which draft rows of the previous call became real: `path_BW[b, :count_B[b]]` are their indices in that call."""

    path_BW: jax.Array
    count_B: jax.Array

    @staticmethod
    def nothing(B: int, W: int) -> Accepted:
        """No draft row has become real yet."""
        return Accepted(jnp.zeros((B, W), jnp.int32), jnp.zeros(B, jnp.int32))


@dataclass(frozen=True)
class Here:
    """Where in the network we are. `layer` and `cfg` are static; `side` are this layer's learned parts, there while a block runs."""

    layer: int
    cfg: Config
    side: dict[str, jax.Array] | None = None

    @property
    def window(self) -> int | None:
        return self.cfg.windows[self.layer]

    def lo(self, order: jax.Array) -> jax.Array:
        """The smallest order a row of this order may read: 0, or the start of the layer's sliding window."""
        return jnp.zeros_like(order) if self.window is None else jnp.maximum(order - self.window + 1, 0)

    def fewer(self, K: int) -> Here:
        """The same layer with so many of its kv heads, each with its query heads."""
        return replace(self, cfg=replace(self.cfg, K=K, N=self.cfg.N // self.cfg.K * K))

    def rotate(self, x: jax.Array, angle: jax.Array, *, inverse: bool = False) -> jax.Array:
        """Rotary embedding of this layer: x (..., H) by angle (...). `inverse` takes it off again."""
        return rotate(x, angle, self.cfg.rope_of(self.layer), inverse=inverse)
