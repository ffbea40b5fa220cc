"""MInference's offline search: which pattern reads for each head, by the error of its output on real text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from tokeff.errors import UserError
from tokeff.generation import encode, pad
from tokeff.kv.prefill import Gather, blank
from tokeff.models.attention import flash
from tokeff.models.config import Config
from tokeff.models.flow import Here
from tokeff.models.load import Model
from tokeff.models.transformer import embed, one_layer, orders, project, rms_norm
from tokeff.sparse.pattern import Pattern


@partial(jax.jit, static_argnames=("pattern", "here"))
def head_errors(w, flow, length_B, *, pattern: Pattern, here: Here) -> jax.Array:
    """error_K: mean squared difference between a pattern's output and dense attention's, over prompt rows and the group."""
    cfg = here.cfg
    q, k, v = project(w, cfg, rms_norm(flow.x_BTD, w.attn_norm_D, cfg.eps))
    q, k = (here.rotate(x, flow.angle_BT[:, :, None]).astype(x.dtype) for x in (q, k))
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    exact, _ = flash(
        q, k, v, here.lo(flow.order_BT), flow.hi_BT, flow.order_BT[:, None], scale=cfg.scale, softcap=cfg.softcap, first=0,
        window=here.window,
    )  # fmt: skip
    sparse, _ = pattern.attend(q, k, v, flow.order_BT, flow, length_B, 0, here)
    missed = jnp.square(sparse - exact).astype(jnp.float32).sum(axis=-1) * (flow.order_BT >= 0)[..., None]
    B, T, N = missed.shape
    return missed.reshape(B, T, cfg.K, N // cfg.K).sum(axis=(0, 1, 3)) / (length_B.sum() * cfg.N // cfg.K * cfg.H)


def search(m: Model, text: str | Sequence[int], patterns: tuple[Pattern, ...]) -> tuple[tuple[int, ...], ...]:
    """For each layer and kv head, which of `patterns` comes closest to dense attention on this text (Jiang et al. 2024, alg. 1).

    The paper searches at equal FLOPs: give patterns that read about equally many rows. The result is `heads` of
    `tokeff.sparse.minference`. Use a text that is not evaluated on.
    """
    cfg: Config = m.cfg
    ids = encode(m, [text] if isinstance(text, str) else [list(text)])
    for pattern in patterns:
        pattern.check(cfg, len(ids[0]))
    if not patterns:
        raise UserError("no patterns to choose from; give at least one")
    tokens, length = pad(ids)
    flow = embed(m.params, cfg, tokens, orders(length, tokens.shape[1]))
    layers, chosen = blank(cfg, 1, length, m.precision.cache), []
    for i, w in enumerate(m.params.blocks):
        here = Here(next(j for j in range(i + 1) if (cfg.windows[j], cfg.rope_of(j)) == (cfg.windows[i], cfg.rope_of(i))), cfg)
        errors = jnp.stack([head_errors(w, flow, length, pattern=pattern, here=here) for pattern in patterns])
        chosen.append(tuple(int(best) for best in errors.argmin(axis=0)))
        flow, _, _ = one_layer(w, flow, layers[i], None, None, policy=Gather(), cut=None, here=here)
    return tuple(chosen)
