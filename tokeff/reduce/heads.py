"""A pass that lets heads go as well as rows: SpAtten's two cascades in one (Wang et al. 2021, sec. III-A and III-B, alg. 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from tokeff.errors import UserError
from tokeff.kv.budget import Budget, most_rows
from tokeff.kv.policy import Policy
from tokeff.kv.some_heads import SomeHeads
from tokeff.models.flow import EMPTY, Flow, Here
from tokeff.reduce.cascade import Depth, MassCascade, layer_at
from tokeff.sharding import top_k


@dataclass(frozen=True)
class HeadCascade(MassCascade):
    """Rows go on that drew most attention so far, and of the heads those that said most so far: the sum of |attention output| over rows,
    channels and the layers below and at the stage. A head that is gone is gone in all layers above, of the prompt and in decoding.

    heads_at: the layers above which fewer heads are left, as numbers or shares of the depth. heads_left: how many are left there, as
    shares of all kv heads (rounded up) or numbers; never growing.

    A kv head goes with all its query heads, and is worth what these say together: keys and values belong to it, and as many are left in
    every sequence. Heads that are gone are not projected, attended with, held or read; of the prompt really not, in decoding all but
    their projections (`SomeHeads`).
    """

    heads_at: tuple[Depth, ...] = ()
    heads_left: tuple[Budget, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        for field, given in (("heads_at", self.heads_at), ("heads_left", self.heads_left)):
            if not isinstance(given, tuple):
                raise UserError(f"HeadCascade has stages: {field}={given!r} is no tuple; give for example {field}=({given!r},)")

    @property
    def narrows(self) -> bool:
        return any(share != 1.0 or isinstance(share, int) for share in self.heads_left)

    def head_layers(self, cfg) -> tuple[int, ...]:
        """The layers after which heads go."""
        return tuple(layer_at(a, cfg.L) for a in self.heads_at)

    def heads_in(self, layer: int, cfg) -> int:
        left = [most_rows(share, cfg.K) for at, share in zip(self.head_layers(cfg), self.heads_left, strict=True) if at < layer]
        return left[-1] if left else cfg.K

    def holds(self, policy: Policy) -> Policy:
        return SomeHeads(policy) if self.narrows and not isinstance(policy, SomeHeads) else policy

    def check_layers(self, cfg) -> None:
        super().check_layers(cfg)
        layers, K = self.head_layers(cfg), cfg.K
        if len(layers) != len(self.heads_left) or layers != tuple(sorted(set(layers))) or not all(0 <= at < cfg.L for at in layers):
            raise UserError(f"heads_at={self.heads_at}, heads_left={self.heads_left} do not fit {cfg.L} layers; give a share for each")
        if not all(0 < share <= (1 if isinstance(share, float) else K) for share in self.heads_left):
            raise UserError(f"heads_left={self.heads_left} leaves no number of {K} kv heads; give shares in (0, 1], or 1 to {K}")
        left = [most_rows(share, K) for share in self.heads_left]
        if left != sorted(left, reverse=True):
            raise UserError(f"heads_left={self.heads_left} leaves {left} of {K} kv heads at its stages; give shares that do not grow")

    def role(self, layer: int, cfg) -> Any:
        rows, stages = super().role(layer, cfg), self.head_layers(cfg)
        heard = layer if layer in stages else "listens" if stages and layer < stages[-1] else None
        return None if rows is None and heard is None else (rows, heard)

    def listen(self, out_BTNH: jax.Array, flow: Flow, here: Here) -> Flow:
        stages = self.head_layers(here.cfg)
        if not stages or here.layer > stages[-1]:
            return flow
        loud_BK = loudness(out_BTNH, flow.order_BT, here.cfg.N // here.cfg.K)
        loud_BK = loud_BK if flow.loud_BK is None else flow.loud_BK + loud_BK
        flow = flow.replace(loud_BK=loud_BK)
        left = self.heads_in(here.layer + 1, here.cfg)
        return flow if here.layer not in stages or left == loud_BK.shape[1] else loudest(flow, left)


def loudness(out_BTNH: jax.Array, order_BT: jax.Array, G: int) -> jax.Array:
    """float32 loud_BK: the absolute outputs of each kv head's query heads, summed over the rows that are there. What is no number is 0."""
    B, T, N, H = out_BTNH.shape
    there = jnp.isfinite(out_BTNH) & (order_BT != EMPTY)[..., None, None]
    said = jnp.where(there, jnp.abs(out_BTNH.astype(jnp.float32)), 0.0)
    return said.reshape(B, T, N // G, G, H).sum(axis=(1, 3, 4))


def loudest(flow: Flow, left: int) -> Flow:
    """The flow with so many of its heads, those that said most, lower ones first among equals; and what these said."""
    assert flow.loud_BK is not None
    _, index = top_k(flow.loud_BK, left, "BK")
    index = jnp.sort(index, axis=1).astype(jnp.int32)
    head = index if flow.head_BK is None else jnp.take_along_axis(flow.head_BK, index, axis=1)
    return flow.replace(head_BK=head, loud_BK=jnp.take_along_axis(flow.loud_BK, index, axis=1))
