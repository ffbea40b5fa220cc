"""Scores by queries that are not there yet: Expected Attention."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from tokeff.errors import UserError
from tokeff.kv.evidence import Evidence, QueryMoments
from tokeff.kv.policy import Prefilled
from tokeff.kv.score import Scorer
from tokeff.models.flow import EMPTY, Here


@dataclass(frozen=True)
class Expected(Scorer):
    """Expected Attention (Devoto et al. 2025, sec. 3): (attention that future queries are expected to pay + floor) * ||v||.

    Queries before rotation are taken as normal, with the mean and covariance of the prompt's (its first `sinks` rows left out). R is the
    mean rotation of the next `future` places. A key then expects exp(k.Rm / sqrt(H) + k.RCR'k / 2H), normalised over the rows behind
    the sinks, and averaged over the query heads of its group. A softcap on logits is not part of the expectation.
    """

    future: int = 512
    sinks: int = 4
    floor: float = 0.0

    def needs(self) -> tuple[Evidence, ...]:
        return (QueryMoments(self.sinks),)

    def check(self) -> None:
        if self.future < 1 or self.floor < 0:
            raise UserError(f"future {self.future} must be at least 1 and floor {self.floor} at least 0")

    def first(self, rows: Prefilled, here: Here) -> jax.Array:
        queries = rows.evidence_BKS[QueryMoments(self.sinks)]
        turn = mean_rotation(rows.length_B, self.future, here)
        mean = jnp.einsum("bnh,bhi->bni", queries.mean_BNH, turn, precision="highest")
        covariance = jnp.einsum("bhi,bnhj,bjk->bnik", turn, queries.covariance(), turn, precision="highest")
        (B, K, _, H), scale = rows.k_BKSH.shape, here.cfg.scale
        k, v = rows.k_BKSH.astype(jnp.float32), rows.v_BKSH.astype(jnp.float32)
        mean, covariance = mean.reshape(B, K, -1, H), covariance.reshape(B, K, -1, H, H)
        spread = jnp.einsum("bksh,bkghi,bksi->bkgs", k, covariance, k, precision="highest")
        logits = jnp.einsum("bksh,bkgh->bkgs", k, mean, precision="highest") * scale + spread * (scale**2 / 2)
        counted = (rows.order_BKS != EMPTY) & (rows.order_BKS >= self.sinks)
        p = jax.nn.softmax(jnp.where(counted[:, :, None], logits, -jnp.inf), axis=-1)
        return (p.mean(axis=2) + self.floor) * jnp.linalg.norm(v, axis=-1)


def mean_rotation(from_B: jax.Array, many: int, here: Here) -> jax.Array:
    """(B, H, H): row h is the mean of unit vector h turned by the angles from, from + 1, ... of the next `many` places."""
    unit = jnp.eye(here.cfg.H)
    angle = from_B[:, None] + jnp.arange(many)
    return here.rotate(unit[None, None], angle[..., None]).mean(axis=1)
