"""LazyLLM's decoding: rows of the prompt that a step chooses, and the layers above have not got, come back half-way up.

A row comes back at the layer where it was dropped. It runs, with the rows that come back beside it, through the layers up to the next one
that chooses: there it writes its key and value and waits again, or goes on at once if it is chosen there too. So no layer computes a
row twice, and above the last layer that chooses a row is as if it had never been dropped.

Rows that come back are older than the row whose step it is, so they do not depend on it: they run by themselves, `rows` at a time, oldest
first, in a loop that turns as often as there are rows, and not at all where there are none. The newest row runs as in plain decoding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from tokeff.decode.draft import Draft, Drafter, Plain, Target
from tokeff.decode.loop import Decoding, rows_of
from tokeff.errors import UserError
from tokeff.kv.budget import Budget, most_rows
from tokeff.models.flow import EMPTY, Flow, Here
from tokeff.models.transformer import alike, one_layer, project, rms_norm
from tokeff.reduce.cascade import LastRowCascade
from tokeff.reduce.methods import lazyllm
from tokeff.reduce.revival import Chosen, LazyRows, Slots, arrived, put_rows, read


class Revived(struct.PyTreeNode):
    """rows_B: how often a row of each prompt has come back, at any layer."""

    rows_B: jax.Array


@dataclass(frozen=True)
class Waking(LazyRows):
    """`LazyRows` whose layers may choose `most` rows that the layers above have not got."""

    most: Budget = 1.0

    def absent(self, S: int) -> int:
        return most_rows(self.most, S)


@dataclass(frozen=True)
class Asking(LazyRows):
    """`LazyRows` for rows that every layer holds already."""

    def role(self, layer: int) -> Any:
        return None

    def attend(self, q, k, v, ask: Flow, new: Flow, layer: Slots, accepted, across: Chosen | None, here: Here):
        return read(here.rotate(q, ask.angle_BT[:, :, None]), layer, across, ask, here), layer, across


@dataclass(frozen=True)
class Revive(Drafter):
    """LazyLLM's decoding with its Aux Cache (Fu et al. 2024, sec. 3.2), over the caches of `LazyRows`. The state is a `Revived`.

    most: how many rows, of a prompt's, come back in one step at one layer, the best of those that are missing; budgets are then met with
    rows that are there. A share of the prompt or a number; 1.0, the paper's rule, has no bound. rows: so many run at a time, which changes
    no result.
    """

    most: Budget = 1.0
    rows: int = 16

    nodes: ClassVar[int] = 1  # type: ignore[misc]
    depth: ClassVar[int] = 0  # type: ignore[misc]
    exact: ClassVar[bool] = False

    def __post_init__(self):
        fine = 0 < self.most <= 1 if isinstance(self.most, float) else self.most >= 1
        if not fine or self.rows < 1:
            raise UserError(f"most={self.most} must be a share in (0, 1] or a number of rows, rows={self.rows} 1 or more; leave them out")

    def fits(self, policy, cfg) -> str | None:
        if isinstance(policy, LazyRows):
            return None
        return "rows come back into caches that kept their places; give **tokeff.decode.revive.revived(cut), or kv=LazyRows(cut)"

    def init(self, B: int, V: int) -> Revived:
        return Revived(jnp.zeros(B, jnp.int32))

    def draft(self, s: Decoding, target: Target) -> tuple[Draft, Decoding]:
        draft = Plain().propose((), s.tokens_BS, s.count_B)
        flow, _ = rows_of(target.params, target.cfg, s, draft, self)
        flow, layers, chosen, rows_B = self.climb(flow, s.layers, target)
        state = Revived(s.drafter.rows_B + rows_B)
        return draft.replace(x_BWD=flow.x_BTD, below=target.cfg.L), s.replace(layers=layers, drafter=state)

    def climb(self, flow: Flow, layers: tuple[Slots, ...], target: Target):
        """(the newest row behind the last layer, the new caches, {layer: what it chose}, how many rows came back at any layer)."""
        assert isinstance(target.policy, LazyRows), "`fits` lets no other through"
        cfg, policy, held, across, chosen = target.cfg, Waking(target.policy.cut, self.most), list(layers), None, {}
        rows_B, stages = jnp.zeros(flow.order_BT.shape[0], jnp.int32), tuple(policy.chooses(cfg, layers[0].S))
        x_BSD = layers[stages[0]].x_BSD if stages else None
        if stages:
            held[stages[0]] = held[stages[0]].replace(x_BSD=None)
        for i, w in enumerate(target.params.blocks):
            below, here = across, Here(alike(policy, None, cfg, i), cfg)
            flow, held[i], across = one_layer(w, flow, held[i], None, below, policy=policy, cut=None, here=here)
            if i in stages:
                chosen[i] = across
                if x_BSD is not None:
                    end = next((j for j in stages if j > i), cfg.L - 1)
                    x_BSD, many_B = self.wake(held, x_BSD, i, end, below, across, policy, target)
                    rows_B += many_B
        if stages:
            held[stages[0]] = held[stages[0]].replace(x_BSD=x_BSD)
        return flow, tuple(held), chosen, rows_B

    def wake(self, held: list[Slots], x_BSD: jax.Array, i: int, end: int, below, across: Chosen, policy: Waking, target: Target):
        """(the vectors that wait, how many rows came back at layer i): `held` gets them, from the layer above i up to `end`."""
        layer, S, missing = held[i], held[i].S, held[i].missing(across.slot_BM)
        rows_B, R = missing.sum(axis=1, dtype=jnp.int32), min(self.rows, missing.shape[1])
        slot_BM = jnp.sort(jnp.where(missing, across.slot_BM, S), axis=1)  # oldest first: each reads those before it
        padded = jnp.pad(slot_BM, ((0, 0), (0, -slot_BM.shape[1] % R)), constant_values=S)

        def go(carry):
            return carry[0] * R < rows_B.max()

        def some(carry):
            t, above, x_BSD = carry
            at_BR = jax.lax.dynamic_slice_in_dim(padded, t * R, R, axis=1)
            flow = waiting(layer, x_BSD, at_BR)
            flow, above = lift(flow, layer, above, jnp.where(at_BR == S, EMPTY, at_BR), i, below, across, policy, target)
            return t + 1, above, put_rows(x_BSD, at_BR, flow.x_BTD)

        _, held[i + 1 : end + 1], x_BSD = jax.lax.while_loop(go, some, (jnp.int32(0), held[i + 1 : end + 1], x_BSD))
        held[i] = layer.risen(slot_BM)
        return x_BSD, rows_B


def waiting(layer: Slots, x_BSD: jax.Array, at_BR: jax.Array) -> Flow:
    """The rows in these slots of a layer (S: none), as they entered it."""
    gone, at = at_BR == layer.S, jnp.minimum(at_BR, layer.S - 1)
    order = jnp.where(gone, EMPTY, jnp.take_along_axis(layer.rows.order_BKC[:, 0], at, axis=1))
    return Flow(jnp.take_along_axis(x_BSD, at[..., None], axis=1), order, jnp.maximum(order, 0), order)


def lift(
    flow: Flow, layer: Slots, above: list[Slots], at_BR: jax.Array, i: int, below: Chosen | None, across: Chosen, policy: Waking,
    target: Target,
) -> tuple[Flow, list[Slots]]:  # fmt: skip
    """(rows that wait at layer i, as they enter the last of the layers `above` it, and these): in layer i they ask only, where their keys
    are; in the last they write only, since they wait there or are at the top."""
    cfg, blocks, above = target.cfg, target.params.blocks, list(above)
    asking, here = Asking(policy.cut), Here(alike(Asking(policy.cut), None, cfg, i), cfg)
    below = None if below is None else below.replace(at_BT=at_BR)
    flow, _, _ = one_layer(blocks[i], flow, layer, None, below, policy=asking, cut=None, here=here)
    for n, j in enumerate(range(i + 1, i + len(above))):
        here = Here(alike(policy, None, cfg, j), cfg)
        flow, above[n], _ = one_layer(blocks[j], flow, above[n], None, across.replace(at_BT=at_BR), policy=policy, cut=None, here=here)
    end = i + len(above)
    _, k, v = project(blocks[end], cfg, rms_norm(flow.x_BTD, blocks[end].attn_norm_D, cfg.eps))
    above[-1] = arrived(above[-1], k, v, flow, at_BR, Here(end, cfg))
    return flow, above


def revived(cut: LastRowCascade | None = None, most: Budget = 1.0, rows: int = 16) -> dict[str, Any]:
    """LazyLLM whole, the three parts that it takes: `generate(m, text, **revived(lazyllm(0.5)))`, `Setup(**revived())`."""
    cut = lazyllm() if cut is None else cut
    return {"kv": LazyRows(cut), "cut": cut, "decode": Revive(most, rows)}
