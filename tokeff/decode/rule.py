"""How the target's logits decide which nodes of a draft become real: the rule of a drafter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp

from tokeff.decode.sample import Sampling, draw
from tokeff.decode.tree import walk

if TYPE_CHECKING:
    from tokeff.decode.draft import Draft, Drafter


@dataclass(frozen=True)
class Rule:
    """Base class.

    same: under it a text is that of plain decoding with the same seed, token for token; a rule that is lossless without that keeps the law
    of the text, and greedy text.
    """

    lossless: ClassVar[bool] = True
    same: ClassVar[bool] = False
    drawn: ClassVar[bool | None] = None  # True: needs drafts with `logq`; False: needs drafts without; None: takes both

    def check(self, drafter: Drafter) -> None:
        """Raise UserError when it cannot judge what this drafter proposes."""

    def judge(
        self, draft: Draft, logits_BWV: jax.Array, place_BW: jax.Array, key_B: jax.Array, how: Sampling, depth: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(path_BW, emitted_BW, count_B): the nodes that are right, root first, and the tokens that come of it: those of the nodes behind
        the root, and one more. place_BW: order of the token that follows each node. Past `count` both may hold anything in range.

        Draws are functions of (key, place) alone, so a text does not depend on batch mates or on how passes are cut.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Coupled(Rule):
    """A node is right when it carries the token that the target draws at its parent (decode/sample.py). Whatever the draft is, the text is
    the one of plain decoding. Drafts drawn with the same noise (`draw_draft`) are right with probability (1 - TV) / (1 + TV)
    or more, TV being the distance of the two laws."""

    same: ClassVar[bool] = True

    def judge(self, draft, logits_BWV, place_BW, key_B, how, depth):
        target = draw(logits_BWV, place_BW, key_B, how)
        path, count = walk(draft, target, depth)
        return path, jnp.take_along_axis(target, path, axis=1), count


COUPLED = Coupled()
