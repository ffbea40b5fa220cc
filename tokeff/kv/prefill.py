"""The dense prefill: every prompt row through the network once, leaving `Prefilled` layers that any policy can pack.

Layers run one jitted call at a time, so a 30-layer model compiles one layer. A long prompt may come in chunks; each attends to what
is there so far and nothing more. Several policies can share one prefill: ask for the union of their evidence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from tokeff.errors import UserError
from tokeff.kv.cache import per_head
from tokeff.kv.evidence import Evidence, Seen
from tokeff.kv.policy import Policy, Prefilled
from tokeff.kv.some_heads import in_heads
from tokeff.models.attention import flash
from tokeff.models.config import Config, Params
from tokeff.models.flow import EMPTY, Accepted, Flow, Here
from tokeff.models.transformer import Pass, acting, alike, embed, last_row, one_layer, orders, project, rms_norm, unembed


@dataclass(frozen=True)
class Gather(Policy):
    """The policy of a prefill: append this call's rows, attend causally, and gather the evidence asked for."""

    evidence: tuple[Evidence, ...] = ()
    gaps: bool = False  # rows of an earlier turn or piece are there, with its padding behind them
    pattern: Any = None  # a `tokeff.sparse.pattern.Pattern`: which blocks of rows the queries read; None reads all

    def role(self, layer: int) -> Any:
        return None if self.pattern is None else self.pattern.role(layer), *(kind.role(layer) for kind in self.evidence)

    def attend(self, q, k, v, ask: Flow, new: Flow, layer: Prefilled, accepted: Accepted | None, across, here: Here):
        if layer.head_BK is not None and new.head_BK is None:  # what continues a prompt that lost heads to a pass
            out, rows = in_heads(layer.head_BK, self, q, k, v, ask, new, layer.replace(head_BK=None), accepted, here)
            return out, rows.replace(head_BK=layer.head_BK), across
        cfg, before = here.cfg, layer.order_BKS.shape[2]
        raw, q, k = q, here.rotate(q, ask.angle_BT[:, :, None]), here.rotate(k, new.angle_BT[:, :, None])
        dtype, here_K = layer.k_BKSH.dtype, slice(k.shape[2])  # a layer without rows takes as many heads as come
        k = jnp.concatenate([layer.k_BKSH[:, here_K], k.swapaxes(1, 2).astype(dtype)], axis=2)
        v = jnp.concatenate([layer.v_BKSH[:, here_K], v.swapaxes(1, 2).astype(dtype)], axis=2)
        heads = layer.order_BKS.shape[:2]
        order = jnp.concatenate([layer.order_BKS, jnp.broadcast_to(new.order_BT[:, None], (*heads, new.order_BT.shape[1]))], axis=2)
        if self.pattern is not None and ask is new:
            out, lse = self.pattern.attend(q, k, v, order[:, 0], ask, layer.length_B, before, here)
        else:
            out, lse = flash(
                q, k, v, here.lo(ask.order_BT), ask.hi_BT, order, scale=cfg.scale, softcap=cfg.softcap,
                first=before if ask is new else None,
                # Padding between two turns or pieces makes rows stand further apart than their orders say.
                window=None if self.gaps else here.window,
            )  # fmt: skip
        seen = Seen(raw, q, lse, ask, k, order, layer.length_B, new.id_BT, new.x_BTD)
        evidence = {a: a.gather(seen, layer.evidence_BKS.get(a), here) for a in self.evidence}
        return out, layer.replace(k_BKSH=k, v_BKSH=v, order_BKS=order, evidence_BKS=evidence, head_BK=new.head_BK), across


class Prompt(struct.PyTreeNode):
    """A prefilled batch: the layers, the text as given, and float32 logits after each prompt's last token.

    next_B is the order of the row that comes next: `length_B`, less what a restarting pass left out; then place_BM says where in
    the text each row of the shorter prompt stood.
    """

    layers: tuple[Prefilled, ...]
    tokens_BT: jax.Array
    length_B: jax.Array
    next_B: jax.Array
    logits_BV: jax.Array
    place_BM: jax.Array | None = None


