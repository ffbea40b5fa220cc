"""What a prefill can be asked for about its queries: sums over them, so that prompts may come in chunks and be continued."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tokeff.kernels import column_mass
from tokeff.models.flow import EMPTY, Flow, Here
from tokeff.sharding import top_k


class Seen(struct.PyTreeNode):
    """One layer of one call of a prefill: its queries (as projected, and rotated) over all rows so far."""

    raw_BTNH: jax.Array
    q_BTNH: jax.Array
    lse_BTN: jax.Array
    ask: Flow
    k_BKSH: jax.Array
    order_BKS: jax.Array
    length_B: jax.Array  # of the whole prompt
    id_BT: jax.Array | None = None  # the tokens of the rows that this call added
    x_BTD: jax.Array | None = None  # the vectors with which these rows entered the layer, those that a pass drops there included


@dataclass(frozen=True)
class Evidence:
    """Base class. A kind of evidence is a frozen choice, and the key under which `Prefilled` keeps what was gathered.

    per_row: the value is (B, K, S), one number a stored row.
    """

    per_row: ClassVar[bool] = False

    def __lt__(self, other: Evidence) -> bool:
        """Some order: `Prefilled` keeps evidence in a dict, and a pytree sorts its keys."""
        return repr(self) < repr(other)

    def check(self, cfg, length: int) -> None:
        """Raise UserError where it cannot be gathered from a prompt of this length."""

    def behind(self, cut: Any, cfg) -> None:
        """Raise UserError where it cannot be gathered under this pass (None: no pass)."""

    def by_head(self) -> str | None:
        """None when it can be gathered in a layer that lost heads to a pass; else the reason it cannot."""
        return None

    def attends(self) -> float:
        """Of how many last rows it takes the attention: 0 for none, infinity for all."""
        return 0

    def role(self, layer: int) -> Any:
        """Tells layers apart whose evidence must not share compiled code."""
        return None

    def like(self, B: int, S: int, cfg) -> Any:
        """Shapes and dtypes of the value after S rows."""
        raise NotImplementedError

    def gather(self, seen: Seen, before: Any, here: Here) -> Any:
        """The value with what this call's queries add; `before` is None at first."""
        raise NotImplementedError

    def revisit(
        self, params, cfg, prompt: Any, tokens_BT: jax.Array, length_B: jax.Array, dtype: str, x_BTD: jax.Array | None = None
    ) -> Any:
        """The finished prompt, for evidence that takes a pass of its own over the `tokens` it ends with. x_BTD: what entered for them,
        where that was not their embeddings."""
        return prompt

    def heads(self, value: Any, index: Any, G: int) -> Any:
        """The part of these kv heads, each with G query heads."""
        return value[:, index]

    def longer(self, value: Any, more_B: jax.Array) -> Any:
        """The value once the prompt becomes `more` rows longer; None where it no longer counts."""
        return value


@dataclass(frozen=True)
class Ask(Evidence):
    """Attention mass per stored row, summed over query heads of a kv head and over queries.

    last: only the last `last` prompt rows ask (SnapKV); None: all do (H2O). decay: a query `d` rows before the end weighs
    decay**d (A2SF). near: a row counts what it gets from the queries of whose last `near` rows, their own included, it is one (InfLLM).
    Computed by one extra pass over the keys per layer, never as a T x S matrix.
    """

    last: int | None = None
    decay: float = 1.0
    near: int | None = None
    per_row: ClassVar[bool] = True

    def attends(self) -> float:
        return math.inf if self.last is None else self.last

    def like(self, B: int, S: int, cfg):
        return jax.ShapeDtypeStruct((B, cfg.K, S), "float32")

    def weight(self, order_BT: jax.Array, length_B: jax.Array) -> jax.Array:
        """weight_BT of each query row, from its distance to the end of the prompt."""
        back = length_B[:, None] - 1 - order_BT
        w = jnp.where(order_BT == EMPTY, 0.0, self.decay ** jnp.maximum(back, 0).astype(jnp.float32))
        return w if self.last is None else jnp.where(back < self.last, w, 0.0)

    def gather(self, seen: Seen, before, here: Here) -> jax.Array:
        q, lse, row = seen.q_BTNH, seen.lse_BTN, seen.ask.order_BT
        weight = self.weight(row, seen.length_B)
        if self.last is not None and self.last < row.shape[1]:  # only these rows of each sequence weigh anything
            _, at = top_k(row, self.last, "BT")
            q, lse = (jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * (x.ndim - 2)), axis=1) for x in (q, lse))
            weight, row = jnp.take_along_axis(weight, at, axis=1), jnp.take_along_axis(row, at, axis=1)
        stored, lo = jnp.broadcast_to(seen.order_BKS, seen.k_BKSH.shape[:3]), here.lo(row)
        lo = lo if self.near is None else jnp.maximum(lo, row - self.near + 1)
        mass = column_mass(q, seen.k_BKSH, lse, stored, lo, row, weight, scale=here.cfg.scale, softcap=here.cfg.softcap)
        return mass if before is None else mass.at[..., : before.shape[-1]].add(before)

    def longer(self, value, more_B: jax.Array):
        """What the last rows looked at no longer counts: others are last now."""
        return None if self.last is not None else value * self.decay ** more_B[:, None, None]


