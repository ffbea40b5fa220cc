"""CacheBlend: a prompt from caches that were made elsewhere, with the rows that changed most computed anew (Yao et al. 2024).

Chunks of text are prefilled each by itself, so their rows never saw what stands before them in this prompt. Their keys are turned to where
they stand now. Layers up to `layer` run whole; there the new values are compared with the loaded ones, and from then on only the rows that
deviate most go on, with the end of the prompt. They write their keys and values over the loaded ones and read all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from tokeff.errors import UserError
from tokeff.kv.budget import best
from tokeff.kv.evidence import Evidence, Seen
from tokeff.kv.policy import Prefilled
from tokeff.kv.prefill import Gather, Prompt, blank, last_logits, prefill, run_layers
from tokeff.models.attention import flash
from tokeff.models.flow import EMPTY, Accepted, Flow, Here
from tokeff.models.transformer import Pass, alike, block, embed, last_row, one_layer, orders, project, rms_norm
from tokeff.sparse.pattern import Pattern

if TYPE_CHECKING:
    from tokeff.models.load import Model


class Loaded(NamedTuple):
    """What is known of a prompt before it is computed. Row t of each layer is the row of order t; rows that `sure_BT` names are computed
    anew in any case, whatever stands there."""

    layers: tuple[Prefilled, ...]
    sure_BT: jax.Array
    most: int  # of them in any sequence, at most


@dataclass(frozen=True)
class Recompute(Pattern):
    """Of a prompt's rows that are loaded, compute `share` anew: those whose values deviate most at layer `layer`. The last `dense` rows
    of the prompt are always computed, and count apart. 0 is no recomputation, 1 the dense prefill."""

    share: float = 0.16
    layer: int = 1
    whole_prompt: ClassVar[bool] = True
    own_pass: ClassVar[bool] = True

    def check(self, cfg: Any, length: int) -> None:
        super().check(cfg, length)
        if not 0 <= self.share <= 1:
            raise UserError(f"share {self.share} is not a share of the rows; give a fraction in [0, 1]")
        if not 1 <= self.layer < cfg.L:
            raise UserError(f"layer {self.layer} cannot compare: give 1 to {cfg.L - 1}; in layer 0 values depend on the token alone")
        if self.dense < 1:
            raise UserError("the prompt's last row must be computed; set dense=1 or more")

    def load(self, params, cfg, tokens_BT: jax.Array, length_B: jax.Array, dtype: str) -> Loaded:
        """The rows that are there already."""
        raise NotImplementedError

    def fill(self, params, cfg, tokens_BT: jax.Array, length_B: jax.Array, evidence: tuple[Evidence, ...], dtype: str) -> Prompt:
        loaded = self.load(params, cfg, tokens_BT, length_B, dtype)
        return fuse(params, cfg, tokens_BT, length_B, loaded, self, evidence, dtype)

    def last(self, order_BT: jax.Array, length_B: jax.Array) -> jax.Array:
        """bool_BT: which rows are the prompt's last `dense`."""
        return (order_BT != EMPTY) & (order_BT >= length_B[:, None] - self.dense)


