"""Which channels of a model matter, measured once on a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from tokeff.generation import encode, pad
from tokeff.kv.policy import Ask
from tokeff.kv.prefill import Gather, blank, run_layers
from tokeff.models.flow import EMPTY, Accepted, Flow, Here
from tokeff.models.load import Model
from tokeff.models.transformer import embed, orders
from tokeff.sparse.labels import Channels, Labels

IMPORTANCE = Ask()  # the name under which a layer leaves what was measured


@dataclass(frozen=True)
class Measure(Gather):
    """A prefill whose only evidence is the importance of each channel: mean |q| times mean |k|, which is the mean of |q_c k_c| over all
    pairs of a query and a key, summed over the query heads of a kv head."""

    def attend(self, q, k, v, ask: Flow, new: Flow, layer, accepted: Accepted | None, across, here: Here):
        out, layer, across = super().attend(q, k, v, ask, new, layer, accepted, across, here)
        B, T, N, H = q.shape
        real = (ask.order_BT != EMPTY)[:, :, None, None]
        q, k = (jnp.abs(here.rotate(x, ask.angle_BT[:, :, None]).astype(jnp.float32)) * real for x in (q, k))
        size = q.sum(axis=1).reshape(B, here.cfg.K, -1, H).sum(axis=2) * k.sum(axis=1) / real.sum(axis=1) ** 2
        return out, layer.replace(evidence_BKS={IMPORTANCE: size}), across


def calibrate(m: Model, text: str | Sequence[str] | Sequence[Sequence[int]], labels: float = 0.25) -> Channels:
    """The channels with the largest mean |q_c k_c| of every layer and kv head, for `double_sparsity(labels=labels, channels=...)` (Yang et
    al. 2024, sec. 3.1; there 256 texts of 512 tokens).

    text: one or several, each of which counts the same. Use texts apart from what you evaluate on.
    """
    size = np.mean([_channel_sizes(m, ids) for ids in encode(m, text)], axis=0)
    best = np.argsort(-size, axis=-1, kind="stable")[..., : Labels(labels).width(m.cfg.H)]
    return tuple(tuple(tuple(head.tolist()) for head in layer) for layer in best)


def _channel_sizes(m: Model, ids: list[int]) -> np.ndarray:
    """size_LKH of one text."""
    tokens, length = pad([ids])
    flow = embed(m.params, m.cfg, tokens, orders(length, tokens.shape[1]))
    _, layers = run_layers(m.params, m.cfg, flow, blank(m.cfg, 1, length, m.precision.cache), policy=Measure())
    return np.stack([np.asarray(layer.evidence_BKS[IMPORTANCE])[0] for layer in layers])
