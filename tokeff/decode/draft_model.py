"""Speculation with a draft model (Leviathan et al. 2023): another decoder, beside the target's weights, proposes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tokeff.decode.draft import Chained, Draft, Drafter, Target, last_token
from tokeff.decode.grow import Grower, Grown, Levels
from tokeff.decode.self_draft import check_coupled
from tokeff.errors import UserError
from tokeff.kv.cache import Room, Rows
from tokeff.kv.extend import pack
from tokeff.kv.policy import Full
from tokeff.kv.prefill import prefill
from tokeff.models.config import Config, Params
from tokeff.models.flow import EMPTY, Accepted
from tokeff.sharding import Tree, beside, mesh_of, shard

if TYPE_CHECKING:
    from tokeff.decode.loop import Decoding
    from tokeff.models.load import Model

FULL = Full()


@dataclass(frozen=True)
class OwnModel(Chained, Drafter):
    """Base class of drafters with a decoder of their own, whose weights are `params.side[name]`.

    cfg: its sizes.
    """

    every_pass: ClassVar[bool] = True  # its cache takes in what was accepted when it drafts

    cfg: Config
    length: int = 5
    name: str = field(default="draft", kw_only=True)

    def check(self, m) -> None:
        super().check(m)
        if self.cfg.V != m.cfg.V:
            raise UserError(f"{self.cfg.name} has {self.cfg.V} tokens, {m.cfg.name} has {m.cfg.V}; give a draft model with its tokenizer")
        own = (m.params.side or {}).get(self.name)
        if own is None:
            raise UserError(f"{m.name} has no part {self.name!r} to draft with; attach its weights: m.attach({self.name}=d.params)")
        cfg, found = self.cfg, (own.embed_VD.shape, len(own.blocks), own.blocks[0].q_NHD.shape, own.blocks[0].k_KHD.shape)
        if found != ((cfg.V, cfg.D), cfg.L, (cfg.N, cfg.H, cfg.D), (cfg.K, cfg.H, cfg.D)):
            raise UserError(f"the weights attached as {self.name!r} are not those of {cfg.name}; give the cfg of the same model: d.cfg")

    def read(self, m: Model, tokens_BT, length_B, new: int, more: int = 0, draft: int = 0) -> tuple[Rows, ...]:
        """The draft model's cache of the text so far, with room for `new` and `more` rows and so many draft rows."""
        if (n := int(length_B.max()) + new) > self.cfg.max_len:
            raise UserError(f"{self.cfg.name} reads {self.cfg.max_len} tokens, prompt and answer are {n}; shorten them, or draft otherwise")
        own = m.params.side[self.name]  # type: ignore[index]
        given = onto(own, {"tokens_BT": tokens_BT, "length_B": length_B})
        with beside(own):
            prompt = prefill(own, self.cfg, given["tokens_BT"], given["length_B"], dtype=m.precision.cache)
            return pack(FULL, prompt.layers, Room(new + more, draft), self.cfg)


def onto(params: Params, tree: Tree) -> Tree:
    """The tree on the devices of these weights."""
    return jax.device_put(tree, next(iter(params.norm_D.devices()))) if (on := mesh_of(params)) is None else shard(tree, on)


class OwnCache(struct.PyTreeNode):
    """What a draft model keeps between passes: its cache. Which of its draft rows became real, the target's `accepted` says.

    gone_B: how many tokens of the text it was not given to read; all behind them stand that much earlier in its cache.
    """

    layers: tuple[Rows, ...]
    gone_B: jax.Array