class Embeds(struct.PyTreeNode):
    """Rows of a prompt that enter as vectors: of pictures, sound, or of anything else that a decoder was taught to read.

    x_BMD: what enters in the place of the tokens' embeddings, text rows included, scaled as those are. place_BM: where in the text each row
    stands, ascending, EMPTY past the last; None where there is one for every token. A token without a row is in the text and in no cache,
    and the rows around it keep their places.
    """

    x_BMD: jax.Array
    place_BM: jax.Array | None = None

    def take(self, index_BM: jax.Array) -> Embeds:
        """The chosen rows, each at the next place of a shorter text."""
        return Embeds(jnp.take_along_axis(self.x_BMD, jnp.maximum(index_BM, 0)[..., None], axis=1))


def run_layers(params, cfg, flow, layers, *, policy, cut=None, upto: int | None = None, then: Callable | None = None):
    """`stack`, one compiled call a layer: for long passes, where compiling L layers at once would cost more than it saves. `then` maps
    (layer number, its new cache) to what is held of it."""
    out, across = list(layers), None
    for i in range(cfg.L if upto is None else upto):
        here = Here(alike(policy, cut, cfg, i), cfg)
        flow, out[i], across = one_layer(
            params.blocks[i], flow, layers[i], None, across, policy=policy, cut=acting(cut, cfg, i), here=here
        )
        if then is not None:
            out[i] = then(i, out[i])
    return flow, tuple(out)


def blank(cfg: Config, B: int, length_B: jax.Array, dtype) -> tuple[Prefilled, ...]:
    """L layers without rows."""
    none = jnp.zeros((B, cfg.K, 0, cfg.H), dtype)
    order = jnp.zeros((B, 1, 0), jnp.int32)
    return tuple(Prefilled(none, none, order, length_B, jnp.int32(i), {}) for i in range(cfg.L))


def prefill(
    params: Params,
    cfg: Config,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    *,
    evidence: tuple[Evidence, ...] = (),
    cut: Pass | None = None,
    chunk: int | None = None,
    dtype: str | None = None,
    after: Prompt | None = None,
    pattern: Any = None,
    embeds: Embeds | None = None,
) -> Prompt:
    """Right-padded prompts through the network, in chunks of `chunk` rows if given. See `Prompt`.

    embeds: the rows that enter, where they are not the tokens' embeddings. tokens_BT and length_B are those of the text all the same.

    pattern: a sparse prefill (`tokeff.sparse.pattern`); what continues a prompt reads all of it.

    after: rows that are there already; these tokens continue them (the next question on one context). Evidence of the last rows
    then counts the rows of this call only. Raises UserError when a pass that ranks the whole prompt gets it in pieces.
    """
    check_pieces(after is not None, chunk if chunk is not None and chunk < tokens_BT.shape[1] else None, cut, pattern)
    text, given_B, dtype, place = tokens_BT, length_B, dtype or params.embed_VD.dtype.name, None
    for kind in evidence:
        kind.behind(cut, cfg)
    if embeds is not None:
        check_embeds(embeds.place_BM is not None, evidence, pattern)
    if pattern is not None and pattern.own_pass and after is None:
        check_pass(pattern, cut)
        prompt = pattern.fill(params, cfg, tokens_BT, length_B, tuple(evidence), dtype)
        return revisited(evidence, params, cfg, prompt, tokens_BT, length_B, dtype)
    if cut is not None and cut.restart:
        tokens_BT, length_B, place, embeds = restart(params, cfg, tokens_BT, length_B, cut, dtype, pattern, embeds)
        cut = None
    B, own_B = tokens_BT.shape[0], length_B
    ids, order, x_BTD = entering(tokens_BT, length_B, embeds)
    T, layers = order.shape[1], blank(cfg, B, length_B, dtype)
    if after is not None:
        order = jnp.where(order == EMPTY, EMPTY, order + after.next_B[:, None])
        given_B, length_B = given_B + after.length_B, length_B + after.next_B
        text = join(after.tokens_BT, after.length_B, text)
        layers = tuple(go_on(layer, length_B, T) for layer in after.layers)
    policy, rows = Gather(tuple(evidence), after is not None, pattern if after is None else None), []
    for a in range(0, T, chunk or T):
        flow = _enter_part(params, ids, order, x_BTD, a, cfg=cfg, T=min(chunk or T, T - a))
        flow, layers = run_layers(params, cfg, flow, layers, policy=policy, cut=cut)
        rows.append((_last_order(flow.order_BT), last_row(flow)))
    x = _latest(*zip(*rows, strict=True))
    if after is not None:
        layers = tuple(close_gaps(layer) for layer in layers)
    prompt = Prompt(layers, text, given_B, length_B, last_logits(params, cfg, x), place)
    return revisited(evidence, params, cfg, prompt, tokens_BT, own_B, dtype, x_BTD)


