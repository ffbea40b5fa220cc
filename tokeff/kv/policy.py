"""Seam 1: what a layer keeps and what its queries read.

A `Policy` is a frozen dataclass with two duties. `pack` turns the rows of a dense prefill into the policy's own cache, between
jitted calls, where any shape may change. `attend` is one layer of one decode call: it takes this call's unrotated queries, keys
and values and the layer's cache, and returns the attention output and the new cache. `Full` is the policy that keeps everything.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from tokeff.kv.cache import Room, Rows, commit, empty_draft, hold, whole_tiles, write
from tokeff.kv.evidence import Ask as Ask
from tokeff.kv.evidence import Evidence
from tokeff.kv.host import fetch
from tokeff.kv.read import read_rows
from tokeff.models.flow import EMPTY, Accepted, Flow, Here


class Prefilled(struct.PyTreeNode):
    """One layer after the dense prefill: S rows in order, keys rotated, and the evidence that was asked for."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array
    order_BKS: jax.Array  # (B, 1, S) where all heads hold the same rows
    length_B: jax.Array  # of the prompt; a pass may have let fewer rows reach this layer
    index: jax.Array  # () number of the layer, as an array so that layers that are alike share compiled code
    evidence_BKS: dict[Evidence, Any]  # attention mass of each stored row, or what else was asked for
    whole_B: jax.Array | None = None  # while rows are dropped between pieces of a prompt: how many there are with those gone or to come
    whole: int | None = struct.field(pytree_node=False, default=None)  # the most that whole_B can be
    head_BK: jax.Array | None = None  # which kv heads these are, where a pass let others go

    @property
    def here_B(self) -> jax.Array:
        """How many rows are here."""
        return (self.order_BKS != EMPTY).sum(axis=2, dtype=jnp.int32).max(axis=1)

    @property
    def count_B(self) -> jax.Array:
        """Of how many rows a budget is a share."""
        return self.here_B if self.whole_B is None else self.whole_B

    @property
    def most(self) -> int:
        """What count_B cannot exceed."""
        return self.order_BKS.shape[2] if self.whole is None else self.whole