@dataclass(frozen=True)
class QuerySquares(Evidence):
    """The squares of the last `last` rows' rotated queries, channel by channel, summed over rows and the heads of a group: (B, K, H)
    (ThinK)."""

    last: int

    def like(self, B: int, S: int, cfg):
        return jax.ShapeDtypeStruct((B, cfg.K, cfg.H), "float32")

    def gather(self, seen: Seen, before, here: Here) -> jax.Array:
        B, T, N, H = seen.q_BTNH.shape
        weight = Ask(self.last).weight(seen.ask.order_BT, seen.length_B)
        q = seen.q_BTNH.astype(weight.dtype).reshape(B, T, here.cfg.K, -1, H)
        found = jnp.einsum("btkgh,bt->bkh", jnp.square(q), weight)
        return found if before is None else found + before

    def longer(self, value, more_B: jax.Array) -> None:
        return None


@dataclass(frozen=True)
class Pictured(Evidence):
    """Whether each stored row is a picture's, (B, K, S): whether its token is one of these, which stand for pictures in a text."""

    marks: tuple[int, ...]
    per_row: ClassVar[bool] = True

    def like(self, B: int, S: int, cfg):
        return jax.ShapeDtypeStruct((B, cfg.K, S), "bool")

    def gather(self, seen: Seen, before, here: Here) -> jax.Array:
        assert seen.id_BT is not None, "a prefill knows the token of each row"
        (B, K, S, _), T = seen.k_BKSH.shape, seen.id_BT.shape[1]
        mine = (seen.id_BT[..., None] == jnp.asarray(self.marks)).any(axis=-1)
        found = jnp.zeros((B, K, S), bool).at[..., S - T :].set(mine[:, None])
        return found if before is None else found.at[..., : before.shape[-1]].set(before)


class Moments(struct.PyTreeNode):
    """Queries before rotation: how many, and of each query head their mean and the mean of their outer products."""

    count_B: jax.Array
    mean_BNH: jax.Array
    outer_BNHH: jax.Array

    def covariance(self) -> jax.Array:
        """covariance_BNHH, divided by the count."""
        return self.outer_BNHH - self.mean_BNH[..., None] * self.mean_BNH[..., None, :]

    def and_then(self, other: Moments) -> Moments:
        """Of both sets of queries together."""
        count = self.count_B + other.count_B
        mine = self.count_B / jnp.maximum(count, 1)

        def blend(a, b):
            w = mine.reshape(-1, *(1,) * (a.ndim - 1))
            return w * a + (1 - w) * b

        return Moments(count, blend(self.mean_BNH, other.mean_BNH), blend(self.outer_BNHH, other.outer_BNHH))


@dataclass(frozen=True)
class QueryMoments(Evidence):
    """Mean and covariance of the queries before rotation, without those of the first `skip` rows (Expected Attention)."""

    skip: int = 0

    def like(self, B: int, S: int, cfg):
        shapes = ((B,), (B, cfg.N, cfg.H), (B, cfg.N, cfg.H, cfg.H))
        kind: Any = Moments  # shapes in the place of arrays
        return kind(*(jax.ShapeDtypeStruct(shape, "float32") for shape in shapes))

    def gather(self, seen: Seen, before, here: Here) -> Moments:
        weight = (seen.ask.order_BT >= self.skip).astype(jnp.float32)
        count_B = weight.sum(axis=1)
        weight = weight / jnp.maximum(count_B, 1)[:, None]
        q = seen.raw_BTNH.astype(jnp.float32)
        outer = jnp.einsum("btnh,btni,bt->bnhi", q, q, weight, precision="highest")
        found = Moments(count_B, jnp.einsum("btnh,bt->bnh", q, weight, precision="highest"), outer)
        return found if before is None else before.and_then(found)

    def heads(self, value: Moments, index, G: int) -> Moments:
        asked = (index[:, None] * G + np.arange(G)).reshape(-1)
        return Moments(value.count_B, value.mean_BNH[:, asked], value.outer_BNHH[:, asked])
