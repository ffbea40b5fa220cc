"""A small draft model from the target's own words (Zhou et al. 2023, DistillSpec: on-policy text, forward KL): what the target says is
most likely behind every place of a text, a student made of some of its layers, and the step that brings the two together.

The student has the target's embedding, head and vocabulary, frozen; its layers and its last norm are trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from tokeff.decode.draft import Plain
from tokeff.decode.loop import begin
from tokeff.decode.sample import Sampling, row_keys
from tokeff.kv.cache import Room
from tokeff.kv.extend import pack
from tokeff.kv.policy import Full
from tokeff.kv.prefill import Gather, blank, run_layers
from tokeff.models.attention import NEG
from tokeff.models.borrow import of_layers
from tokeff.models.config import Config, Params
from tokeff.models.load import Model
from tokeff.models.transformer import embed, last_row, orders, rms_norm, unembed

FULL = Full()


class Lessons(struct.PyTreeNode):
    """Texts, and what the target says of them. known_B places are followed by what it said: id_BSY its Y most likely successors of the
    text up to and with that place, logp_BSY their log-probabilities at temperature 1."""

    tokens_BS: jax.Array
    known_B: jax.Array
    id_BSY: jax.Array
    logp_BSY: jax.Array


# -- the teacher


@dataclass(frozen=True)
class Teller(Plain):
    """Plain decoding that keeps the `rank` most likely successors of every place. Its state is the `Lessons` so far, without their text."""

    rank: int = 64

    def observe(self, state: Lessons, draft, result) -> Lessons:
        id_BY, logp_BY = likeliest(result.logits_BWV[:, 0], self.rank)
        at_B = jnp.where(result.count_B > 0, state.known_B, state.id_BSY.shape[1])  # rows that are done write nothing
        put = jax.vmap(lambda x, at, new: x.at[at].set(new, mode="drop"))
        return state.replace(
            known_B=state.known_B + result.count_B, id_BSY=put(state.id_BSY, at_B, id_BY), logp_BSY=put(state.logp_BSY, at_B, logp_BY)
        )


def likeliest(logits: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """(ids (..., Y), log-probabilities in float16) of the most likely tokens."""
    top, ids = jax.lax.top_k(jax.nn.log_softmax(logits.astype(jnp.float32)), rank)
    return ids.astype(jnp.int32), top.astype(jnp.float16)


@partial(jax.jit, static_argnames=("cfg", "rank"))
def told(params: Params, cfg: Config, x_BTD: jax.Array, *, rank: int) -> tuple[jax.Array, jax.Array]:
    """`likeliest` behind every row that left the last layer, one place of all texts after the other, so that logits stay small."""
    found = jax.lax.map(lambda x_BD: likeliest(unembed(params, cfg, x_BD), rank), jnp.swapaxes(x_BTD, 0, 1))
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), found)


def lessons(m: Model, tokens_BT: jax.Array, length_B: jax.Array, new: int, how: Sampling, seed: int, rank: int = 64) -> Lessons:
    """The target continues right-padded openings by at most `new` tokens, and says what it expected behind every place, those of the
    openings too. The last token of a text is followed by nothing."""
    (B, T), teller, cfg = tokens_BT.shape, Teller(rank=rank), m.cfg
    flow = embed(m.params, cfg, tokens_BT, orders(length_B, T))
    flow, layers = run_layers(m.params, cfg, flow, blank(cfg, B, length_B, m.precision.cache), policy=Gather())
    ids, logp = (jnp.pad(x, ((0, 0), (0, new), (0, 0))) for x in told(m.params, cfg, flow.x_BTD, rank=rank))
    table, logits = jnp.pad(tokens_BT, ((0, 0), (0, new))), unembed(m.params, cfg, last_row(flow))[:, 0]
    state = Lessons(jnp.zeros((B, 0), jnp.int32), length_B, ids, logp)
    s = begin(
        pack(FULL, layers, Room(new), cfg), table, length_B, jnp.zeros_like(length_B), logits, teller,
        row_keys(seed, jnp.arange(B)), jnp.full(B, new, jnp.int32), how, cfg.eos, state,
    )  # fmt: skip
    s = teller.drive(m.params, cfg, s, new, policy=FULL, how=how, eos=cfg.eos)
    return s.drafter.replace(tokens_BS=s.tokens_BS)


# -- the student


def student(m: Model, layers: Sequence[int], name: str) -> Model:
    """A model of these layers of the target, in this order, under its embedding, norm and head. UserError for layers it does not have."""
    cfg = of_layers(m.cfg, layers, name)
    return replace(m, cfg=cfg, params=m.params.replace(blocks=tuple(m.params.blocks[i] for i in layers), side=None), name=name)


def rows(params: Params, cfg: Config, tokens_BT: jax.Array, known_B: jax.Array) -> jax.Array:
    """Normed x_BTD that the head reads, of whole texts at once."""
    B, T = tokens_BT.shape
    flow = embed(params, cfg, tokens_BT, orders(known_B, T))
    flow, _ = run_layers(params, cfg, flow, blank(cfg, B, known_B, params.embed_VD.dtype), policy=Gather())
    return rms_norm(flow.x_BTD, params.norm_D, cfg.eps)


def divergence(top_BTY: jax.Array, rest_BT: jax.Array, logp_BTY: jax.Array) -> jax.Array:
    """KL_BT(target || student) in nats, where all tokens but the target's Y likeliest count as one.

    top_BTY: the student's logits of those Y, rest_BT: the log-sum-exp of its logits of all others, logp_BTY: what the target gives those Y.
    """
    p, norm = jnp.exp(logp_BTY), jnp.logaddexp(jax.nn.logsumexp(top_BTY, axis=-1), rest_BT)
    left = jnp.clip(1 - p.sum(axis=-1), 1e-6, 1.0)
    return (p * (logp_BTY - top_BTY)).sum(axis=-1) + left * (jnp.log(left) - rest_BT) + (p.sum(axis=-1) + left) * norm


def logits_of(x_BTD: jax.Array, head_VD: jax.Array, id_BTY: jax.Array, common: int, id_U: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the logits of the ids asked for, top_BTY; the log-sum-exp of those of all other tokens, rest_BT), the second estimated.

    id_U are distinct tokens: `common` that always count, and others drawn evenly from all the rest, each of which stands for as many as
    were not drawn. The estimate of the sum is unbiased, and exact where id_U is the whole vocabulary.
    """
    (B, T, _), U, V = id_BTY.shape, len(id_U), head_VD.shape[0]
    top = jnp.einsum("btd,btyd->bty", x_BTD, head_VD[id_BTY])
    column = jnp.full(V, U, jnp.int32).at[id_U].set(jnp.arange(U, dtype=jnp.int32))[id_BTY]
    b, t = jnp.arange(B)[:, None, None], jnp.arange(T)[None, :, None]
    asked = jnp.zeros((B, T, U), bool).at[b, t, column].set(True, mode="drop")  # counted in `top` already
    drawn = U - common - asked[..., common:].sum(axis=-1)
    others = V - common - (column >= common).sum(axis=-1)
    weight = jnp.log(jnp.maximum(others, 1) / jnp.maximum(drawn, 1))
    logits = x_BTD @ head_VD[id_U].T
    logits = logits.at[..., common:].add(weight[..., None]) if common < U else logits
    return top, jax.nn.logsumexp(jnp.where(asked, NEG, logits), axis=-1)