@jax.jit
def _last_order(order_BT: jax.Array) -> jax.Array:
    return order_BT.max(axis=1)


@jax.jit
def _latest(order_B: tuple[jax.Array, ...], x_B1D: tuple[jax.Array, ...]) -> jax.Array:
    """The row of the largest order, out of those of several chunks."""
    which = jnp.argmax(jnp.stack(order_B), axis=0)
    return jnp.take_along_axis(jnp.stack(x_B1D), which[None, :, None, None], axis=0)[0]


def entering(tokens_BT: jax.Array, length_B: jax.Array, embeds: Embeds | None) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(token ids, orders, and vectors or None) of the rows that a prompt enters with."""
    if embeds is None or embeds.place_BM is None:
        return tokens_BT, orders(length_B, tokens_BT.shape[1]), None if embeds is None else embeds.x_BMD
    return jnp.take_along_axis(tokens_BT, jnp.maximum(embeds.place_BM, 0), axis=1), embeds.place_BM, embeds.x_BMD


def enter(params: Params, cfg: Config, ids_BT: jax.Array, order_BT: jax.Array, x_BTD: jax.Array | None) -> Flow:
    """Rows at the bottom of the network: the tokens' embeddings, or the vectors given for them."""
    flow = embed(params, cfg, ids_BT, order_BT)
    return flow if x_BTD is None else flow.replace(x_BTD=x_BTD.astype(flow.x_BTD.dtype))


@partial(jax.jit, static_argnames=("cfg", "T"))
def _enter_part(params, ids_BT, order_BT, x_BTD, a: jax.Array, *, cfg: Config, T: int) -> Flow:
    """`enter` for T of the rows, from the a-th on: one program for all chunks of a prompt."""
    ids_BT, order_BT, x_BTD = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, a, T, axis=1), (ids_BT, order_BT, x_BTD))
    return enter(params, cfg, ids_BT, order_BT, x_BTD)


def check_embeds(gaps: bool, evidence: tuple[Evidence, ...], pattern: Any) -> None:
    """Refuse rows that are no tokens to a prefill that embeds tokens itself, and gaps between rows to what needs one for every token."""
    for kind in evidence:
        if gaps and type(kind).revisit is not Evidence.revisit:
            raise UserError(f"{type(kind).__name__} reads every token of the prompt again, and some have no row; renumber the rows")
    if pattern is not None and (pattern.own_pass or gaps):
        raise UserError(f"{type(pattern).__name__} needs a row for every token of the prompt; leave out prefill, or renumber the rows")


def check_pieces(goes_on: bool, chunk: int | None, cut: Pass | None, pattern: Any) -> None:
    """Refuse a prompt that continues another, or comes in chunks (None: in one), to what ranks all of it or works in blocks."""
    if cut is not None and (goes_on or chunk is not None):
        raise UserError(f"{type(cut).__name__} ranks the whole prompt; give it in one piece, without chunk")
    if chunk is None or pattern is None:
        return
    if pattern.whole_prompt:
        raise UserError(f"{type(pattern).__name__} ranks by the end of the whole prompt; give it in one piece, without chunk")
    if not goes_on and chunk % pattern.block:
        raise UserError(f"chunks must be whole blocks of {pattern.block}; give chunk={-(-chunk // pattern.block) * pattern.block}")


def check_pass(pattern: Any, cut: Pass | None) -> None:
    """Refuse a pass with a prefill that itself says which rows go on, or what each head of a layer reads where the pass lets some go."""
    if cut is None or pattern is None:
        return
    if pattern.own_pass:
        raise UserError(f"{type(pattern).__name__} says itself which rows go on; leave out cut={type(cut).__name__} or prefill")
    if pattern.by_head and cut.narrows:
        raise UserError(f"{type(pattern).__name__} names heads of whole layers, and {type(cut).__name__} lets some go; set heads_left=1.0")


