"""Self-speculation: the model's own layers draft. LayerSkip's way is here; SWIFT's is in swift.py, DEL's in dynamic_exit.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp

from tokeff.decode.draft import Chained, Draft, Drafter, Target, last_token
from tokeff.decode.grow import Grower, Grown, Levels
from tokeff.errors import UserError

if TYPE_CHECKING:
    from tokeff.decode.loop import Decoding


@dataclass(frozen=True)
class SelfDraft(Drafter):
    """A chain that some of the model's own layers draft, row by row, beside the cache that the whole model uses.

    coupled: a draft is the token that the drafting layers draw with the target's noise, which only a rule that compares tokens (`Coupled`)
    may judge; else it is drawn with noise of its own, and its law goes with it.
    """

    coupled: bool = field(default=True, kw_only=True)

    own_layers: ClassVar[bool] = True

    @property
    def drawn(self) -> bool:
        return not self.coupled

    def check(self, m) -> None:
        super().check(m)
        check_coupled(self, self.coupled)

    def grower(self, s: Decoding, target: Target, length: int, kind: type[Grower] = Grower, **more: Any) -> Grower:
        return kind(
            target.params, target.cfg, target.policy, target.how, Levels.chains(length), s.key_B, s.count_B - 1 - s.gone_B,
            s.count_B - 1 - s.gone_B, s.done_B, s.accepted.path_BW.shape[1], drawn=self.drawn, coupled=self.coupled, **more,
        )  # fmt: skip


def check_coupled(drafter: Drafter, coupled: bool) -> None:
    """Refuse drafts that share the target's noise to a rule that draws anew."""
    if coupled and not drafter.rule.same:
        raise UserError(f"{type(drafter.rule).__name__} draws apart from the noise that the drafts share; give coupled=False")


def chain_parents(length: int, B: int) -> jax.Array:
    """parent_BW of a chain."""
    return jnp.broadcast_to(jnp.maximum(jnp.arange(length + 1, dtype=jnp.int32) - 1, 0), (B, length + 1))


@dataclass(frozen=True)
class EarlyExit(Chained, SelfDraft):
    """The first `exit` layers and the model's own norm and head draft `length` tokens; the other layers verify (LayerSkip, Elhoushi et al.
    2024, section 4.3).

    What a draft row wrote in the first layers, and what left them, is what the verifying pass would have: it goes on from there, and no
    layer runs twice for a row. Any model works; how often drafts are right depends on how it was trained.
    """

    exit: int = 8
    length: int = 6

    def __post_init__(self):
        if self.exit < 1 or self.length < 1:
            raise UserError(f"exit {self.exit} and length {self.length} must be at least 1; use plain decoding for no drafts")

    def check(self, m) -> None:
        super().check(m)
        check_exit(self.exit, m.cfg)

    def fits(self, policy, cfg) -> str | None:
        return halves(policy, cfg, self.exit)

    def draft(self, s: Decoding, target: Target) -> tuple[Draft, Decoding]:
        g = below(self, s, target, self.exit, self.length)
        return resumed(g, self.exit), s.replace(layers=g.layers)


def check_exit(exit: int, cfg) -> None:
    if exit >= cfg.L:
        raise UserError(f"exit {exit} leaves none of the {cfg.L} layers of {cfg.name} to verify; give exit={cfg.L - 1} or less")


def halves(policy, cfg, exit: int) -> str | None:
    """Why a policy's layers below and above `exit` cannot run apart; None where they can."""
    return policy.alone(tuple(range(exit)), cfg) or policy.alone(tuple(range(exit, cfg.L)), cfg)


def below(drafter: SelfDraft, s: Decoding, target: Target, exit: int, length: int, taps: tuple[int, ...] = (), stop_B=None) -> Grown:
    """A chain that the layers below `exit` drafted, every row of it run through them."""
    taps = tuple(sorted({i for i in taps if i < exit} | {exit - 1}))
    grower = drafter.grower(s, target, length, run=tuple(range(exit)), taps=taps, stop_B=stop_B)
    return grower.grow(grower.plant(s.layers, last_token(s.tokens_BS, s.count_B), s.accepted), length)


def resumed(g: Grown, exit: int) -> Draft:
    """The draft whose rows the layers from `exit` on take up."""
    B, W = g.tokens_BW.shape
    return Draft(
        g.tokens_BW, chain_parents(W - 1, B), g.valid_BW, g.logq_BWV, x_BWD=g.taps_BWD[exit - 1], below=exit, moved=tuple(range(exit)),
        taps_BWD=g.taps_BWD,
    )  # fmt: skip
