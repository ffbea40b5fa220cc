"""Equal-growth trees (Yggdrasil, Guan et al. 2025): every step adds as many nodes, wherever the draft model is surest."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.decode.draft_model import OwnTree
from tokeff.decode.grow import Grower, Grown, Levels
from tokeff.decode.sample import noised
from tokeff.errors import UserError
from tokeff.models.transformer import unembed
from tokeff.sharding import top_k


class Ripening(Grown):
    """A tree whose parents are data. parent_BW, depth_BW: of each node, the root's being 0; sees_BWW: the nodes above it, and itself.

    worth_BW: log of the product of the probabilities on a node's path; worth_BWY: of each guess behind it that is no node yet, else -inf.
    """

    parent_BW: jax.Array
    depth_BW: jax.Array
    sees_BWW: jax.Array
    worth_BW: jax.Array
    worth_BWY: jax.Array


@dataclass(frozen=True)
class Ripest(Grower):
    """Names the T most probable guesses of all, at any node that ran, and runs them together: a level is a step, not a depth.

    The probability of a guess is its share among what its node may be followed by, with the noise of the place where tokens are drawn.
    """

    def plant(self, layers, root_B1, accepted, unread=None) -> Ripening:
        g = super().plant(layers, root_B1, accepted, unread)
        B, W = g.tokens_BW.shape
        zero, none = jnp.zeros((B, W), jnp.int32), jnp.full((B, W, self.guesses), -jnp.inf, g.sure_BW.dtype)
        sees = jnp.broadcast_to(jnp.eye(W, dtype=bool), (B, W, W))
        known = {field.name: getattr(g, field.name) for field in fields(g)}
        worth = jnp.zeros_like(g.sure_BW)
        return self.opened(Ripening(**known, parent_BW=zero, depth_BW=zero, sees_BWW=sees, worth_BW=worth, worth_BWY=none), 0, 1)

    def opened(self, g: Ripening, start, T: int) -> Ripening:
        """With the guesses behind the T nodes from `start` on, whose rows just ran."""
        depth, worth, valid = (jax.lax.dynamic_slice_in_dim(x, start, T, axis=1) for x in (g.depth_BW, g.worth_BW, g.valid_BW))
        logits = unembed(self.params, self.cfg, g.x_BTD[:, :T])
        score = noised(logits, self.place_B[:, None] + depth + 1, self.key_B, self.how) if self.coupled else logits
        best, token = top_k(score, self.guesses, "BTV")
        more = worth[..., None] + best - jax.nn.logsumexp(score, axis=-1, keepdims=True)
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
        return g.replace(
            top_BWY=put(g.top_BWY, token.astype(jnp.int32)),
            worth_BWY=put(g.worth_BWY, jnp.where(valid[..., None], more, -jnp.inf).astype(g.worth_BWY.dtype)),
        )

    def named(self, g: Ripening) -> Ripening:
        B, W = g.tokens_BW.shape
        T, start = self.levels.T, self.levels.start(g.level)
        flat_BM = g.worth_BWY.reshape(B, -1)
        worth, at = top_k(flat_BM, T, "BM")
        valid = worth > -jnp.inf
        parent = jnp.where(valid, at // self.guesses, 0).astype(jnp.int32)
        token = jnp.take_along_axis(g.top_BWY.reshape(B, -1), at, axis=1)
        own = jnp.broadcast_to(jnp.arange(W) == start + jnp.arange(T)[:, None], (B, T, W))
        sees = own | jnp.take_along_axis(g.sees_BWW, parent[..., None], axis=1)
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
        return g.replace(
            tokens_BW=put(g.tokens_BW, token), valid_BW=put(g.valid_BW, valid), parent_BW=put(g.parent_BW, parent),
            depth_BW=put(g.depth_BW, 1 + jnp.take_along_axis(g.depth_BW, parent, axis=1)), sees_BWW=put(g.sees_BWW, sees),
            worth_BW=put(g.worth_BW, worth),
            worth_BWY=jax.vmap(lambda x, i: x.at[i].set(-jnp.inf))(flat_BM, at).reshape(g.worth_BWY.shape),
        )  # fmt: skip

    def ran(self, g: Ripening) -> Ripening:
        after = super().ran(g)
        assert isinstance(after, Ripening)
        return self.opened(after, self.levels.start(g.level), self.levels.T)

    def deep(self, g: Ripening) -> jax.Array:
        return self.rows_of(g.depth_BW, g)

    def sight(self, g: Ripening) -> jax.Array:
        return self.rows_of(g.sees_BWW, g)

    def rows_of(self, x_BW: jax.Array, g: Ripening) -> jax.Array:
        """What belongs to the nodes of the step just named."""
        return jax.lax.dynamic_slice_in_dim(x_BW, self.levels.start(g.level), self.levels.T, axis=1)


@dataclass(frozen=True)
class EqualGrowth(OwnTree):
    """A draft model's tree of fixed size whose shape follows the text (Yggdrasil's equal-growth tree, Guan et al. 2025).

    In each of `length` steps the draft model runs `width` rows, and the `width` most probable of all guesses that are no nodes yet become
    nodes: by the product of the probabilities on their paths, at whatever depth. So where it is sure the tree is a long chain, and where it
    is not a wide bush, in one compiled program. guesses: how many of a node's best guesses may become nodes, at least `width`.

    Our reading of the paper, which then verifies as many of the likeliest nodes as the machine's curve pays for, and chooses length and
    width by it: here all 1 + length * width are verified, and both are given. Of equal probabilities the earlier node's comes first.
    """

    length: int = 4
    width: int = 4
    guesses: int = 8

    def __post_init__(self):
        if self.length < 1 or self.width < 1:
            raise UserError(f"length {self.length} and width {self.width} must be at least 1; use plain decoding for no drafts")
        if self.guesses < self.width:
            raise UserError(f"{self.guesses} guesses behind the root do not make {self.width} nodes; give guesses={self.width} or more")

    @property
    def levels(self) -> Levels:
        """Where the nodes of a step stand; on which nodes they hang is data."""
        return Levels.chains(self.length, self.width)

    @property
    def kept(self) -> int:
        return self.guesses

    def grower(self, s, target, kind=Ripest) -> Grower:
        return super().grower(s, target, kind)

    def parents(self, g: Grown) -> jax.Array:
        assert isinstance(g, Ripening)
        return g.parent_BW[:, np.array(self.levels.at())]
