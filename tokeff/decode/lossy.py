"""Rules of verification that do not keep the law of the text: RAPID's and typical acceptance."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

import jax
import jax.numpy as jnp

from tokeff.decode.rule import Rule
from tokeff.decode.rules import ChainRejection, emitted, open_nodes
from tokeff.decode.sample import first_max, log_law
from tokeff.decode.tree import path_to, shape_of
from tokeff.errors import UserError


@dataclass(frozen=True)
class Rapid(ChainRejection):
    """RAPID (Chen et al. 2025, Algorithm 1): the target leans towards the drafter, log p - eta (p - q) where q is at least a tenth of its
    maximum, giving p^. A draft stands with min(1, p^(x) / q(x)), a refused place is drawn from norm(max(p - q, p - p^)+).

    The emitted law is neither p nor p^, unless eta = 0, which is `ChainRejection`. The paper's eta is 5 to 20 for a drafter of the
    target's size and 40 to 50 for a larger one. Which tokens are changed is by the released code; in the paper it goes by p^. Greedy rows
    stay greedy, as released.
    """

    eta: float = 10.0

    def __post_init__(self):
        if not (self.eta >= 0 and isfinite(self.eta)):
            raise UserError(f"eta {self.eta} must be a number from 0 on; 0 leaves the target's law as it is")

    @property
    def lossless(self) -> bool:  # type: ignore[override]
        return self.eta == 0

    def lean(self, law_BV, q_BV):
        likely = q_BV >= 0.1 * q_BV.max(axis=1, keepdims=True)
        return jax.nn.softmax(jnp.log(law_BV) - self.eta * jnp.where(likely, law_BV - q_BV, 0.0))


@dataclass(frozen=True)
class Typical(Rule):
    """Typical acceptance (Cai et al. 2024, Medusa, section 2.3.1): a draft stands if p(x) > min(epsilon, delta exp(-H(p))), with H the
    entropy of the target's law p at its parent. The longest such path counts, of equals the likeliest; behind it comes the arg-max.

    Not lossless: likely tokens become likelier, and tokens under the bound never come. Greedy rows stay greedy. The defaults are those of
    `medusa_generate`, which recommends delta = sqrt(epsilon); its helpers, and code that copied them, default to .3 and .09, where epsilon
    has no effect.
    """

    epsilon: float = 0.09
    delta: float = 0.3

    lossless: ClassVar[bool] = False

    def __post_init__(self):
        if not (0 < self.epsilon < 1 and 0 < self.delta < 1):
            raise UserError(f"epsilon {self.epsilon} and delta {self.delta} must lie between 0 and 1; Medusa has .09 and .3")

    def judge(self, draft, logits_BWV, place_BW, key_B, how, depth):
        x, parent, row = log_law(logits_BWV, how), draft.parent_BW, jnp.arange(len(logits_BWV))[:, None]
        entropy = -jnp.where(x > -jnp.inf, jnp.exp(x) * x, 0.0).sum(axis=2)
        bound = jnp.minimum(self.epsilon, self.delta * jnp.exp(-entropy))
        said = x[row, parent, draft.tokens_BW]
        right = (open_nodes(draft) & (jnp.exp(said) > jnp.take_along_axis(bound, parent, axis=1))).at[:, 0].set(True)
        likely = jnp.zeros_like(said)
        for _ in range(depth):
            right = right & jnp.take_along_axis(right, parent, axis=1)
            likely = (said + jnp.take_along_axis(likely, parent, axis=1)).at[:, 0].set(0.0)
        level = jnp.where(right, shape_of(parent, depth)[0], -1)
        deepest = level.max(axis=1, keepdims=True)
        end = jnp.argmax(jnp.where(level == deepest, likely, -jnp.inf), axis=1)
        path, count = path_to(parent, end, deepest[:, 0] + 1, depth)
        return path, emitted(draft, path, count, first_max(logits_BWV)[row[:, 0], end]), count
