"""What merging by likeness has to beat: rows dropped at random, and means over neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from tokeff.models.flow import EMPTY
from tokeff.reduce.merge import check_rows, join


@dataclass(frozen=True)
class RandomDrop:
    """Baseline: r rows chosen at random are gone, all others stay as they are. The draw depends on seed and layer, not on the input."""

    seed: int = 0

    def reduce(self, x_BSD: jax.Array, metric_BSH: jax.Array, size_BS: jax.Array, r: int, protected: int = 0, layer: int = 0):
        """(x_BMD, size_BM, source_BS) with r rows fewer; source is EMPTY for those that are gone."""
        B, S = size_BS.shape
        check_rows(S, r, protected)
        key = jax.random.fold_in(jax.random.key(self.seed), layer)
        gone = protected + jax.random.permutation(key, S - protected)[:r]
        left = jnp.ones(S, bool).at[gone].set(False)
        source = jnp.where(left, jnp.cumsum(left) - 1, EMPTY).astype(jnp.int32)
        source_BS = jnp.broadcast_to(source, (B, S))
        return *join(x_BSD, size_BS, source_BS, S - r), source_BS


@dataclass(frozen=True)
class Pooled:
    """Baseline: the sequence cut into S - r pieces of nearly equal length, each the mean of its rows by size; alike for all inputs."""

    def reduce(self, x_BSD: jax.Array, metric_BSH: jax.Array, size_BS: jax.Array, r: int, protected: int = 0, layer: int = 0):
        """(x_BMD, size_BM, source_BS) with r rows fewer."""
        B, S = size_BS.shape
        check_rows(S, r, protected)
        free = S - protected
        piece = protected + jnp.arange(free) * (free - r) // max(free, 1)
        source = jnp.concatenate([jnp.arange(protected), piece]).astype(jnp.int32)
        source_BS = jnp.broadcast_to(source, (B, S))
        return *join(x_BSD, size_BS, source_BS, S - r), source_BS
