"""Seam 5: what a call proposes. A drafter is a frozen dataclass; its state is a pytree that travels in the decode loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from tokeff.decode.rule import COUPLED, Rule

if TYPE_CHECKING:
    from tokeff.decode.loop import Decoding
    from tokeff.decode.sample import Sampling
    from tokeff.kv.policy import Policy
    from tokeff.models.config import Config, Params
    from tokeff.models.load import Model


class Draft(struct.PyTreeNode):
    """A tree of W nodes. Node 0 is the last token (certain to be right); parents come before their children.

    parent_BW[b, 0] = 0. Nodes with valid False do not exist. All three have one shape, of `Drafter.nodes` nodes or fewer
    (`check_tree`). What only some drafters have:
    logq_BWV: the warped log-law that each node's token was drawn from, given its parent and the siblings before it; None where tokens
    were not drawn. Whether a drawn node exists may hang on those and on its law, not on its own token.
    Nodes that look ahead: scout_BW marks those that are never accepted; sees_BWW[b, i, j] says that node i reads node j, and depth_BW
    how far each stands behind the root, where neither follows from parents.
    embed_BWD: what enters the network in the place of the nodes' embeddings, x_BWD: what left layer `below - 1`, where the drafter ran the
    layers below `below` for all nodes as the pass would. moved: layers that the drafter ran, which took in what was accepted before.
    taps_BWD: what left those of the layers below `below` that `Drafter.taps` names.
    """

    tokens_BW: jax.Array
    parent_BW: jax.Array
    valid_BW: jax.Array
    logq_BWV: jax.Array | None = None
    scout_BW: jax.Array | None = None
    sees_BWW: jax.Array | None = None
    depth_BW: jax.Array | None = None
    embed_BWD: jax.Array | None = None
    x_BWD: jax.Array | None = None
    taps_BWD: dict[int, jax.Array] | None = None
    below: int = struct.field(pytree_node=False, default=0)
    moved: tuple[int, ...] = struct.field(pytree_node=False, default=())


class Result(struct.PyTreeNode):
    """What the target made of a draft: logits at every node, accepted or not; the path that was accepted, root first, and the tokens that
    came of it (`count_B` of both); and x_BWD behind each layer in the drafter's `taps`."""

    logits_BWV: jax.Array
    path_BW: jax.Array
    emitted_BW: jax.Array
    count_B: jax.Array
    taps: dict[int, jax.Array]


@dataclass(frozen=True)
class Target:
    """The model that verifies, for drafters that run it or its parts: `params.side[NAME]` holds what they bring along."""

    params: Params
    cfg: Config
    policy: Policy
    how: Sampling


@dataclass(frozen=True)
class Drafter:
    """Base class. `nodes` (root included) and `depth` (longest path below the root) fix the shapes of a call.

    rule: how the target's logits decide which nodes are accepted. A drafter that knows the text alone overrides `propose`; one that runs
    a model overrides `draft`.
    """

    rule: Rule = field(default=COUPLED, kw_only=True)

    exact: ClassVar[bool] = True  # whether what it does beside proposing changes no token
    own_layers: ClassVar[bool] = False  # whether it runs some of the model's layers by themselves
    every_pass: ClassVar[bool] = False  # whether it falls behind the text when a pass carries no draft
    taps: ClassVar[tuple[int, ...]] = ()  # layers whose output at every node `observe` wants

    @property
    def lossless(self) -> bool:
        """Whether the text is what plain decoding gives, token for token or, under a rule of its own, in law."""
        return self.exact and self.rule.lossless

    @property
    def nodes(self) -> int:
        raise NotImplementedError

    @property
    def depth(self) -> int:
        raise NotImplementedError

    @property
    def drawn(self) -> bool:
        """Whether its tokens are drawn from laws it tells (`Draft.logq_BWV`)."""
        return False

    @property
    def distinct(self) -> bool:
        """Whether it draws siblings without replacement, so that a later one's law depends on those before it."""
        return False

    @property
    def chain(self) -> bool:
        """Whether no node has two children."""
        return self.nodes == self.depth + 1

    def check(self, m: Model) -> None:
        """Raise UserError when the drafter does not fit the model."""
        self.rule.check(self)

    def fits(self, policy: Policy, cfg: Config) -> str | None:
        """None when it can draft beside this cache policy; else the reason it cannot."""
        return None

    def prepare(self, m: Model, tokens_BT: jax.Array, length_B: jax.Array, new: int) -> Any:
        """State before the first of `new` tokens, from the text so far, between jitted calls: a drafter with its own model reads it."""
        return self.init(tokens_BT.shape[0], m.cfg.V)

    def init(self, B: int, V: int) -> Any:
        """State before the first call, of a drafter that needs to know no more."""
        return ()

    def draft(self, s: Decoding, target: Target) -> tuple[Draft, Decoding]:
        """(the draft, the state of the generation with what drafting changed: caches of layers that ran, the drafter's own state)."""
        return self.propose(s.drafter, s.tokens_BS, s.count_B), s

    def propose(self, state: Any, tokens_BS: jax.Array, count_B: jax.Array) -> Draft:
        """A draft that continues tokens[:count]; the root repeats the last of them."""
        raise NotImplementedError

    def observe(self, state: Any, draft: Draft, result: Result) -> Any:
        """Learn from what the target made of the draft."""
        return state

    def drive(
        self, params: Params, cfg: Config, s: Decoding, steps: int, *, policy: Policy, how: Sampling, eos: tuple[int, ...]
    ) -> Decoding:
        """At most `steps` passes; consumes `s`. The whole loop is one jitted program unless a drafter that decides on the host, or on other
        devices, drives it itself."""
        from tokeff.decode.loop import run

        return run(params, cfg, s, jnp.int32(steps), policy=policy, drafter=self, how=how, eos=eos)


class Chained:
    """What drafters of one chain of `length` drafts have in common; stands before `Drafter` among the bases."""

    length: int

    @property
    def nodes(self) -> int:
        return self.length + 1

    @property
    def depth(self) -> int:
        return self.length


def last_token(tokens_BS: jax.Array, count_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(tokens_BS, count_B[:, None] - 1, axis=1)


@dataclass(frozen=True)
class Plain(Drafter):
    """No draft: one token a call."""

    nodes: ClassVar[int] = 1  # type: ignore[misc]
    depth: ClassVar[int] = 0  # type: ignore[misc]

    def propose(self, state, tokens_BS, count_B) -> Draft:
        root = last_token(tokens_BS, count_B)
        return Draft(root, jnp.zeros_like(root), jnp.ones_like(root, bool))
