"""The seam of sparse prefill: which blocks of keys each block of prompt rows reads, and the attention that reads no others.

A `Pattern` is a frozen choice. `choose` names, for every kv head and block of queries, the blocks of stored rows (and single
rows) to gather; the attention then works on what was gathered, so cost falls with what is read. Query heads of a group share
their kv head's choice: the papers choose per query head, which would gather every key G times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from tokeff.errors import UserError
from tokeff.kernels import block_sparse_prefill
from tokeff.kernels.block_sparse_prefill.xla import read
from tokeff.kv.evidence import Evidence
from tokeff.models.attention import NEG, flash
from tokeff.models.flow import EMPTY, Flow, Here
from tokeff.sharding import top_k


class Reading(struct.PyTreeNode):
    """What each block of queries reads. block_BKQM: key blocks, ascending, EMPTY at the end; row_BKM: single stored rows that all
    queries of the head read as well, EMPTY for none. Neither names anything twice; a row inside a block read counts once."""

    block_BKQM: jax.Array
    row_BKM: jax.Array | None = None

    @property
    def count_BKQ(self) -> jax.Array:
        """How many blocks each block of queries reads. The rest of M are places without a block: M bounds time and memory."""
        return (self.block_BKQM != EMPTY).sum(axis=-1)


class Rows(struct.PyTreeNode):
    """The rows of one call: rotated queries, all stored rows so far (these included), and their orders. Both start at a border of
    blocks: query t is stored row `first + t`."""

    q_BTNH: jax.Array
    k_BKSH: jax.Array
    v_BKSH: jax.Array
    order_BS: jax.Array
    ask: Flow
    length_B: jax.Array
    first: int = struct.field(pytree_node=False)


@dataclass(frozen=True)
class Pattern:
    """Base class. block: rows of a block. dense: so many last rows of each prompt read everything."""

    block: int = 64
    dense: int = 0
    whole_prompt: ClassVar[bool] = False  # ranks by the prompt's last rows, so it cannot come in chunks
    own_pass: ClassVar[bool] = False  # its rows come into being in another way than one pass over all of them: `fill` makes the prompt
    by_head: ClassVar[bool] = False  # names the heads of a layer, all of which must be there

    def check(self, cfg: Any, length: int) -> None:
        """Raise UserError for settings that cannot work."""
        if self.block < 1 or self.dense < 0:
            raise UserError(f"block={self.block} must be at least 1 and dense={self.dense} not negative")

    def role(self, layer: int) -> Any:
        """What tells this layer from others; None when all are alike (see `Policy.role`)."""
        return None

    def choose(self, rows: Rows, here: Here) -> Reading:
        raise NotImplementedError

    def fill(self, params, cfg, tokens_BT: jax.Array, length_B: jax.Array, evidence: tuple[Evidence, ...], dtype: str) -> Any:
        """The `tokeff.kv.prefill.Prompt` of right-padded tokens with this evidence, where `own_pass` is set."""
        raise NotImplementedError

    def sees(self, order_BT1: jax.Array, order_BK1M: jax.Array, here: Here) -> jax.Array | bool:
        """Of the rows in the blocks read, which a query may see, as bool that broadcasts to (B, K, T, M): rules finer than blocks."""
        return True

    def attend(self, q, k, v, order_BS, ask: Flow, length_B, first: int, here: Here) -> tuple[jax.Array, jax.Array]:
        """(out_BTNH, lse_BTN) of this call's queries over what they read."""
        rows = Rows(q, k, v, order_BS, ask, length_B, first)
        out, lse = read_blocks(self, rows, self.choose(rows, here), here)
        return over_last(rows, self.dense, out, lse, here) if self.dense else (out, lse)


def over_last(rows: Rows, dense: int, out, lse, here: Here) -> tuple[jax.Array, jax.Array]:
    """The results of the prompt's last `dense` rows, replaced by dense attention over everything."""
    _, at = top_k(rows.ask.order_BT, min(dense, rows.q_BTNH.shape[1]), "BT")

    def pick(x):
        return jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * (x.ndim - 2)), axis=1)

    order = pick(rows.ask.order_BT)
    exact, exact_lse = flash(
        pick(rows.q_BTNH), rows.k_BKSH, rows.v_BKSH, here.lo(order), pick(rows.ask.hi_BT), rows.order_BS[:, None],
        scale=here.cfg.scale, softcap=here.cfg.softcap,
    )  # fmt: skip
    last = (order >= rows.length_B[:, None] - dense)[..., None]
    exact, exact_lse = jnp.where(last[..., None], exact, pick(out)), jnp.where(last, exact_lse, pick(lse))
    put = jax.vmap(lambda x, i, new: x.at[i].set(new, unique_indices=True))
    return put(out, at, exact.astype(out.dtype)), put(lse, at, exact_lse)


def tidy(block_BKQM: jax.Array, own_Q: jax.Array) -> jax.Array:
    """Ascending, with EMPTY (and blocks that do not exist or lie ahead of the queries) at the end."""
    real = (block_BKQM >= 0) & (block_BKQM <= own_Q[:, None])
    far = jnp.iinfo(jnp.int32).max
    ordered = jnp.sort(jnp.where(real, block_BKQM, far), axis=-1)
    return jnp.where(ordered == far, EMPTY, ordered).astype(jnp.int32)


def own_blocks(rows: Rows, R: int) -> jax.Array:
    """own_Q: the key block that each block of queries is itself."""
    return rows.first // R + jnp.arange(-(-rows.q_BTNH.shape[1] // R))


def pad_rows(x: jax.Array, R: int, axis: int, fill=0) -> jax.Array:
    """Pad one axis to a multiple of R."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % R)
    return jnp.pad(x, widths, constant_values=fill)


def read_blocks(pattern: Pattern, rows: Rows, reading: Reading, here: Here) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH, lse_BTN), block by block: gather what the block reads, and nothing else."""
    ask, chosen = rows.ask, (reading.block_BKQM, reading.row_BKM)
    arrays = rows.q_BTNH, rows.k_BKSH, rows.v_BKSH, rows.order_BS[:, None], here.lo(ask.order_BT), ask.hi_BT, *chosen
    options = {"size": pattern.block, "scale": here.cfg.scale, "softcap": here.cfg.softcap, "first": rows.first, "finite": True}
    if type(pattern).sees is Pattern.sees:
        out, lse = block_sparse_prefill(*arrays, **options)
    else:  # a rule of its own, finer than blocks, is not built into kernels
        out, lse = read(*arrays, **options, own_BT=ask.order_BT, rule=lambda mine, order: pattern.sees(mine, order, here))
    return out, jnp.where(lse == -jnp.inf, NEG, lse)