@dataclass(frozen=True)
class OwnTree(OwnModel):
    """Base class of drafters whose own model makes a tree level by level (decode/grow.py). Its cache holds every row. Of a draft it runs
    all levels but the last; after one of whose last level a node was accepted it reads one token more.

    coupled: the draft model names tokens with the target's noise, which `Coupled` may judge; else without.
    """

    coupled: bool = field(default=True, kw_only=True)

    @property
    def levels(self) -> Levels:
        """The tree, level by level; every drafter of this kind has its own."""
        raise NotImplementedError

    @property
    def nodes(self) -> int:
        return self.levels.nodes

    @property
    def depth(self) -> int:
        return self.levels.depth

    @property
    def rows(self) -> int:
        """Draft rows of its own cache: a token not read yet, the root, and the levels that run."""
        return 2 + (self.depth - 1) * self.levels.T

    @property
    def kept(self) -> int:
        """How many guesses it keeps at each node."""
        raise NotImplementedError

    def check(self, m) -> None:
        super().check(m)
        check_coupled(self, self.coupled)
        if self.kept > m.cfg.V:
            raise UserError(f"the tree takes {self.kept} guesses of a vocabulary of {m.cfg.V}; let it take fewer")

    def prepare(self, m, tokens_BT, length_B, new) -> OwnCache:
        return OwnCache(self.read(m, tokens_BT, length_B, new, draft=self.rows), jnp.zeros_like(length_B))

    def grower(self, s: Decoding, target: Target, kind: type[Grower] = Grower) -> Grower:
        root_B, own = s.count_B - 1, (target.params.side or {})[self.name]
        return kind(
            own, self.cfg, FULL, target.how, self.levels, s.key_B, root_B - s.drafter.gone_B, root_B - s.gone_B, s.done_B, self.rows,
            drawn=self.drawn, coupled=self.coupled, guesses=self.kept, before=1,
        )  # fmt: skip

    def parents(self, g: Grown) -> jax.Array:
        """parent_BW of the nodes that exist."""
        return jnp.broadcast_to(jnp.asarray(self.levels.parents(), jnp.int32), (g.tokens_BW.shape[0], self.nodes))

    def draft(self, s: Decoding, target: Target) -> tuple[Draft, Decoding]:
        grower, (accepted, unread) = self.grower(s, target), self.taken(s)
        g = grower.plant(s.drafter.layers, last_token(s.tokens_BS, s.count_B), accepted, unread)
        g = grower.grow(g, self.depth - 1)
        at = np.array(self.levels.at())
        logq = None if g.logq_BWV is None else g.logq_BWV[:, at]
        draft = Draft(g.tokens_BW[:, at], self.parents(g), g.valid_BW[:, at], logq)
        return draft, s.replace(drafter=s.drafter.replace(layers=g.layers))

    def taken(self, s: Decoding) -> tuple[Accepted, tuple[jax.Array, jax.Array]]:
        """(which rows of the last draft became real, in its own cache's numbers; the token behind them that has no row yet, and its order,
        EMPTY for none)."""
        path, count = s.accepted.path_BW[:, : self.depth + 1], s.accepted.count_B
        own = jnp.asarray(self.levels.at(), jnp.int32)[path]
        has_row = (own < self.levels.start(self.depth)) & (jnp.arange(self.depth + 1) < count[:, None])
        held = has_row.sum(axis=1, dtype=jnp.int32)
        # The row before the root comes first; where there was none it is EMPTY.
        own = jnp.pad(own[:, : self.depth] + 1, ((0, 0), (1, self.rows - 1 - self.depth)))
        before = jnp.maximum(s.count_B[:, None] - 2, 0)
        order = jnp.where((held < count)[:, None] & ~s.done_B[:, None], before - s.drafter.gone_B[:, None], EMPTY)
        token = jnp.take_along_axis(s.tokens_BS, before, axis=1)
        return Accepted(own, jnp.where(count > 0, 1 + held, 0)), (token, order)


@dataclass(frozen=True)
class DraftModel(OwnTree):
    """Another decoder drafts (Leviathan et al. 2023; Chen et al. 2023): a chain of `length`; `copies` of it, drawn independently, which a
    rule for several drafts takes (SpecTr, SpecInfer); or a `tree` of its best guesses, nodes as paths of ranks, which fixes the length.

    coupled: a draft is the token that the draft model draws with the target's noise, and a tree has its next best ones too; `Coupled` may
    judge that. Else chains are drawn with their own noise and carry their law, and a tree has the most probable tokens. Both models warp
    alike.
    """

    copies: int = 1
    tree: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self):
        if self.length < 1 or self.copies < 1:
            raise UserError(f"length {self.length} and copies {self.copies} must be at least 1; use plain decoding for no drafts")
        if self.copies > 1 and (self.coupled or self.tree is not None):
            raise UserError(f"{self.copies} copies must be draws of their own to differ; give coupled=False and no tree")
        self.levels  # noqa: B018 a bad tree is refused

    @property
    def levels(self) -> Levels:
        return Levels.chains(self.length, self.copies) if self.tree is None else Levels.of(self.tree)

    @property
    def kept(self) -> int:
        return 1 if self.drawn else self.levels.guesses

    @property
    def drawn(self) -> bool:
        return not self.coupled and self.tree is None