def revisited(evidence, params, cfg, prompt: Prompt, tokens_BT, length_B, dtype, x_BTD=None) -> Prompt:
    """The finished prompt, with the evidence that takes a pass of its own. x_BTD: its rows, where they are not the tokens' embeddings."""
    for kind in evidence:
        prompt = kind.revisit(params, cfg, prompt, tokens_BT, length_B, dtype, x_BTD)
    return prompt


@jax.jit
def close_gaps(layer: Prefilled) -> Prefilled:
    """Move the padding between two turns to the end: stores fill slots in order, and neighbours are neighbours in the text."""
    at = jnp.argsort(layer.order_BKS == EMPTY, axis=2, stable=True)

    def rows(x_BKSx):
        return per_head(lambda x, i: x[i])(x_BKSx, jnp.broadcast_to(at, (*x_BKSx.shape[:2], at.shape[2])))

    return layer.replace(
        k_BKSH=rows(layer.k_BKSH), v_BKSH=rows(layer.v_BKSH), order_BKS=rows(layer.order_BKS),
        evidence_BKS={a: rows(x) if a.per_row else x for a, x in layer.evidence_BKS.items()},
    )  # fmt: skip


def go_on(layer: Prefilled, length_B: jax.Array, more: int) -> Prefilled:
    """A layer whose prompt becomes longer by at most `more` rows, with the evidence that still counts."""
    longer = {a: a.longer(x, length_B - layer.length_B) for a, x in layer.evidence_BKS.items()}
    whole_B = None if layer.whole_B is None else layer.whole_B + length_B - layer.length_B
    whole = None if layer.whole is None else layer.whole + more
    return layer.replace(
        length_B=length_B, whole_B=whole_B, whole=whole, evidence_BKS={a: x for a, x in longer.items() if x is not None}
    )


@jax.jit
def join(a_BS: jax.Array, length_B: jax.Array, b_BT: jax.Array) -> jax.Array:
    """tokens_B(S+T): each row's `b` right behind its `length` tokens of `a`."""
    at = length_B[:, None] + jnp.arange(b_BT.shape[1])[None]
    return jax.vmap(lambda row, i, b: row.at[i].set(b))(jnp.pad(a_BS, ((0, 0), (0, b_BT.shape[1]))), at, b_BT)


@partial(jax.jit, static_argnames="cfg")
def last_logits(params, cfg, x_B1D):
    return unembed(params, cfg, x_B1D)[:, 0]


def restart(params, cfg, tokens_BT, length_B, cut: Pass, dtype, pattern, embeds: Embeds | None = None):
    """(tokens_BM, length_B, place_BM, their vectors or None) of the rows that a restarting pass keeps: only the layers below it run."""
    ids, order, x_BTD = entering(tokens_BT, length_B, embeds)
    flow, bottom = enter(params, cfg, ids, order, x_BTD), blank(cfg, len(ids), length_B, dtype)
    at = cut.layers(cfg)[0]
    flow, _ = run_layers(params, cfg, flow, bottom, policy=Gather(pattern=pattern), upto=at)
    index = _choose(params.blocks[at], flow, cut=cut, here=Here(at, cfg))
    # Missing rows (short prompts of the batch) move to the end, so that the kept tokens are a right-padded prompt again.
    index = jnp.take_along_axis(index, jnp.argsort(index == EMPTY, axis=1, stable=True), axis=1)
    tokens = jnp.take_along_axis(ids, jnp.maximum(index, 0), axis=1)
    many_B, place = (index != EMPTY).sum(axis=1, dtype=jnp.int32), index
    if embeds is not None and embeds.place_BM is not None:
        place = jnp.where(index == EMPTY, EMPTY, jnp.take_along_axis(embeds.place_BM, jnp.maximum(index, 0), axis=1))
    return tokens, many_B, place, None if embeds is None else embeds.take(index)


@partial(jax.jit, static_argnames=("cut", "here"))
def _choose(w, flow, *, cut, here):
    q, k, _ = project(w, here.cfg, rms_norm(flow.x_BTD, w.attn_norm_D, here.cfg.eps))
    return cut.choose(q, k, flow, here)