class Learning(struct.PyTreeNode):
    """What training changes: the student's blocks and last norm, the optimiser's state, and how many steps were taken."""

    weights: dict[str, Any]
    optimiser: Any
    step: jax.Array


def schedule(peak: float, steps: int, warm: int = 28, decay: int = 96) -> optax.GradientTransformation:
    """AdamW (betas .9 and .95, decay .1 of matrices, norms of gradients cut at 1) at a rate that rises for `warm` steps, stays, and falls
    to zero over the last `decay` ones: before those a run may be made longer or shorter (Hu et al. 2024, MiniCPM, sec. 4.2).
    """
    last = max(steps - decay, warm)
    parts = optax.linear_schedule(peak / 50, peak, warm), optax.constant_schedule(peak), optax.linear_schedule(peak, 0.0, decay)
    rate = optax.join_schedules(parts, [warm, last])

    def matrices(tree):
        return jax.tree.map(lambda x: x.ndim > 1, tree)

    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, 0.9, 0.95, weight_decay=0.1, mask=matrices))


def begin_learning(m: Model, optimiser: optax.GradientTransformation) -> Learning:
    weights: dict[str, Any] = {"blocks": m.params.blocks, "norm_D": m.params.norm_D}
    weights = jax.tree.map(jnp.copy, weights)  # the steps consume them, and the target's must stay
    return Learning(weights, optimiser.init(weights), jnp.int32(0))


def taught(frozen: Params, weights: dict[str, Any]) -> Params:
    """The student's parameters: the frozen embedding and head around what was trained."""
    return frozen.replace(blocks=weights["blocks"], norm_D=weights["norm_D"])


def loss(weights, frozen: Params, cfg: Config, given: Lessons, common: int, id_U: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(mean KL over the known places, the share of them at which the likeliest of the target's Y is the student's of those too)."""
    head = frozen.embed_VD if frozen.head_VD is None else frozen.head_VD
    x = rows(taught(frozen, weights), cfg, given.tokens_BS, given.known_B)
    top, rest = logits_of(x, head, given.id_BSY, common, id_U)
    known = jnp.arange(x.shape[1])[None] < given.known_B[:, None]

    def mean(y):
        return jnp.where(known, y, 0.0).sum() / known.sum()

    return mean(divergence(top, rest, given.logp_BSY.astype(top.dtype))), mean(jnp.argmax(top, axis=-1) == 0)


@partial(jax.jit, static_argnames=("cfg", "optimiser", "common"), donate_argnames="state")
def step(
    state: Learning, frozen: Params, given: Lessons, id_U: jax.Array, *, cfg: Config, optimiser: Any, common: int
) -> tuple[Learning, tuple[jax.Array, jax.Array]]:
    """One step on a batch: (what was learnt, (loss, agreement) before it)."""
    (value, agree), grads = jax.value_and_grad(loss, has_aux=True)(state.weights, frozen, cfg, given, common, id_U)
    updates, inner = optimiser.update(grads, state.optimiser, state.weights)
    weights: Any = optax.apply_updates(state.weights, updates)
    return Learning(weights, inner, state.step + 1), (value, agree)


def common_ids(given: Sequence[Lessons], V: int, count: int) -> np.ndarray:
    """The `count` tokens to which the target gives most probability over these lessons."""
    mass = np.zeros(V)
    for some in given:
        known = np.arange(some.id_BSY.shape[1])[None] < np.asarray(some.known_B)[:, None]
        np.add.at(mass, np.asarray(some.id_BSY)[known].ravel(), np.exp(np.asarray(some.logp_BSY)[known].astype(np.float32)).ravel())
    return np.argsort(-mass, kind="stable")[:count]


def drawn_ids(common: np.ndarray, V: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """The common tokens, and `count` of the others evenly at random."""
    return np.concatenate([common, rng.choice(np.setdiff1d(np.arange(V), common), count, replace=False)]).astype(np.int32)
