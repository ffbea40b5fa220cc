"""How many rows: budgets as a fraction or a number of rows, and their division among the heads of a layer.

A share of n rows is ceil(share * n) rows, and at least one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from tokeff.errors import UserError
from tokeff.sharding import top_k


@dataclass(frozen=True)
class AtLeast:
    """The larger of a share of the rows and a number of rows, as in a published max(4000, n / 5)."""

    share: float
    rows: int


Budget = int | float
"""Of a field's declared type, which is what the command line can read. An `AtLeast` may stand in its place."""


def check_budget(budget: Budget | AtLeast, length: int) -> None:
    """Refuse what keeps nothing or more than there is."""
    if isinstance(budget, AtLeast):
        check_budget(budget.share, length)
        check_budget(budget.rows, length)
    elif isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise UserError(f"budget {budget!r} is a {type(budget).__name__}; give a share as a float, or a number of rows as an int")
    elif isinstance(budget, float) and not 0 < budget <= 1:
        raise UserError(f"budget {budget} is not a share of the context; give a fraction in (0, 1] or a number of rows")
    elif not isinstance(budget, float) and not 0 < budget <= length:
        raise UserError(f"budget {budget} rows does not fit a context of {length}; give 1 to {length}")


def most_rows(budget: Budget | AtLeast, S: int) -> int:
    """The static number of rows per head that the budget can reach with prompts of at most S tokens."""
    if isinstance(budget, AtLeast):
        return max(most_rows(budget.share, S), min(budget.rows, S))
    return max(1, math.ceil(budget * S - 1e-9)) if isinstance(budget, float) else min(budget, S)


def rows_of(budget: Budget | AtLeast, length_B: jax.Array) -> jax.Array:
    """rows_B of each sequence, so that a padded batch keeps what single runs keep."""
    if isinstance(budget, AtLeast):
        return jnp.maximum(rows_of(budget.share, length_B), rows_of(budget.rows, length_B))
    if isinstance(budget, float):
        return jnp.maximum(jnp.ceil(budget * length_B - 1e-4).astype(jnp.int32), 1)
    return jnp.minimum(budget, length_B)


def best(score_BKS: jax.Array, keep_B: jax.Array, M: int) -> jax.Array:
    """index_BKM of the `keep_B` highest-scored rows of every head in ascending order; S past their number.

    Rows that must not be chosen carry -inf.
    """
    S = score_BKS.shape[-1]
    value, index = top_k(score_BKS, M, "BKS")
    chosen = (jnp.arange(M)[None, None] < keep_B[:, None, None]) & (value > -jnp.inf)
    return jnp.sort(jnp.where(chosen, index, S), axis=-1)


@dataclass(frozen=True)
class Spread:
    """AdaKV's allocation (Feng et al. 2024, alg. 1 with the safeguard): every head keeps `floor` of the mean budget, the rest of
    the layer's budget goes to the highest scores wherever they are. Heads end with different numbers of rows."""

    floor: float = 0.2

    def keep(self, score_BKS: jax.Array, forced_BKS: jax.Array, keep_B: jax.Array) -> jax.Array:
        """mask_BKS with exactly K * keep_B rows (or all there are); `forced` rows count and always stay."""
        B, K, S = score_BKS.shape
        exists = score_BKS > -jnp.inf
        own = jnp.where(forced_BKS, jnp.inf, score_BKS)
        rank = jnp.argsort(jnp.argsort(-own, axis=-1), axis=-1)
        loose = keep_B - forced_BKS.sum(-1).max(-1)
        floor = forced_BKS.sum(-1) + jnp.ceil(self.floor * loose).astype(jnp.int32)[:, None]
        safe = exists & (rank < jnp.minimum(floor, keep_B[:, None])[..., None])
        flat = jnp.where(safe, jnp.inf, score_BKS).reshape(B, K * S)
        order = jnp.argsort(jnp.argsort(-flat, axis=-1), axis=-1).reshape(B, K, S)
        return exists & (order < K * keep_B[:, None, None])
