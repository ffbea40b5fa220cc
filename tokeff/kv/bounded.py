"""Reading a long prompt in bounded memory: piece by piece, and between two pieces the policy lets rows go.

What a layer holds is then never more than its budget and one piece, however long the prompt is. It is another rule than ranking a
prompt that is there as a whole: a row that is dropped early cannot come back, and later rows are computed without it. Policies that
hold every row (`Policy.squeeze` gives all of them back; `held_between` says how many one holds) are read exactly, in the memory that
this takes.
"""

from __future__ import annotations

from functools import partial
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp

from tokeff.errors import UserError
from tokeff.kv.evidence import Evidence
from tokeff.kv.policy import Policy, Prefilled, pad_slots
from tokeff.kv.prefill import Gather, Prompt, blank, close_gaps, last_logits, run_layers
from tokeff.models.config import Config, Params
from tokeff.models.flow import EMPTY, Here
from tokeff.models.transformer import alike, embed, last_row, orders


def check_bounded(piece: int | None, policy: Policy, cut, pattern) -> None:
    """Refuse what needs the whole prompt at once."""
    if piece is None:
        return
    if not isinstance(piece, Integral) or piece < 1:
        raise UserError(f"bounded={piece} reads no token at a time; give a whole number of 1 or more, or leave it out")
    if cut is not None:
        raise UserError(f"{type(cut).__name__} ranks the whole prompt; read it without bounded")
    if pattern is not None:
        raise UserError(f"{type(pattern).__name__} reads blocks of a whole prompt; leave out bounded or prefill")
    for kind in policy.needs():
        if type(kind).revisit is not Evidence.revisit:
            raise UserError(f"{type(kind).__name__} reads the whole prompt again at its end; read it without bounded")


def prefill_bounded(
    params: Params, cfg: Config, tokens_BT: jax.Array, length_B: jax.Array, policy: Policy, *, piece: int,
    evidence: tuple[Evidence, ...] = (), dtype: str,
) -> Prompt:  # fmt: skip
    """`prefill` in pieces of `piece` tokens, with `policy.squeeze` between them. Heads then hold different rows.

    Each piece is to its own end what a prompt is to its end: a window of last queries is that of the piece, and a last piece of few
    tokens has few. A share as a budget is one of the whole prompt from the first piece on. A sequence of the batch that has ended keeps the
    rows it ended with, for `pack` to choose from: as much as another piece, as long as longer ones are read.
    """
    (B, T), longest = tokens_BT.shape, int(length_B.max())
    order = orders(length_B, T)
    layers = tuple(rows.replace(whole_B=length_B, whole=T) for rows in blank(cfg, B, jnp.zeros_like(length_B), dtype))
    gather, x_B1D = Gather(tuple(evidence), gaps=True), None
    for a in range(0, longest, piece):
        part = slice(a, min(a + piece, T))
        layers = tuple(arrive(layer, jnp.minimum(length_B, part.stop)) for layer in layers)
        flow, layers = run_layers(
            params, cfg, embed(params, cfg, tokens_BT[:, part], order[:, part]), layers, policy=gather,
            then=None if part.stop >= longest else partial(squeeze_one, policy, cfg, piece, length_B > part.stop),
        )  # fmt: skip
        ends = (length_B > part.start)[:, None, None]
        x_B1D = last_row(flow) if x_B1D is None else jnp.where(ends, last_row(flow), x_B1D)
    assert x_B1D is not None
    layers = tuple(close_gaps(layer) for layer in layers)
    return Prompt(layers, tokens_BT, length_B, length_B, last_logits(params, cfg, x_B1D))


def held_between(policy: Policy, cfg: Config, rows: int, whole: int, layer: int = 0) -> int:
    """Of so many rows that a layer has read, how many it holds until the next piece of a prompt of `whole` rows comes. Computes nothing."""
    kv, order = jax.ShapeDtypeStruct((1, cfg.K, rows, cfg.H), "float32"), jax.ShapeDtypeStruct((1, cfg.K, rows), "int32")
    length, index = jax.ShapeDtypeStruct((1,), "int32"), jax.ShapeDtypeStruct((), "int32")
    like: Any = Prefilled  # shapes in the place of arrays
    given = like(kv, kv, order, length, index, {kind: kind.like(1, rows, cfg) for kind in policy.needs()}, length, whole)
    return jax.eval_shape(lambda rows: policy.squeeze(rows, Here(layer, cfg)), given).order_BKS.shape[2]


def arrive(layer: Prefilled, length_B: jax.Array) -> Prefilled:
    """A layer whose prompt goes on to this length. Evidence of the last rows begins anew where rows come; elsewhere these stay the last."""
    more_B = length_B - layer.length_B

    def kept(kind: Evidence, value):
        longer = kind.longer(value, more_B)
        if longer is not None:
            return longer
        return jax.tree.map(lambda x: jnp.where((more_B > 0).reshape(-1, *(1,) * (x.ndim - 1)), 0, x), value)

    return layer.replace(length_B=length_B, evidence_BKS={a: kept(a, x) for a, x in layer.evidence_BKS.items()})


def squeeze_one(policy: Policy, cfg: Config, piece: int, more_B: jax.Array, i: int, rows: Prefilled) -> Prefilled:
    """What the policy lets layer i hold between pieces, of the sequences of which more comes."""
    here = Here(alike(policy, None, cfg, i), cfg)
    return _squeeze(rows, more_B, policy=policy, piece=None if bool(more_B.all()) else piece, here=here)


@partial(jax.jit, static_argnames=("policy", "piece", "here"))
def _squeeze(rows: Prefilled, more_B: jax.Array, *, policy: Policy, piece: int | None, here: Here) -> Prefilled:
    rows = close_gaps(rows)
    small = policy.squeeze(rows, here)
    return small if piece is None else either(more_B, small, rows, piece)


def either(more_B: jax.Array, small: Prefilled, rows: Prefilled, piece: int) -> Prefilled:
    """`small` of the sequences of which more comes, `rows` of those that have ended: what they were left with, and a piece."""
    S = min(rows.order_BKS.shape[2], small.order_BKS.shape[2] + piece)

    def pick(few, all_of_them, fill=0):
        more = more_B.reshape(-1, *(1,) * (few.ndim - 1))
        return jnp.where(more, pad_slots(few[:, :, :S], S, 2, fill), all_of_them[:, :, :S])

    return rows.replace(
        k_BKSH=pick(small.k_BKSH, rows.k_BKSH), v_BKSH=pick(small.v_BKSH, rows.v_BKSH),
        order_BKS=pick(small.order_BKS, rows.order_BKS, EMPTY),
        evidence_BKS={a: pick(x, rows.evidence_BKS[a]) if a.per_row else x for a, x in small.evidence_BKS.items()},
    )  # fmt: skip