@dataclass(frozen=True)
class Policy:
    """Base class: what every policy declares, with the defaults of one that only changes what is kept at the end of prefill."""

    asks: ClassVar[tuple[Evidence, ...]] = ()
    chunk: ClassVar[int | None] = None  # the most certain rows one call may bring; None = any number
    raw_keys: ClassVar[bool] = False  # takes the rotation off a prompt's keys, by their orders
    lasts: ClassVar[bool] = True  # its caches can be saved: what shapes they have follows from the settings and the numbers of rows
    span: ClassVar[str] = "layer"  # what a budget is the mean over: the heads of a 'layer', or of the whole 'model'

    def needs(self) -> tuple[Evidence, ...]:
        """Evidence this policy wants from prefill."""
        return self.asks

    def check(self, cfg, length: int) -> None:
        """Raise UserError when the policy cannot work on this model and prompt length."""

    def fit(self, m: Any) -> Policy:
        """This policy with what it leaves open filled in from a `tokeff.models.load.Model`: what depends on its tokenizer, say. What is
        generated, measured or saved is what comes out. The default fills in the policies inside it."""
        inside = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: x.fit(m) for name, x in inside.items() if isinstance(x, Policy)})

    def seeing(self, marks: tuple[int, ...]) -> Policy:
        """This policy for texts in which these tokens stand for rows of pictures. The default tells the policies inside it."""
        inside = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: x.seeing(marks) for name, x in inside.items() if isinstance(x, Policy)})

    def drafts(self, depth: int) -> str | None:
        """None when tree drafts of this depth equal one-row decoding under the policy; else the reason they do not."""
        return None

    def alone(self, run: tuple[int, ...], cfg) -> str | None:
        """None when a drafter may run these layers alone, row by row of its draft (drafters that speculate with the model's own layers);
        else the reason it may not. What such a call leaves in a layer is overwritten by the pass that verifies."""
        return None

    def by_head(self) -> str | None:
        """None when some heads of a layer can be under it, beside another policy (kv/classes.py); else the reason they cannot."""
        return None if type(self).pack is Policy.pack else "it decides over all layers at once"

    def role(self, layer: int) -> Any:
        """What this layer does under the policy. Layers with equal roles share compiled code, so a policy whose methods read
        `here.layer` must tell them apart here; None when all layers are alike."""
        return None

    def squeeze(self, rows: Prefilled, here: Here) -> Prefilled:
        """What stays of these rows before the next piece of a prompt that is read in bounded memory (kv/bounded.py); all of them here."""
        return rows

    def plan(self, layers: tuple[Prefilled, ...], cfg) -> Policy:
        """This policy with the shapes that depend on the rows themselves written into it. `pack` has them planned."""
        return self

    def pack(self, layers: tuple[Prefilled, ...], room: Room, cfg) -> tuple[Any, ...]:
        """The policy's cache from a dense prefill. Policies that decide over the whole model override this."""
        return tuple(self.pack_layer(p, room, Here(i, cfg)) for i, p in enumerate(layers))

    def pack_layer(self, rows: Prefilled, room: Room, here: Here) -> Any:
        raise NotImplementedError

    def fork(self, layers: tuple[Any, ...], times: int, room: Room) -> tuple[Any, ...]:
        """The packed layers with every sequence `times` times, side by side, each with `room` of its own behind what it holds. Copies by
        default; a policy that keeps what sequences share once (kv/shared.py) gives new room, others had it when they packed."""
        return self.place(jax.tree.map(lambda x: jnp.repeat(fetch(x), times, axis=0), layers))

    def onward(self) -> Policy:
        """The policy that goes on from what this one packed: itself, or one that does the same to such caches and stands for many, so
        that methods that differ in the prompt alone share the programs that decode."""
        return self

    def attend(self, q, k, v, ask: Flow, new: Flow, layer, accepted: Accepted | None, across, here: Here):
        raise NotImplementedError

    def place(self, layers: tuple[Any, ...]) -> tuple[Any, ...]:
        """The packed layers with what belongs in host memory there (kv/host.py). Called between jitted calls."""
        return layers

    def bytes_moved(self, layer: Any, here: Here) -> int:
        """Bytes that one decode step brings over from host memory."""
        return 0

    def vacancy(self, layer: Any) -> jax.Array | None:
        """accept_B: how many of this call's draft rows may become real before the next boundary; None = no limit."""
        return None

    def kept(self, layer: Any) -> jax.Array:
        """order_BKC of the rows a query may still read, for pictures and tests."""
        return layer.order_BKC

    def bytes_read(self, layer: Any, here: Here) -> int:
        """Bytes of this layer's arrays that one decode step reads, metadata included."""
        return tree_bytes(layer)


def tree_bytes(tree: Any) -> int:
    """Bytes of every array in a pytree (arrays or ShapeDtypeStructs)."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def pad_slots(x: jax.Array, C: int, axis: int, fill=0) -> jax.Array:
    """Pad one axis at its end to C."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, C - x.shape[axis])
    return jnp.pad(x, widths, constant_values=fill)


@dataclass(frozen=True)
class Full(Policy):
    """Keep every row, read every row: the baseline. Slots are in order, so selection policies build on its store."""

    def pack_layer(self, rows: Prefilled, room: Room, here: Here) -> Rows:
        C = whole_tiles(rows.k_BKSH.shape[2] + room.rows, rows.k_BKSH.dtype)
        B, K = rows.k_BKSH.shape[:2]
        order = jnp.broadcast_to(pad_slots(rows.order_BKS, C, 2, EMPTY), (B, K, C))
        k, v = pad_slots(rows.k_BKSH, C, 2), pad_slots(rows.v_BKSH, C, 2)
        return Rows(k, v, order, rows.here_B, draft=empty_draft(k, room.draft))

    def attend(self, q, k, v, ask: Flow, new: Flow, layer: Rows, accepted: Accepted | None, across, here: Here):
        q, k = here.rotate(q, ask.angle_BT[:, :, None]), here.rotate(k, new.angle_BT[:, :, None])
        layer = append(layer, k, v, new, accepted)
        return read_rows(q, layer, ask, here), layer, across


def append(layer: Rows, k_BTKH: jax.Array, v_BTKH: jax.Array, new: Flow, accepted: Accepted | None) -> Rows:
    """This call's rows into an append-only store: certain rows to slots, draft rows aside after the accepted ones moved in."""
    k, v = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    if new.among_BTW is None:
        return write(layer, k, v, new.order_BT)
    assert accepted is not None
    return hold(commit(layer, accepted), k, v, new)
