"""The base class of passes: what says which rows of a prompt, and which heads, go on through the network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import jax

from tokeff.errors import UserError
from tokeff.models.config import Config
from tokeff.models.flow import Flow, Here


class Pass:
    """Base class of what says which prompt rows go on through the network (`tokeff.reduce`): at each of its `layers` it chooses some, and
    the layers above hold no others. A frozen choice, like a policy. `here.layer` tells `choose` which of its layers this is.

    restart: instead of going on, the model runs again on the tokens chosen at its first layer. writes: rows that are not chosen still write
    their key and value at that layer, and the others read them; False: they are gone before it. renumbers: it moves rows to other angles.
    """

    restart: ClassVar[bool] = False
    writes: ClassVar[bool] = True

    @property
    def renumbers(self) -> bool:
        return False

    @property
    def narrows(self) -> bool:
        """It lets heads go, so that some layers have fewer (`heads_in`)."""
        return False

    def heads_in(self, layer: int, cfg: Config) -> int:
        """How many kv heads attend in this layer, each with its query heads."""
        return cfg.K

    def holds(self, policy: Any) -> Any:
        """The cache policy that packs and decodes what this pass leaves of a prompt: the policy itself, where every layer has all heads."""
        return policy

    def layers(self, cfg: Config) -> tuple[int, ...]:
        """Where it chooses, ascending."""
        raise NotImplementedError

    def check_layers(self, cfg: Config) -> None:
        """Raise UserError when it chooses where the model has no layer: what can be said before there is a prompt."""
        if not all(0 <= layer < cfg.L for layer in self.layers(cfg)):
            raise UserError(f"{type(self).__name__} cannot choose at layers {self.layers(cfg)}; give 0 to {cfg.L - 1}")

    def check(self, cfg: Config, length: int) -> None:
        """Raise UserError when it cannot work on this model and prompt length."""

    def rows(self, length: int) -> int:
        """How many of so many rows go on to the top."""
        raise NotImplementedError

    def role(self, layer: int, cfg: Config) -> Any:
        """Tells layers apart in which it does different things. None: it does nothing there and is not asked, so that such layers share
        compiled code with a prefill that has no pass."""
        return layer if layer in self.layers(cfg) else None

    def seeing(self, tokens: tuple[int, ...], texts: Sequence[Sequence[int]]) -> Self:
        """This pass for prompts in which these tokens stand for rows of pictures. Models of pictures ask before they check it."""
        return self

    def choose(self, q_BTNH: jax.Array, k_BTKH: jax.Array, flow: Flow, here: Here) -> jax.Array:
        """index_BM of the rows of this call that go on, ascending, EMPTY past their number; from unrotated queries and keys."""
        raise NotImplementedError

    def take(self, flow: Flow, index_BM: jax.Array, here: Here) -> Flow:
        """The rows that go on. They may move to other angles, and where the others are gone before the layer, take some of them in."""
        return flow.take(index_BM)

    def note(self, q_BTNH: jax.Array, k_BTKH: jax.Array, flow: Flow, here: Here) -> Flow:
        """Asked in every layer that has a role before the rows attend: the flow with what it wants to know of them later."""
        return flow

    def added(self, y_BTD: jax.Array, out_BTD: jax.Array, flow: Flow, here: Here) -> Flow:
        """Asked after each half of a layer, which made `out` of the normed rows `y` and will add it to them: as `note`."""
        return flow

    def listen(self, out_BTNH: jax.Array, flow: Flow, here: Here) -> Flow:
        """Asked once the heads of a layer that has a role attended: the flow with what it wants to know of each, and, where it lets heads
        go, with those that attend in the layers above (`Flow.head_BK`). `here` is that of all heads, `out` of those that attended."""
        return flow

    def awake(self, half: int, flow: Flow, here: Here) -> jax.Array | None:
        """index_BM of the rows that go through this half of a layer (0 attention, 1 feed-forward); the others pass it by. None: all do."""
        return None
