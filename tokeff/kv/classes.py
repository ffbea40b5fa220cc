"""Two classes of heads in one layer, each under a policy of its own: retrieval heads that keep everything, others that keep little."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tokeff.errors import UserError
from tokeff.kv.cache import Room
from tokeff.kv.evidence import Evidence
from tokeff.kv.policy import Policy, Prefilled, pad_slots
from tokeff.models.flow import EMPTY, Accepted, Flow, Here

Heads = tuple[tuple[int, ...], ...]  # kv heads of each layer; one entry serves every layer


class Classed(struct.PyTreeNode):
    """A layer: the caches of the chosen kv heads and of the others, None for a class without heads. Each has its heads as its K."""

    some: Any
    rest: Any
    heads: tuple[int, ...] = struct.field(pytree_node=False)


@dataclass(frozen=True)
class ByClass(Policy):
    """The kv heads named in `heads` under the policy `some`, all others under `rest`: two stores, each as large as its own rows.

    A head is written and read by its own class alone, with the query heads of its group. On a mesh that does not divide the number of
    heads of both classes, the caches stay whole on every device.
    """

    some: Policy
    rest: Policy
    heads: Heads

    def of(self, layer: int) -> tuple[int, ...]:
        return self.heads[layer if len(self.heads) > 1 else 0]

    @property
    def chunk(self) -> int | None:  # type: ignore[override]
        return min((c for c in (self.some.chunk, self.rest.chunk) if c is not None), default=None)

    def needs(self) -> tuple[Evidence, ...]:
        return tuple(dict.fromkeys((*self.some.needs(), *self.rest.needs())))

    def check(self, cfg, length: int) -> None:
        if len(self.heads) not in (1, cfg.L):
            raise UserError(f"heads names {len(self.heads)} layers and {cfg.name} has {cfg.L}; give one entry for all, or one a layer")
        if any(sorted(set(some)) != list(some) or not set(some) <= set(range(cfg.K)) for some in self.heads):
            raise UserError(f"heads must be ascending numbers of kv heads, 0 to {cfg.K - 1} in {cfg.name}; got {str(self.heads)[:60]}")
        for policy in (self.some, self.rest):
            if reason := policy.by_head():
                raise UserError(f"{type(policy).__name__} cannot have a class of heads: {reason}")
            policy.check(cfg, length)

    def drafts(self, depth: int) -> str | None:
        return self.some.drafts(depth) or self.rest.drafts(depth)

    def alone(self, run: tuple[int, ...], cfg) -> str | None:
        return self.some.alone(run, cfg) or self.rest.alone(run, cfg)

    def by_head(self) -> str | None:
        return "its classes name heads of the whole layer"

    def onward(self) -> Policy:
        return dataclasses.replace(self, some=self.some.onward(), rest=self.rest.onward())

    def role(self, layer: int):
        return self.of(layer), self.some.role(layer), self.rest.role(layer)

    def parts(self, heads: tuple[int, ...], here: Here) -> list[tuple[str, Policy, np.ndarray, Here]]:
        """(field, policy, kv heads, here as its heads see it) of each class that has heads."""
        G, rest = here.cfg.N // here.cfg.K, tuple(h for h in range(here.cfg.K) if h not in heads)
        return [
            (name, policy, np.array(own), dataclasses.replace(here, cfg=dataclasses.replace(here.cfg, K=len(own), N=G * len(own))))
            for name, policy, own in (("some", self.some, heads), ("rest", self.rest, rest))
            if own
        ]

    def pack_layer(self, rows: Prefilled, room: Room, here: Here) -> Classed:
        heads, G = self.of(here.layer), here.cfg.N // here.cfg.K
        packed = {}
        for name, policy, own, inside in self.parts(heads, here):
            evidence = {a: x for a, x in rows.evidence_BKS.items() if a in policy.needs()}
            packed[name] = policy.pack_layer(rows_of(rows.replace(evidence_BKS=evidence), own, G), room, inside)
        return Classed(packed.get("some"), packed.get("rest"), heads)

    def squeeze(self, rows: Prefilled, here: Here) -> Prefilled:
        """What each class leaves. All heads of a layer that is being read lie in one array, as long as the longer class: where that holds
        everything the rows of the other go and free nothing."""
        parts, G = self.parts(self.of(here.layer), here), here.cfg.N // here.cfg.K
        left = [policy.squeeze(rows_of(rows, own, G), inside) for _, policy, own, inside in parts]
        most, at = max(part.order_BKS.shape[2] for part in left), np.argsort(np.concatenate([own for _, _, own, _ in parts]))

        def together(of, fill=0):
            return jnp.concatenate([pad_slots(of(part), most, 2, fill) for part in left], axis=1)[:, at]

        return rows.replace(
            k_BKSH=together(lambda part: part.k_BKSH), v_BKSH=together(lambda part: part.v_BKSH),
            order_BKS=together(lambda part: jnp.broadcast_to(part.order_BKS, part.k_BKSH.shape[:3]), EMPTY),
            evidence_BKS={
                a: together(lambda part, a=a: part.evidence_BKS[a]) if a.per_row else x for a, x in rows.evidence_BKS.items()
            },
        )  # fmt: skip

    def attend(self, q, k, v, ask: Flow, new: Flow, layer: Classed, accepted: Accepted | None, across, here: Here):
        G, outs, order = here.cfg.N // here.cfg.K, [], []
        for name, policy, own, inside in self.parts(layer.heads, here):
            asked = (own[:, None] * G + np.arange(G)).reshape(-1)
            out, part, _ = policy.attend(
                q[:, :, asked], k[:, :, own], v[:, :, own], ask, new, getattr(layer, name), accepted, None, inside
            )
            layer = layer.replace(**{name: part})
            outs.append(out)
            order.append(asked)
        return jnp.concatenate(outs, axis=2)[:, :, np.argsort(np.concatenate(order))], layer, across

    def place(self, layers: tuple[Classed, ...]) -> tuple[Classed, ...]:
        def placed(policy: Policy, part: Any) -> Any:
            return None if part is None else policy.place((part,))[0]

        return tuple(layer.replace(some=placed(self.some, layer.some), rest=placed(self.rest, layer.rest)) for layer in layers)

    def bytes_moved(self, layer: Classed, here: Here) -> int:
        return sum(policy.bytes_moved(getattr(layer, name), inside) for name, policy, _, inside in self.parts(layer.heads, here))

    def vacancy(self, layer: Classed) -> jax.Array | None:
        free = [policy.vacancy(part) for policy, part in ((self.some, layer.some), (self.rest, layer.rest)) if part is not None]
        free = [f for f in free if f is not None]
        return jnp.stack(free).min(axis=0) if free else None

    def kept(self, layer: Classed) -> jax.Array:
        held = [policy.kept(part) for policy, part in ((self.some, layer.some), (self.rest, layer.rest)) if part is not None]
        C = max(order.shape[2] for order in held)
        order = jnp.concatenate([pad_slots(order, C, 2, EMPTY) for order in held], axis=1)
        others = [h for h in range(order.shape[1]) if h not in layer.heads]
        return order[:, np.argsort([*layer.heads, *others])]

    def bytes_read(self, layer: Classed, here: Here) -> int:
        return sum(policy.bytes_read(getattr(layer, name), inside) for name, policy, _, inside in self.parts(layer.heads, here))


def rows_of(rows: Prefilled, own: np.ndarray, G: int) -> Prefilled:
    """A prefilled layer as these kv heads see it, each with G query heads."""
    order = rows.order_BKS if rows.order_BKS.shape[1] == 1 else rows.order_BKS[:, own]
    evidence = {a: a.heads(x, own, G) for a, x in rows.evidence_BKS.items()}
    return rows.replace(k_BKSH=rows.k_BKSH[:, own], v_BKSH=rows.v_BKSH[:, own], order_BKS=order, evidence_BKS=evidence)
