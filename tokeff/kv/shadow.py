"""ShadowKV (Sun et al. 2024): keys as a low-rank product before RoPE, values whole, chunks chosen by landmarks.

After the prompt: the raw keys of all kv heads side by side are a (S, K*H) matrix of rank `rank`; chunks of `chunk` rows are
represented by the mean of their rotated keys (the landmark); the chunks that their landmark describes worst are kept in full, and
so are the last ones. A query reads the best chunks by landmark: their keys are rebuilt and rotated on the fly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from tokeff.errors import UserError
from tokeff.kernels import lowrank_scores, merge
from tokeff.kv.budget import Budget, check_budget, most_rows, rows_of
from tokeff.kv.cache import Room, Rows, empty_draft, take_rows, whole_tiles
from tokeff.kv.host import place, rows_from_host
from tokeff.kv.policy import Policy, Prefilled, append, pad_slots, tree_bytes
from tokeff.kv.read import read_draft, read_store
from tokeff.models.attention import NEG, combine, scores, softmax
from tokeff.models.flow import EMPTY, Accepted, Flow, Here
from tokeff.models.rope import frequencies
from tokeff.sharding import top_k


class Shadow(struct.PyTreeNode):
    """S = P * chunk prompt rows. Key of row s, head k before RoPE = low_BSY[s] @ basis_BYKH[:, k]; Y is the rank.

    open_BKP: chunks that a landmark stands for (the others are whole in `exact`, with everything generated later).
    read_B: how many chunks a query reads.
    """

    low_BSY: jax.Array
    basis_BYKH: jax.Array
    v_BKSH: jax.Array
    order_BS: jax.Array
    landmark_BKPH: jax.Array
    open_BKP: jax.Array
    read_B: jax.Array
    exact: Rows


def low_rank(x_BSD: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """(low_BSY, basis_BYD), the best rank-Y approximation: D is small, so the basis comes from the D x D Gram matrix."""
    x = x_BSD.astype(jnp.float32)
    gram = jnp.einsum("bsd,bse->bde", x, x, precision="highest")
    basis = jnp.linalg.eigh(gram)[1][..., ::-1][..., :rank]
    return jnp.einsum("bsd,bdy->bsy", x, basis, precision="highest"), jnp.swapaxes(basis, 1, 2)


def most(some: float | int, n: int) -> float | int:
    """What a share, or a number of n things, may be at most."""
    return 1 if isinstance(some, float) else n


def counted(some: float | int, n: int) -> int:
    """A number of n things: given, or a share of them and at least one."""
    return max(1, round(some * n)) if isinstance(some, float) else min(some, n)


@dataclass(frozen=True)
class ShadowKV(Policy):
    """budget: prompt rows a query reads through landmarks. rank: share of K*H kept. outliers: share of the chunks kept in full. A whole
    number is a rank or a number of chunks. local: how many chunks at the end of the prompt are kept in full, beside the incomplete one.
    host: values lie in host memory, as published, and only the chunks that a step reads come over."""

    budget: Budget
    rank: float | int = 0.156
    chunk_rows: int = 8
    outliers: float | int = 0.003
    local: int = 4
    host: bool = False

    raw_keys: ClassVar[bool] = True

    def check(self, cfg, length: int) -> None:
        check_budget(self.budget, length)
        width, chunks = cfg.K * cfg.H, length // max(self.chunk_rows, 1)
        fits = 0 < self.rank <= most(self.rank, width) and 0 <= self.outliers <= most(self.outliers, chunks)
        if not fits or self.chunk_rows < 1:
            raise UserError(
                f"rank {self.rank} and outliers {self.outliers} are shares in [0, 1] or at most {width} and {chunks}, chunk_rows at least 1"
            )
        if length < (self.local + 2) * self.chunk_rows:
            raise UserError(f"a prompt of {length} tokens has no chunk beside the local ones; use one of at least "
                            f"{(self.local + 2) * self.chunk_rows} tokens or lower local")  # fmt: skip

    def chunks_read(self, S: int) -> int:
        return max(1, most_rows(self.budget, S) // self.chunk_rows)

    def pack_layer(self, rows: Prefilled, room: Room, here: Here) -> Shadow:
        R = self.chunk_rows
        S = -(-rows.order_BKS.shape[2] // R) * R
        order = pad_slots(rows.order_BKS[:, 0], S, 1, EMPTY)
        k, v = pad_slots(rows.k_BKSH, S, 2), pad_slots(rows.v_BKSH, S, 2)
        k = jnp.where((order == EMPTY)[:, None, :, None], 0, k)
        B, K, _, H = k.shape
        raw = here.rotate(k, jnp.maximum(order, 0)[:, None], inverse=True)
        rank = counted(self.rank, K * H)
        low, basis = low_rank(jnp.moveaxis(raw, 1, 2).reshape(B, S, K * H), rank)
        landmark, whole, last = self.split(k, order, rows.count_B)
        pick = jnp.repeat(whole, R, axis=2) & (order != EMPTY)[:, None]
        exact = self.exact_rows(k, v, order, pick, last, room)
        dtype = k.dtype
        return Shadow(low.astype(dtype), basis.reshape(B, rank, K, H).astype(dtype), v, order, landmark, ~whole,
                      jnp.maximum(rows_of(self.budget, rows.count_B) // R, 1), exact)  # fmt: skip

    def split(self, k_BKSH, order_BS, count_B):
        """(landmark_BKPH, whole_BKP, M): which chunks stay whole, and the static bound on their rows per head."""
        R, (B, K, S, H) = self.chunk_rows, k_BKSH.shape
        P = S // R
        chunks = k_BKSH.reshape(B, K, P, R, H)
        landmark = chunks.mean(axis=3)
        norm = jnp.linalg.norm(chunks, axis=-1) * jnp.linalg.norm(landmark, axis=-1)[..., None]
        worst = (jnp.einsum("bkprh,bkph->bkpr", chunks, landmark) / jnp.maximum(norm, 1e-9)).min(axis=-1)
        p = jnp.arange(P)[None, None]
        closed = p >= (count_B // R - self.local)[:, None, None]  # local chunks, the incomplete one and padding
        n_B = jnp.minimum(self.outliers, count_B // R)
        if isinstance(self.outliers, float):
            n_B = jnp.maximum(jnp.round(self.outliers * (count_B // R)).astype(jnp.int32), 1)
        rank = jnp.argsort(jnp.argsort(jnp.where(closed, jnp.inf, worst), axis=-1), axis=-1)
        bound = counted(self.outliers, P) + self.local + 1
        return landmark, closed | (rank < n_B[:, None, None]), bound * R

    def exact_rows(self, k, v, order_BS, pick_BKS, M: int, room: Room) -> Rows:
        S = order_BS.shape[1]
        index = jnp.sort(jnp.where(pick_BKS, jnp.arange(S), S), axis=-1)[..., : min(M, S)]
        C = whole_tiles(index.shape[-1] + room.rows, k.dtype)
        order = jnp.take_along_axis(pad_slots(order_BS, S + 1, 1, EMPTY)[:, None], index, axis=2)
        k, v = pad_slots(take_rows(k, index), C, 2), pad_slots(take_rows(v, index), C, 2)
        live = (order != EMPTY).sum(axis=-1, dtype=jnp.int32).max(axis=1)
        return Rows(k, v, pad_slots(order, C, 2, EMPTY), live, draft=empty_draft(k, room.draft))

    def attend(self, q, k, v, ask: Flow, new: Flow, layer: Shadow, accepted: Accepted | None, across, here: Here):
        q, k = here.rotate(q, ask.angle_BT[:, :, None]), here.rotate(k, new.angle_BT[:, :, None])
        exact = append(layer.exact, k, v, new, accepted)
        out, lse = read_store(q, exact, ask, here)
        out, lse = merge(out, lse, *self.read_chunks(q, layer, ask, here))
        if ask.among_BTW is not None:
            out, lse = merge(out, lse, *read_draft(q, exact.draft, ask, here))
        return out, layer.replace(exact=exact), across

    def read_chunks(self, q_BTNH, layer: Shadow, ask: Flow, here: Here):
        """(out, lse) over the chunks with the largest landmark probability, the largest over the heads of a group."""
        cfg, R = here.cfg, self.chunk_rows
        B, T, N, H = q_BTNH.shape
        K, S = layer.v_BKSH.shape[1:3]
        M = min(self.chunks_read(S), S // R)
        p, _ = softmax(scores(q_BTNH, layer.landmark_BKPH, cfg.scale, cfg.softcap), layer.open_BKP[:, :, None, None])
        best = jnp.where(layer.open_BKP[:, :, None], p.max(axis=2), NEG)
        value, page = top_k(best, M, "BKTP")  # (B, K, T, M)
        value = jnp.where(jnp.arange(M) < layer.read_B[:, None, None, None], value, NEG)
        row = (page[..., None] * R + jnp.arange(R)).reshape(B, K, T * M * R)
        order = jax.vmap(lambda order, row: order[row])(layer.order_BS, row)
        order = jnp.where(jnp.repeat(value > NEG, R, axis=-1).reshape(order.shape), order, EMPTY)
        page, rope = jnp.where(value > NEG, page, EMPTY), cfg.rope_of(here.layer)
        score = lowrank_scores(
            q_BTNH.astype(layer.low_BSY.dtype), layer.low_BSY, layer.basis_BYKH, jnp.maximum(layer.order_BS, 0), page,
            jnp.asarray(frequencies(rope, H)), gain=rope.attention_factor, page_size=R, scale=cfg.scale,
        )  # fmt: skip
        score = cfg.softcap * jnp.tanh(score / cfg.softcap) if cfg.softcap else score

        def fold(x):
            return jnp.moveaxis(x.reshape(B, K, T, M * R, *x.shape[3:]), 2, 1).reshape(B * T, K, M * R, *x.shape[3:])

        lo, hi = here.lo(ask.order_BT).reshape(-1, 1), ask.hi_BT.reshape(-1, 1)
        order = fold(order)[:, :, None]
        seen = (order >= lo[:, None, :, None]) & (order <= hi[:, None, :, None])
        score = jnp.moveaxis(score, 2, 1).reshape(B * T, K, N // K, 1, M * R)
        p, lse = softmax(score, seen[:, :, None])
        return combine(p, fold(self.values(layer, row))).reshape(B, T, N, H), lse.reshape(B, T, N)

    def values(self, layer: Shadow, row_BKM: jax.Array) -> jax.Array:
        return rows_from_host(layer.v_BKSH, row_BKM) if self.host else take_rows(layer.v_BKSH, row_BKM)

    def place(self, layers: tuple[Shadow, ...]) -> tuple[Shadow, ...]:
        return tuple(layer.replace(v_BKSH=place(layer.v_BKSH)) for layer in layers) if self.host else layers

    def bytes_moved(self, layer: Shadow, here: Here) -> int:
        if not self.host:
            return 0
        B, K, S, H = layer.v_BKSH.shape
        return B * K * min(self.chunks_read(S) * self.chunk_rows, S) * H * layer.v_BKSH.dtype.itemsize

    def kept(self, layer: Shadow) -> jax.Array:
        """The rows kept in full; every other row can still be read through its chunk."""
        return layer.exact.order_BKC

    def bytes_read(self, layer: Shadow, here: Here) -> int:
        S, R = layer.order_BS.shape[1], self.chunk_rows
        part = min(self.chunks_read(S) * R, S) * here.cfg.K  # rows rebuilt, summed over heads
        row = layer.low_BSY.shape[2] * layer.low_BSY.dtype.itemsize + layer.v_BKSH.shape[3] * layer.v_BKSH.dtype.itemsize + 4
        always = tree_bytes((layer.basis_BYKH, layer.landmark_BKPH, layer.open_BKP, layer.exact))
        return always + part * row * layer.order_BS.shape[0]
