"""CompressKV (Lin et al. 2025): a few heads of each layer say which rows matter, and measured errors how many rows a layer needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tokeff.errors import UserError
from tokeff.kernels import column_mass
from tokeff.kv.budget import most_rows
from tokeff.kv.cache import Room
from tokeff.kv.classes import Heads
from tokeff.kv.evidence import Ask, Evidence, Seen
from tokeff.kv.extend import extend, pack
from tokeff.kv.keep import Keep, part_of
from tokeff.kv.policy import Full, Policy, Prefilled
from tokeff.kv.prefill import prefill
from tokeff.kv.score import WindowMass
from tokeff.models.attention import scores, softmax
from tokeff.models.config import Params
from tokeff.models.flow import EMPTY, Accepted, Flow, Here
from tokeff.models.load import Model
from tokeff.models.transformer import linear
from tokeff.sharding import beside

OUT = "output_DNH"  # in `Block.side`


@dataclass(frozen=True)
class HeadMass(Evidence):
    """Attention mass from the last `last` rows, the mean over the query heads named for the layer, the same for every kv head."""

    last: int
    judges: Heads
    per_row: ClassVar[bool] = True

    def of(self, layer: int) -> tuple[int, ...]:
        return self.judges[layer if len(self.judges) > 1 else 0]

    def check(self, cfg, length: int) -> None:
        if len(self.judges) not in (1, cfg.L):
            raise UserError(f"judges names {len(self.judges)} layers and {cfg.name} has {cfg.L}; give one entry for all, or one a layer")
        if any(not some or not set(some) <= set(range(cfg.N)) for some in self.judges):
            raise UserError(f"every layer needs a query head, 0 to {cfg.N - 1} in {cfg.name}; got {str(self.judges)[:60]}")

    def attends(self) -> float:
        return self.last

    def by_head(self) -> str:
        return "its judges are heads of the whole layer"

    def role(self, layer: int) -> tuple[int, ...]:
        return self.of(layer)

    def like(self, B: int, S: int, cfg) -> Any:
        return jax.ShapeDtypeStruct((B, cfg.K, S), "float32")

    def gather(self, seen: Seen, before, here: Here) -> jax.Array:
        own, row = np.array(self.of(here.layer)), seen.ask.order_BT
        k = seen.k_BKSH[:, own // (here.cfg.N // here.cfg.K)]
        stored = jnp.broadcast_to(seen.order_BKS, seen.k_BKSH.shape[:3])[:, own // (here.cfg.N // here.cfg.K)]
        weight = Ask(last=self.last).weight(row, seen.length_B)
        mass = column_mass(
            seen.q_BTNH[:, :, own], k, seen.lse_BTN[:, :, own], stored, here.lo(row), row, weight,
            scale=here.cfg.scale, softcap=here.cfg.softcap,
        )  # fmt: skip
        found = jnp.broadcast_to(mass.mean(axis=1, keepdims=True), seen.k_BKSH.shape[:3])
        return found if before is None else found.at[..., : before.shape[-1]].add(before)

    def longer(self, value, more_B: jax.Array) -> None:
        return None


@dataclass(frozen=True)
class HeadWindow(WindowMass):
    """SnapKV's score by the attention of some query heads alone, for all kv heads of the layer (Lin et al. 2025, eq. 4)."""

    heads: Heads = ((0,),)

    @property
    def asked(self) -> HeadMass:
        return HeadMass(self.window, self.heads)


@dataclass(frozen=True)
class ByImportance(Keep):
    """A budget that is the mean over layers: each keeps `floor` rows (a number, or a share of it; never less than `recent`, a number), and
    by its `importance` (one number a layer, with sum 1; none: all alike) of what is left; at most three times the mean, and what is
    cut there is left unused (Lin et al. 2025, eq. 6, with a floor of 32 rows).
    """

    importance: tuple[float, ...] = ()
    floor: float | int = 0.25
    span: ClassVar[str] = "model"

    def role(self, layer: int) -> Any:
        return self.importance[layer] if self.importance else None

    def check(self, cfg, length: int) -> None:
        super().check(cfg, length)
        if self.evict or isinstance(self.recent, float):
            raise UserError("budgets that differ by layer are made once, around a fixed window; set evict=0 and recent to a number")
        if self.importance and (len(self.importance) != cfg.L or min(self.importance) < 0 or abs(sum(self.importance) - 1) > 1e-3):
            raise UserError(f"importance must be {cfg.L} shares with sum 1, one a layer of {cfg.name}; measure it with layer_importance")
        mean = most_rows(self.budget, length)
        if self.floor < 0 or (self.importance and part_of(self.floor, mean) > mean):
            raise UserError(f"floor={self.floor} of a mean budget of {mean} rows is no part of it; give a share, or 0 to {mean} rows")

    def rows(self, n: Any, here: Here) -> Any:
        mean = super().rows(n, here)
        if not self.importance:
            return mean
        counted = isinstance(n, int)
        least, most = (min, max) if counted else (jnp.minimum, jnp.maximum)
        floor = least(most(part_of(self.floor, mean), self.recent), mean)
        more = self.importance[here.layer] * here.cfg.L * (mean - floor) + 1e-3
        return least(least(floor + (int(more) if counted else more.astype(jnp.int32)), 3 * mean), n)