@dataclass(frozen=True)
class Blend(Recompute):
    """CacheBlend (Yao et al. 2024, sec. 4.3) over chunks of `block` tokens, each prefilled by itself as part of this prefill.

    What a server saves is the prefill of the chunks, which `blend` takes as given. One check layer, as in the released code; the paper
    lets the share fall layer by layer.
    """

    def load(self, params, cfg, tokens_BT: jax.Array, length_B: jax.Array, dtype: str) -> Loaded:
        (B, T), R = tokens_BT.shape, self.block
        P = -(-T // R)
        pieces = jnp.pad(tokens_BT, ((0, 0), (0, P * R - T))).reshape(B * P, R)
        held = jnp.clip(length_B[:, None] - jnp.arange(P) * R, 0, R).reshape(B * P)
        made = prefill(params, cfg, pieces, held, dtype=dtype).layers
        layers = tuple(_joined(layer, length_B, T=T, here=Here(alike(Gather(), None, cfg, i), cfg)) for i, layer in enumerate(made))
        return Loaded(layers, self.last(orders(length_B, T), length_B), min(self.dense, T))


@partial(jax.jit, static_argnames=("T", "here"))
def _joined(layer: Prefilled, length_B: jax.Array, *, T: int, here: Here) -> Prefilled:
    """(B * P) chunks of R rows, each at the start of a text, as B prompts of T rows."""
    B, (_, K, R, H) = length_B.shape[0], layer.k_BKSH.shape

    def joined(x):
        return jnp.moveaxis(x.reshape(B, -1, K, R, H), 1, 2).reshape(B, K, -1, H)[:, :, :T]

    k, place = joined(layer.k_BKSH), jnp.arange(T)
    return layer.replace(
        k_BKSH=turned(k, place % R, place, here), v_BKSH=joined(layer.v_BKSH), order_BKS=orders(length_B, T)[:, None], length_B=length_B
    )


def turned(k_BKSH: jax.Array, was: jax.Array, now: jax.Array, here: Here) -> jax.Array:
    """Rotated keys from the places they were computed at to those they stand at now."""
    return here.rotate(here.rotate(k_BKSH, was, inverse=True), now)


def fuse(
    params, cfg, tokens_BT: jax.Array, length_B: jax.Array, loaded: Loaded, how: Recompute, evidence: tuple[Evidence, ...], dtype: str
) -> Prompt:
    """The prompt of loaded rows, `how.share` of them and the sure ones computed anew."""
    T, at, order = tokens_BT.shape[1], how.layer, orders(length_B, tokens_BT.shape[1])
    gather, over = Gather(tuple(evidence)), Overwrite(tuple(evidence))
    flow = embed(params, cfg, tokens_BT, order)
    ids = flow.id_BT
    flow, layers = run_layers(params, cfg, flow, blank(cfg, len(length_B), length_B, dtype), policy=gather, upto=at)
    most = min(T, loaded.most + math.ceil(how.share * T))
    flow, checked = _check_layer(
        params.blocks[at], flow, layers[at], loaded.layers[at].v_BKSH, loaded.sure_BT,
        policy=gather, share=how.share, most=most, here=Here(alike(gather, None, cfg, at), cfg),
    )  # fmt: skip
    done = [*layers[:at], checked]
    for i in range(at + 1, cfg.L):
        here = Here(alike(over, None, cfg, i), cfg)
        flow, layer, _ = one_layer(params.blocks[i], flow, loaded.layers[i], None, ids, policy=over, cut=None, here=here)
        done.append(layer)
    return Prompt(tuple(done), tokens_BT, length_B, length_B, last_logits(params, cfg, last_row(flow)))


@partial(jax.jit, static_argnames=("policy", "share", "most", "here"))
def _check_layer(w, flow: Flow, layer: Prefilled, old_BKSH, sure_BT, *, policy: Gather, share: float, most: int, here: Here):
    """The layer where rows are compared: all write, the chosen ones ask and go on."""
    _, _, v = project(w, here.cfg, rms_norm(flow.x_BTD, w.attn_norm_D, here.cfg.eps))
    index = choose(deviation(v, old_BKSH), flow.order_BT, sure_BT, share, most)
    flow, layer, _ = block(w, flow, layer, None, None, policy=policy, cut=Chosen(here.layer, index), here=here)
    return flow, layer


def deviation(v_BTKH: jax.Array, old_BKSH: jax.Array) -> jax.Array:
    """d_BT: the squared difference of new and loaded values, summed over heads and channels (Yao et al. 2024, sec. 4.3)."""
    return jnp.square(v_BTKH.astype(jnp.float32) - old_BKSH.swapaxes(1, 2)).sum(axis=(2, 3))


def choose(d_BT: jax.Array, order_BT: jax.Array, sure_BT: jax.Array, share: float, most: int) -> jax.Array:
    """index_BM of the rows that go on, ascending, EMPTY past their number: the sure ones, and of the others the `share` with the largest
    deviation."""
    T, free = d_BT.shape[1], (order_BT != EMPTY) & ~sure_BT
    keep_B = sure_BT.sum(axis=1) + jnp.ceil(share * free.sum(axis=1) - 1e-4).astype(jnp.int32)
    score = jnp.where(sure_BT, jnp.inf, jnp.where(free, jnp.nan_to_num(d_BT, nan=jnp.finfo(d_BT.dtype).max), -jnp.inf))
    index = best(score[:, None], keep_B, most)[:, 0]
    return jnp.where(index == T, EMPTY, index)


@dataclass(frozen=True)
class Chosen(Pass):
    """What `block` asks of a pass, with the rows given: inside one trace, never an argument of a compiled function."""

    layer: int
    index_BM: jax.Array

    def layers(self, cfg) -> tuple[int, ...]:
        return (self.layer,)

    def choose(self, q_BTNH, k_BTKH, flow: Flow, here: Here) -> jax.Array:
        return self.index_BM


@dataclass(frozen=True)
class Overwrite(Gather):
    """The policy of a prefill whose rows are there: those of this call take the slots of their orders, and read what their orders allow.
    `across` brings the tokens of all rows, for evidence of them."""

    def attend(self, q, k, v, ask: Flow, new: Flow, layer: Prefilled, accepted: Accepted | None, across, here: Here):
        cfg, (T, S) = here.cfg, (new.order_BT.shape[1], layer.k_BKSH.shape[2])
        raw, q, k = q, here.rotate(q, ask.angle_BT[:, :, None]), here.rotate(k, new.angle_BT[:, :, None])
        slot = jnp.where(new.order_BT == EMPTY, S + jnp.arange(T), new.order_BT)

        @jax.vmap
        def put(x_KSH, slot_T, new_TKH):
            return x_KSH.at[:, slot_T].set(new_TKH.swapaxes(0, 1).astype(x_KSH.dtype), mode="drop", unique_indices=True)

        k, v, order = put(layer.k_BKSH, slot, k), put(layer.v_BKSH, slot, v), layer.order_BKS
        out, lse = flash(q, k, v, here.lo(ask.order_BT), ask.hi_BT, order, scale=cfg.scale, softcap=cfg.softcap)
        seen = Seen(raw, q, lse, ask, k, order, layer.length_B, across)
        evidence = {a: a.gather(seen, layer.evidence_BKS.get(a), here) for a in self.evidence}
        return out, layer.replace(k_BKSH=k, v_BKSH=v, evidence_BKS=evidence), across


def blend(
    m: Model, chunks: Sequence[Prompt], question: Sequence[int], how: Blend | None = None, evidence: tuple[Evidence, ...] = ()
) -> Prompt:
    """The prompt of these chunks and a question behind them, from the caches of the chunks.

    chunks: prefills of one text each, in the order in which they are to stand (`tokeff.generation.read(m, [ids], Setup())`); they may
    serve any number of prompts. question: token ids, always computed. how: its `share`, `layer` and `dense`; its `block` has no part.
    Any policy packs the result. Raises UserError for chunks of several texts and for a question without tokens.
    """
    how = Blend(512, 1) if how is None else how
    if not len(question):
        raise UserError("the question has no tokens; give at least one behind the chunks")
    if any(chunk.tokens_BT.shape[0] != 1 for chunk in chunks):
        raise UserError("a chunk holds several texts; prefill each by itself")
    sizes = [int(chunk.length_B[0]) for chunk in chunks]
    n = sum(sizes) + len(question)
    how.check(m.cfg, n)
    T, length_B = -(-n // 64) * 64, jnp.asarray([n], jnp.int32)
    tokens = [chunk.tokens_BT[0, :size] for chunk, size in zip(chunks, sizes, strict=True)]
    tokens = jnp.concatenate([*tokens, jnp.asarray(question, jnp.int32), jnp.zeros(T - n, jnp.int32)])[None]
    layers = tuple(place([chunk.layers[i] for chunk in chunks], sizes, length_B, T, i, m) for i in range(m.cfg.L))
    last, order = max(len(question), how.dense), orders(length_B, T)
    sure = (order != EMPTY) & (order >= n - last)
    return fuse(m.params, m.cfg, tokens, length_B, Loaded(layers, sure, min(last, T)), how, evidence, m.precision.cache)


def place(chunks: list[Prefilled], sizes: list[int], length_B: jax.Array, T: int, i: int, m: Model) -> Prefilled:
    """One layer of chunks behind each other, their keys turned to where they now stand; zeros from their end to T."""
    here, zero = Here(i, m.cfg), jnp.zeros((1, m.cfg.K, T - sum(sizes), m.cfg.H), m.precision.cache)
    starts = [sum(sizes[:c]) for c in range(len(sizes))]

    def at(x: Prefilled, start: int, size: int):
        return turned(x.k_BKSH[:, :, :size], jnp.arange(size), start + jnp.arange(size), here)

    k = [at(x, start, size) for x, start, size in zip(chunks, starts, sizes, strict=True)]
    v = [x.v_BKSH[:, :, :size] for x, size in zip(chunks, sizes, strict=True)]
    join = partial(jnp.concatenate, axis=2)
    return Prefilled(join([*k, zero]), join([*v, zero]), orders(length_B, T)[:, None], length_B, jnp.int32(i), {})
