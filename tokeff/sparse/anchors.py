"""Kascade's search (Deshmukh et al. 2025, sec. 3): which layers choose for the layers above them, and which head follows which."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.errors import UserError
from tokeff.generation import encode
from tokeff.kv.budget import Budget, most_rows
from tokeff.kv.prefill import Gather, blank
from tokeff.models.attention import flash, scores, softmax
from tokeff.models.flow import Here
from tokeff.models.load import Model
from tokeff.models.transformer import embed, linear, one_layer, orders, project, rms_norm
from tokeff.sharding import beside

Heads = tuple[tuple[int, ...], ...]


def anchors(
    m: Model, texts: str | Sequence[str] | Sequence[Sequence[int]], count: int = 4, budget: Budget = 0.125,
    dense: tuple[int, ...] = (0, 1), recent: int = 16, last: int = 64,
) -> tuple[tuple[int, ...], Heads]:  # fmt: skip
    """(select, head_map) for `kascade(budget, dense, select, head_map, recent)`: the `count` layers that best choose for those above them,
    by dynamic programming over how alike and how important layers are, and for each kv head the head of its anchor most like it.

    Alike is what a head gives to the rows that another would choose, relative to its own choice: at each of the `last` queries of a text,
    of which the worst counts, averaged over texts. Importance of a layer is 1 - cosine between the rows that enter its attention and the
    same with the attention's output added. In the paper layer 0 is dense and an anchor; here dense layers choose nothing, so the first
    other layer is an anchor. Texts of equal use; take some that you do not evaluate on.
    """
    free = [i for i in range(m.cfg.L) if i not in dense]
    if not 1 <= count <= len(free):
        raise UserError(f"{count} anchors do not fit {len(free)} layers that are not dense; give 1 to {len(free)}")
    alike, weight = np.zeros((m.cfg.L, m.cfg.L, m.cfg.K, m.cfg.K)), np.zeros(m.cfg.L)
    found = encode(m, texts)
    for ids in found:
        rows = most_rows(budget, len(ids)) - recent
        if rows < 1 or len(ids) < last + recent + rows:
            raise UserError(f"a text of {len(ids)} tokens with budget {budget} leaves nothing to choose; give longer texts")
        p_LKTS, turned_L = looks(m, ids, last)
        alike += overlap(p_LKTS, rows, recent) / len(found)
        weight += turned_L / len(found)
    gain = alike.max(axis=2).mean(axis=2) * weight
    chosen = tuple(free[i] for i in best_anchors(gain[np.ix_(free, free)], count))
    return chosen, head_map(alike, chosen, dense)


@partial(jax.jit, static_argnames=("last", "here"))
def look(w, flow, *, last: int, here: Here) -> tuple[jax.Array, jax.Array]:
    """One layer on one text: (p_KTS, turned), the attention of the last rows summed over each kv head's group, and 1 - cosine of its rows
    before and after the attention's output is added."""
    cfg = here.cfg
    q, k, v = project(w, cfg, rms_norm(flow.x_BTD, w.attn_norm_D, cfg.eps))
    q, k = (here.rotate(x, flow.angle_BT[:, :, None]).astype(x.dtype) for x in (q, k))
    k, v, order = k.swapaxes(1, 2), v.swapaxes(1, 2), flow.order_BT
    out, _ = flash(q, k, v, here.lo(order), order, order[:, None], scale=cfg.scale, softcap=cfg.softcap, first=0, window=here.window)
    mixed = linear(out.astype(flow.x_BTD.dtype), w.o_DNH)
    if w.post_attn_norm_D is not None:
        mixed = rms_norm(mixed, w.post_attn_norm_D, cfg.eps)
    x, y = (z.astype(jnp.float32) for z in (flow.x_BTD, flow.x_BTD + mixed))
    cosine = (x * y).sum(axis=-1) / (jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1))
    own = order[:, -last:, None]
    seen = (order[:, None] <= own) & (order[:, None] >= here.lo(own))
    p, _ = softmax(scores(q[:, -last:], k, cfg.scale, cfg.softcap), seen[:, None, None])
    return p.sum(axis=2)[0], 1 - cosine.mean()


def looks(m: Model, ids: list[int], last: int) -> tuple[np.ndarray, np.ndarray]:
    """(p_LKTS, turned_L) of every layer on one text."""
    cfg, tokens, length = m.cfg, jnp.asarray([ids], jnp.int32), jnp.asarray([len(ids)], jnp.int32)
    found: list[Any] = []
    with beside(m.params):
        flow = embed(m.params, cfg, tokens, orders(length, len(ids)))
        for i, (w, layer) in enumerate(zip(m.params.blocks, blank(cfg, 1, length, m.precision.cache), strict=True)):
            first = next(j for j in range(i + 1) if (cfg.windows[j], cfg.rope_of(j)) == (cfg.windows[i], cfg.rope_of(i)))
            here = Here(first, cfg)
            found.append(look(w, flow, last=last, here=here))
            flow, _, _ = one_layer(w, flow, layer, None, None, policy=Gather(), cut=None, here=here)
    return np.stack([np.asarray(p) for p, _ in found]), np.array([float(turned) for _, turned in found])


def overlap(p_LKTS: np.ndarray, rows: int, recent: int) -> np.ndarray:
    """alike_LLKK, [a, b, i, j]: what head j of layer b gives to the `rows` rows that head i of layer a gives most to, and to the `recent`
    last ones, relative to its own such rows; at the worst of T queries, the last T of S rows."""
    L, K, T, S = p_LKTS.shape
    p = p_LKTS.reshape(L * K, T, S)
    far = np.arange(S) <= (np.arange(S - T, S) - recent)[:, None]
    top = np.argsort(-np.where(far, p, -1.0), axis=-1, kind="stable")[..., :rows]
    mine = np.zeros(p.shape, p.dtype)
    np.put_along_axis(mine, top, 1.0, axis=-1)
    got = np.einsum("ats,bts->tab", mine, p, optimize=True) + np.where(far, 0.0, p).sum(axis=-1).T[:, None]
    share = got / np.diagonal(got, axis1=1, axis2=2)[:, None]
    return share.min(axis=0).reshape(L, K, L, K).swapaxes(1, 2)


def best_anchors(gain_LL: np.ndarray, count: int) -> tuple[int, ...]:
    """The `count` layers, the first always among them, with the largest sum over layers of gain[the nearest anchor at or below it, it]."""
    L = len(gain_LL)
    best = {L: (0.0, ())}  # of the layers from here on, this one an anchor: the largest sum and its anchors; no layers, no anchors
    for _ in range(count):
        best = {
            a: max((gain_LL[a, a:b].sum() + rest, (a, *above)) for b, (rest, above) in best.items() if b > a)
            for a in range(L) if any(b > a for b in best)
        }  # fmt: skip
    return best[0][1]


def head_map(alike_LLKK: np.ndarray, chosen: tuple[int, ...], dense: tuple[int, ...]) -> Heads:
    """For every layer, which head of its anchor each kv head is most like; anchors and dense layers have their own."""
    L, _, K, _ = alike_LLKK.shape
    own = tuple(range(K))
    return tuple(
        own if i in chosen or i in dense else tuple(alike_LLKK[max(a for a in chosen if a < i), i].argmax(axis=0).tolist())
        for i in range(L)
    )