@dataclass(frozen=True)
class SpanMass(Evidence):
    """Attention of each query head, over the last `last` rows, to the rows start to stop - 1: (B, N)."""

    last: int
    start: int
    stop: int

    def gather(self, seen: Seen, before, here: Here) -> jax.Array:
        asks = Ask(last=self.last).weight(seen.ask.order_BT, seen.length_B)[:, -self.last :]
        q, place = seen.q_BTNH[:, -self.last :], seen.ask.order_BT[:, -self.last :, None]
        order = seen.order_BKS[:, 0][:, None]
        visible = (order != EMPTY) & (order >= here.lo(place)) & (order <= place)
        p, _ = softmax(scores(q, seen.k_BKSH, here.cfg.scale, here.cfg.softcap), visible[:, None, None])
        inside = (order >= self.start) & (order < self.stop)
        return jnp.einsum("bkgts,bt,bs->bkg", p, asks, inside[:, 0].astype(p.dtype)).reshape(len(asks), -1)


def semantic_heads(m: Model, needles, count: int = 4) -> Heads:
    """The `count` query heads of each layer with the most attention on a needle's whole span while its answer is given (Lin et al. 2025,
    sec. 3.1). needles: (token ids of a prompt, (start, stop) of the needle in them, token ids of the answer), those that the model
    answers rightly; the paper sorts out the others by ROUGE. Use texts apart from what you evaluate on."""
    total = np.zeros((m.cfg.L, m.cfg.N))
    for prompt, (start, stop), answer in needles:
        ids = [*prompt, *answer[:-1]]  # the rows that say the answer: the prompt's last, and all of the answer's but its last
        ask = SpanMass(len(answer), start, stop)
        total += np.stack([np.asarray(layer.evidence_BKS[ask])[0] for layer in _read(m, ids, (ask,)).layers])
    best = np.argsort(-total, axis=1, kind="stable")[:, :count]
    return tuple(tuple(sorted(row.tolist())) for row in best)


class Compared(struct.PyTreeNode):
    """A layer kept in full and under a rule, and the squares of what the outputs differ by and of the full one."""

    full: Any
    small: Any
    apart_B: jax.Array
    whole_B: jax.Array


@dataclass(frozen=True)
class Compare(Policy):
    """Full attention, noting in each layer how far `rule` alone would have led from it behind the layer's output projection, which lies
    beside its weights (`projected`)."""

    rule: Policy

    def needs(self) -> tuple[Evidence, ...]:
        return self.rule.needs()

    def role(self, layer: int) -> Any:
        return self.rule.role(layer)

    def pack_layer(self, rows: Prefilled, room: Room, here: Here) -> Compared:
        zero = jnp.zeros(rows.order_BKS.shape[0])
        return Compared(Full().pack_layer(rows, room, here), self.rule.pack_layer(rows, room, here), zero, zero)

    def attend(self, q, k, v, ask: Flow, new: Flow, layer: Compared, accepted: Accepted | None, across, here: Here):
        out, full, _ = Full().attend(q, k, v, ask, new, layer.full, accepted, None, here)
        other, small, _ = self.rule.attend(q, k, v, ask, new, layer.small, accepted, None, here)

        def squares(x_BTNH):
            assert here.side is not None
            x = linear(x_BTNH, here.side[OUT])
            return jnp.where((ask.order_BT != EMPTY)[..., None], jnp.square(x.astype(jnp.float32)), 0.0).sum(axis=(1, 2))

        return out, Compared(full, small, layer.apart_B + squares(out - other), layer.whole_B + squares(out)), across


def projected(params: Params) -> Params:
    """The model with each layer's output projection beside its weights, where a policy finds it."""
    return params.replace(blocks=tuple(w.replace(side=(w.side or {}) | {OUT: w.o_DNH}) for w in params.blocks))


def layer_importance(m: Model, contexts, rule: Policy) -> tuple[float, ...]:
    """For `compresskv(importance=...)`: the relative error (Frobenius) of each layer's attention output on a question, behind the output
    projection, when that layer alone is compressed by `rule` (published: to 32 rows), normalised over layers and averaged over texts (Lin
    et al. 2025, eq. 5).

    contexts: (token ids of a context, token ids of a question).
    """
    total, params = np.zeros(m.cfg.L), projected(m.params)
    for context, question in contexts:
        policy, prompt = Compare(rule), _read(m, context, rule.needs())
        tokens, length = jnp.asarray([question], jnp.int32), jnp.asarray([len(question)], jnp.int32)
        with beside(m.params):
            layers = pack(policy, prompt.layers, Room(len(question)), m.cfg)
            _, layers = extend(params, m.cfg, layers, tokens, prompt.next_B, length, policy)
        error = np.array([float((layer.apart_B[0] / layer.whole_B[0]) ** 0.5) for layer in layers])
        total += error / error.sum()
    return tuple((total / total.sum()).tolist())


def _read(m: Model, ids, evidence: tuple[Evidence, ...]):
    """A dense prefill of one text."""
    tokens, length = jnp.asarray([ids], jnp.int32), jnp.asarray([len(ids)], jnp.int32)
    with beside(m.params):
        return prefill(m.params, m.cfg, tokens, length, evidence=evidence, dtype=m.precision.cache)
